"""Several runs of train.py, one after another, by one group of processes: starting one takes longer than such a run.

python runs.py '[["--shards", ...], ...]'
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
import train

device = train.join_ranks()
for arguments in json.loads(sys.argv[1]):
    train.train(train.parse_arguments(arguments), device)
dist.destroy_process_group()
