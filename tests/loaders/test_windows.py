"""Grouped, packed and budgeted batches: exact covers through any chain of resumes, equal ranks, one modality, balance, and golden plans."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.batching import FILLER, Cursor, EpochView, make_batching
from loaders.order import ORDER_VERSION
from loaders.packing import best_fit, within_budget
from shardify.errors import StateError

GOLDEN = Path(__file__).parents[1] / "golden" / f"batches_v{ORDER_VERSION}.json"


@dataclass(frozen=True)
class Data:
    """An epoch of known lengths and images."""

    lengths: np.ndarray
    images: np.ndarray
    key: int

    @property
    def view(self):
        return EpochView(len(self.lengths), lambda p: (self.lengths[p], self.images[p]), self.key)

    def widths(self, batch):
        """Tokens in each row; a sample of none counts as one, a filler as none."""
        rows = np.zeros(int(batch.rows[-1]) + 1, np.int64)
        own = batch.positions != FILLER
        np.add.at(rows, batch.rows[own], np.maximum(self.lengths[batch.positions[own]], 1))
        return rows


GROUPS = ("length", "modality", "modality_length")


@st.composite
def data_sets(draw, most=250):
    number = draw(st.integers(0, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    longest = draw(st.sampled_from([0, 1, 7, 60, 300]))
    share = draw(st.sampled_from([0.0, 0.03, 0.5, 1.0]))
    images = (rng.random(number) < share) * rng.integers(1, 5, number)
    return Data(rng.integers(0, longest + 1, number), images, draw(st.integers(0, 2**64 - 1)))


@st.composite
def plans(draw, *, group_by=(None, *GROUPS)):
    plan = {
        "group_by": draw(st.sampled_from(group_by)),
        "pack_tokens": draw(st.sampled_from([None, 1, 50, 130])),
        "max_tokens": draw(st.sampled_from([None, None, 130, 700])),
        "max_tiles": draw(st.sampled_from([None, None, None, 1, 9])),
        "plan_window": draw(st.sampled_from([36, 97, 150, 1000])),
    }
    if not any(plan[name] for name in ("group_by", "pack_tokens", "max_tokens", "max_tiles")):
        plan["pack_tokens"] = 90
    return plan


@dataclass(frozen=True)
class Run:
    """All ranks of a run with one batch size."""

    plan: dict
    world: int
    share: int | None  # rows of a rank
    drop_last: bool = False

    def ranks(self):
        size = None if self.share is None else self.share * self.world
        return [
            make_batching(
                global_batch_size=size,
                rank=rank,
                world_size=self.world,
                drop_last=self.drop_last,
                **self.plan,
            )
            for rank in range(self.world)
        ]

    def batches(self, data, cursor):
        """A list over batches of lists over ranks; what ranks must agree about is checked."""
        ranks = [list(batching.batches(data.view, cursor)) for batching in self.ranks()]
        assert len({len(batches) for batches in ranks}) == 1
        steps = list(zip(*ranks, strict=True))
        for number, step in enumerate(steps):
            assert len({batch.after for batch in step}) == 1
            assert {batch.last for batch in step} == {number == len(steps) - 1}
            for batch in step:
                assert batch.positions.dtype == batch.rows.dtype == np.int64
                assert (np.diff(batch.rows) >= 0).all()
                assert sorted(set(batch.rows.tolist())) == list(range(batch.rows[-1] + 1))
                counts = np.bincount(batch.rows)
                assert (
                    counts[batch.rows[batch.positions == FILLER]] == 1
                ).all()  # a filler is a row of its own
            if not self.budget:
                assert len({batch.rows[-1] for batch in step}) == 1
        return steps

    @property
    def budget(self):
        return self.plan["max_tokens"] is not None or self.plan["max_tiles"] is not None

    @property
    def items(self):
        """In a full batch over all ranks."""
        return self.world if self.budget else self.share * self.world


@st.composite
def runs(draw, plan, *, drop_last=(False,)):
    world = draw(st.integers(1, 9))
    share = draw(st.integers(1, 36 // world))
    budget = plan["max_tokens"] is not None or plan["max_tiles"] is not None
    return Run(
        plan, world, None if budget and draw(st.booleans()) else share, draw(st.sampled_from(drop_last))
    )


def seen(step):
    return [int(p) for batch in step for p in batch.positions if p != FILLER]


def rows_of(step):
    """The rows of a global batch, as sorted tuples of positions, without fillers."""
    rows = [
        tuple(batch.positions[batch.rows == row].tolist())
        for batch in step
        for row in range(batch.rows[-1] + 1)
    ]
    return sorted(row for row in rows if row != (FILLER,))


def items_of(run, step):
    """Items of a global batch: samples, packs or micro-batches."""
    return sum(bool(seen([batch])) for batch in step) if run.budget else len(rows_of(step))


@pytest.mark.long
@settings(max_examples=80)
@given(data=st.data())
def test_a_chain_of_resumes_completes_the_cover(data):
    samples, plan = data.draw(data_sets()), data.draw(plans())
    cursor, got, short = Cursor(0), [], Counter()
    for last in (False, False, False, False, True):
        run = data.draw(runs(plan))
        cursor = run.ranks()[0].take_up(Cursor.from_state(json.loads(json.dumps(cursor.to_state()))))
        steps = run.batches(samples, cursor)
        steps = steps if last else steps[: data.draw(st.integers(0, len(steps)))]
        for step in steps:
            got += seen(step)
            before, cursor = cursor, step[0].after
            items = items_of(run, step)
            assert cursor.position == before.position + items
            if plan["group_by"] and items < run.items:
                windows = {p // plan["plan_window"] for p in seen(step)}
                assert len(windows) == 1
                by_modality = "modality" in plan["group_by"]
                short[windows.pop(), by_modality and bool(samples.images[seen(step)[0]] > 0)] += 1
    assert sorted(got) == list(range(len(samples.lengths)))
    # at most one for each modality and window, whatever the chain; the short steps of a budget depend on how it was cut before
    assert all(number == 1 for number in short.values()) or run.budget


@settings(max_examples=80)
@given(data=st.data())
def test_the_count_is_right_at_every_cursor_and_any_cursor_continues(data):
    samples, plan = data.draw(data_sets(150)), data.draw(plans())
    run = data.draw(runs(plan, drop_last=(False, True)))
    batching, view = run.ranks()[-1], samples.view
    steps = run.batches(samples, Cursor(0))
    assert batching.count(view, Cursor(0)) == len(steps)
    for number, step in enumerate(steps, start=1):
        assert batching.count(view, step[0].after) == len(steps) - number
    if steps:
        number = data.draw(st.integers(0, len(steps) - 1))
        cursor = steps[number][0].after
        again = list(batching.batches(view, batching.take_up(cursor)))
        assert [b.positions.tolist() for b in again] == [
            step[-1].positions.tolist() for step in steps[number + 1 :]
        ]
        other = data.draw(runs(plan, drop_last=(False, True)))
        taken_up = other.ranks()[0]
        assert taken_up.count(view, cursor) == len(other.batches(samples, cursor))
        assert taken_up.count(view, cursor) == taken_up.count(view, cursor)  # remembered


@settings(max_examples=60)
@given(data=st.data())
def test_a_global_batch_is_the_same_for_every_world(data):
    samples, plan = data.draw(data_sets()), data.draw(plans())
    plan = {**plan, "max_tokens": None, "max_tiles": None, "pack_tokens": plan["pack_tokens"] or 80}
    run = data.draw(runs(plan))
    whole = Run(plan, 1, run.world * run.share)
    one, split = whole.batches(samples, Cursor(0)), run.batches(samples, Cursor(0))
    assert [rows_of(step) for step in one] == [rows_of(step) for step in split]
    assert [step[0].after for step in one] == [step[0].after for step in split]


@settings(max_examples=80)
@given(data=st.data())
def test_groups_hold_one_modality_and_ranks_balanced_lengths(data):
    samples = data.draw(data_sets())
    plan = data.draw(plans(group_by=GROUPS))
    run = data.draw(runs(plan))
    for step in run.batches(samples, Cursor(0)):
        if "modality" in plan["group_by"]:
            assert len(set((samples.images[seen(step)] > 0).tolist())) == 1
        if "length" in plan["group_by"] and not run.budget:
            widths = [samples.widths(batch) for batch in step]
            sums = [int(width.sum()) for width in widths]
            together = np.concatenate(widths)
            assert max(sums) - min(sums) <= together.max() - together.min()
            fillers = [int((batch.positions == FILLER).sum()) for batch in step]
            assert max(fillers) <= 1


@settings(max_examples=80)
@given(data=st.data())
def test_packs_and_budgets_are_kept(data):
    samples, plan = data.draw(data_sets()), data.draw(plans())
    run = data.draw(runs(plan))
    for step in run.batches(samples, Cursor(0)):
        for batch in step:
            widths = samples.widths(batch)
            counts = np.bincount(batch.rows)
            if plan["pack_tokens"]:
                assert (widths[counts > 1] <= plan["pack_tokens"]).all()  # beyond it, a pack of its own
                inside = np.diff(batch.rows) == 0
                assert (np.diff(batch.positions)[inside] > 0).all()  # in the order of positions
            else:
                assert (counts == 1).all()
            if run.budget and len(widths) > 1:
                tiles = int(samples.images[batch.positions].sum())
                assert plan["max_tokens"] is None or len(widths) * widths.max() <= plan["max_tokens"]
                assert plan["max_tiles"] is None or tiles <= plan["max_tiles"]
                assert run.share is None or len(widths) <= run.share


@settings(max_examples=60)
@given(data=st.data())
def test_drop_last_drops_short_batches_alone(data):
    """Of each window and modality with groups, else of the epoch; every batch that is left is full."""
    samples, plan = data.draw(data_sets()), data.draw(plans())
    run = data.draw(runs(plan))
    dropping = Run(plan, run.world, run.share, drop_last=True)
    kept, every = dropping.batches(samples, Cursor(0)), run.batches(samples, Cursor(0))
    full = [step for step in every if items_of(run, step) == run.items]
    assert [rows_of(step) for step in kept] == [rows_of(step) for step in full]
    assert all((batch.positions != FILLER).all() for step in kept for batch in step)
    if kept:
        assert kept[-1][0].after.position == every[-1][0].after.position
        assert kept[-1][0].after.window == every[-1][0].after.window


def test_dropping_may_begin_after_a_short_batch():
    samples = Data(np.full(40, 9), np.arange(40) % 2, key=5)
    plan = {
        "group_by": "modality",
        "pack_tokens": None,
        "max_tokens": None,
        "max_tiles": None,
        "plan_window": 20,
    }
    keeping, dropping = Run(plan, 2, 2), Run(plan, 2, 2, drop_last=True)
    cursor = keeping.batches(samples, Cursor(0))[4][0].after  # four full ones of 4, and a short one of 2
    assert (cursor.position, cursor.window) == (18, 0)
    left = dropping.batches(samples, cursor)
    assert [len(rows_of(step)) for step in left] == [4, 4, 4, 4]
    assert dropping.ranks()[0].count(samples.view, cursor) == 4


def test_what_a_window_drops_are_its_last_samples_of_a_modality():
    samples = Data(np.arange(1, 101), (np.arange(100) % 3 == 0).astype(np.int64), key=5)
    run = Run(
        {
            "group_by": "modality_length",
            "pack_tokens": None,
            "max_tokens": None,
            "max_tiles": None,
            "plan_window": 50,
        },
        world=2,
        share=4,
        drop_last=True,
    )
    kept = {p for step in run.batches(samples, Cursor(0)) for p in seen(step)}
    for begin in (0, 50):
        for modality in (True, False):
            own = [p for p in range(begin, begin + 50) if (p % 3 == 0) == modality]
            assert kept & set(own) == set(own[: len(own) // 8 * 8])


LENGTHS = st.lists(st.integers(1, 70), max_size=200)


def first_fit(lengths, capacity):
    room = []
    for length in lengths:
        for pack, left in enumerate(room):
            if left >= length:
                room[pack] -= length
                break
        else:
            room.append(capacity - length)
    return len(room)


def best_fit_by_hand(lengths, capacity):
    """The packs of best-fit decreasing, searched one by one."""
    room = []
    for length in sorted(lengths, reverse=True):
        fits = [pack for pack, left in enumerate(room) if left >= length]
        if fits:
            room[min(fits, key=room.__getitem__)] -= length
        else:
            room.append(capacity - length)
    return room


@given(lengths=LENGTHS, capacity=st.integers(1, 100))
def test_best_fit_decreasing(lengths, capacity):
    packs = best_fit(np.array(lengths, np.int64), capacity)
    sums = np.bincount(packs, lengths, minlength=0).astype(int)
    assert sorted((capacity - sums).tolist()) == sorted(best_fit_by_hand(lengths, capacity))
    assert sorted(set(packs.tolist())) == list(range(len(sums)))


@pytest.mark.parametrize("shape", ["short", "uniform", "long"])
def test_best_fit_needs_fewer_packs_than_first_fit(shape):
    rng = np.random.default_rng(7)
    lengths = {
        "short": rng.lognormal(4.8, 0.9, 3000).astype(np.int64).clip(1, 2048),
        "uniform": rng.integers(1, 2049, 3000),
        "long": rng.integers(600, 1500, 3000),
    }[shape]
    packs = int(best_fit(lengths, 2048).max()) + 1
    assert packs <= first_fit(lengths.tolist(), 2048)
    if shape == "short":
        assert packs <= np.ceil(lengths.sum() / 2048 * 1.01)  # a hundredth from what no packing can beat


@given(
    lengths=LENGTHS,
    rows=st.integers(0, 9),
    tokens=st.none() | st.integers(1, 300),
    tiles=st.none() | st.integers(1, 9),
)
def test_batches_within_a_budget_are_as_large_as_can_be(lengths, rows, tokens, tiles):
    lengths = np.array(sorted(lengths, reverse=True), np.int64)
    images = lengths % 4
    sizes = within_budget(lengths, images, max_rows=rows, max_tokens=tokens, max_tiles=tiles)
    assert sizes.sum() == len(lengths)

    def fits(begin, end):
        return (
            (not rows or end - begin <= rows)
            and (tokens is None or (end - begin) * lengths[begin] <= tokens)
            and (tiles is None or images[begin:end].sum() <= tiles)
        )

    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        assert size >= 1
        assert size == 1 or fits(end - size, end)
        assert end == len(lengths) or not fits(end - size, end + 1)


def test_grouping_by_length_pads_less_and_still_mixes():
    rng = np.random.default_rng(3)
    samples = Data(rng.integers(1, 1000, 8192), np.zeros(8192, np.int64), key=1)

    def padding(steps):
        widths = [samples.widths(batch) for step in steps for batch in step]
        return sum(w.max() * len(w) for w in widths) / sum(w.sum() for w in widths) - 1

    def epoch(key, **plan):
        plan = {"pack_tokens": None, "max_tokens": None, "max_tiles": None, "plan_window": 8192, **plan}
        return Run(plan, 4, 16).batches(Data(samples.lengths, samples.images, key), Cursor(0))

    grouped, mixed = epoch(1, group_by="length"), epoch(1, group_by="modality")
    assert padding(mixed) > 0.8
    assert padding(grouped) < 0.1
    # the rank with the most has little more than the others
    sums = np.array([[samples.widths(batch).sum() for batch in step] for step in grouped])
    assert (sums.max(axis=1) / sums.mean(axis=1) - 1).mean() < 0.002
    # batches of all lengths follow each other: long ones are not together
    means = [samples.lengths[seen(step)].mean() for step in grouped]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3
    other = epoch(2, group_by="length")
    assert [rows_of(s) for s in other] != [rows_of(s) for s in grouped]
    assert sorted(rows_of(s) for s in other) == sorted(
        rows_of(s) for s in grouped
    )  # another key, another order


@pytest.mark.parametrize(
    ("plan", "cursor"),
    [
        ({"group_by": "length"}, Cursor(40, legs=((8, 99),))),
        ({"group_by": "length"}, Cursor(40, legs=((8, 99), (4, 1)))),
        ({"group_by": "length"}, Cursor(40, legs=((0, 1),))),
        ({"group_by": "length"}, Cursor(40, legs=((8, 2, 1),))),
        ({"pack_tokens": 60}, Cursor(40, offset=99)),
        ({"max_tokens": 60}, Cursor(40, legs=((4, 99),))),
    ],
    ids=[
        "too-many",
        "too-many-earlier",
        "no-size",
        "of-a-budget",
        "too-many-packs",
        "too-many-micro-batches",
    ],
)
def test_a_cursor_of_other_data_is_refused(plan, cursor):
    samples = Data(np.full(100, 20), np.zeros(100, np.int64), key=1)
    batching = make_batching(global_batch_size=8, rank=0, world_size=2, plan_window=50, **plan)
    with pytest.raises(StateError, match=r"window 0|legs"):
        next(batching.batches(samples.view, cursor))


def planned(vector):
    """A plan of an example that is small enough to follow by hand."""
    samples = Data(np.array(vector["lengths"]), np.array(vector["images"]), vector["key"])
    cursor = Cursor.from_state(vector["cursor"])
    run = Run(vector["plan"], vector["world_size"], vector["share"])
    return [
        [
            {"positions": b.positions.tolist(), "rows": b.rows.tolist(), "after": b.after.to_state()}
            for b in batching.batches(samples.view, cursor)
        ]
        for batching in run.ranks()
    ]


@pytest.mark.parametrize("vector", json.loads(GOLDEN.read_text()), ids=lambda vector: vector["name"])
def test_golden_plans_hold(vector):
    """A change here is a new ORDER_VERSION: states of running jobs would otherwise continue in another order."""
    assert planned(vector) == vector["ranks"]
