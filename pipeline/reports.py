"""What commands say when they are done: summaries, recordings, checks and verifications as tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Group, RenderableType
from rich.text import Text

from pipeline.errors import typed
from pipeline.recording import Deleted, deleted_text
from pipeline.rules import channels_text
from pipeline.sheet import Sheet, counted, number, numbers, size
from pipeline.stamper import in_place_of_values, no_value
from pipeline.summary import VERDICTS, Summary, account, ordered, quantiles

if TYPE_CHECKING:  # what is reported on is not loaded to report on something else
    from pipeline.calibrate import Offset
    from pipeline.devices import Place
    from pipeline.plan import Plan
    from pipeline.recalibrate import Recalibration
    from pipeline.recording.salvage import Damage, Hole, Recovery
    from pipeline.verify import Verification


def closing(summary: Summary) -> RenderableType:
    """The summary at the end of a run or a replay."""
    if not summary.predictions:
        head = "no predictions: the session was shorter than one window, or no stream ever came"
        head = head if summary.expected else "no model, so no predictions"
        if summary.endpoint:
            head = f"nothing was heard at {summary.endpoint}: is a session publishing there?"
        table = messages(summary) if summary.counters else accounts(summary.streams) if summary.streams else None
        # A session without a model has said so when it began.
        said = [] if table is not None and not summary.expected else [Text(head)]
        return Group(*said, *(() if table is None else (table,)), *last_lines(summary))
    parts: list[RenderableType] = [Text(headline(summary)), *_foreign(summary), Text(), latencies(summary), Text()]
    return Group(
        *parts, windows(summary), *((Text(), messages(summary)) if summary.counters else ()), *last_lines(summary)
    )


def last_lines(summary: Summary) -> list[RenderableType]:
    """What was dropped, what was wrong with sources, where the recording is and what is not in it."""
    said = [Text(f"warning: {warning}", style="yellow") for warning in summary.warnings]
    if summary.recorded:
        how = "recorded, but not whole" if summary.lacks else "recorded"
        said += [Text(), Text(f"{how}: {summary.recorded}")]
        said += [Text(f"  {lack}", style="yellow") for lack in summary.lacks]
    return [*_holes(summary), *dropped(summary), *said]


def _holes(summary: Summary) -> list[RenderableType]:
    """Windows without a prediction, which a node that died has cost."""
    if not summary.gaps:
        return []
    count = sum(last - first + 1 for first, last in summary.gaps)
    said = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in summary.gaps[:8])
    more = ", …" if len(summary.gaps) > 8 else ""
    have = "has" if count == 1 else "have"
    said = f"{counted(count, 'window')} {have} no prediction, for a node had died: {said}{more}"
    return [Text(said, style="yellow")]


def dropped(summary: Summary) -> list[RenderableType]:
    """What each source, and each node's bus or ring dropped, a line each; nothing where nothing was."""
    said: list[RenderableType] = []
    for where, all_counts in (("by sources", summary.source_drops), ("between nodes", summary.drops)):
        lines = [f"{name}: " + ", ".join(f"{what} {n}" for what, n in counts.items())
                 for name, counts in all_counts.items()]  # fmt: skip
        said += [Text(), Text(f"dropped {where}\n" + "\n".join(lines), style="yellow")] if lines else []
    return said


def headline(summary: Summary) -> str:
    """How many predictions, what they said, and how many were right."""
    said = [f"{label} {count}" for label, count in summary.labels.most_common(_LABELS)]
    rest = sum(summary.labels.values()) - sum(count for _, count in summary.labels.most_common(_LABELS))
    said += [f"other labels {rest}"] if rest else []
    said += [f"no label {summary.unlabelled}"] if summary.unlabelled else []
    line = f"{counted(summary.predictions, 'prediction')} over {summary.span_s:.1f} s ({', '.join(said)})"
    line += f"; abstained {counted(summary.abstained, 'time')}" if summary.abstained else ""
    if summary.with_truth:
        share = summary.correct / summary.with_truth
        line += f"; accuracy {share:.3f}: {summary.correct} of {summary.with_truth} with a known truth"
        line += _of_the_answered(summary) if summary.abstained else ""
    return line


_CHANNELS = 13
_LABELS = 6
"""So many labels are named before the rest is summed up."""


def _of_the_answered(summary: Summary) -> str:
    """How accuracy and abstaining go together."""
    if not summary.answered:
        return ", counting what the label would have been: it abstained from all of them"
    share = summary.answered_correct / summary.answered
    return f", abstained or not; {share:.3f} where it answered: {summary.answered_correct} of {summary.answered}"


def _foreign(summary: Summary) -> list[RenderableType]:
    """Labels that this model cannot give."""
    if not (foreign := summary.foreign):
        return []
    count = sum(foreign.values())
    its = ("its", "it does") if count == 1 else ("their", "they do")
    said = f"{counted(count, 'prediction')} cannot be right: {its[0]} truth "
    said += f"({', '.join(foreign)}) is none of the model's labels ({', '.join(summary.known)})"
    said += f"; {its[1]} not count in the accuracy" if summary.with_truth else ", so there is no accuracy"
    return [Text(said, style="yellow")]


def latencies(summary: Summary) -> Sheet:
    """Quantiles of every stage."""
    return latency_table({stage: quantiles(summary.latency_ms[stage]) for stage in ordered(summary.latency_ms)})


def latency_table(latency_ms: Mapping[str, Mapping[str, float]]) -> Sheet:
    """The same of numbers that are known already."""
    table = numbers("latency, ms", ("p50", "p95", "p99", "max"))
    for stage, values in latency_ms.items():
        table.add_row(stage, *(f"{values[q]:.1f}" for q in ("p50", "p95", "p99", "max")))
    return table


def windows(summary: Summary) -> Sheet:
    """How many windows had each verdict, per stream, with the reasons that there were."""
    seen = {kind for counts in summary.verdicts.values() for kind in counts}
    kinds = sorted(seen | {"ok"}, key=lambda kind: (VERDICTS.index(kind.partition("(")[0]), kind))
    table = numbers("windows", [kind.replace("(", " ").replace("_", " ").strip(")") for kind in kinds])
    for stream, counts in summary.verdicts.items():
        table.add_row(stream, *(str(counts[kind]) for kind in kinds))
    return table


def messages(summary: Summary) -> RenderableType:
    """Where every message went: sent = received + lost, and received = used + all that stands to the right of it; of
    what no model takes only how much was sent."""
    places = {stream: account(counters) for stream, counters in summary.counters.items()}
    others = {stream: {"sent": amounts["sent"]} for stream, amounts in summary.streams.items() if stream not in places}
    table = accounts(places | others)
    return Group(table, *rejections({stream: counters.rejected for stream, counters in summary.counters.items()}))


def accounts(streams: Mapping[str, Mapping[str, int]]) -> RenderableType:
    """The same of numbers that are known already: by stream and place."""
    places = list(dict.fromkeys(place for amounts in streams.values() for place in amounts))
    table = numbers("messages", [place.replace("_", " ") for place in places])
    for stream, amounts in streams.items():
        table.add_row(stream, *(str(amounts.get(place, "–")) for place in places))
    return Group(table, Text(_PLACES, style="dim")) if "no_window" in places else table


def rejections(streams: Mapping[str, Mapping[str, int]]) -> list[Text]:
    """Of each stream of which messages were rejected how many, and why."""
    said = []
    for name, reasons in streams.items():
        if reasons:
            each = ", ".join(f"{count} {_REJECTED[reason]}" for reason, count in sorted(reasons.items()))
            said.append(Text(f"{name}: rejected {each}", style="yellow"))
    return said


_REJECTED = {
    "bound": "older than it had promised",
    "epoch": "of an epoch that was over",
    "future": "of the future",
    "malformed": "of another kind than what is taken, or that contradict themselves",
    "overflow": "for which there was no room",
}
_PLACES = (
    "late: its window was made before it came; no window: no window needed it, like a picture between two steps; "
    "superseded: a better one was used"
)


def rate_text(rate_hz: float | None, several: bool) -> str:
    """A rate as people say it; where there is none, whether there is nothing to tell it from, or ``several`` at one
    moment."""
    if rate_hz is None:
        return "at once" if several else "–"
    return f"{rate_hz:.2f} Hz" if rate_hz >= _SELDOM_HZ else f"1 in {1 / rate_hz:.0f} s"


_SELDOM_HZ = 0.1


def recording_table(info: dict[str, Any]) -> RenderableType:
    """What ``sensorium info`` says to a person."""
    state = "" if info["complete"] else f"   incomplete: {info['incomplete']}"
    head = Text.assemble(f"session {info['session']}   {info['duration_s']:.2f} s", (state, "yellow"))
    head.append("".join(f"\n{line}" for line in (_recorded(info), _labels(info)) if line))
    if not info["streams"]:
        head.append("\nit holds no message", style="yellow")
    columns = ("messages", "samples", "rate", "lost", "gaps", "longest pause", "delay", "max delay")
    table = numbers("stream", ("payload", *columns))
    for name, stream in info["streams"].items():
        gap, rate, delay = stream["max_gap_ms"], stream["rate_hz"], stream["delay_ms"]
        row = [str(stream["messages"]), str(stream["samples"]), rate_text(rate, stream["samples"] > 1)]
        row += [str(stream["lost"]), str(stream["gaps"])]
        row += ["–" if ms is None else f"{ms:.1f} ms" for ms in (gap, *delay.values())]
        table.add_row(name, stream["payload"], *row)
    latency, ring = info.get("latency_ms"), info.get("ring")
    if ring is not None:
        gone = msgspec.convert(ring["deleted"], Deleted)
        head.append(f"\nsegment {ring['segment']} of a ring; ")
        head.append(f"deleted before it began: {deleted_text(gone)}" if gone.segments else "nothing was deleted before")
    said = Text(GAPS, style="dim")
    for name, stream in info["streams"].items():
        if "channels" in stream:
            head.append(f"\n{name}: {channels_text(stream['channels'], _CHANNELS)}")
        for others in stream.get("other_channels", ()):
            head.append(f"\n{name} has other channels later: {channels_text(others, _CHANNELS)}", style="yellow")
        if held := _no_value(stream):
            head.append(f"\n{name} holds nothing but {held}", style="yellow")
    return Group(head, Text(), table, said, *((Text(), latency_table(latency)) if latency else ()))


def _no_value(stream: Mapping[str, Any]) -> str:
    """What a recorded stream holds in place of values, in words; nothing if it holds some, could not, or has other
    channels later, of which there are no statistics."""
    stats = list(stream.get("stats", {}).values())
    means = [mean for kind in stats for mean in kind["mean"]]
    known = stream["samples"] and means and "other_channels" not in stream
    if not known or any(mean is not None for mean in means):
        return ""
    infinite, all_of = sum(kind.get("infinite", 0) for kind in stats), len(means) * stream["samples"]
    kinds = ["infinities"] * (infinite > 0) + ["NaN"] * (infinite < all_of)
    return no_value(in_place_of_values(kinds))


def damage_text(found: Damage, recording: Path) -> RenderableType:
    """Where a recording is damaged, what is lacking, and what to do."""
    from pipeline.recording.salvage import lost_text

    lines = [_hole(hole) for hole in found.holes[:_LABELS]]
    lines += [f"and {counted(len(found.holes) - _LABELS, 'place')} more"] if len(found.holes) > _LABELS else []
    lines += [f"lost: {name}" for name in found.unreadable]
    said = Text(f"\n{recording} is damaged; what is shown is what can be read", style="yellow")
    said.append("".join(f"\n  {line}" for line in lines))
    said.append(f"\nlacking in all: {lost_text(found)}")
    partial = " --partial" if found.unreadable else ""
    todo = f"sensorium recover {typed(recording)} -o NEW.mcap{partial}"
    said.append(f"\nwhat is intact goes into a new recording with: {todo}")
    return said


def _hole(hole: Hole) -> str:
    """A damaged stretch in words."""
    from pipeline.recording.salvage import counts_text

    said = f"bytes {hole.from_byte} to {hole.to_byte}: {hole.what}"
    if hole.from_ns is not None:
        end = "the end" if hole.to_ns is None else f"{hole.to_ns / 1e9:.3f} s"
        said += f", which came from {hole.from_ns / 1e9:.3f} s to {end}"
    return f"{said}; by their numbers {counts_text(hole.lost)}" if hole.lost else said


def recovery_text(made: Recovery, recording: Path, out: Path) -> RenderableType:
    """What ``recover`` says to a person: what was saved, what was lost, and where that was."""
    from pipeline.recording.salvage import name_of

    table = numbers("messages", ("saved", "lost"))
    lost, counted_all = made.damage.lost, made.damage.counted
    for name in sorted(made.saved.keys() | lost.keys(), key=lambda name: (name[0] == "/", name)):
        known = str(lost.get(name, 0)) if counted_all else f"≥ {lost[name]}" if name in lost else "–"
        table.add_row(name_of(name), str(made.saved.get(name, 0)), known)
    lines = [f"damaged: {_hole(hole)}" for hole in made.damage.holes]
    lines += [f"left out, for it is lost: {name}" for name in made.damage.unreadable]
    state = "complete" if made.complete else f"incomplete: {made.note}"
    return Group(table, Text(), *map(Text, lines), Text(f"{out}: done, and {state}; {recording} is as it was"))


GAPS = "gaps: places in its numbering where messages were lost; a pause without a gap: the source sent nothing"


def _recorded(info: Mapping[str, Any]) -> str:
    """When and by what it was recorded, and how much there is of it."""
    parts = [info["date"].replace("T", " ").replace("+00:00", " UTC")] if "date" in info else []
    parts += [size(info["bytes"])] if "bytes" in info else []
    parts += [f"rig {info['rig']}"] if "rig" in info else []
    if (bundle := info.get("bundle")) is not None:
        parts.append(" ".join(filter(None, ("model", bundle["name"], f"{bundle['sha256'][:12]}…"))))
    counts = [counted(info[f"{what}s"], what) for what in ("window", "prediction") if f"{what}s" in info]
    return "   ".join([*parts, *([", ".join(counts)] if counts else [])])


def _labels(info: Mapping[str, Any]) -> str:
    """How long each label was true, the longest first."""
    labels = sorted(info.get("labels_s", {}).items(), key=lambda item: -item[1])
    return "labels: " + ", ".join(f"{label} {seconds:.1f} s" for label, seconds in labels) if labels else ""


def plan_table(plan: Plan, warnings: list[str], absent: list[str]) -> RenderableType:
    """What ``sensorium check`` says to a person: sources, what the model takes of them, and which are not here."""
    rig, bundle = plan.rig_file.rig, plan.bundle
    table = numbers("stream", ())
    for heading in ("payload", "source", "kind", "in the model as"):
        table.add_column(heading)
    of_model = {stream: name for name, stream in plan.mapping.items()}
    for source in plan.sources:
        for stream, payload in source.streams.items():
            table.add_row(stream, payload, source.name, source.kind, of_model.get(stream, "–"))
    head = f"{rig.name}: {counted(len(plan.sources), 'source')}"
    if bundle is not None:
        window, left_out = bundle.window, [name for name in bundle.streams if name not in plan.mapping]
        head += f"; model {bundle.name} looks at {window.steps} steps of {window.hop_ns / 1e6:g} ms"
        head += f"; always masked: {', '.join(left_out)}" if left_out else ""
    said = [Text(f"warning: {warning}", style="yellow") for warning in warnings]
    said = said or [Text("all is well", style="green")]
    said += [Text(f"note: {note}", style="cyan") for note in absent]
    return Group(Text(head), Text(), table, Text(), *said)


def devices_text(places: list[Place]) -> Text:
    """What ``sensorium devices`` says to a person: per place its devices, each with its line for a rig."""
    lines: list[tuple[str, str]] = []
    for place in places:
        if place.trouble:
            lines.append((f"{place.kind}: could not look for {place.looked_for}: {place.trouble}", "yellow"))
        elif not place.devices:
            lines.append((f"{place.kind}: none; looked for {place.looked_for}", "dim"))
        for device in place.devices:
            lines.append((f"{place.kind}: {device.name}", "bold"))
            lines += [(f"    {line}", "") for line in device.detail.splitlines()]
            lines += [(f"  {device.config}", "cyan")] if device.config else []
    if any(device.config for place in places for device in place.devices):
        lines += [("", ""), ("Lines with braces go under `sources:` in a rig, as they are.", "")]
    return Text("\n").join(Text(text, style=style) for text, style in lines)


def verification_text(found: Verification) -> RenderableType:
    """What ``replay --verify`` says to a person: what holds, the first difference, and what nobody can know."""
    how = {"equal": "exactly", "other": "equivalently, on another runtime", "none": ""}[found.fingerprint]
    made = f"{counted(found.windows, 'window')} and {counted(found.predictions, 'prediction')}"
    lines = [Text(f"made again: {made} {how}".rstrip())]
    if found.first_difference is not None:
        lines.append(Text(f"{found.differences} differ; the first: {found.first_difference}", style="red"))
    if found.unverifiable_count:
        lines.append(Text(f"{found.unverifiable_count} cannot be verified:", style="yellow"))
        lines += [Text(f"  {text}") for text in found.unverifiable]
        more = found.unverifiable_count - len(found.unverifiable)
        lines += [Text(f"  and {more} more")] if more else []
    if found.elsewhere_count:
        lines.append(Text(f"{found.elsewhere_count} cannot be told without other segments, no doubt about this one:"))
        lines += [Text(f"  {text}") for text in found.elsewhere]
        more = found.elsewhere_count - len(found.elsewhere)
        lines += [Text(f"  and {more} more")] if more else []
    return Group(*lines, Text("verified" if found.holds else "not verified", style="green" if found.holds else "red"))


def calibration_text(
    pairs: list[Offset], lines: dict[str, str], reference: str | None, contradiction: str
) -> RenderableType:
    """What ``calibrate`` says to a person: every pair, before and after, and ``lines`` for the rig by source."""
    table = numbers("streams", ("offset", "95 % interval", "fit before", "fit after"))
    table.add_column("from, or why not", sentences=True)
    for pair in pairs:
        name = f"{pair.stream} against {pair.reference}"
        fits = [number(pair.before, 2), number(pair.after, 2)]
        if pair.offset_ns is None or pair.interval_ns is None:
            table.add_row(name, Text("undecidable", style="yellow"), "–", *fits, pair.reason)
            continue
        low, high = (f"{ns / 1e6:+.1f}" for ns in pair.interval_ns)
        offset = Text(f"{pair.offset_ns / 1e6:+.1f} ms", style="green")
        table.add_row(name, offset, f"{low} to {high} ms", *fits, ", ".join(pair.events))
    if contradiction:
        return Group(table, Text(), Text(f"the pairs contradict each other: {contradiction}", style="yellow"))
    if not lines:
        return Group(table, Text(), Text("nothing to set in a rig"))
    said = [Text(f"  {name}: {{…, {text}}}") for name, text in lines.items()]
    return Group(table, Text(), Text(f"for the rig, if the times of {reference} are right:\nsources:"), *said)


def recalibration_text(made: Recalibration) -> RenderableType:
    """What ``recalibrate`` says to a person: what moved by how much, and what is not in the new recording."""
    table = numbers("stream, ms", ("offset", "moved p50", "moved least", "moved most",
                                   "uncertainty before", "uncertainty after"))  # fmt: skip
    table.add_column(sentences=True)
    for name, change in made.streams.items():
        moved, doubt = change.shift_ms, change.uncertainty_ms
        cells = [change.offset_ms, moved["p50"], moved["min"], moved["max"]]
        words = change.left and f"not refitted: {change.left}"
        table.add_row(
            name, *(f"{ms:+.2f}" for ms in cells), number(doubt["before"], 2), number(doubt["after"], 2),
            words or ("refitted" if change.refitted else ""),
        )  # fmt: skip
    lines = [Text(), Text(f"{made.out}: done; {made.recording} is as it was")]
    if made.dropped:
        what = " and ".join(f"{count} {DROPPED[topic]}" for topic, count in made.dropped.items())
        lines.append(Text(f"left out, for they came from the old times: {what}; `sensorium replay` makes them again"))
    return Group(table, *lines)


DROPPED = {"manifest": "windows", "prediction": "predictions", "gap": "gaps between windows"}
