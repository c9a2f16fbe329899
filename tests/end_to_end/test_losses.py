"""However a step is computed, it is the same step: its loss is the same."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from launch import ENVIRONMENT, TIMEOUT, command, kill, pack_records, record, shardify, trace_lines, trained

RUNS = Path(__file__).with_name("runs.py")
STEPS = 20


def losses(folder):
    """The loss of each step; of one that was done again, the last. The ranks agree."""
    ranks = {
        rank: {line["step"]: line["loss"] for line in lines} for rank, lines in trace_lines(folder).items()
    }
    first = ranks[0]
    for losses_of_rank in ranks.values():
        told = {step: first[step] for step in losses_of_rank}
        assert losses_of_rank == pytest.approx(told, abs=1e-4)
    assert sorted(first) == list(range(1, STEPS + 1))
    return [first[step] for step in sorted(first)]


def groups(folder):
    """The samples of each step, of all ranks."""
    by_step = {}
    for lines in trace_lines(folder).values():
        for line in lines:
            by_step.setdefault(line["step"], []).extend(line["keys"])
    return {step: sorted(keys) for step, keys in by_step.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight records, short and long; every third is text alone."""
    records = [
        record(number, "What is this?", "More of the same. " * (1 + number % 4), image=number % 3 > 0)
        for number in range(8)
    ]
    return pack_records(tmp_path_factory.mktemp("losses"), records)


@pytest.fixture(scope="module")
def options(data):
    return ["--shards", data, "--num-workers", 0, "--lr", 1e-3]


@pytest.fixture(scope="module")
def traces(options, tmp_path_factory):
    """Runs of one process, and of two, by name; all of 20 steps."""
    folder = tmp_path_factory.mktemp("traces")
    stepped = [*options, "--steps", STEPS]
    whole = [*options, "--steps", STEPS, "--group-by", "none"]  # every step has all samples
    rows = ["--pack-tokens", 500, "--batch-size"]
    alone = {
        "alone": [*stepped, "--batch-size", 4],
        "alone-accumulated": [*stepped, "--batch-size", 1, "--accumulate", 4, "--gradient-checkpointing"],
        "padded": [*whole, "--batch-size", 8],
        "packed": [*whole, *rows, 8],
        "packed-accumulated": [*whole, *rows, 4, "--accumulate", 2],
    }
    two = {
        "two": [*stepped, "--batch-size", 2],
        "two-accumulated": [*stepped, "--batch-size", 1, "--accumulate", 2],
        "two-packed": [*whole, *rows, 4],
        "two-sharded": [*stepped, "--batch-size", 1, "--accumulate", 2, "--fsdp"],
    }
    for named, processes in ((alone, None), (two, 2)):
        runs = [[*map(str, run), "--trace", str(folder / name)] for name, run in named.items()]
        trained(json.dumps(runs), script=RUNS, processes=processes)
    return folder


@pytest.mark.parametrize("name", ["alone-accumulated", "two", "two-accumulated", "two-sharded"])
def test_processes_passes_and_shares_change_no_loss(traces, name):
    assert groups(traces / name) == groups(traces / "alone")
    assert losses(traces / name) == pytest.approx(losses(traces / "alone"), abs=1e-4)
    assert losses(traces / name)[-1] < losses(traces / name)[0] - 1


@pytest.mark.parametrize("name", ["packed", "packed-accumulated", "two-packed"])
def test_packing_changes_no_loss(traces, name):
    assert groups(traces / name) == groups(traces / "padded")
    assert losses(traces / name) == pytest.approx(losses(traces / "padded"), abs=1e-4)


def newest_step(folder):
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)


def test_runs_of_two_sharded_or_not_killed_and_continued_alone_have_the_same_losses(
    options, traces, tmp_path
):
    folder, trace = tmp_path / "checkpoints", tmp_path / "trace"
    run = [*options, "--steps", STEPS, "--checkpoint-dir", folder, "--trace", trace]
    for shared in (["--fsdp"], []):
        begin = newest_step(folder)
        process = subprocess.Popen(
            command(*run, "--batch-size", 2, "--save-every", 3, *shared, processes=2),
            env=ENVIRONMENT,
            start_new_session=True,
        )
        deadline = time.monotonic() + TIMEOUT
        try:
            while newest_step(folder) == begin:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            kill(process)
    assert newest_step(folder) < STEPS
    (folder / "unfinished").mkdir(exist_ok=True)  # as if it had been killed while it wrote
    (folder / "unfinished/__7_0.distcp").touch()
    out = trained(*run, "--batch-size", 4, "--save-every", 100)
    assert "continuing after step" in out
    assert not (max(folder.iterdir()) / "__7_0.distcp").exists()
    assert {line["world_size"] for lines in trace_lines(trace).values() for line in lines} == {1, 2}
    assert len({line["resumed"] for lines in trace_lines(trace).values() for line in lines}) == 3
    assert losses(trace) == pytest.approx(losses(traces / "alone"), abs=1e-4)


def test_the_tiny_model_learns_64_samples_by_heart(tmp_path):
    shardify("demo", tmp_path / "demo", "--samples", 64)
    images = tmp_path / "demo/images.zip"
    shardify("pack", tmp_path / "demo/chat.json", "--images", images, "--out", tmp_path / "data")
    run = ["--shards", tmp_path / "data", "--pack-tokens", 300, "--batch-size", 1, "--lr", 2e-3]
    trained(*run, "--group-by", "none", "--num-workers", 1, "--trace", tmp_path, "--epochs", 30)
    (lines,) = trace_lines(tmp_path).values()
    last = [line["loss"] for line in lines if line["epoch"] == 29]
    assert len({key for line in lines for key in line["keys"]}) == 64
    assert sum(last) / len(last) < 0.1


def test_what_is_held_out_is_evaluated_logged_and_the_model_exported(data, tmp_path):
    (tmp_path / "wandb.py").write_text(
        "import json\n"
        "class Run:\n"
        "    def log(self, scalars, step):\n"
        f"        print(json.dumps(scalars | {{'step': step}}), file=open({str(tmp_path / 'log')!r}, 'a'))\n"
        "def init(config):\n"
        "    return Run()\n"
    )
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("7\n")
    script = tmp_path / "with_wandb.py"
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(tmp_path)!r})\nsys.argv[0] = {str(RUNS)!r}\n"
    )
    with script.open("a") as file:
        file.write("runpy.run_path(sys.argv[0], run_name='__main__')\n")
    common = [
        "--shards",
        str(data),
        "--batch-size",
        "1",
        "--fsdp",
        "--validation",
        "0.3",
        "--num-workers",
        "0",
    ]
    common += ["--group-by", "none", "--exclude", str(exclude), "--max-errors", "0.9"]
    kept = ["--trace", str(tmp_path / "trace"), "--export", str(tmp_path / "model"), "--log", "wandb"]
    out = trained(json.dumps([[*common, *kept, "--skip", "1:2"]]), script=script, processes=2)
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    steps = [line for line in log if "train/loss" in line]
    assert steps[0]["step"] == 2  # the second is left out, and counts
    assert steps[-1]["train/gradient_norm"] > 0
    assert "loader/samples_per_second" in steps[-1]
    assert "device/wait" in steps[-1]
    (validation,) = [line["validation/loss"] for line in log if "validation/loss" in line]
    assert f"loss {validation:.4f} over what is held out" in out
    assert transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "model"
    ).dtype.is_floating_point
