"""`DevicePrefetcher`: batches on the device before they are asked for, normalised there.

On CUDA the next batch is copied and normalised on a side stream while the current one trains:

    host          | ask for 2 | launch step 1      | ask for 3 | launch step 2      |
    side stream   |             copy 2, normalise  |             copy 3, normalise  |
    main stream   |                 step 1                  |     step 2

The main stream waits for the side stream's event of a batch, the host for neither. What is ahead is not yet handed out: the state is that
of the last batch handed out.
"""

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch

from loaders.arguments import integer
from loaders.batch import Batch, SampleFault
from loaders.image import ImageTransform
from loaders.loader import StreamingLoader
from loaders.nvjpeg import NvjpegDecoder, invalidate
from loaders.report import LoaderReport
from loaders.state import State
from loaders.stats import DeviceStats
from shardify.errors import LoaderError, UsageError

Decode = Literal["cpu", "nvjpeg"]


@runtime_checkable
class Normalize(Protocol):
    """What the prefetcher needs of an image transform; `loaders.ImageTransform` is one."""

    def normalize(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The model's input of uint8 [n, 3, H, W], or of flat pictures as a batch has them with ``native``, on any device."""


@dataclass(slots=True)
class _Ahead:
    """A batch that is not handed out yet, or the exception in its place."""

    source: Batch | None  # as the loader gave it; until it is on the device
    batch: Batch | None = None  # there
    ready: torch.cuda.Event | None = None
    faults: tuple[SampleFault, ...] = ()  # found on the way
    error: Exception | None = None


class DevicePrefetcher:
    """Iterates like its loader; the batches are on `device`, their images normalised.

    ``for batch in prefetcher`` runs to the end of the epoch, and continues it after a ``break``. Once it is iterated, ask the prefetcher,
    not the loader, for states, lengths and the epoch: the loader is ahead. Exceptions of the loader come out where the batch would. The
    loader's `on_error` and `max_errors` hold for images that only the device finds bad, too.

    Args:
        loader: gives the batches.
        device: where to. CUDA devices are copied to ahead of use; on others each batch is moved when it is asked for.
        dtype: of images, float32 (default), bfloat16 or float16; None leaves them uint8, not normalised.
        normalize: whose mean and std to apply; by default the loader's `image`. With ``decode="nvjpeg"`` an `ImageTransform`, which also
            says size and fit.
        prepare: done to each batch on the host before it is copied, such as expanding image tokens. Default None.
        decode: ``"cpu"`` (default), in the loader's workers; or ``"nvjpeg"``, on the device: the loader has ``image=None``, and
            nvImageCodec is installed (`loaders.nvjpeg`).
        depth: batches kept on the device beyond the one handed out; by default 1 on CUDA, 0 elsewhere, where nothing would run beside.

    Raises:
        UsageError: arguments that contradict each other, a device that is not there, no nvImageCodec.
    """

    def __init__(
        self,
        loader: StreamingLoader,
        device: torch.device | str,
        dtype: torch.dtype | None = torch.float32,
        *,
        normalize: Normalize | None = None,
        prepare: Callable[[Batch], Batch] | None = None,
        decode: Decode = "cpu",
        depth: int | None = None,
    ) -> None:
        self.device = _device(device)
        if dtype is not None and not dtype.is_floating_point:
            raise UsageError(f"dtype={dtype}: a floating-point type is needed, or None to leave images uint8")
        cuda = self.device.type == "cuda"
        self._loader, self._dtype, self._prepare = loader, dtype, prepare
        self._depth = integer("depth", int(cuda) if depth is None else depth, least=0)
        self._normalize = _normalize(loader, dtype, normalize, decode)
        self._decoder = None
        if decode == "nvjpeg":
            assert isinstance(self._normalize, ImageTransform)
            self._decoder = NvjpegDecoder(self._normalize, self.device)
        self._stream = _SideStream(self.device) if cuda else None
        self._source: Iterator[Batch] | None = None
        self._source_epoch = -1
        self._ahead: deque[_Ahead] = deque()
        self._state: State = {}  # before the first batch ahead, when there is one
        self._epoch = -1  # of what is ahead
        self._batches = 0
        self._waited = self._moving = 0.0
        self._images = self._on_host = 0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self._epoch if self._ahead else self._loader.epoch

    def __len__(self) -> int:
        """Batches left in this epoch, the same on every rank."""
        ahead = sum(item.source is not None or item.batch is not None for item in self._ahead)
        return ahead + (len(self._loader) if self.epoch == self._loader.epoch else 0)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch."""
        epoch = self.epoch
        while self.epoch == epoch and self._look_ahead():
            yield self._hand_out()

    def state_dict(self) -> State:
        """The state after the last batch handed out: what is ahead does not count."""
        return copy.deepcopy(self._state) if self._ahead else self._loader.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Continue from a state, as `StreamingLoader.load_state_dict`; what is ahead is dropped.

        Raises:
            StateError: a state of other shards or another order; nothing has changed.
        """
        self._loader.load_state_dict(state)
        self._source = None
        self._ahead.clear()

    def close(self) -> None:
        """End the workers, and drop what is ahead. The next ``for`` begins with the batch after the last one handed out."""
        if self._ahead:
            self.load_state_dict(self._state)
        self._source = None
        self._loader.close()

    def report(self) -> LoaderReport:
        """The loader's report, with the images that could not be decoded on the device; ahead by what waits there."""
        return self._loader.report()

    def stats(self) -> DeviceStats:
        """What the batches handed out have cost here; the loader's own figures are `loader.stats()`."""
        return DeviceStats(
            batches=self._batches,
            wait=self._waited,
            moving=self._moving,
            device_wait=self._stream.waited() if self._stream is not None else 0.0,
            images_on_device=self._images,
            images_on_host=self._on_host,
        )

    def _look_ahead(self) -> bool:
        """Have one more batch than `depth`, as far as the epoch goes; whether there is any."""
        began = time.perf_counter()
        while len(self._ahead) <= self._depth and self._pull():
            pass
        pulled = time.perf_counter()
        for item in self._ahead:
            if item.source is not None and item.error is None:
                self._move(item)
        now = time.perf_counter()
        self._waited += now - began
        self._moving += now - pulled
        return bool(self._ahead)

    def _pull(self) -> bool:
        """Take the next batch of the epoch from the loader, or its exception; whether there was one."""
        epoch = self._loader.epoch
        if self._ahead and (self._ahead[-1].error is not None or epoch != self._epoch):
            return False
        if not self._ahead:
            self._state, self._epoch = self._loader.state_dict(), epoch
        if self._source is None or self._source_epoch != epoch:
            self._source, self._source_epoch = iter(self._loader), epoch
        try:
            self._ahead.append(_Ahead(next(self._source)))
        except StopIteration:
            self._source = None
            return False
        except Exception as error:  # noqa: BLE001 - it belongs to the batch that is not there
            self._source = None
            self._ahead.append(_Ahead(None, error=error))
        except BaseException:
            self._source = None
            raise
        return True

    def _move(self, item: _Ahead) -> None:
        """Start a batch on its way to the device; on failure it stays in place, to be tried again after the exception is told."""
        assert item.source is not None
        try:
            if self._stream is None:
                item.batch = self._on_device(item.source)
            else:
                item.batch, item.ready = self._stream.run(self._on_device, item.source)
        except Exception as error:  # noqa: BLE001 - it belongs to this batch, not to the one that is handed out now
            item.error = error
        else:
            item.faults = item.batch.faults[len(item.source.faults) :]
            item.source = None

    def _on_device(self, batch: Batch) -> Batch:
        """Prepared, decoded, copied, normalised: on the current stream."""
        if self._prepare is not None:
            batch = self._prepare(batch)
        if self._decoder is not None and not isinstance(batch.images, torch.Tensor):
            decoded = self._decoder(batch.images)
            batch = replace(
                invalidate(batch, decoded.faults), images=decoded.images, image_fit=self._normalize
            )
            self._images += len(decoded.images) - decoded.on_host
            self._on_host += decoded.on_host
        moved = batch.to(self.device)
        if self._dtype is None or not isinstance(moved.images, torch.Tensor):
            return moved
        assert self._normalize is not None
        return replace(moved, images=self._normalize.normalize(moved.images, self._dtype))

    def _hand_out(self) -> Batch:
        item = self._ahead[0]
        if item.error is not None:
            error, item.error = item.error, None
            if item.source is None:
                self._ahead.popleft()
            raise error
        assert item.batch is not None
        if item.faults:
            try:
                self._loader.leave_out(item.faults)
            except LoaderError:
                self.close()  # as the loader: the next `for` begins with this batch
                raise
        if self._stream is not None and item.ready is not None:
            self._stream.hand_over(item.batch, item.ready)
        self._ahead.popleft()
        self._state = copy.deepcopy(item.batch.state)
        self._batches += 1
        return item.batch


class _SideStream:
    """A CUDA stream beside the one that trains."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._waited = 0.0

    def run(self, work: Callable[[Batch], Batch], batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        """What `work` makes of a batch on this stream, and the event of its completion."""
        with torch.cuda.stream(self._stream):
            result = work(batch)
            return result, _event(self._stream)

    def hand_over(self, batch: Batch, ready: torch.cuda.Event) -> None:
        """Let the current stream wait for a batch, and its memory for the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._waits.append((_event(current), ready))
        current.wait_event(ready)
        for item in fields(batch):
            tensor = getattr(batch, item.name)
            if isinstance(tensor, torch.Tensor):
                # it was allocated on this stream, and would be used again here as soon as the host has dropped it
                tensor.record_stream(current)
        self.waited()

    def waited(self) -> float:
        """Seconds that streams waited for batches, of the batches whose copies are known to be complete; asks, never waits."""
        while self._waits and all(event.query() for event in self._waits[0]):  # type: ignore[no-untyped-call]
            asked, ready = self._waits.popleft()
            self._waited += max(0.0, asked.elapsed_time(ready) / 1000)
        return self._waited


def _event(stream: Any) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"device={str(device)!r}: torch finds no CUDA device here")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch has both for what is not there
        raise UsageError(f"device={str(name)!r}: {error}") from None
    if device.type != "cuda":
        return device
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _normalize(
    loader: StreamingLoader, dtype: torch.dtype | None, normalize: Normalize | None, decode: Decode
) -> Normalize | None:
    """Whom to normalise by, and to decode on the device by."""
    image = getattr(loader, "image", None)
    if decode not in get_args(Decode):
        raise UsageError(f"decode={decode!r}; there are {', '.join(get_args(Decode))}")
    if decode == "nvjpeg":
        if image is not None or not isinstance(normalize, ImageTransform):
            raise UsageError(
                'decode="nvjpeg": give the loader image=None, and the prefetcher normalize=ImageTransform(...)'
            )
        return normalize
    if normalize is None and dtype is not None and image is not None:
        if not isinstance(image, Normalize):
            raise UsageError(
                f"the loader's image, a {type(image).__name__}, has no normalize(images, dtype): give normalize=ImageTransform(...)"
                " with its mean and std, or dtype=None to have uint8"
            )
        return image
    return normalize
