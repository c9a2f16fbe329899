"""Reading in order at sizes and places that whole runs do not show (`test_pack_options.py` has those)."""

import tracemalloc
from types import SimpleNamespace

import numpy as np

from shardify.images.spool import SPOOLED
from shardify.images.stores import LOCATION_DTYPE, MAX_IMAGE_BYTES, PLAIN_FILE, STORED, UNSEEN
from shardify.pack import RECORD_DTYPE
from shardify.scatter import _is_scattered, _wanted


def locations(count, **fields):
    rows = np.zeros(count, LOCATION_DTYPE)
    for name, values in fields.items():
        rows[name] = values
    return rows


def test_each_image_is_wanted_once_in_its_place_and_a_million_take_little_memory():
    count = 100_000
    random = np.random.default_rng(0)
    images = locations(
        count, offset=random.integers(0, 70_000, count), store=random.integers(0, 3, count), method=STORED
    )
    survey = SimpleNamespace(
        images=images, records=np.zeros(count, RECORD_DTYPE), first_image=np.arange(count)
    )
    rows = random.permutation(count)
    wanted = _wanted(None, survey, rows, [])
    tracemalloc.start()
    seen = np.zeros(count, np.int64)
    last = (-1, -1)
    for item in wanted:
        place = item.store, item.location.offset
        assert place > last
        last = place
        assert {tuple(images[row][["store", "offset"]].tolist()) for row in item.rows} == {place}
        seen[item.rows] += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (seen == 1).all()
    assert peak < 100 * count


def test_object_stores_are_for_workers_and_what_is_too_large_stays():
    stores = [SimpleNamespace(path="/data/a.zip"), SimpleNamespace(path="s3://lab/images")]
    images = locations(
        5,
        store=[0, 1, 2, 0, 0],
        size=[9, 9, 9, MAX_IMAGE_BYTES + 1, 0],
        method=[STORED, PLAIN_FILE, SPOOLED, STORED, UNSEEN],
    )
    assert _is_scattered(images, stores).tolist() == [True, False, True, False, False]
