"""A recipe as data: which files a published data set has, where its images lie, and what is normal in it.

name: llava-v1.5-mix665k
records:
  - any_of: [llava_v1_5_mix665k.json, ...]      # the first that is there, relative to --root
    count: 665298
images:
  - any_of: [coco/train2017, coco/train2017.zip]
    mount: coco/train2017                       # what its content is called in the records
expect: {image-missing: why that is normal}

docs/recipes.md describes every key. A recipe says nothing that is executed; what it names stays inside of --root.
"""

import os
import re
from importlib.resources import files
from typing import Any, TypeAlias

import msgspec
import yaml

from shardify.audit import NOTES, REASONS
from shardify.errors import SourceError, UsageError

MAX_RECIPE_BYTES = 256 * 1024
KINDS = ("auto", "llava", "parquet", "webdataset", "prompts")
CAPTIONS = ("raw", "blip")

_SUFFIXES = (".yaml", ".yml")
_DEEPEST = 20  # collections in each other; a recipe has six
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of the ways in which files may lie on disk.

    Attributes:
        path: relative to the root; ``*``, ``?`` and ``[...]`` match several files, which all belong to it.
        kind: of records, where it differs from the entry's.
        mount: of images, where it differs from the entry's.
    """

    path: str
    kind: str | None = None
    mount: str | None = None


_Alternative: TypeAlias = str | Place


class CaptionFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Captions that take the place of the records' own: see `sources.spec.Captions`."""

    path: str
    key: str = "image"
    field: str = "blip_caption"


class RecordEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A source of records.

    Attributes:
        path: where it is, or
        any_of: where it may be: the first that is there counts.
        kind: ``auto``, ``llava``, ``parquet``, ``webdataset`` or ``prompts``.
        count: how many records it has; a list where several revisions were published.
        about: likewise, where only a rounded number was published.
        prefixes: prefix maps of its image paths, [old, new], tried in this order before the path as it stands.
        captions: choice of ``--caption`` -> where these captions are, null for the records' own. The first is the default.
    """

    path: _Alternative | None = None
    any_of: list[_Alternative] | None = None
    kind: str = "auto"
    count: int | list[int] | None = None
    about: int | None = None
    prefixes: list[tuple[str, str]] = []
    captions: dict[str, CaptionFile | None] = {}

    @property
    def places(self) -> list[Place]:
        """Where it may be."""
        return _places(self.path, self.any_of)

    @property
    def counts(self) -> list[int]:
        """The exact counts that were published."""
        return self.count if isinstance(self.count, list) else [] if self.count is None else [self.count]


class ImageEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A store of images: a folder, a zip or a tar.

    Attributes:
        path: where it is, or
        any_of: where it may be: the first that is there counts.
        mount: the folder in which the records believe its content to be; a single top folder inside an archive may be left out.
        holds: how many files the published store has.
        optional: the data set can be packed without it.
    """

    path: _Alternative | None = None
    any_of: list[_Alternative] | None = None
    mount: str = ""
    holds: int | None = None
    optional: bool = False

    @property
    def places(self) -> list[Place]:
        """Where it may be."""
        return _places(self.path, self.any_of)


class Include(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another recipe that belongs to this one.

    Attributes:
        recipe: its name, or a YAML file beside this one.
        root: the folder below the root in which its files lie.
        below: a virtual folder that keeps its image paths apart from those of other recipes.
    """

    recipe: str
    root: str = ""
    below: str = ""


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where files can be had.

    Attributes:
        url: the place.
        gives: which files.
    """

    url: str
    gives: str


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A published data set, or a mix of several.

    Attributes:
        name: lower-case letters, digits, ``.``, ``_`` and ``-``.
        title: one line.
        licence: as published.
        citation: whom to cite.
        get: where to get its files.
        records: its sources of records.
        images: its image stores, searched in this order.
        include: recipes that belong to it: then it is a mix.
        instead: recipes that together make it, for roots that have not its own record files but theirs.
        expect: reason and note codes that are normal in it, and why.
        max_bad: more bad records than this stop a pack: a count, or a percentage with ``%``.
        about: remarks for people.
        file: where it was read, for messages.
    """

    name: str
    title: str
    licence: str = ""
    citation: str = ""
    get: list[Origin] = []
    records: list[RecordEntry] = []
    images: list[ImageEntry] = []
    include: list[Include] = []
    instead: list[Include] = []
    expect: dict[str, str] = {}
    max_bad: str = "1%"
    about: str = ""
    file: str = ""


_FIELDS: dict[str, type[msgspec.Struct]] = {
    "": Recipe,
    "records": RecordEntry,
    "images": ImageEntry,
    "include": Include,
    "instead": Include,
    "get": Origin,
    "captions": CaptionFile,
    "path": Place,
    "any_of": Place,
}
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*?)`(?: - at `(?P<at>.*)`)?", re.DOTALL)
_AT = re.compile(r"(?P<what>.*?)(?: - at `(?P<at>.*)`)?", re.DOTALL)


def recipe_names() -> list[str]:
    """The names of the recipes that come with shardify, sorted."""
    folder = files("shardify.recipes")
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def is_file_name(name: str) -> bool:
    """Whether a recipe is asked for by file rather than by name."""
    return name.endswith(_SUFFIXES) or "/" in name


def recipe_text(name: str | os.PathLike[str]) -> str:
    """A recipe's YAML as it was written.

    Raises:
        UsageError: there is no recipe of this name.
        SourceError: the file cannot be read, or is too large to be a recipe.
    """
    name = os.fspath(name)
    if is_file_name(name):
        return _read(name)
    known = recipe_names()
    if name not in known:
        raise UsageError(
            f"no recipe {name!r}; there are {', '.join(known)}. A recipe of your own is given by its file, such as ./mine.yaml"
        )
    return (files("shardify.recipes") / f"{name}.yaml").read_text("utf-8")


def load_recipe(name: str | os.PathLike[str]) -> Recipe:
    """Read a recipe.

    Args:
        name: of one that comes with shardify, or a YAML file: what has a ``/`` or ends in ``.yaml``.

    Raises:
        UsageError: there is no recipe of this name.
        SourceError: the file cannot be read or is no recipe; the message names file, key, and what is allowed there.
    """
    text = recipe_text(name)
    name = os.fspath(name)
    where = name if is_file_name(name) else f"recipe {name}"
    recipe = _convert(_parse(text, where), where)
    _check(recipe, where)
    if not is_file_name(name) and recipe.name != name:
        raise SourceError(f"{where}: name: is {recipe.name!r}, the file is called {name!r}")
    return msgspec.structs.replace(recipe, file=name if is_file_name(name) else "")


def check_path(path: str, where: str, *, empty: bool = False) -> None:
    """Refuse a path that does not stay inside of the root.

    Raises:
        SourceError: with the key.
    """
    parts = path.split("/")
    if not path and empty:
        return
    if path == "." and not empty:
        return
    if "\\" in path or "\0" in path or ":" in parts[0] or not {"", ".", ".."}.isdisjoint(parts):
        raise SourceError(
            f"{where}: {path!r} is not allowed: a path relative to the root is needed, with '/' between its parts and without '.' and '..'"
        )


def _places(path: _Alternative | None, any_of: list[_Alternative] | None) -> list[Place]:
    given = any_of if any_of is not None else [] if path is None else [path]
    return [Place(path=item) if isinstance(item, str) else item for item in given]


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise SourceError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; a recipe is a short YAML file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 (byte {error.start})") from None


class _Loader(yaml.SafeLoader):
    """Plain YAML; a key that stands twice in one mapping is an error instead of silently the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> Any:
    try:
        _refuse_bombs(text, where)
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise SourceError(f"{where}: {line}not YAML: {getattr(error, 'problem', None) or error}") from None
    except (RecursionError, ValueError, TypeError) as error:
        raise SourceError(f"{where}: not YAML: {error}") from None


def _refuse_bombs(text: str, where: str) -> None:
    """An alias may repeat a large part a million times; deep nesting takes the parser quadratic time."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        line = f"line {event.start_mark.line + 1}: " if event.start_mark else ""
        if isinstance(event, yaml.AliasEvent):
            raise SourceError(f"{where}: {line}YAML aliases (*{event.anchor}) are not allowed")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise SourceError(f"{where}: {line}nested deeper than {_DEEPEST} collections; no recipe is")


def _convert(value: Any, where: str) -> Recipe:
    if isinstance(value, dict) and "file" in value:
        raise SourceError(f"{where}: file: no such key; allowed are {_allowed(Recipe)}")
    try:
        return msgspec.convert(value, Recipe)
    except msgspec.ValidationError as error:
        unknown = _UNKNOWN.fullmatch(str(error))
        if unknown:
            at = _dotted(unknown["at"])
            kind = _FIELDS.get(re.sub(r"\[.*?\]", "", at).rpartition(".")[2], Recipe)
            key = f"{at}.{unknown['field']}" if at else unknown["field"]
            raise SourceError(f"{where}: {key}: no such key; allowed are {_allowed(kind)}") from None
        match = _AT.fullmatch(str(error))
        what, at = (match["what"], _dotted(match["at"])) if match else (str(error), "")
        raise SourceError(f"{where}: {f'{at}: ' if at else ''}{what}") from None


def _dotted(at: str | None) -> str:
    """``$.records[0]`` as ``records[0]``."""
    return (at or "").removeprefix("$").removeprefix(".")


def _allowed(kind: type[msgspec.Struct]) -> str:
    return ", ".join(name for name in kind.__struct_fields__ if name != "file")


def _check(recipe: Recipe, where: str) -> None:
    """What the types alone do not say."""
    if not _NAME.fullmatch(recipe.name):
        raise SourceError(
            f"{where}: name: {recipe.name!r}; lower-case letters, digits, '.', '_' and '-' are allowed"
        )
    if not recipe.records and not recipe.include:
        raise SourceError(f"{where}: records: missing; a recipe has records, or includes recipes that have")
    if recipe.instead and not recipe.records:
        raise SourceError(f"{where}: instead: without records there is nothing to replace; use include")
    for code in recipe.expect:
        if code not in REASONS and code not in NOTES:
            raise SourceError(f"{where}: expect.{code}: no such code; docs/recipes.md lists them all")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?\s*%|[0-9]+", recipe.max_bad.strip()):
        raise SourceError(
            f"{where}: max_bad: {recipe.max_bad!r}; a count such as '20', or a percentage such as '1%', is needed"
        )
    for number, entry in enumerate(recipe.records):
        _check_records(entry, f"{where}: records[{number}]")
    for number, image in enumerate(recipe.images):
        key = f"{where}: images[{number}]"
        _check_places(image, key)
        check_path(image.mount, f"{key}.mount", empty=True)
    for key, includes in (("include", recipe.include), ("instead", recipe.instead)):
        for number, include in enumerate(includes):
            check_path(include.root, f"{where}: {key}[{number}].root", empty=True)
            check_path(include.below, f"{where}: {key}[{number}].below", empty=True)
            check_path(include.recipe.removeprefix("./"), f"{where}: {key}[{number}].recipe")


def _check_records(entry: RecordEntry, where: str) -> None:
    _check_places(entry, where)
    for kind in (entry.kind, *(place.kind for place in entry.places)):
        if kind is not None and kind not in KINDS:
            raise SourceError(f"{where}.kind: {kind!r}; allowed are {', '.join(KINDS)}")
    for choice, captions in entry.captions.items():
        if choice not in CAPTIONS:
            raise SourceError(f"{where}.captions: {choice!r}; allowed are {', '.join(CAPTIONS)}")
        if captions is not None:
            check_path(captions.path, f"{where}.captions.{choice}.path")
    if any(count < 0 for count in [*entry.counts, entry.about or 0]):
        raise SourceError(f"{where}.count: less than none")


def _check_places(entry: RecordEntry | ImageEntry, where: str) -> None:
    if (entry.path is None) == (entry.any_of is None) or not entry.places:
        raise SourceError(f"{where}: either 'path' or 'any_of' (a list of paths) is needed")
    for place in entry.places:
        check_path(place.path, f"{where}.path")
        if place.mount is not None:
            check_path(place.mount, f"{where}.mount", empty=True)
