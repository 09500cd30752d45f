"""Bags made for tests: messages with every field set, in each of the kinds of files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rosbags", reason="rosbags is not installed: pip install -e '.[ros]'")

from mcap.writer import Writer as McapWriter
from rosbags.rosbag1 import Writer as Writer1
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin
from rosbags.rosbag2 import Writer as Writer2
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

S, MS = 1_000_000_000, 1_000_000
T0 = 1_700_000_000 * S
"""When the bags begin, Unix time."""

KINDS = ("bag", "bag-lz4", "bag-bz2", "db3", "db3-message", "db3-file", "rosbag2-mcap", "mcap", "mcap-ros1")

SOUND = {
    "AudioData": "uint8[] data",
    "AudioDataStamped": "std_msgs/Header header\naudio_common_msgs/AudioData audio",
    "AudioInfo": "uint8 channels\nuint32 sample_rate\nstring sample_format\nuint32 bitrate\nstring coding_format",
    "AudioInt16": "int16[] int16_data\nfloat32[] float32_data",
    "AudioKind": "uint32 format\nint32 channels\nint32 rate\nint32 chunk",
    "Audio": "audio_common_msgs/AudioInt16 audio_data\naudio_common_msgs/AudioKind info",
    "AudioStamped": "std_msgs/Header header\naudio_common_msgs/Audio audio",
    "Odd": "string words",
}


class Ros:
    """Types and messages of ROS 1 or 2."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.types = get_typestore(Stores.ROS1_NOETIC if version == 1 else Stores.ROS2_HUMBLE)
        for name, text in SOUND.items():
            full = f"audio_common_msgs/msg/{name}"
            if full not in self.types.fielddefs:
                self.types.register(get_types_from_msg(text, full))

    def make(self, type_: str, **given: Any) -> Any:
        """A message of zeros but for what is given; a given ``stamp`` (ns) is its header's."""
        fields = {}
        if "stamp" in given:
            header = self.make("std_msgs/msg/Header")
            header.stamp.sec, header.stamp.nanosec = divmod(given.pop("stamp"), S)
            given["header"] = header
        for name, kind in self.types.fielddefs[type_][1]:
            value = given.pop(name, None)
            fields[name] = self._blank(kind) if value is None else value
        assert not given, f"{type_} has no field {', '.join(given)}"
        return self.types.types[type_](**fields)

    def _blank(self, kind: Any) -> Any:
        what, of = kind
        if what.name == "NAME":
            return self.make(of)
        if what.name == "BASE":
            return "" if of[0] == "string" else False if of[0] == "bool" else 0
        inner, size = of
        if inner[0].name == "BASE" and inner[1][0] != "string":
            return np.zeros(size if what.name == "ARRAY" else 0, inner[1][0].replace("bool", "uint8"))
        return [self._blank(inner) for _ in range(size)] if what.name == "ARRAY" else []

    def pack(self, message: Any) -> bytes:
        """The message as it lies in a bag."""
        pack = self.types.serialize_ros1 if self.version == 1 else self.types.serialize_cdr
        return bytes(pack(message, message.__msgtype__))


def ros_of(kind: str) -> Ros:
    """The ROS that a kind of file holds."""
    return Ros(1 if kind.startswith("bag") or kind == "mcap-ros1" else 2)


def write_bag(folder: Path, kind: str, ros: Ros, messages: list[tuple[str, int, Any]], name: str = "drive") -> Path:
    """A bag with (topic, arrival in ns, message), and its path."""
    if kind.startswith("mcap"):
        return _write_mcap(folder / f"{name}.mcap", ros, messages)
    writer: Any
    if kind.startswith("bag"):
        path = folder / f"{name}.bag"
        writer = Writer1(path)
        if "-" in kind:
            writer.set_compression(Writer1.CompressionFormat[kind.split("-")[1].upper()])
    else:
        path = folder / name
        plugin = StoragePlugin.MCAP if kind == "rosbag2-mcap" else StoragePlugin.SQLITE3
        writer = Writer2(path, version=9, storage_plugin=plugin)
        if kind.startswith("db3-"):
            writer.set_compression(CompressionMode[kind.split("-")[1].upper()], CompressionFormat.ZSTD)
    connections: dict[str, Any] = {}
    with writer:
        for topic, arrival_ns, message in messages:
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=ros.types)
            writer.write(connections[topic], arrival_ns, ros.pack(message))
    return path


def _write_mcap(path: Path, ros: Ros, messages: list[tuple[str, int, Any]]) -> Path:
    schemas = {1: ("ros1msg", "ros1"), 2: ("ros2msg", "cdr")}
    channels: dict[str, int] = {}
    with path.open("wb") as file:
        writer = McapWriter(file)
        writer.start()
        for topic, arrival_ns, message in messages:
            if topic not in channels:
                text, _ = ros.types.generate_msgdef(message.__msgtype__, ros_version=ros.version)
                name = message.__msgtype__.replace("/msg/", "/") if ros.version == 1 else message.__msgtype__
                schema = writer.register_schema(name, schemas[ros.version][0], text.encode())
                channels[topic] = writer.register_channel(topic, schemas[ros.version][1], schema)
            writer.add_message(channels[topic], arrival_ns, ros.pack(message), arrival_ns)
        writer.finish()
    return path


def example(folder: Path) -> Path:
    """``examples/drive.bag``, made anew: two seconds of a robot that turns in a room of 4 x 3 m. Its IMU comes 12 ms
    after the moment, its odometry 3 ms, its laser a turn of 50 ms and 10 ms more."""
    ros, turn = Ros(1), 0.5  # rad/s
    messages = []
    for k in range(100):
        at = T0 + k * 20 * MS
        rate = ros.make("geometry_msgs/msg/Vector3", z=turn)
        up = ros.make("geometry_msgs/msg/Vector3", z=9.81)
        made = ros.make("sensor_msgs/msg/Imu", stamp=at, angular_velocity=rate, linear_acceleration=up)
        messages.append(("/imu/data", at + 12 * MS, made))
        if k % 5 == 0:
            heading = turn * k * 0.02
            odom = ros.make("nav_msgs/msg/Odometry", stamp=at)
            odom.twist.twist.angular.z = turn
            odom.pose.pose.orientation.z, odom.pose.pose.orientation.w = np.sin(heading / 2), np.cos(heading / 2)
            messages.append(("/odom", at + 3 * MS, odom))
        if k % 10 == 0:
            rays = turn * k * 0.02 + np.radians(np.arange(-180, 180, 4))
            with np.errstate(divide="ignore"):
                walls = np.minimum(2 / np.abs(np.cos(rays)), 1.5 / np.abs(np.sin(rays)))
            scan = ros.make("sensor_msgs/msg/LaserScan", stamp=at, angle_min=-np.pi, angle_max=np.pi - np.radians(4),
                            angle_increment=np.radians(4), time_increment=0.05 / 90, scan_time=0.05, range_min=0.1,
                            range_max=10.0, ranges=walls.astype(np.float32))  # fmt: skip
            messages.append(("/scan", at + 60 * MS, scan))
    messages.sort(key=lambda entry: entry[1])
    return write_bag(folder, "bag-bz2", ros, messages)
