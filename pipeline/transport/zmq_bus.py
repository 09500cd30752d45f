"""The bus between the processes of a session, and the way to watch it from outside."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import zmq

from pipeline.bus import HIGH_WATER, Delivery, merged, new_join, subscriptions
from pipeline.clock import Clock, SystemClock
from pipeline.errors import ConfigError
from pipeline.receiving import Subscriber
from pipeline.sending import Publisher
from pipeline.session import FileLock, SessionFolder, check_name, check_remote, endpoint_path
from pipeline.shm import Ring, RingSpec, Segment, new_name, remove_segment
from pipeline.transport.curve import CurveServer, authenticator, guard
from pipeline.transport.handshakes import Door
from pipeline.transport.sockets import LINGER_MS, ZmqInlet, ZmqOutlet, bind, sub_socket

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

_LOSSLESS_LINGER_MS = 30_000  # what a slow reader of a replay has not fetched yet; a dead one does not count


class ZmqBus:
    """See ``Bus``: this node's way to the other processes of the session. Used by one thread."""

    def __init__(self, session_dir: Path, node: str, clock: Clock | None = None) -> None:
        """ConfigError if the folder is open to others."""
        check_name("a node", node)
        self.node = node
        self._clock = clock or SystemClock()
        self._folder = SessionFolder(Path(session_dir))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._auth: ThreadAuthenticator | None = None
        self._doors: list[Door] = []
        self._opened: list[Publisher | Subscriber] = []

    def publisher(
        self,
        endpoint: str,
        streams: Iterable[str] = (),
        ring: RingSpec | None = None,
        *,
        lossless: bool = False,
        stop: threading.Event | None = None,
        tcp: str | None = None,
        curve: CurveServer | None = None,
    ) -> Publisher:
        """Opens the one publisher of ``<session>/<endpoint>.sock`` and, if asked, of a ``tcp://`` endpoint beside it.

        ConfigError if it has a living publisher already, if there is too little shared memory, if the address cannot
        be bound, or if it could be reached from beyond this host without keys.
        """
        address = endpoint_path(self._folder.path, endpoint)
        for stream in (streams := tuple(streams)):
            check_name("a stream", stream)
        if tcp is not None:
            check_remote(tcp, keys=curve is not None)
            if ring is not None:
                raise ConfigError(f"endpoint {endpoint} cannot have both a ring in shared memory and the address {tcp}")
        lock = self._lock(endpoint)
        memory, socket = None, None
        try:
            memory = self._ring(lock, ring, lossless) if ring is not None else None
            socket = self._xpub(address, lossless)
            if tcp is not None:
                self._bind_tcp(socket, tcp, curve)
        except BaseException:
            if socket is not None:
                socket.close(0)
            _forget(lock)
            raise
        outlet = ZmqOutlet(socket, _LOSSLESS_LINGER_MS if lossless else LINGER_MS, stop)
        publisher = Publisher(
            outlet, endpoint, streams, memory, lossless=lossless, stop=stop, on_close=lambda: _forget(lock)
        )
        weakref.finalize(publisher, _forget, lock)  # a process that ends without closing it still leaves no memory
        self._opened.append(publisher)
        return publisher

    def subscriber(
        self,
        reader: str,
        streams: Mapping[str, Mapping[str, Delivery]],
        payloads: Mapping[str, bool] | bool = True,
        topics: Mapping[str, Mapping[str, Delivery]] | None = None,
    ) -> Subscriber:
        """Joins endpoints of this session; their publishers may come later, go, and come back."""
        topics = topics or {}
        join = new_join(reader, streams, payloads)
        addresses = [endpoint_path(self._folder.path, endpoint) for endpoint in dict.fromkeys((*streams, *topics))]
        socket = sub_socket(self._context)
        # First the connections: what is subscribed to before them would arrive in another order, the joining first.
        for address in addresses:
            socket.connect(address)
        for topic in subscriptions(join, streams, topics):
            socket.subscribe(topic)
        subscriber = Subscriber(ZmqInlet(socket), join, merged(streams), merged(topics), Segment.attach)
        self._opened.append(subscriber)
        return subscriber

    def refusals(self) -> list[str]:
        """Who was refused lately at the ``tcp://`` endpoints opened here, in sentences."""
        return [said for door in self._doors for said in door.refusals()]

    def close(self) -> None:
        """Closes whatever was opened here, and delivers what was sent: within a second, or for lossless publishers as
        long as living readers need, at most half a minute."""
        for door in self._doors:
            door.close()
        self._doors.clear()
        for end in reversed(self._opened):
            end.close()
        self._opened.clear()
        if self._auth is not None:
            self._auth.stop()
            self._auth = None
        self._context.destroy(0)
        self._folder.close()

    def __enter__(self) -> ZmqBus:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _lock(self, endpoint: str) -> FileLock:
        """Makes sure that the endpoint is ours alone; without this a second socket would silently take its place."""
        try:
            lock = FileLock(self._folder.path / f"{endpoint}.lock")
        except BlockingIOError:
            raise ConfigError(
                f"endpoint {endpoint!r} of session {self._folder.path} has a living publisher already; each endpoint "
                "has exactly one: stop the other, or give this one another name"
            ) from None
        remove_segment(lock.read())  # a publisher that was killed left it
        lock.write("")
        return lock

    def _ring(self, lock: FileLock, spec: RingSpec, lossless: bool) -> Ring:
        name = new_name()
        lock.write(name)
        return Ring(Segment.create(name, spec), spec, self._clock, expire=not lossless)

    def _xpub(self, address: str, lossless: bool) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.XPUB)
        socket.linger = 0
        socket.sndhwm = HIGH_WATER
        socket.setsockopt(zmq.XPUB_NODROP, int(lossless))
        bind(socket, address)
        return socket

    def _bind_tcp(self, socket: zmq.Socket[bytes], address: str, curve: CurveServer | None) -> None:
        """A socket's listeners keep the options that it had when they were bound: the keys are for this one only."""
        self._doors.append(door := Door(self._context, socket, address, curve))
        if curve is not None:
            if self._auth is None:
                self._auth = authenticator(self._context)
            guard(socket, address, curve, self._auth, door.refuse)
        bind(socket, address)


def _forget(lock: FileLock) -> None:
    """Removes a publisher's shared memory and gives up its endpoint. Idempotent."""
    if lock.held:
        remove_segment(lock.read())
        lock.write("")
        lock.close()


class _OwnInlet(ZmqInlet):
    """An inlet with a context of its own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
        super().__init__(socket)
        self._context = context

    def close(self) -> None:
        super().close()
        self._context.destroy(0)


def observe(
    session_dir: Path,
    streams: Mapping[str, Mapping[str, Delivery]],
    topics: Mapping[str, Mapping[str, Delivery]],
) -> Subscriber:
    """Watches a session of this host from outside of it: headers, and topics that are no streams. Whoever watches takes
    no slot and holds nothing of the session; close it."""
    join = new_join("observer", streams, False)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = sub_socket(context)
    for endpoint in dict.fromkeys((*streams, *topics)):
        socket.connect(endpoint_path(session_dir, endpoint))
    for topic in subscriptions(join, streams, topics)[:-1]:  # the last would join
        socket.subscribe(topic)
    return Subscriber(_OwnInlet(context, socket), join, merged(streams), merged(topics), Segment.attach)
