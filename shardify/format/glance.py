"""Many tar headers at once: what most shards consist of, read with numpy instead of one by one.

    [header of a file][data] ...        or        [PAX header: times and the like][its records][header of a file][data] ...

Only what is plainly that is taken, as far as it goes without a break; everything else is for `walk`, which reads header by header and knows
what to say about it.
"""

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardify.format.headers import BLOCK, as_text, says_nothing

Glanced: TypeAlias = tuple[str, int, int, int]
"""A file: its name, where its first header begins, where its data begins, and its size; from the begin of the view."""

_Bytes: TypeAlias = npt.NDArray[np.uint8]

_USTAR = int.from_bytes(b"usta", "little")
_MAGIC, _NAME, _SIZE, _CHECKSUM, _KIND, _PREFIX = (
    257,
    slice(0, 100),
    slice(124, 135),
    slice(148, 154),
    156,
    345,
)
_REGULAR, _PAX = b"0x"
_WEIGHTS = 8.0 ** np.arange(11)[::-1]
_LANES = np.uint64(0x00FF00FF00FF00FF)


def glance(view: memoryview) -> tuple[Iterable[Glanced], int]:
    """The files that a view of a tar begins with, as far as they lie in it wholly, and where they end.

    Args:
        view: from a header on.
    """
    count = len(view) // BLOCK
    blocks = np.frombuffer(view, np.uint8, count * BLOCK).reshape(count, BLOCK)
    magics = np.ndarray(count, "<u4", blocks, _MAGIC, (BLOCK,))
    places = np.flatnonzero(magics == _USTAR)
    heads = blocks[places]
    sizes, good = _octal(heads, _SIZE)
    sums, readable = _octal(heads, _CHECKSUM)
    stated = sums - 8 * 0x20 + heads[:, 148:156].sum(axis=1, dtype=np.int64)
    kinds = heads[:, _KIND]
    pax = kinds == _PAX
    good &= readable & (heads[:, _MAGIC + 4] == ord("r")) & (_sums(heads) == stated)
    good &= ((kinds == _REGULAR) & (heads[:, _PREFIX] == 0)) | (pax & (sizes <= BLOCK))
    # each stands where the one before says; a PAX header belongs to a file
    ends = places + 1 + (sizes + BLOCK - 1) // BLOCK
    good &= places == np.concatenate(([0], ends[:-1]))
    good[:-1] &= ~pax[:-1] | ~pax[1:]
    good &= ends <= count
    taken = int(np.argmin(good)) if not good.all() else len(good)
    if taken and pax[taken - 1]:
        taken -= 1
    if not taken:
        return (), 0
    places, heads, sizes, pax = places[:taken], heads[:taken], sizes[:taken], pax[:taken]
    if pax.any() and not says_nothing(blocks[places[pax] + 1, : sizes[pax].max()].tobytes()):
        return (), 0
    files = ~pax
    begins = places.copy()
    begins[1:] = np.where(pax[:-1], places[:-1], places[1:])
    return (
        zip(
            _texts(heads[files, _NAME]),
            (begins[files] * BLOCK).tolist(),
            ((places[files] + 1) * BLOCK).tolist(),
            sizes[files].tolist(),
            strict=True,
        ),
        int(ends[taken - 1]) * BLOCK,
    )


def _texts(names: _Bytes) -> list[str]:
    """The names, as `as_text` reads them."""
    cut: list[bytes] = (
        np.ascontiguousarray(names).view(f"S{names.shape[1]}").ravel().tolist()
    )  # without NULs at their ends
    if 0 in b"".join(cut):
        return [as_text(name) for name in cut]
    return [name.decode("utf-8", "backslashreplace") for name in cut]


def _octal(heads: _Bytes, field: slice) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The numbers of a field that is all digits up to its end, and which ones are."""
    digits = heads[:, field] - np.uint8(ord("0"))
    behind = heads[:, field.stop]
    numbers = (digits.astype(np.float64) @ _WEIGHTS[-digits.shape[1] :]).astype(np.int64)
    return numbers, (digits.max(axis=1, initial=0) < 8) & ((behind == 0) | (behind == ord(" ")))


def _sums(heads: _Bytes) -> npt.NDArray[np.int64]:
    """The sum of the 512 bytes of each header: four sums side by side in one integer of 64 bits, of 128 bytes each."""
    eights = heads.view(np.uint64)
    lanes = ((eights & _LANES) + (eights >> np.uint64(8) & _LANES)).sum(axis=1)
    total = lanes & np.uint64(0xFFFF)
    for shift in (16, 32, 48):
        total += lanes >> np.uint64(shift) & np.uint64(0xFFFF)
    found: npt.NDArray[np.int64] = total.astype(np.int64)
    return found
