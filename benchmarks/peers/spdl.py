"""SPDL: its tar reader and its pipeline of threads in a helper process, as its guide has it for training; no format or shuffle of its own."""

import random
from functools import partial
from pathlib import Path

from spdl.io import iter_tarfile
from spdl.pipeline import PipelineBuilder, run_pipeline_in_subprocess

from benchmarks.peers import BATCH
from benchmarks.peers.samples import collate, link

PACKAGES = ("spdl", "spdl-core", "spdl-io")


def write(shards, folder):
    link(shards, folder)


class _Samples:
    """Of all shards, in another order of shards each time, without end."""

    def __init__(self, shards):
        self.shards = shards

    def __iter__(self):
        while True:
            for shard in random.sample(self.shards, len(self.shards)):
                fields = {}
                with shard.open("rb") as file:
                    for name, data in iter_tarfile(file):
                        fields[name.rpartition(".")[2]] = data
                        if len(fields) == 2:
                            yield fields
                            fields = {}


def _fit(picture, sample):
    return picture(sample["jpg"]), sample["json"]


def _pipeline(folder: Path, picture, workers: int):
    return (
        PipelineBuilder()
        .add_source(_Samples(sorted(folder.glob("*.tar"))))
        .pipe(partial(_fit, picture), concurrency=workers)
        .aggregate(BATCH)
        .pipe(collate)
        .add_sink(2 * workers)
    )


def batches(folder: Path, picture, workers: int):
    config = _pipeline(folder, picture, workers).get_config()
    return iter(run_pipeline_in_subprocess(config, num_threads=workers, mp_context="forkserver"))


def batches_in_process(folder: Path, picture, workers: int):
    pipeline = _pipeline(folder, picture, workers).build(num_threads=workers)
    pipeline.start()
    return pipeline.get_iterator()
