"""Reads that follow each other: one by one while they are fast, many at a time once they are found to wait.

From the page cache or a good disk a read takes a tenth of a millisecond, and threads would only get in each other's way. On network file
systems, object stores and turning disks it waits for milliseconds, and many reads can wait together.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

THREADS = 64
_SLOW = 7e-4  # seconds a read, beyond its bytes at
_RATE = 500e6  # bytes/s
_TRIED = 16  # reads before they are judged
_TRIED_AGAIN = 2  # when they had to wait the last time
_SWITCH = 5e-4  # seconds
_MAX_BYTES = 128 * 1024 * 1024  # that are under way
_GROUP = 4  # items that a thread reads one after another
_GROUP_BYTES = 2 * 1024 * 1024

_waited = False


def read_ahead(
    read: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    size: Callable[[_Item], int],
    read_now: Callable[[_Item], _Result] | None = None,
    threads: int = THREADS,
) -> Iterator[tuple[_Item, _Result]]:
    """Each item and what `read` made of it, in the items' order.

    Args:
        read: called for an item by this thread or another one; what it raises is raised where the item's result would come.
        items: drawn a bounded number ahead.
        size: bytes that reading an item will take, which bound what is held in memory.
        read_now: called instead of `read` as long as this thread reads: its result is given out before the next item is read.
        threads: how many reads wait together.
    """
    global _waited  # noqa: PLW0603 - what this process's reads were like the last time
    waiting = iter(items)
    tried = _TRIED_AGAIN if _waited else _TRIED
    _waited = False
    slow = 0
    for count, item in enumerate(waiting, 1):
        begin = time.monotonic()
        result = (read_now or read)(item)
        took = time.monotonic() - begin
        slow += took > _SLOW and took > _SLOW + size(item) / _RATE
        yield item, result
        if count % tried == 0:
            # most of them, not all in all: a busy machine makes a few reads of any disk wait
            if slow > tried // 2:
                _waited = True
                break
            slow, tried = 0, _TRIED
    # threads that come back from waiting must not wait once more, for the interpreter: 5 ms is Python's default
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        yield from _in_threads(read, waiting, size=size, threads=threads)
    finally:
        sys.setswitchinterval(before)


@dataclass(frozen=True, slots=True)
class _Raised:
    error: Exception


def _in_threads(
    read: Callable[[_Item], _Result],
    waiting: Iterator[_Item],
    *,
    size: Callable[[_Item], int],
    threads: int,
) -> Iterator[tuple[_Item, _Result]]:
    def read_each(group: list[_Item]) -> list[_Result | _Raised]:
        return [_outcome(read, item) for item in group]

    ahead: deque[tuple[list[_Item], int, Future[list[_Result | _Raised]]]] = deque()
    held = 0
    groups = _groups(waiting, size)
    following = next(groups, None)
    if following is None:
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        try:
            while following is not None or ahead:
                while following and (not ahead or (held < _MAX_BYTES and len(ahead) < 2 * threads)):
                    group, weight = following
                    ahead.append((group, weight, pool.submit(read_each, group)))
                    held += weight
                    following = next(groups, None)
                group, weight, future = ahead.popleft()
                for item, outcome in zip(group, future.result(), strict=True):
                    if isinstance(outcome, _Raised):
                        raise outcome.error
                    yield item, outcome
                held -= weight
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _groups(items: Iterator[_Item], size: Callable[[_Item], int]) -> Iterator[tuple[list[_Item], int]]:
    """Neighbours for one thread, and their bytes: what it takes to hand one over is more than a small read takes."""
    group: list[_Item] = []
    weight = 0
    for item in items:
        group.append(item)
        weight += size(item)
        if len(group) == _GROUP or weight > _GROUP_BYTES:
            yield group, weight
            group, weight = [], 0
    if group:
        yield group, weight


def _outcome(read: Callable[[_Item], _Result], item: _Item) -> _Result | _Raised:
    try:
        return read(item)
    except Exception as error:  # noqa: BLE001 - raised where its item would come
        return _Raised(error)
