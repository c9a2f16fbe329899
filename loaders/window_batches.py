"""`WindowBatches`: the batches of grouped, packed and budgeted plans, from any cursor on.

A cursor names its window and its *legs*: how many units were consumed of the window, under which size. When a run takes up a window under
another size, what the legs left is arranged anew: so any chain of sizes consumes every item once. Short units come last, so that a window
has one for each modality at most, whatever the chain.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loaders.batching import FILLER, Cursor, EpochView, IntArray, Positions, batches_of, settings_of
from loaders.windows import KINDS, Legs, Ragged, Rows, Units, WindowPlan, check_consumed
from shardify.errors import StateError

_EPOCHS_COUNTED = 4


@dataclass(frozen=True, slots=True)
class _Strip:
    """Consecutive items of one rank: samples in rows in items."""

    positions: IntArray  # [samples]
    row_sizes: IntArray  # [rows], samples in each
    item_sizes: IntArray  # [items], rows in each

    @classmethod
    def of(cls, rows: Rows, items: Ragged, chosen: IntArray) -> "_Strip":
        """Items of a window; item -1 is one row of one filler."""
        values, item_sizes = items.of_lists(chosen)
        positions, row_sizes = rows.samples.of_lists(values)
        return cls(positions, row_sizes, item_sizes)

    def then(self, other: "_Strip") -> "_Strip":
        """This and what follows."""
        return _Strip(
            np.concatenate((self.positions, other.positions)),
            np.concatenate((self.row_sizes, other.row_sizes)),
            np.concatenate((self.item_sizes, other.item_sizes)),
        )

    def cut(self, items: int) -> tuple["_Strip", "_Strip"]:
        """The first items, and the others."""
        rows = int(self.item_sizes[:items].sum())
        samples = int(self.row_sizes[:rows].sum())
        return (
            _Strip(self.positions[:samples], self.row_sizes[:rows], self.item_sizes[:items]),
            _Strip(self.positions[samples:], self.row_sizes[rows:], self.item_sizes[items:]),
        )

    def batches(self, shares: Sequence[int]) -> Iterator[tuple[IntArray, IntArray]]:
        """Positions and rows of batches; `shares` are the items of each, all of them together."""
        if not shares:
            return
        row_ends = np.cumsum(self.item_sizes)[np.cumsum(shares) - 1]
        row_begins = np.append(0, row_ends[:-1])
        in_batch = np.arange(len(self.row_sizes)) - np.repeat(row_begins, row_ends - row_begins)
        rows = np.repeat(in_batch, self.row_sizes)
        begin = 0
        for end in np.cumsum(self.row_sizes)[row_ends - 1].tolist():
            yield self.positions[begin:end], rows[begin:end]
            begin = end


def _fillers(items: int) -> _Strip:
    ones = np.ones(items, dtype=np.int64)
    return _Strip(ones * FILLER, ones, ones)


@dataclass(slots=True)
class _Memory:
    """What need not be computed twice, by the key and length of an epoch."""

    window: tuple[tuple[int, int], int] | None = None  # the one whose rows are kept
    rows: Rows | None = None
    counts: dict[tuple[int, int], IntArray] = field(
        default_factory=dict
    )  # [windows, kinds] items, -1: unknown
    left: tuple[tuple[Any, ...], IntArray] | None = None  # [kinds] items, after legs under other sizes
    arranged: tuple[tuple[Any, ...], Units] | None = None  # the window's

    def clear(self) -> None:
        self.window = self.rows = self.left = self.arranged = None
        self.counts.clear()


@dataclass(frozen=True, slots=True)
class WindowBatches:
    """Batches of groups, packs and budgets.

    The key of an epoch stands for it: from one `take_up` to the next, views of the same key and length must measure the same.

    Attributes:
        plan: of windows.
        global_batch_size: rows in a batch over all ranks, a multiple of `world_size`; with a budget the most, or None for any number.
        rank: 0 <= rank < world_size.
        world_size: ranks.
        drop_last: leave out short batches: of each window with groups, else of the epoch. Default False.
    """

    plan: WindowPlan
    global_batch_size: int | None
    rank: int
    world_size: int
    drop_last: bool = False
    _memory: _Memory = field(default_factory=_Memory, init=False, repr=False, compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must keep, JSON-able."""
        return settings_of(
            group_by=self.plan.group_by,
            pack_tokens=self.plan.pack_tokens,
            max_tokens=self.plan.max_tokens,
            max_tiles=self.plan.max_tiles,
            plan_window=self.plan.plan_window,
        )

    def take_up(self, cursor: Cursor) -> Cursor:
        """The cursor as the start of this run; forgets what was computed before."""
        self._memory.clear()
        return replace(cursor, start=cursor.position)

    def of_rank(self, rank: int) -> "WindowBatches":
        """These batches on another rank; what was computed of windows is shared."""
        other = replace(self, rank=rank)
        object.__setattr__(other, "_memory", self._memory)
        return other

    def consumed(self, epoch: EpochView, cursor: Cursor) -> tuple[int, IntArray]:
        """All positions of the windows before the cursor's, and what was taken of that one.

        Raises:
            StateError: a cursor of other data or settings.
        """
        if cursor.window >= self.plan.windows(epoch):
            return epoch.length, np.zeros(0, np.int64)
        earlier, done = self._legs(cursor)
        rows, units = self._arranged(epoch, cursor.window, earlier, done)
        left, _ = units.rows.of_lists(units.items(done, len(units)))
        taken = np.setdiff1d(np.arange(len(rows.samples), dtype=np.int64), left, assume_unique=True)
        return cursor.window * self.plan.plan_window, np.sort(rows.samples.of_lists(taken)[0])

    def count(self, epoch: EpochView, cursor: Cursor) -> int:
        """Batches left. The first call plans what is left of the epoch, and keeps two integers a window.

        Raises:
            StateError: a cursor of other data or settings.
        """
        if cursor.window >= self.plan.windows(epoch):
            return 0
        earlier, done = self._legs(cursor)
        items = np.vstack(
            (self._items_left(epoch, cursor.window, earlier), self._items_from(epoch, cursor.window + 1))
        )
        if self.plan.group_by is None:
            return batches_of(int(items.sum()) - done, self._batch_items, self.drop_last)
        units = (items if self.drop_last else items + self._batch_items - 1) // self._batch_items
        # a run that kept short units may have consumed more of the window than one that drops them has in it
        return max(int(units[0].sum()) - done, 0) + int(units[1:].sum())

    def batches(self, epoch: EpochView, cursor: Cursor) -> Iterator[Positions]:
        """This rank's batches from the cursor to the end of the epoch.

        B is equal on all ranks, except under a budget: there it is what the budget gave this rank.

        Raises:
            StateError: a cursor of other data or settings.
        """
        grouped = self.plan.group_by is not None
        return _ended(self._groups(epoch, cursor) if grouped else self._stream(epoch, cursor))

    @property
    def _batch_items(self) -> int:
        """Items in a batch over all ranks: rows, or a micro-batch for each rank."""
        if self.plan.budget:
            return self.world_size
        assert self.global_batch_size is not None
        return self.global_batch_size

    @property
    def _size(self) -> tuple[int, ...]:
        return self.plan.size(self.global_batch_size, self.world_size)

    def _stream(self, epoch: EpochView, cursor: Cursor) -> Generator[Positions, None, Cursor]:
        """Batches of consecutive items over all windows; item p of the epoch belongs to rank p % world_size."""
        share = self._batch_items // self.world_size
        earlier, done = self._legs(cursor)
        begin = position = cursor.position  # of the next batch, and of the next item to plan
        strip, sizes = (
            _fillers(0),
            np.zeros(0, np.int64),
        )  # of items that are in no batch yet, those of other ranks among the sizes
        windows = self.plan.windows(epoch)
        for window in range(cursor.window, windows):
            rows, units = self._arranged(epoch, window, earlier, done)
            own = units.full[done:, 0][(self.rank - position) % self.world_size :: self.world_size]
            strip = strip.then(_Strip.of(rows, units.rows, own))
            first = position - done  # item of this arrangement
            position = first + len(units)
            whole = (position - begin) // self._batch_items
            ready, strip = strip.cut(whole * share)
            sizes = np.concatenate((sizes, rows.sizes(units.rows, units.full[done:, 0])))
            in_batches = (
                sizes[: whole * self._batch_items].reshape(whole, self._batch_items).sum(axis=1).tolist()
            )
            sizes = sizes[whole * self._batch_items :]
            for count, (samples, in_rows) in zip(in_batches, ready.batches([share] * whole), strict=True):
                begin += self._batch_items
                after = (
                    self._cursor(begin, cursor.start, window, earlier, begin - first)
                    if begin < position
                    else Cursor(begin, cursor.start, window + 1)
                )
                yield Positions(samples, in_rows, count, after, last=False)
            earlier, done = (), 0
        end = Cursor(position, cursor.start, windows)
        if position > begin and not self.drop_last:
            share = -(-(position - begin) // self.world_size)
            strip = strip.then(_fillers(share - len(strip.item_sizes)))
            for samples, in_rows in strip.batches([share]):
                yield Positions(samples, in_rows, int(sizes.sum()), end, last=False)
        return end

    def _groups(self, epoch: EpochView, cursor: Cursor) -> Generator[Positions, None, Cursor]:
        """Batches that are units of a window."""
        earlier, done = self._legs(cursor)
        position = cursor.position
        windows = self.plan.windows(epoch)
        for window in range(cursor.window, windows):
            rows, units = self._arranged(epoch, window, earlier, done)
            end = position + len(units.items(done, len(units)))
            if self.drop_last:
                units = replace(units, short=())
            full, short = units.full[done:], units.short[max(done - len(units.full), 0) :]
            own = [self._share(full), *(self._share(_filled_up(unit, self.world_size)) for unit in short)]
            strip = _Strip.of(rows, units.rows, np.concatenate([items.reshape(-1) for items in own]))
            sizes = [full.shape[1]] * len(full) + [len(unit) for unit in short]
            counts = np.split(rows.sizes(units.rows, units.items(done, len(units))), np.cumsum(sizes))
            shares = [items.shape[1] for items in own for _ in items]
            for size, count, (samples, in_rows) in zip(sizes, counts, strip.batches(shares), strict=False):
                done += 1
                position += size
                after = (
                    self._cursor(position, cursor.start, window, earlier, done)
                    if done < len(units)
                    else Cursor(end, cursor.start, window + 1)
                )
                yield Positions(samples, in_rows, int(count.sum()), after, last=False)
            earlier, done, position = (), 0, end
        return Cursor(position, cursor.start, windows)

    def _share(self, units: IntArray) -> IntArray:
        """This rank's items; int64 [n, size] to [n, size / world_size].

        By length, where the items of a unit descend, they are dealt to and fro over the ranks: the sums of two ranks differ by no more
        than the longest and the shortest item do.
        """
        turns = np.arange(units.shape[1] // self.world_size, dtype=np.int64)
        back = (turns % 2 == 1) & self.plan.by_length
        own: IntArray = units[
            :, turns * self.world_size + np.where(back, self.world_size - 1 - self.rank, self.rank)
        ]
        return own

    def _legs(self, cursor: Cursor) -> tuple[Legs, int]:
        """The legs under other sizes, and the units consumed after them under this one."""
        size = self._size
        if not size:
            return (), cursor.offset
        least = 0 if self.plan.group_by is None else 1  # of the size of a unit; 0 bounds no micro-batch
        if any(len(leg) != len(size) + 1 or min(leg) < 0 or leg[-2] < least for leg in cursor.legs):
            raise StateError(f"legs {cursor.legs}: not those of a plan with these settings: {self.settings}")
        if cursor.legs and cursor.legs[-1][:-1] == size:
            return cursor.legs[:-1], cursor.legs[-1][-1]
        return cursor.legs, 0

    def _cursor(self, position: int, start: int, window: int, earlier: Legs, units: int) -> Cursor:
        if not self._size:
            return Cursor(position, start, window, offset=units)
        return Cursor(position, start, window, legs=(*earlier, (*self._size, units)))

    def _arranged(self, epoch: EpochView, window: int, earlier: Legs, done: int) -> tuple[Rows, Units]:
        """What earlier legs left of a window, arranged for this run's size."""
        rows = self._rows(epoch, window)
        name = (epoch.key, epoch.length, window, earlier)
        if self._memory.arranged is None or self._memory.arranged[0] != name:
            left = self.plan.left(epoch, window, rows, earlier)
            self._memory.arranged = name, self.plan.arranged(epoch, window, rows, left, self._size)
        units = self._memory.arranged[1]
        check_consumed(done, units, window)
        return rows, units

    def _rows(self, epoch: EpochView, window: int) -> Rows:
        """The rows of a window, kept until those of another one are wanted."""
        name = ((epoch.key, epoch.length), window)
        if self._memory.rows is None or self._memory.window != name:
            self._memory.rows, self._memory.window = self.plan.rows(epoch, window), name
        return self._memory.rows

    def _items_left(self, epoch: EpochView, window: int, earlier: Legs) -> IntArray:
        """Items of each kind that earlier legs left of a window; int64 [kinds]."""
        if not earlier:
            here: IntArray = self._items_from(epoch, window, window + 1)[0]
            return here
        name = (epoch.key, epoch.length, window, earlier)
        if self._memory.left is None or self._memory.left[0] != name:
            rows = self._rows(epoch, window)
            left = self.plan.left(epoch, window, rows, earlier)
            self._memory.left = name, self._count(epoch, window, rows, left)
        return self._memory.left[1]

    def _items_from(self, epoch: EpochView, begin: int, end: int | None = None) -> IntArray:
        """Items of each kind in windows, to the end of the epoch by default; int64 [windows, kinds]."""
        known = self._memory.counts
        name = (epoch.key, epoch.length)
        if name not in known:
            while len(known) >= _EPOCHS_COUNTED:
                del known[next(iter(known))]
            known[name] = np.full((self.plan.windows(epoch), KINDS), -1, dtype=np.int64)
        counts = known[name][begin:end]
        if self.plan.counted_by_position:
            begins = np.arange(begin, begin + len(counts)) * self.plan.plan_window
            counts[:, 0], counts[:, 1] = np.minimum(self.plan.plan_window, epoch.length - begins), 0
        for window in (begin + np.flatnonzero(counts[:, 0] < 0)).tolist():
            rows = self.plan.rows(epoch, window)
            every = np.arange(len(rows.samples), dtype=np.int64)
            counts[window - begin] = self._count(epoch, window, rows, every)
        return counts

    def _count(self, epoch: EpochView, window: int, rows: Rows, left: IntArray) -> IntArray:
        kinds = self.plan.items(epoch, window, rows, left, self._size).kinds
        counts: IntArray = np.bincount(kinds, minlength=KINDS)
        return counts


def _ended(walk: Generator[Positions, None, Cursor]) -> Iterator[Positions]:
    """Batches with the last one marked. Each is held back until the next one shows that it is not the last."""
    held: Positions | None = None
    while True:
        try:
            following = next(walk)
        except StopIteration as stop:
            if held is not None:
                yield replace(held, after=stop.value, last=True)
            return
        if held is not None:
            yield held
        held = following


def _filled_up(unit: IntArray, world_size: int) -> IntArray:
    """A short unit with fillers last, so that ranks share it equally; int64 [1, size]."""
    filled = np.full((1, -(-len(unit) // world_size) * world_size), FILLER, dtype=np.int64)
    filled[0, : len(unit)] = unit
    return filled
