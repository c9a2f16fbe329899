"""torchrun with one to four ranks, killed and resumed under another number of them: in the end each sample was trained on as often as promised."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.nursery import members
from tests.loaders.conftest import Made, png, record, write_data_set

ROOT = Path(__file__).parents[2]
SIZES = {"one": 90, "half": 61, "two": 40}
EPOCHS = 2


@pytest.fixture
def folder(tmp_path):
    """Three parts of samples with 0, 1 or 2 pictures, and one that is no picture."""
    for name, size in SIZES.items():
        samples = [
            Made([png(number + i) for i in range(number % 3)], record(number, number % 3))
            for number in range(size)
        ]
        if name == "one":
            samples[7] = Made([b"no picture"], record(7))
        write_data_set(tmp_path / name, samples, shards=3)
    return tmp_path


def start(folder, world, *, die=-1):
    """Torchrun in a session of its own."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world]
    arguments = [Path(__file__).with_name("elastic.py"), folder, EPOCHS, die]
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, [*command, *arguments])],
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def sessions(launcher):
    """Torchrun gives every rank a session of its own."""
    everyone = {launcher.pid}
    while grown := {pid for leader in everyone for pid in descendants(leader)} - everyone:
        everyone |= grown
    return everyone


def descendants(pid):
    found = []
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        try:
            found += [int(child) for child in path.read_text().split()]
        except OSError:
            continue
    return found


def kill(launcher):
    """SIGKILL to all of a job, the launcher first."""
    everyone = sorted(sessions(launcher), key=lambda pid: pid != launcher.pid)
    for pid in everyone:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    launcher.wait()
    deadline = time.monotonic() + 30
    while any(members(pid) for pid in everyone):
        assert time.monotonic() < deadline, "processes outlive the kill"
        time.sleep(0.1)


def traced(folder):
    """By the step at which a run began, by step: the keys of all its ranks."""
    runs = {}
    for path in folder.glob("trace-*.jsonl"):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # torn by the kill
            runs.setdefault(line["begin"], {}).setdefault(line["step"], []).append(line)
    return runs


def test_a_chain_of_kills_and_resumes_ends_with_the_exact_cover(folder):
    dice = random.Random(1)
    begins = []
    for world in (2, 4, 1, 3):
        checkpoint = folder / "checkpoint.json"
        begin = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
        begins.append(begin)
        process = start(folder, world)
        try:
            if world == 3:
                assert process.wait(200) == 0, (folder / "log").read_text()[-3000:]
                continue
            steps = dice.randint(4, 9)
            deadline = time.monotonic() + 120
            while len(traced(folder).get(begin, ())) < steps:
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            kill(process)
    assert begins == sorted(set(begins))
    trained, worlds = Counter(), set()
    runs = traced(folder)
    for begin, end in zip(begins, [*begins[1:], 1 << 60], strict=True):
        for step, lines in runs[begin].items():
            if begin < step <= end:
                assert len(lines) == lines[0]["world"]
                worlds.add(lines[0]["world"])
                trained.update(key for line in lines for key in line["keys"])
    promised = Counter({f"one/{number:09}": EPOCHS for number in range(90) if number != 7})
    promised.update({f"two/{number:09}": 2 * EPOCHS for number in range(40)})
    half = {key: trained.pop(key) for key in list(trained) if key.startswith("half/")}
    assert trained == promised
    assert len(half) == sum(half.values()) == 61  # 30 in the first epoch and the other 31 in the second
    assert worlds == {1, 2, 3, 4}
    assert json.loads((folder / "checkpoint.json").read_text())["epoch"] == EPOCHS


def test_a_killed_worker_ends_torchrun_with_its_signal_named(folder):
    process = start(folder, 2, die=1)
    try:
        assert process.wait(120) == 1
    finally:
        kill(process)
    log = (folder / "log").read_text()
    # torch's own error where the trainer was not waiting for a batch just then (docs/loading.md)
    assert "LoaderError" in log or "RuntimeError: DataLoader worker" in log
    assert "killed by signal: Killed" in log
