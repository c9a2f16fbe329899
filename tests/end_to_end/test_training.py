"""train.py as people run it: real processes, real shards, real kills."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from launch import (
    ENVIRONMENT,
    TIMEOUT,
    TRAIN,
    command,
    kill,
    pack_records,
    record,
    run,
    run_warm,
    shardify,
    trace_lines,
    trained,
)

from tests.faults.nursery import members


def packed_keys(shards):
    return sorted(
        key for sidecar in shards.glob("*.parquet") for key in pq.read_table(sidecar)["key"].to_pylist()
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The packed demo data set: 254 of 256 records, two had to be set aside."""
    folder = tmp_path_factory.mktemp("demo")
    shardify("demo", folder / "demo", "--samples", 256)
    shardify(
        "pack",
        folder / "demo/chat.json",
        "--images",
        folder / "demo/images.zip",
        "--out",
        folder / "data",
        "--shards",
        5,
    )
    assert len((folder / "data/quarantine.jsonl").read_text().splitlines()) == 2
    assert len(packed_keys(folder / "data")) == 254
    return folder / "data"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Four records; those at odd positions are text alone."""
    records = [
        record(0, "What is this?", "Noise.", image=True),
        record(1, "What is two and two?", "Four, and it has always been four.", image=False),
        record(2, "And this?", "More of the same noise, in colours.", image=True),
        record(3, "Say something.", "Something.", image=False),
    ]
    return pack_records(tmp_path_factory.mktemp("mixed"), records)


def test_two_ranks_train_on_every_sample_once_and_learn(demo, tmp_path):
    options = ["--batch-size", 8, "--group-by", "none", "--trace", tmp_path]
    out = trained("--shards", demo, *options, processes=2, cold=True)
    lines = trace_lines(tmp_path)
    assert sorted(lines) == [0, 1]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == list(range(1, 17))
    both = lines[0] + lines[1]
    assert sorted(key for line in both for key in line["keys"]) == packed_keys(demo)
    assert sorted(position for line in both for position in line["positions"]) == list(range(254))
    assert all(line["supervised"] > 0 for line in both)
    first, last = map(float, re.search(r"loss: (\S+) in the first tenth .*, (\S+) in the last", out).groups())
    assert last < first


def test_a_killed_run_continues_with_any_number_of_processes(demo, tmp_path):
    checkpoints, trace = tmp_path / "checkpoints", tmp_path / "trace"
    options = ["--shards", demo, "--batch-size", 4, "--group-by", "none", "--save-every", 4]
    process = subprocess.Popen(
        command(*options, "--checkpoint-dir", checkpoints, "--trace", trace, processes=2),
        env=ENVIRONMENT,
        start_new_session=True,
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        while not (checkpoints / "step-000000012").exists() or len(trace_lines(trace)[0]) < 14:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        everyone = kill(process)
    while any(
        Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in everyone
    ):
        assert time.monotonic() < deadline, "processes outlive the kill"
        time.sleep(0.01)

    saved = json.loads((max(checkpoints.glob("step-*")) / "state.json").read_text())
    assert saved["loader"]["epoch"] == 0
    assert 0 < saved["loader"]["position"] == 8 * saved["step"] < 254
    for processes in (1, 3):
        here = tmp_path / str(processes)
        shutil.copytree(checkpoints, here / "checkpoints")
        shutil.copytree(trace, here / "trace")
        again = [*options, "--checkpoint-dir", here / "checkpoints", "--trace", here / "trace"]
        out = trained(*again, processes=processes)
        assert f"continuing after step {saved['step']}, {saved['loader']['position']} samples" in out
        lines = [line for lines in trace_lines(here / "trace").values() for line in lines]
        assert any(line["resumed"] == 0 and line["step"] > saved["step"] for line in lines), (
            "no step was lost"
        )
        counted = [
            line for line in lines if line["resumed"] == saved["step"] or line["step"] <= saved["step"]
        ]
        assert sorted(key for line in counted for key in line["keys"]) == packed_keys(demo)
        assert {line["world_size"] for line in counted} == {2, processes}
        assert [file.name for file in (here / "checkpoints").glob("unfinished")] == []
        if processes == 1:
            out = trained(*again, "--export", here / "model", processes=2)
            assert "nothing left to train" in out
            assert f"exported to {here / 'model'}" in out
            assert (here / "model/model.safetensors").exists()


@pytest.mark.parametrize(
    ("number", "status", "told"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, -15, "")]
)
def test_signals_end_a_run_at_once_and_it_continues(mixed, tmp_path, number, status, told):
    options = [
        "--shards",
        mixed,
        "--batch-size",
        2,
        "--num-workers",
        2,
        "--save-every",
        2,
        "--checkpoint-dir",
        tmp_path,
    ]
    process = subprocess.Popen(
        command(*options, "--steps", 1_000_000),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        while not list(tmp_path.glob("step-*")):
            assert process.poll() is None, "it ended before it could be told"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal and a scheduler do: to the workers, too
        _, errors = process.communicate(timeout=60)
    finally:
        kill(process)
    assert process.returncode == status
    assert told in errors
    assert "Traceback" not in errors
    while members(process.pid):
        assert time.monotonic() < deadline, "workers outlive the run"
        time.sleep(0.01)
    step = max(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))
    assert f"nothing left to train: {step} steps" in trained(*options, "--steps", step)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_text_alone_on_one_of_two_ranks_changes_nothing(mixed, tmp_path, stage):
    script = Path(__file__).with_name("one_step.py")
    trained(mixed, stage, 4, tmp_path / "alone", script=script)
    trained(mixed, stage, 2, tmp_path / "two", script=script, processes=2)
    alone, first, second = (torch.load(tmp_path / name) for name in ("alone.rank0", "two.rank0", "two.rank1"))
    assert (first["images"], second["images"]) == (2, 0)
    assert first["tokens"] + second["tokens"] == alone["tokens"]
    assert (second["tokens"] == 0) == (stage == "pretrain")
    for rank in (first, second):
        assert rank["loss"].item() == pytest.approx(alone["loss"].item(), abs=1e-5)
        torch.testing.assert_close(rank["gradients"], alone["gradients"], rtol=1e-5, atol=1e-5)


def test_pretraining_runs_on_where_a_rank_has_nothing_to_train_on(mixed):
    out = trained("--shards", mixed, "--stage", "pretrain", "--batch-size", 1, "--epochs", 3, processes=2)
    assert "done: 6 steps, 12 samples" in out
    assert "left out: 6 samples: plain-needs-image-token" in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "--shards"),
        (["--shards", "data", "--epochs", "1", "--steps", "1"], 2, "not allowed with"),
        (["--shards", "data", "--batch-size", "0"], 2, "0 is not a positive whole number"),
        (["--shards", "nowhere/{000..003}.tar"], 1, "nowhere/"),
        (["--shards", "DEMO", "--model", "nowhere/at/all"], 2, "--model nowhere/at/all"),
        (
            ["--shards", "DEMO", "--accumulate", "3"],
            2,
            "cannot share a global batch of 32; give --batch-size",
        ),
        (["--shards", "DEMO", "--template", "nonesuch"], 2, "no template 'nonesuch'"),
        (["--shards", "DEMO", "--log", "tensorboard"], 2, "pip install tensorboard"),
    ],
)
def test_wrong_use_is_told_without_a_traceback(demo, arguments, status, message):
    result = run_warm(*[str(demo) if argument == "DEMO" else argument for argument in arguments])
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_no_rank_hangs_when_there_are_no_shards(tmp_path):
    result = run("--shards", tmp_path / "nowhere", processes=2)
    assert result.returncode == 1
    assert "train.py: rank " in result.stderr
    assert str(tmp_path / "nowhere") in result.stderr


PER_RANK = """
import os, runpy, sys
sys.argv = [part.replace("RANK", os.environ["RANK"]) for part in sys.argv[1:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_per_rank(tmp_path, *arguments):
    """Two ranks, in whose arguments RANK stands for the rank: machines that do not share a disk."""
    script = tmp_path / "per_rank.py"
    script.write_text(PER_RANK)
    return run_warm(TRAIN, *arguments, processes=2, script=script)


def test_ranks_that_see_other_checkpoints_stop_at_once(mixed, tmp_path):
    options = ["--shards", mixed, "--steps", 3, "--batch-size", 2, "--checkpoint-dir", tmp_path / "RANK"]
    result = run_per_rank(tmp_path, *options)
    assert result.returncode == 1
    assert f"rank 1 does not see what rank 0 writes to {tmp_path}" in result.stderr
    assert list(tmp_path.glob("?/*")) == []
    trained("--shards", mixed, "--steps", 1, "--batch-size", 2, "--checkpoint-dir", tmp_path / "0")
    result = run_per_rank(tmp_path, *options)
    assert result.returncode == 1
    assert "do not see the same shards and checkpoints: rank 0 is at step 1" in result.stderr


def test_ranks_that_see_other_shards_stop_at_once(demo, tmp_path):
    tars = sorted(demo.glob("*.tar"))
    for rank, count in enumerate((len(tars), len(tars) - 1)):
        (tmp_path / str(rank)).mkdir()
        for tar in tars[:count]:
            shutil.copy(tar, tmp_path / str(rank))
    result = run_per_rank(tmp_path, "--shards", tmp_path / "RANK", "--steps", 3, "--batch-size", 2)
    assert result.returncode == 1
    assert "do not see the same shards" in result.stderr
    assert f"in {len(tars)} shards" in result.stderr


def test_training_on_nothing_is_no_success(mixed):
    result = run_warm("--shards", mixed, "--max-length", 3)
    assert result.returncode == 2
    assert "no token of any sample was trained on" in result.stderr
