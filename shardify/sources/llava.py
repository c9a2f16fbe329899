"""LLaVA record files, split into raw record slices: a JSON array of objects, or JSONL with one object a line.

No Python object is built for what a record holds; a record is read later, from its own bytes. Two splitters agree on every sound file:
msgspec walks an array at about 1 GB/s, and a tolerant scanner takes over when msgspec refuses the file. The scanner follows only quotes,
brackets and commas, so a NaN, a lone surrogate, a byte order mark or a record that is no JSON at all stays that one record's problem.
"""

import mmap
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from shardify.errors import RecordError, SourceError, UsageError
from shardify.records import MAX_RECORD_BYTES, json_type, load_record
from shardify.sources.spec import Embedded

_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"
_SEPARATOR = re.compile(rb"[ \t\r\n]*,?[ \t\r\n]*")
_CHUNK = 8 * 1024 * 1024
_LINES_TRIED = 1000

_BACKSLASH = ord("\\")
_QUOTE, _OPEN, _CLOSE, _COMMA = 1, 2, 3, 4
_KIND = np.zeros(256, dtype=np.uint8)
_KIND[ord('"')] = _QUOTE
_KIND[[ord("{"), ord("[")]] = _OPEN
_KIND[[ord("}"), ord("]")]] = _CLOSE
_KIND[ord(",")] = _COMMA
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[list(_SPACE)] = True

_Offsets = npt.NDArray[np.int64]


Stamp: TypeAlias = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class RecordFile:
    """A record file and where its records lie.

    Attributes:
        path: where it is.
        name: what it is called in every output; never absolute.
        offsets: int64 [n], first byte of each record.
        lengths: int64 [n], bytes of each record, without white space around it.
        fingerprint: xxh3_128 of the content, hexadecimal.
        stamp: device, inode, size and time of change when it was split; another file of this name has others.
        embedded: images that came with the records.
        notes: note code -> int64, the numbers of the records that it holds for: what only the source knows.
    """

    path: str
    name: str
    offsets: _Offsets
    lengths: _Offsets
    fingerprint: str
    stamp: Stamp
    embedded: Embedded | None = None
    notes: Mapping[str, _Offsets] = field(default_factory=dict)


def open_unchanged(path: str, stamp: Stamp) -> int:
    """A descriptor of a record file that is still the one that was split.

    Raises:
        SourceError: it has gone or changed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read any more ({error.strerror})") from None
    if _stamp(descriptor) != stamp:
        os.close(descriptor)
        raise SourceError(
            f"{path}: has changed since packing began; finished shards hold what it said before. With that content the same "
            "command again continues, the new content needs another --out"
        )
    return descriptor


def file_stamp(path: str) -> Stamp:
    """The stamp of a file as it is now."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _stamp(descriptor)
    finally:
        os.close(descriptor)


def _stamp(descriptor: int) -> Stamp:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def record_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What record files are called in the output: their paths relative to the folder they have in common.

    Raises:
        UsageError: a file is given twice.
    """
    resolved = [os.path.realpath(path) for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise UsageError(f"{os.fspath(paths[number])}: given twice; every record would be packed twice")
    # a URL is below its bucket or host, wherever the command is run
    whole = [
        os.path.abspath("/" + os.fspath(path).partition("://")[2] if "://" in os.fspath(path) else path)
        for path in paths
    ]
    common = os.path.commonpath([os.path.dirname(path) for path in whole]) if whole else ""
    names = [os.path.relpath(path, common) for path in whole]
    return [os.fsencode(name).decode("utf-8", "replace") for name in names]


def split_records(
    path: str | os.PathLike[str], *, name: str | None = None, called: str | None = None
) -> RecordFile:
    """Split a record file.

    Args:
        path: a JSON array, or JSONL; told apart by their first byte, lines that are lists of messages by their second.
        name: what the file is called in every output; default its base name.
        called: what it is called in errors, where `path` is only a copy; default `path`.

    Raises:
        SourceError: the file cannot be read, is not JSON (with the byte offset of the fault), or is JSON but no list of records.
    """
    path = os.fspath(path)
    name = os.path.basename(path) if name is None else name
    called = path if called is None else called
    try:
        # without waiting for a pipe's other end
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            stamp = _stamp(file.fileno())
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SourceError(
                    f"{called}: a pipe or device; a file is needed, since it is read more than once"
                )
            if not stamp[2]:
                raise SourceError(f"{called}: the file is empty; a JSON array or JSONL is needed")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise SourceError(f"{called}: no such file") from None
    except IsADirectoryError:
        raise SourceError(f"{called}: a folder; a JSON or JSONL file is needed") from None
    except OSError as error:
        raise SourceError(f"{called}: cannot be read ({error.strerror})") from None
    # never closed by hand: an error's traceback may still hold arrays over it
    offsets, lengths = _split(content, called)
    return RecordFile(path, name, offsets, lengths, _fingerprint(content), stamp)


def _fingerprint(content: mmap.mmap) -> str:
    digest = xxhash.xxh3_128()
    with memoryview(content) as view:
        for start in range(0, len(view), _CHUNK):
            digest.update(view[start : start + _CHUNK])
    return digest.hexdigest()


def _split(content: mmap.mmap, path: str) -> tuple[_Offsets, _Offsets]:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise SourceError(f"{path}: UTF-16 (a byte order mark at byte 0); JSON is UTF-8, please convert it")
    begin = len(_BOM) if content[:3] == _BOM else 0
    begin = _skip_space(content, begin)
    if begin == len(content):
        raise SourceError(f"{path}: holds nothing but white space; a JSON array or JSONL is needed")
    if content[begin : begin + 1] != b"[":
        return _split_lines(content, begin, path)
    try:
        return split_array_fast(content, begin)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        if _lines_are_lists(content, begin):
            return _split_lines(content, begin, path)
        return split_array_tolerant(content, begin, path=path)


def _lines_are_lists(content: mmap.mmap, begin: int) -> bool:
    """Whether this is JSONL whose records are lists (of messages), and not an array."""
    end = content.find(b"\n", begin, begin + MAX_RECORD_BYTES)
    if end < 0 or content[(second := _skip_space(content, end)) : second + 1] != b"[":
        return False
    try:
        return isinstance(msgspec.json.decode(content[begin:end]), list)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return False


def split_array_fast(content: mmap.mmap | bytes, begin: int) -> tuple[_Offsets, _Offsets]:
    """Offsets and lengths of the elements of the array at byte `begin`, by msgspec.

    Raises:
        msgspec.MsgspecError: anything in the file is not strict JSON.
    """
    with memoryview(content)[begin:] as view:
        elements = msgspec.json.decode(view, type=list[msgspec.Raw])
        lengths = np.fromiter((len(memoryview(raw)) for raw in elements), dtype=np.int64, count=len(elements))
        del elements
    offsets = np.empty_like(lengths)
    at = begin + 1
    for number, length in enumerate(lengths.tolist()):
        match = _SEPARATOR.match(content, at)
        at = match.end() if match else at
        offsets[number] = at
        at += length
    return offsets, lengths


def split_array_tolerant(
    content: mmap.mmap | bytes, begin: int, *, path: str, chunk: int = _CHUNK
) -> tuple[_Offsets, _Offsets]:
    """Offsets and lengths of the elements of the array at byte `begin`, by quotes, brackets and commas alone.

    Args:
        content: the file.
        begin: where the array opens.
        path: names the file in errors.
        chunk: bytes looked at in one step.

    Raises:
        SourceError: the array itself is damaged: a missing comma or record, brackets or quotes that do not close, bytes after its end.
    """
    starts: list[_Offsets] = []
    ends: list[_Offsets] = []
    open_start = begin + 1
    after_value = False  # a value was completed since the last comma
    close = -1
    for found, kind, depth in _structure(content, begin, chunk):
        position = found
        # what stands directly inside the array: values that open, values that close, commas, and the array's own end
        opens = ((kind == _OPEN) & (depth == 2)) | ((kind == _QUOTE) & (depth == 1))
        closes = (kind == _CLOSE) & (depth == 1)
        comma = (kind == _COMMA) & (depth == 1)
        final = np.flatnonzero((kind == _CLOSE) & (depth == 0))
        if len(final):
            last = final[0] + 1
            position, opens, closes, comma = position[:last], opens[:last], closes[:last], comma[:last]
            close = int(position[-1])
        events = np.flatnonzero(opens | closes | comma)
        closed_before = np.concatenate([[after_value], closes[events]])[:-1]
        missing = events[opens[events] & closed_before]
        if len(missing):
            raise SourceError(
                f"{path}: not a JSON array: a comma is missing before byte {position[missing[0]]}"
            )
        after_value = bool(closes[events[-1]]) if len(events) else after_value
        commas = position[comma]
        starts.append(np.concatenate([[open_start], commas[:-1] + 1]) if len(commas) else commas)
        ends.append(commas)
        open_start = int(commas[-1]) + 1 if len(commas) else open_start
        if close >= 0:
            break
    if close < 0:
        raise SourceError(
            f"{path}: the array is not closed: the file ends at byte {len(content)}, inside the record that starts at byte "
            f"{_skip_space(content, open_start)} (cut off, or a quote or bracket does not close)"
        )
    rest = _skip_space(content, close + 1)
    if rest < len(content):
        raise SourceError(f"{path}: not a JSON array: more data after its end, at byte {rest}")
    starts.append(np.array([open_start]))
    ends.append(np.array([close]))
    offsets, stops = _trim(content, np.concatenate(starts), np.concatenate(ends))
    empty = np.flatnonzero(offsets == stops)
    if len(offsets) == 1 and len(empty):
        return offsets[:0], stops[:0]
    if len(empty):
        raise SourceError(f"{path}: not a JSON array: a record is missing at byte {offsets[empty[0]]}")
    return offsets, stops - offsets


def _structure(
    content: mmap.mmap | bytes, begin: int, chunk: int
) -> Iterator[tuple[_Offsets, npt.NDArray[np.uint8], _Offsets]]:
    """Brackets and commas outside texts, and the quotes that open texts: position, kind, and nesting depth behind them."""
    data = np.frombuffer(content, dtype=np.uint8)
    escaped = False  # the chunk's first byte stands behind an escaping backslash
    quotes = depth = 0
    for start in range(begin, len(data), chunk):
        part = data[start : start + chunk]
        kinds = _KIND[part]
        literal, escaped = _escaped(np.flatnonzero(part == _BACKSLASH), escaped, len(part))
        kinds[literal] = 0
        at = np.flatnonzero(kinds)
        found = kinds[at]
        is_quote = found == _QUOTE
        count = quotes + np.cumsum(is_quote)
        outside = np.where(is_quote, count % 2 == 1, count % 2 == 0)  # of two quotes the opening one counts
        quotes = int(count[-1]) if len(count) else quotes
        at, found = at[outside], found[outside]
        nesting = depth + np.cumsum((found == _OPEN).astype(np.int64) - (found == _CLOSE))
        depth = int(nesting[-1]) if len(nesting) else depth
        yield at + start, found, nesting


def _escaped(backslashes: _Offsets, first: bool, size: int) -> tuple[_Offsets, bool]:
    """Where bytes stand behind an odd run of backslashes, and whether the byte after the chunk does."""
    if first:
        # byte 0 is escaped itself: if it is a backslash, it escapes nothing
        backslashes = backslashes[backslashes > 0] if len(backslashes) else backslashes
    if not len(backslashes):
        return np.array([0] if first else [], dtype=np.int64), False
    run_starts = np.flatnonzero(np.diff(backslashes, prepend=-2) != 1)
    run_ends = np.append(run_starts[1:], len(backslashes))
    odd = (run_ends - run_starts) % 2 == 1
    behind = backslashes[run_ends - 1][odd] + 1
    carried = bool(len(behind) and behind[-1] == size)
    literal = behind[:-1] if carried else behind
    return (np.concatenate([[0], literal]) if first else literal), carried


def _split_lines(content: mmap.mmap, begin: int, path: str) -> tuple[_Offsets, _Offsets]:
    data = np.frombuffer(content, dtype=np.uint8)
    breaks = np.concatenate(
        [
            np.flatnonzero(data[start : start + _CHUNK] == ord("\n")) + start
            for start in range(begin, len(data), _CHUNK)
        ]
    )
    starts = np.concatenate([[begin], breaks + 1])
    offsets, stops = _trim(content, starts, np.append(breaks, len(content)))
    filled = offsets < stops
    offsets, stops = offsets[filled], stops[filled]
    _require_records(content, offsets, stops, path)
    return offsets, stops - offsets


def _require_records(content: mmap.mmap, offsets: _Offsets, stops: _Offsets, path: str) -> None:
    """Refuse a file that is not JSONL as a whole; a single bad line is that record's problem."""
    reason: RecordError | None = None
    for start, stop in zip(offsets[:_LINES_TRIED].tolist(), stops[:_LINES_TRIED].tolist(), strict=True):
        try:
            record = load_record(content[start:stop])
        except RecordError as error:
            reason = reason or error
            continue
        if len(offsets) == 1 and "conversations" not in record and not path.endswith((".jsonl", ".ndjson")):
            raise SourceError(_not_an_array(path, f"an object with the fields {_fields(record)}"))
        return
    whole = memoryview(content)[int(offsets[0]) :]
    kind: Any = (
        dict[str, msgspec.Raw] if content[int(offsets[0])] == ord("{") else Any
    )  # a gigabyte in one object is only looked over
    try:
        value = msgspec.json.decode(whole, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        offset = re.search(r"\(byte (\d+)\)", str(error))
        fault = int(offsets[0]) + (int(offset[1]) if offset else 0)
        raise SourceError(f"{path}: not JSON: the fault is at byte {fault} ({error})") from None
    if isinstance(value, dict):
        raise SourceError(_not_an_array(path, f"an object with the fields {_fields(value)}"))
    raise SourceError(_not_an_array(path, json_type(value)))


def _not_an_array(path: str, what: str) -> str:
    return f"{path}: not an array: the top level is {what}; an array of records, or JSONL with one record a line, is needed"


def _fields(record: dict[str, object]) -> str:
    names = [repr(name) for name in record]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "(none)"


def _trim(content: mmap.mmap | bytes, starts: _Offsets, ends: _Offsets) -> tuple[_Offsets, _Offsets]:
    """Move starts and ends inwards over white space; an all-white slice becomes empty at its end."""
    starts, ends = starts.astype(np.int64), ends.astype(np.int64)
    data = np.frombuffer(content, dtype=np.uint8)
    filled = starts < ends
    padded = np.zeros(len(starts), dtype=bool)
    padded[filled] = _IS_SPACE[data[starts[filled]]] | _IS_SPACE[data[ends[filled] - 1]]
    for number in np.flatnonzero(padded).tolist():
        piece = content[starts[number] : ends[number]]
        starts[number] += len(piece) - len(piece.lstrip(_SPACE))
        ends[number] = starts[number] + len(piece.strip(_SPACE))
    return starts, ends


def _skip_space(content: mmap.mmap | bytes, at: int) -> int:
    while at < len(content):
        piece = content[at : at + _CHUNK]
        white = len(piece) - len(piece.lstrip(_SPACE))
        at += white
        if white < len(piece):
            break
    return at
