"""Object stores: whole objects, exact ranges, listings and streamed uploads under s3://, gs://, az://, https:// and hf:// URLs.

Every function may be called from any process: where the process may fork later, a short-lived child makes the call (`child.in_child`, which
also makes many calls at once cheap: run a function that makes them all).
"""

import importlib.util
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError

from shardify.errors import PackError
from shardify.format.bucket import error_code, explained, is_missing_bucket, open_bucket, require_writable
from shardify.format.child import in_child, may_fork
from shardify.format.urls import WRITABLE, Place, shown, split_url

PART = 16 * 1024 * 1024
"""Bytes of one part of an upload, and of one range of a download."""

_IN_FLIGHT = 3  # parts of one upload
_DOWNLOADS = 4  # ranges of one download
_LISTINGS = 8  # folders listed at once
_LISTED = 1000  # names in an answer, which is what the stores give at most


class NoObjectError(PackError):
    """There is no such object."""


class Entry(NamedTuple):
    """What a store tells of an object without its content.

    Attributes:
        size: bytes.
        version: another one when the content has changed: its entity tag, else when it was last changed; empty when the store tells neither.
    """

    size: int
    version: str


def get(url: str, *, most: int | None = None) -> bytes | None:
    """An object's bytes; None when there is none.

    Args:
        url: where it is.
        most: bytes that it may have.

    Raises:
        PackError: it is larger, or the store cannot be reached or refuses.
    """
    return in_child(_get, url, most)


def get_range(url: str, start: int, size: int) -> bytes:
    """Exactly `size` bytes of an object from `start` on.

    Raises:
        PackError: it is not there or shorter, or the store cannot be reached or refuses.
    """
    return in_child(_get_range, url, start, size)


def size(url: str) -> int | None:
    """Bytes of an object; None when there is none.

    Raises:
        PackError: the store cannot be reached or refuses.
    """
    return in_child(_size, url)


def sizes(url: str) -> dict[str, int]:
    """Name -> bytes of what stands directly below `url`; folders have 0.

    Raises:
        PackError: the store cannot be reached or refuses.
    """
    return in_child(_sizes, url)


def entry(url: str) -> Entry | None:
    """What is known of an object; None when there is none.

    Raises:
        PackError: the store cannot be reached or refuses.
    """
    return in_child(_entry, url)


def entries(url: str) -> dict[str, Entry]:
    """Name -> what is known of it, of the objects directly below `url`; folders have size 0 and no version.

    Raises:
        PackError: the store cannot be reached or refuses, or cannot list (https://, hf://).
    """
    return in_child(_entries, url)


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """The n objects below a prefix: those directly below it, then folder by folder, each in the order of their names.

    Attributes:
        names: relative to the prefix, in UTF-8, one after another.
        ends: int64 [n], where each name ends in `names`.
        sizes: int64 [n], bytes of each object.
    """

    names: bytes
    ends: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


def list_objects(url: str) -> Objects:
    """List everything below a URL, at any depth. Empty objects without an extension, which mark folders, are left out.

    Raises:
        PackError: the store cannot be reached or refuses, or an object's name is no path.
    """
    return in_child(_list_objects, url)


def put(url: str, content: bytes | memoryview, *, create_only: bool = False) -> bool:
    """Write an object at once.

    Args:
        url: where.
        content: its bytes.
        create_only: leave it as it is when it exists already.

    Returns:
        Whether it was written.

    Raises:
        PackError: the store cannot be reached or refuses.
    """
    # obstore takes no signed ones, which are pyarrow's
    return in_child(_put, url, bytes(content), create_only)


def delete(url: str) -> None:
    """Remove an object, if it is there.

    Raises:
        PackError: the store cannot be reached or refuses.
    """
    in_child(_delete, url)


def open_upload(url: str) -> "Upload":
    """Begin an object of any size; see `Upload`."""
    split_url(url)
    return Upload(url)


def download(url: str, path: str | os.PathLike[str]) -> None:
    """Copy an object into a local file, which appears whole or not at all.

    Raises:
        NoObjectError: there is no such object.
        PackError: it changes meanwhile, the store cannot be reached or refuses, or the file cannot be written.
    """
    in_child(_download, url, os.fspath(path))


class Upload:
    """An object being written: sent in parts of `PART` bytes, some at a time, visible at `commit`.

    Left without commit, nothing of it stays. A process that is killed leaves an unfinished upload, invisible and never an object, until
    `abort_uploads` or a rule of the bucket removes it. A process that must not call object stores keeps the parts, and a child sends them.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._part = bytearray()
        self._kept: list[bytes] = []
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        writer, self._writer = self._writer, None
        self._kept, self._part = [], bytearray()
        if writer is not None:
            # obstore aborts what is left by an exception; where even that fails, `abort_uploads` remains
            with suppress(BaseError, OSError):
                writer.__exit__(PackError, None, None)

    def write(self, data: bytes | memoryview, /) -> int:
        """Append; the whole of it is taken.

        Raises:
            PackError: the store cannot be reached or refuses.
        """
        self._part += data
        while len(self._part) >= PART:
            self._send(bytes(memoryview(self._part)[:PART]))
            del self._part[:PART]
        return len(data)

    def commit(self) -> None:
        """Make it visible, in the place of what was there.

        Raises:
            PackError: the store cannot be reached or refuses.
        """
        last, self._part = bytes(self._part), bytearray()
        if may_fork():
            in_child(_send_all, self._url, [*self._kept, last])
            self._kept = []
            return
        with explained(self._url):
            writer = self._open()
            if last:
                writer.write(last)
            self._writer = None  # closing aborts by itself when it fails
            writer.close()

    def _send(self, part: bytes) -> None:
        if may_fork():
            self._kept.append(part)
            return
        with explained(self._url):
            self._open().write(part)

    def _open(self) -> Any:
        if self._writer is None:
            store, key = open_bucket(self._url)
            self._writer = obstore.open_writer(store, key, buffer_size=PART, max_concurrency=_IN_FLIGHT)
        return self._writer


def abort_uploads(url: str, *, suffixes: Sequence[str]) -> None:
    """Remove unfinished uploads of objects directly below an s3:// URL whose names end so, as far as that can be done.

    Listing them needs boto3; without it, and at the other stores, the bucket's own rule removes them.
    """
    place = split_url(url)
    if place.scheme == "s3" and importlib.util.find_spec("boto3"):
        in_child(_abort_uploads, place, tuple(suffixes))


def _get(url: str, most: int | None) -> bytes | None:
    with explained(url):
        store, key = open_bucket(url)
        try:
            answer = obstore.get(store, key)
            if most is not None and answer.meta["size"] > most:
                raise PackError(f"{shown(url)}: {answer.meta['size']} bytes; at most {most} were expected")
            return answer.bytes().to_bytes()
        except FileNotFoundError as error:
            if is_missing_bucket(error):
                raise
            return None


def _get_range(url: str, start: int, size: int) -> bytes:
    if not size:
        return b""
    with explained(url):
        store, key = open_bucket(url)
        data = obstore.get_range(store, key, start=start, length=size).to_bytes()
    if len(data) != size:
        raise PackError(f"{shown(url)}: ends at byte {start + len(data)}, before byte {start + size}")
    return data


def _size(url: str) -> int | None:
    found = _entry(url)
    return None if found is None else found.size


def _sizes(url: str) -> dict[str, int]:
    return {name: found.size for name, found in _entries(url).items()}


def _entry(url: str) -> Entry | None:
    with explained(url):
        store, key = open_bucket(url)
        try:
            return _entry_of(obstore.head(store, key))
        except FileNotFoundError as error:
            if is_missing_bucket(error):
                raise
            return None


def _entries(url: str) -> dict[str, Entry]:
    with explained(url):
        store, prefix = open_bucket(url)
        found = obstore.list_with_delimiter(store, prefix or None)
    skipped = len(prefix) + 1 if prefix else 0
    there = {meta["path"][skipped:]: _entry_of(meta) for meta in found["objects"]}
    there.update((folder[skipped:].rstrip("/"), Entry(0, "")) for folder in found["common_prefixes"])
    there.pop("", None)  # the prefix itself, marked as a folder
    return there


def _entry_of(meta: Any) -> Entry:
    changed = meta["last_modified"].timestamp()  # 0 when the server does not tell
    return Entry(int(meta["size"]), meta["e_tag"] or (str(changed) if changed else ""))


class _Chunk(NamedTuple):
    """Some objects: their names one after another, and lengths of names and sizes, int64 both."""

    names: bytes
    lengths: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


def _list_objects(url: str) -> Objects:
    with explained(url):
        store, prefix = open_bucket(url)
        skipped = len(prefix) + 1 if prefix else 0

        def below(folder: str) -> list[_Chunk]:
            return [_chunk(answer, skipped) for answer in obstore.list(store, folder, chunk_size=_LISTED)]

        first = next(iter(obstore.list(store, prefix or None, chunk_size=_LISTED)), ())
        if any("/" in meta["path"][skipped:] for meta in first):
            # answers come one after another, so that many folders are listed sooner side by side
            top = obstore.list_with_delimiter(store, prefix or None)
            chunks = [_chunk(top["objects"], skipped)]
            with ThreadPoolExecutor(_LISTINGS) as pool:
                for listed in pool.map(below, top["common_prefixes"]):
                    chunks += listed
        else:
            chunks = [_chunk((), skipped), *below(prefix)]
    return Objects(
        names=b"".join(chunk.names for chunk in chunks),
        ends=np.cumsum(np.concatenate([chunk.lengths for chunk in chunks])),
        sizes=np.concatenate([chunk.sizes for chunk in chunks]),
    )


def _chunk(metas: Sequence[Any], skipped: int) -> _Chunk:
    found = [(meta["path"][skipped:], int(meta["size"])) for meta in metas]
    held = [(path.encode(), size) for path, size in found if size or "." in path.rpartition("/")[2]]
    return _Chunk(
        b"".join(name for name, _ in held),
        np.fromiter((len(name) for name, _ in held), np.int64, len(held)),
        np.fromiter((size for _, size in held), np.int64, len(held)),
    )


def _put(url: str, content: bytes, create_only: bool) -> bool:
    require_writable(url)
    with explained(url):
        store, key = open_bucket(url)
        if not create_only:
            obstore.put(store, key, content, use_multipart=len(content) > PART, chunk_size=PART)
            return True
        try:
            obstore.put(store, key, content, mode="create")
        except AlreadyExistsError:
            return False
        except BaseError as error:
            # a store that knows no conditions
            if not isinstance(error, NotSupportedError) and error_code(error) != "NotImplemented":
                raise
            if _size(url) is not None:
                return False
            obstore.put(store, key, content)
        return True


def _delete(url: str) -> None:
    require_writable(url)
    with explained(url):
        store, key = open_bucket(url)
        with suppress(FileNotFoundError):
            obstore.delete(store, key)


def _send_all(url: str, parts: Sequence[bytes]) -> None:
    with Upload(url) as upload:
        for part in parts:
            upload.write(part)
        upload.commit()


def _download(url: str, path: str) -> None:
    unfinished = f"{path}.{uuid.uuid4().hex}.part"
    try:
        file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise PackError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        try:
            with explained(url):
                _fetch(url, file)
        finally:
            os.close(file)
        os.rename(unfinished, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def _fetch(url: str, file: int) -> None:
    """The object into a file, by ranges, or by one request when it is small or the server knows none."""
    store, key = open_bucket(url)
    stored = split_url(url).scheme in WRITABLE
    try:
        if stored:
            _fetch_ranges(url, obstore.head(store, key), file)
            return
        answer = obstore.get(store, key)
        if answer.meta["size"] > PART:
            with suppress(NotSupportedError):
                _fetch_ranges(url, answer.meta, file)
                return
            answer = obstore.get(store, key)  # the first one has waited too long
        expected, at = int(answer.meta["size"]), 0
        for chunk in answer.stream(min_chunk_size=PART // 16):
            at += _write(file, memoryview(chunk), at, url)
        if at != expected:
            raise PackError(f"{shown(url)}: {at} of {expected} bytes came; the same command again continues")
    except FileNotFoundError as error:
        told: Exception = error
        if stored:
            try:
                obstore.get(
                    store, key
                )  # the answer to a HEAD has no body, which would tell of a missing bucket
            except FileNotFoundError as again:
                told = again
        if is_missing_bucket(told):
            raise told from None
        raise NoObjectError(f"{shown(url)}: no such object") from None


def _fetch_ranges(url: str, meta: Any, file: int) -> None:
    store, key = open_bucket(url)
    total, version = int(meta["size"]), meta["e_tag"]
    # web servers give weak tags, which match nothing
    condition = {"if_match": version} if version and split_url(url).scheme in WRITABLE else {}

    def copy(start: int) -> None:
        size = min(PART, total - start)
        options: Any = {"range": (start, start + size), **condition}
        answer = obstore.get(store, key, options=options)
        same = answer.meta["size"] == total and answer.meta["e_tag"] == version
        if not same or _write(file, memoryview(answer.bytes()), start, url) != size:
            raise PackError(f"{shown(url)}: has changed while it was read; run the same command again")

    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        for _ in pool.map(copy, range(0, total, PART)):
            pass


def _write(file: int, data: memoryview, at: int, url: str) -> int:
    done = 0
    try:
        while done < len(data):
            done += os.pwrite(file, data[done:], at + done)
    except OSError as error:
        raise PackError(f"{shown(url)}: cannot be kept on this machine ({error.strerror})") from None
    return done


def _abort_uploads(place: Place, suffixes: tuple[str, ...]) -> None:
    import boto3  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    prefix = f"{place.key}/" if place.key else ""
    with suppress(BotoCoreError, ClientError, ValueError):  # it is only to save room
        patience = Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2})
        client = boto3.session.Session().client("s3", config=patience)
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=place.bucket, Prefix=prefix)
        for upload in (upload for page in pages for upload in page.get("Uploads", ())):
            name = upload["Key"][len(prefix) :]
            if "/" not in name and name.endswith(suffixes):
                client.abort_multipart_upload(
                    Bucket=place.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )
