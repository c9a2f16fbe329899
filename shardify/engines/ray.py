"""Shards made by the nodes of a Ray cluster.

    this process                     a child of it                the cluster
    tasks, results, progress --pipe--> leads the run, speaks Ray --> one Ray task a shard

Ray's runtime lives in the child alone: it brings threads, which forbid a fork, and signal handlers of its own, and neither must reach the
process that holds the plan and speaks with object stores. The child asks for tasks as there is room for them, so few are in memory.
"""

import functools
import importlib.metadata
import importlib.util
import logging
import math
import multiprocessing
import os
import queue
import secrets
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeAlias, TypeVar

from shardify import __version__
from shardify.engines.local import Task, die_with
from shardify.errors import PackError, SourceError, UsageError
from shardify.format.child import signals_held, stay
from shardify.pack import Report, RunContext, ShardResult

_REPORT_EVERY = 1.0  # seconds between a task's reports
_POLL_EVERY = 0.5  # seconds between looks at the board of reports
_PATIENCE = 10.0  # seconds for a cluster to answer, and for the end of what was cancelled
_CRASHES = 3  # of one shard's workers before its own content is the likely reason
_WRITERS = ("pillow", "pyarrow", "zstandard")  # other versions of them may write other bytes
_CONTINUES = "the same command again continues"

_Context = TypeVar("_Context", bound=RunContext)
_Task = TypeVar("_Task", bound=Task)


class _More(NamedTuple):
    """The child has room for another task."""


class _Told(NamedTuple):
    """Progress."""

    records: int
    bytes: int


class _Lost(NamedTuple):
    """A shard is made again."""

    shard: str
    why: str


_Message: TypeAlias = _More | _Told | _Lost | ShardResult | Exception | None
"""What the child says; None is its last word."""


def run_shards(
    execute: Callable[[_Context, _Task, Report], ShardResult],
    context: _Context,
    tasks: Iterable[_Task],
    *,
    workers: int | None = None,
    report: Report = lambda _records, _bytes: None,
    address: str | None = None,
) -> Iterator[ShardResult]:
    """Make all shards on a Ray cluster.

    Tasks are drawn as there is room for them. A shard whose worker or node is lost is made again, from its beginning; what a task raises ends
    the run. Closing the iterator cancels what runs.

    Args:
        execute: makes one shard; a function of a module that every node can import.
        context: what all tasks share.
        tasks: the shards.
        workers: shards at a time; None for as many as the cluster has CPUs.
        report: is told how far the shards are, about once a second; of a shard that is made again only what is new.
        address: of a cluster's head, ``host:port``; None for the one that $RAY_ADDRESS names, or else one started on this machine.

    Yields:
        the results, in the order in which shards are finished.

    Raises:
        UsageError: Ray is not installed, or this process is connected to a cluster itself.
        PackError: the cluster cannot be reached or was lost, a shard failed, or its workers were killed again and again.
    """
    _require_ray()
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address in ("auto", "local"):
        address = None if address == "local" else address
    elif address is not None:
        _require_reachable(address)
    waiting = iter(tasks)
    method = multiprocessing.get_context("fork")
    here, there = method.Pipe()
    process = method.Process(
        target=_lead, args=(_Orders(execute, context, workers, address), there, here, os.getpid())
    )
    try:
        with signals_held():
            process.start()
        there.close()
        while (message := _receive(here)) is not None:
            match message:
                case _More():
                    task = next(islice(waiting, 1), None)
                    with suppress(BrokenPipeError):  # the child is dead: receiving from it says so
                        here.send(task)
                case _Told():
                    report(*message)
                case _Lost():
                    print(f"{message.shard}: {message.why}; it is made again", file=sys.stderr)
                case ShardResult():
                    yield message
                case _:
                    raise message
    finally:
        here.close()  # the child's sign to cancel everything
        there.close()
        if process.pid is not None:
            process.join(_PATIENCE)
            process.kill()
            process.join()


def _require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray: Ray is not installed; pip install 'shardify[ray]'")
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        raise UsageError(
            "this process is connected to a Ray cluster already; run shardify in a process of its own, with --ray-address"
        )


def _require_reachable(address: str) -> None:
    """Ray itself tries for two minutes, and says little."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not host or not colon or not port.isascii() or not port.isdigit():
        raise UsageError(
            f"--ray-address {address}: host:port of the cluster's head is needed, such as 10.0.0.1:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise PackError(
            f"--ray-address {address}: no Ray cluster answers there ({error}); 'ray status' on its head names the address"
        ) from None


def _receive(connection: Connection) -> _Message:
    try:
        message: _Message = connection.recv()
    except (EOFError, ConnectionResetError):
        raise PackError(
            f"the connection with the Ray cluster was lost: its head, or Ray on this node, has ended; {_CONTINUES}"
        ) from None
    return message


# what follows runs in the child -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Orders:
    """What the child is to do."""

    execute: Callable[[Any, Any, Report], ShardResult]
    context: RunContext
    workers: int | None
    address: str | None


def _lead(orders: _Orders, connection: Connection, parents_end: Connection, parent: int) -> None:
    die_with(parent)
    parents_end.close()  # or the end of the parent's interest would never be seen
    try:
        ray = _connect(orders.address, orders.workers)
        try:
            _Run(ray, connection, orders).work()
        except ray.exceptions.RayError as error:
            raise PackError(f"the Ray cluster failed: {str(error).strip()}; {_CONTINUES}") from error
        finally:
            with suppress(BrokenPipeError):
                ray.shutdown()
    except (_Unwanted, BrokenPipeError):
        return
    except Exception as error:  # noqa: BLE001 - raised again by the parent
        error.add_note(f"in the process that leads the Ray run:\n{traceback.format_exc()}")
        message: Exception | None = error
    else:
        message = None
    with suppress(BrokenPipeError):
        connection.send(message)


class _Unwanted(Exception):  # noqa: N818 - never leaves this module
    """The parent has closed its end."""


def _connect(address: str | None, workers: int | None) -> Any:
    """The module ray, connected."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"address": address}
    if address is None:
        if "RAY_AUTH_MODE" not in os.environ:
            # or Ray would leave a token in the user's home
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        cores = workers or len(os.sched_getaffinity(0))
        options = {"address": "local", "num_cpus": cores, "include_dashboard": False}
    import ray

    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot be started here"
        raise PackError(f"{where}: {str(error).strip()}") from error
    return ray


@dataclass(slots=True)
class _Shard:
    """A shard under way."""

    task: Task
    reference: Any = None
    crashes: int = 0
    told: tuple[int, int] = (0, 0)


class _Finished(NamedTuple):
    """What a Ray task answers: the result, or what `execute` raised; records and bytes reported."""

    result: ShardResult | Exception
    reported: tuple[int, int]


@dataclass(slots=True)
class _Run:
    """One run of the cluster. Everything happens in `work`; Ray's own threads only put references into `done`."""

    ray: Any
    connection: Connection
    orders: _Orders
    done: "queue.SimpleQueue[str]" = field(default_factory=queue.SimpleQueue)
    shards: dict[str, _Shard] = field(default_factory=dict)

    def work(self) -> None:
        """Until all shards are made.

        Raises:
            PackError: a shard failed.
            _Unwanted: nobody waits for the rest.
        """
        ray = self.ray
        orders = self.orders
        shared = ray.put(_Shared(orders.execute, orders.context))
        make = ray.remote(num_cpus=1, max_retries=0)(_make)
        # on this node: no other can take it away
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        board = ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()
        reports = None
        looked = time.monotonic()
        try:
            more = True
            while more or self.shards:
                while more and len(self.shards) < self._room():
                    self.connection.send(_More())
                    task = self._next()
                    more = task is not None
                    if task is not None:
                        self.shards[task.name] = _Shard(task)
                        self._start(make, shared, board, task.name)
                with suppress(queue.Empty):
                    name = self.done.get(timeout=_POLL_EVERY)
                    if self._end(name):
                        self._start(make, shared, board, name)
                if self.connection.poll():
                    raise _Unwanted
                if time.monotonic() - looked >= _POLL_EVERY:
                    looked = time.monotonic()
                    reports = self._look(board, reports)
        finally:
            self._cancel()

    def _room(self) -> int:
        """Shards at a time: with a few in reserve, so that no CPU waits for its next. A cluster may grow and shrink."""
        if self.orders.workers is not None:
            return self.orders.workers
        cpus = int(self.ray.cluster_resources().get("CPU", 0))
        return max(cpus, 1) + math.ceil(cpus / 4)

    def _next(self) -> Task | None:
        try:
            task: Task | None = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise _Unwanted from None
        return task

    def _start(self, make: Any, shared: Any, board: Any, name: str) -> None:
        shard = self.shards[name]
        shard.reference = make.remote(shared, shard.task, board)
        shard.reference.future().add_done_callback(lambda _: self.done.put(name))

    def _end(self, name: str) -> bool:
        """Take a shard's answer; whether it is to be made again."""
        exceptions = self.ray.exceptions
        shard = self.shards[name]
        try:
            finished: _Finished = self.ray.get(shard.reference)
        except (
            exceptions.WorkerCrashedError,
            exceptions.OutOfMemoryError,
            exceptions.NodeDiedError,
            exceptions.ObjectLostError,
        ) as error:
            why = "its node was lost"
            if isinstance(error, exceptions.WorkerCrashedError | exceptions.OutOfMemoryError):
                shard.crashes += 1
                why = "its worker was killed"
                if shard.crashes == _CRASHES:
                    raise PackError(
                        f"the workers that made {name} were killed {_CRASHES} times (out of memory?); {_CONTINUES}"
                    ) from error
            self.connection.send(_Lost(name, why))
            return True
        except exceptions.RayError as error:
            raise PackError(f"shard {name}: {str(error).strip()}") from error
        if isinstance(finished.result, Exception):
            raise finished.result
        del self.shards[name]
        self._tell(shard, finished.reported)
        self.connection.send(finished.result)
        return False

    def _look(self, board: Any, reports: Any) -> Any:
        """Tell what has come to the board; progress is not worth a failure."""
        with suppress(self.ray.exceptions.RayError):
            if reports is not None:
                if not self.ray.wait([reports], timeout=0)[0]:
                    return reports
                for name, reported in self.ray.get(reports).items():
                    if name in self.shards:
                        self._tell(self.shards[name], reported)
            return board.take.remote()
        return None

    def _tell(self, shard: _Shard, reported: tuple[int, int]) -> None:
        """A shard's sums as they stand now; one that is made again tells nothing until it is as far as before."""
        most = (max(shard.told[0], reported[0]), max(shard.told[1], reported[1]))
        if most != shard.told:
            self.connection.send(_Told(most[0] - shard.told[0], most[1] - shard.told[1]))
            shard.told = most

    def _cancel(self) -> None:
        running = [shard.reference for shard in self.shards.values()]
        for reference in running:
            with suppress(self.ray.exceptions.RayError, ValueError):
                self.ray.cancel(reference, force=True)
        if running:
            self.ray.wait(running, num_returns=len(running), timeout=_PATIENCE / 2)


@functools.cache
def _versions() -> dict[str, str]:
    """Of what the bytes of shards and sidecars depend on."""
    return {"shardify": __version__} | {name: importlib.metadata.version(name) for name in _WRITERS}


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all tasks of a run share, in the cluster's object store; `folder`, `versions` and `host` are the leader's."""

    execute: Callable[[Any, Any, Report], ShardResult]
    context: RunContext
    folder: str = field(default_factory=os.getcwd)
    versions: dict[str, str] = field(default_factory=_versions)
    host: str = field(default_factory=socket.gethostname)


class _Board:
    """An actor on which tasks note how far they are."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, int]] = {}

    def note(self, name: str, records: int, size: int) -> None:
        self._sums[name] = (records, size)

    def take(self) -> dict[str, tuple[int, int]]:
        sums, self._sums = self._sums, {}
        return sums


# what follows runs in the cluster's workers -----------------------------------------------------------------------------


def _make(shared: _Shared, task: Task, board: Any) -> _Finished:
    stay()  # nothing is forked here, so that object stores can be called from this very process
    records = size = 0
    told = time.monotonic()

    def report(more_records: int, more_bytes: int) -> None:
        nonlocal records, size, told
        records, size = records + more_records, size + more_bytes
        if time.monotonic() - told >= _REPORT_EVERY:
            told = time.monotonic()
            board.note.remote(task.name, records, size)

    with suppress(OSError):
        os.chdir(shared.folder)  # relative paths are meant from where the run was started
    try:
        _require_versions(shared.versions)
        result: ShardResult | Exception = shared.execute(shared.context, task, report)
    except Exception as error:  # noqa: BLE001 - raised again by the parent
        error.add_note(f"in the worker that made {task.name}:\n{traceback.format_exc()}")
        node = socket.gethostname()
        if node != shared.host and isinstance(error, PackError | SourceError):
            error.args = (f"{error} (on {node}; all nodes must see the same files)",)
        result = error
    return _Finished(result, (records, size))


def _require_versions(expected: Mapping[str, str]) -> None:
    here = _versions()
    differing = [
        f"{name} {here[name]} instead of {version}"
        for name, version in expected.items()
        if here[name] != version
    ]
    if differing:
        raise PackError(
            f"other versions are installed here than where the run was started: {', '.join(differing)}; all nodes need the same"
        )
