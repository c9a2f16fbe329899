"""The index of a shard made by anyone: what `shardify pack` knows when it writes one, read back from the shard itself.

The file is read once, front to back, in blocks that stay in the processor's cache while they are hashed, walked and looked into.
"""

import os
from array import array
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from shardify.errors import FormatError, ImageError, RecordError
from shardify.format.hashing import hash_file
from shardify.format.mapped import MappedWindow
from shardify.format.names import RECORD_FIELD, TAR_ZST, is_image_field
from shardify.format.sidecar import ShardInfo, SidecarBuilder
from shardify.format.walk import FileWindow, FrameWindow, Run, walk
from shardify.format.zstd import read_frame, read_seek_table
from shardify.images.probe import measure_image
from shardify.records import Measured, measure_record


@dataclass(frozen=True, slots=True, eq=False)
class ScannedShard:
    """What `scan_shard` finds: the sidecar's rows, int64 [samples, 2] offset and size of each, and what else is known of the shard."""

    rows: SidecarBuilder
    spans: npt.NDArray[np.int64]
    info: ShardInfo


def scan_shard(path: str | os.PathLike[str], *, name: str, mapped: bool = False) -> ScannedShard:
    """Index a shard: neighbouring members of one key are a sample, as for webdataset.

    Old V7, ustar, GNU and PAX tars are read, long names too; ``.tar.zst`` when it has a seek table and no sample is divided between frames.
    Folders, links and names that belong to no sample (see `split_name`) are passed over. A sample's `record` is its number in the shard, its
    `source` the shard; `id`, `turns` and `words` are those of a LLaVA record in its ``json`` member, None and 0 without one. An image that
    cannot be read has the format of its extension, and width and height 0.

    Args:
        path: the shard.
        name: what the sidecar names as source.
        mapped: map the file into memory, which takes half the time. When it is cut meanwhile, SIGBUS ends the process.

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
                digest = _scan_tar(file, rows, where, mapped=mapped)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise FormatError(f"{where}: cannot be read ({error.strerror or error})") from None
    return ScannedShard(
        rows.builder,
        np.array(rows.spans, np.int64).reshape(-1, 2),
        ShardInfo(bytes=size, xxh3_128=digest, tolerant=rows.tolerant),
    )


def _scan_tar(file: FileIO, rows: "_Rows", where: str, *, mapped: bool) -> str:
    window = _open_window(file, mapped=mapped)
    try:
        for run in walk(window, where):
            rows.add(run)
    finally:
        window.close()
    rows.end()
    return window.digest.hexdigest()


def _open_window(file: FileIO, *, mapped: bool) -> MappedWindow | FileWindow:
    if mapped:
        with suppress(OSError):
            return MappedWindow(file)
    return FileWindow(file)


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
        for count, run in enumerate(walk(window, f"{where}: frame at byte {at}")):
            if not count and run.keys[0] == rows.key:
                raise FormatError(
                    f"{where}: sample {rows.key!r} is divided between frames, the second at byte {at}; "
                    f"`zstd -d {os.path.basename(where)}` makes a tar of it, which can be indexed"
                )
            rows.add(run, frame=(at, end - at))
        marked |= window.marked
    rows.end()
    if not marked:
        raise FormatError(f"{where}: cut off before the end-of-archive mark at byte {starts[-1]}")
    return hash_file(where)


_NO_RECORD: Measured = (None, 0, 0, True)


class _Rows:
    """The rows as they become complete.

    Attributes:
        key: of the sample whose row is not complete yet; None when there is none.
    """

    def __init__(self, where: str, source: str) -> None:
        self._where = where
        self._source = source
        # of the row that is not complete yet
        self._fields: set[str] = set()
        self._begin = self._end = 0
        self._frame: tuple[int, int] | None = None
        self._record = _NO_RECORD
        # of all so far
        self._members = self._images = 0
        self._ended: list[tuple[str, str | None, int, int, int, int]] = []
        self.key: str | None = None
        self.builder = SidecarBuilder()
        self.spans = array("q")
        self.tolerant: list[int] = []

    def add(self, run: Run, *, frame: tuple[int, int] | None = None) -> None:
        """Add members of this sample, and of those that follow; `frame` is where they lie and how many bytes, in a compressed shard."""
        fields, key, before, found = self._fields, self.key, self._members, []
        for number, (this, field, data) in enumerate(zip(run.keys, run.fields, run.data, strict=True)):
            if this != key:
                if number:
                    self._members, self._end = before + number, run.end(number - 1)
                self._end_row()
                self.key = key = this
                self._begin, self._frame = run.begins[number], frame
            elif field in fields:
                raise FormatError(
                    f"{self._where}: two members {key}.{field}, the second at byte {run.begins[number]}; "
                    "keys of neighbouring samples must differ"
                )
            fields.add(field)
            if field == RECORD_FIELD:
                with suppress(RecordError):  # any other JSON
                    self._record = measure_record(data)
            elif _is_image(field):
                found.append((field, *_look_into(field, data)))
                self._images += 1
        self._members, self._end = before + len(run.keys), run.end(-1)
        self.builder.add_members(run.fields, run.offsets, run.sizes, run.digests)
        if found:
            self.builder.add_images(*map(list, zip(*found, strict=True)))
        self._give_rows()

    def end(self) -> None:
        """The row is complete, if there is one, and was the last."""
        self._end_row()
        self._give_rows()
        self.key = None

    def _end_row(self) -> None:
        if self.key is None:
            return
        id_, turns, words, strict = self._record
        if not strict:
            self.tolerant.append(len(self.builder) + len(self._ended))
        self._ended.append((self.key, id_, turns, words, self._members, self._images))
        self.spans.extend(self._frame or (self._begin, self._end - self._begin))
        self._fields.clear()
        self._record = _NO_RECORD

    def _give_rows(self) -> None:
        if self._ended:
            self.builder.add_rows(*map(list, zip(*self._ended, strict=True)), source=self._source)
            self._ended.clear()


_is_image = lru_cache(maxsize=1024)(is_image_field)


def _look_into(field: str, data: memoryview) -> tuple[str, int, int]:
    """An image's format, width and height."""
    try:
        return measure_image(data)  # what is cut off has a size nevertheless
    except ImageError:
        return field.rpartition(".")[2].lower(), 0, 0
