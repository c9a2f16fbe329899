"""One small data set, packed plain and compressed, for all readers of other origin."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from shardify.convert import PackOptions, pack_dataset
from shardify.format.shards import open_shards


@dataclass(frozen=True)
class Packed:
    """A folder of shards, and every sample as written: key -> field -> bytes."""

    folder: Path
    samples: dict[str, dict[str, bytes]]

    @property
    def shards(self) -> list[str]:
        return [shard.path for shard in open_shards(self.folder).shards]


def encode(number: int, kind: str) -> bytes:
    picture = Image.new("RGB", (40 + number, 30), (number * 5 % 256, 90, 200))
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def pack(folder: Path, compress: str | None, *, mixed: bool) -> Packed:
    """40 records in 3 shards; `mixed`: text-only ones, several images, several formats and ids of two types among them."""
    images = folder / "images" / "sub"
    images.mkdir(parents=True)
    records, expected = [], []
    for number in range(40):
        names, contents = [f"{number}.jpg"], [encode(number, "JPEG")]
        if mixed and number % 4 == 1:
            names, contents = [], []
        elif mixed and number % 4 == 2:
            names, contents = [f"{number}.png"], [encode(number, "PNG")]
        elif mixed and number % 4 == 3:
            names.append(f"{number}-b.png")
            contents.append(encode(number + 50, "PNG"))
        for name, content in zip(names, contents, strict=True):
            (images / name).write_bytes(content)
        record = {
            "id": number if mixed and number % 2 else f"{number:04d}",
            "conversations": [
                {"from": "human", "value": "<image>\n" * len(names) + "What is it? \u00e4\u4e2d"},
                {"from": "gpt", "value": f"Number {number}."},
            ],
        }
        paths = [f"sub/{name}" for name in names]
        if len(paths) > 1:
            record["image"] = paths
        elif paths:
            record["image"] = paths[0]
        records.append(record)
        fields = {}
        for at, (name, content) in enumerate(zip(names, contents, strict=True)):
            fields[f"{at}." * (len(names) > 1) + name.rpartition(".")[2]] = content
        expected.append(fields)
    lines = [json.dumps(record).encode() for record in records]
    (folder / "records.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    pack_dataset(
        PackOptions(
            records=[folder / "records.jsonl"],
            images=[folder / "images"],
            out=folder / "data",
            shards=3,
            shuffle=False,
            compress=compress,
            workers=1,
        )
    )
    samples = {
        f"{number:09d}": {**fields, "json": line}
        for number, (fields, line) in enumerate(zip(expected, lines, strict=True))
    }
    return Packed(folder / "data", samples)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(tmp_path_factory.mktemp("plain"), None, mixed=True)


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(tmp_path_factory.mktemp("compressed"), "zstd", mixed=True)


@pytest.fixture(scope="session")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Every sample has the same fields."""
    return pack(tmp_path_factory.mktemp("uniform"), None, mixed=False)
