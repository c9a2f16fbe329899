"""LLaVA's prompt folders for text-only GPT-4 (playground/data/prompts): a system message and worked examples.

    conversation/system_message.txt    000_caps.txt    000_conv.txt    001_caps.txt    001_conv.txt ...

GPT-4 saw the captions (and boxes) of an image and had to write what is in ``_conv``: questions and answers in blocks divided by ``===``
in `conversation` and `complex_reasoning`, a text in `detail_description`. Each pair becomes a text-only record: the human turn is the system
message, a blank line and the captions (LLaVA's templates know no system turn), the answer is ``_conv`` as the file has it.
"""

import os

from shardify.errors import SourceError
from shardify.sources.spool import Spool

SYSTEM = "system_message.txt"
_CAPTIONS, _ANSWER = "_caps.txt", "_conv.txt"
_MAX_BYTES = 16 * 1024 * 1024


def prompt_folders(path: str) -> list[str]:
    """The prompt folders at `path`: itself, or those directly inside, in the order of their names; empty when there are none."""
    if os.path.isfile(os.path.join(path, SYSTEM)):
        return [path]
    try:
        inside = sorted(os.listdir(path))
    except OSError:
        return []
    return [
        folder for name in inside if os.path.isfile(os.path.join(folder := os.path.join(path, name), SYSTEM))
    ]


def read_prompts(folders: list[str], spool: Spool) -> None:
    """Spool the pairs of prompt folders, by name; a half of a pair is a record without turns, to be set aside.

    Args:
        folders: each with a system message; their names begin the records' ids.
        spool: takes the records.

    Raises:
        SourceError: a file cannot be read or is not UTF-8, or a folder holds no pairs.
    """
    for folder in folders:
        system = _read(os.path.join(folder, SYSTEM))
        names = set(os.listdir(folder))
        stems = sorted(
            {
                name.removesuffix(ending)
                for name in names
                for ending in (_CAPTIONS, _ANSWER)
                if name.endswith(ending)
            }
        )
        if not stems:
            raise SourceError(
                f"{folder}: a prompt folder without pairs; files like 000{_CAPTIONS} and 000{_ANSWER} are needed"
            )
        for stem in stems:
            record: dict[str, object] = {"id": f"{os.path.basename(os.path.abspath(folder))}/{stem}"}
            texts = [
                _read(os.path.join(folder, name)) if (name := stem + ending) in names else None
                for ending in (_CAPTIONS, _ANSWER)
            ]
            captions, answer = texts
            if captions is None or answer is None:
                record |= {
                    "missing": stem + (_CAPTIONS if captions is None else _ANSWER),
                    "conversations": [],
                }
            else:
                record["conversations"] = [
                    {"from": "human", "value": f"{system}\n\n{captions}"},
                    {"from": "gpt", "value": answer},
                ]
            spool.add_record(record)


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise SourceError(f"{path}: more than {_MAX_BYTES} bytes; a prompt is a short text")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8, at byte {error.start}; please convert it") from None
