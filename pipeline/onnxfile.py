"""ONNX Runtime, set up the one way that this project uses it: deterministic, quiet, and sparing with cores.

A session is opened from bytes whose digest was checked, never from a path, so that what was checked is what runs; for
the same reason a model must hold its weights itself (no external data files). Spinning is off: ONNX Runtime's threads
otherwise burn a core between two windows. ``fingerprint`` names all that floats may depend on.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import onnxruntime as ort

from pipeline.errors import BundleError, ConfigError, listed, nearest

OPSETS = range(11, 24)
"""Opset versions of the standard operators that a bundle may use: the oldest supported onnxruntime runs all of them."""

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Operator sets that onnxruntime brings itself; anything else would need a native library of somebody's."""

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
"""What a rig may write under ``fusion.providers``, and what ONNX Runtime calls it."""

OPTIMISATION = "all"
Dim = int | str
"""An expected dimension: a number (the model must have it or leave it open), ``"*"`` (the model must leave it open),
``"?"`` (the model may do either)."""


class Tensor(NamedTuple):
    """What one side expects of a tensor: type as ``f4`` or ``u1``, and its dimensions."""

    type: str
    shape: tuple[Dim, ...]


_TYPES = {
    "tensor(float)": "f4", "tensor(float16)": "f2", "tensor(double)": "f8",
    "tensor(uint8)": "u1", "tensor(int32)": "i4", "tensor(int64)": "i8",
}  # fmt: skip


def open_session(
    data: bytes, where: str, threads: int = 1, providers: Sequence[str] = ("cpu",), optimise: bool = True
) -> ort.InferenceSession:
    """A session on the model ``data``; ``where`` names it in errors. Raises BundleError, ConfigError (providers)."""
    check_opsets(data, where)
    _check_one_file(data, where)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong comes as an exception; the rest is noise on a user's terminal
    try:
        return ort.InferenceSession(data, options, providers=resolve_providers(providers))
    except Exception as error:  # onnxruntime's exception classes share no public base but Exception
        raise BundleError(
            f"{where}: onnxruntime {ort.__version__} cannot load this model: {_first_line(error)}. Export it again as "
            f"one self-contained file with an opset from {OPSETS[0]} to {OPSETS[-1]}."
        ) from None


def resolve_providers(names: Sequence[str]) -> list[str]:
    """ONNX Runtime's names of those of ``names`` that this installation has, the CPU last. ConfigError if one is
    unknown; one that is known but not installed is left out, and ``provider_in_use`` says so."""
    for name in names:
        if name not in PROVIDERS and name not in PROVIDERS.values():
            raise ConfigError(
                f"`{name}` is no execution provider.{nearest(name, PROVIDERS)} Allowed: {listed(PROVIDERS)}."
            )
    available = ort.get_available_providers()
    wanted = [PROVIDERS.get(name, name) for name in names]
    return [name for name in dict.fromkeys([*wanted, PROVIDERS["cpu"]]) if name in available]


def provider_in_use(session: ort.InferenceSession, asked: Sequence[str]) -> str:
    """The provider that ``session`` really runs on, and in brackets the one asked for first if it is another one:
    ``"cpu (cuda is not available)"``."""
    short = {long: name for name, long in PROVIDERS.items()}
    used = short.get(session.get_providers()[0], session.get_providers()[0])
    first = short.get(asked[0], asked[0]) if asked else used
    return used if used == first else f"{used} ({first} is not available)"


def check_signature(
    session: ort.InferenceSession,
    where: str,
    inputs: dict[str, Tensor],
    outputs: dict[str, Tensor],
    optional: Sequence[str] = (),
) -> None:
    """Raises BundleError unless the model has exactly these inputs (those in ``optional`` may be absent) and at least
    these outputs, with these types and shapes."""
    for kind, expected, found in (
        ("input", inputs, {t.name: t for t in session.get_inputs()}),
        ("output", outputs, {t.name: t for t in session.get_outputs()}),
    ):
        for name, tensor in expected.items():
            if name not in found and name not in optional:
                raise BundleError(
                    f"{where}: the model has no {kind} `{name}`; its {kind}s are {listed(found) or 'none'}, and "
                    f"model.yaml needs {listed(expected)}.{nearest(name, found)}"
                )
            if name in found:
                _check_tensor(f"{where}: its {kind} `{name}`", found[name], tensor)
        if kind == "input" and (extra := [name for name in found if name not in expected]):
            raise BundleError(
                f"{where}: the model has the input `{extra[0]}`, which model.yaml gives nothing to feed with; it can "
                f"feed {listed(expected)}.{nearest(extra[0], expected)}"
            )


def _check_tensor(what: str, found: Any, expected: Tensor) -> None:
    kind = _TYPES.get(found.type, found.type)
    shape = list(found.shape)
    fits = kind == expected.type and len(shape) == len(expected.shape)
    if fits and not all(map(_dim_fits, shape, expected.shape)):
        fits = False
    if not fits:
        remedy = "Correct model.yaml or export the model again."
        if kind != expected.type:
            remedy = f"This type is always {expected.type}: convert it inside the model, and export it again."
        raise BundleError(
            f"{what} is {kind} {_shape(shape)}, but model.yaml needs {expected.type} {_shape(expected.shape)}"
            f"{' (* must be a dynamic dimension)' if '*' in expected.shape else ''}. {remedy}"
        )


def _dim_fits(found: Any, expected: Dim) -> bool:
    fixed = isinstance(found, int)
    return not fixed if expected == "*" else expected == "?" or not fixed or found == expected


def _shape(shape: Sequence[Any]) -> str:
    return f"[{', '.join('?' if d is None else str(d) for d in shape)}]"


def check_opsets(data: bytes, where: str) -> None:
    """Raises BundleError unless ``data`` is an ONNX model on operator sets that this project supports."""
    try:
        found = dict(_opsets(data))
    except (IndexError, ValueError):
        found = {}
    if not found:
        raise BundleError(f"{where}: this file is no ONNX model ({len(data)} bytes). Export the model again.")
    for domain, version in found.items():
        if domain not in DOMAINS:
            raise BundleError(
                f"{where}: the model uses the operator set `{domain}`, which onnxruntime does not bring; allowed are "
                f"{listed(d or 'ai.onnx' for d in DOMAINS if d != 'ai.onnx')}. Export it with standard operators."
            )
        if domain in ("", "ai.onnx") and version not in OPSETS:
            raise BundleError(
                f"{where}: the model has opset {version}; supported are {OPSETS[0]} to {OPSETS[-1]}. Export it with "
                f"one of these (opset_version={OPSETS[-1]})."
            )


def _check_one_file(data: bytes, where: str) -> None:
    """Raises BundleError for weights in another file: onnxruntime would take whatever lies under that name in the
    current folder, whose digest nobody has checked."""
    try:
        found = next(_outside(memoryview(data), _MODEL), None)
    except (IndexError, ValueError):
        return  # which onnxruntime says better
    if found is not None:
        tensor, file = found
        raise BundleError(
            f"{where}: weights of this model (`{tensor}`) lie in another file, `{file}`, and each model of a bundle is "
            "one file with all of its weights. Export it so (torch.onnx.export(…, external_data=False)), or load and "
            "save it with the package onnx."
        )


_TENSOR: dict[int, Any] = {}
_GRAPH: dict[int, Any] = {}
_SPARSE = {1: _TENSOR, 2: _TENSOR}
_ATTRIBUTE = {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE}
_NODE = {5: _ATTRIBUTE}
_GRAPH |= {1: _NODE, 5: _TENSOR, 15: _SPARSE}
_MODEL = {7: _GRAPH, 25: {7: _NODE, 11: _ATTRIBUTE}}
"""Where the tensors of a ModelProto lie: number of a field -> what it holds."""


def _outside(message: memoryview, parts: dict[int, Any]) -> Iterator[tuple[str, str]]:
    """(name, file) of each tensor in ``message`` whose data lie in another file."""
    if parts is _TENSOR:
        name, file, elsewhere = "", "", False
        for number, value in _protobuf(message):
            if number == 8 and isinstance(value, memoryview):  # TensorProto.name
                name = bytes(value).decode("utf-8", "replace")
            elif number == 13 and isinstance(value, memoryview):  # TensorProto.external_data: a key and a value
                entry = {key: bytes(text) for key, text in _protobuf(value) if isinstance(text, memoryview)}
                if entry.get(1) == b"location":
                    file = entry.get(2, b"").decode("utf-8", "replace")
                elsewhere = True
            elif number == 14:  # TensorProto.data_location
                elsewhere = elsewhere or value == 1
        if elsewhere:
            yield name, file
        return
    for number, value in _protobuf(message):
        if number in parts and isinstance(value, memoryview):
            yield from _outside(value, parts[number])


def _opsets(data: bytes) -> Iterator[tuple[str, int]]:
    """(domain, version) of each operator set that a serialised ModelProto imports. ValueError, IndexError if it is
    none. (The ``onnx`` package would bring this and 20 MB more.)"""
    for number, value in _protobuf(memoryview(data)):
        if number == 8 and isinstance(value, memoryview):  # ModelProto.opset_import
            entry = dict(_protobuf(value))
            domain, version = entry.get(1, memoryview(b"")), entry.get(2, 0)
            if isinstance(domain, int) or isinstance(version, memoryview):
                raise ValueError("an operator set is a name and a number")
            yield bytes(domain).decode(), version


def _protobuf(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: number, and an integer or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("varint too long")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")


def fingerprint(provider: str = "cpu", threads: int = 1) -> dict[str, str]:
    """All that the floats of a prediction may depend on beside the bundle and the messages. Two runs with equal
    fingerprints give equal bytes; others agree within rounding."""
    return {
        "onnxruntime": ort.__version__,
        "provider": provider,
        "threads": str(threads),
        "optimisation": OPTIMISATION,
        "machine": platform.machine(),
        "cpu": _cpu_features(),
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }


def _cpu_features() -> str:
    """The vector instructions of this CPU, which choose ONNX Runtime's kernels; the CPU's name where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    vector = ("sse", "ssse", "avx", "fma", "f16c", "amx", "asimd", "sve", "sme", "i8mm", "bf16", "dotprod")
    return " ".join(sorted({flag for flag in flags if flag.startswith(vector)}))
