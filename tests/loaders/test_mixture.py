"""Mixtures: exact draws, random access, lanes, changes and growth in mid-epoch, the file form, and golden vectors."""

import json
from collections import Counter
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders.mixture import CYCLE, Mixture, MixtureCourse, MixturePart
from loaders.order import ORDER_VERSION, OrderSettings
from shardify.errors import StateError, UsageError

GOLDEN = Path(__file__).parents[1] / "golden" / f"mixture_v{ORDER_VERSION}.json"
RATES = ["1/3", "1/2", "2/3", "1", "3/2", "2", "3", "0.1"]
SIZES = st.one_of(st.integers(1, 5000), st.integers(1, 70))


def part(name, rate, samples, first):
    """A part whose older fingerprints are those of any fewer samples."""
    return MixturePart(
        name,
        Fraction(rate),
        samples,
        first,
        {"shards": 1, "samples": samples, "digest": "d"},
        lambda old: old["samples"] if old["digest"] == "d" and old["samples"] <= samples else None,
    )


def course(parts, *, weights=False, samples=None, **order):
    """Of {name: (samples, rate)}; flat numbers are those of the parts as given."""
    made, first = [], 0
    for name, (size, rate) in parts.items():
        made.append(part(name, rate, size, first))
        first += size
    return MixtureCourse(tuple(made), OrderSettings(**order), weights, samples)


@st.composite
def mixtures(draw, rates=RATES):
    count = draw(st.integers(1, 5))
    return {f"part{i}": (draw(SIZES), draw(st.sampled_from(rates))) for i in range(count)}


@st.composite
def orders(draw):
    return {
        "shuffle": draw(st.sampled_from(["block", "full", None])),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "lanes": draw(st.integers(1, 64)),
        "block": draw(st.sampled_from([1, 4, 32])),
        "window": draw(st.integers(1, 8)),
    }


def owner(made, samples):
    """The part of each flat sample, and its number in it."""
    firsts = np.array([p.first for p in made.parts])
    which = np.searchsorted(firsts, samples, "right") - 1
    return [(made.parts[w].name, int(s - firsts[w])) for w, s in zip(which.tolist(), samples, strict=True)]


def drawn(made, number, parts, positions=None):
    epoch = made.epoch(number, parts)
    positions = np.arange(epoch.length) if positions is None else positions
    return owner(made, epoch.samples(positions))


def check_rounds(seen, size):
    """What a part gave, in any order within an epoch: no sample comes a second time before all have come."""
    counts = Counter(seen)
    most = max(counts.values())
    assert all(counts.get(sample, 0) >= most - 1 for sample in range(size))


@settings(max_examples=40)
@given(parts=mixtures(), order=orders(), first=st.integers(0, 5))
def test_every_part_gives_exactly_its_draws_and_nothing_is_lost_over_the_epochs(parts, order, first):
    made = course(parts, **order)
    stand = made.first_parts()
    seen = {name: [] for name in parts}
    for number in range(3):
        epoch = made.epoch(number, stand)
        given_ = Counter()
        for name, sample in drawn(made, number, stand):
            seen[name].append(sample)
            given_[name] += 1
        for name, (size, rate) in parts.items():
            share = Fraction(rate) * size
            assert given_[name] == int((number + 1) * share // 1) - int(number * share // 1)
            if seen[name]:
                check_rounds(seen[name], size)
            if Fraction(rate).denominator == 1:
                assert Counter(seen[name]) == dict.fromkeys(range(size), (number + 1) * int(Fraction(rate)))
        stand = json.loads(json.dumps(made.parts_after(number, stand, epoch.length)))


@settings(max_examples=40)
@given(parts=mixtures(), order=orders(), weights=st.booleans(), number=st.integers(0, 1000), data=st.data())
def test_any_positions_alone_equal_the_whole(parts, order, weights, number, data):
    made = course(parts, weights=weights, **order)
    stand = made.first_parts()
    whole = made.epoch(number, stand)
    everything = whole.samples(np.arange(whole.length))
    if whole.length:
        some = np.array(data.draw(st.lists(st.integers(0, whole.length - 1), max_size=30)), np.int64)
        assert np.array_equal(made.epoch(number, stand).samples(some), everything[some])
        assert np.array_equal(whole.samples(some), everything[some])


@settings(max_examples=30)
@given(parts=mixtures(), order=orders(), samples=st.one_of(st.none(), st.integers(1, 3000)))
def test_weights_share_out_every_epoch_exactly(parts, order, samples):
    made = course(parts, weights=True, samples=samples, **order)
    length = samples or sum(size for size, _ in parts.values())
    total = sum(Fraction(weight) for _, weight in parts.values())
    stand, seen = made.first_parts(), {name: [] for name in parts}
    for number in range(3):
        assert made.epoch(number, stand).length == length
        counts = Counter()
        for name, sample in drawn(made, number, stand):
            seen[name].append(sample)
            counts[name] += 1
        for name, (_, weight) in parts.items():
            assert abs(counts[name] - length * Fraction(weight) / total) < 1
        stand = made.parts_after(number, stand, length)
    for name, (size, _) in parts.items():
        if seen[name]:
            check_rounds(seen[name], size)


@pytest.mark.long
@settings(max_examples=40)
@given(
    parts=mixtures(),
    changed=mixtures(rates=["1/2", "1", "2"]),
    order=orders(),
    weights=st.tuples(st.booleans(), st.booleans()),
    data=st.data(),
)
def test_changes_in_mid_epoch_lose_and_repeat_nothing_within_a_part(parts, changed, order, weights, data):
    # parts keep their data under their name; they come, go and get other rates
    sizes = {name: size for name, (size, _) in {**changed, **parts}.items()}
    number = data.draw(st.integers(0, 3))
    stages = [
        ({name: (sizes[name], rate) for name, (_, rate) in stage.items()}, by_weight)
        for stage, by_weight in ((parts, weights[0]), (changed, weights[1]), (parts, weights[0]))
    ]
    seen = {name: [] for name in sizes}
    stand, before, consumed = [], None, np.zeros(0, np.int64)
    for stage, by_weight in stages:
        made = course(stage, weights=by_weight, **order)
        if before is None:
            stand = made.first_parts()
        else:
            position, also = prefix_and_others(consumed)
            taken_up = made.take_up(number, json.loads(json.dumps(stand)), position, {}, also)
            stand = taken_up.parts
            assert taken_up.anew == (before != (stage, by_weight))
            consumed = consumed[:0] if taken_up.anew else consumed
        before = stage, by_weight
        length = made.epoch(number, stand).length
        # some positions beyond the first ones are consumed too, as a planned window leaves them
        first = data.draw(st.integers(0, length))
        others = data.draw(st.lists(st.integers(0, max(length - 1, 0)), max_size=20)) if length else []
        now = np.union1d(np.arange(first), np.array(others, np.int64))
        for name, sample in drawn(made, number, stand, np.setdiff1d(now, consumed)):
            seen[name].append(sample)
        consumed = np.union1d(consumed, now)
    # on, until no part has draws left behind
    last = course({name: (size, 1) for name, size in sizes.items()}, **order)
    position, also = prefix_and_others(consumed)
    stand = last.take_up(number, stand, position, {}, also).parts
    while any("taken" in entry for entry in stand):
        for name, sample in drawn(last, number, stand):
            seen[name].append(sample)
        stand = last.parts_after(number, stand, last.epoch(number, stand).length)
    for name, size in sizes.items():
        if seen[name]:
            check_rounds(seen[name], size)


def prefix_and_others(consumed):
    """How many first positions are consumed, and which others."""
    first = int(np.searchsorted(consumed - np.arange(len(consumed)), 0, "right"))
    return first, consumed[first:]


@settings(max_examples=40)
@given(parts=mixtures(), order=orders(), data=st.data())
def test_an_unchanged_mixture_goes_on_exactly_whatever_the_order_of_its_parts(parts, order, data):
    made = course(parts, **order)
    stand = made.parts_after(0, made.first_parts(), made.epoch(0, made.first_parts()).length)
    length = made.epoch(1, stand).length
    position = data.draw(st.integers(0, length))
    names = data.draw(st.permutations(list(parts)))
    other = course({name: parts[name] for name in names}, **order)
    taken_up = other.take_up(1, json.loads(json.dumps(stand)), position, {})
    assert not taken_up.anew
    assert drawn(other, 1, taken_up.parts) == drawn(made, 1, stand)


@settings(max_examples=40)
@given(parts=mixtures(), order=orders(), data=st.data())
def test_grown_parts_finish_what_was_planned_and_are_whole_then(parts, order, data):
    made = course(parts, **order)
    stand = made.first_parts()
    length = made.epoch(0, stand).length
    position = data.draw(st.integers(0, length))
    planned = drawn(made, 0, stand)
    more = {name: (size + data.draw(st.integers(0, 100)), rate) for name, (size, rate) in parts.items()}
    grown = course(more, **order)
    taken_up = grown.take_up(0, stand, position, {})
    assert not taken_up.anew
    stand = taken_up.parts
    seen = {name: [] for name in parts}
    if position:
        assert drawn(grown, 0, stand) == planned
    for number in range(4):
        length = grown.epoch(number, stand).length
        for name, sample in drawn(grown, number, stand):
            seen[name].append(sample)
        stand = grown.parts_after(number, stand, length)
        assert not grown.take_up(number + 1, stand, 0, {}).anew
    for name, (size, _) in more.items():
        old = parts[name][0]
        # own epochs over the old samples, then ones over all
        rounds = 0
        if position:
            counts = Counter(seen[name])
            rounds = counts[0] if size == old else min(counts.get(s, 0) for s in range(old))
            assert all(abs(counts.get(s, 0) - counts.get(t, 0)) <= 1 for s, t in pairwise(range(old)))
            assert max((counts.get(s, 0) for s in range(old, size)), default=0) <= rounds + 1
        elif seen[name]:
            check_rounds(seen[name], size)


def test_ranks_read_blocks_that_no_other_rank_needs():
    made = course({"a": (60_000, "1/2"), "b": (20_037, 2), "c": (5_000, 1)}, lanes=16, block=32, seed=3)
    stand = made.first_parts()
    foreign = reads = 0
    for number in range(3):
        epoch = made.epoch(number, stand)
        samples = epoch.samples(np.arange(epoch.length))
        # the lane that holds most of a block is the one whose rank reads it
        lane = np.arange(epoch.length) % 16
        pairs, counts = np.unique(np.stack([samples // 32, lane]), axis=1, return_counts=True)
        first = np.flatnonzero(np.append(True, np.diff(pairs[0]) != 0))
        most = np.maximum.reduceat(counts, first)
        foreign += counts.sum() - most.sum()
        reads += counts.sum()
        stand = made.parts_after(number, stand, epoch.length)
    # the ends of parts and of epochs, and blocks that span two parts of this test's numbering
    assert foreign / reads < 0.02


def test_a_mixture_is_mixed_everywhere():
    made = course({"a": (100_000, 1), "b": (50_000, 1), "c": (50_000, "1/2")}, lanes=64)
    stand = made.first_parts()
    epoch = made.epoch(0, stand)
    firsts = epoch.samples(np.arange(epoch.length))
    part_of = np.searchsorted([100_000, 150_000], firsts, "right")
    for begin in range(0, epoch.length - 5000, 5000):
        shares = np.bincount(part_of[begin : begin + 5000], minlength=3) / 5000
        assert np.allclose(shares, [4 / 7, 2 / 7, 1 / 7], atol=0.04)
    # whether the next sample is of the same part is chance
    same = (part_of[1:] == part_of[:-1]).mean()
    assert abs(same - (16 + 4 + 1) / 49) < 0.02


def test_without_a_shuffle_parts_are_spread_evenly_in_manifest_order():
    made = course({"a": (6, 1), "b": (3, 1)}, shuffle=None)
    names = drawn(made, 0, made.first_parts())
    assert [sample for name, sample in names if name == "a"] == list(range(6))
    assert [sample for name, sample in names if name == "b"] == [0, 1, 2]
    assert "".join(name for name, _ in names) == "abaabaaba"


def test_a_part_that_was_away_goes_on_where_it_stood():
    both = course({"a": (100, 1), "b": (40, "1/4")}, seed=1)
    alone = course({"a": (100, 1)}, seed=1)
    stand = both.first_parts()
    seen = [sample for name, sample in drawn(both, 0, stand) if name == "b"]
    stand = both.parts_after(0, stand, 110)
    stand = alone.take_up(1, stand, 0, {}).parts
    for number in (1, 2):
        assert {name for name, _ in drawn(alone, number, stand)} == {"a"}
        stand = alone.parts_after(number, stand, 100)
    taken_up = both.take_up(3, stand, 0, {})
    assert taken_up.anew
    seen += [sample for name, sample in drawn(both, 3, taken_up.parts) if name == "b"]
    assert len(seen) == len(set(seen)) == 20


def test_a_billion_samples_are_found_a_cycle_at_a_time():
    made = course({"a": (600_000_000, 1), "b": (400_000_000, "3/2")}, lanes=1024)
    epoch = made.epoch(7, made.first_parts())
    positions = np.arange(123, epoch.length, epoch.length // 20)
    samples = epoch.samples(positions)
    assert len(set(samples.tolist())) == len(positions)
    assert epoch._last is not None
    assert len(epoch._last.part) < 2 * CYCLE


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ([], "no parts"),
        ([{"draws": 1}], "not a state of a mixture"),
        (
            [{"name": "a", "fingerprint": {}, "draws": -1, "epoch": 0, "position": 0}],
            "not a state of a mixture",
        ),
        ("abc", "no parts"),
    ],
)
def test_states_of_something_else_are_refused(parts, named):
    made = course({"a": (10, 1)})
    with pytest.raises(StateError, match=named):
        made.take_up(0, parts, 0, {})


@given(
    junk=st.recursive(
        st.one_of(st.none(), st.integers(), st.text(max_size=5)), lambda x: st.lists(x, max_size=3)
    ),
    data=st.data(),
)
def test_damaged_parts_never_crash(junk, data):
    made = course({"a": (10, 1), "b": (5, "1/2")})
    parts = made.first_parts()
    entry = parts[data.draw(st.integers(0, 1))]
    entry[data.draw(st.sampled_from([*entry, "taken"]))] = junk
    with suppress(StateError):
        made.take_up(0, parts, data.draw(st.integers(0, 12)), {})


def test_other_data_under_a_name_is_refused():
    made = course({"a": (10, 1), "b": (5, 1)})
    stand = made.first_parts()
    fewer = course({"a": (9, 1), "b": (5, 1)})
    with pytest.raises(
        StateError, match="part 'a': it was made over 1 shards of 10 samples; here are 1 shards of 9"
    ):
        fewer.take_up(0, stand, 3, {})


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (({},), "no parts"),
        (({"": ("x", 1)},), "''"),
        (({"a/b": ("x", 1)},), "'a/b'"),
        (({"a": "x"},), "part 'a'"),
        (({"a": ("x", 0)},), "part 'a'.*0"),
        (({"a": ("x", -1)},), "part 'a'"),
        (({"a": ("x", "many")},), "'many'"),
        (({"a": ("x", float("nan"))},), "nan"),
        (({"a": ("x", True)},), "True"),
    ],
)
def test_wrong_mixtures_are_named(arguments, named):
    with pytest.raises(UsageError, match=named):
        Mixture(*arguments)


def test_numbers_are_exact():
    mixture = Mixture({"a": ("x", 0.1), "b": ("y", "1/3"), "c": ("z", Fraction(3, 2)), "d": ("w", 2)})
    assert list(mixture.rates.values()) == [Fraction(1, 10), Fraction(1, 3), Fraction(3, 2), 2]
    with pytest.raises(UsageError, match="samples=5"):
        Mixture({"a": ("x", 1)}, samples=5)


def test_a_file(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text(
        "parts:\n  chat:\n    shards: chat/{000..003}.tar\n    repeat: 0.5\n"
        "  web:\n    shards: [/data/x, 's3://bucket/y', z/manifest.json]\n    repeat: 1/3\n"
    )
    mixture = Mixture.from_yaml(path)
    assert mixture.shards == {
        "chat": f"{tmp_path}/chat/{{000..003}}.tar",
        "web": ["/data/x", "s3://bucket/y", f"{tmp_path}/z/manifest.json"],
    }
    assert mixture.rates == {"chat": Fraction(1, 2), "web": Fraction(1, 3)}
    assert not mixture.weights
    path.write_text("samples: 1_000\nparts: {a: {shards: x, weight: 2}, b: {shards: y, weight: 0.5}}\n")
    mixture = Mixture.from_yaml(path)
    assert (mixture.weights, mixture.samples) == (True, 1000)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "empty file"),
        ("a: [", "not YAML"),
        ("- x\n", "line 1: the file"),
        ("part:\n  a: 1\n", "line 1: the file: there is no 'part'; there are parts, samples"),
        ("samples: 3\n", "has no 'parts'"),
        ("parts:\n  a:\n    repeat: 1\n", "line 3: parts.a: has no 'shards'"),
        ("parts:\n  a:\n    shards: x\n", "line 3: parts.a: one of 'repeat' and 'weight'"),
        ("parts:\n  a:\n    shards: x\n    repeat: often\n", "line 4: parts.a.repeat: 'often'"),
        ("parts:\n  a:\n    shards: x\n    repeat: 0\n", "line 4: parts.a.repeat: '0'"),
        ("parts:\n  a:\n    shards: []\n    repeat: 1\n", "line 3: parts.a.shards: an empty list"),
        (
            "parts:\n  a: {shards: x, repeat: 1}\n  a: {shards: y, repeat: 1}\n",
            "line 3: parts: 'a' stands here twice",
        ),
        (
            "parts:\n  a: {shards: x, repeat: 1}\n  b: {shards: y, weight: 1}\n",
            "line 3: parts: some have 'repeat'",
        ),
        ("parts:\n  a/b: {shards: x, repeat: 1}\n", "line 2: parts: a part is called 'a/b'"),
        ("parts:\n  a: {shards: x, repeat: 1}\nsamples: 3\n", "line 3: samples: only with weights"),
        ("parts:\n  a: {shards: x, weight: 1}\nsamples: few\n", "line 3: samples: 'few'"),
        ("parts: {}\n", "line 1: parts: is empty"),
    ],
)
def test_wrong_files_are_named_by_line_and_field(tmp_path, content, named):
    path = tmp_path / "mix.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"mix\.yaml") as error:
        Mixture.from_yaml(path)
    assert named in str(error.value)


@pytest.mark.parametrize("vector", json.loads(GOLDEN.read_text()), ids=lambda v: v["name"])
def test_golden_vectors_hold(vector):
    """A change here is a new ORDER_VERSION: states of running jobs would otherwise continue in another order."""
    made = course(vector["parts"], weights=vector["weights"], **vector["order"])
    stand = made.first_parts()
    for number, samples in enumerate(vector["samples"]):
        epoch = made.epoch(number, stand)
        assert epoch.samples(np.arange(epoch.length))[:: vector["step"]].tolist() == samples
        stand = made.parts_after(number, stand, epoch.length)
