"""What ``sensorium devices`` finds: in folders like the kernel's, with drivers absent or broken, on this machine."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes import lsl
from nodes.camera import Camera, usb
from nodes.imu import Imu
from nodes.lidar import Lidar
from nodes.lsl import Lsl
from nodes.microphone import Microphone
from pipeline.config import load_rig
from pipeline.devices import absences, flow, look, polling_ns, port_trouble, refusal, serial_ports
from pipeline.launch import check_rig_file
from pipeline.protocols import v4l2
from pipeline.reports import devices_text
from pipeline.source import KINDS, Found, Search, Source
from pipeline.strict import Document

SENSORIUM = str(Path(sys.executable).with_name("sensorium"))
HERE = "tests.test_devices"


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """Folders like /sys and /dev of a machine with an adapter, an I2C bus and two IIO devices."""
    sys, dev = tmp_path / "sys", tmp_path / "dev"
    port = sys / "devices/usb1/1-4/1-4:1.0/ttyUSB0"
    port.mkdir(parents=True)
    for name, text in (("idVendor", "10c4"), ("manufacturer", "Silicon Labs"), ("product", "CP2102 Bridge")):
        write(sys / "devices/usb1/1-4" / name, text + "\n")
    (sys / "class/tty/ttyUSB0").mkdir(parents=True)
    (sys / "class/tty/ttyUSB0/device").symlink_to(port)
    (sys / "class/tty/ttyAMA0").mkdir()
    write(dev / "ttyUSB0")
    (dev / "serial/by-id").mkdir(parents=True)
    (dev / "serial/by-id/usb-Silicon_Labs_CP2102-if00-port0").symlink_to(dev / "ttyUSB0")
    write(sys / "class/i2c-dev/i2c-1/name", "bcm2835 (i2c@7e804000)\n")
    write(sys / "bus/i2c/devices/1-0068/name", "ds1307\n")
    write(dev / "i2c-1")
    write(sys / "bus/iio/devices/iio:device0/name", "mpu6050\n")
    for kind in ("accel", "anglvel"):
        write(sys / f"bus/iio/devices/iio:device0/in_{kind}_x_raw", "0\n")
    write(sys / "bus/iio/devices/iio:device1/name", "bmp280\n")
    return sys, dev


class Everything(Source):
    """Finds what the tests put there."""

    searches: ClassVar[list[Search]] = []

    @classmethod
    def discover(cls) -> list[Search]:
        return cls.searches


class Broken(Source):
    @classmethod
    def discover(cls) -> list[Search]:
        raise ZeroDivisionError("of one\nby none")


class Hanging(Source):
    released = threading.Event()

    @classmethod
    def discover(cls) -> list[Search]:
        cls.released.wait()
        return []


def test_serial_ports_have_the_name_that_stays_and_what_the_adapter_says(machine: tuple[Path, Path]) -> None:
    (board, _, refused), (usb, about, fine) = serial_ports(*machine)
    assert usb.name == "usb-Silicon_Labs_CP2102-if00-port0"
    assert (about, fine) == ("Silicon Labs CP2102 Bridge", "")
    assert board.name == "ttyAMA0"
    assert "is not there" in refused


def test_how_long_a_ports_adapter_holds_bytes(machine: tuple[Path, Path]) -> None:
    sys, dev = machine
    stable = dev / "serial/by-id/usb-Silicon_Labs_CP2102-if00-port0"
    timer = sys / "devices/usb1/1-4/1-4:1.0/ttyUSB0/latency_timer"
    assert polling_ns(stable, sys) == 1_000_000  # a frame of USB, whatever the adapter
    for told, held_ms in (("16\n", 16), ("0\n", 1), ("odd\n", 1)):
        timer.write_text(told)
        assert polling_ns(stable, sys) == held_ms * 1_000_000
    assert polling_ns(dev / "ttyAMA0", sys) == polling_ns("/dev/none", sys) == 0
    assert "holds bytes" not in "".join(found.detail for found in Imu.discover(sys, dev)[0].found)
    timer.write_text("16\n")
    (usb,) = [found for found in Imu.discover(sys, dev)[0].found if "holds bytes" in found.detail]
    assert usb.settings == {"port": str(stable)}
    assert "for up to 16 ms" in usb.detail
    assert "echo 1 | sudo tee /sys/class/tty/ttyUSB0/device/latency_timer" in usb.detail


def test_an_imu_is_looked_for_in_three_places_and_no_bus_is_touched(machine: tuple[Path, Path]) -> None:
    serial, i2c, iio = Imu.discover(*machine)
    assert len(serial.found) == 2
    (bus,) = i2c.found
    assert bus.settings == {"i2c": 1}
    assert "ds1307 at 0x68" in bus.detail
    inertial, pressure = iio.found
    assert inertial.settings == {"iio": "iio:device0"}
    assert inertial.detail == "measures acceleration and angular rate"
    assert pressure.settings is None


def test_all_lines_together_are_a_rig_that_check_accepts(
    machine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = []
    for kind, searches in (("imu", Imu.discover(*machine)), ("lidar", Lidar.discover(*machine))):
        monkeypatch.setattr(Everything, "searches", searches)
        lines += [d.config for place in look({kind: f"{HERE}:Everything"}) for d in place.devices if d.config]
    assert [line.partition(":")[0] for line in lines] == ["imu", "imu2", "imu3", "imu4", "lidar", "lidar2"]
    rig = tmp_path / "rig.yaml"
    rig.write_text("name: all\nsources:\n" + "".join(f"  {line}\n" for line in lines))
    check_rig_file(load_rig(rig), False)


@given(
    st.dictionaries(
        st.sampled_from(["device", "name"]),
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"])) | st.integers() | st.booleans(),
    )
)
def test_what_is_printed_is_read_as_it_was_meant(settings: dict[str, object]) -> None:
    assert Document(f"settings: {flow(settings)}\n", "rig.yaml").value == {"settings": settings}


@pytest.mark.parametrize(
    "name", ["no", "1e5", "0x1f", "USB: Audio", "a # b", "{x}", "~", "null", "12", "C920", "é", ""]
)
def test_names_that_yaml_would_misread_are_quoted(name: str) -> None:
    assert Document(f"settings: {flow({'device': name})}\n", "rig.yaml").value == {"settings": {"device": name}}


def test_a_driver_that_fails_or_hangs_is_one_line_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Everything, "searches", [Search(looked_for="x", found=[Found(name="X", settings={})])])
    kinds = {kind: f"{HERE}:{kind.capitalize()}" for kind in ("broken", "hanging", "everything")}
    try:
        broken, hanging, fine = look(kinds | {"absent": "nowhere.at_all:Sensor"}, limit_s=0.5)[:3]
    finally:
        Hanging.released.set()
    assert broken.trouble == "its driver fails: ZeroDivisionError: of one by none"
    assert "does not answer" in hanging.trouble
    assert fine.devices[0].config == "everything: {kind: everything}"
    assert len(str(devices_text([broken])).splitlines()) == 1


def test_a_module_that_cannot_be_loaded_is_one_line() -> None:
    (place,) = look({"absent": "nowhere.at_all:Sensor"})
    assert "cannot be imported" in place.trouble


@pytest.mark.parametrize(
    ("source", "module", "remedy"),
    [(Microphone, "sounddevice", "libportaudio2"), (Lsl, "pylsl", "pip install -e '.[lsl]'")],
)
def test_a_driver_that_is_not_installed_says_how_to_get_it(
    source: type[Source], module: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (search,) = source.discover()
    assert remedy in search.trouble
    assert not search.found


def test_a_device_that_may_not_be_opened_says_which_group_may(
    machine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "usermod -aG i2c" in refusal(machine[1] / "i2c-1", "i2c")


def test_sound_inputs_are_named_and_equal_names_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["Webcam", "Speaker", "USB Audio", "USB Audio"]
    devices = [{"name": name, "max_input_channels": 0 if name == "Speaker" else 2, "default_samplerate": 44100.0}
               for name in names]  # fmt: skip
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(query_devices=lambda: devices))
    (search,) = Microphone.discover()
    assert [found.settings for found in search.found] == [{"device": "Webcam"}, {"device": 2}, {"device": 3}]
    assert search.found[0].detail == "2 channels, 44100 Hz by default"


def test_lsl_streams_are_named_by_what_is_surest_and_markers_are_no_source() -> None:
    said = {"name": "Amp", "type": "EEG", "hostname": "lab", "source_id": "amp-1", "nominal_srate": 250.0,
            "channel_count": 8}  # fmt: skip
    info = SimpleNamespace(**{key: lambda value=value: value for key, value in said.items()})
    assert lsl._found(info, False).settings == {"source_id": "amp-1"}
    assert lsl._found(info, False).detail == "8 channels, 250 Hz"
    assert lsl._found(info, True).settings is None
    info.source_id = lambda: ""
    assert lsl._found(info, False).settings == {"name": "Amp", "type": "EEG"}


def webcam(request: int, entry: bytearray) -> None:
    """The kernel's answers for a camera with two formats, one of them with a range of sizes."""
    index = struct.unpack_from("=I", entry)[0]
    listed: list[tuple[int, bytes]]
    if request == v4l2.ENUM_FMT:
        listed = [(44, b"MJPG"), (44, b"YUYV")]
    elif request == v4l2.ENUM_SIZES:
        discrete = [(8, struct.pack("=3I", 1, w, h)) for w, h in ((1920, 1080), (1280, 720))]
        listed = discrete if entry[4:8] == b"MJPG" else [(8, struct.pack("=7I", 3, 16, 640, 8, 16, 480, 8))]
    else:
        listed = [(16, struct.pack("=3I", 1, 1, rate)) for rate in (30, 60)]
    if index >= len(listed):
        raise OSError(errno.EINVAL, "no more")
    at, answer = listed[index]
    entry[at : at + len(answer)] = answer


def test_a_cameras_modes_are_those_that_the_kernel_lists() -> None:
    found = v4l2.modes(webcam)
    assert found == [
        v4l2.Mode("MJPG", 1920, 1080, 60.0),
        v4l2.Mode("MJPG", 1280, 720, 60.0),
        v4l2.Mode("YUYV", 640, 480, 60.0),
    ]
    assert usb._usual(found) == {"width": 1280, "height": 720, "rate_hz": 30.0}
    assert usb._listed(found).splitlines()[0] == "MJPG: 1920x1080 at 60 Hz, 1280x720 at 60 Hz"


def test_a_list_of_modes_that_never_ends_is_left() -> None:
    def endless(request: int, entry: bytearray) -> None:
        if request != v4l2.ENUM_FMT:
            raise OSError(errno.EINVAL, "no more")

    assert v4l2.modes(endless) == []


def test_the_command_says_what_is_here_or_where_it_looked(tmp_path: Path) -> None:
    shown = subprocess.run([SENSORIUM, "devices"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr
    told = subprocess.run([SENSORIUM, "devices", "--json"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    places = json.loads(told.stdout)["places"]
    assert {"camera", "microphone", "imu", "lidar", "lsl"} == {place["kind"] for place in places} <= set(KINDS)
    for place in places:
        assert place["looked_for"]
        assert place["devices"] or f"{place['kind']}: " in shown.stdout
    lines = [device["config"] for place in places for device in place["devices"] if device["config"]]
    if lines:
        (tmp_path / "rig.yaml").write_text("name: all\nsources:\n" + "".join(f"  {line}\n" for line in lines))
        checked = subprocess.run([SENSORIUM, "check", "rig.yaml"], capture_output=True, text=True, cwd=tmp_path)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("kind", "given", "said"), [
    (Camera, {"device": "No Such Camera"}, "has `No Such Camera` in its name"), (Camera, {"device": 98}, "is not here"),
    (Camera, {"device": "clips/none.mp4"}, "no such file"), (Camera, {"file": __file__}, ""),
    (Camera, {"device": "rtsp://127.0.0.1:9/"}, ""), (Imu, {"port": "/dev/ttyNone"}, "/dev/ttyNone is not here"),
    (Imu, {"i2c": 97}, "/dev/i2c-97 is not here"), (Imu, {"iio": "none"}, "no IIO device `none`"),
    (Imu, {"port": "/dev/null"}, ""), (Lidar, {"sensor": "velodyne"}, ""),
    (Lidar, {"sensor": "ouster", "metadata": "none.json"}, "none.json is not here"),
    (Lidar, {"sensor": "rplidar", "port": "/dev/ttyNone"}, "/dev/ttyNone is not here"),
    (Microphone, {"device": "No Such Input"}, "No Such Input|PortAudio|no sound input"),
])  # fmt: skip
def test_an_absent_device_is_a_note(kind: type[Source], given: dict[str, object], said: str) -> None:
    settings = Document("{}", "settings").decode(kind.Settings, value=given)
    notes = absences({"it": (kind, settings)})
    assert len(notes) == bool(said)
    assert all(re.search(f"it will be waited for: .*({said})", note) for note in notes), notes


def test_a_driver_that_hangs_or_fails_at_a_look_is_a_note() -> None:
    gate = threading.Event()

    class Hangs(Source):
        @classmethod
        def absence(cls, settings: object) -> str:
            gate.wait()
            return ""

    class Fails(Source):
        @classmethod
        def absence(cls, settings: object) -> str:
            raise OSError("no bus")

    try:
        assert absences({"a": (Hangs, None), "b": (Fails, None)}, limit_s=0.1) == [
            "a will be waited for: its driver does not answer within 0.1 s.",
            "b will be waited for: its driver fails: OSError: no bus",
        ]
    finally:
        gate.set()


def test_check_names_absent_devices_and_is_content(tmp_path: Path) -> None:
    (tmp_path / "rig.yaml").write_text(
        "name: away\nsources: {imu: {kind: imu, port: /dev/ttyNone}, camera: {kind: synthetic, payload: frame}}\n"
        "record: {path: out.mcap}\n"
    )
    shown = subprocess.run([SENSORIUM, "check", "rig.yaml"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "note: imu will be waited for: the IMU's /dev/ttyNone is not here." in " ".join(shown.stdout.split())
    told = subprocess.run(
        [SENSORIUM, "check", "rig.yaml", "--json"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert json.loads(told.stdout)["absent"] == ["imu will be waited for: the IMU's /dev/ttyNone is not here."]


def test_what_may_not_be_opened_says_so_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The superuser may open everything, so the kernel's answer is stood in for."""
    path = tmp_path / "ttyUSB0"
    path.touch()
    clip = tmp_path / "clip.mp4"
    clip.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    joins = "sudo usermod -aG dialout $USER, and log in again."
    assert port_trouble(str(path), OSError(13, "x")) == f"you may not open it; join its group: {joins}"
    for kind, extra in ((Imu, {}), (Lidar, {"sensor": "rplidar"})):
        settings = Document("{}", "settings").decode(kind.Settings, value=extra | {"port": str(path)})
        assert kind.absence(settings).endswith(joins)
    for key in ("file", "device"):
        settings = Document("{}", "settings").decode(Camera.Settings, value={key: str(clip)})
        assert "you may not read this file" in Camera.absence(settings)


def test_a_port_or_a_clip_that_is_none_says_what_is_here(tmp_path: Path) -> None:
    assert "it is not here; serial ports here: " in port_trouble("/dev/ttyNone", OSError(2, "x"))
    assert port_trouble("/dev/null", OSError("odd")) == "odd. Another program may use it, or it is no serial port."
    settings = Document("{}", "settings").decode(Camera.Settings, value={"device": str(tmp_path)})
    assert "is no file that could be played; a camera on this machine is named by" in Camera.absence(settings)
