"""`StreamingLoader`: executes the plan of an epoch with worker processes.

The main process plans (`loaders.order`, `loaders.batching`) and owns the memory; workers fetch, tokenise and decode (`loaders.build`).
Batches come back in order. The plan runs on over the end of an epoch, so that the next one's first batches are ready when it begins.
"""

import copy
import math
import os
import queue
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader

from loaders.arguments import integer
from loaders.batch import Batch
from loaders.batching import FILLER, IntArray, PlainBatches
from loaders.build import BatchBuilder, BatchPlan, Built, ImageFit, Text, start_worker
from loaders.order import Order, Shuffle, default_lanes, make_order
from loaders.report import LoaderReport
from loaders.slabs import SlabPool
from loaders.state import State, check_state, make_state
from shardify.errors import LoaderError, UsageError
from shardify.format.samples import is_compressed
from shardify.format.shards import ShardSet, open_shards

_PLANNED_POSITIONS = 1 << 15  # evaluated at a time: large enough for numpy, small enough to begin at once
_SPARE_SLABS = 4  # for batches in the user's hands
_LOST_WORKER = "DataLoader worker (pid"  # how torch begins to say that a worker was killed or ended


@dataclass(frozen=True, slots=True)
class _Pending:
    """What the main process keeps of a batch while a worker builds it."""

    state: State  # after it
    slab: int | None
    overflowed: bool
    ends_epoch: bool


@dataclass(frozen=True, slots=True)
class _Run:
    """Workers at work, from one state on. Never taken up again after a fault: its slabs may still be written to."""

    built: Iterator[Built | LoaderError]
    pending: deque[_Pending]  # of the batches on their way, in order
    slabs: SlabPool
    process: int  # that started it


_foreign_runs: list[_Run] = []


class StreamingLoader:
    """Streams a data set as batches: every sample once an epoch, as many batches on every rank, from any position on.

    ``for batch in loader`` runs to the end of the epoch; after a ``break`` the next ``for`` continues it. A sample that cannot be read,
    tokenised or decoded becomes a filler at its position, is listed in `Batch.faults` and counted in `report()`.

    Args:
        shards: a brace pattern (``"data/{000..003}.tar"``), a folder, a manifest.json, or a list of patterns and tars.
        batch_size: samples per rank; or give `global_batch_size`.
        global_batch_size: samples over all ranks, a multiple of the world size.
        image: fits images, such as `ImageTransform`; None (default) leaves their bytes.
        text: tokenises records, such as `LlavaText`; None (default) leaves their bytes.
        shuffle: ``"block"`` (default), ``"full"`` or None for manifest order; docs/order.md describes them.
        seed: of the shuffle. Default 0.
        drop_last: leave out a short last batch instead of filling it up. Default False.
        num_workers: worker processes of this rank; 0 builds batches in this process. Default 4.
        prefetch: batches planned ahead for each worker. Default 2.
        rank: of this process; by default torch.distributed's when that is initialised, else 0.
        world_size: ranks; by default torch.distributed's, else 1.
        lanes: of the block shuffle; by default 64, or the world size when that is larger. A loaded state brings its own.
        block: neighbouring samples that the block shuffle keeps in one lane. Default 32.
        window: blocks whose samples it mixes. Default 8.

    Raises:
        UsageError: arguments that contradict each other.
        FormatError: shards that are missing or damaged.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        image: ImageFit | None = None,
        text: Text | None = None,
        shuffle: Shuffle = "block",
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 4,
        prefetch: int = 2,
        rank: int | None = None,
        world_size: int | None = None,
        lanes: int | None = None,
        block: int = 32,
        window: int = 8,
    ) -> None:
        self.rank, self.world_size = _place(rank, world_size)
        self._num_workers = integer("num_workers", num_workers, least=0)
        self._prefetch = integer("prefetch", prefetch, least=1)
        if batch_size is not None and global_batch_size is None:
            global_batch_size = integer("batch_size", batch_size, least=1) * self.world_size
        elif batch_size is not None or global_batch_size is None:
            raise UsageError("batch_size (per rank) or global_batch_size is needed, and not both")
        self._shards = _plain(open_shards(shards))
        self._image, self._text = image, text
        self._seed, self._shuffle = integer("seed", seed), shuffle
        self._block, self._window = integer("block", block), integer("window", window)
        self._batches = PlainBatches(
            length=len(self._shards.index),
            global_batch_size=integer("global_batch_size", global_batch_size, least=1),
            rank=self.rank,
            world_size=self.world_size,
            drop_last=drop_last,
        )
        if len(self._shards.index) < self.world_size:
            warnings.warn(
                f"{len(self._shards.index)} samples for {self.world_size} ranks: some ranks see fillers alone",
                stacklevel=2,
            )
        self._report = LoaderReport()
        self._run: _Run | None = None
        lanes = default_lanes(self.world_size) if lanes is None else integer("lanes", lanes)
        self._order, self._state = self._take_up(lanes, epoch=0, start=0)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        epoch: int = self._state["epoch"]
        return epoch

    def __len__(self) -> int:
        """Batches left in this epoch, the same on every rank."""
        return self._batches.count(self._state["position"])

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch."""
        if not len(self):
            self._state = _state_at(self._state, self.epoch + 1, 0, 0)
            return
        epoch = self.epoch
        while self.epoch == epoch:  # also when another iterator, or a loaded state, went on to the next one
            yield self._next_batch()

    def state_dict(self) -> State:
        """The state after the last batch handed out, as that batch's `state`: a JSON-able dict, equal on all ranks."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: State) -> None:
        """Continue from a state, also one of another world size, batch size or number of workers.

        Raises:
            StateError: a state of other shards or another order, with what differs.
        """
        check_state(state, self._state, length=self._batches.length)
        self.close()
        self._order, self._state = self._take_up(
            state["lanes"], epoch=state["epoch"], start=state["position"]
        )

    def report(self) -> LoaderReport:
        """What went wrong or was odd in the batches handed out so far, on this rank."""
        return copy.deepcopy(self._report)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_run": None}  # a copy starts workers of its own

    def close(self) -> None:
        """End the workers. The next ``for`` starts others; batches in the user's hands stay valid."""
        run, self._run = self._run, None
        if run is not None and run.process != os.getpid():
            _foreign_runs.append(run)  # a copy that fork made: ending it here would end the parent's workers
            return
        # not left to the iterator's end: a traceback may hold on to it, and collected as garbage it waits 5 s for each worker
        if run is not None and self._num_workers:
            run.built._shutdown_workers()  # type: ignore[attr-defined]  # noqa: SLF001 - torch has no public call

    def _take_up(self, lanes: int, *, epoch: int, start: int) -> tuple[Order, State]:
        settings = {"shuffle": self._shuffle, "block": self._block, "window": self._window}
        order = make_order(
            self._batches.length,
            shuffle=self._shuffle,
            seed=self._seed,
            lanes=lanes,
            block=self._block,
            window=self._window,
        )
        state = make_state(
            epoch=epoch,
            position=start,
            start=start,
            seed=self._seed,
            lanes=lanes,
            settings=settings,
            fingerprint=self._shards.fingerprint,
        )
        return order, state

    def _next_batch(self) -> Batch:
        if self._run is None or self._run.process != os.getpid():
            self.close()
            self._run = self._start()
        try:
            built = next(self._run.built)
            if isinstance(built, LoaderError):
                raise built  # noqa: TRY301 - what is caught below closes the run first
            pending = self._run.pending.popleft()
            batch = self._collate(built, pending, self._run.slabs)
            self._report.add(
                samples=int(batch.valid.sum()),
                faults=built.faults,
                notes=built.notes,
                overflowed=pending.overflowed,
            )
            self._state = pending.state
        except BaseException as error:
            # plans and batches may be out of step now: the next `for` plans anew from the last batch handed out
            self.close()
            if not str(error).startswith(_LOST_WORKER):
                raise
            # what came first names the signal
            lost = error if isinstance(error.__cause__, queue.Empty | None) else error.__cause__
            raise LoaderError(
                f"{str(lost).strip(' .')}. Was memory short? Try fewer workers, a smaller batch, or num_workers=0."
            ) from error
        return batch

    def _start(self) -> _Run:
        """Workers at work from the current state on."""
        images = self._images_per_slab()
        slabs = SlabPool(
            self._prefetch * max(self._num_workers, 1) + _SPARE_SLABS,
            0 if self._image is None else images * math.prod(self._image.shape),
        )
        pending: deque[_Pending] = deque()
        planner = _Planner(self._shards, self._order, self._batches, self._state, slabs, images, pending)
        builder = BatchBuilder(self._shards, self._image, self._text, slabs)
        workers: dict[str, Any] = {}
        if self._num_workers:
            # forked: nothing is pickled or imported again, and no semaphore name is left behind by a kill
            workers = {
                "multiprocessing_context": "fork",
                "prefetch_factor": self._prefetch,
                "worker_init_fn": partial(start_worker, parent=os.getpid()),
            }
        built: Iterator[Built | LoaderError] = iter(
            DataLoader(
                builder,  # type: ignore[arg-type]  # a data set whose keys are plans
                sampler=planner,
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=self._num_workers,
                generator=torch.Generator(),  # its own: the user's random numbers stay as they are
                **workers,
            )
        )
        slabs.pin()
        return _Run(built, pending, slabs, os.getpid())

    def _images_per_slab(self) -> int:
        """Enough for a batch of ordinary size; those with more images overflow."""
        if self._image is None:
            return 0
        size = self._batches.global_batch_size // self.world_size
        images = self._shards.index["images"][:: max(1, len(self._shards.index) // 4096)]
        most = int(images.max(initial=0))
        return size if most <= 1 else int(1.5 * size * images.mean()) + min(most, size)

    def _collate(self, built: Built, pending: _Pending, slabs: SlabPool) -> Batch:
        """Tensors over a worker's arrays, and over the slab."""
        images: torch.Tensor | list[bytes] = built.encoded
        copied = None
        if self._image is not None:
            channels, height, width = self._image.shape
            shape = (len(built.image_samples), height, width, channels)
            pixels = built.pixels
            if pending.slab is not None:
                pixels = slabs.lend(pending.slab)[: math.prod(shape)].reshape(shape)
                copied = partial(slabs.record_copy, pending.slab)
            assert pixels is not None
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        positions = torch.from_numpy(built.positions)
        input_ids = labels = attention_mask = None
        if built.input_ids is not None and built.labels is not None and built.lengths is not None:
            input_ids = torch.from_numpy(built.input_ids).to(torch.int64)
            labels = torch.from_numpy(built.labels).to(torch.int64)
            attention_mask = torch.arange(input_ids.shape[1]) < torch.from_numpy(built.lengths)[:, None]
        return Batch(
            keys=built.keys,
            positions=positions,
            valid=positions != FILLER,
            rows=torch.arange(len(positions)),
            records=built.records,
            input_ids=input_ids,
            labels=labels,
            attention_mask=attention_mask,
            images=images,
            image_samples=torch.tensor(built.image_samples, dtype=torch.int64),
            state=copy.deepcopy(pending.state),
            faults=tuple(built.faults),
            _copied=copied,
        )


@dataclass(frozen=True, slots=True)
class _Planner:
    """The plans of all batches from a state on, epoch after epoch; as a DataLoader's sampler, drawn as workers become free."""

    shards: ShardSet
    order: Order
    batches: PlainBatches
    state: State
    slabs: SlabPool
    slab_images: int  # that fit into a slab; 0 when images are not decoded
    pending: deque[_Pending]

    def __iter__(self) -> Iterator[BatchPlan]:
        epoch, start = int(self.state["epoch"]), int(self.state["start"])
        number = (self.state["position"] - start) // self.batches.global_batch_size
        chunk = max(1, _PLANNED_POSITIONS * self.batches.world_size // self.batches.global_batch_size)
        while count := self.batches.count(start):
            for first in range(number, count, chunk):
                numbers = range(first, min(first + chunk, count))
                positions = [self.batches.positions(start, n) for n in numbers]
                for n, plan in zip(numbers, self._plan(epoch, positions), strict=True):
                    last = n + 1 == count
                    after = (epoch + 1, 0, 0) if last else (epoch, self.batches.after(start, n), start)
                    yield self._with_slab(plan, _state_at(self.state, *after), ends_epoch=last)
            epoch, start, number = epoch + 1, 0, 0

    def _plan(self, epoch: int, batches: list[IntArray]) -> Iterator[BatchPlan]:
        """Where the samples of some batches lie, looked up together."""
        positions = np.concatenate(batches)
        samples = self.order.samples(epoch, positions[positions != FILLER])
        rows = self.shards.index[samples]
        shards = np.searchsorted(self.shards.starts, samples, side="right") - 1
        offsets, sizes, images = (rows[name].astype(np.int64) for name in ("offset", "size", "images"))
        end = 0
        for batch in batches:
            begin, end = end, end + int((batch != FILLER).sum())
            cut = slice(begin, end)
            yield BatchPlan(batch, shards[cut], offsets[cut], sizes[cut], images[cut])

    def _with_slab(self, plan: BatchPlan, state: State, *, ends_epoch: bool) -> BatchPlan:
        images = int(plan.images.sum()) if self.slab_images else 0
        slab = self.slabs.acquire() if 0 < images <= self.slab_images else None
        self.pending.append(_Pending(state, slab, images > 0 and slab is None, ends_epoch))
        return replace(plan, slab=slab)


def _state_at(state: State, epoch: int, position: int, start: int) -> State:
    return {**state, "epoch": epoch, "position": position, "start": start}


def _unchanged(built: Any) -> Any:
    return built


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    if (rank is None) != (world_size is None):
        raise UsageError(
            f"rank={rank}, world_size={world_size}: give both, or none to take torch.distributed's"
        )
    if rank is not None and world_size is not None:
        return integer("rank", rank), integer("world_size", world_size)
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _plain(shards: ShardSet) -> ShardSet:
    if compressed := [shard.path for shard in shards.shards if is_compressed(shard.path)]:
        raise UsageError(
            f"{compressed[0]}: the loader reads plain tars only; `shardify reshard` writes such shards from compressed ones"
        )
    return shards
