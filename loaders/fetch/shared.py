"""What the processes of a rank share about its fetching: counters, the news that blocks came, why it failed, and messages to the downloader.

All of it is memory and pipes without names: nothing is left behind when the processes are killed.
"""

import fcntl
import mmap
import os
import select
import struct
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_NUMBERS = 64
_TEXT = 8192
_LENGTH = struct.Struct("<q")
_NAMES = ("requests", "retries", "bytes_fetched", "hits", "bytes_used", "waits", "wait_us", "evicted_in_need")
_NEWS = 32  # counters of the machinery stand behind those for people
_WHOLES = 33

_FIELDS = 6  # kind, batch, shard, begin, end, value: int64
_RECORDS = 4096 // (8 * _FIELDS)  # in one write: the kernel divides none of up to 4096 bytes (PIPE_BUF)
_PIPE_BYTES = 1024 * 1024
_WHOLE_RECORDS = _PIPE_BYTES // (8 * _FIELDS) * 8 * _FIELDS
_F_SETPIPE_SZ = 1031  # linux/fcntl.h


class FetchCounters:
    """Numbers that one process counts and its relatives see: made before they are forked.

    requests: made to object stores, with those repeated; retries: of them, repeated ones; bytes_fetched: that came; hits: blocks that
    were there already when they were needed; bytes_used: of the samples read; waits: blocks that a worker had to wait for;
    wait_us: how long, in microseconds, over all workers; evicted_in_need: blocks needed later that went because the cache is too small.
    """

    def __init__(self) -> None:
        file = os.memfd_create("fetch-counters", os.MFD_CLOEXEC)
        try:
            os.ftruncate(file, _NUMBERS * 8 + _TEXT)
            self._memory = mmap.mmap(file, _NUMBERS * 8 + _TEXT)
        finally:
            os.close(file)
        self._numbers = np.frombuffer(self._memory, np.int64, _NUMBERS)

    def snapshot(self) -> dict[str, int]:
        """Every counter by name."""
        return dict(zip(_NAMES, self._numbers[: len(_NAMES)].tolist(), strict=True))

    def add(self, name: str, value: int = 1) -> None:
        """Count; in one process and thread at a time."""
        self._numbers[_NAMES.index(name)] += value

    @property
    def news(self) -> int:
        """Changes whenever blocks have come; 0 until the cache is open."""
        return int(self._numbers[_NEWS])

    def tell_news(self) -> None:
        """Some blocks have come."""
        self._numbers[_NEWS] += 1

    @property
    def has_whole_shards(self) -> bool:
        """Whether some shards are kept whole, since their servers give no ranges."""
        return bool(self._numbers[_WHOLES])

    def keep_whole_shards(self) -> None:
        """Some shard is from now on."""
        self._numbers[_WHOLES] = 1

    @property
    def failure(self) -> str:
        """Why fetching cannot go on; empty while it can."""
        start = _NUMBERS * 8
        (length,) = _LENGTH.unpack_from(self._memory, start)
        start += _LENGTH.size
        return self._memory[start : start + length].decode("utf-8", "replace")

    def restart(self) -> None:
        """A download process begins, which has not failed and knows of no whole shards."""
        self._numbers[[_NEWS, _WHOLES]] = 0
        _LENGTH.pack_into(self._memory, _NUMBERS * 8, 0)

    def fail(self, message: str) -> None:
        """Say why fetching cannot go on; the first reason stays."""
        if self.failure:
            return
        text = message.encode()[: _TEXT - _LENGTH.size]
        start = _NUMBERS * 8
        self._memory[start + _LENGTH.size : start + _LENGTH.size + len(text)] = text
        _LENGTH.pack_into(self._memory, start, len(text))  # last: who sees it sees the text


class Kind(IntEnum):
    """Of a message to the download process."""

    ANNOUNCE = 0
    """A batch will need an extent."""
    DONE = 1
    """A batch needs nothing any more."""
    WAIT = 2
    """A worker waits for an extent."""
    READ = 3
    """A worker has read samples of a batch from an extent; the value is their number."""
    USED = 4
    """A worker has read all it needs for a batch; the value is bytes."""
    WAITED = 5
    """It has waited meanwhile; the value is microseconds."""
    CLOSE = 6
    """End."""


class Messages:
    """A pipe from many processes to one, which never divides a message. Made before they are forked."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with suppress(OSError):  # over the user's limit: it works with less
            fcntl.fcntl(self.writer, _F_SETPIPE_SZ, _PIPE_BYTES)
        self._backlog: list[bytes] = []
        self._room, self._gone = select.poll(), select.poll()
        self._room.register(self.writer, select.POLLOUT)
        self._gone.register(self.writer, 0)  # errors are told of without asking

    def send(self, records: IntArray) -> None:
        """Send int64 [n, 6], waiting while the pipe is full.

        Raises:
            BrokenPipeError: the reader has gone.
        """
        for part in _parts(records):
            while True:
                try:
                    os.write(self.writer, part)
                except BlockingIOError:
                    self._room.poll(1000)
                    continue
                break

    def post(self, records: IntArray | None = None) -> None:
        """Send without waiting: what does not go now goes with the next call.

        Raises:
            BrokenPipeError: the reader has gone.
        """
        if records is not None:
            self._backlog += _parts(records)
        sent = 0
        try:
            for part in self._backlog:
                os.write(self.writer, part)
                sent += 1
        except BlockingIOError:
            pass
        del self._backlog[:sent]

    def pause(self, milliseconds: int) -> bool:
        """Wait, but not for a reader that has gone: whether it is still there."""
        return not self._gone.poll(milliseconds)

    def receive(self) -> IntArray:
        """What has come, int64 [n, 6]."""
        try:
            data = os.read(self.reader, _WHOLE_RECORDS)
        except BlockingIOError:
            data = b""
        return np.frombuffer(data, np.int64).reshape(-1, _FIELDS)


def message(
    kind: Kind, batch: int = -1, extents: IntArray | None = None, values: Sequence[int] | int = 0
) -> IntArray:
    """Records of one kind, int64 [n, 6].

    Args:
        kind: what they say.
        batch: of which batch.
        extents: int64 [n, 3], shards, first bytes and ends; None for one record about no extent.
        values: of the records.
    """
    records = np.zeros((1 if extents is None else len(extents), _FIELDS), np.int64)
    records[:, 0], records[:, 1], records[:, 5] = kind, batch, values
    if extents is not None:
        records[:, 2:5] = extents
    return records


def _parts(records: IntArray) -> list[bytes]:
    return [records[i : i + _RECORDS].tobytes() for i in range(0, len(records), _RECORDS)]
