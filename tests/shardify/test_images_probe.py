"""Image headers agree with Pillow on whatever is found in the wild; traits say what a picture is beside."""

import io
import os
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shardify.errors import ImageError
from shardify.format.names import IMAGE_FORMATS, is_image_field
from shardify.images.probe import MAX_PIXELS, ImageHeader, probe, same_format

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def encoded(format_, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, format_, **options)
    return buffer.getvalue()


JPEG = encoded("JPEG")


def code_of(data):
    with pytest.raises(ImageError) as error:
        probe(data)
    return error.value.code


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (JPEG, "jpg"),
        (encoded("JPEG", progressive=True), "jpg"),
        (encoded("JPEG", "L", optimize=True), "jpg"),
        (encoded("JPEG", "CMYK"), "jpg"),
        (encoded("PNG"), "png"),
        (encoded("PNG", "P"), "png"),
        (encoded("GIF"), "gif"),
        (encoded("WEBP"), "webp"),
        (encoded("WEBP", lossless=True), "webp"),
        (encoded("WEBP", "RGBA", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"), "webp"),
        (encoded("BMP"), "bmp"),
        (encoded("TIFF"), "tif"),
        (encoded("TIFF", compression="tiff_lzw"), "tif"),
        (encoded("JPEG2000"), "jp2"),
        (encoded("AVIF"), "avif"),
        (encoded("PPM"), "ppm"),
    ],
)
def test_formats(data, name):
    assert probe(data) == ImageHeader(name, 53, 37)
    assert probe(memoryview(data)) == ImageHeader(name, 53, 37)


@pytest.mark.parametrize(
    "data", [JPEG, encoded("JPEG", progressive=True), encoded("PNG"), encoded("WEBP"), encoded("GIF")]
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_cut_off_ends_are_noticed(data, share):
    assert code_of(data[: int(len(data) * share)]) in ("image-truncated", "image-unrecognised")
    assert code_of(data[: int(len(data) * 0.7)]) == "image-truncated"


def test_appended_bytes_are_no_fault():
    for data in (JPEG, encoded("PNG"), encoded("WEBP"), encoded("GIF")):
        assert probe(data + b"\0" * 100).width == 53


def test_a_thumbnails_end_is_not_the_images_end():
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(JPEG) + 2) + JPEG
    data = JPEG[:2] + thumbnail + JPEG[2:]
    assert probe(data) == ImageHeader("jpg", 53, 37)
    assert code_of(data[: len(data) - len(JPEG) // 2]) == "image-truncated"


def test_what_is_no_image():
    assert code_of(b"") == "image-empty"
    assert code_of(b"<html>not found</html>") == "image-unrecognised"
    assert code_of(b"\x89PNG\r\n\x1a\n") == "image-truncated"


def test_claimed_sizes_are_bounded():
    png = bytearray(encoded("PNG"))
    png[16:24] = struct.pack(">II", MAX_PIXELS, 2)
    assert code_of(bytes(png)) == "image-too-large"
    png[16:24] = struct.pack(">II", 0, 2)
    assert code_of(bytes(png)) == "image-empty"


@given(
    data=st.binary(max_size=80), start=st.sampled_from([0, 3, 12, 30, 200]), which=st.sampled_from([0, 1, 2])
)
def test_any_bytes_are_an_image_or_a_reason(data, start, which):
    try:
        probe((JPEG, encoded("PNG"), encoded("WEBP"))[which][:start] + data)
    except ImageError as error:
        assert error.code.startswith("image-")


def test_headers_agree_with_pillow_on_real_images(real_data):
    checked = 0
    for folder, _, files in os.walk(real_data):
        for name in files:
            if not name.lower().endswith((".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")):
                continue
            path = os.path.join(folder, name)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with Image.open(path) as image:
                        size = image.size
                        image.load()
            except Exception:
                continue  # what Pillow cannot load may or may not show in a header
            with open(path, "rb") as file:
                header = probe(file.read())
            assert (header.width, header.height) == size, path
            checked += 1
    assert checked > 500


def test_extensions():
    assert same_format("JPEG", "jpg")
    assert same_format("tiff", "tif")
    assert not same_format("jpg", "png")
    assert not same_format("mp4", "jpg")
    assert all(
        same_format(name, kind) and is_image_field(f"0.{name}") for name, kind in IMAGE_FORMATS.items()
    )
