"""What a person sees: a live table on a terminal, one JSON line a prediction anywhere else, and a summary at the end.

Standard output carries predictions (or, on a terminal, the table); everything else that has to be said goes to
standard error, so that a program may read the one and a person the other. Functions here are given what they show and
return renderables; only ``Screen`` and ``Lines`` write.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.prediction import Prediction, StreamReport
from pipeline.summary import VERDICTS, Summary, account, ordered, quantiles

if TYPE_CHECKING:  # a replay shows itself without a launcher
    from pipeline.launch import Event, NodeStatus, Status, StreamStatus

BAR = 20
VERDICT_STYLE = {"ok": "green", "partial": "yellow", "late": "magenta", "missing": "red"}
STATE_STYLE = {"ready": "green", "failed": "red", "restarting": "yellow", "waiting": "yellow"}
TELLING = ("waiting", "died", "hung", "restarting", "gave_up", "failed")
"""Events worth a line of their own; the others are seen in the table."""


class Output(Protocol):
    """Where a run shows itself."""

    def prediction(self, prediction: Prediction) -> None:
        """One prediction has come. Raises BrokenPipeError when nobody reads any more."""

    def event(self, event: Event) -> None:
        """Something happened to a node."""

    def status(self, status: Status) -> None:
        """How everything is, a few times a second."""

    def close(self) -> None:
        """The last of it. May be called twice."""


class Lines:
    """One JSON line a prediction on standard output; events on standard error."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder()

    def prediction(self, prediction: Prediction) -> None:
        sys.stdout.buffer.write(self._encoder.encode(prediction) + b"\n")
        sys.stdout.buffer.flush()

    def event(self, event: Event) -> None:
        if event.kind in TELLING:
            print(event_line(event), file=sys.stderr, flush=True)

    def status(self, status: Status) -> None:
        """Programs read predictions; how the nodes are is the table's."""

    def close(self) -> None:
        """Nothing is held back, so nothing is left to do."""


class Screen:
    """The live table."""

    def __init__(self, title: str, summary: Summary, console: Console | None = None) -> None:
        self._title, self._summary = title, summary
        self._prediction: Prediction | None = None
        self._live = Live(console=console or Console(highlight=False), auto_refresh=False, vertical_overflow="crop")
        self._live.start()

    def prediction(self, prediction: Prediction) -> None:
        self._prediction = prediction

    def event(self, event: Event) -> None:
        if event.kind in TELLING:
            self._live.console.print(Text(event_line(event), style="dim"))

    def status(self, status: Status) -> None:
        self._live.update(screen(self._title, status, self._prediction, self._summary), refresh=True)

    def close(self) -> None:
        self._live.stop()


def event_line(event: Event) -> str:
    """An event as one line."""
    return f"{event.t_ns / 1e9:8.1f} s  {event.node}: {event.text}"


def screen(title: str, status: Status, prediction: Prediction | None, summary: Summary) -> RenderableType:
    """Everything that the terminal shows at one moment."""
    head = Text.assemble((title, "bold"), f"   session {status.session}   {duration(status.now_ns)}   Ctrl-C stops")
    parts: list[RenderableType] = [head, Text(), answer(prediction), Text(), streams(status, prediction)]
    if prediction is not None:
        parts += [Text(), latency(prediction, summary)]
    parts += [nodes(status.nodes.values())]
    return Group(*parts, *notes(status))


def answer(prediction: Prediction | None) -> RenderableType:
    """The label, how sure the model is, every label's score, and the truth where it is known."""
    if prediction is None:
        return Text("no prediction yet: the first comes when a whole window has passed", style="dim")
    said = prediction.label or "nothing: no stream can be used"
    line = Text.assemble(("  " + said, "bold"), f"  {number(prediction.confidence, 2)}")
    if prediction.abstained:
        line.append("  not sure enough to say so", style="yellow")
    if prediction.truth is not None:
        right = prediction.truth == prediction.label
        line.append(f"  truth {prediction.truth}", style="green" if right else "red")
    table = Table.grid(padding=(0, 2))
    for label, score in prediction.scores.items():
        table.add_row("  " + label, Text(bar(score or 0.0), style="cyan"), number(score, 2))
    return Group(line, table)


def streams(status: Status, prediction: Prediction | None) -> Table:
    """One row a stream: what its source sends, what the aligner says of it, what it did for the prediction."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("stream", "rate", "age", "drops", "verdict", "contribution"):
        table.add_column(heading, justify="right" if heading in ("rate", "age", "drops") else "left", no_wrap=True)
    reports = prediction.streams if prediction is not None else {}
    for name, stream in status.streams.items():
        report = next((reports[key] for key in (name,) if key in reports), None)
        table.add_row(
            name,
            f"{stream.rate_hz:.1f}/s",
            f"{stream.age_ms:.0f} ms" if stream.age_ms is not None else "–",
            str(drops(stream)),
            verdict(stream, report),
            contribution(report),
        )
    return table


def drops(stream: StreamStatus) -> int:
    """Everything of a stream that no window will ever see: dropped by the source, lost on the way, too late, refused."""
    return sum(stream.dropped.values()) + stream.lost + stream.late + sum(stream.rejected.values())


def verdict(stream: StreamStatus, report: StreamReport | None) -> Text:
    """The aligner's word on the newest step, and what fusion could not use of it."""
    if stream.verdict is None:
        return Text("–", style="dim")
    words = f"{stream.verdict}: {stream.reason.replace('_', ' ')}" if stream.reason else stream.verdict
    text = Text(words, style=VERDICT_STYLE.get(stream.verdict, ""))
    if report is not None and report.masked:
        text.append(f" (not used: {report.masked.replace('_', ' ')})", style="yellow")
    return text


def contribution(report: StreamReport | None) -> Text:
    """A stream's share in the confidence: a bar, green where it spoke for the label and red where against it."""
    if report is None or not math.isfinite(report.contribution):
        return Text("–", style="dim")
    value = report.contribution
    shown = Text(f"{value:+.2f} " if abs(value) >= 0.005 else " 0.00 ")
    return shown.append(bar(abs(value)).rstrip(), style="green" if value > 0 else "red")


def latency(prediction: Prediction, summary: Summary) -> Text:
    """The newest prediction's latency by stage, and the quantiles of all of them."""
    values = prediction.timing.latency_ms
    parts = " + ".join(f"{stage} {values[stage]:.1f}" for stage in ordered(values) if stage != "total")
    text = Text(f"latency {values.get('total', math.nan):.1f} ms = {parts}")
    if "total" in summary.latency_ms:
        q = quantiles(summary.latency_ms["total"])
        text.append(f"   p50 {q['p50']:.1f}  p95 {q['p95']:.1f}  max {q['max']:.1f}", style="dim")
    return text


def nodes(all_nodes: Iterable[NodeStatus]) -> Text:
    """Every node's state in one line."""
    line = Text("nodes  ")
    for node in all_nodes:
        again = f" ({node.restarts} restarts)" if node.restarts > 1 else " (1 restart)" if node.restarts else ""
        line.append(f"{node.node} ").append(node.state, style=STATE_STYLE.get(node.state, "dim")).append(f"{again}  ")
    return line


def notes(status: Status) -> list[Text]:
    """What sources and nodes have to say: what they wait for, what they suffer from."""
    said = {node.node: node.note for node in status.nodes.values() if node.note}
    said |= {name: stream.note for name, stream in status.streams.items() if stream.note}
    return [Text(f"{name}: {note}", style="yellow") for name, note in said.items()]


def closing(summary: Summary) -> RenderableType:
    """The summary at the end of a run or a replay."""
    if not summary.predictions:
        head = "no predictions: the session was shorter than one window, or no stream ever came"
        return Group(Text(head), messages(summary)) if summary.counters else Text(head)
    parts: list[RenderableType] = [Text(headline(summary)), Text(), latencies(summary), Text(), windows(summary)]
    return Group(*parts, *([Text(), messages(summary)] if summary.counters else []))


def headline(summary: Summary) -> str:
    """How many predictions, what they said, and how many were right."""
    said = ", ".join(f"{label} {count}" for label, count in summary.labels.most_common(6))
    line = f"{summary.predictions} predictions over {summary.span_s:.1f} s"
    line += f" ({said})" if said else ""
    line += f"; abstained {summary.abstained} times" if summary.abstained else ""
    if summary.with_truth:
        share = summary.correct / summary.with_truth
        line += f"; accuracy {share:.3f}: {summary.correct} of {summary.with_truth} with a known truth"
    return line


def latencies(summary: Summary) -> Table:
    """Quantiles of every stage."""
    table = _numbers("latency, ms", ("p50", "p95", "p99", "max"))
    for stage in ordered(summary.latency_ms):
        values = quantiles(summary.latency_ms[stage])
        table.add_row(stage, *(f"{values[q]:.1f}" for q in ("p50", "p95", "p99", "max")))
    return table


def windows(summary: Summary) -> Table:
    """How many windows had each verdict, per stream, with the reasons that there were."""
    seen = {kind for counts in summary.verdicts.values() for kind in counts}
    kinds = sorted(seen | {"ok"}, key=lambda kind: (VERDICTS.index(kind.partition("(")[0]), kind))
    table = _numbers("windows", kinds)
    for stream, counts in summary.verdicts.items():
        table.add_row(stream, *(str(counts[kind]) for kind in kinds))
    return table


def messages(summary: Summary) -> Table:
    """Where every message went: sent = received + lost, and received = used + all that stands to the right of it."""
    places = ("sent", "lost", "received", "used", "late", "superseded", "duplicate", "rejected", "buffered")
    table = _numbers("messages", places)
    for stream, counters in summary.counters.items():
        numbers = account(counters)
        table.add_row(stream, *(str(numbers[place]) for place in places))
    return table


def _numbers(first: str, rest: Iterable[str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    table.add_column(first, no_wrap=True)
    for heading in rest:
        table.add_column(heading, justify="right")
    return table


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
