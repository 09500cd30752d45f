"""Imports of foreign recordings into sessions: ``import_file``.

A new kind of file is one class with ``accepts`` and ``open`` (see ``base.Importer``) and one entry in ``IMPORTERS``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import ConfigError, RecordingError, absent
from pipeline.importing.av import AudioVideo
from pipeline.importing.bags import Bags
from pipeline.importing.base import Importer, ImportOptions, Session
from pipeline.importing.captures import Captures
from pipeline.importing.choosing import choose
from pipeline.importing.labels import read_labels
from pipeline.importing.pictures import Pictures
from pipeline.recording import Compression, Label, RecordingWriter, SessionInfo
from pipeline.recording.damage import packed
from pipeline.recording.writer import refuse_existing, whole_file

IMPORTERS: tuple[Importer, ...] = (Bags(), Captures(), Pictures(), AudioVideo())
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
    counts: Counter[str] | None = None,
) -> SessionInfo:
    """Imports the file or folder at ``path`` as a recording at ``out``; the same gives the same, byte for byte.

    All streams lie on one session clock whose 0 is the earliest capture. Where a file does not know when its messages
    arrived, the end of a capture stands in for it, which the recording says. What is not taken over stands in the
    recording: as ``extra["left_out"]`` what nobody here can take over, as ``note`` what was lost, and then it is not
    complete. ``labels``: a CSV or JSON file of intervals (see ``labels.read_labels``). ``progress`` is called with the
    session time reached; ``counts`` gets the messages by stream. ``out`` appears only when it is whole. RecordingError
    if the file is damaged or of an unknown kind, ConfigError for a wrong request.
    """
    path, out = Path(path), Path(out)
    options = options or ImportOptions()
    if not path.exists():
        raise absent(path, what="file or folder")
    if not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path} is a pipe or a device, and what is imported is a file; write it to one first.")
    if not overwrite:
        refuse_existing(out)
    _refuse_packed(path)
    intervals = [] if labels is None else read_labels(Path(labels))
    opened = _importer_of(path).open(path, options)
    try:
        if options.streams and opened.mixed is None:
            names = choose({name: name for name in opened.tracks}, options.streams, path)
            opened.tracks = {names[name]: opened.tracks[name] for name in names}
        session = Session.of(opened, path)
        digest = _digest(path)
        said = {"left_out": "; ".join(opened.left_out)} if opened.left_out else {}
        info = SessionInfo(
            session=f"import-{digest[:12]}",
            unix_ns=0 if opened.unix_ns is None else opened.unix_ns + session.origin_ns,
            arrival="received" if opened.arrives else "capture_end",
            extra={"imported_from": path.name, "sha256": digest, **said, **opened.facts},
        )
        with whole_file(out, overwrite) as part, RecordingWriter(part, info, compression, overwrite=True) as writer:
            for interval in intervals:
                label = _on_session(interval, opened.zero_ns - session.origin_ns)
                writer.write_label(label, max(label.start_ns, 0))
            for message in session.messages():
                writer.write(message, message.header.t_receipt_ns)
                if counts is not None:
                    counts[message.header.stream] += 1
                progress(message.header.t_end_ns)
            note = ", ".join(f"dropped: {count} {what}" for what, count in sorted(opened.dropped.items()))
            writer.close(complete=not note, note=note)
    finally:
        opened.close()
    return msgspec.structs.replace(info, complete=not note, note=note)


def _refuse_packed(path: Path) -> None:
    """Raises RecordingError for a file that must be unpacked first."""
    if path.is_file():
        with path.open("rb") as file:
            if how := packed(path, file.read(8)):
                raise RecordingError(f"{path} cannot be read: {how}")


def _importer_of(path: Path) -> Importer:
    for importer in IMPORTERS:
        if importer.accepts(path):
            return importer
    kinds = ", ".join(importer.name for importer in IMPORTERS)
    raise RecordingError(f"{path} is of no kind that can be imported (those are: {kinds}), or too damaged to tell")


def _on_session(label: Label, shift_ns: int) -> Label:
    return Label(label.start_ns + shift_ns, label.end_ns + shift_ns, label.label)


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and sums of a folder's files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{_digest(file)}  {file.relative_to(path).as_posix()}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


__all__ = ["IMPORTERS", "ImportOptions", "Importer", "import_file", "read_labels"]
