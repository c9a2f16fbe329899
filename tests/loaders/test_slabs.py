"""Slabs are free again when nothing refers to them and the copies out of them are complete; never before."""

import gc
import os

import numpy as np
import pytest
import torch

from loaders.slabs import SlabPool


class Event:
    """A copy that completes when told to."""

    def __init__(self):
        self.complete = False

    def query(self):
        return self.complete


def test_slabs_are_handed_out_until_none_is_left():
    pool = SlabPool(3, 10)
    assert [pool.acquire() for _ in range(5)] == [0, 1, 2, None, None]
    pool.release(1)
    assert [pool.acquire() for _ in range(2)] == [1, None]


@pytest.mark.parametrize(("count", "size"), [(0, 10), (3, 0)])
def test_a_pool_may_be_empty(count, size):
    pool = SlabPool(count, size)
    assert pool.acquire() is None
    pool.pin()


def test_slabs_do_not_overlap():
    pool = SlabPool(4, 5000)
    assert pool.size % os.sysconf("SC_PAGE_SIZE") == 0
    for slab in range(4):
        pool.memory(slab)[:] = slab
    for slab in range(4):
        assert (pool.memory(slab) == slab).all()


@pytest.mark.parametrize(
    "keep",
    [
        lambda memory: memory,
        lambda memory: memory[3:7],
        lambda memory: memory[:12].reshape(3, 4)[1],
        torch.from_numpy,
        lambda memory: torch.from_numpy(memory[:12].reshape(1, 2, 2, 3)).permute(0, 3, 1, 2)[0, 1],
    ],
)
def test_any_view_keeps_a_slab(keep):
    pool = SlabPool(1, 100)
    slab = pool.acquire()
    kept = keep(pool.lend(slab))
    gc.collect()
    assert pool.acquire() is None
    del kept
    assert pool.acquire() == slab


def test_a_slab_waits_for_the_copies_out_of_it():
    pool = SlabPool(1, 100)
    slab = pool.acquire()
    memory = pool.lend(slab)
    first, second = Event(), Event()
    pool.record_copy(slab, first)
    pool.record_copy(slab, second)
    first.complete = True
    assert pool.acquire() is None  # still lent
    del memory
    assert pool.acquire() is None  # a copy is under way
    second.complete = True
    assert pool.acquire() == slab
    pool.release(slab)
    assert pool.acquire() == slab  # nothing is remembered of earlier copies


def test_lent_memory_outlives_its_pool():
    pool = SlabPool(2, 100)
    memory = pool.lend(pool.acquire())
    memory[:] = 7
    del pool
    gc.collect()
    assert (memory == 7).all()


def test_a_forked_process_writes_into_the_same_memory():
    pool = SlabPool(2, 1000)
    child = os.fork()
    if child == 0:
        pool.memory(1)[:] = np.arange(len(pool.memory(1))) % 251
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(pool.memory(1), np.arange(pool.size) % 251)
    assert not pool.memory(0).any()


def test_no_file_stays_open():
    before = len(os.listdir("/proc/self/fd"))
    pools = [SlabPool(2, 1000) for _ in range(5)]
    # Python's mmap keeps a descriptor of its own for each mapping
    assert len(os.listdir("/proc/self/fd")) <= before + len(pools)
    del pools
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
