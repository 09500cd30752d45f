"""Recordings: one MCAP file a session, written by ``RecordingWriter`` and read by ``RecordingReader``.

``log_time`` is the arrival and ``publish_time`` the capture of a message, both in Unix time; our own times are read
back on the session clock. How a message lies in the file stands in ``recording_schemas``, when bytes reach the disk in
``recording_writer``, and what survives of a file that was cut off in ``recording_reader``.

Topics: a stream's messages under its own name, all beats under ``/beat``, JSON objects under ``/manifest``,
``/prediction``, ``/label``, ``/log``, ``/gap`` and whatever else begins with a slash.
"""

from pipeline.recording_reader import RecordingReader, reading
from pipeline.recording_schemas import BEAT_TOPIC, GAP_TOPIC, LABEL_TOPIC, LOG_TOPIC, MANIFEST_TOPIC, PREDICTION_TOPIC
from pipeline.recording_summary import summarise
from pipeline.recording_writer import Compression, Label, RecordingWriter, SessionInfo

__all__ = [
    "BEAT_TOPIC",
    "GAP_TOPIC",
    "LABEL_TOPIC",
    "LOG_TOPIC",
    "MANIFEST_TOPIC",
    "PREDICTION_TOPIC",
    "Compression",
    "Label",
    "RecordingReader",
    "RecordingWriter",
    "SessionInfo",
    "reading",
    "summarise",
]
