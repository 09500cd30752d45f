"""JSON Schemas of everything that Sensorium writes or reads as text, made from the structs that do it.

So a schema cannot say other than the code does: ``prediction``, ``info`` and ``evaluation`` are what programs
get, ``config`` and ``bundle`` what people write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pipeline.errors import ConfigError, install, listed, nearest
from pipeline.messages import Payload
from pipeline.recording import RingPart
from pipeline.recording.salvage import Damage

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Delay(msgspec.Struct, frozen=True):
    """Arrival less end of capture, in ms."""

    p50: float
    max: float


class Statistics(msgspec.Struct, frozen=True):
    """Of one measured vector, in its own unit; null where nothing was measured."""

    mean: list[float | None]
    sd: list[float | None]
    mean_norm: float | None
    infinite: int | msgspec.UnsetType = msgspec.UNSET
    """How many numbers are infinite, which is no value, if any are."""


class StreamInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of a recording. Times are session time in ns; ``rate_hz`` is of samples where a payload has them. A
    signal has the names of its ``channels``, of which ``stats`` are; ``other_channels`` are those that came later."""

    payload: Payload
    messages: int
    samples: int
    rate_hz: float | None
    gaps: int
    lost: int
    max_gap_ms: float | None
    delay_ms: Delay
    start_ns: int
    end_ns: int
    channels: list[str] | msgspec.UnsetType = msgspec.UNSET
    other_channels: list[list[str]] | msgspec.UnsetType = msgspec.UNSET
    stats: dict[str, Statistics] | msgspec.UnsetType = msgspec.UNSET


class Stage(msgspec.Struct, frozen=True):
    """Latency of one stage, in ms."""

    p50: float
    p95: float
    p99: float
    max: float


class Model(msgspec.Struct, frozen=True):
    """The bundle that ran; its name is null where no prediction tells it."""

    name: str | None
    sha256: str


class Info(msgspec.Struct, frozen=True, kw_only=True):
    """What ``sensorium info RECORDING --json`` prints."""

    duration_s: float
    session: str
    complete: bool
    incomplete: str | msgspec.UnsetType = msgspec.UNSET
    """What it lacks, if it is not complete."""
    note: str | msgspec.UnsetType = msgspec.UNSET
    """What its recorder had to say of it at its end."""
    streams: dict[str, StreamInfo]
    latency_ms: dict[str, Stage] | msgspec.UnsetType = msgspec.UNSET
    """By stage, where the recording holds predictions."""
    bytes: int
    """The file's size."""
    date: str | msgspec.UnsetType = msgspec.UNSET
    """When the session began, in UTC (ISO 8601), where that is known."""
    rig: str | msgspec.UnsetType = msgspec.UNSET
    """The rig's name."""
    bundle: Model | msgspec.UnsetType = msgspec.UNSET
    windows: int | msgspec.UnsetType = msgspec.UNSET
    predictions: int | msgspec.UnsetType = msgspec.UNSET
    labels_s: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    """How long each label was true, in seconds: by the recording, or by X.labels.csv beside X.mcap."""
    ring: RingPart | msgspec.UnsetType = msgspec.UNSET
    """Where the recording stands in its ring, if it is a segment of one."""
    damage: Damage | msgspec.UnsetType = msgspec.UNSET
    """If the recording is damaged; all else is of what is intact."""


def _info() -> dict[str, Any]:
    return msgspec.json.schema(Info)


def _prediction() -> dict[str, Any]:
    from pipeline.prediction import Prediction

    return msgspec.json.schema(Prediction)


def _config() -> dict[str, Any]:
    from pipeline.config import config_schema

    return config_schema()


def _bundle() -> dict[str, Any]:
    from pipeline.modelfile import ModelFile

    return msgspec.json.schema(ModelFile)


def _training() -> dict[str, Any]:
    try:
        from pipeline.learn.config import training_schema
    except ModuleNotFoundError as error:
        raise ConfigError(f"the schema of a training file needs `{error.name}`, not installed here. "
                          f"{install('learn')}") from None  # fmt: skip
    return training_schema()


def _evaluation() -> dict[str, Any]:
    from pipeline.evaluation import Evaluation

    return msgspec.json.schema(Evaluation)


SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {
    "prediction": _prediction,
    "config": _config,
    "bundle": _bundle,
    "training": _training,
    "info": _info,
    "evaluation": _evaluation,
}
"""What ``sensorium schema NAME`` can print. The modules are imported only when asked for."""


_CALLED = {
    "rig": "config", "model": "bundle", "model.yaml": "bundle", "train": "training", "train.yaml": "training",
    "recording": "info", "evaluate": "evaluation",
}  # fmt: skip
"""What else people call them: by what the text is of, its file or its command."""


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) called ``name``, or of what is called so. Raises ConfigError."""
    known = _CALLED.get(name.lower(), name.lower())
    if known not in SCHEMAS:
        raise ConfigError(
            f"there is no schema `{name}`.{nearest(name, [*SCHEMAS, *_CALLED])} There are {listed(SCHEMAS)}."
        )
    return {"$schema": DIALECT, "title": f"Sensorium {known}", **SCHEMAS[known]()}
