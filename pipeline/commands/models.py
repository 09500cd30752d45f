"""The commands that make and judge models: ``simulate``, ``train`` and ``evaluate``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pipeline.commands.tools import ended_politely, interrupted, print_json, print_line, say, writable
from pipeline.errors import ConfigError, install, typed
from pipeline.paths import write_whole
from pipeline.strict import listed


def train(
    file: Path,
    out: Path,
    *,
    seed: int | None,
    epochs: int | None,
    device: str,
    resume: bool,
    init_from: Path | None,
    freeze: bool,
    jobs: int | None,
    json: bool,
) -> None:
    """``sensorium train``."""
    from pipeline.curves import Bars, curves, score_table
    from pipeline.terminal import console

    absent = [name for name in ("torch", "onnx", "onnxscript") if find_spec(name) is None]
    if absent:
        raise ConfigError(f"training needs {listed(absent)}, not installed here. {install('learn')}")
    from pipeline import learn
    from pipeline.learn.loop import CHECKPOINT

    again = _train_command(file, out, seed=seed, epochs=epochs, init_from=init_from, freeze=freeze, device=device,
                           jobs=jobs)  # fmt: skip
    out = writable(out, "-o", "folder")
    config = learn.read_config(file)
    if init_from is not None or freeze:
        config = learn.beginning_from(config, init_from, freeze)
    config = learn.with_overrides(config, seed=seed, epochs=epochs)

    def kept() -> bool:
        return any(out.with_name(f"{out.name}.unfinished").rglob(CHECKPOINT))

    if kept() and not resume:
        say(f"a training of {out.name} was interrupted here, and is begun anew; `--resume` would go on with it")
    if resume and not kept():
        say(f"no training of {out.name} was interrupted here: nothing is to be gone on with, and it begins anew")
    tell = print_line if json else None
    try:
        with ended_politely(), Bars(console(sys.stderr), tell) as bars:
            trained, made = learn.train_bundle(config, out, device=device, resume=resume, watch=bars,
                                              jobs=jobs or _cores())  # fmt: skip
    except KeyboardInterrupt as stop:
        if out.exists():
            raise interrupted(f"interrupted; {out} was whole already", stop) from None
        if kept():
            raise interrupted(f"interrupted; go on with:\n{again} --resume", stop) from None
        raise interrupted(f"interrupted before an epoch was over; begin again with:\n{again}", stop) from None
    except OSError as error:
        if kept():
            mended = "" if isinstance(error, BrokenPipeError) else "when what is said below is mended, "
            say(f"the last whole epoch is kept; {mended}go on with:\n{again} --resume")
        raise
    if json:
        print_line({"bundle": str(out), "sha256": made.bundle.sha256, "scores": made.scores})
        return
    screen = console(sys.stdout)
    untested = "no labelled window was kept to test on: nothing is known of how good it is on others"
    screen.print(curves(trained.curves), "")
    screen.print(score_table(made.scores) if made.scores else untested)
    screen.print(f"\n{out}: done; its README.md says of what, and how good it is", soft_wrap=True)


def _train_command(file: Path, out: Path, **options: Any) -> str:
    """What to type for a training with these options, as they were given."""
    words = ["sensorium", "train", str(file), "-o", str(out)]
    for name, value in options.items():
        if value is not None and value is not False and value != "auto":
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def evaluate(
    bundle: Path,
    recordings: list[Path],
    streams: list[str],
    *,
    html: Path | None,
    json: bool,
    robustness: bool,
    by: str | None,
    jobs: int,
    allow_code: bool,
) -> None:
    """``sensorium evaluate``."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    from pipeline import evaluate as evaluating
    from pipeline.bars import Bar
    from pipeline.mapping import asked_streams
    from pipeline.terminal import console

    asked = asked_streams(streams)
    if html is not None:
        writable(html, "--html")
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    try:
        with ended_politely(), Bar(*columns, console=console(sys.stderr), transient=True) as bar:
            task = bar.add_task("checking what was named", total=None)
            found = evaluating.evaluate(
                bundle, recordings, robustness=robustness, by=by, streams=asked, jobs=jobs, allow_code=allow_code,
                progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        left = "" if html is None else f", and {html} is not made"
        raise interrupted(f"interrupted before the evaluation was done; nothing of it is kept{left}", stop) from None
    if json:
        print_json(found)
    else:
        from pipeline.evaluate_text import evaluation_text

        console(sys.stdout).print(evaluation_text(found))
    if html is not None:
        from pipeline.evaluate_html import page

        write_whole(html, page(found))
        print(f"{html}: written", file=sys.stderr)


def simulate(
    world: str,
    out: Path,
    *,
    seed: int,
    duration_s: float,
    ranges: Literal["train", "held-out"],
    count: int | None,
    jobs: int,
    json: bool,
) -> None:
    """``sensorium simulate``."""
    from pipeline.bars import Bar
    from pipeline.sheet import size
    from pipeline.sim import generate
    from pipeline.terminal import console

    if world != "rover":
        raise ConfigError(f"there is no world `{world}` to simulate; there is `rover`.")
    written: list[generate.Written] = []
    there = 0
    hidden = not sys.stderr.isatty()
    try:
        with ended_politely(), Bar(console=console(sys.stderr), transient=True, disable=hidden) as bar:
            if count is None:
                task = bar.add_task(f"simulating {out.name}", total=duration_s)
                file = writable(out, "-o")
                written.append(
                    generate.record_session(
                        file, seed, ranges, duration_s, progress=lambda s: bar.update(task, completed=s)
                    )
                )
            else:
                if out.is_file():
                    raise ConfigError(f"{out} is a file; several sessions go into a folder: -o FOLDER.")
                seeds = range(seed, seed + count)
                there = _sessions_there(out, seeds, ranges)
                task = bar.add_task(f"simulating {count - there} sessions", total=count - there)
                with closing(generate.record_sessions(out, seeds, ranges, duration_s, jobs)) as sessions:
                    for session in sessions:
                        written.append(session)
                        bar.advance(task)
    except KeyboardInterrupt as stop:
        if count is None:
            kept = f"{out} holds what was simulated until then" if out.exists() else "nothing was written"
            raise interrupted(f"interrupted; {kept}", stop) from None
        done = _sessions_there(out, range(seed, seed + count), ranges)
        raise interrupted(f"interrupted after {done} of {count} sessions; the same command goes on", stop) from None
    if json:
        print_json(written[0] if count is None else written)
        return
    room = f", {size(sum(session.bytes for session in written))}" if written else ""
    stays = "was there already and is left as it is" if there == 1 else "were there already and are left as they are"
    left = f"; {there} {stays}" if there else ""
    shown = written[0].file if written else generate.session_file(out, seed, ranges)
    print(f"{out}: {len(written)} session{'s' * (len(written) != 1)} of {duration_s:g} s{room}{left}; "
          f"see {'one' if count is not None else 'it'} with: sensorium info {typed(shown)}",
          file=sys.stderr)  # fmt: skip


def _sessions_there(folder: Path, seeds: Iterable[int], ranges: Literal["train", "held-out"]) -> int:
    from pipeline.sim.generate import session_file

    return sum(session_file(folder, seed, ranges).exists() for seed in seeds)


def _cores() -> int:
    """How many this process may use; at most as many as have enough memory with them, 0.3 GB each."""
    return min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
