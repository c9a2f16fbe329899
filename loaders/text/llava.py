"""LLaVA records to tokens and labels, token for token as llava/train/train.py of haotian-liu/LLaVA."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import xxhash

from loaders.arguments import integer
from loaders.text.layouts import IMAGE_TEXT, Segment
from loaders.text.masks import IGNORE_INDEX, RoundMasking, Tokenized
from loaders.text.sentencepieces import SentencePieceTokenizer
from loaders.text.templates import TEMPLATES
from loaders.text.tokenizers import Tokenizer, direct, fingerprint_of
from shardify.errors import TextError, UsageError
from shardify.records import Sample, parse_record, sample_of

IMAGE_TOKEN = -200
"""Stands for an image among the tokens; the model puts the image's features in its place."""

Labels = Literal["reference", "spans"]

_VERSION = 2  # of the tokens that a record gives; part of the fingerprint
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
_log = logging.getLogger("loaders")


@dataclass(frozen=True, slots=True)
class TextResult:
    """One record's text.

    Attributes:
        input_ids: tokens, at most `max_length`; `IMAGE_TOKEN` where an image stands.
        labels: as many; the token where it is trained on, else -100.
        notes: what was odd about the record, as codes; docs/text.md has what becomes of each:
            ``first-turn-dropped`` (it was not the human's),
            ``unknown-role``, ``roles-not-alternating`` (of templates that take such turns),
            ``unanswered`` (the last turn is the human's),
            ``empty-turn`` (a text is empty),
            ``marker-in-text`` (a text holds what the template or the tokenizer reads as structure, such as ``</s>``),
            ``image-token-in-text`` (``<image>`` in a record without image, where it is text),
            ``image-tokens-merged`` (several in one turn of a record with one image),
            ``image-tokens-missing`` (fewer than the record has images),
            ``image-in-answer`` (an image stands where the model should answer; it is not trained on),
            ``text-truncated`` (it was longer than `max_length`),
            ``tokenization-mismatch`` (the reference's arithmetic failed: nothing is trained on),
            ``nothing-supervised`` (nothing is trained on, for another reason: no answer, or it was cut off).
        images: that the record names, to be compared with those that its sample has; None (default) for a text that does not look.
    """

    input_ids: list[int]
    labels: list[int]
    notes: tuple[str, ...] = ()
    images: int | None = None


class LlavaText:
    """Makes a record's conversation a prompt, its tokens, and their labels.

    As in the reference: a text is cut at ``<image>`` and each piece tokenised by itself; ``<image>`` is moved to the front of its turn when the
    record has an image, and stays plain text when it has none; odd conversations (an empty answer, a human turn at the end, an end token inside a
    text) keep the labels that the reference gives them, often none at all, and say so in `notes`. Records whose ``image`` lists several keep
    ``<image>`` where it is, unless a turn has exactly one (LLaVA-NeXT's rule). The differences: the label of an image token is always
    -100, which LLaVA's model replaces it by; a record with more image tokens than images is refused, where LLaVA's model would take those of the
    next sample.

    Args:
        tokenizer: a `SentencePieceTokenizer` (Llama's, to the token), a `JsonTokenizer`, a `ByteTokenizer`, or any of transformers;
            `make_tokenizer` makes one of a path or a name.
        template: ``plain`` (LLaVA's first stage: image and caption), ``v1`` (default; Vicuna), or another of `TEMPLATES`.
        max_length: tokens that are kept. Default 2048.
        labels: ``reference`` finds what is trained on as the reference does: by its arithmetic, which holds for Llama's tokenizers alone, and for
            the templates of chat models by message. ``spans`` tokenises what is trained on (each answer and the end token; of chat models each
            message of the model) apart from what is not: right for any tokenizer, and for odd conversations. None (default) takes ``reference`` for
            the templates of chat models, and for a tokenizer that starts every text with its start token and reads ``</s>`` as its end token,
            unless the arithmetic fails with it (as where padding is the end token); else ``spans``.
        strict: True refuses a record about which there is a note: TextError with the first note's code. Default False.

    Raises:
        UsageError: an unknown template or kind of labels, a `max_length` below 1, or a tokenizer that has no end token, puts one behind every
            text, or lacks a token that the template is made of.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = "v1",
        max_length: int = 2048,
        labels: Labels | None = None,
        *,
        strict: bool = False,
    ) -> None:
        if template not in TEMPLATES:
            raise UsageError(f"no template {template!r}; there are {', '.join(TEMPLATES)}")
        if labels not in (None, "reference", "spans"):
            raise UsageError(f"no labels {labels!r}; there are 'reference' and 'spans'")
        max_length = integer("max_length", max_length, least=1)
        end = getattr(tokenizer, "eos_token_id", None)
        if end is None:
            raise UsageError(
                f"{type(tokenizer).__name__} has no end token (eos_token_id); make_tokenizer makes a tokenizer of a path or a name"
            )
        self.tokenizer = direct(tokenizer)
        self.template = TEMPLATES[template]
        self.strict = False  # as `max_length`, for the probe below
        self.max_length = _UNLIMITED
        self.eos_token_id: int = end
        candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
        self.pad_token_id: int = next(token for token in candidates if token is not None)
        letter = self._tokens("a")
        if letter[-1:] == [self.eos_token_id]:
            raise UsageError(
                f"{type(tokenizer).__name__} ends every text with its end token; set add_eos_token=False"
            )
        direct_count = self.tokenizer.count if isinstance(self.tokenizer, SentencePieceTokenizer) else None
        self._count: Callable[[str], int] = direct_count or self._count_tokens
        self._own_start = letter[:1] if letter[:1] == [tokenizer.bos_token_id] else []
        self._before = self._what_stands_before()
        self._special = {text for text in ("<s>", "</s>") if len(self._bare(text)) == 1}
        self._always_trained = self._single_tokens()
        self.labels: Labels = labels or "reference"
        self._markers = self._readable_markers()
        if labels is None:
            self.labels = self._fitting_labels()
            self._markers = self._readable_markers()
        self.max_length = max_length
        self.strict = strict

    @property
    def fingerprint(self) -> str:
        """Changes with the tokens that records give (32 hexadecimal digits); counts of them may be kept under it.

        Raises:
            UsageError: a tokenizer that is of another kind than this package's and transformers'.
        """
        tokenizer = [fingerprint_of(self.tokenizer), self.tokenizer.bos_token_id, self.eos_token_id]
        parts = [_VERSION, *tokenizer, self.template.name, self.max_length, self.labels]
        parts += ["strict"] if self.strict else []  # what is refused has no tokens to count
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(parts))

    def __call__(self, record: bytes | memoryview | Mapping[str, Any]) -> TextResult:
        """The tokens and labels of one record.

        Args:
            record: its JSON bytes, or the decoded object.

        Raises:
            TextError: with the reason: ``unknown-role``, ``roles-not-alternating``, ``plain-needs-two-turns``, ``plain-needs-image-token``,
                ``first-turn-empty``, ``text-not-unicode`` (where the reference raises too), ``image-tokens-exceed-images`` (the model would take
                the images of the next sample), or with `strict` a note's code.
            RecordError: not a record.
        """
        sample = sample_of(record) if isinstance(record, Mapping) else parse_record(record)
        template = self.template
        notes: list[str] = []
        self._note_texts(sample, notes)
        turns = template.select(template.place(sample, template.image_text, notes), notes)
        segments = template.layout(template.system, template.roles, turns)
        if isinstance(record, Mapping) or not sample.strict:
            _check_unicode(segments)

        cut_images = bool(sample.images) or template.cuts_images
        if self.labels == "reference" and template.masking is not None:
            input_ids, labels = self._by_reference(segments, cut_images, notes)
        else:
            input_ids, labels = self._by_spans(segments, cut_images)

        if len(input_ids) > self.max_length:
            notes.append("text-truncated")
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        _check_images(input_ids, labels, len(sample.images), notes)
        # mostly the last one is trained on
        is_masked = labels[-1:] in ([], [IGNORE_INDEX]) and labels.count(IGNORE_INDEX) == len(labels)
        if is_masked and "tokenization-mismatch" not in notes:
            notes.append("nothing-supervised")
        if self.strict and notes:
            raise TextError(notes[0], f"refused, as strict=True; the notes are {', '.join(notes)}")
        return TextResult(input_ids, labels, tuple(dict.fromkeys(notes)), len(sample.images))

    def _by_reference(
        self, segments: Sequence[Segment], cut_images: bool, notes: list[str]
    ) -> tuple[list[int], list[int]]:
        masking = self.template.masking
        assert masking is not None

        def tokenize(text: str) -> list[int]:
            return self._prompt_tokens(text, cut_images)

        def count(text: str) -> int:
            pieces = text.split(IMAGE_TEXT) if cut_images else [text]
            images = len(pieces) - 1
            return sum(map(self._count, pieces)) + images - images * len(self._own_start)

        input_ids = tokenize("".join([segment.prompt for segment in segments]))
        # a text-only prompt is cut to its length before the counting; one with images, after it
        counted = input_ids if cut_images else input_ids[: self.max_length]
        labels = masking.labels(
            Tokenized(
                segments=segments,
                input_ids=counted,
                tokenize=tokenize,
                count=count,
                has_images=cut_images,
                legacy=getattr(self.tokenizer, "legacy", None),
                pad_token_id=self.pad_token_id,
                max_length=self.max_length,
            )
        )
        if labels is None:
            notes.append("tokenization-mismatch")
            labels = [IGNORE_INDEX] * len(counted)
        return input_ids, labels

    def _by_spans(self, segments: Sequence[Segment], cut_images: bool) -> tuple[list[int], list[int]]:
        input_ids = self._first_tokens()
        labels = [IGNORE_INDEX] * len(input_ids)
        continues = self.template.is_chat  # a text; nothing continues an image
        before = ""  # the special token that stands there
        for segment in segments:
            before = segment.start or before
            if segment.start and self.tokenizer.bos_token_id is not None:
                input_ids.append(self.tokenizer.bos_token_id)
                labels.append(IGNORE_INDEX)
            tokens: list[int] = []
            for number, text in enumerate(segment.text.split(IMAGE_TEXT) if cut_images else [segment.text]):
                if number > 0:
                    tokens.append(IMAGE_TOKEN)
                    continues = False
                if text:
                    tokens += self._continue(text, before) if continues else self._own(text)
                    continues, before = True, ""
            if segment.end:
                tokens.append(self.eos_token_id)
                before = segment.end
            input_ids += tokens
            labels += tokens if segment.supervised else [IGNORE_INDEX] * len(tokens)
        if self._always_trained and self.labels == "reference":
            for place, token in enumerate(input_ids):
                if token in self._always_trained:
                    labels[place] = token
        return input_ids, labels

    def _prompt_tokens(self, prompt: str, cut_images: bool) -> list[int]:
        """Each piece between images tokenised as a text of its own, but for the start token."""
        if not cut_images:
            return self._tokens(prompt)
        first, *others = prompt.split(IMAGE_TEXT)
        tokens = self._tokens(first)
        for text in others:
            tokens.append(IMAGE_TOKEN)
            tokens += self._own(text)
        return tokens

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text).input_ids)

    def _count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text).input_ids)

    def _own(self, text: str) -> list[int]:
        return self._tokens(text)[len(self._own_start) :]

    def _continue(self, text: str, before: str = "") -> list[int]:
        """Tokens of a text that stands behind another one, or behind the special token `before`, after which some tokenizers begin anew."""
        if before not in self._special:
            before = self._before
        known = len(self._bare(before)) if before else 0
        return self._bare(before + text)[known:]

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _what_stands_before(self) -> str:
        """What has to stand before a text so that it is not taken for the beginning of one: Llama's fast tokenizers put a blank there."""
        alone, behind, line = self._bare("a"), self._bare("\na"), self._bare("\n")
        return "\n" if behind[: len(line)] == line and behind[len(line) :] != alone else ""

    def _first_tokens(self) -> list[int]:
        if not self.template.is_chat:
            return list(self._own_start)
        start = self.tokenizer.bos_token_id
        return [start] if self.template.begins and start is not None else []

    def _note_texts(self, sample: Sample, notes: list[str]) -> None:
        for turn in sample.turns:
            text = turn.text
            if not text:
                notes.append("empty-turn")
            for marker in self._markers:
                if marker in text:
                    notes.append("marker-in-text")  # noqa: PERF401 - a comprehension costs more than the few texts with one
            if not sample.images and IMAGE_TEXT in text:
                notes.append("image-token-in-text")

    def _single_tokens(self) -> frozenset[int]:
        """Those that are always trained on.

        Raises:
            UsageError: the template is made of a token that the tokenizer does not have.
        """
        for marker in self.template.tokens:
            if len(self._continue(marker)) != 1:
                raise UsageError(
                    f"template {self.template.name!r} is made of tokens such as {marker!r}, which {type(self.tokenizer).__name__} takes "
                    "apart; use the tokenizer of a model of that kind, or another template"
                )
        tokens = [self._continue(marker) for marker in self.template.always_trained]
        return frozenset(token[0] for token in tokens if len(token) == 1)

    def _readable_markers(self) -> tuple[str, ...]:
        """What of a text would be taken for structure: by the masking, or since it is one token."""
        masking = self.template.masking if self.labels == "reference" else None
        masked = (masking.round_end, masking.answer_start) if isinstance(masking, RoundMasking) else ()
        return tuple(
            marker for marker in self.template.markers if marker in masked or len(self._continue(marker)) == 1
        )

    def _fitting_labels(self) -> Labels:
        template = self.template
        if template.masking is None:
            return "reference"
        if not self._own_start or self._tokens("</s>")[-1:] != [self.eos_token_id]:
            return "spans"
        # the arithmetic also fails where padding is the end token, or blanks are put elsewhere than Llama's tokenizer puts them
        if "tokenization-mismatch" not in self(_PROBE).notes:
            return "reference"
        if not isinstance(template.masking, RoundMasking) or template.masking.round_end == "</s>":
            return "spans"
        _log.warning(
            "template %r trains on nothing with this tokenizer, as in LLaVA, whose arithmetic fails with it; labels='spans' trains on the answers",
            template.name,
        )
        return "reference"


def _check_images(input_ids: list[int], labels: list[int], images: int, notes: list[str]) -> None:
    """Take image tokens out of the labels; raises TextError when there are more of them than images."""
    image_tokens = input_ids.count(IMAGE_TOKEN)
    if image_tokens > images:
        raise TextError("image-tokens-exceed-images", f"{image_tokens} {IMAGE_TEXT} for {images} images")
    if image_tokens < images:
        notes.append("image-tokens-missing")
    place = -1
    for _ in range(image_tokens):
        place = input_ids.index(IMAGE_TOKEN, place + 1)
        if labels[place] != IGNORE_INDEX:
            labels[place] = IGNORE_INDEX
            notes.append("image-in-answer")


def _check_unicode(segments: Sequence[Segment]) -> None:
    try:
        for segment in segments:
            segment.text.encode()
    except UnicodeEncodeError as error:
        raise TextError("text-not-unicode", str(error)) from None
