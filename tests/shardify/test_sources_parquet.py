"""Whatever rows a Parquet file has, the records say the same, and their images are the same bytes."""

import datetime as dt
import decimal
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shardify.errors import SourceError
from shardify.prepare import prepare
from shardify.recipes.embedded import ParquetTable
from shardify.sources.open import needs_spool, open_source
from shardify.sources.spec import SourceSpec

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
TURN_TYPE = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(color=0, kind="PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (color, 0, 0)).save(out, kind)
    return out.getvalue()


def opened(path, spool, **fields):
    return open_source(SourceSpec(path=os.fspath(path), **fields), spool=os.fspath(spool))


def records(file) -> list:
    content = Path(file.path).read_bytes()
    return [
        json.loads(content[o : o + n])
        for o, n in zip(file.offsets.tolist(), file.lengths.tolist(), strict=True)
    ]


def images(file) -> list[list[bytes | None]]:
    """Of each record."""
    content = Path(file.embedded.path).read_bytes()
    data = [None if o < 0 else content[o : o + n] for o, n in file.embedded.places.tolist()]
    ends = np.cumsum(file.embedded.counts).tolist()
    return [data[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def write(path: Path, columns: dict, types=(), **options) -> Path:
    fields = dict(types)
    arrays = [pa.array(values, fields.get(name)) for name, values in columns.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(zip(columns, arrays, strict=True))), path, **options)
    return path


def test_the_layout_of_llava_next(tmp_path):
    pictures = [picture(1), picture(2, "JPEG"), None, picture(3)]
    structs = [
        {"bytes": pictures[0], "path": "a/0.png"},
        {"bytes": pictures[1], "path": None},
        None,
        {"bytes": pictures[3], "path": "/home/me/3.png"},
    ]
    path = write(
        tmp_path / "data" / "train-00000-of-00001.parquet",
        {
            "id": ["000000033471", "x", None, "y"],
            "image": structs,
            "conversations": [TURNS] * 4,
            "data_source": ["coco", "", None, "é"],
        },
        {"image": IMAGE_TYPE, "conversations": TURN_TYPE},
        row_group_size=2,
    )
    file = opened(path, tmp_path / "spool")
    found = records(file)
    assert [record.get("image") for record in found] == ["a/0.png", "000000001.jpg", None, "3.png"]
    assert images(file) == [[pictures[0]], [pictures[1]], [], [pictures[3]]]
    assert list(found[0]) == ["id", "image", "conversations", "data_source"]
    assert [record["id"] for record in found] == ["000000033471", "x", None, "y"]
    assert all(record["conversations"] == TURNS for record in found)
    assert file.name == path.name
    assert file.notes == {}
    assert needs_spool(SourceSpec(path=str(path)))
    # a folder and a pattern are the same source
    for source in (tmp_path / "data", tmp_path / "data" / "train-*.parquet"):
        again = opened(source, tmp_path / "spool")
        assert (again.fingerprint, records(again), images(again)) == (file.fingerprint, found, images(file))


def test_lists_of_images(tmp_path):
    a, b = picture(1), picture(2)
    column = [
        [{"bytes": a, "path": "x.png"}, {"bytes": b, "path": None}],
        [{"bytes": a, "path": "y.png"}],
        [],
        None,
        [{"bytes": None, "path": None}],
        [{"bytes": None, "path": "elsewhere.jpg"}, {"bytes": b, "path": "z.png"}],
    ]
    messages = [[{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "!"}]] * len(
        column
    )
    path = write(
        tmp_path / "a.parquet", {"images": column, "messages": messages}, {"images": pa.list_(IMAGE_TYPE)}
    )
    file = opened(path, tmp_path / "spool")
    assert [record.get("image") for record in records(file)] == [
        ["x.png", "000000000.1.png"],
        ["y.png"],
        None,
        None,
        None,
        ["elsewhere.jpg", "z.png"],
    ]
    assert images(file) == [[a, b], [a], [], [], [], [None, b]]
    assert [prepare(json.dumps(record).encode()).notes for record in records(file)] == [
        ("record-messages",)
    ] * 6


def test_lists_of_one_length(tmp_path):
    a, b = picture(1), picture(2)
    pair = [{"bytes": a, "path": "x.png"}, {"bytes": b, "path": "y.png"}]
    columns = {"images": [pair, None, pair], "conversations": [TURNS] * 3}
    path = write(tmp_path / "a.parquet", columns, {"images": pa.list_(IMAGE_TYPE, 2)})
    file = opened(path, tmp_path / "spool")
    assert [record.get("image") for record in records(file)] == [["x.png", "y.png"], None, ["x.png", "y.png"]]
    assert images(file) == [[a, b], [], [a, b]]
    assert file.notes == {}


def test_the_layout_of_the_cauldron(tmp_path):
    a, b = picture(1), picture(2)
    texts = [
        {"user": "Which?", "assistant": "The left.", "source": "NLVR2"},
        {"user": "Sure?", "assistant": "Yes.", "source": "NLVR2"},
    ]
    marked = [{"user": "<image> or <image>?", "assistant": "The left.", "source": "x"}]
    pictures = [{"bytes": a, "path": None}, {"bytes": b, "path": None}]
    columns = {"images": [pictures, [], pictures], "texts": [texts, texts, marked]}
    path = write(tmp_path / "a.parquet", columns, {"images": pa.list_(IMAGE_TYPE)})
    file = opened(path, tmp_path / "spool")
    assert images(file) == [[a, b], [], [a, b]]
    content = Path(file.path).read_bytes()
    prepared = [
        prepare(content[o : o + n]) for o, n in zip(file.offsets.tolist(), file.lengths.tolist(), strict=True)
    ]
    asked = [json.loads(one.raw)["conversations"][0]["value"] for one in prepared]
    assert asked == ["<image>\n<image>\nWhich?", "Which?", "<image> or <image>?"]
    assert json.loads(prepared[0].raw) == {
        "image": ["000000000.0.png", "000000000.1.png"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich?"},
            {"from": "gpt", "value": "The left.", "source": "NLVR2"},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes.", "source": "NLVR2"},
        ],
    }
    assert [one.notes for one in prepared] == [("record-messages",)] * 3


def test_several_columns_of_images_are_not_lost(tmp_path):
    struct = {"bytes": picture(1), "path": None}
    types = {"image_1": IMAGE_TYPE, "image_2": IMAGE_TYPE, "mask": IMAGE_TYPE}
    path = write(tmp_path / "a.parquet", {"image_1": [struct], "image_2": [struct]}, types)
    with pytest.raises(SourceError, match="'image_1', 'image_2'; rename one 'image'"):
        opened(path, tmp_path / "spool")
    columns = {"mask": [struct], "image": [struct], "conversations": [TURNS]}
    file = opened(write(tmp_path / "b.parquet", columns, types | {"image": IMAGE_TYPE}), tmp_path / "spool")
    assert images(file) == [[struct["bytes"]]]
    assert file.notes["field-dropped"].tolist() == [0]


@pytest.mark.parametrize("last", [False, True])
def test_a_picture_takes_the_place_of_a_path(tmp_path, last):
    struct = {"bytes": picture(1), "path": "a.png"}
    columns = {"image": ["b.jpg", "c.jpg", None], "picture": [struct, None, struct]}
    columns = dict(reversed(columns.items())) if last else columns
    path = write(tmp_path / "a.parquet", columns | {"conversations": [TURNS] * 3}, {"picture": IMAGE_TYPE})
    file = opened(path, tmp_path / "spool")
    assert [record["image"] for record in records(file)] == ["a.png", "c.jpg", "a.png"]
    assert images(file) == [[struct["bytes"]], [None], [struct["bytes"]]]
    assert file.notes["field-dropped"].tolist() == [0]


def test_one_large_image_in_every_row_takes_little_memory(tmp_path):
    # of a dictionary, the row group says the size of one
    large = {"bytes": os.urandom(900_000), "path": "a.png"}
    rows = 600
    path = write(
        tmp_path / "a.parquet",
        {"image": [large] * rows, "conversations": [TURNS] * rows},
        {"image": IMAGE_TYPE, "conversations": TURN_TYPE},
    )
    assert path.stat().st_size < 2_000_000
    code = (
        "import resource, sys\n"
        "from shardify.sources.open import open_source\n"
        "from shardify.sources.spec import SourceSpec\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "file = open_source(SourceSpec(path=sys.argv[1]), spool=sys.argv[2])\n"
        "print(len(file.offsets), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "spool")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    count, kib = map(int, done.stdout.split())
    assert count == rows
    assert kib < 300 * 1024


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.list_(pa.binary())])
def test_bare_bytes(tmp_path, kind):
    a = picture(1)
    wrapped = [a] if pa.types.is_list(kind) else a
    path = write(
        tmp_path / "a.parquet", {"image": [wrapped, None], "conversations": [TURNS] * 2}, {"image": kind}
    )
    file = opened(path, tmp_path / "spool")
    assert images(file) == [[a], []]


def test_an_image_of_no_bytes_is_no_missing_one(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        {
            "image": [{"bytes": b"", "path": None}, {"bytes": b"rubbish", "path": None}],
            "conversations": [TURNS] * 2,
        },
        {"image": IMAGE_TYPE},
    )
    file = opened(path, tmp_path / "spool")
    assert [record["image"] for record in records(file)] == ["000000000.bin", "000000001.bin"]
    assert images(file) == [[b""], [b"rubbish"]]


def test_paths_stay_paths(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        {"image": ["a.jpg", None], "conversations": [TURNS] * 2, "images": [["b.jpg"], None]},
        {"images": pa.list_(pa.string())},
    )
    file = opened(path, tmp_path / "spool")
    assert file.embedded is None
    assert records(file)[0] == {"image": "a.jpg", "conversations": TURNS, "images": ["b.jpg"]}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([json.dumps(TURNS)], pa.string()),
        ([TURNS], TURN_TYPE),
        (
            [{name: [turn[name] for turn in TURNS] for name in ("from", "value")}],
            None,
        ),  # as `datasets` writes a Sequence
        ([json.dumps(TURNS)], pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_every_way_to_write_turns(tmp_path, values, kind):
    path = write(tmp_path / "a.parquet", {"conversations": values}, {"conversations": kind} if kind else {})
    assert records(opened(path, tmp_path / "spool")) == [{"conversations": TURNS}]


def test_a_row_that_is_no_record_is_set_aside_later(tmp_path):
    path = write(tmp_path / "a.parquet", {"conversations": ["[oops", None, "text", json.dumps(TURNS)]})
    found = records(opened(path, tmp_path / "spool"))
    assert [record["conversations"] for record in found] == ["[oops", None, "text", TURNS]


def test_values_that_json_has_no_form_for(tmp_path):
    moment = dt.datetime(2024, 2, 29, 12, 30, 0, 5, tzinfo=dt.UTC)
    columns = {
        "conversations": [TURNS] * 2,
        "when": pa.array([moment, None], pa.timestamp("us", "UTC")),
        "nano": pa.array([1_700_000_000_000_000_001, None], pa.timestamp("ns")),
        "day": [moment.date(), None],
        "price": [decimal.Decimal("1.10"), None],
        "score": [float("nan"), 0.5],
        "half": pa.array(np.array([1.5, np.inf], np.float16)),
        "feature": [b"\x00\x01", None],
        "nested": [{"a": [b"x", None], "b": 1}, {"a": None, "b": None}],
        "map": pa.array([[("k", 1.0)], None], pa.map_(pa.string(), pa.float64())),
        "kind": pa.array(["x", None]).dictionary_encode(),
        "big": pa.array([2**64 - 1, None], pa.uint64()),
        "lasts": pa.array([5, None], pa.duration("s")),
        "box": pa.array([[0.25, 1.0], None], pa.list_(pa.float32(), 2)),
        "none": pa.nulls(2),
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    file = opened(path, tmp_path / "spool")
    first, second = records(file)
    assert first == {
        "conversations": TURNS,
        "when": "2024-02-29T12:30:00.000005Z",
        "nano": "2023-11-14T22:13:20.000000001",
        "day": "2024-02-29",
        "price": "1.10",
        "score": None,
        "half": 1.5,
        "feature": None,
        "nested": {"a": [None, None], "b": 1},
        "map": [{"key": "k", "value": 1.0}],
        "kind": "x",
        "big": 2**64 - 1,
        "lasts": 5,
        "box": [0.25, 1.0],
        "none": None,
    }
    assert second == {
        **dict.fromkeys(columns),
        "conversations": TURNS,
        "score": 0.5,
        "nested": {"a": None, "b": None},
    }
    assert {code: rows.tolist() for code, rows in file.notes.items()} == {"field-dropped": [0, 1]}


def test_a_text_that_is_not_utf8_is_kept(tmp_path):
    values = pa.array([b"caf\xe9", b"ok"], pa.binary()).view(pa.string())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"conversations": [TURNS] * 2, "x": values}), path)
    found = records(opened(path, tmp_path / "spool"))
    assert [record["x"].encode("utf-8", "surrogateescape") for record in found] == [b"caf\xe9", b"ok"]


def test_files_of_one_source_may_differ(tmp_path):
    write(tmp_path / "p" / "0.parquet", {"id": [1], "conversations": [TURNS]})
    write(tmp_path / "p" / "b" / "1.parquet", {"conversations": [TURNS], "id": ["1"], "more": [[1, 2]]})
    write(tmp_path / "p" / ".cache" / "2.parquet", {"id": [3]})
    assert records(opened(tmp_path / "p", tmp_path / "spool")) == [
        {"id": 1, "conversations": TURNS},
        {"conversations": TURNS, "id": "1", "more": [1, 2]},
    ]


def test_broken_files_are_named(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        {
            "image": [{"bytes": os.urandom(5000), "path": f"{n}.png"} for n in range(50)],
            "conversations": [TURNS] * 50,
        },
        row_group_size=10,
    )
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"PAR1", b"", b"PAR1" + bytes(100) + b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=r"a\.parquet: no Parquet file, or damaged"):
            opened(path, tmp_path / "spool")
    damaged = bytearray(whole)
    damaged[40_000:41_000] = bytes(
        1000
    )  # inside the image bytes: no checksum says so, and it is the image's fault
    path.write_bytes(damaged)
    assert len(records(opened(path, tmp_path / "spool"))) == 50
    start = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(2).column(0).data_page_offset
    damaged[start : start + 40] = b"\xff" * 40
    path.write_bytes(damaged)
    with pytest.raises(SourceError, match=r"a\.parquet: row group 2 cannot be read from row 20 on"):
        opened(path, tmp_path / "spool")


def test_any_damage_is_a_clear_refusal_or_none(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        {
            "image": [{"bytes": b"x" * 50, "path": "a.jpg"}] * 20,
            "conversations": [TURNS] * 20,
        },
        {"image": IMAGE_TYPE, "conversations": TURN_TYPE},
        row_group_size=7,
        store_schema=False,
    )
    whole = path.read_bytes()
    named = 0
    # the names in the file's own words; a byte of each is made no UTF-8
    places = [at for name in (b"image", b"bytes", b"value") for at in _all_of(whole, name)]
    for at in [*places, *np.random.default_rng(0).integers(len(whole) - 1500, len(whole), 150).tolist()]:
        damaged = bytearray(whole)
        damaged[at] = 0xFF
        path.write_bytes(damaged)
        for read in (
            lambda: opened(path, tmp_path / "spool"),
            lambda: list(ParquetTable(os.fspath(path)).images(range(20))),
        ):
            try:
                read()
            except SourceError as error:
                named += 1
                assert str(path) in str(error)
    assert named >= len(places)


def _all_of(content, name):
    at = -1
    while (at := content.find(name, at + 1)) >= 0:
        yield at


def test_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["id", "id"]), path)
    with pytest.raises(SourceError, match="two columns are named 'id'"):
        opened(path, tmp_path / "spool")


TEXT = st.text(max_size=8)
VALUE = st.none() | TEXT
IMAGE = st.none() | st.fixed_dictionaries(
    {"bytes": st.none() | st.binary(max_size=30), "path": st.none() | st.sampled_from(["a.jpg", "b/c.png"])}
)
ROW = st.fixed_dictionaries(
    {
        "id": VALUE,
        "images": st.none() | st.lists(IMAGE, max_size=3),
        "conversations": st.none()
        | st.lists(st.fixed_dictionaries({"from": TEXT, "value": TEXT}), max_size=3),
        "scores": st.none() | st.lists(st.none() | st.integers(-(2**40), 2**40), max_size=3),
        "extra": st.none()
        | st.fixed_dictionaries({"a": st.none() | st.booleans(), "b": st.lists(VALUE, max_size=2)}),
    }
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(IMAGE_TYPE)),
        ("conversations", TURN_TYPE),
        ("scores", pa.list_(pa.int64())),
        ("extra", pa.struct([("a", pa.bool_()), ("b", pa.list_(pa.string()))])),
    ]
)


@settings(max_examples=60)
@given(rows=st.lists(ROW, min_size=1, max_size=6), group=st.integers(1, 6))
def test_whatever_goes_in_comes_out(tmp_path, rows, group):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=group)
    file = opened(path, tmp_path / "spool")
    found = records(file)
    assert len(found) == len(rows)
    for row, record in zip(rows, found, strict=True):
        assert {name: record[name] for name in ("id", "conversations", "scores", "extra")} == {
            name: value for name, value in row.items() if name != "images"
        }
        given_images = [image or {"bytes": None, "path": None} for image in row["images"] or []]
        if any(image["path"] or image["bytes"] is not None for image in given_images):
            assert [
                path for path, image in zip(record["image"], given_images, strict=True) if image["path"]
            ] == [image["path"] for image in given_images if image["path"]]
        else:
            assert "image" not in record
    if file.embedded is None:
        assert not any(
            image and image["bytes"] is not None
            for row in rows
            if row["conversations"]
            for image in row["images"] or []
        )
        return
    for row, data in zip(rows, images(file), strict=True):
        if row["conversations"]:  # of the others nothing will be packed
            here = [image["bytes"] if image else None for image in row["images"] or []]
            named = any(image and image["path"] for image in row["images"] or [])
            assert data == (here if named or any(item is not None for item in here) else [])
    # what the packer relies on: as many places as the record has images
    for record, count in zip(found, file.embedded.counts.tolist(), strict=True):
        if record["conversations"]:
            assert count == len(prepare(json.dumps(record).encode()).sample.images)
