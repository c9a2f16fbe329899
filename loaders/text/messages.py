"""A LLaVA record as messages for a chat template."""

from typing import Any

from loaders.text.chat_template import Message
from loaders.text.layouts import IMAGE_TEXT
from shardify.errors import TextError
from shardify.records import Sample, Turn

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def messages_of(
    sample: Sample, notes: list[str], *, as_parts: bool, image_token: str | None
) -> list[Message]:
    """The messages of a record, what is odd about it noted.

    Images stand where ``<image>`` does. Where there is none at all, they stand before the first turn of the user, as LLaVA's records have them. With
    `as_parts` the line breaks between an image and the text beside it go: templates have their own way to set images apart.

    Args:
        sample: the record.
        notes: gets the codes.
        as_parts: images and texts are parts of a message; else a message is a text, in which `image_token` stands for ``<image>``.
        image_token: what the template and the tokenizer read as an image; None where they know of none.

    Raises:
        TextError: ``unknown-role``, ``no-user-turn``, ``images-not-understood``, ``image-tokens-exceed-images``, ``image-tokens-missing``, or
            ``image-token-in-text`` where the model would look for an image.
    """
    turns = _asked(sample.turns, notes)
    if image_token not in (None, IMAGE_TEXT) and any(image_token in turn.text for turn in turns):
        raise TextError("image-token-in-text", f"a text holds {image_token!r}, which stands for an image")
    count = sum(turn.text.count(IMAGE_TEXT) for turn in turns)
    images = len(sample.images)
    if not images:
        if count and image_token == IMAGE_TEXT:
            raise TextError("image-token-in-text", f"{count} {IMAGE_TEXT} in a record without image")
        if count:
            notes.append("image-token-in-text")
        return [_message(turn, [turn.text], as_parts, None) for turn in turns]
    if image_token is None:
        raise TextError("images-not-understood", f"{images} images, and the tokenizer has no image token")
    if count > images:
        raise TextError("image-tokens-exceed-images", f"{count} {IMAGE_TEXT} for {images} images")
    pieces = [turn.text.split(IMAGE_TEXT) for turn in turns]
    if count == 0:
        notes.append("image-tokens-missing")
        first = next(number for number, turn in enumerate(turns) if _ROLES[turn.role] == "user")
        pieces[first] = [""] * images + [turns[first].text if as_parts else "\n" + turns[first].text]
    elif count < images:
        raise TextError("image-tokens-missing", f"{count} {IMAGE_TEXT} for {images} images")
    return [_message(turn, texts, as_parts, image_token) for turn, texts in zip(turns, pieces, strict=True)]


def _message(turn: Turn, texts: list[str], as_parts: bool, image_token: str | None) -> Message:
    """A message with an image between each two of the texts."""
    content: Any
    if not as_parts:
        content = (image_token or "").join(texts)
    elif len(texts) == 1:
        content = [{"type": "text", "text": texts[0]}]
    else:
        content = []
        for number, text in enumerate(texts):
            if number:
                content.append({"type": "image"})
            text = _apart(text, before=number > 0, behind=number + 1 < len(texts))  # noqa: PLW2901
            if text.strip():
                content.append({"type": "text", "text": text})
    return {"role": _ROLES[turn.role], "content": content}


def _apart(text: str, *, before: bool, behind: bool) -> str:
    """A text without the line breaks that part it from an image before or behind it, nor the blanks around them."""
    if before and "\n" in text[: len(text) - len(text.lstrip())]:
        text = text.lstrip()
    if behind and "\n" in text[len(text.rstrip()) :]:
        text = text.rstrip()
    return text


def _asked(turns: tuple[Turn, ...], notes: list[str]) -> list[Turn]:
    """The turns, without a first one of the model's."""
    for number, turn in enumerate(turns):
        if turn.role not in _ROLES:
            raise TextError(
                "unknown-role", f"turn {number} is from {turn.role!r}; there are {', '.join(_ROLES)}"
            )
        if not turn.text:
            notes.append("empty-turn")
    roles = [_ROLES[turn.role] for turn in turns]
    begin = next((number for number, role in enumerate(roles) if role != "system"), len(roles))
    kept = list(turns)
    if begin < len(roles) and roles[begin] == "assistant":
        notes.append("first-turn-dropped")
        del kept[begin], roles[begin]
    if "user" not in roles:
        raise TextError("no-user-turn", "nobody asks the model anything")
    if any(role != ("user", "assistant")[number % 2] for number, role in enumerate(roles[begin:])):
        notes.append("roles-not-alternating")
    if roles[-1] == "user":
        notes.append("unanswered")
    return kept
