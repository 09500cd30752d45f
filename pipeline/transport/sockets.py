"""Sockets as the bus needs them: opened, bound, and the two ends of ``pipeline.bus`` on them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from pipeline.bus import HIGH_WATER
from pipeline.errors import ConfigError

LINGER_MS = 1000
# As plain numbers: pyzmq's are enum members, whose bitwise operators cost a microsecond each.
EVENTS, READABLE, AT_ONCE, _MORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.SNDMORE)
_MORE_AT_ONCE = _MORE | AT_ONCE


def bind(socket: zmq.Socket[bytes], address: str) -> None:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        why = zmq.strerror(error.errno or 0)
        raise ConfigError(f"cannot listen at {address}: {why}; is another program using it?") from None


def check_free(address: str) -> None:
    """Raises ConfigError unless somebody could listen at ``address`` now."""
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        bind(socket, address)


def sub_socket(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.SUB)
    socket.linger = 0
    socket.rcvhwm = HIGH_WATER
    socket.reconnect_ivl, socket.reconnect_ivl_max = 20, 500
    return socket


class ZmqOutlet:
    def __init__(self, socket: zmq.Socket[bytes], linger_ms: int, stop: threading.Event | None) -> None:
        self._socket, self._linger_ms, self._stop = socket, linger_ms, stop
        # What lies under pyzmq's own, which asks of every part for what only other kinds of sockets have.
        self._send: Callable[[Any, int], Any] = super(zmq.Socket, socket).send

    def send(self, parts: Sequence[Any], meanwhile: Callable[[], None] | None = None) -> bool:
        send, flags = self._send, _MORE_AT_ONCE
        try:
            for part in parts[:-1]:
                send(part, flags)
                flags = _MORE  # only the first part of a message can find no room
        except zmq.Again:
            return False
        try:
            if meanwhile is not None:
                meanwhile()
        finally:
            send(parts[-1], 0)  # also when interrupted, or the next message would be taken for the rest of this one
        return True

    def events(self) -> list[bytes]:
        events = []
        while self._socket.getsockopt(EVENTS) & READABLE:  # type: ignore[operator]
            events.append(bytes(self._socket.recv(AT_ONCE)))
        return events

    def wait(self, timeout_ms: int) -> None:
        self._socket.poll(timeout_ms)

    def close(self) -> None:
        stopped = self._stop is not None and self._stop.is_set()
        self._socket.close(min(self._linger_ms, LINGER_MS) if stopped else self._linger_ms)


class ZmqInlet:
    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._timeout_ms = -1

    def recv(self, timeout_ms: int = 0) -> Sequence[Any] | None:
        """Waits inside ZeroMQ rather than in a poll before it, and takes frames, which know whether more will come:
        what runs between a wake-up and the reader runs with cold caches, and each call saved is some 20 us."""
        if timeout_ms and timeout_ms != self._timeout_ms:
            self._socket.rcvtimeo = self._timeout_ms = timeout_ms
        try:
            frame = self._socket.recv(0 if timeout_ms else AT_ONCE, False)
        except zmq.Again:
            return None
        parts = [frame.bytes]
        while frame.more:
            frame = self._socket.recv(0, False)
            parts.append(frame.bytes)
        return parts

    def fileno(self) -> int:
        return int(self._socket.get(zmq.FD))

    def close(self) -> None:
        self._socket.close(0)
