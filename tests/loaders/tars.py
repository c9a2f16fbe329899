"""Small shards as others would make them: no manifest, indexed when they are opened."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shardify.format.tar import ShardWriter


def record(number: int, images: int = 1, **more) -> bytes:
    words = " ".join(f"w{i}" for i in range(number % 7))
    turns = [
        {"from": "human", "value": "<image>\n" * images + f"Say {number}. {words}"},
        {"from": "gpt", "value": f"It is {number}."},
    ]
    image = {} if not images else {"image": "a.png" if images == 1 else [f"{i}.png" for i in range(images)]}
    return json.dumps({"id": f"id{number}", "conversations": turns, **image, **more}).encode()


def write_tars(
    folder: Path,
    samples: Sequence[tuple[list[bytes], bytes]],
    cuts: Sequence[int],
    *,
    compress: str = "",
    first: int = 0,
) -> Path:
    """Samples as (images, record) in shards that end before the samples `cuts`, and at the end; keys are the samples' numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, numbers in enumerate(np.split(np.arange(len(samples)), cuts)):
        path = folder / f"{first + shard:03}.tar{'.zst' if compress else ''}"
        with open(path, "wb", buffering=0) as file:
            writer = ShardWriter(file, compress=compress)
            for number in numbers.tolist():
                images, text = samples[number]
                for place, image in enumerate(images):
                    field = "png" if len(images) == 1 else f"{place}.png"
                    writer.add(f"{number:09}", field, image)
                writer.add(f"{number:09}", "json", text)
                writer.end_sample()
            writer.close()
    return folder
