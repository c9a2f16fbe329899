"""What does planning cost, at 10**9 samples and 1,024 ranks? And what share of a batch's tokens does it save from being padding?

    python -m benchmarks.planning [--rounds 5]

One rank of 1,024 plans a stretch from the middle of an epoch of a billion samples: the positions of its batches, the samples that stand
there in block order, and their shards. Lengths and image counts come from a hash of the sample's number, as an index of that size would be
24 GB on disk. Plain batches are charged by the samples of the rank, windowed plans by those of the window: every rank plans all of it.
Seconds are processor time, each contender in a process of its own; memory is what a process has resident at most, beyond what it had with
everything imported and the shard table made.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import runner
from loaders.batching import FILLER, Cursor, EpochView, IntArray, make_batching
from loaders.order import default_lanes, make_order
from shardify.permute import keys_of

SAMPLES, RANKS, SHARD = 10**9, 1024, 10_000
STRETCH = 2_000_000  # samples to plan, at least

# a rank's rows, and the settings
PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (64, {}),
    "grouped": (16, {"group_by": "modality_length", "plan_window": 1 << 18}),
    "packed": (8, {"pack_tokens": 4096, "plan_window": 1 << 18}),
    "grouped and packed": (
        8,
        {"group_by": "modality_length", "pack_tokens": 4096, "plan_window": 1 << 18},
    ),
    "budget": (64, {"max_tokens": 32_768, "plan_window": 1 << 18}),
}
AT_MOST = {"plain": 0.5}  # microseconds a sample
AT_MOST_WINDOWED = 2.0


# the same for the share of padding, with 16 rows on each of 8 ranks
BATCHES: dict[str, dict[str, Any]] = {
    "as the positions come": {"group_by": "modality"},
    "by length": {"group_by": "length"},
    "by modality and length": {"group_by": "modality_length"},
    "budget of 8,192": {"max_tokens": 8192},
    "packed to 4,096": {"pack_tokens": 4096},
    "packed to 4,096 by modality": {"pack_tokens": 4096, "group_by": "modality"},
}


def compare(*, rounds: int) -> None:
    runner.headline(f"Planning {SAMPLES:,} samples on one of {RANKS:,} ranks, microseconds a sample")
    results: list[dict[str, dict[str, float]]] = []
    for number in range(rounds):
        names = list(PLANS) if number % 2 == 0 else list(reversed(PLANS))
        results.append({name: _in_process(name) for name in names})
        print(
            f"  round {number + 1}/{rounds}: "
            + "   ".join(f"{name} {results[-1][name]['microseconds']:.2f}" for name in PLANS),
            flush=True,
        )
    found = {
        name: {key: float(np.median([r[name][key] for r in results])) for key in results[0][name]}
        for name in PLANS
    }
    for name, values in found.items():
        print(
            f"  {name:20} {values['microseconds']:.2f} us (order and shards {values['order_microseconds']:.2f}),"
            f" {values['megabytes']:.0f} MB, at most {AT_MOST.get(name, AT_MOST_WINDOWED)} us and 64 MB beyond a window"
        )
    shares = {name: padding(**settings) for name, settings in BATCHES.items()}
    for name, share in shares.items():
        print(f"  {name:28} {share:.1%} of the tokens of a batch are padding or fillers")
    runner.RESULTS.mkdir(exist_ok=True)
    content = {
        "machine": runner.machine(),
        "samples": SAMPLES,
        "ranks": RANKS,
        "plans": {
            name: {"rows_of_a_rank": rows, **settings, "median": found[name]}
            for name, (rows, settings) in PLANS.items()
        },
        "rounds": results,
        "padding": {name: round(share, 4) for name, share in shares.items()},
    }
    (runner.RESULTS / "planning.json").write_text(json.dumps(content, indent=1) + "\n")


def _in_process(name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.planning", "--measure", name]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    result: dict[str, float] = json.loads(output.stdout)
    return result


def measure(name: str) -> dict[str, float]:
    """Plan a stretch: microseconds of processor time a sample, those of order and shards alone, and megabytes."""
    rows, settings = PLANS[name]
    order = make_order(SAMPLES, shuffle="block", seed=1, lanes=default_lanes(RANKS))
    starts = np.arange(0, SAMPLES + 1, SHARD)  # the shard table
    looking_up = 0.0

    def look_up(positions: IntArray) -> tuple[IntArray, IntArray]:
        nonlocal looking_up
        begin = time.process_time()
        samples = order.samples(3, positions)
        shards = np.searchsorted(starts, samples, side="right") - 1
        looking_up += time.process_time() - begin
        return samples, shards

    def lengths_and_images(positions: IntArray) -> tuple[IntArray, IntArray]:
        samples, _ = look_up(positions)
        return _lengths_and_images(samples)

    batching = make_batching(global_batch_size=rows * RANKS, rank=777, world_size=RANKS, **settings)
    window = settings.get("plan_window", 1)
    middle = SAMPLES // 2 // (1 << 18)
    cursor = Cursor(middle * (1 << 18), window=middle)
    epoch = EpochView(SAMPLES, lengths_and_images, key=7)
    before = _resident("VmRSS")
    begin = time.process_time()
    planned, waiting = 0, []
    for batch in batching.batches(epoch, cursor):
        if settings:
            planned = (batch.after.window - middle) * window
        else:
            planned += len(batch.positions)
            waiting.append(batch.positions[batch.positions != FILLER])
            if len(waiting) == 256:  # looked up together, as the loader does
                look_up(np.concatenate(waiting))
                waiting.clear()
        if planned >= STRETCH and not waiting:
            break
    seconds = time.process_time() - begin
    return {
        "microseconds": seconds / planned * 1e6,
        "order_microseconds": looking_up / planned * 1e6,
        "megabytes": (_resident("VmHWM") - before) / 1e6,
    }


def padding(**settings: Any) -> float:
    """The share of padding and fillers in the batches of an epoch of 100,000 samples."""
    lengths, images = _lengths_and_images(np.arange(100_000))
    epoch = EpochView(len(lengths), lambda positions: (lengths[positions], images[positions]), key=7)
    padded = 0
    for rank in range(8):
        batching = make_batching(global_batch_size=128, rank=rank, world_size=8, **settings)
        for batch in batching.batches(epoch, Cursor(0)):
            own = np.where(batch.positions == FILLER, 1, lengths[batch.positions])
            rows = np.bincount(batch.rows, own)
            padded += len(rows) * int(rows.max())
    return 1 - int(lengths.sum()) / padded


def _lengths_and_images(samples: IntArray) -> tuple[IntArray, IntArray]:
    """Lengths of a log-normal shape, 100 to 200 words for most; four of five samples have an image."""
    bits = keys_of(5, samples)
    uniform = (bits >> np.uint64(11)).astype(np.float64) / 2.0**53
    lengths = (130 * (uniform / (1 - uniform)) ** 0.55).astype(np.int64)
    return np.minimum(lengths, 4096), (bits % np.uint64(5) > 0).astype(np.int64)


def _resident(name: str) -> int:
    """Bytes resident now (VmRSS) or at most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", choices=PLANS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
    else:
        compare(rounds=arguments.rounds)
