"""Train LLaVA on shards.

    torchrun --nproc-per-node 2 train.py --shards 'data/{000..007}.tar' --checkpoint-dir checkpoints

The same command again, with any number of processes, continues from the newest checkpoint: an epoch still has every sample once. The
default model, ``tiny``, is made from a configuration and needs no download. docs/training.md has every option, and LLaVA's own.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers.image_processing_base import ImageProcessingMixin

from loaders import Batch, DevicePrefetcher, ImageTransform, LlavaText, StreamingLoader
from loaders.subset import Split
from loaders.text import IGNORE_INDEX, ByteTokenizer, Tokenizer
from loaders.training import (
    Progress,
    Span,
    expand_images,
    export_model,
    load_checkpoint,
    newest_checkpoint,
    open_log,
    require_agreement,
    require_writable,
    save_checkpoint,
    write_trace,
)
from loaders.training.options import count_or_share, positive, rate, share, stretch
from shardify.errors import ShardifyError, UsageError

WARM_UP = 0.03  # of the run; then a cosine down to nothing
MAX_GRADIENT_NORM = 1.0
GROUPS = ("none", "modality", "length", "modality_length")


@dataclass(frozen=True, slots=True)
class Stage:
    """What sets one of LLaVA-1.5's two stages apart: its published settings (haotian-liu/LLaVA, scripts/v1_5)."""

    template: str
    fit: Literal["crop", "pad"]
    learning_rate: float
    global_batch: int
    group_by: str
    trains: tuple[str, ...]  # parts of the model; all else is frozen


STAGES = {
    "pretrain": Stage("plain", "crop", 1e-3, 256, "none", ("multi_modal_projector",)),
    "finetune": Stage(
        "v1", "pad", 2e-5, 128, "modality_length", ("multi_modal_projector", "language_model", "lm_head")
    ),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; wrong usage ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description="Train LLaVA on shards.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument_group("what is trained").add_argument
    add("--model", default="tiny", help="tiny, or the name or path of a LLaVA model that transformers loads")
    add("--stage", choices=STAGES, default="finetune", help="train the projector; or the language model, too")
    add("--template", metavar="NAME", help="of conversations; None: pretrain plain, finetune v1")
    add("--export", type=Path, metavar="DIR", help="write the trained model there, for from_pretrained")
    add("--seed", type=int, default=0, help="of the order of samples, and of the tiny model")
    add = parser.add_argument_group("on what").add_argument
    add("--shards", nargs="+", required=True, help="a pattern ('data/{000..007}.tar'), a folder, or tars")
    add("--max-length", type=positive, default=2048, help="tokens of a sample, those of its images included")
    add("--group-by", choices=GROUPS, help="what a step's samples share; None: finetune modality_length")
    add("--pack-tokens", type=positive, metavar="N", help="several samples in a row of at most N tokens")
    add("--exclude", metavar="FILE", help="ids, URLs and image hashes of samples to leave out")
    add("--skip", nargs="+", type=stretch, default=[], metavar="FROM:TO", help="steps to leave out, not TO")
    add("--max-errors", type=count_or_share, help="end the run beyond so many bad samples; below 1, a share")
    add("--num-workers", type=int, default=4, help="processes that load data for each training process")
    add = parser.add_argument_group("how").add_argument
    size = "samples (packed: rows) per process and pass; None: what makes 256 a step, finetune 128, tiny 32"
    add("--batch-size", type=positive, help=size)
    add("--accumulate", type=positive, default=1, help="passes in a step")
    either = parser.add_mutually_exclusive_group().add_argument
    # no default here: argparse would not see that the default was given together with --steps
    either("--epochs", type=positive, help="passes over the data; None: 1, unless --steps is given")
    either("--steps", type=positive, help="steps, instead of --epochs")
    add("--lr", dest="learning_rate", type=rate, help="None: pretrain 1e-3, finetune 2e-5, tiny 3e-3")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more computing")
    add("--fsdp", action="store_true", help="share parameters and optimizer out over the processes")
    add = parser.add_argument_group("what is kept and told").add_argument
    add("--checkpoint-dir", type=Path, help="where checkpoints go; the newest one there is continued from")
    add("--save-every", type=positive, default=500, help="steps between checkpoints")
    add("--validation", type=share, default=0.0, metavar="SHARE", help="of the samples, held out")
    add("--eval-every", type=positive, default=500, help="steps between losses over what is held out")
    add("--log", choices=["tensorboard", "wandb"], help="where scalars go")
    add("--trace", type=Path, metavar="DIR", help="write what each step trains on to DIR/rank*.jsonl")
    return parser.parse_args(arguments)


def chosen_stage(arguments: argparse.Namespace) -> Stage:
    """The stage, with what the command line says instead."""
    given = {name: getattr(arguments, name) for name in ("template", "learning_rate", "group_by")}
    tiny = {"learning_rate": 3e-3, "global_batch": 32} if arguments.model == "tiny" else {}
    return replace(
        STAGES[arguments.stage], **(tiny | {name: value for name, value in given.items() if value})
    )


def model_config(name: str) -> Any:
    """The configuration of a model: ``tiny``, or one that transformers finds."""
    if name != "tiny":
        config = _pretrained(transformers.AutoConfig.from_pretrained, name)
        if config.model_type != "llava":
            raise UsageError(f"--model {name} is a {config.model_type!r} model; a 'llava' one is needed")
        return config
    small: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(
        image_size=56, patch_size=14, hidden_size=64, intermediate_size=128, **small
    )
    language = transformers.LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size + 1, hidden_size=64, intermediate_size=128, **small
    )
    return transformers.LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=ByteTokenizer.vocab_size
    )


def preprocessing(name: str, config: Any, stage: Stage, max_length: int) -> tuple[LlavaText, ImageTransform]:
    """How a model and a stage want texts, cut at `max_length` tokens, and images."""
    tokenizer: Tokenizer = ByteTokenizer()
    colours: dict[str, Any] = {}
    if name != "tiny":
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers tokenise, one sample at a time
        tokenizer = _pretrained(transformers.AutoTokenizer.from_pretrained, name)
        settings, _ = _pretrained(ImageProcessingMixin.get_image_processor_dict, name)
        colours = {"mean": tuple(settings["image_mean"]), "std": tuple(settings["image_std"])}
    image = ImageTransform(config.vision_config.image_size, fit=stage.fit, **colours)
    return LlavaText(tokenizer, template=stage.template, max_length=max_length), image


def build_model(name: str, config: Any, stage: Stage, seed: int) -> Any:
    """The model, equal on every rank, all frozen but what its stage trains."""
    torch.manual_seed(seed)
    llava = transformers.LlavaForConditionalGeneration
    model = llava(config) if name == "tiny" else _pretrained(llava.from_pretrained, name, dtype=torch.float32)
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in stage.trains for part in path.split(".")))
    return model.train()


def _pretrained(load: Callable[..., Any], name: str, **options: Any) -> Any:
    try:
        return load(name, **options)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {name}: transformers cannot load it: {error}") from error


class SummedLoss(nn.Module):
    """A LLaVA model and its loss, which DistributedDataParallel or FSDP wraps as one."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        self.llava = llava

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        images: Tensor,
    ) -> Tensor:
        """Cross-entropy summed over the tokens that are trained on; shapes as in `Batch`, images float [n, 3, S, S].

        With positions, which begin anew with each sample of a row, a token attends to its own sample alone.
        """
        embedded = self.llava.get_input_embeddings()(input_ids)
        if len(images):
            is_image = (input_ids == self.llava.config.image_token_id)[..., None]
            embedded = embedded.masked_scatter(is_image, self.image_features(images).to(embedded.dtype))
        else:  # a gradient of nought: ranks wait for each other's parameters and gradients
            embedded = embedded + 0.0 * self.image_features(images.new_zeros(1, *images.shape[1:])).sum()
        hidden = self.llava.model(
            inputs_embeds=embedded,
            attention_mask=attention_mask if position_ids is None else None,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state
        trained = labels[:, 1:] != IGNORE_INDEX  # a token is predicted from those before it
        logits = self.llava.lm_head(hidden[:, :-1][trained])
        return cross_entropy(logits.float(), labels[:, 1:][trained], reduction="sum")

    def image_features(self, images: Tensor) -> Tensor:
        """What the language model sees of images: float [n, tokens of an image, hidden size]."""
        return torch.stack(list(self.llava.get_image_features(images, return_dict=True).pooler_output))


def count_image_tokens(config: Any, image: ImageTransform) -> int:
    """What an image counts in tokens, found without a model's memory or computing."""
    with torch.device("meta"):
        model = SummedLoss(transformers.LlavaForConditionalGeneration(config))
        return model.image_features(torch.zeros(1, *image.shape)).shape[1]


def share_out(
    model: SummedLoss, device: torch.device, *, fsdp: bool, bf16: bool
) -> DistributedDataParallel | FSDPModule:
    """The model on all ranks: copies that average their gradients, or, with `fsdp`, shares of one."""
    if not fsdp:
        device_ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model.to(device), device_ids=device_ids, gradient_as_bucket_view=True)
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in model.modules():
        if type(module).__name__.endswith("Layer"):  # of the language model, and of the vision tower
            fully_shard(module, mesh=mesh, mp_policy=precision)
    return fully_shard(model, mesh=mesh, mp_policy=precision)


def supervised(batch: Batch) -> Tensor:
    """Tokens that are trained on: int64 []."""
    assert batch.labels is not None
    return (batch.labels[:, 1:] != IGNORE_INDEX).sum()


def passes(batch: Batch, count: int) -> Iterator[tuple[Any, ...]]:
    """A batch as `count` runs of neighbouring rows, as `SummedLoss` takes them; fewer when it has fewer rows."""
    assert batch.input_ids is not None
    assert isinstance(batch.images, Tensor)
    image_rows = batch.rows[batch.image_samples]
    for rows in torch.arange(len(batch.input_ids), device=batch.input_ids.device).chunk(count):
        columns = (batch.input_ids, batch.labels, batch.attention_mask, batch.position_ids)
        images = (
            batch.images[(image_rows >= rows[0]) & (image_rows <= rows[-1])] if count > 1 else batch.images
        )
        yield *(None if column is None else column[rows] for column in columns), images


def summed_over_ranks(*values: Tensor) -> list[Tensor]:
    """Each value's sum over all ranks, float64."""
    totals = torch.stack([value.detach().double() for value in values])
    dist.all_reduce(totals)
    return list(totals)


def train_step(model: Any, batch: Batch, *, accumulate: int = 1, bf16: bool = False) -> Tensor:
    """Add a step's gradients, of all ranks and passes; its loss, the mean over the tokens of all of them.

    The gradients of the ranks are averaged. The sum over a pass's own tokens, times the world size, divided by the tokens of the whole step,
    adds up to the mean over all tokens, whoever has them: fillers, padding, lengths change nothing.
    """
    (tokens,) = summed_over_ranks(supervised(batch))
    scale = dist.get_world_size() / tokens.clamp(min=1)
    inputs = list(passes(batch, accumulate))
    total = torch.zeros_like(tokens)
    for number, values in enumerate(inputs, 1):
        with _gradients_meet(model, number == len(inputs)):
            with torch.autocast(values[0].device.type, torch.bfloat16, enabled=bf16):
                loss = model(*values) * scale
            loss.backward()
        total += loss.detach()
    return summed_over_ranks(total)[0] / dist.get_world_size()


def _gradients_meet(model: Any, now: bool) -> AbstractContextManager[Any]:
    """Whether the ranks exchange gradients in the next backward: once a step suffices."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    return nullcontext() if now or isinstance(model, FSDPModule) else model.no_sync()


@torch.no_grad()
def evaluate(model: Any, batches: DevicePrefetcher, *, accumulate: int = 1, bf16: bool = False) -> float:
    """The loss over all that is held out, each sample once; the mean over its tokens."""
    model.eval()
    losses = tokens = torch.zeros((), dtype=torch.float64, device=batches.device)
    for batch in batches:
        tokens = tokens + supervised(batch)
        for values in passes(batch, accumulate):
            with torch.autocast(values[0].device.type, torch.bfloat16, enabled=bf16):
                losses = losses + model(*values)
    batches.close()
    model.train()
    losses, tokens = summed_over_ranks(losses, tokens)
    return (losses / tokens).item()


def learning_rate(peak: float, progress: float) -> float:
    """Warm-up, then a cosine; `progress`, 0 to 1, counts samples, so that another batch size changes nothing."""
    if progress < WARM_UP:
        return peak * progress / WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def make_loader(
    arguments: argparse.Namespace, stage: Stage, split: Split, *, image_tokens: int, **fits: Any
) -> StreamingLoader:
    """The samples to train on, or those that are held out."""
    ways = dist.get_world_size() * arguments.accumulate
    size = arguments.batch_size * ways if arguments.batch_size else stage.global_batch
    if size % ways:
        raise UsageError(
            f"{dist.get_world_size()} processes x {arguments.accumulate} passes cannot share a global batch of {size}; give --batch-size"
        )
    options: dict[str, Any] = {"shuffle": None}
    if split != "validation":
        options = {"skip": arguments.skip, "group_by": None if stage.group_by == "none" else stage.group_by}
        if arguments.pack_tokens:  # exact lengths; else words, as LLaVA measures
            options |= {"pack_tokens": arguments.pack_tokens, "image_tokens": image_tokens}
    loader = StreamingLoader(
        arguments.shards,
        global_batch_size=size,
        seed=arguments.seed,
        split=split,
        validation=arguments.validation,
        exclude=arguments.exclude,
        max_errors=arguments.max_errors,
        num_workers=arguments.num_workers,
        **fits,
        **options,
    )
    if loader.samples == 0:
        raise UsageError(f"no samples{f' for {split}' if split else ''} in {' '.join(arguments.shards)}")
    return loader


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """One run of one rank: from the newest checkpoint, if there is one, to the end."""
    folder = arguments.checkpoint_dir
    for option in ("checkpoint_dir", "trace", "export"):
        if path := getattr(arguments, option):
            require_writable(path, f"--{option.replace('_', '-')}")
    if arguments.export and arguments.export.resolve() == Path(arguments.model).resolve():
        raise UsageError(
            f"--export {arguments.export} is the --model, which a run needs as it was: choose another"
        )
    stage = chosen_stage(arguments)
    config = model_config(arguments.model)
    text, image = preprocessing(arguments.model, config, stage, arguments.max_length)
    image_tokens = count_image_tokens(config, image)
    log = open_log(arguments.log, vars(arguments))

    make = partial(make_loader, arguments, stage, text=text, image=image, image_tokens=image_tokens)
    tokens = {"image_token": config.image_token_id, "tokens_per_image": image_tokens}
    prepare = partial(expand_images, **tokens, max_length=arguments.max_length)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    ahead = partial(DevicePrefetcher, device=device, dtype=dtype, prepare=prepare)
    loader = make("train" if arguments.validation else None)
    batches = ahead(loader)
    held_out = ahead(make("validation")) if arguments.validation else None

    llava = build_model(arguments.model, config, stage, arguments.seed)
    if arguments.gradient_checkpointing:
        llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = share_out(SummedLoss(llava), device, fsdp=arguments.fsdp, bf16=arguments.bf16)
    trained = [parameter for parameter in llava.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.learning_rate, weight_decay=0.0)

    identity = {"model": arguments.model, "stage": arguments.stage}
    if found := newest_checkpoint(folder, identity) if folder else None:
        loader.load_state_dict(found[1]["loader"])
    require_agreement(loader, folder)
    if found:
        load_checkpoint(found[0], llava, optimizer)

    span = Span(loader.samples, epochs=arguments.epochs or 1, steps=arguments.steps)
    progress = Progress(loader, batches, span)
    state = loader.state_dict()
    resumed = state["step"]
    computing = {"accumulate": arguments.accumulate, "bf16": arguments.bf16}
    endless = chain.from_iterable(repeat(batches))  # epoch after epoch
    while not span.is_over(state):
        before, batch = state, next(endless)
        state, step = batch.state, batch.state["step"]
        loss = train_step(model, batch, **computing).item()
        norm = nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        rate = learning_rate(stage.learning_rate, (span.share(before) + span.share(state)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

        progress.step(state, loss)
        if arguments.trace:  # before the ranks meet at a checkpoint: what is in it is in every rank's trace
            where = {"resumed": resumed, "epoch": before["epoch"], "supervised": int(supervised(batch))}
            write_trace(arguments.trace, batch, loss, **where)
        if arguments.log:
            log(progress.scalars(loss, rate, norm), step)
        if held_out is not None and span.passes(arguments.eval_every, before, state):
            validation = evaluate(model, held_out, **computing)
            progress.say(f"after step {step}: loss {validation:.4f} over what is held out")
            log({"validation/loss": validation}, step)
        if folder and span.passes(arguments.save_every, before, state):
            save_checkpoint(folder, llava, optimizer, identity | {"step": step, "loader": state})
    progress.close()
    batches.close()
    if arguments.export:
        source = None if arguments.model == "tiny" else arguments.model
        export_model(arguments.export, llava, dtype=config.dtype or torch.float32, source=source)
        progress.say(f"exported to {arguments.export}")


def join_ranks() -> torch.device:
    """Meet the processes that torchrun started, or be the only one; this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= (found := torch.cuda.device_count()):
            raise UsageError(f"a process for each GPU: there are {found} here, and more processes")
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return device


def main() -> int:
    """The exit status: 0 done, 1 the data or the run failed, 2 wrong usage, 130 interrupted."""
    arguments, rank = parse_arguments(), os.environ.get("RANK", "0")
    try:
        train(arguments, join_ranks())
    except ShardifyError as error:  # every rank says so: torchrun stops all others when one has ended
        print(f"train.py: rank {rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch says so wherever the main thread is then
            raise
        print(f"train.py: rank {rank}: {error} Was memory short?", file=sys.stderr, flush=True)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
