"""Recordings: nothing is lost on the way in and out, other programs can read them, and a broken file says so."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jsonschema
import msgspec
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from mcap.reader import make_reader

from pipeline.errors import ConfigError, RecordingError, SensoriumError, WireError
from pipeline.explain import Session, explain
from pipeline.findings import explanation_text
from pipeline.messages import (
    IMU_DTYPE,
    POINT_DTYPE,
    AudioLayout,
    FrameLayout,
    Header,
    ImuLayout,
    Layout,
    Message,
    SignalLayout,
    SweepLayout,
    TextLayout,
    nbytes_of,
    signal_dtype,
)
from pipeline.recording import (
    GAP_TOPIC,
    Label,
    LostMessages,
    RecordingReader,
    RecordingWriter,
    SessionInfo,
    lacks,
    summarise,
)
from pipeline.recording import schemas as recording_schemas
from pipeline.recording.writer import whole_file, written_now
from pipeline.reports import recording_table
from pipeline.steps import Gap
from pipeline.terminal import console

UNIX = 1_700_000_000_000_000_000
SESSION = SessionInfo(session="s1", unix_ns=UNIX)


def message(
    layout: Layout | None,
    data: Any = None,
    *,
    stream: str = "x",
    seq: int = 0,
    t: int = 0,
    end: int | None = None,
    bound: int | None = None,
    epoch: int = 0,
) -> Message:
    end = t if end is None else end
    header = Header(
        stream=stream,
        seq=seq,
        epoch=epoch,
        t_capture_ns=t,
        t_end_ns=end,
        bound_ns=end + 1 if bound is None else bound,
        t_receipt_ns=end + 3,
        layout=layout,
    )
    return Message(header, data)


def write(path: Path, messages: list[tuple[Message, int]], **options: Any) -> Path:
    with RecordingWriter(path, SESSION, overwrite=True, **options) as writer:
        for one, arrival_ns in messages:
            writer.write(one, arrival_ns)
    return path


def read(path: Path, **options: Any) -> list[tuple[Message, int]]:
    with RecordingReader(path) as reader:
        return list(reader.messages(**options))


def examples() -> dict[str, Message]:
    """One message of every schema."""
    picture = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
    imu = np.zeros(3, IMU_DTYPE)
    imu["offset_ns"], imu["accel"], imu["gyro"] = [0, 5, 9], [0.1, -9.81, np.nan], [[1, 2, 3], [4, 5, 6], [-0.0, 8, 9]]
    signal_data = np.zeros(2, signal_dtype(2))
    signal_data["value"] = [[1.5, np.nan], [3e-40, 3.4e38]]
    points = np.zeros(4, POINT_DTYPE)
    points["x"], points["offset_ns"] = [1, 2, 3, 4], [-3, -2, -1, 0]
    return {
        "jpeg": message(FrameLayout("jpeg", 6, 8), jpeg, stream="jpeg", t=40),
        "bgr": message(FrameLayout("bgr8", 6, 8), picture, stream="bgr", t=40),
        "gray": message(FrameLayout("gray8", 6, 8), picture[..., 0].tobytes(), stream="gray", t=40),
        "sound": message(
            AudioLayout(48000, 2, 3), np.arange(6, dtype="<i2").reshape(3, 2), stream="sound", t=40, end=90
        ),
        "imu": message(ImuLayout(3), imu, stream="imu", t=40, end=49),
        "eeg": message(SignalLayout(2, ("Fz", "Cz")), signal_data, stream="eeg", t=40),
        "lidar": message(SweepLayout(4), points, stream="lidar", t=40),
        "words": message(TextLayout(6), "Größ".encode(), stream="words", t=40),
    }


# Round trip.

times = st.integers(-(2**40), 2**53)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda name: not name.startswith("/")
)
layouts = st.one_of(
    st.builds(FrameLayout, st.sampled_from(["bgr8", "rgb8", "gray8", "jpeg"]), st.integers(1, 4), st.integers(1, 4)),
    st.builds(AudioLayout, st.integers(1, 192_000), st.integers(1, 3), st.integers(0, 9)),
    st.builds(ImuLayout, st.integers(0, 4)),
    st.builds(SignalLayout, st.integers(0, 4), st.lists(names, min_size=1, max_size=3).map(tuple)),
    st.builds(SweepLayout, st.integers(0, 4)),
    st.builds(TextLayout, st.integers(0, 20)),
)


@st.composite
def any_messages(draw: Any) -> Message:
    layout = draw(st.none() | layouts)
    start = draw(times)
    header = Header(
        stream=draw(names),
        seq=draw(st.integers(0, 2**40)),
        epoch=draw(times),
        t_capture_ns=start,
        t_end_ns=start + draw(st.integers(0, 10**9)),
        bound_ns=draw(times),
        t_receipt_ns=draw(times),
        t_device_ns=draw(st.none() | st.integers(0, 2**63 - 1)),
        uncertainty_ns=draw(st.integers(0, 10**9)),
        layout=layout,
        health=draw(st.text(max_size=5)),
    )
    if layout is None:
        return Message(header)
    size = nbytes_of(layout)
    return Message(header, draw(st.binary(min_size=size or 0, max_size=30 if size is None else size)))


@given(one=any_messages(), unix_ns=st.sampled_from([0, UNIX]))
def test_a_message_comes_back_byte_for_byte(one: Message, unix_ns: int) -> None:
    schema = recording_schemas.schema_of(one.header.layout)
    stored = recording_schemas.encode(one, unix_ns)
    back = recording_schemas.decode(schema.name, memoryview(stored))
    assert back.header == one.header == recording_schemas.decode_envelope(schema.name, memoryview(stored))
    assert back.data == one.data


@given(values=st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_any_float32_survives_json(values: list[int]) -> None:
    samples = np.zeros(1, IMU_DTYPE)
    bits = np.array(values, np.uint32)
    samples["accel"], samples["gyro"] = bits[:3].view(np.float32), bits[3:].view(np.float32)
    stored = recording_schemas.encode(message(ImuLayout(1), samples), 0)
    assert recording_schemas.decode("sensorium.Imu", memoryview(stored)).data == samples.tobytes()
    assert b"NaN" not in stored
    json.loads(stored)


@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
def test_a_file_gives_back_what_was_written(tmp_path: Path, compression: str) -> None:
    written = [(one, 100 + index) for index, one in enumerate(examples().values())]
    path = write(tmp_path / "deep" / "a.mcap", written, compression=compression)
    assert [(one.header, arrival) for one, arrival in read(path)] == [(one.header, at) for one, at in written]
    for (one, _), (back, _) in zip(written, read(path), strict=True):
        assert back.data == (one.data.tobytes() if isinstance(one.data, np.ndarray) else one.data)
    with RecordingReader(path) as reader:
        assert reader.streams["sound"] == "audio"
        assert reader.info.complete


def test_the_session_is_embedded(tmp_path: Path) -> None:
    info = SessionInfo(
        session="s2",
        unix_ns=UNIX,
        rig="name: größe\n",
        bundle="ab12",
        arrival="capture_end",
        calibrations={"camera": "fx: 1"},
        extra={"file": "a.mp4"},
    )
    writer = RecordingWriter(tmp_path / "a.mcap", info)
    writer.attach("more.bin", b"\x00\x01")
    writer.close()
    with RecordingReader(tmp_path / "a.mcap") as reader:
        assert reader.info == msgspec.structs.replace(info, complete=True)
        assert reader.attachments["more.bin"] == b"\x00\x01"
        assert list(reader.messages()) == []
    assert summarise(tmp_path / "a.mcap")["streams"] == {}


def test_a_session_that_lost_something_says_so(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "a.mcap", SESSION)
    writer.close(complete=False, note="3 messages of camera lost")
    writer.close()
    with RecordingReader(tmp_path / "a.mcap") as reader:
        assert not reader.info.complete
        assert reader.info.note == "3 messages of camera lost"
    with pytest.raises(RecordingError, match="closed"):
        writer.write(examples()["imu"], 0)


def test_an_exception_leaves_a_readable_incomplete_file(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "a.mcap", SESSION)
    writer.write(examples()["imu"], 5)
    with pytest.raises(WireError), writer:
        writer.write(message(TextLayout(2), b"a"), 6)
    with RecordingReader(tmp_path / "a.mcap") as reader:
        assert not reader.info.complete
        assert "WireError" in reader.info.note
        assert len(list(reader.messages())) == 1


def test_messages_and_beats_come_in_log_order_with_ties_by_index(tmp_path: Path) -> None:
    text = [message(TextLayout(1), b"%d" % (n % 10), stream="ab"[n % 2], seq=n // 2, t=n) for n in range(40)]
    arrivals = [(n * 7) % 40 // 2 for n in range(40)]
    written = list(zip(text, arrivals, strict=True))
    written.insert(3, (message(None, stream="a", seq=9, t=1), 0))
    written.insert(4, (message(None, stream="c", seq=9, t=1), 0))
    path = write(tmp_path / "a.mcap", written, chunk_bytes=200)
    expected = sorted(written, key=lambda pair: pair[1])  # stable: ties stay as written
    assert [pair[1] for pair in read(path, beats=True)] == [at for _, at in expected]
    assert [pair[0].header for pair in read(path, beats=True)] == [one.header for one, _ in expected]
    only = [one.header for one, _ in expected if one.header.stream == "a"]
    assert [pair[0].header for pair in read(path, streams=["a"], beats=True)] == only
    assert all(not pair[0].header.is_beat for pair in read(path))
    with RecordingReader(path) as reader:
        assert list(reader.headers(beats=True)) == [(one.header, at) for one, at in read(path, beats=True)]
        assert [header for header, _ in reader.headers(["a"], beats=True)] == only


def test_json_topics_and_labels(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "a.mcap", SESSION) as writer:
        writer.write_json("/manifest", b'{"step": 1}', 7)
        writer.write_json("/mine", b"{}", 8, 6)
        writer.write_label(Label(20, 30, "b"), 30)
        writer.write_label(Label(10, 20, "a"), 31)
    with RecordingReader(tmp_path / "a.mcap") as reader:
        assert list(reader.json("/manifest")) == [(b'{"step": 1}', 7, 7)]
        assert list(reader.json("/mine")) == [(b"{}", 8, 6)]
        assert list(reader.json("/nothing")) == []
        assert reader.labels() == [Label(10, 20, "a"), Label(20, 30, "b")]
        assert reader.topics == ["/label", "/manifest", "/mine"]
        assert reader.streams == {}


# What other programs see.


def protobuf_decoder(schema: Any) -> Any:
    """A decoder made from the schema in the file alone, as any MCAP reader does."""
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(schema.data).file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(schema.name)).FromString


def test_another_reader_decodes_every_message(tmp_path: Path) -> None:
    written = examples()
    path = write(tmp_path / "a.mcap", [(one, 100) for one in written.values()])
    seen: dict[str, Any] = {}
    with path.open("rb") as file:
        for schema, channel, record in make_reader(file, validate_crcs=True).iter_messages():
            assert schema is not None
            assert record.log_time == UNIX + 100
            assert record.publish_time == UNIX + 40
            if schema.encoding == "protobuf":
                seen[channel.topic] = protobuf_decoder(schema)(record.data)
            else:
                seen[channel.topic] = json.loads(record.data)
    assert cv2.imdecode(np.frombuffer(seen["jpeg"].data, np.uint8), cv2.IMREAD_COLOR).shape == (6, 8, 3)
    assert seen["jpeg"].format == "jpeg"
    assert seen["jpeg"].timestamp.ToNanoseconds() == UNIX + 40
    assert (seen["bgr"].encoding, seen["bgr"].step, seen["gray"].encoding) == ("bgr8", 24, "mono8")
    assert seen["bgr"].data == written["bgr"].data.tobytes()
    assert (seen["sound"].format, seen["sound"].sample_rate, seen["sound"].number_of_channels) == ("pcm-s16", 48000, 2)
    assert np.frombuffer(seen["sound"].data, "<i2").tolist() == [0, 1, 2, 3, 4, 5]
    assert [(f.name, f.offset, f.type) for f in seen["lidar"].fields] == [
        ("x", 0, 7), ("y", 4, 7), ("z", 8, 7), ("intensity", 12, 7), ("offset_ns", 16, 6),
    ]  # fmt: skip
    assert seen["lidar"].point_stride == 20
    assert seen["lidar"].data == written["lidar"].data.tobytes()
    assert seen["words"].message == "Größ"
    assert seen["imu"]["offset_ns"] == [0, 5, 9]
    assert np.float32(seen["imu"]["accel_y"][1]) == np.float32(-9.81)
    assert seen["imu"]["accel_z"] == [None, None, None]
    assert seen["imu"]["header"]["t_capture_ns"] == 40
    assert seen["eeg"]["values"]["Cz"][0] is None


@pytest.mark.parametrize("name", sorted(recording_schemas.DATA_FIELD))
def test_the_payload_lies_in_the_field_that_the_schema_names(name: str) -> None:
    schema = recording_schemas._foxglove(name.removeprefix("foxglove."))
    found = {
        field.name: field.number
        for file in descriptor_pb2.FileDescriptorSet.FromString(schema.data).file
        for kind in file.message_type
        if f"{file.package}.{kind.name}" == name
        for field in kind.field
    }
    assert recording_schemas.DATA_FIELD[name] == found["message" if name.endswith("Log") else "data"]
    assert max(found.values()) < recording_schemas.HEADER_FIELD


def test_json_schemas_are_the_plain_kind_that_viewers_parse() -> None:
    schemas = [*recording_schemas.TOPIC_SCHEMAS.values(), recording_schemas.ANY_OBJECT]
    schemas += [recording_schemas.schema_of(layout) for layout in (ImuLayout(1), SignalLayout(1, ("a", "b")))]
    plain = {"boolean", "string", "number", "integer", "object", "array"}

    def check(schema: dict[str, Any]) -> None:
        assert schema["type"] in plain
        if schema["type"] == "object":
            for inner in schema["properties"].values():
                check(inner)
        if schema["type"] == "array":
            assert schema["items"]["type"] in plain - {"array"}

    for schema in schemas:
        body = json.loads(schema.data)
        jsonschema.Draft202012Validator.check_schema(body)
        assert body["type"] == "object"
        check(body)


# Files that are not whole.


class SmallFile(NamedTuple):
    content: bytes
    lines: list[bytes]

    def __repr__(self) -> str:
        return f"SmallFile of {len(self.content)} bytes"


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> SmallFile:
    """A file of six chunks, and its messages."""
    lines = [message(TextLayout(2), b"%02d" % n, stream="words", seq=n, t=n) for n in range(24)]
    path = tmp_path_factory.mktemp("small") / "a.mcap"
    write(path, [(line, n) for n, line in enumerate(lines)], chunk_bytes=320)
    return SmallFile(path.read_bytes(), [line.data for line in lines])


def test_cut_anywhere_a_file_gives_its_whole_chunks(small_file: SmallFile, tmp_path: Path) -> None:
    content, lines = small_file
    path = tmp_path / "a.mcap"
    counts: list[int] = []
    refused: list[str] = []
    for size in range(len(content)):
        path.write_bytes(content[:size])
        try:
            with RecordingReader(path) as reader:
                found = [one.data for one, _ in reader.messages()]
                assert not reader.info.complete
                assert reader.info.session == "s1"
        except RecordingError as error:
            refused.append(str(error))
            continue
        assert found == lines[: len(found)]
        counts.append(len(found))
    assert len(refused) < 200  # only while the head is missing
    assert all(str(path) in text for text in refused)
    assert counts == sorted(counts)
    assert len(set(counts)) >= 6
    assert counts[-1] == len(lines)


@given(data=st.data())
def test_a_damaged_file_never_raises_anything_else(small_file: SmallFile, data: Any, tmp_path_factory: Any) -> None:
    content, lines = small_file
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.mcap"
    path.write_bytes(damaged)
    try:
        with RecordingReader(path) as reader:
            found = [one.data for one, _ in reader.messages(beats=True)]
            reader.labels()
    except RecordingError:
        return
    assert set(found) <= set(lines)


def test_a_tail_of_zeros_is_a_cut_file(small_file: SmallFile, tmp_path: Path) -> None:
    content, _ = small_file
    (tmp_path / "a.mcap").write_bytes(content[: len(content) // 2] + bytes(500))
    with RecordingReader(tmp_path / "a.mcap") as reader:
        assert not reader.info.complete


def test_what_an_incomplete_recording_lacks_is_said(small_file: SmallFile, tmp_path: Path) -> None:
    content, _ = small_file
    path = tmp_path / "a.mcap"
    end = "its end is missing"
    for tail, said in ((b"", end), (bytes(511), end), (bytes(512), f"{end}: its last 512 bytes are zeros, which a")):
        path.write_bytes(content[: len(content) // 2].rstrip(b"\0") + tail)
        with RecordingReader(path) as reader:
            assert lacks(reader).startswith(said)
            assert lacks(reader).endswith(f"; it can be read up to {reader.end_ns / 1e9:.2f} s")
            assert ("zeros" in lacks(reader)) == (len(tail) >= 512)
    gaps = (LostMessages("words", 0, 3, 5), LostMessages("words", 1, 0, 0), Gap(7, 8, "lost", "prediction"))
    for note in ("", "3 messages of words lost"):
        with RecordingWriter(path, SESSION, overwrite=True) as writer:
            for gap in gaps if not note else gaps[:0]:
                writer.write_json(GAP_TOPIC, msgspec.json.encode(gap), 5)
            writer.close(complete=False, note=note)
        with RecordingReader(path) as reader:
            assert lacks(reader) == (note or "it has gaps: predictions 2, words 4")
    with RecordingWriter(path, SESSION, overwrite=True) as writer:
        pass
    assert "incomplete" not in summarise(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"RIFF....WAVE", "no MCAP file"), (b"\x89MCAP0\r\n", "died before"), (b"\x89MC", "died before")],
)
def test_empty_foreign_and_headless_files(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.mcap").write_bytes(content)
    with pytest.raises(RecordingError, match=words):
        RecordingReader(tmp_path / "a.mcap")


def test_a_foreign_mcap_and_a_missing_file(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="no recording of a Sensorium session"):
        RecordingReader(shared_data / "rosbags" / "husky_60s.mcap")
    with pytest.raises(RecordingError, match="cannot be opened"):
        RecordingReader(tmp_path / "nowhere.mcap")
    with pytest.raises(RecordingError, match="cannot be opened"):
        RecordingReader(tmp_path)


KILLED = """
import sys
from tests.test_recording import SESSION, message
from pipeline.messages import TextLayout
from pipeline.recording import RecordingWriter
writer = RecordingWriter(sys.argv[1], SESSION, chunk_bytes=10_000)
for n in range(10**9):
    writer.write(message(TextLayout(5), b"%05d" % (n % 10**5), stream="words", seq=n, t=n), n)
    if n % 100 == 0:
        print(n, writer.bytes_written, flush=True)
"""


def test_a_killed_writer_loses_only_its_last_chunk(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    written, size = 0, 0
    while size < 100_000:
        assert select.select([child.stdout], [], [], 60)[0]
        written, size = map(int, child.stdout.readline().split())
    with RecordingReader(path) as reader:
        by = f", by process {child.pid}" if sys.platform == "linux" else ""
        assert lacks(reader).startswith(f"it is being written at this moment{by}; it can be read up to ")
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    with RecordingReader(path) as reader:
        found = [one.header.seq for one, _ in reader.messages()]
        assert not reader.info.complete
        assert lacks(reader).startswith("its end is missing; ")
    assert found == list(range(len(found)))
    assert len(found) > written - 200  # a chunk holds about 130 of these messages
    assert summarise(path)["complete"] is False


def test_what_is_written_while_a_recording_is_opened_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [message(TextLayout(2), b"%02d" % n, stream="words", seq=n, t=n) for n in range(2)]
    salvage = RecordingReader._salvage
    with RecordingWriter(tmp_path / "a.mcap", SESSION, chunk_bytes=1) as writer:
        writer.write(words[0], 0)

        def late(reader: RecordingReader) -> None:
            writer.write(words[1], 1)
            salvage(reader)

        monkeypatch.setattr(RecordingReader, "_salvage", late)
        with RecordingReader(tmp_path / "a.mcap") as reader:
            assert [one.header.seq for one, _ in reader.messages()] == [0]


def test_a_file_system_without_locks_takes_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with RecordingWriter(tmp_path / "a.mcap", SESSION) as writer:
        writer.write(examples()["imu"], 5)
        writer.flush()
        with RecordingReader(tmp_path / "a.mcap") as reader:
            assert lacks(reader).startswith("its end is missing; ")
    assert summarise(tmp_path / "a.mcap")["complete"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_recording_whose_writer_is_gone_since_it_was_opened_is_not_said_to_lack_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    writer, scan = RecordingWriter(tmp_path / "a.mcap", SESSION), RecordingReader._scan
    writer.write(examples()["imu"], 5)
    writer.flush()

    def late(reader: RecordingReader) -> bool:
        whole = scan(reader)
        if killed:
            writer.write(examples()["imu"], 6)
            writer.flush()
            writer._output.close()
        writer.close()
        return whole

    monkeypatch.setattr(RecordingReader, "_scan", late)
    with RecordingReader(tmp_path / "a.mcap") as reader:
        assert lacks(reader).startswith("it was still being written when it was opened; it can be read up to ")
        assert len(list(reader.messages())) == 1


@pytest.mark.parametrize("begun", [b"", b"\x89MCAP0\r\n"])
def test_a_recording_that_is_just_being_begun_has_no_dead_writer(tmp_path: Path, begun: bytes) -> None:
    with (tmp_path / "a.mcap").open("wb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(begun)
        with pytest.raises(RecordingError, match="it is being written at this moment"):
            RecordingReader(tmp_path / "a.mcap")


def test_a_recording_that_could_not_be_begun_is_not_being_written(tmp_path: Path) -> None:
    wrong: Any = {"rate": 5}
    with pytest.raises(AttributeError):
        RecordingWriter(tmp_path / "a.mcap", SessionInfo(session="s", extra=wrong))
    with pytest.raises(RecordingError, match="its writer died before it began"):
        RecordingReader(tmp_path / "a.mcap")


def test_a_closed_recording_is_not_locked_by_what_was_forked_meanwhile(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "a.mcap", SESSION)
    inherited = os.dup(writer._output._fd)  # as a fork has it
    try:
        writer.close()
        with writer.path.open("rb") as file:
            assert written_now(file.fileno()) == ""
    finally:
        os.close(inherited)


@pytest.mark.skipif(sys.platform != "linux", reason="who has a lock is told by Linux alone")
def test_what_is_being_written_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "a.mcap"
    with whole_file(out) as part, RecordingWriter(part, SESSION, overwrite=True) as writer:
        writer.write(examples()["imu"], 5)
        said = rf"a\.mcap is being written at this moment, by process {os.getpid()}; close that writer first"
        with pytest.raises(RecordingError, match=said), whole_file(out) as second:
            RecordingWriter(second, SESSION, overwrite=True)
    assert summarise(out)["complete"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mcap"]


def test_who_looks_into_a_recording_does_not_keep_it_from_being_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.mcap").write_bytes(b"old" * 1000)
    with (tmp_path / "a.mcap").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with RecordingWriter(tmp_path / "a.mcap", SESSION, overwrite=True) as writer:
            writer.write(examples()["imu"], 5)
    assert summarise(tmp_path / "a.mcap")["complete"]


FORKED = """
import os, sys
from tests.test_recording import SESSION, message
from pipeline.messages import TextLayout
from pipeline.recording import RecordingWriter
writer = RecordingWriter(sys.argv[1], SESSION)
writer.write(message(TextLayout(1), b"a"), 0)
writer.flush()
if os.fork():
    os._exit(0)
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="who has a lock is told by Linux alone")
def test_a_dead_writer_does_not_write_through_what_it_has_forked(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    child = subprocess.Popen([sys.executable, "-c", FORKED, str(path)], stdin=subprocess.PIPE)
    assert child.stdin is not None
    try:
        assert child.wait(60) == 0
        with RecordingReader(path) as reader:
            assert lacks(reader).startswith("its end is missing; ")
    finally:
        child.stdin.close()


FULL = """
import resource, signal, sys
from tests.test_recording import SESSION, message
from pipeline.errors import RecordingError
from pipeline.messages import TextLayout
from pipeline.recording import RecordingWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
writer = RecordingWriter(sys.argv[1], SESSION, chunk_bytes=10_000, compression="none")
try:
    for n in range(10**5):
        writer.write(message(TextLayout(5), b"%05d" % n, stream="words", seq=n, t=n), n)
except RecordingError as error:
    print(n, error)
writer.close()
"""


def test_when_the_disk_is_full_what_was_written_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "cannot be written any further" in result.stdout
    with RecordingReader(path) as reader:
        found = [one.header.seq for one, _ in reader.messages()]
        assert not reader.info.complete
    assert found == list(range(len(found)))
    assert len(found) > int(result.stdout.split()[0]) - 200
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


def test_a_device_that_is_full_at_once() -> None:
    with pytest.raises(RecordingError, match="No space left"):
        RecordingWriter("/dev/full", SESSION, overwrite=True)


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", [])
    with pytest.raises(ConfigError, match="exists already"):
        RecordingWriter(path, SESSION)
    with pytest.raises(RecordingError, match="cannot be created"):
        RecordingWriter(path / "b.mcap", SESSION)


def test_a_chunk_ends_by_age_and_by_request(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "a.mcap", SESSION, chunk_ns=1000)
    writer.write(message(TextLayout(1), b"a", t=0), 0)
    writer.write(message(TextLayout(1), b"b", t=1, seq=1), 999)
    before = writer.bytes_written
    writer.write(message(TextLayout(1), b"c", t=2, seq=2), 1000)
    assert writer.bytes_written > before
    writer.write(message(TextLayout(1), b"d", t=3, seq=3), 1001)
    assert len(read(writer.path)) == 3
    writer.flush()
    assert len(read(writer.path)) == 4
    writer.close()
    assert writer.messages == 4


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "a.mcap", SESSION) as writer:
        refused: list[tuple[type[Exception], Message, int]] = [
            (ValueError, message(TextLayout(1)), 0),
            (WireError, message(TextLayout(2), b"a"), 0),
            (ConfigError, message(TextLayout(1), b"a", stream="/beat"), 0),
            (ValueError, message(TextLayout(1), b"a"), -UNIX - 1),
        ]
        for kind, one, arrival in refused:
            with pytest.raises(kind):
                writer.write(one, arrival)
    assert read(tmp_path / "a.mcap") == []


def test_a_payload_that_changed_in_the_file_is_found() -> None:
    stored = bytearray(recording_schemas.encode(message(TextLayout(5), b"hello"), 0))
    stored[stored.index(b"hello")] ^= 1
    with pytest.raises(SensoriumError, match="hash differs"):
        recording_schemas.decode("foxglove.Log", memoryview(stored))


def test_a_reader_that_was_closed_is_not_a_damaged_file(tmp_path: Path) -> None:
    """As who takes the messages in a `with`, and goes over them behind it, would be told."""
    path = write(tmp_path / "a.mcap", [(message(TextLayout(3), b"abc"), 1)])
    with RecordingReader(path) as reader:
        messages = reader.messages()
    with pytest.raises(RecordingError, match=r"the reader of .*a.mcap was closed before all was read"):
        list(messages)


# Counting.


def test_a_signal_whose_channels_become_others_is_summed_up(tmp_path: Path) -> None:
    written = []
    for seq, names in enumerate((("x", "y"), ("x", "y"), ("a", "b", "c"), ("y", "x"))):
        samples = np.zeros(1, signal_dtype(len(names)))
        samples["value"] = seq
        written.append((message(SignalLayout(1, names), samples, stream="wind", seq=seq, t=seq * 1000), seq * 1000))
    summary = summarise(write(tmp_path / "a.mcap", written))
    wind = summary["streams"]["wind"]
    assert (wind["messages"], wind["channels"], wind["other_channels"]) == (
        4,
        ["x", "y"],
        [["a", "b", "c"], ["y", "x"]],
    )
    assert wind["stats"]["value"]["mean"] == [0.5, 0.5]  # of those of that name alone
    shown = io.StringIO()
    console(shown).print(recording_table(summary))
    assert "wind: `x`, `y`\nwind has other channels later: `a`, `b`, `c`\n" in shown.getvalue()


def test_of_channels_that_become_others_it_is_not_said_that_none_has_a_value(tmp_path: Path) -> None:
    written = []
    for seq, (names, value) in enumerate(((("x", "y"), np.nan), (("a", "b"), 1.0))):
        samples = np.zeros(1, signal_dtype(2))
        samples["value"] = value
        written.append((message(SignalLayout(1, names), samples, stream="wind", seq=seq, t=seq * 1000), seq * 1000))
    for number, said in ((1, True), (2, False)):
        shown = io.StringIO()
        console(shown).print(recording_table(summarise(write(tmp_path / f"{number}.mcap", written[:number]))))
        assert ("wind holds nothing but NaN" in shown.getvalue()) is said


def test_a_recording_of_nothing_says_so(tmp_path: Path) -> None:
    shown = io.StringIO()
    console(shown).print(recording_table(summarise(write(tmp_path / "a.mcap", []))))
    assert "it holds no message" in shown.getvalue()


def test_summary_counts_what_a_small_session_holds(tmp_path: Path) -> None:
    ms = 1_000_000
    written = []
    for seq in (0, 1, 4):
        batch = np.zeros(10, IMU_DTYPE)
        batch["offset_ns"] = np.arange(10) * 10 * ms
        batch["accel"], batch["gyro"] = [3, 0, 4], np.nan
        one = message(ImuLayout(10), batch, stream="imu", seq=seq, t=seq * 100 * ms, end=(seq * 100 + 90) * ms)
        written.append((one, (seq * 100 + 95 + seq) * ms))
    written.append((message(None, stream="imu", seq=6, t=600 * ms), 600 * ms))
    block = np.zeros((480, 1), "<i2")
    written += [
        (
            message(AudioLayout(48000, 1, 480), block, stream="mic", seq=n, t=n * 10 * ms, end=(n + 1) * 10 * ms),
            700 * ms,
        )
        for n in range(3)
    ]
    summary = summarise(write(tmp_path / "a.mcap", written))
    imu = summary["streams"]["imu"]
    assert (summary["duration_s"], summary["complete"], summary["session"]) == (0.49, True, "s1")
    assert (imu["messages"], imu["samples"], imu["gaps"], imu["lost"]) == (3, 30, 2, 3)
    assert imu["max_gap_ms"] == 210
    assert imu["delay_ms"] == {"p50": 6.0, "max": 9.0}
    assert imu["rate_hz"] == pytest.approx(29 / 0.49)
    assert (imu["start_ns"], imu["end_ns"]) == (0, 490 * ms)
    assert imu["stats"]["accel"] == {"mean": [3, 0, 4], "sd": [0, 0, 0], "mean_norm": 5}
    assert imu["stats"]["gyro"] == {"mean": [None] * 3, "sd": [None] * 3, "mean_norm": None}
    mic = summary["streams"]["mic"]
    assert (mic["payload"], mic["samples"], mic["rate_hz"], mic["max_gap_ms"]) == ("audio", 1440, 48000, 0)
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("times_ns", "rate_hz", "said"),
    [
        ([7], None, "–"),
        (range(1000, 1005), None, "at once"),  # one after the other by a nanosecond, as captures must be
        ([0, 1, 2_000_000, 2_000_001], 1500.0, "1500.00 Hz"),
        ([0, 500_000_000], 2.0, "2.00 Hz"),
        ([0, 3_600_000_000_000], 1 / 3600, "1 in 3600 s"),
    ],
)
def test_a_rate_is_said_where_there_is_one(
    tmp_path: Path, times_ns: Sequence[int], rate_hz: float | None, said: str
) -> None:
    texts = [(message(TextLayout(2), b"hi", stream="notes", seq=seq, t=t), t) for seq, t in enumerate(times_ns)]
    path = write(tmp_path / "a.mcap", texts)
    found = summarise(path)
    assert found["streams"]["notes"]["rate_hz"] == (None if rate_hz is None else pytest.approx(rate_hz, rel=1e-4))
    for shown in (recording_table(found), explanation_text(explain(Session(path)))):
        screen = io.StringIO()
        console(screen).print(shown)
        assert f" {said}  " in screen.getvalue()


@given(rows=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=12),
       cut=st.integers(0, 12))  # fmt: skip
def test_moments_do_not_depend_on_batches(rows: list[list[float]], cut: int) -> None:
    from pipeline.recording.summary import _Moments

    values = np.array(rows, np.float32)
    moments = _Moments(3)
    for part in (values[:cut], values[cut:]):
        moments.add(part)
    result = moments.result()
    assert result["mean"] == pytest.approx(values.astype(float).mean(axis=0).tolist(), abs=1e-6)
    assert result["sd"] == pytest.approx(values.astype(float).std(axis=0).tolist(), abs=1e-6)
    assert result["mean_norm"] == pytest.approx(np.linalg.norm(values.astype(float), axis=1).mean())


# -- a file that somebody takes away while it is written ---------------------------------------------------------------


def begun(path: Path) -> RecordingWriter:
    writer = RecordingWriter(path, SessionInfo(session="s"))
    writer.write(message(TextLayout(3), b"abc"), 1)
    writer.flush()
    return writer


def test_a_recording_that_was_deleted_while_it_was_written_is_no_success(tmp_path: Path) -> None:
    writer = begun(tmp_path / "x.mcap")
    (tmp_path / "x.mcap").unlink()
    with pytest.raises(RecordingError, match=r"x\.mcap was deleted while it was written"):
        writer.close()
    writer.close()  # which only lets go of it


def test_a_recording_that_was_emptied_while_it_was_written_fails_at_once(tmp_path: Path) -> None:
    writer = begun(tmp_path / "x.mcap")
    (tmp_path / "x.mcap").write_bytes(b"")
    writer.write(message(TextLayout(3), b"abc", seq=1), 2)
    with pytest.raises(RecordingError, match=r"x\.mcap was cut to 0 of \d+ bytes while it was written"):
        writer.flush()


def test_a_recording_that_was_replaced_while_it_was_written_is_no_success(tmp_path: Path) -> None:
    writer = begun(tmp_path / "x.mcap")
    (tmp_path / "x.mcap").rename(tmp_path / "moved.mcap")
    (tmp_path / "x.mcap").write_bytes(b"another")
    with pytest.raises(RecordingError, match="is no longer the file that was written"):
        writer.close()
    with RecordingReader(tmp_path / "moved.mcap") as reader:
        assert reader.info.complete  # where it is now, it is whole


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    with pytest.raises(RecordingError, match=r"cannot be created: \S+afile is no folder"):
        RecordingWriter(tmp_path / "afile" / "x.mcap", SessionInfo(session="s"))


def test_what_a_writer_is_given_is_held_against_what_it_says(tmp_path: Path) -> None:
    layout = SignalLayout(2, ("load",))
    said = Header(stream="a", seq=0, epoch=0, t_capture_ns=0, t_end_ns=0, bound_ns=0, t_receipt_ns=0, layout=layout)
    with RecordingWriter(tmp_path / "x.mcap", SessionInfo(session="s")) as writer:
        with pytest.raises(WireError, match=r"message a/0 has an array float64 \[3\] .* needs signal_dtype\(1\) \[2\]"):
            writer.write(Message(said, np.zeros(3)), 0)  # as many bytes as the layout says
        with pytest.raises(TypeError, match=r"`arrival_ns` is 0.5, where times are whole numbers of nanoseconds"):
            writer.write(Message(said, bytes(24)), 0.5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"`end_ns` is 3.5"):
            writer.write_label(Label(0, 3.5, "x"), 0)  # type: ignore[arg-type]
        writer.write(Message(said, np.zeros(2, signal_dtype(1))), np.int64(5))  # type: ignore[arg-type]
    with RecordingReader(tmp_path / "x.mcap") as reader:
        assert [at for _, at in reader.messages()] == [5]
