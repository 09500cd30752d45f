"""The call that fuses: the window's tokens in, logits for every subset of the streams out.

``FusionGraph`` runs a bundle's fusion.onnx, all subsets as one batch. ``WholeGraph`` runs somebody's own model of whole
windows, whose inputs model.yaml maps to streams; its encoders only lay out what the streams hold, and what is masked or
missing is zeros, since such a model knows no masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import cv2
import numpy as np
import onnxruntime as ort

from pipeline.bundle import Bundle
from pipeline.encoding import Encoder, GridEncoder, MessageEncoder, PythonEncoder, Unusable
from pipeline.errors import BundleError, WireError
from pipeline.messages import Message
from pipeline.modelfile import BundleStream, WholeInput
from pipeline.onnxfile import open_session
from pipeline.wire import decode_frame

Array = np.ndarray[Any, Any]


ROUNDING = 1e-3
"""So far a probability may lie outside of 0 to 1."""


class Part(Protocol):
    """One stream's part of the window: tokens f4 [steps, token], mask f4 [steps]."""

    tokens: Array
    mask: Array


class Fusion(Protocol):
    """What makes logits of a window."""

    session: ort.InferenceSession

    def logits(self, parts: Mapping[str, Part], members: Array) -> Array:
        """Logits [rows, labels]; ``members`` boolean [rows, streams], in the order of ``parts``, says which streams
        each row sees. Raises BundleError."""


def make_fusion(bundle: Bundle, threads: int, providers: tuple[str, ...]) -> Fusion:
    """What fuses this bundle's window. Raises BundleError, ConfigError (providers)."""
    where = str(bundle.path / bundle.fusion)
    session = open_session(bundle.files[bundle.fusion], where, threads, providers)
    return FusionGraph(bundle, session, where) if bundle.whole is None else WholeGraph(bundle, session, where)


def make_encoder(bundle: Bundle, name: str, threads: int, providers: tuple[str, ...]) -> Encoder:
    """The encoder of the stream ``name``, warmed up. Raises BundleError."""
    stream = bundle.streams[name]
    if bundle.whole is not None:
        given = next(i for i in bundle.whole.inputs.values() if i.stream == name)
        return RawGrid(stream) if stream.samples else RawPicture(given, bundle.frame_sizes[name])
    if stream.is_python:
        return PythonEncoder(bundle, name, stream)
    where = str(bundle.path / stream.encoder)
    session = open_session(bundle.files[stream.encoder], where, threads, providers)
    return (GridEncoder if stream.samples else MessageEncoder)(session, stream, where)


class FusionGraph:
    """fusion.onnx: inputs ``<stream>`` f4 [batch, steps, token], ``mask.<stream>`` f4 [batch, steps]."""

    def __init__(self, bundle: Bundle, session: ort.InferenceSession, where: str) -> None:
        self.session = session
        self._where, self._labels = where, len(bundle.labels)
        self._buffers: dict[str, Array] = {}

    def logits(self, parts: Mapping[str, Part], members: Array) -> Array:
        rows, feed = len(members), {}
        for i, (name, part) in enumerate(parts.items()):
            tokens = feed[name] = self._buffer(name, rows, part.tokens.shape)
            mask = feed[f"mask.{name}"] = self._buffer(f"mask.{name}", rows, part.mask.shape)
            # Tokens are zeroed as well as masked: no graph, however made, may see what is left out.
            np.multiply(part.tokens, members[:, i, None, None], out=tokens)
            np.multiply(part.mask, members[:, i, None], out=mask)
        return _run(self.session, "logits", feed, (rows, self._labels), self._where)

    def _buffer(self, name: str, rows: int, shape: tuple[int, ...]) -> Array:
        kept = self._buffers.get(name)
        if kept is None or len(kept) < rows:
            kept = self._buffers[name] = np.empty((rows, *shape), np.float32)
        return kept[:rows]


class WholeGraph:
    """A user's own model of whole windows. A picture is the newest one of the window."""

    def __init__(self, bundle: Bundle, session: ort.InferenceSession, where: str) -> None:
        assert bundle.whole is not None
        self.session = session
        self._where, self._labels, self._whole = where, len(bundle.labels), bundle.whole
        self._streams, self._sizes = bundle.streams, bundle.frame_sizes
        self._output = bundle.whole.output or session.get_outputs()[0].name
        self._one_by_one = session.get_inputs()[0].shape[0] == 1

    def logits(self, parts: Mapping[str, Part], members: Array) -> Array:
        column = {name: i for i, name in enumerate(parts)}
        feed = {}
        for name, given in self._whole.inputs.items():
            window = self._window(given, parts[given.stream])
            member = members[:, column[given.stream]].reshape(-1, *(1,) * window.ndim)
            feed[name] = np.ascontiguousarray(window * member, np.float32)
        lots = range(len(members)) if self._one_by_one else [slice(None)]
        found = []
        for lot in lots:
            some = {name: value[lot][None] if isinstance(lot, int) else value[lot] for name, value in feed.items()}
            shape = (1 if isinstance(lot, int) else len(members), self._labels)
            found.append(_run(self.session, self._output, some, shape, self._where))
        result: Array = np.concatenate(found)
        if self._whole.gives == "probabilities":
            if (result < -ROUNDING).any() or (result > 1 + ROUNDING).any():
                raise BundleError(
                    f"{self._where}: the output `{self._output}` reaches from {np.nanmin(result):.3g} to "
                    f"{np.nanmax(result):.3g}, and probabilities lie between 0 and 1. Write `gives: logits` under "
                    "`model` in model.yaml, or let the model end with a softmax."
                )
            result = np.log(np.maximum(result, np.float32(1e-12)))
        return result

    def _window(self, given: WholeInput, part: Part) -> Array:
        """What the model sees of one stream: [time, channel] or [height, width, channel], in the order it wants."""
        stream = self._streams[given.stream]
        if stream.samples:
            grid = part.tokens.reshape(-1, stream.channels)
            return grid.T if given.layout == "bct" else grid
        newest = np.flatnonzero(part.mask)
        picture: Array = part.tokens[newest[-1] if len(newest) else -1].reshape(*self._sizes[given.stream], 3)
        return picture.transpose(2, 0, 1) if given.layout == "bchw" else picture


class _Noise:
    """A stream of noise around a value."""

    def __init__(self, stream: BundleStream, steps: int, rng: np.random.Generator, value: float) -> None:
        self.tokens: Array = rng.standard_normal((steps, stream.token), np.float32) + np.float32(value)
        self.mask: Array = np.ones(steps, np.float32)


def doubt(bundle: Bundle) -> str:
    """What is doubtful about a user's own model, in a sentence; "" if nothing is. A few windows of noise tell. Raises
    BundleError where the model cannot do what its file says."""
    if bundle.whole is None:
        return ""
    graph, rng = make_fusion(bundle, 1, ("cpu",)), np.random.default_rng(0)
    members = np.ones((1, len(bundle.streams)), bool)
    rows = []
    for value in (0.0, 100.0, -100.0):
        parts = {name: _Noise(stream, bundle.window.steps, rng, value) for name, stream in bundle.streams.items()}
        rows.append(graph.logits(parts, members)[0])
    found = np.array(rows)
    if bundle.whole.gives == "probabilities" or (found < 0).any() or not np.allclose(found.sum(axis=1), 1, atol=1e-4):
        return ""
    return (
        f"what {bundle.fusion} gives lies between 0 and 1 and sums to 1, as probabilities do, and is taken for logits, "
        "which flattens it. If it ends with a softmax write `gives: probabilities` under `model` in its model.yaml"
    )


class RawGrid:
    """The samples of a step as they are, one row after another; holes are zeros."""

    repeatable = False

    def __init__(self, stream: BundleStream) -> None:
        self._shape = (stream.samples, stream.channels)

    def encode(self, content: Array, start_ns: int, end_ns: int) -> Array:
        if content.shape != self._shape:
            raise Unusable("decode_failed", f"a grid of {content.shape} where the bundle needs {self._shape}")
        samples: Array = np.nan_to_num(content, nan=0.0).reshape(-1)
        return samples

    def skip(self) -> None:
        """Has no state."""

    def reset(self) -> None:
        """Has no state."""


class RawPicture:
    """A picture in the model's size and colours, scaled."""

    repeatable = True

    def __init__(self, given: WholeInput, size: tuple[int, int]) -> None:
        self._given, self._size = given, size

    def encode(self, content: tuple[Message, ...], start_ns: int, end_ns: int) -> Array:
        try:
            pixels = decode_frame(content[-1])
            if pixels.shape[:2] != self._size:
                pixels = cv2.resize(pixels, self._size[::-1], interpolation=cv2.INTER_AREA)
        except (WireError, ValueError, cv2.error) as error:
            raise Unusable("decode_failed", str(error)) from None
        ordered = pixels[..., ::-1] if self._given.color == "rgb" else pixels
        return (ordered.astype(np.float32) * np.float32(self._given.scale)).reshape(-1)

    def skip(self) -> None:
        """Has no state."""

    def reset(self) -> None:
        """Has no state."""


def _run(
    session: ort.InferenceSession, output: str, feed: dict[str, Array], shape: tuple[int, int], where: str
) -> Array:
    try:
        found: Array = session.run([output], feed)[0]
    except Exception as error:  # onnxruntime's exception classes share no public base but Exception
        raise BundleError(f"{where}: the model fails on {shape[0]} windows: {str(error).splitlines()[0]}.") from None
    if found.shape != shape:
        raise BundleError(
            f"{where}: for {shape[0]} windows the output `{output}` has the shape {list(found.shape)} instead of "
            f"{list(shape)}. Export it with a batch dimension."
        )
    return found
