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
