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


_shortened: set[object] = set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Property tests try half of their examples, and a quarter when marked `long`, unless all are asked for by $SHARDIFY_THOROUGH."""
    if os.environ.get("SHARDIFY_THOROUGH"):
        return
    for item in items:
        test = item.function if isinstance(item, pytest.Function) else None
        # hypothesis has no other way to change the settings of a test from outside
        asked = getattr(test, "_hypothesis_internal_use_settings", None)
        if asked is None or test in _shortened:
            continue
        _shortened.add(test)
        share = 4 if item.get_closest_marker("long") else 2
        test._hypothesis_internal_use_settings = settings(
            asked, max_examples=max(5, asked.max_examples // share)
        )
