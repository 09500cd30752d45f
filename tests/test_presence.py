"""The presence bundle: what its fusion concludes from which evidence, and what the whole way from real clips to
predictions says about them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bundle import Bundle, load_bundle
from pipeline.experts.speech import INSTALL
from pipeline.importing import import_file
from pipeline.messages import FrameLayout, Message, array
from pipeline.prediction import Prediction
from pipeline.recording import RecordingReader, RecordingWriter
from pipeline.replay import replay_predictions
from pipeline.wire import decode_frame

Array = np.ndarray[Any, Any]
FOLDER = Path(__file__).resolve().parent.parent / "models" / "presence"
LABELS = ["nobody", "person_silent", "person_speaking", "voice_off_camera"]
VOICED = {"person_speaking", "voice_off_camera"}
CLIPS = ["bbaf2n", "id2_vcd_swwp2s", "lbax4n", "lrwp9a", "sbwe5n"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("silero_vad") is None, reason=f"the package silero-vad is not installed ({INSTALL})"
)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(FOLDER)


# -- the graph --------------------------------------------------------------------------------------------------------


class Fusion:
    """The bundle's graph on windows of constant evidence."""

    def __init__(self, bundle: Bundle) -> None:
        self._session = ort.InferenceSession(bundle.files[bundle.fusion], providers=["CPUExecutionProvider"])
        self.steps = bundle.window.steps

    def __call__(
        self, face: float | None = None, mouth: float = 0.0, voice: float | None = None, steps: int | None = None
    ) -> dict[str, float]:
        """Probability of each label when the newest ``steps`` steps (all) say the same; None: a missing sensor."""
        seen = np.arange(self.steps)[None] >= self.steps - (self.steps if steps is None else steps)
        feeds = {
            "camera": [face or 0.0, mouth, face or 0.0] * seen[..., None],
            "mask.camera": seen * (face is not None),
            "microphone": [voice or 0.0, 1.0] * seen[..., None],
            "mask.microphone": seen * (voice is not None),
        }
        logits = self._session.run(["logits"], {k: np.asarray(v, np.float32) for k, v in feeds.items()})[0][0]
        odds = np.exp(logits.astype(np.float64))
        return dict(zip(LABELS, (odds / odds.sum()).tolist(), strict=True))


@pytest.fixture(scope="module")
def fusion(bundle: Bundle) -> Fusion:
    return Fusion(bundle)


def best(scores: dict[str, float]) -> str:
    return max(scores, key=lambda label: scores[label])


def test_the_graph_is_what_its_source_makes(bundle: Bundle) -> None:
    spec = importlib.util.spec_from_file_location("make_presence", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert onnx.load_from_string(bundle.files[bundle.fusion]) == made.build()
    assert list(bundle.labels) == list(made.LABELS) == LABELS
    assert bundle.window.steps == made.STEPS


@pytest.mark.parametrize(
    ("face", "mouth", "voice", "label"),
    [
        (0.02, 0.0, 0.0, "nobody"),
        (0.99, 0.0, 0.0, "person_silent"),
        (0.99, 0.7, 0.0, "person_silent"),
        (0.99, 0.7, 1.0, "person_speaking"),
        (0.99, 0.05, 1.0, "voice_off_camera"),
        (0.02, 0.0, 1.0, "voice_off_camera"),
    ],
)
def test_clear_evidence_gives_a_clear_label(
    fusion: Fusion, face: float, mouth: float, voice: float, label: str
) -> None:
    scores = fusion(face, mouth, voice)
    assert best(scores) == label
    assert scores[label] > 0.85


probability = st.floats(0, 1, width=32)
maybe = st.one_of(st.none(), probability)


@given(face=maybe, mouth=probability, voice=maybe, steps=st.integers(0, 8))
def test_any_subset_gives_probabilities_that_nothing_makes_certain(
    fusion: Fusion, face: float | None, mouth: float, voice: float | None, steps: int
) -> None:
    scores = fusion(face, mouth, voice, steps)
    assert all(0.0005 < p < 0.99 for p in scores.values())


@given(face=maybe, mouth=probability, low=probability, high=probability)
def test_more_voice_never_makes_a_voice_less_probable(
    fusion: Fusion, face: float | None, mouth: float, low: float, high: float
) -> None:
    low, high = sorted([low, high])
    less, more = fusion(face, mouth, low), fusion(face, mouth, high)
    assert sum(more[label] for label in VOICED) >= sum(less[label] for label in VOICED) - 1e-5


@given(face=probability, mouth=probability)
def test_without_a_microphone_no_label_claims_a_voice(fusion: Fusion, face: float, mouth: float) -> None:
    scores = fusion(face, mouth, None)
    assert best(scores) not in VOICED
    assert scores["person_speaking"] + scores["voice_off_camera"] > 0.05  # nor does any score deny it


@given(voice=probability)
def test_without_a_camera_no_label_claims_a_person_in_view(fusion: Fusion, voice: float) -> None:
    scores = fusion(None, 0, voice)
    assert best(scores) in {"nobody", "voice_off_camera"}
    assert scores["person_silent"] + scores["person_speaking"] > 0.25


def test_with_nothing_at_all_nothing_is_said(fusion: Fusion) -> None:
    assert max(fusion().values()) < 0.5


@given(steps=st.integers(1, 7))
def test_a_longer_look_is_a_surer_one(fusion: Fusion, steps: int) -> None:
    short, longer = fusion(0.99, 0.8, 1.0, steps), fusion(0.99, 0.8, 1.0, steps + 1)
    assert longer["person_speaking"] > short["person_speaking"] > 0.5


# -- real clips, the whole way ----------------------------------------------------------------------------------------

Change = Callable[[int, Message], Message]


def with_pixels(message: Message, pixels: Array) -> Message:
    layout = FrameLayout("bgr8", pixels.shape[0], pixels.shape[1])
    return Message(msgspec.structs.replace(message.header, layout=layout), np.ascontiguousarray(pixels))


def as_it_is(_: int, message: Message) -> Message:
    return message


def frozen() -> Change:
    """Every frame becomes the first one."""
    first: list[Array] = []

    def change(index: int, message: Message) -> Message:
        if index == 0:
            first.append(decode_frame(message).copy())
        return with_pixels(message, first[0])

    return change


def black(_: int, message: Message) -> Message:
    return with_pixels(message, np.zeros_like(decode_frame(message)))


def silent(_: int, message: Message) -> Message:
    return Message(message.header, np.zeros_like(array(message)))


def rewrite(source: Path, out: Path, **changes: Change | None) -> Path:
    """The recording with each stream's messages changed; None leaves the stream out."""
    index = dict.fromkeys(changes, 0)
    with RecordingReader(source) as reader, RecordingWriter(out, reader.info) as writer:
        for message, arrival_ns in reader.messages():
            stream = message.header.stream
            change = changes.get(stream, as_it_is)
            if change is not None:
                writer.write(change(index.get(stream, 0), message), arrival_ns)
            if stream in index:
                index[stream] += 1
    return out


@pytest.fixture(scope="module")
def recordings(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The clips, imported once."""
    folder = tmp_path_factory.mktemp("clips")
    files = {name: shared_data / "av" / f"{name}.mpg" for name in CLIPS} | {"dog": shared_data / "av" / "dog.mp4"}
    for name, file in files.items():
        import_file(file, folder / f"{name}.mcap")
    return {name: folder / f"{name}.mcap" for name in files}


def predict(recording: Path, bundle: Bundle) -> list[Prediction]:
    return list(replay_predictions(recording, bundle))


@pytest.fixture(scope="module")
def predicted(recordings: dict[str, Path], bundle: Bundle) -> dict[str, list[Prediction]]:
    """What the bundle says about the clips as they are."""
    return {name: predict(recording, bundle) for name, recording in recordings.items()}


def loud(recording: Path, predictions: list[Prediction]) -> list[bool]:
    """For each prediction whether the newest step is a loud one: in a studio, a word. Its own measure of truth."""
    with RecordingReader(recording) as reader:
        blocks = [message for message, _ in reader.messages(["microphone"])]
    times = np.array([block.header.t_capture_ns for block in blocks])
    power = np.array([np.square(array(block).astype(np.float64)).mean() for block in blocks])
    ends = [p.window.end_ns for p in predictions]
    steps = np.array([np.sqrt(power[(times >= end - 100_000_000) & (times < end)].mean()) for end in ends])
    return (steps > 0.1 * steps.max()).tolist()


def middle(of: list[bool]) -> slice:
    """From 0.3 s into the sentence, when a window holds enough of it, to its end."""
    return slice(of.index(True) + 3, len(of) - of[::-1].index(True))


def share(predictions: list[Prediction], *labels: str) -> float:
    return sum(p.label in labels for p in predictions) / len(predictions)


@pytest.mark.parametrize("clip", CLIPS)
def test_a_person_who_talks_speaks(
    recordings: dict[str, Path], predicted: dict[str, list[Prediction]], clip: str
) -> None:
    predictions = predicted[clip]
    speech = middle(loud(recordings[clip], predictions))
    assert speech.stop - speech.start >= 8
    assert share(predictions[speech], "person_speaking") >= 0.85
    assert all(p.streams["camera"].contribution is not None for p in predictions)


def test_the_words_of_a_sentence_are_where_its_speaker_speaks(
    predicted: dict[str, list[Prediction]], shared_data: Path
) -> None:
    lines = [line.split() for line in (shared_data / "av" / "swwp2s.align").read_text().splitlines()]
    words = [(int(start) * 40_000, int(end) * 40_000) for start, end, word in lines if word != "sil"]  # 1/25000 s
    predictions = predicted["id2_vcd_swwp2s"]
    centre = [p.window.end_ns - 50_000_000 for p in predictions]
    inside = [p for p, t in zip(predictions, centre, strict=True) if words[0][0] + 300_000_000 < t < words[-1][1]]
    before = [p for p, t in zip(predictions, centre, strict=True) if t < words[0][0] - 50_000_000]
    after = [p for p, t in zip(predictions, centre, strict=True) if t > words[-1][1] + 200_000_000]
    assert share(inside, "person_speaking") >= 0.9
    assert share(before + after, "person_silent") >= 0.9


@pytest.mark.parametrize("clip", CLIPS)
def test_a_person_who_does_not_talk_is_silent(
    recordings: dict[str, Path], bundle: Bundle, tmp_path: Path, clip: str
) -> None:
    predictions = predict(rewrite(recordings[clip], tmp_path / "mute.mcap", microphone=silent), bundle)
    assert share(predictions, "person_silent") >= 0.95


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("picture", ["frozen", "black"])
def test_a_voice_over_a_still_or_absent_face_is_off_camera(
    recordings: dict[str, Path], bundle: Bundle, tmp_path: Path, clip: str, picture: str
) -> None:
    change = frozen() if picture == "frozen" else black
    predictions = predict(rewrite(recordings[clip], tmp_path / "other.mcap", camera=change), bundle)
    speech = middle(loud(recordings[clip], predictions))
    assert share(predictions[speech], "voice_off_camera") >= 0.9
    assert share(predictions, "person_speaking") == 0


def test_a_barking_dog_is_nobody_and_no_voice(predicted: dict[str, list[Prediction]]) -> None:
    predictions = predicted["dog"]
    assert len(predictions) >= 95
    assert share(predictions, *VOICED) <= 0.05
    assert share(predictions, "nobody") >= 0.95


def test_without_the_microphone_the_person_stays_and_the_voice_is_left_open(
    recordings: dict[str, Path], bundle: Bundle, tmp_path: Path
) -> None:
    predictions = predict(rewrite(recordings["lbax4n"], tmp_path / "deaf.mcap", microphone=None), bundle)
    assert share(predictions, "person_silent") == 1
    talking = predictions[10:20]
    assert all(p.streams["microphone"].verdict == "missing" for p in talking)
    assert all(p.streams["microphone"].contribution == 0 for p in talking)
    assert all("person_speaking" in p.set and (p.confidence or 1) < 0.8 for p in talking)


def test_without_the_camera_the_voice_stays_and_its_owner_is_left_open(
    recordings: dict[str, Path], bundle: Bundle, tmp_path: Path
) -> None:
    predictions = predict(rewrite(recordings["lbax4n"], tmp_path / "blind.mcap", camera=None), bundle)
    speech = middle(loud(recordings["lbax4n"], predictions))
    assert share(predictions[speech], "voice_off_camera") == 1
    assert all((p.scores["person_speaking"] or 0) > 0.15 for p in predictions[speech])


def test_the_same_recording_gives_the_same_predictions(
    recordings: dict[str, Path], bundle: Bundle, predicted: dict[str, list[Prediction]]
) -> None:
    again = predict(recordings["bbaf2n"], bundle)
    assert len(again) == len(predicted["bbaf2n"]) >= 28
    for one, other in zip(predicted["bbaf2n"], again, strict=True):
        assert msgspec.structs.replace(one, timing=other.timing) == other
