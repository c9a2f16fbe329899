"""The demo data set: deterministic, whole or not there, and with everything in it that trips converters."""

import fcntl
import io
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter

import pytest
from PIL import Image

from shardify.demo import make_demo
from shardify.errors import ImageError, UsageError
from shardify.images.probe import probe
from shardify.records import parse_record

SAMPLES = 512
FILES = ["chat.json", "demo.json", "images.zip", "metadata.json"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "made"
    make_demo(folder, samples=SAMPLES, seed=0)
    return folder


@pytest.fixture(scope="module")
def records(demo):
    return json.loads((demo / "chat.json").read_bytes())


@pytest.fixture(scope="module")
def images(demo):
    with zipfile.ZipFile(demo / "images.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def names_of(record):
    image = record.get("image", [])
    return image if isinstance(image, list) else [image]


def test_layout_is_that_of_cc3m(demo, records, images):
    assert sorted(path.name for path in demo.iterdir()) == [
        "chat.json",
        "demo.json",
        "images.zip",
        "metadata.json",
    ]
    metadata = json.loads((demo / "metadata.json").read_bytes())
    assert len(records) == SAMPLES
    assert all("/" not in name and name.startswith("GCC_train_") and name.endswith(".jpg") for name in images)
    assert all({"id", "image", "caption", "url"} <= entry.keys() for entry in metadata)
    without_blip = sum("blip_caption" not in entry for entry in metadata)
    assert 0.05 < without_blip / len(metadata) < 0.15
    assert 20e6 < (demo / "images.zip").stat().st_size < 60e6
    for record in records:
        parsed = parse_record(json.dumps(record).encode())
        placeholders = sum(turn.text.count("<image>") for turn in parsed.turns)
        assert placeholders == len(parsed.images)
        assert [turn.role for turn in parsed.turns] == ["human", "gpt"] * (len(parsed.turns) // 2)
        assert all(turn.text for turn in parsed.turns)


def test_it_carries_what_real_sets_carry(records, images):
    ids = Counter(json.dumps(record["id"]) for record in records)
    assert max(ids.values()) > 1
    assert any(isinstance(record["id"], int) for record in records)
    assert any("image" not in record for record in records)
    lists = [record["image"] for record in records if isinstance(record.get("image"), list)]
    assert {len(names) for names in lists} >= {1, 2}
    first_turns = [record["conversations"][0]["value"] for record in records]
    assert sum(text.endswith("\n<image>") for text in first_turns) > SAMPLES / 3
    assert any(text.startswith("<image>\n") for text in first_turns)
    assert any(data.startswith(b"\x89PNG") for data in images.values())
    modes, sizes = Counter(), Counter()
    for data in images.values():
        with Image.open(io.BytesIO(data)) as image:
            modes[image.mode] += 1
            sizes[image.size] += 1
    assert modes["L"] > 20
    assert modes["RGB"] > SAMPLES / 2
    assert sizes[640, 480] > 20
    assert any(width < height for width, height in sizes)


def test_at_most_four_of_512_must_be_set_aside(records, images):
    bad = Counter()
    for record in records:
        for name in names_of(record):
            if name not in images:
                bad["missing"] += 1
                continue
            try:
                probe(images[name])
            except ImageError as error:
                bad[error.code] += 1
    assert bad == {"missing": 2, "image-truncated": 2}


@pytest.mark.parametrize("samples", [16, 100])
def test_small_demos_have_nothing_to_set_aside(tmp_path, samples):
    make_demo(tmp_path / "small", samples=samples)
    records = json.loads((tmp_path / "small" / "chat.json").read_bytes())
    with zipfile.ZipFile(tmp_path / "small" / "images.zip") as archive:
        for name in {name for record in records for name in names_of(record)}:
            probe(archive.read(name))
    assert len(records) == samples
    assert any("image" not in record for record in records)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_demo(tmp_path / name, samples=20, seed=seed)
    contents = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("a", "b", "c")
    }
    assert contents["a"] == contents["b"]
    assert contents["a"]["images.zip"] != contents["c"]["images.zip"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_second_run_does_nothing(tmp_path, capsys):
    make_demo(tmp_path / "demo", samples=16)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").iterdir()}
    make_demo(tmp_path / "demo", samples=16)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").iterdir()}
    assert "already" in capsys.readouterr().out


def test_other_content_is_refused(tmp_path):
    make_demo(tmp_path / "demo", samples=16)
    with pytest.raises(UsageError, match="'samples': 16"):
        make_demo(tmp_path / "demo", samples=17)
    (tmp_path / "demo" / "images.zip").write_bytes(b"short")
    with pytest.raises(UsageError, match="changed"):
        make_demo(tmp_path / "demo", samples=16)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        make_demo(tmp_path / "own")
    with pytest.raises(UsageError, match="is a file"):
        make_demo(tmp_path / "own" / "thesis.tex")
    assert (tmp_path / "own" / "thesis.tex").read_text() == "x"


def test_a_killed_run_leaves_no_demo_and_the_next_one_succeeds(tmp_path):
    target = tmp_path / "demo"
    code = (
        "import os, signal, shardify.demo as d\n"
        "d._write_json = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"d.make_demo({str(target)!r}, samples=16)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert [path.name for path in target.iterdir()] == [".unfinished"]
    (target / ".unfinished" / "images.zip").rename(
        target / "images.zip"
    )  # as killed while it moves its files
    make_demo(target, samples=16)
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert sorted(path.name for path in target.iterdir()) == FILES


def test_the_folder_one_stands_in_stays_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_demo(".", samples=16)
    assert sorted(os.listdir(".")) == FILES  # by what stands under the process, not by the path
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_two_at_once_do_not_share_a_folder(tmp_path):
    (tmp_path / "demo" / ".unfinished").mkdir(parents=True)
    with open(tmp_path / "demo" / ".unfinished" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another run"):
            make_demo(tmp_path / "demo", samples=16)
    make_demo(tmp_path / "demo", samples=16)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == FILES


def test_a_full_disk_is_one_clear_message(tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from shardify.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"sys.argv = ['shardify', 'demo', {str(tmp_path / 'demo')!r}, '--samples', '16']\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "demo").exists()


def test_without_scikit_image_the_extra_is_named(tmp_path):
    # as on a machine without it: the finder does not know the name
    code = (
        "import sys, importlib.machinery as m\n"
        "find = m.PathFinder.find_spec\n"
        "class Without:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        return None if name == 'skimage' else find(name, path, target)\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if f is not m.PathFinder] + [Without]\n"
        "from shardify.cli import main\n"
        f"sys.argv = ['shardify', 'demo', {str(tmp_path / 'demo')!r}]\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "shardify[demo]" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_command_line_says_what_to_run_next(tmp_path):
    command = [sys.executable, "-m", "shardify.cli", "demo", str(tmp_path / "demo"), "--samples", "16"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "shardify pack" in result.stdout
    assert "16 records" in result.stdout
