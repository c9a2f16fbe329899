"""A record is read exactly, tolerantly where LLaVA's own reader is, and refused with a reason code and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardify.errors import RecordError
from shardify.prepare import prepare
from shardify.records import ImageRef, load_record, measure_record, parse_record, sample_of

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A  cat \n"}]


def record(**fields):
    return json.dumps({"id": "7", "conversations": TURNS, **fields}).encode()


def test_a_record():
    sample = parse_record(record(image="a/b.jpg", model="x"))
    assert sample.id == '"7"'
    assert sample.images == (ImageRef("a/b.jpg"),)
    assert not sample.image_is_list
    assert [turn.role for turn in sample.turns] == ["human", "gpt"]
    assert sample.turns[1].text == "A  cat \n"
    assert sample.words == 6
    assert sample.strict


@pytest.mark.parametrize("image", [None, "", [], [""], ["", ""]])
def test_no_image(image):
    assert parse_record(record(image=image)).images == ()
    assert sample_of({"image": image, "conversations": TURNS}).images == ()


def test_an_empty_path_among_others_is_no_text_only_record():
    assert parse_record(record(image=["", "a.jpg"])).images == (ImageRef(""), ImageRef("a.jpg"))


def test_several_images():
    sample = parse_record(record(image=["a.jpg", "b.png"]))
    assert sample.images == (ImageRef("a.jpg"), ImageRef("b.png"))
    assert sample.image_is_list
    assert parse_record(record(image=["a.jpg"])).image_is_list


@pytest.mark.parametrize(
    ("value", "text"), [(2327515, "2327515"), ("000123", '"000123"'), (None, "null"), (1.5, "1.5")]
)
def test_ids_keep_their_type(value, text):
    assert parse_record(record(id=value)).id == text


def test_a_record_without_id():
    assert parse_record(json.dumps({"conversations": TURNS}).encode()).id is None


@pytest.mark.parametrize(
    "data",
    [
        b'{"score": NaN, "conversations": [{"from": "human", "value": "a"}]}',
        b'\xef\xbb\xbf{"conversations": [{"from": "human", "value": "a"}]}',
        b'{"x": "\\ud800", "conversations": [{"from": "human", "value": "a"}]}',
        b'{"x": "\xed\xa0\x80", "conversations": [{"from": "human", "value": "a"}]}',
    ],
)
def test_what_only_a_tolerant_reader_takes(data):
    sample = parse_record(data)
    assert not sample.strict
    assert sample.words == 1
    assert load_record(data)["conversations"][0]["value"] == "a"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "record-not-json"),
        (b"nonsense", "record-not-json"),
        (b'{"id": }', "record-not-json"),
        (b'{"id": "\xff", "conversations": [{"from": "human", "value": "a"}]}', "record-not-json"),
        (b'{"x": "\xff", "conversations": [{"from": "human", "value": "a"}]}', "record-not-json"),
        (b"[" * 100_000, "record-not-json"),
        (b"[1]", "record-not-object"),
        (b"null", "record-not-object"),
        (b"{}", "no-conversations"),
        (record(conversations=[]), "no-conversations"),
        (record(conversations="hello"), "no-conversations"),
        (record(conversations=None), "no-conversations"),
        (record(conversations=["hello"]), "bad-turn"),
        (record(conversations=[{"from": "human"}]), "bad-turn"),
        (record(conversations=[{"from": "human", "value": 3}]), "bad-turn"),
        (record(image=3), "image-not-a-path"),
        (record(image=["a", None]), "image-not-a-path"),
        (record(image={"path": "a"}), "image-not-a-path"),
        (record(image="data:image/png;base64,iVBORw0KGgo="), "image-not-a-path"),
        (record(video="a.mp4"), "record-video"),
        (record(videos=["a.mp4"], image=None), "record-video"),
        (record(audio={"path": "a.wav"}, image=""), "record-audio"),
        (record(image="livevqc/A001.MP4"), "record-video"),
        (record(image=["a.jpg", "b.webm"]), "record-video"),
        (record(image="a.b/c.flac"), "record-audio"),
        (b'{"video": "a.mp4", "score": NaN}', "record-video"),
    ],
)
def test_what_is_refused(data, code):
    with pytest.raises(RecordError) as error:
        parse_record(data)
    assert error.value.code == code


def test_a_video_beside_an_image_is_no_reason():
    assert parse_record(record(video="a.mp4", image="a.jpg")).images == (ImageRef("a.jpg"),)
    assert parse_record(record(video=None, audio="")).images == ()
    assert parse_record(record(image="mp4")).images == (ImageRef("mp4"),)


def test_qaligns_videos(real_data):
    from shardify.sources.llava import split_records

    for name, code in (("test_jsons/konvid.json", "record-video"), ("ft/livec/train_split_1.json", None)):
        path = real_data / "qalign_json" / name
        content, file = path.read_bytes(), split_records(path)
        for offset, length in zip(file.offsets.tolist(), file.lengths.tolist(), strict=True):
            try:
                prepare(content[offset : offset + length])
            except RecordError as error:
                assert error.code == code
            else:
                assert code is None


@given(data=st.binary(max_size=60) | st.text(max_size=40).map(lambda text: f'{{"id": {text}}}'.encode()))
def test_any_bytes_are_a_sample_or_a_reason(data):
    try:
        parse_record(data)
    except RecordError as error:
        assert error.code


@given(
    id_=st.none() | st.integers() | st.text(),
    image=st.none()
    | st.text()
    | st.lists(st.text() | st.sampled_from(["a.jpg", "a.mp4", "data:x"]), max_size=3),
    turns=st.lists(st.fixed_dictionaries({"from": st.text(), "value": st.text()}), min_size=1, max_size=4),
)
def test_both_readers_agree(id_, image, turns):
    value = {"id": id_, "image": image, "conversations": turns}
    found = []
    for read in (lambda: parse_record(json.dumps(value).encode()), lambda: sample_of(value)):
        try:
            found.append(read())
        except RecordError as error:
            found.append((error.code, error.detail))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a.jpg", ("a.jpg",)),
        ("./a//b/c d+é.JPG", ("a", "b", "c d+é.JPG")),
        ("a\\b.jpg", ("a", "b.jpg")),
        ("a/...", ("a", "...")),
    ],
)
def test_image_paths(path, parts):
    assert ImageRef(path).parts() == parts


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "a\\..\\b.jpg", "C:\\a.jpg", "a\0b", ".", "/"]
)
def test_unsafe_image_paths(path):
    with pytest.raises(RecordError) as error:
        ImageRef(path).parts()
    assert error.value.code == "image-path-unsafe"


def check_measured(data):
    """What an index tells is what the record says; both refuse it, or neither."""
    try:
        sample = parse_record(data)
    except RecordError:
        with pytest.raises(RecordError):
            measure_record(memoryview(data))
    else:
        expected = (sample.id, len(sample.turns), sample.words, sample.strict)
        assert measure_record(memoryview(data)) == measure_record(data) == expected


@given(
    id_=st.none() | st.text(max_size=5) | st.integers() | st.floats(),
    image=st.sampled_from(
        [None, "", "a.jpg", "a.mp4", "b", 3, [], ["a.jpg"], ["", "a.jpg"], ["a.mp4"], "data:x"]
    ),
    turns=st.none()
    | st.lists(
        st.builds(
            lambda role, value: {"from": role, "value": value},
            st.text(max_size=3),
            st.text(max_size=20) | st.none(),
        ),
        max_size=3,
    ),
    more=st.dictionaries(
        st.sampled_from(["video", "audio_path", "model", "videos"]), st.sampled_from(["", "x", None, [], 0])
    ),
    ascii_=st.booleans(),
)
def test_what_an_index_tells_is_what_the_record_says(id_, image, turns, more, ascii_):
    written = {"id": id_, "image": image, "conversations": turns, **more}
    check_measured(json.dumps(written, ensure_ascii=ascii_).encode("utf-8", "surrogatepass"))
    written.pop("image")
    check_measured(json.dumps(written, ensure_ascii=ascii_).encode("utf-8", "surrogatepass"))


@given(data=st.binary(max_size=60))
def test_an_index_reads_any_bytes(data):
    check_measured(data)
    check_measured(b'{"\\u0063onversations": [{"from": "a", "value": "b c"}], "x": "' + data + b'"}')


@given(st.text("ab./\\:\0\n é", max_size=8) | st.text(max_size=12))
def test_the_name_of_an_image_is_its_parts_joined(path):
    image = ImageRef(path)
    try:
        parts = image.parts()
    except RecordError as error:
        with pytest.raises(RecordError) as same:
            image.name()
        assert (same.value.code, same.value.detail) == (error.code, error.detail)
    else:
        assert image.name() == "/".join(parts)
