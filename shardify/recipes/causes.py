"""Likely causes of what a check has found, from what people really run into; each says what to do."""

import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from shardify.recipes.check import ImagesSeen, RecordsSeen, shorten
from shardify.recipes.layout import Found
from shardify.recipes.schema import RecordEntry, load_recipe, recipe_names

_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_MOST_ENTRIES = 10_000  # of a folder that are looked at
_CC3M = re.compile(r"(?:.*/)?GCC_train_[0-9]{9}\.jpg")
_LCS = re.compile(r"(?:.*/)?[0-9]{5}/[0-9]{9}\.jpg")


def likely_causes(found: Found, records: Sequence[RecordsSeen], images: Sequence[ImagesSeen]) -> list[str]:
    """Why a recipe's files are not found, or not as published, each with what to do.

    Args:
        found: the recipe in its folder.
        records: what was seen of its records.
        images: what was seen of its images.
    """
    causes = [*_wrong_root(found), *_other_counts(records)]
    for seen in records:
        if seen.looked_for and not any(_of(seen)):
            causes += _nothing_found(seen, images)
        elif seen.looked_for:
            causes += _roots_not_found(seen, images)
    causes += _still_packed(found, images)
    causes += _empty(found, images)
    return list(dict.fromkeys(causes))


def _of(seen: RecordsSeen) -> tuple[int, int]:
    return seen.first.found, seen.random.found


def _wrong_root(found: Found) -> Iterator[str]:
    """Record files that lie one folder above or below the root."""
    tried = [path for entry in found.records if not entry.sources for path in entry.tried]
    plain = [path for path in dict.fromkeys(tried) if not set("*?[").intersection(path)]
    if not plain:
        return
    parent = os.path.dirname(os.path.abspath(found.root))
    folders = [parent, *(os.path.join(found.root, name) for name in _folders(found.root))]
    for folder in folders:
        there = [path for path in plain if os.path.exists(os.path.join(folder, path))]
        if there:
            deep = "too deep" if folder == parent else "too high"
            yield f"--root is one folder {deep}: {there[0]} lies in {folder}"
            return
    for path in plain:
        # a record file that was put where another part of the tree belongs
        base = os.path.basename(path)
        for folder in ["", *_folders(found.root)]:
            if os.path.isfile(os.path.join(found.root, folder, base)):
                yield (
                    f"{os.path.join(folder, base)} is there, but {path} was looked for; move it, or link it there"
                )
                return


def _other_counts(records: Sequence[RecordsSeen]) -> Iterator[str]:
    """Files with the count of another data set."""
    for seen in records:
        if seen.records is None or seen.count_fits:
            continue
        others = [
            name for name, entry in _all_entries() if name != seen.recipe and seen.records in entry.counts
        ]
        if others:
            yield (
                f"{shorten(seen.paths)} has as many records as {' and '.join(dict.fromkeys(others))}: it is the record file of that "
                "data set"
            )
        elif not seen.records:
            yield f"{shorten(seen.paths)} is an empty list: the download or a conversion failed"
        elif seen.expected and seen.records < min(seen.expected):
            yield f"{shorten(seen.paths)} is a part, or another revision, of what was published"


def _all_entries() -> Iterator[tuple[str, RecordEntry]]:
    for name in recipe_names():
        for entry in load_recipe(name).records:
            yield name, entry


def _nothing_found(seen: RecordsSeen, images: Sequence[ImagesSeen]) -> Iterator[str]:
    """No image at all: the names on disk tell whose they are."""
    wanted = seen.looked_for[0]
    stores = [store for store in images if store.files]
    names = [name for store in stores for name in store.examples]
    if _LCS.fullmatch(wanted) and any(_CC3M.fullmatch(name) for name in names):
        store = next(store for store in stores if any(map(_CC3M.fullmatch, store.examples)))
        yield (
            f"{shorten(store.paths)} holds the images of LLaVA-CC3M-Pretrain-595K ({store.examples[0]}), the records name those of "
            f"LLaVA-Pretrain ({wanted}). MG-LLaVA's dataset_prepare.md links the one for the other: get images.zip of "
            "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain"
        )
    elif _CC3M.fullmatch(wanted) and any(_LCS.fullmatch(name) for name in names):
        store = next(store for store in stores if any(map(_LCS.fullmatch, store.examples)))
        yield (
            f"{shorten(store.paths)} holds the images of LLaVA-Pretrain ({store.examples[0]}), the records name those of "
            f"LLaVA-CC3M-Pretrain-595K ({wanted}): get images.zip of "
            "https://huggingface.co/datasets/liuhaotian/LLaVA-CC3M-Pretrain-595K"
        )
    elif names:
        yield (
            f"{shorten(seen.paths)} names images such as {wanted}, the stores hold such as {names[0]}: images of another data set, or "
            "of another release of it"
        )


def _roots_not_found(seen: RecordsSeen, images: Sequence[ImagesSeen]) -> Iterator[str]:
    """Some image roots find nothing while others do."""
    for root, (there, looked) in seen.roots.items():
        if there or not looked:
            continue
        stores = [store for store in images if any(root in path for path in store.tried)]
        if stores and not any(store.paths for store in stores):
            yield f"of {root} nothing is found: {' or '.join(dict.fromkeys(stores[0].tried))} is missing"
        elif stores:
            examples = ", ".join(stores[0].examples[:2]) or "nothing"
            yield f"of {root} nothing is found: {shorten(stores[0].paths)} holds {examples}"


def _still_packed(found: Found, images: Sequence[ImagesSeen]) -> Iterator[str]:
    """Archives that lie where their content should be."""
    used = {os.path.abspath(store.path) for store in found.stores}
    for seen in images:
        if seen.fault or (seen.paths and seen.files and not _only_archives(seen)):
            continue
        folders = dict.fromkeys([*seen.paths, *(os.path.dirname(path) for path in seen.tried)])
        for folder in folders:
            for name in _archives(os.path.join(found.root, folder)):
                path = os.path.join(folder, name)
                if os.path.abspath(os.path.join(found.root, path)) not in used:
                    where = seen.tried[0]
                    yield (
                        f"{path} is still packed: unpack it as {where}"
                        + (f", or name it {_archive_of(seen)}" if _archive_of(seen) else "")
                    )


def _only_archives(seen: ImagesSeen) -> bool:
    return bool(seen.examples) and all(name.lower().endswith(_ARCHIVES) for name in seen.examples)


def _archive_of(seen: ImagesSeen) -> str:
    """The name under which an entry takes an archive as it is."""
    return next((path for path in seen.tried if path.endswith(_ARCHIVES) and "[" not in path), "")


def _empty(found: Found, images: Sequence[ImagesSeen]) -> Iterator[str]:
    for seen in images:
        if seen.files == 0 and seen.paths:
            yield f"{shorten(seen.paths)} is empty: nothing was downloaded or unpacked into it"
    if not _names(found.root):
        yield f"{found.root} is empty, or may not be looked into"


def _folders(path: str) -> list[str]:
    return [name for name in _names(path) if os.path.isdir(os.path.join(path, name))]


def _archives(path: str) -> list[str]:
    return [name for name in _names(path) if name.lower().endswith(_ARCHIVES)]


def _names(path: str) -> list[str]:
    """What lies in a folder, as far as it can be looked into and is not too much."""
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in islice(entries, _MOST_ENTRIES))
    except OSError:
        return []
