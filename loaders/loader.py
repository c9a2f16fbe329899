"""`StreamingLoader`: executes the plan of an epoch with worker processes.

The main process plans (`loaders.plan`) and owns the memory; workers fetch, tokenise and decode (`loaders.build`). Batches come back in
order. The plan runs on over the end of an epoch, so that the next one's first batches are ready when it begins.
"""

import atexit
import copy
import math
import os
import queue
import signal
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from loaders.arguments import integer, seconds
from loaders.batch import Batch, SampleFault
from loaders.batching import FILLER, Cursor, GroupBy, make_batching
from loaders.build import BatchBuilder, BatchPlan, Built, ImageFit, Text, Transform
from loaders.collate import collate
from loaders.dataset import described, open_dataset
from loaders.fetch import RemoteFetch
from loaders.lengths import token_lengths, word_lengths
from loaders.mixture import Mixture
from loaders.order import OrderSettings, Shuffle, default_lanes
from loaders.place import ProcessGroup, place_of
from loaders.plan import Measure, PlannedBatch, Planner
from loaders.policy import ErrorPolicy, OnError
from loaders.report import LoaderReport
from loaders.slabs import SlabPool
from loaders.state import (
    State,
    check_state,
    current_run,
    fresh,
    make_state,
    merged,
    skipped_from,
    taken_up,
    with_cursor,
)
from loaders.stats import LoaderStats, StatsRecorder
from loaders.subset import Split
from loaders.tiles import count_tiles, ordinary_bytes
from loaders.unnamed import UnnamedContext
from loaders.worker import Stacks, Watch, end_processes, start_worker
from shardify.errors import LoaderError, UsageError
from shardify.format.child import will_fork

_SPARE_SLABS = 4  # for batches in the user's hands
_SLAB_MARGIN = 1.3  # over a batch of ordinary size
_LEAST_AHEAD, _MOST_AHEAD = 16, 1024  # batches
_LOST_WORKER = "DataLoader worker (pid"  # how torch begins to say that a worker was killed or ended


@dataclass(frozen=True, slots=True)
class _Pending:
    """What the main process keeps of a batch while a worker builds it."""

    number: int
    state: State  # after it
    slab: int | None
    has_images: bool


@dataclass(slots=True)
class _Run:
    """Workers at work, from one state on. Never taken up again after a fault: its slabs may still be written to."""

    built: Iterator[Built | LoaderError]
    pending: deque[_Pending]  # of the batches on their way, in order
    slabs: SlabPool
    remote: RemoteFetch
    stacks: Stacks
    watch: Watch | None
    process: int  # that started it


_foreign_runs: list[_Run] = []
_running: "weakref.WeakSet[StreamingLoader]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before multiprocessing's own end, which sends SIGTERM to workers, who leave that to their parent, and waits for them for ever."""
    for loader in list(_running):
        with suppress(Exception):
            loader.close()


class StreamingLoader:
    """Streams a data set, or a mixture of several, as batches: exact, elastic, and as fast as pictures can be decoded.

    ``for batch in loader`` runs to the end of the epoch; after a ``break`` the next ``for`` continues it. Every sample comes once an
    epoch (a mixture's as often as it says), every rank gets as many batches, and a state continues under any other world size, batch
    size and number of workers. A sample that cannot be read, tokenised or decoded becomes a filler at its position, is listed in
    `Batch.faults` and counted in `report()`.

    Args:
        shards: a brace pattern (``"data/{000..003}.tar"``), a folder, a manifest.json, a list of patterns and tars, or a `Mixture`; local
            paths, or URLs (``s3://``, ``gs://``, ``az://``, ``https://``, ``hf://datasets/...``).
        batch_size: samples per rank (rows, with `pack_tokens`; at most so many with `max_tokens` or `max_tiles`); or give
            `global_batch_size`.
        global_batch_size: over all ranks, a multiple of the world size.
        image: fits images, such as `ImageTransform`; None (default) leaves their bytes.
        text: tokenises records, such as `LlavaText`; None (default) leaves their bytes.
        transform: called with every `Sample` and a numpy generator keyed by (seed, epoch, position), before tokens and pixels are made.
        shuffle: ``"block"`` (default), ``"full"`` or None for manifest order; docs/order.md describes them.
        seed: of the shuffle and the transform. Default 0.
        group_by: ``"modality"`` (a global batch has images, or has none), ``"length"`` (lengths balanced over ranks) or
            ``"modality_length"`` (both, as LLaVA trains). Default None.
        pack_tokens: pack samples into rows of at most so many tokens. Default None.
        image_tokens: what an image counts in tokens, such as 576 for LLaVA-1.5. Default 1.
        max_tokens: most tokens of one rank's batch, padding included: its size then varies. Default None.
        max_tiles: most images of one rank's batch, counted as the tiles that they are cut into. Default None.
        plan_window: samples that are grouped or packed together. Default 16,384.
        drop_last: leave out a short last batch instead of filling it up. Default False.
        split: ``"train"`` or ``"validation"``: samples on one side only, by the hashes of their images. Default None, all.
        validation: fraction of the samples on the validation side. Default 0.01.
        max_samples: take so many, the same ones always. Default None, all.
        exclude: a file of ids, URLs and image hashes; samples it names become fillers. Default None.
        num_workers: worker processes of this rank; 0 builds batches in this process. Default 4.
        prefetch: batches planned ahead for each worker. Default 2.
        rank: of this process; by default torch.distributed's when that is initialised, else 0.
        world_size: ranks; by default torch.distributed's, else 1.
        process_group: the ranks that share the data, where they are not all: a torch process group, or a one-dimensional device mesh.
        lanes: of the block shuffle; by default 64, or the world size when that is larger. A loaded state brings its own.
        block: neighbouring samples that the block shuffle keeps in one lane. Default 32.
        window: blocks whose samples it mixes. Default 8.
        on_error: ``"skip"`` (default) makes bad samples fillers, ``"raise"`` ends the run at the first one.
        max_errors: end the run when there are more bad samples on this rank, since this loader was made: as a count, or as a rate (a
            float below 1) of those handed out. Default None, any number.
        timeout: seconds that a batch, or a sample's bytes, may take. Default 300.
        skip: steps to be left out, as (from, to) pairs, `to` excluded; the state says so.
        cache_dir: where blocks of remote shards are kept, for all ranks of the node and the next run: on a disk of the node, not on a file
            system that nodes share. Default None, a temporary folder.
        cache_size: bytes that it may hold. Default None: what the data needs, at most half of what is free there (and 64 GB, when it is
            temporary).

    Raises:
        UsageError: arguments that contradict each other.
        FormatError: shards that are missing or damaged.
        SourceError: the exclusion list cannot be read.
        PackError: an object store cannot be reached, or refuses.
        LoaderError: from iteration: a worker ended or hangs, bytes cannot be had in time, or there are more bad samples than are borne.
    """

    def __init__(
        self,
        shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mixture,
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        image: ImageFit | None = None,
        text: Text | None = None,
        transform: Transform | None = None,
        shuffle: Shuffle = "block",
        seed: int = 0,
        group_by: GroupBy | None = None,
        pack_tokens: int | None = None,
        image_tokens: int = 1,
        max_tokens: int | None = None,
        max_tiles: int | None = None,
        plan_window: int = 16_384,
        drop_last: bool = False,
        split: Split = None,
        validation: float = 0.01,
        max_samples: int | None = None,
        exclude: str | os.PathLike[str] | None = None,
        num_workers: int = 4,
        prefetch: int = 2,
        rank: int | None = None,
        world_size: int | None = None,
        process_group: ProcessGroup = None,
        lanes: int | None = None,
        block: int = 32,
        window: int = 8,
        on_error: OnError = "skip",
        max_errors: float | None = None,
        timeout: float = 300.0,
        skip: Sequence[tuple[int, int]] = (),
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | None = None,
    ) -> None:
        will_fork()  # also where the rank itself was forked
        self.rank, self.world_size = place_of(rank, world_size, process_group)
        self._num_workers = integer("num_workers", num_workers, least=0)
        self._prefetch = integer("prefetch", prefetch, least=1)
        self._image, self._text, self._transform = image, text, transform
        self._seed, self._shuffle = integer("seed", seed), shuffle
        self._block, self._window = integer("block", block, least=1), integer("window", window, least=1)
        self._policy = ErrorPolicy(on_error, max_errors)
        self._timeout = seconds("timeout", timeout)
        self._skip = stretches(skip)
        self._cache_dir, self._cache_size = cache_dir, cache_size
        self._data = {
            "shards": described(shards),
            "split": split,
            "validation": str(validation),
            "max_samples": max_samples,
            "exclude": None if exclude is None else os.fspath(exclude),
        }
        self._dataset = open_dataset(
            shards,
            split=split,
            validation=validation,
            max_samples=max_samples,
            exclude=exclude,
            block=1 if shuffle == "full" else self._block,
        )
        # by its content: the file may be another one tomorrow
        self._data["exclusions"] = self._dataset.exclusions
        self._drop_last = bool(drop_last)
        self._global_batch_size = _global_batch_size(
            batch_size,
            global_batch_size,
            self.world_size,
            budget=max_tokens is not None or max_tiles is not None,
        )
        self._make_batching = partial(
            make_batching,
            global_batch_size=self._global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            drop_last=self._drop_last,
            group_by=group_by,
            pack_tokens=pack_tokens,
            max_tokens=max_tokens,
            max_tiles=max_tiles,
            plan_window=plan_window,
        )
        self._packed = pack_tokens is not None
        exact = pack_tokens is not None or max_tokens is not None
        if not exact:
            self._lengths = word_lengths(self._dataset, image_tokens=image_tokens)
        elif text is None:
            raise UsageError("pack_tokens and max_tokens count tokens, which text= makes")
        else:
            self._lengths = token_lengths(self._dataset, text, image_tokens=image_tokens)
        by_length = max_tiles is not None or group_by in ("length", "modality_length")
        self._length_settings = _length_settings(by_length, text if exact else None, image_tokens)
        self._measure: Measure = self._lengths.measure
        if max_tiles is not None and image is not None and image.is_tiled:
            tiles = count_tiles(self._dataset, image)
            self._measure = tiles.instead_of_images(self._measure)
            self._length_settings["tiles"] = image.fingerprint
        self._max_tiles = max_tiles
        if warning := self._few():
            warnings.warn(warning, stacklevel=2)
        self._report = LoaderReport()
        self._stats = StatsRecorder()
        self._run: _Run | None = None
        lanes = default_lanes(self.world_size) if lanes is None else integer("lanes", lanes)
        self._planner = self._plan(lanes)
        self._state = self._planner.without_skipped(self._first_state(lanes))

    @property
    def image(self) -> ImageFit | None:
        """What fits the images; None when they stay encoded."""
        return self._image

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        epoch: int = self._state["epoch"]
        return epoch

    @property
    def samples(self) -> int:
        """Samples of this epoch, of all ranks."""
        return self._planner.order(self._state).length

    def __len__(self) -> int:
        """Batches left in this epoch, the same on every rank.

        With groups, packs or a budget the first call in an epoch plans all of it: a second for a million samples.
        """
        return self._planner.count(self._state)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of this epoch."""
        if self._planner.is_over(self._state):
            self.close()  # the plan that its workers follow may end with the second of two such epochs
            self._state = self._planner.without_skipped(self._planner.next_epoch(self._state))
            return
        epoch = self.epoch
        while self.epoch == epoch:  # also when another iterator, or a loaded state, went on to the next one
            yield self._next_batch()

    def state_dict(self) -> State:
        """The state after the last batch handed out, as that batch's `state`: a JSON-able dict, equal on all ranks."""
        return fresh(self._state)

    def load_state_dict(self, state: State) -> None:
        """Continue from a state, also one of another world size, batch size or number of workers.

        Shards may have been added to the data set since: the epoch in progress is finished without them. A mixture may have other parts
        and other shares: each part goes on where it was.

        Raises:
            StateError: a state of other shards or another order, with what differs.
        """
        check_state(state, self._state)
        state = copy.deepcopy(dict(state))
        planner = self._plan(state["lanes"])
        taken = planner.take_up(state)
        cursor = Cursor(0) if taken.anew else Cursor.from_state(state)
        run = self._shape()
        other_data = (
            state["fingerprint"] != self._dataset.fingerprint
            or state["data"].get("exclusions") != self._dataset.exclusions
        )
        state["data"] = self._data
        if taken.anew or current_run(state) != run or other_data:
            state |= {"parts": taken.parts, "fingerprint": self._dataset.fingerprint}
            state = taken_up(with_cursor(state, planner.batching.take_up(cursor)), run)
        state["skipped"] = skipped_from(state, self._skip)
        state = planner.without_skipped(state)
        self.close()
        self._planner, self._state = planner, state

    def report(self) -> LoaderReport:
        """What went wrong or was odd in the batches handed out so far, on this rank."""
        return copy.deepcopy(self._report)

    def leave_out(self, faults: Sequence[SampleFault]) -> None:
        """Count samples that turned out bad after their batch was handed out, such as those that the device could not decode.

        Raises:
            LoaderError: as `on_error` and `max_errors` say.
        """
        self._report.leave_out(faults)
        self._policy.judge(faults, self._report)

    def stats(self) -> LoaderStats:
        """How fast the batches handed out so far came, and what the time went into, on this rank."""
        if self._run is not None:
            self._take_counts(self._run)
        return self._stats.stats()

    def _take_counts(self, run: _Run) -> None:
        if run.remote.is_needed:
            self._stats.counted(run.remote.counters.snapshot())

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_run": None}  # a copy starts workers of its own

    def close(self) -> None:
        """End the workers. The next ``for`` starts others; batches in the user's hands stay valid."""
        run, self._run = self._run, None
        if run is None:
            return
        if run.process != os.getpid():
            _foreign_runs.append(run)  # a copy that fork made: ending it here would end the parent's workers
            return
        self._take_counts(run)
        if run.watch is not None:
            run.watch.close()
        try:
            run.remote.close()  # first: workers that wait for blocks wait no more
        finally:
            # not left to the iterator's end: a traceback may hold on to it, and collected as garbage it waits 5 s for each worker
            if self._num_workers:
                processes = [worker for worker in run.built._workers if worker.is_alive()]  # type: ignore[attr-defined]  # noqa: SLF001 - torch has no public names
                run.built._shutdown_workers()  # type: ignore[attr-defined]  # noqa: SLF001
                end_processes([worker.pid for worker in processes if worker.is_alive()])
            run.stacks.close()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def _plan(self, lanes: int) -> Planner:
        settings = OrderSettings(self._shuffle, self._seed, lanes, self._block, self._window)
        settings.order(0)  # which looks at its arguments
        course = self._dataset.course(settings)
        # a batching of its own: it remembers what it has computed, and that is of one order and one mixture
        batching = self._make_batching()
        return Planner(self._dataset, course, batching, self._measure, self._seed, self._skip)

    def _shape(self) -> dict[str, Any]:
        """What of this run decides which batch holds what."""
        return {
            "global_batch_size": self._global_batch_size,
            "world_size": self.world_size,
            "drop_last": self._drop_last,
        }

    def _few(self) -> str:
        """What to say of a data set too small for its batches; empty when it is not."""
        samples, size = len(self._dataset), self._global_batch_size
        if not samples:
            return "there are no samples: no batch will come"
        if self._drop_last and not self._packed and size is not None and samples < size:
            return f"{samples} samples, fewer than a global batch of {size}: drop_last leaves no full batch"
        if samples < self.world_size:
            return f"{samples} samples for {self.world_size} ranks: some ranks see fillers alone"
        return ""

    def _first_state(self, lanes: int) -> State:
        return make_state(
            seed=self._seed,
            lanes=lanes,
            settings={
                "shuffle": self._shuffle,
                "block": self._block,
                "window": self._window,
                **self._planner.batching.settings,
                **self._length_settings,
            },
            parts=self._planner.course.first_parts(),
            fingerprint=self._dataset.fingerprint,
            data=self._data,
            run=self._shape(),
            skipped=self._skip,
        )

    def _next_batch(self) -> Batch:
        if self._run is None or self._run.process != os.getpid():
            self.close()
            self._run = self._start()
            _running.add(self)
        run = self._run
        try:
            ready = _ready(run.built)
            begin = time.perf_counter()
            built = self._wait(run)
            waited = time.perf_counter() - begin
            pending = run.pending.popleft()
            run.remote.done(pending.number)
            batch = collate(
                built,
                state=fresh(pending.state),
                image=self._image,
                pad_token_id=None if self._text is None else self._text.pad_token_id,
                packed=self._packed,
                slab=pending.slab,
                slabs=run.slabs,
            )
            self._take_counts(run)
            self._account(built, pending, waited=waited, ready=ready)
            self._state = pending.state
        except BaseException:
            # plans and batches may be out of step now: the next `for` plans anew from the last batch handed out
            self.close()
            raise
        return batch

    def _wait(self, run: _Run) -> Built:
        """The next batch as a worker has built it.

        Raises:
            LoaderError: it cannot be built, or a worker ended.
        """
        if run.watch is not None:
            run.watch.begin()
        try:
            built = next(run.built)
        except EOFError as error:  # all of them have ended
            raise _explained(_how_ended(run.built), run) from error
        except RuntimeError as error:
            if not str(error).startswith(_LOST_WORKER):
                raise
            raise _explained(str(_first(error)), run) from error
        if run.watch is not None:
            run.watch.end()
        if isinstance(built, LoaderError):
            raise built
        run.remote.check()
        return built

    def _account(self, built: Built, pending: _Pending, *, waited: float, ready: int) -> None:
        """Count a batch, and end the run when too many samples are bad."""
        overflowed = pending.has_images and built.memory is not None
        self._report.add(
            samples=int(np.count_nonzero(built.positions != FILLER)),
            faults=built.faults,
            notes=built.notes,
            excluded=built.excluded,
            overflowed=overflowed,
        )
        assert built.stats is not None
        self._stats.add(built.stats, waited=waited, ready=ready, overflowed=overflowed)
        self._policy.judge(built.faults, self._report)

    def _start(self) -> _Run:
        """Workers at work from the current state on."""
        dataset = self._dataset
        slabs = SlabPool(self._prefetch * max(self._num_workers, 1) + _SPARE_SLABS, self._slab_size())
        remote = RemoteFetch(
            dataset.paths,
            [shard.sidecar for shard in dataset.files],
            [shard.bytes for shard in dataset.files],
            [shard.xxh3_128 for shard in dataset.files],
            cache_dir=self._cache_dir,
            cache_size=self._cache_size,
            timeout=self._timeout,
        )
        stacks = Stacks(self._num_workers)
        try:
            remote.start()  # forked before the workers, and alone with the object stores' client
            return self._start_workers(slabs, remote, stacks)
        except BaseException:
            remote.close()
            stacks.close()
            raise

    def _start_workers(self, slabs: SlabPool, remote: RemoteFetch, stacks: Stacks) -> _Run:
        dataset = self._dataset
        pending: deque[_Pending] = deque()
        dispatch = _Dispatch(
            self._planner, self._state, slabs, remote, pending, self._ahead(), self._stats.planned
        )
        self._stats.started()
        builder = BatchBuilder(
            paths=list(dataset.paths),
            prefixes=list(dataset.prefixes),
            open_fetcher=remote.fetcher,
            image=self._image,
            text=self._text,
            transform=self._transform,
            seed=self._seed,
            slabs=slabs,
        )
        workers: dict[str, Any] = {}
        if self._num_workers:
            # forked: nothing is pickled or imported again; unnamed: a kill at any moment leaves no semaphore behind
            workers = {
                "multiprocessing_context": UnnamedContext(),
                "prefetch_factor": self._prefetch,
                "worker_init_fn": partial(start_worker, parent=os.getpid(), stacks=stacks),
            }
        built: Iterator[Built | LoaderError] = iter(
            DataLoader(
                builder,  # type: ignore[arg-type]  # a data set whose keys are plans
                sampler=dispatch,
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=self._num_workers,
                generator=torch.Generator(),  # its own: the user's random numbers stay as they are
                **workers,
            )
        )
        slabs.pin()
        watch = None
        if self._num_workers:
            # the workers' end of it: held here, too, it would keep a message waiting that a killed worker has half written
            built._worker_result_queue._writer.close()  # type: ignore[attr-defined]  # noqa: SLF001
            # what the download process has to say of a block should come first
            timeout = 1.1 * self._timeout + 10 if remote.is_needed else self._timeout
            watch = Watch(stacks, _processes(built), timeout)
        return _Run(built, pending, slabs, remote, stacks, watch, os.getpid())

    def _slab_size(self) -> int:
        """Bytes for the images of a batch of ordinary size; larger ones overflow."""
        planned = list(islice(self._planner.batches(self._state), self._prefetch))
        samples = max((len(batch.samples) for batch in planned), default=0)
        if not samples:
            return 0
        index = self._dataset.survey()
        if self._image is None:
            return int(_SLAB_MARGIN * samples * index.size.mean() + index.size.max())
        most = int(index.images.max())
        images = samples if most <= 1 else int(_SLAB_MARGIN * samples * index.images.mean()) + most
        images = min(images, samples * most)
        if not images or not (self._image.is_ragged or self._image.is_tiled):
            return images * math.prod(self._image.shape) if images else 0
        mean, largest = ordinary_bytes(self._dataset, self._image)
        size = int(min(_SLAB_MARGIN * images * mean + largest, images * largest))
        if self._max_tiles is not None and self._image.is_tiled:
            size = min(size, self._max_tiles * math.prod(self._image.shape))
        return size

    def _ahead(self) -> int:
        """Batches whose blocks are asked for before they are built: as many as mix the same blocks."""
        samples = self._window * self._block * int(self._state["lanes"])
        return min(_MOST_AHEAD, max(_LEAST_AHEAD, samples // (self._global_batch_size or self.world_size)))


@dataclass(frozen=True, slots=True)
class _Dispatch:
    """The plans of all batches from a state on; as a DataLoader's sampler, drawn as workers become free."""

    planner: Planner
    state: State
    slabs: SlabPool
    remote: RemoteFetch
    pending: deque[_Pending]
    ahead: int  # batches announced to `remote` before they are drawn
    planned: Callable[[float], None]  # told the seconds that planning took

    def __iter__(self) -> Iterator[BatchPlan]:
        batches = self._announced()
        while True:
            begin = time.perf_counter()
            number, batch = next(batches, (-1, None))
            self.planned(time.perf_counter() - begin)
            if batch is None:
                return
            has_images = bool(batch.index.images.any())
            slab = self.slabs.acquire() if has_images else None
            self.pending.append(_Pending(number, batch.state, slab, has_images))
            yield BatchPlan(
                number=number,
                epoch=batch.epoch,
                positions=batch.positions,
                rows=batch.rows,
                index=batch.index,
                slab=slab,
            )

    def _announced(self) -> Iterator[tuple[int, PlannedBatch]]:
        planned = enumerate(self.planner.batches(self.state))
        if not self.remote.is_needed:
            yield from planned
            return
        waiting: deque[tuple[int, PlannedBatch]] = deque()
        for number, batch in planned:
            index = batch.index
            self.remote.announce(number, index.shard, index.extent_begin, index.extent_end)
            waiting.append((number, batch))
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting


def stretches(skip: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pairs of steps, ascending and disjoint.

    Raises:
        UsageError: something else.
    """
    found = []
    for stretch in skip:
        try:
            begin, end = stretch
        except (TypeError, ValueError):
            raise UsageError(f"skip={skip!r}: a list of (from, to) pairs of steps is needed") from None
        if integer("skip", begin, least=0) >= integer("skip", end, least=0):
            raise UsageError(f"skip: ({begin}, {end}) is empty; from < to is needed")
        found.append((int(begin), int(end)))
    return [(begin, end) for begin, end in merged([], found)]


def _length_settings(by_length: bool, text: Any, image_tokens: int) -> dict[str, Any]:
    """What decides about lengths, as far as a plan depends on them."""
    planned = text is not None or by_length
    return {
        "lengths": getattr(text, "fingerprint", "words") if planned else None,
        "image_tokens": image_tokens if planned else None,
    }


def _global_batch_size(
    batch_size: int | None, global_batch_size: int | None, world_size: int, *, budget: bool
) -> int | None:
    if batch_size is not None and global_batch_size is None:
        return integer("batch_size", batch_size, least=1) * world_size
    if batch_size is None and global_batch_size is not None:
        return integer("global_batch_size", global_batch_size, least=1)
    if batch_size is None and budget:
        return None
    raise UsageError("batch_size (per rank) or global_batch_size is needed, and not both")


def _explained(ended: str, run: _Run) -> LoaderError:
    """What is known of a worker that ended, beside how it did."""
    if run.watch is not None and run.watch.found:
        return LoaderError(
            f"no batch came for {run.watch.timeout:g} s (timeout=). What the workers were doing:\n{run.watch.found}"
        )
    stack = run.stacks.all_written()
    return LoaderError(
        f"{ended.strip(' .')}. Was memory short? Try fewer workers, a smaller batch, or num_workers=0."
        + (f"\n{stack}" if stack else "")
    )


def _first(error: RuntimeError) -> BaseException:
    """Of torch's errors about a worker the one that names the signal: what came first."""
    cause = error.__cause__
    return error if cause is None or isinstance(cause, queue.Empty) else cause


def _how_ended(built: Any) -> str:
    """How the first worker ended that did not end well."""
    for worker in built._workers:  # noqa: SLF001 - torch has no public name for them
        worker.join(1.0)
        if worker.exitcode is not None and worker.exitcode < 0:
            return f"{_LOST_WORKER} {worker.pid}) is killed by signal: {signal.strsignal(-worker.exitcode)}"
    return "the DataLoader's workers have ended"


def _processes(built: Any) -> list[int]:
    return [worker.pid for worker in built._workers]  # noqa: SLF001 - torch has no public name for them


def _ready(built: Any) -> int:
    """Batches that have come back from the workers and wait to be handed out."""
    if not hasattr(built, "_task_info"):  # without workers
        return 0
    early = sum(len(task) > 1 for task in built._task_info.values())  # noqa: SLF001 - torch has no public name for them
    return early + int(built._worker_result_queue.qsize())  # noqa: SLF001


def _unchanged(built: Any) -> Any:
    return built
