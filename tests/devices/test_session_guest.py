"""Whole sessions on kernel devices: the camera and the sound card through `sensorium run` to predictions, the camera
unplugged and back, and the IMU's values in the recording as they stand in its registers."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from math import radians
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

from nodes.camera import usb_cameras
from pipeline.clock import SystemClock
from pipeline.config import load_rig
from pipeline.explain import Session as Recorded
from pipeline.explain import explain
from pipeline.launch import Session
from pipeline.messages import array
from pipeline.prediction import Prediction
from pipeline.recording import PREDICTION_TOPIC, RecordingReader
from tests.conftest import ROOT
from tests.devices.test_imu_guest import ADDRESS, COUNTS, bound, stub
from tests.devices.test_microphone_guest import CARDS
from tests.rigs import short_folder

NS = 1_000_000_000
PATIENT = {"start_s": 240, "hang_ms": 120_000}
LENIENT = {"max_delay_ms": 30_000, "idle_ms": 30_000}
"""An emulated machine takes its time to load a program, and to run it: what comes is looked at here, not how soon."""
pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        "SENSORIUM_GUEST_SESSIONS" not in os.environ,
        reason="a session of six processes takes an emulated machine many minutes: SENSORIUM_GUEST_SESSIONS=1 runs it",
    ),
    pytest.mark.skipif(
        not any("vivid" in name for name in usb_cameras().values()), reason="no vivid camera: modprobe vivid"
    ),
    pytest.mark.skipif(
        not CARDS.exists() or "Loopback" not in CARDS.read_text(), reason="no loopback card: modprobe snd-aloop"
    ),
]


def rig_file(folder: Path, **more: Any) -> Path:
    """The kernel's devices with the shipped model; its LiDAR never comes."""
    sources: dict[str, Any] = {
        "camera": {"kind": "camera", "device": "vivid", "width": 320, "height": 180, "rate_hz": 30},
        "microphone": {"kind": "microphone", "device": "hw:0,1", "rate_hz": 16_000},
    }
    bus = stub()
    if bus is not None and bound() is None:
        import smbus2

        with smbus2.SMBus(bus) as opened:
            opened.write_byte_data(ADDRESS, 0x75, 0x68)
            for i, count in enumerate(COUNTS):
                high, low = (count & 0xFFFF).to_bytes(2, "big")
                opened.write_byte_data(ADDRESS, 0x3B + 2 * i, high)
                opened.write_byte_data(ADDRESS, 0x3C + 2 * i, low)
        sources["imu"] = {"kind": "imu", "i2c": bus, "rate_hz": 50, "batch_ms": 20, "accel_range_g": 8,
                          "gyro_range_dps": 1000}  # fmt: skip
    rig = {"name": "guest", "sources": sources, "bundle": {"path": str(ROOT / "models/demo"), "streams": dict.fromkeys(
        {"lidar"} | ({"imu"} - sources.keys()))}, "restart": PATIENT, "align": LENIENT} | more  # fmt: skip
    file = folder / "rig.yaml"
    file.write_text(yaml.safe_dump(rig))
    return file


def test_camera_and_sound_card_through_the_command_to_predictions(tmp_path: Path) -> None:
    out = tmp_path / "out.mcap"
    command = [str(Path(sys.executable).with_name("sensorium")), "run", str(rig_file(tmp_path)), "--record", str(out),
               "--duration", "8", "--json"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stderr
    predictions = [json.loads(line) for line in result.stdout.splitlines()]
    verdicts = {s: [p["streams"][s]["verdict"] for p in predictions] for s in ("camera", "microphone")}
    heard = {stream: sum(verdict in ("ok", "partial") for verdict in said) for stream, said in verdicts.items()}
    assert all(heard.values()), (len(predictions), heard, verdicts)
    headers: dict[str, list[Any]] = {}
    with RecordingReader(out) as reader:
        for message, _ in reader.messages():
            headers.setdefault(message.header.stream, []).append(message)
    stamps = [message.header.t_device_ns for message in headers["camera"]]
    # The driver paces the frames and stamps them; what an emulated machine could not take is a multiple of a period.
    periods = np.diff(np.array(stamps)) / (NS / 30)
    assert np.abs(periods - np.rint(periods)).max() < 0.2
    assert np.median(periods) < 1.5, periods
    if "imu" in headers:
        samples = np.concatenate([array(message) for message in headers["imu"]])
        accels = [2 * 9.80665, -9.80665, 4 * 9.80665]
        assert samples["accel"] == pytest.approx(np.broadcast_to(accels, (len(samples), 3)), rel=1e-6)
        rates = [radians(1000) * count / 32768 for count in COUNTS[4:]]
        assert samples["gyro"] == pytest.approx(np.broadcast_to(rates, (len(samples), 3)), rel=1e-6)
    found = explain(Recorded(out))
    print({name: told.messages for name, told in found.streams.items()}, heard, len(predictions))
    assert all(told.balanced for told in found.streams.values()), found.streams


def test_a_camera_that_is_unplugged_is_missed_and_comes_back(tmp_path: Path) -> None:
    if shutil.which("v4l2-ctl") is None:
        pytest.skip("no v4l2-ctl: apt-get install v4l-utils")
    out = tmp_path / "out.mcap"
    rig = load_rig(rig_file(tmp_path, record={"path": str(out)}))
    with short_folder() as root:
        session = Session(rig, root=root)
        with session:
            wait_for(lambda: session.status().streams["camera"].verdict == "ok", "the camera is seen")
            epoch = session.status().streams["camera"].epoch
            subprocess.run(["v4l2-ctl", "-d", "/dev/video0", "-c", "disconnect=1"], check=True, capture_output=True)
            wait_for(lambda: "unplugged" in session.status().streams["camera"].note, "the camera is missed")
            wait_for(lambda: session.status().streams["camera"].epoch != epoch, "the camera is back")
            seen = session.status().streams["camera"].used
            wait_for(lambda: session.status().streams["camera"].used > seen + 5, "it is used again")
    with RecordingReader(out) as reader:
        epochs = [m.header.epoch for m, _ in reader.messages(["camera"])]
        predictions = [msgspec.json.decode(d, type=Prediction) for d, _, _ in reader.json(PREDICTION_TOPIC)]
    assert len({*epochs}) == len(list(itertools.groupby(epochs))) == 2
    assert [p.window.index for p in predictions] == list(
        range(predictions[0].window.index, predictions[0].window.index + len(predictions))
    )


def wait_for(condition: Any, what: str, limit_s: float = 200) -> None:
    clock = SystemClock()
    while not condition():
        assert clock.now_ns() < limit_s * NS, f"not within {limit_s} s: {what}"
        clock.wait_until(clock.now_ns() + NS // 10)
