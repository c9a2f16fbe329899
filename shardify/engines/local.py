"""Shards packed by processes of this machine."""

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

from shardify.errors import PackError
from shardify.pack import PackContext, ShardResult, ShardTask, pack_shard

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_shards(context: PackContext, tasks: Iterable[ShardTask], *, workers: int) -> Iterator[ShardResult]:
    """Pack all shards, `workers` at a time.

    Tasks are drawn as workers become free. Workers die with this process; closing the iterator ends them.

    Yields:
        the results, in the order in which shards are finished.

    Raises:
        PackError: a shard failed, or its worker was killed.
    """
    if workers == 1:
        for task in tasks:
            yield pack_shard(context, task)
        return
    pool: dict[Connection, ForkProcess] = {}
    busy: dict[Connection, str] = {}
    waiting = iter(tasks)
    try:
        # forked: nothing to import again, and no semaphore names are left behind when the process group is killed
        method = multiprocessing.get_context("fork")
        for task in waiting:
            here, there = method.Pipe()
            process = method.Process(target=_work, args=(there, context, os.getpid()), daemon=True)
            process.start()
            there.close()
            pool[here] = process
            busy[here] = _send(here, task)
            if len(pool) == workers:
                break
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                yield _receive(connection, pool[connection], busy.pop(connection))
                for task in islice(waiting, 1):
                    busy[connection] = _send(connection, task)
    finally:
        for process in pool.values():
            process.terminate()
        for connection, process in pool.items():
            process.join()
            connection.close()


def _send(connection: Connection, task: ShardTask) -> str:
    with suppress(BrokenPipeError):  # the worker is dead: receiving from it says so
        connection.send(task)
    return task.name


def _receive(connection: Connection, process: ForkProcess, shard: str) -> ShardResult:
    try:
        result = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        code = process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        raise PackError(
            f"the worker that packed {shard} was ended {how} (out of memory?); the same command again continues"
        ) from None
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, ShardResult)
    return result


def _work(connection: Connection, context: PackContext, parent: int) -> None:
    _die_with(parent)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # an interrupt is the parent's to handle: it ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result: ShardResult | Exception = pack_shard(context, task)
        except Exception as error:  # noqa: BLE001 - raised again by the parent
            error.add_note(f"in the worker that packed {task.name}:\n{traceback.format_exc()}")
            result = error
        connection.send(result)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
