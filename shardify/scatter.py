"""`--read-order`: images are read front to back, as their archives and disks have them, and scattered into one file in the planned order.

Shuffled shards want images from everywhere in an archive. A turning disk, or a network file system that reads ahead, gives them many times faster in the order in which
they lie there. So each is read once in that order and written to its place in a spool, from which the shards are then packed; the spool takes
the disk space of all images that are not packed yet, and the memory of a few of them. The shards have the same bytes either way.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shardify.errors import ImageError, PackError
from shardify.images.resolve import Rule
from shardify.images.spool import SPOOLED, SpoolReader
from shardify.images.stores import LISTED, MAX_IMAGE_BYTES, PLAIN_FILE, UNSEEN, ImageStore, Location
from shardify.pack import PackContext, finished_shards, name_in_store
from shardify.plan import Plan
from shardify.prepare import prepare
from shardify.progress import Progress
from shardify.readahead import read_ahead
from shardify.sources.llava import open_unchanged
from shardify.survey import Survey

_SPOOL = "images-in-order"
_FIELDS = ["offset", "stored", "size", "crc", "method", "store"]
_NO_RULE = Rule("", "")
_CHUNK = 65_536  # images that are Python objects at a time


class _Wanted(NamedTuple):
    """An image to be read, and the rows of the survey that are it."""

    rows: list[int]
    name: str
    store: int
    location: Location


def scatter_images(
    context: PackContext,
    survey: Survey,
    plan: Plan,
    *,
    shard_names: Sequence[str],
    stores: Sequence[ImageStore],
    spool: str,
) -> PackContext:
    """Read the images of all unfinished shards in their stores' order; the survey then says where they are in the spool.

    An image with a fault stays where it is: packing finds the same fault, and says so. So do images in object stores.

    Args:
        context: of the run.
        survey: its locations are changed.
        plan: which shard wants which record.
        shard_names: the shards.
        stores: where the images are.
        spool: a folder for the file.

    Returns:
        The context with one more reader.

    Raises:
        PackError: there is too little room, or a store cannot be read.
    """
    finished = finished_shards(context, shard_names)
    todo = [shard for shard, (_, info) in enumerate(finished) if info is None]
    rows = _rows_in_order(survey, plan, todo)
    rows = rows[_is_scattered(survey.images[rows], stores)]
    if not len(rows):
        return context
    sizes = survey.images["size"][rows]
    places = np.zeros(len(survey.images), np.int64)
    places[rows] = np.cumsum(sizes) - sizes
    path = os.path.join(spool, _SPOOL)
    _require_room(path, int(sizes.sum()))
    store = len(context.readers)

    def read(wanted: _Wanted) -> bytes | memoryview | None:
        try:
            return context.readers[wanted.store].read(wanted.name, wanted.location)
        except ImageError:
            return None

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.truncate(file, int(sizes.sum()))
        images = _wanted(context, survey, rows, stores)
        with Progress("reading images in order", total=len(rows), unit="images") as progress:
            for wanted, data in read_ahead(read, images, size=lambda item: item.location.size):
                whole = data is not None and len(data) == wanted.location.size
                for row in wanted.rows if whole else ():
                    assert data is not None
                    _write(file, data, int(places[row]))
                    survey.images[row] = (places[row], len(data), len(data), 0, SPOOLED, store, 0, survey.images[row]["how"])  # fmt: skip
                progress.advance(len(wanted.rows), len(data or b"") * len(wanted.rows))
        os.fsync(file)
    except OSError as error:
        raise PackError(f"{path}: {error.strerror or error}") from error
    finally:
        os.close(file)
    return replace(
        context,
        readers=(*context.readers, SpoolReader(path)),
        mounts=(*context.mounts, ""),
        rules=context.rules or (_NO_RULE,),
    )


def _rows_in_order(survey: Survey, plan: Plan, shards: Sequence[int]) -> npt.NDArray[np.int64]:
    """The rows of all images that these shards want, in the planned order."""
    pieces = [plan.order[plan.starts[shard] : plan.starts[shard + 1]] for shard in shards]
    numbers = np.concatenate(pieces) if pieces else plan.order[:0]
    numbers = numbers[survey.records["code"][numbers] == 0]
    counts = survey.records["images"][numbers].astype(np.int64)
    first = np.repeat(survey.first_image[numbers] - np.cumsum(counts) + counts, counts)
    rows: npt.NDArray[np.int64] = first + np.arange(counts.sum())
    return rows


def _is_scattered(images: npt.NDArray[np.void], stores: Sequence[ImageStore]) -> npt.NDArray[np.bool_]:
    """Not what lies in object stores, which know no order and are for workers to call, nor what is too large to be read, or cannot even be looked at."""
    remote = [number for number, store in enumerate(stores) if "://" in store.path]
    readable = (images["size"] <= MAX_IMAGE_BYTES) & (images["method"] != UNSEEN)
    chosen: npt.NDArray[np.bool_] = ~np.isin(images["store"], remote) & readable
    return chosen


def _wanted(
    context: PackContext, survey: Survey, rows: npt.NDArray[np.int64], stores: Sequence[ImageStore]
) -> Iterator[_Wanted]:
    """Each image once, in the order of its archive; then plain files, in the order of the records."""
    images = survey.images
    plain = images["method"][rows] == PLAIN_FILE
    placed = rows[~plain]
    placed = placed[np.lexsort((images["offset"][placed], images["store"][placed]))]
    same = (images["offset"][placed[1:]] == images["offset"][placed[:-1]]) & (
        images["store"][placed[1:]] == images["store"][placed[:-1]]
    )
    edges = np.concatenate([[0], np.flatnonzero(~same) + 1, [len(placed)]])
    for first in range(0, len(edges) - 1, _CHUNK) if len(placed) else ():
        for begin, end in pairwise(edges[first : first + _CHUNK + 1].tolist()):
            *location, store = images[_FIELDS][placed[begin]].tolist()
            name = stores[store].listed_name(location[0]) if location[4] == LISTED else ""
            yield _Wanted(placed[begin:end].tolist(), name, store, Location(*location))
    yield from _plain_files(context, survey, np.sort(rows[plain]))


def _plain_files(context: PackContext, survey: Survey, rows: npt.NDArray[np.int64]) -> Iterator[_Wanted]:
    """Files go by the names in their records, which are read again."""
    described: tuple[int, list[str]] = (-1, [])
    descriptors: dict[int, int] = {}
    try:
        for first in range(0, len(rows), _CHUNK):
            chunk = rows[first : first + _CHUNK]
            # a record without images has the first row of the one after it
            owners = np.searchsorted(survey.first_image, chunk, side="right") - 1
            for row, owner in zip(chunk.tolist(), owners.tolist(), strict=True):
                if described[0] != owner:
                    described = owner, _paths(context, survey.records[owner], descriptors)
                *location, store, rule, _ = survey.images[row].tolist()
                path = described[1][row - int(survey.first_image[owner])]
                name = name_in_store(path, context.rules[rule], context.mounts[store])
                yield _Wanted([row], name, store, Location(*location))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _paths(context: PackContext, record: Any, descriptors: dict[int, int]) -> list[str]:
    file = int(record["file"])
    if file not in descriptors:
        source = context.sources[file]
        for number in list(descriptors):
            os.close(descriptors.pop(number))
        descriptors[file] = open_unchanged(source.path, source.stamp)
    sample = prepare(os.pread(descriptors[file], int(record["length"]), int(record["offset"]))).sample
    return [image.name() for image in sample.images]


def _write(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def _require_room(path: str, size: int) -> None:
    place = os.statvfs(os.path.dirname(path))
    free = place.f_bavail * place.f_frsize
    if size > free:
        raise PackError(
            f"{os.path.dirname(path)}: --read-order needs {size / 1e6:,.0f} MB of room for images, {free / 1e6:,.0f} MB are free; "
            "pack without it, or elsewhere"
        )
