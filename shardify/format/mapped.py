"""A shard mapped into memory: half the cost of reading it, which is copying, and the rest is another thread's.

A file that is cut while it is mapped, or a disk that fails, ends the process by SIGBUS: this is for processes that somebody watches.
"""

import ctypes
import errno
import mmap
import os
from io import FileIO
from threading import Thread

import numpy as np
import xxhash

PART_BYTES = 256 * 1024 * 1024
"""Mapped at a time, so that page tables stay small."""

PIECE_BYTES = 32 * 1024 * 1024
"""Given out at a time, while a thread maps the pages behind it."""

_STRIDE = 512 * 1024
"""Hashed at a time, and then used: what stays in a core's own cache."""

_MADV_POPULATE_READ = 22  # linux/mman.h, since Linux 5.14; others map each page when it is used
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedWindow:
    """See `shardify.format.walk.Window`.

    Args:
        file: at any place in it.

    Attributes:
        digest: xxh3_128 of what was passed over so far.

    Raises:
        OSError: it cannot be mapped, as in some file systems.
    """

    partial = False

    def __init__(self, file: FileIO) -> None:
        self.base = self.hashed = 0
        self.total = os.fstat(file.fileno()).st_size
        self.marked = False
        self.digest = xxhash.xxh3_128()
        self._file = file
        self.view = self._part = memoryview(b"")
        self._begin = 0  # of the part
        self._thread: Thread | None = None
        if self.total:
            self._map(PART_BYTES)

    def advance(self, used: int, need: int) -> memoryview:
        """See `Window`."""
        self.hash_to(self.base + used)
        self.base += used
        need = min(max(need, mmap.PAGESIZE), self.total - self.base)
        if self.base + need > self._begin + len(self._part):
            self._map(max(PART_BYTES, need))
        at = self.base - self._begin
        self.view = self._part[at : at + max(PIECE_BYTES, need)]
        return self.view

    def hash_to(self, end: int) -> None:
        """See `Window`."""
        while self.hashed < end:
            at = self.hashed - self._begin
            some = self._part[at : at + _STRIDE]
            self.digest.update(some)
            self.hashed += len(some)

    def close(self) -> None:
        """Give up the part; what was given out of it can still be read."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            Thread(target=_forget, args=(self._part,), daemon=True).start()
        self.view = self._part = memoryview(b"")

    def _map(self, size: int) -> None:
        """Have the `size` bytes from `base` on in memory, or all there are."""
        self.hash_to(self.base)
        self.close()
        self._begin = self.base - self.base % mmap.ALLOCATIONGRANULARITY
        size = min(size + self.base - self._begin, self.total - self._begin)
        try:
            pages = mmap.mmap(self._file.fileno(), size, mmap.MAP_SHARED, mmap.PROT_READ, offset=self._begin)
        except ValueError as error:  # Python looks at the file's size
            raise OSError(errno.EIO, "became shorter while it was read") from error
        self._part = memoryview(pages)
        self._thread = Thread(target=_advise, args=(self._part, _MADV_POPULATE_READ), daemon=True)
        self._thread.start()


def _advise(part: memoryview, advice: int) -> None:
    """madvise(2), without Python's lock; what it cannot do is not needed."""
    _libc.madvise(np.frombuffer(part, np.uint8).ctypes.data, len(part), advice)


def _forget(part: memoryview) -> None:
    """Take the pages out of the page tables, which costs as much again as half of mapping them; the mapping goes with its last reference."""
    _advise(part, mmap.MADV_DONTNEED)
