"""Whether the bytes that arrived are those that were written: headers' checksums, and the members' hashes from the shard's sidecar."""

import io
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
import zstandard

from loaders.fetch.blocks import Fault
from shardify.errors import FormatError
from shardify.format.headers import BLOCK, EXTENSIONS, REGULAR, parse_header
from shardify.format.sidecar import numbers_of, read_sidecar
from shardify.format.tar import padding, read_members, split_name
from shardify.format.zstd import decompress_frame

IntArray = npt.NDArray[np.int64]
_COUNTS = 2
_CHECKSUM = slice(148, 156)  # in a header
_OTHER_BYTES = "its bytes are not those that were written"


@dataclass(frozen=True, slots=True, eq=False)
class Hashes:
    """What a sidecar says of a shard's n samples and their m members, in the shard's order.

    Attributes:
        offsets: int64 [n], where each sample (in a compressed shard, its frame) begins.
        sizes: int64 [n], its bytes.
        ends: int64 [n + 1]; sample i has the members ends[i] .. ends[i + 1].
        member_offsets: int64 [m], of the data, in the shard or, in a compressed one, in the decompressed frame.
        member_sizes: int64 [m].
        xxh3_64: uint64 [m].
    """

    offsets: IntArray
    sizes: IntArray
    ends: IntArray
    member_offsets: IntArray
    member_sizes: IntArray
    xxh3_64: npt.NDArray[np.uint64]

    @classmethod
    def of_sidecar(cls, content: bytes | memoryview, *, where: str) -> Self:
        """From a sidecar's bytes.

        Raises:
            FormatError: they are none.
        """
        table = read_sidecar(where, ["offset", "size", "members"], file=io.BytesIO(content))
        members = [chunk for chunk in table["members"].chunks if len(chunk)]
        values = [chunk.flatten() for chunk in members]
        counts = [np.asarray(numbers_of(pa.chunked_array([chunk.value_lengths()]))) for chunk in members]
        ends = np.zeros(len(table) + 1, np.int64)
        np.cumsum(np.concatenate([*counts, np.zeros(0, np.int32)]), out=ends[1:])

        def column(name: str, kind: pa.DataType) -> npt.NDArray[Any]:
            return numbers_of(pa.chunked_array([value.field(name) for value in values], type=kind))

        return cls(
            numbers_of(table["offset"]),
            numbers_of(table["size"]),
            ends,
            column("offset", pa.int64()),
            column("size", pa.int64()),
            column("xxh3_64", pa.uint64()),
        )

    def encode(self) -> bytes:
        """As `decode` takes it: a third of the sidecar, and no Parquet to read."""
        counts = np.array([len(self.offsets), len(self.xxh3_64)], np.int64)
        return b"".join(
            array.tobytes()
            for array in (
                counts,
                self.offsets,
                self.sizes,
                self.ends,
                self.member_offsets,
                self.member_sizes,
                self.xxh3_64,
            )
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """What `encode` gave."""
        words = np.frombuffer(data, np.int64)
        samples, members = words[:_COUNTS].tolist()
        cuts = np.cumsum([_COUNTS, samples, samples, samples + 1, members, members])
        offsets, sizes, ends, places, lengths, hashes = np.split(words[: int(cuts[-1]) + members], cuts)[1:]
        return cls(offsets, sizes, ends, places, lengths, hashes.view(np.uint64))

    def count(self, begin: int, end: int) -> int:
        """How many samples begin in [begin, end)."""
        first, last = np.searchsorted(self.offsets, [begin, end]).tolist()
        return int(last - first)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return (_COUNTS + 3 * len(self.offsets) + 1 + 3 * len(self.xxh3_64)) * 8


def check(
    data: memoryview, begin: int, hashes: Hashes | None, *, compressed: bool
) -> tuple[int, list[Fault]]:
    """Check bytes of a shard.

    Args:
        data: whole samples, or whole frames of a compressed shard.
        begin: where they begin in the shard.
        hashes: of the shard, which say nothing of names in extended headers, as other programs write them; None checks headers and lengths alone, and frames by the checksums they have in themselves.
        compressed: whether the shard is a ``.tar.zst``.

    Returns:
        How many samples they hold, and what is wrong with them: each fault spans one sample or frame, or, without hashes, all from
        the first fault on, since where the next sample begins is not known.
    """
    if hashes is None:
        return _check_frames(data, begin) if compressed else _check_headers(data, begin)
    first, last = np.searchsorted(hashes.offsets, [begin, begin + len(data)]).tolist()
    members = slice(int(hashes.ends[first]), int(hashes.ends[last]))
    part = _Part(
        data,
        hashes.offsets[first:last] - begin,
        hashes.sizes[first:last],
        hashes.ends[first : last + 1] - members.start,
        hashes.member_offsets[members] - (0 if compressed else begin),
        hashes.member_sizes[members],
        hashes.xxh3_64[members],
    )
    faults: dict[Fault, None] = {}  # samples share frames
    frame: tuple[int, bytes | str] = (-1, "")
    for number in range(last - first) if compressed else part.doubtful():
        start, size = int(part.starts[number]), int(part.sizes[number])
        mine = slice(int(part.ends[number]), int(part.ends[number + 1]))
        span = data[start : start + size]
        if len(span) < size:
            fault = "the shard ends inside it"
        elif compressed:
            if frame[0] != start:
                frame = start, _frame(span)
            fault = frame[1] if isinstance(frame[1], str) else part.compare(memoryview(frame[1]), mine)
        else:
            fault = _check_sample(span, part.lengths[mine].tolist(), part.expected[mine].tolist())
        if fault:
            faults[Fault(begin + start, begin + start + size, fault)] = None
    return last - first, list(faults)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some bytes of a shard, and what they should be: int64 arrays as those of `Hashes`, counted from the first byte."""

    data: memoryview
    starts: IntArray
    sizes: IntArray
    ends: IntArray
    places: IntArray
    lengths: IntArray
    expected: npt.NDArray[np.uint64]

    def doubtful(self) -> list[int]:
        """Samples of a plain shard to be looked at one by one.

        The others consist of nothing but plain headers with the right sums, members with the right hashes, and padding.
        """
        blocks = np.frombuffer(self.data[: len(self.data) // BLOCK * BLOCK], np.uint8).reshape(-1, BLOCK)
        padded = (self.lengths + BLOCK - 1) // BLOCK * BLOCK
        ends = np.concatenate([[0], np.cumsum(padded + BLOCK)])
        good = (ends[self.ends[1:]] - ends[self.ends[:-1]] == self.sizes) & (
            self.starts + self.sizes <= len(self.data)
        )
        rows = (self.places - BLOCK) // BLOCK
        inside = (self.places % BLOCK == 0) & (rows >= 0) & (rows < len(blocks))
        headers = blocks[np.where(inside, rows, 0)]
        right = inside & _sums_are_right(headers) & (self._hashes(self.data) == self.expected)
        wrong = np.concatenate([[0], np.cumsum(~right)])
        good &= wrong[self.ends[1:]] == wrong[self.ends[:-1]]
        doubtful: list[int] = np.flatnonzero(~good).tolist()
        return doubtful

    def compare(self, content: memoryview, mine: slice) -> str:
        """What is wrong with some members in a decompressed frame; empty when nothing is."""
        hashes = self._hashes(content, mine)
        return "" if np.array_equal(hashes, self.expected[mine]) else _OTHER_BYTES

    def _hashes(self, content: memoryview, mine: slice = slice(None)) -> npt.NDArray[np.uint64]:
        spans = zip(self.places[mine].tolist(), self.lengths[mine].tolist(), strict=True)
        digest = xxhash.xxh3_64_intdigest
        return np.array([digest(content[at : at + length]) for at, length in spans], np.uint64)


def _sums_are_right(headers: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Whether headers, uint8 [n, 512], have the checksums they state, in the form that all common writers use: six octal digits."""
    digits = headers[:, _CHECKSUM][:, :6].astype(np.int64) - ord("0")
    stated = digits @ (8 ** np.arange(5, -1, -1))
    sums = headers.sum(axis=1, dtype=np.int64) - headers[:, _CHECKSUM].sum(axis=1, dtype=np.int64)
    is_octal = ((digits >= 0) & (digits < 8)).all(axis=1)
    is_ended = np.isin(headers[:, _CHECKSUM][:, 6:], (0, ord(" "))).all(axis=1)
    return np.asarray(is_octal & is_ended & (sums + 8 * ord(" ") == stated), np.bool_)


def _check_sample(span: memoryview, lengths: list[int], expected: list[int]) -> str:
    try:
        _, members = read_members(span, where="the sample")
    except FormatError as error:
        return str(error)
    if [len(data) for _, data in members] != lengths:
        return _OTHER_BYTES
    if [xxhash.xxh3_64_intdigest(data) for _, data in members] != expected:
        return _OTHER_BYTES
    return ""


def _frame(span: memoryview) -> bytes | str:
    """A frame's content, or what is wrong with it."""
    try:
        return decompress_frame(span, where="its frame")
    except FormatError as error:
        return str(error)


def _check_headers(data: memoryview, begin: int) -> tuple[int, list[Fault]]:
    at = samples = 0
    key, extended = None, False
    while at < len(data):
        header = parse_header(data, at)
        if header is None:
            return samples, [Fault(begin + at, begin + len(data), f"no tar header at byte {begin + at}")]
        name, size, kind = header
        end = at + BLOCK + size + padding(size)
        if end > len(data):
            return samples, [Fault(begin + at, begin + len(data), f"member {name!r} reaches too far")]
        found = split_name(name)
        if kind in REGULAR and found is not None and found[0] != key:
            key, samples = found[0], samples + 1
        extended = extended or kind in EXTENSIONS
        at = end
    return 0 if extended else samples, []  # extended names may be cut off here


def _check_frames(data: memoryview, begin: int) -> tuple[int, list[Fault]]:
    at = 0
    while at < len(data):
        decompressor = zstandard.ZstdDecompressor().decompressobj()
        try:
            decompressor.decompress(data[at:])
        except zstandard.ZstdError as error:
            return 0, [Fault(begin + at, begin + len(data), f"a damaged zstd frame ({error})")]
        if not decompressor.eof:
            return 0, [Fault(begin + at, begin + len(data), "a zstd frame that is cut off")]
        at = len(data) - len(decompressor.unused_data)
    return 0, []
