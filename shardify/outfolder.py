"""The output folder of a pack: who may write there, what was promised, and whether it is kept.

OUT/.packing/lock        held while a pack runs
OUT/.packing/plan.json   what is being packed; written before the first shard
OUT/.packing/*           unfinished files; renamed into OUT when they are complete
OUT/manifest.json        written last: the set is finished
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import xxhash

from shardify.errors import FormatError, UsageError
from shardify.format import names
from shardify.format.manifest import FORMAT_VERSION, Manifest, Source, read_manifest
from shardify.pack import sync_folder

_LOCK = "lock"
_PLAN = "plan.json"
_LOCK_PATIENCE = 5.0  # seconds: the workers of a killed run hold its lock until the kernel has ended them


class Promise(msgspec.Struct, frozen=True):
    """What a data set is made of; a pack continues only what was begun under the same promise.

    Attributes:
        settings: all that shapes the bytes.
        sources: record files and image stores.
        found: what the survey of the sources counted, and a digest of all of it; empty before the survey.
        format_version: of the files on disk.
    """

    settings: dict[str, Any]
    sources: list[Source]
    found: dict[str, Any] = {}
    format_version: int = FORMAT_VERSION

    @property
    def id(self) -> str:
        """Identifies the plan that follows from this."""
        return xxhash.xxh3_128_hexdigest(_encode(self))


def finished_manifest(out: str, promise: Promise) -> Manifest | None:
    """The manifest of a finished set; None when there is none.

    Raises:
        UsageError: the set was made from other sources or settings.
        FormatError: the manifest cannot be read, or its files are not all there.
    """
    path = os.path.join(out, names.MANIFEST)
    if not os.path.lexists(path):
        return None
    manifest = read_manifest(path)
    _refuse_difference(
        out, Promise(manifest.settings, manifest.sources, promise.found, manifest.format_version), promise
    )
    sizes = {shard.tar: shard.bytes for shard in manifest.shards}
    extra = [names.INDEX, names.QUARANTINE, *(shard.sidecar for shard in manifest.shards)]
    for name, size in {**sizes, **dict.fromkeys(extra, -1)}.items():
        try:
            found = os.stat(os.path.join(out, name)).st_size
        except FileNotFoundError:
            raise FormatError(
                f"{out}: finished by its manifest, but {name} is missing; remove the folder to pack again"
            ) from None
        if size not in (-1, found):
            raise FormatError(
                f"{out}: finished by its manifest, but {name} has {found} bytes instead of {size}; remove the folder to pack again"
            )
    return manifest


@contextmanager
def claimed(out: str) -> Iterator[None]:
    """Hold the output folder for one pack; what was made for nothing is removed again.

    Raises:
        UsageError: another pack holds it, or `out` is no folder.
    """
    work = os.path.join(out, names.WORK_FOLDER)
    existed = os.path.isdir(out)
    try:
        os.makedirs(work, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{out}: not a folder; --out names the folder for the shards") from None
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror})") from None
    lock = _lock(os.path.join(work, _LOCK), out)
    try:
        yield
    finally:
        if not os.path.lexists(os.path.join(work, _PLAN)):
            shutil.rmtree(work, ignore_errors=True)
            if not existed:
                with suppress(OSError):
                    os.rmdir(out)
        os.close(lock)


def check_promise(out: str, promise: Promise) -> None:
    """See that what was begun in `out` is what is asked for now.

    Args:
        out: the claimed folder.
        promise: with or without what the survey found.

    Raises:
        UsageError: other settings or sources, or files that no pack has left there.
    """
    try:
        with open(os.path.join(out, names.WORK_FOLDER, _PLAN), "rb") as file:
            begun = msgspec.json.decode(file.read(), type=Promise)
    except FileNotFoundError:
        foreign = sorted(name for name in os.listdir(out) if not name.startswith("."))
        if foreign:
            listed = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise UsageError(
                f"{out}: not empty ({listed}), and not begun by shardify; choose an empty or new folder"
            ) from None
        return
    except msgspec.MsgspecError as error:
        raise UsageError(f"{out}/{names.WORK_FOLDER}/{_PLAN}: not readable ({error}); remove {out}") from None
    if not promise.found:
        begun = msgspec.structs.replace(begun, found={})
    _refuse_difference(out, begun, promise)


def write_promise(out: str, promise: Promise) -> None:
    """Keep the promise on disk from now on."""
    path = os.path.join(out, names.WORK_FOLDER, _PLAN)
    if not os.path.lexists(path):
        write_durably(path + ".new", _encode(promise))
        os.rename(path + ".new", path)
        sync_folder(os.path.dirname(path))
        sync_folder(out)


def remove_work(out: str) -> None:
    """Remove what a finished set no longer needs."""
    shutil.rmtree(os.path.join(out, names.WORK_FOLDER), ignore_errors=True)


def write_durably(path: str, content: bytes) -> None:
    """Write a file and flush it to disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _encode(promise: Promise) -> bytes:
    return msgspec.json.format(msgspec.json.encode(promise, order="deterministic"), indent=2) + b"\n"


def _lock(path: str, out: str) -> int:
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        # the run before may have removed file and folder since they were made
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(file)
                raise UsageError(f"{out}: another pack is writing there") from None
        os.close(file)
        time.sleep(0.05)


def _refuse_difference(out: str, begun: Promise, asked: Promise) -> None:
    differences = [
        *_differences(begun.settings, asked.settings),
        *_differences(_by_name(begun.sources), _by_name(asked.sources)),
        *_differences(begun.found, asked.found),
    ]
    if begun.format_version != asked.format_version:
        differences.append(f"format version was {begun.format_version}, is now {asked.format_version}")
    if not differences and begun.sources != asked.sources:
        differences.append("the sources are given in another order")
    if differences:
        raise UsageError(
            f"{out}: begun with other settings or sources: {'; '.join(differences)}. "
            "Give what was given before, or choose another folder"
        )


def _differences(begun: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {_shown(begun.get(name))}, is now {_shown(asked.get(name))}"
        for name in dict.fromkeys([*begun, *asked])
        if begun.get(name) != asked.get(name)
    ]


def _by_name(sources: Sequence[Source]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for source in sources:
        records = f"{source.records} records, " if source.records is not None else ""
        content = f"{records}fingerprint {source.fingerprint}" if source.fingerprint else "given"
        name = f"{source.kind} {source.name}"
        shown[name] = f"{shown[name]} and {content}" if name in shown else content
    return shown


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)
