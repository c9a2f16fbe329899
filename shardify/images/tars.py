"""Tar archives as image stores: the headers walked once, members read by position.

ustar, GNU and PAX archives are read: long names, sizes of any length, hard and symbolic links to other members.
"""

import os
import posixpath
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardify.errors import ImageError, PackError, SourceError
from shardify.format.headers import (
    BLOCK,
    EXTENSIONS,
    MAX_EXTENSION_BYTES,
    REGULAR,
    SPARSE,
    Extension,
    as_text,
    parse_header,
)
from shardify.images.archives import ArchiveStore, make_store
from shardify.images.listing import Listing, encode
from shardify.images.stores import (
    LOCATION_DTYPE,
    SPARSE_FILE,
    STORED,
    Location,
    OpenFile,
    Room,
    Stamp,
    check_size,
    clean_name,
    file_stamp,
)

_WINDOW = 8 * BLOCK  # read at a time: small members' headers come together, large members are skipped
_CHUNK = 65_536
_LINKS_FOLLOWED = 8

_HARD_LINK, _SYMBOLIC_LINK = b"1", b"2"
_NAME, _LINK, _PREFIX = slice(0, 100), slice(157, 257), slice(345, 500)
_ESCAPED = re.compile(r"\\x([89a-f][0-9a-f])")
_MAP_GOES_ON, _MAP_GOES_ON_AGAIN = 482, 504  # bytes of an old GNU sparse header, and of the blocks behind it


class TarReader:
    """Reads members by position.

    Args:
        path: the archive.
        stamp: see `OpenFile`.
    """

    def __init__(self, path: str, stamp: Stamp | None = None) -> None:
        self.file = OpenFile(path, stamp)

    def read(self, name: str, location: Location, room: Room | None = None) -> bytes | memoryview:
        """See `ImageReader`."""
        del name
        if location.method != STORED:
            raise ImageError("image-unreadable", "a sparse file in its archive")
        check_size(location.size)
        data: bytes | memoryview | None = room(location.size) if room is not None else None
        if isinstance(data, memoryview):
            found = self.file.read_into([data], location.offset)
        else:
            data = self.file.read(location.size, location.offset)
            found = len(data)
        if found < location.size:
            # every member lay inside of it when it was opened
            raise PackError(
                f"{self.file.path}: has become shorter while it was packed; the same command again continues with what it was"
            )
        return data


def open_tar(path: str, mount: str = "") -> ArchiveStore:
    """Open a plain tar archive.

    Raises:
        SourceError: it is none, or damaged or cut off (with the byte where).
    """
    places, links = array("q"), _Links()
    try:
        stamp = file_stamp(path)
        reader = TarReader(os.path.abspath(path), stamp)
        with reader.file as file:
            names = Listing.of(_members(file, stamp[0], places, links))
    except (OSError, PackError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None
    except _Damaged as error:
        raise SourceError(f"{path}: not a readable tar archive ({error})") from None
    numbers = np.array(places, np.int64).reshape(-1, 3)
    rows = np.zeros(len(numbers), LOCATION_DTYPE)
    rows["offset"], rows["size"], rows["method"] = numbers.T
    rows["stored"] = rows["size"]
    if links.names:
        names, rows = _with_links(names, rows, links)
    return make_store(path, mount, reader, names, rows)


class _Damaged(Exception):  # noqa: N818 - never leaves this module
    """It is no tar archive, or one that cannot be understood."""


@dataclass(frozen=True, slots=True)
class _Links:
    """Members that stand for others.

    Attributes:
        names: of the links.
        targets: the names they are links to.
        symbolic: whether each goes by that name whatever comes later, or is what had that name before it.
        places: how many regular members stand before each.
    """

    names: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    symbolic: list[bool] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class _Link(NamedTuple):
    """A link behind `place` regular members, to one of them, or else to a name."""

    place: int
    number: int = -1
    target: str = ""


def _members(file: OpenFile, total: int, places: "array[int]", links: _Links) -> Iterator[list[bytes]]:
    """The names of regular members, some at a time; offset, size and method of each are appended to `places`."""
    names: list[bytes] = []
    at, window_at, window = 0, 0, b""
    extension, written = Extension(), b""
    while True:
        if not window_at <= at <= window_at + len(window) - BLOCK:
            window_at, window = at, file.read(_WINDOW, at)
        place = at - window_at
        header = window[place : place + BLOCK]
        if len(header) < BLOCK and (header or at == 0):
            raise _Damaged(f"it is cut off at byte {at + len(header)}")
        if not header.strip(b"\0"):  # some writers leave out the end mark
            break
        parsed = parse_header(header)
        if parsed is None:
            raise _Damaged(f"no tar header at byte {at}")
        name, size, kind = parsed
        begin = at + BLOCK
        if kind in EXTENSIONS:
            data = file.read(min(size, MAX_EXTENSION_BYTES), begin)
            if len(data) < size or not extension.read(kind, data):
                raise _Damaged(f"a long name or extended header at byte {at} is damaged or cut off")
            written = data
            at = begin + size + -size % BLOCK
            continue
        sparse = kind == SPARSE or extension.sparse
        if extension.size is not None and (sparse or kind in REGULAR):
            size = extension.size
        if kind == SPARSE and header[_MAP_GOES_ON]:
            begin = _behind_sparse_map(file, begin)
        if begin + size > total:
            raise _Damaged(
                f"it is cut off: the member at byte {at} ends at byte {begin + size}, the file at byte {total}"
            )
        name = _clean(_legible(extension.path or name, written + header[_NAME] + header[_PREFIX]))
        if name and (kind in REGULAR or sparse):
            names.append(name.encode("utf-8", "surrogatepass"))
            places.extend((begin, size, SPARSE_FILE if sparse else STORED))
        elif name and kind in (_HARD_LINK, _SYMBOLIC_LINK):
            target = _legible(extension.link or as_text(header[_LINK]), written + header[_LINK])
            symbolic = kind == _SYMBOLIC_LINK
            links.names.append(name)
            links.targets.append(_target(name, target, symbolic=symbolic))
            links.symbolic.append(symbolic)
            links.places.append(len(places) // 3)
        extension, written = Extension(), b""
        at = begin + size + -size % BLOCK
        if len(names) >= _CHUNK:
            yield names
            names = []
    yield names


def _behind_sparse_map(file: OpenFile, begin: int) -> int:
    """Where the data of an old GNU sparse member begins: its map may go on in blocks behind the header."""
    while True:
        block = file.read(BLOCK, begin)
        if len(block) < BLOCK:
            raise _Damaged(f"it is cut off at byte {begin + len(block)}")
        begin += BLOCK
        if not block[_MAP_GOES_ON_AGAIN]:
            return begin


def _legible(name: str, written: bytes) -> str:
    """A name whose bytes are no UTF-8, which are escaped, as the Latin-1 that they mostly are; `written` has these bytes."""
    if "\\x" not in name:
        return name
    try:
        written.decode()
    except UnicodeError:
        return _ESCAPED.sub(lambda escaped: chr(int(escaped[1], 16)), name)
    return name


def _clean(name: str) -> str:
    """A name as paths are asked for; empty for folders, and for what macOS puts beside files."""
    if name.endswith("/"):
        return ""
    base = name.rpartition("/")[2]
    if base == ".DS_Store" or base.startswith("._"):
        return ""
    if "/." in name or "//" in name or "\\" in name or name[:1] in (".", "/"):
        return clean_name(name)
    return name


def _target(name: str, target: str, *, symbolic: bool) -> str:
    """The name a link stands for: of a hard link as it is, of a symbolic one from its own folder."""
    if symbolic:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    return clean_name(target)


def _with_links(
    names: Listing, rows: npt.NDArray[np.void], links: _Links
) -> tuple[Listing, npt.NDArray[np.void]]:
    """The members, and behind them the links that lead to one of them, where no later member has their name."""
    last = _as_extracted(names, links)
    ends = [_end_of(link, last) for link in last.values()]
    numbers = np.array([end.number for end in ends], np.int64)
    by_name = np.flatnonzero(numbers < 0)
    numbers[by_name] = names.find([ends[place].target for place in by_name.tolist()])
    solved = [name for name, number in zip(last, numbers.tolist(), strict=True) if number >= 0]
    return (
        Listing.of([*names.chunks(), encode(solved)]),
        np.concatenate((rows, rows[numbers[numbers >= 0]])),
    )


def _as_extracted(names: Listing, links: _Links) -> dict[str, _Link]:
    """By name, the links that would be there had the archive been extracted."""
    places = np.array(links.places, np.int64)
    earlier = names.find(links.targets, before=places).tolist()
    latest: dict[str, _Link] = {}
    for name, target, symbolic, place, number in zip(
        links.names, links.targets, links.symbolic, links.places, earlier, strict=True
    ):
        other = latest.get(target)
        if symbolic or (number < 0 and other is None):  # what it is a link to comes later
            link = _Link(place, target=target)
        elif other is not None and other.place > number:
            link = other._replace(place=place)
        else:
            link = _Link(place, number=number)
        latest[name] = link
    later = names.find(list(latest))
    return {
        name: link
        for (name, link), number in zip(latest.items(), later.tolist(), strict=True)
        if number < link.place
    }


def _end_of(link: _Link, last: Mapping[str, _Link]) -> _Link:
    """Where a chain of links ends."""
    for _ in range(_LINKS_FOLLOWED):
        if link.number >= 0 or link.target not in last:
            break
        link = last[link.target]
    return link
