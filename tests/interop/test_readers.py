"""What other readers make of our shards: tar(1), tarfile, webdataset, Hugging Face datasets."""

import json
import shlex
import subprocess
import tarfile

import datasets
import pytest
import webdataset


def expected_names(packed):
    return [f"{key}.{field}" for key, fields in packed.samples.items() for field in fields]


def read_by_webdataset(urls):
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        assert sample["__key__"] not in found
        found[sample["__key__"]] = {
            field: content for field, content in sample.items() if not field.startswith("__")
        }
    return found


def test_tar_lists_plain_and_compressed_shards(plain, compressed):
    for packed, options in ((plain, ["-tf"]), (compressed, ["--zstd", "-tf"]), (compressed, ["-taf"])):
        names = []
        for shard in packed.shards:
            listed = subprocess.run(["tar", *options, shard], check=True, capture_output=True, text=True)
            assert listed.stderr == ""
            names += listed.stdout.split()
        assert names == expected_names(packed)


def test_tar_extracts_what_was_packed(compressed, tmp_path):
    for shard in compressed.shards:
        subprocess.run(["tar", "--zstd", "-xf", shard, "-C", tmp_path], check=True)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {
        f"{key}.{field}": content
        for key, fields in compressed.samples.items()
        for field, content in fields.items()
    }


def test_tarfile_sees_ordinary_files_of_nobody(plain):
    for shard in plain.shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                assert member.isreg()
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)


def test_webdataset_reads_equal_content(plain):
    assert read_by_webdataset(plain.shards) == plain.samples


def test_webdataset_reads_compressed_shards_through_its_pipe(compressed):
    urls = [f"pipe:zstd -dcq {shlex.quote(shard)}" for shard in compressed.shards]
    assert read_by_webdataset(urls) == compressed.samples


def load(packed, tmp_path, monkeypatch, **options):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets.load_dataset(
        "webdataset",
        data_files={"train": packed.shards},
        split="train",
        cache_dir=str(tmp_path / "cache"),
        **options,
    )


def test_hugging_face_datasets_needs_no_features_where_all_samples_have_the_same(
    uniform, tmp_path, monkeypatch
):
    found = load(uniform, tmp_path, monkeypatch).cast_column("jpg", datasets.Image(decode=False))
    assert len(found) == len(uniform.samples)
    for row in found:
        sample = uniform.samples[row["__key__"]]
        assert row["jpg"]["bytes"] == sample["jpg"]
        assert row["json"] == json.loads(sample["json"])


def test_hugging_face_datasets_reads_mixed_samples_by_explicit_features(plain, tmp_path, monkeypatch):
    image = datasets.Image(decode=False)
    names = ("jpg", "png", "0.jpg", "1.png")
    text = datasets.Value("string")
    features = datasets.Features(
        {"__key__": text, "__url__": text, "json": datasets.Json(), **dict.fromkeys(names, image)}
    )
    found = load(plain, tmp_path, monkeypatch, features=features)
    assert len(found) == len(plain.samples)
    for row in found:
        sample = plain.samples[row["__key__"]]
        assert {name: row[name]["bytes"] for name in names if row[name] is not None} == {
            field: content for field, content in sample.items() if field != "json"
        }
        assert row["json"] == json.loads(sample["json"])


def test_hugging_face_datasets_demands_features_of_mixed_samples(plain, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="same types"):
        load(plain, tmp_path, monkeypatch)
