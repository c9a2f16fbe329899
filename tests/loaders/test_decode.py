"""Every mode of Pillow's becomes RGB by its own conversion, stored or in memory; sizes are told by headers; what fails is an ImageError."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from loaders.decode import decode, pixels_of, size_of
from shardify.errors import ImageError

SIZE = (37, 23)


def in_mode(mode: str) -> Image.Image:
    """Noise, in any mode; of I and F also values beyond 0 to 255."""
    generator = np.random.default_rng(0)
    rgba = Image.fromarray(generator.integers(0, 256, (23, 37, 4), dtype=np.uint8), "RGBA")
    rgb = rgba.convert("RGB")
    if mode.startswith("I;16"):
        return Image.frombytes(mode, SIZE, generator.integers(0, 65536, (23, 37), dtype=np.uint16).tobytes())
    if mode == "I":
        return Image.fromarray(generator.integers(-500, 70_000, (23, 37)).astype(np.int32))
    if mode == "F":
        return Image.fromarray(generator.normal(100, 100, (23, 37)).astype(np.float32))
    if mode == "LAB":
        return Image.frombytes("LAB", SIZE, rgb.tobytes())
    if mode == "P with transparency":
        image = rgb.quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
        return image
    if mode in ("RGBA", "LA"):
        return rgba.convert(mode)
    if mode in ("RGBa", "La", "PA"):
        return rgba.convert("RGBA" if mode == "RGBa" else "LA").convert(mode)
    return rgb.convert(mode)


MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "I;16B",
    "I;16L",
    "F",
]


@pytest.mark.parametrize("mode", [*MODES, "P with transparency"])
def test_pictures_in_memory_are_converted_as_pillow_does(mode):
    image = in_mode(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(image.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels_of(image), expected)


STORED = [
    ("1", "PNG"),
    ("1", "TIFF"),
    ("L", "PNG"),
    ("LA", "PNG"),
    ("LA", "TIFF"),
    ("P", "PNG"),
    ("P with transparency", "PNG"),
    ("P", "GIF"),
    ("PA", "TIFF"),
    ("RGBA", "PNG"),
    ("RGBA", "WEBP"),
    ("RGBX", "TIFF"),
    ("CMYK", "TIFF"),
    ("CMYK", "JPEG"),
    ("YCbCr", "TIFF"),
    ("LAB", "TIFF"),
    ("I", "TIFF"),
    ("I;16", "PNG"),
    ("I;16", "TIFF"),
    ("I;16B", "TIFF"),
    ("F", "TIFF"),
]


@pytest.mark.parametrize(("mode", "kind"), STORED, ids=["-".join(item) for item in STORED])
def test_stored_pictures_are_converted_as_pillow_does(mode, kind):
    file = io.BytesIO()
    in_mode(mode).save(file, kind)
    data = file.getvalue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    found = decode(data)
    assert np.array_equal(found, expected)
    assert found.flags.writeable
    assert size_of(data) == (23, 37)


def test_alpha_is_dropped_and_not_composited():
    """What a picture hides shows; transformers' own conversion, from some version on, puts white there."""
    image = Image.new("RGBA", (2, 1), (200, 10, 20, 0))
    assert pixels_of(image).tolist() == [[[200, 10, 20]] * 2]


def test_what_pillow_cannot_convert_is_an_image_error():
    image = in_mode("La")
    with pytest.raises(ValueError, match="conversion"):
        image.convert("RGB")
    with pytest.raises(ImageError, match="image-undecodable"):
        pixels_of(image)


def test_pictures_opened_and_not_decoded_fail_as_bytes_do():
    file = io.BytesIO()
    in_mode("RGB").save(file, "PNG")
    with pytest.raises(ImageError, match="image-undecodable"):
        pixels_of(Image.open(io.BytesIO(file.getvalue()[:200])))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2)), np.zeros((0, 2, 3), np.uint8), "text", None],
    ids=["four", "grey", "empty", "text", "none"],
)
def test_other_things_are_no_pictures(pixels):
    for function in (pixels_of, size_of):
        with pytest.raises(ImageError, match="image-undecodable"):
            function(pixels)


def test_sizes_are_told_without_decoding():
    assert size_of(in_mode("RGB")) == size_of(np.zeros((23, 37, 3), np.uint8)) == (23, 37)
    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.new("RGB", (300, 200)).save(file, kind)
        assert size_of(file.getvalue()[:700]) == (200, 300)
    for data, code in [
        (b"", "image-empty"),
        (b"\xff\xd8\xff", "image-undecodable"),
        (b"?", "image-undecodable"),
    ]:
        with pytest.raises(ImageError, match=code):
            size_of(data)
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0), b"IDAT", b"IEND"]
    framed = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    ]
    bomb = b"\x89PNG\r\n\x1a\n" + b"".join(framed)
    with pytest.raises(ImageError, match="image-too-large"):
        size_of(bomb)
