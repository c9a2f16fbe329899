"""Tokens and labels: against LLaVA's own outputs, against what the spans of a prompt must be, and for input of any oddness."""

import io
import json
import pickle
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.text import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    TEMPLATES,
    ByteTokenizer,
    JsonTokenizer,
    LlavaText,
    SentencePieceTokenizer,
)
from shardify.errors import RecordError, SampleError, TextError, UsageError

sentencepiece = pytest.importorskip("sentencepiece")

GOLDEN = Path(__file__).parents[1] / "golden"
CHAT = {
    "neox": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama_3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
}
SYSTEM = TEMPLATES["v1"].system
WORDS = [
    "the",
    "bus",
    "is",
    "white",
    "and",
    "red",
    "what",
    "colour",
    "has",
    "a",
    "picture",
    "it",
    "does",
    "not",
    "say",
    "more",
]


def record(*texts: str, image: str | list[str] | None = None, first: int = 0) -> dict:
    """A record whose turns are `texts`, the human's first unless `first` is 1."""
    roles = ("human", "gpt")
    turns = [{"from": roles[(number + first) % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": "1", "conversations": turns} | ({} if image is None else {"image": image})


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A SentencePiece model of Llama's kind, trained on the spot."""
    generator = random.Random(5)
    sentences = [" ".join(generator.choices(WORDS, k=12)) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def llama_model(request) -> Path:
    """A SentencePiece model of Llama's kind with a licence that lets anyone have it: Mistral's first."""
    package = Path(sys.prefix, "models", "mistral_common")  # where the Makefile keeps it
    if package.exists():
        return package / "data" / "tokenizer.model.v1"
    folder: Path = request.getfixturevalue("real_data")
    return folder / "tokenizers" / "mistral_sp" / "tokenizer.model.v1"


# SentencePieceTokenizer

PIECES = st.sampled_from(
    [*WORDS, " ", "  ", "\n", "</s>", "<s>", "<unk>", "▁", "é", "日本", "USER:", "<", ">"]
)


@given(st.lists(PIECES, max_size=12), st.booleans(), st.booleans())
def test_stretches_between_special_tokens_are_encoded_alone(small_model, pieces, spaced, legacy):
    tokenizer = SentencePieceTokenizer(small_model, legacy=legacy)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(small_model))
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    text = (" " if spaced else "").join(pieces)

    expected, stretch, seen = [1], "", False

    def encode() -> list[int]:
        if not stretch:
            return []
        if seen and not legacy:  # behind a newline no blank is put before it
            return plain.encode("\n" + stretch)[len(plain.encode("\n")) :]
        return plain.encode(stretch)

    position = 0
    while position < len(text):
        token = next((token for token in special if text.startswith(token, position)), None)
        if token is None:
            stretch += text[position]
            position += 1
        else:
            expected += [*encode(), special[token]]
            stretch, seen = "", True
            position += len(token)
    assert tokenizer(text).input_ids == expected + encode()


def test_a_continued_text_begins_with_neither_start_token_nor_blank(small_model):
    tokenizer = SentencePieceTokenizer(small_model)
    whole = tokenizer("the bus is white").input_ids
    assert whole == [
        *tokenizer("the bus").input_ids,
        *tokenizer(" is white", add_special_tokens=False).input_ids,
    ]


def test_a_tokenizer_travels_to_workers(small_model):
    text = LlavaText(SentencePieceTokenizer(small_model))
    sample = record("<image>\nwhat colour", "red", image="a.jpg")
    expected = text(sample)
    copy = pickle.loads(pickle.dumps(text))
    assert copy(sample) == expected
    assert pickle.loads(pickle.dumps(LlavaText(ByteTokenizer())))(sample).input_ids


@pytest.mark.parametrize(
    "content", [None, b"", b"not a model", b"\x0a\x05hello" * 100, bytes(range(256)) * 40]
)
def test_what_is_no_model_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"tokenizer\.model"):
        SentencePieceTokenizer(path)


def test_a_folder_is_no_model(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        SentencePieceTokenizer(tmp_path)


# ByteTokenizer


@given(st.text())
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer()
    tokens = tokenizer(text).input_ids
    assert tokens[0] == tokenizer.bos_token_id
    assert all(3 <= token < tokenizer.vocab_size for token in tokens[1:])
    assert tokenizer.decode([*tokens, tokenizer.eos_token_id, IMAGE_TOKEN]) == text
    assert tokenizer(text, add_special_tokens=False).input_ids == tokens[1:]


# labels by spans


def answers_of(text: LlavaText, labels: list[int]) -> list[str]:
    """What is trained on: one text per end token."""
    answers: list[list[int]] = [[]]
    for label in labels:
        if label == text.eos_token_id:
            answers.append([])
        elif label != IGNORE_INDEX:
            answers[-1].append(label)
    return [text.tokenizer.decode(answer) for answer in answers if answer]


@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=5), st.booleans())
def test_spans_train_on_every_answer_and_nothing_else(turns, trailing):
    texts = [part for turn in turns for part in turn] + (["one more question"] if trailing else [])
    text = LlavaText(ByteTokenizer(), max_length=4096)
    assert text.labels == "spans"
    result = text(record(*texts))
    assert len(result.input_ids) == len(result.labels)
    assert all(
        label in (IGNORE_INDEX, token) for label, token in zip(result.labels, result.input_ids, strict=True)
    )
    given_answers = [answer for answer in texts[1::2] if answer]
    assert answers_of(text, result.labels) == [f" {answer}" for answer in given_answers]
    assert result.labels.count(text.eos_token_id) == len(given_answers)
    assert ("nothing-supervised" in result.notes) == (not given_answers)
    prompt = "".join(
        (f"USER: {part} " if part else "USER:")
        if number % 2 == 0
        else (f"ASSISTANT: {part}" if part else "ASSISTANT:")
        for number, part in enumerate(texts)
    )
    assert text.tokenizer.decode(result.input_ids) == f"{SYSTEM} {prompt}"


@given(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6), min_size=2, max_size=6),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["v1", "llama_2", "mistral_instruct"]),
)
def test_on_ordinary_conversations_both_ways_agree(small_model, words, with_image, legacy, template):
    texts = [" ".join(part) for part in words[: len(words) // 2 * 2]]
    sample = record(
        ("<image>\n" if with_image else "") + texts[0], *texts[1:], image="a.jpg" if with_image else None
    )
    tokenizer = SentencePieceTokenizer(small_model, legacy=legacy)
    reference = LlavaText(tokenizer, template=template, labels="reference")(sample)
    spans = LlavaText(tokenizer, template=template, labels="spans")(sample)
    assert spans.input_ids == reference.input_ids
    if (
        "tokenization-mismatch" not in reference.notes
    ):  # this small vocabulary may have no two tokens for "USER"
        assert spans.labels == reference.labels


@pytest.mark.parametrize("labels", ["reference", "spans"])
def test_plain_is_image_caption_newline(labels):
    tokenizer = ByteTokenizer()
    text = LlavaText(tokenizer, template="plain", labels=labels)
    result = text(record("Describe it.\n<image>", "a red bus", image="a.jpg"))
    caption = tokenizer("a red bus\n", add_special_tokens=False).input_ids
    assert result.input_ids == [1, IMAGE_TOKEN, *caption]
    assert result.labels == [IGNORE_INDEX, IGNORE_INDEX, *caption]
    assert result.notes == ()


# tokenizers of transformers


@pytest.fixture(scope="session")
def byte_level_bpe():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|endoftext|>")


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("template", ["v1", "llama_2", "mistral_instruct"])
def test_spans_of_llamas_fast_tokenizers_are_parts_of_the_prompt(scheme, template):
    """They put a blank before every text (*always*: behind every special token, too), which an answer is not for them when it stands alone."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"])
    model.train_from_iterator([SYSTEM, " ".join(WORDS), "[INST] a [/INST] <<SYS>>\n"] * 9, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    sample = record("<image>\nwhat is it", "a bus", "and the colour", "red", image="a.jpg")
    whole = LlavaText(tokenizer, template=template, labels="reference")(sample)
    text = LlavaText(tokenizer, template=template, labels="spans")
    assert text(sample).input_ids == whole.input_ids
    answers = answers_of(text, text(sample).labels)  # their decoder takes blanks away
    assert [answer.replace(" ", "") for answer in answers] == ["abus", "red"]


def test_where_the_arithmetic_fails_on_an_ordinary_conversation_labels_go_by_spans(llama_model):
    """Padding with the end token is common; LLaVA's counting takes the end tokens for padding then."""
    tokenizer = SentencePieceTokenizer(llama_model)
    assert LlavaText(tokenizer).labels == "reference"
    tokenizer.pad_token_id = tokenizer.eos_token_id
    text = LlavaText(tokenizer)
    assert text.labels == "spans"
    assert text.max_length == 2048
    result = text(record("<image>\nWhat is it?", "A bus.", image="a.jpg"))
    assert result.notes == ()
    assert result.labels.count(tokenizer.eos_token_id) == 1
    assert "tokenization-mismatch" in LlavaText(tokenizer, labels="reference")(record("Hi", "Ho")).notes


def test_a_tokenizer_without_start_token_has_its_labels_by_spans(byte_level_bpe):
    text = LlavaText(byte_level_bpe)
    assert text.labels == "spans"
    assert text.pad_token_id == byte_level_bpe.eos_token_id
    result = text(
        record(
            "<image>\nwhat colour is the bus",
            "red and white",
            "does it say more",
            "it does not",
            image="a.jpg",
        )
    )
    assert result.input_ids.count(IMAGE_TOKEN) == 1
    assert answers_of(text, result.labels) == [" red and white", " it does not"]
    assert result.labels.count(byte_level_bpe.eos_token_id) == 2
    joined = byte_level_bpe.decode([token for token in result.input_ids if token != IMAGE_TOKEN])
    assert joined.startswith(SYSTEM)
    assert "<|endoftext|>USER: does it" in joined


# image tokens


def prompt_of(sample: dict, **options) -> str:
    text = LlavaText(ByteTokenizer(), **options)
    parts: list[list[int]] = [[]]
    for token in text(sample).input_ids:
        if token == IMAGE_TOKEN:
            parts.append([])
        else:
            parts[-1].append(token)
    return "[IMAGE]".join(text.tokenizer.decode(part) for part in parts).removeprefix(SYSTEM)


@pytest.mark.parametrize(
    "value", ["<image>\nq", "q\n<image>", "q<image>", " <image> q ", "<image>\n<image>\nq"]
)
def test_the_image_is_moved_to_the_front_once(value):
    assert prompt_of(record(value, "a", image="a.jpg")) == " USER: [IMAGE]\nq ASSISTANT: a"
    assert prompt_of(record(value, "a", image=["a.jpg"])) == " USER: [IMAGE]\nq ASSISTANT: a"


def test_of_several_images_only_a_single_token_is_moved():
    images = ["a.jpg", "b.jpg"]
    assert (
        prompt_of(record("<image> or <image>?", "a", image=images))
        == " USER: [IMAGE] or [IMAGE]? ASSISTANT: a"
    )
    moved = prompt_of(record("first <image>", "a", "<image> second", "b", image=images))
    assert moved == " USER: [IMAGE]\nfirst ASSISTANT: aUSER: [IMAGE] second ASSISTANT: b"


def test_without_an_image_the_token_is_text():
    assert prompt_of(record("what is <image>?", "a tag")) == " USER: what is <image>? ASSISTANT: a tag"
    for none in (None, "", []):
        assert (
            IMAGE_TOKEN not in LlavaText(ByteTokenizer())(record("<image>", "a") | {"image": none}).input_ids
        )


def test_more_image_tokens_than_images_are_refused():
    for sample in (
        record("<image>\nq", "a", "<image>\nq", "b", image="a.jpg"),
        record("<image><image><image>", "a", image=["a.jpg", "b.jpg"]),
    ):
        with pytest.raises(TextError, match="image-tokens-exceed-images"):
            LlavaText(ByteTokenizer())(sample)
    with pytest.raises(TextError, match="image-tokens-exceed-images"):
        LlavaText(ByteTokenizer(), template="plain")(record("<image>", "a"))


def test_fewer_image_tokens_than_images_are_noted():
    text = LlavaText(ByteTokenizer())
    assert text(record("q", "a", image="a.jpg")).notes == ("image-tokens-missing",)
    assert text(record("q <image>", "a", image=["a.jpg", "b.jpg"])).notes == ("image-tokens-missing",)


@pytest.mark.parametrize("labels", ["reference", "spans"])
def test_an_image_in_an_answer_is_not_trained_on(small_model, labels):
    text = LlavaText(SentencePieceTokenizer(small_model), labels=labels)
    result = text(record("draw a bus", "<image>\nthe bus", image="a.jpg"))
    assert result.input_ids.count(IMAGE_TOKEN) == 1
    assert IMAGE_TOKEN not in result.labels
    if "tokenization-mismatch" not in result.notes:
        assert "image-in-answer" in result.notes


# odd conversations


def test_a_first_turn_that_is_not_the_humans_is_dropped():
    sample = record("hello", "q", "a", first=1)
    assert LlavaText(ByteTokenizer())(sample).notes == ("first-turn-dropped",)
    assert prompt_of(sample) == " USER: q ASSISTANT: a"
    assert LlavaText(ByteTokenizer())(record("hello", first=1)).notes == (
        "first-turn-dropped",
        "nothing-supervised",
    )


@pytest.mark.parametrize(
    "texts", [("q", ""), ("q", "a", "q"), ("q", "a</s>b"), ("q ASSISTANT: x", "a"), ("<unk>", "a")]
)
def test_the_reference_masks_odd_conversations_wholly(small_model, texts):
    result = LlavaText(SentencePieceTokenizer(small_model), labels="reference")(record(*texts))
    assert "tokenization-mismatch" in result.notes
    assert set(result.labels) == {IGNORE_INDEX}


@pytest.mark.parametrize(
    ("template", "sample", "code"),
    [
        (
            "v1",
            {"conversations": [{"from": "system", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "unknown-role",
        ),
        ("v1", {"conversations": [{"from": "human", "value": "q"}] * 2}, "roles-not-alternating"),
        ("v1", {"conversations": [{"from": "gpt", "value": "a"}] * 2}, "roles-not-alternating"),
        ("v1", record("q", "\ud800"), "text-not-unicode"),
        ("plain", record("<image>", "\udfff", image="a.jpg"), "text-not-unicode"),
        ("plain", record("<image>", "a", "q", "b", image="a.jpg"), "plain-needs-two-turns"),
        ("plain", record("<image>", image="a.jpg"), "plain-needs-two-turns"),
        ("plain", record("q", "a", image="a.jpg"), "plain-needs-image-token"),
    ],
)
def test_what_a_template_cannot_take(template, sample, code):
    for given_ in (sample, json.dumps(sample).encode()):
        with pytest.raises(TextError) as caught:
            LlavaText(ByteTokenizer(), template=template)(given_)
        assert caught.value.code == code


def test_what_is_no_record_is_a_record_error():
    for data in (b"", b"[]", b"{}", b'{"conversations": []}', b'{"conversations": [{"from": "human"}]}'):
        with pytest.raises(RecordError):
            LlavaText(ByteTokenizer())(data)


ODD_PIECES = ["</s>", "<s>", "<unk>", " ASSISTANT: ", "[/INST] ", "###", "<|im_end|>", "<|eot_id|>", "USER:"]
ANY_TEXT = st.lists(
    st.sampled_from([*WORDS, "<image>", *ODD_PIECES, "\n", " ", "\ud800", "😀"]),
    max_size=6,
).map(" ".join)


@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["human", "gpt", "human", "gpt", "system"]), ANY_TEXT), max_size=5
    ),
    image=st.sampled_from([None, "", "a.jpg", ["a.jpg"], ["a.jpg", "b.jpg"]]),
    template=st.sampled_from(sorted(TEMPLATES)),
    labels=st.sampled_from(["reference", "spans", None]),
    max_length=st.sampled_from([1, 2, 30, 300]),
    legacy=st.booleans(),
)
def test_any_conversation_gives_tokens_or_a_sample_error(
    small_model, turns, image, template, labels, max_length, legacy
):
    sample = {"conversations": [{"from": role, "value": value} for role, value in turns], "image": image}
    tokenizers = [SentencePieceTokenizer(small_model, legacy=legacy), ByteTokenizer()]
    if TEMPLATES[template].tokens:
        kind = "llama_3" if template == "llava_llama_3" else "neox"
        tokenizers = [JsonTokenizer(GOLDEN / f"tokenizer_{kind}.json", **CHAT[kind])]
    for tokenizer in tokenizers:
        text = LlavaText(tokenizer, template=template, labels=labels, max_length=max_length)
        try:
            result = text(json.dumps(sample).encode())
        except SampleError:
            continue
        assert 1 <= len(result.input_ids) <= max_length
        assert all(
            label in (IGNORE_INDEX, token)
            for label, token in zip(result.labels, result.input_ids, strict=True)
        )
        images = 0 if not image else 1 if isinstance(image, str) else len(image)
        assert result.input_ids.count(IMAGE_TOKEN) <= images
        assert all(token == IMAGE_TOKEN or 0 <= token < tokenizer.vocab_size for token in result.input_ids)


# length


@pytest.mark.parametrize("image", [None, "a.jpg"])
def test_long_texts_are_cut_and_noted(image):
    sample = record("<image>\nq" if image else "q", "a" * 300, image=image)
    whole = LlavaText(ByteTokenizer(), max_length=4096)(sample)
    text = LlavaText(ByteTokenizer(), max_length=200)
    result = text(sample)
    assert result.input_ids == whole.input_ids[:200]
    assert result.labels == whole.labels[:200]
    assert result.notes == ("text-truncated",)
    assert "nothing-supervised" in LlavaText(ByteTokenizer(), max_length=100)(sample).notes


@pytest.mark.parametrize(
    "arguments", [{"template": "v9"}, {"labels": "guess"}, {"max_length": 0}, {"max_length": "2048"}]
)
def test_impossible_settings_are_named(arguments):
    with pytest.raises(UsageError, match=str(next(iter(arguments.values())))):
        LlavaText(ByteTokenizer(), **arguments)


@pytest.mark.parametrize("tokenizer", ["tokenizer.model", None])
def test_what_is_no_tokenizer_is_named(tokenizer):
    with pytest.raises(UsageError, match="make_tokenizer"):
        LlavaText(tokenizer)
