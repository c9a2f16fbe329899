"""A data set below a prefix of an object store.

PREFIX/.packing/plan.json   what is being written; removed when the set is finished
PREFIX/*                    complete objects: a store shows an upload only when all of it is there

There is no lock. What two runs of one plan write are the same bytes under the same names, and a run of another plan finds plan.json, which
is put only where there is none.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import BinaryIO

import xxhash

from shardify.errors import PackError
from shardify.format import names, objects
from shardify.format.bucket import require_writable
from shardify.format.child import in_child
from shardify.format.urls import join_url

_TOGETHER = 32
"""Small objects that are got at the same time."""

_SHARDS = (names.TAR, names.TAR + ".zst")


@dataclass(frozen=True, slots=True)
class RemoteOutput:
    """See `Output`.

    Attributes:
        place: the prefix's URL.
        is_remote: it is.
    """

    place: str
    is_remote: bool = True
    _folders: list[str] = field(default_factory=list, compare=False, repr=False)  # the claimed run's, local

    def __post_init__(self) -> None:
        require_writable(self.place)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.place,)

    def create(self, name: str) -> objects.Upload:
        """See `Output`."""
        return objects.open_upload(self._url(name))

    def put(self, name: str, content: bytes | memoryview, *, new: bool = False) -> bool:
        """See `Output`."""
        return objects.put(self._url(name), content, create_only=new)

    def open(self, name: str) -> BinaryIO | None:
        """See `Output`; the object is held in memory."""
        content = objects.get(self._url(name))
        return None if content is None else BytesIO(content)

    def open_all(self, names: Sequence[str]) -> Iterator[BinaryIO | None]:
        """See `Output`."""
        for first in range(0, len(names), _TOGETHER):
            for content in in_child(_get_all, [self._url(name) for name in names[first : first + _TOGETHER]]):
                yield None if content is None else BytesIO(content)

    def size(self, name: str) -> int | None:
        """See `Output`."""
        return objects.size(self._url(name))

    def sizes(self) -> dict[str, int]:
        """See `Output`; folders count as empty files."""
        return {name: size for name, size in objects.sizes(self.place).items() if not name.startswith(".")}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """See `Output`. Nobody is kept out; what is claimed is a local folder for the run's spool.

        A run that ends before it is done removes the uploads that its workers were ended in, where uploads can be listed.
        """
        objects.sizes(
            self.place
        )  # what cannot be listed cannot be continued: better told before the work than after
        folder, lock = _claim_folder(self.place)
        self._folders.append(folder)
        try:
            yield
        except BaseException:
            with suppress(PackError):  # what ended the run is what counts
                objects.abort_uploads(self.place, suffixes=_SHARDS)
            raise
        finally:
            self._folders.remove(folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    def has_work(self) -> bool:
        """See `Output`."""
        return self.size(names.PLAN) is not None

    def spool(self) -> str:
        """See `Output`; a folder of this machine."""
        path = os.path.join(self._folders[-1], "spool")
        shutil.rmtree(path, ignore_errors=True)
        os.mkdir(path)
        return path

    def remove_work(self) -> None:
        """See `Output`. Uploads that killed runs have left are removed too, where they can be listed."""
        objects.abort_uploads(self.place, suffixes=_SHARDS)
        objects.delete(self._url(names.PLAN))
        for folder in self._folders:
            shutil.rmtree(os.path.join(folder, "spool"), ignore_errors=True)

    def _url(self, name: str) -> str:
        return join_url(self.place, name)


def _get_all(urls: Sequence[str]) -> list[bytes | None]:
    with ThreadPoolExecutor(_TOGETHER) as pool:
        return list(pool.map(objects.get, urls))


def _claim_folder(place: str) -> tuple[str, int]:
    """A new local folder, and the lock that says that its run lives; what killed runs to this place have left is removed."""
    parent = tempfile.gettempdir()
    prefix = f"shardify-{xxhash.xxh3_64_hexdigest(place.rstrip('/').encode())}-"
    for entry in os.scandir(parent):
        if entry.name.startswith(prefix) and entry.is_dir(follow_symlinks=False):
            with suppress(OSError):
                _remove_abandoned(entry.path)
    folder = tempfile.mkdtemp(prefix=prefix)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _remove_abandoned(folder: str) -> None:
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        # others' folders are nobody's business
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
