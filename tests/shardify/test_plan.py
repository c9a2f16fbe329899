"""A plan holds every record in exactly one shard, in a keyed order, with shards as asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardify.errors import UsageError
from shardify.plan import DEFAULT_SHARD_SIZE, Cut, make_cut, make_plan, parse_size, planned_order

SPANS = st.lists(st.sampled_from([0, 1024, 1536, 4096, 100_352, 1_000_448]), min_size=1, max_size=300)
SEEDS = st.integers(-(2**40), 2**70)


def packable(spans, plan):
    """Spans of the good samples of each shard."""
    spans = np.asarray(spans)
    return [
        [span for span in spans[plan.order[a:b]].tolist() if span]
        for a, b in zip(plan.starts[:-1].tolist(), plan.starts[1:].tolist(), strict=True)
    ]


def check_cover(spans, plan):
    assert sorted(plan.order.tolist()) == list(range(len(spans)))
    assert plan.starts[0] == 0
    assert plan.starts[-1] == len(spans)
    assert (np.diff(plan.starts) >= 0).all()


@given(spans=SPANS, shuffle=st.booleans(), seed=SEEDS, size=st.integers(1, 10**7), multiple=st.integers(1, 9))
def test_by_size_every_record_is_in_one_shard_and_the_shards_are_balanced(
    spans, shuffle, seed, size, multiple
):
    total, good = sum(spans), sum(span > 0 for span in spans)
    most = max(1, good // multiple * multiple)  # a size alone never asks for more shards than samples
    count = -(-max(1, min(most, -(-total // size))) // multiple) * multiple
    cut = Cut(shard_size=size, multiple_of=multiple)
    if count > max(1, good):
        with pytest.raises(UsageError, match="more than"):
            make_plan(spans, shuffle=shuffle, seed=seed, cut=cut)
        return
    plan = make_plan(spans, shuffle=shuffle, seed=seed, cut=cut)
    check_cover(spans, plan)
    assert plan.shards == count
    shards = packable(spans, plan)
    assert good == 0 or all(shards)
    if count == 1 or max(spans) * 2 < total / count:  # otherwise single samples decide
        assert all(abs(sum(shard) - total / count) <= max(spans) + 1 for shard in shards)


@given(spans=SPANS, seed=SEEDS, count=st.integers(1, 40), shuffle=st.booleans())
def test_by_count(spans, seed, count, shuffle):
    good = sum(span > 0 for span in spans)
    if count > max(1, good):
        with pytest.raises(UsageError, match=f"{count} shards are more than the {good} records"):
            make_plan(spans, shuffle=shuffle, seed=seed, cut=Cut(shards=count))
        return
    plan = make_plan(spans, shuffle=shuffle, seed=seed, cut=Cut(shards=count))
    check_cover(spans, plan)
    assert plan.shards == count
    assert good == 0 or all(packable(spans, plan))


@given(spans=SPANS, seed=SEEDS, samples=st.integers(1, 50), multiple=st.integers(1, 9))
def test_by_samples(spans, seed, samples, multiple):
    good = sum(span > 0 for span in spans)
    count = max(1, -(-good // samples))
    rounded = -(-count // multiple) * multiple
    cut = Cut(samples_per_shard=samples, multiple_of=multiple)
    if rounded > max(1, good):
        with pytest.raises(UsageError, match=f"{rounded} shards .* are more than the {good} records"):
            make_plan(spans, shuffle=True, seed=seed, cut=cut)
        return
    plan = make_plan(spans, shuffle=True, seed=seed, cut=cut)
    check_cover(spans, plan)
    sizes = [len(shard) for shard in packable(spans, plan)]
    assert len(sizes) == rounded
    if rounded == count:
        assert all(size == samples for size in sizes[:-1])
    else:
        assert max(sizes) - min(sizes) <= 1


def test_a_size_asks_for_no_more_shards_than_samples():
    """Two samples of 300 MB, and the default size of 256 MB."""
    assert make_plan([300_000_000] * 2, shuffle=False, seed=0, cut=Cut(shard_size=256_000_000)).shards == 2
    cut = Cut(shard_size=256_000_000, multiple_of=4)
    assert make_plan([300_000_000] * 5, shuffle=False, seed=0, cut=cut).shards == 4


@pytest.mark.parametrize("cut", [Cut(samples_per_shard=10**30), Cut(shard_size=10**30)])
def test_more_than_there_is_may_be_asked_for(cut):
    assert make_plan([5, 0, 7], shuffle=True, seed=10**30, cut=cut).starts.tolist() == [0, 3]


def test_without_shuffle_the_order_is_the_records():
    plan = make_plan([1024] * 10, shuffle=False, seed=7, cut=Cut(shards=3))
    assert plan.order.tolist() == list(range(10))


def test_the_order_is_pinned():
    assert planned_order(12, shuffle=True, seed=0).tolist() == [0, 8, 5, 7, 6, 1, 4, 11, 9, 10, 3, 2]
    assert planned_order(12, shuffle=True, seed=1).tolist() == [5, 8, 9, 0, 3, 1, 11, 7, 2, 4, 6, 10]


def test_a_million_records_plan_in_seconds():
    spans = np.random.default_rng(0).integers(1024, 200_000, 10**6)
    plan = make_plan(spans, shuffle=True, seed=0, cut=Cut(shard_size=256_000_000))
    sizes = np.add.reduceat(spans[plan.order], plan.starts[:-1])
    assert sizes.max() - sizes.min() < 500_000
    assert sizes.max() < 256_200_000


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256MB", 256 * 10**6),
        ("1GiB", 2**30),
        ("100_000_000", 10**8),
        ("1.5 kb", 1500),
        ("64MiB", 2**26),
        ("2g", 2 * 10**9),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "0", "0.1", "-5MB", "5 elephants", "1e9", "١MB x"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def test_one_way_to_cut():
    nothing = {"shard_size": None, "samples_per_shard": None, "shards": None, "multiple_of": 1}
    assert make_cut(**nothing) == Cut(shard_size=DEFAULT_SHARD_SIZE)
    assert make_cut(**{**nothing, "shards": 8}) == Cut(shards=8)
    with pytest.raises(UsageError, match="--shard-size and --shards say the same"):
        make_cut(**{**nothing, "shard_size": "1MB", "shards": 3})
    with pytest.raises(UsageError, match="--multiple-of 0"):
        make_cut(**{**nothing, "multiple_of": 0})
