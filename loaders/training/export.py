"""A trained model as a folder that `from_pretrained` loads."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from shardify.errors import ShardifyError

PREPROCESSING = (  # files that are copied as they are
    "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "chat_template.json chat_template.jinja processor_config.json preprocessor_config.json"
)


class ExportError(ShardifyError):
    """A model that cannot be written."""


def export_model(folder: Path, model: Any, *, dtype: torch.dtype, source: str | None = None) -> None:
    """Write a model of transformers, with what its texts and images were prepared by; every rank must call it.

    Args:
        folder: that rank 0 writes to.
        model: as it is, or shared out by FSDP.
        dtype: of the weights in the folder.
        source: name or path of the model it was before training, for its tokenizer's and processor's files. Default None, no such files.

    Raises:
        ExportError: the folder cannot be written, the disk being full, say.
    """
    from safetensors import SafetensorError
    from transformers.utils.hub import cached_file

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)  # of all ranks' shares
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    try:
        state_dict = {path: weight.to(dtype) for path, weight in weights.items()}
        model.save_pretrained(folder, state_dict=state_dict)
        config = model.config
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            part.dtype = dtype  # save_pretrained has written that of the parameters
        config.save_pretrained(folder)
        for name in PREPROCESSING.split() if source else ():
            try:
                file = str(cached_file(str(source), name))
            except OSError:  # which says that the model has no such file
                continue
            shutil.copy(file, folder)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder}: the model cannot be written: {error}") from error
