"""The benchmarks run, with tiny numbers: what they measure counts for nothing here."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
MODULES = ("webdataset", "energon", "mosaicml", "litdata", "huggingface", "spdl", "spdl_in_process")


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """The package, with a few small pictures, results in `tmp_path`, and no peers."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import loading, raw, runner, shuffle
    from benchmarks.peers import process

    pictures = [picture(number) for number in range(16)]
    monkeypatch.setattr(runner, "photos", lambda: ("16 test pictures", pictures))
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    for module in (loading, shuffle, process):
        monkeypatch.setattr(
            module, "interpreter", lambda name: sys.executable if name == "shardify" else None
        )
    return loading, raw, shuffle


def picture(number: int) -> bytes:
    ramp = np.add.outer(np.arange(340), np.arange(360 + number)) % 256
    file = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def test_loading_is_measured_against_the_kernel_without_peers(benchmarks, tmp_path, capsys):
    loading, _, _ = benchmarks
    result = loading.compare(kind="336", rounds=2, seconds=0.05, copies=8)
    assert list(result["median"]) == ["kernel alone", "StreamingLoader"]
    assert list(result["ratios"]) == ["kernel alone"]
    assert min(result["median"].values()) > 0
    assert (tmp_path / "loading.json").exists()
    assert (
        "left out, for want of .venv-peers (make bench-peers): webdataset, Energon" in capsys.readouterr().out
    )


def test_bytes_are_measured_without_peers(benchmarks, tmp_path):
    _, raw, _ = benchmarks
    result = raw.compare(kind="640x480", rounds=1, seconds=0.05, copies=8)
    assert list(result["median"]) == ["StreamingLoader"]
    sizes = [len(picture(number)) for number in range(16)]
    assert min(sizes) < result["bytes_per_sample"]["StreamingLoader"] < max(sizes) + 300  # the record


def test_shuffles_are_measured_without_peers(benchmarks):
    _, _, shuffle = benchmarks
    result = shuffle.compare(samples=65_536)
    full, block = result["orders"]["full"], result["orders"]["block (default)"]
    for name, expected in result["uniform"].items():
        assert full[name] == pytest.approx(expected, rel=0.5, abs=0.03)
    assert block["batch_neighbours"] > 10 * full["batch_neighbours"]
    assert block["open_share"] < full["open_share"]


def test_measures_of_an_order_that_is_none(benchmarks):
    """Manifest order: all there is to find, found."""
    _, _, shuffle = benchmarks
    order = np.arange(32_768).reshape(-1, 64, 8).transpose(0, 2, 1)  # 8 samples of every 64 in turn
    found = shuffle.described(order, samples=32_768, unit=32)
    assert found["correlation"] == pytest.approx(1)
    assert found["displacement_mean"] == 0
    assert found["displacement_ks"] == pytest.approx(1)
    assert found["next_neighbours"] == pytest.approx(3 / 4, abs=0.01)  # a rank has 4 of every 32
    assert found["batch_neighbours"] == pytest.approx(3 / 63, abs=0.001)
    assert found["chi_square_global_batch"] > 50
    assert found["open_share"] == pytest.approx(512 / 32_768, rel=1e-3)


@pytest.fixture
def small(benchmarks, monkeypatch, tmp_path):
    """The same for benchmarks in processes of their own, which keep what they derive in `tmp_path`."""
    from benchmarks import memory, planning, remote, resume

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {"memory": memory, "planning": planning, "remote": remote, "resume": resume}


def test_planning_is_measured(small, monkeypatch, tmp_path):
    planning = small["planning"]
    plans = {"plain": (2, {}), "packed": (1, {"pack_tokens": 512, "plan_window": 4096})}
    monkeypatch.setattr(planning, "PLANS", plans)
    monkeypatch.setattr(planning, "STRETCH", 10_000)
    monkeypatch.setattr(planning, "BATCHES", {"by length": {"group_by": "length"}})
    monkeypatch.setattr(planning, "_in_process", planning.measure)
    planning.compare(rounds=1)
    result = json.loads((tmp_path / "planning.json").read_text())
    assert all(result["plans"][name]["median"]["microseconds"] > 0 for name in plans)
    assert 0 < result["padding"]["by length"] < 1


def test_resuming_is_measured(small, monkeypatch, tmp_path):
    resume = small["resume"]
    monkeypatch.setattr(resume, "PLANS", {"packed": resume.PLANS["packed"]})
    result = resume.compare(rounds=1, shards=4, samples=256)
    times = result["plans"]["packed"]
    assert 0 < times["cold"]["without forking"] < times["cold"]["first batch"]
    assert times["ratio"] > 0
    assert (tmp_path / "resume.json").exists()


def test_every_plan_is_resumed_in_the_middle_of_an_epoch(small, tmp_path):
    resume = small["resume"]
    data = resume.write_data_set(
        tmp_path, [picture(number) for number in range(4)], shards=4, samples=512, side=None
    )
    for plan in resume.PLANS:
        state = resume.middle_of_epoch(plan, data)
        assert state["epoch"] == 0
        assert state["samples"] > 512
        assert resume.measure(plan, data, state)["first batch"] > 0


def test_memory_is_measured(small, monkeypatch, tmp_path):
    memory = small["memory"]
    monkeypatch.setattr(memory, "PLANS", {"plain": {"batch_size": 64}})
    # in this process: others take seconds to start
    monkeypatch.setattr(memory, "in_process", lambda _, *arguments, cache: memory.answer(arguments))
    result = memory.compare(epochs=3, samples=256, shards=(1, 2), shard_samples=256, batches=2)
    for found in (result["epochs"]["plain"], result["data sets"]["plain"]):
        for process in ("main", "worker 0", "worker 1"):
            assert min(found[process]["before"], found[process]["after"]) > 1e6
    assert (tmp_path / "memory.json").exists()


def test_remote_reading_is_measured(small, tmp_path):
    remote = small["remote"]
    try:
        with remote.slow_server(tmp_path, tmp_path):
            pass
    except SystemExit as missing:
        pytest.skip(str(missing))
    remote.compare(rounds=1, samples=384)
    assert (tmp_path / "remote.json").exists()


@pytest.mark.parametrize("module", MODULES)
def test_a_peer_reads_every_picture(module, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.loading import write_data_set
    from benchmarks.peers.process import ENVIRONMENT, Contender

    if not ENVIRONMENT.exists():
        pytest.skip("no .venv-peers; `make bench-peers` makes it")
    data = write_data_set(tmp_path, [picture(number) for number in range(16)], 256)
    with Contender(module, tmp_path / "log") as contender:
        contender.ask(do="write", shards=sorted(data.glob("*.tar")), folder=tmp_path / module)
        contender.ask(do="open", folder=tmp_path / module, picture="kernel", workers=2, options={})
        answer = contender.measure(0.1)
    assert answer["samples"] >= 128
    assert answer["bytes"] == answer["samples"] * 3 * 336 * 336


def test_a_stopped_contender_ends_with_whoever_started_it(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from benchmarks.peers.process import Contender\n"
        f"contender = Contender('shardify', Path({str(tmp_path / 'log')!r}))\n"
        "contender.ask(do='nothing'); print(contender._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=ROOT, capture_output=True, text=True
    )
    group = int(done.stdout)
    deadline = time.monotonic() + 20
    while running(group):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)


def running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return any(
        fields[2] == str(group) and fields[0] != "Z"
        for stat in Path("/proc").glob("[0-9]*/stat")
        if (fields := read(stat).rpartition(")")[2].split())
    )


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
