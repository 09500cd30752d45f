"""The evaluation as one HTML page that needs nothing beside itself: no network, no script, light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from pipeline.evaluate_style import STYLE
from pipeline.evaluate_text import UNITS, estimate, percent, unseen
from pipeline.evaluation import Estimate, Evaluation, FaultScores, Scores, SubsetResult
from pipeline.svg import Series, bar, curves, key, reliability

STEPS = ("as it is", "mild", "medium", "severe")
PLOTTED = 31
"""Sets of streams that have a reliability diagram of their own."""


def page(found: Evaluation) -> str:
    """The whole page."""
    body = [
        _head(found), _warnings(found), _cards(found), _labels(found), _subsets(found), _reliabilities(found),
        f'<div class="two"><div>{_observed(found)}</div>\n<div>{_confusions(found)}{_contributions(found)}</div></div>',
        _robustness(found), _groups(found), _sessions(found), _words(found),
    ]  # fmt: skip
    title = f"{escape(found.bundle.name)}: evaluation"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{chr(10).join(part for part in body if part)}\n</main>\n</body>\n</html>\n"
    )


def _head(found: Evaluation) -> str:
    windows = found.subsets[0].scores.windows
    sessions = "1 session" if len(found.sessions) == 1 else f"{len(found.sessions)} sessions"
    return (f'<h1>{escape(found.bundle.name)}</h1>\n<p class="soft">evaluated on {sessions}, {windows} windows with a '
            f'known truth<br><span class="hash">bundle {found.bundle.sha256}</span></p>')  # fmt: skip


def _warnings(found: Evaluation) -> str:
    if not found.warnings:
        return ""
    return f'<div class="warn"><ul>{"".join(f"<li>{escape(text)}</li>" for text in found.warnings)}</ul></div>'


def _cards(found: Evaluation) -> str:
    full = found.subsets[0].scores
    stated = "not stated" if found.stated_coverage is None else f"stated {percent(found.stated_coverage)} %"
    size = "–" if full.set_size is None else f"{full.set_size:.2f}"
    cards = [
        ("accuracy", f"{percent(full.accuracy.value)} %", _interval(full.accuracy)),
        ("macro F1", percent(full.macro_f1.value), _interval(full.macro_f1)),
        ("calibration error", f"{percent(full.calibration_error)} %", "of confidence, in the mean"),
        ("truth in the set", f"{percent(full.coverage.value)} %", f"{stated}; {size} labels a set"),
        ("abstains", f"{percent(full.abstained.value)} %", _interval(full.abstained)),
        ("right if it answers", f"{percent(full.answered_accuracy.value)} %", _interval(full.answered_accuracy)),
    ]
    inside = "".join(f'<div class="card"><span>{n}</span><b>{v}</b><small>{s}</small></div>' for n, v, s in cards)
    return f'<h2>With all of its streams</h2>\n<div class="cards">{inside}</div>'


def _labels(found: Evaluation) -> str:
    """Each label with all streams."""
    names = ("windows", "recall %", "F1", "abstains", "sure and wrong", "told apart")
    heads = '<th class="left">label</th>' + "".join(f"<th>{name}</th>" for name in names)
    heads += '<th class="left">from what is most like it</th>'
    rows = ""
    for label, one in found.subsets[0].classes.items():
        cells = (str(one.windows), percent(one.recall), percent(one.f1), percent(one.abstained), percent(one.wrong),
                 percent(one.apart, 0))  # fmt: skip
        like = "–" if one.resembles is None else escape(one.resembles)
        rows += (f"<tr><th>{escape(label)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells)
                 + f'<td class="left">{like}</td></tr>')  # fmt: skip
    return _section("Each label, with all streams", "", heads, rows)


def _interval(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return ""
    return f"95 %: {percent(value.low)} to {percent(value.high)}"


# -- sets of streams ---------------------------------------------------------------------------------------------------


def _subsets(found: Evaluation) -> str:
    if len(found.subsets) == 1:
        return ""
    heads = "".join(f'<th class="turn"><span>{escape(name)}</span></th>' for name in found.streams)
    names = (
        "%", "macro F1", "calibration<br>error", "in set", "set size", "abstains", "right if it<br>answers",
        "can tell<br>apart: right", "cannot:<br>abstains", "sure and<br>wrong",
    )  # fmt: skip
    bars = "accuracy" if found.subsets[0].scores.accuracy.low is None else "accuracy, with its interval"
    heads += f'<th class="left">{bars}</th>' + "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(f"<tr>{_dots(one, found.streams)}{_subset(one)}</tr>" for one in found.subsets)
    about = (
        "Any stream may be missing. In per cent, but for the set size. A bar is the accuracy of the most probable "
        "label, also where the model abstains; the last columns split it: over the labels that these streams can tell "
        "from every other (beside what all streams reach on the same windows), and how often the model abstains, or "
        "is sure and wrong, where they cannot."
    )
    return _section("With any of its streams", about, heads, rows)


def _dots(one: SubsetResult, streams: Sequence[str]) -> str:
    """A dot a stream, full if it is there. Its words say so to who hears the page."""
    cells = ""
    for name in streams:
        there = name in one.streams
        words = escape(name if there else f"without {name}")
        cells += (
            f'<td class="has{"" if there else " no"}" title="{words}" aria-label="{words}">{"●" if there else "○"}</td>'
        )
    return cells


def _subset(one: SubsetResult) -> str:
    s = one.scores
    size = "–" if s.set_size is None else f"{s.set_size:.2f}"
    can = "–" if one.observable_accuracy is None else f"{percent(one.observable_accuracy)}"
    can += "" if one.full_accuracy is None else f" <small>of {percent(one.full_accuracy)}</small>"
    cells = [percent(s.accuracy.value), percent(s.macro_f1.value), percent(s.calibration_error),
             percent(s.coverage.value), size, percent(s.abstained.value), percent(s.answered_accuracy.value), can,
             percent(one.rest_abstained, 0), percent(one.rest_wrong, 0)]  # fmt: skip
    plot = bar(s.accuracy.value, s.accuracy.low, s.accuracy.high)
    first = f'<td class="barcell" title="{estimate(s.accuracy)}">{plot}</td>'
    return first + "".join(f"<td>{cell}</td>" for cell in cells)


def _observed(found: Evaluation) -> str:
    """Recall of each label with each set of streams."""
    heads = "".join(f'<th class="turn"><span>{escape(name)}</span></th>' for name in found.streams)
    heads += _label_heads(found.labels)
    rows = ""
    for one in found.subsets:
        hidden = unseen(one)
        cells = "".join(_heat(c.recall, label in hidden, _resembling(c.resembles, c.apart))
                        for label, c in one.classes.items())  # fmt: skip
        rows += f"<tr>{_dots(one, found.streams)}{cells}</tr>"
    about = (
        "How many windows of each label, in per cent, were given that label. Framed: these streams cannot tell it "
        "from some other label, so what is right there is right by frequency alone."
    )
    return _section("What each set of streams can tell", about, heads, rows, "heat fit")


def _label_heads(labels: Sequence[str]) -> str:
    """Headings of narrow columns: turned where they would not stay narrow."""
    turned = len(labels) > 5 or any(len(label) > 9 for label in labels)
    return "".join(f'<th class="turn"><span>{escape(label)}</span></th>' if turned else f"<th>{escape(label)}</th>"
                   for label in labels)  # fmt: skip


def _resembling(other: str | None, apart: float | None) -> str:
    return "" if other is None or apart is None else f"most like {other}: told apart {100 * apart:.0f} % of the time"


def strength(value: float) -> float:
    """How much of its colour a cell shows: never so much that the page's ink could not be read on it, which also reads
    where a printer leaves the colour out."""
    return 0.04 + 0.5 * min(max(abs(value), 0.0), 1.0)


def _heat(value: float | None, framed: bool = False, title: str = "", words: str | None = None) -> str:
    """A cell as dark as its share."""
    if value is None:
        return '<td class="soft">–</td>'
    kind = "cannot" if framed else ""
    colour = f"rgb(var(--heat) / {strength(value):.2f})"
    shown = f"{100 * value:.0f}" if words is None else words
    return f'<td class="{kind}" style="background:{colour}" title="{escape(title)}">{shown}</td>'


def _confusions(found: Evaluation) -> str:
    first, *others = found.subsets
    about = "Truth in rows, in per cent of the row; what the model says in columns, also where it abstains."
    more = "".join(f"<h3>{escape(_name(one))}</h3>\n{_confusion(one, found.labels)}" for one in others[:PLOTTED])
    more = f"<details><summary>with fewer streams</summary>{more}</details>" if more else ""
    return f"<h2>Confusions</h2>\n<p class='soft'>{about}</p>\n{_confusion(first, found.labels)}{more}"


def _confusion(one: SubsetResult, labels: Sequence[str]) -> str:
    blind = any(row[-1] for row in one.confusion)
    columns = [*labels, "no label"] if blind else list(labels)
    heads = f"<th>truth</th>{_label_heads(columns)}<th>windows</th>"
    rows = ""
    for label, row in zip(labels, one.confusion, strict=True):
        total = sum(row)
        cells = "".join(_heat(n / total if total else None, title=f"{n} of {total} windows", words=_part(n, total))
                        for n in row[: len(columns)])  # fmt: skip
        rows += f"<tr><th>{escape(label)}</th>{cells}<td>{total}</td></tr>"
    return _table(f"confusions with {_name(one)}", heads, rows, "heat fit")


def _name(one: SubsetResult) -> str:
    return " + ".join(one.streams)


def _part(n: int, total: int) -> str:
    return f"{100 * n / total:.0f}" if n and total else "·"


def _reliabilities(found: Evaluation) -> str:
    cards = ""
    for one in found.subsets[:PLOTTED]:
        name = _name(one)
        r, error = one.reliability, one.scores.calibration_error
        plot = reliability(r.confidence, r.accuracy, f"reliability with {name}")
        verdict = "bad" if error is None or error > 0.05 else "good"
        cards += (
            f'<div class="card"><h3>{escape(name)}</h3><span class="{verdict}">error {percent(error)} %</span>'
            f"{plot}</div>"
        )
    about = (
        "Windows in ten bins of equal size by confidence: what the model said (right: surer), how often it was "
        "right (up). On the dashed line it is as good as it says; above it is better. An error above 5 % is "
        "red."
    )
    if len(found.subsets) > PLOTTED:
        about += f" The other {len(found.subsets) - PLOTTED} sets of streams are in --json."
    return f"<h2>Is it as sure as it should be?</h2>\n<p class='soft'>{about}</p>\n<div class='plots'>{cards}</div>"


# -- what it rests on --------------------------------------------------------------------------------------------------


def _contributions(found: Evaluation) -> str:
    if not found.contributions:
        return ""
    heads = '<th class="left">label</th>' + "".join(f"<th>{escape(name)}</th>" for name in found.streams)
    rows = ""
    for label, shares in found.contributions.items():
        cells = "".join(_heat(shares[name], words=f"{round(shares[name], 2) + 0.0:+.2f}") for name in found.streams)
        rows += f"<tr><th>{escape(label)}</th>{cells}</tr>"
    about = (
        "Mean share of each stream in the confidence (Shapley values), over the windows of a label that were "
        "predicted right. A row sums to what the model knows beyond what it says when it sees nothing."
    )
    return _section("Who told it", about, heads, rows, "heat fit")


def _robustness(found: Evaluation) -> str:
    if not found.robustness:
        return ""
    kinds = [kind for kind in UNITS if kind != "missing"]
    legend = "".join(f"<span>{key(i)} {_levels(found, kind)} {escape(UNITS[kind])}</span>"
                     for i, kind in enumerate(kinds))  # fmt: skip
    legend += '<span><i class="rule"></i> without the stream</span>'
    cards = ""
    for stream in found.streams:
        own = [one for one in found.robustness if one.stream == stream]
        if own:
            missing = next((one.scores.accuracy.value for one in own if one.fault == "missing"), None)
            lines = [_curve(found.subsets[0].scores, own, kind) for kind in kinds]
            plot = curves(lines, STEPS, missing, f"accuracy when {stream} gets worse")
            cards += f'<div class="card"><h3>{escape(stream)}</h3>{plot}</div>'
    about = (
        "Accuracy when one stream gets worse and nobody tells the model. A line that falls below the dashed one is "
        "a stream that does more harm than its absence. Of each fault three strengths: mild, medium, severe."
    )
    return (
        f"<h2>When a stream goes wrong</h2>\n<p class='soft'>{about}</p>\n<div class='legend'>{legend}</div>\n"
        f"<div class='plots wide'>{cards}</div>\n<details><summary>in numbers</summary>{_faults(found)}</details>"
    )


def _faults(found: Evaluation) -> str:
    names = ("accuracy %", "macro F1", "in set", "abstains", "right if it answers")
    heads = '<th class="left">stream</th><th class="left">what is wrong</th>' + "".join(f"<th>{n}</th>" for n in names)
    rows = ""
    for one in found.robustness:
        s, level = one.scores, "" if one.fault == "missing" else f"{one.level:g} "
        cells = (estimate(s.accuracy), percent(s.macro_f1.value), percent(s.coverage.value), percent(s.abstained.value),
                 percent(s.answered_accuracy.value))  # fmt: skip
        rows += (f'<tr><th>{escape(one.stream)}</th><td class="left">{level}{escape(UNITS[one.fault])}</td>'
                 + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")  # fmt: skip
    return _table("when a stream goes wrong, in numbers", heads, rows)


def _levels(found: Evaluation, kind: str) -> str:
    return ", ".join(dict.fromkeys(f"{one.level:g}" for one in found.robustness if one.fault == kind))


def _curve(clean: Scores, own: Iterable[FaultScores], kind: str) -> Series:
    all_scores = [clean, *(one.scores for one in own if one.fault == kind)]
    points = [(float(i), s.accuracy.value or 0.0) for i, s in enumerate(all_scores)]
    intervals = [None if s.accuracy.low is None or s.accuracy.high is None else (s.accuracy.low, s.accuracy.high)
                 for s in all_scores]  # fmt: skip
    return Series(kind, points, intervals)


# -- sessions ----------------------------------------------------------------------------------------------------------


def _groups(found: Evaluation) -> str:
    if not found.groups:
        return ""
    heads = f'<th class="left">{escape(found.attribute or "")}</th><th>sessions</th>' + _score_heads()
    rows = "".join(f"<tr><th>{escape(one.value)}</th><td>{one.sessions}</td>{_score_cells(one.scores)}</tr>"
                   for one in found.groups)  # fmt: skip
    return _section(f"By {found.attribute or ''}", "", heads, rows)


def _sessions(found: Evaluation) -> str:
    heads = '<th class="left">recording</th>' + _score_heads() + '<th class="left">SHA-256</th>'
    rows = ""
    for one in found.sessions:
        trained = f' <small class="bad">{one.used}</small>' if one.used else ""
        rows += (f"<tr><th>{escape(one.file)}{trained}</th>{_score_cells(one.scores)}"
                 f'<td class="left"><small>{one.sha256[:16]}…</small></td></tr>')  # fmt: skip
    return _section("Sessions", "", heads, rows)


def _score_heads() -> str:
    names = ("windows", "accuracy %", "macro F1", "calibration error", "in set", "abstains", "right if it answers")
    return "".join(f"<th>{name}</th>" for name in names)


def _score_cells(s: Scores) -> str:
    cells = [str(s.windows), estimate(s.accuracy), percent(s.macro_f1.value), percent(s.calibration_error),
             percent(s.coverage.value), percent(s.abstained.value), percent(s.answered_accuracy.value)]  # fmt: skip
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _section(title: str, about: str, heads: str, rows: str, kind: str = "") -> str:
    words = f"<p class='soft'>{about}</p>\n" if about else ""
    return f"<h2>{escape(title)}</h2>\n{words}{_table(title, heads, rows, kind)}"


def _table(name: str, heads: str, rows: str, kind: str = "") -> str:
    """A table in a frame that scrolls where it is too wide, by the keyboard as well."""
    frame = f'class="scroll {kind}" tabindex="0" role="region" aria-label="{escape(name)}"'
    return f"<div {frame}><table><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>"


def _words(found: Evaluation) -> str:
    stated = "" if found.stated_coverage is None else f" The bundle states {percent(found.stated_coverage)} %."
    return f"""<h2>In these numbers</h2>
<p class="soft"><b>Windows</b> are replayed by event time through the aligner and the fusion that run live; the truth
is the label at a window's end. <b>Accuracy</b> and the confusions take the most probable label, also where the model
<b>abstains</b>, which is where it is too unsure to stand by it; <b>right if it answers</b> is of the other windows
alone. <b>Sure and wrong</b> is the share of windows with a wrong answer that it stood by. <b>Macro F1</b> is the mean
of the labels' F1, each counting alike however rare. <b>Intervals</b> (95 %) are drawn over whole sessions, since
windows of one session resemble each other. <b>Calibration error</b> is the mean distance between confidence and share
right over ten bins of equal size. <b>In set</b> is how often the prediction set, the labels that the model does not
rule out, holds the truth; <b>set size</b> is how many labels it has in the mean.{stated} Unless the bundle's sets may
be empty, they hold the most probable label, so that an accuracy above that covers more. <b>Told apart</b> is the area
under the curve of the odds between two labels; from 0.9 on two labels count as told apart. A window with nothing in
it of the streams in question has no label: it counts as wrong and as abstained.</p>"""
