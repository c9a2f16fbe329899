"""A large file written past the page cache, while its next part is made.

Nobody reads a fresh shard again at once, and copying it into the page cache is the largest single cost of writing it: about a quarter of all
cycles of packing, and the wait for the flush comes on top. Here a thread hands aligned buffers straight to the disk (O_DIRECT, open(2)), so that
little is left to flush at the end. File systems that cannot (tmpfs, some network and FUSE file systems) get ordinary writes.

What is to be written can be put into the buffer by others (`DirectFile.room`): an image is read from its file to the place from which it goes to
the disk. It is hashed there in pieces that are still in the processor's cache.
"""

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import TypeAlias

import xxhash

_BUFFER_BYTES = 4 * 1024 * 1024
_BUFFERS = 3
_HASHED_BYTES = 256 * 1024  # at a time
_ALIGNED = 4096  # bytes: the logical block of every common disk divides it

_ZEROS = bytes(512)

_Part: TypeAlias = tuple[memoryview, int]


class DirectFile:
    """A new file, written from its begin to its end.

    Args:
        path: must not exist yet.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags | os.O_DIRECT, 0o644)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with suppress(FileNotFoundError):  # some make the file before they refuse
                os.unlink(path)
            self._file = os.open(path, flags, 0o644)
        self._path = path
        self._capacity = _BUFFER_BYTES
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))  # page-aligned
        self._filled = 0
        self._hashed = 0  # of what is filled
        self._size = 0  # handed over
        self._made = 1
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._full: SimpleQueue[_Part | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._error: OSError | None = None
        self._digest = xxhash.xxh3_128()

    def write(self, data: bytes | memoryview, /) -> int:
        """Append all of it.

        Raises:
            OSError: this or an earlier part could not be written.
        """
        size = len(data)
        filled = self._filled + size
        if filled < self._capacity:
            self._buffer[self._filled : filled] = data
            self._filled = filled
            if filled - self._hashed >= _HASHED_BYTES:
                self._hash()
            return size
        view = memoryview(data).cast("B")
        size = len(view)
        while view:
            part = view[: self._capacity - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == self._capacity:
                self._hand_over()
                self._raise()
        return size

    def room(self, size: int, *, before: int, is_free: bool) -> memoryview | None:
        """The place in memory of bytes that will be written soon; `write` what comes before them, then `advance`.

        Args:
            size: of the place.
            before: bytes that will be written before them.
            is_free: no place that was given out is still to be used: all become void.

        Returns:
            The place; None when so much is not to be had in one piece now, without waiting for the disk.
        """
        end = self._filled + before + size
        if end > self._capacity:
            fits = self._filled % _ALIGNED + before + size <= self._capacity and self._filled >= _ALIGNED
            if not is_free or not fits or not self._another_buffer():
                return None
            self._hand_over()
            end = self._filled + before + size
        return self._buffer[end - size : end]

    def advance(self, size: int, *, zeros: int) -> None:
        """The next `size` bytes are in their place already, and so many zeros follow them, at most 511, for which `room` was asked too.

        Raises:
            OSError: an earlier part could not be written.
        """
        end = self._filled + size
        self._filled = end + zeros
        self._buffer[end : self._filled] = _ZEROS[:zeros]
        if self._filled - self._hashed >= _HASHED_BYTES:
            self._hash()
            self._raise()

    def hexdigest(self) -> str:
        """xxh3_128 of everything so far, hexadecimal."""
        self._hash()
        return self._digest.hexdigest()

    def sync(self) -> None:
        """Write what is left and flush everything to disk.

        Raises:
            OSError: some part could not be written.
        """
        size = self._size + self._filled
        if self._filled:
            # whole blocks, cut to size afterwards
            self._full.put((self._buffer, -(-self._filled // _ALIGNED) * _ALIGNED))
        if self._thread is None:
            self._full.put(None)
            self._write_out()
        self._end_thread()
        self._raise()
        os.ftruncate(self._file, size)
        os.fsync(self._file)

    def close(self) -> None:
        """Release everything; without `sync` before, what was written is of no use."""
        self._end_thread()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _hash(self) -> None:
        self._digest.update(self._buffer[self._hashed : self._filled])
        self._hashed = self._filled

    def _hand_over(self) -> None:
        """What is filled of the buffer to the thread, as far as it is whole blocks, and another one to fill."""
        if self._thread is None:
            self._thread = Thread(target=self._write_out, name="write", daemon=True)
            self._thread.start()
        self._hash()
        full, filled = self._buffer, self._filled
        whole = filled - filled % _ALIGNED
        self._full.put((full, whole))
        self._another_buffer()
        self._buffer = self._free.get()
        self._filled = self._hashed = filled - whole
        self._buffer[: self._filled] = full[whole:filled]
        self._size += whole

    def _another_buffer(self) -> bool:
        """Whether one is free, made anew where there may be more."""
        if self._free.empty() and self._made < _BUFFERS:
            with suppress(OSError):  # without memory for it, the others must do
                self._free.put(memoryview(mmap.mmap(-1, self._capacity)))
                self._made += 1
        return not self._free.empty()

    def _write_out(self) -> None:
        """Write parts until there are no more; after an error they are only taken."""
        while (part := self._full.get()) is not None:
            buffer, size = part
            if self._error is None:
                try:
                    self._write(buffer[:size])
                except OSError as error:
                    self._error = error
            self._free.put(buffer)

    def _write(self, view: memoryview) -> None:
        while view:
            try:
                written = os.write(self._file, view)
            except OSError as error:
                flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
                if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                    raise OSError(error.errno, error.strerror, self._path) from None
                # opened, but not written so: an ordinary file from here on
                fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                continue
            view = view[written:]

    def _end_thread(self) -> None:
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
