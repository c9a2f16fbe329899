"""The index of a shard made by anyone: what `shardify pack` knows when it writes one, read back from the shard itself.

The file is read once, front to back, in blocks that stay in the processor's cache while they are hashed, walked and looked into.
"""

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shardify.errors import FormatError, ImageError, RecordError
from shardify.format.hashing import hash_file
from shardify.format.names import RECORD_FIELD, TAR_ZST, is_image_field
from shardify.format.sidecar import ShardInfo, SidecarBuilder
from shardify.format.tar import padding
from shardify.format.walk import Entry, FileWindow, FrameWindow, walk
from shardify.format.zstd import read_frame, read_seek_table
from shardify.images.probe import probe
from shardify.records import Sample, parse_record


@dataclass(frozen=True, slots=True, eq=False)
class ScannedShard:
    """What `scan_shard` finds: the sidecar's rows, int64 [samples, 2] offset and size of each, and what else is known of the shard."""

    rows: SidecarBuilder
    spans: npt.NDArray[np.int64]
    info: ShardInfo


def scan_shard(path: str | os.PathLike[str], *, name: str, ahead: bool = False) -> ScannedShard:
    """Index a shard: neighbouring members of one key are a sample, as for webdataset.

    Old V7, ustar, GNU and PAX tars are read, long names too; ``.tar.zst`` when it has a seek table and no sample is divided between frames.
    Folders, links and names that belong to no sample (see `split_name`) are passed over. A sample's `record` is its number in the shard, its
    `source` the shard; `id`, `turns` and `words` are those of a LLaVA record in its ``json`` member, None and 0 without one. An image that
    cannot be read has the format of its extension, and width and height 0.

    Args:
        path: the shard.
        name: what the sidecar names as source.
        ahead: have a thread read ahead: faster when there is a core to spare.

    Raises:
        FormatError: it is no tar, damaged or cut off (with the byte where), or a sample has two members of one name.
    """
    where = os.fspath(path)
    rows = _Rows(where, name)
    try:
        with open(path, "rb", buffering=0) as file:
            if where.endswith(TAR_ZST):
                digest = _scan_frames(file, rows, where)
            else:
                digest = _scan_tar(file, rows, where, ahead=ahead)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise FormatError(f"{where}: cannot be read ({error.strerror or error})") from None
    return ScannedShard(
        rows.builder,
        np.array(rows.spans, np.int64).reshape(-1, 2),
        ShardInfo(bytes=size, xxh3_128=digest, tolerant=rows.tolerant),
    )


def _scan_tar(file: FileIO, rows: "_Rows", where: str, *, ahead: bool) -> str:
    with FileWindow(file, ahead=ahead) as window:
        rows.add(walk(window, where))
        rows.end()
        return window.digest.hexdigest()


def _scan_frames(file: FileIO, rows: "_Rows", where: str) -> str:
    table = read_seek_table(file, where=where)
    if table is None:
        raise FormatError(
            f"{where}: compressed as a whole, so that no sample can be read by itself; "
            f"`zstd -d {os.path.basename(where)}` makes a tar of it, which can be indexed"
        )
    marked = False
    starts = table.starts.tolist()
    for number, (at, end) in enumerate(pairwise(starts)):
        content = read_frame(file, table, number, where=where)
        if marked and any(content):
            raise FormatError(f"{where}: more follows the end-of-archive mark, in the frame at byte {at}")
        window = FrameWindow(content)
        divided = rows.key
        for entry in walk(window, f"{where}: frame at byte {at}"):
            key = entry[0]
            if key == divided:
                raise FormatError(
                    f"{where}: sample {key!r} is divided between frames, the second at byte {at}; "
                    f"`zstd -d {os.path.basename(where)}` makes a tar of it, which can be indexed"
                )
            if key != rows.key:
                rows.begin(key, at, end - at)
            divided = None
            rows.add((entry,))
        marked |= window.marked
    rows.end()
    if not marked:
        raise FormatError(f"{where}: cut off before the end-of-archive mark at byte {starts[-1]}")
    return hash_file(where)


class _Rows:
    """The rows as they become complete."""

    def __init__(self, where: str, source: str) -> None:
        self._where = where
        self._source = source
        self._begin = self._size = self._end = 0
        self._fields: set[str] = set()
        self._sample: Sample | None = None
        self.key: str | None = None
        self.builder = SidecarBuilder()
        self.spans = array("q")
        self.tolerant: list[int] = []

    def begin(self, key: str, offset: int, size: int = 0) -> None:
        """End a row and begin the next: its sample's key, where it begins, and how long it is where that is known (a frame)."""
        self.end()
        self.key, self._begin, self._size = key, offset, size
        self._fields.clear()
        self._sample = None

    def add(self, entries: Iterable[Entry]) -> None:
        """Add members of this sample, and of those that follow."""
        fields, add_member = self._fields, self.builder.add_member
        for key, field, begin, offset, size, data, digest in entries:
            if key != self.key:
                self.begin(key, begin)
            if field in fields:
                raise FormatError(
                    f"{self._where}: two members {key}.{field}, the second at byte {begin}; keys of neighbouring samples must differ"
                )
            fields.add(field)
            add_member(field, offset, size, digest)
            if field == RECORD_FIELD:
                self._sample = _read_record(data)
            elif _is_image(field):
                self.builder.add_image(field, *_look_into(field, data))
            self._end = offset + size + padding(size)

    def end(self) -> None:
        """The row is complete, if there is one."""
        if self.key is None:
            return
        sample = self._sample
        number = len(self.builder)
        if sample is None:
            self.builder.end_row(self.key, None, number, 0, 0, self._source)
        else:
            if not sample.strict:
                self.tolerant.append(number)
            self.builder.end_row(self.key, sample.id, number, len(sample.turns), sample.words, self._source)
        self.spans.append(self._begin)
        self.spans.append(self._size or self._end - self._begin)
        self.key = None


_is_image = lru_cache(maxsize=1024)(is_image_field)


def _read_record(data: memoryview) -> Sample | None:
    """A LLaVA record; None for any other JSON."""
    content = bytes(data)
    if b"conversations" not in content and b"\\u" not in content:
        return None  # seen at a glance, unless the name is written in escapes
    try:
        return parse_record(content)
    except RecordError:
        return None


def _look_into(field: str, data: memoryview) -> tuple[str, int, int]:
    """An image's format, width and height."""
    try:
        header = probe(data, check="none")  # what is cut off has a size nevertheless
    except ImageError:
        return field.rpartition(".")[2].lower(), 0, 0
    return header.format, header.width, header.height
