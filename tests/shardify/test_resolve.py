"""Images are found where their paths say, or where only one file can be meant; a wrong picture is worse than a missing one."""

import io
import json
import os
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shardify.convert import PackOptions, pack_dataset
from shardify.errors import PackError, UsageError
from shardify.format.manifest import read_manifest
from shardify.images import folders, stores
from shardify.images.archives import make_store
from shardify.images.folders import FolderStore
from shardify.images.listing import Kind, Listing, encode, stem_of
from shardify.images.resolve import Resolver
from shardify.images.stores import LISTED, MISSING, Location, open_store

EXACT, BY_PREFIX, BY_SUFFIX, BY_STEM = range(4)


def folder(path, *names, mount=""):
    """A folder of files that hold their own names."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(name)
    path.mkdir(exist_ok=True)
    return open_store(path, mount)


def archive(path, *names, mount="", content=lambda name: name):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, content(name))
    return open_store(path, mount)


def resolve(places, path, prefixes=()):
    """What `path` leads to: (store, name or content, how), or the reason code."""
    resolver = Resolver(places, [prefixes])
    located = resolver.locate([path], 0)
    if located.codes[0]:
        return located.codes[0]
    *location, store, rule, how = located.rows[0].tolist()
    place, location = places[store], Location(*location)
    if location.method == LISTED:
        name = place.listed_name(location.offset)
    else:
        name = resolver.rules[rule].apply(path).removeprefix(f"{place.mount}/")
    return store, place.reader.read(name, location).decode(), how


def test_the_order_of_stores_decides_between_exact_places(tmp_path):
    first, second = folder(tmp_path / "1", "a/x.jpg"), folder(tmp_path / "2", "a/x.jpg", "y.jpg")
    assert resolve([first, second], "a/x.jpg") == (0, "a/x.jpg", EXACT)
    assert resolve([second, first], "./a//x.jpg") == (0, "a/x.jpg", EXACT)
    assert resolve([first, second], "y.jpg") == (1, "y.jpg", EXACT)
    assert resolve([first, second], "../y.jpg") == "image-path-unsafe"
    assert resolve([first, second], "z.jpg") == "image-missing"
    assert resolve([], "z.jpg") == "image-missing"


def test_a_mounted_store_is_called_by_its_virtual_folder(tmp_path):
    coco = folder(tmp_path / "coco", "1.jpg", mount="coco/train2017")
    zipped = archive(tmp_path / "train.zip", "train2017/2.jpg", mount="coco/train2017")
    places = [coco, zipped]
    assert resolve(places, "coco/train2017/1.jpg") == (0, "1.jpg", EXACT)
    assert resolve(places, "coco/train2017/2.jpg") == (1, "train2017/2.jpg", EXACT)  # its top folder left out
    assert resolve(places, "1.jpg") == (0, "1.jpg", BY_SUFFIX)
    assert resolve(places, "train2017/1.jpg") == (0, "1.jpg", BY_SUFFIX)
    assert resolve(places, "train2017/2.jpg") == (1, "train2017/2.jpg", BY_SUFFIX)
    assert resolve(places, "data/coco/train2017/1.jpg") == (0, "1.jpg", BY_SUFFIX)
    assert resolve(places, "gqa/train2017/1.jpg") == "image-missing"
    assert resolve(places, "vg/1.jpg") == "image-missing"


def test_prefix_maps_are_tried_first_and_in_their_order(tmp_path):
    place = folder(tmp_path / "root", "train2014/COCO_train2014_1.jpg", "coco/train2017/1.jpg", "b/2.jpg")
    maps = [("coco/train2017/", "train2014/COCO_train2014_"), ("coco/", "b/"), ("", "coco/")]
    assert resolve([place], "coco/train2017/1.jpg", maps) == (0, "train2014/COCO_train2014_1.jpg", BY_PREFIX)
    assert resolve([place], "coco/train2017/1.jpg", maps[1:]) == (0, "coco/train2017/1.jpg", EXACT)
    assert resolve([place], "coco/2.jpg", maps) == (0, "b/2.jpg", BY_PREFIX)
    assert resolve([place], "train2017/1.jpg", maps) == (0, "coco/train2017/1.jpg", BY_PREFIX)
    # a rewritten path is found by its stem too
    assert resolve([place], "coco/2.png", maps) == (0, "b/2.jpg", BY_STEM)
    resolver = Resolver([place], [maps[:2], maps[1:]])
    assert [(rule.old, rule.new) for rule in resolver.rules] == [("", ""), *maps]
    assert resolver.locate(["coco/2.jpg"], 1).rows["rule"].tolist() == [2]


@pytest.mark.parametrize("new", ["/etc/", "../", "a/../../", "a\\b"])
def test_a_prefix_map_that_leads_outside_is_refused(new):
    with pytest.raises(UsageError, match="inside of an image root"):
        Resolver([], [[("coco/", new)]])


def test_a_path_that_a_prefix_map_makes_unsafe_is_nowhere(tmp_path):
    (tmp_path / "secret.jpg").write_text("secret")
    place = folder(tmp_path / "root", "b/x.jpg")
    assert resolve([place], "a../secret.jpg", [("a", "")]) == "image-missing"


def test_archives_with_folders_of_their_own(tmp_path):
    art = archive(
        tmp_path / "wikiart.zip", "data/wikiart/images/1.jpg", "data/wikiart/2.jpg", "data/list.txt"
    )
    other = folder(tmp_path / "other", "3.jpg")
    assert resolve([other, art], "wikiart/images/1.jpg")[1:] == ("data/wikiart/images/1.jpg", EXACT)
    deeper = archive(tmp_path / "x.zip", "x/y/data/wikiart/images/1.jpg", "z/1.txt")
    assert resolve([other, deeper], "wikiart/images/1.jpg")[1:] == (
        "x/y/data/wikiart/images/1.jpg",
        BY_SUFFIX,
    )
    assert resolve([other, deeper], "images/wikiart/1.jpg") == "image-missing"
    assert resolve([other, deeper], "i/wikiart/images/1.jpg") == "image-missing"


def test_two_components_or_a_single_store_make_a_match(tmp_path):
    flat, nested = folder(tmp_path / "flat", "1.jpg"), folder(tmp_path / "nested", "00453/2.jpg")
    assert resolve([flat], "cc3m/images/1.jpg") == (0, "1.jpg", BY_SUFFIX)
    assert resolve([flat, nested], "cc3m/images/1.jpg") == "image-missing"
    assert resolve([flat, nested], "cc3m/images/00453/2.jpg") == (1, "00453/2.jpg", BY_SUFFIX)


def test_a_path_that_names_a_store_is_not_taken_from_another(tmp_path):
    gqa = folder(tmp_path / "gqa", "images/1.jpg", "images/2.jpg")
    ocr = folder(tmp_path / "ocr_vqa", "images/2.jpg")
    for places in ([gqa, ocr], [ocr, gqa]):
        store = places.index(ocr)
        assert resolve(places, "ocr_vqa/images/2.jpg") == (store, "images/2.jpg", BY_SUFFIX)
        assert resolve(places, "ocr_vqa/images/1.jpg") == "image-missing"
        assert resolve(places, "gqa/images/1.jpg") == (1 - store, "images/1.jpg", BY_SUFFIX)
    # a store's own path may be all that is in front
    vg = folder(tmp_path / "vg" / "VG_100K", "1.jpg")
    assert resolve([gqa, vg], "vg/VG_100K/1.jpg") == (1, "1.jpg", BY_SUFFIX)
    assert resolve([gqa, vg], "coco/VG_100K/1.jpg") == "image-missing"


def test_what_fits_equally_well_is_ambiguous(tmp_path):
    one = folder(tmp_path / "one", "a/x.jpg", "b/x.jpg", "c/a/y.jpg", "a/y.jpg")
    assert resolve([one], "x.jpg") == "image-ambiguous"
    assert resolve([one], "a/y.jpg") == (0, "a/y.jpg", EXACT)
    assert resolve([one], "y.jpg") == "image-ambiguous"
    assert resolve([one], "z/c/a/y.jpg") == (0, "c/a/y.jpg", BY_SUFFIX)  # the longest
    two = folder(tmp_path / "two", "d/c/a/y.jpg")
    assert resolve([one, two], "z/c/a/y.jpg") == (0, "c/a/y.jpg", BY_SUFFIX)
    three = folder(tmp_path / "three", "c/a/y.jpg")
    assert resolve([one, three], "z/c/a/y.jpg") == "image-ambiguous"
    stems = folder(tmp_path / "stems", "1.gif", "1.png")
    assert resolve([stems], "1.jpg") == "image-ambiguous"


def test_one_picture_in_several_zips_is_not_ambiguous(tmp_path):
    places = [archive(tmp_path / f"{n}.zip", "t/a/x.jpg", content=lambda _: "same", mount="m") for n in "12"]
    assert resolve(places, "x.jpg") == (0, "same", BY_SUFFIX)
    places.append(archive(tmp_path / "3.zip", "t/a/x.jpg", content=lambda _: "else", mount="m"))
    assert resolve(places, "x.jpg") == "image-ambiguous"


def test_stems(tmp_path):
    place = folder(
        tmp_path / "r", "ocr/1.gif", "ocr/2.JPG", "ocr/3", "ocr/b.v2", "ocr/4.json", "ocr/.jpg", "x/5.PNG"
    )
    assert resolve([place], "ocr/1.jpg") == (0, "ocr/1.gif", BY_STEM)
    assert resolve([place], "ocr/2.jpg") == (0, "ocr/2.JPG", BY_STEM)
    assert resolve([place], "ocr/3.jpg") == (0, "ocr/3", BY_STEM)
    assert resolve([place], "ocr/b.v2.png") == (0, "ocr/b.v2", BY_STEM)
    assert resolve([place], "ocr/1") == (0, "ocr/1.gif", BY_STEM)
    assert resolve([place], "images/ocr/1.webp") == (0, "ocr/1.gif", BY_STEM)
    assert resolve([place], "5.jpg") == (0, "x/5.PNG", BY_STEM)
    for absent in ("ocr/b.jpg", "ocr/4.jpg", "ocr/A.gif", "ocr.jpg", "ocr/.png", "ocr/1.mp4"):
        assert resolve([place], absent) == "image-missing", absent


def test_accents_may_be_written_as_other_bytes(tmp_path):
    """macOS takes letters apart, in names and in the archives it makes; records have them as they were typed."""
    composed, apart = (
        "wikiart/andr\u00e9 \u00fc \ud55c.jpg",
        "wikiart/andre\u0301 u\u0308 \u1112\u1161\u11ab.jpg",
    )
    for place in (folder(tmp_path / "mac", apart), archive(tmp_path / "mac.zip", apart)):
        assert resolve([place], composed) == (0, apart, BY_STEM)
        assert resolve([place], composed.removeprefix("wikiart/")) == (0, apart, BY_STEM)
    assert resolve([folder(tmp_path / "other", composed)], apart) == (0, composed, BY_STEM)
    both = folder(tmp_path / "both", composed, apart)
    assert [resolve([both], path) for path in (composed, apart)] == [(0, composed, EXACT), (0, apart, EXACT)]
    assert resolve([both], composed.replace(".jpg", ".png")) == "image-ambiguous"


def test_faults_that_the_place_already_shows(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a.jpg", "text")
    root = folder(tmp_path / "root", "b.jpg")
    with open(tmp_path / "root" / "huge.jpg", "wb") as file:
        file.truncate(stores.MAX_IMAGE_BYTES + 1)
    located = Resolver([open_store(path), root], [()]).locate(["a.jpg", "huge.jpg", "b.jpg", "c.jpg"], 0)
    assert located.codes == ["image-unreadable", "image-too-large", "", "image-missing"]


def test_links_are_followed_once_and_circles_end(tmp_path):
    root = folder(tmp_path / "root", "real/a/x.jpg", "real/a/._x.jpg", "real/.DS_Store")
    (tmp_path / "root" / "real" / "a" / "up").symlink_to("../..")
    (tmp_path / "root" / "again").symlink_to("real")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.jpg").write_text("y")
    (tmp_path / "root" / "disk").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "y-link.jpg").symlink_to("disk/y.jpg")
    (tmp_path / "root" / "dead.jpg").symlink_to("none")
    os.mkfifo(tmp_path / "root" / "pipe.jpg")
    names = [name for chunk in root.listing().chunks() for name in chunk]
    assert names == [b"y-link.jpg", b"real/a/x.jpg", b"disk/y.jpg"]
    assert resolve([root], "x.jpg") == (0, "real/a/x.jpg", BY_SUFFIX)
    assert resolve([root], "q/again/a/x.jpg") == "image-missing"  # a file has one name
    assert resolve([root], "again/a/x.jpg") == (0, "real/a/x.jpg", EXACT)
    assert resolve([root], "q/disk/y.jpg") == (0, "y", BY_SUFFIX)


def test_a_folder_is_listed_once_and_only_when_something_is_not_there(tmp_path, monkeypatch):
    walked = []
    walk = folders._walk
    monkeypatch.setattr(folders, "_walk", lambda *args: walked.append(args) or walk(*args))
    resolver = Resolver([folder(tmp_path / "root", "a/x.jpg")], [()])
    assert resolver.locate(["a/x.jpg"] * 3, 0).codes == [""] * 3
    assert not walked
    assert resolver.locate(["y.jpg", "z.jpg"], 0).codes == ["image-missing"] * 2
    assert resolver.locate(["x.jpg"], 0).codes == [""]
    assert len(walked) == 1


def test_a_folder_of_too_many_files_is_not_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_LISTED", 2)
    place = folder(tmp_path / "root", "a/1.jpg", "a/2.jpg", "a/3.jpg")
    assert resolve([place], "1.jpg") == "image-missing"
    assert resolve([place], "a/1.jpg") == (0, "a/1.jpg", EXACT)


def test_what_has_gone_since_it_was_listed_is_missing(tmp_path):
    place = folder(tmp_path / "root", "a/x.jpg", "a/y.jpg")
    assert resolve([place], "x.jpg") == (0, "a/x.jpg", BY_SUFFIX)
    (tmp_path / "root" / "a" / "x.jpg").unlink()
    assert resolve([place], "x.jpg") == "image-missing"
    (tmp_path / "root").rename(tmp_path / "away")
    with pytest.raises(PackError, match="cannot be read now"):
        resolve([place], "y.jpg")
    with pytest.raises(PackError, match="cannot be read now"):
        resolve([open_store(tmp_path / "away"), FolderStore(str(tmp_path / "root"))], "none.jpg")


def test_slow_file_systems_are_asked_many_files_at_a_time(tmp_path):
    place = folder(tmp_path / "root", *(f"{n}.jpg" for n in range(0, 1000, 2)))

    def slow(path):
        time.sleep(0.005)
        return os.stat(path)

    names = [f"{n}.jpg" for n in range(1000)]
    waiting = FolderStore(place.path, stat_file=slow)
    begin = time.monotonic()
    rows = waiting.find(names)
    assert time.monotonic() - begin < 2.5  # one by one: at least 5
    assert rows.tobytes() == place.find(names).tobytes()
    assert (rows["store"] == MISSING).tolist() == [bool(n % 2) for n in range(1000)]


def test_names_that_are_no_text(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    with open(os.fsencode(root) + b"/\xff.jpg", "wb") as file:
        file.write(b"bytes")
    place = folder(root, "a/é.jpg")
    assert resolve([place], "q/\udcff.jpg") == (0, "bytes", BY_SUFFIX)
    assert resolve([place], "é.jpg") == (0, "a/é.jpg", BY_SUFFIX)
    assert resolve([place], "\ud800.jpg") == "image-missing"


PARTS = st.sampled_from(["a", "b", "c", "d"])
FILES = st.sampled_from(["1.jpg", "1.png", "1.JPG", "2.jpg", "2", "b.v2", "a"])
NAMES = st.builds(lambda parts, file: "/".join([*parts, file]), st.lists(PARTS, max_size=3), FILES)
MOUNTS = st.lists(PARTS, max_size=2).map("/".join)


def stem(name):
    base, dot, extension = name.rpartition(".")
    known = dot and extension.lower() in ("jpg", "png") and base and not base.endswith("/")
    return base if known else name


def ends(whole, end):
    return whole.endswith("/" + end)


def called(store, name):
    """All that a name is called from outside."""
    inside = [name, name.removeprefix(store.top)] if store.top else [name]
    return {f"{store.mount}/{text}" if store.mount else text for text in inside}


def close(store, before):
    """In how many folders a store's own path agrees with these."""
    own, count = ["d", *store.path[3:-4].split("/")], 0
    for folder_, other in zip(reversed(own), reversed(before), strict=False):
        if folder_ != other:
            break
        count += 1
    return count


def expected(places, path, prefixes):
    """The rules of `shardify.images.resolve`, over full lists of names: a place and a name, or a reason code."""
    asked = [
        (new + path.removeprefix(old)).replace("//", "/") for old, new in prefixes if path.startswith(old)
    ]
    asked = [text.strip("/") for text in asked] + [path]
    held = [(number, store, name) for number, store in enumerate(places) for name in store.names_]
    for candidate in asked:
        for number, store in enumerate(places):
            inside = candidate.removeprefix(f"{store.mount}/") if store.mount else candidate
            if store.mount and inside == candidate:
                continue
            for name in (inside, store.top + inside):
                if name in store.names_:
                    return number, name
    for form in (str, stem):
        for candidate in asked:
            goal = form(candidate)
            levels = [
                [
                    (n, name)
                    for n, store, name in held
                    if any(ends(form(c), goal) for c in called(store, name))
                ]
            ]
            if form is stem:
                levels.insert(0, [(n, name) for n, s, name in held if goal in map(stem, called(s, name))])
            parts = goal.split("/")
            for drop in range(1, len(parts)):
                before, rest = parts[:drop], "/".join(parts[drop:])
                closest = max((close(store, before) for store in places if not store.mount), default=0)
                level = []
                for n, store, name in held:
                    if rest not in map(form, called(store, name)):
                        continue
                    sure = len(parts) - drop >= 2
                    if not store.mount:
                        near = close(store, before)
                        sure = near == closest and (sure or near == len(before))
                    if sure or len(places) == 1:
                        level.append((n, name))
                levels.append(level)
            for level in levels:
                if len({places[n].crc_of[name] for n, name in level}) == 1:
                    return min(level)
                if level:
                    return "image-ambiguous"
    return "image-missing"


class Held:
    """An archive's store with the names and checksums it was made of."""

    def __init__(self, number, mount, names, crcs):
        rows = stores.missing_rows(len(names))
        rows["store"], rows["offset"], rows["crc"] = 0, np.arange(len(names)), crcs
        rows["size"] = 7
        self.path = f"/d/{'abcd'[number]}.zip"
        self.store = make_store(self.path, mount, None, Listing.of([encode(names)]), rows)
        self.mount, self.top, self.names_ = mount, self.store.top, names
        self.crc_of = dict(zip(names, crcs, strict=True))


@given(st.data())
def test_the_resolver_agrees_with_its_rules(data):
    places = []
    crc = iter(range(1, 1000))
    for number in range(data.draw(st.integers(1, 4))):
        names = sorted(data.draw(st.sets(NAMES, min_size=1, max_size=6)))
        same = data.draw(st.booleans())
        crcs = [zlib.crc32(name.encode()) if same else next(crc) for name in names]
        places.append(Held(number, data.draw(MOUNTS), names, crcs))
    maps = data.draw(
        st.lists(
            st.tuples(st.sampled_from(["", "a/", "b", "a/b/"]), MOUNTS.map(lambda m: m and f"{m}/")),
            max_size=2,
        )
    )
    maps = [(old, new) for old, new in maps if (old, new) != ("", "")]
    paths = data.draw(st.lists(NAMES, min_size=1, max_size=8))
    located = Resolver([place.store for place in places], [maps]).locate(paths, 0)
    for path, row, code in zip(paths, located.rows, located.codes, strict=True):
        found = code or (int(row["store"]), places[row["store"]].names_[row["offset"]])
        assert found == expected(places, path, maps), path


@given(st.lists(NAMES, max_size=40), st.lists(NAMES, min_size=1, max_size=10))
def test_a_listing_agrees_with_a_list(names, asked):
    listing = Listing.of([encode(names[:7]), encode(names[7:])])
    assert [listing.name(n) for n in range(len(listing))] == names
    last = {name: number for number, name in enumerate(names)}
    assert listing.find(asked).tolist() == [last.get(name, -1) for name in asked]
    fits = {
        Kind.WHOLE: lambda name, text: name == text,
        Kind.STEM: lambda name, text: stem(name) == text,
        Kind.ENDING: ends,
        Kind.ENDING_STEM: lambda name, text: ends(stem(name), text),
    }
    for kind, fit in fits.items():
        texts = asked + [stem_of(name) for name in asked]
        wanted = {
            at: numbers
            for at, text in enumerate(texts)
            if (numbers := sorted(number for name, number in last.items() if fit(name, text)))
        }
        assert listing.matches(texts, kind, most=100) == wanted


def test_paths_deeper_than_what_is_hashed():
    deep = "/".join(f"f{n}" for n in range(20)) + "/x.jpg"
    listing = Listing.of([encode([deep, "other/" + deep[3:]])])
    assert listing.matches([deep[3:], deep[6:], "no/" + deep[6:]], Kind.ENDING) == {0: [0, 1], 1: [0, 1]}


def test_a_million_names_of_one_file_are_told_apart_quickly():
    names = [f"{n:07d}/image.jpg" for n in range(200_000)]
    listing = Listing.of([encode(names)])
    begin = time.monotonic()
    assert listing.matches(["image.jpg"] * 1000, Kind.ENDING)[999] == list(range(8))
    assert listing.find([names[77_777]]).tolist() == [77_777]
    assert time.monotonic() - begin < 5


def test_packed_images_are_those_that_were_found_and_the_rest_has_reasons(tmp_path):
    def picture(colour):
        buffer = io.BytesIO()
        Image.new("L", (9, 9), colour).save(buffer, "PNG")
        return buffer.getvalue()

    root, zipped, tarred = tmp_path / "root", tmp_path / "x.zip", tmp_path / "y.tar"
    for colour, name in enumerate(
        ("a/exact.png", "b/deep/end.png", "c/two.png", "d/two.png", "a/stem.PNG", "m/7.png")
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(colour))
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("data/wiki/1.png", picture(10))
        archive.writestr("list.txt", "no picture")
    with tarfile.open(tarred, "w") as archive:
        for name in ("ocr/1.png", "list.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = len(picture(11))
            archive.addfile(entry, io.BytesIO(picture(11)))
    wanted = {
        "a/exact.png": 0, "deep/end.png": 1, "two.png": None, "a/stem.jpg": 4, "wiki/1.png": 10, "images/ocr/1.jpg": 11, "no.png": None
    }  # fmt: skip
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    records = [{"id": name, "image": name, "conversations": turns} for name in wanted]
    (tmp_path / "records.json").write_text(json.dumps(records))
    out = tmp_path / "out"
    images = (root, zipped, tarred)
    pack_dataset(
        PackOptions(records=[tmp_path / "records.json"], images=images, out=out, max_bad="100%", workers=1)
    )
    found = {}
    with tarfile.open(out / "000.tar") as shard:
        content = {member.name: shard.extractfile(member).read() for member in shard}
    for name, data in content.items():
        if name.endswith(".json"):
            found[json.loads(data)["image"]] = content[name.replace(".json", ".png")]
    assert found == {name: picture(colour) for name, colour in wanted.items() if colour is not None}
    lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    reasons = {line["image"]: line["code"] for line in lines}
    assert reasons == {"two.png": "image-ambiguous", "no.png": "image-missing"}
    notes = read_manifest(out / "manifest.json").counts.notes
    assert {code: notes[code] for code in ("image-by-suffix", "image-by-stem")} == {
        "image-by-suffix": 2,
        "image-by-stem": 2,
    }
