"""What a training script needs beside batches: LLaVA's image tokens, checkpoints, and what is told of a run. train.py shows their use."""

from loaders.training.checkpoints import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    require_agreement,
    require_writable,
    save_checkpoint,
)
from loaders.training.expand import expand_images
from loaders.training.progress import Progress, open_log, write_trace

__all__ = [
    "CheckpointError",
    "Progress",
    "expand_images",
    "load_checkpoint",
    "newest_checkpoint",
    "open_log",
    "require_agreement",
    "require_writable",
    "save_checkpoint",
    "write_trace",
]
