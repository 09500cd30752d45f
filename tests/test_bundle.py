"""A good bundle loads; each way to be wrong is one error that names both sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from onnx import TensorProto

from pipeline.align import Aligner, Latest, Resample
from pipeline.bundle import SHIPPED, load_bundle
from pipeline.errors import BundleError, ConfigError
from tests.tiny_bundle import FRAME, GRID, SWEEP, linear_fusion, mean_encoder, model, node, write_bundle

STREAMS: dict[str, dict[str, Any]] = {"imu": GRID, "lidar": SWEEP}


def edit(folder: Path, **changes: Any) -> None:
    """Changes values of model.yaml; a key is a dotted path with ``__`` for the dot, None removes it."""
    text = yaml.safe_load((folder / "model.yaml").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = text
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    (folder / "model.yaml").write_text(yaml.safe_dump(text, sort_keys=False))


def refused(folder: Path, *words: str, allow_code: bool = False) -> None:
    with pytest.raises(BundleError) as caught:
        load_bundle(folder, allow_code)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "tiny", STREAMS)


def test_a_bundle_is_what_its_file_says(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.name == "tiny"
    assert (bundle.window.hop_ns, bundle.window.steps) == (100_000_000, 3)
    assert bundle.labels == ("no", "yes")
    assert bundle.streams["imu"].rule == Resample(100, 50_000_000, "linear")
    assert (bundle.streams["imu"].samples, bundle.streams["imu"].channels) == (10, 6)
    assert bundle.streams["lidar"].rule == Latest(250_000_000)
    assert bundle.calibration.temperature == 1.0
    assert len(bundle.sha256) == 64


def test_its_digest_follows_every_byte(folder: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path / "other", STREAMS, fusion=linear_fusion(STREAMS, {"imu": 1.0, "lidar": 2.0}))
    assert load_bundle(folder).sha256 == load_bundle(folder).sha256
    assert load_bundle(folder).sha256 != load_bundle(other).sha256


@pytest.mark.parametrize("name", ["demo", "presence"])
def test_shipped_bundles_load(name: str) -> None:
    bundle = load_bundle(SHIPPED / name)
    assert bundle.name == name
    assert (SHIPPED / name / bundle.lineage.card).is_file()
    assert sum(len(data) for data in bundle.files.values()) < 1_000_000


# -- files -------------------------------------------------------------------------------------------------------------


def test_no_bundle_is_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"here is no bundle.*model\.yaml.*models/demo"):
        load_bundle(tmp_path / "demos")


def test_a_missing_file(folder: Path) -> None:
    (folder / "encoder.imu.onnx").unlink()
    refused(folder, "encoder.imu.onnx", "cannot be read", "No such file")


def test_a_changed_byte(folder: Path) -> None:
    file = folder / "encoder.imu.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(folder, "encoder.imu.onnx", "SHA-256", "model.yaml says")


def test_a_file_without_a_digest(folder: Path) -> None:
    text = yaml.safe_load((folder / "model.yaml").read_text())
    del text["lineage"]["files"]["fusion.onnx"]
    (folder / "model.yaml").write_text(yaml.safe_dump(text))
    refused(folder, "`fusion.onnx`", "not listed", "`encoder.imu.onnx`", "Add the line `fusion.onnx: ")


def test_a_file_outside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fusion.onnx").write_bytes(b"")
    listed = dict.fromkeys(("../fusion.onnx", "encoder.imu.onnx", "encoder.lidar.onnx"), "0" * 64)
    edit(folder, lineage__files=listed, fusion="../fusion.onnx")
    refused(folder, "../fusion.onnx", "lies outside of the bundle")


# -- model.yaml --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows": {"hop_ms": 100}}, ["model.yaml", "`windows` is no key", "Did you mean `window`?"]),
        ({"window__hop": 100}, ["window.hop", "`hop` is no key", "`hop_ms`"]),
        ({"window__hop_ms": float("inf")}, ["line 3, window.hop_ms: found inf", "Write a finite number"]),
        ({"streams__imu__rule__max_gap_ms": float("nan")}, ["streams.imu.rule.max_gap_ms: found nan", "finite"]),
        ({"window__steps": 0}, ["window.steps", "at least 1"]),
        ({"window": None}, ["`window` is missing"]),
        ({"streams__imu__rule__kind": "resampled"}, ["resampled", "`resample`"]),
        ({"streams__imu__payload": "imu6"}, ["streams.imu.payload", "'imu6'", "`imu`"]),
        ({"streams__imu__channels": 3}, ["streams.imu.channels", "found 3", "6"]),
        ({"streams__imu__channel_names": ["x"]}, ["streams.imu.channel_names", "imu has none; remove"]),
        (
            {"streams__imu__payload": "signal", "streams__imu__channels": 6, "streams__imu__channel_names": ["x", "y"]},
            ["streams.imu.channel_names", "found 2 for 6 channels; name each"],
        ),
        ({"streams__imu__rule__rate_hz": 33}, ["window.hop_ms", "`imu` at 33 Hz", "90.9090909 ms"]),
        ({"streams__lidar__context_ms": 100}, ["streams.lidar.context_ms", "resampled"]),
        ({"streams__imu__settings": {"a": 1}}, ["streams.imu.settings", "python:"]),
        ({"streams__imu__rule__method": "band_limited"}, ["streams.imu.rule", "audio", "`linear`"]),
        ({"streams__lidar__rule": {"kind": "resample", "rate_hz": 10, "max_gap_ms": 9}}, ["sweep cannot be resampled"]),
        ({"labels": ["yes"]}, ["labels", "two or more"]),
        ({"strategy": "middle"}, ["strategy", "`late`"]),
        ({"calibration": {"temperature": 0}}, ["calibration.temperature", "more than 0"]),
        ({"calibration": {"set_coverage": 0.9}}, ["set_coverage", "`set_threshold`"]),
        ({"calibration": {"confidence": [[0.5, 0.4], [0.6, 0.4]]}}, ["calibration.confidence", "than those before"]),
        ({"lineage__files": {"fusion.onnx": "abc"}}, ["lineage.files", "fusion.onnx"]),
    ],
)
def test_what_model_yaml_may_not_say(folder: Path, changes: Mapping[str, Any], words: list[str]) -> None:
    edit(folder, **changes)
    refused(folder, "model.yaml", *words)


def places(folder: Path) -> list[str]:
    """Where in model.yaml something is wrong, without the line."""
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    assert all(str(part).startswith(f"{folder / 'model.yaml'}, ") for part in caught.value.parts)
    return [str(part).partition(": ")[0].rpartition(", ")[2] for part in caught.value.parts]


def test_everything_that_is_wrong_with_a_model_yaml_is_said_at_once(folder: Path) -> None:
    edit(folder, window__step=3, streams__imu__channels=3, streams__lidar__context_ms=100, labels=["yes"],
         calibration={"set_coverage": 0.9, "bias": {"yse": 1}, "answer_above": {"on": 0.5}, "subsets": {
             "lidar+imu": {"confidence": [[0.5, 0.4], [0.6, 0.4]]}, "sonar": {}, "imu": {"tempature": 1}}})  # fmt: skip
    assert places(folder) == [
        "window.step", "streams.imu.channels", "streams.lidar.context_ms", "labels", "calibration.bias.yse",
        "calibration.answer_above.on", "calibration.subsets.lidar+imu", "calibration.subsets.lidar+imu.confidence",
        "calibration.subsets.sonar", "calibration.subsets.imu.tempature",
    ]  # fmt: skip
    edit(folder, window={"hop_ms": 100, "steps": 3}, streams__imu__encodr="x", streams__imu__encoder=None,
         calibration={"set_coverage": 0.9, "bias": {"yse": 1}}, labels=["yes", "no"])  # fmt: skip
    assert places(folder) == [
        "streams.imu.encodr", "streams.lidar.context_ms", "calibration.set_coverage", "calibration.bias.yse"
    ]  # fmt: skip


@pytest.mark.parametrize(("key", "written"), [
    ("fusion", "fuson"), ("labels", "lables"), ("streams", "steams"), ("window", "windows"), ("calibration", "calib"),
    ("lineage", "linage"), ("name", "nmae"),
])  # fmt: skip
def test_of_a_key_that_is_misspelt_nothing_else_follows(folder: Path, key: str, written: str) -> None:
    edit(folder, streams__imu__rule__rate_hz=33, streams__imu__rule__rat_hz=33, calibration={
        "set_coverage": 0.9, "set_mass": 0.9, "bias": {"yes": 1}, "subsets": {"imu+lidar": {"bias": {"no": 1}}}
    })  # fmt: skip
    edit(folder, **{written: yaml.safe_load((folder / "model.yaml").read_text())[key], key: None})
    assert set(places(folder)) == {written} | ({"streams.imu.rule.rat_hz"} if key != "streams" else set())


def test_a_whole_model_is_held_against_the_streams_that_are_written(folder: Path) -> None:
    edit(folder, fusion=None, streams__imu__token=None, streams__imu__encoder=None, streams__lidar={"payload": "swep"},
         model={"file": "m.onnx", "inputs": {"a": {"stream": "imu", "layout": "bhwc"},
                                             "b": {"stream": "lidar", "layout": "btc"}}})  # fmt: skip
    assert "model.inputs" not in places(folder)
    assert "model.inputs.a.layout" in places(folder)


@pytest.mark.parametrize("text", ["", "[1]", "5"])
def test_a_model_yaml_that_is_no_mapping_is_said_to_be_none(folder: Path, text: str) -> None:
    (folder / "model.yaml").write_text(text)
    with pytest.raises(BundleError, match=r"expected a mapping with the keys `name`[^\n]*$"):
        load_bundle(folder)


# -- graphs against streams --------------------------------------------------------------------------------------------


def test_a_wrong_input_name(tmp_path: Path) -> None:
    wrong = model([node("ReduceMean", ["input"], ["m"], keepdims=0), node("Reshape", ["m", "s"], ["token"])],
                  {"input": ("f4", [10, 6])}, {"token": [1]}, {"s": [1]})  # fmt: skip
    refused(
        write_bundle(tmp_path, {"imu": GRID}, encoders={"imu": wrong}), "encoder.imu.onnx", "no input `x`", "`input`"
    )


def test_an_input_that_nothing_feeds(tmp_path: Path) -> None:
    wrong = model([node("Add", ["x", "gain"], ["y"]), node("ReduceMean", ["y"], ["m"], keepdims=0),
                   node("Reshape", ["m", "s"], ["token"])],
                  {"x": ("f4", [10, 6]), "gain": ("f4", [1])}, {"token": [1]}, {"s": [1]})  # fmt: skip
    refused(write_bundle(tmp_path, {"imu": GRID}, encoders={"imu": wrong}), "the input `gain`", "`valid`")


def test_a_wrong_input_shape(tmp_path: Path) -> None:
    wrong = {"imu": mean_encoder({"payload": "signal", "channels": 3})}
    refused(write_bundle(tmp_path, {"imu": GRID}, encoders=wrong), "`x` is f4 [10, 3]", "needs f4 [10, 6]")


def test_a_wrong_type(tmp_path: Path) -> None:
    refused(
        write_bundle(tmp_path, {"lidar": SWEEP}, encoders={"lidar": mean_encoder(FRAME)}), "u1 [h, w, 3]", "f4 [*, 5]"
    )


def test_a_fixed_dimension_where_the_stream_varies(tmp_path: Path) -> None:
    wrong = model([node("ReduceMean", ["x"], ["m"], keepdims=0), node("Reshape", ["m", "s"], ["token"])],
                  {"x": ("f4", [1440, 5])}, {"token": [1]}, {"s": [1]})  # fmt: skip
    refused(write_bundle(tmp_path, {"lidar": SWEEP}, encoders={"lidar": wrong}), "f4 [1440, 5]", "dynamic")


def test_a_wrong_token(tmp_path: Path) -> None:
    refused(write_bundle(tmp_path, {"imu": GRID | {"token": 8}}), "`token` is f4 [1]", "needs f4 [8]")


def test_a_fusion_for_other_streams(tmp_path: Path) -> None:
    other = linear_fusion({"imu": GRID, "sonar": SWEEP}, {"imu": 1.0, "sonar": 1.0})
    refused(write_bundle(tmp_path, STREAMS, fusion=other), "fusion.onnx", "no input `lidar`", "`sonar`", "`mask.lidar`")
    refused(write_bundle(tmp_path, {"imu": GRID}, fusion=other), "the input `sonar`", "`mask.imu`")


def test_a_fusion_for_other_labels(tmp_path: Path) -> None:
    refused(write_bundle(tmp_path, STREAMS, labels=["a", "b", "c"]), "`logits` is f4 [batch, 2]", "needs f4 [?, 3]")


def test_a_state_without_its_output(tmp_path: Path) -> None:
    wrong = model([node("ReduceMean", ["x"], ["m"], keepdims=0), node("Add", ["m", "state"], ["token"])],
                  {"x": ("f4", [10, 6]), "state": ("f4", [1])}, {"token": [1]})  # fmt: skip
    refused(write_bundle(tmp_path, {"imu": GRID}, encoders={"imu": wrong}), "no output `state_out`")


def test_a_state_for_messages(tmp_path: Path) -> None:
    wrong = model([node("ReduceMean", ["x"], ["m"], keepdims=0), node("Add", ["m", "state"], ["token"])],
                  {"x": ("f4", ["n", 5]), "state": ("f4", [1])}, {"token": [1]})  # fmt: skip
    refused(write_bundle(tmp_path, {"lidar": SWEEP}, encoders={"lidar": wrong}), "`state`", "resampled stream")


@pytest.mark.parametrize("opset", [10, 24])
def test_an_opset_out_of_range(tmp_path: Path, opset: int) -> None:
    nodes = [node("ReduceMean", ["x"], ["m"], keepdims=0), node("Reshape", ["m", "s"], ["token"])]
    wrong = model(nodes, {"x": ("f4", [10, 6])}, {"token": [1]}, {"s": [1]}, opset)
    refused(write_bundle(tmp_path, {"imu": GRID}, encoders={"imu": wrong}), f"opset {opset}", "11 to 23")


def test_operators_of_somebodys_own(tmp_path: Path) -> None:
    import onnx

    nodes = [onnx.helper.make_node("Magic", ["x"], ["token"], domain="com.example")]
    graph = onnx.helper.make_graph(nodes, "g", [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [10, 6])],
                                   [onnx.helper.make_tensor_value_info("token", TensorProto.FLOAT, [1])])  # fmt: skip
    sets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.example", 1)]
    data = onnx.helper.make_model(graph, opset_imports=sets).SerializeToString()
    refused(write_bundle(tmp_path, {"imu": GRID}, encoders={"imu": data}), "`com.example`", "standard operators")


@pytest.mark.parametrize("data", [b"\x00", b"not a model at all", b"\xff" * 40])
def test_a_file_that_is_no_model(tmp_path: Path, data: bytes) -> None:
    refused(write_bundle(tmp_path, {"imu": GRID}, encoders={"imu": data}), "encoder.imu.onnx", "no ONNX model")


@pytest.mark.parametrize("where", ["initializer", "constant", "subgraph"])
def test_weights_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    import onnx

    (tmp_path / "weights.bin").write_bytes(bytes(4))  # there, in the current folder, where onnxruntime looks
    monkeypatch.chdir(tmp_path)
    weight = onnx.numpy_helper.from_array(np.zeros(1, np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    plain = model([node("ReduceMean", ["x"], ["m"], keepdims=0), node("Add", ["m", "w"], ["token"])],
                  {"x": ("f4", [10, 6])}, {"token": [1]}, {"w": np.zeros(1, np.float32)})  # fmt: skip
    made = onnx.load_from_string(plain)
    del made.graph.initializer[:]
    if where == "initializer":
        made.graph.initializer.append(weight)
    elif where == "constant":
        made.graph.node.insert(0, node("Constant", [], ["w"], value=weight))
    else:
        out = onnx.helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
        branch = onnx.helper.make_graph([node("Identity", ["w"], ["out"])], "branch", [], [out], [weight])
        made.graph.node[1].input[1] = "chosen"
        yes = onnx.numpy_helper.from_array(np.array(True), "yes")
        made.graph.initializer.append(yes)
        made.graph.node.insert(0, node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch))
    folder = write_bundle(tmp_path / "b", {"imu": GRID}, encoders={"imu": made.SerializeToString()})
    refused(folder, "`w`", "another file, `weights.bin`", "external_data=False")


def test_an_input_of_another_type_says_what_can_be_changed(tmp_path: Path) -> None:
    nodes = [node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), node("ReduceMean", ["f"], ["m"], keepdims=0),
             node("Reshape", ["m", "s"], ["token"])]  # fmt: skip
    wrong = model(nodes, {"x": ("u1", [10, 6])}, {"token": [1]}, {"s": [1]})
    refused(write_bundle(tmp_path, {"imu": GRID}, encoders={"imu": wrong}), "always f4: convert it inside the model")


def test_a_model_that_is_broken_inside(tmp_path: Path) -> None:
    wrong = model([node("Relu", ["nothing"], ["token"])], {"x": ("f4", [10, 6])}, {"token": [1]})
    refused(write_bundle(tmp_path, {"imu": GRID}, encoders={"imu": wrong}), "cannot load this model")


# -- Python encoders ---------------------------------------------------------------------------------------------------

EXPERT = b"""
import numpy as np

class Count:
    token = 1
    def __init__(self, stream, settings):
        self.n = settings.get("start", 0)
    def reset(self):
        self.n = 0
    def encode(self, content, start_ns, end_ns):
        self.n += 1
        return np.array([self.n], np.float32)
    def skip(self):
        self.n += 1

class Half:
    def encode(self, content, start_ns, end_ns):
        return None
"""


def python_bundle(folder: Path, target: str = "expert:Count", files: Mapping[str, bytes] | None = None) -> Path:
    given = {"expert.py": EXPERT} if files is None else files
    return write_bundle(folder, {"imu": GRID | {"encoder": f"python: {target}"}}, files=given)


def test_foreign_code_is_not_run_unasked(tmp_path: Path) -> None:
    trap = b"raise SystemExit('ran')"
    refused(python_bundle(tmp_path, files={"expert.py": trap}), "Python code", "`imu`", "--allow-code", str(SHIPPED))


def test_a_copy_without_models_says_how_to_run_the_checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.foreign.SHIPPED", tmp_path / "models")
    refused(python_bundle(tmp_path), "Type in the checkout: pip install -e .")


def test_a_link_in_the_shipped_folder_is_not_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "models"
    shipped.mkdir()
    monkeypatch.setattr("pipeline.foreign.SHIPPED", shipped)
    python_bundle(tmp_path / "foreign")
    (shipped / "linked").symlink_to(tmp_path / "foreign")
    refused(shipped / "linked", "Python code")
    assert load_bundle(python_bundle(shipped / "own")).experts["imu"].token == 1


def test_allowed_code_is_the_bytes_that_were_checked(tmp_path: Path) -> None:
    assert load_bundle(python_bundle(tmp_path), allow_code=True).experts["imu"].__name__ == "Count"
    (tmp_path / "expert.py").write_bytes(EXPERT + b"\n")
    refused(tmp_path, "expert.py", "SHA-256", allow_code=True)


@pytest.mark.parametrize(
    ("target", "files", "words"),
    [
        ("expert", None, ["`python: module:Class`"]),
        ("expert:Nobody", None, ["no expert", "reset, encode and skip"]),
        ("expert:Half", None, ["lacks `reset`, `skip`"]),
        ("no_such_module_anywhere:Class", {}, ["cannot be imported", "ModuleNotFoundError"]),
        ("expert:Count", {"expert.py": b"1/0"}, ["cannot be imported", "ZeroDivisionError"]),
    ],
)
def test_code_that_is_no_expert(
    tmp_path: Path, target: str, files: Mapping[str, bytes] | None, words: list[str]
) -> None:
    refused(python_bundle(tmp_path, target, files), *words, allow_code=True)


def test_own_code_needs_a_digest(tmp_path: Path) -> None:
    python_bundle(tmp_path, files={})
    (tmp_path / "expert.py").write_bytes(EXPERT)
    refused(tmp_path, "expert.py", "not listed", allow_code=True)


# -- bundle against rig ------------------------------------------------------------------------------------------------


def test_the_aligners_spec(folder: Path) -> None:
    bundle = load_bundle(folder)
    limits = {"idle_ns": {"front": 2_000_000_000}, "max_buffer": {"imu": 10}, "max_future_ns": 100_000_000}
    spec = bundle.align_spec({"lidar": "front"}, 250_000_000, unordered=frozenset({"front"}), **limits)
    assert (spec.hop_ns, spec.max_delay_ns, spec.max_future_ns) == (100_000_000, 250_000_000, 100_000_000)
    imu, front = spec.streams
    assert (imu.name, imu.payload, imu.channels, imu.idle_ns, imu.ordered) == ("imu", "imu", 6, 1_000_000_000, True)
    assert (front.name, front.payload, front.rule, front.idle_ns) == (
        "front",
        "sweep",
        Latest(250_000_000),
        2_000_000_000,
    )
    assert not front.ordered
    assert imu.max_buffer == 10
    assert Aligner(spec).next_step == 1


def test_a_rig_may_leave_a_stream_out(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert [s.name for s in bundle.align_spec({"lidar": None}).streams] == ["imu"]
    assert bundle.rig_streams({"lidar": None}, {"imu": "imu"}) == {"imu": "imu"}


@pytest.mark.parametrize(
    ("streams", "available", "words"),
    [
        ({"lidr": "front"}, None, ["`lidr`", "bundle `tiny`", "Did you mean `lidar`?"]),
        ({}, {"imu": "imu"}, ["needs a stream `lidar` (sweep)", "the rig has no `lidar`", "`imu`"]),
        ({}, {"imu": "imu", "ldiar": "sweep"}, ["it has `imu`, `ldiar`. Did you mean `ldiar`? Map it"]),
        ({"lidar": "imu"}, None, ["`imu`, `lidar`", "same stream `imu`"]),
        ({"lidar": "cam"}, {"imu": "imu", "cam": "frame"}, ["needs sweep", "`cam` carries frame"]),
        ({"lidar": None, "imu": None}, None, ["leaves out every stream"]),
    ],
)
def test_a_rig_that_does_not_fit(folder: Path, streams: Any, available: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_bundle(folder).align_spec(streams, available=available)
    for word in words:
        assert word in str(caught.value)
