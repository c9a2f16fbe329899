"""Which samples an exclusion list names, by the data set's sidecars; they become fillers at their positions.

Ids and xxh3_64 hashes of images stand in the sidecars. A URL is looked for in the records, and a sha256 needs the images themselves: both
are read, once, from local shards.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from loaders.derived import (
    default_workers,
    derived,
    derived_folder,
    each_forked,
    is_derived,
    read_array,
    watched,
    write_array,
)
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
_NO_PAIRS: IntArray = np.zeros((0, 2), np.int64)


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
    _check_reach(shards, exclusions)
    folder, about = derived(_identity(shards, exclusions.fingerprint), partial(_build, shards, exclusions))
    return Excluded(np.asarray(read_array(folder, "excluded"), np.int64), frozenset(about["lines"]))


def kept_excluded(shards: ShardSet, fingerprint: str) -> IntArray | None:
    """What `find_excluded` has kept of a list of this fingerprint, int64 ascending; None when it has not, or not here."""
    identity = _identity(shards, fingerprint)
    if not is_derived(identity):
        return None
    return np.asarray(read_array(derived_folder(identity), "excluded"), np.int64)


def find_hits(shards: ShardSet, exclusions: Exclusions) -> tuple[IntArray, IntArray]:
    """Which line names which sample, as pairs: int64 [k] sample numbers, ascending, and int64 [k] lines. Nothing is kept.

    Raises:
        UsageError: the list has URLs or sha256 hashes, and shards are remote.
        FormatError: a shard or sidecar cannot be read.
    """
    _check_reach(shards, exclusions)
    pairs = [_NO_PAIRS]
    for begin, hits in zip(shards.starts.tolist(), _each_shard(shards, exclusions, "Looking"), strict=False):
        pairs.append(hits + np.array([begin, 0]))
    found = np.unique(np.concatenate(pairs), axis=0)
    return found[:, 0], found[:, 1]


def _check_reach(shards: ShardSet, exclusions: Exclusions) -> None:
    by_content = sorted({*exclusions.urls.values(), *exclusions.sha256.values()})
    remote = next((shard.path for shard in shards.shards if is_url(shard.path)), None)
    if remote is not None and by_content:
        shown = ", ".join(f"line {line} ({exclusions.entries[line]})" for line in by_content[:_SHOWN])
        raise UsageError(
            f"exclude={exclusions.name}: {len(by_content)} entries are URLs or sha256 hashes, which are found by reading every sample, and"
            f" {remote} is remote: {shown}. List ids or xxh3_64 hashes (the sidecars have them), or use `shardify reshard --exclude`"
        )


def _identity(shards: ShardSet, fingerprint: str) -> dict[str, Any]:
    return {"kind": "excluded", "version": _VERSION, "shards": shards.fingerprint, "list": fingerprint}


def describe_idle(exclusions: Exclusions, lines: frozenset[int]) -> str | None:
    """Which entries of a list name nothing, given the lines that do; None when all do."""
    idle = [line for line in exclusions.entries if line not in lines]
    if not idle:
        return None
    shown = ", ".join(f"line {line} ({exclusions.entries[line]})" for line in idle[:_SHOWN])
    more = f" and {len(idle) - _SHOWN:,} more" if len(idle) > _SHOWN else ""
    return f"{exclusions.name}: {len(idle):,} of {len(exclusions.entries):,} entries name no sample: {shown}{more}"


def _build(shards: ShardSet, exclusions: Exclusions, folder: str) -> Mapping[str, Any]:
    rows = [np.zeros(0, np.int64)]
    lines: set[int] = set()
    for begin, hits in zip(
        shards.starts.tolist(), _each_shard(shards, exclusions, "Excluding"), strict=False
    ):
        rows.append(np.unique(hits[:, 0]) + begin)
        lines.update(hits[:, 1].tolist())
    samples = np.concatenate(rows)
    write_array(folder, "excluded", [samples], len(samples), "<i8")
    return {"lines": sorted(lines)}


def _each_shard(shards: ShardSet, exclusions: Exclusions, what: str) -> Iterator[IntArray]:
    """Of each shard, which lines name which of its rows: int64 [k, 2]."""
    total = len(shards.index)
    found = each_forked(
        partial(_hits_of, exclusions=exclusions),
        zip(shards.shards, local_sidecars(shards.shards), strict=True),
        count=len(shards.shards),
        workers=0 if total <= _IN_PROCESS else default_workers(),
    )
    return watched(found, what, [shard.samples for shard in shards.shards], total)


def _hits_of(shard: tuple[ShardFile, str], exclusions: Exclusions) -> IntArray:
    """int64 [k, 2]: rows of a shard, and the lines that name them."""
    file, sidecar = shard
    members = read_members_of(file, sidecar, ("id",))
    hits = [
        _by_id(members, exclusions),
        _by_hash(members, exclusions),
        _by_content(file, members, exclusions),
    ]
    return np.concatenate(hits)


def _pairs(rows: Iterable[int], lines: Iterable[int]) -> IntArray:
    return np.array(list(zip(rows, lines, strict=True)), np.int64).reshape(-1, 2)


def _by_id(members: Members, exclusions: Exclusions) -> IntArray:
    if not exclusions.ids or not members.samples:
        return _NO_PAIRS
    ids = spelled_ids(members.table["id"])
    rows = np.flatnonzero(np.asarray(pc.is_in(ids, pa.array(list(exclusions.ids), pa.string())), np.bool_))
    # a sample without id is spelled null, as nobody's id is
    has_id = ~np.asarray(pc.is_null(members.table["id"]), np.bool_)[rows]
    rows = rows[has_id]
    return _pairs(rows.tolist(), [exclusions.ids[id_] for id_ in ids.take(pa.array(rows)).to_pylist()])


def _by_hash(members: Members, exclusions: Exclusions) -> IntArray:
    if not exclusions.xxh3_64:
        return _NO_PAIRS
    wanted = np.array(list(exclusions.xxh3_64), np.uint64)
    # in tars of other origin a picture may have any name
    there = np.flatnonzero(np.isin(members.xxh3_64, wanted) & members.named(_is_no_record))
    lines = [exclusions.xxh3_64[digest] for digest in members.xxh3_64[there].tolist()]
    return _pairs(members.row[there].tolist(), lines)


def _by_content(file: ShardFile, members: Members, exclusions: Exclusions) -> IntArray:
    found: list[tuple[int, int]] = []
    if exclusions.urls:
        for member, record in read_contents(file, members, members.first_named(RECORD_FIELD)):
            row = int(members.row[member])
            found += [(row, line) for line in _lines_of_urls(bytes(record), exclusions)]
    if exclusions.sha256:
        for member, image in read_contents(file, members, np.flatnonzero(members.named(_is_no_record))):
            line = exclusions.sha256.get(hashlib.sha256(image).digest())
            if line is not None:
                found.append((int(members.row[member]), line))
    return np.array(found, np.int64).reshape(-1, 2)


def _lines_of_urls(record: bytes, exclusions: Exclusions) -> Sequence[int]:
    # slashes and colons may be escaped; without either there is no URL
    if b"://" not in record and b"\\" not in record:
        return ()
    return exclusions.lines(id=None, record=record)


def _is_no_record(field: str) -> bool:
    return field != RECORD_FIELD
