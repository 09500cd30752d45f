"""A whole session on kernel devices: the camera, the sound card and the IMU through `sensorium run` to predictions and
into a recording, and the camera unplugged and back meanwhile.

One session serves all tests, for an emulated machine takes a minute to start its processes, and all of it is kept
light: a model of two windows a second, samples in few messages, a recording that is not compressed. What comes is
looked at, never how soon: each wait is for something to happen.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from math import radians
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

from nodes.camera import usb_cameras
from pipeline.clock import SystemClock
from pipeline.explain import Explanation, explain
from pipeline.explain import Session as Recorded
from pipeline.launch import live_sessions
from pipeline.messages import Header, array
from pipeline.recording import RecordingReader
from pipeline.transport import Buffered, observe
from tests.devices.test_imu_guest import COUNTS, bound, fill_registers, stub
from tests.devices.test_microphone_guest import CARDS
from tests.tiny_bundle import mean_encoder, write_bundle

NS = 1_000_000_000
LIMIT_S = 400
PATIENT = {"start_s": 300, "hang_ms": 120_000}
LENIENT = {"max_delay_ms": 30_000, "idle_ms": 30_000}
FRUGAL = {"contributions": False, "payload_wait_ms": 10_000}
MODEL: dict[str, Any] = {
    "camera": {"payload": "frame", "rule": {"kind": "nearest", "tolerance_ms": 250}},
    "microphone": {"payload": "audio", "rule": {"kind": "resample", "rate_hz": 20, "max_gap_ms": 50}, "channels": 1},
    "imu": {"payload": "imu", "rule": {"kind": "resample", "rate_hz": 20, "max_gap_ms": 500}},
}
pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not any("vivid" in name for name in usb_cameras().values()), reason="no vivid camera: modprobe vivid"
    ),
    pytest.mark.skipif(
        not CARDS.exists() or "Loopback" not in CARDS.read_text(), reason="no loopback card: modprobe snd-aloop"
    ),
    pytest.mark.skipif(stub() is None or bound() is not None, reason="no I2C stub that is free: modprobe i2c-stub"),
    pytest.mark.skipif(shutil.which("v4l2-ctl") is None, reason="no v4l2-ctl: apt-get install v4l-utils"),
]


class Lived(msgspec.Struct):
    """A session that is over: its predictions as printed, how many there were when the camera was unplugged and when
    it was back, what the command said meanwhile, the session's messages by stream, and their accounts."""

    predictions: list[dict[str, Any]]
    unplugged_at: int
    back_at: int
    log: str
    messages: dict[str, list[Any]]
    told: Explanation


def busy() -> str:
    """Who has had the processors, in seconds: for a failure that is nothing but slowness."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
            ticks = sum(int(number) for number in rest.split()[11:13])
            line = stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode()[-40:]
            found.append((ticks / 100, f"{name} {line}".strip()))
    return ", ".join(f"{name} {seconds:.0f} s" for seconds, name in sorted(found, reverse=True)[:12])


class Running:
    """`sensorium run` as a process, and what it has printed so far."""

    def __init__(self, rig: Path, out: Path) -> None:
        self.predictions: list[dict[str, Any]] = []
        self.log = out.with_suffix(".log")
        command = [str(Path(sys.executable).with_name("sensorium")), "run", str(rig), "--json"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self._reading = threading.Thread(target=self._read)
        self._reading.start()
        self._clock = SystemClock()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as printed:
            for line in printed:
                self.predictions.append(json.loads(line))

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        begun = self._clock.now_ns()
        while not condition():
            late = self._clock.now_ns() - begun > LIMIT_S * NS
            if late or self.process.poll() is not None:
                said = f"{len(self.predictions)} predictions, the last {self.predictions[-1:]}; {self.log.read_text()}"
                pytest.fail(f"{'not soon enough' if late else 'it ended before'}: {what}; {busy()}; {said}")
            self._clock.wait_until(self._clock.now_ns() + NS)
        print(f"{(self._clock.now_ns() - begun) / NS:.0f} s until {what}; {busy()}", flush=True)

    def seen(self, stream: str, since: int = 0) -> int:
        """How many predictions rest on something of ``stream``."""
        return sum(p["streams"][stream]["verdict"] in ("ok", "partial") for p in self.predictions[since:])

    def stop(self) -> None:
        """As Ctrl-C does. (Not by that signal itself, which is ignored where tests run in the background.)"""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(LIMIT_S)
        self._reading.join()
        assert status == 0, self.log.read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reading.join()


def rig_file(folder: Path, out: Path) -> Path:
    """The kernel's devices."""
    import smbus2

    bus = stub()
    assert bus is not None
    with smbus2.SMBus(bus) as opened:
        fill_registers(opened)
    sources = {
        "camera": {"kind": "camera", "device": "vivid", "width": 320, "height": 180, "rate_hz": 30},
        "microphone": {"kind": "microphone", "device": "hw:0,1", "rate_hz": 16_000, "block_ms": 100},
        "imu": {"kind": "imu", "i2c": bus, "rate_hz": 25, "batch_ms": 200, "accel_range_g": 8, "gyro_range_dps": 1000},
    }
    sound = mean_encoder({"payload": "signal"})
    write_bundle(folder / "model", MODEL, encoders={"microphone": sound}, window={"hop_ms": 500, "steps": 3})
    rig = {"name": "guest", "sources": sources, "restart": PATIENT, "align": LENIENT, "fusion": FRUGAL,
           "bundle": {"path": "model"}, "record": {"path": str(out), "compression": "none"}}  # fmt: skip
    file = folder / "rig.yaml"
    file.write_text(yaml.safe_dump(rig))
    return file


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    folder = tmp_path_factory.mktemp("session")
    out = folder / "out.mcap"
    headers: list[Header] = []
    with closing(Running(rig_file(folder, out), out)) as running:
        for stream in ("camera", "microphone", "imu"):
            running.wait_for(lambda: running.seen(stream) >= 5, f"predictions rest on the {stream}")  # noqa: B023
        (ref,) = live_sessions()
        with closing(observe(Path(ref.dir), {"camera": {"camera": Buffered(4096)}}, {})) as watching:

            def frames(epochs: Callable[[int], bool]) -> int:
                for received in watching.receive(50):
                    with received:
                        headers.append(received.message.header)
                return sum(not header.is_beat and epochs(header.epoch) for header in headers)

            running.wait_for(lambda: frames(lambda epoch: True) >= 5, "frames are seen on their way")
            before = headers[-1].epoch
            unplugged_at = len(running.predictions)
            subprocess.run(["v4l2-ctl", "-d", "/dev/video0", "-c", "disconnect=1"], check=True, capture_output=True)
            running.wait_for(lambda: frames(lambda epoch: epoch > before) >= 10, "the camera is back")
        back_at = len(running.predictions)
        running.wait_for(lambda: running.seen("camera", back_at) >= 10, "predictions rest on the camera again")
        running.stop()
        predictions = running.predictions
    messages: dict[str, list[Any]] = {}
    with RecordingReader(out) as reader:
        for message, _ in reader.messages():
            messages.setdefault(message.header.stream, []).append(message)
    return Lived(predictions, unplugged_at, back_at, running.log.read_text(), messages, explain(Recorded(out)))


def test_camera_and_sound_card_reach_predictions(lived: Lived) -> None:
    indices = [prediction["window"]["index"] for prediction in lived.predictions]
    assert indices == list(range(indices[0], indices[0] + len(indices)))
    first = lived.predictions[: lived.unplugged_at]
    together = [p for p in first if all(p["streams"][s]["verdict"] in ("ok", "partial") for s in lived.messages)]
    assert together, [{s: told["verdict"] for s, told in p["streams"].items()} for p in first]


def test_frames_have_the_drivers_own_pace(lived: Lived) -> None:
    """The driver stamps them, 30 a second; an emulated machine takes only some, and its driver is often late itself."""
    headers = [m.header for m in lived.messages["camera"]]
    # A frame that waited for seconds has a stamp that is not believed, and so has none.
    steps = [b.t_device_ns - a.t_device_ns for a, b in itertools.pairwise(headers)
             if a.epoch == b.epoch and a.t_device_ns is not None and b.t_device_ns is not None]  # fmt: skip
    periods = np.array(steps) / (NS / 30)
    assert len(periods) > 30
    assert periods.min() > 0
    assert np.abs(periods - 1).min() < 0.1


def test_a_camera_that_is_unplugged_is_missed_and_comes_back_in_a_new_epoch(lived: Lived) -> None:
    assert "camera" in lived.log, lived.log
    assert "unplugged" in lived.log, lived.log
    epochs = [m.header.epoch for m in lived.messages["camera"]]
    assert len({*epochs}) == len(list(itertools.groupby(epochs))) == 2
    assert lived.unplugged_at <= lived.back_at < len(lived.predictions)


def test_imu_values_in_the_recording_are_those_of_the_registers(lived: Lived) -> None:
    samples = np.concatenate([array(message) for message in lived.messages["imu"]])
    accels = [2 * 9.80665, -9.80665, 4 * 9.80665]
    assert samples["accel"] == pytest.approx(np.broadcast_to(accels, (len(samples), 3)), rel=1e-6)
    rates = [radians(1000) * count / 32768 for count in COUNTS[4:]]
    assert samples["gyro"] == pytest.approx(np.broadcast_to(rates, (len(samples), 3)), rel=1e-6)


def test_every_message_is_accounted_for(lived: Lived) -> None:
    print({name: told.messages for name, told in lived.told.streams.items()}, len(lived.predictions))
    assert set(lived.told.streams) >= {"camera", "microphone", "imu"}
    assert all(told.balanced for told in lived.told.streams.values()), lived.told.streams
