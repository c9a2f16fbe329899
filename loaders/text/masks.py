"""The reference's arithmetic that finds, in the tokens of a whole prompt, those that are not trained on.

It counts tokens of parts of the prompt and adds the counts up, with corrections that hold for Llama's tokenizers; what it makes of odd
input (an end token inside a text, an empty answer) is part of it. `loaders.text.llava` offers counting-free labels beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from loaders.text.layouts import Segment

IGNORE_INDEX = -100
"""The label of a token that is not trained on."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A prompt and what there is to know about its tokens.

    Attributes:
        segments: whose texts are the prompt.
        input_ids: its tokens; of a prompt without images at most `max_length` of them.
        tokenize: tokens of a part of it as a prompt of its own, the start token included.
        count: how many those are.
        has_images: whether ``<image>`` in it is an image.
        legacy: whether the tokenizer begins the text after a special token as it begins a prompt, with a blank; None where it does not say.
        pad_token_id: not counted.
        max_length: counts that reach it are not checked.
    """

    segments: Sequence[Segment]
    input_ids: Sequence[int]
    tokenize: Callable[[str], Sequence[int]]
    count: Callable[[str], int]
    has_images: bool
    legacy: bool | None
    pad_token_id: int
    max_length: int


class Masking(Protocol):
    """Labels from the tokens of a prompt."""

    def labels(self, prompt: Tokenized) -> list[int] | None:
        """As many as tokens; None when the counts do not add up, LLaVA's "tokenization mismatch"."""


@dataclass(frozen=True, slots=True)
class RoundMasking:
    """A prompt is rounds of an instruction and an answer (`preprocess_v1`, `preprocess_llama_2`, `preprocess_mpt` of llava/train/train.py).

    Counted alone, a round has a start token, which makes up for the end token that the splitting took from it. An instruction, counted alone, has that
    start token too, and with Llama's tokenizers a token for its trailing blank, which in the prompt belongs to the answer's first word.

    Attributes:
        round_end: what ends a round; one token, which is trained on.
        answer_start: what stands between instruction and answer. A round without it, or with two, ends the counting.
        first: tokens before the first round.
        overlap: tokens of an instruction counted alone that it does not have in the prompt.
        later_unless_legacy: more tokens in every round but the first, of tokenizers that put no blank after special tokens,
        later_if_legacy: and of those that do.
        first_parts: how many of the parts between `round_end` the first round takes,
        parts: and every other.
    """

    round_end: str
    answer_start: str
    first: int = 1
    overlap: int = 1
    later_unless_legacy: int = 0
    later_if_legacy: int = 0
    first_parts: int = 1
    parts: int = 1

    def labels(self, prompt: Tokenized) -> list[int] | None:
        """See `Masking.labels`."""
        labels = list(prompt.input_ids)
        _mask(labels, 0, self.first)
        position = self.first
        for number, part in enumerate(self._rounds("".join([s.prompt for s in prompt.segments]))):
            halves = part.split(self.answer_start)
            if len(halves) != 2:
                break
            whole = prompt.count(part)
            instruction = prompt.count(halves[0] + self.answer_start) - self.overlap
            if number > 0 and prompt.legacy is not None:
                later = self.later_if_legacy if prompt.legacy else self.later_unless_legacy
                whole, instruction = whole + later, instruction + later
            _mask(labels, position, position + instruction)
            position += whole
        _mask(labels, position, len(labels))
        total = len(prompt.input_ids) - prompt.input_ids.count(prompt.pad_token_id)
        return None if position < prompt.max_length and position != total else labels

    def _rounds(self, prompt: str) -> list[str]:
        parts = prompt.split(self.round_end)
        if self.first_parts == self.parts == 1:
            return parts
        begins = [0, *range(self.first_parts, len(parts), self.parts), len(parts)]
        return [self.round_end.join(parts[begin:end]) for begin, end in pairwise(begins)]


@dataclass(frozen=True, slots=True)
class TurnMasking:
    """A prompt is a head and turns, of which the human's are not trained on but for their first tokens (`_mask_targets`).

    Those are the signal before the turn, which ends the answer before it: two tokens with Llama's tokenizers. The counts are never checked. The segments are
    those of `loaders.text.layouts.Headed`.

    Attributes:
        kept: so many tokens of a human turn are trained on.
    """

    kept: int

    def labels(self, prompt: Tokenized) -> list[int] | None:
        """See `Masking.labels`."""
        labels = list(prompt.input_ids)
        head, *turns = prompt.segments[:-1]
        position = self._count(prompt, head.prompt)
        _mask(labels, 0, position)
        for signal, turn in zip(turns[::2], turns[1::2], strict=True):
            end = position + self._count(prompt, signal.prompt + turn.prompt)
            if not turn.supervised:
                _mask(labels, position + self.kept, end)
            position = end
        return labels

    def _count(self, prompt: Tokenized, text: str) -> int:
        if prompt.has_images:
            return prompt.count(text)
        tokens = prompt.tokenize(text)[: prompt.max_length]
        return len(tokens) - tokens.count(prompt.pad_token_id)


def _mask(labels: list[int], begin: int, end: int) -> None:
    """Within the labels; as the reference's slices, a negative end counts from theirs."""
    span = range(*slice(begin, end).indices(len(labels)))
    labels[span.start : span.start + len(span)] = [IGNORE_INDEX] * len(span)
