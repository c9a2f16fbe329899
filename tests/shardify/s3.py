"""An S3 server for tests: moto's own process, and a proxy before it that fails requests as real networks do."""

import functools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config

CUT = -1
"""A fault: the connection is closed without an answer."""

CUT_INSIDE = -2
"""A fault: the connection is closed in the middle of the answer's body."""


@dataclass(frozen=True)
class Server:
    """A running S3 server."""

    url: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What makes every client of a process talk to it, and to nothing else."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "never-to-be-shown",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "2",
        }

    @property
    def client(self) -> Any:
        """A boto3 client, which is not the code under test."""
        return _client(self.url)

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The objects whose keys begin with the prefix, by the rest of them."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found["Key"][len(prefix) :] for page in pages for found in page.get("Contents", ())]

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Key without the prefix -> content."""
        return {
            key: self.client.get_object(Bucket=bucket, Key=prefix + key)["Body"].read()
            for key in self.keys(bucket, prefix)
        }

    def uploads(self, bucket: str) -> list[str]:
        """Keys of unfinished multipart uploads."""
        return [
            upload["Key"] for upload in self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())
        ]


@functools.cache
def _client(url: str) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        config=Config(s3={"addressing_style": "path"}),
    )


def start_server() -> Server:
    """Start moto on a free port; it answers when this returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return Server(f"http://127.0.0.1:{port}", process)
        assert process.poll() is None, "moto's server has ended"
        assert time.monotonic() < deadline, "moto's server does not answer"
        time.sleep(0.05)


@contextmanager
def running_server() -> Iterator[Server]:
    """A server that ends with the block."""
    server = start_server()
    try:
        yield server
    finally:
        assert server.process
        server.process.kill()
        server.process.wait()


@dataclass
class Proxy:
    """Passes requests on to a server, except where `fault` says otherwise.

    Attributes:
        server: a `Server` at the proxy's own address.
        fault: asked for each request (method, path with query); a status to answer, `CUT`, `CUT_INSIDE`, or 0 to pass it on.
        rewrite: changes a path with query before it is passed on.
        body: of the answers with a status of its own.
        requests: the requests seen, in their order of arrival.
    """

    server: Server
    fault: Callable[[str, str], int] = lambda _method, _path: 0
    rewrite: Callable[[str], str] = lambda path: path
    body: bytes = b"<Error><Code>MadeUp</Code></Error>"
    requests: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def faulty_proxy(target: Server) -> Iterator[Proxy]:
    """A proxy before `target` that lives as long as the block."""
    place = urlsplit(target.url)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                proxy.requests.append((self.command, self.path))
                fault = proxy.fault(self.command, self.path)
            if fault == CUT:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if fault > 0:
                self.answer(fault, [], proxy.body)
                return
            connection = HTTPConnection(place.hostname or "", place.port, timeout=30)
            try:
                connection.request(self.command, proxy.rewrite(self.path), body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
            except (OSError, HTTPException):
                self.answer(502, [], b"")
                return
            finally:
                connection.close()
            self.answer(response.status, response.getheaders(), content, cut=fault == CUT_INSIDE)

        def answer(
            self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False
        ) -> None:
            self.send_response_only(status)
            length = str(len(content))
            for name, value in headers:
                if name.lower() == "content-length":
                    length = value  # of a HEAD, which has no body
                elif name.lower() not in ("transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "HEAD":
                return
            try:
                self.wfile.write(content[: len(content) // 2] if cut else content)
            except ConnectionError:  # the client has given up, which is its right
                cut = True
            if cut:
                self.close_connection = True

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815 - http.server's names

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - http.server's name
            del format, arguments

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    proxy = Proxy(Server(f"http://127.0.0.1:{listener.server_address[1]}"))
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
