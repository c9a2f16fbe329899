"""What an image is, from its first bytes: format, width and height as stored, and whether its end is missing.

JPEG, PNG and WebP headers are read here, in a few microseconds; everything else is opened, not decoded, by Pillow. An end that looks
cut off is only a suspicion (cameras append data, old writers leave out the end marker): Pillow decodes such an image and decides.
"""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from threading import Lock
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
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
_FRAME = struct.Struct(">HHB")
_CMYK_COMPONENTS = 4
_PNG_HEADER = struct.Struct(">IIBB")
_PNG_CHUNK = struct.Struct(">I4s")
_DEEP = 16
_RIFF_CHUNK = struct.Struct("<4sI")
_WEBP_ALPHA, _WEBP_EXIF, _WEBP_ANIMATION = 0x10, 0x08, 0x02
_CHUNKS = 4096  # looked at
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_TURNED = range(2, 9)
_TINY = 4  # pixels
# SOF0..SOF15 hold the size; C4 is DHT, C8 JPG (reserved), CC DAC (ITU-T T.81, table B.1)
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_START = b"\xff\xd8\xff"
# tables, comments and applications' own segments (ITU-T T.81, table B.1)
_PASSED_OVER = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
_JPEG_WORD = int.from_bytes(_JPEG_START, "big")
_SEGMENTS = 64  # before a frame header; there are seldom ten
_PASSED_KIND, _FRAME_KIND = 1, 2
_KINDS = np.zeros(1 << 16, np.uint8)  # of two bytes that a segment begins with
_KINDS[[0xFF00 | marker for marker in _PASSED_OVER]] = _PASSED_KIND
_KINDS[[0xFF00 | marker for marker in _START_OF_FRAME]] = _FRAME_KIND

CHECKS = ("header", "decode", "none")
"""How much of an image is looked at: see `probe`."""


class ImageHeader(NamedTuple):
    """What an image's header says.

    Attributes:
        format: as a file extension: jpg, png, gif, webp, bmp, tif, avif, jp2, ppm, ico or qoi.
        width: in pixels as stored; EXIF orientation is ignored.
        height: likewise.
        traits: note codes (`audit.NOTES`) of what a reader may stumble over: ``image-rotated``, ``image-alpha``, ``image-cmyk``,
            ``image-deep``, ``image-animated``, ``image-elongated``, ``image-tiny``.
    """

    format: str
    width: int
    height: int
    traits: tuple[str, ...] = ()


def probe(data: bytes | memoryview, *, check: str = "header") -> ImageHeader:
    """Read an image's header.

    Args:
        data: the whole image file.
        check: ``header``: an end that looks cut off is decoded to make sure. ``decode``: every image is decoded (its first frame).
            ``none``: format and size only.

    Raises:
        ImageError: ``image-empty`` (no bytes, or no pixels), ``image-unrecognised``, ``image-truncated``, ``image-too-large`` (over
            `MAX_PIXELS`; found before anything is decoded), or, with ``decode``, ``image-undecodable``.
    """
    if check not in CHECKS:
        raise ValueError(f"check={check!r}: one of {', '.join(CHECKS)}")
    if not len(data):
        raise ImageError("image-empty", "no bytes")
    start = bytes(data[:32])
    complete = True
    header: ImageHeader | None = None
    if start.startswith(_JPEG_START):
        header = _read_jpeg(data)
        complete = data[-2:] == b"\xff\xd9"
    elif start.startswith(b"\x89PNG\r\n\x1a\n"):
        header = _read_png(data, start)
        complete = data[-len(_PNG_END) :] == _PNG_END
    elif start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        header = _read_webp(data, start)
        complete = len(data) >= 8 + int.from_bytes(start[4:8], "little")
    elif start.startswith((b"GIF87a", b"GIF89a")):
        complete = data[-1:] == b";"
    if header is None:
        header = _open(data, check=check)
    width, height = header.width, header.height
    if not width or not height:
        raise ImageError("image-empty", f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ImageError("image-too-large", f"{width} x {height} pixels; the limit is {MAX_PIXELS} pixels")
    if check == "decode":
        with decoded(data):
            pass
    elif check == "header" and not complete and not _ends_inside(data, header.format):
        try:
            with decoded(data):
                pass
        except ImageError as error:
            code = "image-truncated" if error.code == "image-undecodable" else error.code
            raise ImageError(code, error.detail) from None
    if max(width, height) ** 2 > MAX_PIXELS:
        header = header._replace(traits=(*header.traits, "image-elongated"))
    if min(width, height) <= _TINY:
        header = header._replace(traits=(*header.traits, "image-tiny"))
    return header


def measure_image(data: bytes | memoryview) -> tuple[str, int, int]:
    """Format, width and height, as `probe` finds them without any check; the usual JPEG in a third of the time.

    Raises:
        ImageError: as `probe`.
    """
    if data[:3] == _JPEG_START:
        unpack, at, last = _MARKER.unpack_from, 2, len(data) - 10
        while at <= last:
            prefix, marker, length = unpack(data, at)
            if prefix != 0xFF:
                break
            if marker in _START_OF_FRAME:
                height, width, _ = _FRAME.unpack_from(data, at + 5)
                if 0 < width * height <= MAX_PIXELS:
                    return "jpg", width, height
                break
            if marker not in _PASSED_OVER:
                break
            at += 2 + length
    header = probe(data, check="none")
    return header.format, header.width, header.height


def measure_jpegs(
    view: memoryview, begins: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Width and height of JPEG files, looked into together: what `measure_image` finds, for many in a third of its time.

    Args:
        view: memory that holds them all.
        begins: [n], where each begins in it.
        ends: [n], where each ends.

    Returns:
        int64 [n, 2]; 0 for what is no JPEG, or one that is for `measure_image`.
    """
    found = np.zeros((len(begins), 2), np.int64)
    four = np.ndarray(max(len(view) - 3, 0), ">u4", view, strides=(1,))  # bytes, from every one on
    at, last = begins + 2, ends - 10
    active = np.flatnonzero(at <= last)
    active = active[four[begins[active]] >> 8 == _JPEG_WORD]
    at, last = at[active], last[active]
    for _ in range(_SEGMENTS):
        if not len(active):
            break
        heads = four[at].astype(np.int64)
        kinds = _KINDS[heads >> 16]
        frames = kinds == _FRAME_KIND
        if frames.any():
            sizes = four[at[frames] + 5].astype(np.int64)
            height, width = sizes >> 16, sizes & 0xFFFF
            good = (width * height > 0) & (width * height <= MAX_PIXELS)
            found[active[frames]] = np.stack((width * good, height * good), axis=1)
        at += 2 + (heads & 0xFFFF)
        goes_on = (kinds == _PASSED_KIND) & (at <= last)
        active, at, last = active[goes_on], at[goes_on], last[goes_on]
    return found


@contextmanager
def decoded(data: bytes | memoryview) -> Iterator[Image.Image]:
    """An image whose header has been read, decoded by Pillow (its first frame), for work on it; see `_opened`.

    Raises:
        ImageError: ``image-too-large``, ``image-truncated`` or ``image-undecodable``.
    """
    try:
        with _opened(data) as image:
            image.load()
            yield image
    except ImageError as error:
        code = "image-undecodable" if error.code == "image-unrecognised" else error.code
        raise ImageError(code, error.detail) from None


@contextmanager
def _opened(data: bytes | memoryview) -> Iterator[Image.Image]:
    """An image as Pillow opens it, for work on it; what the work raises is an `ImageError`. Any number of threads may do this.

    Raises:
        ImageError: ``image-too-large``, ``image-unrecognised``, ``image-truncated`` or ``image-undecodable``.
    """
    at_work = False
    with _QUIET:
        try:
            with Image.open(BytesIO(data), formats=_OPENED) as image:
                at_work = True
                yield image
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError("image-too-large", str(error)) from None
        except Exception as error:  # noqa: BLE001 - Pillow's readers raise nearly anything on damaged files
            code = "image-unrecognised"
            if at_work:
                # its decoders say so in these words, and only in words
                cut_off = "truncated" in str(error) or isinstance(error, EOFError)
                code = "image-truncated" if cut_off else "image-undecodable"
            raise ImageError(code, _what(error, data)) from None


class _Quiet:
    """No warnings while any thread is inside. `warnings.catch_warnings` alone would mix up the threads' filters."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_QUIET = _Quiet()


def same_format(extension: str, image_format: str) -> bool:
    """Whether a file extension, without dot and in any case, is one that `image_format` goes by."""
    extension = extension.lower()
    return IMAGE_FORMATS.get(extension, extension) == image_format


def _read_jpeg(data: bytes | memoryview) -> ImageHeader | None:
    """Walk the marker segments up to the frame header; None when they are not as the standard has them."""
    at = 2
    rotated = False
    try:
        while True:
            prefix, marker, length = _MARKER.unpack_from(data, at)
            if prefix != 0xFF:
                return None
            if marker == 0xFF:  # fill byte
                at += 1
            elif marker in _START_OF_FRAME:
                height, width, components = _FRAME.unpack_from(data, at + 5)
                traits = _traits(rotated, False, False, False)
                if components == _CMYK_COMPONENTS:
                    traits = (*traits, "image-cmyk")
                # height 0 is given later, by a DNL segment
                return ImageHeader("jpg", width, height, traits) if height else None
            elif 0xD0 <= marker <= 0xD9 or marker in (0x00, 0x01, 0xDA):
                return None
            else:
                if marker == 0xE1 and data[at + 4 : at + 10] == _EXIF:
                    rotated = _is_rotated(data[at + 10 : at + 2 + length])
                at += 2 + length
    except struct.error:
        raise ImageError(
            "image-truncated", f"{len(data)} bytes of JPEG end before the frame header"
        ) from None


def _read_png(data: bytes | memoryview, start: bytes) -> ImageHeader | None:
    if len(start) < 26:
        raise ImageError("image-truncated", f"{len(start)} bytes of PNG end before the image header")
    width, height, depth, colour = _PNG_HEADER.unpack_from(start, 16)
    if start[12:16] != b"IHDR":
        return None
    alpha, animated, rotated = colour in (4, 6), False, False
    at, end = 33, len(data) - 8
    unpack = _PNG_CHUNK.unpack_from
    for _ in range(_CHUNKS):  # to the end: eXIf may stand behind the pixels
        if at > end:
            break
        length, kind = unpack(data, at)
        if kind not in (b"IDAT", b"IEND"):
            alpha |= kind == b"tRNS"
            animated |= kind == b"acTL"
            if kind == b"eXIf":
                rotated = _is_rotated(data[at + 8 : at + 8 + length])
        at += 12 + length
    return ImageHeader("png", width, height, _traits(rotated, alpha, depth == _DEEP, animated))


def _read_webp(data: bytes | memoryview, start: bytes) -> ImageHeader | None:
    """The three layouts of RFC 9649: lossy, lossless, extended."""
    if len(start) < 30:
        return None
    kind = start[12:16]
    if kind == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", start, 26)
        return ImageHeader("webp", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L" and start[20] == 0x2F:
        bits = int.from_bytes(start[21:25], "little")
        traits = _traits(False, bool(bits >> 28 & 1), False, False)
        return ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, traits)
    if kind == b"VP8X":
        width, height = int.from_bytes(start[24:27], "little"), int.from_bytes(start[27:30], "little")
        flags = start[20]
        rotated = bool(flags & _WEBP_EXIF) and _webp_is_rotated(data)
        traits = _traits(rotated, bool(flags & _WEBP_ALPHA), False, bool(flags & _WEBP_ANIMATION))
        return ImageHeader("webp", width + 1, height + 1, traits)
    return None


def _webp_is_rotated(data: bytes | memoryview) -> bool:
    at = 12
    for _ in range(_CHUNKS):
        if at + 8 > len(data):
            break
        kind, length = _RIFF_CHUNK.unpack_from(data, at)
        if kind == b"EXIF":
            exif = data[at + 8 : at + 8 + length]
            return _is_rotated(exif[len(_EXIF) :] if exif[: len(_EXIF)] == _EXIF else exif)
        at += 8 + length + length % 2
    return False


def _is_rotated(exif: bytes | memoryview) -> bool:
    """Whether the first directory of an EXIF block (a TIFF file without pixels) has an orientation other than upright."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(exif[:4]))
    if order is None or len(exif) < 8:
        return False
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    if at + 2 > len(exif):
        return False
    (count,) = struct.unpack_from(f"{order}H", exif, at)
    entry = struct.Struct(f"{order}H6xH2x")
    for place in range(at + 2, min(at + 2 + count * entry.size, len(exif) - entry.size + 1), entry.size):
        tag, value = entry.unpack_from(exif, place)
        if tag == _ORIENTATION:
            return value in _TURNED
    return False


def _traits(rotated: bool, alpha: bool, deep: bool, animated: bool) -> tuple[str, ...]:
    if not (rotated or alpha or deep or animated):
        return ()
    named = (
        (rotated, "image-rotated"),
        (alpha, "image-alpha"),
        (deep, "image-deep"),
        (animated, "image-animated"),
    )
    return tuple(code for holds, code in named if holds)


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


def _open(data: bytes | memoryview, *, check: str) -> ImageHeader:
    beyond = []
    try:
        with _opened(data) as image:
            kind = _FORMATS[image.format or ""]
            size = image.size
            if check != "none":
                beyond = [tile for tile in getattr(image, "tile", ()) if tile.offset >= len(data)]
            traits = _pillow_traits(image)
    except ImageError as error:
        code = "image-too-large" if error.code == "image-too-large" else "image-unrecognised"
        raise ImageError(code, error.detail) from None
    if beyond:
        raise ImageError(
            "image-truncated", f"{len(data)} bytes; pixel data starts at byte {beyond[0].offset}"
        )
    return ImageHeader(kind, *size, traits)


def _pillow_traits(image: Image.Image) -> tuple[str, ...]:
    mode, alpha = image.mode, image.has_transparency_data
    rotated = animated = False
    # damage in what only these look at is no fault of the picture
    with suppress(Exception):
        # a TIFF is turned by Pillow itself
        rotated = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in _TURNED
    # several pages of a TIFF, or sizes of an icon, are no animation
    if image.format == "GIF":
        with suppress(Exception):
            animated = bool(getattr(image, "is_animated", False))
    traits = _traits(rotated, alpha, mode.startswith(("I", "F")), animated)
    return (*traits, "image-cmyk") if mode == "CMYK" else traits


def _what(error: Exception, data: bytes | memoryview) -> str:
    """The error without addresses of objects in memory: quarantine lines must not differ from run to run."""
    if isinstance(error, UnidentifiedImageError):
        return f"no known image format; {len(data)} bytes starting with {bytes(data[:8]).hex(' ')}"
    return f"{type(error).__name__}: {error}"
