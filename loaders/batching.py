"""Which positions of an epoch make a batch, and which rank builds it: pure integer arithmetic.

    length = 11, global_batch_size = 4, world_size = 2, start = 0        position p belongs to rank p % 2

              batch 0        batch 1        batch 2 (short)
    rank 0:   0  2           4  6           8  10
    rank 1:   1  3           5  7           9  filler

A global batch is a range of positions, so what it holds does not depend on the world size, which only splits it. A short last batch is
spread evenly and filled up to the same size on every rank, or left out with `drop_last`.

That is `PlainBatches`. Batches that are grouped, packed or made for a budget are planned a window at a time: `loaders.window_batches`. Both are a
`Batching`, which `make_batching` picks.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from loaders.arguments import integer
from shardify.errors import UsageError

IntArray: TypeAlias = npt.NDArray[np.int64]
GroupBy: TypeAlias = Literal["length", "modality", "modality_length"]

FILLER = -1
"""Stands in for a position where a rank has none."""

DEFAULT_PLAN_WINDOW = 16384

_PLANNED = (
    1 << 15
)  # positions of a rank evaluated at a time: large enough for numpy, small enough to begin at once


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in an epoch: what a state keeps, equal on all ranks.

    Attributes:
        position: items consumed in this epoch: samples, or packs with `pack_tokens`, or micro-batches with a budget.
        start: the position at which this run took up the epoch.
        window: for windowed plans, the window of positions the cursor is in.
        offset: for packs without groups and budget, those of that window already consumed.
        legs: for groups and budgets, what was consumed of that window, in order: (global batch size, batches) with groups, (samples in a
            micro-batch at most or 0, micro-batches) with a budget, and (the same, world size, steps) with both.
    """

    position: int
    start: int = 0
    window: int = 0
    offset: int = 0
    legs: tuple[tuple[int, ...], ...] = ()

    def to_state(self) -> dict[str, Any]:
        """Its fields, JSON-able."""
        return {**asdict(self), "legs": [list(leg) for leg in self.legs]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Cursor":
        """The cursor whose fields a state holds, among others or alone."""
        return cls(
            position=int(state["position"]),
            start=int(state["start"]),
            window=int(state["window"]),
            offset=int(state["offset"]),
            legs=tuple(tuple(int(number) for number in leg) for leg in state["legs"]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """A batch of one rank as planned: S samples in B rows.

    Attributes:
        positions: int64 [S], in the epoch; a row without a sample holds one `FILLER`.
        rows: int64 [S], the row each is in: 0 to B - 1, ascending.
        samples: of all ranks, in the global batch.
        after: the cursor after this batch, equal on all ranks.
        last: of the epoch.
    """

    positions: IntArray
    rows: IntArray
    samples: int
    after: Cursor
    last: bool


@dataclass(frozen=True, slots=True)
class EpochView:
    """What a plan sees of an epoch.

    Attributes:
        length: positions in it.
        measure: for int64 [n] positions, two arrays int64 [n]: lengths, in words or tokens, and images, 0 for text alone. With
            `max_tiles`, which bounds their sum, images count as the tiles they are cut into. A pure function.
        key: 64 bits, of (seed, epoch), for the order of batches in a window.
    """

    length: int
    measure: Callable[[IntArray], tuple[IntArray, IntArray]]
    key: int


class Batching(Protocol):
    """A plan of batches: every position of an epoch in one batch of one rank, and as many batches on every rank."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must keep, JSON-able. Batch size, world size and `drop_last` may change at any cursor."""
        ...

    def batches(self, epoch: EpochView, cursor: Cursor) -> Iterator[Positions]:
        """This rank's batches from `cursor` to the end of the epoch."""
        ...

    def count(self, epoch: EpochView, cursor: Cursor) -> int:
        """Batches left at `cursor`, the same on every rank."""
        ...

    def consumed(self, epoch: EpochView, cursor: Cursor) -> tuple[int, IntArray]:
        """Which positions are consumed at a cursor: all up to one, and int64 [n], ascending, others beyond it."""
        ...

    def take_up(self, cursor: Cursor) -> Cursor:
        """A loaded cursor as the start of this run."""
        ...

    def of_rank(self, rank: int) -> "Batching":
        """The same plan on another rank of the same world."""
        ...


def make_batching(
    *,
    global_batch_size: int | None,
    rank: int,
    world_size: int,
    drop_last: bool = False,
    group_by: GroupBy | None = None,
    pack_tokens: int | None = None,
    max_tokens: int | None = None,
    max_tiles: int | None = None,
    plan_window: int = DEFAULT_PLAN_WINDOW,
) -> Batching:
    """The batching these settings describe; docs/order.md tells what each does.

    Args:
        global_batch_size: rows over all ranks, a multiple of `world_size`; rows are samples, or packs. With a budget, the share of a rank
            bounds its rows, and None leaves them to the budget.
        rank: 0 <= rank < world_size.
        world_size: ranks.
        drop_last: leave out short batches, instead of filling them up. Default False.
        group_by: ``"modality"``: images, or text alone, in a global batch; ``"length"``: lengths alike in a global batch and balanced over
            its ranks; ``"modality_length"``: both. None (default) for neither.
        pack_tokens: pack samples into rows of at most so many tokens. None (default) for a sample a row.
        max_tokens: budget: rows x longest row of a rank's batch at most. None (default) for no budget.
        max_tiles: budget: images of a rank's batch, as measured, at most. None (default) for no budget.
        plan_window: positions planned together when any of the four above is given. Default 16,384.

    Raises:
        UsageError: arguments out of their bounds, or that contradict each other.
    """
    _check_split(global_batch_size, rank, world_size)
    for name, value in (("pack_tokens", pack_tokens), ("max_tokens", max_tokens), ("max_tiles", max_tiles)):
        if value is not None:
            integer(name, value, least=1)
    integer("plan_window", plan_window, least=1, most=1 << 30)
    if group_by not in (None, *get_args(GroupBy)):
        raise UsageError(f"group_by={group_by!r}: 'length', 'modality', 'modality_length' or None is needed")
    budget = max_tokens is not None or max_tiles is not None
    if global_batch_size is None and not budget:
        raise UsageError("a batch size is needed, or a budget: max_tokens or max_tiles")
    if group_by is None and pack_tokens is None and not budget:
        assert global_batch_size is not None
        return PlainBatches(
            global_batch_size=global_batch_size, rank=rank, world_size=world_size, drop_last=drop_last
        )
    if pack_tokens is not None and max_tokens is not None and max_tokens < pack_tokens:
        raise UsageError(
            f"max_tokens={max_tokens} with pack_tokens={pack_tokens}: a batch holds one pack at least, so give at least {pack_tokens}"
        )
    least = world_size if budget else global_batch_size
    if group_by is not None and pack_tokens is None and least is not None and plan_window < least:
        raise UsageError(
            f"plan_window={plan_window}: no batch would be full; at least {least} is needed, 16 times that is better"
        )
    from loaders.window_batches import WindowBatches
    from loaders.windows import WindowPlan

    plan = WindowPlan(group_by, pack_tokens, max_tokens, max_tiles, plan_window)
    return WindowBatches(plan, global_batch_size, rank, world_size, drop_last)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainBatches:
    """Batches of consecutive positions.

    Attributes:
        global_batch_size: samples in a batch over all ranks, a multiple of `world_size`.
        rank: 0 <= rank < world_size.
        world_size: ranks.
        drop_last: leave out a short last batch. Default False.
    """

    global_batch_size: int
    rank: int
    world_size: int
    drop_last: bool = False

    def __post_init__(self) -> None:
        _check_split(self.global_batch_size, self.rank, self.world_size)

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing to keep; the names are those of a windowed plan, so that a difference can be named."""
        return settings_of(group_by=None, pack_tokens=None, max_tokens=None, max_tiles=None, plan_window=None)

    def take_up(self, cursor: Cursor) -> Cursor:
        """Batches begin at the cursor's position."""
        return replace(cursor, start=cursor.position)

    def of_rank(self, rank: int) -> "PlainBatches":
        """These batches on another rank."""
        return replace(self, rank=rank)

    def consumed(self, epoch: EpochView, cursor: Cursor) -> tuple[int, IntArray]:  # noqa: ARG002
        """All positions before the cursor's."""
        return cursor.position, np.zeros(0, np.int64)

    def count(self, epoch: EpochView, cursor: Cursor) -> int:
        """Batches from the cursor's position on, in O(1)."""
        return batches_of(max(epoch.length - cursor.position, 0), self.global_batch_size, self.drop_last)

    def batches(self, epoch: EpochView, cursor: Cursor) -> Iterator[Positions]:
        """A batch takes the next `global_batch_size` positions, this rank those with p % world_size == rank.

        B = global_batch_size / world_size, or in a short last batch what remains divided by the world size and rounded up.
        """
        size, step, start = self.global_batch_size, self.world_size, cursor.start
        share = size // step
        begin, left = cursor.position, self.count(epoch, cursor)
        whole = min(left, max(epoch.length - begin, 0) // size)
        at_once = max(1, _PLANNED // share)
        end_of_epoch = Cursor(epoch.length, start)
        for first in range(0, whole, at_once):
            number = min(at_once, whole - first)
            own = begin + (self.rank - begin) % step + step * np.arange(number * share, dtype=np.int64)
            begin += number * size
            after = begin - (number - 1) * size
            rows = np.tile(np.arange(share, dtype=np.int64), (number, 1))
            for positions, in_rows in zip(own.reshape(number, share), rows, strict=True):
                left -= 1
                yield Positions(
                    positions,
                    in_rows,
                    size,
                    Cursor(after, start) if left else end_of_epoch,
                    last=not left,
                )
                after += size
        if left:
            own = np.arange(begin + (self.rank - begin) % step, epoch.length, step, dtype=np.int64)
            positions = np.full(-(-(epoch.length - begin) // step), FILLER, dtype=np.int64)
            positions[: len(own)] = own
            rows = np.arange(len(positions), dtype=np.int64)
            yield Positions(positions, rows, epoch.length - begin, end_of_epoch, last=True)


def batches_of(items: int, size: int, drop_last: bool) -> int:
    """Batches of `size` that `items` make, a short one counted unless it is dropped."""
    return items // size if drop_last else -(-items // size)


def settings_of(
    *,
    group_by: GroupBy | None,
    pack_tokens: int | None,
    max_tokens: int | None,
    max_tiles: int | None,
    plan_window: int | None,
) -> dict[str, Any]:
    """What of a batching a resumed run must keep; None where it plays no part."""
    return {
        "group_by": group_by,
        "pack_tokens": pack_tokens,
        "max_tokens": max_tokens,
        "max_tiles": max_tiles,
        "plan_window": plan_window,
    }


def _check_split(global_batch_size: int | None, rank: int, world_size: int) -> None:
    integer("world_size", world_size)
    if world_size < 1 or not 0 <= integer("rank", rank) < world_size:
        raise UsageError(f"rank={rank}, world_size={world_size}: 0 <= rank < world_size is needed")
    if global_batch_size is None:
        return
    integer("global_batch_size", global_batch_size)
    if global_batch_size < 1 or global_batch_size % world_size:
        raise UsageError(
            f"global_batch_size={global_batch_size} with world_size={world_size}: a positive multiple of the world size is needed"
        )
