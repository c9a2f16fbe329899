"""`shardify reshard`: samples of finished or foreign shards become a new data set, in other sizes, another order, joined or thinned out.

open the sets -> gather what is meant from their sidecars -> plan -> copy (an engine) -> index, quarantine, manifest. The plan, its promises
and its keys are those of a pack; only the source of samples differs. Everything up to the plan writes nothing.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import xxhash

from shardify.convert import print_summary
from shardify.errors import PackError, UsageError
from shardify.exclude import report_hits, report_left, taken_by_name
from shardify.format import names
from shardify.format.exclude import EXCLUDED, Exclusions, read_exclusions
from shardify.format.sidecar import SetAside, decode_set_aside
from shardify.gather import (
    DataSet,
    Gathered,
    gather,
    images_left,
    manifest_sources,
    member_rows,
    open_sets,
)
from shardify.outputs import Output, open_output
from shardify.pack import Shrink
from shardify.plan import Cut, Plan, make_cut, make_plan
from shardify.progress import Progress
from shardify.promise import Promise, check_promise, end_work, is_finished, write_promise
from shardify.run import Engine, Job, carry_out, check_options
from shardify.select import parse_filter
from shardify.transfer import InputShard, TransferContext, TransferTask, reshard_shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardOptions:
    """What to make a new data set of, and how.

    Attributes:
        shards: brace patterns, folders, manifests and tars, of any number of data sets, as `open_shards` takes them.
        out: the folder or URL for the new data set.
        shuffle: permute the samples, keyed by `seed`; otherwise they keep the order in which the shards are named.
        seed: any integer.
        shard_size: target bytes of a shard, such as ``256MB``, which is the default.
        samples_per_shard: or: samples in each shard.
        shards_out: or: how many shards.
        multiple_of: round the shard count up to a multiple of this.
        where: take only samples that this filter means (see `shardify.select`).
        max_samples: take no more than this; shuffled, they are drawn at random, keyed by `seed`.
        exclude: a file with ids, URLs and image hashes of samples that must not be taken (see `shardify.format.exclude`).
        shortest_edge: make pictures smaller whose shorter side has more pixels; None copies every image byte for byte.
        quality: of those, as JPEG and WebP count it.
        compress: ``zstd``, or None.
        max_bad: stop when more samples than this cannot be copied: a count, or a percentage with ``%``. What is excluded does not count.
        engine: the processes that copy: ``local`` or ``ray``; the output does not depend on it.
        ray_address: of a Ray cluster; None starts one on this machine.
        workers: processes; None for as many as there are cores.
    """

    shards: Sequence[str | os.PathLike[str]]
    out: str | os.PathLike[str]
    shuffle: bool = True
    seed: int = 0
    shard_size: str | None = None
    samples_per_shard: int | None = None
    shards_out: int | None = None
    multiple_of: int = 1
    where: str | None = None
    max_samples: int | None = None
    exclude: str | os.PathLike[str] | None = None
    shortest_edge: int | None = None
    quality: int = 90
    compress: str | None = None
    max_bad: str = "1%"
    engine: str = "local"
    ray_address: str | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Input:
    """What there is to write: the data sets, the samples taken from them, and what must not be among these."""

    sets: Sequence[DataSet]
    gathered: Gathered
    exclusions: Exclusions | None


def reshard_dataset(options: ReshardOptions) -> None:
    """Make a new data set of the samples of others, or continue one; prints progress on standard error and a closing summary.

    Raises:
        UsageError: options that cannot be honoured, a filter that is none or means no sample, or an output folder that holds something else.
        SourceError: the exclusion list cannot be read.
        FormatError: shards are missing, or not those of their sidecars.
        PackError: too many samples are damaged, none is left, or a worker was lost.
    """
    cut = _check_options(options)
    where = parse_filter(options.where) if options.where is not None else None
    exclusions = read_exclusions(options.exclude) if options.exclude is not None else None
    sets = open_sets(options.shards)
    output = open_output(os.fspath(options.out))
    _require_other_place(output, sets)
    total = sum(len(data_set.shards.index) for data_set in sets)
    with Progress("reading the index", total=total) as progress:
        gathered = gather(
            sets,
            where=where,
            max_samples=options.max_samples,
            shuffle=options.shuffle,
            seed=options.seed,
            progress=progress.advance,
        )
    if not len(gathered.samples):
        raise UsageError(
            f"none of the {total:,} samples is meant by --where {options.where}: there is nothing to write"
            if total
            else "the shards hold no samples: there is nothing to write"
        )
    given = _Input(sets, gathered, exclusions)
    settings = _settings(options, cut, given)
    promise = Promise(settings, manifest_sources(sets, gathered))
    lines = ["is complete: nothing to do"]
    try:
        if not is_finished(output, promise) or output.has_work():
            with output.claimed():
                if not is_finished(output, promise):
                    lines = _reshard(options, cut, given, output, promise)
                lines += end_work(output)
    except OSError as error:
        place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else output.place
        raise PackError(f"{place}: {error.strerror or error}") from error
    print_summary(output, lines)


def _check_options(options: ReshardOptions) -> Cut:
    cut = make_cut(
        shard_size=options.shard_size,
        samples_per_shard=options.samples_per_shard,
        shards=options.shards_out,
        multiple_of=options.multiple_of,
    )
    check_options(
        max_bad=options.max_bad,
        compress=options.compress,
        engine=options.engine,
        ray_address=options.ray_address,
        shortest_edge=options.shortest_edge,
        quality=options.quality,
    )
    if options.max_samples is not None and options.max_samples < 1:
        raise UsageError(f"--max-samples {options.max_samples}: must be at least 1")
    return cut


def _require_other_place(output: Output, sets: Sequence[DataSet]) -> None:
    if output.is_remote:
        return
    out = os.path.realpath(output.place)
    for data_set in sets:
        if out == os.path.realpath(os.path.dirname(data_set.shards.shards[0].path)):
            raise UsageError(
                f"{output.place}: the shards are read from this folder; choose another for the new ones"
            )


def _settings(options: ReshardOptions, cut: Cut, given: _Input) -> dict[str, Any]:
    """All that shapes the bytes, and nothing else."""
    settings: dict[str, Any] = {
        "shuffle": options.shuffle,
        "seed": options.seed if options.shuffle else None,
        "shard_size": cut.shard_size,
        "samples_per_shard": cut.samples_per_shard,
        "shards": cut.shards,
        "multiple_of": cut.multiple_of,
        "left_out": given.gathered.left_out,
    }
    if options.where is not None:
        settings["where"] = options.where
    if options.max_samples is not None:
        settings["max_samples"] = options.max_samples
    if given.exclusions:
        settings["exclude"] = {
            "name": given.exclusions.name,
            "entries": len(given.exclusions.entries),
            "xxh3_128": given.exclusions.fingerprint,
        }
    if options.compress:
        settings["compress"] = options.compress
    if options.shortest_edge:
        settings["shortest_edge"] = options.shortest_edge
        settings["quality"] = options.quality
        settings["resized_by"] = f"pillow {PIL.__version__}"
    return settings


def _reshard(options: ReshardOptions, cut: Cut, given: _Input, output: Output, promise: Promise) -> list[str]:
    """Write what is not written yet; returns the summary."""
    check_promise(output, promise)
    gathered, exclusions = given.gathered, given.exclusions
    samples, members = gathered.samples, gathered.members
    plan = make_plan(samples["span"], shuffle=options.shuffle, seed=options.seed, cut=cut)
    promise = Promise(promise.settings, promise.sources, _found(gathered, plan))
    check_promise(output, promise)
    write_promise(output, promise)
    context = TransferContext(
        output=output,
        plan=promise.id,
        digits=names.key_digits(len(samples)),
        shards=tuple(
            InputShard(os.path.abspath(shard.path), data_set.prefix + os.path.basename(shard.path))
            for data_set in given.sets
            for shard in data_set.shards.shards
        ),
        fields=gathered.fields,
        sources=gathered.sources,
        exclusions=exclusions,
        compress=options.compress or "",
        shrink=Shrink(options.shortest_edge, options.quality) if options.shortest_edge else None,
    )
    shard_names = [
        names.shard_name(number, plan.shards, options.compress or "") for number in range(plan.shards)
    ]

    def task(shard: int) -> TransferTask:
        numbers = plan.order[plan.starts[shard] : plan.starts[shard + 1]]
        rows = member_rows(samples, gathered.first_member, numbers)
        return TransferTask(shard_names[shard], int(plan.starts[shard]), samples[numbers], members[rows])

    job = Job(
        what="resharding",
        execute=reshard_shard,
        context=context,
        promise=promise,
        plan=plan,
        shard_names=shard_names,
        task=task,
        known=lambda _: Counter(),
        sources=gathered.sources,
        max_bad=options.max_bad,
        uncounted=frozenset((EXCLUDED,)),
    )
    engine = Engine(name=options.engine, workers=options.workers, ray_address=options.ray_address)
    lines = carry_out(job, engine)
    if gathered.left_out:
        lines.append(f"{gathered.left_out:,} samples were left out before")
    if exclusions:
        aside = _quarantined(output)
        lines += report_hits(exclusions, aside)
        lines += report_left(exclusions, *images_left(gathered, taken_by_name(exclusions, aside)))
    return lines


def _found(gathered: Gathered, plan: Plan) -> dict[str, Any]:
    digest = xxhash.xxh3_128(plan.starts.tobytes())
    for rows in (gathered.samples, gathered.members):
        digest.update(np.ascontiguousarray(rows).view(np.uint8).data)
    return {
        "bytes of all samples": int(gathered.samples["span"].sum()),
        "digest of samples and members": digest.hexdigest(),
    }


def _quarantined(output: Output) -> list[SetAside]:
    file = output.open(names.QUARANTINE)
    if file is None:
        return []
    with file:
        return [decode_set_aside(line) for line in file.read().splitlines()]
