"""Checkpoints of a run: what is trained, its optimizer and the loader's state, whole or not at all, for any number of ranks."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shares
from torch.distributed.checkpoint.state_dict_saver import save as save_shares

from loaders.loader import StreamingLoader
from shardify.errors import ShardifyError, StateError, UsageError

CHECKPOINTS_KEPT = 2
TRAINED_ALONE = StateDictOptions(
    ignore_frozen_params=True, strict=False
)  # what is frozen comes from the model


class CheckpointError(ShardifyError):
    """A checkpoint that cannot be written, read, or continued."""


def require_writable(folder: Path, option: str) -> None:
    """Make a folder that is written to later, or say now that it cannot be.

    Raises:
        UsageError: it is no folder, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option} {folder}: cannot be written to: {error.strerror}") from error


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]
) -> None:
    """Write a checkpoint, every rank its share, whole or, when killed meanwhile, not at all; drop all but the newest two.

        step-000000500/state.json     the facts
                       .metadata, *.distcp     torch.distributed.checkpoint: what is trained, and its optimizer

    Args:
        folder: that all ranks see.
        model: as it is, or shared out by FSDP; frozen parameters are not written.
        optimizer: of its other parameters.
        facts: JSON-able: ``step``, the number of steps done; ``loader``, the state after them (docs/explain.md asks it about the past); and what
            `newest_checkpoint` is to compare.

    Raises:
        CheckpointError: it cannot be written, the disk being full, say.
    """
    path, unfinished = folder / f"step-{facts['step']:09d}", folder / "unfinished"
    first = not dist.is_initialized() or dist.get_rank() == 0
    try:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)  # what a kill has left
        weights, moments = get_state_dict(model, optimizer, options=TRAINED_ALONE)
        written = save_shares({"model": weights, "optimizer": moments}, checkpoint_id=unfinished)
        if not first:
            return
        parts = {part.relative_path for part in written.storage_data.values()}
        if missing := sorted(part for part in parts if not (unfinished / part).exists()):
            raise CheckpointError(f"{path}: {missing[0]} is not there; do all processes see this folder?")
        with (unfinished / "state.json").open("w") as file:
            json.dump(facts, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(unfinished, path)
        for changed in (path, folder):
            directory = os.open(changed, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
        for old in sorted(folder.glob("step-*"))[:-CHECKPOINTS_KEPT]:
            shutil.rmtree(old)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise CheckpointError(f"{path} cannot be written ({_reason(error)}){_free(folder)}") from error


def newest_checkpoint(folder: Path, identity: dict[str, str]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in a folder that all ranks see, if there is one, and its facts.

    Args:
        folder: of checkpoints.
        identity: of those facts, what must be the same; a run's options by name.

    Raises:
        CheckpointError: it cannot be read, or is none of this run's.
    """
    newest = max(folder.glob("step-*"), default=None)
    if newest is None:
        return None
    try:
        facts = json.loads((newest / "state.json").read_text())
        missing = [name for name in (*identity, "step", "loader") if name not in facts]
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(newest, error) from error
    if missing:
        raise CheckpointError(f"{newest} is no checkpoint of such a run: {', '.join(missing)} missing")
    for name, value in identity.items():
        if facts[name] != value:
            raise CheckpointError(
                f"{newest} has --{name} {facts[name]}, not {value}; choose another --checkpoint-dir"
            )
    return newest, facts


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Continue with what was trained, on any number of ranks, shared out or not.

    Raises:
        CheckpointError: it cannot be read.
    """
    weights, moments = get_state_dict(model, optimizer, options=TRAINED_ALONE)
    try:
        load_shares({"model": weights, "optimizer": moments}, checkpoint_id=path)
    except (Exception, CheckpointException) as error:
        raise _unreadable(path, error) from error
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=TRAINED_ALONE
    )


def _unreadable(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read ({_reason(error)}); delete it to continue from the one before"
    )


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]  # of torch's, a traceback as text


def _free(folder: Path) -> str:
    """Torch does not say so when the disk is full."""
    try:
        return f"; {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there"
    except OSError:
        return ""


def require_agreement(loader: StreamingLoader, folder: Path | None = None) -> None:
    """All ranks must begin at the same step, over the same shards: else they would repeat data, and wait for each other for ever.

    Args:
        loader: with the state that the run begins with.
        folder: of checkpoints, which all ranks must see. Default None: there is none.

    Raises:
        StateError: they do not, with what each rank has.
    """
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (len(loader), loader.state_dict()))
    if any(rank != ranks[0] for rank in ranks):
        told = "; ".join(
            f"rank {rank} is at step {state['step']}, with {left} batches left of {state['fingerprint']['samples']} samples"
            f" in {state['fingerprint']['shards']} shards ({state['fingerprint']['digest'][:8]})"
            for rank, (left, state) in enumerate(ranks)
        )
        raise StateError(f"the ranks do not see the same shards and checkpoints: {told}")
    if folder is not None:
        _require_sight(folder)


def _require_sight(folder: Path) -> None:
    """Else the first checkpoint would have the share of rank 0 alone."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="seen-by-all-") as file:
        name = [Path(file.name).name]
        dist.broadcast_object_list(name)
        seen: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, (folder / name[0]).exists())
    if blind := [str(rank) for rank, sees in enumerate(seen) if not sees]:
        raise StateError(
            f"rank {', '.join(blind)} does not see what rank 0 writes to {folder}; checkpoints need a folder that all see"
        )
