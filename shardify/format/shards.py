"""Opening a data set for reading: which shards a pattern, list, folder or manifest names, and the index over their samples.

    select_shards("data/{000..999}.tar")    names only: which shards, by folder, with their manifest where there is one
    open_shards("data/{000..999}.tar")      the same, checked against the files, with sizes, hashes and the index

A folder with a manifest is known as a whole: numbers beyond its last shard are ignored, a name missing inside it is an error. Shards made
by others have no manifest, so that every named one must exist; their sidecars are built on first use.

`open_shards` takes URLs wherever it takes paths. Of a remote data set the manifest and the index are fetched, by a child process; the manifest
is believed, no shard is asked for. Shards made by others must have their sidecars beside them.
"""

import functools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash
from braceexpand import braceexpand

from shardify.errors import FormatError, UsageError
from shardify.format.copies import RemoteFile, is_kept, local_copies
from shardify.format.files import locked, replacing, user_cache
from shardify.format.hashing import MAX_HASHED_BYTES
from shardify.format.index import COLUMNS, INDEX_DTYPE, has_digest, index_rows, read_index
from shardify.format.manifest import Manifest, read_manifest
from shardify.format.names import (
    INDEX,
    MANIFEST,
    SHARD_ENDINGS,
    SIDECAR,
    TAR,
    TAR_ZST,
    WORK_FOLDER,
    shard_stem,
    sidecar_name,
)
from shardify.format.remote_sets import RemoteFolder, find_foreign, read_folders
from shardify.format.sidecar import is_sidecar, read_shard_info, read_sidecar
from shardify.format.urls import Place, is_url, join_url, shown, split_name, split_url

if TYPE_CHECKING:
    from shardify.format.scan import ScannedShard

MAX_BUILT_BYTES = 10 * 1000**3
"""Sidecars of more shards than this are not built in passing: reading them takes minutes, and should be asked for."""

MAX_NAMES = 1_000_000
"""What a brace pattern may expand to."""

Shards: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_SAID_BYTES = 64 * 1000**2  # of an index that is fetched
_SHOWN = 5
_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)")


@dataclass(frozen=True, slots=True)
class Selection:
    """Shards of one folder, by name.

    Attributes:
        folder: as given, ``""`` for the current one; a URL of a remote one.
        names: tar names in the order asked for.
        manifest: the folder's, None when it has none; every name is then any tar's.
    """

    folder: str
    names: tuple[str, ...]
    manifest: Manifest | None

    @property
    def paths(self) -> list[str]:
        """The tars, paths or URLs."""
        return [_join(self.folder, name) for name in self.names]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard.

    Attributes:
        path: the tar, a path or a URL.
        sidecar: its Parquet file, beside it or in the user's cache folder; of a remote tar a URL (`local_sidecars` brings it here).
        samples: how many it holds.
        bytes: size of the tar.
        xxh3_128: of the tar, hexadecimal, as recorded when it was written or indexed.
        sidecar_xxh3_128: of the sidecar, as the manifest has it; empty without one.
    """

    path: str
    sidecar: str
    samples: int
    bytes: int
    xxh3_128: str
    sidecar_xxh3_128: str = ""


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
        """What a loader's state keeps to recognise these shards: ``{"shards", "samples", "digest"}``, wherever they lie.

        That of a set to which shards were added since is ``prefix(fingerprint["shards"]).fingerprint``.
        """
        digest = xxhash.xxh3_128()
        for shard in self.shards:
            digest.update(f"{_name(shard.path)}\0{shard.samples}\0{shard.bytes}\0{shard.xxh3_128}\n".encode())
        return {"shards": len(self.shards), "samples": len(self.index), "digest": digest.hexdigest()}

    def prefix(self, shards: int) -> "ShardSet":
        """The first so many shards, with the same memory under their index.

        Raises:
            ValueError: there are not so many.
        """
        if not 0 <= shards <= len(self.shards):
            raise ValueError(f"the first {shards} shards of {len(self.shards)}")
        return ShardSet(
            self.shards[:shards], self.index[: int(self.starts[shards])], self.starts[: shards + 1]
        )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_shards(shards: Shards, *, say: Callable[[str], None] = _to_stderr, remote: bool = True) -> ShardSet:
    """Open shards for reading.

    Args:
        shards: a brace pattern (``data/{000..999}.tar``), a folder, a manifest.json, or a list of those and of tars; paths or URLs
            (``s3://bucket/prefix/{000..999}.tar``; docs/remote.md).
        say: told, in one line, when sidecars must be built or a large index fetched first; standard error by default.
        remote: take URLs too.

    Raises:
        UsageError: the pattern is empty or unbalanced, or names a shard twice; or it is a URL, and these are not taken.
        FormatError: shards are missing, cut off, or not those of their manifest or sidecar; more than `MAX_BUILT_BYTES` have no sidecars;
            remote shards made by others have none.
        PackError: a store cannot be reached or refuses.
    """
    selections = select_shards(shards, remote=remote)
    local = [selection for selection in selections if not is_url(selection.folder)]
    sizes = _sizes(local)
    foreign = {
        path: sizes[path] for selection in local if selection.manifest is None for path in selection.paths
    }
    sidecars = _sidecars(
        foreign, say=say, limit=MAX_BUILT_BYTES, build=lambda paths: map(build_sidecar, paths)
    )
    copies = _remote_sidecars(
        [
            path
            for selection in selections
            if selection.manifest is None and is_url(selection.folder)
            for path in selection.paths
        ]
    )
    indexes = _remote_indexes(selections, say)
    files: list[ShardFile] = []
    parts: list[npt.NDArray[np.void]] = []
    for selection in selections:
        if selection.manifest is None:
            for path in selection.paths:
                sidecar, copy = copies.get(path) or (sidecars[path], sidecars[path])
                file, rows = _open_foreign(path, sidecar, copy, number=len(files))
                files.append(file)
                parts.append(rows)
        else:
            if (copy_of_index := indexes.get(selection.folder)) is None:
                _check_sizes(selection, selection.manifest, sizes)
            opened, runs = _open_finished(selection, selection.manifest, copy_of_index)
            files += opened
            parts += runs
    starts = np.zeros(len(files) + 1, np.int64)
    np.cumsum([file.samples for file in files], out=starts[1:])
    return ShardSet(tuple(files), parts[0] if len(parts) == 1 else np.concatenate(parts), starts)


def local_sidecars(shards: Iterable[ShardFile]) -> list[str]:
    """Paths of shards' sidecars; those of remote shards are copied into the user's cache folder first (`local_copies`).

    Raises:
        FormatError: one is missing, or not that of its manifest.
        PackError: a store cannot be reached or refuses.
    """
    return local_copies(
        [
            RemoteFile(shard.sidecar, xxh3_128=shard.sidecar_xxh3_128)
            if is_url(shard.sidecar)
            else shard.sidecar
            for shard in shards
        ]
    )


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
    shards: Shards, *, read: Callable[[str], Manifest | None] = read_manifest, remote: bool = False
) -> list[Selection]:
    """Which shards are named, without looking at them.

    Args:
        shards: as for `open_shards`.
        read: reads a local manifest; when it returns None, the folder passes for one without.
        remote: take URLs too.

    Raises:
        UsageError: the pattern is empty or unbalanced, or names a shard twice; or it is a URL, and these are not taken.
        FormatError: nothing is named, a name is not in its folder's manifest, or a folder's packing was not finished.
    """
    asked = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    if not asked:
        raise UsageError(
            "no shards are named; give a pattern such as 'data/{000..007}.tar', a folder, or a list of tars"
        )
    texts = [os.fspath(item) for item in asked]
    named = [(text, [_look(place) for place in _brace_expand(text)]) for text in texts]
    urls = [place for _, places in named for place in places if is_url(place.path)]
    if urls and not remote:
        raise UsageError(f"{shown(urls[0].path)}: needed in a local folder; copy the shards to one first")
    surveyed = read_folders(sorted({place.folder for place in urls}))
    folder_at = functools.cache(
        lambda path: _as_folder(path, surveyed[path]) if is_url(path) else _open_folder(path, read)
    )
    chosen = [place for text, places in named for place in _find(text, places, folder_at)]
    seen: set[tuple[Place | str, str]] = set()
    real = functools.cache(lambda folder: split_url(folder) if is_url(folder) else os.path.realpath(folder))
    for folder, name in chosen:
        if (place := (real(folder), name)) in seen:
            raise UsageError(f"{_join(folder, name)} is named twice: its samples would count double")
        seen.add(place)
    return [
        Selection(folder, tuple(name for _, name in group), folder_at(folder).manifest)
        for folder, group in groupby(chosen, key=lambda place: place[0])
    ]


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder of shards: its manifest, the names in it, and the largest number among them; of a remote one without manifest, what it lists."""

    path: str
    manifest: Manifest | None = None
    names: frozenset[str] = frozenset()
    last: int | None = None
    listed: Sequence[str] | None = None

    def all_shards(self) -> list[str]:
        if self.manifest:
            names = [shard.tar for shard in self.manifest.shards]
        elif not is_url(self.path):
            names = sorted(name for name in os.listdir(self.path or ".") if name.endswith(SHARD_ENDINGS))
        elif self.listed is not None:
            names = list(self.listed)
        else:
            raise FormatError(
                f"{shown(self.path)}: no {MANIFEST} there, and it cannot be listed; name the shards by a pattern such as {{000..007}}{TAR}"
            )
        if not names:
            raise FormatError(
                f"{shown(self.path) or '.'}: no shards here: no {MANIFEST} that lists any, and no *{TAR} or *{TAR_ZST}"
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
        return _finished_folder(path, manifest)
    if os.path.isdir(os.path.join(path, WORK_FOLDER)):
        raise FormatError(
            f"{path or '.'}: packing was not finished; run the same `shardify pack` again to continue it"
        )
    return _Folder(path)


def _finished_folder(path: str, manifest: Manifest) -> _Folder:
    names = frozenset(shard.tar for shard in manifest.shards)
    numbers = [number for number in map(_number, names) if number is not None]
    return _Folder(path, manifest, names, max(numbers, default=None))


def _as_folder(url: str, found: RemoteFolder) -> _Folder:
    return _finished_folder(url, found.manifest) if found.manifest else _Folder(url, listed=found.shards)


class _Named(NamedTuple):
    """What a pattern expands to: a place, its folder, and the name in it, which is empty when the place is the folder itself."""

    path: str
    folder: str
    name: str


def _look(path: str) -> _Named:
    """Of a URL, the name alone tells what it is: a shard ends with ``.tar`` or ``.tar.zst``."""
    if not is_url(path):
        return (
            _Named(path, path, "") if os.path.isdir(path) else _Named(path, *os.path.split(path.rstrip("/")))
        )
    folder, name = split_name(path)
    if name == MANIFEST or name.endswith(SHARD_ENDINGS):
        return _Named(path, folder, name)
    return _Named(path, path.rstrip("/"), "")


def _join(folder: str, name: str) -> str:
    return join_url(folder, name) if is_url(folder) else os.path.join(folder, name)


def _name(place: str) -> str:
    return split_name(place)[1] if is_url(place) else os.path.basename(place)


def _find(text: str, places: Sequence[_Named], folder_at: Callable[[str], _Folder]) -> list[tuple[str, str]]:
    """The shards that one pattern, folder, manifest or tar names, as (folder, name); `places` is what the pattern expands to."""
    chosen: list[tuple[str, str]] = []
    strangers: list[str] = []
    for path, folder_path, name in places:
        folder = folder_at(folder_path)
        if name == MANIFEST and folder.manifest is None and (is_url(path) or not os.path.exists(path)):
            raise FormatError(f"{shown(path)}: no such manifest")
        if name in ("", MANIFEST):
            chosen += [(folder_path, shard) for shard in folder.all_shards()]
        elif folder.manifest is None or name in folder.names:
            chosen.append((folder_path, name))
        elif len(places) == 1 or not folder.is_beyond(name):
            strangers.append(shown(path))
    if strangers:
        raise FormatError(
            f"{shown(text)}: {len(strangers)} of the shards named are missing from the {MANIFEST} beside them: {_some(strangers)}"
        )
    if not chosen:
        raise FormatError(
            f"{shown(text)}: names only shards beyond the last one of the {MANIFEST} beside them"
        )
    return chosen


def _brace_expand(text: str) -> list[str]:
    if not text.strip():
        raise UsageError("an empty shard pattern; give one such as 'data/{000..007}.tar', or a folder")
    if not is_url(text) and os.path.exists(text):
        return [text]  # braces may be part of a name
    # counted before expanding: braceexpand holds whole ranges in memory
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(text))
    if count > MAX_NAMES:
        raise UsageError(f"{shown(text)}: names {count} shards; the limit is {MAX_NAMES}")
    try:
        return list(braceexpand(text))
    except ValueError:
        raise UsageError(f"{shown(text)}: not a brace pattern: its braces do not balance") from None


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


def _remote_indexes(selections: Sequence[Selection], say: Callable[[str], None]) -> dict[str, str]:
    """Folder -> local copy of its index.npy, of the remote data sets with a manifest."""
    files: dict[str, RemoteFile] = {}
    for selection in selections:
        if selection.manifest is None or not is_url(selection.folder):
            continue
        samples = sum(shard.samples for shard in selection.manifest.shards)
        file = RemoteFile(
            join_url(selection.folder, INDEX), xxh3_128=selection.manifest.index_xxh3_128, samples=samples
        )
        files[selection.folder] = file
        size = samples * INDEX_DTYPE.itemsize
        if size > _SAID_BYTES and not is_kept(file):
            say(f"shardify: fetching {shown(file.url)} ({size / 1e6:.0f} MB); done once")
    return dict(zip(files, local_copies(list(files.values())), strict=True))


def _remote_sidecars(urls: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Shard -> URL and local copy of its sidecar, for remote shards made by others."""
    found = find_foreign(urls) if urls else {}
    if missing := [shown(url) for url, shard in found.items() if shard.bytes is None]:
        raise FormatError(describe_missing(missing, len(urls)))
    if bare := [shown(url) for url, shard in found.items() if shard.copy is None]:
        raise FormatError(
            f"{len(bare)} of {len(urls)} shards have no index beside them, and no {MANIFEST}: {_some(bare)}; run `shardify index` on a local "
            f"copy of them and put the *{SIDECAR} files it makes beside them"
        )
    sidecars: dict[str, tuple[str, str]] = {}
    for url, shard in found.items():
        assert shard.copy
        recorded = read_shard_info(shard.copy).bytes
        if recorded != shard.bytes:
            raise FormatError(
                f"{shown(url)}: {shard.bytes} bytes, but its index {shown(shard.sidecar)} belongs to a tar of {recorded} bytes; run "
                "`shardify index` on a local copy of the tar and put its index in the place of this one"
            )
        sidecars[url] = shard.sidecar, shard.copy
    return sidecars


def _check_sizes(selection: Selection, manifest: Manifest, sizes: Mapping[str, int]) -> None:
    expected = {shard.tar: shard.bytes for shard in manifest.shards}
    for name, path in zip(selection.names, selection.paths, strict=True):
        if sizes[path] != expected[name]:
            what = "it was cut off" if sizes[path] < expected[name] else "the index does not belong to it"
            raise FormatError(
                f"{path}: {sizes[path]} bytes, but {MANIFEST} records {expected[name]}: {what}; copy or pack the data set again"
            )


def _open_finished(
    selection: Selection, manifest: Manifest, copy: str | None
) -> tuple[list[ShardFile], list[npt.NDArray[np.void]]]:
    """Shards of a data set with a manifest, and their runs of index.npy, of which `copy` is a checked copy if the set is remote."""
    number_of = {shard.tar: number for number, shard in enumerate(manifest.shards)}
    numbers = [number_of[name] for name in selection.names]
    files: list[ShardFile] = []
    for number, path in zip(numbers, selection.paths, strict=True):
        shard = manifest.shards[number]
        sidecar = _join(selection.folder, shard.sidecar)
        files.append(
            ShardFile(path, sidecar, shard.samples, shard.bytes, shard.tar_xxh3_128, shard.sidecar_xxh3_128)
        )
    starts = np.cumsum([0] + [shard.samples for shard in manifest.shards])
    index_path = copy or os.path.join(selection.folder, INDEX)
    index = read_index(index_path, samples=int(starts[-1]))
    hashed = copy is None and index.nbytes < MAX_HASHED_BYTES
    if hashed and not has_digest(index, index_path, manifest.index_xxh3_128):
        raise FormatError(
            f"{index_path}: not the index that {MANIFEST} names (its hash differs); copy or pack the data set again"
        )
    # neighbours in one slice, so that a whole data set stays one memory map
    breaks = [at for at in range(1, len(numbers)) if numbers[at] != numbers[at - 1] + 1]
    edges = [0, *breaks, len(numbers)]
    runs = [index[starts[numbers[a]] : starts[numbers[b - 1] + 1]] for a, b in pairwise(edges)]
    return files, runs


def _open_foreign(
    path: str, sidecar: str, copy: str, *, number: int
) -> tuple[ShardFile, npt.NDArray[np.void]]:
    """A shard without manifest, and the rows made from its sidecar, which is read from `copy`."""
    info = read_shard_info(copy)
    try:
        rows = index_rows(read_sidecar(copy, COLUMNS), info, shard=number)
    except (IndexError, ValueError, TypeError, OverflowError) as error:
        raise FormatError(f"{shown(sidecar)}: not a readable sidecar ({error})") from None
    ends = rows["offset"] + rows["size"]
    if len(rows) and (rows["offset"].min() < 0 or ends.max() > info.bytes):
        raise FormatError(
            f"{shown(sidecar)}: names samples beyond the {info.bytes} bytes of {shown(path)}; delete it to have it built again"
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
        with locked(folder or "."):
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


def build_sidecar(path: str) -> str:
    """Index a shard made by others; the sidecar goes beside it, or into the user's cache folder when it cannot.

    Args:
        path: the shard.

    Returns:
        The sidecar's path.

    Raises:
        FormatError: it is no shard (see `scan_shard`), or there is no place for its sidecar.
    """
    return write_scanned(path, scan_foreign(path))


def scan_foreign(path: str, *, mapped: bool = False) -> "ScannedShard":
    """The first half of `build_sidecar`; for `mapped` see `scan_shard`."""
    from shardify.format.scan import scan_shard

    return scan_shard(path, name=os.path.basename(path), mapped=mapped)


def write_scanned(path: str, scanned: "ScannedShard") -> str:
    """The second half of `build_sidecar`, which leaves Python's lock to other threads most of the time."""
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
    folder, name = os.path.split(os.path.abspath(path))
    digest = xxhash.xxh3_128_hexdigest(os.path.realpath(folder).encode("utf-8", "surrogateescape"))
    return os.path.join(user_cache(), "shardify", digest, sidecar_name(name))
