"""Small data sets of known content, written by the format's own parts."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardify.format.hashing import hash_file
from shardify.format.index import index_rows, write_index
from shardify.format.manifest import FORMAT_VERSION, Counts, Manifest, Shard, encode_manifest
from shardify.format.names import INDEX, MANIFEST, image_field, sample_key, shard_name, sidecar_name
from shardify.format.sidecar import ImageInfo, SampleRow, ShardInfo, read_sidecar, write_sidecar
from shardify.format.tar import ShardWriter

SIDE = 8


def png(value: int, side: int = SIDE) -> bytes:
    """A small picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value % 256, value // 256 % 256, 7)).save(file, "PNG")
    return file.getvalue()


def record(number: int, images: int = 1) -> bytes:
    fields = {
        "id": number,
        "conversations": [
            {"from": "human", "value": "<image>\n" * images + f"What is {number}?"},
            {"from": "gpt", "value": f"It is {number}."},
        ],
    }
    if images:
        fields["image"] = "a.png" if images == 1 else [f"{i}.png" for i in range(images)]
    return json.dumps(fields).encode()


@dataclass(frozen=True)
class Made:
    """One sample to be written."""

    images: Sequence[bytes]
    record: bytes


def ordinary(number: int) -> Made:
    return Made([png(number)], record(number))


def write_data_set(folder: Path, samples: Sequence[Made], *, shards: int) -> Path:
    """Shards, sidecars, index and manifest; keys are the samples' numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    listed, parts = [], []
    for shard, numbers in enumerate(np.array_split(np.arange(len(samples)), shards)):
        tar = folder / shard_name(shard, shards)
        rows = []
        with open(tar, "wb", buffering=0) as file:
            writer = ShardWriter(file)
            for number in numbers.tolist():
                sample, begin = samples[number], writer.offset
                key = sample_key(number, 9)
                fields = [
                    image_field(i, "png", is_list=len(sample.images) > 1) for i in range(len(sample.images))
                ]
                members = [
                    writer.add(key, field, data)
                    for field, data in zip([*fields, "json"], [*sample.images, sample.record], strict=True)
                ]
                images = [ImageInfo(field, "png", SIDE, SIDE) for field in fields]
                size = writer.offset - begin
                rows.append(
                    SampleRow(key, str(number), number, begin, size, members, images, 2, 6, "made.json")
                )
            digest = writer.close()
        info = ShardInfo(bytes=tar.stat().st_size, xxh3_128=digest)
        sidecar = folder / sidecar_name(tar.name)
        write_sidecar(sidecar, rows, info)
        parts.append(index_rows(read_sidecar(sidecar), info, shard))
        listed.append(Shard(tar.name, sidecar.name, len(rows), info.bytes, digest, hash_file(sidecar)))
    with open(folder / INDEX, "wb") as file:
        write_index(file, parts)
    counts = Counts(len(samples), len(samples), {}, {})
    manifest = Manifest(FORMAT_VERSION, {}, [], listed, hash_file(folder / INDEX), counts)
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))
    return folder


@pytest.fixture(scope="session")
def made():
    """The helpers above, for tests to write their own data sets."""
    from types import SimpleNamespace

    return SimpleNamespace(
        Made=Made, ordinary=ordinary, png=png, record=record, write=write_data_set, side=SIDE
    )


@pytest.fixture(scope="session")
def plain_data(tmp_path_factory) -> Path:
    """103 ordinary samples in 5 shards; sample i has the key of i and pixels of the colour i."""
    return write_data_set(tmp_path_factory.mktemp("plain"), [ordinary(i) for i in range(103)], shards=5)
