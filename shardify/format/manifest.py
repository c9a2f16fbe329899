"""manifest.json: what a finished data set is. Written last; the same input and settings give the same bytes."""

import os
from typing import Any

import msgspec

from shardify.errors import FormatError

FORMAT_VERSION = 1

RECORDS = "records"
SHARDS = "shards"
"""A data set that samples were taken from."""
PART = "part"
"""Some records of a record file, or samples of a tar, taken from a data set."""


class Source(msgspec.Struct, frozen=True, omit_defaults=True):
    """A record file or an image store the data set was made from.

    Attributes:
        kind: `RECORDS`, ``archive``, ``folder``, ...; of a set made of others, `SHARDS` and `PART`.
        name: relative to the root of its kind, never absolute.
        records: for record files, how many records it holds; for data sets, samples; for parts, how many were taken.
        fingerprint: xxh3_128 of a record file's content or of an archive's directory; empty for folders, whose images are hashed one by one
            in the sidecars.
        licence: as the recipe states it.
        citation: likewise.
    """

    kind: str
    name: str
    records: int | None = None
    fingerprint: str = ""
    licence: str = ""
    citation: str = ""


class Shard(msgspec.Struct, frozen=True):
    """One shard: file names, counts, and the xxh3_128 of both files in hexadecimal."""

    tar: str
    sidecar: str
    samples: int
    bytes: int
    tar_xxh3_128: str
    sidecar_xxh3_128: str


class Counts(msgspec.Struct, frozen=True):
    """The reconciliation: records_in = packed + sum of set_aside, by reason code; notes count what was kept."""

    records_in: int
    packed: int
    set_aside: dict[str, int]
    notes: dict[str, int]


class Append(msgspec.Struct, frozen=True):
    """Records that were added to a finished set: how, from what, from which shard on, and what became of them."""

    settings: dict[str, Any]
    sources: list[Source]
    first_shard: int
    counts: Counts


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The whole file.

    Attributes:
        format_version: of all files of the set.
        settings: that shaped the bytes of the first shards, before anything was added.
        sources: likewise.
        shards: all of them.
        index_xxh3_128: the hash of index.npy, hexadecimal.
        counts: over all shards.
        appends: what was added later, in its order.
    """

    format_version: int
    settings: dict[str, Any]
    sources: list[Source]
    shards: list[Shard]
    index_xxh3_128: str
    counts: Counts
    appends: list[Append] = []

    @property
    def all_sources(self) -> list[Source]:
        """The sources of the first shards, then those of what was added."""
        return [*self.sources, *(source for append in self.appends for source in append.sources)]


_decode = msgspec.json.Decoder(Manifest).decode  # made here: see `shardify.format.sidecar`


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's bytes: indented JSON, keys of free-form parts sorted."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2) + b"\n"


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and check a manifest.

    Raises:
        FormatError: it is missing, damaged, or of a newer format.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise FormatError(f"{os.fspath(path)}: no such manifest") from None
    except OSError as error:
        raise FormatError(f"{os.fspath(path)}: not a readable manifest ({error})") from None
    return decode_manifest(content, where=os.fspath(path))


def decode_manifest(content: bytes, *, where: str) -> Manifest:
    """A manifest from its bytes; `where` names it in errors.

    Raises:
        FormatError: it is damaged, or of a newer format.
    """
    try:
        manifest = _decode(content)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise FormatError(f"{where}: not a readable manifest ({error})") from None
    if manifest.format_version != FORMAT_VERSION:
        raise FormatError(
            f"{where}: format version {manifest.format_version}; this shardify reads version {FORMAT_VERSION}"
        )
    for shard in manifest.shards:
        for name in (shard.tar, shard.sidecar):
            if os.path.basename(name) != name or name in ("", ".", ".."):
                raise FormatError(f"{where}: shard name {name!r} leaves the manifest's folder")
    return manifest
