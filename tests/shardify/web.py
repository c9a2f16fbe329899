"""Web servers for tests: nginx itself, and a small one that can be told to behave badly."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

_CONFIGURATION = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/errors.log;
events {{ worker_connections 256; }}
http {{
    access_log {folder}/requests.log; default_type application/octet-stream;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3; uwsgi_temp_path {folder}/t4;
    scgi_temp_path {folder}/t5;
    server {{ listen 127.0.0.1:{port}; root {root}; {settings} }}
}}
"""


@contextmanager
def running_nginx(root: Path, folder: Path, settings: str = "") -> Iterator[str]:
    """Nginx over the files below `root` for as long as the block; gives its URL.

    Args:
        root: what it serves.
        folder: for its own files; made if need be.
        settings: more lines of its ``server`` block, such as ``max_ranges 0;``.
    """
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if binary is None:
        pytest.skip("no nginx on this machine (apt-get install nginx)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "nginx.conf"
    configuration.write_text(_CONFIGURATION.format(folder=folder, port=port, root=root, settings=settings))
    process = subprocess.Popen(
        [binary, "-p", str(folder), "-e", str(folder / "errors.log"), "-c", str(configuration)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, (folder / "errors.log").read_text()
            assert time.monotonic() < deadline, "nginx does not answer"
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@dataclass
class Site:
    """A web server over files in memory.

    Attributes:
        url: its address.
        files: path with its slash -> content; may be changed while it runs.
        ranges: whether it gives byte ranges.
        tags: whether it gives entity tags; it never says when a file was changed.
        token: what every request must bring; none when empty.
        elsewhere: where every request is sent on to, a path in front of the site's own; nowhere when empty.
        damaged: path -> how many of its next answers come with a wrong last byte.
        stall_after: bytes of a body after which it waits for `go`; None for never.
        go: ends that waiting.
        requests: method, path and headers of what was asked, in their order of arrival.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    tags: bool = True
    token: str = ""
    elsewhere: str = ""
    damaged: dict[str, int] = field(default_factory=dict)
    stall_after: int | None = None
    go: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def paths(self, method: str = "GET") -> list[str]:
        """The last parts of the paths that were asked for."""
        return [path.rpartition("/")[2] for asked, path, _ in self.requests if asked == method]


@contextmanager
def running_site(site: Site) -> Iterator[Site]:
    """Run it as long as the block; its address is filled in."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.requests.append(
                (self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            )
            path = unquote(self.path.partition("?")[0])
            content = site.files.get(path)
            if content and site.damaged.get(path) and self.command == "GET":
                site.damaged[path] -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
            if site.token and self.headers.get("Authorization") != f"Bearer {site.token}":
                self.answer(401, b"who is this")
            elif site.elsewhere:
                self.answer(302, b"", Location=f"{site.elsewhere}{self.path}?signature=never-to-be-shown")
            elif content is None:
                self.answer(404, b"<Code>nothing</Code>")
            else:
                tag = {"ETag": f'"{hash(content):x}"'} if site.tags else {}
                asked = self.headers.get("Range", "") if site.ranges else ""
                if asked:
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    part = content[int(first) : int(last or len(content)) + 1]
                    where = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
                    self.answer(206, part, **tag, **{"Content-Range": where})
                else:
                    self.answer(200, content, **tag)

        do_HEAD = do_GET  # noqa: N815 - http.server's name

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            with suppress(ConnectionError):
                if site.stall_after is not None and len(body) > site.stall_after:
                    self.wfile.write(body[: site.stall_after])
                    self.wfile.flush()
                    site.go.wait(60)
                    body = body[site.stall_after :]
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - http.server's name
            del format, arguments

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    site.url = f"http://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.go.set()
        listener.shutdown()
        listener.server_close()
        thread.join()


def files_below(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Path with its slash -> content of all files below a folder, for `Site.files`."""
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not os.path.islink(path)
    }
