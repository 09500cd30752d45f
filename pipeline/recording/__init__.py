"""Recordings: one MCAP file a session (or a ring of them), written by ``RecordingWriter``, read by ``RecordingReader``.

``log_time`` is the arrival and ``publish_time`` the capture of a message, both in Unix time; our own times are read
back on the session clock. How a message lies in the file stands in ``schemas``, when bytes reach the disk in
``writer``, what survives of a file that was cut off in ``reader``, and of one that is damaged in ``damage`` and
``salvage``; what one holds in ``summary``; how a folder of recordings is kept below a limit in ``ring``.

Topics: a stream's messages under its own name, all beats under ``/beat``, JSON objects under ``/manifest``,
``/prediction``, ``/label``, ``/log``, ``/gap`` and whatever else begins with a slash.
"""

from pipeline.recording.losses import NO_ROOM, Losses
from pipeline.recording.reader import RecordingReader, reading
from pipeline.recording.ring import Ring, RingWriter, deleted_text, message_limit, ring_notes
from pipeline.recording.schemas import BEAT_TOPIC, GAP_TOPIC, LABEL_TOPIC, LOG_TOPIC, MANIFEST_TOPIC, PREDICTION_TOPIC
from pipeline.recording.summary import about, lacks, rate_hz, seconds_of, summarise
from pipeline.recording.writer import (
    Compression,
    Deleted,
    Label,
    LostMessages,
    RecordingWriter,
    RingPart,
    SessionInfo,
    free_path,
)

__all__ = [
    "BEAT_TOPIC",
    "GAP_TOPIC",
    "LABEL_TOPIC",
    "LOG_TOPIC",
    "MANIFEST_TOPIC",
    "NO_ROOM",
    "PREDICTION_TOPIC",
    "Compression",
    "Deleted",
    "Label",
    "Losses",
    "LostMessages",
    "RecordingReader",
    "RecordingWriter",
    "Ring",
    "RingPart",
    "RingWriter",
    "SessionInfo",
    "about",
    "deleted_text",
    "free_path",
    "lacks",
    "message_limit",
    "rate_hz",
    "reading",
    "ring_notes",
    "seconds_of",
    "summarise",
]
