"""Asking the past of a run: what a step saw, and what a model was trained on. Exact, by making the run's plan again out of its state.

A step is numbered as the state counts it: the batch after which ``batch.state["step"] == k`` is step k, so the first one is step 1.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from loaders.arguments import integer
from loaders.batching import FILLER, IntArray
from loaders.dataset import Dataset
from loaders.exclusions import find_hits
from loaders.history import (
    Library,
    Source,
    Stretch,
    check_past,
    continued,
    is_skipped,
    planner_of,
    state_before,
    step_of,
    stretches_of,
    walk,
)
from loaders.lengths import CountedText
from loaders.mixture import Mixture, Shards
from loaders.state import State
from loaders.tiles import TiledFit
from shardify.errors import StateError, UsageError
from shardify.format.exclude import Entry, Exclusions, parse_entry, read_exclusions
from shardify.format.ids import same_id
from shardify.format.shards import ShardFile, local_sidecars
from shardify.format.sidecar import read_sidecar


@dataclass(frozen=True, slots=True)
class StepSample:
    """A sample of a step.

    Attributes:
        rank: that saw it.
        row: of the batch on that rank.
        position: in the epoch.
        key: as in `Batch.keys`: ``part/key`` in a mixture.
        id: the record's, as JSON text; None without one.
        shard: path or URL.
        offset: its first byte in the shard; in ``.tar.zst``, of its frame.
        size: bytes.
        words: whitespace words over all turns.
        images: how many.
        excluded: named by the run's exclusion list: a filler stood in its place.
    """

    rank: int
    row: int
    position: int
    key: str
    id: str | None
    shard: str
    offset: int
    size: int
    words: int
    images: int
    excluded: bool


@dataclass(frozen=True, slots=True)
class StepSamples:
    """What a step saw.

    Attributes:
        step: its number: the state after it has this step (or a later one, when steps were skipped behind it).
        epoch: it belongs to, from 0.
        world_size: ranks of the run at that time.
        global_batch_size: over all ranks; None where a budget alone made the batches.
        samples: by rank, as they stand in the batch; without those that are not of the rank asked for.
        fillers: rows without a sample.
        skipped: the steps from..to, counted from 1, that were left out and this one with them; None when it was handed out. There are no samples then.
        future: it lies after the state, and is what the run will do if it goes on as it was.
        notes: what could not be known.
    """

    step: int
    epoch: int
    world_size: int
    global_batch_size: int | None
    samples: tuple[StepSample, ...]
    fillers: int
    skipped: tuple[int, int] | None
    future: bool
    notes: tuple[str, ...]


def samples_at(
    state: State,
    step: int,
    rank: int | None = None,
    *,
    shards: Shards | Mixture | None = None,
    text: CountedText | None = None,
    image: TiledFit | None = None,
) -> StepSamples:
    """The samples that a step of a run saw.

    Args:
        state: of the run, from any later time: `StreamingLoader.state_dict`, or a batch's.
        step: k for the batch after which ``batch.state["step"] == k``. One beyond the state's is planned on, as a run that goes on
            unchanged will do it.
        rank: one of them; None (default) for all.
        shards: where the data is now, if not where the run found it; a `Mixture` for a run over one.
        text: the run's text transform, needed where batches depend on tokens whose counts are not on this machine.
        image: the run's image transform, likewise for `max_tiles`.

    Raises:
        StateError: no state, or the data is not that of the run.
        UsageError: there is no such step or rank, or token counts are missing.
    """
    state = check_past(state)
    integer("step", step)
    if step < 1:
        raise UsageError(f"step {step}: steps are counted from 1, as batch.state['step'] counts them")
    library = Library([state], shards)
    notes = []
    skipped = is_skipped(state, step - 1)
    if skipped is not None and step == skipped[1] and skipped[0] > 0:
        # the state after the last batch before a skip is already behind the skip
        step = skipped[0]
        notes.append(f"steps {skipped[0] + 1} to {skipped[1]} were skipped; this is the batch before them")
        skipped = is_skipped(state, step - 1)
    future = step > state["step"]
    stretch = (
        continued(state)
        if future
        else next(stretch for stretch in stretches_of(state) if stretch.begin < step <= stretch.end)
    )
    if rank is not None and not 0 <= integer("rank", rank) < stretch.ranks:
        raise UsageError(f"rank {rank}: the run had ranks 0 to {stretch.ranks - 1} at step {step}")
    data = library.data(stretch)
    planner = planner_of(stretch, data.dataset, text, image)
    before = state_before(planner, stretch.state, step - 1)
    if not planner.count(before):
        before = planner.next_epoch(before)
        if not planner.count(before):
            raise UsageError(f"step {step}: the run has no such step, its epochs have no batches")
    samples: list[StepSample] = []
    fillers = 0
    if skipped is None:
        ranks = range(stretch.ranks) if rank is None else [rank]
        planned = [step_of(planner, before, number) for number in ranks]
        samples = _located(data.dataset, planner.order(before), list(zip(ranks, planned, strict=True)))
        fillers = sum(int(np.count_nonzero(positions == FILLER)) for positions, _ in planned)
    return StepSamples(
        step=step,
        epoch=before["epoch"],
        world_size=stretch.ranks,
        global_batch_size=stretch.run["global_batch_size"],
        samples=tuple(samples),
        fillers=fillers,
        skipped=None if skipped is None else (skipped[0] + 1, skipped[1]),
        future=future,
        notes=(*notes, *library.notes),
    )


def _located(
    dataset: Dataset, order: Any, planned: list[tuple[int, tuple[IntArray, IntArray]]]
) -> list[StepSample]:
    ranks = np.concatenate([np.full(len(positions), rank) for rank, (positions, _) in planned])
    positions = np.concatenate([positions for _, (positions, _) in planned])
    rows = np.concatenate([rows for _, (_, rows) in planned])
    real = positions != FILLER
    ranks, positions, rows = ranks[real], positions[real], rows[real]
    flat = order.samples(positions)
    index = dataset.rows(flat)
    names = _names(dataset, flat, index.shard)
    return [
        StepSample(
            rank=rank,
            row=row,
            position=position,
            key=key,
            id=id_,
            shard=dataset.paths[shard],
            offset=offset,
            size=size,
            words=words,
            images=images,
            excluded=excluded,
        )
        for rank, row, position, (key, id_), shard, offset, size, words, images, excluded in zip(
            ranks.tolist(),
            rows.tolist(),
            positions.tolist(),
            names,
            index.shard.tolist(),
            index.offset.tolist(),
            index.size.tolist(),
            index.words.tolist(),
            index.images.tolist(),
            index.excluded.tolist(),
            strict=True,
        )
    ]


def _names(dataset: Dataset, samples: IntArray, shards: IntArray) -> list[tuple[str, str | None]]:
    """Key and id of samples, int64 [n] flat numbers, given the shard of each; from the sidecars."""
    names: list[tuple[str, str | None]] = [("", None)] * len(samples)
    parts = dataset.part_of(samples)
    first = np.cumsum([0, *(len(part.shards.shards) for part in dataset.parts)])
    there = np.unique(shards).tolist()
    for shard, sidecar in zip(there, local_sidecars([dataset.files[n] for n in there]), strict=True):
        here = np.flatnonzero(shards == shard)
        number = int(parts[here[0]])
        part = dataset.parts[number]
        stored = part.stored(samples[here] - dataset.starts[number])
        rows = stored - part.shards.starts[shard - first[number]]
        for place, (key, id_) in zip(
            here.tolist(), _keys_and_ids(dataset.files[shard], sidecar, rows), strict=True
        ):
            names[place] = dataset.prefixes[number] + key, id_
    return names


def _keys_and_ids(shard: ShardFile, sidecar: str, rows: IntArray) -> list[tuple[str, str | None]]:
    table = read_sidecar(sidecar, ("key", "id"))
    if table.num_rows != shard.samples:
        raise StateError(
            f"{sidecar}: {table.num_rows} samples, but {shard.path} has {shard.samples} in the index"
        )
    some = table.take(rows)
    return list(zip(some["key"].to_pylist(), some["id"].to_pylist(), strict=True))


@dataclass(frozen=True, slots=True)
class ConsumedRun:
    """What one state says of its run.

    Attributes:
        steps: that were handed out, over all stretches.
        samples: that were handed out in them.
        excluded: samples in whose place fillers stood.
        skipped: (steps, samples) that were left out.
        epochs: finished.
        part_of: the number of another state whose run goes on from this one: it is counted there, and not here. None when it is counted.
    """

    steps: int
    samples: int
    excluded: int
    skipped: tuple[int, int]
    epochs: int
    part_of: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ConsumedPart:
    """What was consumed of one data set.

    Attributes:
        names: of it in mixtures; empty where it was a data set alone.
        place: where its shards were found.
        counts: unsigned integers [samples as stored], how often each was handed out.
        histogram: times -> how many samples were handed out so often; those that took no part count as 0 times.
        excluded: how many of its samples stood in the order as fillers.
    """

    names: tuple[str, ...]
    place: str
    counts: npt.NDArray[Any]
    histogram: Mapping[int, int]
    excluded: int

    @property
    def seen(self) -> int:
        """Samples that were handed out at least once."""
        return sum(samples for times, samples in self.histogram.items() if times)

    @property
    def total(self) -> int:
        """How often any was handed out."""
        return sum(times * samples for times, samples in self.histogram.items())


@dataclass(frozen=True, slots=True)
class SampleTrace:
    """Where a sample was met.

    Attributes:
        part: number of its data set in `Consumed.parts`.
        key: in its shard.
        id: the record's, as JSON text.
        shard: path or URL.
        steps: (number of the state, step), in order, where it was handed out.
        excluded: likewise, where a filler stood in its place.
        skipped: likewise, where the step was left out.
    """

    part: int
    key: str
    id: str | None
    shard: str
    steps: tuple[tuple[int, int], ...]
    excluded: tuple[tuple[int, int], ...]
    skipped: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """What became of an id, or of an entry of a list.

    Attributes:
        entry: as it was given.
        samples: that it names, in all data sets that were used.
    """

    entry: str
    samples: tuple[SampleTrace, ...]

    @property
    def times(self) -> int:
        """How often any of them was handed out; 0 proves that none was."""
        return sum(len(sample.steps) for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Consumed:
    """What a model was trained on: handed out by the loader up to each state.

    Attributes:
        runs: of each state, in the order given.
        parts: the data sets.
        traces: of the ids, then of the list's entries, in their order.
        notes: what could not be known.
    """

    runs: tuple[ConsumedRun, ...]
    parts: tuple[ConsumedPart, ...]
    traces: tuple[Trace, ...]
    notes: tuple[str, ...]


def consumed(
    states: Sequence[State],
    *,
    ids: Iterable[str] = (),
    exclude: str | os.PathLike[str] | None = None,
    shards: Shards | Mixture | None = None,
    text: CountedText | None = None,
    image: TiledFit | None = None,
) -> Consumed:
    """What a model was trained on, how often, and where.

    All stretches of all runs are planned again: skipped steps and excluded samples count as not seen. A sample that could not be read or decoded, or
    that `transform` left out, is counted although a filler came in its place; which these were is in the run's log alone.

    Args:
        states: one of each stage. Of two states of one run the earlier one is not counted again.
        ids: to be traced: text as it stands in the record, or JSON text in quotes; ``5`` is the number and the text.
        exclude: a list, each entry of which is traced: ids, URLs (of local shards), image hashes (docs/reshard.md).
        shards: where the data is now, if not where the runs found it.
        text: the runs' text transform, as for `samples_at`.
        image: the runs' image transform, likewise.

    Raises:
        StateError: no states, or the data is not that of the runs.
        UsageError: token counts are missing, or the list asks for what remote shards cannot tell.
        SourceError: the list cannot be read.
    """
    states = [check_past(state) for state in states]
    if not states:
        raise UsageError("no checkpoint is given")
    library = Library(states, shards, [] if exclude is None else [exclude])
    wanted = _Wanted.of(ids, exclude)
    contained = [_goes_on_in(number, states) for number in range(len(states))]
    plans = [
        (number, stretch, library.data(stretch))
        for number, state in enumerate(states)
        if contained[number] is None
        for stretch in stretches_of(state)
        if stretch.end > stretch.begin
    ]
    watched = [_Watched.of(source, wanted) for source in library.sources]
    tallies = [
        _Tally(len(source.shards.index), watch)
        for source, watch in zip(library.sources, watched, strict=True)
    ]
    figures = [_Figures() for _ in states]
    for number, stretch, data in plans:
        planner = planner_of(stretch, data.dataset, text, image)
        following = _after(states[number], stretch)
        samples = 0
        for piece in walk(planner, stretch.state, stretch.end):
            samples += len(piece.positions)
            flat = piece.order.samples(piece.positions)
            skipped = _in_stretches(piece.steps, states[number]["skipped"])
            parts = data.dataset.part_of(flat)
            for place in np.unique(parts).tolist():
                own = parts == place
                part = data.dataset.parts[place]
                stored = part.stored(flat[own] - data.dataset.starts[place])
                excluded = _is_in(stored, part.excluded)
                tallies[data.sources[place]].add(
                    stored, number, piece.steps[own] + 1, skipped[own], excluded & ~skipped[own]
                )
                figures[number].add(skipped[own], excluded)
        if samples != following - stretch.state["samples"]:
            raise StateError(
                f"between steps {stretch.begin} and {stretch.end} the run had {following - stretch.state['samples']} samples, planned again"
                f" {samples}: the data or its lengths are not those of the run"
            )
    return Consumed(
        runs=tuple(
            figure.run(state, part_of)
            for figure, state, part_of in zip(figures, states, contained, strict=True)
        ),
        parts=tuple(tally.part(source) for tally, source in zip(tallies, library.sources, strict=True)),
        traces=wanted.traces(library.sources, watched, tallies),
        notes=tuple(library.notes),
    )


def _after(state: State, stretch: Stretch) -> int:
    """Samples of the run up to the end of a stretch."""
    after = next((entry for entry in state["history"] if entry["step"] == stretch.end), state)
    return int(after["samples"])


def _in_stretches(steps: IntArray, stretches: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(steps), np.bool_)
    for begin, end in stretches:
        found |= (steps >= begin) & (steps < end)
    return found


def _is_in(values: IntArray, ascending: IntArray) -> npt.NDArray[np.bool_]:
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    found: npt.NDArray[np.bool_] = ascending[at] == values
    return found


def _goes_on_in(number: int, states: Sequence[State]) -> int | None:
    """The number of another state whose run went on from this one; of equal states, the first."""
    for other, state in enumerate(states):
        if other == number or not _went_on(states[number], state):
            continue
        if other < number or not _went_on(state, states[number]):
            return other
    return None


def _went_on(one: State, other: State) -> bool:
    """Whether a run came through state `one` on its way to `other`."""
    if any(one[name] != other[name] for name in ("seed", "lanes", "settings")) or one["step"] > other["step"]:
        return False
    # an entry that took no step is gone from later states
    before = [entry for entry in one["history"] if entry["step"] < one["step"]]
    if len(before) > len(other["history"]):
        return False
    beyond = other["history"][len(before) :]
    same = all(
        {**entry, "data": entry["data"].get("exclusions")}
        == {**there, "data": there["data"].get("exclusions")}
        for entry, there in zip(before, other["history"], strict=False)
    )
    step = one["step"]
    skipped = [
        [(begin, min(end, step)) for begin, end in state["skipped"] if begin < step] for state in (one, other)
    ]
    return same and (not beyond or beyond[0]["step"] >= step) and skipped[0] == skipped[1]


@dataclass(slots=True)
class _Figures:
    """Samples of a run."""

    samples: int = 0
    skipped: int = 0
    excluded: int = 0

    def add(self, skipped: npt.NDArray[np.bool_], excluded: npt.NDArray[np.bool_]) -> None:
        left_out = int(np.count_nonzero(skipped))
        fillers = int(np.count_nonzero(excluded & ~skipped))
        self.skipped += left_out
        self.excluded += fillers
        self.samples += len(skipped) - left_out - fillers

    def run(self, state: State, part_of: int | None) -> ConsumedRun:
        skipped = sum(max(0, min(end, state["step"]) - begin) for begin, end in state["skipped"])
        if part_of is not None:
            return ConsumedRun(0, 0, 0, (0, 0), 0, part_of)
        steps = state["step"] - skipped
        return ConsumedRun(steps, self.samples, self.excluded, (skipped, self.skipped), state["epoch"])


@dataclass(slots=True, eq=False)
class _Tally:
    """How often each sample of a source was handed out, and where those that are watched were met."""

    size: int
    watched: "_Watched"
    counts: npt.NDArray[Any] = field(init=False)
    named: npt.NDArray[np.bool_] | None = None  # that stood as excluded
    met: list[tuple[int, IntArray, IntArray, IntArray]] = field(
        default_factory=list
    )  # run; sample, step, how

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.size, np.uint8)

    def add(
        self,
        stored: IntArray,
        run: int,
        steps: IntArray,
        skipped: npt.NDArray[np.bool_],
        excluded: npt.NDArray[np.bool_],
    ) -> None:
        seen = stored[~skipped & ~excluded]
        samples, times = np.unique(seen, return_counts=True)
        if len(samples):
            after = self.counts[samples].astype(np.int64) + times
            while after.max() > np.iinfo(self.counts.dtype).max:
                self.counts = self.counts.astype(f"u{2 * self.counts.itemsize}")
            self.counts[samples] = after
        if excluded.any():
            if self.named is None:
                self.named = np.zeros(self.size, np.bool_)
            self.named[stored[excluded]] = True
        here = np.flatnonzero(_is_in(stored, self.watched.samples))
        if len(here):
            how = np.where(skipped[here], _SKIPPED, np.where(excluded[here], _EXCLUDED, _SEEN))
            self.met.append((run, stored[here], steps[here], how))

    def part(self, source: Source) -> ConsumedPart:
        times, samples = np.unique(self.counts, return_counts=True)
        return ConsumedPart(
            names=tuple(name for name in source.names if name),
            place=source.place,
            counts=self.counts,
            histogram=dict(zip(times.tolist(), samples.tolist(), strict=True)),
            excluded=0 if self.named is None else int(np.count_nonzero(self.named)),
        )

    def meetings(self) -> dict[int, tuple[list[tuple[int, int]], ...]]:
        """Of each watched sample: where it was seen, excluded, skipped."""
        found: dict[int, tuple[list[tuple[int, int]], ...]] = {}
        for run, samples, steps, hows in self.met:
            for sample, step, how in zip(samples.tolist(), steps.tolist(), hows.tolist(), strict=True):
                found.setdefault(sample, ([], [], []))[how].append((run, step))
        return found


_SEEN, _EXCLUDED, _SKIPPED = range(3)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Entries to be traced: what each may name is a key with a number, since several entries may name the same."""

    entries: list[str]
    keys: Exclusions  # whose "lines" are numbers of keys
    entries_of: list[list[int]]  # of each key

    @classmethod
    def of(cls, ids: Iterable[str], exclude: str | os.PathLike[str] | None) -> "_Wanted":
        entries = [(text, Entry(_spelled(text))) for text in ids]
        if exclude is not None:
            listed = read_exclusions(exclude)
            entries += [
                (text, parse_entry(text, f"{os.fspath(exclude)}: line {line}"))
                for line, text in listed.entries.items()
            ]
        numbers: dict[tuple[str, Any], int] = {}
        entries_of: list[list[int]] = []
        for number, (text, entry) in enumerate(entries):
            keys: list[tuple[str, Any]] = [("ids", id_) for id_ in entry.ids]
            keys += [("urls", text)] if entry.url else []
            keys += [("xxh3_64", entry.xxh3_64)] if entry.xxh3_64 is not None else []
            keys += [("sha256", entry.sha256)] if entry.sha256 is not None else []
            for key in keys:
                place = numbers.setdefault(key, len(numbers))
                entries_of += [[]] if place == len(entries_of) else []
                entries_of[place].append(number)
        kinds: dict[str, dict[Any, int]] = {"ids": {}, "urls": {}, "xxh3_64": {}, "sha256": {}}
        for (kind, key), place in numbers.items():
            kinds[kind][key] = place
        names = {place: str(key) for (_, key), place in numbers.items()}
        name = "" if exclude is None else os.path.basename(os.fspath(exclude))
        return cls([text for text, _ in entries], Exclusions(name, "", names, **kinds), entries_of)

    def traces(
        self, sources: Sequence[Source], watched: Sequence["_Watched"], tallies: Sequence[_Tally]
    ) -> tuple[Trace, ...]:
        found: list[list[SampleTrace]] = [[] for _ in self.entries]
        for part, (source, watch, tally) in enumerate(zip(sources, watched, tallies, strict=True)):
            meetings = tally.meetings()
            for (sample, key, id_, shard), entries in watch.named(source):
                seen, excluded, skipped = (
                    tuple(sorted(places)) for places in meetings.get(sample, ([], [], []))
                )
                trace = SampleTrace(part, key, id_, shard, seen, excluded, skipped)
                for entry in entries:
                    found[entry].append(trace)
        return tuple(Trace(entry, tuple(samples)) for entry, samples in zip(self.entries, found, strict=True))


def _spelled(text: str) -> tuple[str, ...]:
    """An id as JSON text: one in quotes is that already; a number may be either."""
    spellings = [] if text.startswith('"') else [json.dumps(text, ensure_ascii=False)]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
        if not spellings:
            raise UsageError(f"{text}: an id in quotes is JSON text; this is not") from None
    if isinstance(value, str if text.startswith('"') else int | float) and not isinstance(value, bool):
        spellings.append(text)
    return tuple(dict.fromkeys(map(same_id, spellings)))


@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    """The samples of a source that are looked for.

    Attributes:
        samples: int64, ascending.
        entries: of each, the numbers of the entries that name it.
    """

    samples: IntArray
    entries: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, source: Source, wanted: _Wanted) -> "_Watched":
        if not wanted.entries:
            return cls(np.zeros(0, np.int64), ())
        samples, keys = find_hits(source.shards, wanted.keys)
        entries: dict[int, set[int]] = {}
        for sample, key in zip(samples.tolist(), keys.tolist(), strict=True):
            entries.setdefault(sample, set()).update(wanted.entries_of[key])
        named = tuple(tuple(sorted(found)) for found in entries.values())
        return cls(np.array(list(entries), np.int64), named)

    def named(self, source: Source) -> Iterator[tuple[tuple[int, str, str | None, str], tuple[int, ...]]]:
        """Each sample with its key, id and shard, and the entries that name it."""
        starts = source.shards.starts
        shards = np.searchsorted(starts, self.samples, "right") - 1
        there = np.unique(shards).tolist()
        files = [source.shards.shards[number] for number in there]
        for number, file, sidecar in zip(there, files, local_sidecars(files), strict=True):
            here = np.flatnonzero(shards == number)
            names = _keys_and_ids(file, sidecar, self.samples[here] - starts[number])
            for place, (key, id_) in zip(here.tolist(), names, strict=True):
                yield (int(self.samples[place]), key, id_, file.path), self.entries[place]
