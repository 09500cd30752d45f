"""Rigs of four and more sensors on their real protocols, all at once: each message that a device sent is accounted
for, in what was published, aligned, recorded and predicted.

A few seconds here; ``SENSORIUM_RIG_S=60`` makes it a minute, and ``-s`` shows the numbers.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from pipeline.config import load_rig
from pipeline.explain import Session as Recorded
from pipeline.explain import explain
from pipeline.launch import Session
from pipeline.messages import FrameLayout, array
from pipeline.prediction import Prediction
from pipeline.protocols.witmotion import GYRO_SCALE
from pipeline.recording import GAP_TOPIC, PREDICTION_TOPIC, RecordingReader
from pipeline.show import _counters
from pipeline.status import StreamStatus
from tests.conservation import check_account
from tests.device_servers import POINTS, TURN_PACKETS, HttpCamera, SerialImu, UdpLidar, number_of, sending
from tests.rigs import SOUND, STREAMS, make_rig, short_folder
from tests.test_launch import until
from tests.test_lidar import PACKET_NS, free_port
from tests.test_microphone import Server, server
from tests.tiny_bundle import FRAME, mean_encoder, write_bundle

__all__ = ["server"]

SECONDS = float(os.environ.get("SENSORIUM_RIG_S", "5"))
NS = 1_000_000_000
SOURCE_DROPS = ("superseded", "stale", "order")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(round(SECONDS) + 120)]


@contextmanager
def two_microphones(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two sound inputs, ``near`` and ``far``, in ALSA's configuration: each the monitor of a sink of its own."""
    for name in ("near", "far"):
        assert server._pactl("load-module", "module-null-sink", f"sink_name={name}", "rate=48000", "channels=1",
                             "norewinds=1")  # fmt: skip
    inputs = [f'pcm.{name} {{ type pulse device "{name}.monitor" hint.show on }}' for name in ("near", "far")]
    config = folder / "alsa.conf"
    config.write_text("</usr/share/alsa/alsa.conf>\n" + "\n".join(inputs) + "\n")
    monkeypatch.setenv("ALSA_CONFIG_PATH", str(config))
    yield


class Done:
    """A session that is over: what its nodes said at the end, and what is in its recording."""

    def __init__(self, session: Session, path: Path) -> None:
        self.status = session.status()
        self.explained = explain(Recorded(path))
        self.messages: dict[str, list[Any]] = {name: [] for name in session.plan.streams}
        self.lost: Counter[str] = Counter()
        """Messages that the recorder names as lost: a machine that stalls overruns any queue, and then it is said."""
        with RecordingReader(path) as reader:
            for data, _, _ in reader.json(GAP_TOPIC):
                gap = msgspec.json.decode(data)
                self.lost[gap.get("stream", "")] += gap["to"] - gap["from"] + 1
            assert reader.info.complete == (not self.lost), (reader.info.note, self.lost)
            for message, _ in reader.messages():
                self.messages[message.header.stream].append(message)
            found = [msgspec.json.decode(d, type=Prediction) for d, _, _ in reader.json(PREDICTION_TOPIC)]
        self.predictions = found

    def stream(self, name: str) -> StreamStatus:
        return self.status.streams[name]

    def inlets(self, name: str) -> dict[str, float]:
        """What the nodes say of a stream that they could not take as it came."""
        return {f"{node} {what}": count for node, status in self.status.nodes.items()
                for what, count in status.counters.items() if what.startswith(f"{name}.")}  # fmt: skip

    def drops(self, name: str) -> int:
        return sum(self.stream(name).dropped.get(what, 0) for what in SOURCE_DROPS)


def run(rig: Any, folder: Path, devices: list[Any]) -> Done:
    """Runs a rig until every stream has come and for ``SECONDS`` after, lets the devices fall silent, and ends when
    nothing is on its way any more."""
    with short_folder() as root:
        session = Session(rig, root=root)
        with session:
            until(lambda: all(s.used for s in session.status().streams.values()), "all streams are used", 90)
            session.wait(SECONDS)
            for device in devices:
                device.pause()
            before: list[int] = []

            def quiet() -> bool:
                before.append(sum(s.received for n, s in session.status().streams.items() if "mic" not in n))
                threading.Event().wait(0.1)
                return len(before) > 4 and before[-1] == before[-4]

            until(quiet, "nothing is on its way any more")
    return Done(session, folder / "out.mcap")


def check_accounts(done: Done) -> None:
    """What holds of every stream: published = recorded + named as lost; the aligner's account and the one recounted
    from the file balance; and there is a prediction for every window."""
    assert done.status.nodes["record"].counters["lost"] == done.lost.total()
    for name, stream in done.status.streams.items():
        numbers = [(message.header.epoch, message.header.seq) for message in done.messages[name]]
        sent = {epoch: max(seq for of, seq in numbers if of == epoch) + 1 for epoch in {epoch for epoch, _ in numbers}}
        assert len(set(numbers)) == len(numbers), name
        assert sum(sent.values()) == len(numbers) + done.lost[name], (name, sent)
        # What the source could hand to nobody, it has counted itself; at the end of an epoch no number tells of it.
        unsent = stream.dropped.get("no_slot", 0)
        assert len(numbers) + done.lost[name] + unsent >= stream.published > 0, (name, sent, stream.dropped)
        assert not [what for what in done.inlets(name) if "malformed" in what], done.inlets(name)
        check_account(name, _counters(stream))
        told = done.explained.streams[name]
        assert told.messages["sent"] == told.messages["received"] + told.messages["lost"]
        assert told.unaccounted <= done.lost[name]  # what only the aligner had
        assert told.balanced or done.lost[name]
        print(f"{name:12} {told.messages}; dropped by the source {stream.dropped}, by the recorder {done.lost[name]}")
    steps = [prediction.window.index for prediction in done.predictions]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    fine = {name: sum(p.streams[name].verdict == "ok" for p in done.predictions) for name in done.status.streams}
    print(f"{len(steps)} predictions; ok: {fine}")
    assert all(fine.values()), fine


def check_camera(done: Done, name: str, camera: HttpCamera) -> None:
    """The frames that were sent are those that were published, but for those that the source says it dropped. Before
    the first one FFmpeg takes some to learn the format, and the last one it holds back until another begins."""
    got = []
    for message in done.messages[name]:
        layout = message.header.layout
        assert isinstance(layout, FrameLayout)
        pixels = np.frombuffer(message.data, np.uint8)
        jpeg = layout.format == "jpeg"
        got.append(number_of(cv2.imdecode(pixels, cv2.IMREAD_COLOR) if jpeg else array(message)))
    assert camera.first is not None
    assert all(b > a for a, b in itertools.pairwise(got))
    assert camera.first <= got[0]
    last = camera.first + camera.sent - 1
    print(f"{name:12} {camera.sent} frames sent, {got[0] - camera.first} to open it, {last - got[-1]} held back, "
          f"{len(got)} published, {done.drops(name)} dropped and counted")  # fmt: skip
    assert last - 1 - done.lost[name] <= got[-1] <= last
    assert got[-1] - got[0] + 1 == len(got) + done.drops(name) + done.lost[name] or len(lives(done, name)) > 1


def lives(done: Done, name: str) -> list[list[Any]]:
    """The messages of each life of a device's connection. More than one means that this machine stalled for so long
    that the device was taken for dead, which the source says; what the device sent meanwhile nobody heard."""
    found = [list(group) for _, group in itertools.groupby(done.messages[name], key=lambda m: m.header.epoch)]
    stalls = done.stream(name).failures
    if len(found) > 1 or stalls:
        print(f"{name:12} {len(found)} epochs, taken for dead {stalls} times: this machine stalled")
    return found


def check_imu(done: Done, name: str, imu: SerialImu) -> None:
    """Every sample from the first that was heard to the last that was sent."""
    data = np.concatenate([array(message) for message in done.messages[name]])
    got = np.rint(data["gyro"][:, 0] / -GYRO_SCALE).astype(int)
    print(f"{name:12} {imu.sent} samples sent, {got[0]} of them before it listened, {len(got)} published")
    holes = int((np.diff(got) != 1).sum())
    assert holes < len(lives(done, name)) + done.lost[name]
    assert (np.diff(got) > 0).all()
    assert np.isnan(data["accel"][:, 0]).sum() <= holes + 1  # of the first sample only the half may have been heard
    assert imu.sent - 2 <= got[-1] + 1 <= imu.sent  # the last batch may not have been full
    assert not done.stream(name).dropped.keys() & {"checksum", "lost"}


def check_lidar(done: Done, name: str, lidar: UdpLidar) -> None:
    """Whole turns, one after another without a packet between them missing."""
    sweeps = done.messages[name]
    assert {message.header.layout.points for message in sweeps} == {POINTS}
    for life in lives(done, name):
        steps = np.diff([message.header.t_device_ns for message in life])
        # Its clock counts microseconds; only what the recorder names may be missing.
        assert (np.abs(steps - TURN_PACKETS * PACKET_NS) > 2000).sum() <= done.lost[name]
    dropped = done.stream(name).dropped
    print(f"{name:12} {lidar.calls} packets sent, {len(sweeps)} sweeps of {POINTS} points, {dropped}")
    assert set(dropped) <= {"partial"}
    rest = (lidar.calls * PACKET_NS - sweeps[-1].header.t_device_ns) / PACKET_NS
    assert rest < TURN_PACKETS * (2 + done.lost[name])  # it ends with the last whole turn that another followed


def check_microphone(done: Done, name: str) -> None:
    """Sound without a hole that is not counted: its samples and the lost ones fill the time."""
    blocks = [message.header for message in done.messages[name]]
    samples = sum(header.layout.samples for header in blocks)
    lost = done.stream(name).dropped.get("lost_samples", 0)
    expected = (blocks[-1].t_end_ns - blocks[0].t_capture_ns) * 16_000 / NS
    print(f"{name:12} {samples} samples published, {lost} lost and counted, {expected:.0f} in that time")
    assert samples + lost + done.lost[name] * 320 == pytest.approx(expected, rel=2e-3, abs=32)


def test_four_sensors_and_nothing_is_unaccounted_for(server: Server, tmp_path: Path) -> None:
    camera, imu, lidar = HttpCamera(640, 480, 30), SerialImu(200), UdpLidar(free := free_port())
    sources = {
        "camera": {"kind": "camera", "device": camera.url, "encoding": "native"},
        "microphone": {"kind": "microphone", "device": "pulse"},
        "imu": {"kind": "imu", "port": imu.port.name, "rate_hz": 200},
        "lidar": {"kind": "lidar", "sensor": "velodyne", "udp": free, "bind": "127.0.0.1"},
    }
    rig = make_rig(tmp_path, sources, record={"path": str(tmp_path / "out.mcap")})
    with sending(camera, imu, lidar):
        done = run(rig, tmp_path, [camera, imu, lidar])
    check_imu(done, "imu", imu)
    check_accounts(done)
    check_camera(done, "camera", camera)
    check_lidar(done, "lidar", lidar)
    check_microphone(done, "microphone")
    assert set(done.messages) == set(STREAMS)


def test_two_cameras_and_two_microphones(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = HttpCamera(320, 240, 30), HttpCamera(640, 480, 15)
    sources = {
        "left": {"kind": "camera", "device": left.url},  # pixels, through shared memory
        "right": {"kind": "camera", "device": right.url, "encoding": "native"},
        "near_mic": {"kind": "microphone", "device": "near"},
        "far_mic": {"kind": "microphone", "device": "far"},
    }
    streams = {"left": FRAME, "right": FRAME, "near_mic": SOUND, "far_mic": SOUND}
    mean = mean_encoder({"payload": "signal"})
    write_bundle(tmp_path / "two", streams, encoders={"near_mic": mean, "far_mic": mean})
    with two_microphones(server, tmp_path, monkeypatch):
        make_rig(tmp_path, sources, bundle=False, record={"path": str(tmp_path / "out.mcap")})
        with (tmp_path / "rig.yaml").open("a") as file:
            file.write("bundle: {path: two}\n")
        rig = load_rig(tmp_path / "rig.yaml")
        with sending(left, right):
            done = run(rig, tmp_path, [left, right])
    check_accounts(done)
    check_camera(done, "left", left)
    check_camera(done, "right", right)
    check_microphone(done, "near_mic")
    check_microphone(done, "far_mic")
