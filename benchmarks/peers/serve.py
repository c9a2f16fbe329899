"""The inside of a contender: answers requests, a line of JSON each, until its input ends; after each it stops itself and its workers.

python -m benchmarks.peers.serve MODULE

{"do": "write", "shards": [...], "folder": ...}                  writes the module's data set
{"do": "open", "folder": ..., "picture": ..., "workers": ..., "options": {...}}    starts the loader, brings it to its steady rate
{"do": "measure", "seconds": ...}                                -> {"samples": ..., "bytes": ..., "seconds": ...}
"""

import importlib
import json
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.peers import BATCH
from benchmarks.peers.samples import PICTURES, SIZE

_WARM_UP = 6  # batches: more than any loader holds ready for two workers


def _weigh(images, records) -> tuple[int, int]:
    """(samples, bytes) of a batch; of encoded ones every byte is summed."""
    if isinstance(images, list | tuple):
        for data in (*images, b"".join(records)):
            _sum(data)
        return len(images), sum(map(len, images)) + sum(map(len, records))
    assert images.shape[1:] == (3, SIZE, SIZE)
    assert str(images.dtype) == "torch.uint8"
    return len(images), images.numel()


def _sum(data) -> int:
    """Of all bytes, eight at a time, and of those left over one by one."""
    words = len(data) // 8
    total = int(np.add.reduce(np.frombuffer(data, np.int64, words)))
    return total + sum(memoryview(data)[8 * words :])


def _consume(batches, count: int) -> dict[str, float]:
    begin, samples, size = time.perf_counter(), 0, 0
    for _ in range(count):
        more, more_size = _weigh(*next(batches))
        samples, size = samples + more, size + more_size
    return {"samples": samples, "bytes": size, "seconds": time.perf_counter() - begin}


def main(name: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    module = importlib.import_module(f"benchmarks.peers.{name}")
    batches, workers, rate = None, 1, 0.0
    for line in sys.stdin:
        request = json.loads(line)
        answer = {}
        if request["do"] == "write":
            module.write([Path(shard) for shard in request["shards"]], Path(request["folder"]))
        elif request["do"] == "open":
            workers = request["workers"]
            batches = module.batches(
                Path(request["folder"]), PICTURES[request["picture"]], workers, **request["options"]
            )
            _consume(batches, _WARM_UP)
            found = _consume(batches, 2 * workers)
            rate = found["samples"] / found["seconds"]
            answer = {"versions": {package: version(package) for package in module.PACKAGES}}
        elif request["do"] == "measure":
            _consume(batches, workers)  # begun before the contender was stopped
            # workers finish their batches at about the same time: whole turns of all, or the first or last one counts for two
            turns = max(1, round(rate * request["seconds"] / BATCH / workers))
            answer = _consume(batches, turns * workers)
            rate = answer["samples"] / answer["seconds"]
        print(json.dumps(answer), file=answers)
        os.killpg(
            0, signal.SIGSTOP
        )  # here, before workers fill queues that the next measurement would find full


if __name__ == "__main__":
    main(sys.argv[1])
