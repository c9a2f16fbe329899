"""Image headers agree with Pillow on whatever is found in the wild; traits say what a picture is beside."""

import io
import os
import struct
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shardify.errors import ImageError
from shardify.format.names import IMAGE_FORMATS, is_image_field
from shardify.images.probe import (
    CHECKS,
    MAX_PIXELS,
    ImageHeader,
    measure_image,
    measure_jpegs,
    probe,
    same_format,
)

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
    for given_data in (data, memoryview(data)):
        header = probe(given_data)
        assert (header.format, header.width, header.height) == (name, 53, 37)


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
    which=st.sampled_from(range(7)),
    cut=st.integers(0, 700),
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
)
def test_what_an_index_tells_is_what_probing_finds(which, cut, damage):
    pictures = [
        JPEG,
        encoded("JPEG", progressive=True, comment=b"c" * 50, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"),
        encoded("JPEG", "CMYK"),
        encoded("PNG"),
        encoded("WEBP"),
        encoded("GIF"),
        b"",
    ]
    data = bytearray(pictures[which])
    for at, byte in damage:
        data[at : at + 1] = bytes([byte])
    contents = [*map(memoryview, pictures), memoryview(data), memoryview(data)[:cut]]
    ends = np.cumsum([len(content) for content in contents])
    memory = memoryview(b"".join(contents))
    together = measure_jpegs(memory, ends - [len(content) for content in contents], ends)
    for content, size in zip(contents, together.tolist(), strict=True):
        try:
            expected = probe(content, check="none")[:3]
        except ImageError as error:
            with pytest.raises(ImageError) as found:
                measure_image(content)
            assert (found.value.code, found.value.detail) == (error.code, error.detail)
            assert size == [0, 0]
        else:
            assert measure_image(content) == expected
            assert size == [0, 0] or ("jpg", *size) == expected
    assert together[0].tolist() == list(Image.open(io.BytesIO(JPEG)).size)


@given(
    data=st.binary(max_size=80), start=st.sampled_from([0, 3, 12, 30, 200]), which=st.sampled_from([0, 1, 2])
)
def test_any_bytes_are_an_image_or_a_reason(data, start, which):
    try:
        probe((JPEG, encoded("PNG"), encoded("WEBP"))[which][:start] + data)
    except ImageError as error:
        assert error.code.startswith("image-")


def turned(format_, mode="RGB", orientation=6, **options):
    exif = Image.Exif()
    exif[0x0110] = "a camera"
    exif[0x0112] = orientation
    return encoded(format_, mode, exif=exif, **options)


def frames(format_, mode="RGB", **options):
    pictures = [Image.fromarray(PIXELS // n).convert(mode) for n in (1, 2, 3)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format_, save_all=True, append_images=pictures[1:], **options)
    return buffer.getvalue()


def sized(width, height, format_="PNG"):
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, format_)
    return buffer.getvalue()


DEEP = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)


def deep(format_):
    buffer = io.BytesIO()
    DEEP.save(buffer, format_)
    return buffer.getvalue()


def with_exif_behind(data):
    """A PNG whose eXIf chunk stands behind the pixels."""
    content = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, 8, 0, 0)
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    return data[:-12] + chunk + data[-12:]


@pytest.mark.parametrize(
    ("data", "traits"),
    [
        (JPEG, ()),
        (turned("JPEG"), ("image-rotated",)),
        (turned("JPEG", orientation=1), ()),
        (turned("JPEG", orientation=9), ()),
        (turned("JPEG", "L"), ("image-rotated",)),
        (turned("JPEG", "CMYK"), ("image-rotated", "image-cmyk")),
        (encoded("JPEG", "CMYK"), ("image-cmyk",)),
        (encoded("PNG"), ()),
        (turned("PNG"), ("image-rotated",)),
        (with_exif_behind(encoded("PNG")), ("image-rotated",)),
        (encoded("PNG", "RGBA"), ("image-alpha",)),
        (encoded("PNG", "LA"), ("image-alpha",)),
        (encoded("PNG", "P", transparency=3), ("image-alpha",)),
        (encoded("PNG", "P"), ()),
        (deep("PNG"), ("image-deep",)),
        (deep("TIFF"), ("image-deep",)),
        (turned("TIFF"), ()),  # Pillow turns it
        (encoded("TIFF", "CMYK"), ("image-cmyk",)),
        (encoded("WEBP"), ()),
        (encoded("WEBP", lossless=True), ()),
        (turned("WEBP"), ("image-rotated",)),
        (frames("GIF"), ("image-animated",)),
        (frames("GIF", loop=0), ("image-animated",)),
        (frames("GIF", duration=40), ("image-animated",)),
        (frames("PNG"), ("image-animated",)),
        (frames("WEBP"), ("image-animated",)),
        (frames("TIFF"), ()),
        (encoded("GIF"), ()),
        (sized(4, 100), ("image-tiny",)),
        (sized(5, 5), ()),
        (sized(13_378, 5), ("image-elongated",)),
        (sized(13_377, 5), ()),
        (sized(2, 20_000, "BMP"), ("image-elongated", "image-tiny")),
    ],
)
def test_traits(data, traits):
    for check in CHECKS:
        assert probe(data, check=check).traits == traits
        assert probe(memoryview(data), check=check).traits == traits


def test_transparent_pixels_are_a_trait_of_webp():
    pixels = np.dstack((PIXELS, PIXELS[..., :1]))
    for lossless in (False, True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "WEBP", lossless=lossless)
        assert probe(buffer.getvalue()).traits == ("image-alpha",)


def damaged(data):
    """The same header and end, other bytes between."""
    return data[:100] + bytes(len(data) - 200) + data[-100:]


def test_how_much_is_looked_at():
    cut, png = JPEG[:-40], damaged(encoded("PNG"))
    assert code_of(cut) == "image-truncated"
    assert probe(cut, check="none") == ImageHeader("jpg", 53, 37)
    assert probe(png) == ImageHeader("png", 53, 37)
    for data, code in ((cut, "image-truncated"), (png, "image-undecodable")):
        with pytest.raises(ImageError) as error:
            probe(data, check="decode")
        assert error.value.code == code
    with pytest.raises(ValueError, match="check='full'"):
        probe(JPEG, check="full")


def test_bombs_are_found_before_they_are_decoded():
    png = bytearray(encoded("PNG"))
    png[16:24] = struct.pack(">II", MAX_PIXELS, 2)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    for check in CHECKS:
        with pytest.raises(ImageError, match="image-too-large"):
            probe(bytes(png), check=check)


def test_threads_that_open_images_keep_their_warnings_apart():
    tiff, filters = encoded("TIFF"), list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda _: probe(tiff, check="decode"), range(400)))
    assert set(headers) == {ImageHeader("tif", 53, 37)}
    assert warnings.filters == filters


@pytest.mark.parametrize("check", CHECKS)
def test_any_file_gives_a_header_or_a_reason(real_data, check):
    codes = Counter()
    for folder, _, files in os.walk(real_data / "pillow_edge_cases"):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                data = file.read()
            try:
                header = probe(data, check=check)
                codes.update(header.traits)
            except ImageError as error:
                codes[error.code] += 1
                assert error.code.startswith("image-")
                assert error.detail
    assert (
        min(codes[f"image-{trait}"] for trait in ("rotated", "alpha", "cmyk", "deep", "animated", "tiny"))
        >= 3
    )


def test_orientation_agrees_with_pillow_on_real_images(real_data):
    turned_ones = 0
    for part in ("exif_samples", "exif_orientation", "pillow_edge_cases"):
        for folder, _, files in os.walk(real_data / part):
            for name in files:
                if not name.endswith((".jpg", ".png", ".webp")):
                    continue
                with open(os.path.join(folder, name), "rb") as file:
                    data = file.read()
                try:
                    traits = probe(data).traits
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        with Image.open(io.BytesIO(data)) as image:
                            image.load()
                            orientation = image.getexif().get(0x0112, 1)
                except Exception:
                    continue  # Pillow reads it not at all, or its EXIF block not
                if {"xmp", "XML:com.adobe.xmp", "Raw profile type exif"} & image.info.keys():
                    continue  # Pillow takes orientation from there too
                assert ("image-rotated" in traits) == (orientation in range(2, 9)), name
                turned_ones += orientation in range(2, 9)
    assert turned_ones > 15


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
