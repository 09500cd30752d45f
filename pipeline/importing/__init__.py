"""Imports of foreign recordings into sessions: ``import_file``.

A new kind of file is one class with ``accepts`` and ``open`` (see ``base.Importer``) and one entry in ``IMPORTERS``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import ConfigError, RecordingError
from pipeline.importing.av import AudioVideo
from pipeline.importing.base import Importer, ImportOptions, Session
from pipeline.importing.labels import read_labels
from pipeline.recording import Compression, Label, RecordingWriter, SessionInfo

IMPORTERS: tuple[Importer, ...] = (AudioVideo(),)
"""Asked in order; the first that accepts a file imports it."""


def import_file(
    path: str | Path,
    out: str | Path,
    options: ImportOptions | None = None,
    *,
    labels: str | Path | None = None,
    compression: Compression = "zstd",
    overwrite: bool = False,
    progress: Callable[[int], Any] = lambda t_ns: None,
) -> SessionInfo:
    """Imports the file at ``path`` as a recording at ``out``; the same file gives the same recording, byte for byte.

    All streams lie on one session clock whose 0 is the earliest capture. Nothing arrives in an import, so the end of
    a capture stands in for its arrival, which the recording says. ``labels``: a CSV or JSON file of intervals (see
    ``labels.read_labels``). ``progress`` is called with the session time reached. ``out`` appears only when it is
    whole. RecordingError if the file is damaged or of an unknown kind, ConfigError for a wrong request.
    """
    path, out = Path(path), Path(out)
    if not path.is_file():
        raise ConfigError(f"{path} is no file: name an audio-video file to import")
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} exists already: choose another name, or ask for it to be overwritten")
    intervals = [] if labels is None else read_labels(Path(labels))
    opened = _importer_of(path).open(path, options or ImportOptions())
    part = out.with_name(out.name + ".tmp")
    try:
        session = Session.of(opened, path)
        info = SessionInfo(
            session=f"import-{_digest(path)[:12]}",
            unix_ns=opened.unix_ns + session.origin_ns if opened.unix_ns else 0,
            arrival="capture_end",
            extra={"imported_from": path.name, "sha256": _digest(path), **opened.facts},
        )
        with RecordingWriter(part, info, compression, overwrite=True) as writer:
            for interval in intervals:
                label = _on_session(interval, opened.zero_ns - session.origin_ns)
                writer.write_label(label, max(label.start_ns, 0))
            for message in session.messages():
                writer.write(message, message.header.t_end_ns)
                progress(message.header.t_end_ns)
            note = ", ".join(f"dropped: {count} {what}" for what, count in sorted(opened.dropped.items()))
            writer.close(complete=not note, note=note)
        os.replace(part, out)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    finally:
        opened.close()
    return msgspec.structs.replace(info, complete=not note, note=note)


def _importer_of(path: Path) -> Importer:
    for importer in IMPORTERS:
        if importer.accepts(path):
            return importer
    kinds = ", ".join(importer.name for importer in IMPORTERS)
    raise RecordingError(f"{path} is of no kind that can be imported (those are: {kinds}), or too damaged to tell")


def _on_session(label: Label, shift_ns: int) -> Label:
    return Label(label.start_ns + shift_ns, label.end_ns + shift_ns, label.label)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["IMPORTERS", "ImportOptions", "Importer", "import_file", "read_labels"]
