"""Does memory grow, with the epochs or with the data set?

    python -m benchmarks.memory [--epochs 20] [--samples 4096]

Anonymous memory (RssAnon: what a process has of its own, files and slabs not counted) of the training process and of each of its two workers,
every plan in a process of its own. First over epochs of a small data set of whole photographs; then after a hundred batches out of 10**5 and out of
10**7 samples (`benchmarks.resume` has more of them). What a worker shares with its parent since the fork counts as the worker's.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import runner
from benchmarks.resume import PLANS, SAMPLES, WORKERS, in_process, open_loader, write_data_set

FIRST = 2  # epochs, after which all is at work
MOST = 0.03  # growth after that
SHARDS = (4, 400)  # of 25,000 samples
BATCHES = 100
# several windows in an epoch
SMALL = {"grouped": {"plan_window": 512}, "packed": {"plan_window": 512}}


def over_epochs(plan: str, data: Path, epochs: int) -> list[list[int]]:
    """Bytes of this process and its workers after each epoch."""
    loader = open_loader(plan, data, **SMALL.get(plan, {}))
    sizes = []
    for _ in range(epochs):
        samples = sum(int(batch.valid.sum()) for batch in loader)
        assert samples > 0
        sizes.append([anonymous(process) for process in (os.getpid(), *children())])
    assert not loader.report().faults
    loader.close()
    return sizes


def after_batches(plan: str, data: Path, batches: int) -> list[int]:
    """Bytes of this process and its workers."""
    loader = open_loader(plan, data)
    for _ in islice(loader, batches):
        pass
    sizes = [anonymous(process) for process in (os.getpid(), *children())]
    loader.close()
    return sizes


def anonymous(process: int) -> int:
    """RssAnon in bytes."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise KeyError("RssAnon")


def children() -> list[int]:
    """The processes that this one has started, oldest first."""
    tasks = Path("/proc/self/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())


def compare(
    *,
    epochs: int,
    samples: int,
    shards: tuple[int, int] = SHARDS,
    shard_samples: int = SAMPLES,
    batches: int = BATCHES,
) -> dict[str, Any]:
    """Measure, print and save."""
    described, pictures = runner.photos()
    result = {
        "data": described,
        "workers": WORKERS,
        "epochs": _epochs(pictures, epochs, samples),
        "data sets": _data_sets(pictures, shards, shard_samples, batches),
    }
    runner.RESULTS.mkdir(exist_ok=True)
    content = {"machine": runner.machine(), **result}
    (runner.RESULTS / "memory.json").write_text(json.dumps(content, indent=1) + "\n")
    return result


def _epochs(pictures: list[bytes], epochs: int, samples: int) -> dict[str, Any]:
    runner.headline(f"Memory: RssAnon after {FIRST} and {epochs} epochs of {samples:,} samples, MB")
    found = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_data_set(folder, pictures, shards=8, samples=samples // 8, side=None)
        for plan in PLANS:
            sizes = in_process(
                "benchmarks.memory", "--epoch", plan, os.fspath(data), str(epochs), cache=folder
            )
            found[plan] = _named(
                {"before": sizes[FIRST - 1], "after": sizes[-1]}, growth=lambda b, a: round(a / b - 1, 4)
            ) | {"every epoch": sizes}
            _show(plan, found[plan], f"(at most {MOST:.0%})")
    return found


def _data_sets(pictures: list[bytes], shards: tuple[int, int], samples: int, batches: int) -> dict[str, Any]:
    sizes = tuple(count * samples for count in shards)
    runner.headline(
        f"Memory: RssAnon after {batches} batches out of {sizes[0]:,} and {sizes[1]:,} samples, MB"
    )
    with TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(size) for size in sizes]
        data = []
        for folder, count in zip(folders, shards, strict=True):
            folder.mkdir()
            data.append(write_data_set(folder, pictures, shards=count, samples=samples))
        found = {}
        for plan in PLANS:
            small, large = (
                in_process(
                    "benchmarks.memory", "--batches", plan, os.fspath(place), str(batches), cache=place.parent
                )
                for place in data
            )
            found[plan] = _named({"before": small, "after": large}, growth=lambda b, a: round(a / b - 1, 4))
            _show(plan, found[plan])
    return found


def _named(sizes: Mapping[str, list[int]], growth: Any) -> dict[str, Any]:
    names = ("main", *(f"worker {number}" for number in range(WORKERS)))
    return {
        name: {"before": before, "after": after, "growth": growth(before, after)}
        for name, before, after in zip(names, sizes["before"], sizes["after"], strict=True)
    }


def _show(plan: str, found: Mapping[str, Any], limit: str = "") -> None:
    shown = ",  ".join(
        f"{name} {values['before'] / 1e6:.1f} to {values['after'] / 1e6:.1f} ({values['growth']:+.1%})"
        for name, values in found.items()
        if name != "every epoch"
    )
    print(f"  {plan:8}  {shown} {limit}", flush=True)


def answer(arguments: Sequence[str]) -> list[Any]:
    """What one process is asked to measure: what, of which plan, over which data, and how much of it."""
    what, plan, data, count = arguments
    measure = over_epochs if what == "--epoch" else after_batches
    return measure(plan, Path(data), int(count))


if __name__ == "__main__":
    if sys.argv[1:2] in (["--epoch"], ["--batches"]):
        print(json.dumps(answer(sys.argv[1:])))
        sys.exit()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=4096, help="of the small data set; default 4,096")
    options = parser.parse_args()
    compare(epochs=options.epochs, samples=options.samples)
