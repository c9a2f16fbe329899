"""States: small, JSON-able, and refused with what differs."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.order import ORDER_VERSION
from loaders.state import STATE_VERSION, check_state, make_state
from shardify.errors import StateError

LENGTH = 1000


def state(**changes):
    made = make_state(
        epoch=3,
        position=500,
        start=100,
        seed=7,
        lanes=64,
        settings={"shuffle": "block", "block": 32, "window": 8},
        fingerprint={"shards": 4, "samples": LENGTH, "digest": "ab" * 16},
    )
    return {**made, **changes}


def test_a_state_is_small_json():
    text = json.dumps(state())
    assert len(text) < 500
    assert json.loads(text) == state()
    assert set(state()) == {
        *("version", "order_version", "epoch", "position", "start", "seed", "lanes"),
        *("settings", "legs", "parts", "fingerprint"),
    }


def test_what_may_change_does():
    check_state(state(epoch=9, position=1000, start=1000, lanes=5), state(), length=LENGTH)


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
        (
            {"fingerprint": {"shards": 5, "samples": 999, "digest": "cd"}},
            "made over 5 shards of 999 samples; here are 4 shards of 1000 samples",
        ),
        (
            {"fingerprint": {"shards": 4, "samples": LENGTH, "digest": "cd"}},
            "other shards, or another order of them .as many of both.: 4 shards of 1000",
        ),
        ({"fingerprint": {}}, "None shards"),
        ({"position": 1001}, "not a state of 1000 positions"),
        ({"start": 501}, "not a state of 1000 positions"),
        ({"start": -1}, "not a state of 1000 positions"),
        ({"epoch": -1}, "not a state of 1000 positions"),
        ({"lanes": 0}, "not a state of 1000 positions"),
        ({"position": "500"}, "position='500'"),
        ({"seed": True}, "seed=True"),
        ({"settings": None}, "settings=None"),
    ],
)
def test_what_may_not_change_is_named(changes, said):
    with pytest.raises(StateError, match=said):
        check_state(state(**changes), state(), length=LENGTH)


def test_several_differences_are_all_named():
    with pytest.raises(StateError, match=r"seed is 1 .*; block is 3 .*; it was made over"):
        check_state(
            state(seed=1, settings={"shuffle": "block", "block": 3, "window": 8}, fingerprint={"shards": 1}),
            state(),
            length=LENGTH,
        )


@pytest.mark.parametrize("value", [None, 5, "state", [], [1]])
def test_what_is_no_dict_is_refused(value):
    with pytest.raises(StateError, match="a loader state is a dict"):
        check_state(value, state(), length=LENGTH)


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
        check_state(broken, state(), length=LENGTH)
    except StateError:
        pass
    else:
        assert not drop
    assert broken == before
