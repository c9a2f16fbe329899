"""The node's block cache: its bound holds at every moment, what is kept is chosen well, and no torn block is read, whoever is killed when."""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loaders.fetch.blocks import (
    FOOTER_BYTES,
    Fault,
    block_name,
    end_block,
    is_whole,
    read_faults,
    write_fully,
)
from loaders.fetch.cache import BlockCache, Claim, Want
from loaders.fetch.folder import CacheFolder
from shardify.errors import LoaderError

_spec = importlib.util.spec_from_file_location("fetching", Path(__file__).parent / "fetching.py")
fetching = importlib.util.module_from_spec(_spec)
sys.modules.setdefault("fetching", fetching)
_spec.loader.exec_module(fetching)
web = fetching.load("web", "shardify")

BLOCK = 100_000
BOOK = 600_000  # that the book and its margin may need


def open_cache(folder, size: int, data: int = 10**9, *, temporary: bool = False) -> BlockCache:
    return BlockCache(CacheFolder(str(folder), size, temporary), data)


def want(number: int, size: int = BLOCK, **more) -> Want:
    return Want(block_name(f"{number:04x}", 0, size - FOOTER_BYTES), size, **more)


def fill(cache: BlockCache, wanted: Want, samples: int = 0) -> None:
    content = memoryview(bytes(wanted.size - FOOTER_BYTES))
    with open(cache.loading_path(wanted.name), "wb", buffering=0) as file:
        write_fully(file.fileno(), content)
        end_block(file.fileno(), wanted.name, content, [])
    cache.publish(wanted.name, samples=samples)


def get(cache: BlockCache, wanted: Want, samples: int = 0) -> Claim:
    (claim,) = cache.claim([wanted], 1)
    if claim is Claim.MINE:
        fill(cache, wanted, samples)
    return claim


def measured(folder) -> int:
    """Bytes in a folder, seen from outside while others write there: of files that were there at the same moment."""

    def sizes() -> dict[int, int]:
        found = {}
        for path, _, names in os.walk(folder):
            for name in names:
                with suppress(FileNotFoundError):
                    status = os.lstat(os.path.join(path, name))
                    found[status.st_ino] = status.st_size
        return found

    before, after = sizes(), sizes()
    return sum(min(before[inode], after[inode]) for inode in before.keys() & after.keys())


@given(
    content=st.binary(max_size=1000),
    faults=st.lists(st.builds(Fault, st.integers(0, 9), st.integers(9, 20), st.text(max_size=20))),
)
def test_a_block_says_what_is_in_it(tmp_path, content, faults):
    path = tmp_path / "block"
    with open(path, "w+b", buffering=0) as file:
        write_fully(file.fileno(), memoryview(content))
        end_block(file.fileno(), "name", memoryview(content), faults)
        assert read_faults(file.fileno(), len(content), path.stat().st_size) == faults
    assert is_whole(str(path), "name")
    assert not is_whole(str(path), "another")


@given(content=st.binary(min_size=1, max_size=300), data=st.data())
def test_a_block_that_is_torn_or_changed_is_not_whole(tmp_path, content, data):
    path = tmp_path / "block"
    with open(path, "wb", buffering=0) as file:
        write_fully(file.fileno(), memoryview(content))
        end_block(file.fileno(), "name", memoryview(content), [])
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        torn = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        torn = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    path.write_bytes(torn)
    assert not is_whole(str(path), "name")


def test_two_owners_fetch_a_block_once(tmp_path):
    first, second = open_cache(tmp_path, 10**7), open_cache(tmp_path, 10**7)
    assert first.claim([want(1)], 1) == [Claim.MINE]
    assert second.claim([want(1)], 1) == [Claim.OTHERS]
    fill(first, want(1))
    assert second.claim([want(1)], 1) == [Claim.READY]
    first.close()
    second.close()


def test_what_a_dead_owner_had_claimed_is_free_at_once(tmp_path):
    mine = open_cache(tmp_path, 2_000_000)
    pid = os.fork()
    if not pid:
        other = open_cache(tmp_path, 2_000_000)
        other.claim([want(1), want(2, 1_000_000)], 2)
        Path(other.loading_path(want(1).name)).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert mine.claim([want(1)], 1) == [Claim.MINE]
    assert not os.path.exists(mine.loading_path(want(1).name))
    assert mine.claim([want(3, 1_000_000)], 1) == [Claim.MINE]  # its room is free too
    mine.close()


def test_pinned_blocks_stay_and_yield_only_to_what_is_waited_for(tmp_path):
    cache = open_cache(tmp_path, 5 * BLOCK + BOOK)
    blocks = [want(number, due=number) for number in range(5)]
    assert [get(cache, block) for block in blocks] == [Claim.MINE] * 5
    while get(cache, more := want(100 + len(blocks), due=len(blocks))) is Claim.MINE:
        blocks.append(more)
    assert get(cache, want(50)) is Claim.NO_ROOM
    cache.set_urgent([blocks[-1].name], urgent=True)
    assert get(cache, want(51, urgent=True)) is Claim.MINE
    there = [block.due for block in blocks if cache.holds(block.name, block.size)]
    assert there == [
        block.due for block in blocks if block.due != len(blocks) - 2
    ]  # needed latest, and nobody waits for it
    assert cache.preempted == 1
    cache.release({blocks[0].name: 0})
    assert get(cache, want(52)) is Claim.MINE
    assert not cache.holds(blocks[0].name, 1)
    cache.close()


def test_what_cannot_fit_is_refused_with_the_size_it_needs(tmp_path):
    cache = open_cache(tmp_path, 10 * BLOCK)
    with pytest.raises(LoaderError, match=r"at least \d+ are needed"):
        cache.claim([want(1, 20 * BLOCK)], 1)
    cache.close()


def test_finished_blocks_go_before_unfinished_ones(tmp_path):
    cache = open_cache(
        tmp_path, 8 * BLOCK + BOOK, data=10**15
    )  # so much data that there are hardly any keepers
    blocks = [want(number) for number in range(6)]
    for block in blocks:
        get(cache, block, samples=32)
    cache.release({block.name: 32 if number in (2, 4) else 20 for number, block in enumerate(blocks)})
    gone = []
    for number in range(100, 110):
        get(cache, want(number), samples=32)
        gone += [
            n
            for n, block in enumerate(blocks)
            if not os.path.exists(cache.path(block.name)) and n not in gone
        ]
    assert gone[:2] == [2, 4]
    assert gone[2:] == sorted(gone[2:])  # least recently used first
    cache.close()


@settings(max_examples=4)
@given(seed=st.integers(0, 1000), share=st.sampled_from([0.25, 0.5]))
def test_a_reshuffled_epoch_finds_a_stable_share(tmp_path_factory, seed, share):
    """A cache of a share of the data serves at least 0.6 of that share of the next epoch; least recently used first would serve its square."""
    size, count, window = 4096, 400, 8
    cache = open_cache(tmp_path_factory.mktemp("epochs"), int(share * count * size) + BOOK, data=count * size)
    hits = []
    dice = random.Random(seed)
    for _ in range(3):
        order = list(range(count))
        dice.shuffle(order)
        found = 0
        for number in range(count + window):
            if number < count:
                found += get(cache, want(order[number], size), samples=32) is Claim.READY
            if number >= window:
                cache.release({want(order[number - window], size).name: 32})
        hits.append(found / count)
    cache.close()
    assert hits[0] == 0
    assert min(hits[1:]) >= 0.6 * share


@settings(max_examples=2)
@given(seed=st.integers(0, 1000))
def test_blocks_that_are_never_finished_do_not_stay_for_ever(tmp_path_factory, seed):
    """A third of the blocks has a sample that nobody asks for."""
    size, count, window = 4096, 400, 8
    cache = open_cache(
        tmp_path_factory.mktemp("excluded"), int(0.25 * count * size) + BOOK, data=count * size
    )
    dice, found = random.Random(seed), 0
    for _ in range(3):
        order = list(range(count))
        dice.shuffle(order)
        found = 0
        for number in range(count + window):
            if number % 50 == 0:
                cache._swept = 0.0  # a second has passed
            if number < count:
                found += get(cache, want(order[number], size), samples=32) is Claim.READY
            if number >= window:
                block = order[number - window]
                cache.release({want(block, size).name: 31 if block % 3 == 0 else 32})
    cache.close()
    assert found / count >= 0.1


class Owners(RuleBasedStateMachine):
    """Two owners of one cache in any order of steps: files and book agree, and the bound holds."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.bound = 8 * BLOCK + BOOK
        self.blocks = {
            block.name: block for block in (want(number, 20_000 * (1 + number)) for number in range(12))
        }
        self.caches = [self.open() for _ in range(2)]
        self.pinned, self.loading = [set(), set()], [set(), set()]

    def open(self):
        return open_cache(self.folder, self.bound, data=30 * BLOCK)

    @rule(owner=st.integers(0, 1), number=st.integers(0, 11), urgent=st.booleans())
    def claim(self, owner, number, urgent):
        block = want(number, 20_000 * (1 + number), urgent=urgent)
        (claim,) = self.caches[owner].claim([block], 1)
        if claim is Claim.MINE:
            self.loading[owner].add(block.name)
        elif claim is Claim.READY:
            assert self.caches[owner].holds(block.name, block.size)
            self.pinned[owner].add(block.name)

    @rule(owner=st.integers(0, 1), samples=st.integers(0, 32))
    def publish(self, owner, samples):
        if self.loading[owner]:
            name = min(self.loading[owner])
            self.loading[owner].discard(name)
            fill(self.caches[owner], self.blocks[name], samples)
            self.pinned[owner].add(name)

    @rule(owner=st.integers(0, 1))
    def abandon(self, owner):
        if self.loading[owner]:
            name = max(self.loading[owner])
            self.loading[owner].discard(name)
            self.caches[owner].abandon(name)

    @rule(owner=st.integers(0, 1), used=st.integers(0, 40))
    def release(self, owner, used):
        if self.pinned[owner]:
            name = min(self.pinned[owner])
            self.pinned[owner].discard(name)
            self.caches[owner].release({name: used})

    @rule(owner=st.integers(0, 1))
    def leave_and_come_back(self, owner):
        self.caches[owner].close()
        self.pinned[owner], self.loading[owner] = set(), set()
        self.caches[owner] = self.open()

    @invariant()
    def book_and_files_agree(self):
        cache = self.caches[0]
        with cache._turn():
            rows = dict(cache._book.execute("SELECT name, size FROM blocks WHERE state = 1"))
            used = cache._meta("used")
            total, pins = cache._book.execute(
                "SELECT ifnull(sum(size), 0), ifnull(sum(pins), 0) FROM blocks"
            ).fetchone()
            entered = cache._book.execute("SELECT count(*) FROM pins").fetchone()[0]
        files = {
            entry.name: entry.stat().st_size for entry in os.scandir(os.path.join(self.folder, "blocks"))
        }
        assert files == rows
        assert used == total
        assert pins == entered
        assert measured(self.folder) <= self.bound

    def teardown(self):
        for cache in self.caches:
            cache.close()
        shutil.rmtree(self.folder)


Owners.TestCase.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
test_owners_in_any_order = Owners.TestCase


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made) -> Path:
    """400 samples in 4 shards: 16 extents of 230 kB, 2.8 MB."""
    samples = [made.Made([np.random.default_rng(i).bytes(6000)], made.record(i)) for i in range(400)]
    return made.write(tmp_path_factory.mktemp("killed") / "data", samples, shards=4)


def rank_process(data, cache, size: int, seed: int, epochs: int | None) -> int:
    """A forked rank that reads epochs of samples in an order of its own and ends with 0 when all were right."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        warnings.simplefilter("ignore")
        remote = data.fetch(cache_dir=cache, cache_size=size, timeout=60)
        epoch = 0
        while epochs is None or epoch < epochs:
            batches = fetching.shuffled(len(data), 20, seed=seed * 1000 + epoch)
            data.stream(remote, batches, ahead=4, first=epoch * 1000)
            epoch += 1
        remote.close()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def children_of(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def test_a_temporary_cache_begins_when_the_one_before_it_has_gone(tmp_path):
    """Who has found that one deserted may be slow to remove it, and together they would hold too much."""
    going = tmp_path / "cache.gone-0123"
    (going / "blocks").mkdir(parents=True)
    (going / "blocks" / "x").write_bytes(bytes(BLOCK))
    open_cache(tmp_path / "cache", BOOK).close()
    assert going.exists()  # beside a folder of the user's own, it is the user's, too
    open_cache(tmp_path / "cache", BOOK, temporary=True).close()
    assert not going.exists()


READ_BY_THREADS = """
import os, sys, threading
from loaders.fetch.blocks import read_faults
from shardify.format.manifest import read_manifest
from shardify.format.sidecar import read_shard_info

block, size, manifest, sidecar = sys.argv[1:]
file = os.open(block, os.O_RDONLY)
calls = [lambda: read_faults(file, 2, int(size)), lambda: read_manifest(manifest), lambda: read_shard_info(sidecar)]
together, done = threading.Barrier(16), []

def read():
    for call in calls:
        together.wait()
        assert call()
    done.append(1)

sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=read) for _ in range(16)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(done) == 16
"""


def test_the_first_things_read_may_be_read_by_many_threads(folder, tmp_path):
    """Every second process crashes where a type's decoder is made by two threads at a time."""
    name = block_name("0" * 32, 0, 2)
    with open(tmp_path / "block", "wb", buffering=0) as file:
        file.write(b"12")
        size = 2 + end_block(file.fileno(), name, memoryview(b"12"), [Fault(0, 1, "damaged")])
    files = [tmp_path / "block", size, folder / "manifest.json", next(folder.glob("*.parquet"))]
    for _ in range(4):
        subprocess.run([sys.executable, "-c", READ_BY_THREADS, *map(str, files)], check=True)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "temporary"])
def test_random_kills_tear_nothing_and_leave_nothing(folder, tmp_path, monkeypatch, kept):
    """Four ranks share a cache of half of the data; one or its download process is killed again and again, and comes back."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    place, cache, size = (
        (tmp_path / "cache", tmp_path / "cache", 2_000_000) if kept else (temporary, None, 2_000_000)
    )
    dice, largest, ended = random.Random(7), 0, threading.Event()

    def measure():
        nonlocal largest
        while not ended.is_set():
            largest = max(largest, measured(place))
            time.sleep(0.002)

    with web.running_site(web.Site(files=web.files_below(folder, "/data"))) as site:
        data = fetching.describe(folder, f"{site.url}/data")
        watch = threading.Thread(target=measure)
        watch.start()
        try:
            ranks = [rank_process(data, cache, size, rank, None) for rank in range(4)]
            for round_ in range(12):
                time.sleep(dice.uniform(0.05, 0.5))
                which = dice.randrange(4)
                victims = [ranks[which]]
                if dice.random() < 0.5:
                    victims = children_of(ranks[which]) or victims
                for pid in victims + ([ranks[which]] if victims != [ranks[which]] else []):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                os.waitpid(ranks[which], 0)
                ranks[which] = rank_process(data, cache, size, 10 + round_, None)
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            last = [rank_process(data, cache, size, 100 + rank, 1) for rank in range(4)]
            assert [os.waitpid(pid, 0)[1] for pid in last] == [0] * 4
        finally:
            ended.set()
            watch.join()
    assert 0 < largest <= size
    if not kept:
        assert not list(temporary.iterdir())
        return
    assert not list((cache / "loading").iterdir())
    assert not list((cache / "owners").iterdir())
    for block in (cache / "blocks").iterdir():
        assert is_whole(str(block), block.name)
