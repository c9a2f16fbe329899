"""Tokens and labels against LLaVA's own, row by row.

tests/golden/llava_text.json and ../shared/golden/llava_text.json were made by running LLaVA with Llama's kind of tokenizer;
tests/golden/llava_text_chat.json by tests/golden/make_llava_text_chat.py, which works the reference's rules on other kinds.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from loaders.text import IGNORE_INDEX, JsonTokenizer, LlavaText, SentencePieceTokenizer
from shardify.errors import TextError

GOLDEN = Path(__file__).parents[1] / "golden"

# where the reference stops with an exception, ours says why
REASONS = {
    "KeyError": {"unknown-role"},
    "AssertionError": {"plain-needs-two-turns", "plain-needs-image-token", "roles-not-alternating"},
}


def check(text: LlavaText, row: dict, conversation: list, images: int) -> None:
    record = {"conversations": conversation} | ({"image": ["a.jpg"] * images} if images else {})
    where = (row.get("tokenizer"), row.get("legacy"), row["template"], row["case"])
    assert text.labels == "reference", where
    if "error" in row:
        with pytest.raises(TextError) as caught:
            text(record)
        assert caught.value.code in REASONS[row["error"]], where
        return
    result = text(json.dumps(record).encode())
    assert result.input_ids == row["input_ids"], where
    labels = row.get("labels")
    if labels is None:  # kept as the spans that are trained on
        labels = [IGNORE_INDEX] * len(result.input_ids)
        for begin, end in row["trained"]:
            labels[begin:end] = result.input_ids[begin:end]
    assert result.labels == labels, where
    assert ("tokenization-mismatch" in result.notes) == row["mismatch"], where


@pytest.fixture(scope="session")
def mistral_model(request) -> Path:
    """A SentencePiece model of Llama's kind with a licence that lets anyone have it."""
    package = Path(sys.prefix, "models", "mistral_common")  # where the Makefile keeps it
    if package.exists():
        return package / "data" / "tokenizer.model.v1"
    folder: Path = request.getfixturevalue("real_data")
    return folder / "tokenizers" / "mistral_sp" / "tokenizer.model.v1"


@pytest.mark.parametrize("legacy", [False, True])
def test_llava_with_a_free_tokenizer(mistral_model, legacy):
    content = json.loads((GOLDEN / "llava_text.json").read_text())
    tokenizer = SentencePieceTokenizer(mistral_model, legacy=legacy)
    rows = [row for row in content["results"] if row["legacy"] == legacy]
    assert Counter(row["template"] for row in rows) == dict.fromkeys({row["template"] for row in rows}, 8)
    assert len(rows) == 80
    for row in rows:
        case = content["cases"][row["case"]]
        check(LlavaText(tokenizer, template=row["template"]), row, case["conversations"], case["images"])


def test_llava_with_all_tokenizers(real_data: Path):
    golden = real_data.parent / "golden" / "llava_text.json"
    if not golden.exists():
        pytest.skip(f"no golden outputs at {golden}")
    content = json.loads(golden.read_text())
    models = {"llama2_sp": "llama2_sp/tokenizer.model", "mistral_v1": "mistral_sp/tokenizer.model.v1"}
    tokenizers = {
        (name, legacy): SentencePieceTokenizer(real_data / "tokenizers" / path, legacy=legacy)
        for name, path in models.items()
        for legacy in (False, True)
    }
    texts: dict = {}
    for row in content["results"]:
        key = (row["tokenizer"], row["legacy"], row["template"])
        if key not in texts:
            texts[key] = LlavaText(tokenizers[key[:2]], template=row["template"])
        check(texts[key], row, content["cases"][row["case"]], int(row["has_image"]))
    assert len(content["results"]) == 320


CHAT = {
    "neox": {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "llama_3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
}


@pytest.mark.parametrize("kind", list(CHAT))
def test_templates_of_other_tokenizers(kind):
    pytest.importorskip("tokenizers")
    content = json.loads((GOLDEN / "llava_text_chat.json").read_text())
    tokenizer = JsonTokenizer(GOLDEN / f"tokenizer_{kind}.json", **CHAT[kind])
    rows = [row for row in content["results"] if row["tokenizer"] == kind]
    assert len(rows) == {"neox": 64, "llama_3": 16}[kind]
    for row in rows:
        text = LlavaText(tokenizer, template=row["template"], labels="reference")
        case = content["cases"][row["case"]]
        check(text, row, case["conversations"], case["images"])


def test_the_kept_tokenizers_have_the_newline_where_gpt_2_has_it():
    pytest.importorskip("tokenizers")
    for kind, tokens in CHAT.items():
        tokenizer = JsonTokenizer(GOLDEN / f"tokenizer_{kind}.json", **tokens)
        assert tokenizer("\n", add_special_tokens=False).input_ids == [198]
