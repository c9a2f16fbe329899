"""A recipe meets a folder: which of its files are there, and what is packed from them.

--root data                                      sources                                   stores
    LLaVA-Pretrain/images/00453/004539375.jpg
    LLaVA-Pretrain/blip_laion_cc_sbu_558k.json   LLaVA-Pretrain/blip_laion_cc_sbu_558k...  LLaVA-Pretrain/images, mounted as itself
    allava_laion/...                             ...                                       ...
"""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shardify.errors import SourceError, UsageError
from shardify.images.stores import StoreSpec
from shardify.recipes.schema import (
    ImageEntry,
    Include,
    Origin,
    Place,
    Recipe,
    RecordEntry,
    check_path,
    is_file_name,
    load_recipe,
)
from shardify.sources.spec import Captions, SourceSpec

_MAX_DEPTH = 8
_PATTERN = set("*?[")


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a recipe is made of in one folder.

    Attributes:
        sources: the sources of records.
        stores: the image stores, in the order in which they are searched.
        max_bad: of the recipe.
        expect: codes that are normal, and why.
    """

    sources: tuple[SourceSpec, ...]
    stores: tuple[StoreSpec, ...]
    max_bad: str
    expect: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class FoundRecords:
    """An entry of records, and what of it is there.

    Attributes:
        recipe: the recipe that has the entry.
        entry: as written.
        tried: the paths looked for, relative to the root.
        sources: what is there; empty when nothing is.
        captions: missing caption files.
    """

    recipe: Recipe
    entry: RecordEntry
    tried: tuple[str, ...]
    sources: tuple[SourceSpec, ...]
    captions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundImages:
    """An entry of images, and what of it is there; the fields are those of `FoundRecords`."""

    recipe: Recipe
    entry: ImageEntry
    tried: tuple[str, ...]
    stores: tuple[StoreSpec, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """All of a recipe, with what it includes, in one folder.

    Attributes:
        recipe: the recipe.
        root: the folder.
        records: its entries of records.
        images: its entries of images.
        recipes: itself and what it includes.
    """

    recipe: Recipe
    root: str
    records: tuple[FoundRecords, ...]
    images: tuple[FoundImages, ...]
    recipes: tuple[Recipe, ...]

    @property
    def sources(self) -> tuple[SourceSpec, ...]:
        """All sources that are there."""
        return tuple(source for entry in self.records for source in entry.sources)

    @property
    def stores(self) -> tuple[StoreSpec, ...]:
        """All stores that are there, each once."""
        return tuple(dict.fromkeys(store for entry in self.images for store in entry.stores))

    @property
    def expect(self) -> dict[str, str]:
        """Codes that are normal, and why; a mix may say it otherwise than its parts."""
        merged: dict[str, str] = {}
        for recipe in reversed(self.recipes):
            merged.update(recipe.expect)
        return merged

    @property
    def missing(self) -> list[str]:
        """What is not there and cannot be done without, one line each: the places where it may be."""
        lines = [
            f"records: {_any_of(entry.tried)}" for entry in self.records if not entry.sources and entry.tried
        ]
        lines += [f"captions: {path}" for entry in self.records for path in entry.captions]
        lines += [
            f"images: {_any_of(entry.tried)}"
            for entry in self.images
            if not entry.stores and not entry.entry.optional
        ]
        return list(dict.fromkeys(lines))

    @property
    def get(self) -> list[Origin]:
        """Where the files can be had."""
        return list(dict.fromkeys(origin for recipe in self.recipes for origin in recipe.get))


def resolve_recipe(recipe: Recipe, root: str | os.PathLike[str], caption: str | None = None) -> Resolved:
    """Find all that a recipe needs below a folder.

    Args:
        recipe: what is needed.
        root: the folder.
        caption: ``raw`` or ``blip``, for recipes that have a choice; None for their default.

    Raises:
        UsageError: the recipe has no such captions, or a file would be packed twice.
        SourceError: something is missing: the message lists what, where it was looked for and where to get it.
    """
    found = find_recipe(recipe, root, caption)
    missing = found.missing
    if missing:
        lines = [f"{found.root}: recipe {recipe.name} lacks", *(f"  {line}" for line in missing)]
        if found.get:
            lines += ["Where to get it:", *(f"  {origin.url}  {origin.gives}" for origin in found.get)]
        lines.append(
            f"'shardify recipes check {recipe.file or recipe.name} --root {found.root}' looks closer"
        )
        raise SourceError("\n".join(lines))
    return Resolved(found.sources, found.stores, recipe.max_bad, found.expect)


def find_recipe(recipe: Recipe, root: str | os.PathLike[str], caption: str | None = None) -> Found:
    """Look for all that a recipe needs; what is missing is no error.

    Raises:
        UsageError: as `resolve_recipe`.
        SourceError: the root is no folder, or an included recipe cannot be read.
    """
    root = os.fspath(root)
    if "://" in root:
        raise UsageError(
            f"--root {root}: a folder is needed; give object stores as RECORDS and --images instead"
        )
    if not os.path.isdir(root):
        what = "not a folder" if os.path.exists(root) else "no such folder"
        raise SourceError(f"{root}: {what}; --root is the folder in which the data set's files lie")
    search = _Search(root, caption)
    search.add(recipe, "", "", (recipe.file or recipe.name,))
    if caption is not None and not search.has_captions:
        raise UsageError(f"--caption {caption}: recipe {recipe.name} has no choice of captions")
    found = Found(recipe, root, tuple(search.records), tuple(search.images), tuple(search.recipes))
    names = [source.name for source in found.sources]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"recipe {recipe.name}: {name} belongs to two of its parts; every record would be packed twice"
            )
    return found


@dataclass(slots=True)
class _Search:
    root: str
    caption: str | None
    records: list[FoundRecords] = field(default_factory=list)
    images: list[FoundImages] = field(default_factory=list)
    recipes: list[Recipe] = field(default_factory=list)
    has_captions: bool = False

    def add(self, recipe: Recipe, folder: str, below: str, chain: tuple[str, ...]) -> None:
        """Look for a recipe's files.

        Args:
            recipe: which.
            folder: where its paths begin, relative to the root.
            below: the virtual folder for its images.
            chain: the recipes that led to it, itself last.
        """
        if recipe not in self.recipes:
            self.recipes.append(recipe)
        records = [self._records(recipe, entry, folder, below) for entry in recipe.records]
        if recipe.instead and not any(entry.sources for entry in records):
            parts = _Search(self.root, self.caption)
            for include in recipe.instead:
                parts.include(recipe, include, folder, below, chain)
            # where none of the parts is there either, what it lacks is its own
            if any(entry.sources for entry in parts.records):
                self.merge(parts)
                return
        self.records += records
        self.images += [self._images(recipe, entry, folder, below) for entry in recipe.images]
        for include in recipe.include:
            self.include(recipe, include, folder, below, chain)

    def merge(self, other: "_Search") -> None:
        """Take over what another search has found."""
        self.records += other.records
        self.images += other.images
        self.recipes += [recipe for recipe in other.recipes if recipe not in self.recipes]
        self.has_captions |= other.has_captions

    def include(
        self, recipe: Recipe, include: Include, folder: str, below: str, chain: tuple[str, ...]
    ) -> None:
        """Look for the files of a recipe that another one names."""
        name = include.recipe
        if is_file_name(name) and recipe.file:
            name = os.path.join(os.path.dirname(recipe.file) or ".", name.removeprefix("./"))
        if name in chain or len(chain) == _MAX_DEPTH:
            raise SourceError(f"recipe {recipe.name}: include: goes round: {' -> '.join((*chain, name))}")
        part = load_recipe(name)
        self.add(part, _join(folder, include.root), _join(below, include.below), (*chain, name))

    def _records(self, recipe: Recipe, entry: RecordEntry, folder: str, below: str) -> FoundRecords:
        place, paths = self._first(entry.places, folder)
        tried = tuple(_join(folder, place.path) for place in entry.places)
        captions, missing = self._captions(recipe, entry, folder)
        if place is None:
            return FoundRecords(recipe, entry, tried, (), missing)
        prefixes = [(old, f"{below}/{new}" if below else new) for old, new in entry.prefixes]
        if below:
            prefixes.append(("", f"{below}/"))
        sources = tuple(
            SourceSpec(
                path=os.path.join(self.root, path),
                name=path,
                kind=place.kind or entry.kind,
                prefixes=tuple(prefixes),
                captions=captions,
                licence=recipe.licence,
                citation=recipe.citation,
            )
            for path in paths
        )
        return FoundRecords(recipe, entry, tried, sources, missing)

    def _captions(
        self, recipe: Recipe, entry: RecordEntry, folder: str
    ) -> tuple[Captions | None, tuple[str, ...]]:
        if not entry.captions:
            return None, ()
        self.has_captions = True
        choice = self.caption or next(iter(entry.captions))
        if choice not in entry.captions:
            raise UsageError(
                f"--caption {choice}: recipe {recipe.name} has {', '.join(entry.captions)} to choose from"
            )
        chosen = entry.captions[choice]
        if chosen is None:
            return None, ()
        path = _join(folder, chosen.path)
        file = os.path.join(self.root, path)
        return Captions(path=file, key=chosen.key, field=chosen.field), (
            () if os.path.isfile(file) else (path,)
        )

    def _images(self, recipe: Recipe, entry: ImageEntry, folder: str, below: str) -> FoundImages:
        place, paths = self._first(entry.places, folder)
        tried = tuple(_join(folder, place.path) for place in entry.places)
        if place is None:
            return FoundImages(recipe, entry, tried, ())
        mount = _join(below, entry.mount if place.mount is None else place.mount)
        stores = tuple(StoreSpec(os.path.join(self.root, path), mount) for path in paths)
        return FoundImages(recipe, entry, tried, stores)

    def _first(self, places: Sequence[Place], folder: str) -> tuple[Place | None, list[str]]:
        """The first place where something is, and what. An empty folder counts where nothing else is: it may still be filled."""
        empty: tuple[Place | None, list[str]] = (None, [])
        for place in places:
            paths = list(self._matches(_join(folder, place.path)))
            if any(not _is_empty(os.path.join(self.root, path)) for path in paths):
                return place, paths
            if paths and empty[0] is None:
                empty = place, paths
        return empty

    def _matches(self, path: str) -> Iterator[str]:
        check_path(path, "recipe")
        if not _PATTERN.intersection(path):
            if os.path.exists(os.path.join(self.root, path)):
                yield path
            return
        # images_10.zip after images_9.zip, on every file system
        yield from sorted(glob.glob(path, root_dir=self.root), key=lambda name: (len(name), name))


def _is_empty(path: str) -> bool:
    """Whether it is a folder with nothing in it."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except OSError:
        return False  # a file, or what cannot be looked into


def _join(folder: str, path: str) -> str:
    if path in ("", "."):
        return folder or path
    return f"{folder}/{path}" if folder else path


def _any_of(paths: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(paths))
