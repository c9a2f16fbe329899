"""How long samples are, for grouping and packing: words from the index, or exact token counts, which are made once and kept."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import xxhash

from loaders.arguments import integer
from loaders.dataset import Dataset, Part
from loaders.derived import (
    default_workers,
    derived,
    derived_folder,
    each_forked,
    is_derived,
    read_array,
    watched,
    write_array,
)
from loaders.members import Members, read_contents, read_members_of
from shardify.errors import SampleError, UsageError
from shardify.format.names import RECORD_FIELD
from shardify.format.shards import ShardFile, local_sidecars
from shardify.format.urls import is_url

IntArray: TypeAlias = npt.NDArray[np.int64]

FAILED = -1
"""In place of a count where the text transform refuses a record, or a sample has none."""

_VERSION = 1  # of the counts
_IN_PROCESS = 2_000  # samples for which no other process is started


class _Tokens(Protocol):
    @property
    def input_ids(self) -> Any: ...


@runtime_checkable
class CountedText(Protocol):
    """What is needed of a text transform for its tokens to be counted; `loaders.LlavaText` has it."""

    @property
    def fingerprint(self) -> str:
        """Names what decides about the tokens; counts are kept under it."""
        ...

    def __call__(self, record: bytes | memoryview) -> _Tokens:
        """A record's tokens; raises SampleError. Given `image_sizes`, too, where it has a true attribute `needs_image_sizes`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """The lengths of a data set's samples.

    Attributes:
        dataset: whose samples they are.
        counts: int32 of each part's samples, memory-mapped: tokens, `FAILED` where there are none; None for words.
        image_tokens: what each image counts: with tokens in the place of its placeholder.
    """

    dataset: Dataset
    counts: tuple[npt.NDArray[np.int32], ...] | None = None
    image_tokens: int = 1

    def measure(self, samples: IntArray) -> tuple[IntArray, IntArray]:
        """Length and number of images of samples.

        Words: those of all turns, and `image_tokens` for each image. Tokens: exact where every image has its placeholder in the text, else at
        most too many. A sample whose text fails has the length 1, as its filler. Excluded samples count like others, so that a plan
        does not depend on what is excluded.

        Args:
            samples: int64 [n], flat sample numbers.

        Returns:
            lengths int64 [n], at least 1, and images int64 [n].
        """
        samples = np.asarray(samples, np.int64)
        part = self.dataset.part_of(samples)
        words, images = self.dataset.words_and_images(samples)
        if self.counts is None:
            return np.maximum(words + images * self.image_tokens, 1), images
        tokens = np.empty(len(samples), np.int64)
        for number, counts in enumerate(self.counts):
            here = np.flatnonzero(part == number)
            tokens[here] = counts[samples[here] - self.dataset.starts[number]]
        # the placeholder is a token already
        lengths = np.where(tokens < 0, 1, tokens + images * (self.image_tokens - 1))
        return np.maximum(lengths, 1), images


def word_lengths(dataset: Dataset, *, image_tokens: int = 1) -> Lengths:
    """Lengths in words, from the index."""
    return Lengths(dataset, None, integer("image_tokens", image_tokens, least=1))


def token_lengths(dataset: Dataset, text: CountedText, *, image_tokens: int = 1) -> Lengths:
    """Lengths in tokens.

    Counted once for each shard, tokenizer and template, by one process of a node and its children, while the others wait; what a killed run
    has counted is kept. Only the records are read, with the images left out: of remote shards by ranges, of `.tar.zst` the whole frames. The counts lie
    in the user's cache folder, 4 bytes a sample.

    Args:
        dataset: whose samples.
        text: makes the tokens.
        image_tokens: tokens that an image becomes. Default 1.

    Raises:
        UsageError: the text transform has no fingerprint.
        FormatError: a shard cannot be read, or the cache folder cannot be written.
        PackError: a store cannot be reached or refuses.
    """
    if not isinstance(getattr(text, "fingerprint", None), str):
        raise UsageError(
            f"{type(text).__name__} has no attribute `fingerprint`: a text that changes with the tokens it makes; token counts are kept under it"
        )
    counts = tuple(_counts(part, text) for part in dataset.parts)
    return Lengths(dataset, counts, integer("image_tokens", image_tokens, least=1))


def kept_lengths(dataset: Dataset, fingerprint: str, *, image_tokens: int = 1) -> Lengths:
    """Lengths in tokens as a run has counted them, without its text transform: from the user's cache folder.

    Args:
        dataset: whose samples.
        fingerprint: of the text transform.
        image_tokens: tokens that an image becomes. Default 1.

    Raises:
        UsageError: they are not there, with where they should be.
    """
    counts = []
    for part in dataset.parts:
        identity = _identity(part, fingerprint)
        folder = derived_folder(identity)
        if not is_derived(identity):
            named = f" of part {part.name!r}" if part.name else ""
            raise UsageError(
                f"token counts{named} are needed as the run had them, and are not on this machine: copy the run's {os.path.basename(folder)} "
                f"to {folder}, or ask in Python with the run's text=, which counts them again"
            )
        counts.append(read_array(folder, "tokens"))
    return Lengths(dataset, tuple(counts), integer("image_tokens", image_tokens, least=1))


def _identity(part: Part, fingerprint: str) -> dict[str, Any]:
    return {"kind": "tokens", "version": _VERSION, "data": part.fingerprint, "text": fingerprint}


def _counts(part: Part, text: CountedText) -> npt.NDArray[np.int32]:
    """int32 [samples of the part], those that take part."""
    folder, _ = derived(_identity(part, text.fingerprint), partial(_build, part, text))
    return read_array(folder, "tokens")


def _build(part: Part, text: CountedText, folder: str) -> Mapping[str, Any]:
    jobs = list(_jobs(part, text))
    missing = [job for job in jobs if not job.is_done]
    total = sum(job.samples for job in missing)
    sidecars = local_sidecars(job.shard for job in missing)
    # a remote shard is never read here: this process must not reach for stores
    remote = any(is_url(job.shard.path) for job in missing)
    workers = 0 if total <= _IN_PROCESS and not remote else default_workers()
    done = each_forked(
        partial(_count, text=text), zip(missing, sidecars, strict=True), count=len(missing), workers=workers
    )
    for _ in watched(done, "Counting tokens", [job.samples for job in missing], total):
        pass
    write_array(folder, "tokens", (read_array(job.folder, "tokens") for job in jobs), part.samples, "<i4")
    return {}


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A shard to be counted.

    Attributes:
        shard: which.
        rows: int64 [n], its rows that take part; None for all.
        identity: of the counts.
    """

    shard: ShardFile
    rows: IntArray | None
    identity: Mapping[str, Any]

    @property
    def samples(self) -> int:
        return self.shard.samples if self.rows is None else len(self.rows)

    @property
    def folder(self) -> str:
        return derived_folder(self.identity)

    @property
    def is_done(self) -> bool:
        return is_derived(self.identity)


def _jobs(part: Part, text: CountedText) -> Iterator[_Job]:
    chosen = part.subset.samples
    for number, shard in enumerate(part.shards.shards):
        rows = None
        chosen_here = "all"
        if chosen is not None:
            begin, end = (int(part.shards.starts[at]) for at in (number, number + 1))
            first, last = np.searchsorted(chosen, [begin, end])
            rows = chosen[first:last].astype(np.int64) - begin
            chosen_here = xxhash.xxh3_128_hexdigest(rows.tobytes())
        identity = {
            "kind": "tokens-of-shard",
            "version": _VERSION,
            "shard": [shard.samples, shard.bytes, shard.xxh3_128],
            "rows": chosen_here,
            "text": text.fingerprint,
        }
        yield _Job(shard, rows, identity)


def _count(work: tuple[_Job, str], text: CountedText) -> None:
    """Count one shard, into its folder."""
    job, sidecar = work
    derived(job.identity, partial(_count_into, job, sidecar, text))


def _count_into(job: _Job, sidecar: str, text: CountedText, folder: str) -> Mapping[str, Any]:
    count: Any = text
    sized = getattr(text, "needs_image_sizes", False)
    members = read_members_of(job.shard, sidecar, ("images",) if sized else ())
    records = members.first_named(RECORD_FIELD)
    if job.rows is not None:
        records = records[np.isin(members.row[records], job.rows)]
    counts = np.full(members.samples, FAILED, np.int32)
    for member, record in read_contents(job.shard, members, records):
        row = members.row[member]
        try:
            result = count(record, image_sizes=_stored_sizes(members, row)) if sized else count(record)
            counts[row] = len(result.input_ids)
        except SampleError:
            continue
    kept = counts if job.rows is None else counts[job.rows]
    write_array(folder, "tokens", [kept], len(kept), "<i4")
    return {}


def _stored_sizes(members: Members, row: int) -> list[tuple[int, int]]:
    """Height and width of each image of a sample."""
    return [(image["height"], image["width"]) for image in members.table["images"][row].as_py()]
