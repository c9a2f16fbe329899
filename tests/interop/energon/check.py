"""Run by the interpreter of .venv-interop: Energon reads a folder through the index that shardify exported.

    python check.py FOLDER EXPECTED COPY

EXPECTED is JSON: key -> field -> SHA-256. COPY is a folder with the same shards and nothing else, for Energon's own preparation.
"""

import hashlib
import json
import sqlite3
import sys
from pathlib import Path

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator


@stateless
def cook(sample: dict) -> dict:
    return sample


class Raw(DefaultTaskEncoder):
    """Samples as they are stored."""

    decoder = None
    cookers = (Cooker(cook),)

    @stateless
    def encode_sample(self, sample):
        return sample

    def batch(self, samples):
        return samples


def read(folder: str) -> dict[str, dict[str, str]]:
    data = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Raw(),
        repeat=False,
    )
    found = {}
    for batch in get_loader(data):
        for sample in batch:
            fields = {name: content for name, content in sample.items() if isinstance(content, bytes)}
            found[sample["__key__"]] = {
                name: hashlib.sha256(content).hexdigest() for name, content in fields.items()
            }
    return found


def tables(folder: Path) -> dict[str, list[tuple]]:
    with sqlite3.connect(folder / ".nv-meta" / "index.sqlite") as database:
        return {
            "samples": database.execute("SELECT * FROM samples ORDER BY 1, 3").fetchall(),
            "sample_parts": database.execute("SELECT * FROM sample_parts ORDER BY 1, 2, 4").fetchall(),
            "schema": sorted(database.execute("SELECT name FROM sqlite_master").fetchall()),
        }


def main(folder: Path, expected: Path, copy: Path) -> None:
    wanted = json.loads(expected.read_text())
    found = read(str(folder))
    if found != wanted:
        sys.exit(
            f"Energon reads {len(found)} samples, of which {sum(wanted.get(k) == v for k, v in found.items())} are as packed, of {len(wanted)}"
        )
    shards = sorted(path.name for path in copy.glob("*.tar"))
    WebdatasetPreparator.prepare_dataset(copy, shards, split_parts_ratio=[("train", 1.0)], workers=1)
    for shard in shards:
        if (folder / f"{shard}.idx").read_bytes() != (copy / f"{shard}.idx").read_bytes():
            sys.exit(f"{shard}.idx differs from what Energon prepares")
    if tables(folder) != tables(copy):
        sys.exit("index.sqlite differs from what Energon prepares")
    counts = [
        json.loads((each / ".nv-meta" / ".info.json").read_text())["shard_counts"] for each in (folder, copy)
    ]
    if counts[0] != counts[1]:
        sys.exit("shard counts differ from what Energon prepares")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
