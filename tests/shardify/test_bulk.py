"""Members of many samples found together, beside what reading them one by one says."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardify.errors import FormatError
from shardify.format.bulk import locate_members
from shardify.format.tar import read_members

NAMES = st.one_of(
    st.sampled_from(
        ["a.jpg", "a.json", "a.0.png", "b.jpg", "README", ".a.jpg", "__meta__.json", "_a.txt", "x/a.jpg"]
    ),
    st.sampled_from(["ä.jpg", "n" * 120 + ".jpg", "d/" * 60 + "a.json", "a."]),
)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(members, kind) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # a name that ustar cannot hold
                continue
        end = tar.offset
    return file.getvalue()[:end]


@given(
    spans=st.lists(
        st.tuples(
            st.lists(st.tuples(NAMES, st.binary(max_size=1200)), min_size=1, max_size=4),
            st.sampled_from(sorted(FORMATS)),
            st.one_of(st.none(), st.tuples(st.integers(0, 511), st.integers(0, 255))),
        ),
        max_size=5,
    )
)
def test_what_is_found_is_what_reading_finds(spans):
    contents = []
    for members, kind, damage in spans:
        content = bytearray(tar_of(members, kind))
        if damage and content:
            content[damage[0]] = damage[1]
        contents.append(bytes(content))
    sizes = np.array([len(content) for content in contents], np.int64)
    begins = np.cumsum(sizes) - sizes
    memory = np.frombuffer(b"".join(contents), np.uint8)
    for begin, content, found in zip(
        begins.tolist(), contents, locate_members(memory, begins, sizes), strict=True
    ):
        if found is None:
            continue
        key, expected = read_members(memoryview(content), where="a sample")
        assert found.key == key
        assert [(field, bytes(memory[start:end])) for field, start, end in found.members] == [
            (field, bytes(data)) for field, data in expected
        ]
        assert begin <= found.members[0][1]


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_plain_samples_are_all_found(kind):
    content = tar_of([("a.jpg", b"x" * 700), ("a.json", b"{}")], kind)
    memory = np.frombuffer(content * 3, np.uint8)
    sizes = np.full(3, len(content), np.int64)
    found = locate_members(memory, np.arange(3) * len(content), sizes)
    assert [sample.key for sample in found if sample] == ["a", "a", "a"]
    assert [(field, end - begin) for field, begin, end in found[2].members] == [("jpg", 700), ("json", 2)]


def test_a_cut_off_sample_is_left_to_others():
    content = tar_of([("a.jpg", b"x" * 700)], "ustar")[:1024]
    assert locate_members(np.frombuffer(content, np.uint8), np.zeros(1, np.int64), np.array([1024])) == [None]
    with pytest.raises(FormatError):
        read_members(memoryview(content), where="a sample")


def test_samples_of_webdataset_are_found(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        writer.write({"__key__": "a", "jpg": b"x" * 700, "json": {"id": 1}})
    content = (tmp_path / "w.tar").read_bytes()
    span = np.frombuffer(content[: len(content) - len(content) % 512], np.uint8)
    end = len(content.rstrip(b"\0")) + 511
    sizes = np.array([end - end % 512], np.int64)
    (found,) = locate_members(span, np.zeros(1, np.int64), sizes)
    assert found is not None
    assert [(field, end - begin) for field, begin, end in found.members] == [("jpg", 700), ("json", 9)]
