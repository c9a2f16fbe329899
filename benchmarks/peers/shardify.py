"""StreamingLoader: the tars and their manifest."""

from pathlib import Path

from benchmarks.peers import BATCH
from benchmarks.peers.samples import SIZE

PACKAGES = ()


def batches(folder: Path, picture, workers: int):
    from loaders import ImageTransform, StreamingLoader

    image = None if picture is None else ImageTransform(SIZE, fit="crop")
    loader = StreamingLoader(folder, batch_size=BATCH, image=image, text=None, num_workers=workers)
    while True:
        for batch in loader:
            yield batch.images, batch.records
