"""What ranks do in the tests of faults; `nursery` forks them by these functions' names."""

import hashlib
import json
import os
import random
import resource
import signal
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from loaders import ImageTransform, LlavaText, StreamingLoader
from loaders.fetch import download
from loaders.text import ByteTokenizer
from shardify.errors import UsageError

IMPORTED = [download]  # here, and not in every rank
IMAGE = ImageTransform(8)
TEXT = LlavaText(ByteTokenizer())


def noise(number, size=3000):
    """The image of a sample of `write_noise`."""
    return np.random.default_rng(number).bytes(size + number % 7 * 100)


def launch(work, world, **arguments):
    """`work(rank, world, **arguments)` in a process for each rank; as torchrun does it, the first that fails ends them all."""
    ranks = {_forked(globals()[work], rank=rank, world=world, **arguments) for rank in range(world)}
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            for other in ranks:
                os.waitpid(other, 0)
            raise ChildProcessError(f"a rank ended with {os.waitstatus_to_exitcode(status)}")


def _forked(work, **arguments):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work(**arguments)
        status = 0
    except BaseException:  # written into the log
        traceback.print_exc()
    finally:
        os._exit(status)


def made(shards, rank, world, **options):
    options = {"image": IMAGE, "text": TEXT, "num_workers": 2, "batch_size": 5, **options}
    return StreamingLoader(shards, rank=rank, world_size=world, **options)


def endless(rank, world, shards, temporary, workers=2):
    """Epoch after epoch."""
    tempfile.tempdir = temporary
    loader = made(shards, rank, world, num_workers=workers)
    while True:
        for _ in loader:
            pass


def one_epoch(rank, world, shards, temporary):
    """One epoch, all of it."""
    tempfile.tempdir = temporary
    loader = made(shards, rank, world)
    assert sum(int(batch.valid.sum()) for batch in loader) > 0
    loader.close()


def digests(rank, world, shards, out, temporary, environment=None, **options):
    """A digest of all that is in each batch of an epoch, a line each."""
    tempfile.tempdir = temporary
    os.environ.update(environment or {})
    loader = made(shards, rank, world, **options)
    with open(f"{out}.{rank}", "w") as file:
        for batch in loader:
            digest = hashlib.sha256(repr((batch.keys, batch.faults)).encode())
            for name in (
                "positions",
                "rows",
                "input_ids",
                "labels",
                "attention_mask",
                "images",
                "image_samples",
            ):
                value = getattr(batch, name)
                digest.update(repr(value.shape).encode() + value.contiguous().numpy().tobytes())
            file.write(digest.hexdigest() + "\n")
    loader.close()


def compare_noise(rank, world, shards, cache_dir, cache_size, seed, epochs):
    """Epochs of a data set of `noise`, every byte compared; endless when `epochs` is 0."""
    warnings.simplefilter("ignore")  # the cache is meant to be too small
    loader = made(
        shards, rank, world, image=None, text=None, cache_dir=cache_dir, cache_size=cache_size, seed=seed
    )
    while not epochs or loader.epoch < epochs:
        for batch in loader:
            assert not batch.faults, batch.faults
            for sample, image in zip(batch.image_samples.tolist(), batch.images, strict=True):
                number = int(batch.keys[sample])
                assert bytes(image) == noise(number), f"sample {number} is not as it was written"
                assert json.loads(batch.records[sample])["id"] == number
    assert loader.report().samples > 0
    loader.close()


def in_groups(rank, world, meet, shards, out):
    """What four ranks get, of which two share the data: by a group, and by a mesh of data and tensor dimensions."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{meet}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found = {}
    pairs = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    loader = StreamingLoader(shards, batch_size=4, num_workers=0, process_group=pairs[rank // 2])
    found["group"] = [loader.rank, loader.world_size, [batch.keys for batch in loader], loader.state_dict()]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    loader = StreamingLoader(shards, batch_size=4, num_workers=1, process_group=mesh["dp"])
    found["mesh"] = [loader.rank, loader.world_size, [batch.keys for batch in loader], loader.state_dict()]
    loader.close()
    for wrong, group in (("whole", mesh), ("other", pairs[1 - rank // 2])):
        try:
            StreamingLoader(shards, batch_size=4, process_group=group)
        except UsageError as error:
            found[wrong] = str(error)
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


class Killed(ImageTransform):
    """Ends its process at the first image, as the kernel does when memory is short."""

    def prepare(self, data, **_):
        os.kill(os.getpid(), signal.SIGKILL)


class Greedy(ImageTransform):
    """Takes memory without end from the first image on."""

    def prepare(self, data, **_):
        held = [np.ones(1 << 24, np.uint8)]
        while True:
            held.append(np.concatenate([held[-1], held[-1]]))


def out_of_memory(rank, world, shards, kind):
    """The workers of rank 1 run out of memory: by a limit on addresses, or killed as the kernel does it."""
    image = IMAGE
    if rank == 1:
        image = {"killed": Killed, "limited": Greedy}[kind](8)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
    loader = made(shards, rank, world, image=image, num_workers=1)
    random.seed(rank)
    while True:
        for _ in loader:
            pass
