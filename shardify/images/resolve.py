"""Where the images of records are: from the paths in records to places in stores.

A path is looked for in this order, and the first step that finds it decides:

1. exactly: the path as each of its source's prefix maps rewrites it, then as it stands, each in every store in their order;
2. by its end: the longest agreement of whole components between the path and a name in a store, one of which must be the end of the other;
3. by its stem: the same file with another extension that images go by (OCR-VQA's records say ``.jpg``, the disk has ``.gif``), or
   with its accents written as other bytes (macOS takes letters apart), at the exact place first, then by its end.

A wrong picture is worse than a missing one. So two names are never matched that each have a folder the other lacks: ``vg/1.jpg`` is not
``gqa/1.jpg``. Of a path that is longer than the name, at least two components must agree, unless there is but one store, or the missing folders are
the last ones of the store's own path; and where they agree with the path of some stores better than with that of others, only those stores
count (``ocr_vqa/images/1.jpg`` is not taken from ``/data/gqa``, which has ``images/1.jpg``, when ``/data/ocr_vqa`` is there). Several names that
agree equally well are ambiguous, and none is taken, unless all are members of zips with the same size and checksum. Only in step 1 does the
order of stores decide: there the user has named the file exactly, and put the stores in order.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from shardify.errors import RecordError, UsageError
from shardify.images.archives import ArchiveStore
from shardify.images.listing import Kind, stem_of
from shardify.images.stores import (
    AMBIGUOUS,
    BY_PREFIX,
    BY_STEM,
    BY_SUFFIX,
    EXACT,
    LISTED,
    MAX_IMAGE_BYTES,
    MISSING,
    PLAIN_FILE,
    READABLE_METHODS,
    UNSEEN,
    ImageStore,
    clean_name,
    missing_rows,
)
from shardify.records import ImageRef

_READABLE = np.array([PLAIN_FILE, LISTED, UNSEEN, *READABLE_METHODS], np.int16)
_MOST_RULES = 2**16 - 1
_MOST_STORES = 2**15 - 1
_SURE = 2  # components of a name that make it more than a coincidence
_REMEMBERED = 100_000  # leading folders of paths


@dataclass(frozen=True, slots=True)
class Rule:
    """A path that begins with `old` is looked up with `new` in its place: ``coco/train2017/`` -> ``train2014/COCO_train2014_``."""

    old: str
    new: str

    def apply(self, path: str) -> str | None:
        """The path as this rule rewrites it; None when the rule has nothing to say of it."""
        if not path.startswith(self.old):
            return None
        if self.old == self.new:
            return path
        return clean_name(self.new + path[len(self.old) :])


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Where images are.

    Attributes:
        rows: [n] of `LOCATION_DTYPE`; `store` is the store's number, or MISSING (then `how` may be AMBIGUOUS).
        codes: the reason code of each image's fault, empty when it was found: ``image-missing``, ``image-ambiguous``,
            ``image-path-unsafe``, ``image-unreadable`` or ``image-too-large``.
    """

    rows: npt.NDArray[np.void]
    codes: list[str]


class Resolver:
    """Finds the images of records in stores.

    Args:
        stores: in the order of their precedence.
        prefixes: the prefix maps of each source of records, in the order of their precedence: pairs of an old and a new beginning.

    Attributes:
        rules: all prefix maps; a location's `rule` is a number in it. Number 0 changes nothing.

    Raises:
        UsageError: a prefix map leads out of the stores, or there are too many maps or stores.
    """

    def __init__(self, stores: Sequence[ImageStore], prefixes: Sequence[Sequence[tuple[str, str]]]) -> None:
        if len(stores) > _MOST_STORES:
            raise UsageError(f"{len(stores)} image stores; at most {_MOST_STORES} can be told apart")
        numbers = {("", ""): 0}
        self._orders = [
            (
                *(
                    numbers.setdefault((old, new), len(numbers))
                    for old, new in source
                    if (old, new) != ("", "")
                ),
                0,
            )
            for source in prefixes
        ]
        if len(numbers) > _MOST_RULES:
            raise UsageError(f"{len(numbers)} prefix maps; at most {_MOST_RULES} can be told apart")
        self.rules = tuple(Rule(old, new) for old, new in numbers)
        for rule in self.rules[1:]:
            _check_rule(rule)
        self._places = [_Place(number, store) for number, store in enumerate(stores)]
        self._closest = lru_cache(_REMEMBERED)(self._find_closest)

    def locate(self, paths: Sequence[str], source: int) -> Located:
        """Look for images.

        Args:
            paths: as the records have them.
            source: the number of their source among `prefixes`.

        Raises:
            PackError: a store has gone since it was opened.
        """
        rows = missing_rows(len(paths))
        codes = ["image-missing"] * len(paths)
        asked: dict[int, str] = {}
        for number, path in enumerate(paths):
            try:
                asked[number] = _normal(path)
            except RecordError as error:
                codes[number] = error.code
        order = self._orders[source]
        for rule in order:
            if asked:
                self._locate_exactly(asked, rule, rows)
        # of what cannot be looked at, reading says why
        asked = {number: path for number, path in asked.items() if rows["store"][number] == MISSING}
        for stems in (False, True):
            for rule in order:
                if asked:
                    self._locate_alike(asked, rule, rows, codes, stems=stems)
        held = rows["store"] != MISSING
        large = held & (np.maximum(rows["size"], rows["stored"]) > MAX_IMAGE_BYTES)
        for faulty, code in (
            (held, ""),
            (large, "image-too-large"),
            (held & ~np.isin(rows["method"], _READABLE), "image-unreadable"),
        ):
            for number in np.flatnonzero(faulty).tolist():
                codes[number] = code
        return Located(rows, codes)

    def _rewritten(self, asked: dict[int, str], rule: int) -> tuple[list[int], list[str]]:
        """The paths that a rule applies to, rewritten, and whose they are."""
        if not rule:
            return list(asked), list(asked.values())
        apply = self.rules[rule].apply
        changed: dict[int, str] = {}
        for number, path in asked.items():
            new = apply(path)
            if new is not None:
                # what leads out of the stores is nowhere in them
                with suppress(RecordError):
                    changed[number] = _normal(new)
        return list(changed), list(changed.values())

    def _locate_exactly(self, asked: dict[int, str], rule: int, rows: npt.NDArray[np.void]) -> None:
        """Fill the rows of what is exactly there, and take it out of `asked`."""
        numbers, paths = self._rewritten(asked, rule)
        owners = np.array(numbers, np.int64)
        for number, place in enumerate(self._places):
            if not paths:
                return
            chosen, names = place.names_of(paths)
            found = place.store.find(names)
            held = found["store"] != MISSING
            found["store"], found["rule"], found["how"] = number, rule, BY_PREFIX if rule else EXACT
            # what cannot be looked at, or not be read, may still be somewhere else
            seen = held & np.isin(found["method"], _READABLE) & (found["method"] != UNSEEN)
            unseen = held & ~seen & (rows["store"][owners[chosen]] == MISSING)
            for some in (seen, unseen):
                rows[owners[chosen[some]]] = found[some]
            left = np.ones(len(owners), np.bool_)
            left[chosen[seen]] = False
            for owner in owners[~left].tolist():
                del asked[owner]
            paths = [path for path, stays in zip(paths, left.tolist(), strict=True) if stays]
            owners = owners[left]

    def _locate_alike(
        self, asked: dict[int, str], rule: int, rows: npt.NDArray[np.void], codes: list[str], *, stems: bool
    ) -> None:
        """Fill the rows of what is there under a name that agrees well enough, and take it, and what is ambiguous, out of `asked`."""
        owners, paths = self._rewritten(asked, rule)
        if stems:
            paths = [stem_of(path) for path in paths]
        waiting = dict(zip(owners, paths, strict=True))
        for queries in self._levels(waiting, stems=stems):
            found: dict[int, set[tuple[int, int]]] = {}
            for query in queries:
                listing = self._places[query.store].store.listing()
                for at, numbers in listing.matches(query.texts, query.kind).items():
                    found.setdefault(query.owners[at], set()).update((query.store, n) for n in numbers)
            chosen = self._choose(found)
            for owner, row in chosen.items():
                if row is None:
                    codes[owner], rows["how"][owner] = "image-ambiguous", AMBIGUOUS
                else:
                    rows[owner] = row
                    rows["rule"][owner], rows["how"][owner] = rule, BY_STEM if stems else BY_SUFFIX
                del waiting[owner], asked[owner]
            if not waiting:
                return

    def _levels(self, waiting: Mapping[int, str], *, stems: bool) -> Iterator[list["_Query"]]:
        """What to ask the listings for, the best agreement first; only for what is still waiting then."""
        whole, ending = (Kind.STEM, Kind.ENDING_STEM) if stems else (Kind.WHOLE, Kind.ENDING)
        if stems:
            yield [
                query
                for place in self._places
                for query in _queries(place, whole, waiting.items(), place.inside)
            ]
        yield [
            query
            for place in self._places
            for query in (
                *_queries(place, ending, waiting.items(), lambda path: (path,)),
                *_queries(place, whole, waiting.items(), place.behind_mount),
            )
        ]
        for dropped in range(1, max((path.count("/") for path in waiting.values()), default=0) + 1):
            split = [
                (owner, path.split("/", dropped))
                for owner, path in waiting.items()
                if path.count("/") >= dropped
            ]
            pairs = [(owner, "/".join(parts[:-1]), parts[-1]) for owner, parts in split]
            yield [
                query
                for place in self._places
                for query in _queries(
                    place,
                    whole,
                    [(owner, rest) for owner, before, rest in pairs if self._may_be_in(place, before, rest)],
                    place.inside,
                )
            ]

    def _may_be_in(self, place: "_Place", before: str, rest: str) -> bool:
        """Whether the file `rest` in this store may be what was asked for as ``before/rest``."""
        if len(self._places) == 1:
            return True
        sure = rest.count("/") + 1 >= _SURE
        if place.mount:
            return sure
        closest, among = self._closest(before)
        return place.number in among and (sure or closest == before.count("/") + 1)

    def _find_closest(self, before: str) -> tuple[int, frozenset[int]]:
        """In how many folders these agree with the end of the stores' own paths at best, and the stores for which it is so many."""
        folders = before.split("/")
        agreed = {
            place.number: _common_end(folders, place.folders) for place in self._places if not place.mount
        }
        closest = max(agreed.values(), default=0)
        return closest, frozenset(number for number, count in agreed.items() if count == closest)

    def _choose(self, found: Mapping[int, set[tuple[int, int]]]) -> dict[int, npt.NDArray[np.void] | None]:
        """The row of each image that one name agrees with; None for those that several agree with."""
        every = sorted(candidate for candidates in found.values() for candidate in candidates)
        rows: dict[tuple[int, int], npt.NDArray[np.void]] = {}
        for store, group in groupby(every, key=itemgetter(0)):
            numbers = list(dict.fromkeys(number for _, number in group))
            located = self._places[store].store.listed(numbers)
            held = located["store"] != MISSING
            located["store"][held] = store
            rows.update(
                ((store, number), row)
                for number, row, here in zip(numbers, located, held.tolist(), strict=True)
                if here
            )
        chosen: dict[int, npt.NDArray[np.void] | None] = {}
        for owner, candidates in found.items():
            there = [rows[candidate] for candidate in sorted(candidates) if candidate in rows]
            if len(there) == 1 or (there and _are_same(there)):
                chosen[owner] = there[0]
            elif there:
                chosen[owner] = None
        return chosen


@dataclass(frozen=True, slots=True)
class _Query:
    """Texts to look for among the names of one store, and the images they stand for."""

    store: int
    kind: Kind
    owners: list[int]
    texts: list[str]


class _Place:
    """A store, and how its names are called from outside."""

    def __init__(self, number: int, store: ImageStore) -> None:
        self.number = number
        self.store = store
        self.mount = f"{store.mount}/" if store.mount else ""
        self._top = store.top if isinstance(store, ArchiveStore) else ""
        path = store.path if "://" in store.path else os.path.abspath(store.path)
        if store.kind == "archive":
            path = os.path.splitext(path)[0]
        self.folders = [folder for folder in path.split("/") if folder]
        parts = store.mount.split("/")
        self._mount_ends = ["".join(f"{part}/" for part in parts[at:]) for at in range(1, len(parts))]

    def names_of(self, paths: Sequence[str]) -> tuple[npt.NDArray[np.int64], Sequence[str]]:
        """The paths below this store's virtual folder by their places, and what they are called in the store."""
        if not self.mount:
            return np.arange(len(paths)), paths
        chosen = [number for number, path in enumerate(paths) if path.startswith(self.mount)]
        return np.array(chosen, np.int64), [paths[number][len(self.mount) :] for number in chosen]

    def inside(self, path: str) -> tuple[str, ...]:
        """What a whole path may be called in the store."""
        if not path.startswith(self.mount):
            return ()
        name = path[len(self.mount) :]
        return (name, self._top + name) if self._top else (name,)

    def behind_mount(self, path: str) -> tuple[str, ...]:
        """What the end of a path that begins inside of the virtual folder, or right behind it, may be called in the store."""
        if not self.mount:
            return ()
        names = [path, *(path[len(end) :] for end in self._mount_ends if path.startswith(end))]
        return (*names, *(self._top + name for name in names)) if self._top else tuple(names)


def _queries(
    place: _Place, kind: Kind, asked: Iterable[tuple[int, str]], texts_of: Callable[[str], Sequence[str]]
) -> list[_Query]:
    """One query of this store, or none when there is nothing to ask."""
    pairs = [(owner, text) for owner, path in asked for text in texts_of(path)]
    if not pairs:
        return []
    return [_Query(place.number, kind, [owner for owner, _ in pairs], [text for _, text in pairs])]


def _are_same(rows: Sequence[npt.NDArray[np.void]]) -> bool:
    """Whether these are the same bytes, as far as sizes and checksums can tell."""
    return all(row["crc"] for row in rows) and len({(int(row["size"]), int(row["crc"])) for row in rows}) == 1


def _common_end(first: Sequence[str], second: Sequence[str]) -> int:
    count = 0
    for one, other in zip(reversed(first), reversed(second), strict=False):
        if one != other:
            break
        count += 1
    return count


def _normal(path: str) -> str:
    """The components of a path, joined again.

    Raises:
        RecordError: as `ImageRef.parts`.
    """
    if (
        "//" in path
        or "/." in path
        or "\\" in path
        or "\0" in path
        or ":" in path
        or path[:1] in "./"
        or path[-1] == "/"
    ):
        return ImageRef(path).name()
    return path


def _check_rule(rule: Rule) -> None:
    parts = rule.new.split("/")
    if rule.new.startswith("/") or ".." in parts or "\\" in rule.new or "\0" in rule.new:
        raise UsageError(
            f"prefix map {rule.old!r} -> {rule.new!r}: the new beginning must be a path inside of an image root, with '/' "
            "between folders and no '..'"
        )
