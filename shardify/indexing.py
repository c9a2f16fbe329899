"""`shardify index`: the files by which shards made by anyone can be read at random, by shardify's loader and by others."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import shardify.format.scan  # noqa: F401 - before processes are forked that need it
from shardify.errors import FormatError, UsageError
from shardify.format.dali import write_dali
from shardify.format.energon import write_energon
from shardify.format.shards import Shards, find_sidecars, scan_foreign, select_shards, write_scanned
from shardify.processes import Ended, each_in_process
from shardify.progress import Progress

FORMATS = ("parquet", "energon", "dali")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@cache
def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "write")


def _build(path: str) -> str | Future[str]:
    """A thread writes one sidecar while the next shard is scanned; this process is watched, and may map files."""
    return _writer().submit(write_scanned, path, scan_foreign(path, mapped=True))


def index_shards(
    shards: Shards,
    *,
    workers: int | None = None,
    format: str = "parquet",  # noqa: A002 - the name of the option
    say: Callable[[str], None] = _to_stderr,
) -> list[str]:
    """Build the sidecars that shards made by others still lack, however large they are, and the index of another loader from them.

    Args:
        shards: as for `shardify.format.shards.open_shards`.
        workers: processes at a time; as many as there are cores by default. The files do not depend on it.
        format: ``parquet`` (the sidecars alone), ``energon`` (see `write_energon`) or ``dali`` (see `write_dali`).
        say: told, in one line, what is about to be done; standard error by default.

    Returns:
        The index files of all these shards, those that were there already too.

    Raises:
        UsageError: the format or the pattern is none.
        FormatError: as `open_shards`, and when a shard is no tar, or its index cannot be written.
    """
    if format not in FORMATS:
        raise UsageError(f"index format {format!r}; there are {', '.join(FORMATS)}")
    selections = select_shards(shards)
    processes = workers or len(os.sched_getaffinity(0))

    def build(paths: Sequence[str]) -> Iterator[str]:
        with Progress("indexing", total=len(paths), unit="shards") as progress:
            results = each_in_process(_build, paths, workers=processes)
            for path, result in zip(paths, results, strict=True):
                if isinstance(result, Ended):
                    raise FormatError(
                        f"{path}: cannot be indexed: its process was ended with status {result.status}"
                    )
                progress.advance(1, os.path.getsize(path))
                yield result

    sidecars = find_sidecars(selections, say=say, build=build)
    if format == "energon":
        folders: dict[str, list[str]] = {}  # a folder may be named more than once
        for path in (path for selection in selections for path in selection.paths):
            folders.setdefault(os.path.realpath(os.path.dirname(path)), []).append(path)
        return [file for paths in folders.values() for file in write_energon(paths, sidecars, say=say)]
    if format == "dali":
        return [write_dali(path, sidecars[path]) for selection in selections for path in selection.paths]
    return [sidecars[path] for selection in selections for path in selection.paths]
