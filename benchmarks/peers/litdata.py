"""litData: optimised chunks of 64 MB, its shuffle, its loader; the data set starts again inside the workers, so that no epoch ends."""

import math
from functools import partial
from pathlib import Path

from benchmarks.peers import BATCH, torchvision_ops  # noqa: F401 - before litdata
from benchmarks.peers.samples import collate, read

import litdata  # isort: skip

PACKAGES = ("litdata",)


def _samples(shard):
    for _, image, record in read([shard]):
        yield {"jpg": image, "json": record}


def write(shards, folder):
    litdata.optimize(_samples, list(shards), str(folder), chunk_bytes="64MB", num_workers=2, verbose=False)


def batches(folder: Path, picture, workers: int):
    data = litdata.ParallelStreamingDataset(
        [litdata.StreamingDataset(str(folder), shuffle=True)],
        length=math.inf,
        transform=partial(_fit, picture),
    )
    return iter(litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=collate))


def _fit(picture, samples):
    return picture(samples[0]["jpg"]), samples[0]["json"]
