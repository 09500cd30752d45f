"""What a bus promises, whatever carries the bytes: delivery policies, joining, and the two protocols of a carrier.

``pipeline.sending`` and ``pipeline.receiving`` hold all behaviour; ``pipeline.transport`` gives them ZeroMQ sockets
and ``pipeline.memory_bus`` a queue within the process, so that both buses pass one suite of tests.

Joining. A reader subscribes to its topics and last of all to ``~ready.<who it is and what it needs in full>``. (A
socket that reconnects repeats its subscriptions in byte order, and ``~`` sorts behind every letter.) The publisher so
learns that the reader has joined, gives it a row in its ring and answers on that topic with a ``Welcome``. A publisher
that waits for its required readers before the first message therefore loses none of them.

Delivery. A policy acts on what has come since the last ``receive``: it is applied on the reader's side because a
high-water mark drops the newest message and tells nobody. Losses are found by sequence numbers. For every stream and
epoch, sent = received + lost and received = delivered + dropped, as soon as a message or beat has told of the end.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from pipeline.errors import ConfigError
from pipeline.shm import RingSpec

if TYPE_CHECKING:
    from pipeline.receiving import Subscriber
    from pipeline.sending import Publisher

INLINE_MAX = 65_536
"""Payloads of more bytes than this go through the ring, where there is one."""
HIGH_WATER = 2000
"""Messages that wait on each side of a connection before the newest are lost (or a lossless publisher waits)."""
READY = b"~ready."


class Latest(msgspec.Struct, frozen=True):
    """Only the newest message of those that came since the last ``receive``."""


class Buffered(msgspec.Struct, frozen=True):
    """The newest ``n`` messages of those that came since the last ``receive``."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"a subscription buffered({self.n}) would deliver nothing; n must be at least 1")


class Lossless(msgspec.Struct, frozen=True):
    """Every message that came. Whole only from a publisher that was opened with ``lossless=True``."""


Delivery = Latest | Buffered | Lossless


def limit(delivery: Delivery) -> int | None:
    """How many messages a policy keeps; None: all."""
    match delivery:
        case Latest():
            return 1
        case Buffered(n=n):
            return n
        case Lossless():
            return None


class Outlet(Protocol):
    """What a publisher needs of a carrier."""

    def send(self, parts: Sequence[Any], meanwhile: Callable[[], None] | None = None) -> bool:
        """Sends to all who subscribed to ``parts[0]``; False only if lossless and one of them has no room.

        ``meanwhile`` is what must be done before anyone receives the last part. It runs as late as it can, so that all
        that need not wait for it does not.
        """

    def events(self) -> list[bytes]:
        """Subscriptions since the last call: 1 or 0 (came, went) and the topic."""

    def wait(self, timeout_ms: int) -> None:
        """Returns after this time, or earlier when there is an event."""

    def close(self) -> None:
        """Delivers what was sent, within a second, and leaves."""


class Inlet(Protocol):
    """What a subscriber needs of a carrier."""

    def recv(self, timeout_ms: int = 0) -> Sequence[Any] | None:
        """The parts of the next message; None if none came in time."""

    def fileno(self) -> int:
        """Readable when something may have come."""

    def close(self) -> None:
        """Leaves at once."""


class Join(msgspec.Struct, frozen=True, array_like=True):
    """Who joins: the reader's name, a number of its own, and the streams whose payloads it needs."""

    reader: str
    token: int
    streams: tuple[str, ...]


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The publisher's answer; ``segment`` is empty where there is no ring, ``row`` -1 where no lease could be given."""

    endpoint: str
    segment: str
    row: int
    floor: int


def ready_topic(join: Join) -> bytes:
    """The topic by which a reader joins."""
    return READY + msgspec.json.encode(join)


def new_join(
    reader: str, streams: Mapping[str, Mapping[str, Delivery]], payloads: Mapping[str, bool] | bool
) -> Join:
    """The words with which this reader joins all its publishers."""
    names = [name for group in streams.values() for name in group]
    if len(set(names)) != len(names):
        raise ConfigError(f"reader {reader} subscribes to one stream at two endpoints: {sorted(names)}; name it once")
    wanted = names if payloads is True else [] if payloads is False else [n for n in names if payloads.get(n, True)]
    return Join(reader, secrets.randbits(63) | 1, tuple(sorted(wanted)))


def subscriptions(join: Join, *groups: Mapping[str, Mapping[str, Delivery]]) -> list[bytes]:
    """All topics of a subscriber in the order in which they are to be subscribed to."""
    return [name.encode() for group in groups for names in group.values() for name in names] + [ready_topic(join)]


def merged(groups: Mapping[str, Mapping[str, Delivery]]) -> dict[str, Delivery]:
    """The policies of all endpoints by stream."""
    return {name: delivery for group in groups.values() for name, delivery in group.items()}


class Bus(Protocol):
    """What a node is given to reach the others."""

    def publisher(
        self,
        endpoint: str,
        streams: Iterable[str] = (),
        ring: RingSpec | None = None,
        *,
        lossless: bool = False,
        stop: threading.Event | None = None,
    ) -> Publisher:
        """Opens the one publisher of an endpoint. ``lossless`` waits for readers: only for what can wait."""

    def subscriber(
        self,
        reader: str,
        streams: Mapping[str, Mapping[str, Delivery]],
        payloads: Mapping[str, bool] | bool = True,
        topics: Mapping[str, Mapping[str, Delivery]] | None = None,
    ) -> Subscriber:
        """Joins ``{endpoint: {stream: policy}}``, with headers only where ``payloads`` says False, and
        ``{endpoint: {topic: policy}}`` for what is no stream."""

    def close(self) -> None:
        """Closes whatever was opened here."""
