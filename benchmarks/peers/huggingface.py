"""Hugging Face datasets: an Arrow data set, mapped into memory, a transform, torch's DataLoader with a shuffling sampler."""

from pathlib import Path

import datasets
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.peers import BATCH
from benchmarks.peers.samples import collate, read

PACKAGES = ("datasets",)
_ENDLESS = 1 << 40


def write(shards, folder):
    features = datasets.Features({"jpg": datasets.Value("binary"), "json": datasets.Value("binary")})

    def samples():
        for _, image, record in read(shards):
            yield {"jpg": image, "json": record}

    cache = str(folder.with_suffix(".cache"))
    data = datasets.Dataset.from_generator(samples, features=features, cache_dir=cache, keep_in_memory=True)
    data.save_to_disk(folder)


def batches(folder: Path, picture, workers: int):
    data = datasets.load_from_disk(folder)

    def fit(columns):
        return {"picture": [picture(image) for image in columns["jpg"]], "record": columns["json"]}

    data.set_transform(fit)
    sampler = RandomSampler(data, replacement=True, num_samples=_ENDLESS)
    return iter(DataLoader(data, BATCH, sampler=sampler, num_workers=workers, collate_fn=_collate))


def _collate(samples):
    return collate([(sample["picture"], sample["record"]) for sample in samples])
