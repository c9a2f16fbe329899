"""States: small, JSON-able, and refused with what differs."""

import copy
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.batching import Cursor
from loaders.order import ORDER_VERSION
from loaders.state import (
    STATE_VERSION,
    check_state,
    current_run,
    is_state,
    make_state,
    merged,
    skipped_from,
    taken_up,
    with_cursor,
)
from shardify.errors import StateError

RUN = {"global_batch_size": 64, "world_size": 2, "drop_last": False}


def state(**changes):
    made = make_state(
        seed=7,
        lanes=64,
        settings={"shuffle": "block", "block": 32, "window": 8},
        parts=[],
        fingerprint={"shards": 4, "samples": 1000, "digest": "ab" * 16},
        data={"shards": "data/{000..003}.tar"},
        run=RUN,
    )
    return {**with_cursor(made, Cursor(500, start=100)), "epoch": 3, "step": 70, "samples": 3500, **changes}


def test_a_state_is_small_json():
    text = json.dumps(state())
    assert len(text) < 1000
    assert json.loads(text) == state()
    assert set(state()) == {
        *("version", "order_version", "epoch", "position", "start", "window", "offset", "legs"),
        *("step", "samples", "seed", "lanes", "settings", "parts", "fingerprint"),
        *("data", "history", "skipped"),
    }


def test_what_may_change_does():
    check_state(state(epoch=9, position=1000, start=1000, lanes=5), state())
    check_state(taken_up(state(), {**RUN, "world_size": 7, "global_batch_size": None}), state())
    check_state(state(legs=[[16, 3], [8, 1, 2]], window=4, offset=2, skipped=[[3, 9]]), state())


def test_a_run_of_another_shape_is_in_the_history():
    again = taken_up(state(), {**RUN, "world_size": 3})
    assert current_run(state()) == RUN
    assert current_run(again) == {**RUN, "world_size": 3}
    assert [(entry["step"], entry["position"]) for entry in again["history"]] == [(0, 0), (70, 500)]
    # what took no step leaves no trace
    assert len(taken_up(again, RUN)["history"]) == 2


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=8), st.integers(0, 8))
def test_stretches_are_merged(pairs, cut):
    stretches = [(begin, begin + length) for begin, length in pairs]
    steps = {step for begin, end in stretches for step in range(begin, end)}
    result = merged(stretches[:cut], stretches[cut:])
    assert {step for begin, end in result for step in range(begin, end)} == steps
    assert all(one[1] < other[0] for one, other in pairwise(result))


def test_only_what_was_skipped_is_said_to_be():
    # one run was to skip 60 to 90 and was ended at 70; the next one begins there and is to skip other steps, some long gone
    assert skipped_from(state(skipped=[[3, 9], [60, 90]]), [(20, 30), (50, 75), (80, 82)]) == [
        [3, 9],
        [60, 75],
        [80, 82],
    ]
    assert skipped_from(state(skipped=[[70, 90]]), []) == []


def test_a_state_is_recognised_among_other_things():
    assert is_state(state())
    assert not is_state({"step": 5})
    assert not is_state([state()])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"version": STATE_VERSION + 1},
            f"version is {STATE_VERSION + 1} in the state, {STATE_VERSION} here",
        ),
        ({"order_version": 99}, f"order_version is 99 in the state, {ORDER_VERSION} here"),
        ({"seed": 8}, "seed is 8 in the state, 7 here"),
        (
            {"settings": {"shuffle": None, "block": 32, "window": 8}},
            "shuffle is None in the state, 'block' here",
        ),
        ({"settings": {"shuffle": "block", "block": 32}}, "window is None in the state, 8 here"),
        ({"start": 501}, "not a state of any run"),
        ({"start": -1}, "not a state of any run"),
        ({"epoch": -1}, "not a state of any run"),
        ({"lanes": 0}, "not a state of any run"),
        ({"position": "500"}, "position='500'"),
        ({"seed": True}, "seed=True"),
        ({"settings": None}, "settings=None"),
        ({"legs": [[1]]}, "legs"),
        ({"legs": [[4, -1]]}, "legs"),
        ({"skipped": [[1, 2, 3]]}, "skipped"),
        ({"history": []}, "history"),
        ({"history": [{"step": 0}]}, "history"),
    ],
)
def test_what_may_not_change_is_named(changes, said):
    with pytest.raises(StateError, match=said):
        check_state(state(**changes), state())


def test_several_differences_are_all_named():
    with pytest.raises(StateError, match=r"seed is 1 .*; block is 3 "):
        check_state(state(seed=1, settings={"shuffle": "block", "block": 3, "window": 8}), state())


@pytest.mark.parametrize("value", [None, 5, "state", [], [1]])
def test_what_is_no_dict_is_refused(value):
    with pytest.raises(StateError, match="a loader state is a dict"):
        check_state(value, state())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(state())), JSON, min_size=1), drop=st.booleans())
def test_a_malformed_state_is_never_another_error(changes, drop):
    broken = state(**changes)
    if drop:
        del broken[next(iter(changes))]
    before = copy.deepcopy(broken)
    try:
        check_state(broken, state())
    except StateError:
        pass
    else:
        assert not drop
    assert broken == before
