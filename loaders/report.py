"""What went wrong, or was odd, in the batches handed out: `loader.report()`."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from loaders.batch import SampleFault

MAX_FAULTS = 1000
"""So many faults are listed; all are counted."""

_log = logging.getLogger("loaders")


@dataclass(slots=True)
class LoaderReport:
    """Counts over the batches handed out so far, on this rank.

    Attributes:
        batches: handed out.
        samples: valid ones in them.
        faults: samples that became fillers, by reason code.
        notes: odd texts that were kept, by code (`loaders.text.TextResult.notes`).
        listed: the first `MAX_FAULTS` faults.
        excluded: samples that the user's list left out.
        overflowed: batches whose pixels lay in ordinary memory since all slabs were in use, or it needed more than one.
    """

    batches: int = 0
    samples: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    listed: list[SampleFault] = field(default_factory=list)
    excluded: int = 0
    overflowed: int = 0

    def add(
        self,
        *,
        samples: int,
        faults: Iterable[SampleFault],
        notes: Iterable[str],
        overflowed: bool,
        excluded: int = 0,
    ) -> None:
        """Count a batch; the first fault of each code is logged as a warning."""
        self.batches += 1
        self.samples += samples
        self.excluded += excluded
        self.overflowed += overflowed
        self.notes.update(notes)
        self._count(faults)

    def leave_out(self, faults: Sequence[SampleFault]) -> None:
        """Samples counted before were bad."""
        self.samples -= len(faults)
        self._count(faults)

    def _count(self, faults: Iterable[SampleFault]) -> None:
        for fault in faults:
            if not self.faults[fault.code]:
                _log.warning(
                    "sample left out: %s; further ones of this kind are only counted in loader.report()",
                    fault,
                )
            self.faults[fault.code] += 1
            if len(self.listed) < MAX_FAULTS:
                self.listed.append(fault)
