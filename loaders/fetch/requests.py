"""Requests to object stores that come back: repeated with growing, jittered pauses until they succeed or their time is up.

Only for the download process: nothing here survives a fork.
"""

import http.client
import math
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, NotSupportedError

from shardify.errors import LoaderError, PackError
from shardify.format.bucket import explained, open_bucket
from shardify.format.urls import shown

if TYPE_CHECKING:
    from obstore.store import ObjectStore

RETRIED = frozenset((408, 429, 500, 502, 503, 504))
"""Answers that may be other ones later."""

_BUSY = (429, 503)  # answers that may name a time
_FIRST_PAUSE = 0.1  # seconds, doubled each time
_LONGEST_PAUSE = 10.0
_PROBE_TIMEOUT = 5.0
_WHOLE_CHUNK = 1024 * 1024
_STATUS = re.compile(r"status code: ([0-9]{3})")
_NO_CREDENTIALS = ("//169.254.169.254/", "//metadata.google.internal/")

_T = TypeVar("_T")


class NoRangesError(Exception):
    """The server gives whole objects only."""


class WrongBytesError(Exception):
    """What came is not what was asked for; it may be the next time."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try.

    Attributes:
        request: seconds that one request may take, its body included.
        total: seconds for one extent with all repetitions, its shard's sidecar included.
    """

    request: float
    total: float


class Requests:
    """Fetches objects and ranges of them; thread-safe.

    Args:
        patience: how long to try.
        count: called with the names of `FetchCounters` and what to add.
    """

    def __init__(self, patience: Patience, count: Callable[[str, int], None]) -> None:
        self._patience = patience
        self._count = count
        self._not_before: dict[str, float] = {}  # host -> when it wants to be asked again
        self._mutex = threading.Lock()
        self._deadline = threading.local()
        self._random = random.Random()  # noqa: S311 - jitter

    def begin(self) -> None:
        """All that this thread asks for from now on has to come within `Patience.total` seconds together."""
        self._deadline.at = time.monotonic() + self._patience.total

    def get_range(self, url: str, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of an object, by one try.

        Raises:
            NoRangesError: the server knows no ranges.
            WrongBytesError: the object ends sooner.
        """
        store, key = self._store(url)
        try:
            data = memoryview(obstore.get_range(store, key, start=begin, end=end))
        except NotSupportedError as error:
            if "Range" in str(error):
                raise NoRangesError from None
            raise
        self._count("bytes_fetched", len(data))
        if len(data) != end - begin:
            raise WrongBytesError(f"{len(data)} of {end - begin} bytes came")
        return data

    def get(self, url: str) -> bytes | None:
        """A whole, small object; None where there is none. Tried again as `repeat` does."""

        def once() -> bytes | None:
            store, key = self._store(url)
            try:
                data = obstore.get(store, key).bytes().to_bytes()
            except FileNotFoundError:
                return None
            self._count("bytes_fetched", len(data))
            return data

        return self.repeat(url, "", once)

    def stream(self, url: str, size: int, write: Callable[[memoryview], None]) -> None:
        """A whole object of `size` bytes, piece by piece, by one try.

        Raises:
            WrongBytesError: it has another size.
        """
        store, key = self._store(url, self._patience.total)
        done = 0
        for chunk in obstore.get(store, key).stream(min_chunk_size=_WHOLE_CHUNK):
            data = memoryview(chunk)
            done += len(data)
            self._count("bytes_fetched", len(data))
            if done > size:
                break
            write(data)
        if done != size:
            raise WrongBytesError(f"{done} bytes came, and the shard has {size}")

    def repeat(self, url: str, what: str, once: Callable[[], _T]) -> _T:
        """Call `once` until it succeeds, or the time that this thread has since `begin` is up.

        Args:
            url: what it asks for, and
            what: which part of it, for messages.
            once: makes one try; it may raise what obstore raises, and `WrongBytesError`.

        Raises:
            LoaderError: time is up, or trying again would not help; it names the URL and the last cause.
            NoRangesError: as `once` raises it.
        """
        deadline = self._deadline.at
        attempt = 0
        named = f"{shown(url)}{what}"
        while True:
            self._wait_for(url)
            self._count("requests", 1)
            try:
                return once()
            except (BaseError, WrongBytesError, OSError, ValueError) as error:
                cause = _cause(error, url)
                pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE) * (0.5 + self._random.random() / 2)
                wish = self._retry_after(url) if _status(error) in _BUSY else 0.0
                left = deadline - time.monotonic()
                if max(pause, wish) >= left:
                    asked = f"; it asks to wait {wish:.0f} s" if wish >= left else ""
                    raise LoaderError(
                        f"{named} could not be fetched within {self._patience.total:.0f} s, in {attempt + 1} tries: {cause}{asked}"
                    ) from None
                attempt += 1
                time.sleep(max(pause, wish))
                self._count("retries", 1)

    def _store(self, url: str, seconds: float | None = None) -> "tuple[ObjectStore, str]":
        seconds = seconds or self._patience.request
        # whole seconds: each number of them makes a client of its own
        left = max(1, math.ceil(self._deadline.at - time.monotonic()))
        try:
            return open_bucket(url, once=timedelta(seconds=min(seconds, left)))
        except PackError as error:
            raise LoaderError(str(error)) from None

    def _wait_for(self, url: str) -> None:
        """Until the host wants to be asked again, or time is up."""
        while (left := min(self._not_before.get(_host(url), 0.0), self._deadline.at) - time.monotonic()) > 0:
            time.sleep(left)

    def _retry_after(self, url: str) -> float:
        """Seconds that a busy web server wants to be left alone: obstore keeps its answer's headers to itself, so it is asked once more."""
        if not url.lower().startswith(("http://", "https://")):
            return 0.0
        with self._mutex:
            left = self._not_before.get(_host(url), 0.0) - time.monotonic()
            if left > 0:
                return left
            seconds = _asked_pause(url)
            self._not_before[_host(url)] = time.monotonic() + seconds
            return seconds


def _asked_pause(url: str) -> float:
    place = urlsplit(url)
    secure = place.scheme.lower() == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(place.netloc, timeout=_PROBE_TIMEOUT)
    with suppress(OSError, http.client.HTTPException, ValueError):
        try:
            connection.request("GET", place.path or "/", headers={"Range": "bytes=0-0"})
            answer = connection.getresponse()
            if answer.status in _BUSY:
                return parse_retry_after(answer.getheader("Retry-After", ""), datetime.now(UTC))
        finally:
            connection.close()
    return 0.0


def parse_retry_after(value: str, now: datetime) -> float:
    """Seconds of a Retry-After header: a number of them, or a date (RFC 9110, 10.2.3). 0.0 for anything else."""
    value = value.strip()
    if value.isdecimal():
        return float(value[:9])
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - now).total_seconds())


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _status(error: Exception) -> int:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def _cause(error: Exception, url: str) -> str:
    """What happened, for people; raises LoaderError when it would happen again."""
    if isinstance(error, WrongBytesError):
        return str(error)
    text, status = str(error), _status(error)
    final: Any = isinstance(error, OSError | ValueError) or any(place in text for place in _NO_CREDENTIALS)
    if isinstance(error, BaseError) and type(error).__name__ != "GenericError":
        final = True  # not found, denied, a wrong URL
    if isinstance(error, FileNotFoundError):
        raise LoaderError(f"{shown(url)}: no such object (any more)") from None
    if status in RETRIED:
        return f"the server answered {status}"
    if status or final:
        try:
            with explained(url):
                raise error
        except PackError as told:
            raise LoaderError(str(told)) from None
    for sign, meaning in (
        ("TimedOut", "it took too long"),
        ("kind: Timeout", "it took too long"),
        ("IncompleteBody", "the connection ended inside the answer"),
        ("request or response body", "the connection ended inside the answer"),
        ("ConnectionRefused", "the connection was refused"),
        ("kind: Connect", "the server cannot be reached"),
        ("error sending request", "the connection was lost before an answer"),
    ):
        if sign in text:
            return meaning
    return re.sub(r"[a-z]+://\S+", "(address)", text.partition("\n")[0])[:200]
