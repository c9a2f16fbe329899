"""How fast the loader is, and where its time goes: `loader.stats()`.

Workers time their stages with a `StageClock` and send a `BatchStats` with each batch; the main process adds them up in a `StatsRecorder`,
which gives out `LoaderStats`. Clocks always run: a batch costs a few microseconds, a sample a fraction of one.
"""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from operator import add, sub
from typing import Any, NamedTuple

_SNAPSHOT_EVERY = 1.0  # seconds
_SNAPSHOTS = 11  # kept: `recent` reaches back 10 to 11 s

STAGES = ("fetch", "decode", "text", "collate")
"""What workers do, as `StageClock.lap` and `BatchStats` name it."""


class BatchStats(NamedTuple):
    """What building one batch took, in the worker that built it.

    Attributes:
        samples: valid ones.
        images: in them.
        fetch: seconds until the bytes were there.
        decode: seconds of decoding and resizing.
        text: seconds of parsing records, tokenising and the user's transform.
        collate: seconds of putting the batch together.
        cpu: seconds of processor time, of all threads of the process.
        bytes_used: of the samples, as stored.
        bytes_fetched: read from files, or over the network.
        requests: over the network.
        retries: of these.
        cache_hits: blocks found in the node's cache.
    """

    samples: int = 0
    images: int = 0
    fetch: float = 0.0
    decode: float = 0.0
    text: float = 0.0
    collate: float = 0.0
    cpu: float = 0.0
    bytes_used: int = 0
    bytes_fetched: int = 0
    requests: int = 0
    retries: int = 0
    cache_hits: int = 0


class StageClock:
    """Splits the time of a batch into stages, by laps.

        clock.start()
        for span in spans:
            clock.lap("fetch")     # what passed since the lap before was fetching
            tokenise(span)
            clock.lap("text")
        stats = clock.stop(samples=64)

    A lap costs about 0.2 us. One clock per process.
    """

    __slots__ = ("_cpu", "_last", "_seconds")

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a batch."""
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._cpu = time.process_time()
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap, or since `start`, as that of one of `STAGES`."""
        now = time.perf_counter()
        self._seconds[stage] += now - self._last
        self._last = now

    def stop(
        self,
        *,
        samples: int,
        images: int = 0,
        bytes_used: int = 0,
        bytes_fetched: int = 0,
        requests: int = 0,
        retries: int = 0,
        cache_hits: int = 0,
    ) -> BatchStats:
        """The batch is done; what passed since the last lap was collating."""
        self.lap("collate")
        return BatchStats(
            samples=samples,
            images=images,
            **self._seconds,
            cpu=time.process_time() - self._cpu,
            bytes_used=bytes_used,
            bytes_fetched=bytes_fetched,
            requests=requests,
            retries=retries,
            cache_hits=cache_hits,
        )


@dataclass(frozen=True, slots=True)
class Flow:
    """What passed through a loader in a stretch of time, on this rank. Times are in seconds; it begins with the fields of `BatchStats`.

    Attributes:
        samples: valid ones handed out.
        images: in them.
        fetch: of all workers together, until bytes were there,
        decode: decoding and resizing,
        text: parsing, tokenising and the user's transform,
        collate: and putting batches together.
        cpu: processor time of all workers.
        bytes_used: of the samples, as stored.
        bytes_fetched: read from files, or over the network.
        requests: over the network.
        retries: of these.
        cache_hits: blocks found in the node's cache.
        batches: handed out.
        wait: of the main process, for batches that were not ready.
        ready: batches that were ready when one was asked for, summed over all batches handed out.
        overflowed: batches that did not fit into a slab, or found none free.
        plan: of the main process, planning.
        restarts: of the workers.
        seconds: from the moment the stretch's first batch was asked for to that in which its last was handed out.
    """

    samples: int
    images: int
    fetch: float
    decode: float
    text: float
    collate: float
    cpu: float
    bytes_used: int
    bytes_fetched: int
    requests: int
    retries: int
    cache_hits: int
    batches: int
    wait: float
    ready: int
    overflowed: int
    plan: float
    restarts: int
    seconds: float

    @property
    def samples_per_second(self) -> float:
        """0 when no time has passed."""
        return _over(self.samples, self.seconds)

    @property
    def megabytes_per_second(self) -> float:
        """Of the samples as stored; a megabyte is 10^6 bytes."""
        return _over(self.bytes_used / 1e6, self.seconds)

    @property
    def wait_share(self) -> float:
        """Share of the time that the main process waited for batches: 0 to 1."""
        return _over(self.wait, self.seconds)

    @property
    def queue_depth(self) -> float:
        """Batches ready when one was asked for, on average."""
        return _over(self.ready, self.batches)

    def stage_share(self, stage: str) -> float:
        """Share of the workers' time spent in one of `STAGES`: 0 to 1."""
        return _over(getattr(self, stage), self.fetch + self.decode + self.text + self.collate)


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """A loader's figures on this rank; it can be pickled.

    Attributes:
        total: since the loader was made.
        recent: the last 10 s or so in which batches were handed out.
    """

    total: Flow
    recent: Flow

    def as_scalars(self, prefix: str = "loader/") -> dict[str, float]:
        """Plain numbers by name, for a logger: recent rates and shares, and totals.

        Args:
            prefix: of every name. Default ``loader/``.
        """
        rates = {
            "samples_per_second": self.recent.samples_per_second,
            "megabytes_per_second": self.recent.megabytes_per_second,
            "wait_share": self.recent.wait_share,
            "queue_depth": self.recent.queue_depth,
            "mean_samples_per_second": self.total.samples_per_second,
            "mean_megabytes_per_second": self.total.megabytes_per_second,
            "mean_wait_share": self.total.wait_share,
            **{f"{stage}_share": self.recent.stage_share(stage) for stage in STAGES},
        }
        totals = {f"total_{name}": float(getattr(self.total, name)) for name in _COUNTED if name != "ready"}
        return {prefix + name: value for name, value in (rates | totals).items()}

    def line(self) -> str:
        """The recent figures for a progress bar: ``812/s, 43 MB/s, wait 2 %, fetch 3 % decode 91 % text 4 %``."""
        recent = self.recent
        stages = [(stage, recent.stage_share(stage)) for stage in STAGES]
        parts = [
            f"{recent.samples_per_second:.0f}/s",
            f"{recent.megabytes_per_second:.0f} MB/s",
            f"wait {100 * recent.wait_share:.0f} %",
            " ".join(f"{stage} {100 * share:.0f} %" for stage, share in stages if share >= 0.005),
            f"cache {100 * recent.cache_hits / (recent.cache_hits + recent.requests):.0f} %"
            if recent.cache_hits
            else "",
            f"{recent.retries} retries" if recent.retries else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStats:
    """What handing batches to a device has cost: `DevicePrefetcher.stats()`. Times are in seconds, over all batches handed out.

    Attributes:
        batches: handed out.
        wait: of the host in ``next()``: for the loader, and for what follows.
        moving: of this, on starting copies and normalisation; on the CPU, and with ``decode="nvjpeg"``, on the work itself.
        device_wait: of the device's stream, for copies that were not complete when it came to them; of those known to be over.
        images_on_device: decoded there.
        images_on_host: decoded on the host with ``decode="nvjpeg"``, since nvJPEG is not for them.
    """

    batches: int
    wait: float
    moving: float
    device_wait: float
    images_on_device: int
    images_on_host: int

    def as_scalars(self, prefix: str = "device/") -> dict[str, float]:
        """Plain numbers by name, for a logger.

        Args:
            prefix: of every name. Default ``device/``.
        """
        return {prefix + item.name: float(getattr(self, item.name)) for item in fields(self)}


class StatsRecorder:
    """Adds up what the batches handed out have taken; in the main process."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._totals: list[float] = [0] * len(_COUNTED)
        self._snapshots: deque[list[float]] = deque(maxlen=_SNAPSHOTS)
        self._shared: dict[str, int] = {}
        self._plan = 0.0
        self._starts = 0

    def add(self, stats: BatchStats, *, waited: float, ready: int, overflowed: bool = False) -> None:
        """A batch is handed out.

        Args:
            stats: of the worker that built it.
            waited: seconds from asking for it until it was there.
            ready: batches that were ready when it was asked for.
            overflowed: whether its pixels lie in ordinary memory for want of a slab.
        """
        now = time.perf_counter()
        if self._began is None:
            self._began = now - waited
            self._snapshots.append(list(self._totals))
        # what follows in `Flow`; the last three are set, not added up
        main = (1, waited, ready, overflowed, 0, 0, 0)
        self._totals = list(map(add, self._totals, stats + main))
        self._totals[-3:] = self._plan, max(self._starts - 1, 0), now - self._began
        if self._totals[-1] - self._snapshots[-1][-1] >= _SNAPSHOT_EVERY:
            self._snapshots.append(self._totals)

    def counted(self, counts: Mapping[str, int]) -> None:
        """Take over what the processes of a rank count together: `FetchCounters.snapshot`.

        Args:
            counts: ``requests``, ``retries``, ``bytes_fetched`` and ``hits`` so far; what is missing is left as it is. They may begin anew.
        """
        self._totals = list(self._totals)  # snapshots are lists that were totals
        for name, place in _SHARED.items():
            before = self._shared.get(name, 0)
            count = counts.get(name, before)
            self._totals[place] += count - before if count >= before else count
        self._shared |= counts

    def planned(self, seconds: float) -> None:
        """Time was spent on planning."""
        self._plan += seconds

    def started(self) -> None:
        """Workers were started; all but the first time it is a restart. What they count together begins anew."""
        self._starts += 1
        self._shared = {}

    def stats(self) -> LoaderStats:
        """The figures up to the last batch handed out."""
        oldest = self._snapshots[0] if self._snapshots else self._totals
        return LoaderStats(_flow(self._totals), _flow(list(map(sub, self._totals, oldest))))


def _flow(counts: list[float]) -> Flow:
    values: Any = (kind(count) for kind, count in zip(_KINDS, counts, strict=True))
    return Flow(*values)


def _over(count: float, by: float) -> float:
    return count / by if by > 0 else 0.0


_COUNTED = tuple(item.name for item in fields(Flow))
_SHARED = {
    name: _COUNTED.index("cache_hits" if name == "hits" else name)
    for name in ("requests", "retries", "bytes_fetched", "hits")
}
_KINDS = tuple(int if item.type is int else float for item in fields(Flow))
