"""Fetching one extent: range, check, block; and the hashes to check against, from the shard's sidecar."""

import io
import mmap
import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import xxhash

from loaders.fetch.blocks import (
    FOOTER_BYTES,
    Extent,
    Fault,
    end_block,
    is_whole,
    shard_identity,
    write_fully,
)
from loaders.fetch.cache import BlockCache, Claim, Want
from loaders.fetch.requests import Requests, WrongBytesError
from loaders.fetch.verify import Hashes, check
from shardify.errors import FormatError, LoaderError
from shardify.format.names import MANIFEST
from shardify.format.samples import is_compressed
from shardify.format.sidecar import read_shard_info
from shardify.format.urls import is_url, shown

_TABLES_BYTES = 64 * 1024 * 1024  # of hashes kept in memory
_TRIES = 3  # for a sidecar that cannot be read


@dataclass(frozen=True, slots=True)
class Source:
    """Where a shard and its sidecar lie, and how large the shard is; `identity` stands for its content in names."""

    url: str
    sidecar: str | None
    size: int
    identity: str


class ExtentFetcher:
    """Fetches extents into claimed blocks; thread-safe.

    Args:
        sources: the shards.
        cache: where blocks go.
        requests: to the stores.
        note: tells the user something once: a topic, and a line.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        cache: BlockCache,
        requests: Requests,
        note: Callable[[str, str], None],
    ) -> None:
        self._sources = sources
        self._cache = cache
        self._requests = requests
        self._tables = _Tables(sources, cache, requests, note)

    def fetch(self, extent: Extent, name: str, *, whole: bool) -> int:
        """Fetch, check and publish one claimed block; gives the samples in it, 0 when that is not known.

        Bytes that differ from what was written are fetched again. When the same come twice, and others of the extent are right, they are what the
        store holds: the block is published with them as its faults.

        Args:
            extent: its bytes.
            name: of the block.
            whole: the extent is a whole shard, of a server that gives no ranges.

        Raises:
            LoaderError: it cannot be had in time, or ever.
            NoRangesError: the server gives no ranges.
        """
        self._requests.begin()
        source = self._sources[extent.shard]
        hashes = self._tables.of(extent.shard)
        if self._cache.recall(name):
            samples = 0 if hashes is None else hashes.count(extent.begin, extent.end)
            self._cache.publish(name, samples=samples)
            return samples
        digests: list[bytes] = []

        def judged(data: memoryview) -> tuple[int, list[Fault]]:
            samples, faults = check(data, extent.begin, hashes, compressed=is_compressed(source.url))
            if faults:
                digests.append(xxhash.xxh3_128_digest(data))
                wrong = sum(fault.end - fault.begin for fault in faults)
                if wrong >= len(data) or digests[-1] not in digests[:-1]:
                    raise WrongBytesError(f"wrong bytes came: at byte {faults[0].begin}, {faults[0].detail}")
            return samples, faults

        def by_range() -> tuple[int, list[Fault]]:
            data = self._requests.get_range(source.url, extent.begin, extent.end)
            samples, faults = judged(data)
            with _new_file(self._cache, name) as file:
                write_fully(file, data)
                end_block(file, name, data, faults)
            return samples, faults

        def by_stream() -> tuple[int, list[Fault]]:
            with _new_file(self._cache, name) as file:
                self._requests.stream(source.url, extent.end, lambda data: write_fully(file, data))
                data = memoryview(mmap.mmap(file, extent.end, prot=mmap.PROT_READ))
                samples, faults = judged(data)
                end_block(file, name, data, faults)
            return samples, faults

        what = "" if whole else f", bytes {extent.begin}-{extent.end - 1},"
        samples, faults = self._requests.repeat(source.url, what, by_stream if whole else by_range)
        self._cache.publish(name, samples=samples, faulty=bool(faults))
        return samples


class _Tables:
    """The hashes of shards: in memory, in the cache, or else from the sidecars."""

    def __init__(
        self,
        sources: Sequence[Source],
        cache: BlockCache,
        requests: Requests,
        note: Callable[[str, str], None],
    ) -> None:
        self._sources, self._cache, self._requests, self._note = sources, cache, requests, note
        self._mutex = threading.Lock()
        self._busy: dict[int, threading.Lock] = defaultdict(threading.Lock)
        self._kept: OrderedDict[int, Hashes | None] = OrderedDict()
        self._bytes = 0

    def of(self, shard: int) -> Hashes | None:
        """The hashes of a shard; None when there is no sidecar to have them from."""
        with self._mutex:
            busy = self._busy[shard]
        with busy:
            with self._mutex:
                if shard in self._kept:
                    self._kept.move_to_end(shard)
                    return self._kept[shard]
            table = self._find(shard)
            with self._mutex:
                self._kept[shard] = table
                self._bytes += _nbytes(table)
                while self._bytes > _TABLES_BYTES and len(self._kept) > 1:
                    self._bytes -= _nbytes(self._kept.popitem(last=False)[1])
            return table

    def _find(self, shard: int) -> Hashes | None:
        source = self._sources[shard]
        name = f"{source.identity}-hashes"
        path = self._cache.path(name)
        if is_whole(path, name):
            with suppress(OSError), open(path, "rb") as file:
                return Hashes.decode(file.read()[:-FOOTER_BYTES])
        if source.sidecar is None:
            return None
        table = self._read(source, source.sidecar)
        if table is not None and is_url(source.sidecar):
            self._keep(name, table.encode())
        return table

    def _read(self, source: Source, sidecar: str) -> Hashes | None:
        error: FormatError | None = None
        for _ in range(_TRIES):
            if is_url(sidecar):
                content = self._requests.get(sidecar)
            else:
                try:
                    with open(sidecar, "rb") as file:
                        content = file.read()
                except OSError:
                    content = None
            if content is None:
                self._note(
                    "sidecar",
                    f"{shown(sidecar)}: there is no such sidecar, so that of what is fetched only headers and lengths can be checked",
                )
                return None
            try:
                _check_owner(source, content, where=shown(sidecar))
                return Hashes.of_sidecar(content, where=shown(sidecar))
            except FormatError as damaged:
                error = damaged
        raise LoaderError(f"{error}; sidecars have the hashes that shards are checked against")

    def _keep(self, name: str, content: bytes) -> None:
        (claim,) = self._cache.claim([Want(name, len(content) + FOOTER_BYTES)], 1)
        if claim is Claim.MINE:
            if not self._cache.recall(name):
                with _new_file(self._cache, name) as file:
                    write_fully(file, memoryview(content))
                    end_block(file, name, memoryview(content), [])
            self._cache.publish(
                name, samples=0
            )  # and stays pinned: small, and of use for as long as its shard is


def _check_owner(source: Source, sidecar: bytes, *, where: str) -> None:
    """Raises FormatError unless a sidecar is that of the shard which the manifest describes: nothing else vouches for a manifest that came by network."""
    info = read_shard_info(where, file=io.BytesIO(sidecar))
    if source.identity not in (
        shard_identity(source.url, info.bytes, digest) for digest in (info.xxh3_128, "")
    ):
        raise FormatError(
            f"{where}: not the sidecar of {shown(source.url)} as it was opened: the data set has changed, or its {MANIFEST} came damaged; "
            "start again, or copy the data set again"
        )


@contextmanager
def _new_file(cache: BlockCache, name: str) -> Iterator[int]:
    path = cache.loading_path(name)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            yield file
        finally:
            os.close(file)
    except OSError as error:
        if error.errno is None:  # obstore's, not the disk's
            raise
        raise LoaderError(f"the cache cannot be written: {path}: {error.strerror or error}") from None


def _nbytes(table: Hashes | None) -> int:
    return 0 if table is None else table.nbytes
