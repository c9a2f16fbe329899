"""Tar shards in zstd frames that can be read one by one: ``.tar.zst``.

    frame 0          samples 0..7, their tar bytes
    frame 1          sample 8
    ...
    last frame       the end-of-archive mark
    seek table       a skippable frame: compressed and decompressed size and checksum of every frame

Any zstd reader takes the frames one after another and passes over the table, so that the file is a plain ``.tar.zst``. The table is that of the
Zstandard Seekable Format 0.1.0 (facebook/zstd, contrib/seekable_format/zstd_seekable_compression_format.md).
"""

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from shardify.errors import FormatError

FRAME_BYTES = 256 * 1024
"""Tar bytes gathered into one frame; a sample is never divided, so that a larger one makes a larger frame."""

MAX_FRAME_BYTES = 1024**3
"""Tar bytes that a frame may hold: the largest sample of a compressed shard, and what reading one may cost."""

_LEVEL = 3
_PIECE = 1024  # of a frame: what becomes of it is at most 32 MiB (blocks of 128 KiB from 4 bytes)
_SKIPPABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_SKIPPABLE_HEADER = struct.Struct("<II")  # magic, bytes that follow
_FOOTER = struct.Struct("<IBI")  # frames, descriptor, magic
_HAS_CHECKSUMS = 0x80
_RESERVED_BITS = 0x7C
_MAX_FRAMES = 0x8000000


class FrameWriter:
    """Compresses frames and keeps their sizes for the seek table."""

    def __init__(self) -> None:
        # one thread and the content size in each header: equal content gives equal bytes
        self._compressor = zstandard.ZstdCompressor(
            level=_LEVEL, write_checksum=True, write_content_size=True
        )
        self._entries = array("I")  # compressed size, decompressed size, checksum of each frame
        self._bytes = 0

    def __len__(self) -> int:
        """How many frames there are."""
        return len(self._entries) // 3

    def compress(self, pieces: Sequence[bytes | memoryview]) -> bytes:
        """The next frame, which holds these pieces.

        Raises:
            FormatError: they are more than `MAX_FRAME_BYTES`.
        """
        size = sum(len(piece) for piece in pieces)
        if size > MAX_FRAME_BYTES:
            raise FormatError(
                f"a sample of {size} bytes does not fit a zstd frame, which holds {MAX_FRAME_BYTES}; write these shards uncompressed"
            )
        content = b"".join(pieces)
        frame = self._compressor.compress(content)
        self._entries.extend((len(frame), size, _checksum(content)))
        self._bytes += len(frame)
        return frame

    def spans(self) -> npt.NDArray[np.int64]:
        """int64 [frames, 2]: offset and size of each frame in the file."""
        sizes = np.array(self._entries, np.int64).reshape(-1, 3)[:, 0]
        return np.stack([np.cumsum(sizes) - sizes, sizes], axis=1)

    def seek_table(self) -> bytes:
        """The skippable frame that ends the file."""
        entries = np.array(self._entries, "<u4").tobytes()
        footer = _FOOTER.pack(len(self), _HAS_CHECKSUMS, _SEEKABLE_MAGIC)
        return _SKIPPABLE_HEADER.pack(_SKIPPABLE_MAGIC, len(entries) + len(footer)) + entries + footer


@dataclass(frozen=True, slots=True, eq=False)
class SeekTable:
    """The frames of a file.

    Attributes:
        starts: int64 [frames + 1], where each frame begins, and where the last one ends: there the table begins.
        sizes: int64 [frames], decompressed.
        checksums: uint32 [frames], the low half of xxh64 of each frame's content; None when the table has none.
    """

    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    checksums: npt.NDArray[np.uint32] | None


def read_seek_table(file: BinaryIO, *, where: str) -> SeekTable | None:
    """The seek table at the end of a file; None when there is none.

    Args:
        file: seekable; it is left anywhere.
        where: names the file in errors.

    Raises:
        FormatError: the table does not fit the file.
    """
    total = file.seek(0, 2)
    file.seek(max(0, total - _FOOTER.size))
    footer = file.read(_FOOTER.size)
    if len(footer) < _FOOTER.size:
        return None
    frames, descriptor, magic = _FOOTER.unpack(footer)
    if magic != _SEEKABLE_MAGIC:
        return None
    columns = 3 if descriptor & _HAS_CHECKSUMS else 2
    length = frames * columns * 4 + _FOOTER.size
    begin = total - length - _SKIPPABLE_HEADER.size
    if descriptor & _RESERVED_BITS or frames > _MAX_FRAMES or begin < 0:
        raise FormatError(f"{where}: damaged seek table: {frames} frames in a file of {total} bytes")
    file.seek(begin)
    if _SKIPPABLE_HEADER.unpack(file.read(_SKIPPABLE_HEADER.size)) != (_SKIPPABLE_MAGIC, length):
        raise FormatError(f"{where}: damaged seek table: it should begin at byte {begin}")
    entries = np.frombuffer(file.read(frames * columns * 4), "<u4").reshape(frames, columns)
    starts = np.zeros(frames + 1, np.int64)
    np.cumsum(entries[:, 0], dtype=np.int64, out=starts[1:])
    if starts[-1] != begin:
        raise FormatError(
            f"{where}: damaged seek table: its frames end at byte {starts[-1]}, but it begins at byte {begin}"
        )
    return SeekTable(starts, entries[:, 1].astype(np.int64), entries[:, 2] if columns == 3 else None)


def read_frame(file: BinaryIO, table: SeekTable, number: int, *, where: str) -> bytes:
    """The content of one frame, checked against the seek table.

    Raises:
        FormatError: the frame is damaged or not that of its entry; `where` and its first byte are named.
    """
    begin, end = int(table.starts[number]), int(table.starts[number + 1])
    size = int(table.sizes[number])
    at = f"{where}: frame at byte {begin}"
    if max(size, end - begin) > MAX_FRAME_BYTES:
        raise FormatError(f"{at}: {size} bytes; at most {MAX_FRAME_BYTES} are read")
    file.seek(begin)
    content = decompress_frame(file.read(end - begin), where=at, limit=size)
    if len(content) != size:
        raise FormatError(f"{at}: holds {len(content)} bytes, but the seek table says {size}")
    if table.checksums is not None and _checksum(content) != table.checksums[number]:
        raise FormatError(f"{at}: its content is not that of its checksum in the seek table")
    return content


def _checksum(content: bytes) -> int:
    return xxhash.xxh64_intdigest(content) & 0xFFFFFFFF


def decompress_frame(frame: bytes | memoryview, *, where: str, limit: int = MAX_FRAME_BYTES) -> bytes:
    """The content of one zstd frame.

    Args:
        frame: from its magic number to its last byte.
        where: names it in errors.
        limit: refuse content of more bytes; no more memory than that is used.

    Raises:
        FormatError: it is damaged, cut off, more than one frame, or its content larger than `limit`.
    """
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size == zstandard.CONTENTSIZE_UNKNOWN:
            return _decompress_by_pieces(frame, where=where, limit=limit)
        if size > limit:
            raise FormatError(f"{where}: a zstd frame of {size} bytes; at most {limit} are read")
        content: bytes = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{where}: not a zstd frame, or a damaged one ({error})") from None
    return content


def _decompress_by_pieces(frame: bytes | memoryview, *, where: str, limit: int) -> bytes:
    """Written by others, as a stream: how large it becomes shows only on the way."""
    pieces: list[bytes] = []
    done = 0
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    for at in range(0, len(frame), _PIECE):
        pieces.append(decompressor.decompress(frame[at : at + _PIECE]))
        done += len(pieces[-1])
        if done > limit:
            raise FormatError(f"{where}: a zstd frame of more than {limit} bytes; no more are read")
    if not decompressor.eof or decompressor.unused_data:
        raise FormatError(f"{where}: not one whole zstd frame")
    return b"".join(pieces)
