"""What one prediction of the demo bundle costs. Prints a table; ``--json`` prints the same rows.

    python benchmarks/inference.py [--json] [--steps 300] [--attention] [--learned]

Four streams with new content in every step: a raw 1280 x 720 frame, 100 ms of audio at 16 kHz, 10 IMU samples, a sweep
of 1440 points. One thread, spinning off, as live. Measured around ``Fuser.step``, after the window has filled:

* ``encode_cpu_ms``, ``fuse_cpu_ms``: medians of the two latencies that a prediction states, on a clock of CPU time, so
  that a busy machine changes them little.
* ``step_cpu_ms``: the whole call with making the prediction, CPU time; median.
* ``step_ms``, ``step_p99_ms``: the same by the wall; median and 99th percentile.

``contributions`` evaluates the model with all 16 subsets of the streams. The rows of 300 steps are a window of 30 s on
the same bundle: encoding costs the same, since only what is new is encoded. ``attention`` replaces the demo's fusion
with two layers of self-attention, 64 wide, over all tokens of the window (random weights): what a plain learned model
would cost. It needs the package ``onnx``. ``--learned`` measures what ``sensorium train`` makes: its encoders of the
four payloads and each fusion strategy, with their default sizes and random weights, for windows of 1, 10 and 30 s. It
needs torch, and takes some minutes, most of which go into the export.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml

from pipeline.align import Manifest, Resample, StreamManifest
from pipeline.bundle import SHIPPED, load_bundle
from pipeline.inference import FuseOptions, Fuser
from pipeline.messages import FrameLayout, Header, Layout, Message, SweepLayout
from pipeline.prediction import Prediction
from pipeline.scene import Scene

HOP_NS = 100_000_000


def session(steps: int) -> Iterator[tuple[Manifest, dict[str, Any]]]:
    """Steps with fresh content for every stream."""
    scene, rng = Scene(1), np.random.default_rng(0)
    pixels = np.empty((720, 1280, 3), np.uint8)
    scene.frame(0, 0, pixels)
    audio = rng.normal(0, 0.01, (1600, 1)).astype(np.float32)
    imu = rng.normal(0, 0.1, (10, 6)).astype(np.float32)
    cloud = scene.sweep(0, 0, 1440, HOP_NS)
    for k in range(1, steps + 1):
        stated = StreamManifest(verdict="ok", proven=True, used=((0, k, k),), epoch=0, newest_ns=k * HOP_NS)
        streams = dict.fromkeys(("camera", "microphone", "imu", "lidar"), stated)
        content = {"camera": _message("camera", k, FrameLayout("bgr8", 720, 1280), pixels), "microphone": audio,
                   "imu": imu, "lidar": _message("lidar", k, SweepLayout(1440), cloud)}  # fmt: skip
        yield Manifest(step=k, start_ns=(k - 1) * HOP_NS, end_ns=k * HOP_NS, cause="proven", emitted_ns=k * HOP_NS,
                       digest="", streams=streams), content  # fmt: skip


def _message(stream: str, seq: int, layout: Layout, data: Any) -> tuple[Message, ...]:
    t = seq * HOP_NS
    return (Message(Header(stream=stream, seq=seq, epoch=0, t_capture_ns=t, t_end_ns=t, bound_ns=t + 1, t_receipt_ns=t,
                           layout=layout), data),)  # fmt: skip


def variant(folder: Path, steps: int, fusion: bytes | None = None) -> Path:
    """The demo bundle with another length of window and, if given, another fusion model."""
    shutil.copytree(SHIPPED / "demo", folder)
    text = (folder / "model.yaml").read_text(encoding="utf-8")
    text = re.sub(r"steps: \d+", f"steps: {steps}", text)
    if fusion is not None:
        (folder / "fusion.onnx").write_bytes(fusion)
        text = re.sub(r"fusion\.onnx: [0-9a-f]{64}", f"fusion.onnx: {hashlib.sha256(fusion).hexdigest()}", text)
    (folder / "model.yaml").write_text(text, encoding="utf-8")
    return folder


def attention(
    widths: dict[str, int], steps: int, labels: int, width: int = 64, layers: int = 2, heads: int = 4
) -> bytes:
    """A transformer encoder over all streams' tokens with random weights: logits from the masked mean."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, constants = np.random.default_rng(0), [], []

    def const(value: Any, kind: Any = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, kind), f"c{len(constants)}"))
        return str(constants[-1].name)

    def op(kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [out or f"t{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def dense(x: str, n: int, m: int) -> str:
        return op("Add", op("MatMul", x, const(rng.normal(0, n**-0.5, (n, m)))), const(np.zeros(m)))

    inputs: dict[str, list[Any]] = {}
    parts = []
    for name, n in widths.items():
        inputs |= {name: ["batch", steps, n], f"mask.{name}": ["batch", steps]}
        parts.append(op("Add", dense(name, n, width), const(rng.normal(0, 0.1, (steps, width)))))
    x, mask = op("Concat", *parts, axis=1), op("Concat", *(f"mask.{n}" for n in widths), axis=1)
    hidden = op("Mul", op("Sub", mask, const(1.0)), const(1e4))
    hidden = op("Unsqueeze", hidden, const([1, 2], np.int64))
    shape = const([0, 0, heads, width // heads], np.int64)
    for _ in range(layers):
        q, k, v = (op("Reshape", dense(x, width, width), shape) for _ in range(3))
        scores = op("MatMul", op("Transpose", q, perm=[0, 2, 1, 3]), op("Transpose", k, perm=[0, 2, 3, 1]))
        scores = op("Add", op("Mul", scores, const((width // heads) ** -0.5)), hidden)
        mixed = op("MatMul", op("Softmax", scores, axis=-1), op("Transpose", v, perm=[0, 2, 1, 3]))
        mixed = op("Reshape", op("Transpose", mixed, perm=[0, 2, 1, 3]), const([0, 0, width], np.int64))
        x = op("Add", x, dense(mixed, width, width))
        x = op("Add", x, dense(op("Relu", dense(x, width, 2 * width)), 2 * width, width))
        x = op("LayerNormalization", x, const(np.ones(width)), const(np.zeros(width)), axis=-1)
    weights = op("Unsqueeze", mask, const([2], np.int64))
    pooled = op("Div", op("ReduceSum", op("Mul", x, weights), const([1], np.int64), keepdims=0),
                op("Add", op("ReduceSum", weights, const([1], np.int64), keepdims=0), const(1e-3)))  # fmt: skip
    op("Add", op("MatMul", pooled, const(rng.normal(0, 0.1, (width, labels)))), const(np.zeros(labels)), out="logits")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    result = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", labels])
    graph = helper.make_graph(nodes, "attention", values, [result], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


LEARNED: dict[str, dict[str, Any]] = {
    "camera": {},
    "microphone": {"context_ms": 100.0},
    "imu": {"context_ms": 400.0},
    "lidar": {},
}
"""The demo's streams as a learned model has them: with some of the past, where a step is short."""
TOKEN = 32


def learned(folder: Path, windows: tuple[int, ...]) -> Iterator[tuple[Path, str]]:
    """Bundles of learned encoders and fusion models with random weights, and their names."""
    import torch

    from pipeline.learn.fusion import STRATEGIES, build_fusion
    from pipeline.learn.graphs import encoder_graph, fusion_graph
    from pipeline.learn.model import build_encoders

    torch.manual_seed(0)
    model = yaml.safe_load((SHIPPED / "demo" / "model.yaml").read_text(encoding="utf-8"))
    for name, more in LEARNED.items():
        model["streams"][name] |= {"token": TOKEN, **more}
    streams = {}
    for name, stream in load_bundle(SHIPPED / "demo").streams.items():
        rate = stream.rule.rate_hz if isinstance(stream.rule, Resample) else 0
        context = round(LEARNED[name].get("context_ms", 0) * rate / 1000)
        streams[name] = msgspec.structs.replace(stream, token=TOKEN, context=context)
    examples = {"frame": np.zeros((48, 64, 3), np.uint8), "sweep": np.ones((64, 5), np.float32)}
    files = {}
    for name, encoder in build_encoders(streams, {}).items():
        s = streams[name]
        given = {"x": examples.get(s.payload, np.zeros((s.context + s.samples, s.channels), np.float32))}
        files[f"encoder.{name}.onnx"] = encoder_graph(
            encoder, s, given | ({"valid": np.ones(s.context + s.samples, np.float32)} if s.samples else {})
        )
    for strategy in STRATEGIES:
        for steps in windows:
            fusion = build_fusion(strategy, dict.fromkeys(streams, TOKEN), steps, len(model["labels"]), {})
            yield _written(folder / f"{strategy}{steps}", model, files | {"fusion.onnx": fusion_graph(fusion)}, steps)


def _written(folder: Path, model: dict[str, Any], files: dict[str, bytes], steps: int) -> tuple[Path, str]:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    text = model | {"window": {"hop_ms": 100, "steps": steps}, "lineage": {"files": digests}}
    (folder / "model.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    return folder, f"learned {folder.name.rstrip('0123456789')}"


class CpuClock:
    """The CPU time of this process, as a session clock."""

    def now_ns(self) -> int:
        return time.process_time_ns()

    def wait_until(self, t_ns: int, stop: threading.Event | None = None) -> bool:
        raise NotImplementedError("CPU time does not pass by waiting")


def measure(bundle: Path, name: str, contributions: bool, count: int) -> dict[str, Any]:
    """One row."""
    loaded = load_bundle(bundle)
    fuser = Fuser(loaded, FuseOptions(contributions=contributions), "bench", clock=CpuClock())
    took: list[tuple[float, float]] = []
    said: list[Prediction] = []
    for manifest, content in session(loaded.window.steps + count):
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        said.append(fuser.step(manifest, content))
        took.append(((time.process_time_ns() - cpu) / 1e6, (time.perf_counter_ns() - wall) / 1e6))
    said, (cpu_ms, wall_ms) = said[-count:], np.array(took[-count:]).T
    return {
        "fusion": name,
        "window_steps": loaded.window.steps,
        "contributions": contributions,
        "encode_cpu_ms": round(float(np.median([p.timing.latency_ms["encode"] for p in said])), 3),
        "fuse_cpu_ms": round(float(np.median([p.timing.latency_ms["fuse"] for p in said])), 3),
        "step_cpu_ms": round(float(np.median(cpu_ms)), 3),
        "step_ms": round(float(np.median(wall_ms)), 3),
        "step_p99_ms": round(float(np.percentile(wall_ms, 99)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--steps", type=int, default=300, help="predictions measured per row")
    parser.add_argument("--learned", action="store_true", help="also with what `sensorium train` makes; needs torch")
    parser.add_argument("--attention", action="store_true", help="also with a fusion model as large as a learned one")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        cases = [(variant(Path(scratch, f"demo{n}"), n), "demo") for n in (10, 300)]
        if options.attention:
            streams = load_bundle(SHIPPED / "demo").streams
            plain = attention({n: s.token for n, s in streams.items()}, 10, 5)
            cases.append((variant(Path(scratch, "attention"), 10, plain), "attention"))
        if options.learned:
            cases += learned(Path(scratch), (10, 100, 300))
        for folder, name in cases:
            rows += [measure(folder, name, contributions, options.steps) for contributions in (False, True)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(" ".join(f"{key:>14}" for key in rows[0]))
    for row in rows:
        print(" ".join(f"{value!s:>14}" for value in row.values()))


if __name__ == "__main__":
    main()
