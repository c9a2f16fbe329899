"""The folder of a block cache: where it lies, how much it may hold, and when a temporary one goes.

Whoever uses a folder holds a shared lock on its file `alive`, which the kernel drops when the process ends, however it ends. Who can lock that
file alone knows that nobody is left.
"""

import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import xxhash

from shardify.errors import UsageError

_ALIVE = "alive"
_GONE = ".gone-"
_TEMPORARY_BYTES = 64 * 1000**3


@dataclass(frozen=True, slots=True)
class CacheFolder:
    """Where blocks are kept.

    Attributes:
        path: of the folder.
        size: bytes that it may hold; None for half of what is free when it is first used.
        temporary: removed when nobody uses it any more.
    """

    path: str
    size: int | None
    temporary: bool

    def bound(self, data_bytes: int, used: int) -> int:
        """Bytes that it may hold, for data of so many bytes, `used` of them being there already."""
        if self.size is not None:
            return self.size
        disk = os.statvfs(self.path)
        free = (disk.f_bavail * disk.f_frsize + used) // 2
        # what stands beside the data: checksums, footers, the book
        wanted = data_bytes + data_bytes // 16 + 64 * 1024 * 1024
        return min(free, wanted, _TEMPORARY_BYTES) if self.temporary else min(free, wanted)


def choose_folder(path: str | None, size: int | None, identities: Sequence[str]) -> CacheFolder:
    """The cache's folder, made if it is not there; deserted temporary ones are removed.

    Args:
        path: of a folder to keep; None for a temporary one, which processes of this user that read the same shards share.
        size: bytes that it may hold; None for the default.
        identities: of the shards.

    Raises:
        UsageError: it cannot be made or written.
    """
    if path is not None:
        folder = os.path.abspath(os.path.expanduser(path))
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cache_dir={path!r} cannot be made: {error.strerror}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"cache_dir={path!r} cannot be written to")
        return CacheFolder(folder, size, temporary=False)
    prefix = os.path.join(tempfile.gettempdir(), f"shardify-cache-{os.getuid()}-")
    remove_deserted(prefix)
    folder = prefix + xxhash.xxh3_64_hexdigest(" ".join(identities).encode())
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder) if os.path.lexists(folder) else None
    if found is None or found.st_uid != os.getuid() or not os.path.isdir(folder) or os.path.islink(folder):
        folder = tempfile.mkdtemp(prefix=os.path.basename(prefix))  # somebody else has made the other
    return CacheFolder(folder, size, temporary=True)


def join_folder(folder: CacheFolder) -> int:
    """Hold on to a folder, which is made if it has gone meanwhile; a file descriptor that must stay open.

    A temporary one begins when all that the one before it held has gone, whoever was about to remove that.
    """
    path = folder.path
    while True:
        os.makedirs(path, mode=0o700, exist_ok=True)
        try:
            file = os.open(os.path.join(path, _ALIVE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # it went just now
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_still(file, path):
            break
        os.close(file)
    if folder.temporary:
        remove_deserted(path + _GONE)
    return file


def remove_deserted(prefix: str) -> None:
    """Remove every temporary folder whose path begins so and that nobody uses."""
    parent, base = os.path.split(prefix)
    with suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(base):
                remove_if_deserted(os.path.join(parent, name))


def remove_if_deserted(path: str) -> None:
    """Remove a temporary folder unless somebody uses it."""
    if os.path.islink(path):
        return
    if _GONE in os.path.basename(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    try:
        file = os.open(os.path.join(path, _ALIVE), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        with suppress(OSError):
            os.rmdir(path)  # made by a process that was killed before it was used
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(file, path):
            gone = f"{path}{_GONE}{uuid.uuid4().hex}"
            os.rename(path, gone)  # who comes meanwhile makes another
            shutil.rmtree(gone, ignore_errors=True)
    except OSError:
        return
    finally:
        os.close(file)


def _is_still(file: int, path: str) -> bool:
    try:
        there = os.stat(os.path.join(path, _ALIVE))
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(file))
