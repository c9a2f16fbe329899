"""A pack whose process group is killed at any moment ends, run again, in the very bytes of a run that nobody disturbed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

SHARDS = 24
RECORDS = 720
THOROUGH = bool(os.environ.get("SHARDIFY_THOROUGH"))
CASES = [share / 100 for share in range(5, 100, 10 if THOROUGH else 20)]
MIXED_CASES = 6 if THOROUGH else 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """240 MB of samples made of a few photo-sized JPEGs, two records of which must be set aside."""
    folder = tmp_path_factory.mktemp("kill")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(12):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (600, 700, 3), dtype=np.uint8)).save(
            buffer, "JPEG", quality=75
        )
        (folder / "images" / f"{number}.jpg").write_bytes(buffer.getvalue())
    (folder / "images" / "cut.jpg").write_bytes(buffer.getvalue()[:-1000])
    names = [f"{number % 12}.jpg" for number in range(RECORDS)]
    names[17], names[500] = "cut.jpg", "none.jpg"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    records = [{"id": number, "image": name, "conversations": turns} for number, name in enumerate(names)]
    (folder / "chat.json").write_text(json.dumps(records))
    yield folder
    shutil.rmtree(folder)


def start(source, out, workers=2):
    command = [
        sys.executable,
        "-m",
        "shardify.cli",
        "pack",
        source / "chat.json",
        "--images",
        source / "images",
    ]
    command += ["--out", out, "--shards", SHARDS, "--workers", workers]
    return subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_plan(process, out):
    """Start-up and survey are over: shards are being written from now on."""
    while not (out / ".packing" / "plan.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    return time.monotonic()


def content(out):
    """Every path below `out` with a hash of what it holds."""
    return {
        str(path.relative_to(out)): xxhash.xxh3_128_hexdigest(path.read_bytes())
        if path.is_file()
        else "folder"
        for path in sorted(out.rglob("*"))
    }


def finished_files(out):
    """Tar and sidecar of each finished shard, with what changes when they are written again."""
    files = [file for sidecar in out.glob("*.parquet") for file in (sidecar, sidecar.with_suffix(".tar"))]
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def kill_group(process):
    with suppress(ProcessLookupError):  # it was faster than the run that was measured
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while any(_group_and_state(entry) == (process.pid, True) for entry in Path("/proc").glob("[0-9]*")):
        time.sleep(0.001)


def _group_and_state(entry):
    """The process group, and whether the process still runs."""
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0, False
    return int(fields[2]), fields[0] not in "ZX"


def test_killed_at_any_moment_and_run_again(source, tmp_path):
    whole = tmp_path / "whole"
    process = start(source, whole)
    began = wait_for_plan(process, whole)
    assert process.wait() == 0
    duration = time.monotonic() - began
    expected = content(whole)
    assert len(expected) == 2 * SHARDS + 3
    assert len((whole / "quarantine.jsonl").read_bytes().splitlines()) == 2
    shutil.rmtree(whole)

    workers = cycle((1, 2, 4))

    def case(name, moment):
        """Kill at a moment, run again, compare; returns how many shards were finished by the kill."""
        out = tmp_path / name
        process = start(source, out)
        began = wait_for_plan(process, out)
        while not moment(time.monotonic() - began, out) and process.poll() is None:
            time.sleep(0.001)
        kill_group(process)
        before = finished_files(out)
        # continued by one worker, two or four: the bytes do not depend on it either
        assert start(source, out, workers=next(workers)).wait() == 0
        assert content(out) == expected
        assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in before} == before
        shutil.rmtree(out)
        return len(before) // 2

    finished = [case(f"at{share}", lambda elapsed, _, s=share: elapsed >= s * duration) for share in CASES]
    # a machine whose pace changes may kill too early or too late to tell: then kill by what is seen, not by the clock
    for number in range(MIXED_CASES):
        if sum(0 < count < SHARDS for count in finished) >= MIXED_CASES:
            break
        aim = 2 + 18 * number // MIXED_CASES
        finished.append(case(f"seen{number}", lambda _, out, n=aim: len(list(out.glob("*.parquet"))) >= n))
    assert sum(0 < count < SHARDS for count in finished) >= MIXED_CASES, finished
    print("shards finished when killed:", finished)
