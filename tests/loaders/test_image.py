"""Pixels against Pillow's own, on generated pictures of every mode and on real ones; and bytes that are no pictures."""

import contextlib
import io
import json
import os
import pickle
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loaders.decode import decode
from loaders.image import CLIP_MEAN, CLIP_STD, ImageTransform
from shardify.errors import ImageError, UsageError

sys.path.insert(0, str(Path(__file__).parent))
from references import LLAVA_16, anyres_by_pillow, fitted_by_pillow

FITS = ("crop", "pad")


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Gradients, edges and noise, in any mode."""
    generator = np.random.default_rng(width * 1009 + height)
    y, x = np.mgrid[:height, :width]
    shades = [255 * x / width, 255 * y / height, 127 * ((x // 7 + y // 5) % 2), 255 - 255 * x / width]
    array = np.stack(shades, axis=-1) * 0.75 + generator.integers(0, 64, (height, width, 4))
    rgba = Image.fromarray(array.clip(0, 255).astype(np.uint8), "RGBA")
    if mode == "RGBA":
        return rgba
    if mode == "I;16":
        return Image.fromarray((array[..., 0] * 257).astype(np.uint16))
    if mode == "CMYK":
        return Image.frombytes("CMYK", (width, height), rgba.tobytes())
    if mode == "P":
        return rgba.convert("RGB").quantize(64)
    if mode in ("LA", "PA"):
        return rgba.convert("LA").convert(mode)
    return rgba.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def assert_as_pillow(data: bytes, size: int, fit: str) -> None:
    ours = ImageTransform(size, fit=fit)(data).permute(1, 2, 0).numpy()
    difference = np.abs(ours.astype(int) - fitted_by_pillow(Image.open(io.BytesIO(data)), size, fit))
    assert difference.max() <= 2
    if size >= 64:  # of a few pixels the mean says nothing
        assert difference.mean() <= 0.05


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"subsampling": 0}),
        ("RGB", "JPEG", {"subsampling": 1, "quality": 95}),
        ("RGB", "JPEG", {"progressive": True, "quality": 30}),
        ("RGB", "JPEG", {"keep_rgb": True}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("L", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("1", "PNG", {}),
        ("I;16", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "WEBP", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "BMP", {}),
        ("CMYK", "TIFF", {}),
        ("LAB", "TIFF", {}),
        ("PA", "TIFF", {}),
        ("RGB", "JPEG2000", {}),
        ("RGB", "AVIF", {}),
    ],
)
def test_every_mode_and_format_is_within_two_of_pillow(mode, kind, options, fit):
    if mode == "LAB":
        rgb = picture(181, 133)
        image = Image.merge("LAB", rgb.split())
    elif mode == "PA":
        image = picture(181, 133, "P")
        image.putalpha(200)
    else:
        image = picture(181, 133, mode)
    assert_as_pillow(encoded(image, kind, **options), 96, fit)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("width", "height"),
    [
        (1, 1),
        (1, 9),
        (9, 1),
        (3, 50),
        (96, 96),
        (96, 97),
        (97, 96),
        (500, 375),
        (333, 500),
        (640, 425),
        (31, 2000),
        (2000, 31),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_every_shape_is_within_two_of_pillow(width, height, kind, fit):
    assert_as_pillow(encoded(picture(width, height), kind), 96, fit)


@pytest.mark.parametrize(("width", "height"), [(132, 272), (400, 1000), (50, 900), (336, 700), (1000, 400)])
def test_sharp_edges_of_any_shape_are_within_two_of_pillow(width, height):
    """Noise of black and white, where the order of the two passes shows most."""
    pixels = np.random.default_rng(0).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    assert_as_pillow(encoded(Image.fromarray(pixels), "PNG"), 107, "crop")
    assert_as_pillow(encoded(Image.fromarray(pixels), "PNG"), 107, "pad")


@given(
    width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(1, 120), fit=st.sampled_from(FITS)
)
@settings(max_examples=60)
def test_any_size_is_within_two_of_pillow(width, height, size, fit):
    assert_as_pillow(encoded(picture(width, height), "PNG"), size, fit)


def test_the_padded_square_is_never_in_memory():
    for width, height in ((4, 30_000), (30_000, 4)):  # the square would have 2.7 GB
        data = encoded(Image.new("RGB", (width, height), (255, 255, 255)), "PNG")
        pixels = ImageTransform(32, fit="pad")(data)
        background = torch.tensor([122, 116, 104], dtype=torch.uint8)
        assert torch.equal(pixels[:, 0, 0], background)


def test_tall_pictures_padded_in_strips_are_the_same(monkeypatch):
    data = encoded(picture(40, 301), "PNG")
    whole = ImageTransform(64, fit="pad")(data)
    monkeypatch.setattr("loaders.fits._STRIP_BYTES", 301 * 3 * 7)
    assert torch.equal(ImageTransform(64, fit="pad")(data), whole)


def test_orientation_tags_are_ignored():
    image = picture(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = encoded(image, "JPEG", exif=exif), encoded(image, "JPEG")
    assert turned != plain
    assert torch.equal(ImageTransform(32)(turned), ImageTransform(32)(plain))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (20, 20), (level, 0, 0)) for level in (250, 0)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[0, 0].tolist() == [250, 0, 0]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_any_buffer_is_taken(kind, format_):
    data = encoded(picture(40, 30), format_)
    assert torch.equal(ImageTransform(16)(kind(data)), ImageTransform(16)(data))


def test_pixels_go_into_any_memory():
    data = encoded(picture(50, 40), "JPEG")
    transform = ImageTransform(24)
    expected = transform(data)
    assert expected.shape == transform.shape
    assert expected.dtype == torch.uint8
    assert expected.is_contiguous()
    batch = torch.zeros(3, 24, 24, 3, dtype=torch.uint8)
    transform.into(data, batch[1].permute(2, 0, 1))
    assert torch.equal(batch[1].permute(2, 0, 1), expected)
    assert not batch[0].any()
    assert not batch[2].any()
    planes = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)
    transform.into(data, planes[1])
    assert torch.equal(planes[1], expected)


def test_memory_is_untouched_by_a_bad_image():
    out = torch.full((3, 24, 24), 7, dtype=torch.uint8)
    with pytest.raises(ImageError):
        ImageTransform(24).into(encoded(picture(50, 40), "JPEG")[:-300], out)
    assert bool((out == 7).all())


def test_normalize_is_the_formula():
    transform = ImageTransform(8)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    expected = (images.double() / 255 - mean) / std
    assert torch.allclose(transform.normalize(images).double(), expected, atol=1e-6)
    assert transform.normalize(images).dtype == torch.float32
    assert transform.normalize(images, torch.bfloat16).dtype == torch.bfloat16
    assert torch.allclose(transform.normalize(images[0]).double(), expected[0], atol=1e-6)
    assert transform.normalize(images[:0]).shape == (0, 3, 8, 8)


# bytes that are no pictures


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "image-empty"),
        (b"\xff\xd8", "image-undecodable"),
        (b"<html>404</html>", "image-undecodable"),
        (png(10, 10), "image-undecodable"),
        (png(0, 10), "image-undecodable"),
        (png(100_000, 100_000), "image-too-large"),
        (png(2_000_000_000, 2_000_000_000), "image-too-large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n", "image-undecodable"),
    ],
)
@pytest.mark.parametrize("fit", FITS)
def test_what_is_refused(data, code, fit):
    with pytest.raises(ImageError) as caught:
        ImageTransform(32, fit=fit)(data)
    assert caught.value.code == code


def test_a_jpeg_bomb_is_refused_by_its_header():
    data = bytearray(encoded(picture(16, 16), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(ImageError, match="image-too-large"):
        ImageTransform(32)(bytes(data))


def test_limits_hold_when_pillows_own_is_switched_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="image-too-large"):
        ImageTransform(32)(png(20_000, 20_000))


def test_sizes_that_only_resizing_would_blow_up_are_refused():
    data = encoded(Image.new("RGB", (60_000, 1)), "PNG")
    with pytest.raises(ImageError, match="image-too-large"):
        ImageTransform(336, fit="crop")(data)
    long = encoded(Image.new("1", (100_000, 1)), "PNG")
    with pytest.raises(ImageError, match="image-too-large"):
        ImageTransform(336, fit="pad")(long)


def test_no_warning_escapes():
    image = picture(20, 20, "P")
    data = encoded(image, "PNG", transparency=bytes(range(64)))  # Pillow warns when it converts this
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageTransform(16)(data)


SEEDS = {
    (kind, mode): encoded(picture(37, 23, mode), kind)
    for kind, mode in [
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("PNG", "P"),
        ("PNG", "RGBA"),
        ("GIF", "P"),
        ("WEBP", "RGB"),
    ]
}


@given(
    seed=st.sampled_from(sorted(SEEDS)),
    cut=st.none() | st.integers(0, 2000),
    changes=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=4),
    fit=st.sampled_from(FITS),
)
@settings(max_examples=400)
def test_damage_gives_pixels_or_an_image_error(seed, cut, changes, fit):
    data = bytearray(SEEDS[seed])
    for position, value in changes:
        data[position % len(data)] = value
    try:
        pixels = ImageTransform(16, fit=fit)(bytes(data[:cut]))
    except ImageError as error:
        assert error.code in ("image-empty", "image-too-large", "image-undecodable")
    else:
        assert pixels.shape == (3, 16, 16)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"II*\0", b"BM"]),
)
@settings(max_examples=200)
def test_noise_is_an_image_error(data, magic):
    with contextlib.suppress(ImageError):
        ImageTransform(16)(magic + data)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"fit": "stretch"},
        {"mean": (0.5, 0.5)},
        {"mean": ("a", "b", "c")},
        {"std": (1.0, 0.0, 1.0)},
        {"std": (1.0, 1.0, None)},
        {"background": "red", "fit": "pad"},
    ],
)
def test_impossible_settings_are_named(arguments):
    with pytest.raises(UsageError, match=next(iter(arguments))):
        ImageTransform(**arguments)


def test_a_transform_travels_to_workers():
    transform = ImageTransform(48, fit="pad", mean=(0.5, 0.5, 0.5))
    assert pickle.loads(pickle.dumps(transform)) == transform


# real pictures


def test_golden_outputs_of_clips_processor(real_data: Path):
    file = real_data.parent / "golden" / "clip_336_image.json"
    if not file.exists():
        pytest.skip(f"no golden outputs at {file}")
    for item in json.loads(file.read_text())["items"]:
        transform = ImageTransform(336, fit="crop" if item["aspect"] == "square" else "pad")
        values = transform.normalize(transform((real_data / item["file"]).read_bytes()))
        sampled = values.flatten()[torch.tensor(item["sample_idx"])]
        difference = (sampled - torch.tensor(item["sample"])).abs()
        assert difference.max() <= 0.03, item["file"]
        assert difference.mean() <= 0.002, item["file"]
        assert (values.mean(dim=(1, 2)) - torch.tensor(item["mean"])).abs().max() <= 0.002, item["file"]


@pytest.mark.parametrize("part", range(8))
def test_every_real_picture_is_within_two_of_pillow_and_fails_with_it(real_data: Path, part):
    """Every file, whatever it is (every second one unless $SHARDIFY_THOROUGH is set): in eight parts, so that they may run beside one another."""
    names = sorted(os.path.join(folder, name) for folder, _, names in os.walk(real_data) for name in names)
    transforms = {fit: ImageTransform(336, fit=fit) for fit in ("crop", "pad", "anyres")}
    checked = 0
    for file in names[part :: 8 if os.environ.get("SHARDIFY_THOROUGH") else 16]:
        data = Path(file).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = Image.open(io.BytesIO(data)).convert("RGB")
            except Exception:
                image = None
        if image is None:
            with pytest.raises(ImageError):
                decode(data)
            continue
        pixels = decode(data)
        for fit, transform in transforms.items():
            ours = transform(pixels).numpy().reshape(-1, 3, 336, 336).transpose(0, 2, 3, 1)
            expected = (
                anyres_by_pillow(image, 336, LLAVA_16)
                if fit == "anyres"
                else fitted_by_pillow(image, 336, fit)[None]
            )
            difference = np.abs(np.subtract(ours, expected, dtype=np.int16))
            assert difference.max() <= 2, (file, fit)
            assert difference.mean() <= 0.05, (file, fit)
        checked += 1
    assert checked > 40
