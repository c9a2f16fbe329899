"""Parquet as on the Hugging Face hub: a row is a record, a column a field, in the order of the columns.

    id: string    image: struct<bytes: binary, path: string>    conversations: list<struct<from: string, value: string>>    data_source: string

Images come as such a struct, as bytes, or as a list of either; null is no image. Their bytes are spooled, and the record's `image` is their
path (a list for a list), or the row's number where it has none. Columns of paths stay as they are. Turns may also be JSON texts, or a struct
of lists, as `datasets` writes a sequence of structs. What JSON has no form for becomes a text (times in ISO 8601, decimals) or, when it is
bytes, NaN or infinity, null, which is counted.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shardify.errors import ImageError, RecordError, SourceError
from shardify.images.probe import probe
from shardify.records import ImageRef
from shardify.sources.spool import FIELD_DROPPED, Spool

_BATCH_BYTES = 32 * 1024 * 1024
_BATCH_ROWS = 4096
_BATCH_IMAGES = 64  # rows; of one image for all, a row group says only its size once
_IMAGE_COLUMNS = ("image", "images")
_TURN_COLUMNS = ("conversations", "messages", "texts")
_Rows = npt.NDArray[np.int64]


def read_parquet(paths: Sequence[str], spool: Spool) -> None:
    """Spool the rows of Parquet files, a piece of a row group at a time.

    Args:
        paths: the files, in order; they may differ in columns.
        spool: takes the records and their images.

    Raises:
        SourceError: a file is no Parquet, damaged, or has a column that JSON has no form for.
    """
    for path in paths:
        with open_parquet(path) as file:
            schema = file.schema_arrow
            repeated = sorted({name for name in schema.names if schema.names.count(name) > 1})
            if repeated:
                raise SourceError(f"{path}: two columns are named {repeated[0]!r}; rename one")
            image_column = _image_column(schema, path)
            row = 0
            for batch in _batches(file, path, _BATCH_IMAGES if image_column else _BATCH_ROWS):
                _add_rows(batch, image_column, spool, where=f"{path}: row {row}")
                row += batch.num_rows


def spool_bytes(paths: Sequence[str]) -> tuple[int, bool]:
    """How much the spool will take at most, about, and whether images are among it.

    Raises:
        SourceError: a file is no Parquet, or damaged.
    """
    total, embeds = 0, False
    for path in paths:
        with open_parquet(path) as file:
            total += sum(
                file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups)
            )
            embeds |= bool(_image_column(file.schema_arrow, path))
    return total, embeds


def open_parquet(path: str) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        SourceError: it is none, or damaged.
    """
    try:
        # no buffer of whole column chunks: a row group of images may be gigabytes
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1024 * 1024)
        _read_names(file.schema_arrow)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path}: no Parquet file, or damaged ({_first_line(error)}); get it again"
        ) from None
    return file


def _read_names(fields: Iterable[pa.Field]) -> None:
    """Read all names, which nothing else has done yet.

    Raises:
        UnicodeDecodeError: one is not UTF-8.
    """
    for field in fields:
        _ = field.name
        _read_names(field.type.field(number) for number in range(field.type.num_fields))


def _batches(file: pq.ParquetFile, path: str, most: int) -> Iterator[pa.RecordBatch]:
    row = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        size = max(1, group.total_byte_size // max(1, group.num_rows))
        rows = min(most, max(1, _BATCH_BYTES // size))
        try:
            for batch in file.iter_batches(batch_size=rows, row_groups=[number], use_threads=False):
                row += batch.num_rows
                yield batch
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"{path}: row group {number} cannot be read from row {row} on ({_first_line(error)}); get it again"
            ) from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _image_column(schema: pa.Schema, path: str) -> str:
    """The column that images come in; empty when there is none.

    Raises:
        SourceError: several may be meant.
    """
    for name in _IMAGE_COLUMNS:
        if name in schema.names and _holds_bytes(schema.field(name).type):
            return name
    structs = [field.name for field in schema if _is_image_struct(_inner(field.type))]
    if len(structs) > 1 and not set(_IMAGE_COLUMNS).intersection(schema.names):
        raise SourceError(
            f"{path}: images in the columns {', '.join(map(repr, structs))}; rename one 'image', or put them into a list 'images'"
        )
    return structs[0] if len(structs) == 1 else ""


def _inner(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if _is_list(kind) else kind


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _is_image_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(
        field.name == "bytes" and _is_binary(field.type) for field in kind
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    inner = _inner(kind)
    return _is_binary(inner) or _is_image_struct(inner)


@dataclass(frozen=True, slots=True)
class _Images:
    """The images of one row; `data` or `paths` may be None, one by one."""

    data: list[bytes | None]
    paths: list[str | None]
    is_list: bool


def _add_rows(batch: pa.RecordBatch, image_column: str, spool: Spool, *, where: str) -> None:
    rows = np.arange(batch.num_rows, dtype=np.int64)
    dropped: set[int] = set()
    columns: dict[str, list[Any]] = {}
    images: list[_Images] = []
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        try:
            if name == image_column:
                images = _images(array)
            else:
                values = _values(array, rows, dropped)
                columns[name] = [_turns(value) for value in values] if name in _TURN_COLUMNS else values
        except (pa.ArrowException, OverflowError) as error:
            raise SourceError(
                f"{where} and following, column {name!r} ({array.type}): {_first_line(error)}"
            ) from None
    names = [("image" if name == image_column else name) for name in batch.schema.names]
    for row in range(batch.num_rows):
        record: dict[str, Any] = {}
        data: list[bytes | None] = []
        for name, column in zip(names, batch.schema.names, strict=True):
            if column != image_column:
                if name == "image" and image_column and _has_image(images[row]):
                    if columns[column][row] is not None:
                        dropped.add(row)  # the picture takes its place
                    continue
                record[name] = columns[column][row]
            elif _has_image(images[row]):
                data = images[row].data
                named = _names(images[row], len(spool))
                record["image"] = named if images[row].is_list else named[0]
        notes = (FIELD_DROPPED,) if row in dropped else ()
        spool.add_record(record, data, notes=notes)


def _has_image(images: _Images) -> bool:
    return any(images.paths) or any(item is not None for item in images.data)


def _names(images: _Images, row: int) -> list[str]:
    """What a record calls its images: the paths they came with, or the row's number and their format."""
    names = []
    for number, (data, path) in enumerate(zip(images.data, images.paths, strict=True)):
        if data is None:
            names.append(path or "")
        elif path and (safe := _safe(path)):
            names.append(safe)
        else:
            try:
                extension = probe(data).format
            except ImageError:
                extension = "bin"
            names.append(f"{row:09d}.{number}.{extension}" if images.is_list else f"{row:09d}.{extension}")
    return names


def _safe(path: str) -> str:
    """A path that only names bytes which are here: its last part where the whole would leave an image root."""
    try:
        ImageRef(path).parts()
    except RecordError:
        return os.path.basename(path.replace("\\", "/").rstrip("/")).strip(".:\0")
    return path


def _images(array: pa.Array) -> list[_Images]:
    is_list = _is_list(array.type)
    if pa.types.is_fixed_size_list(array.type):  # flattened, it would leave nulls their places
        array = array.cast(pa.list_(array.type.value_type))
    inner = _inner(array.type)
    flat = array.flatten() if is_list else array
    data: list[bytes | None]
    paths: list[str | None]
    if _is_binary(inner):
        data, paths = flat.to_pylist(), [None] * len(flat)
    else:
        names = [field.name for field in inner]
        fields = flat.flatten()  # null where the struct is
        data = fields[names.index("bytes")].to_pylist()
        paths = _texts(fields[names.index("path")]) if "path" in names else [None] * len(flat)
    if not is_list:
        return [_Images([item], [path], is_list=False) for item, path in zip(data, paths, strict=True)]
    ends = np.cumsum(_list_lengths(array)).tolist()
    return [
        _Images(data[start:end], paths[start:end], is_list=True)
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _list_lengths(array: pa.Array) -> _Rows:
    lengths: _Rows = (
        pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    return lengths


def _texts(array: pa.Array) -> list[Any]:
    try:
        values: list[Any] = array.to_pylist()
    except (
        UnicodeDecodeError
    ):  # Parquet does not check; such a text is kept as a tolerant reader of JSON would have it
        kind = pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()
        values = [
            None if item is None else item.decode("utf-8", "surrogateescape")
            for item in array.cast(kind).to_pylist()
        ]
    return values


def _values(array: pa.Array, rows: _Rows, dropped: set[int]) -> list[Any]:
    """The array as JSON values.

    Args:
        array: of any type.
        rows: int64 [len(array)], the row that each value belongs to.
        dropped: takes the rows in which something has no form in JSON.

    Raises:
        pa.ArrowException: the type has no form in JSON.
    """
    kind = array.type
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _values(array.storage, rows, dropped)
    if types.is_dictionary(kind):
        return _values(array.dictionary_decode(), rows, dropped)
    if types.is_string(kind) or types.is_large_string(kind):
        return _texts(array)
    if types.is_string_view(kind):
        return _values(array.cast(pa.large_string()), rows, dropped)
    if types.is_timestamp(kind):
        return [
            None if text is None else text.replace(" ", "T", 1)
            for text in array.cast(pa.string()).to_pylist()
        ]
    if types.is_date(kind) or types.is_time(kind) or types.is_decimal(kind):
        return list(array.cast(pa.string()).to_pylist())
    if types.is_duration(kind):
        return list(array.cast(pa.int64()).to_pylist())
    if types.is_floating(kind):
        numbers = array.cast(pa.float64()) if types.is_float16(kind) else array
        wrong = pc.fill_null(pc.invert(pc.is_finite(numbers)), False).to_numpy(zero_copy_only=False)
        dropped.update(rows[wrong].tolist())
        return [
            None if bad else value for value, bad in zip(numbers.to_pylist(), wrong.tolist(), strict=True)
        ]
    if _is_binary(kind):
        dropped.update(rows[array.is_valid().to_numpy(zero_copy_only=False)].tolist())
        return [None] * len(array)
    if types.is_struct(kind):
        names = [field.name for field in kind]
        fields = [_values(field, rows, dropped) for field in array.flatten()]
        valid = array.is_valid().to_pylist()
        members = zip(*fields, strict=True) if fields else [()] * len(array)
        return [
            dict(zip(names, row, strict=True)) if good else None
            for row, good in zip(members, valid, strict=True)
        ]
    if types.is_map(kind):
        entry = pa.struct([pa.field("key", kind.key_type), pa.field("value", kind.item_type)])
        return _values(array.cast(pa.list_(entry)), rows, dropped)
    if _is_list(kind):
        if types.is_fixed_size_list(kind):
            array = array.cast(pa.list_(kind.value_type))
        lengths = _list_lengths(array)
        flat = _values(array.flatten(), np.repeat(rows, lengths), dropped)
        ends = np.cumsum(lengths).tolist()
        valid = array.is_valid().to_pylist()
        return [
            flat[start:end] if good else None
            for start, end, good in zip([0, *ends[:-1]], ends, valid, strict=True)
        ]
    if types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind):
        return list(array.to_pylist())
    raise pa.ArrowNotImplementedError("JSON has no form for this type")


def _turns(value: Any) -> Any:
    """Turns as a list of objects, where they are a JSON text or an object of lists."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return value  # no turns: packing sets the record aside
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        columns = list(value.values())
        if all(len(column) == len(columns[0]) for column in columns):
            return [dict(zip(value, turn, strict=True)) for turn in zip(*columns, strict=True)]
    return value
