"""Where image bytes are: folders, and zip archives that are never extracted.

The main process opens a store once and locates images in it; a worker gets the store's `ImageReader` and the locations, and reads
members by positioned reads without ever reading an archive's directory again.
"""

import contextlib
import errno
import os
import stat
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from shardify.errors import ImageError, PackError, SourceError

MAX_IMAGE_BYTES = 1024**3
"""A larger image is set aside unread."""

LOCATION_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # of the member's local header in its archive
        ("stored", "<i8"),  # bytes in the archive
        ("size", "<i8"),  # bytes of the image
        ("crc", "<u4"),
        ("method", "<i2"),  # the archive's compression method, ENCRYPTED, PLAIN_FILE, or UNSEEN
        ("store", "<i2"),  # the store's number; MISSING when the image is nowhere
        ("rule", "<u2"),  # the resolver's rule that was applied to the path; 0 is the path as it stands
        ("how", "u1"),  # EXACT, BY_PREFIX, BY_SUFFIX or BY_STEM
    ]
)
PLAIN_FILE = -1
ENCRYPTED = -2
UNSEEN = (
    -3
)  # something stands in the way of even looking: reading it says what, unless a later store holds the image
LISTED = -4  # a file known by its place in the store's own listing: `offset` is that number
MISSING = -1
EXACT, BY_PREFIX, BY_SUFFIX, BY_STEM = range(4)
READABLE_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

_NAME_IS_UTF8 = 0x800  # general purpose bit 11
_LOCAL_HEADER = 30
# most members have a short name and few extra fields, so that one read takes header and data together
_HEADER_GUESS = _LOCAL_HEADER + 160
_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY
_FAULTS_OF_A_FILE = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
_EXAMPLES = 3
_LARGEST = 2**48  # kept of a claimed size: beyond every limit, and sums of it stay within 64 bits


class Location(NamedTuple):
    """Where an image is inside its store; the fields are those of `LOCATION_DTYPE`."""

    offset: int
    stored: int
    size: int
    crc: int
    method: int


class ImageReader(Protocol):
    """Reads located images; small and picklable, so that any process can do it."""

    def read(self, name: str, location: Location) -> bytes:
        """The image's bytes.

        Args:
            name: the path inside the store, its components joined by '/'; archives go by the location alone.
            location: what `locate` answered.

        Raises:
            ImageError: a fault of the image itself, the same whenever it is read: ``image-unreadable``, ``image-damaged`` or
                ``image-too-large``.
            PackError: the store cannot be reached, the image has gone since it was located, or the machine failed: what may
                be otherwise the next time must not cost a record.
        """
        ...


class ImageStore(Protocol):
    """A folder or an archive, opened."""

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

    def locate(self, paths: Sequence[tuple[str, ...]]) -> list[Location | None]:
        """Where each path, given by its components, is; None for what the store does not hold.

        Raises:
            PackError: the store has gone since it was opened.
        """
        ...

    def listed_name(self, number: int) -> str:
        """The path inside the store of the file whose location has method `LISTED` and this number as its offset."""
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
    """Open a folder or a zip archive.

    Args:
        path: where it is.
        mount: see `StoreSpec`.

    Raises:
        SourceError: there is no such place, or the archive's directory cannot be read.
    """
    path = os.fspath(path)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise SourceError(f"{path}: no images there ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        return FolderStore(path, FolderReader(os.path.abspath(path)), mount)
    return _open_zip(path, mount)


def _base_name(path: str) -> str:
    return os.fsencode(os.path.basename(os.path.abspath(path))).decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class FolderReader:
    """Reads files below `root`. Symbolic links are followed: people link their big disks."""

    root: str

    def file(self, name: str) -> str:
        """The path of a file."""
        return f"{self.root}/{name}"

    def read(self, name: str, location: Location) -> bytes:
        """See `ImageReader`."""
        del location  # the file's own size holds
        try:
            file = os.open(self.file(name), _READ_FLAGS)
            try:
                size = os.fstat(file).st_size
                _check_size(size)
                data = os.read(file, size)
                # network file systems may give less at once
                while len(data) < size and (more := os.read(file, size - len(data))):
                    data += more
            finally:
                os.close(file)
        except OSError as error:
            # a folder that cannot be entered is no fault of the images in it
            if error.errno in _FAULTS_OF_A_FILE and os.access(self.root, os.X_OK):
                raise ImageError("image-unreadable", error.strerror or str(error)) from None
            raise _outage(self.file(name), error) from None
        return data


@dataclass(frozen=True, slots=True)
class FolderStore:
    """A folder of images."""

    path: str
    reader: FolderReader
    mount: str = ""
    kind: str = "folder"
    fingerprint: str = ""
    examples: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The folder's own name."""
        return _base_name(self.path)

    def locate(self, paths: Sequence[tuple[str, ...]]) -> list[Location | None]:
        """See `ImageStore`."""
        located = [self._locate(parts) for parts in paths]
        if None in located:
            try:
                os.stat(self.reader.root)
            except OSError as error:
                raise _outage(self.path, error) from None
        return located

    def _locate(self, parts: tuple[str, ...]) -> Location | None:
        try:
            found = os.stat(self.reader.file("/".join(parts)))
        except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError):
            return None
        except OSError as error:
            return None if error.errno == errno.ENAMETOOLONG else Location(0, 0, 0, 0, UNSEEN)
        if not stat.S_ISREG(found.st_mode):
            return None
        return Location(0, found.st_size, found.st_size, 0, PLAIN_FILE)

    def listed_name(self, number: int) -> str:
        """See `ImageStore`."""
        raise IndexError(f"{self.path}: no file {number} has been listed")


@dataclass(frozen=True, slots=True)
class ZipReader:
    """Reads stored and deflated members by position."""

    path: str
    _files: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.path,)

    def read(self, name: str, location: Location) -> bytes:
        """See `ImageReader`."""
        del name
        if location.method == ENCRYPTED:
            raise ImageError("image-unreadable", "encrypted in its archive")
        if location.method not in READABLE_METHODS:
            raise ImageError(
                "image-unreadable", f"compression method {location.method}; stored and deflated can be read"
            )
        _check_size(location.size)
        if location.method == zipfile.ZIP_STORED and location.stored != location.size:
            raise ImageError("image-damaged", f"stored, but {location.stored} bytes for {location.size}")
        _check_size(location.stored)
        try:
            packed = self._packed(location)
        except OSError as error:
            raise _outage(self.path, error) from None
        data = bytes(packed) if location.method == zipfile.ZIP_STORED else _inflate(packed, location.size)
        if zlib.crc32(data) != location.crc:
            raise ImageError("image-damaged", "its checksum differs from the archive's directory")
        return data

    def _packed(self, location: Location) -> memoryview:
        file = self._file()
        block = os.pread(file, _HEADER_GUESS + location.stored, location.offset)
        if block[:4] != b"PK\3\4" or len(block) < _LOCAL_HEADER:
            raise ImageError("image-damaged", f"no member header at byte {location.offset} of the archive")
        start = (
            _LOCAL_HEADER + int.from_bytes(block[26:28], "little") + int.from_bytes(block[28:30], "little")
        )
        end = start + location.stored
        while len(block) < end and (more := os.pread(file, end - len(block), location.offset + len(block))):
            block += more
        if len(block) < end:
            raise ImageError(
                "image-damaged", f"the archive ends {end - len(block)} bytes before the member's end"
            )
        return memoryview(block)[start:end]

    def _file(self) -> int:
        # one descriptor for each process: forked workers share the dict's content but not its later changes
        process = os.getpid()
        if process not in self._files:
            self._files[process] = os.open(self.path, _READ_FLAGS)
        return self._files[process]


def _inflate(packed: memoryview, size: int) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflate.decompress(packed, size + 1)
    except zlib.error as error:
        raise ImageError("image-damaged", f"its compressed data: {error}") from None
    if len(data) != size:
        found = f"more than {size} bytes" if len(data) > size else f"{len(data)} of {size} bytes"
        raise ImageError("image-damaged", f"unpacks to {found}")
    return data


def _check_size(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ImageError("image-too-large", f"{size} bytes; the limit is {MAX_IMAGE_BYTES}")


def _outage(path: str, error: OSError) -> PackError:
    return PackError(
        f"{path}: cannot be read now ({error.strerror or error}); once it can, the same command again continues"
    )


@dataclass(frozen=True, slots=True, eq=False)
class ZipStore:
    """A zip archive; `members` maps paths to rows of `rows`, a structured array of `LOCATION_DTYPE`."""

    path: str
    reader: ZipReader
    fingerprint: str
    members: dict[str, int]
    rows: npt.NDArray[np.void]
    top: str
    mount: str = ""
    kind: str = "archive"

    @property
    def name(self) -> str:
        """The archive's own name."""
        return _base_name(self.path)

    @property
    def examples(self) -> Sequence[str]:
        """See `ImageStore`."""
        return [name[:100] for name in islice(self.members, _EXAMPLES)]

    def locate(self, paths: Sequence[tuple[str, ...]]) -> list[Location | None]:
        """See `ImageStore`. A single top folder that all members share may be left out of a path, or stand in it alone."""
        return [self._locate("/".join(parts)) for parts in paths]

    def _locate(self, path: str) -> Location | None:
        row = self.members.get(path)
        if row is None and self.top:
            row = self.members.get(self.top + path)
        if row is None:
            return None
        offset, stored, size, crc, method, *_ = self.rows[row].tolist()
        return Location(offset, stored, size, crc, method)

    def listed_name(self, number: int) -> str:
        """See `ImageStore`."""
        raise IndexError(f"{self.path}: no file {number} has been listed")


def _open_zip(path: str, mount: str) -> ZipStore:
    try:
        end = os.stat(path).st_size
        with zipfile.ZipFile(path) as archive:
            # by the name, which a damaged directory may leave empty, where ZipInfo.is_dir raises
            files = [entry for entry in archive.infolist() if entry.filename and entry.filename[-1] != "/"]
            entries = [entry for entry in files if not _is_clutter(entry)]
    except zipfile.BadZipFile as error:
        raise SourceError(
            f"{path}: not a readable zip archive ({error}); images are folders or zip archives"
        ) from None
    except (OSError, NotImplementedError, UnicodeError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None
    rows = np.zeros(len(entries), dtype=LOCATION_DTYPE)
    # a directory may claim anything: reading refuses what begins at the archive's end, and sizes beyond the limit
    rows["offset"] = [entry.header_offset if 0 <= entry.header_offset < end else end for entry in entries]
    rows["stored"] = [min(entry.compress_size, _LARGEST) for entry in entries]
    rows["size"] = [min(entry.file_size, _LARGEST) for entry in entries]
    rows["crc"] = [entry.CRC for entry in entries]
    rows["method"] = [
        ENCRYPTED if entry.flag_bits & 1 else min(entry.compress_type, 2**15 - 1) for entry in entries
    ]
    names = [_clean(entry) for entry in entries]
    digest = xxhash.xxh3_128(rows.tobytes())
    digest.update("\0".join(names).encode("utf-8", "surrogateescape"))
    tops = {name.partition("/")[0] for name in names}
    in_one_folder = len(tops) == 1 and all("/" in name for name in names)
    return ZipStore(
        path=path,
        reader=ZipReader(os.path.abspath(path)),
        fingerprint=digest.hexdigest(),
        members={name: row for row, name in enumerate(names)},
        rows=rows,
        top=f"{tops.pop()}/" if in_one_folder else "",
        mount=mount,
    )


def _is_clutter(entry: zipfile.ZipInfo) -> bool:
    """What macOS puts into archives beside the files."""
    return entry.filename.startswith("__MACOSX/") or entry.filename.rpartition("/")[2] == ".DS_Store"


def _clean(entry: zipfile.ZipInfo) -> str:
    """A member's name as `ImageRef.parts` writes paths. It is only ever compared, never opened, so nothing in it is dangerous."""
    name = entry.filename
    if not entry.flag_bits & _NAME_IS_UTF8 and not name.isascii():
        # zipfile reads such a name as code page 437; many tools write UTF-8 without saying so
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
