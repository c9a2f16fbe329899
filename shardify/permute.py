"""Keyed permutations of range(n) in O(1) memory: a Feistel cipher with cycle walking, vectorised with numpy.

`permute(x, n, key)` is a bijection of range(n) for every key, evaluated only where it is asked. A domain of 2**bits >= n is split into
two halves, each in turn is xored with a keyed mix of the other; a value that lands outside range(n) is fed in again until it lies inside
(cycle walking: J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), under two tries a value on average.

The numbers these functions return are part of the order version (loaders.order.ORDER_VERSION): changing them changes every epoch.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
_Words: TypeAlias = npt.NDArray[np.uint64]

ROUNDS = 6
_MIN_BITS = 6  # below 3+3 bits a half has too few values for the rounds to mix (seen by chi-square over all permutations of 3 to 6)
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def key_of(*parts: int) -> int:
    """A 64-bit key from any integers, order-sensitive (splitmix64 chained: Steele, Lea, Flood, OOPSLA 2014)."""
    key = len(parts)
    for part in parts:
        key = _splitmix(key ^ (part & _MASK64))
    return key


def keys_of(key: int | _Words, values: IntArray) -> _Words:
    """A 64-bit key for each of `values` under one key or one for each; int64 [n] -> uint64 [n]. ``key_of``'s step, vectorised."""
    with np.errstate(over="ignore"):
        z = (np.asarray(values).astype(np.uint64) ^ np.asarray(key, dtype=np.uint64)) + np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permute(x: npt.ArrayLike, n: npt.ArrayLike, key: npt.ArrayLike) -> IntArray:
    """Where the permutation of range(n) under `key` sends `x`.

    Args:
        x: int64 [m], each 0 <= x < n.
        n: the size of the range, one for all or one for each x, 1 <= n <= 2**62.
        key: 64-bit keys, one for all or one for each x.

    Returns:
        int64 [m].
    """
    return _walk(x, n, key, inverse=False)


def unpermute(y: npt.ArrayLike, n: npt.ArrayLike, key: npt.ArrayLike) -> IntArray:
    """The inverse of `permute`: ``unpermute(permute(x, n, key), n, key) == x``."""
    return _walk(y, n, key, inverse=True)


def _walk(x: npt.ArrayLike, n: npt.ArrayLike, key: npt.ArrayLike, *, inverse: bool) -> IntArray:
    values = np.asarray(x, dtype=np.int64).astype(np.uint64)
    sizes = np.asarray(n, dtype=np.int64).astype(np.uint64)
    keys = np.asarray(key, dtype=np.uint64)
    shape = values.shape
    values, sizes, keys = values.reshape(-1), sizes.reshape(-1), keys.reshape(-1)
    low, high = _halves(sizes)
    values = _feistel(values, low, high, keys, inverse=inverse)
    outside = np.flatnonzero(values >= sizes)
    while len(outside):
        sizes_left, keys_left, low_left, high_left = (
            part if len(part) == 1 else part[outside] for part in (sizes, keys, low, high)
        )
        walked = _feistel(values[outside], low_left, high_left, keys_left, inverse=inverse)
        values[outside] = walked
        outside = outside[walked >= sizes_left]
    return values.astype(np.int64).reshape(shape)


def _halves(sizes: _Words) -> tuple[_Words, _Words]:
    """Bits of the low and the high half of the smallest even-or-odd domain 2**bits >= n."""
    # frexp gives the exponent e with n - 1 < 2**e, exact below 2**53 and at worst one bit too many above
    bits = np.maximum(
        np.frexp((np.maximum(sizes, np.uint64(1)) - np.uint64(1)).astype(np.float64))[1], _MIN_BITS
    )
    low = (bits // 2).astype(np.uint64)
    return low, bits.astype(np.uint64) - low


def _feistel(x: _Words, low: _Words, high: _Words, key: _Words, *, inverse: bool) -> _Words:
    one = np.uint64(1)
    low_mask, high_mask = (one << low) - one, (one << high) - one
    left, right = x >> low, x & low_mask
    with np.errstate(over="ignore"):
        rounds = range(ROUNDS)
        for number in reversed(rounds) if inverse else rounds:
            round_key = (key ^ np.uint64((number * _GOLDEN) & _MASK64)) * np.uint64(0xD1342543DE82EF95)
            if number % 2 == 0:
                left = left ^ (_mix(right, round_key) & high_mask)
            else:
                right = right ^ (_mix(left, round_key) & low_mask)
    return (left << low) | right


def _mix(half: _Words, key: _Words) -> _Words:
    """64 bits of which the low ones depend on all of `half` and `key` (the finaliser of MurmurHash3, one multiplication shorter)."""
    z = (half ^ key) * np.uint64(0xFF51AFD7ED558CCD)
    z ^= z >> np.uint64(32)
    z *= np.uint64(0xC4CEB9FE1A85EC53)
    return z >> np.uint64(29)


def _splitmix(value: int) -> int:
    z = (value + _GOLDEN) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)
