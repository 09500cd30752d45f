"""Sensorium: sensors into one stream of live predictions, with time you can trust.

The names below are the public ones, and all of them:

    for prediction in pipeline.subscribe("tcp://127.0.0.1:5599"):
        print(prediction.label, prediction.confidence)

A name's module is imported when the name is first used, so that ``import pipeline`` costs nothing and a subscriber
needs none of what a model needs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.align import Aligner as Aligner
    from pipeline.align import AlignSpec as AlignSpec
    from pipeline.align import All as All
    from pipeline.align import Latest as Latest
    from pipeline.align import Nearest as Nearest
    from pipeline.align import Resample as Resample
    from pipeline.align import StreamSpec as StreamSpec
    from pipeline.bundle import load_bundle as load_bundle
    from pipeline.checks import check_source as check_source
    from pipeline.errors import SensoriumError as SensoriumError
    from pipeline.inference import Fuser as Fuser
    from pipeline.messages import Header as Header
    from pipeline.messages import Message as Message
    from pipeline.messages import array as array
    from pipeline.prediction import Prediction as Prediction
    from pipeline.recording import Label as Label
    from pipeline.recording import RecordingReader as RecordingReader
    from pipeline.recording import RecordingWriter as RecordingWriter
    from pipeline.recording import SessionInfo as SessionInfo
    from pipeline.replay import replay_predictions as replay_predictions
    from pipeline.replay import replay_steps as replay_steps
    from pipeline.source import Reading as Reading
    from pipeline.source import Source as Source
    from pipeline.subscriber import subscribe as subscribe

_MODULES = {
    "AlignSpec": "align",
    "Aligner": "align",
    "All": "align",
    "Fuser": "inference",
    "Header": "messages",
    "Label": "recording",
    "Latest": "align",
    "Message": "messages",
    "Nearest": "align",
    "Prediction": "prediction",
    "Reading": "source",
    "RecordingReader": "recording",
    "RecordingWriter": "recording",
    "Resample": "align",
    "SensoriumError": "errors",
    "SessionInfo": "recording",
    "Source": "source",
    "StreamSpec": "align",
    "array": "messages",
    "check_source": "checks",
    "load_bundle": "bundle",
    "replay_predictions": "replay",
    "replay_steps": "replay",
    "subscribe": "subscriber",
}

__all__ = [
    "AlignSpec",
    "Aligner",
    "All",
    "Fuser",
    "Header",
    "Label",
    "Latest",
    "Message",
    "Nearest",
    "Prediction",
    "Reading",
    "RecordingReader",
    "RecordingWriter",
    "Resample",
    "SensoriumError",
    "SessionInfo",
    "Source",
    "StreamSpec",
    "array",
    "check_source",
    "load_bundle",
    "replay_predictions",
    "replay_steps",
    "subscribe",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pipeline' has no public name {name!r}; it has {', '.join(__all__)}")
    with _interrupts_wait():
        value = getattr(import_module(f"pipeline.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C takes effect when this is over: an exception while msgspec makes a class ends the process by a
    segmentation fault (0.22), and one in the midst of an import leaves a half of it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__file__", "__name__", "__path__"]
