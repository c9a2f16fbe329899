"""Reading remote shards through the node's block cache: `RemoteFetch` in the trainer's process, `CachedFetcher` in its workers.

A sample of a remote shard is read by fetching its *extent*, the bytes of a block of neighbouring samples, as one range, once per node.
The trainer announces what the planned batches will need; the download process (`download`) fetches it ahead; workers read the blocks
from the cache, and wait for those that are not there yet.
"""

import os
import select
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loaders.arguments import integer
from loaders.fetch.blocks import Extent, Fault, block_name, read_faults, shard_identity
from loaders.fetch.cache import block_path
from loaders.fetch.folder import CacheFolder, choose_folder, remove_if_deserted
from loaders.fetch.local import LocalFetcher
from loaders.fetch.shared import FetchCounters, IntArray, Kind, Messages, message
from shardify.errors import LoaderError, SampleError, UsageError
from shardify.format.urls import is_url

_WAIT = 5  # milliseconds between two looks for news
_LOOK = 0.1  # seconds between two looks without news, which another rank's may be
_REPEAT = 2.0  # seconds after which a wait is told again
_CLOSE = 5.0  # seconds that the download process has to end
_NOTES_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Shards:
    """The shards, by number.

    Attributes:
        paths: URLs or local paths.
        sizes: bytes of each.
        identities: what stands for the content of each in names.
        remote: bool [n], whether each is read through the cache.
    """

    paths: Sequence[str]
    sizes: Sequence[int]
    identities: Sequence[str]
    remote: npt.NDArray[np.bool_]


@dataclass(slots=True)
class _Process:
    """The download process: its number, a descriptor that becomes readable when it ends, and the pipe with its notes."""

    pid: int
    ended: int
    notes: int
    status: int | None = None


class RemoteFetch:
    """Fetching of the remote shards among `paths`, for one rank; without any, it does nothing.

    Not thread-safe. `start` forks: before workers are started, which then read with `fetcher()`.

    Args:
        paths: URLs or local paths of the shards, by number.
        sidecars: of each shard; None where there is none: then headers and lengths alone are checked.
        sizes: bytes of each shard.
        digests: what identifies each shard's content, such as its recorded xxh3_128; an empty one stands for URL and size. Blocks of a kept
            cache are found by it, whatever data set they are read for.
        cache_dir: folder to keep blocks in; None (default) for a temporary one, which all loaders of this user over the same shards share
            and the last of them removes.
        cache_size: bytes that the folder may hold; None (default) for what the data needs, but at most half of what is free (and 64 GB, when it
            is temporary).
        timeout: seconds until an extent that cannot be fetched fails the run. Default 300.
        request_timeout: seconds that one request may take. Default 60.
        downloads: requests under way at the same time. Default 16.

    Attributes:
        counters: what has been fetched and waited for.

    Raises:
        UsageError: the cache folder cannot be used, or an argument is out of range.
    """

    def __init__(
        self,
        paths: Sequence[str],
        sidecars: Sequence[str | None],
        sizes: Sequence[int],
        digests: Sequence[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | None = None,
        timeout: float = 300.0,
        request_timeout: float = 60.0,
        downloads: int = 16,
    ) -> None:
        if cache_size is not None:
            cache_size = integer("cache_size", cache_size, least=1)
        if min(timeout, request_timeout) <= 0:
            raise UsageError(
                f"timeout={timeout}, request_timeout={request_timeout}: seconds, more than 0, are needed"
            )
        if downloads < 1:
            raise UsageError(f"downloads={downloads}: at least 1 is needed")
        self.counters = FetchCounters()
        identities = [shard_identity(*shard) for shard in zip(paths, sizes, digests, strict=True)]
        remote = np.array([is_url(path) for path in paths], bool)
        self._shards = Shards(list(paths), list(sizes), identities, remote)
        self._sidecars = list(sidecars)
        self._cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self._cache_size = cache_size
        self._timeout, self._request_timeout, self._downloads = timeout, request_timeout, downloads
        self._home = os.getpid()
        self._folder: CacheFolder | None = None
        self._messages: Messages | None = None
        self._process: _Process | None = None

    @property
    def is_needed(self) -> bool:
        """Whether any shard is remote."""
        return bool(self._shards.remote.any())

    def start(self) -> None:
        """Start the download process, unless it runs or is not needed.

        Raises:
            UsageError: the cache folder cannot be used.
        """
        if not self.is_needed or self._process is not None:
            return
        self._folder = choose_folder(self._cache_dir, self._cache_size, self._shards.identities)
        self.counters.restart()
        self._messages = Messages()
        self._process = self._fork(self._messages, self._folder)
        os.close(self._messages.reader)

    def fetcher(self) -> "LocalFetcher | CachedFetcher":
        """What a worker reads with: made after `start`, before the worker is forked; each process needs its own."""
        if not self.is_needed:
            return LocalFetcher(self._shards.paths)
        assert self._messages is not None
        assert self._folder is not None
        return CachedFetcher(
            self._shards, self._folder.path, self._messages, self.counters, timeout=self._timeout
        )

    def announce(self, batch: int, shards: IntArray, begins: IntArray, ends: IntArray) -> None:
        """Say what a batch will need; never waits.

        Args:
            batch: its number, from which its place in the order of batches follows.
            shards: int64 [n], number of the shard of each of its samples (or extents),
            begins: int64 [n], where the extent begins,
            ends: int64 [n], and ends.

        Raises:
            LoaderError: as `check`.
        """
        wanted = self._shards.remote[shards]
        if self._messages is None or not wanted.any():
            return
        extents = np.unique(np.stack([shards[wanted], begins[wanted], ends[wanted]], axis=1), axis=0)
        self._post(message(Kind.ANNOUNCE, batch, extents))

    def done(self, batch: int) -> None:
        """A batch has been built: it needs nothing any more.

        Raises:
            LoaderError: as `check`.
        """
        if self._messages is not None:
            self._post(message(Kind.DONE, batch))

    def check(self) -> None:
        """Show what the download process has to say.

        Raises:
            LoaderError: it cannot go on, or has ended.
        """
        if self._process is None or self._messages is None or self._home != os.getpid():
            return
        for line in _lines(self._process.notes):
            warnings.warn(line, stacklevel=2)
        if failure := self.counters.failure:
            raise LoaderError(failure)
        if not self._messages.pause(0) and self._has_ended(_CLOSE):
            raise LoaderError(f"the download process was ended {_how(self._process.status)} (out of memory?)")
        with suppress(BrokenPipeError):
            self._messages.post()

    def close(self) -> None:
        """End the download process. A temporary cache goes with the last one that uses it."""
        process, self._process = self._process, None
        messages, self._messages = self._messages, None
        if process is None or messages is None:
            return
        if self._home == os.getpid():
            self._process = process
            with suppress(BrokenPipeError):
                messages.post(message(Kind.CLOSE))
            if not self._has_ended(_CLOSE):
                os.kill(process.pid, signal.SIGKILL)
                self._has_ended(_CLOSE)
            self._process = None
            if self._folder is not None and self._folder.temporary:
                remove_if_deserted(self._folder.path)
        for file in (process.ended, process.notes, messages.writer):
            os.close(file)

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def _post(self, records: IntArray) -> None:
        assert self._messages is not None
        try:
            self._messages.post(records)
        except BrokenPipeError:
            self.check()

    def _fork(self, messages: Messages, folder: CacheFolder) -> _Process:
        # imported before the fork: another thread may hold a lock that an import needs
        from loaders.fetch.download import Settings, run
        from loaders.fetch.extents import Source
        from loaders.fetch.requests import Patience

        shards = self._shards
        columns = zip(shards.paths, self._sidecars, shards.sizes, shards.identities, strict=True)
        sources = [Source(*shard) for shard in columns]
        settings = Settings(sources, folder, Patience(self._request_timeout, self._timeout), self._downloads)
        notes, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            run(settings, messages, self.counters, writer, parent)
        os.close(writer)
        return _Process(pid, os.pidfd_open(pid), notes)

    def _has_ended(self, seconds: float) -> bool:
        assert self._process is not None
        if self._process.status is None:
            poll = select.poll()
            poll.register(self._process.ended, select.POLLIN)
            if not poll.poll(int(seconds * 1000)):
                return False
            try:
                _, status = os.waitpid(self._process.pid, 0)
            except ChildProcessError:  # somebody else waited for all children
                status = 0
            self._process.status = status
        return True


class CachedFetcher:
    """Reads samples of remote shards from the block cache, and of local ones from their files.

    The arguments are what `RemoteFetch.fetcher` gives.
    """

    def __init__(
        self,
        shards: Shards,
        folder: str,
        messages: Messages,
        counters: FetchCounters,
        *,
        timeout: float,
    ) -> None:
        self._paths, self._remote = shards.paths, shards.remote
        self._identities, self._sizes = shards.identities, shards.sizes
        self._folder = folder
        self._messages, self._counters = messages, counters
        # what the download process has to say of an extent should come first
        self._timeout = 1.05 * timeout + 5.0
        self._local = LocalFetcher(self._paths)

    def read(
        self,
        shards: IntArray,
        offsets: IntArray,
        sizes: IntArray,
        begins: IntArray,
        ends: IntArray,
        *,
        batch: int = -1,
    ) -> Iterator[tuple[int, memoryview | SampleError]]:
        """The bytes of each span, or why they cannot be had.

        Args:
            shards: int64 [n], numbers of shards.
            offsets: int64 [n], where the spans begin.
            sizes: int64 [n], their bytes.
            begins: int64 [n], where the extent of each begins in its shard,
            ends: int64 [n], and ends.
            batch: its number, as it was announced.

        Yields:
            (i, bytes of span i), each i once, in an order of its own: what is there comes first.

        Raises:
            LoaderError: a local shard cannot be opened, or what is needed did not come in time.
        """
        remote = self._remote[shards]
        if not remote.all():
            numbers = np.flatnonzero(~remote)
            for i, span in self._local.read(shards[numbers], offsets[numbers], sizes[numbers]):
                yield int(numbers[i]), span
        if not remote.any():
            return
        left = self._by_extent(np.flatnonzero(remote), shards, offsets, begins, ends)
        used = int(sizes[remote].sum())
        told: float | None = None
        waited = 0.0  # without what is done with the samples meanwhile
        news, looked = -1, time.monotonic()
        while True:
            seen = self._counters.news
            # nothing before the first news: what lies there may be from before a reboot
            if seen and (seen != news or time.monotonic() - looked > _LOOK):
                news, looked = seen, time.monotonic()
                there: list[tuple[Extent, int]] = []
                for extent in list(left):
                    if (block := self._open(extent)) is not None:
                        spans = left.pop(extent)
                        there.append((extent, len(spans)))
                        try:
                            yield from self._spans(block, spans, offsets, sizes)
                        finally:
                            os.close(block.file)
                self._tell(Kind.READ, batch, [extent for extent, _ in there], [count for _, count in there])
            now = time.monotonic()
            if not left:
                break
            if told is None or now - told > _REPEAT:
                told = now
                self._tell(Kind.WAIT, batch, list(left))
            self._go_on_waiting(waited, left)
            waited += time.monotonic() - now
        self._send(message(Kind.USED, batch, values=used))
        if told is not None:
            self._send(message(Kind.WAITED, batch, values=int(waited * 1e6)))

    @staticmethod
    def _by_extent(
        numbers: IntArray, shards: IntArray, offsets: IntArray, begins: IntArray, ends: IntArray
    ) -> dict[Extent, list[int]]:
        found: dict[Extent, list[int]] = {}
        order = numbers[np.lexsort((offsets[numbers], shards[numbers]))]
        columns = zip(
            order.tolist(), shards[order].tolist(), begins[order].tolist(), ends[order].tolist(), strict=True
        )
        for number, shard, begin, end in columns:
            found.setdefault(Extent(shard, begin, end), []).append(number)
        return found

    def _open(self, extent: Extent) -> "_Block | None":
        block = self._open_block(extent)
        if block is None and self._counters.has_whole_shards:
            return self._open_block(Extent(extent.shard, 0, self._sizes[extent.shard]))
        return block

    def _open_block(self, extent: Extent) -> "_Block | None":
        shard, begin, end = extent
        path = block_path(self._folder, block_name(self._identities[shard], begin, end))
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LoaderError(f"the cache cannot be read: {path}: {error.strerror}") from None
        faults = read_faults(file, end - begin, os.fstat(file).st_size)
        if faults is None:
            os.close(
                file
            )  # something else has changed it: the download process sees that too when it is told of the wait
            return None
        return _Block(file, path, begin, faults)

    def _spans(
        self, block: "_Block", spans: list[int], offsets: IntArray, sizes: IntArray
    ) -> Iterator[tuple[int, memoryview | SampleError]]:
        last, data = (-1, -1), memoryview(b"")
        for number in spans:
            at, size = int(offsets[number]), int(sizes[number])
            fault = next((f for f in block.faults if f.begin < at + size and at < f.end), None)
            if fault is not None:
                yield number, SampleError("shard-corrupt", fault.detail)
                continue
            if (at, size) != last:  # samples may share a zstd frame
                last, data = (at, size), block.read(at, size)
            yield number, data

    def _go_on_waiting(self, waited: float, left: dict[Extent, list[int]]) -> None:
        there = self._messages.pause(_WAIT)
        if failure := self._counters.failure:
            raise LoaderError(failure)
        if not there:
            raise LoaderError("the download process has ended; was memory short?")
        if waited > self._timeout:
            shard, begin, end = next(iter(left))
            raise LoaderError(
                f"{self._paths[shard]}: bytes {begin}-{end - 1} did not come within {waited:.0f} s; the cache may be too small or its disk too slow"
            )

    def _tell(self, kind: Kind, batch: int, extents: list[Extent], values: list[int] | int = 0) -> None:
        if extents:
            self._send(message(kind, batch, np.array(extents, np.int64), values))

    def _send(self, records: IntArray) -> None:
        try:
            self._messages.send(records)
        except BrokenPipeError:
            raise LoaderError(
                self._counters.failure or "the download process has ended; was memory short?"
            ) from None


@dataclass(slots=True, eq=False)
class _Block:
    """An open block whose first byte is byte `begin` of its shard."""

    file: int
    path: str
    begin: int
    faults: list[Fault]

    def read(self, at: int, size: int) -> memoryview:
        """The shard's bytes from `at` on."""
        try:
            data = os.pread(self.file, size, at - self.begin)
            while len(data) < size and (
                more := os.pread(self.file, size - len(data), at - self.begin + len(data))
            ):
                data += more
        except OSError as error:
            raise LoaderError(f"the cache cannot be read: {self.path}: {error.strerror}") from None
        if len(data) < size:
            raise LoaderError(f"{self.path} is shorter than it was: something else has changed it; remove it")
        return memoryview(data)


def _lines(file: int) -> list[str]:
    try:
        return os.read(file, _NOTES_BYTES).decode("utf-8", "replace").splitlines()
    except BlockingIOError:
        return []


def _how(status: int | None) -> str:
    code = os.waitstatus_to_exitcode(status or 0)
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
