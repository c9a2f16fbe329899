"""Worker processes: how they are set up, how they end, and what they say when they hang or crash."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_PARENT_CHECK = 0.5  # seconds
_ANSWER = 0.5  # seconds that a worker has to write its stack
_MOST_READ = 1 << 20
_FRAMES = 15  # of a thread that are shown


class Stacks:
    """An anonymous file for each worker, into which Python's fault handler writes its stack: at a crash, or when asked.

    Args:
        workers: how many there will be.
    """

    def __init__(self, workers: int) -> None:
        self._files = [os.memfd_create(f"stack-{number}", os.MFD_CLOEXEC) for number in range(workers)]

    def attend(self, worker: int) -> None:
        """In a worker: write there from now on."""
        faulthandler.disable()  # an enabled one, inherited, would leave torch's handlers of signals where they are
        faulthandler.enable(self._files[worker])
        faulthandler.register(signal.SIGUSR1, self._files[worker], all_threads=True)

    def ask(self, processes: Sequence[int]) -> str:
        """The stacks of all workers, given their process ids in order."""
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGUSR1)
        time.sleep(_ANSWER)
        return "\n".join(
            f"worker {number} (pid {process}, {_status(process)}):\n{self.written(number) or '  no answer'}"
            for number, process in enumerate(processes)
        )

    def written(self, worker: int) -> str:
        """What stands in a worker's file: of each thread the innermost calls."""
        text = os.pread(self._files[worker], _MOST_READ, 0).decode(errors="replace")
        kept, frames = [], 0
        for line in text.splitlines():
            frames = frames + 1 if line.startswith("  ") else 0
            if frames <= _FRAMES:
                kept.append(line)
        return "\n".join(kept)

    def all_written(self) -> str:
        """What stands in all files together."""
        return "\n".join(text for worker in range(len(self._files)) if (text := self.written(worker)))

    def close(self) -> None:
        """Let go of the files."""
        while self._files:
            os.close(self._files.pop())

    def __del__(self) -> None:
        self.close()


class Watch:
    """Ends workers that keep the trainer waiting for longer than `timeout` seconds, having noted what they were doing.

    Attributes:
        timeout: seconds.
        found: their stacks, once it has struck.
    """

    def __init__(self, stacks: Stacks, processes: Sequence[int], timeout: float) -> None:
        self.found = ""
        self.timeout = timeout
        self._stacks, self._processes = stacks, processes
        self._since: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader-watch", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """The trainer waits from now on."""
        self._since = time.monotonic()

    def end(self) -> None:
        """It has what it waited for."""
        self._since = None

    def close(self) -> None:
        """Watch no more: from here on nothing is asked or ended, so that files and process ids may go."""
        self._stop.set()
        if self._thread is not threading.current_thread():  # in which garbage may be collected, too
            self._thread.join()

    def _run(self) -> None:
        pause = min(1.0, self.timeout / 4)
        while not self._stop.wait(pause):
            since = self._since
            if since is None or time.monotonic() - since <= self.timeout:
                continue
            found = self._stacks.ask(self._processes)
            # what was waited for may have come meanwhile
            if since == self._since and not self._stop.is_set():
                self.found = found
                end_processes(self._processes)  # and the trainer's own wait with them
                return


def forget_handlers() -> None:
    """In a child: none of the parent's signal handlers, which would save its checkpoint here too.

    What is sent to the whole process group, to end it, is the parent's to obey: its children end with it. So SIGINT and SIGTERM do
    nothing, and a trainer that saves what it has before it ends is not told of dying workers meanwhile.
    """
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def end_processes(processes: Sequence[int]) -> None:
    """End children that go on when they were asked to end."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def start_worker(worker: int, *, parent: int, stacks: Stacks | None = None) -> None:
    """Set a worker process up: one that ends with its parent, whatever ended that, and leaves signals to end the group to it."""
    forget_handlers()
    if stacks is not None:
        stacks.attend(worker)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizers' own threads do not survive a fork
    # not PR_SET_PDEATHSIG, which would also strike when only the thread that started the workers ends
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK)
    os._exit(1)


def _status(process: int) -> str:
    """What the kernel says of a process: running, sleeping, stopped, ..."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return "gone"
    return next((line.split("(")[-1].rstrip(")") for line in lines if line.startswith("State:")), "unknown")
