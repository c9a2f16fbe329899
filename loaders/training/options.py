"""What options may say, as argparse's `type=`; anything else ends the program with what is wanted."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def _checked(kind: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def checked(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {what}")
        return value

    return checked


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(":")))


def _count_or_share(text: str) -> float:
    return number if (number := float(text)) < 1 else int(text)


positive = _checked(int, lambda number: number > 0, "a positive whole number")
rate = _checked(float, lambda number: 0 < number < math.inf, "a positive number")
share = _checked(float, lambda number: 0 <= number < 1, "a share, from 0 to below 1")
count_or_share = _checked(_count_or_share, lambda number: number >= 0, "a count, or a share below 1")
stretch = _checked(_integers, lambda pair: len(pair) == 2 and 0 <= pair[0] < pair[1], "FROM:TO")
