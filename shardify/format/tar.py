"""Writing shards and reading samples back: POSIX ustar with fixed metadata.

One member is a 512-byte header, the data, and zeros to the next multiple of 512; a shard ends with two blocks of zeros
(IEEE Std 1003.1-1988, ustar interchange format). mtime, uid and gid are 0 and the mode is 0644, so that equal content gives equal bytes.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from shardify.errors import FormatError
from shardify.format.names import ZSTD
from shardify.format.zstd import FRAME_BYTES, FrameWriter

BLOCK = 512
MAX_MEMBER_BYTES = 8 * 1024**3 - 1
"""Eleven octal digits hold no more."""
END_OF_ARCHIVE = bytes(2 * BLOCK)

_MAX_NAME = 100
_PADDING = bytes(BLOCK)
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_MODE_TO_GID = b"0000644\0" + b"0000000\0" + b"0000000\0"
_MTIME = b"00000000000\0"
_AFTER_CHECKSUM = (
    b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(64) + b"0000000\0" + b"0000000\0" + bytes(155) + bytes(12)
)
# the checksum counts its own field as eight blanks
_CONSTANT_SUM = sum(_MODE_TO_GID) + sum(_MTIME) + sum(b" " * 8) + sum(_AFTER_CHECKSUM)


@dataclass(frozen=True, slots=True)
class Member:
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


class _Sink(Protocol):
    def write(self, data: bytes, /) -> int | None: ...


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
    return b"".join(
        (encoded.ljust(_MAX_NAME, b"\0"), _MODE_TO_GID, size_field, _MTIME, checksum, _AFTER_CHECKSUM)
    )


def padding(size: int) -> int:
    """Zeros between data of `size` bytes and the next header."""
    return -size % BLOCK


def sample_span(member_sizes: Sequence[int]) -> int:
    """Bytes from the first header to the padded end of a sample with members of these sizes."""
    return sum(BLOCK + size + padding(size) for size in member_sizes)


class ShardWriter:
    """Writes samples to an unbuffered binary file, hashing on the way.

    The file sees few, large writes: what is ready is gathered until it is `gather` bytes.

    Args:
        sink: its `write` may take less than it is given, as that of an unbuffered file.
        compress: ``""`` for a plain tar, ``"zstd"`` for one in frames (see `shardify.format.zstd`).
        gather: bytes.

    Attributes:
        offset: bytes of the plain tar so far.
        bytes: bytes of the file so far, as far as they are written; its size after `close`.
    """

    def __init__(self, sink: _Sink, *, compress: str = "", gather: int = 4 * 1024 * 1024) -> None:
        if compress not in ("", ZSTD):
            raise ValueError(f"compress={compress!r}: shards are plain or {ZSTD!r}")
        self._sink = sink
        self._gather = gather
        self._ready: list[bytes | memoryview] = []
        self._ready_bytes = 0
        self._hash = xxhash.xxh3_128()
        self._frames = FrameWriter() if compress else None
        self._frame: list[bytes | memoryview] = []
        self._frame_begin = 0
        self._sample_begin = 0
        self._marks = array("q")  # of each sample: begin and size, or the number of its frame
        self.offset = 0
        self.bytes = 0

    def add(self, key: str, field: str, data: bytes | memoryview) -> Member:
        """Append the member ``key.field``; its offset counts from the begin of its frame when the shard is compressed."""
        size = len(data)
        header = member_header(f"{key}.{field}", size)
        begin = self.offset
        if self._frames is not None and begin == self._sample_begin:
            waiting = begin - self._frame_begin
            if waiting and waiting + size > FRAME_BYTES:  # a large sample has a frame of its own
                self._end_frame()
        member = Member(field, begin + BLOCK - self._frame_begin, size, xxhash.xxh3_64_intdigest(data))
        self._append(header)
        self._append(data)
        pad = padding(size)
        if pad:
            self._append(_PADDING[:pad])
        if self._ready_bytes >= self._gather:
            self._flush()
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
        if self._frames is None:
            self._append(END_OF_ARCHIVE)
        else:
            self._end_frame()
            self._append(END_OF_ARCHIVE)
            self._end_frame()
            self._ready.append(self._frames.seek_table())
        self._flush()
        return self._hash.hexdigest()

    @property
    def spans(self) -> npt.NDArray[np.int64]:
        """int64 [samples, 2]: offset and size of each sample in the file, after `close`.

        From its first header to its padded end; in a compressed shard those of its frame, which it may share with its neighbours.
        """
        marks = np.array(self._marks, np.int64)
        return marks.reshape(-1, 2) if self._frames is None else self._frames.spans()[marks]

    def _append(self, data: bytes | memoryview) -> None:
        self.offset += len(data)
        if self._frames is not None:
            self._frame.append(data)
            return
        self._ready.append(data)
        self._ready_bytes += len(data)

    def _end_frame(self) -> None:
        assert self._frames is not None
        if not self._frame:
            return
        frame = self._frames.compress(self._frame)
        self._frame.clear()
        self._frame_begin = self.offset
        self._ready.append(frame)
        self._ready_bytes += len(frame)
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
            written = self._sink.write(view)  # type: ignore[arg-type]
            view = view[written:]


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
    members: list[tuple[str, memoryview]] = []
    key = ""
    long_name: str | None = None
    offset = 0
    while offset < len(span):
        name, size, kind = read_header(span[offset : offset + BLOCK], where=where, offset=offset)
        data = offset + BLOCK
        offset = data + size + padding(size)
        if offset > len(span):
            raise FormatError(
                f"{where}: member {name!r} reaches {offset - len(span)} bytes beyond its sample"
            )
        if kind not in (b"0", b"\0"):
            # shards written by others: names that do not fit a header precede it, as a PAX record or a GNU member
            if kind == b"x":
                long_name = _pax_path(bytes(span[data : data + size])) or long_name
            elif kind == b"L":
                long_name = _text(bytes(span[data : data + size]))
            elif kind not in (b"g", b"K"):
                long_name = None
            continue
        parsed = split_name(long_name or name)
        long_name = None
        if parsed is None:
            continue
        member_key, field = parsed
        if members and member_key != key:
            raise FormatError(f"{where}: members of two samples, {key!r} and {member_key!r}")
        key = member_key
        members.append((field, span[data : data + size]))
    if not members:
        raise FormatError(f"{where}: no members")
    return key, members


def read_header(header: memoryview, *, where: str, offset: int) -> tuple[str, int, bytes]:
    """Name, data size and type flag of one header. Bytes of the name that are not UTF-8 are escaped.

    Raises:
        FormatError: it is not a tar header.
    """
    block = bytes(header)
    # before POSIX there was no magic; the checksum tells headers from data
    if len(block) < BLOCK or block[257:262] not in (b"ustar", bytes(5)) or not _checksum_holds(block):
        raise FormatError(f"{where}: no tar header at byte {offset} of the sample")
    kind = block[156:157]
    digits = block[124:136].strip(b"\0 ")
    if digits.strip(b"01234567"):
        raise FormatError(f"{where}: damaged tar header at byte {offset} of the sample (size {digits!r})")
    # links, devices and folders have no data, whatever their size says
    size = 0 if kind in _WITHOUT_DATA else int(digits or b"0", 8)
    name = _text(block[:100])
    # a GNU header keeps times where ustar keeps the prefix; "ustar  " tells them apart
    prefix = _text(block[345:500]) if block[257:263] == b"ustar\0" else ""
    return (f"{prefix}/{name}" if prefix else name), size, kind


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _pax_path(data: bytes) -> str | None:
    """The record ``path`` of a PAX extended header; a record is its own length, a blank, keyword=value and a newline."""
    path = None
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length[:9]) <= len(data):
            break
        keyword, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path":
            path = _text(value)
        data = data[int(length) :]
    return path


def _checksum_holds(block: bytes) -> bool:
    try:
        expected = int(block[148:156].strip(b"\0 ") or b"0", 8)
    except ValueError:
        return False
    return sum(block) - sum(block[148:156]) + 8 * 32 == expected
