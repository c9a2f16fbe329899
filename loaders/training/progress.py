"""How far a run is, and what it tells: a bar or lines, scalars for a logger, and a trace of what each step trained on."""

import importlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from loaders.batch import Batch
from loaders.device import DevicePrefetcher
from loaders.loader import StreamingLoader
from loaders.state import State
from shardify.errors import UsageError

SECONDS_BETWEEN_LINES = 5.0  # of progress, where there is no terminal for a bar


@dataclass(frozen=True, slots=True)
class Span:
    """How long a run is.

    Attributes:
        samples: of an epoch.
        epochs: passes over them.
        steps: instead of epochs. Default None.
    """

    samples: int
    _: KW_ONLY
    epochs: int = 1
    steps: int | None = None

    def is_over(self, state: State) -> bool:
        """Whether nothing is left to do after a state."""
        return bool(state["step"] >= self.steps if self.steps else state["epoch"] >= self.epochs)

    def share(self, state: State) -> float:
        """The part of the run up to a state, from 0 to 1; of epochs it counts samples, so that another batch size changes nothing."""
        return float(
            state["step"] / self.steps if self.steps else state["samples"] / self.epochs / self.samples
        )

    def passes(self, every: int, before: State, after: State) -> bool:
        """Whether a multiple of so many steps, or the end, lies behind the one state and not behind the other; steps may be left out."""
        return self.is_over(after) or after["step"] // every > before["step"] // every


class Progress:
    """What rank 0 tells of a run: a bar, or lines where there is no terminal, and a summary.

    Args:
        loader: of the run, where it begins.
        batches: over it.
        span: of the run.
    """

    def __init__(self, loader: StreamingLoader, batches: DevicePrefetcher, span: Span) -> None:
        self._shown = dist.get_rank() == 0
        self._loader, self._batches, self._span = loader, batches, span
        state = loader.state_dict()
        self._done = span.share(state)
        self._first = self._seen = state["samples"]
        if span.is_over(state):
            self.say(f"nothing left to train: {state['step']} steps, {self._seen} samples are done")
        elif state["step"]:
            self.say(f"continuing after step {state['step']}, {self._seen} samples ({self._done:.0%})")
        bar = self._shown and sys.stderr.isatty()
        form = "{percentage:.1f} %|{bar}| {elapsed}<{remaining}{postfix}"
        self._bar = tqdm(initial=self._done, total=1.0, bar_format=form, disable=not bar)
        self._losses: list[float] = []
        self._began = self._told = time.perf_counter()

    def step(self, state: State, loss: float) -> None:
        """A step is done."""
        self._losses.append(loss)
        done = self._span.share(state)
        self._seen, self._done, more = state["samples"], done, done - self._done
        told = f"step {state['step']}, loss {loss:.3f}, {self._pace()}; loader {self._loader.stats().line()}"
        self._bar.set_postfix_str(told, refresh=False)
        self._bar.update(more)
        if self._bar.disable and time.perf_counter() - self._told > SECONDS_BETWEEN_LINES:
            self._told = time.perf_counter()
            self.say(f"{done:.1%}: {told}")

    def scalars(self, loss: float, rate: float, norm: Tensor) -> dict[str, float]:
        """What is logged of a step; every rank must call it."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        own = {"train/loss": loss, "train/learning_rate": rate, "train/gradient_norm": norm.item()}
        return own | self._loader.stats().as_scalars() | self._batches.stats().as_scalars()

    def close(self) -> None:
        """The summary, with what all ranks' loaders report.

        Raises:
            UsageError: nothing was trained on.
        """
        self._bar.close()
        counts: list[Any] = [None] * dist.get_world_size()
        report = self._batches.report()
        dist.all_gather_object(counts, (report.faults, report.notes))
        if not self._losses:
            return
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
        waited = self._batches.stats().wait / seconds
        return f"{(self._seen - self._first) / seconds:.1f} samples/s, {waited:.0%} waiting for data"


def open_log(name: str | None, settings: dict[str, Any]) -> Callable[[dict[str, float], int], Any]:
    """What takes scalars and their step: TensorBoard's writer or wandb on rank 0, nothing elsewhere.

    Raises:
        UsageError: it is not installed.
    """
    if name is None:
        return lambda scalars, step: None  # noqa: ARG005 - as the others
    try:
        module: Any = importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except ImportError as error:
        raise UsageError(f"--log {name}: it is not installed; pip install {name}") from error
    if dist.get_rank() != 0:
        return lambda scalars, step: None  # noqa: ARG005
    if name == "wandb":
        run = module.init(config={key: str(value) for key, value in settings.items()})
        return lambda scalars, step: run.log(scalars, step=step)
    writer = module.SummaryWriter()

    def write(scalars: dict[str, float], step: int) -> None:
        for key, value in scalars.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


def write_trace(folder: Path, batch: Batch, loss: float, **facts: int) -> None:
    """A line of JSON for one step, in rank*.jsonl: the valid samples of this rank, the loss of all ranks, and other facts."""
    valid = batch.valid.nonzero().flatten().tolist()
    line = facts | {
        "step": batch.state["step"],
        "world_size": dist.get_world_size(),
        "positions": batch.positions[valid].tolist(),
        "keys": [batch.keys[sample] for sample in valid],
        "loss": loss,
    }
    with (folder / f"rank{dist.get_rank()}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
