"""Makes this bundle: python models/demo/make.py (needs the package `onnx`).

The encoders are written by hand: each computes a few features that a person can read, inside its graph. The fusion
model is fitted: a multinomial logistic regression on features pooled over the window, on simulated sessions that went
through the real aligner, with whole streams left out at random, so that it knows every subset of its streams. The
temperature and the mass of the prediction set come from sessions that it was not fitted on (all subsets of the
streams alike), and the figures of the model card (README.md) from a third lot. What it prints belongs into the card.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.align import Aligner
from pipeline.bundle import load_bundle
from pipeline.inference import FuseOptions, Fuser, content_of
from pipeline.messages import AudioLayout, FrameLayout, Header, ImuLayout, Layout, Message, SweepLayout
from pipeline.prediction import Prediction
from pipeline.scene import LABELS, Scene

Array = np.ndarray[Any, Any]
HERE = Path(__file__).resolve().parent
STREAMS = ("camera", "microphone", "imu", "lidar")
DECAYS = (0.2, 0.8)
"""Weight of a step over that of the next newer one. The evidence is averaged twice: over little more than the newest
step, which is quick, and over about half a second, which outlasts the dark half of a flicker and the pause between two
thumps."""

# For every number of a token: below which value it is evidence of nothing (0), and above which it is full evidence (1).
EVIDENCE: dict[str, dict[str, tuple[float, float]]] = {
    "camera": {"edge_brightness": (0.3, 0.5), "bright_area": (0.0, 0.004)},
    "microphone": {"loudness_db": (-50.0, -25.0), "tone_share": (0.2, 0.6), "broadband_db": (-44.0, -36.0)},
    "imu": {"accel_sd": (0.3, 1.0), "gyro_rms": (0.05, 0.2)},
    "lidar": {"nearest_m": (5.6, 5.2), "near_share": (0.0, 0.05)},
}
SUBSETS = list(product((True, False), repeat=len(STREAMS)))
COVERAGE = 0.9
"""Of the prediction set, over all subsets of one stream or more, each as often as any other."""
COLUMNS = len(DECAYS) * sum(len(e) + 1 for e in EVIDENCE.values())


class Graph:
    """Writes an ONNX graph; each call adds a node and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def const(self, value: Any, kind: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def __call__(self, op: str, *inputs: Any, out: str = "", **attributes: Any) -> str:
        """Numbers among the inputs become f4 constants, lists of integers i8 ones."""
        kinds = [np.int64 if isinstance(x, list) else np.float32 for x in inputs]
        names = [x if isinstance(x, str) else self.const(x, k) for x, k in zip(inputs, kinds, strict=True)]
        out = out or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, names, [out], **attributes))
        return out

    def save(self, path: Path, inputs: dict[str, tuple[int, list[Any]]], output: str, shape: list[Any]) -> None:
        values = [helper.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in inputs.items()]
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, path.stem, values, [result], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString())


def camera(path: Path) -> None:
    """x u1 [height, width, 3] -> brightness of the picture's edge (0 to 1), share of pixels far brighter than it."""
    g = Graph()
    thin = g("Slice", "x", [0, 0], [1 << 30, 1 << 30], [0, 1], [4, 4])  # every fourth pixel is plenty, and 16 x faster
    gray = g("ReduceMean", g("Div", g("Cast", thin, to=TensorProto.FLOAT), 255.0), [2], keepdims=0)
    rows = g("Concat", g("Slice", gray, [0], [2], [0]), g("Slice", gray, [-2], [1 << 30], [0]), axis=0)
    edge = g("ReduceMean", rows, [0, 1], keepdims=0)
    bright = g("Cast", g("Greater", gray, g("Add", edge, 0.35)), to=TensorProto.FLOAT)
    area = g("ReduceMean", bright, [0, 1], keepdims=0)
    g("Concat", g("Reshape", edge, [1]), g("Reshape", area, [1]), out="token", axis=0)
    g.save(path, {"x": (TensorProto.UINT8, ["height", "width", 3])}, "token", [2])


def microphone(path: Path) -> None:
    """x f4 [1600, 1] at 16 kHz -> loudness in dB of full scale, share of the energy at 1 kHz (a Fourier coefficient),
    loudness of the rest in dB, after a third difference that takes 1 kHz down by 37 dB."""
    g, n = Graph(), 1600
    wave = np.exp(-2j * np.pi * 1000.0 / 16000.0 * np.arange(n))
    x = g("Reshape", "x", [1, n])
    power = g("ReduceMean", g("Mul", x, x), [1], keepdims=0)
    line = g("MatMul", x, np.stack([wave.real, wave.imag], 1))
    tone = g("Mul", g("ReduceSum", g("Mul", line, line), [1], keepdims=0), 2.0 / n**2)
    share = g("Div", tone, g("Add", power, 1e-9))
    rough = g("Conv", g("Reshape", x, [1, 1, n]), np.array([[[1.0, -3.0, 3.0, -1.0]]]))
    rest = g("Div", g("ReduceMean", g("Mul", rough, rough), [1, 2], keepdims=0), 20.0)  # white noise gains 20
    decibels = [g("Mul", g("Log", g("Add", p, 1e-9)), 10.0 / np.log(10.0)) for p in (power, g("Reshape", rest, [1]))]
    g("Concat", decibels[0], share, decibels[1], out="token", axis=0)
    g.save(path, {"x": (TensorProto.FLOAT, [n, 1])}, "token", [3])


def imu(path: Path) -> None:
    """x f4 [10, 6] at 100 Hz, valid f4 [10] -> standard deviation of the acceleration in m/s^2 (all axes together),
    root mean square of the angular rate in rad/s; samples that are not valid do not count."""
    g = Graph()
    valid = g("Reshape", "valid", [10, 1])
    count = g("Max", g("ReduceSum", valid, [0, 1], keepdims=0), 1.0)
    accel, gyro = g("Slice", "x", [0], [3], [1]), g("Slice", "x", [3], [6], [1])
    mean = g("Div", g("ReduceSum", g("Mul", accel, valid), [0], keepdims=1), count)
    off = g("Mul", g("Sub", accel, mean), valid)
    variance = g("Div", g("ReduceSum", g("Mul", off, off), [0, 1], keepdims=0), count)
    turning = g("Mul", gyro, valid)
    square = g("Div", g("ReduceSum", g("Mul", turning, turning), [0, 1], keepdims=0), count)
    g("Sqrt", g("Concat", g("Reshape", variance, [1]), g("Reshape", square, [1]), axis=0), out="token")
    g.save(path, {"x": (TensorProto.FLOAT, [10, 6]), "valid": (TensorProto.FLOAT, [10])}, "token", [2])


def lidar(path: Path) -> None:
    """x f4 [points, 5] -> distance in metres of the nearest point within 20 degrees of straight ahead and 1 m of the
    sensor's height (30 if there is none), share of the sector's points nearer than 5.5 m."""
    g = Graph()
    x, y, z = (g("Slice", "x", [i], [i + 1], [1]) for i in range(3))
    ahead = g("And", g("Greater", x, 0.3), g("LessOrEqual", g("Abs", y), g("Mul", x, np.tan(np.deg2rad(20.0)))))
    sector = g("And", ahead, g("Less", g("Abs", z), 1.0))
    distance = g("Sqrt", g("Add", g("Mul", x, x), g("Mul", y, y)))
    seen = g("Concat", g("Where", sector, distance, 30.0), np.full((1, 1), 30.0), axis=0)  # never empty
    nearest = g("ReduceMin", seen, [0, 1], keepdims=0)
    near = g("ReduceSum", g("Cast", g("Less", seen, 5.5), to=TensorProto.FLOAT), [0, 1], keepdims=0)
    total = g("ReduceSum", g("Cast", sector, to=TensorProto.FLOAT), [0, 1], keepdims=0)
    share = g("Div", near, g("Max", total, 1.0))
    g("Concat", g("Reshape", nearest, [1]), g("Reshape", share, [1]), out="token", axis=0)
    g.save(path, {"x": (TensorProto.FLOAT, ["points", 5])}, "token", [2])


def fusion(path: Path, weights: Array, bias: Array) -> None:
    """logits = pooled [batch, COLUMNS] @ weights + bias. Pooled are, stream by stream, the evidence averaged over the
    window with newer steps weighing more and masked ones nothing, and the weight of the steps that are not masked."""
    g = Graph()
    inputs: dict[str, tuple[int, list[Any]]] = {}
    pooled = []
    for name in STREAMS:
        low, high = np.array(list(EVIDENCE[name].values())).T
        inputs[name] = (TensorProto.FLOAT, ["batch", "steps", len(low)])
        inputs[f"mask.{name}"] = (TensorProto.FLOAT, ["batch", "steps"])
        evidence = g("Clip", g("Mul", g("Sub", name, low), 1.0 / (high - low)), 0.0, 1.0)
        for decay in DECAYS:
            masked = g("Mul", f"mask.{name}", _recency(g, f"mask.{name}", decay))
            mean = g("MatMul", g("Unsqueeze", masked, [1]), evidence)
            pooled += [g("Squeeze", mean, [1]), g("ReduceSum", masked, [1], keepdims=1)]
    g("Gemm", g("Concat", *pooled, axis=1), weights, bias, out="logits")
    g.save(path, inputs, "logits", ["batch", len(LABELS)])


def _recency(g: Graph, mask: str, decay: float) -> str:
    """[steps] weights that sum to 1, each ``decay`` of the next newer one's, for however many steps the window has."""
    steps = g("Shape", mask, start=1)
    age = g("Range", g("Squeeze", steps), g.const(0, np.int64), g.const(-1, np.int64))  # steps, …, 2, 1
    weight = g("Pow", decay, g("Cast", age, to=TensorProto.FLOAT))
    return g("Div", weight, g("ReduceSum", weight, [0], keepdims=1))


# -- simulated sessions, through the real aligner -------------------------------------------------------------------


def simulate(
    fuser: Fuser, seed: int, seconds: int, lost: Mapping[str, str] | None = None
) -> Iterator[tuple[Prediction, str]]:
    """The prediction of each step of a session, and the truth in the middle of its hop. ``lost`` are streams that never
    reach the model, and why."""
    scene = Scene(seed)
    aligner = Aligner(fuser.bundle.align_spec())
    for message in sorted(_messages(scene, seconds), key=lambda m: m.header.bound_ns):
        for step in aligner.feed(message, message.header.bound_ns):
            # Pictures are drawn only where a step uses them.
            frames = tuple(_draw(scene, m) for m in step.messages.get("camera", ()))
            prediction = fuser.step(step.manifest, content_of(step) | {"camera": frames or None}, lost)
            yield prediction, scene.truth((step.manifest.start_ns + step.manifest.end_ns) // 2).label


def _messages(scene: Scene, seconds: int) -> Iterator[Message]:
    for i in range(seconds * 30):
        yield _message("camera", i, i * 10**9 // 30, 0, FrameLayout("bgr8", 240, 320), None)
    for i in range(seconds * 50):
        sound = scene.audio(i * 320, 320, 16000)
        yield _message("microphone", i, i * 20_000_000, 20_000_000, AudioLayout(16000, 1, 320), sound)
    for i in range(seconds * 20):
        times = (i * 5 + np.arange(5, dtype=np.int64)) * 10_000_000
        yield _message("imu", i, int(times[0]), 40_000_000, ImuLayout(5), scene.imu(times, i))
    for i in range(seconds * 10):
        cloud = scene.sweep(i * 100_000_000, i, 1440, 100_000_000)
        yield _message("lidar", i, i * 100_000_000, 0, SweepLayout(1440), cloud)


def _message(stream: str, seq: int, t_ns: int, length_ns: int, layout: Layout, data: Any) -> Message:
    end = t_ns + length_ns
    bound = end if isinstance(layout, AudioLayout) else end + 1
    return Message(Header(stream=stream, seq=seq, epoch=0, t_capture_ns=t_ns, t_end_ns=end, bound_ns=bound,
                          t_receipt_ns=end, layout=layout), data)  # fmt: skip


def _draw(scene: Scene, message: Message) -> Message:
    pixels = np.empty((240, 320, 3), np.uint8)
    scene.frame(message.header.t_capture_ns, message.header.seq, pixels)
    return Message(message.header, pixels)


def dataset(folder: Path, seeds: range, seconds: int) -> tuple[dict[str, Array], Array]:
    """Pooled features by stream [windows, columns of the stream], and the truth's index [windows]."""
    rows: dict[str, list[Array]] = {name: [] for name in STREAMS}
    truth, names = [], list[str](LABELS)
    for seed in seeds:
        fuser = Fuser(load_bundle(folder), FuseOptions(contributions=False))
        for _, label in simulate(fuser, seed, seconds):
            truth.append(names.index(label))
            for name, (tokens, mask) in fuser.window().items():
                rows[name].append(_pool(name, tokens, mask))
    return {name: np.stack(r) for name, r in rows.items()}, np.array(truth)


def _pool(name: str, tokens: Array, mask: Array) -> Array:
    """The same as the graph's pooling, in float64."""
    low, high = np.array(list(EVIDENCE[name].values())).T
    evidence = np.clip((tokens - low) / (high - low), 0, 1)
    parts = []
    for decay in DECAYS:
        weight = decay ** np.arange(len(mask), 0, -1.0)
        masked = mask * weight / weight.sum()
        parts += [masked @ evidence, masked.sum(keepdims=True)]
    return np.concatenate(parts)


# -- fitting -------------------------------------------------------------------------------------------------------


def subsets(features: dict[str, Array], masks: Array) -> Array:
    """[windows, COLUMNS] with whole streams masked: masks is boolean [windows, streams] or [streams]."""
    masks = np.broadcast_to(masks, (len(features["imu"]), len(STREAMS)))
    return np.concatenate([features[name] * masks[:, i, None] for i, name in enumerate(STREAMS)], axis=1)


def softmax(logits: Array) -> Array:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def fit(x: Array, truth: Array, strength: float = 1e-4, rounds: int = 1500) -> tuple[Array, Array]:
    """Multinomial logistic regression with a quadratic penalty, by accelerated gradient descent from zero."""
    x1 = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    target = np.eye(len(LABELS))[truth]
    rate = 1.0 / (0.5 * np.linalg.norm(x1, 2) ** 2 / len(x1) + strength)
    weights = previous = np.zeros((x1.shape[1], len(LABELS)))
    for k in range(rounds):
        ahead = weights + k / (k + 3) * (weights - previous)
        gradient = x1.T @ (softmax(x1 @ ahead) - target) / len(x1) + strength * ahead
        previous, weights = weights, ahead - rate * gradient
    return np.round(weights[:-1], 3), np.round(weights[-1], 3)


def fitted_on(features: dict[str, Array], truth: Array) -> tuple[Array, Array]:
    """Each window once with all streams and four times with some left out at random."""
    random = np.random.default_rng(1)
    masks = [np.ones((len(truth), 4), bool)] + [random.random((len(truth), 4)) < 0.6 for _ in range(4)]
    x = np.concatenate([subsets(features, m) for m in masks])
    return fit(x, np.tile(truth, len(masks)))


def calibrate(logits: Array, truth: Array, coverage: float) -> tuple[float, float]:
    """The temperature of the least log loss, and the mass of probability whose sets hold the truth in a share of
    ``coverage`` (split conformal prediction by adaptive sets)."""
    own = np.arange(len(truth))
    grid = np.round(np.exp(np.linspace(np.log(0.3), np.log(3.0), 200)), 3)
    losses = [-np.log(softmax(logits / t)[own, truth] + 1e-12).mean() for t in grid]
    temperature = float(grid[int(np.argmin(losses))])
    scores = np.sort(mass_before(softmax(logits / temperature))[own, truth])
    return temperature, float(np.ceil(scores[int(np.ceil(coverage * (len(scores) + 1))) - 1] * 1e4) / 1e4)


def mass_before(p: Array) -> Array:
    """[windows, labels]: how much probability the labels have together that are more probable than this one."""
    order = np.argsort(-p, axis=1, kind="stable")
    descending = np.take_along_axis(p, order, axis=1)
    before = np.empty_like(p)
    np.put_along_axis(before, order, descending.cumsum(axis=1) - descending, axis=1)
    return before


# -- the bundle ----------------------------------------------------------------------------------------------------

MODEL = """\
# The model of the demo. Made by make.py; README.md says what it is and how good.
name: demo
window: {{hop_ms: 100, steps: 10}}
streams:
  camera:
    payload: frame
    rule: {{kind: nearest, tolerance_ms: 50}}
    encoder: encoder.camera.onnx  # edge_brightness, bright_area
    token: 2
  microphone:
    payload: audio
    rule: {{kind: resample, rate_hz: 16000, max_gap_ms: 20, method: band_limited}}
    channels: 1
    encoder: encoder.microphone.onnx  # loudness_db, tone_share, broadband_db
    token: 3
  imu:
    payload: imu
    rule: {{kind: resample, rate_hz: 100, max_gap_ms: 50, method: linear}}
    encoder: encoder.imu.onnx  # accel_sd, gyro_rms
    token: 2
  lidar:
    payload: sweep
    rule: {{kind: latest, max_age_ms: 250}}
    encoder: encoder.lidar.onnx  # nearest_m, near_share
    token: 2
fusion: fusion.onnx
labels: [{labels}]
strategy: late
calibration: {{temperature: {temperature}, abstain_below: 0.5, set_coverage: {coverage}, set_mass: {mass}}}
lineage:
  card: README.md
  files:
{files}
"""


def write(folder: Path, weights: Array, bias: Array, temperature: float = 1.0, mass: float = 1.0) -> None:
    """The whole bundle but for its card."""
    makers = {"camera": camera, "microphone": microphone, "imu": imu, "lidar": lidar}
    for name, make in makers.items():
        make(folder / f"encoder.{name}.onnx")
    fusion(folder / "fusion.onnx", weights, bias)
    digests = [f"    {p.name}: {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in sorted(folder.glob("*.onnx"))]
    text = MODEL.format(labels=", ".join(LABELS), temperature=temperature, mass=mass, coverage=COVERAGE,
                        files="\n".join(digests))  # fmt: skip
    (folder / "model.yaml").write_text(text, encoding="utf-8")


def report(
    features: dict[str, Array], truth: Array, weights: Array, bias: Array, temperature: float, mass: float
) -> None:
    """Prints the card's table: every subset of the streams on sessions that nothing was fitted to."""
    print(f"{len(truth)} windows, of which calm {np.mean(truth == 0):.1%}")
    print("| camera | microphone | imu | lidar | accuracy % | log loss | calibration error % | in set % | set size |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for mask in SUBSETS:
        p = softmax((subsets(features, np.array(mask)) @ weights + bias) / temperature)
        own = p[np.arange(len(truth)), truth]
        sets = mass_before(p) <= mass
        cells = [*("x" if m else "" for m in mask), f"{100 * np.mean(p.argmax(1) == truth):.1f}",
                 f"{-np.log(own).mean():.3f}", f"{100 * _calibration_error(p, truth):.1f}",
                 f"{100 * sets[np.arange(len(truth)), truth].mean():.1f}", f"{sets.sum(1).mean():.2f}"]  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def _calibration_error(p: Array, truth: Array) -> float:
    """Mean distance of confidence and accuracy over ten bins of confidence, weighted by their windows."""
    confidence, right = p.max(axis=1), p.argmax(axis=1) == truth
    bins = np.minimum((confidence * 10).astype(int), 9)
    parts = [(bins == b) for b in range(10)]
    return float(sum(abs(confidence[b].mean() - right[b].mean()) * b.mean() for b in parts if b.any()))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), np.zeros((COLUMNS, len(LABELS))), np.zeros(len(LABELS)))
        seeds = range(100, 106), range(200, 203), range(300, 303)
        training, held_out, test = (dataset(Path(scratch), lot, 200) for lot in seeds)
    weights, bias = fitted_on(*training)
    known = [np.array(m) for m in SUBSETS if any(m)]
    logits = np.concatenate([subsets(held_out[0], m) for m in known]) @ weights + bias
    temperature, mass = calibrate(logits, np.tile(held_out[1], len(known)), COVERAGE)
    write(HERE, weights, bias, temperature, mass)
    print(f"temperature {temperature}, set mass {mass}")
    report(*test, weights, bias, temperature, mass)


if __name__ == "__main__":
    sys.exit(main())
