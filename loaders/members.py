"""The members of a shard's samples, as its sidecar lists them, and the bytes of some of them, read without the rest."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shardify.errors import FormatError
from shardify.format.samples import is_compressed
from shardify.format.shards import ShardFile
from shardify.format.sidecar import numbers_of, read_sidecar
from shardify.format.urls import is_url
from shardify.format.zstd import decompress_frame

IntArray: TypeAlias = npt.NDArray[np.int64]

_LOCAL_GAP = 4 * 1024
_REMOTE_GAP = 256 * 1024  # bytes read for nothing, sooner than asking once more
_MAX_READ = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Members:
    """The m members of a shard's n samples.

    Attributes:
        samples: n.
        table: the sidecar's other columns, as far as they were asked for.
        row: int64 [m], the sample of each, ascending.
        fields: the distinct names.
        field: int64 [m], the number of each member's name in them.
        offset: int64 [m], first data byte, in the tar; in `.tar.zst`, within the frame.
        size: int64 [m], bytes.
        xxh3_64: uint64 [m].
        span_offset: int64 [n], of each sample's bytes in the shard; in `.tar.zst`, of its frame.
        span_size: int64 [n].
    """

    samples: int
    table: Any
    row: IntArray
    fields: list[str]
    field: IntArray
    offset: IntArray
    size: IntArray
    xxh3_64: npt.NDArray[np.uint64]
    span_offset: IntArray
    span_size: IntArray

    def named(self, wanted: Callable[[str], bool]) -> npt.NDArray[np.bool_]:
        """Bool [m]: which members have a name that is wanted."""
        return np.array([wanted(field) for field in self.fields], np.bool_)[self.field]

    def first_named(self, name: str) -> IntArray:
        """Int64 [k]: for each sample that has a member of this name, the first such, ascending."""
        there = np.flatnonzero(self.named(lambda field: field == name))
        return there[np.unique(self.row[there], return_index=True)[1]]


def read_members_of(shard: ShardFile, sidecar: str, columns: tuple[str, ...] = ()) -> Members:
    """The members that a shard's sidecar lists.

    Args:
        shard: the shard.
        sidecar: its sidecar, as a local file (`local_sidecars`).
        columns: other columns of it that are wanted.

    Raises:
        FormatError: it cannot be read, or is not that of the shard.
    """
    table = read_sidecar(sidecar, tuple(dict.fromkeys(("offset", "size", "members", *columns))))
    if table.num_rows != shard.samples:
        raise FormatError(
            f"{sidecar}: {table.num_rows} samples, but {shard.path} has {shard.samples} in the index"
        )
    counts: list[IntArray] = []
    parts: list[list[npt.NDArray[Any]]] = []
    numbers: dict[str, int] = {}
    for chunk in table["members"].chunks:
        edges = _numbers(chunk.offsets).astype(np.int64)
        counts.append(edges[1:] - edges[:-1])
        values = chunk.flatten()
        names = values.field("field").dictionary_encode()
        here = np.array(
            [numbers.setdefault(name, len(numbers)) for name in names.dictionary.to_pylist()], np.int64
        )
        columns_here = [_numbers(values.field(name)) for name in ("offset", "size", "xxh3_64")]
        parts.append([here[_numbers(names.indices)], *columns_here])
    field, offset, size, digests = (
        np.concatenate([part[number] for part in parts] or [np.zeros(0, kind)])
        for number, kind in enumerate((np.int64, np.int64, np.int64, np.uint64))
    )
    return Members(
        samples=table.num_rows,
        table=table,
        row=np.repeat(np.arange(table.num_rows), np.concatenate(counts or [np.zeros(0, np.int64)])),
        fields=list(numbers),
        field=field,
        offset=offset,
        size=size,
        xxh3_64=digests,
        span_offset=numbers_of(table["offset"]),
        span_size=numbers_of(table["size"]),
    )


def _numbers(array: pa.Array) -> npt.NDArray[Any]:
    return numbers_of(pa.chunked_array([array]))


def read_contents(shard: ShardFile, members: Members, which: IntArray) -> Iterator[tuple[int, memoryview]]:
    """The bytes of some members: of a plain shard little else is read; of a compressed one, the frames they are in.

    Args:
        shard: a path or URL. Call this for a URL in a process that forks no more.
        members: of it.
        which: int64 [k], ascending numbers of members.

    Yields:
        (number of the member, its bytes), in the same order.

    Raises:
        FormatError: the shard does not hold them.
        PackError: a store cannot be reached or refuses.
    """
    rows = members.row[which]
    compressed = is_compressed(shard.path)
    begins = members.span_offset[rows] if compressed else members.offset[which]
    sizes = members.span_size[rows] if compressed else members.size[which]
    gap = _REMOTE_GAP if is_url(shard.path) else _LOCAL_GAP
    with _Source(shard.path) as source:
        first = 0
        while first < len(which):
            begin, end = int(begins[first]), int(begins[first] + sizes[first])
            last = first + 1
            while (
                last < len(which)
                and begins[last] <= end + gap
                and begins[last] >= begin
                and max(end, int(begins[last] + sizes[last])) - begin <= _MAX_READ
                and not (compressed and begins[last] != begin)
            ):
                end = max(end, int(begins[last] + sizes[last]))
                last += 1
            data = source.read(begin, end - begin)
            if compressed:
                data = memoryview(decompress_frame(data, where=f"{shard.path}: frame at byte {begin}"))
            for number in range(first, last):
                member = int(which[number])
                at = int(members.offset[member]) - (0 if compressed else begin)
                content = data[at : at + int(members.size[member])]
                if len(content) != members.size[member]:
                    raise FormatError(f"{shard.path}: frame at byte {begin} ends before its sample does")
                yield member, content
            first = last


class _Source:
    """A shard to read from, local or remote."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: int | None = None

    def __enter__(self) -> Self:
        if not is_url(self._path):
            try:
                self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise FormatError(f"{self._path}: cannot be read ({error.strerror})") from None
            # reading ahead would fetch the images between the records
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)

    def read(self, begin: int, size: int) -> memoryview:
        if self._file is None:
            from shardify.format import objects  # not where a trainer imports this module

            return memoryview(objects.get_range(self._path, begin, size))
        data = bytearray()
        try:
            while len(data) < size and (more := os.pread(self._file, size - len(data), begin + len(data))):
                data += more
        except OSError as error:
            raise FormatError(f"{self._path}: byte {begin}: cannot be read ({error.strerror})") from None
        if len(data) < size:
            raise FormatError(f"{self._path}: ends at byte {begin + len(data)}, before byte {begin + size}")
        return memoryview(data)
