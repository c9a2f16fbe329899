"""Files written as a whole, and where a user's computer keeps what can be had again."""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator

from shardify.errors import FormatError


def user_cache() -> str:
    """The user's cache folder: ``$XDG_CACHE_HOME``, else ``~/.cache`` (XDG Base Directory Specification)."""
    return os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")


def write_whole(path: str, content: bytes) -> None:
    """Write a file so that its name never stands for a part of it.

    Raises:
        FormatError: it cannot be written.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A name beside `path` for a file that replaces it when the block ends well, and is removed when it does not.

    Raises:
        FormatError: it cannot be written.
    """
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise FormatError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """One process or thread of this machine at a time: a lock on the folder itself, so that nothing is left behind.

    Network file systems without such locks let several in at once; what they write must be the same bytes.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
