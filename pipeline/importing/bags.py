"""Bags of ROS and MCAP files of other programs: every topic that has a payload here becomes a stream.

One message there is one message here. The stamp in its header is its capture and its time in the bag its arrival, so
that a session knows how late everything came. Where a message has no stamp its arrival is all that is known. How good a
stamp is no bag tells, so the uncertainty of a stamped message is 0 unless it was worked out here.

**Two clocks.** Stamps are believed as they are while they agree with the bag's own clock to ``FAR_NS``. A topic whose
first stamp does not (a sensor that counts from its start, simulated time) is on a clock of its own, which is mapped
with the least delay seen (``pipeline.timebase``), and the recording says so. A single stamp that strays so far later on
is wrong; its message is dropped and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, RecordingError, typed
from pipeline.importing.bag_files import Bag, McapBag, Raw, RosbagsBag, Topic
from pipeline.importing.base import ImportOptions, Opened, Piece
from pipeline.importing.choosing import choose, stream_name
from pipeline.importing.contents import Content, Converter
from pipeline.importing.foxglove_messages import converter as foxglove_converter
from pipeline.importing.images import Unusable
from pipeline.importing.ros_audio import AUDIO_INFO
from pipeline.importing.ros_messages import Position
from pipeline.importing.ros_messages import converter as ros_converter
from pipeline.messages import AudioLayout
from pipeline.recording.reader import is_recording
from pipeline.timebase import Timebase

FAR_NS = 60_000_000_000
_STEADY_NS = 20_000_000


class Bags:
    """Importer of bags: ROS 1, ROS 2 and MCAP."""

    name = "bag of ROS 1 or 2, MCAP file"

    def accepts(self, path: Path) -> bool:
        if path.is_dir():
            return any((path / "metadata.yaml").is_file() or list(path.glob(f"*{kind}")) for kind in (".db3", ".mcap"))
        return path.suffix in (".bag", ".db3", ".mcap")

    def open(self, path: Path, options: ImportOptions) -> Opened:
        _check_there(path)
        bag: Bag = McapBag(path) if path.suffix == ".mcap" and path.is_file() else RosbagsBag(path)
        try:
            return _opened(bag, path, options)
        except BaseException:
            bag.close()
            raise


def _check_there(path: Path) -> None:
    if path.is_dir() and not (path / "metadata.yaml").is_file():
        found = sorted(file for kind in ("*.db3", "*.mcap") for file in path.glob(kind))
        ours = [file for file in found if is_recording(file)]
        files = [file.name for file in found if file not in ours]
        if ours:
            raise ConfigError(
                f"{path} is a folder with {len(ours)} recording{'s' * (len(ours) > 1)} of Sensorium, which need not be "
                f"imported; see one with: sensorium info {typed(ours[-1])}"
                + (f". Of the others ({', '.join(files)}) import one by itself" if files else "")
            )
        raise RecordingError(
            f"{path} lacks its metadata.yaml, which says which of its files hold what ({', '.join(files)}). Import one "
            f"of these files by itself, or make a new one: ros2 bag reindex {typed(path)}"
        )
    if path.is_file() and not path.stat().st_size:
        raise RecordingError(f"{path} is empty: nothing was recorded, or its recorder died before it began")


def _opened(bag: Bag, path: Path, options: ImportOptions) -> Opened:
    opened = Opened(arrives=True, unix_ns=0, close=bag.close)
    converters = {topic.name: _converter(bag, topic, options) for topic in bag.topics.values()}
    usable = {name: stream_name(name) for name, found in converters.items() if not isinstance(found, str)}
    if not options.streams:
        _leave_out(opened, bag, {name: found for name, found in converters.items() if isinstance(found, str)})
    elif any(entry.rpartition("=")[2] in converters.keys() - usable.keys() for entry in options.streams):
        _refuse(bag, converters, options, path)
    chosen = choose(usable, options.streams, path)
    streams: dict[str, _Stream] = {}
    for name, stream in chosen.items():
        # What one converter has learned while looking must not be there when the messages are taken over.
        probe, converter = (_converter(bag, bag.topics[name], options) for _ in range(2))
        assert not isinstance(probe, str)
        assert not isinstance(converter, str)
        first = _first(bag, name, probe)
        if isinstance(first, str):
            opened.left_out.append(_said(bag.topics[name], first))
        else:
            streams[name] = _Stream(stream, converter, *first)
            opened.facts |= streams[name].facts() | _origin(stream, probe)
    if not streams:
        raise RecordingError(f"{path} holds nothing that can be imported{_list(opened.left_out)}")
    opened.origin_ns = min(stream.first_ns for stream in streams.values())
    # What a player shows as 0:00 is the first thing that the bag received.
    opened.zero_ns = min(stream.arrival_ns for stream in streams.values())
    opened.mixed = _pieces(bag, streams, opened.dropped)
    return opened


def _converter(bag: Bag, topic: Topic, options: ImportOptions) -> Converter | str:
    """A new converter for the topic's messages, or why there is none."""
    if topic.why:
        return topic.why
    if topic.type.startswith(("foxglove.", "foxglove_msgs/")):
        found = foxglove_converter(topic.type, options)
    elif topic.type.startswith("audio_common_msgs/msg/AudioData"):
        found = ros_converter(topic.type, options, _audio_info(bag, topic.name))
    else:
        found = ros_converter(topic.type, options)
    return found or "there is no payload for them"


def _audio_info(bag: Bag, topic: str) -> Any:
    """The AudioInfo beside an AudioData: that of the same namespace, else the only one in the bag."""
    infos = [other for other in bag.topics.values() if other.type == AUDIO_INFO and not other.why and other.count]
    beside = [info for info in infos if info.name.rpartition("/")[0] == topic.rpartition("/")[0]]
    for info in beside or infos[: len(infos) == 1]:
        for raw in bag.messages([info.name]):
            try:
                return raw.decode(raw.data)
            except Unusable:
                continue
    return None


def _first(bag: Bag, name: str, converter: Converter) -> tuple[Content, int] | str:
    """The first message of a topic that can be taken over, and its arrival; else why there is none."""
    reasons: Counter[str] = Counter()
    first: tuple[Content, int] | None = None
    for raw in bag.messages([name]):
        try:
            content = _content(converter, raw)
        except Unusable as error:
            reasons[str(error)] += 1
            continue
        first = first or (content, raw.arrival_ns)
        if not isinstance(converter, Position) or converter.origin is not None:
            break
    return first or next((reason for reason, _ in reasons.most_common(1)), "there are none")


def _content(converter: Converter, raw: Raw) -> Content:
    """Raises Unusable, also where a bag defines a type of a known name with other fields than everybody's."""
    message = raw.decode(raw.data)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold is infinite
            return converter(message, raw.arrival_ns)
    except (AttributeError, TypeError, OverflowError, IndexError):
        raise Unusable("its fields are not those of its type") from None


def _origin(stream: str, probe: Converter) -> dict[str, str]:
    """Where the metres of a position are counted from, which its recording must say."""
    if not isinstance(probe, Position) or probe.origin is None:
        return {}
    return {f"origin.{stream}": "{:.9f} deg, {:.9f} deg, {:.3f} m".format(*probe.origin)}


class _Stream:
    """One topic on its way: its converter, and what its stamps' clock is to the bag's."""

    def __init__(self, name: str, converter: Converter, first: Content, arrival_ns: int) -> None:
        self.name, self.converter = name, converter
        self._first, self._unstamped = first, first.stamp_ns is None
        self._own = None if first.stamp_ns is None or abs(first.stamp_ns - arrival_ns) <= FAR_NS else Timebase()
        self._shift_ns = arrival_ns - first.stamp_ns if self._own and first.stamp_ns is not None else 0
        self.first_ns, self.arrival_ns = first.start_ns + self._shift_ns, arrival_ns

    def facts(self) -> dict[str, str]:
        """What the recording says of the stream's times."""
        if self._unstamped:
            return {f"clock.{self.name}": "no stamps: arrival stands in for capture"}
        if self._own:
            start = f"{self._first.stamp_ns} ns at the first message"
            return {f"clock.{self.name}": f"its own ({start}), mapped to the bag's by the least delay"}
        return {}

    def piece(self, content: Content, arrival_ns: int) -> Piece:
        """Raises Unusable for a stamp that cannot be."""
        shift_ns, uncertainty_ns, new_epoch = 0, content.uncertainty_ns, False
        if content.stamp_ns is not None and self._own:
            mapped = self._own.update(content.stamp_ns, arrival_ns)
            shift_ns, new_epoch = mapped.t_capture_ns - content.stamp_ns, mapped.new_epoch
            uncertainty_ns += mapped.uncertainty_ns
            # Blocks of sound lie end to end, and must go on doing so while the map is still settling.
            if isinstance(content.layout, AudioLayout) and abs(shift_ns - self._shift_ns) < _STEADY_NS:
                shift_ns = self._shift_ns
            self._shift_ns = shift_ns
        elif content.stamp_ns is not None and abs(content.stamp_ns - arrival_ns) > FAR_NS:
            raise Unusable("its stamp is more than a minute from its arrival")
        return Piece(
            layout=content.layout,
            data=content.data,
            t_ns=content.start_ns + shift_ns,
            end_ns=content.end_ns + shift_ns,
            t_device_ns=content.stamp_ns,
            uncertainty_ns=uncertainty_ns,
            arrival_ns=arrival_ns,
            new_epoch=new_epoch,
        )


def _pieces(bag: Bag, streams: dict[str, _Stream], dropped: Counter[str]) -> Iterator[tuple[str, Piece]]:
    for raw in bag.messages(streams.keys()):
        stream = streams[raw.topic]
        try:
            yield stream.name, stream.piece(_content(stream.converter, raw), raw.arrival_ns)
        except Unusable as error:
            dropped[f"messages of {stream.name}: {error}"] += 1


def _leave_out(opened: Opened, bag: Bag, why: dict[str, str]) -> None:
    opened.left_out += [_said(bag.topics[name], reason) for name, reason in sorted(why.items())]


def _said(topic: Topic, why: str) -> str:
    return f"{topic.count} messages of {topic.name} ({topic.type}): {why}"


def _list(left_out: list[str]) -> str:
    return f": {'; '.join(left_out)}" if left_out else ""


def _refuse(bag: Bag, converters: dict[str, Converter | str], options: ImportOptions, path: Path) -> None:
    """Raises ConfigError for topics asked for by name that there is no payload for."""
    asked = {entry.rpartition("=")[2] for entry in options.streams}
    refused = {name: found for name, found in converters.items() if isinstance(found, str) and name in asked}
    why = [_said(bag.topics[name], found) for name, found in refused.items()]
    raise ConfigError(f"not everything that is asked for in {path.name} can be imported: {'; '.join(why)}.")
