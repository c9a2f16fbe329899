"""A Ray cluster makes the very bytes that this machine's processes make, whatever happens to its nodes and to who started it."""

import importlib.util
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from shardify.demo import make_demo
from shardify.engines import ray as ray_engine
from shardify.errors import PackError

_spec = importlib.util.spec_from_file_location("s3", Path(__file__).parent / "s3.py")
s3 = importlib.util.module_from_spec(_spec)
sys.modules["s3"] = s3
_spec.loader.exec_module(s3)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed; pip install 'shardify[ray]'"
)

ON_RAY = Path(__file__).with_name("on_ray.py")
SHARDS = 8
SAMPLES = 120
PATIENCE = 120


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The demo set, and `local`: what the local engine makes of it."""
    folder = tmp_path_factory.mktemp("ray")
    make_demo(folder / "demo", samples=SAMPLES, seed=0)
    finish(start_pack(folder, folder / "local", "--workers", 2))
    return folder


@dataclass
class Cluster:
    """Nodes on this machine, each a process group of its own."""

    folder: Path
    address: str
    environment: dict[str, str]
    nodes: dict[str, subprocess.Popen]

    def start(self, name, *options, **environment):
        self.nodes[name] = subprocess.Popen(
            [
                *(Path(sys.executable).with_name("ray"), "start", "--block", "--disable-usage-stats"),
                *(
                    "--num-cpus=1",
                    "--object-store-memory=80000000",
                    "--min-worker-port=0",
                    "--max-worker-port=0",
                ),
                *("--dashboard-agent-listen-port=0", *options),
            ],
            env=self.environment | {"NODE": name} | environment,
            stdout=(self.folder / f"{name}.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def join(self, name, **environment):
        self.start(name, f"--address={self.address}", **environment)
        wait_until(lambda: "Ray runtime started" in (self.folder / f"{name}.log").read_text(), self.log)

    def kill(self, name):
        node = self.nodes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)
        node.wait()

    def log(self):
        return "\n".join(path.read_text() for path in self.folder.glob("*.log"))

    def marks(self):
        """(node, shard, word) of what tasks noted down, in their order."""
        names = [path.name.split(" ") for path in self.folder.glob("* *")]
        return [tuple(name[:3]) for name in sorted(names, key=lambda name: name[3])]

    def forget(self):
        for path in (*self.folder.glob("* *"), *self.folder.glob("died")):
            path.unlink()


@contextmanager
def running_head():
    """A cluster of one node, with a short path: sockets lie below it."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(
        os.environ, ON_RAY=str(folder), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)
    )
    environment.pop("RAY_ADDRESS", None)
    cluster = Cluster(folder, f"127.0.0.1:{port}", environment, {})
    try:
        cluster.start(
            "head",
            "--head",
            f"--port={port}",
            "--node-ip-address=127.0.0.1",
            "--include-dashboard=false",
            f"--temp-dir={folder / 'ray'}",
        )
        wait_until(lambda: "Ray runtime started" in (folder / "head.log").read_text(), cluster.log)
        yield cluster
    finally:
        for name in list(cluster.nodes):
            cluster.kill(name)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def head():
    with running_head() as cluster:
        yield cluster


@pytest.fixture
def cluster(head):
    head.forget()
    yield head
    for name in set(head.nodes) - {"head"}:
        head.kill(name)


def wait_until(condition, what=lambda: ""):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def start_pack(source, out, *options, function="slow", environment=None):
    command = [sys.executable, ON_RAY, function, "pack", source / "demo" / "chat.json"]
    command += [
        "--images",
        source / "demo" / "images.zip",
        "--out",
        out,
        "--shards",
        SHARDS,
        "--max-bad",
        "5%",
    ]
    return subprocess.Popen(
        [str(part) for part in (*command, *options)],
        env=environment or dict(os.environ, ON_RAY=str(source)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, status=0):
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, out + error
    return out + error


def pack_on(cluster, source, out, *options, status=0, **more):
    ray = ("--engine", "ray", "--ray-address", cluster.address)
    return finish(start_pack(source, out, *ray, *options, environment=cluster.environment, **more), status)


def content(folder):
    """Everything in it but the work folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_two_nodes_make_what_local_processes_make(cluster, source, tmp_path):
    cluster.join("second")

    said = pack_on(cluster, source, tmp_path / "out")

    assert content(tmp_path / "out") == content(source / "local")
    assert {node for node, _, _ in cluster.marks()} == {"head", "second"}
    assert f"packing: {SAMPLES} of {SAMPLES}" in said


def test_a_node_killed_in_mid_run_changes_nothing(cluster, source, tmp_path):
    cluster.join("second", PAUSE="600")
    ray = ("--engine", "ray", "--ray-address", cluster.address)
    process = start_pack(source, tmp_path / "out", *ray, environment=cluster.environment)

    def works():
        return any(node == "second" and word == "begun" for node, _, word in cluster.marks())

    wait_until(works, cluster.log)
    cluster.kill("second")
    said = finish(process)

    assert content(tmp_path / "out") == content(source / "local")
    assert "it is made again" in said
    assert f"packing: {SAMPLES} of {SAMPLES}" in said
    assert not list((tmp_path / "out").glob("*.draft"))


def test_a_killed_worker_costs_its_shard_only(cluster, source, tmp_path):
    said = pack_on(cluster, source, tmp_path / "out", function="dies_once")

    assert "003.tar: its worker was killed; it is made again" in said
    assert content(tmp_path / "out") == content(source / "local")
    assert f"packing: {SAMPLES} of {SAMPLES}" in said


def test_a_shard_that_kills_every_worker_ends_the_run(cluster, source, tmp_path):
    said = pack_on(cluster, source, tmp_path / "out", "--workers", 1, function="dies", status=1)

    assert "were killed 3 times (out of memory?)" in said


def test_what_a_shard_raises_ends_the_run_with_its_own_message(cluster, source, tmp_path):
    said = pack_on(cluster, source, tmp_path / "out", function="refuses", status=1)

    assert "shardify: error: 000.tar is cursed\n" in said
    assert "Traceback" not in said


def test_a_cluster_that_is_lost_ends_the_run_which_is_continued(source, tmp_path):
    with running_head() as cluster:
        ray = ("--engine", "ray", "--ray-address", cluster.address)
        # a minute by default
        environment = dict(cluster.environment, PAUSE="0.3", RAY_gcs_rpc_server_reconnect_timeout_s="3")
        process = start_pack(source, tmp_path / "out", *ray, environment=environment)
        wait_until(lambda: len(list((tmp_path / "out").glob("*.parquet"))) >= 2, cluster.log)
        cluster.kill("head")
        said = finish(process, 1)

    assert "shardify: error: " in said
    assert "the same command again continues" in said
    assert "Traceback" not in said
    finish(start_pack(source, tmp_path / "out", "--workers", 2))
    assert content(tmp_path / "out") == content(source / "local")


def test_a_leader_that_dies_before_it_has_its_task_is_said_to_be_lost(cluster, monkeypatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)

    def tasks():
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        yield SimpleNamespace(name="000.tar")

    with pytest.raises(PackError, match="the connection with the Ray cluster was lost"):
        list(ray_engine.run_shards(print, None, tasks(), address=cluster.address))


def test_a_node_with_another_library_makes_no_shards(monkeypatch):
    monkeypatch.setattr(ray_engine, "stay", lambda: None)  # this is no worker of a cluster
    shared = ray_engine._Shared(lambda *_: "made", None)
    task = SimpleNamespace(name="000.tar")
    assert ray_engine._make(shared, task, None).result == "made"
    other = replace(shared, versions=shared.versions | {"pillow": "1.0"})
    refused = ray_engine._make(other, task, None).result
    assert isinstance(refused, PackError)
    assert f"pillow {version('pillow')} instead of 1.0; all nodes need the same" in str(refused)


def test_what_a_killed_run_made_on_ray_is_continued_locally(cluster, source, tmp_path):
    cluster.join("second", PAUSE="600")
    ray = ("--engine", "ray", "--ray-address", cluster.address, "--workers", 4)
    process = start_pack(source, tmp_path / "out", *ray, environment=cluster.environment)
    wait_until(lambda: len(list((tmp_path / "out").glob("*.parquet"))) >= 3, cluster.log)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    said = finish(start_pack(source, tmp_path / "out", "--workers", 2))

    assert f" of {SHARDS} shards are finished already" in said
    assert content(tmp_path / "out") == content(source / "local")


def test_a_ray_of_its_own_ends_with_the_command(source, tmp_path):
    """SIGTERM to the whole process group, as schedulers send it."""
    environment = dict(os.environ, ON_RAY=str(tmp_path), PAUSE="0.2", HOME=str(tmp_path / "home"))
    environment.pop("RAY_ADDRESS", None)
    out = tmp_path / "out"
    process = start_pack(source, out, "--engine", "ray", "--workers", 2, environment=environment)
    wait_until(lambda: len(list(out.glob("*.parquet"))) >= 2 or process.poll() is not None)
    os.killpg(process.pid, signal.SIGTERM)

    said = finish(process, 143)

    assert "finished shards stay" in said
    assert "Traceback" not in said
    wait_until(lambda: not with_environment(f"ON_RAY={tmp_path}"))
    assert not (tmp_path / "home" / ".ray").exists()
    finish(start_pack(source, out))
    assert content(out) == content(source / "local")


def test_shards_go_to_an_object_store(source, tmp_path):
    with s3.running_server() as server:
        server.client.create_bucket(Bucket="lab")
        environment = os.environ | server.environment | {"ON_RAY": str(tmp_path), "HOME": str(tmp_path)}
        environment.pop("RAY_ADDRESS", None)
        out = "s3://lab/set"
        finish(start_pack(source, out, "--engine", "ray", "--workers", 2, environment=environment))
        made, unfinished = server.objects("lab", "set/"), server.uploads("lab")

    assert made == content(source / "local")
    assert not unfinished


def with_environment(entry):
    """Processes that were started with it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if entry.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
    return found


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        ("127.0.0.1:1", 1, "127.0.0.1:1: no Ray cluster answers there"),
        ("somewhere", 2, "somewhere: host:port of the cluster's head is needed"),
        ("ray://somewhere:10001", 2, "host:port of the cluster's head is needed"),
    ],
)
def test_an_address_without_cluster_is_one_message(source, tmp_path, address, status, message):
    said = finish(start_pack(source, tmp_path / "out", "--engine", "ray", "--ray-address", address), status)

    assert message in said
    assert "Traceback" not in said


def test_without_ray_the_extra_is_named(source, tmp_path):
    script = "import sys; sys.modules['ray'] = None; from shardify import cli; cli.main()"
    command = [sys.executable, "-c", script, "pack", source / "demo" / "chat.json", "--engine", "ray"]
    command += ["--images", source / "demo" / "images.zip", "--out", tmp_path / "out", "--max-bad", "5%"]
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)

    assert done.returncode == 2
    assert "pip install 'shardify[ray]'" in done.stderr
