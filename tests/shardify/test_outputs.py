"""A name that exists is complete, whatever happens while it is written."""

import fcntl
import io
import os
import resource
import subprocess
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardify.format.tar import ShardWriter
from shardify.outputs import direct, open_output
from shardify.outputs.direct import DirectFile
from shardify.outputs.local import LocalOutput


@given(st.lists(st.integers(0, 30_000), max_size=20), st.integers(1, 5))
def test_any_parts_come_out_as_they_went_in(tmp_path_factory, sizes, pages):
    path = tmp_path_factory.mktemp("direct") / "file"
    before = threading.active_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "_BUFFER_BYTES", pages * 4096)
        file = DirectFile(str(path))
        parts = [os.urandom(size) for size in sizes]
        assert [file.write(part) for part in parts] == sizes
        file.sync()
        file.close()
    assert path.read_bytes() == b"".join(parts)
    assert threading.active_count() == before


samples = st.lists(  # of each: the sizes of its images, which of them are read to their places, whether it is packed, bytes of its record
    st.tuples(
        st.lists(st.tuples(st.integers(0, 12_000), st.booleans()), max_size=4),
        st.booleans(),
        st.integers(0, 9000),
    ),
    max_size=8,
)


@given(samples, st.integers(1, 5))
def test_images_read_to_their_places_give_the_same_shard(tmp_path_factory, asked, pages):
    path = tmp_path_factory.mktemp("direct") / "file"
    plain = io.BytesIO()
    expected = ShardWriter(plain, gather=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "_BUFFER_BYTES", pages * 4096)
        patch.setattr(direct, "_HASHED_BYTES", 3000)
        file = DirectFile(str(path))
        writer = ShardWriter(file)
        for number, (images, kept, record) in enumerate(asked):
            read, placing = [], True
            for size, placed in images:
                data = os.urandom(size)
                place = writer.room(size, is_first=not read) if placing and placed else None
                if place is None:
                    placing = False
                    read.append(data)
                else:
                    place[:] = data
                    read.append(place)
            if not kept:
                continue
            key, last = f"{number:09d}", os.urandom(record)
            for of, data in enumerate(read):
                copy = bytes(data)
                member = writer.add(key, f"{of}.jpg", data, in_place=isinstance(data, memoryview))
                assert member == expected.add(key, f"{of}.jpg", copy)
            assert writer.add(key, "json", last) == expected.add(key, "json", last)
            writer.end_sample()
            expected.end_sample()
        assert writer.close() == expected.close()
        file.sync()
        file.close()
    assert path.read_bytes() == plain.getvalue()
    assert writer.bytes == writer.offset == len(plain.getvalue())
    assert writer.spans.tolist() == expected.spans.tolist()


@pytest.fixture
def out(tmp_path):
    output = open_output(str(tmp_path / "out"))
    with output.claimed():
        yield output


def everything(output):
    return sorted(os.path.relpath(os.path.join(folder, name), output.place)
                  for folder, _, names in os.walk(output.place) for name in names)  # fmt: skip


def test_nothing_is_seen_before_commit_and_nothing_is_left_without(out):
    with out.create("000.tar") as draft:
        draft.write(b"x" * 10_000_000)
        assert out.size("000.tar") is None
        assert out.open("000.tar") is None
    assert everything(out) == [".packing/lock"]
    with out.create("000.tar") as draft:
        draft.write(b"x" * 10_000_000)
        draft.commit()
    assert out.sizes() == {"000.tar": 10_000_000}
    with out.open("000.tar") as file:
        assert file.read() == b"x" * 10_000_000
    assert everything(out) == [".packing/lock", "000.tar"]


def test_a_file_system_without_direct_writes_gets_ordinary_ones(tmp_path, monkeypatch):
    real_open, real_write = os.open, os.write
    refused = []

    def refuse_open(path, flags, *rest, **named):
        if flags & os.O_DIRECT:
            refused.append("open")
            raise OSError(22, "Invalid argument")
        return real_open(path, flags, *rest, **named)

    def refuse_write(file, data):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append("write")
            raise OSError(22, "Invalid argument")
        return real_write(file, data)

    content = os.urandom(9_000_001)
    for name, function in (("open", refuse_open), ("write", refuse_write)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, function)
            file = DirectFile(str(tmp_path / name))
            file.write(content)
            file.sync()
            file.close()
        assert (tmp_path / name).read_bytes() == content
    assert refused == ["open", "write"]


def test_a_full_disk_is_said_by_the_next_write_or_the_commit(out):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        for size in (2_000_000, 50_000_000):
            with pytest.raises(OSError, match="too large"), out.create("000.tar") as draft:
                for _ in range(size // 1_000_000):
                    draft.write(bytes(1_000_000))
                draft.commit()
            assert out.sizes() == {}
        written = 0
        with pytest.raises(OSError, match="too large"), out.create("000.tar") as draft:
            for number in range(50):
                writer = ShardWriter(draft)
                place = writer.room(1_000_000, is_first=True)
                writer.add(f"{number}", "jpg", place, in_place=True)
                written += 1
        assert written < 30  # long before the end
        assert out.sizes() == {}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert everything(out) == [".packing/lock"]


def test_a_place_is_never_waited_for(tmp_path, monkeypatch):
    """Whoever asks for it is timed, as one who reads images."""
    goes_on = threading.Event()
    monkeypatch.setattr(DirectFile, "_write", lambda _file, _view: goes_on.wait())
    file = DirectFile(str(tmp_path / "slow"))
    writer = ShardWriter(file)
    given = 0
    while (place := writer.room(1_000_000, is_first=True)) is not None:
        writer.add("a", "jpg", place, in_place=True)
        given += 1
    assert given == 3 * 4  # in three buffers
    goes_on.set()
    file.close()


def test_where_there_is_no_memory_for_a_buffer_there_is_no_place(tmp_path, monkeypatch):
    file = DirectFile(str(tmp_path / "file"))
    writer = ShardWriter(file)
    content = os.urandom(3_000_000)

    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    file.write(content)
    with monkeypatch.context() as patch:
        patch.setattr(direct.mmap, "mmap", refuse)
        assert writer.room(2_000_000, is_first=True) is None
    assert writer.room(2_000_000, is_first=True) is not None
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == content


def test_a_new_file_does_not_replace_an_old_one(out):
    assert out.put("a", b"1", new=True)
    assert not out.put("a", b"2", new=True)
    assert out.put("a", b"3")
    assert out.open("a").read() == b"3"


def test_what_a_killed_run_left_is_removed_by_the_next_one(tmp_path):
    output = LocalOutput(str(tmp_path / "out"))
    with output.claimed():
        output.put(".packing/plan.json", b"{}")
        draft = output.create("000.tar")
        draft.write(b"x" * 10)
        (tmp_path / "out" / ".packing" / "000.tar.1.draft").write_bytes(b"half")
        (tmp_path / "out" / ".packing" / "spool").mkdir()
        (tmp_path / "out" / ".packing" / "spool" / "images").write_bytes(b"many")
        # what is killed cannot tidy up
        subprocess.run(["cp", "-r", tmp_path / "out", tmp_path / "killed"], check=True)
    # what is not killed can
    assert everything(output) == [".packing/lock", ".packing/plan.json"]
    output = LocalOutput(str(tmp_path / "killed"))
    assert len(everything(output)) == 5
    with output.claimed():
        assert everything(output) == [".packing/lock", ".packing/plan.json"]


def test_a_run_that_has_ended_its_work_leaves_the_next_one_alone(tmp_path):
    first, following = LocalOutput(str(tmp_path / "out")), LocalOutput(str(tmp_path / "out"))
    slow = first.claimed()
    slow.__enter__()
    first.remove_work()
    with following.claimed():
        draft = following.create("000.tar")
        slow.__exit__(None, None, None)  # comes late
        draft.write(b"1")
        draft.commit()
    assert first.sizes() == {"000.tar": 1}
