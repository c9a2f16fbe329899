"""Two real ranks behind a proxy that does to answers what networks do: the same batches, bit by bit, or an error in time; and four that share a small cache."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from loaders.fetch import blocks
from tests.faults.nursery import children, is_whole, members
from tests.faults.proxy import CORRUPT, running_proxy, seeded
from tests.shardify.s3 import running_server
from tests.shardify.web import running_nginx


def batches_of(nursery, folder, name, shards, environment=(), **options):
    """What both ranks see: their lines of digests."""
    (folder / f"{name}-temporary").mkdir()
    job = nursery.start(
        "launch",
        folder / f"{name}-log",
        work="digests",
        world=2,
        shards=str(shards),
        out=str(folder / name),
        temporary=str(folder / f"{name}-temporary"),
        environment=dict(environment),
        **options,
    )
    assert nursery.wait(job, 120) == 0, (folder / f"{name}-log").read_text()[-3000:]
    assert not list((folder / f"{name}-temporary").iterdir())
    return [(folder / f"{name}.{rank}").read_text().split() for rank in range(2)]


def faults(seed):
    """A seeded script; of a manifest nothing says what its bytes should be."""
    script = seeded(seed)

    def spared(what, number):
        fault = script(what, number)
        return None if fault == CORRUPT and "manifest" in what else fault

    return spared


@contextmanager
def on_s3(folder):
    """The files of a folder in a bucket of moto's: its URL, and what clients need to know."""
    with running_server() as server:
        server.client.create_bucket(Bucket="lab")
        for path in folder.iterdir():
            server.client.upload_file(str(path), "lab", f"set/{path.name}")
        yield server


@pytest.mark.parametrize("seed", [1, 2])
def test_nginx_behind_faults_gives_what_local_files_give(nursery, pictures, tmp_path, seed):
    local = batches_of(nursery, tmp_path, "local", pictures)
    assert [len(lines) for lines in local] == [11, 11]
    with (
        running_nginx(pictures, tmp_path / "nginx") as url,
        running_proxy(url, faults(seed)) as proxy,
    ):
        proxy.retry_after = 0
        assert batches_of(nursery, tmp_path, "remote", proxy.url) == local
        assert len(proxy.met) > 3


def test_moto_behind_faults_gives_what_local_files_give(nursery, pictures, tmp_path):
    local = batches_of(nursery, tmp_path, "local", pictures)
    with on_s3(pictures) as server, running_proxy(server.url, faults(5)) as proxy:
        environment = server.environment | {"AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "9"}
        assert batches_of(nursery, tmp_path, "remote", "s3://lab/set", environment) == local
        assert len(proxy.met) > 3


def test_compressed_shards_behind_faults_give_what_plain_local_ones_give(nursery, pictures, tmp_path):
    packed = tmp_path / "packed"
    command = ["-m", "shardify.cli", "reshard", str(pictures), "--out", str(packed), "--compress", "zstd"]
    command += ["--shards", "5", "--no-shuffle"]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    local = batches_of(nursery, tmp_path, "local", pictures)
    with running_nginx(packed, tmp_path / "nginx") as url, running_proxy(url, faults(1)) as proxy:
        proxy.retry_after = 0
        assert batches_of(nursery, tmp_path, "remote", proxy.url) == local
        assert {path for _, path, _ in proxy.requests if ".tar" in path} == {
            f"/00{shard}.tar.zst" for shard in range(5)
        }
        assert len(proxy.met) > 2


@pytest.mark.parametrize("fault", [503, "drop", "truncate"])
def test_past_the_deadline_both_ranks_end_with_url_and_shard(nursery, pictures, tmp_path, fault):
    def script(what, _number):
        return fault if "003.tar" in what else None

    with running_nginx(pictures, tmp_path / "nginx") as url, running_proxy(url, script) as proxy:
        logs = [tmp_path / f"log{rank}" for rank in range(2)]
        # each by itself, so that both have to end
        jobs = [
            nursery.start(
                "digests",
                logs[rank],
                rank=rank,
                world=2,
                shards=proxy.url,
                out=str(tmp_path / "out"),
                temporary=str(tmp_path),
                timeout=2,
            )
            for rank in range(2)
        ]
        assert [nursery.wait(job) for job in jobs] == [1, 1]
        for log in logs:
            assert f"LoaderError: {proxy.url}/003.tar, bytes " in log.read_text()
            assert "could not be fetched within 2 s" in log.read_text()
        assert not any(members(job) for job in jobs)


def test_four_ranks_share_a_small_cache_through_random_kills(nursery, noises, tmp_path):
    """The cache holds less than half of the data; ranks and their children are killed again and again, and come back."""
    dice, size, largest = random.Random(3), 1_400_000, 0
    data = sum(path.stat().st_size for path in noises.glob("*.tar"))
    assert size < data / 2
    cache = tmp_path / "cache"
    ended = threading.Event()

    def measure():
        nonlocal largest
        while not ended.wait(0.005):
            largest = max(largest, bytes_in(cache))

    with running_nginx(noises, tmp_path / "nginx") as url:

        def start(rank, seed, epochs):
            return nursery.start(
                "compare_noise",
                tmp_path / f"log{rank}",
                rank=rank,
                world=4,
                shards=url,
                cache_dir=str(cache),
                cache_size=size,
                seed=seed,
                epochs=epochs,
            )

        watch = threading.Thread(target=measure)
        watch.start()
        try:
            ranks = [start(rank, 0, 0) for rank in range(4)]
            for turn in range(12):
                time.sleep(dice.uniform(0.1, 1.0))
                rank = dice.randrange(4)
                below = children(ranks[rank])
                victim = dice.choice(below) if below and dice.random() < 0.5 else ranks[rank]
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                if victim != ranks[rank] and is_whole(ranks[rank], 3):  # a helper of the beginning
                    os.kill(ranks[rank], signal.SIGKILL)
                assert nursery.wait(ranks[rank]) in (1, -signal.SIGKILL)
                log = (tmp_path / f"log{rank}").read_text()
                assert "AssertionError" not in log, log
                ranks[rank] = start(rank, turn + 1, 0)
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)
                nursery.wait(rank)
            last = [start(rank, 99, 1) for rank in range(4)]
            for rank, pid in enumerate(last):
                assert nursery.wait(pid, 120) == 0, (tmp_path / f"log{rank}").read_text()[-3000:]
        finally:
            ended.set()
            watch.join()
    assert 0 < largest <= size
    for block in (cache / "blocks").iterdir():
        assert blocks.is_whole(str(block), block.name)


def bytes_in(folder):
    """Of the files below it that are there at one moment, seen from outside while others write, rename and remove there."""

    def sizes():
        found = {}
        for path, _, names in os.walk(folder):
            for name in names:
                with suppress(FileNotFoundError):
                    status = os.lstat(os.path.join(path, name))
                    found[status.st_ino] = status.st_size
        return found

    before, after = sizes(), sizes()
    return sum(min(before[inode], after[inode]) for inode in before.keys() & after.keys())
