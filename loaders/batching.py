"""Which positions make a batch, and which rank builds it: pure integer arithmetic.

    length = 11, global_batch_size = 4, world_size = 2, start = 0        position p belongs to rank p % 2

              batch 0        batch 1        batch 2 (short)
    rank 0:   0  2           4  6           8  10
    rank 1:   1  3           5  7           9  filler

A global batch is a range of positions, so what it holds does not depend on the world size, which only splits it. A short last batch is
spread evenly and filled up to the same size on every rank, or left out with `drop_last`.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardify.errors import UsageError

IntArray: TypeAlias = npt.NDArray[np.int64]

FILLER = -1
"""Stands in for a position where a rank has none."""


@dataclass(frozen=True, slots=True)
class PlainBatches:
    """Batches of consecutive positions.

    Attributes:
        length: positions in an epoch.
        global_batch_size: samples in a batch over all ranks, a multiple of `world_size`.
        rank: 0 <= rank < world_size.
        world_size: ranks.
        drop_last: leave out a short last batch.
    """

    length: int
    global_batch_size: int
    rank: int
    world_size: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"rank={self.rank}, world_size={self.world_size}: 0 <= rank < world_size is needed"
            )
        if self.global_batch_size < 1 or self.global_batch_size % self.world_size:
            raise UsageError(
                f"global_batch_size={self.global_batch_size} with world_size={self.world_size}: a positive multiple of the world size is needed"
            )

    def count(self, start: int) -> int:
        """Batches in an epoch that is taken up at position `start`, the same on every rank."""
        rest = max(self.length - start, 0)
        return rest // self.global_batch_size if self.drop_last else -(-rest // self.global_batch_size)

    def positions(self, start: int, number: int) -> IntArray:
        """This rank's positions of batch `number`, counted from `start`.

        Returns:
            int64 [S], ascending, fillers (-1) last; S is global_batch_size / world_size, or, in a short last batch, what remains divided
            by the world size and rounded up: equal on all ranks.
        """
        begin = start + number * self.global_batch_size
        end = min(begin + self.global_batch_size, self.length)
        own = np.arange(begin + (self.rank - begin) % self.world_size, end, self.world_size, dtype=np.int64)
        size = -(-(end - begin) // self.world_size)
        if len(own) == size:
            return own
        return np.concatenate((own, np.full(size - len(own), FILLER, dtype=np.int64)))

    def after(self, start: int, number: int) -> int:
        """The position that follows batch `number`: the end of the epoch after its last batch, dropped samples included."""
        if number + 1 >= self.count(start):
            return self.length
        return start + (number + 1) * self.global_batch_size
