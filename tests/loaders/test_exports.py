"""Batches as LLaVA's collator and transformers' models take them, from the references' rules; the rules are worked by hand beside each test."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from loaders.batch import Batch
from loaders.image import ImageTransform
from shardify.errors import UsageError

CROP = ImageTransform(8)
ANYRES = ImageTransform(8, fit="anyres", grid_pinpoints=[(16, 8), (16, 16)])


def pixels(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def batch(pictures, samples, transform, **changes):
    """A batch of three texts, the last a filler, with images that a transform has fitted; `samples`: the sample of each image."""
    prepared = [
        transform.prepare(image, images=samples.count(s)) for image, s in zip(pictures, samples, strict=True)
    ]
    memory = np.empty(sum(item.nbytes for item in prepared), np.uint8)
    begin = 0
    for item in prepared:
        item.write(memory[begin : begin + item.nbytes])
        begin += item.nbytes
    pixels_in = torch.from_numpy(memory)
    if not transform.is_ragged:
        pixels_in = pixels_in.reshape(-1, transform.size, transform.size, 3).permute(0, 3, 1, 2)

    def pairs(values):
        return torch.tensor(values, dtype=torch.int64).reshape(-1, 2)

    fields = {
        "keys": ["a", "b", ""],
        "positions": torch.tensor([0, 1, -1]),
        "valid": torch.tensor([True, True, False]),
        "rows": torch.arange(3),
        # padding is 0; the second text has one inside (LLaVA-1.5 pads with <unk>, which texts may hold)
        "input_ids": torch.tensor([[1, -200, 5, 6], [1, 0, 7, 0], [0, 0, 0, 0]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [-100, -100, 7, -100], [-100] * 4]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool(),
        "pad_token_id": 0,
        "images": pixels_in,
        "image_samples": torch.tensor(samples, dtype=torch.int64),
        "image_sizes": pairs([item.size for item in prepared]),
        "image_tiles": torch.tensor([item.tiles for item in prepared], dtype=torch.int64)
        if transform.is_tiled
        else None,
        "image_shapes": pairs([item.shape for item in prepared]) if transform.is_ragged else None,
        "image_fit": transform,
        "state": {},
        **changes,
    }
    return Batch(**fields)


# LLaVA's collator: {input_ids, labels, attention_mask = input_ids.ne(pad_token_id), images}; images are stacked when all shapes are equal, and
# a text-only sample of a multimodal run has zeros(3, crop_size, crop_size) for its image (train.py, __getitem__ and the collator)


def test_the_dict_of_llavas_collator():
    image = pixels(20, 30, 0)
    made = batch([image], [0], CROP).to_llava()
    assert list(made) == ["input_ids", "labels", "attention_mask", "images"]
    # -200 is not padding: attended. The 0 inside the second text is masked, as the reference does. The filler keeps its one token
    assert made["attention_mask"].tolist() == [
        [True, True, True, True],
        [True, False, True, False],
        [True, False, False, False],
    ]
    assert made["attention_mask"].dtype == torch.bool
    assert made["input_ids"].dtype == made["labels"].dtype == torch.int64
    assert made["images"].shape == (3, 3, 8, 8)
    assert made["images"].dtype == torch.float32
    assert torch.equal(made["images"][0], CROP.normalize(CROP(image)))
    assert not made["images"][1:].any()  # zeros, not black pictures, which would be normalised to -mean / std


def test_a_batch_without_images_has_zeros_for_all():
    made = batch([], [], CROP).to_llava()
    assert made["images"].shape == (3, 3, 8, 8)
    assert not made["images"].any()


def test_several_images_of_a_sample_are_listed_in_order():
    images = [pixels(20, 30, seed) for seed in range(3)]
    made = batch(images, [0, 0, 1], CROP).to_llava()
    # a, a, b, and the filler's zeros
    assert [tuple(image.shape) for image in made["images"]] == [(3, 8, 8)] * 4
    for found, image in zip(made["images"], images, strict=False):
        assert torch.equal(found, CROP.normalize(CROP(image)))
    assert not made["images"][3].any()


# LLaVA-NeXT's collator: images is a list of [tiles, 3, H, W] over all images of all samples; image_sizes their (width, height); modalities
# "image", or "text" for a sample without image, which has zeros(1, 3, crop, crop) of the size (crop, crop)


def test_the_dict_of_llava_nexts_collator():
    images = [pixels(8, 16, 0), pixels(16, 16, 1)]
    made = batch(images, [0, 0], ANYRES).to_llava()
    # 16x8 (width, height) fills the grid 16x8: 2 tiles and the base. 16x16: grid 16x8 keeps 8x8 = 64 px, 16x16 all 256: 4 and the base
    assert [tuple(image.shape) for image in made["images"]] == [
        (3, 3, 8, 8),
        (5, 3, 8, 8),
        (1, 3, 8, 8),
        (1, 3, 8, 8),
    ]
    assert made["image_sizes"] == [(16, 8), (16, 16), (8, 8), (8, 8)]
    assert made["modalities"] == ["image", "image", "text", "text"]
    for found, image in zip(made["images"], images, strict=False):
        assert torch.equal(found, ANYRES.normalize(ANYRES(image)))
    assert not made["images"][2].any()


def test_padded_ones_among_several_have_no_tiles():
    # LLaVA-NeXT: a sample with several images has them processed with "pad", which gives [3, H, W]; one alone is cut into tiles
    transform = dataclasses.replace(ANYRES, pad_several=True)
    images = [pixels(8, 16, 0), pixels(16, 16, 1), pixels(8, 16, 2)]
    made = batch(images, [0, 0, 1], transform).to_llava()
    assert [tuple(image.shape) for image in made["images"]] == [
        (3, 8, 8),
        (3, 8, 8),
        (3, 3, 8, 8),
        (1, 3, 8, 8),
    ]
    padded = ImageTransform(8, fit="pad")
    assert torch.equal(made["images"][0], padded.normalize(padded(images[0])))


def test_normalised_images_keep_their_type():
    image = pixels(20, 30, 0)
    ready = CROP.normalize(CROP(image)[None], torch.bfloat16)
    made = batch([image], [0], CROP, images=ready)
    assert torch.equal(made.to_llava()["images"][0], ready[0])
    assert made.to_hf()["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"input_ids": None, "labels": None, "attention_mask": None}, "no tokens"),
        ({"segment_ids": torch.zeros(3, 4)}, "pack"),
        ({"image_fit": None, "images": [b"x"]}, "encoded"),
        ({"image_fit": ImageTransform(fit="native")}, "fits are"),
    ],
    ids=["text", "packed", "encoded", "native"],
)
def test_what_is_no_batch_of_llavas(changes, named):
    with pytest.raises(UsageError, match=named):
        batch([], [], CROP, **changes).to_llava()


# transformers


def test_names_of_transformers_for_one_picture_an_image():
    images = [pixels(20, 30, seed) for seed in range(3)]
    made = batch(images, [0, 0, 1], CROP).to_hf()
    assert list(made) == ["input_ids", "attention_mask", "labels", "pixel_values"]
    assert made["attention_mask"].dtype == torch.int64
    assert made["pixel_values"].shape == (3, 3, 8, 8)
    assert torch.equal(made["pixel_values"][2], CROP.normalize(CROP(images[2])))


def test_without_images_there_are_no_keys_of_images():
    for transform in (CROP, ANYRES, ImageTransform(fit="native")):
        assert list(batch([], [], transform).to_hf()) == ["input_ids", "attention_mask", "labels"]


def test_packed_rows_keep_their_positions():
    ids = torch.zeros(3, 4, dtype=torch.int64)
    assert torch.equal(batch([], [], CROP, position_ids=ids, segment_ids=ids).to_hf()["position_ids"], ids)


def test_encoded_images_are_refused():
    with pytest.raises(UsageError, match="encoded"):
        batch([], [], CROP, images=[b"x"], image_samples=torch.tensor([0]), image_fit=None).to_hf()


def theirs(module: str, name: str, options: dict):
    pytest.importorskip("transformers", reason="needs transformers")
    from importlib import import_module

    path = f"transformers.models.{module}.image_processing_pil_{module}"
    try:
        return getattr(import_module(path), f"{name}ImageProcessorPil")(**options)
    except ImportError:
        pytest.skip(f"this version of transformers has no {path}")


GRIDS = [[48, 96], [96, 48], [96, 96]]
FAMILIES = [
    ("llava_next", "LlavaNext", {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}, "image_grid_pinpoints": GRIDS}),
    ("llava_onevision", "LlavaOnevision", {"size": {"height": 48, "width": 48}, "image_grid_pinpoints": GRIDS}),
    ("qwen2_vl", "Qwen2VL", {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 64}),
    ("smolvlm", "SmolVLM", {"size": {"longest_edge": 192}, "max_image_size": {"longest_edge": 64}}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "options"), FAMILIES, ids=[family[1] for family in FAMILIES])
def test_what_the_processor_returns_for_a_batch(module, name, options):
    """The first sample has two pictures, the second one; the filler has none."""
    processor = theirs(module, name, options)
    transform = ImageTransform.from_processor(processor)
    images = [pixels(70, 90, 0), pixels(150, 60, 1), pixels(60, 130, 2)]
    pictures = [Image.fromarray(image) for image in images]
    if name in ("SmolVLM", "LlavaOnevision"):
        nested = [pictures[:2], pictures[2:]] + ([[]] if name == "SmolVLM" else [])
        expected = processor(nested, return_tensors="pt")
    else:
        expected = processor(pictures, return_tensors="pt")
    made = batch(images, [0, 0, 1], transform).to_hf()
    named = set(expected) - {"rows", "cols"}
    assert set(made) - {"input_ids", "attention_mask", "labels"} == named
    for key in named - {"pixel_values"}:
        assert torch.equal(made[key].reshape(-1), torch.as_tensor(expected[key]).reshape(-1)), key
    assert made["pixel_values"].shape == expected["pixel_values"].shape
    difference = (made["pixel_values"] - expected["pixel_values"]).abs()
    assert difference.max() <= 2.01 / 255 / min(transform.std)
