"""What an image is, from its first bytes: format, width and height as stored, and whether its end is missing.

JPEG, PNG and WebP headers are read here, in a few microseconds; everything else is opened, not decoded, by Pillow. An end that looks
cut off is only a suspicion (cameras append data, old writers leave out the end marker): Pillow decodes such an image and decides.
"""

import struct
import warnings
from dataclasses import dataclass
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from shardify.errors import ImageError
from shardify.format.names import IMAGE_FORMATS

MAX_PIXELS = 178_956_970
"""More pixels than this are refused, as Pillow refuses them (twice `PIL.Image.MAX_IMAGE_PIXELS`): a few bytes can claim terabytes."""

# Pillow's name -> ours, which is also the member's extension. Formats without a signature (TGA) or run by a program (EPS) are left out.
_FORMATS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # what Pillow makes of a JPEG that lists further pictures
    "PNG": "png",
    "GIF": "gif",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "AVIF": "avif",
    "JPEG2000": "jp2",
    "PPM": "ppm",
    "ICO": "ico",
    "QOI": "qoi",
}
_OPENED = tuple(name for name in _FORMATS if name != "MPO")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_MARKER = struct.Struct(">BBH")
_TWO_BIG = struct.Struct(">II")
# SOF0..SOF15 hold the size; C4 is DHT, C8 JPG (reserved), CC DAC (ITU-T T.81, table B.1)
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image's header says.

    Attributes:
        format: as a file extension: jpg, png, gif, webp, bmp, tif, avif, jp2, ppm, ico or qoi.
        width: in pixels as stored; EXIF orientation is ignored.
        height: likewise.
    """

    format: str
    width: int
    height: int
    traits: tuple[str, ...] = ()


def probe(data: bytes | memoryview, *, check: str = "header") -> ImageHeader:
    """Read an image's header.

    Args:
        data: the whole image file.

    Raises:
        ImageError: ``image-empty`` (no bytes, or no pixels), ``image-unrecognised``, ``image-truncated``, or ``image-too-large`` (over
            `MAX_PIXELS`).
    """
    if not len(data):
        raise ImageError("image-empty", "no bytes")
    start = bytes(data[:32])
    complete = True
    header: ImageHeader | None = None
    if start.startswith(b"\xff\xd8\xff"):
        header = _read_jpeg(data)
        complete = data[-2:] == b"\xff\xd9"
    elif start.startswith(b"\x89PNG\r\n\x1a\n"):
        header = _read_png(start)
        complete = data[-len(_PNG_END) :] == _PNG_END
    elif start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        header = _read_webp(start)
        complete = len(data) >= 8 + int.from_bytes(start[4:8], "little")
    elif start.startswith((b"GIF87a", b"GIF89a")):
        complete = data[-1:] == b";"
    if header is None:
        header = _open(data)
    if not header.width or not header.height:
        raise ImageError("image-empty", f"{header.width} x {header.height} pixels")
    if header.width * header.height > MAX_PIXELS:
        raise ImageError(
            "image-too-large", f"{header.width} x {header.height} pixels; the limit is {MAX_PIXELS} pixels"
        )
    if check == "decode" or (check == "header" and not complete and not _ends_inside(data, header.format)):
        _decode(data)
    return header


def same_format(extension: str, image_format: str) -> bool:
    """Whether a file extension, without dot and in any case, is one that `image_format` goes by."""
    extension = extension.lower()
    return IMAGE_FORMATS.get(extension, extension) == image_format


def _read_jpeg(data: bytes | memoryview) -> ImageHeader | None:
    """Walk the marker segments up to the frame header; None when they are not as the standard has them."""
    at = 2
    try:
        while True:
            prefix, marker, length = _MARKER.unpack_from(data, at)
            if prefix != 0xFF:
                return None
            if marker == 0xFF:  # fill byte
                at += 1
            elif marker in _START_OF_FRAME:
                height, width = struct.unpack_from(">HH", data, at + 5)
                # height 0 is given later, by a DNL segment
                return ImageHeader("jpg", width, height) if height else None
            elif 0xD0 <= marker <= 0xD9 or marker in (0x00, 0x01, 0xDA):
                return None
            else:
                at += 2 + length
    except struct.error:
        raise ImageError(
            "image-truncated", f"{len(data)} bytes of JPEG end before the frame header"
        ) from None


def _read_png(start: bytes) -> ImageHeader | None:
    if len(start) < 24:
        raise ImageError("image-truncated", f"{len(start)} bytes of PNG end before the image header")
    width, height = _TWO_BIG.unpack_from(start, 16)
    return ImageHeader("png", width, height) if start[12:16] == b"IHDR" else None


def _read_webp(start: bytes) -> ImageHeader | None:
    """The three layouts of RFC 9649: lossy, lossless, extended."""
    if len(start) < 30:
        return None
    kind = start[12:16]
    if kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", start, 26)
        return ImageHeader("webp", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and start[20] == 0x2F:
        bits = int.from_bytes(start[21:25], "little")
        return ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8X":
        width, height = int.from_bytes(start[24:27], "little"), int.from_bytes(start[27:30], "little")
        return ImageHeader("webp", width + 1, height + 1)
    return None


def _ends_inside(data: bytes | memoryview, image_format: str) -> bool:
    """Whether an end marker stands before bytes that somebody appended."""
    if image_format == "jpg":
        # behind a scan header 0xFF is escaped, so this can be no thumbnail's end: those stand in segments before it
        content = bytes(data)
        scan = _scan_start(content)
        return scan > 0 and content.find(b"\xff\xd9", scan) > 0
    return image_format == "png" and _PNG_END in bytes(data)


def _scan_start(data: bytes) -> int:
    """Offset of the first scan header, 0 when segments do not lead to one."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return at
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


def _open(data: bytes | memoryview) -> ImageHeader:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(BytesIO(data), formats=_OPENED) as image:
                header = ImageHeader(_FORMATS[image.format or ""], *image.size)
                beyond = [tile for tile in getattr(image, "tile", ()) if tile.offset >= len(data)]
        except Image.DecompressionBombError as error:
            raise ImageError("image-too-large", str(error)) from None
        except Exception as error:  # noqa: BLE001 - Pillow's readers raise nearly anything on damaged files
            raise ImageError("image-unrecognised", _what(error, data)) from None
    if beyond:
        raise ImageError(
            "image-truncated", f"{len(data)} bytes; pixel data starts at byte {beyond[0].offset}"
        )
    return header


def _decode(data: bytes | memoryview) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(BytesIO(data), formats=_OPENED) as image:
                image.load()
        except Image.DecompressionBombError as error:
            raise ImageError("image-too-large", str(error)) from None
        except Exception as error:  # noqa: BLE001 - Pillow's decoders raise nearly anything on damaged files
            raise ImageError("image-truncated", _what(error, data)) from None


def _what(error: Exception, data: bytes | memoryview) -> str:
    """The error without addresses of objects in memory: quarantine lines must not differ from run to run."""
    if isinstance(error, UnidentifiedImageError):
        return f"no known image format; {len(data)} bytes starting with {bytes(data[:8]).hex(' ')}"
    return f"{type(error).__name__}: {error}"
