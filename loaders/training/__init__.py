"""What a training script needs beside batches: LLaVA's image tokens, checkpoints, an export, and how far a run is. train.py shows their use."""

from loaders.training.checkpoints import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    require_agreement,
    require_writable,
    save_checkpoint,
)
from loaders.training.expand import expand_images
from loaders.training.export import ExportError, export_model
from loaders.training.progress import Progress, Span, open_log, write_trace

__all__ = [
    "CheckpointError",
    "ExportError",
    "Progress",
    "Span",
    "expand_images",
    "export_model",
    "load_checkpoint",
    "newest_checkpoint",
    "open_log",
    "require_agreement",
    "require_writable",
    "save_checkpoint",
    "write_trace",
]
