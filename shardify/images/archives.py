"""An archive as an image store: the names of its members, and where each is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from shardify.images.listing import Listing
from shardify.images.stores import ImageReader, base_name, missing_rows

_EXAMPLES = 3
_DIRECTORY_FIELDS = ("offset", "stored", "size", "crc", "method")


@dataclass(frozen=True, slots=True, eq=False)
class ArchiveStore:
    """An archive whose directory has been read.

    Attributes:
        path: as the user gave it.
        mount: see `StoreSpec`.
        reader: of its members.
        fingerprint: of its directory.
        names: of its members.
        rows: [members] of `LOCATION_DTYPE`.
        top: the single top folder that all members share, with its slash; empty where there is none.
    """

    path: str
    mount: str
    reader: ImageReader
    fingerprint: str
    names: Listing
    rows: npt.NDArray[np.void]
    top: str
    kind: str = "archive"

    @property
    def name(self) -> str:
        """The archive's own name."""
        return base_name(self.path)

    @property
    def examples(self) -> Sequence[str]:
        """See `ImageStore`."""
        return [self.names.name(number)[:100] for number in range(min(_EXAMPLES, len(self.names)))]

    def find(self, names: Sequence[str]) -> npt.NDArray[np.void]:
        """See `ImageStore`. A single top folder that all members share may be left out of a path."""
        numbers = self.names.find(names)
        if self.top:
            (absent,) = np.nonzero(numbers < 0)
            numbers[absent] = self.names.find([self.top + names[number] for number in absent.tolist()])
        rows = missing_rows(len(names))
        held = numbers >= 0
        rows[held] = self.rows[numbers[held]]
        return rows

    def listing(self) -> Listing:
        """See `ImageStore`."""
        return self.names

    def listed(self, numbers: Sequence[int]) -> npt.NDArray[np.void]:
        """See `ImageStore`."""
        return self.rows[np.array(numbers, np.int64)]

    def listed_name(self, number: int) -> str:
        """See `ImageStore`."""
        return self.names.name(number)


def make_store(
    path: str, mount: str, reader: ImageReader, names: Listing, rows: npt.NDArray[np.void]
) -> ArchiveStore:
    """The store of an archive with these members; its fingerprint is that of their names and places."""
    digest = xxhash.xxh3_128()
    for field in _DIRECTORY_FIELDS:
        digest.update(rows[field].tobytes())
    top = b""
    for number, chunk in enumerate(names.chunks()):
        digest.update(b"\0".join((*chunk, b"")))
        if number == 0:
            folder, slash, _ = chunk[0].partition(b"/")
            top = folder + slash if slash else b""
        if top and not all(name.startswith(top) for name in chunk):
            top = b""
    return ArchiveStore(
        path=path,
        mount=mount,
        reader=reader,
        fingerprint=digest.hexdigest(),
        names=names,
        rows=rows,
        top=top.decode("utf-8", "surrogatepass"),
    )
