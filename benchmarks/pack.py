"""What do packing, planning and indexing cost, beside tar(1) and webdataset?

    python -m benchmarks.pack                         everything but `millions`
    python -m benchmarks.pack --only photos,latency   parts of it

Contenders take turns in one run; what counts is the median of the ratios inside the rounds. Start-up (interpreter and imports) counts for nobody, and
every contender ends with an fsync of what it wrote. Results are kept part by part in results/pack.json.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from PIL import Image

from benchmarks import runner

PACK = """
import os, sys, time
from shardify.convert import PackOptions, pack_dataset
import shardify.engines.local, numpy, pyarrow.parquet
pyarrow.array(numpy.zeros(1))  # which imports pandas
records, images, out, workers = sys.argv[1:]
begin = time.perf_counter()
pack_dataset(PackOptions(records=[records], images=[images], out=out, workers=int(workers)))
flush(out)
print(time.perf_counter() - begin)
"""
SHARD_WRITER = """
import json, os, sys, time
from pathlib import Path
import webdataset
records, images, out, _ = sys.argv[1:]
os.mkdir(out)
begin = time.perf_counter()
with webdataset.ShardWriter(out + "/%03d.tar", maxsize=256e6, maxcount=10**9, verbose=0) as writer:
    for number, record in enumerate(json.loads(Path(records).read_bytes())):
        image = Path(images, record["image"]).read_bytes()
        writer.write({"__key__": f"{number:09d}", "jpg": image, "json": record})
flush(out)
print(time.perf_counter() - begin)
"""
TAR = """
import os, subprocess, sys, time
_, images, out, _ = sys.argv[1:]
os.mkdir(out)
begin = time.perf_counter()
subprocess.run(["tar", "cf", out + "/all.tar", "-C", os.path.dirname(images), os.path.basename(images)], check=True)
flush(out)
print(time.perf_counter() - begin)
"""
DISK = """
import mmap, os, sys, time
_, images, out, writers = sys.argv[1:]
os.mkdir(out)
total = sum(entry.stat().st_size for entry in os.scandir(images))
buffer = mmap.mmap(-1, 4 * 2**20)
buffer.write(os.urandom(len(buffer)))
begin = time.perf_counter()
for number in range(int(writers)):
    if not os.fork():
        file = os.open(f"{out}/{number}", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        for _ in range(total // int(writers) // len(buffer)):
            os.write(file, buffer)
        os.fsync(file)
        os._exit(0)
for _ in range(int(writers)):
    assert os.wait()[1] == 0
print(time.perf_counter() - begin)
"""
PLAN = """
import sys, time
from shardify.convert import PackOptions, plan_dataset
import shardify.engines.local, numpy, pyarrow.parquet
pyarrow.array(numpy.zeros(1))  # which imports pandas
begin = time.perf_counter()
plan = plan_dataset(PackOptions(records=[sys.argv[1]], images=[sys.argv[2]], out=sys.argv[3]))
assert len(plan.order) == int(sys.argv[4])
print(time.perf_counter() - begin)
"""
INDEX = """
import sys, time
from shardify.indexing import index_shards
import numpy, pyarrow.parquet, PIL.Image
pyarrow.array(numpy.zeros(1))  # which imports pandas
begin = time.perf_counter()
index_shards(sys.argv[1:], workers=1)
print(time.perf_counter() - begin)
"""
ITERATE = """
import sys, time
import webdataset
begin = time.perf_counter()
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
    pass
print(time.perf_counter() - begin)
"""
FLUSH = """
import os
def flush(folder):
    for name in os.listdir(folder):
        file = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.fsync(file)
        os.close(file)
"""
TURNS = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "A photograph."}]
LATENCY = 5000
"""Microseconds."""
# liuhaotian's llava_v1_5_mix665k.json: records by image folder, and files there (haotian-liu/LLaVA issues 657 and 702)
MIX = {
    "coco/train2017/{:012d}.jpg": (364_100, 118_287),
    "gqa/images/{}.jpg": (72_140, 148_854),
    "ocr_vqa/images/{:010d}.jpg": (80_000, 207_572),
    "textvqa/train_images/{:016x}.jpg": (21_953, 25_119),
    "vg/VG_100K/{}.jpg": (51_313, 64_346),
    "vg/VG_100K_2/{}.jpg": (35_104, 43_903),
    "": (40_688, 0),
}
MIX_BYTES = 630e6
MOST_LINKS = 60_000  # of one file, under ext4's limit


def distinct(pictures: list[bytes]) -> Iterator[bytes]:
    """JPEG pictures, again and again, made distinct by a comment."""
    for number, data in enumerate(cycle(pictures)):
        comment = f"{number:012d}".encode()
        yield data[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment + data[2:]


def write_photos(folder: Path, total: int) -> tuple[int, int]:
    """Distinct photographs of `total` bytes in a folder and in a stored zip, and records; how many they are and their bytes."""
    _, pictures = runner.photos()
    (folder / "images").mkdir()
    records, written = [], 0
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for number, data in enumerate(distinct(pictures)):
            if written >= total:
                break
            name = f"{number:09d}.jpg"
            (folder / "images" / name).write_bytes(data)
            archive.writestr(name, data)
            written += len(data)
            records.append({"id": f"{number:09d}", "image": name, "conversations": TURNS})
    (folder / "chat.json").write_text(json.dumps(records))
    forget([folder / "images.zip", *(folder / "images").iterdir()])
    return len(records), written


def forget(files: Iterable[Path]) -> None:
    """Take files out of the page cache.

    What is read again lies there in larger pieces than what a writer has put there bit by bit: archives are to be as those that have been
    there for long, not as those that were just written.
    """
    os.sync()
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def script(text: str, *arguments: Any, environment: dict[str, str] | None = None) -> float:
    """Seconds that the script measured."""
    done = subprocess.run(
        [sys.executable, "-c", FLUSH + text, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ, **(environment or {})),
    )
    return float(done.stdout.split()[-1])


def same_start(out: Path, source: Path, size: int) -> None:
    """Remove what was written before, have `source` in the page cache, and as much free memory ready as `size` bytes of photographs take.

    A virtual machine gives free memory back to its host after a while, and gets it again page by page at several times the price of a
    page that it still has: whoever writes first after a pause would pay for all. It may take away what was not read for half a minute, too.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    size = min(3 * size, 5 * 2**30, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    touch = "import mmap, sys; mmap.mmap(-1, int(sys.argv[1]), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
    subprocess.run([sys.executable, "-c", touch, str(size)], check=True)
    for file in source.iterdir() if source.is_dir() else (source,):
        file.read_bytes()


def measure_photos(folder: Path, *, rounds: int, total: int) -> dict[str, Any]:
    """Packing photographs from a folder and from a zip, by one worker and by two, beside tar and webdataset's ShardWriter."""
    count, written = write_photos(folder, total)
    runner.headline(f"Packing {count:,} distinct photographs, {written / 1e9:.2f} GB, fsync included")
    chat, images, archive, out = (folder / name for name in ("chat.json", "images", "images.zip", "out"))

    def rate(text: str, source: Path, workers: int = 1) -> Callable[[], float]:
        def run() -> float:
            same_start(out, source, written)
            return count / script(text, chat, source, out, workers)

        return run

    contenders = {
        "tar cf": rate(TAR, images),
        "shardify pack": rate(PACK, images),
        "shardify pack, 2 workers": rate(PACK, images, 2),
        "shardify pack, from a stored zip": rate(PACK, archive),
        "webdataset ShardWriter": rate(SHARD_WRITER, images),
    }
    with suppress(OSError):  # a file system that cannot
        os.close(os.open(folder / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
        contenders["the disk alone, 2 writers"] = rate(DISK, images, 2)
    comparison = runner.interleave(contenders, rounds=rounds, unit="samples/s")
    print(runner.table(comparison, reference="tar cf"))
    ratios = {
        "one worker over tar cf": comparison.ratio("shardify pack", "tar cf"),
        "one worker over ShardWriter": comparison.ratio("shardify pack", "webdataset ShardWriter"),
        "two workers over one": comparison.ratio("shardify pack, 2 workers", "shardify pack"),
        "zip over folder": comparison.ratio("shardify pack, from a stored zip", "shardify pack"),
    }
    if "the disk alone, 2 writers" in contenders:
        for name in ("shardify pack", "shardify pack, 2 workers"):
            ratios[f"{name} over the disk alone"] = comparison.ratio(name, "the disk alone, 2 writers")
    return {**runner.described(comparison), "samples": count, "bytes": written, "ratios": show(ratios)}


def measure_latency(folder: Path, *, rounds: int, total: int) -> dict[str, Any]:
    """The same with 5 ms added to every open of an image."""
    count, written = write_photos(folder, total // 8)
    library = folder / "slow_open.so"
    source = Path(__file__).parent / "slowfs" / "slow_open.c"
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    slow = {
        "LD_PRELOAD": str(library),
        "SLOW_OPEN_BELOW": os.path.realpath(folder / "images"),
        "SLOW_OPEN_MICROS": str(LATENCY),
    }
    runner.headline(f"Packing {count:,} photographs, {LATENCY / 1000:.0f} ms added to every open")
    out = folder / "out"

    def rate(text: str) -> Callable[[], float]:
        def run() -> float:
            same_start(out, folder / "images", written)
            return count / script(text, folder / "chat.json", folder / "images", out, 1, environment=slow)

        return run

    contenders = {"tar cf": rate(TAR), "shardify pack": rate(PACK)}
    comparison = runner.interleave(contenders, rounds=rounds, unit="samples/s")
    print(runner.table(comparison, reference="tar cf"))
    ratios = {"one worker over tar cf": comparison.ratio("shardify pack", "tar cf")}
    return {**runner.described(comparison), "samples": count, "bytes": written, "ratios": show(ratios)}


class PeakMemory:
    """The largest RssAnon, in bytes, that any process of this one's children and theirs has while the context is open."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            waiting = _children(os.getpid())
            while waiting:
                process = waiting.pop()
                waiting += _children(process)
                with suppress(OSError):
                    for line in Path(f"/proc/{process}/status").read_text().splitlines():
                        if line.startswith("RssAnon:"):
                            self.peak = max(self.peak, int(line.split()[1]) * 1024)


def _children(process: int) -> list[int]:
    found = []
    with suppress(OSError):
        for thread in Path(f"/proc/{process}/task").iterdir():
            found += [int(child) for child in (thread / "children").read_text().split()]
    return found


def write_tree(root: Path) -> dict[str, list[str]]:
    """The image folders of mix665k with all their names, each a link to an empty file; the names, folder by folder."""
    numbers = random.Random(0)
    tree = {}
    linked, target = MOST_LINKS, ""
    for pattern, (_, files) in MIX.items():
        names = (
            [pattern.format(number) for number in sorted(numbers.sample(range(10**7), files))]
            if files
            else []
        )
        if names:
            (root / names[0]).parent.mkdir(parents=True)
        for name in names:
            if linked == MOST_LINKS:
                linked, target = 0, str(root / f"{name}.source")
                Path(target).write_bytes(b"x")
            os.link(target, f"{root}/{name}")
            linked += 1
        tree[pattern] = names
    return tree


def write_mix(path: Path, tree: dict[str, list[str]]) -> int:
    """A record file of mix665k's shape: the published counts, names and size, in random order."""
    choose = random.Random(0)
    images = [name for pattern, (count, _) in MIX.items() for name in picked(choose, tree[pattern], count)]
    choose.shuffle(images)
    words = (
        "the",
        "a",
        "bus",
        "image",
        "white",
        "red",
        "people",
        "street",
        "of",
        "in",
        "holding",
        "several",
        "is",
    )
    length = MIX_BYTES / len(images) - 150
    with path.open("w") as file:
        for number, image in enumerate(images):
            turns = []
            left = choose.expovariate(1 / length)
            while left > 0 or not turns:
                question, answer = (
                    " ".join(choose.choices(words, k=choose.randrange(5, 20))) for _ in range(2)
                )
                begin = "<image>\n" if image and not turns else ""
                turns += [{"from": "human", "value": begin + question}, {"from": "gpt", "value": answer}]
                left -= len(question) + len(answer) + 70
            record = (
                {"id": Path(image).stem, "image": image}
                if image
                else {"id": f"sharegpt_{number}", "model": ""}
            )
            file.write("[" if not number else ", ")
            file.write(json.dumps({**record, "conversations": turns}))
        file.write("]")
    return len(images)


def picked(choose: random.Random, names: list[str], count: int) -> list[str]:
    """`count` of the names, again from the start when there are fewer; empty ones when there are none."""
    if not names:
        return [""] * count
    return list(islice(cycle(choose.sample(names, len(names))), count))


def measure_planning(folder: Path, *, rounds: int, total: int) -> dict[str, Any]:
    """From records and folder to the plan: splitting, reading every record, finding every image, the order."""
    del total
    tree = write_tree(folder / "images")
    count = write_mix(folder / "mix.json", tree)
    return _plan(folder / "mix.json", folder / "images", count, rounds)


def measure_millions(folder: Path, *, rounds: int, total: int) -> dict[str, Any]:
    """The same for ten million records of the shape of LLaVA's pretraining set."""
    del total
    count = 10_000_000
    names = [name for names in write_tree(folder / "images").values() for name in names]
    with (folder / "many.json").open("w") as file:
        for number, image in enumerate(islice(cycle(names), count)):
            file.write("[" if not number else ", ")
            file.write(json.dumps({"id": f"{number:09d}", "image": image, "conversations": TURNS}))
        file.write("]")
    return _plan(folder / "many.json", folder / "images", count, min(rounds, 1))


def _plan(records: Path, images: Path, count: int, rounds: int) -> dict[str, Any]:
    size = records.stat().st_size
    runner.headline(
        f"Planning {count:,} records, {size / 1e6:,.0f} MB of JSON, beside a folder of 608,081 names"
    )
    seconds, peaks = [], []
    for number in range(rounds):
        with PeakMemory() as memory:
            seconds.append(script(PLAN, records, images, records.parent / "out", count))
        peaks.append(memory.peak)
        print(f"  round {number + 1}/{rounds}: {seconds[-1]:.1f} s, {peaks[-1] / 1e6:,.0f} MB", flush=True)
    return {
        "unit": "s",
        "records": count,
        "bytes": size,
        "median": {"plan": round(statistics.median(seconds), 2)},
        "rounds": [{"plan": round(second, 2)} for second in seconds],
        "peak_anonymous_megabytes": round(max(peaks) / 1e6),
    }


def measure_index(folder: Path, *, rounds: int, total: int) -> dict[str, Any]:
    """Indexing tars that webdataset wrote, hashes and image headers included, beside iterating them."""
    _, photos = runner.photos()
    results = {}
    for kind, pictures, size in (
        ("photographs", photos, total),
        ("thumbnails", [_thumbnail(photo) for photo in photos], total // 4),
    ):
        tars, count = _write_tars(folder / kind, pictures, size)
        runner.headline(f"Indexing {count:,} samples with {kind} in {len(tars)} tars, {size / 1e9:.2f} GB")

        def index(tars: list[str] = tars, count: int = count) -> float:
            for path in tars:
                Path(path).with_suffix(".parquet").unlink(missing_ok=True)
                Path(path).read_bytes()
            return count / script(INDEX, *tars)

        def iterate(tars: list[str] = tars, count: int = count) -> float:
            for path in tars:
                Path(path).read_bytes()
            return count / script(ITERATE, *tars)

        contenders = {"webdataset": iterate, "shardify index": index}
        comparison = runner.interleave(contenders, rounds=rounds, unit="samples/s")
        print(runner.table(comparison, reference="webdataset"))
        ratios = {"index over webdataset": comparison.ratio("shardify index", "webdataset")}
        results[kind] = {**runner.described(comparison), "samples": count, "ratios": show(ratios)}
    return results


def _thumbnail(photo: bytes) -> bytes:
    with Image.open(BytesIO(photo)) as image:
        small = image.convert("RGB").resize((256, 256))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


def _write_tars(folder: Path, pictures: list[bytes], total: int) -> tuple[list[str], int]:
    import webdataset

    folder.mkdir()
    count = written = 0
    pattern = str(folder / "%03d.tar")
    with webdataset.ShardWriter(pattern, maxsize=total / 8, maxcount=10**9, verbose=0) as writer:
        for data in distinct(pictures):
            if written >= total:
                break
            record = {"id": f"{count:09d}", "conversations": TURNS}
            writer.write({"__key__": f"{count:09d}", "jpg": data, "json": record})
            written += len(data)
            count += 1
    tars = sorted(folder.glob("*.tar"))
    forget(tars)
    return [str(path) for path in tars], count


def show(ratios: dict[str, float]) -> dict[str, float]:
    for name, ratio in ratios.items():
        print(f"  {name}: {ratio:.2f}")
    return {name: round(ratio, 2) for name, ratio in ratios.items()}


PARTS = {
    "photos": measure_photos,
    "latency": measure_latency,
    "planning": measure_planning,
    "index": measure_index,
    "millions": measure_millions,
}
BIG = ("millions",)


def compare(*, rounds: int, total: int, only: tuple[str, ...] = ()) -> None:
    """Run the parts and keep what they say."""
    for name in only or [name for name in PARTS if name not in BIG]:
        with TemporaryDirectory(dir=os.environ.get("SHARDIFY_BENCH_DIR")) as folder:
            result = PARTS[name](Path(folder), rounds=rounds, total=total)
        runner.save_part("pack", name, result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="PART,...", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bytes", type=float, default=2.1e9, help="of the photographs")
    arguments = parser.parse_args()
    chosen = tuple(arguments.only.split(",")) if arguments.only else ()
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    compare(rounds=arguments.rounds, total=int(arguments.bytes), only=chosen)
