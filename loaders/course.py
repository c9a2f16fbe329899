"""The epochs of a run: the order of each, and what a state must keep for them to continue over a data set that grows or a mixture that changes.

epoch    0            1            2            3
samples  1,000        1,000        1,000        1,400
                           ^ 400 samples were added here: this epoch is finished as it was, the next one is over all
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeAlias

from loaders.order import EpochOrder, IntArray, OneEpoch, OrderSettings
from shardify.errors import StateError

Parts: TypeAlias = list[dict[str, Any]]
"""Where each data set of a run stands, for the state: JSON-able."""
Fingerprint: TypeAlias = Mapping[str, Any]
"""What a data set is recognised by: at least ``samples`` and ``digest``; JSON-able."""


class Course(Protocol):
    """The epochs of a run, and what its state keeps so that they continue: `parts`, as they stand at the beginning of an epoch."""

    def first_parts(self) -> Parts:
        """For epoch 0 of a new run."""
        ...

    def epoch(self, number: int, parts: Parts) -> EpochOrder:
        """The order of epoch `number`, which begins with `parts`."""
        ...

    def parts_after(self, number: int, parts: Parts, position: int) -> Parts:
        """The parts after the first `position` positions of that epoch; after all of them, those that the next epoch begins with."""
        ...

    def as_planned(self, number: int, parts: Parts, fingerprint: Fingerprint) -> EpochOrder:
        """The order of a state's epoch as its run had it: without what was added to the data since, or with a mixture's earlier parts.

        Raises:
            StateError: it is of other data, with what differs.
        """
        ...

    def take_up(
        self,
        number: int,
        parts: Parts,
        position: int,
        fingerprint: Fingerprint,
        also: IntArray | None = None,
    ) -> "TakenUp":
        """Continue from a state.

        Args:
            number: its epoch.
            parts: of that epoch's beginning, as the state has them.
            position: of that epoch, before which all were consumed.
            fingerprint: of the data that the state was made over.
            also: int64 [n], positions beyond that were consumed, too.

        Raises:
            StateError: it is of other data, with what differs.
        """
        ...


@dataclass(frozen=True, slots=True)
class TakenUp:
    """How a run goes on from a state.

    Attributes:
        parts: of the beginning of the epoch.
        anew: the epoch begins anew, at position 0, over what its parts have left: a mixture was changed.
    """

    parts: Parts
    anew: bool = False


@dataclass(frozen=True, slots=True)
class PlainCourse:
    """The epochs of one data set: all samples in each.

    A data set that has grown is finished as it was, and whole from the next epoch on; until then the state keeps
    ``parts = [{"samples": [[epoch, samples], ...], "fingerprint": ...}]``, from which epoch on it has how many.

    Attributes:
        samples: in the data set.
        settings: of the order.
        fingerprint: of the data set.
        prefix: samples in that part of the data set which has a given, older fingerprint; None when it has none such.
    """

    samples: int
    settings: OrderSettings
    fingerprint: Fingerprint
    prefix: Callable[[Fingerprint], int | None]

    def first_parts(self) -> Parts:
        """None: every epoch is over all samples."""
        return []

    def epoch(self, number: int, parts: Parts) -> OneEpoch:
        """The order of epoch `number`."""
        sizes = parts[0]["samples"] if parts else [[0, self.samples]]
        return OneEpoch(self.settings.order(size_at(sizes, number)), number)

    def parts_after(self, number: int, parts: Parts, position: int) -> Parts:
        """The same within an epoch; none as soon as an epoch is over all samples."""
        if not parts or position < self.epoch(number, parts).length:
            return parts
        return [] if size_at(parts[0]["samples"], number + 1) == self.samples else parts

    def as_planned(self, number: int, parts: Parts, fingerprint: Fingerprint) -> OneEpoch:
        """The order of a state's epoch; see `Course`.

        Raises:
            StateError: the state is of other data, or of a mixture.
        """
        return OneEpoch(self.settings.order(size_at(self._sizes(parts, fingerprint), number)), number)

    def take_up(
        self,
        number: int,
        parts: Parts,
        position: int,
        fingerprint: Fingerprint,
        also: IntArray | None = None,
    ) -> TakenUp:
        """Continue; see `Course`.

        Raises:
            StateError: the state is of other data, or of a mixture.
        """
        # an epoch that has not begun is over all
        begun = position > 0 or (also is not None and len(also) > 0)
        sizes = grown(self._sizes(parts, fingerprint), number + begun, self.samples)
        if size_at(sizes, number) == self.samples:
            return TakenUp([])
        return TakenUp([{"samples": sizes}])

    def _sizes(self, parts: Parts, fingerprint: Fingerprint) -> list[list[int]]:
        """From which epoch on the data set of a state had how many samples."""
        known = self.prefix(fingerprint)
        if known is None:
            raise StateError(
                f"this state does not continue here: {describe_change(fingerprint, self.fingerprint)}"
            )
        if not parts:
            return [[0, known]]
        check_sizes(parts[0].get("samples") if len(parts) == 1 and "name" not in parts[0] else None, known)
        sizes: list[list[int]] = parts[0]["samples"]
        return sizes


def size_at(sizes: list[list[int]], epoch: int) -> int:
    """How many samples a data set has in an epoch, of [[first epoch, samples], ...], ascending."""
    return next(samples for first, samples in reversed(sizes) if first <= max(epoch, sizes[0][0]))


def grown(sizes: list[list[int]], epoch: int, samples: int) -> list[list[int]]:
    """`sizes` when there are `samples` from `epoch` on."""
    before = [[first, size] for first, size in sizes if first < epoch]
    return before if before and before[-1][1] == samples else [*before, [epoch, samples]]


def check_sizes(sizes: Any, samples: int) -> None:
    """Refuse what cannot be the sizes of a data set of `samples` samples.

    Raises:
        StateError: it is not [[first epoch, samples], ...], both ascending.
    """
    fits = (
        isinstance(sizes, list)
        and len(sizes) > 0
        and all(
            isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in sizes
        )
        and all(one[0] < other[0] and one[1] < other[1] for one, other in pairwise(sizes))
        and sizes[0][0] >= 0
        and sizes[0][1] >= 0
        and sizes[-1][1] == samples
    )
    if not fits:
        raise StateError(
            f"not a state of this data set, which had {samples} samples: parts with samples={sizes!r}"
        )


def describe_change(before: Fingerprint, now: Fingerprint) -> str:
    """What differs between two fingerprints, for people."""
    there, here = (_shards(fingerprint) for fingerprint in (before, now))
    if there != here:
        return f"it was made over {there}; here are {here}"
    return f"it was made over other shards, or another order of them (as many of both): {there}"


def _shards(fingerprint: Fingerprint) -> str:
    chosen = fingerprint.get("chosen") or {}
    more = "".join(f", {name}={value!r}" for name, value in chosen.items() if name != "digest")
    return f"{fingerprint.get('shards')} shards of {fingerprint.get('samples')} samples{more}"
