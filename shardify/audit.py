"""What became of every record: the reason codes and what to do about each, the quarantine file, and the reconciliation in = packed + set aside."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from shardify.errors import PackError, UsageError
from shardify.format.manifest import Counts
from shardify.format.sidecar import SetAside, ShardInfo

REASONS: Mapping[str, str] = {
    "record-too-large": "the record is larger than any conversation",
    "record-not-json": "the record is not JSON, not even to a tolerant reader",
    "record-not-object": "the record is JSON, but no object",
    "no-conversations": "there is no list of turns, or it is empty",
    "bad-turn": "a turn lacks the texts 'from' and 'value'",
    "record-video": "the record is one of a video, and has no image",
    "record-audio": "the record is one of a sound, and has no image",
    "image-not-a-path": "'image' holds something that is no path",
    "image-path-unsafe": "the image's path does not stay inside an image root",
    "image-missing": "no image root holds the image",
    "image-ambiguous": "several images agree equally well with the path: none is taken",
    "image-unreadable": "the image is there but cannot be read",
    "image-damaged": "the archive's copy of the image does not match the archive's directory",
    "image-empty": "the image has no bytes, or no pixels",
    "image-unrecognised": "the bytes are no image of a known format",
    "image-truncated": "the end of the image is missing",
    "image-undecodable": "the image cannot be decoded (found with `--check decode`, or when it is made smaller)",
    "image-too-large": "the image has more bytes or pixels than any photograph",
    "sample-too-large": "the sample has more bytes or images than an index row can say",
    "sample-damaged": "the sample's bytes are not those that its sidecar has the hashes of",
    "member-name-too-long": "a member's name and its key are longer than the 100 bytes of a tar header",
    "excluded": "an exclusion list names the sample",
}
"""Why a record is set aside. A record has one reason, the first that is met."""

NOTES: Mapping[str, str] = {
    "id-missing": "the record has no id",
    "id-repeated": "an earlier record has the same id",
    "id-not-text": "the id is no text; number and text of one spelling are two ids",
    "id-has-dot": "the id has a dot, at which tar readers would cut it",
    "id-has-slash": "the id has a slash, which tar readers would take for a folder",
    "text-only": "the record has no image",
    "image-repeated": "an earlier record has the same image",
    "answer-empty": "an answer is empty: LLaVA trains on nothing of a single turn, and runs several together",
    "turn-empty": "a turn that is no answer is empty",
    "first-turn-not-human": "the first turn is not the human's: LLaVA drops it",
    "roles-not-alternating": "two turns of one role follow each other: LLaVA stops there",
    "unknown-role": "a turn is neither human's nor gpt's: LLaVA stops there",
    "last-turn-not-answer": "the last turn is not an answer: LLaVA trains on nothing of the record",
    "image-in-answer": "`<image>` stands in an answer",
    "image-token-repeated": "`<image>` stands twice in one turn: LLaVA makes one of them",
    "image-tokens-exceed-images": "more turns with `<image>` than images: the model would take the next sample's",
    "image-tokens-missing": "fewer `<image>` than images: LLaVA drops the features",
    "image-token-without-image": "`<image>` in a record without image: it is read as text",
    "template-marker-in-text": "a text holds a mark of LLaVA's templates, such as `</s>` or ` ASSISTANT: `: its masks fail on it",
    "blanks-around-text": "a text begins or ends with white space, which is kept",
    "noisy-marker": "a text holds `QA_GT_caption_based_noisy`, which LLaVA-NeXT cuts out",
    "text-long": "more words than LLaVA's 2,048 tokens: the end is cut off in training",
    "no-words": "all texts are empty: LLaVA's length grouping stops there",
    "image-by-prefix": "an image was found under the name that a prefix map gives it",
    "image-by-suffix": "an image was found by the end of its path",
    "image-by-stem": "an image was found under its name with another extension, or with its accents in another Unicode form",
    "image-rotated": "an image is stored turned, and its EXIF orientation says so: LLaVA ignores that, and trains on it as stored",
    "image-alpha": "an image has transparency: LLaVA drops it, so that hidden colours show",
    "image-cmyk": "an image is in printing colours (CMYK), which are converted for training",
    "image-deep": "an image has 16 bits or more a channel, which are cut to 8 for training",
    "image-animated": "an image is an animation: its first frame counts",
    "image-elongated": "padded to a square, an image would have more pixels than any photograph",
    "image-tiny": "an image is 4 pixels or less wide or high",
    "image-shrunk": "an image was made smaller, as --shortest-edge asks",
    "image-extension-differs": "an image is stored under its sniffed format, which its name's extension does not say",
    "record-tolerant": "the record is JSON only to a tolerant reader (NaN, a lone surrogate, a byte order mark)",
    "record-messages": "the record was OpenAI's `messages`, or the Cauldron's `texts`, and is stored in LLaVA's form",
    "record-image-field": "the image stood in another field than `image` (such as `input_image` or `images`) and is stored in LLaVA's form",
    "caption-kept": "there is no other caption for the image: the record keeps its own",
    "field-dropped": "the source has a value that a record cannot hold (bytes that are no image, NaN, infinity): it is left out or null",
}
"""What is kept and counted. A record may have several notes, each counted once."""

KEEPABLE = frozenset({"image-truncated", "image-undecodable"})
"""Reasons that ``--policy CODE=keep`` may overrule: there is a sample to keep."""

KEEP, SET_ASIDE, FAIL = "keep", "set-aside", "fail"
_ACTIONS = (KEEP, SET_ASIDE, FAIL)


@dataclass(frozen=True, slots=True)
class Policies:
    """What to do about each code.

    Attributes:
        chosen: code -> ``keep``, ``set-aside`` or ``fail``, where it is not the code's default: notes are kept, reasons set aside.
    """

    chosen: Mapping[str, str] = field(default_factory=dict)

    def action(self, code: str) -> str:
        """``keep``, ``set-aside`` or ``fail``."""
        return self.chosen.get(code) or (SET_ASIDE if code in REASONS else KEEP)


def make_policies(texts: Sequence[str], *, on_bad: str = SET_ASIDE) -> Policies:
    """Read ``CODE=ACTION`` texts; `on_bad` is the action for all reasons that none of them names.

    Raises:
        UsageError: an unknown code or action, or one that the code cannot have.
    """
    chosen = dict.fromkeys(REASONS, FAIL) if on_bad == FAIL else {}
    for text in texts:
        code, _, action = text.partition("=")
        if code not in REASONS and code not in NOTES:
            raise UsageError(f"--policy {text}: no code {code!r}; docs/recipes.md lists them all")
        if action not in _ACTIONS:
            raise UsageError(f"--policy {text}: the action is one of {', '.join(_ACTIONS)}")
        if action == KEEP and code in REASONS and code not in KEEPABLE:
            raise UsageError(
                f"--policy {text}: such a record cannot be kept, there is no whole sample to pack ({REASONS[code]})"
            )
        chosen[code] = action
    return Policies(chosen)


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


def quarantine(shards: Iterable[ShardInfo], sources: Sequence[str]) -> bytes:
    """The content of quarantine.jsonl: one line per record set aside, in record order.

    Args:
        shards: all shards.
        sources: the record sources' names, in their order.
    """
    rank = {name: number for number, name in enumerate(sources)}
    items = [item for shard in shards for item in shard.set_aside]
    items.sort(key=lambda item: (rank[item.source], item.record))
    return b"".join(msgspec.json.encode(item) + b"\n" for item in items)
