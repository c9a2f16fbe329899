"""What does text cost: a record alone, and within the loader at 336 crop?

    python -m benchmarks.text [--rounds 7]

Seconds are processor time of this process, which does all the work (`num_workers=0`), so that other work on the machine counts for little. The
loader's samples are a picture and a conversation each. Texts are those of $SHARDIFY_REAL_DATA/real_mix.json (ShareGPT- and Alpaca-like, 750 bytes a record
on average), or else made of common words to the same length; LLaVA's 665K mixture has about 1,550 bytes a record, so there are
conversations of two of them, too. The tokenizer is Llama's where it is there, or else Mistral's first, from the package mistral-common.
"""

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import runner
from loaders import ImageTransform, LlavaText, StreamingLoader
from loaders.text import ByteTokenizer, JsonTokenizer, SentencePieceTokenizer, make_tokenizer
from shardify.convert import PackOptions, pack_dataset

BATCH = 32
AT_MOST = 0.15  # of the loader's time a sample without text
REAL = Path(os.environ.get("SHARDIFY_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
]

Turns = list[dict[str, str]]


def conversations(count: int) -> list[Turns]:
    """`count` conversations of a question and an answer."""
    path = REAL / "real_mix.json"
    if path.exists():
        talks = [record["conversations"] for record in json.loads(path.read_text()) if "image" not in record]
        return list(itertools.islice(itertools.cycle(talks), count))
    drawn = random.Random(0)
    return [
        [
            {"from": role, "value": " ".join(drawn.choices(WORDS, k=words))}
            for role, words in (("human", 20), ("gpt", 120))
        ]
        for _ in range(count)
    ]


def pictured(talks: list[Turns]) -> Turns:
    """One conversation with an image, of several."""
    turns = [dict(turn) for talk in talks for turn in talk]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return turns


def sentence_piece() -> SentencePieceTokenizer | None:
    """Llama's tokenizer, or a free one of its kind."""
    places = [REAL / "tokenizers" / "llama2_sp" / "tokenizer.model"]
    places.append(Path(sys.prefix, "models", "mistral_common", "data", "tokenizer.model.v1"))
    return next((SentencePieceTokenizer(place) for place in places if place.exists()), None)


def texts() -> dict[str, LlavaText]:
    """What is measured, by name."""
    chat = JsonTokenizer(GOLDEN / "tokenizer_neox.json", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made = {
        "bytes, v1": LlavaText(ByteTokenizer()),
        "tokenizer.json, qwen_2": LlavaText(chat, template="qwen_2"),
    }
    llama = sentence_piece()
    if llama is not None:
        made |= {
            f"SentencePiece, {name}": LlavaText(llama, template=name) for name in ("plain", "v1", "llama_2")
        }
    return made


def alone(*, rounds: int) -> runner.Comparison:
    """Microseconds a record."""
    talks = conversations(600)
    once = [json.dumps({"image": "a.jpg", "conversations": pictured([talk])}).encode() for talk in talks]
    twice = [
        json.dumps({"image": "a.jpg", "conversations": pictured(list(pair))}).encode()
        for pair in zip(talks[::2], talks[1::2], strict=True)
    ]
    short = [
        json.dumps(
            {
                "image": "a.jpg",
                "conversations": pictured([[{**q, "value": "What is it?"}, {**a, "value": "A red bus."}]]),
            }
        ).encode()
        for q, a in (talk[:2] for talk in talks)
    ]
    contenders: dict[str, Callable[[], float]] = {}
    for name, text in texts().items():
        kinds = (
            {"short": short}
            if "plain" in name
            else {"short": short, "one exchange": once, "two exchanges": twice}
        )
        for kind, records in kinds.items():
            contenders[f"{name}, {kind}"] = lambda text=text, records=records: per_record(text, records)
    for measure in contenders.values():
        measure()  # so that every tokenizer has met the words once
    sizes = {
        kind: round(sum(map(len, r)) / len(r))
        for kind, r in (("short", short), ("one", once), ("two", twice))
    }
    runner.headline(f"Text alone, microseconds of processor time a record; bytes a record: {sizes}")
    comparison = runner.interleave(contenders, rounds=rounds, unit="us/record")
    print(runner.table(comparison, reference=next(iter(contenders))))
    runner.save_part("text", "alone", {"bytes": sizes, **runner.described(comparison)})
    return comparison


def per_record(text: LlavaText, records: list[bytes]) -> float:
    begin = time.process_time()
    for record in records:
        text(record)
    return (time.process_time() - begin) / len(records) * 1e6


def within(*, rounds: int, samples: int) -> runner.Comparison:
    """Microseconds a sample of the loader with and without text."""
    described, pictures = runner.photos()
    llama = sentence_piece() or make_tokenizer("bytes")
    with TemporaryDirectory() as folder:
        data, size = write_data_set(Path(folder), pictures)
        runner.headline(
            f"Within the loader: {described}, 336 crop, {size:,} bytes of text a sample, one process"
        )
        streams = {"records": endless(data, None), "v1": endless(data, LlavaText(llama))}
        for stream in streams.values():
            per_sample(stream, samples)
        contenders = {name: lambda s=stream: per_sample(s, samples) for name, stream in streams.items()}
        comparison = runner.interleave(contenders, rounds=rounds, unit="us/sample")
    share = round(comparison.ratio("v1", "records") - 1, 3)
    print(runner.table(comparison, reference="records"))
    print(f"  text adds {share:.1%}; at most {AT_MOST:.0%} is wanted{'' if share <= AT_MOST else ': MISSED'}")
    facts: Mapping[str, Any] = {
        "data": described,
        "bytes": size,
        "adds": share,
        "at_most": AT_MOST,
        "batch": BATCH,
    }
    runner.save_part("text", "within the loader", {**facts, **runner.described(comparison)})
    return comparison


def write_data_set(folder: Path, pictures: list[bytes]) -> tuple[Path, int]:
    """A sample of each picture, of one exchange and of two in turn: near the length of LLaVA's; and the bytes of a record."""
    images = folder / "images"
    images.mkdir(parents=True)
    talks = iter(conversations(2 * len(pictures)))
    records = []
    for number, picture in enumerate(pictures):
        name = f"{number:05d}.jpg"
        (images / name).write_bytes(picture)
        turns = pictured(list(itertools.islice(talks, 1 + number % 2)))
        records.append({"id": f"{number:09d}", "image": name, "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    pack_dataset(PackOptions(records=[folder / "chat.json"], images=[images], out=folder / "data", shards=2))
    return folder / "data", (folder / "chat.json").stat().st_size // len(records)


def endless(data: Path, text: LlavaText | None) -> Iterator[int]:
    """The sizes of batches, for ever."""
    loader = StreamingLoader(
        str(data),
        batch_size=BATCH,
        image=ImageTransform(336, fit="crop"),
        text=text,
        num_workers=0,
        rank=0,
        world_size=1,
    )
    while True:
        for batch in loader:
            yield len(batch.keys)


def per_sample(stream: Iterator[int], samples: int) -> float:
    begin, seen = time.process_time(), 0
    while seen < samples:
        seen += next(stream)
    return (time.process_time() - begin) / seen * 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=256)
    arguments = parser.parse_args()
    alone(rounds=arguments.rounds)
    within(rounds=arguments.rounds, samples=arguments.samples)
