"""Independent pieces of work, done by processes that somebody watches: what damaged files do to the libraries that read them stays there."""

import gc
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from threading import Lock
from typing import TypeVar

from shardify.engines.local import die_with, rare_collections
from shardify.format.child import signals_held

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_SWITCH = 5e-4  # seconds: a thread that makes a result waits for the interpreter a dozen times


@dataclass(frozen=True, slots=True)
class Ended:
    """A process ended before it had a result: `status` as `multiprocessing` gives it, negative for a signal."""

    status: int


@dataclass(slots=True)
class _Worker:
    """A process; `items` are the numbers of those that it has no result of yet, `alone` says that it gets one only."""

    process: ForkProcess
    alone: bool
    free: bool = True
    items: list[int] = field(default_factory=list)


def each_in_process(
    work: Callable[[_Item], _Result | Future[_Result]], items: Sequence[_Item], *, workers: int
) -> Iterator[_Result | Ended]:
    """``work(item)`` of each item in order, `workers` at a time, in forked processes.

    A process works on one item after another. When `work` gives it a future, it goes on with the next item meanwhile. When it ends, what it
    was at is done once more, each item by a process of its own, so that the one to blame is known.

    Closing the iterator ends the processes that still run.

    Raises:
        Exception: what `work` raised.
    """
    waiting, suspects = deque(range(len(items))), deque[int]()
    pool: dict[Connection, _Worker] = {}
    done: dict[int, _Result | Exception | Ended] = {}
    following = 0
    try:
        while following < len(items):
            while (suspects or waiting) and len(pool) < workers:
                here, worker = _start(work, pool, alone=bool(suspects))
                _give(here, worker, items, suspects or waiting)
            for here, worker in pool.items():
                if worker.free and waiting:
                    _give(here, worker, items, waiting)
            for ready in wait(list(pool)):
                assert isinstance(ready, Connection)
                here, worker = ready, pool[ready]
                try:
                    message: tuple[int, _Result | Exception] | None = here.recv()
                except (EOFError, ConnectionResetError):
                    _end(here, pool.pop(here))
                    if not worker.alone:
                        suspects += worker.items
                    else:
                        done[worker.items[0]] = Ended(worker.process.exitcode or 0)
                    continue
                if message is None:
                    worker.free = not worker.alone
                    continue
                number, done[number] = message
                worker.items.remove(number)
                if worker.alone:
                    _end(here, pool.pop(here))
            while following in done:
                result = done.pop(following)
                if isinstance(result, Exception):
                    # what others have begun they finish: files that were being written would be left behind
                    for here, worker in pool.items():
                        _end(here, worker)
                    pool.clear()
                    raise result
                yield result
                following += 1
    finally:
        for here, worker in pool.items():
            worker.process.kill()
            _end(here, worker)


def _start(
    work: Callable[[_Item], _Result | Future[_Result]], pool: dict[Connection, _Worker], *, alone: bool
) -> tuple[Connection, _Worker]:
    """One more process, which is in the pool as soon as it runs."""
    method = multiprocessing.get_context("fork")
    here, there = method.Pipe()
    process = method.Process(target=_work, args=(here, there, work, os.getpid()), daemon=True)
    worker = _Worker(process, alone)
    with signals_held():
        process.start()
        pool[here] = worker
    there.close()
    return here, worker


def _give(connection: Connection, worker: _Worker, items: Sequence[object], numbers: deque[int]) -> None:
    """One more item; when the process has ended, receiving from it says so."""
    number = numbers.popleft()
    worker.items.append(number)
    worker.free = False
    with suppress(BrokenPipeError):
        connection.send((number, items[number]))


def _end(connection: Connection, worker: _Worker) -> None:
    """Let a process finish what it is at, if it lives; told in words, for others that were forked later hold its connection open."""
    with suppress(OSError):
        connection.send(None)
    connection.close()
    worker.process.join()


def _work(
    parents: Connection,
    connection: Connection,
    work: Callable[[_Item], _Result | Future[_Result]],
    parent: int,
) -> None:
    die_with(parent)
    parents.close()
    gc.freeze()  # what was there before the fork is no garbage, and stays shared
    sys.setswitchinterval(_SWITCH)
    sending = Lock()

    def send(message: tuple[int, _Result | Exception] | None) -> None:
        with sending, suppress(BrokenPipeError):  # nobody waits for it any more
            connection.send(message)

    def finished(number: int, future: "Future[_Result]") -> None:
        error = future.exception()
        assert error is None or isinstance(error, Exception)
        send((number, error or future.result()))

    with rare_collections():
        while True:
            try:
                message = connection.recv()
            except (EOFError, ConnectionResetError):  # the parent has ended, or is about to
                return
            if message is None:
                return
            number, item = message
            try:
                result = work(item)
            except Exception as error:  # noqa: BLE001 - raised again by the parent
                send((number, error))
            else:
                if isinstance(result, Future):
                    result.add_done_callback(partial(finished, number))
                else:
                    send((number, result))
            send(None)
