"""The samples of a run as one flat range: those of all its data sets (*parts*) that take part, one part after another.

    part       chat, 6 of 8 samples (the train side)      captions, 4 samples
    samples    0   1   2   3   4   5                       6   7   8   9
    stored as  0   1   3   4   5   7                       0   1   2   3      numbers in their part's shards

A data set alone is one part with an empty name. What is asked of a sample is gathered from its part's index, of which nothing is copied as a whole.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from loaders.arguments import integer
from loaders.course import Course, Fingerprint, PlainCourse
from loaders.exclusions import describe_idle, find_excluded
from loaders.mixture import Mixture, MixtureCourse, MixturePart, Shards
from loaders.order import IntArray, OrderSettings
from loaders.subset import DEFAULT_VALIDATION, EVERYTHING, Split, Subset, choose_side, choose_some, digest_of
from shardify.errors import UsageError
from shardify.format.exclude import read_exclusions
from shardify.format.samples import is_compressed
from shardify.format.shards import ShardFile, ShardSet, open_shards

_NONE: IntArray = np.zeros(0, np.int64)
_PLACES = _NEIGHBOURS = 64  # what a survey looks at
_SPARSE = 2  # of so many stored samples fewer than one takes part: blocks are not read as a whole


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What is known of n samples without reading them.

    Attributes:
        part: int64 [n], number of the part.
        shard: int64 [n], number in `Dataset.paths`.
        offset: int64 [n], first byte of the sample in its shard; in `.tar.zst`, of its frame.
        size: int64 [n], bytes of it.
        ordinal: int64 [n], in `.tar.zst` which sample of the frame it is, from 0; 0 in plain tars.
        words: int64 [n], whitespace words over all turns.
        images: int64 [n].
        excluded: bool [n], named by the exclusion list.
        extent_begin: int64 [n], first byte of the sample's extent: what is read of its shard at once, the samples of its block in it.
        extent_end: int64 [n], the byte behind it.
    """

    part: IntArray
    shard: IntArray
    offset: IntArray
    size: IntArray
    ordinal: IntArray
    words: IntArray
    images: IntArray
    excluded: npt.NDArray[np.bool_]
    extent_begin: IntArray
    extent_end: IntArray

    def __getitem__(self, chosen: slice | IntArray) -> "Rows":
        """Those of some samples."""
        return Rows(*(getattr(self, name)[chosen] for name in self.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One data set of a run.

    Attributes:
        name: empty for a data set alone.
        shards: its shards.
        subset: which samples take part.
        excluded: int64, ascending numbers in `shards` of those that become fillers.
    """

    name: str
    shards: ShardSet
    subset: Subset = EVERYTHING
    excluded: IntArray = field(default_factory=lambda: _NONE)

    @property
    def samples(self) -> int:
        """How many take part."""
        return len(self.shards.index if self.subset.samples is None else self.subset.samples)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a state recognises it by: the shards' own, and how samples were chosen. Excluded ones stay where they are and do not count."""
        chosen = {"chosen": dict(self.subset.choice)} if self.subset.choice else {}
        return {**self.shards.fingerprint, **chosen}

    def stored(self, samples: IntArray) -> IntArray:
        """The numbers in `shards` of samples that take part; int64 [n] both."""
        chosen = self.subset.samples
        return samples if chosen is None else chosen[samples].astype(np.int64)

    def prefix(self, fingerprint: Fingerprint) -> int | None:
        """How many samples took part when the fingerprint was that: before shards were added. None when it was never that."""
        count = fingerprint.get("shards")
        if not isinstance(count, int) or not 0 <= count <= len(self.shards.shards):
            return None
        before = self.shards.prefix(count)
        if before.fingerprint != {name: value for name, value in fingerprint.items() if name != "chosen"}:
            return None
        there, here = fingerprint.get("chosen") or {}, self.subset.choice
        counted = ("samples", "digest")
        if {k: v for k, v in there.items() if k not in counted} != {
            k: v for k, v in here.items() if k not in counted
        }:
            return None
        if self.subset.samples is None:
            return len(before.index)
        kept = int(np.searchsorted(self.subset.samples, len(before.index)))
        same = (
            here
            if kept == len(self.subset.samples)
            else {
                "samples": kept,
                "digest": digest_of(self.subset.samples[:kept]),
            }
        )
        return kept if all(there.get(name) == same[name] for name in counted) else None


class Dataset:
    """All samples of a run.

    Args:
        parts: the data sets, at least one; of several, each has a name.
        mixture: how they are mixed; None for a data set alone.
        block: neighbouring samples that a remote read fetches at once: that of the block shuffle, 1 for a full shuffle.
        exclusions: fingerprint of the exclusion list by which samples are excluded; None without one.

    Attributes:
        parts: the data sets.
        exclusions: as given.
        paths: of all shards, part by part; paths or URLs.
        starts: int64 [parts + 1]; part i has the samples from starts[i] to starts[i + 1].
        prefixes: of the keys of each part's samples: ``part/`` in a mixture.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        mixture: Mixture | None = None,
        block: int = 32,
        exclusions: str | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.mixture = mixture
        self.exclusions = exclusions
        self.paths = tuple(shard.path for part in self.parts for shard in part.shards.shards)
        self.starts = np.zeros(len(self.parts) + 1, np.int64)
        np.cumsum([part.samples for part in self.parts], out=self.starts[1:])
        self.prefixes = tuple(f"{part.name}/" if part.name else "" for part in self.parts)
        integer("block", block, least=1)
        self._tables: list[_Table] = []
        shards = 0
        for part in self.parts:
            self._tables.append(_Table(part, shards, block))
            shards += len(part.shards.shards)

    @cached_property
    def files(self) -> tuple[ShardFile, ...]:
        """All shards, part by part, as `paths`."""
        return tuple(shard for part in self.parts for shard in part.shards.shards)

    def __len__(self) -> int:
        """Samples of all parts."""
        return int(self.starts[-1])

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a state recognises the data by: a lone part's, or ``{"shards", "samples", "digest"}`` over all, whatever their order."""
        if self.mixture is None:
            return self.parts[0].fingerprint
        digest = xxhash.xxh3_128()
        for part in sorted(self.parts, key=lambda part: part.name):
            own = part.fingerprint
            chosen = own.get("chosen", {}).get("digest", "")
            digest.update(f"{part.name}\0{own['digest']}\0{chosen}\n".encode("utf-8", "surrogatepass"))
        return {"shards": len(self.paths), "samples": len(self), "digest": digest.hexdigest()}

    def course(self, settings: OrderSettings) -> Course:
        """The epochs over these samples."""
        if self.mixture is None:
            part = self.parts[0]
            return PlainCourse(part.samples, settings, part.fingerprint, part.prefix)
        parts = tuple(
            MixturePart(
                part.name,
                self.mixture.rates[part.name],
                part.samples,
                int(first),
                part.fingerprint,
                part.prefix,
            )
            for part, first in zip(self.parts, self.starts, strict=False)
        )
        return MixtureCourse(parts, settings, self.mixture.weights, self.mixture.samples)

    def part_of(self, samples: IntArray) -> IntArray:
        """The part of each sample; int64 [n] both."""
        if len(self.parts) == 1:
            return np.zeros(len(samples), np.int64)
        return np.searchsorted(self.starts, samples, "right") - 1

    def rows(self, samples: IntArray) -> Rows:
        """What is known of samples; int64 [n] flat numbers, in any order."""
        samples = np.asarray(samples, np.int64)
        if len(self.parts) == 1:
            return self._tables[0].rows(samples, 0)
        part = self.part_of(samples)
        columns: dict[str, npt.NDArray[Any]] = {
            name: np.empty(len(samples), np.bool_ if name == "excluded" else np.int64)
            for name in Rows.__slots__
        }
        for number in np.unique(part).tolist():
            here = np.flatnonzero(part == number)
            found = self._tables[number].rows(samples[here] - self.starts[number], number)
            for name, column in columns.items():
                column[here] = getattr(found, name)
        return Rows(**columns)

    def survey(self) -> Rows:
        """Rows of up to 4,096 samples from all over, to see what is ordinary."""
        return self.rows(spread(len(self)))

    def words_and_images(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """`Rows.words` and `Rows.images` alone; int64 [n] flat numbers to int64 [n] both."""
        samples = np.asarray(samples, np.int64)
        if len(self.parts) == 1:
            return self._tables[0].words_and_images(samples)
        part = self.part_of(samples)
        words, images = np.empty_like(samples), np.empty_like(samples)
        for number, table in enumerate(self._tables):
            here = np.flatnonzero(part == number)
            words[here], images[here] = table.words_and_images(samples[here] - self.starts[number])
        return words, images


def spread(count: int) -> IntArray:
    """Some of range(count) from all over, int64 [up to 4,096], ascending: neighbours at 64 places, as each place of an index is a read from disk."""
    places = np.linspace(0, max(count - _NEIGHBOURS, 0), _PLACES).astype(np.int64)
    return np.unique(np.minimum(places[:, None] + np.arange(_NEIGHBOURS), count - 1)) if count else _NONE


class _Table:
    """What `Dataset.rows` needs of one part."""

    def __init__(self, part: Part, first_shard: int, block: int) -> None:
        self._part = part
        self._first_shard = first_shard
        self._block = block
        self._index = np.asarray(part.shards.index)  # no memmap: its slices are slow to make
        self._starts = part.shards.starts
        # of a run of a data set's shards the index counts from the data set's first
        first = self._index["shard"][:1].astype(np.int64).sum()
        self._first_recorded = int(first - (np.searchsorted(self._starts, 0, "right") - 1))
        compressed = np.array([is_compressed(shard.path) for shard in part.shards.shards], np.bool_)
        self._compressed = compressed if compressed.any() else None

    def rows(self, samples: IntArray, part: int) -> Rows:
        stored = self._part.stored(samples)
        rows = self._index.take(stored)
        shard = self._shards(stored, rows["shard"])
        offset, size = rows["offset"].astype(np.int64), rows["size"].astype(np.int64)
        ordinal = np.zeros(len(samples), np.int64)
        if self._compressed is not None:
            framed = np.flatnonzero(self._compressed[shard])
            ordinal[framed] = self._ordinals(stored[framed], offset[framed], self._starts[shard[framed]])
        begin, end = self._extents(samples, stored, shard)
        return Rows(
            part=np.full(len(samples), part, np.int64),
            shard=shard + self._first_shard,
            offset=offset,
            size=size,
            ordinal=ordinal,
            words=rows["words"].astype(np.int64),
            images=rows["images"].astype(np.int64),
            excluded=self._excluded(stored),
            extent_begin=begin,
            extent_end=end,
        )

    def words_and_images(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        rows = self._index.take(self._part.stored(samples))
        return rows["words"].astype(np.int64), rows["images"].astype(np.int64)

    def _shards(self, stored: IntArray, recorded: npt.NDArray[np.uint32]) -> IntArray:
        """The shard of each sample: as the index has it where that fits, which is found sooner than by searching."""
        shard = recorded.astype(np.int64) - self._first_recorded
        np.clip(shard, 0, len(self._starts) - 2, out=shard)
        if ((stored >= self._starts[shard]) & (stored < self._starts[shard + 1])).all():
            return shard
        return np.searchsorted(self._starts, stored, "right") - 1

    def _extents(self, samples: IntArray, stored: IntArray, shard: IntArray) -> tuple[IntArray, IntArray]:
        """The first byte of each sample's extent, and the one behind it."""
        low = high = stored
        if self._block > 1:
            low = samples - samples % self._block
            high = np.minimum(low + self._block, self._part.samples) - 1
            if self._part.subset.samples is not None:
                wide = high - low + 1
                low, high = self._part.stored(low), self._part.stored(high)
                # a block of few samples among many that do not take part: each by itself
                sparse = high - low >= _SPARSE * wide
                low, high = np.where(sparse, stored, low), np.where(sparse, stored, high)
            low = np.maximum(low, self._starts[shard])
            high = np.minimum(high, self._starts[shard + 1] - 1)
        last = self._index.take(high)
        return (
            self._index["offset"][low].astype(np.int64),
            last["offset"].astype(np.int64) + last["size"],
        )

    def _ordinals(self, stored: IntArray, offset: IntArray, begin: IntArray) -> IntArray:
        """How many samples before each one, from `begin` of its shard on, are of the same frame: those at the same offset."""
        offsets = self._index["offset"]
        # the first of the frame is in (low, high]: outwards in growing steps, then by halves
        high, step = stored.copy(), 1
        low = high - 1
        active = np.arange(len(stored))
        while len(active):
            at = stored[active] - step
            same = at >= begin[active]
            same[same] = offsets[at[same]] == offset[active[same]]
            high[active[same]] = at[same]
            low[active] = np.maximum(at, begin[active] - 1)
            active = active[same]
            step *= 2
        while (open_ := np.flatnonzero(high - low > 1)).size:
            middle = (low[open_] + high[open_]) // 2
            same = offsets[middle] == offset[open_]
            high[open_[same]] = middle[same]
            low[open_[~same]] = middle[~same]
        return stored - high

    def _excluded(self, stored: IntArray) -> npt.NDArray[np.bool_]:
        names = self._part.excluded
        if not len(names):
            return np.zeros(len(stored), np.bool_)
        at = np.minimum(np.searchsorted(names, stored), len(names) - 1)
        found: npt.NDArray[np.bool_] = names[at] == stored
        return found


def open_dataset(
    shards: Shards | Mixture,
    *,
    split: Split = None,
    validation: Any = DEFAULT_VALIDATION,
    max_samples: int | None = None,
    exclude: str | os.PathLike[str] | None = None,
    block: int = 32,
) -> Dataset:
    """Open the data of a run.

    Args:
        shards: as `shardify.format.shards.open_shards` takes them, or a mixture.
        split: ``"train"`` or ``"validation"``, by picture (`loaders.subset`); None (default) for all samples.
        validation: the share of the validation side. Default 0.01.
        max_samples: no more than so many, a fair choice that is always the same; of a mixture, every part gives the same share of its samples.
            Default: all.
        exclude: a file of ids, URLs and image hashes (docs/reshard.md), of samples that become fillers. Entries that name nothing are
            warned of.
        block: as for `Dataset`.

    Raises:
        UsageError: arguments that cannot be honoured, or a part of a mixture without samples.
        SourceError: the exclusion list cannot be read.
        FormatError: shards that are missing or damaged.
        PackError: a store cannot be reached.
    """
    exclusions = None if exclude is None else read_exclusions(exclude)
    mixture = shards if isinstance(shards, Mixture) else None
    named: Mapping[str, Shards] = {"": shards} if not isinstance(shards, Mixture) else shards.shards
    opened = {name: open_shards(place) for name, place in named.items()}
    subsets = {name: choose_side(found, split, validation) for name, found in opened.items()}
    if max_samples is not None:
        sizes = [Part(name, opened[name], subsets[name]).samples for name in opened]
        for (name, found), share in zip(opened.items(), _shares(sizes, max_samples), strict=True):
            if share:
                subsets[name] = choose_some(subsets[name], len(found.index), share, found.fingerprint)
            elif mixture is not None:
                raise UsageError(f"max_samples={max_samples}: leaves no sample of part {name!r}")
    parts = []
    lines: frozenset[int] = frozenset()
    for name, found in opened.items():
        excluded = _NONE
        if exclusions is not None:
            hits = find_excluded(found, exclusions)
            excluded, lines = hits.samples, lines | hits.lines
        part = Part(name, found, subsets[name], excluded)
        if mixture is not None and not part.samples:
            raise UsageError(
                f"part {name!r} of the mixture has no samples{f' for split={split!r}' if split else ''}"
            )
        parts.append(part)
    if exclusions is not None and (idle := describe_idle(exclusions, lines)) is not None:
        warnings.warn(idle, stacklevel=2)
    found_by = None if exclusions is None else exclusions.fingerprint
    return Dataset(parts, mixture=mixture, block=block, exclusions=found_by)


def _shares(sizes: Sequence[int], most: int) -> list[int]:
    """`most` shared out by size, to the last one."""
    integer("max_samples", most, least=1)
    total = sum(sizes)
    most = min(most, total)
    ends = np.cumsum([0, *sizes]).tolist()
    return [end * most // max(total, 1) - begin * most // max(total, 1) for begin, end in pairwise(ends)]


def described(shards: Shards | Mixture) -> Any:
    """What the user called the data, JSON-able, for `redescribed`."""
    if not isinstance(shards, Mixture):
        return (
            os.fspath(shards)
            if isinstance(shards, str | os.PathLike)
            else [os.fspath(shard) for shard in shards]
        )
    return {
        "parts": {name: [described(place), str(shards.rates[name])] for name, place in shards.shards.items()},
        "weights": shards.weights,
        "samples": shards.samples,
    }


def redescribed(data: Any) -> Shards | Mixture:
    """What `described` was told of.

    Raises:
        UsageError: it was told of something else.
    """
    if not isinstance(data, dict):
        shards: Shards = data
        return shards
    parts = {name: (place, rate) for name, (place, rate) in data["parts"].items()}
    return Mixture(parts, weights=data["weights"], samples=data["samples"])
