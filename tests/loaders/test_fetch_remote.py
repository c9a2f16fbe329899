"""Remote shards: what arrives is what was written, whatever the way there does; and where it cannot be had, that is said in time."""

import importlib.util
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from loaders import StreamingLoader
from loaders.fetch import RemoteFetch
from loaders.fetch.requests import Patience, Requests, WrongBytesError
from shardify.errors import LoaderError, SampleError, UsageError

_spec = importlib.util.spec_from_file_location("fetching", Path(__file__).parent / "fetching.py")
fetching = importlib.util.module_from_spec(_spec)
sys.modules["fetching"] = fetching
_spec.loader.exec_module(fetching)
web, s3, proxies = (
    fetching.load("web", "shardify"),
    fetching.load("s3", "shardify"),
    fetching.load("proxy", "faults"),
)

SAMPLES = 300


def noise(number: int, size: int = 6000) -> bytes:
    return np.random.default_rng(number).bytes(size)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Temporary caches of this test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made) -> Path:
    """300 samples of about 7 kB in 3 shards: ten extents of about 230 kB."""
    samples = [made.Made([noise(i)], made.record(i)) for i in range(SAMPLES)]
    return made.write(tmp_path_factory.mktemp("remote") / "data", samples, shards=3)


@pytest.fixture
def site(folder):
    with web.running_site(web.Site(files=web.files_below(folder, "/data"))) as site:
        yield site


@pytest.fixture
def data(folder, site):
    return fetching.describe(folder, f"{site.url}/data")


@pytest.fixture
def opened(data):
    """Opens what is closed at the end."""
    there: list[RemoteFetch] = []

    def fetch(of=data, **settings) -> RemoteFetch:
        there.append(of.fetch(**settings))
        return there[-1]

    yield fetch
    for remote in there:
        remote.close()


def tars(site) -> list[str]:
    return [path for path in site.paths() if path.endswith(".tar")]


def settled(remote: RemoteFetch) -> dict[str, int]:
    """The counters, once the download process has heard what there is to hear."""
    before = None
    while (now := remote.counters.snapshot()) != before:
        before = now
        time.sleep(0.1)
    return now


def test_every_extent_is_one_request(data, site, opened):
    remote = opened()
    assert data.stream(remote, fetching.shuffled(len(data), 50)) == len(data)
    extents = {
        tuple(extent) for extent in zip(*data.part(slice(None), "shards", "begins", "ends"), strict=True)
    }
    assert len(tars(site)) == len(extents) == 12
    counted = settled(remote)
    assert counted["requests"] == len(site.requests) == 12 + 3  # and the sidecars, once each
    assert counted["bytes_used"] == data.columns["sizes"].sum()
    assert counted["retries"] == 0


def test_a_whole_epoch_is_there_for_the_next_one(data, site, opened):
    remote = opened()
    data.stream(remote, fetching.shuffled(len(data), 50))
    asked = len(site.requests)
    data.stream(remote, fetching.shuffled(len(data), 50, seed=1), first=100)
    assert len(site.requests) == asked


def test_what_was_fetched_stays_counted_when_a_loader_is_closed(site):
    loader = StreamingLoader(f"{site.url}/data", batch_size=10, num_workers=1, shuffle=None)
    for _ in zip(range(5), loader, strict=False):
        pass
    loader.close()
    first = loader.stats().total
    assert first.requests >= 3
    assert first.bytes_fetched >= first.bytes_used > 0
    for _ in loader:
        pass
    loader.close()
    assert loader.stats().total.requests > first.requests
    assert loader.stats().total.bytes_fetched > first.bytes_fetched


def test_what_was_not_announced_comes_too(data, opened):
    fetcher = opened().fetcher()
    samples = np.array([7, 290, 7, 120])
    assert {i: bytes(span) for i, span in data.read(fetcher, samples).items()} == {
        i: data.expected(i) for i in (7, 290, 120)
    }


def test_local_and_remote_shards_are_one_set(folder, data, site):
    paths = [data.paths[0], str(folder / data.names[1]), data.paths[2]]
    with closing(RemoteFetch(paths, [None] * 3, data.sizes, data.digests)) as remote:
        remote.start()
        assert data.stream(remote, fetching.shuffled(len(data), 50)) == len(data)
        assert set(tars(site)) == {"000.tar", "002.tar"}


def test_without_remote_shards_nothing_is_started(folder, data, temporary):
    paths = [str(folder / name) for name in data.names]
    with closing(RemoteFetch(paths, [None] * 3, data.sizes, data.digests)) as remote:
        remote.start()
        assert data.stream(remote, fetching.shuffled(len(data), 50)) == len(data)
        assert not remote.is_needed
        assert not list(temporary.iterdir())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_faults_on_the_way_change_when_and_never_what(folder, data, opened, tmp_path, seed):
    with (
        web.running_nginx(folder, tmp_path / "nginx") as url,
        proxies.running_proxy(url, proxies.seeded(seed)) as proxy,
    ):
        proxy.retry_after = 0
        data.url = proxy.url
        remotes = [opened(data, cache_dir=tmp_path / f"rank{rank}") for rank in range(2)]
        for rank, remote in enumerate(remotes):
            assert data.stream(remote, fetching.shuffled(len(data), 50, seed=rank)) == len(data)
        assert sum(remote.counters.snapshot()["retries"] for remote in remotes) > 3
        assert len(proxy.met) > 3


def test_faults_on_the_way_to_s3_neither(folder, data, opened, monkeypatch):
    with s3.running_server() as server:
        server.client.create_bucket(Bucket="lab")
        for path in folder.iterdir():
            server.client.upload_file(str(path), "lab", f"set/{path.name}")
        with proxies.running_proxy(server.url, proxies.seeded(5)) as proxy:
            for name, value in (server.environment | {"AWS_ENDPOINT_URL": proxy.url}).items():
                monkeypatch.setenv(name, value)
            data.url = "s3://lab/set"
            remote = opened(data)
            assert data.stream(remote, fetching.shuffled(len(data), 50)) == len(data)
            assert remote.counters.snapshot()["retries"] > 3


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        pytest.param(503, "the server answered 503", id="busy"),
        pytest.param("drop", "the connection was lost before an answer", id="dropped"),
        pytest.param("truncate", "the connection ended inside the answer", id="truncated"),
        pytest.param("corrupt", "wrong bytes came", id="corrupted"),
    ],
)
def test_past_the_deadline_the_error_names_url_and_cause(data, site, opened, fault, cause):
    def script(what: str, _number: int):
        return fault if "001.tar" in what else None

    with proxies.running_proxy(site.url, script) as proxy:
        data.url = f"{proxy.url}/data"
        remote = opened(data, timeout=1.5)
        begin = time.monotonic()
        with pytest.raises(LoaderError) as told:
            data.stream(remote, fetching.shuffled(len(data), 50))
        assert f"{data.paths[1]}, bytes " in str(told.value)
        assert "could not be fetched within 2 s" in str(told.value)
        assert cause in str(told.value)
        assert time.monotonic() - begin < 30
        with pytest.raises(LoaderError, match="could not be fetched"):
            remote.check()


def test_a_server_that_is_gone_is_named(data, site, opened):
    port = site.url.rpartition(":")[2]
    data.url = data.url.replace(port, "1")
    remote = opened(data, timeout=1)
    with pytest.raises(LoaderError, match=r"http://127.0.0.1:1/data/00.*could not be fetched within 1 s"):
        data.stream(remote, fetching.shuffled(len(data), 50))


def test_a_slow_answer_ends_at_the_requests_deadline(data, site, opened):
    site.stall_after = 100_000
    remote = opened(data, timeout=2.5, request_timeout=1)
    with pytest.raises(LoaderError, match="it took too long"):
        data.stream(remote, fetching.shuffled(len(data), 50))


@pytest.mark.parametrize(
    ("status", "meaning"),
    [
        pytest.param(404, "no such object", id="missing"),
        pytest.param(403, "access is denied", id="forbidden"),
        pytest.param(400, "400", id="refused"),
    ],
)
def test_what_cannot_get_better_is_not_tried_again(data, site, opened, status, meaning):
    def script(what: str, _number: int):
        return status if "001.tar" in what else None

    with proxies.running_proxy(site.url, script) as proxy:
        data.url = f"{proxy.url}/data"
        remote = opened(data)
        with pytest.raises(LoaderError, match=rf"001\.tar.*{meaning}"):
            data.read(remote.fetcher(), np.array([150]))
        assert len([path for _, path, _ in proxy.requests if path.endswith(".tar")]) == 1


def test_a_sidecar_and_its_range_have_one_deadline_together(data, site, opened):
    def script(what: str, _number: int):
        return "delay" if "000.parquet" in what else 503 if "000.tar" in what else None

    with proxies.running_proxy(site.url, script) as proxy:
        proxy.delay = 3.0
        data.url = f"{proxy.url}/data"
        remote = opened(data, timeout=4)
        begin = time.monotonic()
        with pytest.raises(LoaderError, match=r"000\.tar.*could not be fetched within 4 s"):
            data.read(remote.fetcher(), np.array([0]))
        assert time.monotonic() - begin < 4.4


def test_a_host_that_wants_to_be_left_alone_is_waited_for_no_longer_than_the_deadline():
    def fail():
        raise WrongBytesError("wrong bytes came")

    requests = Requests(Patience(request=1.0, total=0.3), lambda _name, _value: None)
    requests._not_before["host"] = time.monotonic() + 60
    begin = time.monotonic()
    requests.begin()
    with pytest.raises(LoaderError, match="could not be fetched"):
        requests.repeat("http://host/000.tar", "", fail)
    assert time.monotonic() - begin < 5


def test_retry_after_is_honoured(data, site, opened):
    def script(what: str, number: int):
        return 429 if ".tar" in what and number == 0 else None

    with proxies.running_proxy(site.url, script) as proxy:
        proxy.retry_after = 1
        data.url = f"{proxy.url}/data"
        remote = opened(data)
        data.read(remote.fetcher(), np.array([0]))
        asked = [(at, what) for at, path, what in proxy.requests if path.endswith(".tar")]
        assert [what for _, what in asked][1] == "bytes=0-0"  # how it is learned
        assert asked[2][0] - asked[0][0] > 0.9
        assert len(asked) == 3


def test_a_wait_longer_than_the_deadline_is_said_at_once(data, site, opened):
    with proxies.running_proxy(site.url, proxies.always(503)) as proxy:
        proxy.retry_after = 3600
        data.url = f"{proxy.url}/data"
        with pytest.raises(LoaderError, match="it asks to wait 3600 s"):
            data.read(opened(data, timeout=60).fetcher(), np.array([0]))


def test_servers_without_ranges_give_whole_shards_once(folder, data, opened, tmp_path):
    with web.running_nginx(folder, tmp_path / "nginx", "max_ranges 0;") as url:
        data.url = url
        remote = opened(data)
        with pytest.warns(UserWarning, match="gives no byte ranges") as told:
            data.stream(remote, fetching.shuffled(len(data), 50))
            data.stream(remote, fetching.shuffled(len(data), 50, seed=1), first=100)
        assert len(told) == 1
        assert settled(remote)["bytes_fetched"] < sum(data.sizes) * 1.2
        log = (tmp_path / "nginx" / "requests.log").read_text().splitlines()
        assert sum(".tar" in line and int(line.split()[9]) > 300_000 for line in log) >= 3


def test_a_damaged_sample_is_that_samples_fault(data, site, opened):
    shard, at = int(data.columns["shards"][5]), int(data.columns["offsets"][5]) + 2000
    assert shard == 0
    content = bytearray(data.contents[0])
    content[at] ^= 1
    site.files["/data/000.tar"] = bytes(content)
    got = data.read(opened().fetcher(), np.arange(40))
    fault = got.pop(5)
    assert isinstance(fault, SampleError)
    assert fault.code == "shard-corrupt"
    assert all(bytes(span) == data.expected(i) for i, span in got.items())
    assert len(tars(site)) == 3  # the damaged extent twice


def test_a_damaged_header_too_and_without_a_sidecar(data, site, opened, tmp_path):
    at = int(data.columns["offsets"][20])
    content = bytearray(data.contents[0])
    content[at : at + 512] = bytes(512)
    site.files["/data/000.tar"] = bytes(content)
    # without hashes nobody knows where the next sample begins
    for sidecars, faulty in ((True, {20}), (False, set(range(20, 32)))):
        remote = opened(cache_dir=tmp_path / f"{sidecars}", sidecars=sidecars)
        got = data.read(remote.fetcher(), np.arange(32))
        assert {i for i, span in got.items() if isinstance(span, SampleError)} == faulty


def test_another_shard_under_the_name_is_an_error(data, site, opened):
    site.files["/data/000.tar"] = site.files["/data/002.tar"]
    with pytest.raises(LoaderError, match=r"000\.tar.*wrong bytes came"):
        data.read(opened(timeout=1).fetcher(), np.array([0]))


def test_a_shard_that_has_shrunk_is_an_error(data, site, opened):
    site.files["/data/000.tar"] = data.contents[0][:100_000]
    with pytest.raises(LoaderError, match=r"000\.tar.*of \d+ bytes came"):
        data.read(opened(timeout=1).fetcher(), np.array([0]))


@pytest.mark.parametrize("wrong", ["digest", "size"])
def test_a_manifest_that_came_damaged_is_noticed(data, site, opened, wrong):
    if wrong == "digest":
        data.digests[0] = data.digests[0].translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    else:
        data.sizes[0] += 1
    with pytest.raises(LoaderError, match=r"000\.parquet: not the sidecar of .*000\.tar as it was opened"):
        data.read(opened().fetcher(), np.array([0]))
    assert not tars(site)


def test_without_sidecars_headers_are_checked(data, site, opened):
    remote = opened(sidecars=False)
    assert data.stream(remote, fetching.shuffled(len(data), 50)) == len(data)
    assert len(site.requests) == 12


def test_sidecars_that_are_gone_are_said_once(data, site, opened, tmp_path):
    for name in [name for name in site.files if name.endswith(".parquet")]:
        del site.files[name]
    remote = opened(cache_dir=tmp_path / "cache")
    with pytest.warns(UserWarning, match="only headers and lengths can be checked") as told:
        data.stream(remote, fetching.shuffled(len(data), 50))
    assert len(told) == 1


def test_ranks_of_a_node_fetch_what_they_share_once(data, site, opened):
    ranks = [opened() for _ in range(3)]
    for rank in ranks:
        for batch, samples in enumerate(fetching.shuffled(len(data), 50)):
            data.announce(rank, batch, samples)
    for rank in ranks:
        data.stream(rank, fetching.shuffled(len(data), 50))
    assert len(tars(site)) == 12


@pytest.mark.parametrize(
    "size", [pytest.param(900_000, id="less-than-a-batch"), pytest.param(1_600_000, id="some")]
)
def test_a_cache_that_is_too_small_is_slow_and_not_stuck(data, opened, tmp_path, size):
    ranks = [opened(cache_dir=tmp_path / "cache", cache_size=size) for _ in range(2)]
    for rank in ranks:
        for batch, samples in enumerate(fetching.shuffled(len(data), 60)):
            data.announce(rank, batch, samples)
    with pytest.warns(UserWarning, match="too small for what the next batches need"):
        # one after the other: the first must not wait for what the second holds without reading it
        for rank in ranks:
            assert data.stream(rank, fetching.shuffled(len(data), 60)) == len(data)


def test_a_cache_smaller_than_an_extent_is_refused_with_what_is_needed(data, opened, tmp_path):
    remote = opened(cache_dir=tmp_path / "cache", cache_size=500_000)
    with pytest.raises(LoaderError, match=r"does not fit the cache.*at least \d+ are needed"):
        data.read(remote.fetcher(), np.array([0]))


def test_a_killed_download_process_is_an_error(data, opened):
    remote = opened()
    data.stream(remote, fetching.shuffled(len(data), 50)[:2])
    os.kill(remote._process.pid, signal.SIGKILL)
    with pytest.raises(LoaderError, match="download process"):
        data.read(remote.fetcher(), np.arange(len(data) - 5, len(data)))
        data.read(remote.fetcher(), np.arange(100, 200))
    with pytest.raises(LoaderError, match="by SIGKILL"):
        remote.check()
    remote.close()
    remote.start()
    assert data.stream(remote, fetching.shuffled(len(data), 50)) == len(data)


def test_nothing_is_left_of_a_temporary_cache(data, opened, temporary):
    first, second = opened(), opened()
    data.stream(first, fetching.shuffled(len(data), 50))
    (there,) = temporary.iterdir()
    first.close()
    assert there.exists()  # the other one uses it
    second.close()
    assert not list(temporary.iterdir())


def in_process(work):
    """Run in a forked process; gives its number and a pipe that ends with it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reader)
            work(writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    return pid, reader


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def exists(pid: int) -> bool:
    """Whether any thread of a process is there and no zombie: the first may end before the others."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                return True
        except OSError:
            continue
    return False


def test_a_killed_trainer_takes_process_and_temporary_cache_with_it(data, temporary):
    def trainer(writer):
        remote = data.fetch()
        data.stream(remote, fetching.shuffled(len(data), 50)[:3])
        os.write(writer, b"%d" % remote._process.pid)
        time.sleep(60)

    pid, reader = in_process(trainer)
    downloader = int(os.read(reader, 20))
    os.close(reader)
    assert list(temporary.iterdir())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for(lambda: not exists(downloader))
    assert not list(temporary.iterdir())


def test_whoever_comes_next_removes_what_killed_ones_left(data, temporary, opened):
    def trainer(writer):
        other = fetching.Remote(**vars(data))
        other.digests = ["another", "data", "set"]
        remote = other.fetch(sidecars=False)
        other.stream(remote, fetching.shuffled(len(data), 50)[:3])
        os.write(writer, b"%d" % remote._process.pid)
        time.sleep(60)

    pid, reader = in_process(trainer)
    downloader = int(os.read(reader, 20))
    os.close(reader)
    os.kill(downloader, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for(lambda: not exists(downloader))
    (left,) = temporary.iterdir()
    remote = opened()
    assert not left.exists()
    remote.close()
    assert not list(temporary.iterdir())


def test_a_kept_cache_serves_the_next_run(data, site, opened, tmp_path):
    remote = opened(cache_dir=tmp_path / "cache")
    data.stream(remote, fetching.shuffled(len(data), 50))
    remote.close()
    asked = len(site.requests)
    remote = opened(cache_dir=tmp_path / "cache")
    data.stream(remote, fetching.shuffled(len(data), 50, seed=1))
    assert len(site.requests) == asked
    assert remote.counters.snapshot()["bytes_fetched"] == 0


def test_after_a_reboot_blocks_are_checked_before_they_are_used(data, site, opened, tmp_path, monkeypatch):
    remote = opened(cache_dir=tmp_path / "cache")
    data.stream(remote, fetching.shuffled(len(data), 50))
    remote.close()
    blocks = sorted(path for path in (tmp_path / "cache" / "blocks").iterdir() if "hashes" not in path.name)
    # what a power cut leaves of files that were renamed and not yet written: zeros, or less
    blocks[0].write_bytes(bytes(blocks[0].stat().st_size))
    blocks[1].write_bytes(blocks[1].read_bytes()[:1000])
    asked = len(tars(site))
    monkeypatch.setattr("loaders.fetch.cache._boot", lambda: 1)
    remote = opened(cache_dir=tmp_path / "cache")
    data.stream(remote, fetching.shuffled(len(data), 50, seed=1))
    assert len(tars(site)) == asked + 2


def test_a_block_that_is_cut_within_a_boot_is_fetched_again(data, site, opened, tmp_path):
    remote = opened(cache_dir=tmp_path / "cache")
    data.stream(remote, fetching.shuffled(len(data), 50))
    remote.close()
    block = next(path for path in (tmp_path / "cache" / "blocks").iterdir() if "hashes" not in path.name)
    os.truncate(block, 1000)
    asked = len(tars(site))
    remote = opened(cache_dir=tmp_path / "cache")
    data.stream(remote, fetching.shuffled(len(data), 50, seed=1))
    assert len(tars(site)) == asked + 1


def test_hashes_that_are_cut_are_read_from_the_sidecar_again(data, site, opened, tmp_path):
    remote = opened(cache_dir=tmp_path / "cache")
    data.read(remote.fetcher(), np.array([0]))
    remote.close()
    for path in (tmp_path / "cache" / "blocks").iterdir():
        os.truncate(path, 1000)
    asked = len(site.requests)
    remote = opened(cache_dir=tmp_path / "cache")
    assert bytes(data.read(remote.fetcher(), np.array([0]))[0]) == data.expected(0)
    assert len(site.requests) == asked + 2


def test_time_that_a_reader_takes_is_not_time_waited(data, site, opened):
    def script(what: str, _number: int):
        return "delay" if "001.tar" in what else None

    with proxies.running_proxy(site.url, script) as proxy:
        proxy.delay = 3.0
        data.url = f"{proxy.url}/data"
        remote = opened(data)
        fetcher = remote.fetcher()
        data.read(fetcher, np.array([0]))  # all there but the block that is slow
        fetcher._timeout = 2.0
        data.announce(remote, 1, np.array([150]))
        for number, span in fetcher.read(*data.part(np.array([0, 150])), batch=1):
            assert bytes(span) == data.expected([0, 150][number])
            if number == 0:
                time.sleep(2.5)
        assert settled(remote)["wait_us"] < 2e6


def test_arguments_out_of_range_are_refused(data, tmp_path):
    for settings in (
        {"cache_size": 0},
        {"cache_size": "64GB"},
        {"timeout": 0},
        {"downloads": 0},
        {"request_timeout": -1},
    ):
        with pytest.raises(UsageError, match=next(iter(settings))):
            data.fetch(**settings)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cache_dir"):
        data.fetch(cache_dir=tmp_path / "file" / "below")
