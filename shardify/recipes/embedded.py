"""Quick looks into sources with images inside, Parquet and WebDataset tars: which records have one, without reading any of them."""

import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shardify.errors import SourceError
from shardify.format.names import IMAGE_FORMATS
from shardify.sources.parquet import open_parquet

_COLUMNS = ("image", "images")
_MOST_GROUPS = 20  # row groups read for one look; rows of others are passed over


class ParquetTable:
    """A file of records.

    Args:
        path: where it is.

    Raises:
        SourceError: it is no Parquet file, or has no rows with conversations.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        with open_parquet(path) as file:
            names = file.schema_arrow.names
            groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *groups])
        if not {"conversations", "messages", "texts"}.intersection(names):
            raise SourceError(
                f"{path}: has the columns {', '.join(names[:10])}; 'conversations', 'messages' or 'texts' is needed"
            )
        self._column = next((name for name in _COLUMNS if name in names), None)

    @property
    def records(self) -> int:
        """Rows."""
        return int(self._starts[-1])

    def images(self, numbers: Sequence[int]) -> Iterator[int]:
        """How many images rows of these ascending numbers have.

        Raises:
            SourceError: the file is damaged.
        """
        groups = np.searchsorted(self._starts, np.asarray(numbers), side="right") - 1
        wanted = dict.fromkeys(groups.tolist())
        try:
            for group in list(wanted)[:_MOST_GROUPS]:
                counts = self._counts(group)
                first = int(self._starts[group])
                for number, of in zip(numbers, groups.tolist(), strict=True):
                    if of == group:
                        yield counts[number - first]
        except IndexError:
            raise SourceError(
                f"{self._path}: damaged: it has fewer rows or columns than it says; get it again"
            ) from None

    def _counts(self, group: int) -> list[int]:
        rows = int(self._starts[group + 1] - self._starts[group])
        if self._column is None:
            return [0] * rows
        try:
            with open_parquet(self._path) as file:
                # of a struct only one child: whether the struct itself is null shows in any of them
                column = file.read_row_group(group, columns=_leaves(file, self._column)).column(0)
                values = column.to_pylist()
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise SourceError(f"{self._path}: cannot be read as Parquet ({error})") from None
        return [_count(value) for value in values]


class TarSamples:
    """A WebDataset tar of samples; only its headers are read.

    Args:
        path: where it is.

    Raises:
        SourceError: it is no tar, or damaged.
    """

    def __init__(self, path: str) -> None:
        counts: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, slash, base = member.name.rpartition("/")
                    name, dot, field = base.partition(".")
                    if member.isreg() and name and dot:
                        key = f"{folder}{slash}{name}"
                        is_image = field.lower().rpartition(".")[2] in IMAGE_FORMATS
                        counts[key] = counts.get(key, 0) + is_image
                    tar.members = []  # type: ignore[attr-defined]  # a million of them would be kept
        except Exception as error:  # noqa: BLE001 - tarfile raises nearly anything on damaged headers
            raise SourceError(f"{path}: cannot be read as a tar ({error})") from None
        self._counts = list(counts.values())

    @property
    def records(self) -> int:
        """Samples."""
        return len(self._counts)

    def images(self, numbers: Sequence[int]) -> Iterator[int]:
        """How many images samples of these numbers have."""
        yield from (self._counts[number] for number in numbers)


def _leaves(file: pq.ParquetFile, column: str) -> list[str]:
    leaves: list[str] = [file.schema.column(number).path for number in range(len(file.schema))]
    mine = [leaf for leaf in leaves if leaf == column or leaf.startswith(f"{column}.")]
    return [leaf for leaf in mine if leaf.endswith(".path")] or mine


def _count(value: Any) -> int:
    if value is None or value == "":
        return 0
    return len(value) if isinstance(value, list) else 1
