"""Records, images and output in S3, through the command line: the bytes of a local pack, whatever is killed or fails on the way."""

import importlib.util
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardify.errors import ImageError, PackError
from shardify.images.stores import Location, open_store

_spec = importlib.util.spec_from_file_location("s3", Path(__file__).parent / "s3.py")
s3 = importlib.util.module_from_spec(_spec)
sys.modules["s3"] = s3
_spec.loader.exec_module(s3)

RECORDS = 120
SHARDS = 3  # of about 20 MB, so that they are sent in parts


@pytest.fixture(scope="module")
def server():
    with s3.running_server() as server:
        server.client.create_bucket(Bucket="lab")
        yield server


@pytest.fixture(scope="module")
def source(tmp_path_factory, server):
    """A folder `data` with chat.json and images/, and the same below s3://lab/data."""
    folder = tmp_path_factory.mktemp("s3") / "data"
    (folder / "images" / "coco").mkdir(parents=True)
    random = np.random.default_rng(0)
    names = []
    for number in range(10):
        buffer = io.BytesIO()
        pixels = random.integers(0, 256, (800, 1000, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
        names.append(f"coco/photo {number} ü#.jpg")
        (folder / "images" / names[-1]).write_bytes(buffer.getvalue())
    (folder / "images" / "cut.jpg").write_bytes(buffer.getvalue()[:-100_000])
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    paths = [names[number % len(names)] for number in range(RECORDS)]
    # found by its end, by its stem; damaged; nowhere
    paths[3], paths[4], paths[5], paths[6] = (
        "train/coco/photo 1 ü#.jpg",
        "coco/photo 2 ü#.png",
        "cut.jpg",
        "no.jpg",
    )
    records = [{"id": number, "image": path, "conversations": turns} for number, path in enumerate(paths)]
    (folder / "chat.json").write_text(json.dumps(records))
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"data/{path.relative_to(folder)}"
            server.client.put_object(Bucket="lab", Key=key, Body=path.read_bytes())
    for name in ("a.tar", "a.zip"):
        server.client.put_object(Bucket="lab", Key=f"data/{name}", Body=b"none" * 1000)
    return folder


def command(records, images, out, *more):
    parts = [sys.executable, "-m", "shardify.cli", "pack", records, "--images", images, "--out", out]
    return [str(part) for part in (*parts, "--shards", SHARDS, "--max-bad", "5", *more)]


def environment(server, temporary, **more):
    return {**os.environ, **server.environment, "TMPDIR": str(temporary), **more}


def run(parts, env, **more):
    return subprocess.run(parts, env=env, capture_output=True, text=True, timeout=300, check=False, **more)


@pytest.fixture(scope="module")
def expected(source, server, tmp_path_factory):
    """What a local pack writes: name -> bytes."""
    out = tmp_path_factory.mktemp("local") / "out"
    done = run(command(source / "chat.json", source / "images", out, "--workers", 2), {**os.environ})
    assert done.returncode == 0, done.stderr
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(files) == 2 * SHARDS + 3
    assert all(len(content) > 16 * 2**20 for name, content in files.items() if name.endswith(".tar"))
    assert len(files["quarantine.jsonl"].splitlines()) == 2
    return files


@pytest.fixture
def temporary(tmp_path):
    """The folder for temporary files of the commands."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


def remote(out, *more):
    return command("s3://lab/data/chat.json", "s3://lab/data/images", out, *more)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_of_it_in_s3_gives_the_bytes_of_a_local_pack(server, expected, temporary, workers):
    out = f"s3://lab/out{workers}/set/"
    done = run(remote(out, "--workers", workers), environment(server, temporary))
    assert done.returncode == 0, done.stderr
    assert server.objects("lab", f"out{workers}/set/") == expected
    assert server.uploads("lab") == []
    assert os.listdir(temporary) == []
    again = run(remote(out), environment(server, temporary))
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert os.listdir(temporary) == []
    other = run(remote(out, "--seed", 1), environment(server, temporary))
    assert other.returncode == 2
    assert "seed was 0, is now 1" in other.stderr
    assert server.objects("lab", f"out{workers}/set/") == expected


def test_images_in_s3_and_output_here(server, expected, temporary, tmp_path):
    done = run(remote(tmp_path / "out", "--workers", 1), environment(server, temporary))
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_zip_in_s3_gives_the_bytes_of_the_same_zip_here(source, server, temporary, tmp_path, scheme):
    here = tmp_path / "images.zip"
    with zipfile.ZipFile(here, "w") as archive:
        for number, path in enumerate(sorted((source / "images").rglob("*.jpg"))):
            kind = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.write(path, path.relative_to(source), kind)
        archive.writestr("images/" + "long" * 200 + ".jpg", path.read_bytes())
    server.client.put_object(Bucket="lab", Key="zips/images.zip", Body=here.read_bytes(), ACL="public-read")
    url = "s3://lab" if scheme == "s3" else f"{server.url}/lab"
    outs = [tmp_path / "one", tmp_path / "two"]
    for images, out in zip((here, f"{url}/zips/images.zip"), outs, strict=True):
        done = run(command(source / "chat.json", images, out), environment(server, temporary))
        assert done.returncode == 0, done.stderr
    one, two = ({path.name: path.read_bytes() for path in out.iterdir()} for out in outs)
    assert one == two
    assert len(one) == 2 * SHARDS + 3


def kill_group(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_again_and_again_and_continued(server, expected, temporary):
    """At each kill all that can be seen is complete, and in the end nothing else is left."""
    out, prefix = "s3://lab/killed", "killed/"
    env = environment(server, temporary)

    def sidecars():
        return sum(name.endswith(".parquet") for name in server.keys("lab", prefix))

    moments = [
        lambda: server.uploads("lab"),  # within the first shard
        lambda: sidecars() >= 1,
        lambda: sidecars() >= 2 and server.uploads("lab"),
        lambda: sidecars() >= SHARDS,
    ]
    killed_inside = 0
    for moment in moments:
        process = subprocess.Popen(
            remote(out, "--workers", 2),
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not moment() and process.poll() is None:
            time.sleep(0.005)
        kill_group(process)
        seen = server.objects("lab", prefix)
        plan = seen.pop(".packing/plan.json", None)
        assert seen == {name: expected[name] for name in seen}
        killed_inside += plan is not None
    assert killed_inside >= 3
    done = run(remote(out, "--workers", 2), env)
    assert done.returncode == 0, done.stderr
    assert server.objects("lab", prefix) == expected
    assert server.uploads("lab") == []
    assert os.listdir(temporary) == []


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_nothing_unfinished_is_left(server, expected, temporary, sign):
    prefix = f"interrupted{sign}/"
    process = subprocess.Popen(
        remote(f"s3://lab/{prefix}", "--workers", 2),
        env=environment(server, temporary),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not server.uploads("lab") and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, sign)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + sign
    assert "Traceback" not in told
    seen = server.objects("lab", prefix)
    assert seen.pop(".packing/plan.json")
    assert seen == {name: expected[name] for name in seen}
    assert server.uploads("lab") == []
    assert os.listdir(temporary) == []


def test_other_settings_are_refused_while_it_is_unfinished(server, expected, temporary):
    out = "s3://lab/begun"
    with s3.faulty_proxy(server) as proxy:
        proxy.fault = lambda method, path: 500 if method == "POST" and "uploadId" in path else 0
        failed = run(remote(out), environment(proxy.server, temporary))
    assert failed.returncode == 1
    assert server.keys("lab", "begun/") == [".packing/plan.json"]
    other = run(remote(out, "--seed", 1), environment(server, temporary))
    assert other.returncode == 2
    assert "seed was 0, is now 1" in other.stderr
    assert server.keys("lab", "begun/") == [".packing/plan.json"]


def test_a_set_in_s3_is_added_to_and_other_commands_leave_that_alone(source, server, temporary, tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    more = tmp_path / "more.json"
    more.write_text(
        json.dumps(
            [{"id": n, "image": f"coco/photo {n % 10} ü#.jpg", "conversations": turns} for n in range(9)]
        )
    )
    env = environment(server, temporary)
    trees = []
    for out in (tmp_path / "set", "s3://lab/grown/set"):
        images = "s3://lab/data/images" if "://" in str(out) else source / "images"
        base = command(source / "chat.json", images, out)
        add = command(more, images, out, "--append", "--read-order", "--workers", 2)
        assert run(base, env).returncode == 0
        if "://" in str(out):
            # begun, and ended after its plan was written
            process = subprocess.Popen(
                add, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )
            while ".packing/plan.json" not in server.keys("lab", "grown/set/"):
                assert process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert "adding records to it was begun" in run(base, env).stdout
        done = run(add, env)
        assert done.returncode == 0, done.stderr
        trees.append(
            server.objects("lab", "grown/set/")
            if "://" in str(out)
            else {path.name: path.read_bytes() for path in out.iterdir()}
        )
    assert trees[0] == trees[1]
    assert len(trees[0]) == 2 * 2 * SHARDS + 3
    assert not any(temporary.iterdir())


@pytest.mark.parametrize("fault", [500, s3.CUT])
def test_an_upload_that_fails_half_way(server, expected, temporary, fault):
    """Nothing of it stands under a final name, no part is left behind, the message is one line, and a later run continues."""
    out, prefix = f"s3://lab/fails{fault}", f"fails{fault}/"
    with s3.faulty_proxy(server) as proxy:
        proxy.fault = lambda _method, path: fault if "/002.tar" in path and "partNumber=2" in path else 0
        failed = run(remote(out, "--workers", 1), environment(proxy.server, temporary))
    assert failed.returncode == 1
    message = failed.stderr.strip().splitlines()[-1]
    assert f"{out}/002.tar" in message
    assert "the same command again continues" in message
    assert "Traceback" not in failed.stderr
    assert "never-to-be-shown" not in failed.stderr
    seen = server.objects("lab", prefix)
    assert "002.tar" not in seen
    assert "manifest.json" not in seen
    assert seen == {
        **{name: expected[name] for name in seen if "/" not in name},
        ".packing/plan.json": seen[".packing/plan.json"],
    }
    assert len(seen) > 3
    assert server.uploads("lab") == []
    assert os.listdir(temporary) == []
    done = run(remote(out, "--workers", 2), environment(server, temporary))
    assert done.returncode == 0, done.stderr
    assert f"of {SHARDS} shards are finished already" in done.stderr
    assert server.objects("lab", prefix) == expected


def test_an_outage_of_the_images_costs_no_record(server, expected, temporary):
    out = "s3://lab/outage"
    with s3.faulty_proxy(server) as proxy:
        proxy.fault = lambda method, path: 503 if method == "GET" and "photo%207" in path else 0
        failed = run(remote(out), environment(proxy.server, temporary))
    assert failed.returncode == 1
    assert "images/coco/photo 7" in failed.stderr
    assert "503" in failed.stderr
    assert "manifest.json" not in server.keys("lab", "outage/")
    assert run(remote(out), environment(server, temporary)).returncode == 0
    assert server.objects("lab", "outage/") == expected


def test_an_image_that_has_gone_since_it_was_listed(server, expected, temporary):
    with s3.faulty_proxy(server) as proxy:
        proxy.body = b"<Error><Code>NoSuchKey</Code></Error>"
        proxy.fault = lambda method, path: 404 if method == "GET" and "photo%207" in path else 0
        failed = run(remote("s3://lab/gone"), environment(proxy.server, temporary))
    assert failed.returncode == 1
    assert "photo 7 ü#.jpg: has gone since it was listed" in failed.stderr


def test_a_zip_that_changes_while_it_is_packed_costs_no_record(server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)

    def put(names):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for name in names:
                archive.writestr(name, name * 9)
        server.client.put_object(Bucket="lab", Key="changes.zip", Body=content.getvalue())

    put(["a.jpg", "b.jpg"])
    store = open_store("s3://lab/changes.zip")
    located = [Location(*row[:5]) for row in store.find(["a.jpg", "b.jpg"]).tolist()]
    reader = pickle.loads(pickle.dumps(store.reader))
    assert [reader.read("", place) for place in located] == [b"a.jpg" * 9, b"b.jpg" * 9]
    with pytest.raises(ImageError, match="image-damaged: its checksum"):
        reader.read("", located[0]._replace(crc=1))
    put(["b.jpg", "a.jpg"])
    with pytest.raises(PackError, match=r"s3://lab/changes\.zip: has changed since packing began"):
        reader.read("", located[0])


@pytest.mark.parametrize(
    ("records", "images", "out", "message"),
    [
        (
            "s3://none-such/chat.json",
            "s3://lab/data/images",
            "s3://lab/x",
            "s3://none-such/chat.json: there is no such bucket",
        ),
        ("s3://lab/none.json", "s3://lab/data/images", "s3://lab/x", "s3://lab/none.json: no such object"),
        (
            "s3://lab/data/chat.json",
            "s3://none-such/images",
            "s3://lab/x",
            "s3://none-such/images: there is no such bucket",
        ),
        ("s3://lab/data/chat.json", "s3://lab/x.zip", "s3://lab/x", "s3://lab/x.zip: no images there"),
        ("s3://lab/data/chat.json", "s3://lab/data/a.tar", "s3://lab/x", "only zips can be read in place"),
        ("s3://lab/data/chat.json", "s3://lab/data/a.zip", "s3://lab/x", "not a readable zip archive"),
        (
            "s3://lab/data/chat.json",
            "s3://lab/data/imags",
            "s3://lab/x",
            "s3://lab/data/imags: no images there",
        ),
        (
            "s3://lab/data/chat.json",
            "s3://lab/data/images",
            "s3://none-such/x",
            "s3://none-such/x.*: there is no such bucket",
        ),
        ("s3://lab/data/chat.json", "s3://lab/data/images", "https://lab/x", "can be read, not written"),
        (
            "s3://lab/data/chat.json",
            "s3://lab/data/images",
            "s3://lab/data",
            "not empty .a.tar, a.zip, chat.json",
        ),
    ],
)
def test_wrong_places(source, server, temporary, records, images, out, message):
    failed = run(command(records, images, out), environment(server, temporary))
    assert failed.returncode in (1, 2)
    assert "Traceback" not in failed.stderr

    assert re.search(message, failed.stderr), failed.stderr
    assert server.keys("lab", "x/") == []
    assert os.listdir(temporary) == []


def test_wrong_credentials(source, server, temporary):
    with s3.faulty_proxy(server) as proxy:
        proxy.body = (
            b"<Error><Code>SignatureDoesNotMatch</Code><StringToSign>never-to-be-shown</StringToSign></Error>"
        )
        proxy.fault = lambda _method, _path: 403
        failed = run(remote("s3://lab/denied"), environment(proxy.server, temporary))
    assert failed.returncode == 1
    assert "access is denied (403 SignatureDoesNotMatch); check the credentials" in failed.stderr
    assert "never-to-be-shown" not in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_the_server_dies_while_packing(source, expected, tmp_path, temporary):
    """With it goes all that it held, so only the end of the run can be judged: soon, and with one clear line."""
    with s3.running_server() as mortal:
        mortal.client.create_bucket(Bucket="lab")
        process = subprocess.Popen(
            command(source / "chat.json", source / "images", "s3://lab/out", "--workers", "2"),
            env=environment(mortal, temporary),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not mortal.uploads("lab") and process.poll() is None:
            time.sleep(0.005)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "cannot be reached" in told
    assert "Traceback" not in told
    assert os.listdir(temporary) == []
