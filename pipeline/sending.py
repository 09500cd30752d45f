"""The sending side of a bus: numbers in, bytes out, slots lent, and the readers known by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import msgspec
import numpy as np

from pipeline.bus import INLINE_MAX, READY, Join, Outlet, Welcome
from pipeline.clock import SystemClock
from pipeline.messages import Header, Message, flat
from pipeline.shm import Bytes, Ring, RingCounters
from pipeline.wire import INLINE, SLOT, check_payload, encode_header, encode_slot

_SMALL = 4096
_SIZED = (np.ndarray, memoryview)
_SERVE_NS = 50_000_000
"""How often at most it is looked who has joined and left while messages go out: each look costs two system calls."""


class Sent(msgspec.Struct, kw_only=True):
    """Of one stream: ``sent`` numbers were used; ``dropped`` of them found no free slot and never left, ``oversize``
    were too large for a slot and went through the socket."""

    sent: int = 0
    dropped: int = 0
    oversize: int = 0


class Publisher:
    """One node's outlet. Used by one thread; close it, or use it in a ``with`` block."""

    def __init__(
        self,
        outlet: Outlet,
        endpoint: str,
        streams: Iterable[str],
        ring: Ring | None,
        *,
        lossless: bool = False,
        stop: threading.Event | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.endpoint, self._outlet, self._ring, self._lossless = endpoint, outlet, ring, lossless
        self._stop = stop or threading.Event()
        self._on_close = on_close
        self._sent = {stream: Sent() for stream in streams}
        self._topics = {stream: stream.encode() for stream in self._sent}
        self._readers: dict[bytes, tuple[Join, int]] = {}
        self._welcomes: list[tuple[bytes, bytes]] = []
        self._clock = SystemClock()  # for waiting only
        self._closed = False
        self._served_ns = -_SERVE_NS

    def publish(self, message: Message) -> bool:
        """Sends a message. The buffer may be reused at once, unless it is a loan, which must not be written any more.

        False if it was dropped and counted because no slot was free (its number shows readers the loss), or, where
        the publisher is lossless and therefore waits, because ``stop`` was set. WireError if payload and header
        contradict each other, KeyError for a stream that the publisher was not opened for.
        """
        header, data = message.header, message.data
        counters = self._sent[header.stream]
        if data is None or header.layout is None:
            raise ValueError(f"{header.stream}/{header.seq} has no payload: send it with beat()")
        nbytes = data.nbytes if isinstance(data, _SIZED) else len(data)
        check_payload(header, nbytes)
        counters.sent += 1
        ready = self._prepare(header, data, nbytes, counters)
        if ready is None:
            self._serve()  # perhaps a reader has left
            ready = self._prepare(header, data, nbytes, counters)
        while ready is None and self._lossless and self._pause():
            ready = self._prepare(header, data, nbytes, counters)
        sent = ready is not None and self._send(*ready)
        counters.dropped += not sent
        if self._clock.now_ns() - self._served_ns >= _SERVE_NS:
            self._serve()  # only now: what is ready to go must not wait for it
        return sent

    def beat(self, header: Header) -> bool:
        """Sends a beat: a header without layout, whose ``seq`` is the number of the message to come."""
        if not header.is_beat:
            raise ValueError(f"{header.stream}/{header.seq} has a layout, so it is the header of a message, not a beat")
        self._serve()
        return self._send((self._topics[header.stream], INLINE + encode_header(header)))

    def publish_json(self, topic: str, data: bytes) -> bool:
        """Sends one JSON text under a topic of its own."""
        return self.publish_parts(topic, (data,))

    def publish_parts(self, topic: str, parts: Sequence[Any]) -> bool:
        """Sends byte strings under a topic of its own (a step and its grids)."""
        self._serve()
        return self._send((topic.encode(), *parts))

    def loan(self, nbytes: int) -> Bytes | None:
        """Memory to fill and to publish as a payload that is then copied no more: u1 [nbytes].

        It lies in a slot, or is fresh memory where a payload of this size would not go through the ring anyway. None
        when no slot is free. A loan that is never published ends when the last array on it is gone.
        """
        ring = self._ring
        if ring is None or nbytes <= INLINE_MAX or nbytes > ring.segment.stride:
            return np.empty(nbytes, np.uint8)
        memory = ring.loan(nbytes)
        if memory is None:
            self._serve()  # perhaps a reader has left
            memory = ring.loan(nbytes)
        return memory

    def wait_for_readers(
        self, names: Collection[str], timeout_s: float, stop: threading.Event | None = None
    ) -> set[str]:
        """Waits until readers of these names have joined, the time is over, or ``stop`` is set; those missing."""
        deadline_ns = self._clock.now_ns() + int(timeout_s * 1e9)
        missing = set(names) - self.readers()
        while missing and not self._stop.is_set() and not (stop and stop.is_set()):
            remaining_ms = (deadline_ns - self._clock.now_ns()) // 1_000_000
            if remaining_ms <= 0:
                break
            self._outlet.wait(min(remaining_ms, 50))
            missing = set(names) - self.readers()
        return missing

    def readers(self) -> set[str]:
        """The names of the readers that are joined now."""
        self._serve()
        return {join.reader for join, _ in self._readers.values()}

    def counters(self, stream: str) -> Sent:
        """What became of the stream's messages on this side."""
        return self._sent[stream]

    @property
    def ring_counters(self) -> RingCounters:
        """What readers cost the ring (zeros where there is none)."""
        return self._ring.counters if self._ring else RingCounters()

    def close(self) -> None:
        """Idempotent; takes at most some seconds, whatever the readers do."""
        if self._closed:
            return
        self._closed = True
        if self._lossless:
            self._wait_for_attached(2.0)
        self._outlet.close()
        self._on_close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _prepare(
        self, header: Header, data: Any, nbytes: int, counters: Sent
    ) -> tuple[tuple[Any, ...], Callable[[], None] | None] | None:
        """What to send, and how its slot is to be filled meanwhile; None if it needs a slot and none is free."""
        topic, packed, ring = self._topics[header.stream], encode_header(header), self._ring
        if ring is not None:
            index, source = ring.loaned(data), None
            if index is None and nbytes > INLINE_MAX:
                if nbytes <= ring.segment.stride:
                    index, source = ring.acquire(), as_bytes(data)
                    if index is None:
                        return None
                else:
                    counters.oversize += 1
            if index is not None:
                slot = ring.lend(index, header.stream, nbytes)
                return (topic, SLOT + packed, encode_slot(slot)), partial(ring.fill, slot, source)
        return (topic, INLINE + packed, as_part(data, nbytes)), None

    def _wait_for_attached(self, timeout_s: float) -> None:
        """The end of a short import must not take away memory that a reader is yet to map."""
        deadline_ns = self._clock.now_ns() + int(timeout_s * 1e9)
        while self._ring is not None and not self._ring.attached() and self._clock.now_ns() < deadline_ns:
            if not self._pause():
                return

    def _send(self, parts: Sequence[Any], meanwhile: Callable[[], None] | None = None) -> bool:
        while not self._outlet.send(parts, meanwhile):
            if not self._pause():
                return False
        return True

    def _pause(self) -> bool:
        """Lets readers catch up; False when told to stop. A released slot rings no bell, so the wait is short."""
        reached = self._clock.wait_until(self._clock.now_ns() + 100_000, self._stop)
        self._serve()
        return reached

    def _serve(self) -> None:
        """Takes note of who joined and left."""
        self._served_ns = self._clock.now_ns()
        for event in self._outlet.events():
            topic = event[1:]
            if topic.startswith(READY):
                if event[0]:
                    self._join(topic)
                else:
                    self._leave(topic)
        while self._welcomes and self._outlet.send(self._welcomes[0]):
            del self._welcomes[0]

    def _join(self, topic: bytes) -> None:
        try:
            join = msgspec.json.decode(topic[len(READY) :], type=Join)
        except msgspec.DecodeError:
            return  # not one of ours
        row, floor, segment = -1, 0, ""
        if self._ring is not None:
            segment, floor = self._ring.segment.name, self._ring.next_generation
            row = self._ring.add_reader(join.token, frozenset(join.streams))
        self._readers[topic] = (join, row)
        self._welcomes.append((topic, msgspec.msgpack.encode(Welcome(self.endpoint, segment, row, floor))))

    def _leave(self, topic: bytes) -> None:
        _, row = self._readers.pop(topic, (None, -1))
        if self._ring is not None and row >= 0:
            self._ring.remove_reader(row)


def as_part(data: Any, nbytes: int) -> Any:
    """Any C-contiguous buffer as a part of a message: for a small array a copy costs less than another view."""
    if type(data) is bytes:
        return data
    return data.tobytes() if nbytes <= _SMALL and isinstance(data, np.ndarray) else as_bytes(data).data


def as_bytes(data: Any) -> Bytes:
    """Any C-contiguous buffer, or any array, as its bytes."""
    if isinstance(data, np.ndarray):
        return flat(data)
    return np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
