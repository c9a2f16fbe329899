"""A prefix of an object store as a folder of images: listed once, read by one request an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shardify.errors import PackError, SourceError
from shardify.format import objects
from shardify.format.bucket import WRITABLE, join_url, shown, split_url
from shardify.images.listing import Listing
from shardify.images.stores import (
    LARGEST,
    LISTED,
    MAX_IMAGE_BYTES,
    MISSING,
    PLAIN_FILE,
    Location,
    check_size,
    missing_rows,
)

_EXAMPLES = 3
_SHOWN = 100  # characters of a name


@dataclass(frozen=True, slots=True)
class RemoteReader:
    """Reads objects below the URL `root`."""

    root: str

    def read(self, name: str, location: Location) -> bytes:
        """See `ImageReader`."""
        check_size(location.size)
        url = join_url(self.root, name)
        data = objects.get(url, most=MAX_IMAGE_BYTES)
        if data is None:
            raise PackError(
                f"{shown(url)}: has gone since it was listed; once it is back, the same command again continues"
            )
        return data


class RemoteStore:
    """The objects below a prefix.

    Args:
        path: the prefix's URL.
        mount: see `StoreSpec`.
        names: of the objects.
        sizes: int64 [n], of each in bytes.
    """

    kind = "folder"
    fingerprint = ""

    def __init__(self, path: str, mount: str, names: Listing, sizes: npt.NDArray[np.int64]) -> None:
        self.path = path
        self.mount = mount
        self.reader = RemoteReader(path)
        self._names = names
        self._sizes = np.minimum(sizes, LARGEST)

    @property
    def name(self) -> str:
        """The last part of the prefix, or the bucket."""
        place = split_url(self.path)
        return place.key.rpartition("/")[2] or place.bucket

    @property
    def examples(self) -> Sequence[str]:
        """See `ImageStore`."""
        return [self._names.name(number)[:_SHOWN] for number in range(min(_EXAMPLES, len(self._names)))]

    def find(self, names: Sequence[str]) -> npt.NDArray[np.void]:
        """See `ImageStore`."""
        return self._rows(self._names.find(names), PLAIN_FILE)

    def listing(self) -> Listing:
        """See `ImageStore`."""
        return self._names

    def listed(self, numbers: Sequence[int]) -> npt.NDArray[np.void]:
        """See `ImageStore`."""
        rows = self._rows(np.array(numbers, np.int64), LISTED)
        rows["offset"] = numbers
        return rows

    def listed_name(self, number: int) -> str:
        """See `ImageStore`."""
        return self._names.name(number)

    def _rows(self, numbers: npt.NDArray[np.int64], method: int) -> npt.NDArray[np.void]:
        rows = missing_rows(len(numbers))
        held = numbers >= 0
        rows["size"][held] = rows["stored"][held] = self._sizes[numbers[held]]
        rows["method"][held] = method
        rows["store"] = np.where(held, 0, MISSING)
        return rows


def open_remote(url: str, mount: str = "") -> RemoteStore:
    """Open a prefix of an object store.

    Raises:
        UsageError: no such URL.
        SourceError: nothing is there, it cannot be reached or listed, or it is an archive.
    """
    if split_url(url).scheme not in WRITABLE:
        raise SourceError(
            f"{shown(url)}: images there cannot be listed; copy them to a folder or an object store, or give their archive as a file"
        )
    try:
        found = objects.list_objects(url)
    except PackError as error:
        raise SourceError(str(error)) from None
    if not len(found.ends):
        raise SourceError(f"{shown(url)}: no images there: nothing is stored below this prefix")
    return RemoteStore(url, mount, Listing(found.names, found.ends), found.sizes)
