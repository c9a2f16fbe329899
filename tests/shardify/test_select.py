import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardify.errors import UsageError
from shardify.format.sidecar import SCHEMA
from shardify.select import COLUMNS, parse_filter

FORMATS = ["jpg", "png", "webp"]
WORDS = ["coco/a.json", "vg", "", "ä", "jpg"]
IDS = ["000123", "café", 'quo"te', "", 0, 12, 2327515, None]


def table_of(rows):
    """A sidecar of rows (dicts with the values that a filter sees)."""
    columns = {name: [] for name in SCHEMA.names}
    for row in rows:
        for name in ("key", "source", "record", "size", "turns", "words"):
            columns[name].append(row[name])
        columns["id"].append(row["id"])
        columns["offset"].append(0)
        columns["members"].append([])
        columns["images"].append(
            [{"field": "x", "format": kind, "width": w, "height": h} for kind, w, h in row["images"]]
        )
    return pa.table(columns, schema=SCHEMA)


def seen_by_python(row):
    """What Python's own eval is given for a row."""
    largest = max(row["images"], key=lambda image: image[1] * image[2], default=("", 0, 0))
    id_ = json.loads(row["id"]) if row["id"] is not None else None
    values = {**row, "images": len(row["images"]), "id": id_}
    return values | dict(zip(("format", "width", "height"), largest, strict=True))


def safe(compare):
    """What cannot be computed compares as false."""
    try:
        return compare()
    except ZeroDivisionError:
        return False


sizes = st.one_of(st.integers(0, 5), st.integers(0, 2**31 - 1))
rows = st.fixed_dictionaries(
    {
        "key": st.sampled_from(WORDS),
        "source": st.sampled_from(WORDS),
        "id": st.one_of(
            st.none(),
            st.sampled_from(IDS).map(json.dumps),  # escaped, as some writers do
            st.sampled_from(IDS).map(lambda value: json.dumps(value, ensure_ascii=False)),
        ),
        "record": st.one_of(sizes, st.integers(0, 2**62)),
        "size": st.one_of(sizes, st.integers(0, 2**40)),
        "turns": sizes,
        "words": sizes,
        "images": st.lists(st.tuples(st.sampled_from(FORMATS), sizes, sizes), max_size=3),
    }
)
numeric_columns = st.sampled_from(["record", "size", "turns", "words", "images", "width", "height"])
text_columns = st.sampled_from(["key", "source", "format"])
literals = st.one_of(
    st.integers(0, 5),
    st.integers(-(2**70), 2**70),
    st.floats(-1e6, 1e6).map(float),
    st.sampled_from([0.5, 2.0, 2**53 + 1]),
)
numbers = st.recursive(
    st.one_of(numeric_columns, literals.map(repr)),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner),
        st.builds("(-{})".format, inner),
    ),
    max_leaves=4,
)
texts = st.one_of(text_columns, st.sampled_from([*WORDS, *FORMATS]).map(repr))
signs = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
comparisons = st.one_of(
    st.builds("{} {} {}".format, numbers, signs, numbers),
    st.builds("{} {} {} {} {}".format, numbers, signs, numbers, signs, numbers),
    st.builds("{} {} {}".format, texts, signs, texts),
    st.builds(
        "{} {} {!r}".format, numbers, st.sampled_from(["in", "not in"]), st.lists(literals, max_size=4)
    ),
    st.builds(
        "{} {} {!r}".format, texts, st.sampled_from(["in", "not in"]), st.lists(st.sampled_from(WORDS))
    ),
    st.builds("{!r} {} {}".format, st.sampled_from(["a", "j", ""]), st.sampled_from(["in", "not in"]), texts),
    st.builds("id {} {!r}".format, st.sampled_from(["==", "!="]), st.sampled_from(IDS)),
    st.builds("id {} {!r}".format, st.sampled_from(["in", "not in"]), st.lists(st.sampled_from(IDS))),
    st.sampled_from(["id is None", "None is not id", "images", "not words", "not format"]),
)
# our text, and the same for Python with every comparison made safe
conditions = st.recursive(
    comparisons.map(lambda text: (text, f"safe(lambda: {text})")),
    lambda inner: st.one_of(
        st.builds(
            lambda a, how, b: tuple(f"({x} {how} {y})" for x, y in zip(a, b, strict=True)),
            inner,
            st.sampled_from(["and", "or"]),
            inner,
        ),
        inner.map(lambda pair: tuple(f"(not {text})" for text in pair)),
    ),
    max_leaves=4,
)


@settings(max_examples=400)
@given(st.lists(rows, min_size=1, max_size=6), conditions)
def test_a_filter_says_what_python_says(some, condition):
    ours, theirs = condition
    found = parse_filter(ours).matches(table_of(some)).tolist()
    expected = [bool(eval(theirs, {"safe": safe, **seen_by_python(row)})) for row in some]
    assert found == expected


@given(st.text(max_size=30) | st.text("wid()[]'\"+-*/<>=!,. \\andortinkey0123456789&|~:{}@", max_size=40))
def test_any_text_is_a_filter_or_a_clear_refusal(text):
    row = dict.fromkeys(("record", "size", "turns", "words"), 1)
    table = table_of([{**row, "key": "k", "source": "s", "id": None, "images": []}])
    try:
        found = parse_filter(text).matches(table)
    except UsageError as error:
        assert "`" in str(error)
    else:
        assert found.shape == (1,)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "words.real > 1",
        "().__class__",
        "9**9**9 > 1",
        "words ** 2 > 1",
        "1 << 999999999",
        "len(source) > 3",
        "[x for x in (1, 2)]",
        "(lambda: 1)()",
        "words[0] == 1",
        "f'{words}' == 'a'",
        "'a' * 9999999999 == source",
        "words if words else 1",
        "(x := 3) == 3",
        "b'a' == key",
        "1e999 > words",
        "words == ...",
        "source == '\\ud800'",
        "9" * 5000 + " > words",
        "a\0b",
        "",
        "words =",
        "words = 3",
        "yield",
        "await words",
    ],
)
def test_what_is_no_filter_is_refused(text):
    with pytest.raises(UsageError):
        parse_filter(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000 + "1" + ")" * 5000,
        "-" * 200_000 + "1",
        "1" + "+1" * 100_000 + " > words",
        "words" + ".a" * 100_000,
        "not " * 100_000 + "1",
        "[" * 100_000,
        "words" + "[0]" * 100_000,
        "1" * 2_000_000,
    ],
    ids=["brackets", "signs", "sum", "dots", "not", "open", "indices", "long"],
)
def test_a_filter_made_to_exhaust_the_parser_is_refused(text):
    with pytest.raises(UsageError):
        parse_filter(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("wrods > 3", "`wrods` in `wrods > 3`: is no column of the index; there are key, id"),
        ("words > 'a'", "compares a number with a text"),
        ("format > 3", "compares a text with a number"),
        ("id > 3", "an id can only be equal"),
        ("source + 'a' == 'b'", "`source` in `source + 'a' == 'b'`: is a text; arithmetic"),
        ("(words > 1) & (images == 1)", "write and, or, not"),
        ("words in 3", "needs a list"),
        ("words in ['a']", "`'a'` in `words in ['a']`"),
        ("words in [size]", "`size` in"),
        ("id", "`id`: is an id, which is neither true nor false"),
        ("words is 3", "write == or !="),
        ("words == True", "compares a number with a condition"),
    ],
)
def test_a_refusal_names_the_part_and_what_to_do(text, named):
    with pytest.raises(UsageError) as error:
        parse_filter(text)
    assert named in str(error.value)


def test_a_division_by_zero_matches_nothing():
    row = {"key": "a", "source": "s", "id": None, "record": 7, "size": 0, "turns": 2, "words": 3}
    table = table_of([{**row, "images": []}, {**row, "images": [("jpg", 6, 2)]}])
    for text, expected in [
        ("width / height > 2", [False, True]),
        ("width / height <= 2", [False, False]),
        ("width / height != 3", [False, False]),
        ("width % height not in [9]", [False, True]),
        ("not width // height == 3", [True, False]),
    ]:
        assert parse_filter(text).matches(table).tolist() == expected, text


def test_a_filter_reads_only_the_columns_it_needs():
    assert parse_filter("words > 3 and width > 300").columns == {"words", "images"}
    assert {column for _, columns, _ in COLUMNS.values() for column in columns} <= set(SCHEMA.names)
    assert parse_filter("words > 3").matches(table_of([])).tolist() == []


def test_every_column_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "reshard.md").read_text()
    for name, (_, _, meaning) in COLUMNS.items():
        assert f"| `{name}` | {meaning} |" in text
