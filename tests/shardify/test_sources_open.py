"""Any source becomes records in place: the right kind is found, what was said is kept, and what is broken is named."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard

from shardify.errors import SourceError, UsageError
from shardify.prepare import prepare
from shardify.sources import compressed
from shardify.sources.llava import open_unchanged
from shardify.sources.open import needs_spool, open_source
from shardify.sources.spec import Captions, SourceSpec

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
RECORDS = [{"id": f"{n}", "image": f"{n}.jpg", "conversations": TURNS, "x": "é" * n} for n in range(50)]


def opened(path, spool, **fields):
    return open_source(SourceSpec(path=os.fspath(path), **fields), spool=os.fspath(spool))


def raws(file) -> list[bytes]:
    os.close(open_unchanged(file.path, file.stamp))
    content = Path(file.path).read_bytes()
    return [content[o : o + n] for o, n in zip(file.offsets.tolist(), file.lengths.tolist(), strict=True)]


def records(file) -> list:
    return [json.loads(raw) for raw in raws(file)]


def lines(values) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def compress(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "records.txt"])
def test_json_stays_where_it_is(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(json.dumps(RECORDS).encode() if name == "a.json" else lines(RECORDS))
    file = opened(path, tmp_path / "spool")
    assert (file.path, file.name, records(file)) == (str(path), name, RECORDS)
    assert not needs_spool(SourceSpec(path=str(path)))
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize("array", [True, False])
def test_zstd(tmp_path, array):
    content = json.dumps(RECORDS).encode() if array else lines(RECORDS)
    path = tmp_path / ("a.json.zst" if array else "a.jsonl.zst")
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    path.write_bytes(compress(content[:100]) + skippable + compress(content[100:]))  # as pzstd writes it
    file = opened(path, tmp_path / "spool")
    assert records(file) == RECORDS
    assert file.name == path.name
    assert file.fingerprint == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert needs_spool(SourceSpec(path=str(path)))
    # the same files again, byte for byte
    before = {item: item.read_bytes() for item in (tmp_path / "spool").iterdir()}
    assert records(opened(path, tmp_path / "spool")) == RECORDS
    assert {item: item.read_bytes() for item in (tmp_path / "spool").iterdir()} == before


@pytest.mark.parametrize("cut", [3, 9, 30, -1])
def test_zstd_that_is_cut_off_or_damaged(tmp_path, cut):
    whole = compress(lines(RECORDS))
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(whole[:cut])
    with pytest.raises(SourceError, match=r"a\.jsonl\.zst: (cut off|no zstd file)"):
        opened(path, tmp_path / "spool")
    path.write_bytes(whole[:20] + b"\xff" * 8 + whole[28:])
    with pytest.raises(SourceError, match=r"a\.jsonl\.zst: "):
        opened(path, tmp_path / "spool")
    path.write_bytes(whole + b"what?")
    with pytest.raises(SourceError, match=r"damaged, near byte"):
        opened(path, tmp_path / "spool")


def test_a_zstd_bomb_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "_SMALL", 2**20)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(b"\n" * 2**26))
    assert path.stat().st_size < 10_000
    with pytest.raises(SourceError, match="a bomb"):
        opened(path, tmp_path / "spool")
    assert sum(item.stat().st_size for item in (tmp_path / "spool").iterdir()) < 2**24


def test_errors_of_a_compressed_file_name_it_and_not_its_copy(tmp_path):
    path = tmp_path / "a.json.zst"
    path.write_bytes(compress(b'{"images": []}'))
    with pytest.raises(SourceError, match=r"/a\.json\.zst: not an array"):
        opened(path, tmp_path / "spool")


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compress(lines(RECORDS)))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(SourceError, match=r"needs .* GiB, and 0\.00 GiB are free"):
        opened(path, tmp_path / "spool")


def test_two_sources_of_one_name_do_not_meet_in_the_spool(tmp_path):
    for folder, chosen in (("a", RECORDS[:3]), ("b", RECORDS[3:])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl.zst").write_bytes(compress(lines(chosen)))
    files = [opened(tmp_path / folder / "x.jsonl.zst", tmp_path / "spool") for folder in "ab"]
    assert [record for file in files for record in records(file)] == RECORDS


def test_what_is_refused(tmp_path):
    with pytest.raises(SourceError, match="no such file"):
        opened(tmp_path / "none.json", tmp_path / "spool")
    with pytest.raises(UsageError, match="no kind of source is called 'csv'"):
        opened(tmp_path / "none.json", tmp_path / "spool", kind="csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="a folder without"):
        opened(tmp_path / "empty", tmp_path / "spool")
    with pytest.raises(SourceError, match="names 10000000000 files"):
        opened(tmp_path / "{0..9999999999}.tar", tmp_path / "spool")
    for kind in ("parquet", "webdataset", "prompts", "llava"):
        with pytest.raises(SourceError):
            opened(tmp_path / "none", tmp_path / "spool", kind=kind)
        with pytest.raises(SourceError):
            opened(tmp_path / "empty", tmp_path / "spool", kind=kind)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(b'[{"id": 1}]', mtime=0), "compressed with gzip"),
        (b"PK\x03\x04" + bytes(40), "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1030000000\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.tar"])
def test_what_people_have_in_a_files_place_is_told(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{name}: {what}"):
        opened(tmp_path / name, tmp_path / "spool")


def test_a_pattern_that_nothing_matches(tmp_path):
    for name in ("a*.parquet", "a.tar", "[ab].json"):
        with pytest.raises(SourceError, match="no such file"):
            opened(tmp_path / name, tmp_path / "spool")


def prompts(folder: Path, pairs) -> Path:
    folder.mkdir(parents=True)
    (folder / "system_message.txt").write_text("You are an AI.")
    for name, text in pairs.items():
        (folder / name).write_text(text)
    return folder


def test_prompt_folders(tmp_path):
    answer = "Question:\nWhat?\n===\nAnswer:\nA cat. \n"
    prompts(
        tmp_path / "p" / "conversation",
        {"000_caps.txt": "A cat.\n", "000_conv.txt": answer, "abc_caps.txt": "é"},
    )
    prompts(tmp_path / "p" / "detail", {"000_caps.txt": "x", "000_conv.txt": "y", "readme.md": "z"})
    found = records(opened(tmp_path / "p", tmp_path / "spool"))
    assert [record["id"] for record in found] == ["conversation/000", "conversation/abc", "detail/000"]
    assert found[0]["conversations"] == [
        {"from": "human", "value": "You are an AI.\n\nA cat.\n"},
        {"from": "gpt", "value": answer},
    ]
    # a half of a pair is a record too, and set aside
    assert found[1] == {"id": "conversation/abc", "missing": "abc_conv.txt", "conversations": []}
    one = opened(tmp_path / "p" / "detail", tmp_path / "spool", kind="prompts")
    assert [record["id"] for record in records(one)] == ["detail/000"]


def test_broken_prompt_folders(tmp_path):
    folder = prompts(tmp_path / "a", {"000_caps.txt": "x", "000_conv.txt": "y"})
    (folder / "000_caps.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match=r"000_caps\.txt: not UTF-8, at byte 3"):
        opened(folder, tmp_path / "spool")
    with pytest.raises(SourceError, match="without pairs"):
        opened(prompts(tmp_path / "b", {}), tmp_path / "spool")


def test_llavas_own_prompts(real_data, tmp_path):
    folder = real_data / "llava_repo" / "playground" / "data" / "prompts"
    found = records(opened(folder, tmp_path))
    assert len(found) == len(list(folder.glob("*/*_conv.txt"))) == 8
    for record in found:
        kind, number = record["id"].split("/")
        human, answer = (turn["value"] for turn in record["conversations"])
        assert answer == (folder / kind / f"{number}_conv.txt").read_text(encoding="utf-8")
        assert human.endswith((folder / kind / f"{number}_caps.txt").read_text(encoding="utf-8"))
        assert human.startswith((folder / kind / "system_message.txt").read_text(encoding="utf-8"))
        assert prepare(json.dumps(record).encode()).sample.images == ()


def test_captions(tmp_path):
    metadata = [
        {"image": "0.jpg", "caption": "raw", "blip_caption": "a blip"},
        {"image": "1.jpg", "caption": "raw", "blip_caption": None},
        {"image": "2.jpg", "caption": "raw"},
        {"image": "3.jpg", "blip_caption": "  "},
        {"image": "4.jpg", "blip_caption": 'of "4"'},
        {"id": "no image"},
    ]
    text_only = {"id": "t", "conversations": TURNS}
    source, meta = tmp_path / "chat.json", tmp_path / "metadata.json"
    bad = b'{"id": '
    source.write_bytes(lines([*RECORDS[:6], text_only]) + bad)
    meta.write_bytes(json.dumps(metadata).encode())
    file = opened(source, tmp_path / "spool", captions=Captions(path=str(meta)))
    before, after = raws(opened(source, tmp_path)), raws(file)
    assert [json.loads(raw)["conversations"][1]["value"] for raw in after[:6]] == [
        "a blip",
        "A cat.",
        "A cat.",
        "A cat.",
        'of "4"',
        "A cat.",
    ]
    assert [n for n in range(8) if before[n] == after[n]] == [1, 2, 3, 5, 6, 7]
    assert {code: numbers.tolist() for code, numbers in file.notes.items()} == {"caption-kept": [1, 2, 3, 5]}
    assert list(json.loads(after[0])) == list(RECORDS[0])
    assert file.name == "chat.json"
    assert needs_spool(SourceSpec(path=str(source), captions=Captions(path=str(meta))))
    # other captions make it another source
    meta.write_bytes(json.dumps([{"image": "0.jpg", "blip_caption": "b"}]).encode())
    assert (
        opened(source, tmp_path / "spool", captions=Captions(path=str(meta))).fingerprint != file.fingerprint
    )
    with pytest.raises(SourceError, match=r"metadata\.json: no entry has the text 'file'"):
        opened(source, tmp_path / "spool", captions=Captions(path=str(meta), key="file"))


def test_a_record_in_another_schema_keeps_its_note_when_its_caption_changes(tmp_path):
    source, meta = tmp_path / "a.jsonl", tmp_path / "m.json"
    source.write_bytes(lines([{"input_image": "x/0.jpg", "conversations": TURNS}]))
    meta.write_bytes(json.dumps([{"image": "0.jpg", "blip_caption": "b"}]).encode())
    file = opened(source, tmp_path / "spool", captions=Captions(path=str(meta)))
    assert records(file)[0]["conversations"][1]["value"] == "b"
    assert {code: numbers.tolist() for code, numbers in file.notes.items()} == {"record-image-field": [0]}
    assert file.offsets.dtype == file.lengths.dtype == np.int64
