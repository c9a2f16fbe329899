"""Verify: silent on what is sound, and names the right place for any damage, without ever failing itself."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shardify import verify as verify_module
from shardify.convert import PackOptions, pack_dataset
from shardify.errors import FormatError, UsageError
from shardify.format.hashing import hash_file
from shardify.format.index import index_rows, write_index
from shardify.format.manifest import encode_manifest, read_manifest
from shardify.format.sidecar import ImageInfo, Member, SampleRow, read_shard_info, read_sidecar, write_sidecar
from shardify.indexing import index_shards
from shardify.verify import verify_shards

SHARDS = 3


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A small set as `shardify pack` makes it: images, lists of images, text-only, tolerant JSON, two records set aside."""
    source = tmp_path_factory.mktemp("source")
    (source / "images").mkdir()
    rng = random.Random(5)
    records = []
    for number in range(18):
        pixels = Image.frombytes("RGB", (9 + number, 8), rng.randbytes(3 * 8 * (9 + number)))
        pixels.save(source / "images" / f"{number}.png", "PNG")
        turns = [
            {"from": "human", "value": "<image>\nwhat is " + "it " * number},
            {"from": "gpt", "value": "noise"},
        ]
        record = {"id": number, "image": f"{number}.png", "conversations": turns}
        if number % 6 == 1:
            del record["image"]
        if number % 6 == 2:
            record["image"] = [f"{number}.png", f"{number - 1}.png"]
        if number == 4:
            record["id"] = float("nan")
        if number in (7, 9):
            record["image"] = "nowhere.png"
        records.append(record)
    (source / "chat.json").write_text(json.dumps(records))
    out = source / "data"
    options = {"shards": SHARDS, "max_bad": "50%", "workers": 1}
    pack_dataset(PackOptions(records=[source / "chat.json"], images=[source / "images"], out=out, **options))
    return out


@pytest.fixture
def data(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "data"))


@pytest.fixture
def foreign(tmp_path):
    """Tars by somebody else, indexed once."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in "abc":
        with tarfile.open(folder / f"{shard}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            for number in range(5):
                for name, content in (
                    (f"{shard}{'n' * 110}{number}.txt", b"text" * 200),
                    (f"{shard}{'n' * 110}{number}.cls", b"7"),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    index_shards(folder, say=lambda _: None)
    return folder


@pytest.fixture
def check(capsys):
    """Verify, and return the lines it prints for differences; the summary must agree with them."""

    def run(shards):
        capsys.readouterr()
        sound = verify_shards(shards, workers=2)
        *lines, summary = capsys.readouterr().out.splitlines()
        assert sound == (not lines)
        assert ("all is as recorded" in summary) == sound
        return lines

    return run


def damage(path, rng):
    """Change a file's bytes at a random place, surely to something else."""
    before = path.read_bytes()
    content = bytearray(before)
    while bytes(content) == before:
        at = rng.randrange(len(content))
        kind = rng.randrange(6)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at : at + rng.randint(1, 2000)]
        elif kind == 3:
            content[at:at] = rng.randbytes(rng.randint(1, 2000))
        elif kind == 4:
            content[at : at + 512] = rng.randbytes(512)
        else:
            content[at - at % 512 : at - at % 512 + 512] = bytes(512)
    path.write_bytes(content)


def test_a_sound_set_has_no_differences(data, check):
    assert check(data) == []
    assert check(f"{data}/{{000..999}}.tar") == []
    assert check([data / "001.tar"]) == []
    shutil.copytree(data, data.parent / "again")
    assert check([data, data.parent / "again"]) == []


def test_sets_without_a_manifest_are_checked_by_their_sidecars(data, foreign, check):
    (data / "manifest.json").unlink()
    assert check(data) == []
    assert check(foreign) == []
    for sidecar in foreign.glob("*.parquet"):
        sidecar.unlink()
    assert check(foreign) == []
    assert not list(foreign.glob("*.parquet"))  # looking changes nothing


@pytest.mark.long
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_any_damage_to_a_shard_is_noticed_and_named(data, check, seed):
    rng = random.Random(seed)
    name = f"{rng.randrange(SHARDS):03d}.tar"
    sound = (data / name).read_bytes()
    damage(data / name, rng)
    lines = check(data)
    (data / name).write_bytes(sound)
    assert lines
    assert all(line.startswith(f"{data}/{name}: ") for line in lines)


@pytest.mark.long
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_any_damage_to_shards_of_others_is_noticed_and_named(foreign, check, seed):
    rng = random.Random(seed)
    name = f"{rng.choice('abc')}.tar"
    sound = (foreign / name).read_bytes()
    damage(foreign / name, rng)
    lines = check(foreign)
    (foreign / name).write_bytes(sound)
    assert lines
    assert all(line.startswith(f"{foreign}/{name}: ") for line in lines)


@pytest.mark.long
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_any_damage_to_the_other_files_is_noticed_and_named(data, check, seed):
    rng = random.Random(seed)
    name = rng.choice(["000.parquet", "001.parquet", "index.npy", "quarantine.jsonl"])
    sound = (data / name).read_bytes()
    damage(data / name, rng)
    lines = check(data)
    (data / name).write_bytes(sound)
    assert lines
    assert all(line.startswith(f"{data}/{name}: ") for line in lines)


@pytest.mark.long
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_no_damage_to_the_manifest_or_a_lone_sidecar_makes_it_fail(data, capsys, seed):
    rng = random.Random(seed)
    name = rng.choice(["manifest.json", "000.parquet"])
    sound, manifest = (data / name).read_bytes(), (data / "manifest.json").read_bytes()
    damage(data / name, rng)
    if name != "manifest.json":
        (data / "manifest.json").unlink()
    try:
        verify_shards(f"{data}/{{000..999}}.tar", workers=2)
    except (FormatError, UsageError) as error:  # names of shards are part of the manifest
        assert "manifest" in str(error) or "twice" in str(error) or ".tar" in str(error)
    finally:
        (data / "manifest.json").write_bytes(manifest)
        (data / name).write_bytes(sound)


def rows_of(path):
    return [
        SampleRow(
            **{
                **row,
                "members": [Member(**member) for member in row["members"]],
                "images": [ImageInfo(**image) for image in row["images"]],
            }
        )
        for row in read_sidecar(path).to_pylist()
    ]


def resign(data, change=None, **fields):
    """Bring index.npy and the manifest's hashes in line with the files, as somebody would who wants to deceive."""
    manifest = read_manifest(data / "manifest.json")
    shards, parts = [], []
    for number, shard in enumerate(manifest.shards):
        table, info = read_sidecar(data / shard.sidecar), read_shard_info(data / shard.sidecar)
        parts.append(index_rows(table, info, number))
        shards.append(
            msgspec.structs.replace(
                shard,
                samples=table.num_rows,
                bytes=(data / shard.tar).stat().st_size,
                tar_xxh3_128=hash_file(data / shard.tar),
                sidecar_xxh3_128=hash_file(data / shard.sidecar),
            )
        )
    if change:
        change(parts)
    with open(data / "index.npy", "wb") as file:
        write_index(file, parts)
    manifest = msgspec.structs.replace(
        manifest, **{"shards": shards, "index_xxh3_128": hash_file(data / "index.npy")} | fields
    )
    (data / "manifest.json").write_bytes(encode_manifest(manifest))


def edit_row(data, name, at, **changes):
    path = data / name
    rows, info = rows_of(path), read_shard_info(path)
    for field, value in changes.items():
        object.__setattr__(rows[at], field, value)
    write_sidecar(path, rows, info)
    return rows[at]


def test_one_line_names_shard_key_member_and_offset(data, check):
    row = rows_of(data / "001.parquet")[2]
    member = row.members[0]
    with open(data / "001.tar", "r+b") as file:
        file.seek(member.offset + 20)
        file.write(b"\0\1\2")
    lines = check(data)
    place = f"{data}/001.tar: key {row.key}, member {member.field}, offset {member.offset}: "
    assert [line for line in lines if line.startswith(place)] == [
        f"{place}its content is not that of its hash"
    ]
    assert len(lines) == 2  # and the hash of the whole


def test_every_sample_behind_an_insertion_is_told_but_not_without_end(data, check, monkeypatch):
    content = (data / "000.tar").read_bytes()
    (data / "000.tar").write_bytes(b"x" + content)
    rows = rows_of(data / "000.parquet")
    lines = check(data)
    assert all(any(f"key {row.key}," in line for line in lines) for row in rows)
    monkeypatch.setattr(verify_module, "MAX_LINES", 3)
    lines = check(data)
    assert len(lines) == 4
    assert "differences more" in lines[-1]


def test_headers_and_padding_count_too(data, check):
    row = rows_of(data / "000.parquet")[0]
    json_member = row.members[-1]
    with open(data / "000.tar", "r+b") as file:
        file.seek(json_member.offset + json_member.size)
        file.write(b"!")
    assert any(
        f"member json, offset {json_member.offset + json_member.size}: its padding" in line
        for line in check(data)
    )
    with open(data / "001.tar", "r+b") as file:
        file.seek(265)  # the owner's name; still a tar header by its checksum
        file.write(b"root")
        file.seek(148)
        file.write(b"%06o\0 " % (int(_field(file, 148), 8) + sum(b"root")))
    assert any("001.tar" in line and "header is not as it was written" in line for line in check(data))


def _field(file, at):
    file.seek(at)
    value = file.read(6)
    file.seek(at)
    return value


def test_missing_and_extra_files_are_named(data, check):
    (data / "001.tar").unlink()
    (data / "002.parquet").unlink()
    shutil.copy(data / "000.tar", data / "003.tar")
    shutil.copy(data / "000.parquet", data / "old.parquet")
    lines = check(data)
    for line in (
        "001.tar: missing",
        "002.parquet: missing",
        "003.tar: not in manifest",
        "old.parquet: not in manifest",
    ):
        assert any(f"{data}/{line}" in found for found in lines), line
    (data / "index.npy").unlink()
    (data / "quarantine.jsonl").unlink()
    lines = check(data)
    assert any("index.npy: no such index" in line for line in lines)


def test_a_damaged_manifest_does_not_hide_damaged_shards(data, check):
    (data / "manifest.json").write_text("{")
    with open(data / "001.tar", "r+b") as file:
        file.seek(1000)
        file.write(b"damaged")
    for shards in (data, f"{data}/{{000..999}}.tar"):
        lines = check(shards)
        assert "manifest.json" in lines[0]
        assert any("001.tar" in line for line in lines[1:])
        assert not any("000.tar" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"words": 99}, "words is"),
        ({"turns": 9}, "turns is"),
        ({"id": '"x"'}, "id is"),
        ({"images": []}, "has the images"),
        ({"images": [ImageInfo("png", "jpg", 9, 8)]}, "but its row says jpg 9 x 8"),
        ({"members": []}, "members"),
        ({"source": "other.json"}, "source 'other.json'"),
        ({"size": 512}, "outside"),
        ({"size": -1}, ""),
        ({"offset": 1 << 50}, "ends at byte"),
        ({"offset": -5}, ""),
        ({"record": 4000}, "records"),
        ({"key": "9"}, "key"),
    ],
)
def test_sidecar_rows_are_checked_against_the_tar(data, check, changes, words):
    at = next(
        at for at, row in enumerate(rows_of(data / "000.parquet")) if [i.field for i in row.images] == ["png"]
    )
    edit_row(data, "000.parquet", at, **changes)
    try:
        resign(data)
    except (FormatError, OverflowError, ValueError):
        return  # the index cannot even be built by such rows
    lines = check(data)
    assert any(words in line for line in lines)


def test_index_rows_are_checked_one_by_one(data, check):
    def swap(parts):
        parts[1]["words"][0] += 1

    resign(data, swap)
    key = rows_of(data / "001.parquet")[0].key
    first = read_sidecar(data / "000.parquet").num_rows
    assert check(data) == [f"{data}/index.npy: key {key}: row {first} is not that of sidecar and tar"]


def test_the_order_of_keys_is_checked_between_shards(data, check):
    for suffix in ("tar", "parquet"):
        (data / f"000.{suffix}").rename(data / f"x.{suffix}")
        (data / f"002.{suffix}").rename(data / f"000.{suffix}")
        (data / f"x.{suffix}").rename(data / f"002.{suffix}")
    resign(data)
    lines = check(data)
    assert any("001.tar" in line and "comes after key" in line for line in lines)


def test_the_reconciliation_is_checked(data, check):
    counts = read_manifest(data / "manifest.json").counts
    assert counts.set_aside == {"image-missing": 2}
    resign(data, counts=msgspec.structs.replace(counts, packed=counts.packed + 1))
    lines = check(data)
    assert any("2 set aside" in line for line in lines)
    assert any("packed, but its shards hold" in line for line in lines)
    resign(data, counts=msgspec.structs.replace(counts, set_aside={"image-empty": 2}))
    assert any("image-empty" in line and "image-missing" in line for line in check(data))
    resign(data, counts=msgspec.structs.replace(counts, notes={"id-missing": 1}))
    assert any("notes" in line for line in check(data))


def test_the_quarantine_is_checked(data, check):
    path = data / "quarantine.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    assert any("1 lines, but 2 records are set aside" in line for line in check(data))
    path.write_bytes(lines[1] + lines[0])
    assert len(check(data)) == 2
    path.write_bytes(lines[0].replace(b"image-missing", b"image-empty") + lines[1])
    assert any("quarantine.jsonl: line 1" in line for line in check(data))
    path.unlink()
    assert any("quarantine.jsonl: cannot be read" in line for line in check(data))


def test_a_record_packed_twice_or_lost_is_named(data, check):
    row = rows_of(data / "000.parquet")[0]
    other = rows_of(data / "002.parquet")[0]
    edit_row(data, "000.parquet", 0, record=other.record)
    resign(data)
    lines = check(data)
    assert any(f"neither packed nor set aside, such as record {row.record}" in line for line in lines)
    assert any(f"twice, such as record {other.record}" in line for line in lines)


@pytest.mark.parametrize("records", [17, 19, 10**15, 10**30, -1])
def test_sources_of_another_size_are_named(data, check, records):
    manifest = read_manifest(data / "manifest.json")
    sources = [
        msgspec.structs.replace(source, records=records) if source.kind == "records" else source
        for source in manifest.sources
    ]
    (data / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(manifest, sources=sources)))
    assert all(f"{data}/manifest.json" in line for line in check(data))
    assert check(data)


def test_a_process_that_dies_is_a_difference_of_its_shard_alone(data, check, monkeypatch):
    def dies(path):
        if str(path).endswith("001.tar"):
            os.kill(os.getpid(), signal.SIGKILL)
        return hash_file(path)

    monkeypatch.setattr(verify_module, "hash_file", dies)
    assert check(data) == [f"{data}/001.tar: cannot be checked: its process was ended with status -9"]


def test_shards_by_others_without_sidecars_are_checked_to_be_whole(foreign, check):
    for sidecar in foreign.glob("*.parquet"):
        sidecar.unlink()
    os.truncate(foreign / "b.tar", 5000)
    (line,) = check(foreign)
    assert line.startswith(f"{foreign}/b.tar: ")
    assert "byte" in line


def run_cli(*arguments):
    command = [sys.executable, "-m", "shardify.cli", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_through_the_command_line(data):
    result = run_cli(data)
    assert (result.returncode, result.stdout.count("\n")) == (0, 1)
    assert "all is as recorded" in result.stdout
    os.truncate(data / "002.tar", 700)
    result = run_cli(f"{data}/{{000..999}}.tar", "--workers", "1")
    assert result.returncode == 1
    assert "002.tar: 700 bytes" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("argument", "status", "words"),
    [
        ("nowhere", 1, "nowhere.tar"),
        ("", 2, "pattern"),
        ("{0", 2, "brace"),
        ("missing/manifest.json", 1, "no such"),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path, argument, status, words):
    result = run_cli(
        f"{tmp_path}/{argument}.tar" if argument == "nowhere" else argument and f"{tmp_path}/{argument}"
    )
    assert result.returncode == status
    assert words in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_an_index_of_the_wrong_type_is_a_difference(data, check):
    np.save(data / "index.npy", np.zeros(5))
    assert any("index.npy" in line for line in check(data))
