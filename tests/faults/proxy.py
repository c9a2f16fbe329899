"""A proxy before an HTTP server that does to answers what real networks and servers do, by a seeded script.

The n-th request of a path meets the fault that the seed gives to (path, n), so that a run is the same every time, whatever the threads do.
"""

import hashlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

DROP, DELAY, TRUNCATE, CORRUPT = "drop", "delay", "truncate", "corrupt"
"""The connection is closed without an answer; an answer takes a while; its body is cut; some of its bytes are others."""
EVERYTHING: Sequence[str | int] = (DROP, DELAY, TRUNCATE, CORRUPT, 429, 500, 503)


def seeded(
    seed: int, *, share: float = 0.4, faults: Sequence[str | int] = EVERYTHING
) -> Callable[[str, int], str | int | None]:
    """A script under which that share of all requests meets some fault."""

    def script(path: str, number: int) -> str | int | None:
        dice = random.Random(f"{seed} {path} {number}")
        return dice.choice(faults) if dice.random() < share else None

    return script


def always(fault: str | int | None) -> Callable[[str, int], str | int | None]:
    """A script of one fault."""
    return lambda _path, _number: fault


@dataclass
class FaultProxy:
    """A running proxy.

    Attributes:
        url: its address.
        script: (path with its range, how often it was asked for before) -> what happens: a status, one of the words above, or None.
        retry_after: seconds that 429 and 503 ask for; None for no such header.
        delay: seconds of `DELAY`.
        met: how often each fault was met.
        requests: time, path and range of each request, in order of arrival.
    """

    url: str
    script: Callable[[str, int], str | int | None]
    retry_after: float | None = None
    delay: float = 0.2
    met: Counter[str | int] = field(default_factory=Counter)
    requests: list[tuple[float, str, str]] = field(default_factory=list)


@contextmanager
def running_proxy(target: str, script: Callable[[str, int], str | int | None]) -> Iterator[FaultProxy]:
    """A proxy before the server at the URL `target` that lives as long as the block."""
    place = urlsplit(target)
    lock = threading.Lock()
    seen: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            what = f"{self.path} {asked}"
            with lock:
                proxy.requests.append((time.monotonic(), self.path, asked))
                fault = proxy.script(what, seen[what])
                seen[what] += 1
                if fault is not None:
                    proxy.met[fault] += 1
            if fault == DROP:
                self.end()
                return
            if isinstance(fault, int):
                headers = [("Retry-After", f"{proxy.retry_after:g}")] if proxy.retry_after is not None else []
                self.answer(fault, headers, b"<Error><Code>MadeUp</Code></Error>")
                return
            if fault == DELAY:
                time.sleep(proxy.delay)
            connection = HTTPConnection(place.hostname or "", place.port, timeout=30)
            try:
                connection.request(self.command, self.path, headers=dict(self.headers))
                response = connection.getresponse()
                content = response.read()
            except (OSError, HTTPException):
                self.answer(502, [], b"")
                return
            finally:
                connection.close()
            if fault == CORRUPT and content:
                at = int.from_bytes(hashlib.sha256(f"{what} {seen[what]}".encode()).digest()) % len(content)
                content = content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]
            self.answer(response.status, response.getheaders(), content, cut=fault == TRUNCATE)

        do_HEAD = do_GET  # noqa: N815 - http.server's name

        def answer(
            self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False
        ) -> None:
            with suppress(ConnectionError):
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.end()

        def end(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - http.server's name
            del format, arguments

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    proxy = FaultProxy(f"http://127.0.0.1:{listener.server_address[1]}", script)
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
