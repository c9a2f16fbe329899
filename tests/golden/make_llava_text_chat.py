"""Makes llava_text_chat.json: what LLaVA and LLaVA-NeXT make of conversations with tokenizers that are not Llama's.

`llava_text.json` was made by running LLaVA with Llama's tokenizer, which says little of the templates made for others: `mpt` (a GPT-NeoX
tokenizer: byte-level, without a start token), `qwen_1_5` and `qwen_2` (the same with <|im_start|> and <|im_end|>), `llava_llama_3` (with a start token).
Here their rules are worked on small tokenizers of those kinds, trained below. This file knows nothing of `loaders`; it follows the reference's
functions in its own words:

mpt, chatml_direct (`preprocess_mpt` of haotian-liu/LLaVA c121f04): the whole prompt is tokenised, pieces between images each by itself. It is
split at <|im_end|>; the first three parts are the first round, then every two. Counting begins at 0; in each round the tokens before
the answer, less one, are masked, and the tokens of the round are added. What is left is masked. When the sum is below the maximum and is
not the number of tokens (without padding), all is masked. As the <|im_end|> between rounds is lost in the splitting and no start token makes up for
it, an ordinary conversation never adds up: LLaVA trains on nothing (haotian-liu/LLaVA#1166, #1706).

qwen, llava_llama_3 (`preprocess_qwen`, `preprocess_llama3` of LLaVA-NeXT): <image> is made a special token if the record has an image. The system message and
then each turn are rendered by the chat template and tokenised as messages of their own. Messages of user and system are masked, then the tokens
<|im_start|>, <|im_end|> and newline (198; of Llama 3 <|begin_of_text|>, <|start_header_id|>, <|end_header_id|>, <|eot_id|>; its "\\n\\n" is not
in the vocabulary under that name) are trained on wherever they stand. Last, the special token <image> becomes -200.

Run it by hand: python tests/golden/make_llava_text_chat.py. The tokenizers are written once and kept, as another version of the tokenizers library may
train others.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
MAX_LENGTH = 2048
IMAGE, IGNORED = -200, -100
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CORPUS = [
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
    "system user assistant\n\n\nWhat are the colors of the bus in the image? The bus in the image is white and red.",
    (
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the "
        "user with a variety of tasks using natural language. You are a helpful assistant. Answer the questions."
    ),
    "Would this person be more likely to be a type a or b person?\nAnswer the question using a single word or phrase.",
]


def turns(*texts: str, first: str = "human") -> list[dict[str, str]]:
    names = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]


CASES: dict[str, tuple[int, list[dict[str, str]]]] = {  # images, conversation
    "two_rounds": (
        1,
        turns(
            "<image>\nWhat are the colors of the bus in the image?",
            "The bus in the image is white and red.",
            "What feature can be seen on the back of the bus?",
            "The back of the bus features an advertisement.",
        ),
    ),
    "image_last": (1, turns("What is it?\n<image>", "A bus.")),
    "image_last_blanks": (1, turns("  What is it? <image>  ", "\n\n A bus. \n")),
    "image_first_blanks": (1, turns("<image>\nQ \n", "a")),
    "text_only": (0, turns("What is 2+2?", "4.", "And 3+3?", "6.")),
    "image_as_text": (0, turns("What does <image> do?", "It is a tag.")),
    "two_images": (2, turns("<image> or <image>?", "The first.", "Why?", "It is red.")),
    "empty_answer": (1, turns("<image>\nAnswer the question.", "")),
    "unanswered": (0, turns("What is it?", "A bus.", "Why?")),
    "gpt_first": (1, turns("Hello there.", "<image>\nQ1", "yes", first="gpt")),
    "unicode": (1, turns("<image>\n这是什么？ 😀", "日本語 ñ ﬁ")),
    "newlines": (0, turns("a\nb\n\nc", "\nd\n")),
    "end_in_text": (0, turns("Say <|im_end|> or <|eot_id|>", "no")),
    "system_turn": (
        0,
        [{"from": "human", "value": "Q"}, {"from": "system", "value": "S"}, *turns("A", first="gpt")],
    ),
    "two_questions": (0, [*turns("Q"), *turns("Q2", "A")]),
    "system_first": (0, [{"from": "system", "value": "S"}, *turns("Q", "A")]),
}


def train(special: list[str], *, start: str | None) -> Tokenizer:
    """A byte-level BPE tokenizer; special tokens come last, as in Qwen's and Llama 3's, so that the newline is token 198, as in GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if start is not None:
        number = made.token_to_id(start)
        made.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, number)]
        )
    assert made.token_to_id("Ċ") == 198
    return made


def moved(text: str, *, next_rule: bool) -> str:
    """Where `preprocess_multimodal` puts <image>."""
    count = text.count("<image>")
    if count == 0 or (next_rule and (count > 1 or text.startswith("<image>"))):
        return text
    return ("<image>\n" + text.replace("<image>", "").strip()).strip()


def from_human(conversation: list[dict[str, str]]) -> list[dict[str, str]]:
    if conversation[0]["from"] not in ("human", "gpt"):
        raise KeyError(conversation[0]["from"])
    return conversation if conversation[0]["from"] == "human" else conversation[1:]


def mpt(tokenizer: Tokenizer, system: str, images: int, conversation: list[dict[str, str]]):
    end, names = "<|im_end|>", ("<|im_start|>user\n", "<|im_start|>assistant\n")
    if images:
        conversation = [
            {**turn, "value": moved(turn["value"], next_rule=images > 1)} for turn in conversation
        ]
    prompt = f"<|im_start|>system\n{system}{end}"
    for number, turn in enumerate(from_human(conversation)):
        if turn["from"] not in ("human", "gpt"):
            raise KeyError(turn["from"])
        if turn["from"] != ("human", "gpt")[number % 2]:
            raise AssertionError(number)
        prompt += names[number % 2] + (turn["value"] + end if turn["value"] else "")

    def tokenize(text: str) -> list[int]:
        tokens: list[int] = []
        for number, piece in enumerate(text.split("<image>") if images else [text]):
            tokens += ([IMAGE] if number else []) + tokenizer.encode(piece).ids
        return tokens

    tokens = tokenize(prompt)
    trained = [True] * len(tokens)
    parts = prompt.split(end)
    position = 0
    for text in [end.join(parts[:3])] + [end.join(parts[i : i + 2]) for i in range(3, len(parts), 2)]:
        halves = text.split(end + names[1])
        if len(halves) != 2:
            break
        for place in range(position, position + len(tokenize(halves[0] + end + names[1])) - 1):
            trained[place] = False
        position += len(tokenize(text))
    for place in range(position, len(tokens)):
        trained[place] = False
    padding = tokenizer.token_to_id("<|endoftext|>")  # LLaVA pads with the unknown token, which is this one
    mismatch = position < MAX_LENGTH and position != sum(token != padding for token in tokens)
    return tokens, [False] * len(tokens) if mismatch else trained, mismatch


def messages(tokenizer: Tokenizer, system: str, render, always: set[int], images: int, conversation):
    """What qwen and llama_3 have in common; `render` is the chat template: role, text, whether it is the first message."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    if images:
        tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
        conversation = [{**turn, "value": moved(turn["value"], next_rule=True)} for turn in conversation]
    tokens = tokenizer.encode(render("system", system), add_special_tokens=False).ids
    trained = [False] * len(tokens)
    for turn in from_human(conversation):
        role = {"human": "user", "gpt": "assistant"}.get(turn["from"], turn["from"])
        encoded = tokenizer.encode(render(role, turn["value"]), add_special_tokens=False).ids
        if tokenizer.token_to_id("<|begin_of_text|>") is not None:
            encoded = encoded[1:]  # the chat template starts each list of messages
        tokens += encoded
        trained += [role not in ("user", "system")] * len(encoded)
    trained = [flag or token in always for flag, token in zip(trained, tokens, strict=True)]
    image = tokenizer.token_to_id("<image>")
    return [IMAGE if token == image else token for token in tokens], trained, False


def qwen(tokenizer: Tokenizer, images: int, conversation: list[dict[str, str]]):
    always = {198, *map(tokenizer.token_to_id, ("<|im_start|>", "<|im_end|>"))}

    def render(role: str, text: str) -> str:
        return f"<|im_start|>{role}\n{text}<|im_end|>\n"

    return messages(tokenizer, "You are a helpful assistant.", render, always, images, conversation)


def llama_3(tokenizer: Tokenizer, images: int, conversation: list[dict[str, str]]):
    names = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    system = CORPUS[2].split(" You are a helpful assistant.")[0]

    def render(
        role: str, text: str
    ) -> str:  # Meta's chat template; trim, and a start token in front of the first message
        return f"<|begin_of_text|><|start_header_id|>{role}<|end_header_id|>\n\n{text.strip()}<|eot_id|>"

    return messages(tokenizer, system, render, set(map(tokenizer.token_to_id, names)), images, conversation)


TEMPLATES = {
    "mpt": ("neox", lambda *given: mpt(given[0], CORPUS[0], *given[1:])),
    "chatml_direct": ("neox", lambda *given: mpt(given[0], "Answer the questions.", *given[1:])),
    "qwen_1_5": ("neox", qwen),
    "qwen_2": ("neox", qwen),
    "llava_llama_3": ("llama_3", llama_3),
}


def spans(trained: list[bool]) -> list[list[int]]:
    """[begin, end] of every run that is trained on."""
    edges = [
        i for i in range(len(trained) + 1) if (i < len(trained) and trained[i]) != (i > 0 and trained[i - 1])
    ]
    return [list(pair) for pair in zip(edges[::2], edges[1::2], strict=True)]


def main() -> None:
    tokenizers = {}
    for name, special, start in (("neox", CHATML, None), ("llama_3", LLAMA_3, LLAMA_3[0])):
        path = HERE / f"tokenizer_{name}.json"
        if not path.exists():
            path.write_text(train(special, start=start).to_str())
        tokenizers[name] = Tokenizer.from_file(str(path))
    rows = []
    for template, (kind, work) in TEMPLATES.items():
        for case, (images, conversation) in CASES.items():
            row = {"tokenizer": kind, "template": template, "case": case}
            try:
                tokens, trained, mismatch = work(tokenizers[kind], images, conversation)
            except (AssertionError, KeyError) as error:
                row |= {"error": type(error).__name__}
            else:
                row |= {"input_ids": tokens, "trained": spans(trained), "mismatch": mismatch}
            rows.append(row)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    cases = ",\n".join(
        f"{json.dumps(name)}: " + json.dumps({"images": images, "conversations": talk}, ensure_ascii=False)
        for name, (images, talk) in CASES.items()
    )
    content = f'{{\n"made_by": "make_llava_text_chat.py",\n"cases": {{\n{cases}\n}},\n"results": [\n{lines}\n]\n}}\n'
    (HERE / "llava_text_chat.json").write_text(content)


if __name__ == "__main__":
    main()
