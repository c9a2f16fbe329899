"""Image headers agree with Pillow on whatever is found in the wild; folders and zips give the bytes that are in them."""

import contextlib
import io
import os
import pickle
import resource
import struct
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shardify.errors import ImageError, PackError, SourceError
from shardify.format.names import IMAGE_FORMATS, is_image_field
from shardify.images import stores
from shardify.images.probe import MAX_PIXELS, ImageHeader, probe, same_format
from shardify.images.stores import FolderStore, Location, open_store
from shardify.records import ImageRef
from shardify.survey import locate_images

PIXELS = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


def encoded(format_, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, format_, **options)
    return buffer.getvalue()


JPEG = encoded("JPEG")


def code_of(data):
    with pytest.raises(ImageError) as error:
        probe(data)
    return error.value.code


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (JPEG, "jpg"),
        (encoded("JPEG", progressive=True), "jpg"),
        (encoded("JPEG", "L", optimize=True), "jpg"),
        (encoded("JPEG", "CMYK"), "jpg"),
        (encoded("PNG"), "png"),
        (encoded("PNG", "P"), "png"),
        (encoded("GIF"), "gif"),
        (encoded("WEBP"), "webp"),
        (encoded("WEBP", lossless=True), "webp"),
        (encoded("WEBP", "RGBA", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"), "webp"),
        (encoded("BMP"), "bmp"),
        (encoded("TIFF"), "tif"),
        (encoded("TIFF", compression="tiff_lzw"), "tif"),
        (encoded("JPEG2000"), "jp2"),
        (encoded("AVIF"), "avif"),
        (encoded("PPM"), "ppm"),
    ],
)
def test_formats(data, name):
    assert probe(data) == ImageHeader(name, 53, 37)
    assert probe(memoryview(data)) == ImageHeader(name, 53, 37)


@pytest.mark.parametrize(
    "data", [JPEG, encoded("JPEG", progressive=True), encoded("PNG"), encoded("WEBP"), encoded("GIF")]
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_cut_off_ends_are_noticed(data, share):
    assert code_of(data[: int(len(data) * share)]) in ("image-truncated", "image-unrecognised")
    assert code_of(data[: int(len(data) * 0.7)]) == "image-truncated"


def test_appended_bytes_are_no_fault():
    for data in (JPEG, encoded("PNG"), encoded("WEBP"), encoded("GIF")):
        assert probe(data + b"\0" * 100).width == 53


def test_a_thumbnails_end_is_not_the_images_end():
    thumbnail = b"\xff\xe1" + struct.pack(">H", len(JPEG) + 2) + JPEG
    data = JPEG[:2] + thumbnail + JPEG[2:]
    assert probe(data) == ImageHeader("jpg", 53, 37)
    assert code_of(data[: len(data) - len(JPEG) // 2]) == "image-truncated"


def test_what_is_no_image():
    assert code_of(b"") == "image-empty"
    assert code_of(b"<html>not found</html>") == "image-unrecognised"
    assert code_of(b"\x89PNG\r\n\x1a\n") == "image-truncated"


def test_claimed_sizes_are_bounded():
    png = bytearray(encoded("PNG"))
    png[16:24] = struct.pack(">II", MAX_PIXELS, 2)
    assert code_of(bytes(png)) == "image-too-large"
    png[16:24] = struct.pack(">II", 0, 2)
    assert code_of(bytes(png)) == "image-empty"


@given(
    data=st.binary(max_size=80), start=st.sampled_from([0, 3, 12, 30, 200]), which=st.sampled_from([0, 1, 2])
)
def test_any_bytes_are_an_image_or_a_reason(data, start, which):
    try:
        probe((JPEG, encoded("PNG"), encoded("WEBP"))[which][:start] + data)
    except ImageError as error:
        assert error.code.startswith("image-")


def test_headers_agree_with_pillow_on_real_images(real_data):
    checked = 0
    for folder, _, files in os.walk(real_data):
        for name in files:
            if not name.lower().endswith((".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")):
                continue
            path = os.path.join(folder, name)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    with Image.open(path) as image:
                        size = image.size
                        image.load()
            except Exception:
                continue  # what Pillow cannot load may or may not show in a header
            with open(path, "rb") as file:
                header = probe(file.read())
            assert (header.width, header.height) == size, path
            checked += 1
    assert checked > 500


def test_extensions():
    assert same_format("JPEG", "jpg")
    assert same_format("tiff", "tif")
    assert not same_format("jpg", "png")
    assert not same_format("mp4", "jpg")
    assert all(
        same_format(name, kind) and is_image_field(f"0.{name}") for name, kind in IMAGE_FORMATS.items()
    )


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
        ("a b", "é+1.jpg"),
        ("disk", "x.jpg"),
        ("a b",),
        ("none.jpg",),
        ("pipe",),
        ("a b", "é+1.jpg", "x"),
        ("\ud800",),
    ]
    located = store.locate(paths)
    assert [bool(location) for location in located] == [True, True, False, False, False, False, False]
    reader = pickle.loads(pickle.dumps(store.reader))
    assert reader.read("/".join(paths[0]), located[0]) == JPEG
    assert reader.read("/".join(paths[1]), located[1]) == JPEG[:9]


def test_what_has_gone_since_it_was_located_costs_no_record(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(JPEG)
    opened, archive = open_store(folder), make_zip(tmp_path / "x.zip", {"a.jpg": JPEG})
    parts = ("a.jpg",)
    for store, away in ((opened, folder / "a.jpg"), (opened, folder), (archive, tmp_path / "x.zip")):
        (location,) = store.locate([parts])
        away.rename(tmp_path / "away")
        with pytest.raises(PackError, match=rf"{away}.*No such file.*same command again continues"):
            store.reader.read("/".join(parts), location)
        if away == folder:
            with pytest.raises(PackError, match="folder: cannot be read now"):
                store.locate([parts])
        (tmp_path / "away").rename(away)
        assert store.reader.read("/".join(parts), location) == JPEG


def test_a_machine_that_fails_costs_no_record(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    opened, archive = open_store(tmp_path), make_zip(tmp_path / "x.zip", {"a.jpg": JPEG})
    parts = ("a.jpg",)
    located = [store.locate([parts])[0] for store in (opened, archive)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        for store, location in zip((opened, archive), located, strict=True):
            with pytest.raises(PackError, match="Too many open files"):
                store.reader.read("/".join(parts), location)
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
    references = [ImageRef("a.jpg"), ImageRef(f"{long}/b.jpg")]
    rows, faults = locate_images(references, places)
    assert (rows["store"].tolist(), faults) == ([1, 2], ["", ""])
    # where no other place has it, reading it says what is wrong
    rows, faults = locate_images(references, places[:1])
    assert (rows["store"].tolist(), faults) == ([0, stores.MISSING], ["", "image-missing"])
    *location, _, _, _ = rows[0].tolist()
    with pytest.raises(ImageError, match="image-unreadable: Too many levels of symbolic links"):
        places[0].reader.read("a.jpg", Location(*location))


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
    paths = [tuple(name.split("/")) for name in members]
    located = store.locate([*paths, ("a.jpg",)])
    assert located.pop() is None
    reader = pickle.loads(pickle.dumps(store.reader))
    assert [
        reader.read("/".join(parts), location) for parts, location in zip(paths, located, strict=True)
    ] == list(members.values())
    assert open_store(tmp_path / "images.zip").fingerprint == store.fingerprint


def test_a_zip_larger_than_one_guess_of_its_header(tmp_path):
    name = "/".join(["folder" * 20] * 3)
    store = make_zip(tmp_path / "x.zip", {name: JPEG})
    parts = tuple(name.split("/"))
    assert store.reader.read("/".join(parts), store.locate([parts])[0]) == JPEG


def test_the_single_top_folder_of_a_zip_may_be_left_out(tmp_path):
    store = make_zip(tmp_path / "x.zip", {"data/coco/a.jpg": JPEG, "data/vg/b.jpg": JPEG})
    assert all(store.locate([("coco", "a.jpg"), ("data", "vg", "b.jpg"), ("vg", "b.jpg")]))
    assert store.locate([("a.jpg",), ("vg",)]) == [None, None]
    macos = {"__MACOSX/data/._a.jpg": b"x", ".DS_Store": b"x", "data/.DS_Store": b"x", "data/a.jpg": JPEG}
    store = make_zip(tmp_path / "macos.zip", macos)
    assert all(store.locate([("a.jpg",), ("data", "a.jpg")]))
    assert store.locate([("__MACOSX", "data", "._a.jpg"), (".DS_Store",)]) == [None, None]
    assert list(store.examples) == ["data/a.jpg"]
    mixed = make_zip(tmp_path / "y.zip", {"data/a.jpg": JPEG, "b.jpg": JPEG})
    assert mixed.locate([("a.jpg",)]) == [None]


def test_names_written_without_saying_that_they_are_utf8(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, {"é.jpg": JPEG})
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # clear bit 11 in both headers
        content[content.index(signature) + at + 1] &= ~0x08
    path.write_bytes(content)
    assert open_store(path).locate([("é.jpg",)]) != [None]


def test_damaged_members_have_reasons(tmp_path):
    path = tmp_path / "x.zip"
    store = make_zip(path, {"a": JPEG}, zipfile.ZIP_DEFLATED)
    (location,) = store.locate([("a",)])
    good = path.read_bytes()

    def code(content, where):
        path.write_bytes(content)
        with pytest.raises(ImageError) as error:
            open_store_reader(path).read("a", where)
        return error.value.code

    def open_store_reader(path):
        return stores.ZipReader(str(path))

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
    return store, store.locate([("a.jpg",)])[0]


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
        parts = (str(number),)
        assert store.reader.read("/".join(parts), store.locate([parts])[0]) == b"%d" % number


def test_encrypted_members_are_seen_by_their_flag(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, {"a": JPEG, "b": JPEG})
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + at] |= 1
    path.write_bytes(content)
    store = open_store(path)
    encrypted, plain = store.locate([("a",), ("b",)])
    assert encrypted.method == stores.ENCRYPTED
    with pytest.raises(ImageError, match="image-unreadable: encrypted"):
        store.reader.read("a", encrypted)
    assert store.reader.read("b", plain) == JPEG


def test_the_last_of_several_members_of_one_name_counts(tmp_path):
    path = tmp_path / "x.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for data in (b"old", JPEG):
            archive.writestr("a", data)
    store = open_store(path)
    assert store.reader.read("a", store.locate([("a",)])[0]) == JPEG  # as zipfile and unzip have it


def test_a_member_without_a_name_is_passed_over(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, {"a": JPEG, "nameless": b"text"}, zipfile.ZIP_STORED)
    directory = path.read_bytes().rindex(b"nameless")
    with open(path, "r+b") as file:
        file.seek(directory)
        file.write(b"\0")  # a name ends at its first zero byte
    assert list(open_store(tmp_path / "x.zip").members) == ["a"]


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
    for name in store.members:
        parts = tuple(name.split("/"))
        with contextlib.suppress(ImageError):
            store.reader.read("/".join(parts), store.locate([parts])[0])


def test_places_without_images_are_refused(tmp_path):
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
