"""ImageTransform made from transformers' image processors does what they do; what it cannot do is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from loaders.image import CLIP_MEAN, ImageTransform
from shardify.errors import UsageError

SIZES = [(500, 375), (375, 500), (64, 64), (900, 200), (200, 900), (31, 47), (1500, 1000), (337, 336)]
GRIDS = [
    [48, 96],
    [96, 48],
    [96, 96],
    [144, 48],
    [48, 144],
]  # (height, width), and not symmetric where two are equally good
EDGE_48 = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}
SQUARE_48 = {"size": {"height": 48, "width": 48}}

PROCESSORS = [
    ("clip", "CLIP", EDGE_48),
    ("clip", "CLIP", {**EDGE_48, "resample": 2, "do_normalize": False}),
    ("siglip", "Siglip", SQUARE_48),
    ("llava", "Llava", {**EDGE_48, "do_pad": True}),
    ("llava", "Llava", EDGE_48),
    ("llava_next", "LlavaNext", {**EDGE_48, "image_grid_pinpoints": GRIDS}),
    ("llava_onevision", "LlavaOnevision", {**SQUARE_48, "image_grid_pinpoints": GRIDS}),
    ("qwen2_vl", "Qwen2VL", {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 64}),
    (
        "qwen2_vl",
        "Qwen2VL",
        {"size": {"shortest_edge": 64**2, "longest_edge": 32 * 32 * 64}, "patch_size": 16},
    ),
    ("idefics3", "Idefics3", {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}),
    (
        "smolvlm",
        "SmolVLM",
        {
            "size": {"longest_edge": 128},
            "max_image_size": {"longest_edge": 64},
            "do_image_splitting": False,
        },
    ),
]


def made(module: str, name: str, options: dict):
    """transformers' own processor, the one that needs no torchvision."""
    pytest.importorskip("transformers", reason="needs transformers")
    from importlib import import_module

    path = f"transformers.models.{module}.image_processing_pil_{module}"
    try:
        found = import_module(path)
    except ImportError:
        pytest.skip(f"this version of transformers has no {path}")
    return getattr(found, f"{name}ImageProcessorPil")(**options)


def picture(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    shades = np.stack([255 * x / width, 255 * y / height, 127 * ((x // 7 + y // 5) % 2)], axis=-1)
    noise = np.random.default_rng(width * 1009 + height).integers(0, 64, (height, width, 3))
    return (shades * 0.75 + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("module", "name", "options"), PROCESSORS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_pixels_are_those_of_the_processor(module, name, options):
    processor = made(module, name, options)
    transform = ImageTransform.from_processor(processor)
    assert ImageTransform.from_processor(processor.to_dict()) == transform
    for width, height in SIZES:
        pixels = picture(width, height)
        expected = processor(Image.fromarray(pixels), return_tensors="pt")
        values = expected["pixel_values"]
        ours = transform(pixels)
        if transform.fit == "native":
            flat = transform.normalize(ours.permute(1, 2, 0).reshape(-1))
            ours, grid = transform.to_patches(flat, torch.tensor([ours.shape[1:]]))
            assert torch.equal(grid, expected["image_grid_thw"])
        else:
            ours = transform.normalize(ours)
            values = values.reshape(ours.shape)  # batches of one
        assert ours.shape == values.shape
        difference = (ours - values).abs() * 255 * torch.tensor(transform.std).min()
        assert difference.max() <= 2.01
        assert difference.mean() <= 0.05


def test_equally_good_grids_are_chosen_as_by_the_processor():
    """(height, width) there, (width, height) here: of 1x2 and 2x1 tiles a small square takes the first."""
    for grids in (GRIDS, GRIDS[::-1]):
        processor = made("llava_next", "LlavaNext", {**EDGE_48, "image_grid_pinpoints": grids})
        transform = ImageTransform.from_processor(processor)
        expected = processor(Image.fromarray(picture(40, 40)), return_tensors="pt")["pixel_values"][0]
        ours = transform.normalize(transform(picture(40, 40)))
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < 0.05


def test_onevision_pads_several_pictures_of_a_sample():
    processor = made("llava_onevision", "LlavaOnevision", {**SQUARE_48, "image_grid_pinpoints": GRIDS})
    transform = ImageTransform.from_processor(processor)
    pictures = [picture(90, 40), picture(40, 90)]
    expected = processor([[Image.fromarray(pixels) for pixels in pictures]], return_tensors="pt")[
        "pixel_values"
    ]
    for pixels, values in zip(pictures, expected.reshape(2, 3, 48, 48), strict=True):
        prepared = transform.prepare(pixels, images=2)
        memory = np.empty(prepared.nbytes, np.uint8)
        prepared.write(memory)
        ours = transform.normalize(torch.from_numpy(memory.reshape(48, 48, 3)).permute(2, 0, 1))
        assert (ours - values).abs().max() < 0.05


# files and dicts, as checkpoints have them

CLIP_336 = {
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(CLIP_MEAN),
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
}


def test_settings_come_from_files_folders_and_processors(tmp_path):
    expected = ImageTransform(336, resample="bicubic")
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(CLIP_336))
    assert ImageTransform.from_processor(file) == expected
    assert ImageTransform.from_processor(str(tmp_path)) == expected
    inside = tmp_path / "whole"
    inside.mkdir()
    (inside / "processor_config.json").write_text(
        json.dumps({"processor_class": "LlavaProcessor", "image_processor": CLIP_336})
    )
    assert ImageTransform.from_processor(inside) == expected

    class Processor:
        class image_processor:  # noqa: N801
            @staticmethod
            def to_dict():
                return CLIP_336

    assert ImageTransform.from_processor(Processor()) == expected


def test_settings_that_are_left_out_are_the_processors_own():
    siglip = ImageTransform.from_processor({"image_processor_type": "SiglipImageProcessor"})
    assert (siglip.size, siglip.fit, siglip.mean, siglip.std) == (224, "squash", (0.5,) * 3, (0.5,) * 3)
    clip = ImageTransform.from_processor({"image_processor_type": "CLIPImageProcessorFast"})
    assert (clip.size, clip.fit, clip.mean) == (224, "crop", CLIP_MEAN)
    qwen = ImageTransform.from_processor({"image_processor_type": "Qwen2VLImageProcessor"})
    assert qwen.layout(20, 20).height == 56
    # Qwen2-VL's checkpoints say so; Qwen3-VL's have `size` and larger patches
    qwen = ImageTransform.from_processor(
        {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056}
    )
    assert (qwen.max_pixels, qwen.patch_size) == (12845056, 14)
    smol = ImageTransform.from_processor({"image_processor_type": "SmolVLMImageProcessor"})
    assert (smol.size, smol.fit, smol.longest_edge, smol.resample) == (364, "split", 1456, "lanczos")
    assert ImageTransform.from_processor({"merge_size": 2, "patch_size": 14}).fit == "native"


def test_one_value_is_for_all_channels():
    transform = ImageTransform.from_processor({**CLIP_336, "image_mean": 0.5, "image_std": 0.25})
    assert (transform.mean, transform.std) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": 448}, "crop_size=336"),
        ({"size": {"height": 300, "width": 400}}, "size="),
        ({"size": {"shortest_edge": 300, "longest_edge": 400}}, "size="),
        ({"do_center_crop": False}, "do_center_crop=False"),
        ({"do_resize": False}, "do_resize=False"),
        ({"do_rescale": False}, "do_rescale=False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor="),
        ({"resample": 0}, "resample=0"),
        ({"resample": "bicubic"}, "bicubic"),
        ({"size": "336"}, "336"),
        ({"image_mean": "0.5"}, "mean"),
        ({"do_pad": True}, "do_pad=True"),
        ({"image_processor_type": "PixtralImageProcessor"}, "PixtralImageProcessor"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "image_grid_pinpoints=None"),
        (
            {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[300, 300]]},
            "grid_pinpoints",
        ),
        ({"image_processor_type": "Idefics3ImageProcessor", "size": {"height": 3, "width": 3}}, "size="),
        ({"image_processor_type": "Qwen2VLImageProcessor", "size": {"height": 3, "width": 3}}, "size="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_honoured_is_named(changes, named):
    with pytest.raises(UsageError) as caught:
        ImageTransform.from_processor({**CLIP_336, **changes})
    assert named in str(caught.value)


@pytest.mark.parametrize("content", [None, "no JSON", "[]"], ids=["absent", "damaged", "list"])
def test_unreadable_files_are_named(tmp_path, content):
    file = tmp_path / "settings.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=r"settings\.json"):
        ImageTransform.from_processor(file)
    with pytest.raises(UsageError, match=r"preprocessor_config\.json"):
        ImageTransform.from_processor(tmp_path)


def test_other_things_are_no_processors():
    with pytest.raises(UsageError, match="int"):
        ImageTransform.from_processor(7)
