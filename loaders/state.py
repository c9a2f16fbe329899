"""The loader's state: a few integers that name the next position, and what the order depends on."""

from collections.abc import Mapping
from typing import Any

from loaders.order import MAX_LANES, ORDER_VERSION
from shardify.errors import StateError

STATE_VERSION = 1
"""Of the layout below."""

State = dict[str, Any]

_FIELDS: dict[str, type] = {
    "version": int,
    "order_version": int,
    "epoch": int,
    "position": int,
    "start": int,
    "seed": int,
    "lanes": int,
    "settings": dict,
    "legs": list,
    "parts": list,
    "fingerprint": dict,
}


def make_state(
    *,
    epoch: int,
    position: int,
    start: int,
    seed: int,
    lanes: int,
    settings: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
) -> State:
    """A state, JSON-able.

    Args:
        epoch: from 0.
        position: the next one, in the order of the epoch.
        start: where this run took up the epoch.
        seed: of the order.
        lanes: of the order.
        settings: what else the order depends on.
        fingerprint: of the shards.
    """
    return {
        "version": STATE_VERSION,
        "order_version": ORDER_VERSION,
        "epoch": epoch,
        "position": position,
        "start": start,
        "seed": seed,
        "lanes": lanes,
        "settings": dict(settings),
        "legs": [],
        "parts": [],
        "fingerprint": dict(fingerprint),
    }


def check_state(state: Any, current: State, *, length: int) -> None:
    """Refuse a state that would continue in another order, over other samples, or that is none.

    Args:
        state: what was loaded.
        current: the loader's own state.
        length: positions in an epoch.

    Raises:
        StateError: with everything that differs.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"a loader state is a dict, this is {type(state).__name__}")
    missing = [name for name in _FIELDS if name not in state]
    if missing:
        raise StateError(f"not a loader state: {', '.join(missing)} missing")
    wrong = [
        name
        for name, kind in _FIELDS.items()
        if not isinstance(state[name], kind) or isinstance(state[name], bool)
    ]
    if wrong:
        raise StateError(f"not a loader state: {', '.join(f'{n}={state[n]!r}' for n in wrong)}")
    differences = [
        f"{name} is {state[name]} in the state, {current[name]} here"
        for name in ("version", "order_version", "seed", "legs", "parts")
        if state[name] != current[name]
    ]
    differences += [
        f"{name} is {state['settings'].get(name)!r} in the state, {current['settings'].get(name)!r} here"
        for name in {**current["settings"], **state["settings"]}
        if state["settings"].get(name) != current["settings"].get(name)
    ]
    if state["fingerprint"] != current["fingerprint"]:
        there, here = _shards(state["fingerprint"]), _shards(current["fingerprint"])
        differences.append(
            f"it was made over {there}; here are {here}"
            if there != here
            else f"it was made over other shards, or another order of them (as many of both): {there}"
        )
    if differences:
        raise StateError(f"this state does not continue here: {'; '.join(differences)}")
    if not (
        0 <= state["start"] <= state["position"] <= length
        and state["epoch"] >= 0
        and 1 <= state["lanes"] <= MAX_LANES
    ):
        raise StateError(
            f"not a state of {length} positions: epoch {state['epoch']}, position {state['position']}, start {state['start']},"
            f" lanes {state['lanes']}"
        )


def _shards(fingerprint: Mapping[str, Any]) -> str:
    return f"{fingerprint.get('shards')} shards of {fingerprint.get('samples')} samples"
