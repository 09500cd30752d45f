"""What was true in a session, read strictly: a model learns whatever it is told, so nothing is guessed here.

The labels of ``X.mcap`` are those of the sidecar ``X.labels.csv`` (columns start_s, end_s, label; seconds of session
time) if that file is there, else those in the recording itself. Attributes of a session (who, where, which day) are
what its recording says of itself, overridden by the row of the file in a ``sessions.csv`` beside it: a column ``file``,
and one column an attribute. The truth of a window is the label at its end (``pipeline.replay.Truth``).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from pipeline.errors import ConfigError, RecordingError, listed, nearest
from pipeline.recording import Label, RecordingReader, reading
from pipeline.tables import table_rows, table_text

SIDECAR = ".labels.csv"
SESSIONS = "sessions.csv"
REACH_NS = 1_000_000_000
"""So much later than the last that was recorded a label may begin, for whoever labels rounds."""


def session_labels(recording: str | Path | RecordingReader, known: Collection[str] | None = None) -> list[Label]:
    """The labels of a session in order of time, without overlaps; only labels of ``known`` where that is given.
    RecordingError names the session and the time; ConfigError if the sidecar cannot be read."""
    with reading(recording) as reader:
        labels, sidecar = told_labels(reader), reader.path.with_suffix(SIDECAR)
        where = _sidecar(reader) or reader.path
        if not labels and where == sidecar and (own := len(reader.labels())):
            raise RecordingError(
                f"{where} has no labels, and hides those that the recording has of its own ({own}). Remove it, or "
                "write labels into it: a line start_s,end_s,label, then one line an interval"
            )
        if not labels:
            lost = "" if reader.info.complete else " (it is incomplete, and may have lost them with its end)"
            raise RecordingError(
                f"{where} has no labels{lost}. Write {sidecar.name} beside the recording: a line start_s,end_s,label, "
                "then one line an interval"
            )
        _check_reach(labels, reader)
        return checked(labels, str(where), known)


def known_labels(reader: RecordingReader) -> list[Label]:
    """What is known of a session to compare predictions with, as somebody has told it; none where nobody has.
    RecordingError, ConfigError."""
    sidecar = _sidecar(reader)
    if sidecar is None:
        return reader.labels()
    labels = _read(sidecar)
    _check_reach(labels, reader)
    return checked(labels, str(sidecar))


def _check_reach(labels: Collection[Label], reader: RecordingReader) -> None:
    """Raises RecordingError for a label of the sidecar for a time that the session does not have: the unit, the zero or
    the file is another one, and then no label of it is where it was meant to be."""
    sidecar, end_ns = _sidecar(reader), reader.end_ns
    if sidecar is None:
        return
    early = next((label for label in labels if label.end_ns <= 0), None)
    if early is not None:
        raise RecordingError(
            f"{sidecar}: the label `{early.label}` from {_s(early.start_ns)} to {_s(early.end_ns)} ends before the "
            "session begins; correct its times, which are in seconds from there"
        )
    if not reader.info.complete or not end_ns:
        return
    far = [label for label in labels if label.start_ns > end_ns + REACH_NS]
    if not far:
        return
    fits = max(label.start_ns for label in labels) <= 1000 * (end_ns + REACH_NS)
    hint = "; times are in seconds, are these milliseconds?" if fits and len(labels) > 1 else ""
    raise RecordingError(
        f"{sidecar}: the label `{far[0].label}` from {_s(far[0].start_ns)} to {_s(far[0].end_ns)} begins after the "
        f"session's end at {_s(end_ns)}; correct its times, or name the file after its own session{hint}"
    )


def told_labels(reader: RecordingReader) -> list[Label]:
    """The labels of a session as somebody has told them; none where nobody has. RecordingError, ConfigError."""
    sidecar = _sidecar(reader)
    return reader.labels() if sidecar is None else _read(sidecar)


def _sidecar(reader: RecordingReader) -> Path | None:
    """The table of labels beside a recording, None where there is none. ConfigError for what is no file in its place,
    which somebody has meant to be one."""
    sidecar = reader.path.with_suffix(SIDECAR)
    if os.path.lexists(sidecar) and not sidecar.is_file():
        raise ConfigError(
            f"{sidecar} is {_no_table(sidecar)}; a table of labels is a file: a line start_s,end_s,label, then one "
            "line an interval. Rename or remove it."
        )
    return sidecar if sidecar.is_file() else None


def _read(sidecar: Path) -> list[Label]:
    from pipeline.importing.labels import read_labels  # its package brings what decodes videos, and takes its time

    return read_labels(sidecar)


def checked(
    labels: Iterable[Label], where: str, known: Collection[str] | None = None, end_ns: int | None = None
) -> list[Label]:
    """``labels`` in order of time. RecordingError, which begins with ``where``, if one is empty, ends before it begins,
    is none of ``known``, begins more than ``REACH_NS`` after the session's end ``end_ns``, or overlaps another."""
    ordered = sorted(labels, key=lambda label: (label.start_ns, label.end_ns, label.label))
    before: Label | None = None
    for label in ordered:
        what = f"{where}: the label `{label.label}` from {_s(label.start_ns)} to {_s(label.end_ns)}"
        if not label.label:
            raise RecordingError(f"{where}: the label from {_s(label.start_ns)} to {_s(label.end_ns)} has no name")
        if label.end_ns <= label.start_ns:
            raise RecordingError(f"{what} ends before it begins; correct its times")
        if known is not None and label.label not in known:
            raise RecordingError(f"{what} is none of {listed(known)}.{nearest(label.label, known)}")
        if end_ns is not None and label.start_ns > end_ns + REACH_NS:
            raise RecordingError(f"{what} begins after the session's end at {_s(end_ns)}; correct its times")
        if before is not None and label.start_ns < before.end_ns:
            raise RecordingError(
                f"{what} overlaps `{before.label}`, which lasts until {_s(before.end_ns)}: a window has one truth. End "
                "one where the other begins"
            )
        before = label
    return ordered


def look_alike(sessions: Mapping[str, Collection[Label]]) -> list[tuple[str, str, str]]:
    """(label, another, session) for each label that one session alone has and that differs from a more usual one by a
    letter, by two that changed places, or by case and separators: most likely a slip, which would be learnt as a class
    of its own. ``sessions``: name -> labels."""
    where: dict[str, set[str]] = {}
    for name, labels in sessions.items():
        for label in labels:
            where.setdefault(label.label, set()).add(name)
    alone = [label for label, names in sorted(where.items()) if len(names) == 1]
    pairs = [(one, other) for one in alone for other in sorted(where) if len(where[other]) > 1 and _near(one, other)]
    return [(one, other, next(iter(where[one]))) for one, other in pairs]


def _near(a: str, b: str) -> bool:
    if _plain(a) == _plain(b):
        return True
    prefix = _shared(a, b)
    rest_a, rest_b = a[prefix:], b[prefix:]
    suffix = _shared(rest_a[::-1], rest_b[::-1])
    one, other = rest_a[: len(rest_a) - suffix], rest_b[: len(rest_b) - suffix]
    if min(len(a), len(b)) < 4 or any(map(str.isdigit, one + other)):  # `left1` and `left2` are meant
        return False
    return max(len(one), len(other)) <= 1 or (len(one) == 2 and one == other[::-1])


def _shared(a: str, b: str) -> int:
    """How many letters both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _plain(label: str) -> str:
    return "".join(filter(str.isalnum, label.casefold()))


def session_attributes(recording: str | Path | RecordingReader) -> dict[str, str]:
    """What is known of a session beside its streams. Raises RecordingError; ConfigError for a wrong table."""
    with reading(recording) as reader:
        table = reader.path.parent / SESSIONS
        rows = read_sessions(table) if os.path.lexists(table) else {}
        name, stem = reader.path.name, reader.path.stem
        if name not in rows and stem in rows:
            raise ConfigError(f"{table} has a line for `{stem}`, and no file is called so; write `{name}`")
        return {**reader.info.extra, **rows.get(name, {})}


def read_sessions(table: Path) -> Mapping[str, dict[str, str]]:
    """File -> attribute -> value of a ``sessions.csv``. Raises ConfigError."""
    if os.path.lexists(table) and not table.is_file():
        raise ConfigError(f"{table} is {_no_table(table)}; {_TABLE} Rename or remove it.")
    text, found, lines = table_text(table), dict[str, dict[str, str]](), dict[str, int]()
    if not text.strip():
        raise ConfigError(f"{table} is empty; {_TABLE} Write that, or remove it.")
    for line, row in table_rows(table, text, ("file",)):
        file = row.pop("file")
        if not file:
            raise ConfigError(f"{table}, line {line}: it names no `file`; write the name of its session, or remove it")
        if file in found:
            raise ConfigError(
                f"{table}, line {line}: `{file}` has a line already, which is line {lines[file]}; keep one of them"
            )
        found[file], lines[file] = row, line
    return found


_TABLE = (
    f"a {SESSIONS} beside sessions is the table of what is known of them: a line file,… with one more column for each "
    "attribute (file,person), then a line for each session (walk.mcap,ada)."
)


def _no_table(path: Path) -> str:
    """What is there in the place of a table."""
    if path.is_dir():
        return "a folder"
    return "a pipe or a device" if path.exists() else f"a link to what is not there, {os.readlink(path)}"


def _s(t_ns: int) -> str:
    return f"{t_ns / 1e9:.3f} s"
