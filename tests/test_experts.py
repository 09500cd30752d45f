"""The face and speech experts, on what is drawn and synthesised here and, where they are present, on real clips."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BundleError, WireError
from pipeline.experts.face import Face
from pipeline.experts.motion import Box, mouth_motion
from pipeline.experts.speech import CHUNK, INSTALL, RATE_HZ, Speech, find_weights
from pipeline.experts.tracks import Tracks
from pipeline.messages import FrameLayout, Header, Message

Array = np.ndarray[Any, Any]
HOP_NS = 100_000_000
STEP = RATE_HZ // 10

needs_silero = pytest.mark.skipif(
    importlib.util.find_spec("silero_vad") is None, reason=f"the package silero-vad is not installed ({INSTALL})"
)


def frame(pixels: Array, step: int, layout: FrameLayout | None = None, data: bytes | None = None) -> Message:
    layout = layout or FrameLayout("bgr8", pixels.shape[0], pixels.shape[1])
    at = step * HOP_NS
    header = Header(
        stream="camera",
        seq=step,
        epoch=0,
        t_capture_ns=at,
        t_end_ns=at,
        bound_ns=at + 1,
        t_receipt_ns=at,
        layout=layout,
    )
    return Message(header, np.ascontiguousarray(pixels) if data is None else data)


def faces(expert: Face, frames: list[Array]) -> Array:
    """Tokens f4 [frames, 3]."""
    return np.stack([expert.encode((frame(x, k),), (k - 1) * HOP_NS, k * HOP_NS) for k, x in enumerate(frames, 1)])


def voices(expert: Speech, samples: Array, step: int = STEP) -> Array:
    """p_voice of every step of ``step`` samples."""
    span = step * 1_000_000_000 // RATE_HZ
    steps = [samples[at : at + step, None] for at in range(0, len(samples) - step + 1, step)]
    return np.array([expert.encode(x, k * span, (k + 1) * span)[0] for k, x in enumerate(steps)])


# -- the mouth's motion ---------------------------------------------------------------------------------------------

BOX: Box = (100.0, 60.0, 120.0, 120.0)


@pytest.fixture(scope="module")
def texture() -> Array:
    """Smooth structure everywhere, as flow needs it, u1 [240, 320]."""
    coarse = np.random.default_rng(3).integers(40, 215, (30, 40)).astype(np.uint8)
    return cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_CUBIC)


def moved_mouth(image: Array, pixels: float) -> Array:
    """``image`` with the mouth of BOX shifted down by ``pixels``, fading out around it."""
    y, x = np.mgrid[0:240, 0:320].astype(np.float32)
    near = np.exp(-(((x - 160) / 22) ** 2) - ((y - 160) / 12) ** 2)
    return cv2.remap(
        image, x, y - (pixels * near).astype(np.float32), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )


def test_nothing_moves_between_equal_frames(texture: Array) -> None:
    assert max(mouth_motion(texture, texture, BOX)) < 1e-4


def test_a_mouth_that_moves_is_told_from_the_face_around_it(texture: Array) -> None:
    mouth, upper = mouth_motion(texture, moved_mouth(texture, 4), BOX)
    assert 0.005 < mouth < 0.04  # 4 of 120 pixels at its middle, less around it
    assert mouth > 6 * upper


@pytest.mark.parametrize(("turn", "zoom", "x", "y"), [(0, 1, 5, 3), (4, 1, 0, 0), (0, 1.04, 0, 0), (3, 0.97, -4, 2)])
def test_a_head_that_moves_as_a_whole_moves_no_mouth(texture: Array, turn: float, zoom: float, x: int, y: int) -> None:
    place = cv2.getRotationMatrix2D((160, 120), turn, zoom) + np.array([[0, 0, x], [0, 0, y]])
    after = cv2.warpAffine(texture, place, (320, 240), borderMode=cv2.BORDER_REFLECT)
    mouth, _ = mouth_motion(texture, after, BOX)
    talking, _ = mouth_motion(texture, moved_mouth(texture, 4), BOX)
    assert mouth < talking / 2


def test_motion_is_a_fraction_of_the_face_whatever_its_size(texture: Array) -> None:
    after = moved_mouth(texture, 4)
    small, _ = mouth_motion(texture, after, BOX)
    twice = [cv2.resize(x, (640, 480), interpolation=cv2.INTER_CUBIC) for x in (texture, after)]
    large, _ = mouth_motion(twice[0], twice[1], (200.0, 120.0, 240.0, 240.0))
    assert large == pytest.approx(small, rel=0.15)


def test_a_face_at_the_edge_of_the_picture_is_measured_too(texture: Array) -> None:
    assert np.isfinite(mouth_motion(texture, np.roll(texture, 2, axis=0), (260.0, 180.0, 120.0, 120.0))).all()


# -- tracks ---------------------------------------------------------------------------------------------------------

boxes = st.lists(
    st.tuples(st.floats(0, 500), st.floats(0, 300), st.floats(20, 200), st.floats(20, 200)), max_size=5, unique=True
)


@given(st.lists(st.one_of(boxes, st.none()), max_size=30))
def test_belief_stays_a_probability_and_tracks_stay_few(steps: list[list[Box] | None]) -> None:
    tracks = Tracks(3)
    for found in steps:
        tracks.wait() if found is None else tracks.update(found)
        assert len(tracks.all) <= 3
        assert all(0.1 <= track.belief < 1 for track in tracks.all)


@given(st.lists(st.tuples(boxes, st.randoms()), max_size=10))
def test_the_order_of_detections_does_not_matter(steps: list[tuple[list[Box], Any]]) -> None:
    given_order, shuffled = Tracks(3), Tracks(3)
    for found, random in steps:
        other = list(found)
        random.shuffle(other)
        given_order.update(found)
        shuffled.update(other)
    assert given_order.all == shuffled.all


def test_a_face_is_held_through_two_misses_and_let_go_after_some_more() -> None:
    tracks = Tracks(3)
    for _ in range(5):
        tracks.update([BOX])
    tracks.update([])
    tracks.update([])
    assert [track.box for track in tracks.all] == [BOX]
    assert tracks.all[0].belief > 0.3
    for _ in range(3):
        tracks.update([])
    assert not tracks.all


def test_one_false_alarm_is_forgotten_after_two_steps() -> None:
    tracks = Tracks(3)
    tracks.update([BOX])
    tracks.update([])
    assert tracks.all[0].belief < 0.4
    tracks.update([])
    assert not tracks.all


# -- faces ----------------------------------------------------------------------------------------------------------


def drawing() -> Array:
    """A house with two windows and a door, 640 x 480: edges, symmetry, and no face."""
    image = np.full((480, 640, 3), 200, np.uint8)
    cv2.rectangle(image, (180, 180), (460, 440), (60, 90, 160), -1)
    cv2.fillPoly(image, [np.array([(150, 180), (490, 180), (320, 60)])], (40, 40, 120))
    for x in (220, 360):
        cv2.rectangle(image, (x, 230), (x + 60, 290), (220, 220, 120), -1)
    cv2.rectangle(image, (290, 340), (350, 440), (30, 40, 60), -1)
    return image


def pictures_without_a_face() -> dict[str, list[Array]]:
    random = np.random.default_rng(5)
    return {
        "black": [np.zeros((288, 360, 3), np.uint8)] * 4,
        "noise": [random.integers(0, 256, (480, 640, 3)).astype(np.uint8) for _ in range(4)],
        "drawing": [drawing()] * 4,
        "disc": [cv2.circle(np.zeros((480, 640, 3), np.uint8), (320, 240), 120, (150, 180, 220), -1)] * 4,
        "tiny": [np.zeros((8, 8, 3), np.uint8)] * 2,
    }


@pytest.mark.parametrize("name", list(pictures_without_a_face()))
def test_no_face_where_there_is_none(name: str) -> None:
    tokens = faces(Face("camera", {}), pictures_without_a_face()[name])
    assert tokens[:, 0].max() < 0.05
    assert not tokens[:, 2].any()


@pytest.mark.parametrize("settings", [{"search_width": 320}, {"floor": "low"}])
def test_settings_that_it_does_not_have_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"'front'.*search_width_px"):
        Face("front", settings)


def test_a_damaged_frame_is_refused_and_changes_nothing() -> None:
    expert = Face("camera", {})
    with pytest.raises(WireError, match="no readable JPEG"):
        expert.encode((frame(drawing(), 1, FrameLayout("jpeg", 480, 640), b"\xff\xd8 no more"),), 0, HOP_NS)
    assert faces(expert, [drawing()] * 2).tolist() == faces(Face("camera", {}), [drawing()] * 2).tolist()


# -- faces that are real --------------------------------------------------------------------------------------------


def clip_frames(path: Path) -> list[Array]:
    """Every frame of a clip, BGR."""
    with av.open(str(path)) as container:
        return [picture.to_ndarray(format="bgr24") for picture in container.decode(video=0)]


@pytest.fixture(scope="module")
def talking(shared_data: Path) -> list[Array]:
    """A talking head at about 8 frames/s, 25 frames."""
    return clip_frames(shared_data / "av" / "lrwp9a.mpg")[::3]


def test_a_face_is_found_in_every_frame_and_its_mouth_is_seen_to_move(talking: list[Array]) -> None:
    tokens = faces(Face("camera", {}), talking)
    assert tokens[0, 0] > 0.8
    assert tokens[0, 2] == 0  # nothing to compare the first frame with
    assert tokens[2:, 0].min() > 0.95
    assert tokens[2:, 2].min() > 0.95
    assert tokens[8:20, 1].mean() > 0.4


@pytest.mark.parametrize("noise", [0, 2, 6])
def test_a_still_face_moves_no_mouth_under_the_noise_of_a_camera(talking: list[Array], noise: float) -> None:
    random = np.random.default_rng(1)
    shots = (talking[12] + random.normal(0, noise, talking[12].shape) for _ in range(10))
    still = [np.clip(shot, 0, 255).astype(np.uint8) for shot in shots]
    tokens = faces(Face("camera", {}), still)
    assert tokens[1:, 2].min() > 0.9
    assert tokens[1:, 1].max() < 0.1


def test_a_larger_picture_of_the_same_scene_gives_the_same_answers(talking: list[Array]) -> None:
    large = [cv2.resize(x, None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC) for x in talking]
    small, big = faces(Face("camera", {}), talking), faces(Face("camera", {}), large)
    assert np.abs(small[2:, 0] - big[2:, 0]).max() < 0.05
    assert np.abs(small[1:, 1] - big[1:, 1]).mean() < 0.2


def test_two_faces_are_watched_and_the_one_that_talks_counts(talking: list[Array]) -> None:
    both = [np.hstack([talking[0], x]) for x in talking]
    alone, together = faces(Face("camera", {}), talking), faces(Face("camera", {}), both)
    assert together[2:, 0].min() > 0.99
    assert together[8:20, 1].mean() == pytest.approx(alone[8:20, 1].mean(), abs=0.2)


def test_the_same_frame_again_says_nothing_about_motion(talking: list[Array]) -> None:
    expert = Face("camera", {})
    faces(expert, talking[:3])
    again = expert.encode((frame(talking[2], 3),), 3 * HOP_NS, 4 * HOP_NS)
    assert again[0] > 0.95
    assert again[2] == 0


def test_frames_far_apart_are_not_compared(talking: list[Array]) -> None:
    expert = Face("camera", {})
    faces(expert, talking[:3])
    for _ in range(4):
        expert.skip()
    late = expert.encode((frame(talking[12], 8),), 7 * HOP_NS, 8 * HOP_NS)
    assert late[0] > 0.9
    assert late[2] == 0


def test_after_a_reset_it_is_as_new(talking: list[Array]) -> None:
    expert = Face("camera", {})
    first = faces(expert, talking[:8])
    expert.reset()
    assert faces(expert, talking[:8]).tobytes() == first.tobytes()


@pytest.fixture
def opencv_threads() -> Iterator[None]:
    before = cv2.getNumThreads()
    yield
    cv2.setNumThreads(before)


@pytest.mark.usefixtures("opencv_threads")
def test_opencv_threads_change_no_bit(talking: list[Array]) -> None:
    cv2.setNumThreads(1)
    one = faces(Face("camera", {}), talking)
    cv2.setNumThreads(4)
    assert faces(Face("camera", {}), talking).tobytes() == one.tobytes()


def test_a_dog_is_nobody(shared_data: Path) -> None:
    tokens = faces(Face("camera", {}), clip_frames(shared_data / "av" / "dog.mp4")[::5])
    assert (tokens[:, 0] < 0.5).mean() > 0.95


# -- speech ---------------------------------------------------------------------------------------------------------


def sounds_without_a_voice() -> dict[str, Array]:
    """Three seconds each at 16 kHz, f4."""
    t, random = np.arange(3 * RATE_HZ) / RATE_HZ, np.random.default_rng(7)
    return {
        name: sound.astype(np.float32)
        for name, sound in {
            "silence": 0 * t,
            "tone": 0.3 * np.sin(2 * np.pi * 440 * t),
            "hum": 0.1 * sum(np.sin(2 * np.pi * 50 * n * t) / n for n in range(1, 20)),
            "noise": random.normal(0, 0.1, len(t)),
            "gusts": random.normal(0, 0.1, len(t)) * (1 + np.sin(2 * np.pi * 4 * t)),
            "clicks": 0.9 * (np.arange(len(t)) % 4000 < 5),
            "sweep": 0.3 * np.sin(2 * np.pi * (100 * t + 300 * t * t)),
        }.items()
    }


@needs_silero
@pytest.mark.parametrize("name", list(sounds_without_a_voice()))
def test_no_voice_where_there_is_none(name: str) -> None:
    heard = voices(Speech("microphone", {}), sounds_without_a_voice()[name])
    assert heard.max() < 0.3
    assert heard.mean() < 0.05


@needs_silero
@pytest.mark.parametrize("step", [1600, 800, 1000, 3200, 320])
def test_the_detector_hears_the_same_chunks_however_steps_are_cut(step: int) -> None:
    sound = sounds_without_a_voice()["gusts"][: 16 * STEP]
    chunks = voices(Speech("microphone", {}), sound, CHUNK)
    heard = voices(Speech("microphone", {}), sound, step)
    ends = [(k + 1) * step // CHUNK for k in range(len(heard))]
    expected, last = [], 0.0
    for start, end in zip([0, *ends], ends, strict=False):
        last = chunks[start:end].mean() if end > start else last
        expected.append(last)
    np.testing.assert_allclose(heard, expected, atol=1e-6)


@needs_silero
def test_channels_are_averaged() -> None:
    left, right = (sounds_without_a_voice()[name][:STEP] for name in ("noise", "tone"))
    both = Speech("microphone", {}).encode(np.stack([left, right], axis=1), 0, HOP_NS)
    mixed = Speech("microphone", {}).encode(((left + right) / 2)[:, None], 0, HOP_NS)
    np.testing.assert_allclose(both, mixed, atol=1e-6)


@needs_silero
def test_holes_are_heard_as_silence_counted_and_stated() -> None:
    expert, filled = Speech("microphone", {}), Speech("microphone", {})
    sound = sounds_without_a_voice()["noise"][:STEP, None].copy()
    sound[400:800] = np.nan
    token = expert.encode(sound, 0, HOP_NS)
    assert token[1] == 0.75
    assert expert.holes == 400
    assert token[0] == filled.encode(np.nan_to_num(sound), 0, HOP_NS)[0]


@needs_silero
@pytest.mark.parametrize(("skips", "forgotten"), [(1, False), (4, False), (5, True), (50, True)])
def test_a_long_gap_clears_the_state_and_a_short_one_does_not(skips: int, forgotten: bool) -> None:
    expert, new = Speech("microphone", {}), Speech("microphone", {})
    voices(expert, sounds_without_a_voice()["gusts"])
    for _ in range(skips):
        expert.skip()
    after = sounds_without_a_voice()["noise"]
    assert np.array_equal(voices(expert, after), voices(new, after)) is forgotten


@needs_silero
def test_a_new_epoch_starts_it_anew() -> None:
    expert = Speech("microphone", {})
    first = voices(expert, sounds_without_a_voice()["gusts"][: 7 * STEP])
    expert.reset()
    assert voices(expert, sounds_without_a_voice()["gusts"][: 7 * STEP]).tobytes() == first.tobytes()


@needs_silero
def test_another_rate_is_refused_with_the_rule_that_is_needed() -> None:
    with pytest.raises(BundleError, match=r"'microphone' got 4800 samples for 100 ms.*rate_hz: 16000"):
        Speech("microphone", {}).encode(np.zeros((4800, 1), np.float32), 0, HOP_NS)


@needs_silero
def test_other_weights_than_the_bundles_are_refused() -> None:
    with pytest.raises(BundleError, match=r"SHA-256.*pip install --no-deps silero-vad=="):
        Speech("microphone", {"weights_sha256": "00" * 32})


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BundleError, match=r"pip install --no-deps silero-vad==\d"):
        Speech("microphone", {})


@needs_silero
def test_neither_torch_nor_the_package_is_imported() -> None:
    code = (
        "import sys; from pipeline.experts.speech import Speech; Speech('microphone', {}); "
        "sys.exit(any(name.split('.')[0] in ('torch', 'silero_vad') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
    assert find_weights().name == "silero_vad.onnx"
