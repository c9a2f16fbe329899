"""What every benchmark shares: interleaved rounds, medians, ratios, and a description of the machine."""

import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "pillow", "pyarrow", "simplejpeg", "torch", "webdataset", "xxhash")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rates of all contenders, round by round: rounds[i][name], in `unit`."""

    unit: str
    rounds: list[dict[str, float]]

    def median(self, name: str) -> float:
        return statistics.median(rates[name] for rates in self.rounds)

    def ratio(self, name: str, reference: str) -> float:
        """The median over the rounds of the ratio inside each round, so that a drifting machine cancels out."""
        return statistics.median(rates[name] / rates[reference] for rates in self.rounds)


def interleave(contenders: Mapping[str, Callable[[], float]], *, rounds: int, unit: str) -> Comparison:
    """Run every contender once a round, in turn; each returns its rate."""
    results: list[dict[str, float]] = []
    for number in range(rounds):
        names = list(contenders)
        # every other round backwards, so that nobody always follows the same neighbour
        rates = {name: contenders[name]() for name in (names if number % 2 == 0 else reversed(names))}
        results.append(rates)
        print(
            f"  round {number + 1}/{rounds}: " + "   ".join(f"{n} {rates[n]:,.0f}" for n in names), flush=True
        )
    return Comparison(unit, results)


def table(comparison: Comparison, *, reference: str) -> str:
    """A row for each contender: median rate and the ratio to `reference`."""
    names = list(comparison.rounds[0])
    width = max(map(len, names))
    rows = [f"  {'':{width}}  {comparison.unit:>12}  over {reference}"]
    rows += [
        f"  {n:{width}}  {comparison.median(n):12,.0f}  {comparison.ratio(n, reference):.2f}" for n in names
    ]
    return "\n".join(rows)


def machine() -> dict[str, Any]:
    """Cores, processor, memory and library versions."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        "",
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": model or platform.processor(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def save(name: str, comparison: Comparison, **facts: Any) -> Path:
    """Write results/NAME.json: the machine, the facts, every round and the medians."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"machine": machine(), **facts, **described(comparison)}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def save_part(name: str, part: str, result: Mapping[str, Any]) -> Path:
    """Write one part of results/NAME.json, with the machine it was measured on; other parts stay."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content[part] = {"machine": machine(), **result}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def described(comparison: Comparison) -> dict[str, Any]:
    """The medians and every round."""
    names = list(comparison.rounds[0])
    return {
        "unit": comparison.unit,
        "median": {n: round(comparison.median(n), 1) for n in names},
        "rounds": [{n: round(rate, 1) for n, rate in rates.items()} for rates in comparison.rounds],
    }


def photos(minimum: int = 1) -> tuple[str, list[bytes]]:
    """JPEG photographs to measure with, and what they are: $SHARDIFY_REAL_DATA's, or else the demo's."""
    folder = Path(os.environ.get("SHARDIFY_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    files = sorted(folder.glob("imagenet_samples/*.JPEG"))
    if len(files) >= minimum:
        return f"{len(files)} ImageNet photographs", [file.read_bytes() for file in files]
    import zipfile

    from shardify.demo import make_demo

    demo = Path(__file__).parents[1] / "demo"
    make_demo(demo, samples=512, seed=0)
    with zipfile.ZipFile(demo / "images.zip") as archive:
        jpegs = [data for name in archive.namelist() if (data := archive.read(name)).endswith(b"\xff\xd9")]
    return f"{len(jpegs)} demo photographs", jpegs


def fresh_folder(path: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def headline(text: str) -> None:
    print(f"\n{text}", flush=True)
    sys.stdout.flush()


def _lines(path: str) -> Sequence[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else ()
