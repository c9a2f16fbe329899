"""MosaicML Streaming: MDS shards, its default shuffle, its loader; the data set is repeated within an epoch so that none ends."""

from pathlib import Path

from benchmarks.peers import BATCH, torchvision_ops  # noqa: F401 - before streaming
from benchmarks.peers.samples import collate, read

from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset  # isort: skip

PACKAGES = ("mosaicml-streaming",)
_REPEAT = 100


def write(shards, folder):
    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "json": "bytes"}) as writer:
        for _, image, record in read(shards):
            writer.write({"jpg": image, "json": record})


class _Pictures(StreamingDataset):
    def __init__(self, folder, picture):
        streams = [Stream(local=str(folder), repeat=_REPEAT)]
        super().__init__(streams=streams, shuffle=True, batch_size=BATCH)
        self.picture = picture

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return self.picture(sample["jpg"]), sample["json"]


def batches(folder: Path, picture, workers: int):
    data = _Pictures(folder, picture)
    return iter(
        StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=collate, drop_last=True)
    )
