"""How far is block order from uniform, beside a full shuffle, webdataset's buffer and MosaicML's shuffles?

    python -m benchmarks.shuffle

Orders alone, no data: ours planned by `loaders.order`, the others' by their own code (benchmarks/peers/orders.py, in .venv-peers). One epoch of
1,024,000 samples, 8 ranks, batches of 64 a rank. Neighbours are samples that lie in the same 32 as stored; classes are stored sorted, the worst
case. What a uniform order would give stands beside every measure.
"""

import argparse
import json
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import runner
from benchmarks.loading import versions
from benchmarks.peers.process import ROOT, interpreter
from loaders.order import make_order

IntArray = npt.NDArray[np.int64]
SAMPLES, WORLD, BATCH, WORKERS = 1_024_000, 8, 64, 2
BLOCK = 32
CLASSES = 100
WINDOW = 32  # global batches
OURS: dict[str, dict[str, Any]] = {
    "full": {"shuffle": "full"},
    "block (default)": {"shuffle": "block"},
    "block, window=32": {"shuffle": "block", "window": 32},
    "block, block=8, window=32": {"shuffle": "block", "block": 8, "window": 32},
}
# MosaicML's shards hold 64 MiB by default, here 640 samples; webdataset's by custom some thousands
_MOSAIC = {"shard": 640}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "webdataset, buffer of 1,000": ("webdataset", {"shard": 8_000}),
    "MosaicML py1e (default)": (
        "mosaicml",
        {**_MOSAIC, "algorithm": "py1e", "canonical": 1, "block": 4_000_000},
    ),
    "MosaicML py1e, 2^18": ("mosaicml", {**_MOSAIC, "algorithm": "py1e", "canonical": 1, "block": 1 << 18}),
    "MosaicML py1s": ("mosaicml", {**_MOSAIC, "algorithm": "py1s", "canonical": 64, "block": 1 << 18}),
}
_FETCHED = {"block": BLOCK, "webdataset": BLOCK, "mosaicml": _MOSAIC["shard"], "full": BLOCK}


def planned(settings: dict[str, Any], *, samples: int, world: int, batch: int) -> IntArray:
    """Our order, int64 [steps, world, batch]: position p is rank p % world's, and global batch p // (world x batch)'s."""
    steps = samples // (world * batch)
    order = make_order(samples, seed=0, lanes=max(64, world), **settings)
    return order.samples(0, np.arange(steps * world * batch)).reshape(steps, batch, world).transpose(0, 2, 1)


def simulated(name: str, settings: dict[str, Any], *, samples: int) -> IntArray:
    """Another loader's order, by its own code."""
    python = interpreter(name)
    assert python is not None
    settings = {"samples": samples, "world": WORLD, "workers": WORKERS, "batch": BATCH, **settings}
    with TemporaryDirectory() as folder:
        out = Path(folder, "order.npy")
        command = [python, "-m", "benchmarks.peers.orders", name, str(out), json.dumps(settings)]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return np.load(out)


def described(order: IntArray, *, samples: int, unit: int) -> dict[str, Any]:
    """All measures of an order, int64 [steps, world, batch]; `unit` is how many neighbours its loader fetches together."""
    order = order[(order >= 0).all(axis=(1, 2))]  # whole batches
    steps, world, batch = order.shape
    window = min(WINDOW, steps)
    streams = order.transpose(1, 0, 2).reshape(world, -1)  # of each rank
    stored = order.transpose(0, 2, 1).reshape(-1)  # over all ranks, a sample of each in turn
    moved = np.abs(stored - np.arange(len(stored))) / samples
    measures = {
        "batch_neighbours": _pairs(order.reshape(-1, batch) // BLOCK),
        "global_batch_neighbours": _pairs(order.reshape(steps, -1) // BLOCK),
        "next_neighbours": _apart(streams, 1),
        "correlation": float(np.corrcoef(stored, np.arange(len(stored)))[0, 1]),
        "displacement_mean": float(moved.mean()),
        "displacement_ks": _from_uniform(moved),
        "step_ks": _from_uniform(np.abs(np.diff(streams, axis=1)).reshape(-1) / samples),
        "chi_square_batch": _imbalance(order.reshape(-1, batch), samples),
        "chi_square_global_batch": _imbalance(order.reshape(steps, -1), samples),
        "chi_square_window": _imbalance(
            order[: steps // window * window].reshape(steps // window, -1), samples
        ),
        "open_share": _open(order.reshape(steps, -1) // unit, samples // unit),
    }
    return {
        **{name: float(f"{value:.4g}") for name, value in measures.items()},
        "neighbours_within": _within(streams // BLOCK),
        # for the plot: 512 samples of some 8,700 in a row, at a distance that has nothing to do with ranks or lanes
        "a_quarter_in": stored[len(stored) // 4 :][: 17 * 512 : 17].tolist(),
    }


def uniform(samples: int) -> dict[str, float]:
    """What a uniformly random order gives on average."""
    same = (BLOCK - 1) / (samples - 1)
    return {
        "batch_neighbours": same,
        "global_batch_neighbours": same,
        "next_neighbours": same,
        "correlation": 0.0,
        "displacement_mean": 1 / 3,
        "displacement_ks": 0.0,
        "step_ks": 0.0,
        "chi_square_batch": 1.0,
        "chi_square_global_batch": 1.0,
        "chi_square_window": 1.0,
    }


def _pairs(blocks: IntArray) -> float:
    """The share of all pairs inside the rows that lie in the same block."""
    rows, size = blocks.shape
    ranked = np.sort(blocks, axis=1)
    same = 0
    for apart in range(1, size):
        found = int((ranked[:, apart:] == ranked[:, :-apart]).sum())
        if not found:
            break
        same += found
    return same / (rows * size * (size - 1) / 2)


def _apart(streams: IntArray, distance: int) -> float:
    """The share of samples so far apart on their rank that lie in the same block."""
    blocks = streams // BLOCK
    return float((blocks[:, distance:] == blocks[:, :-distance]).mean())


def _within(blocks: IntArray) -> dict[int, float]:
    """How many of the next d samples on the same rank lie in a sample's block, on average, for several d; int64 [ranks, n]."""
    ranks, length = blocks.shape
    # by rank, block and place: those that lie in one block on one rank stand side by side
    keys = (blocks + np.arange(ranks)[:, None] * (int(blocks.max()) + 1)).reshape(-1)
    order = np.argsort(keys, kind="stable")
    keys, places = keys[order], order % length
    counts = np.zeros(length + 1, np.int64)
    for apart in range(1, BLOCK):
        same = keys[apart:] == keys[:-apart]
        counts += np.bincount((places[apart:] - places[:-apart])[same], minlength=length + 1)
    total = np.cumsum(counts) / blocks.size
    distances = sorted({int(d) for d in np.geomspace(1, min(1 << 16, length - 1), 80)})
    return {d: float(f"{total[d]:.4g}") for d in distances}


def _from_uniform(distances: npt.NDArray[np.float64]) -> float:
    """Kolmogorov-Smirnov distance from the law of |U - V|, P(d <= x) = 1 - (1 - x)**2."""
    ranked = np.sort(distances)
    return float(np.abs(np.arange(1, len(ranked) + 1) / len(ranked) - (1 - (1 - ranked) ** 2)).max())


def _imbalance(rows: IntArray, samples: int) -> float:
    """Chi-square of the classes in each row over its degrees of freedom, on average: 1 when drawn at random."""
    classes = rows * CLASSES // samples
    counts = np.zeros((len(rows), CLASSES), np.int64)
    np.add.at(counts, (np.arange(len(rows))[:, None], classes), 1)
    expected = rows.shape[1] / CLASSES
    # drawn without replacement, large rows vary a little less
    correction = (samples - rows.shape[1]) / (samples - 1)
    return float(
        (((counts - expected) ** 2 / expected).sum(1) / (CLASSES - 1)).mean() / max(correction, 1e-9)
    )


def _open(units: IntArray, count: int) -> float:
    """The share of the data set, on average over the epoch, that is between its unit's first and last use: what a cache would hold."""
    steps = len(units)
    first, last = np.full(count, steps), np.full(count, -1)
    at = np.repeat(np.arange(steps), units.shape[1])
    np.minimum.at(first, units.reshape(-1), at)
    np.maximum.at(last, units.reshape(-1), at)
    used = last >= 0
    return float((last - first + 1)[used].sum() / (steps * used.sum()))


def compare(*, samples: int = SAMPLES) -> dict[str, Any]:
    """Measure all orders, print and save."""
    runner.headline(f"Shuffles of {samples:,} samples over {WORLD} ranks, batches of {BATCH} a rank")
    found: dict[str, Any] = {}
    for name, settings in OURS.items():
        order = planned(settings, samples=samples, world=WORLD, batch=BATCH)
        found[name] = described(
            order, samples=samples, unit=settings.get("block", _FETCHED[settings["shuffle"]])
        )
    # more ranks than this: each has one lane, and its batches more neighbours
    found["block (default), 64 ranks"] = described(
        planned({"shuffle": "block"}, samples=samples, world=64, batch=BATCH), samples=samples, unit=BLOCK
    )
    peers = []
    for name, (module, settings) in PEERS.items():
        if interpreter(module) is None:
            print(f"left out, for want of .venv-peers (make bench-peers): {name}")
            continue
        peers.append(module)
        order = simulated(module, settings, samples=samples)
        found[name] = described(order, samples=samples, unit=_FETCHED[module])
    _print(found, uniform(samples))
    result = {
        "samples": samples,
        "world": WORLD,
        "batch": BATCH,
        "uniform": uniform(samples),
        "orders": found,
    }
    runner.save_part("shuffle", "orders", {**versions(peers), **result})
    return result


def _print(found: dict[str, Any], expected: dict[str, float]) -> None:
    columns = [name for name in expected if name != "displacement_mean"] + ["open_share"]
    width = max(map(len, found))
    print("  " + " " * width + "  " + "  ".join(columns))
    for name, measures in (*found.items(), ("uniform", expected)):
        values = (f"{measures.get(column, float('nan')):>{len(column)}.3g}" for column in columns)
        print(f"  {name:{width}}  " + "  ".join(values))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=SAMPLES)
    compare(samples=parser.parse_args().samples)
