"""Shards made by processes of this machine."""

import ctypes
import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, Protocol, TypeVar

from shardify.errors import PackError
from shardify.format.child import signals_held
from shardify.pack import Report, RunContext, ShardResult

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Task(Protocol):
    """A shard to make."""

    @property
    def name(self) -> str:
        """The tar's name."""


_Context = TypeVar("_Context", bound=RunContext)
_Task = TypeVar("_Task", bound=Task)


def run_shards(
    execute: Callable[[_Context, _Task, Report], ShardResult],
    context: _Context,
    tasks: Iterable[_Task],
    *,
    workers: int,
    report: Report = lambda _records, _bytes: None,
) -> Iterator[ShardResult]:
    """Make all shards, `workers` at a time.

    Tasks are drawn as workers become free. Workers die with this process; closing the iterator ends them.

    Args:
        execute: makes one shard: `shardify.pack.pack_shard`, say.
        context: what all tasks share.
        tasks: the shards.
        workers: processes; 1 works in this one, unless something is remote.
        report: is told how far the shards are, several times a second for each worker.

    Yields:
        the results, in the order in which shards are finished.

    Raises:
        PackError: a shard failed, or its worker was killed.
    """
    if workers == 1 and not context.is_remote:
        for task in tasks:
            with rare_collections():
                result = execute(context, task, report)
            yield result
        return
    pool: dict[Connection, ForkProcess] = {}
    busy: dict[Connection, str] = {}
    waiting = iter(tasks)
    try:
        # forked: nothing to import again, and no semaphore names are left behind when the process group is killed
        method = multiprocessing.get_context("fork")
        for task in waiting:
            here, there = method.Pipe()
            process = method.Process(target=_work, args=(there, execute, context, os.getpid()), daemon=True)
            with signals_held():
                process.start()
                pool[here] = process
            there.close()
            busy[here] = _send(here, task)
            if len(pool) == workers:
                break
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                message = _receive(connection, pool[connection], busy[connection])
                if not isinstance(message, ShardResult):
                    report(*message)
                    continue
                del busy[connection]
                yield message
                for task in islice(waiting, 1):
                    busy[connection] = _send(connection, task)
    finally:
        for process in pool.values():
            process.kill()
        for connection, process in pool.items():
            process.join()
            connection.close()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Look for cyclic garbage seldom: making a shard leaves none, and looking through all it holds costs a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _send(connection: Connection, task: Task) -> str:
    with suppress(BrokenPipeError):  # the worker is dead: receiving from it says so
        connection.send(task)
    return task.name


def _receive(connection: Connection, process: ForkProcess, shard: str) -> ShardResult | tuple[int, int]:
    """A finished shard, or how far a worker is."""
    try:
        message: ShardResult | tuple[int, int] | Exception = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        code = process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        raise PackError(
            f"the worker that made {shard} was ended {how} (out of memory?); the same command again continues"
        ) from None
    if isinstance(message, Exception):
        raise message
    return message


def _work(
    connection: Connection,
    execute: Callable[[Any, Any, Report], ShardResult],
    context: RunContext,
    parent: int,
) -> None:
    die_with(parent)
    gc.freeze()  # what was there before the fork is no garbage, and stays shared
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            with rare_collections():
                result: ShardResult | Exception = execute(
                    context, task, lambda records, size: connection.send((records, size))
                )
        except Exception as error:  # noqa: BLE001 - raised again by the parent
            error.add_note(f"in the worker that made {task.name}:\n{traceback.format_exc()}")
            result = error
        connection.send(result)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
