"""Batches planned a window of positions at a time: grouped by modality and length, packed into rows, cut to a budget.

    positions of a window -> rows: samples, or packs of them -> items: rows, or micro-batches of rows -> units: what is consumed at once

    group_by="modality", global_batch_size = 4, world_size = 2; i: with an image, t: text alone

    window:   i0 t1 i2 i3 t4 i5 i6 t7 i8 i9 t10 i11 t12
    units:    [i0 i2 i3 i5]  [t1 t4 t7 t10]  [i6 i8 i9 i11]  [t12]     full ones in a keyed order, then the short ones

              batch 0        batch 1         batch 2         batch 3 (short)
    rank 0:   i0 i3          t1 t7           i6 i9           t12
    rank 1:   i2 i5          t4 t10          i8 i11          filler

With groups a unit is a global batch. What it holds depends on the global batch size alone (on the world size too where a unit is a
micro-batch for each rank); ranks only share it out. Without groups a unit is one item, and a batch takes consecutive items, which run on
from window to window.

What is planned is a pure function of the epoch, the window, what is left of it, and the batch size. `loaders.window_batches` walks it.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from loaders.batching import FILLER, EpochView, GroupBy, IntArray
from loaders.packing import best_fit, within_budget
from shardify.errors import StateError
from shardify.permute import key_of, permute

SORTED_BATCHES = 32
"""Global batches whose items are sorted by length together: more of them pad less, and mix less."""

Legs: TypeAlias = tuple[tuple[int, ...], ...]

# what a key is for, so that no two uses share one
_PACKS, _MICRO_BATCHES, _UNITS = range(3)

_MEASURED = 1 << 14  # positions at a time: what is computed for them stays in the processor's cache

KINDS = 2
"""Of rows: text alone, and with images."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """Lists of unequal length, one after the other; list -1 holds `FILLER` alone."""

    values: IntArray  # [total + 1], the filler last
    bounds: IntArray  # [lists + 2]

    @classmethod
    def of(cls, values: IntArray, sizes: IntArray) -> "Ragged":
        """Lists of `sizes` out of `values`."""
        return cls(np.append(values, FILLER), np.concatenate(([0], np.cumsum(sizes), [len(values) + 1])))

    def __len__(self) -> int:
        return len(self.bounds) - 2

    def of_lists(self, lists: IntArray) -> tuple[IntArray, IntArray]:
        """The values of some lists, and how many each has."""
        lists = np.where(lists < 0, len(self), lists)
        begins = self.bounds[lists]
        sizes = self.bounds[lists + 1] - begins
        shift = begins - (np.cumsum(sizes) - sizes)
        return self.values[np.repeat(shift, sizes) + np.arange(sizes.sum(), dtype=np.int64)], sizes


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a window; arrays are int64 [rows]."""

    samples: Ragged  # the positions in each
    lengths: IntArray
    tiles: IntArray
    kinds: IntArray  # rows of different kinds share no unit

    def sizes(self, lists: Ragged, chosen: IntArray) -> IntArray:
        """Samples in each of some lists of rows, none of them empty; int64 [n] to int64 [n]."""
        rows, counts = lists.of_lists(chosen)
        if not len(rows):
            return np.zeros(0, np.int64)
        sizes: IntArray = np.add.reduceat(np.diff(self.samples.bounds)[rows], np.cumsum(counts) - counts)
        return sizes


@dataclass(frozen=True, slots=True)
class Items:
    """What remains of a window's rows as items, in an order as random as that of positions; arrays are int64 [items]."""

    rows: Ragged  # the rows in each
    lengths: IntArray  # of the longest row
    kinds: IntArray


@dataclass(frozen=True, slots=True)
class Units:
    """Items in the order in which they are consumed."""

    rows: Ragged  # of items
    full: IntArray  # int64 [units, size], items
    short: tuple[IntArray, ...]  # units of fewer items, after the full ones

    def __len__(self) -> int:
        return len(self.full) + len(self.short)

    def items(self, begin: int, end: int) -> IntArray:
        """Of the units from `begin` to `end`."""
        whole = len(self.full)
        return np.concatenate(
            (self.full[begin:end].reshape(-1), *self.short[max(begin - whole, 0) : max(end - whole, 0)])
        )


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """How a window is arranged; all that two runs must have in common. `make_batching` describes and checks the fields."""

    group_by: GroupBy | None
    pack_tokens: int | None
    max_tokens: int | None
    max_tiles: int | None
    plan_window: int

    @property
    def budget(self) -> bool:
        """Whether items are micro-batches."""
        return self.max_tokens is not None or self.max_tiles is not None

    @property
    def by_length(self) -> bool:
        """Whether lengths are alike in a unit and balanced over its ranks."""
        return self.group_by in ("length", "modality_length")

    @property
    def by_modality(self) -> bool:
        """Whether a unit holds images, or text alone."""
        return self.group_by in ("modality", "modality_length")

    @property
    def counted_by_position(self) -> bool:
        """Whether items are samples, all of one kind."""
        return self.pack_tokens is None and not self.budget and not self.by_modality

    def windows(self, epoch: EpochView) -> int:
        """Windows in an epoch, the last one shorter."""
        return -(-epoch.length // self.plan_window)

    def size(self, global_batch_size: int | None, world_size: int) -> tuple[int, ...]:
        """What the arrangement depends on beside this plan: rows in a micro-batch at most (0: any number), items in a unit."""
        unit = world_size if self.budget else global_batch_size
        assert unit is not None
        most_rows = ((global_batch_size or 0) // world_size,) if self.budget else ()
        return (*most_rows, unit) if self.group_by is not None else most_rows

    def rows(self, epoch: EpochView, window: int) -> Rows:
        """Samples in the order of their positions, or packs in a keyed order, each of one modality when grouped by that."""
        begin = window * self.plan_window
        positions = np.arange(begin, min(begin + self.plan_window, epoch.length), dtype=np.int64)
        lengths, tiles = np.empty_like(positions), np.empty_like(positions)
        for first in range(0, len(positions), _MEASURED):
            some = slice(first, first + _MEASURED)
            lengths[some], tiles[some] = epoch.measure(positions[some])
        np.maximum(lengths, 1, out=lengths)  # a text of no tokens has one padding token
        kinds = (tiles > 0).astype(np.int64) if self.by_modality else np.zeros_like(positions)
        if self.pack_tokens is None:
            return Rows(Ragged.of(positions, np.ones_like(positions)), lengths, tiles, kinds)
        packs, count = np.empty_like(positions), 0
        for kind in range(KINDS):
            own = np.flatnonzero(kinds == kind)
            packs[own] = count + best_fit(lengths[own], self.pack_tokens)
            count = int(packs[own].max(initial=count - 1)) + 1
        packs = _shuffled(count, epoch, _PACKS, window)[packs]
        order = np.argsort(packs, kind="stable")
        sizes = np.bincount(packs, minlength=count)
        firsts = np.cumsum(sizes) - sizes
        return Rows(
            Ragged.of(positions[order], sizes),
            np.add.reduceat(lengths[order], firsts),
            np.add.reduceat(tiles[order], firsts),
            kinds[order][firsts],
        )

    def items(
        self, epoch: EpochView, window: int, rows: Rows, left: IntArray, size: tuple[int, ...]
    ) -> Items:
        """The rows `left` of a window as items: as they are, or as micro-batches of similar length, in a keyed order."""
        if not self.budget:
            return Items(Ragged.of(left, np.ones_like(left)), rows.lengths[left], rows.kinds[left])
        ordered = left[np.lexsort((-rows.lengths[left], rows.kinds[left]))]
        split = np.searchsorted(rows.kinds[ordered], np.arange(1, KINDS))
        sizes = np.concatenate(
            [
                within_budget(
                    rows.lengths[own],
                    rows.tiles[own],
                    max_rows=size[0],
                    max_tokens=self.max_tokens,
                    max_tiles=self.max_tiles,
                )
                for own in np.split(ordered, split)
            ]
        )
        shuffled = _shuffled(len(sizes), epoch, _MICRO_BATCHES, window)
        values, sizes = Ragged.of(ordered, sizes).of_lists(shuffled)
        longest = values[np.cumsum(sizes) - sizes]
        return Items(Ragged.of(values, sizes), rows.lengths[longest], rows.kinds[longest])

    def units(self, epoch: EpochView, window: int, items: Items, size: tuple[int, ...]) -> Units:
        """Items as they are consumed: one by one, or in groups.

        Of each modality the first items make full units, the others a short one. By length, `SORTED_BATCHES` units' worth of items after
        another are sorted, and cut into units: longest item first in each.
        """
        if self.group_by is None:
            return Units(items.rows, np.arange(len(items.rows), dtype=np.int64)[:, None], ())
        unit = size[-1]
        full, short = [], []
        for kind in range(KINDS):
            own = np.flatnonzero(items.kinds == kind)
            count = len(own) // unit
            chunks = np.arange(count) * -(-count // SORTED_BATCHES) // max(count, 1)
            whole, rest = own[: count * unit], own[count * unit :]
            if self.by_length:
                whole = whole[np.lexsort((-items.lengths[whole], np.repeat(chunks, unit)))]
                rest = rest[np.argsort(-items.lengths[rest], kind="stable")]
            full.append(whole.reshape(count, unit))
            short += [rest] if len(rest) else []
        together = np.concatenate(full)
        return Units(items.rows, together[_shuffled(len(together), epoch, _UNITS, window)], tuple(short))

    def left(self, epoch: EpochView, window: int, rows: Rows, legs: Legs) -> IntArray:
        """The rows that legs left of a window, ascending."""
        left = np.arange(len(rows.samples), dtype=np.int64)
        for leg in legs:
            units = self.arranged(epoch, window, rows, left, leg[:-1])
            check_consumed(leg[-1], units, window)
            consumed, _ = units.rows.of_lists(units.items(0, leg[-1]))
            left = np.setdiff1d(left, consumed, assume_unique=True)
        return left

    def arranged(
        self, epoch: EpochView, window: int, rows: Rows, left: IntArray, size: tuple[int, ...]
    ) -> Units:
        """The rows `left` of a window as units."""
        return self.units(epoch, window, self.items(epoch, window, rows, left, size), size)


def _shuffled(count: int, epoch: EpochView, purpose: int, window: int) -> IntArray:
    """The numbers below `count` in a keyed order."""
    return permute(np.arange(count), count, key_of(epoch.key, purpose, window))


def check_consumed(done: int, units: Units, window: int) -> None:
    """Refuse to have consumed more units than there are.

    Raises:
        StateError: they are more.
    """
    if done > len(units):
        raise StateError(
            f"{done} units consumed of window {window}, which has {len(units)}: the state is of other data, or of other lengths"
        )
