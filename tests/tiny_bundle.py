"""Bundles small enough to be read: made with onnx.helper, for tests of what runs them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from onnx import TensorProto, helper, numpy_helper

from pipeline.align import Manifest, StreamManifest
from pipeline.messages import POINT_DTYPE, FrameLayout, Header, Message, SweepLayout

HOP_NS = 100_000_000
LABELS = ("no", "yes")
GRID = {"payload": "imu", "rule": {"kind": "resample", "rate_hz": 100, "max_gap_ms": 50}}
SWEEP = {"payload": "sweep", "rule": {"kind": "latest", "max_age_ms": 250}}
ALL = {"kind": "all"}
FRAME = {"payload": "frame", "rule": {"kind": "nearest", "tolerance_ms": 50}}


def model(
    nodes: Sequence[Any],
    inputs: Mapping[str, tuple[str, Sequence[Any]]],
    outputs: Mapping[str, Sequence[Any]],
    constants: Mapping[str, Any] | None = None,
    opset: int = 18,
) -> bytes:
    """A serialised model; inputs are (type ``f4`` or ``u1``, shape), outputs f4 shapes."""
    kinds = {"f4": TensorProto.FLOAT, "u1": TensorProto.UINT8}
    graph = helper.make_graph(
        list(nodes), "tiny",
        [helper.make_tensor_value_info(n, kinds[k], list(s)) for n, (k, s) in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    data: bytes = made.SerializeToString()
    return data


node = helper.make_node


def mean_encoder(stream: Mapping[str, Any]) -> bytes:
    """token [1]: the mean of all that ``x`` holds."""
    shapes: dict[str, tuple[str, list[Any]]] = {
        "frame": ("u1", ["h", "w", 3]), "sweep": ("f4", ["n", 5]), "text": ("u1", ["n"]),
        "imu": ("f4", [10, 6]),
        "signal": ("f4", ["n" if stream.get("rule") == ALL else 10, stream.get("channels", 1)]),
    }  # fmt: skip
    kind, shape = shapes[stream["payload"]]
    nodes = [
        node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        node("ReduceSum", ["f"], ["sum"], keepdims=0),
        node("Size", ["f"], ["size"]),
        node("Cast", ["size"], ["count"], to=TensorProto.FLOAT),
        node("Max", ["count", "one"], ["divisor"]),
        node("Div", ["sum", "divisor"], ["mean"]),
        node("Reshape", ["mean", "shape"], ["token"]),
    ]
    constants = {"shape": np.array([1]), "one": np.float32(1)}
    return model(nodes, {"x": (kind, shape)}, {"token": [1]}, constants)


def linear_fusion(streams: Mapping[str, Mapping[str, Any]], weights: Mapping[str, float], bias: float = 0.0) -> bytes:
    """logits [0, bias + sum over streams of weight * sum over steps of mask * (1 + token)]."""
    nodes, inputs, constants = [], {}, {"one": np.float32(1), "axes": np.array([1]), "last": np.array([2])}
    parts = []
    for name in streams:
        inputs |= {name: ("f4", ["batch", "steps", 1]), f"mask.{name}": ("f4", ["batch", "steps"])}
        constants[f"w.{name}"] = np.float32(weights[name])
        nodes += [
            node("Squeeze", [name, "last"], [f"{name}.flat"]),
            node("Add", [f"{name}.flat", "one"], [f"{name}.more"]),
            node("Mul", [f"{name}.more", f"mask.{name}"], [f"{name}.masked"]),
            node("ReduceSum", [f"{name}.masked", "axes"], [f"{name}.sum"], keepdims=1),
            node("Mul", [f"{name}.sum", f"w.{name}"], [f"{name}.part"]),
        ]
        parts.append(f"{name}.part")
    constants["bias"] = np.array([[bias]], np.float32)
    nodes += [
        node("Sum", parts, ["sum"]),
        node("Add", ["sum", "bias"], ["yes"]),
        node("Sub", ["yes", "yes"], ["no"]),
        node("Concat", ["no", "yes"], ["logits"], axis=1),
    ]
    return model(nodes, inputs, {"logits": ["batch", 2]}, constants)


def product_fusion(streams: Mapping[str, Mapping[str, Any]]) -> bytes:
    """logits [0, product over streams of (1 + newest token * mask)]: streams interact."""
    nodes, inputs = [], {}
    constants: dict[str, Any] = {"one": np.float32(1), "axes": np.array([1]), "last": np.array([2])}
    previous = "one"
    for name in streams:
        inputs |= {name: ("f4", ["batch", "steps", 1]), f"mask.{name}": ("f4", ["batch", "steps"])}
        nodes += [
            node("Squeeze", [name, "last"], [f"{name}.flat"]),
            node("Mul", [f"{name}.flat", f"mask.{name}"], [f"{name}.masked"]),
            node("ReduceSum", [f"{name}.masked", "axes"], [f"{name}.sum"], keepdims=1),
            node("Add", [f"{name}.sum", "one"], [f"{name}.factor"]),
            node("Mul", [previous, f"{name}.factor"], [f"{name}.product"]),
        ]
        previous = f"{name}.product"
    nodes += [node("Sub", [previous, previous], ["no"]), node("Concat", ["no", previous], ["logits"], axis=1)]
    return model(nodes, inputs, {"logits": ["batch", 2]}, constants)


def write_bundle(
    folder: Path,
    streams: Mapping[str, Mapping[str, Any]],
    *,
    fusion: bytes | None = None,
    encoders: Mapping[str, bytes] | None = None,
    files: Mapping[str, bytes] | None = None,
    steps: int = 3,
    **more: Any,
) -> Path:
    """A bundle in ``folder``: mean encoders and a linear fusion of weight 1 unless others are given; ``more`` are keys
    of model.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, dict[str, Any]] = {}
    contents: dict[str, bytes] = dict(files or {})
    for name, stream in streams.items():
        entries[name] = {"encoder": f"encoder.{name}.onnx", "token": 1} | dict(stream)
        if not entries[name]["encoder"].startswith("python:"):
            contents[entries[name]["encoder"]] = (encoders or {}).get(name) or mean_encoder(stream)
    contents["fusion.onnx"] = fusion or linear_fusion(streams, dict.fromkeys(streams, 1.0))
    for file, data in contents.items():
        (folder / file).write_bytes(data)
    text = {
        "name": "tiny", "window": {"hop_ms": 100, "steps": steps}, "streams": entries, "fusion": "fusion.onnx",
        "labels": list(LABELS), "lineage": {"files": {f: hashlib.sha256(d).hexdigest() for f, d in contents.items()}},
    } | more  # fmt: skip
    (folder / "model.yaml").write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    return folder


def manifest(step: int, streams: Mapping[str, StreamManifest]) -> Manifest:
    """The manifest of a step that came out 5 ms after its end."""
    return Manifest(step=step, start_ns=(step - 1) * HOP_NS, end_ns=step * HOP_NS, cause="proven",
                    emitted_ns=step * HOP_NS + 5_000_000, digest=f"{step:032x}", streams=dict(streams))  # fmt: skip


def ok(step: int, seq: int | None = None, epoch: int = 0, uncertainty_ns: int = 0) -> StreamManifest:
    """A stream that has all it should; its newest content is 20 ms old."""
    number = step if seq is None else seq
    return StreamManifest(verdict="ok", proven=True, used=((epoch, number, number),), epoch=epoch,
                          newest_ns=step * HOP_NS - 20_000_000, uncertainty_ns=uncertainty_ns)  # fmt: skip


MISSING = StreamManifest(verdict="missing", reason="dead", coverage=0.0)


def grid(value: float) -> np.ndarray[Any, Any]:
    """A step of an IMU at 100 Hz that reads ``value`` everywhere."""
    return np.full((10, 6), value, np.float32)


def sweep(value: float, seq: int = 0, points: int = 4) -> tuple[Message, ...]:
    """A sweep whose x, y, z and intensity are ``value``."""
    cloud = np.zeros(points, POINT_DTYPE)
    for column in ("x", "y", "z", "intensity"):
        cloud[column] = value
    return (Message(header("lidar", seq, SweepLayout(points)), cloud),)


def frame(pixels: np.ndarray[Any, Any], seq: int = 0) -> tuple[Message, ...]:
    """A BGR frame."""
    return (Message(header("camera", seq, FrameLayout("bgr8", pixels.shape[0], pixels.shape[1])), pixels),)


def header(stream: str, seq: int, layout: Any) -> Header:
    return Header(
        stream=stream, seq=seq, epoch=0, t_capture_ns=0, t_end_ns=0, bound_ns=1, t_receipt_ns=0, layout=layout
    )
