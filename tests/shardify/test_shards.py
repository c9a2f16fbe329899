"""Opening data sets: what patterns name, what must fit together, and sidecars built for shards of other origin."""

import io
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shardify.errors import FormatError, UsageError
from shardify.format import shards as shards_module
from shardify.format.files import locked
from shardify.format.hashing import hash_file
from shardify.format.index import INDEX_DTYPE, index_rows, write_index
from shardify.format.manifest import Counts, Manifest, Shard, encode_manifest
from shardify.format.shards import open_shards, select_shards
from shardify.format.sidecar import SampleRow, ShardInfo, read_sidecar, write_sidecar
from shardify.format.tar import ShardWriter, read_members
from shardify.indexing import index_shards

RECORD = b'{"conversations":[{"from":"human","value":"one two"}]}'


def make_set(folder, samples=(2, 3, 4, 5), *, first=0):
    """A finished data set with so many samples in each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, parts, key = [], [], first
    for number, count in enumerate(samples):
        tar, sidecar = folder / f"{number:03d}.tar", folder / f"{number:03d}.parquet"
        rows = []
        with open(tar, "wb", buffering=0) as file:
            writer = ShardWriter(file)
            for _ in range(count):
                offset = writer.offset
                member = writer.add(f"{key:09d}", "json", RECORD)
                name = f"{key:09d}"
                rows.append(
                    SampleRow(
                        name, None, key, offset, writer.offset - offset, [member], [], 1, 2, "chat.json"
                    )
                )
                key += 1
            digest = writer.close()
        info = ShardInfo(tar.stat().st_size, digest)
        write_sidecar(sidecar, rows, info)
        shards.append(Shard(tar.name, sidecar.name, count, info.bytes, digest, hash_file(sidecar)))
        parts.append(index_rows(read_sidecar(sidecar), info, number))
    with open(folder / "index.npy", "wb") as file:
        write_index(file, parts)
    counts = Counts(sum(samples), sum(samples), {}, {})
    manifest = Manifest(1, {}, [], shards, hash_file(folder / "index.npy"), counts)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return folder


def make_tar(path, count=3, tar_format=tarfile.GNU_FORMAT):
    """A tar by somebody else."""
    with tarfile.open(path, "w", format=tar_format) as archive:
        for number in range(count):
            info = tarfile.TarInfo(f"{path.stem}-{number}.json")
            info.size = len(RECORD)
            archive.addfile(info, io.BytesIO(RECORD))
    return path


@pytest.fixture
def finished(tmp_path):
    return make_set(tmp_path / "data")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shardify"


def keys_of(opened):
    """Every sample's key, read by the index alone."""
    keys = []
    for i, row in enumerate(opened.index):
        shard = opened.shards[int(np.searchsorted(opened.starts, i, "right")) - 1]
        with open(shard.path, "rb") as file:
            file.seek(row["offset"])
            keys.append(read_members(memoryview(file.read(row["size"])), where=shard.path)[0])
    return keys


def all_keys(first, last):
    return [f"{key:09d}" for key in range(first, last)]


def refuse(shards, kind, *words):
    with pytest.raises(kind) as caught:
        open_shards(shards, say=lambda _: None)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "pattern", ["{}", "{}/manifest.json", "{}/{{000..003}}.tar", "{}/{{000..999}}.tar", "{}/"]
)
def test_a_whole_set_stays_memory_mapped(finished, pattern):
    opened = open_shards(pattern.format(finished))
    assert isinstance(opened.index, np.memmap)
    assert opened.index.dtype == INDEX_DTYPE
    assert opened.starts.tolist() == [0, 2, 5, 9, 14]
    assert keys_of(opened) == all_keys(0, 14)
    assert opened.fingerprint == open_shards([finished / f"{n:03d}.tar" for n in range(4)]).fingerprint
    assert [shard.samples for shard in opened.shards] == [2, 3, 4, 5]


def test_some_shards_in_any_order(finished):
    part = open_shards(f"{finished}/{{001..002}}.tar")
    assert isinstance(part.index, np.memmap)
    assert keys_of(part) == all_keys(2, 9)
    mixed = open_shards([finished / "003.tar", finished / "000.tar", finished / "001.tar"])
    assert mixed.starts.tolist() == [0, 5, 7, 10]
    assert keys_of(mixed) == all_keys(9, 14) + all_keys(0, 5)
    assert mixed.fingerprint["samples"] == 10
    assert mixed.fingerprint["digest"] != part.fingerprint["digest"]


def test_several_folders_and_kinds_in_one_list(tmp_path, finished, cache):
    other = make_set(tmp_path / "other", (1, 1), first=50)
    make_tar(tmp_path / "x.tar")
    opened = open_shards([finished, str(other / "{000..001}.tar"), tmp_path / "x.tar"], say=lambda _: None)
    assert opened.starts.tolist() == [0, 2, 5, 9, 14, 15, 16, 19]
    assert keys_of(opened)[14:] == ["000000050", "000000051", *(f"{tmp_path}/x-{n}"[-3:] for n in range(3))]


def test_relative_paths_and_the_current_folder(finished, monkeypatch):
    monkeypatch.chdir(finished)
    for pattern in (".", "{000..003}.tar", "manifest.json", "./manifest.json"):
        assert keys_of(open_shards(pattern)) == all_keys(0, 14)


def test_braces_may_be_part_of_a_name(tmp_path):
    make_set(tmp_path / "a{1,2}b")
    assert len(open_shards(tmp_path / "a{1,2}b").index) == 14


def test_the_fingerprint_does_not_depend_on_the_place(finished, tmp_path):
    before = open_shards(finished).fingerprint
    finished.rename(tmp_path / "moved")
    assert open_shards(tmp_path / "moved").fingerprint == before


def test_a_set_that_has_grown_begins_with_what_it_was(tmp_path):
    before = make_set(tmp_path / "before" / "data", (2, 3))
    after = make_set(tmp_path / "data", (2, 3, 4))
    old, new = open_shards(before), open_shards(after)
    assert new.fingerprint != old.fingerprint
    begin = new.prefix(old.fingerprint["shards"])
    assert begin.fingerprint == old.fingerprint
    assert begin.starts.tolist() == [0, 2, 5]
    assert np.shares_memory(begin.index, new.index)
    assert keys_of(begin) == all_keys(0, 5)
    assert new.prefix(1).fingerprint != old.fingerprint
    assert new.prefix(3).fingerprint == new.fingerprint
    assert len(new.prefix(0).index) == 0
    with pytest.raises(ValueError, match="first 4 shards of 3"):
        new.prefix(4)


def test_a_folder_that_is_not_there(tmp_path, finished):
    refuse(f"{tmp_path}/nowhere/", FormatError, "nowhere", "no such")
    refuse([finished, f"{tmp_path}/nowhere/"], FormatError, "1 of 5 shards are missing", "nowhere")


def test_an_empty_set_is_fine(tmp_path):
    opened = open_shards(make_set(tmp_path / "data", (0,)))
    assert (len(opened.index), opened.starts.tolist()) == (0, [0, 0])


@pytest.mark.parametrize("nothing", ["", " ", [], [""]])
def test_no_pattern_is_wrong_usage(nothing):
    refuse(nothing, UsageError, "pattern")


def test_patterns_that_cannot_be_are_wrong_usage(finished):
    refuse(f"{finished}/{{000..003.tar", UsageError, "brace")
    refuse(f"{finished}/{{0..999999999}}.tar", UsageError, "1000000000")
    refuse("ftp://bucket/{000..003}.tar", UsageError, "not a place")
    refuse("s3://bucket/{000..003.tar", UsageError, "brace")
    refuse([finished, finished / "002.tar"], UsageError, "twice")
    refuse([finished / "002.tar", finished / ".." / "data" / "002.tar"], UsageError, "twice")


def test_nothing_there_is_a_clear_error(tmp_path, finished):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", FormatError, "no shards")
    refuse(tmp_path / "nowhere", FormatError, "nowhere", "no such")
    refuse(tmp_path / "nowhere" / "manifest.json", FormatError, "no such manifest")
    refuse(tmp_path / "nowhere" / "{000..003}.tar", FormatError, "4 of 4", "missing", "000.tar")
    refuse(f"{finished}/{{004..009}}.tar", FormatError, "beyond")
    refuse(finished / "004.tar", FormatError, "missing", "004.tar")
    refuse(f"{finished}/{{0..9}}.tar", FormatError, "missing", "0.tar")


def test_unfinished_packing_is_not_taken_for_a_small_set(finished):
    (finished / "manifest.json").unlink()
    (finished / ".packing").mkdir()
    refuse(finished, FormatError, "not finished")
    refuse(finished / "000.tar", FormatError, "not finished")


def test_holes_are_named(finished):
    (finished / "001.tar").unlink()
    for shards in (finished, f"{finished}/{{000..999}}.tar", f"{finished}/{{000..003}}.tar"):
        refuse(shards, FormatError, "1 of 4 shards are missing", "001.tar")
    assert len(open_shards(f"{finished}/{{002..003}}.tar").shards) == 2
    (finished / "manifest.json").unlink()
    refuse(f"{finished}/{{000..009}}.tar", FormatError, "7 of 10", "001.tar", "007.tar", "and 2 more")


def test_shards_must_be_those_of_the_manifest(finished):
    os.truncate(finished / "002.tar", 1024)
    refuse(finished, FormatError, "002.tar", "1024", "cut off")
    with open(finished / "002.tar", "ab") as file:
        file.write(bytes(50_000))
    refuse(finished, FormatError, "002.tar", "51024", "does not belong")
    assert len(open_shards(finished / "001.tar").shards) == 1


def test_the_index_must_be_that_of_the_manifest(finished, tmp_path):
    index = (finished / "index.npy").read_bytes()
    (finished / "index.npy").write_bytes(index[:-1] + b"\x01")
    refuse(finished, FormatError, "index.npy", "hash")
    (finished / "index.npy").write_bytes(index[:-24])
    refuse(finished, FormatError, "index.npy")
    other = make_set(tmp_path / "other", (1, 1))
    (finished / "index.npy").write_bytes((other / "index.npy").read_bytes())
    refuse(finished, FormatError, "index.npy", "14")
    (finished / "index.npy").unlink()
    refuse(finished, FormatError, "no such index")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format_version": 1}', b"\xff\xfe", b'"x"'])
def test_a_damaged_manifest_is_named(finished, content):
    (finished / "manifest.json").write_bytes(content)
    refuse(finished, FormatError, "manifest.json")


def test_a_manifest_may_be_passed_over(finished):
    (selection,) = select_shards(finished, read=lambda _: None)
    assert (selection.manifest, len(selection.names)) == (None, 4)


def test_sidecars_beside_the_shards_are_used(finished, cache):
    (finished / "manifest.json").unlink()
    said = []
    assert keys_of(open_shards(finished, say=said.append)) == all_keys(0, 14)
    assert not said
    with open(finished / "001.tar", "ab") as file:
        file.write(bytes(512))
    refuse(finished, FormatError, "001.tar", "001.parquet", "delete")
    (finished / "001.parquet").write_bytes(b"PAR1 not")
    refuse(finished, FormatError, "001.parquet")


def test_missing_sidecars_are_built_once_and_said_so(tmp_path, cache):
    for name in ("b", "a"):
        make_tar(tmp_path / f"{name}.tar")
    said = []
    opened = open_shards(tmp_path, say=said.append)
    assert len(said) == 1
    assert "indexing 2 shards" in said[0]
    assert keys_of(opened) == ["a-0", "a-1", "a-2", "b-0", "b-1", "b-2"]
    assert opened.index["words"].tolist() == [2] * 6
    assert open_shards(tmp_path, say=said.append).fingerprint == opened.fingerprint
    assert len(said) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "a.tar", "b.parquet", "b.tar"]


def test_another_tools_parquet_is_left_alone(tmp_path, cache):
    make_tar(tmp_path / "00000.tar")
    theirs = tmp_path / "00000.parquet"  # img2dataset's name for its own table
    pq.write_table(pa.table({"url": ["http://x"]}), theirs)
    before = theirs.read_bytes()
    opened = open_shards(tmp_path / "00000.tar", say=lambda _: None)
    assert keys_of(opened) == ["00000-0", "00000-1", "00000-2"]
    assert theirs.read_bytes() == before
    assert opened.shards[0].sidecar.startswith(str(cache))

    said = []
    open_shards(tmp_path / "00000.tar", say=said.append)
    assert not said  # found in the cache
    make_tar(tmp_path / "00000.tar", 50)
    assert len(open_shards(tmp_path / "00000.tar", say=said.append).index) == 50
    assert len(said) == 1  # the stale one was built again


def test_a_read_only_place_uses_the_cache(tmp_path, cache, monkeypatch):
    folder = tmp_path / "fixed"
    folder.mkdir()
    make_tar(folder / "a.tar")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    opened = open_shards(folder, say=lambda _: None)
    assert [path.name for path in folder.iterdir()] == ["a.tar"]
    assert len(list(cache.rglob("a.parquet"))) == 1
    assert keys_of(opened) == ["a-0", "a-1", "a-2"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    make_tar(tmp_path / "a.tar")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refuse(tmp_path, FormatError, "XDG_CACHE_HOME")


def test_large_sets_without_index_name_the_command(tmp_path, cache, monkeypatch):
    make_tar(tmp_path / "a.tar")
    os.truncate(make_tar(tmp_path / "b.tar"), 10_000_000_001)  # sparse: takes no space
    refuse(tmp_path, FormatError, "shardify index", "10.0 GB")
    monkeypatch.setattr(shards_module, "MAX_BUILT_BYTES", 1000)
    (tmp_path / "b.tar").unlink()
    refuse(tmp_path, FormatError, "shardify index")
    assert index_shards(tmp_path, say=lambda _: None) == [str(tmp_path / "a.parquet")]
    assert len(open_shards(tmp_path).index) == 3


def test_the_index_command(tmp_path, cache):
    make_tar(tmp_path / "a.tar")
    command = [sys.executable, "-m", "shardify.cli", "index", str(tmp_path / "a.tar")]
    for said in ("indexing 1 shards", ""):
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert said in result.stderr
        assert result.stdout == f"indexed: {tmp_path / 'a.parquet'}\n"
    (tmp_path / "b.tar").write_bytes(b"x" * 5000)
    result = subprocess.run([*command[:-1], str(tmp_path)], capture_output=True, text=True, check=False)
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert "b.tar" in result.stderr


def test_a_tar_that_cannot_be_indexed_leaves_nothing(tmp_path, cache):
    make_tar(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(b"x" * 5000)
    refuse(tmp_path, FormatError, "b.tar", "byte 0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "a.tar", "b.tar"]


def test_sidecars_that_lie_are_refused(tmp_path, cache):
    tar = make_tar(tmp_path / "a.tar")
    open_shards(tmp_path, say=lambda _: None)
    for change in ({"offset": 1 << 40}, {"offset": -512}, {"size": 1 << 40}):
        row = {"key": "k", "offset": 0, "size": 512} | change
        rows = [SampleRow(row["key"], None, 0, row["offset"], row["size"], [], [], 0, 0, "a")]
        write_sidecar(tmp_path / "a.parquet", rows, ShardInfo(tar.stat().st_size, "0"))
        refuse(tmp_path, FormatError)
    write_sidecar(tmp_path / "a.parquet", rows[:0], ShardInfo(tar.stat().st_size, "0", tolerant=[7]))
    refuse(tmp_path, FormatError, "a.parquet")


def _open_and_report(folder, queue, barrier):
    said = []
    barrier.wait()
    opened = open_shards(folder, say=said.append)
    queue.put((opened.fingerprint, len(said)))


def test_processes_at_once_build_once(tmp_path, cache):
    for number in range(4):
        make_tar(tmp_path / f"{number}.tar", 400)
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(3)
    processes = [context.Process(target=_open_and_report, args=(tmp_path, queue, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({str(fingerprint) for fingerprint, _ in answers}) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(
        f"{number}.{suffix}" for number in range(4) for suffix in ("parquet", "tar")
    )


def test_a_waiting_process_does_not_build_again(tmp_path, cache):
    make_tar(tmp_path / "a.tar")
    code = (
        "import os, sys\n"
        "from shardify.format.shards import open_shards\n"
        "opened = open_shards(sys.argv[1])\n"
        "print(os.stat(opened.shards[0].sidecar).st_ino)"
    )
    with locked(str(tmp_path)):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert "indexing 1 shards" in process.stderr.readline()
        time.sleep(0.2)
        assert process.poll() is None
        assert not (tmp_path / "a.parquet").exists()
        shards_module.build_sidecar(str(tmp_path / "a.tar"))
        inode = (tmp_path / "a.parquet").stat().st_ino
    out, _ = process.communicate(timeout=60)
    assert int(out) == inode


@pytest.mark.parametrize(
    "damage",
    [
        SimpleNamespace(name="hole", do=lambda d: (d / "001.tar").unlink(), words=["missing", "001.tar"]),
        SimpleNamespace(
            name="cut", do=lambda d: os.truncate(d / "001.tar", 100), words=["001.tar", "cut off"]
        ),
        SimpleNamespace(name="no index", do=lambda d: (d / "index.npy").unlink(), words=["index.npy"]),
    ],
    ids=lambda damage: damage.name,
)
def test_through_the_command_line(finished, damage):
    damage.do(finished)
    command = [sys.executable, "-m", "shardify.cli", "info", str(finished)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in damage.words)


def test_opening_imports_no_torch():
    code = "import sys, shardify.format.shards, shardify.format.scan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
