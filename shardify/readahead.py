"""Reads that follow each other: one by one while they are fast, many at a time once they are found to wait.

From the page cache or a good disk a read takes a tenth of a millisecond, and threads would only get in each other's way. On network file
systems, object stores and turning disks it waits for milliseconds, and many reads can wait together.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

THREADS = 64
_SLOW = 1e-3  # seconds a read, beyond its bytes at
_RATE = 500e6  # bytes/s
_TRIED = 16  # reads before they are judged
_TRIED_AGAIN = 2  # when they had to wait the last time
_SWITCH = 5e-4  # seconds
_MAX_BYTES = 128 * 1024 * 1024  # that are under way
_MAX_ITEMS = 8 * THREADS

_waited = False


def read_ahead(
    read: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    size: Callable[[_Item], int],
    threads: int = THREADS,
) -> Iterator[tuple[_Item, _Result]]:
    """Each item and what `read` made of it, in the items' order.

    Args:
        read: called once an item, from this thread or from others; what it raises is raised where its item would come.
        items: drawn a bounded number ahead.
        size: bytes that reading an item will take, which bound what is held in memory.
        threads: how many reads wait together.
    """
    global _waited  # noqa: PLW0603 - what this process's reads were like the last time
    waiting = iter(items)
    excess = 0.0
    tried = _TRIED_AGAIN if _waited else _TRIED
    _waited = False
    for count, item in enumerate(waiting, 1):
        begin = time.monotonic()
        result = read(item)
        excess += time.monotonic() - begin - size(item) / _RATE
        yield item, result
        if count % tried == 0:
            if excess > tried * _SLOW:
                _waited = True
                break
            excess, tried = 0.0, _TRIED
    # threads that come back from waiting must not wait once more, for the interpreter: 5 ms is Python's default
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        yield from _in_threads(read, waiting, size=size, threads=threads)
    finally:
        sys.setswitchinterval(before)


def _in_threads(
    read: Callable[[_Item], _Result],
    waiting: Iterator[_Item],
    *,
    size: Callable[[_Item], int],
    threads: int,
) -> Iterator[tuple[_Item, _Result]]:
    ahead: deque[tuple[_Item, int, Future[_Result]]] = deque()
    held = 0
    first = next(waiting, None)
    if first is None:
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        try:
            item: _Item | None = first
            while item is not None or ahead:
                while item is not None and (not ahead or (held < _MAX_BYTES and len(ahead) < _MAX_ITEMS)):
                    weight = size(item)
                    ahead.append((item, weight, pool.submit(read, item)))
                    held += weight
                    item = next(islice(waiting, 1), None)
                done, weight, future = ahead.popleft()
                yield done, future.result()
                held -= weight
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
