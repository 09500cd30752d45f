"""LiDARs: Velodyne and Ouster packets over UDP, an RPLidar through a pseudo-terminal."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import select
import socket
import struct
import threading
import tty
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import velodyne_decoder

from nodes.lidar import Lidar
from pipeline.checks import CheckContext, check_source
from pipeline.clock import ManualClock, SystemClock
from pipeline.datagrams import AT_ONCE, Datagrams, _OneByOne
from pipeline.errors import ConfigError, SensorError, WireError
from pipeline.messages import POINT_DTYPE
from pipeline.protocols import rplidar
from pipeline.protocols.ouster import Ouster
from pipeline.protocols.sweeps import Sweep
from pipeline.protocols.velodyne import Velodyne
from pipeline.source import Reading
from pipeline.strict import Document

NS, MS = 1_000_000_000, 1_000_000
PACKET_NS = 1_327_104
"""A VLP-16 sends a packet of 12 blocks in this time: 754 packets a second."""
STEP = 40
"""Hundredths of a degree a block: 10.05 turns a second."""
ELEVATION = np.radians([-15, 1, -13, 3, -11, 5, -9, 7, -7, 9, -5, 11, -3, 13, -1, 15])


def settings(**given: Any) -> Any:
    return Document("{}", "settings").decode(Lidar.Settings, value=given)


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- a VLP-16 in a hall: a wall 5 m ahead, and everything else 10 m away -----------------------------------------------


def vlp16(index: int, time_us: int, factory: int = 0x22) -> bytes:
    """Packet ``index``. The beam turns while a block is fired, so every shot has its own azimuth."""
    blocks = []
    for block in range(12):
        azimuth = (index * 12 + block) * STEP % 36000
        shots = np.arange(32)
        when = np.where(shots < 16, 0, 55.296) + shots % 16 * 2.304
        angle = np.radians((azimuth + STEP * when / 110.592) / 100)
        elevation = ELEVATION[shots % 16]
        ahead = np.cos(angle) * np.cos(elevation)
        distance = np.where(ahead > 0.5, 5 / np.maximum(ahead, 0.5), 10.0)
        counts = np.round(distance / 0.002).astype("<u2")
        body = np.zeros(32, np.dtype([("distance", "<u2"), ("light", "u1")]))
        body["distance"], body["light"] = counts, shots
        blocks.append(struct.pack("<HH", 0xEEFF, azimuth) + body.tobytes())
    return b"".join(blocks) + struct.pack("<IBB", time_us, 0x37, factory)


def check_hall(points: np.ndarray[Any, Any], rate: int = 1) -> None:
    xyz = np.stack([points[axis] for axis in "xyz"], axis=1).astype(float)
    radius = np.linalg.norm(xyz, axis=1)
    ahead = xyz[:, 0] / radius
    wall, rest = ahead > 0.52, ahead < 0.48
    assert wall.sum() > 4000
    assert rest.sum() > 10000
    assert np.abs(xyz[wall, 0] - 5).max() < 0.02
    assert np.abs(radius[rest] - 10).max() < 0.005
    assert set(np.round(np.degrees(np.arcsin(xyz[:, 2] / radius))).astype(int)) == set(range(-15, 16, 2))
    assert set(points["intensity"].astype(int)) == set(range(32))
    left = rest & (xyz[:, 1] > 9)
    assert left.any()
    assert points["offset_ns"].max() == 0
    assert points["offset_ns"].min() == pytest.approx(-99.5 * MS / rate, abs=2 * MS)


def test_sweeps_have_the_geometry_and_the_times_of_the_packets() -> None:
    lidar, random = Velodyne(), np.random.default_rng(7)
    ends, sweeps = [], []
    for i in range(3020):
        taken = NS + i * PACKET_NS  # the sensor's clock is the session's, its packets come late by 0.1 ms and more
        receipt = taken + PACKET_NS + 100_000 + round(random.exponential(200_000))
        sweep = lidar.feed(vlp16(i, taken // 1000), receipt)
        if sweep is not None:
            sweeps.append(sweep)
            ends.append(sweep.t_device_ns)
    assert lidar.partial == 1
    assert lidar.malformed == 0
    assert len(sweeps) == 3020 * 12 * STEP // 36000 - 1
    for sweep in sweeps[:3]:
        check_hall(sweep.points)
    assert not any(sweep.new_epoch for sweep in sweeps)
    error = np.array([sweep.t_capture_ns - end - 100_000 for sweep, end in zip(sweeps, ends, strict=True)])
    assert np.abs(error).max() < 100_000
    assert all(abs(e) <= s.uncertainty_ns + 2000 for e, s in zip(error[10:], sweeps[10:], strict=True))
    captures = [sweep.t_capture_ns for sweep in sweeps]
    assert captures == sorted(set(captures))


def test_the_hour_turns_without_a_jump() -> None:
    lidar, sweeps = Velodyne(), []
    for i in range(1000):
        taken = 3_600 * NS - 500 * PACKET_NS + i * PACKET_NS
        sweep = lidar.feed(vlp16(i, taken // 1000 % 3_600_000_000), taken + PACKET_NS)
        sweeps += [] if sweep is None else [sweep]
    assert not any(sweep.new_epoch for sweep in sweeps)
    steps = np.diff([sweep.t_capture_ns for sweep in sweeps])
    assert np.abs(steps - steps[0]).max() < 200_000


def test_a_packet_that_the_hours_first_overtook_makes_no_hour() -> None:
    lidar, sweeps = Velodyne(), []
    order = [*range(499), 500, 499, *range(501, 1000)]
    for place, i in enumerate(order):
        taken = 3_600 * NS - 500 * PACKET_NS + i * PACKET_NS
        receipt = 3_600 * NS - 499 * PACKET_NS + place * PACKET_NS
        sweep = lidar.feed(vlp16(i, taken // 1000 % 3_600_000_000), receipt)
        sweeps += [] if sweep is None else [sweep]
    assert not any(sweep.new_epoch for sweep in sweeps)
    steps = np.diff([sweep.t_device_ns for sweep in sweeps])  # the beam that went back has cut one short
    assert 0 < steps.min() <= steps.max() < 110 * MS


def test_a_sensor_that_restarts_opens_an_epoch_and_no_sweep_holds_both_lives() -> None:
    lidar, sweeps = Velodyne(), []
    for i in range(1500):
        receipt = 10 * NS + i * PACKET_NS
        taken = receipt + 100 * NS if i < 700 else (i - 700) * PACKET_NS
        sweep = lidar.feed(vlp16(i, taken // 1000), receipt)
        sweeps += [] if sweep is None else [sweep]
    assert [sweep.new_epoch for sweep in sweeps].count(True) == 1
    assert lidar.partial == 2
    for sweep in sweeps:
        assert sweep.points["offset_ns"].min() > -101 * MS


def test_what_is_no_packet_is_counted_and_an_unknown_sensor_is_refused() -> None:
    lidar = Velodyne()
    assert lidar.feed(b"x" * 1206, 0) is None
    assert lidar.feed(vlp16(0, 0)[:1000], 0) is None
    assert lidar.malformed == 2

    def turn() -> None:
        for i in range(200):
            lidar.feed(vlp16(i, i * 1327, factory=0), i * PACKET_NS)

    with pytest.raises(WireError, match="Set `model`"):
        turn()


@pytest.mark.parametrize("factory", [0x21, 0x22, 0x24, 0x28])
@pytest.mark.parametrize("mode", [0x37, 0x39])
def test_every_point_is_the_decoders_own_to_the_bit(factory: int, mode: int) -> None:
    decoder = velodyne_decoder.StreamDecoder(velodyne_decoder.Config())
    lidar, expected, got, receipts = Velodyne(), [], [], []
    for first in range(0, 1000, 7):
        numbers = range(first, min(first + 7, 1000))
        packets = [vlp16(i, i * PACKET_NS // 1000, factory) for i in numbers]
        packets = [packet[:1204] + bytes([mode]) + packet[1205:] for packet in packets]
        for i, packet in zip(numbers, packets, strict=True):
            found = decoder.decode(i * PACKET_NS / NS, packet)
            expected += [] if found is None else [found[1]]
        receipts.append((first + 1) * PACKET_NS)
        got += lidar.take(packets, lambda number: receipts[-1] if number == 0 else None)
    assert len(got) == len(expected) - 1 > 8  # the first is partial
    for sweep, cloud in zip(got, expected[1:], strict=True):
        end = float(cloud[:, 4].max())
        assert sweep.points[["x", "y", "z", "intensity"]].tolist() == list(map(tuple, cloud[:, :4].tolist()))
        offsets = [round((seconds - end) * 1e9) for seconds in cloud[:, 4].tolist()]
        assert sweep.points["offset_ns"].tolist() == offsets


class Decoding:
    """A decoder that has a sweep after each packet but the last, which it refuses; a point is a ``record``."""

    def __init__(self, record: np.dtype[Any], packets: int) -> None:
        self._record, self._left = record, packets

    def decode(self, time: float, packet: list[int], structured: bool) -> tuple[Any, np.ndarray[Any, Any]]:
        self._left -= 1
        if self._left <= 0:
            raise RuntimeError("no such model")
        return SimpleNamespace(host=time, device=time), np.zeros(3, self._record)


RECORD = np.dtype([(name, "<f4") for name in ("x", "y", "z", "intensity", "time")] + [("ring", "<u2")])


def decoding(record: np.dtype[Any], packets: int) -> Velodyne:
    lidar = Velodyne()
    lidar._library = SimpleNamespace(StreamDecoder=lambda _: Decoding(record, packets))
    lidar._start()
    return lidar


def test_sweeps_that_were_whole_before_a_packet_that_cannot_be_decoded_are_handed_over() -> None:
    lidar = decoding(RECORD, 5)
    assert len(lidar.take([vlp16(i, i * 1327) for i in range(8)], lambda _: NS)) == 3  # one of four is partial
    with pytest.raises(WireError, match="no such model"):
        lidar.take([vlp16(9, 9 * 1327)], lambda _: NS)
    with pytest.raises(WireError, match="no such model"):  # and what has nothing before it at once
        lidar.take([vlp16(9, 9 * 1327)], lambda _: NS)


@pytest.mark.parametrize("record", [
    np.dtype([("y", "<f4"), ("x", "<f4"), *RECORD.descr[2:]]), np.dtype([*RECORD.descr[:4], ("time", "<f8")]),
    np.dtype([("pad", "<f4"), *RECORD.descr]), np.dtype([*RECORD.descr[:4], ("ring", "<u2")]), np.dtype("<f4"),
])  # fmt: skip
def test_a_decoder_that_lays_points_out_otherwise_is_refused(record: np.dtype[Any]) -> None:
    installed = importlib.metadata.version("velodyne-decoder")
    with pytest.raises(SensorError, match=rf"velodyne-decoder {installed}, .* pip install velodyne-decoder==\d"):
        decoding(record, 5).feed(vlp16(0, 0), NS)


# -- over UDP --------------------------------------------------------------------------------------------------------

PACKETS = 1508
"""Two seconds' worth, twenty turns and a bit."""


def send(port: int, count: int, rate: float, clock: SystemClock, stop: threading.Event | None = None) -> None:
    """``count`` packets at ``rate`` times the sensor's rate, stamped with the session clock; all that are due at once
    after a pause of this machine, as a switch would."""
    start, sent = clock.now_ns(), 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", port))
        while sent < count and not (stop is not None and stop.is_set()):
            taken = start + round(sent * PACKET_NS / rate)
            packet = vlp16(sent, taken // 1000 % 3_600_000_000)
            clock.wait_until(taken + PACKET_NS)
            try:
                sender.send(packet)
            except ConnectionRefusedError:  # nobody listens at this moment
                continue
            sent += 1


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1, 2])
def test_packets_sent_are_packets_received_and_packets_that_the_kernel_dropped(rate: int) -> None:
    port, clock = free_port(), SystemClock()
    context = CheckContext(clock=clock)
    source = Lidar(settings(sensor="velodyne", udp=port, bind="127.0.0.1"), context)
    source.open()
    sender = threading.Thread(target=send, args=(port, PACKETS, rate, clock))
    sender.start()
    found: list[Reading] = []
    try:
        for _ in range(20_000):
            found += source.read()
            if source.protocol.packets + context.counted.get("kernel", 0) >= PACKETS:
                break
        assert source.protocol.packets + context.counted.get("kernel", 0) == PACKETS
    finally:
        sender.join()
        source.close()
    assert context.counted == {"partial": 1}  # the queue holds seconds: nothing is dropped, nothing malformed
    assert len(found) == PACKETS * 12 * STEP // 36000 - 1
    for reading in found[:2]:
        check_hall(reading.data.view(POINT_DTYPE), rate)
    for reading in found:
        # A machine that is busy sends late, and the sensor's own stamp is earlier than anything that can be known.
        assert reading.t_device_ns is not None
        assert -reading.uncertainty_ns - MS <= reading.t_capture_ns - reading.t_device_ns


def test_what_the_kernel_drops_is_counted_to_the_packet() -> None:
    port, clock = free_port(), SystemClock()
    context = CheckContext(clock=clock)
    source = Lidar(settings(sensor="velodyne", udp=port, bind="127.0.0.1"), context)
    source.open()
    sent = 0
    packets = [vlp16(i, i * 1327) for i in range(200)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", port))
        for i in range(12_000):
            sender.send(packets[i % 200])
        while source.read() or select.select([source._device._socket], [], [], 0)[0]:  # type: ignore[union-attr]
            pass
        sender.send(packets[0])  # the kernel tells with the next packet that it takes
        sent = 12_001
    before = source.protocol.packets
    while source.protocol.packets == before:
        source.read()
    source.close()
    assert context.counted["kernel"] > 0
    assert source.protocol is None
    assert before + 1 + context.counted["kernel"] == sent


def test_a_velodyne_keeps_the_contract_of_a_source() -> None:
    port, stop = free_port(), threading.Event()
    sender = threading.Thread(target=send, args=(port, 100_000, 1, SystemClock(), stop))
    sender.start()
    try:
        check_source(Lidar, {"sensor": "velodyne", "udp": port, "bind": "127.0.0.1"}, readings=2)
    finally:
        stop.set()
        sender.join()


@pytest.fixture(params=["many at once", "one by one"])
def listening(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Datagrams]:
    """A socket at a free port, also as where the C library lacks ``recvmmsg``."""
    if request.param == "one by one":
        monkeypatch.setattr("pipeline.datagrams._many_at_once", lambda: None)
    made = Datagrams("127.0.0.1", free_port(), SystemClock(), largest=2048)
    assert isinstance(made._taking, _OneByOne) == (request.param == "one by one")
    with contextlib.closing(made):
        yield made


def take(listening: Datagrams, count: int) -> list[tuple[bytes, int]]:
    """What ``listening`` hears of the next ``count`` datagrams, and when each was received."""
    found: list[tuple[bytes, int]] = []
    while count > 0:
        listening.wait(5)
        taken = listening.receive()
        assert 0 < taken <= AT_ONCE
        count -= taken
        found += [(packet, listening.received_ns(i)) for i, packet in enumerate(listening.packets)]
    return found


def test_a_packet_was_received_when_the_kernel_had_it_however_long_it_waited(listening: Datagrams) -> None:
    clock, sent = listening._clock, []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", listening.port))
        for _ in range(100):  # the kernel begins to stamp a while after the first socket asks for it
            sender.send(b"")
            before = clock.now_ns()
            clock.wait_until(before + 10 * MS)
            if take(listening, 1)[0][1] <= before + MS:
                break
        for i in range(3):
            before = clock.now_ns()
            sender.send(bytes([i] * (i + 1)))
            sent.append((before, clock.now_ns()))
            clock.wait_until(clock.now_ns() + 10 * MS)
    for i, (packet, received_ns) in enumerate(take(listening, 3)):
        assert packet == bytes([i] * (i + 1))
        assert sent[i][0] - 5 * MS <= received_ns <= sent[i][1] + MS
    assert listening.receive() == 0
    assert listening.packets == []


def test_datagrams_come_whole_and_in_order_however_many_wait(listening: Datagrams) -> None:
    random = np.random.default_rng(3)
    sent = [random.bytes(int(size)) for size in random.integers(0, 2500, 3 * AT_ONCE + 5)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", listening.port))
        for data in sent:
            sender.send(data)
    assert [packet for packet, _ in take(listening, len(sent))] == [data[:2048] for data in sent]
    assert (listening.dropped, listening.foreign) == (0, 0)


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(("address", "other"), [("127.0.0.1", "127.0.0.2"), ("::1", None)])
def test_only_one_sender_is_heard(many: bool, address: str, other: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not many:
        monkeypatch.setattr("pipeline.datagrams._many_at_once", lambda: None)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        senders = []
        for own in filter(None, (address, other)):
            senders.append(stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)))
            try:
                senders[-1].bind((own, 0))
            except OSError as error:
                pytest.skip(f"this host has no address {own}: {error}")
        heard, deaf = (Datagrams(address, 0, SystemClock(), only) for only in (address, "no address"))
        for listening in (heard, deaf):
            stack.callback(listening.close)
            for i in range(6):
                senders[i % len(senders)].sendto(b"%d" % i, (address, listening.port))
        before = heard._clock.now_ns()
        assert take(deaf, 6) == []
        packets, times = zip(*take(heard, 6), strict=True)
        assert list(packets) == [b"%d" % i for i in range(0, 6, len(senders))]
        assert (heard.foreign, deaf.foreign) == (6 - len(packets), 6)
        assert list(times) == sorted(times)
        assert before - 5 * MS <= times[0] <= times[-1] <= heard._clock.now_ns()


def test_a_closed_socket_hears_nothing_of_another_that_has_its_number(listening: Datagrams) -> None:
    number = listening.fileno()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        listening.close()
        other.bind(("127.0.0.1", 0))
        other.sendto(b"not for you", other.getsockname())
        os.dup2(other.fileno(), number)
        try:
            with pytest.raises(SensorError, match="the UDP socket failed"):
                listening.receive()
            with pytest.raises(SensorError, match="the UDP socket failed"):
                listening.wait(0)
        finally:
            os.close(number)


def test_where_there_is_no_linux_datagrams_come_without_its_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(socket.socket):
        def setsockopt(self, level: int, option: int, value: Any) -> None:  # type: ignore[override]
            if option != socket.SO_RCVBUF:
                raise OSError(errno.ENOPROTOOPT, "Protocol not available")
            raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr("pipeline.datagrams.socket.socket", Elsewhere)
    monkeypatch.setattr("sys.platform", "darwin")
    clock = ManualClock()
    with contextlib.closing(Datagrams("127.0.0.1", 0, clock, "127.0.0.1")) as listening:
        assert listening.room > 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"a", ("127.0.0.1", listening.port))
        clock.advance(MS)
        listening.wait(5)
        assert listening.receive() == 1
        assert (listening.packets, listening.received_ns(0), listening.dropped) == ([b"a"], clock.now_ns(), 0)


def test_what_the_kernel_drops_is_counted_again_and_again(listening: Datagrams) -> None:
    sent = came = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", listening.port))
        for _ in range(2):
            known = listening.dropped
            for _ in range(12_000):
                sender.send(bytes(1206))
            while taken := listening.receive():
                came += taken
            sender.send(b"")  # the kernel tells with the next packet that it takes
            sent += 12_001
            while came + listening.dropped < sent:
                listening.wait(5)
                taken = listening.receive()
                assert taken
                came += taken
            assert came + listening.dropped == sent
            assert listening.dropped > known


def test_silence_a_taken_port_and_other_senders() -> None:
    port, clock = free_port(), ManualClock()
    context = CheckContext(clock=clock)
    source = Lidar(settings(sensor="velodyne", udp=port, bind="127.0.0.1", sensor_ip="127.0.0.9"), context)
    source.open()
    with pytest.raises(SensorError, match="cannot be listened to"):
        Lidar(settings(sensor="velodyne", udp=port, bind="127.0.0.1"), CheckContext()).open()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(vlp16(0, 0), ("127.0.0.1", port))
    assert source.read() == []
    assert context.counted == {"foreign": 1}
    clock.advance(2001 * MS)
    with pytest.raises(SensorError, match=r"no packet came from 127\.0\.0\.9"):
        source.read()
    source.close()


@pytest.mark.parametrize("room", [425_984, 16 << 20])
@pytest.mark.parametrize(("size", "rate"), [(1206, 754), (1206, 12_500), (24_832, 1280)])
def test_packets_gather_no_longer_than_the_kernel_has_room_for_them(room: int, size: int, rate: int) -> None:
    """Also where net.core.rmem_max is what it is by default, and by what a packet in pieces costs."""
    source = Lidar(settings(sensor="velodyne", udp=free_port(), bind="127.0.0.1"), CheckContext(clock=ManualClock()))
    source.open()
    device: Any = source._device
    pause, device._socket.room = 25 * MS, room
    for _ in range(5):
        taken = min(max(rate * pause // NS, 1), AT_ONCE - 1)
        elapsed = taken * NS // rate
        device._socket.packets = [bytes(size)] * taken
        pause = min(device._room_ns(taken, elapsed), 100 * MS)
        pieces = -(-size // 1472)
        assert pause * rate / NS * pieces * 2304 < 0.4 * room
        assert pause > 0
    assert device._room_ns(AT_ONCE, 20 * MS) == 0  # more may wait
    source.close()


class Turning:
    """A socket and a protocol in one, on a clock that is set by hand: a sweep is whole each ``turn_ms``, by the packet
    after it, and each visit is noted."""

    room, dropped, foreign, malformed, partial = 16 << 20, 0, 0, 0, 0

    def __init__(self, clock: ManualClock, turn_ms: float) -> None:
        self._clock, self.turn_ns = clock, round(turn_ms * MS)
        self._sent = self.swept = 0
        self.visits: list[int] = []
        self.delays: list[int] = []
        self.packets: list[bytes] = []

    def receive(self) -> int:
        now = self._clock.now_ns()
        self.visits.append(now)
        came, self._sent = now // PACKET_NS - self._sent, now // PACKET_NS
        self.packets = [bytes(1206)] * came
        return came

    def wait(self, seconds: float) -> None:
        self._clock.advance(round(seconds * NS))

    def take(self, packets: list[bytes], received_ns: Any) -> list[Sweep]:
        found = []
        while (whole := ((self.swept + 1) * self.turn_ns // PACKET_NS + 1) * PACKET_NS) <= self._clock.now_ns():
            self.swept += 1
            self.delays.append(self._clock.now_ns() - whole)
            found.append(Sweep(np.zeros(1, POINT_DTYPE), whole, None, whole, 0, False))
        return found


@pytest.mark.parametrize("turn_ms", [50.0, 71.3, 90.0, 99.5, 100.0, 190.0])
def test_packets_are_taken_when_a_sweep_should_be_whole(turn_ms: float) -> None:
    """Once a sweep, or once each 100 ms of it, and each sweep is there a moment after it was whole."""
    clock = ManualClock()
    source = Lidar(settings(sensor="velodyne", udp=free_port(), bind="127.0.0.1"), CheckContext(clock=clock))
    source.open()
    device: Any = source._device
    source.close()
    turning = device._socket = device.sweeps = Turning(clock, turn_ms)
    for factor in (1.0, 1.1, 0.9):  # another rate is followed
        turning.turn_ns = round(turn_ms * factor * MS)
        turning.swept = clock.now_ns() // turning.turn_ns
        turning.delays.clear()
        turning.visits.clear()
        while len(turning.delays) < 200:
            device.read()
        assert len(turning.visits) < 200 * math.ceil(turning.turn_ns / (100 * MS)) + 20
        assert max(turning.delays[4:]) < 4 * MS


# -- Ouster ----------------------------------------------------------------------------------------------------------


def udp_payloads(path: Path, port: int) -> list[bytes]:
    """The UDP payloads to ``port`` in a capture, IP fragments put together (classic pcap, Ethernet)."""
    raw = path.read_bytes()
    order = "<" if raw[:4] in (b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1") else ">"
    at, found, parts = 24, [], {}
    while at < len(raw):
        size = struct.unpack_from(order + "I", raw, at + 8)[0]
        frame, at = raw[at + 16 : at + 16 + size], at + 16 + size
        head = 14 + 4 * (frame[12:14] == b"\x81\x00")
        if frame[head - 2 : head] != b"\x08\x00" or frame[head + 9] != 17:
            continue
        total, identity, flags = struct.unpack_from(">HHH", frame, head + 2)
        body = frame[head + 4 * (frame[head] & 15) : head + total]
        parts[identity] = parts.get(identity, b"") + body if flags & 0x1FFF else body
        if not flags & 0x2000:
            whole = parts.pop(identity)
            if struct.unpack_from(">H", whole, 2)[0] == port:
                found.append(whole[8:])
    return found


@pytest.mark.parametrize("name", ["OS-0-32-U1_v2.2.0_1024x10", "OS-1-32-G_v2.1.1_1024x10"])
def test_every_field_of_an_ouster_has_the_vendors_digest(shared_data: Path, name: str) -> None:
    core = pytest.importorskip("ouster.sdk.core", reason="the Ouster SDK is not installed: pip install -e '.[ouster]'")
    folder = shared_data / "ouster"
    if not (folder / f"{name}.pcap").is_file():
        pytest.skip(f"the capture {name}.pcap is not among the real recordings")
    digest = json.loads((folder / f"{name}_digest.json").read_text())
    metadata = folder / f"{name}.json"
    info = core.SensorInfo(metadata.read_text())
    packets = udp_payloads(folder / f"{name}.pcap", info.config.udp_port_lidar or 7502)
    port, context = free_port(), CheckContext()
    source = Lidar(settings(sensor="ouster", udp=port, bind="127.0.0.1", metadata=str(metadata)), context)
    source.open()
    found: list[Reading] = []
    form = core.PacketFormat(info)
    hashes: dict[str, Any] = {}
    with contextlib.closing(source), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for packet in packets:
            sender.sendto(packet, ("127.0.0.1", port))
            found += source.read()
            raw = np.frombuffer(packet, np.uint8)
            if len(raw) == form.lidar_packet_size:
                for header in core.ColHeader:
                    hashes.setdefault(header.name, hashlib.md5()).update(form.packet_header(header, raw).tobytes())
                for field in form.fields:
                    hashes.setdefault(field, hashlib.md5()).update(form.packet_field(field, raw).tobytes())
        protocol = source.protocol
    assert protocol.packets == len(packets)
    frame = protocol.frame
    assert frame is not None, "the capture holds a whole frame"
    (expected,) = digest["scans"]
    got = {
        "FRAME_ID": str(frame.frame_id),
        "TIMESTAMP": md5(frame.timestamp.astype(np.uint64)),
        "STATUS": md5(frame.status.astype(np.uint64)),
        "MEASUREMENT_ID": md5(frame.measurement_id.astype(np.uint16)),
        **{field: md5(frame.field(field)) for field in frame.fields},
    }
    expected.pop("ENCODER_COUNT")  # computed by nobody any more, the vendor's own check leaves it out
    assert {key: got[key] for key in expected} == expected
    stated = {key: value for key, value in digest["packet_hash"].items() if key != "ENCODER_COUNT"}
    assert {key: hashes[key].hexdigest() for key in stated} == stated
    (reading,) = found
    points = reading.data.view(POINT_DTYPE)
    seen = frame.field(core.ChanField.RANGE)
    assert len(points) == int((seen > 0).sum())
    xyz = np.stack([points[axis] for axis in "xyz"], axis=1)
    project = core.XYZLut(info)(frame)
    assert np.allclose(xyz, project[seen > 0], atol=1e-4)
    assert points["offset_ns"].max() <= 0
    assert points["offset_ns"].min() > -101 * MS


def test_columns_outside_of_an_azimuth_window_tell_no_time(shared_data: Path) -> None:
    """The last column of every packet is made one: what stands in it is zeros."""
    core = pytest.importorskip("ouster.sdk.core", reason="the Ouster SDK is not installed: pip install -e '.[ouster]'")
    capture = shared_data / "ouster" / "OS-0-32-U1_v2.2.0_1024x10.pcap"
    if not capture.is_file():
        pytest.skip(f"the capture {capture.name} is not among the real recordings")
    lidar = Ouster(capture.with_suffix(".json"))
    form = lidar._format

    def headers(header: Any, packet: bytes) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = form.packet_header(header, np.frombuffer(packet, np.uint8))
        return found

    packets = [p for p in udp_payloads(capture, lidar._info.config.udp_port_lidar) if len(p) == lidar.packet_bytes]
    first = packets[0]
    at = first.rindex(int(headers(core.ColHeader.TIMESTAMP, first)[-1]).to_bytes(8, "little"))
    status = next(i for i in range(at + 8, len(first))
                  if not headers(core.ColHeader.STATUS, first[:i] + b"\0" + first[i + 1 :])[-1] & 1)  # fmt: skip
    cut = [p[:at] + bytes(8) + p[at + 8 : status] + b"\0" + p[status + 1 :] for p in packets]
    stamps = [int(headers(core.ColHeader.TIMESTAMP, p)[-2]) for p in cut]
    assert {int(headers(core.ColHeader.TIMESTAMP, p)[-1]) for p in cut} == {0}
    found = [s for p, t in zip(cut, stamps, strict=True) if (s := lidar.feed(p, t - stamps[0] + NS)) is not None]
    assert [s.new_epoch for s in found] == [False]
    assert found[0].t_device_ns in stamps
    assert found[0].t_capture_ns == pytest.approx(found[0].t_device_ns - stamps[0] + NS, abs=MS)


def md5(values: np.ndarray[Any, Any]) -> str:
    return hashlib.md5(values.tobytes()).hexdigest()


def test_an_ouster_without_its_sdk_or_its_metadata_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="curl"):
        settings(sensor="ouster")
    given = settings(sensor="ouster", udp=free_port(), metadata=str(tmp_path / "none.json"))
    with pytest.raises(SensorError, match=r"sensorium\[ouster\]|none.json: there is no such file\. .*curl"):
        Lidar(given, CheckContext()).open()


# -- RPLidar ---------------------------------------------------------------------------------------------------------


class FakeRplidar(threading.Thread):
    """The device's side of a pseudo-terminal: answers requests, and while it scans sends a turn of 360 measurements,
    2 m all around but nothing seen from 100 to 110 degrees."""

    def __init__(self, health: int = 0, damage_at: int | None = None, mute: bool = False) -> None:
        super().__init__()
        self.fd, self.slave = os.openpty()
        tty.setraw(self.slave)
        self.name_ = os.ttyname(self.slave)
        self._health, self._damage_at, self._mute = health, damage_at, mute
        self._ended = threading.Event()
        self.heard = b""

    def run(self) -> None:
        clock, scanning, sent, start = SystemClock(), False, 0, 0
        while not self._ended.is_set():
            if select.select([self.fd], [], [], 0.002)[0]:
                asked = os.read(self.fd, 1000)
                self.heard += asked
                answers = ((rplidar.HEALTH, rplidar.HEALTH_ANSWER + struct.pack("<BH", self._health, 7)),
                           (rplidar.RATE, rplidar.RATE_ANSWER + struct.pack("<HH", 500, 250)),
                           (rplidar.SCAN, rplidar.SCAN_ANSWER))  # fmt: skip
                for request, answer in answers:
                    if request in asked and not self._mute:
                        os.write(self.fd, answer)
                if rplidar.SCAN in asked:
                    scanning, sent, start = True, 0, clock.now_ns()
                elif rplidar.STOP in asked:
                    scanning = False
            while scanning and not self._mute and (clock.now_ns() - start) * 2000 // NS > sent:
                data = self.measurement(sent % 360)
                os.write(self.fd, b"\x00" + data if sent == self._damage_at else data)
                sent += 1

    @staticmethod
    def measurement(degree: int) -> bytes:
        first = 1 if degree == 0 else 2
        distance = 0 if 100 <= degree <= 110 else 2 * 4000
        return struct.pack("<BHH", 47 << 2 | first, degree * 64 << 1 | 1, distance)

    def end(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join()
        os.close(self.fd)
        os.close(self.slave)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[FakeRplidar]:
    made = FakeRplidar(**getattr(request, "param", {}))
    made.start()
    yield made
    made.end()


def test_an_rplidar_keeps_the_contract_and_is_stopped_at_the_end(device: FakeRplidar) -> None:
    got = check_source(Lidar, {"sensor": "rplidar", "port": device.name_}, readings=2)
    for reading in got:
        points = reading.data.view(POINT_DTYPE)
        assert len(points) == 349
        assert np.hypot(points["x"], points["y"]) == pytest.approx(2, abs=1e-3)
        angle = np.round(-np.degrees(np.arctan2(points["y"], points["x"]))).astype(int) % 360  # it turns clockwise
        assert set(angle) == set(range(360)) - set(range(100, 111))
        assert (points["z"] == 0).all()
        assert (points["intensity"] == 47).all()
        assert points["offset_ns"].min() == pytest.approx(-359 * 500_000, rel=0.01)
    assert device.heard.count(rplidar.STOP) >= 2


@pytest.mark.parametrize("device", [{"damage_at": 500}], indirect=True)
def test_damage_on_the_line_is_counted(device: FakeRplidar) -> None:
    context = CheckContext()
    source = Lidar(settings(sensor="rplidar", port=device.name_), context)
    source.open()
    for _ in range(500):
        if source.read() and "damaged" in context.counted:
            break
    source.close()
    assert context.counted == {"partial": 1, "damaged": 1}


@pytest.mark.parametrize("device", [{"health": 2}], indirect=True)
def test_a_device_with_a_fault_says_so(device: FakeRplidar) -> None:
    with pytest.raises(SensorError, match="code 7"):
        Lidar(settings(sensor="rplidar", port=device.name_), CheckContext()).open()


@pytest.mark.parametrize("device", [{"mute": True}], indirect=True)
def test_what_does_not_answer_like_an_rplidar_is_refused(device: FakeRplidar) -> None:
    with pytest.raises(SensorError, match="Set `baud`"):
        Lidar(settings(sensor="rplidar", port=device.name_, silence_ms=200), CheckContext()).open()
    with pytest.raises(SensorError, match="cannot be opened"):
        Lidar(settings(sensor="rplidar", port="/dev/none"), CheckContext()).open()


@pytest.mark.parametrize(
    ("given_settings", "match"),
    [
        ({"sensor": "velodyne", "port": "/dev/x"}, "serial port"),
        ({"sensor": "velodyne", "port": 2368}, r"expected text\. `port` is the serial one .* write `udp: 2368`\.$"),
        ({"sensor": "velodyne", "port": "2368"}, r"write `udp: 2368`\.$"),
        ({"sensor": "rplidar"}, "serial port"),
        ({"sensor": "velodyne", "model": "VLP99"}, "VLP16"),
    ],
)
def test_settings_fit_the_sensor(given_settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        settings(**given_settings)
