"""For tests of remote reading: data sets behind a URL, and what a rank does with them, in few lines."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.fetch import RemoteFetch
from shardify.format.shards import open_shards
from shardify.format.tar import read_members


def load(name: str, folder: str):
    """A module of the tests, which are no package: `folder` is one beside this file's."""
    if name not in sys.modules:
        path = Path(__file__).parents[1] / folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@dataclass
class Remote:
    """A data set of n samples that lies in a folder, and is to be read from a URL.

    Attributes:
        url: of the folder.
        names, sizes, digests: of the shards.
        columns: int64 [n] each: shard, offset, size, and the extent's begin and end.
        contents: the shards' bytes.
    """

    url: str
    names: list[str]
    sizes: list[int]
    digests: list[str]
    columns: dict[str, np.ndarray]
    contents: list[bytes]

    def __len__(self) -> int:
        return len(self.columns["shards"])

    @property
    def paths(self) -> list[str]:
        return [f"{self.url}/{name}" for name in self.names]

    def fetch(self, *, sidecars: bool = True, **settings) -> RemoteFetch:
        """A started RemoteFetch over it."""
        beside = [path.partition(".tar")[0] + ".parquet" if sidecars else None for path in self.paths]
        remote = RemoteFetch(self.paths, beside, self.sizes, self.digests, **settings)
        remote.start()
        return remote

    def part(self, samples, *names) -> list[np.ndarray]:
        return [self.columns[name][samples] for name in names or self.columns]

    def announce(self, remote: RemoteFetch, batch: int, samples) -> None:
        remote.announce(batch, *self.part(samples, "shards", "begins", "ends"))

    def read(self, fetcher, samples, batch: int = -1) -> dict[int, object]:
        """Sample -> its bytes or its fault."""
        found = fetcher.read(*self.part(samples), batch=batch)
        return {int(samples[i]): data for i, data in found}

    def expected(self, sample: int) -> bytes:
        shard, offset, size = (int(self.columns[name][sample]) for name in ("shards", "offsets", "sizes"))
        return self.contents[shard][offset : offset + size]

    def stream(self, remote: RemoteFetch, batches, *, ahead: int = 8, first: int = 0) -> int:
        """Read batches as a rank of one worker does, comparing every byte; gives the samples read."""
        fetcher, count = remote.fetcher(), 0
        for number in range(-ahead, len(batches)):
            if number + ahead < len(batches):
                self.announce(remote, first + number + ahead, batches[number + ahead])
            if number < 0:
                continue
            got = self.read(fetcher, batches[number], first + number)
            assert sorted(got) == sorted(batches[number].tolist())
            for sample, data in got.items():
                # not the zeros between members, which nothing vouches for
                here, there = (
                    read_members(memoryview(span), where="") for span in (data, self.expected(sample))
                )
                assert here == there, f"sample {sample} is not as it was written"
            count += len(got)
            remote.done(first + number)
            remote.check()
        return count


def describe(folder: Path, url: str, *, block: int = 32) -> Remote:
    """The data set in a folder, as it is seen at a URL."""
    opened = open_shards(str(folder))
    offsets, sizes = (opened.index[name].astype(np.int64) for name in ("offset", "size"))
    shards = np.searchsorted(opened.starts, np.arange(len(offsets)), side="right") - 1
    begins, ends = offsets.copy(), offsets.copy()
    for shard in range(len(opened.shards)):
        mine = np.flatnonzero(shards == shard)
        for first in range(0, len(mine), block):
            group = mine[first : first + block]
            begins[group], ends[group] = offsets[group[0]], offsets[group[-1]] + sizes[group[-1]]
    return Remote(
        url,
        [os.path.basename(shard.path) for shard in opened.shards],
        [shard.bytes for shard in opened.shards],
        [shard.xxh3_128 for shard in opened.shards],
        {"shards": shards, "offsets": offsets, "sizes": sizes, "begins": begins, "ends": ends},
        [Path(shard.path).read_bytes() for shard in opened.shards],
    )


def shuffled(count: int, batch: int, seed: int = 0) -> list[np.ndarray]:
    """All samples in batches, in some order."""
    order = np.random.default_rng(seed).permutation(count)
    return [order[i : i + batch] for i in range(0, count, batch)]
