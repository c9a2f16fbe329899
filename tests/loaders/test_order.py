"""The order of an epoch: exact covers, resumption under other worlds, locality, and golden vectors that pin the version."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.batching import FILLER, Cursor, EpochView, PlainBatches
from loaders.order import ORDER_VERSION, default_lanes, make_order
from shardify.errors import UsageError

GOLDEN = Path(__file__).parents[1] / "golden" / f"order_v{ORDER_VERSION}.json"

LENGTHS = st.one_of(
    st.integers(0, 5000), st.sampled_from([0, 1, 31, 32, 33, 63, 64, 65, 2047, 2048, 2049, 4096])
)
SEEDS = st.integers(-(2**63), 2**63 - 1)
WORLDS = st.integers(1, 64)
BATCHES = st.integers(1, 64)


@st.composite
def orders(draw):
    return make_order(
        draw(LENGTHS),
        shuffle=draw(st.sampled_from(["block", "full", None])),
        seed=draw(SEEDS),
        lanes=draw(st.one_of(st.just(64), st.integers(1, 200))),
        block=draw(st.one_of(st.just(32), st.integers(1, 70))),
        window=draw(st.integers(1, 10)),
    )


def planned(order, world, batch, rank, start=0):
    """A rank's batches of an epoch taken up at `start`."""
    batches = PlainBatches(global_batch_size=batch * world, rank=rank, world_size=world)
    view = EpochView(order.length, lambda _: pytest.fail("plain batches need no lengths"), key=0)
    return list(batches.batches(view, Cursor(start, start)))


def epoch_of(order, epoch, world, batch, *, start=0, stop=None):
    """What each rank sees: a list over ranks of lists over batches of samples, fillers as -1."""
    ranks = []
    for rank in range(world):
        positions = [plan.positions for plan in planned(order, world, batch, rank, start)[:stop]]
        flat = np.concatenate(positions) if positions else np.zeros(0, np.int64)
        samples = np.full_like(flat, FILLER)
        samples[flat >= 0] = order.samples(epoch, flat[flat >= 0])
        ranks.append(np.split(samples, np.cumsum([len(p) for p in positions])[:-1]) if positions else [])
    return ranks


def valid(ranks):
    return [int(sample) for rank in ranks for batch in rank for sample in batch if sample >= 0]


@pytest.mark.long
@settings(max_examples=80)
@given(order=orders(), epoch=st.integers(0, 1000), world=WORLDS, batch=BATCHES)
def test_an_epoch_is_an_exact_cover_with_equal_batches(order, epoch, world, batch):
    ranks = epoch_of(order, epoch, world, batch)
    assert sorted(valid(ranks)) == list(range(order.length))
    shapes = {tuple(len(b) for b in rank) for rank in ranks}
    assert len(shapes) == 1  # the same number of batches, each of the same size, on every rank
    fillers = [sum(int((b < 0).sum()) for b in rank) for rank in ranks]
    assert sum(fillers) < world


@pytest.mark.long
@settings(max_examples=60)
@given(order=orders(), epoch=st.integers(0, 100), data=st.data())
def test_a_chain_of_resumes_under_other_worlds_completes_the_cover(order, epoch, data):
    position, seen = 0, []
    for _ in range(data.draw(st.integers(0, 4))):
        world, batch = data.draw(WORLDS), data.draw(BATCHES)
        batches = planned(order, world, batch, 0, position)
        steps = data.draw(st.integers(0, len(batches)))
        seen += valid(epoch_of(order, epoch, world, batch, start=position, stop=steps))
        position = batches[steps - 1].after.position if steps else position
    seen += valid(epoch_of(order, epoch, data.draw(WORLDS), data.draw(BATCHES), start=position))
    assert sorted(seen) == list(range(order.length))


@settings(max_examples=60)
@given(
    order=orders(),
    epoch=st.integers(0, 100),
    world=st.sampled_from([2, 3, 4, 6, 8, 12]),
    multiple=st.integers(1, 6),
)
def test_global_batches_of_one_size_are_the_same_sets_for_every_world(order, epoch, world, multiple):
    size = world * multiple
    one = epoch_of(order, epoch, 1, size)
    split = epoch_of(order, epoch, world, multiple)
    as_sets = [
        [sorted(int(s) for rank in ranks for s in rank[number] if s >= 0) for number in range(len(ranks[0]))]
        for ranks in (one, split)
    ]
    assert as_sets[0] == as_sets[1]


@given(order=orders(), epoch=st.integers(0, 50), data=st.data())
def test_any_position_alone_equals_the_whole(order, epoch, data):
    everything = order.samples(epoch, np.arange(order.length))
    if order.length:
        some = np.array(data.draw(st.lists(st.integers(0, order.length - 1), max_size=20)), dtype=np.int64)
        assert np.array_equal(order.samples(epoch, some), everything[some])


@given(order=orders(), data=st.data())
def test_positions_of_several_epochs_at_once_are_those_of_each(order, data):
    if order.length:
        places = st.tuples(st.integers(0, 10**6), st.integers(0, order.length - 1))
        epochs, positions = np.array(data.draw(st.lists(places, min_size=1, max_size=20)), np.int64).T
        each = [int(order.samples(int(e), np.array([p]))[0]) for e, p in zip(epochs, positions, strict=True)]
        assert order.samples(epochs, positions).tolist() == each


@given(length=st.integers(1000, 5000), seed=SEEDS, lanes=st.integers(1, 16), block=st.integers(1, 16))
def test_a_lane_keeps_its_blocks_in_every_epoch(length, seed, lanes, block):
    order = make_order(length, shuffle="block", seed=seed, lanes=lanes, block=block)
    lane = np.arange(0, length, lanes)
    first, second = (set(order.samples(epoch, lane).tolist()) for epoch in (0, 9))
    assert first == second
    # all but the samples of the rest are whole blocks that no other lane holds
    whole = [
        b for b in {s // block for s in first} if all(s in first for s in range(b * block, (b + 1) * block))
    ]
    assert len(whole) >= length // block // lanes


def test_epochs_and_seeds_differ_and_shuffles_mix():
    positions = np.arange(4096)
    for shuffle in ("block", "full"):
        order = make_order(4096, shuffle=shuffle, seed=0)
        again = make_order(4096, shuffle=shuffle, seed=1)
        first, second = order.samples(0, positions), order.samples(1, positions)
        assert np.array_equal(first, order.samples(0, positions))
        assert (first == second).mean() < 0.05
        assert (first == again.samples(0, positions)).mean() < 0.05
        assert abs(np.corrcoef(positions, first)[0, 1]) < 0.1
        # neighbours in the order rarely come from one block of 32
        assert (np.diff(first // 32) == 0).mean() < 0.05


def test_a_billion_samples_need_no_table():
    order = make_order(10**9, shuffle="block", seed=1, lanes=default_lanes(1024))
    positions = np.arange(7, 10**9, 10**9 // 5000)
    samples = order.samples(3, positions)
    assert len(set(samples.tolist())) == len(positions)
    assert (samples >= 0).all()
    assert (samples < 10**9).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"length": -1}, "length=-1"),
        ({"lanes": 0}, "lanes=0"),
        ({"block": 0}, "block=0"),
        ({"shuffle": "x"}, "'x'"),
    ],
)
def test_wrong_arguments_are_named(wrong, named):
    with pytest.raises(UsageError, match=named):
        make_order(**{"length": 5, "shuffle": "block", "seed": 0, **wrong})


@pytest.mark.parametrize(
    "vector", json.loads(GOLDEN.read_text()), ids=lambda v: f"{v['shuffle']}-{v['length']}-{v['epoch']}"
)
def test_golden_vectors_hold(vector):
    """A change here is a new ORDER_VERSION: states of running jobs would otherwise continue in another order."""
    order = make_order(
        vector["length"],
        shuffle=vector["shuffle"],
        seed=vector["seed"],
        lanes=vector["lanes"],
        block=vector["block"],
        window=vector["window"],
    )
    assert order.samples(vector["epoch"], np.array(vector["positions"])).tolist() == vector["samples"]
