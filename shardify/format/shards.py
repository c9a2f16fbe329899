"""Opening a data set for reading: which shards a pattern, list, folder or manifest names, and the index over their samples.

    select_shards("data/{000..999}.tar")    names only: which shards, by folder, with their manifest where there is one
    open_shards("data/{000..999}.tar")      the same, checked against the files, with sizes, hashes and the index

A folder with a manifest is known as a whole: numbers beyond its last shard are ignored, a name missing inside it is an error. Shards made
by others have no manifest, so that every named one must exist; their sidecars are built on first use.
"""

import contextlib
import fcntl
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash
from braceexpand import braceexpand

from shardify.errors import FormatError, UsageError
from shardify.format.files import replacing
from shardify.format.index import COLUMNS, has_digest, index_rows, read_index
from shardify.format.manifest import Manifest, read_manifest
from shardify.format.names import (
    INDEX,
    MANIFEST,
    SHARD_ENDINGS,
    TAR,
    TAR_ZST,
    WORK_FOLDER,
    shard_stem,
    sidecar_name,
)
from shardify.format.sidecar import is_sidecar, read_shard_info, read_sidecar

MAX_BUILT_BYTES = 10 * 1000**3
"""Sidecars of more shards than this are not built in passing: reading them takes minutes, and should be asked for."""

MAX_NAMES = 1_000_000
"""What a brace pattern may expand to."""

Shards: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_HASHED_INDEX_BYTES = (
    256 * 1000**2
)  # hashed in a tenth of a second; a larger index is `shardify verify`'s to check
_SHOWN = 5
_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)")


@dataclass(frozen=True, slots=True)
class Selection:
    """Shards of one folder, by name.

    Attributes:
        folder: as given, ``""`` for the current one.
        names: tar names in the order asked for.
        manifest: the folder's, None when it has none; every name is then any tar's.
    """

    folder: str
    names: tuple[str, ...]
    manifest: Manifest | None

    @property
    def paths(self) -> list[str]:
        """The tars."""
        return [os.path.join(self.folder, name) for name in self.names]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard.

    Attributes:
        path: the tar.
        sidecar: its Parquet file, beside it or in the user's cache folder.
        samples: how many it holds.
        bytes: size of the tar.
        xxh3_128: of the tar, hexadecimal, as recorded when it was written or indexed.
    """

    path: str
    sidecar: str
    samples: int
    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True, eq=False)
class ShardSet:
    """Shards in the order asked for, and the index over all their N samples.

    Attributes:
        shards: the shards.
        index: `INDEX_DTYPE` [N], in shard order. Memory-mapped when the shards are a run of one data set's, else in memory (24 bytes a
            sample). Its field ``shard`` counts within a manifest: use `starts` instead.
        starts: int64 [len(shards) + 1], samples before each shard; sample i lies in shard ``searchsorted(starts, i, "right") - 1``.
    """

    shards: tuple[ShardFile, ...]
    index: npt.NDArray[np.void]
    starts: npt.NDArray[np.int64]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a loader's state keeps to recognise these shards: ``{"shards", "samples", "digest"}``, wherever they lie."""
        digest = xxhash.xxh3_128()
        for shard in self.shards:
            digest.update(
                f"{os.path.basename(shard.path)}\0{shard.samples}\0{shard.bytes}\0{shard.xxh3_128}\n".encode()
            )
        return {"shards": len(self.shards), "samples": len(self.index), "digest": digest.hexdigest()}


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_shards(shards: Shards, *, say: Callable[[str], None] = _to_stderr) -> ShardSet:
    """Open shards for reading.

    Args:
        shards: a brace pattern (``data/{000..999}.tar``), a folder, a manifest.json, or a list of those and of tars.
        say: told, in one line, when sidecars must be built first; standard error by default.

    Raises:
        UsageError: the pattern is empty or unbalanced, or names a shard twice.
        FormatError: shards are missing, cut off, or not those of their manifest or sidecar; more than `MAX_BUILT_BYTES` have no sidecars.
    """
    selections = select_shards(shards)
    sizes = _sizes(selections)
    foreign = {
        path: sizes[path]
        for selection in selections
        if selection.manifest is None
        for path in selection.paths
    }
    sidecars = _sidecars(
        foreign, say=say, limit=MAX_BUILT_BYTES, build=lambda paths: map(build_sidecar, paths)
    )
    files: list[ShardFile] = []
    parts: list[npt.NDArray[np.void]] = []
    for selection in selections:
        if selection.manifest is None:
            for path in selection.paths:
                file, rows = _open_foreign(path, sidecars[path], number=len(files))
                files.append(file)
                parts.append(rows)
        else:
            opened, runs = _open_finished(selection, selection.manifest, sizes)
            files += opened
            parts += runs
    starts = np.zeros(len(files) + 1, np.int64)
    np.cumsum([file.samples for file in files], out=starts[1:])
    return ShardSet(tuple(files), parts[0] if len(parts) == 1 else np.concatenate(parts), starts)


def find_sidecars(
    selections: Sequence[Selection],
    *,
    say: Callable[[str], None],
    build: Callable[[Sequence[str]], Iterable[str]],
) -> dict[str, str]:
    """Shard -> sidecar of all selected shards; those that shards made by others lack are built by `build`, however large they are.

    Args:
        selections: of `select_shards`.
        say: told, in one line, what is about to be built.
        build: given shards of one folder, yields their sidecars in order (see `build_sidecar`).

    Raises:
        FormatError: shards are missing, or their sidecars belong to others.
    """
    sizes = _sizes(selections)
    sidecars: dict[str, str] = {}
    for selection in selections:
        if selection.manifest is None:
            foreign = {path: sizes[path] for path in selection.paths}
            sidecars |= _sidecars(foreign, say=say, limit=None, build=build)
        else:
            for path in selection.paths:
                sidecars[path] = _beside(path)
    return sidecars


def select_shards(
    shards: Shards, *, read: Callable[[str], Manifest | None] = read_manifest
) -> list[Selection]:
    """Which shards are named, without looking at them.

    Args:
        shards: as for `open_shards`.
        read: reads a manifest; when it returns None, the folder passes for one without.

    Raises:
        UsageError: the pattern is empty or unbalanced, or names a shard twice.
        FormatError: nothing is named, a name is not in its folder's manifest, or a folder's packing was not finished.
    """
    asked = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    if not asked:
        raise UsageError(
            "no shards are named; give a pattern such as 'data/{000..007}.tar', a folder, or a list of tars"
        )
    folder_at = functools.cache(lambda path: _open_folder(path, read))
    chosen = [place for item in asked for place in _expand(os.fspath(item), folder_at)]
    seen: set[tuple[str, str]] = set()
    real = functools.cache(os.path.realpath)
    for folder, name in chosen:
        if (place := (real(folder), name)) in seen:
            raise UsageError(f"{os.path.join(folder, name)} is named twice: its samples would count double")
        seen.add(place)
    return [
        Selection(folder, tuple(name for _, name in group), folder_at(folder).manifest)
        for folder, group in groupby(chosen, key=lambda place: place[0])
    ]


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of shards: its manifest, the names in it, and the largest number among them."""

    path: str
    manifest: Manifest | None = None
    names: frozenset[str] = frozenset()
    last: int | None = None

    def all_shards(self) -> list[str]:
        if self.manifest:
            names = [shard.tar for shard in self.manifest.shards]
        else:
            names = sorted(name for name in os.listdir(self.path or ".") if name.endswith(SHARD_ENDINGS))
        if not names:
            raise FormatError(
                f"{self.path or '.'}: no shards here: no {MANIFEST} that lists any, and no *{TAR} or *{TAR_ZST}"
            )
        return names

    def is_beyond(self, name: str) -> bool:
        """Whether a shard's number comes after the manifest's last one."""
        number = _number(name)
        return number is not None and self.last is not None and number > self.last


def _open_folder(path: str, read: Callable[[str], Manifest | None]) -> _Folder:
    manifest_path = os.path.join(path, MANIFEST)
    if os.path.exists(manifest_path):
        if (manifest := read(manifest_path)) is None:
            return _Folder(path)
        names = frozenset(shard.tar for shard in manifest.shards)
        numbers = [number for number in map(_number, names) if number is not None]
        return _Folder(path, manifest, names, max(numbers, default=None))
    if os.path.isdir(os.path.join(path, WORK_FOLDER)):
        raise FormatError(
            f"{path or '.'}: packing was not finished; run the same `shardify pack` again to continue it"
        )
    return _Folder(path)


def _expand(text: str, folder_at: Callable[[str], _Folder]) -> list[tuple[str, str]]:
    """The shards that one pattern, folder, manifest or tar names, as (folder, name)."""
    paths = _brace_expand(text)
    chosen: list[tuple[str, str]] = []
    strangers: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            chosen += [(path, name) for name in folder_at(path).all_shards()]
            continue
        folder_path, name = os.path.split(path)
        if name == MANIFEST and not os.path.exists(path):
            raise FormatError(f"{path}: no such manifest")
        folder = folder_at(folder_path)
        if name == MANIFEST:
            chosen += [(folder_path, shard) for shard in folder.all_shards()]
        elif folder.manifest is None or name in folder.names:
            chosen.append((folder_path, name))
        elif len(paths) == 1 or not folder.is_beyond(name):
            strangers.append(path)
    if strangers:
        raise FormatError(
            f"{text}: {len(strangers)} of the shards named are missing from the {MANIFEST} beside them: {_some(strangers)}"
        )
    if not chosen:
        raise FormatError(f"{text}: names only shards beyond the last one of the {MANIFEST} beside them")
    return chosen


def _brace_expand(text: str) -> list[str]:
    if not text.strip():
        raise UsageError("an empty shard pattern; give one such as 'data/{000..007}.tar', or a folder")
    if "://" in text:
        raise UsageError(f"{text}: shards are read from local folders; copy them to one first")
    if os.path.exists(text):
        return [text]  # braces may be part of a name
    # counted before expanding: braceexpand holds whole ranges in memory
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(text))
    if count > MAX_NAMES:
        raise UsageError(f"{text}: names {count} shards; the limit is {MAX_NAMES}")
    try:
        return list(braceexpand(text))
    except ValueError as error:
        raise UsageError(f"{text}: not a brace pattern ({error})") from None


def _number(name: str) -> int | None:
    stem = shard_stem(name)
    return int(stem) if stem.isdecimal() else None


def _sizes(selections: Sequence[Selection]) -> dict[str, int]:
    """Path -> size in bytes of every tar."""
    sizes: dict[str, int] = {}
    missing: list[str] = []
    for path in (path for selection in selections for path in selection.paths):
        try:
            sizes[path] = os.stat(path).st_size
        except (FileNotFoundError, NotADirectoryError):
            missing.append(path)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    if missing:
        raise FormatError(describe_missing(missing, len(sizes) + len(missing)))
    return sizes


def describe_missing(paths: Sequence[str], total: int) -> str:
    """Which of `total` named shards are missing, the first few by name."""
    if total == 1:
        return f"{paths[0]}: no such shard, folder or manifest"
    return f"{len(paths)} of {total} shards are missing: {_some(paths)}"


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def _open_finished(
    selection: Selection, manifest: Manifest, sizes: Mapping[str, int]
) -> tuple[list[ShardFile], list[npt.NDArray[np.void]]]:
    """Shards of a data set with a manifest, and their runs of index.npy."""
    number_of = {shard.tar: number for number, shard in enumerate(manifest.shards)}
    numbers = [number_of[name] for name in selection.names]
    files: list[ShardFile] = []
    for number, path in zip(numbers, selection.paths, strict=True):
        shard = manifest.shards[number]
        if sizes[path] != shard.bytes:
            what = "it was cut off" if sizes[path] < shard.bytes else "the index does not belong to it"
            raise FormatError(
                f"{path}: {sizes[path]} bytes, but {MANIFEST} records {shard.bytes}: {what}; copy or pack the data set again"
            )
        sidecar = os.path.join(selection.folder, shard.sidecar)
        files.append(ShardFile(path, sidecar, shard.samples, shard.bytes, shard.tar_xxh3_128))
    starts = np.cumsum([0] + [shard.samples for shard in manifest.shards])
    index_path = os.path.join(selection.folder, INDEX)
    index = read_index(index_path, samples=int(starts[-1]))
    if index.nbytes < _HASHED_INDEX_BYTES and not has_digest(index, index_path, manifest.index_xxh3_128):
        raise FormatError(
            f"{index_path}: not the index that {MANIFEST} names (its hash differs); copy or pack the data set again"
        )
    # neighbours in one slice, so that a whole data set stays one memory map
    breaks = [at for at in range(1, len(numbers)) if numbers[at] != numbers[at - 1] + 1]
    edges = [0, *breaks, len(numbers)]
    runs = [index[starts[numbers[a]] : starts[numbers[b - 1] + 1]] for a, b in pairwise(edges)]
    return files, runs


def _open_foreign(path: str, sidecar: str, *, number: int) -> tuple[ShardFile, npt.NDArray[np.void]]:
    """A shard without manifest, and the rows made from its sidecar."""
    info = read_shard_info(sidecar)
    try:
        rows = index_rows(read_sidecar(sidecar, COLUMNS), info, shard=number)
    except (IndexError, ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"{sidecar}: not a readable sidecar ({error})") from None
    ends = rows["offset"] + rows["size"]
    if len(rows) and (rows["offset"].min() < 0 or ends.max() > info.bytes):
        raise FormatError(
            f"{sidecar}: names samples beyond the {info.bytes} bytes of {path}; delete it to have it built again"
        )
    return ShardFile(path, sidecar, len(rows), info.bytes, info.xxh3_128), rows


def _sidecars(
    tars: Mapping[str, int],
    *,
    say: Callable[[str], None],
    limit: int | None,
    build: Callable[[Sequence[str]], Iterable[str]],
) -> dict[str, str]:
    """Shard -> sidecar for shards made by others (path -> bytes); what is missing is built when it is within `limit` bytes."""
    beside: dict[str, str] = {}
    for path in tars:
        if (other := beside.setdefault(_beside(path), path)) != path:
            raise FormatError(f"{path}: would share its index with {other}; give one of them another name")
    found = {path: _current_sidecar(path, size) for path, size in tars.items()}
    missing = [path for path, sidecar in found.items() if sidecar is None]
    total = sum(tars[path] for path in missing)
    if limit is not None and total > limit:
        raise FormatError(
            f"{len(missing)} shards ({total / 1e9:.1f} GB) have no index: {_some(missing)}; run `shardify index SHARDS` on them once"
        )
    if missing:
        say(
            f"shardify: indexing {len(missing)} shards ({total / 1e6:.1f} MB) that have no index yet; done once"
        )
    for folder, group in groupby(missing, key=os.path.dirname):
        with _locked(folder or "."):
            todo = []
            for path in group:
                # another process may have built it while this one waited for the lock
                found[path] = _current_sidecar(path, tars[path])
                if found[path] is None:
                    todo.append(path)
            if todo:
                found.update(zip(todo, build(todo), strict=True))
    return {path: sidecar for path, sidecar in found.items() if sidecar is not None}


def find_sidecar(path: str) -> str | None:
    """The sidecar of a tar made by others: beside it, or in the user's cache; None when none was built yet. It is not looked into."""
    beside, cached = _beside(path), _cached(path)
    if os.path.exists(beside) and is_sidecar(beside):
        return beside
    return cached if os.path.exists(cached) else None


def _current_sidecar(path: str, size: int) -> str | None:
    """`find_sidecar`, None as well when the cached one is stale.

    Raises:
        FormatError: the one beside the tar belongs to another tar.
    """
    sidecar = find_sidecar(path)
    if sidecar is None:
        return None
    if sidecar == _cached(path):
        try:
            newer = os.stat(sidecar).st_mtime >= os.stat(path).st_mtime
            return sidecar if newer and read_shard_info(sidecar).bytes == size else None
        except (OSError, FormatError):
            return None
    recorded = read_shard_info(sidecar).bytes
    if recorded != size:
        raise FormatError(
            f"{path}: {size} bytes, but its index {sidecar} belongs to a tar of {recorded} bytes; "
            f"restore the tar, or delete {sidecar} to have it built again"
        )
    return sidecar


def build_sidecar(path: str, *, ahead: bool = False) -> str:
    """Index a shard made by others; the sidecar goes beside it, or into the user's cache folder when it cannot.

    Args:
        path: the shard.
        ahead: have a thread read ahead, see `scan_shard`.

    Returns:
        The sidecar's path.

    Raises:
        FormatError: it is no shard (see `scan_shard`), or there is no place for its sidecar.
    """
    from shardify.format.scan import scan_shard

    scanned = scan_shard(path, name=os.path.basename(path), ahead=ahead)
    beside = _beside(path)
    target = (
        _cached(path)
        if os.path.exists(beside) or not os.access(os.path.dirname(path) or ".", os.W_OK)
        else beside
    )
    try:
        os.makedirs(os.path.dirname(target) or ".", exist_ok=True)
        with replacing(target) as temporary:
            scanned.rows.write(temporary, scanned.spans, scanned.info)
    except (OSError, FormatError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error).removeprefix(f"{target}: ")
        raise FormatError(
            f"{target}: the index of {path}: {what}; set XDG_CACHE_HOME to a writable folder"
        ) from None
    return target


def _beside(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, sidecar_name(name))


def _cached(path: str) -> str:
    """Where the sidecar goes when it cannot lie beside its tar: a folder of the user's cache for each folder of shards."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder, name = os.path.split(os.path.abspath(path))
    digest = xxhash.xxh3_128_hexdigest(os.path.realpath(folder).encode("utf-8", "surrogateescape"))
    return os.path.join(cache, "shardify", digest, sidecar_name(name))


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """One builder per node: a lock on the folder itself, so that nothing is left behind.

    Network file systems without such locks let several build at once, to the same bytes.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
