"""The receiving side of a bus: checks, sequence numbers, policies, and leases on what lies in shared memory."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import msgspec

from pipeline.bus import Delivery, Inlet, Join, Welcome, limit, ready_topic
from pipeline.clock import SystemClock
from pipeline.errors import WireError
from pipeline.messages import Header, Message
from pipeline.shm import RingReader, Segment
from pipeline.wire import INLINE, SLOT, Slot, check_payload, decode_header, decode_slot

_DRAIN = 4096  # messages taken in one call, so that a fast publisher cannot keep ``receive`` from returning

AHEAD_NS, JUMP = 1_000_000_000, 4096
"""An epoch's name is the session time at which it opened, little after the receipt of its first message at most; and
hardly ever does a stream lose so many messages at once. A damaged header that were believed would silence its stream,
so that one beyond these limits is believed only once the next one says the same."""
CONFIRMED = 16
"""So many numbers further at most is the header that says the same."""
QUIET_NS, AT_LAST_NS = 200_000_000, 3_000_000_000


class StreamCounters(msgspec.Struct, kw_only=True):
    """Of one stream, on the reader's side: ``lost`` messages never came (``before_join`` of them were sent before the
    reader joined), ``received`` = ``delivered`` + ``dropped`` (by the policy); ``overrun`` of the delivered were
    overwritten in shared memory before they were released; ``malformed`` counts what was not a message of this
    stream, or was one for the second time."""

    received: int = 0
    delivered: int = 0
    dropped: int = 0
    lost: int = 0
    before_join: int = 0
    overrun: int = 0
    malformed: int = 0
    beats: int = 0


class Received:
    """One message as it came. Release it as soon as it has been used: a ``with`` block does.

    ``message.data`` is a read-only memoryview (None in a beat, and where payloads were declined or their memory is
    gone). In shared memory it may be overwritten when the reader holds it past the lease: use it, then ask
    ``valid()``, then keep the result or throw it away. After the release ``message.data`` must not be used any more,
    and ``valid()`` says how it was at the release.
    """

    __slots__ = ("_counters", "_overrun", "_reader", "_slot", "message")

    def __init__(
        self, message: Message, counters: StreamCounters, reader: RingReader | None = None, slot: Slot | None = None
    ) -> None:
        self.message = message
        self._counters, self._reader, self._slot, self._overrun = counters, reader, slot, False

    def valid(self) -> bool:
        """Whether ``message.data`` is still what was sent. Always True for data that came through the socket."""
        if self._slot is None or self._overrun:
            return not self._overrun
        if self._reader is None or not self._reader.valid(self._slot):
            self._overrun = True
            self._counters.overrun += 1
        return not self._overrun

    def copy(self) -> Message:
        """The message with a payload of its own (bytes). WireError if it was overrun."""
        data = self.message.data
        owned = None if data is None else bytes(data)
        if not self.valid():
            header = self.message.header
            raise WireError(
                f"message {header.stream}/{header.seq} was overwritten before it was copied: it was held longer than "
                "the publisher's lease, or its publisher is gone; read it sooner, or give the ring more slots"
            )
        return Message(self.message.header, owned)

    def release(self) -> None:
        """Gives the slot back. Idempotent; nothing to do for data that came through the socket."""
        slot, reader = self._slot, self._reader
        if slot is None:
            return
        self.valid()
        self._slot = self._reader = None
        if reader is not None:
            with contextlib.suppress(BufferError):  # an array on it is still alive: its user's business
                self.message.data.release()
            reader.release(slot)

    def __enter__(self) -> Received:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        # A message that somebody forgot must not stop the ring.
        self.release()


class Parts(msgspec.Struct, frozen=True):
    """What came under a topic that is no stream: a JSON text, or a step with its grids."""

    topic: str
    parts: tuple[Any, ...]


def drain(turn: Callable[[], bool]) -> None:
    """For a reader that is to stop: calls ``turn`` until it has said for 200 ms that nothing came and nothing waits.
    What was sent before the reader was told to stop may still be on its way. Ends after 3 s whatever comes."""
    whole = quiet = SystemClock()
    while quiet.now_ns() < QUIET_NS and whole.now_ns() < AT_LAST_NS:
        if turn():
            quiet = SystemClock()


class _Stream:
    """Sequence numbers, policy and counters of one stream."""

    def __init__(self, name: str, delivery: Delivery, payload: bool) -> None:
        self.name, self.payload = name, payload
        self.limit = limit(delivery)
        self.counters = StreamCounters()
        self.pending: deque[int] = deque()
        self.beat: int | None = None
        self._epoch: int | None = None
        self._next = 0
        self._doubted: tuple[int, int] | None = None

    def _likely(self, header: Header, gap: int) -> bool:
        """Whether something can have led to this epoch and number; what is far off must be said twice."""
        doubted, self._doubted = self._doubted, None
        if gap <= JUMP and header.epoch <= header.t_receipt_ns + AHEAD_NS:
            return True
        if doubted is not None and doubted[0] == header.epoch and 0 <= header.seq - doubted[1] <= CONFIRMED:
            return True
        self._doubted = header.epoch, header.seq
        return False

    def admit(self, header: Header) -> bool:
        """Counts what was lost before this message or beat; False for one that came already or comes too late, and
        for one whose epoch or number nothing can have led to."""
        counters, joined = self.counters, self._epoch is not None
        epoch, number = self._epoch, self._next
        if epoch is None or header.epoch > epoch:
            epoch, number = header.epoch, 0
        gap = header.seq - number
        if header.epoch < epoch or gap < 0 or not self._likely(header, gap if joined else 0):
            counters.malformed += 1
            return False
        self._epoch = epoch
        if gap:
            counters.lost += gap
            counters.before_join += 0 if joined else gap
        if header.is_beat:
            counters.beats += 1
            self._next = header.seq
        else:
            counters.received += 1
            self._next = header.seq + 1
        return True


class Subscriber:
    """One reader's inlet for all its streams and topics. Used by one thread; messages may be released by others."""

    def __init__(
        self,
        inlet: Inlet,
        join: Join,
        streams: Mapping[str, Delivery],
        topics: Mapping[str, Delivery],
        attach: Callable[[str], Segment],
    ) -> None:
        self.reader = join.reader
        self._inlet, self._join, self._attach = inlet, join, attach
        self._welcome_topic = ready_topic(join)
        self._streams = {n.encode(): _Stream(n, delivery, n in join.streams) for n, delivery in streams.items()}
        self._parts = {n.encode(): deque[Parts](maxlen=limit(delivery)) for n, delivery in topics.items()}
        self._parts_dropped = dict.fromkeys(topics, 0)
        self._pending: dict[int, Received] = {}  # in order of arrival
        self._arrivals = 0
        self._segments: dict[str, RingReader] = {}
        self._joined: dict[str, str] = {}
        self._clock = SystemClock()

    def receive(self, timeout_ms: int = 0) -> list[Received]:
        """Everything that has come, in order of arrival, less what the policies drop; else waits for the next.

        Empty when the time is over, or when something came under a topic that is no stream (see ``parts``).
        """
        deadline_ns = self._clock.now_ns() + timeout_ms * 1_000_000
        for _ in range(_DRAIN):
            parts = self._inlet.recv()
            if parts is None:
                break
            self._dispatch(parts)
        while not self._pending and not any(self._parts.values()):
            remaining_ms = -((self._clock.now_ns() - deadline_ns) // 1_000_000)
            parts = self._inlet.recv(remaining_ms) if remaining_ms > 0 else None
            if parts is None:
                break
            self._dispatch(parts)  # at once to its reader: to ask for a second takes as long as to read the first
        received = list(self._pending.values())
        self._pending.clear()
        for stream in self._streams.values():
            stream.counters.delivered += len(stream.pending)
            stream.pending.clear()
            stream.beat = None
        return received

    def parts(self) -> list[Parts]:
        """What ``receive`` has found under topics that are no streams, in order by topic."""
        found = [parts for queue in self._parts.values() for parts in queue]
        for queue in self._parts.values():
            queue.clear()
        return found

    def counters(self, stream: str) -> StreamCounters:
        """What became of the stream's messages on this side."""
        return self._streams[stream.encode()].counters

    def parts_dropped(self, topic: str) -> int:
        """How many messages of a topic that is no stream its policy has dropped."""
        return self._parts_dropped[topic]

    def joined(self) -> set[str]:
        """The endpoints whose publishers have welcomed this reader (as far as ``receive`` has seen)."""
        return set(self._joined)

    def fileno(self) -> int:
        """For select: readable when something may have come; then call ``receive`` until it returns nothing."""
        return self._inlet.fileno()

    def close(self) -> None:
        """Leaves at once. Idempotent; messages that are still held stay readable, without a lease."""
        for reader in self._segments.values():
            reader.close()
        self._inlet.close()

    def __enter__(self) -> Subscriber:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _dispatch(self, parts: Sequence[Any]) -> None:
        stream = self._streams.get(parts[0])
        if stream is not None:
            try:
                self._take(stream, parts)
            except WireError:
                stream.counters.malformed += 1
        elif parts[0] in self._parts:
            self._take_parts(parts)
        elif parts[0] == self._welcome_topic:
            self._welcome(parts)
        # Anything else is a topic that merely begins like one of ours.

    def _take(self, stream: _Stream, parts: Sequence[Any]) -> None:
        """Checks everything before it counts or holds anything. WireError if the message is malformed."""
        flag = parts[1][:1] if len(parts) > 1 else b""
        if flag not in (INLINE, SLOT):
            raise WireError(f"a message of stream {stream.name} has no header")
        header = decode_header(parts[1][1:])
        if header.stream != stream.name or len(parts) != (2 if header.is_beat else 3):
            raise WireError(f"a message of stream {stream.name} has {len(parts)} parts, or another stream's header")
        if header.is_beat:
            self._append_beat(stream, header)
        elif flag == INLINE:
            check_payload(header, len(parts[2]))
            if stream.admit(header):
                data = memoryview(parts[2]).toreadonly() if stream.payload else None
                self._append(stream, Received(Message(header, data), stream.counters))
        else:
            self._take_slot(stream, header, decode_slot(parts[2]))

    def _take_slot(self, stream: _Stream, header: Header, slot: Slot) -> None:
        check_payload(header, slot.length)
        if not stream.payload:
            if stream.admit(header):
                self._append(stream, Received(Message(header), stream.counters))
            return
        reader = self._reader(slot.segment)
        if reader is not None:
            reader.check(slot)
        if not stream.admit(header):
            return
        data = reader.hold(slot) if reader is not None else None
        self._append(stream, Received(Message(header, data), stream.counters, reader, slot))

    def _append(self, stream: _Stream, received: Received) -> None:
        self._drop_beat(stream)
        if stream.limit is not None and len(stream.pending) >= stream.limit:
            self._pending.pop(stream.pending.popleft()).release()
            stream.counters.dropped += 1
        stream.pending.append(self._arrivals)
        self._pending[self._arrivals] = received
        self._arrivals += 1

    def _append_beat(self, stream: _Stream, header: Header) -> None:
        if stream.admit(header):
            self._drop_beat(stream)
            stream.beat = self._arrivals
            self._pending[self._arrivals] = Received(Message(header), stream.counters)
            self._arrivals += 1

    def _drop_beat(self, stream: _Stream) -> None:
        """A beat says nothing that what follows it does not say."""
        if stream.beat is not None:
            del self._pending[stream.beat]
            stream.beat = None

    def _take_parts(self, parts: Sequence[Any]) -> None:
        queue, topic = self._parts[parts[0]], parts[0].decode()
        if len(queue) == queue.maxlen:
            self._parts_dropped[topic] += 1
        queue.append(Parts(topic, tuple(parts[1:])))

    def _welcome(self, parts: Sequence[Any]) -> None:
        with contextlib.suppress(msgspec.DecodeError, IndexError, WireError):
            welcome = msgspec.msgpack.decode(parts[1], type=Welcome)
            before = self._joined.get(welcome.endpoint)
            if before and before != welcome.segment and before in self._segments:
                self._segments.pop(before).close()
            self._joined[welcome.endpoint] = welcome.segment
            reader = self._reader(welcome.segment) if welcome.segment else None
            if reader is not None:
                reader.grant(welcome.row, self._join.token, welcome.floor)

    def _reader(self, segment: str) -> RingReader | None:
        """Our side of a segment; None if the segment is gone. WireError if it is no ring."""
        if segment not in self._segments:
            try:
                self._segments[segment] = RingReader(self._attach(segment))
            except FileNotFoundError:
                return None
        return self._segments[segment]
