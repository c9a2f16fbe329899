"""A filter on the index: which samples of a data set are meant, said in a small part of Python's expressions.

    words > 500 and images == 1 and format in ["jpg", "png"] and not "ocr_vqa" in source
    width / height > 2 or id in ["000000033471", 2327515]

The text is parsed, checked and turned into operations on whole columns; nothing of it is ever run. Numbers are exact: where 64 bits might
not do, Python's own are used. What cannot be computed (a division by zero) compares as false with everything.
"""

import ast
import json
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import reduce
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from shardify.errors import UsageError
from shardify.format.ids import same_id, spelled_ids

MAX_CHARACTERS = 1_000_000
"""Of a filter's text: thousands of ids fit."""

_MAX_DEPTH = 50
_SMALL = 2**31  # of numbers up to this, sums, products and quotients in 64 bits are Python's
_SHOWN = 60

_Bools: TypeAlias = npt.NDArray[np.bool_]


class Kind(StrEnum):
    """What a part of a filter stands for; ids are compared with texts, numbers and None, by equality alone."""

    NUMBER = "a number"
    TEXT = "a text"
    ID = "an id"
    NONE = "None"
    CONDITION = "a condition"


COLUMNS: Mapping[str, tuple[Kind, tuple[str, ...], str]] = MappingProxyType(
    {
        "key": (Kind.TEXT, ("key",), "the sample's key in its shard, a text"),
        "id": (Kind.ID, ("id",), "the record's id; compare it with a text, a number or None"),
        "record": (Kind.NUMBER, ("record",), "the record's number in its source"),
        "source": (Kind.TEXT, ("source",), "the record's source, as the new data set names it"),
        "size": (Kind.NUMBER, ("size",), "bytes of the sample in its shard; in a `.tar.zst`, of its frame"),
        "turns": (Kind.NUMBER, ("turns",), "turns of the conversation"),
        "words": (Kind.NUMBER, ("words",), "whitespace-separated words over all turns"),
        "images": (Kind.NUMBER, ("images",), "how many images"),
        "width": (Kind.NUMBER, ("images",), "of the largest image, in pixels; 0 without one"),
        "height": (Kind.NUMBER, ("images",), "of the largest image, in pixels; 0 without one"),
        "format": (
            Kind.TEXT,
            ("images",),
            "of the largest image: `jpg`, `png`, ...; an empty text without one",
        ),
    }
)
"""What a filter can ask for: its kind, the sidecar's columns it is made from, and its meaning."""


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Numbers of every sample, or one for all: int64, float64, or Python's own; `known` is False where there is none."""

    values: npt.NDArray[Any]
    known: _Bools | bool = True


_Columns: TypeAlias = Mapping[str, Any]
_Value: TypeAlias = Callable[[_Columns], Any]


@dataclass(frozen=True, slots=True)
class _Part:
    """A checked part of a filter: `value` gives `_Numbers`, a text or an Arrow array of texts, or an array of bool."""

    kind: Kind
    value: _Value
    constant: Any = None
    is_constant: bool = False


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed filter.

    Attributes:
        text: as it was given.
        columns: the sidecar's columns that it needs.
    """

    text: str
    columns: frozenset[str]
    _names: frozenset[str]
    _condition: _Value

    def matches(self, table: pa.Table) -> _Bools:
        """Which rows of a sidecar are meant, bool [rows].

        Args:
            table: the rows, with at least `columns`.

        Raises:
            UsageError: numbers beyond what Python can divide.
        """
        rows = table.num_rows
        if not rows:
            return np.zeros(0, np.bool_)
        columns = {name: _column(name, table) for name in self._names}
        try:
            with np.errstate(all="ignore"):
                found = self._condition(columns)
        except OverflowError as error:
            raise UsageError(f"{_quoted(self.text)}: {error}") from None
        return np.array(np.broadcast_to(found, rows), np.bool_)


def parse_filter(text: str) -> Filter:
    """Check a filter.

    Raises:
        UsageError: it is no expression, asks for an unknown column, compares what cannot be compared, or holds anything beyond comparisons,
            ``and``, ``or``, ``not``, ``in`` and arithmetic.
    """
    if len(text) > MAX_CHARACTERS:
        raise UsageError(f"a filter of {len(text)} characters; the limit is {MAX_CHARACTERS}")
    text = text.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes: the text is not source code
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(f"{_quoted(text)}: not a filter ({what}){_advice(text)}") from None
    except (MemoryError, RecursionError):
        raise UsageError(f"{_quoted(text)}: nested too deeply") from None
    parser = _Parser(text)
    condition = parser.condition(tree, 0)
    columns = frozenset(column for name in parser.names for column in COLUMNS[name][1])
    return Filter(text, columns, frozenset(parser.names), condition)


# --- from the text to operations


class _Parser:
    """Checks a tree from its leaves up; `names` are the columns met."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.names: set[str] = set()

    def condition(self, node: ast.expr, depth: int) -> _Value:
        """A part that is true or false; numbers are true unless 0, texts unless empty."""
        part = self._part(node, depth)
        value = part.value
        if part.kind is Kind.CONDITION:
            return value
        if part.kind is Kind.NUMBER:
            return lambda columns: _compare_numbers(operator.ne, value(columns), _ZERO)
        if part.kind is Kind.TEXT:
            return lambda columns: _compare_texts("!=", value(columns), "")
        raise self._error(node, f"is {part.kind}, which is neither true nor false; compare it with something")

    def _part(self, node: ast.expr, depth: int) -> _Part:
        if depth > _MAX_DEPTH:
            raise UsageError(f"{_quoted(self._text)}: nested too deeply")
        match node:
            case ast.Constant():
                return self._constant(node, node.value)
            case ast.Name():
                return self._name(node)
            case ast.BoolOp():
                combine = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
                parts = [self.condition(value, depth + 1) for value in node.values]
                return _Part(
                    Kind.CONDITION, lambda columns: reduce(combine, [part(columns) for part in parts])
                )
            case ast.UnaryOp(op=ast.Not()):
                part = self.condition(node.operand, depth + 1)
                return _Part(Kind.CONDITION, lambda columns: np.logical_not(part(columns)))
            case ast.UnaryOp(op=ast.USub() | ast.UAdd()):
                return self._sign(node, depth)
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                return self._arithmetic(node, depth)
            case ast.Compare():
                return self._comparisons(node, depth)
        raise self._error(node, f"is nothing that a filter can hold{_advice(self._text)}")

    def _constant(self, node: ast.expr, value: object) -> _Part:
        if isinstance(value, bool):
            return _Part(Kind.CONDITION, lambda _: np.bool_(value), value, is_constant=True)
        if isinstance(value, int):
            numbers = _Numbers(_array(value))
            return _Part(Kind.NUMBER, lambda _: numbers, value, is_constant=True)
        if isinstance(value, float):
            if not np.isfinite(value):
                raise self._error(node, "is beyond every number")
            floats = _Numbers(np.array(value))
            return _Part(Kind.NUMBER, lambda _: floats, value, is_constant=True)
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeError:
                raise self._error(node, "is no Unicode text") from None
            return _Part(Kind.TEXT, lambda _: value, value, is_constant=True)
        if value is None:
            return _Part(Kind.NONE, lambda _: None, None, is_constant=True)
        raise self._error(node, f"is nothing that a filter can hold{_advice(self._text)}")

    def _name(self, node: ast.Name) -> _Part:
        name = node.id
        if name not in COLUMNS:
            raise self._error(
                node, f"is no column of the index; there are {', '.join(COLUMNS)}. Texts need quotes"
            )
        self.names.add(name)
        return _Part(COLUMNS[name][0], lambda columns: columns[name])

    def _sign(self, node: ast.UnaryOp, depth: int) -> _Part:
        part = self._number(node.operand, depth)
        if isinstance(node.op, ast.UAdd):
            return part
        if part.is_constant:
            return self._constant(node, -part.constant)
        return _Part(Kind.NUMBER, lambda columns: _combine(operator.sub, _ZERO, part.value(columns)))

    def _arithmetic(self, node: ast.BinOp, depth: int) -> _Part:
        combine = _ARITHMETIC[type(node.op)]
        left, right = self._number(node.left, depth), self._number(node.right, depth)
        return _Part(
            Kind.NUMBER, lambda columns: _combine(combine, left.value(columns), right.value(columns))
        )

    def _number(self, node: ast.expr, depth: int) -> _Part:
        part = self._part(node, depth + 1)
        if part.kind is not Kind.NUMBER:
            raise self._error(node, f"is {part.kind}; arithmetic is done with numbers")
        return part

    def _comparisons(self, node: ast.Compare, depth: int) -> _Part:
        """``a < b <= c`` is ``a < b and b <= c``."""
        operands = [node.left, *node.comparators]
        parts = [
            self._comparison(node, left, sign, right, depth)
            for left, sign, right in zip(operands, node.ops, operands[1:], strict=False)
        ]
        return _Part(
            Kind.CONDITION, lambda columns: reduce(np.logical_and, [part(columns) for part in parts])
        )

    def _comparison(
        self, node: ast.expr, left: ast.expr, sign: ast.cmpop, right: ast.expr, depth: int
    ) -> _Value:
        if isinstance(sign, ast.In | ast.NotIn):
            return self._membership(left, right, depth, wanted=isinstance(sign, ast.In))
        a, b = self._part(left, depth + 1), self._part(right, depth + 1)
        if isinstance(sign, ast.Is | ast.IsNot):
            if Kind.NONE not in (a.kind, b.kind):
                raise self._error(node, "compares with 'is'; write == or !=")
            sign = ast.Eq() if isinstance(sign, ast.Is) else ast.NotEq()
        symbol = _SIGNS[type(sign)]
        if Kind.ID in (a.kind, b.kind):
            constant = b if a.kind is Kind.ID else a
            if symbol not in ("==", "!=") or not constant.is_constant or constant.kind is Kind.CONDITION:
                raise self._error(node, "an id can only be equal to a text, a number or None, or not")
            column, wanted = a.value if constant is b else b.value, _id(constant.constant)
            return lambda columns: _compare_texts(symbol, column(columns), wanted)
        if a.kind is b.kind is Kind.NUMBER:
            compare = _COMPARE[symbol]
            return lambda columns: _compare_numbers(compare, a.value(columns), b.value(columns))
        if a.kind is b.kind is Kind.TEXT:
            return lambda columns: _compare_texts(symbol, a.value(columns), b.value(columns))
        raise self._error(node, f"compares {a.kind} with {b.kind}")

    def _membership(self, left: ast.expr, right: ast.expr, depth: int, *, wanted: bool) -> _Value:
        a = self._part(left, depth + 1)
        if not isinstance(right, ast.List | ast.Tuple | ast.Set):
            b = self._part(right, depth + 1)
            if a.kind is not Kind.TEXT or not a.is_constant or b.kind is not Kind.TEXT:
                raise self._error(
                    right, "'in' needs a list such as [1, 2], or a text in a text: \"coco\" in source"
                )
            return lambda columns: _contains(b.value(columns), a.constant) == wanted
        parts = [self._part(item, depth + 1) for item in right.elts]
        allowed = {Kind.ID: (Kind.TEXT, Kind.NUMBER, Kind.NONE)}.get(a.kind, (a.kind,))
        for item, part in zip(right.elts, parts, strict=True):
            if not part.is_constant or part.kind not in allowed or part.kind is Kind.CONDITION:
                raise self._error(
                    item,
                    f"cannot stand in a list that {a.kind} is looked for in; only constants of its kind can",
                )
        items = [part.constant for part in parts]
        if a.kind is Kind.NUMBER:
            return lambda columns: _number_in(a.value(columns), items, wanted=wanted)
        texts = [_id(item) for item in items] if a.kind is Kind.ID else items
        if a.kind not in (Kind.ID, Kind.TEXT):
            raise self._error(left, f"is {a.kind}; numbers, texts and ids can be looked for in a list")
        return lambda columns: _text_in(a.value(columns), texts) == wanted

    def _error(self, node: ast.AST, what: str) -> UsageError:
        part = ast.get_source_segment(self._text, node) or self._text
        where = "" if part == self._text else f" in {_quoted(self._text)}"
        return UsageError(f"{_quoted(part)}{where}: {what}")


def _quoted(text: str) -> str:
    return f"`{text if len(text) <= _SHOWN else text[:_SHOWN] + '...'}`"


def _advice(text: str) -> str:
    if re.search(r"[&|~]", text):
        return "; write and, or, not"
    return "; it is made of comparisons, and, or, not, in, numbers with + - * / // %, and texts in quotes"


# --- operations


def _array(value: object) -> npt.NDArray[Any]:
    """A number as an array, one beyond 62 bits as Python's own."""
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, int) and abs(value) >= 2**62:
        return np.array(value, dtype=object)
    return np.array(value)


_ZERO = _Numbers(np.array(0))

_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
    }
)
_DIVIDING = (operator.truediv, operator.floordiv, operator.mod)
_SIGNS = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}
_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        "==": operator.eq,
        "!=": operator.ne,
        "<": operator.lt,
        "<=": operator.le,
        ">": operator.gt,
        ">=": operator.ge,
    }
)
_COMPARE_ARROW = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def _is_small(values: npt.NDArray[Any]) -> bool:
    if values.dtype.kind != "i":
        return values.dtype.kind == "f"
    return int(values.min()) >= -_SMALL and int(values.max()) <= _SMALL


def _exact(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Both as they are where 64 bits do, else as Python's own numbers."""
    return (a, b) if _is_small(a) and _is_small(b) else (a.astype(object), b.astype(object))


def _combine(combine: Callable[[Any, Any], Any], left: _Numbers, right: _Numbers) -> _Numbers:
    a, b = _exact(left.values, right.values)
    known = left.known & right.known
    if combine in _DIVIDING:
        possible = np.asarray(b != 0, np.bool_)
        b = np.where(possible, b, 1)
        known = known & possible
    return _Numbers(_array(combine(a, b)), known)


def _compare_numbers(compare: Callable[[Any, Any], Any], left: _Numbers, right: _Numbers) -> _Bools:
    a, b = left.values, right.values
    if not a.dtype.kind == b.dtype.kind == "i":
        a, b = _exact(a, b)
    return np.asarray(compare(a, b), np.bool_) & left.known & right.known


def _number_in(numbers: _Numbers, items: Sequence[int | float], *, wanted: bool) -> _Bools:
    whole = {int(item) for item in items if item == int(item)}
    values = numbers.values
    if values.dtype.kind == "i":
        inside = np.isin(values, np.array([item for item in whole if abs(item) < 2**63], np.int64))
    else:
        some = set(items)
        inside = np.array([value in some for value in values.ravel().tolist()], np.bool_).reshape(
            values.shape
        )
    found: _Bools = (inside if wanted else ~inside) & numbers.known
    return found


def _compare_texts(symbol: str, a: Any, b: Any) -> _Bools | np.bool_:
    if isinstance(a, str) and isinstance(b, str):
        return np.bool_(_COMPARE[symbol](a, b))
    # UTF-8 sorts as its code points do
    return np.asarray(_COMPARE_ARROW[symbol](_scalar(a), _scalar(b)), np.bool_)


def _scalar(value: Any) -> Any:
    return pa.scalar(value) if isinstance(value, str) else value


def _contains(texts: Any, part: str) -> _Bools | np.bool_:
    if isinstance(texts, str):
        return np.bool_(part in texts)
    return np.asarray(pc.match_substring(texts, part), np.bool_)


def _text_in(texts: Any, items: Sequence[str]) -> _Bools | np.bool_:
    if isinstance(texts, str):
        return np.bool_(texts in items)
    return np.asarray(pc.is_in(texts, pa.array(items, pa.string())), np.bool_)


def _id(value: str | float | None) -> str:
    return same_id(json.dumps(value, ensure_ascii=False))


# --- columns


def _column(name: str, table: pa.Table) -> Any:
    kind, (column, *_), _ = COLUMNS[name]
    if kind is Kind.ID:
        return spelled_ids(table[column])
    if column == "images":
        return _images(name, table[column])
    return _Numbers(table[column].to_numpy().astype(np.int64)) if kind is Kind.NUMBER else table[column]


def _images(name: str, column: pa.ChunkedArray) -> Any:
    """The number of images, or a field of the one with the most pixels, of the first such."""
    counts = pc.list_value_length(column).to_numpy().astype(np.int64)
    if name == "images":
        return _Numbers(counts)
    images = column.combine_chunks().flatten()
    width, height = (images.field(side).to_numpy().astype(np.int64) for side in ("width", "height"))
    owners = np.repeat(np.arange(len(counts)), counts)
    by_pixels = np.lexsort((-np.arange(len(owners)), width * height, owners))
    largest = by_pixels[(np.cumsum(counts) - 1)[counts > 0]]
    if name == "format":
        formats = images.field("format").take(pa.array(largest))
        rows = pa.array(np.where(counts > 0, np.cumsum(counts > 0) - 1, 0), mask=counts == 0)
        return pc.fill_null(formats.take(rows), "") if len(formats) else pa.array([""] * len(counts))
    values = np.zeros(len(counts), np.int64)
    values[counts > 0] = (width if name == "width" else height)[largest]
    return _Numbers(values)
