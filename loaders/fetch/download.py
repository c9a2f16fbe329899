"""The download process of a rank: fetches what batches will need, in their order, into the node's block cache.

    trainer  --- announce, done --->  +----------+  claims, 16 threads
                                      | download | ------------------>  object store
    workers  --- wait, read ------->  +----------+  blocks appear in the cache; `FetchCounters.news` changes

It alone uses obstore, whose threads do not survive a fork. One thread schedules; the others fetch, check and write one block at a time.
A block stays pinned for some batches after its last announced use, since the next ones will need it again as a rule.
"""

import os
import queue
import select
import threading
import time
import traceback
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, NoReturn

from loaders.fetch.blocks import FOOTER_BYTES, Extent, block_name
from loaders.fetch.cache import BlockCache, Claim, Want
from loaders.fetch.extents import ExtentFetcher, Source
from loaders.fetch.folder import CacheFolder
from loaders.fetch.requests import NoRangesError, Patience, Requests
from loaders.fetch.shared import FetchCounters, Kind, Messages
from loaders.worker import forget_handlers
from shardify.errors import LoaderError
from shardify.format.urls import is_url, shown

_LINGERING = 64  # batches that a block stays pinned after its last announced use
_SOON = 4  # batches after the last one that was done: for these, blocks may go that would be kept otherwise
_CLAIMED_AT_ONCE = 64
_IN_FLIGHT_BYTES = 512 * 1024 * 1024  # of memory, for blocks being fetched; one may always be
_PARENT_CHECK = 0.5  # seconds
_OTHERS_CHECK = 0.02  # seconds between two looks whether another rank has fetched a block
_ROOM_CHECK = 0.1
_FULL_NOTE = 1.0  # seconds that a worker's block must find no room before that is said
_CLOSING = 3.0  # seconds that closing may take when the trainer has gone


@dataclass(frozen=True, slots=True)
class Settings:
    """What the download process is told at its start."""

    sources: list[Source]
    folder: CacheFolder
    patience: Patience
    downloads: int


class _State(IntEnum):
    QUEUED = 0
    LOADING = 1
    READY = 2


@dataclass(slots=True, eq=False)
class _Need:
    """A block that batches need, or needed a short while ago."""

    extent: Extent
    name: str
    state: _State = _State.QUEUED
    batches: dict[int, set[int]] = field(default_factory=dict)  # -> first bytes of what each has yet to read
    waiting: set[int] = field(default_factory=set)  # batches whose workers wait for it
    uses: int = 0  # samples read since it was pinned
    samples: int = 0  # in it, as far as known
    last: int = 0  # when its last batch was done, in batches
    refused: float = 0.0  # since when there has been no room for it, though a worker waits


class _Fetched(NamedTuple):
    """What a thread says of a block: how many samples it holds, or that its server gives no ranges."""

    need: _Need
    samples: int
    no_ranges: bool = False


def run(settings: Settings, messages: Messages, counters: FetchCounters, notes: int, parent: int) -> NoReturn:
    """The life of the download process, from fork to exit.

    Args:
        settings: what to fetch and where to put it.
        messages: what trainer and workers say.
        counters: what they see.
        notes: file descriptor of a pipe, for lines that the trainer shows its user.
        parent: the trainer's process.
    """
    status = 1
    try:
        forget_handlers()
        os.close(messages.writer)
        downloader: Downloader | None = None
        try:
            downloader = Downloader(settings, messages, counters, notes)
            counters.tell_news()
            threading.Thread(target=_end_with, args=(parent, downloader), daemon=True).start()
            downloader.serve()
            status = 0
        except LoaderError as error:
            counters.fail(str(error))
        except BaseException as error:  # noqa: BLE001 - said to who waits, whatever it is
            counters.fail(f"the download process failed: {''.join(traceback.format_exception(error))}")
        if status:
            counters.tell_news()
            _stay_for(parent, messages)
        if downloader is not None:
            downloader.close()
    finally:
        os._exit(status)


def _end_with(parent: int, downloader: "Downloader") -> None:
    """End when the trainer has gone, however it went."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK)
    threading.Timer(_CLOSING, os._exit, (1,)).start()
    with suppress(Exception):
        downloader.close()
    os._exit(1)


def _stay_for(parent: int, messages: Messages) -> None:
    """Go on taking messages after a failure, so that those who send them find its reason, until the trainer closes or goes."""
    poll = select.poll()
    poll.register(messages.reader, select.POLLIN)
    while os.getppid() == parent:
        poll.poll(int(_PARENT_CHECK * 1000))
        if Kind.CLOSE in messages.receive()[:, 0]:
            return


class Downloader:
    """Schedules and fetches; see the module's head."""

    def __init__(self, settings: Settings, messages: Messages, counters: FetchCounters, notes: int) -> None:
        self._sources = settings.sources
        self._messages, self._counters = messages, counters
        self._counting = threading.Lock()
        self._notes, self._noted = notes, set[str]()
        self._downloads = settings.downloads
        remote = [source for source in settings.sources if is_url(source.url)]
        data = sum(source.size for source in remote)
        self._cache = BlockCache(settings.folder, data, {source.identity for source in remote})
        requests = Requests(settings.patience, self._count)
        self._extents = ExtentFetcher(settings.sources, self._cache, requests, self._note)
        self._needs: dict[Extent, _Need] = {}
        self._queue: deque[_Need] = deque()
        self._lingering: OrderedDict[Extent, _Need] = OrderedDict()
        self._whole = set[int]()  # shards whose servers give no ranges
        self._batches: dict[int, set[Extent]] = {}
        self._clock = 0  # batches done
        self._done = -1  # the last of them
        self._in_flight = self._in_flight_bytes = 0
        self._others = self._full = False
        self._jobs: queue.SimpleQueue[_Need] = queue.SimpleQueue()
        self._fetched: queue.SimpleQueue[_Fetched | BaseException] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def serve(self) -> None:
        """Work until told to close.

        Raises:
            LoaderError: a block cannot be had.
        """
        for _ in range(self._downloads):
            threading.Thread(target=self._work, daemon=True).start()
        poll = select.poll()
        poll.register(self._messages.reader, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            pause = _OTHERS_CHECK if self._others else _ROOM_CHECK if self._full else 1.0
            poll.poll(int(pause * 1000))
            with suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            if self._take_messages():
                return
            self._take_fetched()
            self._schedule()

    def close(self) -> None:
        """Give the cache back."""
        self._cache.close()

    # what trainer and workers say

    def _take_messages(self) -> bool:
        urgent: list[_Need] = []
        calm: list[_Need] = []
        for kind, batch, shard, begin, end, value in self._messages.receive().tolist():
            if kind == Kind.CLOSE:
                return True
            if kind == Kind.DONE:
                self._clock, self._done = self._clock + 1, max(self._done, batch)
                for extent in self._batches.pop(batch, ()):
                    if (done := self._needs.get(extent)) is not None and batch in done.batches:
                        del done.batches[batch]
                        done.waiting.discard(batch)
                        self._rest(done)
            elif kind == Kind.USED:
                self._count("bytes_used", value)
            elif kind == Kind.WAITED:
                self._count("wait_us", value)
            elif kind == Kind.READ:
                need = self._need(shard, begin, end)
                need.uses += value
                self._has_read(need, batch, begin, calm)
            else:
                need = self._need(shard, begin, end)
                self._batches.setdefault(batch, set()).add(need.extent)
                self._lingering.pop(need.extent, None)
                need.batches.setdefault(batch, set()).add(begin)
                if kind == Kind.WAIT:
                    self._is_waited_for(need, batch, urgent)
        if urgent or calm:
            self._cache.set_urgent([need.name for need in urgent], urgent=True)
            self._cache.set_urgent([need.name for need in calm if not need.waiting], urgent=False)
        self._release(self._no_longer_lingering())
        return False

    def _need(self, shard: int, begin: int, end: int) -> _Need:
        if shard in self._whole:
            begin, end = 0, self._sources[shard].size
        extent = Extent(shard, begin, end)
        need = self._needs.get(extent)
        if need is None:
            need = _Need(extent, block_name(self._sources[shard].identity, begin, end))
            self._needs[extent] = need
            self._queue.append(need)
        return need

    def _is_waited_for(self, need: _Need, batch: int, urgent: list[_Need]) -> None:
        if batch not in need.waiting:
            self._count("waits", 1)
            need.waiting.add(batch)
        if need.state is _State.READY and not self._cache.holds(need.name, self._want(need).size):
            need.state = _State.QUEUED  # it had to go for one that was needed sooner
            self._queue.append(need)
        if need.state is not _State.QUEUED:
            urgent.append(need)

    def _has_read(self, need: _Need, batch: int, begin: int, calm: list[_Need]) -> None:
        left = need.batches.get(batch, set())
        left.discard(begin)
        if left:
            return
        need.batches.pop(batch, None)
        if (extents := self._batches.get(batch)) is not None:
            extents.discard(need.extent)
        if batch in need.waiting:
            need.waiting.discard(batch)
            calm.append(need)
        self._rest(need)

    def _rest(self, need: _Need) -> None:
        """Let a block go that no batch needs any more: at once when all of it was used, else some batches later."""
        if need.batches:
            return
        if need.state is _State.QUEUED:
            self._drop(need)
        elif need.state is _State.READY:
            need.last = -_LINGERING if 0 < need.samples <= need.uses else self._clock
            self._lingering[need.extent] = need
            if need.last < 0:
                self._lingering.move_to_end(need.extent, last=False)

    def _no_longer_lingering(self, *, all_of_them: bool = False) -> list[_Need]:
        released = []
        while self._lingering:
            extent, need = next(iter(self._lingering.items()))
            if not all_of_them and need.last + _LINGERING > self._clock:
                break
            del self._lingering[extent]
            released.append(need)
        return released

    def _release(self, needs: list[_Need]) -> None:
        for need in needs:
            self._needs.pop(need.extent, None)
        if needs:
            self._cache.release({need.name: need.uses for need in needs})

    def _drop(self, need: _Need) -> None:
        self._needs.pop(need.extent, None)
        with suppress(ValueError):
            self._queue.remove(need)

    # what is fetched next

    def _schedule(self) -> None:
        if any(need.waiting for need in self._queue):
            self._queue = deque(sorted(self._queue, key=lambda need: not need.waiting))  # stable
        while self._queue and self._in_flight < self._downloads:
            if self._in_flight_bytes >= _IN_FLIGHT_BYTES:
                break
            asked = [self._queue[i] for i in range(min(_CLAIMED_AT_ONCE, len(self._queue)))]
            wants = [self._want(need) for need in asked]
            preempted = self._cache.preempted
            claims = self._cache.claim(wants, self._downloads - self._in_flight)
            self._note_pressure(self._cache.preempted - preempted)
            others = [need for need, claim in zip(asked, claims, strict=False) if claim is Claim.OTHERS]
            full = bool(claims) and claims[-1] is Claim.NO_ROOM
            for need, claim in zip(asked, claims, strict=False):
                if claim is not Claim.NO_ROOM:
                    self._queue.popleft()
                if claim is Claim.READY:
                    self._is_there(need)
                elif claim is Claim.MINE:
                    need.state, need.refused = _State.LOADING, 0.0
                    self._in_flight += 1
                    self._in_flight_bytes += need.extent.end - need.extent.begin
                    self._jobs.put(need)
            self._queue.extend(others)
            if Claim.READY in claims:
                self._counters.tell_news()
            self._others, self._full = bool(others), full
            if full and (resting := self._no_longer_lingering(all_of_them=True)):
                self._release(resting)
                continue
            if full:
                self._is_refused(asked[len(claims) - 1])
            if full or others or not claims:
                break

    def _want(self, need: _Need) -> Want:
        due = min(need.batches, default=0)
        return Want(
            need.name,
            need.extent.end - need.extent.begin + FOOTER_BYTES,
            due=due,
            soon=due <= self._done + _SOON,
            urgent=bool(need.waiting),
        )

    def _is_there(self, need: _Need) -> None:
        need.state, need.refused = _State.READY, 0.0
        self._count("hits", 1)
        with suppress(OSError):  # kept from an earlier run, it may be on the disk alone
            file = os.open(self._cache.path(need.name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)
        if not need.batches:
            self._rest(need)

    def _take_fetched(self) -> None:
        news = False
        while True:
            try:
                fetched = self._fetched.get_nowait()
            except queue.Empty:
                break
            if isinstance(fetched, BaseException):
                raise fetched
            need = fetched.need
            self._in_flight -= 1
            self._in_flight_bytes -= need.extent.end - need.extent.begin
            if fetched.no_ranges:
                self._fetch_whole(need)
                continue
            need.state, need.samples, news = _State.READY, fetched.samples, True
            if not need.batches:
                self._rest(need)
        if news:
            self._counters.tell_news()

    def _fetch_whole(self, need: _Need) -> None:
        """The server gives no ranges: what is needed of this shard is from now on needed of one block that holds all of it."""
        shard = need.extent.shard
        self._cache.abandon(need.name)
        self._needs.pop(need.extent, None)
        if shard not in self._whole:
            self._whole.add(shard)
            self._counters.keep_whole_shards()
            self._note(
                "ranges",
                f"{shown(self._sources[shard].url)}: the server gives no byte ranges, so that whole shards are fetched; the cache needs room "
                "for all that are read at the same time",
            )
        moved = [need, *(other for other in self._needs.values() if other.extent.shard == shard)]
        for other in moved:
            whole = self._need(shard, other.extent.begin, other.extent.end)
            if other is whole or (other is not need and other.state is not _State.QUEUED):
                continue  # those under way come back here by themselves
            if other is not need:
                self._drop(other)
            for batch, begins in other.batches.items():
                whole.batches.setdefault(batch, set()).update(begins)
                self._batches.setdefault(batch, set()).add(whole.extent)
                self._batches[batch].discard(other.extent)
            whole.waiting |= other.waiting

    # threads

    def _work(self) -> None:
        while True:
            need = self._jobs.get()
            result: _Fetched | BaseException
            try:
                result = _Fetched(need, self._fetch(need))
            except NoRangesError:
                result = _Fetched(need, 0, no_ranges=True)
            except BaseException as error:  # noqa: BLE001 - raised in the scheduling thread
                result = error
            self._fetched.put(result)
            os.eventfd_write(self._wake, 1)

    def _fetch(self, need: _Need) -> int:
        shard, begin, end = need.extent
        whole = shard in self._whole
        if whole and (begin, end) != (0, self._sources[shard].size):
            raise NoRangesError  # found out meanwhile
        return self._extents.fetch(need.extent, need.name, whole=whole)

    def _count(self, name: str, value: int) -> None:
        with self._counting:
            self._counters.add(name, value)

    # what the user is told

    def _is_refused(self, need: _Need) -> None:
        """No room for a block: worth saying when a worker waits for it, and others do not let go soon."""
        if not need.waiting:
            return
        if not need.refused:
            need.refused = time.monotonic()
        elif time.monotonic() - need.refused > _FULL_NOTE:
            self._note_small_cache()

    def _note_pressure(self, preempted: int) -> None:
        if preempted:
            self._count("evicted_in_need", preempted)
            self._note_small_cache()

    def _note_small_cache(self) -> None:
        needed = sum(need.extent.end - need.extent.begin for need in self._needs.values() if need.batches)
        self._note(
            "small",
            f"cache_size={self._cache.bound} is too small for what the next batches need at the same time, so that blocks are fetched again; "
            f"about {2 * needed} for each rank of this machine would do",
        )

    def _note(self, topic: str, line: str) -> None:
        """Have the trainer say something, once."""
        with self._counting:
            if topic in self._noted:
                return
            self._noted.add(topic)
        with suppress(OSError):
            os.write(self._notes, f"{line}\n".encode())
