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
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from shardify.audit import REASONS
from shardify.errors import RecordError, SampleError, SourceError, UsageError
from shardify.format.headers import BLOCK
from shardify.format.index import MAX_IMAGES, MAX_SIZE
from shardify.images.resolve import Resolver, Rule
from shardify.images.spool import SPOOLED
from shardify.images.stores import EXACT, LOCATION_DTYPE, MISSING, PLAIN_FILE
from shardify.pack import ID_REPEATED, IMAGE_REPEATED, RECORD_DTYPE, SOURCE_NOTES
from shardify.prepare import prepare
from shardify.records import MAX_RECORD_BYTES, NO_ID, load_record
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
        source_notes: the codes of the bits in a record's `notes`, from `SOURCE_NOTES` on.
    """

    records: npt.NDArray[np.void]
    images: npt.NDArray[np.void]
    first_image: npt.NDArray[np.int64]
    looked_for: tuple[str, ...]
    source_notes: tuple[str, ...]

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
    resolver: Resolver,
    *,
    embedded_store: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Survey all records of `files`.

    Args:
        files: where the records are.
        resolver: finds their images; file number i goes by its prefix map i.
        embedded_store: the store number of the first file that brings its images along; the second one has the next number, and so on.
        progress: is told how many more records are done.

    Raises:
        SourceError: a file has changed, or holds records that an unclosed text has swallowed.
    """
    total = sum(len(file.offsets) for file in files)
    records = np.zeros(total, dtype=RECORD_DTYPE)
    ids = np.zeros(total, dtype=np.uint64)
    images: list[npt.NDArray[np.void]] = []
    hashes: list[npt.NDArray[np.uint64]] = []
    looked_for: list[str] = []
    start = 0
    for number, file in enumerate(files):
        rows = records[start : start + len(file.offsets)]
        rows["offset"], rows["length"], rows["file"] = file.offsets, file.lengths, number
        brought = _Brought(file, embedded_store) if file.embedded else None
        embedded_store += brought is not None
        for first, raws in _batches(file):
            batch = slice(first, first + len(raws))
            found = _survey_batch(
                raws,
                rows=rows[batch],
                ids=ids[start:][batch],
                resolver=resolver,
                source=number,
                brought=brought,
                looked_for=looked_for,
            )
            images.append(found.rows)
            hashes.append(found.hashes)
            _refuse_swallowed(file, first, raws, rows[batch])
            progress(len(raws))
        start += len(file.offsets)
    _mark_repeated(records, ids, ID_REPEATED)
    counts = records["images"].astype(np.int64)
    if hashes:
        _mark_repeated_images(records, counts, np.concatenate(hashes))
    return Survey(
        records=records,
        images=np.concatenate(images) if images else np.zeros(0, LOCATION_DTYPE),
        first_image=np.cumsum(counts) - counts,
        looked_for=tuple(looked_for),
        source_notes=_take_notes(files, records),
    )


class _Brought:
    """The images that come with the records of a file, drawn in order."""

    def __init__(self, file: RecordFile, store: int) -> None:
        assert file.embedded is not None
        self._places, self._counts = file.embedded.places, file.embedded.counts
        self._path, self._store = file.path, store
        self._reach = np.concatenate([[0], np.cumsum(self._counts)])
        self._record = 0

    def draw(self, counts: Sequence[int | None]) -> npt.NDArray[np.void]:
        """The locations of the next records' images; None for a record that cannot be read."""
        first = self._record
        self._record += len(counts)
        picked = []
        for number, count in enumerate(counts, first):
            if count is None:
                continue
            if count != self._counts[number]:
                raise SourceError(
                    f"{self._path}: record {number} names {count} images, but {self._counts[number]} came with it"
                )
            picked.append(np.arange(self._reach[number], self._reach[number + 1]))
        places = self._places[np.concatenate(picked)] if picked else self._places[:0]
        rows = np.zeros(len(places), dtype=LOCATION_DTYPE)
        rows["offset"], rows["size"], rows["stored"] = places[:, 0], places[:, 1], places[:, 1]
        rows["method"], rows["store"], rows["how"] = SPOOLED, self._store, EXACT
        return rows


def _take_notes(files: Sequence[RecordFile], records: npt.NDArray[np.void]) -> tuple[str, ...]:
    """Set the bits of what only the sources know; returns their codes."""
    codes = tuple(dict.fromkeys(code for file in files for code in file.notes))
    if len(codes) + SOURCE_NOTES > np.iinfo(RECORD_DTYPE["notes"]).bits:
        raise UsageError(f"too many kinds of notes from the sources: {', '.join(codes)}")
    start = 0
    for file in files:
        for code, numbers in file.notes.items():
            records["notes"][start + numbers] |= 1 << codes.index(code) + SOURCE_NOTES
        start += len(file.offsets)
    return codes


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


class _Located(NamedTuple):
    rows: npt.NDArray[np.void]
    hashes: npt.NDArray[np.uint64]  # of the images' names or places


def _survey_batch(
    raws: list[bytes],
    *,
    rows: npt.NDArray[np.void],
    ids: npt.NDArray[np.uint64],
    resolver: Resolver,
    source: int,
    brought: _Brought | None,
    looked_for: list[str],
) -> _Located:
    """Fill the records' rows and ids; returns the locations of their images."""
    codes = [0] * len(raws)
    lengths = [len(raw) for raw in raws]
    counts: list[int | None] = [None] * len(raws)
    paths: list[str] = []
    owners: list[int] = []
    for number, raw in enumerate(raws):
        try:
            prepared = prepare(raw, outline=True)
        except SampleError as error:
            codes[number] = _CODES.index(error.code)
            continue
        sample = prepared.sample
        lengths[number] = len(prepared.raw)
        if sample.id not in NO_ID:
            ids[number] = xxhash.xxh3_64_intdigest(_same_id(sample.id).encode())
        counts[number] = len(sample.images)
        paths.extend([image.path for image in sample.images])
        owners.extend([number] * len(sample.images))

    if brought is not None:
        located, faults = brought.draw(counts), [""] * len(paths)
        elsewhere = np.flatnonzero(located["offset"] < 0)  # these did not come along
        found = resolver.locate([paths[number] for number in elsewhere.tolist()], source)
        located[elsewhere] = found.rows
        for number, code in zip(elsewhere.tolist(), found.codes, strict=True):
            faults[number] = code
    else:
        found = resolver.locate(paths, source)
        located, faults = found.rows, found.codes
    for owner, path, fault in zip(owners, paths, faults, strict=True):
        if not fault:
            continue
        codes[owner] = codes[owner] or _CODES.index(fault)
        if fault == "image-missing" and len(looked_for) < _EXAMPLES:
            looked_for.append(path[:_SHOWN])
    owner_of = np.array(owners, dtype=np.int64)
    span = _member_spans(np.array(lengths, dtype=np.int64))
    np.add.at(span, owner_of, _member_spans(located["size"]))
    rows["images"] = np.bincount(owner_of, minlength=len(raws))
    rows["code"] = codes
    good = rows["code"] == 0
    too_large = good & ((span > MAX_SIZE) | (rows["images"] > MAX_IMAGES))
    rows["code"][too_large] = _CODES.index("sample-too-large")
    rows["span"] = np.where(good & ~too_large, span, 0)
    return _Located(located, _image_hashes(paths, located, resolver.rules))


def _member_spans(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """As `sample_span`, of each member."""
    return BLOCK + (sizes + BLOCK - 1) // BLOCK * BLOCK


def _image_hashes(
    paths: Sequence[str], located: npt.NDArray[np.void], rules: Sequence[Rule]
) -> npt.NDArray[np.uint64]:
    """Equal for equal images as far as their places and names say; 0 for what was not found."""
    places = zip(
        paths,
        located["store"].tolist(),
        located["offset"].tolist(),
        located["method"].tolist(),
        located["rule"].tolist(),
        strict=True,
    )
    hashes = np.array(
        [
            xxhash.xxh3_64_intdigest(
                _same_path(path, rules[rule] if rule else None).encode("utf-8", "surrogatepass")
                if method == PLAIN_FILE
                else b"%d" % offset,
                seed=store & 0xFFFF,
            )
            for path, store, offset, method, rule in places
        ],
        dtype=np.uint64,
    )
    hashes[located["store"] == MISSING] = 0
    return hashes


def _same_path(path: str, rule: Rule | None) -> str:
    """One spelling of a file's path."""
    if "\\" in path or "/." in path or "//" in path or path.startswith("."):
        path = "/".join(part for part in path.replace("\\", "/").split("/") if part not in ("", "."))
    return rule.new + path.removeprefix(rule.old) if rule else path


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


def _mark_repeated(records: npt.NDArray[np.void], hashes: npt.NDArray[np.uint64], bit: int) -> None:
    records["notes"][_again(hashes)] |= bit


def _mark_repeated_images(
    records: npt.NDArray[np.void], counts: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64]
) -> None:
    owners = np.repeat(np.arange(len(counts)), counts)
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    # a record that has one image twice does not count for that alone
    again = (owners[first][which] != owners) & (hashes != 0)
    records["notes"][owners[again]] |= IMAGE_REPEATED


def _again(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where a value stands that has stood before; 0 is none."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again: npt.NDArray[np.int64] = order[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)]
    return again
