"""Which of a file's streams are taken over, and what they are called here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.strict import listed, nearest


def stream_name(topic: str) -> str:
    """What a topic is called here: without its leading slash, other slashes as underscores."""
    return topic.strip("/").replace("/", "_")


def choose(found: Mapping[str, str], wanted: Collection[str], path: Path) -> dict[str, str]:
    """The streams to take: name in the file -> name here.

    ``found`` gives all of them with the names they get by themselves. Each of ``wanted`` is a name of either kind, or
    ``NEW=`` and such a name; nothing wanted means everything. ConfigError if something wanted is not there, or if two
    streams would have one name.
    """
    chosen = dict(found) if not wanted else {}
    for entry in wanted:
        new, separator, old = entry.rpartition("=")
        old = old.strip()
        for topic in _meant(old, found, path):
            if topic in chosen:
                raise ConfigError(f"`{topic}` of {path.name} is asked for twice; name each stream once.")
            chosen[topic] = new.strip() if separator else found[topic]
    _check_names(chosen, path)
    return chosen


def _meant(old: str, found: Mapping[str, str], path: Path) -> list[str]:
    topics = [old] if old in found else [topic for topic, name in found.items() if name == old]
    if not topics:
        raise ConfigError(
            f"{path.name} has no stream `{old}`.{nearest(old, [*found, *found.values()])} It has "
            f"{listed(found) if found else 'none that can be imported'}."
        )
    return topics


def _check_names(chosen: Mapping[str, str], path: Path) -> None:
    topics: dict[str, str] = {}
    for topic, name in chosen.items():
        if not name or name.startswith("/") or not name.isprintable():
            raise ConfigError(f"no stream can be called `{name}`; write NAME={topic} with a name without a slash.")
        if name in topics:
            raise ConfigError(
                f"`{topics[name]}` and `{topic}` of {path.name} would both be called `{name}`; name them apart: "
                f"--streams {name}={topics[name]},OTHER={topic}"
            )
        topics[name] = topic
