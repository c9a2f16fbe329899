"""What is computed once from a data set and kept: files in the user's cache folder, made by one process of a node while the others wait.

    ~/.cache/shardify/derived/0c5e.../train.npy  validation.npy  about.json

`about.json` is written last: where it is, all is. Any of these folders may be deleted; what it held is made again.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
from tqdm import tqdm

from loaders.worker import start_worker
from shardify.errors import FormatError, LoaderError
from shardify.format.files import locked, replacing, user_cache, write_whole

MAX_WORKERS = 16
"""Processes that read sidecars or count tokens."""

_ABOUT = "about.json"
_LINE_EVERY = 10.0  # seconds between plain lines of progress
_AHEAD = 4  # pieces of work given out for each worker

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def derived_folder(identity: Mapping[str, Any]) -> str:
    """The folder of what is derived so; it need not exist."""
    content = msgspec.json.encode(identity, order="deterministic")
    return os.path.join(user_cache(), "shardify", "derived", xxhash.xxh3_128_hexdigest(content))


def is_derived(identity: Mapping[str, Any]) -> bool:
    """Whether it has been derived already."""
    return _read_about(derived_folder(identity), identity) is not None


def derived(
    identity: Mapping[str, Any], build: Callable[[str], Mapping[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """What has been derived from a data set, built now if it was not before.

    Args:
        identity: JSON-able, of the data and of what is computed.
        build: writes its files into the folder it is given, each in a way that its name never stands for a part of it, and returns
            what else is to be remembered.

    Returns:
        The folder, and what `build` returned when it ran.

    Raises:
        FormatError: the cache folder cannot be written.
    """
    folder = derived_folder(identity)
    if (about := _read_about(folder, identity)) is not None:
        return folder, about
    try:
        os.makedirs(folder, exist_ok=True)
        with locked(folder):
            # another process may have built it while this one waited
            if (about := _read_about(folder, identity)) is None:
                _remove_unfinished(folder)
                about = dict(build(folder))
                content = msgspec.json.encode({"identity": dict(identity), "about": about})
                write_whole(os.path.join(folder, _ABOUT), content)
    except OSError as error:
        raise FormatError(
            f"{folder}: cannot be written ({error.strerror or error}); set XDG_CACHE_HOME to a writable folder"
        ) from None
    return folder, about


def _read_about(folder: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        with open(os.path.join(folder, _ABOUT), "rb") as file:
            found = msgspec.json.decode(file.read())
        about = found["about"] if found["identity"] == msgspec.to_builtins(dict(identity)) else None
    except (OSError, msgspec.MsgspecError, KeyError, TypeError):
        return None
    return about if isinstance(about, dict) else None


def _remove_unfinished(folder: str) -> None:
    for name in os.listdir(folder):
        if name.endswith(".tmp"):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))


def read_array(folder: str, name: str) -> npt.NDArray[Any]:
    """An array that `build` wrote, memory-mapped.

    Raises:
        FormatError: it is missing or damaged.
    """
    path = os.path.join(folder, f"{name}.npy")
    try:
        array = np.load(path, allow_pickle=False) if _is_empty(path) else np.load(path, mmap_mode="r")
    except Exception as error:  # noqa: BLE001 - numpy's header reader raises what its parsers do
        raise FormatError(f"{path}: not readable ({error}); delete {folder} to have it made again") from None
    return np.asarray(array)


def _is_empty(path: str) -> bool:
    # an array of no elements cannot be mapped
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return 0 in read(file)[0]


def write_array(
    folder: str, name: str, chunks: Iterable[npt.NDArray[Any]], length: int, dtype: npt.DTypeLike
) -> None:
    """Write a one-dimensional array of `length` elements piece by piece, flushed to disk before it has its name."""
    with replacing(os.path.join(folder, f"{name}.npy")) as temporary, open(temporary, "wb") as file:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
            "fortran_order": False,
            "shape": (length,),
        }
        np.lib.format.write_array_header_1_0(file, header)
        file.writelines(np.ascontiguousarray(chunk, dtype).data for chunk in chunks)
        file.flush()
        os.fsync(file.fileno())


def each_forked(
    work: Callable[[_Item], _Result], items: Iterable[_Item], *, count: int, workers: int
) -> Iterator[_Result]:
    """``work(item)`` for each of `count` items, in order, by forked processes; by this one when `workers` is 0.

    Raises:
        LoaderError: a process was killed.
        Exception: what `work` raised.
    """
    workers = min(workers, count)
    if workers < 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin,
        initargs=(work, os.getpid()),
    )
    waiting: list[Any] = []
    try:
        for item in items:
            waiting.append(pool.submit(_do, item))
            if len(waiting) > workers * _AHEAD:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()
    except BaseException as error:
        # what is under way is not waited for: an interrupted run ends at once
        processes = list((pool._processes or {}).values())  # noqa: SLF001 - Python 3.14 makes it public
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise LoaderError(
                "a process that read a data set's files was ended (out of memory?); the same run again goes on"
            ) from None
        raise
    pool.shutdown()


_work: Callable[[Any], Any] | None = None


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    global _work  # noqa: PLW0603 - reaches this process by fork: it need not be picklable
    _work = work
    start_worker(0, parent=parent)


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)


def default_workers() -> int:
    """Processes for this node: as many as it has cores for this process, up to `MAX_WORKERS`."""
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def watched(results: Iterable[_Result], what: str, sizes: Iterable[int], total: int) -> Iterator[_Result]:
    """The same results, with progress on standard error: a bar on a terminal, a line now and then elsewhere.

    Args:
        results: one after another.
        what: a word or two.
        sizes: samples that each result stands for.
        total: of them all.
    """
    bar = tqdm(desc=what, total=total, unit=" samples", disable=None, leave=False)
    began = last = time.monotonic()
    done = 0
    with bar:
        for result, size in zip(results, sizes, strict=True):
            done += size
            bar.update(size)
            now = time.monotonic()
            if bar.disable and now - last >= _LINE_EVERY:
                last = now
                left = (total - done) * (now - began) / max(done, 1)
                print(
                    f"{what}: {done:,} of {total:,} samples, {left:,.0f} s left", file=sys.stderr, flush=True
                )
            yield result
