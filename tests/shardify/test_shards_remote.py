"""Data sets behind URLs: opened as local ones are, by the same rules, and by a child process alone."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from shardify.errors import FormatError, PackError, ShardifyError, UsageError
from shardify.format import copies
from shardify.format.copies import local_copies, local_copy
from shardify.format.hashing import hash_file
from shardify.format.index import INDEX_DTYPE, write_index
from shardify.format.manifest import Counts, Manifest, Shard, encode_manifest
from shardify.format.shards import local_sidecars, open_shards, select_shards
from shardify.format.sidecar import read_sidecar


def _load(name):
    """A module beside this one; tests are no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


s3, web, test_shards = _load("s3"), _load("web"), _load("test_shards")
make_set, make_tar = test_shards.make_set, test_shards.make_tar

SECRET = "hf_never-to-be-shown"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, and no user's token."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "shardify" / "remote"


@pytest.fixture
def finished(tmp_path):
    return make_set(tmp_path / "root" / "a set")


@pytest.fixture
def site(finished):
    """A small server over the set in ``/sets/one``."""
    with web.running_site(web.Site(files=web.files_below(finished, "/sets/one"))) as site:
        yield site


@pytest.fixture(scope="module")
def server():
    with s3.running_server() as server:
        yield server


@pytest.fixture
def bucket(server, monkeypatch):
    """An empty bucket's URL; all clients of this process talk to the server."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{time.monotonic_ns()}"
    server.client.create_bucket(Bucket=name)
    return f"s3://{name}"


def upload(server, folder, url):
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for path, content in web.files_below(folder, prefix).items():
        server.client.put_object(Bucket=bucket, Key=path.strip("/"), Body=content)


def opened_quietly(shards):
    return open_shards(shards, say=lambda _: None)


def same(one, other):
    assert one.fingerprint == other.fingerprint
    assert one.index.tobytes() == other.index.tobytes()
    assert one.starts.tolist() == other.starts.tolist()


@pytest.mark.parametrize("settings", ["", "max_ranges 0;"], ids=["ranges", "no ranges"])
def test_a_set_behind_nginx(finished, tmp_path, settings):
    local = opened_quietly(finished)
    with web.running_nginx(finished.parent, tmp_path / "nginx", settings) as address:
        url = f"{address}/a%20set"
        for shards in (
            url,
            f"{url}/",
            f"{address}/a set/manifest.json",
            f"{url}/{{000..999}}.tar",
            [f"{url}/{{000..001}}.tar", f"{url}/002.tar", f"{url}/003.tar"],
        ):
            remote = opened_quietly(shards)
            same(remote, local)
        assert isinstance(opened_quietly(url).index, np.memmap)
        assert [shard.path for shard in remote.shards] == [f"{url}/{n:03d}.tar" for n in range(4)]
        assert [shard.sidecar for shard in remote.shards] == [f"{url}/{n:03d}.parquet" for n in range(4)]
        for path, shard in zip(local_sidecars(remote.shards), local.shards, strict=True):
            assert read_sidecar(path).equals(read_sidecar(shard.sidecar))
        with pytest.raises(FormatError, match=r"no manifest.json there, and it cannot be listed"):
            opened_quietly(address)


def test_a_set_in_s3(finished, bucket, server):
    upload(server, finished, f"{bucket}/deep/set")
    local = opened_quietly(finished)
    url = f"{bucket}/deep/set"
    for shards in (url, f"{url}/manifest.json", f"{url}/{{000..999}}.tar", url.replace("s3:", "s3a:")):
        same(opened_quietly(shards), local)
    part = opened_quietly([f"{url}/003.tar", f"{url}/001.tar"])
    same(part, opened_quietly([finished / "003.tar", finished / "001.tar"]))
    upload(server, finished, bucket)
    same(opened_quietly(bucket), local)


@pytest.mark.parametrize(
    "pattern",
    [
        "{}/{{000..002}}.tar",
        "{}/{{004..009}}.tar",
        "{}/004.tar",
        "{}/{{0..9}}.tar",
        "{}/{{a,b}}.tar",
        "{}/{{000..003.tar",
        "{}/{{0..999999999}}.tar",
        "{}/nowhere",
        "{}/nowhere/manifest.json",
    ],
)
def test_the_rules_are_those_of_local_sets(site, finished, pattern):
    results = []
    for place in (str(finished), f"{site.url}/sets/one"):
        try:
            results.append(opened_quietly(pattern.format(place)).fingerprint)
        except ShardifyError as error:
            results.append(type(error))
    assert results[0] == results[1]


def test_what_is_named_twice(site, finished):
    url = f"{site.url}/sets/one"
    for shards in (
        [url, f"{url}/002.tar"],
        [f"{url}/manifest.json", f"{url}/"],
        [f"{url}/002.tar", f"{site.url}/s%65ts/one/002.tar"],
    ):
        with pytest.raises(UsageError, match=r"002\.tar is named twice|000\.tar is named twice"):
            opened_quietly(shards)


def test_local_and_remote_in_one_list(site, finished, tmp_path):
    other = make_set(tmp_path / "other", (1, 1), first=50)
    make_tar(tmp_path / "x.tar")
    mixed = opened_quietly(
        [tmp_path / "x.tar", f"{site.url}/sets/one/{{000..001}}.tar", other, f"{site.url}/sets/one/003.tar"]
    )
    assert mixed.starts.tolist() == [0, 3, 5, 8, 9, 10, 15]
    same(
        mixed,
        opened_quietly(
            [tmp_path / "x.tar", finished / "000.tar", finished / "001.tar", other, finished / "003.tar"]
        ),
    )


def test_names_mean_the_same_everywhere(tmp_path):
    folder = make_set(tmp_path / "set", (2, 1))
    names = {"000": "a b%20", "001": "ü#"}
    content = (folder / "manifest.json").read_text()
    for old, new in names.items():
        content = content.replace(f'"{old}.', f'"{new}.')
        for ending in ("tar", "parquet"):
            (folder / f"{old}.{ending}").rename(folder / f"{new}.{ending}")
    (folder / "manifest.json").write_text(content)
    local = opened_quietly(folder)
    with web.running_nginx(folder, tmp_path / "nginx") as address:
        remote = opened_quietly(address)
        same(remote, local)
        assert [shard.path for shard in remote.shards] == [
            f"{address}/a%20b%2520.tar",
            f"{address}/%C3%BC%23.tar",
        ]
        same(opened_quietly([shard.path for shard in remote.shards]), local)
        assert len(local_sidecars(remote.shards)) == 2


# --- the index in the cache


def test_the_index_is_fetched_once_and_then_mapped(site, cache):
    url = f"{site.url}/sets/one"
    opened_quietly(url)
    assert sorted(site.paths()) == ["index.npy", "manifest.json"]
    (kept,) = cache.glob("*/index.npy")
    assert kept.parent.name == hash_file(kept)
    assert os.listdir(kept.parent) == ["index.npy"]
    site.requests.clear()
    again = opened_quietly(f"{url}/001.tar")
    assert site.paths() == ["manifest.json"]
    assert again.index.base is not None
    assert Path(again.index.filename) == kept


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign"])
def test_a_damaged_copy_is_fetched_again(site, cache, finished, damage):
    opened_quietly(f"{site.url}/sets/one")
    (kept,) = cache.glob("*/index.npy")
    content = kept.read_bytes()
    kept.write_bytes(
        {
            "cut": content[:-24],
            "changed": content[:-1] + b"\x07",
            "empty": b"",
            "foreign": b"x" * len(content),
        }[damage]
    )
    same(opened_quietly(f"{site.url}/sets/one"), opened_quietly(finished))
    assert kept.read_bytes() == content


@pytest.mark.parametrize("times", [1, 2])
def test_an_index_that_is_damaged_on_its_way_is_fetched_again(site, cache, finished, times):
    site.damaged["/sets/one/index.npy"] = times
    same(opened_quietly(f"{site.url}/sets/one"), opened_quietly(finished))
    assert site.paths().count("index.npy") == times + 1
    (kept,) = cache.glob("*/index.npy")
    assert kept.read_bytes() == (finished / "index.npy").read_bytes()


def test_an_index_that_is_not_the_manifests_is_refused(site, cache, finished):
    index = site.files["/sets/one/index.npy"]
    for wrong in (index[:-1] + b"\x01", index[:-24], b"", b"<html>not here</html>"):
        site.files["/sets/one/index.npy"] = wrong
        with pytest.raises(
            FormatError, match=r"/sets/one/index\.npy: not the file that manifest\.json names"
        ):
            opened_quietly(f"{site.url}/sets/one")
        assert not [path for path in cache.rglob("*") if path.is_file()]
    del site.files["/sets/one/index.npy"]
    with pytest.raises(FormatError, match=r"index\.npy: no such file"):
        opened_quietly(f"{site.url}/sets/one")
    for wrong in (b"{", b"<html>", b"\xff"):
        site.files["/sets/one/manifest.json"] = wrong
        with pytest.raises(FormatError, match=r"http://.*/sets/one/manifest\.json: not a readable manifest"):
            opened_quietly(f"{site.url}/sets/one")


def test_an_index_that_has_grown_since_its_manifest_will_do(site, finished, tmp_path):
    longer = make_set(tmp_path / "longer", (2, 3, 4, 5, 6))
    site.files["/sets/one/index.npy"] = (longer / "index.npy").read_bytes()
    same(opened_quietly(f"{site.url}/sets/one"), opened_quietly(finished))
    site.requests.clear()
    same(opened_quietly(f"{site.url}/sets/one"), opened_quietly(finished))
    assert site.paths() == ["manifest.json"]


def large_set(samples=2_000_000):
    """Manifest and index of a set of 48 MB of index, without its shards."""
    rows = np.zeros(samples, INDEX_DTYPE)
    rows["offset"] = np.arange(samples) * 1024
    rows["size"] = 1024
    shards = [Shard("000.tar", "000.parquet", samples, samples * 1024 + 1024, "0" * 32, "0" * 32)]
    return rows, shards


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    rows, shards = large_set()
    with open(folder / "index.npy", "wb") as file:
        write_index(file, [rows])
    counts = Counts(len(rows), len(rows), {}, {})
    manifest = Manifest(1, {}, [], shards, hash_file(folder / "index.npy"), counts)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return folder


@pytest.mark.parametrize("ranges", [True, False])
def test_a_large_index_comes_in_ranges_where_there_are_any(large, cache, ranges, monkeypatch):
    monkeypatch.setattr(copies, "MAX_HASHED_BYTES", 1000)
    with web.running_site(web.Site(files=web.files_below(large), ranges=ranges)) as site:
        for _ in range(2):
            remote = opened_quietly(site.url)
            assert isinstance(remote.index, np.memmap)
            assert len(remote.index) == 2_000_000
        (kept,) = cache.glob("*/index.npy")
        assert kept.read_bytes() == (large / "index.npy").read_bytes()
        asked = [headers.get("range") for _, path, headers in site.requests if path == "/index.npy"]
        assert asked.count(None) == (1 if ranges else 2)
        assert len(asked) == 4 if ranges else len(asked) > 2


def test_a_large_index_is_announced(large, cache, monkeypatch):
    monkeypatch.setattr("shardify.format.shards._SAID_BYTES", 1000)
    said = []
    with web.running_site(web.Site(files=web.files_below(large))) as site:
        open_shards(site.url, say=said.append)
        open_shards(site.url, say=said.append)
    assert said == [f"shardify: fetching {site.url}/index.npy (48 MB); done once"]


OPEN = """
import sys
from shardify.format.shards import open_shards
opened = open_shards(sys.argv[1])
print(opened.fingerprint["samples"], "obstore" in sys.modules, flush=True)
"""


def start(url):
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_in_session(leader):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("victim", ["opener", "helper", "all"])
def test_a_download_that_is_killed_leaves_nothing_that_counts(large, cache, victim):
    files = web.files_below(large)
    with web.running_site(web.Site(files=files, ranges=False, stall_after=30_000_000)) as site:
        process = start(site.url)
        wait_until(lambda: any(path.stat().st_size > 20_000_000 for path in cache.rglob("*.part")))
        session = processes_in_session(process.pid)
        assert len(session) == 2
        if victim == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(process.pid if victim == "opener" else max(session), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert ("ended by SIGKILL" in errors) == (victim == "helper")
        wait_until(lambda: not processes_in_session(process.pid))  # the helper does not outlive its parent
        assert not list(cache.rglob("index.npy"))
        site.go.set()
        out, _ = start(site.url).communicate(timeout=120)
        assert out.split() == ["2000000", "False"]  # and the opener itself never had the client
        (kept,) = cache.rglob("index.npy")
        assert kept.read_bytes() == files["/index.npy"]


def test_what_was_left_by_the_killed_is_removed_later(site, cache, finished):
    folder = cache / hash_file(finished / "index.npy")
    folder.mkdir(parents=True)
    for name, age in (
        ("index.npy.1.tmp.2.part", 7200),
        ("index.npy.3.tmp", 7200),
        ("index.npy.4.tmp.5.part", 5),
    ):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age,) * 2)
    opened_quietly(f"{site.url}/sets/one")
    assert sorted(os.listdir(folder)) == ["index.npy", "index.npy.4.tmp.5.part"]


def test_processes_at_once_fetch_once(large, cache):
    with web.running_site(web.Site(files=web.files_below(large), stall_after=100_000)) as site:
        processes = [start(site.url) for _ in range(4)]
        wait_until(lambda: site.paths().count("manifest.json") == 4 and "index.npy" in site.paths())
        site.go.set()
        assert [process.communicate(timeout=120)[0].split()[0] for process in processes] == ["2000000"] * 4
        whole = [
            path for _, path, headers in site.requests if path == "/index.npy" and "range" not in headers
        ]
        assert len(whole) == 1


def test_a_cache_that_cannot_be_written_is_named(site, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(FormatError, match="XDG_CACHE_HOME"):
        opened_quietly(f"{site.url}/sets/one")


# --- shards made by others


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Tars by somebody else, with their sidecars."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in ("a", "b"):
        make_tar(folder / f"{name}.tar")
    opened_quietly(folder)
    return folder


def test_shards_of_others_with_their_sidecars(foreign, bucket, server, tmp_path):
    local = opened_quietly(foreign)
    upload(server, foreign, f"{bucket}/x")
    for shards in (f"{bucket}/x", f"{bucket}/x/{{a,b}}.tar"):
        remote = opened_quietly(shards)
        same(remote, local)
        assert [shard.sidecar for shard in remote.shards] == [
            f"{bucket}/x/a.parquet",
            f"{bucket}/x/b.parquet",
        ]
    with web.running_nginx(foreign, tmp_path / "nginx") as address:
        same(opened_quietly(f"{address}/{{a,b}}.tar"), local)
        with pytest.raises(FormatError, match=r"2 of 4 shards are missing: .*/c\.tar, .*/d\.tar"):
            opened_quietly(f"{address}/{{a..d}}.tar")
        (foreign / "b.parquet").unlink()
        with pytest.raises(FormatError, match=r"1 of 2 shards have no index.*/b\.tar; run `shardify index`"):
            opened_quietly(f"{address}/{{a,b}}.tar")
    server.client.delete_object(Bucket=bucket.removeprefix("s3://"), Key="x/b.parquet")
    with pytest.raises(FormatError, match=r"1 of 2 shards have no index.*/b\.tar; run `shardify index`"):
        opened_quietly(f"{bucket}/x")
    with pytest.raises(FormatError, match=r"1 of 2 shards are missing: .*/c\.tar"):
        opened_quietly(f"{bucket}/x/{{a,c}}.tar")


def test_a_sidecar_that_belongs_to_another_tar(foreign, tmp_path):
    with web.running_nginx(foreign, tmp_path / "nginx") as address:
        opened_quietly(f"{address}/a.tar")
        with open(foreign / "a.tar", "ab") as file:
            file.write(bytes(512))
        with pytest.raises(
            FormatError, match=r"a\.tar: 10752 bytes, but its index .*a\.parquet belongs to a tar of 10240"
        ):
            opened_quietly(f"{address}/a.tar")
        make_tar(foreign / "a.tar", 7)
        (foreign / "a.parquet").unlink()
        opened_quietly(foreign / "a.tar")
        assert len(opened_quietly(f"{address}/a.tar").index) == 7  # the copy of the old one is not used
        (foreign / "b.parquet").write_bytes(b"PAR1 not")
        with pytest.raises(FormatError, match=r"not a readable sidecar"):
            opened_quietly(f"{address}/b.tar")


def test_unfinished_packing_in_a_bucket(bucket, server, finished):
    upload(server, finished, bucket)
    name = bucket.removeprefix("s3://")
    server.client.delete_object(Bucket=name, Key="manifest.json")
    server.client.put_object(Bucket=name, Key=".packing/plan.json", Body=b"{}")
    for shards in (bucket, f"{bucket}/000.tar"):
        with pytest.raises(FormatError, match="not finished"):
            opened_quietly(shards)
    with pytest.raises(FormatError, match=r"nothing: no shards here"):
        opened_quietly(f"{bucket}/nothing")
    with pytest.raises(PackError, match="no such bucket"):
        opened_quietly("s3://no-such-bucket-here/x")


# --- the Hugging Face hub


@pytest.fixture
def hub(finished, monkeypatch):
    """A hub that wants a token and keeps the files elsewhere; gives both servers."""
    with ExitStack() as stack:
        path = "/datasets/org/name/resolve/main/llava"
        store = stack.enter_context(
            web.running_site(web.Site(files=web.files_below(finished, f"/blobs{path}")))
        )
        hub = stack.enter_context(web.running_site(web.Site(token=SECRET, elsewhere=f"{store.url}/blobs")))
        monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
        yield hub, store


def test_a_set_on_the_hub(hub, finished, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"{SECRET}\n")
    remote = opened_quietly("hf://datasets/org/name/llava/{000..999}.tar")
    same(remote, opened_quietly(finished))
    assert remote.shards[0].path == "hf://datasets/org/name/llava/000.tar"
    assert len(local_sidecars(remote.shards)) == 4
    asked, redirected = hub
    assert {headers.get("authorization") for *_, headers in asked.requests} == {f"Bearer {SECRET}"}
    assert len(redirected.requests) == len(asked.requests) >= 6
    assert not [headers for *_, headers in redirected.requests if "authorization" in headers]


@pytest.mark.parametrize("where", ["HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_token_of_a_login_is_found(hub, finished, monkeypatch, tmp_path, where):
    folder = tmp_path / "home" / ("huggingface" if where == "XDG_CACHE_HOME" else "")
    folder.mkdir(parents=True)
    (folder / "token").write_text(SECRET)
    monkeypatch.setenv(where, str(folder / "token" if where == "HF_TOKEN_PATH" else tmp_path / "home"))
    same(opened_quietly("hf://datasets/org/name/llava"), opened_quietly(finished))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    with pytest.raises(PackError, match="HF_TOKEN"):
        opened_quietly("hf://datasets/org/name/llava")


def test_a_hub_that_refuses_is_told_without_secrets(hub, monkeypatch):
    for token, message in (
        ("", "access is denied .401.*hf auth login"),
        ("hf_never-to-be-shown-2", "access is denied .401.*hf auth login"),
        ("hf_never-to-be-shown\nthis", "has characters that no token has"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PackError, match=message) as raised:
            opened_quietly("hf://datasets/org/name/llava/000.tar")
        assert "never-to-be-shown" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for url, message in (
        ("hf://datasets/org/name/nothing", "no manifest.json there"),
        ("hf://datasets/org/name/nothing/000.tar", r"000\.tar: no such shard"),
        ("hf://datasets/org/name/nothing/manifest.json", "no such manifest"),
    ):
        with pytest.raises(FormatError, match=message):
            opened_quietly(url)


def test_a_revision_is_asked_for(hub, finished, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub[1].files.update(web.files_below(finished, "/blobs/datasets/org/name/resolve/refs/pr/7"))
    remote = opened_quietly("hf://datasets/org/name@refs%2Fpr%2F7")
    same(remote, opened_quietly(finished))
    assert {path for _, path, _ in hub[0].requests} == {
        f"/datasets/org/name/resolve/refs%2Fpr%2F7/{name}" for name in ("manifest.json", "index.npy")
    }


# --- copies of small files


def test_small_files_are_copied_once(site, tmp_path):
    site.files |= {"/sets/list one.txt": b"1", "/sets/other": b"22"}
    (tmp_path / "local").write_bytes(b"333")
    places = [f"{site.url}/sets/list%20one.txt", str(tmp_path / "local"), f"{site.url}/sets/other"]
    paths = local_copies(places)
    assert [Path(path).read_bytes() for path in paths] == [b"1", b"333", b"22"]
    assert [Path(path).name for path in paths] == ["list one.txt", "local", "other"]
    assert local_copies(places) == paths
    assert sorted(site.paths()) == ["list%20one.txt", "other"]
    site.files["/sets/other"] = b"4444"
    assert Path(local_copy(places[2])).read_bytes() == b"4444"
    assert Path(paths[2]).read_bytes() == b"22"
    with pytest.raises(FormatError, match=r"/sets/none: no such file"):
        local_copy(f"{site.url}/sets/none")
    assert local_copies([]) == []


def test_a_server_that_tells_no_version_is_asked_again(site):
    site.tags = False
    site.files["/x"] = b"1"
    first = local_copy(f"{site.url}/x")
    site.files["/x"] = b"2"
    assert Path(local_copy(f"{site.url}/x")).read_bytes() == b"2"
    assert Path(first).read_bytes() == b"1"


def test_a_sidecar_that_is_not_the_manifests(site):
    remote = opened_quietly(f"{site.url}/sets/one")
    site.files["/sets/one/002.parquet"] += b" "
    with pytest.raises(FormatError, match=r"002\.parquet: not the file that manifest\.json names"):
        local_sidecars(remote.shards)


# --- commands


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "shardify.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_info_of_a_remote_set(site, finished):
    local, remote = run("info", finished, "--json"), run("info", f"{site.url}/sets/one", "--json")
    assert (remote.returncode, remote.stdout) == (0, local.stdout)


@pytest.mark.parametrize(
    "command", [["verify"], ["index"], ["reshard", "--out", "out", "--shards", "2"]], ids=lambda c: c[0]
)
def test_commands_that_need_local_shards_say_so(site, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(command[0], f"{site.url}/sets/one", *command[1:])
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert re.search(r"local\s+folder", result.stderr)
    with pytest.raises(UsageError, match="local folder"):
        select_shards(f"{site.url}/sets/one")


def test_signatures_in_urls_are_never_shown(site):
    for pattern in (
        "{}/sets/{{0..1}}.tar?s=never-to-be-shown",
        "{}/{{0..1.tar?s=never-to-be-shown",
        "{}/{{1..9999999}}?s=never-to-be-shown",
    ):
        with pytest.raises(UsageError) as raised:
            opened_quietly(pattern.format(site.url))
        assert "never-to-be-shown" not in str(raised.value)
