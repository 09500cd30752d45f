"""A ring of recordings: never over its limit, nothing deleted uncounted, no foreign file touched."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.bundle import load_bundle
from pipeline.config import load_rig
from pipeline.errors import ConfigError, RecordingError
from pipeline.explain import Session as Recorded
from pipeline.explain import explain
from pipeline.launch import Session, check_rig_file
from pipeline.messages import IMU_DTYPE, ImuLayout, TextLayout
from pipeline.recording import (
    GAP_TOPIC,
    LABEL_TOPIC,
    MANIFEST_TOPIC,
    PREDICTION_TOPIC,
    RecordingReader,
    Ring,
    RingWriter,
    SessionInfo,
    summarise,
)
from pipeline.recording.ring import SEGMENTS
from pipeline.replay import replay_predictions
from pipeline.verify import verify
from tests.full_disk import Disk
from tests.rigs import STREAMS, make_rig, short_folder
from tests.test_launch import all_ok, running, until
from tests.test_recording import SESSION, message

MB, MS, NS = 1_000_000, 1_000_000, 1_000_000_000
LIMIT = 32 * MB
ROOT = Path(__file__).resolve().parent.parent


def noise(size: int, seed: int = 0) -> bytes:
    """Text that no compression makes smaller than 3/4."""
    return np.random.default_rng(seed).integers(33, 97, size, np.uint8).tobytes()


def ring_writer(folder: Path, limit: int = LIMIT, session: SessionInfo = SESSION, **more: Any) -> RingWriter:
    return RingWriter(Ring(folder, limit), session, 0, **{"segment_ns": 60 * NS, "compression": "none"} | more)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("segment-*.mcap"))


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def kept(folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for path in files(folder):
        with RecordingReader(path) as reader:
            found = Counter(m.header.stream for m, _ in reader.messages())
            assert reader.counts() == found
            counts.update(found)
    return counts


# 12 MB in the least ring would be the same with less of it, so the limit here is one that no rig may set.
@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 200_000), st.integers(0, 2 * NS)), max_size=60),
       st.integers(0, 3))  # fmt: skip
def test_every_message_is_kept_or_counted_as_deleted_and_the_limit_holds(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[str, int, int]], sessions: int
) -> None:
    folder, limit = tmp_path_factory.mktemp("ring"), 4 * MB
    written: Counter[str] = Counter()
    parts = [sizes[i :: sessions + 1] for i in range(sessions + 1)]
    for part in parts:
        writer, at = ring_writer(folder, limit, segment_ns=10 * NS), 0
        numbers: Counter[str] = Counter()
        for stream, size, pause in part:
            at += pause
            writer.write(message(TextLayout(size), noise(size), stream=stream, seq=numbers[stream], t=at), at)
            numbers[stream] += 1
            assert total(folder) <= limit
        writer.close()
        written += numbers
        assert total(folder) <= limit
    assert kept(folder) + Counter(writer.ring.deleted.messages) == written
    with RecordingReader(files(folder)[-1]) as reader:
        assert reader.info.ring is not None
        assert reader.info.ring.deleted == writer.ring.deleted
    assert [int(path.name.split("-")[1]) for path in files(folder)] == list(
        range(writer.ring.deleted.segments + 1, writer.ring.deleted.segments + len(files(folder)) + 1)
    )


def test_a_segment_ends_by_age_and_none_of_its_beginning_is_called_lost(tmp_path: Path) -> None:
    writer = ring_writer(tmp_path, segment_ns=NS)
    batch = np.zeros(1, IMU_DTYPE)
    for i in range(40):
        if i not in (19, 20, 25):  # two lost where a segment ends, and one within the next
            writer.write(message(ImuLayout(1), batch.tobytes(), stream="imu", seq=i, t=i * NS // 10), i * NS // 10)
    writer.write(message(TextLayout(1), b"x", stream="late", seq=2, t=4 * NS), 4 * NS)
    writer.close()
    assert writer.note == f"{files(tmp_path)[-1]}, and the 3 segments before it"
    assert [summarise(path)["streams"].get("imu", {}).get("lost") for path in files(tmp_path)] == [0, 0, 3, 0]
    assert summarise(files(tmp_path)[-1])["streams"]["late"]["lost"] == 2  # it had not begun before
    with RecordingReader(files(tmp_path)[1]) as reader:
        assert reader.info.since == {"imu": (0, 10)}


def test_a_later_life_of_a_recorder_does_not_know_what_it_missed(tmp_path: Path) -> None:
    writer = ring_writer(tmp_path, session=msgspec.structs.replace(SESSION, since={"a": None}))
    writer.write(message(TextLayout(1), b"x", stream="a", seq=70), 0)
    writer.write(message(TextLayout(1), b"x", stream="a", seq=72), 0)
    writer.close()
    assert summarise(files(tmp_path)[0])["streams"]["a"]["lost"] == 1


def test_what_a_segment_lost_is_said_by_that_segment(tmp_path: Path) -> None:
    said = iter([["3 messages could not be recorded"], []])
    writer = ring_writer(tmp_path, segment_ns=NS, account=lambda: next(said))
    for i in range(3):
        writer.write(message(TextLayout(1), b"x", stream="a", seq=i, t=i * NS), i * NS)
    writer.close()
    with RecordingReader(files(tmp_path)[0]) as first, RecordingReader(files(tmp_path)[1]) as second:
        assert (first.info.complete, first.info.note) == (False, "3 messages could not be recorded")
        assert second.info.complete


def test_foreign_files_are_neither_touched_nor_counted(tmp_path: Path) -> None:
    mine = ring_writer(tmp_path)
    mine.close()
    foreign = {
        "segment-000900-20260101T000000Z.mcap": noise(5 * MB),  # our name, but no recording
        "segment-000901-20260101T000000Z.mcap": files(tmp_path)[0].read_bytes(),  # a copy under another number
        "segment-000902-20260101T000000Z.mcap": b"",
        "holiday.mcap": noise(MB),
        "notes.txt": b"mine",
    }
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
    writer = ring_writer(tmp_path, 4 * MB)
    assert writer.path.name.startswith("segment-000903-")
    assert len(writer.ring.strangers) == 3
    assert "left alone and not counted" in writer.note
    for i in range(80):
        writer.write(message(TextLayout(100_000), noise(100_000), stream="a", seq=i, t=i), i)
    writer.close()
    assert writer.ring.deleted.segments > 5
    assert "the ring has deleted" in writer.note
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == foreign


def test_a_ring_has_one_recorder(tmp_path: Path) -> None:
    first = Ring(tmp_path / "a" / "ring", LIMIT)
    with pytest.raises(RecordingError, match="another recorder"):
        Ring(tmp_path / "a" / "ring", LIMIT)
    first.close()
    Ring(tmp_path / "a" / "ring", LIMIT).close()
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match="cannot hold a ring"):
        Ring(tmp_path / "file", LIMIT)


def test_what_is_larger_than_the_ring_takes_is_refused_alone(tmp_path: Path) -> None:
    writer = ring_writer(tmp_path, 4 * MB)
    size = 4 * MB // SEGMENTS
    with pytest.raises(ValueError, match="more than a ring"):
        writer.write(message(TextLayout(size), noise(size), stream="a"), 0)
    writer.write(message(TextLayout(1), b"x", stream="a", seq=1), 0)
    writer.close()
    assert kept(tmp_path) == {"a": 1}


KILLED = """
import os, sys
from pathlib import Path
from pipeline.recording import Ring, RingWriter
from tests.test_ring import SESSION, TextLayout, message, noise
writer = RingWriter(Ring(Path(sys.argv[1]), 4_000_000), SESSION, 0, segment_ns=60 * 10**9, compression="none")
data = noise(60_000)
for i in range(10**9):
    writer.write(message(TextLayout(len(data)), data, stream="a", seq=i, t=i), i)
    if i == 150:
        print("around", flush=True)
"""


def test_killed_at_any_moment_the_ring_goes_on_with_every_count(tmp_path: Path) -> None:
    """A process that writes as fast as it can, killed again and again, often in the middle of making room."""
    deleted = 0
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as one:
            assert one.stdout is not None
            assert one.stdout.readline() == b"around\n"
            one.kill()
        assert total(tmp_path) <= 4 * MB
        ring = Ring(tmp_path, 4 * MB)
        assert ring.deleted.segments > deleted
        assert ring.strangers == []
        deleted = ring.deleted.segments
        ring.close()
        numbers = [int(path.name.split("-")[1]) for path in files(tmp_path)]
        assert numbers == list(range(deleted + 1, deleted + len(numbers) + 1))
        for path in files(tmp_path)[:-1]:
            with RecordingReader(path) as reader:
                seqs = [m.header.seq for m, _ in reader.messages()]
                assert reader.info.since is None or seqs[0] == (reader.info.since["a"] or (0, -1))[1]
                assert seqs == list(range(seqs[0], seqs[0] + len(seqs)))


def test_a_kill_between_the_count_and_the_deletion_counts_once(tmp_path: Path) -> None:
    writer = ring_writer(tmp_path, 4 * MB)
    first = files(tmp_path)[0]
    copy = None
    for i in range(60):
        writer.write(message(TextLayout(100_000), noise(100_000), stream="a", seq=i, t=i), i)
        copy = first.read_bytes() if first.exists() else copy
    writer.close()
    assert copy is not None
    first.write_bytes(copy)  # as if its deletion had not been reached
    again = Ring(tmp_path, 4 * MB)
    assert again.deleted == writer.ring.deleted
    assert not first.exists()
    again.close()


def test_segments_that_somebody_else_has_deleted_are_said_to_be_and_not_counted(tmp_path: Path) -> None:
    def fill(writer: RingWriter, first: int, count: int) -> None:
        for i in range(first, first + count):
            writer.write(message(TextLayout(100_000), noise(100_000), stream="a", seq=i, t=i), i)

    writer = ring_writer(tmp_path, 4 * MB)
    fill(writer, 0, 20)
    assert "not there" not in writer.note
    files(tmp_path)[0].unlink()  # the oldest, which the ring itself would have deleted next
    fill(writer, 20, 30)
    assert writer.ring.missing == [1]
    assert "segment 1 is not there, deleted or moved by somebody else" in writer.note
    writer.close()
    there = [int(path.name.split("-")[1]) for path in files(tmp_path)]
    deleted = writer.ring.deleted
    assert deleted.segments == there[0] - 2  # all that are gone but the first
    files(tmp_path)[2].unlink()
    files(tmp_path)[1].unlink()
    again = ring_writer(tmp_path, 4 * MB)
    assert again.ring.missing == there[1:3]
    assert f"segments {there[1]}, {there[2]} are not there" in again.note
    again.close()


@pytest.mark.parametrize(("record", "said"), [
    ({"path": "out.mcap", "limit_mb": 100}, "name a folder"), ({"path": "{time}", "limit_mb": 100}, "name a folder"),
    ({"path": "ring", "limit_mb": 31}, "at least 32"), ({"path": "ring", "limit_mb": 32}, "limit_mb: 100"),
    ({"path": "ring", "limit_mb": 100, "segment_s": 0.5}, "at least 1"),
])  # fmt: skip
def test_what_makes_no_ring_is_refused(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_rig_file(make_rig(tmp_path, sources={"camera": {"kind": "camera"}}, bundle=False, record=record))


def test_a_disk_that_is_smaller_than_the_ring_is_noted(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, bundle=False, record={"path": "ring", "limit_mb": 10**9})
    assert any("its disk has room for" in note for note in check_rig_file(rig))


def test_that_another_recorder_is_at_work_in_a_ring_is_noted(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, bundle=False, record={"path": "ring", "limit_mb": 32})
    assert check_rig_file(rig) == []
    writer = ring_writer(tmp_path / "ring")
    (tmp_path / "ring" / "segment-000007-20260101T000000Z.mcap").symlink_to("gone")  # as one that is deleted meanwhile
    assert ["is written to by another recorder now" in note for note in check_rig_file(rig)] == [True]
    writer.close()
    assert check_rig_file(rig) == []


# -- a full disk -------------------------------------------------------------------------------------------------------


def said_lost(folder: Path) -> Counter[tuple[str, int]]:
    """The numbers of messages that the segments' gap records name, and how often."""
    found: Counter[tuple[str, int]] = Counter()
    for path in files(folder):
        with RecordingReader(path) as reader:
            for data, _, _ in reader.json(GAP_TOPIC) if GAP_TOPIC in reader.topics else ():
                gap = msgspec.json.decode(data)
                found.update((gap["stream"], seq) for seq in range(gap["from"], gap["to"] + 1) if "stream" in gap)
    return found


steps = st.tuples(st.sampled_from("ab"), st.integers(1, 150_000), st.integers(0, NS)) | st.integers(0, 800_000)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(steps, max_size=60))
def test_a_full_disk_costs_what_comes_meanwhile_and_every_message_is_kept_or_said_to_be_lost(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int] | int]
) -> None:
    folder, numbers, at = tmp_path_factory.mktemp("ring"), Counter[str](), 0
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        writer = ring_writer(folder, 16 * MB, segment_ns=10 * NS)
        for step in steps:
            if isinstance(step, int):
                disk.free = step if step < 600_000 else 1 << 40
                continue
            stream, size, pause = step
            at += pause
            writer.write(message(TextLayout(size), noise(size), stream=stream, seq=numbers[stream], t=at), at)
            numbers[stream] += 1
        disk.free = 1 << 40
        writer.close()
    assert writer.ring.deleted.segments == 0
    lost = writer.losses.messages
    assert kept(folder) + lost == numbers
    assert writer.messages == (numbers - lost).total()
    there = set()
    for path in files(folder):
        with RecordingReader(path) as reader:
            there |= {(m.header.stream, m.header.seq) for m, _ in reader.messages()}
    missing = {(s, seq) for s, count in numbers.items() for seq in range(count)} - there
    assert said_lost(folder) == Counter(missing)
    with RecordingReader(files(folder)[-1]) as reader:
        assert reader.info.complete is (not reader.info.note)
    facts = [summarise(path) for path in files(folder)]
    assert bool(missing) is any("nothing was recorded from" in one.get("note", "") for one in facts)
    assert sum(stream["lost"] for one in facts for stream in one["streams"].values()) <= len(missing)
    assert [int(path.name.split("-")[1]) for path in files(folder)] == list(range(1, len(files(folder)) + 1))


def numbers_in(path: Path) -> dict[str, list[int]]:
    """The numbers of the messages, windows and predictions in a segment."""
    with RecordingReader(path) as reader:
        made = {topic: [msgspec.json.decode(data) for data, _, _ in reader.json(topic)]
                for topic in (MANIFEST_TOPIC, PREDICTION_TOPIC)}  # fmt: skip
        return {
            "a": [m.header.seq for m, _ in reader.messages()],
            "window": [found["step"] for found in made[MANIFEST_TOPIC]],
            "prediction": [found["window"]["index"] for found in made[PREDICTION_TOPIC]],
        }


def test_a_ring_goes_on_once_there_is_room_again_and_states_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, writer = Disk(monkeypatch), ring_writer(tmp_path, 4 * MB)

    def write(numbers: range) -> None:
        for k in numbers:  # every 100 ms; a second is a chunk
            at_ns = k * NS // 10
            writer.write(message(TextLayout(9), noise(9), stream="a", seq=k, t=at_ns), at_ns)
            writer.write_json(MANIFEST_TOPIC, b'{"step":%d}' % k, at_ns)
            writer.write_json(PREDICTION_TOPIC, b'{"window":{"index":%d}}' % (k - 1), at_ns)

    write(range(30))
    disk.free = 0
    write(range(30, 60))
    assert len(files(tmp_path)) == 1
    assert writer.note.startswith("nothing is recorded until there is room on the disk; ")
    assert writer.warnings[-1].startswith(f"no room is left on the disk of {tmp_path}, and nothing is recorded from 2.")
    assert writer.losses.until_ns is None
    writer.write_json(LABEL_TOPIC, b'{"label":"calm","start_ns":0,"end_ns":1}', 6 * NS)
    disk.free = 3 * MB
    write(range(60, 75))
    writer.close(complete=False, note="so many could not be recorded")
    first, second = files(tmp_path)
    assert f"no room was left on the disk; since then it is, in {second}." in writer.warnings[-1]
    before, after = numbers_in(first), numbers_in(second)
    lost = {name: (before[name][-1] + 1, after[name][0] - 1) for name in before}
    assert all(15 < start < 30 < 55 < end < 75 for start, end in lost.values())
    with RecordingReader(second) as reader:
        gaps = [msgspec.json.decode(data) for data, _, _ in reader.json(GAP_TOPIC)]
        assert reader.info.since == {"a": (0, lost["a"][0])}
        said, other = reader.info.note.split("; ")
        assert re.fullmatch(r"nothing was recorded from 2\.\d s to [67]\.\d s of the session: .* on the disk", said)
        assert other == "so many could not be recorded"
        assert [label.label for label in reader.labels()] == ["calm"]
    assert {gap.get("stream", gap.get("of", "window")): (gap["from"], gap["to"]) for gap in gaps} == lost
    counts = {name: end - start + 1 for name, (start, end) in lost.items()}
    assert summarise(second)["streams"]["a"]["lost"] == writer.losses.messages["a"] == counts["a"]
    assert (writer.losses.windows, writer.losses.predictions) == (counts["window"], counts["prediction"])
    assert writer.messages == 75 - counts["a"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_has_no_room_for_one_more_file_does_not_end_a_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """Its files are counted, or its folder cannot grow."""
    make, refused = os.open, list[str]()

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_CREAT:
            refused.append(os.fspath(path))
            raise OSError(error, os.strerror(error), path)
        return make(path, flags, *more)

    writer = ring_writer(tmp_path, 4 * MB, segment_ns=2 * NS)
    for k in range(9):
        with monkeypatch.context() as patch:
            if 2 <= k < 6:
                patch.setattr(os, "open", refuse)
            writer.write(message(TextLayout(9), noise(9), stream="a", seq=k, t=k * NS), k * NS)
    writer.close()
    lost = writer.losses.messages["a"]
    assert len(refused) == lost == 4
    assert kept(tmp_path)["a"] == 9 - lost
    assert said_lost(tmp_path) == Counter({("a", k): 1 for k in range(2, 6)})


def test_what_grows_beyond_what_is_allowed_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    writer = ring_writer(tmp_path, 4 * MB)
    disk.free, disk.error = 0, errno.EFBIG
    with pytest.raises(RecordingError, match="cannot be written any further"):
        writer.write(message(TextLayout(100_000), noise(100_000), stream="a"), 0)
    writer.ring.close()


# -- whole sessions ----------------------------------------------------------------------------------------------------


def record_into(folder: Path) -> dict[str, Any]:
    return {"path": str(folder), "limit_mb": 32, "segment_s": 1.0}


@pytest.mark.slow
def test_a_killed_recorder_and_a_second_session_go_on_in_the_same_ring(tmp_path: Path) -> None:
    folder = tmp_path / "ring"
    before = ring_writer(folder)  # an older session's, so that there is something to delete
    for i in range(300):
        before.write(message(TextLayout(100_000), noise(100_000), stream="old", seq=i, t=i), i)
    before.close()
    old = kept(folder)["old"] + before.ring.deleted.messages.get("old", 0)
    assert old == 300
    (folder / "mine.txt").write_text("mine")
    with running(tmp_path, record=record_into(folder)) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        oldest = files(folder)[-1].name
        until(lambda: sum(path.name > oldest for path in files(folder)) > 1, "segments")
        newest = files(folder)[-1].name
        os.kill(watched.pid("record"), signal.SIGKILL)
        until(lambda: sum(path.name > newest for path in files(folder)) > 2, "segments after it")
    mine = [path for path in files(folder) if path.name >= oldest]
    states = [check_segment(path, tmp_path / "model") for path in mine]
    assert states.count("") >= 1  # before the kill
    assert sum("part 2" in state for state in states) >= 2
    assert states.count("killed") == 1
    with short_folder() as root:
        again = Session(load_rig(tmp_path / "rig.yaml"), root=root)
        with again:
            until(lambda: again.status().nodes["record"].counters.get("messages", 0) > 50, "the next session records")
    numbers = [int(path.name.split("-")[1]) for path in files(folder)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert total(folder) <= LIMIT
    with RecordingReader(files(folder)[-1]) as reader:
        assert reader.info.session == again.id
        assert reader.info.ring is not None
        assert kept(folder)["old"] + reader.info.ring.deleted.messages["old"] == old
    assert (folder / "mine.txt").read_text() == "mine"


def check_segment(path: Path, bundle: Path) -> str:
    """Every command that takes a recording takes a segment: no false loss, the account balances, nothing differs.
    Returns what the segment says of itself: "" is whole."""
    facts = summarise(path)
    assert all(stream["lost"] == 0 for stream in facts["streams"].values()), facts
    found = explain(Recorded(path))
    for name, told in found.streams.items():
        assert told.balanced, (path.name, name, told.messages, told.unaccounted)
        assert told.messages["lost"] == 0, (path.name, name, told.messages)
        # The last file of a session can end before its first window: it does not say what became of its messages.
        assert ("late" in told.messages) == bool(found.windows), (path.name, name, told.messages)
        # Of the camera, which is faster than the steps, every third frame can serve none.
        assert not told.messages.get("late") or name == "camera", (path.name, name, told.messages)
    if facts["streams"]:  # killed before its first chunk, it has none
        list(replay_predictions(path, load_bundle(bundle)))
    if set(facts["streams"]) == set(STREAMS) and len(found.causes):
        verified = verify(path, load_bundle(bundle))
        assert verified.first_difference is None
        with RecordingReader(path) as reader:
            whole = reader.info.complete
        assert verified.holds or not verified.windows or not whole, (path.name, verified.unverifiable)
    with RecordingReader(path) as reader:
        return reader.info.note or ("" if reader.info.complete else "killed")


@pytest.mark.slow
def test_a_full_disk_ends_the_recording_in_one_sentence_and_the_session_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "ring"
    with running(tmp_path, record=record_into(folder)) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        until(lambda: len(files(folder)) > 1, "segments")
        resource.prlimit(watched.pid("record"), resource.RLIMIT_FSIZE, (40_000, 40_000))
        until(lambda: watched.saw("record", "gave_up"), "the recorder gives up")
        after = watched.next_prediction().window.index
        watched.predict_until(lambda p: p.window.index > after + 5 and all_ok(p), "predictions go on")
    [text] = [event.text for event in watched.events if (event.node, event.kind) == ("record", "died")]
    [said] = [line for line in text.splitlines() if line.startswith("error:")]
    assert "Make room and start again" in said
    assert "Traceback" not in text
    for path in files(folder):
        summarise(path)


@pytest.mark.slow
def test_the_command_says_what_was_deleted_and_info_takes_a_segment(tmp_path: Path) -> None:
    folder = tmp_path / "ring"
    before = ring_writer(folder)
    for i in range(320):
        before.write(message(TextLayout(100_000), noise(100_000), stream="old", seq=i, t=i), i)
    before.close()
    make_rig(tmp_path, bundle=False, record=record_into(folder))
    command = [Path(sys.executable).parent / "sensorium", "record", tmp_path / "rig.yaml", "--duration", "2"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    assert "the ring has deleted" in result.stderr, result.stderr
    assert "old " in result.stderr
    shown = subprocess.run(
        [str(command[0]), "info", str(files(folder)[-1]), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(shown.stdout)["ring"]["deleted"]["messages"]["old"] > 0
    text = subprocess.run([str(command[0]), "info", str(files(folder)[-1])], capture_output=True, text=True, check=True)
    assert "of a ring; deleted before it began" in text.stdout


def test_a_file_that_is_named_is_no_ring(tmp_path: Path) -> None:
    from pipeline.commands.live import _record_entry

    rig = make_rig(tmp_path, record={"path": "ring", "limit_mb": 200})
    entry = _record_entry(rig, tmp_path / "one.mcap")
    assert entry.limit_bytes is None
