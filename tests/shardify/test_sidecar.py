"""Sidecars as files: what is read, and by what."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardify.format.sidecar import ShardInfo, SidecarBuilder, read_shard_info, read_sidecar


def test_arrows_threads_are_given_nothing_of_pythons(tmp_path, monkeypatch):
    """They let go of what they read from after the table is there: while the interpreter ends, that aborts it."""
    given = []

    def noted(function):
        def call(source, **options):
            given.append((function is read_table, type(source), options))
            return function(source, **options)

        return call

    path = tmp_path / "a.parquet"
    SidecarBuilder().write(path, np.zeros((0, 2), np.int64), ShardInfo(0, ""))
    read_table = pq.read_table
    monkeypatch.setattr(pq, "ParquetFile", noted(pq.ParquetFile))
    monkeypatch.setattr(pq, "read_table", noted(read_table))
    for file in (None, io.BytesIO(path.read_bytes())):
        assert read_sidecar(path, file=file).num_rows == 0
    for file in (None, io.BytesIO(path.read_bytes())):
        assert read_shard_info(path, file=file).bytes == 0
    assert all(issubclass(kind, pa.NativeFile) for _, kind, _ in given)
    tables = [options for is_table, _, options in given if is_table]
    assert [(each["use_threads"], each["pre_buffer"]) for each in tables] == [(False, False)] * 2
