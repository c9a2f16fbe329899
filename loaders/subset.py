"""Which samples of a data set take part: one side of a train/validation split, and no more than so many.

The split goes by pictures, wherever they lie in the data set. Samples that share a picture, by the hash of its bytes, are on one side, and so are
those that are joined by a chain of such samples: {A, B} and {B, C} bring A, B and C together. A group of pictures is on the side that a hash of its
smallest hash says, so that the split does not depend on shards or their order, and a larger fraction keeps what a smaller one has. A sample
without pictures goes by the hash of its record.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from loaders.arguments import integer
from loaders.derived import default_workers, derived, each_forked, read_array, watched, write_array
from loaders.members import read_members_of
from shardify.errors import UsageError
from shardify.format.names import RECORD_FIELD, is_image_field
from shardify.format.shards import ShardFile, ShardSet, local_sidecars
from shardify.permute import key_of, keys_of, permute, unpermute

IntArray: TypeAlias = npt.NDArray[np.int64]
Split: TypeAlias = Literal["train", "validation"] | None

DEFAULT_VALIDATION = 0.01

_VERSION = 1  # of what is chosen
_CHUNK = 1 << 22
_FEW = 1 << 22  # samples that are chosen and sorted in memory
_IN_PROCESS = 20_000  # samples for which no other process is started
_SMALL_GROUP = 64
_SIDE, _CHOICE = 32, 33  # what a key is for


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Samples of a data set.

    Attributes:
        samples: uint32 or int64 [n], ascending sample numbers, memory-mapped; None for all.
        choice: how they were chosen, JSON-able, with their number and a digest; empty for all.
    """

    samples: npt.NDArray[Any] | None
    choice: Mapping[str, Any]


EVERYTHING = Subset(None, {})


def fraction_of(validation: Any) -> Fraction:
    """The share of the validation side as an exact number.

    Raises:
        UsageError: it is none between 0 and 1.
    """
    try:
        share = Fraction(str(validation) if isinstance(validation, float) else validation)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise UsageError(f"validation={validation!r}: a fraction such as 0.01 is needed") from None
    if not 0 < share < 1:
        raise UsageError(f"validation={validation!r}: a fraction between 0 and 1 is needed")
    return share


def choose_side(shards: ShardSet, split: Split, validation: Any = DEFAULT_VALIDATION) -> Subset:
    """One side of a split.

    Both sides are computed at once from the sidecars and kept in the user's cache folder, 4 bytes a sample (8 in a set of more than 2**32).

    Raises:
        UsageError: an unknown split, or no fraction.
        FormatError: a sidecar cannot be read, or the cache folder cannot be written.
        PackError: a store of remote sidecars cannot be reached.
    """
    if split is None:
        return EVERYTHING
    if split not in ("train", "validation"):
        raise UsageError(f"split={split!r}: 'train', 'validation' or None is needed")
    share = fraction_of(validation)
    identity = {
        "kind": "split",
        "version": _VERSION,
        "validation": str(share),
        "shards": shards.fingerprint,
    }
    folder, about = derived(identity, lambda folder: _build_sides(shards, share, folder))
    samples = read_array(folder, split)
    choice = {"split": split, "validation": str(share), "samples": len(samples), "digest": about[split]}
    return Subset(samples, choice)


def choose_some(subset: Subset, samples: int, max_samples: int, identity: Mapping[str, Any]) -> Subset:
    """No more than `max_samples` of a subset: a random choice, always the same, in which that of fewer is contained.

    Args:
        subset: of the data set.
        samples: in the data set.
        max_samples: at least 1.
        identity: JSON-able, of the data set.

    Raises:
        UsageError: `max_samples` is no such number.
    """
    integer("max_samples", max_samples, least=1)
    total = samples if subset.samples is None else len(subset.samples)
    if max_samples >= total:
        return subset
    named = {
        "kind": "some",
        "version": _VERSION,
        "shards": dict(identity),
        "of": dict(subset.choice),
        "max_samples": max_samples,
    }

    def build(folder: str) -> dict[str, str]:
        chosen = (
            numbers if subset.samples is None else subset.samples[numbers]
            for numbers in _some(total, max_samples)
        )
        digest = xxhash.xxh3_128()
        write_array(folder, "some", _digested(chosen, digest), max_samples, _dtype(samples))
        return {"some": digest.hexdigest()}

    folder, about = derived(named, build)
    choice = {
        **{name: value for name, value in subset.choice.items() if name in ("split", "validation")},
        "max_samples": max_samples,
        "samples": max_samples,
        "digest": about["some"],
    }
    return Subset(read_array(folder, "some"), choice)


def digest_of(samples: npt.NDArray[Any]) -> str:
    """What a subset is recognised by: xxh3_128 of its numbers as int64."""
    digest = xxhash.xxh3_128()
    for _ in _digested((samples[at : at + _CHUNK] for at in range(0, len(samples), _CHUNK)), digest):
        pass
    return digest.hexdigest()


def _digested(chunks: Iterator[npt.NDArray[Any]], digest: Any) -> Iterator[npt.NDArray[Any]]:
    for chunk in chunks:
        digest.update(np.ascontiguousarray(chunk, "<i8").data)
        yield chunk


def _dtype(samples: int) -> npt.DTypeLike:
    return "<u4" if samples <= 2**32 else "<i8"


def _some(total: int, count: int) -> Iterator[IntArray]:
    """The numbers of range(total) that a keyed permutation has first, ascending, in pieces."""
    key = key_of(_CHOICE)
    if count <= _FEW:
        yield np.sort(permute(np.arange(count), total, key))
        return
    for begin in range(0, total, _CHUNK):
        numbers = np.arange(begin, min(begin + _CHUNK, total))
        yield numbers[unpermute(numbers, total, key) < count]


def _build_sides(shards: ShardSet, share: Fraction, folder: str) -> dict[str, str]:
    total = len(shards.index)
    temporary = os.path.join(folder, "pictures.tmp")  # removed by the next builder if this one is killed
    pairs = _Links()
    with open(temporary, "w+b") as file:
        for found in _pictures(shards):
            file.write(found[0].data)
            pairs.add(found[1])
        file.flush()
        pictures = np.memmap(file, "<u8", "r", shape=(total,)) if total else np.zeros(0, "<u8")
        groups = pairs.groups(limit=max(_SMALL_GROUP, int(share * total) // 10))

        def sides() -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
            for begin in range(0, total, _CHUNK):
                yield begin, groups.is_validation(np.asarray(pictures[begin : begin + _CHUNK]), share)

        held_out = sum(int(side.sum()) for _, side in sides())
        digests = {}
        for name, count in (("train", total - held_out), ("validation", held_out)):
            digest = xxhash.xxh3_128()
            chosen = (begin + np.flatnonzero(side == (name == "validation")) for begin, side in sides())
            write_array(folder, name, _digested(chosen, digest), count, _dtype(total))
            digests[name] = digest.hexdigest()
    os.unlink(temporary)
    return digests


def _pictures(shards: ShardSet) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
    """Of each shard: a hash of each sample, and uint64 [k, 2], which hashes belong together."""
    total = len(shards.index)
    workers = 0 if total <= _IN_PROCESS else default_workers()
    files = zip(shards.shards, local_sidecars(shards.shards), strict=True)
    found = each_forked(pictures_of, files, count=len(shards.shards), workers=workers)
    return watched(found, "Splitting", [shard.samples for shard in shards.shards], total)


def pictures_of(
    shard: tuple[ShardFile, str],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """What the samples of a shard, given with its local sidecar, show.

    Returns:
        uint64 [n], the smallest hash of each sample's images, or that of its record, or of all its members where it has no record either; and
        uint64 [k, 2], hashes of images that stand in one sample, each with the smallest of it.
    """
    members = read_members_of(*shard)
    is_image = members.named(is_image_field)
    is_record = members.named(lambda field: field == RECORD_FIELD)
    # what a sample is known by: images, else the record, else anything
    rank = np.where(is_image, 0, np.where(is_record, 1, 2))
    best = np.full(members.samples, 3)
    np.minimum.at(best, members.row, rank)
    counts = rank == best[members.row]
    smallest = np.full(members.samples, np.iinfo(np.uint64).max)
    np.minimum.at(smallest, members.row[counts], members.xxh3_64[counts])
    others = is_image & (members.xxh3_64 != smallest[members.row])
    links = np.stack([smallest[members.row[others]], members.xxh3_64[others]], axis=1)
    return smallest, np.unique(links, axis=0) if len(links) else links


class _Links:
    """Pairs of hashes that belong together: 16 bytes for each image beyond the first of its sample."""

    def __init__(self) -> None:
        self._pairs: list[npt.NDArray[np.uint64]] = []

    def add(self, pairs: npt.NDArray[np.uint64]) -> None:
        if len(pairs):
            self._pairs.append(pairs)

    def groups(self, *, limit: int) -> "Groups":
        """The connected groups; those of more than `limit` pictures are kept out of validation."""
        if not self._pairs:
            return Groups(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.bool_))
        pairs = np.concatenate(self._pairs)
        self._pairs = []
        hashes, ends = np.unique(pairs, return_inverse=True)
        ends = ends.reshape(pairs.shape)
        smallest = _components(len(hashes), ends[:, 0], ends[:, 1])
        sizes = np.bincount(smallest, minlength=len(hashes))
        return Groups(hashes, hashes[smallest], (sizes > limit)[smallest])


def _components(count: int, one: IntArray, other: IntArray) -> IntArray:
    """int64 [count]: the smallest number that each of range(count) is connected with, by the pairs (one, other)."""
    root = np.arange(count)
    while True:
        low, high = np.minimum(root[one], root[other]), np.maximum(root[one], root[other])
        apart = low != high
        if not apart.any():
            return root
        np.minimum.at(root, high[apart], low[apart])
        while (root[root] != root).any():  # on to the end of each chain
            root = root[root]


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Pictures that stand in samples of several, and with which others they are connected.

    Attributes:
        pictures: uint64 [g], ascending hashes.
        smallest: uint64 [g], the smallest hash of each one's group.
        large: bool [g], whether its group is too large for the validation side.
    """

    pictures: npt.NDArray[np.uint64]
    smallest: npt.NDArray[np.uint64]
    large: npt.NDArray[np.bool_]

    def is_validation(self, pictures: npt.NDArray[np.uint64], share: Fraction) -> npt.NDArray[np.bool_]:
        """Which samples are on the validation side; uint64 [n], a picture of each, to bool [n]."""
        known = np.array(pictures)
        large = np.zeros(len(known), np.bool_)
        if len(self.pictures):
            at = np.minimum(np.searchsorted(self.pictures, known), len(self.pictures) - 1)
            grouped = self.pictures[at] == known
            known[grouped] = self.smallest[at[grouped]]
            large[grouped] = self.large[at[grouped]]
        # mixed again: the smallest hash of many is a small number
        drawn = keys_of(key_of(_SIDE), known.view(np.int64))
        return (drawn < np.uint64(int(share * 2**64))) & ~large
