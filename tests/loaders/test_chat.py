"""`ChatText` against transformers' own processors, which are made here without any file: tokens, masks, and labels turn by turn."""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from loaders import ImageTransform, StreamingLoader
from loaders.dataset import open_dataset
from loaders.lengths import token_lengths
from loaders.text import IGNORE_INDEX, ChatText
from shardify.errors import ImageError, TextError, UsageError
from tests.loaders.conftest import Made, png, write_data_set
from tests.loaders.tars import write_tars

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

# Chat templates of four kinds. LLaVA's says what is an answer; in the others it is what each turn adds.

LLAVA = (
    "{% for m in messages %}{{ m.role.upper() }}: "
    "{% for part in m.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ part.text + eos_token }}{% endgeneration %}"
    "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}"
    "{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN = (  # contents are texts, of two roles that must alternate
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
)
WORDS = ["a", "bus", "cat", "what", "colour", "is", "the", "USER", "ASSISTANT", "picture", "it", "hello"]


def byte_tokenizer(*special: str) -> Any:
    """Byte-level BPE, as Qwen's and GPT's."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>", *special], initial_alphabet=alphabet
    )
    model.train_from_iterator([" ".join(WORDS), "\n\n\n"] * 20, trainer)
    return _fast(model)


def llama_tokenizer(*special: str) -> Any:
    """BPE over blanks made visible, with a start token before every text, as Llama's."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Metaspace(prepend_scheme="first"), tokenizers.decoders.ByteFallback()]
    )
    named = ["<unk>", "<s>", "</s>", "<pad>", *special]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*named, *(f"<0x{byte:02X}>" for byte in range(256))]
    )
    model.train_from_iterator([" ".join(WORDS), ": . ? ! ,"] * 20, trainer)
    start = model.token_to_id("<s>")
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    return _fast(model)


def _fast(model: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )


class WithoutVideos:
    """Of a processor that also takes videos, which needs torchvision, what texts and images need."""

    def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
        return None if name == "video_processor" else super().check_argument_for_proper_class(name, value)


def _without_videos(name: str) -> type:
    return type(name, (WithoutVideos, getattr(transformers, name)), {})


def llava() -> Any:
    size = {"shortest_edge": 42}, {"height": 42, "width": 42}
    images = transformers.CLIPImageProcessorPil(size=size[0], crop_size=size[1])
    return transformers.LlavaProcessor(
        images,
        llama_tokenizer("<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )


def llava_next() -> Any:
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
    )
    return transformers.LlavaNextProcessor(
        images,
        llama_tokenizer("<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )


def llava_onevision() -> Any:
    pinpoints = [[rows * 28, columns * 28] for rows in range(1, 5) for columns in range(1, 5)]
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    return _without_videos("LlavaOnevisionProcessor")(
        images,
        byte_tokenizer("<image>", "<video>", "<|im_start|>", "<|im_end|>"),
        video_processor=None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>"),
    )


def qwen2_vl() -> Any:
    images = transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 16}
    )
    special = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
    return _without_videos("Qwen2VLProcessor")(
        images,
        byte_tokenizer("<|image_pad|>", "<|video_pad|>", *special),
        video_processor=None,
        chat_template=CHATML,
    )


def _idefics_tokenizer() -> Any:
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    named = "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"
    return byte_tokenizer(*named, *rows)


def idefics3() -> Any:
    images = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 28}
    )
    return transformers.Idefics3Processor(
        images, _idefics_tokenizer(), image_seq_len=4, chat_template=IDEFICS
    )


def smolvlm() -> Any:
    images = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 84}, max_image_size={"longest_edge": 28}
    )
    kind = _without_videos("SmolVLMProcessor")
    # its own apply_chat_template asks the video processor for settings
    kind.apply_chat_template = transformers.ProcessorMixin.apply_chat_template
    return kind(images, _idefics_tokenizer(), video_processor=None, image_seq_len=4, chat_template=IDEFICS)


FAMILIES: dict[str, Callable[[], Any]] = {
    "LLaVA": llava,
    "LLaVA-NeXT": llava_next,
    "LLaVA-OneVision": llava_onevision,
    "Qwen2-VL": qwen2_vl,
    "Idefics3": idefics3,
    "SmolVLM": smolvlm,
}


@pytest.fixture(scope="module", autouse=True)
def processors_can_be_made():
    """SmolVLM's asks for a package that only videos need."""
    from transformers.models.smolvlm import processing_smolvlm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", str)  # for videos
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def processor(request, processors_can_be_made) -> Any:
    return FAMILIES[request.param]()


def record(*texts: str, image: str | list[str] | None = None, system: str | None = None) -> dict:
    """A record whose turns are `texts`, the human's first."""
    roles = itertools.cycle(("human", "gpt"))
    turns = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=False)]
    if system is not None:
        turns.insert(0, {"from": "system", "value": system})
    return {"id": "1", "conversations": turns} | ({} if image is None else {"image": image})


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), 128, np.uint8))


def messages(images: list[Image.Image], *contents: list[str], system: str | None = None) -> list[dict]:
    """Messages as transformers takes them, written by hand: ``<image>`` alone is the next image."""
    own = iter(images)
    made = [] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}]
    for role, content in zip(itertools.cycle(("user", "assistant")), contents, strict=False):
        parts = [
            {"type": "image", "image": next(own)} if text == "<image>" else {"type": "text", "text": text}
            for text in content
        ]
        made.append({"role": role, "content": parts})
    return made


# name: the record's texts, system message, sizes of the images, the same as messages
CASES: dict[str, tuple[list[str], str | None, list[tuple[int, int]], list[list[str]]]] = {
    "one image": (
        ["<image>\nWhat is it?", "A bus."],
        None,
        [(40, 60)],
        [["<image>", "What is it?"], ["A bus."]],
    ),
    "image last": (
        ["What is it?\n<image>", "A bus."],
        None,
        [(100, 30)],
        [["What is it?", "<image>"], ["A bus."]],
    ),
    "several turns": (
        ["<image>\nhello", "A cat.", "the colour?\nSay it.", "blue", "is it?", "it is  "],
        None,
        [(57, 200)],
        [
            ["<image>", "hello"],
            ["A cat."],
            ["the colour?\nSay it."],
            ["blue"],
            ["is it?"],
            ["it is  "],
        ],
    ),
    "several images": (
        ["<image>\n<image>\nIs <image> the cat?", "No.", "And\n <image>?", "Yes,\nit is."],
        None,
        [(30, 30), (90, 91), (20, 150), (84, 28)],
        [
            ["<image>", "<image>", "Is ", "<image>", " the cat?"],
            ["No."],
            ["And", "<image>", "?"],
            ["Yes,\nit is."],
        ],
    ),
    "system": (
        ["<image>What is it?", "A bus."],
        "You are short.",
        [(33, 34)],
        [["<image>", "What is it?"], ["A bus."]],
    ),
    "text-only": (
        ["hello", "Hi 日本 é!\n\n  code", "what"],
        None,
        [],
        [["hello"], ["Hi 日本 é!\n\n  code"], ["what"]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_processor(processor, case):
    texts, system, sizes, contents = CASES[case]
    images = [picture(*size) for size in sizes]
    text = ChatText(processor, max_length=100_000)
    paths = [f"{number}.png" for number in range(len(images))] or None

    result = text(record(*texts, image=paths, system=system), image_sizes=sizes)

    theirs = processor.apply_chat_template(
        messages(images, *contents, system=system), tokenize=True, return_dict=True
    )
    assert result.input_ids == list(theirs["input_ids"][0])
    assert list(theirs["attention_mask"][0]) == [1] * len(result.input_ids)
    assert result.input_ids.count(text.image_token_id) == result.input_ids.count(processor.image_token_id)


@pytest.mark.parametrize("case", CASES)
def test_labels_turn_by_turn(processor, case):
    texts, system, sizes, contents = CASES[case]
    text = ChatText(processor, max_length=100_000)
    paths = [f"{number}.png" for number in range(len(sizes))] or None

    result = text(record(*texts, image=paths, system=system), image_sizes=sizes)

    assert all(label in (IGNORE_INDEX, token) for token, label in zip(*_both(result), strict=True))
    assert text.image_token_id not in result.labels
    begin, end = {
        LLAVA: ("", "</s>"),
        IDEFICS: (" ", "<end_of_utterance>\n"),
    }.get(processor.chat_template, ("", "<|im_end|>\n"))
    wanted = [begin + content[0] + end for content in contents[1::2]]
    assert _answers(processor.tokenizer, result) == wanted
    if text.template.marks_answers:
        images = [picture(*size) for size in sizes]
        theirs = processor.apply_chat_template(
            messages(images, *contents, system=system),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert [label != IGNORE_INDEX for label in result.labels] == list(
            map(bool, theirs["assistant_masks"][0])
        )


def _both(result: Any) -> tuple[list[int], list[int]]:
    return result.input_ids, result.labels


def _answers(tokenizer: Any, result: Any) -> list[str]:
    """The texts that are trained on, stretch by stretch."""
    groups = itertools.groupby(result.labels, lambda label: label != IGNORE_INDEX)
    # behind another text, of which the decoder takes the first blank away
    anchor = tokenizer.encode("it", add_special_tokens=False)
    before = tokenizer.decode(anchor)
    return [tokenizer.decode(anchor + list(run)).removeprefix(before) for trained, run in groups if trained]


PIECES = st.sampled_from(["<image>", "\n", " ", "a bus", "USER:", "é", "?", "<", "image>", "  "])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    pieces=st.lists(PIECES, max_size=10),
    sizes=st.lists(st.tuples(*[st.integers(3, 150)] * 2), min_size=10, max_size=10),
)
def test_images_among_any_text(processor, pieces, sizes):
    """Putting an image's tokens in place of one is what tokenising the whole text gives."""
    question = "".join(pieces)
    sizes = sizes[: question.count("<image>")]
    images = [picture(*size) for size in sizes]
    text = ChatText(processor, max_length=100_000)
    paths = [f"{number}.png" for number in range(len(images))] or None

    result = (
        text(record(question, "It is."), image_sizes=[])
        if not images
        else text(record(question, "It is.", image=paths), image_sizes=sizes)
    )

    # the prompt of the same messages, by way of the processor's other call
    made = []
    for number, piece in enumerate(question.split("<image>")):
        made += ["<image>"] if number else []
        before, behind = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
        kept = piece.lstrip() if images and number and "\n" in before else piece
        kept = kept.rstrip() if number < len(images) and "\n" in behind else kept
        made += [kept] if kept.strip() or not images else []
    prompt = processor.apply_chat_template(messages(images, made, ["It is."]))
    adds = not prompt.startswith(processor.tokenizer.bos_token)
    theirs = processor(text=[prompt], images=[images] if images else None, add_special_tokens=adds)
    assert result.input_ids == list(theirs["input_ids"][0])


def test_the_loaders_images_have_as_many_features(processor):
    """Texts are made for the pixels that `ImageTransform` makes, also with settings of its own."""
    text = ChatText(processor)
    assert text.needs_image_sizes == (type(processor).__name__ != "LlavaProcessor")
    if type(processor).__name__ != "Qwen2VLProcessor":
        return
    fewer = ImageTransform(fit="native", min_pixels=28 * 28, max_pixels=28 * 28 * 6)
    result = ChatText(processor, image=fewer)(record("<image>", "yes", image="a"), image_sizes=[(300, 200)])
    pixels = fewer(np.zeros((300, 200, 3), np.uint8))
    assert 1 < result.input_ids.count(text.image_token_id) == pixels.shape[1] * pixels.shape[2] // 28**2
    with pytest.raises(UsageError, match='fit="native"'):
        ChatText(processor, image=ImageTransform(336))


# tokenizers alone


def plain(**options: Any) -> ChatText:
    tokenizer = llama_tokenizer("<image>", "[INST]", "[/INST]")
    tokenizer.chat_template = PLAIN
    return ChatText(tokenizer, **options)


def test_a_tokenizer_whose_template_takes_texts():
    tokenizer = llama_tokenizer("<image>", "[INST]", "[/INST]")
    tokenizer.chat_template = PLAIN
    text = ChatText(tokenizer, image_tokens=3, image_token="<image>")

    result = text(record("<image>\nWhat?", "A bus.", "is it", "yes", image="a.png"))

    theirs = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "<image><image><image>\nWhat?"},
            {"role": "assistant", "content": "A bus."},
            {"role": "user", "content": "is it"},
            {"role": "assistant", "content": "yes"},
        ]
    )["input_ids"]
    assert result.input_ids == theirs
    assert _answers(tokenizer, result) == [" A bus.</s>", " yes</s>"]
    assert not text.needs_image_sizes


def test_the_blank_behind_an_answer_belongs_to_the_next_word():
    template = (
        LLAVA.replace("{% generation %}", "").replace("{% endgeneration %}", "").replace("eos_token", "' '")
    )
    tokenizer = byte_tokenizer("<image>")
    text = ChatText(tokenizer, chat_template=template, image_tokens=1, image_token="<image>")
    result = text(record("hello", "A bus", "what", "A cat"))
    assert _answers(tokenizer, result) == ["A bus", "A cat "]


def test_an_answer_without_the_thought_that_its_prompt_opens():
    """As after ``<think>`` of DeepSeek-R1 and QwQ: the role before it is not the model's to write."""
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert template != CHATML
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>")
    text = ChatText(tokenizer, chat_template=template)
    assert _answers(tokenizer, text(record("hello", "A bus", "what", "<think>\nA</think>"))) == [
        "A bus<|im_end|>\n",
        "A</think><|im_end|>\n",
    ]


def test_where_a_template_marks_answers_a_token_with_a_part_in_one_is_trained_on():
    """As in transformers' own mask, which includes what Llama's blank joins to the next word."""
    tokenizer = byte_tokenizer("<image>")
    tokenizer.chat_template = LLAVA.replace("eos_token", "' '")
    conversation = [["hello"], ["A bus"], ["what"], ["A cat"]]
    theirs = tokenizer.apply_chat_template(
        messages([], *conversation), return_dict=True, return_assistant_tokens_mask=True
    )
    result = ChatText(tokenizer)(record("hello", "A bus", "what", "A cat"))
    assert result.input_ids == theirs["input_ids"]
    assert [label != IGNORE_INDEX for label in result.labels] == list(map(bool, theirs["assistant_masks"]))


# odd records


@pytest.fixture(scope="module")
def qwen(processors_can_be_made) -> Any:
    return qwen2_vl()


@pytest.mark.parametrize(
    ("texts", "image", "code"),
    [
        (["<image><image> hi", "yes"], "a.png", "image-tokens-exceed-images"),
        (["<image> hi", "yes"], ["a.png", "b.png"], "image-tokens-missing"),
        (["<|image_pad|> hi", "yes"], None, "image-token-in-text"),
        (["hi \ud800", "yes"], None, "text-not-unicode"),
    ],
    ids=["more", "fewer", "placeholder", "surrogate"],
)
def test_refused(qwen, texts, image, code):
    count = 0 if image is None else 1 if isinstance(image, str) else len(image)
    with pytest.raises(TextError) as caught:
        ChatText(qwen)(record(*texts, image=image), image_sizes=[(30, 30)] * count)
    assert caught.value.code == code


def test_an_image_token_where_the_record_has_no_image(qwen):
    """Refused where the model would look for the image, as by the processor; else it is a text."""
    assert ChatText(qwen)(record("say <image>", "yes")).notes == ("image-token-in-text",)
    with pytest.raises(TextError, match="image-token-in-text"):
        ChatText(llava())(record("say <image>", "yes"))


def test_images_that_no_text_mentions_stand_first(qwen):
    text = ChatText(qwen)
    placed = text(record("hi", "yes", image=["a", "b"], system="short"), image_sizes=[(30, 30)] * 2)
    named = text(
        record("<image>\n<image>\nhi", "yes", image=["a", "b"], system="short"), image_sizes=[(30, 30)] * 2
    )
    assert placed.input_ids == named.input_ids
    assert placed.notes == ("image-tokens-missing",)
    with pytest.raises(TextError, match="image-tokens-missing"):
        ChatText(qwen, strict=True)(record("hi", "yes", image="a"), image_sizes=[(30, 30)])


def test_notes(qwen):
    text = ChatText(qwen)
    ids = record("hi", "yes")
    ids["conversations"].insert(0, {"from": "gpt", "value": "first"})
    dropped = text(ids)
    assert dropped.notes == ("first-turn-dropped",)
    assert dropped.input_ids == text(record("hi", "yes")).input_ids
    assert text(record("hi", "yes", "and?")).notes == ("unanswered",)
    assert text(record("hi")).notes == ("unanswered", "nothing-supervised")
    assert text(record("hi", "")).notes == ("empty-turn",)
    assert text(record("hi", "<|im_end|> more")).notes == ("marker-in-text",)
    twice = record("hi", "yes")
    twice["conversations"].insert(0, {"from": "human", "value": "one"})
    assert text(twice).notes == ("roles-not-alternating",)
    image = text(record("draw", "this: <image>", image="a"), image_sizes=[(30, 30)])
    assert image.notes == ("image-in-answer",)
    assert text.image_token_id not in image.labels


@pytest.mark.parametrize(
    ("turns", "code"),
    [
        ([{"from": "robot", "value": "hi"}], "unknown-role"),
        ([{"from": "gpt", "value": "hi"}], "no-user-turn"),
        ([{"from": "human", "value": "a"}, {"from": "human", "value": "b"}], "template-refused"),
        ([{"from": "system", "value": "a"}, {"from": "human", "value": "b"}], "template-refused"),
    ],
    ids=["role", "nobody asks", "twice", "system"],
)
def test_conversations_that_cannot_be_taken(turns, code):
    with pytest.raises(TextError) as caught:
        plain()({"conversations": turns})
    assert caught.value.code == code


def test_records_whose_images_are_others_than_said(qwen):
    with pytest.raises(TextError, match="images-not-as-recorded"):
        ChatText(qwen)(record("<image>", "yes", image="a"), image_sizes=[])
    with pytest.raises(UsageError, match="image_sizes="):
        ChatText(qwen)(record("<image>", "yes", image="a"))
    with pytest.raises(ImageError, match="image-elongated"):
        ChatText(qwen)(record("<image>", "yes", image="a"), image_sizes=[(3, 3000)])
    with pytest.raises(TextError, match="images-not-understood"):
        plain()(record("<image>", "yes", image="a"))


def test_truncation(qwen):
    """From the end, but never through an image."""
    whole = ChatText(qwen)(record("<image>\nhi", "yes it is", image="a"), image_sizes=[(100, 100)])
    last = max(place for place, token in enumerate(whole.input_ids) if token == ChatText(qwen).image_token_id)
    cut = ChatText(qwen, max_length=last + 1)(
        record("<image>\nhi", "yes it is", image="a"), image_sizes=[(100, 100)]
    )
    assert (cut.input_ids, cut.labels) == (whole.input_ids[: last + 1], whole.labels[: last + 1])
    assert cut.notes == ("text-truncated", "nothing-supervised")
    with pytest.raises(TextError, match="image-tokens-cut-off"):
        ChatText(qwen, max_length=last)(
            record("<image>\nhi", "yes it is", image="a"), image_sizes=[(100, 100)]
        )


# what cannot be used


def test_what_cannot_be_used(qwen):
    tokenizer = byte_tokenizer("<image>", "<|im_start|>", "<|im_end|>")
    with pytest.raises(UsageError, match="no chat template"):
        ChatText(tokenizer)
    with pytest.raises(UsageError, match="no conversation"):
        ChatText(tokenizer, chat_template="{{ raise_exception('never') }}")
    with pytest.raises(UsageError, match="generation"):
        ChatText(
            tokenizer,
            chat_template="{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
        )
    with pytest.raises(UsageError, match="image_token= what it writes"):  # LLAVA writes <image>
        ChatText(tokenizer, chat_template=LLAVA, image_tokens=4, image_token="<|im_end|>")
    with pytest.raises(UsageError, match="leaves out"):
        ChatText(tokenizer, chat_template="{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(UsageError, match="no token of its own"):
        ChatText(tokenizer, chat_template=PLAIN, image_tokens=4, image_token="<nothing>")
    with pytest.raises(UsageError, match="image_token="):
        ChatText(tokenizer, chat_template=PLAIN, image_tokens=4)
    with pytest.raises(UsageError, match="no fast tokenizer"):
        ChatText("name")
    with pytest.raises(UsageError, match="max_length"):
        ChatText(qwen, max_length=0)

    class OtherProcessor:
        image_processor, chat_template, image_token = qwen.image_processor, CHATML, "<|image_pad|>"

        def __init__(self) -> None:
            self.tokenizer = qwen.tokenizer

    with pytest.raises(UsageError, match="OtherProcessor"):
        ChatText(OtherProcessor())
    assert (
        ChatText(OtherProcessor(), image_tokens=7)(record("<image>", "yes", image="a")).input_ids.count(
            qwen.image_token_id
        )
        == 7
    )
    without = llava()
    without.patch_size = None
    with pytest.raises(UsageError, match="patch_size"):
        ChatText(without)


def test_a_copy_and_its_fingerprint(processor):
    text = ChatText(processor)
    copy = pickle.loads(pickle.dumps(text))
    args = {"record": record("<image>\nhi", "yes", image="a"), "image_sizes": [(50, 90)]}
    assert copy(**args) == text(**args)
    assert copy.fingerprint == text.fingerprint == ChatText(processor).fingerprint
    others = [
        ChatText(processor, max_length=7),
        ChatText(processor, image_tokens=2),
        ChatText(processor, chat_template="\n" + processor.chat_template),
        ChatText(processor, strict=True),  # refuses what others count
    ]
    assert len({text.fingerprint, *(other.fingerprint for other in others)}) == 5


# in the loader


def test_in_the_loader(processor, tmp_path: Path):
    """Rows are the processor's of the same records, padded on the right, beside pictures of as many features."""
    sizes = [32, 60, 90, 45]
    samples = [
        Made(
            [png(number, side)],
            json.dumps(record("<image>\nWhat is it?", f"It is {number}.", image="a.png")).encode(),
        )
        for number, side in enumerate(sizes)
    ]
    folder = write_data_set(tmp_path / "data", samples, shards=1)
    transform = ImageTransform.from_processor(processor)
    loader = StreamingLoader(
        folder,
        batch_size=4,
        image=transform,
        text=ChatText(processor),
        shuffle=None,
        num_workers=1,
        rank=0,
        world_size=1,
    )
    (batch,) = list(loader)
    theirs = processor.apply_chat_template(
        [
            messages([picture(side, side)], ["<image>", "What is it?"], [f"It is {number}."])
            for number, side in enumerate(sizes)
        ],
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"},
    )
    assert batch.input_ids.tolist() == theirs["input_ids"].tolist()
    assert batch.attention_mask.long().tolist() == theirs["attention_mask"].tolist()
    ours = batch.to_hf()
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    if "mm_token_type_ids" in theirs:
        assert ours["mm_token_type_ids"].tolist() == theirs["mm_token_type_ids"].tolist()


def tiny_model(processor: Any) -> Any:
    """A model of the processor's family, of one layer and random weights."""
    count, image_token = len(processor.tokenizer), processor.image_token_id
    small = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
    language = {"vocab_size": count, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **small}
    sight = {**small, "num_hidden_layers": 2, "image_size": 28, "patch_size": 7}
    kind = type(processor).__name__.removesuffix("Processor")
    own: dict[str, Any] = {"image_token_id": image_token}
    if kind == "Llava":
        vision = transformers.CLIPVisionConfig(**sight | {"image_size": 42, "patch_size": 14})
    elif kind == "Qwen2VL":
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
        language |= {"rope_parameters": rope}
        for name in ("vision_start", "vision_end", "video"):
            token = "<|video_pad|>" if name == "video" else f"<|{name}|>"
            own[f"{name}_token_id"] = processor.tokenizer.convert_tokens_to_ids(token)
    elif kind in ("Idefics3", "SmolVLM"):
        # a tile of 4 x 4 patches, of which 2 x 2 become one
        vision = sight
        own |= {"scale_factor": 2, "pad_token_id": 2}
        assert processor.image_seq_len == 4
    else:
        tower = transformers.CLIPVisionConfig if kind == "LlavaNext" else transformers.SiglipVisionConfig
        vision = tower(**sight)
        own["image_grid_pinpoints"] = processor.image_processor.image_grid_pinpoints
        if kind == "LlavaOnevision":
            own["vision_aspect_ratio"] = "anyres_max_4"
    text = language if kind == "Qwen2VL" else transformers.LlamaConfig(**language)
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, **own)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def test_a_model_of_the_family_takes_batches(processor, tmp_path: Path):
    """With one image, none, and several: the model counts features and image tokens itself, and refuses other numbers."""
    sides = [(32,), (60,), (), (40, 70), (90,)]
    samples = [
        (
            [png(number, side) for side in own],
            json.dumps(
                record(
                    "<image>\n" * len(own) + "What?", f"It is {number}.", image=["a.png"] * len(own) or None
                )
            ).encode(),
        )
        for number, own in enumerate(sides)
    ]
    text = ChatText(processor)
    loader = StreamingLoader(
        str(write_tars(tmp_path / "data", samples, [])),
        batch_size=len(samples),
        image=ImageTransform.from_processor(processor),
        text=text,
        shuffle=None,
        num_workers=1,
        rank=0,
        world_size=1,
    )
    (batch,) = list(loader)
    assert batch.valid.all()
    assert 0 < tiny_model(processor)(**batch.to_hf()).loss.item() < 20


def test_counted_beforehand(qwen, tmp_path: Path, monkeypatch):
    """Sizes of images come from the sidecars then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = ChatText(qwen)
    sides = [(40,), (90,), (), (120, 60)]
    records = [
        record("<image>\n" * len(own) + "hi", "yes", image=["a.png"] * len(own) or None) for own in sides
    ]
    samples = [
        ([png(1, side) for side in own], json.dumps(made).encode())
        for own, made in zip(sides, records, strict=True)
    ]
    samples.append(([b"no image"], json.dumps(record("<image>\nhi", "yes", image="a.png")).encode()))
    folder = write_tars(tmp_path / "data", samples, [2])

    found, _ = token_lengths(open_dataset(str(folder)), text).measure(np.arange(5))

    wanted = [
        text(made, image_sizes=[(side, side) for side in own])
        for own, made in zip(sides, records, strict=True)
    ]
    assert found.tolist() == [*(len(result.input_ids) for result in wanted), 1]  # the last becomes a filler
