"""Building a batch in a worker: a plan in, plain arrays out, pixels and encoded images straight into a slab."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from loaders.batch import SampleFault
from loaders.batching import FILLER
from loaders.dataset import Rows
from loaders.decode import Picture, size_of
from loaders.fetch import LocalFetcher
from loaders.fits import Layout
from loaders.slabs import SlabPool
from loaders.stats import BatchStats, StageClock
from loaders.text import IGNORE_INDEX, TextResult
from shardify.errors import FormatError, LoaderError, SampleError
from shardify.format.bulk import locate_members
from shardify.format.names import RECORD_FIELD, is_image_field
from shardify.format.samples import frame_sample, is_compressed, split_frame
from shardify.format.tar import read_members
from shardify.permute import key_of
from shardify.records import load_record

IntArray = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

_LEAST_ROOM = 1 << 20
_TRANSFORM_KEY = 5  # what a key is for; orders and batches use the numbers before


class Fitting(Protocol):
    """An image that is decoded and not yet fitted; `loaders.image.Prepared` is one."""

    @property
    def nbytes(self) -> int:
        """Bytes that it needs: tiles * height * width * 3."""

    @property
    def tiles(self) -> int:
        """Pictures that it becomes."""

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of each of them."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width before fitting."""

    def write(self, memory: Pixels) -> None:
        """Fit it into `memory`, uint8 [nbytes], as [tiles, height, width, 3]; raises ImageError."""


class ImageFit(Protocol):
    """What the loader needs of an image transform; `loaders.ImageTransform` is one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of every picture; not asked of a ragged fit."""

    @property
    def is_ragged(self) -> bool:
        """Whether each picture has a shape of its own."""

    @property
    def is_tiled(self) -> bool:
        """Whether an image becomes several pictures."""

    @property
    def fingerprint(self) -> str:
        """Names all that decides about the sizes that come out; only needed where tiles are counted beforehand."""

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        """What an image of a size becomes, in a sample of so many images; only asked of ragged and tiled fits. Raises ImageError."""

    def prepare(self, data: Picture, *, images: int = 1) -> Fitting:
        """Decode an image, of a sample of so many; raises ImageError."""


class Text(Protocol):
    """What the loader needs of a text transform; `loaders.LlavaText` is one."""

    pad_token_id: int

    @property
    def fingerprint(self) -> str:
        """Names all that decides about its tokens; only needed where tokens are counted beforehand."""

    def __call__(self, record: bytes | memoryview | dict[str, Any]) -> TextResult:
        """A record's tokens and labels; raises TextError or RecordError.

        Where it has an attribute `needs_image_sizes` that is true, it is also given `image_sizes=`: (height, width) of each of the
        sample's images.
        """


class Fetcher(Protocol):
    """Reads spans of shards; one per process."""

    def read(
        self,
        shards: IntArray,
        offsets: IntArray,
        sizes: IntArray,
        begins: IntArray,
        ends: IntArray,
        *,
        batch: int,
    ) -> Iterator[tuple[int, memoryview | SampleError]]:
        """(i, bytes of span i, or why they cannot be had), each i once."""


@dataclass(slots=True)
class Sample:
    """One sample as a `transform` gets it: it may change what it likes and returns it, or None to leave the sample out.

    Attributes:
        key: in its shard; ``part/key`` in a mixture.
        record: the JSON record.
        images: encoded as stored; a transform may put other encoded images there, Pillow's images, or pixels, uint8 [H, W, 3].
    """

    key: str
    record: dict[str, Any]
    images: list[Picture]


Transform = Callable[[Sample, np.random.Generator], Sample | None]


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """What a worker needs to know to build a batch.

    Attributes:
        number: of the batch, counted from the start of the workers.
        epoch: it belongs to.
        positions: int64 [S], in the epoch; -1 stands for none.
        rows: int64 [S], the row of each.
        index: where the V samples that are no fillers lie, V rows.
        slab: where pixels and encoded images go; None for ordinary memory.
    """

    number: int
    epoch: int
    positions: IntArray
    rows: IntArray
    index: Rows
    slab: int | None = None


@dataclass(slots=True, eq=False)
class Built:
    """A batch on its way from a worker: no tensors, which would travel through named shared memory."""

    keys: list[str]
    positions: IntArray
    rows: IntArray
    memory: Pixels | None = None  # that the images lie in; None when it is the slab
    image_samples: list[int] = field(default_factory=list)  # of each image: its sample,
    image_tiles: list[int] = field(default_factory=list)  # pictures that it became,
    image_shapes: list[tuple[int, int]] = field(default_factory=list)  # height and width of each of them,
    image_sizes: list[tuple[int, int]] = field(default_factory=list)  # height and width as decoded,
    image_spans: list[tuple[int, int]] = field(default_factory=list)  # where its bytes begin and end
    records: list[bytes] | None = None
    input_ids: npt.NDArray[np.int32] | None = None  # [B, L]
    labels: npt.NDArray[np.int32] | None = None
    lengths: IntArray | None = None  # [B], tokens of each row
    texts: IntArray | None = None  # [S], tokens of each sample
    image_token_id: int | None = None  # what stands for images among them
    notes: list[str] = field(default_factory=list)
    faults: list[SampleFault] = field(default_factory=list)
    excluded: int = 0
    stats: BatchStats | None = None


@dataclass(slots=True, eq=False)
class _Work:
    """A sample while its batch is built."""

    place: int  # in the batch
    shard: int
    offset: int
    key: str = ""
    record: bytes = b""
    text: TextResult | None = None
    images: list[Any] = field(default_factory=list)
    sizes: list[tuple[int, int]] | None = None  # of its images, as the text was told
    spans: list[tuple[int, int]] = field(default_factory=list)  # where the images lie in the memory read into


class BatchBuilder:
    """Builds batches from plans; one per process, sent there by fork.

    Args:
        paths: of the shards, for messages.
        prefixes: of the keys, part by part.
        open_fetcher: makes the process's fetcher.
        image: fits images; None leaves their bytes.
        text: tokenises records; None leaves their bytes.
        transform: the user's.
        seed: of the transform's random numbers.
        slabs: where pixels and encoded images go.
    """

    def __init__(
        self,
        *,
        paths: list[str],
        prefixes: list[str],
        open_fetcher: Callable[[], Fetcher],
        image: ImageFit | None,
        text: Text | None,
        transform: Transform | None,
        seed: int,
        slabs: SlabPool,
    ) -> None:
        self._paths = paths
        self._prefixes = prefixes
        self._open_fetcher = open_fetcher
        self._image = image
        self._text = text
        self._transform = transform
        self._seed = seed
        self._slabs = slabs
        self._fetcher: Fetcher | None = None
        self._compressed = np.array([is_compressed(path) for path in paths], np.bool_)
        self._scratch = np.empty(0, np.uint8)
        self._bytes_alone = image is None and text is None and transform is None

    def __getitem__(self, plan: BatchPlan) -> Built | LoaderError:
        try:
            return self._build(plan)
        except LoaderError as error:
            return error  # raised in the main process, without a worker's traceback around it

    def _build(self, plan: BatchPlan) -> Built:
        if self._fetcher is None:  # files are opened where they are read
            self._fetcher = self._open_fetcher()
        clock = StageClock()
        size = len(plan.positions)
        built = Built(keys=[""] * size, positions=np.full(size, FILLER, np.int64), rows=plan.rows)
        if self._bytes_alone and self._pass_on(built, plan):
            built.stats = clock.stop(
                samples=len(plan.index.size),
                images=len(built.image_samples),
                bytes_used=int(plan.index.size.sum()),
            )
            return built
        works = self._fetch(built, plan, clock)
        self._add_images(built, plan, works)
        clock.lap("decode")
        for place, work in enumerate(works):
            if work is not None:
                built.keys[place] = work.key
                built.positions[place] = plan.positions[place]
        if self._text is None:
            built.records = [b"" if work is None else work.record for work in works]
        else:
            texts = [None if work is None else work.text for work in works]
            _add_texts(built, texts, self._text.pad_token_id)
            built.image_token_id = getattr(self._text, "image_token_id", None)
        built.faults.sort(key=lambda fault: fault.position)
        built.stats = clock.stop(
            samples=sum(work is not None for work in works),
            images=len(built.image_samples),
            bytes_used=int(plan.index.size.sum()),
        )
        return built

    def _pass_on(self, built: Built, plan: BatchPlan) -> bool:
        """Read a batch of which nothing is decoded; False, with nothing done, when there is anything out of the ordinary in it."""
        index, fetcher = plan.index, self._fetcher
        if (
            not isinstance(fetcher, LocalFetcher)
            or index.excluded.any()
            or self._compressed[index.shard].any()
        ):
            return False
        memory = self._memory(plan, int(index.size.sum()), in_place=True)
        begins, errors = fetcher.read_into(memory, index.shard, index.offset, index.size)
        located = [] if errors else locate_members(memory, begins, index.size)
        if errors or None in located:
            return False
        places = np.flatnonzero(plan.positions != FILLER).tolist()
        view = memoryview(memory.data)
        keys, records = [""] * len(built.keys), [b""] * len(built.keys)
        samples: list[int] = []
        spans: list[tuple[int, int]] = []
        for place, part, images, found in zip(
            places, index.part.tolist(), index.images.tolist(), located, strict=True
        ):
            assert found is not None
            before = len(spans)
            for name, begin, end in found.members:
                if name == RECORD_FIELD:
                    records[place] = bytes(view[begin:end])
                elif is_image_field(name):
                    spans.append((begin, end))
                    samples.append(place)
            if len(spans) - before != images:
                return False
            keys[place] = self._prefixes[part] + found.key
        built.keys, built.positions[:] = keys, plan.positions
        built.image_samples, built.image_spans, built.records = samples, spans, records
        built.memory = None if self._lies_in_slab(memory, plan) or not spans else memory
        return True

    def _lies_in_slab(self, memory: Pixels, plan: BatchPlan) -> bool:
        return plan.slab is not None and len(memory) <= self._slabs.size

    def _fetch(self, built: Built, plan: BatchPlan, clock: StageClock) -> list[_Work | None]:
        """All samples read, taken apart and tokenised, by their place in the batch; None for fillers."""
        assert self._fetcher is not None
        works: list[_Work | None] = [None] * len(plan.positions)
        index, places = plan.index, np.flatnonzero(plan.positions != FILLER)
        if index.excluded.any():
            kept = np.flatnonzero(~index.excluded)
            built.excluded = len(index.excluded) - len(kept)
            index, places = index[kept], places[kept]
        for work, error in self._read(built, plan, index, places):
            clock.lap("fetch")
            try:
                if error is not None:
                    raise error
                self._understand(work, plan)
                works[work.place] = work
            except SampleError as fault:
                built.faults.append(self._fault(plan, work, fault))
            clock.lap("text")
        clock.lap("fetch")
        return works

    def _read(
        self, built: Built, plan: BatchPlan, index: Rows, places: IntArray
    ) -> Iterator[tuple[_Work, SampleError | None]]:
        """Each sample taken apart, or why it cannot be."""
        fetcher = self._fetcher
        assert fetcher is not None
        if isinstance(fetcher, LocalFetcher) and not self._compressed[index.shard].any():
            yield from self._read_together(fetcher, built, plan, index, places)
            return
        frames: dict[tuple[int, int], list[memoryview]] = {}  # of this batch, as samples
        spans = fetcher.read(
            index.shard, index.offset, index.size, index.extent_begin, index.extent_end, batch=plan.number
        )
        for number, span in spans:
            work = _work_of(index, number, places)
            try:
                if isinstance(span, SampleError):
                    raise span
                own = self._sample_of(frames, work, span, int(index.ordinal[number]))
                self._take_apart(work, own, index, number)
            except SampleError as error:
                yield work, error
            else:
                yield work, None

    def _read_together(
        self, fetcher: LocalFetcher, built: Built, plan: BatchPlan, index: Rows, places: IntArray
    ) -> Iterator[tuple[_Work, SampleError | None]]:
        """The same for plain local shards: read one behind the other, into the slab if it is bytes that are asked for."""
        in_place = self._image is None and self._transform is None
        memory = self._memory(plan, int(index.size.sum()), in_place=in_place)
        begins, errors = fetcher.read_into(memory, index.shard, index.offset, index.size)
        located = locate_members(memory, begins, index.size)
        if in_place and all(found is not None or number in errors for number, found in enumerate(located)):
            built.memory = memory
        view = memoryview(memory.data)
        for number, found in enumerate(located):
            work = _work_of(index, number, places)
            try:
                if number in errors:
                    raise errors[number]
                if found is None:
                    begin = int(begins[number])
                    self._take_apart(work, view[begin : begin + int(index.size[number])], index, number)
                else:
                    members = [(field, view[begin:end]) for field, begin, end in found.members]
                    self._sort(work, found.key, members, index, number)
                    work.spans = [
                        (begin, end) for field, begin, end in found.members if is_image_field(field)
                    ]
            except SampleError as error:
                yield work, error
            else:
                yield work, None

    def _memory(self, plan: BatchPlan, size: int, *, in_place: bool) -> Pixels:
        """Memory to read `size` bytes into, uint8 [size]."""
        if in_place and plan.slab is not None and size <= self._slabs.size:
            return self._slabs.memory(plan.slab)[:size]
        if in_place or self._transform is not None:  # others may keep what lies there
            return np.empty(size, np.uint8)
        if size > len(self._scratch):
            self._scratch = np.empty(max(size, 2 * len(self._scratch)), np.uint8)
        return self._scratch[:size]

    def _sample_of(
        self,
        frames: dict[tuple[int, int], list[memoryview]],
        work: _Work,
        span: memoryview,
        ordinal: int,
    ) -> memoryview:
        """A sample's tar bytes: the span, or its part of a compressed frame."""
        path = self._paths[work.shard]
        if not is_compressed(path):
            return span
        name, where = (work.shard, work.offset), f"{path}: frame at byte {work.offset}"
        try:
            if name not in frames:
                frames[name] = split_frame(span, where=where)
            return frame_sample(frames[name], ordinal, where=where)
        except FormatError as error:
            raise SampleError("index-mismatch", str(error)) from None

    def _take_apart(self, work: _Work, span: memoryview, index: Rows, number: int) -> None:
        """Find the members of a sample of any kind."""
        try:
            key, members = read_members(span, where="the sample")
        except FormatError as error:
            raise SampleError("index-mismatch", str(error)) from None
        self._sort(work, key, members, index, number)

    def _sort(
        self, work: _Work, key: str, members: Sequence[tuple[str, memoryview]], index: Rows, number: int
    ) -> None:
        """Tell the record of a sample from its images."""
        work.key = self._prefixes[int(index.part[number])] + key
        record = None
        for field_name, data in members:
            if field_name == RECORD_FIELD:
                record = data
            elif is_image_field(field_name):
                work.images.append(data)
        if len(work.images) != index.images[number]:
            raise SampleError(
                "index-mismatch", f"{len(work.images)} images; the index counts {index.images[number]}"
            )
        if record is not None:
            work.record = bytes(record)
        elif self._text is not None or self._transform is not None:
            raise SampleError("record-missing", f"no member {key}.{RECORD_FIELD}")

    def _understand(self, work: _Work, plan: BatchPlan) -> None:
        """The user's transform, and the text."""
        record: bytes | dict[str, Any] = work.record
        if self._transform is not None:
            key = key_of(self._seed, _TRANSFORM_KEY, plan.epoch, int(plan.positions[work.place]))
            generator = np.random.Generator(np.random.Philox(key=key))
            sample = self._transform(Sample(work.key, load_record(work.record), work.images), generator)
            if sample is None:
                raise SampleError("transform-left-out", "the transform returned None")
            record, work.images = sample.record, list(sample.images)
            if self._text is None:
                work.record = msgspec.json.encode(record)
        if self._text is None:
            return
        text: Any = self._text
        if getattr(text, "needs_image_sizes", False):
            work.sizes = [size_of(image) for image in work.images]
            work.text = text(record, image_sizes=work.sizes)
        else:
            work.text = text(record)
        named = work.text.images
        if named is not None and named != len(
            work.images
        ):  # the model would pair images with the wrong places
            raise SampleError(
                "images-not-as-recorded", f"{len(work.images)} images, and the record names {named}"
            )

    def _add_images(self, built: Built, plan: BatchPlan, works: list[_Work | None]) -> None:
        """Fit all images, one sample after another; a sample whose image fails is taken out of `works`."""
        if built.memory is not None:  # they are where they belong
            for place, work in enumerate(works):
                if work is not None:
                    built.image_samples += [place] * len(work.spans)
                    built.image_spans += work.spans
            if self._lies_in_slab(built.memory, plan):
                built.memory = None
            return
        # encoded images may lie in the slab, out of place
        slab = None if plan.slab is None or self._image is None else self._slabs.memory(plan.slab)
        room = _Room(slab)
        for place, work in enumerate(works):
            if work is None:
                continue
            begin = room.used
            try:
                fitted = self._put_all(room, work)
            except SampleError as error:
                room.used = begin
                built.faults.append(self._fault(plan, work, error))
                works[place] = None
                continue
            built.image_samples += [place] * len(fitted)
            built.image_tiles += [image.tiles for image in fitted]
            built.image_shapes += [image.shape for image in fitted]
            built.image_sizes += [image.size for image in fitted]
            built.image_spans += [image.span for image in fitted]
        if not room.in_slab:
            built.memory = room.memory[: room.used]

    def _put_all(self, room: "_Room", work: _Work) -> list["_Put"]:
        """A sample's images into their places."""
        fitted = [self._put(room, data, len(work.images)) for data in work.images]
        if self._image is not None and work.sizes not in (None, [image.size for image in fitted]):
            raise SampleError("image-undecodable", f"other sizes than its headers say: {work.sizes}")
        return fitted

    def _put(self, room: "_Room", data: Picture, images: int) -> "_Put":
        """One image, of a sample of so many, into its place."""
        begin = room.used
        if self._image is None:
            data = _encoded(data)
            room.take(len(data))[:] = np.frombuffer(data, np.uint8)
            return _Put(1, (0, 0), (0, 0), (begin, room.used))
        fitting = self._image.prepare(data, images=images)
        fitting.write(room.take(fitting.nbytes))
        return _Put(fitting.tiles, fitting.shape, fitting.size, (begin, room.used))

    def _fault(self, plan: BatchPlan, work: _Work, error: SampleError) -> SampleFault:
        return SampleFault(
            position=int(plan.positions[work.place]),
            key=work.key,
            shard=self._paths[work.shard],
            offset=work.offset,
            code=error.code,
            detail=error.detail,
        )


def _work_of(index: Rows, number: int, places: IntArray) -> _Work:
    return _Work(int(places[number]), int(index.shard[number]), int(index.offset[number]))


class _Put(NamedTuple):
    """What is known of an image that is in its place."""

    tiles: int
    shape: tuple[int, int]  # of each of them
    size: tuple[int, int]  # before fitting
    span: tuple[int, int]  # of its bytes


class _Room:
    """Memory that images are put into, one after another: a slab, or ordinary memory as soon as that is full."""

    def __init__(self, slab: Pixels | None) -> None:
        self.in_slab = slab is not None
        self.memory = np.empty(0, np.uint8) if slab is None else slab
        self.used = 0

    def take(self, size: int) -> Pixels:
        """The next bytes, uint8 [size]."""
        begin, self.used = self.used, self.used + size
        if self.used > len(self.memory):
            larger = np.empty(max(2 * len(self.memory), self.used, _LEAST_ROOM), np.uint8)
            larger[:begin] = self.memory[:begin]
            self.memory, self.in_slab = larger, False
        return self.memory[begin : self.used]


def _encoded(image: Picture) -> bytes | memoryview:
    if isinstance(image, bytes | memoryview):
        return image
    raise LoaderError(
        f"the transform made {type(image).__name__} of an image, but without image= there is nothing that fits it; return bytes"
    )


def _add_texts(built: Built, texts: list[TextResult | None], pad_token_id: int) -> None:
    """Lay the texts into their rows, one behind another, and pad to the longest row.

    A row without any token has one padding token, which is attended.
    """
    built.texts = np.array([0 if text is None else len(text.input_ids) for text in texts], np.int64)
    rows = int(built.rows[-1]) + 1 if len(built.rows) else 0
    used = np.zeros(rows, np.int64)
    np.add.at(used, built.rows, built.texts)
    built.lengths = np.maximum(used, 1)
    shape = rows, int(built.lengths.max(initial=0))
    built.input_ids = np.full(shape, pad_token_id, np.int32)
    built.labels = np.full(shape, IGNORE_INDEX, np.int32)
    begin, last = 0, -1
    for row, text in zip(built.rows.tolist(), texts, strict=True):
        begin = begin if row == last else 0
        last = row
        if text is not None:
            end = begin + len(text.input_ids)
            built.input_ids[row, begin:end] = text.input_ids
            built.labels[row, begin:end] = text.labels
            begin = end
            built.notes += text.notes
