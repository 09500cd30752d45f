"""What a person sees of a training: how far it is and how long it will take, a line an epoch, and the curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.bars import Bar
from pipeline.sheet import Sheet

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 32
"""Blocks of a curve: with its name (`teacher 10: held out accuracy`) and two numbers it fits 80 columns."""


class Bars:
    """Tells of a training on ``screen``: on a terminal a bar a phase with the time that is left, everywhere a line an
    epoch; ``heard`` gets each epoch's row, too."""

    def __init__(self, screen: Console, heard: Any = None) -> None:
        self._screen, self._heard = screen, heard
        self._progress = Bar(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=screen, disable=not screen.is_terminal,
        )  # fmt: skip
        self._task: TaskID | None = None

    def begin(self, phase: str, total: int) -> None:
        self._finish()
        self._task = self._progress.add_task(phase, total=total)

    def advance(self, done: int = 1) -> None:
        if self._task is not None:
            self._progress.advance(self._task, done)

    def epoch(self, row: Mapping[str, Any]) -> None:
        self._screen.print(epoch_line(row))
        if self._heard is not None:
            self._heard(row)

    def note(self, text: str) -> None:
        self._screen.print(text)

    def _finish(self) -> None:
        for task in self._progress.tasks:
            self._progress.update(task.id, completed=task.total)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._progress.stop()


def epoch_line(row: Mapping[str, Any]) -> str:
    """One epoch: what was learnt from, then, from its accuracy on, what was held out. Fits 80 columns."""
    names = {key: key.removeprefix("held_out_").replace("_", " ") for key in row} | {"held_out_accuracy": "held out"}
    said = "  ".join(f"{names[key]} {value:.3f}" for key, value in row.items() if isinstance(value, float))
    return f"{row['phase']} {row['epoch']:3d}  {said}"


def curves(rows: Iterable[Mapping[str, Any]]) -> Sheet:
    """Every series of every phase as a line of blocks between its least and its greatest value."""
    table = Sheet(heading_style="dim")
    for heading in ("curve", "first", "", "last"):
        table.add_column(heading, right=heading in ("first", "last"))
    series: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if isinstance(value, float):
                series.setdefault((row["phase"], key), []).append(value)
    for (phase, key), values in series.items():
        name = f"{phase}: {key.replace('_', ' ')}"
        table.add_row(name, f"{values[0]:.3f}", sparkline(values), f"{values[-1]:.3f}")
    return table


def sparkline(values: Sequence[float]) -> str:
    """``values`` as blocks, at most ``WIDTH`` of them, each the mean of what falls into it.

    >>> sparkline([1.0, 2.0, 3.0])
    '▁▅█'
    """
    n = min(len(values), WIDTH)
    parts = [values[i * len(values) // n : (i + 1) * len(values) // n] for i in range(n)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def score_table(scores: Iterable[Any]) -> Sheet:
    """How good a model is on the sessions tested on, by the streams that are left."""
    table = Sheet(heading_style="dim")
    table.add_column("streams")
    for heading in ("windows", "accuracy", "macro-F1", "calibration\nerror", "answered", "of these\nright"):
        table.add_column(heading, right=True)
    for s in scores:
        table.add_row(
            " + ".join(s.streams), str(s.windows), f"{s.accuracy:.1%}", f"{s.macro_f1:.3f}",
            f"{s.calibration_error:.1%}", f"{s.answered:.1%}", "–" if s.right != s.right else f"{s.right:.1%}",
        )  # fmt: skip
    return table
