"""Encoders: what turns one step of one stream into its token, an f4 vector.

An encoder is asked once a step, in step order: ``encode`` where the step has content, ``skip`` where it is masked.
``reset`` comes before the first content of a new epoch, since nothing may leak over a break of the source's clock.
Content that an encoder cannot use raises ``Unusable``, which masks the step and is stated in the prediction: a camera
that sends garbage must not end the session.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from pipeline.bundle import Bundle
from pipeline.errors import BundleError, WireError
from pipeline.messages import FrameLayout, Message, array
from pipeline.modelfile import BundleStream
from pipeline.wire import decode_frame

Array = np.ndarray[Any, Any]


class Unusable(Exception):
    """Content that gives no token. ``reason`` is stated in the prediction: ``decode_failed`` (the payload's fault),
    ``encode_failed`` (the model could not take it)."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Encoder(Protocol):
    """One stream's encoder."""

    repeatable: bool
    """The same messages give the same token at any step, so that it may be kept."""

    def encode(self, content: Any, start_ns: int, end_ns: int) -> Array: ...
    def skip(self) -> None: ...
    def reset(self) -> None: ...


class Graph(Protocol):
    """What an encoder runs: an ONNX Runtime session; in training, the preprocessing alone."""

    def get_inputs(self) -> Sequence[Any]: ...
    def run(self, outputs: Sequence[str], feed: dict[str, Array]) -> Any: ...


class MessageEncoder:
    """An ONNX encoder of a stream whose step holds messages: frame, sweep, text, or batches as they came."""

    repeatable = True

    def __init__(self, session: Graph, stream: BundleStream, where: str) -> None:
        self._session, self._stream = session, stream
        shape = [d if isinstance(d, int) else 64 for d in session.get_inputs()[0].shape]
        empty = [0, *shape[1:]] if stream.rule.__class__.__name__ == "All" else shape
        kind = np.uint8 if stream.payload in ("frame", "text") else np.float32
        for size in (shape, empty):  # under the rule `all` a hop without messages is content, too
            try:
                self._run(np.zeros(size, kind))
            except Unusable as error:
                raise BundleError(f"{where}: the model fails on an input of the shape {size}: {error}.") from None

    def encode(self, content: tuple[Message, ...], start_ns: int, end_ns: int) -> Array:
        kind = np.uint8 if self._stream.payload == "text" else np.float32
        columns = {"text": (), "sweep": (5,)}.get(self._stream.payload, (self._stream.channels,))
        try:
            parts = [_rows(message) for message in content]
            whole = parts[0] if len(parts) == 1 else np.concatenate([np.zeros((0, *columns), kind), *parts])
        except (WireError, ValueError) as error:
            raise Unusable("decode_failed", str(error)) from None
        return self._run(whole)

    def _run(self, x: Array) -> Array:
        return _token(_run(self._session, ["token"], {"x": x})[0], self._stream.token)

    def skip(self) -> None:
        """Has no state."""

    def reset(self) -> None:
        """Has no state."""


class GridEncoder:
    """An ONNX encoder of a resampled stream, with the past samples and the state that it declares. A masked step is a
    hole in its past; a state runs through it with ``x`` and ``valid`` 0."""

    repeatable = False

    def __init__(self, session: Graph, stream: BundleStream, where: str) -> None:
        self._session, self._stream = session, stream
        names = {t.name: t for t in session.get_inputs()}
        self._takes_valid = "valid" in names
        self._zero_state: Array | None = np.zeros(names["state"].shape, np.float32) if "state" in names else None
        self._outputs = ["token", "state_out"] if self._zero_state is not None else ["token"]
        self._samples = np.empty((stream.context + stream.samples, stream.channels), np.float32)
        self.reset()
        try:
            self.encode(np.zeros((stream.samples, stream.channels), np.float32), 0, 0)
        except Unusable as error:
            raise BundleError(f"{where}: the model fails on a step of zeros: {error}.") from None
        self.reset()

    def encode(self, content: Array, start_ns: int, end_ns: int) -> Array:
        grid = np.asarray(content, np.float32)
        if grid.shape != (self._stream.samples, self._stream.channels):
            self.skip()
            raise Unusable("decode_failed", f"a grid of {grid.shape} where the bundle needs {self._samples.shape}")
        self._push(grid)
        return _token(self._run(), self._stream.token)

    def skip(self) -> None:
        self._push(np.nan)
        if self._zero_state is not None:
            self._run()

    def reset(self) -> None:
        self._samples[:] = np.nan
        self._state: Array | None = self._zero_state

    def _push(self, step: Any) -> None:
        """Moves the past on by one step."""
        context, n = self._stream.context, self._stream.samples
        self._samples[:context] = self._samples[n:]
        self._samples[context:] = step

    def _run(self) -> Array:
        hole: Array = np.isnan(self._samples)
        feed: dict[str, Array] = {"x": np.where(hole, np.float32(0), self._samples)}
        if self._takes_valid:
            feed["valid"] = np.asarray(~hole.all(axis=1), np.float32)
        if self._state is not None:
            feed["state"] = self._state
        token, *state = _run(self._session, self._outputs, feed)
        if state:
            # A state that has left the numbers would mask this stream for the rest of the session.
            self._state = state[0] if np.isfinite(state[0]).all() else self._zero_state
        return token


class PythonEncoder:
    """An encoder in Python. It is given decoded frames, and is called every step, for it may keep a state."""

    repeatable = False

    def __init__(self, bundle: Bundle, name: str, stream: BundleStream) -> None:
        where = f"{bundle.path}, the encoder of `{name}` ({stream.encoder})"
        try:
            self._expert = bundle.experts[name](name, dict(stream.settings))
        except BundleError as error:
            raise BundleError(f"{where}: {error}") from error
        except Exception as error:  # the foreign class's fault, whatever it is
            raise BundleError(f"{where}: it cannot be made: {type(error).__name__}: {error}.") from error
        self._stream = stream
        if (token := getattr(self._expert, "token", None)) != stream.token:
            raise BundleError(f"{where}: its token has {token} numbers, model.yaml says {stream.token}; correct one.")

    def encode(self, content: Any, start_ns: int, end_ns: int) -> Array:
        try:
            given = tuple(map(_decoded, content)) if isinstance(content, tuple) else content
        except (WireError, ValueError) as error:
            self.skip()
            raise Unusable("decode_failed", str(error)) from None
        try:
            token = np.asarray(self._expert.encode(given, start_ns, end_ns), np.float32)
        except Exception as error:
            raise Unusable("encode_failed", f"{type(error).__name__}: {error}") from error
        return _token(token, self._stream.token)

    def skip(self) -> None:
        self._expert.skip()

    def reset(self) -> None:
        self._expert.reset()


def _run(session: Graph, outputs: list[str], feed: dict[str, Array]) -> list[Array]:
    try:
        result: list[Array] = session.run(outputs, feed)
    except Exception as error:  # onnxruntime's exception classes share no public base but Exception
        raise Unusable("encode_failed", str(error).strip().split("\n")[0]) from None
    return result


def _token(token: Array, size: int) -> Array:
    if token.shape != (size,):
        raise Unusable("encode_failed", f"the token has the shape {list(token.shape)} instead of [{size}]")
    if not np.isfinite(token).all():
        raise Unusable("encode_failed", "the token has numbers that are not finite")
    return token


def _decoded(message: Message) -> Message:
    """The message; a compressed frame as BGR."""
    layout = message.header.layout
    if not isinstance(layout, FrameLayout) or layout.format == "bgr8":
        array(message)  # raises ValueError where the payload does not fit
        return message
    pixels = decode_frame(message)
    plain = FrameLayout("bgr8", pixels.shape[0], pixels.shape[1])
    return Message(msgspec.structs.replace(message.header, layout=plain), pixels)


def _rows(message: Message) -> Array:
    """A message's payload as an ONNX encoder takes it (see ``bundle.encoder_input``)."""
    if isinstance(message.header.layout, FrameLayout):
        return decode_frame(message)
    data = array(message)
    names = data.dtype.names or ()
    if "intensity" in names:
        offset_s = data["offset_ns"] * np.float32(1e-9)
        columns = [data["x"], data["y"], data["z"], data["intensity"], offset_s]
        return np.stack(columns, axis=1, dtype=np.float32, casting="same_kind")
    if "accel" in names:
        return np.concatenate([data["accel"], data["gyro"]], axis=1)
    if "value" in names:
        return np.ascontiguousarray(data["value"])
    return data.astype(np.float32) / np.float32(32768) if data.dtype == np.dtype("<i2") else data
