"""Reads every record once before anything is planned: what is wrong with it, where its images are, how much room it takes.

Of a record only one row of `RECORD_DTYPE` is kept, and one row of `LOCATION_DTYPE` for each of its images: under 80 bytes together.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import xxhash

from shardify.audit import REASONS
from shardify.errors import RecordError, SampleError, SourceError
from shardify.format.index import MAX_IMAGES, MAX_SIZE
from shardify.format.tar import sample_span
from shardify.images.stores import (
    LOCATION_DTYPE,
    MAX_IMAGE_BYTES,
    MISSING,
    PLAIN_FILE,
    READABLE_METHODS,
    UNSEEN,
    ImageStore,
    Location,
)
from shardify.pack import RECORD_DTYPE
from shardify.records import MAX_RECORD_BYTES, NO_ID, ImageRef, load_record, parse_record
from shardify.sources.llava import RecordFile, open_unchanged

_BATCH = 4096  # records read together,
_BATCH_BYTES = 32 * 1024 * 1024  # or as many as this holds
_EXAMPLES = 5
_SHOWN = 300  # characters of a name
_NEXT = re.compile(r"\}\s*,?\s*(?=\{)")  # the end of one object and the start of the next
_NEXT_TRIED = 1000  # more than a broken record has turns
_CODES = ("", *REASONS)  # the number of a code is its place here
_MAY_SWALLOW = [_CODES.index(code) for code in ("record-not-json", "record-too-large")]


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
            _refuse_swallowed(file, first, raws, rows[batch])
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
    # what is longer than any record is not read whole: it is refused by its length
    lengths = np.minimum(file.lengths, MAX_RECORD_BYTES + 1)
    reach = np.cumsum(lengths)
    # positioned reads: a mapping of a file that is cut short meanwhile ends the process without a word
    descriptor = open_unchanged(file.path, file.stamp)
    try:
        first = 0
        while first < len(lengths):
            full = int(np.searchsorted(reach, reach[first] + _BATCH_BYTES, side="right"))
            end = min(first + _BATCH, max(full, first + 1))
            places = zip(file.offsets[first:end].tolist(), lengths[first:end].tolist(), strict=True)
            yield first, [os.pread(descriptor, size, at) for at, size in places]
            first = end
    finally:
        os.close(descriptor)
    os.close(open_unchanged(file.path, file.stamp))


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
        if sample.id not in NO_ID:
            ids[number] = xxhash.xxh3_64_intdigest(_same_id(sample.id).encode())
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
            looked_for.append(reference.path[:_SHOWN])
    for number, size in enumerate(sizes):
        if not codes[number] and (sample_span(size) > MAX_SIZE or len(size) - 1 > MAX_IMAGES):
            codes[number] = _CODES.index("sample-too-large")
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
                rows[number] = (*location, store_number, 0, 0)
                faults[number] = _fault_of(location)
                if location.method != UNSEEN:
                    del paths[number]
    return rows, faults


def _fault_of(location: Location) -> str:
    """What is wrong with an image that is there, as far as its whereabouts say."""
    if location.method not in (PLAIN_FILE, UNSEEN, *READABLE_METHODS):
        return "image-unreadable"
    return "image-too-large" if max(location.size, location.stored) > MAX_IMAGE_BYTES else ""


def _same_id(text: str) -> str:
    """One spelling for ids that are equal texts, however they are escaped."""
    if text.startswith('"') and ("\\" in text or not text.isascii()):
        return json.dumps(json.loads(text))
    return text


def _refuse_swallowed(
    file: RecordFile, first: int, raws: Sequence[bytes], rows: npt.NDArray[np.void]
) -> None:
    """Refuse a file in which an unclosed text has taken later records into one: they would be lost uncounted.

    Raises:
        SourceError: with the byte where the broken record begins.
    """
    for number in np.flatnonzero(np.isin(rows["code"], _MAY_SWALLOW)).tolist():
        if _holds_records(raws[number]):
            start, length = file.offsets[first + number], file.lengths[first + number]
            raise SourceError(
                f"{file.path}: byte {start}: this record, {length} bytes up to byte {start + length}, is no JSON and holds whole "
                "records: a text or bracket in it is not closed, or there are several records in one line. Repair the file there"
            )


def _holds_records(raw: bytes) -> bool:
    """Whether there are whole records inside of what is no record itself."""
    try:
        load_record(raw)
    except RecordError as error:
        if error.code != "record-not-json":
            return False
    else:
        return False
    text = raw.decode("utf-8", "replace")
    decoder = json.JSONDecoder(strict=False)
    for found in islice(_NEXT.finditer(text), _NEXT_TRIED):
        with suppress(ValueError, RecursionError):
            value, _ = decoder.raw_decode(text, found.end())
            if "conversations" in value:
                return True
    return False


def _mark_repeated(records: npt.NDArray[np.void], ids: npt.NDArray[np.uint64]) -> None:
    order = np.argsort(ids, kind="stable")
    again = ids[order[1:]] == ids[order[:-1]]
    records["repeated"][order[1:]] = again & (ids[order[1:]] != 0)
