"""A worker's arrays to a `Batch`: tensors over them and over the slab, nothing copied but tokens."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from loaders.batch import Batch
from loaders.batching import FILLER
from loaders.build import Built, ImageFit
from loaders.slabs import SlabPool
from loaders.state import State


def collate(
    built: Built,
    *,
    state: State,
    image: ImageFit | None,
    pad_token_id: int | None,
    packed: bool,
    slab: int | None,
    slabs: SlabPool,
) -> Batch:
    """The batch that a worker has built.

    Args:
        built: its arrays.
        state: after the batch.
        image: what has fitted the images, if anything.
        pad_token_id: what its tokens are padded with, if there are any.
        packed: whether several samples share a row.
        slab: where the images are, when they are in one.
        slabs: its memory.
    """
    images, copied = _images(built, image, slab, slabs)
    positions = torch.from_numpy(built.positions)
    return Batch(
        keys=built.keys,
        positions=positions,
        valid=positions != FILLER,
        rows=torch.from_numpy(built.rows),
        records=built.records,
        **_texts(built, packed=packed),
        pad_token_id=pad_token_id,
        image_token_id=built.image_token_id,
        images=images,
        image_samples=torch.tensor(built.image_samples, dtype=torch.int64),
        **_sizes(built, image),
        image_fit=image,
        state=state,
        faults=tuple(built.faults),
        _copied=copied,
    )


def _images(
    built: Built, image: ImageFit | None, slab: int | None, slabs: SlabPool
) -> tuple[torch.Tensor | list[memoryview], Callable[[torch.cuda.Event], None] | None]:
    """The images, and whom to tell when they were copied."""
    if slab is not None and built.memory is not None:
        slabs.release(slab)  # they did not fit
        slab = None
    if image is None:
        if slab is not None:
            return slabs.lend_views(slab, built.image_spans), None
        memory = memoryview(_ordinary(built).data).toreadonly()
        return [memory[begin:end] for begin, end in built.image_spans], None
    pixels = _ordinary(built) if slab is None else slabs.lend(slab)
    copied = None if slab is None else partial(slabs.record_copy, slab)
    if image.is_ragged:
        return torch.from_numpy(pixels[: built.image_spans[-1][1] if built.image_spans else 0]), copied
    channels, height, width = image.shape
    shape = sum(built.image_tiles), height, width, channels
    return torch.from_numpy(pixels[: math.prod(shape)].reshape(shape)).permute(0, 3, 1, 2), copied


def _sizes(built: Built, image: ImageFit | None) -> dict[str, torch.Tensor | None]:
    """What is to be known of fitted images beside their pixels."""
    if image is None:
        return {}
    sizes: dict[str, torch.Tensor | None] = {"image_sizes": _pairs(built.image_sizes)}
    if image.is_tiled:
        sizes["image_tiles"] = torch.tensor(built.image_tiles, dtype=torch.int64)
    if image.is_ragged:
        sizes["image_shapes"] = _pairs(built.image_shapes)
    return sizes


def _pairs(pairs: list[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


def _ordinary(built: Built) -> npt.NDArray[np.uint8]:
    return np.empty(0, np.uint8) if built.memory is None else built.memory


def _texts(built: Built, *, packed: bool) -> dict[str, torch.Tensor | None]:
    if built.input_ids is None or built.labels is None or built.lengths is None or built.texts is None:
        return {}
    input_ids = torch.from_numpy(built.input_ids).to(torch.int64)
    texts: dict[str, torch.Tensor | None] = {
        "input_ids": input_ids,
        "labels": torch.from_numpy(built.labels).to(torch.int64),
        "attention_mask": torch.arange(input_ids.shape[1]) < torch.from_numpy(built.lengths)[:, None],
    }
    if packed:
        positions, segments = _segments(built.rows, built.texts, tuple(built.input_ids.shape))
        texts |= {"position_ids": torch.from_numpy(positions), "segment_ids": torch.from_numpy(segments)}
    return texts


def _segments(rows: np.ndarray, texts: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Position inside its sample, and number of its sample inside the row from 1 on, of each token; 0 in padding; int64 [B, L] both."""
    positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    row, begin, segment = -1, 0, 0
    for at, size in zip(rows.tolist(), texts.tolist(), strict=True):
        if at != row:
            row, begin, segment = at, 0, 0
        if size:
            segment += 1
            positions[row, begin : begin + size] = np.arange(size)
            segments[row, begin : begin + size] = segment
            begin += size
    return positions, segments
