"""The Parquet file beside each shard: one row per sample in tar order, for people and tools.

Its key-value metadata (key ``shardify``, JSON) carries what else is known of the shard: the tar's bytes and xxh3_128, the records set aside
while it was written, and the counts of notes. A finished sidecar is thus all that a continued run needs to know of a finished shard.
"""

import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, BinaryIO, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from shardify.errors import FormatError
from shardify.format.tar import Member, Sink

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
# what Arrow raises over damaged files; texts that are no UTF-8 among them
_UNREADABLE = (pa.ArrowException, OSError, ValueError)
_MAX_METADATA_BYTES = 2**31 - 1  # what a shard of nothing but records set aside may need


class ImageInfo(NamedTuple):
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


# made here: threads that need a type's first decoder at the same moment crash in msgspec 0.22
_decode_info = msgspec.json.Decoder(ShardInfo).decode
decode_set_aside = msgspec.json.Decoder(SetAside).decode
"""One record that was set aside, from a line of JSON."""


def write_sidecar(path: str | os.PathLike[str], rows: Sequence[SampleRow], info: ShardInfo) -> None:
    """Write the sidecar of these rows; see `SidecarBuilder.write`."""
    builder = SidecarBuilder()
    for row in rows:
        builder.add(
            key=row.key,
            id=row.id,
            record=row.record,
            members=row.members,
            images=row.images,
            turns=row.turns,
            words=row.words,
            source=row.source,
        )
    builder.write(path, np.array([(row.offset, row.size) for row in rows], np.int64).reshape(-1, 2), info)


class _Numbers(dict[str, int]):
    """Texts that repeat, numbered as they come."""

    def __missing__(self, text: str) -> int:
        number = self[text] = len(self)
        return number


_MOST_WAITING = 1024  # rows


class SidecarBuilder:
    """Gathers the rows of a sidecar column by column: about 250 bytes a sample, and no object for each member but of the last few."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._ids: list[str | None] = []
        self._records = array("q")
        self._turns = array("i")
        self._words = array("i")
        self._sources = array("I")  # strings that repeat are kept by number
        self._source_numbers = _Numbers()
        self._field_numbers = _Numbers()
        self._format_numbers = _Numbers()
        self._member_ends = array("i", [0])
        self._member_fields = array("I")
        self._member_offsets = array("q")
        self._member_sizes = array("q")
        self._member_hashes = array("Q")
        self._image_ends = array("i", [0])
        self._image_fields = array("I")
        self._image_formats = array("I")
        self._image_widths = array("i")
        self._image_heights = array("i")
        # rows, members and images that are no columns yet
        self._rows: list[tuple[str, str | None, int, int, int, str, int, int]] = []
        self._members: list[Member] = []
        self._images: list[ImageInfo] = []

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._keys) + len(self._rows)

    def add(
        self,
        *,
        key: str,
        id: str | None,  # noqa: A002 - as the column
        record: int,
        members: Sequence[Member],
        images: Sequence[ImageInfo],
        turns: int,
        words: int,
        source: str,
    ) -> None:
        """Append a row; the arguments are the columns of `SCHEMA`. Rows are added so, or all by `add_rows`."""
        self._members += members
        self._images += images
        self._rows.append((key, id, record, turns, words, source, len(members), len(images)))
        if len(self._rows) == _MOST_WAITING:
            self._to_columns()

    def _to_columns(self) -> None:
        """Make columns of the rows that wait."""
        if self._members:
            self.add_members(*map(list, zip(*self._members, strict=True)))
        if self._images:
            self.add_images(*map(list, zip(*self._images, strict=True)))
        if self._rows:
            keys, ids, records, turns, words, sources, members, images = zip(*self._rows, strict=True)
            self._keys += keys
            self._ids += ids
            self._records.extend(records)
            self._turns.extend(turns)
            self._words.extend(words)
            self._sources.extend(map(self._source_numbers.__getitem__, sources))
            self._member_ends.extend(islice(accumulate(members, initial=self._member_ends[-1]), 1, None))
            self._image_ends.extend(islice(accumulate(images, initial=self._image_ends[-1]), 1, None))
        self._members.clear()
        self._images.clear()
        self._rows.clear()

    def add_members(self, fields: list[str], offsets: list[int], sizes: list[int], hashes: list[int]) -> None:
        """Add the members of many rows; all of these rows are added by `add_rows`."""
        self._member_fields.extend(map(self._field_numbers.__getitem__, fields))
        self._member_offsets.fromlist(offsets)
        self._member_sizes.fromlist(sizes)
        self._member_hashes.fromlist(hashes)

    def add_images(
        self, fields: list[str], formats: list[str], widths: list[int], heights: list[int]
    ) -> None:
        """Add the images of many rows, likewise."""
        self._image_fields.extend(map(self._field_numbers.__getitem__, fields))
        self._image_formats.extend(map(self._format_numbers.__getitem__, formats))
        self._image_widths.fromlist(widths)
        self._image_heights.fromlist(heights)

    def add_rows(  # noqa: PLR0917 - column by column
        self,
        keys: list[str],
        ids: list[str | None],
        turns: list[int],
        words: list[int],
        member_ends: list[int],
        image_ends: list[int],
        *,
        source: str,
    ) -> None:
        """Append rows whose records are numbered as they come; each ends with that many of all members and of all images."""
        self._records.extend(range(len(self), len(self) + len(keys)))
        self._keys += keys
        self._ids += ids
        self._turns.fromlist(turns)
        self._words.fromlist(words)
        self._sources.extend([self._source_numbers[source]] * len(keys))
        self._member_ends.fromlist(member_ends)
        self._image_ends.fromlist(image_ends)

    def encode(self, spans: npt.NDArray[np.int64], info: ShardInfo) -> memoryview:
        """The sidecar's bytes. Equal rows, spans and info give equal bytes (for one version of pyarrow).

        Args:
            spans: [samples, 2], offset and size of each sample.
            info: what else is known of the shard.
        """
        self._to_columns()
        spans = np.asarray(spans, np.int64).reshape(len(self), 2)
        columns = {
            "key": _texts(self._keys),
            "id": _texts(self._ids),
            "record": _to_arrow(self._records, pa.int64()),
            "offset": _numbers(spans[:, 0], pa.int64()),
            "size": _numbers(spans[:, 1], pa.int64()),
            "members": _lists(
                "members",
                self._member_ends,
                [
                    _strings(self._member_fields, self._field_numbers),
                    _to_arrow(self._member_offsets, pa.int64()),
                    _to_arrow(self._member_sizes, pa.int64()),
                    _to_arrow(self._member_hashes, pa.uint64()),
                ],
            ),
            "images": _lists(
                "images",
                self._image_ends,
                [
                    _strings(self._image_fields, self._field_numbers),
                    _strings(self._image_formats, self._format_numbers),
                    _to_arrow(self._image_widths, pa.int32()),
                    _to_arrow(self._image_heights, pa.int32()),
                ],
            ),
            "turns": _to_arrow(self._turns, pa.int32()),
            "words": _to_arrow(self._words, pa.int32()),
            "source": _strings(self._sources, self._source_numbers),
        }
        table = pa.table(columns, schema=SCHEMA)
        table = table.replace_schema_metadata({_METADATA_KEY: msgspec.json.encode(info)})
        stream = pa.BufferOutputStream()
        pq.write_table(table, stream, compression="zstd", write_page_checksum=True)
        return memoryview(stream.getvalue()).cast("B")

    def write(
        self, target: str | os.PathLike[str] | Sink, spans: npt.NDArray[np.int64], info: ShardInfo
    ) -> None:
        """Write the sidecar to a path, flushed to disk, or into an open file; the other arguments are those of `encode`."""
        content = self.encode(spans, info)
        if isinstance(target, str | os.PathLike):
            with open(target, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return
        while content:
            content = content[target.write(content) or 0 :]


def _to_arrow(column: "array[int]", kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(column)])


# not pa.array, which imports pandas at its first use where that is installed: as long as a shard takes


def _numbers(column: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(np.ascontiguousarray(column))])


def _texts(texts: Sequence[str | None]) -> pa.Array:
    encoded = [b"" if text is None else text.encode() for text in texts]
    ends = np.zeros(len(texts) + 1, np.int32)
    np.cumsum([len(text) for text in encoded], out=ends[1:])
    absent = [text is None for text in texts]
    valid = pa.py_buffer(np.packbits(~np.array(absent), bitorder="little")) if any(absent) else None
    return pa.Array.from_buffers(
        pa.string(), len(texts), [valid, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    )


def _strings(column: "array[int]", numbers: dict[str, int]) -> pa.Array:
    return _texts(list(numbers)).take(_to_arrow(column, pa.uint32()))


def _lists(name: str, ends: "array[int]", children: list[pa.Array]) -> pa.Array:
    kind = SCHEMA.field(name).type
    values = pa.StructArray.from_arrays(children, fields=list(kind.value_type))
    return pa.ListArray.from_arrays(_to_arrow(ends, pa.int32()), values, type=kind)


def read_sidecar(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None, *, file: BinaryIO | None = None
) -> pa.Table:
    """The sidecar's rows, all columns or those named.

    Args:
        path: where it is.
        columns: which; None for all.
        file: the sidecar, opened already; `path` then only names it in errors.

    Raises:
        FormatError: it is missing, or not a sidecar.
    """
    try:
        with _opened(path, file) as opened:
            parquet = pq.ParquetFile(
                opened,
                page_checksum_verification=True,
                pre_buffer=False,
                thrift_string_size_limit=_MAX_METADATA_BYTES,
            )
            # no thread of Arrow's: see `_opened`
            table = parquet.read(list(columns) if columns is not None else None, use_threads=False)
    except FileNotFoundError:
        raise FormatError(f"{os.fspath(path)}: no such sidecar") from None
    except _UNREADABLE as error:
        raise FormatError(f"{os.fspath(path)}: not a readable sidecar ({error})") from None
    wanted = SCHEMA if columns is None else [SCHEMA.field(name) for name in columns]
    for field in wanted:
        if field.name not in table.schema.names or table.schema.field(field.name).type != field.type:
            raise FormatError(f"{os.fspath(path)}: column {field.name!r} of type {field.type} is missing")
    return table


def numbers_of(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column of whole numbers without nulls, as an array. Not by Arrow's `to_numpy`, which imports pandas where that is installed."""
    dtype = np.dtype(str(column.type))
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype, len(chunk), chunk.offset * dtype.itemsize)
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _opened(path: str | os.PathLike[str], file: BinaryIO | None = None) -> pa.NativeFile:
    """A file of Arrow's own: its threads let go of Python's even while the interpreter ends, which aborts the process now and then."""
    return pa.OSFile(os.fsencode(path), "rb") if file is None else pa.BufferReader(file.read())


def _metadata(file: pa.NativeFile) -> dict[bytes, bytes]:
    opened = pq.ParquetFile(file, thrift_string_size_limit=_MAX_METADATA_BYTES)
    found: dict[bytes, bytes] = opened.schema_arrow.metadata or {}
    return found


def read_shard_info(path: str | os.PathLike[str], *, file: BinaryIO | None = None) -> ShardInfo:
    """The sidecar's metadata, without its rows; the arguments are those of `read_sidecar`.

    Raises:
        FormatError: it is missing, or not a sidecar written by shardify.
    """
    try:
        with _opened(path, file) as opened:
            metadata = _metadata(opened)
        return _decode_info(metadata[_METADATA_KEY])
    except FileNotFoundError:
        raise FormatError(f"{os.fspath(path)}: no such sidecar") from None
    except KeyError:
        raise FormatError(f"{os.fspath(path)}: a Parquet file, but not written by shardify") from None
    except (*_UNREADABLE, msgspec.MsgspecError) as error:
        raise FormatError(f"{os.fspath(path)}: not a readable sidecar ({error})") from None


def is_sidecar(path: str | os.PathLike[str]) -> bool:
    """Whether to treat a file as a sidecar: False for another tool's Parquet file, such as img2dataset's.

    A damaged file counts as a sidecar, so that reading it says what is wrong.
    """
    try:
        with _opened(path) as file:
            return _METADATA_KEY in _metadata(file)
    except _UNREADABLE:
        return True
