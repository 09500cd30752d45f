"""UDP datagrams, many at a time, with the moment at which the kernel had each and a count of those that it dropped.

Where the C library has ``recvmmsg`` (Linux), one system call takes all that wait, into memory that is there already;
elsewhere they are taken one by one. What the kernel notes beside a datagram is read only of those that are asked for.
Elsewhere than on Linux it notes nothing: a datagram was then received when it was taken, and nothing is known of those
that were dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import struct
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from pipeline.clock import Clock, Origin
from pipeline.errors import SensorError

AT_ONCE = 128
"""So many datagrams are taken by one call at most."""

_SO_TIMESTAMPNS, _SO_RXQ_OVFL, _SO_RCVBUFFORCE = 35, 40, 33
_QUEUE_BYTES = 8 << 20
_OLDEST_NS = 10_000_000_000
_NOTES_BYTES, _NAME_BYTES = 128, 28
_U32 = 0xFFFFFFFF
_NOTE = struct.Struct("@Nii")
_TIMESPEC = struct.Struct("@ll")

Note = tuple[int, int, bytes]
"""What the kernel notes beside a datagram: level, kind and value."""


class Datagrams:
    """A UDP socket that never blocks. ``sender`` is the only address to be heard, if given. ``largest``: datagrams are
    cut off behind so many bytes.

    ``dropped`` counts what the kernel dropped, ``foreign`` what came from others; ``room`` is how many bytes the kernel
    keeps, which counts its own overhead in. SensorError if the port cannot be listened to, and when the socket fails.
    """

    def __init__(self, address: str, port: int, clock: Clock, sender: str | None = None, largest: int = 65536) -> None:
        self._clock = clock
        self.dropped = self.foreign = 0
        self.packets: list[bytes] = []
        """What was taken last, in the order in which it came."""
        self._dropped_u32 = 0
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._sender = None if sender is None else _packed(family, sender)
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        try:
            if sys.platform == "linux":  # elsewhere these numbers mean something else, or nothing
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RXQ_OVFL, 1)
            self._make_room()
            self.room = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            self._socket.setblocking(False)
            self._socket.bind((address, port))
        except OSError as error:
            self._socket.close()
            raise SensorError(
                f"UDP port {port} on {address} cannot be listened to: {error}. Another program may listen there "
                f"already (`ss -ulnp`), or this host has no such address."
            ) from error
        self.port = int(self._socket.getsockname()[1])
        call = _many_at_once()
        self._taking: _Taking = (
            _OneByOne(self._socket, largest) if call is None else _ManyAtOnce(self._socket, largest, call)
        )
        self._numbers: Sequence[int] = ()
        self._taken_ns = self._taken_unix_ns = 0

    def _make_room(self) -> None:
        """Has the kernel keep as much as it lets."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # only for root; others get what net.core.rmem_max allows
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE_BYTES)
                return
        with contextlib.suppress(OSError):  # where more than is allowed is refused, what there is stays
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _QUEUE_BYTES)

    def wait(self, seconds: float) -> None:
        """Waits until something can be taken, for so long at most."""
        try:
            select.select([self._socket], [], [], seconds)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise _failed(error) from error

    def receive(self) -> int:
        """Takes what has come, ``AT_ONCE`` at most, and returns how many datagrams that was, foreign ones included.
        ``packets`` holds those of the sender that is to be heard."""
        try:
            taken = self._taking.take()
        except (BlockingIOError, InterruptedError):
            taken = []
        except OSError as error:
            raise _failed(error) from error
        self.packets, self._numbers = taken, range(len(taken))
        if not taken:
            return 0
        self._taken_ns, self._taken_unix_ns = self._clock.now_ns(), Origin.now().unix_ns
        self._count_drops(self._taking.notes(len(taken) - 1))
        if self._sender is not None:
            self._numbers = [i for i in self._numbers if self._taking.sender(i) == self._sender]
            self.packets = [taken[i] for i in self._numbers]
            self.foreign += len(taken) - len(self.packets)
        return len(taken)

    def received_ns(self, index: int) -> int:
        """When the kernel had ``packets[index]``, in session time."""
        for level, kind, value in self._taking.notes(self._numbers[index]):
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
                seconds, nanoseconds = _TIMESPEC.unpack_from(value)
                # The kernel's stamp is on the wall clock. Only its age counts, so that a step of that clock between
                # two packets changes nothing; an age that cannot be is a step within this one's wait.
                age = self._taken_unix_ns - (seconds * 1_000_000_000 + nanoseconds)
                return self._taken_ns - age if 0 <= age < _OLDEST_NS else self._taken_ns
        return self._taken_ns

    def _count_drops(self, notes: list[Note]) -> None:
        """The kernel's count is a running total, so that the newest datagram's holds those of all before it."""
        for level, kind, value in notes:
            if level == socket.SOL_SOCKET and kind == _SO_RXQ_OVFL:
                (total,) = struct.unpack_from("=I", value)
                self.dropped += (total - self._dropped_u32) & _U32
                self._dropped_u32 = total

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


def _failed(error: Exception) -> SensorError:
    return SensorError(f"the UDP socket failed: {error}. Is the network interface still up?")


def _packed(family: int, address: str) -> bytes:
    """An address as the kernel writes it; b"", which is nobody's, for what is no address of this family."""
    try:
        return socket.inet_pton(family, address.partition("%")[0])
    except OSError:
        return b""


def _many_at_once() -> Any:
    """Linux's ``recvmmsg``; None elsewhere, where its structures are others, if there are any."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "recvmmsg", None)


class _Taking(Protocol):
    """How datagrams are taken. The numbers count those that were taken last."""

    def take(self) -> list[bytes]: ...
    def sender(self, number: int) -> bytes: ...
    def notes(self, number: int) -> list[Note]: ...


class _OneByOne:
    def __init__(self, listening: socket.socket, largest: int) -> None:
        self._socket, self._largest = listening, largest
        self._taken: list[tuple[bytes, list[Note], int, Any]] = []

    def take(self) -> list[bytes]:
        self._taken.clear()
        try:
            while len(self._taken) < AT_ONCE:
                self._taken.append(self._socket.recvmsg(self._largest, _NOTES_BYTES))
        except BlockingIOError:
            pass
        except OSError:
            if not self._taken:
                raise
        return [data for data, _, _, _ in self._taken]

    def sender(self, number: int) -> bytes:
        return _packed(self._socket.family, self._taken[number][3][0])

    def notes(self, number: int) -> list[Note]:
        return self._taken[number][1]


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """The C library's ``struct msghdr``."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vectors_length", ctypes.c_size_t),
        ("notes", ctypes.c_void_p),
        ("notes_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Header(ctypes.Structure):
    """``struct mmsghdr``."""

    _fields_ = (("message", _Message), ("length", ctypes.c_uint))


class _ManyAtOnce:
    def __init__(self, listening: socket.socket, largest: int, call: Any) -> None:
        self._socket, self._call, self._largest = listening, call, largest
        self._address = slice(4, 8) if listening.family == socket.AF_INET else slice(8, 24)
        self._data, self._notes = bytearray(AT_ONCE * largest), bytearray(AT_ONCE * _NOTES_BYTES)
        self._names = bytearray(AT_ONCE * _NAME_BYTES)
        data, notes, names = (_address(memory) for memory in (self._data, self._notes, self._names))
        self._vectors = (_Vector * AT_ONCE)(*(_Vector(data + i * largest, largest) for i in range(AT_ONCE)))
        vectors, size = ctypes.addressof(self._vectors), ctypes.sizeof(_Vector)
        self._headers = (_Header * AT_ONCE)(
            *(_Header(_Message(names + i * _NAME_BYTES, _NAME_BYTES, vectors + i * size, 1, notes + i * _NOTES_BYTES,
                               _NOTES_BYTES)) for i in range(AT_ONCE))
        )  # fmt: skip
        self._fresh = bytes(self._headers)
        flags = int(socket.MSG_DONTWAIT)
        self._arguments = (ctypes.byref(self._headers), AT_ONCE, flags, None)
        self._written = memoryview(self._headers).cast("B")
        words = self._written.cast("I")
        stride = ctypes.sizeof(_Header) // words.itemsize
        self._lengths = words[_Header.length.offset // words.itemsize :: stride]
        self._taken = 0

    def take(self) -> list[bytes]:
        used = self._taken * ctypes.sizeof(_Header)
        self._written[:used] = self._fresh[:used]  # the kernel writes what it used over what it may use
        self._taken = 0
        count = self._call(self._socket.fileno(), *self._arguments)  # its own number may be another's by now
        if count < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._taken, data, size = count, memoryview(self._data), self._largest
        return [bytes(data[i * size : i * size + n]) for i, n in enumerate(self._lengths[:count].tolist())]

    def sender(self, number: int) -> bytes:
        name = self._names[number * _NAME_BYTES : (number + 1) * _NAME_BYTES]
        return bytes(name[self._address])

    def notes(self, number: int) -> list[Note]:
        found, at = [], number * _NOTES_BYTES
        end = at + self._headers[number].message.notes_length
        head = socket.CMSG_LEN(0)
        while at + head <= end:
            size, level, kind = _NOTE.unpack_from(self._notes, at)
            if size < head:
                break
            found.append((level, kind, bytes(self._notes[at + head : at + size])))
            at += socket.CMSG_SPACE(size - head)
        return found


def _address(memory: bytearray) -> int:
    """Where a bytearray lies; it must not be resized."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
