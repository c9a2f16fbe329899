"""Conversation templates: how turns become one prompt, each a small value.

After llava/conversation.py of haotian-liu/LLaVA.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loaders.text.masks import Masking, RoundMasking
from shardify.errors import TextError
from shardify.records import Turn

IMAGE_TEXT = "<image>"
"""Stands for an image in the text of a record."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the prompt that is wholly trained on, or wholly not.

    Attributes:
        text: as it stands in the prompt.
        supervised: whether the model learns to write it.
        end: what the prompt puts behind it to end an answer (``</s>``), the tokenizer's end token; supervised
            as `text` is.
    """

    text: str
    supervised: bool
    end: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """One prompt format.

    Attributes:
        name: as LLaVA's ``--version`` has it.
        system: the text before the first turn.
        roles: how the prompt names the human and the model.
        separators: what follows a human turn and a model turn.
        layout: turns to the segments whose texts and ends, joined, are the prompt; raises TextError for turns
            it cannot take.
        masking: the reference's way to find in the tokens what is not trained on; None where the segments
            already are what it tokenises.
        alternates: whether turns must alternate human, gpt, human, ...; a first turn that is not human's is
            dropped.
    """

    name: str
    system: str
    roles: tuple[str, str]
    separators: tuple[str, str]
    layout: Callable[["Template", Sequence[Turn]], list[Segment]]
    masking: Masking | None
    alternates: bool


def _caption(template: Template, turns: Sequence[Turn]) -> list[Segment]:
    """The image, its caption and a newline, without the question (LLaVA's `preprocess_plain`)."""
    if len(turns) != 2:
        raise TextError(
            "plain-needs-two-turns", f"{len(turns)} turns; template 'plain' takes a question and a caption"
        )
    if IMAGE_TEXT not in turns[0].text:
        raise TextError("plain-needs-image-token", f"no {IMAGE_TEXT} in the first turn")
    return [
        Segment(IMAGE_TEXT, supervised=False),
        Segment(turns[1].text + template.separators[0], supervised=True),
    ]


def _dialogue(template: Template, turns: Sequence[Turn]) -> list[Segment]:
    """``SYSTEM USER: question ASSISTANT: answer</s>USER: ...`` (`SeparatorStyle.TWO`).

    An empty text leaves its role alone, ``ASSISTANT:``, without what would end the turn.
    """
    after_question, after_answer = template.separators
    segments: list[Segment] = []
    prompt = template.system + after_question  # not trained on, up to the next answer
    for number, turn in enumerate(turns):
        prompt += f"{template.roles[number % 2]}:"
        if turn.text and number % 2 == 0:
            prompt += f" {turn.text}{after_question}"
        elif turn.text:
            segments += [
                Segment(prompt, supervised=False),
                Segment(f" {turn.text}", supervised=True, end=after_answer),
            ]
            prompt = ""
    if prompt:
        segments.append(Segment(prompt, supervised=False))
    return segments


_PLAIN = Template(
    name="plain",
    system="",
    roles=("", ""),
    separators=("\n", ""),
    layout=_caption,
    masking=None,
    alternates=False,
)

_V1 = Template(
    name="v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    roles=("USER", "ASSISTANT"),
    separators=(" ", "</s>"),
    layout=_dialogue,
    masking=RoundMasking(round_end="</s>", answer_start=" ASSISTANT: "),
    alternates=True,
)

TEMPLATES = {template.name: template for template in (_PLAIN, _V1)}
"""All templates by name."""
