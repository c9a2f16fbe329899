"""The index of a tar made by anyone: what `shardify pack` knows when it writes a shard, read back from the shard itself."""

import os
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import BinaryIO, NamedTuple

import xxhash

from shardify.errors import FormatError, ImageError, RecordError
from shardify.format.hashing import hash_file
from shardify.format.names import RECORD_FIELD, is_image_field
from shardify.format.sidecar import ImageInfo, SampleRow, ShardInfo
from shardify.format.tar import BLOCK, Member, padding, split_name
from shardify.images.probe import probe
from shardify.records import Sample, parse_record

_CHUNK = 4 * 1024 * 1024
_MAX_PARSED_BYTES = 256 * 1024 * 1024  # larger members are hashed in pieces and not looked into


def scan_shard(path: str | os.PathLike[str], *, name: str) -> tuple[list[SampleRow], ShardInfo]:
    """Index a tar: neighbouring members of one key are a sample, as for webdataset.

    ustar, GNU and PAX tars are read, long names too. Folders, links and names that belong to no sample (see `split_name`) are passed over. A
    sample's `record` is its number in the shard, its `source` the shard; `id`, `turns` and `words` are those of a LLaVA record in its
    ``json`` member, None and 0 without one. An image that cannot be read has the format of its extension, and width and height 0.

    Args:
        path: the tar.
        name: what the sidecar names as source.

    Returns:
        The rows in tar order, and what else is known of the shard.

    Raises:
        FormatError: it is no tar, damaged or cut off (with the byte where), or a sample has two members of one name.
    """
    where = os.fspath(path)
    rows: list[SampleRow] = []
    tolerant: list[int] = []
    try:
        with open(path, "rb") as file:
            for key, entries in groupby(_entries(file, where), key=lambda entry: entry.key):
                row, strict = _index_sample(
                    file, key, list(entries), number=len(rows), source=name, where=where
                )
                if not strict:
                    tolerant.append(len(rows))
                rows.append(row)
        info = ShardInfo(bytes=os.stat(path).st_size, xxh3_128=hash_file(path), tolerant=tolerant)
    except OSError as error:
        raise FormatError(f"{where}: cannot be read ({error.strerror or error})") from None
    return rows, info


class _Entry(NamedTuple):
    """One member that belongs to a sample: from `begin`, its first header, its data at `offset`."""

    key: str
    field: str
    begin: int
    offset: int
    size: int


def _entries(file: BinaryIO, where: str) -> Iterator[_Entry]:
    total = os.fstat(file.fileno()).st_size
    for member in _members(file, where):
        at = f"{where}: member {member.name!r} at byte {member.offset}"
        if member.issparse():
            raise FormatError(f"{at} is a sparse file, whose data cannot be read in place")
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            continue
        end = member.offset_data + member.size
        if end > total:
            raise FormatError(
                f"{at} is cut off: it should end at byte {end}, but the file does at byte {total}"
            )
        parsed = split_name(member.name)
        if parsed is not None:
            yield _Entry(*parsed, member.offset, member.offset_data, member.size)


def _members(file: BinaryIO, where: str) -> Iterator[tarfile.TarInfo]:
    archive: tarfile.TarFile | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                yield member
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - tarfile raises nearly anything on damaged headers
        at = archive.offset if archive else 0
        raise FormatError(f"{where}: no tar, or damaged, at byte {at} ({error})") from None
    # tarfile takes whatever is no header for the end
    mark = os.pread(file.fileno(), BLOCK, archive.offset)
    if mark != bytes(BLOCK):
        what = "damaged: no tar header" if len(mark) == BLOCK else "cut off before the end-of-archive mark"
        raise FormatError(f"{where}: {what} at byte {archive.offset}")


def _index_sample(
    file: BinaryIO, key: str, entries: Sequence[_Entry], *, number: int, source: str, where: str
) -> tuple[SampleRow, bool]:
    """The row of a sample, and whether its record is strict JSON."""
    sample: Sample | None = None
    members: dict[str, Member] = {}
    images: list[ImageInfo] = []
    for entry in entries:
        if entry.field in members:
            raise FormatError(
                f"{where}: two members {key}.{entry.field}, the second at byte {entry.begin}; keys of neighbouring samples must differ"
            )
        data, digest = _read(file, entry)
        members[entry.field] = Member(entry.field, entry.offset, entry.size, digest)
        if is_image_field(entry.field):
            images.append(_index_image(entry.field, data))
        elif entry.field == RECORD_FIELD:
            try:
                sample = parse_record(data)
            except RecordError:
                sample = None  # any other JSON
    begin, last = entries[0].begin, entries[-1]
    row = SampleRow(
        key=key,
        id=sample.id if sample else None,
        record=number,
        offset=begin,
        size=last.offset + last.size + padding(last.size) - begin,
        members=list(members.values()),
        images=images,
        turns=len(sample.turns) if sample else 0,
        words=sample.words if sample else 0,
        source=source,
    )
    return row, sample is None or sample.strict


def _index_image(field: str, data: bytes) -> ImageInfo:
    try:
        header = probe(data)
    except ImageError:
        return ImageInfo(field, field.rpartition(".")[2].lower(), 0, 0)
    return ImageInfo(field, header.format, header.width, header.height)


def _read(file: BinaryIO, entry: _Entry) -> tuple[bytes, int]:
    """A member's data, empty when it is too large to look into, and its xxh3_64."""
    if entry.size <= _MAX_PARSED_BYTES:
        data = os.pread(file.fileno(), entry.size, entry.offset)
        return data, xxhash.xxh3_64_intdigest(data)
    digest = xxhash.xxh3_64()
    for offset in range(entry.offset, entry.offset + entry.size, _CHUNK):
        digest.update(os.pread(file.fileno(), min(_CHUNK, entry.offset + entry.size - offset), offset))
    return b"", digest.intdigest()
