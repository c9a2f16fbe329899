"""Whatever is killed, and whenever: no name in shared memory, no process and no hang is left, and no cache once a run has ended well."""

import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.faults.nursery import children, is_whole, lives, members, wait_until
from tests.shardify.web import running_nginx

ROUNDS = int(os.environ.get("SHARDIFY_KILLS", "50" if os.environ.get("SHARDIFY_THOROUGH") else "20"))
"""Kills; set more of them to look harder."""
_LANES = 5  # jobs at the same time
_GONE = 10.0  # seconds after which nothing may be left


def victims(job, kind):
    """Process ids of a running job of two ranks, of that kind; none when it is not so far yet."""
    ranks = sorted(children(job))
    if kind == "everyone":
        return [job, *ranks, *(child for rank in ranks for child in children(rank))]
    if kind == "rank" or not ranks:
        return ranks[-1:]
    below = sorted(children(ranks[0]))
    return (
        below[:1] if kind == "first child" else below[-1:]
    )  # the download process is forked before the workers


@pytest.mark.parametrize("place", ["local", "remote"])
def test_nothing_is_left_of_what_is_killed_at_any_moment(nursery, pictures, tmp_path, place):
    """Jobs of two ranks with two workers each: a worker, the download process, a rank or everyone is killed at some moment."""
    met = Counter()

    def lane(number, shards):
        dice = random.Random(f"{place} {number}")
        temporary = tmp_path / f"temporary{number}"
        temporary.mkdir()
        for turn in range(ROUNDS // 2 // _LANES):
            log = tmp_path / f"log{number}-{turn}"
            job = nursery.start(
                "launch", log, work="endless", world=2, shards=str(shards), temporary=str(temporary)
            )
            time.sleep(dice.uniform(0.0, 2.0))
            kind = dice.choice(["first child", "worker", "rank", "everyone"])
            named = [path for pid in members(job) for path in mapped_names(pid)]
            assert not named, "named shared memory is in use"
            hit = [pid for pid in victims(job, kind) if kill(pid)]
            if not hit:
                kind = "everyone"
                hit = [pid for pid in members(job) if kill(pid)]
            wait_until(lambda hit=hit: not any(map(lives, hit)), "a kill does not kill")
            if kind in ("first child", "worker") and all(
                is_whole(rank, 2 + (place == "remote")) for rank in children(job)
            ):
                kind = "everyone"  # it was a helper of the beginning that had done its work
                for pid in members(job):
                    kill(pid)
            met[kind] += 1
            status = nursery.wait(job, 30)
            assert status == (-signal.SIGKILL if kind == "everyone" else 1), log.read_text()
            wait_until(lambda job=job: not members(job), f"processes outlive the kill of {kind}", _GONE)
            # a run that begins takes away what others left
        log = tmp_path / f"log{number}-last"
        last = nursery.start(
            "launch", log, work="one_epoch", world=2, shards=str(shards), temporary=str(temporary)
        )
        assert nursery.wait(last) == 0, log.read_text()
        wait_until(lambda: not members(last), "processes outlive their job", _GONE)
        assert not list(temporary.iterdir())

    with running_nginx(pictures, tmp_path / "nginx") as url, ThreadPoolExecutor(_LANES) as pool:
        shards = url if place == "remote" else pictures
        for ended in [pool.submit(lane, number, shards) for number in range(_LANES)]:
            ended.result()
    assert sum(met.values()) == ROUNDS // 2 // _LANES * _LANES
    assert len(met) >= min(4, ROUNDS // 10)
    assert not nursery.shared_names()


def kill(pid):
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def mapped_names(pid):
    """Files in /dev/shm that a process has mapped and that have a name."""
    with suppress(OSError), open(f"/proc/{pid}/maps") as maps:
        return [line for line in maps if "/dev/shm/" in line and "(deleted)" not in line]
    return []
