"""What all modules share: the samples of shards in their order, pictures by Pillow, and batches of them."""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from benchmarks.kernel import decode

Picture = Callable[[bytes], torch.Tensor]
SIZE = 336


def read(shards: Iterable[Path]) -> Iterator[tuple[str, bytes, bytes]]:
    """(key, JPEG, record) of every sample; members of a sample stand side by side."""
    for shard in shards:
        fields: dict[str, bytes] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, field = member.name.partition(".")
                fields[field] = archive.extractfile(member).read()
                if len(fields) == 2:
                    yield key, fields["jpg"], fields["json"]
                    fields = {}


def link(shards: Iterable[Path], folder: Path) -> None:
    """The shards under the same names in `folder`, without another copy."""
    folder.mkdir()
    for shard in shards:
        (folder / shard.name).hardlink_to(shard)


def by_pillow(data: bytes) -> torch.Tensor:
    """JPEG to uint8 [3, 336, 336], as data loading with Pillow is commonly written."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.convert("RGB")
    scale = SIZE / min(pixels.size)
    pixels = pixels.resize([max(SIZE, int(side * scale)) for side in pixels.size], Image.Resampling.BICUBIC)
    left, top = (pixels.width - SIZE) // 2, (pixels.height - SIZE) // 2
    pixels = pixels.crop((left, top, left + SIZE, top + SIZE))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


PICTURES: dict[str, Picture | None] = {"pillow": by_pillow, "kernel": decode, "raw": None}


def collate(samples: list[tuple[torch.Tensor, bytes]]) -> tuple[torch.Tensor, list[bytes]]:
    """(pictures, records) of a batch; torch's own function puts pictures straight into memory shared with the main process."""
    return default_collate([picture for picture, _ in samples]), [record for _, record in samples]
