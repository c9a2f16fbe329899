"""A tokenizer of the tokenizers library, from its `tokenizer.json` or out of transformers."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import xxhash

from loaders.text.layouts import IMAGE_TEXT
from loaders.text.tokenizers import Tokens
from shardify.errors import UsageError

_NO_TEXT = "\ufdd0no text\ufdd0"  # Unicode leaves U+FDD0 to programs, for their own use


class JsonTokenizer:
    """A tokenizer from its ``tokenizer.json``: the same tokens as transformers' fast tokenizers, in a tenth of the time a text.

    Which tokens start, end and pad stands in another file, so they are named here; `make_tokenizer` reads them from the
    ``tokenizer_config.json`` beside it.

    Args:
        path: the ``tokenizer.json``.
        bos_token: the start token's text; None (default) for none,
        eos_token: the end token's,
        unk_token: that of the token for unknown text,
        pad_token: that of the token that fills a batch up.
        legacy: as `SentencePieceTokenizer.legacy`, for tokenizers of Llama's kind. None (default): it does not say.

    Raises:
        UsageError: no such file, it is no tokenizer, or has no such token.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        unk_token: str | None = None,
        pad_token: str | None = None,
        legacy: bool | None = None,
    ) -> None:
        path = os.fspath(path)
        try:
            with open(path, encoding="utf-8") as file:
                backend = _backend(file.read())
        except OSError as error:
            raise UsageError(f"{path}: the tokenizer file cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}: not a tokenizer.json that this version of tokenizers reads ({error})"
            ) from None
        numbers: list[int | None] = []
        for kind, token in (
            ("start", bos_token),
            ("end", eos_token),
            ("unknown", unk_token),
            ("padding", pad_token),
        ):
            number = None if token is None else backend.token_to_id(token)
            if token is not None and number is None:
                raise UsageError(f"{path}: no token {token!r}, which is to be the {kind} token")
            numbers.append(number)
        self._set(backend, numbers, legacy)

    @classmethod
    def of_transformers(cls, tokenizer: Any) -> Self:
        """That of a fast tokenizer of transformers."""
        made = cls.__new__(cls)
        numbers = [getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")]
        backend = _backend(tokenizer.backend_tokenizer.to_str())
        made._set(backend, numbers, getattr(tokenizer, "legacy", None))  # noqa: SLF001 - its own class
        return made

    def _set(self, backend: Any, numbers: list[int | None], legacy: bool | None) -> None:
        self._backend = backend
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = numbers
        self.legacy = legacy
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def fingerprint(self) -> str:
        """Names the tokens that texts have."""
        numbers = (self.bos_token_id, self.eos_token_id, self.legacy)
        return xxhash.xxh3_128_hexdigest(f"{self._backend.to_str()}{numbers}".encode())

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Tokens:
        """Tokenise a text, with the tokens that begin one unless `add_special_tokens` is False."""
        return Tokens(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        text: str = self._backend.decode([token for token in tokens if 0 <= token < self.vocab_size])
        return text


def _backend(content: str) -> Any:
    """Without padding and truncation, and without ``<image>`` among the tokens, which is for `LlavaText` to read; ValueError if it is none."""
    parsed = json.loads(content)
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - as the errors of json
    added = parsed.get("added_tokens") or []
    others = [token for token in added if token.get("content") != IMAGE_TEXT]
    settings = parsed | {"padding": None, "truncation": None}
    backend = _made(settings | {"added_tokens": others})
    if any(backend.token_to_id(token.get("content")) != token.get("id") for token in others):
        # those behind it took its number: what no text says keeps it
        added = [
            token if token.get("content") != IMAGE_TEXT else token | {"content": _NO_TEXT} for token in added
        ]
        backend = _made(settings | {"added_tokens": added})
    return backend


def _made(settings: Mapping[str, Any]) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UsageError("a tokenizer.json needs tokenizers: pip install 'shardify[train]'") from None
    try:
        return Tokenizer.from_str(json.dumps(settings))
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more precise
        raise ValueError(str(error)) from None
