"""Connections between hosts that came to nothing, in words: whose keys it was, at which address, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.clock import Clock, SystemClock

Why = Literal["key", "keys", "hub_key"]
"""``key``: that of who connects is not on the list; ``keys``: one side has keys and the other has none; ``hub_key``:
who connects takes another key for that of who listens, or so it seems: all that it learns is that nobody answers."""

RECENT_NS = 60_000_000_000
"""How long a refusal counts as one of now: who is refused tries again sooner."""
REPEAT_NS = 600_000_000_000
"""How often what goes on being wrong is said again."""
_KEPT = 8


def seen_by_listener(why: Why, address: str, secret_file: str, key: str = "", peer: str = "") -> str:
    """What to say where the connection was refused; ``secret_file`` is empty where there are no keys."""
    if why == "key":
        return (
            f"{peer or 'somebody'} was refused at {address}: its key {key} is none of those in `curve: allow`. If that "
            "host may connect, name its .key file there, in the rig, and start the session again."
        )
    if why == "hub_key":
        return (
            f"somebody was refused at {address}: the --hub-key of that side is another than the key here. Copy "
            f"{_public(secret_file)} there."
        )
    if secret_file:
        return f"somebody without keys was refused at {address}: start that side with --key and --hub-key."
    return (
        f"somebody with keys was refused at {address}, where there are none: start that side without --key and "
        "--hub-key, or give the rig `curve` here (`sensorium keys` makes keys)."
    )


def seen_by_caller(why: Why, address: str, secret_file: str, hub_key_file: str) -> str:
    """What to say where the connection was asked for; files are empty where there are no keys."""
    if why == "key":
        return (
            f"{address} refuses the key {secret_file}: name {_public(secret_file)} under `curve: allow` in the rig "
            "there, and start the session there again."
        )
    if why == "hub_key":
        return (
            f"what answers at {address} closes every connection: it has another key than {hub_key_file}, or none, or "
            "is no session. If it has one, copy the .key file that it has now to this host, and name it with --hub-key."
        )
    if secret_file:
        return f"{address} has no keys: give the rig there `curve`, or leave --key and --hub-key out."
    return f"{address} asks for keys: start with --key and --hub-key (`sensorium keys` makes keys)."


def _public(secret_file: str) -> str:
    """The file of the public key beside that of the secret one."""
    return str(Path(secret_file).with_suffix(".key"))


class Refusals:
    """What was refused lately, each thing once. Bounded, however many try."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._said: dict[str, int] = {}

    def add(self, text: str) -> None:
        """Something was refused."""
        self._said.pop(text, None)
        self._said[text] = self._clock.now_ns()
        while len(self._said) > _KEPT:
            del self._said[next(iter(self._said))]

    def recent(self) -> list[str]:
        """What was refused within the last minute."""
        now = self._clock.now_ns()
        self._said = {text: at for text, at in self._said.items() if now - at < RECENT_NS}
        return list(self._said)


class Repeated:
    """Tells what is to be said now of what is wrong now: each thing at once, and again when it has lasted long."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._told: dict[str, int] = {}

    @property
    def all(self) -> list[str]:
        """Everything that was said, the oldest first."""
        return list(self._told)

    def new(self, wrong: list[str] | tuple[str, ...]) -> list[str]:
        """Of ``wrong`` what is to be said now. After many different things nothing new is."""
        now, due = self._clock.now_ns(), []
        for text in wrong:
            told = self._told.get(text)
            if (told is None and len(self._told) < 2 * _KEPT) or (told is not None and now - told >= REPEAT_NS):
                self._told[text] = now
                due.append(text)
        return due
