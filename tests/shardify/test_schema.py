"""Records in other schemas become LLaVA's: nothing is lost or invented, and what is LLaVA's already stays as it is."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardify.errors import RecordError
from shardify.prepare import prepare
from shardify.records import ImageRef, load_record
from shardify.schema import HINTS, to_llava

ASK = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "A cat."}


def part(path, kind="image_url"):
    return {"type": kind, kind: {"url": path}}


def text(value):
    return {"type": "text", "text": value}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def converted(record):
    new, notes = to_llava(record)
    assert (
        prepare(json.dumps(record).encode()).raw
        == json.dumps(new, separators=(",", ":"), ensure_ascii=False).encode()
    )
    return new, notes


def refused(record):
    with pytest.raises(RecordError) as error:
        prepare(json.dumps(record).encode())
    return error.value.code


def test_messages_become_turns():
    record = {"id": 7, "messages": [ASK, ANSWER, ASK, ANSWER], "source": "x"}
    new, notes = converted(record)
    assert list(new) == ["id", "conversations", "source"]
    assert (
        new["conversations"]
        == [
            {"from": "human", "value": "What is it?"},
            {"from": "gpt", "value": "A cat."},
        ]
        * 2
    )
    assert notes == ("record-messages",)


def test_images_stand_where_their_parts_stood():
    record = {
        "messages": [
            user(part("a.jpg"), text("What is it?")),
            ANSWER,
            user(text("And "), text("this:"), part("b.png", "image"), text("a dog?")),
            ANSWER,
        ]
    }
    new, _ = converted(record)
    assert new["image"] == ["a.jpg", "b.png"]
    assert [turn["value"] for turn in new["conversations"][::2]] == [
        "<image>\nWhat is it?",
        "And this:\n<image>\na dog?",
    ]


@pytest.mark.parametrize(
    "shape",
    [
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "image_url", "image_url": "a.jpg"},
        {"type": "image", "image": "a.jpg"},
        {"type": "image", "image": {"path": "a.jpg"}},
        {"type": "image", "path": "a.jpg"},
        {"type": "image", "url": "a.jpg"},
        {"type": "input_image", "image_url": "a.jpg"},
        {"image": "a.jpg"},
        {"type": "image_url", "image_url": {"url": "a.jpg"}, "text": None, "index": None},
    ],
)
def test_every_way_to_name_an_image(shape):
    new, _ = converted({"messages": [user(shape, text("?")), ANSWER]})
    assert new["image"] == "a.jpg"
    assert new["conversations"][0]["value"] == "<image>\n?"
    assert "image_info" not in new


@pytest.mark.parametrize("token", ["<image>", "<IMG_CONTEXT>"])
def test_a_text_that_says_where_its_images_stand_is_believed(token):
    new, _ = converted(
        {"messages": [user(part("a.jpg"), part("b.jpg"), text(f"x {token} y {token}")), ANSWER]}
    )
    assert new["conversations"][0]["value"] == "x <image> y <image>"
    assert new["image"] == ["a.jpg", "b.jpg"]


def test_what_a_part_says_beside_its_path_survives():
    record = {
        "messages": [
            user(
                {"type": "image_url", "image_url": {"url": "a.jpg", "image_wh": [375, 500]}},
                part("b.jpg"),
                {"type": "text", "text": "?", "lang": "en"},
            ),
            {**ANSWER, "weight": 0},
        ]
    }
    new, _ = converted(record)
    assert new["image_info"] == [{"image_wh": [375, 500]}, {}]
    assert new["conversations"][0]["lang"] == "en"
    assert new["conversations"][1] == {"from": "gpt", "value": "A cat.", "weight": 0}


def test_a_leading_system_message_is_no_turn():
    system = {"role": "system", "content": "Be brief."}
    new, _ = converted({"id": 1, "messages": [system, ASK, ANSWER]})
    assert new["system_prompt"] == "Be brief."
    assert [turn["from"] for turn in new["conversations"]] == ["human", "gpt"]
    assert converted({"id": 1, "messages": [{**system, "role": "developer"}, ASK, ANSWER]})[0] == new
    # never in the place of another; elsewhere it is a turn, which is counted as an unknown role
    new, _ = converted({"system_prompt": "Own.", "messages": [system, ASK, system, ANSWER]})
    assert (new["system_prompt"], new["system_prompt_"]) == ("Own.", "Be brief.")
    assert [turn["from"] for turn in new["conversations"]] == ["human", "system", "gpt"]


@pytest.mark.parametrize(
    ("field", "value", "image"),
    [
        ("input_image", "a.jpg", "a.jpg"),
        ("image_path", "a.jpg", "a.jpg"),
        ("img", "a.jpg", "a.jpg"),
        ("images", ["a.jpg"], ["a.jpg"]),
        ("images", ["a.jpg", "b.jpg"], ["a.jpg", "b.jpg"]),
        ("images", [{"bytes": None, "path": "a.jpg"}], ["a.jpg"]),
        ("image_paths", [{"url": "a.jpg"}], ["a.jpg"]),
    ],
)
def test_an_image_under_another_name(field, value, image):
    turns = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "!"}]
    new, notes = converted({"id": 1, "image": None, field: value, "conversations": turns, "x": 1})
    assert new == {"id": 1, "image": image, "conversations": turns, "x": 1}
    assert list(new) == ["id", "image", "conversations", "x"]
    assert notes == ("record-image-field",)


def test_a_list_of_images_beside_messages():
    record = {
        "messages": [user({"type": "image"}, text("?"), {"type": "image"}), ANSWER],
        "images": ["a.jpg", "b.jpg"],
    }
    new, notes = converted(record)
    assert new["image"] == ["a.jpg", "b.jpg"]
    assert new["conversations"][0]["value"] == "<image>\n?\n<image>"
    assert notes == ("record-messages", "record-image-field")
    marked = {"messages": [{"role": "user", "content": "<image>what?"}, ANSWER], "images": ["a.jpg"]}
    assert converted(marked)[0]["conversations"][0]["value"] == "<image>what?"


def test_the_cauldrons_texts_become_turns():
    texts = [{"user": "What is it?", "assistant": "A cat.", "source": "COCO"}]
    new, notes = converted({"images": ["a.jpg", "b.jpg"], "texts": texts, "rating": 5})
    assert list(new) == ["image", "conversations", "rating"]
    assert new["conversations"] == [
        {"from": "human", "value": "<image>\n<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat.", "source": "COCO"},
    ]
    assert notes == ("record-messages", "record-image-field")
    # texts that are no such pairs are a field as any other
    assert to_llava({"texts": ["a"], "conversations": []}) is None
    assert refused({"texts": [{"user": None, "assistant": "x"}]}) == "bad-turn"


def test_how_many_images_there_are_is_no_image():
    raw = json.dumps({"images": 2, "conversations": [{"from": "human", "value": "?"}]}).encode()
    assert prepare(raw).raw is raw


def test_turns_with_roles_under_llavas_name():
    new, _ = converted({"conversations": [ASK, ANSWER], "messages": "kept", "image": "a.jpg"})
    assert new["conversations"][1] == {"from": "gpt", "value": "A cat."}
    assert (new["image"], new["messages"]) == ("a.jpg", "kept")


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "?"}]},
        {
            "image": "a.jpg",
            "images": ["b.jpg"],
            "messages": [],
            "conversations": [{"from": "human", "value": "?"}],
        },
        {"images": [], "image_path": "", "conversations": [{"from": "human", "value": "?"}]},
        {"output_image": "a.jpg", "conversations": [{"from": "gpt", "value": "<image>"}]},
    ],
)
def test_llavas_own_records_stay_as_they_are(record):
    raw = json.dumps(record, indent=1).encode()
    assert to_llava(record) is None
    assert prepare(raw).raw is raw
    assert prepare(raw).notes == ()


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"messages": []}, "no-conversations"),
        ({"messages": "hello"}, "no-conversations"),
        ({"messages": None}, "no-conversations"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no-conversations"),
        ({"messages": ["hello"]}, "bad-turn"),
        ({"messages": [{"content": "x"}]}, "bad-turn"),
        ({"messages": [{"role": 1, "content": "x"}]}, "bad-turn"),
        ({"messages": [{"role": "user"}]}, "bad-turn"),
        ({"messages": [{"role": "user", "content": 3}]}, "bad-turn"),
        ({"messages": [{"role": "user", "content": {"type": "text"}}]}, "bad-turn"),
        ({"messages": [user({"type": "file", "file": "x"})]}, "bad-turn"),
        ({"messages": [user(3)]}, "bad-turn"),
        ({"messages": [user({"type": []})]}, "bad-turn"),
        ({"messages": [user({"type": "image"}), ANSWER]}, "bad-turn"),
        ({"images": ["a.jpg"], "messages": [user(part("a.jpg"), part("b.jpg"))]}, "bad-turn"),
        ({"messages": [user(part("data:image/png;base64,iVBORw0KGgo="))]}, "image-not-a-path"),
        ({"messages": [user({"type": "image", "image": 3})]}, "image-not-a-path"),
        ({"images": [3], "messages": [ASK, ANSWER]}, "image-not-a-path"),
        ({"messages": [user(part("v.mp4", "video_url")), ANSWER]}, "record-video"),
        ({"messages": [user(part("v.mp4")), ANSWER]}, "record-video"),
        (
            {"messages": [user({"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}})]},
            "record-audio",
        ),
        ({"img_path": "3339962845.mp4", "gt_score": 4.64}, "record-video"),
    ],
)
def test_what_is_refused(record, code):
    assert refused(record) == code


def test_a_video_beside_an_image():
    new, _ = converted({"messages": [user(part("a.jpg"), part("v.mp4", "video_url"), text("?")), ANSWER]})
    assert (new["image"], new["video"]) == ("a.jpg", "v.mp4")
    assert new["conversations"][0]["value"] == "<image>\n<video>\n?"


def test_a_bare_list_of_messages():
    prepared = prepare(json.dumps([ASK, ANSWER]).encode())
    assert [turn.text for turn in prepared.sample.turns] == ["What is it?", "A cat."]
    assert prepared.notes == ("record-messages",)
    assert refused([1, 2]) == "record-not-object"


@pytest.mark.parametrize(
    ("value", "strict"),
    [("NaN", False), ('"\\ud800"', False), ("123456789012345678901234567890", True), ("null", True)],
)
def test_odd_values_survive_the_change(value, strict):
    raw = f'{{"x": {value}, "messages": [{{"role": "user", "content": "é"}}]}}'.encode()
    prepared = prepare(raw)
    assert prepared.sample.strict == strict
    assert str(load_record(prepared.raw)["x"]) == str(json.loads(value))


WORDS = st.text(st.sampled_from("ab é\n<>"), max_size=6).filter(lambda value: "<" not in value)
PATHS = st.text(st.sampled_from("abc/"), min_size=1, max_size=5).map(lambda value: f"{value}.jpg")
PARTS = st.one_of(WORDS.map(text), PATHS.map(part))
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]), "content": WORDS | st.lists(PARTS, max_size=4)}
    ),
    min_size=1,
    max_size=4,
)


@given(messages=MESSAGES, extra=st.dictionaries(st.sampled_from(["id", "x", "conversations_"]), WORDS))
def test_nothing_is_lost_or_invented(messages, extra):
    new, _ = to_llava({**extra, "messages": messages})
    parts = [
        [text(message["content"])] if isinstance(message["content"], str) else message["content"]
        for message in messages
    ]
    paths = [p["image_url"]["url"] for several in parts for p in several if p["type"] == "image_url"]
    given_image = new.get("image", [])
    assert ([given_image] if isinstance(given_image, str) else given_image) == paths
    assert sum(turn["value"].count("<image>") for turn in new["conversations"]) == len(paths)
    for several, turn in zip(parts, new["conversations"], strict=True):
        said = Counter("".join(p["text"] for p in several if p["type"] == "text").replace("\n", ""))
        assert Counter(turn["value"].replace("<image>", "").replace("\n", "")) == said
    assert {name: new[name] for name in extra} == extra
    sample = prepare(json.dumps({**extra, "messages": messages}).encode()).sample
    assert sample.images == tuple(map(ImageRef, paths))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["a.jpg", "text", "user", "image"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "messages",
                    "conversations",
                    "role",
                    "content",
                    "type",
                    "image",
                    "images",
                    "text",
                    "url",
                    "from",
                    "value",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(value=JSON)
def test_any_json_is_a_sample_or_a_reason(value):
    try:
        prepare(json.dumps(value).encode())
    except RecordError as error:
        assert error.code


def test_what_is_nested_as_deeply_as_can_be_read():
    # the depth at which it ends depends on how deep the caller is
    for levels in (*range(800, 1001), 100_000):
        inner = "[" * levels + "]" * levels
        raw = f'{{"id": null, "messages": [{{"role": "user", "content": "?"}}], "deep": {inner}}}'.encode()
        try:
            assert prepare(raw).sample.id == "null"
        except RecordError as error:
            assert error.code in ("record-not-json", "no-conversations")


def test_every_field_that_is_looked_for_is_hinted_at():
    for field in ("messages", "images", "input_image", "image_path", "image_paths", "img", "img_path"):
        assert f'"{field}"'.encode() in HINTS


def test_xtuners_records(real_data):
    from shardify.sources.llava import split_records

    found = Counter()
    for path in sorted((real_data / "xtuner_resource").glob("*.jsonl")):
        content = path.read_bytes()
        file = split_records(path)
        for offset, length in zip(file.offsets.tolist(), file.lengths.tolist(), strict=True):
            prepared = prepare(content[offset : offset + length])
            assert "record-messages" in prepared.notes
            tokens = sum(turn.text.count("<image>") for turn in prepared.sample.turns)
            assert tokens == len(prepared.sample.images)
            assert all(
                (real_data / "xtuner_resource" / image.path.removeprefix("resource/")).exists()
                for image in prepared.sample.images
            )
            found["text" if not tokens else "several" if prepared.sample.image_is_list else "one"] += 1
    assert found.total() == sum(
        bool(line.strip())
        for path in (real_data / "xtuner_resource").glob("*.jsonl")
        for line in path.open(encoding="utf-8")
    )
    assert all(found.values())
    assert len(found) == 3


def test_nextgpts_records(real_data):
    for record in json.loads((real_data / "nextgpt_cc3m" / "cc3m_comprehension.json").read_text()):
        prepared = prepare(json.dumps(record).encode())
        assert prepared.sample.images == (ImageRef(record["input_image"]),)
        assert prepared.notes == ("record-image-field",)
        assert json.loads(prepared.raw)["conversations"] == record["conversations"]
