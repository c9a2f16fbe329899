"""SPDL: its tar reader and its pipeline of threads, which has neither a format nor a shuffle of its own."""

import random
from pathlib import Path

import torch
from spdl.io import iter_tarfile
from spdl.pipeline import PipelineBuilder

from benchmarks.peers import BATCH
from benchmarks.peers.samples import collate, link

PACKAGES = ("spdl", "spdl-core", "spdl-io")


def write(shards, folder):
    link(shards, folder)


def _samples(shards):
    while True:
        for shard in random.sample(shards, len(shards)):
            fields = {}
            with shard.open("rb") as file:
                for name, data in iter_tarfile(file):
                    fields[name.rpartition(".")[2]] = data
                    if len(fields) == 2:
                        yield fields
                        fields = {}


def batches(folder: Path, picture, workers: int):
    torch.set_num_threads(1)

    def fit(sample):
        return picture(sample["jpg"]), sample["json"]

    pipeline = (
        PipelineBuilder()
        .add_source(_samples(sorted(folder.glob("*.tar"))))
        .pipe(fit, concurrency=workers)
        .aggregate(BATCH)
        .pipe(collate)
        .add_sink(2 * workers)
        .build(num_threads=workers)
    )
    pipeline.start()
    return pipeline.get_iterator()
