"""What is odd about a record is named, and only that."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardify.audit import KEEPABLE, NOTES, REASONS, make_policies
from shardify.errors import UsageError
from shardify.prepare import prepare
from shardify.quirks import conversation_notes, id_notes


def notes_of(turns, image=None, id_="a1"):
    fields = {"id": id_, "conversations": [{"from": role, "value": text} for role, text in turns]}
    if image is not None:
        fields["image"] = image
    sample = prepare(json.dumps(fields).encode()).sample
    return {*conversation_notes(sample), *id_notes(sample.id)}


ASKED = ("human", "<image>\nWhat is it?")
TOLD = ("gpt", "A bus.")


@pytest.mark.parametrize(
    ("turns", "image", "expected"),
    [
        ([ASKED, TOLD], "a.jpg", set()),
        ([("human", "What is it?\n<image>"), TOLD], "a.jpg", set()),
        ([ASKED, TOLD, ("human", "And?"), TOLD], "a.jpg", set()),
        ([("human", "What is it?"), TOLD], None, {"text-only"}),
        ([("human", "What is <image>?"), TOLD], None, {"text-only", "image-token-without-image"}),
        ([("human", "What is it?"), TOLD], "a.jpg", {"image-tokens-missing"}),
        ([("human", "<image><image>What?"), TOLD], "a.jpg", {"image-token-repeated"}),
        ([ASKED, TOLD, ("human", "And <image>?"), TOLD], "a.jpg", {"image-tokens-exceed-images"}),
        ([("human", "What?"), ("gpt", "<image> a bus")], "a.jpg", {"image-in-answer"}),
        ([ASKED, ("gpt", "the <image>")], "a.jpg", {"image-in-answer", "image-tokens-exceed-images"}),
        ([("human", "<image>\n<image>\nWhich?"), TOLD], ["a.jpg", "b.jpg"], set()),
        ([("human", "<image>\nWhich?"), TOLD], ["a.jpg", "b.jpg"], {"image-tokens-missing"}),
        ([ASKED, ("gpt", "")], "a.jpg", {"answer-empty"}),
        ([ASKED, TOLD, ("human", ""), TOLD], "a.jpg", {"turn-empty"}),
        ([("human", ""), ("gpt", "")], None, {"text-only", "answer-empty", "turn-empty", "no-words"}),
        ([("gpt", "Hello."), ASKED, TOLD], "a.jpg", {"first-turn-not-human"}),
        ([("human", "Hi."), ASKED, TOLD], "a.jpg", {"roles-not-alternating"}),
        ([("system", "Be kind."), ASKED, TOLD], "a.jpg", {"first-turn-not-human", "unknown-role"}),
        ([ASKED, ("old-model", "A bus.")], "a.jpg", {"unknown-role", "last-turn-not-answer"}),
        ([ASKED, TOLD, ("human", "And?")], "a.jpg", {"last-turn-not-answer"}),
        ([ASKED, ("gpt", "A bus.</s>")], "a.jpg", {"template-marker-in-text"}),
        ([ASKED, ("gpt", "He said ASSISTANT: bus")], "a.jpg", {"template-marker-in-text"}),
        ([ASKED, ("gpt", "a <unk> bus")], "a.jpg", {"template-marker-in-text"}),
        ([ASKED, ("gpt", "use [/INST] here")], "a.jpg", {"template-marker-in-text"}),
        ([ASKED, ("gpt", "<|im_end|>")], "a.jpg", {"template-marker-in-text"}),
        ([ASKED, ("gpt", " A bus. ")], "a.jpg", {"blanks-around-text"}),
        ([ASKED, ("gpt", "A bus. QA_GT_caption_based_noisy")], "a.jpg", {"noisy-marker"}),
        ([ASKED, ("gpt", "word " * 2048 + "word")], "a.jpg", {"text-long"}),
    ],
)
def test_conversations(turns, image, expected):
    assert notes_of(turns, image) == expected


@pytest.mark.parametrize(
    ("id_", "expected"),
    [
        ("000000033471", set()),
        ("wgByO4Y_0", set()),
        ("bar_train_00157767.png", {"id-has-dot"}),
        ("VG_100K/2317533", {"id-has-slash"}),
        ("agi-cgi/game_0967.jpg->1.57 ", {"id-has-slash", "id-has-dot"}),
        (".hidden", {"id-has-dot"}),
        (2327515, {"id-not-text"}),
        (1.5, {"id-not-text", "id-has-dot"}),
        (None, {"id-missing"}),
        ("a\\u002fb", set()),  # a backslash is no slash
        ("é", set()),
    ],
)
def test_ids(id_, expected):
    assert notes_of([ASKED, TOLD], "a.jpg", id_) == expected


def test_a_slash_in_an_id_is_seen_however_it_is_escaped():
    assert id_notes('"VG\\u002F1"') == ["id-has-slash"]
    assert id_notes('"VG\\/1"') == ["id-has-slash"]
    assert id_notes('"a\\u002eb"') == ["id-has-dot"]


@given(st.lists(st.tuples(st.sampled_from(["human", "gpt", "system"]), st.text()), min_size=1))
def test_any_conversation_has_known_notes_once(turns):
    fields = {"conversations": [{"from": role, "value": text} for role, text in turns], "image": "a.jpg"}
    sample = prepare(json.dumps(fields).encode()).sample
    notes = conversation_notes(sample)
    assert len(notes) == len(set(notes))
    assert set(notes) <= set(NOTES)
    assert ("last-turn-not-answer" in notes) == (turns[-1][0] != "gpt")


def test_policies():
    policies = make_policies(["answer-empty=set-aside", "image-truncated=keep", "image-missing=fail"])
    assert [policies.action(code) for code in ("answer-empty", "image-truncated", "image-missing")] == [
        "set-aside",
        "keep",
        "fail",
    ]
    assert policies.action("id-repeated") == "keep"
    assert policies.action("bad-turn") == "set-aside"
    assert make_policies([], on_bad="fail").action("bad-turn") == "fail"
    assert make_policies([], on_bad="fail").action("text-only") == "keep"
    assert make_policies(["bad-turn=set-aside"], on_bad="fail").action("bad-turn") == "set-aside"


@pytest.mark.parametrize(
    "text", ["no-such-code=keep", "bad-turn", "bad-turn=drop", "image-missing=keep", "=keep"]
)
def test_policies_that_make_no_sense_are_refused(text):
    with pytest.raises(UsageError, match="--policy"):
        make_policies([text])


def test_what_can_be_kept_is_a_reason():
    assert set(REASONS) >= KEEPABLE
    assert not set(REASONS) & set(NOTES)
