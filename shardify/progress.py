"""How far a long run is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

_LINE_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Counts samples (or records) and bytes, on standard error.

    Args:
        what: a word or two before the bar.
        total: how many there are.
        done: how many were done by an earlier run; they do not count for the rate.
        unit: what is counted.
    """

    def __init__(self, what: str, *, total: int, done: int = 0, unit: str = "samples") -> None:
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._before = done
        self._bytes = 0
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            tqdm.monitor_interval = 0  # its thread would be in the way of forking
            self._bar = tqdm(desc=what, total=total, initial=done, unit=f" {unit}", smoothing=0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()

    def advance(self, count: int, size: int = 0) -> None:
        """Count `count` more, of `size` bytes together."""
        self._done += count
        self._bytes += size
        if self._bar is not None:
            if size:
                self._bar.set_postfix_str(f"{self._rate(self._bytes) / 1e6:.0f} MB/s", refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= _LINE_EVERY:
            self._line()

    def _rate(self, amount: int) -> float:
        return amount / max(1e-9, time.monotonic() - self._start)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = self._rate(self._done - self._before)
        speed = f"{rate:,.0f} {self._unit}/s"
        if self._bytes:
            speed += f", {self._rate(self._bytes) / 1e6:,.0f} MB/s"
        if 0 < self._done < self._total and rate:
            speed += f", {(self._total - self._done) / rate:,.0f} s left"
        print(f"{self._what}: {self._done:,} of {self._total:,} {self._unit} ({speed})", file=sys.stderr)
