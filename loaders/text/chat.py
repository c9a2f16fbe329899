"""LLaVA records to tokens and labels by any chat template, and with images, as the processors of transformers do it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from loaders.arguments import integer
from loaders.image import ImageTransform
from loaders.text.chat_template import ChatTemplate
from loaders.text.expansions import Expansion, Fixed, Size, expansion_of
from loaders.text.layouts import IMAGE_TEXT
from loaders.text.llava import TextResult
from loaders.text.masks import IGNORE_INDEX
from loaders.text.messages import messages_of
from shardify.errors import TextError, UsageError
from shardify.records import Sample, parse_record, sample_of

_VERSION = 1  # of the tokens that a record gives; part of the fingerprint
_MOST_EXPANDED = 1024  # texts of images that are kept with their tokens


class ChatText:
    """Makes a record's conversation a prompt by a chat template, its tokens, and labels on what the model is to write.

    The tokens are those of the processor's ``apply_chat_template(messages, tokenize=True)``, of a tokenizer's where one is given; docs/text.md
    says how a record becomes messages. The model is trained on what the template marks with ``{% generation %}`` (`return_assistant_tokens_mask`);
    where it marks nothing, on what each of the model's turns adds to the prompt that asks for it, its end token included. An image becomes as many
    tokens as the processor gives it; none of them is trained on.

    Nothing of the processor is kept but its tokenizer and template, so this may be pickled, and used after a fork.

    Args:
        processor: of transformers: LLaVA's, LLaVA-NeXT's, LLaVA-OneVision's, Qwen2-VL's (2.5, 3), Idefics3's or SmolVLM's; any other with
            `image_tokens`; or a fast tokenizer, which needs it for images, too.
        max_length: tokens that are kept, those of images included. Default 2048. A record of which images would be cut off is refused.
        image_tokens: tokens that each image becomes, whatever its size; None (default) for what the processor does.
        image: the loader's image transform, where it is another than `ImageTransform.from_processor(processor)` (fewer pixels, say): the text is to
            have as many image tokens as the model makes of the pictures.
        image_token: the token's text; None (default) for the processor's or the tokenizer's.
        chat_template: a template (Jinja) instead of theirs.
        strict: True refuses a record about which there is a note: TextError with the first note's code. Default False.

    Attributes:
        needs_image_sizes: whether the tokens depend on the sizes of images.
        image_token_id: what stands for images among the tokens; None where there are none.
        pad_token_id: fills batches up.

    Raises:
        UsageError: no chat template, one that cannot be used, a slow tokenizer, no such image token, or a processor that is not known.
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        processor: Any,
        max_length: int = 2048,
        image_tokens: int | None = None,
        *,
        image: ImageTransform | None = None,
        image_token: str | None = None,
        chat_template: str | None = None,
        strict: bool = False,
    ) -> None:
        tokenizer = getattr(processor, "tokenizer", None)
        self._is_processor = tokenizer is not None
        tokenizer = processor if tokenizer is None else tokenizer
        if not getattr(tokenizer, "is_fast", False) or not hasattr(tokenizer, "backend_tokenizer"):
            raise UsageError(
                f"{type(tokenizer).__name__} is no fast tokenizer of transformers, nor has it one: which token comes from where in the text "
                "cannot be told"
            )
        self.max_length = integer("max_length", max_length, least=1)
        self.strict = strict
        self._backend = _backend(tokenizer)
        self.bos_token: str | None = tokenizer.bos_token
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id: int = next(token for token in candidates if token is not None)
        self.template = ChatTemplate(
            chat_template or _template_of(processor) or _template_of(tokenizer) or "",
            dict(tokenizer.special_tokens_map),
        )
        if not self.template.source:
            raise UsageError(
                f"{type(processor).__name__} has no chat template; give chat_template= that of the model"
            )
        self.image_token = image_token or _image_token(processor) or _image_token(tokenizer)
        self._expansion = self._choose_expansion(processor, image_tokens, image)
        if self._expansion is None:
            self.image_token = None  # a record with images is refused
        self.image_token_id = self._image_token_id()
        self._as_parts = self.template.takes_parts(self.image_token)
        self.template.check(as_parts=self._as_parts)
        self._markers = _markers(tokenizer, self.image_token)
        self._expanded: dict[str, list[int]] = {}

    @property
    def needs_image_sizes(self) -> bool:
        """Whether the tokens depend on the sizes of a sample's images."""
        return self._expansion is not None and self._expansion.needs_sizes

    @property
    def fingerprint(self) -> str:
        """Changes with the tokens that records give (32 hexadecimal digits); counts of them may be kept under it."""
        image = getattr(self._expansion, "image", None)
        parts = [
            _VERSION,
            self._backend.to_str(),
            [self._is_processor, self.template.source, sorted(self.template.variables.items())],
            [repr(self._expansion), None if image is None else image.fingerprint],
            [self.image_token, self.max_length],
            *(["strict"] if self.strict else []),  # what is refused has no tokens to count
        ]
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(parts))

    def __call__(
        self, record: bytes | memoryview | Mapping[str, Any], *, image_sizes: Sequence[Size] | None = None
    ) -> TextResult:
        """The tokens and labels of one record.

        Args:
            record: its JSON bytes, or the decoded object.
            image_sizes: height and width of each of its images as stored, in pixels; needed if `needs_image_sizes`.

        Returns:
            `input_ids` with `image_token_id` for images; the `notes` are those of `TextResult`.

        Raises:
            TextError: with the reason: ``unknown-role``, ``no-user-turn``, ``template-refused``, ``turns-change``, ``text-not-unicode``,
                ``images-not-understood``, ``images-not-as-recorded`` (other than `image_sizes`), ``image-tokens-exceed-images``,
                ``image-tokens-missing`` (fewer than images, but some), ``image-token-in-text`` (one that would be taken for an image),
                ``image-tokens-cut-off``, or with `strict` a note's code.
            ImageError: an image that the image transform refuses for its size.
            RecordError: not a record.
            UsageError: `image_sizes` are needed.
        """
        sample = sample_of(record) if isinstance(record, Mapping) else parse_record(record)
        notes: list[str] = []
        texts = self._image_texts(sample, image_sizes)
        self._note_markers(sample, notes)
        messages = messages_of(sample, notes, as_parts=self._as_parts, image_token=self.image_token)
        prompt = self.template.apply(messages)
        tokens, supervised = self._tokenize(prompt.text, prompt.answers)
        input_ids, labels = self._with_images(tokens, supervised, texts, notes)
        if len(input_ids) > self.max_length:
            notes.append("text-truncated")
            if self.image_token_id in input_ids[self.max_length :]:
                raise TextError(
                    "image-tokens-cut-off", f"{len(input_ids)} tokens; max_length is {self.max_length}"
                )
            input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        if labels.count(IGNORE_INDEX) == len(labels):
            notes.append("nothing-supervised")
        if self.strict and notes:
            raise TextError(notes[0], f"refused, as strict=True; the notes are {', '.join(notes)}")
        return TextResult(input_ids, labels, tuple(dict.fromkeys(notes)), len(sample.images))

    def _tokenize(
        self, text: str, answers: Sequence[tuple[int, int]]
    ) -> tuple[list[int], npt.NDArray[np.bool_]]:
        """Tokens of a prompt in which each image is one token, and bool [tokens]: which of them the model is to write."""
        starts_itself = self.bos_token is not None and text.startswith(self.bos_token)
        try:
            encoded = self._backend.encode(text, add_special_tokens=self._is_processor and not starts_itself)
        except (UnicodeEncodeError, TypeError) as error:  # a lone surrogate
            raise TextError("text-not-unicode", str(error)) from None
        tokens: list[int] = encoded.ids
        supervised = np.zeros(len(tokens), np.bool_)
        begins, ends = np.array(encoded.offsets, np.int64).reshape(-1, 2).T
        for begin, end in answers:
            if self.template.marks_answers:  # as transformers: whatever has a part in it
                touched = np.flatnonzero((begins < end) & (ends > begin) & (ends > begins))
                if len(touched):
                    supervised[touched[0] : touched[-1] + 1] = True
            else:  # whatever ends in it: the blank behind an answer belongs to the next word
                supervised |= (ends > begin) & (ends <= end)
        return tokens, supervised

    def _with_images(
        self,
        tokens: list[int],
        supervised: npt.NDArray[np.bool_],
        texts: Sequence[str],
        notes: list[str],
    ) -> tuple[list[int], list[int]]:
        """Tokens and labels, with each image's own tokens in the place of its one.

        They are those of the whole text: special tokens, which begin and end them, part it for the tokenizer.
        """
        labels = np.where(supervised, tokens, IGNORE_INDEX).tolist()
        places = [place for place, token in enumerate(tokens) if token == self.image_token_id]
        if len(places) != len(texts):
            raise TextError(
                "template-refused", f"{len(places)} images in what it wrote, of {len(texts)} in the messages"
            )
        if not places:
            return tokens, labels
        all_tokens: list[int] = []
        all_labels: list[int] = []
        done = 0
        for place, text in zip(places, texts, strict=True):
            if supervised[place]:
                notes.append("image-in-answer")
            image = self._image_tokens(text)
            all_tokens += tokens[done:place] + image
            all_labels += labels[done:place] + [IGNORE_INDEX] * len(image)
            done = place + 1
        return all_tokens + tokens[done:], all_labels + labels[done:]

    def _image_texts(self, sample: Sample, sizes: Sequence[Size] | None) -> list[str]:
        images = len(sample.images)
        if sizes is not None and len(sizes) != images:
            raise TextError("images-not-as-recorded", f"{len(sizes)} images, and the record names {images}")
        if self._expansion is None or not images:
            return []
        if sizes is None:
            if self._expansion.needs_sizes:
                raise UsageError(
                    "with this processor the tokens of an image depend on its size; pass image_sizes="
                )
            sizes = [(0, 0)] * images
        return self._expansion(sizes)

    def _image_tokens(self, text: str) -> list[int]:
        assert self.image_token is not None
        assert self.image_token_id is not None
        count = text.count(self.image_token)
        if len(text) == count * len(self.image_token):
            return [self.image_token_id] * count
        tokens = self._expanded.get(text)
        if tokens is None:
            if len(self._expanded) >= _MOST_EXPANDED:
                self._expanded.clear()
            tokens = self._expanded[text] = self._backend.encode(text, add_special_tokens=False).ids
        return tokens

    def _choose_expansion(
        self, processor: Any, image_tokens: int | None, image: ImageTransform | None
    ) -> Expansion | None:
        if image_tokens is not None:
            if self.image_token is None:
                raise UsageError("image_tokens= needs an image token: give image_token=")
            return Fixed(self.image_token, integer("image_tokens", image_tokens, least=1))
        if not hasattr(processor, "image_processor"):
            return None
        if self.image_token is None:
            raise UsageError(f"{type(processor).__name__} has no image token: give image_token=")
        return expansion_of(processor, self.image_token, image)

    def _image_token_id(self) -> int | None:
        if self.image_token is None:
            return None
        found: list[int] = self._backend.encode(self.image_token * 2, add_special_tokens=False).ids
        if len(found) != 2 or found[0] != found[1]:
            raise UsageError(f"{self.image_token!r} is no token of its own in this tokenizer: add it to it")
        return found[0]

    def _note_markers(self, sample: Sample, notes: list[str]) -> None:
        if any(marker in turn.text for turn in sample.turns for marker in self._markers):
            notes.append("marker-in-text")


def _backend(tokenizer: Any) -> Any:
    """The tokenizer's own of the tokenizers library, without truncation and padding."""
    from tokenizers import Tokenizer

    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(settings | {"padding": None, "truncation": None}))


def _template_of(owner: Any) -> str | None:
    template = getattr(owner, "chat_template", None)
    if isinstance(template, Mapping):
        if "default" not in template:
            raise UsageError(
                f"{type(owner).__name__} has the chat templates {', '.join(template)}, and none is named 'default': give one as chat_template="
            )
        template = template["default"]
    return template or None


def _image_token(owner: Any) -> str | None:
    token = getattr(owner, "image_token", None)
    return token if isinstance(token, str) else getattr(token, "content", None)


def _markers(tokenizer: Any, image_token: str | None) -> tuple[str, ...]:
    """What of a text would be read as structure: the special tokens."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(token for token in special if token not in (image_token, IMAGE_TEXT))
