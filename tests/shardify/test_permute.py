"""Keyed permutations: bijections, inverses, one key or many, and no visible bias."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardify.permute import key_of, keys_of, permute, unpermute

KEYS = st.integers(0, 2**64 - 1)


@given(n=st.integers(1, 5000), key=KEYS)
def test_permute_is_a_bijection_with_an_inverse(n, key):
    everything = np.arange(n)
    permuted = permute(everything, n, key)
    assert np.array_equal(np.sort(permuted), everything)
    assert np.array_equal(unpermute(permuted, n, key), everything)


@given(
    n=st.integers(1, 2**62),
    key=KEYS,
    fractions=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20),
)
def test_huge_ranges_stay_in_range_and_invert(n, key, fractions):
    x = np.array([min(int(f * n), n - 1) for f in fractions])
    y = permute(x, n, key)
    assert ((y >= 0) & (y < n)).all()
    assert np.array_equal(unpermute(y, n, key), x)


@given(data=st.lists(st.tuples(st.integers(1, 3000), KEYS), min_size=1, max_size=30))
def test_a_size_and_a_key_for_each_value_equal_single_calls(data):
    sizes = np.array([n for n, _ in data])
    keys = np.array([key for _, key in data], dtype=np.uint64)
    x = sizes // 2
    together = permute(x, sizes, keys)
    assert together.tolist() == [int(permute([a], n, key)[0]) for a, (n, key) in zip(x, data, strict=True)]


def test_an_empty_array_is_fine():
    assert len(permute(np.zeros(0, np.int64), 7, 1)) == 0


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_small_permutations_are_equally_frequent(n):
    expected = 100
    keys = np.array([key_of(7, k) for k in range(math.factorial(n) * expected)], dtype=np.uint64)
    columns = [permute(np.full(len(keys), i), n, keys) for i in range(n)]
    seen = Counter(zip(*(column.tolist() for column in columns), strict=True))
    degrees = math.factorial(n) - 1
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    chi_square += (degrees + 1 - len(seen)) * expected
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)  # four standard deviations of chi-square


def test_where_a_value_goes_is_uniform():
    n, keys = 1000, np.array([key_of(1, k) for k in range(20_000)], dtype=np.uint64)
    landed = permute(np.full(len(keys), 123), n, keys)
    counts = np.bincount(landed // 50, minlength=20)
    assert (((counts - 1000) ** 2) / 1000).sum() < 19 + 4 * math.sqrt(38)


def test_keys_depend_on_every_part_and_its_place():
    keys = {
        key_of(),
        key_of(0),
        key_of(0, 0),
        key_of(1),
        key_of(0, 1),
        key_of(1, 0),
        key_of(-1),
        key_of(2**64 - 2),
    }
    assert len(keys) == 8
    many = keys_of(key_of(5), np.arange(10_000))
    assert len(set(many.tolist())) == 10_000
