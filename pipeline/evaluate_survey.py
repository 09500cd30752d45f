"""The recordings that a bundle is to be evaluated on, checked before the long work begins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.bundle import Bundle
from pipeline.errors import ConfigError, RecordingError
from pipeline.labels import session_attributes, session_labels
from pipeline.mapping import session_mapping
from pipeline.paths import existing
from pipeline.recording import Label, RecordingReader
from pipeline.replay import plan_replay
from pipeline.strict import listed, nearest


class Session(NamedTuple):
    """A recording that has passed every check."""

    path: Path
    session: str
    sha256: str
    labels: list[Label]
    attributes: dict[str, str]
    mapping: dict[str, str | None]
    missing: list[str]
    complete: bool
    unread: str
    """Why the table of attributes beside it cannot be read, where nothing rests on it; "" if it can."""


def found_in(places: Sequence[Path]) -> list[Path]:
    """The recordings that are named, and those in folders that are. Raises ConfigError."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(place.rglob("*.mcap"))
            if not inside:
                raise ConfigError(f"{place}: there is no recording (.mcap) in this folder.")
            found += inside
        else:
            found.append(existing(place))
    return found


def survey(
    bundle: Bundle,
    recordings: Sequence[Path],
    by: str | None = None,
    streams: Mapping[str, str | None] | None = None,
) -> list[Session]:
    """The sessions, each checked against the bundle. ``streams`` maps bundle stream -> stream of the recordings that
    have it. Raises RecordingError, BundleError, ConfigError."""
    sessions: list[Session] = []
    held = _held(recordings) if streams and len(recordings) > 1 else set[str]()
    for path in recordings:
        with RecordingReader(path) as reader:
            mapping = session_mapping(reader, bundle, streams, held)
            plan = plan_replay(reader, bundle, mapping)
            labels = session_labels(reader, bundle.labels)
            rig = {rig: name for name, rig in plan.streams.items()}
            missing = [rig[name] for name in plan.missing] + [n for n in bundle.streams if n not in plan.streams]
            attributes, unread = _attributes(reader, by)
            found = Session(path, reader.info.session, _sha256(path), labels, attributes, mapping, missing,
                            reader.info.complete, unread)  # fmt: skip
        twice = next((one.path for one in sessions if one.sha256 == found.sha256), None)
        if twice is not None:
            raise ConfigError(f"{path} is the same recording as {twice}; counted twice it would seem more certain.")
        if by is not None and by not in found.attributes:
            raise ConfigError(
                f"{path}: nothing says what `{by}` this session is of; known of it are "
                f"{listed(sorted(found.attributes)) or 'no attributes'}.{nearest(by, found.attributes)} Write it "
                "into a sessions.csv beside the recording, with a column `file`."
            )
        sessions.append(found)
    return sessions


def _held(recordings: Sequence[Path]) -> set[str]:
    """The streams of all recordings."""
    held: set[str] = set()
    for path in recordings:
        with RecordingReader(path) as reader:
            held |= reader.streams.keys()
    return held


def _attributes(reader: RecordingReader, by: str | None) -> tuple[dict[str, str], str]:
    """What is known of a session, and why no more of it can be read. Raises ConfigError where ``by`` needs it."""
    try:
        return session_attributes(reader), ""
    except ConfigError as error:
        if by is not None:
            raise
        return dict(reader.info.extra), str(error)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecordingError(f"{path} cannot be read: {error.strerror}") from None
