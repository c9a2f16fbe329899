"""The orders in which other loaders read: their own code over the numbers of samples instead of the samples.

    python -m benchmarks.peers.orders NAME OUT.npy '{"samples": ..., "shard": ..., "world": ..., "workers": ..., "batch": ...}'

Writes int64 [steps, world, batch], the samples of every batch of one epoch by their place in the data set; -1 where there is none.
"""

import json
import os
import sys
from collections.abc import Iterator

import numpy as np


def webdataset(*, samples: int, shard: int, world: int, workers: int, batch: int, buffer: int = 1000):
    """Shards dealt to ranks and workers, shuffled, then a buffer; with `webdataset.WebDataset`'s stages in its order."""
    import webdataset as wds

    names = [str(number) for number in range(samples // shard)]

    def expand(shards) -> Iterator[int]:
        for item in shards:
            first = int(item["url"]) * shard
            yield from range(first, first + shard)

    os.environ.update(WORLD_SIZE=str(world), NUM_WORKERS=str(workers))
    ranks = []
    for rank in range(world):
        streams = []
        for worker in range(workers):
            os.environ.update(RANK=str(rank), WORKER=str(worker))
            pipeline = wds.DataPipeline(
                wds.SimpleShardList(names),
                wds.split_by_node,
                wds.split_by_worker,
                wds.shuffle(len(names), seed=rank),  # WebDataset draws one in each rank's main process
                expand,
                wds.shuffle(buffer, seed=1000 * rank + worker),
            )
            found = np.fromiter(iter(pipeline), np.int64)
            streams.append(found[: len(found) // batch * batch].reshape(-1, batch))
        ranks.append(
            np.stack(streams, 1).reshape(-1, batch)
        )  # the main process takes a batch of each worker in turn
    return np.stack(ranks, 1)


def mosaicml(
    *,
    samples: int,
    shard: int,
    world: int,
    workers: int,
    batch: int,
    algorithm: str,
    block: int,
    canonical: int,
):
    """`streaming.StreamingDataset`'s plan for one node: its partitions, in its shuffle."""
    from benchmarks.peers import torchvision_ops  # noqa: F401 - before streaming

    from streaming.base.partition import get_partitions  # isort: skip
    from streaming.base.shuffle import get_shuffle  # isort: skip

    sizes = np.full(samples // shard, shard, np.int64)
    places = get_partitions("relaxed", samples, canonical, 1, world, workers, batch)
    order = get_shuffle(algorithm, sizes, canonical, 9176, 0, block)  # the seed is its default
    found = np.where(places == -1, -1, order[places])[0]
    return found.transpose(2, 1, 0, 3).reshape(-1, world, batch)  # from [rank, worker, step, batch]


if __name__ == "__main__":
    name, out, settings = sys.argv[1:]
    np.save(out, {"webdataset": webdataset, "mosaicml": mosaicml}[name](**json.loads(settings)))
