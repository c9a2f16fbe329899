"""Tiles counted beforehand, and batches of tiles and of ragged pictures as the loader and the prefetcher hand them out."""

import io
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import loaders.tiles as tiles_module
from loaders import DevicePrefetcher, ImageTransform, LlavaText, Mixture, StreamingLoader
from loaders.dataset import open_dataset
from loaders.text import ByteTokenizer, TextResult
from loaders.tiles import count_tiles, kept_tiles, ordinary_bytes
from shardify.errors import StateError, UsageError
from shardify.format.tar import ShardWriter

TEXT = LlavaText(ByteTokenizer())
GRIDS = [(16, 8), (8, 16), (16, 16)]
ANYRES = ImageTransform(8, fit="anyres", grid_pinpoints=GRIDS)
NATIVE = ImageTransform(fit="native", patch_size=2, merge_size=2, min_pixels=64, max_pixels=1024)
SPLIT = ImageTransform(8, fit="split", longest_edge=32)

SIZES = [(16, 8), (8, 16), (20, 20), (40, 13), (3, 3), (9, 30), (64, 64)]  # (width, height)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(number: int) -> np.ndarray:
    width, height = SIZES[number % len(SIZES)]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures(number: int) -> list[np.ndarray]:
    """Of sample `number`: every third has none, every fifth two."""
    count = 0 if number % 3 == 0 else 2 if number % 5 == 0 else 1
    return [picture(number + place) for place in range(count)]


def write(folder, samples=range(40), cuts=(13, 17), broken=()):
    folder.mkdir(parents=True)
    for shard, numbers in enumerate(np.split(np.array(samples), cuts)):
        with open(folder / f"{shard:03}.tar", "wb", buffering=0) as file:
            writer = ShardWriter(file)
            for number in numbers.tolist():
                images = pictures(number)
                for place, pixels in enumerate(images):
                    buffer = io.BytesIO()
                    Image.fromarray(pixels).save(buffer, "PNG")
                    data = buffer.getvalue()[: 60 if number in broken else None]
                    writer.add(f"{number:09}", "png" if len(images) == 1 else f"{place}.png", data)
                named = {} if not images else {"image": [f"{place}.png" for place in range(len(images))]}
                turns = [
                    {"from": "human", "value": "<image>\n" * len(images) + "What?"},
                    {"from": "gpt", "value": "It."},
                ]
                record = {"id": number, "conversations": turns, **named}
                writer.add(f"{number:09}", "json", json.dumps(record).encode())
                writer.end_sample()
            writer.close()
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data")


def make(data, image, **options):
    settings = {"batch_size": 6, "text": TEXT, "num_workers": 0, **options}
    return StreamingLoader(data, image=image, **settings)


def expected_tiles(number: int, image=ANYRES) -> int:
    images = pictures(number)
    return sum(image.layout(*pixels.shape[:2], images=len(images)).tiles for pixels in images)


# counting


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_counts_are_those_of_the_fit(data, monkeypatch, forked, several):
    if forked:
        monkeypatch.setattr(tiles_module, "_IN_PROCESS", 0)
    image = ImageTransform(8, fit="anyres", grid_pinpoints=GRIDS, pad_several=several)
    some = np.random.default_rng(0).permutation(40)
    counted = count_tiles(open_dataset(data), image).of(some)
    assert counted.tolist() == [expected_tiles(number, image) for number in some.tolist()]
    # by hand: sample 1 has 8x16 (width, height), which fills the grid of 8x16: two tiles and the base. Sample 2 has 20x20: 16x16 keeps most: 4 + 1
    assert count_tiles(open_dataset(data), image).of(np.array([0, 1, 2])).tolist() == [0, 3, 5]


def test_counts_of_what_takes_part(tmp_path, data):
    side = open_dataset(data, split="train", validation=0.4)
    stored = side.parts[0].stored(np.arange(len(side)))
    assert 10 < len(stored) < 40
    assert count_tiles(side, ANYRES).of(np.arange(len(side))).tolist() == [
        expected_tiles(number) for number in stored.tolist()
    ]
    other = write(tmp_path / "other", samples=range(5, 9), cuts=(2,))
    both = open_dataset(Mixture({"a": (data, 1), "b": (other, 1)}))
    assert count_tiles(both, ANYRES).of(np.array([40, 41, 2, 43])).tolist() == [
        expected_tiles(number) for number in (5, 6, 2, 8)
    ]


def test_counts_are_kept_for_each_fit(data, monkeypatch):
    dataset = open_dataset(data)
    with pytest.raises(UsageError, match="tile counts are needed"):
        kept_tiles(dataset, ANYRES.fingerprint)
    first = count_tiles(dataset, ANYRES).of(np.arange(40)).tolist()
    monkeypatch.setattr(tiles_module, "_count", None)
    assert (
        count_tiles(dataset, ImageTransform(8, fit="anyres", grid_pinpoints=GRIDS)).of(np.arange(40)).tolist()
        == first
    )
    assert kept_tiles(dataset, ANYRES.fingerprint).of(np.arange(40)).tolist() == first
    with pytest.raises(TypeError):
        count_tiles(dataset, ImageTransform(8, fit="anyres", grid_pinpoints=[(8, 8)]))


def test_a_fit_without_a_name_is_refused(data):
    class Nameless:
        layout = None

    with pytest.raises(UsageError, match="fingerprint"):
        count_tiles(open_dataset(data), Nameless())


def test_fits_of_the_same_sizes_share_their_counts():
    assert (
        ImageTransform(8, fit="anyres", grid_pinpoints=GRIDS, background=(1, 2, 3)).fingerprint
        == ANYRES.fingerprint
    )
    names = {
        ImageTransform(8, fit="anyres", **options).fingerprint
        for options in ({}, {"grid_pinpoints": GRIDS}, {"grid_pinpoints": GRIDS, "pad_several": True})
    }
    assert len(names) == 3
    assert NATIVE.fingerprint != ImageTransform(fit="native").fingerprint != SPLIT.fingerprint


def test_ordinary_pictures_are_surveyed(data):
    sizes = [ANYRES.layout(*p.shape[:2]).nbytes for number in range(40) for p in pictures(number)]
    dataset = open_dataset(data)
    assert ordinary_bytes(dataset, ANYRES) == (int(np.mean(sizes)), max(sizes))
    for shard in dataset.files:
        os.unlink(shard.sidecar)
    mean, most = ordinary_bytes(dataset, ANYRES)  # a guess
    assert mean == most == 5 * 3 * 8 * 8


# batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("image", [ANYRES, SPLIT], ids=["anyres", "split"])
def test_batches_hold_the_tiles_of_all_images(data, image, workers):
    seen = 0
    loader = make(data, image, num_workers=workers)
    for batch in loader:
        wanted = [
            (place, pixels) for place, key in enumerate(batch.keys) if key for pixels in pictures(int(key))
        ]
        assert batch.image_samples.tolist() == [place for place, _ in wanted]
        assert batch.image_sizes.tolist() == [list(pixels.shape[:2]) for _, pixels in wanted]  # height, width
        assert batch.image_shapes is None
        parts = torch.split(batch.images, batch.image_tiles.tolist())
        for part, (_, pixels) in zip(parts, wanted, strict=True):
            assert torch.equal(part, image(pixels))
        seen += len(wanted)
    assert seen == sum(len(pictures(number)) for number in range(40))
    assert loader.report().overflowed == 0
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_ragged_batches_are_flat(data, workers):
    loader = make(data, NATIVE, num_workers=workers)
    for batch in loader:
        wanted = [pixels for key in batch.keys if key for pixels in pictures(int(key))]
        assert (batch.images.dim(), batch.images.dtype) == (1, torch.uint8)
        begin = 0
        for pixels, (height, width) in zip(wanted, batch.image_shapes.tolist(), strict=True):
            end = begin + 3 * height * width
            own = batch.images[begin:end].reshape(height, width, 3).permute(2, 0, 1)
            assert torch.equal(own, NATIVE(pixels))
            begin = end
        assert begin == len(batch.images)
        assert batch.image_tiles is None
    loader.close()


def test_several_of_a_sample_are_padded(data):
    image = ImageTransform(8, fit="anyres", grid_pinpoints=GRIDS, pad_several=True)
    counts = Counter()
    for batch in make(data, image):
        per_sample = torch.bincount(batch.image_samples, minlength=6)
        for sample, tiles in zip(batch.image_samples.tolist(), batch.image_tiles.tolist(), strict=True):
            counts[int(per_sample[sample])] += 1
            assert (tiles == 1) == (per_sample[sample] == 2)
    assert counts[1]
    assert counts[2]


@pytest.mark.parametrize("image", [ANYRES, NATIVE], ids=["anyres", "native"])
def test_a_damaged_image_leaves_nothing_behind(tmp_path, image):
    data = write(tmp_path / "data", broken=(4, 10))
    faults = []
    for batch in make(data, image):
        assert len(batch.image_samples) == len(batch.image_sizes)
        if image is ANYRES:
            assert len(batch.images) == batch.image_tiles.sum()
        else:
            assert len(batch.images) == 3 * batch.image_shapes.prod(1).sum()
        faults += batch.faults
    assert sorted(fault.key for fault in faults) == ["000000004", "000000010"]


@pytest.mark.parametrize("image", [ANYRES, NATIVE, SPLIT], ids=["anyres", "native", "split"])
def test_batches_without_any_image(tmp_path, image):
    data = write(tmp_path / "texts", samples=range(0, 30, 3), cuts=())
    for batch in make(data, image):
        assert len(batch.images) == len(batch.image_samples) == len(batch.image_sizes) == 0
        assert "pixel_values" not in batch.to_hf()


# budgets


def test_a_budget_of_tiles_bounds_tiles(data):
    loader = make(data, ANYRES, batch_size=None, max_tiles=12)
    seen, full = [], 0
    for batch in loader:
        assert int(batch.image_tiles.sum()) <= 12
        assert len(batch.images) == int(batch.image_tiles.sum())
        full += int(batch.image_tiles.sum()) > 6
        seen += [int(key) for key in batch.keys if key]
    assert sorted(seen) == list(range(40))
    assert full
    assert loader.report().overflowed == 0


def test_a_budget_is_of_the_fit_it_was_planned_for(data):
    batches = iter(make(data, ANYRES, batch_size=None, max_tiles=12))
    state = next(batches).state
    other = make(
        data, ImageTransform(8, fit="anyres", grid_pinpoints=[(8, 8)]), batch_size=None, max_tiles=12
    )
    with pytest.raises(StateError, match="tiles"):
        other.load_state_dict(state)
    make(data, ANYRES, batch_size=None, max_tiles=12).load_state_dict(state)


# on the way to the model


@pytest.mark.parametrize("image", [ANYRES, NATIVE], ids=["anyres", "native"])
def test_the_prefetcher_normalises_every_fit(data, image):
    plain = make(data, image)
    for batch, other in zip(DevicePrefetcher(make(data, image), "cpu", torch.bfloat16), plain, strict=True):
        assert batch.images.dtype == torch.bfloat16
        assert torch.equal(batch.images, image.normalize(other.images, torch.bfloat16))
        ready, raw = batch.to_hf(), other.to_hf()
        assert ready.keys() == raw.keys()
        for key, value in raw.items():
            wanted = value.to(torch.bfloat16) if value.is_floating_point() else value
            assert torch.equal(ready[key], wanted)


def test_llavas_dict_comes_out_of_the_loader(data):
    for batch in make(data, ImageTransform(8)):
        made = batch.to_llava()
        assert len(made["images"]) >= len(batch.keys)
        assert torch.equal(made["attention_mask"], made["input_ids"] != 0) or not bool(batch.valid.all())
    assert make(data, ImageTransform(8)).report().samples == 0


class Sized:
    """A text as many tokens long as its images have pixels together, which it must be told."""

    pad_token_id = 0
    needs_image_sizes = True

    def __call__(self, record, *, image_sizes):
        tokens = 1 + sum(height * width for height, width in image_sizes)
        return TextResult([1] * tokens, [1] * tokens)


def test_pictures_of_other_sizes_than_their_text_was_made_for_are_left_out(data, monkeypatch):
    monkeypatch.setattr("loaders.build.size_of", lambda image: (7, 7))
    loader = make(data, ANYRES, text=Sized())
    left = sorted(int(key) for batch in loader for key in batch.keys if key)
    assert left == list(range(0, 40, 3))
    assert set(loader.report().faults) == {"image-undecodable"}


def test_texts_may_ask_for_the_sizes_of_images(data):
    for batch in make(data, None, text=Sized()):
        for sample, key in enumerate(batch.keys):
            if key:
                pixels = sum(p.shape[0] * p.shape[1] for p in pictures(int(key)))
                assert int(batch.attention_mask[sample].sum()) == 1 + pixels
