"""What workers and trainer wait for each other with, without names: `multiprocessing`'s own locks are semaphores that have one while they are made.

Who is killed within that moment leaves it behind in /dev/shm. An event descriptor (eventfd) is inherited by fork and goes with the last process that has it.
"""

import os
import select
import time
from multiprocessing.context import ForkContext
from typing import Any

_FLAGS = os.EFD_CLOEXEC | os.EFD_NONBLOCK
_MOST_DESCRIBED = 4096  # bytes


class UnnamedContext(ForkContext):
    """Forks, and makes queues and events out of what is below; for `torch.utils.data.DataLoader`."""

    def Lock(self) -> Any:  # noqa: N802 - multiprocessing's names
        """A lock."""
        return Semaphore(1)

    def BoundedSemaphore(self, value: int = 1) -> Any:  # noqa: N802
        """A semaphore, whose bound is not checked."""
        return Semaphore(value)

    def Event(self) -> Any:  # noqa: N802
        """A flag, without `clear` and `wait`."""
        return Flag()


class _Descriptor:
    def __init__(self, value: int, flags: int) -> None:
        self._file = os.eventfd(value, _FLAGS | flags)

    def __del__(self) -> None:
        os.close(self._file)


class Semaphore(_Descriptor):
    """A counting semaphore, as `multiprocessing.Queue` needs it.

    Args:
        value: to begin with, below 2**32.
    """

    def __init__(self, value: int) -> None:
        super().__init__(value, os.EFD_SEMAPHORE)
        self._described: int | None = None  # the kernel's account of it,
        self._asker = 0  # opened by this process

    def __del__(self) -> None:
        self._close_account()
        super().__del__()

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take one; False when there is none, or none within `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + max(timeout, 0.0)
        poll = None
        while True:
            try:
                os.eventfd_read(self._file)
            except BlockingIOError:
                if not block:
                    return False
            else:
                return True
            if poll is None:
                poll = select.poll()
                poll.register(self._file, select.POLLIN)
            left = None if deadline is None else 1000 * (deadline - time.monotonic())
            if left is not None and left <= 0:
                return False
            poll.poll(left)

    def release(self) -> None:
        """Give one back."""
        os.eventfd_write(self._file, 1)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def _semlock(self) -> "Semaphore":
        return self  # where a queue looks for its length

    def _get_value(self) -> int:
        # a forked copy tells of the descriptor that the parent has under the number
        if self._described is None or self._asker != os.getpid():
            self._close_account()
            # kept open: opening it takes longer than all else here
            self._described = os.open(f"/proc/self/fdinfo/{self._file}", os.O_RDONLY | os.O_CLOEXEC)
            self._asker = os.getpid()
        count = os.pread(self._described, _MOST_DESCRIBED, 0).partition(b"eventfd-count:")[2]
        return int(count.split(maxsplit=1)[0], 16)

    def _close_account(self) -> None:
        if self._described is not None:
            os.close(self._described)
            self._described = None


class Flag(_Descriptor):
    """An event that is set once."""

    def __init__(self) -> None:
        super().__init__(0, 0)

    def set(self) -> None:
        """Raise it."""
        os.eventfd_write(self._file, 1)

    def is_set(self) -> bool:
        """Whether it is raised."""
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        return bool(poll.poll(0))
