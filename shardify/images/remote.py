"""Images in object stores: a prefix as a folder, listed once, and zip archives, whose directory is read once. One request reads an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardify.errors import ImageError, PackError, SourceError
from shardify.format import objects
from shardify.format.child import in_child
from shardify.format.urls import WRITABLE, join_url, shown, split_url
from shardify.images.archives import ArchiveStore
from shardify.images.listing import Listing
from shardify.images.stores import (
    LARGEST,
    LISTED,
    MAX_IMAGE_BYTES,
    MISSING,
    PLAIN_FILE,
    ImageStore,
    Location,
    OpenFile,
    Room,
    changed,
    check_size,
    missing_rows,
)
from shardify.images.zips import ZipReader, read_zip

_EXAMPLES = 3
_SHOWN = 100  # characters of a name
_ZIP = ".zip"
_OTHER_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_HEADER_ROOM = 512  # of a zip member's header: its name is seldom longer


@dataclass(frozen=True, slots=True)
class RemoteReader:
    """Reads objects below the URL `root`."""

    root: str

    def read(self, name: str, location: Location, room: Room | None = None) -> bytes | memoryview:
        """See `ImageReader`."""
        del room
        check_size(location.size)
        url = join_url(self.root, name)
        data = objects.get(url, most=MAX_IMAGE_BYTES)
        if data is None:
            raise PackError(
                f"{shown(url)}: has gone since it was listed; once it is back, the same command again continues"
            )
        return data


class RemoteStore:
    """The objects below a prefix.

    Args:
        path: the prefix's URL.
        mount: see `StoreSpec`.
        names: of the objects.
        sizes: int64 [n], of each in bytes.
    """

    kind = "folder"
    fingerprint = ""

    def __init__(self, path: str, mount: str, names: Listing, sizes: npt.NDArray[np.int64]) -> None:
        self.path = path
        self.mount = mount
        self.reader = RemoteReader(path)
        self._names = names
        self._sizes = np.minimum(sizes, LARGEST)

    @property
    def name(self) -> str:
        """The last part of the prefix, or the bucket."""
        place = split_url(self.path)
        return place.key.rpartition("/")[2] or place.bucket

    @property
    def examples(self) -> Sequence[str]:
        """See `ImageStore`."""
        return [self._names.name(number)[:_SHOWN] for number in range(min(_EXAMPLES, len(self._names)))]

    def find(self, names: Sequence[str]) -> npt.NDArray[np.void]:
        """See `ImageStore`."""
        return self._rows(self._names.find(names), PLAIN_FILE)

    def listing(self) -> Listing:
        """See `ImageStore`."""
        return self._names

    def listed(self, numbers: Sequence[int]) -> npt.NDArray[np.void]:
        """See `ImageStore`."""
        rows = self._rows(np.array(numbers, np.int64), LISTED)
        rows["offset"] = numbers
        return rows

    def listed_name(self, number: int) -> str:
        """See `ImageStore`."""
        return self._names.name(number)

    def _rows(self, numbers: npt.NDArray[np.int64], method: int) -> npt.NDArray[np.void]:
        rows = missing_rows(len(numbers))
        held = numbers >= 0
        rows["size"][held] = rows["stored"][held] = self._sizes[numbers[held]]
        rows["method"][held] = method
        rows["store"] = np.where(held, 0, MISSING)
        return rows


class ObjectFile(OpenFile):
    """An object as a file that is read by position, one request a read.

    Args:
        path: its URL.
        entry: what its store says of it.
    """

    __slots__ = ("entry",)

    def __init__(self, path: str, entry: objects.Entry) -> None:
        super().__init__(path)
        self.entry = entry

    def __reduce__(self) -> tuple[type, tuple[str, objects.Entry]]:
        return type(self), (self.path, self.entry)

    def read(self, size: int, offset: int) -> bytes:
        """See `OpenFile`."""
        return objects.get_range(self.path, offset, max(0, min(size, self.entry.size - offset)))

    def read_into(self, places: Sequence[memoryview | bytearray], offset: int) -> int:
        """See `OpenFile`."""
        data = self.read(sum(map(len, places)), offset)
        at = 0
        for place in places:
            part = data[at : at + len(place)]
            place[: len(part)] = part
            at += len(part)
        return at

    def require_unchanged(self) -> None:
        """Raises PackError when the object is another one by now."""
        if objects.entry(self.path) != self.entry:
            raise changed(shown(self.path))


class _Window(OpenFile):
    """A file of which a part is read at once, when it is first needed."""

    __slots__ = ("_begin", "_block", "_file", "_size")

    def __init__(self, file: OpenFile, begin: int, size: int) -> None:
        super().__init__(file.path)
        self._file, self._begin, self._size = file, begin, size
        self._block: bytes | None = None

    def read(self, size: int, offset: int) -> bytes:
        """See `OpenFile`."""
        if self._block is None:
            self._block = self._file.read(self._size, self._begin)
        at = offset - self._begin
        if at >= 0 and at + size <= len(self._block):
            return self._block[at : at + size]
        return self._file.read(size, offset)


class RemoteZipReader(ZipReader):
    """Reads members of a zip archive in an object store, header and data together.

    Args:
        file: the archive.
    """

    def __init__(self, file: ObjectFile) -> None:
        super().__init__(file.path)
        self.file: ObjectFile = file

    def read(self, name: str, location: Location, room: Room | None = None) -> bytes | memoryview:
        """See `ImageReader`."""
        del room
        member = ZipReader(self.file.path)
        member.file = _Window(self.file, location.offset, _HEADER_ROOM + location.stored)
        try:
            return member.read(name, location)
        except ImageError as error:
            if error.code == "image-damaged":
                self.file.require_unchanged()
            raise


def open_remote(url: str, mount: str = "") -> ImageStore:
    """Open a prefix of an object store, or a zip archive in one.

    Raises:
        UsageError: no such URL.
        SourceError: nothing is there, it cannot be reached or listed, or it is another archive.
    """
    listable = split_url(url).scheme in WRITABLE
    ending = url.lower().rstrip("/")
    try:
        if ending.endswith((_ZIP, *_OTHER_ARCHIVES)) and (entry := objects.entry(url)) is not None:
            if ending.endswith(_ZIP):
                return in_child(_open_zip, url, mount, entry)
            raise SourceError(
                f"{shown(url)}: of archives in object stores only zips can be read in place; copy this one to a disk, or unpack it into a prefix"
            )
        if not listable:
            raise SourceError(
                f"{shown(url)}: no zip archive there, and folders cannot be listed by https://; copy them to a disk or an object store"
            )
        found = objects.list_objects(url)
    except PackError as error:
        raise SourceError(str(error)) from None
    if not len(found.ends):
        raise SourceError(f"{shown(url)}: no images there: nothing is stored below this prefix")
    return RemoteStore(url, mount, Listing(found.names, found.ends), found.sizes)


def _open_zip(url: str, mount: str, entry: objects.Entry) -> ArchiveStore:
    return read_zip(url, mount, RemoteZipReader(ObjectFile(url, entry)), entry.size)
