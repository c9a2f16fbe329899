"""Ranks as processes of their own, without their imports' cost: a process that has imported everything forks them when told to.

A test starts it (`running_nursery`) and asks for ranks by the name of a function of a file. Nothing of the test's own process is in them, such as clients of stores,
which do not survive a fork. Where the machine allows it they see a /dev/shm of their own, of 64 MB, so that nothing of other processes is mistaken for theirs.
"""

import ctypes
import faulthandler
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000  # of unshare(2)
_PRIVATE = 0x4000 | 0x40000  # of mount(2): MS_REC | MS_PRIVATE


class Nursery:
    """A running process that forks ranks.

    Attributes:
        own_shm: whether they see a /dev/shm of their own.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._logs: dict[int, Path] = {}
        self.own_shm: bool = self._ask()["own_shm"]

    def start(self, function: str, log: Path, **arguments: object) -> int:
        """Fork a process that leads a session of its own and calls `function(**arguments)`.

        Args:
            function: of the file.
            log: where its output goes.
            arguments: JSON-able.

        Returns:
            Its process id; it ends with 0 when the function returns, and 1 when that raises.
        """
        pid = int(self._ask(function=function, log=str(log), arguments=arguments)["pid"])
        self._logs[pid] = log
        return pid

    def status(self, pid: int) -> int | None:
        """The exit status of a process, negative for a signal; None while it runs. To be had once."""
        return self._ask(wait=pid)["status"]

    def wait(self, pid: int, seconds: float = 60) -> int:
        """As `status`; fails, with the stacks of its session, when the process does not end in time."""
        deadline = time.monotonic() + seconds
        while (status := self.status(pid)) is None:
            if time.monotonic() > deadline:
                stacks = "\n".join(_stack(member, self._logs[pid]) for member in members(pid))
                raise AssertionError(f"process {pid} hangs:\n{stacks}")
            time.sleep(0.02)
        return int(status)

    def shared_names(self) -> list[str]:
        """What is in the ranks' /dev/shm."""
        return list(self._ask(names=True)["names"])

    def _ask(self, **request: object) -> dict:
        with self._lock:
            if request:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        assert line, "the nursery has ended"
        return json.loads(line)


@contextmanager
def running_nursery(file: Path, **environment: str) -> Iterator[Nursery]:
    """A nursery for the functions of a Python file."""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, __file__, str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"} | environment,
    )
    try:
        yield Nursery(process)
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def members(session: int) -> dict[int, str]:
    """The processes of a session that live, and how they are called."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError, IndexError):
            name, _, own = _stat(f"/proc/{pid}/stat")
            if own == session and lives(pid):
                found[int(pid)] = name
    return found


def _stack(pid: int, log: Path) -> str:
    """Where a hanging process is, by what it writes into its log when it is asked."""
    size = log.stat().st_size
    with suppress(OSError):
        os.kill(pid, signal.SIGUSR2)
    time.sleep(0.5)
    below = " ".join(map(str, children(pid)))
    return f"--- {pid}, parent of {below or 'none'}\n{log.read_text()[size:]}"


def _stat(path: str) -> tuple[str, str, int]:
    """Name, state and session of a process or thread."""
    name, _, rest = Path(path).read_text().rpartition(")")
    state, _, _, session = rest.split()[:4]
    return name.partition("(")[2], state, int(session)


def lives(pid: object) -> bool:
    """Whether any thread of a process does; the first may end before the others."""
    for task in _tasks(pid):
        with suppress(OSError, IndexError):
            if _stat(f"/proc/{pid}/task/{task}/stat")[1] not in "ZX":
                return True
    return False


def _tasks(pid: object) -> list[str]:
    with suppress(OSError):
        return os.listdir(f"/proc/{pid}/task")
    return []


def children(pid: int) -> list[int]:
    """Of a process, by all its threads."""
    found = []
    for task in _tasks(pid):
        with suppress(OSError):
            found += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return found


def is_whole(pid: int, below: int) -> bool:
    """Whether a process lives, and has or soon will have so many children that do."""
    deadline = time.monotonic() + 20
    while lives(pid) and time.monotonic() < deadline:
        if sum(map(lives, children(pid))) == below:
            return True
        time.sleep(0.05)
    return False


def wait_until(
    condition: Callable[[], object], what: str = "processes are left", seconds: float = 10
) -> None:
    """Fail when it has not come to pass after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def _isolate() -> bool:
    """An empty /dev/shm of 64 MB for this process and its children alone, where that is allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER):
        return False
    if user:
        with suppress(OSError):
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return not (
        libc.mount(b"none", b"/", None, _PRIVATE, None)
        or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64m")
    )


def _serve(file: str) -> None:
    own_shm = _isolate()
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    print(json.dumps({"own_shm": own_shm}), flush=True)
    living: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"status": _wait(request["wait"])}
            if answer["status"] is not None:
                living.discard(request["wait"])
        elif "names" in request:
            answer = {"names": os.listdir("/dev/shm") if own_shm else []}
        else:
            living.add(pid := _fork(module, **request))
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in living:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _wait(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _fork(module: object, function: str, log: str, arguments: dict) -> int:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        os.read(reader, 1)  # until it is in its session
        os.close(reader)
        return pid
    status = 1
    try:
        os.setsid()
        os.close(writer)
        os.close(reader)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        empty = os.open(os.devnull, os.O_RDONLY)
        for descriptor, number in ((empty, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, number)
        faulthandler.register(signal.SIGUSR2)
        getattr(module, function)(**arguments)
        status = 0
    except BaseException:  # written into its log
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
