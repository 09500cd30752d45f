"""Messages of ROS, 1 and 2, as payloads: one converter a type, and one for whatever else consists of numbers.

A converter is made once for each topic, because some have something to remember (a layout, a first fix, the sound so
far). It takes a decoded message and when it arrived, and gives a ``Content`` or raises Unusable. Units are those that
ROS prescribes (REP 103), which are ours: m/s^2, rad/s, metres.

An IMU's orientation and its covariances have no place in the payload ``imu`` and are left out; a gyroscope or an
accelerometer that is declared absent (first covariance -1, as sensor_msgs/Imu says) is NaN, never 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.importing.base import ImportOptions
from pipeline.importing.clouds import TYPES, Field, Points, records, scan_points, sweep_of
from pipeline.importing.contents import Content, Converter, moment, stamp_of
from pipeline.importing.images import Unusable, compressed_frame, frame, pixels
from pipeline.importing.ros_audio import AUDIO_INFO, Sound
from pipeline.messages import IMU_DTYPE, ImuLayout, SignalLayout, SweepLayout, TextLayout, signal_dtype

MOST_CHANNELS = 256

EARTH_M = 6_378_137.0
FLATTENING = 1 / 298.257_223_563  # WGS 84


def imu(message: Any, arrival_ns: int) -> Content:
    """sensor_msgs/Imu."""
    sample = np.zeros(1, IMU_DTYPE)
    sample["accel"] = sample["gyro"] = np.nan
    if message.linear_acceleration_covariance[0] != -1:
        sample["accel"] = _xyz(message.linear_acceleration)
    if message.angular_velocity_covariance[0] != -1:
        sample["gyro"] = _xyz(message.angular_velocity)
    return moment(ImuLayout(1), sample, stamp_of(message), arrival_ns)


def _xyz(vector: Any) -> tuple[float, float, float]:
    return vector.x, vector.y, vector.z


class Image:
    """sensor_msgs/Image."""

    def __init__(self, options: ImportOptions) -> None:
        self._options = options

    def __call__(self, message: Any, arrival_ns: int) -> Content:
        m = message
        image = pixels(m.data, m.encoding, m.height, m.width, m.step, bool(m.is_bigendian))
        return moment(*frame(image, self._options), stamp_of(m), arrival_ns)


class CompressedImage:
    """sensor_msgs/CompressedImage."""

    def __init__(self, options: ImportOptions) -> None:
        self._options = options

    def __call__(self, message: Any, arrival_ns: int) -> Content:
        if "compressedDepth" in message.format:
            raise Unusable("depth is no picture, and there is no payload for it yet")
        return moment(*compressed_frame(bytes(message.data), self._options), stamp_of(message), arrival_ns)


def point_cloud(message: Any, arrival_ns: int) -> Content:
    """sensor_msgs/PointCloud2."""
    m = message
    # A field of several values is no coordinate, no intensity and no time of a point.
    unknown = sorted({f.datatype for f in m.fields} - TYPES.keys())
    if unknown:
        raise Unusable(f"its points have fields of the unknown types {unknown}")
    fields = [Field(f.name, f.offset, TYPES[f.datatype]) for f in m.fields if f.count <= 1]
    cloud = records(m.data, fields, m.height, m.width, m.point_step, m.row_step, bool(m.is_bigendian))
    stamp_ns = stamp_of(m)
    return sweep_content(sweep_of(cloud, arrival_ns if stamp_ns is None else stamp_ns), stamp_ns, arrival_ns)


def laser_scan(message: Any, arrival_ns: int) -> Content:
    """sensor_msgs/LaserScan."""
    m = message
    stamp_ns = stamp_of(m)
    start_ns = arrival_ns if stamp_ns is None else stamp_ns
    angles, limits = (m.angle_min, m.angle_increment), (m.range_min, m.range_max)
    points = scan_points(m.ranges, m.intensities, angles, limits, float(m.time_increment), start_ns)
    return sweep_content(points, stamp_ns, arrival_ns)


def sweep_content(found: Points, stamp_ns: int | None, arrival_ns: int) -> Content:
    """A sweep with its capture at its end, which without a stamp is its arrival."""
    end_ns = arrival_ns if stamp_ns is None else found.end_ns
    return Content(SweepLayout(len(found.points)), found.points, end_ns, end_ns, stamp_ns)


def text(message: Any, arrival_ns: int) -> Content:
    """std_msgs/String."""
    data = message.data.encode()
    return moment(TextLayout(len(data)), data, None, arrival_ns)


class Numbers:
    """Any message of numbers as one sample of named channels (``pose.pose.position.x``); the first message says which.

    Nested messages are followed; arrays are numbered (``data.0``) or, beside an array of as many names, named
    (``position.elbow``); texts, lists of messages, headers and covariances are left out.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] | None = None

    def __call__(self, message: Any, arrival_ns: int) -> Content:
        found = dict(numbers(message))
        return self.sample(found, stamp_of(message), arrival_ns)

    def sample(self, found: dict[str, float], stamp_ns: int | None, arrival_ns: int) -> Content:
        """One sample of the channels ``found``. Unusable if there are none, or others than at first."""
        names = tuple(found)
        if not names:
            raise Unusable("it holds no numbers of a fixed layout")
        if len(names) > MOST_CHANNELS:
            raise Unusable(f"it holds {len(names)} numbers, and a signal has at most {MOST_CHANNELS} channels")
        if self._names is None:
            self._names = names
        if names != self._names:
            raise Unusable("its numbers are not those of the first message")
        data = np.zeros(1, signal_dtype(len(names)))
        data["value"] = list(found.values())
        return moment(SignalLayout(1, names), data, stamp_ns, arrival_ns)


def numbers(message: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a decoded message with its name."""
    labels = getattr(message, "name", None)
    for field in dataclasses.fields(message):
        value, name = getattr(message, field.name), prefix + field.name
        if field.name == "header" or "covariance" in field.name:
            continue
        if dataclasses.is_dataclass(value):
            yield from numbers(value, name + ".")
        elif isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
            named = isinstance(labels, list) and len(labels) == len(value) and all(isinstance(x, str) for x in labels)
            keys = labels if named and labels is not None else range(len(value))
            yield from ((f"{name}.{key}", float(number)) for key, number in zip(keys, value, strict=True))
        elif isinstance(value, bool | int | float | np.number):
            yield name, float(value)


class Position:
    """sensor_msgs/NavSatFix: the fix itself, and metres east, north and up of the first one, because a float32 tells
    degrees only to about half a metre. ``origin`` is that first fix (degrees, degrees, metres)."""

    def __init__(self) -> None:
        self.origin: tuple[float, float, float] | None = None
        self._numbers = Numbers()

    def __call__(self, message: Any, arrival_ns: int) -> Content:
        fix = message.latitude, message.longitude, message.altitude
        if self.origin is None and math.isfinite(fix[0] + fix[1]) and message.status.status >= 0:
            self.origin = fix
        east, north, up = (math.nan,) * 3 if self.origin is None else metres_from(self.origin, fix)
        found = {"latitude_deg": fix[0], "longitude_deg": fix[1], "altitude_m": fix[2], "east_m": east,
                 "north_m": north, "up_m": up, "status": float(message.status.status)}  # fmt: skip
        return self._numbers.sample(found, stamp_of(message), arrival_ns)


def metres_from(origin: tuple[float, float, float], fix: tuple[float, float, float]) -> tuple[float, float, float]:
    """East, north and up of ``fix`` seen from ``origin`` in metres, along the two radii of curvature of WGS 84 there;
    good to a metre in 10 km."""
    latitude = math.radians(origin[0])
    squared = FLATTENING * (2 - FLATTENING)
    root = 1 - squared * math.sin(latitude) ** 2
    across, along = EARTH_M / math.sqrt(root), EARTH_M * (1 - squared) / root**1.5
    turned = (fix[1] - origin[1] + 180) % 360 - 180
    east = math.radians(turned) * (across + origin[2]) * math.cos(latitude)
    north = math.radians(fix[0] - origin[0]) * (along + origin[2])
    return east, north, fix[2] - origin[2]


UNFIT = frozenset({
    AUDIO_INFO, "diagnostic_msgs/msg/DiagnosticArray", "diagnostic_msgs/msg/DiagnosticStatus",
    "nav_msgs/msg/MapMetaData", "nav_msgs/msg/OccupancyGrid", "rcl_interfaces/msg/Log",
    "rcl_interfaces/msg/ParameterEvent", "rosgraph_msgs/msg/Clock", "rosgraph_msgs/msg/Log",
    "sensor_msgs/msg/CameraInfo", "std_msgs/msg/Empty", "tf2_msgs/msg/TFMessage",
})  # fmt: skip
"""Types whose numbers are no measurements in time."""


def converter(type_: str, options: ImportOptions, audio_info: Any = None) -> Converter | None:
    """A new converter for messages of ``type_`` (``sensor_msgs/msg/Imu``); None for those that are not taken over.
    ``audio_info``: the AudioInfo that goes with an AudioData, if any."""
    match type_.removeprefix("sensor_msgs/msg/"):
        case "Imu":
            return imu
        case "Image":
            return Image(options)
        case "CompressedImage":
            return CompressedImage(options)
        case "PointCloud2":
            return point_cloud
        case "LaserScan":
            return laser_scan
        case "NavSatFix":
            return Position()
        case "std_msgs/msg/String":
            return text
        case "audio_common_msgs/msg/AudioData" | "audio_common_msgs/msg/AudioDataStamped":
            return Sound(audio_info)
        case "audio_common_msgs/msg/Audio" | "audio_common_msgs/msg/AudioStamped":
            return Sound(None)
    if type_ in UNFIT or type_.startswith("visualization_msgs/"):
        return None
    return Numbers()
