"""What published data sets really hold, each thing as people met it: packed as it is, or set aside with the reason. Nothing is lost or mixed up."""

import io
import itertools
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from shardify.convert import PackOptions, pack_dataset
from shardify.errors import PackError, SourceError
from shardify.format.manifest import read_manifest
from shardify.recipes.check import check_recipe
from shardify.recipes.schema import load_recipe


def picture(seed=0, format_="JPEG", size=(24, 20), mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format_, **options)
    return buffer.getvalue()


A, B = picture(1), picture(2)


def turns(*texts):
    return [
        {"from": role, "value": text}
        for role, text in zip(itertools.cycle(("human", "gpt")), texts, strict=False)
    ]


ASKED = turns("<image>\nWhat is it?", "A thing.")
SAID = turns("Hello", "Hi")


def record(id_="1", image=None, conversations=None, **fields):
    image_field = {} if image is None else {"image": image}
    return {"id": id_, **image_field, "conversations": conversations or (ASKED if image else SAID), **fields}


def folder(path, images):
    path.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def archive(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in images.items():
            file.writestr(name, data)
    return path


class Packed:
    """A packed set: what webdataset reads of it by record number, and what was set aside."""

    def __init__(self, out):
        self.out = out
        self.counts = read_manifest(out / "manifest.json").counts
        lines = (out / "quarantine.jsonl").read_text().splitlines()
        self.aside = {item["record"]: item["code"] for item in map(json.loads, lines)}
        rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        numbers = {row["key"]: row["record"] for row in rows}
        tars = sorted(map(str, out.glob("*.tar")))
        samples = list(webdataset.WebDataset(tars, shardshuffle=False))
        self.keys = {numbers[sample["__key__"]]: sample["__key__"] for sample in samples}
        self.fields = {
            numbers[sample["__key__"]]: {k: v for k, v in sample.items() if not k.startswith("__")}
            for sample in samples
        }
        # webdataset merges what it takes for one sample, and drops what it takes for none
        assert len(samples) == len(rows) == len(self.keys) == self.counts.packed
        assert self.counts.records_in == self.counts.packed + len(self.aside)

    @property
    def raw(self):
        return {number: fields["json"] for number, fields in self.fields.items()}

    @property
    def images(self):
        return {
            number: [data for name, data in fields.items() if name != "json"]
            for number, fields in self.fields.items()
        }


def pack(tmp_path, records, images=(), *, max_bad="100%", **options):
    """Pack records, given as objects or as bytes; `images` are folders and archives, or names and bytes."""
    raws = [
        item if isinstance(item, bytes) else json.dumps(item, ensure_ascii=False).encode() for item in records
    ]
    (tmp_path / "chat.json").write_bytes(b"[" + b",\n".join(raws) + b"]")
    if isinstance(images, dict):
        images = [folder(tmp_path / "images", images)] if images else []
    out = tmp_path / "out"
    given = {"records": [tmp_path / "chat.json"], "images": list(images), "out": out, "workers": 1}
    pack_dataset(PackOptions(**{**given, "shards": 1, "max_bad": max_bad, **options}))
    packed = Packed(out)
    for number, raw in packed.raw.items():
        assert raw == raws[number]
    return packed


# keys


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_id_in_many_records(tmp_path, shuffle):
    # side by side a reader of tars refuses the second, or merges what has other extensions; apart it serves one key twice
    images = {"33471.jpg": A, "33471.png": picture(3, "PNG")}
    names = ["33471.jpg", "33471.jpg", "33471.png", None]
    records = [
        record("33471", name, turns("<image>?" if name else "?", f"{n}")) for n, name in enumerate(names)
    ]
    packed = pack(tmp_path, records, images, shuffle=shuffle)
    assert packed.images == {0: [A], 1: [A], 2: [images["33471.png"]], 3: []}
    assert packed.counts.notes["id-repeated"] == 3


HOSTILE = [
    "bar_train_00157767.png",
    "VG_100K/2317533",
    "agi-cgi/game_0967.jpg->1.57 ",
    ".hidden",
    "..",
    "/etc/passwd",
    "Upper.JPG",
    "a b+c",
    "\u202eé😀",
    "x" * 5000,
    "",
    'q"\\\n\t\0',
]


def test_ids_that_no_tar_reader_would_give_back(tmp_path):
    packed = pack(tmp_path, [record(id_, "a.jpg") for id_ in HOSTILE], {"a.jpg": A})
    assert [json.loads(packed.raw[number])["id"] for number in range(len(HOSTILE))] == HOSTILE
    assert all(key.isdecimal() for key in packed.keys.values())
    assert all(list(fields) == ["jpg", "json"] for fields in packed.fields.values())
    assert packed.counts.notes["id-has-dot"] == sum("." in id_ for id_ in HOSTILE)
    assert packed.counts.notes["id-has-slash"] == sum("/" in id_ for id_ in HOSTILE)


def test_ids_of_every_type_and_none(tmp_path):
    ids = [33471, "33471", "000000033471", "0033471", 3.5, None]
    records = [record(id_) for id_ in ids]
    records += [{"conversations": SAID}, {"idx": "heR0vZB", "conversations": SAID}]
    packed = pack(tmp_path, records)
    assert packed.counts.packed == len(records)
    assert packed.counts.notes["id-not-text"] == 2
    assert packed.counts.notes["id-missing"] == 3
    assert "id-repeated" not in packed.counts.notes  # 33471 and "33471" are two
    rows = pq.read_table(packed.out / "000.parquet").to_pylist()
    kept = {row["record"]: row["id"] for row in rows}
    assert [kept[n] for n in range(6)] == ["33471", '"33471"', '"000000033471"', '"0033471"', "3.5", "null"]
    assert kept[6] is kept[7] is None


def test_members_of_a_sample_stand_together(tmp_path):
    records = [record(f"{n}", ["a.jpg", "b.jpg"]) for n in range(20)]
    packed = pack(tmp_path, records, {"a.jpg": A, "b.jpg": B}, shards=2, workers=2)
    for path in packed.out.glob("*.tar"):
        with tarfile.open(path) as tar:
            keys = [name.partition(".")[0] for name in tar.getnames()]
        runs = [key for key, _ in itertools.groupby(keys)]
        assert len(runs) == len(set(runs))


# paths and archives


def test_ocr_vqa_whose_records_say_jpg(tmp_path):
    gif, png = picture(3, "GIF"), picture(4, "PNG")
    images = {
        "ocr_vqa/images/1.gif": gif,  # as the download script saves it
        "ocr_vqa/images/2.png": png,
        "ocr_vqa/images/3.jpg": gif,  # renamed, not converted
        "ocr_vqa/images/1437717772.jpg": A[:-30],
        "ocr_vqa/images/140031996X.jpg": A,
    }
    names = ["1", "2", "3", "1437717772", "140031996X", "gone"]
    packed = pack(tmp_path, [record(name, f"ocr_vqa/images/{name}.jpg") for name in names], images)
    assert packed.images == {0: [gif], 1: [png], 2: [gif], 4: [A]}
    assert [next(iter(packed.fields[n])) for n in (0, 1, 2, 4)] == ["gif", "png", "gif", "jpg"]
    assert packed.aside == {3: "image-truncated", 5: "image-missing"}
    assert packed.counts.notes["image-by-stem"] == 2
    assert packed.counts.notes["image-extension-differs"] == 3


def test_empty_files_among_the_images(tmp_path):
    images = {"VG_100K_2/1.jpg": b"", "VG_100K_2/2.jpg": A, "VG_100K_2/3.jpg": b""}
    packed = pack(tmp_path, [record("1", "VG_100K_2/1.jpg"), record("2", "VG_100K_2/2.jpg")], images)
    assert packed.aside == {0: "image-empty"}
    assert packed.images == {1: [A]}


def test_what_a_download_leaves_of_an_image(tmp_path):
    whole = {f"cut.{name.lower()}": picture(1, name) for name in ("JPEG", "PNG", "WEBP", "GIF")}
    images = {name: data[:-100] for name, data in whole.items()} | {
        "page.jpg": b"<html>404 Not Found</html>",
        "empty.jpg": b"",
        "whole.jpg": A,
    }
    packed = pack(tmp_path, [record(name, name) for name in [*images, "never.jpg"]], images)
    cut = dict.fromkeys(range(4), "image-truncated")
    assert packed.aside == cut | {4: "image-unrecognised", 5: "image-empty", 7: "image-missing"}
    assert packed.images == {6: [A]}


def test_half_of_the_images_missing(tmp_path):
    images = {f"sam/images/sa_{n}.jpg": picture(n) for n in range(5)}
    records = [record(f"{n}", f"sam/images/sa_{n}.jpg") for n in range(10)]
    with pytest.raises(PackError, match="image-missing 5"):
        pack(tmp_path, records, images, max_bad="1%")
    assert not list(tmp_path.glob("out/*.tar"))
    packed = pack(tmp_path, records, images, max_bad="50%")
    assert packed.aside == dict.fromkeys(range(5, 10), "image-missing")
    # no other record has taken their place, and no key was given away
    assert packed.images == {n: [picture(n)] for n in range(5)}
    assert (
        json.loads((packed.out / "quarantine.jsonl").read_text().splitlines()[0])["image"]
        == "sam/images/sa_5.jpg"
    )
    assert {int(key) for key in packed.keys.values()} < set(range(10))


def test_none_of_the_images_there(tmp_path):
    # MG-LLaVA's page leads to LLaVA-CC3M-Pretrain-595K, whose files are flat
    images = {f"GCC_train_{n:09}.jpg": A for n in range(3)}
    with pytest.raises(SourceError, match="none of the 2 images"):
        pack(tmp_path, [record(f"{n}", f"00453/{n:09}.jpg") for n in range(2)], images)


@pytest.mark.parametrize("inside", ["data/wikiart/images/", "wikiart/images/", "images/", ""])
def test_archives_with_and_without_folders_of_their_own(tmp_path, inside):
    wikiart = archive(tmp_path / "wikiart" / "images.zip", {f"{inside}1.jpg": A, f"{inside}2.jpg": B})
    coco = archive(tmp_path / "coco" / "train2017.zip", {"train2017/1.jpg": B, "train2017/3.jpg": B})
    packed = pack(
        tmp_path, [record("1", "wikiart/images/1.jpg"), record("2", "coco/train2017/1.jpg")], [wikiart, coco]
    )
    assert packed.images == {0: [A], 1: [B]}


def test_images_in_a_tar_beside_zips(tmp_path):
    with tarfile.open(tmp_path / "ocr_vqa.tar", "w") as tar:
        info = tarfile.TarInfo("ocr_vqa/images/1.jpg")
        info.size = len(A)
        tar.addfile(info, io.BytesIO(A))
    other = archive(tmp_path / "gqa.zip", {"images/1.jpg": B})
    packed = pack(tmp_path, [record("1", "ocr_vqa/images/1.jpg")], [other, tmp_path / "ocr_vqa.tar"])
    assert packed.images == {0: [A]}


def test_renamed_images_are_missing_and_no_other_is_taken(tmp_path):
    # ALLaVA's releases; a number of another set is another picture
    images = {"allava_laion/images/100277306.jpeg": A, "coco/train2017/100277305.jpeg": B}
    records = [
        record("1", "allava_laion/images/100277305.jpeg"),
        record("2", "allava_laion/images/100277306.jpeg"),
    ]
    roots = [
        folder(tmp_path / "data", images) / "allava_laion" / "images",
        tmp_path / "data" / "coco" / "train2017",
    ]
    packed = pack(tmp_path, records, roots)
    assert packed.aside == {0: "image-missing"}
    assert packed.images == {1: [A]}


NAMES = [
    "PACS+guitar_image_category_classification_830_n03272010_10795-5.png",
    "Eiffel Tower (Paris).jpg",
    "hieronymus-bosch_é.jpg",
    "梵高😀.jpg",
    "n01440764_36.JPEG",
    "DSC_0001.JPG",
    "a.b.c.d.jpg",
    "#%&;'.jpg",
    f"{'long_' * 45}.jpg",
    f"{'deep/' * 60}x.jpg",
]


@pytest.mark.parametrize("zipped", [False, True])
def test_names_of_every_kind(tmp_path, zipped):
    images = {name: picture(n) for n, name in enumerate(NAMES)}
    store = (archive if zipped else folder)(tmp_path / "store.zip", images)
    packed = pack(tmp_path, [record(name, name) for name in NAMES], [store])
    assert packed.images == {n: [images[name]] for n, name in enumerate(NAMES)}
    assert all(next(iter(fields)) == "jpg" for fields in packed.fields.values())
    with tarfile.open(packed.out / "000.tar") as tar:  # ustar has room for 100 bytes
        assert all(not member.pax_headers and len(member.name) < 100 for member in tar)


def test_one_image_in_many_records(tmp_path):
    records = [record(f"allava_laion_{kind}_1", "allava_laion/images/1.jpeg") for kind in ("cap", "inst")]
    packed = pack(tmp_path, records, {"allava_laion/images/1.jpeg": A})
    assert packed.images == {0: [A], 1: [A]}
    assert packed.counts.notes["image-repeated"] == 1


def test_text_only_records_are_no_records_with_a_missing_image(tmp_path):
    bare = {"id": "wgByO4Y_0", "model": "", "conversations": SAID}
    records = [bare, *({**bare, "image": image} for image in (None, "", [], [""]))]
    packed = pack(tmp_path, [*records, record("1", "a.jpg")], {"a.jpg": A})
    assert packed.aside == {}
    assert packed.images == {0: [], 1: [], 2: [], 3: [], 4: [], 5: [A]}
    assert packed.counts.notes["text-only"] == 5
    (tmp_path / "text").mkdir()
    assert pack(tmp_path / "text", records).counts.packed == 5  # without any folder of images too


# conversations


@pytest.mark.parametrize(
    ("said", "notes"),
    [
        (turns("<image>\nType a or b.", ""), {"answer-empty"}),
        (turns("<image>\nOne?", "", "Two?", "2"), {"answer-empty"}),
        ([SAID[1], *ASKED], {"first-turn-not-human"}),
        ([{"from": "system", "value": "Be brief."}, *ASKED], {"first-turn-not-human", "unknown-role"}),
        ([ASKED[0], {"from": "old-model", "value": "x"}], {"unknown-role", "last-turn-not-answer"}),
        ([SAID[0], *ASKED], {"roles-not-alternating"}),
        ([*ASKED, SAID[0]], {"last-turn-not-answer"}),
        (turns("<image>\nWhat?", "An <image>."), {"image-in-answer", "image-tokens-exceed-images"}),
        (turns("What?", "<image>"), {"image-in-answer"}),
        (turns("<image><image>\nWhat?", "x"), {"image-token-repeated"}),
        (turns("<image>\nWhat?", "x", "<image> and?", "y"), {"image-tokens-exceed-images"}),
        (turns("What?", "x"), {"image-tokens-missing"}),
        *(
            (turns("<image>\nWhat?", f"a{mark}b"), {"template-marker-in-text"})
            for mark in ("</s>", " ASSISTANT: ", "[/INST] ", "<|im_end|>", "<unk>")
        ),
        (turns("<image>\nWhat? ", "\tYes\n"), {"blanks-around-text"}),
        (turns("<image>\nQA_GT_caption_based_noisy", "x"), {"noisy-marker"}),
        (turns("<image>\nWhat?", "word " * 2047 + "end"), {"text-long"}),
        (turns(*(f"<image>\n{n}" if not n else f"{n}" for n in range(550))), set()),
        (turns("What?\n<image>", "x"), set()),  # in front or behind, as LLaVA-Pretrain has it
    ],
)
def test_odd_conversations_are_packed_as_they_are_and_counted(tmp_path, said, notes):
    packed = pack(tmp_path, [record("1", "a.jpg", said)], {"a.jpg": A})
    assert set(packed.counts.notes) == notes
    assert packed.images == {0: [A]}


@pytest.mark.parametrize(
    ("said", "notes"),
    [
        (turns("What does <image> mean?", "A tag."), {"image-token-without-image"}),
        (turns("", ""), {"answer-empty", "turn-empty", "no-words"}),
        (turns("Go on", "word " * 3000 + "end"), {"text-long"}),
    ],
)
def test_odd_texts(tmp_path, said, notes):
    packed = pack(tmp_path, [record("1", None, said)])
    assert set(packed.counts.notes) == {"text-only", *notes}


def test_what_the_documents_say_wrongly(tmp_path):
    # 131 MB of 80K records, not the 229 MB of the 150K; the count tells one from the other
    root = folder(tmp_path / "root", {"coco/train2017/1.jpg": A})
    (root / "llava_instruct_80k.json").write_text(json.dumps([record(f"{n}", "1.jpg") for n in range(157)]))
    report = check_recipe(load_recipe("llava-instruct-80k"), root)
    assert any("157 records; about 80,000 were published" in fault for fault in report.faults)
    assert "id-repeated" in load_recipe("llava-v1.5-mix665k").expect
    assert "caption-kept" in load_recipe("llava-cc3m-595k").expect
    assert any(
        "not LLaVA-CC3M-Pretrain-595K" in origin.gives for origin in load_recipe("mg-llava-pretrain").get
    )


def test_utf8_whatever_the_locale(tmp_path):
    raw = '{"id": "é", "conversations": [{"from": "human", "value": "😀\\ud83d ü\u2028"}]}'.encode()
    (tmp_path / "chat.json").write_bytes(b"[" + raw + b"]")
    command = [sys.executable, "-m", "shardify.cli", "pack", "chat.json", "--out", "out", "--workers", "1"]
    env = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    packed = Packed(tmp_path / "out")
    assert packed.raw == {0: raw}
    assert packed.counts.notes["record-tolerant"] == 1


# images


def with_large_text(data):
    """A PNG with a text chunk that Pillow refuses to unpack."""
    content = b"note\0\0" + zlib.compress(bytes(8 * 1024 * 1024))
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    return data[:33] + chunk + data[33:]


def claiming(width, height):
    """A PNG that says it has so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return picture(1, "PNG")[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture(1, "PNG")[33:]


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(1, exif=exif)


@pytest.mark.parametrize("check", ["header", "decode", "none"])
@pytest.mark.parametrize(
    ("data", "note"),
    [
        (rotated(), "image-rotated"),
        (picture(1, "PNG", mode="RGBA"), "image-alpha"),
        (picture(1, mode="CMYK"), "image-cmyk"),
        (picture(1, "PNG", mode="I;16"), "image-deep"),
        (picture(1, "GIF", save_all=True, append_images=[Image.new("RGB", (24, 20))]), "image-animated"),
        (picture(1, "PNG", (20_000, 5)), "image-elongated"),
        (picture(1, "PNG", (1, 1)), "image-tiny"),
        (picture(1, "WEBP"), "image-extension-differs"),
    ],
)
def test_pictures_that_readers_see_differently_keep_their_bytes(tmp_path, data, note, check):
    extension = "jpg" if note in ("image-rotated", "image-cmyk", "image-extension-differs") else "png"
    extension = "gif" if note == "image-animated" else extension
    packed = pack(tmp_path, [record("1", f"a.{extension}")], {f"a.{extension}": data}, check=check)
    assert packed.images == {0: [data]}
    assert set(packed.counts.notes) == {note}


@pytest.mark.parametrize("check", ["header", "decode", "none"])
def test_bombs_are_told_by_their_headers(tmp_path, check):
    packed = pack(
        tmp_path,
        [record("1", "bomb.png"), record("2", "a.jpg")],
        {"bomb.png": claiming(60_000, 60_000), "a.jpg": A},
        check=check,
    )
    assert packed.aside == {0: "image-too-large"}


def test_a_text_that_pillow_refuses_to_unpack_is_the_pictures_fault_alone(tmp_path):
    # a ValueError, where a reader expects OSError
    images = {"a.png": with_large_text(picture(1, "PNG")), "b.jpg": B}
    records = [record("1", "a.png"), record("2", "b.jpg")]
    packed = pack(tmp_path, records, images, check="decode")
    assert packed.aside == {0: "image-undecodable"}
    assert packed.images[1] == [B]
    (tmp_path / "again").mkdir()
    assert pack(tmp_path / "again", records, images, check="header").images == {0: [images["a.png"]], 1: [B]}
