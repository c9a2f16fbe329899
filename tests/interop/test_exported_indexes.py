"""Our exported indexes in the hands of the loaders they are for, in .venv-interop (`make interop`)."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from shardify.indexing import index_shards

PYTHON = Path(__file__).parents[2] / ".venv-interop" / "bin" / "python"


@pytest.fixture
def python():
    if not PYTHON.exists():
        pytest.skip("no .venv-interop; `make interop` makes it")
    return PYTHON


@pytest.fixture
def folder(plain, tmp_path):
    return Path(shutil.copytree(plain.folder, tmp_path / "data"))


def test_energon_reads_shards_through_the_exported_index(plain, folder, tmp_path, python):
    index_shards(folder, format="energon", say=lambda _: None)
    expected = {
        key: {field: hashlib.sha256(content).hexdigest() for field, content in fields.items()}
        for key, fields in plain.samples.items()
    }
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    (tmp_path / "copy").mkdir()
    for shard in plain.shards:
        shutil.copy(shard, tmp_path / "copy")
    script = Path(__file__).parent / "energon" / "check.py"
    result = subprocess.run(
        [python, script, folder, tmp_path / "expected.json", tmp_path / "copy"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_dalis_own_tool_writes_the_same_index(folder, python, tmp_path):
    found = subprocess.run(
        [
            python,
            "-c",
            "import sysconfig; print(sysconfig.get_path('scripts'), sysconfig.get_path('purelib'))",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    scripts = [
        path
        for place in found
        for path in (Path(place, "wds2idx"), Path(place, "wds2idx.py"))
        if path.exists()
    ]
    if not scripts:
        pytest.skip("no wds2idx in .venv-interop: NVIDIA DALI could not be installed")
    for index in map(Path, index_shards(folder, format="dali", say=lambda _: None)):
        subprocess.run(
            [python, scripts[-1], index.with_suffix(".tar"), tmp_path / "theirs.idx"],
            check=True,
            capture_output=True,
        )
        assert index.read_bytes() == (tmp_path / "theirs.idx").read_bytes()
