"""Figures of a loader: times go to the stage they were spent in, sums are exact, rates are of the time they say."""

import json
import pickle

import pytest

from loaders import stats
from loaders.stats import STAGES, BatchStats, Flow, StageClock, StatsRecorder


class Time:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        self.used = 7.0
        monkeypatch.setattr(stats.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(stats.time, "process_time", lambda: self.used)


@pytest.fixture
def clock(monkeypatch):
    return Time(monkeypatch)


def test_laps_go_to_their_stages(clock):
    stages = StageClock()
    clock.now += 50.0  # between batches: nobody's
    clock.used += 50.0
    stages.start()
    for step, stage in enumerate(["fetch", "text", "fetch", "decode", "decode"]):
        clock.now += 2.0**step
        stages.lap(stage)
    clock.now += 32.0
    clock.used += 3.0
    made = stages.stop(samples=9, images=4, bytes_used=1000, bytes_fetched=1024, requests=1, retries=2)
    assert made == BatchStats(
        samples=9,
        images=4,
        fetch=5.0,
        decode=24.0,
        text=2.0,
        collate=32.0,
        cpu=3.0,
        bytes_used=1000,
        bytes_fetched=1024,
        requests=1,
        retries=2,
    )
    assert pickle.loads(pickle.dumps(made)) == made
    stages.start()
    assert stages.stop(samples=0) == BatchStats()


def test_an_unknown_stage_is_not_made_up():
    with pytest.raises(KeyError):
        StageClock().lap("decoding")


def test_what_batches_took_is_added_up(clock):
    recorder = StatsRecorder()
    recorder.planned(0.25)
    recorder.started()
    clock.now += 5.0  # the first batch is waited for from 104 on
    recorder.add(BatchStats(samples=8, images=9, fetch=1.0, bytes_used=500), waited=1.0, ready=0)
    clock.now += 3.0
    recorder.started()
    recorder.started()
    recorder.planned(0.5)
    recorder.add(
        BatchStats(samples=7, decode=2.5, retries=3, bytes_used=250), waited=0.5, ready=4, overflowed=True
    )
    total = recorder.stats().total
    zero = dict.fromkeys(["text", "collate", "cpu", "bytes_fetched", "requests", "cache_hits"], 0)
    assert total == Flow(
        **zero,
        samples=15,
        images=9,
        fetch=1.0,
        decode=2.5,
        bytes_used=750,
        retries=3,
        batches=2,
        wait=1.5,
        ready=4,
        overflowed=1,
        plan=0.75,
        restarts=2,
        seconds=4.0,
    )
    assert total.samples_per_second == 15 / 4
    assert total.megabytes_per_second == 750e-6 / 4
    assert total.wait_share == 1.5 / 4
    assert total.queue_depth == 2.0
    assert [total.stage_share(stage) for stage in STAGES] == [1 / 3.5, 2.5 / 3.5, 0, 0]
    assert {type(getattr(total, name)) for name in ("samples", "batches", "overflowed", "restarts")} == {int}


def test_counters_of_all_processes_are_taken_over(clock):
    recorder = StatsRecorder()
    for requests, hits in [(3, 10), (5, 10), (1, 4)]:  # the last are those of a new run
        clock.now += 20.0
        recorder.counted({"requests": requests, "hits": hits, "bytes_fetched": 7 * requests, "waits": 99})
        recorder.add(BatchStats(samples=1, retries=1), waited=0.0, ready=0)
    found = recorder.stats()
    counts = (found.total.requests, found.total.cache_hits, found.total.bytes_fetched, found.total.retries)
    assert counts == (6, 14, 42, 3)
    recorder.counted({"requests": 9, "hits": 4})
    assert recorder.stats().total.requests == 14
    assert (found.total.requests, found.recent.samples) == (6, 3)


def test_workers_started_anew_count_from_zero(clock):
    recorder = StatsRecorder()
    for requests in (3, 10):
        recorder.started()
        recorder.counted({"requests": requests})
    assert recorder.stats().total.requests == 13


def test_recent_figures_forget(clock):
    recorder = StatsRecorder()
    for step in range(100):  # 4 batches a second; the second half is twice as large, and fetches
        clock.now += 0.25
        late = step >= 50
        recorder.add(
            BatchStats(samples=20 if late else 10, decode=0.1, fetch=0.1 * late), waited=0.1 * late, ready=2
        )
    found = recorder.stats()
    assert found.total.samples == 1500
    assert found.total.seconds == pytest.approx(24.75)
    assert 10 <= found.recent.seconds < 12
    assert found.recent.samples_per_second == pytest.approx(80)
    assert found.recent.wait_share == pytest.approx(0.4)
    assert found.recent.stage_share("fetch") == pytest.approx(0.5)
    assert found.line() == "80/s, 0 MB/s, wait 40 %, fetch 50 % decode 50 %"
    clock.now += 1000  # nothing was asked for meanwhile
    assert recorder.stats() == found


def test_before_the_first_batch_all_is_zero():
    found = StatsRecorder().stats()
    assert set(found.as_scalars().values()) == {0.0}
    assert found.line() == "0/s, 0 MB/s, wait 0 %"
    assert found.recent == found.total


def test_scalars_are_plain_numbers_under_steady_names(clock):
    recorder = StatsRecorder()
    before = recorder.stats().as_scalars("data/").keys()
    clock.now += 1.0
    recorder.add(BatchStats(samples=8, requests=1, cache_hits=3, retries=1), waited=1.0, ready=1)
    found = recorder.stats()
    scalars = found.as_scalars("data/")
    assert scalars.keys() == before
    assert {type(value) for value in scalars.values()} == {float}
    assert json.loads(json.dumps(scalars)) == scalars
    assert scalars["data/samples_per_second"] == 8.0
    assert scalars["data/total_samples"] == 8.0
    assert found.line() == "8/s, 0 MB/s, wait 100 %, cache 75 %, 1 retries"
    assert pickle.loads(pickle.dumps(found)) == found


def test_a_flow_begins_with_what_workers_send():
    assert tuple(Flow.__slots__)[: len(BatchStats._fields)] == BatchStats._fields
