"""One suite for both buses, then what only sockets and processes can show."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.clock import ManualClock
from pipeline.errors import ConfigError, WireError
from pipeline.messages import (
    AudioLayout,
    FrameLayout,
    Header,
    ImuLayout,
    Layout,
    Message,
    SignalLayout,
    SweepLayout,
    TextLayout,
    array,
    nbytes_of,
)
from pipeline.sending import as_part
from pipeline.shm import new_name, unlink
from pipeline.transport import (
    Buffered,
    Bus,
    Delivery,
    JsonSubscription,
    Latest,
    LinkClient,
    LinkServer,
    Lossless,
    MemoryBus,
    Publisher,
    Received,
    RingSpec,
    SessionFolder,
    Subscriber,
    ZmqBus,
    endpoint_path,
    load_curve_client,
    load_curve_server,
    make_curve_keys,
    subscribe_json,
)
from pipeline.wire import INLINE, SLOT, Slot, decode_header, encode_header, encode_slot
from tests.bus_peer import LAYOUT, SIZE, message

RING = RingSpec(slots=4, slot_bytes=SIZE, lease_ms=100)
CAMERA = {"camera": {"camera": Lossless()}}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sn") as name:  # short: pytest's own may be too long for a socket
        yield Path(name)
        SessionFolder(Path(name)).close(remove=True)  # killed processes leave memory
        Path(name).mkdir(exist_ok=True)


@contextmanager
def opened(kind: str, clock: ManualClock | None = None) -> Iterator[Bus]:
    with tempfile.TemporaryDirectory(prefix="sn") as name:
        bus: Bus = MemoryBus(clock) if kind == "memory" else ZmqBus(Path(name), "test", clock)
        try:
            yield bus
        finally:
            bus.close()


@pytest.fixture(params=["memory", "zmq"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def bus(kind: str, clock: ManualClock) -> Iterator[Bus]:
    with opened(kind, clock) as made:
        yield made


def small(seq: int, *, stream: str = "note", epoch: int = 0, text: bytes = b"hello") -> Message:
    header = Header(
        stream=stream, seq=seq, epoch=epoch, t_capture_ns=seq, t_end_ns=seq, bound_ns=seq + 1, t_receipt_ns=seq,
        layout=TextLayout(len(text)),
    )  # fmt: skip
    return Message(header, text)


def beat(seq: int, *, stream: str = "camera", epoch: int = 0) -> Header:
    return Header(stream=stream, seq=seq, epoch=epoch, t_capture_ns=0, t_end_ns=0, bound_ns=seq, t_receipt_ns=0)


def gather(subscriber: Subscriber, enough: Callable[[list[Received]], bool]) -> list[Received]:
    """Receives until it is enough, or until nothing has come for so long that the assertion to follow must say why."""
    got: list[Received] = []
    quiet = 0
    while quiet < 200 and not enough(got):
        more = subscriber.receive(100)
        got += more
        quiet = 0 if more else quiet + 1
    return got


def take(subscriber: Subscriber, count: int) -> list[Received]:
    got = gather(subscriber, lambda got: len(got) >= count)
    assert len(got) == count
    return got


def seqs(received: list[Received]) -> list[int]:
    return [r.message.header.seq for r in received]


def pair(bus: Bus, delivery: Delivery | None = None, **options: Any) -> tuple[Publisher, Subscriber]:
    subscriber = bus.subscriber("reader", {"camera": {"camera": delivery or Lossless()}}, **options)
    publisher = bus.publisher("camera", ["camera"], RING)
    assert publisher.wait_for_readers({"reader"}, 20) == set()
    return publisher, subscriber


# ---------------------------------------------------------------------------------------------- both buses


@pytest.mark.parametrize("ring", [None, RING])
def test_messages_arrive_as_they_were_sent(bus: Bus, ring: RingSpec | None) -> None:
    publisher = bus.publisher("camera", ["camera", "note"], ring)
    subscriber = bus.subscriber("reader", {"camera": {"camera": Lossless(), "note": Lossless()}})
    assert publisher.wait_for_readers({"reader"}, 20) == set()
    sent = [message(0), small(0), message(1), small(1, text=b""), message(2, data=bytes(range(256)) * 512)]
    for each in sent:
        assert publisher.publish(each)
    got = take(subscriber, 5)
    for expected, received in zip(sent, got, strict=True):
        assert received.message.header == expected.header
        assert bytes(received.message.data) == bytes(expected.data)
        assert received.message.data.readonly
        assert received.valid()
        assert received.copy() == Message(expected.header, bytes(expected.data))
        received.release()
        received.release()
        assert received.valid()


def test_every_payload_type_of_buffer_is_carried(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    pixels = np.arange(SIZE, dtype=np.uint8).reshape(256, 512)
    for seq, data in enumerate([pixels, pixels.tobytes(), memoryview(pixels.tobytes()), memoryview(pixels)]):
        assert publisher.publish(message(seq, data=data))
        (received,) = take(subscriber, 1)
        with received:
            assert np.array_equal(array(received.message), pixels)


def test_a_payload_may_be_overwritten_once_it_was_published(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    pixels = np.full(SIZE, 1, np.uint8)
    publisher.publish(message(0, data=pixels))
    pixels[:] = 2
    (received,) = take(subscriber, 1)
    assert set(received.copy().data) == {1}


def test_a_loan_is_filled_in_place_and_published_as_it_is(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    loan = publisher.loan(SIZE)
    assert loan is not None
    frame = loan.reshape(256, 512)
    frame[:] = 9
    assert publisher.publish(message(0, data=frame))
    (received,) = take(subscriber, 1)
    with received:
        assert set(bytes(received.message.data)) == {9}
        loan[0] = 1  # what must not be done shows that no copy was made
        assert received.message.data[0] == 1
    assert publisher.loan(100).nbytes == 100  # type: ignore[union-attr]  # small: fresh memory
    assert publisher.loan(SIZE * 10).nbytes == SIZE * 10  # type: ignore[union-attr]  # larger than any slot: the same
    held = [publisher.loan(SIZE) for _ in range(4)]
    assert all(each is not None for each in held)
    assert publisher.loan(SIZE) is None


def test_a_payload_larger_than_a_slot_goes_through_the_socket_and_is_counted(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    layout = FrameLayout("gray8", 512, 512)
    header = Header(
        stream="camera", seq=0, epoch=0, t_capture_ns=0, t_end_ns=0, bound_ns=1, t_receipt_ns=0, layout=layout
    )
    assert publisher.publish(Message(header, bytes(nbytes_of(layout) or 0)))
    (received,) = take(subscriber, 1)
    assert len(received.message.data) == 512 * 512
    assert publisher.counters("camera").oversize == 1


def test_a_reader_that_needs_headers_only_holds_no_slot(bus: Bus) -> None:
    publisher, subscriber = pair(bus, payloads={"camera": False})
    for seq in range(10):
        assert publisher.publish(message(seq))
    got = take(subscriber, 10)
    assert seqs(got) == list(range(10))
    assert all(r.message.data is None and r.message.header.layout == LAYOUT and r.valid() for r in got)


def test_without_a_free_slot_the_message_is_dropped_and_both_sides_know(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    assert [publisher.publish(message(seq)) for seq in range(6)] == [True] * 4 + [False] * 2
    got = take(subscriber, 4)
    assert [set(r.copy().data) for r in got] == [{0}, {1}, {2}, {3}]
    for received in got:
        received.release()
    assert publisher.publish(message(6))
    (last,) = take(subscriber, 1)
    sent, counted = publisher.counters("camera"), subscriber.counters("camera")
    assert (sent.sent, sent.dropped, counted.received, counted.lost, last.message.header.seq) == (7, 2, 5, 2, 6)


def test_a_slot_held_past_its_lease_is_taken_and_the_reader_finds_out(bus: Bus, clock: ManualClock) -> None:
    publisher, subscriber = pair(bus)
    for seq in range(4):
        assert publisher.publish(message(seq))
    slow, *others = take(subscriber, 4)
    with slow:
        assert not publisher.publish(message(4))
        assert slow.valid()
        clock.advance(RING.lease_ms * 1_000_000)
        assert publisher.publish(message(5))
        assert not slow.valid()
        with pytest.raises(WireError, match="camera/0 was overwritten"):
            slow.copy()
    assert not slow.valid()
    assert all(r.valid() for r in others)
    assert (publisher.ring_counters.expired, subscriber.counters("camera").overrun) == (1, 1)


def test_forgotten_messages_come_back(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    for seq in range(20):
        assert publisher.publish(message(seq))
        take(subscriber, 1)


def test_a_reader_that_leaves_frees_its_slots(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    for seq in range(4):
        publisher.publish(message(seq))
    held = take(subscriber, 4)
    assert publisher.loan(SIZE) is None
    subscriber.close()
    subscriber.close()
    for _ in range(200):
        if not publisher.readers():
            break
        publisher.wait_for_readers({"nobody"}, 0.1)
    assert publisher.publish(message(4))
    assert publisher.ring_counters.revoked == 1
    held[0].release()


@pytest.mark.parametrize(("delivery", "kept"), [(Latest(), 1), (Buffered(3), 3), (Lossless(), 50)])
def test_a_policy_keeps_the_newest_and_counts_the_rest(bus: Bus, delivery: Delivery, kept: int) -> None:
    publisher = bus.publisher("note", ["note"])
    subscriber = bus.subscriber("reader", {"note": {"note": delivery}})
    assert publisher.wait_for_readers({"reader"}, 20) == set()
    for seq in range(50):
        publisher.publish(small(seq))
    most, got = 0, []
    while not got or got[-1] != 49:
        batch = seqs(subscriber.receive(20_000))
        assert batch
        assert batch == list(range(batch[0], batch[0] + len(batch)))
        most, got = max(most, len(batch)), got + batch
    counted = subscriber.counters("note")
    assert most <= kept
    assert got == sorted(got)
    assert (counted.received, counted.lost, counted.delivered, counted.dropped) == (50, 0, len(got), 50 - len(got))


def test_a_policy_that_delivers_nothing_is_refused(bus: Bus) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        bus.subscriber("reader", {"camera": {"camera": Buffered(0)}})
    with pytest.raises(ConfigError, match="two endpoints"):
        bus.subscriber("reader", {"a": {"camera": Latest()}, "b": {"camera": Latest()}})


def test_a_beat_shows_a_lost_tail_and_only_the_last_beat_counts(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    publisher.publish(message(0))
    take(subscriber, 1)[0].release()
    publisher.beat(beat(1))
    publisher.beat(beat(3))
    got = gather(subscriber, lambda got: 3 in seqs(got))
    assert all(r.message.header.is_beat and r.message.data is None and r.valid() for r in got)
    assert got[0].copy() == got[0].message
    assert (subscriber.counters("camera").lost, subscriber.counters("camera").received) == (2, 1)
    publisher.publish(message(3))
    assert seqs(take(subscriber, 1)) == [3]
    assert subscriber.counters("camera").lost == 2


def test_a_new_epoch_counts_from_nought_and_closes_the_old_one(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    for seq, epoch in [(0, 5), (2, 5), (1, 9), (3, 5), (1, 9), (2, 9)]:
        publisher.publish(message(seq, epoch=epoch))
        for received in gather(subscriber, lambda got: bool(got) or subscriber.counters("camera").malformed > 0):
            received.release()
    counted = subscriber.counters("camera")
    gather(subscriber, lambda _: counted.received == 4)
    assert (counted.received, counted.lost, counted.malformed, counted.before_join) == (4, 2, 2, 0)


def test_one_name_that_begins_another_is_another_stream(bus: Bus) -> None:
    publisher = bus.publisher("camera", ["camera", "camera2"])
    subscriber = bus.subscriber("reader", {"camera": {"camera": Lossless()}})
    assert publisher.wait_for_readers({"reader"}, 20) == set()
    for seq in range(3):
        publisher.publish(message(seq, stream="camera2"))
        publisher.publish(message(seq))
    assert [(r.message.header.stream, r.message.header.seq) for r in take(subscriber, 3)] == [
        ("camera", seq) for seq in range(3)
    ]


def test_topics_that_are_no_streams(bus: Bus) -> None:
    publisher = bus.publisher("align")
    subscriber = bus.subscriber("reader", {}, topics={"align": {"step": Lossless(), "prediction": Latest()}})
    assert publisher.wait_for_readers({"reader"}, 20) == set()
    assert publisher.publish_parts("step", [b"manifest", np.arange(3, dtype="<f4").data])
    for k in range(5):
        assert publisher.publish_json("prediction", b'{"k": %d}' % k)
    found = []
    for _ in range(200):
        assert subscriber.receive(100) == []
        found += subscriber.parts()
        if found and found[-1].parts == (b'{"k": 4}',):
            break
    assert found[0].topic == "step"
    assert (found[0].parts[0], np.frombuffer(found[0].parts[1], "<f4").tolist()) == (b"manifest", [0, 1, 2])
    assert len(found) - 1 + subscriber.parts_dropped("prediction") == 5
    assert subscriber.parts_dropped("step") == 0


def test_nothing_is_lost_at_the_start_and_a_late_reader_holds_nothing_up(bus: Bus) -> None:
    publisher = bus.publisher("camera", ["camera"], RING)
    first = bus.subscriber("align", CAMERA, payloads=False)
    assert publisher.wait_for_readers({"align", "fusion"}, 0.05) == {"fusion"}
    second = bus.subscriber("fusion", CAMERA)
    assert publisher.wait_for_readers({"align", "fusion"}, 20) == set()
    for seq in range(2):
        assert publisher.publish(message(seq))
    late = bus.subscriber("record", CAMERA)
    assert publisher.wait_for_readers({"record"}, 20) == set()
    assert publisher.readers() == {"align", "fusion", "record"}
    for seq in range(2, 4):
        assert publisher.publish(message(seq))
    for reader, expected in [(first, [0, 1, 2, 3]), (second, [0, 1, 2, 3]), (late, [2, 3])]:
        assert seqs(take(reader, len(expected))) == expected
        assert reader.joined() == {"camera"}
        assert reader.counters("camera").lost == reader.counters("camera").before_join == 4 - len(expected)


def test_waiting_for_readers_ends_when_told(bus: Bus) -> None:
    stop = threading.Event()
    stop.set()
    assert bus.publisher("camera").wait_for_readers({"nobody"}, 60, stop) == {"nobody"}


def test_a_publisher_that_comes_back_is_joined_again(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    publisher.publish(message(0))
    old = take(subscriber, 1)[0]
    publisher.close()
    publisher.close()
    publisher = bus.publisher("camera", ["camera"], RING)
    for _ in range(200):
        subscriber.receive(10)  # a socket says again what it wants only while its owner uses it
        if not publisher.wait_for_readers({"reader"}, 0.05):
            break
    for seq in range(12):
        assert publisher.publish(message(seq, epoch=1))
        take(subscriber, 1)[0].release()
    assert set(old.copy().data) == {0}
    old.release()
    assert subscriber.counters("camera").lost == 0


def test_an_endpoint_has_one_publisher(bus: Bus) -> None:
    first = bus.publisher("camera")
    with pytest.raises(ConfigError, match="publisher already"):
        bus.publisher("camera")
    first.close()
    bus.publisher("camera")


def test_a_lossless_publisher_waits_for_its_readers(bus: Bus) -> None:
    count, stop = 60, threading.Event()
    subscriber = bus.subscriber("reader", CAMERA)
    publisher = bus.publisher("camera", ["camera"], RING, lossless=True, stop=stop)
    assert publisher.wait_for_readers({"reader"}, 20) == set()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.extend(publisher.publish(message(seq)) for seq in range(count)))
    thread.start()
    got = []
    while batch := subscriber.receive(20_000):
        for received in batch:
            with received:
                got.append((received.message.header.seq, set(bytes(received.message.data)), received.valid()))
        if len(got) >= count:
            break
    thread.join(20)
    assert got == [(seq, {seq}, True) for seq in range(count)]
    assert results == [True] * count
    assert subscriber.counters("camera").lost == 0


def test_a_lossless_publisher_that_waits_can_be_stopped(bus: Bus) -> None:
    stop = threading.Event()
    subscriber = bus.subscriber("reader", CAMERA)
    publisher = bus.publisher("camera", ["camera"], RING, lossless=True, stop=stop)
    assert publisher.wait_for_readers({"reader"}, 20) == set()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.extend(publisher.publish(message(seq)) for seq in range(5)))
    thread.start()
    take(subscriber, 4)
    stop.set()
    thread.join(20)
    assert results[:4] == [True] * 4
    assert len(results) == 5


def test_a_lossless_publisher_fills_no_queue_beyond_its_limit(bus: Bus) -> None:
    stop = threading.Event()
    subscriber = bus.subscriber("reader", {"note": {"note": Lossless()}})
    publisher = bus.publisher("note", ["note"], lossless=True, stop=stop)
    assert publisher.wait_for_readers({"reader"}, 20) == set()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.extend(publisher.publish(small(seq)) for seq in range(12_000)))
    thread.start()
    got = gather(subscriber, lambda got: len(got) == 12_000)
    thread.join(20)
    assert seqs(got) == list(range(12_000))
    assert all(results)


def test_what_contradicts_itself_is_not_sent(bus: Bus) -> None:
    publisher = bus.publisher("camera", ["camera"])
    with pytest.raises(WireError, match="payload of 3 bytes"):
        publisher.publish(message(0, data=b"abc"))
    with pytest.raises(ValueError, match="no payload"):
        publisher.publish(Message(message(0).header))
    with pytest.raises(ValueError, match="not a beat"):
        publisher.beat(message(0).header)
    with pytest.raises(KeyError):
        publisher.publish(message(0, stream="lidar"))
    assert publisher.counters("camera").sent == 0


def test_receive_returns_when_nothing_comes(bus: Bus) -> None:
    _, subscriber = pair(bus)
    assert subscriber.receive() == []
    assert subscriber.receive(20) == []
    assert subscriber.fileno() >= 0


ACTIONS = st.lists(st.sampled_from(["send", "send", "send", "gap", "beat", "epoch", "take", "release"]), max_size=40)


@pytest.mark.parametrize("delivery", [Latest(), Buffered(2), Lossless()])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(actions=ACTIONS)
def test_every_message_is_accounted_for(kind: str, delivery: Delivery, actions: list[str]) -> None:
    """Per stream and epoch: sent = received + lost, and received = delivered + dropped by policy."""
    with opened(kind, ManualClock()) as bus:
        publisher, subscriber = pair(bus, delivery)
        seq = epoch = 0
        numbered = delivered = 0
        held: list[Received] = []
        for action in [*actions, "end"]:
            if action == "send":
                publisher.publish(message(seq, epoch=epoch))
                seq, numbered = seq + 1, numbered + 1
            elif action == "gap":
                seq, numbered = seq + 1, numbered + 1
            elif action == "release" and held:
                held.pop(0).release()
            elif action == "take":
                got = [r for r in subscriber.receive() if not r.message.header.is_beat]
                delivered, held = delivered + len(got), held + got
            if action in ("beat", "epoch", "end"):
                publisher.beat(beat(seq, epoch=epoch))
            if action == "epoch":
                seq, epoch = 0, epoch + 1
        counted = subscriber.counters("camera")
        last = gather(subscriber, lambda _: counted.received + counted.lost >= numbered)
        delivered += sum(not r.message.header.is_beat for r in last)
        assert publisher.counters("camera").sent <= numbered
        assert counted.received + counted.lost == numbered
        assert counted.received == counted.delivered + counted.dropped
        assert counted.delivered == delivered
        assert counted.malformed == 0
        for received in held + last:
            if received.message.data is not None:
                assert set(bytes(received.message.data)) == {received.message.header.seq % 256}
                assert received.valid()


# ---------------------------------------------------------------------------------------------- sockets


@contextmanager
def wire(folder: Path) -> Iterator[zmq.Socket[bytes]]:
    """A bare socket in the place of a publisher, to send what no publisher would."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.XPUB)
    socket.linger = 0
    socket.bind(endpoint_path(folder, "camera"))
    try:
        yield socket
    finally:
        socket.close()
        context.term()


GOOD = encode_header(message(0).header)
NOTE = encode_header(small(0, stream="camera").header)
BAD_PARTS: list[list[bytes]] = [
    [],
    [b""],
    [b"\x07" + GOOD, b""],
    [INLINE, b""],
    [INLINE + b"\xc1", bytes(SIZE)],
    [INLINE + GOOD],
    [INLINE + GOOD, b"short"],
    [INLINE + GOOD, bytes(SIZE), b"more"],
    [INLINE + encode_header(small(0, stream="other").header), b"hello"],
    [INLINE + encode_header(beat(0)), b"a payload"],
    [INLINE + encode_header(beat(-1))],
    [SLOT + GOOD, b"no descriptor"],
    [SLOT + GOOD, encode_slot(Slot("/etc/passwd", 0, 1, SIZE))],
    [SLOT + GOOD, encode_slot(Slot(new_name(), 0, 1, 5))],
]


def test_corrupt_messages_are_counted_and_survived(folder: Path) -> None:
    with wire(folder) as socket, ZmqBus(folder, "test") as bus:
        subscriber = bus.subscriber("reader", CAMERA)
        for _ in range(2):
            assert socket.poll(20_000)
            socket.recv()
        for parts in BAD_PARTS:
            socket.send_multipart([b"camera", *parts])
        for _ in range(2):  # a good one, and the same again
            socket.send_multipart([b"camera", INLINE + NOTE, b"hello"])
        socket.send_multipart([b"camera", INLINE + encode_header(beat(1))])
        gather(subscriber, lambda got: any(r.message.header.is_beat for r in got))
        counted = subscriber.counters("camera")
        assert (counted.received, counted.lost, counted.malformed) == (1, 0, len(BAD_PARTS) + 1)


@pytest.mark.parametrize("layout", [
    FrameLayout("bgr8", -1, -1), FrameLayout("bgr8", 0, 4), FrameLayout("gray8", 1, 1 << 40), FrameLayout("jpeg", 0, 0),
    AudioLayout(-1, 1, 1), AudioLayout(1 << 33, 1, 1), AudioLayout(16_000, -1, -1), AudioLayout(16_000, 0, 5),
    ImuLayout(-1), SignalLayout(-1, ("a",)), SweepLayout(1 << 40), TextLayout(-1),
])  # fmt: skip
def test_a_header_of_an_impossible_layout_is_refused(layout: Layout) -> None:
    header = msgspec.structs.replace(small(0).header, layout=layout)
    with pytest.raises(WireError, match="states the layout"):
        decode_header(encode_header(header))


@pytest.mark.parametrize("wrong", [
    {"epoch": 1 << 60},
    {"epoch": 1 << 37, "seq": 0}, {"epoch": 2_000_000_000, "seq": 0}, {"seq": 1 << 40}, {"seq": 9999},
])  # fmt: skip
def test_one_damaged_header_does_not_silence_its_stream(bus: Bus, wrong: dict[str, int]) -> None:
    publisher, subscriber = pair(bus)
    for seq in range(6):
        sent = small(seq, stream="camera")
        publisher.publish(Message(msgspec.structs.replace(sent.header, **wrong), sent.data) if seq == 3 else sent)
    assert seqs(take(subscriber, 5)) == [0, 1, 2, 4, 5]
    counted = subscriber.counters("camera")
    assert (counted.received, counted.lost, counted.malformed) == (5, 1, 1)


def test_a_great_loss_is_believed_when_it_is_said_twice(bus: Bus) -> None:
    publisher, subscriber = pair(bus)
    for seq in (0, 50_000, 50_001, 50_003, 100_000, 200_000, 50_004):
        publisher.publish(small(seq, stream="camera"))
    assert seqs(take(subscriber, 4)) == [0, 50_001, 50_003, 50_004]
    counted = subscriber.counters("camera")
    assert (counted.received, counted.lost, counted.malformed) == (4, 50_001, 3)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(junk=st.lists(st.lists(st.binary(max_size=60) | st.just(SLOT + GOOD) | st.just(INLINE + NOTE), max_size=4)))
def test_no_bytes_stop_a_reader(junk: list[list[bytes]]) -> None:
    with tempfile.TemporaryDirectory(prefix="sn") as name, wire(Path(name)) as socket, ZmqBus(Path(name), "t") as bus:
        subscriber = bus.subscriber("reader", CAMERA, topics={"camera": {"step": Latest()}})
        welcome = b""
        for _ in range(3):
            assert socket.poll(20_000)
            welcome = bytes(socket.recv())[1:]
        for parts in junk:
            for topic in (b"camera", b"step", welcome):
                socket.send_multipart([topic, *parts])
        header = encode_header(small(0, stream="camera", epoch=7).header)
        socket.send_multipart([b"camera", INLINE + header, b"hello"])
        got = []
        for _ in range(200):
            got += subscriber.receive(100)
            subscriber.parts()
            if got and got[-1].message.header.epoch == 7:
                break
        assert got[-1].message.header.epoch == 7


def test_a_message_whose_memory_is_gone_is_delivered_as_overrun(folder: Path) -> None:
    with wire(folder) as socket, ZmqBus(folder, "test") as bus:
        subscriber = bus.subscriber("reader", CAMERA)
        for _ in range(2):
            assert socket.poll(20_000)
            socket.recv()
        socket.send_multipart([b"camera", SLOT + GOOD, encode_slot(Slot(new_name(), 0, 1, SIZE))])
        (received,) = take(subscriber, 1)
        assert received.message.data is None
        assert not received.valid()
        with pytest.raises(WireError, match="overwritten"):
            received.copy()
        received.release()
        assert subscriber.counters("camera").overrun == 1


def test_a_path_too_long_for_a_socket_is_refused(folder: Path) -> None:
    deep = folder / ("d" * 90)
    with ZmqBus(deep, "test") as bus, pytest.raises(ConfigError, match="somewhere shorter"):
        bus.publisher("camera")


@pytest.mark.parametrize("name", ["", "~ready.x", "a/b", "..", "a b", "x" * 65])
def test_a_name_that_is_no_name_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 64 letters"):
        ZmqBus(folder, name)
    with ZmqBus(folder, "test") as bus:
        with pytest.raises(ConfigError, match="1 to 64 letters"):
            bus.publisher(name)
        with pytest.raises(ConfigError, match="1 to 64 letters"):
            bus.publisher("camera", [name])


@pytest.mark.parametrize(
    "endpoint", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://192.168.1.9:5555", "tcp://[::]:5555"]
)
def test_what_reaches_beyond_this_host_needs_keys(folder: Path, endpoint: str) -> None:
    with ZmqBus(folder, "test") as bus, pytest.raises(ConfigError, match="needs CURVE keys"):
        bus.publisher("fusion", tcp=endpoint)
    with pytest.raises(ConfigError, match="needs CURVE keys"):
        subscribe_json(endpoint, "prediction")


@pytest.mark.parametrize("endpoint", ["udp://127.0.0.1:1", "tcp://127.0.0.1", "127.0.0.1:5", "inproc://x"])
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"is no endpoint; allowed are ipc:///path and tcp://HOST:PORT") as wrong:
        subscribe_json(endpoint, "prediction")
    assert ("Did you mean `tcp://127.0.0.1:5`?" in str(wrong.value)) is (endpoint == "127.0.0.1:5")


@pytest.mark.parametrize("port", [0, 65536, 99999])
def test_a_port_that_there_is_not_is_refused_by_who_listens_and_who_calls(folder: Path, port: int) -> None:
    endpoint = f"tcp://127.0.0.1:{port}"
    with ZmqBus(folder, "test") as bus, pytest.raises(ConfigError, match="is no port; ports go from 1 to 65535"):
        bus.publisher("fusion", tcp=endpoint)
    for opens in (lambda: subscribe_json(endpoint, "prediction"), lambda: LinkServer(endpoint),
                  lambda: LinkClient(endpoint)):  # fmt: skip
        with pytest.raises(ConfigError, match="is no port; ports go from 1 to 65535"):
            opens()


def free_port() -> int:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.PUB) as socket:
        return socket.bind_to_random_port("tcp://127.0.0.1")


def next_object(publisher: Publisher, subscription: JsonSubscription, timeout_ms: int = 50, rounds: int = 200) -> Any:
    """Publishes until one comes: a subscriber from outside joins when it joins."""
    for k in range(rounds):
        publisher.publish_json("prediction", b'{"k": %d}' % k)
        found = subscription.receive(timeout_ms)
        if found is not None:
            return found
    return None


def test_predictions_are_plain_json_on_ipc_and_tcp(folder: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with ZmqBus(folder, "fusion") as bus:
        publisher = bus.publisher("fusion", tcp=address)
        with pytest.raises(ConfigError, match="cannot have both a ring"):
            bus.publisher("other", ring=RING, tcp=address)
        with pytest.raises(ConfigError, match="cannot listen"):
            bus.publisher("other", tcp=address)
        for endpoint in (address, endpoint_path(folder, "fusion")):
            with subscribe_json(endpoint, "prediction") as subscription:
                assert "k" in next_object(publisher, subscription)
                publisher.publish_parts("prediction", [b"{", b"two parts"])
                publisher.publish_json("prediction", b"[1]")
                publisher.publish_json("predictions", b'{"k": "of another topic"}')
                publisher.publish_json("prediction", b'{"k": "last"}')
                found = [subscription.receive(20_000)]
                while found[-1] != {"k": "last"}:
                    found.append(subscription.receive(20_000))
                assert subscription.malformed == 2
                assert {"k": "of another topic"} not in found


def test_a_subscription_can_be_iterated_and_stopped(folder: Path) -> None:
    stop = threading.Event()
    with ZmqBus(folder, "fusion") as bus:
        publisher = bus.publisher("fusion")
        with subscribe_json(endpoint_path(folder, "fusion"), "prediction", stop=stop) as subscription:
            assert next_object(publisher, subscription)
            publisher.publish_json("prediction", b'{"k": -1}')
            for found in subscription:
                if found == {"k": -1}:
                    stop.set()
            assert stop.is_set()
            assert list(subscription) == []


def test_keys_let_in_those_on_the_list_and_nobody_else(folder: Path) -> None:
    keys = folder / "keys"
    public = {name: make_curve_keys(keys, name)[0] for name in ("server", "friend", "stranger")}
    with pytest.raises(FileExistsError):
        make_curve_keys(keys, "friend")
    assert (keys / "server.key_secret").stat().st_mode & 0o077 == 0
    server = load_curve_server(keys / "server.key_secret", [public["friend"]])
    address = f"tcp://127.0.0.1:{free_port()}"
    with ZmqBus(folder / "session", "fusion") as bus:
        publisher = bus.publisher("fusion", tcp=address, curve=server)
        friend = load_curve_client(keys / "friend.key_secret", public["server"])
        stranger = load_curve_client(keys / "stranger.key_secret", public["server"])
        with (
            subscribe_json(address, "prediction", friend) as welcome,
            subscribe_json(address, "prediction", stranger) as unwelcome,
            subscribe_json(address, "prediction") as plain,
            subscribe_json(endpoint_path(folder / "session", "fusion"), "prediction") as inside,
        ):
            assert next_object(publisher, welcome)
            assert next_object(publisher, inside)
            for _ in range(5):
                assert next_object(publisher, welcome)
            assert unwelcome.receive(0) is None
            assert plain.receive(0) is None


def test_a_key_file_that_is_none_is_refused(folder: Path) -> None:
    for text, said in (
        ("nothing", "No public key found"), ('public-key = "abc"', "has 40 characters"), ("public-key", "is damaged"),
        (f'public-key = "{"~" * 40}"', "is damaged"), ('public-key = "ä"', "is damaged"),
    ):  # fmt: skip
        (folder / "x.key").write_text(text)
        with pytest.raises(ConfigError, match=f"x.key is no CURVE key file: .*{said}"):
            load_curve_server(folder / "x.key", [])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_curve_server(folder, [])
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):  # as one that it may not look for
        load_curve_server(folder / ("x" * 300), [])
    public, secret = make_curve_keys(folder, "me")
    with pytest.raises(ConfigError, match="public key only"):
        load_curve_client(public, public)
    with pytest.raises(ConfigError, match=r"there is no key file .*absent.key"):
        load_curve_client(secret, folder / "absent.key")
    secret.chmod(0o640)
    with pytest.raises(ConfigError, match=r"others on this machine can read.*chmod 600"):
        load_curve_client(secret, public)


def test_closing_never_waits_for_those_who_do_not_listen(folder: Path) -> None:
    bus = ZmqBus(folder, "test")
    publisher = bus.publisher("camera", ["camera"])
    bus.subscriber("reader", CAMERA)
    assert publisher.wait_for_readers({"reader"}, 20) == set()
    for seq in range(3000):
        publisher.publish(message(seq, data=bytes(SIZE)))
    bus.close()
    bus.close()


# ---------------------------------------------------------------------------------------------- processes


class Peer:
    """A process of tests/bus_peer.py."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bus_peer", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        assert self.hear() == "open"

    def hear(self) -> str:
        return self._pipe(self.process.stdout).readline().strip()

    def say(self, text: str) -> None:
        pipe = self._pipe(self.process.stdin)
        pipe.write(text + "\n")
        pipe.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


@contextmanager
def peer(*arguments: str) -> Iterator[Peer]:
    made = Peer(*arguments)
    try:
        yield made
    finally:
        made.kill()


def wait_until_gone(publisher: Publisher, name: str) -> None:
    for _ in range(200):
        if name not in publisher.readers():
            return
        publisher.wait_for_readers({"nobody"}, 0.1)


def test_a_reader_killed_with_slots_in_its_hands_stops_nothing(folder: Path) -> None:
    with ZmqBus(folder, "camera", ManualClock()) as bus, peer("hold", str(folder)) as holder:
        publisher = bus.publisher("camera", ["camera"], RING)
        assert publisher.wait_for_readers({"hold"}, 60) == set()
        for seq in range(4):
            assert publisher.publish(message(seq))
            assert holder.hear() == str(seq)
        assert not publisher.publish(message(4))
        holder.kill()
        wait_until_gone(publisher, "hold")
        assert publisher.publish(message(5))
        assert publisher.ring_counters.revoked == 1
        assert publisher.counters("camera").dropped == 1


def test_a_reader_survives_a_killed_publisher_whose_memory_the_next_one_removes(folder: Path) -> None:
    with ZmqBus(folder, "test") as bus:
        subscriber = bus.subscriber("reader", CAMERA)
        with peer("publish", str(folder), "reader") as publisher:
            assert publisher.hear() == "[]"
            publisher.say("0 2")
            assert publisher.hear() == "1 1 1"
            held = take(subscriber, 3)
            name = (folder / "camera.lock").read_text()
            assert name
            publisher.kill()
        assert [set(r.copy().data) for r in held] == [{0}, {1}, {2}]
        with peer("publish", str(folder)) as publisher:
            assert (folder / "camera.lock").read_text() != name
            assert not unlink(name)
            assert publisher.hear() == "[]"
            for _ in range(200):
                subscriber.receive(50)
                if subscriber.joined() and len(subscriber._segments) == 1:
                    break
            publisher.say("3 4")
            publisher.hear()
            publisher.say("")
            assert publisher.hear() == "closed"
        for received in held:
            assert received.valid()
            received.release()
    assert (folder / "camera.lock").read_text() == ""


def test_two_processes_read_at_their_own_pace(folder: Path) -> None:
    """The publisher is lossless: both get every frame whole, whatever the other does."""
    with ZmqBus(folder, "camera") as bus, peer("take", str(folder), "a") as a, peer("take", str(folder), "b") as b:
        publisher = bus.publisher("camera", ["camera"], RING, lossless=True)
        assert publisher.wait_for_readers({"a", "b"}, 60) == set()
        numbers = [*range(200), 999]
        for seq in numbers:
            assert publisher.publish(message(seq))
        for reader in (a, b):
            assert [reader.hear() for _ in numbers] == [f"{seq} True" for seq in numbers]
            assert reader.hear() == "closed"


def test_a_slow_process_costs_frames_and_every_one_is_counted(folder: Path) -> None:
    """A live publisher never waits: what finds no slot is dropped, and the reader counts the same number as lost."""
    with ZmqBus(folder, "camera") as bus:
        subscriber = bus.subscriber("slow", CAMERA)
        with peer("publish", str(folder), "slow") as publisher:
            assert publisher.hear() == "[]"
            publisher.say("0 9")
            sent = publisher.hear().split()
            assert sent == ["1"] * 4 + ["0"] * 6
            for received in take(subscriber, 4):
                received.release()
            publisher.say("10 10")
            assert publisher.hear() == "1"
            take(subscriber, 1)
            counted = subscriber.counters("camera")
            assert (counted.received, counted.lost, counted.overrun) == (5, 6, 0)


def test_headers_of_samples_go_inline(folder: Path) -> None:
    layout = ImuLayout(2)
    with ZmqBus(folder, "imu") as bus:
        publisher = bus.publisher("imu", ["imu"])
        subscriber = bus.subscriber("reader", {"imu": {"imu": Lossless()}})
        assert publisher.wait_for_readers({"reader"}, 20) == set()
        header = Header(
            stream="imu", seq=0, epoch=0, t_capture_ns=0, t_end_ns=5, bound_ns=6, t_receipt_ns=7, layout=layout
        )
        publisher.publish(Message(header, bytes(nbytes_of(layout) or 0)))
        (received,) = take(subscriber, 1)
        assert array(received.message).shape == (2,)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 70_000])
def test_a_part_has_the_payloads_bytes_whatever_holds_them(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 255, size, np.uint8)
    for holder in (data, data.tobytes(), bytearray(data.tobytes()), memoryview(data.tobytes())):
        assert bytes(as_part(holder, size)) == data.tobytes()
    if size % 4 == 0:
        rows = data.view([("a", "<u2"), ("b", "u1", 2)])
        assert bytes(as_part(rows, size)) == data.tobytes()
