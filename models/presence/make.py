"""Write fusion.onnx, and its digest into model.yaml: python models/presence/make.py

Nothing here is learnt. The graph is the theorem of total probability over three questions that the experts answer,
each averaged over the window: is a face there (f), is there a voice (v), is the mouth that is seen the one that speaks
(s, from how much of the time it moves). Then

    nobody            (1 - f) (1 - v)
    person_silent     f (1 - v)
    person_speaking   v f s
    voice_off_camera  v (1 - f s)

which sums to one. What was not observed enters as a prior of a small weight, so that few steps give less certainty
than many and a stream that is missing leaves its question open instead of answered with no.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LABELS = ("nobody", "person_silent", "person_speaking", "voice_off_camera")
STEPS = 8
TOKENS = {"camera": 3, "microphone": 2}

WEIGHT_OF_PRIOR = 0.1
"""In steps: how much the priors below weigh against what was observed."""
FADE_FACE, FADE_VOICE, FADE_MOUTH = 3.0, 1.5, 6.0
"""Steps after which an observation weighs 1/e. A mouth needs the longest: it rests within every word."""
FACE_UNSEEN, MOVING_UNSEEN = 0.45, 0.35
"""Without a camera: is somebody before it, and does that mouth move."""
MOVING_SPEAKS, SHARPNESS = 0.30, 12.0
"""A mouth that moves in this part of the steps is as likely as not the one that is heard; how sharply around it."""
VOICE_UNHEARD, VOICE_IF_MOVING = 0.10, 0.35
"""Without a microphone: is there a voice, with no mouth moving, and how much more with a face whose mouth moves. A
moving mouth also chews, yawns and smiles: a voice that nobody heard raises its score, but is never the label."""
FLOOR = 1e-3


class Graph:
    """Appends nodes and names what they make."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, kind), name))
        return name

    def op(self, kind: str, *inputs: str | float, name: str = "", **attributes: Any) -> str:
        """One node; a number among the inputs becomes a constant."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        output = name or f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def column(self, tokens: str, index: int) -> str:
        """[batch, steps] of one element of every token."""
        return self.op("Gather", tokens, self.constant(index, np.int64), axis=2)

    def mean(self, values: str, weights: str, fade: float, prior: str | float) -> str:
        """[batch, 1]: the mean of ``values``, fading into the past, with the prior's weight beside the observed."""
        recent = np.exp(-np.arange(STEPS)[::-1] / fade)[None]
        weights = self.op("Mul", weights, self.constant(recent))
        axis = self.constant([1], np.int64)
        seen = self.op("ReduceSum", self.op("Mul", weights, values), axis, keepdims=1)
        total = self.op("Add", self.op("ReduceSum", weights, axis, keepdims=1), WEIGHT_OF_PRIOR)
        return self.op("Div", self.op("Add", seen, self.op("Mul", prior, WEIGHT_OF_PRIOR)), total)


def build() -> onnx.ModelProto:
    """The model: inputs ``<stream>`` f4 [batch, STEPS, token], ``mask.<stream>`` f4 [batch, STEPS]; output logits."""
    g = Graph()
    known_mouth = g.op("Mul", "mask.camera", g.column("camera", 2))
    known_voice = g.op("Mul", "mask.microphone", g.column("microphone", 1))
    face = g.mean(g.column("camera", 0), "mask.camera", FADE_FACE, FACE_UNSEEN)
    moving = g.mean(g.column("camera", 1), known_mouth, FADE_MOUTH, MOVING_UNSEEN)
    speaks = g.op("Sigmoid", g.op("Mul", g.op("Sub", moving, MOVING_SPEAKS), SHARPNESS))
    seen_speaking = g.op("Mul", face, speaks)
    unheard = g.op("Add", g.op("Mul", seen_speaking, VOICE_IF_MOVING), VOICE_UNHEARD)
    voice = g.mean(g.column("microphone", 0), known_voice, FADE_VOICE, unheard)
    quiet = g.op("Sub", 1.0, voice)
    odds = [
        g.op("Mul", g.op("Sub", 1.0, face), quiet),
        g.op("Mul", face, quiet),
        g.op("Mul", voice, seen_speaking),
        g.op("Mul", voice, g.op("Sub", 1.0, seen_speaking)),
    ]
    g.op("Log", g.op("Add", g.op("Concat", *odds, axis=1), FLOOR), name="logits")
    shapes: dict[str, list[str | int | None]] = {}
    for stream, width in TOKENS.items():
        shapes |= {stream: ["batch", STEPS, width], f"mask.{stream}": ["batch", STEPS]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(LABELS)])
    graph = helper.make_graph(g.nodes, "presence", inputs, [output], g.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def write(folder: Path) -> None:
    """fusion.onnx in ``folder``, and its SHA-256 into the model.yaml that stands there."""
    graph, model = build().SerializeToString(), folder / "model.yaml"
    digest = hashlib.sha256(graph).hexdigest()
    (folder / "fusion.onnx").write_bytes(graph)
    model.write_text(re.sub(r"(fusion\.onnx: )[0-9a-f]{64}", rf"\g<1>{digest}", model.read_text()))


if __name__ == "__main__":
    write(Path(__file__).parent)
