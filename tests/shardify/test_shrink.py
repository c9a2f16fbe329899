"""Smaller pictures are what CLIP's preprocessor would make of the large ones, and keep what they mean."""

import io
import os
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from shardify.errors import ImageError
from shardify.images.probe import probe
from shardify.images.shrink import shrink

RNG = np.random.default_rng(0)
# smooth, as photographs are: encoders lose little of it
PHOTO = Image.fromarray(RNG.integers(0, 256, (6, 9, 4), dtype=np.uint8), "RGBA").resize(
    (240, 160), Image.Resampling.BICUBIC
)


def encoded(image, format_, **options):
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def shrunk(data, edge=60, **options):
    """The header and picture that are left, and whether the result is what its header says."""
    smaller, header = shrink(data, probe(data), shortest_edge=edge, **options)
    assert probe(smaller, check="decode") == header
    image = Image.open(io.BytesIO(smaller))
    image.load()
    return header, image


def distance(one, other):
    return np.abs(np.asarray(one, np.int64) - np.asarray(other, np.int64)).mean()


@pytest.mark.parametrize(
    ("mode", "format_", "kind", "options", "kept"),
    [
        ("RGB", "JPEG", "jpg", {"quality": 95}, "RGB"),
        ("L", "JPEG", "jpg", {"quality": 95}, "L"),
        ("CMYK", "JPEG", "jpg", {"quality": 95}, "CMYK"),
        ("RGB", "PNG", "png", {}, "RGB"),
        ("L", "PNG", "png", {}, "L"),
        ("1", "PNG", "png", {}, "L"),
        ("P", "PNG", "png", {}, "RGB"),
        ("RGBA", "PNG", "png", {}, "RGBA"),
        ("LA", "PNG", "png", {}, "LA"),
        ("RGB", "WEBP", "webp", {"quality": 95}, "RGB"),
        ("RGBA", "WEBP", "webp", {"quality": 95}, "RGBA"),
        ("RGB", "GIF", "png", {}, "RGB"),
        ("RGB", "BMP", "png", {}, "RGB"),
        ("RGB", "TIFF", "png", {}, "RGB"),
        ("CMYK", "TIFF", "png", {}, "RGB"),
        ("F", "TIFF", "png", {}, "RGB"),
    ],
)
def test_formats_and_modes_are_kept(mode, format_, kind, options, kept):
    source = PHOTO if mode in ("RGBA", "LA") else PHOTO.convert("RGB")
    data = encoded(source.convert(mode), format_, **options)
    header, image = shrunk(data)
    assert (header.format, header.width, header.height, image.mode) == (kind, 90, 60, kept)
    # what a model sees: the reference's conversion, of the large picture and of the small one
    with Image.open(io.BytesIO(data)) as large:
        reference = large.convert("RGB").resize((90, 60), Image.Resampling.BICUBIC)
    assert distance(image.convert("RGB"), reference) < (2 if kind == "png" else 5)


def test_lossless_formats_are_exactly_what_the_preprocessor_makes():
    for format_, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        _, image = shrunk(encoded(PHOTO.convert("RGB"), format_, **options))
        assert distance(image, PHOTO.convert("RGB").resize((90, 60), Image.Resampling.BICUBIC)) == 0


def test_colours_under_what_is_transparent_survive():
    hidden = PHOTO.copy()
    hidden.putalpha(0)
    for format_, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(hidden, format_, exact=True, **options)
        _, image = shrunk(data)
        assert (
            distance(image.convert("RGB"), hidden.convert("RGB").resize((90, 60), Image.Resampling.BICUBIC))
            == 0
        )
    palette = encoded(PHOTO.convert("P"), "PNG", transparency=5)
    assert shrunk(palette)[1].mode == "RGBA"


def test_deep_pictures_stay_deep():
    deep = Image.fromarray(np.asarray(PHOTO.convert("L"), np.uint16) * 257)
    header, image = shrunk(encoded(deep, "PNG"))
    assert header.traits == ("image-deep",)
    assert (
        distance(np.asarray(image) // 257, PHOTO.convert("L").resize((90, 60), Image.Resampling.BICUBIC)) < 1
    )


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_and_profile_stay(format_):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x013B] = 6, "a camera", "somebody"
    header, image = shrunk(encoded(PHOTO.convert("RGB"), format_, exif=exif, icc_profile=profile))
    if format_ == "TIFF":  # turned by Pillow when it is read, whoever reads it
        assert (header.width, header.height, header.traits, dict(image.getexif())) == (60, 90, (), {})
    else:
        assert (header.width, header.height, header.traits) == (90, 60, ("image-rotated",))
        assert dict(image.getexif()) == {0x0112: 6}
    assert image.info["icc_profile"] == profile


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_no_fault_of_the_picture(format_):
    header, _ = shrunk(encoded(PHOTO.convert("RGB"), format_, exif=b"Exif\0\0II, but no directory"))
    assert min(header.width, header.height) == 60


def test_chroma_subsampling_and_quality():
    for subsampling in (0, 1, 2):
        data = encoded(PHOTO.convert("RGB"), "JPEG", subsampling=subsampling)
        sampling = shrunk(data)[1].layer[0][1:3]
        assert sampling == [(1, 1), (2, 1), (2, 2)][subsampling]
    photo = encoded(PHOTO.convert("RGB"), "JPEG")
    sizes = [len(shrink(photo, probe(photo), shortest_edge=60, quality=q)[0]) for q in (10, 50, 95)]
    assert sizes == sorted(sizes)


def test_of_an_animation_the_first_frame_is_left():
    pictures = [PHOTO.convert("RGB"), Image.new("RGB", PHOTO.size)]
    for format_, kind in (("GIF", "png"), ("WEBP", "webp"), ("PNG", "png")):
        data = encoded(pictures[0], format_, save_all=True, append_images=pictures[1:])
        assert "image-animated" in probe(data).traits
        header, image = shrunk(data)
        assert (header.format, header.traits) == (kind, ())
        assert distance(image, pictures[0].resize((90, 60))) < 10


def test_small_pictures_are_left_alone():
    data = encoded(PHOTO.convert("RGB"), "PNG")
    assert shrink(data, probe(data), shortest_edge=160) is None
    assert shrink(data, probe(data), shortest_edge=1000) is None
    for options in (
        {"shortest_edge": 0},
        {"shortest_edge": 9, "quality": 0},
        {"shortest_edge": 9, "quality": 101},
    ):
        with pytest.raises(ValueError, match="at least 1"):
            shrink(data, probe(data), **options)


@given(width=st.integers(1, 300), height=st.integers(1, 300), edge=st.integers(1, 300))
def test_sides_are_those_of_the_preprocessor(width, height, edge):
    data = encoded(Image.new("L", (width, height)), "PNG")
    result = shrink(data, probe(data), shortest_edge=edge)
    if min(width, height) <= edge:
        assert result is None
    else:
        short, long = sorted((width, height))
        expected = (edge, int(edge * long / short))
        _, header = result
        assert (header.width, header.height) == (expected if width <= height else expected[::-1])


def test_the_same_bytes_every_time():
    for format_ in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encoded(PHOTO.convert("RGB"), format_)
        assert len({shrink(data, probe(data), shortest_edge=50)[0] for _ in range(3)}) == 1


def test_what_cannot_be_decoded_has_a_reason():
    data = encoded(PHOTO.convert("RGB"), "JPEG")
    with pytest.raises(ImageError, match="image-truncated"):
        shrink(data[:-300], probe(data), shortest_edge=60)
    png = encoded(PHOTO.convert("RGB"), "PNG")
    with pytest.raises(ImageError, match="image-undecodable"):
        shrink(png[:100] + bytes(len(png) - 200) + png[-100:], probe(png), shortest_edge=60)


def test_real_pictures_mean_the_same(real_data):
    """What the reference sees of the small picture is close to what it sees of the large one made small."""
    done = 0
    for folder, _, files in os.walk(real_data / "pillow_edge_cases"):
        for name in sorted(files):
            with open(os.path.join(folder, name), "rb") as file:
                data = file.read()
            try:
                header = probe(data, check="decode")
            except ImageError:
                continue
            if min(header.width, header.height) <= 30 or header.width * header.height > 2_000_000:
                continue
            if "image-deep" in header.traits:
                continue  # the reference clips these; clipped before or after, they differ
            result = shrink(data, header, shortest_edge=30)
            if result is None:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data)) as large, Image.open(io.BytesIO(result[0])) as small:
                    reference = large.convert("RGB").resize(small.size, Image.Resampling.BICUBIC)
                    assert distance(small.convert("RGB"), reference) < 12, name
            done += 1
    assert done > 200
