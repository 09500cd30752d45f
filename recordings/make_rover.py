"""Makes recordings/rover.mcap: python recordings/make_rover.py

32 s of the simulated rover in a world from the held-out ranges: a tilt, an impact, an alarm and somebody who comes
nearer, with decoys between and beside them, and darkness. In the middle of the alarm the microphone is out of order for
two seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.sim.generate import record_session
from pipeline.sim.script import Spell

SEED, SECONDS = 10975, 32.0
OUTAGE = Spell("outage", "microphone", 15.0, 17.0)


def main(path: Path) -> None:
    """Writes the recording to ``path``, in the place of what was there."""
    written = record_session(path, SEED, "held-out", SECONDS, outages=[OUTAGE], overwrite=True)
    print(f"{path}: {written.bytes / 1e6:.1f} MB, {written.label_s}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "rover.mcap")
