"""Writing shards and reading samples back: POSIX ustar with fixed metadata.

One member is a 512-byte header, the data, and zeros to the next multiple of 512; a shard ends with two blocks of zeros
(IEEE Std 1003.1-1988, ustar interchange format). mtime, uid and gid are 0 and the mode is 0644, so that equal content gives equal bytes.
"""

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from struct import Struct
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import xxhash

from shardify.errors import FormatError
from shardify.format.headers import (
    BLOCK,
    EXTENSIONS,
    MAX_EXTENSION_BYTES,
    PAX_GLOBAL,
    REGULAR,
    Extension,
    is_old_folder,
    parse_header,
)
from shardify.format.names import ZSTD
from shardify.format.zstd import FRAME_BYTES, FrameWriter

MAX_MEMBER_BYTES = 8 * 1024**3 - 1
"""Eleven octal digits hold no more."""
END_OF_ARCHIVE = bytes(2 * BLOCK)

_MAX_NAME = 100
_SMALL = 4096  # bytes: copying them together costs less than writing each
_PADDING = bytes(BLOCK)
_MODE_TO_GID = b"0000644\0" + b"0000000\0" + b"0000000\0"
_MTIME = b"00000000000\0"
_AFTER_CHECKSUM = (
    b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(64) + b"0000000\0" + b"0000000\0" + bytes(155) + bytes(12)
)
_HEADER = Struct(f"{_MAX_NAME}s24s12s12s8s356s")
# the checksum counts its own field as eight blanks
_CONSTANT_SUM = sum(_MODE_TO_GID) + sum(_MTIME) + sum(b" " * 8) + sum(_AFTER_CHECKSUM)


class Member(NamedTuple):
    """Where one member of a sample lies.

    Attributes:
        field: the name after the key and its dot: ``jpg``, ``0.png``, ``json``.
        offset: of the first data byte, in the shard or, in a compressed one, in the sample's decompressed frame.
        size: of the data, without padding.
        xxh3_64: of the data.
    """

    field: str
    offset: int
    size: int
    xxh3_64: int


class Sink(Protocol):
    """An unbuffered binary file: `write` says how much it took."""

    def write(self, data: bytes | memoryview, /) -> int | None: ...  # noqa: D102


@runtime_checkable
class Gathering(Protocol):
    """A sink that takes all it is given, makes large writes of small ones itself, and hashes what is written."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Append all of it."""
        ...

    def room(self, size: int, *, before: int, is_free: bool) -> memoryview | None:
        """The place of bytes that will be written behind `before` others; see `DirectFile.room`."""
        ...

    def advance(self, size: int, *, zeros: int) -> None:
        """The next `size` bytes are in their place already, and so many zeros follow them."""
        ...

    def hexdigest(self) -> str:
        """xxh3_128 of everything so far, hexadecimal."""
        ...


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member's data.

    Raises:
        FormatError: the name is over 100 bytes or the data 8 GiB or more.
    """
    encoded = name.encode()
    if not 0 < len(encoded) <= _MAX_NAME:
        raise FormatError(
            f"member name {name!r} has {len(encoded)} bytes; a ustar name holds 1 to {_MAX_NAME}"
        )
    if size > MAX_MEMBER_BYTES:
        raise FormatError(
            f"member {name!r} has {size} bytes; a ustar member holds at most {MAX_MEMBER_BYTES}"
        )
    size_field = b"%011o\0" % size
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(encoded) + sum(size_field))
    return _HEADER.pack(encoded, _MODE_TO_GID, size_field, _MTIME, checksum, _AFTER_CHECKSUM)


def padding(size: int) -> int:
    """Zeros between data of `size` bytes and the next header."""
    return -size % BLOCK


def sample_span(member_sizes: Sequence[int]) -> int:
    """Bytes from the first header to the padded end of a sample with members of these sizes."""
    return sum(BLOCK + size + padding(size) for size in member_sizes)


class ShardWriter:
    """Writes samples to an unbuffered binary file, hashing on the way.

    The file sees few, large writes: what is ready is gathered until it is `gather` bytes, unless the file does that itself.

    Args:
        sink: its `write` may take less than it is given, as that of an unbuffered file; or one that is `Gathering`.
        compress: ``""`` for a plain tar, ``"zstd"`` for one in frames (see `shardify.format.zstd`).
        gather: bytes.

    Attributes:
        offset: bytes of the plain tar so far.
        bytes: bytes of the file so far, as far as they are written; its size after `close`.
    """

    def __init__(self, sink: Sink | Gathering, *, compress: str = "", gather: int = 4 * 1024 * 1024) -> None:
        if compress not in ("", ZSTD):
            raise ValueError(f"compress={compress!r}: shards are plain or {ZSTD!r}")
        self._sink = sink
        self._gathering = sink if isinstance(sink, Gathering) else None
        self._gather = gather
        self._ready: list[bytes | memoryview] = []
        self._ready_bytes = 0
        self._hash = xxhash.xxh3_128()
        self._frames = FrameWriter() if compress else None
        self._frame: list[bytes | memoryview] = []
        self._frame_begin = 0
        self._sample_begin = 0
        self._ahead = 0  # bytes of the next sample for which there are places; -1 when there are no more
        self._promised: list[int] = []  # where in the tar the places lie
        self._marks = array("q")  # of each sample: begin and size, or the number of its frame
        self.offset = 0
        self.bytes = 0

    def room(self, size: int, *, is_first: bool) -> memoryview | None:
        """The place in memory of the data of a member that may be added soon, to be filled before.

        The members of a sample that have places are its first ones, and are added in the order in which they got them.

        Args:
            size: of the data.
            is_first: it is the sample's first member: places that were given before and not used are void.

        Returns:
            None where that cannot be had: the data is then given to `add`.
        """
        if is_first:
            self._ahead, self._promised = 0, []
        if self._gathering is None or self._frames is not None or self._ahead < 0:
            return None
        before, padded = self._ahead + BLOCK, size + padding(size)
        place = self._gathering.room(padded, before=before, is_free=is_first)
        if place is None:
            self._ahead = -1  # what has no place moves those behind it
            return None
        self._promised.append(self.offset + before)
        self._ahead = before + padded
        return place[:size]

    def add(self, key: str, field: str, data: bytes | memoryview, *, in_place: bool = False) -> Member:
        """Append the member ``key.field``; its offset counts from the begin of its frame when the shard is compressed.

        Args:
            key: of the sample.
            field: the rest of the name.
            data: of the member.
            in_place: `data` is what `room` gave for it.
        """
        size = len(data)
        header = member_header(f"{key}.{field}", size)
        begin = self.offset
        if self._frames is not None and begin == self._sample_begin:
            waiting = begin - self._frame_begin
            if waiting and waiting + size > FRAME_BYTES:  # a large sample has a frame of its own
                self._end_frame()
        member = Member(field, begin + BLOCK - self._frame_begin, size, xxhash.xxh3_64_intdigest(data))
        pad = padding(size)
        if in_place:
            assert self._gathering is not None
            assert begin + BLOCK in self._promised, "its place is elsewhere"
            self._write(header)
            self._gathering.advance(size, zeros=pad)
            self.bytes += size + pad
            self.offset += BLOCK + size + pad
            return member
        parts: tuple[bytes | memoryview, ...] = (header, data, _PADDING[:pad])
        if size < _SMALL:
            parts = (b"".join(parts),)
        self.offset += BLOCK + size + pad
        if self._frames is not None:
            self._frame += parts
        else:
            for part in parts:
                self._write(part)
        return member

    def end_sample(self) -> None:
        """Say that the sample has all its members."""
        if self._frames is None:
            self._marks.extend((self._sample_begin, self.offset - self._sample_begin))
        else:
            self._marks.append(len(self._frames))
            if self.offset - self._frame_begin >= FRAME_BYTES:
                self._end_frame()
        self._sample_begin = self.offset

    def close(self) -> str:
        """End the archive; returns the xxh3_128 of the whole file in hexadecimal."""
        self.offset += len(END_OF_ARCHIVE)
        if self._frames is None:
            self._write(END_OF_ARCHIVE)
        else:
            self._end_frame()
            self._frame.append(END_OF_ARCHIVE)
            self._end_frame()
            self._write(self._frames.seek_table())
        if self._gathering is not None:
            return self._gathering.hexdigest()
        self._flush()
        return self._hash.hexdigest()

    @property
    def spans(self) -> npt.NDArray[np.int64]:
        """int64 [samples, 2]: offset and size of each sample in the file, after `close`.

        From its first header to its padded end; in a compressed shard those of its frame, which it may share with its neighbours.
        """
        marks = np.array(self._marks, np.int64)
        return marks.reshape(-1, 2) if self._frames is None else self._frames.spans()[marks]

    def _end_frame(self) -> None:
        assert self._frames is not None
        if not self._frame:
            return
        frame = self._frames.compress(self._frame)
        self._frame.clear()
        self._frame_begin = self.offset
        self._write(frame)

    def _write(self, data: bytes | memoryview) -> None:
        if self._gathering is not None:
            self.bytes += self._gathering.write(data)
            return
        self._ready.append(data)
        self._ready_bytes += len(data)
        if self._ready_bytes >= self._gather:
            self._flush()

    def _flush(self) -> None:
        data = b"".join(self._ready)
        self._ready.clear()
        self._ready_bytes = 0
        self._hash.update(data)
        self.bytes += len(data)
        view = memoryview(data)
        while view:
            view = view[self._sink.write(view) or 0 :]


def split_name(name: str) -> tuple[str, str] | None:
    """A member name as (key, field), cut at the first dot of the last path component.

    None for what is no part of a sample: names without a field (``README``), hidden ones (``.cache``, ``._a.jpg``), and webdataset's own
    ``__meta__`` entries.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    if not stem or not field or (base.startswith("__") and not slash and "__" in base[2:]):
        return None
    return folder + slash + stem, field


def split_names(names: Sequence[str]) -> list[tuple[str, str] | None]:
    """What `split_name` says of each."""
    text = "\0".join(("", *names))
    # where nothing but the first dot matters
    if "/" in text or "\0__" in text:
        return [split_name(name) for name in names]
    parts = [name.partition(".") for name in names]
    return [(key, field) if key and field else None for key, _, field in parts]


def read_members(span: memoryview, *, where: str) -> tuple[str, list[tuple[str, memoryview]]]:
    """The members of one sample.

    Args:
        span: the sample's bytes, from its first header to its padded end.
        where: names the span in errors, such as ``data/000.tar offset 1024``.

    Returns:
        The key and, for each member in tar order, its field and its data.

    Raises:
        FormatError: the bytes are not a sample: the index does not belong to the shard, or the shard is damaged.
    """
    samples = list(read_samples(span, where=where))
    if not samples:
        raise FormatError(f"{where}: no members")
    if len(samples) > 1:
        raise FormatError(f"{where}: members of two samples, {samples[0][0]!r} and {samples[1][0]!r}")
    return samples[0]


def read_samples(span: memoryview, *, where: str) -> Iterator[tuple[str, list[tuple[str, memoryview]]]]:
    """The samples of a run of members, as `read_members` gives one: a change of key begins the next. An end-of-archive mark ends them.

    Raises:
        FormatError: as `read_members`.
    """
    members: list[tuple[str, memoryview]] = []
    last = ""
    for key, field, begin, size in _walk(span, where):
        if members and key != last:
            yield last, members
            members = []
        last = key
        members.append((field, span[begin : begin + size]))
    if members:
        yield last, members


def split_samples(span: memoryview, *, where: str) -> list[memoryview]:
    """The spans of the samples that `read_samples` gives: each from where the one before it ends to the padded end of its own last member.

    Raises:
        FormatError: as `read_members`.
    """
    ends: list[int] = []
    last = None
    for key, _, begin, size in _walk(span, where):
        if key != last:
            ends.append(0)
            last = key
        ends[-1] = begin + size + padding(size)
    return [span[begin:end] for begin, end in pairwise((0, *ends))]


def _walk(span: memoryview, where: str) -> Iterator[tuple[str, str, int, int]]:
    """Key, field, begin of the data and its size, of each member of a sample."""
    found = False
    extension: Extension | None = None
    offset = 0
    while offset < len(span):
        header = parse_header(span, offset)
        if header is None:
            if found and span[offset : offset + BLOCK] == _PADDING:
                break
            raise FormatError(f"{where}: no tar header at byte {offset} of the sample")
        name, size, kind = header
        if extension is not None and kind not in EXTENSIONS:
            name = extension.path or name
            size = size if extension.size is None else extension.size
            extension = None
        if is_old_folder(name, kind):
            size = 0
        data = offset + BLOCK
        offset = data + size + padding(size)
        if offset > len(span):
            raise FormatError(
                f"{where}: member {name!r} reaches {offset - len(span)} bytes beyond its sample"
            )
        if kind in REGULAR:
            parsed = split_name(name)
            if parsed is None:
                continue
            found = True
            yield *parsed, data, size
        elif kind in EXTENSIONS and kind != PAX_GLOBAL:
            # shards written by others: what does not fit a header precedes it
            extension = extension or Extension()
            if size > MAX_EXTENSION_BYTES or not extension.read(kind, bytes(span[data : data + size])):
                raise FormatError(f"{where}: damaged extended header at byte {data} of the sample")
