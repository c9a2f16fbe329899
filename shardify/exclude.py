"""What an exclusion list did to a new data set, told line by line; `shardify.format.exclude` reads the list."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from shardify.audit import describe_counts
from shardify.format.exclude import EXCLUDED, Exclusions, shorten_entry
from shardify.format.sidecar import SetAside

_LINES = re.compile(r"line (\d+)")
_SHOWN = 10


def describe_lines(exclusions: Exclusions, lines: Sequence[int]) -> str:
    """The detail of a sample that these lines take out; `count_hits` reads it again."""
    return f"{', '.join(f'line {line}' for line in lines)} of {exclusions.name}"


def count_hits(items: Iterable[SetAside]) -> Counter[int]:
    """How many of the samples set aside each line has taken out."""
    return Counter(line for item in items for line in _lines_of(item))


def taken_by_name(exclusions: Exclusions, items: Iterable[SetAside]) -> list[tuple[str, int]]:
    """Source and record of the samples that were taken out by id or URL, not for their images."""
    of_images = {*exclusions.xxh3_64.values(), *exclusions.sha256.values()}
    return [
        (item.source, item.record)
        for item in items
        if (lines := _lines_of(item)) and of_images.isdisjoint(lines)
    ]


def _lines_of(item: SetAside) -> list[int]:
    """The lines that took out a sample; none for what was set aside for other reasons."""
    # the list's own name, which may be anything, stands behind the first "of"
    return list(map(int, _LINES.findall(item.detail.split(" of ", 1)[0]))) if item.code == EXCLUDED else []


def report_hits(exclusions: Exclusions, items: Iterable[SetAside]) -> list[str]:
    """What the list did: a line of summary, and one on the entries that took out nothing."""
    hits = count_hits(items)
    most = describe_counts({f"line {line}": count for line, count in hits.most_common(_SHOWN)})
    more = f", and {len(hits) - _SHOWN} more lines" if len(hits) > _SHOWN else ""
    report = [
        f"{exclusions.name}: {len(hits):,} of {len(exclusions.entries):,} entries hit"
        + (f" ({most}{more})" if hits else "")
    ]
    idle = [line for line in exclusions.entries if line not in hits]
    if idle:
        shown = ", ".join(
            f"line {line} ({shorten_entry(exclusions.entries[line])})" for line in islice(idle, _SHOWN)
        )
        more = f" and {len(idle) - _SHOWN} more" if len(idle) > _SHOWN else ""
        report.append(f"{exclusions.name}: nothing was hit by {shown}{more}")
    return report


def report_left(exclusions: Exclusions, samples: int, images: Sequence[int]) -> list[str]:
    """What stays of pictures that were taken out with some samples only: so many samples, with images of these xxh3_64."""
    if not samples:
        return []
    shown = ", ".join(f"{image:016x}" for image in images[:_SHOWN])
    more = f" and {len(images) - _SHOWN:,} more" if len(images) > _SHOWN else ""
    what = f"{samples:,} samples that stay have an image of one that was taken out by id or URL"
    return [f"{exclusions.name}: {what}; to take these out too, list its hash: {shown}{more}"]
