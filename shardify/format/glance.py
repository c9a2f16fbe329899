"""Many tar headers at once: what most shards consist of, followed from one to the next and then checked together by numpy.

    [header of a file][data] ...        or        [PAX header: times and the like][its records][header of a file][data] ...

Only what is plainly that is taken, as far as it goes without a break; everything else is for `walk`, which reads header by header and knows
what to say about it.
"""

import struct
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from shardify.format.headers import BLOCK, as_text, says_nothing

LEAST_HEADERS, MOST_HEADERS = 128, 2048
"""Checked together: few where something out of the ordinary is to be expected, many else, since numpy takes its time however few they are."""


class Glanced(NamedTuple):
    """Files, in order: the name of each, where its first header begins, where its data begins, and its size; from the begin of the view."""

    names: list[str]
    begins: list[int]
    starts: list[int]
    sizes: list[int]


NOTHING = Glanced([], [], [], [])

_Bytes: TypeAlias = npt.NDArray[np.uint8]

_SIZE = struct.Struct("124x11s377x")
_NAME, _DIGITS, _KIND, _MAGIC, _PREFIX = slice(0, 100), np.r_[124:135, 148:154], 156, slice(257, 262), 345
_USTAR = np.frombuffer(b"ustar", np.uint8)
_REGULAR, _PAX = b"0x"
_LANES = np.uint64(0x00FF00FF00FF00FF)
_ADDED = 128  # headers at a time: of a few pages each, all operands stay in the innermost cache
# of the 17 digits of size and checksum: both numbers, and the sum of the checksum's digits
_WEIGHTS = np.zeros((17, 3))
_WEIGHTS[:11, 0] = 8.0 ** np.arange(11)[::-1]
_WEIGHTS[11:, 1] = 8.0 ** np.arange(6)[::-1]
_WEIGHTS[11:, 2] = 1


def glance(view: memoryview, most: int = MOST_HEADERS) -> tuple[Glanced, int, bool]:
    """The files that a view of a tar begins with, as far as they lie in it wholly.

    Args:
        view: from a header on.
        most: headers to look at.

    Returns:
        The files, where they end, and whether nothing out of the ordinary has stopped this before.
    """
    followed, end = _follow(view, most)
    if not followed:
        return NOTHING, 0, False
    blocks = np.frombuffer(view, np.uint8, len(view) // BLOCK * BLOCK).reshape(-1, BLOCK)
    places = np.fromiter(followed, np.int64, len(followed)) // BLOCK
    heads = blocks[places]
    digits = heads[:, _DIGITS] - np.uint8(ord("0"))
    # not by BLAS, whose threads would keep all cores busy with it
    numbers = np.einsum("ij,jk->ik", digits.astype(np.float64), _WEIGHTS)
    sizes, sums, digit_sums = numbers.astype(np.int64).T
    good = (
        (np.ascontiguousarray(digits.T).max(axis=0) < 8)
        & _ends_number(heads[:, 135])
        & _ends_number(heads[:, 154])
    )
    # the sum is made with its own field as blanks
    stated = sums + digit_sums + 6 * ord("0") + heads[:, 154] + heads[:, 155] - 8 * ord(" ")
    kinds = heads[:, _KIND]
    pax = kinds == _PAX
    good &= (_sums(heads) == stated) & (heads[:, _MAGIC] == _USTAR).all(axis=1)
    good &= ((kinds == _REGULAR) & (heads[:, _PREFIX] == 0)) | (pax & (sizes <= BLOCK))
    # each stands where the one before says; a PAX header belongs to a file
    ends = places + 1 + (sizes + BLOCK - 1) // BLOCK
    good[1:] &= places[1:] == ends[:-1]
    good[:-1] &= ~pax[:-1] | ~pax[1:]
    good[-1] &= ends[-1] * BLOCK == end
    taken = len(good) if good.all() else int(np.argmin(good))
    taken = _saying_nothing(blocks, places[:taken], sizes[:taken], pax[:taken])
    whole = taken == len(good)
    if taken and pax[taken - 1]:
        taken -= 1
    if not taken:
        return NOTHING, 0, False
    places, sizes, begins, files = places[:taken], sizes[:taken], places[:taken].copy(), ~pax[:taken]
    begins[1:] = np.where(pax[: taken - 1], places[:-1], places[1:])
    places, sizes, begins, names = places[files], sizes[files], begins[files], heads[:taken, _NAME][files]
    found = Glanced(_texts(names), (begins * BLOCK).tolist(), ((places + 1) * BLOCK).tolist(), sizes.tolist())
    return found, int(ends[taken - 1]) * BLOCK, whole


def _follow(view: memoryview, most: int) -> tuple[list[int], int]:
    """Where headers seem to be, from one to the next by their sizes, as far as their data lies in the view, and where the last one's ends."""
    places: list[int] = []
    unpack, append, last, at, before = _SIZE.unpack_from, places.append, len(view) - BLOCK, 0, 0
    try:
        for _ in range(most):
            if at > last:
                break
            (digits,) = unpack(view, at)
            following = at + (int(digits, 8) + 2 * BLOCK - 1 & -BLOCK)
            append(at)
            before, at = at, following
    except (ValueError, struct.error):
        pass  # no octal digits, or digits that lead nowhere
    if at > len(view):
        places.pop()
        at = before
    return places, at


def _saying_nothing(
    blocks: _Bytes, places: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], pax: npt.NDArray[np.bool_]
) -> int:
    """How many headers there are before the first PAX header that says more than times and the like."""
    if pax.any():
        records = blocks[places[pax] + 1, : sizes[pax].max()]
        if not says_nothing(records.tobytes()):
            silent = [says_nothing(record.tobytes()) for record in records]
            # seen together, the end of one and the begin of the next may look like a word
            if not all(silent):
                return int(np.flatnonzero(pax)[silent.index(False)])
    return len(places)


def _texts(names: _Bytes) -> list[str]:
    """The names, as `as_text` reads them."""
    cut: list[bytes] = (
        np.ascontiguousarray(names).view(f"S{names.shape[1]}").ravel().tolist()
    )  # without NULs at their ends
    joined = b"\n".join(cut)
    if 0 in joined:
        return [as_text(name) for name in cut]
    if joined.isascii() and joined.count(b"\n") == len(cut) - 1:
        return joined.decode("ascii").split("\n")
    return [name.decode("utf-8", "backslashreplace") for name in cut]


def _ends_number(column: _Bytes) -> npt.NDArray[np.bool_]:
    found: npt.NDArray[np.bool_] = (column == 0) | (column == ord(" "))
    return found


def _sums(heads: _Bytes) -> npt.NDArray[np.int64]:
    """The sum of the 512 bytes of each header: four sums side by side in one integer of 64 bits, of 128 bytes each."""
    lanes = np.empty(len(heads), np.uint64)
    for at in range(0, len(heads), _ADDED):
        eights = heads[at : at + _ADDED].view(np.uint64)
        odd = eights >> np.uint64(8)
        odd &= _LANES
        odd += eights & _LANES
        odd.sum(axis=1, out=lanes[at : at + _ADDED])
    total = lanes & np.uint64(0xFFFF)
    for shift in (16, 32, 48):
        total += lanes >> np.uint64(shift) & np.uint64(0xFFFF)
    found: npt.NDArray[np.int64] = total.astype(np.int64)
    return found
