"""The two ends of a link between hosts: parts of messages, told apart by who sent them. What they say is
``pipeline.link``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import zmq

from pipeline.bus import HIGH_WATER
from pipeline.session import check_remote
from pipeline.transport.curve import CurveClient, CurveServer, authenticator, guard, own_keys
from pipeline.transport.handshakes import Caller, Door
from pipeline.transport.sockets import AT_ONCE, LINGER_MS, bind

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

_LINK_WAITING = 200  # messages of one host that wait for the network before the newest are dropped and counted
_LINK_LARGEST = 256 << 20  # bytes of one part of a message from another host


class LinkServer:
    """The hub's end of a link to other hosts: whoever connects is told apart by a name of ZeroMQ's own. Used by one
    thread."""

    def __init__(self, address: str, curve: CurveServer | None = None, insecure: bool = False) -> None:
        """ConfigError if the address cannot be bound, or lies beyond this host without keys (unless ``insecure``)."""
        check_remote(address, keys=curve is not None or insecure)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._auth: ThreadAuthenticator | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        self._door = Door(self._context, self._socket, address, curve)
        try:
            self._socket.linger, self._socket.maxmsgsize = LINGER_MS, _LINK_LARGEST
            self._socket.rcvhwm, self._socket.sndhwm = HIGH_WATER, _LINK_WAITING
            if curve is not None:
                self._auth = authenticator(self._context)
                guard(self._socket, address, curve, self._auth, self._door.refuse)
            bind(self._socket, address)
        except BaseException:
            self.close()
            raise

    def receive(self, timeout_ms: int) -> tuple[bytes, list[bytes]] | None:
        """Who sent it, and the parts of the next message; None if none came in time."""
        if not self._socket.poll(timeout_ms):
            return None
        peer, *parts = self._socket.recv_multipart()
        return peer, parts

    def send(self, peer: bytes, parts: Sequence[Any]) -> bool:
        """Sends to one of those who have been heard; False if there is no room. To who has gone it goes nowhere."""
        try:
            self._socket.send_multipart([peer, *parts], AT_ONCE)
        except zmq.Again:
            return False
        return True

    def refusals(self) -> list[str]:
        """Who was refused lately, in sentences."""
        return self._door.refusals()

    def close(self) -> None:
        """Delivers what was sent, within a second. Idempotent."""
        self._door.close()
        self._socket.close()
        if self._auth is not None:
            self._auth.stop()
            self._auth = None
        self._context.term()


class LinkClient:
    """Another host's end of a link to the hub: connects, and connects again. Used by one thread."""

    def __init__(self, address: str, curve: CurveClient | None = None, insecure: bool = False) -> None:
        """ConfigError for what is no address, and for one beyond this host without keys (unless ``insecure``)."""
        check_remote(address, keys=curve is not None or insecure)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger, self._socket.maxmsgsize = LINGER_MS // 2, _LINK_LARGEST
        self._socket.sndhwm = self._socket.rcvhwm = _LINK_WAITING
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 50, 500
        self._socket.immediate = True  # what cannot leave is dropped and counted, not kept for a hub that is away
        # A path that died without a word is given up, so that another connection can be made.
        self._socket.heartbeat_ivl, self._socket.heartbeat_timeout = 1000, 3000
        if curve is not None:
            own_keys(self._socket, curve)
        self._caller = Caller(self._context, self._socket, address, curve)
        self._socket.connect(address)

    @property
    def refusal(self) -> str:
        """Why the hub lets nobody in from here, in a sentence; nothing while it does."""
        return self._caller.refusal

    def receive(self, timeout_ms: int) -> list[bytes] | None:
        """The parts of the next message; None if none came in time."""
        if self._socket.poll(timeout_ms):
            return self._socket.recv_multipart()
        self._caller.turn()
        return None

    def send(self, parts: Sequence[Any]) -> bool:
        """Sends a message; False if it cannot leave now. Never waits."""
        try:
            self._socket.send_multipart(parts, AT_ONCE)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Idempotent."""
        self._caller.close()
        self._socket.close()
        self._context.term()
