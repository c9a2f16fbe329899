"""A rank that records what it trains on, for test_elastic.py: a mixture, packed; a checkpoint every few steps.

torchrun elastic.py FOLDER EPOCHS DIE
"""

import json
import os
import signal
import sys
from pathlib import Path

from torch import distributed

from loaders import ImageTransform, LlavaText, Mixture, StreamingLoader
from loaders.text import ByteTokenizer

folder, epochs, die = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
EVERY = 3


class Dying(ImageTransform):
    """Ends its process at the first image, as the kernel does when memory is short."""

    def prepare(self, data, **_):
        os.kill(os.getpid(), signal.SIGKILL)


distributed.init_process_group("gloo")
rank = distributed.get_rank()
parts = {"one": (folder / "one", 1), "half": (folder / "half", 0.5), "two": (folder / "two", 2)}
loader = StreamingLoader(
    Mixture(parts),
    batch_size=2,
    image=(Dying if die == str(rank) else ImageTransform)(8),
    text=LlavaText(ByteTokenizer()),
    pack_tokens=700,
    plan_window=64,
    num_workers=1,
    seed=4,
)
checkpoint = folder / "checkpoint.json"
if checkpoint.exists():
    loader.load_state_dict(json.loads(checkpoint.read_text()))
distributed.barrier()  # nobody writes the next one before all have read this
begin = loader.state_dict()["step"]
with open(folder / f"trace-{begin}-{os.getpid()}.jsonl", "w") as trace:
    while loader.epoch < epochs:
        for batch in loader:
            step = batch.state["step"]
            keys = [key for key in batch.keys if key]
            line = {"begin": begin, "step": step, "world": loader.world_size, "keys": keys}
            trace.write(json.dumps(line) + "\n")
            trace.flush()
            distributed.barrier()  # the step has been taken on all ranks
            if rank == 0 and step % EVERY == 0:
                temporary = checkpoint.with_suffix(".tmp")
                temporary.write_text(json.dumps(batch.state))
                os.replace(temporary, checkpoint)
    if rank == 0:
        checkpoint.write_text(json.dumps(loader.state_dict()))
distributed.destroy_process_group()
