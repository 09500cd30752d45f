"""How a message lies in a recording: Foxglove's well-known protobuf schemas or JSON, with nothing of ours lost.

=============== ============================ ==================================================================
payload         schema                       what other programs see
=============== ============================ ==================================================================
frame (jpeg)    foxglove.CompressedImage     the picture
frame (others)  foxglove.RawImage            the picture
audio           foxglove.RawAudio            the sound (``pcm-s16``)
sweep           foxglove.PointCloud          the points, with ``intensity`` and ``offset_ns``
text            foxglove.Log                 the line
imu, signal     JSON (``sensorium.*``)       columns of samples; null where not measured
beat            JSON (``sensorium.Beat``)    the header
=============== ============================ ==================================================================

A protobuf message carries our header (msgpack, as on the wire) and the payload's xxh3_64 as two unknown fields with
high numbers, which other readers skip. The payload stands in it byte for byte. In JSON the header is the object
``header``; float32 values become decimal numbers that give the same float32 back, and where columns cannot (a NaN with
unusual bits, an infinity, two channels of one name) the payload itself stands beside them as base64 in ``raw``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import xxhash
from foxglove import messages as foxglove
from foxglove.messages import PackedElementFieldNumericType as Numeric

from pipeline.errors import RecordingError, WireError
from pipeline.messages import (
    IMU_DTYPE,
    POINT_DTYPE,
    AudioLayout,
    FrameLayout,
    Header,
    ImuLayout,
    Layout,
    Message,
    SignalLayout,
    SweepLayout,
    TextLayout,
    flat,
    payload_of,
    signal_dtype,
    view,
)
from pipeline.wire import check_payload, decode_header, encode_header

HEADER_FIELD, HASH_FIELD = 15001, 15002
"""Protobuf field numbers of our additions, far above those that Foxglove will ever use."""

DATA_FIELD = {
    "foxglove.CompressedImage": 2,
    "foxglove.RawImage": 6,
    "foxglove.RawAudio": 2,
    "foxglove.PointCloud": 6,
    "foxglove.Log": 3,
}
"""The number of the field that holds our payload; a test holds it against the schemas' own descriptors."""

BEAT_TOPIC, LABEL_TOPIC, MANIFEST_TOPIC = "/beat", "/label", "/manifest"
PREDICTION_TOPIC, LOG_TOPIC, GAP_TOPIC = "/prediction", "/log", "/gap"

_QUIET_NAN = 0x7FC00000
_IMU_COLUMNS = tuple(f"{sensor}_{axis}" for sensor in ("accel", "gyro") for axis in "xyz")


class Schema(msgspec.Struct, frozen=True):
    """What MCAP stores of a channel's type. ``message_encoding`` is ``protobuf`` or ``json``."""

    name: str
    message_encoding: str
    schema_encoding: str
    data: bytes


def object_schema(title: str, **properties: Any) -> Schema:
    """A JSON channel's schema. Kept to what Foxglove and Lichtblick parse: one plain type each, no references."""
    body = {"title": title, "type": "object", "properties": properties}
    return Schema(f"sensorium.{title}", "json", "jsonschema", json.dumps(body).encode())


def _array(of: str, description: str = "") -> dict[str, Any]:
    return {"type": "array", "items": {"type": of}, **({"description": description} if description else {})}


INTEGER, NUMBER, STRING, OBJECT = (
    {"type": "integer"},
    {"type": "number"},
    {"type": "string"},
    {"type": "object", "properties": {}},
)
_HEADER = {
    "type": "object",
    "description": "the message's header; times in ns on the session clock",
    "properties": {
        **dict.fromkeys(("seq", "epoch", "t_capture_ns", "t_end_ns", "bound_ns", "t_receipt_ns"), INTEGER),
        "t_device_ns": INTEGER,
        "uncertainty_ns": INTEGER,
        "stream": STRING,
        "health": STRING,
        "layout": OBJECT,
    },
}
_OFFSETS = _array("integer", "ns after header.t_capture_ns")
_RAW = {**STRING, "description": "the payload as base64, where the columns cannot give it back exactly"}

BEAT = object_schema("Beat", header=_HEADER)
TOPIC_SCHEMAS: dict[str, Schema] = {
    BEAT_TOPIC: BEAT,
    LABEL_TOPIC: object_schema("Label", start_ns=INTEGER, end_ns=INTEGER, label=STRING),
    MANIFEST_TOPIC: object_schema(
        "Manifest",
        step=INTEGER,
        start_ns=INTEGER,
        end_ns=INTEGER,
        cause=STRING,
        emitted_ns=INTEGER,
        digest=STRING,
        streams=OBJECT,
    ),
    PREDICTION_TOPIC: object_schema(
        "Prediction",
        schema=INTEGER,
        session=STRING,
        window={"type": "object", "properties": {"index": INTEGER, "start_ns": INTEGER, "end_ns": INTEGER}},
        label=STRING,
        confidence=NUMBER,
        scores=OBJECT,
        set=_array("string"),
        abstained={"type": "boolean"},
        streams=OBJECT,
        sync_uncertainty_ms=NUMBER,
        timing=OBJECT,
        bundle={"type": "object", "properties": {"name": STRING, "sha256": STRING}},
        digest=STRING,
    ),
}
ANY_OBJECT = object_schema("Object")


def schema_of(layout: Layout | None) -> Schema:
    """The schema under which a message of this layout is stored; a beat's for None."""
    match layout:
        case None:
            return BEAT
        case FrameLayout(format="jpeg"):
            return _foxglove("CompressedImage")
        case FrameLayout():
            return _foxglove("RawImage")
        case AudioLayout():
            return _foxglove("RawAudio")
        case SweepLayout():
            return _foxglove("PointCloud")
        case TextLayout():
            return _foxglove("Log")
        case ImuLayout():
            columns = {name: _array("number", "null where not measured") for name in _IMU_COLUMNS}
            return object_schema("Imu", header=_HEADER, offset_ns=_OFFSETS, **columns, xxh3=STRING, raw=_RAW)
        case SignalLayout(channels=names):
            values = {"type": "object", "properties": {name: _array("number") for name in names}}
            return object_schema("Signal", header=_HEADER, offset_ns=_OFFSETS, values=values, xxh3=STRING, raw=_RAW)


def _foxglove(name: str) -> Schema:
    schema = getattr(foxglove, name).get_schema()
    return Schema(schema.name, "protobuf", schema.encoding, schema.data)


def encode(message: Message, unix_ns: int) -> bytes:
    """The message as the bytes of its schema. ``unix_ns``: Unix time of the session's 0, for other programs' stamps.

    WireError if the header contradicts itself or the payload; ValueError if it is absent.
    """
    header = message.header
    packed = encode_header(header)
    decode_header(packed)  # a header that reading would refuse must not get in
    if header.layout is None:
        return msgspec.json.encode({"header": header})
    if message.data is None:
        raise ValueError(f"message {header.stream}/{header.seq} has no payload to record")
    data = _flat(message.data)
    check_payload(header, data.nbytes)
    digest = xxhash.xxh3_64_intdigest(data)
    if isinstance(header.layout, ImuLayout | SignalLayout):
        return _encode_samples(header, data, digest)
    field = DATA_FIELD[schema_of_name(header.layout)]
    return b"".join(
        (
            _envelope(header, unix_ns),
            _tag(field, 2) + _varint(data.nbytes),
            data,
            _tag(HEADER_FIELD, 2) + _varint(len(packed)) + packed + _tag(HASH_FIELD, 1) + struct.pack("<Q", digest),
        )
    )


def schema_of_name(layout: Layout) -> str:
    """The name of a binary layout's schema, without building the schema."""
    match layout:
        case FrameLayout(format="jpeg"):
            return "foxglove.CompressedImage"
        case FrameLayout():
            return "foxglove.RawImage"
        case AudioLayout():
            return "foxglove.RawAudio"
        case SweepLayout():
            return "foxglove.PointCloud"
        case TextLayout():
            return "foxglove.Log"
    return f"sensorium.{payload_of(layout).capitalize()}"


def decode(schema: str, data: memoryview) -> Message:
    """The message in ``data``, its payload as bytes, checked against the stored hash. Raises RecordingError."""
    try:
        if schema == BEAT.name:
            return Message(_enveloped.decode(data).header)
        if schema in ("sensorium.Imu", "sensorium.Signal"):
            message, digest = _decode_samples(schema, data)
        else:
            message, digest = _decode_protobuf(DATA_FIELD[schema], data)
        check_payload(message.header, len(message.data))
    except (msgspec.MsgspecError, WireError, ValueError, KeyError, IndexError, struct.error) as error:
        raise RecordingError(f"a {schema} message of the recording is damaged: {error}") from None
    if xxhash.xxh3_64_intdigest(message.data) != digest:
        raise RecordingError(
            f"the payload of message {message.header.stream}/{message.header.seq} is not the one that was recorded: "
            "its hash differs"
        )
    return message


def decode_envelope(schema: str, data: memoryview) -> Header:
    """The header of the message in ``data`` alone: its payload is neither copied nor checked. Raises RecordingError."""
    try:
        if schema.startswith("sensorium."):
            return _enveloped.decode(data).header
        header, _, _ = _fields(DATA_FIELD[schema], data)
        if header is None:
            raise ValueError("it lacks the Sensorium header")
        return header
    except (msgspec.MsgspecError, WireError, ValueError, KeyError, IndexError, struct.error) as error:
        raise RecordingError(f"a {schema} message of the recording is damaged: {error}") from None


def _flat(data: Any) -> memoryview:
    if isinstance(data, np.ndarray):
        return flat(data).data
    return memoryview(data).cast("B")


# Protobuf. The small fields are written by Foxglove's own classes; the payload is appended as its field (protobuf
# allows any order), which copies a picture once instead of three times.


def _envelope(header: Header, unix_ns: int) -> bytes:
    stamp = _timestamp(unix_ns + header.t_capture_ns)
    match header.layout:
        case FrameLayout(format="jpeg"):
            image = foxglove.CompressedImage(timestamp=stamp, frame_id=header.stream, format="jpeg")
            return bytes(image.encode())
        case FrameLayout(format=pixels, height=h, width=w):
            encoding, step = ("mono8", w) if pixels == "gray8" else (pixels, 3 * w)
            raw = foxglove.RawImage(
                timestamp=stamp, frame_id=header.stream, width=w, height=h, encoding=encoding, step=step
            )
            return bytes(raw.encode())
        case AudioLayout(rate_hz=rate, channels=c):
            audio = foxglove.RawAudio(timestamp=stamp, format="pcm-s16", sample_rate=rate, number_of_channels=c)
            return bytes(audio.encode())
        case SweepLayout():
            return bytes(_point_cloud(header.stream, stamp).encode())
        case _:
            line = foxglove.Log(timestamp=stamp, level=foxglove.LogLevel.Info, name=header.stream)
            return bytes(line.encode())


def _point_cloud(frame_id: str, stamp: foxglove.Timestamp) -> foxglove.PointCloud:
    fields = [
        foxglove.PackedElementField(name=name, offset=offset, type=Numeric.Int32 if kind == "i" else Numeric.Float32)
        for name, (kind, offset) in _POINT_FIELDS.items()
    ]
    identity = foxglove.Pose(
        position=foxglove.Vector3(x=0, y=0, z=0), orientation=foxglove.Quaternion(x=0, y=0, z=0, w=1)
    )
    return foxglove.PointCloud(
        timestamp=stamp, frame_id=frame_id, pose=identity, point_stride=POINT_DTYPE.itemsize, fields=fields
    )


_POINT_FIELDS = {name: (field[0].kind, field[1]) for name, field in (POINT_DTYPE.fields or {}).items()}


def _timestamp(unix_ns: int) -> foxglove.Timestamp:
    """For other programs; what we read back is the header. Protobuf's timestamp here has 32 bits of seconds."""
    sec, nsec = divmod(max(unix_ns, 0), 1_000_000_000)
    return foxglove.Timestamp(sec=min(sec, 2**32 - 1), nsec=nsec)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _tag(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(field: int, data: memoryview) -> tuple[Header | None, memoryview, int | None]:
    """Header, payload and hash of a protobuf message. Protobuf may leave out an empty payload."""
    header: Header | None = None
    payload, digest, at = data[:0], None, 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _, at = _read_varint(data, at)
            continue
        length, at = _read_varint(data, at) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], at)
        value, at = data[at : at + length], at + length
        if number == field:
            payload = value
        elif number == HEADER_FIELD:
            header = decode_header(value)
        elif number == HASH_FIELD:
            (digest,) = struct.unpack("<Q", value)
    return header, payload, digest


def _decode_protobuf(field: int, data: memoryview) -> tuple[Message, int]:
    header, payload, digest = _fields(field, data)
    if header is None or digest is None:
        raise ValueError("it lacks the Sensorium header")
    return Message(header, bytes(payload)), digest


# JSON.


class _Enveloped(msgspec.Struct):
    header: Header


class _Samples(msgspec.Struct, kw_only=True):
    header: Header
    offset_ns: list[int]
    xxh3: str
    raw: bytes | None = None


class _Signal(_Samples, kw_only=True):
    values: dict[str, list[float | None]]


_Imu: Callable[..., Any] = msgspec.defstruct(  # one list of numbers a column, as in ``_IMU_COLUMNS``
    "_Imu", [(name, list[float | None]) for name in _IMU_COLUMNS], bases=(_Samples,), kw_only=True
)
_enveloped = msgspec.json.Decoder(_Enveloped)
_imu: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_Imu)
_signal = msgspec.json.Decoder(_Signal)


def _encode_samples(header: Header, data: memoryview, digest: int) -> bytes:
    assert header.layout is not None
    samples = view(header.layout, data)
    record: dict[str, Any] = {"header": header, "offset_ns": samples["offset_ns"].tolist()}
    if isinstance(header.layout, ImuLayout):
        values = np.concatenate([samples["accel"], samples["gyro"]], axis=1)
        record.update(zip(_IMU_COLUMNS, values.T.tolist(), strict=True))
        exact = True
    else:
        assert isinstance(header.layout, SignalLayout)
        names = header.layout.channels
        values = samples["value"]
        record["values"] = dict(zip(names, values.T.tolist(), strict=True))
        exact = len(set(names)) == len(names)
    bits = np.ascontiguousarray(values).view(np.uint32)[~np.isfinite(values)]
    if not exact or (bits != _QUIET_NAN).any():
        record["raw"] = bytes(data)
    record["xxh3"] = f"{digest:016x}"
    return msgspec.json.encode(record)


def _decode_samples(schema: str, data: memoryview) -> tuple[Message, int]:
    record = _imu.decode(data) if schema == "sensorium.Imu" else _signal.decode(data)
    header: Header = record.header
    digest = int(record.xxh3, 16)
    if record.raw is not None:
        return Message(header, record.raw), digest
    if schema == "sensorium.Imu":
        columns = np.array([getattr(record, name) for name in _IMU_COLUMNS], np.float64).astype(np.float32)
        samples = np.empty(len(record.offset_ns), IMU_DTYPE)
        samples["accel"], samples["gyro"] = columns[:3].T, columns[3:].T
    else:
        if not isinstance(header.layout, SignalLayout):
            raise ValueError("a signal record whose header is of something else")
        names = header.layout.channels
        samples = np.empty(len(record.offset_ns), signal_dtype(len(names)))
        for index, name in enumerate(names):
            samples["value"][:, index] = np.array(record.values[name], np.float64)
    samples["offset_ns"] = record.offset_ns
    return Message(header, samples.tobytes()), digest
