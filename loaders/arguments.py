"""Checking arguments: one place, the value in the message."""

import math
import operator
from typing import Any

from shardify.errors import UsageError


def integer(name: str, value: Any, *, least: int | None = None, most: int = 2**62) -> int:
    """`value` as a plain int; numpy's integers count, booleans and floats do not.

    Raises:
        UsageError: it is no integer, or not in [least, most].
    """
    try:
        number = operator.index(value if not isinstance(value, bool) else None)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"{name}={value!r}: an integer is needed") from None
    if least is not None and number < least:
        raise UsageError(f"{name}={value}: at least {least} is needed")
    if number > most:
        raise UsageError(f"{name}={value}: at most {most} is possible")
    return number


def seconds(name: str, value: Any) -> float:
    """`value` as a positive, finite number of seconds.

    Raises:
        UsageError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{name}={value!r}: a number of seconds above 0 is needed")
    return float(value)
