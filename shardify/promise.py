"""What a data set is made of, kept on disk while it is written: only what was begun is continued.

OUT/.packing/plan.json   what is being written; there before the first shard
OUT/manifest.json        written last: the set is finished
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from shardify.errors import FormatError, UsageError
from shardify.format import names
from shardify.format.manifest import FORMAT_VERSION, Append, Manifest, Source, decode_manifest
from shardify.outputs import Output


class Promise(msgspec.Struct, frozen=True):
    """What a data set is made of; a run continues only what was begun under the same promise.

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


def read_finished(output: Output) -> Manifest | None:
    """The manifest of the finished set at a place; None when there is none.

    Raises:
        FormatError: it cannot be read, or its files are not all there.
    """
    file = output.open(names.MANIFEST)
    if file is None:
        return None
    with file:
        manifest = decode_manifest(file.read(), where=f"{output.place}/{names.MANIFEST}")
    sizes = {shard.tar: shard.bytes for shard in manifest.shards}
    extra = [names.INDEX, names.QUARANTINE, *(shard.sidecar for shard in manifest.shards)]
    there = output.sizes()
    for name, size in {**sizes, **dict.fromkeys(extra, -1)}.items():
        found = there.get(name)
        if found is None:
            raise FormatError(
                f"{output.place}: finished by its manifest, but {name} is missing; remove the folder to pack again"
            )
        if size not in (-1, found):
            raise FormatError(
                f"{output.place}: finished by its manifest, but {name} has {found} bytes instead of {size}; remove the folder to pack again"
            )
    return manifest


def is_finished(output: Output, promise: Promise) -> bool:
    """Whether the set at a place is finished.

    Raises:
        UsageError: it was made from other sources or settings.
        FormatError: as `read_finished`.
    """
    manifest = read_finished(output)
    if manifest is None:
        return False
    refuse_difference(
        output, Promise(manifest.settings, manifest.sources, promise.found, manifest.format_version), promise
    )
    return True


def check_promise(output: Output, promise: Promise, *, base: Manifest | None = None) -> None:
    """See that what was begun at a place is what is asked for now.

    Args:
        output: the claimed place.
        promise: with or without what the survey found.
        base: the finished set that is added to: its files may be there already, and so may the plan that it was made by.

    Raises:
        UsageError: other settings or sources, or files that no run has left there.
    """
    begun = _read_begun(output)
    if base and begun and _is_in(base, begun):
        begun = None
    if begun is None:
        foreign = sorted(set(output.sizes()).difference(_files_of(base) if base else ()))
        if foreign:
            listed = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
            raise UsageError(
                f"{output.place}: not empty ({listed}), and not begun by shardify; choose an empty or new folder"
            )
        return
    if not promise.found:
        begun = msgspec.structs.replace(begun, found={})
    refuse_difference(output, begun, promise)


def write_promise(output: Output, promise: Promise, *, base: Manifest | None = None) -> None:
    """Keep the promise from now on; arguments as for `check_promise`, which has been called.

    Raises:
        UsageError: another run has begun something else here in this moment.
    """
    left = _read_begun(output) if base else None
    new = not (base and left and _is_in(base, left))
    if not output.put(names.PLAN, _encode(promise), new=new):
        check_promise(output, promise)


def end_work(output: Output) -> list[str]:
    """Remove the work folder of the finished set at a place, unless records are being added to that set.

    Returns:
        What there is to say about it.
    """
    begun, manifest = _read_begun(output), read_finished(output)
    if begun and manifest and not _is_in(manifest, begun):
        return ["adding records to it was begun and not finished; that command again continues it"]
    output.remove_work()
    return []


def _read_begun(output: Output) -> Promise | None:
    file = output.open(names.PLAN)
    if file is None:
        return None
    with file:
        try:
            return msgspec.json.decode(file.read(), type=Promise)
        except msgspec.MsgspecError as error:
            raise UsageError(
                f"{output.place}/{names.PLAN}: not readable ({error}); remove {output.place}"
            ) from None


def _is_in(manifest: Manifest, begun: Promise) -> bool:
    """Whether what was begun has been finished."""
    finished: list[Manifest | Append] = [manifest, *manifest.appends]
    return any((begun.settings, begun.sources) == (done.settings, done.sources) for done in finished)


def _files_of(manifest: Manifest) -> list[str]:
    shards = [name for shard in manifest.shards for name in (shard.tar, shard.sidecar)]
    return [*shards, names.INDEX, names.MANIFEST, names.QUARANTINE]


def refuse_difference(output: Output, begun: Promise, asked: Promise) -> None:
    """Raises UsageError when two promises differ, naming every difference."""
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
            f"{output.place}: begun with other settings or sources: {'; '.join(differences)}. "
            "Give what was given before, or choose another folder"
        )


def _encode(promise: Promise) -> bytes:
    return msgspec.json.format(msgspec.json.encode(promise, order="deterministic"), indent=2) + b"\n"


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
