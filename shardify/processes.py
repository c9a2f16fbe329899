"""Independent pieces of work, each done by a process of its own: what damaged files do to the libraries that read them stays there."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import TypeVar

from shardify.engines.local import die_with, start_worker

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Ended:
    """A process ended before it had a result: `status` as `multiprocessing` gives it, negative for a signal."""

    status: int


def each_in_process(
    work: Callable[[_Item], _Result], items: Sequence[_Item], *, workers: int
) -> Iterator[_Result | Ended]:
    """``work(item)`` of each item in order, `workers` at a time, in forked processes.

    Closing the iterator, or an error, ends the processes that still run.

    Raises:
        Exception: what `work` raised.
    """
    method = multiprocessing.get_context("fork")
    waiting = deque(enumerate(items))
    running: dict[Connection, tuple[int, ForkProcess]] = {}
    done: dict[int, _Result | Exception | Ended] = {}
    following = 0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, item = waiting.popleft()
                here, there = method.Pipe(duplex=False)
                process = method.Process(target=_work, args=(there, work, item, os.getpid()), daemon=True)
                start_worker(process)
                there.close()
                running[here] = number, process
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                number, process = running.pop(connection)
                done[number] = _receive(connection, process)
            while following in done:
                result = done.pop(following)
                if isinstance(result, Exception):
                    raise result
                yield result
                following += 1
    finally:
        for connection, (_, process) in running.items():
            process.kill()
            process.join()
            connection.close()


def _work(connection: Connection, work: Callable[[_Item], _Result], item: _Item, parent: int) -> None:
    die_with(parent)
    try:
        result: _Result | Exception = work(item)
    except Exception as error:  # noqa: BLE001 - raised again by the parent
        result = error
    connection.send(result)


def _receive(connection: Connection, process: ForkProcess) -> "_Result | Exception | Ended":
    try:
        result: _Result | Exception = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        return Ended(process.exitcode or 0)
    finally:
        connection.close()
    process.join()
    return result
