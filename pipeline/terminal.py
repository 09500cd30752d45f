"""What a person sees: a live table on a terminal, one JSON line a prediction anywhere else, and a summary at the end.

Standard output carries predictions (or, on a terminal, the table); everything else that has to be said goes to
standard error, so that a program may read the one and a person the other. Functions here are given what they show and
return renderables; only ``Screen`` and ``Lines`` write.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, BinaryIO, Protocol, TextIO

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.prediction import Prediction, StreamReport
from pipeline.summary import Summary, ordered, quantiles

if TYPE_CHECKING:  # a replay shows itself without a launcher
    from pipeline.launch import Event, NodeStatus, Status, StreamStatus

BAR = 20
VERDICT_STYLE = {"ok": "green", "partial": "yellow", "late": "magenta", "missing": "red"}
STATE_STYLE = {"ready": "green", "failed": "red", "restarting": "yellow", "waiting": "yellow"}
TELLING = ("waiting", "died", "hung", "restarting", "gave_up", "failed")
"""Events worth a line of their own; the others are seen in the table."""


def console(file: TextIO) -> Console:
    """A console on ``file``; where that is no terminal, wide enough that tables keep their rows."""
    return Console(file=file, highlight=False, width=None if file.isatty() else 160)


class Output(Protocol):
    """Where predictions are shown. One thread shows predictions, another may do the rest."""

    def prediction(self, prediction: Prediction) -> None:
        """One prediction has come. Raises BrokenPipeError when nobody reads any more."""

    def event(self, event: Event) -> None:
        """Something happened to a node."""

    def refresh(self, status: Status | None = None) -> None:
        """Shows how things are; called a few times a second."""

    def close(self) -> None:
        """The last of it. May be called twice."""


class Lines:
    """One JSON line a prediction, to ``file`` or to standard output; events on standard error."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self._file = sys.stdout.buffer if file is None else file
        self._encode = msgspec.json.Encoder().encode

    def prediction(self, prediction: Prediction) -> None:
        self._file.write(self._encode(prediction) + b"\n")
        self._file.flush()

    def event(self, event: Event) -> None:
        if event.kind in TELLING:
            print(event_line(event), file=sys.stderr, flush=True)

    def refresh(self, status: Status | None = None) -> None:
        """A program that reads predictions is not told how the nodes are; that is the table's."""

    def close(self) -> None:
        """Nothing is held back, so nothing is left to do."""


class Screen:
    """The live table."""

    def __init__(self, title: str, summary: Summary, about: str = "", on: Console | None = None) -> None:
        self._title, self._about, self._summary = title, about, summary
        self._prediction: Prediction | None = None
        self._live = Live(console=on or console(sys.stdout), auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def prediction(self, prediction: Prediction) -> None:
        self._prediction = prediction

    def event(self, event: Event) -> None:
        if event.kind in TELLING:
            self._live.console.print(Text(event_line(event), style="dim"))

    def refresh(self, status: Status | None = None) -> None:
        self._live.update(screen(self._title, status, self._prediction, self._summary, self._about), refresh=True)

    def close(self) -> None:
        self._live.stop()


def event_line(event: Event) -> str:
    """An event as one line."""
    return f"{event.t_ns / 1e9:8.1f} s  {event.node}: {event.text}"


def screen(
    title: str, status: Status | None, prediction: Prediction | None, summary: Summary, about: str = ""
) -> RenderableType:
    """Everything that the terminal shows at one moment. Without ``status`` (a replay, a session that somebody else
    runs) only what predictions say of themselves."""
    now_ns = status.now_ns if status is not None else prediction.window.end_ns if prediction is not None else 0
    parts: list[RenderableType] = [Text.assemble((title, "bold"), f"   {duration(now_ns)}")]
    parts += [Text(about, style="dim")] if about else []
    parts += [Text(), answer(prediction)]
    if status is not None or prediction is not None:
        parts += [Text(), streams(status, prediction)]
    if prediction is not None:
        parts += [Text(), latency(prediction, summary)]
    if status is not None:
        parts += [Text(), nodes(status.nodes.values()), *notes(status)]
    return Group(*parts)


def answer(prediction: Prediction | None) -> RenderableType:
    """The label, how sure the model is, every label's score, and the truth where it is known."""
    if prediction is None:
        return Text("no prediction yet: the first comes when a whole window has passed", style="dim")
    line = Text("  no stream can be used", style="yellow")
    if prediction.label is not None:
        line = Text.assemble(("  " + prediction.label, "bold"), f"  {number(prediction.confidence, 2)}")
        line.append("  not sure enough to say so" if prediction.abstained else "", style="yellow")
    if prediction.truth is not None:
        right = prediction.truth == prediction.label
        line.append(f"  truth {prediction.truth}", style="green" if right else "red")
    table = Table.grid(padding=(0, 2))
    for label, score in prediction.scores.items():
        table.add_row("  " + label, Text(bar(score or 0.0), style="cyan"), number(score, 2))
    return Group(line, table)


def streams(status: Status | None, prediction: Prediction | None) -> Table:
    """One row a stream: what its source sends, what the aligner says of it, what it did for the prediction."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    sources = status.streams if status is not None else {}
    reports = prediction.streams if prediction is not None else {}
    for heading in ("stream", *(("rate", "drops") if sources else ()), "age", "verdict", "contribution"):
        # Widths that words do not change keep the columns from jumping.
        width = {"rate": 8, "age": 7, "verdict": 25}.get(heading)
        right = heading in ("rate", "drops", "age")
        table.add_column(heading, justify="right" if right else "left", min_width=width, no_wrap=True)
    for name in {**sources, **reports}:
        report, source = reports.get(name), sources.get(name)
        flow = (rate(source, status), str(drops(source))) if source is not None and status is not None else ()
        table.add_row(name, *flow, *word(source, report), contribution(report))
    return table


def rate(stream: StreamStatus, status: Status) -> str:
    """Messages a second; what a node that is away did last says nothing of now."""
    node = status.nodes.get(stream.node)
    here = node is not None and node.state in ("ready", "waiting", "ended")
    return f"{stream.rate_hz if here else 0.0:.1f}/s"


def drops(stream: StreamStatus) -> int:
    """What was sent or should have been and no window could use: dropped at its source, lost on the way, refused.

    Late messages are not among them: a frame between two steps comes after the one and is too far from the other."""
    return sum(stream.dropped.values()) + stream.lost + sum(stream.rejected.values())


def word(source: StreamStatus | None, report: StreamReport | None) -> tuple[str, Text]:
    """Age and verdict in the newest step, and what fusion could not use of it."""
    said = source if source is not None and source.verdict is not None else report
    if said is None or said.verdict is None:
        return "–", Text("–", style="dim")
    words = f"{said.verdict}: {said.reason.replace('_', ' ')}" if said.reason else said.verdict
    text = Text(words, style=VERDICT_STYLE.get(said.verdict, ""))
    if report is not None and report.masked:
        text.append(f" (not used: {report.masked.replace('_', ' ')})", style="yellow")
    return f"{said.age_ms:.0f} ms" if said.age_ms is not None else "–", text


def contribution(report: StreamReport | None) -> Text:
    """A stream's share in the confidence: a bar, green where it spoke for the label and red where against it."""
    if report is None or report.contribution is None:
        return Text("–", style="dim")
    value = report.contribution
    shown = Text(f"{value:+.2f} " if abs(value) >= 0.005 else " 0.00 ")
    return shown.append(bar(abs(value)).rstrip(), style="green" if value > 0 else "red")


def latency(prediction: Prediction, summary: Summary) -> Text:
    """The newest prediction's latency by stage, and the quantiles of all of them."""
    values = prediction.timing.latency_ms
    parts = " + ".join(f"{stage} {values[stage]:.1f}" for stage in ordered(values) if stage != "total")
    text = Text(f"latency {values['total']:.1f} ms = {parts}" if "total" in values else f"latency, ms  {parts}")
    if "total" in summary.latency_ms:
        q = quantiles(summary.latency_ms["total"])
        text.append(f"\n        p50 {q['p50']:.1f}   p95 {q['p95']:.1f}   max {q['max']:.1f}", style="dim")
    return text


def nodes(all_nodes: Iterable[NodeStatus]) -> Text:
    """Every node's state in one line."""
    line = Text("nodes   ")
    for node in all_nodes:
        again = f" ({node.restarts} restarts)" if node.restarts > 1 else " (1 restart)" if node.restarts else ""
        line.append(f"{node.node} ").append(node.state, style=STATE_STYLE.get(node.state, "dim")).append(f"{again}  ")
    return line


def notes(status: Status) -> list[Text]:
    """What sources and nodes have to say: what they wait for, what they suffer from."""
    said = {node.node: node.note for node in status.nodes.values() if node.note}
    said |= {name: stream.note for name, stream in status.streams.items() if stream.note}
    return [Text(f"{name}: {note}", style="yellow") for name, note in said.items()]


def bar(share: float) -> str:
    """``share`` of 0 to 1 as a bar of fixed width."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    whole, part = divmod(eighths, 8)
    return ("█" * whole + (" ▏▎▍▌▋▊▉"[part] if part else "")).ljust(BAR)


def number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def duration(ns: int) -> str:
    """Session time as h:mm:ss."""
    minutes, seconds = divmod(ns // 1_000_000_000, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
