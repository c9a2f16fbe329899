"""Several data sets as one: which part each position of an epoch takes a sample from, and where each part stands from epoch to epoch.

    parts     chat: 6 samples, repeat 1      captions: 4 samples, repeat 0.5

    epoch 0   chat 2   chat 0   captions 3   chat 5   chat 1   captions 0   chat 4   chat 3
    epoch 1   chat 4   captions 1   chat 3   chat 0   captions 2   chat 2   chat 5   chat 1

Part i gives n_i = repeat_i * N_i *draws* to an epoch, rounded so that nothing is lost over the epochs. Its draws go through the part's own
epochs, one after another, each in an order of its own (`loaders.order`), from where the epoch before has stopped: a half takes the other half
next time, and no sample comes again before all others of its part have come.

An epoch is cut into cycles of some 32,768 draws, to each of which every part gives its share; inside a cycle the parts are shuffled. With the block
shuffle a draw from a lane of its part stands at a position of the same lane (but for a few at the end of a part), so that ranks read blocks that no
other rank needs, in a mixture too. Any position is found in the time that one cycle takes, and a cycle depends on nothing but what its
epoch began with.
"""

import base64
import binascii
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from loaders.arguments import integer
from loaders.course import Fingerprint, Parts, TakenUp, check_sizes, describe_change, grown, size_at
from loaders.order import IntArray, OrderSettings
from shardify.errors import StateError, UsageError
from shardify.permute import key_of, keys_of

Repeat: TypeAlias = int | float | str | Fraction
Shards: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

CYCLE = 1 << 15
"""Draws of a cycle, about."""

_MAX_CYCLES = 1 << 20  # of an epoch: the table of their beginnings stays small
_LANE_STEPS = 8  # positions of each lane in a cycle, at least: fewer could not be shuffled
_MAX_RATE = 10**6
_GONE = -(
    1 << 62
)  # in place of the first sample of a part that is not in the mixture any more: its samples are below 0
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: its multiples fall evenly into [0, 2**64)
_MAX_TAKEN = 1 << 26  # draws that a state may name as taken out of their order

# what a key is for, beside those of `loaders.order`
_CYCLES, _RESTS = 16, 17


class Mixture:
    """Several data sets, each with how often its samples come in an epoch.

    ``Mixture({"chat": ("chat/{000..063}.tar", 1), "captions": ("captions", 0.5)})``

    Args:
        parts: name -> (shards, repeat). Shards as for `StreamingLoader`; names are without ``/``, since keys of a batch are ``name/key``. A repeat
            is positive: 3, 0.5, ``"1/3"`` or a Fraction; a float counts as the decimal number it is written as.
        weights: the numbers are weights of an endless stream instead: an epoch is `samples` draws, of which each part gives its weight's share.
        samples: draws of an epoch, with weights only; by default as many as the parts have samples.

    Raises:
        UsageError: no parts, an empty name, a number that is not positive, or `samples` without `weights`.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[Shards, Repeat]],
        *,
        weights: bool = False,
        samples: int | None = None,
    ) -> None:
        if not parts:
            raise UsageError("a mixture of no parts")
        if samples is not None and not weights:
            raise UsageError(
                f"samples={samples}: only with weights=True; repeats say themselves how long an epoch is"
            )
        self.shards: dict[str, Shards] = {}
        self.rates: dict[str, Fraction] = {}
        for name, part in parts.items():
            if not isinstance(name, str) or not name or "/" in name:
                raise UsageError(f"a part of a mixture is called {name!r}: a text without '/' is needed")
            if not isinstance(part, tuple | list) or len(part) != 2:
                raise UsageError(f"part {name!r} of a mixture: (shards, repeat) is needed, not {part!r}")
            self.shards[name] = part[0]
            self.rates[name] = rate_of(part[1], f"part {name!r} of a mixture")
        self.weights = weights
        self.samples = None if samples is None else integer("samples", samples, least=1)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """A mixture from a file; docs/order.md describes it. Relative shards are meant from the file's folder.

        Raises:
            UsageError: the file cannot be read, or is no mixture, with file, line and field.
        """
        from loaders.mixture_file import read_mixture

        parts, weights, samples = read_mixture(path)
        return cls(parts, weights=weights, samples=samples)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name!r}: {rate}" for name, rate in self.rates.items())
        return f"Mixture({{{parts}}}{', weights=True' if self.weights else ''})"


def rate_of(value: Any, where: str) -> Fraction:
    """A repeat or weight as an exact number: 0.1 is one tenth.

    Raises:
        UsageError: it is no positive number up to 10**6; `where` says of what.
    """
    try:
        if isinstance(value, bool):
            raise TypeError  # noqa: TRY301 - the same message
        rate = Fraction(str(value) if isinstance(value, float) else value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise UsageError(f"{where}: {value!r} is no number; 3, 0.5 or '1/3' are") from None
    if not 0 < rate <= _MAX_RATE or rate.denominator > _MAX_RATE**2:
        raise UsageError(f"{where}: {value!r}; a number above 0, up to {_MAX_RATE}, is needed")
    return rate


@dataclass(frozen=True, slots=True)
class MixturePart:
    """A data set of a mixture.

    Attributes:
        name: of the part.
        rate: its repeat, or weight.
        samples: how many it has, at least 1.
        first: the flat number of its first sample.
        fingerprint: of the data set.
        prefix: samples in that part of the data set which has a given, older fingerprint; None when it has none such.
    """

    name: str
    rate: Fraction
    samples: int
    first: int
    fingerprint: Fingerprint
    prefix: Callable[[Fingerprint], int | None]

    @property
    def key(self) -> int:
        """A number for the name, so that a part's order does not depend on the others."""
        return key_of(*self.name.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class MixtureCourse:
    """The epochs of a mixture.

    A state keeps one entry for each part, in the order of their names, as they stand at the beginning of the epoch:

        {"name": "captions", "repeat": "1/2",     # or "weight" and "of", draws of an epoch when they are given
         "draws": 500,                            # of this epoch
         "epoch": 3, "position": 120,             # where the part stands in its own epochs
         "samples": [[0, 1000]],                  # from which own epoch on it has how many
         "taken": "...",                          # after a change: draws from there on that have been taken before, a bit each, base64
         "fingerprint": {...}}

    Parts that were taken out of the mixture keep theirs, with no draws, and go on from there when they come back.

    Attributes:
        parts: of the mixture, in any order.
        settings: of the parts' orders and of the cycles.
        weights: whether rates are weights.
        samples: draws of an epoch with weights; None for as many as there are samples.
    """

    parts: tuple[MixturePart, ...]
    settings: OrderSettings
    weights: bool = False
    samples: int | None = None

    def first_parts(self) -> Parts:
        """Every part at the beginning of its own first epoch."""
        fresh = [
            self._entry(part, {"epoch": 0, "position": 0, "samples": [[0, part.samples]]})
            for part in self._sorted
        ]
        return self._with_draws(0, fresh)

    def epoch(self, number: int, parts: Parts) -> "MixtureEpoch":
        """The order of epoch `number`, which begins with `parts`."""
        entries = {entry["name"]: entry for entry in parts}
        stocks = [_Stock.of(entries[part.name]) for part in self._sorted]
        return MixtureEpoch(number, self._sorted, tuple(stocks), self.settings)

    def as_planned(self, number: int, parts: Parts, fingerprint: Fingerprint) -> "MixtureEpoch":  # noqa: ARG002
        """The order of a state's epoch; see `Course`. Samples of parts that are not in this mixture any more have numbers below 0.

        Raises:
            StateError: `parts` are none of a mixture's, or a part has other data under the same name.
        """
        check_parts(parts, 0)
        self._check_data({entry["name"]: entry for entry in parts})
        first = {part.name: part.first for part in self.parts}
        return _planned(number, parts, first, self.settings)

    def parts_after(self, number: int, parts: Parts, position: int) -> Parts:
        """The same within an epoch; after its last position, those that the next one begins with."""
        if position < sum(entry["draws"] for entry in parts):
            return parts
        moved = [{**entry, **_Stock.of(entry).after(entry["draws"])} for entry in parts]
        for entry in moved:
            if not entry.get("taken"):
                entry.pop("taken", None)
        return self._with_draws(number + 1, moved)

    def take_up(
        self,
        number: int,
        parts: Parts,
        position: int,
        fingerprint: Fingerprint,  # noqa: ARG002 - each part has its own
        also: IntArray | None = None,
    ) -> TakenUp:
        """Continue from a state; see `Course`.

        The same mixture goes on exactly. In one with other parts or rates the epoch begins anew, and each part goes on from where it stood. Parts
        that have grown finish what was planned over the samples they had.

        Args:
            number: the epoch.
            parts: of its beginning.
            position: positions that were consumed.
            fingerprint: not needed.
            also: int64, positions beyond that were consumed too.

        Raises:
            StateError: `parts` are none of a mixture's, or a part has other data under the same name.
        """
        also = np.zeros(0, np.int64) if also is None else also
        check_parts(parts, position)
        known = {entry["name"]: entry for entry in parts}
        self._check_data(known)
        before = {entry["name"]: rate for entry in parts if (rate := _rate(entry)) is not None}
        same = before == {part.name: _rate(self._entry(part, {})) for part in self.parts}
        begun = position > 0 or len(also) > 0
        if same and begun:
            taken_up = [self._finish(known[part.name], part) for part in self._sorted]
            return TakenUp([*taken_up, *self._dormant(parts)])
        if begun:
            known = {entry["name"]: entry for entry in self._consumed(number, parts, position, also)}
        taken_up = []
        for part in self._sorted:
            entry = known.get(part.name, {"epoch": 0, "position": 0, "samples": [[0, part.samples]]})
            stock = _Stock.of({"draws": 0, **entry})
            sizes = grown(entry["samples"], stock.first_untouched, part.samples)
            taken_up.append(self._entry(part, {**entry, "samples": sizes}))
        dormant = self._dormant(list(known.values()))
        return TakenUp(self._with_draws(number, [*taken_up, *dormant]), anew=not same)

    @property
    def _sorted(self) -> tuple[MixturePart, ...]:
        return tuple(sorted(self.parts, key=lambda part: part.name))

    def _entry(self, part: MixturePart, stand: Mapping[str, Any]) -> dict[str, Any]:
        rate: dict[str, Any] = {"repeat": str(part.rate)}
        if self.weights:
            rate = {"weight": str(part.rate), "of": self.samples}
        places = {
            name: stand[name] for name in ("draws", "epoch", "position", "samples", "taken") if name in stand
        }
        return {"name": part.name, **rate, **places, "fingerprint": dict(part.fingerprint)}

    def _with_draws(self, number: int, entries: Parts) -> Parts:
        """The entries with the draws of epoch `number`."""
        sizes = {part.name: part.samples for part in self.parts}
        rates = {part.name: part.rate for part in self._sorted}
        if self.weights:
            draws = _shares(number, rates, sum(sizes.values()) if self.samples is None else self.samples)
        else:
            draws = {
                name: math.floor((number + 1) * rate * sizes[name]) - math.floor(number * rate * sizes[name])
                for name, rate in rates.items()
            }
        return [{**entry, "draws": int(draws.get(entry["name"], 0))} for entry in entries]

    def _check_data(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        differences = []
        for part in self._sorted:
            if (entry := known.get(part.name)) is None:
                continue
            before = part.prefix(entry["fingerprint"])
            if before is None:
                differences.append(
                    f"part {part.name!r}: {describe_change(entry['fingerprint'], part.fingerprint)}"
                )
            else:
                check_sizes(entry["samples"], before)
        if differences:
            raise StateError(
                f"this state does not continue here: {'; '.join(differences)}. A part with other data needs another name."
            )

    def _finish(self, entry: Mapping[str, Any], part: MixturePart) -> dict[str, Any]:
        """A part that goes on with an epoch in progress: what that still takes is as it was planned."""
        stock = _Stock.of(entry)
        last = int(stock.locate(np.array([stock.draws - 1]))[0][0]) if stock.draws else -1
        sizes = grown(entry["samples"], max(last + 1, stock.first_untouched), part.samples)
        return self._entry(part, {**entry, "samples": sizes})

    def _dormant(self, entries: Parts) -> Parts:
        names = {part.name for part in self.parts}
        without = ("repeat", "weight", "of")
        idle = [entry for entry in entries if entry["name"] not in names]
        return [
            {name: value for name, value in {**entry, "draws": 0}.items() if name not in without}
            for entry in idle
        ]

    def _consumed(self, number: int, parts: Parts, position: int, also: IntArray) -> Parts:
        """The entries after some positions of an epoch, of this mixture or another."""
        active = [entry for entry in parts if _rate(entry) is not None]
        active.sort(key=lambda entry: str(entry["name"]))
        epoch = _planned(number, parts, {}, self.settings)
        stocks = epoch.stocks
        firsts, taken = epoch.consumed(position, also)
        moved = [
            {**entry, **stock.after(first, more)}
            for entry, stock, first, more in zip(active, stocks, firsts, taken, strict=True)
        ]
        return [*moved, *(entry for entry in parts if _rate(entry) is None)]


def _planned(number: int, parts: Parts, first: Mapping[str, int], settings: OrderSettings) -> "MixtureEpoch":
    """The order of an epoch of which only the state is known; `first` has the first flat sample number of the parts that are still there."""
    active = [entry for entry in parts if _rate(entry) is not None]
    active.sort(key=lambda entry: str(entry["name"]))
    as_parts = tuple(
        MixturePart(
            entry["name"],
            Fraction(1),
            entry["samples"][-1][1],
            first.get(entry["name"], _GONE),
            entry["fingerprint"],
            lambda _: None,
        )
        for entry in active
    )
    return MixtureEpoch(number, as_parts, tuple(_Stock.of(entry) for entry in active), settings)


def _shares(number: int, weights: Mapping[str, Fraction], samples: int) -> dict[str, int]:
    """How `samples` draws are shared out by weight: each part gets its share rounded up or down, on average exactly."""
    phase = Fraction(number * _GOLDEN % 2**64, 2**64)
    scale = samples / sum(weights.values())
    shares, before, done = {}, Fraction(0), 0
    for name, weight in weights.items():
        before += weight
        end = math.floor(before * scale + phase)
        shares[name], done = end - done, end
    return shares


def _rate(entry: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What is compared to see whether a mixture has changed; None for a part that is not in it."""
    if "repeat" in entry:
        return ("repeat", entry["repeat"])
    return ("weight", entry["weight"], entry.get("of")) if "weight" in entry else None


def check_parts(parts: Any, position: int) -> None:
    """Refuse what cannot be the parts of a mixture.

    Raises:
        StateError: they are not, with the entry.
    """
    if not isinstance(parts, list) or not parts:
        raise StateError("this state is of one data set, not of a mixture; it has no parts")
    for entry in parts:
        fits = (
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("fingerprint"), dict)
        )
        counts = [entry.get(name) for name in ("draws", "epoch", "position")] if fits else []
        if not fits or not all(type(count) is int and count >= 0 for count in counts):
            raise StateError(f"not a state of a mixture: {entry!r}")
        sizes = entry.get("samples")
        check_sizes(sizes, sizes[-1][1] if _ends_in_pair(sizes) else -1)
        if not 0 <= entry["position"] < size_at(entry["samples"], entry["epoch"]) or sizes[0][1] < 1:
            raise StateError(
                f"not a state of a mixture: part {entry['name']!r} at {entry['position']} of {sizes!r}"
            )
        _unpack(entry.get("taken", ""))
    names = [entry["name"] for entry in parts]
    if len(set(names)) < len(names):
        raise StateError(f"not a state of a mixture: parts are called {', '.join(map(repr, names))}")
    if not 0 <= position <= sum(entry["draws"] for entry in parts):
        raise StateError(
            f"not a state of this mixture: position {position} of {sum(entry['draws'] for entry in parts)}"
        )


def _ends_in_pair(sizes: Any) -> bool:
    return isinstance(sizes, list) and bool(sizes) and isinstance(sizes[-1], list) and len(sizes[-1]) == 2


@dataclass(frozen=True, slots=True, eq=False)
class _Stock:
    """What a part has to give from the beginning of an epoch on: its draws 0, 1, 2, ...

    Draws that were taken before are passed over, so draw k is the k-th of the *places* left; place 0 is (epoch, position), and from
    there places run through the part's own epochs.
    """

    draws: int  # in this epoch
    epoch: int
    position: int
    sizes: list[list[int]]
    taken: npt.NDArray[np.bool_]  # of the first places
    left: IntArray  # places within these that are left

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        taken = _unpack(entry.get("taken", ""))
        return cls(
            entry["draws"], entry["epoch"], entry["position"], entry["samples"], taken, np.flatnonzero(~taken)
        )

    @property
    def first_untouched(self) -> int:
        """The first own epoch of which nothing was taken."""
        last = np.flatnonzero(self.taken)[-1:] if len(self.taken) else np.zeros(0, np.int64)
        if len(last):
            return int(self._locate_places(last)[0][0]) + 1
        return self.epoch + (self.position > 0)

    def locate(self, draws: IntArray) -> tuple[IntArray, IntArray]:
        """Own epoch and position of each draw, int64 [n] each."""
        return self._locate_places(self._places(draws))

    def size_of(self, epochs: IntArray) -> IntArray:
        """How many samples the part has in each of its own epochs, int64 [n]."""
        firsts = np.array([first for first, _ in self.sizes], np.int64)
        run = np.maximum(np.searchsorted(firsts, epochs, "right") - 1, 0)
        return np.array([size for _, size in self.sizes], np.int64)[run]

    def after(self, first: int, more: IntArray | None = None) -> dict[str, Any]:
        """Where the part stands when its draws below `first`, and those in `more`, were taken."""
        begin = int(self._places(np.array([first]))[0])
        also = self._places(np.sort(more)) if more is not None and len(more) else np.zeros(0, np.int64)
        end = max(begin, len(self.taken), int(also[-1]) + 1 if len(also) else 0)
        taken = np.zeros(end - begin, np.bool_)
        old = self.taken[begin:]
        taken[: len(old)] = old
        taken[also - begin] = True
        # on to the first place that is left
        gone = int(np.argmin(taken)) if len(taken) and not taken.all() else len(taken)
        epoch, position = (int(value[0]) for value in self._locate_places(np.array([begin + gone])))
        past = max((number for number, (at, _) in enumerate(self.sizes) if at <= epoch), default=0)
        return {
            "epoch": epoch,
            "position": position,
            "samples": self.sizes[past:],
            "taken": _pack(taken[gone:]),
        }

    def _places(self, draws: IntArray) -> IntArray:
        within = len(self.left)
        places = np.asarray(draws, np.int64) + (len(self.taken) - within)
        if within:
            early = draws < within
            places[early] = self.left[draws[early]]
        return places

    def _locate_places(self, places: IntArray) -> tuple[IntArray, IntArray]:
        firsts = [max(first, self.epoch) for first, _ in self.sizes]
        sizes = np.array([size for _, size in self.sizes], np.int64)
        firsts[0] = self.epoch
        begins = np.zeros(len(sizes), np.int64)
        np.cumsum(np.diff(np.array(firsts, np.int64)) * sizes[:-1], out=begins[1:])
        steps = places + self.position
        if len(sizes) == 1:
            epochs, positions = np.divmod(steps, sizes[0])
            return epochs + self.epoch, positions
        run = np.searchsorted(begins, steps, "right") - 1
        epochs, positions = np.divmod(steps - begins[run], sizes[run])
        return epochs + np.array(firsts, np.int64)[run], positions


def _pack(taken: npt.NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(taken).tobytes()).decode() if taken.any() else ""


def _unpack(text: Any) -> npt.NDArray[np.bool_]:
    try:
        content = base64.b64decode(text[: _MAX_TAKEN // 6 + 1].encode("ascii"), validate=True)
    except (ValueError, TypeError, AttributeError, binascii.Error):
        raise StateError("not a state of a mixture: 'taken' is not base64") from None
    return np.unpackbits(np.frombuffer(content, np.uint8)).astype(np.bool_)


@dataclass(frozen=True, slots=True, eq=False)
class _Cycle:
    """A cycle: for each of its positions, which part gives its sample, and which draw of that part."""

    number: int
    part: IntArray
    draw: IntArray


@dataclass(slots=True, eq=False)
class MixtureEpoch:
    """One epoch of a mixture.

    Attributes:
        number: of the epoch.
        parts: in the order of their names.
        stocks: of each part.
        settings: of the order.
    """

    number: int
    parts: tuple[MixturePart, ...]
    stocks: tuple[_Stock, ...]
    settings: OrderSettings
    length: int = field(init=False)
    _lanes: int = field(init=False)
    _cycles: int = field(init=False)
    _starts: IntArray = field(init=False)  # [cycles + 1], the position at which each cycle begins
    _last: _Cycle | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.length = sum(stock.draws for stock in self.stocks)
        # other orders keep no samples together, so that draws may stand anywhere
        self._lanes = self.settings.lanes if self.settings.shuffle == "block" else 1
        size = max(CYCLE, _LANE_STEPS * self._lanes)
        self._cycles = max(1, min(-(-self.length // size), _MAX_CYCLES))
        numbers = np.arange(self._cycles + 1)
        self._starts = sum(
            (self._given(part, numbers) for part in range(len(self.parts))), np.zeros(len(numbers), np.int64)
        )

    def samples(self, positions: IntArray) -> IntArray:
        """The samples that stand at `positions`; int64 [n] to flat sample numbers, int64 [n]."""
        positions = np.asarray(positions, np.int64)
        parts, draws = self._find(positions)
        samples = np.empty(positions.shape, np.int64)
        for number, (part, stock) in enumerate(zip(self.parts, self.stocks, strict=True)):
            own = np.flatnonzero(parts == number)
            if not len(own):
                continue
            epochs, places = stock.locate(draws[own])
            # own epochs over as many samples are of one order
            for _, size in stock.sizes:
                here = np.flatnonzero(stock.size_of(epochs) == size)
                if len(here):
                    order = self.settings.order(size, part.key)
                    samples[own[here]] = part.first + order.samples(epochs[here], places[here])
        return samples

    def consumed(self, position: int, also: IntArray) -> tuple[list[int], list[IntArray]]:
        """Which draws of each part stand at the first `position` positions, and at those of `also`.

        Returns:
            For each part the number f of its first draws that do, all of them, and int64 [n], which others do, ascending.
        """
        cycle = int(np.searchsorted(self._starts, position, "right")) - 1
        cycle = min(cycle, self._cycles - 1)
        begin = int(self._starts[cycle])
        also = also[also >= position]
        firsts = [int(self._given(part, np.array([cycle]))[0]) for part in range(len(self.parts))]
        parts, draws = self._find(np.union1d(np.arange(begin, position), also))
        return firsts, [np.sort(draws[parts == number]) for number in range(len(self.parts))]

    def _given(self, part: int, cycles: IntArray) -> IntArray:
        """How many draws a part gives before each cycle: whole rounds of the lanes, evenly; and once what is left of a round."""
        draws = self.stocks[part].draws
        rounds, rest = divmod(draws, self._lanes)
        each, more = divmod(rounds, self._cycles)
        at = key_of(self.settings.seed, _RESTS, self.number, self.parts[part].key) % self._cycles
        return (cycles * each + cycles * more // self._cycles) * self._lanes + rest * (cycles > at)

    def _find(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Which part gives each position, and which draw of it; int64 [n] each."""
        cycles = np.searchsorted(self._starts, positions, "right") - 1
        parts, draws = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(cycles).tolist():
            here = cycles == number
            cycle = self._cycle(number)
            within = positions[here] - self._starts[number]
            parts[here], draws[here] = cycle.part[within], cycle.draw[within]
        return parts, draws

    def _cycle(self, number: int) -> _Cycle:
        if self._last is None or self._last.number != number:
            self._last = self._make_cycle(number)
        return self._last

    def _make_cycle(self, number: int) -> _Cycle:
        bounds = [self._given(part, np.array([number, number + 1])) for part in range(len(self.parts))]
        draws = np.concatenate([np.arange(begin, end) for begin, end in bounds])
        parts = np.repeat(np.arange(len(self.parts)), [end - begin for begin, end in bounds])
        if self.settings.shuffle is None:
            order = _evenly(bounds)
        else:
            key = key_of(self.settings.seed, _CYCLES, self.number, number)
            keys = [
                _ascending(keys_of(key_of(key, part.key), np.arange(end - begin)), self._lanes)
                for part, (begin, end) in zip(self.parts, bounds, strict=True)
            ]
            lanes = [
                stock.locate(np.arange(begin, end))[1] % self._lanes
                for stock, (begin, end) in zip(self.stocks, bounds, strict=True)
            ]
            begin = int(self._starts[number]) % self._lanes
            order = _by_lanes(np.concatenate(lanes), np.concatenate(keys), self._lanes, begin)
        return _Cycle(number, parts[order], draws[order])


def _evenly(bounds: Sequence[IntArray]) -> IntArray:
    """The draws of all parts one after another -> in the order in which each part's are spread evenly over the cycle."""
    counts = [int(end - begin) for begin, end in bounds]
    places = [(np.arange(count) + 0.5) / count if count else np.zeros(0) for count in counts]
    return np.argsort(np.concatenate(places), kind="stable")


def _ascending(keys: npt.NDArray[np.uint64], lanes: int) -> npt.NDArray[np.uint64]:
    """The keys of a part's draws, exchanged among those of the same lane so that these keep their order."""
    if lanes == 1:
        return np.sort(keys)
    rounds = -(-len(keys) // lanes)
    table = np.full(rounds * lanes, np.iinfo(np.uint64).max, np.uint64)
    table[: len(keys)] = keys
    return np.sort(table.reshape(rounds, lanes), axis=0).reshape(-1)[: len(keys)]


def _by_lanes(lane: IntArray, keys: npt.NDArray[np.uint64], lanes: int, begin: int) -> IntArray:
    """Which draw stands at each position of a cycle: one of the same lane wherever there is one, in the order of their keys.

    Args:
        lane: int64 [n], of each draw.
        keys: uint64 [n].
        lanes: how many there are.
        begin: the lane of the cycle's first position.

    Returns:
        int64 [n], numbers of draws.
    """
    count = len(lane)
    if not count:
        return np.zeros(0, np.int64)
    # lane, key and number in one word: sorting is quick, and no two are equal
    lane_bits, number_bits = (lanes - 1).bit_length(), (count - 1).bit_length()
    words = keys >> np.uint64(lane_bits)
    words &= ~np.uint64((1 << number_bits) - 1)
    words |= np.arange(count, dtype=np.uint64)
    if lane_bits:
        words |= lane.astype(np.uint64) << np.uint64(64 - lane_bits)
    words.sort()
    by_lane = (words & np.uint64((1 << number_bits) - 1)).astype(np.int64)
    there = np.bincount(lane, minlength=lanes)
    rank = np.arange(count) - np.repeat(np.cumsum(there) - there, there)
    slot = (np.repeat(np.arange(lanes), there) - begin) % lanes + rank * lanes
    order = np.full(count, -1, np.int64)
    fits = slot < count
    order[slot[fits]] = by_lane[fits]
    if not fits.all():
        others = by_lane[~fits]
        order[order < 0] = others[np.argsort(keys[others], kind="stable")]
    return order
