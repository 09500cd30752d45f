"""Golden digests: what every window of the shipped recordings has to be, on every machine.

    python recordings/golden.py            compare; prints the first window that differs; exit status 3 if one does
    python recordings/golden.py --accept   write them anew, after a change that was made on purpose

A window's digest covers which messages it holds, every stream's verdict and all resampled samples, so a change of the
aligner that nobody meant cannot pass unseen.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.bundle import load_bundle
from pipeline.replay import plan_replay, replay_steps

HERE = Path(__file__).resolve().parent
SESSIONS = {"demo.mcap": "demo", "rover.mcap": "rover"}
"""Recording -> the shipped bundle whose windows are made of it."""


def digests(recording: str) -> list[str]:
    """A line a window: its index, its digest, and each stream's verdict, so that a difference can be read."""
    path = HERE / recording
    plan = plan_replay(path, load_bundle(HERE.parent / "models" / SESSIONS[recording]))
    lines = []
    for step in replay_steps(path, plan.spec):
        said = " ".join(f"{name}={stated.verdict}" for name, stated in step.manifest.streams.items())
        lines.append(f"{step.manifest.step} {step.manifest.digest} {said}")
    return lines


def golden(recording: str) -> Path:
    """The file of the digests."""
    return HERE / f"{recording.removesuffix('.mcap')}.digests"


def difference(recording: str) -> str | None:
    """The first line that is not as stored, with both; None if all are."""
    stored, made = golden(recording).read_text().splitlines(), digests(recording)
    for before, now in zip(stored, made, strict=False):
        if before != now:
            return f"{recording}: stored   {before}\n{' ' * len(recording)}  now made {now}"
    return None if len(stored) == len(made) else f"{recording}: {len(stored)} windows are stored, {len(made)} were made"


def main() -> None:
    for recording in SESSIONS:
        if "--accept" in sys.argv[1:]:
            golden(recording).write_text("\n".join(digests(recording)) + "\n")
        elif found := difference(recording):
            print(found)
            sys.exit(3)


if __name__ == "__main__":
    main()
