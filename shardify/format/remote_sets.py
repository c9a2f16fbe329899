"""What open_shards asks of stores: a folder's manifest or listing, and which shards made by others are there with their sidecars.

Each question is put by one child process, many requests at once.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shardify.errors import FormatError
from shardify.format.child import in_child
from shardify.format.copies import RemoteFile, local_copies
from shardify.format.manifest import Manifest, decode_manifest
from shardify.format.names import MANIFEST, SHARD_ENDINGS, WORK_FOLDER, sidecar_name
from shardify.format.sidecar import is_sidecar
from shardify.format.urls import WRITABLE, join_url, shown, split_name, split_url

_AT_ONCE = 16  # requests under way
_MAX_MANIFEST_BYTES = 1024**3

_Known = (
    tuple[int, str] | None
)  # bytes and version of an object (`objects.Entry`, which its module would bring along), None when it is not there


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """What a URL of a folder stands for.

    Attributes:
        manifest: its manifest; None when it has none.
        shards: the tars directly below it, sorted; None when there is a manifest, or when the place cannot be listed.
    """

    manifest: Manifest | None
    shards: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class ForeignShard:
    """A shard without manifest.

    Attributes:
        bytes: its size; None when it is not there.
        sidecar: the URL of its sidecar.
        copy: a local copy of that; None when it is not there.
    """

    bytes: int | None
    sidecar: str
    copy: str | None


def read_folders(urls: Sequence[str]) -> dict[str, RemoteFolder]:
    """What folders' URLs stand for.

    Raises:
        FormatError: a manifest is damaged, or packing was not finished.
        PackError: a store cannot be reached or refuses.
    """
    return (
        {
            url: _as_folder(url, content, names)
            for url, (content, names) in zip(urls, in_child(_ask_folders, urls), strict=True)
        }
        if urls
        else {}
    )


def find_foreign(urls: Sequence[str]) -> dict[str, ForeignShard]:
    """Whether shards made by others are there, and copies of their sidecars.

    Raises:
        FormatError: a sidecar is not to be had, or cannot be kept here.
        PackError: a store cannot be reached or refuses.
    """
    sidecars = [_beside(url) for url in urls]
    known = in_child(_ask_objects, [*urls, *sidecars])
    tars, beside = known[: len(urls)], known[len(urls) :]
    there = [
        RemoteFile(url, version=version and f"{size} {version}")
        for url, (size, version) in (
            (url, found) for url, found in zip(sidecars, beside, strict=True) if found
        )
    ]
    copies = {
        file.url: path for file, path in zip(there, local_copies(there), strict=True) if is_sidecar(path)
    }
    return {
        url: ForeignShard(tar and tar[0], sidecar, copies.get(sidecar))
        for url, tar, sidecar in zip(urls, tars, sidecars, strict=True)
    }


def _beside(url: str) -> str:
    folder, name = split_name(url)
    return join_url(folder, sidecar_name(name))


def _as_folder(url: str, content: bytes | None, names: Iterable[str] | None) -> RemoteFolder:
    if content is not None:
        return RemoteFolder(decode_manifest(content, where=shown(join_url(url, MANIFEST))), None)
    if names is None:
        return RemoteFolder(None, None)
    if WORK_FOLDER in names:
        raise FormatError(
            f"{shown(url)}: packing was not finished; run the same `shardify pack` again to continue it"
        )
    return RemoteFolder(None, tuple(sorted(name for name in names if name.endswith(SHARD_ENDINGS))))


def _ask_folders(urls: Sequence[str]) -> list[tuple[bytes | None, list[str] | None]]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(_ask_folder, urls))


def _ask_folder(url: str) -> tuple[bytes | None, list[str] | None]:
    from shardify.format import objects

    content = objects.get(join_url(url, MANIFEST), most=_MAX_MANIFEST_BYTES)
    if content is not None or split_url(url).scheme not in WRITABLE:
        return content, None
    return None, list(objects.sizes(url))


def _ask_objects(urls: Sequence[str]) -> list[_Known]:
    """What is known of each: by one listing of its folder where the store can list, else by a request of its own."""
    from shardify.format import objects

    places = [split_name(url) for url in urls]
    listable = sorted({folder for folder, _ in places if split_url(folder).scheme in WRITABLE})
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        listings = dict(zip(listable, pool.map(objects.entries, listable), strict=True))

        def ask(number: int) -> _Known:
            folder, name = places[number]
            found = listings[folder].get(name) if folder in listings else objects.entry(urls[number])
            return None if found is None else (found.size, found.version)

        return list(pool.map(ask, range(len(urls))))
