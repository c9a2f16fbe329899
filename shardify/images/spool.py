"""Image bytes in one plain file, known by offset and size: images that came with their records, or were scattered from slow archives."""

from dataclasses import dataclass, field

from shardify.errors import PackError
from shardify.images.stores import Location, OpenFile, Room

SPOOLED = -5
"""The method of a location in a spool."""


@dataclass(frozen=True, slots=True)
class SpoolReader:
    """Reads a spool; an `ImageReader`."""

    path: str
    _file: OpenFile = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_file", OpenFile(self.path))

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.path,)

    def read(self, name: str, location: Location, room: Room | None = None) -> bytes | memoryview:
        """See `ImageReader`."""
        del name
        if room is not None and (place := room(location.size)) is not None:
            if self._file.read_into([place], location.offset) < location.size:
                raise PackError(f"{self.path}: has become shorter while it was packed")
            return place
        data = self._file.read(location.size, location.offset)
        if len(data) < location.size:
            raise PackError(f"{self.path}: has become shorter while it was packed")
        return data
