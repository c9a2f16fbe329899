"""What a data set holds, against a count by hand."""

import io
import json
import os
import subprocess
import sys
import tarfile

import msgspec
import pytest
from PIL import Image

from shardify.format.sidecar import ImageInfo, SampleRow, SetAside, ShardInfo, write_sidecar
from shardify.format.tar import ShardWriter
from shardify.info import Spread, describe, print_info


def write_shard(path, sizes, *, plan="p", set_aside=(), notes=None):
    """One text sample for each entry, its images of these sizes; entries are (turns, words, [(format, width, height), ...])."""
    rows = []
    with open(path, "wb", buffering=0) as file:
        writer = ShardWriter(file)
        for number, (turns, words, images) in enumerate(sizes):
            offset = writer.offset
            members = [writer.add(f"{number:09d}", f"{i}.{image[0]}", b"x") for i, image in enumerate(images)]
            members.append(writer.add(f"{number:09d}", "json", b"{}"))
            infos = [ImageInfo(f"{i}.{image[0]}", *image) for i, image in enumerate(images)]
            source = "a.json" if number else "b.json"
            rows.append(
                SampleRow(
                    f"{number:09d}",
                    None,
                    number,
                    offset,
                    writer.offset - offset,
                    members,
                    infos,
                    turns,
                    words,
                    source,
                )
            )
        digest = writer.close()
    info = ShardInfo(path.stat().st_size, digest, list(set_aside), notes or {}, [], plan)
    write_sidecar(path.with_suffix(".parquet"), rows, info)


@pytest.fixture
def shards(tmp_path):
    aside = SetAside(3, "a.json", None, "image-missing", "", None)
    write_shard(
        tmp_path / "000.tar",
        [(2, 10, [("jpg", 640, 480)]), (4, 30, []), (2, 12, [("png", 100, 50), ("jpg", 640, 480)])],
        set_aside=[aside, aside],
        notes={"id-repeated": 2},
    )
    write_shard(tmp_path / "001.tar", [(6, 100, [("gif", 0, 0)])], notes={"id-repeated": 1, "id-missing": 1})
    return tmp_path


def test_counts_are_those_by_hand(shards):
    found = describe(shards)
    assert (found.shards, found.samples, found.records_in) == (2, 4, 6)
    assert found.bytes == sum(os.path.getsize(shards / name) for name in ("000.tar", "001.tar"))
    assert found.set_aside == {"image-missing": 2}
    assert found.notes == {"id-repeated": 3, "id-missing": 1}
    assert (found.images, found.text_only, found.multi_image, found.unreadable) == (4, 1, 1, 1)
    assert found.formats == {"jpg": 2, "gif": 1, "png": 1}
    assert list(found.formats) == ["jpg", "gif", "png"]
    assert found.width == Spread(100, 640, 460, 640)
    assert found.height == Spread(50, 480, pytest.approx(1010 / 3), 480)
    assert found.megapixels.max == pytest.approx(0.3072)
    assert found.turns == Spread(2, 3, 3.5, 6)
    assert found.words == Spread(10, 21, 38, 100)
    assert found.sources == {"a.json": 2, "b.json": 2}


def test_some_shards_are_counted_alone(shards):
    found = describe(shards / "001.tar")
    assert (found.samples, found.records_in, found.set_aside) == (1, 1, {})
    assert (found.width, found.unreadable) == (None, 1)


def test_text_only_and_empty_sets(tmp_path):
    write_shard(tmp_path / "000.tar", [(2, 5, [])])
    found = describe(tmp_path)
    assert (found.images, found.formats, found.width) == (0, {}, None)
    (tmp_path / "empty").mkdir()
    write_shard(tmp_path / "empty" / "000.tar", [])
    found = describe(tmp_path / "empty")
    assert (found.samples, found.turns, found.words) == (0, None, None)
    print_info(tmp_path / "empty")


def test_both_forms_say_the_same(shards, capsys):
    print_info(shards, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found == msgspec.to_builtins(describe(shards))
    print_info(shards)
    lines = capsys.readouterr().out.splitlines()
    assert any("6 = 4 packed + 2 set aside" in line for line in lines)
    assert any(line.split() == ["words", "10", "21", "38", "100"] for line in lines)
    table = lines[lines.index("") + 1 :]
    assert len({len(line) for line in table}) == 1  # aligned


def test_shards_by_others_are_indexed_first(tmp_path):
    encoded = io.BytesIO()
    Image.new("L", (30, 20)).save(encoded, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("k.png")
        info.size = len(encoded.getvalue())
        archive.addfile(info, io.BytesIO(encoded.getvalue()))
    command = [sys.executable, "-m", "shardify.cli", "info", str(tmp_path / "x.tar"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "indexing 1 shard" in result.stderr
    found = json.loads(result.stdout)
    assert found["formats"] == {"png": 1}
    assert found["records_in"] is None
    assert found["sources"] == {"x.tar": 1}


@pytest.mark.parametrize(
    ("argument", "status", "words"),
    [
        ("{}/nowhere", 1, "no such"),
        ("", 2, "pattern"),
        ("{}/{{000..004}}.tar", 1, "missing"),
        ("{}/{{0", 2, "brace"),
    ],
)
def test_bad_input_is_one_clear_message(shards, argument, status, words):
    command = [sys.executable, "-m", "shardify.cli", "info", argument.format(shards)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == status
    assert words in result.stderr
    assert "Traceback" not in result.stderr
