"""What is to be taken out of a data set: a list of ids, URLs and image hashes, one a line.

# asked for on the 3rd of May
000000033471                        an id, as text or number; "2327515" in quotes is the text alone
https://example.org/photo.jpg       a URL: records in which it stands, as a whole text, in any field
9f1c0a5be2d34477                    xxh3_64 of an image's bytes, as in the sidecars
e3b0c44298fc1c149afbf4c8996fb924... sha256 of an image's bytes
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import xxhash

from shardify.errors import RecordError, SourceError
from shardify.format.ids import same_id
from shardify.records import load_record

EXCLUDED = "excluded"
"""The reason code of what a list takes out."""

_MAX_LINE = 64 * 1024
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_HEX = re.compile(r"[0-9a-fA-F]+")
_OTHER_HASHES = {32: "MD5 or xxh3_128", 40: "SHA-1", 56: "SHA-224", 96: "SHA-384", 128: "SHA-512"}
_XXH3_DIGITS = 16
_SHA256_DIGITS = 64


@dataclass(frozen=True, slots=True)
class Exclusions:
    """A list, ready to be asked.

    Attributes:
        name: the file's base name.
        fingerprint: xxh3_128 of the file, hexadecimal.
        entries: line number, from 1, -> what stands there; what stands there twice counts for its first line.
        ids: ids as JSON text -> line.
        urls: likewise.
        xxh3_64: likewise, by number.
        sha256: likewise, by digest.
    """

    name: str
    fingerprint: str
    entries: Mapping[int, str] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)
    urls: Mapping[str, int] = field(default_factory=dict)
    xxh3_64: Mapping[int, int] = field(default_factory=dict)
    sha256: Mapping[bytes, int] = field(default_factory=dict)

    def lines(
        self,
        *,
        id: str | None,  # noqa: A002 - the field's name everywhere
        record: bytes | memoryview | None = None,
        images: Iterable[tuple[int, bytes | memoryview]] = (),
    ) -> list[int]:
        """The lines that ask for a sample to be taken out, ascending.

        Args:
            id: as JSON text, None without one.
            record: the sample's JSON.
            images: xxh3_64 and bytes of each, whatever they are called.
        """
        found = set()
        if self.ids and id is not None:
            found.add(self.ids.get(same_id(id)))
        if self.urls and record is not None:
            found.update(map(self.urls.get, _urls_of(record)))
        for digest, data in images:
            found.add(self.xxh3_64.get(digest))
            if self.sha256:
                found.add(self.sha256.get(hashlib.sha256(data).digest()))
        return sorted(line for line in found if line is not None)


def read_exclusions(path: str | os.PathLike[str]) -> Exclusions:
    """Read a list: UTF-8, a line each; empty lines and those that begin with ``#`` are passed over.

    Raises:
        SourceError: the file cannot be read, has nothing in it, or a line is neither id, URL nor image hash, with its number.
    """
    where = os.fspath(path)
    digest = xxhash.xxh3_128()
    entries: dict[int, str] = {}
    seen: set[str] = set()
    ids: dict[str, int] = {}
    urls: dict[str, int] = {}
    short: dict[int, int] = {}
    long: dict[bytes, int] = {}
    try:
        with open(path, "rb") as file:
            number = 0
            while raw := file.readline(_MAX_LINE + 1):
                number += 1
                digest.update(raw)
                text = _text(raw, f"{where}: line {number}", first=number == 1)
                if not text or text in seen:
                    continue
                kinds = parse_entry(text, f"{where}: line {number}")
                seen.add(text)
                entries[number] = text
                for id_ in kinds.ids:
                    ids.setdefault(id_, number)
                if kinds.url:
                    urls[text] = number
                if kinds.xxh3_64 is not None:
                    short.setdefault(kinds.xxh3_64, number)
                if kinds.sha256 is not None:
                    long.setdefault(kinds.sha256, number)
    except OSError as error:
        raise SourceError(f"{where}: cannot be read ({error.strerror or error})") from None
    if not entries:
        raise SourceError(f"{where}: the list is empty; without --exclude nothing is taken out")
    name = os.fsencode(os.path.basename(where)).decode("utf-8", "replace")
    return Exclusions(name, digest.hexdigest(), entries, ids, urls, short, long)


def shorten_entry(text: str) -> str:
    """An entry as messages show it."""
    return text if len(text) <= 80 else f"{text[:80]}..."


@dataclass(frozen=True, slots=True)
class Entry:
    """All that an entry may be: sixteen digits are a hash, but somebody's id too.

    Attributes:
        ids: as JSON text, spelled as `same_id` does.
        url: whether it may be a URL.
        xxh3_64: of an image, None when it cannot be one.
        sha256: likewise.
    """

    ids: tuple[str, ...] = ()
    url: bool = False
    xxh3_64: int | None = None
    sha256: bytes | None = None


def _text(raw: bytes, where: str, *, first: bool) -> str:
    if len(raw) > _MAX_LINE:
        raise SourceError(f"{where}: longer than {_MAX_LINE} bytes; an id, a URL or an image hash is needed")
    try:
        text = raw.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeError:
        raise SourceError(f"{where}: not UTF-8") from None
    return "" if text.startswith("#") else text


def parse_entry(text: str, where: str) -> Entry:
    """What a line may name; `where` says which it is.

    Raises:
        SourceError: it is neither id, URL nor image hash.
    """
    if text.startswith('"'):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise SourceError(
                f"{where}: {shorten_entry(text)}: an id in quotes is JSON text; this is not"
            ) from None
        return Entry(ids=(same_id(json.dumps(value, ensure_ascii=False)),))
    if not text.isprintable() or re.search(r"\s", text) or text[0] in "{[":
        raise SourceError(
            f"{where}: {shorten_entry(text)!r}: neither an id, a URL nor an image hash; an id with blanks or brackets stands in quotes"
        )
    url = "://" in text
    ids = [json.dumps(text, ensure_ascii=False)] + ([text] if _NUMBER.fullmatch(text) else [])
    short = long = None
    if _HEX.fullmatch(text):
        if len(text) in _OTHER_HASHES:
            raise SourceError(
                f"{where}: {text}: {len(text)} hexadecimal digits, as of {_OTHER_HASHES[len(text)]}; images are known by xxh3_64 (16)"
                " or sha256 (64). If it is an id, put it in quotes"
            )
        short = int(text, 16) if len(text) == _XXH3_DIGITS else None
        long = bytes.fromhex(text) if len(text) == _SHA256_DIGITS else None
    return Entry(tuple(map(same_id, ids)), url, short, long)


def _urls_of(record: bytes | memoryview) -> list[str]:
    """The texts with a URL's mark, at any depth: publishers keep it in `url`, `image`, `urls`, `source` and more."""
    waiting: list[Any] = []
    try:
        waiting = [load_record(record)]
    except RecordError:
        with suppress(ValueError, RecursionError):  # JSON that is no object
            waiting = [json.loads(bytes(record))]
    found = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and "://" in value:
            found.append(value.strip())
    return found
