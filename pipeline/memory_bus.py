"""A bus within one process: queues instead of sockets, private memory instead of shared memory, the same behaviour."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.bus import HIGH_WATER, Delivery, merged, new_join, subscriptions
from pipeline.clock import Clock, SystemClock
from pipeline.errors import ConfigError
from pipeline.receiving import Subscriber
from pipeline.sending import Publisher
from pipeline.shm import Ring, RingSpec, Segment, new_name


class MemoryBus:
    """See ``Bus``. All its publishers and subscribers live in this process, in any threads."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.RLock()
        self._outlets: dict[str, _MemoryOutlet] = {}
        self._inlets: list[_MemoryInlet] = []
        self._segments: dict[str, Segment] = {}
        self._opened: list[Publisher | Subscriber] = []

    def publisher(
        self,
        endpoint: str,
        streams: Iterable[str] = (),
        ring: RingSpec | None = None,
        *,
        lossless: bool = False,
        stop: threading.Event | None = None,
    ) -> Publisher:
        with self._lock:
            if endpoint in self._outlets:
                raise ConfigError(f"endpoint {endpoint!r} has a publisher already; each endpoint has exactly one")
            outlet = _MemoryOutlet(self, endpoint, lossless)
        name, made = new_name(), None
        if ring is not None:
            self._segments[name] = Segment.private(name, ring)
            made = Ring(self._segments[name], ring, self._clock, expire=not lossless)

        def forget() -> None:
            self._segments.pop(name, None)

        publisher = Publisher(outlet, endpoint, streams, made, lossless=lossless, stop=stop, on_close=forget)
        self._opened.append(publisher)
        return publisher

    def subscriber(
        self,
        reader: str,
        streams: Mapping[str, Mapping[str, Delivery]],
        payloads: Mapping[str, bool] | bool = True,
        topics: Mapping[str, Mapping[str, Delivery]] | None = None,
    ) -> Subscriber:
        topics = topics or {}
        join = new_join(reader, streams, payloads)
        inlet = _MemoryInlet(self, {*streams, *topics}, subscriptions(join, streams, topics))
        subscriber = Subscriber(inlet, join, merged(streams), merged(topics), self._segment)
        self._opened.append(subscriber)
        return subscriber

    def close(self) -> None:
        for end in reversed(self._opened):
            end.close()
        self._opened.clear()

    def _segment(self, name: str) -> Segment:
        try:
            return self._segments[name]
        except KeyError:
            raise FileNotFoundError(name) from None


class _MemoryOutlet:
    def __init__(self, bus: MemoryBus, endpoint: str, lossless: bool) -> None:
        self._bus, self._endpoint, self._lossless = bus, endpoint, lossless
        self.news = threading.Event()
        self.inbox: list[bytes] = []
        bus._outlets[endpoint] = self
        for inlet in bus._inlets:
            if endpoint in inlet.endpoints:
                self.notify([b"\x01" + topic for topic in inlet.topics])

    def notify(self, events: list[bytes]) -> None:
        self.inbox += events
        self.news.set()

    def send(self, parts: Sequence[Any], meanwhile: Callable[[], None] | None = None) -> bool:
        owned = [part if isinstance(part, bytes) else bytes(part) for part in parts]
        with self._bus._lock:
            readers = [i for i in self._bus._inlets if self._endpoint in i.endpoints and owned[0] in i.topics]
            if self._lossless and any(len(i.queue) >= HIGH_WATER for i in readers):
                return False
            if meanwhile is not None:
                meanwhile()
            for inlet in readers:
                inlet.put(owned)
        return True

    def events(self) -> list[bytes]:
        if not self.inbox:
            return []
        with self._bus._lock:
            events, self.inbox = self.inbox, []
            self.news.clear()
        return events

    def wait(self, timeout_ms: int) -> None:
        self.news.wait(timeout_ms / 1000)

    def close(self) -> None:
        with self._bus._lock:
            self._bus._outlets.pop(self._endpoint, None)


class _MemoryInlet:
    def __init__(self, bus: MemoryBus, endpoints: set[str], topics: list[bytes]) -> None:
        self._bus, self.endpoints, self.topics = bus, endpoints, topics
        self.queue: deque[list[bytes]] = deque()
        self._read, self._write = os.pipe()  # holds one byte while the queue holds something
        with bus._lock:
            bus._inlets.append(self)
            self._tell(b"\x01")

    def _tell(self, flag: bytes) -> None:
        for endpoint in self.endpoints:
            outlet = self._bus._outlets.get(endpoint)
            if outlet is not None:
                outlet.notify([flag + topic for topic in self.topics])

    def put(self, parts: list[bytes]) -> None:
        if len(self.queue) < HIGH_WATER:  # like a socket: the newest is lost
            self.queue.append(parts)
            if len(self.queue) == 1:
                os.write(self._write, b"x")

    def recv(self, timeout_ms: int = 0) -> Sequence[Any] | None:
        if timeout_ms:
            select.select([self._read], [], [], timeout_ms / 1000)
        with self._bus._lock:
            if not self.queue:
                return None
            parts = self.queue.popleft()
            if not self.queue:
                os.read(self._read, 1)
        return parts

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        with self._bus._lock:
            if self not in self._bus._inlets:
                return
            self._bus._inlets.remove(self)
            self._tell(b"\x00")
            self.queue.clear()
            os.close(self._read)
            os.close(self._write)
