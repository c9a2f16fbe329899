"""Megatron-Energon: the tars with its own index beside them, its task encoder, its loader."""

from pathlib import Path

import torch
import yaml
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

from benchmarks.peers import BATCH
from benchmarks.peers.samples import collate, link

PACKAGES = ("megatron-energon",)


def write(shards, folder):
    link(shards, folder)
    names = [shard.name for shard in shards]
    WebdatasetPreparator.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=2)
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "subflavors": {}}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(crude))


@stateless
def _cook(sample: dict) -> dict:
    return sample


class _Encoder(DefaultTaskEncoder):
    decoder = None
    cookers = (Cooker(_cook),)

    def __init__(self, picture):
        super().__init__()
        self.picture = picture

    @stateless
    def encode_sample(self, sample):
        return self.picture(sample["jpg"]), sample["json"]

    def batch(self, samples):
        return collate(samples)


def batches(folder: Path, picture, workers: int):
    data = get_train_dataset(
        folder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        batch_size=BATCH,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        task_encoder=_Encoder(picture),
    )
    torch.set_num_threads(1)
    return iter(get_loader(data, watchdog_timeout_seconds=None))
