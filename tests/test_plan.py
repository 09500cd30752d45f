"""What a rig says is checked before anything is started, all of it at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import BundleError, SensoriumError
from pipeline.launch import check_rig_file
from pipeline.plan import load_to_plan, make_plan
from tests.rigs import make_rig

MANY = """\
nmae: many
sources:
  camera: {kind: synthetic, payload: frame, rate_hz: thirty, requird: true}
  microphone: {kind: synthetik, payload: audio}
  imu:
    kind: synthetic
    payload: imo
    required: 'yes'
    rate_khz: 0.1
  lidar: {kind: synthetic, payload: sweep}
  pi:
    kind: remote
    listen: tcp://127.0.0.1:5600
    offset_ms: 5
    sources:
      far: {kind: synthetic, paylod: imu}
      text: {kind: replay, path: x}
bundle: {path: nowhere}
align:
  streams: {camra: {idle_ms: 5}}
"""
PLACES = [
    ", line 1, nmae", ", line 3, sources.camera.rate_hz", ", line 3, sources.camera.requird",
    ", line 4, sources.microphone.kind", ", line 7, sources.imu.payload", ", line 8, sources.imu.required",
    ", line 9, sources.imu.rate_khz", ", line 14, sources.pi.offset_ms", ", line 16, sources.pi.sources.far.paylod",
    ", line 17, sources.pi.sources.text.kind", ", line 18, bundle.path",
]  # fmt: skip


SOURCES = """\
import msgspec
from pipeline import Source

class Empty(Source):
    pass

class Loose(Source):
    payload = "temperature"
    class Settings:
        rate_hz = 20
    def __init__(self):
        self.n = 0
    def read(self):
        yield 1

class Whole(Source):
    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        kind_of_data: str = "imu"
    @classmethod
    def payload_of(cls, settings):
        return settings.kind_of_data
    def read(self):
        return None

class Static(Whole):
    @staticmethod
    def payload_of(settings):
        return "imu"

class Bare(Whole):
    Settings = None
    read = None
    def payload_of(self, settings):
        return "imu"
"""


def refused(file: Path) -> list[str]:
    """Every error of a rig, without the file's name."""
    with pytest.raises(SensoriumError) as caught:
        make_plan(load_to_plan(file))
    assert caught.value.exit_code == 2
    assert all(str(part).startswith(str(file)) for part in caught.value.parts)
    return [str(part).removeprefix(str(file)) for part in caught.value.parts]


def test_everything_that_is_wrong_with_a_rig_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rig.yaml"
    file.write_text(MANY)  # what `align` names may be one of `pi`'s, whose streams nobody can tell
    assert [said.partition(": ")[0] for said in refused(file)] == PLACES
    file.write_text(MANY[: MANY.index("  pi:")] + MANY[MANY.index("bundle:") :])
    assert [said.partition(": ")[0] for said in refused(file)] == [
        *PLACES[:7], ", line 11, bundle.path", ", line 13, align.streams.camra"
    ]  # fmt: skip
    file.write_text(MANY.replace("{path: nowhere}", "{path: nowhere, alow_code: true}"))
    assert [said.partition(": ")[0] for said in refused(file)] == [*PLACES[:-1], ", line 18, bundle.alow_code"]


def test_a_model_is_held_against_what_is_known_of_sources_that_are_wrong(tmp_path: Path) -> None:
    make_rig(tmp_path)
    file = tmp_path / "rig.yaml"
    file.write_text(
        "name: t\nsources:\n  camera: {kind: synthetic, payload: frames}\n  imu: {kind: synthetic, payload: imu}\n"
        "bundle: {path: model, streams: {microphone: mic, lidr: null, imu: camera}}\n"
    )
    assert [said.partition("; ")[0] for said in refused(file)] == [
        ", line 3, sources.camera.payload: found 'frames' (text), expected one of `frame`, `audio`, `imu`, `signal`, "
        "`sweep`, `text`.",
        ", line 5, bundle: the rig maps a stream `lidr` that the bundle `tiny` does not have",
        ", line 5, bundle: the rig maps `camera`, `imu` of the bundle `tiny` to the same stream `camera`",
        ", line 5, bundle: the bundle `tiny` needs a stream `microphone` (audio), but the rig has no `mic`",
    ]


def test_where_nobody_knows_the_streams_nothing_follows_from_them(tmp_path: Path) -> None:
    make_rig(tmp_path)
    file = tmp_path / "rig.yaml"
    more = (
        "bundle: {path: model}\nalign: {streams: {imu: {idle_ms: 5}}, idle_s: 1}\nrecord: {path: x, streams: [imu]}\n"
    )
    for sources, said in {
        "sorces:\n  imu: {kind: synthetic, payload: imu}": "2, sorces",
        "sources: [imu]": "2, sources",
        "sources:": "2, sources",
        "sources: {}": "2, sources",
        "sources:\n  im u: {kind: synthetic, payload: imu}": "3, sources.im u",
    }.items():
        file.write_text(f"name: t\n{sources}\n{more}")
        line = 4 + sources.count("\n")
        assert [one.partition(": ")[0] for one in refused(file)] == [f", line {said}", f", line {line}, align.idle_s"]


def test_streams_of_sources_that_are_wrong_are_named_in_the_order_of_the_file(tmp_path: Path) -> None:
    file, names = tmp_path / "rig.yaml", [f"imu{n}" for n in range(8)]
    wrong = "".join(f"  {name}: {'synthetic' if name == 'imu5' else '{kind: synthetic}'}\n" for name in names)
    file.write_text(f"name: t\nsources:\n{wrong}record: {{path: x, streams: [mic]}}\n")
    assert f"it has {', '.join(f'`{name}`' for name in names)}." in refused(file)[-1]


def test_a_stream_in_a_list_is_named_by_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "rig.yaml"
    file.write_text("name: t\nsources: {camera: {kind: camera}}\nrecord: {path: x, streams: [5, camera, camra, cam]}\n")
    assert [said.partition(": ")[0] for said in refused(file)] == [
        f", line 3, record.streams[{index}]" for index in (0, 2, 3)
    ]


def test_sources_of_another_host_are_checked_whatever_is_wrong_beside_them(tmp_path: Path) -> None:
    file = tmp_path / "rig.yaml"
    file.write_text(
        "name: t\nsources:\n  pi:\n    kind: remote\n    listn: tcp://127.0.0.1:5600\n    sources:\n"
        "      imu: {kind: imu, prt: /dev/x}\n      lidar: {knd: lidar}\n      cam: {kind: cammera}\n"
    )
    assert [said.partition(": ")[0] for said in refused(file)] == [
        ", line 5, sources.pi.listn", ", line 7, sources.pi.sources.imu.prt", ", line 8, sources.pi.sources.lidar",
        ", line 9, sources.pi.sources.cam.kind",
    ]  # fmt: skip


def test_where_only_the_model_is_at_fault_it_is_so_of_several_faults_too(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    model = tmp_path / "model" / "model.yaml"
    model.write_text(model.read_text().replace("labels", "lables").replace("hop_ms", "hop_s"))
    with pytest.raises(BundleError) as caught:
        check_rig_file(rig)
    assert caught.value.exit_code == 1
    assert len(caught.value.parts) > 1
    assert all(str(part).startswith(f"{tmp_path / 'rig.yaml'}, line ") for part in caught.value.parts)


def test_a_class_that_cannot_be_a_source_is_told_all_that_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "own_sources.py").write_text(SOURCES)
    file = tmp_path / "rig.yaml"
    kinds = {name.lower(): {"kind": f"own_sources:{name}"} for name in ("Empty", "Loose", "Whole", "Static", "Bare")}
    file.write_text(json.dumps({"name": "own", "sources": kinds}))
    empty, loose, bare = refused(file)
    assert empty.startswith(", line 1, sources.empty.kind: the class of `own_sources:Empty` cannot be a source: ")
    assert "it has no `payload`; allowed are `frame`, `audio`" in empty
    assert "no method `read(self)`" in empty
    assert "Settings" not in empty
    assert "__init__" not in empty
    assert "`payload` is 'temperature'; allowed are `frame`" in loose
    for words in ("its `Settings` is no msgspec.Struct", "`read` yields", "`__init__` does not take"):
        assert words in loose
    for words in ("its `Settings` is no msgspec.Struct", "no method `read(self)`", "`payload_of` does not take"):
        assert words in bare


def test_where_to_put_a_module_is_said_of_the_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_there\n")
    file = tmp_path / "rig.yaml"
    sources = {"a": {"kind": "needs_more:A"}, "b": {"kind": "nowhere_at_all:B"}}
    file.write_text(json.dumps({"name": "own", "sources": sources}))
    a, b = refused(file)
    assert a.endswith("cannot be imported: ModuleNotFoundError: No module named 'a_module_that_is_not_there'.")
    assert b.endswith("It must be installed, or lie beside the rig or in the current folder.")
