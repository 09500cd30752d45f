"""Messages with Foxglove's well-known schemas, in protobuf or as ROS 2 messages of the same fields, as payloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from pipeline.importing.base import ImportOptions
from pipeline.importing.clouds import Field, records, scan_points, sweep_of
from pipeline.importing.contents import Content, Converter, moment
from pipeline.importing.images import Unusable, compressed_frame, frame, pixels
from pipeline.importing.ros_audio import Timeline
from pipeline.importing.ros_messages import sweep_content
from pipeline.messages import TextLayout
from pipeline.wire import LARGEST

TYPES = {1: "u1", 2: "i1", 3: "u2", 4: "i2", 5: "u4", 6: "i4", 7: "f4", 8: "f8"}
"""Of foxglove.PackedElementField: number -> numpy's name."""


def foxglove_decoder(name: str, descriptors: bytes) -> Callable[[bytes], Any]:
    """Decodes protobuf messages by the file descriptors that lie in the file. Raises Unusable."""
    if not name.startswith("foxglove."):
        raise Unusable("protobuf of a schema that is not Foxglove's")
    try:
        pool = descriptor_pool.DescriptorPool()
        for file in descriptor_pb2.FileDescriptorSet.FromString(descriptors).file:
            pool.Add(file)
        class_ = message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
    except (DecodeError, KeyError, TypeError, ValueError) as error:
        raise Unusable(f"their schema cannot be read ({error})") from None

    def decoded(data: bytes) -> Any:
        try:
            return class_.FromString(data)
        except DecodeError:
            raise Unusable("damaged") from None

    return decoded


def stamp_of(message: Any) -> int | None:
    """The message's stamp in ns; None if nobody set it."""
    stamp = message.timestamp
    if hasattr(stamp, "nanosec"):
        return int(stamp.sec) * 10**9 + int(stamp.nanosec) or None
    return int(stamp.seconds) * 10**9 + int(stamp.nanos) or None


def converter(name: str, options: ImportOptions) -> Converter | None:
    """The converter of a schema (``foxglove.RawImage`` or ``foxglove_msgs/msg/RawImage``); None if there is none."""

    def compressed_image(m: Any, arrival_ns: int) -> Content:
        return moment(*compressed_frame(bytes(m.data), options), stamp_of(m), arrival_ns)

    def raw_image(m: Any, arrival_ns: int) -> Content:
        image = pixels(m.data, m.encoding, m.height, m.width, m.step, False)
        return moment(*frame(image, options), stamp_of(m), arrival_ns)

    converters: dict[str, Converter] = {
        "CompressedImage": compressed_image,
        "RawImage": raw_image,
        "PointCloud": point_cloud,
        "LaserScan": laser_scan,
        "RawAudio": Sound(),
        "Log": log,
    }
    return converters.get(name.removeprefix("foxglove.").removeprefix("foxglove_msgs/msg/"))


def point_cloud(m: Any, arrival_ns: int) -> Content:
    """The points in the frame of the cloud; its pose, if it has one other than none, is not applied."""
    if not {int(f.type) for f in m.fields} <= TYPES.keys():
        raise Unusable("its points have fields of unknown types")
    fields = [Field(f.name, f.offset, TYPES[int(f.type)]) for f in m.fields]
    count = len(m.data) // m.point_stride if m.point_stride else 0
    cloud = records(m.data, fields, 1, count, m.point_stride, m.point_stride * count, False)
    stamp_ns = stamp_of(m)
    return sweep_content(sweep_of(cloud, arrival_ns if stamp_ns is None else stamp_ns), stamp_ns, arrival_ns)


def laser_scan(m: Any, arrival_ns: int) -> Content:
    """Rays spread evenly between the two angles; when each was is not said."""
    ranges, stamp_ns = np.asarray(m.ranges), stamp_of(m)
    angles = m.start_angle, (m.end_angle - m.start_angle) / max(len(ranges) - 1, 1)
    at_ns = arrival_ns if stamp_ns is None else stamp_ns
    points = scan_points(ranges, np.asarray(m.intensities), angles, (0.0, float("inf")), 0.0, at_ns)
    return sweep_content(points, stamp_ns, arrival_ns)


class Sound:
    """RawAudio: PCM of 16 bits; the stamp is its first sample's."""

    def __init__(self) -> None:
        self._timeline = Timeline()

    def __call__(self, m: Any, arrival_ns: int) -> Content:
        channels, rate_hz, size = m.number_of_channels, m.sample_rate, len(m.data)
        if m.format != "pcm-s16" or channels < 1 or not 1 <= rate_hz <= LARGEST or size % (2 * channels) or not size:
            said = f"{m.format!r}, {channels} channels at {rate_hz} Hz"
            raise Unusable(f"{size} bytes of {said}, where pcm-s16 is read")
        samples = np.frombuffer(bytes(m.data), "<i2").reshape(-1, channels)
        return self._timeline.place(samples, rate_hz, stamp_of(m), arrival_ns)


def log(m: Any, arrival_ns: int) -> Content:
    """One line of text."""
    data = m.message.encode()
    return moment(TextLayout(len(data)), data, stamp_of(m), arrival_ns)
