"""What arrives is compared with what was written: any changed byte that matters is found, and belongs to one sample."""

import io
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.fetch.requests import parse_retry_after
from loaders.fetch.verify import Hashes, check
from shardify.format.shards import open_shards
from shardify.format.tar import BLOCK, read_samples


@dataclass(repr=False)
class Shard:
    content: bytes
    hashes: Hashes


@pytest.fixture(scope="module")
def plain(tmp_path_factory, made):
    """A shard of ours, its hashes, and where its samples lie."""
    folder = tmp_path_factory.mktemp("plain")
    samples = [made.Made([made.png(i)] * (i % 3), made.record(i, i % 3)) for i in range(12)]
    made.write(folder, samples, shards=1)
    content = (folder / "000.tar").read_bytes()
    return Shard(content, Hashes.of_sidecar((folder / "000.parquet").read_bytes(), where="it"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A shard of another program: names that need extended headers, and a folder between samples."""
    folder = tmp_path_factory.mktemp("foreign")
    with tarfile.open(folder / "000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(6):
            for field in ("jpg", "json"):
                data = b"{}" if field == "json" else bytes([number]) * 700
                info = tarfile.TarInfo(f"{'deep/' * 40 if number % 2 else ''}{number:04d}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    shards = open_shards(str(folder / "000.tar"))
    content = (folder / "000.tar").read_bytes()
    return Shard(content, Hashes.of_sidecar(Path(shards.shards[0].sidecar).read_bytes(), where="it"))


@pytest.fixture(params=["plain", "foreign"])
def shard(request):
    return request.getfixturevalue(request.param)


def spans(hashes: Hashes) -> list[tuple[int, int]]:
    return [(at, at + size) for at, size in zip(hashes.offsets.tolist(), hashes.sizes.tolist(), strict=True)]


def contents_of(span: memoryview) -> list[bytes]:
    return [bytes(data) for _, members in read_samples(span, where="it") for _, data in members]


def test_what_was_written_is_right(shard):
    content, hashes = shard.content, shard.hashes
    begin, end = spans(hashes)[2][0], spans(hashes)[-1][1]
    data = memoryview(content)[begin:end]
    for table in (hashes, Hashes.decode(hashes.encode())):
        assert check(data, begin, table, compressed=False) == (len(hashes.offsets) - 2, [])
    count, faults = check(data, begin, None, compressed=False)
    assert count in (0, len(hashes.offsets) - 2)  # 0 for unknown
    assert not faults


@given(data=st.data())
def test_a_changed_byte_is_one_samples_fault_or_means_nothing(shard, data):
    content, hashes = shard.content, shard.hashes
    begin, end = spans(hashes)[1][0], spans(hashes)[-1][1]
    at = data.draw(st.integers(begin, end - 1))
    changed = bytearray(content)
    changed[at] ^= data.draw(st.integers(1, 255))
    view = memoryview(bytes(changed))[begin:end]
    _, faults = check(view, begin, hashes, compressed=False)
    (hit,) = [span for span in spans(hashes) if span[0] <= at < span[1]]
    if faults:
        assert [(fault.begin, fault.end) for fault in faults] == [hit]
    else:  # zeros after a member's data, or what an extended header says
        before, after = (contents_of(memoryview(bytes(source))[slice(*hit)]) for source in (content, changed))
        assert before == after


@given(data=st.data())
def test_without_hashes_a_damaged_header_takes_all_behind_it(plain, data):
    content, hashes = plain.content, plain.hashes
    headers = hashes.member_offsets - BLOCK
    at = int(data.draw(st.sampled_from(headers.tolist())))
    changed = bytearray(content)
    changed[at + data.draw(st.integers(0, BLOCK - 1))] ^= data.draw(st.integers(1, 255))
    end = spans(hashes)[-1][1]
    _, (fault,) = check(memoryview(bytes(changed))[:end], 0, None, compressed=False)
    assert (fault.begin, fault.end) == (at, end)


def test_an_extent_cut_short_misses_its_last_samples(plain):
    content, hashes = plain.content, plain.hashes
    last = spans(hashes)[-1]
    _, faults = check(memoryview(content)[: last[1] - 600], 0, hashes, compressed=False)
    assert [(fault.begin, fault.end) for fault in faults] == [last]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory, made):
    """The same as `.tar.zst`, in frames of a few samples."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("zst") / "out"
    noise = np.random.default_rng(0)
    samples = [made.Made([noise.bytes(60_000)], made.record(i)) for i in range(14)]
    made.write(source, samples, shards=1)
    command = ["-m", "shardify.cli", "reshard", str(source), "--out", str(folder), "--compress", "zstd"]
    done = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = (folder / "000.tar.zst").read_bytes()
    return Shard(content, Hashes.of_sidecar((folder / "000.parquet").read_bytes(), where="it"))


@given(data=st.data())
def test_a_changed_byte_in_a_frame_is_that_frames_fault(compressed, data):
    content, hashes = compressed.content, compressed.hashes
    frames = sorted(set(spans(hashes)))
    assert len(frames) > 2
    end = frames[-1][1]
    at = data.draw(st.integers(0, end - 1))
    changed = bytearray(content)
    changed[at] ^= data.draw(st.integers(1, 255))
    view = memoryview(bytes(changed))[:end]
    (hit,) = [frame for frame in frames if frame[0] <= at < frame[1]]
    count, faults = check(view, 0, hashes, compressed=True)
    assert count == 14
    assert [(fault.begin, fault.end) for fault in faults] == [hit]
    _, (fault,) = check(view, 0, None, compressed=True)
    assert fault.begin < hit[1]
    assert fault.end == end


def test_frames_that_were_written_are_right(compressed):
    content, hashes = compressed.content, compressed.hashes
    end = spans(hashes)[-1][1]
    for table in (hashes, None):
        assert check(memoryview(content)[:end], 0, table, compressed=True)[1] == []


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 3 ", 3.0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("", 0.0),
        ("soon", 0.0),
        ("-1", 0.0),
        ("9" * 400, 999999999.0),
    ],
    ids=["seconds", "blanks", "date", "past", "none", "word", "negative", "absurd"],
)
def test_retry_after_in_both_its_forms(value, seconds):
    assert parse_retry_after(value, datetime(2015, 10, 21, 7, 28, tzinfo=UTC)) == seconds
