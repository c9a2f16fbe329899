"""The command line as batch systems and shells treat it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

SHARDIFY = [sys.executable, "-m", "shardify.cli"]
RECORDS, IMAGES = 600, 8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What takes about a second to pack, into 60 shards."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        buffer = io.BytesIO()
        pixels = random.integers(0, 256, (700, 900, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        (folder / "images" / f"{number}.jpg").write_bytes(buffer.getvalue())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    records = [{"id": n, "image": f"{n % IMAGES}.jpg", "conversations": turns} for n in range(RECORDS)]
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


def pack(source, out, images="images"):
    command = ["pack", source / "chat.json", "--images", source / images, "--out", out]
    return [*SHARDIFY, *(str(part) for part in (*command, "--shards", 60, "--workers", 2))]


def children(process):
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return file.read().split()


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_sigterm_ends_a_pack_cleanly(source, tmp_path, send):
    out = tmp_path / "out"
    process = subprocess.Popen(
        pack(source, out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(out.glob("*.parquet")):
        assert process.poll() is None
        time.sleep(0.001)
    workers = children(process)
    send(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 143
    assert error.endswith(
        "\nfinished shards stay; the same command again continues\n\nshardify: terminated\n"
    )
    assert "Traceback" not in error
    assert len(workers) == 2
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    subprocess.run(pack(source, out), check=True, capture_output=True)
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*.parquet")}.items()


def test_sigterm_ends_a_verification_cleanly(source, tmp_path):
    subprocess.run(pack(source, tmp_path / "out"), check=True, capture_output=True)
    process = subprocess.Popen(
        [*SHARDIFY, "verify", str(tmp_path / "out"), "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not children(process):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (143, "\nshardify: terminated\n")


SENT_AT_A_FORK = """
import os, signal, sys, threading

def send():
    if next(forks) == number:
        os.kill(os.getpid(), signal.SIGTERM)

number, forks = int(sys.argv[1]), iter(range(1, 100))
from shardify.cli import main
os.register_at_fork(after_in_parent=send)
threading.Thread(target=threading.Event().wait, daemon=True).start()
sys.argv[1:] = sys.argv[2:]
main()
"""


@pytest.mark.parametrize("fork", [1, 2])
def test_sigterm_in_the_moment_of_a_fork_leaves_no_worker_to_wait_for(source, tmp_path, fork):
    """Where other threads take the signal, blocking it in the main one does not put it off."""
    packed = tmp_path / "packed"
    subprocess.run(pack(source, packed), check=True, capture_output=True)
    for command in (pack(source, tmp_path / "out")[3:], ["verify", str(packed), "--workers", "2"]):
        done = subprocess.run(
            [sys.executable, "-c", SENT_AT_A_FORK, str(fork), *command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr[-22:]) == (143, "\nshardify: terminated\n"), done.stderr


def test_closed_streams_are_no_fault_and_no_file_takes_their_place(source, tmp_path):
    for closed in ("2>&-", "0<&- 1>&- 2>&-"):
        out = tmp_path / "out"
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", *pack(source, out)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        assert "reading records" not in done.stdout  # progress does not go where results go
        command = [*SHARDIFY, "verify", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run(["rm", "-r", str(out)], check=True)


def test_help_says_the_defaults():
    for command in ("pack", "verify"):
        done = subprocess.run([*SHARDIFY, command, "--help"], capture_output=True, text=True, check=True)
        assert "[default: (cores); x>=1]" in " ".join(done.stdout.split())


def test_an_archive_without_any_of_the_images_shows_what_it_holds(source, tmp_path):
    with zipfile.ZipFile(source / "x.zip", "w") as archive:
        archive.writestr("train2017/000.jpg", b"x")
        archive.writestr("train2017/001.jpg", b"x")
    done = subprocess.run(
        pack(source, tmp_path / "out", "x.zip"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "x.zip (holds train2017/000.jpg, train2017/001.jpg, ...)" in done.stderr
