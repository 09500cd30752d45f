"""What several commands need: a name to write to, an end in order, lines for programs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import ConfigError, Interrupted
from pipeline.outside import uncreatable
from pipeline.paths import new_file


def writable(out: Path, option: str, what: str = "file") -> Path:
    """``out``, absolute, if it can be written and destroys nothing. ConfigError, before there is anything to lose."""
    whole = new_file(out, what)
    if why := uncreatable(out):
        raise ConfigError(f"{out} cannot be created: {why}; name another {what} with {option}.")
    return whole


def say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


class _Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came, whose number it holds."""


def interrupted(text: str, stop: KeyboardInterrupt) -> Interrupted:
    """With the exit code that a shell says of the signal."""
    error = Interrupted(text)
    if isinstance(stop, _Terminated):
        error.exit_code = 128 + int(stop.args[0])
    return error


@contextmanager
def ended_politely() -> Iterator[None]:
    """Within it SIGTERM and a closed terminal do what Ctrl-C does: nothing half done stays behind, and it can be gone
    on with."""
    from pipeline.calls import ending_signals

    asked = False

    def terminated(number: int, _: object) -> None:
        nonlocal asked
        if not asked:  # a closed terminal sends two, and the second would end what tidies up after the first
            asked = True
            raise _Terminated(number)

    others = [number for number in ending_signals() if number != signal.SIGINT]
    before = {number: signal.signal(number, terminated) for number in others}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def making(out: Path) -> Iterator[None]:
    """Within it ``out`` is written, which appears only when it is whole: what ends it early says whether it is
    made."""
    try:
        with ended_politely():
            yield
    except KeyboardInterrupt as stop:
        made = "was whole already" if os.path.lexists(out) else "is not made"
        raise interrupted(f"interrupted; {out} {made}", stop) from None


def print_line(value: Any) -> None:
    print_bytes(msgspec.json.encode(value))


def print_bytes(data: bytes) -> None:
    """A text for programs, which is UTF-8 whatever people's is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data + b"\n")
    sys.stdout.buffer.flush()


def print_json(value: Any) -> None:
    """What ``--json`` asks for."""
    print_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
