"""Prompts, labels, truncation and padding, worked by hand from the rules of LLaVA's llava/train/train.py; what strict refuses."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from loaders.text import IGNORE_INDEX, IMAGE_TOKEN, TEMPLATES, ByteTokenizer, JsonTokenizer, LlavaText
from loaders.text.tokenizers import Tokens
from shardify.errors import TextError, UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
CHAT_TOKENS = {
    "neox": {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "llama_3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
}


def record(*texts: str, image: str | list[str] | None = None) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": turns} | ({} if image is None else {"image": image})


def chat_tokenizer(kind: str) -> JsonTokenizer:
    pytest.importorskip("tokenizers")
    return JsonTokenizer(GOLDEN / f"tokenizer_{kind}.json", **CHAT_TOKENS[kind])


class ToyTokenizer:
    """Llama's ways with words for tokens: a start token, </s> as one token, a blank that is left at the end as another.

    "USER: a b</s>" is <s> "USER:" " a" " b" </s>.
    """

    bos_token_id, eos_token_id, unk_token_id, pad_token_id = 1, 2, 0, 0
    legacy = True  # a stretch after </s> begins as any other

    def __init__(self) -> None:
        self.words = ["<unk>", "<s>", "</s>"]

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Tokens:
        found = re.findall(r"</s>|<s>|<unk>|\n| ?[^ <\n]+|[ <]", text)
        for word in found:
            if word not in self.words:
                self.words.append(word)
        return Tokens([1] * add_special_tokens + [self.words.index(word) for word in found])

    def shown(self, tokens: list[int]) -> list[str]:
        return ["IMAGE" if token == IMAGE_TOKEN else self.words[token] for token in tokens]


def trained(result, tokenizer: ToyTokenizer) -> list[str]:
    return tokenizer.shown([label for label in result.labels if label != IGNORE_INDEX])


# prompts


def written(template: str, sample: dict) -> tuple[str, str]:
    """The whole prompt and what of it is trained on, with <s>, </s> and images as they are named."""
    tokenizer = ByteTokenizer()
    result = LlavaText(tokenizer, template=template, labels="spans", max_length=10_000)(sample)

    def text(tokens: list[int]) -> str:
        names = {1: "<s>", 2: "</s>", IMAGE_TOKEN: "[IMAGE]"}
        parts = [bytes([token - 3]) if token > 2 else names[token].encode() for token in tokens]
        return b"".join(parts).decode()

    return text(result.input_ids), text([label for label in result.labels if label != IGNORE_INDEX])


S = {name: template.system for name, template in TEMPLATES.items()}
ASKED = record("q1\n<image>", "a1", "q2", "a2", image="a.jpg")


@pytest.mark.parametrize(
    ("template", "prompt", "answers"),
    [
        ("v1", f"{S['v1']} USER: [IMAGE]\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>", " a1</s> a2</s>"),
        ("llava_v1", f"{S['llava_v1']} USER: [IMAGE]\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>", " a1</s> a2</s>"),
        (
            "v1_mmtag",
            f"{S['v1_mmtag']} USER: <Image>[IMAGE]</Image>\nq1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>",
            " a1</s> a2</s>",
        ),
        (
            "llava_v0",
            f"{S['llava_v0']}\n\n### Human: [IMAGE]\nq1\n### Assistant: a1\n### Human: q2\n### Assistant: a2\n### ",
            "###### Assistant: a1\n###### Assistant: a2\n### ",
        ),
        (
            "v0_mmtag",
            f"{S['v0_mmtag']}\n\n### Human: <Image>[IMAGE]</Image>\nq1\n### Assistant: a1\n### Human: q2\n### Assistant: a2\n### ",
            "###### Assistant: a1\n###### Assistant: a2\n### ",
        ),
        (
            "llama_2",
            f"[INST] <<SYS>>\n{S['llama_2']}\n<</SYS>>\n\n[IMAGE]\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>",
            " a1 </s> a2 </s>",
        ),
        (
            "llava_llama_2",
            f"[INST] <<SYS>>\n{S['llava_llama_2']}\n<</SYS>>\n\n[IMAGE]\nq1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>",
            " a1 </s> a2 </s>",
        ),
        ("mistral_instruct", "[INST] [IMAGE]\nq1 [/INST] a1 </s>[INST] q2 [/INST] a2 </s>", " a1 </s> a2 </s>"),
        (
            "mpt",
            (f"{S['mpt']}<|im_end|><|im_start|>user\n[IMAGE]\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
            "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>"),
            "a1<|im_end|>a2<|im_end|>",
        ),
        (
            "chatml_direct",
            ("<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n[IMAGE]\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
            "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>"),
            "a1<|im_end|>a2<|im_end|>",
        ),
    ],
)  # fmt: skip
def test_prompts(template, prompt, answers):
    assert written(template, ASKED) == (f"<s>{prompt}", answers)


def shown(tokenizer: JsonTokenizer, tokens: list[int]) -> str:
    names = [
        "[IMAGE]"
        if token == IMAGE_TOKEN
        else tokenizer._backend.id_to_token(token).replace("Ġ", " ").replace("Ċ", "\n")
        for token in tokens
    ]
    return "".join(names)


@pytest.mark.parametrize(
    ("template", "kind", "prompt", "learned"),
    [
        (
            "qwen_1_5",
            "neox",
            ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n[IMAGE]\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"),
            # of the system and the user: each <|im_start|>, <|im_end|> and newline; the messages of the model wholly
            ("<|im_start|>\n<|im_end|>\n"
            "<|im_start|>\n\n<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
            "<|im_start|>\n<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"),
        ),
        (
            "llava_llama_3",
            "llama_3",
            (f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{S['llava_llama_3']}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n[IMAGE]\nq1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na2<|eot_id|>"),
            ("<|begin_of_text|><|start_header_id|><|end_header_id|><|eot_id|>"
            "<|start_header_id|><|end_header_id|><|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na1<|eot_id|>"
            "<|start_header_id|><|end_header_id|><|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\na2<|eot_id|>"),
        ),
    ],
)  # fmt: skip
def test_prompts_of_chat_models(template, kind, prompt, learned):
    tokenizer = chat_tokenizer(kind)
    result = LlavaText(tokenizer, template=template)(ASKED)
    assert shown(tokenizer, result.input_ids) == prompt
    assert shown(tokenizer, [label for label in result.labels if label != IGNORE_INDEX]) == learned
    spans = LlavaText(tokenizer, template=template, labels="spans")(ASKED)
    assert spans.input_ids == result.input_ids
    # by spans, the messages of the model alone
    messages = re.findall(r"<\|(?:im_start|start_header_id)\|>assistant.*?a\d<.*?>\n?", prompt, re.DOTALL)
    assert len(messages) == 2
    assert shown(tokenizer, [label for label in spans.labels if label != IGNORE_INDEX]) == "".join(messages)


def test_other_names_are_the_same_templates():
    names = {
        "vicuna_v1": "v1",
        "v0_plain": "plain",
        "mistral_direct": "chatml_direct",
        "llava_v1_mmtag": "v1_mmtag",
    }
    for name, template in names.items():
        assert TEMPLATES[name] is TEMPLATES[template]


def test_several_images_stay_where_they_are_also_with_tags():
    """LLaVA-NeXT tags an image only when it moves it to the front."""
    images = ["a.jpg", "b.jpg"]
    stays = record("<image> or <image>?", "a", image=images)
    assert "USER: [IMAGE] or [IMAGE]? ASSISTANT: a" in written("v1_mmtag", stays)[0]
    moves = record("<image> first", "a", "second <image>", "b", image=images)
    assert (
        "USER: [IMAGE] first ASSISTANT: a</s>USER: <Image>[IMAGE]</Image>\nsecond ASSISTANT: b"
        in written("v1_mmtag", moves)[0]
    )


def test_llava_next_keeps_an_image_that_is_in_front_and_the_blanks_behind_it():
    tokenizer = chat_tokenizer("neox")
    text = LlavaText(tokenizer, template="qwen_2")
    assert "user\n[IMAGE]\nq \n<|im_end|>" in shown(
        tokenizer, text(record("<image>\nq \n", "a", image="a.jpg")).input_ids
    )
    assert "user\n[IMAGE]\nq<|im_end|>" in shown(
        tokenizer, text(record("q \n<image>", "a", image="a.jpg")).input_ids
    )
    noise = shown(
        tokenizer, text(record("<image>\nQA_GT_caption_based_noisyq", "a", image="a.jpg")).input_ids
    )
    assert "user\n[IMAGE]\nq<|im_end|>" in noise


# the reference's arithmetic

# v1's system text is 11 + 12 words, so that "USER: one two ASSISTANT: three four five</s>" has these tokens:
#   0 <s>   1..23 the system's words   24 USER:   25 one   26 two   27 ASSISTANT:   28 three   29 four   30 five   31 </s>
# Alone, the round has 31 tokens (the start token, not </s>); the instruction, with its last blank, 29, less 2 is 27.
# Counting: 1 (the start token); masked are 1 .. 1 + 27; then 1 + 31 = 32, as many as there are.
LONG = ("one two", "three four five")


def test_a_round_by_hand():
    tokenizer = ToyTokenizer()
    result = LlavaText(tokenizer, labels="reference")(record(*LONG))
    assert len(result.input_ids) == 32
    assert trained(result, tokenizer) == [" three", " four", " five", "</s>"]
    assert result.labels[:28] == [IGNORE_INDEX] * 28
    assert LlavaText(tokenizer).labels == "reference"


def test_an_image_takes_one_token_and_its_text_begins_anew():
    # the piece behind the image is "\none two ASSISTANT: three four five</s>", without a start token of its own: the newline, then as above;
    # the piece before it ends in a blank: 24 USER:  25 blank  26 IMAGE  27 newline  28 one
    tokenizer = ToyTokenizer()
    result = LlavaText(tokenizer, labels="reference")(record("<image>\none two", LONG[1], image="a.jpg"))
    before, behind = (
        [" USER:", " ", "IMAGE", "\n", "one", " two"],
        [" ASSISTANT:", " three", " four", " five", "</s>"],
    )
    assert tokenizer.shown(result.input_ids[24:]) == before + behind
    assert trained(result, tokenizer) == [" three", " four", " five", "</s>"]


def test_a_text_is_cut_before_it_is_counted():
    # at 30 tokens "five" and </s> are cut off. The counting comes to 32, which is not below 30, so nothing is compared
    tokenizer = ToyTokenizer()
    result = LlavaText(tokenizer, labels="reference", max_length=30)(record(*LONG))
    assert len(result.input_ids) == 30
    assert trained(result, tokenizer) == [" three", " four"]
    assert result.notes == ("text-truncated",)


def test_a_cut_text_that_counts_up_to_less_is_a_mismatch():
    # the second round has two ASSISTANT:, which ends the counting behind the first at 1 + 31 = 32. Cut to 40 of its 43 tokens, 32 < 40 is compared with
    # 40: a mismatch. Cut to 32 tokens, 32 is not below 32: the first answer stays trained on
    tokenizer = ToyTokenizer()
    odd = record(*LONG, "six ASSISTANT: seven", "eight nine ten eleven twelve")
    assert len(LlavaText(tokenizer, labels="spans")(odd).input_ids) == 43
    result = LlavaText(tokenizer, labels="reference", max_length=40)(odd)
    assert "tokenization-mismatch" in result.notes
    assert trained(result, tokenizer) == []
    result = LlavaText(tokenizer, labels="reference", max_length=32)(odd)
    assert "tokenization-mismatch" not in result.notes
    assert trained(result, tokenizer) == [" three", " four", " five", "</s>"]


def test_a_text_with_an_image_is_counted_whole_and_cut_by_the_collator():
    # the same with an image: 3 more tokens (blank, IMAGE, newline; "one" keeps its token), the first round ends at 35. All 46 are counted, so that at a maximum of 35
    # nothing is compared, at 36 and more 35 < 36 is compared with 46: a mismatch, though what is left after cutting would have added up
    tokenizer = ToyTokenizer()
    odd = record(
        "<image>\none two", LONG[1], "six ASSISTANT: seven", "eight nine ten eleven twelve", image="a.jpg"
    )
    whole = LlavaText(tokenizer, labels="spans")(odd).input_ids
    assert len(whole) == 46
    at_35 = LlavaText(tokenizer, labels="reference", max_length=35)(odd)
    assert at_35.input_ids == whole[:35]
    assert trained(at_35, tokenizer) == [" three", " four", " five", "</s>"]
    at_36 = LlavaText(tokenizer, labels="reference", max_length=36)(odd)
    assert len(at_36.input_ids) == len(at_36.labels) == 36
    assert trained(at_36, tokenizer) == []


def test_turns_of_v0_by_hand():
    # head: <s> and 11 + 12 words and two newlines = 26 tokens. Turns counted alone have a start token more, but the reference counts them so, and
    # each turn's count pushes the next mask one further: "### Human: q\n" alone is <s> ### Human: q newline, 5 tokens; its first two are kept.
    #   26 ###  27 Human:  28 q  29 newline | 30 ###  31 Assistant:  32 a  33 newline | 34 ###  35 blank
    # masked: 0 .. 26, then 26 + 2 .. 26 + 5 = 28, 29, 30. The model's turn is not masked.
    tokenizer = ToyTokenizer()
    result = LlavaText(tokenizer, template="llava_v0", labels="reference")(record("q", "a"))
    assert len(result.input_ids) == 36
    assert [place for place, label in enumerate(result.labels) if label != IGNORE_INDEX] == [
        26,
        27,
        *range(31, 36),
    ]


def test_rounds_of_mpt_that_llava_next_counts_are_the_spans():
    """LLaVA-NeXT begins its counting at 1, which is right for tokenizers with a start token; the spans are then the same."""
    tokenizer = chat_tokenizer("llama_3")
    tokenizer._backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    sample = record("<image>\nWhat is it?", "A bus.", "Why?", "It is red.", image="a.jpg")
    text = LlavaText(tokenizer, template="mpt", labels="reference")
    assert "tokenization-mismatch" in text(sample).notes
    spans = LlavaText(tokenizer, template="mpt")
    assert spans.labels == "spans"
    text.template = replace(text.template, masking=replace(text.template.masking, first=1))
    assert text(sample) == spans(sample)
    assert spans(sample).notes == ()


def test_a_template_that_trains_on_nothing_is_told(caplog):
    with caplog.at_level(logging.WARNING, "loaders"):
        text = LlavaText(ToyTokenizer(), template="mpt")
    assert text.labels == "reference"
    assert "labels='spans'" in caplog.text


# refusals


@pytest.mark.parametrize(
    ("template", "sample", "code"),
    [
        ("v1", record("<image>\nq", "", image="a.jpg"), "empty-turn"),
        ("v1", record("q", "a", "q"), "unanswered"),
        ("v1", {"conversations": [{"from": "gpt", "value": "a"}, *record("q", "a")["conversations"]]}, "first-turn-dropped"),
        ("v1", record("what is <image>?", "a tag"), "image-token-in-text"),
        ("v1", record("<image>\n<image>\nq", "a", image="a.jpg"), "image-tokens-merged"),
        ("v1", record("q", "a", image="a.jpg"), "image-tokens-missing"),
        ("v1", record("q", "a</s>b"), "marker-in-text"),
        ("v1", record("q ASSISTANT: x", "a"), "marker-in-text"),
        ("llama_2", record("q [/INST] x", "a"), "marker-in-text"),
        ("llava_v0", {"conversations": [{"from": "system", "value": "s"}, *record("q", "a")["conversations"]]}, "unknown-role"),
        ("llava_v0", {"conversations": record("q")["conversations"] * 2 + [{"from": "gpt", "value": "a"}]}, "roles-not-alternating"),
        ("v1", record("q", "a " * 3000), "text-truncated"),
    ],
)  # fmt: skip
def test_odd_input_is_noted_and_refused_when_strict(template, sample, code):
    tokenizer = ToyTokenizer()
    assert code in LlavaText(tokenizer, template=template, labels="reference")(sample).notes
    strict = LlavaText(tokenizer, template=template, labels="reference", strict=True)
    with pytest.raises(TextError) as caught:
        strict(json.dumps(sample).encode())
    assert caught.value.code == code
    assert strict(record("q", "a")).notes == ()


def test_an_image_in_an_answer_is_refused_when_strict():
    sample = record("draw", "<image>\nit", image="a.jpg")
    assert LlavaText(ByteTokenizer())(sample).notes == ("image-in-answer",)
    with pytest.raises(TextError, match="image-in-answer"):
        LlavaText(ByteTokenizer(), strict=True)(sample)


def test_what_is_text_to_a_tokenizer_is_no_marker():
    assert LlavaText(ByteTokenizer())(record("q", "a</s>b")).notes == ()


@pytest.mark.parametrize("template", ["llama_2", "llava_llama_2", "mistral_instruct"])
def test_an_empty_first_turn_has_no_place_for_the_system_text(template):
    with pytest.raises(TextError) as caught:
        LlavaText(ByteTokenizer(), template=template)(record("", "a"))
    assert caught.value.code == "first-turn-empty"


@pytest.mark.parametrize("template", ["qwen_1_5", "qwen_2", "llava_llama_3"])
def test_a_tokenizer_without_the_tokens_of_a_template_is_refused(template):
    with pytest.raises(UsageError, match=r"made of tokens such as '<\|"):
        LlavaText(ByteTokenizer(), template=template)


def test_a_note_is_counted_once_a_record():
    assert LlavaText(ByteTokenizer())(record("", "", "q", "")).notes == ("empty-turn", "nothing-supervised")


# collation


def test_batches_are_the_reference_collators(tmp_path, made):
    """DataCollatorForSupervisedDataset: input_ids padded to the longest with the padding token, labels with -100, both cut to model_max_length; attended is what
    is not padding.

    plain on bytes: <s>, the image, the caption's bytes (each 3 more than its value) and the newline, 10 + 3 = 13.
        "ab"      1 -200 100 101  13                 padded to the longest, of which 6 columns are kept
        "abcdefg" 1 -200 100 101 102 103 (104 105 106 13 are cut off)
    """
    from loaders import ImageTransform, StreamingLoader

    samples = [
        made.Made([made.png(1)], json.dumps({"id": 0, **record("<image>", caption, image="a.png")}).encode())
        for caption in ("ab", "abcdefg")
    ]
    data = made.write(tmp_path / "data", samples, shards=1)
    text = LlavaText(ByteTokenizer(), template="plain", max_length=6)
    loader = StreamingLoader(
        str(data),
        batch_size=2,
        image=ImageTransform(8),
        text=text,
        shuffle=None,
        num_workers=0,
        rank=0,
        world_size=1,
    )
    (batch,) = list(loader)
    assert batch.input_ids.tolist() == [[1, -200, 100, 101, 13, 0], [1, -200, 100, 101, 102, 103]]
    assert batch.labels.tolist() == [[-100, -100, 100, 101, 13, -100], [-100, -100, 100, 101, 102, 103]]
    assert batch.attention_mask.tolist() == [[True] * 5 + [False], [True] * 6]
    assert loader.report().notes == {"text-truncated": 1}
