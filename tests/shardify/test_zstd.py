"""Compressed shards: legal .tar.zst for every tool, readable one sample at a time, damage named."""

import io
import os
import random
import subprocess
import tarfile

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shardify.errors import FormatError
from shardify.format.hashing import hash_file
from shardify.format.index import index_rows, write_index
from shardify.format.manifest import Counts, Manifest, Shard, Source, encode_manifest
from shardify.format.names import shard_name, sidecar_name
from shardify.format.samples import SampleReader, ordinals
from shardify.format.scan import scan_shard
from shardify.format.shards import open_shards
from shardify.format.sidecar import ImageInfo, ShardInfo, SidecarBuilder, read_sidecar
from shardify.format.tar import ShardWriter, read_samples, sample_span
from shardify.format.zstd import (
    FRAME_BYTES,
    MAX_FRAME_BYTES,
    FrameWriter,
    decompress_frame,
    read_frame,
    read_seek_table,
)
from shardify.images.probe import probe
from shardify.info import describe
from shardify.verify import verify_shards

RECORD = b'{"id":"7","conversations":[{"from":"human","value":"one two"},{"from":"gpt","value":"three"}]}'


def picture(size):
    """A readable JPEG header and `size` bytes that do not compress."""
    header = bytes.fromhex("ffd8ffc0001108001e002803012200021101031101")
    return header + random.Random(size).randbytes(size).replace(b"\xff", b"\xfe") + b"\xff\xd9"


def samples_of(sizes):
    return [(f"{n:09d}", [("jpg", picture(size)), ("json", RECORD)]) for n, size in enumerate(sizes)]


def write_shard(path, samples, *, first_record=0):
    """A shard and its sidecar as the packer writes them; returns the sidecar's info."""
    compress = "zstd" if str(path).endswith(".zst") else ""
    rows = SidecarBuilder()
    with open(path, "wb", buffering=0) as file:
        writer = ShardWriter(file, compress=compress)
        for number, (key, members) in enumerate(samples):
            written = [writer.add(key, field, data) for field, data in members]
            writer.end_sample()
            header = probe(members[0][1])
            rows.add(
                key=key,
                id='"7"',
                record=first_record + number,
                members=written,
                images=[ImageInfo("jpg", header.format, header.width, header.height)],
                turns=2,
                words=3,
                source="chat.json",
            )
        digest = writer.close()
    assert writer.bytes == path.stat().st_size
    assert digest == hash_file(path)
    info = ShardInfo(writer.bytes, digest, plan="p")
    rows.write(path.parent / sidecar_name(path.name), writer.spans, info)
    return info


def make_set(folder, sizes_of_shards):
    """A finished compressed data set."""
    folder.mkdir()
    shards, parts, first = [], [], 0
    for number, sizes in enumerate(sizes_of_shards):
        path = folder / shard_name(number, len(sizes_of_shards), "zstd")
        samples = [(f"{first + n:09d}", members) for n, (_, members) in enumerate(samples_of(sizes))]
        info = write_shard(path, samples, first_record=first)
        sidecar = folder / sidecar_name(path.name)
        shards.append(
            Shard(path.name, sidecar.name, len(sizes), info.bytes, info.xxh3_128, hash_file(sidecar))
        )
        parts.append(index_rows(read_sidecar(sidecar), info, number))
        first += len(sizes)
    with open(folder / "index.npy", "wb") as file:
        write_index(file, parts)
    sources = [Source("records", "chat.json", records=first)]
    counts = Counts(first, first, {}, {})
    manifest = Manifest(1, {}, sources, shards, hash_file(folder / "index.npy"), counts)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    (folder / "quarantine.jsonl").write_bytes(b"")
    return folder


def check(folder, capsys):
    """Lines that verify prints of differences."""
    good = verify_shards(folder, workers=1)
    lines = capsys.readouterr().out.splitlines()
    assert good == (len(lines) == 1)
    return lines[:-1]


SIZES = (1000, 2000, 700_000, 10, 90_000, 90_000, 90_000, 90_000, 5)


def test_a_compressed_shard_is_the_plain_one_in_frames(tmp_path):
    samples = samples_of(SIZES)
    write_shard(tmp_path / "a.tar", samples)
    write_shard(tmp_path / "b.tar.zst", samples)
    with zstandard.open(tmp_path / "b.tar.zst", "rb") as stream:
        content = stream.read()
    assert content == (tmp_path / "a.tar").read_bytes()
    listed = subprocess.run(
        ["tar", "--zstd", "-tf", tmp_path / "b.tar.zst"], check=True, capture_output=True, text=True
    ).stdout.split()
    assert listed == [f"{key}.{field}" for key, members in samples for field, _ in members]
    subprocess.run(["zstd", "-q", "-t", tmp_path / "b.tar.zst"], check=True)


def test_frames_gather_small_samples_and_leave_large_ones_alone(tmp_path):
    samples = samples_of(SIZES)
    write_shard(tmp_path / "b.tar.zst", samples)
    rows = read_sidecar(tmp_path / "b.parquet")
    offsets = rows["offset"].to_pylist()
    spans = [sample_span([len(data) for _, data in members]) for _, members in samples]
    assert offsets[0] == offsets[1] != offsets[2] != offsets[3]
    assert offsets.count(offsets[2]) == 1  # larger than a frame
    for offset in set(offsets):
        together = [span for span, at in zip(spans, offsets, strict=True) if at == offset]
        assert sum(together) <= FRAME_BYTES or len(together) == 1 or sum(together[:-1]) < FRAME_BYTES
    with open(tmp_path / "b.tar.zst", "rb") as file:
        table = read_seek_table(file, where="b")
        assert table is not None
        frames = [read_frame(file, table, n, where="b") for n in range(len(table.sizes))]
    assert frames[-1] == bytes(1024)
    assert sorted(set(offsets)) == table.starts[:-2].tolist()


def test_equal_samples_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar.zst", samples_of(SIZES))
    assert (tmp_path / "a.tar.zst").read_bytes() == (tmp_path / "b.tar.zst").read_bytes()
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 400_000), max_size=8), ending=st.sampled_from([".tar", ".tar.zst"]))
def test_every_sample_reads_back_in_any_order(tmp_path_factory, sizes, ending):
    path = tmp_path_factory.mktemp("s") / f"a{ending}"
    samples = samples_of(sizes)
    write_shard(path, samples)
    numbers = list(range(len(samples)))
    random.Random(len(sizes)).shuffle(numbers)
    with SampleReader(path, sidecar=str(path.parent / "a.parquet")) as reader:
        assert len(reader) == len(samples)
        for number in numbers:
            key, members = reader.read(number)
            assert (key, [(field, bytes(data)) for field, data in members]) == samples[number]


@given(st.lists(st.integers(1, 4), max_size=30))
def test_ordinals_count_rows_of_equal_offset(runs):
    offsets = [7 * at for at, count in enumerate(runs) for _ in range(count)]
    assert ordinals(offsets).tolist() == [n for count in runs for n in range(count)]


def test_a_scan_finds_what_the_writer_recorded(tmp_path):
    write_shard(tmp_path / "a.tar.zst", samples_of(SIZES))
    written = read_sidecar(tmp_path / "a.parquet")
    scanned = scan_shard(tmp_path / "a.tar.zst", name="chat.json")
    scanned.rows.write(tmp_path / "again.parquet", scanned.spans, scanned.info)
    assert read_sidecar(tmp_path / "again.parquet").to_pylist() == written.to_pylist()
    assert scanned.info.xxh3_128 == hash_file(tmp_path / "a.tar.zst")


def test_a_finished_set_opens_is_described_and_verified(tmp_path, capsys):
    folder = make_set(tmp_path / "data", [SIZES, (10, 20), ()])
    for pattern in (folder, f"{folder}/{{000..999}}.tar.zst", folder / "manifest.json"):
        opened = open_shards(pattern)
        assert len(opened.index) == len(SIZES) + 2
    assert describe(folder).samples == len(SIZES) + 2
    assert check(folder, capsys) == []


def test_foreign_compressed_shards_are_indexed_on_first_use(tmp_path, capsys):
    write_shard(tmp_path / "x.tar.zst", samples_of(SIZES))
    (tmp_path / "x.parquet").unlink()
    opened = open_shards(tmp_path, say=lambda _: None)
    assert len(opened.index) == len(SIZES)
    assert (tmp_path / "x.parquet").exists()
    assert check(tmp_path, capsys) == []


def test_two_shards_of_one_sidecar_are_refused(tmp_path):
    for ending in (".tar", ".tar.zst"):
        write_shard(tmp_path / f"x{ending}", samples_of((10,)))
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(FormatError, match="share its index"):
        open_shards(tmp_path, say=lambda _: None)


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("where", ["first frame", "large frame", "mark", "entry", "footer"])
def test_verify_names_what_is_damaged(tmp_path, capsys, where):
    folder = make_set(tmp_path / "data", [SIZES])
    path = folder / "000.tar.zst"
    with open(path, "rb") as file:
        table = read_seek_table(file, where="")
    assert table is not None
    starts = table.starts.tolist()
    at = {
        "first frame": starts[0] + 500,
        "large frame": starts[1] + 300_000,
        "mark": starts[-2] + 6,
        "entry": starts[-1] + 8,
        "footer": path.stat().st_size - 1,
    }[where]
    flip(path, at)
    lines = check(folder, capsys)
    assert any("its hash is not the one in manifest.json" in line for line in lines)
    words = {
        "first frame": "000000000, offset 0: frame at byte 0",
        "large frame": f"000000002, offset {starts[1]}: frame at byte {starts[1]}",
        "mark": "no end-of-archive mark",
        "entry": "damaged seek table",
        "footer": "no seek table",
    }[where]
    assert any(words in line for line in lines), lines


def test_verify_notices_a_frame_too_many(tmp_path, capsys):
    folder = make_set(tmp_path / "data", [(10, 20)])
    path = folder / "000.tar.zst"
    with open(path, "rb") as file:
        table = read_seek_table(file, where="")
        contents = [read_frame(file, table, n, where="") for n in range(len(table.sizes))]
    writer = FrameWriter()
    content = b"".join(writer.compress([piece]) for piece in (*contents, b"more"))
    path.write_bytes(content + writer.seek_table())
    assert any("or more than that" in line for line in check(folder, capsys))


def test_what_cannot_be_read_one_by_one_is_refused_with_advice(tmp_path):
    write_shard(tmp_path / "a.tar", samples_of((10, 20)))
    subprocess.run(["zstd", "-q", tmp_path / "a.tar"], check=True)
    with pytest.raises(FormatError, match=r"a\.tar\.zst: compressed as a whole.*zstd -d"):
        scan_shard(tmp_path / "a.tar.zst", name="a")
    # a frame for each member, as some tools cut
    content = (tmp_path / "a.tar").read_bytes()
    writer = FrameWriter()
    frames = [writer.compress([content[:512]]), writer.compress([content[512:]])]
    (tmp_path / "a.tar.zst").write_bytes(b"".join(frames) + writer.seek_table())
    with pytest.raises(FormatError, match=r"frame at byte 0: member '000000000\.jpg' at byte 0 is cut off"):
        scan_shard(tmp_path / "a.tar.zst", name="a")
    with tarfile.open(tmp_path / "a.tar") as archive:
        second = archive.getmembers()[1].offset
    writer = FrameWriter()
    frames = [writer.compress([content[:second]]), writer.compress([content[second:]])]
    (tmp_path / "a.tar.zst").write_bytes(b"".join(frames) + writer.seek_table())
    with pytest.raises(FormatError, match="'000000000' is divided between frames"):
        scan_shard(tmp_path / "a.tar.zst", name="a")


def test_seekable_files_of_streaming_writers_are_read(tmp_path):
    """Without content sizes in the frames and without checksums in the table."""
    write_shard(tmp_path / "a.tar", samples_of((10, 2000)))
    content = (tmp_path / "a.tar").read_bytes()
    compressor = zstandard.ZstdCompressor()
    entries, frames = [], []
    for part in (content[:2048], content[2048:]):
        stream = compressor.compressobj()
        frames.append(stream.compress(part) + stream.flush())
        entries.append((len(frames[-1]), len(part)))
    table = np.array(entries, "<u4").tobytes() + len(entries).to_bytes(4, "little") + b"\0"
    table += (0x8F92EAB1).to_bytes(4, "little")
    header = (0x184D2A5E).to_bytes(4, "little") + len(table).to_bytes(4, "little")
    (tmp_path / "b.tar.zst").write_bytes(b"".join(frames) + header + table)
    scanned = scan_shard(tmp_path / "b.tar.zst", name="b")
    assert len(scanned.rows) == 2
    scanned.rows.write(tmp_path / "b.parquet", scanned.spans, scanned.info)
    with SampleReader(tmp_path / "b.tar.zst", sidecar=str(tmp_path / "b.parquet")) as reader:
        assert [key for key, _ in reader] == ["000000000", "000000001"]


def test_bombs_are_refused_unread():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 * 1024 * 1024))
    with pytest.raises(FormatError, match="67108864 bytes; at most 1000000"):
        decompress_frame(bomb, where="here", limit=1_000_000)
    stream = zstandard.ZstdCompressor(level=19).compressobj()
    bomb = stream.compress(bytes(64 * 1024 * 1024)) + stream.flush()
    with pytest.raises(FormatError, match="more than 1000000"):
        decompress_frame(bomb, where="here", limit=1_000_000)


def test_a_sample_too_large_for_a_frame_is_refused():
    class Endless(bytes):
        def __len__(self):
            return MAX_FRAME_BYTES + 1

    with pytest.raises(FormatError, match="uncompressed"):
        FrameWriter().compress([Endless()])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_damage_gives_the_same_samples_or_one_error(tmp_path_factory, seed):
    rng = random.Random(seed)
    path = tmp_path_factory.mktemp("d") / "a.tar.zst"
    write_shard(path, samples_of((10, 300, 20)))
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content))
        content[at : at + rng.randint(0, 20)] = rng.randbytes(rng.randint(0, 20))
    path.write_bytes(content)
    try:
        scanned = scan_shard(path, name="a")
    except FormatError as error:
        assert str(path) in str(error)
    else:
        assert len(scanned.rows) == 3
    try:
        with SampleReader(path, sidecar=str(path.parent / "a.parquet")) as reader:
            for number in range(3):
                assert xxhash.xxh3_64_intdigest(
                    reader.read(number).members[1][1]
                ) == xxhash.xxh3_64_intdigest(RECORD)
    except FormatError as error:
        assert str(path) in str(error)


def test_the_reader_refuses_rows_of_another_shard(tmp_path):
    write_shard(tmp_path / "a.tar.zst", samples_of((10, 20)))
    write_shard(tmp_path / "b.tar.zst", [(f"x{key}", members) for key, members in samples_of((10, 20))])
    words = r"has the key 'x000000001'|ends at byte|zstd frame"
    with (
        SampleReader(tmp_path / "b.tar.zst", sidecar=str(tmp_path / "a.parquet")) as reader,
        pytest.raises(FormatError, match=words),
    ):
        reader.read(1)


def test_a_frame_of_two_samples_is_told_apart():
    sink = io.BytesIO()
    writer = ShardWriter(sink)
    for key, members in samples_of((10, 20)):
        for field, data in members:
            writer.add(key, field, data)
        writer.end_sample()
    writer.close()
    assert [key for key, _ in read_samples(memoryview(sink.getvalue()), where="x")] == [
        "000000000",
        "000000001",
    ]


def test_names():
    assert shard_name(7, 10) == "007.tar"
    assert shard_name(7, 10_000, "zstd") == "0007.tar.zst"
    assert sidecar_name("000.tar.zst") == sidecar_name("000.tar") == "000.parquet"
    assert sidecar_name("a.b.tar.zst") == "a.b.parquet"


def test_the_loader_reads_them(tmp_path):
    from loaders import StreamingLoader

    folder = make_set(tmp_path / "data", [(10, 20)])
    loader = StreamingLoader(
        os.fspath(folder), batch_size=1, num_workers=0, rank=0, world_size=1, on_error="raise"
    )
    batches = list(loader)
    assert batches
    assert all(batch.records[0] for batch in batches)
