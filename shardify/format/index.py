"""index.npy: what the loader needs of every sample, memory-mapped, 24 bytes each, in manifest order."""

import os
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shardify.errors import FormatError
from shardify.format.hashing import hash_file
from shardify.format.sidecar import ShardInfo, numbers_of

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<i8"),  # of the sample's first header in its shard
        ("shard", "<u4"),  # its number in the manifest
        ("size", "<u4"),  # to the padded end
        ("words", "<u4"),  # whitespace words over all turns
        ("images", "<u2"),
        ("flags", "<u2"),
    ]
)
FLAG_TOLERANT = 1
"""The JSON member is JSON only to a tolerant reader."""

COLUMNS = ("offset", "size", "words", "images")
"""The sidecar columns that rows are made from."""

MAX_SIZE = 2**32 - 1
MAX_IMAGES = 2**16 - 1
"""What a row can say: bytes and images of one sample."""


def index_rows(table: pa.Table, info: ShardInfo, shard: int) -> npt.NDArray[np.void]:
    """The index rows of one shard, from its sidecar.

    Args:
        table: the sidecar with at least `COLUMNS`.
        info: its metadata.
        shard: the shard's number.

    Raises:
        FormatError: a sample is larger than 4 GiB or has more than 65,535 images.
    """
    rows = np.zeros(table.num_rows, dtype=INDEX_DTYPE)
    size = numbers_of(table["size"])
    images = numbers_of(pc.list_value_length(table["images"]))
    if len(rows) and (size.max() > MAX_SIZE or images.max() > MAX_IMAGES):
        raise FormatError(
            f"shard {shard}: a sample of {size.max()} bytes or {images.max()} images is beyond the index"
        )
    rows["offset"] = numbers_of(table["offset"])
    rows["size"] = size
    rows["words"] = numbers_of(table["words"])
    rows["images"] = images
    rows["shard"] = shard
    rows["flags"][info.tolerant] |= FLAG_TOLERANT
    return rows


class _Sink(Protocol):
    def write(self, data: Any, /) -> int | None: ...


def write_index(sink: _Sink, parts: Iterable[npt.NDArray[np.void]]) -> None:
    """Write the content of index.npy from the rows of each shard, in order."""
    rows = list(parts)
    np.lib.format.write_array(
        sink,
        np.concatenate(rows) if rows else np.zeros(0, INDEX_DTYPE),
        allow_pickle=False,
    )


def read_index(path: str | os.PathLike[str], *, samples: int) -> npt.NDArray[np.void]:
    """The index, memory-mapped read-only, [samples] of `INDEX_DTYPE`: the file's first rows, where an addition has brought more than is finished.

    Raises:
        FormatError: it is missing, damaged, or not of `samples` samples.
    """
    try:
        index = np.load(path, mmap_mode="r" if samples else None, allow_pickle=False)
    except FileNotFoundError:
        raise FormatError(f"{os.fspath(path)}: no such index") from None
    except Exception as error:  # noqa: BLE001 - numpy's header reader raises what its parsers do
        raise FormatError(f"{os.fspath(path)}: not a readable index ({error})") from None
    if (
        not isinstance(index, np.ndarray)
        or index.dtype != INDEX_DTYPE
        or index.ndim != 1
        or len(index) < samples
    ):
        found = getattr(index, "shape", None), getattr(index, "dtype", None)
        raise FormatError(
            f"{os.fspath(path)}: does not belong to its manifest, which counts {samples} samples; it holds {found[0]} of {found[1]}"
        )
    return index[:samples]


def has_digest(index: npt.NDArray[np.void], path: str | os.PathLike[str], digest: str) -> bool:
    """Whether `digest`, xxh3_128 in hexadecimal, is that of the file from which `read_index` has read, or of one with just these rows."""
    if hash_file(path) == digest:
        return True
    rows = _Hashed()
    write_index(rows, [index])
    return rows.digest.hexdigest() == digest


class _Hashed:
    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
