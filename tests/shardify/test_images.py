"""Folders, zips and tars give the bytes that are in them, whatever is wrong with them."""

import contextlib
import errno
import io
import os
import pickle
import resource
import struct
import subprocess
import tarfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shardify.errors import ImageError, PackError, SourceError, UsageError
from shardify.images import stores, zips
from shardify.images.folders import FolderStore
from shardify.images.resolve import Resolver
from shardify.images.spool import SPOOLED, SpoolReader
from shardify.images.stores import Location, open_store

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def encoded(format_, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, format_, **options)
    return buffer.getvalue()


JPEG = encoded("JPEG")


def locate(store, names):
    """The locations of names in a store, None for what it does not hold."""
    rows = store.find(names)
    return [None if row["store"] == stores.MISSING else Location(*row.tolist()[:5]) for row in rows]


def test_a_folder(tmp_path):
    (tmp_path / "root" / "a b").mkdir(parents=True)
    (tmp_path / "root" / "a b" / "é+1.jpg").write_bytes(JPEG)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jpg").write_bytes(JPEG[:9])
    (tmp_path / "root" / "disk").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "root" / "pipe")
    store = open_store(tmp_path / "root")
    assert (store.kind, store.name, store.fingerprint) == ("folder", "root", "")
    paths = [
        "a b/é+1.jpg",
        "disk/x.jpg",
        "a b",
        "none.jpg",
        "pipe",
        "a b/é+1.jpg/x",
        "\ud800",
    ]
    located = locate(store, paths)
    assert [bool(location) for location in located] == [True, True, False, False, False, False, False]
    reader = pickle.loads(pickle.dumps(store.reader))
    assert reader.read(paths[0], located[0]) == JPEG
    assert reader.read(paths[1], located[1]) == JPEG[:9]


def test_what_has_gone_since_it_was_located_costs_no_record(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(JPEG)
    opened, archive = open_store(folder), make_zip(tmp_path / "x.zip", {"a.jpg": JPEG})
    name = "a.jpg"
    for store, away in ((opened, folder / "a.jpg"), (opened, folder), (archive, tmp_path / "x.zip")):
        (location,) = locate(store, [name])
        away.rename(tmp_path / "away")
        with pytest.raises(PackError, match=rf"{away}.*No such file.*same command again continues"):
            store.reader.read(name, location)
        if away == folder:
            with pytest.raises(PackError, match="folder: cannot be read now"):
                locate(store, [name])
        (tmp_path / "away").rename(away)
        assert store.reader.read(name, location) == JPEG


def test_a_machine_that_fails_costs_no_record(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    opened, archive = open_store(tmp_path), make_zip(tmp_path / "x.zip", {"a.jpg": JPEG})
    name = "a.jpg"
    located = [locate(store, [name])[0] for store in (opened, archive)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        for store, location in zip((opened, archive), located, strict=True):
            with pytest.raises(PackError, match="Too many open files"):
                store.reader.read(name, location)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_file_that_cannot_be_opened_is_taken_from_a_later_place(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "first" / "a.jpg").symlink_to("a.jpg")
    (tmp_path / "second" / "a.jpg").write_bytes(JPEG)
    long = "x" * 300
    archive = make_zip(tmp_path / "x.zip", {f"{long}/b.jpg": JPEG})
    places = [open_store(tmp_path / "first"), open_store(tmp_path / "second"), archive]
    asked = ["a.jpg", f"{long}/b.jpg"]
    located = Resolver(places, [()]).locate(asked, 0)
    assert (located.rows["store"].tolist(), located.codes) == ([1, 2], ["", ""])
    # where no other place has it, reading it says what is wrong
    located = Resolver(places[:1], [()]).locate(asked, 0)
    assert (located.rows["store"].tolist(), located.codes) == ([0, stores.MISSING], ["", "image-missing"])
    with pytest.raises(ImageError, match="image-unreadable: Too many levels of symbolic links"):
        places[0].reader.read("a.jpg", Location(*located.rows[0].tolist()[:5]))


@pytest.mark.parametrize("fault", [errno.EINVAL, errno.EILSEQ])
def test_a_name_that_the_file_system_does_not_take_is_no_outage(tmp_path, fault):
    def ask(path):
        raise OSError(fault, os.strerror(fault), path)

    located = Resolver([FolderStore(str(tmp_path), stat_file=ask)], [()]).locate(["a?.jpg"], 0)
    assert located.codes == ["image-missing"]


def test_a_member_that_cannot_be_read_is_taken_from_a_later_place(tmp_path):
    packed = make_zip(tmp_path / "packed.zip", {"a.jpg": JPEG}, zipfile.ZIP_LZMA)
    plain = make_zip(tmp_path / "plain.zip", {"a.jpg": JPEG})
    for places, expected in (([packed, plain], (1, "")), ([packed], (0, "image-unreadable"))):
        located = Resolver(places, [()]).locate(["a.jpg"], 0)
        assert (int(located.rows["store"][0]), located.codes[0]) == expected


def make_zip(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return open_store(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip(tmp_path, method):
    members = {
        "00453/a.jpg": JPEG,
        "b.png": encoded("PNG"),
        "text": b"a" * 100_000,
        "empty": b"",
        "é.jpg": JPEG[:50],
    }
    store = make_zip(tmp_path / "images.zip", members, method)
    assert (store.kind, store.name, len(store.fingerprint)) == ("archive", "images.zip", 32)
    located = locate(store, [*members, "a.jpg"])
    assert located.pop() is None
    reader = pickle.loads(pickle.dumps(store.reader))
    assert [reader.read(name, location) for name, location in zip(members, located, strict=True)] == list(
        members.values()
    )
    assert open_store(tmp_path / "images.zip").fingerprint == store.fingerprint


def test_a_zip_larger_than_one_guess_of_its_header(tmp_path):
    name = "/".join(["folder" * 20] * 3)
    store = make_zip(tmp_path / "x.zip", {name: JPEG})
    assert store.reader.read(name, locate(store, [name])[0]) == JPEG


def test_the_single_top_folder_of_a_zip_may_be_left_out(tmp_path):
    store = make_zip(tmp_path / "x.zip", {"data/coco/a.jpg": JPEG, "data/vg/b.jpg": JPEG})
    assert all(locate(store, ["coco/a.jpg", "data/vg/b.jpg", "vg/b.jpg"]))
    assert locate(store, ["a.jpg", "vg"]) == [None, None]
    macos = {"__MACOSX/data/._a.jpg": b"x", ".DS_Store": b"x", "data/.DS_Store": b"x", "data/a.jpg": JPEG}
    store = make_zip(tmp_path / "macos.zip", macos)
    assert all(locate(store, ["a.jpg", "data/a.jpg"]))
    assert locate(store, ["__MACOSX/data/._a.jpg", ".DS_Store"]) == [None, None]
    assert list(store.examples) == ["data/a.jpg"]
    mixed = make_zip(tmp_path / "y.zip", {"data/a.jpg": JPEG, "b.jpg": JPEG})
    assert locate(mixed, ["a.jpg"]) == [None]


def test_names_written_without_saying_that_they_are_utf8(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, {"é.jpg": JPEG})
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # clear bit 11 in both headers
        content[content.index(signature) + at + 1] &= ~0x08
    path.write_bytes(content)
    assert locate(open_store(path), ["é.jpg"]) != [None]


def test_damaged_members_have_reasons(tmp_path):
    path = tmp_path / "x.zip"
    store = make_zip(path, {"a": JPEG}, zipfile.ZIP_DEFLATED)
    (location,) = locate(store, ["a"])
    good = path.read_bytes()

    def code(content, where):
        path.write_bytes(content)
        with pytest.raises(ImageError) as error:
            open_store_reader(path).read("a", where)
        return error.value.code

    def open_store_reader(path):
        return zips.ZipReader(str(path))

    flipped = bytearray(good)
    flipped[200] ^= 0xFF
    assert code(flipped, location) == "image-damaged"
    assert code(good, location._replace(crc=1)) == "image-damaged"
    assert code(good, location._replace(size=10)) == "image-damaged"
    assert code(good, location._replace(size=len(JPEG) + 1)) == "image-damaged"
    assert code(good, location._replace(offset=7)) == "image-damaged"
    assert code(good[:300], location) == "image-damaged"
    assert code(good, location._replace(size=2**40)) == "image-too-large"
    assert code(good, location._replace(method=zipfile.ZIP_STORED)) == "image-damaged"
    assert code(good, location._replace(method=zipfile.ZIP_LZMA)) == "image-unreadable"
    assert code(good, location._replace(method=stores.ENCRYPTED)) == "image-unreadable"


def zip64_claim(path, *, size, stored, offset):
    """Archive `path` of one stored member, whose directory claims other numbers in a zip64 field."""
    name, local = b"a.jpg", path.with_suffix(".plain")
    make_zip(local, {"a.jpg": JPEG})
    content = local.read_bytes()
    at = content.index(b"PK\1\2")
    entry = bytearray(content[at : at + 46])
    extra = struct.pack("<HHQQQ", 1, 24, size, stored, offset)
    entry[20:28] = b"\xff" * 8
    entry[30:32] = struct.pack("<H", len(extra))
    entry[42:46] = b"\xff" * 4
    end = bytearray(content[content.index(b"PK\5\6") :])
    end[12:16] = struct.pack("<I", len(entry) + len(name) + len(extra))
    path.write_bytes(content[:at] + entry + name + extra + end)
    store = open_store(path)
    return store, locate(store, ["a.jpg"])[0]


def test_zip64_fields(tmp_path):
    good = {"size": len(JPEG), "stored": len(JPEG), "offset": 0}
    store, location = zip64_claim(tmp_path / "x.zip", **good)
    assert store.reader.read("a.jpg", location) == JPEG
    most = 2**64 - 1
    for claim, code in (
        ({"size": most, "stored": most}, "image-too-large"),
        ({"size": most}, "image-too-large"),
        ({"stored": most}, "image-damaged"),
        ({"size": len(JPEG) + 1}, "image-damaged"),
        ({"size": len(JPEG) - 1, "stored": len(JPEG) - 1}, "image-damaged"),
        ({"size": 2**29, "stored": 2**29}, "image-damaged"),
        ({"offset": most}, "image-damaged"),
        ({"offset": 2**63 - 1}, "image-damaged"),
        ({"offset": 9}, "image-damaged"),
    ):
        store, location = zip64_claim(tmp_path / "x.zip", **{**good, **claim})
        with pytest.raises(ImageError, match=code):
            store.reader.read("a.jpg", location)


def test_an_archive_with_more_members_than_a_plain_directory_counts(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number in range(2**16 + 1):
            archive.writestr(zipfile.ZipInfo(f"{number}"), b"%d" % number)
    store = open_store(tmp_path / "x.zip")
    for number in (0, 2**16):
        name = str(number)
        assert store.reader.read(name, locate(store, [name])[0]) == b"%d" % number


def test_encrypted_members_are_seen_by_their_flag(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, {"a": JPEG, "b": JPEG})
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + at] |= 1
    path.write_bytes(content)
    store = open_store(path)
    encrypted, plain = locate(store, ["a", "b"])
    assert encrypted.method == stores.ENCRYPTED
    with pytest.raises(ImageError, match="image-unreadable: encrypted"):
        store.reader.read("a", encrypted)
    assert store.reader.read("b", plain) == JPEG


def test_what_a_zip_ends_in_may_look_like_another_end(tmp_path):
    for number, (comment, behind) in enumerate(
        [(b"PK\5\6" + b"\xff" * 40, b""), (b"", b"appended"), (b"of 7", b"\n")]
    ):
        path = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jpg", JPEG)
            archive.comment = comment
        with open(path, "ab") as file:
            file.write(behind)
        store = open_store(path)
        assert store.reader.read("a.jpg", locate(store, ["a.jpg"])[0]) == JPEG


def test_the_last_of_several_members_of_one_name_counts(tmp_path):
    path = tmp_path / "x.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for data in (b"old", JPEG):
            archive.writestr("a", data)
    store = open_store(path)
    assert store.reader.read("a", locate(store, ["a"])[0]) == JPEG  # as zipfile and unzip have it


def test_a_member_without_a_name_is_passed_over(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, {"a": JPEG, "nameless": b"text"}, zipfile.ZIP_STORED)
    directory = path.read_bytes().rindex(b"nameless")
    with open(path, "r+b") as file:
        file.seek(directory)
        file.write(b"\0")  # a name ends at its first zero byte
    assert list(open_store(tmp_path / "x.zip").listing().chunks()) == [[b"a"]]


@given(st.data())
def test_any_bytes_are_an_archive_or_a_clear_refusal(tmp_path, data):
    path = tmp_path / "x.zip"
    if not path.exists():
        make_zip(path, {"a": JPEG[:100], "b/é": b"text" * 20}, zipfile.ZIP_DEFLATED)
        (tmp_path / "good").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    start = content.index(b"PK\1\2")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(start, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        store = open_store(path)
    except SourceError:
        return
    for chunk in store.listing().chunks():
        for encoded_name in chunk:
            name = encoded_name.decode("utf-8", "surrogatepass")
            with contextlib.suppress(ImageError):
                store.reader.read(name, locate(store, [name])[0])


def test_places_without_images_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--images is empty"):
        open_store("")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="pipe: neither a folder nor a file"):
        open_store(tmp_path / "pipe")
    with pytest.raises(SourceError, match="no images there"):
        open_store(tmp_path / "none")
    path = tmp_path / "x.zip"
    path.write_bytes(b"no archive")
    with pytest.raises(SourceError, match="not a readable zip archive"):
        open_store(path)
    make_zip(path, {"a": JPEG})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError, match="not a readable zip archive"):
        open_store(path)


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(stores.MAX_IMAGE_BYTES + 1)
    store = open_store(tmp_path)
    assert isinstance(store, FolderStore)
    with pytest.raises(ImageError, match="image-too-large"):
        store.reader.read("huge", Location(0, 0, 0, 0, stores.PLAIN_FILE))


def make_tar(path, members, format_=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format_) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return open_store(path)


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar(tmp_path, format_):
    long = "/".join(["folder" * 10] * 3) + "/a.jpg"
    members = {
        "t/00453/a.jpg": JPEG,
        "t/empty": b"",
        "t/big": b"b" * 100_000,
        f"t/{long}": JPEG[:99],
        "t/é.jpg": JPEG[:50],
    }
    store = make_tar(tmp_path / "images.tar", members, format_)
    assert (store.kind, store.name, len(store.fingerprint)) == ("archive", "images.tar", 32)
    reader = pickle.loads(pickle.dumps(store.reader))
    for top in ("t/", ""):  # the single top folder may be left out
        names = [top + name[2:] for name in members]
        located = locate(store, [*names, "a.jpg"])
        assert located.pop() is None
        assert [reader.read(name, place) for name, place in zip(names, located, strict=True)] == list(
            members.values()
        )
    assert open_store(tmp_path / "images.tar").fingerprint == store.fingerprint
    assert store.listed_name(0) == "t/00453/a.jpg"


def test_a_tar_written_by_tar(tmp_path):
    source = tmp_path / "train"
    (source / "deep").mkdir(parents=True)
    (source / "a.jpg").write_bytes(JPEG)
    (source / "deep" / ("n" * 150 + ".jpg")).write_bytes(JPEG[:300])
    os.link(source / "a.jpg", source / "b.jpg")
    (source / "deep" / "c.jpg").symlink_to("../a.jpg")
    (source / "d.jpg").symlink_to("deep/c.jpg")
    (source / "dead.jpg").symlink_to("nowhere.jpg")
    with open(source / "sparse.jpg", "wb") as file:
        file.truncate(1024 * 1024)
        file.seek(512 * 1024)
        file.write(b"x")
    path = tmp_path / "x.tar"
    subprocess.run(["tar", "--sparse", "-cf", path, "-C", source, "."], check=True)
    store = open_store(path)
    names = ["a.jpg", "b.jpg", "deep/c.jpg", "d.jpg", "deep/" + "n" * 150 + ".jpg"]
    located = locate(store, names)
    assert [store.reader.read("", place) for place in located] == [JPEG] * 4 + [JPEG[:300]]
    assert locate(store, ["dead.jpg", "deep", "."]) == [None] * 3
    (sparse,) = locate(store, ["sparse.jpg"])
    with pytest.raises(ImageError, match="image-unreadable: a sparse file"):
        store.reader.read("", sparse)
    assert Resolver([store], [()]).locate(["sparse.jpg"], 0).codes == ["image-unreadable"]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_in_a_tar_are_what_tar_would_extract(tmp_path, format_):
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    deep = "a" * 60 + "/" + "b" * 60 + "/a.jpg"  # longer than a header's field
    members = [
        ("ü/a.jpg", b"umlaut"), ("umlaut.jpg", hard, "ü/a.jpg"),
        ("first.jpg", b"first"), ("kept.jpg", hard, "first.jpg"), ("by-name.jpg", soft, "first.jpg"),
        ("chain.jpg", hard, "by-name.jpg"), ("first.jpg", b"second"),
        ("was-link.jpg", soft, "first.jpg"), ("was-link.jpg", b"member"),
        ("was-member.jpg", b"member"), ("was-member.jpg", hard, "kept.jpg"),
        ("circle.jpg", soft, "circle-too.jpg"), ("circle-too.jpg", soft, "circle.jpg"),
    ]  # fmt: skip
    if format_ != tarfile.USTAR_FORMAT:
        members += [(deep, b"deep"), ("deep.jpg", hard, deep)]
    with tarfile.open(tmp_path / "x.tar", "w", format=format_) as archive:
        for name, content, *target in members:
            entry = tarfile.TarInfo(name)
            if target:
                entry.type, entry.linkname = content, target[0]
            else:
                entry.size = len(content)
            archive.addfile(entry, None if target else io.BytesIO(content))
    subprocess.run(["tar", "-xf", tmp_path / "x.tar"], check=True, cwd=tmp_path, env={"LC_ALL": "C.UTF-8"})
    names = sorted({name for name, *_ in members if "circle" not in name})
    store = open_store(tmp_path / "x.tar")
    assert {
        name: store.reader.read("", place) for name, place in zip(names, locate(store, names), strict=True)
    } == {name: (tmp_path / name).read_bytes() for name in names}
    assert locate(store, ["circle.jpg"]) == [None]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_names_in_tars_that_are_no_utf8_are_latin1(tmp_path, format_):
    long = "é" * 90 + "/" + "ü" * 50 + ".jpg"  # in an extension, or partly in the prefix
    names = ["café.jpg", long, "b\\xe9.jpg"]
    with tarfile.open(tmp_path / "x.tar", "w", format=format_, encoding="latin-1") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, names[0]
        archive.addfile(link)
    store = open_store(tmp_path / "x.tar")
    assert [store.listed_name(number) for number in range(4)] == ["café.jpg", long, "b/xe9.jpg", "link.jpg"]


def test_symbolic_links_in_zips_are_told(tmp_path):
    link = zipfile.ZipInfo("b.jpg")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.jpg", JPEG)
        archive.writestr(link, "a.jpg")
    store = open_store(tmp_path / "x.zip")
    located = Resolver([store], [()]).locate(["a.jpg", "b.jpg"], 0)
    assert located.codes == ["", "image-unreadable"]
    with pytest.raises(ImageError, match="image-unreadable: a symbolic link"):
        store.reader.read("b.jpg", Location(*located.rows[1].tolist()[:5]))


def test_hostile_names_in_archives_are_only_names(tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    names = ["../secret", "/etc/passwd", "a/../../secret", "n" * 5000, "./././a.jpg", "b\\c.jpg"]
    members = {name: b"%d" % number for number, name in enumerate(names)}
    for store in (make_tar(tmp_path / "x.tar", members), make_zip(tmp_path / "x.zip", members)):
        found = Resolver([store], [()]).locate([*names, "a.jpg", "b/c.jpg", "etc/passwd"], 0)
        unsafe = "image-path-unsafe"
        assert found.codes == [unsafe, unsafe, unsafe, "", "", "", "", "", ""]
        assert [store.reader.read("", Location(*row[:5])) for row in found.rows[3:].tolist()] == [
            b"3", b"4", b"5", b"4", b"5", b"1"
        ]  # fmt: skip


def test_the_last_of_several_tar_members_of_one_name_counts(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for data in (b"old", JPEG):
            entry = tarfile.TarInfo("a")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    store = open_store(tmp_path / "x.tar")
    assert store.reader.read("a", locate(store, ["a"])[0]) == JPEG


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_an_archive_that_changes_while_it_is_packed_costs_no_record(tmp_path, make):
    path = tmp_path / "images"
    store = make(path, {"a.jpg": JPEG, "b.jpg": b"b" * len(JPEG)})
    located = locate(store, ["a.jpg", "b.jpg"])
    other = pickle.loads(pickle.dumps(store.reader))
    assert store.reader.read("a.jpg", located[0]) == JPEG
    make(tmp_path / "new", {"b.jpg": b"b" * len(JPEG), "a.jpg": JPEG})
    (tmp_path / "new").replace(path)
    assert store.reader.read("a.jpg", located[0]) == JPEG  # the old one is still open here
    with pytest.raises(PackError, match="images: has changed since packing began"):
        other.read("a.jpg", located[0])


def test_a_tar_that_becomes_shorter_while_it_is_packed_costs_no_record(tmp_path):
    store = make_tar(tmp_path / "x.tar", {"a.jpg": JPEG})
    (place,) = locate(store, ["a.jpg"])
    assert store.reader.read("a.jpg", place) == JPEG
    os.truncate(tmp_path / "x.tar", 600)
    with pytest.raises(PackError, match=r"x\.tar: has become shorter"):
        store.reader.read("a.jpg", place)


def test_more_archives_than_a_process_may_open(tmp_path):
    stores = [make_zip(tmp_path / f"{number}.zip", {"a": JPEG + b"%d" % number}) for number in range(150)]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number, store in enumerate(stores):
            assert store.reader.read("a", locate(store, ["a"])[0]) == JPEG + b"%d" % number
    assert len(os.listdir("/proc/self/fd")) <= before + 128
    del store, stores  # with the last one to know an archive, it is closed
    assert len(os.listdir("/proc/self/fd")) == before


def test_cut_off_and_damaged_tars_are_refused_with_the_byte_where(tmp_path):
    path = tmp_path / "x.tar"
    make_tar(path, {"a": JPEG, "b" * 120: JPEG, "c": JPEG})
    good = path.read_bytes()
    padded = 512 + -(-len(JPEG) // 512) * 512

    def refusal(content):
        path.write_bytes(content)
        with pytest.raises(SourceError) as error:
            open_store(path)
        return str(error.value)

    assert "member at byte 0 ends at byte" in refusal(good[:700])
    assert f"cut off at byte {padded + 100}" in refusal(good[: padded + 100])
    assert f"long name or extended header at byte {padded} is damaged or cut off" in refusal(
        good[: padded + 530]
    )
    assert f"no tar header at byte {padded}" in refusal(good[:padded] + b"x" * 512 + good[padded + 512 :])
    assert "cut off at byte 0" in refusal(b"")
    assert "not a readable tar" in refusal(b"no archive at all")
    path.write_bytes(good[:padded])  # without an end mark, as some writers leave it
    assert locate(open_store(path), ["a"]) != [None]
    store = open_store(path)
    (place,) = locate(store, ["a"])
    os.truncate(path, 600)
    with pytest.raises(PackError, match=r"x\.tar: has changed since packing began"):
        store.reader.read("a", place)


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tars_are_refused_with_what_to_do(tmp_path, mode, name):
    with tarfile.open(tmp_path / "x.tar.gz", mode):
        pass
    with pytest.raises(SourceError, match=f"compressed by {name}.*decompress it to a plain .tar"):
        open_store(tmp_path / "x.tar.gz")


@given(st.data())
def test_any_bytes_are_a_tar_or_a_clear_refusal(tmp_path, data):
    path = tmp_path / "x.tar"
    if not path.exists():
        make_tar(path, {"a": JPEG[:100], "l" * 130: b"text" * 20, "é": b""}, tarfile.PAX_FORMAT)
        (tmp_path / "good").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    for at in range(0, len(content) - 512, 512):  # a checksum that holds leads further in
        if content[at + 257 : at + 262] == b"ustar":
            total = sum(content[at : at + 512]) - sum(content[at + 148 : at + 156]) + 256
            content[at + 148 : at + 156] = b"%06o\0 " % total
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        store = open_store(path)
    except SourceError:
        return
    numbers = range(len(store.listing()))
    for row in store.listed(numbers):
        with contextlib.suppress(ImageError):
            store.reader.read("", Location(*row.tolist()[:5]))


def test_many_threads_and_processes_read_one_archive(tmp_path):
    members = {f"{n}.jpg": os.urandom(5000 + n) for n in range(200)}
    root = tmp_path / "root"
    root.mkdir()
    for name, data in members.items():
        (root / name).write_bytes(data)
    deflated = tmp_path / "deflated.zip"
    places = [
        open_store(root),
        make_zip(tmp_path / "x.zip", members),
        make_zip(deflated, members, zipfile.ZIP_DEFLATED),
        make_tar(tmp_path / "x.tar", members),
    ]
    for store in places:
        located = locate(store, list(members))

        def read(name, place, reader=store.reader):
            return reader.read(name, place)

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(read, members, located)) == list(members.values())
        child = os.fork()
        if not child:
            same = [read(name, place) for name, place in zip(members, located, strict=True)] == list(
                members.values()
            )
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_opening_leaves_no_file_open(tmp_path):
    make_zip(tmp_path / "x.zip", {"a": JPEG})
    make_tar(tmp_path / "x.tar", {"a": JPEG})
    before = os.listdir("/proc/self/fd")
    kept = [open_store(tmp_path / name) for name in ("x.zip", "x.tar")]
    assert os.listdir("/proc/self/fd") == before
    assert kept


@pytest.mark.parametrize("kind", ["folder", "stored", "deflated", "tar", "spool"])
def test_an_image_is_read_to_the_place_that_is_given(tmp_path, kind):
    members = {
        "a.jpg": JPEG,
        "long/name/of/b.png": encoded("PNG"),
        "c.jpg": JPEG[:70],
        "e": b"",
        "d.jpg": JPEG[5:],
    }
    names = [*members, *members]
    if kind == "folder":
        for name, data in members.items():
            (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "x" / name).write_bytes(data)
    elif kind == "tar":
        with tarfile.open(tmp_path / "x", "w") as archive:
            for name, data in members.items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    elif kind != "spool":
        with zipfile.ZipFile(tmp_path / "x", "w") as archive:
            for name, data in members.items():
                info = zipfile.ZipInfo(name)
                info.compress_type = zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
                info.extra = b"\x55\x55\4\0time" if name == "c.jpg" else b""
                archive.writestr(info, data)
    if kind == "spool":
        (tmp_path / "x").write_bytes(b"".join(members.values()))
        begins = np.cumsum([0, *map(len, members.values())]).tolist()
        located = [
            Location(begin, len(data), len(data), 0, SPOOLED)
            for begin, data in zip(begins[:-1], members.values(), strict=True)
        ] * 2
        reader = SpoolReader(str(tmp_path / "x"))
    else:
        store = open_store(tmp_path / "x")
        located, reader = locate(store, names), store.reader
    memory = memoryview(bytearray(len(JPEG) * 8))
    placed = 0
    for name, location in zip(names, located, strict=True):
        asked = []

        def room(size, asked=asked):
            asked.append(size)
            return memory[100 : 100 + size]

        data = reader.read(name, location, room)
        assert data == members[name]
        assert len(asked) <= 1
        if isinstance(data, memoryview):
            assert asked == [len(data)]
            assert memory[100 : 100 + len(data)] == data
            placed += 1
        assert reader.read(name, location, lambda _: None) == members[name]
    if kind == "deflated":
        assert not placed
    else:
        assert placed == len(names)


def test_faults_are_the_same_wherever_an_image_is_read_to(tmp_path):
    path = tmp_path / "x.zip"
    names = ["a.jpg", "b.jpg", "c.jpg"]
    store = make_zip(path, dict.fromkeys(names, JPEG))
    located = locate(store, names)
    content = bytearray(path.read_bytes())
    content[located[1].offset + 100] ^= 0xFF
    content[located[2].offset] ^= 0xFF
    path.write_bytes(content)
    reader = zips.ZipReader(str(path))

    def outcome(number, room):
        try:
            return bytes(reader.read(names[number], located[number], room))
        except ImageError as error:
            return error.code, error.detail

    memory = memoryview(bytearray(2 * len(JPEG)))
    for number in (0, 1, 0, 2, 0):
        assert outcome(number, lambda size: memory[:size]) == outcome(number, None)
    content[located[2].offset] ^= 0xFF
    path.write_bytes(content[: located[2].offset + 100])
    found = outcome(2, lambda size: memory[:size])
    assert found == outcome(2, None)
    assert "the archive ends" in found[1]
    with open(tmp_path / "short", "wb") as file:
        file.write(JPEG)
    with pytest.raises(PackError, match="shorter"):
        SpoolReader(str(tmp_path / "short")).read(
            "", Location(9, len(JPEG), len(JPEG), 0, SPOOLED), lambda size: memory[:size]
        )


def test_no_image_is_read_twice_for_its_header(tmp_path, monkeypatch):
    members = {f"{n}.jpg": os.urandom(5000) for n in range(40)}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number, (name, data) in enumerate(members.items()):
            info = zipfile.ZipInfo(name)
            info.extra = (
                b"\x55\x55" + (4 + number * 7 % 13).to_bytes(2, "little") + bytes(4 + number * 7 % 13)
            )  # as if aligned
            archive.writestr(info, data)
    store = open_store(tmp_path / "x.zip")
    located, real, read = locate(store, list(members)), os.preadv, []

    def preadv(file, places, at):
        read.append(real(file, places, at))
        return read[-1]

    monkeypatch.setattr(os, "preadv", preadv)
    memory = memoryview(bytearray(5000))
    for (name, data), location in zip(members.items(), located, strict=True):
        assert store.reader.read(name, location, lambda size: memory[:size]) == data
    assert sum(read) < 1.1 * 40 * 5000


def test_file_systems_that_give_less_at_once(tmp_path, monkeypatch):
    members = {f"{n}.jpg": os.urandom(5000) for n in range(4)}
    store = make_zip(tmp_path / "x.zip", members)
    located, real = locate(store, list(members)), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, places, at: real(file, [places[0][:7]], at))
    memory = memoryview(bytearray(5000))
    for (name, data), location in zip(members.items(), located, strict=True):
        assert store.reader.read(name, location, lambda size: memory[:size]) == data
        (tmp_path / "spool").write_bytes(b"before" + data)
        reader, spooled = SpoolReader(str(tmp_path / "spool")), Location(6, 5000, 5000, 0, SPOOLED)
        assert reader.read("", spooled, lambda size: memory[:size]) == data


def test_a_file_that_grows_or_shrinks_while_it_is_read_is_what_it_then_is(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    reader, real = FolderStore(str(tmp_path)).reader, os.readv
    memory = memoryview(bytearray(2 * len(JPEG)))

    def readv(file, places):
        os.truncate(tmp_path / "a.jpg", 60)
        return real(file, places)

    monkeypatch.setattr(os, "readv", readv)
    assert (
        reader.read("a.jpg", Location(0, 0, 0, 0, stores.PLAIN_FILE), lambda size: memory[:size]) == JPEG[:60]
    )
