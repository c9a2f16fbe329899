"""Shared by all tests: the hypothesis profile, and where real data lies."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# no deadline: a busy machine is not a failure. In CI the same examples every time, so that a change is judged and not the dice; elsewhere
# every run tries others
settings.register_profile(
    "shardify",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("shardify")

_DEFAULT_REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images and records: $SHARDIFY_REAL_DATA, by default ../shared/data beside the checkout."""
    folder = Path(os.environ.get("SHARDIFY_REAL_DATA", _DEFAULT_REAL_DATA))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SHARDIFY_REAL_DATA to run this")
    return folder


_SLOW = (
    "tests/end_to_end/test_elastic.py",
    "tests/end_to_end/test_losses.py",
    "tests/faults/",
    "tests/loaders/test_exactness.py",
    "tests/test_benchmarks.py",
)
"""Minutes of kills, restarts and trainings: `make test-all` runs them, too."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tests out, unless they are asked for by $SHARDIFY_SLOW_TESTS or by their path."""
    asked = any(Path(argument.split("::")[0]).suffix == ".py" for argument in config.args)
    if asked or os.environ.get("SHARDIFY_SLOW_TESTS"):
        return
    skip = pytest.mark.skip(reason="minutes long; `make test-all` runs it")
    for item in items:
        if item.nodeid.startswith(_SLOW):
            item.add_marker(skip)
