"""Record files are split into exactly the records a JSON reader would find, and one bad record stays one bad record."""

import json
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shardify.errors import SourceError, UsageError
from shardify.sources.llava import record_names, split_array_fast, split_array_tolerant, split_records

TEXT = st.text(st.sampled_from('ab"\\[]{},: \n\t\r/éß\u2028😀'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
LAYOUTS = st.sampled_from(
    [
        {},
        {"indent": 2},
        {"separators": (",", ":")},
        {"ensure_ascii": False},
        {"indent": "\t", "ensure_ascii": False},
    ]
)


def slices(path: Path) -> list[bytes]:
    content = path.read_bytes()
    file = split_records(path)
    return [content[o : o + n] for o, n in zip(file.offsets.tolist(), file.lengths.tolist(), strict=True)]


@given(
    values=st.lists(VALUES, max_size=8),
    layout=LAYOUTS,
    chunk=st.integers(1, 40),
    around=st.sampled_from(["", " ", "\n\t"]),
)
def test_both_splitters_agree_with_a_json_reader(values, layout, chunk, around):
    content = f"{around}{json.dumps(values, **layout)}{around}".encode()
    begin = content.index(b"[")
    expected = [json.dumps(value) for value in values]
    found = []
    for offsets, lengths in (
        split_array_fast(content, begin),
        split_array_tolerant(content, begin, path="x", chunk=chunk),
    ):
        pieces = [content[o : o + n] for o, n in zip(offsets.tolist(), lengths.tolist(), strict=True)]
        assert [json.dumps(json.loads(piece)) for piece in pieces] == expected
        assert all(piece == piece.strip() for piece in pieces)
        found.append(pieces)
    assert found[0] == found[1]


@given(
    records=st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=8),
    blank=st.booleans(),
    crlf=st.booleans(),
)
def test_jsonl_is_one_record_a_line(tmp_path, records, blank, crlf):
    end = ("\r\n" if crlf else "\n") * (2 if blank else 1)
    path = tmp_path / "x.jsonl"
    path.write_bytes(end.join(json.dumps(record) for record in records).encode())
    assert [json.loads(piece) for piece in slices(path)] == records


@pytest.mark.parametrize(
    "bad",
    [
        b'{"id": 1, "score": NaN}',
        b'{"id": "\\ud800"}',
        b'{"id": "\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"id": 1}',
        b'{"id": }',
        b"{'id': 1}",
        b'{"id": "line\nbreak"}',
        b"nonsense",
        b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}",
    ],
)
def test_one_bad_record_stays_one_bad_record(tmp_path, bad):
    good = [b'{"id": "a", "text": "x, ]}\\""}', b'{"id": "b"}']
    path = tmp_path / "x.json"
    path.write_bytes(b"[" + good[0] + b",\n " + bad + b" , " + good[1] + b"]\n")
    assert slices(path) == [good[0], bad, good[1]]


def test_a_byte_order_mark_before_the_file_belongs_to_no_record(tmp_path):
    for name, content in (("x.json", b'[{"id": 1}]'), ("x.jsonl", b'{"id": 1}\n')):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + content)
        assert slices(path) == [b'{"id": 1}']


def test_a_bad_line_is_kept_for_the_quarantine(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'oops\n{"id": 1}\n\n{"id": \n')
    assert slices(path) == [b"oops", b'{"id": 1}', b'{"id":']


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"  \n", "white space"),
        (
            b'{"images": [], "annotations": []}',
            r"not an array: the top level is an object with the fields 'images', 'annotations'",
        ),
        (
            b'{\n "images": [],\n "annotations": []\n}',
            "the top level is an object with the fields 'images', 'annotations'",
        ),
        (b'"text"', "the top level is a text"),
        (b"12", "the top level is a number"),
        (b"null", "the top level is null"),
        (b"hello world", "not JSON: the fault is at byte 0"),
        (b'  {"id": 1 "x": 2}', "not JSON: the fault is at byte 11"),
        (b'[{"id": 1}, {"id": 2', "the file ends at byte 20, inside the record that starts at byte 12"),
        (b'[{"id": 1}, {"id": "2}]', "the file ends at byte 23, inside the record that starts at byte 12"),
        (b'[{"id": 1}\n{"id": 2}]', "a comma is missing before byte 11"),
        (b'[{"id": 1},, {"id": 2}]', "a record is missing at byte 11"),
        (b'[{"id": 1},]', "a record is missing at byte 11"),
        (b'[{"id": 1}] {', "more data after its end, at byte 12"),
        (b"\xff\xfe[\x00]\x00", "UTF-16"),
    ],
)
def test_what_is_no_list_of_records_is_refused_with_the_place(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message) as error:
        split_records(path)
    assert str(path) in str(error.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(SourceError, match="no such file"):
        split_records(tmp_path / "none.json")
    with pytest.raises(SourceError, match="a folder"):
        split_records(tmp_path)


def test_an_empty_array_has_no_records(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"[ ]")
    assert slices(path) == []


def test_the_fingerprint_is_the_contents(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"id": 1}]')
    assert split_records(path).fingerprint == xxhash.xxh3_128_hexdigest(b'[{"id": 1}]')


def test_names_are_relative_to_the_common_folder(tmp_path):
    assert record_names([tmp_path / "chat.json"]) == ["chat.json"]
    assert record_names([tmp_path / "a" / "x.json", tmp_path / "b" / "x.json"]) == ["a/x.json", "b/x.json"]
    with pytest.raises(UsageError, match="given twice"):
        record_names([tmp_path / "x.json", tmp_path / "." / "x.json"])
