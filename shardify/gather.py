"""Which samples of finished or foreign shards go into a new data set: read from their sidecars before anything is planned.

    data sets -> rows of their sidecars -> those that the filter means -> one flat range of samples, in the sets' order

Of a sample only one row of `SAMPLE_DTYPE` is kept, and one row of `MEMBER_DTYPE` for each of its members: about 100 bytes together.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shardify.errors import FormatError, UsageError
from shardify.format.headers import BLOCK
from shardify.format.ids import same_id
from shardify.format.manifest import PART, RECORDS, SHARDS, Manifest, Source, read_manifest
from shardify.format.names import MANIFEST, TAR_ZST, is_image_field
from shardify.format.shards import Shards, ShardSet, open_shards
from shardify.format.sidecar import read_sidecar
from shardify.pack import ID_REPEATED, IMAGE_REPEATED
from shardify.plan import planned_order
from shardify.records import NO_ID
from shardify.select import Filter
from shardify.sources.llava import record_names

SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # of the sample in its shard, or of its zstd frame
        ("record", "<i8"),  # its number in its source
        ("span", "<i8"),  # bytes it takes in a new shard
        ("size", "<u4"),  # bytes to read at `offset`
        ("shard", "<u4"),  # number among all input shards
        ("source", "<u4"),  # number of its source's name
        ("members", "<u4"),  # rows of `MEMBER_DTYPE` it has
        ("notes", "u1"),  # bits: ID_REPEATED, IMAGE_REPEATED
    ]
)
"""What is kept of a sample between its sidecar and its copying."""

MEMBER_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # of the data in what is read for the sample, decompressed
        ("size", "<i8"),
        ("xxh3_64", "<u8"),
        ("field", "<u4"),  # number of its name
    ]
)
"""Likewise of each member."""

_COLUMNS = ("id", "record", "offset", "size", "members", "source")

_Scalar = TypeVar("_Scalar", bound=np.generic)
_Ints = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class DataSet:
    """One folder of shards that samples are taken from.

    Attributes:
        name: its folder's, relative to what the folders of all sets have in common.
        prefix: stands before the names of its sources in the new set; empty when there is only one set.
        shards: those that were named.
        manifest: the folder's, None for shards made by others.
    """

    name: str
    prefix: str
    shards: ShardSet
    manifest: Manifest | None


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """The N samples that go into the new set.

    Attributes:
        samples: [N] of `SAMPLE_DTYPE`.
        members: [M] of `MEMBER_DTYPE`, sample after sample.
        first_member: int64 [N], the row of each sample's first member.
        fields: the members' names, by number.
        sources: the sources' names, by number, as the new set calls them.
        counts: int64 [len(sources)], how many samples are of each.
        sets: int64 [len(sources)], the number of the data set that each is of.
        left_out: samples of the named shards that the filter or the limit leaves out.
    """

    samples: npt.NDArray[np.void]
    members: npt.NDArray[np.void]
    first_member: _Ints
    fields: tuple[str, ...]
    sources: tuple[str, ...]
    counts: _Ints
    sets: _Ints
    left_out: int


def open_sets(shards: Shards) -> list[DataSet]:
    """Open the shards, each folder as a data set of its own.

    Raises:
        UsageError, FormatError: as `open_shards`.
    """
    opened = open_shards(shards, remote=False)
    folders: dict[str, list[int]] = {}
    where: dict[str, str] = {}
    for number, shard in enumerate(opened.shards):
        folder = os.path.dirname(shard.path)
        real = os.path.realpath(folder)
        where.setdefault(real, folder)
        folders.setdefault(real, []).append(number)
    paths = [os.path.abspath(folder) for folder in where.values()]
    sets = []
    for name, folder, numbers in zip(record_names(paths), where.values(), folders.values(), strict=True):
        part = _part(opened, numbers)
        path = os.path.join(folder, MANIFEST)
        manifest = read_manifest(path) if os.path.lexists(path) else None
        sets.append(DataSet(name, f"{name}/" if len(paths) > 1 else "", part, manifest))
    return sets


def _part(opened: ShardSet, numbers: list[int]) -> ShardSet:
    """Some of the shards, as a set."""
    starts = opened.starts
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        index = opened.index[starts[numbers[0]] : starts[numbers[-1] + 1]]
    else:
        index = np.concatenate([opened.index[starts[number] : starts[number + 1]] for number in numbers])
    counts = np.diff(starts)[numbers]
    return ShardSet(
        tuple(opened.shards[number] for number in numbers), index, np.concatenate([[0], np.cumsum(counts)])
    )


def gather(
    sets: list[DataSet],
    *,
    where: Filter | None = None,
    max_samples: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Gathered:
    """Read the sidecars, and choose.

    Args:
        sets: the data sets, in the order in which their samples count.
        where: which samples are meant; None for all.
        max_samples: take no more than this, the first of the planned order of all that are meant.
        shuffle: whether that order is permuted, keyed by `seed`.
        seed: any integer.
        progress: is told how many more samples are done.

    Raises:
        FormatError: a sidecar is damaged, or not that of its shard.
        UsageError: the filter cannot be computed.
    """
    parts = _Parts()
    total = 0
    for number, data_set in enumerate(sets):
        for shard in data_set.shards.shards:
            table = read_sidecar(shard.sidecar, sorted({*_COLUMNS, *(where.columns if where else ())}))
            if table.num_rows != shard.samples:
                raise FormatError(
                    f"{shard.sidecar}: {table.num_rows} rows, but its shard has {shard.samples} samples; copy or pack the data set again"
                )
            table = _prefixed(table, data_set.prefix)
            if where is not None:
                table = table.filter(pa.array(where.matches(table)))
            total += shard.samples
            parts.add(table, number, shard.path, shard.sidecar, shard.bytes)
            progress(shard.samples)
    return parts.gathered(total, max_samples=max_samples, shuffle=shuffle, seed=seed)


def manifest_sources(sets: list[DataSet], gathered: Gathered) -> list[Source]:
    """What the manifest says of where the samples come from: the data sets, then the parts of their sources, then the sources' images.

    Fingerprints, licences and citations are those of the sets' own manifests.
    """
    known: list[dict[str, Source]] = []
    found = []
    others = []
    for data_set in sets:
        fingerprint = data_set.shards.fingerprint
        found.append(Source(SHARDS, data_set.name, fingerprint["samples"], fingerprint["digest"]))
        manifest = data_set.manifest
        known.append({})
        for source in manifest.all_sources if manifest else ():
            name = data_set.prefix + source.name
            if source.kind in (RECORDS, PART):
                known[-1].setdefault(name, source)
            else:
                others.append(_renamed(source, name, source.kind, source.records))
    for name, count, number in zip(
        gathered.sources, gathered.counts.tolist(), gathered.sets.tolist(), strict=True
    ):
        found.append(_renamed(known[number].get(name, Source(PART, name)), name, PART, count))
    return [*found, *dict.fromkeys(others)]


def _renamed(source: Source, name: str, kind: str, records: int | None) -> Source:
    return Source(kind, name, records, source.fingerprint, source.licence, source.citation)


def _prefixed(table: pa.Table, prefix: str) -> pa.Table:
    if not prefix:
        return table
    at = table.schema.get_field_index("source")
    named = pc.binary_join_element_wise(prefix, table["source"], "")
    return table.set_column(at, table.schema.field(at), named)


class _Numbered:
    """Texts by number, in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def add(self, column: pa.ChunkedArray | pa.Array) -> npt.NDArray[np.uint32]:
        """The number of each text of a column."""
        encoded = column.dictionary_encode()
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        texts = encoded.dictionary.to_pylist()
        numbers = [self._numbers.setdefault(text, len(self._numbers)) for text in texts]
        found: npt.NDArray[np.uint32] = np.array(numbers, np.uint32)[encoded.indices.to_numpy()]
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)


class _Parts:
    """The samples of one shard after another."""

    def __init__(self) -> None:
        self._samples: list[npt.NDArray[np.void]] = []
        self._members: list[npt.NDArray[np.void]] = []
        self._ids: list[_Hashes] = []
        self._fields = _Numbered()
        self._sources = _Numbered()
        self._set_of: dict[int, int] = {}
        self._shards = 0

    def add(self, table: pa.Table, set_number: int, path: str, sidecar: str, size: int) -> None:
        samples = np.zeros(table.num_rows, SAMPLE_DTYPE)
        column = table["members"].combine_chunks()
        counts = pc.list_value_length(column).to_numpy().astype(np.int64)
        flat = column.flatten()
        members = np.zeros(len(flat), MEMBER_DTYPE)
        offsets = table["offset"].to_numpy()
        sizes = table["size"].to_numpy()
        for name in ("size", "xxh3_64"):
            members[name] = flat.field(name).to_numpy()
        # in a compressed shard they count from the begin of their frame
        base = 0 if path.endswith(TAR_ZST) else np.repeat(offsets, counts)
        members["offset"] = flat.field("offset").to_numpy() - base
        if len(samples) and (
            counts.min() < 1
            or members["size"].min() < 0
            or members["offset"].min() < 0
            or offsets.min() < 0
            or sizes.min() < 0
            or (offsets + sizes).max() > size
        ):
            raise FormatError(
                f"{sidecar}: has rows that do not fit its shard; copy or pack the data set again"
            )
        members["field"] = self._fields.add(flat.field("field"))
        samples["offset"], samples["size"], samples["members"] = offsets, sizes, counts
        samples["record"] = table["record"].to_numpy()
        samples["shard"] = self._shards
        samples["source"] = self._sources.add(table["source"])
        for source in np.unique(samples["source"]).tolist():
            if self._set_of.setdefault(source, set_number) != set_number:
                raise UsageError(
                    f"{path}: another data set, in a folder above or below, has a source of the name {list(self._sources)[source]};"
                    " rename a folder"
                )
        ends = np.cumsum(counts)
        padded = np.concatenate([[0], np.cumsum(BLOCK + -(-members["size"] // BLOCK) * BLOCK)])
        samples["span"] = padded[ends] - padded[ends - counts]
        self._samples.append(samples)
        self._members.append(members)
        self._ids.append(_id_hashes(table["id"]))
        self._shards += 1

    def gathered(self, total: int, *, max_samples: int | None, shuffle: bool, seed: int) -> Gathered:
        samples, members, ids = _joined(self._samples), _joined(self._members), _joined(self._ids)
        if max_samples is not None and max_samples < len(samples):
            chosen = np.sort(planned_order(len(samples), shuffle=shuffle, seed=seed)[:max_samples])
            members = members[member_rows(samples, _first_members(samples), chosen)]
            samples, ids = samples[chosen], ids[chosen]
        fields = tuple(self._fields)
        _mark_repeated(samples, members, ids, fields)
        sources = list(self._sources)
        counts = np.bincount(samples["source"], minlength=len(sources))
        # by data set and name, whatever order the shards are in
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda at: (self._set_of[at], sources[at]))
        place = np.zeros(len(sources), np.uint32)
        place[order] = np.arange(len(order))
        samples["source"] = place[samples["source"]]
        return Gathered(
            samples=samples,
            members=members,
            first_member=_first_members(samples),
            fields=fields,
            sources=tuple(sources[at] for at in order),
            counts=counts[order].astype(np.int64),
            sets=np.array([self._set_of[at] for at in order], np.int64),
            left_out=total - len(samples),
        )


def _joined(parts: list[npt.NDArray[_Scalar]]) -> npt.NDArray[_Scalar]:
    """All parts in one array; the list is emptied, so that nothing is held twice for long."""
    whole = np.concatenate(parts)
    parts.clear()
    return whole


def _first_members(samples: npt.NDArray[np.void]) -> _Ints:
    counts = samples["members"].astype(np.int64)
    first: _Ints = np.cumsum(counts) - counts
    return first


def member_rows(samples: npt.NDArray[np.void], first: _Ints, numbers: _Ints) -> _Ints:
    """The rows of the members of some samples, one sample after another.

    Args:
        samples: [N] of `SAMPLE_DTYPE`.
        first: int64 [N], the row of each sample's first member.
        numbers: which samples.
    """
    counts = samples["members"][numbers].astype(np.int64)
    rows: _Ints = np.repeat(first[numbers] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    return rows


def images_left(gathered: Gathered, gone: Iterable[tuple[str, int]]) -> tuple[int, list[int]]:
    """How many samples have an image of those that are taken out, and are not among these.

    Args:
        gathered: all samples.
        gone: source and record of those taken out.

    Returns:
        How many, and the xxh3_64 of these images, ascending.
    """
    samples = gathered.samples
    numbers = {name: number for number, name in enumerate(gathered.sources)}
    records: dict[int, list[int]] = {}
    for source, record in gone:
        records.setdefault(numbers[source], []).append(record)
    taken = np.zeros(len(samples), np.bool_)
    for number, of_source in records.items():
        here = np.flatnonzero(samples["source"] == number)
        taken[here] = np.isin(samples["record"][here], of_source)
    owners, hashes = _images(samples, gathered.members, gathered.fields)
    left = ~taken[owners] & np.isin(hashes, hashes[taken[owners]])
    return len(np.unique(owners[left])), np.unique(hashes[left]).tolist()


def _images(
    samples: npt.NDArray[np.void], members: npt.NDArray[np.void], fields: Sequence[str]
) -> tuple[_Ints, _Hashes]:
    """Of each image the number of its sample, and its hash."""
    is_image = np.array([is_image_field(field) for field in fields], np.bool_)[members["field"]]
    return np.repeat(np.arange(len(samples)), samples["members"])[is_image], members["xxh3_64"][is_image]


def _id_hashes(column: pa.ChunkedArray) -> _Hashes:
    """Equal for equal ids; 0 for none."""
    return np.array(
        [
            0 if id_ in NO_ID else xxhash.xxh3_64_intdigest(same_id(id_).encode())
            for id_ in column.to_pylist()
        ],
        np.uint64,
    )


def _mark_repeated(
    samples: npt.NDArray[np.void], members: npt.NDArray[np.void], ids: _Hashes, fields: tuple[str, ...]
) -> None:
    """Set the bits of samples whose id, or one of whose images, an earlier sample has."""
    numbers = np.arange(len(samples))
    samples["notes"][_again(ids, numbers) & (ids != 0)] |= ID_REPEATED
    owners, hashes = _images(samples, members, fields)
    samples["notes"][owners[_again(hashes, owners)]] |= IMAGE_REPEATED


def _again(hashes: _Hashes, owners: _Ints) -> npt.NDArray[np.bool_]:
    """Where a value stands that an earlier owner has."""
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    found: npt.NDArray[np.bool_] = owners[first][which] != owners
    return found
