"""Reads a data set again, byte for byte, and names whatever differs from what is recorded of it.

Each shard is checked by a process of its own, so that whatever damaged files do to the libraries that read them, the other shards are
checked all the same. What holds between the files of a data set is checked afterwards, from the shards' reports.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from itertools import groupby
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from tqdm import tqdm

from shardify.errors import FormatError, ImageError, RecordError
from shardify.format.hashing import hash_file
from shardify.format.headers import BLOCK, parse_header
from shardify.format.index import has_digest, index_rows, read_index
from shardify.format.manifest import PART, RECORDS, Manifest, Shard, read_manifest
from shardify.format.names import (
    INDEX,
    MANIFEST,
    QUARANTINE,
    RECORD_FIELD,
    SHARD_ENDINGS,
    SIDECAR,
    is_image_field,
)
from shardify.format.samples import is_compressed
from shardify.format.scan import scan_shard
from shardify.format.shards import Selection, Shards, describe_missing, find_sidecar, select_shards
from shardify.format.sidecar import SetAside, ShardInfo, decode_set_aside, read_shard_info, read_sidecar
from shardify.format.tar import END_OF_ARCHIVE, member_header, padding, read_members
from shardify.format.zstd import read_frame, read_seek_table
from shardify.images.probe import probe
from shardify.processes import Ended, each_in_process
from shardify.progress import Progress
from shardify.records import parse_record

MAX_LINES = 50
"""Differences shown of one shard; the rest is counted. Bytes inserted into a tar move everything behind them."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One difference: the file, and where in it, as far as that is known."""

    path: str
    what: str
    key: str | None = None
    member: str | None = None
    offset: int | None = None

    def __str__(self) -> str:
        places = [f"key {self.key}"] if self.key is not None else []
        places += [f"member {self.member}"] if self.member is not None else []
        places += [f"offset {self.offset}"] if self.offset is not None else []
        return ": ".join(filter(None, (self.path, ", ".join(places), self.what)))


def verify_shards(shards: Shards, *, workers: int | None = None) -> bool:
    """Check everything, print one line for each difference, and a summary.

    Checked are: the hashes of tars, sidecars, index.npy and of every member; headers and padding; keys and their order; sidecar and index
    rows against the tar; images and records against their rows; the manifest against the files; and that every record is packed or set
    aside, once. The manifest's settings and fingerprints are about the sources, which are not looked for. Sets without a manifest are
    checked as far as their sidecars go; a tar without one is checked to be whole.

    Args:
        shards: as for `shardify.format.shards.open_shards`.
        workers: processes at a time; as many as there are cores by default.

    Returns:
        Whether nothing differs.

    Raises:
        UsageError, FormatError: no shards can be found by this name.
    """
    faults = 0

    def tell(found: Sequence[Fault | str]) -> None:
        nonlocal faults
        for fault in found:
            faults += 1
            tqdm.write(_printable(str(fault)), file=sys.stdout)

    damaged: list[str] = []

    def read(path: str) -> Manifest | None:
        try:
            return read_manifest(path)
        except FormatError as error:
            damaged.append(os.path.dirname(path))
            tell([str(error)])
            return None

    selections = select_shards(shards, read=read)
    tasks: list[_Task] = []
    for selection in selections:
        new, found = _tasks(selection, lenient=selection.folder in damaged)
        tasks += new
        tell(found)
    reports: dict[str, _Report] = {}
    with Progress("verifying", total=len(tasks), unit="shards") as progress:
        results = each_in_process(_check, tasks, workers=workers or len(os.sched_getaffinity(0)))
        for task, result in zip(tasks, results, strict=True):
            if isinstance(result, Ended):
                what = f"cannot be checked: its process was ended with status {result.status}"
                report = _Report(task.path, [Fault(task.path, what)])
            else:
                report = result
            tell(report.faults[:MAX_LINES])
            if len(report.faults) > MAX_LINES:
                tell([f"{report.path}: and {len(report.faults) - MAX_LINES} differences more"])
            reports[report.path] = report
            progress.advance(1, report.bytes)
    for selection in selections:
        if selection.manifest is not None:
            there = [reports[path] for path in selection.paths if path in reports]
            try:
                tell(_check_set(selection, selection.manifest, there))
            except Exception as error:  # noqa: BLE001 - a forged manifest may hold any number
                path = os.path.join(selection.folder, MANIFEST)
                tell([Fault(path, f"cannot be checked any further ({type(error).__name__}: {error})")])
    samples = sum(report.samples for report in reports.values())
    size = sum(report.bytes for report in reports.values())
    verdict = f"{faults:,} differences" if faults != 1 else "1 difference"
    print(
        f"{len(tasks):,} shards, {samples:,} samples, {size / 1e6:,.1f} MB: {verdict if faults else 'all is as recorded'}"
    )
    return not faults


def _printable(line: str) -> str:
    """One line, whatever keys and error messages hold."""
    line = " ".join(line.splitlines())
    return line if line.isprintable() else line.encode("unicode_escape").decode()


@dataclass(frozen=True, slots=True)
class _Task:
    """One shard to check.

    Attributes:
        path: the tar.
        sidecar: its Parquet file, None when there is none to go by.
        shard: what the manifest says of it, None without one.
        number: its place in the manifest.
        index: path of index.npy, its samples, and the first of this shard; None when it cannot be read.
        sources: record files -> how many records they hold, or how many were taken of them.
        parts: those of them that records were taken of, which may be any JSON.
    """

    path: str
    sidecar: str | None
    shard: Shard | None = None
    number: int = 0
    index: tuple[str, int, int] | None = None
    sources: Mapping[str, int] = field(default_factory=dict)
    parts: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Report:
    """What was found in one shard; `records` are the numbers of its samples' records, by source."""

    path: str
    faults: list[Fault] = field(default_factory=list)
    samples: int = 0
    bytes: int = 0
    info: ShardInfo | None = None
    first_key: str = ""
    last_key: str = ""
    records: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    def add(
        self,
        what: str,
        *,
        path: str = "",
        key: str | None = None,
        member: str | None = None,
        offset: int | None = None,
    ) -> None:
        self.faults.append(Fault(path or self.path, what, key, member, offset))


def _tasks(selection: Selection, *, lenient: bool) -> tuple[list[_Task], list[Fault | str]]:
    """The shards to check, and what is missing or wrong with the index. `lenient`: the manifest is damaged, names may go beyond it."""
    manifest = selection.manifest
    there = {path for path in selection.paths if os.path.exists(path)}
    if manifest is None:
        missing = [path for path in selection.paths if path not in there]
        tasks = [_Task(path, find_sidecar(path)) for path in selection.paths if path in there]
        return tasks, [describe_missing(missing, len(selection.paths))] if missing and not lenient else []
    faults: list[Fault | str] = [Fault(path, "missing") for path in selection.paths if path not in there]
    index_path = os.path.join(selection.folder, INDEX)
    starts = np.cumsum([0] + [shard.samples for shard in manifest.shards]).tolist()
    readable = True
    try:
        rows = read_index(index_path, samples=starts[-1])
        if not has_digest(rows, index_path, manifest.index_xxh3_128):
            faults.append(Fault(index_path, f"its hash is not the one in {MANIFEST}"))
    except (FormatError, OSError) as error:
        readable = False
        faults.append(Fault(index_path, str(error).removeprefix(f"{index_path}: ")))
    sources, parts = _record_sources(manifest), _parts(manifest)
    number_of = {shard.tar: number for number, shard in enumerate(manifest.shards)}
    tasks = []
    for name, path in zip(selection.names, selection.paths, strict=True):
        if path not in there:
            continue
        number = number_of[name]
        shard = manifest.shards[number]
        index = (index_path, starts[-1], starts[number]) if readable else None
        tasks.append(
            _Task(path, os.path.join(selection.folder, shard.sidecar), shard, number, index, sources, parts)
        )
    return tasks, faults


def _check(task: _Task) -> _Report:
    report = _Report(task.path)
    try:
        _check_shard(task, report)
    except OSError as error:
        report.add(f"cannot be read ({error.strerror or error})")
    except Exception as error:  # noqa: BLE001 - what damaged Parquet raises has no bounds
        report.add(f"cannot be checked any further ({type(error).__name__}: {error})")
    return report


# --- one shard


def _check_shard(task: _Task, report: _Report) -> None:
    report.bytes = os.stat(task.path).st_size
    digest = hash_file(task.path)
    shard = task.shard
    if shard is not None and report.bytes != shard.bytes:
        report.add(f"{report.bytes} bytes, but {MANIFEST} records {shard.bytes}")
    if shard is not None and digest != shard.tar_xxh3_128:
        report.add(f"its hash is not the one in {MANIFEST}")
    try:
        table, info = _read_sidecar(task, report)
    except FormatError as error:
        report.add(str(error).removeprefix(f"{task.sidecar}: "), path=task.sidecar or "")
        table = None
    if table is None:
        _scan(task, report)
        return
    report.info = info
    if info.bytes not in (report.bytes, shard and shard.bytes):
        report.add(f"{report.bytes} bytes, but {task.sidecar} records {info.bytes}")
    if info.xxh3_128 not in (digest, shard and shard.tar_xxh3_128):
        report.add(f"its hash is not the one in {task.sidecar}")
    rows = table.to_pylist()
    report.samples = len(rows)
    _check_rows(task, report, rows, info)
    if task.index is not None:
        _check_index(task, report, table, info)
    sound = digest == (shard.tar_xxh3_128 if shard else info.xxh3_128)
    if not sound and all(fault.offset is None for fault in report.faults):
        report.add("every sample is as recorded, so that what changed lies outside of them")


def _read_sidecar(task: _Task, report: _Report) -> tuple[pa.Table | None, ShardInfo]:
    """The sidecar, None when there is none worth reading."""
    nothing = ShardInfo(0, "")
    if task.sidecar is None:
        return None, nothing
    if task.shard is not None:
        try:
            digest = hash_file(task.sidecar)
        except FileNotFoundError:
            report.add("missing", path=task.sidecar)
            return None, nothing
        if digest != task.shard.sidecar_xxh3_128:
            report.add(f"its hash is not the one in {MANIFEST}", path=task.sidecar)
            return None, nothing
    table = read_sidecar(task.sidecar)
    if task.shard is not None and table.num_rows != task.shard.samples:
        report.add(
            f"{table.num_rows} rows, but {MANIFEST} records {task.shard.samples} samples", path=task.sidecar
        )
    return table, read_shard_info(task.sidecar)


def _scan(task: _Task, report: _Report) -> None:
    """Without a sidecar: whether the tar is whole."""
    try:
        samples = len(scan_shard(task.path, name=os.path.basename(task.path)).rows)
    except FormatError as error:
        report.add(str(error).removeprefix(f"{task.path}: "))
        return
    report.samples = samples
    if task.shard is not None and samples != task.shard.samples:
        report.add(f"{samples} samples, but {MANIFEST} records {task.shard.samples}")


def _check_rows(task: _Task, report: _Report, rows: list[dict[str, Any]], info: ShardInfo) -> None:
    ours = task.shard is not None
    tolerant = set(info.tolerant)
    last_key = ""
    numbers: dict[str, list[int]] = {}
    for row in rows:
        key = row["key"]
        if ours and key <= last_key:
            report.add(f"comes after key {last_key}", key=key, offset=row["offset"])
        if ours and row["source"] not in task.sources:
            report.add(f"its source {row['source']!r} is not in {MANIFEST}", path=task.sidecar or "", key=key)
        numbers.setdefault(row["source"], []).append(row["record"])
        last_key = key
    with open(task.path, "rb", buffering=0) as file:
        spans = (_frame_spans if is_compressed(task.path) else _plain_spans)(file, report, rows, ours)
        for number, span, base in spans:
            row = rows[number]
            content = _check_members(report, span, row, base, ours=ours)
            if content is not None:
                packed = ours and row["source"] not in task.parts
                _check_content(report, content, row, packed=packed, strict=number not in tolerant)
    if rows:
        report.first_key, report.last_key = rows[0]["key"], last_key
    report.records = {source: np.array(found, np.int64) for source, found in numbers.items()}


def _plain_spans(
    file: FileIO, report: _Report, rows: Sequence[dict[str, Any]], ours: bool
) -> Iterator[tuple[int, memoryview, int]]:
    """Number, bytes and offset of each sample of a tar, as far as they are there."""
    end = 0
    for number, row in enumerate(rows):
        key, offset, size = row["key"], row["offset"], row["size"]
        if (offset != end) if ours else (offset < end):
            report.add(
                f"its row says that it starts here, but the sample before it ends at {end}",
                key=key,
                offset=offset,
            )
        end = offset + size
        if not 0 <= offset <= end <= report.bytes:
            report.add(
                f"ends at byte {end}, but the file does at byte {report.bytes}", key=key, offset=offset
            )
            continue
        yield number, memoryview(os.pread(file.fileno(), size, offset)), offset
    tail = os.pread(file.fileno(), len(END_OF_ARCHIVE) + 1, end)
    if ours and tail != END_OF_ARCHIVE:
        report.add("no end-of-archive mark follows the last sample, or more than that", offset=end)


def _frame_spans(
    file: FileIO, report: _Report, rows: Sequence[dict[str, Any]], ours: bool
) -> Iterator[tuple[int, memoryview, int]]:
    """Number, tar bytes and place in its frame of each sample of a compressed shard, as far as they are there."""
    try:
        table = read_seek_table(file, where="")
    except FormatError as error:
        report.add(str(error).removeprefix(": "))
        return
    if table is None:
        report.add("no seek table at its end, so that its samples cannot be read one by one")
        return
    starts = table.starts.tolist()
    number_of = {start: number for number, start in enumerate(starts[:-1])}
    last = -1
    for (offset, size), group in groupby(
        enumerate(rows), key=lambda item: (item[1]["offset"], item[1]["size"])
    ):
        members = list(group)
        key = members[0][1]["key"]
        frame = number_of.get(offset, -1)
        if frame < 0 or starts[frame + 1] - offset != size:
            report.add(
                f"its row names a frame of {size} bytes here, but the seek table does not",
                key=key,
                offset=offset,
            )
            continue
        if (frame != last + 1) if ours else (frame <= last):
            report.add(
                f"its frame is number {frame}, but the sample before it lies in {last}",
                key=key,
                offset=offset,
            )
        last = frame
        try:
            content = memoryview(read_frame(file, table, frame, where=""))
        except FormatError as error:
            report.add(str(error).removeprefix(": "), key=key, offset=offset)
            continue
        at = 0
        for number, row in members:
            end = max(
                (item["offset"] + item["size"] + padding(item["size"]) for item in row["members"]), default=at
            )
            yield number, content[at:end], at
            at = end
        if ours and at != len(content):
            report.add(
                f"its frame holds {len(content)} bytes, but the samples in it end at {at}",
                key=key,
                offset=offset,
            )
    if not ours:
        return
    try:
        tail = read_frame(file, table, last + 1, where="") if last + 2 == len(starts) - 1 else b""
    except FormatError:
        tail = b""
    if tail != END_OF_ARCHIVE:
        report.add("no end-of-archive mark follows the last sample in a frame of its own, or more than that")


def _check_members(
    report: _Report, span: memoryview, row: dict[str, Any], base: int, *, ours: bool
) -> dict[str, memoryview] | None:
    """One sample's bytes against its row; `base` is where they begin by the count of its members' offsets.

    Returns:
        The members, None when they are not those of the row.
    """
    key, begin = row["key"], row["offset"]
    before = len(report.faults)
    content: dict[str, memoryview] = {}
    for member in row["members"]:
        name, offset, size = member["field"], member["offset"], member["size"]
        at = offset - base
        data = span[at : at + size]
        if at < BLOCK or size < 0 or len(data) != size:
            report.add("its row puts it outside of its sample", key=key, member=name, offset=offset)
            continue
        header = span[at - BLOCK : at]
        parsed = parse_header(header)
        if parsed is None:
            report.add("no tar header", key=key, member=name, offset=offset - BLOCK)
        elif ours and parsed[1] != size:
            report.add(
                f"{parsed[1]} bytes, but its row says {size}", key=key, member=name, offset=offset - BLOCK
            )
        elif ours and header != member_header(f"{key}.{name}", size):
            report.add("its header is not as it was written", key=key, member=name, offset=offset - BLOCK)
        if xxhash.xxh3_64_intdigest(data) != member["xxh3_64"]:
            report.add("its content is not that of its hash", key=key, member=name, offset=offset)
        if ours and any(span[at + size : at + size + padding(size)]):
            report.add("its padding is not zero", key=key, member=name, offset=offset + size)
        content[name] = data
    if len(report.faults) > before:
        return None
    try:
        found_key, members = read_members(span, where="")
    except FormatError as error:
        report.add(str(error).removeprefix(": "), key=key, offset=begin)
        return None
    if found_key != key:
        report.add(f"has the key {found_key} in the tar", key=key, offset=begin)
    stored = [f"{name} ({len(data)} bytes)" for name, data in members]
    recorded = [f"{name} ({len(data)} bytes)" for name, data in content.items()]
    if stored != recorded:
        report.add(f"has the members {stored} in the tar, {recorded} in its row", key=key, offset=begin)
        return None
    return content


def _check_content(
    report: _Report, content: Mapping[str, memoryview], row: dict[str, Any], *, packed: bool, strict: bool
) -> None:
    """One sample's images and record against its row; `packed`: it was made of a record, and holds nothing else."""
    key = row["key"]
    offsets = {member["field"]: member["offset"] for member in row["members"]}
    _check_images(report, content, offsets, row, packed=packed)
    if RECORD_FIELD in content:
        for what in _record_faults(content[RECORD_FIELD], row, packed=packed, strict=strict):
            report.add(what, key=key, member=RECORD_FIELD, offset=offsets[RECORD_FIELD])
    elif packed:
        report.add("has no record", key=key, offset=row["offset"])


def _check_images(
    report: _Report,
    content: Mapping[str, memoryview],
    offsets: Mapping[str, int],
    row: dict[str, Any],
    *,
    packed: bool,
) -> None:
    key = row["key"]
    described = [image["field"] for image in row["images"]]
    stored = [name for name in content if (name != RECORD_FIELD if packed else is_image_field(name))]
    if described != stored:
        report.add(
            f"has the images {stored} in the tar, {described} in its row", key=key, offset=row["offset"]
        )
        return
    for image in row["images"]:
        name = image["field"]
        recorded = image["format"], image["width"], image["height"]
        what = ""
        try:
            # its bytes are those that were packed: a cut-off one was kept by --policy or by --check none
            header = probe(content[name], check="none")
        except ImageError as error:
            if recorded[1:] != (0, 0):
                what = f"is no readable image ({error})"
        else:
            if (header.format, header.width, header.height) != recorded:
                what = f"is {header.format} {header.width} x {header.height}, but its row says {recorded[0]} {recorded[1]} x {recorded[2]}"
        if what:
            report.add(what, key=key, member=name, offset=offsets[name])


def _record_faults(data: memoryview, row: dict[str, Any], *, packed: bool, strict: bool) -> Iterator[str]:
    found: tuple[str | None, int, int, bool] = (None, 0, 0, True)  # of JSON that is no LLaVA record
    try:
        sample = parse_record(data)
        found = sample.id, len(sample.turns), sample.words, sample.strict
    except RecordError as error:
        if packed:
            yield f"is no LLaVA record ({error})"
            return
    recorded = row["id"], row["turns"], row["words"], strict
    for name, here, there in zip(("id", "turns", "words", "strict"), found, recorded, strict=True):
        if here != there:
            yield f"{name} is {here}, but its row says {there}"


def _check_index(task: _Task, report: _Report, table: pa.Table, info: ShardInfo) -> None:
    assert task.index is not None
    path, samples, first = task.index
    index = read_index(path, samples=samples)[first : first + table.num_rows]
    rows = index_rows(table, info, task.number)
    if len(rows) != len(index):
        return  # the sidecar has other rows than the manifest says, which is told
    keys = table["key"]
    for at in np.flatnonzero(rows != index).tolist():
        report.add(f"row {first + at} is not that of sidecar and tar", path=path, key=keys[at].as_py())


# --- what holds between the files


def _runs(reports: Sequence[_Report]) -> int:
    """How many stretches of shards there are that were written under one plan."""
    plans = [report.info.plan for report in reports if report.info is not None]
    return sum(plan != before for plan, before in zip(plans, [None, *plans], strict=False))


def _check_set(selection: Selection, manifest: Manifest, reports: Sequence[_Report]) -> list[Fault]:
    path = os.path.join(selection.folder, MANIFEST)
    counts = manifest.counts
    faults: list[Fault] = []
    aside = sum(counts.set_aside.values())
    if counts.records_in != counts.packed + aside:
        faults.append(
            Fault(path, f"{counts.records_in} records in, but {counts.packed} packed + {aside} set aside")
        )
    samples = sum(shard.samples for shard in manifest.shards)
    if samples != counts.packed:
        faults.append(Fault(path, f"{counts.packed} packed, but its shards hold {samples} samples"))
    sources = _record_sources(manifest)
    if sum(sources.values()) != counts.records_in:
        faults.append(
            Fault(path, f"{counts.records_in} records in, but its sources hold {sum(sources.values())}")
        )
    faults += _check_key_order(reports)
    faults += _check_strangers(selection, manifest)
    infos = [report.info for report in reports if report.info is not None]
    if _runs(reports) > 1 + len(manifest.appends):
        faults.append(Fault(path, "its sidecars were written by different runs of `shardify pack`"))
    if len(infos) == len(manifest.shards):
        items = [item for info in infos for item in info.set_aside]
        notes: Counter[str] = Counter()
        for info in infos:
            notes.update(info.notes)
        found = Counter(item.code for item in items)
        for name, here, there in (("set aside", found, counts.set_aside), ("notes", notes, counts.notes)):
            if dict(here) != dict(there):
                faults.append(Fault(path, f"{name} {dict(there)}, but by the sidecars {dict(here)}"))
        faults += _check_quarantine(os.path.join(selection.folder, QUARANTINE), items, list(sources))
        faults += _check_cover(path, sources, _parts(manifest), items, reports)
    return faults


def _record_sources(manifest: Manifest) -> dict[str, int]:
    """The sources that samples name, and how many records of each were packed or set aside."""
    return {
        source.name: source.records or 0 for source in manifest.all_sources if source.kind in (RECORDS, PART)
    }


def _parts(manifest: Manifest) -> frozenset[str]:
    return frozenset(source.name for source in manifest.all_sources if source.kind == PART)


def _check_key_order(reports: Sequence[_Report]) -> Iterator[Fault]:
    last = ""
    for report in reports:
        if report.samples and report.first_key:
            if report.first_key <= last:
                yield Fault(report.path, f"comes after key {last} of an earlier shard", report.first_key)
            last = report.last_key


def _check_strangers(selection: Selection, manifest: Manifest) -> Iterator[Fault]:
    """Shards in the folder that the manifest does not know."""
    known = {name for shard in manifest.shards for name in (shard.tar, shard.sidecar)}
    for name in sorted(os.listdir(selection.folder or ".")):
        if name.endswith((*SHARD_ENDINGS, SIDECAR)) and name not in known:
            yield Fault(os.path.join(selection.folder, name), f"not in {MANIFEST}")


def _check_quarantine(path: str, items: Sequence[SetAside], sources: Sequence[str]) -> Iterator[Fault]:
    """quarantine.jsonl against what the sidecars say was set aside."""
    rank = {name: number for number, name in enumerate(sources)}
    expected = sorted(items, key=lambda item: (rank.get(item.source, len(rank)), item.record))
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        yield Fault(path, f"cannot be read ({error.strerror})")
        return
    if len(lines) != len(expected):
        yield Fault(path, f"{len(lines)} lines, but {len(expected)} records are set aside")
    for number, (line, item) in enumerate(zip(lines, expected, strict=False), 1):
        found: SetAside | None = None
        with suppress(msgspec.MsgspecError, UnicodeError):
            found = decode_set_aside(line)
        if found != item:
            yield Fault(path, f"line {number} is not that of record {item.record} of {item.source}")


def _check_cover(
    path: str,
    sources: Mapping[str, int],
    parts: frozenset[str],
    items: Sequence[SetAside],
    reports: Sequence[_Report],
) -> Iterator[Fault]:
    """Every record is packed or set aside, once; of a part, as many as were taken."""
    for source, records in sources.items():
        numbers = [report.records[source] for report in reports if source in report.records]
        numbers.append(np.array([item.record for item in items if item.source == source], np.int64))
        found, times = np.unique(np.concatenate(numbers), return_counts=True)
        inside = found[(found >= 0) & (found < records)]
        if source in parts:
            inside = found
            if len(found) != records:
                yield Fault(
                    path,
                    f"{records} records of {source} were taken, but {len(found)} are packed or set aside",
                )
        elif len(inside) < records:
            # the first place where sorted numbers leave 0, 1, 2, ...
            lost = int(np.argmax(np.append(inside != np.arange(len(inside)), True)))
            yield Fault(
                path,
                f"{records - len(inside)} records of {source} are neither packed nor set aside, such as record {lost}",
            )
        if len(twice := found[times > 1]):
            yield Fault(
                path,
                f"{len(twice)} records of {source} are packed or set aside twice, such as record {twice[0]}",
            )
        if len(inside) < len(found):
            yield Fault(
                path,
                f"{len(found) - len(inside)} samples are of records that {source} does not have: it has {records}",
            )
