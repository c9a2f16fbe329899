"""New data sets of finished and foreign shards: nothing lost, nothing changed, nothing that was not asked for."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from shardify.convert import PackOptions, pack_dataset
from shardify.errors import PackError, SourceError, UsageError
from shardify.format.manifest import read_manifest
from shardify.format.shards import open_shards
from shardify.format.sidecar import read_sidecar
from shardify.reshard import ReshardOptions, reshard_dataset
from shardify.verify import verify_shards

RECORDS = 40
FOREIGN = 12


def picture(seed, size=(40, 30), format_="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_)
    return buffer.getvalue()


def name_of(number):
    return f"{number}.png" if number % 4 == 3 else f"{number}.jpg"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A packed set, the same compressed, and a foreign tar: with captions, records that are not LLaVA's, names too long for ustar."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "images").mkdir()
    for number in range(RECORDS):
        data = picture(number, (40 + number, 30), "PNG" if number % 4 == 3 else "JPEG")
        (folder / "images" / name_of(number)).write_bytes(data)
    lines = []
    for number in range(RECORDS):
        turns = [
            {"from": "human", "value": "<image>\nWhat is " + "this " * number + "?"},
            {"from": "gpt", "value": "Noise."},
        ]
        record = {"id": f"r{number:03}", "image": name_of(number), "conversations": turns}
        record["url"] = f"https://example.org/{number}.jpg"
        if number % 10 == 1:
            del record["image"]
        if number % 10 == 2:
            record["image"] = [name_of(number), name_of(number - 2)]
        if number == 5:
            record["id"] = 5
        if number == 6:
            record["id"] = float("nan")
        if number in (13, 14):
            record["id"] = "twice"
        lines.append(json.dumps(record))
    (folder / "chat.jsonl").write_text("\n".join(lines))
    for name, compress in (("packed", None), ("zst", "zstd")):
        pack_dataset(
            PackOptions(
                records=[folder / "chat.jsonl"],
                images=[folder / "images"],
                out=folder / name,
                shards=3,
                compress=compress,
                workers=1,
            )
        )
    (folder / "foreign").mkdir()
    with tarfile.open(folder / "foreign" / "part-0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(FOREIGN):
            key = f"some/folder/{number:04}{'-a-long-name' * 10}"
            for field, data in {
                "jpg": picture(number % 5, (40 + number % 5, 30)),
                "txt": b"a caption",
                "json": json.dumps({"url": f"https://other.org/{number}", "width": 40}).encode(),
                "cls": b"%d" % number,
            }.items():
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size, member.mtime = len(data), 1e9 + number / 3
                tar.addfile(member, io.BytesIO(data))
    return folder


def reshard(shards, out, **options):
    options = {"workers": 1, "shards_out": 3, **options}
    shards = shards if isinstance(shards, list) else [shards]
    reshard_dataset(ReshardOptions(shards=shards, out=out, **options))
    assert verify_shards(out, workers=1)
    return read_manifest(out / "manifest.json")


def rows_of(*folders, samples=False):
    """All sidecar rows of some folders; with `samples` each with its members' bytes."""
    rows = []
    for shard in open_shards([os.fspath(folder) for folder in folders]).shards:
        table = read_sidecar(shard.sidecar).to_pylist()
        if samples:
            for row, members in zip(table, members_of(Path(shard.path)), strict=True):
                row["bytes"] = members
        rows += table
    return rows


def members_of(tar):
    """Field -> bytes of each sample, as tarfile and zstandard read them."""
    data = tar.read_bytes()
    if tar.suffix == ".zst":
        import zstandard

        data = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as opened:
        for member in opened:
            folder, _, base = member.name.rpartition("/")
            key, _, field = base.partition(".")
            found.setdefault((folder, key), {})[field] = opened.extractfile(member).read()
    return list(found.values())


def add(tar, key, fields):
    for field, data in fields.items():
        member = tarfile.TarInfo(f"{key}.{field}")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))


def identity(row):
    return row["source"].rpartition("/")[2], row["record"], row["id"], tuple(row["bytes"].items())


def content(out):
    return {
        str(path.relative_to(out)): xxhash.xxh3_128_hexdigest(path.read_bytes()) if path.is_file() else ""
        for path in sorted(out.rglob("*"))
    }


def test_a_packed_and_a_foreign_set_become_one_with_every_byte_kept(given, tmp_path):
    manifest = reshard([given / "packed", given / "foreign"], tmp_path / "out", shards_out=4, multiple_of=3)
    rows = rows_of(tmp_path / "out", samples=True)
    before = rows_of(given / "packed", given / "foreign", samples=True)
    assert Counter(map(identity, rows)) == Counter(map(identity, before))
    assert [row["key"] for row in rows] == [f"{n:09}" for n in range(RECORDS + FOREIGN)]
    assert [row["bytes"] for row in rows] != [row["bytes"] for row in before]
    assert {row["source"] for row in rows} == {"packed/chat.jsonl", "foreign/part-0.tar"}
    assert (len(manifest.shards), manifest.counts.packed) == (6, RECORDS + FOREIGN)
    for name in ("turns", "words"):
        assert Counter(row[name] for row in rows) == Counter(row[name] for row in before)
    sides = [[(i["format"], i["width"], i["height"]) for i in row["images"]] for row in rows]
    assert Counter(map(str, sides)) == Counter(
        str([(i["format"], i["width"], i["height"]) for i in row["images"]]) for row in before
    )
    kinds = {(source.kind, source.name, source.records) for source in manifest.sources}
    assert kinds == {
        ("shards", "packed", RECORDS),
        ("shards", "foreign", FOREIGN),
        ("part", "packed/chat.jsonl", RECORDS),
        ("part", "foreign/part-0.tar", FOREIGN),
        ("folder", "packed/images", None),
    }


def test_notes_are_counted_anew(given, tmp_path):
    packed = read_manifest(given / "packed" / "manifest.json").counts.notes
    assert reshard(given / "packed", tmp_path / "all").counts.notes == packed
    assert packed["id-repeated"] == 1
    # without the first of two, the second is no repetition
    some = reshard(given / "packed", tmp_path / "some", where="record != 13")
    assert some.counts.notes.get("id-repeated", 0) == 0
    assert some.counts.notes["record-tolerant"] == 1


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_writes_the_same_bytes(given, tmp_path, workers):
    for out, many in ((tmp_path / "one", 1), (tmp_path / "many", workers)):
        reshard(
            [given / "packed", given / "foreign"], out, samples_per_shard=7, shards_out=None, workers=many
        )
    assert content(tmp_path / "one") == content(tmp_path / "many")
    assert len(content(tmp_path / "one")) == 2 * 8 + 3


def test_another_seed_is_another_order_and_no_shuffle_is_the_given_one(given, tmp_path):
    orders = []
    for number, options in enumerate(({"seed": 1}, {"seed": 2}, {"shuffle": False})):
        reshard(given / "packed", tmp_path / f"{number}", **options)
        orders.append([row["record"] for row in rows_of(tmp_path / f"{number}")])
    assert orders[0] != orders[1]
    assert orders[2] == [row["record"] for row in rows_of(given / "packed")]
    shards = [str(given / "packed" / name) for name in ("002.tar", "000.tar")]
    reshard(shards, tmp_path / "two", shuffle=False)
    expected = [row["record"] for name in shards for row in rows_of(name)]
    assert [row["record"] for row in rows_of(tmp_path / "two")] == expected


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("words > 20", lambda row: row["words"] > 20),
        ("images == 0 or format == 'png'", lambda row: not row["images"] or row["images"][0]["format"] == "png"),
        ("width >= 60 and height == 30", lambda row: bool(row["images"]) and largest(row)["width"] >= 60),
        ("id in ['r003', 5, 'twice'] and record != 14", lambda row: row["id"] in {'"r003"', "5", '"twice"'} and row["record"] != 14),
        ("'foreign' in source", lambda row: row["source"] == "part-0.tar"),
        ("size / 2 > 3000 and not turns", lambda row: row["size"] > 6000 and not row["turns"]),
    ],
)  # fmt: skip
def test_a_filter_takes_what_it_means_and_counts_the_rest(given, tmp_path, where, wanted):
    sets = [given / "packed", given / "foreign"]
    before = rows_of(*sets)
    expected = Counter((row["record"], row["id"]) for row in before if wanted(row))
    manifest = reshard(sets, tmp_path / "out", where=where, shards_out=1)
    assert Counter((row["record"], row["id"]) for row in rows_of(tmp_path / "out")) == expected
    assert manifest.counts.records_in == manifest.counts.packed == expected.total()
    assert manifest.settings["where"] == where
    assert manifest.settings["left_out"] == len(before) - expected.total()


def largest(row):
    return max(row["images"], key=lambda image: image["width"] * image["height"])


def test_no_more_samples_than_asked_for(given, tmp_path):
    drawn = []
    for number, options in enumerate(({}, {}, {"seed": 1}, {"shuffle": False})):
        manifest = reshard(given / "packed", tmp_path / f"{number}", max_samples=11, **options)
        assert (manifest.counts.records_in, manifest.settings["left_out"]) == (11, RECORDS - 11)
        drawn.append([row["record"] for row in rows_of(tmp_path / f"{number}")])
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[3] == [row["record"] for row in rows_of(given / "packed")][:11]


def test_what_a_list_names_is_taken_out_and_told(given, tmp_path, capsys):
    image = (given / "images" / name_of(8)).read_bytes()
    other = (given / "images" / name_of(20)).read_bytes()
    entries = [
        "# asked for in May",
        "r003",
        "5",
        "https://example.org/7.jpg",
        xxhash.xxh3_64_hexdigest(image),
        hashlib.sha256(other).hexdigest(),
        "https://other.org/9",
        "nobody",
    ]
    (tmp_path / "list.txt").write_text("\n".join(entries))
    manifest = reshard(
        [given / "packed", given / "foreign"], tmp_path / "out", exclude=tmp_path / "list.txt", max_bad="0"
    )
    gone = {("packed/chat.jsonl", record) for record in (3, 5, 7, 8, 20, 22)} | {("foreign/part-0.tar", 9)}
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").open()]
    assert {(line["source"], line["record"]) for line in lines} == gone
    assert {line["code"] for line in lines} == {"excluded"}
    details = {line["record"]: line["detail"] for line in lines}
    assert details[20] == details[22] == "line 6 of list.txt"  # a list of images holds it too
    assert lines[0]["image"] == "3.png"
    assert manifest.counts.set_aside == {"excluded": 7}
    assert manifest.settings["exclude"]["entries"] == 7
    rows = rows_of(tmp_path / "out")
    assert not gone & {(row["source"], row["record"]) for row in rows}
    # gaps stand where they were: keys are those of the run without a list
    reshard([given / "packed", given / "foreign"], tmp_path / "all")
    keys = {(row["source"], row["record"]): row["key"] for row in rows_of(tmp_path / "all")}
    assert all(keys[row["source"], row["record"]] == row["key"] for row in rows)
    told = capsys.readouterr().out
    assert "list.txt: 6 of 7 entries hit" in told
    assert "nothing was hit by line 8 (nobody)" in told


def test_a_sample_that_many_lines_hit_counts_for_all_of_them(tmp_path, capsys):
    pictures = [picture(number, (4, 3)) for number in range(60)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "one", {f"{number}.jpg": data for number, data in enumerate(pictures)})
        add(tar, "two", {"txt": b"stays"})
    (tmp_path / "list.txt").write_text("\n".join(map(xxhash.xxh3_64_hexdigest, pictures)))
    reshard(tmp_path / "a.tar", tmp_path / "out", exclude=tmp_path / "list.txt", shards_out=1)
    told = capsys.readouterr().out
    assert "60 of 60 entries hit" in told
    assert "nothing was hit" not in told


def test_a_list_knows_pictures_and_records_by_any_name(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "image", {"img": picture(1), "txt": b""})
        add(tar, "hash", {"bin": picture(2), "txt": b""})
        add(tar, "record", {"JSON": b'{"id": "x"}'})
        add(tar, "url", {"jpg": picture(3), "meta.json": b'{"image": {"src": "https://a.b/c"}}'})
        add(tar, "stays", {"jpg": picture(4), "json": b'{"id": "y"}'})
    entries = [
        xxhash.xxh3_64_hexdigest(picture(1)),
        hashlib.sha256(picture(2)).hexdigest(),
        "x",
        "https://a.b/c",
    ]
    (tmp_path / "list.txt").write_text("\n".join(entries))
    manifest = reshard(tmp_path / "a.tar", tmp_path / "out", exclude=tmp_path / "list.txt", shards_out=1)
    assert manifest.counts.set_aside == {"excluded": 4}
    assert [row["record"] for row in rows_of(tmp_path / "out")] == [4]


def test_samples_that_keep_an_image_of_one_taken_out_by_its_id_are_told(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, images in enumerate([(1,), (1, 2), (2,), (3,), (3, 4), (4,)]):
            fields = {f"{at}.jpg": picture(image) for at, image in enumerate(images)}
            add(tar, f"{number}", {**fields, "json": b'{"id": %d}' % number})
    # of what a hash names nothing is left; the other picture of a sample is no one's concern
    (tmp_path / "list.txt").write_text(f"0\n{xxhash.xxh3_64_hexdigest(picture(3))}\n")
    reshard(tmp_path / "a.tar", tmp_path / "out", exclude=tmp_path / "list.txt", shards_out=1)
    told = capsys.readouterr().out
    assert "1 samples that stay have an image of one that was taken out" in told
    assert told.splitlines()[-2].endswith(f"list its hash: {xxhash.xxh3_64_hexdigest(picture(1))}")


def test_an_image_that_was_kept_although_cut_off_stays_what_it_is(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(picture(1, (400, 300))[:-900])
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Noise."}]
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "1", "image": "cut.jpg", "conversations": turns}]))
    pack_dataset(
        PackOptions(
            records=[tmp_path / "chat.json"],
            images=[tmp_path],
            out=tmp_path / "packed",
            policies=["image-truncated=keep"],
            workers=1,
        )
    )
    manifest = reshard(tmp_path / "packed", tmp_path / "out", shards_out=1)
    assert rows_of(tmp_path / "out")[0]["images"] == rows_of(tmp_path / "packed")[0]["images"]
    assert manifest.counts.notes == {"image-truncated": 1}


def test_compressed_shards_come_in_and_go_out(given, tmp_path):
    reshard(given / "zst", tmp_path / "plain")
    reshard(given / "packed", tmp_path / "direct")
    for tar in ("000.tar", "001.tar", "002.tar"):
        assert (tmp_path / "plain" / tar).read_bytes() == (tmp_path / "direct" / tar).read_bytes()
    manifest = reshard(given / "packed", tmp_path / "zst", compress="zstd", shuffle=False)
    assert [shard.tar for shard in manifest.shards] == ["000.tar.zst", "001.tar.zst", "002.tar.zst"]
    after, before = rows_of(tmp_path / "zst", samples=True), rows_of(given / "packed", samples=True)
    assert list(map(identity, after)) == list(map(identity, before))


def test_pictures_are_made_smaller_only_when_asked_for(given, tmp_path):
    manifest = reshard([given / "packed", given / "foreign"], tmp_path / "out", shortest_edge=20, quality=80)
    rows = rows_of(tmp_path / "out", samples=True)
    assert all(min(i["width"], i["height"]) == 20 for row in rows for i in row["images"])
    for row in rows:
        for image in row["images"]:
            with Image.open(io.BytesIO(row["bytes"][image["field"]])) as opened:
                assert opened.size == (image["width"], image["height"])
    before = {
        (row["source"], row["record"]): row
        for row in rows_of(given / "packed", given / "foreign", samples=True)
    }
    for row in rows:
        old = before[row["source"].partition("/")[2], row["record"]]["bytes"]
        assert {f: d for f, d in row["bytes"].items() if f in ("json", "txt", "cls")} == {
            f: d for f, d in old.items() if f in ("json", "txt", "cls")
        }
    with_image = sum(bool(row["images"]) for row in rows)
    assert manifest.counts.notes["image-shrunk"] == with_image
    assert manifest.settings["shortest_edge"] == 20
    assert manifest.settings["resized_by"].startswith("pillow ")
    # nothing is larger than that
    reshard(given / "packed", tmp_path / "same", shortest_edge=30)
    reshard(given / "packed", tmp_path / "plain")
    assert (tmp_path / "same" / "000.tar").read_bytes() == (tmp_path / "plain" / "000.tar").read_bytes()


@pytest.mark.parametrize("name", ["packed", "zst"])
def test_damage_is_set_aside_and_never_copied(given, tmp_path, name):
    shutil.copytree(given / name, tmp_path / "in")
    rows = read_sidecar(tmp_path / "in" / "000.parquet").to_pylist()
    row = rows[4]
    tar = tmp_path / "in" / ("000.tar.zst" if name == "zst" else "000.tar")
    at = row["offset"] + row["size"] // 2 if name == "zst" else row["members"][0]["offset"] + 5
    with tar.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(PackError, match="sample-damaged"):
        reshard(tmp_path / "in", tmp_path / "strict", max_bad="0")
    manifest = reshard(tmp_path / "in", tmp_path / "out", max_bad="50%")
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").open()]
    hit = {other["record"] for other in rows if other["offset"] == row["offset"]}  # all in one frame
    assert len(hit) == 1 or name == "zst"
    assert {line["record"] for line in lines} == hit
    assert manifest.counts.set_aside == {"sample-damaged": len(hit)}
    assert str(tmp_path) not in (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert manifest.counts.packed == RECORDS - len(hit)


def test_names_that_no_header_holds_are_set_aside(given, tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("one.txt", f"two.{'x' * 95}.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    manifest = reshard(tmp_path / "in", tmp_path / "out", shards_out=1, max_bad="1")
    assert manifest.counts.set_aside == {"member-name-too-long": 1}
    assert rows_of(tmp_path / "out")[0]["members"][0]["field"] == "txt"


def test_a_resharded_set_is_resharded_again(given, tmp_path):
    reshard([given / "packed", given / "foreign"], tmp_path / "once", where="words != 5", shuffle=False)
    manifest = reshard(tmp_path / "once", tmp_path / "twice", shuffle=False, shards_out=5)
    names = {source.name for source in manifest.sources if source.kind == "part"}
    assert names == {"packed/chat.jsonl", "foreign/part-0.tar"}
    once, twice = (rows_of(tmp_path / name, samples=True) for name in ("once", "twice"))
    assert list(map(identity, once)) == list(map(identity, twice))
    # the same cut of the same order: the very same tars
    reshard(tmp_path / "twice", tmp_path / "thrice", shuffle=False, shards_out=3)
    for tar in ("000.tar", "001.tar", "002.tar"):
        assert (tmp_path / "thrice" / tar).read_bytes() == (tmp_path / "once" / tar).read_bytes()


def test_licences_come_along(given, tmp_path):
    from shardify.sources.spec import SourceSpec

    spec = SourceSpec(
        path=os.fspath(given / "chat.jsonl"), name="chat", licence="CC-BY 4.0", citation="Somebody"
    )
    pack_dataset(PackOptions(sources=[spec], images=[given / "images"], out=tmp_path / "in", workers=1))
    manifest = reshard(tmp_path / "in", tmp_path / "out", where="record < 9")
    part = next(source for source in manifest.sources if source.kind == "part")
    assert (part.name, part.records, part.licence, part.citation) == ("chat", 9, "CC-BY 4.0", "Somebody")
    records = next(s for s in read_manifest(tmp_path / "in" / "manifest.json").sources if s.kind == "records")
    assert part.fingerprint == records.fingerprint


def test_what_cannot_be_is_refused_before_anything_is_written(given, tmp_path):
    (tmp_path / "list.txt").write_text("two words\n")
    for options, error in (
        ({"where": "wrods > 3"}, UsageError),
        ({"where": "words > 99999"}, UsageError),
        ({"exclude": tmp_path / "list.txt"}, SourceError),
        ({"samples_per_shard": 3}, UsageError),
        ({"shards_out": 1000}, UsageError),
        ({"max_samples": 0}, UsageError),
        ({"max_bad": "many"}, UsageError),
        ({"compress": "gzip"}, UsageError),
        ({"quality": 0}, UsageError),
        ({"shortest_edge": 0}, UsageError),
    ):
        with pytest.raises(error):
            reshard(given / "packed", tmp_path / "out", **options)
        assert not (tmp_path / "out").exists(), options
    before = content(given / "packed")
    with pytest.raises(UsageError, match="read from this folder"):
        reshard(given / "packed", given / "packed")
    with pytest.raises(UsageError, match="named twice"):
        reshard([given / "packed", given / "packed" / "000.tar"], tmp_path / "out")
    assert content(given / "packed") == before


def test_a_finished_set_is_left_alone_and_another_is_refused(given, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("r003\n")
    options = {"where": "words > 5", "exclude": tmp_path / "list.txt"}
    reshard(given / "packed", tmp_path / "out", **options)
    before = content(tmp_path / "out")
    capsys.readouterr()
    reshard(given / "packed", tmp_path / "out", **options)
    assert "nothing to do" in capsys.readouterr().out
    assert content(tmp_path / "out") == before
    with pytest.raises(UsageError, match="where was words > 5, is now words > 6"):
        reshard(given / "packed", tmp_path / "out", **{**options, "where": "words > 6"})
    (tmp_path / "list.txt").write_text("r003\nr004\n")
    with pytest.raises(UsageError, match="exclude was"):
        reshard(given / "packed", tmp_path / "out", **options)
    with pytest.raises(UsageError, match="shards packed"):
        reshard(given / "packed" / "000.tar", tmp_path / "out", where="words > 5")


SCRIPT = """
import sys
from shardify.reshard import ReshardOptions, reshard_dataset
shards, out, exclude, workers = sys.argv[1:]
reshard_dataset(ReshardOptions(shards=[shards], out=out, exclude=exclude, shards_out=40, workers=int(workers)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """60 MB in samples of 60 kB."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "in").mkdir()
    random = np.random.default_rng(0)
    with tarfile.open(folder / "in" / "a.tar", "w") as tar:
        for number in range(1000):
            member = tarfile.TarInfo(f"{number:05}.bin")
            data = random.bytes(60_000)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            member = tarfile.TarInfo(f"{number:05}.json")
            data = json.dumps({"url": f"https://example.org/{number}"}).encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (folder / "list.txt").write_text("https://example.org/400\nhttps://example.org/7\n")
    yield folder
    shutil.rmtree(folder)


def test_killed_at_any_moment_and_run_again(large, tmp_path):
    def start(out, workers):
        arguments = [large / "in", out, large / "list.txt", workers]
        command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
        return subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert start(tmp_path / "whole", 2).wait() == 0
    expected = content(tmp_path / "whole")
    assert read_manifest(tmp_path / "whole" / "manifest.json").counts.set_aside == {"excluded": 2}
    killed = 0
    for case, shards in enumerate((0, 1, 9, 25, 39)):
        out = tmp_path / f"{case}"
        process = start(out, 1 + case % 2)
        while process.poll() is None and (
            not (out / ".packing" / "plan.json").exists() or len(list(out.glob("*.parquet"))) < shards
        ):
            time.sleep(0.0005)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert start(out, 2 - case % 2).wait() == 0
        assert content(out) == expected, f"killed at {shards} shards"
        shutil.rmtree(out)
    assert killed >= 3
