"""Samples out of zstd frames: which of its frame a sample is, found without a scan, and its span out of the frame's bytes."""

import io
import tarfile

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shardify.errors import FormatError
from shardify.format.samples import frame_sample, ordinals, ordinals_at, split_frame
from shardify.format.tar import ShardWriter, read_members

FRAMES = st.lists(st.integers(1, 40), max_size=12)  # samples in each frame of a shard


class Looked:
    """Offsets that count how many were looked at."""

    def __init__(self, offsets):
        self.offsets = offsets
        self.looks = 0

    def __getitem__(self, numbers):
        self.looks += len(numbers)
        return self.offsets[numbers]


@given(st.lists(FRAMES, min_size=1, max_size=6), st.data())
def test_ordinals_of_some_are_those_of_all(shards, data):
    # every shard begins at byte 0, so that the last frame of one may be equal to the first of the next
    parts = [np.repeat(np.arange(len(frames), dtype=np.int64) * 512, frames) for frames in shards]
    expected = np.concatenate([ordinals(part) for part in parts])
    offsets = np.concatenate(parts)
    starts = np.cumsum([0] + [len(part) for part in parts])
    if not len(offsets):
        assert len(ordinals_at(offsets, starts, np.zeros(0, np.int64))) == 0
        return
    numbers = data.draw(st.lists(st.integers(0, len(offsets) - 1), max_size=50))
    samples = np.array(numbers, np.int64)
    found = ordinals_at(offsets, starts, samples)
    assert found.dtype == np.int64
    assert found.tolist() == expected[samples].tolist()


def test_only_neighbours_are_looked_at():
    rng = np.random.default_rng(0)
    offsets = np.repeat(np.arange(20_000), rng.integers(1, 100, 20_000))
    samples = rng.integers(0, len(offsets), 1000)
    looked = Looked(offsets)
    expected = ordinals(offsets)[samples]
    found = ordinals_at(looked, np.array([0, len(offsets)]), samples)
    assert found.tolist() == expected.tolist()
    assert looked.looks <= 1000 * (1 + 7 + 6)  # frames have fewer than 2 ** 7 samples


def frame_of(samples):
    """One frame that holds these samples (key -> members)."""
    sink = io.BytesIO()
    writer = ShardWriter(sink, compress="zstd")
    for key, members in samples.items():
        for field, content in members:
            writer.add(key, field, content)
        writer.end_sample()
    writer.close()
    assert len({*map(tuple, writer.spans.tolist())}) == 1
    offset, size = writer.spans[0]
    return memoryview(sink.getvalue())[offset : offset + size]


@given(st.lists(st.lists(st.binary(max_size=2000), min_size=1, max_size=3), min_size=1, max_size=20))
def test_each_sample_of_a_frame(contents):
    samples = {
        f"{number:09d}": [(f"{place}.bin", content) for place, content in enumerate(members)]
        for number, members in enumerate(contents)
    }
    spans = split_frame(frame_of(samples), where="here")
    assert len(spans) == len(samples)
    for ordinal, (key, members) in enumerate(samples.items()):
        found_key, found = read_members(frame_sample(spans, ordinal, where="here"), where="here")
        assert found_key == key
        assert [(field, bytes(content)) for field, content in found] == members
    with pytest.raises(
        FormatError, match=rf"here: its frame holds {len(samples)} samples, but its row is number"
    ):
        frame_sample(spans, len(samples), where="here")
    with pytest.raises(FormatError):
        frame_sample(spans, -1, where="here")


def test_a_frame_by_others():
    """Long names, PAX headers, folders and readme files between the samples, and the end-of-archive mark in the frame."""
    names = ["README", "folder/", f"folder/{'x' * 120}.a", f"folder/{'x' * 120}.b", "README2", "folder/y.a"]
    for style in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=style, pax_headers={"comment": "ü"}) as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
                content = b"" if name.endswith("/") else name.encode()
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        spans = split_frame(zstandard.compress(sink.getvalue()), where="here")
        found = [read_members(span, where="here") for span in spans]
        assert [(key, [field for field, _ in members]) for key, members in found] == [
            (f"folder/{'x' * 120}", ["a", "b"]),
            ("folder/y", ["a"]),
        ]
        assert bytes(found[1][1][0][1]) == b"folder/y.a"


def test_damaged_frames_are_refused():
    frame = frame_of({"a": [("bin", bytes(100_000))]})
    for damaged, what in (
        (frame[:-1], "zstd frame"),
        (b"", "zstd frame"),
        (bytes(100), "zstd frame"),
        (bytes(frame) * 2, "zstd frame"),
        (zstandard.compress(b"x" * 600), "no tar header at byte 0"),
        (zstandard.compress(zstandard.decompress(frame)[:5000]), "beyond its sample"),
    ):
        with pytest.raises(FormatError, match=f"here: .*{what}"):
            split_frame(damaged, where="here")
    with pytest.raises(FormatError, match="at most 100000"):
        split_frame(frame, where="here", limit=100_000)
