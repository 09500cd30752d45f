"""Who was refused, and why, seen from either side of a connection: ZeroMQ itself says neither."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

import zmq

from pipeline.clock import SystemClock
from pipeline.refusals import Refusals, Why, seen_by_caller, seen_by_listener
from pipeline.transport.curve import CurveClient, CurveServer
from pipeline.transport.sockets import EVENTS, READABLE

_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_MECHANISM, _CRYPTOGRAPHIC = 0x11000002, 0x11000001  # why a handshake failed by the protocol (zmq.h)
_CUT_OFF = 3  # so many handshakes in a row that end without a reason are no accident
_KNOCK_NS = 2_000_000_000  # how often who was refused tries again


class Handshakes:
    """How the handshakes of one socket end, as ZeroMQ's monitor tells it. Connections that stand cost nothing."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
        self._socket, self._told = socket, context.socket(zmq.PAIR)
        self._told.linger, self._told.rcvhwm = 0, 0  # a monitor that finds no room holds up ZeroMQ's own thread
        where = f"inproc://handshakes-{id(self)}"
        socket.monitor(where, _HANDSHAKES)
        self._told.connect(where)

    def take(self) -> Iterator[tuple[int, int]]:
        """The event of each handshake since the last call, and its value."""
        while not self._told.closed and self._told.getsockopt(EVENTS) & READABLE:  # type: ignore[operator]
            yield struct.unpack("=Hi", self._told.recv_multipart()[0])

    def close(self) -> None:
        """Idempotent."""
        if not self._told.closed:
            if not self._socket.closed:
                self._socket.disable_monitor()
            self._told.close(0)


class Door:
    """Who was refused at a socket that listens."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        address: str,
        curve: CurveServer | None,
    ) -> None:
        self._address, self._secret_file = address, "" if curve is None else curve.secret_file or "the secret key"
        self._handshakes, self._recent = Handshakes(context, socket), Refusals()
        self._strangers: deque[tuple[str, str]] = deque(maxlen=8)

    def refuse(self, key: str, peer: str) -> None:
        """A key that is not on the list. From any thread."""
        self._strangers.append((key, peer))

    def refusals(self) -> list[str]:
        """Who was refused lately, in sentences."""
        while self._strangers:
            self._add("key", *self._strangers.popleft())
        for event, value in self._handshakes.take():
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value in (_MECHANISM, _CRYPTOGRAPHIC):
                self._add("keys" if value == _MECHANISM else "hub_key")
        return self._recent.recent()

    def _add(self, why: Why, key: str = "", peer: str = "") -> None:
        self._recent.add(seen_by_listener(why, self._address, self._secret_file, key, peer))

    def close(self) -> None:
        self._handshakes.close()


class Caller:
    """Why a socket that connects is refused. ZeroMQ never tries again by itself after most refusals; this does, so that
    whoever mends the other side need not start this one again."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        address: str,
        curve: CurveClient | None,
    ) -> None:
        self._socket, self._address, self._curve = socket, address, curve
        self._handshakes, self._clock = Handshakes(context, socket), SystemClock()
        self._cut_off = 0
        self._again_ns: int | None = None
        self.refusal = ""
        """The last refusal in a sentence; nothing once the connection stands."""

    def turn(self) -> None:
        """Takes note of what has happened. For moments in which nothing comes."""
        for event, value in self._handshakes.take():
            self._take(event, value)
        if self._again_ns is not None and self._clock.now_ns() >= self._again_ns:
            self._again_ns = None
            with suppress(zmq.ZMQError):  # ZeroMQ has given it up already
                self._socket.disconnect(self._address)
            self._socket.connect(self._address)

    def _take(self, event: int, value: int) -> None:
        self._cut_off = self._cut_off + 1 if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL else 0
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.refusal = ""
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._refused("key")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == _MECHANISM:
            self._refused("keys")
        elif self._curve is not None and self._cut_off >= _CUT_OFF:  # ZeroMQ tries again by itself
            self._say("hub_key")

    def _refused(self, why: Why) -> None:
        self._say(why)
        self._again_ns = self._clock.now_ns() + _KNOCK_NS

    def _say(self, why: Why) -> None:
        curve = self._curve
        files = ("", "") if curve is None else (curve.secret_file or "of this side", curve.server_file or "given")
        self.refusal = seen_by_caller(why, self._address, *files)

    def close(self) -> None:
        """Idempotent."""
        self._handshakes.close()
