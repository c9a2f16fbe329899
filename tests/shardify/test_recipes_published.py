"""Every published data set, as a small tree in its own layout with its own quirks, packs through its recipe: nothing is lost, nothing changed."""

import io
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shardify.convert import PackOptions, pack_dataset
from shardify.format.manifest import read_manifest
from shardify.recipes.layout import resolve_recipe
from shardify.recipes.schema import load_recipe, recipe_names


def picture(seed, format_="JPEG", size=(24, 20)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_)
    return buffer.getvalue()


def turns(question="<image>\nWhat is it?", answer="A thing."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


class Tree:
    """A data set on disk, and what should become of it.

    `wanted` maps (record file, number) to the bytes of the record's images, or to the reason why it is set aside.
    """

    def __init__(self, root):
        self.root = root
        self.wanted = {}
        self.records = {}
        self.notes = Counter()
        self.changed = set()
        self._number = 0

    def file(self, path, data):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)
        return data

    def image(self, path, format_="JPEG"):
        """A new picture at a path below the root; returns its bytes."""
        self._number += 1
        return self.file(path, picture(self._number, format_))

    def picture(self, format_="JPEG"):
        self._number += 1
        return picture(self._number, format_)

    def zip(self, path, members):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(self.root / path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    def tar(self, path, members):
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self.root / path, "w") as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    def json(self, path, *items):
        """A record file; items are (record, what is wanted of it, note codes...)."""
        for number, (record, wanted, *notes) in enumerate(items):
            self.want(path, number, record, wanted, notes)
        self.file(path, json.dumps([record for record, *_ in items], ensure_ascii=False).encode())

    def want(self, source, number, record, wanted, notes=()):
        self.records[source, number] = record
        self.wanted[source, number] = wanted
        if not isinstance(wanted, str):
            self.notes.update(notes)
            if not wanted:
                self.notes["text-only"] += 1


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path / "root")


def samples(out):
    """(source, number in it) -> (image bytes in order, the JSON member) of a packed set."""
    manifest = read_manifest(out / "manifest.json")
    found = {}
    for shard in manifest.shards:
        members = {}
        with tarfile.open(out / shard.tar) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                members.setdefault(key, []).append((name, tar.extractfile(member).read()))
        for row in pq.read_table(out / shard.sidecar).select(["key", "source", "record"]).to_pylist():
            parts = members[row["key"]]
            images = [data for name, data in parts if not name.endswith("json")]
            found[row["source"], row["record"]] = (images, parts[-1][1])
    return manifest, found


def pack(tree, name, *, caption=None, whole=False):
    """Pack the tree through a recipe and hold the result against what the tree wants; returns the manifest.

    `whole`: the tree has every quirk that the recipe says is normal.
    """
    recipe = load_recipe(name)
    resolved = resolve_recipe(recipe, tree.root, caption)
    out = tree.root.parent / "out"
    pack_dataset(
        PackOptions(
            sources=resolved.sources, stores=resolved.stores, out=out, shards=2, workers=1, max_bad="100%"
        )
    )
    manifest, found = samples(out)
    aside = {place: reason for place, reason in tree.wanted.items() if isinstance(reason, str)}
    lines = (out / "quarantine.jsonl").read_text().splitlines()
    assert {(item["source"], item["record"]): item["code"] for item in map(json.loads, lines)} == aside
    assert manifest.counts.records_in == len(tree.wanted)
    assert manifest.counts.packed == len(found) == len(tree.wanted) - len(aside)
    assert manifest.counts.set_aside == Counter(aside.values())
    assert set(found) == set(tree.wanted) - set(aside)
    for place, (images, raw) in found.items():
        assert images == tree.wanted[place], place
        assert json.loads(raw) == tree.records[place], place
        if place not in tree.changed:
            assert raw == json.dumps(tree.records[place], ensure_ascii=False).encode()
    assert manifest.counts.notes == +tree.notes
    records = [source for source in manifest.sources if source.kind == "records"]
    assert all(source.licence and source.citation for source in records)
    shown = {*manifest.counts.notes, *manifest.counts.set_aside}
    assert shown <= set(resolved.expect)
    assert not whole or shown == set(resolved.expect)
    return manifest


def cc3m(tree, folder):
    """Seven records of LLaVA-CC3M, four of them with what people find in their own downloads."""
    images = {f"GCC_train_{n:09}.jpg": tree.picture() for n in (2582585, 3)}
    images["GCC_train_000000007.jpg"] = tree.picture("PNG")
    images["GCC_train_000000008.jpg"] = tree.picture()[:-40]
    images["GCC_train_000000009.jpg"] = b"<html>gone</html>"
    images["GCC_train_000000011.jpg"] = b""
    names = [*images, "GCC_train_000000010.jpg"]
    good = [[data] for data in images.values()][:3]
    wanted = [*good, "image-truncated", "image-unrecognised", "image-empty", "image-missing"]
    captions = ["olive oil is healthy .", "a dog", "a cat", "w", "x", "y", "z"]
    asked = "Provide a brief description of the given image.\n<image>"
    items = [
        (
            {"id": name[:-4], "image": name, "conversations": turns(asked, caption)},
            want,
            *(["image-extension-differs"] if name.endswith("7.jpg") else []),
        )
        for name, want, caption in zip(names, wanted, captions, strict=True)
    ]
    tree.json("chat.json", *items)
    meta = [
        {"id": name[:-4], "image": name, "caption": caption, "url": "http://x/y"}
        for name, caption in zip(names, captions, strict=True)
    ]
    meta[0]["blip_caption"] = "a bottle of oil"
    meta[1]["blip_caption"] = None
    # the third has no such field, as about one in ten
    for item in meta[3:]:
        item["blip_caption"] = "blip"
    tree.file("metadata.json", json.dumps(meta).encode())
    if folder:
        for name, data in images.items():
            tree.file(f"{folder}/{name}", data)
    else:
        tree.zip("images.zip", images)


@pytest.mark.parametrize("folder", ["", "images", "cc3m"])
def test_llava_cc3m(tree, folder):
    cc3m(tree, folder)
    manifest = pack(tree, "llava-cc3m-595k")
    assert manifest.counts.records_in == 7
    assert manifest.counts.packed == 3


def test_llava_cc3m_takes_blip_captions_where_there_are_some(tree):
    cc3m(tree, "")
    first = tree.records["chat.json", 0]
    first["conversations"][1]["value"] = "a bottle of oil"
    tree.changed.add(("chat.json", 0))
    tree.notes["caption-kept"] = 2
    pack(tree, "llava-cc3m-595k", caption="blip", whole=True)


@pytest.mark.parametrize("packed", [False, True])
def test_llava_pretrain(tree, packed):
    good, other, cut = tree.picture(), tree.picture("PNG"), tree.picture()[:-30]
    images = {"00453/004539375.jpg": good, "00223/002239345.jpg": other, "00001/000010000.jpg": cut}
    tree.json(
        "blip_laion_cc_sbu_558k.json",
        *(
            (
                {
                    "id": path[6:-4],
                    "image": path,
                    "conversations": turns("<image>\nWrite a summary.", "a watch"),
                },
                want,
                *notes,
            )
            for path, want, notes in [
                ("00453/004539375.jpg", [good], []),
                ("00223/002239345.jpg", [other], ["image-extension-differs"]),
                ("00001/000010000.jpg", "image-truncated", []),
                ("00002/000020000.jpg", "image-missing", []),
            ]
        ),
    )
    tree.file("blip_laion_cc_sbu_558k_meta.json", b'[{"id": "004539375", "blip_caption": "a watch"}]')
    if packed:
        tree.zip("images.zip", images)
    else:
        for path, data in images.items():
            tree.file(f"images/{path}", data)
    pack(tree, "llava-pretrain-558k", whole=True)


INSTRUCT = {
    "llava-instruct-150k": "llava_instruct_150k.json",
    "llava-instruct-80k": "llava_instruct_80k.json",
    "conversation-58k": "conversation_58k.json",
    "detail-23k": "detail_23k.json",
    "complex-reasoning-77k": "complex_reasoning_77k.json",
}


@pytest.mark.parametrize("layout", ["folder", "zip", "train2014"])
@pytest.mark.parametrize("name", INSTRUCT)
def test_llava_instruct(tree, name, layout):
    images = {"000000033471.jpg": tree.picture(), "000000261414.jpg": tree.picture()}
    how = ["image-by-prefix"] if layout == "train2014" else []
    items = [
        ("000000033471", turns("<image>\nWhat color?", "White."), []),
        ("000000261414", turns("What is it?\n<image>", "A cat."), []),
        ("000000033471", turns("<image>\nDescribe it.", "A bus."), ["id-repeated", "image-repeated"]),
    ]
    tree.json(
        INSTRUCT[name],
        *(
            ({"id": id_, "image": f"{id_}.jpg", "conversations": said}, [images[f"{id_}.jpg"]], *notes, *how)
            for id_, said, notes in items
        ),
    )
    if layout == "zip":
        tree.zip("train2017.zip", {f"train2017/{name}": data for name, data in images.items()})
    else:
        folder = "coco/train2017/" if layout == "folder" else "train2014/COCO_train2014_"
        for name_, data in images.items():
            tree.file(folder + name_, data)
    pack(tree, name, whole=layout == "train2014")


def llava15(tree, *, empty=False):
    """Records of LLaVA 1.5's mix and their images below the root. `empty`: text-only records have an empty path, as MG-LLaVA's do."""
    bus = tree.image("coco/train2017/000000033471.jpg")
    older = tree.image("coco/train2017/COCO_train2014_000000000025.jpg")
    gqa = tree.image("gqa/images/2327515.jpg")
    genome = tree.image("vg/VG_100K/2317533.jpg")
    genome2 = tree.image("vg/VG_100K_2/2400000.jpg")
    text = tree.image("textvqa/train_images/011e7e629fb9ae7b.jpg")
    book = tree.image("ocr_vqa/images/140031996X.jpg")
    as_png = tree.image("ocr_vqa/images/1574770225.png", "PNG")
    gif_as_jpg = tree.image("ocr_vqa/images/0001.jpg", "GIF")
    tree.file("ocr_vqa/images/1437717772.jpg", tree.picture()[:-20])
    chat = {"id": "wgByO4Y_0", "model": "", "conversations": turns("Hello", "Hi ASSISTANT: there </s>")}
    if empty:
        chat = {**chat, "image": ""}

    def seen(id_, path, want, *notes, said=None):
        return {"id": id_, "image": path, "conversations": said or turns()}, want, *notes

    many = [turn for n in range(20) for turn in turns(f"{n}?" if n else "<image>\n0?", f"{n}")]
    return [
        seen("000000033471", "coco/train2017/000000033471.jpg", [bus]),
        seen("000000033471", "coco/train2017/000000033471.jpg", [bus], "id-repeated", "image-repeated"),
        seen(2327515, "gqa/images/2327515.jpg", [gqa], "id-not-text"),
        seen("VG_100K/2317533", "vg/VG_100K/2317533.jpg", [genome], "id-has-slash", said=many),
        seen("VG_100K_2/2400000", "vg/VG_100K_2/2400000.jpg", [genome2], "id-has-slash"),
        seen("011e7e629fb9ae7b", "textvqa/train_images/011e7e629fb9ae7b.jpg", [text]),
        seen("140031996X", "ocr_vqa/images/140031996X.jpg", [book]),
        seen(
            "1574770225",
            "ocr_vqa/images/1574770225.jpg",
            [as_png],
            "image-by-stem",
            "image-extension-differs",
        ),
        seen("0001", "ocr_vqa/images/0001.jpg", [gif_as_jpg], "image-extension-differs"),
        seen("1437717772", "ocr_vqa/images/1437717772.jpg", "image-truncated"),
        seen("0002", "ocr_vqa/images/0002.jpg", "image-missing"),
        seen(
            "000000000009",
            "coco/train2017/000000033471.jpg",
            [bus],
            "image-repeated",
            "answer-empty",
            said=turns(answer=""),
        ),
        seen(
            "000000000025",
            "coco/train2017/000000000025.jpg",
            [older],
            "image-by-prefix",
            "blanks-around-text",
            said=turns(answer=" Yes"),
        ),
        (chat, [], "template-marker-in-text"),
        (
            {
                "id": "long",
                **({"image": ""} if empty else {}),
                "conversations": turns("Go on", "word " * 3000 + "end"),
            },
            [],
            "text-long",
        ),
    ]


def test_llava_mix665k(tree):
    tree.json("llava_v1_5_mix665k.json", *llava15(tree))
    pack(tree, "llava-v1.5-mix665k", whole=True)


def test_llava_mix665k_from_the_archives_as_they_are_offered(tree):
    files = {
        "coco/train2017.zip": {"train2017/000000033471.jpg": tree.picture()},
        "gqa/images.zip": {"images/2327515.jpg": tree.picture()},
        "ocr_vqa/ocr_vqa_images_llava_v15.zip": {"140031996X.jpg": tree.picture()},
        "textvqa/train_val_images.zip": {"train_images/011e.jpg": tree.picture()},
        "vg/images.zip": {"VG_100K/2317533.jpg": tree.picture()},
        "vg/images2.zip": {"VG_100K_2/2400000.jpg": tree.picture()},
    }
    names = [
        "coco/train2017/000000033471.jpg",
        "gqa/images/2327515.jpg",
        "ocr_vqa/images/140031996X.jpg",
        "textvqa/train_images/011e.jpg",
        "vg/VG_100K/2317533.jpg",
        "vg/VG_100K_2/2400000.jpg",
    ]
    for path, members in files.items():
        tree.zip(path, members)
    data = [next(iter(members.values())) for members in files.values()]
    items = [
        ({"id": f"a{n}", "image": name, "conversations": turns()}, [image])
        for n, (name, image) in enumerate(zip(names, data, strict=True))
    ]
    tree.json("llava_v1_5_mix665k.json", *items)
    pack(tree, "llava-v1.5-mix665k")


@pytest.mark.parametrize("layout", ["chunks", "unpacked"])
@pytest.mark.parametrize("part", ["Caption", "Instruct"])
def test_allava_laion(tree, part, layout):
    formats = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "mpo": "PNG"}
    images = {f"{n}.{ext}": tree.picture(f) for n, (ext, f) in enumerate(formats.items(), 100277305)}
    short = {"Caption": "cap", "Instruct": "inst"}[part]
    items = []
    for name, data in images.items():
        record = {
            "id": f"allava_laion_{short}_{name.partition('.')[0]}",
            "image": f"allava_laion/images/{name}",
            "conversations": turns(
                "<image>\nPlease depict the image in words.", "The image displays a ring."
            ),
            "original_caption": "190952cz Pandora Ring",
            "url": "https://theartofpandora.com/x.jpg",
        }
        items.append((record, [data], *(["image-extension-differs"] if name.endswith(".mpo") else [])))
    again = {**items[0][0], "id": "allava_laion_again"}
    gone = {**again, "id": "allava_laion_gone", "image": "allava_laion/images/renamed.jpeg"}
    items += [(again, [images["100277305.jpeg"]], "image-repeated"), (gone, "image-missing")]
    tree.json(f"allava_laion/ALLaVA-{part}-LAION-4V.json", *items)
    chunks = [{} for _ in range(10)]
    for n, (name, data) in enumerate(images.items()):
        chunks[n * 3 % 10][f"images/{name}"] = data
        if layout == "unpacked":
            tree.file(f"allava_laion/images/{name}", data)
    if layout == "chunks":
        for n, members in enumerate(chunks):
            tree.zip(
                f"allava_laion/image_chunks/images_{n}.zip",
                members or {f"images/other{n}.jpeg": tree.picture()},
            )
    pack(tree, f"allava-{part.lower()}-laion", whole=True)


@pytest.mark.parametrize("layout", ["zip", "unpacked"])
@pytest.mark.parametrize("part", ["Caption", "Instruct"])
def test_allava_vflan(tree, part, layout):
    guitar = "PACS+guitar_image_category_classification_830_n03272010_10795-5.png"
    bigfoot = "VQA-E+visual_question_answering_574_COCO_train2014_000000119456.jpg"
    images = {guitar: tree.picture("PNG"), bigfoot: tree.picture("PNG")}
    short = {"Caption": "cap", "Instruct": "inst"}[part]
    folder = "allava_vflan/images/images_191task_1k"
    tree.json(
        f"allava_vflan/ALLaVA-{part}-VFLAN-4V.json",
        (
            {"id": f"allava_vflan_{short}_100000", "image": f"{folder}/{guitar}", "conversations": turns()},
            [images[guitar]],
        ),
        (
            {"id": f"allava_vflan_{short}_9", "image": f"{folder}/{bigfoot}", "conversations": turns()},
            [images[bigfoot]],
            "image-extension-differs",
        ),
        (
            {"id": f"allava_vflan_{short}_10", "image": f"{folder}/{guitar}", "conversations": turns()},
            [images[guitar]],
            "image-repeated",
        ),
    )
    if layout == "zip":
        members = {f"images_191task_1k/{name}": data for name, data in images.items()}
        tree.zip("allava_vflan/images/image_191-task_1k.zip", members)
    else:
        for name, data in images.items():
            tree.file(f"{folder}/{name}", data)
    pack(tree, f"allava-{part.lower()}-vflan", whole=True)


def web(tree, *, zipped):
    """Pictures of ShareGPT4V's web data; zipped they lie in data/ inside of each archive."""
    names = {
        "share_textvqa/images/4af4ccb4d2ef9f4d.jpg": tree.picture(),
        "web-celebrity/images/Tom_Felton_2.jpg": tree.picture(),
        "web-landmark/images/Eiffel Tower (Paris).jpg": tree.picture(),
        "wikiart/images/hieronymus-bosch_é.jpg": tree.picture(),
    }
    for name, data in names.items():
        if zipped:
            tree.zip(f"{name.partition('/')[0]}.zip", {f"data/{name}": data})
        else:
            tree.file(name, data)
    return names


def share(tree, path, *, zipped, more=()):
    lcs = tree.image("llava/llava_pretrain/images/00453/004539375.jpg")
    sam = tree.image("sam/images/sa_545504.jpg")
    coco = tree.image("coco/train2017/000000000009.jpg")
    pictures = {
        "llava/llava_pretrain/images/00453/004539375.jpg": lcs,
        "sam/images/sa_545504.jpg": sam,
        "coco/train2017/000000000009.jpg": coco,
        **web(tree, zipped=zipped),
    }
    items = [
        ({"id": f"s{n}", "image": name, "conversations": turns("<image>\nWhat is this photo about?")}, [data])
        for n, (name, data) in enumerate(pictures.items())
    ]
    gone = {"id": "s-gone", "image": "sam/images/sa_411432.jpg", "conversations": turns()}
    none = {"image": "sam/images/sa_545504.jpg", "conversations": turns()}
    older = tree.image("coco/train2017/COCO_train2014_000000000042.jpg")
    named = {"id": "s0", "image": "coco/train2017/000000000042.jpg", "conversations": turns()}
    tree.json(
        path,
        *items,
        (gone, "image-missing"),
        (none, [sam], "id-missing", "image-repeated"),
        (named, [older], "id-repeated", "image-by-prefix"),
        *more,
    )


@pytest.mark.parametrize("zipped", [False, True])
def test_sharegpt4v_captions(tree, zipped):
    share(tree, "sharegpt4v/sharegpt4v_instruct_gpt4-vision_cap100k.json", zipped=zipped)
    pack(tree, "sharegpt4v-caption", whole=True)


def test_sharegpt4v_pretraining(tree):
    lcs = tree.picture()
    tree.zip("llava/llava_pretrain/images.zip", {"00453/004539375.jpg": lcs, "00001/000010000.jpg": lcs})
    sam, coco = tree.picture(), tree.image("coco/train2014/COCO_train2014_000000000009.jpg")
    tree.tar("sam/sa_000000.tar", {"./sa_1.jpg": sam, "./sa_1.json": b"{}"})
    tree.tar("sam/sa_000001.tar", {"./sa_2.jpg": tree.picture(), "./sa_2.json": b"{}"})
    tree.json(
        "sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json",
        (
            {"id": "1", "image": "llava/llava_pretrain/images/00453/004539375.jpg", "conversations": turns()},
            [lcs],
        ),
        ({"id": "2", "image": "sam/images/sa_1.jpg", "conversations": turns()}, [sam]),
        (
            {"id": "3", "image": "coco/train2017/000000000009.jpg", "conversations": turns()},
            [coco],
            "image-by-prefix",
        ),
        ({"id": "4", "image": "sam/images/sa_3.jpg", "conversations": turns()}, "image-missing"),
    )
    pack(tree, "sharegpt4v-pretrain", whole=True)


@pytest.mark.parametrize("zipped", [False, True])
def test_sharegpt4v_mix665k(tree, zipped):
    path = "sharegpt4v/sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json"
    share(tree, path, zipped=zipped, more=llava15(tree))
    pack(tree, "sharegpt4v-mix665k", whole=True)


def mg_pretrain(tree):
    lcs = {"00453/004539375.jpg": tree.picture(), "00223/002239345.jpg": tree.picture()}
    for name, data in lcs.items():
        tree.file(f"LLaVA-Pretrain/images/{name}", data)
    laion = tree.image("allava_laion/images/100277305.jpeg")
    vflan = tree.image("allava_vflan/images/images_191task_1k/PACS+guitar.png", "PNG")
    ours = [
        ({"id": name[6:-4], "image": name, "conversations": turns()}, [data]) for name, data in lcs.items()
    ]
    theirs = [
        (
            {
                "id": "allava_laion_cap_1",
                "image": "allava_laion/images/100277305.jpeg",
                "conversations": turns(),
            },
            [laion],
        ),
        (
            {
                "id": "allava_vflan_cap_1",
                "image": "allava_vflan/images/images_191task_1k/PACS+guitar.png",
                "conversations": turns(),
            },
            [vflan],
        ),
    ]
    return ours, theirs


@pytest.mark.parametrize("prefix", ["", "LLaVA-Pretrain/images/", "llava/llava_pretrain/images/"])
def test_mg_llava_pretraining(tree, prefix):
    ours, theirs = mg_pretrain(tree)
    how = ["image-by-prefix"] if prefix != "LLaVA-Pretrain/images/" else []
    for record, *_ in ours:
        record["image"] = prefix + record["image"]
    other = tree.image("allava_laion/images/100277306.jpeg", "PNG")
    tree.file("LLaVA-Pretrain/images/00003/000030000.jpg", tree.picture()[:-30])

    def seen(id_, path, want, *notes):
        return {"id": id_, "image": path, "conversations": turns()}, want, *notes

    tree.json(
        "train_json/pretrain_blip_allava_1266k.json",
        *((*item, *how) for item in ours),
        *theirs,
        seen("5", "allava_laion/images/100277306.jpeg", [other], "image-extension-differs"),
        seen("6", "allava_laion/images/100277305.jpeg", theirs[0][1], "image-repeated"),
        seen("000030000", f"{prefix}00003/000030000.jpg", "image-truncated"),
        seen("000020000", f"{prefix}00002/000020000.jpg", "image-missing"),
    )
    pack(tree, "mg-llava-pretrain", whole=bool(how))


def test_mg_llava_pretraining_from_the_parts_it_is_made_of(tree):
    ours, (laion, vflan) = mg_pretrain(tree)
    tree.json("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", *((*item, "image-by-prefix") for item in ours))
    tree.json("allava_laion/ALLaVA-Caption-LAION-4V.json", laion)
    tree.json("allava_vflan/ALLaVA-Caption-VFLAN-4V.json", vflan)
    manifest = pack(tree, "mg-llava-pretrain")
    licences = [source.licence for source in manifest.sources if source.kind == "records"]
    assert len(licences) == 3
    assert len(set(licences)) == 2


@pytest.mark.parametrize("zipped", [False, True])
def test_mg_llava_finetuning(tree, zipped):
    items = llava15(tree, empty=True)
    laion = tree.image("allava_laion/images/100277305.jpeg")
    vflan = tree.image("allava_vflan/images/images_191task_1k/PACS+guitar.png", "PNG")
    plots = {
        "ai2d/images/0.png": tree.image("ai2d/images/0.png", "PNG"),
        "docvqa/images/xnbl0037_1.png": tree.image("docvqa/images/xnbl0037_1.png", "PNG"),
    }
    bar = tree.image("dvqa/images/bar_train_00157767.png", "PNG")
    pictures = {
        "allava_laion/images/100277305.jpeg": laion,
        "allava_vflan/images/images_191task_1k/PACS+guitar.png": vflan,
        **plots,
        **web(tree, zipped=zipped),
    }
    items += [
        ({"id": f"m{n}", "image": name, "conversations": turns()}, [data])
        for n, (name, data) in enumerate(pictures.items())
    ]
    dvqa = {
        "id": "bar_train_00157767.png",
        "image": "dvqa/images/bar_train_00157767.png",
        "conversations": turns(),
    }
    items.append((dvqa, [bar], "id-has-dot"))
    tree.json("train_json/instruct_llava_allava_doc_dvqa_share_ai2d_1383k.json", *items)
    manifest = pack(tree, "mg-llava-finetune", whole=True)
    assert manifest.counts.notes["text-only"] == 2


def test_llava_next_parquet(tree):
    book, bar, genome = tree.picture(), tree.picture("PNG"), tree.picture()
    rows = [
        ("000000033471", book, "000000033471.jpg", turns()),
        ("VG_100K/2317533", genome, "2317533.jpg", turns()),
        ("bar_train_00157767.png", bar, "bar_train_00157767.png", turns()),
        ("M9Nb6So_0", None, None, turns("Hello", "Hi </s>")),
        ("000000033471", book, "000000033471.jpg", turns("<image>\nAnd now?")),
        ("synthdog_en_00074_005206", genome, "a.jpg", turns(answer=" blank")),
        ("M9Nb6So_1", None, None, turns("Go on", "word " * 3000 + "end")),
    ]
    odd = {" blank": "blanks-around-text", "Hi </s>": "template-marker-in-text"}
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema(
        [("id", pa.string()), ("conversations", turn), ("data_source", pa.string()), ("image", struct)]
    )
    (tree.root / "data").mkdir(parents=True)
    for part, chunk in enumerate((rows[:3], rows[3:])):
        name = f"data/train-{part:05}-of-00002.parquet"
        table = [
            {
                "id": id_,
                "conversations": said,
                "data_source": "x",
                "image": data and {"bytes": data, "path": path},
            }
            for id_, data, path, said in chunk
        ]
        pq.write_table(pa.Table.from_pylist(table, schema), tree.root / name)
        for number, (row, (id_, data, path, _)) in enumerate(zip(table, chunk, strict=True)):
            record = {key: value for key, value in row.items() if key != "image"}
            notes = ["id-has-slash"] * ("/" in id_) + ["id-has-dot"] * ("." in id_)
            said = row["conversations"][1]["value"]
            notes += [odd[said]] if said in odd else ["text-long"] * (len(said) > 9999)
            tree.want(
                name, number, {**record, **({"image": path} if path else {})}, [data] if data else [], notes
            )
            tree.changed.add((name, number))
    tree.notes["id-repeated"] += 1
    manifest = pack(tree, "llava-next-779k")
    assert {"image-repeated", *manifest.counts.notes} == set(load_recipe("llava-next-779k").expect)


def test_llava_next_raw_format(tree):
    bar = tree.image("llava_next_raw_format/dvqa/bar_train_00157767.png", "PNG")
    record = {
        "id": "bar_train_00157767.png",
        "image": "dvqa/bar_train_00157767.png",
        "conversations": turns(),
    }
    other = {"id": "000000033471", "image": "dvqa/bar_train_00157767.png", "conversations": turns()}
    path = "llava_next_raw_format/llava_next_raw_format_processed.json"
    tree.json(path, (record, [bar], "id-has-dot"), (other, [bar], "image-repeated"))
    pack(tree, "llava-next-779k")


@pytest.mark.parametrize("folder", ["playground/data/prompts", "prompts", "."])
def test_llava_prompts(tree, folder):
    question, answer = "What color is it?", "It is red."
    block = f"Question:\n{question}\n===\nAnswer:\n{answer}\n===\nQuestion:\nWhy?\n===\nAnswer:\nBecause."
    base = "" if folder == "." else f"{folder}/"
    contents = {"conversation": block, "detail_description": "A long answer.", "complex_reasoning": block}
    for number, (kind, text) in enumerate(contents.items()):
        tree.file(f"{base}{kind}/system_message.txt", f"You are an AI ({kind}).".encode())
        for pair in range(number + 1):
            tree.file(f"{base}{kind}/{pair:03}_caps.txt", f"A caption {pair}.\n\ncat: [0.1, 0.2]".encode())
            tree.file(f"{base}{kind}/{pair:03}_conv.txt", text.encode())
    resolved = resolve_recipe(load_recipe("llava-prompts"), tree.root)
    out = tree.root.parent / "out"
    pack_dataset(PackOptions(sources=resolved.sources, out=out, shards=1, workers=1))
    manifest, found = samples(out)
    assert manifest.counts.records_in == manifest.counts.packed == 6
    assert manifest.counts.notes == {"text-only": 6, "id-has-slash": 6}
    assert set(manifest.counts.notes) == set(resolved.expect)
    assert {place[0] for place in found} == {f"{base}{kind}" for kind in contents}
    for (source, number), (images, raw) in found.items():
        assert images == []
        kind = source.rpartition("/")[2]
        said = " ".join(turn["value"] for turn in json.loads(raw)["conversations"])
        whole = raw.decode()
        assert f"You are an AI ({kind})." in whole
        assert f"A caption {number}." in said
        assert ("A long answer." if kind == "detail_description" else answer) in said
    assert all(source.licence == "Apache-2.0" for source in manifest.sources)


def test_every_recipe_has_a_test_here():
    here = Path(__file__).read_text()
    made = {*INSTRUCT, *(f"allava-{p}-{s}" for p in ("caption", "instruct") for s in ("laion", "vflan"))}
    assert [name for name in recipe_names() if f'"{name}"' not in here and name not in made] == []
