"""How soon does the first batch come: at the start of an epoch, and in its middle?

    python -m benchmarks.resume [--rounds 9] [--shards 400]

Ten million samples: 400 shards of 25,000, which are names of one file (hard links), under a manifest and an index of all of them. A fresh
process opens the data set, takes up a state or none, and waits for its first batch: 64 pictures at 336, or 8 rows of packs, on one rank with
two workers; in mid-epoch at a step whose batches hold as many pictures. What is counted begins with the ``for``; the time in which the workers are forked is told apart. Everything is in the page cache, token
counts have been made before.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import runner
from loaders import ImageTransform, Mixture, StreamingLoader
from loaders.text import TextResult
from shardify.convert import PackOptions, pack_dataset
from shardify.format.files import write_whole
from shardify.format.hashing import hash_file
from shardify.format.index import read_index, write_index
from shardify.format.manifest import Counts, Manifest, Shard, encode_manifest, read_manifest
from shardify.format.names import INDEX, MANIFEST, sidecar_name

SHARDS, SAMPLES = 400, 25_000  # shards, and samples in each
WORKERS = 2
PICTURES = 64  # different ones
SIDE = 64  # pixels of their shorter sides, so that a shard stays small
PAST_MIDDLE = 100  # steps: inside a window, and inside a block
ALIKE_WITHIN = 100  # steps behind it that are looked at
RATIO, MOST = 1.1, 1000.0  # required: resumed over cold, and milliseconds of each without forking

PLANS: dict[str, dict[str, Any]] = {
    "plain": {"batch_size": 64},
    "grouped": {"batch_size": 64, "group_by": "modality_length"},
    "packed": {"batch_size": 8, "pack_tokens": 4096, "image_tokens": 576},
    "mixture": {"batch_size": 64},
}


class CountedWords:
    """Makes a token of each word, by its length: a text transform that costs nothing."""

    pad_token_id = 0
    fingerprint = "benchmarks: one token a word"

    def __call__(self, record: Any) -> TextResult:
        if not isinstance(record, dict):
            record = json.loads(bytes(record))
        words = " ".join(turn["value"] for turn in record["conversations"]).split()
        tokens = [len(word) for word in words]
        return TextResult(tokens, tokens)


def write_data_set(
    folder: Path, pictures: Sequence[bytes], *, shards: int, samples: int = SAMPLES, side: int | None = SIDE
) -> Path:
    """`shards` shards of `samples` samples each, all of them one file; four of five samples have a picture, as it comes if `side` is None."""
    from benchmarks.loading import smaller

    images = folder / "images"
    images.mkdir()
    for number, data in enumerate(pictures[:PICTURES]):
        (images / f"{number}.jpg").write_bytes(data if side is None else smaller(data, side))
    count = min(len(pictures), PICTURES)
    words = np.random.default_rng(0).lognormal(3.5, 0.7, samples).astype(int).clip(4, 400)
    records = []
    for number, length in enumerate(words.tolist()):
        pictured = number % 5 > 0
        question = "<image>\nWhat is it?" if pictured else "What was it?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "so " * length}]
        image = {"image": f"{number % count}.jpg"} if pictured else {}
        records.append({"id": f"{number:07d}", **image, "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    pack_dataset(
        PackOptions(records=[folder / "chat.json"], images=[images], out=folder / "one", shards=1, workers=1)
    )
    _multiply(folder / "one", folder / "data", shards)
    return folder / "data"


def _multiply(one: Path, many: Path, shards: int) -> None:
    """A data set of so many shards that are all the same file as that of `one`."""
    many.mkdir()
    manifest = read_manifest(one / MANIFEST)
    (shard,) = manifest.shards
    rows = np.array(read_index(one / INDEX, samples=shard.samples))
    named, parts = [], []
    for number in range(shards):
        tar = f"{number:05d}.tar"
        os.link(one / shard.tar, many / tar)
        os.link(one / shard.sidecar, many / sidecar_name(tar))
        named.append(
            Shard(
                tar, sidecar_name(tar), shard.samples, shard.bytes, shard.tar_xxh3_128, shard.sidecar_xxh3_128
            )
        )
        rows["shard"] = number
        parts.append(rows.copy())
    with (many / INDEX).open("wb") as file:
        write_index(file, parts)
    counts = Counts(manifest.counts.records_in * shards, manifest.counts.packed * shards, {}, {})
    content = Manifest(
        manifest.format_version, manifest.settings, manifest.sources, named, hash_file(many / INDEX), counts
    )
    write_whole(os.fspath(many / MANIFEST), encode_manifest(content))


def open_loader(plan: str, data: Path, **options: Any) -> StreamingLoader:
    """The loader of a plan over a data set of `write_data_set`."""
    shards: Any = data
    if plan == "mixture":
        tars = sorted(data.glob("*.tar"))
        half = len(tars) // 2
        shards = Mixture({"chat": (tars[:half], 1), "captions": (tars[half:], 0.5)})
    settings = {"image": ImageTransform(336), "text": CountedWords(), "num_workers": WORKERS}
    return StreamingLoader(shards, **{**settings, **PLANS[plan], **options})


def middle_of_epoch(plan: str, data: Path) -> dict[str, Any]:
    """A state in the middle of the first epoch, which no data is read for; the batches after it hold as many pictures as those the epoch begins with."""
    batches = len(open_loader(plan, data))
    half = batches // 2 + min(PAST_MIDDLE, batches // 4)
    begun = _pictures(open_loader(plan, data), WORKERS)
    later = _pictures(open_loader(plan, data, skip=[(0, half)]), min(ALIKE_WITHIN, batches - half))

    def difference(step: int) -> int:
        return sum(
            abs(a - b) for a, b in zip(sorted(begun), sorted(later[step : step + WORKERS]), strict=True)
        )

    alike = min(range(len(later) - WORKERS + 1), key=difference)
    return open_loader(plan, data, skip=[(0, half + alike)]).state_dict()


def _pictures(loader: StreamingLoader, batches: int) -> list[int]:
    """How many each of the next batches holds."""
    planned = loader._planner.batches(loader._state)  # noqa: SLF001 - what would be built, without building it
    return [int(batch.index.images.sum()) for batch in islice(planned, batches)]


def measure(plan: str, data: Path, state: Mapping[str, Any] | None) -> dict[str, float]:
    """Milliseconds in this process: to open, to the first batch, and of that for forking the workers."""
    begin = time.perf_counter()
    loader = open_loader(plan, data)
    if state is not None:
        loader.load_state_dict(dict(state))
    expected = loader.state_dict()["step"] + 1
    opened = time.perf_counter()
    with _forking() as spent:
        batch = next(iter(loader))
        came = time.perf_counter()
    assert batch.state["step"] == expected
    assert not batch.faults
    loader.close()
    return {
        "open": 1000 * (opened - begin),
        "first batch": 1000 * (came - opened),
        "forking": 1000 * sum(spent),
    }


@contextmanager
def _forking() -> Iterator[list[float]]:
    """The seconds for which each process that is started keeps this one."""
    spent: list[float] = []
    start = BaseProcess.start

    def timed(process: BaseProcess) -> None:
        begin = time.perf_counter()
        start(process)
        spent.append(time.perf_counter() - begin)

    BaseProcess.start = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        BaseProcess.start = start  # type: ignore[method-assign]


def in_process(module: str, *arguments: str, cache: Path) -> Any:
    """What ``python -m module`` prints, as JSON; `cache` stands for the user's cache folder."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XDG_CACHE_HOME": os.fspath(cache)},
    )
    return json.loads(done.stdout)


def compare(*, rounds: int, shards: int = SHARDS, samples: int = SAMPLES) -> dict[str, Any]:
    """Measure, print and save."""
    runner.headline(
        f"Resuming: {shards * samples:,} samples, {WORKERS} workers, milliseconds to the first batch"
    )
    _, pictures = runner.photos()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = write_data_set(folder, pictures, shards=shards, samples=samples)
        states = {}
        for plan in PLANS:
            states[plan] = folder / f"{plan}.json"
            state = in_process("benchmarks.resume", "--state", plan, os.fspath(data), cache=folder)
            states[plan].write_text(json.dumps(state))
        found: dict[str, list[dict[str, float]]] = {}

        def first_batch(plan: str, resumed: bool) -> float:
            place = [os.fspath(data), *([os.fspath(states[plan])] if resumed else [])]
            result = in_process("benchmarks.resume", "--measure", plan, *place, cache=folder)
            found.setdefault(f"{plan}, {'resumed' if resumed else 'cold'}", []).append(result)
            return float(result["first batch"])

        contenders = {
            f"{plan}, {'resumed' if resumed else 'cold'}": lambda plan=plan, resumed=resumed: first_batch(
                plan, resumed
            )
            for plan in PLANS
            for resumed in (False, True)
        }
        comparison = runner.interleave(contenders, rounds=rounds, unit="ms")
    result = {
        "samples": shards * samples,
        "workers": WORKERS,
        "plans": {plan: _summary(found, plan) for plan in PLANS},
        "all": found,
    }
    for plan, values in result["plans"].items():
        print(
            f"  {plan:8}  cold {values['cold']['first batch']:,.0f} ms, {values['cold']['without forking']:,.0f} without forking;"
            f"  resumed {values['resumed']['first batch']:,.0f}, {values['resumed']['without forking']:,.0f};"
            f"  {values['ratio']:.2f}, {values['ratio without forking']:.2f} (at most {RATIO}, and {MOST:,.0f} ms)"
        )
    runner.save("resume", comparison, **result)
    return result


def _summary(found: Mapping[str, Sequence[Mapping[str, float]]], plan: str) -> dict[str, Any]:
    """Medians of the milliseconds, cold and resumed, and of the ratios inside the rounds."""
    times: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for kind in ("cold", "resumed"):
        rounds = found[f"{plan}, {kind}"]
        columns = {name: np.array([values[name] for values in rounds]) for name in rounds[0]}
        times[kind] = {**columns, "without forking": columns["first batch"] - columns["forking"]}
    ratios = {
        f"ratio{suffix}": round(float(np.median(times["resumed"][name] / times["cold"][name])), 3)
        for suffix, name in (("", "first batch"), (" without forking", "without forking"))
    }
    medians = {
        kind: {name: round(float(np.median(column)), 1) for name, column in columns.items()}
        for kind, columns in times.items()
    }
    return {**medians, **ratios}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shards", type=int, default=SHARDS, help=f"of 25,000 samples; default {SHARDS}")
    parser.add_argument("--state", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.state:
        plan_, data_ = arguments.state
        print(json.dumps(middle_of_epoch(plan_, Path(data_))))
    elif arguments.measure:
        plan_, data_, *state_ = arguments.measure
        print(
            json.dumps(
                measure(plan_, Path(data_), json.loads(Path(state_[0]).read_text()) if state_ else None)
            )
        )
    else:
        compare(rounds=arguments.rounds, shards=arguments.shards)
