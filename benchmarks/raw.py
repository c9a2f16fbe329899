"""How fast do bytes arrive, when nothing is decoded? StreamingLoader against webdataset, every byte summed by the consumer.

    python -m benchmarks.raw [--rounds N] [--seconds S]

The same tars for both, in the page cache; two workers, batches of 64 samples of encoded image and record. webdataset is measured with its
shuffle buffer, as it is commonly used, and without, as fast as it goes.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import runner
from benchmarks.loading import (
    CLASSES,
    OURS,
    Meter,
    photos,
    present_peers,
    start,
    versions,
    write_data_set,
)

REQUIRED = 8
COPIES = 64  # of every picture: what is done once an epoch should not show
PEERS = {"webdataset, shuffled": {}, "webdataset, in order": {"buffer": 0}}


def compare(*, kind: str, rounds: int, seconds: float, copies: int = COPIES) -> dict[str, Any]:
    """Measure one class of photographs, print and save."""
    described, pictures = photos(kind)
    runner.headline(f"Bytes as they are: {described}")
    meter = Meter(seconds)
    with TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        data = write_data_set(root, pictures, copies * len(pictures))
        ours = start(stack, root, data, ["shardify"], "raw")["shardify"]
        contenders = {OURS: lambda: meter.rate(OURS, ours)}
        peers = present_peers(["webdataset"])
        for name, options in PEERS.items():
            for contender in start(stack, root, data, peers, "raw", **options).values():
                contenders[name] = lambda name=name, contender=contender: meter.rate(name, contender)
        comparison = runner.interleave(contenders, rounds=rounds, unit="samples/s")
    print(runner.table(comparison, reference=OURS))
    sizes = meter.mean("bytes")
    assert max(sizes.values()) < 1.1 * min(sizes.values()), f"bytes a sample differ: {sizes}"
    result: dict[str, Any] = {
        "data": described,
        "bytes_per_sample": {name: round(size) for name, size in sizes.items()},
        "cpu_milliseconds": {name: round(1000 * cpu, 4) for name, cpu in meter.mean("cpu").items()},
        "ratios": {
            name: {"over": name, "ratio": round(comparison.ratio(OURS, name), 2), "required": REQUIRED}
            for name in contenders
            if name != OURS
        },
        **runner.described(comparison),
    }
    for name, ratio in result["ratios"].items():
        print(f"  {OURS} over {name}: {ratio['ratio']:.2f} (at least {REQUIRED})")
    runner.save_part("raw", kind, {**versions(peers), **result})
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--classes", default=",".join(CLASSES), help=f"of photographs; default {','.join(CLASSES)}"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="for a contender in a round; default 2")
    parser.add_argument("--copies", type=int, default=COPIES, help=f"of every picture; default {COPIES}")
    arguments = parser.parse_args()
    for each in arguments.classes.split(","):
        if each not in CLASSES:
            parser.error(f"no class {each!r}; there are {', '.join(CLASSES)}")
        compare(kind=each, rounds=arguments.rounds, seconds=arguments.seconds, copies=arguments.copies)
