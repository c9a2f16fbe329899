"""Real data sets pack with nothing lost and nothing unexplained: every record is packed, or set aside for the reason it should be."""

import json
import warnings
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from shardify.audit import NOTES, REASONS
from shardify.convert import PackOptions, pack_dataset
from shardify.errors import SourceError
from shardify.format.manifest import read_manifest
from shardify.verify import verify_shards


def pack(tmp_path, records, images, **options):
    """Pack; checks what must hold for any set, and returns the manifest and the quarantine's lines."""
    out = tmp_path / "out"
    given = {"max_bad": "100%", "workers": 2, "shards": 2, **options}
    pack_dataset(PackOptions(records=records, images=images, out=out, **given))
    manifest = read_manifest(out / "manifest.json")
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert set(manifest.counts.set_aside) <= set(REASONS)
    assert set(manifest.counts.notes) <= set(NOTES)
    assert manifest.counts.records_in == manifest.counts.packed + len(lines)
    assert Counter(line["code"] for line in lines) == manifest.counts.set_aside
    assert verify_shards(str(out), workers=1)
    return manifest, lines


def samples(tmp_path):
    tars = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    return list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))


def picture():
    buffer = BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["ft/agi/train_split_1", "ft/cgi/test_split_1", "ft/livec/train_split_1",
                                  "training_sft/train_koniq", "training_sft/train_spaq_20percent"])  # fmt: skip
def test_qalign_hostile_ids_and_absent_images(real_data, tmp_path, name):
    path = real_data / "qalign_json" / f"{name}.json"
    records = json.loads(path.read_bytes())
    with pytest.raises(SourceError, match=f"none of the {len(records):,} images"):
        pack(tmp_path, [path], [tmp_path])
    there = {record["image"] for record in records[::2]}
    for image in there:
        target = tmp_path / "images" / image
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(picture())
    manifest, lines = pack(tmp_path, [path], [tmp_path / "images"])
    kept = [record for record in records if record["image"] in there]
    assert manifest.counts.set_aside == {"image-missing": len(records) - len(kept)}
    assert [line["image"] for line in lines] == [r["image"] for r in records if r["image"] not in there]
    found = samples(tmp_path)
    assert Counter(json.loads(sample["json"])["id"] for sample in found) == Counter(r["id"] for r in kept)
    assert all("." not in sample["__key__"] and "/" not in sample["__key__"] for sample in found)
    assert manifest.counts.notes["id-has-dot"] == sum("." in record["id"] for record in kept)
    # their placeholder is <|image|>, which is not LLaVA's
    assert manifest.counts.notes["image-tokens-missing"] == len(kept)


def test_qalign_videos_without_conversation(real_data, tmp_path):
    with pytest.raises(Exception, match=r"no record can be packed: (no-conversations|record-video) 1,200"):
        pack(tmp_path, [real_data / "qalign_json" / "test_jsons" / "konvid.json"], [])


def test_llavar_evaluation_files_are_no_conversations(real_data, tmp_path):
    for name in ("ocrVQA", "textVQA"):
        with pytest.raises(Exception, match="no record can be packed: no-conversations 5,000"):
            pack(tmp_path, [real_data / "llavar_json" / "MultimodalOCR" / f"{name}.json"], [tmp_path])
    assert not (tmp_path / "out").exists()


def test_nextgpt_whose_key_is_input_image(real_data, tmp_path):
    folder = real_data / "nextgpt_cc3m"
    manifest, _ = pack(tmp_path, [folder / "cc3m_comprehension.json"], [folder / "images"])
    records = json.loads((folder / "cc3m_comprehension.json").read_bytes())
    assert (manifest.counts.packed, manifest.counts.set_aside) == (len(records), {})
    for sample in samples(tmp_path):
        record = json.loads(sample["json"])
        assert sample["jpg"] == (folder / "images" / record["image"]).read_bytes()
        assert "input_image" not in record


@pytest.mark.parametrize("stem", ["sft_single_image", "sft_multi_image", "pretrain_image"])
@pytest.mark.parametrize("version", ["", "_new"])
def test_xtuner_messages(real_data, tmp_path, stem, version):
    folder = real_data / "xtuner_resource"
    path = folder / f"mllm_{stem}_example_data{version}.jsonl"
    wanted = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    manifest, lines = pack(tmp_path, [path], [folder], prefixes=[("resource/", "")])
    assert manifest.counts.records_in == len(wanted)
    assert lines == []
    found = {json.loads(sample["json"])["id"]: sample for sample in samples(tmp_path)}
    for record in wanted:
        parts = [
            part for message in record["messages"] for part in message["content"] if isinstance(part, dict)
        ]
        urls = [
            part.get("image_url", part.get("image"))["url"]
            for part in parts
            if part["type"].startswith("image")
        ]
        sample = found[record["id"]]
        images = [sample[field] for field in sample if field.endswith("jpg")]
        assert images == [(folder / url.removeprefix("resource/")).read_bytes() for url in urls]
        packed = json.loads(sample["json"])
        assert sum(turn["value"].count("<image>") for turn in packed["conversations"]) == len(urls)


def test_xtuner_text(real_data, tmp_path):
    folder = real_data / "xtuner_resource"
    manifest, lines = pack(tmp_path, [folder / "mllm_sft_text_example_data.jsonl"], [])
    assert (manifest.counts.packed, manifest.counts.notes["text-only"], lines) == (200, 200, [])
    manifest, lines = pack(tmp_path / "bare", [folder / "openai_sft.jsonl"], [])
    assert (manifest.counts.packed, lines) == (128, [])


def opens(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.convert("RGB")
    except Exception:
        return False
    return True


@pytest.mark.parametrize("check", ["header", "decode", "none"])
def test_every_edge_case_of_pillow_packs_or_has_a_reason(real_data, tmp_path, check):
    folder = real_data / "pillow_edge_cases"
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A picture."}]
    records = [{"id": path, "image": path, "conversations": turns} for path in paths]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    manifest, lines = pack(tmp_path, [tmp_path / "chat.json"], [folder], check=check)
    assert manifest.counts.records_in == len(paths)
    aside = {line["image"]: line["code"] for line in lines}
    for sample in samples(tmp_path):
        record = json.loads(sample["json"])
        (data,) = (sample[field] for field in sample if field != "json" and not field.startswith("__"))
        assert data == (folder / record["image"]).read_bytes()
    if check == "decode":
        # whatever a trainer could not open is set aside, and all that it can open is kept, but for formats that no trainer takes
        undecodable = {path for path in paths if not opens(folder / path)}
        assert undecodable <= set(aside)
        assert {aside[path] for path in set(aside) - undecodable} <= {"image-unrecognised"}
