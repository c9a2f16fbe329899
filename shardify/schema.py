r"""Records in other schemas become LLaVA's: OpenAI's `messages`, the Cauldron's `texts`, and images under other names than `image`. Pure.

    {"id": 1, "messages": [{"role": "system", "content": "Be brief."},
                           {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}},
                                                        {"type": "text", "text": "What is it?"}]},
                           {"role": "assistant", "content": "A cat."}]}
becomes
    {"id": 1, "system_prompt": "Be brief.", "image": "a.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

and of the Cauldron (and FineVision), whose texts do not say where the images stand: in front of them, as its readers have it
    {"images": ["a.jpg"], "texts": [{"user": "What is it?", "assistant": "A cat.", "source": "COCO"}]}
becomes
    {"image": ["a.jpg"], "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                           {"from": "gpt", "value": "A cat.", "source": "COCO"}]}

Fields keep their order, and what has no place in LLaVA's form keeps its name: other fields of the record, of a message (in its turn) and of an
image part (`image_info`, one object an image). LLaVA's templates stop at a system turn, so a leading one becomes the field `system_prompt`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardify.errors import RecordError

FROM_MESSAGES = "record-messages"
FROM_FIELD = "record-image-field"

_IMAGE_FIELDS = ("images", "input_image", "image_path", "image_paths", "img", "img_path")
HINTS = tuple(f'"{name}"'.encode() for name in ("messages", "content", "texts", *_IMAGE_FIELDS))
"""A record without any of these bytes has nothing of another schema in it."""

_ROLES = {"user": "human", "assistant": "gpt"}
_SYSTEM = ("system", "developer")
_TOKEN = "<image>"  # noqa: S105
_OTHER_TOKEN = "<IMG_CONTEXT>"  # noqa: S105 - InternVL's and xtuner's place for an image
_TEXT_TYPES = ("text", "input_text", "output_text")
_MEDIA_TYPES = {
    "image": "image",
    "image_url": "image",
    "image_path": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
_PATH_KEYS = ("url", "path", "image", "file_name")


def to_llava(record: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """The record in LLaVA's schema.

    Args:
        record: as decoded from JSON.

    Returns:
        The new record and the note codes of what was changed, ``record-messages`` and ``record-image-field``; None when the record has
        LLaVA's schema already, or nothing that could be given it.

    Raises:
        RecordError: ``no-conversations`` or ``bad-turn``: there are messages, but not as they should be.
    """
    image_field = _image_field(record)
    turns_field = _turns_field(record)
    if image_field in ("", "image") and not turns_field:
        return None
    notes: list[str] = []
    given = _paths(record[image_field]) if image_field else None
    found = _Found()
    turns: list[dict[str, Any]] = []
    if turns_field:
        notes.append(FROM_MESSAGES)
        messages = record[turns_field]
        if turns_field == "texts":
            messages = _of_pairs(messages, len(given) if isinstance(given, list) else int(bool(given)))
        for number, message in enumerate(_messages(messages, turns_field)):
            turn = _turn(message, number, found)
            if (
                number == 0
                and list(turn) == ["from", "value"]
                and turn["from"] in _SYSTEM
                and not found.media
            ):
                found.system = turn["value"]
            else:
                turns.append(turn)
    if image_field not in ("", "image"):
        notes.append(FROM_FIELD)

    beside = _beside(record, found, given)
    new: dict[str, Any] = {}
    for name, value in record.items():
        if name == turns_field:
            new.update(beside)
            new["conversations"] = turns
        elif name == image_field:
            new["image"] = given
        elif name not in beside and name != "image" and not (turns_field and name == "conversations"):
            new[name] = value
    return new, tuple(notes)


def _image_field(record: Mapping[str, Any]) -> str:
    """Where the images stand; empty when nowhere."""
    return next((name for name in ("image", *_IMAGE_FIELDS) if _filled(record.get(name))), "")


def _filled(value: Any) -> bool:
    """Whether there are images; a number, as of how many there are, is none."""
    return any(value) if isinstance(value, list) else bool(value) and isinstance(value, str | dict)


def _turns_field(record: Mapping[str, Any]) -> str:
    """Where messages stand that are not LLaVA's; empty when nowhere."""
    turns = record.get("conversations")
    if turns is None or turns == []:
        return "messages" if "messages" in record else "texts" if _are_pairs(record.get("texts")) else ""
    first = turns[0] if isinstance(turns, list) else None
    return "conversations" if isinstance(first, dict) and "role" in first and "from" not in first else ""


def _are_pairs(value: Any) -> bool:
    """Whether these are the Cauldron's texts."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and {"user", "assistant"} <= item.keys() for item in value)
    )


def _of_pairs(pairs: Sequence[Mapping[str, Any]], images: int) -> list[dict[str, Any]]:
    """The Cauldron's texts as messages, with as many ``<image>`` in front as there are images."""
    messages = []
    for pair in pairs:
        rest = {key: value for key, value in pair.items() if key not in ("user", "assistant")}
        messages.append({"role": "user", "content": pair["user"]})
        messages.append({"role": "assistant", "content": pair["assistant"]} | rest)
    asked = messages[0]["content"]
    if isinstance(asked, str) and not any(_TOKEN in str(message["content"]) for message in messages):
        messages[0]["content"] = f"{_TOKEN}\n" * images + asked
    return messages


def _paths(value: Any) -> Any:
    """A path or a list of them; what is neither stays what it is."""
    if isinstance(value, list):
        return [(isinstance(item, dict) and _path_in(item)[0]) or item for item in value]
    return (isinstance(value, dict) and _path_in(value)[0]) or value


def _path_in(value: Mapping[str, Any]) -> tuple[Any, str]:
    """The path or URL in an object that describes an image, and its key."""
    return next(((value[key], key) for key in _PATH_KEYS if value.get(key)), (None, ""))


@dataclass(slots=True)
class _Found:
    """What the messages hold beside texts.

    Attributes:
        media: kind -> paths, in order; None for a part that only says where one of the record's own images stands.
        info: what else each image part says.
        system: the leading system message.
    """

    media: dict[str, list[Any]] = field(default_factory=dict)
    info: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None


def _messages(value: Any, name: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise RecordError("no-conversations", f"{name!r} is empty, or no list; a list of messages is needed")
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role", message.get("from")), str):
            raise RecordError("bad-turn", f"message {number} needs the text 'role'")
    return value


def _turn(message: Mapping[str, Any], number: int, found: _Found) -> dict[str, Any]:
    """A turn; images and the like are put into `found`."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "from", "value")}
    if isinstance(content, list):
        content = _join(content, number, found, rest)
    elif content is None and rest:  # an assistant that only calls tools
        content = ""
    if not isinstance(content, str):
        raise RecordError("bad-turn", f"message {number}: 'content' is neither a text nor a list of parts")
    turn = {"from": _ROLES.get(str(role), role), "value": content}
    return turn | {key: value for key, value in rest.items() if key not in turn}


def _join(parts: Sequence[Any], number: int, found: _Found, rest: dict[str, Any]) -> str:
    """The text of a message's parts, with tokens such as ``<image>`` on lines of their own where the images stand."""
    pieces: list[tuple[str, str]] = []
    for part in parts:
        kind, text, others = _part(part, number, found)
        pieces.append((kind, text))
        for key, value in others.items():
            rest.setdefault(key, value)
    texts = "".join(text for kind, text in pieces if kind == "text")
    images = sum(kind == "image" for kind, _ in pieces)
    if images and texts.count(_OTHER_TOKEN) == images and _TOKEN not in texts:
        pieces = [(kind, text.replace(_OTHER_TOKEN, _TOKEN)) for kind, text in pieces if kind != "image"]
    elif images and texts.count(_TOKEN) == images:  # the text says itself where they stand
        pieces = [(kind, text) for kind, text in pieces if kind != "image"]
    joined, after_token = "", False
    for kind, text in pieces:
        if not text:
            continue
        line_needed = joined and (after_token or kind != "text") and not joined.endswith("\n")
        joined += "\n" * bool(line_needed and not text.startswith("\n")) + text
        after_token = kind != "text"
    return joined


def _part(part: Any, number: int, found: _Found) -> tuple[str, str, dict[str, Any]]:
    """Kind and text of one part of a message, and what else a text part says."""
    if isinstance(part, str):
        return "text", part, {}
    # columns of structs have every key in every part, most of them null
    filled = (
        {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    )
    type_ = filled.pop("type", None) or next((key for key in ("text", *_MEDIA_TYPES) if key in filled), None)
    if type_ in _TEXT_TYPES and isinstance(filled.get("text"), str):
        return "text", filled.pop("text"), filled
    kind = _MEDIA_TYPES.get(type_) if isinstance(type_, str) else None
    if kind is None:
        raise RecordError("bad-turn", f"message {number} has a part of unknown kind ({type_!r})")
    source = next((key for key in (*_MEDIA_TYPES, "url", "path") if key in filled), "")
    value = filled.pop(source, None)
    if isinstance(value, dict):
        path, key = _path_in(value)
        filled |= {other: said for other, said in value.items() if other != key and said is not None}
        value = path if path or kind == "image" else value
    found.media.setdefault(kind, []).append(value)
    if kind == "image":
        found.info.append(filled)
    return kind, f"<{kind}>", {}


def _beside(record: Mapping[str, Any], found: _Found, given: Any) -> dict[str, Any]:
    """The fields that the messages bring: `system_prompt`, `image`, `image_info`, `video`, `audio`."""
    fields: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        while name in record and (name != "image" and record[name]):
            name += "_"  # never in the place of what the record has
        fields[name] = value

    if found.system is not None:
        add("system_prompt", found.system)
    for kind, paths in found.media.items():
        if kind == "image":
            own = [path for path in paths if path]
            if given is None:
                if len(own) < len(paths):
                    raise RecordError("bad-turn", "a part of a message stands for an image, but names none")
                add("image", paths[0] if len(paths) == 1 else paths)
            elif own:
                count = len(given) if isinstance(given, list) else 1
                if count != len(paths):
                    raise RecordError(
                        "bad-turn", f"the messages name {len(paths)} images, but the record has {count}"
                    )
                for info, path in zip(found.info, paths, strict=True):
                    if path:
                        info["path"] = path
        elif any(paths):
            add(kind, paths[0] if len(paths) == 1 else paths)
    if any(found.info):
        add("image_info", found.info)
    return fields
