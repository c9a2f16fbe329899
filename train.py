"""Train LLaVA on shards.

    torchrun --nproc-per-node 2 train.py --shards 'data/{000..007}.tar' --checkpoint-dir checkpoints

The same command again, with any number of processes, continues from the newest checkpoint: an epoch still has every sample once. The
default model, ``tiny``, is made from a configuration and needs no download.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.image_processing_base import ImageProcessingMixin

from loaders import Batch, ImageTransform, LlavaText, StreamingLoader
from loaders.text import IGNORE_INDEX, IMAGE_TOKEN, ByteTokenizer, Tokenizer
from shardify.errors import ShardifyError, StateError, UsageError

TINY_LEARNING_RATE = 3e-3
WARM_UP = 0.03  # of all samples; then a cosine down to nothing
MAX_GRADIENT_NORM = 1.0
CHECKPOINTS_KEPT = 2
CHECKPOINT_PARTS = ("step", "parameters", "optimizer", "loader")
SECONDS_BETWEEN_LINES = 5.0  # of progress, where there is no terminal for a bar


class CheckpointError(ShardifyError):
    """A checkpoint that cannot be written, read, or continued."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What sets one of LLaVA-1.5's two stages apart."""

    template: str
    fit: Literal["crop", "pad"]
    learning_rate: float
    trains: tuple[str, ...]  # parts of the model; all else is frozen


STAGES = {
    "pretrain": Stage("plain", "crop", 1e-3, ("multi_modal_projector",)),
    "finetune": Stage("v1", "pad", 2e-5, ("multi_modal_projector", "language_model", "lm_head")),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; wrong usage ends the program with status 2."""
    parser = argparse.ArgumentParser(
        description="Train LLaVA on shards.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--shards", nargs="+", required=True, help="a pattern ('data/{000..007}.tar'), a folder, or tars")
    add("--stage", choices=STAGES, default="finetune", help="train the projector; or the language model, too")
    add("--model", default="tiny", help="tiny, or the name or path of a LLaVA model that transformers loads")
    add("--batch-size", type=_positive, default=16, help="samples per process and step")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_positive, default=3, help="passes over the data")
    length.add_argument("--steps", type=_positive, help="steps, instead of --epochs")
    add(
        "--lr",
        type=_positive_float,
        help=f"its peak; None: pretrain 1e-3, finetune 2e-5, tiny {TINY_LEARNING_RATE}",
    )
    add("--max-length", type=_positive, default=2048, help="tokens of a sample, those of its images included")
    add("--checkpoint-dir", type=Path, help="where checkpoints go; the newest one there is continued from")
    add("--save-every", type=_positive, default=500, help="steps between checkpoints")
    add("--num-workers", type=int, default=2, help="processes that load data for each training process")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--trace", type=Path, metavar="DIR", help="write what each step trains on to DIR/rank*.jsonl")
    add("--seed", type=int, default=0, help="of the order of samples, and of the tiny model")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


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
    return model


def _pretrained(load: Callable[..., Any], name: str, **options: Any) -> Any:
    try:
        return load(name, **options)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {name}: transformers cannot load it: {error}") from error


class SummedLoss(nn.Module):
    """A LLaVA model and its loss, which DistributedDataParallel wraps as one."""

    def __init__(self, llava: Any) -> None:
        super().__init__()
        self.llava = llava

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, images: Tensor) -> Tensor:
        """Cross-entropy summed over the tokens that are trained on; shapes as in `Inputs`, images float [n, 3, S, S]."""
        logits = self.llava(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=images if len(images) else None,
            use_cache=False,
        ).logits
        trained = labels[:, 1:] != IGNORE_INDEX  # a token is predicted from those before it
        loss = cross_entropy(logits[:, :-1][trained].float(), labels[:, 1:][trained], reduction="sum")
        if len(images) == 0:  # a gradient of nought: ranks wait for each other's gradients of every parameter
            loss = loss + 0.0 * self.image_features(images.new_zeros(1, *images.shape[1:])).sum()
        return loss

    def image_features(self, images: Tensor) -> Tensor:
        """What the language model sees of images: float [n, tokens of an image, hidden size]."""
        return torch.stack(list(self.llava.get_image_features(images, return_dict=True).pooler_output))


@dataclass(frozen=True, slots=True)
class Inputs:
    """The text of a batch as transformers' model wants it, and which of the batch's images it refers to."""

    input_ids: Tensor  # int64 [B, L], an image token for each feature of an image
    labels: Tensor  # int64 [B, L], -100 where nothing is trained on
    attention_mask: Tensor  # bool [B, L]
    images: Tensor  # int64 [n], in the order of their tokens

    def supervised(self) -> Tensor:
        """Tokens of each row that are trained on: int64 [B]."""
        return (self.labels[:, 1:] != IGNORE_INDEX).sum(1)


def expand(batch: Batch, *, image_token: int, tokens_per_image: int, max_length: int) -> Inputs:
    """Replace each -200 by as many image tokens as an image has features.

        tokens of a row     images     with 3 features an image
        1 -200 7 8          a          1 I I I 7 8               a
        1 -200 9            b c        1 I I I 9 padding         b; no token asks for c

    A row longer than `max_length` is cut there, or before the image that this would cut in two; images behind the cut are left out.
    """
    assert batch.input_ids is not None
    assert batch.labels is not None
    assert batch.attention_mask is not None
    rows, images = [], []
    for row, columns in enumerate(zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True)):
        is_image = columns[0] == IMAGE_TOKEN
        repeats = torch.where(is_image, tokens_per_image, 1)
        kept = repeats.cumsum(0) <= max_length
        rows.append([column[kept].repeat_interleave(repeats[kept]) for column in columns])
        images.append((batch.image_samples == row).nonzero().flatten()[: int((is_image & kept).sum())])
    input_ids, labels, attention_mask = (
        pad_sequence(list(column), batch_first=True, padding_value=padding)
        for column, padding in zip(zip(*rows, strict=True), (0, IGNORE_INDEX, False), strict=True)
    )
    # where a text without image says "<image>", a tokenizer that has this token writes it; the model would look for an image
    written = input_ids == image_token
    labels[written | (input_ids == IMAGE_TOKEN)] = IGNORE_INDEX
    input_ids[written] = 0
    input_ids[input_ids == IMAGE_TOKEN] = image_token
    length = int(attention_mask.any(0).nonzero().max()) + 1  # rows that grew may not have been the longest
    return Inputs(
        input_ids[:, :length], labels[:, :length], attention_mask[:, :length], images=torch.cat(images)
    )


def step_loss(
    model: nn.Module, batch: Batch, inputs: Inputs, image: ImageTransform, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The loss of a step over all ranks: what to call `backward` on, and its value, the mean over the tokens of all ranks.

    DistributedDataParallel averages the gradients of the ranks. The sum over a rank's own tokens, times the world size, divided by the
    tokens of all ranks, averages to the mean over all tokens, whichever rank has them: fillers, padding, lengths change nothing.
    """
    images = batch.to(device).images
    assert isinstance(images, Tensor)
    loss = model(
        inputs.input_ids.to(device),
        inputs.labels.to(device),
        inputs.attention_mask.to(device),
        image.normalize(images[inputs.images.to(device)], torch.float32),
    )
    total, tokens = totals = torch.stack([loss.detach(), inputs.supervised().sum().to(loss)]).double()
    dist.all_reduce(totals)
    tokens.clamp_(min=1)
    return loss * (dist.get_world_size() / tokens), total / tokens


def learning_rate(peak: float, progress: float) -> float:
    """Warm-up, then a cosine; `progress`, 0 to 1, counts samples, so that another batch size changes nothing."""
    if progress < WARM_UP:
        return peak * progress / WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def samples_seen(state: dict[str, Any]) -> int:
    """Samples of all epochs up to a state of the loader."""
    return int(state["samples"])


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


def save_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, whole or, when killed meanwhile, not at all; drop the oldest.

    Raises:
        CheckpointError: it cannot be written, the disk being full, say.
    """
    path = folder / f"step-{content['step']:09d}.pt"
    try:
        with (folder / "unfinished.tmp").open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(file.name, path)
        directory = os.open(folder, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        for old in sorted(folder.glob("step-*.pt"))[:-CHECKPOINTS_KEPT]:
            old.unlink()
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def load_checkpoint(folder: Path, identity: dict[str, str]) -> dict[str, Any] | None:
    """The newest checkpoint in a folder that all ranks see, if there is one; it must be of this model and stage."""
    newest = max(folder.glob("step-*.pt"), default=None)
    if newest is None:
        return None
    try:
        content: dict[str, Any] = torch.load(newest, map_location="cpu", weights_only=True)
        missing = [name for name in (*identity, *CHECKPOINT_PARTS) if name not in content]
    except Exception as error:
        raise CheckpointError(
            f"{newest} cannot be read ({type(error).__name__}: {error}); delete it to continue from the one before"
        ) from error
    if missing:
        raise CheckpointError(f"{newest} is no checkpoint of train.py: {', '.join(missing)} missing")
    for name, value in identity.items():
        if content[name] != value:
            raise CheckpointError(
                f"{newest} has --{name} {content[name]}, not {value}; choose another --checkpoint-dir"
            )
    return content


def require_agreement(loader: StreamingLoader, step: int) -> None:
    """All ranks must begin at the same step, over the same shards: else they would repeat data, and wait for each other for ever.

    Raises:
        StateError: they do not, with what each rank has.
    """
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (step, len(loader), loader.state_dict()))
    if any(rank != ranks[0] for rank in ranks):
        told = "; ".join(
            f"rank {rank} is at step {at}, with {left} batches left of {state['fingerprint']['samples']} samples"
            f" in {state['fingerprint']['shards']} shards ({state['fingerprint']['digest'][:8]})"
            for rank, (at, left, state) in enumerate(ranks)
        )
        raise StateError(f"the ranks do not see the same shards and checkpoints: {told}")


def write_trace(folder: Path, batch: Batch, inputs: Inputs, **where: int) -> None:
    """A line for one step of this rank: its valid samples, and how many tokens of each are trained on."""
    valid = batch.valid.nonzero().flatten().tolist()
    line = where | {
        "positions": batch.positions[valid].tolist(),
        "keys": [batch.keys[sample] for sample in valid],
        "supervised": inputs.supervised()[valid].tolist(),
    }
    with (folder / f"rank{dist.get_rank()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class Progress:
    """What rank 0 tells of a run: a bar, or lines where there is no terminal, and a summary."""

    def __init__(self, seen: int, total: int) -> None:
        self._shown = dist.get_rank() == 0
        bar = self._shown and sys.stderr.isatty()
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(initial=seen, total=total, bar_format=form, disable=not bar)
        self._first = self._seen = seen
        self._losses: list[float] = []
        self._waited = 0.0
        self._began = self._told = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there is time spent waiting for data."""
        self._began = asked = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def step(self, step: int, seen: int, loss: float) -> None:
        """A step is done, the run's `step`-th."""
        self._losses.append(loss)
        self._seen, more = seen, seen - self._seen
        self._bar.set_postfix_str(f"loss {loss:.3f}, {self._pace()}", refresh=False)
        self._bar.update(more)
        if self._bar.disable and time.perf_counter() - self._told > SECONDS_BETWEEN_LINES:
            self._told = time.perf_counter()
            self.say(f"step {step}: {seen} of {self._bar.total} samples, loss {loss:.3f}, {self._pace()}")

    def close(self, loader: StreamingLoader) -> None:
        """The summary, with what all ranks' loaders report.

        Raises:
            UsageError: nothing was trained on.
        """
        self._bar.close()
        counts: list[Any] = [None] * dist.get_world_size()
        report = loader.report()
        dist.all_gather_object(counts, (report.faults, report.notes))
        tenth = math.ceil(len(self._losses) / 10)
        first, last = (sum(part) / tenth for part in (self._losses[:tenth], self._losses[-tenth:]))
        if not any(self._losses):
            reasons: Counter[str] = sum((found for count in counts for found in count), Counter())
            told = ", ".join(f"{code} {count}" for code, count in reasons.most_common(3))
            raise UsageError(
                f"no token of any sample was trained on ({told or 'no answer in the conversations'})"
            )
        self.say(f"done: {len(self._losses)} steps, {self._seen - self._first} samples, {self._pace()}")
        self.say(f"loss: {first:.3f} in the first tenth of the steps, {last:.3f} in the last")
        for what, found in zip(("left out", "noted"), zip(*counts, strict=True), strict=True):
            for code, count in sorted(sum(found, Counter()).items()):
                self.say(f"{what}: {count} samples: {code}")

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self._shown:
            print(text, flush=True)

    def _pace(self) -> str:
        seconds = time.perf_counter() - self._began
        return f"{(self._seen - self._first) / seconds:.1f} samples/s, {self._waited / seconds:.0%} waiting for data"


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """One run of one rank: from the newest checkpoint, if there is one, to the end."""
    stage, folder = STAGES[arguments.stage], arguments.checkpoint_dir
    for option, path in (("--checkpoint-dir", folder), ("--trace", arguments.trace)):
        if path:
            require_writable(path, option)
    config = model_config(arguments.model)
    text, image = preprocessing(arguments.model, config, stage, arguments.max_length)
    loader = StreamingLoader(
        arguments.shards,
        batch_size=arguments.batch_size,
        image=image,
        text=text,
        seed=arguments.seed,
        num_workers=arguments.num_workers,
    )
    llava = build_model(arguments.model, config, stage, arguments.seed).to(device)
    peak = (
        arguments.lr
        if arguments.lr is not None
        else (TINY_LEARNING_RATE if arguments.model == "tiny" else stage.learning_rate)
    )
    trained = [parameter for parameter in llava.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0)

    step = first_step = 0
    identity = {"model": arguments.model, "stage": arguments.stage}
    if folder and (saved := load_checkpoint(folder, identity)):
        llava.load_state_dict(saved["parameters"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        step = first_step = saved["step"]
    require_agreement(loader, step)
    state = loader.state_dict()
    seen = samples_seen(state)
    total = arguments.epochs * state["fingerprint"]["samples"]
    if arguments.steps:
        total = seen + (arguments.steps - step) * dist.get_world_size() * arguments.batch_size
    progress = Progress(seen, total)
    if state["fingerprint"]["samples"] == 0:
        raise UsageError(f"no samples in {' '.join(arguments.shards)}")
    if seen >= total:
        progress.say(f"nothing left to train: {step} steps, {seen} samples are done")
        return
    if step:
        progress.say(f"continuing after step {step}, {seen} of {total} samples")

    model = SummedLoss(llava)
    with torch.no_grad():
        tokens_per_image = model.image_features(torch.zeros(1, *image.shape, device=device)).shape[1]
    device_ids = [device.index] if device.type == "cuda" else None
    ranks = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    for batch in progress.timed(chain.from_iterable(repeat(loader))):  # epoch after epoch
        step += 1
        inputs = expand(
            batch,
            image_token=config.image_token_id,
            tokens_per_image=tokens_per_image,
            max_length=arguments.max_length,
        )
        if arguments.trace:  # before the ranks meet: what is in a checkpoint is in every rank's trace
            where = {"resumed": first_step, "step": step, "epoch": state["epoch"]}
            write_trace(arguments.trace, batch, inputs, world_size=dist.get_world_size(), **where)
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            loss, mean = step_loss(ranks, batch, inputs, image, device)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        before, state = seen, batch.state
        seen = samples_seen(state)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, (before + seen) / 2 / total)
        optimizer.step()
        optimizer.zero_grad()
        progress.step(step, seen, mean.item())
        finished = step == arguments.steps if arguments.steps else seen >= total
        if folder and dist.get_rank() == 0 and (finished or step % arguments.save_every == 0):
            parts = {"parameters": llava.state_dict(), "optimizer": optimizer.state_dict(), "loader": state}
            save_checkpoint(folder, identity | parts | {"step": step})
        if finished:
            break
    progress.close(loader)
    loader.close()


def join_ranks() -> torch.device:
    """Meet the processes that torchrun started, or be the only one; this process's device."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return device


def main() -> int:
    """The exit status: 0 done, 1 the data or the run failed, 2 wrong usage, 130 interrupted."""
    arguments = parse_arguments()
    device = join_ranks()
    try:
        train(arguments, device)
    except ShardifyError as error:  # every rank says so: torchrun stops all others when one has ended
        print(f"train.py: rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not str(error).startswith(
            "DataLoader worker"
        ):  # torch says so wherever the main thread is just then
            raise
        print(f"train.py: rank {dist.get_rank()}: {error} Was memory short?", file=sys.stderr, flush=True)
        return 1
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
