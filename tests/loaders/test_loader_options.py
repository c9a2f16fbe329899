"""StreamingLoader with what plans may depend on: mixtures, groups, packs, splits, transforms, skips; and with workers that hang."""

import json
import os
import shutil
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch

from loaders import ImageTransform, LlavaText, Mixture, StreamingLoader
from loaders.text import ByteTokenizer
from shardify.errors import LoaderError, StateError, UsageError

IMAGE = ImageTransform(8)
TEXT = LlavaText(ByteTokenizer())


def make(data, *, batch_size=8, **options):
    return StreamingLoader(
        data, batch_size=batch_size, **{"image": IMAGE, "text": TEXT, "num_workers": 0, **options}
    )


def keys(batches):
    return [key for batch in batches for key in batch.keys if key]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def mixed_data(tmp_path, made):
    """60 samples, of which every third has no image and every fifth has two."""
    samples = []
    for number in range(60):
        images = 0 if number % 3 == 0 else 2 if number % 5 == 0 else 1
        pictures = [made.png(number + i) for i in range(images)]
        samples.append(made.Made(pictures, made.record(number, images)))
    return made.write(tmp_path / "mixed", samples, shards=4)


def test_a_mixture_draws_its_shares_and_names_its_parts(tmp_path, plain_data, mixed_data):
    mixture = Mixture({"plain": (plain_data, 2), "mixed": (mixed_data, 0.5)})
    loader = make(mixture, num_workers=2)
    first, second = Counter(keys(loader)), Counter(keys(loader))
    plain = {f"plain/{number:09}" for number in range(103)}
    assert {key: count for key, count in first.items() if key.startswith("plain/")} == dict.fromkeys(plain, 2)
    halves = [{key for key in epoch if key.startswith("mixed/")} for epoch in (first, second)]
    assert [len(half) for half in halves] == [30, 30]
    assert halves[0] | halves[1] == {f"mixed/{number:09}" for number in range(60)}
    loader.close()


def test_a_mixture_may_change_and_its_parts_go_on(plain_data, mixed_data):
    loader = make(Mixture({"plain": (plain_data, 1), "mixed": (mixed_data, 1)}))
    batches = iter(loader)
    before = [next(batches) for _ in range(5)]
    state = json.loads(json.dumps(before[-1].state))
    changed = make(Mixture({"plain": (plain_data, 1), "mixed": (mixed_data, 3)}))
    changed.load_state_dict(state)
    seen = Counter(key for key in keys(before) + keys(changed) if key.startswith("plain/"))
    # of each part's own epochs nothing is lost and nothing comes early
    assert set(seen) == {f"plain/{number:09}" for number in range(103)}
    assert max(seen.values()) <= 2


@pytest.mark.parametrize("group_by", ["modality", "modality_length"])
def test_groups_hold_one_modality(mixed_data, group_by):
    ranks = [make(mixed_data, batch_size=4, group_by=group_by, rank=r, world_size=2) for r in range(2)]
    seen = []
    for batches in zip(*ranks, strict=True):
        kinds = {
            bool((batch.image_samples == sample).any())
            for batch in batches
            for sample in torch.nonzero(batch.valid).flatten().tolist()
        }
        assert len(kinds) == 1
        assert len({len(batch.keys) for batch in batches}) == 1
        seen += keys(batches)
    assert sorted(seen) == [f"{number:09}" for number in range(60)]


def test_packed_rows_hold_whole_samples_within_their_size(mixed_data):
    loader = make(mixed_data, batch_size=3, pack_tokens=400, num_workers=2)
    plain = {batch.keys[0]: batch for batch in make(mixed_data, batch_size=1)}
    seen = []
    for batch in loader:
        seen += keys([batch])
        assert batch.input_ids.shape == batch.segment_ids.shape == batch.position_ids.shape
        assert batch.input_ids.shape[1] <= 400
        assert batch.rows.tolist() == sorted(batch.rows.tolist())
        at: Counter[int] = Counter()
        for sample, (key, row) in enumerate(zip(batch.keys, batch.rows.tolist(), strict=True)):
            if not key:
                continue
            alone = plain[key]
            length = alone.input_ids.shape[1]
            cut = slice(at[row], at[row] + length)
            at[row] += length
            for name in ("input_ids", "labels"):
                assert torch.equal(getattr(batch, name)[row, cut], getattr(alone, name)[0])
            assert batch.position_ids[row, cut].tolist() == list(range(length))
            assert len(set(batch.segment_ids[row, cut].tolist())) == 1
            assert torch.equal(batch.images[batch.image_samples == sample], alone.images)
        for row, length in at.items():
            assert batch.attention_mask[row].sum() == length
            assert not batch.segment_ids[row, length:].any()
    assert sorted(seen) == [f"{number:09}" for number in range(60)]
    loader.close()


def test_a_budget_bounds_what_a_batch_holds(mixed_data):
    loader = StreamingLoader(mixed_data, image=IMAGE, text=TEXT, max_tokens=1500, max_tiles=6, num_workers=0)
    seen = []
    for batch in loader:
        assert batch.input_ids.numel() <= 1500 or len(batch.keys) == 1
        assert len(batch.images) <= 6
        seen += keys([batch])
    assert sorted(seen) == [f"{number:09}" for number in range(60)]


@pytest.mark.parametrize("options", [{}, {"group_by": "modality_length"}, {"pack_tokens": 500}])
def test_chains_of_resumes_cover_the_epoch_once(mixed_data, options):
    state, seen = None, []
    for world, batch_size, steps in ((2, 3, 2), (1, 5, 1), (3, 1, 3), (2, 2, 1000)):
        ranks = [
            make(mixed_data, batch_size=batch_size, rank=r, world_size=world, plan_window=32, **options)
            for r in range(world)
        ]
        for loader in ranks if state else ():
            loader.load_state_dict(json.loads(json.dumps(state)))
        for step, batches in enumerate(zip(*ranks, strict=True)):
            seen += keys(batches)
            assert len({json.dumps(batch.state) for batch in batches}) == 1
            state = batches[0].state
            if step + 1 == steps:
                break
    assert sorted(seen) == [f"{number:09}" for number in range(60)]
    assert (state["epoch"], state["position"], state["samples"]) == (1, 0, 60)


def test_the_sides_of_a_split_are_apart_and_complete(plain_data):
    sides = [
        make(plain_data, split=split, validation=0.3, batch_size=4, num_workers=0)
        for split in ("train", "validation")
    ]
    train, validation = (set(keys(side)) for side in sides)
    assert not train & validation
    assert len(train | validation) == 103
    assert 10 < len(validation) < 60
    with pytest.raises(StateError):
        sides[0].load_state_dict(sides[1].state_dict())


def test_excluded_samples_leave_fillers(tmp_path, plain_data):
    (tmp_path / "exclude.txt").write_text("7\n50\n")
    whole, without = make(plain_data), make(plain_data, exclude=tmp_path / "exclude.txt")
    expected = [["" if key in ("000000007", "000000050") else key for key in batch.keys] for batch in whole]
    assert [batch.keys for batch in without] == expected
    assert without.report().excluded == 2
    assert not without.report().faults
    without.load_state_dict(whole.state_dict())  # what is excluded may change


def test_a_transform_has_random_numbers_of_its_position(plain_data):
    def transform(sample, rng):
        sample.record["conversations"][1]["value"] = f"draw {rng.integers(10**9)}"
        sample.images = [np.full((4, 4, 3), 9, np.uint8) for _ in sample.images]
        return None if sample.key == "000000011" else sample

    def draws(loader):
        found = {}
        for batch in loader:
            assert bool((batch.images == 9).all())
            for row, position in enumerate(batch.positions.tolist()):
                if position >= 0:
                    ids = batch.input_ids[row][batch.attention_mask[row]].tolist()
                    found[position] = TEXT.tokenizer.decode([t for t in ids if t >= 0])
        return found

    loader = make(plain_data, transform=transform, num_workers=2)
    first, second = draws(loader), draws(loader)
    loader.close()
    assert len(first) == 102
    assert loader.report().faults == {"transform-left-out": 2}
    ranks = [make(plain_data, batch_size=5, transform=transform, rank=r, world_size=3) for r in range(3)]
    assert {position: text for rank in ranks for position, text in draws(rank).items()} == first
    assert not set(first.values()) & set(second.values())


def test_skipped_steps_are_passed_over_and_said_so(plain_data):
    whole = list(make(plain_data))
    loader = make(plain_data, skip=[(2, 4), (9, 13)])
    assert len(loader) == 7
    got = list(loader)
    assert [batch.keys for batch in got] == [batch.keys for batch in [*whole[:2], *whole[4:9]]]
    assert [batch.state["step"] for batch in got] == [1, 4, 5, 6, 7, 8, 13]
    assert got[-1].state["skipped"] == [[2, 4], [9, 13]]
    assert loader.epoch == 1
    resumed = make(plain_data, skip=[(6, 7)])
    resumed.load_state_dict(whole[3].state)
    assert [batch.keys for batch in resumed] == [batch.keys for batch in [*whole[4:6], *whole[7:]]]
    assert resumed.state_dict()["skipped"] == [[6, 7]]


def test_bad_samples_end_a_run_that_bears_none(tmp_path, made):
    samples = [made.ordinary(i) for i in range(40)]
    for bad in (5, 17, 30):
        samples[bad] = made.Made([b"no picture"], made.record(bad))
    data = made.write(tmp_path / "bad", samples, shards=2)
    with pytest.raises(LoaderError, match=r"image-undecodable .*000\.tar offset \d+, key 000000005"):
        list(make(data, shuffle=None, on_error="raise", num_workers=1))
    loader = make(data, shuffle=None, max_errors=2)
    with pytest.raises(LoaderError, match="3 of 32 samples cannot be used, max_errors=2"):
        list(loader)
    assert len(keys(make(data, max_errors=3))) == 37


class Hanging:
    """Never returns from the first image."""

    shape = (3, 8, 8)
    is_ragged = is_tiled = False

    def prepare(self, data, *, images=1):
        time.sleep(1000)


def test_a_hung_worker_is_named_with_its_stack(plain_data):
    loader = make(plain_data, num_workers=2, image=Hanging(), timeout=1.0)
    with pytest.raises(LoaderError, match=r"(?s)no batch came for 1 s.*pid \d+, sleeping.*in prepare"):
        next(iter(loader))


class Stopped(Hanging):
    def prepare(self, data, *, images=1):
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_worker_is_named_too(plain_data):
    loader = make(plain_data, num_workers=1, image=Stopped(), timeout=1.0)
    with pytest.raises(LoaderError, match=r"(?s)no batch came for 1 s.*pid \d+, stopped"):
        next(iter(loader))


class Crashing(Hanging):
    def prepare(self, data, *, images=1):
        os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crashed_worker_leaves_its_stack(plain_data):
    loader = make(plain_data, num_workers=1, image=Crashing())
    with pytest.raises(LoaderError, match=r"(?s)Segmentation fault.*in prepare"):
        next(iter(loader))


@pytest.mark.parametrize("image", [IMAGE, None])
def test_compressed_shards_give_the_same_batches(tmp_path, plain_data, made, image):
    from tests.loaders.tars import record, write_tars

    samples = [([made.png(number)], record(number)) for number in range(30)]
    plain = write_tars(tmp_path / "plain", samples, [11])
    packed = write_tars(tmp_path / "packed", samples, [11], compress="zstd")
    one, other = (make(data, image=image, num_workers=1) for data in (plain, packed))
    for a, b in zip(one, other, strict=True):
        assert a.keys == b.keys
        assert torch.equal(a.input_ids, b.input_ids)
        assert (
            all(bytes(x) == bytes(y) for x, y in zip(a.images, b.images, strict=True))
            if image is None
            else (torch.equal(a.images, b.images))
        )
    one.close(), other.close()


def test_encoded_images_are_views_that_last(plain_data, made):
    loader = make(plain_data, image=None, text=None, num_workers=2)
    kept = list(loader)
    for batch in kept:
        for sample, image in zip(batch.image_samples.tolist(), batch.images, strict=True):
            assert bytes(image) == made.png(int(batch.keys[sample]))
    loader.close()


def test_figures_count_what_was_handed_out(plain_data):
    loader = make(plain_data, num_workers=1)
    list(loader)
    total = loader.stats().total
    assert (total.samples, total.images, total.batches) == (103, 103, 13)
    assert total.decode > 0
    assert total.bytes_used > 103 * 1024
    loader.close()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"pack_tokens": 100, "text": None}, "text="),
        ({"group_by": "colour"}, "group_by"),
        ({"skip": [(3, 3)]}, "skip"),
        ({"timeout": 0}, "timeout=0"),
        ({"on_error": "ignore"}, "on_error"),
        ({"split": "test"}, "split"),
        ({"max_samples": 0}, "max_samples"),
    ],
)
def test_wrong_options_are_named(plain_data, options, named):
    with pytest.raises(UsageError, match=named):
        make(plain_data, **options)


def test_a_mixture_changes_while_packs_are_left(plain_data, mixed_data):
    options = {"pack_tokens": 600, "plan_window": 48, "batch_size": 2}
    loader = make(Mixture({"plain": (plain_data, 1), "mixed": (mixed_data, 1)}), **options)
    batches = iter(loader)
    before = [next(batches) for _ in range(7)]
    state = json.loads(json.dumps(before[-1].state))
    changed = make(Mixture({"plain": (plain_data, 2), "mixed": (mixed_data, 1)}), **options)
    changed.load_state_dict(state)
    # what the first run took of each part's own epoch is not taken again before that is through
    taken = {key for key in keys(before) if key.startswith("mixed/")}
    after = Counter(key for key in keys(changed) if key.startswith("mixed/"))
    assert after.total() == 60
    left = {f"mixed/{number:09}" for number in range(60)} - taken
    assert left <= set(after)
    assert all(count == 1 for key, count in after.items() if key in taken)
    without = make(Mixture({"plain": (plain_data, 1)}), **options)
    with pytest.raises(StateError, match="a part of the mixture is gone"):
        without.load_state_dict(state)


def test_a_run_goes_on_over_added_shards(tmp_path, made):
    from tests.loaders.tars import record, write_tars

    samples = [([made.png(number)], record(number)) for number in range(50)]
    whole = write_tars(tmp_path / "whole", samples, [10, 20, 30, 40])
    folder = tmp_path / "growing"
    folder.mkdir()
    for shard in range(3):
        shutil.copy(whole / f"{shard:03}.tar", folder)
    batches = iter(make(folder, batch_size=7))
    before = [next(batches) for _ in range(2)]
    for shard in range(3, 5):
        shutil.copy(whole / f"{shard:03}.tar", folder)
    grown = make(folder, batch_size=7)
    grown.load_state_dict(before[-1].state)
    epoch = keys(before) + keys(grown)
    assert sorted(epoch) == [f"{number:09}" for number in range(30)]
    assert sorted(keys(grown)) == [f"{number:09}" for number in range(50)]


def test_the_state_says_from_which_step_on_a_list_excluded(tmp_path, plain_data):
    (tmp_path / "list.txt").write_text("5\n")
    first = make(plain_data)
    batch = next(iter(first))
    for content, entries in (("5\n", 2), ("# the same, said otherwise\n5\n6\n", 2), ("5\n6\n", 2)):
        (tmp_path / "list.txt").write_text(content)
        again = make(plain_data, exclude=tmp_path / "list.txt")
        again.load_state_dict(batch.state)
        history = again.state_dict()["history"]
        assert [entry["step"] for entry in history] == [0, 1][:entries]
        assert history[0]["data"]["exclusions"] is None
        assert history[1]["data"]["exclusions"] == again._dataset.exclusions != first._dataset.exclusions
    # the same list goes on without another entry
    state = next(iter(again)).state
    last = make(plain_data, exclude=tmp_path / "list.txt")
    last.load_state_dict(state)
    assert last.state_dict() == state


def test_a_stretch_that_another_run_was_to_skip_is_not_said_to_be_skipped(plain_data):
    batches = iter(make(plain_data, skip=[(4, 9)]))
    state = [next(batches) for _ in range(3)][-1].state
    assert (state["step"], state["skipped"]) == (3, [[4, 9]])
    again = make(plain_data, skip=[(1, 2)])
    again.load_state_dict(state)
    assert len(list(again)) == 10
    assert again.state_dict()["skipped"] == []


def test_what_images_count_may_not_change_where_it_decides_about_batches(mixed_data):
    state = next(iter(make(mixed_data, batch_size=4, max_tiles=6, image_tokens=5))).state
    with pytest.raises(StateError, match="image_tokens is 5 in the state, 50 here"):
        make(mixed_data, batch_size=4, max_tiles=6, image_tokens=50).load_state_dict(state)


def test_a_data_set_too_small_for_its_batches_says_so(tmp_path, made):
    data = made.write(tmp_path / "few", [made.ordinary(i) for i in range(5)], shards=1)
    with pytest.warns(UserWarning, match="5 samples, fewer than a global batch of 8: drop_last"):
        loader = make(data, drop_last=True)
    assert list(loader) == []
    empty = made.write(tmp_path / "none", [], shards=1)
    with pytest.warns(UserWarning, match="no samples: no batch will come"):
        make(empty)
