"""`Batch`: what the loader hands out. All of a rank's tensors of one step, and where they came from."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from loaders import exports

_PINNED_BYTES = 8 * 1024 * 1024  # 512 rows of 2,048 tokens


@dataclass(frozen=True, slots=True)
class SampleFault:
    """A sample that became a filler.

    Attributes:
        position: in the epoch.
        key: in its shard; empty when the shard could not be read so far.
        shard: path of the tar; empty where it is not known, as of images decoded on the device.
        offset: of the sample in it, in bytes; -1 where it is not known.
        code: the reason code.
        detail: what was seen.
    """

    position: int
    key: str
    shard: str
    offset: int
    code: str
    detail: str

    def __str__(self) -> str:
        place = f"{self.shard} offset {self.offset}, " if self.shard else ""
        return f"{self.code} ({self.detail}), {place}key {self.key or 'unknown'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """S samples in B rows; B = S unless samples are packed into rows.

    A filler stands where a rank has no sample, or where a sample could not be used: `valid` is False, the key is empty, the position -1;
    it has one padding token, attended, with label -100, and no image.

    Attributes:
        keys: of the samples in their shards, S strings.
        positions: int64 [S], in the epoch.
        valid: bool [S].
        rows: int64 [S], the row each sample is in.
        records: the JSON records as stored, S byte strings (empty for fillers), when the loader's `text` is None.
        input_ids: int64 [B, L], padded with the tokenizer's padding token; -200 stands for an image. None without `text`.
        labels: int64 [B, L], padded with -100. None without `text`.
        attention_mask: bool [B, L]. None without `text`.
        position_ids: int64 [B, L] when packed.
        segment_ids: int64 [B, L] when packed.
        pad_token_id: what `input_ids` are padded with. None without `text`.
        image_token_id: what stands for images among `input_ids`, where the loader's `text` says (`ChatText`).
        images: uint8 [n, 3, H, W], channels last in memory (as decoded; `.contiguous()` reorders), n images of the batch, 0 allowed; with
            tiled fits (``anyres``, ``split``) all tiles of all images, one image after another; with ``native`` flat uint8, one image after
            another as [H, W, 3]; a list of n encoded images when the loader's `image` is None.
        image_samples: int64 [n], the sample each image belongs to.
        image_shapes: int64 [n, 2], height and width of each image in `images`, with ``native``.
        image_tiles: int64 [n], the tiles of each image, the whole image's included, with tiled fits.
        image_sizes: int64 [n, 2], height and width of each image before it was fitted. None without `image`.
        image_fit: what fitted the images.
        state: the loader's state after this batch, equal on all ranks; JSON-able.
        faults: samples of this batch that became fillers.
    """

    keys: list[str]
    positions: torch.Tensor
    valid: torch.Tensor
    rows: torch.Tensor
    records: list[bytes] | None = None
    input_ids: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    pad_token_id: int | None = None
    image_token_id: int | None = None
    images: torch.Tensor | list[bytes] | list[memoryview]
    image_samples: torch.Tensor
    image_shapes: torch.Tensor | None = None
    image_tiles: torch.Tensor | None = None
    image_sizes: torch.Tensor | None = None
    image_fit: Any = field(default=None, repr=False)
    state: dict[str, Any]
    faults: tuple[SampleFault, ...] = ()
    _copied: Callable[[torch.cuda.Event], None] | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy has memory of its own, and no slab to look after
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "_copied"}
        if not isinstance(self.images, torch.Tensor):  # views over a slab
            values["images"] = [bytes(image) for image in self.images]
        return _from_fields, (values,)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> "Batch":
        """The batch with its tensors on `device`.

        Copies to a CUDA device run on the current stream. Those of pixels in a slab, and of small tensors, run beside the host, and the
        source is kept until they are complete, so this batch may be dropped at once. To other devices the host waits for each copy.

        Args:
            device: where to.
            non_blocking: False waits for each copy to CUDA, too. Default True.
        """
        device = torch.device(device)
        beside = (
            non_blocking and device.type == "cuda"
        )  # elsewhere nothing would tell when a slab may be used again
        moved: dict[str, Any] = {
            item.name: (_pinned(value) if beside else value).to(device, non_blocking=beside)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        if device.type == "cuda" and self._copied is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._copied(event)
        if device.type != "cpu":  # the copy has nothing to do with the slab any more
            moved["_copied"] = None
        return replace(self, **moved)

    def to_llava(self) -> dict[str, Any]:
        """The dict that LLaVA's own collator makes: see `loaders.exports.to_llava`."""
        return exports.to_llava(self)

    def to_hf(self) -> dict[str, Any]:
        """The dict that a model of transformers is called with: see `loaders.exports.to_hf`."""
        return exports.to_hf(self)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the device can fetch it: a small one is copied into memory that torch keeps for that, and uses again.

    Tokens lie in ordinary memory, from which the host itself would feed each copy, and wait; the copy here takes microseconds. Pixels that
    found no slab are rather waited for than pinned: so much pinned memory would never be given back.
    """
    small = tensor.device.type == "cpu" and tensor.nbytes <= _PINNED_BYTES
    return tensor.pin_memory() if small and not tensor.is_pinned() else tensor


def _from_fields(values: dict[str, Any]) -> Batch:
    return Batch(**values)
