"""Putting rows together: best-fit packing, and batches within a budget. Pure functions of arrays."""

from bisect import bisect_right
from collections import defaultdict

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def best_fit(lengths: IntArray, capacity: int) -> IntArray:
    """Pack items, the longest first, each into the fullest pack that still holds it (best-fit decreasing).

    Args:
        lengths: int64 [n], each at least 1. An item of `capacity` or more is a pack of its own.
        capacity: of a pack.

    Returns:
        int64 [n], the pack of each item, numbered from 0 in the order they were opened.
    """
    order = np.argsort(-lengths, kind="stable")
    alone = int((lengths >= capacity).sum())
    values, counts = np.unique(-lengths[order[alone:]], return_counts=True)
    chosen, times = _best_fit((-values).tolist(), counts.tolist(), capacity)
    packs = np.empty(len(lengths), dtype=np.int64)
    packs[order[:alone]] = np.arange(alone)
    packs[order[alone:]] = alone + np.repeat(np.array(chosen, np.int64), np.array(times, np.int64))
    return packs


def _best_fit(lengths: list[int], counts: list[int], capacity: int) -> tuple[list[int], list[int]]:
    """Packs chosen one after another, and how many items each takes then, for `counts` items of descending lengths below the capacity.

    A pack that took an item, and has room for another of that length, is the fullest that has: it takes as many as fit at once. Open packs
    are kept by their room. Which rooms occur is a set of bits in two levels, so that the smallest that suffices is found in two steps,
    whatever the number of packs.
    """
    half = (capacity.bit_length() + 1) // 2
    low = (1 << half) - 1
    words = [0] * (1 << half)  # bit r & low of word r >> half: packs with room r are open
    used = 0  # bit w: word w is not 0
    open_packs: defaultdict[int, list[int]] = defaultdict(list)
    least = lengths[-1] if lengths else 0
    chosen, times, packs = [], [], 0
    for length, count in zip(lengths, counts, strict=True):
        left = count
        while left:
            word = length >> half
            bits = words[word] >> (length & low)
            if bits:
                room = length + (bits & -bits).bit_length() - 1
            elif above := used >> word + 1:
                word += (above & -above).bit_length()
                bits = words[word]
                room = (word << half) + (bits & -bits).bit_length() - 1
            if bits:
                same = open_packs[room]
                pack = same.pop()
                if not same:
                    words[word] ^= 1 << (room & low)
                    if not words[word]:
                        used ^= 1 << word
            else:
                pack, room = packs, capacity
                packs += 1
            number = min(room // length, left)
            chosen.append(pack)
            times.append(number)
            left -= number
            room -= number * length
            if room >= least:
                open_packs[room].append(pack)
                words[room >> half] |= 1 << (room & low)
                used |= 1 << (room >> half)
    return chosen, times


def within_budget(
    lengths: IntArray, tiles: IntArray, *, max_rows: int, max_tokens: int | None, max_tiles: int | None
) -> IntArray:
    """Cut rows of descending length into batches within a budget.

    Args:
        lengths: int64 [n], descending, each at least 1.
        tiles: int64 [n].
        max_rows: in a batch; 0 for any number.
        max_tokens: rows x longest row of a batch; None for any number.
        max_tiles: of a batch together; None for any number.

    Returns:
        int64 [batches], rows of each, at least 1: a row beyond the budget is a batch of its own.
    """
    longest = lengths.tolist()
    before = np.concatenate(([0], np.cumsum(tiles))).tolist()
    sizes, begin, count = [], 0, len(longest)
    while begin < count:
        end = min(begin + max_rows, count) if max_rows else count
        if max_tokens is not None:
            end = min(end, begin + max_tokens // longest[begin])
        if max_tiles is not None:
            end = min(end, bisect_right(before, before[begin] + max_tiles) - 1)
        end = max(end, begin + 1)
        sizes.append(end - begin)
        begin = end
    return np.array(sizes, dtype=np.int64)
