"""Where a data set is written: a folder, or a prefix of an object store.

Whatever the place, a name that exists is complete: what is written appears under its name all at once, or not at all.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol, Self

from shardify.errors import UsageError


class Draft(Protocol):
    """A file being written; nobody sees it under its name before `commit`. Left without commit, it is gone."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def write(self, data: bytes | memoryview, /) -> int:
        """Append; returns how many bytes were taken, as an unbuffered file does."""
        ...

    def commit(self) -> None:
        """Make it durable, then visible under its name, replacing what was there."""
        ...


class Output(Protocol):
    """The place for one data set: small and picklable, so that any process can write its shards.

    All names are relative to the place; ``.packing/plan.json`` lies in the work folder. Faults of the place raise OSError or PackError.
    """

    @property
    def place(self) -> str:
        """As the user gave it, for messages."""

    @property
    def is_remote(self) -> bool:
        """Whether it is an object store: a process that has called one must not fork any more."""

    def create(self, name: str) -> Draft:
        """Begin a file."""
        ...

    def put(self, name: str, content: bytes | memoryview, *, new: bool = False) -> bool:
        """Write a small file at once.

        Args:
            name: the file.
            content: its bytes.
            new: leave it as it is when it exists already.

        Returns:
            Whether it was written.
        """
        ...

    def open(self, name: str) -> BinaryIO | None:
        """A file opened for reading; None when there is none."""
        ...

    def open_all(self, names: Sequence[str]) -> Iterator[BinaryIO | None]:
        """As `open`, one after another; many at a time where each takes a while."""
        ...

    def size(self, name: str) -> int | None:
        """Of a file, in bytes; None when there is none."""
        ...

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of the files here, without those in the work folder and hidden ones."""
        ...

    def claimed(self) -> AbstractContextManager[None]:
        """Hold the place for one run where that is possible, and remove what earlier runs left unfinished.

        Raises:
            UsageError: another run holds it, or nothing can be written there.
        """
        ...

    def has_work(self) -> bool:
        """Whether a run left its work folder here."""
        ...

    def spool(self) -> str:
        """An empty local folder for large files of the claimed run, which every worker reaches that reaches the output."""
        ...

    def remove_work(self) -> None:
        """Remove the work folder of a finished set, and the spool."""
        ...


def open_output(place: str) -> Output:
    """The output at a folder's path or an object store's URL (``s3://bucket/prefix``, ``gs://``, ``az://``).

    Raises:
        UsageError: it is empty, or a URL that is none.
    """
    if not place:
        raise UsageError("--out is empty; it names the folder for the shards ('.' for this one)")
    if "://" in place:
        from shardify.outputs.remote import RemoteOutput

        return RemoteOutput(place)
    from shardify.outputs.local import LocalOutput

    return LocalOutput(place)
