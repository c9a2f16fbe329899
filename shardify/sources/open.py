"""Opens any source of records: tells its kind, and spools what cannot be read in place."""

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace

from braceexpand import braceexpand

from shardify.errors import SourceError, UsageError
from shardify.sources.captions import read_captions, replace_captions
from shardify.sources.compressed import MAGIC as ZSTD
from shardify.sources.compressed import decompress
from shardify.sources.llava import RecordFile, split_records
from shardify.sources.parquet import read_parquet, spool_bytes
from shardify.sources.prompts import prompt_folders, read_prompts
from shardify.sources.spec import Captions, SourceSpec
from shardify.sources.spool import Spool, require_room, spool_path
from shardify.sources.tars import check_tar, read_tars

AUTO, LLAVA, PARQUET, WEBDATASET, PROMPTS = "auto", "llava", "parquet", "webdataset", "prompts"
KINDS = (AUTO, LLAVA, PARQUET, WEBDATASET, PROMPTS)

_ENDINGS = {PARQUET: (".parquet",), WEBDATASET: (".tar", ".tar.zst")}
_PARQUET_MAGIC = b"PAR1"
_TAR_MAGIC = slice(257, 262)  # "ustar", in ustar, GNU and PAX headers
_DISGUISES = {  # by how they begin, in lower-case letters
    b"\x1f\x8b": "compressed with gzip; unpack it, or compress it with zstd, which can be read",
    b"pk\x03\x04": "a zip archive, not records; unpack it, or give it as images",
    b"version https://git-lfs": "a Git LFS pointer in the file's place; 'git lfs pull' gets the file itself",
    b"<!doctype html": "a web page in the file's place; get the file again",
    b"<html": "a web page in the file's place; get the file again",
}
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_MAX_FILES = 100_000


def open_source(spec: SourceSpec, *, spool: str) -> RecordFile:
    """Open a source.

    A file on disk of JSON or JSONL stays where it is. All else is first written into the spool, images too: ``.zst`` of those, Parquet (a
    file, a folder, a pattern), WebDataset tars (likewise, and brace patterns), a prompt folder or a folder of them, and what a URL names.

    Args:
        spec: the source.
        spool: a folder for it, which must stay until the records have been read. The files in it have the same names and bytes each time.

    Raises:
        SourceError: it cannot be read as what it is, or the spool has no room.
        UsageError: there is no such kind.
        PackError: a URL cannot be read.
    """
    if spec.kind not in KINDS:
        raise UsageError(
            f"{spec.path}: no kind of source is called {spec.kind!r}; there are {', '.join(KINDS)}"
        )
    name = spec.name or os.path.basename(spec.path.rstrip("/")) or spec.path
    file = _open(spec, name, spool)
    return _with_captions(file, spec.captions, spec.path, spool) if spec.captions else file


def needs_spool(spec: SourceSpec) -> bool:
    """Whether the source cannot be read in place."""
    if spec.captions or _is_url(spec.path):
        return True
    if spec.kind not in (AUTO, LLAVA) or not os.path.isfile(spec.path):
        return (
            spec.kind in (PARQUET, WEBDATASET, PROMPTS)
            or os.path.isdir(spec.path)
            or bool(_expand(spec.path))
        )
    return _kind_of_file(spec.path) != LLAVA or _is_compressed(spec.path)


def _open(spec: SourceSpec, name: str, spool: str) -> RecordFile:
    if _is_url(spec.path):
        paths = _download(spec.path, spool)
        kind = spec.kind if spec.kind != AUTO else _one_kind(paths, spec.path)
    elif os.path.isdir(spec.path):
        kind, paths = _in_folder(spec.path, spec.kind)
    else:
        paths = [spec.path] if os.path.exists(spec.path) else _expand(spec.path)
        if not paths:
            raise SourceError(f"{spec.path}: no such file")
        kind = spec.kind if spec.kind != AUTO else _one_kind(paths, spec.path)

    for path in paths:
        start = _start(path).lower()
        for magic, what in _DISGUISES.items():
            if start.startswith(magic):
                raise SourceError(f"{spec.path if _is_url(spec.path) else path}: {what}")
    if kind == LLAVA:
        if len(paths) > 1:
            raise SourceError(
                f"{spec.path}: {len(paths)} record files in one pattern; name each as a source of its own"
            )
        return _open_json(paths[0], spec.path, name, spool)
    if kind == PARQUET:
        size, embeds = spool_bytes(paths)
        require_room(spool, size, called=spec.path)
        with Spool(spool, spec.path, name=name, embeds=embeds) as out:
            read_parquet(paths, out)
            return out.finish()
    if kind == WEBDATASET:
        tars = [_plain_tar(path, spool) for path in paths]
        require_room(spool, sum(check_tar(path) for path in tars), called=spec.path)
        with Spool(spool, spec.path, name=name, embeds=True) as out:
            read_tars(tars, out)
            return out.finish()
    with Spool(spool, spec.path, name=name, embeds=False) as out:
        read_prompts(paths, out)
        return out.finish()


def _open_json(path: str, called: str, name: str, spool: str) -> RecordFile:
    if not _is_compressed(path):
        return split_records(path, name=name, called=called)
    target = spool_path(spool, called, ".records")
    fingerprint = decompress(path, target, called=called)
    return replace(split_records(target, name=name, called=called), fingerprint=fingerprint)


def _with_captions(file: RecordFile, captions: Captions, source: str, spool: str) -> RecordFile:
    spec = SourceSpec(path=captions.path, kind=LLAVA)
    entries = _open(spec, os.path.basename(captions.path), spool)
    with Spool(spool, f"{source}.captions", name=file.name, embeds=False) as out:
        fingerprint = f"{entries.fingerprint} {captions.key} {captions.field}"
        return replace_captions(file, read_captions(captions, entries), out, fingerprint=fingerprint)


def _is_url(path: str) -> bool:
    return "://" in path


def _download(url: str, spool: str) -> list[str]:
    """Local copies of all that a URL names, braces expanded."""
    from shardify.format.objects import download

    paths = []
    for one in _braces(url):
        ending = "".join(os.path.basename(one).partition(".")[1:])
        path = spool_path(spool, one, f".{ending}" if ending and not ending.startswith(".") else ending)
        download(one, path)
        paths.append(path)
    return paths


def _expand(pattern: str) -> list[str]:
    """The files of a brace or glob pattern; empty when it is none, or nothing matches."""
    if not any(sign in pattern for sign in "{*?["):
        return []
    found: list[str] = []
    for one in _braces(pattern):
        matches = sorted(glob.glob(one)) if any(sign in one for sign in "*?[") else [one]
        found.extend(path for path in matches if len(found) < _MAX_FILES)
    return found


def _braces(text: str) -> list[str]:
    # counted before expanding: braceexpand holds whole ranges in memory
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(text))
    if count > _MAX_FILES:
        raise SourceError(f"{text}: names {count} files; the limit is {_MAX_FILES}")
    try:
        return list(braceexpand(text, escape=False)) if "{" in text else [text]
    except ValueError:  # braces may be part of a name
        return [text]


def _in_folder(path: str, kind: str) -> tuple[str, list[str]]:
    """The kind of a folder's files, and the files; for prompts, the folders."""
    prompts = prompt_folders(path)
    if kind == PROMPTS or (kind == AUTO and prompts):
        if not prompts:
            raise SourceError(
                f"{path}: no prompt folder; one holds system_message.txt and pairs 000_caps.txt, 000_conv.txt"
            )
        return PROMPTS, prompts
    if kind == LLAVA:
        raise SourceError(f"{path}: a folder; a JSON or JSONL file is needed")
    parquet, tars = _walk(path)
    if kind == AUTO and tars:
        # a tar's own table of contents stands beside it under its name
        stems = {_stem(tar) for tar in tars}
        parquet = [table for table in parquet if _stem(table) not in stems]
        if parquet:
            raise SourceError(
                f"{path}: holds tars ({tars[0]}) and Parquet files ({parquet[0]}); say which are meant, by a pattern such as '*.tar'"
            )
    if kind != WEBDATASET and parquet:
        return PARQUET, parquet
    if kind != PARQUET and tars:
        return WEBDATASET, tars
    raise SourceError(
        f"{path}: a folder without {' or '.join(_ENDINGS) if kind == AUTO else kind} files; name a record file, or a folder of Parquet "
        "files, of tars or of prompts"
    )


def _walk(path: str) -> tuple[list[str], list[str]]:
    """Parquet files and tars below a folder, sorted; hidden folders left out."""
    found: dict[str, list[str]] = {PARQUET: [], WEBDATASET: []}
    for folder, inside, files in os.walk(path):
        inside[:] = [name for name in inside if not name.startswith(".")]
        for kind, endings in _ENDINGS.items():
            found[kind] += [
                os.path.join(folder, name)
                for name in files
                if name.endswith(endings) and not name.startswith(".")
            ]
    return sorted(found[PARQUET]), sorted(found[WEBDATASET])


def _stem(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, name.partition(".")[0])


def _one_kind(paths: Sequence[str], called: str) -> str:
    kinds = {_kind_of_file(path) for path in paths}
    if len(kinds) > 1:
        raise SourceError(
            f"{called}: files of several kinds ({', '.join(sorted(kinds))}); name each kind as a source of its own"
        )
    return kinds.pop()


def _kind_of_file(path: str) -> str:
    """By its name, else by its first bytes; a file that cannot be read is left to the reader of records, which says so."""
    for kind, endings in _ENDINGS.items():
        if path.endswith(endings):
            return kind
    start = _start(path)
    if start.startswith(_PARQUET_MAGIC):
        return PARQUET
    return WEBDATASET if start[_TAR_MAGIC] == b"ustar" else LLAVA


def _is_compressed(path: str) -> bool:
    return _start(path).startswith(ZSTD) or path.endswith(".zst")


def _start(path: str) -> bytes:
    if not os.path.isfile(path):  # opening a pipe may wait for ever
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(_TAR_MAGIC.stop)
    except OSError:
        return b""


def _plain_tar(path: str, spool: str) -> str:
    if not _is_compressed(path):
        return path
    target = spool_path(spool, path, ".tar")
    decompress(path, target, called=path)
    return target
