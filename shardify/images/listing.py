"""Many names in little memory, found by the whole path, by its end, or by either without the extension.

    name       a/b/c.jpg                its stem        a/b/c    (in Unicode's normal form C)
    endings    b/c.jpg   c.jpg          their stems     b/c    c

Each of the four is a sorted table of 64-bit hashes beside the numbers of the names, made when it is first asked for: 12 bytes an entry. What a
hash finds is compared with the name itself.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import xxhash

from shardify.format.names import IMAGE_FORMATS

_CHUNK = 65_536  # names unpacked together
_TRIED = 4096  # names of one hash: more are repetitions of one name
_DEEPEST = 8  # components of an ending that are hashed; longer ones are told apart by comparing
_SUFFIXES = frozenset(f".{extension}".encode() for extension in IMAGE_FORMATS)


class Kind(IntEnum):
    """What of a name is compared; the value seeds its hashes."""

    WHOLE = 0
    STEM = 1
    ENDING = 2
    ENDING_STEM = 3


_STEMS = (Kind.STEM, Kind.ENDING_STEM)
_ENDINGS = (Kind.ENDING, Kind.ENDING_STEM)


def stem_of(name: str) -> str:
    """A path without its extension, where that is one that images go by, in any case; else the path itself."""
    encoded = name.encode("utf-8", "surrogatepass")
    return encoded[: _stem_length(encoded)].decode("utf-8", "surrogatepass")


def encode(names: Sequence[str]) -> list[bytes]:
    """The names as bytes. Surrogates, lone ones or those that stand for bytes that are no UTF-8, are kept as what they are."""
    return "\0".join(names).encode("utf-8", "surrogatepass").split(b"\0") if names else []


class Listing:
    """The names a store holds, '/'-joined and without NUL, by number.

    Args:
        blob: the names in UTF-8, one after another.
        ends: int64 [n], where each ends in `blob`.
    """

    def __init__(self, blob: bytes, ends: npt.NDArray[np.int64]) -> None:
        self._blob = blob
        self._ends = ends
        self._tables: dict[Kind, tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]] = {}

    @classmethod
    def of(cls, chunks: Iterable[Sequence[bytes]]) -> "Listing":
        """Of encoded names, given in chunks of any size."""
        blobs: list[bytes] = []
        lengths: list[npt.NDArray[np.int64]] = []
        for names in chunks:
            blobs.append(b"".join(names))
            lengths.append(np.fromiter(map(len, names), np.int64, len(names)))
        ends = np.cumsum(np.concatenate(lengths)) if lengths else np.zeros(0, np.int64)
        return cls(b"".join(blobs), ends)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, number: int) -> str:
        """The name of this number.

        Raises:
            IndexError: there is none.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"no name {number} among {len(self)}")
        return self._encoded(number).decode("utf-8", "surrogatepass")

    def chunks(self) -> Iterator[list[bytes]]:
        """All names, encoded, some at a time."""
        for first in range(0, len(self), _CHUNK):
            bounds = [self._begin(first), *self._ends[first : first + _CHUNK].tolist()]
            yield [self._blob[begin:end] for begin, end in pairwise(bounds)]

    def find(
        self, names: Sequence[str], *, before: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """The numbers of the names that are exactly these; of equal names the last.

        Args:
            names: '/'-joined.
            before: int64 [n]: of each, only numbers below this count; None for all.

        Returns:
            int64 [n], -1 for what is not held.
        """
        found = np.full(len(names), -1, np.int64)
        if not len(self) or not names:
            return found
        wanted = encode(names)
        hashes = _hash(wanted, Kind.WHOLE)
        table, numbers = self._table(Kind.WHOLE)
        # the last of equal hashes is the last of equal names
        places = np.searchsorted(table, hashes, side="right") - 1
        (hits,) = np.nonzero(table[np.maximum(places, 0)] == hashes)
        candidates = numbers[places[hits]].astype(np.int64)
        if before is not None:
            for hit in hits.tolist():
                found[hit] = self._colliding(wanted[hit], places[hit], int(before[hit]))
            return found
        ends = self._ends[candidates].tolist()
        begins = np.where(candidates > 0, self._ends[candidates - 1], 0).tolist()
        blob = self._blob
        for hit, begin, end, place, number in zip(
            hits.tolist(), begins, ends, places[hits].tolist(), candidates.tolist(), strict=True
        ):
            name = wanted[hit]
            if blob[begin:end] != name:
                found[hit] = self._colliding(name, place, len(self))
            else:
                found[hit] = number
        return found

    def matches(self, texts: Sequence[str], kind: Kind, *, most: int = 8) -> dict[int, list[int]]:
        """The names of which these are the whole, a stem, an ending, or an ending's stem.

        Args:
            texts: '/'-joined; a stem without its extension.
            kind: which it is.
            most: numbers to give of a text that many names match.

        Returns:
            For the place of each text in `texts` that any name matches: the numbers of these names, ascending; of equal names the last.
        """
        if not len(self) or not texts:
            return {}
        wanted = list(map(_composed, encode(texts))) if kind in _STEMS else encode(texts)
        hashes = _hash([_hashed_end(text) for text in wanted] if kind in _ENDINGS else wanted, kind)
        table, numbers = self._table(kind)
        lows = np.searchsorted(table, hashes, side="left")
        highs = np.searchsorted(table, hashes, side="right")
        (hits,) = np.nonzero(highs > lows)
        firsts = numbers[lows[hits]].astype(np.int64)
        ends = self._ends[firsts].tolist()
        begins = np.where(firsts > 0, self._ends[firsts - 1], 0).tolist()
        found: dict[int, list[int]] = {}
        for hit, low, high, first, begin, end in zip(
            hits.tolist(),
            lows[hits].tolist(),
            highs[hits].tolist(),
            firsts.tolist(),
            begins,
            ends,
            strict=True,
        ):
            if high - low > 1:
                several = self._matching(wanted[hit], kind, numbers[low : min(high, low + _TRIED)], most)
                if several:
                    found[hit] = several
            elif _is_of_kind(self._blob[begin:end], wanted[hit], kind):
                found[hit] = [first]
        return found

    def _matching(self, text: bytes, kind: Kind, numbers: npt.NDArray[np.uint32], most: int) -> list[int]:
        """Those of these names, whose hash is that of `text`, that it is the whole, a stem or an end of."""
        chosen: dict[bytes, int] = {}
        for number in numbers.tolist():
            name = self._encoded(number)
            if _is_of_kind(name, text, kind):
                chosen[name] = number
                if len(chosen) > most:
                    break
        return sorted(chosen.values())[:most]

    def _begin(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _encoded(self, number: int) -> bytes:
        return self._blob[self._begin(number) : int(self._ends[number])]

    def _colliding(self, name: bytes, place: int, before: int) -> int:
        """The number of `name` among the names that share the hash at `place`, the last of them, that is below `before`; -1 when there is none."""
        table, numbers = self._table(Kind.WHOLE)
        shared = table[place]
        low = int(np.searchsorted(table, shared, side="left"))
        # names of one hash stand in their order
        place = low + int(np.searchsorted(numbers[low : place + 1], before)) - 1
        while place >= low:
            if self._encoded(int(numbers[place])) == name:
                return int(numbers[place])
            place -= 1
        return -1

    def _table(self, kind: Kind) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        if kind not in self._tables:
            self._tables[kind] = self._make_table(kind)
        return self._tables[kind]

    def _make_table(self, kind: Kind) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        hashes, numbers = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
        first = 0
        for chunk in self.chunks():
            texts = list(map(_stem, chunk)) if kind in _STEMS else chunk
            these = np.arange(first, first + len(chunk), dtype=np.uint32)
            first += len(chunk)
            if kind in _ENDINGS:
                endings = list(map(_endings, texts))
                these = np.repeat(these, np.fromiter(map(len, endings), np.int64, len(endings)))
                texts = list(chain.from_iterable(endings))
            hashes.append(_hash(texts, kind))
            numbers.append(these)
        table, owners = np.concatenate(hashes), np.concatenate(numbers)
        del hashes, numbers
        order = np.argsort(table, kind="stable")
        return table[order], owners[order]


def _hash(texts: Sequence[bytes], kind: Kind) -> npt.NDArray[np.uint64]:
    if kind == Kind.WHOLE:  # the most frequent by far, and its seed is the one that is there without saying
        return np.fromiter(map(xxhash.xxh3_64_intdigest, texts), np.uint64, len(texts))
    seed = int(kind)
    return np.fromiter((xxhash.xxh3_64_intdigest(text, seed) for text in texts), np.uint64, len(texts))


def _endings(name: bytes) -> list[bytes]:
    """The proper endings of a path, whole components each, the shortest first, `_DEEPEST` at most."""
    found: list[bytes] = []
    at = name.rfind(b"/")
    while at >= 0 and len(found) < _DEEPEST:
        found.append(name[at + 1 :])
        at = name.rfind(b"/", 0, at)
    return found


def _hashed_end(text: bytes) -> bytes:
    """What of an ending is hashed: its last `_DEEPEST` components."""
    return text if text.count(b"/") < _DEEPEST else b"/".join(text.rsplit(b"/", _DEEPEST)[1:])


def _stem_length(name: bytes) -> int:
    """Bytes of a name before an extension that images go by; all of them when it has none, or is nothing else."""
    at = name.rfind(b".")
    if at <= 0 or name[at - 1] == 0x2F or name[at:].lower() not in _SUFFIXES:
        return len(name)
    return at


def _stem(name: bytes) -> bytes:
    """What stems are compared by."""
    return _composed(name[: _stem_length(name)])


def _composed(text: bytes) -> bytes:
    """In Unicode's normal form C: macOS takes an accented letter apart, so that archives made there hold other bytes than records say."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text.decode("utf-8", "surrogatepass")).encode(
        "utf-8", "surrogatepass"
    )


def _is_of_kind(name: bytes, text: bytes, kind: Kind) -> bool:
    if kind in _STEMS:
        name = _stem(name)
    return name.endswith(b"/" + text) if kind in _ENDINGS else name == text
