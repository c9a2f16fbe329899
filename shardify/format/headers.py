"""Reading tar headers of any origin: old V7, ustar, GNU and PAX.

    [x or L, K: what does not fit the header][its data][header][data][zeros to 512] ...  two blocks of zeros

Sources: IEEE Std 1003.1, pax, "ustar Interchange Format" and "pax Header Block"; the GNU tar manual, "Basic Tar Format" and "Extensions".
"""

import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache

BLOCK = 512

REGULAR = frozenset((b"0", b"\0", b"7"))
"""Type flags of files with data: ustar's, V7's, and contiguous ones."""
SPARSE = b"S"
PAX = frozenset((b"x", b"X"))
PAX_GLOBAL = b"g"
GNU_NAME = b"L"
GNU_LINK = b"K"
EXTENSIONS = PAX | {PAX_GLOBAL, GNU_NAME, GNU_LINK}
"""Type flags of members that say something of the next one."""

MAX_EXTENSION_BYTES = 1024 * 1024
"""More is not read of a name or a set of PAX records."""

_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_MAGICS = (b"ustar", bytes(5))
# name, size, checksum, type, magic, prefix
_FIELDS = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
_CHECKSUM = slice(148, 156)
_ADLER_BASE = 65521
_BASE_256 = 0x80


def parse_header(data: bytes | bytearray | memoryview, at: int = 0) -> tuple[str, int, bytes] | None:
    """Name, data size and type flag of the header at byte `at`; None when it is none, or a damaged one.

    Bytes of the name that are not UTF-8 are escaped. Sizes are octal, or binary (base-256) as GNU writes those of 8 GiB and more.
    """
    try:
        name, size_field, checksum, kind, magic, prefix = _FIELDS.unpack_from(data, at)
        expected = _expected_sum(checksum)
        if size_field[0] & _BASE_256:
            size = int.from_bytes(size_field, "big") - (_BASE_256 << 88)
        else:
            size = _octal(size_field)
    except (struct.error, ValueError):
        return None
    # The low half of Adler-32 is the sum of all bytes modulo 65521, faster than Python can add: no damage to a field or two makes a
    # difference of as much.
    block = data[at : at + BLOCK]
    if ((zlib.adler32(block) & 0xFFFF) - expected) % _ADLER_BASE and not _sums_to(bytes(block), checksum):
        return None
    if magic[:5] not in _MAGICS:
        return None
    text = as_text(name)
    if magic == b"ustar\0" and prefix[0]:  # a GNU header keeps times where ustar keeps the prefix
        text = f"{as_text(prefix)}/{text}"
    # links, devices and folders have no data, whatever their size says
    return text, 0 if kind in _WITHOUT_DATA else size, kind


def is_old_folder(name: str, kind: bytes) -> bool:
    """Whether a member is a folder, without data, as V7 wrote it, which had no type for folders; `name` is the whole name."""
    return kind == b"\0" and name.endswith("/")


def as_text(data: bytes) -> str:
    """A name up to its NUL, bytes that are not UTF-8 escaped."""
    return data.partition(b"\0")[0].decode("utf-8", "backslashreplace")


@lru_cache(maxsize=4096)
def _expected_sum(checksum: bytes) -> int:
    """What Adler-32 makes of a header with this checksum: the sum of all bytes is stated with those of the checksum as blanks."""
    return _octal(checksum) + sum(checksum) - sum(b" " * 8) + 1


def _octal(field: bytes) -> int:
    return int(field.strip(b"\0 ") or b"0", 8)


def _sums_to(block: bytes, checksum: bytes) -> bool:
    """Whether this is the checksum exactly; old tars added signed bytes."""
    counted = block[: _CHECKSUM.start] + b" " * 8 + block[_CHECKSUM.stop :]
    total = sum(counted)
    return _octal(checksum) in (total, total - 256 * sum(byte >= 128 for byte in counted))


def says_nothing(records: bytes) -> bool:
    """Whether PAX records are about times, owners and the like only, seen at a glance."""
    return b" path=" not in records and b" size=" not in records and b" GNU.sparse." not in records


@dataclass(slots=True)
class Extension:
    """What extending members say of the member that follows them.

    Attributes:
        path: its whole name; empty when its header has it.
        link: the whole name that it is a link to; empty when its header has it.
        size: of its data; None when its header has it.
        sparse: its data is not stored as it is.
    """

    path: str = ""
    link: str = ""
    size: int | None = None
    sparse: bool = False

    def read(self, kind: bytes, data: bytes) -> bool:
        """Take in one extending member; False when its data is damaged."""
        if kind == GNU_NAME:
            self.path = as_text(data)
        elif kind == GNU_LINK:
            self.link = as_text(data)
        elif kind in PAX or kind == PAX_GLOBAL:
            return self._read_pax(data)
        return True

    def _read_pax(self, data: bytes) -> bool:
        """A PAX record is its own length, a blank, keyword=value and a newline."""
        at = 0
        while at < len(data) and data[at]:
            blank = data.find(b" ", at, at + 20)
            digits = data[at:blank]
            if blank < 0 or not digits.isdigit():
                return False
            end = at + int(digits)
            keyword, equals, value = data[blank + 1 : end - 1].partition(b"=")
            if not equals or end > len(data) or data[end - 1] != 0x0A:
                return False
            if keyword == b"path":
                self.path = as_text(value)
            elif keyword == b"linkpath":
                self.link = as_text(value)
            elif keyword == b"size":
                if not value.isdigit() or len(value) > 19:
                    return False
                self.size = int(value)
            elif keyword.startswith(b"GNU.sparse."):
                self.sparse = True
            at = end
        return True
