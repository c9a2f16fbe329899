"""Tokenizers: what `LlavaText` needs of one, and two that need at most a SentencePiece file."""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import xxhash

from shardify.errors import UsageError

MAX_MODEL_BYTES = 256 * 1024 * 1024
"""A larger file is no SentencePiece model (Llama's has 0.5 MB, Gemma's 4 MB)."""


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

    It needs no file and fits the tiniest model. Special tokens are never read from text, so no text can end
    an answer.

    Attributes:
        vocab_size: 259.
    """

    vocab_size = 3 + 256
    pad_token_id = unk_token_id = 0
    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Tokens:
        """Tokenise a text, with the start token before it unless `add_special_tokens` is False."""
        tokens = [byte + 3 for byte in text.encode()]
        return Tokens([self.bos_token_id, *tokens] if add_special_tokens else tokens)

    @property
    def fingerprint(self) -> str:
        """Names what it does: equal for all byte tokenizers."""
        return "bytes-1"

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special and unknown ones left out and broken UTF-8 replaced."""
        return bytes(token - 3 for token in tokens if 3 <= token < self.vocab_size).decode("utf-8", "replace")


class SentencePieceTokenizer:
    """Llama's tokenizer from its SentencePiece file, as transformers 4.37's slow LlamaTokenizer.

    The special tokens ``<s>``, ``</s>`` and ``<unk>`` are cut out of the text first; every stretch between
    them is encoded by itself. SentencePiece is trained on words with a blank before them. *legacy* therefore
    puts one before every stretch, otherwise only the text as a whole begins with one:

        text          legacy                        not legacy
        Hi</s>USER    <s> "▁Hi" </s> "▁US" "ER"     <s> "▁Hi" </s> "USER"

    The blank put before a text that begins with a special token makes no token. Padding is ``<unk>``, as
    LLaVA sets it.

    Args:
        path: the model file, ``tokenizer.model``.
        legacy: as ``legacy`` in the model's tokenizer_config.json; where that says nothing (Vicuna 1.1 and
            1.3), it is True. Default False (Vicuna 1.5).

    Raises:
        UsageError: no such file, or it is not a SentencePiece model with start, end and unknown tokens.
    """

    def __init__(self, path: str | os.PathLike[str], *, legacy: bool = False) -> None:
        self.path = os.fspath(path)
        self.legacy = legacy
        try:
            size = os.path.getsize(self.path)
            if size > MAX_MODEL_BYTES:
                raise UsageError(
                    f"{self.path}: {size} bytes; a SentencePiece model has at most {MAX_MODEL_BYTES}"
                )
            with open(self.path, "rb") as file:
                self._model = file.read()
        except OSError as error:
            raise UsageError(f"{self.path}: the tokenizer file cannot be read: {error.strerror}") from None
        processor = self._processor
        special = (processor.bos_id(), processor.eos_id(), processor.unk_id())
        if min(special) < 0:
            raise UsageError(
                f"{self.path}: start, end and unknown token are {special}; a Llama tokenizer has all three"
            )
        self.bos_token_id, self.eos_token_id, self.unk_token_id = special
        self.pad_token_id: int = self.unk_token_id
        self.vocab_size: int = processor.get_piece_size()
        self._special: dict[str, int] = {processor.id_to_piece(token): token for token in special}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")").split

    @cached_property
    def fingerprint(self) -> str:
        """Names what it does: by the content of its file, wherever that lies, and `legacy`."""
        return f"sentencepiece-1 {xxhash.xxh3_128_hexdigest(self._model)} legacy={self.legacy}"

    @cached_property
    def _processor(self) -> Any:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UsageError(
                "SentencePieceTokenizer needs sentencepiece: pip install 'shardify[train]'"
            ) from None
        # the model is a protocol buffer, where what is appended overrides: normalizer_spec.add_dummy_prefix =
        # false, so that blanks before stretches are ours to put
        model = self._model + b"\x1a\x02\x18\x00"
        try:
            return SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise UsageError(f"{self.path}: not a SentencePiece model ({error})") from None

    @cached_property
    def _encode(self) -> Callable[[str], list[int]]:
        # the mask arithmetic asks for the system prompt and for every round again
        return lru_cache(maxsize=32)(self._processor.encode)

    def __getstate__(self) -> dict[str, Any]:
        # every process loads its own processor, from bytes it already has
        return {name: value for name, value in vars(self).items() if name not in ("_processor", "_encode")}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Tokens:
        """Tokenise a text.

        Args:
            text: the text.
            add_special_tokens: True (default): a text of its own, begun with the start token and a blank.
                False: one that continues another, with neither.
        """
        tokens = [self.bos_token_id] if add_special_tokens else []
        blank = add_special_tokens
        for number, stretch in enumerate(self._split(text)):
            if number % 2:
                tokens.append(self._special[stretch])
                blank = self.legacy
            elif stretch:
                tokens += self._encode("▁" + stretch if blank else stretch)
        return Tokens(tokens)


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """Names what a tokenizer does, so that token counts can be kept: equal for equal ones, another for any other.

    That is the tokenizer's own `fingerprint` when it has one (a text). For those of transformers it is a hash of their whole state, which the fast
    ones can write down, or of vocabulary and settings.

    Raises:
        UsageError: it cannot be told; give it an attribute `fingerprint`.
    """
    own = getattr(tokenizer, "fingerprint", None)
    if isinstance(own, str):
        return own
    state: list[str] = [type(tokenizer).__qualname__]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if backend is not None:
            state.append(backend.to_str())
        else:
            vocabulary = tokenizer.get_vocab()  # type: ignore[attr-defined]
            state.append(json.dumps(vocabulary, sort_keys=True))
        settings = dict(getattr(tokenizer, "init_kwargs", {}))
        # where it was loaded from says nothing about what it does
        for name in ("name_or_path", "vocab_file", "tokenizer_file", "tokenizer_object"):
            settings.pop(name, None)
        state += sorted(f"{name}={value!r}" for name, value in settings.items() if _is_plain(value))
        for name in ("add_bos_token", "add_eos_token", "legacy"):
            state.append(f"{name}={getattr(tokenizer, name, None)!r}")
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        raise UsageError(
            f"{type(tokenizer).__name__}: its token counts cannot be kept, since it cannot be told from others; give it an attribute"
            " `fingerprint`, a text that changes with what it does"
        ) from None
    return f"{state[0]} {xxhash.xxh3_128_hexdigest(chr(0).join(state).encode('utf-8', 'surrogatepass'))}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)
