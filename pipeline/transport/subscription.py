"""Predictions and status for anybody, in or outside a session: a topic of JSON objects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import msgspec
import zmq

from pipeline.clock import SystemClock
from pipeline.session import check_remote
from pipeline.transport.curve import CurveClient, own_keys
from pipeline.transport.handshakes import Caller
from pipeline.transport.sockets import ZmqInlet, sub_socket


def _json_object(data: bytes) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError:
        return None


class JsonSubscription:
    """A topic of JSON objects from outside or inside a session; iterate over it, in a ``with`` block."""

    def __init__(
        self, endpoint: str, topic: str, curve: CurveClient | None = None, stop: threading.Event | None = None
    ) -> None:
        check_remote(endpoint, keys=curve is not None)
        self._topic, self._stop = topic.encode(), stop or threading.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = sub_socket(self._context)
        if curve is not None:
            own_keys(socket, curve)
        self._caller = Caller(self._context, socket, endpoint, curve)
        socket.connect(endpoint)
        socket.subscribe(self._topic)
        self._inlet = ZmqInlet(socket)
        self.malformed = 0

    @property
    def refusal(self) -> str:
        """Why the endpoint lets nobody listen from here, in a sentence; nothing while it does."""
        return self._caller.refusal

    def receive(self, timeout_ms: int) -> dict[str, Any] | None:
        """The next object; None if none came in time."""
        clock = SystemClock()
        while True:
            parts = self._inlet.recv(max(0, timeout_ms - clock.now_ns() // 1_000_000))
            if parts is None:
                self._caller.turn()
                return None
            if parts[0] == self._topic:
                found = _json_object(parts[1]) if len(parts) == 2 else None
                if found is not None:
                    return found
                self.malformed += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Objects as they come, until ``stop`` is set or the subscription is closed."""
        while not self._stop.is_set():
            found = self.receive(100)
            if found is not None:
                yield found

    def close(self) -> None:
        """Idempotent."""
        self._stop.set()
        self._caller.close()
        self._inlet.close()
        self._context.destroy(0)

    def __enter__(self) -> JsonSubscription:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def subscribe_json(
    endpoint: str, topic: str, curve: CurveClient | None = None, stop: threading.Event | None = None
) -> JsonSubscription:
    """Subscribes to a topic of JSON objects at ``ipc:///path`` or ``tcp://host:port``.

    What was sent before is not seen. ConfigError for a host beyond this one without keys.
    """
    return JsonSubscription(endpoint, topic, curve, stop)
