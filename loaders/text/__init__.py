"""Conversations to tokens and labels."""

from loaders.text.llava import IMAGE_TOKEN, LlavaText, TextResult
from loaders.text.masks import IGNORE_INDEX
from loaders.text.templates import TEMPLATES
from loaders.text.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizer

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN",
    "TEMPLATES",
    "ByteTokenizer",
    "LlavaText",
    "SentencePieceTokenizer",
    "TextResult",
    "Tokenizer",
]
