"""Tokenizers from files, folders and names; that they are the same in other processes; what they are told apart by."""

import io
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.text import (
    IGNORE_INDEX,
    ByteTokenizer,
    JsonTokenizer,
    LlavaText,
    SentencePieceTokenizer,
    make_tokenizer,
)
from shardify.errors import UsageError

sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("tokenizers")

GOLDEN = Path(__file__).parents[1] / "golden"
NEOX, LLAMA_3 = GOLDEN / "tokenizer_neox.json", GOLDEN / "tokenizer_llama_3.json"
SAMPLE = {
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "The bus  in the image\nis white."},
    ],
}
PIECES = [
    "the",
    "bus",
    "image",
    " ",
    "  ",
    "\n",
    "▁",
    "é",
    "日本",
    "😀",
    "<s>",
    "</s>",
    "<image>",
    ".",
    "word" * 9,
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def trained_model(**settings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the bus in the image is white and red", "what is it the image"] * 40),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **({"normalization_rule_name": "identity", "vocab_size": 300} | settings),
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def model_bytes() -> bytes:
    return trained_model()


@pytest.fixture
def llama(tmp_path, model_bytes):
    """Makes a folder of a model of Llama's kind: its SentencePiece file and a tokenizer_config.json."""

    def make(config: dict | None) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.model").write_bytes(model_bytes)
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


# SentencePiece files


@given(TEXTS)
def test_words_encoded_one_by_one_are_the_text_encoded_at_once(tmp_path_factory, model_bytes, text):
    path = tmp_path_factory.getbasetemp() / "words.model"
    path.write_bytes(model_bytes)
    tokenizer = SentencePieceTokenizer(path)
    assert tokenizer._by_words
    assert tokenizer._encode_words(text) == tokenizer._encode_at_once(text)
    assert tokenizer.count(text) == len(tokenizer(text).input_ids)


@pytest.mark.parametrize(
    "settings", [{"normalization_rule_name": "nmt_nfkc"}, {"split_by_whitespace": False, "vocab_size": 330}]
)
def test_other_models_are_encoded_at_once(tmp_path, settings):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(trained_model(**settings))
    tokenizer = SentencePieceTokenizer(path)
    assert not tokenizer._by_words
    text = "the bus  ﬁ in the image"
    assert tokenizer(text, add_special_tokens=False).input_ids == tokenizer._processor.encode(text)


@pytest.mark.parametrize(
    ("config", "legacy"),
    [
        (None, False),  # a lone file: as Vicuna 1.5
        ({}, False),
        ({"tokenizer_class": "LlamaTokenizer"}, True),  # Vicuna 1.1 and 1.3 do not say
        ({"legacy": False}, False),
        ({"legacy": True}, True),
    ],
)
def test_legacy_is_what_the_configuration_says(llama, config, legacy):
    folder = llama(config)
    for spec in (folder, folder / "tokenizer.model", str(folder)):
        tokenizer = make_tokenizer(spec)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert tokenizer.legacy is legacy
        assert make_tokenizer(spec, legacy=not legacy).legacy is not legacy


def test_further_special_tokens_are_read_from_the_configuration(llama):
    listed = {
        str(number): {"content": text, "special": True, "lstrip": False, "rstrip": False}
        for number, text in [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (300, "<|im_end|>"), (301, "<image>"), (302, "<pad>")]
    }  # fmt: skip
    config = {
        "added_tokens_decoder": listed,
        "pad_token": "<pad>",
        "eos_token": {"content": "<|im_end|>"},
        "legacy": False,
    }
    tokenizer = make_tokenizer(llama(config))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (302, 300, 303)
    tokens = tokenizer("the<|im_end|>the").input_ids
    assert tokens == [
        1,
        *tokenizer("▁the", add_special_tokens=False).input_ids,
        300,
        *tokenizer("the", add_special_tokens=False).input_ids,
    ]
    # as in LLaVA, whose tokenizer has no such token
    assert 301 not in tokenizer("<image>").input_ids
    assert tokenizer.decode(tokens) == "thethe"


def test_no_start_token_where_the_configuration_says_so(llama):
    tokenizer = make_tokenizer(llama({"add_bos_token": False}))
    assert tokenizer("the").input_ids == tokenizer("▁the", add_special_tokens=False).input_ids
    text = LlavaText(tokenizer)
    assert text.labels == "spans"
    assert text(SAMPLE).input_ids[0] != tokenizer.bos_token_id


def test_tokens_that_sentencepiece_knows_nothing_of_are_left_to_the_json_file(llama):
    listed = {"300": {"content": "<x>", "special": False, "lstrip": False, "rstrip": True}}
    folder = llama({"added_tokens_decoder": listed, "eos_token": "<|im_end|>"})
    with pytest.raises(UsageError, match=r"use the tokenizer\.json"):
        make_tokenizer(folder / "tokenizer.model")
    shutil.copy(NEOX, folder / "tokenizer.json")
    assert isinstance(make_tokenizer(folder), JsonTokenizer)


def test_an_end_token_that_the_file_does_not_have_is_named(llama):
    folder = llama({"eos_token": "<|im_end|>"})  # as where added_tokens.json alone lists it
    for spec in (folder, folder / "tokenizer.model"):
        with pytest.raises(UsageError, match=r"no token '<\|im_end\|>'.*end token"):
            make_tokenizer(spec)
    for named in ({"eos_token": "</s>"}, {"eos_token": ""}):
        assert make_tokenizer(llama(named)).eos_token_id == 2


# tokenizer.json


def test_a_json_file_has_its_tokens_beside_it(tmp_path):
    shutil.copy(LLAMA_3, tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="end token"):
        make_tokenizer(tmp_path / "tokenizer.json")
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot_id|>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = make_tokenizer(spec)
        assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        assert tokenizer("<|eot_id|>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id]
        assert tokenizer.pad_token_id is None
        assert tokenizer.decode(tokenizer("the bus 😀").input_ids) == "the bus 😀"


@given(TEXTS)
def test_tokenizers_of_transformers_are_called_without_detours(text):
    transformers = pytest.importorskip("transformers")
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(LLAMA_3), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    made = LlavaText(whole, template="llava_llama_3").tokenizer
    assert isinstance(made, JsonTokenizer)
    for special in (True, False):
        assert made(text, add_special_tokens=special).input_ids == list(
            whole(text, add_special_tokens=special).input_ids
        )


def test_an_image_token_of_a_json_file_is_not_read_from_text(tmp_path):
    content = json.loads(NEOX.read_text())
    token = {"id": 600, "content": "<image>", "special": True, "normalized": False}
    content["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = JsonTokenizer(tmp_path / "tokenizer.json", eos_token="<|im_end|>")
    assert len(tokenizer("<image>").input_ids) > 1


def test_tokens_behind_the_image_token_keep_their_numbers(tmp_path):
    """LLaVA-1.5's padding token has the number behind the image token's, LLaVA-OneVision's <video> too."""
    transformers = pytest.importorskip("transformers")
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(NEOX),
        eos_token="<|im_end|>",
        extra_special_tokens=["<image>", "<video>"],
        pad_token="<pad>",
    )
    whole.save_pretrained(tmp_path)
    numbers = {token: whole.convert_tokens_to_ids(token) for token in ("<image>", "<video>", "<pad>")}
    assert len(set(numbers.values())) == 3
    for tokenizer in (make_tokenizer(tmp_path), LlavaText(whole).tokenizer):
        assert tokenizer.pad_token_id == numbers["<pad>"]
        assert tokenizer.vocab_size == len(whole)
        for token in ("<video>", "<pad>"):
            assert tokenizer(token, add_special_tokens=False).input_ids == [numbers[token]]
        assert numbers["<image>"] not in tokenizer("an <image> here").input_ids


def test_a_folder_that_only_transformers_can_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    content = json.loads(NEOX.read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"] | {"<|endoftext|>": 900}))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in content["model"]["merges"]))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = make_tokenizer(tmp_path)
    assert tokenizer("the bus").input_ids == JsonTokenizer(NEOX)("the bus").input_ids
    assert transformers


# names and mistakes


def test_a_name_is_looked_for_on_the_hub(tmp_path, monkeypatch, llama):
    hub = pytest.importorskip("huggingface_hub")
    folder = llama({"legacy": True})
    asked = []

    def snapshot_download(name, **_):
        asked.append(name)
        if name == "nobody/nothing":
            raise hub.errors.LocalEntryNotFoundError("Cannot find it\nmore")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert make_tokenizer("lmsys/vicuna-7b-v1.5").legacy is True
    with pytest.raises(UsageError, match="cannot be had from the Hugging Face hub: Cannot find it"):
        make_tokenizer("nobody/nothing")
    assert asked == ["lmsys/vicuna-7b-v1.5", "nobody/nothing"]
    for path in (tmp_path / "none", "./none", "a/b/c", "none/tokenizer.model", "tokenizer.json", ""):
        with pytest.raises(UsageError, match="no such file or folder"):
            make_tokenizer(path)
    assert len(asked) == 2


def test_mistakes_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        make_tokenizer(tmp_path / "empty")
    for content in ("", "[]", "{}", '{"added_tokens": [1]}', '{"model": {"type": "none"}}', "\udc80"):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(UsageError, match=r"tokenizer\.json"):
            JsonTokenizer(path)
    with pytest.raises(UsageError, match="no token '<none>', which is to be the end token"):
        JsonTokenizer(NEOX, eos_token="<none>")
    shutil.copy(NEOX, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"tokenizer_config\.json: not a JSON object"):
        make_tokenizer(tmp_path)
    assert isinstance(make_tokenizer("bytes"), ByteTokenizer)


# processes and fingerprints


def _in_child(text: LlavaText, sent) -> None:
    sent.send(text(SAMPLE))


def test_tokenizers_work_after_a_fork_and_a_copy(llama, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    neox = JsonTokenizer(NEOX, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    for tokenizer, template in ((make_tokenizer(llama({})), "v1"), (neox, "qwen_2")):
        text = LlavaText(tokenizer, template=template)
        expected = text(SAMPLE)  # so that the parent has used it
        assert any(label != IGNORE_INDEX for label in expected.labels)
        copy = pickle.loads(pickle.dumps(text))
        assert copy(SAMPLE) == expected
        assert copy.fingerprint == text.fingerprint
        context = multiprocessing.get_context("fork")
        received, sent = context.Pipe(duplex=False)
        child = context.Process(target=_in_child, args=(text, sent))
        child.start()
        assert received.poll(60)
        assert received.recv() == expected
        child.join(60)
        assert child.exitcode == 0


def test_fingerprints_change_with_what_changes_tokens(llama, tmp_path):
    folder = llama({})
    file = folder / "tokenizer.model"
    (tmp_path / "other.model").write_bytes(trained_model(vocab_size=310))
    texts = [
        LlavaText(SentencePieceTokenizer(file)),
        LlavaText(SentencePieceTokenizer(file, legacy=True)),
        LlavaText(SentencePieceTokenizer(file, add_bos=False)),
        LlavaText(SentencePieceTokenizer(file, added={"<x>": 300})),
        LlavaText(SentencePieceTokenizer(tmp_path / "other.model")),
        LlavaText(SentencePieceTokenizer(file), template="llava_v1"),
        LlavaText(SentencePieceTokenizer(file), max_length=100),
        LlavaText(SentencePieceTokenizer(file), labels="spans"),
        LlavaText(SentencePieceTokenizer(file), strict=True),  # refuses what others count
        LlavaText(ByteTokenizer()),
        LlavaText(JsonTokenizer(NEOX, eos_token="<|im_end|>")),
        LlavaText(JsonTokenizer(LLAMA_3, eos_token="<|eot_id|>")),
    ]
    texts[0].labels = texts[1].labels = "reference"
    assert len({text.fingerprint for text in texts}) == len(texts)
    again = LlavaText(SentencePieceTokenizer(file), template="vicuna_v1", labels="reference")
    assert again.fingerprint == texts[0].fingerprint


class _Slow:
    """A tokenizer that nothing is known of."""

    bos_token_id, eos_token_id, unk_token_id, pad_token_id = 1, 2, 0, 0
    __call__ = ByteTokenizer.__call__


def test_unknown_tokenizers_are_told_apart_by_their_vocabulary_or_refused():
    with pytest.raises(UsageError, match="fingerprint"):
        _ = LlavaText(_Slow()).fingerprint
    one, other = (
        type("One", (_Slow,), {"get_vocab": lambda self: {"a": 1}}),
        type("One", (_Slow,), {"get_vocab": lambda self: {"a": 2}}),
    )
    assert LlavaText(one()).fingerprint == LlavaText(one()).fingerprint != LlavaText(other()).fingerprint
