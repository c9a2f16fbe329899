"""Sidecars as files: what is read, and by what."""

import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardify.format.sidecar import ImageInfo, ShardInfo, SidecarBuilder, read_shard_info, read_sidecar
from shardify.format.tar import Member


def test_arrows_threads_are_given_nothing_of_pythons(tmp_path, monkeypatch):
    """They let go of what they read from after the table is there: while the interpreter ends, that aborts it."""
    given = []
    read = []

    class Noted(pq.ParquetFile):
        def __init__(self, source, **options):
            given.append((type(source), options.get("pre_buffer", False)))
            super().__init__(source, **options)

        def read(self, columns, **options):
            read.append(options)
            return super().read(columns, **options)

    path = tmp_path / "a.parquet"
    SidecarBuilder().write(path, np.zeros((0, 2), np.int64), ShardInfo(0, ""))
    monkeypatch.setattr(pq, "ParquetFile", Noted)
    for file in (None, io.BytesIO(path.read_bytes())):
        assert read_sidecar(path, file=file).num_rows == 0
    for file in (None, io.BytesIO(path.read_bytes())):
        assert read_shard_info(path, file=file).bytes == 0
    assert all(issubclass(kind, pa.NativeFile) and not pre_buffer for kind, pre_buffer in given)
    assert len(given) == 4
    assert read == [{"use_threads": False}] * 2


def test_rows_come_back_as_they_were_added(tmp_path):
    rows, spans = SidecarBuilder(), []
    expected = []
    for number in range(2500):
        members = [Member(f"{n}.jpg", number + n, 7 * n, 2**64 - 1 - number) for n in range(number % 4)]
        images = [ImageInfo(f"{n}.jpg", "jpg", number, n) for n in range(number % 3)]
        row = {
            "key": f"{number:09d}",
            "id": None if number % 5 == 2 else str(number),
            "record": number * 3,
            "members": members,
            "images": images,
            "turns": number % 7,
            "words": number,
            "source": f"{number % 2}.json",
        }
        assert len(rows) == number
        rows.add(**row)
        spans.append((number * 512, 512))
        expected.append(
            row
            | {
                "members": [member._asdict() for member in members],
                "images": [image._asdict() for image in images],
                "offset": number * 512,
                "size": 512,
            }
        )
    rows.write(tmp_path / "a.parquet", np.array(spans), ShardInfo(0, ""))
    assert read_sidecar(tmp_path / "a.parquet").to_pylist() == expected


def test_nothing_of_a_sidecar_needs_pandas(tmp_path):
    """It takes as long to import as a shard takes to index."""
    script = f"""
import sys
import numpy as np
from shardify.format.index import COLUMNS, index_rows
from shardify.format.sidecar import ImageInfo, ShardInfo, SidecarBuilder, read_shard_info, read_sidecar
from shardify.format.tar import Member
rows = SidecarBuilder()
rows.add(key="1", id=None, record=0, members=[Member("jpg", 512, 3, 7)], images=[ImageInfo("jpg", "jpg", 4, 5)],
         turns=2, words=3, source="a")
rows.add(key="2", id="é", record=1, members=[], images=[], turns=2, words=3, source="a")
path = {str(tmp_path / "a.parquet")!r}
rows.write(path, np.array([[0, 1024], [1024, 512]]), ShardInfo(0, ""))
index = index_rows(read_sidecar(path, COLUMNS), read_shard_info(path), 0)
assert index["offset"].tolist() == [0, 1024] and index["images"].tolist() == [1, 0]
assert read_sidecar(path)["id"].to_pylist() == [None, "é"]
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
