"""Small files written as a whole."""

import contextlib
import os
import uuid
from collections.abc import Iterator

from shardify.errors import FormatError


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
