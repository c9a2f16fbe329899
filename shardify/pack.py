"""Executes one shard of a plan: reads its records and images, writes the tar and its sidecar. Knows no engine and no kind of place.

Any process that reaches sources and output can do it: a task is small, picklable and complete, and its result is in its place when it is
done. The sidecar follows its tar, so that a sidecar under its final name says that its shard is done.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from shardify.audit import FAIL, KEEP, Policies, describe
from shardify.errors import FormatError, ImageError, PackError, RecordError, SampleError
from shardify.format import names
from shardify.format.headers import BLOCK
from shardify.format.index import MAX_IMAGES, MAX_SIZE
from shardify.format.sidecar import ImageInfo, SetAside, ShardInfo, SidecarBuilder, read_shard_info
from shardify.format.tar import ShardWriter, sample_span
from shardify.images.probe import ImageHeader, probe, same_format
from shardify.images.resolve import Rule
from shardify.images.stores import (
    AMBIGUOUS,
    BY_PREFIX,
    BY_STEM,
    BY_SUFFIX,
    LISTED,
    MAX_IMAGE_BYTES,
    MISSING,
    ImageReader,
    Location,
)
from shardify.outputs import Output
from shardify.prepare import Prepared, prepare
from shardify.quirks import conversation_notes, id_notes
from shardify.readahead import read_ahead
from shardify.records import MAX_RECORD_BYTES, ImageRef, load_record
from shardify.sources.llava import Stamp, open_unchanged

RECORD_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # of the record in its file
        ("length", "<i8"),
        ("span", "<i8"),  # bytes of its sample in a shard; 0 when it is known to be bad
        ("images", "<u4"),  # rows of image locations it has
        ("file", "<u2"),  # number of its file
        ("notes", "<u2"),  # bits: ID_REPEATED, IMAGE_REPEATED, then the notes that its source gave it
        ("code", "u1"),  # why it is known to be bad, 0 when it is not
    ]
)
"""What is kept of a record between the survey and its packing."""

ID_REPEATED = 1
IMAGE_REPEATED = 2
SOURCE_NOTES = 2
"""The first bit for what only a source knows."""

_FOUND_BY = {BY_PREFIX: "image-by-prefix", BY_SUFFIX: "image-by-suffix", BY_STEM: "image-by-stem"}
_SHOWN = 300  # characters of a name or detail that are kept of a record set aside
_MAX_OPEN = 64  # record files at a time, of the thousands that there may be
_REPORT_EVERY = 0.2  # seconds
# bytes of data that make no sample too large, however many members hold them
_FITS = MAX_SIZE - 2 * BLOCK * (MAX_IMAGES + 1)
_TOGETHER = 128  # records that are looked at before the images of the first are read
_TOGETHER_BYTES = 4 * 1024 * 1024  # of them: no more are looked at then

_Item = TypeVar("_Item")

Report = Callable[[int, int], None]
"""Is told now and then how many records have been packed or set aside, and bytes written, since it was told last."""


class RecordSource(NamedTuple):
    """A record file: where it is, what it is called, the number of its first record among all, and what it looked like."""

    path: str
    name: str
    first: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Shrink:
    """Make larger pictures smaller: `shortest_edge` in pixels, `quality` as JPEG and WebP count it."""

    shortest_edge: int
    quality: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackContext:
    """What all tasks of a run share.

    Attributes:
        output: where the shards go.
        plan: identifies the plan; written into every sidecar.
        digits: of a key.
        sources: the record files.
        source_notes: the codes of the bits of a record's `notes`, from `SOURCE_NOTES` on.
        readers: one for each image store.
        mounts: the stores' virtual folders.
        rules: how paths are rewritten; a location has the number of its rule.
        searched: why an image is missing: the stores that do not hold it.
        policies: what to do about each reason and note.
        check: how images are checked: ``header``, ``decode`` or ``none``.
        compress: ``zstd``, or empty.
        shrink: make pictures smaller; None leaves their bytes alone.
        is_remote: whether output or images are in an object store.
    """

    output: Output
    plan: str = ""
    digits: int
    sources: tuple[RecordSource, ...]
    source_notes: tuple[str, ...] = ()
    readers: tuple[ImageReader, ...] = ()
    mounts: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    searched: str = ""
    policies: Policies = field(default_factory=Policies)
    check: str = "header"
    compress: str = ""
    shrink: Shrink | None = None
    is_remote: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class ShardTask:
    """One shard to pack.

    Attributes:
        name: the tar's name.
        position: of the first record in the planned order.
        numbers: int64 [n], the records' numbers among all records, in planned order.
        records: [n] of `RECORD_DTYPE`.
        images: [m] of `LOCATION_DTYPE`: the images of these records, one after another.
        names: the names in their stores of the images that are located by listing, in the same order.
        raw: the records' bytes, one after another, for a process that may not reach the record files; None to read them there.
    """

    name: str
    position: int
    numbers: npt.NDArray[np.int64]
    records: npt.NDArray[np.void]
    images: npt.NDArray[np.void]
    names: tuple[str, ...] = ()
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What became of a task: counts of samples, bytes of the tar, and records set aside by reason."""

    name: str
    samples: int
    bytes: int
    set_aside: dict[str, int]


class RunContext(Protocol):
    """What every kind of run knows: where its shards go, and which plan they follow."""

    @property
    def output(self) -> Output: ...  # noqa: D102

    @property
    def plan(self) -> str: ...  # noqa: D102

    @property
    def is_remote(self) -> bool:
        """Whether shards need an object store, which a process that forks later must not call."""


def finished_shard(
    context: RunContext, tar_name: str, *, size: int | None, file: BinaryIO | None
) -> ShardInfo | None:
    """What the sidecar of a finished shard says; None when the shard is still to be packed.

    Args:
        context: the run.
        tar_name: the shard.
        size: its bytes, None when it is not there.
        file: its sidecar, which is closed; None when there is none.
    """
    if file is None:
        return None
    with file:
        try:
            info = read_shard_info(names.sidecar_name(tar_name), file=file)
        except FormatError:
            return None
    return info if size is not None and info.plan == context.plan and info.bytes == size else None


def finished_shards(context: RunContext, tar_names: Sequence[str]) -> Iterator[tuple[str, ShardInfo | None]]:
    """Each shard, and what its sidecar says when it is finished."""
    there = context.output.sizes()
    sidecars = [names.sidecar_name(name) for name in tar_names]
    for name, file in zip(tar_names, context.output.open_all(sidecars), strict=True):
        yield name, finished_shard(context, name, size=there.get(name), file=file)


def pack_shard(
    context: PackContext, task: ShardTask, report: Report = lambda _records, _bytes: None
) -> ShardResult:
    """Pack one shard.

    Args:
        context: what all tasks share.
        task: the shard.
        report: is told of all records of the task by its end.

    Raises:
        PackError: a file cannot be written, or a record is bad and its policy is to fail.
    """
    return write_shard(
        context,
        task.name,
        compress=context.compress,
        write=lambda writer: _write_samples(context, task, writer, report),
    )


@dataclass(frozen=True, slots=True)
class Content:
    """What is known of a shard beside its tar."""

    rows: SidecarBuilder = field(default_factory=SidecarBuilder)
    set_aside: list[SetAside] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    tolerant: list[int] = field(default_factory=list)


def write_shard(
    context: RunContext, name: str, *, compress: str, write: Callable[[ShardWriter], Content]
) -> ShardResult:
    """Make a tar and its sidecar.

    Args:
        context: the run.
        name: the tar's name.
        compress: ``zstd``, or empty.
        write: writes all samples, and says what is known of them.

    Raises:
        PackError: a file cannot be written.
    """
    try:
        with context.output.create(name) as draft:
            writer = ShardWriter(draft, compress=compress)
            content = write(writer)
            digest = writer.close()
            draft.commit()
        info = ShardInfo(
            bytes=writer.bytes,
            xxh3_128=digest,
            set_aside=content.set_aside,
            notes=dict(sorted(content.notes.items())),
            tolerant=content.tolerant,
            plan=context.plan,
        )
        context.output.put(names.sidecar_name(name), content.rows.encode(writer.spans, info))
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        raise PackError(f"shard {name}: {where}{error.strerror or error}") from None
    counts = Counter(item.code for item in content.set_aside)
    return ShardResult(name, len(content.rows), info.bytes, dict(counts))


def find_faults(context: PackContext, task: ShardTask) -> list[SetAside]:
    """What `pack_shard` would set aside of this task; writes nothing."""
    with open(os.devnull, "wb", buffering=0) as nowhere:
        return _write_samples(context, task, ShardWriter(nowhere), lambda _records, _bytes: None).set_aside


class _BadImage(Exception):  # noqa: N818 - never leaves this module
    """A fault of one image of a record."""

    def __init__(self, error: SampleError, path: str) -> None:
        super().__init__()
        self.error = error
        self.path = path


class _Record(NamedTuple):
    """A record of the shard: where it is planned, where it came from, and its bytes."""

    position: int
    number: int  # in its source
    offset: int  # there
    length: int
    source: str
    notes: int
    raw: bytes


class _Image(NamedTuple):
    """An image of the shard, located."""

    store: int
    name: str  # in the store
    how: int
    location: Location


class _Candidate(NamedTuple):
    """A record before its images are read, or what is wrong with it already."""

    record: _Record
    prepared: Prepared | None
    images: list[_Image]
    notes: list[str]
    error: SampleError | _BadImage | None


class _Picture(NamedTuple):
    """An image that was read; a memoryview is its place in the shard's writer."""

    data: bytes | memoryview
    header: ImageHeader
    notes: tuple[str, ...]


def _write_samples(context: PackContext, task: ShardTask, writer: ShardWriter, report: Report) -> Content:
    content = Content()
    candidates = _some_at_once(_candidates(context, task))
    read = read_ahead(
        lambda candidate: _read_images(context, candidate),
        candidates,
        size=_image_bytes,
        # made smaller, an image is not what was read
        read_now=None if context.shrink else lambda candidate: _read_images(context, candidate, writer),
    )
    for candidate, files in reported(read, writer, report):
        record, prepared = candidate.record, candidate.prepared
        try:
            if candidate.error is not None:
                raise candidate.error
            assert prepared is not None
            images = _pictures(context, prepared, files)
            notes = [*candidate.notes, *_image_notes(candidate, images)]
            _judge(context.policies, notes)
            _check_span([len(image.data) for image in images], prepared.raw)
        except _BadImage as fault:
            content.set_aside.append(_set_aside(context, candidate, fault.error, image=fault.path))
            continue
        except SampleError as error:
            content.set_aside.append(_set_aside(context, candidate, error))
            continue

        sample = prepared.sample
        key = names.sample_key(record.position, context.digits)
        members, infos = [], []
        for number, (data, header, _) in enumerate(images):
            name = names.image_field(number, header.format, is_list=sample.image_is_list)
            members.append(writer.add(key, name, data, in_place=isinstance(data, memoryview)))
            infos.append(ImageInfo(name, header.format, header.width, header.height))
        members.append(writer.add(key, names.RECORD_FIELD, prepared.raw))
        writer.end_sample()
        if not sample.strict:
            content.tolerant.append(len(content.rows))
        if notes:
            content.notes.update(dict.fromkeys(notes, 1))
        content.rows.add(
            key=key,
            id=sample.id,
            record=record.number,
            members=members,
            images=infos,
            turns=len(sample.turns),
            words=sample.words,
            source=record.source,
        )
    return content


def _candidates(context: PackContext, task: ShardTask) -> Iterator[_Candidate]:
    """The shard's records in order, each with where its images are."""
    locations = zip(task.images.tolist(), _listed(task), strict=True)
    for record, count in _read_records(context, task):
        rows = list(islice(locations, count))
        prepared, images, notes = None, [], []
        error: SampleError | _BadImage | None = None
        try:
            prepared = prepare(record.raw)
            notes = _record_notes(context, record, prepared)
            _judge(context.policies, notes)
            sizes = [row[2] for row, _ in rows]
            if max(sizes, default=0) <= MAX_IMAGE_BYTES:  # otherwise it is that image's fault
                _check_span(sizes, prepared.raw)  # before so much is read
            images = _locate(context, prepared.sample.images, rows)
        except (SampleError, _BadImage) as fault:
            error = fault
        yield _Candidate(record, prepared, images, notes, error)


def _some_at_once(candidates: Iterator[_Candidate]) -> Iterator[_Candidate]:
    """Drawn ahead, so that this code and what it touches stay in the processor's cache, from which each image that is read drives it."""
    together: list[_Candidate] = []
    held = 0
    try:
        for candidate in candidates:
            together.append(candidate)
            held += candidate.record.length
            if len(together) == _TOGETHER or held > _TOGETHER_BYTES:
                yield from together
                together.clear()
                held = 0
    except PackError:
        yield from together  # those before it come first, whatever is wrong with them
        raise
    yield from together


def _listed(task: ShardTask) -> Iterator[str]:
    """For each image its name in its store, empty where the record's own path says it."""
    listed = iter(task.names)
    for method in task.images["method"].tolist():
        yield next(listed) if method == LISTED else ""


def _read_records(context: PackContext, task: ShardTask) -> Iterator[tuple[_Record, int]]:
    """The records of the shard, and how many image locations each has."""
    fields = task.records[["offset", "length", "images", "file", "notes"]].tolist()
    descriptors: dict[int, int] = {}  # the one used last at the end
    taken = 0  # of `raw`
    try:
        for position, number, (offset, length, images, file, notes) in zip(
            range(task.position, task.position + len(fields)), task.numbers.tolist(), fields, strict=True
        ):
            source = context.sources[file]
            size = min(length, MAX_RECORD_BYTES + 1)  # longer ones are refused by their length
            if task.raw is not None:
                raw = task.raw[taken : taken + size]
                taken += size
            else:
                descriptor = descriptors.pop(file, None)
                if descriptor is None:
                    if len(descriptors) == _MAX_OPEN:
                        os.close(descriptors.pop(next(iter(descriptors))))
                    descriptor = open_unchanged(source.path, source.stamp)
                descriptors[file] = descriptor
                raw = os.pread(descriptor, size, offset)
            if len(raw) < size:
                raise PackError(f"{source.path}: has become shorter while it was packed")
            record = _Record(position, number - source.first, offset, length, source.name, notes, raw)
            yield record, images
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _record_notes(context: PackContext, record: _Record, prepared: Prepared) -> list[str]:
    sample = prepared.sample
    notes = [*prepared.notes, *id_notes(sample.id)]
    if record.notes & ID_REPEATED:
        notes.append("id-repeated")
    if record.notes & IMAGE_REPEATED:
        notes.append("image-repeated")
    if record.notes >> SOURCE_NOTES:
        notes += [
            code for bit, code in enumerate(context.source_notes, SOURCE_NOTES) if record.notes & 1 << bit
        ]
    notes += conversation_notes(sample)
    if not sample.strict:
        notes.append("record-tolerant")
    return notes


def _judge(policies: Policies, notes: list[str]) -> None:
    """Raise the first note that is not to be kept."""
    for code in notes if policies.chosen else ():
        if policies.action(code) != KEEP:
            raise RecordError(code, "not kept, by --policy")


def _locate(
    context: PackContext, references: tuple[ImageRef, ...], rows: list[tuple[tuple[int, ...], str]]
) -> list[_Image]:
    """A sample's images, located by rows of `LOCATION_DTYPE` and listed names."""
    located = []
    for reference, (row, listed) in zip(references, rows, strict=True):
        *location, store, rule, how = row
        try:
            path = reference.name()
            if store == MISSING and how == AMBIGUOUS:
                raise ImageError("image-ambiguous", "several files fit the path, and none fits best")
            if store == MISSING:
                raise ImageError("image-missing", context.searched)
        except SampleError as error:
            raise _BadImage(error, reference.path) from None
        name = listed or name_in_store(path, context.rules[rule], context.mounts[store])
        located.append(_Image(store, name, how, Location(*location)))
    return located


def name_in_store(path: str, rule: Rule, mount: str) -> str:
    """An image's path inside of its store, from the path in the record and how that was rewritten."""
    path = rule.apply(path) or path
    return path.removeprefix(f"{mount}/") if mount else path


def _image_bytes(candidate: _Candidate) -> int:
    return sum([image.location.size for image in candidate.images])


def _read_images(
    context: PackContext, candidate: _Candidate, writer: ShardWriter | None = None
) -> list[bytes | memoryview | SampleError]:
    """The images' bytes, up to the first that has none. Runs in any thread, and so does nothing but read: pixels of many take much memory.

    Args:
        context: where the stores are.
        candidate: the record.
        writer: the images are read to their places in it, as far as it has any; a memoryview among the results is such a place.
    """
    files: list[bytes | memoryview | SampleError] = []
    for image in candidate.images:
        room = partial(writer.room, is_first=not files) if writer is not None else None
        try:
            data = context.readers[image.store].read(image.name, image.location, room)
        except SampleError as error:
            return [*files, error]
        files.append(data)
        if isinstance(data, bytes):
            writer = None  # no place for those behind it: see `ShardWriter.room`
    return files


def _pictures(
    context: PackContext, prepared: Prepared, files: Sequence[bytes | memoryview | SampleError]
) -> list[_Picture]:
    pictures = []
    for file, reference in zip(files, prepared.sample.images, strict=False):  # the last one may be a fault
        try:
            if isinstance(file, SampleError):
                raise file
            pictures.append(_picture(context, file))
        except SampleError as error:
            raise _BadImage(error, reference.path) from None
    return pictures


def _picture(context: PackContext, data: bytes | memoryview) -> _Picture:
    try:
        header = probe(data, check=context.check)
        notes = header.traits
    except ImageError as error:
        if context.policies.action(error.code) != KEEP:
            raise
        # kept as it is: there is no whole picture to make smaller
        header = probe(data, check="none")
        return _Picture(data, header, (error.code, *header.traits))
    if context.shrink:
        from shardify.images.shrink import shrink

        smaller = shrink(
            data, header, shortest_edge=context.shrink.shortest_edge, quality=context.shrink.quality
        )
        if smaller:
            data, header = smaller
            return _Picture(data, header, (*notes, "image-shrunk"))
    return _Picture(data, header, notes)


def _image_notes(candidate: _Candidate, pictures: list[_Picture]) -> list[str]:
    assert candidate.prepared is not None
    notes = []
    references = candidate.prepared.sample.images
    for image, reference, picture in zip(candidate.images, references, pictures, strict=True):
        if image.how:
            notes.append(_FOUND_BY[image.how])
        if not reference.path.endswith("." + picture.header.format):
            stem, dot, extension = reference.path.replace("\\", "/").rpartition("/")[2].rpartition(".")
            if stem and dot and not same_format(extension, picture.header.format):
                notes.append("image-extension-differs")
        notes += picture.notes
    return notes


def _check_span(sizes: list[int], raw: bytes) -> None:
    if len(sizes) <= MAX_IMAGES and sum(sizes) + len(raw) < _FITS:
        return
    span = sample_span([*sizes, len(raw)])
    if span > MAX_SIZE or len(sizes) > MAX_IMAGES:
        raise RecordError("sample-too-large", f"{span} bytes, {len(sizes)} images")


def reported(items: Iterator[_Item], writer: ShardWriter, report: Report) -> Iterator[_Item]:
    """The records of a shard; tells how many of them are done."""
    done, told, size = 0, time.monotonic(), writer.offset
    for item in items:
        yield item
        done += 1
        if (now := time.monotonic()) - told >= _REPORT_EVERY:
            report(done, writer.offset - size)
            done, told, size = 0, now, writer.offset
    report(done, writer.offset - size)


def _set_aside(
    context: PackContext, candidate: _Candidate, error: SampleError, *, image: str | None = None
) -> SetAside:
    record, prepared = candidate.record, candidate.prepared
    detail = error.detail
    if error.code == "record-not-json":  # it may be two that an open quote has made one
        detail += f"; {record.length} bytes, from byte {record.offset} of the file"
    id_ = prepared.sample.id if prepared else id_of(record.raw)
    item = SetAside(
        record=record.number,
        source=record.source,
        id=None if id_ is None else printable(id_),
        code=error.code,
        detail=printable(detail),
        image=None if image is None else printable(image),
    )
    if context.policies.action(error.code) == FAIL:
        raise PackError(f"{describe(item)} (--on-bad fail, or --policy {error.code}=fail)")
    return item


def id_of(raw: bytes) -> str | None:
    """The id of a record that cannot be a sample, where it has one."""
    if len(raw) > MAX_RECORD_BYTES:
        return None
    try:
        record = load_record(raw)
    except RecordError:
        return None
    return json.dumps(record["id"]) if "id" in record else None


def printable(text: str) -> str:
    """Lone surrogates, which no UTF-8 file can hold, as escapes; the start of what is too long to be a name (an image as base64)."""
    if len(text) > _SHOWN:
        text = f"{text[:_SHOWN]}... ({len(text)} characters)"
    return text.encode("utf-8", "backslashreplace").decode()
