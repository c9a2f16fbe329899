"""Sample bytes from local shards: positioned reads, neighbours in one, the whole batch announced to the kernel first."""

import errno
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from shardify.errors import LoaderError, SampleError

IntArray = npt.NDArray[np.int64]

_OPEN_FILES = 1024  # fewer, where a process may have fewer than twice as many
_SLOW = 0.0003  # seconds that a read takes on average when it comes from a disk: then more of them are asked for at once
_MAX_READ = 256 * 1024 * 1024  # bytes in one read of neighbouring samples


class LocalFetcher:
    """Reads spans of shards. One per process.

    Args:
        paths: of the shards, by number.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()
        self._most_open = max(1, min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))
        self._is_slow = True  # until reads turn out to be out of memory

    def read(
        self,
        shards: IntArray,
        offsets: IntArray,
        sizes: IntArray,
        begins: IntArray | None = None,  # noqa: ARG002
        ends: IntArray | None = None,  # noqa: ARG002
        *,
        batch: int = -1,  # noqa: ARG002
    ) -> Iterator[tuple[int, memoryview | SampleError]]:
        """The bytes of each span, or why they cannot be had.

        Args:
            shards: int64 [n], numbers of shards.
            offsets: int64 [n], where the spans begin.
            sizes: int64 [n], their bytes. Equal spans, of samples that share a zstd frame, are read once.
            begins: of the extents, as `CachedFetcher.read` needs them; of no use here,
            ends: nor these,
            batch: nor this.

        Yields:
            (i, bytes of span i), each i once, in the order of the shards' bytes.

        Raises:
            LoaderError: a shard cannot be opened.
        """
        runs = list(_runs(shards, offsets, sizes))
        for shard, begin, end, _ in runs:
            # announced before anything is decoded, so that the disk works while the processor does
            with suppress(OSError):
                os.posix_fadvise(self._file(shard), begin, end - begin, os.POSIX_FADV_WILLNEED)
        for shard, begin, end, spans in runs:
            data = self._bytes(shard, begin, end - begin)
            for number in spans:
                offset, size = int(offsets[number]), int(sizes[number])
                if not isinstance(data, SampleError):
                    span: memoryview | SampleError = data[offset - begin :][:size]
                else:  # a bad spot is one sample's, not its neighbours'
                    span = self._bytes(shard, offset, size) if len(spans) > 1 else data
                if not isinstance(span, SampleError) and len(span) < size:
                    span = SampleError("shard-read-error", f"the shard ends before byte {offset + size}")
                yield number, span

    def read_into(
        self, memory: npt.NDArray[np.uint8], shards: IntArray, offsets: IntArray, sizes: IntArray
    ) -> tuple[IntArray, dict[int, SampleError]]:
        """The bytes of all spans, read to where they are wanted.

        Args:
            memory: uint8, at least the sum of `sizes`.
            shards: as for `read`,
            offsets: likewise,
            sizes: likewise, at least 1 each.

        Returns:
            begins: int64 [n], where each span begins in `memory`.
            errors: why some cannot be had.

        Raises:
            LoaderError: a shard cannot be opened.
        """
        order = np.lexsort((offsets, shards))
        ends = np.cumsum(sizes[order])
        begins = np.empty_like(ends)
        begins[order] = ends - sizes[order]
        first = np.ones(len(order), bool)  # of a stretch without a gap
        first[1:] = (shards[order][1:] != shards[order][:-1]) | (
            offsets[order][1:] != (offsets + sizes)[order][:-1]
        )
        firsts = np.flatnonzero(first)
        stretches = list(
            zip(
                shards[order[firsts]].tolist(),
                offsets[order[firsts]].tolist(),
                begins[order[firsts]].tolist(),
                [*begins[order[firsts[1:]]].tolist(), int(ends[-1]) if len(ends) else 0],
                strict=False,
            )
        )
        if self._is_slow:
            # announced before anything is read, so that the disk works on all of them at once
            for shard, offset, begin, end in stretches:
                with suppress(OSError):
                    os.posix_fadvise(self._file(shard), offset, end - begin, os.POSIX_FADV_WILLNEED)
        started = time.perf_counter()
        view = memoryview(memory.data)
        short = []
        for number, (shard, offset, begin, end) in enumerate(stretches):
            try:
                if not _fill(self._file(shard), view[begin:end], offset):
                    short.append(number)
            except OSError as error:
                if (
                    error.errno == errno.ESTALE
                ):  # replaced behind NFS: what has the name now is opened once more, if there is anything
                    os.close(self._open.pop(shard))
                short.append(number)
        self._is_slow = time.perf_counter() - started > _SLOW * len(stretches)
        errors: dict[int, SampleError] = {}
        for number in short:  # a bad spot is one sample's, not its neighbours'
            last = firsts[number + 1] if number + 1 < len(firsts) else len(order)
            for span in order[firsts[number] : last].tolist():
                begin, size = int(begins[span]), int(sizes[span])
                try:
                    if not _fill(
                        self._file(int(shards[span])), view[begin : begin + size], int(offsets[span])
                    ):
                        detail = f"the shard ends before byte {int(offsets[span]) + size}"
                        errors[span] = SampleError("shard-read-error", detail)
                except OSError as error:
                    errors[span] = SampleError("shard-read-error", error.strerror or str(error))
        return begins, errors

    def _bytes(self, shard: int, begin: int, size: int) -> memoryview | SampleError:
        try:
            return memoryview(_read_fully(self._file(shard), begin, size))
        except OSError as error:
            return SampleError("shard-read-error", error.strerror or str(error))

    def __del__(self) -> None:
        while self._open:
            self._close_oldest()

    def _file(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= self._most_open:
            self._close_oldest()
        while True:
            try:
                self._open[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._open:
                    self._close_oldest()
                    continue
                # the run's fault, not its samples': a whole shard must not turn into fillers
                raise LoaderError(
                    f"shard {self._paths[shard]} cannot be opened any more: {error.strerror}"
                ) from None
            return self._open[shard]

    def _close_oldest(self) -> None:
        os.close(self._open.popitem(last=False)[1])


def _runs(shards: IntArray, offsets: IntArray, sizes: IntArray) -> Iterator[tuple[int, int, int, list[int]]]:
    """(shard, begin, end, spans) of stretches without a gap."""
    shard = begin = end = last = -1
    spans: list[int] = []
    for number in np.lexsort((offsets, shards)).tolist():
        at, size = int(offsets[number]), int(sizes[number])
        again = at == last and at + size == end
        if shards[number] == shard and (again or (at == end and at + size - begin <= _MAX_READ)):
            end, last = at + size, at
            spans.append(number)
            continue
        if spans:
            yield shard, begin, end, spans
        shard, begin, end, last, spans = int(shards[number]), at, at + size, at, [number]
    if spans:
        yield shard, begin, end, spans


def _fill(file: int, memory: memoryview, offset: int) -> bool:
    """Read until `memory` is full; False at the file's end."""
    done = os.preadv(file, [memory], offset)
    while done < len(memory):  # a signal or the file's end came between
        more = os.preadv(file, [memory[done:]], offset + done)
        if not more:
            return False
        done += more
    return True


def _read_fully(file: int, begin: int, size: int) -> bytes | bytearray:
    data = os.pread(file, size, begin)
    if len(data) == size:
        return data
    whole = bytearray(data)  # a signal or the file's end came between
    while len(whole) < size and (more := os.pread(file, size - len(whole), begin + len(whole))):
        whole += more
    return whole
