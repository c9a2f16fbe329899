"""Tokenizers: what `LlavaText` needs of one, one that needs no file, and `make_tokenizer`, which finds the right one."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import xxhash

from shardify.errors import UsageError


class Encoding(Protocol):
    """What a tokenizer returns."""

    @property
    def input_ids(self) -> Any:
        """The tokens, a list of int."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it all."""

    @property
    def bos_token_id(self) -> int | None:
        """The start token."""

    @property
    def eos_token_id(self) -> int | None:
        """The end token."""

    @property
    def unk_token_id(self) -> int | None:
        """What stands for unknown text."""

    @property
    def pad_token_id(self) -> int | None:
        """What fills a batch up."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Encoding:
        """Tokenise a text, with the start token before it unless `add_special_tokens` is False."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text."""

    input_ids: list[int]


class ByteTokenizer:
    """A token for every byte of UTF-8, after three special ones: 0 padding (and unknown), 1 start, 2 end.

    It needs no file and fits the tiniest model. Special tokens are never read from text, so no text can end an answer.

    Attributes:
        vocab_size: 259.
        fingerprint: names the tokens that texts have; of other tokenizers, too.
    """

    vocab_size = 3 + 256
    pad_token_id = unk_token_id = 0
    bos_token_id = 1
    eos_token_id = 2
    fingerprint = "bytes"

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Tokens:
        """Tokenise a text, with the start token before it unless `add_special_tokens` is False."""
        tokens = [byte + 3 for byte in text.encode()]
        return Tokens([self.bos_token_id, *tokens] if add_special_tokens else tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special and unknown ones left out and broken UTF-8 replaced."""
        return bytes(token - 3 for token in tokens if 3 <= token < self.vocab_size).decode("utf-8", "replace")


def make_tokenizer(spec: str | os.PathLike[str], *, legacy: bool | None = None) -> Tokenizer:
    """The tokenizer of a file, a folder, or a model's name.

    - ``bytes``: a `ByteTokenizer`.
    - ``.../tokenizer.model``: a `SentencePieceTokenizer`. What a ``tokenizer_config.json`` beside it says holds: ``legacy`` (True where
      that file says nothing of it, as with Vicuna 1.1 and 1.3; False where there is no such file), ``add_bos_token``, padding, further special tokens.
    - ``.../tokenizer.json``: a `JsonTokenizer`; which tokens start, end and pad is read from the ``tokenizer_config.json`` beside it.
    - a folder, such as a model's: a `SentencePieceTokenizer` for Llama's kind where it has a ``tokenizer.model``, as LLaVA uses the slow tokenizer;
      else a `JsonTokenizer`; else whatever transformers makes of it.
    - any other text: the name of a model on the Hugging Face hub, whose tokenizer files are downloaded once (HF_HUB_OFFLINE=1: are looked for
      in the cache), then as a folder.

    ``<image>`` is no token of what comes out of this: `LlavaText` reads it itself, and where it is not an image it is text, as in LLaVA.

    Args:
        spec: as above.
        legacy: for a `SentencePieceTokenizer`, instead of what its configuration says.

    Raises:
        UsageError: there is no such thing, it is damaged, or a library is missing (``pip install 'shardify[train]'``).
    """
    from loaders.text.files import tokenizer_in, tokenizer_of_name

    text = os.fspath(spec)
    if text == "bytes":
        return ByteTokenizer()
    path = Path(text)
    if text and path.exists():
        return tokenizer_in(path, legacy=legacy)
    if isinstance(spec, str) and looks_like_a_name(text):
        return tokenizer_of_name(text, legacy=legacy)
    raise UsageError(
        f"{text!r}: no such file or folder; a tokenizer is 'bytes', a tokenizer.model, a tokenizer.json, a model's folder, "
        "or its name on the Hugging Face hub (organisation/model)"
    )


def looks_like_a_name(text: str) -> bool:
    """Whether it may be a name on the hub: ``model`` or ``organisation/model``."""
    parts = text.split("/")
    return len(parts) <= 2 and all(
        part
        and not part.startswith(".")
        and all(letter.isascii() and (letter.isalnum() or letter in "-_.") for letter in part)
        for part in parts
    ) and not text.endswith((".json", ".model"))  # fmt: skip


def direct(tokenizer: Tokenizer) -> Tokenizer:
    """A fast tokenizer of transformers without what transformers puts around each call, which costs more than the tokenising; others as they are."""
    if getattr(tokenizer, "is_fast", False) and hasattr(tokenizer, "backend_tokenizer"):
        from loaders.text.json_tokenizer import JsonTokenizer

        return JsonTokenizer.of_transformers(tokenizer)
    return tokenizer


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """A text that changes with the tokens that texts have.

    Raises:
        UsageError: a tokenizer without `fingerprint` and vocabulary.
    """
    name = getattr(tokenizer, "fingerprint", None)
    if isinstance(name, str):
        return name
    vocabulary = getattr(tokenizer, "get_vocab", None)
    if vocabulary is None:
        raise UsageError(
            f"{type(tokenizer).__name__} has neither `fingerprint` (a text that changes with the tokens that texts have) nor `get_vocab()`: "
            "token counts cannot be kept for it"
        )
    settings = {key: repr(value) for key, value in sorted(getattr(tokenizer, "init_kwargs", {}).items())}
    parts = [type(tokenizer).__qualname__, sorted(vocabulary().items()), settings]
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(parts))
