"""Walking a tar of any origin: from the bytes of a file or a frame to members that belong to samples."""

import os
from collections.abc import Iterator
from io import FileIO
from typing import Protocol, Self, TypeAlias

import xxhash

from shardify.errors import FormatError
from shardify.format.glance import glance
from shardify.format.headers import (
    BLOCK,
    EXTENSIONS,
    MAX_EXTENSION_BYTES,
    PAX,
    PAX_GLOBAL,
    REGULAR,
    SPARSE,
    Extension,
    is_old_folder,
    parse_header,
    says_nothing,
)
from shardify.format.readahead import ReadAhead, Reader, ReadNow
from shardify.format.tar import padding, split_name

CACHED_BYTES = 2 * 1024 * 1024
"""Read at a time: what stays in the processor's cache while it is hashed, walked and looked into."""

WINDOW_BYTES = 4 * 1024 * 1024
"""The same when a thread reads ahead: enough to keep both busy for a while."""

_MARGIN = 256 * 1024

GLANCE_BYTES = 512 * 1024
"""Of less than this, headers are read one by one: numpy takes its time to begin."""

MAX_PARSED_BYTES = 256 * 1024 * 1024
"""Larger members are hashed in pieces and not looked into."""

_ROUND = BLOCK - 1
_ZEROS = bytes(BLOCK)
_NOTHING = memoryview(b"")


class Window(Protocol):
    """The bytes of a tar, as far as they are in memory.

    Attributes:
        base: offset of the first one.
        total: bytes of the tar, or of its part.
        partial: whether the tar may go on elsewhere, so that the bytes may end without a mark.
        marked: whether the end-of-archive mark was found.
    """

    base: int
    total: int
    partial: bool
    marked: bool

    def advance(self, used: int, need: int) -> memoryview:
        """Pass over `used` bytes; what is there then, at least `need` bytes unless the tar ends. What was given before is void."""
        ...


class FileWindow:
    """A file, hashed on its way through two buffers.

    Use it in a ``with`` block, which ends its thread.

    Args:
        file: unbuffered, at its begin.
        ahead: while one buffer is hashed and walked, a thread reads into the other.

    Attributes:
        digest: xxh3_128 of what was read so far.
    """

    partial = False

    def __init__(self, file: FileIO, *, ahead: bool = False) -> None:
        self.base = 0
        self.total = os.fstat(file.fileno()).st_size
        self.marked = False
        self.digest = xxhash.xxh3_128()
        self._view = _NOTHING
        # what is left of one buffer is copied in front of the other
        size = _MARGIN + (WINDOW_BYTES if ahead else CACHED_BYTES)
        self._front, self._back = memoryview(bytearray(size)), memoryview(bytearray(size))
        self._reader: Reader = ReadAhead(file) if ahead else ReadNow(file)
        self._reader.ask(self._back[_MARGIN:])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def advance(self, used: int, need: int) -> memoryview:
        """See `Window`."""
        self.base += used
        view = self._view[used:]
        while len(view) < need:
            count = self._reader.take()
            if not count:
                break  # and so for good: nothing more is asked for
            self._front, self._back = self._back, self._front
            left = len(view)
            block = self._front[_MARGIN : _MARGIN + count]
            if left <= _MARGIN:
                self._front[_MARGIN - left : _MARGIN] = view
                view = self._front[_MARGIN - left : _MARGIN + count]
            else:
                view = memoryview(b"".join((view, block)))
            self._reader.ask(self._back[_MARGIN:])
            # the thread begins to read now, when hashing leaves it Python's lock
            self.digest.update(block)
        self._view = view
        return view


class FrameWindow:
    """The content of one frame, whole."""

    partial = True

    def __init__(self, content: bytes) -> None:
        self._view = memoryview(content)
        self.base = 0
        self.total = len(content)
        self.marked = False

    def advance(self, used: int, need: int) -> memoryview:  # noqa: ARG002 - there is no more
        """See `Window`."""
        self.base += used
        self._view = self._view[used:]
        return self._view


Entry: TypeAlias = tuple[str, str, int, int, int, memoryview, int]
"""One member that belongs to a sample: key, field, where its first header begins, where its data begins, size, data, and xxh3_64 of it.

The data is void when the next entry is drawn, and empty when it is larger than `MAX_PARSED_BYTES`.
"""


_Found: TypeAlias = tuple[str, str, int, int, int, memoryview]


def walk(window: Window, where: str) -> Iterator[Entry]:
    """The members of a tar in order, without those that belong to no sample: folders, links, and names that `split_name` refuses.

    Raises:
        FormatError: it is no tar, damaged, cut off, or followed by another one; `where` and the byte are named.
    """
    view, at, total = window.advance(0, BLOCK), 0, window.total
    begin = -1  # of the first header of the next member
    extension: Extension | None = None
    # the members of one window are hashed together and given out together: what each of these needs stays in the cache
    waiting: list[_Found] = []
    glanced = _NOTHING
    repeated, repeated_header = b"", ("", 0, b"")  # writers of PAX headers write the same one again and again
    while True:
        if len(view) - at < BLOCK:
            yield from _hashed(waiting)
            view, at = window.advance(at, BLOCK), 0
            if not len(view) and window.partial and begin < 0:
                return
        if view is not glanced and begin < 0 and len(view) - at >= GLANCE_BYTES:
            glanced = view
            base = window.base + at
            files, end = glance(view[at:])
            for name, begins, starts, size in files:
                if (parsed := split_name(name)) is not None:
                    data = view[at + starts : at + starts + size]
                    waiting.append((*parsed, base + begins, base + starts, size, data))
            at += end
            continue
        header_at = window.base + at
        block = bytes(view[at : at + BLOCK])
        header = repeated_header if block == repeated else parse_header(block)
        if header is None:
            if block == _ZEROS and begin < 0:
                window.marked = True
                yield from _hashed(waiting)
                _pass_tail(window, at, where)
                return
            cut = len(block) < BLOCK or block == _ZEROS
            what = "cut off before the end-of-archive mark" if cut else "damaged: no tar header"
            raise FormatError(f"{where}: {what if header_at else 'no tar, or ' + what} at byte {header_at}")
        name, size, kind = header
        at += BLOCK
        if kind in EXTENSIONS:
            if len(view) - at < size <= MAX_EXTENSION_BYTES:
                yield from _hashed(waiting)
                view, at = window.advance(at, size), 0
            if len(view) - at < size:
                raise FormatError(f"{where}: cut off, or damaged, in the extended header at byte {header_at}")
            records = bytes(view[at : at + size])
            if kind not in PAX or not says_nothing(records):
                said = extension if extension and kind != PAX_GLOBAL else Extension()
                if not said.read(kind, records):
                    raise FormatError(f"{where}: damaged extended header at byte {header_at}")
                if kind != PAX_GLOBAL:
                    extension = said
                elif said != Extension():
                    raise FormatError(
                        f"{where}: the global header at byte {header_at} names or sizes all members alike"
                    )
            if kind != PAX_GLOBAL and begin < 0:
                begin = header_at
            repeated, repeated_header = block, header
            at += size + _ROUND & ~_ROUND
            if at > len(view):
                yield from _hashed(waiting)
                view, at = _pass(window, view, at)
            continue
        if begin < 0:
            begin = header_at
        if extension is not None:
            name = extension.path or name
            size = size if extension.size is None else extension.size
        if is_old_folder(name, kind):
            size = 0
        if kind == SPARSE or (extension is not None and extension.sparse):
            raise FormatError(
                f"{where}: member {name!r} at byte {begin} is a sparse file, whose data cannot be read in place"
            )
        offset = header_at + BLOCK
        if offset + size > total:
            raise FormatError(
                f"{where}: member {name!r} at byte {begin} is cut off: it should end at byte {offset + size}, "
                f"but the {'frame' if window.partial else 'file'} does at byte {total}"
            )
        parsed = split_name(name) if kind in REGULAR else None
        if parsed is None:
            end = at + (size + _ROUND & ~_ROUND)
        elif size > MAX_PARSED_BYTES:
            yield from _hashed(waiting)
            digest = xxhash.xxh3_64()
            for piece in _pieces(window, at, size, where):
                digest.update(piece)
            yield *parsed, begin, offset, size, _NOTHING, digest.intdigest()
            view, end = window.advance(0, BLOCK), padding(size)
        else:
            if len(view) - at < size:
                yield from _hashed(waiting)
                view, at = window.advance(at, size), 0
            waiting.append((*parsed, begin, offset, size, view[at : at + size]))
            end = at + (size + _ROUND & ~_ROUND)
        if end > len(view):
            yield from _hashed(waiting)
            view, at = _pass(window, view, end)
        else:
            at = end
        begin = -1
        extension = None


def _hashed(waiting: list[_Found]) -> Iterator[Entry]:
    """Give out what is waiting, before the window moves on."""
    digests = [xxhash.xxh3_64_intdigest(found[5]) for found in waiting]
    for found, digest in zip(waiting, digests, strict=True):
        yield *found, digest
    waiting.clear()


def _pass(window: Window, view: memoryview, at: int) -> tuple[memoryview, int]:
    """The view and the place in it that is `at` bytes from the begin of this view, or the end of the tar."""
    while at > len(view):
        at -= len(view)
        view = window.advance(len(view), 1)
        if not len(view):
            return view, 0
    return view, at


def _pieces(window: Window, at: int, size: int, where: str) -> Iterator[memoryview]:
    """The next `size` bytes from `at` on; they are passed over."""
    while size:
        view = window.advance(at, 1)
        at = min(len(view), size)
        if not at:
            raise FormatError(f"{where}: became shorter while it was read")
        yield view[:at]
        size -= at
    window.advance(at, 0)


def _pass_tail(window: Window, at: int, where: str) -> None:
    """Pass over what follows the end-of-archive mark: zeros, and whatever is no tar.

    Raises:
        FormatError: another tar follows, which no reader would see.
    """
    mark = window.base + at
    view = window.advance(at, BLOCK)
    watching = True
    while len(view):
        content = bytes(view) if watching else b""
        zeros = len(content) - len(content.lstrip(b"\0"))
        if zeros < len(content):
            view = window.advance(zeros - zeros % BLOCK, BLOCK)
            if parse_header(view) is not None:
                raise FormatError(
                    f"{where}: another tar begins at byte {window.base}, behind the end-of-archive mark at byte {mark}, "
                    "where tar readers stop; `tar --concatenate` joins tars"
                )
            watching = False
        view = window.advance(len(view), 1)
