"""Network captures: every datagram of every kind of file, and the sweeps of real and fabricated LiDARs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, RecordingError
from pipeline.importing import ImportOptions, import_file
from pipeline.importing.pcap import datagrams
from pipeline.messages import POINT_DTYPE, Message, array
from pipeline.protocols.ouster import Ouster
from pipeline.recording import RecordingReader, SessionInfo
from tests.test_lidar import PACKET_NS, check_hall, md5, udp_payloads, vlp16

T0, MS, S = 1_700_000_000_000_000_000, 1_000_000, 1_000_000_000
CAPTURES = ("OS-0-32-U1_v2.2.0_1024x10", "OS-1-32-G_v2.1.1_1024x10")


# Captures made here.


def udp(payload: bytes, port: int) -> bytes:
    return struct.pack(">4H", 5000, port, 8 + len(payload), 0) + payload


def ipv4(body: bytes, offset: int = 0, more: bool = False, identity: int = 7, protocol: int = 17,
         host: int = 9) -> bytes:  # fmt: skip
    flags = offset // 8 | (0x2000 if more else 0)
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), identity, flags, 64, protocol, 0,
                       bytes([10, 0, 0, host]), b"\x0a\0\0\1")  # fmt: skip
    return head + body


def ipv6(body: bytes) -> bytes:
    return struct.pack(">IHBB", 6 << 28, len(body), 17, 64) + bytes(15) + b"\1" + bytes(16) + body


def framed(packet: bytes, link: int, vlans: int = 0) -> bytes:
    six = packet[0] >> 4 == 6
    kind = b"\x86\xdd" if six else b"\x08\0"
    heads = {1: bytes(12) + b"\x81\0\0\5" * vlans + kind, 113: bytes(14) + kind, 276: kind + bytes(18),
             0: b"\x02\0\0\0", 101: b""}  # fmt: skip
    # Ethernet fills up what is shorter than its least frame.
    return (heads[link] + packet).ljust(60 if link == 1 else 0, b"\0")


def pcap(path: Path, frames: list[tuple[int, bytes]], link: int = 1, order: str = "<", nano: bool = False) -> Path:
    tick, magic = (1, 0xA1B23C4D) if nano else (1000, 0xA1B2C3D4)
    data = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    for t_ns, frame in frames:
        data += struct.pack(order + "4I", t_ns // S, t_ns % S // tick, len(frame), len(frame)) + frame
    path.write_bytes(data)
    return path


def pcapng(path: Path, frames: list[tuple[int, bytes]], link: int = 1, order: str = "<", nano: bool = False) -> Path:
    def block(kind: int, body: bytes) -> bytes:
        body += bytes(-len(body) % 4)
        return struct.pack(order + "II", kind, 12 + len(body)) + body + struct.pack(order + "I", 12 + len(body))

    options = (struct.pack(order + "HHB3x", 9, 1, 9) if nano else b"") + struct.pack(order + "HH", 0, 0)
    data = block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))
    data += block(1, struct.pack(order + "HHI", link, 0, 65535) + options)
    data += block(5, bytes(12))  # statistics, which nobody needs
    for t_ns, frame in frames:
        ticks = t_ns // (1 if nano else 1000)
        head = struct.pack(order + "5I", 0, ticks >> 32, ticks & 0xFFFFFFFF, len(frame), len(frame))
        data += block(6, head + frame)
    path.write_bytes(data)
    return path


def import_(path: Path, **options: Any) -> tuple[SessionInfo, dict[str, list[Message]]]:
    out = path.parent / "imported.mcap"
    info = import_file(path, out, ImportOptions(**options), overwrite=True)
    with RecordingReader(out) as reader:
        found: dict[str, list[Message]] = {stream: [] for stream in reader.streams}
        for message, _ in reader.messages():
            found[message.header.stream].append(message)
    return info, found


# Datagrams.


@pytest.mark.parametrize("write", [pcap, pcapng])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [False, True])
@pytest.mark.parametrize("link", [1, 113, 276, 0, 101])
def test_every_kind_of_capture(tmp_path: Path, write: Any, order: str, nano: bool, link: int) -> None:
    packets = [ipv4(udp(b"first", 2368)), ipv6(udp(b"second", 7502)), ipv4(b"tcp", protocol=6)]
    frames = [(T0 + k * MS + 1000, framed(packet, link, vlans=k % 3)) for k, packet in enumerate(packets)]
    other: Counter[str] = Counter()
    found = list(datagrams(write(tmp_path / "a", frames, link, order, nano), other))
    assert [(d.t_ns, d.port, d.payload) for d in found] == [
        (T0 + 1000, 2368, b"first"), (T0 + MS + 1000, 7502, b"second")]  # fmt: skip
    assert found[0].source == "10.0.0.9"
    assert other == {"packets that are not UDP over IP": 1}


@given(size=st.integers(0, 5000), part=st.integers(1, 90), order=st.randoms())
def test_fragments_are_put_together_in_any_order(tmp_path_factory: Any, size: int, part: int, order: Any) -> None:
    payload = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    body = udp(payload, 7502)
    starts = range(0, len(body), 8 * part)
    parts = [(at, body[at : at + 8 * part]) for at in starts]
    order.shuffle(parts)
    frames = [(T0, framed(ipv4(piece, at, at + len(piece) < len(body)), 101)) for at, piece in parts]
    path = tmp_path_factory.getbasetemp() / "fragments.pcap"
    other: Counter[str] = Counter()
    assert [d.payload for d in datagrams(pcap(path, frames, 101), other)] == [payload]
    assert not other
    if len(parts) > 1:
        assert not list(datagrams(pcap(path, frames[1:], 101), other))
        assert other == {"datagrams of which a fragment is missing": 1}


def test_what_is_not_whole_is_counted(tmp_path: Path) -> None:
    whole = [(T0 + k, framed(ipv4(udp(bytes([k]), 1)), 1)) for k in range(3)]
    path = pcap(tmp_path / "a.pcap", whole)
    path.write_bytes(path.read_bytes()[:-10])
    other: Counter[str] = Counter()
    assert [d.payload for d in datagrams(path, other)] == [b"\0", b"\1"]
    assert other == {"packets that are cut off at the end of the capture": 1}
    snapped = pcap(tmp_path / "b.pcap", [(T0, framed(ipv4(udp(bytes(100), 1)), 101)[:80])], 101)
    other.clear()
    assert not list(datagrams(snapped, other))
    assert other == {"packets that are not UDP over IP": 1}
    reused = [(T0 + k, framed(ipv4(udp(bytes(100), 1)[:64], 0, True), 101)) for k in range(3)]
    other.clear()
    assert not list(datagrams(pcap(tmp_path / "c.pcap", reused, 101), other))
    assert other == {"datagrams of which a fragment is missing": 3}
    flood = [(T0 + k, framed(ipv4(udp(bytes(100), 1)[:64], 0, True, identity=k), 101)) for k in range(300)]
    other.clear()
    assert not list(datagrams(pcap(tmp_path / "d.pcap", flood, 101), other))
    assert other == {"datagrams of which a fragment is missing": 300}


@given(cut=st.integers(0, 400), at=st.integers(0, 399), value=st.integers(0, 255), ng=st.booleans())
def test_damaged_captures_are_read_or_refused(tmp_path_factory: Any, cut: int, at: int, value: int, ng: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pcap"
    frames = [(T0 + k, framed(ipv4(udp(bytes(20), 1)), 1)) for k in range(3)]
    data = bytearray((pcapng if ng else pcap)(path, frames).read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data[: max(0, len(data) - cut)])
    with contextlib.suppress(RecordingError):
        assert len(list(datagrams(path, Counter()))) <= 3


# Velodyne.


def test_a_captured_velodyne_gives_its_sweeps(tmp_path: Path) -> None:
    frames = []
    for k in range(310):
        taken = k * PACKET_NS
        frames.append((T0 + taken + PACKET_NS, framed(ipv4(udp(vlp16(k, taken // 1000), 2368)), 1)))
        if k % 100 == 0:
            frames.append((T0 + taken + PACKET_NS, framed(ipv4(udp(bytes(512), 8308)), 1)))
    info, found = import_(pcap(tmp_path / "a.pcap", frames))
    assert info.unix_ns == pytest.approx(T0 + 75 * 2 * PACKET_NS, abs=3 * MS)  # the end of the first whole turn
    assert (info.complete, info.arrival) == (True, "received")
    assert info.extra["sensor.lidar"] == "Velodyne at 10.0.0.9, port 2368"
    assert info.extra["left_out"] == ("the sweep of lidar that was under way when the capture began; "
                                      "4 datagrams of 512 bytes from 10.0.0.9 to port 8308")  # fmt: skip
    assert len(found["lidar"]) == 310 * 12 * 40 // 36000 - 1
    for message in found["lidar"][:2]:
        check_hall(array(message))
        assert 0 <= message.header.t_receipt_ns - message.header.t_capture_ns < 3 * MS


def test_two_velodynes_are_two_streams(tmp_path: Path) -> None:
    frames = []
    for k in range(400):
        for host in (9, 11):
            body = udp(vlp16(k, k * PACKET_NS // 1000), 2368)
            frames.append((T0 + (k + 1) * PACKET_NS + host, framed(ipv4(body, host=host), 113)))
    _, found = import_(pcapng(tmp_path / "a.pcapng", frames, 113), streams=("left=lidar_10_0_0_9_2368",))
    assert {name: len(of) for name, of in found.items()} == {"left": 4}
    _, found = import_(tmp_path / "a.pcapng")
    assert set(found) == {"lidar_10_0_0_9_2368", "lidar_10_0_0_11_2368"}


# Ouster.


@pytest.fixture(params=CAPTURES)
def ouster(request: pytest.FixtureRequest, shared_data: Path) -> Path:
    pytest.importorskip("ouster.sdk.core", reason="the Ouster SDK is not installed: pip install -e '.[ouster]'")
    path = shared_data / "ouster" / f"{request.param}.pcap"
    if not path.is_file():
        pytest.skip(f"the capture {path.name} is not among the real recordings")
    return path


def test_a_captured_ouster_has_the_vendors_digest(ouster: Path, tmp_path: Path) -> None:
    import ouster.sdk.core as core

    metadata = ouster.with_suffix(".json")
    info = core.SensorInfo(metadata.read_text())
    payloads = [d.payload for d in datagrams(ouster, Counter()) if d.port == 7502]
    assert payloads == udp_payloads(ouster, 7502)
    # The parser that the import goes through gives the fields that the vendor has summed ...
    parser = Ouster(metadata)
    for k, payload in enumerate(payloads):
        parser.feed(payload, k * MS)
    frame = parser.frame
    (expected,) = json.loads(ouster.with_name(f"{ouster.stem}_digest.json").read_text())["scans"]
    fields = set(frame.fields) & expected.keys()
    assert len(fields) >= 4
    assert {field: md5(frame.field(field)) for field in fields} == {field: expected[field] for field in fields}
    assert md5(frame.timestamp.astype(np.uint64)) == expected["TIMESTAMP"]
    # ... and the sweep in the recording is made of them.
    for name in (ouster.name, metadata.name):
        shutil.copy(ouster.with_name(name), tmp_path / name)
    _, found = import_(tmp_path / ouster.name)
    (sweep,) = found["lidar"]
    points = array(sweep)
    seen = frame.field(core.ChanField.RANGE) > 0
    assert points.dtype == POINT_DTYPE
    assert np.allclose(np.stack([points[axis] for axis in "xyz"], axis=1), core.XYZLut(info)(frame)[seen], atol=1e-4)
    field = core.ChanField.REFLECTIVITY
    assert points["intensity"].tolist() == frame.field(field)[seen].astype(np.float32).tolist()
    stamps = np.broadcast_to(frame.timestamp.astype(np.int64), seen.shape)[seen]
    assert sweep.header.t_device_ns == frame.timestamp.max()
    assert (points["offset_ns"] == stamps - int(frame.timestamp.max())).all()
    assert sweep.header.t_receipt_ns - sweep.header.t_capture_ns == pytest.approx(0, abs=MS)


def test_an_ousters_imu_comes_along(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ouster.sdk.core", reason="the Ouster SDK is not installed: pip install -e '.[ouster]'")
    for suffix in (".pcap", ".json"):
        shutil.copy(shared_data / "ouster" / f"{CAPTURES[0]}{suffix}", tmp_path)
    info, found = import_(tmp_path / f"{CAPTURES[0]}.pcap")
    samples = np.concatenate([array(message) for message in found["imu"]])
    assert len(samples) == 10
    assert np.linalg.norm(samples["accel"], axis=1) == pytest.approx(9.8, abs=0.3)
    assert np.abs(samples["gyro"]).max() < 0.1
    steps = np.diff([message.header.t_capture_ns for message in found["imu"]])
    assert steps == pytest.approx(10 * MS, abs=0.2 * MS)
    assert "left_out" not in info.extra
    assert info.unix_ns == pytest.approx(1635444808_686123000, abs=10 * MS)


def test_an_ouster_without_its_metadata_or_with_anothers(ouster: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(ouster, tmp_path))
    with pytest.raises(ConfigError, match=rf"to port 7502.*none of a Velodyne's.*{ouster.stem}.json.*--metadata.*curl"):
        import_(path)
    theirs = next(ouster.with_name(f"{name}.json") for name in CAPTURES if name != ouster.stem)
    with pytest.raises(ConfigError, match="is of an Ouster whose packets have"):
        import_(path, metadata=theirs)
    assert len(import_(path, metadata=ouster.with_suffix(".json"))[1]["lidar"]) == 1
    with pytest.raises(ConfigError, match=rf"{ouster.stem}.jso: there is no such file\. Fetch"):
        import_(path, metadata=ouster.with_suffix(".jso"))
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"there is no such file\. Did you mean `{ouster.stem}\.json`\? Fetch"):
        import_(path, metadata=path.with_name(f"x{ouster.stem}.json"))
    with pytest.raises(ConfigError, match="does not hold the metadata of an Ouster"):
        import_(path)


def test_a_capture_without_datagrams(tmp_path: Path) -> None:
    path = pcap(tmp_path / "a.pcap", [(T0, framed(ipv4(b"tcp", protocol=6), 1))])
    with pytest.raises(RecordingError, match=r"no UDP datagram \(1 packets that are not UDP over IP\)"):
        import_(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(RecordingError, match="is no network capture"):
        import_(path)


def test_the_same_capture_gives_the_same_recording(tmp_path: Path) -> None:
    frames = [(T0 + k * PACKET_NS, framed(ipv4(udp(vlp16(k, k * PACKET_NS // 1000), 2368)), 1)) for k in range(200)]
    path = pcap(tmp_path / "a.pcap", frames)
    sums = []
    for name in ("b", "c"):
        import_file(path, tmp_path / f"{name}.mcap")
        sums.append(hashlib.sha256((tmp_path / f"{name}.mcap").read_bytes()).hexdigest())
    assert sums[0] == sums[1]
