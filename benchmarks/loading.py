"""How near does StreamingLoader come to the decode+resize kernel, and how far behind are its peers?

    python -m benchmarks.loading [--classes 640x480,336] [--rounds N] [--seconds S]

Two workers, batches of 64, 336 pixels, crop, uint8, everything in the page cache, start-up and epochs' ends not counted. Peers read the same
samples, each in its own format, once as they are commonly used (Pillow) and once with the kernel's own function. Every contender is a
process that is stopped while others are measured. Peers live in .venv-peers, which `make bench-peers` sets up.
"""

import argparse
import io
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from benchmarks import kernel, runner
from benchmarks.peers.process import NAMES, PEERS, Contender, interpreter

WORKERS = 2
COPIES = 16  # of every picture in a data set
CLASSES = ("640x480", "336")
PICTURES = {"pillow": "Pillow", "kernel": "kernel"}
OURS = NAMES["shardify"]
REQUIRED = {
    "640x480": {"kernel alone": 0.95, "best with Pillow": 2.5, "best with kernel": 1.1},
    "336": {"kernel alone": 0.95, "best with Pillow": 1.5, "best with kernel": 1.2},
}


def write_data_set(folder: Path, pictures: list[bytes], samples: int) -> Path:
    """`samples` records over the pictures, packed into four shards."""
    from shardify.convert import PackOptions, pack_dataset

    images = folder / "images"
    images.mkdir()
    records = []
    for number in range(samples):
        name = f"{number % len(pictures):05d}.jpg"
        if number < len(pictures):
            (images / name).write_bytes(pictures[number])
        turns = [
            {"from": "human", "value": "<image>\nDescribe it."},
            {"from": "gpt", "value": "A photograph."},
        ]
        records.append({"id": f"{number:09d}", "image": name, "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    pack_dataset(PackOptions(records=[folder / "chat.json"], images=[images], out=folder / "data", shards=4))
    return folder / "data"


def photos(kind: str) -> tuple[str, list[bytes]]:
    """What they are, and JPEG photographs: as they come ("640x480"), or made smaller, shorter edges of 336 to 400 pixels ("336")."""
    described, pictures = runner.photos()
    if kind == "336":
        pictures = [smaller(data, 336 + number % 65) for number, data in enumerate(pictures)]
        described += ", shorter edges of 336 to 400 pixels, JPEG quality 85"
    return f"{described}, {sum(map(len, pictures)) / len(pictures) / 1000:.0f} kB on average", pictures


def smaller(data: bytes, shorter: int) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        scale = shorter / min(image.size)
        size = [max(shorter, round(side * scale)) for side in image.size]
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85)
    return file.getvalue()


def present_peers(wanted: Sequence[str] = tuple(PEERS)) -> list[str]:
    """The peers that can be run; says which cannot."""
    present = [module for module in wanted if interpreter(module)]
    if missing := [NAMES[module] for module in wanted if module not in present]:
        print(f"left out, for want of .venv-peers (make bench-peers): {', '.join(missing)}")
    return present


def start(
    stack: ExitStack, root: Path, data: Path, modules: Sequence[str], picture: str, **options: Any
) -> dict[str, Contender]:
    """Contenders at their steady rate, stopped; each has written its data set, once for all its pictures, below `root`."""
    contenders = {}
    for module in modules:
        contender = stack.enter_context(Contender(module, root / f"{module}-{picture}.log"))
        folder = data if module == "shardify" else root / module
        if not folder.exists():
            contender.ask(do="write", shards=sorted(data.glob("*.tar")), folder=folder)
        contender.ask(do="open", folder=folder, picture=picture, workers=WORKERS, options=options)
        contenders[module] = contender
    return contenders


class Meter:
    """Rates of contenders, and what else was measured on the way."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._answers: dict[str, list[dict[str, float]]] = {}

    def rate(self, name: str, contender: Contender) -> float:
        answer = contender.measure(self._seconds)
        self._answers.setdefault(name, []).append(answer)
        return answer["samples"] / answer["seconds"]

    def mean(self, field: str) -> dict[str, float]:
        """`field` for each sample of each contender, over all rounds."""
        return {
            name: sum(a[field] for a in answers) / sum(a["samples"] for a in answers)
            for name, answers in self._answers.items()
        }


def compare(*, kind: str, rounds: int, seconds: float, copies: int = COPIES) -> dict[str, Any]:
    """Measure one class of photographs, print and save."""
    described, pictures = photos(kind)
    runner.headline(f"Loading: {described}; {WORKERS} workers, batches of 64, 336 crop")
    meter = Meter(seconds)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        data = write_data_set(root, pictures, copies * len(pictures))
        ours = start(stack, root, data, ["shardify"], "kernel")["shardify"]
        # each picture equally often, or a few large ones would decide
        turns = max(
            1,
            round(seconds * kernel.measure(pictures, count=64, processes=WORKERS) / WORKERS / len(pictures)),
        )
        contenders = {
            "kernel alone": lambda: kernel.measure(pictures, count=turns * len(pictures), processes=WORKERS),
            OURS: lambda: meter.rate(OURS, ours),
        }
        peers = present_peers()
        for picture, told in PICTURES.items():
            for module, contender in start(stack, root, data, peers, picture).items():
                name = f"{NAMES[module]}, {told}"
                contenders[name] = lambda name=name, contender=contender: meter.rate(name, contender)
        comparison = runner.interleave(contenders, rounds=rounds, unit="samples/s")
    print(runner.table(comparison, reference="kernel alone"))
    milliseconds = 1000 * WORKERS / comparison.median("kernel alone")
    print(f"  the kernel takes {milliseconds:.2f} ms a sample and core")
    result = {
        "data": described,
        "workers": WORKERS,
        "kernel_milliseconds": round(milliseconds, 3),
        "cpu_milliseconds": {name: round(1000 * cpu, 3) for name, cpu in meter.mean("cpu").items()},
        "ratios": ratios(comparison, kind),
        **runner.described(comparison),
    }
    runner.save_part("loading", kind, {**versions(peers), **result})
    return result


def ratios(comparison: runner.Comparison, kind: str) -> dict[str, dict[str, Any]]:
    """Of StreamingLoader over the kernel, and over the peer with the best median, as such and given the kernel; with what is required."""
    found = {"kernel alone": {"over": "kernel alone"}}
    for told in PICTURES.values():
        if names := [name for name in comparison.rounds[0] if name.endswith(f", {told}")]:
            found[f"best with {told}"] = {"over": max(names, key=comparison.median)}
    for name, ratio in found.items():
        ratio["ratio"] = round(comparison.ratio(OURS, ratio["over"]), 3)
        ratio["required"] = REQUIRED[kind][name]
        print(f"  {OURS} over {ratio['over']}: {ratio['ratio']:.2f} (at least {ratio['required']})")
    return found


def versions(peers: Sequence[str]) -> dict[str, Any]:
    """Of the peers' packages, as their environments have them."""
    import subprocess

    script = "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    found: dict[str, str] = {}
    for python in {interpreter(module) for module in peers}:
        found |= json.loads(subprocess.run([python, "-c", script], check=True, capture_output=True).stdout)
    packages = ("webdataset", "megatron-energon", "mosaicml-streaming", "litdata", "datasets", "spdl")
    shared = ("torch", "pillow", "simplejpeg", "numpy")
    return {"peers": {name: found[name] for name in (*packages, *shared) if name in found}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--classes", default=",".join(CLASSES), help=f"of photographs; default {','.join(CLASSES)}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for a contender in a round; default 2")
    parser.add_argument("--copies", type=int, default=COPIES, help=f"of every picture; default {COPIES}")
    arguments = parser.parse_args()
    for each in arguments.classes.split(","):
        if each not in CLASSES:
            parser.error(f"no class {each!r}; there are {', '.join(CLASSES)}")
        compare(kind=each, rounds=arguments.rounds, seconds=arguments.seconds, copies=arguments.copies)
