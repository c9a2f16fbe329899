"""The node's block cache: which blocks are there, who may fetch one, what is kept and what goes.

Blocks are files (`blocks`); a book (SQLite, in the same folder) says of each whether it is there, being fetched, or left by an earlier boot of the
machine and not yet looked at, and who needs it. Only the download processes open the book, one each rank; readers open blocks by their
names, which appear by rename.

- A block is entered with its size before it is fetched, and taken off after its file is gone, so that the files never hold more than the bound.
- Whoever fetches or needs blocks is an *owner* and holds a lock on a file of its own: what owners have entered who have died, however
  they died, is taken back by the next who wants room or wants their block.
- A block that an owner needs is *pinned* and stays. Where even the blocks that workers wait for do not fit beside each other, such a block
  takes the room of those that are needed latest: see `claim`.
- After a reboot no file is trusted, since a power cut may have torn what had been renamed but not written: blocks move to another
  folder and come back, checked, one by one as they are wanted.

**What goes first.** In an epoch a block's samples are used close together, and then not before the next epoch, in another order. Least recently
used first would therefore keep what is needed last. So a stable share of all blocks, chosen by hash, are *keepers*, and room is made of

    0  finished blocks (all their samples were used) that are no keepers, least recently used first
    1  finished keepers, those of the largest hash first
    2  unfinished blocks that are no keepers, least recently used first
    3  unfinished keepers, those of the largest hash first

What is needed only later (`Want.soon`) makes nothing go but the first of these: reading far ahead must not cost what is kept.
A block that has not been finished in twice the time that others took (some of its samples are excluded, or another node's) counts as finished.
"""

import fcntl
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from loaders.fetch.blocks import is_whole
from loaders.fetch.folder import CacheFolder, join_folder, remove_if_deserted
from shardify.errors import LoaderError

_VERSION = 1
_KEPT_SHARE = 0.75  # of the cache, for keepers: the rest is for the blocks in use
_BOOK_MARGIN = 320 * 1024  # for the book's log, and what it may grow by before it is looked at again
_MOST_MARGIN = 8 * 1024 * 1024  # what one step of a large book may write
_SWEEP = 1.0  # seconds between two looks for owners that have died
_LOADING, _READY, _UNCHECKED = range(3)
_RANKS = 1 << 62  # of hashes, as SQLite's integers hold them

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
CREATE TABLE blocks (
    name TEXT PRIMARY KEY, size INTEGER NOT NULL, state INTEGER NOT NULL, owner TEXT NOT NULL, faulty INTEGER NOT NULL DEFAULT 0,
    hash INTEGER NOT NULL, keeper INTEGER NOT NULL, grade INTEGER NOT NULL, age INTEGER NOT NULL,
    samples INTEGER NOT NULL DEFAULT 0, uses INTEGER NOT NULL DEFAULT 0, since INTEGER,
    pins INTEGER NOT NULL DEFAULT 0, urgent INTEGER NOT NULL DEFAULT 0, due INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE INDEX order_of_going ON blocks (pins, grade, age);
CREATE TABLE pins (
    owner TEXT NOT NULL, name TEXT NOT NULL, urgent INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (owner, name)) WITHOUT ROWID;
CREATE TRIGGER entered AFTER INSERT ON blocks BEGIN UPDATE meta SET value = value + new.size WHERE name = 'used'; END;
CREATE TRIGGER resized AFTER UPDATE OF size ON blocks BEGIN
    UPDATE meta SET value = value + new.size - old.size WHERE name = 'used'; END;
CREATE TRIGGER taken_off AFTER DELETE ON blocks BEGIN
    UPDATE meta SET value = value - old.size WHERE name = 'used'; DELETE FROM pins WHERE name = old.name; END;
CREATE TRIGGER pinned AFTER INSERT ON pins BEGIN
    UPDATE blocks SET pins = pins + 1, urgent = urgent + new.urgent WHERE name = new.name; END;
CREATE TRIGGER unpinned AFTER DELETE ON pins BEGIN
    UPDATE blocks SET pins = pins - 1, urgent = urgent - old.urgent WHERE name = old.name; END;
CREATE TRIGGER repinned AFTER UPDATE OF urgent ON pins BEGIN
    UPDATE blocks SET urgent = urgent + new.urgent - old.urgent WHERE name = new.name; END;
INSERT INTO meta VALUES ('used', 0), ('clock', 0), ('lifespan', 0);
"""


@dataclass(frozen=True, slots=True)
class Want:
    """A block that is needed.

    Attributes:
        name: of the block.
        size: of its file.
        due: the batch that needs it first.
        soon: by one of the next batches.
        urgent: a worker waits for it.
    """

    name: str
    size: int
    due: int = 0
    soon: bool = True
    urgent: bool = False


class Claim(IntEnum):
    """What has become of a wish for a block."""

    READY = 0
    """It is there, and pinned."""
    MINE = 1
    """It is this owner's to fetch: `publish` or `abandon` must follow. Room is set aside for it, and it is pinned."""
    OTHERS = 2
    """Another owner is fetching it."""
    NO_ROOM = 3
    """It fits only when something else goes."""


class BlockCache:
    """One download process's view of the cache. Thread-safe; to be made in the process that uses it.

    Args:
        folder: where it lies.
        data_bytes: of all the blocks that might be asked for.
        identities: of the shards they belong to, with which their names begin.

    Attributes:
        bound: bytes that the folder may hold.
        preempted: blocks in need that had to go for others in greater need.
    """

    def __init__(self, folder: CacheFolder, data_bytes: int, identities: Collection[str] = ()) -> None:
        self._folder = folder
        self._path = folder.path
        self._alive = join_folder(folder)
        self._mutex = threading.RLock()
        self.preempted = 0
        self._swept = 0.0
        for name in ("blocks", "loading", "unchecked", "owners"):
            os.makedirs(os.path.join(self._path, name), exist_ok=True)
        self._turn_file = os.open(
            os.path.join(self._path, "turn"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        self._owner = uuid.uuid4().hex
        with self._mutex, self._locked():
            self._owner_file = self._enrol()
            try:
                self._book = self._open_book()
            except sqlite3.Error as error:
                raise LoaderError(
                    f"the cache {self._path} cannot be used ({error}); end what uses it, and remove it"
                ) from None
        with self._turn():
            self._bury_the_dead()
            used = self._meta("used")
            self.bound = folder.bound(data_bytes, used)
            if folder.temporary and folder.size is None:
                # who comes first has seen the disk before anything was on it
                self._book.execute("INSERT OR IGNORE INTO meta VALUES ('bound', ?)", (self.bound,))
                self.bound = self._meta("bound")
            self._threshold = int(_RANKS * min(1.0, _KEPT_SHARE * self.bound / max(1, data_bytes)))
            if os.listdir(os.path.join(self._path, "owners")) == [self._owner]:
                self._grade_anew(frozenset(identities))

    @property
    def room(self) -> int:
        """Bytes that blocks may take: the bound, less the book."""
        log = sum(_size_of(f"{self._book_path}{suffix}") for suffix in ("-wal", "-shm"))
        margin = _BOOK_MARGIN + min(self.bound // 256, _MOST_MARGIN)
        return self.bound - _size_of(self._book_path) - max(log, margin)

    def path(self, name: str) -> str:
        """Where a block that is ready lies."""
        return block_path(self._path, name)

    def loading_path(self, name: str) -> str:
        """Where to write a block that was claimed."""
        return os.path.join(self._path, "loading", name)

    def holds(self, name: str, size: int) -> bool:
        """Whether a block is there and has its size, or more, with faults."""
        return _size_of(self.path(name)) >= size

    def claim(self, wants: Sequence[Want], slots: int) -> list[Claim]:
        """Ask for blocks, in the order in which they are needed.

        Urgent ones, which a worker waits for now, may take the place of pinned ones that no worker waits for. So somebody can always go on: what is
        urgent and there is read at once and then not urgent any more, and all else must yield to what is urgent.

        Args:
            wants: the blocks.
            slots: how many may become this owner's to fetch.

        Returns:
            What has become of the first ones: it ends early when the slots are used, or after the first that there is no room for.
        """
        claims: list[Claim] = []
        with self._turn():
            for want in wants:
                if claims.count(Claim.MINE) >= slots:
                    break
                claims.append(self._claim(want))
                if claims[-1] is Claim.NO_ROOM:
                    break
        return claims

    def recall(self, name: str) -> bool:
        """Whether a claimed block was left whole by an earlier boot; it is then to be published as it is."""
        left = os.path.join(self._path, "unchecked", name)
        if not os.path.exists(left):
            return False
        if not is_whole(left, name):
            with suppress(FileNotFoundError):
                os.unlink(left)
            return False
        os.rename(left, self.loading_path(name))
        return True

    def publish(self, name: str, *, samples: int, faulty: bool = False) -> None:
        """A claimed block has been written: show it to readers.

        Args:
            name: of the block, whose file is at `loading_path`.
            samples: that lie in it; 0 when that is not known.
            faulty: some of its bytes are wrong: another run shall not trust it.
        """
        os.rename(self.loading_path(name), self.path(name))
        with self._turn():
            self._book.execute(
                "UPDATE blocks SET state = ?, samples = ?, faulty = ? WHERE name = ?",
                (_READY, samples, faulty, name),
            )
            if faulty:  # a few bytes longer than was thought
                self._book.execute(
                    "UPDATE blocks SET size = ? WHERE name = ?", (_size_of(self.path(name)), name)
                )

    def abandon(self, name: str) -> None:
        """A claimed block will not be fetched after all."""
        with self._turn():
            self._take_off([name])

    def release(self, uses: Mapping[str, int]) -> None:
        """Blocks that this owner needs no more, and how many of their samples it has used since it claimed them."""
        with self._turn():
            for name, used in uses.items():
                self._book.execute("DELETE FROM pins WHERE owner = ? AND name = ?", (self._owner, name))
                if used:
                    self._use(name, used)

    def set_urgent(self, names: Sequence[str], *, urgent: bool) -> None:
        """Say of pinned blocks whether a worker waits for them."""
        with self._turn():
            self._book.executemany(
                "UPDATE pins SET urgent = ? WHERE owner = ? AND name = ? AND urgent <> ?",
                [(urgent, self._owner, name, urgent) for name in names],
            )

    def close(self) -> None:
        """Give everything back; a temporary folder goes when nobody is left."""
        with self._mutex:
            with suppress(sqlite3.Error, OSError), self._turn():
                self._bury(self._owner)
            self._book.close()
            for file in (self._owner_file, self._turn_file, self._alive):
                os.close(file)
        if self._folder.temporary:
            remove_if_deserted(self._path)

    # the book: everything below happens in this owner's turn

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._mutex, self._locked():
            try:
                self._book.execute("BEGIN IMMEDIATE")
                yield
                self._book.execute("COMMIT")
            except sqlite3.Error as error:
                raise LoaderError(f"the book of the cache {self._path} cannot be kept: {error}") from error
            finally:
                if self._book.in_transaction:
                    self._book.execute("ROLLBACK")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # SQLite itself would wait by sleeping
        fcntl.flock(self._turn_file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._turn_file, fcntl.LOCK_UN)

    def _claim(self, want: Want) -> Claim:
        row = self._book.execute(
            "SELECT state, owner, faulty, size FROM blocks WHERE name = ?", (want.name,)
        ).fetchone()
        if row is not None:
            state, owner, faulty, size = row
            if state == _LOADING and owner == self._owner:
                return Claim.OTHERS
            if state == _LOADING and self._is_alive(owner):
                return Claim.OTHERS
            if state == _LOADING:
                self._bury(owner)
            elif state == _UNCHECKED and size == want.size:
                self._book.execute(
                    "UPDATE blocks SET state = ?, owner = ? WHERE name = ?",
                    (_LOADING, self._owner, want.name),
                )
                self._pin(want)
                return Claim.MINE
            elif state == _READY and self._is_usable(want, owner, faulty=faulty):
                self._pin(want)
                return Claim.READY
            else:
                self._take_off([want.name])
        if not self._make_room(want):
            return Claim.NO_ROOM
        rank = _rank(want.name)
        keeper = rank < self._threshold
        self._book.execute(
            "INSERT INTO blocks (name, size, state, owner, hash, keeper, grade, age) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                want.name,
                want.size,
                _LOADING,
                self._owner,
                rank,
                keeper,
                2 + keeper,
                -rank if keeper else self._meta("clock"),
            ),
        )
        self._pin(want)
        return Claim.MINE

    def _is_usable(self, want: Want, owner: str, *, faulty: bool) -> bool:
        if faulty and owner != self._owner and not self._is_alive(owner):
            return False
        size = _size_of(self.path(want.name))
        return size >= want.size if faulty else size == want.size

    def _pin(self, want: Want) -> None:
        self._book.execute(
            "INSERT INTO pins VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET urgent = excluded.urgent",
            (self._owner, want.name, want.urgent),
        )
        self._book.execute(
            "UPDATE blocks SET due = ?, since = coalesce(since, ?) WHERE name = ?",
            (want.due, self._meta("clock"), want.name),
        )

    def _use(self, name: str, used: int) -> None:
        """Count used samples of a block; grades are those of the module's head."""
        row = self._book.execute(
            "SELECT samples, uses, since, keeper, hash FROM blocks WHERE name = ?", (name,)
        ).fetchone()
        if row is None:
            return
        samples, uses, since, keeper, rank = row
        clock = self._meta("clock") + used
        self._set_meta("clock", clock)
        uses, since = uses + used, clock if since is None else since
        finished = 0 < samples <= uses
        if finished:
            self._set_meta("lifespan", max(clock - since, self._meta("lifespan") * 63 // 64))
            uses, since = 0, None
        grade = keeper if finished else 2 + keeper
        self._book.execute(
            "UPDATE blocks SET uses = ?, since = ?, grade = ?, age = ? WHERE name = ?",
            (uses, since, grade, -rank if keeper else clock, name),
        )

    def _make_room(self, want: Want) -> bool:
        """Whether the block fits now, after others went."""
        room = self.room
        lacking = self._meta("used") + want.size - room
        if lacking <= 0:
            return True
        if want.size > room:
            raise LoaderError(
                f"cache_size={self.bound}: a block of {want.size} bytes does not fit the cache {self._path}; at least "
                f"{self.bound + want.size - room} are needed, and several times as much to be fast"
            )
        if time.monotonic() - self._swept > _SWEEP:
            self._bury_the_dead()
            self._finish_the_stale()
            self._swept = time.monotonic()
            lacking = self._meta("used") + want.size - room
        going: list[str] = []
        for name, size in self._book.execute(
            "SELECT name, size FROM blocks WHERE pins = 0 AND grade <= ? AND state <> ? ORDER BY grade, age",
            (3 if want.soon or want.urgent else 0, _LOADING),
        ):
            if lacking <= 0:
                break
            going.append(name)
            lacking -= size
        if lacking > 0 and want.urgent:
            for name, size in self._book.execute(
                "SELECT name, size FROM blocks WHERE pins > 0 AND urgent = 0 AND state = ? ORDER BY due DESC",
                (_READY,),
            ):
                if lacking <= 0:
                    break
                going.append(name)
                lacking -= size
                self.preempted += 1
        if lacking > 0:
            return False
        self._take_off(going)
        return True

    def _take_off(self, names: Sequence[str]) -> None:
        for name in names:
            for path in (
                self.path(name),
                self.loading_path(name),
                os.path.join(self._path, "unchecked", name),
            ):
                with suppress(FileNotFoundError):
                    os.unlink(path)
            self._book.execute("DELETE FROM blocks WHERE name = ?", (name,))

    def _finish_the_stale(self) -> None:
        if lifespan := self._meta("lifespan"):
            self._book.execute(
                "UPDATE blocks SET grade = grade - 2, uses = 0, since = NULL WHERE pins = 0 AND grade >= 2 AND since < ?",
                (self._meta("clock") - 2 * lifespan,),
            )

    def _grade_anew(self, identities: Collection[str]) -> None:
        """What was kept for other shards goes first, and keepers are those for this cache's size."""
        rows = self._book.execute("SELECT name, hash FROM blocks").fetchall()
        graded = []
        for name, rank in rows:
            keeper = rank < self._threshold and name.partition("-")[0] in identities
            graded.append((keeper, int(keeper), -rank if keeper else 0, name))
        self._book.executemany(
            "UPDATE blocks SET keeper = ?, grade = ?, age = ?, uses = 0, since = NULL WHERE name = ?", graded
        )

    def _meta(self, name: str) -> int:
        value: int = self._book.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()[0]
        return value

    def _set_meta(self, name: str, value: int) -> None:
        self._book.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))

    # owners

    def _enrol(self) -> int:
        file = os.open(
            self._owner_path(self._owner), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _owner_path(self, owner: str) -> str:
        return os.path.join(self._path, "owners", owner)

    def _is_alive(self, owner: str) -> bool:
        if owner == self._owner:
            return True
        try:
            file = os.open(self._owner_path(owner), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(file)
        return False

    def _bury_the_dead(self) -> None:
        pinning = {owner for (owner,) in self._book.execute("SELECT DISTINCT owner FROM pins")}
        for owner in pinning.union(os.listdir(os.path.join(self._path, "owners"))):
            if not self._is_alive(owner):
                self._bury(owner)

    def _bury(self, owner: str) -> None:
        """Take back what an owner has entered and not finished."""
        rows = self._book.execute(
            "SELECT name FROM blocks WHERE owner = ? AND (state = ? OR faulty)", (owner, _LOADING)
        ).fetchall()
        self._take_off([name for (name,) in rows])
        self._book.execute("DELETE FROM pins WHERE owner = ?", (owner,))
        with suppress(FileNotFoundError):
            os.unlink(self._owner_path(owner))

    # opening

    @property
    def _book_path(self) -> str:
        return os.path.join(self._path, "book")

    def _open_book(self) -> sqlite3.Connection:
        """The book as it is, or a new one over the files that are there."""
        boot = _boot()
        try:
            book = self._connect()
            if book.execute("PRAGMA user_version").fetchone()[0] == _VERSION:
                written = book.execute("SELECT value FROM meta WHERE name = 'boot'").fetchone()
                if written is not None and written[0] == boot:
                    return book
            book.close()
        except sqlite3.DatabaseError:
            pass  # torn by a power cut, as blocks may be
        if any(
            owner != self._owner and self._is_alive(owner)
            for owner in os.listdir(os.path.join(self._path, "owners"))
        ):
            raise sqlite3.DatabaseError("its book is damaged, or of another version")
        return self._begin_book(boot)

    def _connect(self) -> sqlite3.Connection:
        book = sqlite3.connect(
            self._book_path, timeout=60, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        for setting in (
            "journal_mode = WAL",
            "synchronous = OFF",
            "wal_autocheckpoint = 32",
            "journal_size_limit = 0",
        ):
            book.execute(f"PRAGMA {setting}").fetchall()
        return book

    def _begin_book(self, boot: int) -> sqlite3.Connection:
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(f"{self._book_path}{suffix}")
        for name in os.listdir(os.path.join(self._path, "loading")):
            os.unlink(self.loading_path(name))
        unchecked = os.path.join(self._path, "unchecked")
        for name in os.listdir(os.path.join(self._path, "blocks")):
            os.rename(self.path(name), os.path.join(unchecked, name))
        book = self._connect()
        book.executescript(f"BEGIN; {_SCHEMA}; PRAGMA user_version = {_VERSION}; COMMIT;")
        book.execute("BEGIN IMMEDIATE")
        for entry in os.scandir(unchecked):
            rank = _rank(entry.name)
            book.execute(
                "INSERT INTO blocks (name, size, state, owner, hash, keeper, grade, age) VALUES (?, ?, ?, '', ?, 0, 0, 0)",
                (entry.name, entry.stat().st_size, _UNCHECKED, rank),
            )
        book.execute("INSERT INTO meta VALUES ('boot', ?)", (boot,))
        book.execute("COMMIT")
        return book


def block_path(folder: str, name: str) -> str:
    """Where a block that is ready lies in a cache folder."""
    return os.path.join(folder, "blocks", name)


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _rank(name: str) -> int:
    """A block's place among all, the same everywhere and always."""
    return xxhash.xxh3_64_intdigest(name.encode()) % _RANKS


def _boot() -> int:
    """This boot of the machine, as a number; another one every time where that cannot be known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return xxhash.xxh3_64_intdigest(file.read()) >> 2
    except OSError:
        return time.time_ns()
