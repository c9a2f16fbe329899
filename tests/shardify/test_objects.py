"""Object stores: whole objects, ranges, listings, uploads that are whole or not there, and messages that help and keep secrets."""

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from shardify.errors import PackError, UsageError
from shardify.format import child, objects, urls
from shardify.format.urls import split_url

_spec = importlib.util.spec_from_file_location("s3", Path(__file__).parent / "s3.py")
s3 = importlib.util.module_from_spec(_spec)
sys.modules["s3"] = s3
_spec.loader.exec_module(s3)

PART = 6 * 1024 * 1024  # S3 takes no smaller one


@pytest.fixture(scope="module")
def server():
    with s3.running_server() as server:
        yield server


@pytest.fixture
def place(server, monkeypatch):
    """An empty bucket's URL; all clients of this process talk to the server."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{time.monotonic_ns()}"
    server.client.create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def proxy(server, place, monkeypatch):
    """A proxy before the server, through which this process's clients go."""
    with s3.faulty_proxy(server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.server.url)
        yield proxy


def name_of(place):
    return place.removeprefix("s3://")


def test_objects_are_put_read_measured_and_removed(place):
    url = f"{place}/folder/an object ü#?%20.bin"
    assert objects.get(url) is None
    assert objects.size(url) is None
    assert objects.put(url, memoryview(b"0123456789").cast("b"))
    assert objects.get(url) == b"0123456789"
    assert objects.size(url) == 10
    assert objects.get_range(url, 3, 4) == b"3456"
    with pytest.raises(PackError, match="ends at byte 10"):
        objects.get_range(url, 8, 4)
    with pytest.raises(PackError, match="at most 9"):
        objects.get(url, most=9)
    objects.delete(url)
    objects.delete(url)
    assert objects.get(url) is None


def test_create_only_keeps_what_is_there(place):
    assert objects.put(f"{place}/plan", b"first", create_only=True)
    assert not objects.put(f"{place}/plan", b"second", create_only=True)
    assert objects.get(f"{place}/plan") == b"first"
    assert objects.put(f"{place}/plan", b"third")
    assert objects.get(f"{place}/plan") == b"third"


def test_create_only_where_the_store_knows_no_conditions(proxy, place):
    conditional = iter([501])
    proxy.fault = lambda method, _path: next(conditional, 0) if method == "PUT" else 0
    proxy.body = b"<Error><Code>NotImplemented</Code></Error>"
    assert objects.put(f"{place}/plan", b"first", create_only=True)
    conditional = iter([501])
    assert not objects.put(f"{place}/plan", b"second", create_only=True)
    assert objects.get(f"{place}/plan") == b"first"


def test_listing(place, server):
    names = ["a.jpg", "b/c.jpg", "b/d/e f.jpg", "ü/ö.png", "empty.jpg", "b-c.jpg"]
    for name in names:
        size = 0 if name == "empty.jpg" else len(name)
        server.client.put_object(Bucket=name_of(place), Key=f"root/{name}", Body=b"x" * size)
    server.client.put_object(Bucket=name_of(place), Key="root/", Body=b"")
    server.client.put_object(Bucket=name_of(place), Key="root/b/", Body=b"")
    server.client.put_object(Bucket=name_of(place), Key="root2/other.jpg", Body=b"x")
    found = objects.list_objects(f"{place}/root")
    starts = [0, *found.ends.tolist()]
    listed = [found.names[start:end].decode() for start, end in pairwise(starts)]
    assert listed == ["a.jpg", "b-c.jpg", "empty.jpg", "b/c.jpg", "b/d/e f.jpg", "ü/ö.png"]
    assert dict(zip(listed, found.sizes.tolist(), strict=True))["empty.jpg"] == 0
    assert found.sizes.sum() == sum(len(name) for name in names) - len("empty.jpg")
    assert objects.sizes(f"{place}/root") == {
        "a.jpg": 5,
        "b-c.jpg": 7,
        "empty.jpg": 0,
        "b": 0,
        "ü": 0,
    }
    assert len(objects.list_objects(f"{place}/none").ends) == 0
    objects.put(f"{place}/empty/.keep", b"")
    server.client.put_object(Bucket=name_of(place), Key="marked/", Body=b"")
    assert len(objects.list_objects(f"{place}/marked").ends) == 0


@pytest.mark.parametrize("root", ["", "/many"])
def test_listing_of_several_answers(proxy, place, server, root):
    for number in range(25):
        server.client.put_object(Bucket=name_of(place), Key=f"many/{number:05d}.jpg", Body=b"x")
    proxy.rewrite = lambda path: f"{path}&max-keys=4" if "list-type" in path else path
    found = objects.list_objects(place + root)
    assert len(found.ends) == 25
    assert found.names.endswith(b"00024.jpg" if root else b"many/00024.jpg")
    assert len(objects.sizes(f"{place}/many")) == 25
    assert len(proxy.requests) >= 2 * 25 / 4


def test_an_object_whose_name_is_no_path_is_named(place, server):
    server.client.put_object(Bucket=name_of(place), Key="root/a//b.jpg", Body=b"x")
    with pytest.raises(PackError, match=r"root/a//b\.jpg"):
        objects.list_objects(f"{place}/root")


def in_fork(function, *arguments):
    """Run in a forked process, as workers are; returns its exit status."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("size", [0, 100, PART, 2 * PART, 3 * PART + 100])
@pytest.mark.parametrize("forked", [True, False])
def test_uploads_appear_whole(place, server, monkeypatch, size, forked):
    monkeypatch.setattr(objects, "PART", PART)
    content = os.urandom(1000) * (size // 1000 + 1)
    content = content[:size]

    def upload():
        with objects.open_upload(f"{place}/x/000.tar") as upload:
            view = memoryview(content)
            while view:
                view = view[upload.write(view[:1_000_003]) :]
            assert not server.objects(name_of(place))
            upload.commit()

    if forked:
        assert in_fork(upload) == 0
    else:
        upload()
    assert server.objects(name_of(place)) == {"x/000.tar": content}
    assert server.uploads(name_of(place)) == []


@pytest.mark.parametrize("forked", [True, False])
def test_without_commit_nothing_stays(place, server, monkeypatch, forked):
    monkeypatch.setattr(objects, "PART", PART)

    def upload():
        with pytest.raises(RuntimeError), objects.open_upload(f"{place}/000.tar") as upload:
            upload.write(bytes(3 * PART))
            raise RuntimeError

    if forked:
        assert in_fork(upload) == 0
    else:
        upload()
    assert server.objects(name_of(place)) == {}
    assert server.uploads(name_of(place)) == []


@pytest.mark.parametrize("fault", [500, 503, s3.CUT])
@pytest.mark.parametrize("at", ["uploads", "partNumber=2", "partNumber=4", "complete"])
def test_an_upload_that_fails_leaves_nothing(proxy, place, server, monkeypatch, at, fault):
    monkeypatch.setattr(objects, "PART", PART)

    def fails(method, path):
        if at == "complete":
            return fault if method == "POST" and "uploadId" in path else 0
        return fault if at in path.partition("?")[2] else 0

    proxy.fault = fails

    def upload():
        with pytest.raises(PackError, match=place), objects.open_upload(f"{place}/000.tar") as upload:
            upload.write(bytes(3 * PART + 1))
            upload.commit()

    assert in_fork(upload) == 0
    assert server.objects(name_of(place)) == {}
    assert server.uploads(name_of(place)) == []
    assert any(at in path or at == "complete" for _, path in proxy.requests)


def test_a_fault_that_passes_costs_nothing(proxy, place, server, monkeypatch):
    monkeypatch.setattr(objects, "PART", PART)
    failed = set()

    def fails_once(method, path):
        if (method, path) in failed:
            return 0
        failed.add((method, path))
        return s3.CUT_INSIDE if method == "GET" else 500

    proxy.fault = fails_once
    content = os.urandom(1000) * 20_000

    def upload():
        with objects.open_upload(f"{place}/000.tar") as upload:
            upload.write(content)
            upload.commit()

    assert in_fork(upload) == 0
    assert objects.get(f"{place}/000.tar") == content
    assert len(failed) > 4


def test_a_killed_upload_is_never_seen_and_can_be_removed(place, server, monkeypatch):
    monkeypatch.setattr(objects, "PART", PART)

    def upload():
        with objects.open_upload(f"{place}/set/000.tar") as upload:
            upload.write(bytes(4 * PART))
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_fork(upload) == -signal.SIGKILL
    server.client.create_multipart_upload(Bucket=name_of(place), Key="set2/000.tar")
    server.client.create_multipart_upload(Bucket=name_of(place), Key="set/other.bin")
    assert server.objects(name_of(place)) == {}
    assert sorted(server.uploads(name_of(place))) == ["set/000.tar", "set/other.bin", "set2/000.tar"]
    objects.abort_uploads(f"{place}/set", suffixes=(".tar",))
    assert sorted(server.uploads(name_of(place))) == ["set/other.bin", "set2/000.tar"]


def test_download(place, tmp_path, server, monkeypatch):
    monkeypatch.setattr(objects, "PART", 1_000_000)
    content = os.urandom(5_300_001)
    server.client.put_object(Bucket=name_of(place), Key="chat.json", Body=content, ACL="public-read")
    server.client.put_object(Bucket=name_of(place), Key="empty.json", Body=b"")
    objects.download(f"{place}/chat.json", tmp_path / "chat.json")
    objects.download(f"{place}/empty.json", tmp_path / "empty.json")
    # of an object that anyone may read, by its address
    objects.download(f"{server.url}/{name_of(place)}/chat.json", tmp_path / "http.json")
    assert (tmp_path / "chat.json").read_bytes() == content
    assert (tmp_path / "http.json").read_bytes() == content
    assert (tmp_path / "empty.json").read_bytes() == b""
    with pytest.raises(PackError, match="no such object"):
        objects.download(f"{place}/none.json", tmp_path / "none.json")
    assert sorted(os.listdir(tmp_path)) == ["chat.json", "empty.json", "http.json"]
    with pytest.raises(PackError, match="cannot be written"):
        objects.download(f"{place}/chat.json", tmp_path / "no" / "chat.json")


def test_an_object_that_changes_while_it_is_downloaded(proxy, place, tmp_path, server, monkeypatch):
    monkeypatch.setattr(objects, "PART", 1_000_000)
    server.client.put_object(Bucket=name_of(place), Key="chat.json", Body=bytes(5_000_000))
    seen = []

    def replaces(method, _path):
        if method == "GET" and not seen:
            seen.append(1)
            server.client.put_object(Bucket=name_of(place), Key="chat.json", Body=b"1" * 5_000_000)
        return 0

    proxy.fault = replaces
    with pytest.raises(PackError, match="has changed"):
        objects.download(f"{place}/chat.json", tmp_path / "chat.json")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            403,
            b"<Error><Code>AccessDenied</Code><Key>never-to-be-shown</Key></Error>",
            "access is denied .403 AccessDenied",
        ),
        (403, b"<Error><Code>SignatureDoesNotMatch</Code>never-to-be-shown</Error>", "access is denied"),
        (500, b"<Error><Code>InternalError</Code></Error>", "the store answered 500"),
        (503, b"never-to-be-shown", "the store answered 503"),
        (301, b"<Error><Code>PermanentRedirect</Code></Error>", "AWS_REGION"),
        (400, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>", "AWS_REGION"),
        (s3.CUT, b"", "cannot be reached"),
    ],
)
def test_faults_are_told_in_one_clear_line(proxy, place, status, body, message):
    proxy.fault = lambda _method, _path: status
    proxy.body = body
    for call in (
        lambda: objects.get(f"{place}/x"),
        lambda: objects.put(f"{place}/x", b"1"),
        lambda: objects.get_range(f"{place}/x", 0, 5),
        lambda: objects.list_objects(place),
    ):
        with pytest.raises(PackError, match=message) as raised:
            call()
        text = str(raised.value)
        assert text.startswith(place)
        assert "\n" not in text
        assert "never-to-be-shown" not in text


def test_a_bucket_that_is_not_there(place, tmp_path):
    for call in (
        lambda: objects.get("s3://no-such-bucket-here/x"),
        lambda: objects.put("s3://no-such-bucket-here/x", b""),
        lambda: objects.sizes("s3://no-such-bucket-here/"),
        lambda: objects.list_objects("s3://no-such-bucket-here/x"),
        lambda: objects.download("s3://no-such-bucket-here/x", tmp_path / "x"),
    ):
        with pytest.raises(PackError, match=r"s3://no-such-bucket-here.*no such bucket"):
            call()


@pytest.mark.parametrize(
    ("url", "settings", "request_path"),
    [
        (
            "gs://lab/a/b c.jpg",
            {"GOOGLE_BASE_URL": "{server}", "GOOGLE_BEARER_TOKEN": "never-to-be-shown"},
            "/lab/a%2Fb%20c%2Ejpg",
        ),
        (
            "az://lab/a/b c.jpg",
            {
                "AZURE_STORAGE_ENDPOINT": "{server}",
                "AZURE_STORAGE_ACCOUNT_NAME": "acme",
                "AZURE_SKIP_SIGNATURE": "true",
            },
            "/lab/a/b%20c.jpg",
        ),
    ],
)
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "NoSuchBucket", "no such bucket"),
        (404, "ContainerNotFound", "no such bucket"),
        (403, "AuthorizationPermissionMismatch", "access is denied .403 Auth"),
    ],
)
def test_the_other_stores_are_asked_as_they_expect(
    proxy, monkeypatch, url, settings, request_path, status, code, message
):
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(server=proxy.server.url))
    proxy.fault = lambda _method, _path: status
    proxy.body = f"<Error><Code>{code}</Code></Error>".encode()
    for call in (lambda: objects.get(url), lambda: objects.put(url, b"1")):
        with pytest.raises(PackError, match=message):
            call()
    assert [(method, path.partition("?")[0]) for method, path in proxy.requests] == [
        ("GET", request_path),
        ("PUT", request_path),
    ]


def test_nobody_listens(place, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(PackError, match="cannot be reached"):
        objects.get(f"{place}/x")


def test_without_credentials_that_is_said(place, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(PackError, match=r"no AWS credentials were found.*AWS_PROFILE"):
        objects.get(f"{place}/x")


def test_a_profile_gives_credentials_region_and_endpoint(place, server, monkeypatch, tmp_path):
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {server.url}\n"
        "aws_access_key_id = testing\naws_secret_access_key = testing\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert objects.put(f"{place}/x", b"1")
    assert server.objects(name_of(place)) == {"x": b"1"}
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(PackError, match=r"profile.*other"):
        objects.get(f"{place}/x")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "not a place that is known"),
        ("s3://", "no bucket"),
        ("s3:///x", "no bucket"),
        ("s3://b/a/../x", "empty part"),
        ("s3://b/a//x", "empty part"),
        ("https://user:never-to-be-shown@host/x", "password"),
        ("https://host/x?signature=never-to-be-shown", "signature"),
        ("hf://org/name/x", "hf://datasets/ORG/NAME"),
        ("hf://datasets/org", "hf://datasets/ORG/NAME"),
    ],
)
def test_urls_that_are_none(url, message):
    with pytest.raises(UsageError, match=message) as raised:
        objects.get(url)
    assert "never-to-be-shown" not in str(raised.value)


def test_parts_of_urls():
    assert split_url("s3://b") == urls.Place("s3", "b", "")
    assert split_url("s3a://b/p/q/") == urls.Place("s3", "b", "p/q")
    assert split_url("gs://b/a b#c?d%20") == urls.Place("gs", "b", "a b#c?d%20")
    assert split_url("https://H:1/a%20b") == urls.Place("https", "h:1", "a b")
    assert split_url("hf://datasets/o/n/a%20b/c") == urls.Place("hf", "datasets/o/n", "a%20b/c")
    assert split_url("hf://datasets/o/n@main") == split_url("hf://datasets/o/n/")
    assert split_url("hf://datasets/o/n@refs%2Fpr%2F1/a").bucket == "datasets/o/n@refs/pr/1"


@pytest.mark.parametrize(
    "url", ["s3://b/p q", "gs://b", "az://c/a/b", "https://h:1/a", "http://h", "hf://datasets/o/n@v1"]
)
@pytest.mark.parametrize("name", ["000.tar", "a b%20.tar", "ü#?.tar"])
def test_names_are_joined_and_split_again(url, name):
    joined = urls.join_url(url + "/", name)
    assert urls.split_name(joined) == (url, name)
    assert split_url(joined).key == f"{split_url(url).key}/{name}".lstrip("/")


def test_what_can_only_be_read_is_not_written():
    for call in (lambda: objects.put("https://host/x", b""), lambda: objects.delete("https://host/x")):
        with pytest.raises(UsageError, match="can be read, not written"):
            call()


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def _raise(error):
    raise error


def test_a_child_answers_or_raises():
    here = os.getpid()
    assert child.in_child(os.getpid) != here
    assert child.in_child(child.in_child, os.getppid) == here  # a child of a child is not needed
    with pytest.raises(PackError, match="what happened"):
        child.in_child(_raise, PackError("what happened"))
    with pytest.raises(PackError, match="OddError: one"):
        child.in_child(_raise, OddError("one", "two"))
    with pytest.raises(PackError, match="SIGKILL"):
        child.in_child(lambda: os.kill(os.getpid(), signal.SIGKILL))


def children():
    """The processes whose parent this one is."""
    return {path.read_text() for path in Path("/proc/self/task").glob("*/children")}


def test_a_child_whose_end_nobody_is_told_of():
    """Whoever started this process may have had the signal ignored."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert child.in_child(pow, 2, 5) == 32
        with pytest.raises(PackError, match="a helper process was ended by something"):
            child.in_child(os._exit, 1)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_child_is_ended_with_its_parents_patience():
    began, before_it = time.monotonic(), children()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.in_child(time.sleep, 60)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 10
    assert children() == before_it


def test_a_child_is_not_forgotten_at_a_signal_right_after_the_fork(monkeypatch):
    """Other threads can take it while the main one has it blocked."""
    before_it, fork = children(), os.fork
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()

    def interrupted_fork():
        pid = fork()
        if pid:
            os.kill(os.getpid(), signal.SIGINT)
        return pid

    monkeypatch.setattr(os, "fork", interrupted_fork)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.in_child(time.sleep, 60)
    finally:
        end.set()
        thread.join()
    assert children() == before_it
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_can_be_forked_after_all_of_it(place):
    objects.put(f"{place}/x", b"1")

    def work():
        assert objects.get(f"{place}/x") == b"1"
        pid = os.fork()
        if not pid:
            try:
                objects.get(f"{place}/x")
            except RuntimeError:  # rather than waiting for ever
                os._exit(7)
            os._exit(1)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    assert in_fork(work) == 7
