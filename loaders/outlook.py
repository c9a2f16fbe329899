"""What an epoch would do, from the index alone: batches, bytes and requests, balance over ranks, and how well it is shuffled.

A large epoch is not looked at as a whole: stretches of it, spread evenly, stand for all. So memory and time are bounded whatever the size.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loaders.arguments import integer
from loaders.batching import (
    FILLER,
    Batching,
    Cursor,
    EpochView,
    GroupBy,
    IntArray,
    PlainBatches,
    make_batching,
)
from loaders.dataset import Dataset, Rows, open_dataset
from loaders.lengths import CountedText, token_lengths, word_lengths
from loaders.mixture import Mixture, Shards
from loaders.order import EpochOrder, OrderSettings, Shuffle, default_lanes
from loaders.plan import Planner
from loaders.state import State, make_state
from loaders.subset import Split
from loaders.window_batches import WindowBatches
from shardify.errors import UsageError

_MOST = 1 << 22  # positions looked at
_MOST_PLANNED = 1 << 12  # windows, each for one rank
_STRETCHES = 8
_SETTLED = 4  # times as many positions as the order mixes are a stretch, at least, so that its beginning counts little
_CHUNK = 1 << 18
_MOST_RANKS = 1 << 16
_MOST_EPOCH = 100_000
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over ranks, or over nodes."""

    least: float
    mean: float
    most: float


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """What an epoch would do.

    Attributes:
        epoch: its number, from 0.
        positions: in it: samples, each as often as it comes.
        data_samples: samples of the data that take part.
        shards: of the data.
        shards_touched: of which samples come in the epoch.
        world_size: ranks.
        nodes: they are on.
        global_batch_size: rows over all ranks; None where a budget alone makes the batches.
        batches: of each rank.
        batches_per_worker: of a rank, the most.
        fillers: rows without a sample, over all ranks.
        excluded: samples that become fillers by the exclusion list.
        dropped: samples left out by `drop_last`.
        samples: of a rank, fillers and excluded ones left out.
        bytes: of these, of a rank.
        words: likewise.
        images: likewise.
        step_imbalance: words of the rank that has most, over those of the average rank, on average over steps: what waiting for the longest costs.
        requests: ranges that a node would fetch if the shards were remote: one for each extent.
        bytes_fetched: by them, of a node.
        fetched_over_used: bytes fetched over bytes of samples, over all nodes, nothing being kept from earlier epochs.
        requests_per_sample: over all nodes.
        neighbour_distance: how far two samples that follow each other on a rank lie apart in the data, as a share of it; 1/3 when uniform.
        neighbours_in_block: share of these that lie in the same block.
        neighbours_in_block_uniform: the same in a uniform order.
        correlation: of the place in the data and the place in the epoch; 0 when uniform.
        looked_at: positions that these figures come from; less than `positions` when they are estimates.
        notes: what is odd, and what is an estimate.
    """

    epoch: int
    positions: int
    data_samples: int
    shards: int
    shards_touched: int
    world_size: int
    nodes: int
    global_batch_size: int | None
    batches: int
    batches_per_worker: int
    fillers: int
    excluded: int
    dropped: int
    samples: Spread
    bytes: Spread
    words: Spread
    images: Spread
    step_imbalance: float
    requests: Spread
    bytes_fetched: Spread
    fetched_over_used: float
    requests_per_sample: float
    neighbour_distance: float
    neighbours_in_block: float
    neighbours_in_block_uniform: float
    correlation: float
    looked_at: int
    notes: tuple[str, ...]


def explain_epoch(
    shards: Shards | Mixture,
    *,
    batch_size: int | None = None,
    global_batch_size: int | None = None,
    world_size: int = 1,
    num_workers: int = 4,
    nodes: int = 1,
    epoch: int = 0,
    text: CountedText | None = None,
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
    lanes: int | None = None,
    block: int = 32,
    window: int = 8,
) -> EpochPlan:
    """What an epoch would do, without reading data.

    Args:
        shards: as for `StreamingLoader`, or a `Mixture`.
        batch_size: samples, or rows, of a rank; or give `global_batch_size`.
        global_batch_size: over all ranks.
        world_size: ranks. Default 1.
        num_workers: of each rank. Default 4.
        nodes: that the ranks are on, as many on each, neighbours together. Default 1.
        epoch: which, from 0. Default 0.
        text: for `pack_tokens` and `max_tokens`: its tokens are counted once, for which the records are read.
        shuffle: this and all that follow as for `StreamingLoader`, with its defaults.
        seed: of the order.
        group_by: what global batches have in common.
        pack_tokens: tokens of a row.
        image_tokens: tokens of an image.
        max_tokens: tokens of a rank's batch.
        max_tiles: images of a rank's batch.
        plan_window: positions that are planned together.
        drop_last: leave out short batches.
        split: the side.
        validation: share of the validation side.
        max_samples: no more than so many.
        exclude: a list of samples that become fillers.
        lanes: of the block shuffle.
        block: of the block shuffle.
        window: of the block shuffle.

    Raises:
        UsageError: arguments that contradict each other.
        FormatError: shards that are missing or damaged.
    """
    integer("world_size", world_size, least=1, most=_MOST_RANKS)
    integer("num_workers", num_workers, least=0)
    integer("epoch", epoch, least=0, most=_MOST_EPOCH)
    if integer("nodes", nodes, least=1) > world_size or world_size % nodes:
        raise UsageError(f"nodes={nodes} with world_size={world_size}: as many ranks on each node are needed")
    size = _size(
        batch_size, global_batch_size, world_size, budget=max_tokens is not None or max_tiles is not None
    )
    batching = make_batching(
        global_batch_size=size,
        rank=0,
        world_size=world_size,
        drop_last=drop_last,
        group_by=group_by,
        pack_tokens=pack_tokens,
        max_tokens=max_tokens,
        max_tiles=max_tiles,
        plan_window=plan_window,
    )
    dataset = open_dataset(
        shards,
        split=split,
        validation=validation,
        max_samples=max_samples,
        exclude=exclude,
        block=1 if shuffle == "full" else block,
    )
    if not len(dataset):
        raise UsageError("there are no samples to plan an epoch of")
    if pack_tokens is None and max_tokens is None:
        lengths = word_lengths(dataset, image_tokens=image_tokens)
    elif text is None:
        raise UsageError("pack_tokens and max_tokens count tokens, which text= makes")
    else:
        lengths = token_lengths(dataset, text, image_tokens=image_tokens)
    lanes = default_lanes(world_size) if lanes is None else integer("lanes", lanes)
    settings = OrderSettings(shuffle, seed, lanes, block, window)
    settings.order(0)
    planner = Planner(dataset, dataset.course(settings), batching, lengths.measure, seed)
    state = _at_epoch(planner, epoch)
    order = planner.order(state)
    mixed = lanes * block * window if shuffle == "block" else 1
    survey = _Survey(dataset, order, world_size, nodes, block=block, mixed=mixed)
    steps, looked_at = _look(planner, state, survey)
    scale = order.length / looked_at if looked_at else 1.0
    if isinstance(batching, PlainBatches) or scale == 1.0:
        batches = batching.count(planner.view(state), Cursor(0))
    else:
        batches = round(steps * scale)
    notes = []
    if shuffle == "block" and lanes % world_size:
        notes.append(
            f"{world_size} ranks do not divide the {lanes} lanes: ranks read blocks that others need too; lanes={_lanes_for(world_size)} would not"
        )
    if order.length < world_size:
        notes.append(f"{order.length} samples for {world_size} ranks: some see fillers alone")
    if scale > 1.0:
        notes.append(
            f"looked at {looked_at:,} of {order.length:,} positions, in stretches spread evenly: figures are estimates, and the least"
            " and the most over ranks lie nearer together in truth"
        )
    return survey.plan(
        epoch=epoch,
        global_batch_size=size,
        batches=batches,
        workers=num_workers,
        looked_at=looked_at,
        short=_short(order.length, batching, survey, looked_at),
        scale=scale,
        notes=tuple(notes),
    )


def _short(length: int, batching: Batching, survey: "_Survey", looked_at: int) -> tuple[int, int]:
    """Fillers of short batches, and samples that `drop_last` leaves out."""
    if not isinstance(batching, PlainBatches):
        scale = length / max(looked_at, 1)
        return round(survey.fillers * scale), round((looked_at - survey.samples) * scale)
    short = length % batching.global_batch_size
    return (0, short) if batching.drop_last else (-short % batching.world_size, 0)


def _size(
    batch_size: int | None, global_batch_size: int | None, world_size: int, *, budget: bool
) -> int | None:
    if batch_size is not None and global_batch_size is None:
        return integer("batch_size", batch_size, least=1) * world_size
    if batch_size is None and (global_batch_size is not None or budget):
        return global_batch_size
    raise UsageError("batch_size (per rank) or global_batch_size is needed, and not both")


def _lanes_for(world_size: int) -> int:
    return -(-64 // world_size) * world_size


def _at_epoch(planner: Planner, epoch: int) -> State:
    """The state at the beginning of an epoch of a new run."""
    state = make_state(
        seed=planner.seed,
        lanes=1,
        settings={},
        parts=planner.course.first_parts(),
        fingerprint={},
        data={},
        run={},
    )
    for _ in range(epoch):
        state = planner.next_epoch(state)
    return state


def _look(planner: Planner, state: State, survey: "_Survey") -> tuple[int, int]:
    """Survey an epoch; returns steps and positions of the stretches that were looked at."""
    order, batching = planner.order(state), planner.batching
    steps = looked_at = 0
    if isinstance(batching, PlainBatches):
        planned = _plain(order.length, batching, survey.mixed)
    else:
        assert isinstance(batching, WindowBatches)
        planned = _windowed(planner.view(state), batching, survey.mixed)
    for piece in planned:
        if piece is None:
            survey.end_stretch()
            continue
        survey.add(piece)
        steps += piece.steps
        looked_at += piece.covered
    return steps, looked_at


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Some of an epoch as planned.

    Attributes:
        positions: int64 [n], of each rank in the order in which it sees them.
        ranks: int64 [n].
        step: int64 [n], from 0.
        steps: how many.
        fillers: rows without sample.
        covered: positions of the epoch that are dealt with in it.
        settled: position of the epoch from which on what is fetched is counted: blocks in use there were seen before.
    """

    positions: IntArray
    ranks: IntArray
    step: IntArray
    steps: int
    fillers: int
    covered: int
    settled: int


def _stretches(length: int, unit: int, most: int, *, least: int) -> list[tuple[int, int]]:
    """All of an epoch, or as many stretches of whole units, as (begin, end): of `least` positions where that is not beyond `most`."""
    if length <= most:
        return [(0, length)]
    size = max(1, min(max(most // _STRETCHES, least), most) // unit) * unit
    number = max(1, min(most // size, length // size))
    # each in the middle of its share: at the ends of the epoch blocks begin and end otherwise
    begins = [((2 * place + 1) * length // number - size) // 2 // unit * unit for place in range(number)]
    return [(begin, begin + size) for begin in begins]


def _settled(first: int, last: int, length: int, mixed: int) -> int:
    return first + min(mixed, (last - first) // 2) if last - first < length else 0


def _plain(length: int, batching: PlainBatches, mixed: int) -> Iterator[_Piece | None]:
    size, world = batching.global_batch_size, batching.world_size
    at_once = max(1, _CHUNK // size) * size
    kept = length // size * size if batching.drop_last else length
    for first, last in _stretches(length, size, _MOST, least=_SETTLED * mixed):
        settled = _settled(first, last, length, mixed)
        for begin in range(first, last, at_once):
            end = min(begin + at_once, last)
            positions = np.arange(begin, min(end, kept), dtype=np.int64)
            steps = -(-len(positions) // size)
            in_steps = (positions - begin) // size
            yield _Piece(positions, positions % world, in_steps, steps, 0, end - begin, settled)
        yield None


def _windowed(view: EpochView, batching: WindowBatches, mixed: int) -> Iterator[_Piece | None]:
    width = batching.plan.plan_window
    most = max(_MOST_PLANNED // batching.world_size, _STRETCHES) * width
    for first, last in _stretches(view.length, width, most, least=_SETTLED * mixed):
        settled = _settled(first, last, view.length, mixed)
        cursor = Cursor(first, window=first // width)
        ranks: list[Batching] = [batching.of_rank(rank) for rank in range(batching.world_size)]
        streams = [rank.batches(view, cursor) for rank in ranks]
        end = -(-last // width)
        kept: list[IntArray] = []
        owners: list[int] = []
        steps: list[int] = []
        number = done = 0
        for step in zip(*streams, strict=True):
            kept += [batch.positions for batch in step]
            owners += range(len(step))
            steps += [number] * len(step)
            number += 1
            done += step[0].samples
            stop = step[0].last or step[0].after.window >= end
            if done >= _CHUNK or stop:
                yield _gathered(kept, owners, steps, number, settled)
                kept, owners, steps, number, done = [], [], [], 0, 0
            if stop:
                break
        # what short steps leave out was dealt with too
        none = np.zeros(0, np.int64)
        yield _Piece(none, none, none, 0, 0, last - first, settled)
        yield None


def _gathered(kept: list[IntArray], owners: list[int], steps: list[int], number: int, settled: int) -> _Piece:
    positions = np.concatenate(kept)
    sizes = [len(batch) for batch in kept]
    ranks = np.repeat(np.array(owners, np.int64), sizes)
    step = np.repeat(np.array(steps, np.int64), sizes)
    real = positions != FILLER
    return _Piece(positions[real], ranks[real], step[real], number, int(np.count_nonzero(~real)), 0, settled)


class _Survey:
    """Gathers figures piece by piece."""

    def __init__(
        self, dataset: Dataset, order: EpochOrder, world_size: int, nodes: int, *, block: int, mixed: int
    ) -> None:
        self._dataset, self._order = dataset, order
        self._world, self._nodes, self._block = world_size, nodes, block
        self.mixed = mixed  # positions after which the order has used whole blocks
        self.fillers = self.samples = 0
        self._of_ranks = np.zeros((4, world_size))  # samples, bytes, words, images
        self._excluded = 0
        self._imbalance: list[float] = [0.0, 0.0]  # sum and number of steps
        self._shards = np.zeros(len(dataset.paths), np.bool_)
        self._extents: list[tuple[npt.NDArray[np.uint64], IntArray, IntArray]] = []  # key, node, bytes
        self._gathered = 0
        self._before: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)  # keys in use where a stretch begins
        self._fetched = np.zeros((2, nodes))  # requests, bytes
        self._used = np.zeros(2)  # samples and bytes for which that was fetched
        self._pairs = np.zeros(3)  # of neighbours: number, in the same block, sum of distances
        self._moments = np.zeros(6)  # of places in epoch and data

    def add(self, piece: _Piece) -> None:
        self.fillers += piece.fillers
        self.samples += len(piece.positions)
        if not len(piece.positions):
            return
        samples = self._order.samples(piece.positions)
        rows = self._dataset.rows(samples)
        kept = ~rows.excluded
        self._excluded += len(samples) - int(np.count_nonzero(kept))
        self._shards[rows.shard] = True
        self._weigh(piece, rows, kept)
        self._fetch(piece, rows, kept)
        self._shuffle(piece, samples)

    def _weigh(self, piece: _Piece, rows: Rows, kept: npt.NDArray[np.bool_]) -> None:
        ranks = piece.ranks[kept]
        for number, weights in enumerate((None, rows.size, rows.words, rows.images)):
            own = None if weights is None else weights[kept]
            self._of_ranks[number] += np.bincount(ranks, own, minlength=self._world)
        # by step and rank, for some steps at a time: a table of all would be large
        at_once = max(1, _CHUNK // self._world)
        for begin in range(0, piece.steps, at_once):
            here = kept & (piece.step >= begin) & (piece.step < begin + at_once)
            cells = (piece.step[here] - begin) * self._world + piece.ranks[here]
            words = np.bincount(cells, rows.words[here], minlength=at_once * self._world)
            table = words.reshape(at_once, self._world)
            mean = table.mean(axis=1)
            there = mean > 0
            self._imbalance[0] += float((table.max(axis=1)[there] / mean[there]).sum())
            self._imbalance[1] += int(np.count_nonzero(there))

    def _fetch(self, piece: _Piece, rows: Rows, kept: npt.NDArray[np.bool_]) -> None:
        nodes = piece.ranks * self._nodes // self._world
        with np.errstate(over="ignore"):
            keys = (nodes * len(self._shards) + rows.shard).astype(np.uint64) * _GOLDEN
            keys += rows.extent_begin.astype(np.uint64)
        settled = piece.positions >= piece.settled
        if not settled.all():
            self._before = np.union1d(self._before, keys[~settled])
        used = settled & kept
        self._used += (np.count_nonzero(used), rows.size[used].sum())
        keys, first = np.unique(keys[settled], return_index=True)
        sizes = (rows.extent_end - rows.extent_begin)[settled][first]
        self._extents.append((keys, nodes[settled][first], sizes))
        self._gathered += len(keys)
        if self._gathered > _CHUNK * 8:
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([extents[0] for extents in self._extents])
        keys, first = np.unique(keys, return_index=True)
        nodes, sizes = (np.concatenate([extents[at] for extents in self._extents])[first] for at in (1, 2))
        self._extents = [(keys, nodes, sizes)]
        # merged again when as many have come
        self._gathered = 0

    def end_stretch(self) -> None:
        """What was fetched is forgotten: the next stretch lies far away."""
        if not self._extents:
            return
        self._merge()
        keys, nodes, sizes = self._extents[0]
        new = ~np.isin(keys, self._before)
        self._fetched[0] += np.bincount(nodes[new], minlength=self._nodes)
        self._fetched[1] += np.bincount(nodes[new], sizes[new], minlength=self._nodes)
        self._extents, self._before = [], np.zeros(0, np.uint64)

    def _shuffle(self, piece: _Piece, samples: IntArray) -> None:
        by_rank = np.argsort(piece.ranks, kind="stable")
        ranks, stored = piece.ranks[by_rank], samples[by_rank]
        same = ranks[1:] == ranks[:-1]
        one, other = stored[:-1][same], stored[1:][same]
        in_block = float(np.count_nonzero(one // self._block == other // self._block))
        self._pairs += (len(one), in_block, float(np.abs(one - other).sum()) / len(self._dataset))
        x = piece.positions / self._order.length - 0.5
        y = samples / len(self._dataset) - 0.5
        self._moments += (len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum())

    def plan(
        self,
        *,
        epoch: int,
        global_batch_size: int | None,
        batches: int,
        workers: int,
        looked_at: int,
        short: tuple[int, int],
        scale: float,
        notes: tuple[str, ...],
    ) -> EpochPlan:
        """All figures, those of stretches brought to the size of the epoch."""
        length, total = self._order.length, len(self._dataset)
        of_ranks = [_spread(values * scale) for values in self._of_ranks]
        seen, used = self._used.tolist()
        settled = scale * self._of_ranks[0].sum() / seen if seen else 0.0
        requests, fetched = (_spread(values * settled) for values in self._fetched)
        pairs, in_block, distance = self._pairs.tolist()
        return EpochPlan(
            epoch=epoch,
            positions=length,
            data_samples=total,
            shards=len(self._shards),
            shards_touched=int(np.count_nonzero(self._shards)),
            world_size=self._world,
            nodes=self._nodes,
            global_batch_size=global_batch_size,
            batches=batches,
            batches_per_worker=-(-batches // max(workers, 1)),
            fillers=short[0],
            excluded=round(self._excluded * scale),
            dropped=short[1],
            samples=of_ranks[0],
            bytes=of_ranks[1],
            words=of_ranks[2],
            images=of_ranks[3],
            step_imbalance=self._imbalance[0] / max(self._imbalance[1], 1),
            requests=requests,
            bytes_fetched=fetched,
            fetched_over_used=float(self._fetched[1].sum() / used) if used else 0.0,
            requests_per_sample=float(self._fetched[0].sum() / seen) if seen else 0.0,
            neighbour_distance=distance / max(pairs, 1),
            neighbours_in_block=in_block / max(pairs, 1),
            neighbours_in_block_uniform=(min(self._block, total) - 1) / max(total - 1, 1),
            correlation=_correlation(self._moments),
            looked_at=looked_at,
            notes=notes,
        )


def _spread(values: npt.NDArray[np.float64]) -> Spread:
    return Spread(float(values.min()), float(values.mean()), float(values.max()))


def _correlation(moments: npt.NDArray[np.float64]) -> float:
    count, x, y, xx, yy, xy = moments.tolist()
    if count < 2:
        return 0.0
    across = (xx - x * x / count) * (yy - y * y / count)
    return float((xy - x * y / count) / across**0.5) if across > 0 else 0.0
