"""Sources of every kind are packed together; what came with them lies in the shards byte for byte, and all of it is accounted for."""

import importlib.util
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from PIL import Image

from shardify.convert import PackOptions, pack_dataset
from shardify.errors import PackError
from shardify.sources.open import open_source
from shardify.sources.spec import Captions, SourceSpec

_spec = importlib.util.spec_from_file_location("s3", Path(__file__).parent / "s3.py")
s3 = importlib.util.module_from_spec(_spec)
sys.modules["s3"] = s3
_spec.loader.exec_module(s3)

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def picture(color, kind="PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (color, 0, 0)).save(out, kind)
    return out.getvalue()


def samples(out) -> dict:
    """Id -> (images, record)."""
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            members = {info.name: archive.extractfile(info).read() for info in archive}
        for name, data in members.items():
            if name.endswith(".json"):
                key = name.partition(".")[0]
                images = [other for at, other in members.items() if at.startswith(f"{key}.") and at != name]
                record = json.loads(data)
                found[record["id"]] = (images, record)
    return found


@pytest.fixture
def sources(tmp_path):
    """Five sources, and the images that each id should have."""
    (tmp_path / "images").mkdir()
    for name, color in (("here.png", 1), ("0.png", 2)):
        (tmp_path / "images" / name).write_bytes(picture(color))
    rows = [
        {"id": "p0", "image": [{"bytes": picture(10), "path": "x.png"}, {"bytes": None, "path": "here.png"}]},
        {"id": "p1", "image": [{"bytes": picture(11), "path": None}]},
        {"id": "p2", "image": None},
        {
            "id": "p3",
            "image": [{"bytes": picture(12), "path": "y.png"}, {"bytes": None, "path": "nowhere.png"}],
        },
        {"id": "p4", "image": [{"bytes": picture(13)[:40], "path": "z.png"}]},
    ]
    kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = {
        "id": [row["id"] for row in rows],
        "image": pa.array([row["image"] for row in rows], kind),
        "conversations": [TURNS] * 4 + [TURNS],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name, data in (
            ("t0.png", picture(20)),
            ("t0.json", json.dumps(TURNS).encode()),
            ("t1.json", b"[oops"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    lines = [
        {"id": "z0", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    ]
    content = b"\n".join(
        json.dumps(line).encode() for line in [*lines, {"id": "z1", "video": "a.mp4", "conversations": TURNS}]
    )
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    (tmp_path / "d.json").write_text(
        json.dumps([{"id": f"c{n}", "image": "0.png", "conversations": TURNS} for n in range(2)])
    )
    (tmp_path / "m.json").write_text(json.dumps([{"image": "0.png", "blip_caption": "a blip"}]))
    (tmp_path / "e").mkdir()
    for name in ("system_message.txt", "000_caps.txt", "000_conv.txt"):
        (tmp_path / "e" / name).write_text(name)
    names = ("a.parquet", "b.tar", "c.jsonl.zst", "e")
    specs = [SourceSpec(path=os.fspath(tmp_path / name), name=name) for name in names]
    captions = Captions(path=os.fspath(tmp_path / "m.json"))
    specs.append(SourceSpec(path=os.fspath(tmp_path / "d.json"), name="d.json", captions=captions))
    return specs


def test_every_kind_together(tmp_path, sources):
    def pack(out):
        options = PackOptions(
            sources=sources,
            images=[tmp_path / "images"],
            out=tmp_path / out,
            max_bad="100%",
            workers=1,
            shards=2,
        )
        pack_dataset(options)
        return {path.name: path.read_bytes() for path in (tmp_path / out).iterdir() if path.is_file()}

    first = pack("out")
    found = samples(tmp_path / "out")
    assert {name: images for name, (images, _) in found.items()} == {
        "p0": [picture(10), picture(1)],
        "p1": [picture(11)],
        "p2": [],
        "t0": [picture(20)],
        "z0": [],
        "e/000": [],
        "c0": [picture(2)],
        "c1": [picture(2)],
    }
    assert found["c1"][1]["conversations"][1]["value"] == "a blip"
    assert found["z0"][1]["conversations"][1] == {"from": "gpt", "value": "!"}
    counts = json.loads(first["manifest.json"])["counts"]
    assert counts["set_aside"] == {
        "image-missing": 1,
        "image-truncated": 1,
        "record-not-json": 1,
        "record-video": 1,
    }
    assert counts["records_in"] == counts["packed"] + 4 == 12
    assert counts["notes"]["record-messages"] == 1
    assert not any(path.suffix in (".records", ".images") for path in (tmp_path / "out").rglob("*"))
    assert pack("again") == first


def test_sources_on_an_object_store(tmp_path, sources, monkeypatch):
    names = ("a.parquet", "b.tar", "c.jsonl.zst", "d.json")
    with s3.running_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.client.create_bucket(Bucket="bucket")
        for name in names:
            server.client.put_object(Bucket="bucket", Key=f"in/{name}", Body=(tmp_path / name).read_bytes())
        for name, local in zip(
            names, (*sources[:3], SourceSpec(path=os.fspath(tmp_path / "d.json"))), strict=True
        ):
            here = open_source(local, spool=os.fspath(tmp_path / "here"))
            there = open_source(
                SourceSpec(path=f"s3://bucket/in/{name}"), spool=os.fspath(tmp_path / "there")
            )
            assert there.name == name
            assert there.fingerprint == here.fingerprint
            assert there.lengths.tolist() == here.lengths.tolist()
            assert (there.embedded is None) == (here.embedded is None)
        tars = open_source(SourceSpec(path="s3://bucket/in/{b,b}.tar"), spool=os.fspath(tmp_path / "there"))
        assert len(tars.offsets) == 4
        with pytest.raises(PackError, match="none"):
            open_source(SourceSpec(path="s3://bucket/in/none.json"), spool=os.fspath(tmp_path / "there"))
