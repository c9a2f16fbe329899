"""Recipes as data: what a file may say, what is found of it in a folder, and what `shardify recipes` tells people."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shardify.errors import ShardifyError, SourceError, UsageError
from shardify.images.stores import StoreSpec
from shardify.recipes import resolve
from shardify.recipes.check import LOOKED_AT, check_recipe
from shardify.recipes.layout import find_recipe, resolve_recipe
from shardify.recipes.schema import MAX_RECIPE_BYTES, load_recipe, recipe_names, recipe_text
from shardify.sources.spec import Captions

SMALL = {"name": "mine", "title": "t", "records": [{"path": "train.json"}]}


def write(path, value=None, **changes):
    """A recipe file; `changes` are made to a small good one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value or {**SMALL, **changes}))
    return path


def picture():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


PICTURE = picture()


def put(root, *images):
    for image in images:
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        (root / image).write_bytes(PICTURE)


def put_zip(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, PICTURE)


def record(number, image=None):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    return {"id": f"{number}", **({} if image is None else {"image": image}), "conversations": turns}


def put_records(path, *images):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([record(number, image) for number, image in enumerate(images)]))


def run(*arguments):
    """The real command in a process of its own: exit status, standard output, standard error."""
    command = [sys.executable, "-m", "shardify.cli", "recipes", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


# --- the file


def test_all_recipes_load_and_say_whose_they_are():
    assert len(recipe_names()) >= 18
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.title
        assert recipe.licence
        assert recipe.citation
        assert recipe.get, name
        for entry in recipe.records:
            assert entry.counts or entry.about, name


def test_a_file_of_ones_own_is_a_recipe_too(tmp_path):
    path = write(tmp_path / "mine.yaml")
    assert load_recipe(path).name == "mine"
    assert load_recipe(str(path)).records[0].places[0].path == "train.json"
    assert recipe_text(path) == path.read_text()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"no recipe 'llava'.*llava-v1\.5-mix665k.*\./mine\.yaml"):
        load_recipe("llava")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colour": 1}, r"colour: no such key; allowed are name, title, .*max_bad"),
        ({"file": "x"}, r"file: no such key"),
        ({"name": "My Recipe"}, r"name: 'My Recipe'; lower-case"),
        ({"title": 3}, r"title: Expected `str`, got `int`"),
        (
            {"records": [{"path": "a", "knd": "llava"}]},
            r"records\[0\]\.knd: no such key; allowed are path, any_of, kind",
        ),
        (
            {"records": [{"path": "a", "kind": "csv"}]},
            r"records\[0\]\.kind: 'csv'; allowed are auto, llava, parquet, webdataset, prompts",
        ),
        ({"records": [{"path": "a", "any_of": ["b"]}]}, r"records\[0\]: either 'path' or 'any_of'"),
        ({"records": [{"any_of": []}]}, r"records\[0\]: either 'path' or 'any_of'"),
        ({"records": [{"kind": "llava"}]}, r"records\[0\]: either 'path' or 'any_of'"),
        ({"records": [{"path": "../up.json"}]}, r"records\[0\]\.path: '\.\./up\.json' is not allowed"),
        ({"records": [{"path": "/etc/passwd"}]}, r"records\[0\]\.path: '/etc/passwd' is not allowed"),
        (
            {"records": [{"any_of": ["a", {"path": "b/../../c"}]}]},
            r"records\[0\]\.path: 'b/\.\./\.\./c' is not allowed",
        ),
        ({"records": [{"path": "a", "prefixes": [["only"]]}]}, r"records\[0\]\.prefixes\[0\]: .*length 2"),
        (
            {"records": [{"path": "a", "captions": {"gpt": None}}]},
            r"records\[0\]\.captions: 'gpt'; allowed are raw, blip",
        ),
        (
            {"records": [{"path": "a", "captions": {"blip": {"path": "../m"}}}]},
            r"captions\.blip\.path: '\.\./m' is not allowed",
        ),
        ({"records": [{"path": "a", "count": -1}]}, r"records\[0\]\.count: less than none"),
        ({"images": [{"path": "a", "mount": "/x"}]}, r"images\[0\]\.mount: '/x' is not allowed"),
        (
            {"images": [{"path": "a", "holdz": 1}]},
            r"images\[0\]\.holdz: no such key; allowed are path, any_of, mount, holds, optional",
        ),
        (
            {"images": [{"any_of": [{"path": "a", "mout": ""}]}]},
            r"images\[0\]\.any_of\[0\]\.mout: no such key; allowed are path, kind, mount",
        ),
        ({"include": [{"recipe": "x", "root": "../y"}]}, r"include\[0\]\.root: '\.\./y' is not allowed"),
        (
            {"include": [{"recipe": "../other.yaml"}]},
            r"include\[0\]\.recipe: '\.\./other\.yaml' is not allowed",
        ),
        ({"records": []}, r"records: missing"),
        (
            {"records": [], "include": [{"recipe": "x"}], "instead": [{"recipe": "x"}]},
            r"instead: without records",
        ),
        ({"expect": {"image-lost": "x"}}, r"expect\.image-lost: no such code"),
        ({"max_bad": "some"}, r"max_bad: 'some'; a count"),
    ],
)
def test_what_a_recipe_may_not_say_is_named_with_its_key(tmp_path, change, says):
    path = write(tmp_path / "mine.yaml", **change)
    with pytest.raises(SourceError, match=says) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [", r"line 1: not YAML"),
        ("- a\n- b", r"Expected `object`, got `array`"),
        ("", r"Expected `object`, got `null`"),
        ("a: &x 1\nb: *x", r"line 2: YAML aliases \(\*x\) are not allowed"),
        ("name: a\nname: b\ntitle: c", r"line 2: not YAML: the key 'name' stands twice"),
        ("name: !!python/object/apply:os.system [true]", r"line 1: not YAML"),
        ("a\x00b", r"not YAML"),
        ("[" * 100_000, r"line 1: nested deeper than 20"),
        ("? [a]\n: b", r"not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, says):
    with pytest.raises(SourceError, match=says):
        load_recipe(write(tmp_path / "mine.yaml", text))


def test_a_file_that_is_no_text_or_too_large_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff")
    with pytest.raises(SourceError, match=r"not UTF-8 \(byte 6\)"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_bytes(b"#" * (MAX_RECIPE_BYTES + 1))
    with pytest.raises(SourceError, match="larger than"):
        load_recipe(tmp_path / "mine.yaml")
    with pytest.raises(SourceError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda part: (
            st.lists(part, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["name", "records", "images", "path", "any_of", "include", "recipe", "expect", "x"]
                ),
                part,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_content_makes_the_reader_crash(tmp_path, value):
    path = write(
        tmp_path / "mine.yaml",
        yaml.safe_dump({**SMALL, **(value if isinstance(value, dict) else {"records": value})}),
    )
    try:
        load_recipe(path)
    except ShardifyError as error:
        assert str(path) in str(error)


# --- in a folder


def test_the_first_place_that_is_there_counts(tmp_path):
    images = [{"any_of": ["coco", "coco.zip", {"path": "all.zip", "mount": ""}], "mount": "coco/train2017"}]
    recipe = load_recipe(write(tmp_path / "r" / "mine.yaml", images=images))
    root = tmp_path / "root"
    put_records(root / "train.json", "coco/train2017/1.jpg")
    put_zip(root / "all.zip", "coco/train2017/1.jpg")
    assert resolve_recipe(recipe, root).stores == (StoreSpec(f"{root}/all.zip", ""),)
    put_zip(root / "coco.zip", "1.jpg")
    assert resolve_recipe(recipe, root).stores == (StoreSpec(f"{root}/coco.zip", "coco/train2017"),)
    put(root, "coco/1.jpg")
    resolved = resolve_recipe(recipe, root)
    assert resolved.stores == (StoreSpec(f"{root}/coco", "coco/train2017"),)
    (source,) = resolved.sources
    assert (source.path, source.name, source.kind) == (f"{root}/train.json", "train.json", "auto")


def test_an_empty_folder_does_not_hide_the_archive_that_is_to_fill_it(tmp_path):
    images = [{"any_of": ["images", "images.zip"]}]
    recipe = load_recipe(write(tmp_path / "mine.yaml", images=images))
    root = tmp_path / "root"
    put_records(root / "train.json", "1.jpg")
    (root / "images").mkdir()
    assert resolve_recipe(recipe, root).stores == (StoreSpec(f"{root}/images"),)
    put_zip(root / "images.zip", "1.jpg")
    assert resolve_recipe(recipe, root).stores == (StoreSpec(f"{root}/images.zip"),)


def test_a_pattern_takes_all_its_matches_in_their_order(tmp_path):
    recipe = load_recipe(write(tmp_path / "mine.yaml", images=[{"path": "chunks/images_*.zip"}]))
    root = tmp_path / "root[1]"  # the root's own name is no pattern
    put_records(root / "train.json")
    for number in range(11):
        put_zip(root / "chunks" / f"images_{number}.zip", "a.jpg")
    stores = resolve_recipe(recipe, root).stores
    assert [store.path.rpartition("_")[2] for store in stores] == [f"{n}.zip" for n in range(11)]


def test_what_is_missing_is_listed_with_where_to_get_it(tmp_path):
    with pytest.raises(SourceError) as caught:
        resolve("llava-v1.5-mix665k", tmp_path)
    text = str(caught.value)
    assert f"{tmp_path}: recipe llava-v1.5-mix665k lacks" in text
    assert "records: llava_v1_5_mix665k.json or " in text
    assert "images: ocr_vqa/images or ocr_vqa/images.zip or " in text
    assert "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K" in text
    assert "shardify recipes check llava-v1.5-mix665k" in text


def test_the_root_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for root, says in [("none", "no such folder"), ("file", "not a folder")]:
        with pytest.raises(SourceError, match=says):
            resolve("llava-prompts", tmp_path / root)
    with pytest.raises(UsageError, match="a folder is needed"):
        resolve("llava-prompts", "s3://bucket/data")


def test_captions_are_a_choice_of_recipes_that_have_one(tmp_path):
    put_records(tmp_path / "chat.json", "GCC_train_000000001.jpg")
    put(tmp_path, "images/GCC_train_000000001.jpg")
    assert resolve("llava-cc3m-595k", tmp_path).sources[0].captions is None
    assert resolve("llava-cc3m-595k", tmp_path, caption="raw").sources[0].captions is None
    with pytest.raises(SourceError, match=r"captions: metadata\.json"):
        resolve("llava-cc3m-595k", tmp_path, caption="blip")
    (tmp_path / "metadata.json").write_text("[]")
    captions = resolve("llava-cc3m-595k", tmp_path, caption="blip").sources[0].captions
    assert captions == Captions(path=f"{tmp_path}/metadata.json", key="image", field="blip_caption")
    with pytest.raises(UsageError, match="has raw, blip to choose from"):
        resolve("llava-cc3m-595k", tmp_path, caption="gpt")
    with pytest.raises(UsageError, match="has no choice of captions"):
        resolve("llava-v1.5-mix665k", tmp_path, caption="blip")


def test_a_mix_lists_recipes_and_keeps_their_images_apart(tmp_path):
    part = {
        "licence": "MIT",
        "images": [{"path": "images"}],
        "records": [{"path": "r.json", "prefixes": [["x/", "y/"]]}],
    }
    write(tmp_path / "recipes/part.yaml", **part)
    includes = [{"recipe": "part.yaml", "root": side, "below": side} for side in ("left", "right")]
    mix = write(
        tmp_path / "recipes/mix.yaml", {"name": "mix", "title": "two", "include": includes, "max_bad": "5%"}
    )
    root = tmp_path / "root"
    for side in ("left", "right"):
        put_records(root / side / "r.json", "1.jpg")
        put(root, f"{side}/images/1.jpg")
    resolved = resolve_recipe(load_recipe(mix), root)
    assert [source.name for source in resolved.sources] == ["left/r.json", "right/r.json"]
    assert [store.mount for store in resolved.stores] == ["left", "right"]
    assert resolved.sources[1].prefixes == (("x/", "right/y/"), ("", "right/"))
    assert resolved.sources[0].licence == "MIT"
    assert resolved.max_bad == "5%"


def test_parts_of_a_mix_share_a_store_but_no_record_file(tmp_path):
    part = {"images": [{"path": "images"}]}
    write(tmp_path / "one.yaml", records=[{"path": "1.json"}], **part)
    write(tmp_path / "two.yaml", records=[{"path": "2.json"}], **part)
    root = tmp_path / "root"
    put_records(root / "1.json", "a.jpg")
    put_records(root / "2.json", "a.jpg")
    put(root, "images/a.jpg")
    both = [{"recipe": "./one.yaml"}, {"recipe": "./two.yaml"}]
    mix = {"name": "mix", "title": "two", "include": both}
    assert len(resolve_recipe(load_recipe(write(tmp_path / "mix.yaml", mix)), root).stores) == 1
    twice = {**mix, "include": [both[0], dict(both[0])]}
    with pytest.raises(UsageError, match=r"1\.json belongs to two of its parts"):
        resolve_recipe(load_recipe(write(tmp_path / "mix.yaml", twice)), root)


def test_a_mix_that_includes_itself_is_refused(tmp_path):
    write(tmp_path / "a.yaml", {"name": "a", "title": "a", "include": [{"recipe": "./b.yaml"}]})
    write(tmp_path / "b.yaml", {"name": "b", "title": "b", "include": [{"recipe": "./a.yaml"}]})
    with pytest.raises(SourceError, match=r"goes round: .*a\.yaml -> .*b\.yaml -> "):
        resolve_recipe(load_recipe(tmp_path / "a.yaml"), tmp_path)


def test_own_records_come_before_the_parts_they_were_made_of(tmp_path):
    write(tmp_path / "part.yaml", records=[{"path": "part.json"}])
    mix = write(tmp_path / "mix.yaml", records=[{"path": "whole.json"}], instead=[{"recipe": "./part.yaml"}])
    root = tmp_path / "root"
    root.mkdir()
    assert find_recipe(load_recipe(mix), root).missing == ["records: whole.json"]
    put_records(root / "part.json")
    assert [source.name for source in resolve_recipe(load_recipe(mix), root).sources] == ["part.json"]
    put_records(root / "whole.json")
    assert [source.name for source in resolve_recipe(load_recipe(mix), root).sources] == ["whole.json"]


# --- check


def of_size(name, folder, **counts):
    """A published recipe with smaller counts: for `records` one a source, for `holds` one a store."""
    recipe = yaml.safe_load(recipe_text(name))
    for entry, count in zip(recipe["records"], counts["records"], strict=True):
        entry.pop("about", None)
        entry["count"] = count
    for entry in recipe.get("images", []):
        entry.pop("holds", None)
    return write(folder / "small.yaml", recipe)


MIX_ROOTS = {
    "coco/train2017": "000000033471.jpg",
    "gqa/images": "2327515.jpg",
    "ocr_vqa/images": "140031996X.jpg",
    "textvqa/train_images": "011e7e629fb9ae7b.jpg",
    "vg/VG_100K": "2317533.jpg",
    "vg/VG_100K_2": "2400000.jpg",
}


def mix665k(root):
    paths = [f"{folder}/{name}" for folder, name in MIX_ROOTS.items()]
    put_records(root / "llava_v1_5_mix665k.json", *paths, None)
    put(root, *paths)


def test_check_of_a_complete_tree(tmp_path):
    root = tmp_path / "root"
    mix665k(root)
    recipe = of_size("llava-v1.5-mix665k", tmp_path, records=[7])
    status, out, _ = run("check", recipe, "--root", root)
    assert status == 0, out
    assert out.rstrip().endswith("complete")
    assert "6 of 6 (100%), 1 text-only" in out
    assert "coco/train2017" in out
    report = check_recipe(load_recipe(recipe), root)
    assert report.complete
    assert (report.records[0].first.found, report.records[0].random.text_only) == (6, 1)
    assert [store.files for store in report.images] == [1] * 6


def test_check_of_a_partial_tree(tmp_path):
    root = tmp_path / "root"
    mix665k(root)
    (root / "ocr_vqa/images/140031996X.jpg").unlink()
    (root / "ocr_vqa/images").rmdir()
    (root / "gqa/images/2327515.jpg").unlink()
    put_zip(root / "gqa/images/gqa_images.zip", "images/2327515.jpg")
    recipe = of_size("llava-v1.5-mix665k", tmp_path, records=[8])
    status, out, _ = run("check", recipe, "--root", root, "--json")
    report = json.loads(out)
    assert status == 1
    assert not report["complete"]
    assert any("7 records; 8 were published" in fault for fault in report["faults"])
    assert any(fault.startswith("no images: ocr_vqa/images or ") for fault in report["faults"])
    assert any("in gqa/images, 0 find them" in fault for fault in report["faults"])
    assert report["records"][0]["roots"]["coco/train2017"] == [2, 2]
    assert report["records"][0]["roots"]["ocr_vqa/images"] == [0, 2]
    assert any(
        "gqa/images/gqa_images.zip is still packed: unpack it as gqa/images" in cause
        for cause in report["causes"]
    )
    assert any("of ocr_vqa/images nothing is found" in cause for cause in report["causes"])
    assert "https://huggingface.co/datasets/weizhiwang/llava_v15_instruction_images" in [
        o["url"] for o in report["get"]
    ]


def test_check_of_an_empty_folder(tmp_path):
    status, out, _ = run("check", "llava-pretrain-558k", "--root", tmp_path)
    assert status == 1
    assert "no records: blip_laion_cc_sbu_558k.json" in out
    assert f"{tmp_path} is empty, or" in out
    assert "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain" in out


def test_check_knows_that_mg_llavas_link_leads_to_another_data_set(tmp_path):
    paths = [f"{n:05}/{n:05}0000.jpg" for n in range(5)]
    put_records(tmp_path / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", *paths)
    put(tmp_path, *(f"LLaVA-Pretrain/images/GCC_train_{n:09}.jpg" for n in range(5)))
    report = check_recipe(load_recipe("mg-llava-pretrain"), tmp_path)
    assert not report.complete
    assert report.records[0].first.share == 0
    cause = next(cause for cause in report.causes if "LLaVA-CC3M-Pretrain-595K" in cause)
    assert "MG-LLaVA's dataset_prepare.md links the one for the other" in cause
    assert "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain" in cause
    # and the other way round
    put_records(tmp_path / "chat.json", "GCC_train_000000001.jpg")
    put(tmp_path, "images/00000/000000001.jpg")
    report = check_recipe(load_recipe("llava-cc3m-595k"), tmp_path)
    assert any("holds the images of LLaVA-Pretrain" in cause for cause in report.causes)


def test_check_knows_the_json_of_another_data_set_by_its_count(tmp_path):
    small = ",".join([json.dumps(record(1, "000000000001.jpg"))] * 157_712)
    (tmp_path / "detail_23k.json").write_text(f"[{small}]")
    put(tmp_path, "train2017/000000000001.jpg")
    report = check_recipe(load_recipe("detail-23k"), tmp_path)
    assert report.records[0].first.records == report.records[0].random.records == LOOKED_AT
    assert any("157,712 records; about 23,000 were published" in fault for fault in report.faults)
    assert any("has as many records as llava-instruct-150k" in cause for cause in report.causes)


@pytest.mark.parametrize(
    ("root", "says"), [("root/images", "one folder too deep"), ("", "one folder too high")]
)
def test_check_knows_a_root_that_is_off_by_one(tmp_path, root, says):
    put_records(tmp_path / "root/blip_laion_cc_sbu_558k.json", "00000/000000001.jpg")
    put(tmp_path, "root/images/00000/000000001.jpg")
    report = check_recipe(load_recipe("llava-pretrain-558k"), tmp_path / root)
    assert any(says in cause for cause in report.causes)


def test_check_of_images_that_are_empty_or_of_another_release(tmp_path):
    put_records(
        tmp_path / "allava_laion/ALLaVA-Caption-LAION-4V.json",
        *(f"allava_laion/images/{n}.jpeg" for n in range(3)),
    )
    (tmp_path / "allava_laion/images").mkdir()
    report = check_recipe(load_recipe("allava-caption-laion"), tmp_path)
    assert any("allava_laion/images is empty" in cause for cause in report.causes)
    put(tmp_path, "allava_laion/images/renamed.jpeg")
    report = check_recipe(load_recipe("allava-caption-laion"), tmp_path)
    assert any("of another release of it" in cause for cause in report.causes)


@pytest.mark.parametrize(
    ("text", "says"), [("[]", "0 records; "), ("[1, {}]", "are no records"), ("", "the file is empty")]
)
def test_check_of_record_files_without_records(tmp_path, text, says):
    (tmp_path / "detail_23k.json").write_text(text)
    put(tmp_path, "train2017/000000000001.jpg")
    report = check_recipe(load_recipe("detail-23k"), tmp_path)
    assert any(says in fault for fault in report.faults), report.faults


def test_output_that_the_terminal_cannot_show_is_no_crash(tmp_path):
    recipe = write(tmp_path / "é.yaml", {**SMALL, "title": "ünï"})
    root = tmp_path / "wörld"
    put_records(root / "train.json", "\udcff/é.jpg")
    command = [sys.executable, "-m", "shardify.cli", "recipes"]
    for arguments in (["show", recipe], ["check", recipe, "--root", root]):
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        assert b"Traceback" not in done.stderr
        assert done.stdout


def test_check_tells_what_is_damaged_and_goes_on(tmp_path):
    mix665k(tmp_path)
    text = (tmp_path / "llava_v1_5_mix665k.json").read_text()
    (tmp_path / "llava_v1_5_mix665k.json").write_text(text[:-40])
    (tmp_path / "gqa/images/2327515.jpg").unlink()
    (tmp_path / "gqa/images").rmdir()
    (tmp_path / "gqa/images.zip").write_bytes(b"PK but no zip")
    status, out, _ = run("check", "llava-v1.5-mix665k", "--root", tmp_path)
    assert status == 1
    assert "the array is not closed" in out
    assert "gqa/images.zip: " in out
    assert "damaged" in out


@pytest.mark.parametrize("of_struct", [True, False])
def test_check_of_parquet_looks_at_the_rows_that_have_an_image(tmp_path, of_struct):
    image = {"bytes": PICTURE, "path": None} if of_struct else PICTURE
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if of_struct else pa.binary()
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    schema = pa.schema([("id", pa.string()), ("conversations", turns), ("image", kind)])
    rows = [{**record(n), "image": image if n % 4 else None} for n in range(20)]
    (tmp_path / "data").mkdir()
    for part in range(2):
        table = pa.Table.from_pylist(rows[part::2], schema)
        pq.write_table(table, tmp_path / f"data/train-{part:05}-of-00002.parquet", row_group_size=3)
    recipe = load_recipe(of_size("llava-next-779k", tmp_path, records=[20]))
    report = check_recipe(recipe, tmp_path)
    assert report.complete, report.faults
    assert report.records[0].records == 20
    assert (report.records[0].first.found, report.records[0].first.text_only) == (15, 5)
    (tmp_path / "data/train-00001-of-00002.parquet").write_bytes(b"PAR1 cut off")
    (fault,) = check_recipe(recipe, tmp_path).faults
    assert "train-00001-of-00002.parquet: no Parquet file, or damaged" in fault


def test_check_of_tars_counts_samples_by_their_headers(tmp_path):
    for part in range(2):
        with tarfile.open(tmp_path / f"{part:05}.tar", "w") as tar:
            for number in range(3):
                for field in ("jpg", "json") if number else ("json",):
                    info = tarfile.TarInfo(f"{part}{number}.{field}")
                    info.size = len(PICTURE)
                    tar.addfile(info, io.BytesIO(PICTURE))
    entry = {"path": "*.tar", "kind": "webdataset", "count": 6}
    recipe = load_recipe(write(tmp_path / "mine.yaml", records=[entry]))
    report = check_recipe(recipe, tmp_path)
    assert report.complete, report.faults
    assert (report.records[0].first.found, report.records[0].first.text_only) == (4, 2)
    damaged = bytearray((tmp_path / "00001.tar").read_bytes())
    damaged[124:136] = b"\x80\x7f" + b"\xff" * 10  # a size beyond all numbers
    damaged[148:156] = b" " * 8
    damaged[148:156] = b"%06o\0 " % sum(damaged[:512])
    (tmp_path / "00001.tar").write_bytes(damaged)
    (fault,) = check_recipe(recipe, tmp_path).faults
    assert "00001.tar: cannot be read as a tar" in fault


def test_check_tolerates_what_a_recipe_says_is_missing_but_not_a_whole_root(tmp_path):
    images = [{"path": "a", "mount": "a"}, {"path": "b", "mount": "b"}]
    records = [{"path": "train.json", "count": 40}]
    recipe = load_recipe(
        write(tmp_path / "mine.yaml", images=images, records=records, expect={"image-missing": "half of b"})
    )
    root = tmp_path / "root"
    put_records(root / "train.json", *(f"{'ab'[n % 2]}/{n}.jpg" for n in range(40)))
    put(root, *(f"a/{n}.jpg" for n in range(0, 40, 2)), *(f"b/{n}.jpg" for n in range(1, 20, 2)))
    assert check_recipe(recipe, root).complete
    for n in range(1, 20, 2):
        (root / f"b/{n}.jpg").unlink()
    put(root, "b/1.jpg")
    assert check_recipe(recipe, root).faults == ("train.json: of 40 records with images in b, 2 find them",)


def test_the_random_records_depend_on_the_seed_alone(tmp_path):
    recipe = load_recipe(
        write(tmp_path / "mine.yaml", images=[{"path": "a", "mount": "a"}], expect={"image-missing": "most"})
    )
    root = tmp_path / "root"
    put_records(root / "train.json", *(f"a/{n}.jpg" for n in range(5000)))
    put(root, *(f"a/{n}.jpg" for n in range(2000, 2600)))
    seen = [check_recipe(recipe, root, seed=seed).records[0] for seed in (0, 0, 1, 2)]
    assert seen[0].first.found == 0
    assert seen[0].random == seen[1].random
    assert len({report.random.found for report in seen}) > 1
    assert all(60 < report.random.found < 190 for report in seen)  # 600 of 5,000 are there


# --- the command


def test_the_document_lists_every_recipe():
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for name in recipe_names():
        assert f"| `{name}` | {load_recipe(name).title} |" in text


def test_list_and_show():
    status, out, _ = run("list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == recipe_names()
    status, out, _ = run("show", "llava-prompts")
    assert status == 0
    assert out == recipe_text("llava-prompts")
    assert yaml.safe_load(out)["name"] == "llava-prompts"
    status, _, err = run("show", "llama")
    assert status == 2
    assert "no recipe 'llama'" in err


def test_pack_takes_a_recipe(tmp_path):
    root = tmp_path / "root"
    mix665k(root)
    command = [sys.executable, "-m", "shardify.cli", "pack", "--recipe", "llava-v1.5-mix665k"]
    done = subprocess.run(
        [*command, "--root", root, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"]["packed"] == 7
    assert manifest["sources"][0]["licence"].startswith("CC-BY-4.0")
    done = subprocess.run(
        [*command, "--root", tmp_path, "--out", tmp_path / "out2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "recipe llava-v1.5-mix665k lacks" in done.stderr
    assert "Traceback" not in done.stderr
