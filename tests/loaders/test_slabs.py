"""Slabs are free again when nothing refers to them and the copies out of them are complete; never before."""

import gc
import os
import subprocess
import sys
from pathlib import Path

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
    assert [pool.acquire() for _ in range(5)] == [2, 1, 0, None, None]
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


def test_byte_strings_over_a_slab_keep_it_until_the_last_is_gone():
    pool = SlabPool(1, 100)
    slab = pool.acquire()
    pool.memory(slab)[:6] = list(b"abcdef")
    views = pool.lend_views(slab, [(0, 3), (3, 3), (3, 6)])
    assert views == [b"abc", b"", b"def"]
    assert all(view.readonly for view in views)
    last = views[2]
    del views
    part, whole = last[1:], np.frombuffer(last, np.uint8)
    del last, whole
    gc.collect()
    assert pool.acquire() is None
    assert bytes(part) == b"ef"
    del part
    assert pool.acquire() == slab


def test_a_slab_of_no_byte_strings_is_free_at_once():
    pool = SlabPool(1, 100)
    assert pool.lend_views(pool.acquire(), []) == []
    assert pool.acquire() == 0


def test_a_forked_process_frees_nothing():
    pool = SlabPool(1, 100)
    memory = pool.lend(pool.acquire())
    child = os.fork()
    if child == 0:
        del memory
        os._exit(pool.acquire() is not None)
    assert os.waitpid(child, 0)[1] == 0
    del memory
    assert pool.acquire() == 0


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


class Cuda:
    """Stands for CUDA's runtime, which refuses to pin."""

    def __init__(self):
        self.asked = []

    def cudaHostRegister(self, address, size, flags):  # noqa: N802 - its name
        self.asked.append((size, flags))
        return 1


def test_memory_is_pinned_once_the_process_uses_cuda_and_not_before(monkeypatch, caplog):
    cuda, used = Cuda(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(used))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    pool = SlabPool(2, 100)
    pool.pin()
    pool.lend(pool.acquire())
    assert not cuda.asked
    used.append("cuda")
    for _ in range(3):
        pool.lend(pool.acquire())
    pool.pin()
    assert cuda.asked == [(2 * pool.size, 1)]
    assert len(caplog.records) == 1  # that it cannot be pinned


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_plain_copy_under_way_keeps_a_slab():
    torch.cuda.init()
    pool = SlabPool(1, 1 << 20)
    slab = pool.acquire()
    tensor = torch.from_numpy(pool.lend(slab))
    assert tensor.is_pinned()
    tensor.fill_(7)
    torch.cuda._sleep(2_000_000_000)  # about a second
    copied = tensor.to("cuda", non_blocking=True)
    del tensor
    assert pool.acquire() is None
    torch.cuda.synchronize()
    assert pool.acquire() == slab
    pool.memory(slab)[:] = 1
    assert (copied == 7).all()


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


SMALL_DEV_SHM = """
import os, sys, threading
import torch
from loaders import ImageTransform, StreamingLoader

loader = StreamingLoader(sys.argv[1], batch_size=32, image=ImageTransform(336), num_workers=2, prefetch=4)
kept = list(loader)  # 12 slabs of 11 MB, all written to
assert sum(batch.images.nbytes for batch in kept) > 64 << 20
for batch in kept:
    for sample, pixels in zip(batch.image_samples.tolist(), batch.images):
        assert pixels.float().mean(dim=(1, 2)).round().tolist() == [int(batch.keys[sample]), 0, 7]
names = os.listdir("/dev/shm")
assert not [name for name in names if name != "sentinel"], names
loader.close()
print("done")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small /dev/shm")
def test_a_small_dev_shm_is_no_limit(tmp_path, made):
    data = made.write(tmp_path / "data", [made.ordinary(i) for i in range(200)], shards=2)
    script = tmp_path / "run.py"
    script.write_text(SMALL_DEV_SHM)
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && touch /dev/shm/sentinel && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this system does not let root mount in a namespace of its own")
    run = subprocess.run(
        [*command, sys.executable, script, data],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.stdout == "done\n", run.stderr
