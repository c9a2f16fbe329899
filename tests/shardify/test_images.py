"""Image headers agree with Pillow on whatever is found in the wild; folders and zips give the bytes that are in them."""

import io
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shardify.errors import ImageError, SourceError
from shardify.images import stores
from shardify.images.probe import MAX_PIXELS, ImageHeader, probe, same_format
from shardify.images.stores import FolderStore, Location, open_store

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
    assert reader.read(paths[0], located[0]) == JPEG
    assert reader.read(paths[1], located[1]) == JPEG[:9]
    (tmp_path / "elsewhere" / "x.jpg").unlink()
    with pytest.raises(ImageError, match="image-missing"):
        reader.read(paths[1], located[1])


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
    assert [reader.read(parts, location) for parts, location in zip(paths, located, strict=True)] == list(
        members.values()
    )
    assert open_store(tmp_path / "images.zip").fingerprint == store.fingerprint


def test_a_zip_larger_than_one_guess_of_its_header(tmp_path):
    name = "/".join(["folder" * 20] * 3)
    store = make_zip(tmp_path / "x.zip", {name: JPEG})
    parts = tuple(name.split("/"))
    assert store.reader.read(parts, store.locate([parts])[0]) == JPEG


def test_the_single_top_folder_of_a_zip_may_be_left_out(tmp_path):
    store = make_zip(tmp_path / "x.zip", {"data/coco/a.jpg": JPEG, "data/vg/b.jpg": JPEG})
    assert all(store.locate([("coco", "a.jpg"), ("data", "vg", "b.jpg"), ("vg", "b.jpg")]))
    assert store.locate([("a.jpg",), ("vg",)]) == [None, None]
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
            open_store_reader(path).read(("a",), where)
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
        store.reader.read(("huge",), Location(0, 0, 0, 0, stores.PLAIN_FILE))
