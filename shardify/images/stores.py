"""Where image bytes are: folders, object-store prefixes, and zip and tar archives that are never extracted.

The main process opens a store once and locates images in it; a worker gets the store's `ImageReader` and the locations, and reads
images by position without ever reading an archive's directory again.
"""

import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from shardify.errors import ImageError, PackError, SourceError, UsageError
from shardify.images.listing import Listing

MAX_IMAGE_BYTES = 1024**3
"""A larger image is set aside unread."""

LOCATION_DTYPE = np.dtype(
    [
        (
            "offset",
            "<i8",
        ),  # of the member's local header in a zip, of its data in a tar; the number of a LISTED file
        ("stored", "<i8"),  # bytes in the store
        ("size", "<i8"),  # bytes of the image
        ("crc", "<u4"),
        ("method", "<i2"),  # a zip's compression method, or one of the constants below
        ("store", "<i2"),  # the store's number; MISSING when the image is nowhere
        ("rule", "<u2"),  # the resolver's rule that was applied to the path; 0 is the path as it stands
        ("how", "u1"),  # EXACT, BY_PREFIX, BY_SUFFIX or BY_STEM; of what is MISSING, perhaps AMBIGUOUS
    ]
)
PLAIN_FILE = -1  # a file or an object, known by its name
ENCRYPTED = -2
# something stands in the way of even looking: reading it says what, unless a later store holds the image
UNSEEN = -3
LISTED = -4  # a file known by its place in the store's own listing: `offset` is that number
SPARSE_FILE = -6  # a tar's member that is stored in pieces
SYMBOLIC_LINK = -7  # a zip's member that holds a path; those of tars are followed
MISSING = -1
EXACT, BY_PREFIX, BY_SUFFIX, BY_STEM, AMBIGUOUS = range(5)
STORED, DEFLATED = 0, 8  # as zips number them; a tar's members are STORED
READABLE_METHODS = (STORED, DEFLATED)

LARGEST = 2**48
"""Kept of a claimed size: beyond every limit, and sums of it stay within 64 bits."""
READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY

_Read = TypeVar("_Read")

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


Stamp: TypeAlias = tuple[int, int]
"""Of a file: bytes, and when it was last changed, in nanoseconds."""

_MOST_KEPT = 128  # archives that stay open in a process, of the thousands that there may be
_kept: Counter[int] = Counter()  # by process


class Location(NamedTuple):
    """Where an image is inside its store; the fields are those of `LOCATION_DTYPE`."""

    offset: int
    stored: int
    size: int
    crc: int
    method: int


Room: TypeAlias = Callable[[int], memoryview | None]
"""Gives a place in memory for so many bytes, or None where there is none."""


class ImageReader(Protocol):
    """Reads located images; small and picklable, so that any process can do it, and any thread of it."""

    def read(self, name: str, location: Location, room: Room | None = None) -> bytes | memoryview:
        """The image's bytes.

        Args:
            name: the path inside the store, its components joined by '/'; archives go by the location, and guess with it at most.
            location: what `ImageStore.find` or `ImageStore.listed` answered.
            room: asked at most once for a place to read it into. A memoryview that is returned is that place.

        Raises:
            ImageError: a fault of the image itself, the same whenever it is read: ``image-unreadable``, ``image-damaged`` or
                ``image-too-large``.
            PackError: the store cannot be reached, the image has gone since it was located, or the machine failed: what may
                be otherwise the next time must not cost a record.
        """
        ...


class ImageStore(Protocol):
    """A place with images, opened. Names are paths inside of it, components joined by '/'."""

    @property
    def path(self) -> str:
        """As the user gave it, for messages."""

    @property
    def mount(self) -> str:
        """The virtual folder its content stands below, components joined by '/'; empty for none."""

    @property
    def name(self) -> str:
        """Its base name, for outputs."""

    @property
    def kind(self) -> str:
        """``folder`` or ``archive``."""

    @property
    def fingerprint(self) -> str:
        """Of an archive's directory, hexadecimal; empty for folders."""

    @property
    def examples(self) -> Sequence[str]:
        """The first names in an archive, for messages; empty for folders."""

    @property
    def reader(self) -> ImageReader:
        """Reads what was located."""

    def find(self, names: Sequence[str]) -> npt.NDArray[np.void]:
        """[n] of `LOCATION_DTYPE`: where exactly these names are; `store` is 0, or MISSING for what is not held.

        Raises:
            PackError: the store has gone since it was opened.
        """
        ...

    def listing(self) -> Listing:
        """All names of the store; made when it is first asked for, and kept.

        Raises:
            PackError: the store has gone since it was opened.
        """
        ...

    def listed(self, numbers: Sequence[int]) -> npt.NDArray[np.void]:
        """[n] of `LOCATION_DTYPE`: where the names of these numbers in the listing are; MISSING for what has gone since."""
        ...

    def listed_name(self, number: int) -> str:
        """The name of the file whose location has method `LISTED` and this number as its offset."""
        ...


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """A place with images before it is opened.

    Attributes:
        path: a folder, an archive, or a URL of an object store's prefix.
        mount: the virtual folder its content stands below: an archive mounted at ``coco/train2017`` holds what records call
            ``coco/train2017/x.jpg`` under the name ``x.jpg``.
    """

    path: str
    mount: str = ""


def open_store(path: str | os.PathLike[str], mount: str = "") -> ImageStore:
    """Open a folder, a zip or tar archive, or a prefix of an object store.

    Args:
        path: where it is.
        mount: see `StoreSpec`.

    Raises:
        SourceError: there is no such place, or the archive's directory cannot be read.
        UsageError: it is empty, or a URL that is none.
    """
    # each kind of store builds on this module, and not all are needed
    path = os.fspath(path)
    if not path:
        raise UsageError("--images is empty; it names a folder, an archive or a URL ('.' for this folder)")
    mount = clean_name(mount)
    if "://" in path:
        from shardify.images.remote import open_remote

        return open_remote(path, mount)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            from shardify.images.folders import FolderStore

            return FolderStore(path, mount)
        if not stat.S_ISREG(mode):
            raise SourceError(f"{path}: neither a folder nor a file; images are folders, zips or plain tars")
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise SourceError(f"{path}: no images there ({error.strerror})") from None
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise SourceError(
                f"{path}: compressed by {name}, so that no image in it can be read by itself; decompress it "
                f"to a plain .tar (or unpack it into a folder) and give that"
            )
    if start[257:262] == b"ustar" or (path.lower().endswith(".tar") and not start.startswith(b"PK")):
        from shardify.images.tars import open_tar

        return open_tar(path, mount)
    from shardify.images.zips import open_zip

    return open_zip(path, mount)


class OpenFile:
    """A file that any thread of any process reads by position; it is opened once in each process, while few are open there.

    Args:
        path: absolute, or the working folder must not change.
        stamp: what `file_stamp` said of it; a file that has changed since is not read. None reads whatever there is.
    """

    __slots__ = ("_numbers", "path", "stamp")

    def __init__(self, path: str, stamp: Stamp | None = None) -> None:
        self.path = path
        self.stamp = stamp
        self._numbers: dict[int, int] = {}  # by process: forked ones have the dict, but not its later changes

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.path, self.stamp)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close it in this process; reading opens it again."""
        process = os.getpid()
        number = self._numbers.pop(process, None)
        if number is not None:
            _kept[process] -= 1
            os.close(number)

    def __del__(self) -> None:
        self.__exit__()

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`; fewer at the file's end.

        Raises:
            PackError: the file cannot be read now, or has changed.
        """
        return self._with_number(lambda number: _read(number, size, offset))

    def read_into(self, places: Sequence[memoryview | bytearray], offset: int) -> int:
        """Fill places, one after another, from `offset`; how many bytes there were.

        Raises:
            PackError: as `read`.
        """
        return self._with_number(lambda number: _read_into(number, places, offset))

    def _with_number(self, read: Callable[[int], _Read]) -> _Read:
        process = os.getpid()
        try:
            number = self._numbers.get(process)
            if number is not None:
                return read(number)
            opened = self._open()
            try:
                data = read(opened)
                # of more, each read opens its own: a process may have few
                if _kept[process] < _MOST_KEPT and self._numbers.setdefault(process, opened) == opened:
                    _kept[process] += 1
            finally:
                if self._numbers.get(process) != opened:
                    os.close(opened)
        except OSError as error:
            raise outage(self.path, error) from None
        return data

    def _open(self) -> int:
        opened = os.open(self.path, READ_FLAGS)
        if self.stamp not in (None, _stamp(os.fstat(opened))):
            os.close(opened)
            raise changed(self.path)
        return opened


def _read(number: int, size: int, offset: int) -> bytes:
    data = os.pread(number, size, offset)
    # network file systems may give less at once
    while len(data) < size and (more := os.pread(number, size - len(data), offset + len(data))):
        data += more
    return data


def _read_into(number: int, places: Sequence[memoryview | bytearray], offset: int) -> int:
    total = sum(map(len, places))
    done = os.preadv(number, places, offset)
    while done < total:  # network file systems may give less at once
        rest, skipped = [], done
        for place in places:
            rest.append(memoryview(place)[min(skipped, len(place)) :])
            skipped -= min(skipped, len(place))
        more = os.preadv(number, rest, offset + done)
        if not more:
            break
        done += more
    return done


def file_stamp(path: str) -> Stamp:
    """What tells a file as it is now from a later one; the same on every machine of a shared file system."""
    return _stamp(os.stat(path))


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_size, found.st_mtime_ns


def missing_rows(count: int) -> npt.NDArray[np.void]:
    """[count] of `LOCATION_DTYPE`, all of them MISSING."""
    rows = np.zeros(count, dtype=LOCATION_DTYPE)
    rows["store"] = MISSING
    return rows


def clean_name(name: str) -> str:
    """A member's name as paths are asked for: '/' between components, none of them empty or '.'.

    It is only ever compared, never opened, so nothing in it is dangerous.
    """
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def base_name(path: str) -> str:
    """The last component of a path, for outputs."""
    return os.fsencode(os.path.basename(os.path.abspath(path))).decode("utf-8", "replace")


def check_size(size: int) -> None:
    """Refuse what is too large to read.

    Raises:
        ImageError: ``image-too-large``.
    """
    if size > MAX_IMAGE_BYTES:
        raise ImageError("image-too-large", f"{size} bytes; the limit is {MAX_IMAGE_BYTES}")


def changed(path: str) -> PackError:
    """The error for an archive that is not the one whose members were located."""
    return PackError(
        f"{path}: has changed since packing began, so that its images cannot be told apart any more; the same command again "
        "continues with what it was, what it is now may need another --out"
    )


def outage(path: str, error: OSError) -> PackError:
    """The error for what may be otherwise the next time."""
    return PackError(
        f"{path}: cannot be read now ({error.strerror or error}); once it can, the same command again continues"
    )
