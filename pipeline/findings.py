"""What ``explain`` and the fault bench say to a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.reports import GAPS, accounts, latency_table, rate_text, rejections
from pipeline.sheet import Sheet, number, numbers
from pipeline.summary import VERDICTS
from pipeline.terminal import VERDICT_STYLE

if TYPE_CHECKING:
    from pipeline.explain import Explanation, Spread
    from pipeline.explain_window import StreamWindow, WindowExplanation
    from pipeline.faultbench import FaultReport, FaultResult
    from pipeline.prediction import Prediction

_SOURCES = {
    "live": "as the live session made them",
    "running": "of the last half minute of a running session",
    "event time": "made again by event time",
    "messages": "none, for its session ran without a model; name one with --bundle",
}
_LISTED = 8
"""How many messages of one stream are listed before the rest is summed up."""


def explanation_text(found: Explanation) -> RenderableType:
    """A whole session: where messages went, how streams behaved, what windows waited for, latency by stage."""
    state = f"   incomplete: {found.incomplete}" if found.incomplete else ""
    windows = _SOURCES[found.source] if found.source == "messages" else f"{found.windows} {_SOURCES[found.source]}"
    head = Text(f"session {found.session}   windows: {windows}")
    head.append(state, style="yellow")
    where = accounts({name: stream.messages for name, stream in found.streams.items()})
    parts: list[RenderableType] = [head, Text(), where, *_seen_from_here(found), _balance(found), Text(), _flow(found)]
    parts.append(Text(GAPS, style="dim"))
    if found.windows:
        parts += [Text(), _verdicts({name: stream.verdicts for name, stream in found.streams.items()})]
    if found.wait_ms is not None:
        parts += [Text(), *_waiting(found)]
    if found.latency_ms:
        parts += [Text(), latency_table(found.latency_ms)]
    return Group(*parts, *(Text(f"gap: {_gap(gap)}", style="yellow") for gap in found.gaps[:_LISTED]))


def _seen_from_here(found: Explanation) -> list[Text]:
    """Which streams of a running session nobody but us counts."""
    names = [name for name, s in found.streams.items() if "used" not in s.messages] if found.source == "running" else []
    return [Text(f"{', '.join(names)}: counted since this began to look", style="dim")] if names else []


def _balance(found: Explanation) -> Text:
    """Whether the account holds, and what was rejected for which reason."""
    lines = Text()
    for line in rejections({name: stream.rejected for name, stream in found.streams.items()}):
        lines.append(line).append("\n")
    for name, stream in found.streams.items():
        if stream.unaccounted:
            lines.append(f"{name}: {stream.unaccounted} came while nobody aligned, or were not recorded\n", "yellow")
    if all(stream.balanced for stream in found.streams.values()):
        places = " = used + late + no window + superseded + duplicate + rejected + buffered" if found.windows else ""
        return lines.append(f"balanced: sent = received + lost{'; received' + places if places else ''}", style="green")
    return lines.append("not balanced: some messages have no place", style="red")


def _flow(found: Explanation) -> Sheet:
    aged = ("age p50", "age max") if found.windows else ()  # of a stream's newest at the end of a window
    table = numbers("stream, ms", ("rate", "gaps", "longest pause", "jitter p95", "delay p50", "delay p95", "delay max",
                                   "uncertainty", *aged))  # fmt: skip
    for name, s in found.streams.items():
        rate = rate_text(s.rate_hz, s.jitter_ms is not None)
        spreads = (_q(s.jitter_ms, "p95"), *(_q(s.delay_ms, q) for q in ("p50", "p95", "max")))
        ages = (_q(s.age_ms, "p50"), _q(s.age_ms, "max")) if found.windows else ()
        sure = _q(s.uncertainty_ms, "p50")
        table.add_row(name, rate, str(s.gaps), number(s.max_gap_ms, 1), *spreads, sure, *ages)
    return table


def _q(spread: Spread | None, which: str) -> str:
    return number(None if spread is None else getattr(spread, which), 1)


def _verdicts(streams: Mapping[str, Mapping[str, int]]) -> Sheet:
    kinds = sorted(
        {kind for counts in streams.values() for kind in counts},
        key=lambda kind: (VERDICTS.index(kind.partition("(")[0]), kind),
    )
    table = numbers("windows", [kind.replace("(", " ").replace("_", " ").strip(")") for kind in kinds])
    for name, counts in streams.items():
        table.add_row(name, *(str(counts.get(kind, 0)) for kind in kinds))
    return table


def _waiting(found: Explanation) -> list[RenderableType]:
    table = numbers("waited for", ("windows", "p50", "p95", "max"))
    for name, s in sorted(found.streams.items(), key=lambda item: -item[1].waited):
        if s.waited:
            table.add_row(name, str(s.waited), *(f"{_q(s.wait_ms, q)} ms" for q in ("p50", "p95", "max")))
    causes = ", ".join(f"{cause} {count}" for cause, count in sorted(found.causes.items(), key=lambda item: -item[1]))
    said = f"windows were final {_q(found.wait_ms, 'p50')} ms after their end, at most {_q(found.wait_ms, 'max')} ms"
    return [Text(f"{said} ({causes})"), table]


def _gap(gap: Mapping[str, Any]) -> str:
    what = f"{gap['stream']} {gap.get('epoch')}/" if "stream" in gap else f"{gap.get('of', 'window')}s "
    return f"{what}{gap.get('from')} to {gap.get('to')}: {gap.get('cause', '')}"


def window_text(found: WindowExplanation) -> RenderableType:
    """One window: each stream's verdict in words, what it was made of, and what was predicted from it."""
    head = Text.assemble((f"window {found.window}", "bold"), f"   {_s(found.start_ns)} to {_s(found.end_ns)}")
    wait = "" if found.wait_ms is None else f", {found.wait_ms:.1f} ms after its end"
    parts: list[RenderableType] = [head, Text(found.why + wait)]
    for name, stream in found.streams.items():
        parts += [Text(), _stream(name, stream), *_messages(stream, found.end_ns)]
    return Group(*parts, *((Text(), _prediction(found.prediction)) if found.prediction is not None else ()))


def _stream(name: str, stream: StreamWindow) -> Text:
    reason = f": {stream.reason.replace('_', ' ')}" if stream.reason else ""
    line = Text.assemble(f"{name}  ", (stream.verdict + reason, VERDICT_STYLE[stream.verdict]), f"  {stream.why}")
    if stream.age_ms is not None:
        line.append(f"; its newest is {stream.age_ms:.1f} ms old, good to {stream.uncertainty_ms:.1f} ms")
    return line


def _messages(stream: StreamWindow, end_ns: int) -> list[RenderableType]:
    if not stream.messages:
        return []
    table = numbers("  epoch/number", ("captured", "to", "before the end", "arrived"))
    for one in stream.messages[:_LISTED]:
        key = f"  {one.epoch}/{one.seq}"
        if one.t_capture_ns is None or one.t_end_ns is None or one.arrival_ns is None:
            table.add_row(key, "not in the recording")
            continue
        before = f"{(end_ns - one.t_capture_ns) / 1e6:.1f} ms"
        table.add_row(key, _s(one.t_capture_ns), _s(one.t_end_ns), before, _s(one.arrival_ns))
    more = len(stream.messages) - _LISTED
    return [table, *([Text(f"  and {more} more")] if more > 0 else [])]


def _prediction(prediction: Prediction) -> RenderableType:
    said = prediction.label or "no stream could be used"
    truth = f"; truth {prediction.truth}" if prediction.truth is not None else ""
    abstained = "; not sure enough to say so" if prediction.abstained else ""
    head = f"prediction  {said} {number(prediction.confidence, 3)}{abstained}{truth}, from what was seen since "
    table = numbers("  contribution", ("",))
    for name, report in prediction.streams.items():
        share = report.contribution
        table.add_row(f"  {name}", "–" if share is None else f"{share:+.3f}")
    latency = "   ".join(f"{stage} {value:.1f}" for stage, value in prediction.timing.latency_ms.items())
    return Group(Text(head + _s(prediction.window.start_ns)), table, Text(f"  latency, ms   {latency}"))


def _s(t_ns: int) -> str:
    return f"{t_ns / 1e9:.3f} s"


def fault_text(found: FaultReport) -> RenderableType:
    """The fault bench's report: one row a fault beside the clean run, then which verdicts each fault changed."""
    head = f"{found.recording}   model {found.bundle}   seed {found.seed}   deadline {found.max_delay_ms:g} ms"
    table = numbers("run", ("windows", "changed", "other label", "mean |Δscore|", "max |Δscore|", "accuracy",
                            "wait p50, ms", "lost", "rejected"))  # fmt: skip
    for result in (found.clean, *found.faults):
        table.add_row(*_fault_row(result))
    known = f"accuracy is over {found.with_truth} windows with a known truth"
    truth = known if found.with_truth else "no accuracy: the recording has none of the model's labels"
    changes = [line for result in found.faults if (line := _changes(result, found.clean)) is not None]
    return Group(Text(head), Text(), table, Text(truth, style="dim"), Text(), *changes)


def _fault_row(result: FaultResult) -> list[str]:
    sums = {place: sum(account[place] for account in result.messages.values()) for place in ("lost", "rejected")}
    return [
        result.name, str(result.windows), str(result.windows_changed), str(result.label_changes),
        number(result.mean_score_change, 4), number(result.max_score_change, 3), number(result.accuracy, 3),
        number(result.wait_ms.get("p50"), 1), str(sums["lost"]), str(sums["rejected"]),
    ]  # fmt: skip


def _changes(result: FaultResult, clean: FaultResult) -> Text | None:
    """Which verdicts there were more or fewer of than in the clean run."""
    parts = []
    for stream, counts in result.verdicts.items():
        before = clean.verdicts.get(stream, {})
        kinds = sorted(counts.keys() | before.keys())
        moved = [f"{k} {d:+d}" for k in kinds if (d := counts.get(k, 0) - before.get(k, 0))]
        parts += [f"{stream} {', '.join(moved)}"] if moved else []
    return Text(f"{result.name}: {'; '.join(parts)}".replace("_", " ")) if parts else None
