"""The spool: what a source says that cannot be read in place, written once as plain files.

    NAME-HASH.records    the records' bytes, one a line
    NAME-HASH.images     the bytes of the images that came with them, one after another

The names depend on the source alone and the content on what it holds, so that a later run of the same command writes the same files again.
"""

import os
import re
import shutil
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from io import FileIO
from typing import Self

import numpy as np
import xxhash

from shardify.errors import RecordError, SourceError
from shardify.prepare import encode_record, prepare
from shardify.sources.llava import RecordFile, file_stamp
from shardify.sources.spec import Embedded

NOT_EMBEDDED = -1
"""The offset of an image that did not come with its record: its path is looked for in the image stores."""

FIELD_DROPPED = "field-dropped"

_TOO_DEEP = b"nested too deeply to be written"
_BUFFER = 4 * 1024 * 1024
_MARGIN = 64 * 1024 * 1024  # of disk, left free
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_GIB = 1024**3


def spool_path(folder: str, source: str, ending: str) -> str:
    """Where a source is spooled: by its name, for people, and a hash of its path, since names repeat."""
    os.makedirs(folder, exist_ok=True)
    where = source if "://" in source else os.path.abspath(source)
    digest = xxhash.xxh3_64_hexdigest(os.fsencode(where))
    name = _UNSAFE.sub("_", os.path.basename(where.rstrip("/")))[-80:]
    return os.path.join(folder, f"{name}-{digest}{ending}")


def require_room(folder: str, size: int, *, called: str) -> None:
    """Make sure that `size` bytes can be spooled.

    Raises:
        SourceError: too little disk is free.
    """
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size + _MARGIN > free:
        raise SourceError(
            f"{called}: is copied into {folder} before it is packed, which needs {size / _GIB:.2f} GiB, and {free / _GIB:.2f} GiB are "
            "free there; make room, or unpack the source elsewhere and give its records and image folder instead"
        )


class Spool:
    """Writes the records of one source, and their images.

    Args:
        folder: of the spool.
        source: the source's path or URL.
        name: what it is called in every output.
        embeds: images may come with the records.
    """

    def __init__(self, folder: str, source: str, *, name: str, embeds: bool) -> None:
        self._source, self._name, self._embeds = source, name, embeds
        self._paths = spool_path(folder, source, ".records"), spool_path(folder, source, ".images")
        self._digest = xxhash.xxh3_128()
        self._lengths = array("q")
        self._places = array("q")
        self._counts = array("q")
        self._image_bytes = 0
        self._any_image = False
        self._notes: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
        self._records, self._images = bytearray(), bytearray()
        self._files: list[FileIO] = []

    def __enter__(self) -> Self:
        self._files = [FileIO(path, "w") for path in self._paths[: 1 + self._embeds]]
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._lengths)

    def add(self, raw: bytes, images: Sequence[bytes | None] = (), *, notes: Iterable[str] = ()) -> None:
        """Add a record.

        Args:
            raw: its bytes.
            images: of its images in order; None for one that did not come along. Empty when none did.
            notes: what only the source knows of it.
        """
        for code in notes:
            self._notes[code].append(len(self))
        if self._embeds:
            self._add_images(raw, images)
        self._lengths.append(len(raw))
        self._records += raw
        self._records += b"\n"
        self._digest.update(b"%d " % len(raw))
        self._digest.update(raw)
        self._flush(_BUFFER)

    def add_record(
        self, record: Mapping[str, object], images: Sequence[bytes | None] = (), *, notes: Iterable[str] = ()
    ) -> None:
        """Add a record that a source has made; one that cannot be written as JSON will be set aside."""
        try:
            raw = encode_record(record)
        except RecordError:
            raw = _TOO_DEEP
        self.add(raw, images, notes=notes)

    def finish(self) -> RecordFile:
        """The records, in place."""
        self._flush(0)
        self.__exit__()
        lengths = np.array(self._lengths, dtype=np.int64)
        records, images = self._paths
        return RecordFile(
            path=records,
            name=self._name,
            offsets=np.cumsum(lengths + 1) - lengths - 1,
            lengths=lengths,
            fingerprint=self._digest.hexdigest(),
            stamp=file_stamp(records),
            embedded=Embedded(
                images,
                np.array(self._places, dtype=np.int64).reshape(-1, 2),
                np.array(self._counts, dtype=np.int64),
            )
            if self._any_image
            else None,
            notes={code: np.array(numbers, dtype=np.int64) for code, numbers in sorted(self._notes.items())},
        )

    def _add_images(self, raw: bytes, images: Sequence[bytes | None]) -> None:
        try:
            count = len(prepare(raw).sample.images)
        except RecordError:
            count = 0  # it will be set aside
        if count != len(images):
            images = [None] * count
        for image in images:
            if image is None:
                self._places.extend((NOT_EMBEDDED, 0))
                continue
            self._any_image = True
            self._places.extend((self._image_bytes, len(image)))
            self._image_bytes += len(image)
            self._images += image
            self._digest.update(b"+%d " % len(image))
            self._digest.update(image)
        self._counts.append(count)

    def _flush(self, limit: int) -> None:
        for file, buffer in zip(self._files, (self._records, self._images), strict=False):
            if len(buffer) > limit:
                with memoryview(buffer) as view:
                    write_whole(file, view, called=self._source)
                buffer.clear()


def write_whole(file: FileIO, data: memoryview | bytes, *, called: str) -> None:
    """Write all of `data` to a file of the spool.

    Raises:
        SourceError: it cannot be written.
    """
    with memoryview(data) as view:
        done = 0
        try:
            while done < len(view):
                done += file.write(view[done:])
        except OSError as error:
            raise SourceError(
                f"{called}: cannot be copied to {os.fsdecode(file.name)} ({error.strerror})"
            ) from None
