"""How many bad samples a run bears."""

import pytest

from loaders.batch import SampleFault
from loaders.policy import ErrorPolicy
from loaders.report import LoaderReport
from shardify.errors import LoaderError, UsageError


def fault(position: int = 0, code: str = "image-undecodable") -> SampleFault:
    return SampleFault(position, "000000007", "data/000.tar", 512, code, "cut off")


def report_of(samples: int, faults: list[SampleFault]) -> LoaderReport:
    report = LoaderReport()
    report.add(samples=samples, faults=faults, notes=(), overflowed=False)
    return report


def test_by_default_any_number_is_borne():
    faults = [fault(n) for n in range(100)]
    ErrorPolicy().judge(faults, report_of(1, faults))


def test_raise_names_the_first_one():
    with pytest.raises(
        LoaderError, match=r"image-undecodable \(cut off\), data/000\.tar offset 512, key 000000007"
    ):
        ErrorPolicy("raise").judge([fault()], report_of(99, [fault()]))


@pytest.mark.parametrize(("limit", "bad", "ends"), [(0, 1, True), (3, 3, False), (3, 4, True)])
def test_a_count(limit, bad, ends):
    faults = [fault(n) for n in range(bad)]
    policy, report = ErrorPolicy(max_errors=limit), report_of(1000, faults)
    if not ends:
        policy.judge(faults, report)
        return
    with pytest.raises(LoaderError, match=rf"{bad} of {1000 + bad} samples .* {bad} image-undecodable"):
        policy.judge(faults, report)


@pytest.mark.parametrize(
    ("seen", "bad", "ends"),
    [
        (10, 5, False),
        (99, 99, False),
        (100, 1, False),
        (100, 2, True),
        (10_000, 100, False),
        (10_000, 101, True),
    ],
)
def test_a_rate_is_looked_at_once_one_bad_sample_is_within_it(seen, bad, ends):
    faults = [fault(n) for n in range(bad)]
    policy, report = ErrorPolicy(max_errors=0.01), report_of(seen - bad, faults)
    if not ends:
        policy.judge(faults, report)
        return
    with pytest.raises(LoaderError, match=r"max_errors=0\.01"):
        policy.judge(faults, report)


def test_a_rate_of_zero_bears_none():
    with pytest.raises(LoaderError):
        ErrorPolicy(max_errors=0.0).judge([fault()], report_of(1, [fault()]))


@pytest.mark.parametrize(
    "options",
    [
        {"on_error": "ignore"},
        {"max_errors": -1},
        {"max_errors": 1.5},
        {"max_errors": True},
        {"max_errors": "3"},
    ],
)
def test_other_values_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        ErrorPolicy(**options)
