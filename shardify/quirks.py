"""What is odd about a record's id and conversation: pure, a few microseconds a record.

Nothing here changes a record. Everything that LLaVA's training code would stumble over, or quietly make something else of, gets the note
code that says so (llava/train/train.py and llava/conversation.py of haotian-liu/LLaVA; `audit.NOTES` has the meanings).
"""

import json
import re

from shardify.records import NO_ID, Sample

_IMAGE = "<image>"
_NOISY = "QA_GT_caption_based_noisy"
_LONG = 2048  # words; a word is at least one token, and LLaVA's scripts set --model_max_length 2048
_PLAIN_ID = re.compile(r'"[^./\\]*"')


def id_notes(id_: str | None) -> list[str]:
    """Of an id as JSON text."""
    if id_ in NO_ID or id_ is None:
        return ["id-missing"]
    if _PLAIN_ID.fullmatch(id_):
        return []
    text = id_
    notes = []
    if not id_.startswith('"'):
        notes.append("id-not-text")
    elif "\\" in id_:
        text = json.loads(id_)
    if "." in text:
        notes.append("id-has-dot")
    if "/" in text:
        notes.append("id-has-slash")
    return notes


def conversation_notes(sample: Sample) -> list[str]:
    """Of the turns, and of how ``<image>`` fits the images."""
    notes = []
    turns = sample.turns
    roles = [turn.role for turn in turns]
    if roles[::2].count("human") + roles[1::2].count("gpt") != len(roles):
        if roles[0] != "human":
            notes.append("first-turn-not-human")
        if any(role not in ("human", "gpt") for role in roles):
            notes.append("unknown-role")
        if any(role == before for role, before in zip(roles[1:], roles, strict=False)):
            notes.append("roles-not-alternating")
    if roles[-1] != "gpt":
        notes.append("last-turn-not-answer")

    texts = [turn.text for turn in turns]
    if "" in texts:
        empty = {role for role, text in zip(roles, texts, strict=True) if not text}
        if "gpt" in empty:
            notes.append("answer-empty")
        if empty != {"gpt"}:
            notes.append("turn-empty")
    whole = "\0".join(texts)
    notes += _image_notes(sample, whole)
    if _has_marker(whole):
        notes.append("template-marker-in-text")
    if _NOISY in whole:
        notes.append("noisy-marker")
    if list(map(str.strip, texts)) != texts:
        notes.append("blanks-around-text")
    if sample.words > _LONG:
        notes.append("text-long")
    if not sample.words:
        notes.append("no-words")
    return notes


def _has_marker(text: str) -> bool:
    """Whether a text holds what only a template writes; one by one, which is faster than any loop."""
    return (
        "</s>" in text
        or " ASSISTANT: " in text
        or "[/INST] " in text
        or "<|im_end|>" in text
        or "<unk>" in text
    )


def _image_notes(sample: Sample, whole: str) -> list[str]:
    count = whole.count(_IMAGE)
    images = len(sample.images)
    if not images:
        return ["text-only", "image-token-without-image"] if count else ["text-only"]
    if count == images == 1 and _IMAGE in sample.turns[0].text:
        return []
    notes = []
    marked = [turn for turn in sample.turns if _IMAGE in turn.text]
    if any(turn.role == "gpt" for turn in marked):
        notes.append("image-in-answer")
    if images == 1:
        # the reference makes one of several in a turn (preprocess_multimodal)
        if count > len(marked):
            notes.append("image-token-repeated")
        count = len(marked)
    if count > images:
        notes.append("image-tokens-exceed-images")
    if count < images:
        notes.append("image-tokens-missing")
    return notes
