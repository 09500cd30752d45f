"""Torch modules as ONNX files: self-contained, the same bytes from the same weights, and checked against torch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from pipeline.bundle import encoder_input
from pipeline.errors import BundleError
from pipeline.learn.encoders import StepGraph, StreamEncoder
from pipeline.learn.fusion import Fusion, WindowGraph
from pipeline.modelfile import BundleStream
from pipeline.onnxfile import open_session

Array = np.ndarray[Any, Any]
OPSET = 18
TOLERANCE = 1e-4
"""How far torch and ONNX Runtime may be apart, absolutely or as a share of the greatest value."""


def encoder_graph(encoder: StreamEncoder, stream: BundleStream, example: Mapping[str, Array]) -> bytes:
    """encoder.STREAM.onnx, traced on the inputs of one real step."""
    x = encoder_input(stream)
    open_ = {i: torch.export.Dim.DYNAMIC for i, size in enumerate(x.shape) if not isinstance(size, int)}
    shapes: dict[str, Any] = {"x": open_}
    given = {"x": torch.from_numpy(example["x"])}
    if stream.samples:
        given["valid"] = torch.from_numpy(example["valid"])
        shapes["valid"] = {}
    return _export(StepGraph(encoder), tuple(given.values()), list(given), "token", tuple(shapes.values()))


def fusion_graph(fusion: Fusion, rows: int = 3) -> bytes:
    """fusion.onnx, for any number of windows at once."""
    graph = WindowGraph(fusion)
    given = []
    for token in fusion.tokens.values():
        given += [torch.randn(rows, fusion.steps, token), torch.ones(rows, fusion.steps)]
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    return _export(graph, tuple(given), graph.inputs, "logits", (tuple({0: batch} for _ in given),))


def _export(
    module: nn.Module, given: tuple[torch.Tensor, ...], inputs: Sequence[str], output: str, shapes: Any
) -> bytes:
    module.eval()
    try:
        with warnings.catch_warnings(), _quiet(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's own, about itself
            program: Any = torch.onnx.export(
                module, given, input_names=list(inputs), output_names=[output], dynamic_shapes=shapes,
                opset_version=OPSET, dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # the exporter raises all kinds
        why = str(error).strip().splitlines()
        raise BundleError(
            f"{type(module).__name__} cannot be exported to ONNX: {type(error).__name__}: {why[0] if why else ''}"
        ) from error
    data: bytes = _plain(program.model_proto).SerializeToString(deterministic=True)
    return data


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints and logs how it is getting on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` without what depends on where and by whom it was made: stack traces with paths, names of classes."""
    model.producer_name, model.producer_version, model.doc_string = "sensorium", "", ""
    del model.metadata_props[:]
    for graph in [model.graph, *model.functions]:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
        for value in [*graph.value_info, *getattr(graph, "input", ()), *getattr(graph, "output", ())]:
            if hasattr(value, "metadata_props"):
                del value.metadata_props[:]
                value.doc_string = ""
    return model


def check_encoder(data: bytes, encoder: StreamEncoder, samples: Sequence[Mapping[str, Array]], where: str) -> float:
    """The greatest distance of ONNX Runtime's tokens from torch's on ``samples``, and on the same with nothing valid.
    BundleError if it is too great."""
    session, graph = open_session(data, where), StepGraph(encoder).eval()
    names = [given.name for given in session.get_inputs()]
    worst = 0.0
    cases = [dict(sample) for sample in samples]
    cases += [{"x": sample["x"] * 0, "valid": sample["valid"] * 0} for sample in samples[:1] if "valid" in sample]
    for case in cases:
        with torch.no_grad():
            expected = graph(*(torch.from_numpy(np.ascontiguousarray(case[name])) for name in names)).numpy()
        worst = max(
            worst, _distance(_run(session, "token", {name: case[name] for name in names}, where), expected, where)
        )
    return worst


def check_fusion(data: bytes, fusion: Fusion, given: Mapping[str, Array], where: str) -> float:
    """The same for the logits of the windows in ``given``, by the names of the graph's inputs."""
    session, graph = open_session(data, where), WindowGraph(fusion).eval()
    with torch.no_grad():
        expected = graph(*(torch.from_numpy(given[name]) for name in graph.inputs)).numpy()
    return _distance(_run(session, "logits", dict(given), where), expected, where)


def _run(session: Any, output: str, feed: dict[str, Array], where: str) -> Array:
    try:
        found: Array = session.run([output], feed)[0]
    except Exception as error:  # onnxruntime's exception classes share no public base but Exception
        raise BundleError(f"{where}: the exported model fails: {str(error).splitlines()[0]}") from None
    return found


def _distance(found: Array, expected: Array, where: str) -> float:
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise BundleError(
            f"{where}: ONNX Runtime gives {list(found.shape)}, not all finite, for {list(expected.shape)}"
        )
    distance = float(np.abs(found - expected).max(initial=0.0))
    if distance > TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0.0))):
        raise BundleError(
            f"{where}: ONNX Runtime and torch are {distance:.2g} apart, where {TOLERANCE:g} is allowed, so what would "
            "run is not what was trained. No bundle is written; please report the training file"
        )
    return distance
