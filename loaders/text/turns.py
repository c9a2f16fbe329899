"""Which turns of a record a template takes, and where ``<image>`` stands in them."""

from collections.abc import Callable
from typing import TypeAlias

from loaders.text.layouts import IMAGE_TEXT
from shardify.errors import TextError
from shardify.records import Sample, Turn

Turns: TypeAlias = tuple[Turn, ...]

Selecting: TypeAlias = Callable[[Turns, list[str]], Turns]
"""Turns to those that are taken, what is odd about them added to a list of notes; raises TextError."""

Placing: TypeAlias = Callable[[Sample, str, list[str]], Turns]
"""A sample's turns with ``<image>`` where the model should see it, given what is put in its place; what is odd is noted."""

_ROLES = ("human", "gpt")
_NOISE = "QA_GT_caption_based_noisy"  # which LLaVA-NeXT takes out of the texts of a video set


def alternating(turns: Turns, notes: list[str]) -> Turns:
    """The turns from the first or second on, whichever is the human's; they must alternate from there.

    Raises:
        TextError: ``unknown-role`` or ``roles-not-alternating``, where the reference stops with KeyError or AssertionError.
    """
    for number, turn in enumerate(turns):
        if turn.role not in _ROLES:
            raise TextError(
                "unknown-role", f"turn {number} is from {turn.role!r}; 'human' or 'gpt' is needed"
            )
    kept = _without_first_answer(turns, notes)
    for number, turn in enumerate(kept):
        if turn.role != _ROLES[number % 2]:
            raise TextError(
                "roles-not-alternating",
                f"turn {number + len(turns) - len(kept)} is another one from {turn.role!r}",
            )
    _note_last(kept, notes)
    return kept


def from_human(turns: Turns, notes: list[str]) -> Turns:
    """The turns without a first one of the model's; any may follow.

    Raises:
        TextError: ``unknown-role`` of the first turn, where the reference stops with KeyError.
    """
    if turns[0].role not in _ROLES:
        raise TextError(
            "unknown-role", f"the first turn is from {turns[0].role!r}; 'human' or 'gpt' is needed"
        )
    kept = _without_first_answer(turns, notes)
    _note_roles(kept, notes)
    _note_last(kept, notes)
    return kept


def any_turns(turns: Turns, notes: list[str]) -> Turns:
    """All turns, in whatever order."""
    _note_roles(turns, notes)
    _note_last(turns, notes)
    return turns


def place_llava(sample: Sample, image_text: str, notes: list[str]) -> Turns:
    """``<image>`` in front of each turn that has it, once (`preprocess_multimodal` of LLaVA); for several images, LLaVA-NeXT's rule."""
    if len(sample.images) != 1:
        return place_next(sample, image_text, notes)
    turns: list[Turn] = []
    for turn in sample.turns:
        count = turn.text.count(IMAGE_TEXT)
        if count > 1:
            notes.append("image-tokens-merged")
        turns.append(_moved(turn, image_text) if count else turn)
    return tuple(turns)


def place_next(sample: Sample, image_text: str, notes: list[str]) -> Turns:
    """``<image>`` in front of each turn that has it exactly once and not yet in front (`preprocess_multimodal` of LLaVA-NeXT)."""
    del notes
    if not sample.images:
        return sample.turns
    turns: list[Turn] = []
    for turn in sample.turns:
        text = turn.text
        if text.count(IMAGE_TEXT) == 1 and not text.startswith(IMAGE_TEXT):
            text = _moved(turn, image_text).text
        turns.append(Turn(turn.role, text.replace(_NOISE, "")))
    return tuple(turns)


def _moved(turn: Turn, image_text: str) -> Turn:
    text = f"{IMAGE_TEXT}\n{turn.text.replace(IMAGE_TEXT, '').strip()}".strip()
    return Turn(turn.role, text.replace(IMAGE_TEXT, image_text))


def _without_first_answer(turns: Turns, notes: list[str]) -> Turns:
    if turns[0].role == "human":
        return turns
    notes.append("first-turn-dropped")
    return turns[1:]


def _note_roles(turns: Turns, notes: list[str]) -> None:
    if any(turn.role not in _ROLES for turn in turns):
        notes.append("unknown-role")
    elif any(turn.role != _ROLES[number % 2] for number, turn in enumerate(turns)):
        notes.append("roles-not-alternating")


def _note_last(turns: Turns, notes: list[str]) -> None:
    if turns and turns[-1].role == "human":
        notes.append("unanswered")
