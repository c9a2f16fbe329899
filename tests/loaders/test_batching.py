"""Plain batches: exact covers with equal batches, from any cursor, and arguments that are refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.batching import FILLER, Cursor, EpochView, PlainBatches, make_batching
from shardify.errors import UsageError

WORLDS = st.integers(1, 64)
SHARES = st.integers(1, 64)
LENGTHS = st.one_of(st.integers(0, 3000), st.sampled_from([0, 1, 63, 64, 65, 3000]))


def view(length):
    return EpochView(length, lambda positions: pytest.fail("plain batches need no lengths"), key=0)


def plain(world, share, rank=0, *, drop_last=False):
    return PlainBatches(global_batch_size=world * share, rank=rank, world_size=world, drop_last=drop_last)


def of_all_ranks(world, share, length, cursor, *, drop_last=False):
    """A list over batches of lists over ranks."""
    ranks = [
        list(plain(world, share, rank, drop_last=drop_last).batches(view(length), cursor))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    return list(zip(*ranks, strict=True))


@given(length=LENGTHS, world=WORLDS, share=SHARES, begin=st.integers(0, 3000), drop_last=st.booleans())
def test_batches_are_consecutive_positions_shared_out_equally(length, world, share, begin, drop_last):
    begin = min(begin, length)
    cursor, size = Cursor(begin, begin), world * share
    batches = of_all_ranks(world, share, length, cursor, drop_last=drop_last)
    left = plain(world, share, drop_last=drop_last).count(view(length), cursor)
    assert len(batches) == left
    for number, ranks in enumerate(batches):
        first = begin + number * size
        end = min(first + size, length)
        seen = np.concatenate([batch.positions for batch in ranks])
        assert sorted(seen[seen != FILLER].tolist()) == list(range(first, end))
        for rank, batch in enumerate(ranks):
            assert len(batch.positions) == -(-(end - first) // world)
            assert batch.rows.tolist() == list(range(len(batch.positions)))
            own = batch.positions[batch.positions != FILLER]
            assert (own % world == rank).all()
            assert (batch.positions[: len(own)] == own).all()  # fillers last
            assert batch.after == ranks[0].after
            assert batch.last == (number == len(batches) - 1)
            assert batch.after.position == (length if batch.last else first + size)
            left_here = plain(world, share, drop_last=drop_last).count(view(length), batch.after)
            assert left_here == len(batches) - number - 1
    assert len(batches) == ((length - begin) // size if drop_last else -(-(length - begin) // size))


def test_batches_planned_together_join_without_a_seam():
    batches = of_all_ranks(2, 50, 70_010, Cursor(10, 10))
    assert [batch.after.position for _, batch in batches] == list(range(110, 70_011, 100))
    assert np.concatenate([batch.positions for batch, _ in batches]).tolist() == list(range(10, 70_010, 2))


@given(length=LENGTHS, data=st.data())
def test_a_chain_of_other_worlds_and_sizes_completes_the_cover(length, data):
    cursor, seen = Cursor(0), []
    for last in (False, False, False, False, True):
        world, share = data.draw(WORLDS), data.draw(SHARES)
        cursor = plain(world, share).take_up(Cursor.from_state(json.loads(json.dumps(cursor.to_state()))))
        assert cursor.start == cursor.position
        batches = of_all_ranks(world, share, length, cursor)
        batches = batches if last else batches[: data.draw(st.integers(0, len(batches)))]
        seen += [p for ranks in batches for batch in ranks for p in batch.positions.tolist() if p != FILLER]
        cursor = batches[-1][0].after if batches else cursor
    assert sorted(seen) == list(range(length))


def test_a_billion_positions_are_counted_and_entered_at_once():
    batching = plain(1024, 8, rank=77)
    cursor = Cursor(10**9 - 20_000)
    assert batching.count(view(10**9), Cursor(0)) == -(-(10**9) // 8192)
    batches = list(batching.batches(view(10**9), cursor))
    assert [len(batch.positions) for batch in batches] == [8, 8, 4]
    assert batches[0].positions.tolist() == [*range(999_980_109, 999_988_192, 1024)]


SETTINGS = {"global_batch_size": 8, "rank": 0, "world_size": 2}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"rank": 2}, "rank=2"),
        ({"rank": -1}, "rank=-1"),
        ({"world_size": 0}, "world_size=0"),
        ({"global_batch_size": 9}, "global_batch_size=9 with world_size=2"),
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"global_batch_size": 2.5}, "global_batch_size=2.5"),
        ({"global_batch_size": None}, "a batch size is needed"),
        ({"group_by": "size"}, "group_by='size'"),
        ({"pack_tokens": 0}, "pack_tokens=0"),
        ({"max_tokens": True}, "max_tokens=True"),
        ({"max_tiles": -1}, "max_tiles=-1"),
        ({"plan_window": 0}, "plan_window=0"),
        ({"group_by": "length", "plan_window": 7}, "plan_window=7"),
        ({"pack_tokens": 100, "max_tokens": 99}, "max_tokens=99 with pack_tokens=100"),
    ],
)
def test_wrong_arguments_are_named(wrong, named):
    with pytest.raises(UsageError, match=named):
        make_batching(**SETTINGS | wrong)


def test_settings_name_what_a_resumed_run_must_keep():
    assert isinstance(make_batching(**SETTINGS), PlainBatches)
    nothing = dict.fromkeys(["group_by", "pack_tokens", "max_tokens", "max_tiles", "plan_window"])
    assert make_batching(**SETTINGS, plan_window=5).settings == nothing  # which plays no part there
    grouped = {"group_by": "modality", "pack_tokens": 64, "max_tokens": 128, "max_tiles": 4, "plan_window": 9}
    one = make_batching(**SETTINGS, **grouped)
    other = make_batching(global_batch_size=None, rank=2, world_size=3, **grouped)
    assert one.settings == other.settings == json.loads(json.dumps(grouped))
