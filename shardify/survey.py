"""Reads every record once before anything is planned: what is wrong with it, where its images are, how much room it takes.

Of a record only one row of `RECORD_DTYPE` is kept, and one row of `LOCATION_DTYPE` for each of its images: under 80 bytes together.
"""

import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from shardify.audit import REASONS
from shardify.errors import SampleError
from shardify.format.tar import sample_span
from shardify.images.stores import LOCATION_DTYPE, MISSING, UNSEEN, ImageStore
from shardify.pack import RECORD_DTYPE
from shardify.records import ImageRef, parse_record
from shardify.sources.llava import RecordFile

_BATCH = 4096
_EXAMPLES = 5
_CODES = ("", *REASONS)  # the number of a code is its place here


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """What is known of all N records.

    Attributes:
        records: [N] of `RECORD_DTYPE`.
        images: [M] of `LOCATION_DTYPE`, record after record.
        first_image: int64 [N], the row of each record's first image.
        looked_for: the first image paths that were not found.
    """

    records: npt.NDArray[np.void]
    images: npt.NDArray[np.void]
    first_image: npt.NDArray[np.int64]
    looked_for: tuple[str, ...]

    @property
    def bad(self) -> Counter[str]:
        """The records known to be bad, by reason."""
        return count_codes(self.records)


def count_codes(records: npt.NDArray[np.void]) -> Counter[str]:
    """How many of these records are known to be bad, by reason."""
    numbers, counts = np.unique(records["code"], return_counts=True)
    return Counter({_CODES[n]: c for n, c in zip(numbers.tolist(), counts.tolist(), strict=True) if n})


def survey_records(
    files: Sequence[RecordFile],
    stores: Sequence[ImageStore],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Survey all records of `files`; images are looked for in `stores`, in their order.

    Args:
        files: where the records are.
        stores: where the images may be.
        progress: is told how many more records are done.
    """
    total = sum(len(file.offsets) for file in files)
    records = np.zeros(total, dtype=RECORD_DTYPE)
    ids = np.zeros(total, dtype=np.uint64)
    images: list[npt.NDArray[np.void]] = []
    looked_for: list[str] = []
    start = 0
    for number, file in enumerate(files):
        rows = records[start : start + len(file.offsets)]
        rows["offset"], rows["length"], rows["file"] = file.offsets, file.lengths, number
        for first, raws in _batches(file):
            batch = slice(first, first + len(raws))
            images.append(_survey_batch(raws, rows[batch], ids[start:][batch], stores, looked_for))
            progress(len(raws))
        start += len(file.offsets)
    _mark_repeated(records, ids)
    counts = records["images"].astype(np.int64)
    return Survey(
        records=records,
        images=np.concatenate(images) if images else np.zeros(0, LOCATION_DTYPE),
        first_image=np.cumsum(counts) - counts,
        looked_for=tuple(looked_for),
    )


def _batches(file: RecordFile) -> Iterator[tuple[int, list[bytes]]]:
    if not len(file.offsets):
        return
    with open(file.path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for first in range(0, len(file.offsets), _BATCH):
            starts = file.offsets[first : first + _BATCH].tolist()
            lengths = file.lengths[first : first + _BATCH].tolist()
            yield first, [content[at : at + n] for at, n in zip(starts, lengths, strict=True)]


def _survey_batch(
    raws: list[bytes],
    rows: npt.NDArray[np.void],
    ids: npt.NDArray[np.uint64],
    stores: Sequence[ImageStore],
    looked_for: list[str],
) -> npt.NDArray[np.void]:
    """Fill the records' rows and ids; returns the locations of their images."""
    codes = [0] * len(raws)
    references: list[ImageRef] = []
    owners: list[int] = []
    for number, raw in enumerate(raws):
        try:
            sample = parse_record(raw)
        except SampleError as error:
            codes[number] = _CODES.index(error.code)
            continue
        if sample.id is not None:
            ids[number] = xxhash.xxh3_64_intdigest(sample.id.encode())
        references.extend(sample.images)
        owners.extend([number] * len(sample.images))

    located, faults = locate_images(references, stores)
    sizes: list[list[int]] = [[len(raw)] for raw in raws]
    for owner, reference, size, fault in zip(
        owners, references, located["size"].tolist(), faults, strict=True
    ):
        sizes[owner].append(size)
        if fault and not codes[owner]:
            codes[owner] = _CODES.index(fault)
        if fault == "image-missing" and len(looked_for) < _EXAMPLES:
            looked_for.append(reference.path)
    rows["code"] = codes
    rows["span"] = [0 if code else sample_span(size) for code, size in zip(codes, sizes, strict=True)]
    rows["images"] = np.bincount(owners, minlength=len(raws)) if owners else 0
    return located


def locate_images(
    references: Sequence[ImageRef], stores: Sequence[ImageStore]
) -> tuple[npt.NDArray[np.void], list[str]]:
    """Look for images in stores, in the stores' order.

    Returns:
        [len(references)] of `LOCATION_DTYPE`, and for each image the reason code of its fault, empty when it was found.
    """
    rows = np.zeros(len(references), dtype=LOCATION_DTYPE)
    rows["store"] = MISSING
    faults = ["image-missing"] * len(references)
    paths: dict[int, tuple[str, ...]] = {}
    for number, reference in enumerate(references):
        try:
            paths[number] = reference.parts()
        except SampleError as error:
            faults[number] = error.code
    for store_number, store in enumerate(stores):
        wanted = list(paths)
        for number, location in zip(wanted, store.locate([paths[n] for n in wanted]), strict=True):
            if location is not None:
                rows[number] = (*location, store_number)
                faults[number] = ""
                if location.method != UNSEEN:
                    del paths[number]
    return rows, faults


def _mark_repeated(records: npt.NDArray[np.void], ids: npt.NDArray[np.uint64]) -> None:
    order = np.argsort(ids, kind="stable")
    again = ids[order[1:]] == ids[order[:-1]]
    records["repeated"][order[1:]] = again & (ids[order[1:]] != 0)
