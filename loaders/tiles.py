"""How many tiles samples become, for `max_tiles`, and how much memory their pictures take: from the sidecars, which know each image's size."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from loaders.dataset import Dataset, Part
from loaders.derived import (
    default_workers,
    derived,
    derived_folder,
    each_forked,
    is_derived,
    read_array,
    watched,
    write_array,
)
from loaders.fits import Layout
from loaders.plan import Measure
from shardify.errors import FormatError, ImageError, UsageError
from shardify.format.shards import ShardFile, local_sidecars
from shardify.format.sidecar import numbers_of, read_sidecar
from shardify.format.urls import is_url

IntArray: TypeAlias = npt.NDArray[np.int64]

_VERSION = 1  # of the counts
_IN_PROCESS = 100_000  # samples for which no other process is started
_SURVEYED = 4  # shards
_ORDINARY = (768, 1024)  # where no sidecar is at hand: height and width of an image


class TiledFit(Protocol):
    """What is needed of an image transform for its tiles to be counted; `loaders.ImageTransform` has it."""

    @property
    def fingerprint(self) -> str:
        """Names what decides about tiles; counts are kept under it."""

    def layout(self, height: int, width: int, *, images: int = 1) -> Layout:
        """What an image of a size becomes, in a sample of so many; raises ImageError."""


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """The tiles of a data set's samples.

    Attributes:
        dataset: whose samples they are.
        counts: int32 of each part's samples, memory-mapped.
    """

    dataset: Dataset
    counts: tuple[npt.NDArray[np.int32], ...]

    def of(self, samples: IntArray) -> IntArray:
        """Tiles of samples, 0 of those without images; int64 [n] flat numbers to int64 [n]."""
        samples = np.asarray(samples, np.int64)
        part = self.dataset.part_of(samples)
        tiles = np.empty(len(samples), np.int64)
        for number, counts in enumerate(self.counts):
            here = np.flatnonzero(part == number)
            tiles[here] = counts[samples[here] - self.dataset.starts[number]]
        return tiles

    def instead_of_images(self, measure: Measure) -> Measure:
        """`measure`, with tiles for the numbers of images."""
        return partial(_with_tiles, self, measure)


def count_tiles(dataset: Dataset, image: TiledFit) -> Tiles:
    """The tiles of all samples, as their images are stored: a transform that puts others in their place is not known of.

    Counted once for each part and fit, by one process of a node and its children, while the others wait. Only sidecars are read. The counts
    lie in the user's cache folder, 4 bytes a sample. An image that the fit refuses counts as one tile.

    Raises:
        UsageError: the image transform has no fingerprint.
        FormatError: a sidecar cannot be read, or the cache folder cannot be written.
        PackError: a store cannot be reached or refuses.
    """
    if not isinstance(getattr(image, "fingerprint", None), str):
        raise UsageError(
            f"{type(image).__name__} has no attribute `fingerprint`: a text that changes with the tiles it makes; their counts are kept under it"
        )
    return Tiles(dataset, tuple(_counts(part, image) for part in dataset.parts))


def kept_tiles(dataset: Dataset, fingerprint: str) -> Tiles:
    """The tiles as a run has counted them, without its image transform: from the user's cache folder.

    Args:
        dataset: whose samples.
        fingerprint: of the image transform.

    Raises:
        UsageError: they are not there, with where they should be.
    """
    counts = []
    for part in dataset.parts:
        identity = _identity(part, fingerprint)
        folder = derived_folder(identity)
        if not is_derived(identity):
            raise UsageError(
                f"tile counts are needed as the run had them, and are not on this machine: copy the run's {os.path.basename(folder)} to {folder}"
            )
        counts.append(read_array(folder, "tiles"))
    return Tiles(dataset, tuple(counts))


def ordinary_bytes(dataset: Dataset, image: TiledFit) -> tuple[int, int]:
    """Bytes that an image of a data set needs when it is fitted, on average, and the most: of a few shards whose sidecars are at hand."""
    shards = [shard for part in dataset.parts for shard in part.shards.shards if not is_url(shard.sidecar)]
    sizes: list[tuple[int, int, int]] = []
    for number in np.linspace(0, len(shards) - 1, min(len(shards), _SURVEYED)).astype(int).tolist():
        try:
            counts, heights, widths = _stored_sizes(shards[number], shards[number].sidecar)
        except FormatError:  # batches are made without sidecars, too
            continue
        several = np.repeat(counts, counts)
        sizes += zip(heights.tolist(), widths.tolist(), several.tolist(), strict=True)
    bytes_of = {size: _layout(image, *size).nbytes for size in {*sizes, (*_ORDINARY, 1)}}
    found = [bytes_of[size] for size in sizes or [(*_ORDINARY, 1)]]
    return int(np.mean(found)), max(found)


def _with_tiles(tiles: Tiles, measure: Measure, samples: IntArray) -> tuple[IntArray, IntArray]:
    return measure(samples)[0], tiles.of(samples)


def _identity(part: Part, fingerprint: str) -> dict[str, Any]:
    return {"kind": "tiles", "version": _VERSION, "data": part.fingerprint, "image": fingerprint}


def _counts(part: Part, image: TiledFit) -> npt.NDArray[np.int32]:
    """int32 [samples of the part], those that take part."""
    folder, _ = derived(_identity(part, image.fingerprint), partial(_build, part, image))
    return read_array(folder, "tiles")


def _build(part: Part, image: TiledFit, folder: str) -> Mapping[str, Any]:
    shards = part.shards.shards
    total = sum(shard.samples for shard in shards)
    workers = 0 if total <= _IN_PROCESS else default_workers()
    work = zip(shards, local_sidecars(shards), strict=True)
    counted = each_forked(partial(_count, image=image), work, count=len(shards), workers=workers)
    watching = watched(counted, "Counting tiles", [shard.samples for shard in shards], total)
    write_array(folder, "tiles", _taking_part(part, watching), part.samples, "<i4")
    return {}


def _taking_part(part: Part, counted: Iterator[npt.NDArray[np.int32]]) -> Iterator[npt.NDArray[np.int32]]:
    chosen = part.subset.samples
    for number, counts in enumerate(counted):
        if chosen is None:
            yield counts
            continue
        begin, end = (int(part.shards.starts[at]) for at in (number, number + 1))
        first, last = np.searchsorted(chosen, [begin, end])
        yield counts[chosen[first:last].astype(np.int64) - begin]


def _count(work: tuple[ShardFile, str], image: TiledFit) -> npt.NDArray[np.int32]:
    """Tiles of a shard's samples, int32 [n]."""
    images, heights, widths = _stored_sizes(*work)
    sizes = np.stack((heights, widths, np.repeat(images, images)), axis=1)
    distinct, which = np.unique(sizes, axis=0, return_inverse=True)
    tiles = np.array([_layout(image, *size).tiles for size in distinct.tolist()], np.int64)
    ends = np.concatenate(([0], np.cumsum(tiles[which.reshape(-1)])))
    last = np.cumsum(images)
    counts: npt.NDArray[np.int32] = (ends[last] - ends[last - images]).astype(np.int32)
    return counts


def _stored_sizes(shard: ShardFile, sidecar: str) -> tuple[IntArray, IntArray, IntArray]:
    """Images of each sample, int64 [n]; and height and width of all images, int64 [m] both."""
    images = read_sidecar(sidecar, ("images",))["images"]
    if len(images) != shard.samples:
        raise FormatError(
            f"{sidecar}: {len(images)} samples, but {shard.path} has {shard.samples} in the index"
        )
    offsets = (numbers_of(pa.chunked_array([chunk.offsets])) for chunk in images.chunks)
    counts = [np.zeros(0, np.int64), *(np.diff(edges).astype(np.int64) for edges in offsets)]
    values = [chunk.flatten() for chunk in images.chunks]
    heights, widths = (
        numbers_of(pa.chunked_array([part.field(name) for part in values], pa.int32())).astype(np.int64)
        for name in ("height", "width")
    )
    return np.concatenate(counts), heights, widths


def _layout(image: TiledFit, height: int, width: int, images: int) -> Layout:
    try:
        return image.layout(max(height, 1), max(width, 1), images=images)
    except ImageError:  # the sample becomes a filler
        return Layout(1, 0, 0)
