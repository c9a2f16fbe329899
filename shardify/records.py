"""What a LLaVA record means: `Sample`, `Turn` and `ImageRef`, read from the record's own bytes.

A record is a JSON object (docs/recipes.md lists the reason codes):

    {"id": ..., "image": "path" | ["path", ...] (absent, null, "", [] or [""] for text-only),
     "conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], ...}

A record of a video or a sound (``video``, ``audio``, or an ``image`` such as ``a.mp4``) has a reason code of its own; with an image beside it, it
is a record of that image.
"""

import json
import re
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, TypeAlias

import msgspec

from shardify.errors import RecordError

NO_ID = (None, "null")
"""`Sample.id` of a record without id: it has no such field, or null."""

MAX_RECORD_BYTES = 64 * 1024 * 1024
"""A record larger than this is set aside unread (LLaVA's longest, 275 turns, is under 1 MB)."""


_MEDIA = {
    **dict.fromkeys(
        ("mp4", "avi", "mov", "mkv", "webm", "m4v", "mpg", "mpeg", "wmv", "flv", "3gp"), "record-video"
    ),
    **dict.fromkeys(("wav", "mp3", "flac", "ogg", "m4a", "aac", "opus", "wma"), "record-audio"),
}
# nothing in it needs a second look
_PLAIN_PATH = re.compile(r"(?:[^./\\:\0][^/\\:\0]*/)*[^./\\:\0][^/\\:\0]*")
_USUAL_ENDS = frozenset({"jpg", "peg", "png"})  # no time is spent on these
_VIDEO_FIELDS = ("video", "videos", "video_path", "input_video")
_AUDIO_FIELDS = ("audio", "audios", "audio_path", "input_audio")


class Turn(msgspec.Struct, frozen=True):
    """One message: `role` as written in ``from``, `text` as written in ``value``."""

    role: str = msgspec.field(name="from")
    text: str = msgspec.field(name="value")


class ImageRef(msgspec.Struct, frozen=True):
    """An image as the record names it: a path relative to some image root."""

    path: str

    def name(self) -> str:
        """The path's components, joined by '/'.

        Raises:
            RecordError: as `parts`.
        """
        return self.path if _PLAIN_PATH.fullmatch(self.path) else "/".join(self.parts())

    def parts(self) -> tuple[str, ...]:
        """The path's components, ``.`` and empty ones removed.

        Raises:
            RecordError: ``image-path-unsafe`` when the path is absolute, climbs out of its root, or cannot be a file name.
        """
        text = self.path.replace("\\", "/")
        parts = tuple(part for part in text.split("/") if part not in ("", "."))
        if text.startswith("/") or ".." in parts or "\0" in text or not parts or parts[0].endswith(":"):
            raise RecordError("image-path-unsafe", f"{self.path!r} does not stay inside the image root")
        return parts


class Sample(msgspec.Struct, frozen=True):
    """A parsed record.

    Attributes:
        id: the id as JSON text (``'"000123"'``, ``'2327515'``), None when the record has none.
        images: the referenced images in the record's order; empty for text-only.
        image_is_list: whether ``image`` is a list, even of one.
        turns: the conversation.
        words: whitespace words over all turns, LLaVA's length measure (llava/train/train.py, `modality_lengths`).
        strict: False when the bytes are JSON only to a tolerant reader (NaN, a lone surrogate, a byte order mark).
    """

    id: str | None
    images: tuple[ImageRef, ...]
    image_is_list: bool
    turns: tuple[Turn, ...]
    words: int
    strict: bool


Measured: TypeAlias = tuple[str | None, int, int, bool]
"""What a shard's index tells of a record: `id`, number of turns, `words` and `strict` of its `Sample`."""


class _Record(msgspec.Struct):
    conversations: tuple[Turn, ...]
    id: msgspec.Raw = msgspec.Raw(b"")
    image: str | list[str] | None = None
    video: Any = None
    videos: Any = None
    video_path: Any = None
    input_video: Any = None
    audio: Any = None
    audios: Any = None
    audio_path: Any = None
    input_audio: Any = None


_decoder = msgspec.json.Decoder(_Record)
_media = attrgetter(*_VIDEO_FIELDS, *_AUDIO_FIELDS)
_NO_MEDIA = (None,) * len(_VIDEO_FIELDS + _AUDIO_FIELDS)


def parse_record(data: bytes | memoryview, *, outline: bool = False) -> Sample:
    """Read one record.

    Args:
        data: the record's bytes, one JSON object.
        outline: the turns are only looked at: the sample may come without them, and without words, which takes half the time.

    Raises:
        RecordError: with the reason code; never anything else for any bytes.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise RecordError("record-too-large", f"more than {MAX_RECORD_BYTES} bytes")
    try:
        str(data, "utf-8")  # msgspec does not look inside texts it need not decode
        record = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        # a second, tolerant and slower reader: for what LLaVA's json.load accepts, and for a precise reason
        return _parse_tolerantly(bytes(data))
    image = record.image
    paths = image if isinstance(image, list) else [image or ""]
    images = _references(paths)
    if not images and _media(record) != _NO_MEDIA:
        _refuse_media(msgspec.structs.asdict(record))
    if not record.conversations:
        raise RecordError("no-conversations", "'conversations' is empty")
    turns = () if outline else record.conversations
    return Sample(
        id=str(record.id, "utf-8") or None,
        images=images,
        image_is_list=isinstance(image, list),
        turns=turns,
        words=sum([len(turn.text.split()) for turn in turns]),
        strict=True,
    )


def measure_record(data: bytes | memoryview) -> Measured:
    """What an index tells of a record, as `parse_record` would read it, in half the time where the record is as usual.

    Raises:
        RecordError: as `parse_record`.
    """
    if len(data) <= MAX_RECORD_BYTES:
        try:
            str(data, "utf-8")
            record = _decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            data = bytes(data)
            if b"conversations" not in data and b"\\u" not in data:  # the name may be written in escapes
                raise RecordError("no-conversations", "no field 'conversations'") from None
        else:
            image, turns = record.image, record.conversations
            pictured = isinstance(image, str) and image[-3:] in _USUAL_ENDS
            if turns and (pictured or (not image and _media(record) == _NO_MEDIA)):
                words = 0
                for turn in turns:
                    words += len(turn.text.split())
                return str(record.id, "utf-8") or None, len(turns), words, True
    sample = parse_record(data)
    return sample.id, len(sample.turns), sample.words, sample.strict


def load_record(data: bytes | memoryview) -> dict[str, Any]:
    """The record as a dict of plain Python values, read as tolerantly as `parse_record`; a bare list of messages as ``{"messages": ...}``.

    Raises:
        RecordError: ``record-not-json`` or ``record-not-object``.
    """
    try:
        value = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        value = _load_tolerantly(bytes(data))
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise RecordError("record-not-object", f"a JSON object is needed, this is {json_type(value)}")
    return value


def sample_of(record: Mapping[str, Any], *, strict: bool = True) -> Sample:
    """The `Sample` of a record that is already decoded.

    Raises:
        RecordError: with the reason code.
    """
    image = record.get("image")
    paths = image if isinstance(image, list) else ["" if image is None else image]
    for path in paths:
        if not isinstance(path, str):
            raise RecordError("image-not-a-path", f"'image' holds {json_type(path)}; a path is needed")
    images = _references(paths)
    if not images:
        _refuse_media(record)
    turns = record.get("conversations")
    if turns is None:
        raise RecordError("no-conversations", "no field 'conversations'")
    if not isinstance(turns, list) or not turns:
        what = "an empty list" if turns == [] else json_type(turns)
        raise RecordError("no-conversations", f"'conversations' is {what}; a list of turns is needed")
    parsed: list[Turn] = []
    for number, turn in enumerate(turns):
        role, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(value, str):
            raise RecordError("bad-turn", f"turn {number} needs the texts 'from' and 'value'")
        parsed.append(Turn(role, value))
    return Sample(
        id=json.dumps(record["id"]) if "id" in record else None,
        images=images,
        image_is_list=isinstance(image, list),
        turns=tuple(parsed),
        words=sum(len(turn.text.split()) for turn in parsed),
        strict=strict,
    )


def _references(paths: list[str]) -> tuple[ImageRef, ...]:
    """None where every path is empty: so text-only records are written too."""
    if not any(paths):
        return ()
    for path in paths:
        if path[-3:] not in _USUAL_ENDS:
            _refuse_path(path)
    return tuple(map(ImageRef, paths))


def _refuse_path(path: str) -> None:
    """Refuse what is plainly no picture's path."""
    _, dot, extension = path[-5:].rpartition(".")
    if dot and (code := _MEDIA.get(extension.lower())):
        raise RecordError(code, f"{path!r} is named as an image")
    if path.startswith("data:"):
        raise RecordError("image-not-a-path", f"a data: URL of {len(path)} characters; a path is needed")


def _refuse_media(record: Mapping[str, Any]) -> None:
    """Refuse a record without image that is one of a video or sound."""
    for code, names in (("record-video", _VIDEO_FIELDS), ("record-audio", _AUDIO_FIELDS)):
        for name in names:
            if record.get(name):
                raise RecordError(code, f"the field {name!r}, and no image")


def _parse_tolerantly(data: bytes) -> Sample:
    value = _load_tolerantly(data)
    if not isinstance(value, dict):
        raise RecordError("record-not-object", f"a JSON object is needed, this is {json_type(value)}")
    try:
        msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        strict = False
    else:
        strict = True
    return sample_of(value, strict=strict)


def _load_tolerantly(data: bytes) -> Any:
    try:
        # surrogatepass: UTF-8 that encodes a lone surrogate is what a careless writer leaves behind
        return json.loads(data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise RecordError("record-not-json", str(error)) from None


def json_type(value: Any) -> str:
    """What a decoded JSON value is called in messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
