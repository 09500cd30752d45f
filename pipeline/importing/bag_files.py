"""What lies in a bag: topics, and messages in order of their arrival, from the three kinds of files that hold them.

- ROS 1: ``X.bag``;
- ROS 2: the folder of ``ros2 bag record`` with its ``metadata.yaml``, or one ``.db3`` of it;
- MCAP: one ``.mcap``, of ROS 1 or 2, or with Foxglove's schemas in protobuf.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import suppress
from os import SEEK_END
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zstandard
from mcap.exceptions import McapError
from mcap.reader import SeekingReader
from mcap.records import Statistics
from mcap.summary import Summary

from pipeline.errors import ConfigError, RecordingError, typed
from pipeline.importing.broken_bags import broken, mended_database
from pipeline.importing.foxglove_messages import foxglove_decoder
from pipeline.importing.images import Unusable
from pipeline.importing.ros_types import Decode, Definition, decoder, full_name, rosbags
from pipeline.recording.reader import MAGIC, is_recording

_DAMAGE = (OSError, EOFError, struct.error, ValueError, KeyError, IndexError, TypeError, RuntimeError, AssertionError,
           OverflowError, MemoryError)  # fmt: skip

_LEAST = 100
"""Bytes of an MCAP file in which there can be no message yet, with its channel and its schema."""


class Topic(msgspec.Struct):
    """One topic: type by its full name, number of messages; ``why`` it cannot be decoded, or nothing."""

    name: str
    type: str
    count: int
    why: str = ""


class Raw(NamedTuple):
    """One message as it lies in the file; ``arrival_ns`` in Unix time."""

    topic: str
    arrival_ns: int
    data: bytes
    decode: Decode


class Bag(ABC):
    """An open bag."""

    topics: dict[str, Topic]

    @abstractmethod
    def messages(self, topics: Collection[str]) -> Iterator[Raw]:
        """The messages of ``topics`` in order of arrival. RecordingError where the file is damaged."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the file."""

    def _add(self, name: str, type_: str, count: int, why: str) -> None:
        """Notes a topic; several publishers may share one."""
        topic = self.topics.setdefault(name, Topic(name, type_, 0))
        topic.count += count
        if topic.type != type_:
            why = f"messages of two types ({topic.type} and {type_}) lie on it"
        topic.why = topic.why or why


class RosbagsBag(Bag):
    """A bag that rosbags reads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ros1 = path.suffix == ".bag"
        module = rosbags("rosbag1" if self._ros1 else "rosbag2")
        self._damage = (module.ReaderError, *_DAMAGE, *_database_errors())
        _refuse_broken(path, ".db3")  # what such a one lacks may be read as zeros
        _refuse_unfinished(path)
        try:
            self._reader = module.Reader(path)
            self._reader.open()
        except self._damage as error:
            raise _unreadable(path, error) from None
        self.topics = {}
        self._decoders: dict[Any, Decode] = {}
        for connection in self._reader.connections:
            why = ""
            try:
                self._decoders[connection.id] = self._decoder(connection)
            except Unusable as error:
                why = str(error)
            self._add(connection.topic, connection.msgtype, connection.msgcount, why)

    def _decoder(self, connection: Any) -> Decode:
        kind: Definition = {"MSG": "msg", "IDL": "idl"}.get(connection.msgdef.format.name, "none")  # type: ignore[assignment]
        return decoder(connection.msgtype, kind, connection.msgdef.data, self._ros1)

    def messages(self, topics: Collection[str]) -> Iterator[Raw]:
        wanted = [c for c in self._reader.connections if c.topic in topics and c.id in self._decoders]
        if not wanted:
            return
        try:
            for connection, arrival_ns, data in self._reader.messages(connections=wanted):
                yield Raw(connection.topic, arrival_ns, data, self._decoders[connection.id])
        except self._damage as error:
            raise _unreadable(self._path, error) from None

    def close(self) -> None:
        with suppress(Exception):  # a reader that failed has closed itself
            self._reader.close()


def _has_index(summary: Summary, statistics: Statistics) -> bool:
    """Whether the end of an MCAP file says where all of its messages are, and of which channels."""
    if not statistics.message_count:
        return True
    return bool(summary.chunk_indexes) and statistics.channel_message_counts.keys() <= summary.channels.keys()


class McapBag(Bag):
    """An MCAP file that is no recording of ours."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        try:
            # Before the reader, which takes anything for MCAP, and whose words for our own that are cut off mislead.
            start = self._file.read(len(MAGIC))
            if not MAGIC.startswith(start):
                raise RecordingError(f"{path} cannot be read: it is no MCAP file, whatever its name says.")
            if is_recording(path):
                raise _ours(path)
            self._check_end()
            self._file.seek(0)
            self._reader = SeekingReader(self._file, validate_crcs=True)
            summary = self._reader.get_summary()
            statistics = summary and summary.statistics
            if not summary or not statistics or not _has_index(summary, statistics):
                made = f"mcap recover {typed(path.name)} -o whole.mcap"
                raise RecordingError(f"{path} has no index. Make one with: {made}")
            if any(index.name == "sensorium" for index in summary.metadata_indexes):
                raise _ours(path)
        except (McapError, *_DAMAGE) as error:
            self._file.close()
            if isinstance(error, RecordingError | ConfigError):
                raise
            raise _unreadable(path, error) from None
        except BaseException:
            self._file.close()
            raise
        self.topics = {}
        self._decoders: dict[int, Decode] = {}
        for number, channel in sorted(summary.channels.items()):
            schema, why = summary.schemas.get(channel.schema_id), ""
            name = full_name(schema.name) if schema else "no schema"
            try:
                self._decoders[number] = _mcap_decoder(channel.message_encoding, schema)
            except Unusable as error:
                why = str(error)
            self._add(channel.topic, name, statistics.channel_message_counts.get(number, 0), why)

    def _check_end(self) -> None:
        """Raises RecordingError for a file that was cut off, or is empty, which its reader has misleading words for."""
        size = self._file.seek(0, SEEK_END)
        self._file.seek(max(size - len(MAGIC), 0))
        whole = self._file.read() == MAGIC and size > len(MAGIC)
        if whole and size < _LEAST:
            raise RecordingError(f"{self._path} holds nothing that can be imported: no message was recorded")
        if size < _LEAST:
            raise RecordingError(
                f"{self._path} ends after {size} bytes, before any message: its recorder died, or it was not copied "
                "whole. Nothing of it can be had; copy it again"
            )
        if not whole:
            raise _unreadable(self._path, EOFError("its end is missing"))

    def messages(self, topics: Collection[str]) -> Iterator[Raw]:
        if not topics:
            return
        try:
            for _, channel, message in self._reader.iter_messages(topics=list(topics)):
                if channel.id in self._decoders:
                    yield Raw(channel.topic, message.log_time, message.data, self._decoders[channel.id])
        except (McapError, zstandard.ZstdError, *_DAMAGE) as error:
            raise _unreadable(self._path, error) from None

    def close(self) -> None:
        self._file.close()


def _ours(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is a recording of Sensorium already, and need not be imported; see it with: "
        f"sensorium info {typed(path)}"
    )


def _mcap_decoder(encoding: str, schema: Any) -> Decode:
    if schema is None:
        raise Unusable("the file does not say how they are laid out")
    kinds: dict[tuple[str, str], Definition] = {
        ("ros1", "ros1msg"): "msg", ("cdr", "ros2msg"): "msg", ("cdr", "ros2idl"): "idl", ("cdr", ""): "none"
    }  # fmt: skip
    kind = kinds.get((encoding, schema.encoding))
    if kind is not None:
        return decoder(full_name(schema.name), kind, schema.data.decode(errors="replace"), encoding == "ros1")
    if (encoding, schema.encoding) == ("protobuf", "protobuf"):
        return foxglove_decoder(schema.name, schema.data)
    raise Unusable(f"encoded as {encoding or 'nothing'} with a schema in {schema.encoding or 'nothing'}")


def _database_errors() -> tuple[type[BaseException], ...]:
    try:
        import apsw
    except ImportError:
        return ()
    return (apsw.Error,)


def _refuse_broken(path: Path, *suffixes: str) -> None:
    """Raises RecordingError for a bag, or for one of the files of a folder, that ends too early or is none."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.suffix in suffixes and (said := broken(file)):
            raise RecordingError(said)


def _refuse_unfinished(path: Path) -> None:
    """Raises RecordingError for a database beside which lies what was not written into it yet: it is opened as one that
    does not change, and that would be passed over."""
    for file in sorted(path.glob("*.db3")) if path.is_dir() else [path]:
        log = file.with_name(f"{file.name}-wal")
        if file.suffix == ".db3" and log.is_file() and log.stat().st_size:
            raise RecordingError(
                f"{log} holds {log.stat().st_size} bytes that are not in {file.name} yet: its recorder still runs, or "
                f"was killed. End it, or write them in: sqlite3 {typed(file.name)} 'PRAGMA wal_checkpoint(TRUNCATE)'"
            )


def _unreadable(path: Path, error: BaseException) -> RecordingError:
    if isinstance(error, OSError) and error.strerror:
        return RecordingError(f"{path} cannot be read: {error.strerror}")
    try:
        _refuse_broken(path, ".bag", ".db3", ".mcap")
    except RecordingError as cut:
        return cut
    except OSError:
        pass  # then its reader's words are all that there is
    name = typed(path.name)
    cures = {
        ".bag": f"rosbag reindex {name}", ".mcap": f"mcap recover {name} -o whole.mcap", ".db3": mended_database(path)
    }  # fmt: skip
    cure = cures.get(path.suffix, f"ros2 bag reindex {name}")
    said = " ".join(str(part) for part in error.args) or type(error).__name__
    return RecordingError(
        f"{path} cannot be read: {said.rstrip('.')}. A recorder that was killed leaves such a file; what is whole in "
        f"it comes back with: {cure}"
    )
