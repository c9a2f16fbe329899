"""What `shardify pack` can be asked beyond the plain case: policies, checks, compression, appending, reading in order, smaller pictures."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shardify import convert
from shardify import run as run_module
from shardify.convert import PackOptions, pack_dataset
from shardify.errors import PackError, UsageError
from shardify.format.index import read_index
from shardify.format.manifest import read_manifest
from shardify.format.shards import open_shards
from shardify.format.sidecar import read_sidecar
from shardify.outputs.direct import DirectFile
from shardify.verify import verify_shards


def jpeg(seed, size=(40, 30), format_="JPEG", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_, **options)
    return buffer.getvalue()


def record(number, image=None, answer="A bus.", **fields):
    turns = [
        {"from": "human", "value": "<image>\nWhat?" if image else "What?"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": f"r{number}", **({"image": image} if image else {}), "conversations": turns, **fields}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(30):
        (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(number))
    write(tmp_path / "chat.json", [record(n, f"{n}.jpg") for n in range(30)])
    return tmp_path


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def pack(source, **changes):
    given = {
        "records": [source / "chat.json"],
        "images": [source / "images"],
        "out": source / "out",
        "shards": 3,
    }
    pack_dataset(PackOptions(**{**given, "workers": 1, **changes}))
    return read_manifest(Path(changes.get("out", source / "out")) / "manifest.json")


def tree(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def quarantine(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_a_note_can_be_set_aside_or_end_the_run(source):
    write(source / "chat.json", [record(n, f"{n}.jpg", "" if n % 10 == 3 else "A bus.") for n in range(30)])
    kept = pack(source)
    assert (kept.counts.packed, kept.counts.notes) == (30, {"answer-empty": 3})
    away = pack(source, policies=["answer-empty=set-aside"], max_bad="3", out=source / "away")
    assert away.counts.set_aside == {"answer-empty": 3}
    assert away.settings["policies"] == {"answer-empty": "set-aside"}
    assert [line["record"] for line in quarantine(source / "away")] == [3, 13, 23]
    with pytest.raises(
        PackError, match=r"record 3 of chat\.json \(id \"r3\"\): answer-empty.*--policy answer-empty=fail"
    ):
        pack(source, policies=["answer-empty=fail"], out=source / "fail", shuffle=False)
    # to fail or not is no matter of the bytes: what was begun can be continued the other way
    assert pack(source, out=source / "fail", shuffle=False).counts.packed == 30


def test_only_one_reason_can_fail(source):
    write(
        source / "chat.json",
        [*(record(n, f"{n}.jpg") for n in range(30)), record(30, "none.jpg"), {"id": 31}],
    )
    assert pack(source, max_bad="2").counts.set_aside == {"image-missing": 1, "no-conversations": 1}
    with pytest.raises(PackError, match=r"record 31 .*no-conversations"):
        pack(source, max_bad="2", policies=["no-conversations=fail"], out=source / "out2")
    assert not (source / "out2").exists()


def test_a_truncated_image_can_be_kept(source):
    whole = (source / "images" / "4.jpg").read_bytes()
    (source / "images" / "4.jpg").write_bytes(whole[: len(whole) // 2])
    assert pack(source, max_bad="1").counts.set_aside == {"image-truncated": 1}
    kept = pack(source, policies=["image-truncated=keep"], out=source / "kept")
    assert (kept.counts.packed, kept.counts.notes) == (30, {"image-truncated": 1})
    assert verify_shards(str(source / "kept"), workers=1)
    small = pack(source, policies=["image-truncated=keep"], shortest_edge=16, out=source / "small")
    assert small.counts.notes == {"image-truncated": 1, "image-shrunk": 29}


def test_how_closely_images_are_looked_at(source):
    broken = bytearray(jpeg(2, format_="PNG"))
    broken[60:70] = bytes(10)  # both ends are there
    (source / "images" / "5.jpg").write_bytes(broken)
    cut = jpeg(6)
    (source / "images" / "6.jpg").write_bytes(cut[:-40])
    found = {
        check: pack(source, check=check, max_bad="100%", out=source / check).counts.set_aside
        for check in ("none", "header", "decode")
    }
    assert found["none"] == {}
    assert found["header"] == {"image-truncated": 1}
    assert found["decode"] == {"image-truncated": 1, "image-undecodable": 1}
    assert read_manifest(source / "decode" / "manifest.json").settings["check"] == "decode"


def test_compressed_shards_hold_the_same(source):
    plain = pack(source)
    packed = pack(source, compress="zstd", out=source / "zst")
    assert [shard.tar for shard in packed.shards] == ["000.tar.zst", "001.tar.zst", "002.tar.zst"]
    assert packed.counts == plain.counts
    for shard in packed.shards:
        tar = subprocess.run(
            ["zstd", "-dc", source / "zst" / shard.tar], capture_output=True, check=True
        ).stdout
        assert tar == (source / "out" / shard.tar.removesuffix(".zst")).read_bytes()
    assert verify_shards(str(source / "zst"), workers=1)
    assert len(open_shards(str(source / "zst")).index) == 30
    assert pack(source, compress="zstd", out=source / "zst2", workers=2)
    assert tree(source / "zst") == tree(source / "zst2")


def test_records_are_appended_as_new_shards(source):
    first = pack(source)
    before = tree(source / "out")
    (source / "images" / "new.jpg").write_bytes(jpeg(99))
    more = write(
        source / "more.json", [record(100 + n, "new.jpg") for n in range(7)] + [record(1, "none.jpg")]
    )
    options = {"records": [more], "append": True, "shards": 2, "max_bad": "1"}
    grown = pack(source, **options)
    after = tree(source / "out")
    assert {name: after[name] for name in before if name[0].isdigit()} == {
        name: digest for name, digest in before.items() if name[0].isdigit()
    }
    assert [shard.tar for shard in grown.shards] == [f"{n:03d}.tar" for n in range(5)]
    assert grown.shards[:3] == first.shards
    assert (grown.counts.records_in, grown.counts.packed) == (38, 37)
    assert grown.counts.set_aside == {"image-missing": 1}
    assert [append.first_shard for append in grown.appends] == [3]
    assert verify_shards(str(source / "out"), workers=1)
    opened = open_shards(str(source / "out"))
    assert len(opened.index) == 37
    keys = [
        key for n in range(5) for key in read_sidecar(source / "out" / f"{n:03d}.parquet")["key"].to_pylist()
    ]
    assert len(set(keys)) == 37
    assert keys == sorted(keys)
    assert int(keys[30]) >= 30
    # the same again changes nothing, something else is added
    stamps = {path.name: path.stat().st_mtime_ns for path in (source / "out").iterdir()}
    pack(source, **options)
    assert {path.name: path.stat().st_mtime_ns for path in (source / "out").iterdir()} == stamps
    with pytest.raises(UsageError, match=r"more\.json: its records are in the data set already"):
        pack(source, **{**options, "seed": 5})
    (source / "b").mkdir()
    other = write(
        source / "b" / "more.json", [record(200 + n, "new.jpg") for n in range(5)] + [record(1, "none.jpg")]
    )
    again = pack(source, **{**options, "records": [other]})
    assert (len(again.shards), again.counts.packed, len(again.appends)) == (7, 42, 2)
    assert [line["source"] for line in quarantine(source / "out")] == ["more.json", "b/more.json"]
    assert verify_shards(str(source / "out"), workers=1)


def test_appending_needs_something_to_append_to(source):
    with pytest.raises(UsageError, match="no finished data set to append to"):
        pack(source, append=True)
    assert not (source / "out").exists()


@pytest.mark.parametrize(
    "stop", ["index.npy", "quarantine.jsonl", "003.tar", "004.parquet", ".packing/plan.json", "manifest.json"]
)
def test_an_append_that_ended_anywhere_is_continued(source, monkeypatch, stop):
    from shardify.outputs.local import LocalDraft

    pack(source)
    more = write(source / "more.json", [record(100 + n, f"{n}.jpg") for n in range(7)] + [{"id": 7}])
    options = {"records": [more], "append": True, "shards": 2, "max_bad": "1"}
    subprocess.run(["cp", "-r", source / "out", source / "whole"], check=True)
    pack(source, **options, out=source / "whole")
    real = LocalDraft.commit
    for after in (False, True):

        def commit(draft, after=after):
            if draft._target.endswith("/" + stop):
                if after:
                    real(draft)
                raise KeyboardInterrupt
            real(draft)

        with monkeypatch.context() as patch:
            patch.setattr(LocalDraft, "commit", commit)
            with pytest.raises(KeyboardInterrupt):
                pack(source, **options)
    pack(source, **options)
    assert tree(source / "out") == tree(source / "whole")


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_reading_in_order_gives_the_same_shards(source, place):
    images = source / "images"
    (images / "9.jpg").write_bytes(b"no picture")
    shared = [record(n, f"{n % 25}.jpg") for n in range(30)]
    lists = [
        record(30, ["3.jpg", "3.jpg", "4.jpg"]),
        record(31),
        record(32, "none.jpg"),
        record(33, "./5.jpg"),
    ]
    write(source / "chat.json", shared + lists)
    if place == "zip":
        with zipfile.ZipFile(source / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(images.iterdir(), reverse=True):
                archive.write(path, f"images/{path.name}")
        images = source / "images.zip"
    plain = pack(source, images=[images], max_bad="3")
    assert plain.counts.set_aside == {"image-missing": 1, "image-unrecognised": 1}
    pack(source, images=[images], max_bad="3", read_order=True, out=source / "ordered", workers=2)
    assert tree(source / "out") == tree(source / "ordered")


def test_what_cannot_be_looked_at_is_set_aside_in_any_order(source):
    (source / "images" / "circle.jpg").symlink_to("circle.jpg")
    write(source / "chat.json", [record(9, "circle.jpg"), *(record(n, f"{n}.jpg") for n in range(6))])
    plain = pack(source, max_bad="1")
    assert plain.counts.set_aside == {"image-unreadable": 1}
    pack(source, max_bad="1", read_order=True, out=source / "ordered")
    assert tree(source / "out") == tree(source / "ordered")


def test_records_that_are_sent_along_keep_few_of_their_files_open(source, monkeypatch):
    paths = [source / f"{number}.json" for number in range(100)]
    for number, path in enumerate(paths):
        write(path, [record(number)])
    seen = []

    def run(job, _engine):
        before = len(os.listdir("/proc/self/fd"))
        real = convert.open_unchanged

        def opened(*arguments):
            seen.append(len(os.listdir("/proc/self/fd")) - before)
            return real(*arguments)

        monkeypatch.setattr(convert, "open_unchanged", opened)
        assert job.task(0).raw.count(b'"id"') == 100
        return ["planned"]

    monkeypatch.setattr(convert, "carry_out", run)
    pack_dataset(PackOptions(records=paths, out=source / "out", engine="ray"))
    assert len(seen) == 100
    assert max(seen) <= 64


def test_images_that_came_with_their_records_can_be_put_in_order(source):
    rows = [{"id": n, "image": {"bytes": jpeg(n), "path": f"{n}.jpg"}, "conversations": record(n, "x")["conversations"]}
            for n in range(20)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), source / "rows.parquet", row_group_size=7)
    sources = {"records": [source / "rows.parquet", source / "chat.json"]}
    plain = pack(source, **sources)
    assert plain.counts.packed == 50
    pack(source, **sources, read_order=True, out=source / "ordered", workers=2)
    assert tree(source / "out") == tree(source / "ordered")


def test_a_run_in_order_is_continued(source, monkeypatch):
    pack(source, out=source / "whole")
    real = run_module.finished_shard
    count = 0

    def stop(*arguments, **named):
        nonlocal count
        count += 1
        if count > 7:  # in the middle of it
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr("shardify.scatter.os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(source, read_order=True)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(source, read_order=True)
    os.unlink(source / "out" / "001.parquet")
    pack(source, read_order=True)
    assert tree(source / "out") == tree(source / "whole")


def test_larger_pictures_are_made_smaller(source):
    (source / "images" / "3.jpg").write_bytes(jpeg(3, (300, 200)))
    (source / "images" / "4.jpg").write_bytes(jpeg(4, (90, 400), "PNG"))
    small = pack(source, shortest_edge=64, quality=80)
    assert small.counts.notes == {"image-extension-differs": 1, "image-shrunk": 2}
    assert (small.settings["shortest_edge"], small.settings["quality"]) == (64, 80)
    assert "pillow" in small.settings["resized_by"]
    sizes = {}
    for shard in small.shards:
        table = read_sidecar(source / "out" / shard.sidecar)
        for id_, (image,) in zip(table["id"].to_pylist(), table["images"].to_pylist(), strict=True):
            sizes[json.loads(id_)] = image["format"], image["width"], image["height"]
    assert sizes["r3"] == ("jpg", 96, 64)
    assert sizes["r4"] == ("png", 64, 284)
    assert sizes["r5"] == ("jpg", 40, 30)
    assert verify_shards(str(source / "out"), workers=1)


@pytest.mark.parametrize("place", ["folder", "zip"])
@pytest.mark.parametrize("edge", [None, 30])
def test_images_of_one_record_lie_in_their_order_whatever_their_sizes(source, monkeypatch, place, edge):
    """Those that fit are read to where they are written from, others are not, and some records come to nothing in between."""
    monkeypatch.setattr("shardify.outputs.direct._BUFFER_BYTES", 64 * 1024)
    files = {f"small{n}.jpg": jpeg(n, (24, 20)) for n in range(3)}
    files["wide.jpg"] = jpeg(4, (200, 50))
    files["huge.jpg"] = jpeg(5, (24, 20)) + bytes(200_000)  # more than the buffer
    files["no.jpg"] = b"no picture"
    for name, data in files.items():
        (source / "images" / name).write_bytes(data)
    lists = [
        ["small0.jpg", "huge.jpg", "small1.jpg"],
        ["huge.jpg", "small2.jpg", "wide.jpg"],
        ["wide.jpg", "small0.jpg", "wide.jpg", "small2.jpg"],
        ["small0.jpg", "no.jpg", "small1.jpg"],
        ["small1.jpg", "small2.jpg", "small0.jpg"],
    ]
    records = [record(n, lists[n % len(lists)]) for n in range(60)]
    write(source / "chat.json", records)
    images = source / "images"
    if place == "zip":
        images = source / "images.zip"
        with zipfile.ZipFile(images, "w") as archive:
            for name, data in files.items():
                method = zipfile.ZIP_DEFLATED if name == "small1.jpg" else zipfile.ZIP_STORED
                archive.writestr(name, data, method)
    shrink = {"shortest_edge": edge} if edge else {}
    advance, placed = DirectFile.advance, []
    monkeypatch.setattr(
        DirectFile, "advance", lambda *args, **named: placed.append(1) or advance(*args, **named)
    )
    manifest = pack(source, images=[images], shards=2, shuffle=False, max_bad="50%", **shrink)
    assert bool(placed) != bool(edge)
    assert manifest.counts.packed == 48
    assert verify_shards(source / "out")
    packed = [number for number in range(60) if number % 5 != 3]
    found = {}
    for shard in sorted((source / "out").glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                found[member.name] = archive.extractfile(member).read()
    for number in packed:
        for at, name in enumerate(lists[number % 5]):
            data = found[f"{number:09d}.{at}.jpg"]
            if edge and name == "wide.jpg":
                assert Image.open(io.BytesIO(data)).size == (120, 30)
            else:
                assert data == files[name]
        assert json.loads(found[f"{number:09d}.json"])["id"] == f"r{number}"


def test_paths_are_rewritten_by_prefix(source):
    write(source / "chat.json", [record(n, f"coco/train2017/{n}.jpg") for n in range(30)])
    manifest = pack(source, prefixes=[("coco/train2017/", "")])
    assert (manifest.counts.packed, manifest.counts.notes) == (30, {"image-by-prefix": 30})
    assert manifest.settings["prefixes"] == [[["coco/train2017/", ""]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "x=keep"], "no code 'x'"),
        (["--prefix", "a"], "OLD=NEW"),
        (["--recipe", "llava-cc3m-595k"], "one or the other|needs --root"),
        (["--caption", "blip"], "belong to --recipe"),
        (["--shortest-edge", "0"], "shortest-edge"),
        (["--check", "all"], "header"),
        (["--engine", "slurm"], "local"),
        (["--ray-address", "10.0.0.1:6379"], "belongs to --engine ray"),
        (["--out", ""], "--out is empty"),
    ],
)
def test_options_that_make_no_sense_are_one_message(source, arguments, message):
    command = [
        sys.executable,
        "-m",
        "shardify.cli",
        "pack",
        str(source / "chat.json"),
        "--out",
        str(source / "o"),
    ]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, check=False, cwd=source / "images"
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    import re

    assert re.search(message, done.stderr)


def test_index_rows_of_appended_shards_follow(source):
    pack(source)
    more = write(source / "more.json", [record(100 + n, f"{n}.jpg") for n in range(7)])
    manifest = pack(source, records=[more], append=True, shards=1)
    index = read_index(source / "out" / "index.npy", samples=37)
    assert index["shard"].tolist() == sorted(index["shard"].tolist())
    assert (index["shard"] == 3).sum() == 7
    assert manifest.settings["shards"] == 3


def stopped(monkeypatch, name, run):
    """Run until the file `name` is to get its name."""
    from shardify.outputs.local import LocalDraft

    real = LocalDraft.commit

    def commit(draft):
        if draft._target.endswith("/" + name):
            raise KeyboardInterrupt
        real(draft)

    with monkeypatch.context() as patch:
        patch.setattr(LocalDraft, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.mark.parametrize("stop", ["004.tar", "manifest.json"])
def test_other_commands_leave_an_append_as_it_was_begun(source, monkeypatch, capsys, stop):
    from shardify.reshard import ReshardOptions, reshard_dataset

    def made():
        pack(source, out=source / "packed")

    def resharded():
        given = {"shards": [str(source / "packed")], "out": source / "resharded"}
        reshard_dataset(ReshardOptions(**given, samples_per_shard=10, workers=1))

    made()
    resharded()
    more = write(source / "more.json", [record(100 + n, f"{n}.jpg") for n in range(7)])
    for out, again in ((source / "resharded", resharded), (source / "packed", made)):
        options = {"records": [more], "append": True, "shards": 2, "out": out}
        stopped(monkeypatch, stop, lambda options=options: pack(source, **options))
        capsys.readouterr()
        again()
        said = capsys.readouterr().out
        assert "is complete: nothing to do" in said
        assert "adding records to it was begun" in said
        assert len(open_shards(str(out)).index) == 30  # what is finished can be loaded meanwhile
        assert pack(source, **options).counts.packed == 37
        assert not (out / ".packing").exists()
        assert verify_shards(str(out), workers=1)


def test_what_is_finished_but_was_not_tidied_up_can_be_added_to(source, monkeypatch):
    from shardify.outputs.local import LocalOutput

    def ended(_):
        raise KeyboardInterrupt

    more = [
        write(source / f"{name}.json", [record(100 * name + n, f"{n}.jpg") for n in range(7)])
        for name in (1, 2)
    ]
    for number, changes in enumerate(
        ({}, *({"records": [file], "append": True, "shards": 1} for file in more))
    ):
        with monkeypatch.context() as patch:
            patch.setattr(LocalOutput, "remove_work", ended)
            with pytest.raises(KeyboardInterrupt):
                pack(source, **changes)
        assert read_manifest(source / "out" / "manifest.json").counts.packed == 30 + 7 * number
    pack(source)
    assert not (source / "out" / ".packing").exists()
    assert verify_shards(str(source / "out"), workers=1)


def test_shards_that_are_added_are_named_and_compressed_as_those_there(source, monkeypatch):
    monkeypatch.setattr("shardify.format.names._MIN_SHARD_DIGITS", 1)
    pack(source, shards=5)
    more = write(source / "more.json", [record(100 + n, f"{n}.jpg") for n in range(9)])
    with pytest.raises(UsageError, match=r"its shards are \*tar; give no --compress"):
        pack(source, records=[more], append=True, compress="zstd")
    assert not (source / "out" / ".packing").exists()
    grown = pack(source, records=[more], append=True, shards=7)
    assert [shard.tar for shard in grown.shards] == [f"{n}.tar" for n in range(12)]
    pack(source, out=source / "zst", compress="zstd")
    with pytest.raises(UsageError, match="give --compress zstd"):
        pack(source, out=source / "zst", records=[more], append=True)


def test_a_policy_that_says_the_default_says_nothing(source, monkeypatch):
    options = {"max_bad": "1"}
    write(source / "chat.json", [*(record(n, f"{n}.jpg") for n in range(30)), record(30, "none.jpg")])
    stopped(monkeypatch, "002.tar", lambda: pack(source, **options))
    same = ["image-missing=set-aside", "text-only=keep"]
    assert "policies" not in pack(source, **options, policies=same).settings


def test_a_note_ends_the_run_in_shards_that_are_finished_already(source, monkeypatch):
    write(source / "chat.json", [record(n, f"{n}.jpg", "") for n in range(30)])
    stopped(monkeypatch, "manifest.json", lambda: pack(source))
    with pytest.raises(PackError, match=r"000\.tar.*kept 10 records with answer-empty"):
        pack(source, policies=["answer-empty=fail"])
    assert pack(source).counts.packed == 30


def test_a_reason_is_fatal_only_where_it_is_the_first(source):
    write(
        source / "chat.json",
        [*(record(n, f"{n}.jpg") for n in range(30)), record(30, "none.jpg", "")],
    )
    policies = ["answer-empty=set-aside", "image-missing=fail"]
    assert pack(source, policies=policies, max_bad="1").counts.set_aside == {"answer-empty": 1}


def test_pictures_are_decoded_one_at_a_time_however_many_reads_wait(source, monkeypatch):
    import threading
    import time

    from shardify import pack as pack_module
    from shardify.images.folders import FolderReader

    pack(source, check="decode")
    threads = {"read": set(), "probe": set()}

    def slowly(name, function):
        def slow(*arguments, **named):
            threads[name].add(threading.current_thread())
            time.sleep(0.003)
            return function(*arguments, **named)

        return slow

    monkeypatch.setattr(pack_module, "probe", slowly("probe", pack_module.probe))
    pack(source, check="decode", out=source / "probed", shards=1)
    monkeypatch.setattr(FolderReader, "read", slowly("read", FolderReader.read))
    pack(source, check="decode", out=source / "waited", shards=1)
    assert len(threads["read"]) > 1
    assert threads["probe"] == {threading.current_thread()}
    assert tree(source / "probed") == tree(source / "waited")


def test_urls_have_names_that_do_not_depend_on_the_folder_of_the_run(tmp_path, monkeypatch):
    from shardify.sources.llava import record_names

    paths = ["s3://lab/a/x.json", "s3://lab/b/x.json", str(tmp_path / "x.json")]
    names = record_names(paths)
    assert names[:2] == ["lab/a/x.json", "lab/b/x.json"]
    monkeypatch.chdir(tmp_path)
    assert record_names(paths) == names
    assert record_names(paths[:2]) == ["a/x.json", "b/x.json"]


def test_what_only_this_machine_could_read_is_refused_on_a_cluster(source):
    with pytest.raises(UsageError, match=r"--read-order needs a folder that all nodes see"):
        pack_dataset(
            PackOptions(
                records=[source / "chat.json"],
                images=[source / "images"],
                out="s3://bucket/set",
                engine="ray",
                read_order=True,
            )
        )
