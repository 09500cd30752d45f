"""Which encoder a stream gets, by its payload, and what a training file may set of it.

``sensorium train`` writes each as encoder.STREAM.onnx (``StepGraph``): what was trained is what runs, preparation and
all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pipeline.errors import ConfigError
from pipeline.learn.pictures import FrameEncoder, FrameSettings, SweepEncoder, SweepSettings
from pipeline.learn.series import ImuEncoder, ImuSettings, SeriesEncoder, SignalEncoder, SignalSettings
from pipeline.learn.sound import AudioEncoder, AudioSettings
from pipeline.learn.stream_encoder import StepGraph, StreamEncoder, encode_steps
from pipeline.learn.words import TextEncoder, TextSettings
from pipeline.messages import Payload
from pipeline.strict import listed, nearest

__all__ = [
    "SETTINGS",
    "AudioEncoder",
    "FrameEncoder",
    "ImuEncoder",
    "SeriesEncoder",
    "SignalEncoder",
    "StepGraph",
    "StreamEncoder",
    "SweepEncoder",
    "TextEncoder",
    "build_encoder",
    "encode_steps",
    "settings_of",
]

SETTINGS: dict[Payload, type[msgspec.Struct]] = {
    "frame": FrameSettings,
    "audio": AudioSettings,
    "imu": ImuSettings,
    "signal": SignalSettings,
    "sweep": SweepSettings,
    "text": TextSettings,
}
"""What may be set of the encoder of each payload."""


def settings_of(payload: Payload, settings: Mapping[str, Any]) -> Any:
    """``settings`` as a training file states them, as the struct of the payload's encoder. Raises ConfigError."""
    kind = SETTINGS[payload]
    allowed = kind.__struct_fields__
    for key in settings:
        if key not in allowed:
            raise ConfigError(
                f"the encoder of {payload} has no setting `{key}`.{nearest(key, allowed)} Allowed: {listed(allowed)}."
            )
    try:
        return msgspec.convert(dict(settings), kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the settings of the encoder of {payload} do not fit: {error}.") from None


def build_encoder(
    payload: Payload,
    settings: Mapping[str, Any],
    *,
    samples: int,
    context: int,
    channels: int,
    rate_hz: float,
    token: int,
) -> StreamEncoder:
    """The encoder of a stream, its weights drawn from torch's random numbers. ``samples``, ``context`` and ``rate_hz``
    are those of a resampled stream, 0 otherwise; ``channels`` are those of audio, IMU and signals. Raises ConfigError
    where ``settings`` and stream do not fit."""
    given = settings_of(payload, settings)
    match payload:
        case "frame":
            return FrameEncoder(given, token)
        case "sweep":
            return SweepEncoder(given, token)
        case "text":
            return TextEncoder(given, token)
        case "audio":
            return AudioEncoder(given, rate_hz, context + samples if samples else 0, token)
        case "imu":
            return ImuEncoder(given, 6, context + samples if samples else 0, token)
    return SignalEncoder(given, channels, context + samples if samples else 0, token)
