"""A data set in a folder.

OUT/.packing/lock   held while a run writes there
OUT/.packing/*      unfinished files, each attempt under a name of its own; renamed into OUT when they are complete
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO, Self

from shardify.errors import UsageError
from shardify.format.names import PLAN, WORK_FOLDER
from shardify.outputs.direct import DirectFile

_LOCK = f"{WORK_FOLDER}/lock"
_SPOOL = f"{WORK_FOLDER}/spool"
_DRAFT = ".draft"
_LOCK_PATIENCE = 5.0  # seconds: the workers of a killed run hold its lock until the kernel has ended them


def sync_folder(path: str) -> None:
    """Flush a folder's entries to disk, so that a rename survives a loss of power."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class LocalDraft(DirectFile):
    """See `Draft`."""

    def __init__(self, folder: str, name: str) -> None:
        self._target = os.path.join(folder, name)
        # two attempts at one shard may run at once, when the first is only thought dead
        unfinished = f"{os.path.basename(name)}.{uuid.uuid4().hex}{_DRAFT}"
        self._unfinished = os.path.join(folder, WORK_FOLDER, unfinished)
        super().__init__(self._unfinished)
        self._committed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if not self._committed:
            with suppress(FileNotFoundError):
                os.unlink(self._unfinished)

    def commit(self) -> None:
        """See `Draft`."""
        self.sync()
        os.rename(self._unfinished, self._target)
        self._committed = True
        self.close()
        sync_folder(os.path.dirname(self._target))


@dataclass(frozen=True, slots=True)
class LocalOutput:
    """See `Output`."""

    place: str
    is_remote: bool = False

    def create(self, name: str) -> LocalDraft:
        """See `Output`."""
        return LocalDraft(self.place, name)

    def put(self, name: str, content: bytes | memoryview, *, new: bool = False) -> bool:
        """See `Output`."""
        if new and os.path.lexists(self._path(name)):
            return False
        with self.create(name) as draft:
            draft.write(content)
            draft.commit()
        return True

    def open(self, name: str) -> BinaryIO | None:
        """See `Output`."""
        try:
            return open(self._path(name), "rb")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open_all(self, names: Sequence[str]) -> Iterator[BinaryIO | None]:
        """See `Output`."""
        return (self.open(name) for name in names)

    def size(self, name: str) -> int | None:
        """See `Output`."""
        try:
            return os.stat(self._path(name)).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self) -> dict[str, int]:
        """See `Output`; folders and broken links count as empty files."""
        try:
            with os.scandir(self.place) as entries:
                return {
                    entry.name: entry.stat().st_size if entry.is_file() else 0
                    for entry in entries
                    if not entry.name.startswith(".")
                }
        except (FileNotFoundError, NotADirectoryError):
            return {}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """See `Output`; what was made for nothing is removed again."""
        work = self._path(WORK_FOLDER)
        existed = os.path.isdir(self.place)
        try:
            os.makedirs(work, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"{self.place}: not a folder; --out names the folder for the shards") from None
        except OSError as error:
            raise UsageError(f"{self.place}: cannot be written ({error.strerror})") from None
        lock = self._lock()
        try:
            self._remove_unfinished()
            yield
        finally:
            if self._is_lock(lock):  # else the work is done, and what is there may be another run's
                with suppress(OSError):  # what ended the run is what counts; the next one tries again
                    self._remove_unfinished()
                if not os.path.lexists(self._path(PLAN)):
                    shutil.rmtree(work, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    os.rmdir(self.place)  # when nothing is in it
            os.close(lock)

    def has_work(self) -> bool:
        """See `Output`."""
        return os.path.lexists(self._path(WORK_FOLDER))

    def spool(self) -> str:
        """See `Output`."""
        path = os.path.abspath(self._path(_SPOOL))
        shutil.rmtree(path, ignore_errors=True)
        os.makedirs(path)
        return path

    def remove_work(self) -> None:
        """See `Output`."""
        shutil.rmtree(self._path(WORK_FOLDER), ignore_errors=True)

    def _path(self, name: str) -> str:
        return os.path.join(self.place, name)

    def _remove_unfinished(self) -> None:
        """Drafts, and the spool, which may be as large as the data set."""
        shutil.rmtree(self._path(_SPOOL), ignore_errors=True)
        with suppress(FileNotFoundError), os.scandir(self._path(WORK_FOLDER)) as entries:
            unfinished = [entry.path for entry in entries if entry.name.endswith(_DRAFT)]
        for path in unfinished:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def _is_lock(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self._path(_LOCK)))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _lock(self) -> int:
        path = self._path(_LOCK)
        deadline = time.monotonic() + _LOCK_PATIENCE
        while True:
            # the run before may have removed file and folder since they were made
            os.makedirs(os.path.dirname(path), exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_lock(file):
                    return file
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(file)
                    raise UsageError(f"{self.place}: another pack is writing there") from None
            os.close(file)
            time.sleep(0.05)
