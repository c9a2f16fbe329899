"""Reading spans of shards: every byte as it is, neighbours together, and a fault is one sample's."""

import os
import random
import resource

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.fetch import LocalFetcher, local
from shardify.errors import LoaderError, SampleError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    contents = [random.Random(seed).randbytes(10_000) for seed in range(4)]
    for number, content in enumerate(contents):
        (folder / f"{number}.tar").write_bytes(content)
    return [str(folder / f"{number}.tar") for number in range(4)], contents


def read(fetcher, spans):
    columns = np.array(spans, np.int64).reshape(-1, 3).T
    return list(fetcher.read(*columns))


@given(
    spans=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 9000), st.integers(0, 1000)), max_size=30, unique=True
    )
)
def test_spans_arrive_as_they_are(shards, spans):
    paths, contents = shards
    got = dict(read(LocalFetcher(paths), spans))
    assert sorted(got) == list(range(len(spans)))
    for number, (shard, offset, size) in enumerate(spans):
        assert bytes(got[number]) == contents[shard][offset : offset + size]


def test_neighbours_are_one_read(shards, monkeypatch):
    paths, contents = shards
    reads = []
    pread = os.pread
    monkeypatch.setattr(local.os, "pread", lambda f, n, at: reads.append((n, at)) or pread(f, n, at))
    spans = [(1, 1000, 500), (0, 0, 100), (1, 500, 500), (1, 1500, 1), (1, 2000, 5)]
    got = dict(read(LocalFetcher(paths), spans))
    assert reads == [(100, 0), (1001, 500), (5, 2000)]
    assert all(
        bytes(got[i]) == contents[shard][offset : offset + size]
        for i, (shard, offset, size) in enumerate(spans)
    )


def test_a_frame_of_many_samples_is_read_once(shards, monkeypatch):
    paths, contents = shards
    reads = []
    pread = os.pread
    monkeypatch.setattr(local.os, "pread", lambda f, n, at: reads.append((n, at)) or pread(f, n, at))
    spans = [(1, 1000, 500), (1, 1500, 20), (1, 1000, 500), (2, 1500, 20), (1, 1500, 20), (1, 1520, 1)]
    got = dict(read(LocalFetcher(paths), spans))
    assert reads == [(521, 1000), (20, 1500)]
    assert all(
        bytes(got[i]) == contents[shard][offset : offset + size]
        for i, (shard, offset, size) in enumerate(spans)
    )


def test_short_reads_are_continued(shards, monkeypatch):
    paths, contents = shards
    pread = os.pread
    monkeypatch.setattr(local.os, "pread", lambda f, n, at: pread(f, min(n, 7), at))
    ((_, data),) = read(LocalFetcher(paths), [(2, 100, 1000)])
    assert bytes(data) == contents[2][100:1100]


def test_a_fault_is_one_samples(shards, monkeypatch):
    paths, contents = shards
    pread = os.pread

    def failing(file, size, at):
        if at <= 3000 < at + size:
            raise OSError(5, "Input/output error")
        return pread(file, size, at)

    monkeypatch.setattr(local.os, "pread", failing)
    spans = [(0, 3000, 10), (0, 9990, 20), (0, 2990, 10), (0, 20_000, 5), (0, 3010, 10)]
    got = dict(read(LocalFetcher(paths), spans))
    assert (bytes(got[2]), bytes(got[4])) == (contents[0][2990:3000], contents[0][3010:3020])
    faults = {number: result for number, result in got.items() if isinstance(result, SampleError)}
    assert {fault.code for fault in faults.values()} == {"shard-read-error"}
    assert faults[0].detail == "Input/output error"
    assert faults[1].detail == "the shard ends before byte 10010"
    assert faults[3].detail == "the shard ends before byte 20005"


def test_few_files_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_OPEN_FILES", 64)
    paths = [str(tmp_path / f"{number}.tar") for number in range(200)]
    for number, path in enumerate(paths):
        with open(path, "wb") as file:
            file.write(bytes([number]) * 10)
    before = len(os.listdir("/proc/self/fd"))
    fetcher = LocalFetcher(paths)
    for _ in range(2):
        got = dict(read(fetcher, [(number, 0, 10) for number in range(200)]))
        assert all(bytes(data) == bytes([number]) * 10 for number, data in got.items())
        assert len(os.listdir("/proc/self/fd")) - before <= 64


def test_a_shard_that_cannot_be_opened_is_the_runs_fault(shards):
    paths, _ = shards
    with pytest.raises(LoaderError, match=r"\.gone cannot be opened"):
        dict(read(LocalFetcher([paths[0] + ".gone"]), [(0, 0, 10)]))


def test_a_process_out_of_descriptors_closes_some(shards):
    paths, contents = shards
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    fetcher = LocalFetcher(paths)
    assert len(dict(read(fetcher, [(0, 0, 10)]))) == 1
    taken = len(os.listdir("/proc/self/fd"))
    try:
        highest = max(map(int, os.listdir("/proc/self/fd")))
        fill = [os.open(os.devnull, os.O_RDONLY) for _ in range(highest + 1 - taken)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limit[1]))
        got = dict(read(fetcher, [(1, 0, 10), (2, 5, 10), (1, 20, 10)]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for file in fill:
            os.close(file)
    assert {number: bytes(span) for number, span in got.items()} == {
        0: contents[1][:10],
        1: contents[2][5:15],
        2: contents[1][20:30],
    }
