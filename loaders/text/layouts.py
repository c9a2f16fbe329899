"""Layouts: how a template writes the turns of a conversation, after `get_prompt` of llava/conversation.py.

A layout gives the prompt in segments, each wholly trained on or wholly not. Joined, they are the prompt to the letter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shardify.errors import TextError
from shardify.records import Turn

IMAGE_TEXT = "<image>"
"""Stands for an image in the text of a record."""

Roles = tuple[str, str]
"""How the prompt names the human and the model."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the prompt.

    Attributes:
        text: as it stands in the prompt.
        supervised: whether the model learns to write it.
        start: what the prompt puts before it for the tokenizer's start token (``<s>``); never supervised.
        end: what it puts behind it for the tokenizer's end token (``</s>``); supervised as `text` is.
    """

    text: str
    supervised: bool
    start: str = ""
    end: str = ""

    @property
    def prompt(self) -> str:
        """All three as the prompt has them."""
        return self.start + self.text + self.end


class Layout(Protocol):
    """Turns to a prompt."""

    def __call__(self, system: str, roles: Roles, turns: Sequence[Turn]) -> list[Segment]:
        """The segments of a prompt; raises TextError for turns that it cannot take."""


@dataclass(frozen=True, slots=True)
class Caption:
    """The image, its caption and `end`, without the question (`preprocess_plain`)."""

    end: str

    def __call__(self, system: str, roles: Roles, turns: Sequence[Turn]) -> list[Segment]:
        """See `Layout`."""
        del system, roles
        if len(turns) != 2:
            raise TextError(
                "plain-needs-two-turns",
                f"{len(turns)} turns; template 'plain' takes a question and a caption",
            )
        if IMAGE_TEXT not in turns[0].text:
            raise TextError("plain-needs-image-token", f"no {IMAGE_TEXT} in the first turn")
        return [Segment(IMAGE_TEXT, supervised=False), Segment(turns[1].text + self.end, supervised=True)]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """``SYSTEM USER: question ASSISTANT: answer</s>USER: ...`` (`SeparatorStyle.TWO`).

    An empty text leaves its role alone, ``ASSISTANT:``, without what would end the turn.
    """

    after_question: str
    after_answer: str

    def __call__(self, system: str, roles: Roles, turns: Sequence[Turn]) -> list[Segment]:
        """See `Layout`."""
        segments: list[Segment] = []
        prompt = system + self.after_question  # not trained on, up to the next answer
        for number, turn in enumerate(turns):
            prompt += f"{roles[number % 2]}:"
            if turn.text and number % 2 == 0:
                prompt += f" {turn.text}{self.after_question}"
            elif turn.text:
                segments.append(Segment(prompt, supervised=False))
                segments.append(Segment(f" {turn.text}", supervised=True, end=self.after_answer))
                prompt = ""
        if prompt:
            segments.append(Segment(prompt, supervised=False))
        return segments


@dataclass(frozen=True, slots=True)
class Instructions:
    """``[INST] question [/INST] answer </s><s>[INST] ...`` (`SeparatorStyle.LLAMA_2`).

    The system text stands inside the first instruction. An empty text leaves out its turn altogether.
    """

    start: str
    end: str

    def __call__(self, system: str, roles: Roles, turns: Sequence[Turn]) -> list[Segment]:
        """See `Layout`."""
        del roles
        if turns and not turns[0].text:
            raise TextError("first-turn-empty", "the template puts the system text inside the first turn")
        segments: list[Segment] = []
        for number, turn in enumerate(turns):
            if not turn.text:
                continue
            if number % 2:
                segments.append(Segment(f" {turn.text} ", supervised=True, end=self.end))
                continue
            told = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and number == 0 else ""
            start = self.start if number else ""  # the tokenizer itself puts the first one
            segments.append(Segment(f"[INST] {told}{turn.text} [/INST]", supervised=False, start=start))
        return segments


@dataclass(frozen=True, slots=True)
class Marked:
    """System text and turns, each ended by `end` (`SeparatorStyle.MPT`); an empty text leaves its role alone."""

    end: str

    def __call__(self, system: str, roles: Roles, turns: Sequence[Turn]) -> list[Segment]:
        """See `Layout`."""
        segments: list[Segment] = []
        prompt = system + self.end
        for number, turn in enumerate(turns):
            prompt += roles[number % 2]
            if turn.text and number % 2 == 0:
                prompt += turn.text + self.end
            elif turn.text:
                segments.append(Segment(prompt, supervised=False))
                segments.append(Segment(turn.text + self.end, supervised=True))
                prompt = ""
        if prompt:
            segments.append(Segment(prompt, supervised=False))
        return segments


@dataclass(frozen=True, slots=True)
class Headed:
    r"""A signal before every turn, a newline behind it: ``SYSTEM\n\n### Human: question\n### Assistant: answer\n### ``.

    After `_add_speaker_and_signal` of llava/train/train.py, which takes turns of any role in any order. The signal is what ends an answer,
    so it is supervised wherever it stands. Segments: the head, then for each turn the signal and the turn, then the closing signal.
    """

    signal: str

    def __call__(self, system: str, roles: Roles, turns: Sequence[Turn]) -> list[Segment]:
        """See `Layout`."""
        segments = [Segment(f"{system}\n\n", supervised=False)]
        names = dict(zip(("human", "gpt"), roles, strict=True))
        for turn in turns:
            name = names.get(turn.role.lower(), "unknown")
            segments.append(Segment(self.signal, supervised=True))
            segments.append(Segment(f" {name}: {turn.text}\n", supervised=turn.role != "human"))
        segments.append(Segment(f"{self.signal} ", supervised=True))
        return segments


@dataclass(frozen=True, slots=True)
class Messages:
    """One message after another, each with its role, and each a segment (LLaVA-NeXT's `preprocess_qwen` and `preprocess_llama3`).

    Roles other than ``human`` and ``gpt`` keep their names, and all but the human's and the system's are supervised.

    Attributes:
        open: before the role.
        close: between role and text.
        end: behind the text.
        strip: whether a text loses the blanks around it.
    """

    open: str
    close: str
    end: str
    strip: bool = False

    def __call__(self, system: str, roles: Roles, turns: Sequence[Turn]) -> list[Segment]:
        """See `Layout`."""
        names = dict(zip(("human", "gpt"), roles, strict=True))
        masked = ("system", roles[0])
        segments = [Segment(self._message("system", system), supervised=False)]
        for turn in turns:
            role = names.get(turn.role, turn.role)
            segments.append(Segment(self._message(role, turn.text), supervised=role not in masked))
        return segments

    def _message(self, role: str, text: str) -> str:
        return f"{self.open}{role}{self.close}{text.strip() if self.strip else text}{self.end}"
