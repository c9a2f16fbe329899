"""Executes one shard of a reshard: copies samples out of other shards, checked against their hashes. Knows no engine and no kind of place.

A sample is read at once, where its sidecar says; its members keep their order, names and bytes, under a new key. What a sidecar row says
of record and images is found anew, by the rules of `shardify.format.scan`, so that samples of any origin can stand beside each other.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from shardify.errors import FormatError, ImageError, PackError, RecordError, SampleError
from shardify.exclude import describe_lines
from shardify.format import names
from shardify.format.exclude import EXCLUDED, Exclusions
from shardify.format.index import MAX_IMAGES, MAX_SIZE
from shardify.format.sidecar import ImageInfo, SetAside
from shardify.format.tar import ShardWriter, sample_span
from shardify.format.zstd import MAX_FRAME_BYTES, decompress_frame
from shardify.images.probe import ImageHeader, probe, same_format
from shardify.images.shrink import shrink
from shardify.outputs import Output
from shardify.pack import (
    ID_REPEATED,
    IMAGE_REPEATED,
    Content,
    Report,
    ShardResult,
    Shrink,
    id_of,
    printable,
    reported,
    write_shard,
)
from shardify.quirks import conversation_notes, id_notes
from shardify.readahead import read_ahead
from shardify.records import Sample, parse_record

_MAX_NAME = 100  # bytes of a name in a tar header
_SHRUNK = "image-shrunk"
_MAX_OPEN = 256  # shards that are kept open; of more, each read opens its own


class InputShard(NamedTuple):
    """A shard that samples are copied from: where it is, and how messages call it."""

    path: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferContext:
    """What all tasks of a run share.

    Attributes:
        output: where the shards go.
        plan: identifies the plan; written into every sidecar.
        digits: of a key.
        shards: that samples come from.
        fields: the members' names, by number.
        sources: the sources' names, by number.
        exclusions: what must not be copied.
        compress: ``zstd``, or empty.
        shrink: make pictures smaller; None leaves their bytes alone.
    """

    output: Output
    plan: str = ""
    digits: int
    shards: tuple[InputShard, ...]
    fields: tuple[str, ...]
    sources: tuple[str, ...]
    exclusions: Exclusions | None = None
    compress: str = ""
    shrink: Shrink | None = None

    @property
    def is_remote(self) -> bool:
        """See `RunContext`."""
        return self.output.is_remote


@dataclass(frozen=True, slots=True, eq=False)
class TransferTask:
    """One shard to write.

    Attributes:
        name: the tar's name.
        position: of the first sample in the planned order.
        samples: [n] of `gather.SAMPLE_DTYPE`, in planned order.
        members: [m] of `gather.MEMBER_DTYPE`: the members of these samples, one after another.
    """

    name: str
    position: int
    samples: npt.NDArray[np.void]
    members: npt.NDArray[np.void]


def reshard_shard(
    context: TransferContext, task: TransferTask, report: Report = lambda _records, _bytes: None
) -> ShardResult:
    """Write one shard.

    Args:
        context: what all tasks share.
        task: the shard.
        report: is told of all samples of the task by its end.

    Raises:
        PackError: a shard cannot be read, or a file cannot be written.
    """
    return write_shard(
        context,
        task.name,
        compress=context.compress,
        write=lambda writer: _copy_samples(context, task, writer, report),
    )


class _Row(NamedTuple):
    """A sample that is planned for the shard; `members` are offset, size, hash and number of the name."""

    position: int
    shard: int
    offset: int
    size: int
    record: int
    source: str
    notes: int
    members: Sequence[tuple[int, int, int, int]]


class _Piece(NamedTuple):
    """A member as it was read."""

    field: str
    data: memoryview
    xxh3_64: int

    @property
    def is_image(self) -> bool:
        return names.is_image_field(self.field)

    @property
    def is_json(self) -> bool:
        return self.field.rpartition(".")[2].lower() == names.RECORD_FIELD


class _Image(NamedTuple):
    """An image of the new sample; without a header it cannot be read, and is copied all the same. `notes` are about it."""

    field: str
    data: bytes | memoryview
    header: ImageHeader | None = None
    notes: tuple[str, ...] = ()


def _copy_samples(
    context: TransferContext, task: TransferTask, writer: ShardWriter, report: Report
) -> Content:
    content = Content()
    files = _ShardFiles(context.shards, np.unique(task.samples["shard"]).tolist())
    try:
        read = read_ahead(lambda row: _read(context, files, row), _rows(context, task), size=_memory_of)
        for row, pieces in reported(read, writer, report):
            _copy(context, row, pieces, writer, content)
    finally:
        files.close()
    return content


def _rows(context: TransferContext, task: TransferTask) -> Iterator[_Row]:
    fields = task.samples[["shard", "offset", "size", "record", "source", "notes", "members"]]
    members = task.members[["offset", "size", "xxh3_64", "field"]].tolist()
    end = 0
    for position, (shard, offset, size, record, source, notes, count) in enumerate(
        fields.tolist(), task.position
    ):
        begin, end = end, end + count
        yield _Row(position, shard, offset, size, record, context.sources[source], notes, members[begin:end])


def _memory_of(row: _Row) -> int:
    """Bytes held to read a sample; a frame becomes at least as long as its members reach, however little it is compressed."""
    return max(row.size, *(offset + size for offset, size, *_ in row.members))


def _read(context: TransferContext, files: "_ShardFiles", row: _Row) -> list[_Piece] | SampleError:
    """The members of a sample, each with the very bytes that it was indexed with. Runs in any thread."""
    where = f"{context.shards[row.shard].name} byte {row.offset}"
    try:
        content = memoryview(files.read(row.shard, row.offset, row.size))
    except FormatError as error:
        return SampleError("sample-damaged", str(error))
    pieces = []
    for offset, size, expected, number in row.members:
        field = context.fields[number]
        data = content[offset : offset + size]
        if len(data) != size or xxhash.xxh3_64_intdigest(data) != expected:
            return SampleError("sample-damaged", f"{where}: member {field} is not that of its hash")
        pieces.append(_Piece(field, data, expected))
    return pieces


def _copy(
    context: TransferContext,
    row: _Row,
    pieces: list[_Piece] | SampleError,
    writer: ShardWriter,
    content: Content,
) -> None:
    record = b""
    sample: Sample | None = None
    try:
        if isinstance(pieces, SampleError):
            raise pieces
        key = names.sample_key(row.position, context.digits)
        record = next((bytes(piece.data) for piece in pieces if piece.field == names.RECORD_FIELD), b"")
        with suppress(RecordError):  # any other JSON is copied as it is
            sample = parse_record(record)
        _require_wanted(context, sample, pieces)
        images = [_picture(context, piece, pieces) for piece in pieces if piece.is_image]
        members = _members(pieces, images)
        _require_fitting(context, key, members)
    except SampleError as error:
        content.set_aside.append(_set_aside(row, sample, record, error))
        return
    content.rows.add(
        key=key,
        id=sample.id if sample else None,
        record=row.record,
        members=[writer.add(key, field, data) for field, data in members],
        images=[_image_info(image) for image in images],
        turns=len(sample.turns) if sample else 0,
        words=sample.words if sample else 0,
        source=row.source,
    )
    writer.end_sample()
    if sample is not None:
        if not sample.strict:
            content.tolerant.append(len(content.rows) - 1)
        content.notes.update(dict.fromkeys(_notes(row, sample, images), 1))
    elif any(_SHRUNK in image.notes for image in images):
        content.notes[_SHRUNK] += 1


def _require_wanted(context: TransferContext, sample: Sample | None, pieces: Sequence[_Piece]) -> None:
    if context.exclusions is None:
        return
    # in tars of other origin, a picture or a record may have any name
    others = [piece for piece in pieces if not piece.is_json]
    lines = set(
        context.exclusions.lines(
            id=sample.id if sample else None, images=[(piece.xxh3_64, piece.data) for piece in others]
        )
    )
    for piece in pieces:
        if piece.is_json:
            lines.update(context.exclusions.lines(id=id_of(bytes(piece.data)), record=piece.data))
    if lines:
        raise SampleError(EXCLUDED, describe_lines(context.exclusions, sorted(lines)))


def _picture(context: TransferContext, piece: _Piece, pieces: Sequence[_Piece]) -> _Image:
    notes: tuple[str, ...] = ()
    try:
        header = probe(piece.data)
    except ImageError as error:
        try:  # a cut-off one that was kept has its size all the same
            header = probe(piece.data, check="none")
        except ImageError:
            return _Image(piece.field, piece.data)
        notes = (error.code,)
    notes += header.traits
    if context.shrink:
        smaller = shrink(
            piece.data,
            header,
            shortest_edge=context.shrink.shortest_edge,
            quality=context.shrink.quality,
        )
        if smaller:
            data, header_now = smaller
            field = piece.field
            if header_now.format != header.format:
                stem, dot, _ = field.rpartition(".")
                field = f"{stem}{dot}{header_now.format}"
            if field == piece.field or all(field != other.field for other in pieces):
                return _Image(field, data, header_now, (*notes, _SHRUNK))
    return _Image(piece.field, piece.data, header, notes)


def _members(pieces: Sequence[_Piece], images: Sequence[_Image]) -> list[tuple[str, bytes | memoryview]]:
    """Name and bytes of each member of the new sample, in the old order."""
    image = iter(images)
    return [next(image)[:2] if piece.is_image else (piece.field, piece.data) for piece in pieces]


def _require_fitting(
    context: TransferContext, key: str, members: Sequence[tuple[str, bytes | memoryview]]
) -> None:
    for field, _ in members:
        name = f"{key}.{field}"
        if len(name.encode()) > _MAX_NAME:
            raise SampleError("member-name-too-long", f"{len(name.encode())} bytes: {name}")
    span = sample_span([len(data) for _, data in members])
    if span > (MAX_FRAME_BYTES if context.compress else MAX_SIZE) or len(members) > MAX_IMAGES:
        raise SampleError("sample-too-large", f"{span} bytes, {len(members)} members")


def _image_info(image: _Image) -> ImageInfo:
    if image.header is None:
        return ImageInfo(image.field, image.field.rpartition(".")[2].lower(), 0, 0)
    return ImageInfo(image.field, image.header.format, image.header.width, image.header.height)


def _notes(row: _Row, sample: Sample, images: Sequence[_Image]) -> list[str]:
    """What can be said of a LLaVA record without its record file."""
    notes = id_notes(sample.id)
    if row.notes & ID_REPEATED:
        notes.append("id-repeated")
    if row.notes & IMAGE_REPEATED:
        notes.append("image-repeated")
    notes += conversation_notes(sample)
    if not sample.strict:
        notes.append("record-tolerant")
    for image in images:
        notes += image.notes
    if len(images) == len(sample.images):
        for reference, image in zip(sample.images, images, strict=True):
            stem, dot, extension = reference.path.replace("\\", "/").rpartition("/")[2].rpartition(".")
            if image.header and stem and dot and not same_format(extension, image.header.format):
                notes.append("image-extension-differs")
    return notes


def _set_aside(row: _Row, sample: Sample | None, record: bytes, error: SampleError) -> SetAside:
    id_ = sample.id if sample else id_of(record)
    image = sample.images[0].path if sample and sample.images else None
    return SetAside(
        record=row.record,
        source=row.source,
        id=None if id_ is None else printable(id_),
        code=error.code,
        # whole: the hits of each line are counted from it
        detail=error.detail if error.code == EXCLUDED else printable(error.detail),
        image=None if image is None else printable(image),
    )


class _ShardFiles:
    """The shards that one task reads; used by many threads."""

    def __init__(self, shards: Sequence[InputShard], numbers: Sequence[int]) -> None:
        self._shards = shards
        self._keeps = len(numbers) <= _MAX_OPEN
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()
        self._last: tuple[int, int, bytes] = (-1, -1, b"")  # neighbours share a frame

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard; of a compressed one, the content of the frame there.

        Raises:
            FormatError: it ends before, or the frame is damaged.
            PackError: it cannot be read.
        """
        path, name = self._shards[shard]
        last_shard, last_offset, content = self._last
        if (last_shard, last_offset) == (shard, offset) and path.endswith(names.TAR_ZST):
            return content
        try:
            data = self._pread(shard, path, offset, size)
        except OSError as error:
            raise PackError(f"{path}: cannot be read at byte {offset} ({error.strerror or error})") from None
        where = f"{name} byte {offset}"
        if len(data) < size:
            raise FormatError(f"{where}: the shard ends before the sample does")
        if path.endswith(names.TAR_ZST):
            data = decompress_frame(data, where=where)
            self._last = shard, offset, data
        return data

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _pread(self, shard: int, path: str, offset: int, size: int) -> bytes:
        if self._keeps:
            with self._lock:
                descriptor = self._open.get(shard)
                if descriptor is None:
                    descriptor = self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return _read_whole(descriptor, offset, size)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _read_whole(descriptor, offset, size)
        finally:
            os.close(descriptor)


def _read_whole(descriptor: int, offset: int, size: int) -> bytes:
    """As many bytes as there are, in one call but for those of 2 GiB and more, which the kernel divides."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
