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

# what a key is for, so that no two uses share one
_FULL, _DEAL, _PIECES, _MIX = range(4)


class Order(Protocol):
    """A bijection from the positions of an epoch to samples."""

    @property
    def length(self) -> int:
        """Positions in an epoch, and samples in the data set."""
        ...

    def samples(self, epoch: int, positions: IntArray) -> IntArray:
        """The samples that stand at `positions` in `epoch`; int64 [n], each in [0, length), to int64 [n]."""
        ...


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
class SequentialOrder:
    """Manifest order, the same in every epoch."""

    length: int

    def samples(self, epoch: int, positions: IntArray) -> IntArray:  # noqa: ARG002
        """Position p holds sample p."""
        return np.asarray(positions, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class FullOrder:
    """A permutation of all samples, another in every epoch."""

    length: int
    seed: int

    def samples(self, epoch: int, positions: IntArray) -> IntArray:
        """Position p holds sample permute(p)."""
        return permute(positions, self.length, key_of(self.seed, _FULL, epoch))


@dataclass(frozen=True, slots=True)
class _Lanes:
    """One value for each lane, int64 [lanes] (uint64 for keys)."""

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

    def samples(self, epoch: int, positions: IntArray) -> IntArray:
        """Position p is step p // lanes of lane p % lanes."""
        step, lane = np.divmod(np.asarray(positions, dtype=np.int64), self.lanes)
        lanes = self._lanes(epoch)
        piece, within = self._piece(self._mix(step, lane, lanes), lane, lanes)
        return self._sample(piece, within, lane, lanes)

    @property
    def _whole(self) -> int:
        """Whole blocks in each lane."""
        return self.length // self.block // self.lanes

    def _lanes(self, epoch: int) -> _Lanes:
        lane = np.arange(self.lanes, dtype=np.int64)
        share, more = divmod(self.length - self.lanes * self._whole * self.block, self.lanes)
        rest = share + (lane < more)
        piece_key = keys_of(key_of(self.seed, _PIECES, epoch), lane)
        # a lane without a rest piece looks for it behind its last block, where nothing is
        rest_rank = unpermute(np.full_like(lane, self._whole), self._whole + 1, piece_key)
        return _Lanes(
            length=self._whole * self.block + rest,
            rest=rest,
            rest_start=lane * share + np.minimum(lane, more),
            rest_rank=np.where(rest > 0, rest_rank, self._whole),
            piece_key=piece_key,
            mix_key=keys_of(key_of(self.seed, _MIX, epoch), lane),
        )

    def _mix(self, step: IntArray, lane: IntArray, lanes: _Lanes) -> IntArray:
        """Steps after mixing, each inside its window."""
        size = self.window * self.block
        rest_window = lanes.rest_rank // self.window
        # the window of the rest piece is shorter by what the piece lacks, and all later ones begin earlier
        lacking = self.block - lanes.rest
        rest_window_end = ((rest_window + 1) * size - lacking)[lane]
        later = step >= rest_window_end
        window = np.where(later, rest_window[lane] + 1 + (step - rest_window_end) // size, step // size)
        begin = window * size - np.where(later, lacking[lane], 0)
        end = (window + 1) * size - np.where(window >= rest_window[lane], lacking[lane], 0)
        count = np.minimum(end, lanes.length[lane]) - begin
        return begin + permute(step - begin, count, keys_of(lanes.mix_key[lane], window))

    def _piece(self, step: IntArray, lane: IntArray, lanes: _Lanes) -> tuple[IntArray, IntArray]:
        """The piece a mixed step falls into, as dealt (the rest piece is number `_whole`), and the place inside it."""
        rest_rank = lanes.rest_rank[lane]
        rest_begin = rest_rank * self.block
        beyond = step - rest_begin - lanes.rest[lane]
        after = beyond >= 0
        rank, within = np.divmod(np.where(after, beyond, step), self.block)
        in_rest = (step >= rest_begin) & ~after
        rank = np.where(in_rest, rest_rank, rank + np.where(after, rest_rank + 1, 0))
        within = np.where(in_rest, step - rest_begin, within)
        pieces = self._whole + (lanes.rest > 0)
        return permute(rank, pieces[lane], lanes.piece_key[lane]), within

    def _sample(self, piece: IntArray, within: IntArray, lane: IntArray, lanes: _Lanes) -> IntArray:
        in_rest = piece == self._whole
        slot, offset = np.divmod(lanes.rest_start[lane] + within, self.block)
        slot = np.where(in_rest, self.lanes * self._whole + slot, lane * self._whole + piece)
        offset = np.where(in_rest, offset, within)
        blocks = self.length // self.block
        if blocks:
            dealt = permute(np.minimum(slot, blocks - 1), blocks, key_of(self.seed, _DEAL))
            slot = np.where(slot < blocks, dealt, slot)  # the tail, shorter than a block, stays where it is
        return slot * self.block + offset
