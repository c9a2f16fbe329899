"""How near does packing come to `tar cf`, and how far is webdataset's ShardWriter?

Distinct photographs in one folder, at least 2 GB, in the page cache; one worker; each contender ends with a sync, and its own start-up
(interpreter and imports) is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import runner

OURS = """
import os, sys, time
from pathlib import Path
from shardify.convert import PackOptions, pack_dataset
import shardify.engines.local, pyarrow.parquet
folder, out = map(Path, sys.argv[1:])
begin = time.perf_counter()
pack_dataset(PackOptions(records=[folder / "chat.json"], images=[folder / "images"], out=out, workers=1))
os.sync()
print(time.perf_counter() - begin)
"""
SHARD_WRITER = """
import json, os, sys, time
from pathlib import Path
import webdataset
folder, out = map(Path, sys.argv[1:])
out.mkdir()
begin = time.perf_counter()
with webdataset.ShardWriter(str(out / "%03d.tar"), maxsize=256e6, maxcount=10**9, verbose=0) as writer:
    for number, record in enumerate(json.loads((folder / "chat.json").read_bytes())):
        image = (folder / "images" / record["image"]).read_bytes()
        writer.write({"__key__": f"{number:09d}", "jpg": image, "json": record})
os.sync()
print(time.perf_counter() - begin)
"""


def write_photos(folder: Path, total: int) -> tuple[int, int]:
    """Photographs made distinct by a JPEG comment, until they hold `total` bytes; returns how many and their bytes."""
    _, pictures = runner.photos()
    images = folder / "images"
    images.mkdir()
    records, written = [], 0
    while written < total:
        number = len(records)
        data = pictures[number % len(pictures)]
        comment = f"{number:012d}".encode()
        data = data[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + data[2:]
        name = f"{number:09d}.jpg"
        (images / name).write_bytes(data)
        written += len(data)
        turns = [
            {"from": "human", "value": "<image>\nDescribe it."},
            {"from": "gpt", "value": "A photograph."},
        ]
        records.append({"id": f"{number:09d}", "image": name, "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    return len(records), written


def timed_script(script: str, folder: Path, out: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(out)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return float(done.stdout.split()[-1])


def timed_tar(folder: Path, out: Path) -> float:
    out.mkdir()
    begin = time.perf_counter()
    subprocess.run(["tar", "cf", out / "all.tar", "-C", folder, "images"], check=True)
    os.sync()
    return time.perf_counter() - begin


def compare(*, rounds: int, total: int) -> runner.Comparison:
    with TemporaryDirectory(dir=os.environ.get("SHARDIFY_BENCH_DIR")) as name:
        folder = Path(name)
        count, written = write_photos(folder, total)
        os.sync()
        runner.headline(
            f"Packing: {count:,} distinct photographs, {written / 1e9:.2f} GB, one worker, sync included"
        )

        def rate(run) -> float:
            out = folder / "out"
            seconds = run(folder, out)
            subprocess.run(["rm", "-rf", out], check=True)
            os.sync()
            return count / seconds

        contenders = {
            "tar cf": lambda: rate(timed_tar),
            "shardify pack": lambda: rate(lambda *where: timed_script(OURS, *where)),
            "webdataset ShardWriter": lambda: rate(lambda *where: timed_script(SHARD_WRITER, *where)),
        }
        comparison = runner.interleave(contenders, rounds=rounds, unit="samples/s")
    print(runner.table(comparison, reference="tar cf"))
    runner.save("packing", comparison, samples=count, bytes=written)
    return comparison


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=float, default=2.1e9)
    arguments = parser.parse_args()
    compare(rounds=arguments.rounds, total=int(arguments.bytes))
