"""Local copies of a remote data set's small files, in the user's cache folder: indexes, sidecars, manifests.

    ~/.cache/shardify/remote/IDENTITY/index.npy

The identity is the hash of the content where a manifest has it, else one of the URL and what the store tells of its version. A copy has its
name only when it is whole and checked. One process of a machine makes it, the others wait for it and use it.
"""

import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import xxhash

from shardify.errors import FormatError
from shardify.format.child import in_child
from shardify.format.files import locked, replacing, user_cache
from shardify.format.hashing import MAX_HASHED_BYTES, hash_file
from shardify.format.index import has_digest, read_index
from shardify.format.names import MANIFEST
from shardify.format.urls import is_url, shown, split_name

_AT_ONCE = 16  # copies under way
_TRIES = 3  # where another content comes than was written: it may have changed on its way
_ABANDONED = (
    3600  # seconds after which what a killed process has left is removed; one at work writes all the time
)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to be had as a local copy.

    Attributes:
        url: where it is.
        xxh3_128: of its content, hexadecimal; empty when that is not known.
        version: what the store tells of it (`objects.Entry.version` and the size); empty when that is not known.
        samples: for an index, how many it must begin with; it may have grown since its manifest was written.
    """

    url: str
    xxh3_128: str = ""
    version: str = ""
    samples: int | None = None


def local_copy(place: str) -> str:
    """A small file of a data set as a local one; see `local_copies`."""
    return local_copies([place])[0]


def local_copies(places: Sequence[str | RemoteFile]) -> list[str]:
    """Small files of data sets as local ones. Copies are made by one child process, several at once, and used again the next time.

    Args:
        places: paths, which stand for themselves, URLs, and URLs with what is known of them. The copy of a bare URL is used again when the
            store says that it has not changed, and made anew when the store says nothing.

    Returns:
        A path for each.

    Raises:
        FormatError: a file is missing, is not what is known of it, or cannot be kept here.
        PackError: a store cannot be reached or refuses.
    """
    files = [RemoteFile(place) if isinstance(place, str) else place for place in places]
    paths = [_kept(file) if is_url(file.url) else file.url for file in files]
    missing = [file for file, path in zip(files, paths, strict=True) if path is None]
    made = iter(in_child(_make_all, missing) if missing else ())
    return [next(made) if path is None else path for path in paths]


def is_kept(file: RemoteFile) -> bool:
    """Whether there is a copy already, as far as that can be said without asking a store."""
    return _kept(file) is not None


def _kept(file: RemoteFile) -> str | None:
    """The copy of a file of which enough is known, when there is one."""
    path = _path(file)
    return path if path is not None and os.path.exists(path) and _is_it(file, path) else None


def _path(file: RemoteFile) -> str | None:
    """Where its copy has its place; None when too little is known of it."""
    identity = file.xxh3_128
    if not identity and file.version:
        identity = xxhash.xxh3_128_hexdigest(f"{file.url}\0{file.version}".encode())
    return os.path.join(_folder(), identity, split_name(file.url)[1]) if identity else None


def _folder() -> str:
    return os.path.join(user_cache(), "shardify", "remote")


def _is_it(file: RemoteFile, path: str, *, passing: bool = True) -> bool:
    """Whether a copy is what is known of the file; in passing, a large one is not hashed."""
    try:
        if passing and os.path.getsize(path) > MAX_HASHED_BYTES:
            return file.samples is None or len(read_index(path, samples=file.samples)) == file.samples
        if file.samples is not None:
            return has_digest(read_index(path, samples=file.samples), path, file.xxh3_128)
        return not file.xxh3_128 or hash_file(path) == file.xxh3_128
    except (FormatError, OSError):
        return False


def _make_all(files: Sequence[RemoteFile]) -> list[str]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_make, files))


def _make(file: RemoteFile) -> str:
    """In a process that may call stores: the copy, made unless another process has just made it."""
    from shardify.format import objects

    if not file.xxh3_128 and not file.version:
        found = objects.entry(file.url)
        if found is None:
            raise FormatError(f"{shown(file.url)}: no such file")
        file = replace(file, version=found.version and f"{found.size} {found.version}")
    # what the store says nothing of is never taken for the same again
    path = _path(file) or os.path.join(_folder(), uuid.uuid4().hex, split_name(file.url)[1])
    folder = os.path.dirname(path)
    try:
        os.makedirs(folder, exist_ok=True)
        with locked(folder):
            if _kept(file) is None:
                _remove_abandoned(folder)
                with replacing(path) as temporary:
                    _download(file, temporary)
    except OSError as error:
        raise FormatError(
            f"{path}: the copy of {shown(file.url)}: {error.strerror}; set XDG_CACHE_HOME to a writable folder"
        ) from None
    return path


def _download(file: RemoteFile, path: str) -> None:
    from shardify.format import objects

    for _ in range(_TRIES):
        try:
            objects.download(file.url, path)
        except objects.NoObjectError:
            raise FormatError(f"{shown(file.url)}: no such file; copy or pack the data set again") from None
        if _is_it(file, path, passing=False):
            break
    else:
        raise FormatError(
            f"{shown(file.url)}: not the file that {MANIFEST} names (its hash differs); if the data set is being written, try again when that "
            "is done, else copy or pack it again"
        )
    with open(path, "rb") as copy:
        os.fsync(copy.fileno())


def _remove_abandoned(folder: str) -> None:
    before = time.time() - _ABANDONED
    for entry in os.scandir(folder):
        if entry.name.endswith((".tmp", ".part")):
            with suppress(FileNotFoundError):
                if entry.stat().st_mtime < before:
                    os.unlink(entry.path)
