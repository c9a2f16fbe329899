"""What a data set holds, counted from its sidecars: no shard is read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shardify.audit import describe_counts
from shardify.errors import FormatError
from shardify.format.shards import ShardFile, Shards, local_sidecars, open_shards
from shardify.format.sidecar import read_shard_info, read_sidecar

_COLUMNS = ("images", "turns", "words", "source")


@dataclass(frozen=True, slots=True)
class Spread:
    """How a number spreads over samples or images."""

    min: float
    median: float
    mean: float
    max: float


@dataclass(frozen=True, slots=True)
class DataSetInfo:
    """What `describe` finds.

    Attributes:
        shards: how many.
        samples: in these shards.
        bytes: of the tars together.
        digest: identifies content and order of the shards (`ShardSet.fingerprint`).
        records_in: samples and records set aside together; None when some of the shards were made by others, who may have left out more.
        set_aside: records that were not packed into these shards, by reason code.
        notes: kept-and-counted codes, as recorded when the shards were written.
        images: images in all samples.
        text_only: samples without an image.
        multi_image: samples with two images or more.
        formats: images by sniffed format.
        unreadable: images whose header could not be read; they have no size.
        width: pixels as stored; None without images. So `height`, and `megapixels`, width x height / 1e6.
        turns: per sample; None without samples. So `words`, whitespace words over all turns.
        sources: samples by record file.
    """

    shards: int
    samples: int
    bytes: int
    digest: str
    records_in: int | None
    set_aside: dict[str, int]
    notes: dict[str, int]
    images: int
    text_only: int
    multi_image: int
    formats: dict[str, int]
    unreadable: int
    width: Spread | None
    height: Spread | None
    megapixels: Spread | None
    turns: Spread | None
    words: Spread | None
    sources: dict[str, int]


def describe(shards: Shards) -> DataSetInfo:
    """Count what shards hold.

    Args:
        shards: as for `shardify.format.shards.open_shards`.

    Raises:
        UsageError, FormatError: as `open_shards`.
    """
    opened = open_shards(shards)
    sidecars = local_sidecars(opened.shards)
    tables = [_read(shard, path) for shard, path in zip(opened.shards, sidecars, strict=True)]
    table = pa.concat_tables(tables)
    set_aside: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    reconciled = True
    for path in sidecars:
        recorded = read_shard_info(path)
        reconciled &= bool(recorded.plan)
        set_aside.update(item.code for item in recorded.set_aside)
        notes.update(recorded.notes)
    images_each = pc.list_value_length(table["images"]).to_numpy()
    images = pc.list_flatten(table["images"]).combine_chunks()
    width, height = images.field("width").to_numpy(), images.field("height").to_numpy()
    readable = (width > 0) & (height > 0)
    width, height = width[readable], height[readable]
    return DataSetInfo(
        shards=len(opened.shards),
        samples=table.num_rows,
        bytes=sum(shard.bytes for shard in opened.shards),
        digest=opened.fingerprint["digest"],
        records_in=table.num_rows + set_aside.total() if reconciled else None,
        set_aside=_ordered(set_aside),
        notes=_ordered(notes),
        images=len(images),
        text_only=int((images_each == 0).sum()),
        multi_image=int((images_each > 1).sum()),
        formats=_value_counts(images.field("format")),
        unreadable=int((~readable).sum()),
        width=_spread(width),
        height=_spread(height),
        megapixels=_spread(width * height.astype(np.float64) / 1e6),
        turns=_spread(table["turns"].to_numpy()),
        words=_spread(table["words"].to_numpy()),
        sources=_value_counts(table["source"]),
    )


def print_info(shards: Shards, *, as_json: bool = False) -> None:
    """Print `describe(shards)` for people, or as one JSON object with the same names.

    Raises:
        UsageError, FormatError: as `describe`.
    """
    found = describe(shards)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        print("\n".join(_lines(found)))


def _lines(found: DataSetInfo) -> list[str]:
    aside = sum(found.set_aside.values())
    facts = [
        ("shards", f"{found.shards:,}, {found.bytes / 1e6:,.1f} MB, digest {found.digest}"),
        ("samples", f"{found.samples:,}"),
        (
            "records",
            f"{found.records_in:,} = {found.samples:,} packed + {aside:,} set aside"
            if found.records_in
            else "",
        ),
        ("set aside", describe_counts(found.set_aside)),
        ("notes", describe_counts(found.notes)),
        (
            "images",
            f"{found.images:,}; {found.text_only:,} samples have none, {found.multi_image:,} have several",
        ),
        ("formats", describe_counts(found.formats)),
        ("unreadable", f"{found.unreadable:,}" if found.unreadable else ""),
        ("sources", describe_counts(found.sources)),
    ]
    lines = [f"{name:<11}{text}" for name, text in facts if text]
    spreads = [
        ("width", found.width),
        ("height", found.height),
        ("megapixels", found.megapixels),
        ("turns", found.turns),
        ("words", found.words),
    ]
    rows = [(name, spread) for name, spread in spreads if spread is not None]
    if rows:
        lines += ["", f"{'':<11}{'min':>10}{'median':>10}{'mean':>10}{'max':>10}"]
    for name, spread in rows:
        numbers = (spread.min, spread.median, spread.mean, spread.max)
        digits = 2 if name == "megapixels" else 1
        lines.append(f"{name:<11}" + "".join(f"{_number(value, digits):>10}" for value in numbers))
    return lines


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if value == int(value) and digits == 1 else f"{value:,.{digits}f}"


def _read(shard: ShardFile, sidecar: str) -> pa.Table:
    table = read_sidecar(sidecar, _COLUMNS).replace_schema_metadata(None)
    if table.num_rows != shard.samples:
        raise FormatError(f"{shard.sidecar}: {table.num_rows} samples, but the shard holds {shard.samples}")
    return table


def _value_counts(values: pa.Array) -> dict[str, int]:
    counted = pc.value_counts(values).to_pylist()
    return _ordered({item["values"]: item["counts"] for item in counted})


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _spread(values: npt.NDArray[np.integer[Any] | np.floating[Any]]) -> Spread | None:
    if not len(values):
        return None
    return Spread(*(float(measure(values)) for measure in (np.min, np.median, np.mean, np.max)))
