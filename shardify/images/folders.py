"""Folders of images: files found by asking for them, and listed only when a path is not there as it stands."""

import errno
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from shardify.errors import ImageError
from shardify.images.listing import Listing, encode
from shardify.images.stores import (
    LISTED,
    MISSING,
    PLAIN_FILE,
    READ_FLAGS,
    UNSEEN,
    Location,
    Room,
    base_name,
    check_size,
    missing_rows,
    outage,
)

MAX_LISTED = 20_000_000
"""A folder with more files is not listed: a path must be there as it stands."""

_FAULTS_OF_A_FILE = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
_FAULTS_OF_A_FOLDER = (*_FAULTS_OF_A_FILE, errno.ENOENT, errno.ENOTDIR)
_NO_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)  # what no file of this file system can be called
_THREADS = 32
_TRIED = 64  # files asked for before the file system is judged
_SLOW = 0.3e-3  # seconds a file, from which on many are asked for at a time
_CHUNK = 65_536
_ABSENT, _UNSEEN = -1, -2  # instead of a size


@dataclass(frozen=True, slots=True)
class FolderReader:
    """Reads files below `root`. Symbolic links are followed: people link their big disks."""

    root: str

    def file(self, name: str) -> str:
        """The path of a file."""
        return f"{self.root}/{name}"

    def read(self, name: str, location: Location, room: Room | None = None) -> bytes | memoryview:
        """See `ImageReader`."""
        del location  # the file's own size holds
        place: memoryview | None = None
        try:
            file = os.open(self.file(name), READ_FLAGS)
            try:
                size = os.fstat(file).st_size
                check_size(size)
                if room is not None and (place := room(size)) is not None and os.readv(file, [place]) == size:
                    return place
                if place is not None:  # it has changed, or its file system gives less at once
                    os.lseek(file, 0, os.SEEK_SET)
                data = os.read(file, size)
                # network file systems may give less at once
                while len(data) < size and (more := os.read(file, size - len(data))):
                    data += more
            finally:
                os.close(file)
        except OSError as error:
            # a folder that cannot be entered is no fault of the images in it
            if error.errno in _FAULTS_OF_A_FILE and os.access(self.root, os.X_OK):
                raise ImageError("image-unreadable", error.strerror or str(error)) from None
            raise outage(self.file(name), error) from None
        return data


class FolderStore:
    """A folder of images.

    Args:
        path: as the user gave it.
        mount: see `StoreSpec`.
        stat_file: how a file is asked for; like `os.stat`.
    """

    kind = "folder"
    fingerprint = ""
    examples: Sequence[str] = ()

    def __init__(
        self, path: str, mount: str = "", *, stat_file: Callable[[str], os.stat_result] = os.stat
    ) -> None:
        self.path = path
        self.mount = mount
        self.reader = FolderReader(os.path.abspath(path))
        self._stat = stat_file
        self._listing: Listing | None = None

    @property
    def name(self) -> str:
        """The folder's own name."""
        return base_name(self.path)

    def find(self, names: Sequence[str]) -> npt.NDArray[np.void]:
        """See `ImageStore`. Where answers take long, 32 files are asked for at a time."""
        root = f"{self.reader.root}/"
        sizes = self._ask([root + name for name in names])
        rows = missing_rows(len(names))
        rows["size"] = rows["stored"] = np.maximum(sizes, 0)
        rows["method"] = np.where(sizes == _UNSEEN, UNSEEN, PLAIN_FILE)
        rows["store"] = np.where(sizes == _ABSENT, MISSING, 0)
        if (sizes == _ABSENT).any():
            self._check_root()
        return rows

    def listing(self) -> Listing:
        """See `ImageStore`. Empty for a folder of more than `MAX_LISTED` files."""
        if self._listing is None:
            self._check_root()
            listing = Listing.of(_walk(self.reader.root, MAX_LISTED))
            self._listing = listing if len(listing) <= MAX_LISTED else Listing.of(())
        return self._listing

    def listed(self, numbers: Sequence[int]) -> npt.NDArray[np.void]:
        """See `ImageStore`."""
        rows = self.find([self.listed_name(number) for number in numbers])
        held = rows["store"] != MISSING
        rows["offset"][held] = np.array(numbers, np.int64)[held]
        rows["method"][held] = LISTED
        return rows

    def listed_name(self, number: int) -> str:
        """See `ImageStore`."""
        return self.listing().name(number)

    def _check_root(self) -> None:
        try:
            os.stat(self.reader.root)
        except OSError as error:
            raise outage(self.path, error) from None

    def _ask(self, files: Sequence[str]) -> npt.NDArray[np.int64]:
        """The size of each file, or why there is none."""
        sizes = np.empty(len(files), np.int64)
        first = 0
        while first < len(files):
            begin = time.perf_counter()
            some = files[first : first + _TRIED]
            sizes[first : first + len(some)] = self._sizes(some)
            first += len(some)
            if time.perf_counter() - begin > _SLOW * _TRIED:
                break
        rest = [files[at : at + _TRIED] for at in range(first, len(files), _TRIED)]
        if len(rest) > 0:
            # few files are as slow as many: pieces so small that every thread has some
            step = max(1, min(_TRIED, (len(files) - first) // (4 * _THREADS)))
            rest = [files[at : at + step] for at in range(first, len(files), step)]
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="stat") as pool:
                sizes[first:] = [size for part in pool.map(self._sizes, rest) for size in part]
        return sizes

    def _sizes(self, files: Sequence[str]) -> list[int]:
        ask, regular = self._stat, stat.S_IFREG
        sizes = []
        for file in files:
            try:
                found = ask(file)
            except (FileNotFoundError, NotADirectoryError, UnicodeEncodeError):
                sizes.append(_ABSENT)
            except OSError as error:
                sizes.append(_ABSENT if error.errno in _NO_NAMES else _UNSEEN)
            else:
                sizes.append(found.st_size if stat.S_IFMT(found.st_mode) == regular else _ABSENT)
        return sizes


def _walk(root: str, most: int) -> Iterator[list[bytes]]:
    """The regular files below `root`, encoded, some at a time, until there are more than `most`; the same order each time.

    Every folder is entered once, by its own name before any link to it: links that lead in circles end, and a file has one name.
    """
    entered: set[tuple[int, int]] = set()
    folders, links = deque([""]), deque[str]()
    count = 0
    while folders or links:
        prefix = folders.popleft() if folders else links.popleft()
        path = f"{root}/{prefix}"
        try:
            found = os.stat(path)
            if (found.st_dev, found.st_ino) in entered:
                continue
            entered.add((found.st_dev, found.st_ino))
            files, inner, linked = _list_folder(path)
        except OSError as error:
            if error.errno in _FAULTS_OF_A_FOLDER and prefix:
                continue  # its files cannot be read either
            raise outage(path, error) from None
        folders.extend(f"{prefix}{name}/" for name in inner)
        links.extend(f"{prefix}{name}/" for name in linked)
        count += len(files)
        # without one more text for each file of a huge folder
        names = iter(files)
        start = prefix.encode("utf-8", "surrogatepass")
        while some := list(islice(names, _CHUNK)):
            yield [start + name for name in encode(some)]
        if count > most:
            return


def _list_folder(path: str) -> tuple[list[str], list[str], list[str]]:
    """Names of the files, folders, and links to folders in a folder, each sorted."""
    files: list[str] = []
    folders: list[str] = []
    links: list[str] = []
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_file(follow_symlinks=False):
                if name != ".DS_Store" and not name.startswith("._"):
                    files.append(name)
            elif entry.is_dir(follow_symlinks=False):
                if name != "__MACOSX":
                    folders.append(name)
            elif entry.is_symlink():
                _sort_link(entry, files, links)
    files.sort()
    folders.sort()
    links.sort()
    return files, folders, links


def _sort_link(entry: os.DirEntry[str], files: list[str], links: list[str]) -> None:
    try:
        if entry.is_dir():
            links.append(entry.name)
        elif entry.is_file():
            files.append(entry.name)
    except OSError:
        pass  # a link in a circle, or to where nobody may look
