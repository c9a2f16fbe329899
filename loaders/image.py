"""Image bytes to pixels: exact decoding, CLIP's geometry, uint8 out.

What a pixel is, Pillow's ``Image.open(...).convert("RGB")`` says; what a resized pixel is, its BICUBIC
filter. Both are met to within 2/255, several times faster: JPEG by libjpeg-turbo with the exact DCT and
upsampling, resizing by torch's antialiased uint8 bicubic.
"""

import io
import math
import warnings
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch.nn import functional

from shardify.errors import ImageError, UsageError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per channel, of pixels in 0 to 1 (openai/clip-vit-large-patch14-336, preprocessor_config.json)."""

MAX_PIXELS = 178_956_970
"""Pictures with more are refused before they are decoded: Pillow's own limit, 512 MiB of RGB."""

MAX_PADDED_SIDE = 65_535
"""Sides beyond are refused by ``fit="pad"``, whose square would be larger than any JPEG."""

Fit = Literal["crop", "pad"]
Pixels = npt.NDArray[np.uint8]  # [height, width, 3]
Picture = bytes | bytearray | memoryview | Pixels | Image.Image
"""An encoded image, or one that is decoded already."""

_STRIP_BYTES = 16 * 1024 * 1024  # of padded rows in memory at a time


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Encoded image to uint8 RGB of a fixed size, as CLIPImageProcessor and LLaVA's training code see it.

    EXIF orientation is ignored, alpha dropped, and of an animation the first frame taken, as LLaVA does.

    Attributes:
        size: the side S of the square that comes out, in pixels. Default 336.
        fit: ``crop`` (default, LLaVA's pretraining and CLIPImageProcessor): the shorter edge becomes S and
            the centre is kept.
            ``pad`` (LLaVA's fine-tuning, `expand2square`): filled up to a square with the mean colour, then
                resized.
        mean: per channel, of pixels in 0 to 1; for `normalize` and the colour of padding. Default CLIP's.
        std: per channel, for `normalize`. Default CLIP's.
    """

    size: int = 336
    fit: Fit = field(default="crop", kw_only=True)
    mean: tuple[float, float, float] = field(default=CLIP_MEAN, kw_only=True)
    std: tuple[float, float, float] = field(default=CLIP_STD, kw_only=True)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"an image size of {self.size} px; at least 1 is needed")
        if self.fit not in get_args(Fit):
            raise UsageError(f"no fit {self.fit!r}; there are {', '.join(get_args(Fit))}")
        if len(self.mean) != 3 or len(self.std) != 3 or 0 in self.std:
            raise UsageError(
                f"mean {self.mean} and std {self.std} need three values each, and no std may be 0"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of every result: (3, S, S)."""
        return 3, self.size, self.size

    def prepare(self, data: Picture) -> "Prepared":
        """Decode one image, to be fitted into memory whose place depends on how much it needs.

        Raises:
            ImageError: as for a call.
        """
        return Prepared(_decoded(data), self)

    def __call__(self, data: Picture) -> torch.Tensor:
        """Decode and fit one image.

        Args:
            data: the encoded image, in any format Pillow reads; or one of Pillow's; or pixels, uint8 [height, width, 3].

        Returns:
            uint8 [3, S, S], contiguous.

        Raises:
            ImageError: ``image-empty``, ``image-too-large`` or ``image-undecodable``; never anything else for
                any bytes.
        """
        out = torch.empty(self.shape, dtype=torch.uint8)
        self.into(data, out)
        return out

    def into(self, data: Picture, out: torch.Tensor) -> None:
        """Decode and fit one image into memory that is there already.

        Args:
            data: as for a call.
            out: uint8 [3, S, S] with any strides. Pixels in memory order (a permuted [S, S, 3]) are written
                fastest, since that is how they are decoded. Untouched when an error is raised.

        Raises:
            ImageError: as for a call.
        """
        out.copy_(torch.from_numpy(self.fitted(_decoded(data))).permute(2, 0, 1))

    def fitted(self, pixels: Pixels) -> Pixels:
        """Decoded pixels, uint8 [height, width, 3], fitted: uint8 [S, S, 3].

        Raises:
            ImageError: ``image-too-large``.
        """
        if self.fit == "crop":
            return _crop(pixels, self.size)
        return _pad(pixels, self.size, self._background())

    def normalize(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The model's input: (images / 255 - mean) / std.

        Args:
            images: uint8 [..., 3, H, W], on any device.
            dtype: of the result; the arithmetic is done in float32.

        Returns:
            A new tensor of `dtype` and the same shape, device and memory order.
        """
        result = images.to(torch.float32)
        for channel, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            # by plain numbers: constants in a tensor would be copied to the device, and waited for
            result.select(-3, channel).mul_(1 / (255 * std)).sub_(mean / std)
        return result.to(dtype)

    def _background(self) -> tuple[int, ...]:
        return tuple(int(value * 255) for value in self.mean)  # LLaVA truncates: (122, 116, 104) for CLIP


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A decoded image before it is fitted.

    Attributes:
        pixels: uint8 [height, width, 3].
        transform: that fits it.
    """

    pixels: Pixels
    transform: ImageTransform

    @property
    def tiles(self) -> int:
        """Pictures that it becomes."""
        return 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width before fitting."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that `write` needs."""
        return self.tiles * math.prod(self.transform.shape)

    def write(self, memory: npt.NDArray[np.uint8]) -> None:
        """Fit it into `memory`, uint8 [nbytes], as [tiles, S, S, 3].

        Raises:
            ImageError: ``image-too-large``.
        """
        fitted = self.transform.fitted(self.pixels)
        memory.reshape(fitted.shape)[...] = fitted


def _decoded(data: Picture) -> Pixels:
    return decode(data) if isinstance(data, bytes | bytearray | memoryview) else _pixels_of(data)


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


def _pixels_of(picture: Pixels | Image.Image) -> Pixels:
    """The pixels of an image that is decoded already.

    Raises:
        ImageError: ``image-undecodable``, it is none.
    """
    if isinstance(picture, Image.Image):
        return np.array(picture.convert("RGB"))
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


def _decode_jpeg(data: bytes | bytearray | memoryview) -> Pixels | None:
    """The pixels, or None for what Pillow had better judge: CMYK, 12 bits, anything with a fault."""
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        if colour in ("CMYK", "YCCK"):  # Pillow's conversion is the reference, and is not libjpeg's
            return None
        _refuse_bomb(height, width)
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return pixels


def _decode_by_pillow(data: bytes | bytearray | memoryview) -> Pixels:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            _refuse_bomb(image.height, image.width)
            _refuse_program(image)
            return np.array(image.convert("RGB"))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("image-undecodable", "in no format that Pillow knows") from None
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ImageError("image-too-large", str(error) or "out of memory") from None
    except Exception as error:  # noqa: BLE001 - damage makes Pillow raise nearly anything: SyntaxError, ...
        raise ImageError("image-undecodable", f"{type(error).__name__}: {error}") from None


def _refuse_bomb(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ImageError("image-too-large", f"{width}x{height} px; the limit is {MAX_PIXELS} px")


def _refuse_program(image: Image.Image) -> None:
    if image.format == "EPS":  # Pillow would run Ghostscript on it
        raise ImageError("image-undecodable", "EPS is a program, not a picture")


def _crop(pixels: Pixels, size: int) -> Pixels:
    """Shorter edge to `size`, then the centre: the arithmetic of CLIPImageProcessor, truncations included."""
    height, width = pixels.shape[:2]
    if height <= width:
        new_height, new_width = size, int(size * width / height)
    else:
        new_height, new_width = int(size * height / width), size
    _refuse_bomb(new_height, new_width)  # 20,000 x 1 px would become 6,720,000 x 336
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return _resize(pixels, new_height, new_width)[top : top + size, left : left + size]


def _pad(pixels: Pixels, size: int, background: tuple[int, ...]) -> Pixels:
    """To a square with the picture in its middle, then to `size`; the square itself is never in memory.

    The filter works along rows first and columns second, so rows can be shrunk before the ones above and
    below are added, and a tall picture can be widened a strip of rows at a time.
    """
    height, width = pixels.shape[:2]
    side = max(height, width)
    if side > MAX_PADDED_SIDE:
        raise ImageError(
            "image-too-large", f"{width}x{height} px; the longest side for padding is {MAX_PADDED_SIDE} px"
        )
    left, top = (side - width) // 2, (side - height) // 2
    square = np.empty((side, size, 3), np.uint8)  # its rows already at their final width
    colour = np.array(background, np.uint8)
    square[:top] = square[top + height :] = np.tile(colour, (size, 1))
    if width == side:
        square[top : top + height] = _resize(pixels, height, size)
    else:
        strip = np.tile(colour, (min(height, max(1, _STRIP_BYTES // (3 * side))), side, 1))
        for start in range(0, height, len(strip)):
            rows = pixels[start : start + len(strip)]
            strip[: len(rows), left : left + width] = rows
            square[start : start + len(rows)] = _resize(strip[: len(rows)], len(rows), size)
    return _resize(square, size, size)


def _resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Bicubic as Pillow's, whose two passes round and clip between them, so that their order shows at sharp edges.

    Pillow shrinks rows first, as torch always does, unless columns lose more than twice as many pixels (Pillow 13.0; seen by comparing
    both orders on 4,000 random pictures and sizes): pictures more than twice as tall as wide.
    """
    lost_rows, lost_columns = pixels.shape[0] - height, pixels.shape[1] - width
    if lost_rows > 0 and lost_columns and lost_rows > 2 * lost_columns:
        pixels = np.ascontiguousarray(_resize_rows_first(pixels, height, pixels.shape[1]))
    return _resize_rows_first(pixels, height, width)


def _resize_rows_first(pixels: Pixels, height: int, width: int) -> Pixels:
    # seen as a batch of one in channels-last order, which torch has a fast path for and keeps in the result
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    resized = functional.interpolate(batch, size=(height, width), mode="bicubic", antialias=True)
    result: Pixels = resized.permute(0, 2, 3, 1)[0].numpy()
    return result
