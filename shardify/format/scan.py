"""The index of a shard made by anyone: what `shardify pack` knows when it writes one, read back from the shard itself.

The file is read once, front to back, in blocks that stay in the processor's cache while they are hashed, walked and looked into.
"""

import os
from array import array
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from itertools import chain, islice, pairwise
from operator import eq

import numpy as np
import numpy.typing as npt

from shardify.errors import FormatError, ImageError, RecordError
from shardify.format.hashing import hash_file
from shardify.format.headers import BLOCK
from shardify.format.mapped import MappedWindow
from shardify.format.names import RECORD_FIELD, TAR_ZST, is_image_field
from shardify.format.sidecar import ShardInfo, SidecarBuilder
from shardify.format.walk import FileWindow, FrameWindow, Run, walk
from shardify.format.zstd import read_frame, read_seek_table
from shardify.images.probe import measure_image, measure_jpegs
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
            size = os.fstat(file.fileno()).st_size
            if where.endswith(TAR_ZST):
                digest = _scan_frames(file, rows, where)
            else:
                digest = _scan_tar(file, rows, where, mapped=mapped)
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
_FEW = 8  # samples that are not worth being looked at together
_MANY = 64  # images whose headers numpy reads faster than Python


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
        self._before = self._members = self._images = 0  # members of earlier runs, and of rows
        self._ended: list[tuple[str, str | None, int, int, int, int]] = []
        self.key: str | None = None
        self.builder = SidecarBuilder()
        self.spans = array("q")
        self.tolerant: list[int] = []

    def add(self, run: Run, *, frame: tuple[int, int] | None = None) -> None:
        """Add members of this sample, and of those that follow; `frame` is where they lie and how many bytes, in a compressed shard."""
        alike = _samples_alike(run, self.key)
        self._add_one_by_one(run, 0, alike.start, frame)
        if len(alike):
            self._end_row()
            self._give_rows()
            self._add_alike(run, alike, frame)
            self.key = None  # all of them are complete
        self._add_one_by_one(run, alike.stop, len(run.keys), frame)
        self._before += len(run.keys)
        self.builder.add_members(run.fields, run.offsets, run.sizes, run.digests)
        self._give_rows()

    def _add_one_by_one(self, run: Run, begin: int, end: int, frame: tuple[int, int] | None) -> None:
        """The members from `begin` to `end` of a run."""
        fields, key, found = self._fields, self.key, []
        some = slice(begin, end)
        for number, (this, field, data) in enumerate(
            zip(run.keys[some], run.fields[some], run.data[some], strict=True), begin
        ):
            if this != key:
                if number > begin:
                    self._members, self._end = self._before + number, run.end(number - 1)
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
                self._record = _measured(data)
            elif _is_image(field):
                found.append((field, *_look_into(field, data)))
                self._images += 1
        if end > begin:
            self._members, self._end = self._before + end, run.end(end - 1)
        if found:
            self.builder.add_images(*map(list, zip(*found, strict=True)))

    def _add_alike(self, run: Run, alike: range, frame: tuple[int, int] | None) -> None:
        """Whole samples with the same fields, from one of which to the next are `alike.step` members: column by column."""
        count, step = len(alike), alike.step
        columns = [slice(alike.start + number, alike.stop, step) for number in range(step)]
        fields = run.fields[alike.start : alike.start + step]
        records, found = [_NO_RECORD] * count, []
        for field, column in zip(fields, columns, strict=True):
            if field == RECORD_FIELD:
                records = [_measured(data) for data in run.data[column]]
            elif _is_image(field):
                found.append(_look_into_all(field, run, column))
        if found:
            by_sample = chain.from_iterable(zip(*found, strict=True))
            self.builder.add_images(*map(list, zip(*by_sample, strict=True)))
        first, images = len(self.builder), len(found)
        ids, turns, words, strict = map(list, zip(*records, strict=True))
        self.tolerant += [first + number for number, was in enumerate(strict) if not was]
        members = self._before + alike.start
        self.builder.add_rows(
            run.keys[columns[0]],
            ids,
            turns,
            words,
            list(range(members + step, members + count * step + 1, step)),
            list(range(self._images + images, self._images + count * images + 1, images))
            if images
            else [self._images] * count,
            source=self._source,
        )
        self._images += count * images
        if frame is not None:
            self.spans.extend(frame * count)
            return
        begins = np.array(run.begins[columns[0]], np.int64)
        sizes = np.array(run.sizes[columns[-1]], np.int64)
        ends = np.array(run.offsets[columns[-1]], np.int64) + sizes + -sizes % BLOCK
        self.spans.frombytes(np.stack((begins, ends - begins), axis=1).tobytes())

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


def _samples_alike(run: Run, key: str | None) -> range:
    """Where samples begin in a run that have the same fields as the first that begins there, and are complete; empty for a few.

    A sample is complete when another one follows. `key` is that of the sample under way.
    """
    keys, fields, total = run.keys, run.fields, len(run.keys)
    begin = next((number for number, this in enumerate(keys) if this != key), total)
    step = next((number for number in range(1, total - begin) if keys[begin + number] != keys[begin]), 0)
    count = (total - begin - 1) // step if step else 0
    end = begin + count * step
    first = keys[begin:end:step] if step else []
    alike = (
        count >= _FEW
        and len(set(fields[begin : begin + step])) == step
        and keys[end] != first[-1]
        and not any(map(eq, first, islice(first, 1, None)))
        and all(
            fields[begin + number : end : step].count(fields[begin + number]) == count
            and keys[begin + number : end : step] == first
            for number in range(step)
        )
    )
    return range(begin, end, step) if alike else range(begin, begin)


def _measured(data: memoryview) -> Measured:
    try:
        return measure_record(data)
    except RecordError:  # any other JSON
        return _NO_RECORD


_is_image = lru_cache(maxsize=1024)(is_image_field)


def _look_into_all(field: str, run: Run, column: slice) -> list[tuple[str, str, int, int]]:
    """Field, format, width and height of each image in a column of a run."""
    data = run.data[column]
    sizes: list[list[int]] = [[0, 0]] * len(data)
    if len(data) >= _MANY:
        begins = np.array(run.offsets[column], np.int64) - run.base
        sizes = measure_jpegs(run.view, begins, begins + np.array(run.sizes[column], np.int64)).tolist()
    return [
        (field, "jpg", width, height) if width else (field, *_look_into(field, image))
        for image, (width, height) in zip(data, sizes, strict=True)
    ]


def _look_into(field: str, data: memoryview) -> tuple[str, int, int]:
    """An image's format, width and height."""
    try:
        return measure_image(data)  # what is cut off has a size nevertheless
    except ImageError:
        return field.rpartition(".")[2].lower(), 0, 0
