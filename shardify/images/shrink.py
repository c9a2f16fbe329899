"""Makes large pictures smaller, and nothing else of them.

Pixels are resized exactly as CLIP's preprocessor does it (`PIL.Image.BICUBIC` with antialiasing over the whole picture, no shortcut inside the
JPEG decoder; the long side rounded down), so that with the edge a model trains at, what it sees differs by the encoder's loss alone.
"""

from contextlib import suppress
from io import BytesIO
from typing import Any

from PIL import Image, JpegImagePlugin

from shardify.images.probe import ImageHeader, decoded, probe

_KEPT = ("jpg", "png", "webp")
"""Formats that are written again as what they were; all others, which Pillow writes less well or larger, become PNG."""

_MAX_WEBP_SIDE = 16_383
_MODES = {
    "jpg": ("L", "RGB", "CMYK"),
    "png": ("L", "LA", "RGB", "RGBA", "I;16"),
    "webp": ("RGB", "RGBA"),
}
_HALVED = 2  # 4:2:0, as JpegImagePlugin numbers subsampling
_ORIENTATION = 0x0112


def shrink(
    data: bytes | memoryview, header: ImageHeader, *, shortest_edge: int, quality: int = 90
) -> tuple[bytes, ImageHeader] | None:
    """Make a picture's shorter side `shortest_edge` pixels; None when it is no longer than that already.

    JPEG, PNG and WebP stay what they are (JPEG with its own chroma subsampling, lossless WebP lossless); others become PNG. Grey, colour, CMYK (JPEG), 16-bit grey
    (PNG) and alpha are kept, with the colours hidden under it, as are EXIF orientation and ICC profile; palettes become colours. Of an animation the first
    frame is left. The same bytes and settings give the same bytes with the same Pillow.

    Args:
        data: the whole image file.
        header: what `probe` says of it.
        shortest_edge: N in pixels; the long side becomes ``int(N * long / short)``.
        quality: of JPEG and lossy WebP, 1 to 100.

    Raises:
        ImageError: the image cannot be decoded.
    """
    if shortest_edge < 1 or not 1 <= quality <= 100:
        raise ValueError(f"shortest_edge={shortest_edge}, quality={quality}: at least 1, and 1 to 100")
    if min(header.width, header.height) <= shortest_edge:
        return None
    with decoded(data) as image:
        if min(image.size) <= shortest_edge:  # an icon's largest picture, a turned AVIF
            return None
        size = _resized(image.size, shortest_edge)
        kind = header.format if header.format in _KEPT else "png"
        if kind == "webp" and max(size) > _MAX_WEBP_SIDE:
            kind = "png"
        options = _options(image, kind, data, quality)
        smaller = _resize(_in_mode(image, kind), size)
        # what is not asked for is not written, the profile with it
        buffer = BytesIO()
        smaller.info = {}
        smaller.save(buffer, **options)
    encoded = buffer.getvalue()
    return encoded, probe(encoded, check="none")


def _resized(size: tuple[int, int], shortest: int) -> tuple[int, int]:
    """As transformers' `get_resize_output_image_size` with ``default_to_square=False`` (image_transforms.py)."""
    width, height = size
    if width <= height:
        return shortest, int(shortest * height / width)
    return int(shortest * width / height), shortest


def _in_mode(image: Image.Image, kind: str) -> Image.Image:
    """The picture in a mode that can be resized, and that the format holds."""
    modes = _MODES[kind]
    if image.has_transparency_data and image.mode not in ("LA", "RGBA"):
        image = image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    if image.mode == "1" and kind != "webp":
        image = image.convert("L")
    if image.mode in modes:
        return image
    if image.mode == "LA":
        return image.convert("RGBA" if "RGBA" in modes else "L")
    return image.convert("RGB")


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.mode in ("LA", "RGBA"):
        # each channel by itself: as a whole, Pillow would make what is transparent black, which shows when alpha is dropped
        bands = [band.resize(size, Image.Resampling.BICUBIC) for band in image.split()]
        return Image.merge(image.mode, bands)
    return image.resize(size, Image.Resampling.BICUBIC)


def _options(image: Image.Image, kind: str, data: bytes | memoryview, quality: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if profile := image.info.get("icc_profile"):
        options["icc_profile"] = profile
    turned = 1
    with suppress(Exception):  # damage in what only this looks at is no fault of the picture
        turned = image.getexif().get(_ORIENTATION, 1)
    if turned in range(2, 9):
        exif = Image.Exif()
        exif[_ORIENTATION] = turned
        options["exif"] = exif
    if kind == "jpg":
        subsampling = JpegImagePlugin.get_sampling(image)
        return {
            **options,
            "format": "JPEG",
            "quality": quality,
            "subsampling": _HALVED if subsampling < 0 else subsampling,
        }
    if kind == "webp":
        lossless = b"VP8L" in bytes(data[12:64])
        # exact: with the colours under what is transparent
        return {**options, "format": "WEBP", "lossless": lossless, "quality": quality, "exact": True}
    return {**options, "format": "PNG"}
