"""Labels and attributes of sessions, from recordings and from the tables beside them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, RecordingError
from pipeline.labels import (
    checked,
    known_labels,
    look_alike,
    read_sessions,
    session_attributes,
    session_labels,
    told_labels,
)
from pipeline.messages import Header, Message
from pipeline.recording import Label, RecordingReader, RecordingWriter, SessionInfo

NS = 1_000_000_000


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Three seconds of nothing, labelled."""
    path = tmp_path / "walk.mcap"
    with RecordingWriter(path, SessionInfo(session="walk", extra={"person": "ada", "day": "1"})) as writer:
        writer.write_label(Label(2 * NS, 3 * NS, "stand"), 0)
        writer.write_label(Label(0, 2 * NS, "walk"), 0)
    return path


def test_labels_of_the_recording_in_order(recording: Path) -> None:
    assert session_labels(recording) == [Label(0, 2 * NS, "walk"), Label(2 * NS, 3 * NS, "stand")]
    with pytest.raises(RecordingError, match=r"`stand` from 2.000 s to 3.000 s is none of `walk`, `run`"):
        session_labels(recording, ("walk", "run"))


def test_the_sidecar_wins(recording: Path) -> None:
    sidecar = recording.with_name("walk.labels.csv")
    sidecar.write_text("start_s,end_s,label\n0.5,1.25,run\n")
    assert session_labels(recording) == [Label(NS // 2, 5 * NS // 4, "run")]
    sidecar.write_text("start_s,end_s,label\n0,2,run\n1.5,3,walk\n")
    with pytest.raises(
        RecordingError, match=r"walk.labels.csv: the label `walk` from 1.500 s to 3.000 s overlaps `run`"
    ):
        session_labels(recording)
    sidecar.write_text("start_s,end_s,label\n")
    with pytest.raises(RecordingError, match=r"walk.labels.csv has no labels, and hides .* of its own \(2\). Remove"):
        session_labels(recording)
    sidecar.write_text("")
    with pytest.raises(RecordingError, match=r"walk.labels.csv has no labels, and hides .* of its own \(2\). Remove"):
        session_labels(recording)
    sidecar.write_text("0,3,clear\n")
    with pytest.raises(
        ConfigError, match=r"walk.labels.csv, line 1 is `0,3,clear`; it must be the heading, with .*`start_s,end"
    ):
        session_labels(recording)
    sidecar.write_text("start_s,end_s,label\n2,1,run\n")
    with pytest.raises(ConfigError, match=r"walk.labels.csv, line 2: it begins at 2 s and ends at 1 s"):
        session_labels(recording)


def test_a_sidecar_of_another_unit_or_session(recording: Path) -> None:
    beat = Header(stream="a", seq=0, epoch=0, t_capture_ns=0, t_end_ns=0, bound_ns=0, t_receipt_ns=0)
    with RecordingWriter(recording, SessionInfo(session="walk"), overwrite=True) as writer:
        writer.write(Message(beat), 3 * NS)
    sidecar = recording.with_name("walk.labels.csv")
    sidecar.write_text("start_s,end_s,label\n0,2000,walk\n2000,3000,stand\n")
    with pytest.raises(
        RecordingError,
        match=r"walk.labels.csv: the label `stand` from 2000.000 s to 3000.000 s begins after the session's end at "
        r"3.000 s; correct .* are these milliseconds\?",
    ):
        session_labels(recording)
    sidecar.write_text("start_s,end_s,label\n0,2,walk\n1795914110,1795914112,stand\n")
    with pytest.raises(RecordingError, match=r"after the session's end at 3.000 s; .* its own session$"):
        session_labels(recording)
    sidecar.write_text("start_s,end_s,label\n-9,-8,walk\n2,3,stand\n")
    with pytest.raises(
        RecordingError, match=r"walk.labels.csv: the label `walk` from -9.000 s to -8.000 s ends before"
    ):
        session_labels(recording)
    sidecar.write_text("start_s,end_s,label\n-9,2,walk\n2,3,stand\n")
    assert len(session_labels(recording)) == 2
    sidecar.write_text("start_s,end_s,label\n0,2,walk\n2,99,stand\n")  # till the end, whenever that is
    assert session_labels(recording)[-1] == Label(2 * NS, 99 * NS, "stand")
    sidecar.write_text("start_s,end_s,label\n0,3,walk\n3.0,3.1,stand\n")
    assert len(session_labels(recording)) == 2


def test_a_decimal_comma_is_no_label(recording: Path) -> None:
    sidecar = recording.with_name("walk.labels.csv")
    sidecar.write_text("start_s,end_s,label\n0,2,5,walk\n")
    with pytest.raises(
        ConfigError, match=r"walk.labels.csv, line 2: `0,2,5,walk` has 4 values, .* 3 columns; .* with a point"
    ):
        session_labels(recording)
    sidecar.write_text('start_s, end_s, label\n0, 2.5, "walk, slow"\n')
    assert session_labels(recording) == [Label(0, 5 * NS // 2, "walk, slow")]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (Label(NS, NS, "a"), "ends before it begins"),
        (Label(2 * NS, NS, "a"), "ends before it begins"),
        (Label(0, NS, ""), "has no name"),
        (Label(5 * NS + 1, 6 * NS, "a"), "begins after the session's end at 4.000 s"),
    ],
)
def test_a_label_that_means_nothing(label: Label, said: str) -> None:
    with pytest.raises(RecordingError, match=f"^here: .*{said}"):
        checked([label], "here", end_ns=4 * NS)


def test_a_label_may_be_rounded_beyond_the_end() -> None:
    late = Label(5 * NS, 6 * NS, "a")
    assert checked([late], "here", end_ns=4 * NS) == [late]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=6))
def test_what_passes_has_one_truth_at_every_moment(spans: list[tuple[int, int]]) -> None:
    labels = [Label(start, start + length, f"l{i}") for i, (start, length) in enumerate(spans)]
    alone = all(sum(label.start_ns <= t < label.end_ns for label in labels) <= 1 for t in range(50))
    try:
        found = checked(labels, "here")
    except RecordingError:
        assert not alone
    else:
        assert alone
        assert found == sorted(labels, key=lambda label: label.start_ns)


def test_a_line_without_the_ending_of_its_file(recording: Path) -> None:
    recording.with_name("sessions.csv").write_text("file,person\nwalk,bob\n")
    with pytest.raises(ConfigError, match=r"sessions.csv has a line for `walk`, .* write `walk.mcap`"):
        session_attributes(recording)


def test_labels_that_are_nearly_the_same_are_found() -> None:
    def spans(*names: str) -> list[Label]:
        return [Label(i * NS, (i + 1) * NS, name) for i, name in enumerate(names)]

    usual = {f"s{i}": spans("clear", "left1", "mop", "wash_hands", "Run") for i in (1, 2)}
    for slip, meant in {"claer": "clear", "cleer": "clear", "Clear": "clear", "clears": "clear", "cler": "clear",
                        "wash hands": "wash_hands", "run": "Run"}.items():  # fmt: skip
        assert look_alike(usual | {"s3": spans(slip, meant)}) == [(slip, meant, "s3")]
    for other in ("left2", "mow", "clean_up", "tilt"):
        assert look_alike(usual | {"s3": spans(other)}) == []
    assert look_alike(usual | {"s3": spans("claer"), "s4": spans("claer")}) == []  # twice is no slip


def test_attributes_from_the_recording_and_the_table(recording: Path) -> None:
    assert session_attributes(recording) == {"person": "ada", "day": "1"}
    table = recording.with_name("sessions.csv")
    table.write_text("file, person ,room\nwalk.mcap, bob ,lab\nother.mcap,eve,hall\n")
    assert session_attributes(recording) == {"person": "bob", "day": "1", "room": "lab"}
    table.write_text("file,person\nother.mcap,eve\n")
    assert session_attributes(recording)["person"] == "ada"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name,person\nwalk.mcap,bob\n",
            "csv, line 1 is `name,person`; it must be the heading, with the column `file`",
        ),
        ("file;person\nwalk.mcap;bob\n", "csv, line 1: the columns are separated by semicolons, and must be by commas"),
        ("file,person,person\n", "csv, line 1: the heading has the column `person` twice"),
        ("\n\nperson\nbob\n", "csv, line 3 is `person`; it must be the heading"),
        ("file,person,,\nwalk.mcap,bob,,\n", "csv, line 1: 2 columns of the heading `file,person,,` have no name"),
        ('file,person\n\nwalk.mcap,"bob\nrun.mcap,eve\n', "csv, line 3: a quote .* has no other"),
        ('file,person\nwalk.mcap,"bo"b\n', "csv, line 2: a quote .* is not the last sign of its value"),
        (f'file,person\nwalk.mcap,"bob\n{"x" * 200_000}\n', "csv, line 2: a quote .* has no other"),
        (
            "file,person\n\nwalk.mcap\n",
            "csv, line 3: `walk.mcap` has 1 value, and the heading 2 columns; write a value",
        ),
        ("file,person\nwalk.mcap;bob\n", "csv, line 2: `walk.mcap;bob` has 1 value, .*; separate values by commas"),
        ("file,person\nwalk.mcap,bob,2\n", "csv, line 2: `walk.mcap,bob,2` has 3 values, and the heading 2 columns"),
        ("file,person\n,bob\n", "csv, line 2: it names no `file`"),
        ("file,person\nwalk.mcap,bob\nwalk.mcap,eve\n", "line 3: `walk.mcap` has a line already"),
        ("file,person\nwalk.mcap,bob\n\nwalk.mcap,eve\n", "line 4: `walk.mcap` has a line already, which is line 2;"),
        ("", r"sessions.csv is empty; .* a line file,… with one more column .* Write that, or remove it"),
        ("\ufeff\n \n", "sessions.csv is empty"),
    ],
)
def test_a_wrong_table(tmp_path: Path, text: str, said: str) -> None:
    table = tmp_path / "sessions.csv"
    table.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_sessions(table)


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    table = tmp_path / "sessions.csv"
    table.write_bytes("file,person\nwalk.mcap,bob\nrun.mcap,J\u00f6rg\n".encode("latin-1"))
    with pytest.raises(
        ConfigError, match=r"sessions.csv, line 3: the byte 0xf6 is not UTF-8, .* Save it anew in UTF-8"
    ):
        read_sessions(table)
    with pytest.raises(ConfigError, match=r"none.csv: there is no such file. Did you mean `sessions.csv`\?$"):
        read_sessions(tmp_path / "none.csv")
    table.write_text("\ufefffile,person\r\nwalk.mcap,J\u00f6rg\r\n", encoding="utf-8")
    assert read_sessions(table) == {"walk.mcap": {"person": "J\u00f6rg"}}
    table.write_text('\n\nfile,person\n\nwalk.mcap,"Jo ""5"" x" \nrun.mcap,5" y\n')
    assert read_sessions(table) == {"walk.mcap": {"person": 'Jo "5" x'}, "run.mcap": {"person": '5" y'}}


def test_what_is_no_table_in_its_place_is_said(recording: Path) -> None:
    table = recording.with_name("sessions.csv")
    for make, unmake, what in (
        (table.mkdir, table.rmdir, "a folder"),
        (lambda: table.symlink_to("gone.csv"), table.unlink, "a link to what is not there, gone.csv"),
        (lambda: os.mkfifo(table), table.unlink, "a pipe or a device"),
    ):
        make()
        with pytest.raises(ConfigError, match=rf"sessions.csv is {what}; .* Rename or remove it\.$"):
            session_attributes(recording)
        unmake()
    assert session_attributes(recording) == {"person": "ada", "day": "1"}


def test_what_is_no_table_of_labels_in_its_place_is_said(recording: Path) -> None:
    sidecar = recording.with_suffix(".labels.csv")
    sidecar.unlink(missing_ok=True)
    for make, unmake, what in (
        (sidecar.mkdir, sidecar.rmdir, "a folder"),
        (lambda: sidecar.symlink_to("gone.csv"), sidecar.unlink, "a link to what is not there, gone.csv"),
    ):
        make()
        with RecordingReader(recording) as reader:
            for ask in (session_labels, known_labels, told_labels):
                with pytest.raises(ConfigError, match=rf"labels.csv is {what}; .* Rename or remove it\.$"):
                    ask(reader)
        unmake()


def test_a_table_that_nobody_may_read(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = recording.with_name("sessions.csv")
    table.write_text("file,person\n")

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigError, match=r"sessions.csv cannot be read: you may not .*: chmod a\+r .*sessions.csv$"):
        session_attributes(recording)
