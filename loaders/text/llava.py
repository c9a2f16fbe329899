"""LLaVA records to tokens and labels, token for token as llava/train/train.py of haotian-liu/LLaVA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from loaders.text.masks import IGNORE_INDEX
from loaders.text.templates import IMAGE_TEXT, TEMPLATES, Segment
from loaders.text.tokenizers import Tokenizer, fingerprint_of
from shardify.errors import TextError, UsageError
from shardify.records import Sample, Turn, parse_record, sample_of

IMAGE_TOKEN = -200
"""Stands for an image among the tokens; the model puts the image's features in its place."""

TEXT_VERSION = 1
"""Changes whenever the same record and settings would give other tokens: counts that were kept are made anew."""

Labels = Literal["reference", "spans"]

_UNLIMITED = 2**62
_PROBE = {
    "image": "any",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "And here?"},
        {"from": "gpt", "value": "Another one."},
    ],
}


@dataclass(frozen=True, slots=True)
class TextResult:
    """One record's text.

    Attributes:
        input_ids: tokens, at most `max_length`; `IMAGE_TOKEN` where an image stands.
        labels: as many; the token where it is trained on, else -100.
        notes: what was odd about the record, as codes:
            ``first-turn-dropped`` (it was not the human's),
            ``text-truncated`` (it was longer than `max_length`),
            ``tokenization-mismatch`` (the reference's arithmetic failed: nothing is trained on),
            ``nothing-supervised`` (nothing is trained on, for another reason: no answer, or it was cut off),
            ``image-in-answer`` (an image stands where the model should answer; it is not trained on),
            ``image-tokens-missing`` (fewer than the record has images).
    """

    input_ids: list[int]
    labels: list[int]
    notes: tuple[str, ...] = ()


class LlavaText:
    """Makes a record's conversation a prompt, its tokens, and their labels.

    As in the reference: a text is cut at ``<image>`` and each piece tokenised by itself; ``<image>`` is moved
    to the front of its turn when the record has an image, and stays plain text when it has none; odd
    conversations (an empty answer, a human turn at the end, an end token inside a text) keep the labels that
    the reference gives them, mostly none at all, and say so in `notes`. Records whose ``image`` lists several
    keep ``<image>`` where it is, unless a turn has exactly one (LLaVA-NeXT's rule). The one difference: the
    label of an image token is always -100, which LLaVA's model replaces it by.

    Args:
        tokenizer: a `SentencePieceTokenizer` (Llama's, to the token), a `ByteTokenizer`, or any of
            transformers.
        template: ``plain`` (LLaVA's first stage: image and caption) or ``v1`` (default; Vicuna). `TEMPLATES`
            has them all.
        max_length: tokens that are kept. Default 2048.
        labels: ``reference`` finds what is trained on by the reference's arithmetic, which holds for Llama's
            tokenizers alone. ``spans`` tokenises what is trained on (each answer and the end token) apart
            from what is not: right for any tokenizer, and for odd conversations. None (default) takes
            ``reference`` for a tokenizer that starts every text with its start token and reads the template's
            end of an answer as its end token, else ``spans``.

    Raises:
        UsageError: an unknown template or kind of labels, a `max_length` below 1, or a tokenizer that has no end
            token or puts one behind every text.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self, tokenizer: Tokenizer, template: str = "v1", max_length: int = 2048, labels: Labels | None = None
    ) -> None:
        if template not in TEMPLATES:
            raise UsageError(f"no template {template!r}; there are {', '.join(TEMPLATES)}")
        if labels not in (None, "reference", "spans"):
            raise UsageError(f"no labels {labels!r}; there are 'reference' and 'spans'")
        if max_length < 1:
            raise UsageError(f"a max_length of {max_length} tokens; at least 1 is needed")
        if tokenizer.eos_token_id is None:
            raise UsageError(f"{type(tokenizer).__name__} has no end token (eos_token_id)")
        self.tokenizer = tokenizer
        self.template = TEMPLATES[template]
        self.max_length = _UNLIMITED  # for the probe below
        self.eos_token_id = tokenizer.eos_token_id
        candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
        self.pad_token_id = next(token for token in candidates if token is not None)
        letter = self._tokens("a")
        if letter[-1:] == [self.eos_token_id]:
            raise UsageError(
                f"{type(tokenizer).__name__} ends every text with its end token; set add_eos_token=False"
            )
        self._start = letter[:1] if letter[:1] == [tokenizer.bos_token_id] else []
        end = self.template.separators[1]
        like_llama = bool(self._start) and self._tokens(end)[-1:] == [self.eos_token_id]
        self.labels: Labels = labels or (
            "reference" if like_llama or self.template.masking is None else "spans"
        )
        # the arithmetic also fails where padding is the end token, or blanks are put elsewhere than Llama's tokenizer puts them
        if (
            labels is None
            and self.template.masking is not None
            and "tokenization-mismatch" in self(_PROBE).notes
        ):
            self.labels = "spans"
        self.max_length = max_length

    @cached_property
    def fingerprint(self) -> str:
        """Names what decides about the tokens of a record: equal ones make equal tokens of it, whenever and wherever.

        Raises:
            UsageError: the tokenizer cannot be told from others (`fingerprint_of`).
        """
        settings = f"template={self.template.name} max_length={self.max_length} labels={self.labels}"
        return f"llava-{TEXT_VERSION} {settings} tokenizer={fingerprint_of(self.tokenizer)}"

    def __call__(self, record: bytes | memoryview | Mapping[str, Any]) -> TextResult:
        """The tokens and labels of one record.

        Args:
            record: its JSON bytes, or the decoded object.

        Raises:
            TextError: with the reason: ``unknown-role``, ``roles-not-alternating``, ``plain-needs-two-turns``,
                ``plain-needs-image-token`` (where the reference raises too), ``image-tokens-exceed-images``
                (the model would take the images of the next sample), ``text-not-unicode``.
            RecordError: not a record.
        """
        sample = sample_of(record) if isinstance(record, Mapping) else parse_record(record)
        turns = _place_image_tokens(sample)
        notes: list[str] = []
        if self.template.alternates:
            kept = _human_first(turns)
            if len(kept) < len(turns):
                notes.append("first-turn-dropped")
            turns = kept
        segments = self.template.layout(self.template, turns)
        _check_unicode(segments)

        # LLaVA's preprocess_plain cuts at <image> whether there is an image or not
        cut_images = bool(sample.images) or self.template.masking is None
        if self.labels == "spans" or self.template.masking is None:
            input_ids, labels = self._by_spans(segments, cut_images)
        else:
            input_ids, labels = self._by_reference(segments, cut_images, notes)

        if len(input_ids) > self.max_length:
            notes.append("text-truncated")
        input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        image_tokens = input_ids.count(IMAGE_TOKEN)
        if image_tokens > len(sample.images):
            raise TextError(
                "image-tokens-exceed-images", f"{image_tokens} {IMAGE_TEXT} for {len(sample.images)} images"
            )
        if image_tokens < len(sample.images):
            notes.append("image-tokens-missing")
        if IMAGE_TOKEN in labels:
            notes.append("image-in-answer")
            labels = [IGNORE_INDEX if label == IMAGE_TOKEN else label for label in labels]
        if "tokenization-mismatch" not in notes and all(label == IGNORE_INDEX for label in labels):
            notes.append("nothing-supervised")
        return TextResult(input_ids, labels, tuple(notes))

    def _by_reference(
        self, segments: Sequence[Segment], cut_images: bool, notes: list[str]
    ) -> tuple[list[int], list[int]]:
        assert self.template.masking is not None
        prompt = "".join([segment.text + segment.end for segment in segments])
        input_ids = self._prompt_tokens(prompt, cut_images)
        # a text-only prompt is cut to its length before the counting; one with images, after it
        counted = input_ids if cut_images else input_ids[: self.max_length]
        labels = self.template.masking.labels(
            counted,
            prompt,
            lambda text: len(self._prompt_tokens(text, cut_images)),
            legacy=getattr(self.tokenizer, "legacy", True),
            pad_token_id=self.pad_token_id,
            max_length=self.max_length,
        )
        if labels is None:
            notes.append("tokenization-mismatch")
            labels = [IGNORE_INDEX] * len(counted)
        return input_ids, labels

    def _by_spans(self, segments: Sequence[Segment], cut_images: bool) -> tuple[list[int], list[int]]:
        input_ids = list(self._start)
        labels = [IGNORE_INDEX] * len(input_ids)
        continues = False  # a text; nothing continues an image
        for segment in segments:
            tokens: list[int] = []
            for number, text in enumerate(segment.text.split(IMAGE_TEXT) if cut_images else [segment.text]):
                if number > 0:
                    tokens.append(IMAGE_TOKEN)
                    continues = False
                if text:
                    tokens += self._continue(text) if continues else self._tokens(text)[len(self._start) :]
                    continues = True
            if segment.end:
                tokens.append(self.eos_token_id)
            input_ids += tokens
            labels += tokens if segment.supervised else [IGNORE_INDEX] * len(tokens)
        return input_ids, labels

    def _prompt_tokens(self, prompt: str, cut_images: bool) -> list[int]:
        """Each piece between images tokenised as a text of its own, but for the start token."""
        if not cut_images:
            return self._tokens(prompt)
        first, *others = prompt.split(IMAGE_TEXT)
        tokens = self._tokens(first)
        for text in others:
            tokens.append(IMAGE_TOKEN)
            tokens += self._tokens(text)[len(self._start) :]
        return tokens

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def _continue(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def _place_image_tokens(sample: Sample) -> tuple[Turn, ...]:
    """The turns with ``<image>`` in front, once; for several images, by LLaVA-NeXT's rule."""
    if not sample.images:
        return sample.turns
    turns: list[Turn] = []
    for turn in sample.turns:
        count = turn.text.count(IMAGE_TEXT)
        stays = count == 0 or (len(sample.images) > 1 and (count > 1 or turn.text.startswith(IMAGE_TEXT)))
        text = turn.text if stays else f"{IMAGE_TEXT}\n{turn.text.replace(IMAGE_TEXT, '').strip()}".strip()
        turns.append(Turn(turn.role, text))
    return tuple(turns)


def _human_first(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns from the first or second on, whichever is the human's; they must alternate from there."""
    for number, turn in enumerate(turns):
        if turn.role not in ("human", "gpt"):
            raise TextError(
                "unknown-role", f"turn {number} is from {turn.role!r}; 'human' or 'gpt' is needed"
            )
    first = 0 if turns[0].role == "human" else 1
    for number, turn in enumerate(turns[first:]):
        if turn.role != ("human", "gpt")[number % 2]:
            raise TextError(
                "roles-not-alternating", f"turn {first + number} is another one from {turn.role!r}"
            )
    return turns[first:]


def _check_unicode(segments: Sequence[Segment]) -> None:
    try:
        for segment in segments:
            segment.text.encode()
    except UnicodeEncodeError as error:
        raise TextError("text-not-unicode", str(error)) from None
