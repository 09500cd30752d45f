"""Learned fusion against published numbers: UTD-MHAD through aligner, training and fusion as everything else goes.

    python benchmarks/utd_mhad.py [FOLDER] [--seeds 5] [--strategies late early hybrid] [--quick] [--json] [--loso]
        [--split both] [--depth] [--corrupt] [--apart] [--weigh] [--write rows.json] [--jobs 2]

Subjects 1, 3, 5, 7 are trained on, 2, 4, 6, 8 tested on, as in every published table; ``--split both`` adds the
opposite split as a guard against settings that suit one half. The settings below (``STREAMS`` to ``TEACHERS``) and the
fusion rule were chosen on 1, 3, 5, 7 alone, by leaving out one of them at a time (``--loso`` does just that, and never
looks at 2, 4, 6, 8); how far that went is told in ``benchmarks/README.md``, beside the results.

Every number is that of single models: a mean over seeds, their standard deviation, and an interval of the mean by
bootstrap over the test sequences (``pipeline.scoring``). One trained model answers for all subsets of its streams; a
subset of one stream is that model with the other streams missing. Rows: ``split``, ``strategy``, ``streams`` (trained
on), ``subset`` (used), ``accuracy``, ``sd``, ``low``, ``high`` in %, ``by_subject``; with ``corruption`` where streams
were spoiled without anybody saying so (see ``utd_mhad_data``).

``--depth`` adds a model with the depth camera as a third stream. ``--quick`` trains a few epochs, to see it run. A
model takes ten to twenty minutes on one core; ``--jobs`` are trained at a time (as many as there are cores), with the
same result.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import yaml
from utd_mhad_data import ACTIONS, SPAN_NS, Clip, Corruption, check_files, corrupted, load_clips, session

from pipeline.clock import SystemClock
from pipeline.learn import Config, Made, Trained, check_config, train, with_overrides
from pipeline.learn.dataset import Dataset
from pipeline.learn.model import say, subsets_of
from pipeline.learn.train import prepare_all
from pipeline.learn.weighing import Heard, fit_weights, hear
from pipeline.scoring import bootstrap
from pipeline.strict import Document
from pipeline.workers import workers

Array = np.ndarray[Any, Any]
T = TypeVar("T")
FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "utd_mhad"
ODD, EVEN = (1, 3, 5, 7), (2, 4, 6, 8)
STRATEGIES = ("late", "early", "hybrid")
"""The first is the one to report, chosen before any test; see ``benchmarks/README.md``."""
PAIR = ("skeleton", "inertial")
ALL = (*PAIR, "depth")
_GRID = {"kind": "resample", "max_gap_ms": SPAN_NS / 1e6}
_BODY = {
    "dims": 3, "origin": 3, "unit": [1, 3],
    "parents": [1, 2, 3, -1, 1, 4, 5, 6, 1, 8, 9, 10, 3, 12, 13, 14, 3, 16, 17, 18],
    "pairs": [[7, 11], [7, 0], [11, 0], [7, 3], [11, 3], [6, 10], [7, 15], [11, 19], [15, 19], [13, 17]],
}  # fmt: skip
_NET = {"widths": [64, 96, 128], "kernel": 5, "stride": 2, "dropout": 0.0, "statistics": False}
_TIME = {"warp": 0.15, "bend": 0.6, "thin": 0.9}
STREAMS: dict[str, dict[str, Any]] = {
    "skeleton": {
        "rule": {**_GRID, "rate_hz": 15},
        "token": 96,
        "encoder": {**_NET, **_TIME, **_BODY, "differences": [1, 2, 4], "limbs": 0.05, "scale": 0.15, "turn_deg": 25,
                    "jitter": 0.03, "style": 0.5},
    },
    "inertial": {
        "payload": "imu",
        "rule": {**_GRID, "rate_hz": 40},
        "token": 96,
        "encoder": {**_NET, **_TIME, "differences": [1, 2, 4, 8], "frame": "both", "scale": 0.15, "turn_deg": 20,
                    "jitter": 0.04, "hide": 0.15, "style": 0.5},
    },
    "depth": {
        "rule": {**_GRID, "rate_hz": 15},
        "token": 96,
        "encoder": {**_NET, **_TIME, "stride": 1, "components": 24, "differences": [1, 2], "scale": 0.1, "jitter": 0.03,
                    "style": 0.5},
    },
}  # fmt: skip
FUSION = {"width": 96, "queries": 1, "head": "linear"}
TRAIN = {
    "epochs": 120, "batch_windows": 32, "learning_rate": 0.004, "weight_decay": 0.02, "warm_up": 0.2, "ema": 0.99,
    "label_smoothing": 0.1, "class_weights": "none", "stream_loss": 4.0,
}  # fmt: skip
ROBUST = {
    "noise": 0.04, "noise_strength": 1.0, "shift": 0.04, "shift_steps": 2.5, "freeze": 0.0, "blank": 0.0,
    "drop_steps": 0.0, "outage": 0.0, "agree": 1.0,
}  # fmt: skip
TEACHERS = {"count": 4, "epochs": 60, "blend": 0.7}
FOLDS = {"epochs": 60}
"""Of the models that leave out one of the people each."""
CORRUPTIONS = {"noise": (0.5, 1.0), "shift": (0.2, 0.4), "loss": (0.8, 0.95)}
SPOILED = (("skeleton",), ("inertial",))


class Run(NamedTuple):
    """What to train: on which subjects' clips, with which streams, and on whom to test."""

    strategy: str
    streams: tuple[str, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    apart: bool = False
    weighed: bool = False

    @property
    def split(self) -> str:
        return f"{''.join(map(str, self.train))}>{''.join(map(str, self.test))}"


class Outcome(NamedTuple):
    """One model on the clips of its test subjects: right or wrong, bool [n], by what it was given."""

    subjects: Array
    right: dict[tuple[str, Corruption | None], Array]


def configuration(run: Run, seed: int, epochs: int | None, **changes: Any) -> Config:
    """The training file of a run, with ``changes``."""
    file: dict[str, Any] = {
        "name": "utd-mhad",
        "window": {"hop_ms": SPAN_NS / 1e6, "steps": 1},
        "labels": list(ACTIONS),
        "strategy": run.strategy,
        "fusion": {**FUSION, "apart": run.apart},
        "streams": {name: STREAMS[name] for name in run.streams},
        "split": {"by": "subject", "held_out": 0.0, "test": [str(subject) for subject in run.test]},
        "train": TRAIN,
        "robust": ROBUST,
        "teachers": TEACHERS,
        "windows": "event_time",
        "seed": seed,
    }
    return with_overrides(check_config(Document(yaml.safe_dump(file | changes), "utd_mhad.yaml")), epochs=epochs)


class Clips:
    """The data, as sessions with these streams, clean or spoiled, each made once."""

    def __init__(self, clips: Sequence[Clip], cache: Path) -> None:
        self.clips, self.cache = list(clips), cache
        self._spoiled: dict[tuple[Any, ...], list[Any]] = {}
        self._sessions: dict[tuple[tuple[str, ...], int], list[Made]] = {}

    def sessions(self, streams: tuple[str, ...], subjects: Iterable[int]) -> list[Made]:
        """Clean sessions of the subjects."""
        found: list[Made] = []
        for subject in subjects:
            key = (streams, subject)
            if key not in self._sessions:
                self._sessions[key] = [session(clip, streams) for clip in self._of((subject,))]
            found += self._sessions[key]
        return found

    def spoiled(self, trained: Trained, run: Run, corruption: Corruption) -> Dataset:
        """The test subjects' clips, spoiled. ``scale`` is that of the subjects trained on."""
        key = (run.streams, run.split, corruption)
        if key not in self._spoiled:
            known = self._of(run.train)
            scale = {name: np.concatenate([clip.rows[name] for clip in known]).std(axis=0) for name in run.streams}
            change = corrupted(corruption, scale)
            made = [session(clip, run.streams, change) for clip in self._of(run.test)]
            self._spoiled[key] = prepare_all(trained.config, made, self.cache).sessions
            for one in self._spoiled[key]:
                one.hold()
        return trained.dataset(self._spoiled[key])

    def _of(self, subjects: Iterable[int]) -> list[Clip]:
        wanted = set(subjects)
        return [clip for clip in self.clips if clip.subject in wanted]


def heard_of(clips: Clips, run: Run, epochs: int | None, device: str) -> Heard:
    """What a model trained on ``run.train`` says of ``run.test``, who are to be trained on later."""
    entry = {**TRAIN, **FOLDS}
    config = configuration(run, 0, None if epochs is None else min(epochs, FOLDS["epochs"]), train=entry, teachers=None)
    trained = train(config, clips.sessions(run.streams, (*run.train, *run.test)), cache=clips.cache, device=device)
    heard = hear(trained.model, trained.dataset(trained.split.test), torch.device("cpu"))
    assert heard is not None
    return heard


def folds_of(run: Run) -> list[Run]:
    """The models by which the streams of ``run`` are weighed, if they are."""
    if not run.weighed:
        return []
    return [run._replace(train=tuple(s for s in run.train if s != out), test=(out,)) for out in run.train]


def evaluate(
    clips: Clips,
    run: Run,
    seed: int,
    epochs: int | None,
    corruptions: Sequence[Corruption],
    device: str,
    heard: Sequence[Heard] = (),
) -> Outcome:
    """Trains one model, weighs its streams by what was ``heard``, and tests it once."""
    sessions = clips.sessions(run.streams, (*run.train, *run.test))
    trained = train(configuration(run, seed, epochs), sessions, cache=clips.cache, device=device)
    if heard:
        trained.model.fusion.take_weights(*fit_weights(heard))
    everything = frozenset(run.streams)
    cpu = torch.device("cpu")
    said = say(trained.model, trained.dataset(trained.split.test), subsets_of(run.streams), cpu)
    subjects = np.array([int(s.session.attributes["subject"]) for s in trained.split.test])[said.session]
    right: dict[tuple[str, Corruption | None], Array] = {
        (named(subset, run.streams), None): logits.argmax(1) == said.truth for subset, logits in said.logits.items()
    }
    for corruption in corruptions:
        spoiled = say(trained.model, clips.spoiled(trained, run, corruption), [everything], cpu)
        given = spoiled.logits[everything].argmax(1) == spoiled.truth
        right[named(everything, run.streams), corruption] = given
    return Outcome(subjects, right)


def named(subset: frozenset[str], order: Sequence[str]) -> str:
    return "+".join(name for name in order if name in subset)


def rows_of(run: Run, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each subset and corruption: means over seeds (or folds' clips joined, one outcome a seed)."""
    rows = []
    for (subset, corruption), _ in outcomes[0].right.items():
        right = np.stack([o.right[subset, corruption] for o in outcomes]).astype(np.float64)
        each = 100 * right.mean(axis=1)
        clips = right.shape[1]
        interval = bootstrap(right.mean(axis=0)[:, None], lambda sums, n=clips: 100 * sums[:, 0] / n)
        by = {int(s): _percent(right[:, outcomes[0].subjects == s].mean()) for s in np.unique(outcomes[0].subjects)}
        row = {
            "split": run.split,
            "strategy": run.strategy,
            "streams": "+".join(run.streams),
            "apart": run.apart,
            "weighed": run.weighed,
            "subset": subset,
            "accuracy": round(float(each.mean()), 2),
            "sd": round(float(each.std(ddof=1)), 2) if len(each) > 1 else None,
            "low": None if interval is None else round(interval[0], 2),
            "high": None if interval is None else round(interval[1], 2),
            "seeds": len(each),
            "by_seed": [round(float(value), 2) for value in each],
            "by_subject": by,
        }
        if corruption is not None:
            row["corruption"] = {
                "kind": corruption.kind, "severity": corruption.severity, "streams": "+".join(corruption.streams)
            }  # fmt: skip
        rows.append(row)
    return rows


def _percent(share: Any) -> float:
    return round(100 * float(share), 1)


def joined(folds: Sequence[Outcome]) -> Outcome:
    """Several models, each tested on others, as if they were one."""
    right = {key: np.concatenate([fold.right[key] for fold in folds]) for key in folds[0].right}
    return Outcome(np.concatenate([fold.subjects for fold in folds]), right)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'split':>9} {'strategy':>8} {'trained on':>23} {'given':>23} {'spoiled':>28} {'accuracy':>8} {'sd':>5} "
             f"{'interval':>13}  by subject"]  # fmt: skip
    for row in rows:
        spoiled = row.get("corruption")
        what = f"{spoiled['streams']}: {spoiled['kind']} {spoiled['severity']:g}" if spoiled else "-"
        sd = "-" if row["sd"] is None else f"{row['sd']:.2f}"
        interval = "-" if row["low"] is None else f"{row['low']:.1f} - {row['high']:.1f}"
        by = " ".join(f"{subject}:{value:.1f}" for subject, value in row["by_subject"].items())
        lines.append(
            f"{row['split']:>9} {row['strategy']:>8} {row['streams']:>23} {row['subset']:>23} {what:>28} "
            f"{row['accuracy']:8.2f} {sd:>5} {interval:>13}  {by}"
        )
    return "\n".join(lines)


def plan(options: argparse.Namespace) -> list[tuple[Run, tuple[Corruption, ...]]]:
    """What to train, in order, and how to spoil its test clips."""
    if options.loso:
        return [
            (
                Run(strategy, streams, tuple(s for s in ODD if s != out), (out,), options.apart and strategy == "late"),
                _corruptions(options, strategy, streams),
            )
            for strategy in options.strategies
            for streams in ((PAIR, ALL) if options.depth else (PAIR,))
            for out in ODD
        ]
    first = options.strategies[0]
    runs = [Run(strategy, PAIR, ODD, EVEN) for strategy in options.strategies if options.split != "swapped"]
    runs += [Run(first, ALL, ODD, EVEN)] if options.depth and options.split != "swapped" else []
    runs += [Run(first, PAIR, EVEN, ODD)] if options.split != "published" else []
    return [
        (
            run._replace(apart=options.apart and run.strategy == "late",
                         weighed=options.weigh and run.strategy != "early"),
            _corruptions(options, run.strategy, run.streams) if run.test == EVEN else (),
        )
        for run in runs
    ]  # fmt: skip


def _corruptions(options: argparse.Namespace, strategy: str, streams: tuple[str, ...]) -> tuple[Corruption, ...]:
    if not options.corrupt or strategy != options.strategies[0] or streams != PAIR:
        return ()
    return tuple(
        Corruption(kind, severity, spoiled)
        for kind, severities in CORRUPTIONS.items()
        for spoiled in SPOILED
        for severity in severities
    )


class Source(NamedTuple):
    """Where clips come from, whose they are, and where they are kept once prepared."""

    folder: Path
    depth: bool
    subjects: tuple[int, ...]
    cache: Path


class Task(NamedTuple):
    """One model to train and test."""

    run: Run
    corruptions: tuple[Corruption, ...]
    seed: int
    epochs: int | None
    device: str
    heard: tuple[Heard, ...] = ()


@functools.cache
def _clips(source: Source) -> Clips:
    """Of this process."""
    torch.set_num_threads(1)
    known = load_clips(source.folder, source.depth)
    return Clips([clip for clip in known if clip.subject in source.subjects], source.cache)


def _hear(source: Source, task: Task) -> Heard:
    return heard_of(_clips(source), task.run, task.epochs, task.device)


def _test(source: Source, task: Task) -> Outcome:
    return evaluate(_clips(source), task.run, task.seed, task.epochs, task.corruptions, task.device, task.heard)


def done(
    work: Callable[[Source, Task], T], source: Source, tasks: Sequence[Task], jobs: int
) -> Iterator[tuple[int, T]]:
    """What ``work`` makes of the tasks, each by its place, as they are done."""
    if jobs == 1 or len(tasks) == 1:
        yield from ((i, work(source, task)) for i, task in enumerate(tasks))
        return
    with workers(min(jobs, len(tasks))) as pool:
        found = {pool.submit(work, source, task): i for i, task in enumerate(tasks)}
        yield from ((found[one], one.result()) for one in as_completed(found))


def measure(options: argparse.Namespace, cache: Path) -> list[dict[str, Any]]:
    """All rows. What is done so far is told on stderr."""
    clock, epochs = SystemClock(), 3 if options.quick else options.epochs
    begun_ns = clock.now_ns()
    source = Source(options.folder, options.depth, ODD if options.loso else (*ODD, *EVEN), cache)
    check_files(source.folder, source.depth)

    def tell(what: str) -> None:
        print(f"{(clock.now_ns() - begun_ns) / 1e9:6.0f} s  {what}", file=sys.stderr, flush=True)

    planned = plan(options)
    folds = [(run, Task(fold, (), 0, epochs, options.device))
             for run, _ in planned for fold in folds_of(run)]  # fmt: skip
    heard: dict[Run, dict[int, Heard]] = {}
    for i, one in done(_hear, source, [task for _, task in folds], options.jobs):
        run, task = folds[i]
        heard.setdefault(run, {})[i] = one
        tell(f"{run.split} {run.strategy} {'+'.join(run.streams)}, without {task.run.test[0]}")
    in_order = {run: tuple(some[i] for i in sorted(some)) for run, some in heard.items()}
    for run, some in in_order.items():
        own, beside = fit_weights(some)
        worth = dict(zip(sorted(run.streams), zip(own.exp().tolist(), beside.exp().tolist(), strict=True), strict=True))
        said = ", ".join(f"{name} {by_itself:.2f} x {[round(factor, 2) for factor in others]}"
                         for name, (by_itself, others) in worth.items())  # fmt: skip
        tell(f"{run.split} {run.strategy}: by itself, and beside each of these, counts {said}")
    tasks = [
        Task(run, corruptions, seed, epochs, options.device, in_order.get(run, ()))
        for seed in range(options.seeds)
        for run, corruptions in planned
    ]
    found: dict[int, Outcome] = {}
    for i, outcome in done(_test, source, tasks, options.jobs):
        found[i], task = outcome, tasks[i]
        said = ", ".join(f"{k[0]} {100 * v.mean():.2f}" for k, v in outcome.right.items() if k[1] is None)
        tell(f"{task.run.split} {task.run.strategy} seed {task.seed}: {said}")
        if options.write:
            options.write.write_text(json.dumps(_rows(tasks, found, options.loso), indent=1))
    return _rows(tasks, found, options.loso)


def _rows(tasks: Sequence[Task], found: Mapping[int, Outcome], loso: bool) -> list[dict[str, Any]]:
    """Rows of what is there, in the order of the plan. Folds of one seed are joined, and count once all are there."""
    parts: dict[Run, dict[int, list[Outcome | None]]] = {}
    for i, task in enumerate(tasks):
        run = task.run._replace(train=ODD, test=ODD) if loso else task.run
        parts.setdefault(run, {}).setdefault(task.seed, []).append(found.get(i))
    whole = {
        run: [joined([fold for fold in folds if fold is not None]) for folds in seeds.values() if None not in folds]
        for run, seeds in parts.items()
    }
    return [row for run, each in whole.items() if each for row in rows_of(run, each)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="where the two archives are")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES),
                        help="the first is the one for depth, swapped split and corruption")  # fmt: skip
    parser.add_argument("--depth", action="store_true", help="also with the depth camera as a third stream")
    parser.add_argument("--split", choices=("published", "swapped", "both"), default="published",
                        help="swapped: trained on 2, 4, 6, 8 and tested on 1, 3, 5, 7")  # fmt: skip
    parser.add_argument("--corrupt", action="store_true", help="also with streams spoiled, rising")
    parser.add_argument("--loso", action="store_true",
                        help="leave out one of 1, 3, 5, 7 at a time; no test subject is seen")  # fmt: skip
    parser.add_argument("--apart", action="store_true", help="streams of `late` learn apart")
    parser.add_argument("--weigh", action="store_true", help="streams are weighed by people left out; not with --loso")
    parser.add_argument("--quick", action="store_true", help="three epochs")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="models trained at a time; as many as there are cores if left out",
    )
    parser.add_argument("--cache", type=Path, help="keeps prepared clips between runs")
    parser.add_argument("--write", type=Path, help="a file for the rows so far, after every model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.jobs < 1 or options.seeds < 1:
        parser.error("--jobs and --seeds are 1 or more")
    if options.weigh and options.loso:
        parser.error("--weigh is not for --loso: two of four people would be left to learn from")
    with tempfile.TemporaryDirectory(prefix="utd-mhad-") as scratch:
        rows = measure(options, options.cache or Path(scratch))
    print(json.dumps(rows, indent=1) if options.json else table(rows))


if __name__ == "__main__":
    main()
