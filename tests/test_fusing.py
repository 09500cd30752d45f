"""A user's own model of whole windows: what it is fed with, what is refused, and that its streams share as any do."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pipeline.bundle import load_bundle
from pipeline.clock import ManualClock
from pipeline.errors import BundleError
from pipeline.fusing import doubt
from pipeline.inference import Fuser
from pipeline.messages import FrameLayout, Message
from pipeline.prediction import Prediction
from tests.tiny_bundle import FRAME, GRID, MISSING, SWEEP, frame, grid, header, manifest, model, node, ok

LAST = {"btc": ("f4", ["batch", 30, 6]), "bct": ("f4", ["batch", 6, 30])}


def probe(
    inputs: Mapping[str, tuple[str, list[Any]]], picks: Mapping[str, list[int]], normalise: bool = False
) -> bytes:
    """Output [batch, 2]: 0, and the sum over the inputs of the one number at the given place of each."""
    nodes, constants, parts = [], {}, []
    for name, place in picks.items():
        constants |= {f"{name}.{i}": np.array(at) for i, at in enumerate(place)}
        value = name
        for i in range(len(place)):
            nodes.append(node("Gather", [value, f"{name}.{i}"], [f"{name}.at{i}"], axis=1))
            value = f"{name}.at{i}"
        parts.append(value)
    constants |= {"last": np.array([1]), "flat": np.array([-1, 1])}
    nodes += [
        node("Sum", parts, ["sum"]),
        node("Reshape", ["sum", "flat"], ["yes"]),
        node("Sub", ["yes", "yes"], ["no"]),
        node("Concat", ["no", "yes"], ["raw"], axis=1),
        node("Softmax", ["raw"], ["y"], axis=1) if normalise else node("Identity", ["raw"], ["y"]),
    ]
    return model(nodes, inputs, {"y": ["batch", 2]}, constants)


def write(folder: Path, streams: Mapping[str, Any], data: bytes, inputs: Mapping[str, Any], **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mine.onnx").write_bytes(data)
    whole = {"file": "mine.onnx", "inputs": dict(inputs)} | more.pop("model", {})
    text = {
        "name": "mine", "window": {"hop_ms": 100, "steps": 3}, "streams": dict(streams), "labels": ["no", "yes"],
        "model": whole, "lineage": {"files": {"mine.onnx": hashlib.sha256(data).hexdigest()}},
    } | more  # fmt: skip
    (folder / "model.yaml").write_text(yaml.safe_dump(text, sort_keys=False), encoding="utf-8")
    return folder


def imu_bundle(folder: Path, layout: str = "btc", place: tuple[int, int] = (29, 2), **more: Any) -> Path:
    picks = {"x": list(place if layout == "btc" else place[::-1])}
    data = probe({"x": LAST[layout]}, picks, more.get("model", {}).get("gives") == "probabilities")
    return write(folder, {"imu": GRID}, data, {"x": {"stream": "imu", "layout": layout}}, **more)


def run(folder: Path, steps: list[tuple[Any, Any]], stream: str = "imu") -> Prediction:
    fuser = Fuser(load_bundle(folder), session="s", clock=ManualClock())
    for step, (stated, content) in enumerate(steps, 1):
        prediction = fuser.step(manifest(step, {stream: stated}), {stream: content})
    return prediction


def logit(prediction: Prediction) -> float:
    yes = prediction.scores["yes"] or 0.0
    return math.log(yes / (1 - yes))


def ramp(step: int) -> np.ndarray[Any, Any]:
    """Ten samples of six channels, each number naming its sample and channel: sample 0 of step 1 is 0."""
    sample = np.arange(10)[:, None] + 10 * (step - 1)
    return (sample * 0.1 + np.arange(6) * 0.01).astype(np.float32)


@pytest.mark.parametrize("layout", ["btc", "bct"])
@pytest.mark.parametrize(("place", "value"), [((29, 2), 2.92), ((0, 0), 0.0), ((11, 5), 1.15)])
def test_samples_come_oldest_first_in_either_layout(
    tmp_path: Path, layout: str, place: tuple[int, int], value: float
) -> None:
    prediction = run(imu_bundle(tmp_path, layout, place), [(ok(k), ramp(k)) for k in (1, 2, 3)])
    assert logit(prediction) == pytest.approx(value, abs=1e-5)


def test_what_is_missing_is_zeros(tmp_path: Path) -> None:
    holed = ramp(3)
    holed[9] = np.nan
    folder = imu_bundle(tmp_path, place=(29, 2))
    assert logit(run(folder, [(ok(1), ramp(1)), (ok(2), ramp(2)), (ok(3), holed)])) == pytest.approx(0, abs=1e-6)
    prediction = run(folder, [(ok(1), ramp(1)), (ok(2), ramp(2)), (MISSING, None)])
    assert logit(prediction) == pytest.approx(0, abs=1e-6)
    assert run(folder, [(MISSING, None)]).label is None


def test_probabilities_are_taken_as_such(tmp_path: Path) -> None:
    folder = imu_bundle(tmp_path, model={"gives": "probabilities", "output": "y"})
    assert logit(run(folder, [(ok(k), ramp(k)) for k in (1, 2, 3)])) == pytest.approx(2.92, abs=1e-4)


def test_logits_that_are_called_probabilities_are_refused(tmp_path: Path) -> None:
    data = probe({"x": LAST["btc"]}, {"x": [29, 2]})
    more = {"model": {"gives": "probabilities"}}
    folder = write(tmp_path, {"imu": GRID}, data, {"x": {"stream": "imu", "layout": "btc"}}, **more)
    with pytest.raises(BundleError, match=r"reaches from 0 to 1.92, .* `gives: logits`"):
        run(folder, [(ok(k), ramp(k)) for k in (1, 2, 3)])
    with pytest.raises(BundleError, match="probabilities lie between 0 and 1"):
        doubt(load_bundle(folder))


def test_probabilities_that_are_called_logits_are_pointed_out(tmp_path: Path) -> None:
    data = probe({"x": LAST["btc"]}, {"x": [29, 2]}, normalise=True)
    inputs = {"x": {"stream": "imu", "layout": "btc"}}
    doubtful = write(tmp_path / "doubtful", {"imu": GRID}, data, inputs)
    assert "write `gives: probabilities`" in doubt(load_bundle(doubtful))
    assert doubt(load_bundle(imu_bundle(tmp_path / "logits"))) == ""
    assert doubt(load_bundle(imu_bundle(tmp_path / "said", model={"gives": "probabilities"}))) == ""


def test_a_model_for_one_window_at_a_time(tmp_path: Path) -> None:
    data = probe({"x": ("f4", [1, 30, 6])}, {"x": [29, 2]})
    folder = write(tmp_path, {"imu": GRID}, data, {"x": {"stream": "imu", "layout": "btc"}})
    prediction = run(folder, [(ok(k), ramp(k)) for k in (1, 2, 3)])
    assert logit(prediction) == pytest.approx(2.92, abs=1e-5)
    assert prediction.streams["imu"].contribution == pytest.approx((prediction.confidence or 0) - 0.5, abs=1e-6)


def picture(value: tuple[int, int, int], size: int = 8) -> np.ndarray[Any, Any]:
    return np.full((size, size, 3), value, np.uint8)


@pytest.mark.parametrize(("layout", "shape", "place"), [("bhwc", ["batch", 8, 8, 3], [0, 0, 0]),
                                                        ("bchw", ["batch", 3, 8, 8], [0, 0, 0])])  # fmt: skip
@pytest.mark.parametrize(("color", "expected"), [("rgb", 3.0), ("bgr", 1.0)])
def test_pictures_are_the_newest_resized_and_scaled(
    tmp_path: Path, layout: str, shape: list[Any], place: list[int], color: str, expected: float
) -> None:
    inputs = {"image": {"stream": "camera", "layout": layout, "color": color, "scale": 0.1}}
    folder = write(tmp_path, {"camera": FRAME}, probe({"image": ("f4", shape)}, {"image": place}), inputs)
    steps = [(ok(1), frame(picture((90, 90, 90)))), (ok(2), frame(picture((10, 20, 30), 16), 1)), (MISSING, None)]
    assert logit(run(folder, steps, "camera")) == pytest.approx(expected, abs=1e-5)


def test_a_picture_that_cannot_be_decoded_is_masked(tmp_path: Path) -> None:
    inputs = {"image": {"stream": "camera", "layout": "bhwc"}}
    folder = write(tmp_path, {"camera": FRAME}, probe({"image": ("f4", ["b", 8, 8, 3])}, {"image": [0, 0, 0]}), inputs)
    for layout, data in ((FrameLayout("jpeg", 8, 8), b"no picture"), (FrameLayout("bgr8", 0, 4), b"")):
        bad = (Message(header("camera", 0, layout), data),)
        assert run(folder, [(ok(1), bad)], "camera").streams["camera"].masked == "decode_failed"


def test_two_streams_share_the_prediction(tmp_path: Path) -> None:
    data = probe({"a": LAST["btc"], "b": LAST["btc"]}, {"a": [29, 2], "b": [29, 2]})
    inputs = {"a": {"stream": "left", "layout": "btc"}, "b": {"stream": "right", "layout": "btc"}}
    folder = write(tmp_path, {"left": GRID, "right": GRID}, data, inputs)
    fuser = Fuser(load_bundle(folder), session="s", clock=ManualClock())
    prediction = fuser.step(manifest(1, {"left": ok(1), "right": ok(1)}), {"left": grid(1.0), "right": grid(2.0)})
    left, right = (prediction.streams[n].contribution or 0.0 for n in ("left", "right"))
    assert logit(prediction) == pytest.approx(3.0, abs=1e-5)
    assert 0 < left < right
    assert left + right == pytest.approx((prediction.confidence or 0) - 0.5, abs=1e-12)


@pytest.mark.parametrize(
    ("streams", "inputs", "more", "words"),
    [
        ({"imu": GRID}, {"x": {"stream": "imu", "layout": "btc"}}, {"fusion": "mine.onnx"}, "either `fusion`"),
        ({"imu": GRID | {"token": 3}}, {"x": {"stream": "imu", "layout": "btc"}}, {}, "`token` has no place"),
        ({"imu": GRID}, {"x": {"stream": "wrist", "layout": "btc"}}, {}, "take the streams `wrist`"),
        ({"imu": GRID, "two": GRID}, {"x": {"stream": "imu", "layout": "btc"}}, {}, "`streams` has `imu`, `two`"),
        ({"imu": GRID}, {"x": {"stream": "imu", "layout": "bhwc"}}, {}, "that needs `btc` or `bct`"),
        ({"lidar": SWEEP}, {"x": {"stream": "lidar", "layout": "btc"}}, {}, "an encoder and a `fusion`"),
        ({"imu": GRID}, {"x": {"stream": "imu", "layout": "bct"}}, {}, r"`x` is f4 \[batch, 30, 6\].*f4 \[\*, 6, 30\]"),
        ({"imu": GRID}, {"y": {"stream": "imu", "layout": "btc"}}, {}, "no input `y`"),
        ({"imu": GRID}, {"x": {"stream": "imu", "layout": "btc"}}, {"model": {"output": "z"}}, "no output `z`"),
        ({"imu": GRID}, {"x": {"stream": "imu", "layout": "btc"}}, {"labels": ["a", "b", "c"]}, "`y` is f4"),
        ({"imu": GRID}, {"x": {"stream": "imu", "layout": "btc"}}, {"window": {"hop_ms": 100, "steps": 5}}, "50, 6"),
    ],
)
def test_a_model_that_does_not_fit(tmp_path: Path, streams: Any, inputs: Any, more: Any, words: str) -> None:
    folder = write(tmp_path, streams, probe({"x": LAST["btc"]}, {"x": [29, 2]}), inputs, **more)
    with pytest.raises(BundleError, match=words):
        load_bundle(folder)


def test_pictures_need_a_fixed_size(tmp_path: Path) -> None:
    data = probe({"image": ("f4", ["b", "h", "w", 3])}, {"image": [0, 0, 0]})
    folder = write(tmp_path, {"camera": FRAME}, data, {"image": {"stream": "camera", "layout": "bhwc"}})
    with pytest.raises(BundleError, match="height and width must be fixed"):
        load_bundle(folder)
