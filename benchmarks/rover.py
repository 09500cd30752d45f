"""How good ``models/rover`` is in worlds that it has not seen, with every set of its sensors.

    python benchmarks/rover.py [--bundle models/rover] [--sessions FOLDER] [--count 400] [--duration 20]
                               [--seed 20000] [--ranges train|held-out] [--jobs 2] [--json]

Simulates as many sessions as are missing in ``--sessions`` (a temporary folder by default), from seeds that nothing
was trained or calibrated on, evaluates the bundle on them as ``sensorium evaluate`` does, and holds the result against
the goals. Intervals (95 %) are drawn over sessions. Sessions are as long as those that the bundle was calibrated on,
for how often a lone sensor's cue is real depends on how long ago a session began.

What a set of sensors can observe is a matter of the simulation's design, not of the model: a class is *observable* by
sensors of which at least two have a cue of it (``pipeline.sim.cues``), since one alone cannot tell it from its decoy;
``clear``, which every decoy is, always counts. "over observable" is the accuracy over windows of such classes, "all
sensors there" what all four reach on the same windows, "abstains on rest" how often the model does not answer in
windows of the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.evaluate import evaluate
from pipeline.evaluation import Evaluation, SubsetResult
from pipeline.sim.cues import CUES
from pipeline.sim.generate import record_sessions
from pipeline.sim.ranges import RANGES

ROOT = Path(__file__).resolve().parent.parent


def observable(streams: list[str]) -> set[str]:
    """The classes of which these sensors have two cues or more, and ``clear``."""
    return {"clear"} | {label for label, sensors in CUES.items() if len({*sensors} & {*streams}) >= 2}


def share(found: Evaluation, one: SubsetResult, labels: set[str]) -> float | None:
    """Accuracy of ``one`` over the windows of ``labels``."""
    rows = [i for i, label in enumerate(found.labels) if label in labels]
    windows = sum(sum(one.confusion[i]) for i in rows)
    return sum(one.confusion[i][i] for i in rows) / windows if windows else None


def abstained(one: SubsetResult, labels: set[str]) -> float | None:
    """How often the model abstains in windows of ``labels``."""
    rows = [scores for label, scores in one.classes.items() if label in labels and scores.windows]
    windows = sum(scores.windows for scores in rows)
    return sum((scores.abstained or 0.0) * scores.windows for scores in rows) / windows if windows else None


def row(found: Evaluation, one: SubsetResult) -> dict[str, Any]:
    """A line of the table, shares in per cent."""
    seen, scores = observable(one.streams), one.scores
    rest = {*found.labels} - seen

    def percent(value: float | None) -> float | None:
        return None if value is None else round(100 * value, 2)

    def spread(pair: Any) -> list[float | None]:
        return [percent(value) for value in pair or (None, None)]

    return {
        "streams": "+".join(one.streams),
        "accuracy": percent(scores.accuracy.value),
        "accuracy_interval": spread((scores.accuracy.low, scores.accuracy.high)),
        "macro_f1": percent(scores.macro_f1.value),
        "ece": percent(scores.calibration_error),
        "ece_interval": spread(scores.calibration_interval),
        "coverage": percent(scores.coverage.value),
        "coverage_interval": spread((scores.coverage.low, scores.coverage.high)),
        "set_size": None if scores.set_size is None else round(scores.set_size, 2),
        "abstained": percent(scores.abstained.value),
        "right_if_answered": percent(scores.answered_accuracy.value),
        "over_observable": percent(share(found, one, seen)),
        "all_sensors_there": percent(share(found, found.subsets[0], seen)),
        "not_observable": sorted(rest),
        "abstains_on_rest": percent(abstained(one, rest)),
    }


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, what was, and whether."""

    def by_size(n: int) -> list[dict[str, Any]]:
        return [r for r in rows if r["streams"].count("+") == n - 1]

    full, lacking, alone = by_size(4)[0], by_size(3), max(by_size(1), key=lambda r: r["accuracy"])
    costs = {r["streams"]: round(r["all_sensors_there"] - r["over_observable"], 2) for r in lacking}
    worst = max(rows, key=lambda r: r["ece"])
    blind = [r for r in rows if r["abstains_on_rest"] is not None]
    quiet = min(blind, key=lambda r: r["abstains_on_rest"])
    low, high = (choose(rows, key=lambda r: r["coverage"]) for choose in (min, max))
    return [
        {"goal": "all sensors, accuracy >= 95", "found": full["accuracy"], "reached": full["accuracy"] >= 95},
        {"goal": "points above the best single sensor >= 10", "found": round(full["accuracy"] - alone["accuracy"], 2),
         "reached": full["accuracy"] - alone["accuracy"] >= 10, "where": alone["streams"]},
        {"goal": "one sensor missing costs <= 5 over what the rest observe", "found": max(costs.values()),
         "reached": max(costs.values()) <= 5, "where": max(costs, key=lambda k: costs[k])},
        {"goal": "abstains >= 80 on classes that are not observable", "found": quiet["abstains_on_rest"],
         "reached": quiet["abstains_on_rest"] >= 80, "where": quiet["streams"]},
        {"goal": "ECE <= 5 for every set of sensors", "found": worst["ece"], "reached": worst["ece"] <= 5,
         "where": worst["streams"]},
        {"goal": "90 % sets cover >= 88", "found": low["coverage"], "reached": low["coverage"] >= 88,
         "where": low["streams"]},
        {"goal": "90 % sets cover <= 92", "found": high["coverage"], "reached": high["coverage"] <= 92,
         "where": high["streams"]},
    ]  # fmt: skip


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Simulates what is missing and evaluates."""
    seeds = range(options.seed, options.seed + options.count)
    for i, _ in enumerate(record_sessions(folder, seeds, options.ranges, options.duration, options.jobs), 1):
        print(f"\r{i} sessions simulated", end="", file=sys.stderr)

    def progress(done: float, total: int, what: str) -> None:
        print(f"\r{done:.0f} of {total} sessions evaluated", end="", file=sys.stderr)

    found = evaluate(options.bundle, [folder], jobs=options.jobs, progress=progress)
    print(file=sys.stderr)
    rows = [row(found, one) for one in found.subsets]
    return {
        "bundle": found.bundle.name,
        "sha256": found.bundle.sha256,
        "ranges": options.ranges,
        "sessions": len(found.sessions),
        "windows": found.subsets[0].scores.windows,
        "rows": rows,
        "goals": goals(rows),
        "confusion": {"labels": found.labels, "all sensors": found.subsets[0].confusion},
    }


COLUMNS = ("accuracy", "ece", "coverage", "set_size", "abstained", "right_if_answered", "over_observable",
           "all_sensors_there", "abstains_on_rest")  # fmt: skip


def cell(line: dict[str, Any], column: str) -> str:
    value, interval = line[column], line.get(f"{column}_interval", [None])
    text = "–" if value is None else f"{value:.2f}" if column == "set_size" else f"{value:.1f}"
    return text if interval[0] is None else f"{text} ({interval[0]:.1f} to {interval[1]:.1f})"


def table(found: dict[str, Any]) -> str:
    """Markdown, in per cent."""
    heads = ["sensors", *(column.replace("_", " ") for column in COLUMNS), "not observable"]
    lines = [heads, ["---"] * len(heads)]
    for one in found["rows"]:
        names = "all" if one is found["rows"][0] else one["streams"].replace("+", ", ")
        lines.append([names, *(cell(one, c) for c in COLUMNS), ", ".join(one["not_observable"]) or "–"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    reached = "\n".join(
        f"| {g['goal']} | {g['found']} | {g.get('where', '')} | {'yes' if g['reached'] else 'no'} |"
        for g in found["goals"]
    )
    head = f"{found['bundle']}, ranges `{found['ranges']}`: {found['sessions']} sessions, {found['windows']} windows"
    return f"{head}\n\n{text}\n\n| goal | found | where | reached |\n| --- | --- | --- | --- |\n{reached}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=ROOT / "models" / "rover")
    parser.add_argument("--sessions", type=Path, help="where the sessions are, or are put")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--duration", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=20000)
    parser.add_argument("--ranges", choices=list(RANGES), default="train")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rover-") as scratch:
        found = measured(options, options.sessions or Path(scratch))
    print(json.dumps(found, indent=1) if options.json else table(found))


if __name__ == "__main__":
    main()
