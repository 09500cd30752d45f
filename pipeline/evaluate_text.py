"""What ``sensorium evaluate`` says to a person on a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.evaluation import Estimate, Evaluation, Scores, SubsetResult
from pipeline.sheet import Sheet, numbers

SHOWN = 31
"""Rows of sets of streams, or of sessions, before the rest is left to --json and --html."""


def evaluation_text(found: Evaluation) -> RenderableType:
    """All of it: sets of streams, labels, sessions, groups, faults, and what to know before believing any of it."""
    full = found.subsets[0].scores
    sessions = "1 session" if len(found.sessions) == 1 else f"{len(found.sessions)} sessions"
    head = f"{found.bundle.name} on {sessions}, {full.windows} windows with a label, in per cent"
    intervals = "  (in brackets: 95 % intervals over sessions)" if full.accuracy.low is not None else ""
    parts: list[RenderableType] = [Text.assemble((head, "bold"), (intervals, "dim")), Text(), _subsets(found), Text()]
    parts += [_labels(found), Text()]
    if len(found.sessions) > 1:
        parts += [_sessions(found), Text()]
    if found.groups:
        parts += [_groups(found), Text()]
    if found.robustness:
        parts += [_robustness(found), Text()]
    return Group(*parts, *(Text(f"note: {text}", style="yellow") for text in found.warnings))


def percent(value: float | None, digits: int = 1) -> str:
    """A share in per cent."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def estimate(value: Estimate) -> str:
    """A share with its interval, in per cent."""
    if value.low is None or value.high is None:
        return percent(value.value)
    return f"{percent(value.value)} [{percent(value.low)}, {percent(value.high)}]"


def unseen(one: SubsetResult) -> list[str]:
    """The labels that these streams cannot tell from some other."""
    return [label for label, scores in one.classes.items() if scores.observable is False]


def _hidden(found: Evaluation, one: SubsetResult) -> str:
    names = unseen(one)
    return "any label" if len(names) == len(found.labels) else ", ".join(names) or "–"


def _cells(one: Scores) -> list[str]:
    size = "–" if one.set_size is None else f"{one.set_size:.2f}"
    return [
        estimate(one.accuracy), percent(one.macro_f1.value), percent(one.calibration_error),
        percent(one.coverage.value), size, percent(one.abstained.value), percent(one.answered_accuracy.value),
    ]  # fmt: skip


_HEADINGS = ("accuracy", "macro\nF1", "calib.\nerror", "in\nset", "set\nsize", "abstains", "right\nif not")
"""In per cent. Short, so that a row with intervals stays one line in a pipe, too."""


def _subsets(found: Evaluation) -> RenderableType:
    table = numbers("streams", _HEADINGS)
    table.add_column("cannot tell apart", sentences=True)
    for heading in ("abstains\nthere", "sure and\nwrong"):
        table.add_column(heading, right=True)
    for one in found.subsets[:SHOWN]:
        name = "all" if one is found.subsets[0] else " + ".join(one.streams)
        rest = (percent(one.rest_abstained, 0), percent(one.rest_wrong, 0))
        table.add_row(name, *_cells(one.scores), _hidden(found, one), *rest)
    return _with_rest(table, len(found.subsets), "sets of streams")


def _with_rest(table: Sheet, rows: int, what: str) -> RenderableType:
    rest = Text(f"and {rows - SHOWN} more {what}: see --json or --html", style="dim")
    return Group(table, rest) if rows > SHOWN else table


def _labels(found: Evaluation) -> Sheet:
    table = numbers("label, with all", ("windows", "recall", "F1", "abstains", "sure and wrong"))
    table.add_column("most like")
    for stream in found.streams:
        table.add_column(f"{stream}'s share", right=True)
    for label, one in found.subsets[0].classes.items():
        resembles = "–" if one.resembles is None else f"{one.resembles} ({one.apart:.2f})"
        shares = found.contributions.get(label, {})
        cells = [f"{round(shares[s], 2) + 0.0:+.2f}" if s in shares else "–" for s in found.streams]
        table.add_row(label, str(one.windows), percent(one.recall), percent(one.f1), percent(one.abstained),
                      percent(one.wrong), resembles, *cells)  # fmt: skip
    return table


def _sessions(found: Evaluation) -> RenderableType:
    table = numbers("session", ("windows", *_HEADINGS))
    for one in found.sessions[:SHOWN]:
        name = one.file + (f" ({one.used})" if one.used else "")
        table.add_row(name, str(one.scores.windows), *_cells(one.scores))
    return _with_rest(table, len(found.sessions), "sessions")


def _groups(found: Evaluation) -> Sheet:
    table = numbers(found.attribute or "", ("sessions", "windows", *_HEADINGS))
    for one in found.groups:
        table.add_row(one.value, str(one.sessions), str(one.scores.windows), *_cells(one.scores))
    return table


UNITS = {"loss": "of messages lost", "noise": "× signal, as noise", "shift": "ms stamped late", "missing": "not there"}


def _robustness(found: Evaluation) -> Sheet:
    """One row a stream and fault: accuracy at each severity."""
    table = numbers("accuracy % with", ("", "mild", "medium", "severe"))
    clean = found.subsets[0].scores.accuracy.value
    table.add_row("nothing wrong", percent(clean))
    for stream in found.streams:
        rows = [one for one in found.robustness if one.stream == stream]
        for fault in dict.fromkeys(one.fault for one in rows):
            own = [one for one in rows if one.fault == fault]
            levels = " / ".join(f"{one.level:g}" for one in own) + " " if fault != "missing" else ""
            cells = [percent(one.scores.accuracy.value) for one in own]
            cells = ["", *cells] if fault != "missing" else cells
            table.add_row(f"{stream}: {levels}{UNITS[fault]}", *cells)
    return table
