"""The loader's state: a few integers that name the next batch, what the order depends on, and how the run came here."""

from collections.abc import Mapping, Sequence
from typing import Any

from loaders.batching import Cursor
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
    "window": int,
    "offset": int,
    "legs": list,
    "step": int,
    "samples": int,
    "seed": int,
    "lanes": int,
    "settings": dict,
    "parts": list,
    "fingerprint": dict,
    "data": dict,
    "history": list,
    "skipped": list,
}
_COUNTS = ("epoch", "position", "start", "window", "offset", "step", "samples")
RUN = ("global_batch_size", "world_size", "drop_last")
"""What of a run decides which batch holds what, and may be another when the run is continued."""

_CURSOR = ("epoch", "position", "start", "window", "offset", "legs")
_MAX_LEGS = 100_000


def make_state(
    *,
    seed: int,
    lanes: int,
    settings: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]],
    fingerprint: Mapping[str, Any],
    data: Mapping[str, Any],
    run: Mapping[str, Any],
    skipped: Sequence[tuple[int, int]] = (),
) -> State:
    """The state at the beginning of a run, JSON-able.

    Args:
        seed: of the order.
        lanes: of the order.
        settings: what else the order and the batches depend on.
        parts: cursors of a mixture's parts.
        fingerprint: of the shards.
        data: what the user called it, so that it can be found again.
        run: what may be another from run to run: `RUN`.
        skipped: stretches of steps that are left out.
    """
    state: State = {
        "version": STATE_VERSION,
        "order_version": ORDER_VERSION,
        "epoch": 0,
        "position": 0,
        "start": 0,
        "window": 0,
        "offset": 0,
        "legs": [],
        "step": 0,
        "samples": 0,
        "seed": seed,
        "lanes": lanes,
        "settings": dict(settings),
        "parts": [dict(part) for part in parts],
        "fingerprint": dict(fingerprint),
        "data": dict(data),
        "history": [],
        "skipped": merged([], skipped),
    }
    return taken_up(state, run)


def fresh(state: State) -> State:
    """A state of one's own: a deep copy, several times faster than Python's."""
    return {name: _fresh(value) for name, value in state.items()}


def _fresh(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _fresh(item) for name, item in value.items()}
    if not isinstance(value, list):
        return value
    # long lists are of names, which need no copy of their own
    return [_fresh(item) for item in value] if value and isinstance(value[0], dict | list) else list(value)


def with_cursor(state: State, cursor: Cursor) -> State:
    """A state of the same epoch with another cursor."""
    return {**state, **cursor.to_state()}


def taken_up(state: State, run: Mapping[str, Any]) -> State:
    """A state from which a run of another shape goes on, with that in its history."""
    entry = {
        "step": state["step"],
        "samples": state["samples"],
        **{name: state[name] for name in _CURSOR},
        "parts": state["parts"],
        "fingerprint": state["fingerprint"],
        "data": state["data"],
        **run,
    }
    # what took no step leaves no trace
    history = [past for past in state["history"] if past["step"] < state["step"]]
    return {**state, "history": [*history, entry]}


def skipped_from(state: Mapping[str, Any], skip: Sequence[Sequence[int]]) -> list[list[int]]:
    """What a run has skipped so far, and will skip from a state on: what others were to skip later is not."""
    step = state["step"]
    before = [(begin, min(end, step)) for begin, end in state["skipped"] if begin < step]
    later = [(max(begin, step), end) for begin, end in skip if end > step]
    return merged(before, later)


def merged(skipped: Sequence[Sequence[int]], more: Sequence[Sequence[int]]) -> list[list[int]]:
    """Stretches of steps, ascending, with those that touch made one."""
    result: list[list[int]] = []
    for begin, end in sorted([*map(tuple, skipped), *map(tuple, more)]):
        if result and begin <= result[-1][1]:
            result[-1][1] = max(end, result[-1][1])
        else:
            result.append([begin, end])
    return result


def is_state(value: Any) -> bool:
    """Whether it looks like a loader's state: whether it has all fields of one."""
    return isinstance(value, Mapping) and all(name in value for name in _FIELDS)


def current_run(state: Mapping[str, Any]) -> dict[str, Any]:
    """The `RUN` under which a state was made."""
    last = state["history"][-1]
    return {name: last[name] for name in RUN}


def check_state(state: Any, current: State) -> None:
    """Refuse a state that would continue in another order, or that is none; the shards are the course's to compare.

    Args:
        state: what was loaded.
        current: the loader's own state.

    Raises:
        StateError: with everything that differs.
    """
    check_form(state)
    differences = [
        f"{name} is {state[name]} in the state, {current[name]} here"
        for name in ("version", "order_version", "seed")
        if state[name] != current[name]
    ]
    differences += [
        f"{name} is {state['settings'].get(name)!r} in the state, {current['settings'].get(name)!r} here"
        for name in {**current["settings"], **state["settings"]}
        if state["settings"].get(name) != current["settings"].get(name)
    ]
    if differences:
        raise StateError(f"this state does not continue here: {'; '.join(differences)}")
    check_values(state)


def check_form(state: Any) -> None:
    """Refuse what lacks a field of a state, or has another kind of value in it.

    Raises:
        StateError: with the fields.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"a loader state is a dict, this is {type(state).__name__}")
    if missing := [name for name in _FIELDS if name not in state]:
        raise StateError(f"not a loader state: {', '.join(missing)} missing")
    if wrong := [name for name, kind in _FIELDS.items() if not _is(state[name], kind)]:
        raise StateError(f"not a loader state: {', '.join(f'{n}={state[n]!r}' for n in wrong)}")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


def check_values(state: Mapping[str, Any]) -> None:
    """Refuse numbers that no run has; after `check_form`.

    Raises:
        StateError: with them.
    """
    counts = all(0 <= state[name] < 2**62 for name in _COUNTS)
    if not counts or state["start"] > state["position"] or not 1 <= state["lanes"] <= MAX_LANES:
        shown = ", ".join(f"{name} {state[name]}" for name in (*_COUNTS, "lanes"))
        raise StateError(f"not a state of any run: {shown}")
    if len(state["legs"]) > _MAX_LEGS or not all(_is_counts(leg, 2, 3) for leg in state["legs"]):
        raise StateError("not a loader state: legs is no list of (batch size, batches)")
    if not all(_is_counts(stretch, 2, 2) for stretch in state["skipped"]):
        raise StateError("not a loader state: skipped is no list of (from, to)")
    entries = all(isinstance(entry, Mapping) and _is_entry(entry) for entry in state["history"])
    if not entries or not state["history"]:
        raise StateError("not a loader state: its history is damaged")


def _is_counts(value: Any, least: int, most: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and least <= len(value) <= most
        and all(_is(number, int) and 0 <= number < 2**62 for number in value)
    )


def _is_entry(entry: Mapping[str, Any]) -> bool:
    numbers = (*(name for name in _CURSOR if name != "legs"), "step", "samples", "world_size")
    size = entry.get("global_batch_size")
    return (
        all(_is(entry.get(name), int) and 0 <= entry[name] < 2**62 for name in numbers)
        and (size is None or (_is(size, int) and 0 < size < 2**62))
        and isinstance(entry.get("drop_last"), bool)
        and all(isinstance(entry.get(name), list) for name in ("legs", "parts"))
        and all(isinstance(entry.get(name), Mapping) for name in ("fingerprint", "data"))
        and all(_is_counts(leg, 2, 3) for leg in entry["legs"])
    )
