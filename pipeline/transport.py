"""ZeroMQ: the only file that opens sockets.

``ZmqBus`` carries messages between the processes of a session; ``subscribe_json`` is for those outside. (What the
launcher and its nodes say to each other goes through pipes: ``pipeline.life``.) Everything a node needs of a bus is
imported from here.

Endpoints are Unix sockets in the session's own folder. ``tcp://`` is for predictions: open to this host as it is,
beyond it only with CURVE keys on both sides and a list of those who may listen. Nothing received is ever unpickled.
A process that uses this module must not be forked afterwards: start fresh interpreters.
"""

from __future__ import annotations

import stat
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from pipeline.bus import (
    HIGH_WATER,
    INLINE_MAX,
    Buffered,
    Bus,
    Delivery,
    Latest,
    Lossless,
    merged,
    new_join,
    subscriptions,
)
from pipeline.clock import Clock, SystemClock
from pipeline.errors import ConfigError
from pipeline.memory_bus import MemoryBus
from pipeline.receiving import Parts, Received, StreamCounters, Subscriber
from pipeline.refusals import Refusals, Why, seen_by_caller, seen_by_listener
from pipeline.sending import Publisher, Sent
from pipeline.session import (
    FileLock,
    SessionFolder,
    check_name,
    check_remote,
    endpoint_path,
    remove_leftovers,
    sessions_root,
)
from pipeline.shm import Ring, RingCounters, RingSpec, Segment, new_name, remove_segment

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

__all__ = [
    "INLINE_MAX",
    "Buffered",
    "Bus",
    "CurveClient",
    "CurveServer",
    "Delivery",
    "JsonSubscription",
    "Latest",
    "LinkClient",
    "LinkServer",
    "Lossless",
    "MemoryBus",
    "Parts",
    "Publisher",
    "Received",
    "RingCounters",
    "RingSpec",
    "Sent",
    "SessionFolder",
    "StreamCounters",
    "Subscriber",
    "ZmqBus",
    "endpoint_path",
    "load_curve_client",
    "load_curve_server",
    "make_curve_keys",
    "observe",
    "remove_leftovers",
    "sessions_root",
    "subscribe_json",
]

_LINGER_MS = 1000
_LINK_WAITING = 200  # messages of one host that wait for the network before the newest are dropped and counted
_LINK_LARGEST = 256 << 20  # bytes of one part of a message from another host
# As plain numbers: pyzmq's are enum members, whose bitwise operators cost a microsecond each.
_EVENTS, _READABLE, _AT_ONCE, _MORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.SNDMORE)
_MORE_AT_ONCE = _MORE | _AT_ONCE
_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_MECHANISM, _CRYPTOGRAPHIC = 0x11000002, 0x11000001  # why a handshake failed by the protocol (zmq.h)
_CUT_OFF = 3  # so many handshakes in a row that end without a reason are no accident
_KNOCK_NS = 2_000_000_000  # how often who was refused tries again
_LOSSLESS_LINGER_MS = 30_000  # what a slow reader of a replay has not fetched yet; a dead one does not count


class CurveServer(msgspec.Struct, frozen=True):
    """Keys of an endpoint that others may reach (Z85 text), and the public keys of those who may listen; the file is
    for what is said about them."""

    public: str
    secret: str
    allow: tuple[str, ...]
    secret_file: str = ""


class CurveClient(msgspec.Struct, frozen=True):
    """Keys of a listener, and the public key of the endpoint (Z85 text); the files are for what is said about them."""

    public: str
    secret: str
    server: str
    secret_file: str = ""
    server_file: str = ""


def make_curve_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Writes a new pair of keys, ``<name>.key`` (public) and ``<name>.key_secret`` (mode 0600); returns their paths.
    FileExistsError rather than overwriting one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (folder / f"{name}.key", folder / f"{name}.key_secret"):
        if path.exists():
            raise FileExistsError(path)
    from zmq.auth import create_certificates

    public, secret = create_certificates(folder, name)
    Path(secret).chmod(0o600)
    return Path(public), Path(secret)


def load_curve_server(secret_file: Path, allow: Iterable[Path]) -> CurveServer:
    """The endpoint's own key pair, and the public key files of those who may listen. ConfigError for a bad file."""
    public, secret = _load_pair(secret_file)
    return CurveServer(public, secret, tuple(_load_key(path)[0] for path in allow), str(secret_file))


def load_curve_client(secret_file: Path, server_file: Path) -> CurveClient:
    """A listener's own key pair, and the endpoint's public key file. ConfigError for a bad file."""
    public, secret = _load_pair(secret_file)
    return CurveClient(public, secret, _load_key(server_file)[0], str(secret_file), str(server_file))


def _load_key(path: Path) -> tuple[str, str | None]:
    from zmq.auth import load_certificate
    from zmq.utils.z85 import decode

    todo = "make a pair of keys with `sensorium keys NAME`, or copy the file from the host that has it"
    try:
        if not path.exists():
            raise ConfigError(f"there is no key file {path}; {todo}")
        found = load_certificate(path)
        keys = [key.decode("ascii") for key in found if key is not None]
        if any(len(key) != 40 or len(decode(key)) != 32 for key in keys):
            raise ValueError("a key has 40 characters, and this one has not")
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror or error}; {todo}") from None
    except (ValueError, LookupError) as error:  # what pyzmq says where a key is cut off, or no text
        said = str(error) if type(error) is ValueError else "it is damaged"
        raise ConfigError(f"{path} is no CURVE key file: {said}; {todo}") from None
    return keys[0], keys[1] if len(keys) > 1 else None


def _load_pair(path: Path) -> tuple[str, str]:
    public, secret = _load_key(path)
    if secret is None:
        raise ConfigError(f"{path} holds a public key only; name the file that ends in .key_secret")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(f"{path} is a secret key that others on this machine can read (mode {mode:o}): chmod 600 it")
    return public, secret


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
        self._doors: list[_Door] = []
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
        outlet = _ZmqOutlet(socket, _LOSSLESS_LINGER_MS if lossless else _LINGER_MS, stop)
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
        socket = _sub(self._context)
        # First the connections: what is subscribed to before them would arrive in another order, the joining first.
        for address in addresses:
            socket.connect(address)
        for topic in subscriptions(join, streams, topics):
            socket.subscribe(topic)
        subscriber = Subscriber(_ZmqInlet(socket), join, merged(streams), merged(topics), Segment.attach)
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
        _bind(socket, address)
        return socket

    def _bind_tcp(self, socket: zmq.Socket[bytes], address: str, curve: CurveServer | None) -> None:
        """A socket's listeners keep the options that it had when they were bound: the keys are for this one only."""
        self._doors.append(door := _Door(self._context, socket, address, curve))
        if curve is not None:
            if self._auth is None:
                self._auth = _authenticator(self._context)
            _guard(socket, address, curve, self._auth, door.refuse)
        _bind(socket, address)


def _forget(lock: FileLock) -> None:
    """Removes a publisher's shared memory and gives up its endpoint. Idempotent."""
    if lock.held:
        remove_segment(lock.read())
        lock.write("")
        lock.close()


class _Handshakes:
    """How the handshakes of one socket end, as ZeroMQ's monitor tells it. Connections that stand cost nothing."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes]) -> None:
        self._socket, self._told = socket, context.socket(zmq.PAIR)
        self._told.linger, self._told.rcvhwm = 0, 0  # a monitor that finds no room holds up ZeroMQ's own thread
        where = f"inproc://handshakes-{id(self)}"
        socket.monitor(where, _HANDSHAKES)
        self._told.connect(where)

    def take(self) -> Iterator[tuple[int, int]]:
        """The event of each handshake since the last call, and its value."""
        while not self._told.closed and self._told.getsockopt(_EVENTS) & _READABLE:  # type: ignore[operator]
            yield struct.unpack("=Hi", self._told.recv_multipart()[0])

    def close(self) -> None:
        """Idempotent."""
        if not self._told.closed:
            if not self._socket.closed:
                self._socket.disable_monitor()
            self._told.close(0)


class _Door:
    """Who was refused at a socket that listens."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        address: str,
        curve: CurveServer | None,
    ) -> None:
        self._address, self._secret_file = address, "" if curve is None else curve.secret_file or "the secret key"
        self._handshakes, self._recent = _Handshakes(context, socket), Refusals()
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


class _Caller:
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
        self._handshakes, self._clock = _Handshakes(context, socket), SystemClock()
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


class _Allowed:
    """Who may listen, as pyzmq's authenticator asks it."""

    def __init__(self, keys: frozenset[bytes], refuse: Callable[[str, str], None], auth: Any) -> None:
        self._keys, self._refuse, self._auth = keys, refuse, auth

    def callback(self, domain: str, key: bytes) -> bool:
        allowed = key in self._keys
        if not allowed:
            self._refuse(key.decode("ascii", "replace"), self._auth.peer)
        return allowed


def _authenticator(context: zmq.Context[zmq.Socket[bytes]]) -> ThreadAuthenticator:
    """What asks for keys, started. Imported only here: with asyncio and TLS it would make every node start slower."""
    from zmq.auth.thread import ThreadAuthenticator

    class Authenticator(ThreadAuthenticator):
        """Knows of whom it is just asked."""

        peer = ""

        async def handle_zap_message(self, msg: list[bytes]) -> None:
            self.peer = msg[3].decode("ascii", "replace") if len(msg) > 3 else ""
            await super().handle_zap_message(msg)

    auth = Authenticator(context)
    auth.start()
    return auth


def _guard(
    socket: zmq.Socket[bytes],
    domain: str,
    curve: CurveServer,
    auth: ThreadAuthenticator,
    refuse: Callable[[str, str], None],
) -> None:
    """Lets only those connect to what is bound next who are on the list; the others' keys and addresses go to
    ``refuse``."""
    allowed = _Allowed(frozenset(key.encode() for key in curve.allow), refuse, auth)
    auth.configure_curve_callback(domain, allowed)
    socket.setsockopt_string(zmq.ZAP_DOMAIN, domain)
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = curve.public.encode(), curve.secret.encode()


def _own_keys(socket: zmq.Socket[bytes], curve: CurveClient) -> None:
    socket.curve_publickey, socket.curve_secretkey = curve.public.encode(), curve.secret.encode()
    socket.curve_serverkey = curve.server.encode()


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        why = zmq.strerror(error.errno or 0)
        raise ConfigError(f"cannot listen at {address}: {why}; is another program using it?") from None


def check_free(address: str) -> None:
    """Raises ConfigError unless somebody could listen at ``address`` now."""
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        _bind(socket, address)


def _sub(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.SUB)
    socket.linger = 0
    socket.rcvhwm = HIGH_WATER
    socket.reconnect_ivl, socket.reconnect_ivl_max = 20, 500
    return socket


class _ZmqOutlet:
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
        while self._socket.getsockopt(_EVENTS) & _READABLE:  # type: ignore[operator]
            events.append(bytes(self._socket.recv(_AT_ONCE)))
        return events

    def wait(self, timeout_ms: int) -> None:
        self._socket.poll(timeout_ms)

    def close(self) -> None:
        stopped = self._stop is not None and self._stop.is_set()
        self._socket.close(min(self._linger_ms, _LINGER_MS) if stopped else self._linger_ms)


class _ZmqInlet:
    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._timeout_ms = -1

    def recv(self, timeout_ms: int = 0) -> Sequence[Any] | None:
        """Waits inside ZeroMQ rather than in a poll before it, and takes frames, which know whether more will come:
        what runs between a wake-up and the reader runs with cold caches, and each call saved is some 20 us."""
        if timeout_ms and timeout_ms != self._timeout_ms:
            self._socket.rcvtimeo = self._timeout_ms = timeout_ms
        try:
            frame = self._socket.recv(0 if timeout_ms else _AT_ONCE, False)
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


class LinkServer:
    """The hub's end of a link to other hosts: whoever connects is told apart by a name of ZeroMQ's own. Used by one
    thread."""

    def __init__(self, address: str, curve: CurveServer | None = None, insecure: bool = False) -> None:
        """ConfigError if the address cannot be bound, or lies beyond this host without keys (unless ``insecure``)."""
        check_remote(address, keys=curve is not None or insecure)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._auth: ThreadAuthenticator | None = None
        self._socket = self._context.socket(zmq.ROUTER)
        self._door = _Door(self._context, self._socket, address, curve)
        try:
            self._socket.linger, self._socket.maxmsgsize = _LINGER_MS, _LINK_LARGEST
            self._socket.rcvhwm, self._socket.sndhwm = HIGH_WATER, _LINK_WAITING
            if curve is not None:
                self._auth = _authenticator(self._context)
                _guard(self._socket, address, curve, self._auth, self._door.refuse)
            _bind(self._socket, address)
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
            self._socket.send_multipart([peer, *parts], _AT_ONCE)
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
        self._socket.linger, self._socket.maxmsgsize = _LINGER_MS // 2, _LINK_LARGEST
        self._socket.sndhwm = self._socket.rcvhwm = _LINK_WAITING
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 50, 500
        self._socket.immediate = True  # what cannot leave is dropped and counted, not kept for a hub that is away
        # A path that died without a word is given up, so that another connection can be made.
        self._socket.heartbeat_ivl, self._socket.heartbeat_timeout = 1000, 3000
        if curve is not None:
            _own_keys(self._socket, curve)
        self._caller = _Caller(self._context, self._socket, address, curve)
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
            self._socket.send_multipart(parts, _AT_ONCE)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Idempotent."""
        self._caller.close()
        self._socket.close()
        self._context.term()


class _OwnInlet(_ZmqInlet):
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
    socket = _sub(context)
    for endpoint in dict.fromkeys((*streams, *topics)):
        socket.connect(endpoint_path(session_dir, endpoint))
    for topic in subscriptions(join, streams, topics)[:-1]:  # the last would join
        socket.subscribe(topic)
    return Subscriber(_OwnInlet(context, socket), join, merged(streams), merged(topics), Segment.attach)


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
        socket = _sub(self._context)
        if curve is not None:
            _own_keys(socket, curve)
        self._caller = _Caller(self._context, socket, endpoint, curve)
        socket.connect(endpoint)
        socket.subscribe(self._topic)
        self._inlet = _ZmqInlet(socket)
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
