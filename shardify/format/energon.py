"""The index of Megatron Energon (7.4), as its ``energon prepare`` makes it.

000.tar.idx              uint64 little-endian: where each sample begins, then where the last one ends
.nv-meta/.info.json      samples of each shard
.nv-meta/index.sqlite    every sample and member, by key
.nv-meta/index.uuid      identifies that database
.nv-meta/split.yaml      all shards are for training; the user's own once it is edited
.nv-meta/dataset.yaml    raw samples, for a cooker to make something of; likewise
"""

import itertools
import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash
import yaml
from braceexpand import braceexpand

from shardify.errors import FormatError
from shardify.format.files import replacing, write_whole
from shardify.format.names import TAR
from shardify.format.sidecar import read_shard_info, read_sidecar

_META = ".nv-meta"
_DATASET = """__module__: megatron.energon
__class__: CrudeWebdataset
"""
_TABLES = """
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER
);
CREATE TABLE sample_parts (
    tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER, content_byte_size INTEGER
);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


def write_energon(
    paths: Sequence[str], sidecars: Mapping[str, str], *, say: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Make a folder of shards one that ``megatron.energon.get_train_dataset`` opens.

    ``split.yaml`` and ``dataset.yaml`` that were edited are left as they are.

    Args:
        paths: the shards, all of one folder.
        sidecars: shard -> its Parquet file.
        say: told, in one line, which shards a ``split.yaml`` of the user's leaves out.

    Returns:
        The paths of all these files.

    Raises:
        FormatError: a shard is compressed or empty, two samples have one key, or a file cannot be written.
    """
    folder = os.path.dirname(paths[0])
    meta = os.path.join(folder, _META)
    for path in paths:
        if not path.endswith(TAR):
            raise FormatError(f"{path}: Energon reads plain tars only")
    try:
        os.makedirs(meta, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{meta}: cannot be written ({error.strerror})") from None
    files = {name: os.path.join(meta, name) for name in (".info.json", "index.sqlite", "index.uuid")}
    split, dataset = (os.path.join(meta, name) for name in ("split.yaml", "dataset.yaml"))
    offsets = [_write_offsets(path, sidecars[path]) for path in paths]
    with replacing(files["index.sqlite"]) as temporary:
        _write_database(temporary, paths, sidecars)
    names = [os.path.basename(path) for path in paths]
    counts = dict(zip(names, (count for _, count in offsets), strict=True))
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(f"{os.path.basename(path)}\0{read_shard_info(sidecars[path]).xxh3_128}\n".encode())
    write_whole(files["index.uuid"], str(uuid.UUID(bytes=digest.digest(), version=4)).encode())
    _write_split(split, names, say)
    if not os.path.exists(dataset):
        write_whole(dataset, _DATASET.encode())
    # last: it says that the folder is prepared
    write_whole(files[".info.json"], json.dumps({"shard_counts": counts}, indent=2).encode() + b"\n")
    return [*(file for file, _ in offsets), *files.values(), split, dataset]


def _write_split(path: str, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Write the split; one that was edited stays, and what it leaves out is told: Energon would never read it."""
    try:
        with open(path, "rb") as file:
            there = file.read()
    except FileNotFoundError:
        there = b""
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    split: Any = None
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        split = yaml.safe_load(there)
    listed = split.get("split_parts") if isinstance(split, dict) else None
    if not there or (isinstance(listed, dict) and there == _split(listed.get("train"))):
        write_whole(path, _split(names))
        return
    known = {name for text in _texts(split) for name in _expanded(text)}
    if lost := [name for name in names if name not in known]:
        say(
            f"shardify: {path} leaves out {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}: add them to a part"
        )


def _split(train: object) -> bytes:
    split = {"split_parts": {"train": train, "val": [], "test": []}, "exclude": []}
    return json.dumps(split, indent=2, default=str).encode() + b"\n"  # JSON is YAML


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _expanded(text: str) -> list[str]:
    try:
        return list(braceexpand(text))
    except ValueError:
        return [text]


def _write_offsets(path: str, sidecar: str) -> tuple[str, int]:
    """Write a shard's offsets; the file's path and how many samples there are."""
    table = read_sidecar(sidecar, ("offset", "size"))
    if not table.num_rows:
        raise FormatError(f"{path}: no samples; Energon refuses empty shards")
    begin, size = table["offset"].to_numpy(), table["size"].to_numpy()
    ends = np.append(begin, begin[-1] + size[-1])
    target = f"{path}.idx"
    write_whole(target, ends.astype("<u8").tobytes())
    return target, len(begin)


def _write_database(target: str, paths: Sequence[str], sidecars: Mapping[str, str]) -> None:
    try:
        with closing(sqlite3.connect(target)) as database:
            database.executescript(_TABLES)
            for number, path in enumerate(paths):
                try:
                    samples, parts = _rows(number, sidecars[path])
                    database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", samples)
                except sqlite3.IntegrityError:
                    raise FormatError(
                        f"{path}: one of its keys is that of another sample of these shards; Energon needs unique keys "
                        "(`shardify reshard` gives new ones)"
                    ) from None
                database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", parts)
            database.executescript(_INDEXES)
            database.commit()
    except sqlite3.Error as error:
        raise FormatError(f"{target}: cannot be written ({error})") from None


def _rows(number: int, sidecar: str) -> tuple[Iterator[tuple[object, ...]], Iterator[tuple[object, ...]]]:
    """The rows of samples and of their parts."""
    table = read_sidecar(sidecar, ("key", "offset", "size", "members"))
    begin = table["offset"].to_numpy()
    # as Energon counts: up to the next sample, whatever lies between
    ends = np.append(begin[1:], begin[-1:] + table["size"].to_numpy()[-1:])
    counts = pc.list_value_length(table["members"]).to_numpy()
    members = pc.list_flatten(table["members"]).combine_chunks()
    samples = zip(
        itertools.repeat(number),
        table["key"].to_pylist(),
        range(len(begin)),
        begin.tolist(),
        (ends - begin).tolist(),
        strict=False,
    )
    parts = zip(
        itertools.repeat(number),
        np.repeat(np.arange(len(begin)), counts).tolist(),
        members.field("field").to_pylist(),
        members.field("offset").to_pylist(),
        members.field("size").to_pylist(),
        strict=False,
    )
    return samples, parts
