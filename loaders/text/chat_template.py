"""Chat templates: messages to a prompt, and which stretches of it the model's turns are."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any, TypeAlias

from shardify.errors import TextError, UsageError

Message: TypeAlias = dict[str, Any]
"""``{"role": ..., "content": ...}``: content is a text, or a list of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``."""

_generation = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUESTION, _ANSWER = "zqv7", "zwx8"  # texts that no template writes
_CONVERSATION = (("user", _QUESTION), ("assistant", _ANSWER)) * 2


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as one text.

    Attributes:
        text: all of it.
        answers: begin and end of each stretch that the model is to write, in characters, ascending.
    """

    text: str
    answers: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template as transformers applies it.

    Attributes:
        source: the template.
        variables: that it may use besides the messages: the texts of the special tokens.
        marks_answers: whether it says what the model writes: ``{% generation %}``.
    """

    source: str
    variables: Mapping[str, Any]
    marks_answers: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "marks_answers", _generation.search(self.source) is not None)

    def apply(self, messages: Sequence[Message]) -> Prompt:
        r"""The prompt.

        What the model is to write is what stands in ``{% generation %}`` blocks. Where a template has none, it is what each of its turns adds to the
        prompt for it:

            render(messages[:i], add_generation_prompt=True)   ...<|im_start|>assistant\n
            render(messages[:i + 1])                           ...<|im_start|>assistant\nA bus.<|im_end|>\n
                                                                                         -------------------

        Raises:
            TextError: ``template-refused``; or ``turns-change``, where a turn reads otherwise once others follow.
        """
        if self.marks_answers:
            return self._render(messages, marked=True)
        prompt = self._render(messages)
        text = prompt.text
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], asks=True).text
            if not text.startswith(before):  # it may open a thought, of which this answer has none
                plain = self._render(messages[:number]).text
                before = max(plain, commonprefix([before, text]), key=len)  # noqa: RUF071 - of texts, no paths
            last = number + 1 == len(messages)
            after = text if last else self._render(messages[: number + 1]).text
            if not (text.startswith(after) and after.startswith(before)):
                raise TextError(
                    "turns-change", f"the template writes message {number} otherwise once others follow"
                )
            prompt.answers.append((len(before), len(after)))
        return prompt

    def check(self, *, as_parts: bool) -> None:
        """Try it on a conversation, whose contents are lists of parts or texts.

        Raises:
            UsageError: it cannot be used.
        """
        lacks = (
            "; it takes parts, but does not write the image token once for an image: give image_token= what it writes"
            if not as_parts and self.takes_parts()
            else ""
        )
        try:
            prompt = self.apply(
                [{"role": role, "content": _content(text, as_parts)} for role, text in _CONVERSATION]
            )
        except TextError as error:
            if error.code == "turns-change":
                raise UsageError(
                    "this chat template writes earlier turns otherwise once others follow, so what the model is to write cannot be told; give "
                    "chat_template= one with {% generation %} around the answers"
                ) from None
            raise UsageError(
                f"this chat template takes no conversation of user and assistant: {error.detail}{lacks}"
            ) from None
        if _QUESTION not in prompt.text or _ANSWER not in prompt.text:
            raise UsageError(f"this chat template leaves out what messages say{lacks}")

    def takes_parts(self, image_token: str | None = None) -> bool:
        """Whether content may be a list of parts; with an image token, whether an image among them becomes this token once."""
        parts: list[Message] = [] if image_token is None else [{"type": "image"}]
        parts.append({"type": "text", "text": _QUESTION})
        answer = {"role": "assistant", "content": _content(_ANSWER, parts=True)}
        try:
            text = self._render([{"role": "user", "content": parts}, answer]).text
        except TextError:
            return False
        wanted = 0 if image_token is None else 1
        found = text.count(image_token) if image_token else 0
        # a template for plain texts writes the list as Python does
        return text.count(_QUESTION) == 1 and found == wanted and not re.search("['\"]type['\"]", text)

    def _render(self, messages: Sequence[Message], *, asks: bool = False, marked: bool = False) -> Prompt:
        """As `apply_chat_template` of transformers does; `asks` for the beginning of an answer."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its annotation says less than it returns
        try:
            texts, answers = render(
                conversations=[list(messages)],
                chat_template=self.source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=asks,
                **self.variables,
            )
        except ImportError as error:
            raise UsageError(f"chat templates need jinja2: pip install 'shardify[train]' ({error})") from None
        except Exception as error:  # noqa: BLE001 - a template is a program: it refuses by its own errors, or fails by any
            raise TextError("template-refused", f"{type(error).__name__}: {error}") from None
        return Prompt(texts[0], list(answers[0]) if marked else [])


def _content(text: str, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text
