"""The bound: JPEG bytes in memory to a 336 x 336 uint8 picture, one process per core, and nothing else."""

import multiprocessing
import time
from functools import partial

import simplejpeg
import torch


def decode(data: bytes, size: int = 336) -> torch.Tensor:
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False))
    height, width = pixels.shape[:2]
    new = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    resized = torch.nn.functional.interpolate(
        pixels.permute(2, 0, 1).unsqueeze(0), new, mode="bicubic", antialias=True
    )
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return resized[0, :, top : top + size, left : left + size].contiguous()


def _work(barrier, done, pictures: list[bytes], count: int) -> None:
    torch.set_num_threads(1)
    for data in pictures[:16]:
        decode(data)
    barrier.wait()
    for number in range(count):
        decode(pictures[number % len(pictures)])
    done.put(time.perf_counter())


def measure(pictures: list[bytes], *, count: int, processes: int) -> float:
    """Pictures a second over all processes, `count` in each."""
    context = multiprocessing.get_context("fork")
    barrier, done = context.Barrier(processes + 1), context.SimpleQueue()
    target = partial(_work, barrier, done, pictures, count)
    workers = [context.Process(target=target, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    barrier.wait()
    begin = time.perf_counter()
    end = max(done.get() for _ in workers)
    for worker in workers:
        worker.join()
    return count * processes / (end - begin)
