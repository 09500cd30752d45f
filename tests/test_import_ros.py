"""Bags: a message there is a message here, with the stamp as its capture and its time in the bag as its arrival."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import zstandard
from foxglove import messages as foxglove
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcap.writer import IndexType
from mcap.writer import Writer as McapWriter

from pipeline.cli import main
from pipeline.errors import ConfigError, RecordingError
from pipeline.importing import ImportOptions, import_file
from pipeline.importing.ros_messages import metres_from
from pipeline.messages import AudioLayout, FrameLayout, Message, SignalLayout, array
from pipeline.recording import RecordingReader, SessionInfo, summarise
from pipeline.wire import decode_frame
from tests.conftest import ROOT
from tests.ros_bags import KINDS, MS, T0, Ros, S, Stores, example, get_types_from_msg, get_typestore, ros_of, write_bag

Made = list[tuple[str, int, Any]]


def import_(path: Path, *streams: str, **options: Any) -> tuple[SessionInfo, dict[str, list[Message]]]:
    """What becomes of a bag: what is said of the session, and the messages of each stream."""
    out = path.parent / "imported.mcap"
    info = import_file(path, out, ImportOptions(streams=streams, **options), overwrite=True)
    with RecordingReader(out) as reader:
        found: dict[str, list[Message]] = {stream: [] for stream in reader.streams}
        for message, arrival_ns in reader.messages():
            assert arrival_ns == message.header.t_receipt_ns
            found[message.header.stream].append(message)
    return info, found


def imu(ros: Ros, stamp: int, **given: Any) -> Any:
    vector = ros.make("geometry_msgs/msg/Vector3", x=1.0, y=2.0, z=9.5)
    turn = ros.make("geometry_msgs/msg/Vector3", x=0.1, y=-0.2, z=0.3)
    return ros.make("sensor_msgs/msg/Imu", stamp=stamp, linear_acceleration=vector, angular_velocity=turn, **given)


def picture(ros: Ros, stamp: int, image: np.ndarray[Any, Any], encoding: str, **given: Any) -> Any:
    height, width = image.shape[:2]
    return ros.make("sensor_msgs/msg/Image", stamp=stamp, height=height, width=width, encoding=encoding,
                    **({"step": image.nbytes // height} | given), data=image.reshape(-1).view(np.uint8))  # fmt: skip


@pytest.fixture
def ros() -> Ros:
    return Ros(2)


@pytest.fixture
def bag(tmp_path: Path, ros: Ros) -> Callable[[Made], Path]:
    """Writes a folder of ROS 2 with these messages."""
    return lambda messages: write_bag(tmp_path, "db3", ros, messages)


# The real ones.


@pytest.fixture(scope="module")
def husky(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SessionInfo, Path]:
    out = tmp_path_factory.mktemp("husky") / "husky.mcap"
    return import_file(shared_data / "rosbags" / "husky.bag", out), out


@pytest.mark.slow
def test_a_husky_says_how_late_its_sensors_come(husky: tuple[SessionInfo, Path]) -> None:
    info, out = husky
    assert (info.arrival, info.complete, info.extra.get("left_out")) == ("received", True, None)
    streams = summarise(out)["streams"]
    assert {name: stream["messages"] for name, stream in streams.items()} == {
        "imu_data": 11865, "husky_velocity_controller_odom": 3952, "fix": 989,
    }  # fmt: skip
    assert streams["imu_data"]["delay_ms"]["p50"] == pytest.approx(25.15, abs=0.01)
    assert streams["imu_data"]["delay_ms"]["max"] == pytest.approx(36.33, abs=0.01)
    assert streams["husky_velocity_controller_odom"]["max_gap_ms"] == pytest.approx(208.24, abs=0.01)
    assert streams["imu_data"]["stats"]["accel"]["mean_norm"] == pytest.approx(9.8, abs=0.3)
    assert info.unix_ns == 1432235497_988949113  # the stamp of its first IMU message
    assert info.extra["origin.fix"].startswith("42.375812000 deg, -71.147394667 deg")


@pytest.mark.slow
def test_the_same_drive_as_mcap_gives_the_same_messages(
    husky: tuple[SessionInfo, Path], shared_data: Path, tmp_path: Path
) -> None:
    import_file(shared_data / "rosbags" / "husky_60s.mcap", tmp_path / "husky.mcap")
    with RecordingReader(husky[1]) as bag, RecordingReader(tmp_path / "husky.mcap") as mcap:
        count = 0
        for ours, theirs in zip(bag.messages(), mcap.messages(), strict=False):
            assert ours == theirs
            count += 1
    assert count == 1801 + 600 + 150


# Every kind of file.


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bag_gives_the_same_session(tmp_path: Path, kind: str) -> None:
    ros = ros_of(kind)
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    messages: Made = []
    for k in range(5):
        at = T0 + k * 10 * MS
        messages.append(("/imu/data", at + 25 * MS, imu(ros, at)))
        messages.append(("/cam/image_raw", at + 26 * MS, picture(ros, at + 7 * MS, pixels, "rgb8")))
    messages.append(("/chatter", T0 + 80 * MS, ros.make("std_msgs/msg/String", data="hallo")))
    path = write_bag(tmp_path, kind, ros, messages)
    info, found = import_(path, jpeg_quality=None)
    assert info.complete
    assert info.unix_ns == T0
    assert {stream: len(of) for stream, of in found.items()} == {"imu_data": 5, "cam_image_raw": 5, "chatter": 1}
    header = found["imu_data"][3].header
    assert (header.t_capture_ns, header.t_receipt_ns, header.t_device_ns) == (30 * MS, 55 * MS, T0 + 30 * MS)
    assert [m.header.seq for m in found["imu_data"]] == list(range(5))
    sample = array(found["imu_data"][0])[0]
    assert np.allclose(sample["accel"], [1, 2, 9.5])
    assert np.allclose(sample["gyro"], [0.1, -0.2, 0.3])
    assert (array(found["cam_image_raw"][0]) == pixels[..., ::-1]).all()
    assert found["chatter"][0].header.t_capture_ns == 80 * MS
    assert array(found["chatter"][0]).tobytes() == b"hallo"
    assert info.extra["clock.chatter"] == "no stamps: arrival stands in for capture"


def test_one_file_of_a_folder_can_be_imported_by_itself(tmp_path: Path, ros: Ros) -> None:
    path = write_bag(tmp_path, "db3", ros, [("/imu", T0, imu(ros, T0))])
    (path / "metadata.yaml").unlink()
    with pytest.raises(RecordingError, match=r"lacks its metadata.yaml.*drive.db3.*reindex"):
        import_(path)
    _, found = import_(path / "drive.db3")
    assert len(found["imu"]) == 1


# What messages mean.


def test_a_sensor_that_is_declared_absent_is_not_zero(bag: Callable[[Made], Path], ros: Ros) -> None:
    absent = np.zeros(9)
    absent[0] = -1
    _, found = import_(bag([("/imu", T0, imu(ros, T0, angular_velocity_covariance=absent))]))
    sample = array(found["imu"][0])[0]
    assert np.isnan(sample["gyro"]).all()
    assert np.allclose(sample["accel"], [1, 2, 9.5])


@pytest.mark.parametrize(
    ("encoding", "order"),
    [("bgr8", "bgr"), ("8UC3", "bgr"), ("rgb8", "rgb"), ("bgra8", "bgrx"), ("rgba8", "rgbx"), ("mono8", "m"),
     ("8UC1", "m")],
)  # fmt: skip
def test_pictures_of_every_order_of_colours(bag: Callable[[Made], Path], ros: Ros, encoding: str, order: str) -> None:
    bgr = np.random.default_rng(3).integers(0, 256, (5, 7, 3), np.uint8)
    planes = {"b": bgr[..., 0], "g": bgr[..., 1], "r": bgr[..., 2], "x": bgr[..., 0] * 0 + 255, "m": bgr[..., 1]}
    image = np.stack([planes[letter] for letter in order], axis=2)
    padded = np.zeros((5, 40), np.uint8)  # rows may be padded
    padded[:, : 7 * len(order)] = image.reshape(5, -1)
    message = picture(ros, T0, image, encoding, step=40)
    message.data = padded.reshape(-1)
    _, found = import_(bag([("/cam", T0, message)]), jpeg_quality=None)
    expected = bgr if order != "m" else bgr[..., 1]
    assert (array(found["cam"][0]) == expected).all()


@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_a_bayer_pattern_gives_its_colour(tmp_path: Path, ros: Ros, pattern: str) -> None:
    value = {"r": 200, "g": 100, "b": 30}
    tile = np.array([value[letter] for letter in pattern], np.uint8).reshape(2, 2)
    flat = np.tile(tile, (8, 8))
    wide = (flat.astype(np.uint16) << 8).astype(">u2")
    for image, encoding, big in ((flat, f"bayer_{pattern}8", 0), (wide, f"bayer_{pattern}16", 1)):
        message = picture(ros, T0, image, encoding, step=image.nbytes // 16, is_bigendian=big)
        _, found = import_(write_bag(tmp_path, "mcap", ros, [("/cam", T0, message)]), jpeg_quality=None)
        assert array(found["cam"][0])[8, 8].tolist() == [30, 100, 200]


@pytest.mark.parametrize(("encoding", "code"), [("yuv422", "uyvy"), ("yuv422_yuy2", "yuyv")])
def test_yuv_gives_its_colour(bag: Callable[[Made], Path], ros: Ros, encoding: str, code: str) -> None:
    luma, u, v = 120, 90, 200
    four = {"uyvy": [u, luma, v, luma], "yuyv": [luma, u, luma, v]}[code]
    image = np.tile(np.array(four, np.uint8), (4, 4)).reshape(4, 8, 2)
    _, found = import_(bag([("/cam", T0, picture(ros, T0, image, encoding))]), jpeg_quality=None)
    blue, green, red = array(found["cam"][0])[1, 1].astype(int)
    assert red > 200 > 100 > green
    assert blue < 100


def test_mono16_keeps_its_high_byte_in_either_byte_order(bag: Callable[[Made], Path], ros: Ros) -> None:
    image = np.array([[0x1234, 0xFF00]], np.uint16)
    made = [("/le", T0, picture(ros, T0, image.astype("<u2"), "mono16")),
            ("/be", T0, picture(ros, T0, image.astype(">u2"), "mono16", is_bigendian=1))]  # fmt: skip
    _, found = import_(bag(made), jpeg_quality=None)
    assert array(found["le"][0]).tolist() == array(found["be"][0]).tolist() == [[0x12, 0xFF]]


def test_compressed_pictures_are_kept_and_others_are_compressed(bag: Callable[[Made], Path], ros: Ros) -> None:
    image = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8), (0, 0), 5)
    jpeg, png = cv2.imencode(".jpg", image)[1].reshape(-1), cv2.imencode(".png", image)[1].reshape(-1)
    compressed = "sensor_msgs/msg/CompressedImage"
    made: Made = [
        ("/a", T0, ros.make(compressed, stamp=T0, format="rgb8; jpeg compressed bgr8", data=jpeg)),
        ("/b", T0, ros.make(compressed, stamp=T0, format="png", data=png)),
        ("/c", T0, ros.make(compressed, stamp=T0, format="jpeg", data=jpeg)),
        ("/c", T0 + MS, ros.make(compressed, stamp=T0 + MS, format="jpeg", data=jpeg[:200])),
        ("/c", T0 + 2 * MS, ros.make(compressed, stamp=T0 + 2 * MS, format="jpeg", data=jpeg[:2])),
        ("/d", T0, ros.make(compressed, stamp=T0, format="16UC1; compressedDepth", data=png)),
    ]
    info, found = import_(bag(made))
    assert found["a"][0].data == jpeg.tobytes()
    assert found["a"][0].header.layout == found["b"][0].header.layout == FrameLayout("jpeg", 48, 64)
    assert cv2.PSNR(decode_frame(found["b"][0]), image) > 35
    assert len(found["c"]) == 1
    assert not info.complete
    assert "2 messages of c: the picture cannot be decoded" in info.note
    assert "1 messages of /d (sensor_msgs/msg/CompressedImage): depth is no picture" in info.extra["left_out"]


def test_a_scan_turns_counterclockwise_from_ahead(bag: Callable[[Made], Path], ros: Ros) -> None:
    ranges = np.array([1.0, 2.0, math.inf, math.nan, 0.01, 100.0, 4.0], np.float32)
    scan = ros.make("sensor_msgs/msg/LaserScan", stamp=T0, angle_min=0.0, angle_increment=math.pi / 2,
                    time_increment=1 / 128, range_min=0.1, range_max=30.0, ranges=ranges,
                    intensities=np.arange(7, dtype=np.float32))  # fmt: skip
    _, found = import_(bag([("/scan", T0 + 70 * MS, scan)]))
    header, points = found["scan"][0].header, array(found["scan"][0])
    assert header.t_capture_ns == 0  # the last ray, six after the stamp: nothing is earlier
    assert header.t_receipt_ns == 70 * MS - 6 * S // 128
    assert np.allclose(points["x"], [1, 0, -4], atol=1e-6)
    assert np.allclose(points["y"], [0, 2, 0], atol=1e-5)
    assert points["intensity"].tolist() == [0, 1, 6]
    assert points["offset_ns"].tolist() == [-6 * S // 128, -5 * S // 128, 0]


def sound(ros: Ros, type_: str, samples: Any, stamp: int | None = None) -> Any:
    data = ros.make("audio_common_msgs/msg/AudioData", data=np.asarray(samples, "<i2").reshape(-1).view(np.uint8))
    if type_ == "AudioData":
        return data
    return ros.make("audio_common_msgs/msg/AudioDataStamped", stamp=stamp, audio=data)


def test_sound_lies_end_to_end_whatever_its_stamps_jitter(bag: Callable[[Made], Path], ros: Ros) -> None:
    info_message = ros.make("audio_common_msgs/msg/AudioInfo", channels=2, sample_rate=16000, sample_format="S16LE",
                            bitrate=0, coding_format="wave")  # fmt: skip
    made: Made = [("/audio/info", T0, info_message)]
    jitter = [0, 3, -4, 2, 0, 5]
    for k, late in enumerate(jitter):
        block = np.full((160, 2), k)
        stamp = T0 + k * 10 * MS + late * MS + (50 * MS if k >= 4 else 0)
        made.append(("/audio/stamped", stamp + 12 * MS, sound(ros, "AudioDataStamped", block, stamp)))
    made += [("/audio/plain", T0 + (k + 1) * 10 * MS, sound(ros, "AudioData", np.full((160, 2), k))) for k in range(4)]
    made.sort(key=lambda entry: entry[1])
    info, found = import_(bag(made))
    assert info.complete
    blocks = found["audio_stamped"]
    assert {block.header.layout for block in blocks} == {AudioLayout(16000, 2, 160)}
    spans = [(b.header.t_capture_ns // MS, b.header.t_end_ns // MS) for b in blocks]
    assert spans == [(0, 10), (10, 20), (20, 30), (30, 40), (90, 100), (100, 110)]  # 50 ms are missing, and stay so
    assert [b.header.t_capture_ns for b in found["audio_plain"]] == [k * 10 * MS for k in range(4)]
    assert array(found["audio_plain"][3]).tolist() == [[3, 3]] * 160
    assert "1 messages of /audio/info" in info.extra["left_out"]


def test_sound_that_says_itself_what_it_is(bag: Callable[[Made], Path], ros: Ros) -> None:
    kind = ros.make("audio_common_msgs/msg/AudioKind", channels=1, rate=8000, chunk=4)
    data = ros.make("audio_common_msgs/msg/AudioInt16", float32_data=np.array([0, 1, -1, 0.5], np.float32))
    audio = ros.make("audio_common_msgs/msg/Audio", audio_data=data, info=kind)
    _, found = import_(bag([("/mic", T0, ros.make("audio_common_msgs/msg/AudioStamped", stamp=T0, audio=audio))]))
    assert array(found["mic"][0])[:, 0].tolist() == [0, 32767, -32767, 16384]


def test_sound_without_its_kind_or_of_another_is_left_out(tmp_path: Path, ros: Ros) -> None:
    mp3 = ros.make("audio_common_msgs/msg/AudioInfo", channels=1, sample_rate=16000, coding_format="mp3")
    plain = ("/a/audio", T0, sound(ros, "AudioData", [1, 2]))
    with pytest.raises(RecordingError, match="no AudioInfo in the bag"):
        import_(write_bag(tmp_path, "mcap", ros, [plain]))
    with pytest.raises(RecordingError, match="its sound is mp3; only PCM"):
        import_(write_bag(tmp_path, "mcap", ros, [plain, ("/a/info", T0, mp3)]))


def test_numbers_become_named_channels(bag: Callable[[Made], Path], ros: Ros) -> None:
    twist = ros.make("geometry_msgs/msg/Twist", linear=ros.make("geometry_msgs/msg/Vector3", x=0.5, y=0.0, z=0.0))
    joints = ros.make("sensor_msgs/msg/JointState", stamp=T0, name=["hip", "knee"], position=np.array([1.0, 2.0]))
    made: Made = [
        ("/vel", T0, ros.make("geometry_msgs/msg/TwistStamped", stamp=T0, twist=twist)),
        ("/joints", T0, joints),
        ("/level", T0, ros.make("std_msgs/msg/Float64", data=0.25)),
        ("/on", T0, ros.make("std_msgs/msg/Bool", data=True)),
        ("/list", T0, ros.make("std_msgs/msg/Float32MultiArray", data=np.arange(3, dtype=np.float32))),
        ("/list", T0 + MS, ros.make("std_msgs/msg/Float32MultiArray", data=np.arange(4, dtype=np.float32))),
    ]
    info, found = import_(bag(made))
    layout = found["vel"][0].header.layout
    assert isinstance(layout, SignalLayout)
    assert layout.channels == tuple(f"twist.{kind}.{axis}" for kind in ("linear", "angular") for axis in "xyz")
    assert array(found["vel"][0])["value"][0].tolist() == [0.5, 0, 0, 0, 0, 0]
    assert found["joints"][0].header.layout == SignalLayout(1, ("position.hip", "position.knee"))
    assert array(found["level"][0])["value"].tolist() == [[0.25]]
    assert array(found["on"][0])["value"].tolist() == [[1.0]]
    assert len(found["list"]) == 1
    assert info.note == "dropped: 1 messages of list: its numbers are not those of the first message"


def test_a_position_is_in_metres_from_the_first_fix(bag: Callable[[Made], Path], ros: Ros) -> None:
    no_fix = ros.make("sensor_msgs/msg/NavSatStatus", status=-1)
    fixes = [(0.0, 0.0, 0.0), (48.1, 11.5, 500.0), (48.1009, 11.5, 503.0)]
    made = [("/gps", T0 + k * S, ros.make("sensor_msgs/msg/NavSatFix", stamp=T0 + k * S, latitude=lat, longitude=lon,
             altitude=up, **({} if k else {"status": no_fix}))) for k, (lat, lon, up) in enumerate(fixes)]  # fmt: skip
    info, found = import_(bag(made))
    assert info.extra["origin.gps"] == "48.100000000 deg, 11.500000000 deg, 500.000 m"
    values = [array(message)["value"][0] for message in found["gps"]]
    assert np.isnan(values[0][3:6]).all()
    assert values[1][3:6].tolist() == [0, 0, 0]
    assert values[2][3:6] == pytest.approx([0, 100.09, 3], abs=0.02)


def test_metres_agree_with_the_ellipsoid() -> None:
    def earth(fix: tuple[float, float, float]) -> np.ndarray[Any, Any]:
        lat, lon, up = math.radians(fix[0]), math.radians(fix[1]), fix[2]
        squared = 0.00669437999014
        n = 6378137.0 / math.sqrt(1 - squared * math.sin(lat) ** 2)
        return np.array([(n + up) * math.cos(lat) * math.cos(lon), (n + up) * math.cos(lat) * math.sin(lon),
                         (n * (1 - squared) + up) * math.sin(lat)])  # fmt: skip

    for origin in ((48.1, 11.5, 500.0), (-33.9, 179.999, 0.0), (69.6, -18.9, 20.0)):
        fix = (origin[0] + 0.01, (origin[1] + 0.01 + 180) % 360 - 180, origin[2] + 30)
        distance = float(np.linalg.norm(earth(fix) - earth(origin)))
        assert math.hypot(*metres_from(origin, fix)) == pytest.approx(distance, abs=0.5)


# Time.


def test_stamps_of_another_clock_are_mapped_and_the_recording_says_so(bag: Callable[[Made], Path], ros: Ros) -> None:
    random = np.random.default_rng(5)
    made = []
    for k in range(500):
        taken = k * 40 * MS
        made.append(("/imu", T0 + taken + 5 * MS + int(random.exponential(2 * MS)), imu(ros, 17 * S + taken)))
    made.sort(key=lambda entry: entry[1])
    info, found = import_(bag(made))
    assert info.extra["clock.imu"].startswith("its own (17")
    headers = [message.header for message in found["imu"]]
    assert headers[0].t_device_ns == 17 * S
    error = [T0 + k * 40 * MS + 5 * MS - info.unix_ns - header.t_capture_ns for k, header in enumerate(headers)]
    assert max(map(abs, error[250:])) < MS  # after 10 s
    assert all(abs(e) <= header.uncertainty_ns for e, header in zip(error[250:], headers[250:], strict=True))


def test_a_stamp_that_strays_is_dropped_and_does_not_end_the_stream(bag: Callable[[Made], Path], ros: Ros) -> None:
    stamps = [0, 10 * MS, 3600 * S, 20 * MS, 20 * MS, 30 * MS]
    made = [("/imu", T0 + k * 10 * MS, imu(ros, T0 + stamp)) for k, stamp in enumerate(stamps)]
    info, found = import_(bag(made))
    assert [message.header.t_capture_ns for message in found["imu"]] == [0, 10 * MS, 20 * MS, 30 * MS]
    assert info.note == ("dropped: 1 imu out of order, "
                         "dropped: 1 messages of imu: its stamp is more than a minute from its arrival")  # fmt: skip
    assert not info.complete


def test_what_arrives_before_it_was_captured_is_kept_so(bag: Callable[[Made], Path], ros: Ros) -> None:
    info, found = import_(bag([("/imu", T0 - 3 * MS, imu(ros, T0))]))
    assert (found["imu"][0].header.t_capture_ns, found["imu"][0].header.t_receipt_ns) == (0, -3 * MS)
    assert info.unix_ns == T0


def test_labels_count_from_the_bags_first_message(bag: Callable[[Made], Path], ros: Ros, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("start_s,end_s,label\n1,2,turn\n")
    path = bag([("/imu", T0 + 25 * MS, imu(ros, T0))])
    import_file(path, tmp_path / "a.mcap", labels=tmp_path / "labels.csv")
    with RecordingReader(tmp_path / "a.mcap") as reader:
        assert [(label.start_ns, label.label) for label in reader.labels()] == [(S + 25 * MS, "turn")]


# What is asked for, and what cannot be.


@pytest.fixture
def two(bag: Callable[[Made], Path], ros: Ros) -> Path:
    odd = ros.make("audio_common_msgs/msg/Odd", words="x")
    clock = ros.make("rosgraph_msgs/msg/Clock")
    made = [("/a/b", T0, imu(ros, T0)), ("/a_b", T0, imu(ros, T0)), ("/odd", T0, odd), ("/clock", T0, clock),
            ("/clock", T0 + 1, clock)]  # fmt: skip
    return bag(made)


def test_two_topics_of_one_name_have_to_be_named_apart(two: Path) -> None:
    with pytest.raises(ConfigError, match=r"`/a/b` and `/a_b` of drive would both be called `a_b`.*--streams"):
        import_(two)
    info, found = import_(two, "front=/a/b", "/a_b")
    assert set(found) == {"front", "a_b"}
    assert "left_out" not in info.extra  # nobody asked for the rest


def test_what_there_is_no_payload_for_is_listed(two: Path, ros: Ros) -> None:
    with pytest.raises(ConfigError, match=r"has no stream `/a/c`. Did you mean `/a/b`\? It has `/a/b`, `/a_b`"):
        import_(two, "/a/c")
    with pytest.raises(ConfigError, match=r"2 messages of /clock \(rosgraph_msgs/msg/Clock\): there is no payload"):
        import_(two, "x=/clock")
    with pytest.raises(ConfigError, match="asked for twice"):
        import_(two, "/a/b", "x=/a/b")
    with pytest.raises(ConfigError, match="no stream can be called `/x`"):
        import_(two, "/x=/a/b")
    path = write_bag(two.parent, "mcap", ros, [("/odd", T0, ros.make("audio_common_msgs/msg/Odd", words="x"))])
    with pytest.raises(RecordingError, match=r"nothing that can be imported: 1 messages of /odd .*no numbers"):
        import_(path)


@pytest.mark.parametrize(("kind", "cure"), [("bag", "rosbag reindex"), ("mcap", "mcap recover"), ("db3", "ros2 bag")])
def test_a_bag_that_is_cut_off_or_empty_is_one_error(tmp_path: Path, kind: str, cure: str) -> None:
    ros = ros_of(kind)
    path = write_bag(tmp_path, kind, ros, [("/imu", T0 + k, imu(ros, T0 + k)) for k in range(200)])
    file = path / "drive.db3" if kind == "db3" else path
    whole = file.read_bytes()
    for size in (10, 100, 5000, len(whole) // 2, len(whole) - 5000 if kind == "db3" else len(whole) - 1):
        file.write_bytes(whole[:size])
        nothing = kind == "mcap" and size < 100  # in which there is nothing to be cured
        with pytest.raises(RecordingError, match="before any message" if nothing else cure):
            import_(file)
    file.write_bytes(b"")
    with pytest.raises(RecordingError, match="is empty"):
        import_(file)
    file.write_bytes(b"something else entirely" * 100)
    with pytest.raises(RecordingError, match="cannot be read"):
        import_(file)
    assert not list(tmp_path.glob("imported*"))


def cut_bags(tmp_path: Path, kind: str, sizes: Callable[[int], Iterable[int]]) -> Iterator[tuple[int, str]]:
    """How a bag is refused that is cut to each of the sizes, which it gets from its own; nothing is left behind."""
    ros = ros_of(kind)
    path = write_bag(tmp_path, kind, ros, [("/imu", T0 + k, imu(ros, T0 + k)) for k in range(200)])
    file = path / "drive.db3" if kind.startswith("db3") else path
    whole = file.read_bytes()
    before = sorted(tmp_path.rglob("*"))
    for size in sizes(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(RecordingError) as told:
            import_(file)
        assert sorted(tmp_path.rglob("*")) == before
        yield size, str(told.value)


@pytest.mark.parametrize("kind", ["bag", "db3"])
def test_a_bag_that_is_cut_off_says_where_and_what_is_left(tmp_path: Path, kind: str) -> None:
    for size, said in cut_bags(tmp_path, kind, lambda whole: [1, 12, 50, *range(101, whole, whole // 23), whole - 1]):
        assert str(size) in said
        assert "opy it again" in said
        assert not re.search(r"magic|malformed|uint32|Header|not a database|args", said), said


def test_of_a_bag_of_ros_1_what_is_whole_is_told(tmp_path: Path) -> None:
    said = dict(cut_bags(tmp_path, "bag", lambda whole: [4000, 20_000, whole - 60, whole - 2]))
    nothing, within, behind, last = said.values()
    assert "ends after 4000 bytes, before any message" in nothing
    assert re.search(r"is cut off at byte 20000: its index should begin at byte \d+\. Not one chunk", within)
    for text in (behind, last):
        assert re.search(r"index, which begins at byte \d+, is not whole.*one chunk of messages up to byte \d+, comes "
                         r"back with: rosbag reindex drive\.bag$", text)  # fmt: skip


def test_a_bag_that_was_never_closed_has_no_index(tmp_path: Path) -> None:
    ros = Ros(1)
    path = write_bag(tmp_path, "bag", ros, [("/imu", T0, imu(ros, T0))])
    data = path.read_bytes()
    at = data.index(b"index_pos=") + len("index_pos=")
    path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])
    with pytest.raises(
        RecordingError, match=r"ends at byte \d+ without an index: its recorder was killed.*one chunk of"
    ):
        import_(path)


def test_of_a_database_no_byte_that_is_lacking_is_taken_for_zero(tmp_path: Path) -> None:
    [(size, said)] = cut_bags(tmp_path, "db3", lambda whole: [whole - 10])
    assert f"it has {size} bytes, and its beginning says {size + 10}" in said
    assert "comes back with: sqlite3 drive.db3 .dump | sed" in said
    with pytest.raises(RecordingError, match=rf"drive\.db3 is cut off .*has {size} bytes"):
        import_(tmp_path / "drive")  # the folder


@pytest.mark.skipif(shutil.which("sqlite3") is None, reason="the command sqlite3 is not installed")
def test_what_is_whole_in_a_database_comes_back_as_it_is_said(tmp_path: Path) -> None:
    [(_, said)] = cut_bags(tmp_path, "db3", lambda whole: [whole * 2 // 3])
    mend = said.partition("comes back with: ")[2].partition(" (`ros2")[0]
    subprocess.run(mend, shell=True, cwd=tmp_path / "drive", check=True, capture_output=True)
    _, found = import_(tmp_path / "drive" / "whole.db3")
    assert 50 < len(found["imu"]) < 200


@pytest.mark.parametrize("folder", [True, False])
def test_what_a_database_does_not_hold_yet_is_not_passed_over(ros: Any, tmp_path: Path, folder: bool) -> None:
    path = write_bag(tmp_path, "db3", ros, [("/imu", T0 + i * MS, imu(ros, T0 + i * MS)) for i in range(3)])
    database = path / "drive.db3"
    given = path if folder else database
    _, before = import_(given)
    recorder = sqlite3.connect(database)
    recorder.execute("PRAGMA journal_mode=WAL")
    recorder.execute("PRAGMA wal_autocheckpoint=0")
    recorder.execute("UPDATE messages SET data = (SELECT data FROM messages WHERE id = 2) WHERE id = 3")
    recorder.commit()
    with pytest.raises(RecordingError, match=r"db3-wal holds \d+ bytes .* drive.db3 'PRAGMA wal_checkpoint"):
        import_(given)
    recorder.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    recorder.close()
    _, after = import_(given)
    assert (len(before["imu"]), len(after["imu"])) == (3, 2)


@pytest.mark.parametrize(("kind", "what"), [("bag", "bag of ROS 1"), ("db3", "database, as ROS 2")])
def test_a_file_that_is_no_bag_is_told_so(tmp_path: Path, kind: str, what: str) -> None:
    file = tmp_path / f"a.{kind}"
    file.write_bytes(b"something else entirely" * 1000)
    with pytest.raises(RecordingError, match=f"it is no {what}"):
        import_(file)


@pytest.mark.parametrize(
    "options",
    [
        {"index_types": IndexType.NONE},
        {"use_chunking": False},
        {"use_statistics": False},
        {"repeat_channels": False},
        {"repeat_channels": False, "repeat_schemas": False, "use_statistics": False, "index_types": IndexType.NONE},
    ],
)
def test_a_bag_without_an_index_is_refused_with_its_cure(tmp_path: Path, ros: Ros, options: dict[str, Any]) -> None:
    with (tmp_path / "a.mcap").open("wb") as file:
        writer = McapWriter(file, **options)
        writer.start()
        schema = writer.register_schema("std_msgs/msg/Bool", "ros2msg", b"bool data")
        channel = writer.register_channel("/a", "cdr", schema)
        writer.add_message(channel, T0, ros.pack(ros.make("std_msgs/msg/Bool")), T0)
        writer.finish()
    with pytest.raises(RecordingError, match=r"no index.*mcap recover"):
        import_(tmp_path / "a.mcap")


def test_a_damaged_message_is_counted(tmp_path: Path, ros: Ros) -> None:
    whole = imu(ros, T0)
    pack = ros.pack
    ros.pack = lambda message: pack(message)[: 40 if message is not whole else None]  # type: ignore[method-assign]
    info, found = import_(write_bag(tmp_path, "mcap", ros, [("/imu", T0, whole), ("/imu", T0 + 1, imu(ros, T0 + 1))]))
    assert len(found["imu"]) == 1
    assert info.note == "dropped: 1 messages of imu: damaged"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    """A bag of each kind of single file, and its bytes."""
    made = {}
    for kind in ("bag", "mcap", "mcap-ros1", "db3"):
        ros, folder = ros_of(kind), tmp_path_factory.mktemp(kind)
        messages: Made = []
        for k in range(3):
            messages.append(("/imu", T0 + k * MS, imu(ros, T0 + k * MS)))
            messages.append(("/cam", T0 + k * MS, picture(ros, T0 + k * MS, np.zeros((4, 4), np.uint8), "mono8")))
        path = write_bag(folder, kind, ros, messages)
        path = path / "drive.db3" if kind == "db3" else path
        made[kind] = (path, path.read_bytes())
    return made


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(kind=st.sampled_from(["bag", "mcap", "mcap-ros1", "db3"]), data=st.data())
def test_a_damaged_bag_is_read_or_refused(whole: dict[str, tuple[Path, bytes]], kind: str, data: st.DataObject) -> None:
    path, content = whole[kind]
    damaged = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with contextlib.suppress(RecordingError, ConfigError):
        import_(path)


def test_a_type_of_a_known_name_with_other_fields_is_left_out(tmp_path: Path) -> None:
    ros = Ros(2)
    ros.types = get_typestore(Stores.EMPTY)
    ros.types.register(get_types_from_msg("float64 pressure", "sensor_msgs/msg/Imu"))
    path = write_bag(tmp_path, "mcap", ros, [("/imu", T0, ros.make("sensor_msgs/msg/Imu"))])
    with pytest.raises(RecordingError, match="its fields are not those of its type"):
        import_(path)


def test_a_recording_of_ours_need_not_be_imported(tmp_path: Path, ros: Ros) -> None:
    import_file(write_bag(tmp_path, "mcap", ros, [("/imu", T0, imu(ros, T0))]), tmp_path / "ours.mcap")
    whole = (tmp_path / "ours.mcap").read_bytes()
    for size in (len(whole), len(whole) - 1, len(whole) // 2):  # one that is cut off, too, can be read as it is
        (tmp_path / "ours.mcap").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"recording of Sensorium already.*sensorium info"):
            import_file(tmp_path / "ours.mcap", tmp_path / "again.mcap")
        with RecordingReader(tmp_path / "ours.mcap") as reader:
            assert reader.info.complete == (size == len(whole))


def test_a_folder_with_recordings_of_ours_need_not_be_imported_either(tmp_path: Path, ros: Ros) -> None:
    folder = tmp_path / "ours"
    bag = write_bag(tmp_path, "mcap", ros, [("/imu", T0, imu(ros, T0))])
    for name in ("a", "b"):
        import_file(bag, folder / f"{name}.mcap")
    with pytest.raises(ConfigError, match=r"2 recordings of Sensorium.*: sensorium info \S*/ours/b\.mcap$"):
        import_file(folder, tmp_path / "again.mcap")
    bag.rename(folder / "theirs.mcap")
    with pytest.raises(ConfigError, match=r"2 recordings of Sensorium.*others \(theirs\.mcap\) import one by itself"):
        import_file(folder, tmp_path / "again.mcap")
    for name in ("a", "b"):
        (folder / f"{name}.mcap").unlink()
    with pytest.raises(RecordingError, match=r"lacks its metadata\.yaml.*\(theirs\.mcap\).*ros2 bag reindex"):
        import_file(folder, tmp_path / "again.mcap")


def test_a_file_that_is_cut_off_is_told_so_and_not_in_its_parsers_words(tmp_path: Path, ros: Ros) -> None:
    path = write_bag(tmp_path, "mcap", ros, [("/imu", T0, imu(ros, T0))])
    content = path.read_bytes()
    for size in range(1, len(content), 7):
        path.write_bytes(content[:size])
        with pytest.raises(RecordingError) as told:
            import_(path)
        said = f"ends after {size} bytes, before any message" if size < 100 else "its end is missing. A recorder that"
        assert said in str(told.value)


def test_a_small_file_that_is_whole_is_not_said_to_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    with path.open("wb") as file:
        writer = McapWriter(file, index_types=IndexType.NONE, use_statistics=False, use_summary_offsets=False)
        writer.start()
        writer.finish()
    assert path.stat().st_size < 100
    with pytest.raises(RecordingError, match="holds nothing that can be imported"):
        import_(path)


@pytest.mark.parametrize(
    ("name", "start", "how"),
    [
        ("a.mcap", gzip.compress(b"x", mtime=0), "gzip. Unpack it first: gzip -dc {}/a.mcap > unpacked.mcap"),
        ("a.mcap.gz", gzip.compress(b"x", mtime=0), "gzip. Unpack it first: gzip -dc {}/a.mcap.gz > a.mcap"),
        ("old.mcap.gz", gzip.compress(b"x", mtime=0), "gzip. Unpack it first: gzip -dc {}/old.mcap.gz > old-2.mcap"),
        ("a.db3.zstd", zstandard.compress(b"x"), "zstd. Unpack it first: zstd -dc {}/a.db3.zstd > a.db3"),
        ("a.zip", b"PK\x03\x04....", "zip. Unpack it first: unzip {}/a.zip"),
        ("a.tgz", gzip.compress(b"x", mtime=0), "gzip. Unpack it first: tar -xkf {}/a.tgz"),
        ("a.b.tar.zst", zstandard.compress(b"x"), "zstd. Unpack it first: tar -xkf {}/a.b.tar.zst"),
    ],
)
def test_a_packed_file_is_told_how_to_unpack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, start: bytes, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.mcap").touch()
    (tmp_path / name).write_bytes(start)
    for take in (import_, RecordingReader):
        with pytest.raises(RecordingError) as told:
            take(tmp_path / name)
        assert str(told.value).endswith("packed with " + how.format(tmp_path))


@pytest.mark.parametrize("content", [b"hello", b"\x89MCAP0\r\r" + bytes(1000)])
def test_what_is_only_called_mcap_is_told_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.mcap").write_bytes(content)
    with pytest.raises(RecordingError, match="no MCAP file") as told:
        import_(tmp_path / "text.mcap")
    assert "recover" not in str(told.value)


def test_without_the_library_the_line_to_type_is_said(bag: Callable[[Made], Path], ros: Ros,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    path = bag([("/imu", T0, imu(ros, T0))])
    for name in [name for name in sys.modules if name.split(".")[0] == "rosbags"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[ros\]'"):
        import_(path)


# Foxglove's schemas.


def write_foxglove(path: Path, messages: list[tuple[str, int, Any]]) -> Path:
    channels: dict[str, int] = {}
    with path.open("wb") as file:
        writer = McapWriter(file)
        writer.start()
        for topic, arrival_ns, message in messages:
            if topic not in channels:
                schema = message.get_schema()
                number = writer.register_schema(schema.name, schema.encoding, schema.data)
                channels[topic] = writer.register_channel(topic, "protobuf", number)
            writer.add_message(channels[topic], arrival_ns, message.encode(), arrival_ns)
        odd = writer.register_schema("odd", "jsonschema", b"{}")
        writer.add_message(writer.register_channel("/odd", "json", odd), T0, json.dumps({}).encode(), T0)
        writer.finish()
    return path


def test_files_with_foxgloves_schemas(tmp_path: Path) -> None:
    stamp = foxglove.Timestamp(sec=T0 // S, nsec=5 * MS)
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    kinds = foxglove.PackedElementFieldNumericType
    fields = [foxglove.PackedElementField(name=n, offset=4 * k, type=kinds.Float32) for k, n in enumerate("xyz")]
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    messages = [
        ("/raw", T0, foxglove.RawImage(timestamp=stamp, width=2, height=2, encoding="rgb8", step=6,
                                       data=pixels.tobytes())),
        ("/jpeg", T0, foxglove.CompressedImage(timestamp=stamp, format="jpeg", data=jpeg)),
        ("/cloud", T0, foxglove.PointCloud(timestamp=stamp, point_stride=12, fields=fields,
                                           data=np.array([1, 2, 3, 4, 5, 6], "<f4").tobytes())),
        ("/scan", T0, foxglove.LaserScan(timestamp=stamp, start_angle=0, end_angle=math.pi / 2, ranges=[1, 2],
                                         intensities=[5, 6])),
        ("/sound", T0, foxglove.RawAudio(timestamp=stamp, format="pcm-s16", sample_rate=8000, number_of_channels=1,
                                         data=np.array([7, -8], "<i2").tobytes())),
        ("/log", T0, foxglove.Log(timestamp=stamp, message="all is well")),
        ("/pose", T0, foxglove.PoseInFrame(timestamp=stamp)),
    ]  # fmt: skip
    info, found = import_(write_foxglove(tmp_path / "a.mcap", messages), jpeg_quality=None)
    assert (array(found["raw"][0]) == pixels[..., ::-1]).all()
    assert found["jpeg"][0].data == jpeg
    assert [array(found["cloud"][0])[axis].tolist() for axis in "xyz"] == [[1, 4], [2, 5], [3, 6]]
    assert np.allclose(array(found["scan"][0])["y"], [0, 2])
    assert array(found["sound"][0]).tolist() == [[7], [-8]]
    assert array(found["log"][0]).tobytes() == b"all is well"
    assert {message.header.t_capture_ns for of in found.values() for message in of} == {0}
    assert "/pose (foxglove.PoseInFrame): there is no payload" in info.extra["left_out"]
    assert "/odd (odd): encoded as json with a schema in jsonschema" in info.extra["left_out"]


def test_the_shipped_drive_is_the_one_that_is_made_here(tmp_path: Path) -> None:
    found = []
    for path in (ROOT / "examples" / "drive.bag", example(tmp_path)):
        import_file(path, tmp_path / "out.mcap", overwrite=True)
        with RecordingReader(tmp_path / "out.mcap") as reader:
            found.append([(message.header, message.data, arrival) for message, arrival in reader.messages()])
    assert found[0] == found[1]
    streams = summarise(tmp_path / "out.mcap")["streams"]
    assert {name: (s["payload"], s["messages"]) for name, s in streams.items()} == {
        "imu_data": ("imu", 100), "odom": ("signal", 20), "scan": ("sweep", 10),
    }  # fmt: skip
    assert streams["imu_data"]["delay_ms"] == {"p50": 12, "max": 12}
    assert streams["scan"]["delay_ms"]["p50"] == pytest.approx(10.6, abs=0.1)  # after its last ray


# The command.


def test_the_command_says_what_it_took_and_what_it_left(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sensorium", "import", str(two), "-o", str(tmp_path / "a.mcap"), "--streams", "front=/a/b, back=/a_b"]
    run(command, monkeypatch)
    said = capsys.readouterr()
    assert said.out == "back  1 messages\nfront  1 messages\n"
    assert "done; see it with: sensorium info" in said.err
    made: Made = [("/x", T0, imu(Ros(2), T0)), ("/y", T0, Ros(2).make("std_msgs/msg/Empty"))]
    path = write_bag(tmp_path, "mcap", Ros(2), made)
    run(["sensorium", "import", str(path), "-o", str(tmp_path / "b.mcap")], monkeypatch)
    left_out = "1 messages of /y (std_msgs/msg/Empty): there is no payload for them"
    assert f"note: left out: {left_out}" in capsys.readouterr().err
    run(["sensorium", "import", str(path), "-o", str(tmp_path / "c.mcap"), "--json"], monkeypatch)
    assert json.loads(capsys.readouterr().out) == {
        "recording": str(tmp_path / "c.mcap"), "streams": {"x": 1}, "complete": True, "note": "", "left_out": left_out,
    }  # fmt: skip


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
