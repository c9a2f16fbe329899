"""WebDataset tars of any origin: every sample is one record, as webdataset divides them; what no tar reader notices is found."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shardify.errors import SourceError
from shardify.prepare import prepare
from shardify.sources import tars
from shardify.sources.open import needs_spool, open_source
from shardify.sources.spec import SourceSpec

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def picture(color=0, kind="JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (color, 0, 0)).save(out, kind)
    return out.getvalue()


A, B, C = picture(1), picture(100, "PNG"), picture(200)


def write(path: Path, members, *, layout=tarfile.USTAR_FORMAT) -> Path:
    """Members are (name, bytes or JSON value)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as archive:
        for name, value in members:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def opened(path, spool, **fields):
    return open_source(SourceSpec(path=os.fspath(path), **fields), spool=os.fspath(spool))


def raws(file) -> list[bytes]:
    content = Path(file.path).read_bytes()
    return [content[o : o + n] for o, n in zip(file.offsets.tolist(), file.lengths.tolist(), strict=True)]


def records(file) -> list:
    return [json.loads(raw) for raw in raws(file)]


def images(file) -> list[list[bytes | None]]:
    content = Path(file.embedded.path).read_bytes()
    data = [None if o < 0 else content[o : o + n] for o, n in file.embedded.places.tolist()]
    ends = np.cumsum(file.embedded.counts).tolist()
    return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def dropped(file) -> list[int]:
    return file.notes["field-dropped"].tolist() if file.notes else []


def test_this_projects_own_shards(tmp_path):
    raw = b'{"id": 7,  "image": "a/b.jpg", "conversations": [{"from": "human", "value": "?"}], "x": 1.50}'
    several = {"id": "8", "image": ["a.jpg", "b.png"], "conversations": TURNS}
    members = [
        ("000000000.jpg", A),
        ("000000000.json", raw),
        ("000000001.0.jpg", A),
        ("000000001.1.png", B),
        ("000000001.json", several),
        ("000000002.json", {"id": "9", "conversations": TURNS}),
    ]
    file = opened(write(tmp_path / "000.tar", members), tmp_path / "spool")
    assert raws(file)[0] == raw
    assert records(file)[1:] == [several, members[-1][1]]
    assert images(file) == [[A], [A, B], []]
    assert dropped(file) == []
    assert needs_spool(SourceSpec(path=str(tmp_path / "000.tar")))


def test_megatrons_convention(tmp_path):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    path = write(tmp_path / "a.tar", [("VG/1.jpg", A), ("VG/1.json", TURNS), ("x.json", messages)])
    file = opened(path, tmp_path / "spool")
    assert records(file) == [
        {"id": "VG/1", "image": "VG/1.jpg", "conversations": TURNS},
        {"id": "x", "messages": messages},
    ]
    assert images(file) == [[A], []]


def test_img2datasets_layout(tmp_path):
    meta = {"caption": "a cat", "url": "http://x/1.jpg", "key": "000000001", "width": 4, "exif": "{}"}
    members = [
        *(("000000001.jpg", A), ("000000001.txt", "a cat é".encode()), ("000000001.json", meta)),
        *(("000000002.webp", B), ("000000002.json", {**meta, "id": 5})),
        *(("000000003.png", C), ("000000003.txt", b"only a text")),
        ("000000004.jpg", A),
    ]
    file = opened(write(tmp_path / "00000.tar", members), tmp_path / "spool")
    found = records(file)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a cat é"}]
    assert found[0] == {"id": "000000001", "image": "000000001.jpg", "conversations": turns, **meta}
    assert list(found[0])[:3] == ["id", "image", "conversations"]
    assert (found[1]["id"], found[1]["image"], found[1]["conversations"][1]["value"]) == (
        5,
        "000000002.webp",
        "a cat",
    )
    assert found[2]["conversations"][1]["value"] == "only a text"
    assert found[3] == {"id": "000000004", "image": "000000004.jpg"}  # no caption: to be set aside
    assert images(file) == [[A], [B], [C], []]
    # its tables beside the tars are no source of their own
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    assert records(opened(tmp_path, tmp_path / "spool")) == found


def test_keys_and_fields_are_webdatasets(tmp_path):
    members = [
        ("./a.b/c.JPG", A),
        ("./a.b/c.json", {"conversations": TURNS}),
        ("bar_00157767.png.jpg", A),
        ("bar_00157767.png.json", {"conversations": TURNS}),
        (".hidden.jpg", B),
        ("__meta__", b"x"),
        ("README", b"x"),
        ("a/c.jpg", B),
        ("a/c.json", {"id": None, "conversations": TURNS}),
    ]
    path = write(tmp_path / "a.tar", members)
    file = opened(path, tmp_path / "spool")
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
    assert [record["id"] for record in records(file)] == keys
    assert len(keys) == 3
    # a field `png.json` is no record; it is kept as the text that it is
    assert records(file)[1] == {
        "id": "bar_00157767",
        "image": "bar_00157767.png.jpg",
        "png.json": json.dumps(members[3][1]),
    }
    assert images(file) == [[A], [], [B]]


def test_images_are_matched_to_what_the_record_names(tmp_path):
    def record(*paths):
        return {"id": "1", "image": list(paths) if len(paths) > 1 else paths[0], "conversations": TURNS}

    members = [
        *(("0.10.jpg", A), ("0.2.png", B), ("0.json", record("2.png", "10.jpg"))),  # numbers, not letters
        *(("1.seg.png", B), ("1.jpg", A), ("1.json", record("x/y.JPEG"))),  # one image: the format says which
        *(("2.jpg", A), ("2.json", record("here/2.jpg", "elsewhere.jpg"))),
        *(("3.json", record("elsewhere.jpg")),),
        *(("4.left.jpg", A), ("4.right.jpg", B), ("4.json", {"id": "1", "conversations": TURNS})),
        # tar(1) had them in the order of their names, the record in its own
        *(("5.after.jpg", A), ("5.before.jpg", B), ("5.json", record("x/5.before.jpg", "x/5.after.jpg"))),
    ]
    file = opened(write(tmp_path / "a.tar", members), tmp_path / "spool")
    assert images(file) == [[B, A], [A], [A, None], [None], [A, B], [B, A]]
    assert records(file)[4]["image"] == ["4.left.jpg", "4.right.jpg"]
    assert dropped(file) == [1]


def test_other_members_are_kept_or_counted(tmp_path):
    members = [
        *(
            ("0.jpg", A),
            ("0.json", {"id": 1, "conversations": TURNS, "cls": 2}),
            ("0.cls", b"3"),
            ("0.ocr.txt", b"text"),
        ),
        *(
            ("1.jpg", A),
            ("1.json", {"id": 1, "conversations": TURNS}),
            ("1.npy", b"\x93NUMPY\0"),
            ("1.pyd", b"\x80\x04N."),
        ),
        *(("2.mp4", b"\0"), ("2.json", {"id": 1, "conversations": TURNS})),
        *(("3.wav", b"\0"), ("3.txt", b"hello")),
    ]
    file = opened(write(tmp_path / "a.tar", members), tmp_path / "spool")
    found = records(file)
    assert found[0] == {"id": 1, "image": "0.jpg", "conversations": TURNS, "cls": 2, "ocr.txt": "text"}
    assert dropped(file) == [1]
    for raw, code in zip(raws(file)[2:], ["record-video", "record-audio"], strict=True):
        with pytest.raises(Exception, match=code):
            prepare(raw)


def test_what_is_no_record_is_set_aside_later(tmp_path):
    members = [
        ("0.jpg", A),
        ("0.json", b'{"id": \n'),
        ("1.json", b"3"),
        ("2.json", b'{"conversations": [], "x": NaN}'),
    ]
    file = opened(write(tmp_path / "a.tar", members), tmp_path / "spool")
    assert raws(file) == [b'{"id": \n', b"3", b'{"conversations": [], "x": NaN}']


def test_a_record_nested_as_deeply_as_can_be_read_is_one_bad_record(tmp_path):
    members = []
    for levels in range(800, 1001):
        raw = b'{"a": null, "conversations": [], "deep": ' + b"[" * levels + b"]" * levels + b"}"
        members += [(f"{levels}.jpg", A), (f"{levels}.json", raw)]
    file = opened(write(tmp_path / "a.tar", members), tmp_path / "spool")
    assert len(raws(file)) == len(members) // 2


def test_several_tars_are_one_source(tmp_path):
    for number in range(3):
        write(
            tmp_path / "s" / f"{number:03d}.tar",
            [("a.jpg", A), ("a.json", {"id": number, "conversations": TURNS})],
        )
    plain = (tmp_path / "s" / "002.tar").read_bytes()
    (tmp_path / "s" / "002.tar").unlink()
    (tmp_path / "s" / "002.tar.zst").write_bytes(zstandard.ZstdCompressor().compress(plain))
    file = opened(tmp_path / "s", tmp_path / "spool")
    assert [record["id"] for record in records(file)] == [0, 1, 2]
    assert images(file) == [[A]] * 3
    braces = opened(tmp_path / "s" / "{000..001}.tar", tmp_path / "spool")
    assert [record["id"] for record in records(braces)] == [0, 1]
    with pytest.raises(SourceError, match=r"002\.tar: cannot be read \(No such file"):
        opened(tmp_path / "s" / "{000..002}.tar", tmp_path / "spool")


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format(tmp_path, layout):
    name = "x" * 90 if layout == tarfile.USTAR_FORMAT else "é" * 200
    path = write(
        tmp_path / "a", [(f"{name}.jpg", A), (f"{name}.json", {"conversations": TURNS})], layout=layout
    )
    assert records(opened(path, tmp_path / "spool"))[0]["id"] == name


def test_damage_is_named_with_its_place(tmp_path):
    members = [(f"{n}.{field}", value) for n in range(4) for field, value in (("jpg", A), ("json", TURNS))]
    path = write(tmp_path / "a.tar", members)
    whole = path.read_bytes()
    second, end = whole.index(b"ustar", 512) - 257, whole.rindex(b"ustar") - 257
    cases = [
        (whole[: end + 100], "at byte"),  # inside a header
        (whole[: end + 520], "is cut off"),  # inside data
        (whole[:end], "before the end-of-archive mark, at byte"),  # between members: tar readers say nothing
        (whole[:second] + b"\xff" * 512 + whole[second + 512 :], f"at byte {second}"),  # likewise
        (b"\xff" * 2048, "no tar, or damaged, at byte 0"),
        (b"", "no tar, or damaged, at byte 0"),
    ]
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(SourceError, match=f"a\\.tar: .*{message}"):
            opened(path, tmp_path / "spool")


def test_two_members_of_one_name(tmp_path):
    path = write(tmp_path / "a.tar", [("1.jpg", A), ("1.json", TURNS), ("1.jpg", B)])
    with pytest.raises(
        SourceError, match=r"a\.tar: webdataset cannot divide it into samples \(1\.jpg: duplicate"
    ):
        opened(path, tmp_path / "spool")


def test_members_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_MEMBER_BYTES", 100)
    path = write(tmp_path / "a.tar", [("1.jpg", A)])
    with pytest.raises(
        SourceError, match=r"member '1\.jpg' at byte 0 is a sparse file or larger than 100 bytes"
    ):
        opened(path, tmp_path / "spool")


FIELDS = st.sampled_from(["jpg", "png", "0.jpg", "1.png", "txt", "json", "cls", "npy"])
SAMPLES = st.lists(st.sets(FIELDS, min_size=1, max_size=5), min_size=1, max_size=5)


@settings(max_examples=60)
@given(samples=SAMPLES, turns=st.sampled_from([TURNS, [], "no", None]))
def test_every_sample_is_one_record(tmp_path, samples, turns):
    contents = {"json": {"id": "x", "conversations": turns}, "txt": b"text", "cls": b"1", "npy": b"\0"}
    members = [
        (f"{number}.{field}", contents.get(field, b"%d %s" % (number, field.encode())))
        for number, fields in enumerate(samples)
        for field in sorted(fields)
    ]
    file = opened(write(tmp_path / "a.tar", members), tmp_path / "spool")
    assert len(file.offsets) == len(samples)
    if file.embedded is None:
        return
    for number, (fields, raw, data) in enumerate(zip(samples, raws(file), images(file), strict=True)):
        try:
            count = len(prepare(raw).sample.images)
        except Exception:
            count = 0
        assert len(data) == count
        if count:
            assert sorted(data) == sorted(
                b"%d %s" % (number, field.encode()) for field in fields if field[-3:] in ("jpg", "png")
            )
