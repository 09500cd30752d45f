"""Fusion: what is encoded, what is masked, and what the prediction says of it."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.align import StreamManifest
from pipeline.bundle import SHIPPED, load_bundle
from pipeline.clock import ManualClock
from pipeline.errors import BundleError, ConfigError
from pipeline.inference import FuseOptions, Fuser
from pipeline.messages import FrameLayout, Message, SignalLayout, TextLayout, signal_dtype
from pipeline.onnxfile import fingerprint, provider_in_use, resolve_providers
from pipeline.prediction import Prediction
from tests.tiny_bundle import (
    ALL,
    FRAME,
    GRID,
    HOP_NS,
    MISSING,
    SWEEP,
    frame,
    grid,
    header,
    linear_fusion,
    manifest,
    model,
    node,
    ok,
    product_fusion,
    sweep,
    write_bundle,
)

STREAMS: dict[str, dict[str, Any]] = {"imu": GRID, "lidar": SWEEP}


def make(folder: Path, streams: Mapping[str, Any] = STREAMS, options: FuseOptions | None = None, **more: Any) -> Fuser:
    allow = any(s.get("encoder", "").startswith("python:") for s in streams.values())
    return Fuser(load_bundle(write_bundle(folder, streams, **more), allow), options, "s1", clock=ManualClock())


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three streams that interact, for tests that run many examples."""
    streams = {"imu": GRID, "lidar": SWEEP, "camera": FRAME}
    return write_bundle(tmp_path_factory.mktemp("bundle"), streams, fusion=product_fusion(streams))


def shares(prediction: Prediction) -> dict[str, float]:
    return {name: float(s.contribution or 0.0) for name, s in prediction.streams.items()}


# -- the window --------------------------------------------------------------------------------------------------------


def test_a_prediction_a_step_from_the_first_on(tmp_path: Path) -> None:
    fuser = make(tmp_path, steps=3)
    for step in range(1, 6):
        prediction = fuser.step(manifest(step, {"imu": ok(step), "lidar": ok(step)}),
                                {"imu": grid(0.5), "lidar": sweep(1.0)})  # fmt: skip
        filled = min(step, 3)
        assert prediction.window.index == step
        assert prediction.window.end_ns == step * HOP_NS
        assert prediction.window.end_ns - prediction.window.start_ns == 3 * HOP_NS
        assert fuser.window()["imu"][1].tolist() == [0.0] * (3 - filled) + [1.0] * filled
        yes = filled * (1 + 0.5) + filled * (1 + 0.8)  # a sweep's mean has the offsets' zeros in it
        assert prediction.confidence == pytest.approx(1 / (1 + math.exp(-yes)), abs=1e-6)
        assert prediction.label == "yes"
        assert prediction.digest == f"{step:032x}"
        assert prediction.bundle.sha256 == fuser.bundle.sha256


def test_what_is_missing_is_masked_and_said(tmp_path: Path) -> None:
    fuser = make(tmp_path)
    late = StreamManifest(verdict="late", coverage=0.0)
    partial = StreamManifest(
        verdict="partial", coverage=0.5, proven=True, used=((0, 1, 1),), epoch=0, newest_ns=60_000_000
    )
    half = grid(1.0)
    half[5:] = np.nan
    prediction = fuser.step(manifest(1, {"imu": partial, "lidar": late}), {"imu": half})
    imu, lidar = prediction.streams["imu"], prediction.streams["lidar"]
    assert (imu.verdict, imu.coverage, imu.age_ms, imu.masked) == ("partial", 0.5, 40.0, None)
    assert (lidar.verdict, lidar.contribution, lidar.age_ms, lidar.masked) == ("late", 0.0, None, None)
    assert fuser.window()["imu"][0][-1] == pytest.approx(0.5)  # holes are zeros
    gone = fuser.step(manifest(2, {"imu": MISSING}), {}).streams
    assert (gone["imu"].verdict, gone["imu"].reason) == ("missing", "dead")
    assert (gone["lidar"].verdict, gone["lidar"].reason) == ("missing", "never_started")


@pytest.mark.parametrize("reason", ["overrun", "shed", "decode_failed"])
def test_what_was_lost_downstream_is_masked_and_said(tmp_path: Path, reason: str) -> None:
    fuser = make(tmp_path)
    both = {"imu": ok(1), "lidar": ok(1)}
    prediction = fuser.step(manifest(1, both), {"imu": grid(1), "lidar": sweep(1)}, {"lidar": reason})
    assert prediction.streams["lidar"].verdict == "ok"  # the aligner's verdict stays what it was
    assert prediction.streams["lidar"].masked == reason
    assert shares(prediction)["lidar"] == 0.0
    assert fuser.encoded == {"imu": 1, "lidar": 0}


def test_content_that_never_came_is_masked(tmp_path: Path) -> None:
    prediction = make(tmp_path).step(manifest(1, {"imu": ok(1), "lidar": ok(1)}), {"imu": grid(1), "lidar": None})
    assert prediction.streams["lidar"].masked == "absent"


def test_nothing_at_all_is_no_label(tmp_path: Path) -> None:
    prediction = make(tmp_path).step(manifest(1, {"imu": MISSING, "lidar": MISSING}), {})
    assert (prediction.label, prediction.confidence, prediction.abstained) == (None, None, True)
    assert prediction.scores == {"no": 0.5, "yes": 0.5}  # what the model says when it sees nothing
    assert shares(prediction) == {"imu": 0.0, "lidar": 0.0}
    assert prediction.sync_uncertainty_ms is None


def test_steps_left_out_are_a_gap_in_the_window(tmp_path: Path) -> None:
    fuser = make(tmp_path, steps=4)
    for step in (1, 2, 4):
        fuser.step(manifest(step, {"imu": ok(step)}), {"imu": grid(step)})
    assert fuser.window()["imu"][1].tolist() == [1, 1, 0, 1]
    fuser.step(manifest(9, {"imu": ok(9)}), {"imu": grid(9)})
    assert fuser.window()["imu"][1].tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="step 9 came after step 9"):
        fuser.step(manifest(9, {}), {})


def test_a_rig_names_its_streams(tmp_path: Path) -> None:
    bundle = load_bundle(write_bundle(tmp_path, STREAMS))
    fuser = Fuser(bundle, session="s", streams={"imu": "wrist"}, clock=ManualClock())
    prediction = fuser.step(manifest(1, {"wrist": ok(1), "lidar": ok(1)}), {"wrist": grid(1), "lidar": sweep(1)})
    assert list(prediction.streams) == ["wrist", "lidar"]
    assert prediction.streams["lidar"].reason == "never_started"
    assert shares(prediction)["wrist"] > 0
    assert fuser.encoded == {"imu": 1, "lidar": 0}


# -- encoding once -----------------------------------------------------------------------------------------------------


def test_a_sweep_that_serves_two_steps_is_encoded_once(tmp_path: Path) -> None:
    fuser = make(tmp_path)
    for step, seq in ((1, 0), (2, 0), (3, 1), (4, 1)):
        fuser.step(
            manifest(step, {"imu": ok(step), "lidar": ok(step, seq)}), {"imu": grid(1), "lidar": sweep(seq + 1.0)}
        )
    assert fuser.encoded == {"imu": 4, "lidar": 2}
    assert fuser.window()["lidar"][0][:, 0].tolist() == pytest.approx([0.8, 1.6, 1.6])


def test_the_same_number_of_another_epoch_is_another_sweep(tmp_path: Path) -> None:
    fuser = make(tmp_path)
    fuser.step(manifest(1, {"lidar": ok(1, 0, epoch=0)}), {"lidar": sweep(1)})
    fuser.step(manifest(2, {"lidar": ok(2, 0, epoch=7)}), {"lidar": sweep(5)})
    assert fuser.encoded["lidar"] == 2
    assert fuser.window()["lidar"][0][-1] == pytest.approx(4.0)


def test_what_serves_all_steps_of_a_window_is_encoded_once(tmp_path: Path) -> None:
    fuser = make(tmp_path, {"lidar": SWEEP}, steps=50)
    for step in range(1, 101):
        fuser.step(manifest(step, {"lidar": ok(step, step // 10)}), {"lidar": sweep(step // 10)})
    assert fuser.encoded["lidar"] == 11


# -- content an encoder can or cannot use ------------------------------------------------------------------------------


def test_compressed_and_raw_frames_are_the_same_to_a_model(tmp_path: Path) -> None:
    fuser = make(tmp_path, {"camera": FRAME}, steps=1)
    pixels = np.full((32, 32, 3), 100, np.uint8)
    coded = cv2.imencode(".jpg", pixels)[1].tobytes()
    jpeg = (Message(header("camera", 1, FrameLayout("jpeg", 32, 32)), coded),)
    gray = (Message(header("camera", 2, FrameLayout("gray8", 32, 32)), pixels[..., 0].copy()),)
    for step, content in enumerate((frame(pixels), jpeg, gray), 1):
        fuser.step(manifest(step, {"camera": ok(step)}), {"camera": content})
        assert fuser.window()["camera"][0][-1] == pytest.approx(100, abs=1.0)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8 no picture", bytes(500)])
def test_a_frame_that_cannot_be_decoded_masks_its_stream(tmp_path: Path, data: bytes) -> None:
    fuser = make(tmp_path, {"camera": FRAME, "imu": GRID})
    bad = (Message(header("camera", 0, FrameLayout("jpeg", 32, 32)), data),)
    prediction = fuser.step(manifest(1, {"camera": ok(1, 0), "imu": ok(1)}), {"camera": bad, "imu": grid(1)})
    assert prediction.streams["camera"].masked == "decode_failed"
    assert prediction.label == "yes"
    assert "camera/0" in fuser.notes["camera"]
    good = fuser.step(manifest(2, {"camera": ok(2, 1)}), {"camera": frame(np.zeros((4, 4, 3), np.uint8), 1)})
    assert good.streams["camera"].masked is None
    assert fuser.notes == {}


def test_a_payload_of_the_wrong_size_masks_its_stream(tmp_path: Path) -> None:
    fuser = make(tmp_path, {"lidar": SWEEP})
    short = (Message(sweep(1, points=9)[0].header, b"123"),)
    assert fuser.step(manifest(1, {"lidar": ok(1)}), {"lidar": short}).streams["lidar"].masked == "decode_failed"
    bare = (Message(sweep(1)[0].header, None),)
    assert fuser.step(manifest(2, {"lidar": ok(2)}), {"lidar": bare}).streams["lidar"].masked == "decode_failed"


def test_messages_that_do_not_fit_together_mask_their_stream(tmp_path: Path) -> None:
    """Under the rule `all`, whose step may hold several."""
    wind = {"payload": "signal", "channels": 2, "rule": ALL}
    fuser = make(tmp_path, {"wind": wind, "imu": GRID})
    other = np.zeros(10, signal_dtype(3))
    both = tuple(Message(header("wind", seq, SignalLayout(10, ("a", "b", "c"))), other) for seq in (0, 1))
    prediction = fuser.step(manifest(1, {"wind": ok(1), "imu": ok(1)}), {"wind": both, "imu": grid(1)})
    assert prediction.streams["wind"].masked == "decode_failed"
    assert prediction.label == "yes"


def test_a_token_that_is_no_number_masks_its_stream(tmp_path: Path) -> None:
    fuser = make(tmp_path, {"lidar": SWEEP, "imu": GRID})
    prediction = fuser.step(manifest(1, {"lidar": ok(1), "imu": ok(1)}), {"lidar": sweep(math.inf), "imu": grid(1)})
    assert prediction.streams["lidar"].masked == "encode_failed"
    assert prediction.confidence is not None


def test_a_hop_without_text_is_content(tmp_path: Path) -> None:
    text = {"payload": "text", "rule": {"kind": "all"}}
    fuser = make(tmp_path, {"notes": text})
    lines = tuple(Message(header("notes", i, TextLayout(2)), word) for i, word in enumerate((b"ab", b"cd")))
    fuser.step(manifest(1, {"notes": ok(1)}), {"notes": lines})
    fuser.step(manifest(2, {"notes": StreamManifest(verdict="ok", epoch=0)}), {"notes": ()})
    tokens, mask = fuser.window()["notes"]
    assert mask.tolist() == [0, 1, 1]
    assert tokens[:, 0].tolist() == [0, np.mean(list(b"abcd")), 0]


def test_an_encoder_that_fails_on_its_first_step_is_refused(tmp_path: Path) -> None:
    nodes = [
        node("Reshape", ["x", "s"], ["f"]),
        node("ReduceSum", ["f"], ["m"], keepdims=0),
        node("Reshape", ["m", "one"], ["token"]),
    ]
    broken = model(nodes, {"x": ("f4", ["n", 5])}, {"token": [1]}, {"s": [7, 11], "one": [1]})
    with pytest.raises(BundleError, match=r"encoder\.lidar\.onnx: the model fails on an input of the shape"):
        make(tmp_path, {"lidar": SWEEP}, encoders={"lidar": broken})


# -- past samples, holes and state -------------------------------------------------------------------------------------


def sums(rows: int) -> bytes:
    """token [2]: the sum of x and the sum of valid."""
    nodes = [node("ReduceSum", ["x"], ["a"], keepdims=0), node("ReduceSum", ["valid"], ["b"], keepdims=0),
             node("Reshape", ["a", "s"], ["a1"]), node("Reshape", ["b", "s"], ["b1"]),
             node("Concat", ["a1", "b1"], ["token"], axis=0)]  # fmt: skip
    return model(nodes, {"x": ("f4", [rows, 6]), "valid": ("f4", [rows])}, {"token": [2]}, {"s": [1]})


def wide_fusion(streams: Mapping[str, int]) -> bytes:
    """logits [0, 0] whatever comes; tokens of any width."""
    first = next(iter(streams))
    nodes = [node("ReduceMean", [f"mask.{first}", "axes"], ["m"], keepdims=1), node("Sub", ["m", "m"], ["zero"]),
             node("Concat", ["zero", "zero"], ["logits"], axis=1)]  # fmt: skip
    inputs: dict[str, tuple[str, list[Any]]] = {}
    for name, width in streams.items():
        inputs |= {name: ("f4", ["b", "t", width]), f"mask.{name}": ("f4", ["b", "t"])}
    return model(nodes, inputs, {"logits": ["b", 2]}, {"axes": [1]})


def test_an_encoder_sees_the_past_it_declares_and_its_holes(tmp_path: Path) -> None:
    stream = GRID | {"context_ms": 150, "token": 2}
    fuser = make(tmp_path, {"imu": stream}, encoders={"imu": sums(25)}, fusion=wide_fusion({"imu": 2}), steps=6)
    holed = grid(1.0)
    holed[:4] = np.nan
    given = [(grid(1.0), ok(1)), (grid(1.0), ok(2)), (holed, ok(3)), (None, MISSING), (grid(1.0), ok(5)),
             (grid(1.0), ok(6, epoch=9))]  # fmt: skip
    for step, (content, stated) in enumerate(given, 1):
        fuser.step(manifest(step, {"imu": stated}), {"imu": content})
    valid = [10, 20, 21, 0, 10 + 0 + 5, 10]  # a step back whole, half of the one before it; nothing across epochs
    assert fuser.window()["imu"][0].tolist() == [[6.0 * v, v] for v in valid]


def counter() -> bytes:
    """token [1]: the state, which counts runs from 1 and adds 100 for each run whose samples are valid."""
    nodes = [node("ReduceMax", ["valid"], ["any"], keepdims=0), node("Mul", ["any", "hundred"], ["more"]),
             node("Add", ["state", "one"], ["next"]), node("Add", ["next", "more"], ["state_out"]),
             node("ReduceMean", ["x"], ["m"], keepdims=0), node("Sub", ["m", "m"], ["zero"]),
             node("Add", ["state_out", "zero"], ["token"])]  # fmt: skip
    inputs = {"x": ("f4", [10, 6]), "valid": ("f4", [10]), "state": ("f4", [1])}
    constants = {"one": np.float32(1), "hundred": np.float32(100)}
    return model(nodes, inputs, {"token": [1], "state_out": [1]}, constants)


def test_a_state_moves_on_through_masked_steps_and_starts_anew_with_an_epoch(tmp_path: Path) -> None:
    fuser = make(tmp_path, {"imu": GRID}, encoders={"imu": counter()}, fusion=wide_fusion({"imu": 1}), steps=9)
    stated = [MISSING, ok(2), ok(3), MISSING, ok(5), ok(6), ok(7, epoch=5), ok(8, epoch=5)]
    for step, verdict in enumerate(stated, 1):
        lost = {"imu": "overrun"} if step == 5 else {}
        fuser.step(manifest(step, {"imu": verdict}), {"imu": None if verdict is MISSING else grid(0.0)}, lost)
    # Step 1 is before the first content; 4 is missing, 5 lost; at 7 an epoch begins.
    assert fuser.window()["imu"][0][:, 0].tolist() == [0, 0, 101, 202, 0, 0, 305, 101, 202]
    fuser.step(manifest(10, {"imu": ok(10, epoch=5)}), {"imu": grid(0.0)})
    assert fuser.window()["imu"][0][-1] == [304.0]  # the step that was left out counts, too


EXPERT = b"""
import numpy as np

class Log:
    token = 2
    def __init__(self, stream, settings):
        self.calls = settings["calls"]
    def reset(self):
        self.calls.append("reset")
    def skip(self):
        self.calls.append("skip")
    def encode(self, content, start_ns, end_ns):
        self.calls.append((content[0].header.layout.format, start_ns, end_ns))
        if len(self.calls) > 7:
            raise RuntimeError("had enough")
        return np.array([1, 2], np.float32)
"""


def test_a_python_expert_is_told_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FRAME | {"encoder": "python: expert:Log", "token": 2, "settings": {"calls": []}}
    fuser = make(tmp_path, {"camera": stream}, files={"expert.py": EXPERT}, fusion=wide_fusion({"camera": 2}))
    calls = fuser._lanes["camera"]._encoder._expert.calls  # type: ignore[attr-defined]
    coded = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    jpeg = (Message(header("camera", 1, FrameLayout("jpeg", 8, 8)), coded),)
    bad = (Message(header("camera", 1, FrameLayout("jpeg", 8, 8)), b"bad"),)
    given = [
        (ok(1), jpeg),
        (ok(2), jpeg),
        (MISSING, None),
        (ok(4), bad),
        (ok(5, epoch=3), jpeg),
        (ok(6, epoch=3), jpeg),
    ]
    masked = [fuser.step(manifest(step, {"camera": stated}), {"camera": content}).streams["camera"].masked
              for step, (stated, content) in enumerate(given, 1)]  # fmt: skip
    seen = [("bgr8", (k - 1) * HOP_NS, k * HOP_NS) for k in range(7)]
    assert calls == ["reset", seen[1], seen[2], "skip", "skip", "reset", seen[5], seen[6]]
    assert masked == [None, None, None, "decode_failed", None, "encode_failed"]
    assert fuser.notes == {"camera": "RuntimeError: had enough"}


@pytest.mark.parametrize(("changes", "words"), [({"token": 3}, "its token has 2 numbers, model.yaml says 3"),
                                                ({"settings": {}}, "cannot be made: KeyError")])  # fmt: skip
def test_an_expert_that_does_not_fit(tmp_path: Path, changes: Any, words: str) -> None:
    stream = FRAME | {"encoder": "python: expert:Log", "token": 2, "settings": {"calls": []}} | changes
    with pytest.raises(BundleError, match=words):
        make(tmp_path, {"camera": stream}, files={"expert.py": EXPERT}, fusion=wide_fusion({"camera": stream["token"]}))


# -- contributions -----------------------------------------------------------------------------------------------------

contents = st.fixed_dictionaries(
    {"imu": st.none() | st.floats(-2, 2, width=32), "lidar": st.none() | st.floats(-2, 2, width=32),
     "camera": st.none() | st.integers(0, 2)}
)  # fmt: skip


@settings(max_examples=40)
@given(st.lists(contents, min_size=1, max_size=4))
def test_contributions_sum_to_what_the_model_knows_beyond_nothing(kept: Path, steps: list[dict[str, Any]]) -> None:
    fuser = Fuser(load_bundle(kept), session="s", clock=ManualClock())
    empty = fuser.step(manifest(1, {}), {})
    for step, values in enumerate(steps, 2):
        makers = {"imu": grid, "lidar": sweep, "camera": lambda v: frame(np.full((2, 2, 3), v, np.uint8))}
        content = {name: None if v is None else makers[name](v) for name, v in values.items()}
        stated = {name: MISSING if c is None else ok(step) for name, c in content.items()}
        prediction = fuser.step(manifest(step, stated), content)
    found, present = shares(prediction), {n for n, (_, mask) in fuser.window().items() if mask.any()}
    assert all(found[name] == 0.0 for name in found if name not in present)
    if not present:
        assert prediction.label is None
        return
    assert prediction.label is not None
    assert sum(found.values()) == pytest.approx(prediction.confidence - empty.scores[prediction.label], abs=1e-12)


def test_contributions_are_the_mean_over_all_orders_of_masking(kept: Path) -> None:
    content = {"imu": grid(0.7), "lidar": sweep(-1.5), "camera": frame(np.full((2, 2, 3), 1, np.uint8))}
    tokens = {"imu": 0.7, "lidar": -1.2, "camera": 1.0}
    prediction = Fuser(load_bundle(kept), clock=ManualClock()).step(manifest(1, {n: ok(1) for n in content}), content)

    def v(members: set[str]) -> float:
        yes = 1 / (1 + math.exp(-math.prod(1 + tokens[name] for name in members)))
        return yes if prediction.label == "yes" else 1 - yes

    orders = [("imu", "lidar", "camera"), ("imu", "camera", "lidar"), ("lidar", "imu", "camera"),
              ("lidar", "camera", "imu"), ("camera", "imu", "lidar"), ("camera", "lidar", "imu")]  # fmt: skip
    for name, found in shares(prediction).items():
        gains = [v({*o[: o.index(name)], name}) - v(set(o[: o.index(name)])) for o in orders]
        assert found == pytest.approx(sum(gains) / 6, abs=1e-6)


def test_a_stream_that_the_model_ignores_contributes_nothing(tmp_path: Path) -> None:
    fusion = linear_fusion(STREAMS, {"imu": 1.0, "lidar": 0.0})
    prediction = make(tmp_path, fusion=fusion).step(manifest(1, {"imu": ok(1), "lidar": ok(1)}),
                                                    {"imu": grid(1), "lidar": sweep(3)})  # fmt: skip
    assert shares(prediction)["lidar"] == pytest.approx(0.0, abs=1e-7)
    assert shares(prediction)["imu"] > 0.3


def test_an_older_step_still_contributes(tmp_path: Path) -> None:
    fuser = make(tmp_path)
    fuser.step(manifest(1, {"imu": ok(1), "lidar": ok(1)}), {"imu": grid(1), "lidar": sweep(1)})
    prediction = fuser.step(manifest(2, {"imu": ok(2), "lidar": MISSING}), {"imu": grid(1)})
    assert prediction.streams["lidar"].verdict == "missing"
    assert shares(prediction)["lidar"] > 0


def test_contributions_can_be_switched_off(tmp_path: Path) -> None:
    given = manifest(1, {"imu": ok(1), "lidar": ok(1)}), {"imu": grid(0.1), "lidar": sweep(0.1)}
    with_, without = make(tmp_path).step(*given), make(tmp_path, options=FuseOptions(contributions=False)).step(*given)
    assert [s.contribution for s in without.streams.values()] == [None, None]
    assert without.label == with_.label
    assert without.confidence == pytest.approx(with_.confidence, abs=1e-6)


def test_more_than_eight_streams_are_sampled_with_their_error(tmp_path: Path) -> None:
    streams = {f"s{i}": GRID for i in range(10)}
    fuser = make(tmp_path, streams, fusion=product_fusion(streams), calibration={"temperature": 20.0})
    given = (
        manifest(1, {name: ok(1) for name in streams}),
        {name: grid(0.1 * i - 0.2) for i, name in enumerate(streams)},
    )
    prediction = fuser.step(*given)
    empty = make(tmp_path / "again", streams, fusion=product_fusion(streams), calibration={"temperature": 20.0})
    nothing = empty.step(manifest(1, {}), {}).scores[str(prediction.label)]
    assert sum(shares(prediction).values()) == pytest.approx(prediction.confidence - nothing, abs=1e-12)
    assert all(s.contribution_error is None or s.contribution_error < 0.05 for s in prediction.streams.values())
    assert any(s.contribution_error for s in prediction.streams.values())
    assert shares(prediction)["s2"] == pytest.approx(0.0, abs=1e-7)  # a factor of one
    assert shares(empty.step(msgspec.structs.replace(given[0], step=20), given[1])) == shares(prediction)


# -- what it says ------------------------------------------------------------------------------------------------------


def test_calibration_set_and_abstention(tmp_path: Path) -> None:
    given = manifest(1, {"imu": ok(1)}), {"imu": grid(0.5)}
    calibration = {"temperature": 3.0, "abstain_below": 0.7, "set_threshold": 0.3, "set_coverage": 0.9}
    prediction = make(tmp_path, {"imu": GRID}, calibration=calibration).step(*given)
    assert prediction.confidence == pytest.approx(1 / (1 + math.exp(-1.5 / 3)), abs=1e-6)
    assert prediction.set == ["yes", "no"]
    assert (prediction.label, prediction.abstained) == ("yes", True)
    mass = make(tmp_path, {"imu": GRID}, calibration={"set_mass": 0.8}).step(*given)
    assert (mass.set, mass.confidence) == (["yes"], pytest.approx(1 / (1 + math.exp(-1.5))))
    assert make(tmp_path, {"imu": GRID}, calibration={"set_mass": 0.82}).step(*given).set == ["yes", "no"]
    sure = make(tmp_path, {"imu": GRID}).step(*given)
    assert (sure.set, sure.abstained) == (["yes"], False)


def test_scores_that_are_no_numbers_are_null(tmp_path: Path) -> None:
    fusion = linear_fusion({"imu": GRID}, {"imu": 1.0}, bias=math.nan)
    prediction = make(tmp_path, {"imu": GRID}, fusion=fusion).step(manifest(1, {"imu": ok(1)}), {"imu": grid(1)})
    assert prediction.scores == {"no": None, "yes": None}
    assert (prediction.label, prediction.confidence, prediction.set, prediction.abstained) == (None, None, [], True)
    json.loads(msgspec.json.encode(prediction), parse_constant=lambda name: pytest.fail(name))


def test_age_and_uncertainty_come_from_the_manifest(tmp_path: Path) -> None:
    both = {"imu": ok(1, uncertainty_ns=200_000), "lidar": ok(1, uncertainty_ns=600_000)}
    prediction = make(tmp_path).step(manifest(1, both), {"imu": grid(1), "lidar": sweep(1)})
    assert prediction.streams["imu"].age_ms == 20.0
    assert prediction.sync_uncertainty_ms == pytest.approx(0.8)


class Ticking:
    """A clock that moves by one millisecond whenever it is read."""

    def __init__(self) -> None:
        self.now = 0

    def now_ns(self) -> int:
        self.now += 1_000_000
        return self.now

    def wait_until(self, t_ns: int, stop: Any = None) -> bool:
        return True


def test_latency_is_measured_by_the_clock_that_was_given(tmp_path: Path) -> None:
    fuser = Fuser(load_bundle(write_bundle(tmp_path, STREAMS)), session="s", clock=Ticking())
    timing = fuser.step(manifest(1, {}), {}).timing
    assert timing.latency_ms == {"wait": 5.0, "encode": 1.0, "fuse": 1.0}
    assert timing.provider == "cpu"


def test_equal_steps_give_equal_predictions(kept: Path) -> None:
    def run() -> list[bytes]:
        fuser = Fuser(load_bundle(kept), session="s", clock=ManualClock())
        return [msgspec.json.encode(fuser.step(manifest(k, {"imu": ok(k), "lidar": ok(k)}),
                                               {"imu": grid(math.sin(k)), "lidar": sweep(math.cos(k))}))
                for k in range(1, 20)]  # fmt: skip

    assert run() == run()


# -- where it runs -----------------------------------------------------------------------------------------------------


def test_a_provider_that_is_not_there_is_said(tmp_path: Path) -> None:
    fuser = make(tmp_path, options=FuseOptions(providers=("openvino", "cpu")))
    assert "OpenVINOExecutionProvider" not in fuser._fusion.session.get_providers()
    assert fuser.provider == "cpu (openvino is not available)"
    assert fuser.step(manifest(1, {}), {}).timing.provider == fuser.provider
    assert provider_in_use(fuser._fusion.session, ["CPUExecutionProvider"]) == "cpu"


def test_an_unknown_provider_is_the_users_fault() -> None:
    with pytest.raises(ConfigError, match=r"`cdua` is no execution provider\. Did you mean `cuda`\?"):
        resolve_providers(["cdua"])
    assert resolve_providers([])[-1] == "CPUExecutionProvider"


def test_the_fingerprint_names_what_floats_depend_on(tmp_path: Path) -> None:
    found = make(tmp_path, options=FuseOptions(threads=2)).fingerprint()
    assert found == fingerprint("cpu", 2)
    assert set(found) >= {"onnxruntime", "provider", "threads", "optimisation", "cpu", "machine"}
    assert all(found.values())


# -- the shipped demo --------------------------------------------------------------------------------------------------


def demo_maker() -> Any:
    """models/demo/make.py, which simulates sessions."""
    spec = importlib.util.spec_from_file_location("demo_make", SHIPPED / "demo" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo_session() -> list[tuple[Prediction, str]]:
    fuser = Fuser(load_bundle(SHIPPED / "demo"), session="s", clock=ManualClock())
    return list(demo_maker().simulate(fuser, 4711, 40))


def test_the_demo_knows_its_world(demo_session: list[tuple[Prediction, str]]) -> None:
    assert len(demo_session) >= 395
    right = [prediction.label == truth for prediction, truth in demo_session]
    assert np.mean(right) > 0.95
    assert {truth for _, truth in demo_session} == {"calm", "shake", "tone", "approach", "flash"}


@pytest.mark.parametrize(
    ("label", "sensors"),
    [
        ("shake", {"imu", "microphone"}),
        ("tone", {"microphone"}),
        ("approach", {"camera", "lidar"}),
        ("flash", {"camera"}),
    ],
)
def test_the_demo_says_which_sensor_told_it(
    demo_session: list[tuple[Prediction, str]], label: str, sensors: set[str]
) -> None:
    found = [shares(p) for p, truth in demo_session if truth == label == p.label]
    mean = {name: np.mean([s[name] for s in found]) for name in found[0]}
    first = sorted(mean, key=lambda name: -mean[name])[: len(sensors)]
    assert set(first) == sensors


def test_the_demo_is_less_sure_without_a_sensor(demo_session: list[tuple[Prediction, str]]) -> None:
    fuser = Fuser(load_bundle(SHIPPED / "demo"), FuseOptions(contributions=False), "s", clock=ManualClock())
    blind = list(demo_maker().simulate(fuser, 4711, 40, {"camera": "shed", "lidar": "overrun"}))
    assert np.mean([p.label == truth for p, truth in blind if truth == "approach"]) < 0.2
    assert np.mean([p.label == truth for p, truth in blind if truth == "shake"]) > 0.85
    confident = [np.mean([p.confidence for p, _ in session]) for session in (demo_session, blind)]
    assert confident[0] > confident[1] + 0.1


def test_the_demo_works_with_any_subset() -> None:
    for subset in range(16):
        names = [n for i, n in enumerate(("camera", "microphone", "imu", "lidar")) if subset >> i & 1]
        fuser = Fuser(load_bundle(SHIPPED / "demo"), session="s", clock=ManualClock())
        content = {"camera": frame(np.full((48, 64, 3), 45, np.uint8)), "microphone": np.zeros((1600, 1), np.float32),
                   "imu": grid(0.0), "lidar": sweep(6.0)}  # fmt: skip
        stated = {name: ok(1) if name in names else MISSING for name in content}
        prediction = fuser.step(manifest(1, stated), content)
        assert sum(p or 0.0 for p in prediction.scores.values()) == pytest.approx(1.0)
        assert (prediction.label is None) is (not names)
        assert all(s.masked is None for s in prediction.streams.values())
