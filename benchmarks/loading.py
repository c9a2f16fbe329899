"""How near does StreamingLoader come to the decode+resize kernel, and how far is webdataset?

Two workers, batches of 64, 336 pixels, crop, uint8. Everything lies in the page cache; start-up of workers is not counted.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import kernel, runner

BATCH = 64
WORKERS = 2


def write_data_set(folder: Path, pictures: list[bytes], samples: int) -> Path:
    """`samples` records over the pictures, packed into four shards."""
    from shardify.convert import PackOptions, pack_dataset

    images = folder / "images"
    images.mkdir()
    records = []
    for number in range(samples):
        name = f"{number % len(pictures):05d}.jpg"
        if number < len(pictures):
            (images / name).write_bytes(pictures[number])
        turns = [
            {"from": "human", "value": "<image>\nDescribe it."},
            {"from": "gpt", "value": "A photograph."},
        ]
        records.append({"id": f"{number:09d}", "image": name, "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))
    pack_dataset(PackOptions(records=[folder / "chat.json"], images=[images], out=folder / "data", shards=4))
    return folder / "data"


def rate_of(batches, *, samples: int, warm_up: int) -> float:
    """Samples a second of an endless iterator of (samples, pixels) after `warm_up` batches."""
    for _ in itertools.islice(batches, warm_up):
        pass
    begin, seen = time.perf_counter(), 0
    while seen < samples:
        count, pixels = next(batches)
        assert pixels.shape[1:] == (3, 336, 336)
        assert pixels.dtype == torch.uint8
        seen += count
    return seen / (time.perf_counter() - begin)


def streaming(data: Path):
    from loaders import ImageTransform, StreamingLoader

    loader = StreamingLoader(
        data, batch_size=BATCH, image=ImageTransform(336, fit="crop"), text=None, num_workers=WORKERS
    )
    while True:
        for batch in loader:
            yield len(batch.keys), batch.images


def webdataset_pillow(data: Path):
    import webdataset
    from PIL import Image

    def picture(sample):
        image = sample["jpg"].convert("RGB")
        scale = 336 / min(image.size)
        image = image.resize([max(336, int(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
        left, top = (image.width - 336) // 2, (image.height - 336) // 2
        pixels = torch.frombuffer(
            bytearray(image.crop((left, top, left + 336, top + 336)).tobytes()), dtype=torch.uint8
        )
        return pixels.view(336, 336, 3).permute(2, 0, 1), sample["json"]

    def collate(samples):
        return torch.stack([image for image, _ in samples]), [record for _, record in samples]

    shards = sorted(map(str, data.glob("*.tar")))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), resampled=False, empty_check=False)
        .repeat()
        .shuffle(1000, initial=100)
        .decode("pil")
        .map(picture)
        .batched(BATCH, collation_fn=collate)
    )
    for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS):
        yield len(images), images


def compare(*, rounds: int, samples: int) -> runner.Comparison:
    described, pictures = runner.photos()
    runner.headline(f"Loading: {described}, {WORKERS} workers, batches of {BATCH}, 336 crop")
    with TemporaryDirectory() as folder:
        data = write_data_set(Path(folder), pictures, samples)
        # both loaders stay open over all rounds, idle (their queues full) while another contender runs
        contenders = {
            "kernel": lambda: kernel.measure(pictures, count=samples // WORKERS, processes=WORKERS),
            "StreamingLoader": lambda: rate_of(streaming(data), samples=samples, warm_up=6),
            "webdataset + Pillow": lambda: rate_of(webdataset_pillow(data), samples=samples // 2, warm_up=6),
        }
        comparison = runner.interleave(contenders, rounds=rounds, unit="samples/s")
    print(runner.table(comparison, reference="kernel"))
    runner.save("loading", comparison, data=described, samples=samples, workers=WORKERS, batch=BATCH)
    return comparison


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=3072)
    arguments = parser.parse_args()
    compare(rounds=arguments.rounds, samples=arguments.samples)
