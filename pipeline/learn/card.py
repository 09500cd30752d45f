"""The card of a trained bundle: in words and numbers, what it was made of, how good it is, and what is not known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.answers import Answers, in_set
from pipeline.learn.dataset import Labelled
from pipeline.learn.fusion import LateFusion
from pipeline.learn.model import Said, subsets_of
from pipeline.learn.train import Trained
from pipeline.modelfile import Calibration
from pipeline.scoring import accuracy, calibration_error, confusion, f1_by_class, macro_f1
from pipeline.strict import listed

Array = np.ndarray[Any, Any]

_LEGEND = (
    "Accuracy: the most probable label is the truth, also where the model abstains. Macro-F1: the mean of the labels' "
    "F1, each counting alike. Log loss: the mean of -ln of the probability that the truth was given; 0 is the best. "
    "Calibration error: how far confidence is from how often it is right. In set: the prediction set, the labels that "
    "it does not rule out, holds the truth; set size: how many labels it has in the mean. Answered: it does not "
    "abstain; of these right: its accuracy there."
)
"""What the columns of ``_how_good`` mean."""


class Score(NamedTuple):
    """How good the model is on some windows with only ``streams`` left. Shares of 1."""

    streams: tuple[str, ...]
    windows: int
    accuracy: float
    macro_f1: float
    log_loss: float
    calibration_error: float
    in_set: float
    set_size: float
    answered: float
    """Share of the windows in which it does not abstain, and ``right`` the share of these in which it is right."""
    right: float


def score(said: Said, calibration: Calibration, labels: Sequence[str]) -> list[Score]:
    """One row a subset of the streams, the largest first; of more than eight streams those that ``subsets_of`` has."""
    names = list(said.there)
    answers = Answers(calibration, labels, names)
    there = np.stack([said.there[name] for name in names], 1)
    return [
        _score(subset, answers, said.logits[subset], there & [name in subset for name in names], said.truth, labels)
        for subset in reversed(subsets_of(names))
        if subset in said.logits
    ]


def _score(
    subset: frozenset[str], answers: Answers, logits: Array, members: Array, truth: Array, labels: Sequence[str]
) -> Score:
    p = answers.probabilities(logits, members)
    predicted, confidence, n = p.argmax(1), p.max(1), len(truth)
    own = p[np.arange(n), truth]
    sets = np.stack([in_set(row[None], answers.at(member))[0] for row, member in zip(p, members, strict=True)])
    silent = np.array([not m.any() or answers.abstains(m, int(label), float(c))
                       for m, label, c in zip(members, predicted, confidence, strict=True)])  # fmt: skip
    answered = ~silent
    return Score(
        tuple(sorted(subset)), n, accuracy(truth, predicted), float(macro_f1(confusion(truth, predicted, len(labels)))),
        float(-np.log(np.maximum(own, 1e-12)).mean()), calibration_error(confidence, predicted == truth),
        float(sets[np.arange(n), truth].mean()), float(sets.sum(1).mean()), float(answered.mean()),
        accuracy(truth[answered], predicted[answered]),
    )  # fmt: skip


def card(
    trained: Trained,
    calibration: Calibration,
    scores: Sequence[Score],
    said: Said | None,
    agreement: Mapping[str, float],
    proven: str,
) -> str:
    """The card as Markdown. ``scores`` and ``said`` are of the sessions tested on, empty where no label is in them."""
    file = trained.config.file
    parts = [
        f"# {file.name}",
        _what(trained),
        "## Data",
        _data(trained),
        "## Training",
        _training(trained),
        "## How good",
        _how_good(trained, scores),
        *([_by_label(trained, said)] if said is not None and len(said.truth) else []),
        "## Calibration",
        _calibration(trained, calibration),
        *_worth(trained),
        "## Checks",
        "ONNX Runtime and torch agree: " + ", ".join(f"{n} to {d:.1g}" for n, d in agreement.items()) + ". " + proven,
        "## Limits",
        _limits(trained),
    ]
    return "\n\n".join(parts) + "\n"


def _what(trained: Trained) -> str:
    file = trained.config.file
    streams = ", ".join(f"`{name}` ({stream.payload})" for name, stream in trained.streams.items())
    return (
        f"Tells {', '.join(f'`{label}`' for label in trained.labels)} apart, from windows of {file.window.steps} steps "
        f"of {file.window.hop_ms:g} ms of {streams}. Fusion strategy: {file.strategy}. Made by `sensorium train`; "
        "`train.yaml` is what it was told, `training.json` the curves, `weights.npz` the weights to begin another "
        "training from."
    )


def _data(trained: Trained) -> str:
    entry = trained.config.file.split
    rows = ["| part | sessions | minutes | windows | " + " | ".join(trained.labels) + " |",
            "| --- | ---: | ---: | ---: |" + " ---: |" * len(trained.labels)]  # fmt: skip
    for part, sessions in (("learnt from", trained.split.train), ("held out", trained.split.held_out),
                           ("tested on", trained.split.test)):  # fmt: skip
        rows.append(_data_row(part, sessions, len(trained.labels), trained.config.file.window.hop_ms))
    groups = {p: sorted({trained.split.groups[s.session.name] for s in sessions})
              for p, sessions in (("held out", trained.split.held_out), ("tested on", trained.split.test))}  # fmt: skip
    said = [f"Split by {entry.by}, seed {entry.seed}, never by window."]
    said += [f"{part.capitalize()}: {', '.join(names)}." for part, names in groups.items() if names]
    verdicts = ["| stream | " + " | ".join(_kinds(trained)) + " |", "| --- |" + " ---: |" * len(_kinds(trained))]
    for name in trained.streams:
        counts = _verdicts(trained, name)
        verdicts.append(f"| {name} | " + " | ".join(str(counts[kind]) for kind in _kinds(trained)) + " |")
    return "\n".join(rows) + "\n\n" + " ".join(said) + "\n\nSteps by verdict, all sessions:\n\n" + "\n".join(verdicts)


def _data_row(part: str, sessions: Sequence[Labelled], labels: int, hop_ms: float) -> str:
    counts = sum((np.bincount(s.truth[s.truth >= 0], minlength=labels) for s in sessions), np.zeros(labels, np.int64))
    minutes = sum(len(s) for s in sessions) * hop_ms / 60_000
    cells = " | ".join(str(int(count)) for count in counts)
    return f"| {part} | {len(sessions)} | {minutes:.1f} | {int(counts.sum())} | {cells} |"


def _verdicts(trained: Trained, name: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for session in (*trained.split.train, *trained.split.held_out, *trained.split.test):
        counts.update(session.session.verdicts[name])
    return counts


def _kinds(trained: Trained) -> list[str]:
    found = set().union(*(_verdicts(trained, name) for name in trained.streams))
    known = [kind for kind in ("ok", "partial", "late", "missing") if kind in found]
    return known + sorted(found - set(known))


def _training(trained: Trained) -> str:
    file = trained.config.file
    sizes = sum(p.numel() for p in trained.model.parameters())
    text = (
        f"{file.train.epochs} epochs, seed {file.seed}, {sizes} weights. The weights of the last epoch's mean were "
        "taken; none were chosen by how they did."
    )
    if file.teachers is not None:
        epochs = file.teachers.train(file.train).epochs
        text += (
            f" It learnt from what {file.teachers.count} models like it, of other seeds and {epochs} epochs, say in "
            f"the mean of the sessions, of which {file.teachers.blend:.0%} were blended with others; only these models "
            "learnt from labels."
        )
    if trained.begun_from:
        text += " Begun from " + ", ".join(f"{what} ({how})" for what, how in trained.begun_from.items()) + "."
    last = [row for row in trained.curves if "held_out_accuracy" in row][-1:]
    for row in last:
        text += (
            f" At the end{', before the streams were weighed,' if _weighed(trained) else ''} the loss was "
            f"{row['loss']:.3f}, and of {row['held_out_windows']} windows held out "
            f"{row['held_out_accuracy']:.1%} were right (macro-F1 {row['held_out_f1']:.3f}, log loss "
            f"{row['held_out_loss']:.3f})."
        )
    return text + _lacking(trained, "held out", "These figures are of the others.")


def _lacking(trained: Trained, part: str, so: str) -> str:
    """A sentence on the labels that the sessions of a part lack, and what that means; "" if they lack none."""
    labels = trained.split.lacking(trained.labels).get(part)
    return f" No session {part} has {listed(labels)}. {so}" if labels else ""


def _how_good(trained: Trained, scores: Sequence[Score]) -> str:
    if not scores:
        return "No labelled window was kept to test on, so nothing is known of how good it is on others."
    rows = ["On the sessions tested on, with all other streams masked:", "",
            "| streams | accuracy % | macro-F1 | log loss | calibration error % | in set % | set size | answered % | "
            "of these right % |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for s in scores:
        right = "–" if np.isnan(s.right) else f"{100 * s.right:.1f}"
        rows.append(
            f"| {' + '.join(s.streams)} | {100 * s.accuracy:.1f} | {s.macro_f1:.3f} | {s.log_loss:.3f} | "
            f"{100 * s.calibration_error:.1f} | {100 * s.in_set:.1f} | {s.set_size:.2f} | {100 * s.answered:.1f} | "
            f"{right} |"
        )
    missing = _lacking(trained, "tested on", "So nothing is known of these, and the figures are of the others.")
    return "\n".join(rows) + f"\n\n{_LEGEND}{missing}"


def _by_label(trained: Trained, said: Said) -> str:
    everything = frozenset(trained.streams)
    counts = confusion(said.truth, said.logits[everything].argmax(1), len(trained.labels))
    f1 = f1_by_class(counts)
    rows = ["With all streams, by truth (rows) and answer (columns), in windows:", ""]
    rows += ["| | " + " | ".join(trained.labels) + " | F1 |", "| --- |" + " ---: |" * (len(trained.labels) + 1)]
    for label, row, one in zip(trained.labels, counts, f1, strict=True):
        value = "–" if np.isnan(one) else f"{one:.3f}"
        rows.append(f"| {label} | " + " | ".join(str(int(n)) for n in row[:-1]) + f" | {value} |")
    return "\n".join(rows)


def _calibration(trained: Trained, calibration: Calibration) -> str:
    if calibration.set_coverage is None:
        return "No labelled window was held out, so its confidence is not calibrated and its sets hold one label."
    entry = trained.config.file.calibration
    subsets = calibration.subsets.values()
    count = sum(bool(own.mix) for own in subsets)
    mixed = f" and (for {count}) a linear map of what it says" if count else ""
    straight = sum(bool(own.confidence) for own in subsets)
    mixed += f", confidence moved (for {straight}) to how often it is right" if straight else ""
    return (
        f"From the sessions held out, for each of {len(subsets)} sets of streams by itself: temperature (all together "
        f"{calibration.temperature:g}){mixed}, prediction sets that hold the truth in {entry.coverage:.0%} of the "
        f"windows{' (an empty set where nothing is probable enough)' if calibration.set_may_be_empty else ''}, and "
        f"abstention such that there, of no label more than {entry.wrong:.0%} of the windows get a confident wrong "
        f"answer, and no answer is wrong in more than {entry.mistaken:.0%} of the windows in which it counts."
    ) + _lacking(trained, "held out", "For these nothing is fitted: neither confidence nor sets nor abstention.")


def _weighed(trained: Trained) -> bool:
    """Whether what each stream's word counts was fitted."""
    fusion = trained.model.fusion
    return isinstance(fusion, LateFusion) and bool(fusion.own.any() or fusion.beside.any())


def _worth(trained: Trained) -> list[str]:
    """What each stream's word counts, where that was fitted."""
    fusion = trained.model.fusion
    if not _weighed(trained):
        return []
    assert isinstance(fusion, LateFusion)
    names = list(trained.streams)
    rows = ["What each stream's evidence counts was fitted there, too: by itself (1: as it was learnt), and by what "
            "factor more or less where another is there:", "",
            "| stream | by itself | " + " | ".join(f"beside {name}" for name in names) + " |",
            "| --- |" + " ---: |" * (len(names) + 1)]  # fmt: skip
    for i, name in enumerate(names):
        own, beside = float(fusion.own[i].exp()), fusion.beside[i].exp().tolist()
        cells = ["–" if i == j else f"{factor:.2f}" for j, factor in enumerate(beside)]
        rows.append(f"| {name} | {own:.2f} | " + " | ".join(cells) + " |")
    return ["\n".join(rows)]


def _limits(trained: Trained) -> str:
    groups = len({*trained.split.groups.values()})
    return (
        f"It knows {len(trained.split.train)} sessions, of {groups} groups by {trained.config.file.split.by} in all. "
        "Windows of one session resemble each other, so the figures above are as uncertain as the number of sessions "
        "tested on is small. What is none of its labels it will call by one of them. Calibration and coverage hold for "
        "sessions like those held out, and for nothing else."
    )
