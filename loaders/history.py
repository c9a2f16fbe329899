"""The past of a run, out of its state alone: which stretches it had, over which data, and which positions each step consumed.

    steps    0 ............ 700 ............ 1200 .......... 1500      the state's step
    history  64 ranks       48 ranks         48 ranks, list.txt
             stretch 0      stretch 1        stretch 2

A state has an entry for each time the run was taken up in another shape or over other data: cursor, parts, batch size, world size. Between two
entries the run followed one plan, which is made again here; no data is read.
"""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from loaders.batching import FILLER, Cursor, IntArray, PlainBatches, make_batching
from loaders.dataset import Dataset, Part, redescribed
from loaders.exclusions import find_excluded, kept_excluded
from loaders.lengths import CountedText, kept_lengths, token_lengths, word_lengths
from loaders.mixture import Mixture, Shards, check_parts
from loaders.order import ORDER_VERSION, EpochOrder, OrderSettings
from loaders.plan import Measure, Planner
from loaders.state import STATE_VERSION, State, check_form, check_values
from loaders.subset import EVERYTHING, Subset, choose_side, choose_some
from loaders.tiles import TiledFit, count_tiles, kept_tiles
from loaders.window_batches import WindowBatches
from shardify.errors import ShardifyError, StateError, UsageError
from shardify.format.exclude import read_exclusions
from shardify.format.shards import ShardSet, open_shards
from shardify.format.urls import shown

_CHUNK = 1 << 16  # positions looked at together


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps of a run in one shape and over the same data.

    Attributes:
        begin: steps of the run before it.
        end: and with it.
        state: at its beginning.
        run: its ``global_batch_size``, ``world_size`` and ``drop_last``.
        data: what the user called the data.
    """

    begin: int
    end: int
    state: State
    run: Mapping[str, Any]
    data: Mapping[str, Any]

    @property
    def ranks(self) -> int:
        """Its world size."""
        return int(self.run["world_size"])


def check_past(state: Any) -> State:
    """A state that can be asked about its past.

    Raises:
        StateError: it is none, or of another version.
    """
    check_form(state)
    for name, here in (("version", STATE_VERSION), ("order_version", ORDER_VERSION)):
        if state[name] != here:
            raise StateError(
                f"{name} is {state[name]} in the state, {here} here: ask with the release that made it"
            )
    check_values(state)
    steps = [entry["step"] for entry in state["history"]]
    if steps != sorted(set(steps)) or steps[0] != 0 or steps[-1] > state["step"]:
        raise StateError(f"not a loader state: its history is of steps {steps}, and it is at {state['step']}")
    return dict(state)


def stretches_of(state: State) -> list[Stretch]:
    """The stretches of a state's run, one at least; the last one may be empty."""
    entries = state["history"]
    ends = [entry["step"] for entry in entries[1:]] + [state["step"]]
    names = (
        "epoch",
        "position",
        "start",
        "window",
        "offset",
        "legs",
        "parts",
        "fingerprint",
        "step",
        "samples",
    )
    return [
        Stretch(
            begin=entry["step"],
            end=end,
            state={**state, **{name: entry[name] for name in names}},
            run={name: entry[name] for name in ("global_batch_size", "world_size", "drop_last")},
            data=entry["data"],
        )
        for entry, end in zip(entries, ends, strict=True)
    ]


def continued(state: State) -> Stretch:
    """What comes after a state, if the run goes on as it was."""
    last = stretches_of(state)[-1]
    return replace(last, begin=state["step"], state=state, data=state["data"])


def is_skipped(state: State, step: int) -> tuple[int, int] | None:
    """The stretch of skipped steps that step number `step`, counted from 0, is in; None when it was handed out."""
    return next(((begin, end) for begin, end in state["skipped"] if begin <= step < end), None)


@dataclass(slots=True, eq=False)
class Source:
    """Shards of which a run has read, as they are now.

    Attributes:
        place: where they were found.
        shards: all of them, those added since too.
        names: what runs called the part; an empty name for a data set alone.
    """

    place: str
    shards: ShardSet
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Data:
    """The data of a stretch.

    Attributes:
        dataset: as it was for the run.
        sources: of each part, the number of its source in `Library.sources`.
    """

    dataset: Dataset
    sources: tuple[int, ...]


class Library:
    """Finds the data of runs: as it was, wherever it is now.

    Args:
        states: of the runs; what they call their data is where it is looked for.
        shards: where it is now, if elsewhere: for a run over a mixture a mixture, of which the names of parts count, and no others.
        lists: exclusion lists, where they have moved.

    Attributes:
        sources: all that was found so far.
        notes: what could not be known, for people.
    """

    def __init__(
        self,
        states: Sequence[State],
        shards: Shards | Mixture | None = None,
        lists: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        self.sources: list[Source] = []
        self.notes: list[str] = []
        self._lists = [os.fspath(path) for path in lists]
        self._places: dict[str, list[Shards]] = {}
        self._opened: dict[str, ShardSet | ShardifyError] = {}
        self._parts: dict[str, tuple[Part, int]] = {}
        if shards is not None:
            self._add(shards)
        for state in states:
            described = [state["data"], *(entry["data"] for entry in reversed(state["history"]))]
            for data in described:
                try:
                    self._add(redescribed(data["shards"]))
                except (KeyError, TypeError, ValueError, AttributeError, UsageError):
                    raise StateError("not a loader state: it does not say what its data is called") from None

    def data(self, stretch: Stretch) -> Data:
        """The data of a stretch.

        Raises:
            StateError: it is not to be found, with where it was looked for.
        """
        state, data = stretch.state, stretch.data
        entries = [entry for entry in state["parts"] if "repeat" in entry or "weight" in entry]
        if not entries:
            part, source = self._part("", state["fingerprint"], data)
            return Data(Dataset([part], block=_block(state), exclusions=data.get("exclusions")), (source,))
        check_parts(state["parts"], 0)
        found = [self._part(entry["name"], entry["fingerprint"], data) for entry in entries]
        dataset = Dataset(
            [part for part, _ in found],
            mixture=_mixture(entries),
            block=_block(state),
            exclusions=data.get("exclusions"),
        )
        return Data(dataset, tuple(source for _, source in found))

    def _add(self, shards: Shards | Mixture) -> None:
        named: Mapping[str, Shards] = shards.shards if isinstance(shards, Mixture) else {"": shards}
        for name, place in named.items():
            known = self._places.setdefault(name, [])
            if place not in known:
                known.append(place)

    def _part(self, name: str, fingerprint: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[Part, int]:
        key = repr((name, sorted(fingerprint.items(), key=str), data.get("exclusions")))
        if key not in self._parts:
            source, shards = self._find(name, fingerprint)
            if name not in self.sources[source].names:
                self.sources[source].names.append(name)
            part = Part(name, shards, _subset(shards, fingerprint), self._excluded(shards, data))
            if part.fingerprint != fingerprint:
                raise StateError(
                    f"{_named(name)}: split= or max_samples= choose other samples than they did for the run; are the sidecars others?"
                )
            self._parts[key] = part, source
        return self._parts[key]

    def _find(self, name: str, fingerprint: Mapping[str, Any]) -> tuple[int, ShardSet]:
        """The number of a source, and those of its shards that the fingerprint is of."""
        for number, source in enumerate(self.sources):
            if (shards := _as_it_was(source.shards, fingerprint)) is not None:
                return number, shards
        reasons = []
        for place in self._places.get(name, []):
            opened = self._open(place)
            if isinstance(opened, ShardifyError):
                reasons.append(str(opened))
            elif (shards := _as_it_was(opened, fingerprint)) is None:
                reasons.append(f"{_shown(place)}: other shards than the run's")
            else:
                self.sources.append(Source(_shown(place), opened))
                return len(self.sources) - 1, shards
        count, samples = fingerprint.get("shards"), fingerprint.get("samples")
        raise StateError(
            f"{_named(name)}, {count} shards of {samples} samples, not found: {'; '.join(reasons) or 'nothing says where they are'}. Say where the"
            " shards are now: --shards, or shards= in Python"
        )

    def _open(self, place: Shards) -> ShardSet | ShardifyError:
        name = repr(place)
        if name not in self._opened:
            try:
                self._opened[name] = open_shards(place)
            except ShardifyError as error:
                self._opened[name] = error
        return self._opened[name]

    def _excluded(self, shards: ShardSet, data: Mapping[str, Any]) -> IntArray:
        """The numbers of the samples that a run's list excluded; none where it cannot be known, with a note."""
        digest = data.get("exclusions")
        if digest is None:
            return np.zeros(0, np.int64)
        if (kept := kept_excluded(shards, digest)) is not None:
            return kept
        for path in (*self._lists, data.get("exclude")):
            try:
                exclusions = read_exclusions(str(path))
            except ShardifyError:
                continue
            if exclusions.fingerprint == digest:
                return find_excluded(shards, exclusions).samples
        note = f"the exclusion list {data.get('exclude')} (xxh3_128 {digest}) is not on this machine as the run had it: what it excluded counts as seen"
        if note not in self.notes:
            self.notes.append(note)
        return np.zeros(0, np.int64)


def planner_of(
    stretch: Stretch, dataset: Dataset, text: CountedText | None = None, image: TiledFit | None = None
) -> Planner:
    """The planner of a stretch, of rank 0, without skips.

    Args:
        stretch: of a run.
        dataset: its data.
        text: the run's text transform, where token counts are needed and not kept on this machine.
        image: the run's image transform, likewise for tiles.

    Raises:
        StateError: settings that are none.
        UsageError: lengths are needed that are not here.
    """
    state, settings = stretch.state, stretch.state["settings"]
    try:
        order = OrderSettings(
            settings["shuffle"], state["seed"], state["lanes"], settings["block"], settings["window"]
        )
        order.order(0)
        batching = make_batching(
            rank=0,
            **stretch.run,
            group_by=settings["group_by"],
            pack_tokens=settings["pack_tokens"],
            max_tokens=settings["max_tokens"],
            max_tiles=settings["max_tiles"],
            # plain batches have none
            **({} if settings["plan_window"] is None else {"plan_window": settings["plan_window"]}),
        )
        counted, image_tokens = settings["lengths"], settings["image_tokens"] or 1
    except KeyError as error:
        raise StateError(f"not a loader state: its settings lack {error}") from None
    except UsageError as error:
        raise StateError(f"not a loader state: {error}") from None
    if counted in (None, "words"):
        lengths = word_lengths(dataset, image_tokens=image_tokens)
    elif text is None:
        lengths = kept_lengths(dataset, counted, image_tokens=image_tokens)
    elif text.fingerprint == counted:
        lengths = token_lengths(dataset, text, image_tokens=image_tokens)
    else:
        raise UsageError(
            f"text= makes other tokens (fingerprint {text.fingerprint}) than the run's ({counted})"
        )
    measure: Measure = lengths.measure
    tiled = settings.get("tiles")
    if tiled is not None and image is not None and image.fingerprint != tiled:
        raise UsageError(
            f"image= makes other tiles (fingerprint {image.fingerprint}) than the run's ({tiled})"
        )
    if tiled is not None:
        tiles = kept_tiles(dataset, tiled) if image is None else count_tiles(dataset, image)
        measure = tiles.instead_of_images(measure)
    return Planner(dataset, dataset.course(order), batching, measure, state["seed"])


def state_before(planner: Planner, state: State, step: int) -> State:
    """The state at which a run of this plan has done `step` steps, skipped ones included; from an earlier state on.

    Raises:
        StateError: the plan has no such step: its epochs are empty.
    """
    while state["step"] < step:
        if isinstance(planner.batching, PlainBatches):
            after = _plain_ahead(planner, planner.batching, state, step)
        else:
            after = next(
                (after for _, after in planner.steps(state) if after["step"] == step or _ended(after, state)),
                None,
            )
        state = _not_for_ever(planner, state, after)
    return state


def _ended(after: State, state: State) -> bool:
    return bool(after["epoch"] > state["epoch"])


def _plain_ahead(planner: Planner, batching: PlainBatches, state: State, step: int) -> State | None:
    """As far ahead as `step` and the epoch allow; None when there is no batch left."""
    cursor = Cursor.from_state(state)
    left = batching.count(planner.view(state), cursor)
    steps = min(left, step - state["step"])
    if steps == 0:
        return None
    if steps == left:
        return {**planner.next_epoch(state), "step": state["step"] + steps}
    position = cursor.position + steps * batching.global_batch_size
    return {**state, "position": position, "step": state["step"] + steps}


def _not_for_ever(planner: Planner, state: State, after: State | None) -> State:
    """`after`, or the beginning of the next epoch, which must have batches."""
    if after is not None:
        return after
    after = planner.next_epoch(state)
    if planner.batching.count(planner.view(after), Cursor.from_state(after)) == 0:
        raise StateError(
            f"this run has no step {state['step'] + 1}: no batch is left, and the next epoch has none"
        )
    return after


def step_of(planner: Planner, state: State, rank: int) -> tuple[IntArray, IntArray]:
    """The positions and rows that the batch after a state has on a rank; int64 [S] both, -1 for fillers."""
    own = replace(planner, batching=planner.batching.of_rank(rank))
    positions, _ = next(own.steps(state))
    return positions.positions, positions.rows


@dataclass(frozen=True, slots=True, eq=False)
class Consumed:
    """Some of what steps consumed, on all ranks.

    Attributes:
        order: of the epoch.
        epoch: its number.
        positions: int64 [n], without fillers.
        steps: int64 [n], the step of each, counted from 0.
    """

    order: EpochOrder
    epoch: int
    positions: IntArray
    steps: IntArray


def walk(planner: Planner, state: State, end: int) -> Iterator[Consumed]:
    """All that is consumed from a state to step `end`, skipped steps included, in pieces of a bounded size.

    Raises:
        StateError: the plan does not have so many steps.
    """
    while state["step"] < end:
        if isinstance(planner.batching, PlainBatches):
            after = _plain_ahead(planner, planner.batching, state, end)
            if after is not None:
                yield from _walk_plain(planner, planner.batching, state, after)
        else:
            after = yield from _walk_windows(planner, state, end)
        state = _not_for_ever(planner, state, after)


def _walk_plain(planner: Planner, batching: PlainBatches, state: State, after: State) -> Iterator[Consumed]:
    order, begin = planner.order(state), int(state["position"])
    last = begin + (after["step"] - state["step"]) * batching.global_batch_size
    for first in range(begin, min(last, order.length), _CHUNK):
        positions = np.arange(first, min(first + _CHUNK, last, order.length), dtype=np.int64)
        steps = state["step"] + (positions - begin) // batching.global_batch_size
        yield Consumed(order, state["epoch"], positions, steps)


def _walk_windows(planner: Planner, state: State, end: int) -> Generator[Consumed, None, State | None]:
    """Returns the state after its last step; None when there was none."""
    order = planner.order(state)
    kept: list[IntArray] = []
    steps: list[int] = []
    after = None

    def gathered() -> Consumed:
        sizes = [len(positions) for positions in kept]
        return Consumed(
            order, state["epoch"], np.concatenate(kept), np.repeat(np.array(steps, np.int64), sizes)
        )

    size = 0
    for positions, after in _global_steps(planner, state):
        kept.append(positions[positions != FILLER])
        steps.append(after["step"] - 1)
        size += len(kept[-1])
        if size >= _CHUNK:
            yield gathered()
            kept, steps, size = [], [], 0
        if after["step"] == end:
            break
    if kept:
        yield gathered()
    return after


def _global_steps(planner: Planner, state: State) -> Iterator[tuple[IntArray, State]]:
    """The steps left in an epoch: positions on all ranks, with fillers, and the state after each."""
    batching = planner.batching
    assert isinstance(batching, WindowBatches)
    if not batching.plan.budget:
        # what a global batch holds does not depend on the world that shares it
        alone = replace(planner, batching=replace(batching, rank=0, world_size=1))
        for positions, after in alone.steps(state):
            yield positions.positions, after
        return
    ranks = [
        replace(planner, batching=batching.of_rank(rank)).steps(state) for rank in range(batching.world_size)
    ]
    for step in zip(*ranks, strict=True):
        yield np.concatenate([positions.positions for positions, _ in step]), step[0][1]


def _block(state: State) -> int:
    settings = state["settings"]
    try:
        return 1 if settings["shuffle"] == "full" else int(settings["block"])
    except (KeyError, TypeError, ValueError):
        raise StateError("not a loader state: its settings lack shuffle or block") from None


def _mixture(entries: Sequence[Mapping[str, Any]]) -> Mixture:
    weights = "weight" in entries[0]
    try:
        rates = {entry["name"]: ("", entry["weight" if weights else "repeat"]) for entry in entries}
        return Mixture(rates, weights=weights, samples=entries[0]["of"] if weights else None)
    except (KeyError, UsageError) as error:
        raise StateError(f"not a state of a mixture: {error}") from None


def _subset(shards: ShardSet, fingerprint: Mapping[str, Any]) -> Subset:
    chosen = fingerprint.get("chosen") or {}
    subset = EVERYTHING
    if "split" in chosen:
        subset = choose_side(shards, chosen["split"], chosen.get("validation"))
    if "max_samples" in chosen:
        subset = choose_some(subset, len(shards.index), chosen["max_samples"], shards.fingerprint)
    return subset


def _as_it_was(shards: ShardSet, fingerprint: Mapping[str, Any]) -> ShardSet | None:
    """Those of the shards that a fingerprint is of: the first ones; None if they are others."""
    count = fingerprint.get("shards")
    if not isinstance(count, int) or not 0 <= count <= len(shards.shards):
        return None
    before = shards.prefix(count)
    bare = {name: value for name, value in fingerprint.items() if name != "chosen"}
    return before if before.fingerprint == bare else None


def _named(name: str) -> str:
    return f"the shards of part {name!r}" if name else "the shards of the run"


def _shown(place: Shards) -> str:
    places = [place] if isinstance(place, str | os.PathLike) else list(place)
    return ", ".join(shown(os.fspath(one)) for one in places)
