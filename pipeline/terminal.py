"""What a person sees: a live table on a terminal, one JSON line a prediction anywhere else, and a summary at the end.

Standard output carries predictions (or, on a terminal, the table); everything else that has to be said goes to
standard error, so that a program may read the one and a person the other. Functions here are given what they show and
return renderables; only ``Screen`` and ``Lines`` write.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol, TextIO

import msgspec
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from pipeline.prediction import Prediction, StreamReport
from pipeline.sheet import Cell, Meter, Sheet, number
from pipeline.summary import Summary, ordered, quantiles

if TYPE_CHECKING:  # a replay shows itself without a launcher
    from pipeline.launch import Event, NodeStatus, Status, StreamStatus

ENDLESS = 100_000
"""The width of what is no terminal: each line is as long as what it says."""
VERDICT_STYLE = {"ok": "green", "partial": "yellow", "late": "magenta", "missing": "red"}
STATE_STYLE = {"ready": "green", "failed": "red", "restarting": "yellow", "waiting": "yellow"}
TELLING = ("waiting", "returned", "died", "hung", "restarting", "gave_up", "failed", "warning")
"""Events worth a line of their own; the others are seen in the table."""


def console(file: TextIO) -> Console:
    """A console on ``file``; where that is no terminal nothing breaks."""
    return Console(file=file, highlight=False, width=None if file.isatty() else ENDLESS)


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
            style = "yellow" if event.kind == "warning" else "dim"
            self._live.console.print(Text(event_line(event), style=style))

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
    parts = [Part("title", 2, False, Text.assemble((title, "bold"), f"   {duration(now_ns)}"))]
    parts += [Part("address", 7, False, Text(about, style="dim"))] if about else []
    if summary.expected:
        parts.append(Part("answer", 0, True, answer(prediction, summary.endpoint)))
    if prediction is not None:
        parts.append(Part("scores", 5, False, scores(prediction)))
    if status is not None or prediction is not None:
        parts.append(Part("streams", 1, True, streams(status, prediction), divisible=True))
    if prediction is not None:
        parts.append(Part("latency", 6, True, latency(prediction, summary)))
    if status is not None:
        parts.append(Part("nodes", 4, True, nodes(status.nodes.values())))
        parts += [Part("notes", 3, False, Text("\n").join(said))] if (said := notes(status)) else []
    return Stack(parts)


class Part(NamedTuple):
    """One thing that the screen shows."""

    name: str
    rank: int
    """What a low screen shows first."""
    apart: bool
    """A blank line stands before it, where there is room."""
    what: RenderableType
    divisible: bool = False
    """Its first lines may stand without the others."""


class Stack:
    """Parts below each other. A screen that is too low for them shows those of the first ranks, and names the rest."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = {part.name: console.render_lines(part.what, options, pad=False) for part in self._parts}
        room = options.size.height if console.is_terminal else ENDLESS
        whole = sum(map(len, lines.values()))
        airy = whole + sum(part.apart for part in self._parts) <= room
        if whole > room:
            hidden = self._cut(lines, room - len(console.render_lines(_hidden(lines), options)))
        for part in self._parts:
            if part.apart and airy:
                yield Segment.line()
            for line in lines[part.name]:
                yield from line
                yield Segment.line()
        if whole > room:
            yield _hidden(hidden)

    def _cut(self, lines: dict[str, list[list[Segment]]], room: int) -> list[str]:
        """Takes away what has no room, and says what."""
        hidden = []
        for part in sorted(self._parts, key=lambda part: part.rank):
            own = lines[part.name]
            fits = len(own) if len(own) <= room else room if part.divisible and room > 1 else 0
            if gone := len(own) - fits:
                lines_of = f"{gone} line{'s' if gone > 1 else ''} of " if fits else ""
                hidden.append(lines_of + part.name)
            del own[fits:]
            room -= fits
        return hidden


def _hidden(names: Iterable[str]) -> Text:
    return Text(f"no room for {', '.join(names)}", style="yellow")


def answer(prediction: Prediction | None, endpoint: str = "") -> Text:
    """The label, how sure the model is, and the truth where it is known. ``endpoint`` is where predictions are waited
    for, if nobody knows whether there is a session."""
    if prediction is None:
        said = "no prediction yet: the first comes when a whole window has passed"
        if endpoint:
            said = f"waiting for predictions at {endpoint}; nothing has been heard from there yet"
        return Text(said, style="dim")
    line = Text("  no stream can be used", style="yellow")
    if prediction.label is not None:
        line = Text.assemble(("  " + prediction.label, "bold"), f"  {number(prediction.confidence, 2)}")
        line.append("  not sure enough to say so" if prediction.abstained else "", style="yellow")
    if prediction.truth is not None:
        right = prediction.truth == prediction.label
        line.append(f"  truth {prediction.truth}", style="green" if right else "red")
    return line


def scores(prediction: Prediction) -> Sheet:
    """Every label's score."""
    table = Sheet()
    table.add_column()
    table.add_column()
    table.add_column(right=True)
    for label, score in prediction.scores.items():
        table.add_row("  " + label, Meter("", score or 0.0, "cyan"), number(score, 2))
    return table


def streams(status: Status | None, prediction: Prediction | None) -> Sheet:
    """One row a stream: what its source sends, what the aligner says of it, what it did for the prediction."""
    table = Sheet(heading_style="dim", apart=False)
    sources = status.streams if status is not None else {}
    reports = prediction.streams if prediction is not None else {}
    table.add_column("stream")
    if sources:
        table.add_column("rate", right=True, usual=8)
        table.add_column("drops", right=True)
    table.add_column("age", right=True, usual=7)
    table.add_column("verdict", usual=25, sentences=True)
    table.add_column("contribution")
    for name in {**sources, **reports}:
        report, source = reports.get(name), sources.get(name)
        flow = ("", "") if sources else ()
        if source is not None and status is not None:
            flow = rate(source, status), str(drops(source))
        table.add_row(name, *flow, *word(source, report), contribution(report))
    return table


def rate(stream: StreamStatus, status: Status) -> str:
    """Messages a second, in the end the last ones; what a node that is away did last says nothing of now."""
    node = status.nodes.get(stream.node)
    here = node is not None and node.state in ("ready", "waiting", "ended", "stopped")
    return f"{stream.rate_hz if here else 0.0:.1f}/s"


def drops(stream: StreamStatus) -> int:
    """What was sent or should have been and no window could use: dropped at its source, lost on the way, refused.

    Late messages are not among them: their windows say so. Nor are attempts to open a device that is away: nothing was
    ever sent."""
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


def contribution(report: StreamReport | None) -> Cell:
    """A stream's share in the confidence: a bar, green where it spoke for the label and red where against it."""
    if report is None or report.contribution is None:
        return Text("–", style="dim")
    value = report.contribution
    shown = f"{value:+.2f} " if abs(value) >= 0.005 else " 0.00 "
    return Meter(shown, abs(value), "green" if value > 0 else "red")


def latency(prediction: Prediction, summary: Summary) -> Text:
    """The newest prediction's latency, the quantiles of all of them, and below them its stages: together they are
    wider than a terminal of 80 columns."""
    values = prediction.timing.latency_ms
    parts = " + ".join(f"{stage} {values[stage]:.1f}" for stage in ordered(values) if stage != "total")
    if "total" not in values:
        return Text(f"latency, ms  {parts}")
    text = Text(f"latency {values['total']:.1f} ms")
    if "total" in summary.latency_ms:
        q = quantiles(summary.latency_ms["total"])
        text.append(f"   p50 {q['p50']:.1f}   p95 {q['p95']:.1f}   max {q['max']:.1f}", style="dim")
    return text.append(f"\n      = {parts}")


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


def duration(ns: int) -> str:
    """Session time as h:mm:ss."""
    minutes, seconds = divmod(ns // 1_000_000_000, 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
