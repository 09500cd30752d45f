"""Streams of a recording that are called otherwise than a bundle's: ``--stream`` says which serves which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import yaml
from typer.testing import CliRunner

from pipeline import cli
from pipeline.bundle import Bundle, load_bundle
from pipeline.errors import ConfigError, SensoriumError
from pipeline.mapping import asked_streams, session_mapping
from pipeline.messages import Message
from pipeline.recording import MANIFEST_TOPIC, Label, RecordingReader, RecordingWriter, SessionInfo
from tests.align_strategies import message
from tests.test_replay import CAMERA, IMU, MS
from tests.tiny_bundle import FRAME, GRID, manifest, ok, write_bundle

RIG = {
    "name": "car",
    "sources": {name: {"kind": "synthetic", "payload": "frame"} for name in ("front", "back")},
    "bundle": {"path": "x", "streams": {"camera": "back"}},
}
HELD = {"front": "frame", "back": "frame", "wrist": "imu"}


def write(path: Path, streams: Mapping[str, str], rig: str | None = None, windows_of: tuple[str, ...] = ()) -> Path:
    """A session of 2 s with these streams, each with what it carries, and one window of some of them."""
    offsets = tuple(range(0, 100 * MS, 10 * MS))
    with RecordingWriter(path, SessionInfo(session=path.stem, rig=rig)) as writer:
        for start, label in ((0, "no"), (1000 * MS, "yes")):
            writer.write_label(Label(start, start + 1000 * MS, label), 0)
        for n in range(20):
            for name, payload in streams.items():
                if payload == "frame":
                    one = message(msgspec.structs.replace(CAMERA, name=name), n, n * 100 * MS)
                    one = Message(one.header, bytes(4))
                else:
                    one = message(msgspec.structs.replace(IMU, name=name), n, n * 100 * MS, offsets=offsets)
                writer.write(one, n * 100 * MS + 95 * MS)
        if windows_of:
            made = manifest(1, {name: ok(1) for name in windows_of})
            writer.write_json(MANIFEST_TOPIC, msgspec.json.encode(made), 200 * MS)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "tiny", {"camera": FRAME, "imu": GRID})


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder)


def invoke(*arguments: object) -> tuple[str, str, BaseException | None]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    wrong = result.exception if isinstance(result.exception, SensoriumError) else None
    assert wrong is not None or result.exit_code in (0, 3), result.exception
    return result.stdout, result.stderr, wrong


def refusal(*arguments: object) -> str:
    """What a command is refused with, which is the user's fault."""
    *_, wrong = invoke(*arguments)
    assert isinstance(wrong, ConfigError), wrong
    return str(wrong)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["front"], r"--stream front: found 'front', expected one like camera=front"),
        (["camera="], r"camera=null leaves it out"),
        (["=front"], "expected one like"),
        (["camera=front", "camera=back"], r"--stream camera=back: the bundle's `camera` is given `front` already"),
        (["camera=null", "camera=back"], r"the bundle's `camera` is given nothing \(it is left out\) already"),
        (["left=front", "right=front"], r"--stream right=front: `front` of the recording serves .*`left` already"),
    ],
)
def test_what_is_no_pair_or_given_twice(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        asked_streams(texts)


def test_what_pairs_say() -> None:
    assert asked_streams(["camera = front", "a=null", "b=null", "x=y=z"]) == {
        "camera": "front", "a": None, "b": None, "x": "y=z"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"camra": "front"}, r"--stream camra=front: the bundle `tiny` has no stream `camra`; it has `camera`, `imu`. "
         r"Did you mean `camera`\?"),
        ({"front": "camera"}, r"The bundle's comes first: --stream camera=front"),
        ({"camera": "frnt"}, r"a\.mcap has no stream `frnt`; it has `back`, `front`, `wrist`. Did you mean `front`\?"),
        ({"camera": "wrist"}, r"needs frame on its stream `camera`, and `wrist` of .*a\.mcap carries imu. Of frame it "
         "has `back`, `front`"),
        ({"camera": None, "imu": None}, "leaves out every stream of the bundle `tiny`"),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path: Path, bundle: Bundle, asked: dict[str, str | None], words: str) -> None:
    path = write(tmp_path / "a.mcap", HELD)
    with RecordingReader(path) as reader, pytest.raises(ConfigError, match=words):
        session_mapping(reader, bundle, asked)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, bundle: Bundle) -> None:
    path = write(tmp_path / "a.mcap", HELD)
    with RecordingReader(path) as reader, pytest.raises(ConfigError) as wrong:
        session_mapping(reader, bundle, {"camra": "front", "imu": "rist"})
    assert len(wrong.value.parts) == 2


def test_no_stream_of_the_recording_serves_two(tmp_path: Path) -> None:
    eyes = load_bundle(write_bundle(tmp_path / "eyes", {"front": FRAME, "back": FRAME}))
    path = write(tmp_path / "a.mcap", HELD)
    with RecordingReader(path) as reader:
        with pytest.raises(ConfigError, match=r"--stream back=front: `front` of .*serves the bundle's `front`.*"
                           r"--stream front=…, or leave it out: --stream front=null"):  # fmt: skip
            session_mapping(reader, eyes, {"back": "front"})
        assert session_mapping(reader, eyes, {"back": "front", "front": None}) == {"back": "front", "front": None}
        swapped: dict[str, str | None] = {"back": "front", "front": "back"}
        assert session_mapping(reader, eyes, swapped) == swapped


def test_what_is_asked_for_goes_before_what_served_in_the_session(tmp_path: Path, bundle: Bundle) -> None:
    path = write(tmp_path / "a.mcap", HELD, yaml.safe_dump(RIG))
    with RecordingReader(path) as reader:
        assert session_mapping(reader, bundle) == {"camera": "back"}
        assert session_mapping(reader, bundle, {"imu": "wrist"}) == {"camera": "back", "imu": "wrist"}
        assert session_mapping(reader, bundle, {"camera": "front"}) == {"camera": "front"}


def test_a_replay_of_streams_of_other_names(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "a.mcap", {"front": "frame", "imu": "imu"})
    replay = ("replay", path, "--bundle", folder, "--json")
    _, said, _ = invoke(*replay)
    assert "front of the recording could stand for camera: --stream camera=front" in said
    lines, said, _ = invoke(*replay, "--stream", "camera=front")
    assert "could stand for" not in said
    last = json.loads(lines.splitlines()[-1])
    assert {name: one["verdict"] for name, one in last["streams"].items()} == {"front": "ok", "imu": "ok"}
    lines, _, _ = invoke(*replay, "--stream", "camera=null")
    left_out = json.loads(lines.splitlines()[-1])["streams"]["camera"]
    assert (left_out["verdict"], left_out["contribution"]) == ("missing", 0.0)
    assert "Did you mean `front`?" in refusal(*replay, "--stream", "camera=frnt")


def test_a_recording_without_a_stream_of_its_name_says_what_to_type(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "a.mcap", {"front": "frame"})
    _, _, wrong = invoke("replay", path, "--bundle", folder)
    assert "no stream in common" in str(wrong)
    assert "Map one to the other: --stream camera=front, in Python" in str(wrong)


def test_explain_and_the_fault_bench_take_it_too(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "a.mcap", {"front": "frame", "imu": "imu"})
    mapped = ("--bundle", folder, "--stream", "camera=front", "--json")
    found = json.loads(invoke("explain", path, *mapped)[0])
    assert found["streams"]["front"]["verdicts"] == {"ok": 19}
    assert json.loads(invoke("explain", path, "--bundle", folder, "--json")[0])["streams"]["front"]["verdicts"] == {}
    (tmp_path / "f.yaml").write_text("faults: {dark: {kind: loss, streams: [front], share: 1.0}}")
    bench = json.loads(invoke("replay", path, "--faults", tmp_path / "f.yaml", *mapped)[0])
    assert bench["faults"][0]["windows_changed"] > 0
    assert "has no stream `frnt`" in refusal("explain", path, "--bundle", folder, "--stream", "imu=frnt")
    assert "name one: --bundle PATH" in refusal("explain", path, "--stream", "camera=front")
    assert "for a recording" in refusal("explain", "--stream", "camera=front")
    assert "for a recording" in refusal("explain", "--bundle", folder)


def test_verify_takes_streams_that_the_windows_were_made_of(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "a.mcap", HELD, windows_of=("front", "wrist"))
    verify = ("replay", path, "--verify", "--bundle", folder, "--json", "--stream", "imu=wrist")
    assert "windows of this session were made of `front`, `wrist`" in refusal(*verify, "--stream", "camera=back")
    found = json.loads(invoke(*verify, "--stream", "camera=front")[0])
    assert found["first_difference"]["field"] != "stream"  # there are no such windows, but both streams are there


def test_explain_tells_of_the_windows_that_there_are(tmp_path: Path, folder: Path) -> None:
    path = write(tmp_path / "a.mcap", HELD, windows_of=("front", "wrist"))
    explain = ("explain", path, "--bundle", folder, "--json", "--stream", "imu=wrist")
    said = refusal(*explain, "--stream", "camera=back")
    assert "windows of this session were made of `front`, `wrist`, and explain tells of those" in said
    assert json.loads(invoke(*explain, "--stream", "camera=front")[0])["streams"]["front"]["verdicts"] == {"ok": 1}


def test_an_evaluation_maps_the_recordings_that_have_the_stream(tmp_path: Path, folder: Path) -> None:
    others = write(tmp_path / "a.mcap", {"front": "frame", "imu": "imu"})
    same = write(tmp_path / "b.mcap", {"camera": "frame", "imu": "imu"})
    blind = write(tmp_path / "c.mcap", {"imu": "imu"})

    def missing(*arguments: object) -> list[list[str]]:
        found = json.loads(invoke("evaluate", folder, others, same, blind, "--json", *arguments)[0])
        return [session["missing"] for session in found["sessions"]]

    assert missing() == [["camera"], [], ["camera"]]
    assert missing("--stream", "camera=front") == [[], [], ["camera"]]
    said = refusal("evaluate", folder, others, same, "--stream", "camera=frnt")
    assert "has no stream `frnt`" in said
    assert "Did you mean `front`?" in said
