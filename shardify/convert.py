"""`shardify pack`: records and images become a data set of shards, index, quarantine and manifest.

split -> survey -> plan -> pack (an engine) -> index, quarantine, manifest. Everything up to the plan writes nothing; every shard is
complete when it has its name; the manifest comes last. The same call again continues where an earlier one stopped.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shardify.audit import describe, describe_counts, reconcile, write_quarantine
from shardify.engines.local import run_shards
from shardify.errors import PackError, SourceError, UsageError
from shardify.format import names
from shardify.format.index import COLUMNS, index_rows, write_index
from shardify.format.manifest import Counts, Manifest, Shard, Source, encode_manifest
from shardify.format.sidecar import SetAside, ShardInfo, read_sidecar
from shardify.images.stores import ImageStore, open_store
from shardify.outfolder import (
    Promise,
    check_promise,
    claimed,
    finished_manifest,
    remove_work,
    write_durably,
    write_promise,
)
from shardify.pack import PackContext, ShardTask, find_faults, finished_shard, sync_folder
from shardify.plan import Cut, Plan, make_cut, make_plan
from shardify.progress import Progress
from shardify.sources.llava import RecordFile, open_unchanged, record_names, split_records
from shardify.survey import Survey, count_codes, survey_records

_EXAMPLES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """What to pack, and how.

    Attributes:
        records: LLaVA JSON arrays or JSONL files.
        images: folders and zip archives, searched in this order.
        out: the folder for the data set.
        shuffle: permute the records, keyed by `seed`.
        seed: any integer.
        shard_size: target bytes of a shard, such as ``256MB``, which is the default.
        samples_per_shard: or: samples in each shard.
        shards: or: how many shards.
        multiple_of: round the shard count up to a multiple of this.
        on_bad: ``set-aside``, or ``fail`` at the first record that cannot be packed.
        max_bad: stop when more records than this cannot be packed: a count, or a percentage with ``%``.
        workers: processes; None for as many as there are cores. The output does not depend on it.
    """

    records: Sequence[Path]
    out: Path
    images: Sequence[Path] = ()
    shuffle: bool = True
    seed: int = 0
    shard_size: str | None = None
    samples_per_shard: int | None = None
    shards: int | None = None
    multiple_of: int = 1
    on_bad: str = "set-aside"
    max_bad: str = "1%"
    workers: int | None = None


def pack_dataset(options: PackOptions) -> None:
    """Pack a data set, or continue one; prints progress on standard error and a closing summary.

    Raises:
        UsageError: options that cannot be honoured, or an output folder that holds something else.
        SourceError: records or images cannot be read, or no image is found at all.
        PackError: too many records cannot be packed, one cannot under ``fail``, or a worker was lost.
    """
    cut = make_cut(
        shard_size=options.shard_size,
        samples_per_shard=options.samples_per_shard,
        shards=options.shards,
        multiple_of=options.multiple_of,
    )
    allowed_bad(options.max_bad, records=0)  # an unreadable limit is refused before anything is read
    out = os.fspath(options.out)
    files = [
        split_records(path, name=name)
        for path, name in zip(options.records, record_names(options.records), strict=True)
    ]
    stores = [open_store(path) for path in options.images]
    promise = Promise(_settings(options, cut), _sources(files, stores))
    lines = ["is complete: nothing to do"]
    try:
        if finished_manifest(out, promise) is None or os.path.lexists(os.path.join(out, names.WORK_FOLDER)):
            with claimed(out):
                if finished_manifest(out, promise) is None:
                    lines = _pack(options, cut, files, stores, promise)
                remove_work(out)
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else out
        raise PackError(f"{where}: {error.strerror or error}") from error
    # all is done and in its place: where nobody can be told, that is no fault of the data set
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # there may be none
    shown = out.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(f"{shown}: " + "\n".join(lines), flush=True)
    except OSError as error:
        raise PackError(
            f"{shown} is complete, but its summary cannot be printed: {error.strerror}"
        ) from error


def allowed_bad(text: str, *, records: int) -> int:
    """How many of `records` may be bad: ``20``, or ``1.5%``, rounded down.

    Raises:
        UsageError: it is neither a count nor a percentage.
    """
    match = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)\s*%", text.strip())
    if not match or (match[2] and float(match[2]) > 100):
        raise UsageError(f"--max-bad {text}: a count such as 20, or a percentage such as 1%, is needed")
    return int(match[1]) if match[1] else int(records * Fraction(match[2]) / 100)


def _settings(options: PackOptions, cut: Cut) -> dict[str, Any]:
    """All that shapes the bytes, and nothing else."""
    return {
        "shuffle": options.shuffle,
        "seed": options.seed if options.shuffle else None,
        "shard_size": cut.shard_size,
        "samples_per_shard": cut.samples_per_shard,
        "shards": cut.shards,
        "multiple_of": cut.multiple_of,
        "check": "header",
    }


def _sources(files: Sequence[RecordFile], stores: Sequence[ImageStore]) -> list[Source]:
    return [
        *(Source("records", file.name, len(file.offsets), file.fingerprint) for file in files),
        *(Source(store.kind, store.name, fingerprint=store.fingerprint) for store in stores),
    ]


def _pack(
    options: PackOptions,
    cut: Cut,
    files: Sequence[RecordFile],
    stores: Sequence[ImageStore],
    promise: Promise,
) -> list[str]:
    """Pack what is not packed yet; returns the summary."""
    out = os.fspath(options.out)
    check_promise(out, promise)
    total = sum(len(file.offsets) for file in files)
    if not total:
        raise SourceError(f"{', '.join(file.path for file in files)}: no records; there is nothing to pack")
    with Progress("reading records", total=total, unit="records") as progress:
        survey = survey_records(files, stores, progress=progress.advance)
    context = PackContext(
        out=out,
        plan="",
        digits=names.key_digits(total),
        record_files=tuple((file.path, file.name, file.stamp) for file in files),
        file_starts=tuple(np.cumsum([0, *(len(file.offsets) for file in files)]).tolist()[:-1]),
        readers=tuple(store.reader for store in stores),
        searched=f"not in {', '.join(store.name for store in stores)}"
        if stores
        else "no image root was given",
        fail=False,
    )
    _require_images(survey, stores)
    _require_good(options, survey, context)

    plan = make_plan(survey.records["span"], shuffle=options.shuffle, seed=options.seed, cut=cut)
    promise = Promise(promise.settings, promise.sources, _found(survey, plan))
    check_promise(out, promise)
    write_promise(out, promise)
    context = replace(context, plan=promise.id, fail=options.on_bad == "fail")

    shard_names = [names.shard_name(number, plan.shards) for number in range(plan.shards)]
    _pack_shards(options, context, survey, plan, shard_names)
    for path, _, stamp in context.record_files:
        os.close(open_unchanged(path, stamp))
    return _finish(context, promise, total, shard_names)


def _found(survey: Survey, plan: Plan) -> dict[str, Any]:
    digest = xxhash.xxh3_128(plan.starts.tobytes())
    digest.update(np.ascontiguousarray(survey.records["span"]).tobytes())
    digest.update(np.ascontiguousarray(survey.records["code"]).tobytes())
    return {
        "bytes of all samples": int(survey.records["span"].sum()),
        "records that cannot be packed": survey.bad.total(),
        "digest of records and image sizes": digest.hexdigest(),
    }


def _require_images(survey: Survey, stores: Sequence[ImageStore]) -> None:
    """Refuse to set everything aside when the roots are wrong."""
    if not len(survey.images) or (survey.images["store"] >= 0).any():
        return
    searched = (
        "Searched: " + ", ".join(_described(store) for store in stores) if stores else "No --images was given"
    )
    raise SourceError(
        f"none of the {len(survey.images):,} images that the records name was found. {searched}. First looked for: "
        f"{', '.join(survey.looked_for) or '(no usable path)'}. --images is the folder or zip in which these paths begin"
    )


def _described(store: ImageStore) -> str:
    holds = f" (holds {', '.join(store.examples)}, ...)" if store.examples else ""
    return f"{store.kind} {store.path}{holds}"


def _require_good(options: PackOptions, survey: Survey, context: PackContext) -> None:
    """Stop before anything is written, when the survey already knows enough."""
    bad, total = survey.bad, len(survey.records)
    if not bad:
        return
    numbers = np.flatnonzero(survey.records["code"])
    first = find_faults(context, _task(survey, numbers[:_EXAMPLES], "", 0))
    if options.on_bad == "fail" and first:
        raise PackError(f"{describe(first[0])} (--on-bad fail)")
    examples = _examples(first)
    if bad.total() == total:
        raise PackError(f"no record can be packed: {describe_counts(bad)}{examples}")
    if bad.total() > allowed_bad(options.max_bad, records=total):
        raise PackError(
            f"{bad.total():,} of {total:,} records cannot be packed, more than --max-bad {options.max_bad} allows: "
            f"{describe_counts(bad)}. This run wrote nothing. The first ones:{examples}"
        )


def _task(
    survey: Survey, numbers: np.ndarray[Any, np.dtype[np.int64]], name: str, position: int
) -> ShardTask:
    records = survey.records[numbers]
    counts = records["images"].astype(np.int64)
    # rows first .. first + count of each record, one record after another
    rows = np.repeat(survey.first_image[numbers] - np.cumsum(counts) + counts, counts) + np.arange(
        counts.sum()
    )
    return ShardTask(name, position, numbers, records, survey.images[rows])


def _pack_shards(
    options: PackOptions, context: PackContext, survey: Survey, plan: Plan, shard_names: Sequence[str]
) -> None:
    total = len(survey.records)
    sizes = dict(zip(shard_names, np.diff(plan.starts).tolist(), strict=True))
    limit = allowed_bad(options.max_bad, records=total)
    bad = survey.bad

    def numbers_of(shard: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return plan.order[plan.starts[shard] : plan.starts[shard + 1]]

    def count(shard: int, set_aside: Counter[str]) -> None:
        """The shard's own findings take the place of what the survey knew of it."""
        bad.subtract(count_codes(survey.records[numbers_of(shard)]))
        bad.update(set_aside)
        if bad.total() > limit:
            info = finished_shard(context.out, shard_names[shard], context.plan)
            raise PackError(
                f"{bad.total():,} of {total:,} records cannot be packed, more than --max-bad {options.max_bad} allows: "
                f"{describe_counts(+bad)}. The same command with a higher --max-bad continues; or remove {context.out}, mend the"
                f" records and pack anew. The last ones:{_examples(info.set_aside if info else ())}"
            )

    todo = []
    for shard, name in enumerate(shard_names):
        info = finished_shard(context.out, name, context.plan)
        if info is None:
            todo.append(shard)
        else:
            if context.fail and info.set_aside:
                raise PackError(f"{describe(info.set_aside[0])} (--on-bad fail)")
            count(shard, Counter(item.code for item in info.set_aside))
    if len(todo) < plan.shards:
        print(f"{plan.shards - len(todo)} of {plan.shards} shards are finished already", file=sys.stderr)
    if not todo:
        return

    def tasks() -> Iterator[ShardTask]:
        for shard in todo:
            yield _task(survey, numbers_of(shard), shard_names[shard], int(plan.starts[shard]))

    workers = options.workers or len(os.sched_getaffinity(0))
    done = total - sum(sizes[shard_names[shard]] for shard in todo)
    number = {name: shard for shard, name in enumerate(shard_names)}
    try:
        with Progress("packing", total=total, done=done) as progress:
            packed = run_shards(context, tasks(), workers=min(workers, len(todo)), report=progress.advance)
            for result in packed:
                count(number[result.name], Counter(result.set_aside))
    except KeyboardInterrupt:
        print("\nfinished shards stay; the same command again continues", file=sys.stderr)
        raise


def _finish(context: PackContext, promise: Promise, total: int, shard_names: Sequence[str]) -> list[str]:
    """Index, quarantine and manifest, each complete before it has its name, the manifest last; returns the summary."""
    out = context.out
    infos: list[ShardInfo] = []
    shards: list[Shard] = []
    rows = []
    for number, tar in enumerate(shard_names):
        info = finished_shard(out, tar, context.plan)
        if info is None:
            raise PackError(
                f"{out}/{tar}: changed while the data set was packed; the same command again repairs it"
            )
        sidecar = os.path.join(out, names.sidecar_name(tar))
        table = read_sidecar(sidecar, COLUMNS)
        digest = xxhash.xxh3_128_hexdigest(Path(sidecar).read_bytes())
        infos.append(info)
        rows.append(index_rows(table, info, number))
        shards.append(Shard(tar, names.sidecar_name(tar), table.num_rows, info.bytes, info.xxh3_128, digest))
    counts = reconcile(total, sum(shard.samples for shard in shards), infos)
    if not counts.packed:
        examples = _examples(item for info in infos for item in info.set_aside)
        raise PackError(f"no record could be packed: {describe_counts(counts.set_aside)}{examples}")

    work = os.path.join(out, names.WORK_FOLDER)
    index = os.path.join(work, names.INDEX)
    write_index(index, rows)
    digest = xxhash.xxh3_128_hexdigest(Path(index).read_bytes())
    write_quarantine(
        os.path.join(work, names.QUARANTINE), infos, [name for _, name, _ in context.record_files]
    )
    manifest = Manifest(promise.format_version, promise.settings, promise.sources, shards, digest, counts)
    write_durably(os.path.join(work, names.MANIFEST), encode_manifest(manifest))
    for name in (names.INDEX, names.QUARANTINE, names.MANIFEST):
        os.rename(os.path.join(work, name), os.path.join(out, name))
        sync_folder(out)
    return _summary(shards, counts)


def _summary(shards: Sequence[Shard], counts: Counts) -> list[str]:
    size = sum(shard.bytes for shard in shards)
    aside = sum(counts.set_aside.values())
    reasons = f" ({describe_counts(counts.set_aside)}; see {names.QUARANTINE})" if aside else ""
    lines = [
        f"{len(shards)} shards, {size / 1e6:,.1f} MB",
        f"{counts.records_in:,} records in = {counts.packed:,} packed + {aside:,} set aside{reasons}",
    ]
    return lines + ([f"kept, but worth knowing: {describe_counts(counts.notes)}"] if counts.notes else [])


def _examples(items: Iterable[SetAside]) -> str:
    """The first few records set aside, a line each."""
    return "".join(f"\n  {describe(item)}" for item in islice(items, _EXAMPLES))
