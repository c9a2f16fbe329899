"""The conversation templates of haotian-liu/LLaVA and LLaVA-NeXT, each a small value.

System texts, roles and separators are those of llava/conversation.py; which function of llava/train/train.py makes the labels follows from the template
there, and is part of the value here.
"""

from dataclasses import dataclass, replace

from loaders.text.layouts import (
    IMAGE_TEXT,
    Caption,
    Dialogue,
    Headed,
    Instructions,
    Layout,
    Marked,
    Messages,
    Roles,
)
from loaders.text.masks import Masking, RoundMasking, TurnMasking
from loaders.text.turns import Placing, Selecting, alternating, any_turns, from_human, place_llava, place_next


@dataclass(frozen=True, slots=True)
class Template:
    """One prompt format.

    Attributes:
        name: as LLaVA's ``--version`` has it.
        system: the text before the first turn.
        roles: how the prompt names the human and the model.
        layout: turns to the segments that are the prompt.
        select: which turns are taken.
        place: where ``<image>`` is put in them.
        masking: the reference's way to find in the tokens what is not trained on; None where that are the segments.
        image_text: what stands for an image that was moved to the front of its turn.
        markers: what, inside a text, the tokenizer or the masking may take for a part of the prompt's structure.
        tokens: markers that must be one token each.
        always_trained: of which each token is trained on, wherever it stands. Single tokens.
        cuts_images: whether ``<image>`` is an image in records without one, too.
        is_chat: whether each segment is tokenised by itself, and the start token stands only where `begins`.
        begins: whether the tokenizer's start token stands before the prompt. (Of other templates the tokenizer decides.)
    """

    name: str
    system: str
    roles: Roles
    layout: Layout
    select: Selecting = alternating
    place: Placing = place_llava
    masking: Masking | None = None
    image_text: str = IMAGE_TEXT
    markers: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    always_trained: tuple[str, ...] = ()
    cuts_images: bool = False
    is_chat: bool = False
    begins: bool = True


_HELPFUL = "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_CHAT = "A chat between a curious {0} and an artificial intelligence assistant. "
_OF_USER = (_CHAT + _HELPFUL).format("user")
_OF_HUMAN = (_CHAT + _HELPFUL).format("human")
_TAGGED = _CHAT.format("user") + (
    "The assistant is able to understand the visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_VISUAL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_META = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_LLAMA_TOKENS = ("</s>", "<s>", "<unk>")
_IMAGE_TAG = f"<Image>{IMAGE_TEXT}</Image>"

_PLAIN = Template(
    name="plain",
    system="",
    roles=("", ""),
    layout=Caption(end="\n"),
    select=any_turns,
    markers=_LLAMA_TOKENS,
    cuts_images=True,
)

_V1 = Template(
    name="v1",
    system=_OF_USER,
    roles=("USER", "ASSISTANT"),
    layout=Dialogue(after_question=" ", after_answer="</s>"),
    masking=RoundMasking(round_end="</s>", answer_start=" ASSISTANT: ", overlap=2, later_unless_legacy=-1),
    markers=(*_LLAMA_TOKENS, " ASSISTANT: "),
)
_LLAVA_V1 = replace(_V1, name="llava_v1", system=_OF_HUMAN)
_V1_MMTAG = replace(_V1, name="v1_mmtag", system=_TAGGED, image_text=_IMAGE_TAG)

_LLAVA_V0 = Template(
    name="llava_v0",
    system=_OF_HUMAN,
    roles=("Human", "Assistant"),
    layout=Headed(signal="###"),
    select=any_turns,
    masking=TurnMasking(kept=2),
    markers=_LLAMA_TOKENS,
)
_V0_MMTAG = replace(_LLAVA_V0, name="v0_mmtag", system=_TAGGED, image_text=_IMAGE_TAG)

_LLAMA_2 = Template(
    name="llama_2",
    system=_META,
    roles=("USER", "ASSISTANT"),
    layout=Instructions(start="<s>", end="</s>"),
    masking=RoundMasking(round_end="</s>", answer_start="[/INST] ", overlap=2),
    markers=(*_LLAMA_TOKENS, "[/INST] "),
)
_LLAVA_LLAMA_2 = replace(_LLAMA_2, name="llava_llama_2", system=_VISUAL)
_MISTRAL_INSTRUCT = replace(
    _LLAMA_2, name="mistral_instruct", system="", layout=Instructions(start="", end="</s>")
)

_MPT = Template(
    name="mpt",
    system=(
        "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers."
    ),
    roles=("<|im_start|>user\n", "<|im_start|>assistant\n"),
    layout=Marked(end="<|im_end|>"),
    masking=RoundMasking(
        round_end="<|im_end|>",
        answer_start="<|im_end|><|im_start|>assistant\n",
        first=0,
        overlap=1,
        later_if_legacy=1,
        first_parts=3,
        parts=2,
    ),
    markers=("<|im_end|>", "<|im_start|>", "<|endoftext|>", *_LLAMA_TOKENS),
)
_CHATML_DIRECT = replace(_MPT, name="chatml_direct", system="<|im_start|>system\nAnswer the questions.")

_QWEN_1_5 = Template(
    name="qwen_1_5",
    system="You are a helpful assistant.",
    roles=("user", "assistant"),
    layout=Messages(open="<|im_start|>", close="\n", end="<|im_end|>\n"),
    select=from_human,
    place=place_next,
    markers=("<|im_end|>", "<|im_start|>", "<|endoftext|>"),
    tokens=("<|im_start|>", "<|im_end|>"),
    # LLaVA-NeXT has the number 198 here, a newline in the vocabularies that keep GPT-2's order of bytes, as all of Qwen do
    always_trained=("<|im_start|>", "<|im_end|>", "\n"),
    is_chat=True,
    begins=False,
)
_QWEN_2 = replace(_QWEN_1_5, name="qwen_2")

_LLAVA_LLAMA_3 = Template(
    name="llava_llama_3",
    system=_VISUAL,
    roles=("user", "assistant"),
    layout=Messages(open="<|start_header_id|>", close="<|end_header_id|>\n\n", end="<|eot_id|>", strip=True),
    select=from_human,
    place=place_next,
    markers=(
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|begin_of_text|>",
        "<|end_of_text|>",
    ),
    tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    # LLaVA-NeXT lists "\n\n" too, but looks it up in the vocabulary, where Llama 3 has it as "ĊĊ": it is not found
    always_trained=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    is_chat=True,
)

_ALIASES = {
    "v0_plain": _PLAIN,
    "vicuna_v1": _V1,
    "llava_v1_mmtag": _V1_MMTAG,
    "llava_v0_mmtag": _V0_MMTAG,
    "llava_mistral_instruct": _MISTRAL_INSTRUCT,
    "mistral_direct": _CHATML_DIRECT,
}

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        _PLAIN,
        _V1,
        _LLAVA_V1,
        _V1_MMTAG,
        _LLAVA_V0,
        _V0_MMTAG,
        _LLAMA_2,
        _LLAVA_LLAMA_2,
        _MISTRAL_INSTRUCT,
        _MPT,
        _CHATML_DIRECT,
        _LLAVA_LLAMA_3,
        _QWEN_1_5,
        _QWEN_2,
    )
} | _ALIASES
"""All templates by name, and by the other names that LLaVA and LLaVA-NeXT have for them."""
