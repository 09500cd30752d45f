"""From labelled sessions to a bundle that runs live."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pipeline import cli, errors
from pipeline.align import AlignSpec, Manifest
from pipeline.bundle import load_bundle
from pipeline.errors import BundleError, ConfigError, RecordingError, SensoriumError
from pipeline.faultbench import live_steps
from pipeline.faults import Delay, Loss
from pipeline.inference import FuseOptions
from pipeline.messages import Header, Message, SignalLayout, signal_dtype
from pipeline.modelfile import Calibration
from pipeline.recording import MANIFEST_TOPIC, Label, RecordingReader, RecordingWriter, SessionInfo
from pipeline.replay import replay_predictions
from pipeline.strict import Document
from tests import scenes
from tests.conftest import ROOT
from tests.tiny_bundle import FRAME, GRID, write_bundle

torch = pytest.importorskip("torch", reason="the package torch is not installed (extra `learn`)")
pytest.importorskip("onnxscript", reason="the package onnxscript is not installed (extra `learn`)")

from pipeline import learn  # noqa: E402
from pipeline.learn.begin import begin_from, check_beginning, not_taken  # noqa: E402
from pipeline.learn.card import card  # noqa: E402
from pipeline.learn.config import stream_entry, streams_of  # noqa: E402
from pipeline.learn.dataset import Dataset, Labelled, label_sessions, split  # noqa: E402
from pipeline.learn.export import _default_cache, _overrides, prove  # noqa: E402
from pipeline.learn.loop import Checkpoints, Silent  # noqa: E402
from pipeline.learn.model import build_encoders, build_model, cut_windows, say, windows  # noqa: E402
from pipeline.learn.preparing import PreparedSession, Recipe, prepare  # noqa: E402
from pipeline.learn.robust import disagreement, distort  # noqa: E402
from pipeline.learn.train import prepare_all, some_of  # noqa: E402
from pipeline.workers import workers  # noqa: E402

SECONDS, SESSIONS, NS = 6.0, 8, 1_000_000_000
SMALL: dict[str, Any] = {
    "camera": {"token": 12, "encoder": {"size": 16, "widths": [8, 12]}},
    "imu": {"token": 12, "encoder": {"widths": [8, 12]}},
    "microphone": {
        "token": 12,
        "rule": {"kind": "resample", "rate_hz": scenes.RATE_HZ, "max_gap_ms": 20, "method": "band_limited"},
        "encoder": {"widths": [8, 12], "mels": 16},
    },
}
STREAMS, PAIR = ("camera", "imu", "microphone"), ("camera", "imu")
EPOCHS = 14
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of labelled recordings, in which every event happens once each."""
    folder = tmp_path_factory.mktemp("sessions")
    for seed in range(SESSIONS):
        scenes.record(folder / f"s{seed}.mcap", seed, SECONDS, streams=STREAMS)
    return folder


def configured(folder: Path, streams: tuple[str, ...] | dict[str, Any] = ("imu",), **more: Any) -> learn.Config:
    """A small training of the sessions in ``folder``: of these streams as usual here, or as stated."""
    said = {
        "name": "small",
        "sessions": ["*.mcap"],
        "streams": streams if isinstance(streams, dict) else {name: SMALL[name] for name in streams},
        "window": {"hop_ms": 100, "steps": 5},
        "strategy": "late",
        "fusion": {"width": 16, "queries": 2},
        "train": {"epochs": 2, "batch_windows": 64, "learning_rate": 0.01},
    } | more
    return learn.check_config(Document(yaml.safe_dump(said), folder / "train.yaml"))


def recorded(config: learn.Config) -> list[learn.Recorded]:
    return [learn.Recorded(path) for path in config.sessions(config.file.sessions, "sessions")]


def same_weights(one: learn.Trained, other: learn.Trained) -> bool:
    pairs = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def prepared(session: learn.Session, recipe: Recipe, cache: Path) -> PreparedSession:
    [found] = prepare([session], recipe, cache)
    return found


def recipe_of(config: learn.Config) -> Recipe:
    streams = streams_of(config, recorded(config)[0].layouts())
    settings = {name: entry.encoder for name, entry in config.file.streams.items()}
    return Recipe(streams, build_encoders(streams, settings), config.names(), settings,
                  round(config.file.window.hop_ms * 1e6), 5)  # fmt: skip


# -- the whole way -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(sessions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, trained by the command."""
    folder = tmp_path_factory.mktemp("trained")
    said = {
        "train": {"epochs": EPOCHS, "batch_windows": 32, "learning_rate": 0.01, "ema": 0.9},
        "robust": {"noise": 0, "shift": 0, "freeze": 0, "blank": 0, "outage": 0},
        "ignore_labels": ["tone"],  # which nobody hears without a microphone
    }
    file = folder / "train.yaml"
    file.write_text(configured(sessions, PAIR, sessions=[f"{sessions}/*.mcap"], **said).document.text)
    torch.set_num_threads(1)
    result = CliRunner().invoke(cli.app, ["train", str(file), "-o", str(folder / "bundle"), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["epoch"] for row in rows[:-1]] == list(range(1, EPOCHS + 1))
    assert len(rows[-1]["scores"]) == 3
    assert sorted(p.name for p in folder.iterdir()) == [".prepared", "bundle", "train.yaml"]
    return folder / "bundle"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_trained_bundle_replays_far_better_than_chance(trained: Path, sessions: Path) -> None:
    bundle = load_bundle(trained)
    assert set(bundle.lineage.recordings) == {f"s{seed}.mcap" for seed in range(SESSIONS)}
    tested = (trained / "README.md").read_text().partition("Tested on: ")[2].partition(".\n")[0].split(", ")
    right = total = 0
    for name in tested:
        for prediction in replay_predictions(sessions / name, bundle, FuseOptions(contributions=False)):
            if prediction.truth != "tone":
                right += prediction.label == prediction.truth
                total += 1
    assert total >= 90
    assert right > 0.8 * total  # calm alone is about half


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_card_says_what_it_is_made_of(trained: Path) -> None:
    text = (trained / "README.md").read_text()
    for part in ("## Data", "## Training", "## How good", "## Calibration", "## Checks", "## Limits", "seed 0"):
        assert part in text
    assert str(trained.parent) not in text
    heads = text.partition("| streams | accuracy")[2].partition(" |\n")[0].split(" | ")[1:]
    assert len(heads) == 7
    assert all(f"{head.removesuffix(' %').lower()}:" in text.lower() for head in heads)
    assert "through the live path are the windows that were learnt from" in text
    assert load_bundle(trained).calibration.set_coverage == 0.9
    assert set(load_bundle(trained).calibration.subsets) == {"camera", "imu", "camera+imu"}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_bundle_knows_what_each_of_its_sessions_was_for(trained: Path) -> None:
    lineage = load_bundle(trained).lineage
    text = (trained / "README.md").read_text()
    for part, names in (("Tested on", lineage.tested), ("Held out", lineage.held_out)):
        assert names
        assert text.partition(f"{part}: ")[2].partition(".\n")[0].partition(". ")[0].split(", ") == [*names]
    assert set(lineage.tested) | set(lineage.held_out) < set(lineage.recordings)
    assert (trained / "train.yaml").read_text() == (trained.parent / "train.yaml").read_text()  # nothing replaced it


def test_what_the_command_line_replaced_is_said_in_the_bundles_training_file(sessions: Path) -> None:
    config = configured(sessions, teachers={"count": 2, "epochs": 9})
    assert _overrides(config) == ""
    text = _overrides(learn.with_overrides(config, seed=5, epochs=3)) + config.document.text
    assert text.startswith("# Trained with this from the command line instead:\n")
    head = [line for line in text.splitlines() if line.startswith("# ")]
    assert yaml.safe_load("\n".join(line[2:] for line in head[1:])) == {
        "train": {"epochs": 3}, "teachers": {"epochs": None}, "seed": 5,
    }  # fmt: skip
    assert yaml.safe_load(text) == yaml.safe_load(config.document.text)


class Noting(Silent):
    """Keeps what a user should know."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_label_that_is_nearly_another_is_said(
    sessions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, told = configured(sessions), learn.Recorded.labels

    def slipped(self: learn.Recorded, known: Any) -> Any:
        labels = told(self, known)
        renamed = [msgspec.structs.replace(one, label="clam") for one in labels if one.label == "calm"]
        return [*renamed[:1], *labels[1:]] if self.name == first and labels[0].label == "calm" else labels

    found = recorded(config)
    first = next(session.name for session in found if session.labels(None)[0].label == "calm")
    watch = Noting()
    prepare_all(config, found, tmp_path, watch)
    assert watch.notes == []
    monkeypatch.setattr(learn.Recorded, "labels", slipped)
    assert "clam" in prepare_all(config, found, tmp_path, watch).labels
    assert len(watch.notes) == 1
    assert watch.notes[0].startswith(f"the label `clam`, which only {first} has, is nearly `calm`, and becomes a class")


def test_a_session_whose_labels_no_window_meets_is_said(tmp_path: Path) -> None:
    labels = [Label(0, NS, "a"), Label(NS, 2 * NS, "b")]
    scenes.record(tmp_path / "one.mcap", 1, 2.0, labels, streams=["imu"])
    scenes.record(tmp_path / "two.mcap", 2, 2.0, [Label(NS // 100, NS // 50, "a")], streams=["imu"])
    scenes.record(tmp_path / "three.mcap", 3, 2.0, [Label(0, 2 * NS, "c")], streams=["imu"])  # as was asked for
    watch, config = Noting(), configured(tmp_path, ignore_labels=["c"])
    prepare_all(config, recorded(config), tmp_path / "cache", watch)
    assert [note.partition(", so")[0] for note in watch.notes] == [
        "no window of two.mcap ends within one of its labels"
    ]


def test_windows_that_no_session_fills_are_said(sessions: Path) -> None:
    steps = round(SECONDS * 10)  # of 100 ms
    for given, said in ((steps - 3, False), (steps + 3, True)):
        watch = Noting()
        config = configured(sessions, train={"epochs": 1}, window={"hop_ms": 100, "steps": given})
        learn.train(config, recorded(config), device="cpu", watch=watch)
        assert any("none is ever full" in note for note in watch.notes) is said, watch.notes


def test_sessions_that_must_be_read_again_need_a_folder_that_outlives_the_training(
    sessions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.learn.dataset.MEMORY_BYTES", 0)
    config = configured(sessions, train={"epochs": 1})
    with pytest.raises(RecordingError, match=r"read again after the training: name a folder as `cache`"):
        learn.train(config, recorded(config), device="cpu")
    made = learn.train(config, recorded(config), device="cpu", cache=tmp_path)
    assert made.split.held_out[0].read("imu", 0, 1).size


def test_labels_that_are_not_held_out_or_tested_on_are_said(sessions: Path, tmp_path: Path) -> None:
    watch = Noting()
    for i in range(3):
        shutil.copy(sessions / f"s{i}.mcap", tmp_path / f"s{i}.mcap")
    (tmp_path / "s0.labels.csv").write_text("start_s,end_s,label\n1,2,calm\n2,3,shake\n")
    (tmp_path / "s1.labels.csv").write_text("start_s,end_s,label\n1,2,calm\n")
    (tmp_path / "s2.labels.csv").write_text("start_s,end_s,label\n1,2,calm\n2,3,shake\n")
    parts = {"held_out": ["s1.mcap"], "test": ["s2.mcap"]}
    config = configured(tmp_path, split=parts, train={"epochs": 1})
    found = learn.train(config, recorded(config), device="cpu", watch=watch)
    assert found.split.lacking(found.labels) == {"held out": ["shake"]}
    assert [note for note in watch.notes if "no session held out has the label `shake`" in note]
    text = card(found, Calibration(set_coverage=0.9), [], None, {}, "")
    assert "No session held out has `shake`. For these nothing is fitted" in text
    assert "No session tested on has" not in text
    for name in ("s0", "s2"):
        (tmp_path / f"{name}.labels.csv").write_text("start_s,end_s,label\n1,2,calm\n2,3,shake\n3,4,tone\n")
    learn.train(config, recorded(config), device="cpu", watch=watch)
    assert "has the labels `shake`, `tone`: nothing is known of them there" in watch.notes[-1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_bundle_exists_already(trained: Path) -> None:
    file = trained.parent / "train.yaml"
    result = CliRunner().invoke(cli.app, ["train", str(file), "-o", str(trained)])
    assert isinstance(result.exception, ConfigError)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_another_training_begins_from_it(trained: Path, sessions: Path, tmp_path: Path) -> None:
    config = configured(sessions, PAIR, init={"bundle": str(trained), "freeze": True})
    made = learn.train(config, recorded(config), device="cpu")
    assert made.begun_from["encoder of imu"].endswith("frozen")
    with np.load(trained / "weights.npz") as weights:
        state = made.model.state_dict()
        own = [key for key in weights.files if key.startswith(("encoders.imu.", "encoders.camera."))]
        assert len(own) > 10
        assert all(np.array_equal(weights[key], state[key].numpy()) for key in own)


@pytest.fixture
def earlier(sessions: Path, tmp_path: Path) -> Path:
    """A bundle with weights, of a training that nobody waited for."""
    config = configured(sessions, {"imu": {"token": 1, "encoder": {"widths": [8, 12]}}})
    encoder = recipe_of(config).encoders["imu"]
    file = io.BytesIO()
    np.savez(file, **{f"encoders.imu.{key}": value.numpy() for key, value in encoder.state_dict().items()})
    files = {"weights.npz": file.getvalue(), "train.yaml": config.document.text.encode()}
    return write_bundle(tmp_path / "earlier", {"imu": GRID}, files=files)


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        ({"token": 7}, "`token` is 1 there and 7 here; `encoder.widths` is [8, 12] there and [48, 64, 96] here. "),
        (
            {"token": 1, "encoder": {"widths": [8, 12], "statistics": False}},
            "`encoder.statistics` is true there and false here. ",
        ),
    ],
)
def test_an_encoder_of_another_shape_is_said_before_anything_is_prepared(
    sessions: Path, tmp_path: Path, earlier: Path, stream: dict[str, Any], said: str
) -> None:
    config = configured(sessions, {"imu": stream}, init={"bundle": str(earlier)})
    with pytest.raises(BundleError) as caught:
        prepare_all(config, recorded(config), tmp_path / "cache")
    begins = f"{earlier}: its encoder of `imu` is another one than the training file describes: {said}Training begins"
    assert str(caught.value)[: len(begins)] == begins
    assert "give it these settings, or call the stream otherwise (`recorded_as: imu`)" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_nothing_to_begin_from_is_said_before_anything_is_prepared(
    sessions: Path, tmp_path: Path, earlier: Path
) -> None:
    config = configured(sessions, ("camera",), init={"bundle": str(earlier)})
    with pytest.raises(BundleError, match="no stream in common to begin from"):
        prepare_all(config, recorded(config), tmp_path / "cache")
    bare = write_bundle(tmp_path / "bare", {"imu": GRID})
    config = configured(sessions, init={"bundle": str(bare)})
    with pytest.raises(BundleError, match=r"bare has no weights.npz"):
        prepare_all(config, recorded(config), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


TWO = {"imu": {"token": 1, "encoder": {"widths": [8, 12]}}, "camera": SMALL["camera"] | {"token": 1}}


def with_fusion(folder: Path, sessions: Path, order: tuple[str, ...]) -> Path:
    """As ``earlier``, of two streams in this order, and with the weights of its fusion."""
    config = configured(sessions, TWO, labels=["calm", "shake"], ignore_labels=["tone"])
    encoders = recipe_of(config).encoders
    model = build_model({name: encoders[name] for name in order}, "late", 5, 2, config.file.fusion)
    file = io.BytesIO()
    np.savez(file, **{key: value.numpy() for key, value in model.state_dict().items()})
    files = {"weights.npz": file.getvalue(), "train.yaml": config.document.text.encode()}
    streams = {name: {"imu": GRID, "camera": FRAME}[name] for name in order}
    return write_bundle(folder, streams, files=files, steps=5, labels=["calm", "shake"], strategy="late")


@pytest.fixture
def whole_earlier(sessions: Path, tmp_path: Path) -> Path:
    return with_fusion(tmp_path / "whole", sessions, PAIR)


def said_not_taken(sessions: Path, bundle: Path, labels: tuple[str, ...] = ("calm", "shake"), **more: Any) -> str:
    config = configured(sessions, more.pop("streams", TWO), **more)
    said = not_taken(config, load_bundle(bundle), recipe_of(config).encoders, labels)
    return said.removeprefix(f"what {bundle} does not give begins at random: ")


def test_what_begins_at_random_is_said_with_the_reason(sessions: Path, whole_earlier: Path) -> None:
    assert said_not_taken(sessions, whole_earlier) == ""
    # What changes no shape is passed over.
    assert said_not_taken(sessions, whole_earlier, fusion={"width": 16, "queries": 2, "dropout": 0.3}) == ""
    found = said_not_taken(sessions, whole_earlier, strategy="hybrid", fusion={"width": 8, "dropout": 0.3})
    assert found == (
        "the fusion, for `strategy` is late there and hybrid here; `fusion.width` is 16 there and 8 here; "
        "`fusion.queries` is 2 there and 4 here"
    )
    found = said_not_taken(sessions, whole_earlier, ("shake", "calm"))
    assert found == 'the fusion, for `labels` is ["calm", "shake"] there and ["shake", "calm"] here'
    found = said_not_taken(sessions, whole_earlier, streams={**TWO, "microphone": SMALL["microphone"]})
    assert found.startswith("the encoder of `microphone`; the fusion, for `streams` is [")


def test_weights_of_the_fusion_never_go_to_another_stream(sessions: Path, tmp_path: Path) -> None:
    """They are kept one stream behind the other, and have the same shape in any order."""
    taken = []
    for order in (PAIR, PAIR[::-1]):
        bundle = with_fusion(tmp_path / order[0], sessions, order)
        config = configured(sessions, TWO, init={"bundle": str(bundle)})
        model = build_model(recipe_of(config).encoders, "late", 5, 2, config.file.fusion)
        assert config.file.init is not None
        taken.append("fusion" in begin_from(model, config.file.init, ("calm", "shake")))
    assert taken == [True, False]
    found = said_not_taken(sessions, bundle)
    assert found == 'the fusion, for `streams` is ["imu", "camera"] there and ["camera", "imu"] here'


def test_that_the_fusion_begins_at_random_is_said_before_anything_is_prepared(
    sessions: Path, tmp_path: Path, whole_earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watching(Silent):
        notes: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.notes.append(text)

    class Reached(Exception):
        pass

    def preparing(*arguments: Any) -> Any:
        raise Reached

    monkeypatch.setattr(sys.modules["pipeline.learn.train"], "prepare", preparing)
    others = ["approach", "flash", "tone"]
    for strategy, said in (("late", 0), ("early", 1)):
        config = configured(sessions, TWO, init={"bundle": str(whole_earlier)}, strategy=strategy, ignore_labels=others)
        with pytest.raises(Reached):
            prepare_all(config, recorded(config), tmp_path / "cache", Watching())
        assert len(Watching.notes) == said
    assert "the fusion, for `strategy` is late there and early here" in Watching.notes[0]


def test_settings_that_change_no_shape_are_no_reason(sessions: Path, tmp_path: Path, earlier: Path) -> None:
    stream = {"token": 7, "context_ms": 200, "encoder": {"widths": [8, 12], "jitter": 0.1, "dropout": 0.2}}
    config = configured(sessions, {"imu": stream}, init={"bundle": str(earlier)})
    with pytest.raises(BundleError, match=r"describes: `token` is 1 there and 7 here\. Training begins"):
        prepare_all(config, recorded(config), tmp_path / "cache")


def test_what_is_frozen_is_named(sessions: Path) -> None:
    with pytest.raises(ConfigError, match="--init-from"):
        learn.beginning_from(configured(sessions), None, True)


# -- the same again ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_equal_seeds_give_equal_bundles(sessions: Path, tmp_path: Path) -> None:
    config = configured(sessions, strategy="early", train={"epochs": 1, "batch_windows": 64}, robust={"agree": 1})
    for name in ("one", "two"):
        learn.export(
            learn.train(config, recorded(config), cache=tmp_path / name / "cache", device="cpu"), tmp_path / name / "b"
        )
    files = {p.name: p.read_bytes() for p in (tmp_path / "one" / "b").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "two" / "b").iterdir()}
    assert len(files) == 7
    folder = str(Path(learn.__file__).parent).encode()
    assert not any(folder in data or b"torch" in data for name, data in files.items() if name.endswith(".onnx"))


class Interrupted(Exception):
    """The power went off."""


class Breaks(Silent):
    """Interrupts a training in the middle of an epoch."""

    def __init__(self, phase: str, after: int) -> None:
        self._phase, self._after, self._now = phase, after, ""

    def begin(self, phase: str, total: int) -> None:
        self._now = phase

    def advance(self, done: int = 1) -> None:
        if self._now == self._phase:
            self._after -= done
            if self._after <= 0:
                raise Interrupted


@pytest.mark.parametrize(("phase", "after"), [("training", 250), ("pretraining", 150)])
def test_a_resumed_training_gives_the_same(sessions: Path, tmp_path: Path, phase: str, after: int) -> None:
    train = {"epochs": 3, "batch_windows": 64, "step_loss": 0.5}
    robust = {"balance": 0.3, "agree": 0.5}
    config = configured(sessions, ("imu", "camera"), train=train, pretrain={"epochs": 2}, robust=robust)
    cache = tmp_path / "cache"
    whole = learn.train(config, recorded(config), cache=cache, device="cpu")
    with pytest.raises(Interrupted):
        learn.train(config, recorded(config), cache=cache, work=tmp_path, device="cpu", watch=Breaks(phase, after))
    resumed = learn.train(config, recorded(config), cache=cache, work=tmp_path, device="cpu", resume=True)
    assert resumed.curves == whole.curves
    assert [row["phase"] for row in whole.curves] == ["pretraining"] * 2 + ["training"] * 3
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("phase", ["teacher 1, pretraining", "teacher 2", "training"])
def test_a_resumed_training_with_teachers_gives_the_same(sessions: Path, tmp_path: Path, phase: str) -> None:
    train = {"epochs": 2, "batch_windows": 64}
    config = configured(
        sessions, ("imu", "camera"), train=train, robust={"agree": 0.5}, pretrain={"epochs": 1}, teachers={"count": 2}
    )
    cache = tmp_path / "cache"
    whole = learn.train(config, recorded(config), cache=cache, device="cpu")
    with pytest.raises(Interrupted):
        learn.train(config, recorded(config), cache=cache, work=tmp_path, device="cpu", watch=Breaks(phase, 50))
    assert (tmp_path / "teacher-1" / "checkpoint.pt").is_file() == (phase != "teacher 1, pretraining")
    resumed = learn.train(config, recorded(config), cache=cache, work=tmp_path, device="cpu", resume=True)
    assert resumed.curves == whole.curves
    phases = [row["phase"] for row in whole.curves]
    teachers = [f"teacher {n}{what}" for n in (1, 2) for what in (", pretraining", "")]
    assert phases == ["pretraining", *teachers, "training", "training"]
    assert same_weights(whole, resumed)


def test_a_training_begun_anew_knows_nothing_of_teachers_that_were_there(sessions: Path, tmp_path: Path) -> None:
    train, cache = {"epochs": 2, "batch_windows": 64}, tmp_path / "cache"
    first = configured(sessions, train=train, teachers={"count": 3})
    with pytest.raises(Interrupted):
        learn.train(first, recorded(first), cache=cache, work=tmp_path, device="cpu", watch=Breaks("training", 150))
    other = learn.with_overrides(first, seed=5)
    with pytest.raises(Interrupted):
        learn.train(other, recorded(other), cache=cache, work=tmp_path, device="cpu", watch=Breaks("teacher 2", 50))
    resumed = learn.train(other, recorded(other), cache=cache, work=tmp_path, device="cpu", resume=True)
    assert same_weights(resumed, learn.train(other, recorded(other), cache=cache, device="cpu"))


def test_fewer_teachers_are_the_first_of_more(sessions: Path, tmp_path: Path) -> None:
    """So that those of an interrupted training may serve another count of them."""
    train, cache = {"epochs": 1, "batch_windows": 64}, tmp_path / "cache"
    two = configured(sessions, train=train, teachers={"count": 2})
    with pytest.raises(Interrupted):
        learn.train(two, recorded(two), cache=cache, work=tmp_path, device="cpu", watch=Breaks("teacher 2", 50))
    three = configured(sessions, train=train, teachers={"count": 3})
    resumed = learn.train(three, recorded(three), cache=cache, work=tmp_path, device="cpu", resume=True)
    assert same_weights(resumed, learn.train(three, recorded(three), cache=cache, device="cpu"))


def test_epochs_of_the_command_line_are_those_of_teachers_too(sessions: Path) -> None:
    config = configured(sessions, teachers={"count": 1, "epochs": 9})
    file = learn.with_overrides(config, epochs=4).file
    assert file.teachers is not None
    assert (file.train.epochs, file.teachers.epochs) == (4, None)  # half of them
    assert learn.with_overrides(config, seed=1).file.teachers == config.file.teachers


def test_a_model_learns_from_teachers_and_no_trace_of_them_is_left(sessions: Path, tmp_path: Path) -> None:
    train = {"epochs": 32, "batch_windows": 32, "chunk_steps": 12, "learning_rate": 0.01, "ema": 0.9}
    found = []
    for teachers in (None, {"count": 2, "blend": 0.5}):
        config = configured(sessions, ("imu",), train=train, teachers=teachers)
        found.append(learn.train(config, recorded(config), cache=tmp_path / "cache", device="cpu"))
    plain, taught = found
    assert taught.model.state_dict().keys() == plain.model.state_dict().keys()
    assert not same_weights(plain, taught)
    assert [row["phase"] for row in taught.curves[:17]] == ["teacher 1"] * 16 + ["teacher 2"]  # half as long
    said = learn.say_all(taught, taught.split.train)
    assert said is not None
    usual = np.bincount(said.truth).max() / len(said.truth)
    assert (said.logits[frozenset(["imu"])].argmax(1) == said.truth).mean() > usual + 0.1


def test_a_loss_on_single_steps_teaches_the_encoders_and_leaves_no_trace(sessions: Path, tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 3.0):
        config = configured(sessions, train={"epochs": 1, "batch_windows": 64, "step_loss": weight})
        found.append(learn.train(config, recorded(config), cache=tmp_path / "cache", device="cpu"))
    assert found[0].model.state_dict().keys() == found[1].model.state_dict().keys()
    assert not same_weights(*found)
    assert found[1].curves[0]["loss"] > found[0].curves[0]["loss"]


def test_pretraining_takes_sessions_that_nobody_labelled(sessions: Path, tmp_path: Path) -> None:
    config = configured(sessions, PAIR, train={"epochs": 1}, pretrain={"epochs": 1})
    more = scenes.record(tmp_path / "more.mcap", 77, 4.0, [], streams=PAIR)
    plain = learn.train(config, recorded(config), device="cpu")
    richer = learn.train(config, recorded(config), device="cpu", unlabelled=[learn.Recorded(more)])
    assert [row["phase"] for row in richer.curves] == ["pretraining", "training"]
    assert not same_weights(plain, richer)
    assert len(richer.split.groups) == SESSIONS


def test_two_variations_are_drawn_together(sessions: Path, tmp_path: Path) -> None:
    """What is said of one chunk in two variations differs less where that was learnt, too."""
    cache, torn = tmp_path / "cache", []
    for agree in (0.0, 2.0):
        train = {"epochs": 8, "batch_windows": 32, "learning_rate": 0.01, "ema": 0.9}
        config = configured(sessions, ("imu",), train=train, robust={"agree": agree})
        found = learn.train(config, recorded(config), cache=cache, device="cpu")
        model, generator = found.model.eval(), torch.Generator().manual_seed(0)
        batches = found.dataset(found.split.train).batches(256)
        apart = []
        for batch, _ in batches:
            both = batch.twice()
            encoders = {name: model.encoder(name) for name in both.prepared}
            varied = distort(encoders, both.prepared, both.present, config.file.robust, generator)
            with torch.no_grad():
                tokens, masks, truth = cut_windows(model, both._replace(prepared=varied))
                apart.append(float(disagreement(model.fusion(tokens, masks), torch.ones(len(truth) // 2))))
        torn.append(np.mean(apart))
        assert found.curves[-1]["accuracy"] > 0.4  # and something was learnt
    assert 0 < torn[1] < torn[0] / 2, torn


def test_another_trainings_state_is_not_gone_on_from(sessions: Path, tmp_path: Path) -> None:
    config = configured(sessions)
    with pytest.raises(Interrupted):
        learn.train(config, recorded(config), work=tmp_path, device="cpu", watch=Breaks("training", 150))
    other = learn.with_overrides(config, seed=5)
    with pytest.raises(ConfigError, match="of another training"):
        learn.train(other, recorded(other), work=tmp_path, device="cpu", resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="cannot be read"):
        learn.train(config, recorded(config), work=tmp_path, device="cpu", resume=True)


def test_torchs_random_numbers_are_left_alone(sessions: Path) -> None:
    before = torch.get_rng_state()
    config = configured(sessions, train={"epochs": 1})
    learn.train(config, recorded(config), device="cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()


# -- windows -----------------------------------------------------------------------------------------------------------


def live_session(path: Path, spec: AlignSpec) -> list[Manifest]:
    """A recording of a session as it was lived: late, lost and silent, with the windows that its aligner made."""
    items = []
    for stream in STREAMS:
        own = sorted(scenes.messages(3, SECONDS, [stream]), key=lambda m: m.header.bound_ns)
        stages = {"camera": Loss(share=0.3, run=4), "imu": Delay(delay_ms=150, start_s=2, end_s=4)}
        stage = stages[stream].stage(stream, Random(1)) if stream in stages else None
        for message in own:
            at = message.header.bound_ns
            live = stage is not None and stages[stream].active(at)
            items += stage(message, at) if stage is not None and live else [(message, at)]
    items = [
        (m, at) for m, at in items if not (m.header.stream == "microphone" and 2e9 <= m.header.t_capture_ns < 3.5e9)
    ]
    items.sort(key=lambda item: item[1])
    steps = list(live_steps(items, spec))
    written: list[tuple[int, Message | Manifest]] = [(at, m) for m, at in items]
    written += [(step.manifest.emitted_ns, step.manifest) for step in steps]
    with RecordingWriter(path, SessionInfo(session="lived"), compression="none") as writer:
        for label in scenes.labels(3, SECONDS):
            writer.write_label(label, max(label.start_ns, 0))
        for at, what in sorted(written, key=lambda pair: pair[0]):
            if isinstance(what, Manifest):
                writer.write_json(MANIFEST_TOPIC, msgspec.json.encode(what), at)
            else:
                writer.write(what, at)
    return [step.manifest for step in steps]


@pytest.fixture(scope="module")
def lived(sessions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Manifest]]:
    path = tmp_path_factory.mktemp("lived") / "lived.mcap"
    spec = recipe_of(configured(sessions, STREAMS)).spec()
    streams = tuple(msgspec.structs.replace(s, idle_ns=300_000_000) for s in spec.streams)
    return path, live_session(path, msgspec.structs.replace(spec, streams=streams, max_delay_ns=80_000_000))


def test_windows_in_training_are_those_that_were_lived(
    sessions: Path, lived: tuple[Path, list[Manifest]], tmp_path: Path
) -> None:
    path, manifests = lived
    recipe = recipe_of(configured(sessions, STREAMS))
    found = prepared(learn.Recorded(path), recipe, tmp_path)
    assert found.digests == [m.digest for m in manifests]
    verdicts = {m.streams[name].verdict for m in manifests for name in STREAMS}
    assert verdicts >= {"ok", "late", "missing"}
    for name in STREAMS:
        there = [m.streams[name].verdict in ("ok", "partial") for m in manifests]
        assert found.present[name].tolist() == there
    again = prepared(learn.Recorded(path), msgspec.structs.replace(recipe, mode="event_time"), tmp_path)
    assert again.digests != found.digests
    assert again.present["imu"].sum() > found.present["imu"].sum()  # what was late is there by event time
    other = recipe_of(configured(sessions, STREAMS, window={"hop_ms": 50, "steps": 5}))  # windows that nobody lived
    assert len(prepared(learn.Recorded(path), other, tmp_path)) > 1.9 * len(manifests)


def test_a_stream_that_was_recorded_beside_the_windows(
    sessions: Path, lived: tuple[Path, list[Manifest]], tmp_path: Path
) -> None:
    """Its model then knew nothing of it, so nobody knows when it was late: by event time all of it is there."""
    beside = tmp_path / "beside.mcap"
    with RecordingReader(lived[0]) as reader, RecordingWriter(beside, SessionInfo(session="b")) as writer:
        for message, at in reader.messages(beats=True):
            writer.write(message, at)
        for manifest in lived[1]:
            streams = {name: stated for name, stated in manifest.streams.items() if name != "imu"}
            writer.write_json(
                MANIFEST_TOPIC, msgspec.json.encode(msgspec.structs.replace(manifest, streams=streams)), 0
            )
    found = prepared(learn.Recorded(beside), recipe_of(configured(sessions, PAIR)), tmp_path)
    late = sum(manifest.streams["imu"].verdict == "late" for manifest in lived[1])
    assert late >= 10
    assert (~found.present["imu"]).sum() <= 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_bundle_is_proven_on_what_was_lived(
    trained: Path, sessions: Path, lived: tuple[Path, list[Manifest]], tmp_path: Path
) -> None:
    """What export checks: the live path and the trained model agree on masked, late and partial steps, too."""
    shutil.copy(lived[0], tmp_path / "lived.mcap")
    for seed in (1, 2):
        shutil.copy(sessions / f"s{seed}.mcap", tmp_path)
    config = configured(
        tmp_path, PAIR, init={"bundle": str(trained), "freeze": True}, ignore_labels=["tone"],
        train={"epochs": 1, "learning_rate": 1e-9}, split={"held_out": ["lived.mcap"], "test": 0},
    )  # fmt: skip
    made = learn.train(config, recorded(config), device="cpu")
    bundle = load_bundle(trained)
    assert "of lived.mcap" in prove(made, bundle)
    flipped = msgspec.structs.replace(made.split.held_out[0].session, digests=["x"] * 1000)
    wrong = [msgspec.structs.replace(made.split.held_out[0], session=flipped)]
    with pytest.raises(BundleError, match="not the one that was learnt from"):
        prove(made._replace(split=made.split._replace(held_out=wrong)), bundle)


def test_a_restarted_aligner_leaves_masked_steps(
    sessions: Path, lived: tuple[Path, list[Manifest]], tmp_path: Path
) -> None:
    path, manifests = lived
    gone = {10, 11, 12}
    cut = tmp_path / "cut.mcap"
    with (
        RecordingReader(path) as reader,
        RecordingWriter(cut, SessionInfo(session="cut"), compression="none") as writer,
    ):
        for message, at in reader.messages(beats=True):
            writer.write(message, at)
        for data, at, _ in reader.json(MANIFEST_TOPIC):
            if msgspec.json.decode(data, type=Manifest).step not in gone:
                writer.write_json(MANIFEST_TOPIC, data, at)
    found = prepared(learn.Recorded(cut), recipe_of(configured(sessions, STREAMS)), tmp_path)
    assert len(found) == len(manifests)
    masked = np.flatnonzero(found.step < 0)
    assert masked.tolist() == [9, 10, 11]
    assert not any(found.present[name][masked].any() for name in STREAMS)


def test_chunks_hold_every_window_once() -> None:
    data = Dataset([made_session(n, [0, 1]) for n in (3, 17, 40)], steps=4, chunk=10, labels=("a", "b"))
    expected = [(i, end) for i, session in enumerate(data.sessions) for end in range(len(session))]
    for batches in (data.shuffled(16, np.random.default_rng(3)), (batch for batch, _ in data.batches(16))):
        seen = []
        for batch in batches:
            cut = windows(batch.prepared["x"], 4)[..., 0].reshape(len(batch.places), -1, 4)
            for b, (i, start) in enumerate(batch.places):
                for w in np.flatnonzero(batch.truth[b, 3:].numpy() >= 0).tolist():
                    end = start + 3 + w
                    seen.append((i, end))
                    rows = [row + 1.0 if row >= 0 else 0.0 for row in range(end - 3, end + 1)]
                    assert cut[b, w].tolist() == rows
                    assert batch.truth[b, 3 + w] == data.sessions[i].truth[end]
        assert sorted(seen) == expected
    assert abs(sum(1 for _ in data.shuffled(16, np.random.default_rng(0))) - data.number_of_batches(16)) <= 3


def made_session(n: int, truths: list[int], name: str = "", **attributes: str) -> Labelled:
    """Rows 1 to n of one number each, all present, with the labels in turn."""
    rows = np.arange(1, n + 1, dtype=np.float32)[:, None]
    steps = np.arange(1, n + 1)
    session = PreparedSession(
        name or f"n{n}", {}, attributes, {"x": _Rows(rows)}, {"x": np.ones(n, bool)}, steps, steps * 100_000_000,  # type: ignore[dict-item]
        [""] * n, {}, {},
    )  # fmt: skip
    return Labelled(session, np.resize(np.array(truths), n))


class _Rows:
    def __init__(self, rows: np.ndarray[Any, Any]) -> None:
        self._rows, self.shape = rows, rows.shape[1:]

    def read(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        return self._rows[start:stop]


def test_prepared_steps_are_kept_and_streamed(sessions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(sessions)
    held = learn.train(config, recorded(config), cache=tmp_path / "cache", device="cpu")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npz")}
    assert len(written) == 2 * SESSIONS
    monkeypatch.setattr("pipeline.learn.dataset.MEMORY_BYTES", 0)
    streamed = learn.train(config, recorded(config), cache=tmp_path / "cache", device="cpu")
    assert not streamed.split.train[0].held
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npz")} == written
    assert same_weights(held, streamed)
    assert recipe_of(config).digest() != recipe_of(configured(sessions, streams={"imu": {"context_ms": 100}})).digest()


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many processes were begun, each time that some were; any recording is worth them."""
    numbers = []

    def counted(number: int) -> Any:
        numbers.append(number)
        return workers(number)

    monkeypatch.setattr("pipeline.learn.preparing.workers", counted)
    monkeypatch.setattr("pipeline.learn.preparing.WORTH_BYTES", 1)
    return numbers


def files_of(folder: Path) -> dict[Path, bytes]:
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_several_processes_prepare_what_one_does(sessions: Path, tmp_path: Path, begun: list[int]) -> None:
    """On however many threads, and what lies there is not prepared again."""
    config = configured(sessions, STREAMS)
    for jobs, threads in ((1, 2), (2, 1), (2, 1)):
        torch.set_num_threads(threads)
        ready = prepare_all(config, recorded(config), tmp_path / str(jobs), jobs=jobs)
        assert [s.session.name for s in ready.sessions] == [f"s{seed}.mcap" for seed in range(SESSIONS)]
    assert begun == [2]
    assert len(files_of(tmp_path / "1")) == 5 * SESSIONS
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_a_recording_under_two_names_is_prepared_once(sessions: Path, tmp_path: Path, begun: list[int]) -> None:
    for name in ("one", "other", "third"):
        (tmp_path / f"{name}.mcap").write_bytes((sessions / "s0.mcap").read_bytes())
    config = configured(tmp_path)
    ready = prepare_all(config, recorded(config), tmp_path / "cache", jobs=2)
    assert begun == [2]
    assert len({rows.file for s in ready.sessions for rows in s.session.rows.values()}) == 1


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_cannot_be_prepared_is_named_and_leaves_nothing(tmp_path: Path, begun: list[int], jobs: int) -> None:
    labels = [Label(0, 50_000_000, "a")]
    for seed, lasts_s in enumerate((0.05, 2.0, 2.0)):
        scenes.record(tmp_path / f"s{seed}.mcap", seed, lasts_s, labels, streams=["imu"])
    config = configured(tmp_path)
    with pytest.raises(RecordingError, match=r"s0.mcap is empty: it holds no whole step of 100 ms"):
        prepare_all(config, recorded(config), tmp_path / "cache", jobs=jobs)
    assert begun == [2] * (jobs - 1)
    assert not list((tmp_path / "cache").glob("part-*"))


def test_what_is_said_of_a_window_does_not_depend_on_its_chunk(sessions: Path, tmp_path: Path) -> None:
    config = configured(sessions, ("imu", "camera"), train={"epochs": 1, "batch_windows": 64, "chunk_steps": 6})
    made = learn.train(config, recorded(config), cache=tmp_path / "cache", device="cpu")
    everything = frozenset({"imu", "camera"})
    looked_at = made.dataset(made.split.held_out)
    assert looked_at.chunk > 6
    found = [say(made.model, Dataset(made.split.held_out, 5, chunk, made.labels), [everything], torch.device("cpu"))
             for chunk in (looked_at.chunk, 6)]  # fmt: skip
    assert np.array_equal(found[0].truth, found[1].truth)
    assert np.allclose(found[0].logits[everything], found[1].logits[everything], atol=1e-5)


def test_sessions_that_an_epoch_is_judged_on_are_some_of_all() -> None:
    many = [made_session(20, [0], f"s{i}") for i in range(100)]
    assert some_of(many, 2000) == some_of(many, 10_000) == many
    assert some_of(many, 999) == many[::2]
    assert some_of(many, 10) == many[::6]
    assert some_of(many[:30], 10) == many[:30]
    assert some_of([], 10) == []


# -- sessions of a program's own ---------------------------------------------------------------------------------------


def test_sessions_in_memory_of_one_step_each() -> None:
    def clip(i: int) -> learn.Made:
        label = "abc"[i % 3]
        shift = Random(i).random()
        messages = list(scenes.messages(i, 1.0, ["imu"]))
        for message in messages:
            message.data["gyro"][:, 2] += {"a": 0.0, "b": 2.0, "c": -2.0}[label] + shift
        end = messages[-1].header.t_end_ns + 10_000_000
        return learn.Made(f"clip{i}", messages, [Label(0, end, label)], {"person": str(i % 4)})

    said = {
        "name": "clips", "streams": {"imu": {"token": 8, "encoder": {"widths": [8]}}},
        "window": {"hop_ms": 900, "steps": 1}, "split": {"by": "person", "held_out": ["1"], "test": ["2"]},
        "train": {"epochs": 15, "batch_windows": 6, "learning_rate": 0.01, "ema": 0.9},
    }  # fmt: skip
    config = learn.check_config(Document(yaml.safe_dump(said), "clips.yaml"))
    made = learn.train(config, [clip(i) for i in range(36)], device="cpu")
    assert {s.session.attributes["person"] for s in made.split.train} == {"0", "3"}
    assert [len(s) for s in made.split.test] == [1] * 9
    found = learn.say_all(made, made.split.test)
    assert found is not None
    assert np.mean(found.logits[frozenset({"imu"})].argmax(1) == found.truth) > 0.7


# -- what cannot be learnt from ----------------------------------------------------------------------------------------


def test_splits_keep_groups_whole_and_labels_even() -> None:
    many = [made_session(20, [i % 2], f"s{i}", person=f"p{i // 2}") for i in range(20)]
    entry = configured(Path("x"), split={"by": "person", "held_out": 0.2, "test": 0.2}).file.split
    parts = split(many, entry, 2)
    people = [{s.session.attributes["person"] for s in part} for part in parts[:3]]
    assert [len(p) for p in people] == [6, 2, 2]
    assert not people[0] & people[1]
    assert not people[0] & people[2]
    assert all({int(t) for s in part for t in s.truth} == {0, 1} for part in parts[:3])
    assert split(many, entry, 2).groups == parts.groups
    with pytest.raises(ConfigError, match="no attribute `day`"):
        split(many, msgspec.structs.replace(entry, by="day"), 2)
    with pytest.raises(ConfigError, match="`p77` is no value of `person`"):
        split(many, msgspec.structs.replace(entry, test=("p77",)), 2)
    with pytest.raises(ConfigError, match="cannot be split"):
        split(many[:2], entry, 2)


@pytest.mark.parametrize(
    ("sessions", "stated", "said", "works"),
    [
        (1, {}, "1 session cannot be split in 1 held out, 1 tested on and at least 1 to learn from. Record more, or "
         "set under `split` `held_out: 0` and `test: 0`,", {"held_out": 0, "test": 0}),
        (1, {"test": 0}, "1 session cannot be split in 1 held out, 0 tested on and at least 1 to learn from. Record "
         "more, or set under `split` `held_out: 0`,", {"held_out": 0, "test": 0}),
        (2, {}, "2 sessions cannot be split in 1 held out, 1 tested on and .* `test: 0`,", {"test": 0}),
        (3, {"held_out": 0.9}, "3 sessions cannot be split in 3 held out, 1 tested on .* `held_out: 0`,",
         {"held_out": 0}),
        (2, {"held_out": ["s0", "s1"], "test": 0}, "2 sessions cannot be split in 2 held out, 0 tested .* Name fewer",
         {"held_out": ["s0"], "test": 0}),
        (4, {"by": "person"}, "2 groups by `person` cannot .* Record more, split by something finer, or .* `test: 0`,",
         {"by": "person", "test": 0}),
        (1, {"by": "person"}, "1 group by `person` cannot", {"by": "person", "test": 0, "held_out": 0}),
    ],
)  # fmt: skip
def test_too_few_sessions_are_said_before_anything_is_prepared(
    tmp_path: Path, sessions: int, stated: dict[str, Any], said: str, works: dict[str, Any]
) -> None:
    made = [made_session(20, [i % 2], f"s{i}", person=f"p{i // 2}") for i in range(sessions)]
    known = [learn.Made(s.session.name, [], [], s.session.attributes) for s in made]
    with pytest.raises(ConfigError, match=said):
        learn.train(configured(tmp_path, split=stated), known, device="cpu")
    parts = split(made, configured(tmp_path, split=works).file.split, 2)
    assert parts.train


def test_prepared_sessions_lie_elsewhere_where_they_cannot_lie_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / ".prepared").write_text("no folder")
    notes: list[str] = []

    class Noting(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    with ExitStack() as stack:
        cache = _default_cache(tmp_path, stack, Noting())
        assert cache.is_dir()
        assert tmp_path not in cache.parents
    assert not cache.exists()
    assert len(notes) == 1
    assert notes[0].startswith(
        f"{tmp_path}/.prepared cannot be written (Not a directory), so that prepared sessions are"
    )
    (tmp_path / ".prepared").unlink()
    with ExitStack() as stack:
        assert _default_cache(tmp_path, stack, Noting()) == tmp_path / ".prepared"
    assert len(notes) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="a file's greatest size can be set on POSIX alone")
def test_a_checkpoint_that_finds_no_room_says_why(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as found:
            Checkpoints(tmp_path / "work", "x").save({"weights": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.value.filename == str(tmp_path / "work" / "checkpoint.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([], "has no labels"),
        ([Label(0, 3 * NS, "a"), Label(2 * NS, 4 * NS, "b")], r"from 2.000 s to 4.000 s overlaps `a`"),
        ([Label(0, NS, "a"), Label(99 * NS, 100 * NS, "b")], r"from 99.000 s .* session's end"),
        ([Label(0, 6 * NS, "a")], "a model tells labels apart"),
    ],
)  # fmt: skip
def test_labels_that_nobody_can_learn(tmp_path: Path, labels: list[Label], said: str) -> None:
    scenes.record(tmp_path / "one.mcap", 1, 2.0, labels, streams=["imu"])
    config = configured(tmp_path)
    with pytest.raises(RecordingError, match=said) as caught:
        prepare_all(config, recorded(config), tmp_path / "cache")
    assert "one.mcap" in str(caught.value)


def test_streams_that_differ_between_sessions(tmp_path: Path) -> None:
    scenes.record(tmp_path / "a.mcap", 1, 3.0, streams=["imu", "camera"])
    scenes.record(tmp_path / "b.mcap", 2, 3.0, streams=["imu"])
    config = configured(tmp_path, ("imu", "camera"))
    with pytest.raises(RecordingError, match=r"b.mcap has no stream `camera`; it has `imu`"):
        prepare_all(config, recorded(config), tmp_path / "cache")
    config = configured(tmp_path, ("imu", "camera"), missing_streams="allow")
    ready = prepare_all(config, recorded(config), tmp_path / "cache")
    assert [int(s.session.present["camera"].any()) for s in ready.sessions] == [1, 0]
    config = configured(tmp_path, {"imu": {"recorded_as": "camera", "payload": "imu"}})
    with pytest.raises(RecordingError, match=r"a.mcap has frame on its stream `camera`, where `imu` is imu"):
        prepare_all(config, recorded(config), tmp_path / "cache")


def wind(name: str, channels: tuple[str, ...], seed: int) -> learn.Made:
    """A session of a signal, 20 Hz for 3 s."""
    values = np.random.default_rng(seed).normal(size=(60, 1, len(channels)))
    messages = []
    for seq in range(60):
        samples = np.zeros(1, signal_dtype(len(channels)))
        samples["value"], t = values[seq], seq * 50_000_000
        times = {"t_capture_ns": t, "t_end_ns": t, "bound_ns": t + 1, "t_receipt_ns": t}
        layout = SignalLayout(1, channels)
        messages.append(Message(Header(stream="wind", seq=seq, epoch=0, layout=layout, **times), samples))
    return learn.Made(name, messages, [Label(0, 1_500_000_000, "a"), Label(1_500_000_000, 3_000_000_000, "b")])


def test_channels_of_a_signal_are_the_same_in_all_sessions(tmp_path: Path) -> None:
    """By name and order; else the model would learn one for the other."""
    rule = {"kind": "resample", "rate_hz": 20, "max_gap_ms": 100}
    said = {"name": "n", "streams": {"wind": {"rule": rule}}, "split": {"held_out": 0, "test": 0}}
    config = learn.check_config(Document(yaml.safe_dump(said), tmp_path / "t.yaml"))
    ready = prepare_all(config, [wind("one", ("u", "v"), 1), wind("two", ("u", "v"), 2)], tmp_path / "cache")
    assert ready.recipe.streams["wind"].channel_names == ("u", "v")
    for other, words in ((("v", "u"), "calls its channel 1 `v`, where `u` is taken"), (("u",), "has 1 channel .`u`.")):
        with pytest.raises(RecordingError, match=rf"two: its stream `wind` {words}.*, as one has it. One model cannot"):
            prepare_all(config, [wind("one", ("u", "v"), 1), wind("two", other, 2)], tmp_path / "cache")
    said["streams"]["wind"]["channels"] = 3  # type: ignore[index]
    config = learn.check_config(Document(yaml.safe_dump(said), tmp_path / "t.yaml"))
    with pytest.raises(RecordingError, match="where 3 are taken, as the training file says"):
        prepare_all(config, [wind("one", ("u", "v"), 1)], tmp_path / "cache")


@pytest.mark.parametrize("recorded_file", [False, True])
def test_channels_of_a_signal_are_the_same_all_through_a_session(tmp_path: Path, recorded_file: bool) -> None:
    """What came after they had changed was masked without a word."""
    rule = {"kind": "resample", "rate_hz": 20, "max_gap_ms": 100}
    said = {"name": "n", "streams": {"wind": {"rule": rule}}, "split": {"held_out": 0, "test": 0}}
    config = learn.check_config(Document(yaml.safe_dump(said), tmp_path / "t.yaml"))
    parts = [[m for m, _ in wind("one", names, 1).messages()] for names in (("u", "v"), ("v", "u"))]
    messages = parts[0][:30] + parts[1][30:]
    labels = [Label(0, 1_500_000_000, "a"), Label(1_500_000_000, 3_000_000_000, "b")]
    session: learn.Session = learn.Made("one", messages, labels)
    if recorded_file:
        with RecordingWriter(tmp_path / "one", SessionInfo(session="one")) as writer:
            for label in labels:
                writer.write_label(label, 0)
            for message in messages:
                writer.write(message, message.header.t_end_ns)
        session = learn.Recorded(tmp_path / "one")
    with pytest.raises(
        RecordingError, match=r"one: at 1.500 s its stream `wind` calls its channel 1 `v`, where `u` is"
    ):
        prepare_all(config, [session], tmp_path / "cache")


def test_a_training_begins_from_an_encoder_of_the_same_channels(tmp_path: Path) -> None:
    rule = {"kind": "resample", "rate_hz": 20, "max_gap_ms": 100}
    said = {"name": "n", "streams": {"wind": {"rule": rule, "token": 1}}, "init": {"bundle": str(tmp_path / "earlier")}}
    config = learn.check_config(Document(yaml.safe_dump(said), tmp_path / "t.yaml"))
    streams = streams_of(config, {"wind": SignalLayout(1, ("u", "v"))})
    encoders = build_encoders(streams, {"wind": {}})
    file = io.BytesIO()
    np.savez(file, **{f"encoders.wind.{k}": value.numpy() for k, value in encoders["wind"].state_dict().items()})
    learnt = {"payload": "signal", "channels": 2, "channel_names": ["v", "u"], "rule": {**rule, "rate_hz": 100}}
    write_bundle(tmp_path / "earlier", {"wind": learnt}, files={"weights.npz": file.getvalue()})
    assert config.file.init is not None
    with pytest.raises(BundleError, match=r"its encoder of `wind` learnt from other channels: .* channel 1 `u`, where"):
        check_beginning(config, config.file.init, streams, encoders)


def test_a_model_states_the_channels_that_it_learnt_from(tmp_path: Path) -> None:
    rule = {"kind": "resample", "rate_hz": 20, "max_gap_ms": 100}
    said = {"name": "n", "streams": {"wind": {"rule": rule}}}
    config = learn.check_config(Document(yaml.safe_dump(said), tmp_path / "t.yaml"))
    entry = stream_entry(config, "wind", SignalLayout(1, ("u", "v")))
    assert (entry.channels, entry.channel_names) == (2, ("u", "v"))


def test_numbers_that_are_none_and_sessions_of_nothing(tmp_path: Path) -> None:
    messages = list(scenes.messages(1, 2.0, ["lidar"]))
    messages[7].data["x"][:] = math.nan
    for message in messages:
        message.data["intensity"][message.header.seq :: 7] = math.nan
    labels = [Label(0, 900_000_000, "a"), Label(900_000_000, 2_000_000_000, "b")]
    said = {"name": "n", "streams": {"lidar": {}}}
    config = learn.check_config(Document(yaml.safe_dump(said), tmp_path / "t.yaml"))
    ready = prepare_all(config, [learn.Made("broken", messages, labels)], tmp_path)
    assert ready.sessions[0].session.present["lidar"].all()  # returns that are none are no returns
    with pytest.raises(RecordingError, match="short is empty"):
        prepare_all(config, [learn.Made("short", messages[:1], labels)], tmp_path)


def test_an_encoder_that_gives_no_numbers_is_named_with_the_time(sessions: Path, tmp_path: Path) -> None:
    config = configured(sessions)
    recipe = recipe_of(config)
    encoder = recipe.encoders["imu"]
    sound = encoder.prepare

    def broken(x: Any, valid: Any = None) -> Any:
        return sound(x, valid) / (0.0 if x[0, 2] > 9.83 else 1.0)

    encoder.prepare = broken
    with pytest.raises(RecordingError, match=r"s0.mcap: the step of `imu` that ends at \d+\.\d+ s .* not finite"):
        prepared(recorded(config)[0], recipe, tmp_path)


def test_a_label_that_no_session_to_learn_from_has(sessions: Path) -> None:
    labels = ["approach", "calm", "flash", "shake", "tone", "dance"]
    config = configured(sessions, labels=labels)
    with pytest.raises(RecordingError, match="has the label `dance`"):
        learn.train(config, recorded(config), device="cpu")
    config = configured(sessions, labels=["calm", "shake"])
    with pytest.raises(RecordingError, match=r"s0.mcap: the label `approach` .* is none of"):
        prepare_all(config, recorded(config), sessions / "nowhere")


def test_label_sessions_by_the_end_of_the_window() -> None:
    session = made_session(10, [0]).session
    labels = [Label(0, 450_000_000, "a"), Label(500_000_000, 800_000_000, "b")]
    [found], names = label_sessions([(session, labels)], None)
    assert names == ("a", "b")
    assert found.truth.tolist() == [0, 0, 0, 0, -1, 1, 1, 1, -1, -1]


# -- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"strategy": "middle"}, "strategy"),
        ({"train": {"epoch": 3}}, "epochs"),
        ({"train": {"learning_rate": 0}}, "learning_rate"),
        ({"train": {"weight_decay": math.inf}}, r"train.weight_decay: found inf .* Write a finite number"),
        ({"robust": {"noise": 2}}, "noise"),
        ({"fusion": {"depth": 2}}, "depth"),
        ({"window": {"hop_s": 0.1, "steps": 5}}, "hop_ms: 100"),
        ({"streams": {}}, "at least one stream"),
        ({"labels": ["a", "b"], "ignore_labels": ["a"]}, "learnt and ignored"),
    ],
)
def test_a_training_file_is_read_strictly(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(Path("folder"), **change)


def test_everything_that_is_wrong_with_a_training_file_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        configured(
            Path("folder"),
            {"imu": {"payload": "imu", "encoder": {"sise": 3}}, "lidar": {"tokens": 3}},
            name="a b",
            strategy="middle",
            train={"epoch": 3, "ema": 1},
            labels=["a", "b"],
            ignore_labels=["a"],
        )
    assert {str(part).split(": ")[0].rpartition(", ")[2] for part in caught.value.parts} == {
        "streams.imu.encoder.sise", "streams.lidar.tokens", "name", "strategy", "train.epoch", "train.ema",
        "ignore_labels",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ({"imu": {"encoder": {"sise": 3}}}, "streams.imu.encoder"),
        ({"imo": {}}, r"no session has a stream `imo`.*Did you mean `imu`"),
        ({"imu": {"rule": {"kind": "resample", "rate_hz": 33, "max_gap_ms": 50}}}, "whole number of samples"),
        ({"emg": {"payload": "signal"}}, "needs its `rule`"),
        ({"camera": {"context_ms": 100}}, "context"),
    ],
)
def test_streams_that_do_not_fit(sessions: Path, tmp_path: Path, streams: dict[str, Any], said: str) -> None:
    config = configured(sessions, streams=streams)
    with pytest.raises(SensoriumError, match=said):
        prepare_all(config, recorded(config), tmp_path)


def test_no_session_no_device_and_no_bundle(sessions: Path, tmp_path: Path) -> None:
    config = configured(sessions, sessions=["no/*.mcap"])
    with pytest.raises(ConfigError, match=r"`no/\*.mcap` matches no file"):
        config.sessions(config.file.sessions, "sessions")
    with pytest.raises(ConfigError, match="--device nonsense"):
        learn.train(config, [], device="nonsense")
    with pytest.raises(RecordingError, match="no sessions to learn from"):
        learn.train(config, [], device="cpu")
    twice = [learn.Recorded(sessions / "s0.mcap")] * 2
    with pytest.raises(RecordingError, match=r"two sessions are named `s0.mcap`"):
        learn.train(config, twice, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_an_ended_training_leaves_what_it_can_be_gone_on_from_and_nothing_else(
    sessions: Path, tmp_path: Path, how: signal.Signals
) -> None:
    file, own = tmp_path / "train.yaml", tmp_path / "tmp"
    own.mkdir()
    said = configured(sessions, sessions=[f"{sessions}/*.mcap"], train={"epochs": 10_000, "batch_windows": 64})
    file.write_text(said.document.text)
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "train"]
    with subprocess.Popen(
        [*command, str(file), "-o", str(tmp_path / "b"), "--json"],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(own)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        try:
            assert running.stdout is not None
            assert json.loads(running.stdout.readline())["epoch"] == 1
            running.send_signal(how)
            _, stderr = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 128 + how
    assert "interrupted; go on with:\nsensorium train" in stderr
    assert "Traceback" not in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [".prepared", "b.unfinished", "tmp", "train.yaml"]
    assert not list(own.glob("sensorium*"))  # what else lies there is torch's
    assert not list((tmp_path / ".prepared").glob("part-*"))


def test_an_interrupted_training_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ended(*_: Any, **__: Any) -> None:
        raise ends

    ends: BaseException = KeyboardInterrupt()
    monkeypatch.setattr(learn, "train_bundle", ended)
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(configured(tmp_path).document.text)
    asked = ["train", "train.yaml", "-o", "b"]
    result = CliRunner().invoke(cli.app, asked)
    assert isinstance(result.exception, errors.Interrupted)
    assert result.exception.exit_code == 130
    assert str(result.exception).splitlines() == [
        "interrupted before an epoch was over; begin again with:", "sensorium train train.yaml -o b",
    ]  # fmt: skip
    assert "note:" not in result.stderr
    assert "nothing is to be gone on with" in CliRunner().invoke(cli.app, [*asked, "--resume"]).stderr
    Path("b.unfinished", "teacher-1").mkdir(parents=True)
    assert "note:" not in CliRunner().invoke(cli.app, asked).stderr  # nothing lies in it
    Path("b.unfinished", "teacher-1", "checkpoint.pt").touch()
    more = ["--seed", "0", "--epochs", "9", "--init-from", "an other", "--freeze", "--device", "cpu", "--jobs", "3"]
    again = str(CliRunner().invoke(cli.app, [*asked, *more]).exception).splitlines()
    assert again[0] == "interrupted; go on with:"
    assert shlex.split(again[1]) == ["sensorium", *asked, *more, "--resume"]  # or it would be another training
    assert "`--resume` would go on with it" in CliRunner().invoke(cli.app, asked).stderr
    assert "note:" not in CliRunner().invoke(cli.app, [*asked, "--resume"]).stderr
    ends = OSError(errno.ENOSPC, "No space left on device", "b")
    full = CliRunner().invoke(cli.app, asked)
    assert full.exception is ends
    assert full.stderr.endswith("go on with:\nsensorium train train.yaml -o b --resume\n")
    assert "when what is said below is mended" in full.stderr
    ends = BrokenPipeError()  # whoever read it has seen enough, of which nothing is said
    assert "epoch is kept; go on with:\nsensorium" in CliRunner().invoke(cli.app, asked).stderr
    Path("b").mkdir()
    assert "name another folder" in str(CliRunner().invoke(cli.app, asked).exception)


def test_a_training_that_is_whole_when_it_is_interrupted_is_not_to_be_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def ended(config: Any, out: Path, **_: Any) -> None:
        out.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(learn, "train_bundle", ended)
    (tmp_path / "train.yaml").write_text(configured(tmp_path).document.text)
    (tmp_path / "b.unfinished").mkdir()
    (tmp_path / "b.unfinished" / "checkpoint.pt").touch()
    result = CliRunner().invoke(cli.app, ["train", str(tmp_path / "train.yaml"), "-o", str(tmp_path / "b")])
    assert isinstance(result.exception, errors.Interrupted)
    assert str(result.exception) == f"interrupted; {tmp_path / 'b'} was whole already"


def test_a_training_that_nobody_tested_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = SimpleNamespace(curves=[{"phase": "training", "epoch": 1, "loss": 1.0}]), SimpleNamespace(scores=[])
    monkeypatch.setattr(learn, "train_bundle", lambda *_, **__: made)
    (tmp_path / "train.yaml").write_text(configured(tmp_path).document.text)
    said = CliRunner().invoke(cli.app, ["train", str(tmp_path / "train.yaml"), "-o", str(tmp_path / "b")]).stdout
    assert "\n\nno labelled window was kept to test on" in said
    assert "accuracy" not in said


def test_a_training_leaves_an_unfinished_state_where_the_command_looks_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def interrupted(*_: Any, **given: Any) -> None:
        seen.update(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pipeline.learn.export"], "train", interrupted)
    scenes.record(tmp_path / "s.mcap", 0, 1.0, streams=("imu",))
    with pytest.raises(KeyboardInterrupt):
        learn.train_bundle(configured(tmp_path), tmp_path / "b")
    assert seen["work"] == tmp_path / "b.unfinished"
    assert (seen["cache"] / ".gitignore").read_text() == "*\n"


def test_without_torch_it_says_what_to_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pipeline.commands.models.find_spec", lambda name: None)
    result = CliRunner().invoke(cli.app, ["train", "x.yaml", "-o", str(tmp_path / "b")])
    assert isinstance(result.exception, ConfigError)
    assert "pip install -e '.[learn]'" in str(result.exception)
