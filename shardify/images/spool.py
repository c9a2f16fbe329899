"""Image bytes in one plain file, known by offset and size: images that came with their records, or were scattered from slow archives."""

import os
from dataclasses import dataclass, field
from threading import Lock

from shardify.errors import PackError
from shardify.images.stores import Location

SPOOLED = -5
"""The method of a location in a spool."""


@dataclass(frozen=True, slots=True)
class SpoolReader:
    """Reads a spool; an `ImageReader`."""

    path: str
    _files: dict[int, int] = field(default_factory=dict, compare=False, repr=False)
    _lock: Lock = field(default_factory=Lock, compare=False, repr=False)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.path,)

    def read(self, name: str, location: Location) -> bytes:
        """See `ImageReader`."""
        del name
        try:
            data = os.pread(self._file(), location.size, location.offset)
            while len(data) < location.size and (
                more := os.pread(self._file(), location.size - len(data), location.offset + len(data))
            ):
                data += more
        except OSError as error:
            raise PackError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        if len(data) < location.size:
            raise PackError(f"{self.path}: has become shorter while it was packed")
        return data

    def _file(self) -> int:
        # one descriptor for each process: forked workers share the dict's content but not its later changes
        process = os.getpid()
        if process not in self._files:
            with self._lock:
                if process not in self._files:
                    self._files[process] = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[process]
