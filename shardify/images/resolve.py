"""Finds images in stores."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardify.errors import SampleError
from shardify.images.stores import (
    BY_PREFIX,
    EXACT,
    LISTED,
    LOCATION_DTYPE,
    MAX_IMAGE_BYTES,
    MISSING,
    PLAIN_FILE,
    READABLE_METHODS,
    UNSEEN,
    ImageStore,
    Location,
)
from shardify.records import ImageRef


@dataclass(frozen=True, slots=True)
class Rule:
    """A path that begins with `old` is looked up with `new` in its place."""

    old: str
    new: str


@dataclass(frozen=True, slots=True, eq=False)
class Located:
    """Where images are: `rows` [n] of `LOCATION_DTYPE`, and `codes`, the reason of each image's fault, empty when it was found."""

    rows: npt.NDArray[np.void]
    codes: list[str]


class Resolver:
    """Finds images in stores, in the stores' order."""

    def __init__(self, stores: Sequence[ImageStore], prefixes: Sequence[Sequence[tuple[str, str]]]) -> None:
        self._stores = stores
        pairs = dict.fromkeys((old, new) for source in prefixes for old, new in source)
        self.rules = (Rule("", ""), *(Rule(old, new) for old, new in pairs))
        numbers = {(rule.old, rule.new): number for number, rule in enumerate(self.rules) if number}
        self._numbers = [[numbers[pair] for pair in source] for source in prefixes]

    def locate(self, paths: Sequence[str], source: int) -> Located:
        """Where the images of records of one source are."""
        rows = np.zeros(len(paths), dtype=LOCATION_DTYPE)
        rows["store"] = MISSING
        codes = ["image-missing"] * len(paths)
        waiting: dict[int, tuple[str, ...]] = {}
        for number, path in enumerate(paths):
            try:
                waiting[number] = ImageRef(path).parts()
            except SampleError as error:
                codes[number] = error.code
        for rule in (*self._numbers[source], 0):
            old, new = self.rules[rule].old, self.rules[rule].new
            for store_number, store in enumerate(self._stores):
                wanted = [n for n, parts in waiting.items() if "/".join(parts).startswith(old)]
                asked = [tuple((new + "/".join(waiting[n]).removeprefix(old)).split("/")) for n in wanted]
                for number, location in zip(wanted, store.locate(asked), strict=True):
                    if location is not None:
                        rows[number] = (*location, store_number, rule, BY_PREFIX if rule else EXACT)
                        codes[number] = fault_of(location)
                        if location.method != UNSEEN:
                            del waiting[number]
        return Located(rows, codes)


def fault_of(location: Location) -> str:
    """What is wrong with an image that is there, as far as its whereabouts say."""
    if location.method not in (PLAIN_FILE, LISTED, UNSEEN, *READABLE_METHODS):
        return "image-unreadable"
    return "image-too-large" if max(location.size, location.stored) > MAX_IMAGE_BYTES else ""
