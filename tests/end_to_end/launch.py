"""Starting train.py as people do, and ending it as machines do."""

import json
import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "train.py"
TIMEOUT = 480  # s; a busy machine is not a failure
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*arguments, processes=None, script=TRAIN):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes else []
    )
    return [str(part) for part in (sys.executable, *launcher, script, *arguments)]


def descendants(process):
    """Process ids of all children, their children, and so on: torchrun gives each of its children a session of its own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue  # it ended meanwhile
    found = {process}
    while grown := {child for child, parent in parents.items() if parent in found} - found:
        found |= grown
    return found


def kill(process):
    """SIGKILL to a process and all it started; the launcher first, so that it cannot clean up."""
    everyone = descendants(process.pid)
    for pid in sorted(everyone, key=lambda pid: pid != process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    return everyone


@cache
def _warm():
    """A process that has imported everything; it ends with this one, which closes its input."""
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("warm.py")],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_warm(*arguments, processes=None, script=TRAIN):
    """As `run`, without the time that imports take, and without torchrun; as there, several processes end with status 1 when one fails."""
    with TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("out", "errors")]
        for output in outputs:
            Path(output).touch()
        request = {
            "script": str(script),
            "arguments": list(map(str, arguments)),
            "processes": processes,
            "outputs": outputs,
        }
        warm = _warm()
        warm.stdin.write(json.dumps(request) + "\n")
        warm.stdin.flush()
        answer = warm.stdout.readline()
        assert answer, "warm.py has ended"
        status = json.loads(answer)["status"]
        out, errors = (Path(output).read_text() for output in outputs)
    return subprocess.CompletedProcess(
        request["arguments"], bool(status) if processes else status, out, errors
    )


def run(*arguments, **options):
    """Run to the end; returns what it printed. Nothing it started outlives a failure."""
    process = subprocess.Popen(
        command(*arguments, **options),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=TIMEOUT)
    except BaseException:
        kill(process)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def trained(*arguments, cold=False, **options):
    """What a run that ends well printed; `cold` starts it as people do."""
    result = (run if cold else run_warm)(*arguments, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "nan" not in result.stdout
    return result.stdout


def shardify(*arguments):
    subprocess.run(
        [sys.executable, "-m", "shardify.cli", *map(str, arguments)],
        env=ENVIRONMENT,
        check=True,
        timeout=TIMEOUT,
    )


def trace_lines(folder):
    """By rank."""
    return {
        int(file.stem.removeprefix("rank")): [json.loads(line) for line in file.read_text().splitlines()]
        for file in folder.glob("rank*.jsonl")
    }


def pack_records(folder, records):
    """Pack records; those with an image get one of random pixels."""
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for record in records:
        if "image" in record:
            pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / record["image"])
    (folder / "chat.json").write_text(json.dumps(records))
    shardify(
        "pack",
        folder / "chat.json",
        "--images",
        images,
        "--out",
        folder / "data",
        "--no-shuffle",
        "--shards",
        1,
    )
    return folder / "data"


def record(number, question, answer, *, image):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if not image:
        return {"id": str(number), "conversations": turns}
    turns[0]["value"] = f"<image>\n{question}"
    return {"id": str(number), "image": f"{number}.png", "conversations": turns}
