"""A block: the bytes of one extent in a file of the cache, with what was found wrong in them and a checksum.

    [bytes begin .. end of the shard][faults, JSON; mostly none][footer: magic, lengths of both, xxh3_128 of name, bytes and faults]

The shard's bytes come first, so that byte i of the shard is byte i - begin of the file. A block without faults has `FOOTER_BYTES` more than its
extent: a reader needs no more than the file's size to know.
"""

import os
import struct
from typing import NamedTuple

import msgspec
import xxhash

_FOOTER = struct.Struct("<8sQQ16s")
_MAGIC = b"shblock1"
_CHUNK = 4 * 1024 * 1024

FOOTER_BYTES = _FOOTER.size


class Extent(NamedTuple):
    """Bytes [begin, end) of shard number `shard`, which are fetched as one range."""

    shard: int
    begin: int
    end: int


class Fault(NamedTuple):
    """Bytes [begin, end) of a shard that are not what was written there, and how that shows."""

    begin: int
    end: int
    detail: str


_decode_faults = msgspec.json.Decoder(list[Fault]).decode  # made here: see `shardify.format.sidecar`


def block_name(identity: str, begin: int, end: int) -> str:
    """The file of an extent; `identity` stands for the shard's content and consists of hexadecimal digits."""
    return f"{identity}-{begin:x}-{end:x}"


def shard_identity(url: str, size: int, digest: str) -> str:
    """What stands for a shard's content in names: its recorded hash, or else where it lies and how long it is."""
    return xxhash.xxh3_128_hexdigest(f"{digest or url} {size}".encode())


def end_block(file: int, name: str, content: memoryview, faults: list[Fault]) -> int:
    """Write what follows a block's bytes; gives the bytes written."""
    encoded = msgspec.json.encode(faults) if faults else b""
    tail = encoded + _FOOTER.pack(_MAGIC, len(content), len(encoded), _digest(name, content, encoded))
    write_fully(file, memoryview(tail))
    return len(tail)


def write_fully(file: int, data: memoryview) -> None:
    """Append all of `data` to a file."""
    while data:
        data = data[os.write(file, data) :]


def read_faults(file: int, size: int, total: int) -> list[Fault] | None:
    """The faults of an open block; None when it is no whole block of `size` bytes in a file of `total`."""
    if total == size + FOOTER_BYTES:
        return []
    if total < size + FOOTER_BYTES:
        return None
    encoded = os.pread(file, total - size - FOOTER_BYTES, size)
    try:
        return _decode_faults(encoded)
    except msgspec.MsgspecError:
        return None


def is_whole(path: str, name: str) -> bool:
    """Whether a file is the block of that name, by its checksum: read through once."""
    try:
        with open(path, "rb", buffering=0) as file:
            total = os.fstat(file.fileno()).st_size
            footer = os.pread(file.fileno(), FOOTER_BYTES, max(0, total - FOOTER_BYTES))
            if len(footer) < FOOTER_BYTES:
                return False
            magic, size, faults, digest = _FOOTER.unpack(footer)
            if magic != _MAGIC or size + faults + FOOTER_BYTES != total:
                return False
            state, left = xxhash.xxh3_128(name.encode()), total - FOOTER_BYTES
            while left and (chunk := file.read(min(_CHUNK, left))):
                state.update(chunk)
                left -= len(chunk)
            return not left and state.digest() == digest
    except OSError:
        return False


def _digest(name: str, content: memoryview, faults: bytes) -> bytes:
    state = xxhash.xxh3_128(name.encode())
    state.update(content)
    state.update(faults)
    return state.digest()
