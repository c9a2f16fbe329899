"""Finding a tokenizer among a model's files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loaders.text.json_tokenizer import JsonTokenizer
from loaders.text.layouts import IMAGE_TEXT
from loaders.text.sentencepieces import SentencePieceTokenizer
from loaders.text.tokenizers import Tokenizer, direct
from shardify.errors import UsageError

_MODEL, _JSON, _CONFIG, _TOKENS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
_PATTERNS = ["*token*", "*.model", "vocab*", "merges.txt", "config.json"]  # of a repository on the hub
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


def tokenizer_in(path: Path, *, legacy: bool | None) -> Tokenizer:
    """That of a file or folder that exists; see `loaders.text.make_tokenizer`."""
    if path.is_dir():
        return _in_folder(path, legacy=legacy)
    config = _configuration(path.parent)
    if path.suffix == ".json":
        return _json_tokenizer(path, config)
    simple = _simple_tokens(config)
    if simple is None:
        raise UsageError(
            f"{path.parent / _CONFIG}: has tokens that are no special ones or take the blanks beside them away; use the tokenizer.json"
        )
    return _sentence_piece(path, config, simple, legacy)


def tokenizer_of_name(name: str, *, legacy: bool | None) -> Tokenizer:
    """That of a model on the Hugging Face hub, or in its cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(
            f"{name!r} is no file; to look for it on the Hugging Face hub needs transformers: pip install 'shardify[train]'"
        ) from None
    try:
        folder = snapshot_download(name, allow_patterns=_PATTERNS)
    except Exception as error:  # noqa: BLE001 - of several libraries, by what failed: the name, the network, ...
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{name!r} is no file or folder here, and its tokenizer cannot be had from the Hugging Face hub: {reason}"
        ) from None
    return _in_folder(Path(folder), legacy=legacy)


def _in_folder(folder: Path, *, legacy: bool | None) -> Tokenizer:
    config = _configuration(folder)
    if (folder / _MODEL).is_file() and config.get("tokenizer_class", _LLAMA_CLASSES[0]) in _LLAMA_CLASSES:
        simple = _simple_tokens(config)
        if simple is not None:
            return _sentence_piece(folder / _MODEL, config, simple, legacy)
    if (folder / _JSON).is_file():
        return _json_tokenizer(folder / _JSON, config)
    return _by_transformers(folder)


def _by_transformers(folder: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UsageError(
            f"{folder}: neither {_MODEL} nor {_JSON}; other tokenizers need transformers: pip install 'shardify[train]'"
        ) from None
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - by the kind of tokenizer, anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"{folder}: no tokenizer that transformers can load: {reason}") from None
    return direct(tokenizer)


def _sentence_piece(
    path: Path, config: Mapping[str, Any], added: Mapping[str, int], legacy: bool | None
) -> SentencePieceTokenizer:
    said = bool(config.get("legacy", True)) if config else False
    pad = _text(config.get("pad_token"))
    tokenizer = SentencePieceTokenizer(
        path,
        legacy=said if legacy is None else legacy,
        add_bos=config.get("add_bos_token") is not False,
        added=added,
        pad_token_id=None if pad is None else added.get(pad),
    )
    end = _text(config.get("eos_token"))
    if end:  # of a chat model on Llama's file, another than the file's
        tokens = tokenizer(end, add_special_tokens=False).input_ids
        if len(tokens) != 1:
            raise UsageError(
                f"{path}: has no token {end!r}, which {_CONFIG} or {_TOKENS} beside it names as its end token; use the tokenizer.json"
            )
        tokenizer.eos_token_id = tokens[0]
    return tokenizer


def _json_tokenizer(path: Path, config: Mapping[str, Any]) -> JsonTokenizer:
    tokens = {f"{kind}_token": _text(config.get(f"{kind}_token")) for kind in ("bos", "eos", "unk", "pad")}
    if tokens["eos_token"] is None:
        raise UsageError(
            f"{path}: no {_CONFIG} or {_TOKENS} beside it says which is its end token; put it there, or use JsonTokenizer(path, eos_token=...)"
        )
    legacy = config.get("legacy")
    return JsonTokenizer(path, legacy=legacy if isinstance(legacy, bool) else None, **tokens)


def _simple_tokens(config: Mapping[str, Any]) -> dict[str, int] | None:
    """The special tokens of a configuration, but ``<image>``; None if others are among them, which SentencePiece files do not know of."""
    tokens: dict[str, int] = {}
    listed = config.get("added_tokens_decoder")
    for number, token in (listed if isinstance(listed, Mapping) else {}).items():
        if not isinstance(token, Mapping) or not str(number).isdigit():
            return None
        text = token.get("content")
        if (
            not isinstance(text, str)
            or not token.get("special")
            or token.get("lstrip")
            or token.get("rstrip")
        ):
            return None
        if text != IMAGE_TEXT:
            tokens[text] = int(number)
    return tokens


def _configuration(folder: Path) -> dict[str, Any]:
    """What the folder says of its tokenizer; empty where it says nothing."""
    return _json(folder / _TOKENS) | _json(folder / _CONFIG)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a JSON object")
    return content


def _text(token: Any) -> str | None:
    """A special token's text, which is written as such or within an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
