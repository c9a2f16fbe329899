"""Exactly the promised samples, whatever is combined: over fake indexes by the hundred without reading data, and over real shards.

A chain of runs, each under another world and batch size, continues the state of the one before, from any step, to the end of an epoch. What
its ranks saw together must be what was promised, each time, with equal states and counts on all ranks.
"""

import base64
import json
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import ImageTransform, LlavaText, Mixture, StreamingLoader
from loaders.dataset import Dataset, Part
from loaders.lengths import Lengths
from loaders.subset import Subset, digest_of
from loaders.text import ByteTokenizer
from shardify.format.index import INDEX_DTYPE
from shardify.format.shards import ShardFile, ShardSet


@dataclass(frozen=True)
class Source:
    """A data set that is only an index: uneven shards, some of them empty, of text alone, single and several images."""

    cuts: tuple[int, ...]  # samples before each shard, and all of them
    index: np.ndarray
    tokens: np.ndarray  # int32 [N], -1 where the text fails
    chosen: np.ndarray | None  # the samples that take part
    excluded: np.ndarray

    def _repr_pretty_(self, printer, _cycle):
        printer.text(
            f"<{self.cuts[-1]} samples, of which {len(self.numbers())} take part, in {len(self.cuts) - 1} shards>"
        )

    def part(self, name="", shards=None):
        """The data set, or its first shards."""
        cuts = np.array(self.cuts[: None if shards is None else shards + 1], np.int64)
        files = tuple(
            ShardFile(f"{name}{number}.tar", "", int(size), int(size) * 1000, f"{number}")
            for number, size in enumerate(np.diff(cuts))
        )
        there = ShardSet(files, self.index[: cuts[-1]], cuts)
        excluded = self.excluded[self.excluded < cuts[-1]]
        if self.chosen is None:
            return Part(name, there, excluded=excluded)
        chosen = self.chosen[self.chosen < cuts[-1]]
        choice = {"split": "train", "samples": len(chosen), "digest": digest_of(chosen)}
        return Part(name, there, Subset(chosen, choice), excluded)

    def counts(self, shards=None):
        """Tokens of the samples that take part."""
        tokens = self.tokens[: self.cuts[-1] if shards is None else self.cuts[shards]]
        return tokens if self.chosen is None else tokens[self.chosen[self.chosen < len(tokens)]]

    def numbers(self, shards=None):
        """The samples that take part."""
        end = self.cuts[-1] if shards is None else self.cuts[shards]
        every = np.arange(end) if self.chosen is None else self.chosen[self.chosen < end]
        return every.tolist()


@st.composite
def sources(draw, most=5000, least=1):
    few = draw(st.integers(0, 11)) > 0  # many take their time
    number = draw(st.integers(least, min(most, 150) if few else most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inner = np.sort(rng.integers(0, number + 1, draw(st.integers(0, 39))))
    cuts = (0, *inner.tolist(), number)
    index = np.zeros(number, INDEX_DTYPE)
    index["shard"] = np.searchsorted(np.array(cuts), np.arange(number), "right") - 1
    index["size"] = rng.integers(1, 9, number) * 512
    for begin, end in pairwise(cuts):
        index["offset"][begin:end] = np.cumsum(index["size"][begin:end]) - index["size"][begin:end]
    share = draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))
    index["images"] = (rng.random(number) < share) * rng.integers(1, 5, number)
    index["words"] = rng.integers(0, draw(st.sampled_from([1, 9, 90])), number)
    tokens = rng.integers(0, 90, number).astype(np.int32)
    tokens[rng.random(number) < draw(st.sampled_from([0.0, 0.1]))] = -1
    chosen = None
    if draw(st.integers(0, 3)) == 0:
        taken = rng.random(number) < draw(st.sampled_from([0.3, 0.99]))
        taken[rng.integers(number)] = True
        chosen = np.flatnonzero(taken)
    excluded = np.flatnonzero(rng.random(number) < draw(st.sampled_from([0.0, 0.1])))
    return Source(cuts, index, tokens, chosen, excluded)


@st.composite
def orders(draw):
    return {
        "shuffle": draw(st.sampled_from(["block", "full", None])),
        "seed": draw(st.integers(-(2**62), 2**62)),
        "block": draw(st.sampled_from([1, 5, 32])),
        "window": draw(st.sampled_from([1, 8])),
    }


@st.composite
def plans(draw, *, plain=2):
    """Settings that a whole chain keeps; one in `plain` groups, packs and bounds nothing."""
    if draw(st.integers(1, plain)) == 1:
        return {}
    return {
        "group_by": draw(st.sampled_from([None, "length", "modality", "modality_length"])),
        "pack_tokens": draw(st.sampled_from([None, 50, 130])),
        "max_tokens": draw(st.sampled_from([None, None, 130, 700])),
        "max_tiles": draw(st.sampled_from([None, None, 1, 9])),
        "plan_window": draw(st.sampled_from([48, 150, 1000, 16384])),
        "image_tokens": draw(st.sampled_from([1, 20])),
    }


@st.composite
def shapes(draw, plan):
    """A world and a batch size of one run."""
    world = draw(st.sampled_from([1, 2, 2, 3, 4, 7]))
    budget = plan.get("max_tokens") is not None or plan.get("max_tiles") is not None
    if budget and draw(st.booleans()):
        return {"world": world}
    size = draw(st.integers(1, 48 // world) if plan else st.integers(1, 60))
    return {"world": world, "batch_size": size}


class Text:
    """Stands for a tokenizer; never called."""

    fingerprint = "made up"
    pad_token_id = 0


@contextmanager
def in_memory(parts, mixture=None, counts=()):
    """Loaders over indexes instead of shards."""

    def opened(_shards, *, block, **_):
        return Dataset(parts, mixture=mixture, block=block)

    def lengths(dataset, _text, *, image_tokens):
        return Lengths(dataset, tuple(counts), image_tokens)

    with (
        mock.patch("loaders.loader.open_dataset", opened),
        mock.patch("loaders.loader.token_lengths", lengths),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def made_ranks(shards, *, world, **options):
    return [
        StreamingLoader(shards, rank=rank, world_size=world, num_workers=0, text=Text(), **options)
        for rank in range(world)
    ]


def rest_of_epoch(ranks):
    """The steps left in the epoch, a list over ranks each, as `for` hands them out but not built; what ranks must agree about is checked."""
    count, epoch = len(ranks[0]), ranks[0].epoch
    assert {(len(loader), loader.epoch) for loader in ranks} == {(count, epoch)}
    if not count:
        for loader in ranks:
            loader._state = loader._planner.next_epoch(loader._state)
        return
    streams = [loader._planner.batches(loader._state) for loader in ranks]
    for left in range(count, 0, -1):
        step = [next(stream) for stream in streams]
        for loader, batch in zip(ranks, step, strict=True):
            loader._state = batch.state
        check_step(ranks, step)
        assert (ranks[0].epoch > epoch) == (left == 1)
        if left in (2, 3, 10, 100):
            assert {len(loader) for loader in ranks} == {left - 1}
        yield step


def check_step(ranks, step):
    state = step[0].state
    assert all(batch.state == state and batch.step == step[0].step for batch in step)
    assert state["step"] > step[0].step
    if (
        ranks[0]._planner.batching.settings["max_tokens"]
        is ranks[0]._planner.batching.settings["max_tiles"]
        is None
    ):
        assert len({int(batch.rows[-1]) for batch in step}) == 1
    for batch in step:
        real = batch.positions[batch.positions >= 0]
        assert len(batch.samples) == len(batch.index.offset) == len(real)
        assert batch.rows.tolist() == sorted(batch.rows.tolist())
        dataset = ranks[0]._dataset
        assert np.array_equal(batch.index.part, dataset.part_of(batch.samples))
        for number in np.unique(batch.index.part).tolist():
            part, own = dataset.parts[number], batch.index.part == number
            stored = part.stored(batch.samples[own] - dataset.starts[number])
            assert np.array_equal(batch.index.offset[own], part.shards.index["offset"][stored])
            assert np.array_equal(batch.index.excluded[own], np.isin(stored, part.excluded))
    group_by = ranks[0]._planner.batching.settings["group_by"]
    if group_by in ("modality", "modality_length"):
        assert len({bool(images) for batch in step for images in batch.index.images.tolist()}) <= 1


def seen(step):
    """(part, sample as stored) of all samples of a step; parts may come and go from run to run, their names stay."""
    return [sample for batch in step for sample in batch.samples.tolist()]


def named(ranks, samples):
    """Flat numbers as (name of the part, number in its shards)."""
    dataset = ranks[0]._dataset
    samples = np.array(samples, np.int64)
    which = dataset.part_of(samples)
    found = []
    for number in np.unique(which).tolist():
        part = dataset.parts[number]
        own = part.stored(samples[which == number] - dataset.starts[number])
        found += [(part.name, sample) for sample in own.tolist()]
    return found


def as_kept(state):
    """A state as a checkpoint keeps it."""
    text = json.dumps(state)
    return json.loads(text)


def take_up(ranks, state, *, after_use):
    """Load a state, also into loaders that were at something else."""
    for loader in ranks:
        if after_use:
            assert len(loader) >= 0
            for batch, _ in zip(loader._planner.batches(loader._state), range(2), strict=False):
                loader._state = batch.state
        if state is not None:
            loader.load_state_dict(as_kept(state))
    assert all(loader.state_dict() == ranks[0].state_dict() for loader in ranks)


def run_chain(data, make, plan, *, epochs, skips=False):
    """Runs under drawn shapes, the last one to the end of the last of some epochs.

    Args:
        data: hypothesis's.
        make: world, batch size and options -> the ranks of a run.
        plan: settings that all runs keep.
        epochs: that are finished.
        skips: leave stretches of steps out.

    Returns:
        What was handed out and what was skipped, both as `named`, each a Counter; and the last state.
    """
    state, used, left_out = None, Counter(), Counter()
    runs = data.draw(st.integers(0, 5))
    for number in range(runs, -1, -1):
        shape = data.draw(shapes(plan))
        skip = []
        if skips and data.draw(st.booleans()):  # whatever is left out, also before where it begins
            begin = (0 if state is None else state["step"]) + data.draw(st.integers(-3, 9))
            skip = [(max(begin, 0), max(begin, 0) + data.draw(st.integers(1, 12)))]
        ranks = make(**shape, **plan, skip=skip)
        take_up(ranks, state, after_use=data.draw(st.booleans()) and state is not None)
        whole = make(**shape, **plan) if skip else None
        if whole:
            take_up(whole, state, after_use=False)
        first = 0 if state is None else state["step"]
        steps = data.draw(st.integers(0, 2 * max(len(ranks[0]), 1))) if number else None
        own, done = {}, 0
        while ranks[0].epoch < epochs and (steps is None or done < steps):
            for step in rest_of_epoch(ranks):
                assert step[0].step not in own
                own[step[0].step] = seen(step)
                used.update(named(ranks, seen(step)))
                done += 1
                if done == steps:
                    break
        state = ranks[-1].state_dict()
        if whole:
            left_out.update(skipped_of(whole, own, first, state, skip))
        elif own:
            assert sorted(own) == list(range(min(own), max(own) + 1))
    return used, left_out, state


def skipped_of(whole, own, first, state, skip):
    """What a run with `skip` left out: of the same run without it, the steps that it did not hand out; all others must be the same."""
    left_out = []
    for loader in whole:
        assert loader._state["step"] == first
    while whole[0]._state["step"] < state["step"]:
        for step in rest_of_epoch(whole):
            number = step[0].step
            if any(begin <= number < end for begin, end in skip):
                assert number not in own
                left_out += named(whole, seen(step))
            else:
                assert own[number] == seen(step)
            if number + 1 == state["step"]:
                break
    told = {n for begin, end in state["skipped"] for n in range(begin, min(end, state["step"]))}
    assert {n for begin, end in skip for n in range(max(begin, first), min(end, state["step"]))} <= told
    assert not told & set(own)
    return left_out


@pytest.mark.long
@settings(max_examples=60)
@given(data=st.data())
def test_every_epoch_of_a_data_set_is_covered_exactly(data):
    source, order, plan = data.draw(sources()), data.draw(orders()), data.draw(plans())
    epochs = data.draw(st.integers(1, 2))
    with in_memory([source.part()], counts=[source.counts()]):

        def make(world, **options):
            return made_ranks("made", world=world, **options, **order)

        used, left_out, state = run_chain(data, make, plan, epochs=epochs, skips=data.draw(st.booleans()))
    whole = used + left_out
    finished = state["epoch"]  # more than were asked for, where a skipped stretch reaches beyond
    assert finished >= epochs
    if (finished, state["position"]) == (epochs, 0):
        assert whole == dict.fromkeys((("", number) for number in source.numbers()), epochs)
    assert len(json.dumps({**state, "history": []})) < 3000


RATES = ["1/3", "1/2", "2/3", "0.1", "1", "3/2", "2"]


@pytest.mark.long
@settings(max_examples=40)
@given(data=st.data())
def test_every_epoch_of_a_mixture_holds_its_shares(data):
    count = data.draw(st.integers(1, 4))
    made = {f"part{i}": data.draw(sources(most=400)) for i in range(count)}
    rates = {name: data.draw(st.sampled_from(RATES)) for name in made}
    order, plan, epochs = data.draw(orders()), data.draw(plans()), data.draw(st.integers(1, 3))
    mixture = Mixture({name: ("made", rate) for name, rate in rates.items()})
    parts = [source.part(name) for name, source in made.items()]
    with in_memory(parts, mixture, [source.counts() for source in made.values()]):

        def make(world, **options):
            return made_ranks(mixture, world=world, **options, **order)

        used, _, state = run_chain(data, make, plan, epochs=epochs)
    assert (state["epoch"], state["position"]) == (epochs, 0)
    for name, source in made.items():
        own = {sample: times for (part, sample), times in used.items() if part == name}
        numbers = source.numbers()
        assert sum(own.values()) == int(epochs * Fraction(rates[name]) * len(numbers))
        check_rounds(own, numbers)


def check_rounds(counts, numbers):
    """Nothing comes a second time before all else has come."""
    most = max(counts.values(), default=0)
    assert set(counts) <= set(numbers)
    assert all(counts.get(number, 0) >= most - 1 for number in numbers)


@pytest.mark.long
@settings(max_examples=40)
@given(data=st.data())
def test_what_is_dropped_is_all_that_is_missing(data):
    """With drop_last in some runs of a chain nothing comes twice, and without it all that is left comes."""
    source, order, plan = data.draw(sources(most=800)), data.draw(orders()), data.draw(plans())
    with in_memory([source.part()], counts=[source.counts()]):
        drops = []

        def make(world, **options):
            drops.append(drop := data.draw(st.booleans()))
            return made_ranks("made", world=world, drop_last=drop, **options, **order)

        used, _, state = run_chain(data, make, plan, epochs=1)
    assert state["epoch"] == 1
    assert max(used.values(), default=1) == 1
    if not any(drops):
        assert len(used) == len(source.numbers())


@pytest.mark.long
@settings(max_examples=40)
@given(data=st.data())
def test_a_data_set_may_grow_at_every_resume(data):
    """An epoch in progress is finished as it was; the next one is over all there is."""
    source = data.draw(sources(most=800))
    order, plan = data.draw(orders()), data.draw(plans())
    shards = len(source.cuts) - 1
    sizes = [*sorted(data.draw(st.lists(st.integers(0, shards), min_size=1, max_size=4))), shards]
    state, used, promised = None, Counter(), Counter()
    finished = 0
    for run, size in enumerate(sizes):
        with in_memory([source.part(shards=size)], counts=[source.counts(size)]):
            shape = data.draw(shapes(plan))
            ranks = made_ranks("made", **shape, **plan, **order)
            before = None if state is None else (state["epoch"], promised, any_begun(state))
            take_up(ranks, state, after_use=False)
            if before is None or not before[2]:
                promised = Counter(("", number) for number in source.numbers(size))
            last = run == len(sizes) - 1
            steps = None if last else data.draw(st.integers(0, 2 * max(len(ranks[0]), 1)))
            done, goal = 0, ranks[0].epoch + 2
            while ranks[0].epoch < goal and (steps is None or done < steps):
                for step in rest_of_epoch(ranks):
                    used.update(named(ranks, seen(step)))
                    done += 1
                    if done == steps:
                        break
                if ranks[0].epoch > finished and not any_begun(ranks[0]._state):
                    assert used == promised
                    finished = ranks[0].epoch
                    used, promised = Counter(), Counter(("", number) for number in source.numbers(size))
            state = ranks[0].state_dict()
    assert state["epoch"] == goal
    assert not used


def any_begun(state):
    return state["position"] > 0 or state["window"] > 0 or bool(state["legs"]) or state["offset"] > 0


@pytest.mark.long
@settings(max_examples=40)
@given(data=st.data())
def test_a_mixture_may_change_and_grow_at_every_resume(data):
    """Whatever its parts and their shares become: every part goes on where it was, and nothing of it is lost or comes twice."""
    names = ["a", "b", "c"]
    made = {name: data.draw(sources(most=300)) for name in names}
    order, plan = data.draw(orders()), data.draw(plans())
    state, used = None, Counter()
    sizes = {name: data.draw(st.integers(1, len(made[name].cuts) - 1)) for name in names}
    for name in names:  # no part is empty
        while not made[name].numbers(sizes[name]):
            sizes[name] += 1
    known = dict(sizes)
    for run in range(data.draw(st.integers(0, 4)), -1, -1):
        there = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        if state is not None and plan:
            there = sorted(
                {*there, *(entry["name"] for entry in state["parts"])}
            )  # see docs/order.md: packs are left
        if data.draw(st.integers(0, 3)) == 0:
            name = data.draw(st.sampled_from(there))
            sizes[name] = data.draw(st.integers(sizes[name], len(made[name].cuts) - 1))
        rates = {name: data.draw(st.sampled_from(RATES)) for name in there}
        mixture = Mixture({name: ("made", rate) for name, rate in rates.items()})
        parts = [made[name].part(name, sizes[name]) for name in there]
        with in_memory(parts, mixture, [made[name].counts(sizes[name]) for name in there]):
            ranks = made_ranks(mixture, **data.draw(shapes(plan)), **plan, **order)
            take_up(ranks, state, after_use=data.draw(st.booleans()) and state is not None)
            # the last one to an end of an epoch: inside one, two of a part's own epochs may be mixed
            steps = data.draw(st.integers(0, 2 * max(len(ranks[0]), 1))) if run else None
            done, goal = 0, ranks[0].epoch + data.draw(st.integers(1, 3))
            while ranks[0].epoch < goal and (steps is None or done < steps):
                for step in rest_of_epoch(ranks):
                    used.update(named(ranks, seen(step)))
                    done += 1
                    if done == steps:
                        break
            state = ranks[0].state_dict()
    for name in names:
        own = {sample: times for (part, sample), times in used.items() if part == name}
        old = made[name].numbers(known[name])
        entry = next((entry for entry in state["parts"] if entry["name"] == name), None)
        if entry is None:
            assert not own
            continue
        # of its own epochs all that are over were whole, and what came of later ones is all in the state
        assert all(own.get(sample, 0) >= entry["epoch"] for sample in old)
        if sizes[name] == known[name]:
            ahead = np.unpackbits(np.frombuffer(base64.b64decode(entry.get("taken", "")), np.uint8)).sum()
            assert sum(own.values()) == entry["epoch"] * len(old) + entry["position"] + ahead
        assert set(own) <= set(made[name].numbers(sizes[name]))


BAD = {3, 17, 40}  # no pictures
EXCLUDED = {5, 17, 30}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, made):
    """70 samples of up to three pictures in 6 shards, some of them bad; and 25 in another data set."""
    folder = tmp_path_factory.mktemp("exact")
    samples = [
        made.Made(
            [b"bad" if number in BAD else made.png(number + i) for i in range(images)],
            made.record(number, images),
        )
        for number, images in ((number, (1, 0, 2, 1, 3)[number % 5]) for number in range(70))
    ]
    made.write(folder / "whole", samples, shards=6)
    made.write(folder / "other", [made.ordinary(number) for number in range(25)], shards=2)
    (folder / "exclude.txt").write_text("".join(f"{number}\n" for number in sorted(EXCLUDED)))
    return folder


@settings(max_examples=12)
@given(data=st.data())
def test_real_shards_give_what_was_promised(shards, monkeypatch, data):
    """Batches as they are handed out, by workers too: samples that are good, bad and excluded are each accounted for once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(shards / "cache"))
    mixed = data.draw(st.booleans())
    place = shards / "whole"
    if mixed:
        place = Mixture(
            {"whole": (place, 1), "other": (shards / "other", data.draw(st.sampled_from(["1/2", 2])))}
        )
    options = {
        "image": ImageTransform(8),
        "text": LlavaText(ByteTokenizer()),
        "shuffle": data.draw(st.sampled_from(["block", "full"])),
        "plan_window": 40,
        "exclude": data.draw(st.sampled_from([None, shards / "exclude.txt"])),
        "split": data.draw(st.sampled_from([None, "train"])),
        "validation": 0.2,
        **data.draw(
            st.sampled_from(
                [
                    {},
                    {"pack_tokens": 700},
                    {"group_by": "modality_length"},
                    {"max_tokens": 2000, "max_tiles": 8},
                ]
            )
        ),
    }
    state, used, lost, excluded = None, Counter(), Counter(), 0
    for run in range(data.draw(st.integers(0, 2)), -1, -1):
        world, workers = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0, 0, 2]))
        size = data.draw(st.integers(1, 6))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # entries of the list that are on the other side
            ranks = [
                StreamingLoader(
                    place, batch_size=size, rank=rank, world_size=world, num_workers=workers, **options
                )
                for rank in range(world)
            ]
        for loader in ranks if state else ():
            loader.load_state_dict(as_kept(state))
        left = len(ranks[0])
        steps = data.draw(st.integers(0, left - 1)) if run else left
        for _, step in zip(range(steps), zip(*ranks, strict=True), strict=False):
            assert all(batch.state == step[0].state for batch in step)
            used.update(key for batch in step for key in batch.keys if key)
            lost.update(fault.key for batch in step for fault in batch.faults)
        excluded += sum(loader.report().excluded for loader in ranks)
        state = ranks[0].state_dict()
        dataset = ranks[0]._dataset
        for loader in ranks:
            loader.close()
    assert (state["epoch"], state["position"]) == (1, 0)
    for part in dataset.parts:
        prefix = f"{part.name}/" if mixed else ""
        numbers = set(part.stored(np.arange(part.samples)).tolist())
        left_out = set(part.excluded.tolist()) & numbers
        own = {
            int(key.rpartition("/")[2]): times
            for key, times in (used + lost).items()
            if key.startswith(prefix)
        }
        if part.name != "other":
            assert own == dict.fromkeys(numbers - left_out, 1)
            assert {
                int(key.rpartition("/")[2]) for key in lost if key.startswith(prefix)
            } == numbers & BAD - left_out
            assert mixed or excluded == len(left_out)
        else:
            assert set(own) <= numbers - left_out
            assert max(own.values()) <= 2
