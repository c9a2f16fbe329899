"""Pure: which record stands at which position of the planned order, and where the shards are cut.

All N records have a position, which is their sample's key; those known to be bad leave gaps there and weigh nothing.

    N = 8, two shards           position   0    1    2    3  |  4    5    6    7
    x: known to be bad          record     5    2    7x   0  |  3    6    1x   4
                                key      ...0 ...1       ...3 ...4 ...5       ...7
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardify.errors import UsageError
from shardify.permute import key_of, permute

DEFAULT_SHARD_SIZE = 256_000_000
"""Bytes a shard aims at when nothing is said about shards."""

_SHUFFLE = int.from_bytes(b"pack", "big")  # keeps this permutation apart from others keyed by the same seed
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{unit}B": 1000**power for power, unit in enumerate("KMGT", 1)}
_UNITS |= {f"{unit}IB": 1024**power for power, unit in enumerate("KMGT", 1)}

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The planned order and its cut into shards.

    Attributes:
        order: int64 [N], the record at each position.
        starts: int64 [shards + 1], the first position of each shard, and N.
    """

    order: _Ints
    starts: _Ints

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return len(self.starts) - 1


@dataclass(frozen=True, slots=True)
class Cut:
    """How to cut the order into shards: by one of `shard_size` (bytes), `samples_per_shard` and `shards`.

    The shard count is rounded up to a multiple of `multiple_of`.
    """

    shard_size: int | None = None
    samples_per_shard: int | None = None
    shards: int | None = None
    multiple_of: int = 1


def make_cut(
    *, shard_size: str | None, samples_per_shard: int | None, shards: int | None, multiple_of: int
) -> Cut:
    """Check the options that cut; without any, `DEFAULT_SHARD_SIZE` holds.

    Raises:
        UsageError: more than one of them is given, or a value makes no sense.
    """
    given = {"--shard-size": shard_size, "--samples-per-shard": samples_per_shard, "--shards": shards}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} say the same thing in different ways; give one of them")
    for name, value in {**given, "--multiple-of": multiple_of}.items():
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{name} {value}: must be at least 1")
    size = parse_size(shard_size) if shard_size is not None else None if named else DEFAULT_SHARD_SIZE
    return Cut(size, samples_per_shard, shards, multiple_of)


def parse_size(text: str) -> int:
    """Bytes: ``256MB`` (10**6), ``1GiB`` (2**30), ``100_000_000``; units in any case, the B may be left out.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].upper() if match else ""
    factor = _UNITS.get(unit) or _UNITS.get(f"{unit}B")
    size = int(float(match[1].replace("_", "")) * factor) if match and factor else 0
    if size < 1:
        raise UsageError(f"{text!r} is no size; write 256MB, 1GiB or a number of bytes")
    return size


def planned_order(records: int, *, shuffle: bool, seed: int) -> _Ints:
    """The record at each position, int64 [records]."""
    numbers = np.arange(records, dtype=np.int64)
    return permute(numbers, records, key_of(_SHUFFLE, seed)) if shuffle and records else numbers


def make_plan(spans: npt.ArrayLike, *, shuffle: bool, seed: int, cut: Cut) -> Plan:
    """Plan a data set.

    Args:
        spans: int64 [N], the bytes each record's sample takes in a shard; 0 for a record known to be bad.
        shuffle: permute the records, keyed by `seed`; otherwise their own order stays.
        seed: any integer.
        cut: by bytes, the shards are balanced to within a sample; by samples, each has exactly that many good ones (the last one fewer),
            unless the count is rounded up, then they are balanced by number.

    Raises:
        UsageError: there would be more shards than good records.
    """
    span = np.asarray(spans, dtype=np.int64)
    order = planned_order(len(span), shuffle=shuffle, seed=seed)
    good = np.flatnonzero(span[order])  # positions
    reach = np.cumsum(span[order[good]])
    total = int(reach[-1]) if len(reach) else 0

    # however many are asked for: what is counted here has 64 bits
    per_shard = None if cut.samples_per_shard is None else min(cut.samples_per_shard, max(1, len(good)))
    if cut.shards is not None:
        count = cut.shards
    elif per_shard is not None:
        count = max(1, _divide_up(len(good), per_shard))
    else:
        # few large samples: no more shards than there are samples, also when rounded up
        most = max(1, len(good) // cut.multiple_of * cut.multiple_of)
        count = max(1, min(most, _divide_up(total, cut.shard_size or DEFAULT_SHARD_SIZE)))
    rounded = _divide_up(count, cut.multiple_of) * cut.multiple_of
    if rounded > max(1, len(good)):
        asked = (
            f"{count} shards" if rounded == count else f"{rounded} shards ({count} rounded up to a multiple)"
        )
        raise UsageError(f"{asked} are more than the {len(good)} records that can be packed; ask for fewer")

    number = np.arange(1, rounded, dtype=np.int64)
    if per_shard is None:
        # each inner boundary stands at the sample whose middle is the first beyond its share of the bytes
        middle = reach - span[order[good]] // 2
        inner = np.searchsorted(middle, [k * total // rounded for k in number.tolist()])
        # and leaves every shard at least one sample on either side
        inner = np.maximum.accumulate(inner - number) + number
        inner = np.clip(inner, number, len(good) - rounded + number)
    else:
        inner = number * per_shard if rounded == count else number * len(good) // rounded
    starts = np.concatenate([[0], good[inner], [len(span)]]).astype(np.int64)
    return Plan(order, starts)


def _divide_up(number: int, by: int) -> int:
    return -(-number // by)
