"""`shardify index`: the same files by any number of workers, and the indexes that other loaders read."""

import io
import json
import os
import sqlite3
import struct
import subprocess
import sys
import tarfile
import time
from concurrent.futures import Future
from pathlib import Path
from threading import Timer

import pytest

from shardify import indexing
from shardify.errors import FormatError, UsageError
from shardify.format import mapped
from shardify.format.shards import scan_foreign
from shardify.format.tar import ShardWriter
from shardify.indexing import index_shards
from shardify.processes import Ended, each_in_process


def make_tar(path, samples=4, *, tar_format=tarfile.USTAR_FORMAT, name="{}-{}"):
    with tarfile.open(path, "w", format=tar_format) as archive:
        for number in range(samples):
            for field, data in (("jpg", os.urandom(700 * number)), ("json", b'{"a": 1}'), ("txt", b"")):
                info = tarfile.TarInfo(f"{name.format(path.stem, number)}.{field}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(5):
        make_tar(
            tmp_path / "data" / f"{number:05d}.tar",
            number + 1,
            tar_format=(tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT)[number % 2],
        )
    return tmp_path / "data"


def index(folder, **options):
    return index_shards(folder, say=lambda _: None, **options)


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def members(path):
    with tarfile.open(path) as archive:
        return [(member.name, member.offset_data, member.size) for member in archive]


@pytest.mark.parametrize("kind", indexing.FORMATS)
def test_any_number_of_workers_writes_the_same_files(folder, kind):
    files = index(folder, workers=1, format=kind)
    assert all(os.path.exists(file) for file in files)
    alone = tree(folder)
    for name in alone:
        if not name.endswith(".tar"):
            (folder / name).unlink()
    assert index(folder, workers=4, format=kind) == files
    assert tree(folder) == alone
    assert index(folder, workers=2, format=kind) == files  # all there already
    assert tree(folder) == alone


def test_dali_index(folder):
    files = index(folder, format="dali")
    assert files == [str(folder / f"{number:05d}.idx") for number in range(5)]
    for number, file in enumerate(files):
        with open(file) as opened:
            first, *lines = opened.read().splitlines()
        assert first == f"v1.2 {number + 1}"
        found = [tuple(line.split(" ")[at : at + 4]) for line in lines for at in (0, 4, 8)]
        assert found == [
            (name.partition(".")[2], str(offset), str(size), name)
            for name, offset, size in members(folder / f"{number:05d}.tar")
        ]


def test_dali_cannot_have_blanks_in_names(tmp_path):
    make_tar(tmp_path / "a.tar", name="{} {}")
    with pytest.raises(FormatError, match="blanks in its name"):
        index(tmp_path, format="dali")


def test_energon_index(folder):
    files = index(folder, format="energon")
    assert all(os.path.exists(file) for file in files)
    meta = folder / ".nv-meta"
    names = [f"{number:05d}.tar" for number in range(5)]
    assert json.loads((meta / ".info.json").read_text()) == {
        "shard_counts": {name: n + 1 for n, name in enumerate(names)}
    }
    assert json.loads((meta / "split.yaml").read_text())["split_parts"]["train"] == names
    with sqlite3.connect(meta / "index.sqlite") as database:
        for number, name in enumerate(names):
            with tarfile.open(folder / name) as archive:
                headers = [member.offset for member in archive.getmembers()[::3]]
                end = archive.offset
            content = (folder / f"{name}.idx").read_bytes()
            assert list(struct.unpack(f"<{number + 2}Q", content)) == [*headers, end]
            rows = database.execute(
                "SELECT * FROM samples WHERE tar_file_id = ? ORDER BY sample_index", (number,)
            )
            ends = [*headers[1:], end]
            assert rows.fetchall() == [
                (number, f"{number:05d}-{at}", at, begin, until - begin)
                for at, (begin, until) in enumerate(zip(headers, ends, strict=True))
            ]
            parts = database.execute(
                "SELECT part_name, content_byte_offset, content_byte_size FROM sample_parts WHERE tar_file_id = ? ORDER BY 2, 1",
                (number,),
            )
            expected = [
                (name.partition(".")[2], offset, size) for name, offset, size in members(folder / name)
            ]
            assert sorted(parts.fetchall()) == sorted(expected)


def test_energons_configuration_stays_the_users(folder):
    index(folder, format="energon")
    for name in ("split.yaml", "dataset.yaml"):
        (folder / ".nv-meta" / name).write_text("mine: true\n")
    index(folder, format="energon")
    assert {(folder / ".nv-meta" / name).read_text() for name in ("split.yaml", "dataset.yaml")} == {
        "mine: true\n"
    }


def test_shards_that_come_later_are_in_energons_split_or_told(folder):
    split = folder / ".nv-meta" / "split.yaml"
    index(folder, format="energon")
    make_tar(folder / "00005.tar")
    index(folder, format="energon")
    parts = json.loads(split.read_text())["split_parts"]
    assert parts["train"] == [f"{number:05d}.tar" for number in range(6)]
    said = []
    for train, told in (("{00000..00005}.tar", []), ("{00000..00004}.tar", ["00005.tar"])):
        split.write_text(f"split_parts:\n  train: ['{train}']\n")
        index_shards(folder, format="energon", say=said.append)
        assert [line.split(" leaves out ")[1].split(":")[0] for line in said] == told


def test_a_folder_named_twice_has_one_energon_index(folder, tmp_path):
    (tmp_path / "other").mkdir()
    make_tar(tmp_path / "other" / "a.tar")
    index([folder / "00000.tar", tmp_path / "other", folder / "00001.tar"], format="energon")
    counts = json.loads((folder / ".nv-meta" / ".info.json").read_text())["shard_counts"]
    assert counts == {"00000.tar": 1, "00001.tar": 2}


def test_energon_needs_unique_keys(tmp_path):
    for name in ("a", "b"):
        make_tar(tmp_path / f"{name}.tar", name="same-{1}")
    with pytest.raises(FormatError, match=r"b\.tar: one of its keys is that of another sample.*reshard"):
        index(tmp_path, format="energon")
    assert not list((tmp_path / ".nv-meta").glob("*sqlite*"))


@pytest.mark.parametrize("kind", ["energon", "dali"])
def test_compressed_and_empty_shards_are_refused(tmp_path, kind):
    with open(tmp_path / "a.tar.zst", "wb", buffering=0) as file:
        writer = ShardWriter(file, compress="zstd")
        writer.add("0", "txt", b"x")
        writer.end_sample()
        writer.close()
    with pytest.raises(FormatError, match="plain tars only"):
        index(tmp_path, format=kind)
    (tmp_path / "a.tar.zst").unlink()
    (tmp_path / "a.parquet").unlink()
    make_tar(tmp_path / "a.tar", 0)
    with pytest.raises(FormatError, match="no samples"):
        index(tmp_path, format=kind)


def test_an_unknown_format_is_wrong_usage(folder):
    with pytest.raises(UsageError, match="parquet, energon, dali"):
        index(folder, format="tfrecord")


def test_the_first_bad_shard_is_named_and_good_ones_stay_indexed(folder):
    (folder / "00003.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(FormatError, match=r"00003\.tar: no tar.* at byte 0"):
        index(folder, workers=2)
    assert (folder / "00000.parquet").exists()
    assert not (folder / "00003.parquet").exists()
    assert not list(folder.glob("*.tmp"))


def test_a_killed_worker_is_an_error_that_names_its_shard(folder, monkeypatch):
    def dies(path, **_):
        if path.endswith("00002.tar"):
            os.kill(os.getpid(), 9)
        return scan_foreign(path)

    monkeypatch.setattr(indexing, "scan_foreign", dies)
    with pytest.raises(
        FormatError, match=r"00002\.tar: cannot be indexed: its process was ended with status -9"
    ):
        index(folder, workers=2)


def test_a_shard_that_is_cut_while_it_is_mapped_ends_no_command(folder, monkeypatch):
    """The first process is ended by SIGBUS; another one finds the shard as it is now."""
    path = folder / "00002.tar"
    path.write_bytes(path.read_bytes() + bytes(1 << 20))
    advance = mapped.MappedWindow.advance

    def cut_first(window, used, need):
        view = advance(window, used, need)
        if not used and window.total > 1 << 20:
            os.truncate(path, 4096)
        return view

    monkeypatch.setattr(mapped.MappedWindow, "advance", cut_first)
    with pytest.raises(FormatError, match=r"00002\.tar.*cut off"):
        index(folder, workers=1)


def test_only_the_item_to_blame_is_lost():
    def work(item):
        if item == 3:
            os.kill(os.getpid(), 11)
        done = Future()
        if item == 2:  # still to be made when the next item ends the process
            Timer(0.2, done.set_result, (20,)).start()
        else:
            done.set_result(10 * item)
        return done

    for workers in (1, 2, 4):
        found = list(each_in_process(work, range(6), workers=workers))
        assert found == [0, 10, 20, Ended(-11), 40, 50]


def test_an_error_lets_others_finish(tmp_path):
    def work(item):
        if item == 0:
            raise FormatError("first")
        time.sleep(0.2)
        (tmp_path / str(item)).touch()
        return item

    with pytest.raises(FormatError, match="first"):
        list(each_in_process(work, range(9), workers=3))
    assert {"1", "2"} <= set(os.listdir(tmp_path))


def test_workers_do_not_outlive_a_killed_command(folder):
    code = """if True:
        import sys, time
        from shardify.processes import each_in_process
        def work(item):
            open(item, "w").close()
            time.sleep(600)
        list(each_in_process(work, sys.argv[1:], workers=1))
    """
    there = folder / "there"
    process = subprocess.Popen([sys.executable, "-c", code, str(there)])
    while not there.exists():
        time.sleep(0.01)
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    for _ in range(1000):
        if (
            not os.path.exists(f"/proc/{worker}")
            or Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        ):
            return
        time.sleep(0.01)
    os.kill(int(worker), 9)
    pytest.fail("a worker goes on")


def test_through_the_command_line(folder):
    command = [
        sys.executable,
        "-m",
        "shardify.cli",
        "index",
        str(folder),
        "--workers",
        "2",
        "--format",
        "dali",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "00000.idx" in result.stdout
    assert len(list(folder.glob("*.parquet"))) == len(list(folder.glob("*.idx"))) == 5
