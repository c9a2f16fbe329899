"""How many bad samples a run bears."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from loaders.arguments import integer
from loaders.batch import SampleFault
from loaders.report import LoaderReport
from shardify.errors import LoaderError, UsageError

OnError = Literal["skip", "raise"]

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """When bad samples end a run. Samples that the user excluded are none.

    Attributes:
        on_error: ``"skip"`` makes them fillers, ``"raise"`` ends the run at the first.
        max_errors: a count, or a rate (float) of the samples seen, looked at once so many were seen that one bad one would be within it.
    """

    on_error: OnError = "skip"
    max_errors: int | float | None = None

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise UsageError(f"on_error={self.on_error!r}: 'skip' or 'raise' is needed")
        if isinstance(self.max_errors, float):
            if not 0 <= self.max_errors <= 1:
                raise UsageError(
                    f"max_errors={self.max_errors}: a rate is between 0 and 1; give an int as a count"
                )
        elif self.max_errors is not None:
            integer("max_errors", self.max_errors, least=0)

    def judge(self, faults: Sequence[SampleFault], report: LoaderReport) -> None:
        """Raise when the samples seen so far are too bad.

        Args:
            faults: of the last batch.
            report: of all batches, that one included.

        Raises:
            LoaderError: with the first of them, and counts by reason.
        """
        if not faults:
            return
        if self.on_error == "raise":
            raise LoaderError(f"a sample cannot be used: {faults[0]}; on_error='skip' would leave it out")
        bad = report.faults.total()
        if self._too_many(bad, bad + report.samples):
            reasons = ", ".join(f"{count} {code}" for code, count in report.faults.most_common())
            some = "; ".join(map(str, report.listed[:_SHOWN]))
            raise LoaderError(
                f"{bad} of {bad + report.samples} samples cannot be used, max_errors={self.max_errors} allows fewer: {reasons}; such as {some}"
            )

    def _too_many(self, bad: int, seen: int) -> bool:
        limit: Any = self.max_errors
        if limit is None:
            return False
        if isinstance(limit, float):
            return (bad > limit * seen and seen * limit >= 1) or limit == 0
        return bool(bad > limit)
