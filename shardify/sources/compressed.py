"""Record files compressed with zstd: ``.json.zst``, ``.jsonl.zst``."""

import os
from io import FileIO

import xxhash
import zstandard

from shardify.errors import SourceError
from shardify.sources.spool import require_room, write_whole

MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK = 1024 * 1024
# One call gives back all that its piece expands to. A piece of a bomb of this size expands to 128 MiB, a block of 128 KiB out of four bytes.
_PIECE = 4096
_MAX_WINDOW = 128 * 1024 * 1024  # as the zstd command has it
_MAX_RATIO = 1000  # JSON that says one thing over and over reaches 100
_SMALL = 1024**3  # of no concern, whatever the ratio


def decompress(path: str, target: str, *, called: str) -> str:
    """Decompress a file of one or more zstd frames into the spool.

    Args:
        path: the compressed file.
        target: the file to write.
        called: what the source is called in errors.

    Returns:
        xxh3_128 of the compressed file, hexadecimal.

    Raises:
        SourceError: it is damaged or cut off (with the byte where), expands to more than any data set, or does not fit the disk.
    """
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb") as source, FileIO(target, "w") as file:
            size = os.fstat(source.fileno()).st_size
            most = max(_SMALL, _MAX_RATIO * size)
            require_room(
                os.path.dirname(target), min(_content_size(source.read(18), size), most), called=called
            )
            source.seek(0)
            frame: zstandard.ZstdDecompressionObj | None = None
            at = written = 0
            while block := source.read(_BLOCK):
                digest.update(block)
                for start in range(0, len(block), _PIECE):
                    rest = block[start : start + _PIECE]
                    while rest:
                        frame = (
                            frame or zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
                        )
                        data = frame.decompress(rest)
                        rest = b""
                        if frame.eof:
                            rest, frame = frame.unused_data, None
                        written += len(data)
                        if written > most:
                            raise SourceError(
                                f"{called}: {size} bytes expand to more than {most}: a bomb, not records; decompress it yourself if "
                                "it is what you want"
                            )
                        write_whole(file, data, called=called)
                    at += min(_PIECE, len(block) - start)
    except zstandard.ZstdError as error:
        raise SourceError(f"{called}: no zstd file, or damaged, near byte {at} ({error})") from None
    except OSError as error:
        raise SourceError(f"{called}: cannot be read ({error.strerror or error})") from None
    if frame is not None:
        raise SourceError(
            f"{called}: cut off: the file ends at byte {size}, inside a zstd frame; get it again"
        )
    return digest.hexdigest()


def _content_size(start: bytes, size: int) -> int:
    """What the first frame says of its size, where it does; at least the compressed size."""
    try:
        said = zstandard.get_frame_parameters(start).content_size
    except zstandard.ZstdError:
        return size
    return size if said >= 1 << 63 else max(said, size)
