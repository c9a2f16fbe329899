"""The first step of an epoch with the functions of train.py, by one process or several: its loss and gradients, written to a file.

python one_step.py SHARDS STAGE BATCH_SIZE OUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from loaders.training import expand_images

shards, stage_name, batch_size, out = sys.argv[1:]
device = train.join_ranks()
stage = train.STAGES[stage_name]
config = train.model_config("tiny")
text, image = train.preprocessing("tiny", config, stage, 2048)
# manifest order: rank r of two has every second sample
loader = train.StreamingLoader(
    shards, batch_size=int(batch_size), image=image, text=text, shuffle=None, num_workers=0
)


def expand(batch):
    return expand_images(batch, image_token=config.image_token_id, tokens_per_image=16, max_length=2048)


batch = next(iter(train.DevicePrefetcher(loader, device, prepare=expand)))
llava = train.build_model("tiny", config, stage, seed=0)
model = train.share_out(train.SummedLoss(llava), device, fsdp=False, bf16=False)
result = {
    "loss": train.train_step(model, batch),
    "gradients": {name: p.grad for name, p in llava.named_parameters() if p.requires_grad},
    "images": len(batch.images),
    "tokens": train.supervised(batch),
}
torch.save(result, f"{out}.rank{dist.get_rank()}")
dist.destroy_process_group()
