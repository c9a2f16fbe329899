"""Building a batch in a worker: a plan in, plain arrays out, pixels straight into a slab."""

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from loaders.batch import SampleFault
from loaders.batching import FILLER
from loaders.fetch import LocalFetcher
from loaders.slabs import SlabPool
from loaders.text import IGNORE_INDEX, TextResult
from shardify.errors import FormatError, LoaderError, SampleError
from shardify.format.names import RECORD_FIELD, is_image_field
from shardify.format.shards import ShardSet
from shardify.format.tar import read_members

IntArray = npt.NDArray[np.int64]
_PARENT_CHECK = 0.5  # seconds


class ImageFit(Protocol):
    """What the loader needs of an image transform; `loaders.ImageTransform` is one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of every result."""

    def into(self, data: bytes | bytearray | memoryview, out: torch.Tensor) -> None:
        """Decode into `out`, uint8 of `shape`; raises ImageError."""


class Text(Protocol):
    """What the loader needs of a text transform; `loaders.LlavaText` is one."""

    pad_token_id: int

    def __call__(self, record: bytes | memoryview) -> TextResult:
        """A record's tokens and labels; raises TextError or RecordError."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchPlan:
    """What a worker needs to know to build a batch.

    Attributes:
        positions: int64 [S], fillers (-1) last.
        shards: int64 [V], of the V samples that are no fillers: number of the shard,
        offsets: int64 [V], offset in it,
        sizes: int64 [V], bytes,
        images: int64 [V], and images.
        slab: where the pixels go; None for ordinary memory.
    """

    positions: IntArray
    shards: IntArray
    offsets: IntArray
    sizes: IntArray
    images: IntArray
    slab: int | None = None


@dataclass(slots=True, eq=False)
class Built:
    """A batch on its way from a worker: no tensors, which would travel through named shared memory."""

    keys: list[str]
    positions: IntArray
    image_samples: list[int]
    pixels: npt.NDArray[np.uint8] | None = None  # [n, H, W, 3]; None when they are in the slab
    encoded: list[bytes] = field(default_factory=list)
    records: list[bytes] | None = None
    input_ids: npt.NDArray[np.int32] | None = None  # [S, L]
    labels: npt.NDArray[np.int32] | None = None
    lengths: IntArray | None = None  # [S], tokens of each row
    notes: list[str] = field(default_factory=list)
    faults: list[SampleFault] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Sample:
    key: str = ""
    record: bytes = b""
    text: TextResult | None = None
    images: list[memoryview] = field(default_factory=list)


class BatchBuilder:
    """Builds batches from plans; one per process, sent there by fork.

    Args:
        shards: the data set.
        image: fits images; None leaves their bytes.
        text: tokenises records; None leaves their bytes.
        slabs: where pixels go.
    """

    def __init__(self, shards: ShardSet, image: ImageFit | None, text: Text | None, slabs: SlabPool) -> None:
        self._paths = [shard.path for shard in shards.shards]
        self._image = image
        self._text = text
        self._slabs = slabs
        self._fetcher: LocalFetcher | None = None
        self._process = -1

    def __getitem__(self, plan: BatchPlan) -> Built | LoaderError:
        try:
            return self._build(plan)
        except LoaderError as error:
            return error  # raised in the main process, without a worker's traceback around it

    def _build(self, plan: BatchPlan) -> Built:
        if self._process != os.getpid():  # files are opened where they are read
            self._fetcher, self._process = LocalFetcher(self._paths), os.getpid()
        assert self._fetcher is not None
        size = len(plan.positions)
        built = Built(keys=[""] * size, positions=np.full(size, FILLER, np.int64), image_samples=[])
        samples: list[_Sample | None] = [None] * size
        for number, span in self._fetcher.read(plan.shards, plan.offsets, plan.sizes):
            sample = _Sample()
            try:
                if isinstance(span, SampleError):
                    raise span
                self._read(sample, span, int(plan.images[number]))
            except SampleError as error:
                built.faults.append(self._fault(plan, number, sample.key, error))
            else:
                samples[number] = sample
        self._add_images(built, plan, samples)
        for number, built_sample in enumerate(samples):
            if built_sample is not None:
                built.keys[number] = built_sample.key
                built.positions[number] = plan.positions[number]
        if self._text is None:
            built.records = [b"" if sample is None else sample.record for sample in samples]
        else:
            _add_texts(built, [None if s is None else s.text for s in samples], self._text.pad_token_id)
        built.faults.sort(key=lambda fault: fault.position)
        return built

    def _read(self, sample: _Sample, span: memoryview, images: int) -> None:
        """Take a sample's span apart and tokenise its record: what needs no memory for pixels."""
        try:
            sample.key, members = read_members(span, where="the sample")
        except FormatError as error:
            raise SampleError("index-mismatch", str(error)) from None
        record = next((data for name, data in members if name == RECORD_FIELD), None)
        sample.images = [data for name, data in members if is_image_field(name)]
        if len(sample.images) != images:
            raise SampleError("index-mismatch", f"{len(sample.images)} images; the index counts {images}")
        if self._text is None:
            sample.record = b"" if record is None else bytes(record)
        elif record is None:
            raise SampleError("record-missing", f"no member {sample.key}.{RECORD_FIELD}")
        else:
            sample.text = self._text(record)

    def _add_images(self, built: Built, plan: BatchPlan, samples: list[_Sample | None]) -> None:
        """Fit all images, one sample after another; a sample whose image fails is taken out of `samples`."""
        pixels = self._memory(plan)
        count = 0
        for number, sample in enumerate(samples):
            if sample is None:
                continue
            try:
                for place, data in enumerate(sample.images, start=count):
                    if self._image is None:
                        built.encoded.append(bytes(data))
                    else:
                        # seen as [3, H, W]; the channels stay last in memory, as they are decoded
                        self._image.into(data, torch.from_numpy(pixels[place]).permute(2, 0, 1))
            except SampleError as error:
                built.faults.append(self._fault(plan, number, sample.key, error))
                samples[number] = None
                continue
            built.image_samples += [number] * len(sample.images)
            count += len(sample.images)
        if plan.slab is None and self._image is not None:
            built.pixels = pixels[:count]

    def _memory(self, plan: BatchPlan) -> npt.NDArray[np.uint8]:
        """Room for the pixels of all images of a plan, uint8 [n, H, W, 3]."""
        if self._image is None:
            return np.empty(0, np.uint8)
        channels, height, width = self._image.shape
        shape = (int(plan.images.sum()), height, width, channels)
        if plan.slab is None:
            return np.empty(shape, np.uint8)
        return self._slabs.memory(plan.slab)[: np.prod(shape)].reshape(shape)

    def _fault(self, plan: BatchPlan, number: int, key: str, error: SampleError) -> SampleFault:
        return SampleFault(
            position=int(plan.positions[number]),
            key=key,
            shard=self._paths[plan.shards[number]],
            offset=int(plan.offsets[number]),
            code=error.code,
            detail=error.detail,
        )


def _add_texts(built: Built, texts: list[TextResult | None], pad_token_id: int) -> None:
    """Pad to the longest text; a filler, or a text of no tokens, has one padding token, which is attended."""
    built.lengths = np.array([1 if text is None else max(len(text.input_ids), 1) for text in texts], np.int64)
    shape = len(texts), int(built.lengths.max(initial=0))
    built.input_ids = np.full(shape, pad_token_id, np.int32)
    built.labels = np.full(shape, IGNORE_INDEX, np.int32)
    for row, text in enumerate(texts):
        if text is not None:
            built.input_ids[row, : len(text.input_ids)] = text.input_ids
            built.labels[row, : len(text.labels)] = text.labels
            built.notes += text.notes


def start_worker(_: int, *, parent: int) -> None:
    """Set a worker process up: one that ends with its parent, whatever ended that, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizers' own threads do not survive a fork
    # not PR_SET_PDEATHSIG, which would also strike when only the thread that started the workers ends
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK)
    os._exit(1)
