"""What became of every record: the reason codes, the quarantine file, and the reconciliation in = packed + set aside."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from shardify.errors import PackError
from shardify.format.manifest import Counts
from shardify.format.sidecar import SetAside, ShardInfo

REASONS: Mapping[str, str] = {
    "record-too-large": "the record is larger than any conversation",
    "record-not-json": "the record is not JSON, not even to a tolerant reader",
    "record-not-object": "the record is JSON, but no object",
    "no-conversations": "there is no list of turns, or it is empty",
    "bad-turn": "a turn lacks the texts 'from' and 'value'",
    "image-not-a-path": "'image' holds something that is no path",
    "image-path-unsafe": "the image's path does not stay inside an image root",
    "image-missing": "no image root holds the image",
    "image-unreadable": "the image is there but cannot be read",
    "image-damaged": "the archive's copy of the image does not match the archive's directory",
    "image-empty": "the image has no bytes, or no pixels",
    "image-unrecognised": "the bytes are no image of a known format",
    "image-truncated": "the end of the image is missing",
    "image-too-large": "the image has more bytes or pixels than any photograph",
    "sample-too-large": "the sample has more bytes or images than an index row can say",
}
"""Why a record is set aside. A record has one reason, the first that is met."""

NOTES: Mapping[str, str] = {
    "id-missing": "the record has no id",
    "id-repeated": "an earlier record has the same id",
    "image-extension-differs": "an image is stored under its sniffed format, which its name's extension does not say",
    "record-tolerant": "the record is JSON only to a tolerant reader (NaN, a lone surrogate, a byte order mark)",
}
"""What is kept and counted. A record may have several notes, each counted once."""


def describe(item: SetAside) -> str:
    """One record set aside, for a message."""
    name = f" (id {item.id})" if item.id is not None else ""
    image = f", image {item.image!r}" if item.image is not None else ""
    detail = f": {item.detail}" if item.detail else ""
    return f"record {item.record} of {item.source}{name}{image}: {item.code}{detail}"


def describe_counts(counts: Mapping[str, int]) -> str:
    """Reasons or notes with their counts, the most frequent first: ``image-missing 12, bad-turn 1``."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{code} {count:,}" for code, count in ordered)


def reconcile(records_in: int, samples: int, shards: Iterable[ShardInfo]) -> Counts:
    """Count what became of all records.

    Raises:
        PackError: the sum does not hold.
    """
    set_aside: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for shard in shards:
        set_aside.update(item.code for item in shard.set_aside)
        notes.update(shard.notes)
    if records_in != samples + set_aside.total():
        raise PackError(
            f"{records_in} records in, but {samples} packed and {set_aside.total()} set aside: the shards do not belong together"
        )
    return Counts(records_in, samples, dict(sorted(set_aside.items())), dict(sorted(notes.items())))


def write_quarantine(
    path: str | os.PathLike[str], shards: Iterable[ShardInfo], sources: Sequence[str]
) -> None:
    """Write quarantine.jsonl, one line per record set aside, in record order, and flush it to disk.

    Args:
        path: the file.
        shards: all shards.
        sources: the record files' names, in their order.
    """
    rank = {name: number for number, name in enumerate(sources)}
    items = [item for shard in shards for item in shard.set_aside]
    items.sort(key=lambda item: (rank[item.source], item.record))
    with open(path, "wb") as file:
        file.writelines(msgspec.json.encode(item) + b"\n" for item in items)
        file.flush()
        os.fsync(file.fileno())
