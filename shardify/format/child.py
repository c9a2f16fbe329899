"""Work that must not happen in a process that forks later: done in a short-lived forked child.

Threads do not survive a fork, and a library that has started some (obstore's client) waits for ever in the child. So the process that first
imports this module, which may fork workers later, leaves such work to a child of its own; processes forked from it do it themselves.
"""

import ctypes
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, NoReturn, TypeVar

from shardify.errors import PackError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TO_GROUPS = (signal.SIGINT, signal.SIGTERM)  # what terminals and batch systems send to whole process groups

_T = TypeVar("_T")

_home = os.getpid()  # the process that may fork later


def stay() -> None:
    """Say that this process will fork no more: it does such work itself from now on, as a forked worker does."""
    global _home  # noqa: PLW0603 - what this process has promised
    _home = 0


def will_fork() -> None:
    """Say that this process is going to fork, though it was forked itself after this module was imported, as launchers in notebooks do."""
    global _home  # noqa: PLW0603 - what this process is going to do
    _home = os.getpid()


def may_fork() -> bool:
    """Whether this process must leave such work to a child."""
    return os.getpid() == _home


@contextmanager
def signals_held() -> Iterator[None]:
    """Put off SIGINT and SIGTERM while a child is forked and written down; what arrived takes effect at the end.

    The child keeps both blocked: they are the parent's to obey, which ends it. And no handler that raises can make the parent forget a
    child that it has just forked, which nobody would end then. Blocking them here is not enough for that: any other thread may
    take the signal, and Python runs its handler in the main thread all the same.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_GROUPS)
    held = True
    arrived: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def put_off(number: int, frame: FrameType | None) -> None:
        if held:
            arrived.append((number, frame))
        else:  # while they are given back
            handlers[number](number, frame)

    try:
        if threading.current_thread() is threading.main_thread():  # handlers run there alone
            for sent in _TO_GROUPS:
                handler = signal.getsignal(sent)
                if callable(handler):
                    handlers[sent] = handler
                    signal.signal(sent, put_off)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        held = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in arrived:
            handlers[number](number, frame)


def in_child(function: Callable[..., _T], *arguments: Any) -> _T:
    """Run a function in a forked child, and have its result, which is pickled, or its exception.

    In a process that forks no more it is just called.

    Args:
        function: what to run; it sees this process's memory as it is now.
        arguments: its arguments, of any kind.

    Raises:
        PackError: the child was killed.
    """
    if not may_fork():
        return function(*arguments)
    here, there = Pipe(duplex=False)
    parent = os.getpid()
    child = 0
    try:
        with signals_held():
            child = os.fork()
            if not child:
                _answer(there, parent, function, arguments)
        there.close()
        try:
            result, error = here.recv()
        except EOFError:
            status = _wait(child)
            child = 0
            raise PackError(
                f"a helper process was ended {_how(status)} (out of memory?); the same command again continues"
            ) from None
    finally:
        here.close()
        there.close()
        if child:
            with suppress(ProcessLookupError):  # ended, and not kept for this process
                os.kill(child, signal.SIGKILL)
            _wait(child)
    if error is not None:
        raise error
    value: _T = result
    return value


def _answer(
    connection: Connection, parent: int, function: Callable[..., Any], arguments: Sequence[Any]
) -> NoReturn:
    """In the child: run, answer, and end without what Python does at an exit."""
    try:
        # the kernel kills this process when its parent ends, however it ends
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            try:
                message: tuple[Any, Exception | None] = (function(*arguments), None)
            except Exception as error:  # noqa: BLE001 - raised again by the parent
                message = (None, _sendable(error))
            connection.send(message)
    except BaseException:  # noqa: BLE001 - nothing may pass: it would go on as the parent
        traceback.print_exc()
    finally:
        os._exit(1)


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - its own
    except Exception:  # noqa: BLE001 - whatever it is that cannot be pickled
        return PackError(f"{type(error).__name__}: {error}")
    return error


def _wait(child: int) -> int | None:
    """Its status, once it has ended; None where the kernel keeps none: who started this process had SIGCHLD ignored."""
    try:
        return os.waitpid(child, 0)[1]
    except ChildProcessError:
        return None


def _how(status: int | None) -> str:
    if status is None:
        return "by something"
    code = os.waitstatus_to_exitcode(status)
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
