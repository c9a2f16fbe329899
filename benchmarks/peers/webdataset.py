"""webdataset: the tars as they are, shuffled by shard and by a buffer of 1,000 samples."""

from pathlib import Path

import webdataset

from benchmarks.peers import BATCH
from benchmarks.peers.samples import collate, link

PACKAGES = ("webdataset",)


def write(shards, folder):
    link(shards, folder)


def batches(folder: Path, picture, workers: int, *, buffer: int = 1000):
    shards = sorted(map(str, folder.glob("*.tar")))
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False).repeat()
    if buffer:
        samples = samples.shuffle(buffer)
    if picture is None:
        samples = samples.map(lambda sample: (sample["jpg"], sample["json"])).batched(
            BATCH, collation_fn=_columns
        )
    else:
        samples = samples.map(lambda sample: (picture(sample["jpg"]), sample["json"]))
        samples = samples.batched(BATCH, collation_fn=collate)
    return iter(webdataset.WebLoader(samples, batch_size=None, num_workers=workers))


def _columns(samples):
    return tuple(zip(*samples, strict=True))
