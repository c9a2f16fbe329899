"""Look whether a folder has what a recipe needs: files, counts, and whether the first and random records find their images.

Reads little: the record files are split, some thousand records are looked up in the stores, nothing is decoded and nothing written but
what a source of another form than JSON needs for being split, in a temporary folder.
"""

import glob
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from shardify.errors import RecordError, ShardifyError
from shardify.images.resolve import Resolver
from shardify.images.stores import ImageStore, open_store
from shardify.prepare import prepare
from shardify.recipes.embedded import ParquetTable, TarSamples
from shardify.recipes.layout import Found, FoundImages, FoundRecords, find_recipe
from shardify.recipes.schema import Origin, Recipe
from shardify.records import MAX_RECORD_BYTES, ImageRef, Sample
from shardify.sources.llava import RecordFile, open_unchanged
from shardify.sources.open import open_source
from shardify.sources.spec import SourceSpec

LOOKED_AT = 1000
"""Records looked at from the start of an entry, and as many at random."""

ROUGHLY = 0.02
"""How far from a rounded published number a count may be."""

MAY_MISS = 0.25
"""Share of records with images that must find them where a recipe says that some are missing: half of SAM is."""

_EXAMPLES = 3
_FEW = 10
_ROOT_PARTS = 2  # folders of a path that make an image root


@dataclass(frozen=True, slots=True)
class Sight:
    """What some records of an entry have.

    Attributes:
        records: how many were looked at.
        found: with images that are all there.
        missing: with an image that is not.
        text_only: without image.
        broken: no records at all, or not readable.
    """

    records: int = 0
    found: int = 0
    missing: int = 0
    text_only: int = 0
    broken: int = 0

    @property
    def share(self) -> float | None:
        """Of the records with images, those whose images are there; None without any."""
        looked = self.found + self.missing
        return self.found / looked if looked else None


@dataclass(frozen=True, slots=True)
class RecordsSeen:
    """One entry of records.

    Attributes:
        recipe: the recipe that has it.
        paths: what is there, relative to the root.
        tried: where it may be.
        records: how many it has; None where that could not be found out.
        expected: the published counts.
        about: a rounded published count.
        first: the first thousand records.
        random: a random thousand.
        roots: image root -> records whose images are there, and records looked at.
        looked_for: some image paths that were not found.
        captions_missing: caption files that are not there.
        fault: why it cannot be read.
    """

    recipe: str
    paths: tuple[str, ...]
    tried: tuple[str, ...]
    records: int | None = None
    expected: tuple[int, ...] = ()
    about: int | None = None
    first: Sight = Sight()
    random: Sight = Sight()
    roots: dict[str, tuple[int, int]] = field(default_factory=dict)
    looked_for: tuple[str, ...] = ()
    captions_missing: tuple[str, ...] = ()
    fault: str = ""

    @property
    def count_fits(self) -> bool:
        """Whether the count is a published one, or close to the rounded one."""
        if self.records is None:
            return False
        if self.expected:
            return self.records in self.expected
        return self.about is None or abs(self.records - self.about) <= ROUGHLY * self.about


@dataclass(frozen=True, slots=True)
class ImagesSeen:
    """One entry of images.

    Attributes:
        recipe: the recipe that has it.
        paths: what is there, relative to the root.
        tried: where it may be.
        optional: whether the data set can be packed without it.
        files: how many files it holds; None where that could not be found out.
        expected: how many the published store holds.
        examples: some of its names.
        fault: why it cannot be read.
    """

    recipe: str
    paths: tuple[str, ...]
    tried: tuple[str, ...]
    optional: bool
    files: int | None = None
    expected: int | None = None
    examples: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What was seen of a recipe in a folder.

    Attributes:
        recipe: its name.
        root: the folder.
        records: entries of records.
        images: entries of images.
        faults: what is not as it should be, one line each.
        causes: likely causes of that, and what to do.
        get: where files can be had.
    """

    recipe: str
    root: str
    records: tuple[RecordsSeen, ...]
    images: tuple[ImagesSeen, ...]
    faults: tuple[str, ...]
    causes: tuple[str, ...]
    get: tuple[Origin, ...]

    @property
    def complete(self) -> bool:
        """Whether everything is there, as published."""
        return not self.faults


def check_recipe(
    recipe: Recipe, root: str | os.PathLike[str], *, caption: str | None = None, seed: int = 0
) -> Report:
    """Look at a recipe's files below a folder.

    Args:
        recipe: what should be there.
        root: the folder.
        caption: as `resolve_recipe`.
        seed: of the random thousand.

    Raises:
        UsageError: as `resolve_recipe`.
        SourceError: the root is no folder, or an included recipe cannot be read. All else is in the report.
    """
    from shardify.recipes.causes import likely_causes

    found = find_recipe(recipe, root, caption)
    stores, images = _open_stores(found)
    prefixes = [source.prefixes for source in found.sources]
    resolver = Resolver(stores, prefixes)
    records = []
    first_source = 0
    for entry in found.records:
        records.append(_see_records(entry, resolver, first_source, seed))
        first_source += len(entry.sources)
    faults = _faults(records, images, "image-missing" in found.expect)
    causes = likely_causes(found, records, images) if faults else ()
    return Report(
        recipe.name, found.root, tuple(records), tuple(images), faults, tuple(causes), tuple(found.get)
    )


def _open_stores(found: Found) -> tuple[list[ImageStore], list[ImagesSeen]]:
    stores: list[ImageStore] = []
    seen: list[ImagesSeen] = []
    opened: dict[Any, ImageStore] = {}
    for entry in found.images:
        files, examples, fault = 0, [], ""
        try:
            for spec in entry.stores:
                if spec not in opened:
                    opened[spec] = open_store(spec.path, spec.mount)
                    stores.append(opened[spec])
                listing = opened[spec].listing()
                files += len(listing)
                examples += [listing.name(number) for number in range(min(len(listing), _EXAMPLES))]
        except ShardifyError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{error.filename or entry.tried[0]}: {error.strerror or error}"
        seen.append(_images_seen(found, entry, files, examples, fault))
    return stores, seen


def _images_seen(
    found: Found, entry: FoundImages, files: int, examples: Sequence[str], fault: str
) -> ImagesSeen:
    return ImagesSeen(
        recipe=entry.recipe.name,
        paths=tuple(os.path.relpath(store.path, found.root) for store in entry.stores),
        tried=entry.tried,
        optional=entry.entry.optional,
        files=files if entry.stores and not fault else None,
        expected=entry.entry.holds,
        examples=tuple(examples[:_EXAMPLES]),
        fault=fault,
    )


def _see_records(entry: FoundRecords, resolver: Resolver, first_source: int, seed: int) -> RecordsSeen:
    seen = RecordsSeen(
        recipe=entry.recipe.name,
        paths=tuple(source.name or "" for source in entry.sources),
        tried=entry.tried,
        expected=tuple(entry.entry.counts),
        about=entry.entry.about,
        captions_missing=entry.captions,
    )
    if not entry.sources:
        return seen
    looks = _Looks(resolver)
    try:
        with tempfile.TemporaryDirectory(prefix="shardify-check-") as spool:
            parts: list[_Part] = []
            for number, source in enumerate(entry.sources):
                parts += _open_parts(source, os.path.join(spool, str(number)), first_source + number)
            total = sum(part.records for part in parts)
            first = looks.look(parts, np.arange(min(total, LOOKED_AT)))
            random = looks.look(parts, _draw(total, seed))
    except ShardifyError as error:
        return replace(seen, fault=str(error))
    except OSError as error:
        return replace(seen, fault=f"{error.filename or 'records'}: {error.strerror or error}")
    return replace(
        seen,
        records=total,
        first=first,
        random=random,
        roots={root: (looks.found[root], looks.looked[root]) for root in sorted(looks.looked)},
        looked_for=tuple(looks.missing),
    )


def _draw(total: int, seed: int) -> npt.NDArray[np.int64]:
    """Numbers of random records, ascending, none twice."""
    size = min(total, LOOKED_AT)
    return np.sort(np.random.default_rng(seed).choice(total, size, replace=False))


@dataclass(frozen=True, slots=True)
class _Part:
    """A source: how many records it has, and how to see some of them; `source` is its number for the resolver."""

    records: int
    source: int
    read: Callable[[Sequence[int]], Iterator[Sample | int | None]]


def _open_parts(spec: SourceSpec, spool: str, source: int) -> list[_Part]:
    # what has images inside is looked at where it is: else all of them would be written out again
    for kind, ending, look in (("parquet", ".parquet", ParquetTable), ("webdataset", ".tar", TarSamples)):
        paths = _files(spec.path, ending)
        if spec.kind in (kind, "auto") and paths:
            looks = [look(path) for path in paths]
            return [_Part(one.records, source, one.images) for one in looks]
    os.makedirs(spool)
    file = open_source(replace(spec, captions=None), spool=spool)
    return [_Part(len(file.offsets), source, lambda numbers: _read(file, numbers))]


def _files(path: str, ending: str) -> list[str]:
    """The files of a folder with this ending, or the path itself where it has it."""
    if not os.path.isdir(path):
        return [path] if path.endswith(ending) else []
    return sorted(
        os.path.join(path, name) for name in glob.glob(f"**/*{ending}", root_dir=path, recursive=True)
    )


def _read(file: RecordFile, numbers: Sequence[int]) -> Iterator[Sample | int | None]:
    """The records of these numbers: a sample, the count of images that came with it, or None where it is broken."""
    descriptor = open_unchanged(file.path, file.stamp)
    try:
        for number in numbers:
            length = min(int(file.lengths[number]), MAX_RECORD_BYTES + 1)
            raw = os.pread(descriptor, length, int(file.offsets[number]))
            try:
                sample = prepare(raw).sample
            except RecordError:
                yield None
                continue
            yield sample if file.embedded is None else int(file.embedded.counts[number])
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class _Looks:
    """Looks records up, and keeps what was found by image root."""

    resolver: Resolver
    found: Counter[str] = field(default_factory=Counter)
    looked: Counter[str] = field(default_factory=Counter)
    missing: list[str] = field(default_factory=list)

    def look(self, parts: Sequence[_Part], numbers: npt.NDArray[np.int64]) -> Sight:
        """See the records of these numbers, counted over all parts."""
        counts: Counter[str] = Counter()
        start = 0
        for part in parts:
            inside = numbers[(numbers >= start) & (numbers < start + part.records)] - start
            start += part.records
            if len(inside):
                self._look_at(part, inside.tolist(), counts)
        return Sight(
            counts.total(), counts["found"], counts["missing"], counts["text_only"], counts["broken"]
        )

    def _look_at(self, part: _Part, numbers: list[int], counts: Counter[str]) -> None:
        references: list[tuple[ImageRef, ...]] = []
        for record in part.read(numbers):
            if record is None:
                counts["broken"] += 1
            elif isinstance(record, int):
                counts["found" if record else "text_only"] += 1
            elif not record.images:
                counts["text_only"] += 1
            else:
                references.append(record.images)
        paths = [image.path for images in references for image in images]
        located = self.resolver.locate(paths, part.source)
        at = 0
        for images in references:
            codes = located.codes[at : at + len(images)]
            at += len(images)
            there = not any(codes)
            counts["found" if there else "missing"] += 1
            root = _root_of(images[0].path)
            self.looked[root] += 1
            self.found[root] += there
            if not there and len(self.missing) < _EXAMPLES:
                self.missing.append(next(i.path for i, c in zip(images, codes, strict=True) if c))


def _root_of(path: str) -> str:
    """The folder of an image by which people know it: ``coco/train2017``; numbered folders belong to theirs."""
    folders = [part for part in path.split("/")[:-1] if not part.isdigit()]
    return "/".join(folders[:_ROOT_PARTS])[:200] or "."


def _faults(records: Sequence[RecordsSeen], images: Sequence[ImagesSeen], may_miss: bool) -> tuple[str, ...]:
    """Everything that is not as published, one line each."""
    faults: list[str] = []
    for seen in records:
        if not seen.paths:
            faults.append(f"no records: {' or '.join(seen.tried)}")
            continue
        what = shorten(seen.paths)
        faults += [f"no captions: {path}" for path in seen.captions_missing]
        if seen.fault:
            faults.append(f"{what}: {seen.fault}")
            continue
        if not seen.count_fits:
            faults.append(f"{what}: {seen.records:,} records; {expectation(seen)} were published")
        broken = seen.first.broken + seen.random.broken
        if broken:
            faults.append(
                f"{what}: {broken:,} of {seen.first.records + seen.random.records:,} are no records"
            )
        faults += _images_not_found(seen, what, MAY_MISS if may_miss else 1.0)
    for store in images:
        if not store.paths:
            if not store.optional:
                faults.append(f"no images: {' or '.join(dict.fromkeys(store.tried))}")
        elif store.fault:
            faults.append(store.fault)
        elif store.expected and store.files is not None and store.files < store.expected and not may_miss:
            faults.append(f"{shorten(store.paths)}: {store.files:,} files; {store.expected:,} were published")
        elif not store.files:
            faults.append(f"{shorten(store.paths)}: holds no files")
    return tuple(dict.fromkeys(faults))


def _images_not_found(seen: RecordsSeen, what: str, needed: float) -> list[str]:
    """Where fewer records than the share `needed` find their images: over all, or of one image root."""
    shares = [sight.share for sight in (seen.first, seen.random) if sight.share is not None]
    if shares and min(shares) < needed:
        examples = ", ".join(seen.looked_for)
        return [
            f"{what}: {min(shares):.1%} of the records looked at find their images; not found, for example: {examples}"
        ]
    # a root that is seldom in a large file may miss by chance what is known to be missing
    few = _FEW if (seen.records or 0) > LOOKED_AT else 1
    return [
        f"{what}: of {looked:,} records with images in {root}, {found:,} find them"
        for root, (found, looked) in seen.roots.items()
        if looked >= few and found / looked < needed
    ]


def expectation(seen: RecordsSeen) -> str:
    """The published count, for people."""
    if seen.expected:
        return " or ".join(f"{count:,}" for count in seen.expected)
    return f"about {seen.about:,}" if seen.about is not None else ""


def shorten(paths: Sequence[str]) -> str:
    """Paths for people: the first, and how many more."""
    return paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
