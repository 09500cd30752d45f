"""Shared memory: a ring of slots that one publisher fills and any number of readers look at in place.

A segment is a page or two of 64-bit words and then the slots, each on a page boundary::

    words   0..7        magic, slots, stride in bytes, offset of the first slot
            8..         generation of each slot's content; 0 while it is being written
            ..          ``ROWS`` rows, one a reader: floor, token (0: no reader), whether it is attached
    data                slot 0, slot 1, ...

Every payload that is published gets the next *generation*, a number that never comes back. A reader keeps in its row
one *floor*: the lowest generation that it still holds or has not seen yet. So one word acknowledges everything below
it, also what the reader skipped, and nothing is ever written by two processes. A slot is free when the floors of all
readers that it was lent to lie above its generation. What no reader has yet released is never overwritten, with two
exceptions, both counted: the reader died, or it held the slot for longer than ``lease_ms`` and no other slot is free.
A reader finds out by comparing generations again *after* use.

The slot freed last is used first: it is still in the cache. Attached segments are never registered with Python's
resource tracker, which would unlink them under the publisher's feet; names are exact, short and written down in the
session's folder before the segment exists, so that the next start removes what a killed process left behind.
"""

from __future__ import annotations

import _posixshmem  # type: ignore[import-not-found,unused-ignore]
import errno
import mmap
import os
import re
import secrets
import threading
import weakref
from typing import Any

import msgspec
import numpy as np

from pipeline.clock import Clock
from pipeline.errors import ConfigError, WireError
from pipeline.wire import Slot

MAGIC = 0x31474E4952534E53  # "SNSRING1", little endian
ROWS = 32
"""Readers of one publisher that can hold leases; a further one reads without (and finds overruns by generation)."""
_HEAD, _ROW = 8, 8  # in words; a row fills a cache line, so that two readers never write to the same one
_PAGE = mmap.ALLOCATIONGRANULARITY
_NAME = re.compile(r"/sn-[0-9a-f]{16}")
COPY_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x100000"}
"""For the environment of a process that copies frames into a ring: glibc then writes past the cache what exceeds
1 MiB. A 1080p frame at 30 Hz takes 0.5 ms instead of 0.75 ms to copy (and 0.1 ms longer to read in full); elsewhere
than on x86-64 with glibc it means nothing. It is read when a process starts, so whoever starts it must set it."""
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # Linux: map every page now rather than fault on the first frames

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class RingSpec(msgspec.Struct, frozen=True):
    """The size of a ring, and how long a reader may hold a slot that somebody else needs.

    It must cover the longest hold times the rate, and two slots more. The nodes of a session copy at once what they
    keep, and the rest read headers only, so a few slots do. A reader of your own that holds messages takes slots from
    the publisher, which drops and counts when none is free, and loses them after ``lease_ms``."""

    slots: int
    slot_bytes: int
    lease_ms: int = 1000

    def __post_init__(self) -> None:
        if self.slots < 2 or self.slots > 1024 or self.slot_bytes < 1 or self.lease_ms < 1:
            raise ConfigError(
                f"a ring of {self.slots} slots of {self.slot_bytes} bytes with a lease of {self.lease_ms} ms cannot be "
                "made; it needs 2 to 1024 slots, at least one byte a slot and a lease of at least 1 ms"
            )


class Segment:
    """A piece of mapped memory with the layout above: ``words`` can be written by all, ``data`` only by its maker."""

    def __init__(self, name: str, words: memoryview, data: memoryview) -> None:
        self.name, self.words, self.data = name, words, data
        self.slots, self.stride, self.offset = int(words[1]), int(words[2]), int(words[3])

    @classmethod
    def create(cls, name: str, spec: RingSpec) -> Segment:
        """A new segment under this exact name, allocated in full, mode 0600. ConfigError if there is no room."""
        total = _geometry(spec)[2]
        fd = _posixshmem.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            _allocate(fd, total)
            memory = mmap.mmap(fd, total, flags=mmap.MAP_SHARED | _POPULATE)
        except BaseException:
            unlink(name)
            raise
        finally:
            os.close(fd)
        return cls._format(name, memoryview(memory), spec)

    @classmethod
    def private(cls, name: str, spec: RingSpec) -> Segment:
        """The same in memory of this process alone."""
        return cls._format(name, memoryview(mmap.mmap(-1, _geometry(spec)[2])), spec)

    @classmethod
    def _format(cls, name: str, memory: memoryview, spec: RingSpec) -> Segment:
        offset, stride, _ = _geometry(spec)
        words = memory[:offset].cast("Q")
        words[1], words[2], words[3] = spec.slots, stride, offset
        words[0] = MAGIC
        return cls(name, words, memory)

    @classmethod
    def attach(cls, name: str) -> Segment:
        """Somebody else's segment, its slots read-only. FileNotFoundError if it is gone, WireError if it is no ring."""
        if not _NAME.fullmatch(name):
            raise WireError(f"a message names the shared memory {name!r}, which is not a name that Sensorium gives")
        fd = _posixshmem.shm_open(name, os.O_RDWR, 0o600)
        try:
            info = os.fstat(fd)
            if info.st_uid != os.geteuid() or info.st_size < _PAGE:
                raise WireError(f"shared memory {name} has {info.st_size} bytes or belongs to someone else: no ring")
            data = memoryview(mmap.mmap(fd, info.st_size, flags=mmap.MAP_SHARED | _POPULATE, prot=mmap.PROT_READ))
            magic, slots, stride, offset = data[:32].cast("Q")
            if magic != MAGIC or offset % _PAGE or offset + slots * stride > info.st_size:
                raise WireError(f"shared memory {name} does not have the layout of a ring")
            words = memoryview(mmap.mmap(fd, offset)).cast("Q")
        finally:
            os.close(fd)
        return cls(name, words, data)

    def row(self, row: int) -> int:
        """Where the words of a reader's row begin."""
        return _HEAD + _round(self.slots, _ROW) + row * _ROW


def _round(value: int, to: int) -> int:
    return (value + to - 1) // to * to


def _geometry(spec: RingSpec) -> tuple[int, int, int]:
    """Offset of the first slot, distance from slot to slot, and bytes in all."""
    offset = _round(8 * (_HEAD + _round(spec.slots, _ROW) + ROWS * _ROW), _PAGE)
    stride = _round(spec.slot_bytes, _PAGE)
    return offset, stride, offset + spec.slots * stride


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _allocate(fd: int, total: int) -> None:
    """Takes the memory now: a segment that is only promised kills its writer with SIGBUS when memory runs out."""
    if not hasattr(os, "posix_fallocate"):  # macOS, where shared memory is not a file system
        os.ftruncate(fd, total)
        return
    room = os.fstatvfs(fd)
    free = room.f_bavail * room.f_frsize
    if free >= total:
        try:
            os.posix_fallocate(fd, 0, total)
            return
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    raise ConfigError(
        f"the ring needs {total / 2**20:.1f} MiB of shared memory, and /dev/shm has {free / 2**20:.1f} MiB free of "
        f"{room.f_blocks * room.f_frsize / 2**20:.1f} MiB: give it fewer or smaller slots, or make /dev/shm larger "
        "(in a container: --shm-size)"
    )


def unlink(name: str) -> bool:
    """Removes a segment's name; those who have it mapped keep it. False if there was none."""
    try:
        _posixshmem.shm_unlink(name)
    except FileNotFoundError:
        return False
    return True


def new_name() -> str:
    """An exact name for a new segment: 20 characters, under the 31 that macOS allows."""
    return f"/sn-{secrets.token_hex(8)}"


_barrier = threading.Lock()


def fence() -> None:
    """Keeps what was read and written before it from moving behind it, on processors that reorder more than x86 does.

    Python has no memory barrier. To give a lock back is a release, to take it an acquire, and one after the other
    lets nothing pass.
    """
    with _barrier:
        pass
    with _barrier:
        pass


class RingCounters(msgspec.Struct, kw_only=True):
    """What readers cost a ring: leases that ran out, readers that died or left holding slots, readers without a row."""

    expired: int = 0
    revoked: int = 0
    unleased: int = 0


class _Lent(msgspec.Struct):
    """A slot that has been published: its generation, when (clock ns), and the rows of the readers it was lent to."""

    generation: int
    at_ns: int
    rows: tuple[int, ...]


class Ring:
    """The publisher's side. Used by one thread."""

    def __init__(self, segment: Segment, spec: RingSpec, clock: Clock, *, expire: bool = True) -> None:
        self.segment, self.spec = segment, spec
        self.counters = RingCounters()
        self._clock, self._expire = clock, expire
        self._memory = np.frombuffer(segment.data, np.uint8)
        self._generation = 0
        self._free = list(reversed(range(segment.slots)))  # a stack: the last in is the hottest in the cache
        self._lent: dict[int, _Lent] = {}  # by slot, oldest first
        self._loans: dict[int, weakref.ref[Bytes]] = {}
        self._rows: dict[int, frozenset[str]] = {}
        self._forced: dict[int, int] = {}  # floors set by the publisher, where leases ran out

    @property
    def next_generation(self) -> int:
        """The generation that the next payload will have."""
        return self._generation + 1

    def add_reader(self, token: int, streams: frozenset[str]) -> int:
        """Gives a reader of these streams a row; from now on their slots are lent to it. -1 if all rows are taken."""
        row = next((r for r in range(ROWS) if r not in self._rows), -1)
        if row < 0:
            self.counters.unleased += 1
            return -1
        words, at = self.segment.words, self.segment.row(row)
        words[at], words[at + 1], words[at + 2] = self.next_generation, token, 0
        self._rows[row], self._forced[row] = streams, 0
        return row

    def remove_reader(self, row: int) -> None:
        """Takes back a row and all that was lent to it, because its reader left or died."""
        self._rows.pop(row, None)
        self.segment.words[self.segment.row(row) + 1] = 0
        held = [s for s in self._lent.values() if row in s.rows]
        if any(s.generation >= self._floor(row) for s in held):
            self.counters.revoked += 1
        for lent in held:
            lent.rows = tuple(r for r in lent.rows if r != row)
        self._forced.pop(row, None)

    def acquire(self) -> int | None:
        """A slot to write into, the one freed last; None if every slot is lent out within its lease."""
        self._collect()
        if not self._free:
            self._reclaim()
        if not self._free:
            return None
        index = self._free.pop()
        self.segment.words[_HEAD + index] = 0
        fence()
        return index

    def memory(self, index: int, nbytes: int) -> Bytes:
        """The first ``nbytes`` bytes of a slot, writable."""
        start = self.segment.offset + index * self.segment.stride
        # Through a memoryview, so that views of this array keep the array itself alive (a loan ends with its array).
        return np.frombuffer(self.segment.data[start : start + nbytes], np.uint8)

    def loan(self, nbytes: int) -> Bytes | None:
        """A slot's memory for somebody else to fill; it comes back when published, or when its last view is gone."""
        index = self.acquire()
        if index is None:
            return None
        memory = self.memory(index, nbytes)
        self._loans[index] = weakref.ref(memory)
        return memory

    def loaned(self, data: Any) -> int | None:
        """The slot whose loan this array is, or is a view of from its beginning; it stops being a loan. None for any
        other memory."""
        for index, loan in self._loans.items():
            memory = loan()
            if memory is None or (data is not memory and getattr(data, "base", None) is not memory):
                continue
            if data is not memory and not (data.flags.c_contiguous and _address(data) == _address(memory)):
                return None
            del self._loans[index]
            return index
        return None

    def lend(self, index: int, stream: str, nbytes: int) -> Slot:
        """Lends an acquired slot to the present readers of ``stream`` and names it; ``fill`` makes it valid."""
        self._generation += 1
        rows = tuple(row for row, streams in self._rows.items() if stream in streams)
        self._lent[index] = _Lent(self._generation, self._clock.now_ns(), rows)
        return Slot(self.segment.name, index, self._generation, nbytes)

    def fill(self, slot: Slot, data: Bytes | None) -> None:
        """Copies a payload into a lent slot (None: it is there already) and marks the slot's content as complete."""
        if data is not None:
            start = self.segment.offset + slot.index * self.segment.stride
            np.copyto(self._memory[start : start + slot.length], data)
        fence()
        self.segment.words[_HEAD + slot.index] = slot.generation

    def attached(self) -> bool:
        """Whether every reader with a row has mapped the segment."""
        return all(self.segment.words[self.segment.row(row) + 2] for row in self._rows)

    def _floor(self, row: int) -> int:
        return max(self.segment.words[self.segment.row(row)], self._forced.get(row, 0))

    def _collect(self) -> None:
        """Moves what all readers have released to the free stack, the newest on top."""
        if not self._lent:
            return
        floors = {row: self._floor(row) for row in self._rows}
        freed = [index for index, s in self._lent.items() if all(floors[row] > s.generation for row in s.rows)]
        for index in freed:
            del self._lent[index]
            self._free.append(index)

    def _reclaim(self) -> None:
        """Takes back loans that nobody can publish any more and, if need be, the oldest slot held past its lease."""
        for index in [i for i, loan in self._loans.items() if loan() is None]:
            del self._loans[index]
            self._free.append(index)
        if self._free or not self._expire or not self._lent:
            return
        oldest = next(iter(self._lent.values()))
        if self._clock.now_ns() - oldest.at_ns < self.spec.lease_ms * 1_000_000:
            return
        for row in oldest.rows:
            if self._floor(row) <= oldest.generation:
                self._forced[row] = oldest.generation + 1
                self.counters.expired += 1
        self._collect()


class RingReader:
    """A reader's side of one segment. Messages may be released from another thread than the one that receives."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._row, self._token = -1, 0
        self._held: set[int] = set()
        self._unseen = 0
        self._lock = threading.Lock()

    def grant(self, row: int, token: int, floor: int) -> None:
        """The publisher gave this reader a row: from generation ``floor`` on, slots are lent to it."""
        if row >= ROWS:
            raise WireError(f"the publisher of {self.segment.name} gave out row {row} of {ROWS}")
        with self._lock:
            self._row, self._token = row, token
            self._unseen = max(self._unseen, floor)
            if row >= 0:
                self.segment.words[self.segment.row(row) + 2] = 1

    def check(self, slot: Slot) -> None:
        """Raises WireError if this segment cannot have such a slot."""
        segment = self.segment
        if not (0 <= slot.index < segment.slots and 0 <= slot.length <= segment.stride and slot.generation > 0):
            raise WireError(f"descriptor {slot} does not fit shared memory of {segment.slots} x {segment.stride} bytes")
        if 0 < segment.words[_HEAD + slot.index] < slot.generation:
            raise WireError(f"descriptor {slot} names a content that its slot never had")

    def hold(self, slot: Slot) -> memoryview:
        """The bytes of a slot that came, read-only; everything before it counts as seen."""
        with self._lock:
            self._unseen = max(self._unseen, slot.generation + 1)
            self._held.add(slot.generation)
        start = self.segment.offset + slot.index * self.segment.stride
        return self.segment.data[start : start + slot.length].toreadonly()

    def valid(self, slot: Slot) -> bool:
        """Whether the slot still has the content that the descriptor named, as of all that was read before."""
        fence()
        return bool(self.segment.words[_HEAD + slot.index] == slot.generation)

    def release(self, slot: Slot) -> None:
        """The reader is done with this slot."""
        with self._lock:
            self._held.discard(slot.generation)
            if self._row < 0:
                return
            words, at = self.segment.words, self.segment.row(self._row)
            if words[at + 1] == self._token:
                words[at] = min(self._held, default=self._unseen)

    def close(self) -> None:
        """Never writes to the row again: it may soon belong to another reader."""
        with self._lock:
            self._row = -1


def remove_segment(name: str) -> bool:
    """Removes a segment whose name was read from a file: only what can be ours."""
    return bool(_NAME.fullmatch(name)) and unlink(name)
