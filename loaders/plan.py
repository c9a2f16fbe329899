"""The planned batches of a run: from a state on, epoch after epoch. No data is read.

A planner joins what the other planning modules know: which sample stands at a position (`loaders.order`, `loaders.mixture`), which
positions make a batch (`loaders.batching`, `loaders.windows`), and where the samples lie (`loaders.dataset`). The loader executes its
batches; `loaders.explain` only looks at them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from loaders.batching import FILLER, Batching, Cursor, EpochView, IntArray, Positions
from loaders.course import Course, TakenUp
from loaders.dataset import Dataset, Rows
from loaders.order import EpochOrder
from loaders.state import State, with_cursor
from shardify.errors import StateError
from shardify.permute import key_of

_FIRST_CHUNK = 1 << 11  # positions looked up together: few at first, so that work begins at once,
_LAST_CHUNK = 1 << 15  # then as many as numpy likes
_BATCH_KEY = 4  # what a key is for; orders use the numbers before

Measure = Callable[[IntArray], tuple[IntArray, IntArray]]
"""Flat sample numbers, int64 [n], to lengths and image counts, int64 [n] both."""


@dataclass(frozen=True, slots=True, eq=False)
class PlannedBatch:
    """One batch of one rank.

    Attributes:
        step: its number since the run began, those that were skipped included.
        epoch: it belongs to.
        positions: int64 [S], of its samples in the epoch; -1 stands for none.
        rows: int64 [S], the row of each.
        samples: int64 [V], flat numbers of the V samples that are no fillers, in the order of `positions`.
        index: where they lie, V rows.
        state: after it, equal on all ranks.
    """

    step: int
    epoch: int
    positions: IntArray
    rows: IntArray
    samples: IntArray
    index: Rows
    state: State


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans batches from any state on.

    Attributes:
        dataset: the samples.
        course: the order of each epoch.
        batching: cuts it into batches of this rank.
        measure: lengths and image counts, for batches that depend on them.
        seed: of the run.
        skip: steps that are left out, as ascending, disjoint (from, to) pairs, `to` excluded.
    """

    dataset: Dataset
    course: Course
    batching: Batching
    measure: Measure
    seed: int
    skip: Sequence[tuple[int, int]] = field(default=())

    def count(self, state: State) -> int:
        """Batches left in the epoch, the same on every rank."""
        planned = self.batching.count(self.view(state), Cursor.from_state(state))
        begin, end = state["step"], state["step"] + planned
        skipped: int = sum(max(0, min(to, end) - max(start, begin)) for start, to in self.skip)
        return planned - skipped

    def is_over(self, state: State) -> bool:
        """Whether no batch is left in the epoch: what `count` would say, for which a windowed plan needs the rest of the epoch."""
        return next(self._handed_out(state), None) is None

    def batches(self, state: State) -> Iterator[PlannedBatch]:
        """The batches after `state`, over the ends of epochs; none when an epoch has no batch at all."""
        empty = 0
        while empty < 2:  # a data set may have grown since the epoch began
            empty += 1
            state = self.without_skipped(state)
            for batch in self._located(state, self._handed_out(state)):
                empty = 0
                state = batch.state
                yield batch
            if empty:
                state = self.next_epoch(state)

    def without_skipped(self, state: State) -> State:
        """The state at which the next batch is one that is handed out, and `state` itself where that is so."""
        reached, empty = state, 0
        while self._skips(reached["step"]) and empty < 2:
            empty += 1
            for _, after in self.steps(state):
                reached, empty = after, 0
                if not self._skips(after["step"]):
                    break
            state = self.next_epoch(state) if empty else reached
        return reached

    def take_up(self, state: State) -> TakenUp:
        """How the epochs go on from a state, which may be of fewer shards or of another mixture.

        Raises:
            StateError: it is of other data, with what differs.
        """
        number, parts, fingerprint = state["epoch"], state["parts"], state["fingerprint"]
        cursor = Cursor.from_state(state)
        order = self.course.as_planned(number, parts, fingerprint)
        position, also = self.batching.consumed(self._view_of(order, number), cursor)
        if position > order.length:
            raise StateError(f"not a state of {order.length} positions: position {position}")
        return self.course.take_up(number, parts, position, fingerprint, also)

    def next_epoch(self, state: State) -> State:
        """The state at the beginning of the next epoch."""
        number = state["epoch"]
        parts = self.course.parts_after(number, state["parts"], self.order(state).length)
        return with_cursor({**state, "epoch": number + 1, "parts": parts}, Cursor(0))

    def _handed_out(self, state: State) -> Iterator[tuple[Positions, int, State]]:
        """The batches left in an epoch that are not skipped, each with its number and the state after it and what is skipped behind it."""
        for positions, after in self.steps(state):
            number = after["step"] - 1
            if not self._skips(number):
                yield positions, number, self.without_skipped(after)

    def steps(self, state: State) -> Iterator[tuple[Positions, State]]:
        """All batches left in a state's epoch, those to be skipped too, each with the state after it."""
        step, samples = state["step"], state["samples"]
        ended = None
        for positions in self.batching.batches(self.view(state), Cursor.from_state(state)):
            step, samples = step + 1, samples + positions.samples
            counted = {**state, "step": step, "samples": samples}
            if positions.last:
                ended = ended or self.next_epoch(state)
                after = {**ended, "step": step, "samples": samples}
            else:
                after = with_cursor(counted, positions.after)
            yield positions, after

    def _skips(self, step: int) -> bool:
        return any(start <= step < to for start, to in self.skip)

    def _located(self, state: State, steps: Iterator[tuple[Positions, int, State]]) -> Iterator[PlannedBatch]:
        """Steps with where their samples lie, looked up for many together."""
        order, epoch = self.order(state), int(state["epoch"])
        size = _FIRST_CHUNK
        while chunk := list(_of_size(steps, size)):
            size = min(2 * size, _LAST_CHUNK)
            positions = np.concatenate([step.positions for step, _, _ in chunk])
            samples = order.samples(positions[positions != FILLER])
            index = self.dataset.rows(samples)
            end = 0
            for step, number, after in chunk:
                begin, end = end, end + int(np.count_nonzero(step.positions != FILLER))
                cut = slice(begin, end)
                yield PlannedBatch(
                    step=number,
                    epoch=epoch,
                    positions=step.positions,
                    rows=step.rows,
                    samples=samples[cut],
                    index=index[cut],
                    state=after,
                )

    def order(self, state: Mapping[str, Any]) -> EpochOrder:
        """The order of a state's epoch."""
        return self.course.epoch(state["epoch"], state["parts"])

    def view(self, state: State) -> EpochView:
        """A state's epoch as its batching sees it."""
        return self._view_of(self.order(state), state["epoch"])

    def _view_of(self, order: EpochOrder, epoch: int) -> EpochView:
        return EpochView(
            length=order.length,
            measure=partial(_measure, self.measure, order),
            key=key_of(self.seed, _BATCH_KEY, epoch),
        )


def _measure(measure: Measure, order: EpochOrder, positions: IntArray) -> tuple[IntArray, IntArray]:
    samples = order.samples(positions)
    if len(samples) and samples.min() < 0:
        raise StateError(
            "this state does not continue here: a part of the mixture is gone while batches that were grouped or packed with it are"
            " left; put it back, with a small repeat, until this epoch has ended"
        )
    return measure(samples)


def _of_size(
    steps: Iterator[tuple[Positions, int, State]], positions: int
) -> Iterator[tuple[Positions, int, State]]:
    """Steps until so many positions are together, one at least."""
    for step in steps:
        yield step
        positions -= len(step[0].positions)
        if positions <= 0:
            return
