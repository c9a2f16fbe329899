"""Zip archives as image stores: the central directory read at once, members read by position.

The layouts are those of PKWARE's APPNOTE.TXT 6.3: end of central directory (4.3.16, and 4.3.14 and 4.3.15 for zip64), central directory
headers (4.3.12), the zip64 extra field (4.5.3). Nothing is kept of a member but its name and a row of `LOCATION_DTYPE`.
"""

import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator

import isal.isal_zlib
import numpy as np
import numpy.typing as npt

from shardify.errors import ImageError, PackError, SourceError
from shardify.images.archives import ArchiveStore, make_store
from shardify.images.listing import Listing
from shardify.images.stores import (
    ENCRYPTED,
    LARGEST,
    LOCATION_DTYPE,
    READABLE_METHODS,
    STORED,
    SYMBOLIC_LINK,
    Location,
    OpenFile,
    Room,
    Stamp,
    check_size,
    clean_name,
    file_stamp,
    missing_rows,
)

_NAME_IS_UTF8 = 0x800  # general purpose bit 11
_IS_ENCRYPTED = 0x1
_UNIX = 3  # the system on which a member was stored; its file mode is then the upper half of the attributes
_LINK_TYPE = stat.S_IFLNK >> 12
_LOCAL_HEADER = 30
_ENTRY = np.dtype(
    [
        ("signature", "<u4"),
        ("versions", "<u4"),
        ("flags", "<u2"),
        ("method", "<u2"),
        ("time", "<u4"),
        ("crc", "<u4"),
        ("stored", "<u4"),
        ("size", "<u4"),
        ("name", "<u2"),
        ("extra", "<u2"),
        ("comment", "<u2"),
        ("disk", "<u2"),
        ("internal", "<u2"),
        ("attributes", "<u4"),
        ("offset", "<u4"),
    ]
)
_ENTRY_SIGNATURE = 0x02014B50
_LENGTHS = struct.Struct("<HHH")
_END = struct.Struct("<4s4H2LH")
_END_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_MAX_COMMENT = 2**16
_CHUNK = 65_536  # entries at a time
_UNCLEAN = re.compile(rb"[\x80-\xff\\]|//|/\.|\0[./]|\A[./]|__MACOSX/|\.DS_Store")
_IN_EXTRA = 0xFFFFFFFF
_ZIP64 = 0x0001


class ZipReader:
    """Reads stored and deflated members by position.

    Args:
        path: the archive.
        stamp: see `OpenFile`.
    """

    def __init__(self, path: str, stamp: Stamp | None = None) -> None:
        self.file = OpenFile(path, stamp)
        # bytes of the last local header without its name: mostly the same for all members
        self._header_without_name = _LOCAL_HEADER
        self._is_regular = True  # as long as that was so of the member before

    def read(self, name: str, location: Location, room: Room | None = None) -> bytes | memoryview:
        """See `ImageReader`."""
        _, stored, size, crc, method = location
        if method == ENCRYPTED:
            raise ImageError("image-unreadable", "encrypted in its archive")
        if method == SYMBOLIC_LINK:
            raise ImageError(
                "image-unreadable", "a symbolic link in its archive; zip without -y stores the file itself"
            )
        if method not in READABLE_METHODS:
            raise ImageError(
                "image-unreadable", f"compression method {method}; stored and deflated can be read"
            )
        check_size(size)
        if method == STORED and stored != size:
            raise ImageError("image-damaged", f"stored, but {stored} bytes for {size}")
        check_size(stored)
        place = room(stored) if room is not None and method == STORED else None
        data: bytes | memoryview | None = None if place is None else self._read_stored(name, location, place)
        if data is None:
            data = self._read_member(location)
        if method != STORED:
            data = _inflate(data, size)
        # ten times as fast as zlib's: checking a stored member costs less than opening a file
        if isal.isal_zlib.crc32(data) != crc:
            raise ImageError("image-damaged", "its checksum differs from the archive's directory")
        return data

    def _read_stored(self, name: str, location: Location, place: memoryview) -> memoryview | None:
        """Header and data at once as long as headers are as long as expected; None when there is no whole member."""
        expected = max(self._header_without_name + _name_bytes(name), _LOCAL_HEADER)
        header, found = bytearray(expected if self._is_regular else _LOCAL_HEADER), 0
        if self._is_regular:
            found = self.file.read_into([header, place], location.offset) - expected
        else:
            self.file.read_into([header], location.offset)
        if header[:4] != b"PK\3\4":
            return None
        length = _data_begin(header)
        if not self._is_regular or length != expected:
            found = self.file.read_into([place], location.offset + length)
        self._header_without_name = length - _name_bytes(name)
        self._is_regular = length == expected
        return place if found == len(place) else None

    def _read_member(self, location: Location) -> bytes:
        header = self.file.read(_LOCAL_HEADER, location.offset)
        if header[:4] != b"PK\3\4" or len(header) < _LOCAL_HEADER:
            raise ImageError("image-damaged", f"no member header at byte {location.offset} of the archive")
        length = _data_begin(header)
        data = self.file.read(location.stored, location.offset + length)
        if len(data) < location.stored:
            raise ImageError(
                "image-damaged",
                f"the archive ends {location.stored - len(data)} bytes before the member's end",
            )
        return data


def _name_bytes(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))


def _data_begin(header: bytes | bytearray) -> int:
    """Where a member's data begins behind the begin of its local header."""
    return _LOCAL_HEADER + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


def _inflate(packed: bytes | memoryview, size: int) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = inflate.decompress(packed, size + 1)
    except zlib.error as error:
        raise ImageError("image-damaged", f"its compressed data: {error}") from None
    if len(data) != size:
        found = f"more than {size} bytes" if len(data) > size else f"{len(data)} of {size} bytes"
        raise ImageError("image-damaged", f"unpacks to {found}")
    return data


def open_zip(path: str, mount: str = "") -> ArchiveStore:
    """Open a zip archive.

    Raises:
        SourceError: it is none, a part of a split one, or damaged.
    """
    try:
        stamp = file_stamp(path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None
    return read_zip(path, mount, ZipReader(os.path.abspath(path), stamp), stamp[0])


def read_zip(path: str, mount: str, reader: ZipReader, end: int) -> ArchiveStore:
    """The store of a zip archive that is read by `reader` and ends at byte `end`; `path` is what the user gave.

    Raises:
        SourceError: as `open_zip`.
    """
    try:
        with reader.file as file:
            directory, shift = _read_directory(file, end)
        rows: list[npt.NDArray[np.void]] = []
        names = Listing.of(_entries(directory, shift, end, rows))
    except (OSError, PackError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None
    except _Damaged as error:
        raise SourceError(
            f"{path}: not a readable zip archive ({error}); images are folders, zips or plain tars"
        ) from None
    return make_store(path, mount, reader, names, np.concatenate(rows) if rows else missing_rows(0))


class _Damaged(Exception):  # noqa: N818 - never leaves this module
    """It is no zip archive, or one that cannot be understood."""


def _read_directory(file: OpenFile, size: int) -> tuple[bytes, int]:
    """The central directory's bytes, and how far all offsets in it are off: what stands before the archive in the same file."""
    tail_at = max(0, size - _END.size - _MAX_COMMENT)
    tail = file.read(size - tail_at, tail_at)
    places = [
        found.start() for found in re.finditer(b"PK\5\6", tail) if found.start() + _END.size <= len(tail)
    ]
    # the archive's comment, which is its end, may hold anything; when something was appended, the last one must do
    whole = [
        at for at in places if at + _END.size + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail)
    ]
    if not places:
        raise _Damaged("it has no end-of-directory record: cut off, or no zip")
    at = whole[0] if whole else places[-1]
    _, disk, first_disk, _, _, length, offset, _ = _END.unpack_from(tail, at)
    end = tail_at + at  # of the directory, as it should be
    locator = file.read(_END_LOCATOR.size, end - _END_LOCATOR.size) if end >= _END_LOCATOR.size else b""
    if locator.startswith(b"PK\6\7"):
        end = end - _END_LOCATOR.size - _END_64.size
        record = file.read(_END_64.size, end) if end >= 0 else b""
        if not record.startswith(b"PK\6\6"):
            raise _Damaged("its zip64 end-of-directory record is not where it should be")
        _, _, _, _, disk, first_disk, _, _, length, offset = _END_64.unpack(record)
    if disk or first_disk:
        raise _Damaged("it is a part of a split archive; join the parts first (zip -s 0)")
    begin = end - length
    if begin < 0 or begin < offset:
        raise _Damaged("its directory does not lie inside of it")
    return file.read(length, begin), begin - offset


def _entries(
    directory: bytes, shift: int, end: int, rows: list[npt.NDArray[np.void]]
) -> Iterator[list[bytes]]:
    """The members' names, some at a time; what is known of each is appended to `rows`."""
    for starts in _starts(directory):
        places = np.array(starts, np.int64)
        fixed = np.frombuffer(directory, np.uint8)[places[:, None] + np.arange(_ENTRY.itemsize)]
        entries = fixed.view(_ENTRY)[:, 0]
        if (entries["signature"] != _ENTRY_SIGNATURE).any():
            wrong = int(places[entries["signature"] != _ENTRY_SIGNATURE][0])
            raise _Damaged(f"no entry at byte {wrong} of its directory")
        lengths = entries["name"].tolist()
        names = [
            directory[at : at + length]
            for at, length in zip((places + _ENTRY.itemsize).tolist(), lengths, strict=True)
        ]
        # a directory's name ends in a slash
        held = np.fromiter((name[-1:] not in (b"/", b"") for name in names), np.bool_, len(names))
        if _UNCLEAN.search(b"\0".join(names)) or b"\0" in b"".join(names):
            flags = entries["flags"].tolist()
            for number in np.flatnonzero(held).tolist():
                names[number] = _clean(names[number], flags[number])
                held[number] = names[number] != b""
        chosen = np.flatnonzero(held)
        rows.append(_rows(directory, entries[chosen], places[chosen], shift, end))
        yield [names[number] for number in chosen.tolist()]


def _starts(directory: bytes) -> Iterator[list[int]]:
    """Where each entry begins, `_CHUNK` of them at a time."""
    unpack, size, fixed = _LENGTHS.unpack_from, len(directory), _ENTRY.itemsize
    at = 0
    while at < size:
        starts: list[int] = []
        while at < size and len(starts) < _CHUNK:
            if at + fixed > size:
                raise _Damaged("its directory is cut off")
            starts.append(at)
            name, extra, comment = unpack(directory, at + 28)
            at += fixed + name + extra + comment
        yield starts


def _rows(
    directory: bytes,
    entries: npt.NDArray[np.void],
    places: npt.NDArray[np.int64],
    shift: int,
    end: int,
) -> npt.NDArray[np.void]:
    stored, size, offset = (entries[name].astype(np.int64) for name in ("stored", "size", "offset"))
    lengths = entries["extra"].astype(np.int64)
    extras = places + _ENTRY.itemsize + entries["name"]
    for number in np.flatnonzero(np.maximum(np.maximum(stored, size), offset) == _IN_EXTRA).tolist():
        fields = [int(size[number]), int(stored[number]), int(offset[number])]
        extra = directory[extras[number] : extras[number] + lengths[number]]
        size[number], stored[number], offset[number] = _with_zip64(extra, fields)
    rows = np.zeros(len(entries), LOCATION_DTYPE)
    # a directory may claim anything: reading refuses what begins at the archive's end, and sizes beyond the limit
    rows["offset"] = np.where(offset < end - shift, offset + shift, end)
    rows["stored"], rows["size"] = stored, size
    rows["crc"] = entries["crc"]
    rows["method"] = np.where(
        entries["flags"] & _IS_ENCRYPTED, ENCRYPTED, np.minimum(entries["method"], 2**15 - 1)
    )
    is_link = (entries["versions"] >> 8 & 0xFF == _UNIX) & (entries["attributes"] >> 28 == _LINK_TYPE)
    rows["method"][is_link] = SYMBOLIC_LINK
    return rows


def _with_zip64(extra: bytes, fields: list[int]) -> list[int]:
    """Size, stored size and offset, from the zip64 field where the entry says that they are there."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        data = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if tag != _ZIP64:
            continue
        for number, value in enumerate(fields):
            if value == _IN_EXTRA and len(data) >= 8:
                fields[number] = min(int.from_bytes(data[:8], "little"), LARGEST)
                data = data[8:]
        break
    return fields


def _clean(name: bytes, flags: int) -> bytes:
    """A name as paths are asked for; empty for what macOS puts into archives beside the files."""
    name = name.partition(b"\0")[0]
    try:
        # many tools write UTF-8 without saying so
        text = name.decode("utf-8", "surrogateescape" if flags & _NAME_IS_UTF8 else "strict")
    except UnicodeError:
        text = name.decode("cp437")
    if text.endswith(("/", "\\")) or text.startswith("__MACOSX/") or text.rpartition("/")[2] == ".DS_Store":
        return b""
    return clean_name(text).encode("utf-8", "surrogatepass")
