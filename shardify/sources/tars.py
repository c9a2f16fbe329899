"""WebDataset tars of any origin: a sample is what the webdataset library says it is, neighbouring members of one key.

    000042.jpg 000042.json               this project's, and any whose JSON is a record: the record as it stands
    000042.jpg 000042.json               Megatron's: the JSON is only the list of turns
    000042.jpg 000042.txt 000042.json    img2dataset's: a caption, and fields about the image
    000042.jpg 000042.txt

Nothing is decoded but JSON. A sample's key becomes the record's id where it has none.
"""

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import msgspec

from shardify.errors import RecordError, SourceError
from shardify.format.names import IMAGE_FORMATS, RECORD_FIELD, is_image_field
from shardify.prepare import encode_record, prepare
from shardify.sources.spool import FIELD_DROPPED, Spool

MAX_MEMBER_BYTES = 1024**3
"""A larger member is no image and no record; webdataset would read it whole."""

_BLOCK = 512
_MAX_TEXT_BYTES = 1024 * 1024
_CAPTION = "txt"
_MEDIA = {"mp4": "video", "avi": "video", "mov": "video", "webm": "video", "mkv": "video"} | {
    "wav": "audio",
    "mp3": "audio",
    "flac": "audio",
    "ogg": "audio",
    "m4a": "audio",
}


def read_tars(paths: Sequence[str], spool: Spool) -> None:
    """Spool the samples of tars.

    Args:
        paths: plain tars, in order.
        spool: takes the records and their images.

    Raises:
        SourceError: a tar is damaged or cut off (with the byte where), or two members of a sample have one name.
    """
    for path in paths:
        for sample in _samples(path):
            _add(sample, spool)


def check_tar(path: str) -> int:
    """Walk all headers: tar readers, webdataset among them, take a damaged one for the end and say nothing.

    Returns:
        Bytes of the tar.

    Raises:
        SourceError: it is no tar, damaged or cut off, or has a member that cannot be read as it lies.
    """
    try:
        with open(path, "rb") as file:
            return _check(file, path)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from None


def _check(file: BinaryIO, path: str) -> int:
    total = os.fstat(file.fileno()).st_size
    archive: tarfile.TarFile | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                _check_member(member, path, total)
    except (OSError, SourceError):
        raise
    except Exception as error:  # noqa: BLE001 - tarfile raises nearly anything on damaged headers
        raise SourceError(
            f"{path}: no tar, or damaged, at byte {archive.offset if archive else 0} ({error}); a compressed one must be unpacked first"
        ) from None
    if os.pread(file.fileno(), _BLOCK, archive.offset) != bytes(_BLOCK):
        raise SourceError(
            f"{path}: damaged, or cut off before the end-of-archive mark, at byte {archive.offset}"
        )
    return total


def _check_member(member: tarfile.TarInfo, path: str, total: int) -> None:
    at = f"{path}: member {member.name!r} at byte {member.offset}"
    if member.issparse() or member.size > MAX_MEMBER_BYTES:
        raise SourceError(f"{at} is a sparse file or larger than {MAX_MEMBER_BYTES} bytes: no sample")
    if member.isreg() and member.offset_data + member.size > total:
        raise SourceError(f"{at} is cut off: the file ends at byte {total}; get it again")


def _samples(path: str) -> Iterator[Mapping[str, Any]]:
    # imported here: it imports torch, which most sources do without
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        with open(path, "rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": path, "stream": stream}]))
    except ValueError as error:
        raise SourceError(
            f"{path}: webdataset cannot divide it into samples ({error.args[0]}); the keys of neighbouring samples must differ"
        ) from None
    except (tarfile.TarError, OSError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from None


def _add(sample: Mapping[str, Any], spool: Spool) -> None:
    key = sample["__key__"]
    fields = {name: data for name, data in sample.items() if not name.startswith("__")}
    images = _in_order({name: data for name, data in fields.items() if is_image_field(name)})
    raw = fields.get(RECORD_FIELD)
    texts: dict[str, str] = {}
    notes: list[str] = []
    media: dict[str, str] = {}
    for name, data in fields.items():
        if name in images or name == RECORD_FIELD:
            continue
        kind = _MEDIA.get(name.rpartition(".")[2])
        text = None if kind else _as_text(data)
        if text is not None:
            texts[name] = text
        elif kind and not images:
            media[kind] = f"{key}.{name}"  # the record will be set aside as one of a video or sound
        else:
            notes = [FIELD_DROPPED]

    record, changed = _record(raw, key, texts)
    if not isinstance(record, dict):
        spool.add(raw or b"null")
        return
    own_images = _image_paths(record)
    if images and not own_images:
        paths = [f"{key}.{name}" for name in images]
        record = _with_image(record, paths[0] if len(paths) == 1 else paths)
        own_images, changed = paths, True
    for name, value in (media | texts).items():
        if name not in record and not (name == _CAPTION and raw is None):
            record[name], changed = value, True
    taken = _match(own_images, images, key)
    if len(set(taken) - {""}) < len(images):
        notes = [FIELD_DROPPED]
    data = [images.get(name) for name in taken]
    if changed or raw is None:
        spool.add_record(record, data, notes=notes)
    else:
        spool.add(raw, data, notes=notes)


def _record(raw: bytes | None, key: str, texts: dict[str, str]) -> tuple[Any, bool]:
    """The sample's record, and whether it is other than its JSON member; a caption's text is taken out of `texts`."""
    if raw is None:
        return _captioned({}, key, texts), True
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None, False  # packing will say why
    if isinstance(value, list):
        turns = "messages" if value and isinstance(value[0], dict) and "role" in value[0] else "conversations"
        return {"id": key, turns: value}, True
    if not isinstance(value, dict):
        return None, False
    if "conversations" not in value and "messages" not in value:
        return _captioned(value, key, texts), True
    if value.get("id") is None:
        return {"id": key} | {name: field for name, field in value.items() if name != "id"}, True
    return value, False


def _captioned(fields: Mapping[str, Any], key: str, texts: dict[str, str]) -> dict[str, Any]:
    """A caption as LLaVA's pretraining has it; without any caption the record has no turns."""
    caption = texts.pop(_CAPTION, None)
    if caption is None:
        caption = fields.get("caption")
    record: dict[str, Any] = {"id": key if fields.get("id") is None else fields["id"]}
    if isinstance(caption, str):
        record["conversations"] = [
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": caption},
        ]
    return record | {name: value for name, value in fields.items() if name not in record}


def _with_image(record: Mapping[str, Any], image: str | list[str]) -> dict[str, Any]:
    """The record with its image behind its id."""
    rest = {name: value for name, value in record.items() if name not in ("id", "image")}
    return {"id": record["id"], "image": image} | rest


def _image_paths(record: Mapping[str, Any]) -> list[str]:
    try:
        return [image.path for image in prepare(encode_record(record)).sample.images]
    except RecordError:
        return []


def _in_order(images: dict[str, bytes]) -> dict[str, bytes]:
    """Numbered images (``0.jpg``, ``10.png``) by their numbers, others as they stand in the tar."""
    if all(name.partition(".")[0].isdecimal() for name in images):
        return dict(sorted(images.items(), key=lambda item: int(item[0].partition(".")[0])))
    return images


def _match(paths: Sequence[str], images: Mapping[str, bytes], key: str) -> list[str]:
    """For each image of a record the member that holds it, empty when none does: by name, or one after another, or by format."""
    files = {f"{os.path.basename(key)}.{name}".lower(): name for name in images}
    named = [files.get(os.path.basename(path).lower(), "") for path in paths]
    if len(paths) == len(images):
        return named if set(named) == set(images) else list(images)
    formats = {IMAGE_FORMATS[name]: name for name in images if name in IMAGE_FORMATS}
    if len(paths) == 1 and not named[0]:
        extension = paths[0].rpartition(".")[2].lower()
        named = [formats.get(IMAGE_FORMATS.get(extension, extension), "")]
    return named


def _as_text(data: bytes) -> str | None:
    if len(data) > _MAX_TEXT_BYTES or b"\0" in data:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
