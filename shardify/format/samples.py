"""Reading samples back by their rows, from plain and from compressed shards.

    plain          a row's span holds its sample and nothing else
    .tar.zst       a row's span is a frame, which neighbouring rows share: the n-th of these rows is the n-th sample of the frame

Nothing of a file is believed: sizes are bounded, and the key that is found must be the row's.
"""

import os
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shardify.errors import FormatError
from shardify.format.index import MAX_SIZE
from shardify.format.names import TAR_ZST
from shardify.format.sidecar import read_sidecar
from shardify.format.tar import read_samples, split_samples
from shardify.format.zstd import MAX_FRAME_BYTES, decompress_frame

COLUMNS = ("key", "offset", "size")
"""The sidecar columns that `SampleReader` needs."""


class StoredSample(NamedTuple):
    """A sample as stored: its key and, in tar order, each member's field and data (views of one buffer)."""

    key: str
    members: list[tuple[str, memoryview]]


def is_compressed(shard: str | os.PathLike[str]) -> bool:
    """Whether a shard's rows name zstd frames, by its name."""
    return os.fspath(shard).endswith(TAR_ZST)


class SampleReader:
    """Reads the samples of one shard in any order; a frame just decompressed is kept for its next sample.

    Args:
        path: the shard, plain or compressed.
        rows: its sidecar with at least `COLUMNS`; read from `sidecar` when it is not given.
        sidecar: the path of the sidecar.

    Raises:
        FormatError: the sidecar cannot be read, or its rows are not those of a shard.
    """

    def __init__(
        self, path: str | os.PathLike[str], rows: pa.Table | None = None, *, sidecar: str | None = None
    ) -> None:
        if rows is None:
            if sidecar is None:
                raise TypeError("rows or sidecar must be given")
            rows = read_sidecar(sidecar, COLUMNS)
        self._where = os.fspath(path)
        self._keys = rows["key"]
        self._offsets = rows["offset"].to_numpy()
        self._sizes = rows["size"].to_numpy()
        self._ordinals = ordinals(self._offsets) if is_compressed(path) else None
        self._frame_at = -1
        self._frame: list[memoryview] = []
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard."""
        self._file.close()

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._offsets)

    def __iter__(self) -> Iterator[StoredSample]:
        """All samples in tar order."""
        return (self.read(number) for number in range(len(self)))

    def read(self, number: int) -> StoredSample:
        """The sample of a row.

        Raises:
            FormatError: the row does not belong to the shard, or the shard is damaged.
            OSError: it cannot be read.
        """
        key = self._keys[number].as_py()
        offset, size = int(self._offsets[number]), int(self._sizes[number])
        where = f"{self._where}: sample {key} at byte {offset}"
        if self._ordinals is None:
            found = _one(read_span(self._file, offset, size, where=where), where)
        else:
            if self._frame_at != offset:
                self._frame_at = -1
                self._frame = split_frame(read_span(self._file, offset, size, where=where), where=where)
                self._frame_at = offset
            span = frame_sample(self._frame, int(self._ordinals[number]), where=where)
            found = _one(span, where)
        if found.key != key:
            raise FormatError(
                f"{where}: has the key {found.key!r} in the shard; the index does not belong to it"
            )
        return found


def ordinals(offsets: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """int64 [n]: the number of each row among those of equal offset, which stand together: 0 0 0 7 7 9 -> 0 1 2 0 1 0."""
    values = np.asarray(offsets, np.int64)
    numbers = np.arange(len(values))
    first = np.ones(len(values), bool)
    first[1:] = values[1:] != values[:-1]
    return numbers - np.maximum.accumulate(np.where(first, numbers, 0)) if len(values) else numbers


def ordinals_at(
    offsets: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], samples: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """`ordinals` of some samples of a data set, without looking at the others: 0 for all samples of plain shards.

    Only neighbours are looked at, at distances that double and then halve, so that a frame of f samples costs 2 log2(f) looks at each of them.

    Args:
        offsets: int64 [N], of all samples of the set, the index's; equal ones stand together within a shard.
        starts: int64 [shards + 1], the samples before each shard.
        samples: int64 [n], numbers of samples in any order, each from 0 to N - 1.

    Returns:
        int64 [n], which sample of its frame each is, from 0.
    """
    own = offsets[samples]
    room = samples - starts[np.searchsorted(starts, samples, "right") - 1]  # samples before it in its shard
    back = np.zeros(len(samples), np.int64)  # as far back its frame is known to reach
    step = 1
    growing = np.arange(len(samples))
    while len(growing):
        growing = growing[step <= room[growing]]
        growing = growing[offsets[samples[growing] - step] == own[growing]]
        back[growing] = step
        step *= 2
    # a frame reaches from `back` to less than twice as far; only where it reaches at all
    step = int(back.max(initial=0))
    inside = np.flatnonzero(back)
    while step := step // 2:
        further = back[inside] + step
        fits = (further <= room[inside]) & (step < back[inside])
        taken, further = inside[fits], further[fits]
        reaches = offsets[samples[taken] - further] == own[taken]
        back[taken[reaches]] = further[reaches]
    return back


def split_frame(frame: memoryview, *, where: str, limit: int = MAX_FRAME_BYTES) -> list[memoryview]:
    """The samples of one zstd frame, for `frame_sample`; worth keeping while neighbours are read.

    Args:
        frame: compressed, as the index names it.
        where: names it in errors, such as ``data/000.tar.zst: frame at byte 1024``.
        limit: refuse a frame that is larger decompressed; no more memory than that is used.

    Returns:
        The span of each sample, views of one buffer.

    Raises:
        FormatError: it is damaged, larger than `limit`, or holds no samples.
    """
    return split_samples(memoryview(decompress_frame(frame, where=where, limit=limit)), where=where)


def frame_sample(samples: Sequence[memoryview], ordinal: int, *, where: str) -> memoryview:
    """One sample of `split_frame`, as a plain shard's span would be (`read_members`).

    Raises:
        FormatError: there are not so many: the index does not belong to the shard.
    """
    if not 0 <= ordinal < len(samples):
        raise FormatError(
            f"{where}: its frame holds {len(samples)} samples, but its row is number {ordinal + 1}"
        )
    return samples[ordinal]


def read_span(file: FileIO, offset: int, size: int, *, where: str) -> memoryview:
    """So many bytes at an offset.

    Raises:
        FormatError: the file does not hold them, or they are more than a sample may have.
        OSError: they cannot be read.
    """
    if not 0 <= size <= MAX_SIZE or offset < 0:
        raise FormatError(f"{where}: an impossible span of {size} bytes; the index is damaged")
    end = os.fstat(file.fileno()).st_size
    if offset + size > end:
        raise FormatError(f"{where}: ends at byte {offset + size}, but the file does at byte {end}")
    content = memoryview(bytearray(size))
    done = 0
    while done < size:
        count = os.preadv(file.fileno(), [content[done:]], offset + done)
        if not count:
            raise FormatError(f"{where}: the file became shorter while it was read")
        done += count
    return content


def _one(span: memoryview, where: str) -> StoredSample:
    samples = list(read_samples(span, where=where))
    if len(samples) != 1:
        raise FormatError(f"{where}: holds {len(samples)} samples; the index does not belong to it")
    return StoredSample(*samples[0])
