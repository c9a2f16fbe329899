"""The Parquet file beside each shard: one row per sample in tar order, for people and tools.

Its key-value metadata (key ``shardify``, JSON) carries what else is known of the shard: the tar's bytes and xxh3_128, the records set aside
while it was written, and the counts of notes. A finished sidecar is thus all that a continued run needs to know of a finished shard.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from shardify.errors import FormatError
from shardify.format.tar import Member

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("record", pa.int64(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field(
            "members",
            pa.list_(
                pa.struct(
                    [
                        pa.field("field", pa.string(), nullable=False),
                        pa.field("offset", pa.int64(), nullable=False),
                        pa.field("size", pa.int64(), nullable=False),
                        pa.field("xxh3_64", pa.uint64(), nullable=False),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field(
            "images",
            pa.list_(
                pa.struct(
                    [
                        pa.field("field", pa.string(), nullable=False),
                        pa.field("format", pa.string(), nullable=False),
                        pa.field("width", pa.int32(), nullable=False),
                        pa.field("height", pa.int32(), nullable=False),
                    ]
                )
            ),
            nullable=False,
        ),
        pa.field("turns", pa.int32(), nullable=False),
        pa.field("words", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
_METADATA_KEY = b"shardify"
_MAX_METADATA_BYTES = 2**31 - 1  # what a shard of nothing but records set aside may need


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image as stored: its member's field, sniffed format (``jpg``, ``png`` ...), width and height in pixels, EXIF ignored."""

    field: str
    format: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of the sidecar: `offset` and `size` span the sample from its first header to its padded end."""

    key: str
    id: str | None
    record: int
    offset: int
    size: int
    members: Sequence[Member]
    images: Sequence[ImageInfo]
    turns: int
    words: int
    source: str


class SetAside(msgspec.Struct, frozen=True, omit_defaults=False):
    """One record that was not packed, with its first reason: one line of quarantine.jsonl."""

    record: int
    source: str
    id: str | None
    code: str
    detail: str
    image: str | None


class ShardInfo(msgspec.Struct, frozen=True):
    """The sidecar's metadata.

    Attributes:
        bytes: size of the tar.
        xxh3_128: of the tar, hexadecimal.
        set_aside: records planned for this shard that could not be packed.
        notes: kept-and-counted reasons -> how many records.
        tolerant: rows whose JSON member only a tolerant reader accepts.
        plan: identifies the plan that the shard was written by; empty for shards made by others.
    """

    bytes: int
    xxh3_128: str
    set_aside: list[SetAside] = []
    notes: dict[str, int] = {}
    tolerant: list[int] = []
    plan: str = ""


def write_sidecar(path: str | os.PathLike[str], rows: Sequence[SampleRow], info: ShardInfo) -> None:
    """Write the sidecar and flush it to disk. Equal rows and info give equal bytes (for one version of pyarrow)."""
    table = pa.table(
        {
            "key": [row.key for row in rows],
            "id": [row.id for row in rows],
            "record": [row.record for row in rows],
            "offset": [row.offset for row in rows],
            "size": [row.size for row in rows],
            "members": [
                [
                    {"field": m.field, "offset": m.offset, "size": m.size, "xxh3_64": m.xxh3_64}
                    for m in row.members
                ]
                for row in rows
            ],
            "images": [
                [
                    {"field": i.field, "format": i.format, "width": i.width, "height": i.height}
                    for i in row.images
                ]
                for row in rows
            ],
            "turns": [row.turns for row in rows],
            "words": [row.words for row in rows],
            "source": [row.source for row in rows],
        },
        schema=SCHEMA,
    ).replace_schema_metadata({_METADATA_KEY: msgspec.json.encode(info)})
    with open(path, "wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())


def read_sidecar(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """The sidecar's rows, all columns or those named.

    Raises:
        FormatError: it is missing, or not a sidecar.
    """
    try:
        with open(path, "rb") as file:
            table = pq.read_table(
                file,
                columns=list(columns) if columns is not None else None,
                page_checksum_verification=True,
                thrift_string_size_limit=_MAX_METADATA_BYTES,
            )
    except FileNotFoundError:
        raise FormatError(f"{os.fspath(path)}: no such sidecar") from None
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise FormatError(f"{os.fspath(path)}: not a readable sidecar ({error})") from None
    wanted = SCHEMA if columns is None else [SCHEMA.field(name) for name in columns]
    for field in wanted:
        if field.name not in table.schema.names or table.schema.field(field.name).type != field.type:
            raise FormatError(f"{os.fspath(path)}: column {field.name!r} of type {field.type} is missing")
    return table


def _metadata(file: BinaryIO) -> dict[bytes, bytes]:
    opened = pq.ParquetFile(file, thrift_string_size_limit=_MAX_METADATA_BYTES)
    found: dict[bytes, bytes] = opened.schema_arrow.metadata or {}
    return found


def read_shard_info(path: str | os.PathLike[str]) -> ShardInfo:
    """The sidecar's metadata, without its rows.

    Raises:
        FormatError: it is missing, or not a sidecar written by shardify.
    """
    try:
        with open(path, "rb") as file:
            metadata = _metadata(file)
        return msgspec.json.decode(metadata[_METADATA_KEY], type=ShardInfo)
    except FileNotFoundError:
        raise FormatError(f"{os.fspath(path)}: no such sidecar") from None
    except KeyError:
        raise FormatError(f"{os.fspath(path)}: a Parquet file, but not written by shardify") from None
    except (pa.ArrowInvalid, pa.ArrowException, OSError, msgspec.MsgspecError) as error:
        raise FormatError(f"{os.fspath(path)}: not a readable sidecar ({error})") from None


def is_sidecar(path: str | os.PathLike[str]) -> bool:
    """Whether to treat a file as a sidecar: False for another tool's Parquet file, such as img2dataset's.

    A damaged file counts as a sidecar, so that reading it says what is wrong.
    """
    try:
        with open(path, "rb") as file:
            return _METADATA_KEY in _metadata(file)
    except (pa.ArrowInvalid, pa.ArrowException, OSError):
        return True
