"""Which samples an exclusion list names, by the data set's sidecars; they become fillers at their positions.

Ids and xxh3_64 hashes of images stand in the sidecars. A URL is looked for in the records, and a sha256 needs the images themselves: both
are read, once, from local shards.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from loaders.derived import default_workers, derived, each_forked, read_array, watched, write_array
from loaders.members import Members, read_contents, read_members_of
from shardify.errors import UsageError
from shardify.format.exclude import Exclusions
from shardify.format.ids import spelled_ids
from shardify.format.names import RECORD_FIELD
from shardify.format.shards import ShardFile, ShardSet, local_sidecars
from shardify.format.urls import is_url

IntArray: TypeAlias = npt.NDArray[np.int64]

_VERSION = 1  # of what is found
_IN_PROCESS = 20_000  # samples for which no other process is started
_SHOWN = 5


@dataclass(frozen=True, slots=True, eq=False)
class Excluded:
    """What a list names of a data set.

    Attributes:
        samples: int64 [n], ascending sample numbers.
        lines: of the list, that name any of them.
    """

    samples: IntArray
    lines: frozenset[int]


def find_excluded(shards: ShardSet, exclusions: Exclusions) -> Excluded:
    """The samples that a list names; looked for once, and kept in the user's cache folder.

    Raises:
        UsageError: the list has URLs or sha256 hashes, and shards are remote.
        FormatError: a shard or sidecar cannot be read, or the cache folder cannot be written.
    """
    by_content = sorted({*exclusions.urls.values(), *exclusions.sha256.values()})
    remote = next((shard.path for shard in shards.shards if is_url(shard.path)), None)
    if remote is not None and by_content:
        shown = ", ".join(f"line {line} ({exclusions.entries[line]})" for line in by_content[:_SHOWN])
        raise UsageError(
            f"exclude={exclusions.name}: {len(by_content)} entries are URLs or sha256 hashes, which are found by reading every sample, and"
            f" {remote} is remote: {shown}. List ids or xxh3_64 hashes (the sidecars have them), or use `shardify reshard --exclude`"
        )
    identity = {
        "kind": "excluded",
        "version": _VERSION,
        "shards": shards.fingerprint,
        "list": exclusions.fingerprint,
    }
    folder, about = derived(identity, partial(_build, shards, exclusions))
    return Excluded(np.asarray(read_array(folder, "excluded"), np.int64), frozenset(about["lines"]))


def describe_idle(exclusions: Exclusions, lines: frozenset[int]) -> str | None:
    """Which entries of a list name nothing, given the lines that do; None when all do."""
    idle = [line for line in exclusions.entries if line not in lines]
    if not idle:
        return None
    shown = ", ".join(f"line {line} ({exclusions.entries[line]})" for line in idle[:_SHOWN])
    more = f" and {len(idle) - _SHOWN:,} more" if len(idle) > _SHOWN else ""
    return f"{exclusions.name}: {len(idle):,} of {len(exclusions.entries):,} entries name no sample: {shown}{more}"


def _build(shards: ShardSet, exclusions: Exclusions, folder: str) -> Mapping[str, Any]:
    total = len(shards.index)
    found = each_forked(
        partial(_excluded_of, exclusions=exclusions),
        zip(shards.shards, local_sidecars(shards.shards), strict=True),
        count=len(shards.shards),
        workers=0 if total <= _IN_PROCESS else default_workers(),
    )
    sizes = [shard.samples for shard in shards.shards]
    rows: list[IntArray] = []
    lines: set[int] = set()
    for begin, (here, hit) in zip(shards.starts, watched(found, "Excluding", sizes, total), strict=False):
        rows.append(here + begin)
        lines |= hit
    samples = np.concatenate(rows or [np.zeros(0, np.int64)])
    write_array(folder, "excluded", [samples], len(samples), "<i8")
    return {"lines": sorted(lines)}


def _excluded_of(shard: tuple[ShardFile, str], exclusions: Exclusions) -> tuple[IntArray, set[int]]:
    """The rows of a shard that a list names, int64 ascending, and by which lines."""
    file, sidecar = shard
    members = read_members_of(file, sidecar, ("id",))
    named: list[tuple[IntArray, set[int]]] = [
        _by_id(members, exclusions),
        _by_hash(members, exclusions),
        _by_content(file, members, exclusions),
    ]
    rows = np.unique(np.concatenate([rows for rows, _ in named]))
    return rows, set().union(*(lines for _, lines in named))


def _by_id(members: Members, exclusions: Exclusions) -> tuple[IntArray, set[int]]:
    if not exclusions.ids or not members.samples:
        return np.zeros(0, np.int64), set()
    ids = spelled_ids(members.table["id"])
    rows = np.flatnonzero(np.asarray(pc.is_in(ids, pa.array(list(exclusions.ids), pa.string())), np.bool_))
    # a sample without id is spelled null, as nobody's id is
    has_id = ~np.asarray(pc.is_null(members.table["id"]), np.bool_)[rows]
    rows = rows[has_id]
    return rows, {exclusions.ids[id_] for id_ in ids.take(pa.array(rows)).to_pylist()}


def _by_hash(members: Members, exclusions: Exclusions) -> tuple[IntArray, set[int]]:
    if not exclusions.xxh3_64:
        return np.zeros(0, np.int64), set()
    wanted = np.array(list(exclusions.xxh3_64), np.uint64)
    # in tars of other origin a picture may have any name
    there = np.flatnonzero(np.isin(members.xxh3_64, wanted) & members.named(_is_no_record))
    lines = {exclusions.xxh3_64[digest] for digest in members.xxh3_64[there].tolist()}
    return members.row[there], lines


def _by_content(file: ShardFile, members: Members, exclusions: Exclusions) -> tuple[IntArray, set[int]]:
    rows: list[int] = []
    lines: set[int] = set()
    if exclusions.urls:
        for member, record in read_contents(file, members, members.first_named(RECORD_FIELD)):
            if hit := _lines_of_urls(bytes(record), exclusions):
                rows.append(int(members.row[member]))
                lines.update(hit)
    if exclusions.sha256:
        for member, image in read_contents(file, members, np.flatnonzero(members.named(_is_no_record))):
            line = exclusions.sha256.get(hashlib.sha256(image).digest())
            if line is not None:
                rows.append(int(members.row[member]))
                lines.add(line)
    return np.array(rows, np.int64), lines


def _lines_of_urls(record: bytes, exclusions: Exclusions) -> Sequence[int]:
    # slashes and colons may be escaped; without either there is no URL
    if b"://" not in record and b"\\" not in record:
        return ()
    return exclusions.lines(id=None, record=record)


def _is_no_record(field: str) -> bool:
    return field != RECORD_FIELD
