"""Workers say how far they are, long before a shard is finished."""

import io
import json

import pytest
from PIL import Image

from shardify import convert, pack
from shardify.convert import PackOptions, pack_dataset
from shardify.engines.local import run_shards

RECORDS = 30


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_told_record_by_record(tmp_path, monkeypatch, workers):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "bad.jpg").write_bytes(b"bad")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Black."}]
    records = [
        {"id": n, "image": "a.jpg" if n else "bad.jpg", "conversations": turns} for n in range(RECORDS)
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    told = []

    def watched(context, tasks, *, workers, report):
        def watch(count, size):
            told.append((count, size))
            report(count, size)

        for result in run_shards(context, tasks, workers=workers, report=watch):
            told.append(result)
            yield result

    monkeypatch.setattr(convert, "run_shards", watched)
    monkeypatch.setattr(pack, "_REPORT_EVERY", 0)  # workers are forked: they have it too
    pack_dataset(
        PackOptions(
            records=[tmp_path / "chat.json"],
            images=[tmp_path],
            out=tmp_path / "out",
            shards=2,
            workers=workers,
            max_bad="1",
        )
    )
    reports = [item for item in told if isinstance(item, tuple)]
    results = [item for item in told if not isinstance(item, tuple)]
    assert sum(count for count, _ in reports) == RECORDS
    assert all(count <= 1 for count, _ in reports)
    written = sum(size for _, size in reports)
    tars = sum(result.bytes for result in results)
    assert tars - 2 * 10240 <= written <= tars  # less the ends of two tars
    assert len(results) == 2
    assert told.index(results[0]) > RECORDS // 2  # reports come first
