"""Which sample stands at which position of an epoch: pure functions of (length, seed, epoch, settings).

*full*: a keyed permutation of all samples. *None*: manifest order. *block*, the default, in two steps:

1. By the seed alone, so that caches stay warm from epoch to epoch: the blocks of `block` neighbouring samples are shuffled and dealt to
   `lanes` lanes of equal length. What whole blocks cannot share out evenly, the rest, is cut into one short piece for each lane:

       length = 26, block = 4, lanes = 2           blocks dealt: 3 1 4 0 2 5, tail: samples 24 25

       lane 0:  [12..15] [ 4.. 7] [16..19] [24]    3 whole blocks and a rest piece of 1
       lane 1:  [ 0.. 3] [ 8..11] [20..23] [25]    3 whole blocks and a rest piece of 1

2. By seed and epoch: each lane shuffles its pieces, and mixes the samples of every `window` consecutive pieces.

Position p is step p // lanes of lane p % lanes. When the world size divides the lanes, a rank (positions p % world_size == rank) reads
whole blocks that no other rank needs, except for the blocks of the rest. Nothing here keeps state or a table: any position of 10**9 is
found in O(1), so a resumed run starts where it stopped without replaying anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from loaders.arguments import integer
from shardify.errors import UsageError
from shardify.permute import key_of, keys_of, permute, unpermute

IntArray: TypeAlias = npt.NDArray[np.int64]
Shuffle: TypeAlias = Literal["block", "full"] | None

ORDER_VERSION = 1
"""Changes whenever the same settings would give another order; a state names the version it was made under."""

DEFAULT_LANES = 64
MAX_LANES = 1 << 20
MAX_MIXED = 1 << 30
"""Neighbours in a block, and pieces in a window."""

_EPOCH_LANES = 1 << 16  # lanes, over all epochs, that are looked at at once

# what a key is for, so that no two uses share one
_FULL, _DEAL, _PIECES, _MIX = range(4)


class Order(Protocol):
    """A bijection from the positions of an epoch to samples."""

    @property
    def length(self) -> int:
        """Positions in an epoch, and samples in the data set."""
        ...

    def samples(self, epoch: int | IntArray, positions: IntArray) -> IntArray:
        """The samples that stand at `positions` in `epoch`, one for all or int64 [n]; int64 [n], each in [0, length), to int64 [n]."""
        ...


class EpochOrder(Protocol):
    """Which sample stands at which position, in one epoch."""

    @property
    def length(self) -> int:
        """Positions in the epoch."""
        ...

    def samples(self, positions: IntArray) -> IntArray:
        """The samples that stand at `positions`; int64 [n], each in [0, length), to flat sample numbers, int64 [n]."""
        ...


@dataclass(frozen=True, slots=True)
class OrderSettings:
    """What an order depends on beside the length and the epoch; the arguments are those of `make_order`."""

    shuffle: Shuffle = "block"
    seed: int = 0
    lanes: int = DEFAULT_LANES
    block: int = 32
    window: int = 8

    def order(self, length: int, *name: int) -> "Order":
        """The order of a data set of `length` samples, for one that has a name under a seed of its own."""
        return make_order(
            length,
            shuffle=self.shuffle,
            seed=key_of(self.seed, *name) if name else self.seed,
            lanes=self.lanes,
            block=self.block,
            window=self.window,
        )


def make_order(
    length: int, *, shuffle: Shuffle, seed: int, lanes: int = DEFAULT_LANES, block: int = 32, window: int = 8
) -> Order:
    """The order of a data set of `length` samples.

    Args:
        length: samples in the data set; 0 is allowed.
        shuffle: ``"block"``, ``"full"`` or None for manifest order.
        seed: any integer.
        lanes: independent streams of blocks, at least 1; only for ``"block"``, as are the next two.
        block: neighbouring samples that stay together in one lane, at least 1.
        window: pieces whose samples are mixed, at least 1.

    Raises:
        UsageError: an argument outside these bounds.
    """
    integer("length", length, least=0)
    integer("lanes", lanes, least=1, most=MAX_LANES)
    integer("block", block, least=1, most=MAX_MIXED)
    integer("window", window, least=1, most=MAX_MIXED)
    if shuffle is None:
        return SequentialOrder(length)
    if shuffle == "full":
        return FullOrder(length, seed)
    if shuffle == "block":
        return BlockOrder(length, seed, lanes, block, window)
    raise UsageError(f"shuffle={shuffle!r}: 'block', 'full' or None is needed")


def default_lanes(world_size: int) -> int:
    """The number of lanes a run starts with: 64, or the world size when that is larger."""
    return max(DEFAULT_LANES, world_size)


@dataclass(frozen=True, slots=True)
class OneEpoch:
    """One epoch of an order."""

    order: Order
    epoch: int

    @property
    def length(self) -> int:
        """Positions in the epoch."""
        return self.order.length

    def samples(self, positions: IntArray) -> IntArray:
        """The samples that stand at `positions`."""
        return self.order.samples(self.epoch, positions)


@dataclass(frozen=True, slots=True)
class SequentialOrder:
    """Manifest order, the same in every epoch."""

    length: int

    def samples(self, epoch: int | IntArray, positions: IntArray) -> IntArray:  # noqa: ARG002
        """Position p holds sample p."""
        return np.asarray(positions, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class FullOrder:
    """A permutation of all samples, another in every epoch."""

    length: int
    seed: int

    def samples(self, epoch: int | IntArray, positions: IntArray) -> IntArray:
        """Position p holds sample permute(p)."""
        epochs, which = _distinct(epoch)
        keys = np.array([key_of(self.seed, _FULL, number) for number in epochs], np.uint64)
        return permute(positions, self.length, keys[which])


@dataclass(frozen=True, slots=True)
class _Lanes:
    """One value for each lane in each of some epochs, int64 [epochs * lanes] (uint64 for keys)."""

    length: IntArray  # samples in the lane
    rest: IntArray  # samples in its rest piece; 0 when there is none
    rest_start: IntArray  # where its rest piece begins in the rest of the data set
    rest_rank: IntArray  # at which place the shuffled pieces hold the rest piece
    piece_key: npt.NDArray[np.uint64]
    mix_key: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class BlockOrder:
    """Blocks dealt to lanes by the seed; pieces shuffled and windows mixed by seed and epoch."""

    length: int
    seed: int
    lanes: int
    block: int
    window: int

    def samples(self, epoch: int | IntArray, positions: IntArray) -> IntArray:
        """Position p is step p // lanes of lane p % lanes."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, which = _distinct(epoch)
        if len(epochs) == 1:
            return self._samples(epochs, which, positions)
        samples = np.empty_like(positions)
        at_once = max(1, _EPOCH_LANES // self.lanes)
        for first in range(0, len(epochs), at_once):
            here = np.flatnonzero((which >= first) & (which < first + at_once))
            samples[here] = self._samples(
                epochs[first : first + at_once], which[here] - first, positions[here]
            )
        return samples

    def _samples(self, epochs: Sequence[int], which: IntArray, positions: IntArray) -> IntArray:
        """The samples at `positions`, each in epoch ``epochs[which]``."""
        step, lane = np.divmod(positions, self.lanes)
        lanes, column = self._lanes(epochs), which * self.lanes + lane
        piece, within = self._piece(self._mix(step, column, lanes), column, lanes)
        return self._sample(piece, within, lane, lanes.rest_start[column])

    @property
    def _whole(self) -> int:
        """Whole blocks in each lane."""
        return self.length // self.block // self.lanes

    def _lanes(self, epochs: Sequence[int]) -> _Lanes:
        lane = np.arange(self.lanes, dtype=np.int64)
        share, more = divmod(self.length - self.lanes * self._whole * self.block, self.lanes)
        rest = np.tile(share + (lane < more), len(epochs))
        piece_key = np.concatenate([keys_of(key_of(self.seed, _PIECES, epoch), lane) for epoch in epochs])
        # a lane without a rest piece looks for it behind its last block, where nothing is
        rest_rank = unpermute(np.full_like(rest, self._whole), self._whole + 1, piece_key)
        return _Lanes(
            length=self._whole * self.block + rest,
            rest=rest,
            rest_start=np.tile(lane * share + np.minimum(lane, more), len(epochs)),
            rest_rank=np.where(rest > 0, rest_rank, self._whole),
            piece_key=piece_key,
            mix_key=np.concatenate([keys_of(key_of(self.seed, _MIX, epoch), lane) for epoch in epochs]),
        )

    def _mix(self, step: IntArray, column: IntArray, lanes: _Lanes) -> IntArray:
        """Steps after mixing, each inside its window."""
        size = self.window * self.block
        rest_window = lanes.rest_rank // self.window
        # the window of the rest piece is shorter by what the piece lacks, and all later ones begin earlier
        lacking = self.block - lanes.rest
        rest_window_end = ((rest_window + 1) * size - lacking)[column]
        later = step >= rest_window_end
        window = np.where(later, rest_window[column] + 1 + (step - rest_window_end) // size, step // size)
        begin = window * size - np.where(later, lacking[column], 0)
        end = (window + 1) * size - np.where(window >= rest_window[column], lacking[column], 0)
        count = np.minimum(end, lanes.length[column]) - begin
        return begin + permute(step - begin, count, keys_of(lanes.mix_key[column], window))

    def _piece(self, step: IntArray, column: IntArray, lanes: _Lanes) -> tuple[IntArray, IntArray]:
        """The piece a mixed step falls into, as dealt (the rest piece is number `_whole`), and the place inside it."""
        rest_rank = lanes.rest_rank[column]
        rest_begin = rest_rank * self.block
        beyond = step - rest_begin - lanes.rest[column]
        after = beyond >= 0
        rank, within = np.divmod(np.where(after, beyond, step), self.block)
        in_rest = (step >= rest_begin) & ~after
        rank = np.where(in_rest, rest_rank, rank + np.where(after, rest_rank + 1, 0))
        within = np.where(in_rest, step - rest_begin, within)
        pieces = self._whole + (lanes.rest > 0)
        return permute(rank, pieces[column], lanes.piece_key[column]), within

    def _sample(self, piece: IntArray, within: IntArray, lane: IntArray, rest_start: IntArray) -> IntArray:
        in_rest = piece == self._whole
        slot, offset = np.divmod(rest_start + within, self.block)
        slot = np.where(in_rest, self.lanes * self._whole + slot, lane * self._whole + piece)
        offset = np.where(in_rest, offset, within)
        blocks = self.length // self.block
        if blocks:
            dealt = permute(np.minimum(slot, blocks - 1), blocks, key_of(self.seed, _DEAL))
            slot = np.where(slot < blocks, dealt, slot)  # the tail, shorter than a block, stays where it is
        return slot * self.block + offset


def _distinct(epoch: int | IntArray) -> tuple[list[int], IntArray]:
    """The epochs that there are, ascending, and which of them is each's, int64 [n] or [1]."""
    numbers = np.atleast_1d(np.asarray(epoch, np.int64))
    if (numbers == numbers[:1]).all():
        return numbers[:1].tolist() or [0], np.zeros(1, np.int64)
    epochs, which = np.unique(numbers, return_inverse=True)
    return epochs.tolist(), which
