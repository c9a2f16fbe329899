"""Encoded images to pixels: what a pixel is, Pillow's ``Image.open(...).convert("RGB")`` says.

JPEG is decoded by libjpeg-turbo with the exact DCT and upsampling, about twice as fast as Pillow; all else by Pillow itself. Every mode becomes
RGB by Pillow's own conversion: alpha is dropped and not composited, palettes are looked up, what is deeper than 8 bits is cut or scaled as Pillow
does. EXIF orientation is ignored, and of an animation the first frame is taken.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from shardify.errors import ImageError

MAX_PIXELS = 178_956_970
"""Pictures with more are refused before they are decoded: Pillow's own limit, 512 MiB of RGB."""

Pixels = npt.NDArray[np.uint8]  # [height, width, 3]
Picture = bytes | bytearray | memoryview | Pixels | Image.Image
"""An encoded image, or one that is decoded already."""


def pixels_of(picture: Picture) -> Pixels:
    """The pixels of an image, encoded or decoded already.

    Returns:
        uint8 [height, width, 3], contiguous.

    Raises:
        ImageError: as `decode`.
    """
    if isinstance(picture, bytes | bytearray | memoryview):
        return decode(picture)
    if isinstance(picture, Image.Image):
        with _judged():  # it may be opened only, and not yet decoded
            return _converted(picture)
    if (
        not isinstance(picture, np.ndarray)
        or picture.dtype != np.uint8
        or picture.shape[2:] != (3,)
        or 0 in picture.shape
    ):
        described = (
            f"{getattr(picture, 'dtype', type(picture).__name__)} {list(getattr(picture, 'shape', ()))}"
        )
        raise ImageError("image-undecodable", f"pixels are uint8 [height, width, 3], this is {described}")
    return np.ascontiguousarray(picture)


def decode(data: bytes | bytearray | memoryview) -> Pixels:
    """The pixels of an encoded image, as Pillow's ``convert("RGB")`` gives them (JPEG: to within 1/255).

    Returns:
        uint8 [height, width, 3], writable.

    Raises:
        ImageError: ``image-empty``, ``image-too-large`` (more than `MAX_PIXELS`) or ``image-undecodable``.
    """
    if not data:
        raise ImageError("image-empty", "0 bytes")
    if data[:2] == b"\xff\xd8":
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return pixels
    return _decode_by_pillow(data)


def size_of(picture: Picture) -> tuple[int, int]:
    """Height and width of an image, of an encoded one from its header.

    Raises:
        ImageError: as `decode`, as far as the header tells.
    """
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    if not isinstance(picture, bytes | bytearray | memoryview):
        height, width = pixels_of(picture).shape[:2]
        return height, width
    if not picture:
        raise ImageError("image-empty", "0 bytes")
    if picture[:2] == b"\xff\xd8":
        try:
            height, width, _, _ = simplejpeg.decode_jpeg_header(picture)
        except ValueError:
            pass
        else:
            return height, width
    with _judged(), Image.open(io.BytesIO(picture)) as image:
        refuse_bomb(image.height, image.width)
        return image.height, image.width


def refuse_bomb(height: int, width: int) -> None:
    """Refuse more than `MAX_PIXELS`.

    Raises:
        ImageError: ``image-too-large``.
    """
    if height * width > MAX_PIXELS:
        raise ImageError("image-too-large", f"{width}x{height} px; the limit is {MAX_PIXELS} px")


def _decode_jpeg(data: bytes | bytearray | memoryview) -> Pixels | None:
    """The pixels, or None for what Pillow had better judge: CMYK, 12 bits, anything with a fault."""
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        if colour in ("CMYK", "YCCK"):  # Pillow's conversion is the reference, and is not libjpeg's
            return None
        refuse_bomb(height, width)
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return pixels


def _decode_by_pillow(data: bytes | bytearray | memoryview) -> Pixels:
    with _judged(), Image.open(io.BytesIO(data)) as image:
        return _converted(image)


def _converted(image: Image.Image) -> Pixels:
    refuse_bomb(image.height, image.width)
    if image.format == "EPS":  # Pillow would run Ghostscript on it
        raise ImageError("image-undecodable", "EPS is a program, not a picture")
    return np.array(image.convert("RGB"))


@contextmanager
def _judged() -> Iterator[None]:
    """Whatever goes wrong with an image is an ImageError, and nothing is warned of."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("image-undecodable", "in no format that Pillow knows") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageError("image-too-large", str(error) or "out of memory") from None
    except Exception as error:  # noqa: BLE001 - damage makes Pillow raise nearly anything: SyntaxError, ...
        raise ImageError("image-undecodable", f"{type(error).__name__}: {error}") from None
