"""Executes one shard of a plan: reads its records and images, writes the tar and its sidecar. Knows no engine.

Any process that reaches the sources can do it: a task is small, picklable and complete, and its result is on disk when it is done. Both
files are written in OUT/.packing and renamed, the sidecar last, so that a sidecar under its final name says that its shard is done.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shardify.audit import describe
from shardify.errors import FormatError, ImageError, PackError, RecordError, SampleError
from shardify.format import names
from shardify.format.index import MAX_IMAGES, MAX_SIZE
from shardify.format.sidecar import ImageInfo, SampleRow, SetAside, ShardInfo, read_shard_info, write_sidecar
from shardify.format.tar import ShardWriter, sample_span
from shardify.images.probe import ImageHeader, probe, same_format
from shardify.images.stores import MAX_IMAGE_BYTES, MISSING, ImageReader, Location
from shardify.records import MAX_RECORD_BYTES, NO_ID, Sample, load_record, parse_record
from shardify.sources.llava import Stamp, open_unchanged

RECORD_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # of the record in its file
        ("length", "<i8"),
        ("span", "<i8"),  # bytes of its sample in a shard; 0 when it is known to be bad
        ("images", "<u4"),  # rows of image locations it has
        ("file", "<u2"),  # number of its file
        ("code", "u1"),  # why it is known to be bad, 0 when it is not
        ("repeated", "?"),  # an earlier record has the same id
    ]
)
"""What is kept of a record between the survey and its packing."""

_SHOWN = 300  # characters of a name or detail that are kept of a record set aside
_MAX_OPEN = 64  # record files at a time, of the thousands that there may be
_REPORT_EVERY = 0.2  # seconds

Report = Callable[[int, int], None]
"""Is told now and then how many records have been packed or set aside, and bytes written, since it was told last."""


@dataclass(frozen=True, slots=True)
class PackContext:
    """What all tasks of a run share.

    Attributes:
        out: the output folder.
        plan: identifies the plan; written into every sidecar.
        digits: of a key.
        record_files: path, name and stamp of each record file.
        file_starts: the number of each file's first record among all records.
        readers: one for each image store.
        searched: why an image is missing: the stores that do not hold it.
        fail: stop at the first record that cannot be packed.
    """

    out: str
    plan: str
    digits: int
    record_files: tuple[tuple[str, str, Stamp], ...]
    file_starts: tuple[int, ...]
    readers: tuple[ImageReader, ...]
    searched: str
    fail: bool


@dataclass(frozen=True, slots=True, eq=False)
class ShardTask:
    """One shard to pack.

    Attributes:
        name: the tar's name.
        position: of the first record in the planned order.
        numbers: int64 [n], the records' numbers among all records, in planned order.
        records: [n] of `RECORD_DTYPE`.
        images: [m] of `LOCATION_DTYPE`: the images of these records, one after another.
    """

    name: str
    position: int
    numbers: npt.NDArray[np.int64]
    records: npt.NDArray[np.void]
    images: npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of a task: counts of samples, bytes of the tar, and records set aside by reason."""

    name: str
    samples: int
    bytes: int
    set_aside: dict[str, int]


def finished_shard(out: str, tar_name: str, plan: str) -> ShardInfo | None:
    """What the sidecar of a finished shard says; None when the shard is still to be packed."""
    try:
        info = read_shard_info(os.path.join(out, names.sidecar_name(tar_name)))
        size = os.stat(os.path.join(out, tar_name)).st_size
    except (FormatError, FileNotFoundError):
        return None
    return info if info.plan == plan and info.bytes == size else None


def pack_shard(
    context: PackContext, task: ShardTask, *, report: Report = lambda _records, _bytes: None
) -> ShardResult:
    """Pack one shard.

    Args:
        context: what all tasks share.
        task: the shard.
        report: is told of all records of the task by its end.

    Raises:
        PackError: a file cannot be written, or a record is bad and `context.fail` is set.
    """
    sidecar_name = names.sidecar_name(task.name)
    work = os.path.join(context.out, names.WORK_FOLDER)
    tar, sidecar = os.path.join(work, task.name), os.path.join(work, sidecar_name)
    try:
        with open(tar, "wb", buffering=0) as file:
            writer = ShardWriter(file)
            content = _write_samples(context, task, writer, report)
            digest = writer.close()
            os.fsync(file.fileno())
        info = ShardInfo(
            bytes=writer.offset,
            xxh3_128=digest,
            set_aside=content.set_aside,
            notes=dict(sorted(content.notes.items())),
            tolerant=content.tolerant,
            plan=context.plan,
        )
        write_sidecar(sidecar, content.rows, info)
        os.rename(tar, os.path.join(context.out, task.name))
        os.rename(sidecar, os.path.join(context.out, sidecar_name))
        sync_folder(context.out)
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        raise PackError(f"shard {task.name}: {where}{error.strerror or error}") from None
    counts = Counter(item.code for item in content.set_aside)
    return ShardResult(task.name, len(content.rows), info.bytes, dict(counts))


def find_faults(context: PackContext, task: ShardTask) -> list[SetAside]:
    """What `pack_shard` would set aside of this task; writes nothing."""
    with open(os.devnull, "wb", buffering=0) as nowhere:
        return _write_samples(context, task, ShardWriter(nowhere), lambda _records, _bytes: None).set_aside


def sync_folder(path: str) -> None:
    """Flush a folder's entries to disk, so that a rename survives a loss of power."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@dataclass(frozen=True, slots=True)
class _Content:
    """What is known of a shard beside its tar."""

    rows: list[SampleRow] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    tolerant: list[int] = field(default_factory=list)


class _BadImage(Exception):  # noqa: N818 - never leaves this module
    """A fault of one image of a record."""

    def __init__(self, error: SampleError, path: str) -> None:
        super().__init__()
        self.error = error
        self.path = path


def _write_samples(context: PackContext, task: ShardTask, writer: ShardWriter, report: Report) -> _Content:
    content = _Content()
    locations = iter(task.images.tolist())
    for position, record, raw in _reported(_read_records(context, task), writer, report):
        rows = list(islice(locations, record.images))
        sample: Sample | None = None
        try:
            sample = parse_record(raw)
            sizes = [size for _, _, size, *_ in rows]
            if max(sizes, default=0) <= MAX_IMAGE_BYTES:  # otherwise it is that image's fault
                _check_span(sizes, raw)  # before so much is read
            images = _read_images(context, sample, rows)
            _check_span([len(data) for data, _ in images], raw)
        except _BadImage as fault:
            content.set_aside.append(
                _set_aside(context, record, raw, fault.error, sample=sample, image=fault.path)
            )
            continue
        except SampleError as error:
            content.set_aside.append(_set_aside(context, record, raw, error, sample=sample))
            continue

        key = names.sample_key(position, context.digits)
        start = writer.offset
        members, infos = [], []
        for number, (data, header) in enumerate(images):
            name = names.image_field(number, header.format, is_list=sample.image_is_list)
            members.append(writer.add(key, name, data))
            infos.append(ImageInfo(name, header.format, header.width, header.height))
        members.append(writer.add(key, "json", raw))
        if not sample.strict:
            content.tolerant.append(len(content.rows))
        content.notes.update(_notes(sample, images, repeated=record.repeated))
        content.rows.append(
            SampleRow(
                key=key,
                id=sample.id,
                record=record.number,
                offset=start,
                size=writer.offset - start,
                members=members,
                images=infos,
                turns=len(sample.turns),
                words=sample.words,
                source=record.source,
            )
        )
    return content


class _Record(NamedTuple):
    number: int  # in its source
    offset: int  # there
    length: int
    source: str
    images: int
    repeated: bool


def _read_records(context: PackContext, task: ShardTask) -> Iterator[tuple[int, _Record, bytes]]:
    """Position, whereabouts and bytes of each record of the shard."""
    fields = task.records[["offset", "length", "images", "file", "repeated"]].tolist()
    descriptors: dict[int, int] = {}  # the one used last at the end
    try:
        for position, number, (offset, length, images, file, repeated) in zip(
            range(task.position, task.position + len(fields)), task.numbers.tolist(), fields, strict=True
        ):
            path, name, stamp = context.record_files[file]
            descriptor = descriptors.pop(file, None)
            if descriptor is None:
                if len(descriptors) == _MAX_OPEN:
                    os.close(descriptors.pop(next(iter(descriptors))))
                descriptor = open_unchanged(path, stamp)
            descriptors[file] = descriptor
            size = min(length, MAX_RECORD_BYTES + 1)  # longer ones are refused by their length
            raw = os.pread(descriptor, size, offset)
            if len(raw) < size:
                raise PackError(f"{path}: has become shorter while it was packed")
            number_there = number - context.file_starts[file]
            yield position, _Record(number_there, offset, length, name, images, repeated), raw
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _reported(
    records: Iterator[tuple[int, _Record, bytes]], writer: ShardWriter, report: Report
) -> Iterator[tuple[int, _Record, bytes]]:
    """The records; tells how many of them are done."""
    done, told, size = 0, time.monotonic(), writer.offset
    for record in records:
        yield record
        done += 1
        if (now := time.monotonic()) - told >= _REPORT_EVERY:
            report(done, writer.offset - size)
            done, told, size = 0, now, writer.offset
    report(done, writer.offset - size)


def _read_images(
    context: PackContext, sample: Sample, rows: list[tuple[int, ...]]
) -> list[tuple[bytes, ImageHeader]]:
    """The bytes and headers of a sample's images, located by rows of `LOCATION_DTYPE`."""
    images: list[tuple[bytes, ImageHeader]] = []
    path = ""
    try:
        paths = []
        for image, row in zip(sample.images, rows, strict=True):
            path = image.path
            paths.append("/".join(image.parts()))
            if row[5] == MISSING:
                raise ImageError("image-missing", context.searched)
        for image, inside, (*location, store, _, _) in zip(sample.images, paths, rows, strict=True):
            path = image.path
            data = context.readers[store].read(inside, Location(*location))
            images.append((data, probe(data)))
    except SampleError as error:
        raise _BadImage(error, path) from None
    return images


def _check_span(sizes: list[int], raw: bytes) -> None:
    span = sample_span([*sizes, len(raw)])
    if span > MAX_SIZE or len(sizes) > MAX_IMAGES:
        raise RecordError("sample-too-large", f"{span} bytes, {len(sizes)} images")


def _notes(sample: Sample, images: list[tuple[bytes, ImageHeader]], *, repeated: bool) -> list[str]:
    notes = []
    if sample.id in NO_ID:
        notes.append("id-missing")
    elif repeated:
        notes.append("id-repeated")
    for image, (_, header) in zip(sample.images, images, strict=True):
        stem, dot, extension = image.parts()[-1].rpartition(".")
        if stem and dot and not same_format(extension, header.format):
            notes.append("image-extension-differs")
            break
    if not sample.strict:
        notes.append("record-tolerant")
    return notes


def _set_aside(
    context: PackContext,
    record: _Record,
    raw: bytes,
    error: SampleError,
    *,
    sample: Sample | None = None,
    image: str | None = None,
) -> SetAside:
    detail = error.detail
    if error.code == "record-not-json":  # it may be two that an open quote has made one
        detail += f"; {record.length} bytes, from byte {record.offset} of the file"
    id_ = sample.id if sample else _id_of(raw)
    item = SetAside(
        record=record.number,
        source=record.source,
        id=None if id_ is None else _printable(id_),
        code=error.code,
        detail=_printable(detail),
        image=None if image is None else _printable(image),
    )
    if context.fail:
        raise PackError(f"{describe(item)} (--on-bad fail)")
    return item


def _id_of(raw: bytes) -> str | None:
    """The id of a record that cannot be a sample, where it has one."""
    if len(raw) > MAX_RECORD_BYTES:
        return None
    try:
        record = load_record(raw)
    except RecordError:
        return None
    return json.dumps(record["id"]) if "id" in record else None


def _printable(text: str) -> str:
    """Lone surrogates, which no UTF-8 file can hold, as escapes; the start of what is too long to be a name (an image as base64)."""
    if len(text) > _SHOWN:
        text = f"{text[:_SHOWN]}... ({len(text)} characters)"
    return text.encode("utf-8", "backslashreplace").decode()
