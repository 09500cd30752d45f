"""What is odd about the pace of sources is said before a session starts, with what it leads to and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.align import AlignSpec, All, Latest, Nearest, Resample, StreamSpec
from pipeline.config import load_rig
from pipeline.errors import ConfigError
from pipeline.launch import check_rig_file
from pipeline.pacing import odd_paces
from pipeline.source import Pace
from tests.rigs import SOURCES, STREAMS, make_rig
from tests.tiny_bundle import write_bundle


def notes(folder: Path, **sources: Any) -> list[str]:
    """What `check` warns of where the settings of some sources are replaced by others."""
    rig = make_rig(folder, sources={name: SOURCES[name] | sources.get(name, {}) for name in SOURCES})
    return check_rig_file(load_rig(rig.document.path))


@pytest.mark.parametrize(("source", "settings", "said"), [
    ("camera", {"rate_hz": 2}, "a message comes each 500 ms, and the whole window is shorter than that: 80% of the "
     "model's steps will have none that is near enough, and be `missing`; raise `rate_hz` to 10 or more"),
    ("lidar", {"rate_hz": 0.5}, "raise `rate_hz` to"),
    ("lidar", {"rate_hz": 0.5}, "set `idle_ms` of `align` to 3000 or more"),
    ("camera", {"rate_hz": 0.001}, "a message comes each 1000000 ms, and the whole window is shorter than that: "),
    ("imu", {"rate_hz": 10, "block": 1}, "a sample comes each 100 ms, but the model takes what is farther apart than"),
    ("imu", {"rate_hz": 40, "block": 1}, "what is faster than 20 Hz it will not see; raise `rate_hz` to"),
    ("imu", {"rate_hz": 8000, "block": 1}, "8000 messages a second take about 160% of a core to send, and 80% in "
     "each node that hears them; what a core has no time for is lost. 500 or fewer will do: raise `block`."),
    ("imu", {"block": 11}, "a message holds 110 ms, more than the model's hop of 100 ms: predictions come in bursts, "
     "and up to 110 ms later than they could; lower `block`."),
    ("microphone", {"block": 8000}, "a message holds 500 ms and comes when they are over, but windows wait for only "
     "250 ms (`max_delay_ms` of `align`): most will be `late` or `partial`; lower `block`."),
    ("camera", {"rate_hz": 900}, "900 messages a second take about 18% of a core to send"),
    ("camera", {"rate_hz": 60, "width": 3840, "height": 2160}, "up to 1493 MB a second come of it: each copy "
     "takes about 23% of a core"),
])  # fmt: skip
def test_what_is_odd_is_said_with_what_it_leads_to(
    tmp_path: Path, source: str, settings: dict[str, Any], said: str
) -> None:
    found = notes(tmp_path, **{source: settings})
    assert any(f"sources.{source}: " in note and said in note for note in found), found


def test_what_is_usual_is_not_odd(tmp_path: Path) -> None:
    assert notes(tmp_path) == []
    assert check_rig_file(load_rig("configs/synthetic.yaml")) == []
    assert check_rig_file(load_rig("configs/edge.yaml")) == []


@pytest.mark.parametrize(("settings", "said"), [
    ({"gather_ms": 200}, "what gathers in the device until it is taken holds 200 ms, more than the model's hop of "
     "100 ms: predictions come in bursts, and up to 200 ms later than they could; lower `gather_ms`"),
    ({"gather_ms": 200, "block_ms": 300}, "a message holds 300 ms and comes when they are over, but windows wait for "
     "only 250 ms (`max_delay_ms` of `align`): most will be `late` or `partial`; lower `block_ms`"),
    ({"gather_ms": 200, "block_ms": 200}, "a message holds 200 ms, more than the model's hop of 100 ms"),
    ({"gather_ms": 100}, ""), ({}, ""),
])  # fmt: skip
def test_what_comes_late_is_what_gathers_or_a_message_whichever_is_longer(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    microphone = {"kind": "microphone", **settings}
    rig = make_rig(tmp_path, sources=SOURCES | {"microphone": microphone})
    found = check_rig_file(load_rig(rig.document.path))
    assert [note for note in found if ", more than" in note or "windows wait" in note] == found[: bool(said)]
    assert said in "".join(found)


def test_a_step_with_no_line_of_text_is_complete_and_not_odd(tmp_path: Path) -> None:
    stream = StreamSpec(name="x", payload="text", rule=All())
    spec = AlignSpec(hop_ns=100_000_000, streams=(stream,), max_delay_ns=250_000_000)
    assert list(odd_paces({"x": Pace.of(0.2)}, {}, spec, 10)) == []


@pytest.mark.parametrize("rule", [Nearest(0), Latest(0), Resample(100, 0)])
def test_a_model_that_looks_no_further_than_a_moment_is_odd(rule: Any) -> None:
    stream = StreamSpec(name="x", payload="imu", rule=rule, channels=6)
    spec = AlignSpec(hop_ns=100_000_000, streams=(stream,), max_delay_ns=250_000_000)
    [(_, said)] = odd_paces({"x": Pace.of(30, 100, "batch_ms")}, {}, spec, 10)
    assert said.endswith("a model that looks further" if not isinstance(rule, Resample) else "use another model")


@pytest.mark.parametrize(("more", "warned"), [
    ("encoding: jpeg", 0), ("encoding: native", 0), ("encoding: jpeg, limit_mb_per_min: 90000", 1), ("", 1),
])  # fmt: skip
def test_a_camera_that_compresses_keeps_its_own_limit(tmp_path: Path, more: str, warned: int) -> None:
    rig = tmp_path / "rig.yaml"
    rig.write_text(
        "name: t\nsources:\n  x: {kind: camera, width: 3840, height: 2160, rate_hz: 200, "
        f"{more}}}\nrecord: {{path: x}}\n"
    )
    assert sum("MB a second" in note for note in check_rig_file(load_rig(rig))) == warned


def test_a_synthetic_picture_that_is_compressed_is_small(tmp_path: Path) -> None:
    settings = {"rate_hz": 60, "width": 3840, "height": 2160}
    assert len(notes(tmp_path, camera=settings)) == 1
    assert notes(tmp_path, camera=settings | {"format": "jpeg"}) == []


def test_a_short_hop_is_odd(tmp_path: Path) -> None:
    write_bundle(tmp_path / "fast", {"lidar": STREAMS["lidar"]}, steps=3)
    model = tmp_path / "fast" / "model.yaml"
    model.write_text(model.read_text().replace("hop_ms: 100", "hop_ms: 1"))
    (tmp_path / "rig.yaml").write_text(
        "name: fast\nsources:\n  lidar: {kind: synthetic, payload: sweep}\nbundle: {path: fast}\n"
    )
    [said] = check_rig_file(load_rig(tmp_path / "rig.yaml"))
    assert "rig.yaml, line 4, bundle: the model's hop of 1 ms asks for 1000 predictions a second" in said
    model.write_text(model.read_text().replace("hop_ms: 1", "hop_ms: 0.5"))
    with pytest.raises(Exception, match=r"window.hop_ms: found 0.5 \(a number\), expected a number at least 1"):
        check_rig_file(load_rig(tmp_path / "rig.yaml"))


def test_sources_of_another_host_are_looked_at_too(tmp_path: Path) -> None:
    (tmp_path / "rig.yaml").write_text(
        "name: far\nsources:\n  pi:\n    kind: remote\n    listen: tcp://127.0.0.1:5600\n    sources:\n"
        "      imu: {kind: imu, port: /dev/x, rate_hz: 4000, batch_ms: 1}\nrecord: {path: x.mcap}\n"
    )
    [said] = check_rig_file(load_rig(tmp_path / "rig.yaml"))
    assert "line 7, sources.pi.sources.imu: 1000 messages a second" in said
    assert said.endswith("raise `batch_ms`.")


@pytest.mark.parametrize(("source", "said"), [
    ("{kind: imu, port: /dev/x, rate_hz: 1000000}", "sources.x.rate_hz: found 1000000 .* at most 8000"),
    ("{kind: camera, rate_hz: 10000}", "sources.x.rate_hz: found 10000 .* at most 1000"),
    ("{kind: camera, width: 100000}", "sources.x.width: found 100000 .* at most 16384"),
    ("{kind: synthetic, payload: imu, rate_hz: 1000000}", "sources.x.rate_hz: found 1000000 .* at most 192000"),
    ("{kind: synthetic, payload: frame, rate_hz: 10000}", "`rate_hz: 10000`: a frame source has at most 1000 messages"),
    ("{kind: microphone, rate_hz: 1000000}", "sources.x.rate_hz: found 1000000 .* at most 192000"),
])  # fmt: skip
def test_what_is_impossible_is_refused(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "rig.yaml").write_text(f"name: t\nsources:\n  x: {source}\n")
    with pytest.raises(ConfigError, match=said):
        check_rig_file(load_rig(tmp_path / "rig.yaml"))
