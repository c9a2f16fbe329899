"""Carries out a plan: makes the shards that are not finished yet, then index, quarantine and manifest. The same for every command that writes a data set.

Every shard is complete when it has its name; the manifest comes last. The same call again continues where an earlier one stopped.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import islice
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import xxhash

from shardify.audit import describe, describe_counts, quarantine, reconcile
from shardify.engines.local import Task
from shardify.engines.local import run_shards as run_local
from shardify.errors import PackError, UsageError
from shardify.format import names
from shardify.format.index import COLUMNS, index_rows, write_index
from shardify.format.manifest import Append, Counts, Manifest, Shard, encode_manifest
from shardify.format.sidecar import SetAside, ShardInfo, read_sidecar
from shardify.outputs import Draft, Output
from shardify.pack import Report, RunContext, ShardResult, finished_shard, finished_shards
from shardify.plan import Plan
from shardify.progress import Progress
from shardify.promise import Promise

EXAMPLES = 3
"""Records set aside that a message shows."""

_Context = TypeVar("_Context", bound=RunContext)
_Task = TypeVar("_Task", bound=Task)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Which processes make the shards.

    Attributes:
        name: ``local`` or ``ray``.
        workers: processes at a time; None for as many as there are cores.
        ray_address: of a Ray cluster; None starts one on this machine.
    """

    name: str = "local"
    workers: int | None = None
    ray_address: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Generic[_Context, _Task]):
    """A planned data set, or the planned addition to one.

    Attributes:
        what: a word for the progress bar.
        execute: makes one shard.
        context: what all shards share.
        promise: what the set is made of.
        plan: which record goes into which shard.
        shard_names: of its shards.
        task: shard number -> the task.
        known: shard number -> the records of it that are known to be set aside, by reason.
        sources: the record sources' names in their order.
        max_bad: how many records may be set aside: a count, or a percentage with ``%``.
        fail_fast: the reasons at which a shard finished earlier stops the run.
        uncounted: the reasons that are no fault, and do not count for `max_bad`.
        base: the finished set that is added to.
        before_manifest: is called when all shards are made; raises what speaks against finishing.
    """

    what: str
    execute: Callable[[_Context, _Task, Report], ShardResult]
    context: _Context
    promise: Promise
    plan: Plan
    shard_names: Sequence[str]
    task: Callable[[int], _Task]
    known: Callable[[int], Counter[str]]
    sources: Sequence[str]
    max_bad: str
    fail_fast: frozenset[str] = frozenset()
    uncounted: frozenset[str] = frozenset()
    base: Manifest | None = None
    before_manifest: Callable[[], None] = lambda: None


def allowed_bad(text: str, *, records: int) -> int:
    """How many of `records` may be bad: ``20``, or ``1.5%``, rounded down.

    Raises:
        UsageError: it is neither a count nor a percentage.
    """
    match = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)\s*%", text.strip())
    if not match or (match[2] and float(match[2]) > 100):
        raise UsageError(f"--max-bad {text}: a count such as 20, or a percentage such as 1%, is needed")
    return int(match[1]) if match[1] else int(records * Fraction(match[2]) / 100)


def check_options(
    *,
    max_bad: str,
    compress: str | None,
    engine: str,
    ray_address: str | None,
    shortest_edge: int | None,
    quality: int,
) -> None:
    """Check the options that every command has which writes a data set, before anything is read.

    Raises:
        UsageError: a value that makes no sense.
    """
    allowed_bad(max_bad, records=0)
    if compress not in (None, names.ZSTD):
        raise UsageError(f"--compress {compress}: only {names.ZSTD} is known")
    if engine not in ("local", "ray"):
        raise UsageError(f"--engine {engine}: local or ray is needed")
    if ray_address is not None and engine != "ray":
        raise UsageError(f"--ray-address {ray_address}: belongs to --engine ray")
    if shortest_edge is not None and shortest_edge < 1:
        raise UsageError(f"--shortest-edge {shortest_edge}: must be at least 1")
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality}: 1 to 100 is needed")


def carry_out(job: Job[_Context, _Task], engine: Engine) -> list[str]:
    """Make what is not made yet; returns the summary's lines.

    Raises:
        PackError: too many records cannot be packed, one cannot whose policy is to fail, a worker was lost, or the output failed.
    """
    _make_shards(job, engine)
    job.before_manifest()
    return _finish(job)


def examples(items: Iterable[SetAside]) -> str:
    """The first few records set aside, a line each."""
    return "".join(f"\n  {describe(item)}" for item in islice(items, EXAMPLES))


def _make_shards(job: Job[_Context, _Task], engine: Engine) -> None:
    output = job.context.output
    total = len(job.plan.order)
    counts = np.diff(job.plan.starts).tolist()
    limit = allowed_bad(job.max_bad, records=total)
    bad = sum((job.known(shard) for shard in range(len(counts))), Counter[str]())

    def count(shard: int, set_aside: Counter[str]) -> None:
        """The shard's own findings take the place of what was known of it."""
        bad.subtract(job.known(shard))
        bad.update({code: times for code, times in set_aside.items() if code not in job.uncounted})
        if bad.total() > limit:
            ((_, info),) = finished_shards(job.context, [job.shard_names[shard]])
            raise PackError(
                f"{bad.total():,} of {total:,} records cannot be packed, more than --max-bad {job.max_bad} allows: "
                f"{describe_counts(+bad)}. The same command with a higher --max-bad continues; or remove {output.place}, mend the"
                f" records and pack anew. The last ones:{examples(info.set_aside if info else ())}"
            )

    todo = []
    for shard, (_, info) in enumerate(finished_shards(job.context, job.shard_names)):
        if info is None:
            todo.append(shard)
        else:
            for item in info.set_aside:
                if item.code in job.fail_fast:
                    raise PackError(f"{describe(item)} (--on-bad fail, or --policy {item.code}=fail)")
            for code in job.fail_fast.intersection(info.notes):
                raise PackError(
                    f"{job.shard_names[shard]}: was finished by an earlier run, which kept {info.notes[code]} records with {code} "
                    f"(--policy {code}=fail)"
                )
            count(shard, Counter(item.code for item in info.set_aside))
    if len(todo) < len(counts):
        print(f"{len(counts) - len(todo)} of {len(counts)} shards are finished already", file=sys.stderr)
    if not todo:
        return

    done = total - sum(counts[shard] for shard in todo)
    number = {name: shard for shard, name in enumerate(job.shard_names)}
    tasks = (job.task(shard) for shard in todo)
    try:
        with Progress(job.what, total=total, done=done) as progress:
            for result in _run(job, engine, tasks, len(todo), progress.advance):
                count(number[result.name], Counter(result.set_aside))
    except KeyboardInterrupt:
        print("\nfinished shards stay; the same command again continues", file=sys.stderr)
        raise


def _run(
    job: Job[_Context, _Task], engine: Engine, tasks: Iterator[_Task], count: int, report: Report
) -> Iterator[ShardResult]:
    if engine.name == "ray":
        from shardify.engines.ray import run_shards as run_ray

        return run_ray(
            job.execute,
            job.context,
            tasks,
            workers=engine.workers,
            report=report,
            address=engine.ray_address,
        )
    workers = min(engine.workers or len(os.sched_getaffinity(0)), count)
    return run_local(job.execute, job.context, tasks, workers=workers, report=report)


class _Hashed:
    """A draft that hashes what is written to it."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._digest = xxhash.xxh3_128()

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        size = len(view)
        while view:
            view = view[self._draft.write(view) :]
        return size

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _finish(job: Job[_Context, _Task]) -> list[str]:
    """Index, quarantine and manifest, each complete before it has its name, the manifest last; returns the summary."""
    output = job.context.output
    base = job.base
    first = len(base.shards) if base else 0
    infos: list[ShardInfo] = []
    shards: list[Shard] = []
    rows = []
    there = output.sizes()
    sidecars = [names.sidecar_name(tar) for tar in job.shard_names]
    opened = zip(job.shard_names, sidecars, output.open_all(sidecars), strict=True)
    for number, (tar, sidecar, file) in enumerate(opened, first):
        with file or BytesIO() as opened_file:
            content = opened_file.read()
        info = finished_shard(job.context, tar, size=there.get(tar), file=BytesIO(content))
        if info is None:
            raise PackError(
                f"{output.place}/{tar}: changed while the data set was packed; the same command again repairs it"
            )
        table = read_sidecar(sidecar, COLUMNS, file=BytesIO(content))
        infos.append(info)
        rows.append(index_rows(table, info, number))
        digest = xxhash.xxh3_128_hexdigest(content)
        shards.append(Shard(tar, sidecar, table.num_rows, info.bytes, info.xxh3_128, digest))
    counts = reconcile(len(job.plan.order), sum(shard.samples for shard in shards), infos)
    if not counts.packed:
        shown = examples(item for info in infos for item in info.set_aside)
        raise PackError(f"no record could be packed: {describe_counts(counts.set_aside)}{shown}")

    aside = quarantine(infos, job.sources)
    promise = job.promise
    manifest = Manifest(promise.format_version, promise.settings, promise.sources, shards, "", counts)
    if base:
        rows = [_index_of(output, base), *rows]
        # what stood there before: an earlier run may have got as far as this
        lines = _content(output, names.QUARANTINE).splitlines(keepends=True)
        aside = b"".join(lines[: sum(base.counts.set_aside.values())]) + aside
        manifest = _added(base, manifest)
    with output.create(names.INDEX) as draft:
        index = _Hashed(draft)
        write_index(index, rows)
        draft.commit()
    output.put(names.QUARANTINE, aside)
    manifest = _with_index(manifest, index.hexdigest())
    output.put(names.MANIFEST, encode_manifest(manifest))
    return _summary(shards, counts)


def _with_index(manifest: Manifest, digest: str) -> Manifest:
    return msgspec.structs.replace(manifest, index_xxh3_128=digest)


def _added(base: Manifest, new: Manifest) -> Manifest:
    """The finished set with what was added to it."""
    append = Append(new.settings, new.sources, len(base.shards), new.counts)
    sums = [
        dict(sorted((Counter(ours) + Counter(theirs)).items()))
        for ours, theirs in (
            (base.counts.set_aside, new.counts.set_aside),
            (base.counts.notes, new.counts.notes),
        )
    ]
    counts = Counts(
        base.counts.records_in + new.counts.records_in, base.counts.packed + new.counts.packed, *sums
    )
    return msgspec.structs.replace(
        base, shards=[*base.shards, *new.shards], counts=counts, appends=[*base.appends, append]
    )


def _content(output: Output, name: str) -> bytes:
    file = output.open(name)
    if file is None:
        raise PackError(f"{output.place}/{name}: has gone while the data set was added to")
    with file:
        return file.read()


def _index_of(output: Output, base: Manifest) -> np.ndarray[Any, np.dtype[np.void]]:
    """The finished set's index: the file's first rows, should an earlier run have written the longer one already."""
    index = np.load(BytesIO(_content(output, names.INDEX)), allow_pickle=False)
    rows: np.ndarray[Any, np.dtype[np.void]] = index[: base.counts.packed]
    return rows


def _summary(shards: Sequence[Shard], counts: Counts) -> list[str]:
    size = sum(shard.bytes for shard in shards)
    aside = sum(counts.set_aside.values())
    reasons = f" ({describe_counts(counts.set_aside)}; see {names.QUARANTINE})" if aside else ""
    lines = [
        f"{len(shards)} shards, {size / 1e6:,.1f} MB",
        f"{counts.records_in:,} records in = {counts.packed:,} packed + {aside:,} set aside{reasons}",
    ]
    return lines + ([f"kept, but worth knowing: {describe_counts(counts.notes)}"] if counts.notes else [])
