"""Lengths in words and tokens: exact, kept, made again only where something changed, and read without the images."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import loaders.lengths as lengths_module
from loaders.dataset import open_dataset
from loaders.lengths import token_lengths, word_lengths
from loaders.mixture import Mixture
from loaders.text import ByteTokenizer, LlavaText
from shardify.errors import FormatError, TextError, UsageError

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "shardify"))
from tars import record, write_tars
from web import running_nginx

TEXT = LlavaText(ByteTokenizer())


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ordinary(count):
    return [([b"\x89PNG\r\n\x1a\n" + bytes(20_000)] * (i % 3), record(i, i % 3)) for i in range(count)]


def expected(samples, image_tokens=1, text=TEXT):
    lengths = []
    for images, raw in samples:
        tokens = text(raw).input_ids
        lengths.append(len(tokens) + len(images) * (image_tokens - 1))
    return lengths


@pytest.mark.parametrize("compress", ["", "zstd"])
@pytest.mark.parametrize("forked", [False, True])
def test_counts_are_those_of_the_text(tmp_path, monkeypatch, compress, forked):
    if forked:
        monkeypatch.setattr(lengths_module, "_IN_PROCESS", 0)
    samples = ordinary(70)
    data = write_tars(tmp_path / "data", samples, [0, 11, 40], compress=compress)
    dataset = open_dataset(data)
    some = np.random.default_rng(0).permutation(70)
    for image_tokens in (1, 576):
        lengths, images = token_lengths(dataset, TEXT, image_tokens=image_tokens).measure(some)
        assert lengths.tolist() == [expected(samples, image_tokens)[i] for i in some]
        assert images.tolist() == [i % 3 for i in some]


def test_words_come_from_the_index(tmp_path):
    samples = ordinary(20)
    dataset = open_dataset(write_tars(tmp_path / "data", samples, [11]))
    lengths, images = word_lengths(dataset, image_tokens=10).measure(np.arange(20))
    for i, (pictures, raw) in enumerate(samples):
        words = sum(len(turn["value"].split()) for turn in json.loads(raw)["conversations"])
        assert lengths[i] == words + 10 * len(pictures)
        assert images[i] == len(pictures)
    assert word_lengths(dataset).measure(np.zeros(0, np.int64))[0].shape == (0,)


def test_texts_that_fail_count_as_their_filler(tmp_path):
    samples = ordinary(10)
    samples[3] = ([], b'{"id": 3, "conversations": "none"}')
    samples[4] = ([], b"no JSON")
    data = write_tars(tmp_path / "data", samples, [])
    lengths = token_lengths(open_dataset(data), TEXT)
    assert lengths.counts[0][[3, 4]].tolist() == [-1, -1]
    assert lengths.measure(np.array([3, 4]))[0].tolist() == [1, 1]


class Counting:
    """A text that writes down what it is asked."""

    def __init__(self, path, fingerprint="a"):
        self.path, self.fingerprint = path, fingerprint

    def __call__(self, raw):
        with open(self.path, "ab") as file:
            file.write(b"x")
        return TEXT(raw)

    @property
    def asked(self):
        return self.path.stat().st_size if self.path.exists() else 0


def test_nothing_is_counted_twice(tmp_path):
    samples = ordinary(40)
    data = write_tars(tmp_path / "data", samples[:30], [10])
    text = Counting(tmp_path / "asked")
    for _ in range(2):
        token_lengths(open_dataset(data), text)
        assert text.asked == 30
    # added shards alone
    write_tars(data, samples[30:], [], first=2)
    lengths = token_lengths(open_dataset(data), text)
    assert text.asked == 40
    assert lengths.measure(np.arange(40))[0].tolist() == expected(samples)
    # another text, and another text of the same name
    token_lengths(open_dataset(data), Counting(tmp_path / "asked", "b"))
    assert text.asked == 80


def test_only_what_takes_part_is_counted(tmp_path):
    samples = ordinary(60)
    data = write_tars(tmp_path / "data", samples, [10, 30])
    text = Counting(tmp_path / "asked")
    dataset = open_dataset(data, max_samples=7)
    lengths = token_lengths(dataset, text)
    assert text.asked == 7
    stored = dataset.parts[0].stored(np.arange(7))
    assert lengths.measure(np.arange(7))[0].tolist() == [expected(samples)[i] for i in stored]


def test_the_parts_of_a_mixture_are_counted_each(tmp_path):
    a, b = ordinary(20), ordinary(33)[20:]
    dataset = open_dataset(
        Mixture(
            {
                "a": (write_tars(tmp_path / "a", a, [5]), 1),
                "b": (write_tars(tmp_path / "b", b, [], compress="zstd"), 2),
            }
        )
    )
    lengths, _ = token_lengths(dataset, TEXT).measure(np.arange(33))
    assert lengths.tolist() == expected([*a, *b])


def test_a_killed_count_goes_on_where_it_was(tmp_path):
    samples = ordinary(60)
    data = write_tars(tmp_path / "data", samples, [20, 40])
    code = (
        "import sys, time, numpy as np\n"
        "from loaders.dataset import open_dataset\n"
        "import loaders.lengths as l\n"
        "from loaders.text import ByteTokenizer, LlavaText\n"
        "l._IN_PROCESS = 0\n"
        "l.default_workers = lambda: 2\n"
        "class Slow(LlavaText):\n"
        "    def __call__(self, raw):\n"
        "        if not isinstance(raw, dict) and b'id50\"' in bytes(raw):\n"
        "            print('here', flush=True); time.sleep(60)\n"
        "        return super().__call__(raw)\n"
        f"l.token_lengths(open_dataset({str(data)!r}), Slow(ByteTokenizer()))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    assert process.stdout.readline() == b"here\n"
    time.sleep(1)  # for the other worker to end its shards
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    text = Counting(tmp_path / "asked", TEXT.fingerprint)
    lengths = token_lengths(open_dataset(data), text)
    assert text.asked == 20
    assert lengths.measure(np.arange(60))[0].tolist() == expected(samples)


def test_a_damaged_shard_is_named_and_nothing_is_kept_of_it(tmp_path):
    data = write_tars(tmp_path / "data", ordinary(20), [10])
    dataset = open_dataset(data)
    whole = (data / "001.tar").read_bytes()
    (data / "001.tar").write_bytes(whole[:30_000])
    with pytest.raises(FormatError, match=r"001\.tar"):
        token_lengths(dataset, TEXT)
    (data / "001.tar").write_bytes(whole)
    assert token_lengths(dataset, TEXT).measure(np.arange(20))[0].tolist() == expected(ordinary(20))


def test_a_text_without_a_name_is_refused(tmp_path):
    dataset = open_dataset(write_tars(tmp_path / "data", ordinary(3), []))
    with pytest.raises(UsageError, match="fingerprint"):
        token_lengths(dataset, object())


def test_remote_records_are_read_by_ranges(tmp_path, made):
    samples = [
        made.Made([b"\x89PNG\r\n\x1a\n" + bytes(400_000)] * (i % 2), record(i, i % 2)) for i in range(30)
    ]
    made.write(tmp_path / "root" / "data", samples, shards=2)
    with running_nginx(tmp_path / "root", tmp_path / "nginx") as url:
        dataset = open_dataset(f"{url}/data")
        lengths, _ = token_lengths(dataset, TEXT).measure(np.arange(30))
        assert lengths.tolist() == [len(TEXT(s.record).input_ids) for s in samples]
        log = (tmp_path / "nginx" / "requests.log").read_text().splitlines()
    # the bytes sent for shards: little more than the records
    sent = sum(int(line.split('" ')[1].split()[1]) for line in log if ".tar" in line)
    assert sent < 400_000


# --- names of texts


def test_texts_are_told_apart_by_all_that_changes_tokens():
    class Renamed(ByteTokenizer):
        fingerprint = "mine"

    texts = [
        LlavaText(ByteTokenizer()),
        LlavaText(ByteTokenizer(), template="plain"),
        LlavaText(ByteTokenizer(), max_length=100),
        LlavaText(Renamed()),
    ]
    assert len({text.fingerprint for text in texts}) == len(texts)
    assert LlavaText(ByteTokenizer()).fingerprint == texts[0].fingerprint


def test_tokenizers_of_transformers_are_known_by_their_state(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def make(words, **options):
        vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *words])}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options
        )

    one = LlavaText(make(["a", "b"]))
    assert LlavaText(make(["a", "b"])).fingerprint == one.fingerprint
    assert LlavaText(make(["a", "c"])).fingerprint != one.fingerprint
    make(["a", "b"]).save_pretrained(tmp_path / "saved")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert LlavaText(loaded).fingerprint == LlavaText(again).fingerprint


def test_a_tokenizer_that_cannot_be_told_from_others_is_refused():
    class Plain:
        bos_token_id, eos_token_id, unk_token_id, pad_token_id = 1, 2, 0, 0

        def __call__(self, text, *, add_special_tokens=True):
            return ByteTokenizer()(text, add_special_tokens=add_special_tokens)

    with pytest.raises(UsageError, match=r"Plain.*fingerprint"):
        _ = LlavaText(Plain()).fingerprint


def test_text_errors_are_caught_but_faults_of_the_code_are_not(tmp_path):
    dataset = open_dataset(write_tars(tmp_path / "data", ordinary(3), []))

    class Broken(Counting):
        def __call__(self, raw):
            raise self.error

    text = Broken(tmp_path / "asked")
    text.error = ZeroDivisionError("mine")
    with pytest.raises(ZeroDivisionError):
        token_lengths(dataset, text)
    text.error = TextError("odd")
    assert token_lengths(dataset, text).counts[0].tolist() == [-1] * 3
