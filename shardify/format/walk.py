"""Walking a tar of any origin: from the bytes of a file or a frame to members that belong to samples."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from typing import Protocol

import xxhash

from shardify.errors import FormatError
from shardify.format.glance import LEAST_HEADERS, MOST_HEADERS, Glanced, glance
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
from shardify.format.tar import padding, split_name, split_names

CACHED_BYTES = 2 * 1024 * 1024
"""Read at a time: what stays in the processor's cache while it is hashed, walked and looked into."""

_MARGIN = 256 * 1024

GLANCE_BYTES = 512 * 1024
"""Of less than this, headers are read one by one: numpy takes its time to begin."""

MAX_PARSED_BYTES = 256 * 1024 * 1024
"""Larger members are hashed in pieces and not looked into."""

_FEW = 16  # files: headers that are checked together cost less from here on
_MOST_ALONE = 64

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
        hashed: up to where the tar's own hash is made, so that it is made of bytes that are about to be used anyway.
        view: what `advance` gave.
    """

    view: memoryview
    base: int
    total: int
    partial: bool
    marked: bool
    hashed: int

    def advance(self, used: int, need: int) -> memoryview:
        """Pass over `used` bytes; what is there then, at least `need` bytes unless the tar ends. What was given before is void."""
        ...

    def hash_to(self, end: int) -> None:
        """Make the tar's hash up to byte `end` of the tar at least, which lies in what `advance` gave."""
        ...


class FileWindow:
    """A file, hashed on its way through two buffers.

    Args:
        file: unbuffered, at its begin.

    Attributes:
        digest: xxh3_128 of what was read so far.
    """

    partial = False

    def __init__(self, file: FileIO) -> None:
        self.base = 0
        self.total = self.hashed = os.fstat(file.fileno()).st_size
        self.marked = False
        self.digest = xxhash.xxh3_128()
        self._file = file
        self.view = _NOTHING
        # what is left of one buffer is copied in front of the other
        size = _MARGIN + CACHED_BYTES
        self._front, self._back = memoryview(bytearray(size)), memoryview(bytearray(size))

    def advance(self, used: int, need: int) -> memoryview:
        """See `Window`."""
        self.base += used
        view = self.view[used:]
        while len(view) < need:
            rest = self.total - self.base - len(view)  # a file that grows is what it was
            count = self._file.readinto(self._back[_MARGIN : _MARGIN + rest])
            if not count:
                break
            self._front, self._back = self._back, self._front
            left = len(view)
            block = self._front[_MARGIN : _MARGIN + count]
            if left <= _MARGIN:
                self._front[_MARGIN - left : _MARGIN] = view
                view = self._front[_MARGIN - left : _MARGIN + count]
            else:
                view = memoryview(b"".join((view, block)))
            self.digest.update(block)
        self.view = view
        return view

    def hash_to(self, end: int) -> None:
        """See `Window`: all that is read is hashed."""

    def close(self) -> None:
        """Nothing is to be done."""


class FrameWindow:
    """The content of one frame, whole."""

    partial = True

    def __init__(self, content: bytes) -> None:
        self.view = memoryview(content)
        self.base = 0
        self.total = self.hashed = len(content)
        self.marked = False

    def advance(self, used: int, need: int) -> memoryview:  # noqa: ARG002 - there is no more
        """See `Window`."""
        self.base += used
        self.view = self.view[used:]
        return self.view

    def hash_to(self, end: int) -> None:
        """See `Window`: nothing is hashed."""


@dataclass(slots=True)
class Run:
    """Members that belong to samples, one after another in memory, field by field.

    Attributes:
        keys: of their samples.
        fields: their own names.
        begins: where the first header of each begins in the tar.
        offsets: where its data begins there.
        sizes: bytes of it.
        data: void when the next run is drawn, and empty when it is larger than `MAX_PARSED_BYTES`.
        digests: xxh3_64 of it.
        view: memory that holds all that is in `data`.
        base: offset of its first byte in the tar.
    """

    keys: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    data: list[memoryview] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    view: memoryview = _NOTHING
    base: int = 0

    def add(self, parsed: tuple[str, str], begin: int, offset: int, data: memoryview) -> None:
        """Append a member, still without its hash."""
        key, name = parsed
        self.keys.append(key)
        self.fields.append(name)
        self.begins.append(begin)
        self.offsets.append(offset)
        self.sizes.append(len(data))
        self.data.append(data)

    def end(self, number: int) -> int:
        """Where the padding behind a member's data ends in the tar."""
        return self.offsets[number] + (self.sizes[number] + _ROUND & ~_ROUND)

    def clear(self) -> None:
        """Be as new."""
        for column in (
            self.keys,
            self.fields,
            self.begins,
            self.offsets,
            self.sizes,
            self.data,
            self.digests,
        ):
            column.clear()
        self.view, self.base = _NOTHING, 0

    def add_glanced(self, files: Glanced, view: memoryview, base: int) -> None:
        """Append the members among files that lie in a view, whose first byte is byte `base` of the tar."""
        pairs = split_names(files.names)
        if None in pairs:
            for pair, begin, start, size in zip(pairs, *files[1:], strict=True):
                if pair:
                    self.add(pair, base + begin, base + start, view[start : start + size])
            return
        self.keys += [pair[0] for pair in pairs if pair]
        self.fields += [pair[1] for pair in pairs if pair]
        self.begins += [base + begin for begin in files.begins]
        self.offsets += [base + start for start in files.starts]
        self.sizes += files.sizes
        self.data += [
            view[start : start + size] for start, size in zip(files.starts, files.sizes, strict=True)
        ]


def walk(window: Window, where: str) -> Iterator[Run]:
    """The members of a tar in order, without those that belong to no sample: folders, links, and names that `split_name` refuses.

    Raises:
        FormatError: it is no tar, damaged, cut off, or followed by another one; `where` and the byte are named.
    """
    view, at, total = window.advance(0, BLOCK), 0, window.total
    begin = -1  # of the first header of the next member
    extension: Extension | None = None
    waiting = Run()
    alone, longer = 0, 1  # members to read one by one before the next glance, and where that is in vain
    most = LEAST_HEADERS  # that the next glance looks at
    repeated, repeated_header = b"", ("", 0, b"")  # writers of PAX headers write the same one again and again
    while True:
        if len(view) - at < BLOCK:
            yield from _hashed(waiting, window)
            view, at = window.advance(at, BLOCK), 0
            if not len(view) and window.partial and begin < 0:
                return
        if begin < 0 and not alone and len(view) - at >= GLANCE_BYTES:
            files, end, whole = glance(view[at:], most)
            most = min(2 * most, MOST_HEADERS) if whole else LEAST_HEADERS
            waiting.add_glanced(files, view[at:], window.base + at)
            at += end
            if len(files.names) < _FEW:
                alone, longer = longer, min(2 * longer, _MOST_ALONE)
            else:
                longer = 1
            continue
        header_at = window.base + at
        block = bytes(view[at : at + BLOCK])
        header = repeated_header if block == repeated else parse_header(block)
        if header is None:
            if block == _ZEROS and begin < 0:
                window.marked = True
                yield from _hashed(waiting, window)
                _pass_tail(window, at, where)
                return
            cut = len(block) < BLOCK or block == _ZEROS
            what = "cut off before the end-of-archive mark" if cut else "damaged: no tar header"
            raise FormatError(f"{where}: {what if header_at else 'no tar, or ' + what} at byte {header_at}")
        name, size, kind = header
        at += BLOCK
        if kind in EXTENSIONS:
            if len(view) - at < size <= MAX_EXTENSION_BYTES:
                yield from _hashed(waiting, window)
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
                yield from _hashed(waiting, window)
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
            yield from _hashed(waiting, window)
            digest = xxhash.xxh3_64()
            for piece in _pieces(window, at, size, where):
                digest.update(piece)
            yield Run([parsed[0]], [parsed[1]], [begin], [offset], [size], [_NOTHING], [digest.intdigest()])
            view, end = window.advance(0, BLOCK), padding(size)
        else:
            if len(view) - at < size:
                yield from _hashed(waiting, window)
                view, at = window.advance(at, size), 0
            waiting.add(parsed, begin, offset, view[at : at + size])
            end = at + (size + _ROUND & ~_ROUND)
        if end > len(view):
            yield from _hashed(waiting, window)
            view, at = _pass(window, view, end)
        else:
            at = end
        begin = -1
        extension = None
        alone = max(0, alone - 1)


def _hashed(waiting: Run, window: Window) -> Iterator[Run]:
    """Give out what is waiting, before the window moves on."""
    if not waiting.keys:
        return
    begin, offsets = 0, waiting.offsets
    while begin < len(offsets):
        window.hash_to(offsets[begin] + len(waiting.data[begin]))
        end = max(begin + 1, bisect_right(offsets, window.hashed))  # as far as bytes are in the cache now
        waiting.digests.extend(map(xxhash.xxh3_64_intdigest, waiting.data[begin:end]))
        begin = end
    waiting.view, waiting.base = window.view, window.base
    yield waiting
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
