"""`shardify pack` as its users meet it: the real command line over real files."""

import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
import webdataset
import xxhash
from PIL import Image

from shardify import convert
from shardify import run as run_module
from shardify.convert import PackOptions, pack_dataset
from shardify.errors import PackError, ShardifyError, SourceError, UsageError
from shardify.format.index import read_index
from shardify.format.manifest import read_manifest
from shardify.format.sidecar import SetAside, ShardInfo, read_shard_info, read_sidecar, write_sidecar
from shardify.outputs import local as outputs_local
from shardify.outputs.local import LocalOutput
from shardify.run import allowed_bad


def jpeg(seed, size=(40, 30), format_="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_)
    return buffer.getvalue()


IMAGES = {f"{number % 3}/{number}.jpg": jpeg(number) for number in range(24)}


def record(number, image=None, **fields):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"word {number} é"}]
    return {
        "id": f"id.{number}/x",
        **({} if image is None else {"image": image}),
        "conversations": turns,
        **fields,
    }


GOOD = [record(number, image) for number, image in enumerate(IMAGES)]


def write_records(path, records):
    """Records that are bytes are written as they are."""
    parts = [
        item if isinstance(item, bytes) else json.dumps(item, ensure_ascii=False).encode() for item in records
    ]
    path.write_bytes(b"[" + b",\n".join(parts) + b"]")
    return path


def write_lines(path, records):
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return path


def write_folder(path, images=IMAGES):
    for name, data in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_zip(path, images=IMAGES, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in images.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def source(tmp_path):
    """A folder with records and images, and options that pack them in this process."""
    write_records(tmp_path / "chat.json", GOOD)
    write_folder(tmp_path / "images")
    return tmp_path


def options(folder, **changes):
    given = {
        "records": [folder / "chat.json"],
        "images": [folder / "images"],
        "out": folder / "out",
        "shards": 4,
        "workers": 1,
    }
    return PackOptions(**{**given, **changes})


def run(*arguments, env=None):
    """The real command in a process of its own: exit status, standard output, standard error."""
    command = [sys.executable, "-m", "shardify.cli", "pack", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **(env or {})}, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def tree(folder):
    """Every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if not path.is_dir()
    }


def read_back(folder):
    """Key -> fields of all samples, by webdataset."""
    tars = sorted(map(str, Path(folder).glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    return {
        sample.pop("__key__"): {k: v for k, v in sample.items() if not k.startswith("__")}
        for sample in samples
    }


def check_consistent(folder, out):
    """Index, sidecars, manifest and tars say the same."""
    manifest = read_manifest(out / "manifest.json")
    index = read_index(out / "index.npy", samples=manifest.counts.packed)
    assert manifest.index_xxh3_128 == xxhash.xxh3_128_hexdigest((out / "index.npy").read_bytes())
    assert manifest.counts.records_in == manifest.counts.packed + sum(manifest.counts.set_aside.values())
    row = 0
    for number, shard in enumerate(manifest.shards):
        tar = (out / shard.tar).read_bytes()
        assert shard.bytes == len(tar)
        assert shard.tar_xxh3_128 == xxhash.xxh3_128_hexdigest(tar)
        assert shard.sidecar_xxh3_128 == xxhash.xxh3_128_hexdigest((out / shard.sidecar).read_bytes())
        samples = read_sidecar(out / shard.sidecar).to_pylist()
        assert len(samples) == shard.samples
        for sample in samples:
            entry = index[row]
            assert (entry["shard"], entry["offset"], entry["size"]) == (
                number,
                sample["offset"],
                sample["size"],
            )
            assert (entry["words"], entry["images"]) == (sample["words"], len(sample["images"]))
            for member in sample["members"]:
                data = tar[member["offset"] : member["offset"] + member["size"]]
                assert member["xxh3_64"] == xxhash.xxh3_64_intdigest(data)
            row += 1
    assert row == manifest.counts.packed
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_bytes().splitlines()]
    assert len(lines) == sum(manifest.counts.set_aside.values())
    for content in (
        out / "manifest.json",
        out / "quarantine.jsonl",
        *out.glob("*.parquet"),
        *out.glob("*.tar"),
    ):
        assert str(folder).encode() not in content.read_bytes()
    return manifest, lines


def test_records_and_images_come_back_byte_for_byte(source):
    status, printed, _ = run(
        source / "chat.json",
        "--images",
        source / "images",
        "--out",
        source / "out",
        "--shards",
        4,
        "--workers",
        2,
    )
    assert status == 0
    assert "24 records in = 24 packed + 0 set aside" in printed
    manifest, _ = check_consistent(source, source / "out")
    assert [shard.tar for shard in manifest.shards] == ["000.tar", "001.tar", "002.tar", "003.tar"]
    assert sorted(os.listdir(source / "out")) == sorted(
        [f"00{n}.{e}" for n in range(4) for e in ("tar", "parquet")]
        + ["index.npy", "manifest.json", "quarantine.jsonl"]
    )
    samples = read_back(source / "out")
    assert sorted(samples) == [f"{position:09d}" for position in range(24)]
    content = (source / "chat.json").read_bytes()
    for sample in samples.values():
        original = json.loads(sample["json"])
        assert sample["json"] in content
        assert sample["jpg"] == IMAGES[original["image"]]
    assert [json.loads(sample["json"])["id"] for sample in samples.values()] != [item["id"] for item in GOOD]


def test_members_are_as_the_format_says(source):
    records = [
        record(0, ["0/0.jpg", "1/1.jpg"]),
        record(1),
        record(2, ["2/2.jpg"]),
        record(3, "0/3.jpg", score=1.0),
    ]
    write_records(source / "chat.json", records)
    pack_dataset(options(source, shards=1, shuffle=False))
    with tarfile.open(source / "out" / "000.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == [
        "000000000.0.jpg", "000000000.1.jpg", "000000000.json", "000000001.json", "000000002.0.jpg", "000000002.json",
        "000000003.jpg", "000000003.json",
    ]  # fmt: skip
    assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o644)}
    rows = read_sidecar(source / "out" / "000.parquet").to_pylist()
    assert [row["id"] for row in rows] == [f'"id.{n}/x"' for n in range(4)]
    assert [row["record"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["images"][1] == {"field": "1.jpg", "format": "jpg", "width": 40, "height": 30}
    assert rows[0]["turns"] == 2
    assert rows[0]["words"] == 5
    assert rows[0]["source"] == "chat.json"


def test_the_output_does_not_depend_on_the_workers(source):
    for workers in (1, 2, 4):
        pack_dataset(options(source, shards=8, workers=workers, out=source / f"out{workers}"))
    assert tree(source / "out1") == tree(source / "out2") == tree(source / "out4")


def test_a_folder_and_zips_give_the_same_shards(source):
    write_zip(source / "stored.zip")
    write_zip(source / "deflated.zip", method=zipfile.ZIP_DEFLATED)
    for name in ("images", "stored.zip", "deflated.zip"):
        pack_dataset(options(source, images=[source / name], out=source / f"out-{name}"))
    tars = [
        {k: v for k, v in tree(source / f"out-{n}").items() if k.endswith(".tar")}
        for n in ("images", "stored.zip", "deflated.zip")
    ]
    assert tars[0] == tars[1] == tars[2]


def test_images_are_taken_from_the_first_place_that_has_them(source):
    other = jpeg(99)
    write_zip(source / "first.zip", {"0/0.jpg": other})
    pack_dataset(options(source, images=[source / "first.zip", source / "images"], shuffle=False))
    assert read_back(source / "out")["000000000"]["jpg"] == other
    assert read_back(source / "out")["000000001"]["jpg"] == IMAGES["1/1.jpg"]


def test_every_reason_and_note(source):
    (source / "images" / "cut.jpg").write_bytes(IMAGES["0/0.jpg"][:500])
    (source / "images" / "empty.jpg").write_bytes(b"")
    (source / "images" / "page.jpg").write_bytes(b"<html>404</html>")
    (source / "images" / "lie.jpg").write_bytes(jpeg(1, format_="PNG"))
    write_zip(source / "bad.zip", {"zipped.jpg": jpeg(5)}, zipfile.ZIP_DEFLATED)
    damaged = bytearray((source / "bad.zip").read_bytes())
    damaged[100] ^= 0xFF
    (source / "bad.zip").write_bytes(damaged)
    bad = [
        (b"nonsense", "record-not-json"),
        (b"[1, 2]", "record-not-object"),
        ({"id": 5}, "no-conversations"),
        (record(6, conversations=[{"from": "gpt"}]), "bad-turn"),
        (record(7, 3), "image-not-a-path"),
        (record(8, "../chat.json"), "image-path-unsafe"),
        (record(9, "/etc/passwd"), "image-path-unsafe"),
        (record(10, "none.jpg"), "image-missing"),
        (record(11, ["0/0.jpg", "cut.jpg"]), "image-truncated"),
        (record(12, "empty.jpg"), "image-empty"),
        (record(13, "page.jpg"), "image-unrecognised"),
        (record(14, "zipped.jpg"), "image-damaged"),
        (record(15, ["cut.jpg", "none.jpg"]), "image-missing"),
        (b'{"image": "\\ud800.jpg", "conversations": [{"from": "a", "value": "b"}]}', "image-missing"),
    ]
    kept = [
        record(0, "lie.jpg"),
        record(0, "0/0.jpg"),
        {"conversations": GOOD[0]["conversations"]},
        b'{"id": 0, "score": NaN, "conversations": [{"from": "human", "value": "hi"}]}',
    ]
    mixed = [item for item, _ in bad] + kept
    random.Random(0).shuffle(mixed)
    write_records(source / "chat.json", mixed)
    for workers in (1, 3):
        pack_dataset(
            options(
                source,
                images=[source / "images", source / "bad.zip"],
                shards=3,
                max_bad="100%",
                workers=workers,
                out=source / f"out{workers}",
            )
        )
    assert tree(source / "out1") == tree(source / "out3")
    manifest, lines = check_consistent(source, source / "out1")
    assert manifest.counts.packed == len(kept)
    assert manifest.counts.notes == {
        "id-has-dot": 2,
        "id-has-slash": 2,
        "id-missing": 1,
        "id-not-text": 1,
        "id-repeated": 1,
        "image-extension-differs": 1,
        "image-token-without-image": 1,
        "last-turn-not-answer": 1,
        "record-tolerant": 1,
        "text-only": 2,
    }
    assert [line["record"] for line in lines] == sorted(line["record"] for line in lines)
    reasons = {json.dumps(item) if isinstance(item, dict) else item.decode(): code for item, code in bad}
    for line in lines:
        item = mixed[line["record"]]
        assert line["code"] == reasons[json.dumps(item) if isinstance(item, dict) else item.decode()]
        assert set(line) == {"record", "source", "id", "code", "detail", "image"}
    by_id = {line["id"]: line for line in lines if line["id"]}
    assert by_id["5"]["code"] == "no-conversations"
    content = (source / "chat.json").read_bytes()
    (broken,) = (line["detail"] for line in lines if line["code"] == "record-not-json")
    assert broken.endswith(f"; 8 bytes, from byte {content.index(b'nonsense')} of the file")
    assert by_id['"id.11/x"']["image"] == "cut.jpg"
    assert by_id['"id.15/x"']["image"] == "none.jpg"
    infos = [read_shard_info(path) for path in sorted((source / "out1").glob("*.parquet"))]
    assert sum(len(info.tolerant) for info in infos) == 1
    keys = list(read_back(source / "out1"))
    assert len(keys) == len(kept)
    assert all(int(key) < len(mixed) for key in keys)  # gaps, never renumbered


def test_several_record_files_keep_their_own_numbers(source):
    (source / "a").mkdir()
    (source / "b").mkdir()
    (source / "a" / "x.jsonl").write_bytes(b"\n".join(json.dumps(item).encode() for item in GOOD[:6]))
    write_records(source / "b" / "x.json", [*GOOD[6:9], b"nonsense"])
    files = [source / "a" / "x.jsonl", source / "b" / "x.json"]
    pack_dataset(options(source, records=files, max_bad="1", shards=2))
    manifest, lines = check_consistent(source, source / "out")
    assert [(item.name, item.records) for item in manifest.sources] == [
        ("a/x.jsonl", 6),
        ("b/x.json", 4),
        ("images", None),
    ]
    assert [(line["source"], line["record"]) for line in lines] == [("b/x.json", 3)]
    rows = [row for path in (source / "out").glob("*.parquet") for row in read_sidecar(path).to_pylist()]
    assert sorted((row["source"], row["record"]) for row in rows) == [
        *(("a/x.jsonl", number) for number in range(6)),
        *(("b/x.json", number) for number in range(3)),
    ]


def test_shards_as_asked(source):
    pack_dataset(options(source, shards=None, samples_per_shard=5, out=source / "a"))
    assert [shard.samples for shard in read_manifest(source / "a" / "manifest.json").shards] == [
        5,
        5,
        5,
        5,
        4,
    ]
    pack_dataset(options(source, shards=None, shard_size="12kB", multiple_of=4, out=source / "b"))
    assert len(read_manifest(source / "b" / "manifest.json").shards) % 4 == 0
    pack_dataset(options(source, shards=None, out=source / "c"))
    assert len(read_manifest(source / "c" / "manifest.json").shards) == 1


def test_a_finished_set_is_left_alone_and_other_settings_are_refused(source):
    arguments = [source / "chat.json", "--images", source / "images", "--out", source / "out", "--shards", 4]
    assert run(*arguments)[0] == 0
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (source / "out").iterdir()}
    status, printed, _ = run(*arguments, "--workers", 3, "--max-bad", "50%")
    assert (status, "is complete" in printed) == (0, True)
    for extra, message in (
        (["--seed", 1], "seed was 0, is now 1"),
        (["--no-shuffle"], "shuffle was True, is now False"),
        (["--multiple-of", 2], "multiple_of was 1, is now 2"),
    ):
        status, _, error = run(*arguments, *extra)
        assert status == 2
        assert message in error
    write_records(source / "chat.json", GOOD[:-1])
    status, _, error = run(*arguments)
    assert status == 2
    assert "records chat.json was 24 records" in error
    assert before == {
        path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (source / "out").iterdir()
    }


def interrupt_at(monkeypatch, stop):
    """Have the `stop`-th file operation that matters raise instead of happening, as if the process ended there."""
    count = 0

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*arguments, **keywords):
            nonlocal count
            count += 1
            if count == stop:
                raise Killed
            return function(*arguments, **keywords)

        return call

    for name in ("rename", "fsync", "makedirs"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(outputs_local.shutil, "rmtree", counted(outputs_local.shutil.rmtree))
    return Killed


def test_ended_between_any_two_operations_and_run_again(source, monkeypatch):
    write_records(source / "chat.json", [*GOOD, record(24, "none.jpg")])
    pack_dataset(options(source, out=source / "whole", max_bad="1"))
    expected = tree(source / "whole")
    for stop in range(1, 200):
        out = source / f"out{stop}"
        with monkeypatch.context() as patch:
            killed = interrupt_at(patch, stop)
            try:
                pack_dataset(options(source, out=out, max_bad="1"))
            except killed:
                pass
            else:
                break
        done = {
            path: (path.stat().st_ino, path.stat().st_mtime_ns)
            for sidecar in out.glob("*.parquet")
            for path in (sidecar, sidecar.with_suffix(".tar"))
        }
        pack_dataset(options(source, out=out, max_bad="1"))
        assert tree(out) == expected, stop
        assert sorted(path.name for path in out.iterdir()) == sorted(expected)
        assert done == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done}
    assert stop > 30


def stopped_after_a_shard(source, monkeypatch, **changes):
    """A run that ended when its first shard was done."""
    real = LocalOutput.put
    with monkeypatch.context() as patch:

        def stop(output, name, *arguments, **named):
            real(output, name, *arguments, **named)
            if name.endswith(".parquet"):
                raise KeyboardInterrupt

        patch.setattr(LocalOutput, "put", stop)
        with pytest.raises(KeyboardInterrupt):
            pack_dataset(options(source, **changes))
    assert [path.name for path in (source / "out").glob("*.tar")] == ["000.tar"]


@pytest.mark.parametrize("what", ["settings", "records", "image sizes", "image gone"])
def test_what_was_begun_is_not_continued_with_something_else(source, monkeypatch, what):
    stopped_after_a_shard(source, monkeypatch)
    before = tree(source / "out")
    changes = {}
    if what == "settings":
        changes = {"shards": 5}
    elif what == "records":
        write_records(source / "chat.json", [*GOOD[1:], GOOD[0]])
    elif what == "image sizes":
        (source / "images" / "0/0.jpg").write_bytes(jpeg(77, (80, 60)))
    else:
        (source / "images" / "0/0.jpg").unlink()
    with pytest.raises(UsageError, match="begun with other settings or sources") as error:
        pack_dataset(options(source, max_bad="5", **changes))
    expected = {
        "settings": "shards was 4, is now 5",
        "records": "chat.json",
        "image sizes": "bytes of all",
        "image gone": "cannot be packed",
    }
    assert expected[what] in str(error.value)
    assert tree(source / "out") == before


def test_a_final_shard_of_another_size_is_packed_again(source, monkeypatch):
    stopped_after_a_shard(source, monkeypatch)
    with open(source / "out" / "000.tar", "ab") as file:
        file.write(b"x")
    pack_dataset(options(source))
    check_consistent(source, source / "out")


def test_folders_with_other_things_in_them_are_refused(source):
    (source / "out").mkdir()
    (source / "out" / "000.tar").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"not empty \(000.tar\)"):
        pack_dataset(options(source))
    assert tree(source / "out") == {"000.tar": b"mine"}
    with pytest.raises(UsageError, match="not a folder"):
        pack_dataset(options(source, out=source / "chat.json"))


def test_a_finished_set_that_lost_a_file_says_so(source):
    pack_dataset(options(source))
    (source / "out" / "002.tar").unlink()
    with pytest.raises(ShardifyError, match=r"002.tar is missing"):
        pack_dataset(options(source))


def test_two_packs_do_not_share_a_folder(source, monkeypatch):
    monkeypatch.setattr(outputs_local, "_LOCK_PATIENCE", 0.1)
    with (
        LocalOutput(str(source / "out")).claimed(),
        pytest.raises(UsageError, match="another pack is writing there"),
    ):
        pack_dataset(options(source))
    assert not (source / "out").exists()
    pack_dataset(options(source))


def test_fail_stops_at_the_first_bad_record(source):
    write_records(source / "chat.json", [*GOOD, record(30, "none.jpg")])
    status, _, error = run(
        source / "chat.json", "--images", source / "images", "--out", source / "out", "--on-bad", "fail"
    )
    assert status == 1
    assert "record 24 of chat.json (id \"id.30/x\"), image 'none.jpg': image-missing: not in images" in error
    assert not (source / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_fail_stops_at_what_only_packing_finds(source, workers):
    (source / "images" / "0/9.jpg").write_bytes(IMAGES["0/9.jpg"][:500])
    with pytest.raises(PackError, match=r"record 9 of chat.json .*image-truncated"):
        pack_dataset(options(source, on_bad="fail", max_bad="100%", workers=workers))
    pack_dataset(options(source, max_bad="100%", workers=workers))  # continues
    assert check_consistent(source, source / "out")[0].counts.set_aside == {"image-truncated": 1}


def test_more_bad_records_than_allowed_write_nothing(source):
    write_records(source / "chat.json", [*GOOD, record(30, "none.jpg"), record(31, "nowhere.jpg"), {"id": 1}])
    arguments = [source / "chat.json", "--images", source / "images", "--out", source / "out"]
    status, _, error = run(*arguments)
    assert status == 1
    assert (
        "3 of 27 records cannot be packed, more than --max-bad 1% allows: image-missing 2, no-conversations 1"
        in error
    )
    assert "record 24 of chat.json" in error
    assert not (source / "out").exists()
    assert run(*arguments, "--max-bad", 3)[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_more_bad_records_than_allowed_found_while_packing(source, workers):
    for name in list(IMAGES)[:12]:
        (source / "images" / name).write_bytes(IMAGES[name][:500])
    with pytest.raises(
        PackError,
        match=r"(?s)records cannot be packed, more than --max-bad 10% allows: image-truncated .*remove .*out, .*"
        r"\n  record \d+ of chat.json \(id .*, image '\d/\d+.jpg': image-truncated",
    ):
        pack_dataset(options(source, max_bad="10%", workers=workers, shards=8))
    for tar in (source / "out").glob("*.tar"):
        with tarfile.open(tar) as archive:
            archive.getmembers()  # whatever has a final name is whole
    assert not (source / "out" / "manifest.json").exists()
    pack_dataset(options(source, max_bad="12", workers=workers, shards=8))
    assert check_consistent(source, source / "out")[0].counts.set_aside == {"image-truncated": 12}


@pytest.mark.parametrize(
    ("text", "allowed"), [("0", 0), ("7", 7), ("1%", 10), ("0.25%", 2), ("100 %", 1000), ("0.7%", 7)]
)
def test_limits(text, allowed):
    assert allowed_bad(text, records=1000) == allowed


@pytest.mark.parametrize("text", ["", "-1", "many", "1.5", "101%", "%"])
def test_what_is_no_limit(text):
    with pytest.raises(UsageError, match="--max-bad"):
        allowed_bad(text, records=10)


def test_bad_input_is_one_clear_message(source):
    chat, images, out = source / "chat.json", source / "images", source / "out"
    (source / "broken.json").write_bytes(b'[{"id": 1}\n{"id": 2}]')
    (source / "coco.json").write_bytes(b'{"images": [], "annotations": []}')
    (source / "empty.json").write_bytes(b"[]")
    write_records(source / "bare.json", [{"id": 1, "image": "0/0.jpg"}])
    (source / "elsewhere").mkdir()
    for arguments, expected, message in (
        ([source / "none.json", "--images", images], 1, "none.json: no such file"),
        ([source / "broken.json", "--images", images], 1, "a comma is missing before byte 11"),
        (
            [source / "coco.json", "--images", images],
            1,
            "not an array: the top level is an object with the fields 'images'",
        ),
        ([source / "empty.json", "--images", images], 1, "no records"),
        ([source / "bare.json", "--images", images], 1, "no field 'conversations'"),
        ([chat, "--images", source / "nowhere"], 1, "nowhere: no images there"),
        (
            [chat, "--images", source / "elsewhere"],
            1,
            f"Searched: folder {source / 'elsewhere'}. First looked for: 0/0.jpg, 1/1.jpg",
        ),
        ([chat], 1, "No --images was given"),
        ([chat, chat, "--images", images], 2, "given twice"),
        ([chat, "--images", images, "--shards", 3, "--samples-per-shard", 2], 2, "say the same thing"),
        ([chat, "--images", images, "--shards", 25], 2, "25 shards are more than the 24 records"),
        ([chat, "--images", images, "--multiple-of", 32], 2, "32 shards (1 rounded up to a multiple)"),
        ([chat, "--images", images, "--shard-size", "huge"], 2, "'huge' is no size"),
        ([chat, "--images", images, "--max-bad", "some"], 2, "--max-bad some"),
        ([chat, "--images", images, "--workers", 0], 2, "--workers"),
    ):
        status, _, error = run(*arguments, "--out", out)
        assert (status, message in error) == (expected, True), (status, error)
        assert not out.exists()


def test_a_place_that_cannot_be_written_to_is_one_clear_message(source):
    status, _, error = run(source / "chat.json", "--images", source / "images", "--out", "/proc/shards")
    assert status == 2
    assert "cannot be written" in error


def test_a_summary_that_nobody_can_read_spoils_nothing(source):
    command = [sys.executable, "-m", "shardify.cli", "pack", source / "chat.json"]
    command += ["--images", source / "images", "--out", source / "out"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert b"out is complete, but its summary cannot be printed" in done.stderr
    assert (source / "out" / "manifest.json").exists()
    assert not (source / "out" / ".packing").exists()


def test_a_file_that_claims_terabytes_is_one_bad_record(source):
    with open(source / "images" / "huge.jpg", "wb") as file:
        file.truncate(2**40)
    write_records(source / "chat.json", [*GOOD, record(99, "huge.jpg")])
    status, out, error = run(
        source / "chat.json", "--images", source / "images", "--out", source / "out", "--max-bad", 1
    )
    assert status == 0, error
    assert f"{len(GOOD) + 1} records in = {len(GOOD)} packed + 1 set aside (image-too-large 1" in out


def test_a_record_file_replaced_while_packing_ends_the_run(source, monkeypatch):
    other = write_records(source / "other.json", GOOD[::-1])
    plan = convert.make_plan

    def replacing(*arguments, **named):
        os.replace(other, source / "chat.json")
        return plan(*arguments, **named)

    monkeypatch.setattr(convert, "make_plan", replacing)
    with pytest.raises(SourceError, match=r"chat\.json: has changed since packing began"):
        pack_dataset(options(source))
    assert not (source / "out" / "manifest.json").exists()
    assert not list((source / "out").glob("*.parquet"))


def test_a_record_file_replaced_at_the_very_end_does_not_get_a_manifest(source, monkeypatch):
    other = write_records(source / "other.json", GOOD[::-1])
    make_shards = run_module._make_shards

    def replacing(*arguments):
        make_shards(*arguments)
        os.replace(other, source / "chat.json")

    monkeypatch.setattr(run_module, "_make_shards", replacing)
    with pytest.raises(SourceError, match="has changed since packing began"):
        pack_dataset(options(source))
    assert not (source / "out" / "manifest.json").exists()


def test_records_that_an_open_quote_swallowed_are_not_lost_uncounted(source):
    broken = [b'{"id": 1, "conversations": [{"from": "human", "value": "open]}', *GOOD[:6]]
    closing = b'{"id": 2, "conversations": [{"from": "human", "value": closed"}]}'
    path = write_records(source / "chat.json", [*GOOD, *broken, closing, *GOOD])
    status, _, error = run(path, "--images", source / "images", "--out", source / "out", "--max-bad", "100%")
    assert status == 1
    assert f"byte {path.read_bytes().index(broken[0])}: this record, " in error
    assert "holds whole records: a text or bracket in it is not closed" in error
    assert not (source / "out").exists() or not list((source / "out").glob("*.tar"))


@pytest.mark.parametrize(
    ("name", "around"), [("chat.json", (b"[", b",", b"]")), ("chat.jsonl", (b"", b"\n", b""))]
)
def test_records_inside_of_a_broken_one_are_told_from_its_own_parts(source, name, around):
    good = [json.dumps({"source": "s", **record(n)}).encode() for n in range(4)]
    begin, comma, end = around
    own = b'{"id": oops, "parts": [{"image": "a", "id": 1}, {"image": "b", "id": 2}]}'
    path = source / name
    path.write_bytes(begin + comma.join([*good, own]) + end)
    pack_dataset(options(source, records=[path], shards=1, max_bad="1"))
    assert read_manifest(source / "out" / "manifest.json").counts.set_aside == {"record-not-json": 1}

    broken = b'{"source": "s, "conversations": []}, ' + b", ".join(good) + b', {"source": "s, "id": 2}'
    path.write_bytes(begin + comma.join([*good, broken]) + end)
    with pytest.raises(SourceError, match=f"byte {path.read_bytes().index(broken)}: .* holds whole records"):
        pack_dataset(options(source, records=[path], out=source / "other", max_bad="100%"))


def test_ids_that_are_spelled_differently_are_the_same(source):
    records = [b'{"id": %b, "conversations": [{"from": "human", "value": "a"}]}' % id_ for id_ in (
        '"é"'.encode(), b'"\\u00e9"', b'"\\u00E9"', b'"\\ud800"', b'"e"', b"1", b'"1"'
    )]  # fmt: skip
    write_records(source / "chat.json", records)
    pack_dataset(options(source, images=[], shards=1))
    notes = read_manifest(source / "out" / "manifest.json").counts.notes
    assert notes["id-repeated"] == 2
    assert notes["record-tolerant"] == 1
    assert notes["id-not-text"] == 1


def test_a_sample_that_no_index_row_can_say_is_set_aside_unread(source):
    for number in range(5):
        with open(source / "images" / f"big{number}.jpg", "wb") as file:
            file.truncate(2**30)
    write_records(source / "chat.json", [*GOOD, record(99, [f"big{number}.jpg" for number in range(5)])])
    pack_dataset(options(source, shards=None, max_bad="1"))
    assert read_manifest(source / "out" / "manifest.json").counts.set_aside == {"sample-too-large": 1}


def limited(which, most):
    """For a process of its own: a limit that the system keeps."""
    return lambda: resource.setrlimit(which, (most, most))


def test_more_record_files_than_may_be_open(source):
    files = [source / f"{number}.jsonl" for number in range(200)]
    for number, path in enumerate(files):
        write_lines(path, [record(number), record(1000 + number)])
    command = [
        sys.executable,
        "-m",
        "shardify.cli",
        "pack",
        *files,
        "--out",
        source / "out",
        "--workers",
        "1",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited(resource.RLIMIT_NOFILE, 120),
    )
    assert done.returncode == 0, done.stderr
    assert "400 records in = 400 packed" in done.stdout


def test_a_full_place_is_one_clear_message_and_continued(source):
    command = [sys.executable, "-m", "shardify.cli", "pack", source / "chat.json", "--workers", "1"]
    command += ["--images", source / "images", "--out", source / "out"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limited(resource.RLIMIT_FSIZE, 10_000),
    )
    assert done.returncode == 1
    assert re.search(r"error: shard 000\.tar: .*: File too large", done.stderr)
    assert "Traceback" not in done.stderr
    assert os.listdir(source / "out") == [".packing"]
    assert run(*command[4:])[0] == 0
    check_consistent(source, source / "out")


def test_a_name_that_cannot_be_printed_spoils_nothing(source):
    out = os.fsencode(source / "é") + b"\xff"
    command = [
        sys.executable,
        "-m",
        "shardify.cli",
        "pack",
        source / "chat.json",
        "--images",
        source / "images",
    ]
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [*command, "--out", out],
            capture_output=True,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
        assert (done.returncode, done.stderr.count(b"Traceback")) == (0, 0)
        assert b"\\udcff: " in done.stdout
        assert not os.path.exists(out + b"/.packing")


def test_names_that_are_images_are_cut_where_they_are_told(source):
    """Some sets put the image itself, as base64, where its path belongs."""
    uri = "data:image/jpeg;base64," + "A" * 100_000
    records = [*(record(n, uri) for n in range(29)), record(0, "none.jpg", id=uri)]
    write_records(source / "chat.json", [*GOOD, *records])
    pack_dataset(options(source, max_bad="100%"))
    lines = (source / "out" / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == 30
    assert all(len(line) < 1000 for line in lines)
    assert msgspec.json.decode(lines[0])["code"] == "image-not-a-path"
    assert "characters)" in msgspec.json.decode(lines[-1])["id"]


def test_a_sidecar_of_a_hundred_thousand_refusals_can_be_read(tmp_path):
    refused = SetAside(1, "chat.json", '"1"', "image-missing", "not in images", "x" * 1500)
    info = ShardInfo(bytes=1, xxh3_128="", set_aside=[refused] * 100_000)
    write_sidecar(tmp_path / "0.parquet", [], info)
    assert len(read_shard_info(tmp_path / "0.parquet").set_aside) == 100_000
    assert read_sidecar(tmp_path / "0.parquet").num_rows == 0


def test_an_archive_that_nothing_can_be_read_from_is_no_success(source):
    archive = write_zip(source / "i.zip", method=zipfile.ZIP_BZIP2)
    status, _, error = run(
        source / "chat.json", "--images", archive, "--out", source / "out", "--max-bad", "100%"
    )
    assert status == 1
    assert "no record can be packed: image-unreadable" in error


def test_when_all_fail_only_while_packing_it_is_no_success(source):
    for path in (source / "images").rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    status, _, error = run(
        source / "chat.json", "--images", source / "images", "--out", source / "out", "--max-bad", "100%"
    )
    assert status == 1
    assert "no record could be packed: image-truncated" in error
    assert not (source / "out" / "manifest.json").exists()


@pytest.mark.parametrize("has_writer", [False, True])
def test_a_pipe_is_no_record_file(source, has_writer):
    os.mkfifo(source / "pipe")
    writer = os.open(source / "pipe", os.O_RDWR if has_writer else os.O_RDONLY | os.O_NONBLOCK)
    status, _, error = run(source / "pipe", "--images", source / "images", "--out", source / "out")
    os.close(writer)
    assert status == 1
    assert "a pipe or device; a file is needed" in error


def test_a_folder_with_a_dot_gives_no_name_an_extension(source):
    write_folder(source / "images", {"x.y/abc": jpeg(1)})
    write_records(source / "chat.json", [record(0, "x.y/abc"), record(1, "x.y\\abc")])
    pack_dataset(options(source, shards=1))
    notes = read_manifest(source / "out" / "manifest.json").counts.notes
    assert "image-extension-differs" not in notes
    assert notes.keys() == {"id-has-dot", "id-has-slash", "image-repeated"}


def test_an_id_of_null_is_none(source):
    write_records(source / "chat.json", [record(0, id=None), record(1, id=None)])
    pack_dataset(options(source, shards=1))
    assert read_manifest(source / "out" / "manifest.json").counts.notes["id-missing"] == 2


def long_pack(source):
    """A command that packs for about a second."""
    write_folder(source / "images", {f"{n}.jpg": jpeg(n, (900, 700)) for n in range(8)})
    write_records(source / "chat.json", [record(n, f"{n % 8}.jpg") for n in range(600)])
    command = [
        sys.executable,
        "-m",
        "shardify.cli",
        "pack",
        source / "chat.json",
        "--images",
        source / "images",
    ]
    return [str(part) for part in (*command, "--out", source / "out", "--shards", 60, "--workers", 2)]


def test_an_interrupt_is_said_and_continued(source):
    command = long_pack(source)
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    wait_for(lambda: list((source / "out").glob("*.parquet")))
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error.decode().split("\n")[-4:] == [
        "finished shards stay; the same command again continues",
        "",
        "shardify: interrupted",
        "",
    ]
    assert run(*command[4:])[0] == 0
    assert not (source / "out" / ".packing").exists()
    check_consistent(source, source / "out")


def test_a_killed_worker_names_its_shard(source):
    command = long_pack(source)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(lambda: list((source / "out").glob("*.parquet")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert ".tar was ended by SIGKILL" in error.decode()
    assert "Traceback" not in error.decode()


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_workers_die_with_their_parent(source):
    command = long_pack(source)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: list((source / "out").glob("*.parquet")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.kill()
    process.wait()

    def gone(child):
        try:
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_for(lambda: all(gone(child) for child in children))
    pack_dataset(options(source, shards=60))
    check_consistent(source, source / "out")


def test_real_records_all_pack_and_read_back(real_data, tmp_path):
    path = real_data / "real_mix.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    pack_dataset(PackOptions(records=[path], images=[real_data], out=tmp_path / "out", shards=8, workers=2))
    manifest, _ = check_consistent(tmp_path, tmp_path / "out")
    assert (manifest.counts.records_in, manifest.counts.packed) == (748, 748)
    records = [bytes(raw) for raw in msgspec.json.decode(path.read_bytes(), type=list[msgspec.Raw])]
    samples = read_back(tmp_path / "out")
    assert list(samples) == [f"{position:09d}" for position in range(748)]
    assert sorted(sample["json"] for sample in samples.values()) == sorted(records)
    rows = {
        row["key"]: row
        for tar in (tmp_path / "out").glob("*.parquet")
        for row in read_sidecar(tar).to_pylist()
    }
    for key, sample in samples.items():
        assert sample["json"] == records[rows[key]["record"]]
        image = json.loads(sample["json"]).get("image")
        fields = [field for field in sample if field != "json"]
        assert len(fields) == bool(image)
        if image:
            assert (
                hashlib.sha256(sample[fields[0]]).digest()
                == hashlib.sha256((real_data / image).read_bytes()).digest()
            )


def test_the_demo_set_packs_and_reads_back(tmp_path, capsys):
    pytest.importorskip("skimage")
    from shardify.demo import make_demo

    make_demo(tmp_path / "demo", samples=512)
    images = zipfile.ZipFile(tmp_path / "demo" / "images.zip")
    path = tmp_path / "demo" / "chat.json"
    pack_dataset(
        PackOptions(records=[path], images=[tmp_path / "demo" / "images.zip"], out=tmp_path / "out", shards=8)
    )
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert capsys.readouterr().out.splitlines()[-2] in readme  # what the README shows is what is printed
    manifest, _ = check_consistent(tmp_path, tmp_path / "out")
    assert (manifest.counts.records_in, manifest.counts.packed) == (512, 508)
    records = [bytes(raw) for raw in msgspec.json.decode(path.read_bytes(), type=list[msgspec.Raw])]
    samples = read_back(tmp_path / "out")
    rows = [
        row for tar in sorted((tmp_path / "out").glob("*.parquet")) for row in read_sidecar(tar).to_pylist()
    ]
    assert list(samples) == [row["key"] for row in rows]
    for row, sample in zip(rows, samples.values(), strict=True):
        assert sample.pop("json") == records[row["record"]]
        named = json.loads(records[row["record"]]).get("image", [])
        named = [named] if isinstance(named, str) else named
        assert [sample[field] for field in sorted(sample)] == [images.read(name) for name in named]
    kinds = [len(json.loads(record).get("image", [])) for record in records]
    assert 0 in kinds  # text-only ones are among them
