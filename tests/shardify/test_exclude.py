import hashlib
import json

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shardify.errors import SourceError
from shardify.exclude import count_hits, describe_lines, report_hits
from shardify.format.exclude import EXCLUDED, read_exclusions
from shardify.format.sidecar import SetAside

IMAGE = b"the bytes of an image"


def hits(tmp_path, line, *, id=None, record=None, image=None):  # noqa: A002
    path = tmp_path / "list.txt"
    path.write_text(f"{line}\n", encoding="utf-8")
    images = [] if image is None else [(xxhash.xxh3_64_intdigest(image), image)]
    raw = None if record is None else json.dumps(record).encode()
    return read_exclusions(path).lines(id=id, record=raw, images=images) == [1]


@pytest.mark.parametrize(
    ("line", "id_", "hit"),
    [
        ("000123", '"000123"', True),
        ("000123", "123", False),
        ("123", "123", True),  # as a number
        ("123", '"123"', True),  # and as a text
        ('"123"', '"123"', True),
        ('"123"', "123", False),  # quotes say text
        ("café", '"caf\\u00e9"', True),  # however it is escaped
        ('"caf\\u00e9"', '"café"', True),
        ("a/b.c", '"a\\/b.c"', True),
        ('"with blanks"', '"with blanks"', True),
        ("0123456789abcdef", '"0123456789abcdef"', True),  # somebody's id may look like a hash
        ("abc", None, False),
        ("null", None, False),
    ],
)
def test_an_id(tmp_path, line, id_, hit):
    assert hits(tmp_path, line, id=id_) is hit


@pytest.mark.parametrize(
    ("record", "hit"),
    [
        ({"url": "https://a.b/c.jpg?x=1#y"}, True),
        ({"URL": " https://a.b/c.jpg?x=1#y "}, True),
        ({"meta": [{"coco_url": ["https://a.b/c.jpg?x=1#y"]}]}, True),
        ({"image": "https://a.b/c.jpg?x=1#y"}, True),
        ({"image_urls": ["https://a.b/c.jpg?x=1#y"]}, True),
        ({"caption": "see https://a.b/c.jpg?x=1#y"}, False),
        ({"url": "https://a.b/c.jpg"}, False),
        (["https://a.b/c.jpg?x=1#y"], True),
    ],
)
def test_a_url(tmp_path, record, hit):
    assert hits(tmp_path, "https://a.b/c.jpg?x=1#y", record=record) is hit


@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_hashes_of_images(tmp_path, case):
    for digest in (xxhash.xxh3_64_hexdigest(IMAGE), hashlib.sha256(IMAGE).hexdigest()):
        assert hits(tmp_path, case(digest), image=IMAGE)
        assert not hits(tmp_path, case(digest), image=IMAGE + b"!")


def test_comments_blank_lines_marks_and_line_ends(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  # two\n\n  three  \nthree")
    found = read_exclusions(path)
    assert dict(found.entries) == {1: "one", 5: "three"}
    assert found.lines(id='"three"', record=None, images=[]) == [5]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'fine\n"not closed', 2),
        (b"fine\nd41d8cd98f00b204e9800998ecf8427e\n", 2),  # MD5
        (b"fine\nda39a3ee5e6b4b0d3255bfef95601890afd80709\n", 2),  # SHA-1
        (b"two words\n", 1),
        (b'{"id": 3}\n', 1),
        (b"fine\nbell\x07\n", 2),
        (b"fine\n\xff\xfe\n", 2),
        (b"fine\n" + b"x" * 100_000, 2),
        (b"\x00" * 40, 1),
    ],
)
def test_a_line_that_says_nothing_is_named(tmp_path, content, line):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=f"list.txt: line {line}: "):
        read_exclusions(path)


def test_a_list_of_nothing_or_none_at_all(tmp_path):
    (tmp_path / "list.txt").write_text("# nothing yet\n")
    with pytest.raises(SourceError, match="empty"):
        read_exclusions(tmp_path / "list.txt")
    with pytest.raises(SourceError, match="No such file"):
        read_exclusions(tmp_path / "none.txt")


def test_hits_are_counted_by_line_and_idle_lines_are_named(tmp_path):
    path = tmp_path / "asked for: line 9 of all.txt"
    path.write_text("a\nb\nhttps://x.y/z\nc\n")
    found = read_exclusions(path)

    def item(lines):
        detail = describe_lines(found, lines)
        return SetAside(0, "s", None, EXCLUDED, detail, None)

    items = [item([1]), item([1, 3]), SetAside(0, "s", None, "image-missing", "line 4 of it", None)]
    assert count_hits(items) == {1: 2, 3: 1}
    summary, idle = report_hits(found, items)
    assert "2 of 4 entries" in summary
    assert "line 1 2, line 3 1" in summary
    assert idle.endswith("nothing was hit by line 2 (b), line 4 (c)")


@given(st.binary(max_size=200))
def test_any_file_is_a_list_or_a_clear_refusal(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    try:
        found = read_exclusions(path)
    except SourceError as error:
        assert "list.txt" in str(error)
    else:
        assert found.entries
