"""The flat range over parts: rows as the shards have them, extents, frames, exclusions, fingerprints of grown sets."""

import hashlib
import io
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loaders.dataset import Dataset, Part, open_dataset, spread
from loaders.mixture import Mixture
from loaders.order import OrderSettings
from loaders.subset import Subset
from shardify.errors import StateError, UsageError
from shardify.format.samples import SampleReader
from shardify.format.shards import ShardSet, open_shards

sys.path.insert(0, str(Path(__file__).parent))
from tars import record, write_tars


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (3, 3), (number % 256, number // 256, 9)).save(file, "PNG")
    return file.getvalue()


def ordinary(count, **more):
    return [([picture(i)] * (i % 3 > 0), record(i, int(i % 3 > 0), **more)) for i in range(count)]


@pytest.mark.parametrize("compress", ["", "zstd"])
def test_rows_are_what_the_shards_hold(tmp_path, compress):
    data = write_tars(tmp_path / "data", ordinary(200), [0, 31, 31, 90, 170], compress=compress)
    shards = open_shards(data)
    dataset = open_dataset(data, block=16)
    samples = np.random.default_rng(0).permutation(200)
    rows = dataset.rows(samples)
    readers = [SampleReader(s.path, sidecar=s.sidecar) for s in shards.shards]
    seen = {}
    for n, sample in enumerate(samples.tolist()):
        number = int(rows.shard[n])
        assert dataset.paths[number] == shards.shards[number].path
        stored = readers[number].read(sample - int(shards.starts[number]))
        assert int(stored.key) == sample
        assert rows.offset[n] == shards.index["offset"][sample]
        assert rows.size[n] == shards.index["size"][sample]
        assert rows.images[n] == int(sample % 3 > 0)
        assert rows.words[n] == shards.index["words"][sample]
        assert rows.extent_begin[n] <= rows.offset[n]
        assert rows.extent_end[n] >= rows.offset[n] + rows.size[n]
        seen.setdefault((number, int(rows.offset[n])), []).append((int(rows.ordinal[n]), sample))
        # the extent: from the first to the last sample of the block in this shard
        low = max(sample // 16 * 16, int(shards.starts[number]))
        high = min(sample // 16 * 16 + 16, int(shards.starts[number + 1])) - 1
        assert rows.extent_begin[n] == shards.index["offset"][low]
        assert rows.extent_end[n] == int(shards.index["offset"][high]) + int(shards.index["size"][high])
    for frame in seen.values():
        assert [ordinal for ordinal, _ in sorted(frame)] == list(range(len(frame)))
        assert [sample for _, sample in sorted(frame)] == sorted(sample for _, sample in frame)
    assert any(len(frame) > 1 for frame in seen.values()) == bool(compress)
    alone = open_dataset(data, block=1).rows(samples)
    assert np.array_equal(alone.extent_begin, alone.offset)
    assert np.array_equal(alone.extent_end, alone.offset + alone.size)


@given(st.integers(0, 10_000) | st.integers(0, 10**9))
def test_a_survey_looks_at_few_places_of_a_large_set_and_at_all_of_a_small_one(count):
    samples = spread(count)
    assert np.all(np.diff(samples) > 0)
    assert len(samples) <= 4096
    if count <= 4096:
        assert np.array_equal(samples, np.arange(count))
    else:
        assert samples[0] == 0
        assert samples[-1] == count - 1
        assert np.count_nonzero(np.diff(samples) > 1) < 64
        assert np.diff(samples).max() <= count // 63


@settings(max_examples=100)
@given(runs=st.lists(st.integers(1, 40), min_size=1, max_size=30), data=st.data())
def test_a_samples_place_in_its_frame_is_found_from_anywhere(runs, data):
    from shardify.format.index import INDEX_DTYPE
    from shardify.format.samples import ordinals
    from shardify.format.shards import ShardFile

    index = np.zeros(sum(runs), INDEX_DTYPE)
    index["offset"] = np.repeat(np.arange(len(runs)) * 10, runs)
    cut = int(np.cumsum(runs)[data.draw(st.integers(0, len(runs) - 1))])
    index["offset"][cut:] -= index["offset"][cut] if cut < len(index) else 0
    starts = np.array([0, cut, len(index)])
    files = tuple(ShardFile(f"{i}.tar.zst", "", int(n), 1, "") for i, n in enumerate(np.diff(starts)))
    dataset = Dataset([Part("", ShardSet(files, index, starts))])
    expected = np.concatenate([ordinals(index["offset"][:cut]), ordinals(index["offset"][cut:])])
    some = np.array(data.draw(st.permutations(range(len(index)))))
    assert np.array_equal(dataset.rows(some).ordinal, expected[some])


@pytest.mark.parametrize("every", [1, 3, 40])
def test_extents_of_a_subset_read_little_that_takes_no_part(tmp_path, every):
    data = write_tars(tmp_path / "data", ordinary(400), [130, 300])
    shards = open_shards(data)
    chosen = (
        np.arange(0, 400, every, dtype=np.uint32) if every > 1 else np.setdiff1d(np.arange(400), [7, 8, 200])
    )
    dataset = Dataset([Part("", shards, Subset(chosen, {"split": "x"}))], block=8)
    rows = dataset.rows(np.arange(len(chosen)))
    assert np.array_equal(rows.offset, shards.index["offset"][chosen])
    extents = {(s, b, e) for s, b, e in zip(rows.shard, rows.extent_begin, rows.extent_end, strict=True)}
    read = sum(int(e - b) for _, b, e in extents)
    used = int(rows.size.sum())
    assert read <= 2.1 * used
    if every == 1:
        assert len(extents) < 400 / 8 + 4
    # samples of one block in one shard share an extent, or each has its own
    assert ((rows.extent_begin <= rows.offset) & (rows.offset + rows.size <= rows.extent_end)).all()


def test_a_mixture_is_one_range(tmp_path):
    a = write_tars(tmp_path / "a", ordinary(50), [20])
    b = write_tars(tmp_path / "b", ordinary(30), [10, 11], compress="zstd")
    dataset = open_dataset(Mixture({"a": (a, 1), "b": (b, 2)}))
    assert dataset.starts.tolist() == [0, 50, 80]
    assert dataset.prefixes == ("a/", "b/")
    samples = np.array([79, 0, 50, 49, 61])
    assert dataset.part_of(samples).tolist() == [1, 0, 1, 0, 1]
    rows = dataset.rows(samples)
    alone = open_dataset(b).rows(np.array([29, 0, 11]))
    ours = [0, 2, 4]
    assert rows.part.tolist() == [1, 0, 1, 0, 1]
    assert np.array_equal(rows.shard[ours], alone.shard + 2)
    for name in ("offset", "size", "ordinal", "words", "images", "extent_begin", "extent_end"):
        assert np.array_equal(getattr(rows, name)[ours], getattr(alone, name))
    words, images = dataset.words_and_images(samples)
    assert np.array_equal(words, rows.words)
    assert np.array_equal(images, rows.images)
    # parts in another order are the same data
    assert dataset.fingerprint == open_dataset(Mixture({"b": (b, 1), "a": (a, 1)})).fingerprint
    course = dataset.course(OrderSettings())
    epoch = course.epoch(0, course.first_parts())
    assert sorted(epoch.samples(np.arange(epoch.length)).tolist()) == sorted([*range(80), *range(50, 80)])


def excluding(tmp_path, data, *lines, **options):
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    dataset = open_dataset(data, exclude=path, **options)
    return set(np.flatnonzero(dataset.rows(np.arange(len(dataset))).excluded).tolist())


@pytest.mark.parametrize("compress", ["", "zstd"])
def test_ids_urls_and_hashes_mark_samples_where_they_are(tmp_path, compress):
    samples = ordinary(60)
    samples[10] = ([picture(10)], record(10, 1, url="https://a.b/c.jpg"))
    samples[11] = ([picture(11)], record(11, 1, meta={"urls": ["https://a.b/c.jpg"]}))
    samples[40] = ([picture(13), picture(41)], record(40, 2))
    data = write_tars(tmp_path / "data", samples, [25], compress=compress)
    assert excluding(tmp_path, data, "id7", "id59") == {7, 59}
    assert excluding(tmp_path, data, "https://a.b/c.jpg") == {10, 11}
    assert excluding(tmp_path, data, xxhash.xxh3_64_hexdigest(picture(13))) == {13, 40}
    assert excluding(tmp_path, data, hashlib.sha256(picture(41)).hexdigest()) == {40, 41}
    assert len(open_dataset(data, exclude=tmp_path / "list.txt")) == 60


def test_entries_that_name_nothing_are_told_and_those_of_another_part_are_not(tmp_path):
    a = write_tars(tmp_path / "a", ordinary(20), [])
    b = write_tars(tmp_path / "b", [([], record(100 + i, 0)) for i in range(20)], [])
    with pytest.warns(UserWarning, match=r"1 of 3 entries name no sample: line 2 \(id999\)"):
        found = excluding(tmp_path, Mixture({"a": (a, 1), "b": (b, 1)}), "id3", "id999", "id105")
    assert found == {3, 25}
    with pytest.warns(UserWarning, match="line 2"):  # also when it was looked for before
        excluding(tmp_path, Mixture({"a": (a, 1), "b": (b, 1)}), "id3", "id999", "id105")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        excluding(tmp_path, a, "id3")


def test_excluded_samples_do_not_change_the_fingerprint(tmp_path):
    data = write_tars(tmp_path / "data", ordinary(20), [])
    (tmp_path / "list.txt").write_text("id3\n")
    assert open_dataset(data).fingerprint == open_dataset(data, exclude=tmp_path / "list.txt").fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"split": "train", "validation": 0.3},
        {"split": "validation", "validation": 0.3},
        {"max_samples": 1000},
    ],
    ids=["all", "train", "validation", "most"],
)
def test_a_grown_set_is_known_by_what_it_was(tmp_path, options):
    samples = ordinary(90)
    data = write_tars(tmp_path / "data", samples[:60], [20])
    before = open_dataset(data, **options)
    write_tars(data, samples[60:], [10], first=2)
    after = open_dataset(data, **options)
    assert len(after) > len(before)
    assert after.parts[0].prefix(json.loads(json.dumps(before.fingerprint))) == len(before)
    assert after.parts[0].prefix(after.fingerprint) == len(after)
    assert before.parts[0].prefix(after.fingerprint) is None
    course = after.course(OrderSettings(lanes=4, block=4))
    taken_up = course.take_up(3, [], 10, before.fingerprint)
    assert course.epoch(3, taken_up.parts).length == len(before)
    parts = course.parts_after(3, taken_up.parts, len(before))
    assert parts == []
    assert course.epoch(4, parts).length == len(after)
    # again from a state within the epoch that is finished as it was
    again = course.take_up(3, json.loads(json.dumps(taken_up.parts)), 11, after.fingerprint)
    assert again.parts == taken_up.parts
    assert course.take_up(4, [], 0, before.fingerprint).parts == []


def test_other_choices_are_other_data(tmp_path):
    data = write_tars(tmp_path / "data", ordinary(90), [20])
    made = [
        open_dataset(data),
        open_dataset(data, split="train", validation=0.2),
        open_dataset(data, split="validation", validation=0.2),
        open_dataset(data, split="train", validation=0.1),
        open_dataset(data, max_samples=10),
        open_dataset(data, max_samples=11),
    ]
    for one in made:
        for other in made:
            assert (one.parts[0].prefix(other.fingerprint) is None) == (one is not other)


def test_a_part_without_samples_is_named(tmp_path):
    a = write_tars(tmp_path / "a", ordinary(20), [])
    empty = write_tars(tmp_path / "b", [], [])
    with pytest.raises(UsageError, match="'b' of the mixture has no samples"):
        open_dataset(Mixture({"a": (a, 1), "b": (empty, 1)}))


def test_growth_that_would_move_old_samples_is_refused(tmp_path):
    samples = [([picture(i)], record(i)) for i in range(200)]
    data = write_tars(tmp_path / "data", samples, [])
    before = {side: open_dataset(data, split=side, validation=0.5) for side in ("train", "validation")}
    one, held_out = (int(before[side].parts[0].stored(np.array([0]))[0]) for side in ("train", "validation"))
    few = open_dataset(data, max_samples=20)
    # the added sample shows a picture of either side
    write_tars(data, [([picture(one), picture(held_out)], record(200, 2))], [], first=1)
    moved = [
        open_dataset(data, split=side, validation=0.5).parts[0].prefix(before[side].fingerprint)
        for side in before
    ]
    assert moved == [None, None]
    write_tars(data, [([picture(i)], record(i)) for i in range(300, 600)], [], first=2)
    after = open_dataset(data, max_samples=20)
    assert after.parts[0].prefix(few.fingerprint) is None
    with pytest.raises(
        StateError, match="1 shards of 200 samples, max_samples=20, samples=20; here are 3 shards"
    ):
        after.course(OrderSettings()).take_up(0, [], 5, few.fingerprint)
