"""ZeroMQ: the only package that opens sockets.

``ZmqBus`` carries messages between the processes of a session; ``subscribe_json`` is for those outside, ``LinkServer``
and ``LinkClient`` for other hosts. (What the launcher and its nodes say to each other goes through pipes:
``pipeline.life``.) Everything a node needs of a bus is imported from here.

Endpoints are Unix sockets in the session's own folder. ``tcp://`` is for predictions and other hosts: open to this host
as it is, beyond it only with CURVE keys on both sides and a list of those who may listen. Nothing received is ever
unpickled. A process that uses this package must not be forked afterwards: start fresh interpreters.
"""

from pipeline.bus import INLINE_MAX, Buffered, Bus, Delivery, Latest, Lossless
from pipeline.memory_bus import MemoryBus
from pipeline.receiving import Parts, Received, StreamCounters, Subscriber
from pipeline.sending import Publisher, Sent
from pipeline.session import SessionFolder, endpoint_path, remove_leftovers, sessions_root
from pipeline.shm import RingCounters, RingSpec
from pipeline.transport.curve import CurveClient, CurveServer, load_curve_client, load_curve_server, make_curve_keys
from pipeline.transport.link_ends import LinkClient, LinkServer
from pipeline.transport.sockets import check_free
from pipeline.transport.subscription import JsonSubscription, subscribe_json
from pipeline.transport.zmq_bus import ZmqBus, observe

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
    "check_free",
    "endpoint_path",
    "load_curve_client",
    "load_curve_server",
    "make_curve_keys",
    "observe",
    "remove_leftovers",
    "sessions_root",
    "subscribe_json",
]
