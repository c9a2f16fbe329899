"""`shardify pack`: records and images become a data set of shards, index, quarantine and manifest.

open the sources -> survey -> plan -> pack (an engine) -> index, quarantine, manifest. Everything up to the plan writes nothing but spools of
sources that cannot be read in place.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL
import xxhash

from shardify.audit import FAIL, REASONS, Policies, describe_counts, make_policies
from shardify.errors import PackError, SourceError, UsageError
from shardify.format import names
from shardify.format.manifest import Manifest, Source
from shardify.images.resolve import Resolver
from shardify.images.spool import SpoolReader
from shardify.images.stores import LISTED, ImageStore, StoreSpec, open_store
from shardify.outputs import Output, open_output
from shardify.pack import PackContext, RecordSource, ShardTask, Shrink, find_faults, pack_shard
from shardify.plan import Cut, Plan, make_cut, make_plan
from shardify.progress import Progress
from shardify.promise import Promise, check_promise, end_work, is_finished, read_finished, write_promise
from shardify.records import MAX_RECORD_BYTES
from shardify.run import EXAMPLES, Engine, Job, allowed_bad, carry_out, check_options, examples
from shardify.scatter import scatter_images
from shardify.sources.llava import RecordFile, open_unchanged, record_names
from shardify.sources.open import needs_spool, open_source
from shardify.sources.spec import SourceSpec
from shardify.survey import Survey, count_codes, survey_records

_MAX_OPEN = 64  # record files at a time, of the thousands that there may be

CHECKS = ("header", "decode", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """What to pack, and how.

    Attributes:
        records: files or URLs of records, in any form that `open_source` knows.
        images: folders, archives and URLs, searched in this order.
        sources: or: the records, specified further.
        stores: or: the images, likewise.
        prefixes: (old, new) pairs that image paths of all sources are tried with before they are tried as they stand.
        out: the folder or URL for the data set.
        shuffle: permute the records, keyed by `seed`.
        seed: any integer.
        shard_size: target bytes of a shard, such as ``256MB``, which is the default.
        samples_per_shard: or: samples in each shard.
        shards: or: how many shards.
        multiple_of: round the shard count up to a multiple of this.
        compress: ``zstd``, or None.
        check: of images: ``header`` (format, size, cheap truncation checks), ``decode`` (every pixel), or ``none``.
        shortest_edge: make pictures smaller whose shorter side has more pixels.
        quality: of those, as JPEG and WebP count it.
        policies: ``CODE=keep``, ``CODE=set-aside`` or ``CODE=fail``.
        on_bad: ``set-aside``, or ``fail`` at the first record that cannot be packed.
        max_bad: stop when more records than this cannot be packed: a count, or a percentage with ``%``.
        append: add to the finished data set at `out`, as new shards.
        read_order: read images in the order of their archives first, and scatter them: for slow disks.
        engine: the processes that pack: ``local`` or ``ray``; the output does not depend on it.
        ray_address: of a Ray cluster; None starts one on this machine.
        workers: processes; None for as many as there are cores.
    """

    records: Sequence[str | os.PathLike[str]] = ()
    out: str | os.PathLike[str]
    images: Sequence[str | os.PathLike[str]] = ()
    sources: Sequence[SourceSpec] = ()
    stores: Sequence[StoreSpec] = ()
    prefixes: Sequence[tuple[str, str]] = ()
    shuffle: bool = True
    seed: int = 0
    shard_size: str | None = None
    samples_per_shard: int | None = None
    shards: int | None = None
    multiple_of: int = 1
    compress: str | None = None
    check: str = "header"
    shortest_edge: int | None = None
    quality: int = 90
    policies: Sequence[str] = ()
    on_bad: str = "set-aside"
    max_bad: str = "1%"
    append: bool = False
    read_order: bool = False
    engine: str = "local"
    ray_address: str | None = None
    workers: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """The sources, opened."""

    specs: Sequence[SourceSpec]
    files: Sequence[RecordFile]
    stores: Sequence[ImageStore]
    spool: str  # the folder with what had to be spooled, empty when nothing had

    @property
    def embedded(self) -> list[SpoolReader]:
        """Readers of the images that came with records; their stores' numbers follow those of `stores`."""
        return [SpoolReader(file.embedded.path) for file in self.files if file.embedded]


def pack_dataset(options: PackOptions) -> None:
    """Pack a data set, or continue one; prints progress on standard error and a closing summary.

    Raises:
        UsageError: options that cannot be honoured, or an output folder that holds something else.
        SourceError: records or images cannot be read, or no image is found at all.
        PackError: too many records cannot be packed, one cannot under ``fail``, or a worker was lost.
    """
    cut = _check_options(options)
    specs = _specs(options)
    output = open_output(os.fspath(options.out))
    lines = ["is complete: nothing to do"]
    try:
        base = _base(output) if options.append else None
        with ExitStack() as claim:
            if any(needs_spool(spec) for spec in specs):
                claim.enter_context(output.claimed())
                opened = _open(options, specs, output.spool())
            else:
                opened = _open(options, specs, "")
            if base:
                opened = _apart(opened, base)
            _require_reachable(options, output, opened)
            promise = Promise(_settings(options, cut, opened), _sources(opened))
            if not _is_done(options, output, promise) or output.has_work():
                if not any(needs_spool(spec) for spec in specs):
                    claim.enter_context(output.claimed())
                if not _is_done(options, output, promise):
                    lines = _pack(options, cut, opened, output, promise)
                lines += end_work(output)
    except OSError as error:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else output.place
        raise PackError(f"{where}: {error.strerror or error}") from error
    print_summary(output, lines)


def _require_reachable(options: PackOptions, output: Output, opened: _Opened) -> None:
    """Refuse what only this machine could read: a spool lies with the output, or, of an output in an object store, here."""
    spools = options.read_order or any(file.embedded for file in opened.files)
    if options.engine == "ray" and output.is_remote and spools:
        what = "--read-order" if options.read_order else "a source that brings its images along"
        raise UsageError(
            f"{what} needs a folder that all nodes see: with --engine ray, give --out such a folder instead of {output.place}"
        )


def plan_dataset(options: PackOptions) -> Plan:
    """The plan that `pack_dataset` would carry out, of sources that need no spool; writes nothing.

    Raises:
        UsageError, SourceError: as `pack_dataset`.
    """
    cut = _check_options(options)
    specs = _specs(options)
    if any(needs_spool(spec) for spec in specs):
        raise UsageError("only records that are read in place can be planned without packing")
    survey, _ = _survey(_open(options, specs, ""))
    return make_plan(survey.records["span"], shuffle=options.shuffle, seed=options.seed, cut=cut)


def print_summary(output: Output, lines: Sequence[str]) -> None:
    """Say what is done on standard output.

    Raises:
        PackError: it cannot be printed, which is no fault of the data set.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # there may be none
    shown = output.place.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(f"{shown}: " + "\n".join(lines), flush=True)
    except OSError as error:
        raise PackError(
            f"{shown} is complete, but its summary cannot be printed: {error.strerror}"
        ) from error


def _check_options(options: PackOptions) -> Cut:
    cut = make_cut(
        shard_size=options.shard_size,
        samples_per_shard=options.samples_per_shard,
        shards=options.shards,
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
    make_policies(options.policies)
    if options.check not in CHECKS:
        raise UsageError(f"--check {options.check}: one of {', '.join(CHECKS)} is needed")
    if not options.records and not options.sources:
        raise UsageError("no records are named; give record files, or --recipe NAME --root DIR")
    return cut


def _specs(options: PackOptions) -> list[SourceSpec]:
    """All sources, named, with the prefix maps that hold for all."""
    plain = [os.fspath(path) for path in options.records]
    named = [SourceSpec(path=path, name=name) for path, name in zip(plain, record_names(plain), strict=True)]
    return [
        replace(spec, prefixes=(*spec.prefixes, *options.prefixes)) for spec in (*named, *options.sources)
    ]


def _open(options: PackOptions, specs: Sequence[SourceSpec], spool: str) -> _Opened:
    files = [open_source(spec, spool=spool) for spec in specs]
    stores = [StoreSpec(os.fspath(path)) for path in options.images]
    return _Opened(
        specs, files, [open_store(store.path, store.mount) for store in (*stores, *options.stores)], spool
    )


def _settings(options: PackOptions, cut: Cut, opened: _Opened) -> dict[str, Any]:
    """All that shapes the bytes, and nothing else."""
    settings: dict[str, Any] = {
        "shuffle": options.shuffle,
        "seed": options.seed if options.shuffle else None,
        "shard_size": cut.shard_size,
        "samples_per_shard": cut.samples_per_shard,
        "shards": cut.shards,
        "multiple_of": cut.multiple_of,
        "check": options.check,
    }
    if options.compress:
        settings["compress"] = options.compress
    if options.shortest_edge:
        settings["shortest_edge"] = options.shortest_edge
        settings["quality"] = options.quality
        settings["resized_by"] = f"pillow {PIL.__version__}"
    # to fail is no matter of the bytes, nor is a default
    chosen = {
        code: action
        for code, action in make_policies(options.policies).chosen.items()
        if action not in (FAIL, Policies().action(code))
    }
    if chosen:
        settings["policies"] = chosen
    if any(spec.prefixes for spec in opened.specs):
        settings["prefixes"] = [[list(pair) for pair in spec.prefixes] for spec in opened.specs]
    if any(spec.captions for spec in opened.specs):
        settings["captions"] = [spec.captions.field if spec.captions else None for spec in opened.specs]
    if any(store.mount for store in opened.stores):
        settings["mounts"] = [store.mount for store in opened.stores]
    return settings


def _sources(opened: _Opened) -> list[Source]:
    return [
        *(
            Source("records", file.name, len(file.offsets), file.fingerprint, spec.licence, spec.citation)
            for spec, file in zip(opened.specs, opened.files, strict=True)
        ),
        *(Source(store.kind, store.name, fingerprint=store.fingerprint) for store in opened.stores),
    ]


def _is_done(options: PackOptions, output: Output, promise: Promise) -> bool:
    if not options.append:
        return is_finished(output, promise)
    base = _base(output)
    return any(
        _own_settings(append.settings) == promise.settings and append.sources == promise.sources
        for append in base.appends
    )


_APPENDED_TO = "appended_to"


def _own_settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != _APPENDED_TO}


def _base(output: Output) -> Manifest:
    base = read_finished(output)
    if base is None:
        raise UsageError(
            f"{output.place}: no finished data set to append to; pack one first, without --append"
        )
    return base


def _apart(opened: _Opened, base: Manifest) -> _Opened:
    """Sources that are called as another one of the set already get their folder's name before theirs."""
    taken = {source.name: source.fingerprint for source in base.all_sources if source.kind == "records"}
    files = []
    for spec, file in zip(opened.specs, opened.files, strict=True):
        name = file.name
        where = spec.path.partition("://")[2] if "://" in spec.path else os.path.abspath(spec.path)
        folder = os.path.dirname(where.rstrip("/"))
        while taken.get(name, file.fingerprint) != file.fingerprint and os.path.basename(folder):
            name = f"{os.path.basename(folder)}/{name}"
            folder = os.path.dirname(folder)
        files.append(replace(file, name=name))
    return replace(opened, files=files)


def _refuse_repeated(base: Manifest, promise: Promise) -> None:
    """Refuse to append what is in the set already."""
    there = {source.fingerprint: source.name for source in base.all_sources if source.kind == "records"}
    for source in promise.sources:
        if source.kind == "records" and source.fingerprint in there:
            raise UsageError(
                f"{source.name}: its records are in the data set already, as {there[source.fingerprint]}; every one would be packed twice"
            )


def _refuse_mixed(options: PackOptions, base: Manifest, output: Output) -> None:
    """Refuse to make some shards of a set compressed and others not: no pattern would name all, and few readers take both."""
    compress = names.ZSTD if base.shards[0].tar.endswith(names.TAR_ZST) else None
    if options.compress != compress:
        asked = f"--compress {compress}" if compress else "no --compress"
        raise UsageError(
            f"{output.place}: its shards are *{base.shards[0].tar.partition('.')[2]}; give {asked}"
        )


def _survey(opened: _Opened) -> tuple[Survey, Resolver]:
    total = sum(len(file.offsets) for file in opened.files)
    if not total:
        listed = ", ".join(file.path for file in opened.files)
        raise SourceError(f"{listed}: no records; there is nothing to pack")
    resolver = Resolver(opened.stores, [spec.prefixes for spec in opened.specs])
    with Progress("reading records", total=total, unit="records") as progress:
        survey = survey_records(
            opened.files, resolver, embedded_store=len(opened.stores), progress=progress.advance
        )
    return survey, resolver


def _pack(options: PackOptions, cut: Cut, opened: _Opened, output: Output, promise: Promise) -> list[str]:
    """Pack what is not packed yet; returns the summary."""
    base = _base(output) if options.append else None
    if base:
        _refuse_repeated(base, promise)
        _refuse_mixed(options, base, output)
        promise = Promise({**promise.settings, _APPENDED_TO: base.index_xxh3_128}, promise.sources)
    check_promise(output, promise, base=base)
    survey, resolver = _survey(opened)
    total = len(survey.records)
    before = base.counts.records_in if base else 0
    starts = np.cumsum([0, *(len(file.offsets) for file in opened.files)]).tolist()
    embedded = opened.embedded
    context = PackContext(
        output=output,
        digits=names.key_digits(before + total),
        sources=tuple(
            RecordSource(file.path, file.name, start, file.stamp)
            for file, start in zip(opened.files, starts, strict=False)
        ),
        source_notes=survey.source_notes,
        readers=(*(store.reader for store in opened.stores), *embedded),
        mounts=(*(store.mount for store in opened.stores), *("" for _ in embedded)),
        rules=tuple(resolver.rules),
        searched=f"not in {', '.join(store.name for store in opened.stores)}"
        if opened.stores
        else "no image root was given",
        policies=make_policies(options.policies),
        check=options.check,
        compress=options.compress or "",
        shrink=Shrink(options.shortest_edge, options.quality) if options.shortest_edge else None,
        is_remote=output.is_remote or any("://" in store.path for store in opened.stores),
    )
    _require_images(survey, opened.stores)
    _require_good(options, survey, context, opened.stores)

    plan = make_plan(survey.records["span"], shuffle=options.shuffle, seed=options.seed, cut=cut)
    promise = Promise(promise.settings, promise.sources, _found(survey, plan))
    check_promise(output, promise, base=base)
    write_promise(output, promise, base=base)
    context = replace(
        context, plan=promise.id, policies=make_policies(options.policies, on_bad=options.on_bad)
    )
    first = len(base.shards) if base else 0
    shard_names = [
        # what is added gets as many digits as what is there, where its number needs no more
        names.shard_name(number, first or plan.shards, context.compress)
        for number in range(first, first + plan.shards)
    ]
    if options.read_order:
        context = scatter_images(
            context,
            survey,
            plan,
            shard_names=shard_names,
            stores=opened.stores,
            spool=opened.spool or output.spool(),
        )

    def numbers_of(shard: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return plan.order[plan.starts[shard] : plan.starts[shard + 1]]

    def task(shard: int) -> ShardTask:
        made = _task(survey, numbers_of(shard), opened.stores)
        made = replace(made, name=shard_names[shard], position=before + int(plan.starts[shard]))
        return replace(made, raw=_raw(context, made)) if options.engine == "ray" else made

    job = Job(
        what="packing",
        execute=pack_shard,
        context=context,
        promise=promise,
        plan=plan,
        shard_names=shard_names,
        task=task,
        known=lambda shard: count_codes(survey.records[numbers_of(shard)]),
        sources=[source.name for source in context.sources],
        max_bad=options.max_bad,
        fail_fast=_failing(context.policies),
        base=base,
        before_manifest=lambda: _require_unchanged(context),
    )
    engine = Engine(name=options.engine, workers=options.workers, ray_address=options.ray_address)
    return carry_out(job, engine)


def _failing(policies: Policies) -> frozenset[str]:
    return frozenset(code for code, action in policies.chosen.items() if action == FAIL)


def _require_unchanged(context: PackContext) -> None:
    for source in context.sources:
        os.close(open_unchanged(source.path, source.stamp))


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


def _require_good(
    options: PackOptions, survey: Survey, context: PackContext, stores: Sequence[ImageStore]
) -> None:
    """Stop before anything is written, when the survey already knows enough."""
    bad, total = survey.bad, len(survey.records)
    if not bad:
        return
    policies = make_policies(options.policies, on_bad=options.on_bad)
    fatal = [number for number, code in enumerate(("", *REASONS)) if code and policies.action(code) == FAIL]
    numbers = np.flatnonzero(np.isin(survey.records["code"], fatal))
    # raises, unless an earlier reason of each of these records is to be set aside
    find_faults(replace(context, policies=policies), _task(survey, numbers, stores))
    numbers = np.flatnonzero(survey.records["code"])
    first = find_faults(context, _task(survey, numbers[:EXAMPLES], stores))
    if bad.total() == total:
        raise PackError(f"no record can be packed: {describe_counts(bad)}{examples(first)}")
    if bad.total() > allowed_bad(options.max_bad, records=total):
        raise PackError(
            f"{bad.total():,} of {total:,} records cannot be packed, more than --max-bad {options.max_bad} allows: "
            f"{describe_counts(bad)}. This run wrote nothing. The first ones:{examples(first)}"
        )


def _task(
    survey: Survey, numbers: np.ndarray[Any, np.dtype[np.int64]], stores: Sequence[ImageStore]
) -> ShardTask:
    records = survey.records[numbers]
    counts = records["images"].astype(np.int64)
    # rows first .. first + count of each record, one record after another
    rows = np.repeat(survey.first_image[numbers] - np.cumsum(counts) + counts, counts) + np.arange(
        counts.sum()
    )
    images = survey.images[rows]
    listed = images[images["method"] == LISTED]
    names_there = tuple(
        stores[store].listed_name(number)
        for store, number in zip(listed["store"].tolist(), listed["offset"].tolist(), strict=True)
    )
    return ShardTask("", 0, numbers, records, images, names_there)


def _raw(context: PackContext, task: ShardTask) -> bytes:
    """The bytes of a task's records, for a process that may not reach their files."""
    parts = []
    descriptors: dict[int, int] = {}
    try:
        for file, offset, length in task.records[["file", "offset", "length"]].tolist():
            if file not in descriptors:
                if len(descriptors) == _MAX_OPEN:
                    os.close(descriptors.pop(next(iter(descriptors))))
                source = context.sources[file]
                descriptors[file] = open_unchanged(source.path, source.stamp)
            parts.append(os.pread(descriptors[file], min(length, MAX_RECORD_BYTES + 1), offset))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return b"".join(parts)
