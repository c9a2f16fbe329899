"""Llama's tokenizer from its SentencePiece file, as transformers' slow one was before transformers 5 dropped it."""

import os
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import xxhash

from loaders.text.tokenizers import Tokens
from shardify.errors import UsageError

MAX_MODEL_BYTES = 256 * 1024 * 1024
"""A larger file is no SentencePiece model (Llama's has 0.5 MB, Gemma's 4 MB)."""

_BLANK = "▁"  # how SentencePiece writes a blank
_MAX_WORDS = 100_000  # kept with their tokens, about 15 MB
_LAST = 8  # stretches that are kept with their tokens
_FIRST = 4096  # first words of stretches
_INT32 = "i"  # of the array module
_INT32_BYTES = 4
_MAX_WORD = 32  # characters; longer ones are hardly ever met again
_words = re.compile(" *[^ ]+| +").findall


class SentencePieceTokenizer:
    """Llama's tokenizer from its SentencePiece file, as transformers 4.37's slow LlamaTokenizer.

    The special tokens, ``<s>``, ``</s>`` and ``<unk>``, are cut out of the text first; every stretch between them is encoded by itself. SentencePiece is
    trained on words with a blank before them. *legacy* therefore puts one before every stretch, otherwise only the text as a whole begins with one:

        text          legacy                        not legacy
        Hi</s>USER    <s> "▁Hi" </s> "▁US" "ER"     <s> "▁Hi" </s> "USER"

    The blank put before a text that begins with a special token makes no token.

    Args:
        path: the model file, ``tokenizer.model``.
        legacy: as ``legacy`` in the model's tokenizer_config.json; where that says nothing (Vicuna 1.1 and 1.3), it is True. Default False
            (Vicuna 1.5).
        add_bos: whether a text of its own begins with the start token. Default True.
        added: more special tokens, text to number, of models that have some beside the file's.
        pad_token_id: what fills a batch up. None (default): ``<unk>``, as LLaVA sets it.

    Raises:
        UsageError: no such file, or it is not a SentencePiece model with start, end and unknown tokens.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        legacy: bool = False,
        add_bos: bool = True,
        added: Mapping[str, int] | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.legacy = legacy
        self.add_bos = add_bos
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
        self.pad_token_id: int = self.unk_token_id if pad_token_id is None else pad_token_id
        self._special: dict[str, int] = {processor.id_to_piece(token): token for token in special}
        self._special |= added or {}
        self.vocab_size: int = max(
            processor.get_piece_size(), *(token + 1 for token in self._special.values())
        )
        # of two tokens that begin alike the longer one is meant
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split
        self._start: str = processor.id_to_piece(self.bos_token_id)
        self._special_bytes = {
            text: array(_INT32, [token]).tobytes() for text, token in self._special.items()
        }
        self._by_words = _words_are_apart(processor)
        self._blank = (
            " " if self._by_words else _BLANK
        )  # both are the same there, and a text with the other takes twice the memory

    @property
    def fingerprint(self) -> str:
        """Names the tokens that texts have."""
        settings = (self.legacy, self.add_bos, sorted(self._special.items()))
        return xxhash.xxh3_128_hexdigest(self._model + repr(settings).encode())

    @cached_property
    def _processor(self) -> Any:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UsageError(
                "SentencePieceTokenizer needs sentencepiece: pip install 'shardify[train]'"
            ) from None
        # the model is a protocol buffer, where what is appended overrides: normalizer_spec.add_dummy_prefix = false, so that blanks before
        # stretches are ours to put
        model = self._model + b"\x1a\x02\x18\x00"
        try:
            return SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, OSError) as error:
            raise UsageError(f"{self.path}: not a SentencePiece model ({error})") from None

    @cached_property
    def _encode(self) -> Callable[[str], bytes]:
        # the mask arithmetic asks for the system prompt and for every round again
        return self._encode_words if self._by_words else lru_cache(maxsize=_LAST)(self._encode_at_once)

    @cached_property
    def _encode_rest(self) -> Callable[[str], bytes]:
        return lru_cache(maxsize=_LAST)(self._encode_behind_blank)  # as above

    @cached_property
    def _known(self) -> dict[str, bytes]:
        return {}  # tokens of words, without the blank before each

    def _encode_at_once(self, text: str) -> bytes:
        """Tokens are kept as bytes, int32: objects would lie all over the memory, which makes the joining slow."""
        return array(_INT32, self._processor.encode(text)).tobytes()

    def _encode_words(self, text: str) -> bytes:
        """As encoding the text at once, in a fifth of the time: the words of texts are mostly the same ones."""
        if _BLANK in text:
            text = text.replace(_BLANK, " ")
        # "▁USER: a b" and "USER: a b" shall have the same rest; but a run of blanks belongs to the word behind it
        end = text.find(" ", 0 if text[1:2] == " " else 1)
        if end < 0:
            return self._encode_first(text)
        return self._encode_first(text[:end]) + self._encode_rest(text[end + 1 :])

    @cached_property
    def _encode_first(self) -> Callable[[str], bytes]:
        return lru_cache(maxsize=_FIRST)(self._encode_beginning)

    def _encode_beginning(self, text: str) -> bytes:
        """Of a text's first word, with or without a blank before it."""
        if text[:1] == " ":
            return self._encode_word(text[1:])
        return self._encode_at_once(text) if text else b""

    def _encode_behind_blank(self, text: str) -> bytes:
        """Of a text with a blank before it, which is not in `text`."""
        # a run of blanks belongs to the word behind it
        words = (
            text.split(" ") if "  " not in text and text[:1] != " " else [w[1:] for w in _words(f" {text}")]
        )
        found = list(map(self._known.get, words))
        if None in found:
            found = [self._encode_word(word) for word in words]
        return b"".join(found)  # type: ignore[arg-type]

    def _encode_word(self, word: str) -> bytes:
        known = self._known
        tokens = known.get(word)
        if tokens is None:
            tokens = self._encode_at_once(_BLANK + word)
            if len(word) <= _MAX_WORD:
                if len(known) >= _MAX_WORDS:
                    known.clear()
                known[word] = tokens
        return tokens

    def __getstate__(self) -> dict[str, Any]:
        # every process loads its own processor, from bytes it already has
        made = ("_processor", "_encode", "_encode_rest", "_encode_first", "_known")
        return {name: value for name, value in vars(self).items() if name not in made}

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Tokens:
        """Tokenise a text.

        Args:
            text: the text.
            add_special_tokens: True (default): a text of its own, begun with the start token and a blank. False: one that continues another, with
                neither.
        """
        tokens = array(_INT32)
        tokens.frombytes(b"".join(self._stretches(text, begins=add_special_tokens)))
        return Tokens(tokens.tolist())

    def count(self, text: str) -> int:
        """How many tokens a text of its own has, at less cost than making them."""
        return sum(map(len, self._stretches(text, begins=True))) // _INT32_BYTES

    def _stretches(self, text: str, *, begins: bool) -> list[bytes]:
        """The tokens of each special token and of each stretch between."""
        stretches = [self._special_bytes[self._start]] if begins and self.add_bos else []
        blank = begins
        for number, stretch in enumerate(self._split(text)):
            if number % 2:
                stretches.append(self._special_bytes[stretch])
                blank = self.legacy
            elif stretch:
                stretches.append(self._encode(self._blank + stretch if blank else stretch))
        return stretches

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special and unknown ones, and without the blank put before it."""
        pieces = self._processor.get_piece_size()
        special = set(self._special.values())
        text: str = self._processor.decode([t for t in tokens if 0 <= t < pieces and t not in special])
        return text.removeprefix(" ")


def _words_are_apart(processor: Any) -> bool:
    """Whether words can be encoded one by one: no piece goes on behind the end of a word, and texts are not normalised."""
    pieces = [processor.id_to_piece(token) for token in range(processor.get_piece_size())]
    if any(_BLANK in piece.lstrip(_BLANK) for piece in pieces) or _BLANK not in pieces:
        return False
    # NFKC and its relatives change some of these, the removal of blanks the others
    odd = f"{_BLANK} a  \ufb01 \u212b \u2460 \uff71\u3000\t\n\u00bd \uff21 e\u0301  "
    normalized: str = processor.normalize(odd)
    return normalized == odd.replace(" ", _BLANK)
