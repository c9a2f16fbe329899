"""What several tests of faults need: a process that forks ranks, and data sets for them."""

from pathlib import Path

import pytest

from tests.faults.nursery import running_nursery
from tests.faults.ranks import noise
from tests.loaders.conftest import Made, ordinary, record, write_data_set


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Forks the ranks of `ranks.py`."""
    cache = tmp_path_factory.mktemp("user-cache")
    with running_nursery(Path(__file__).with_name("ranks.py"), XDG_CACHE_HOME=str(cache)) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """103 samples, each with a picture, in 5 shards."""
    return write_data_set(tmp_path_factory.mktemp("pictures"), [ordinary(i) for i in range(103)], shards=5)


@pytest.fixture(scope="session")
def noises(tmp_path_factory):
    """600 samples of noise in 5 shards: some 3 MB in 20 extents."""
    samples = [Made([noise(i)], record(i)) for i in range(600)]
    return write_data_set(tmp_path_factory.mktemp("noises"), samples, shards=5)
