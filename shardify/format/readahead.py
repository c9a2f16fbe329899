"""A file read front to back, one buffer ahead of who works on it when there is a core to spare."""

import threading
from io import FileIO
from typing import Protocol


class Reader(Protocol):
    """Fills one buffer at a time: `ask` for it, do something else, `take` it."""

    def ask(self, buffer: memoryview) -> None:
        """Have the next bytes read into a buffer, which belongs to the reader until `take`."""
        ...

    def take(self) -> int:
        """Wait for the bytes asked for.

        Returns:
            How many they are; 0 at the end of the file, and for good.

        Raises:
            OSError: they cannot be read.
        """
        ...

    def close(self) -> None:
        """The file may be closed then."""
        ...


class ReadNow:
    """See `Reader`: reads when the bytes are taken."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._buffer = memoryview(b"")

    def ask(self, buffer: memoryview) -> None:
        """See `Reader`."""
        self._buffer = buffer

    def take(self) -> int:
        """See `Reader`."""
        return self._file.readinto(self._buffer)

    def close(self) -> None:
        """See `Reader`."""


class ReadAhead:
    """See `Reader`: a thread reads, from where the file stands.

    On a busy machine it waits for its turn again and again, and is in the way.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._buffer: memoryview | None = None
        self._count = 0
        self._error: OSError | None = None
        self._taken = True
        # binary semaphores, each released by the other side
        self._asked, self._done = threading.Lock(), threading.Lock()
        self._asked.acquire()
        self._done.acquire()
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
        self._thread.start()

    def ask(self, buffer: memoryview) -> None:
        """See `Reader`."""
        self._wait()
        self._taken = False
        self._buffer = buffer
        self._asked.release()

    def take(self) -> int:
        """See `Reader`."""
        self._wait()
        if self._error is not None:
            raise self._error
        return self._count

    def close(self) -> None:
        """See `Reader`; ends the thread."""
        self._wait()
        self._buffer = None
        self._asked.release()
        self._thread.join()

    def _wait(self) -> None:
        if not self._taken:
            self._done.acquire()
            self._taken = True

    def _run(self) -> None:
        while True:
            self._asked.acquire()
            if self._buffer is None:
                return
            try:
                self._count = self._file.readinto(self._buffer)
            except OSError as error:
                self._error = error
            self._done.release()
