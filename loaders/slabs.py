"""Reusable memory for pixels, shared with workers: nothing is named, allocated per batch, pickled or copied.

One anonymous file (memfd), mapped before the workers are forked, is cut into slabs of equal size. The main process alone owns the free
list: it sends a slab's number, or none, to a worker with a batch's plan, and wraps the slab in tensors when the batch comes back. A slab
is free again when every tensor over it is gone and the copies out of it are complete. When the process group is killed the kernel takes
the memory back; there is no name to leave behind, and /dev/shm is not involved.
"""

import logging
import mmap
import os
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]

_log = logging.getLogger("loaders")

_PAGE = mmap.PAGESIZE
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class SlabPool:
    """`count` slabs of `size` bytes.

    Args:
        count: slabs; 0 is allowed.
        size: bytes of each, rounded up to whole pages. Memory is only used once it is written.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = -(-size // _PAGE) * _PAGE
        self.count = count if size else 0
        self._map: mmap.mmap | None = None
        if self.count:
            descriptor = os.memfd_create("slabs")
            try:
                os.ftruncate(descriptor, self.count * self.size)
                self._map = mmap.mmap(descriptor, self.count * self.size)
            finally:
                os.close(descriptor)
        self._free: deque[int] = deque(range(self.count))
        self._copies: dict[int, list[torch.cuda.Event]] = {}
        self._draining: list[int] = []
        self._process = os.getpid()
        self._device: int | None = None  # where the memory was pinned
        self._refused = False

    def acquire(self) -> int | None:
        """A free slab's number, or None when all are in use."""
        for slab in [slab for slab in self._draining if _complete(self._copies[slab])]:
            self._draining.remove(slab)
            del self._copies[slab]
            self._free.append(slab)
        try:
            return (
                self._free.pop()
            )  # the one last used: it may still be in the cache, and others need never be touched
        except IndexError:
            return None

    def memory(self, slab: int) -> Bytes:
        """A slab's bytes, uint8 [size]; for workers, which must not keep it."""
        assert self._map is not None
        return np.frombuffer(self._map, np.uint8, self.size, slab * self.size)

    def lend(self, slab: int) -> Bytes:
        """A slab's bytes, uint8 [size], freed when the array and everything made over it are gone."""
        self.pin()
        memory = self.memory(slab)
        weakref.finalize(memory, self.release, slab).atexit = False
        return memory

    def lend_views(self, slab: int, spans: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Byte strings that lie in a slab, which is freed when all of them are gone.

        Args:
            slab: its number.
            spans: where each of them begins and ends.

        Returns:
            Read-only views, in order; of none, the slab is free at once.
        """
        memory = memoryview(self.lend(slab).data).toreadonly()
        return [memory[begin:end] for begin, end in spans]

    def release(self, slab: int) -> None:
        """Free a slab, once the copies out of it are complete: those recorded, and those on the device's current stream."""
        if self._process != os.getpid():  # a forked copy of the batch is gone, not the batch
            return
        # a plain `tensor.to("cuda", non_blocking=True)` records nothing; what a graph being captured would record never comes to pass
        if self._device is not None and not torch.cuda.is_current_stream_capturing():
            # of the device pinned on: the thread in which the last tensor goes may have another current one
            self.record_copy(slab, torch.cuda.current_stream(self._device).record_event())
        (self._draining if slab in self._copies else self._free).append(slab)

    def record_copy(self, slab: int, event: torch.cuda.Event) -> None:
        """Keep a slab until `event` has come to pass."""
        self._copies.setdefault(slab, []).append(event)

    def pin(self) -> None:
        """Register the memory with CUDA, so that copies to the device run beside other work.

        Only once this process uses CUDA: a trainer that computes elsewhere takes no context and no memory on a device for the loader's sake.
        Until then nothing happens; the first slab lent afterwards makes up for it.
        """
        if self._map is None or self._device is not None or self._refused:
            return
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return
        address = np.frombuffer(self._map, np.uint8).ctypes.data
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = int(cudart.cudaHostRegister(address, self.count * self.size, _PORTABLE))
        if status != 0:
            self._refused = True
            _log.warning(
                "CUDA cannot pin the loader's memory (error %d): the host waits for each copy to the device",
                status,
            )
            with suppress(RuntimeError):  # CUDA tells its last error once more, to whoever uses it next
                torch.zeros(1, device="cuda")
            return
        self._device = torch.cuda.current_device()
        weakref.finalize(self, _unpin, address, self._copies).atexit = False


def _complete(events: list[torch.cuda.Event]) -> bool:
    return all(event.query() for event in events)  # type: ignore[no-untyped-call]


def _unpin(address: int, copies: dict[int, list[torch.cuda.Event]]) -> None:
    for event in chain.from_iterable(copies.values()):
        event.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
