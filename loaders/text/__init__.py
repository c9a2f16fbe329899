"""Conversations to tokens and labels."""

from loaders.text.chat import ChatText
from loaders.text.json_tokenizer import JsonTokenizer
from loaders.text.layouts import IMAGE_TEXT
from loaders.text.llava import IMAGE_TOKEN, LlavaText, TextResult
from loaders.text.masks import IGNORE_INDEX
from loaders.text.sentencepieces import SentencePieceTokenizer
from loaders.text.templates import TEMPLATES
from loaders.text.tokenizers import ByteTokenizer, Tokenizer, make_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TEXT",
    "IMAGE_TOKEN",
    "TEMPLATES",
    "ByteTokenizer",
    "ChatText",
    "JsonTokenizer",
    "LlavaText",
    "SentencePieceTokenizer",
    "TextResult",
    "Tokenizer",
    "make_tokenizer",
]
