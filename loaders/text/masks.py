"""The reference's arithmetic that finds, in the tokens of a whole prompt, those that are not trained on.

It counts tokens of parts of the prompt and adds the counts up, with corrections that hold for Llama's
tokenizers; what it makes of odd input (an end token inside a text, an empty answer) is part of it.
`loaders.text.llava` offers counting-free labels beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

IGNORE_INDEX = -100
"""The label of a token that is not trained on."""


class Masking(Protocol):
    """Labels from the tokens of a prompt."""

    def labels(
        self,
        input_ids: Sequence[int],
        prompt: str,
        count: Callable[[str], int],
        *,
        legacy: bool,
        pad_token_id: int,
        max_length: int,
    ) -> list[int] | None:
        """The labels of a prompt's tokens.

        Args:
            input_ids: the tokens of the whole prompt.
            prompt: its text.
            count: how many tokens a part of it has when tokenised alone, the start token included.
            legacy: whether the tokenizer begins the text after a special token as it begins a prompt, with a
                blank.
            pad_token_id: not counted among `input_ids`.
            max_length: counts that reach it are not checked.

        Returns:
            As many as `input_ids`; None when the counts do not add up, LLaVA's "tokenization mismatch".
        """


@dataclass(frozen=True, slots=True)
class RoundMasking:
    """LLaVA's `preprocess_v1` (llava/train/train.py): a prompt is rounds of an instruction and an answer.

    Attributes:
        round_end: what ends a round; one token, which is trained on.
        answer_start: what stands between instruction and answer. A round without it, or with two, ends the
            counting.
    """

    round_end: str
    answer_start: str

    def labels(
        self,
        input_ids: Sequence[int],
        prompt: str,
        count: Callable[[str], int],
        *,
        legacy: bool,
        pad_token_id: int,
        max_length: int,
    ) -> list[int] | None:
        """See `Masking.labels`."""
        labels = list(input_ids)
        labels[:1] = [IGNORE_INDEX] * len(labels[:1])
        position = 1  # the start token
        for number, part in enumerate(prompt.split(self.round_end)):
            halves = part.split(self.answer_start)
            if len(halves) != 2:
                break
            # alone, a round has a start token, which makes up for the end token that splitting took from it;
            # an instruction has that and a token for its trailing blank, which in the prompt is part of the
            # answer's first word
            whole, instruction = count(part), count(halves[0] + self.answer_start) - 2
            if (
                number > 0 and not legacy
            ):  # there no blank is put before "USER", which then is one token, not two
                whole, instruction = whole - 1, instruction - 1
            end = min(position + instruction, len(labels))
            labels[position:end] = [IGNORE_INDEX] * (end - position)
            position += whole
        labels[position:] = [IGNORE_INDEX] * len(labels[position:])
        total = sum(token != pad_token_id for token in input_ids)
        return None if position < max_length and position != total else labels
