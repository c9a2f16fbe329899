"""Workers say how far they are long before a shard is finished, and end at what is no fault of a record."""

import json
import zipfile

import pytest
from PIL import Image

from shardify import pack, run
from shardify.convert import PackOptions, pack_dataset
from shardify.engines.local import run_shards
from shardify.errors import PackError
from shardify.format.manifest import read_manifest

RECORDS = 30


@pytest.fixture
def source(tmp_path):
    """Records about one good and one bad image."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.jpg")
    (tmp_path / "images" / "bad.jpg").write_bytes(b"bad")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Black."}]
    records = [
        {"id": n, "image": "a.jpg" if n else "bad.jpg", "conversations": turns} for n in range(RECORDS)
    ]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    return tmp_path


def pack_with(source, **changes):
    given = {
        "records": [source / "chat.json"],
        "images": [source / "images"],
        "out": source / "out",
        "max_bad": "1",
        "shuffle": False,
    }
    pack_dataset(PackOptions(**{**given, **changes}))


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_told_record_by_record(source, monkeypatch, workers):
    told = []

    def watched(execute, context, tasks, *, workers, report):
        def watch(count, size):
            told.append((count, size))
            report(count, size)

        for result in run_shards(execute, context, tasks, workers=workers, report=watch):
            told.append(result)
            yield result

    monkeypatch.setattr(run, "run_local", watched)
    monkeypatch.setattr(pack, "_REPORT_EVERY", 0)  # workers are forked: they have it too
    pack_with(source, shards=2, workers=workers)
    reports = [item for item in told if isinstance(item, tuple)]
    results = [item for item in told if not isinstance(item, tuple)]
    assert sum(count for count, _ in reports) == RECORDS
    assert all(count <= 1 for count, _ in reports)
    written = sum(size for _, size in reports)
    tars = sum(result.bytes for result in results)
    assert tars - 2 * 10240 <= written <= tars  # less the ends of two tars
    assert len(results) == 2
    assert told.index(results[0]) > RECORDS // 2  # reports come first


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_an_outage_ends_the_run_and_costs_no_record(source, monkeypatch, kind, workers):
    place = source / "images"
    if kind == "archive":
        place = source / "images.zip"
        with zipfile.ZipFile(place, "w") as archive:
            archive.write(source / "images" / "a.jpg", "a.jpg")
            archive.write(source / "images" / "bad.jpg", "bad.jpg")

    def without_images(*arguments, **options):
        place.rename(source / "away")
        return run_shards(*arguments, **options)

    monkeypatch.setattr(run, "run_local", without_images)
    with pytest.raises(PackError, match=rf"{place}.*the same command again continues"):
        pack_with(source, images=[place], shards=6, workers=workers)
    assert not list((source / "out").glob("*.tar"))
    monkeypatch.undo()
    (source / "away").rename(place)
    pack_with(source, images=[place], shards=6, workers=workers)
    counts = read_manifest(source / "out" / "manifest.json").counts
    assert (counts.packed, counts.set_aside) == (RECORDS - 1, {"image-unrecognised": 1})
