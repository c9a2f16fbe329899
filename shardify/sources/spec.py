"""What a source of records is before it is opened, and what it may bring along."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """Captions that take the place of the last turn's text, by image name (LLaVA-CC3M's metadata.json).

    Attributes:
        path: a JSON array of objects.
        key: the field with the image's file name.
        field: the field with the caption; where it is absent, null or empty, the record keeps its own and is counted.
    """

    path: str
    key: str = "image"
    field: str = "blip_caption"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """One source of records.

    Attributes:
        path: a file, a folder or a URL.
        name: what it is called in every output; never absolute. None for its base name.
        kind: ``auto`` (by name and first bytes), ``llava``, ``parquet``, ``webdataset`` or ``prompts``.
        prefixes: of its image paths: (old, new) pairs, tried in this order before the path as it stands. ``("", "images/")`` fits all.
        captions: replaces captions.
        licence: of the data, for the manifest.
        citation: likewise.
    """

    path: str
    name: str | None = None
    kind: str = "auto"
    prefixes: tuple[tuple[str, str], ...] = ()
    captions: Captions | None = None
    licence: str = ""
    citation: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Image bytes that came with the records, spooled into one file.

    Attributes:
        path: the file.
        places: int64 [m, 2], offset and size of each image, record after record; offset -1 for one that did not come along: its path is
            looked for in the image stores.
        counts: int64 [n], images of each record.
    """

    path: str
    places: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
