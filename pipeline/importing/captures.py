"""Network captures of LiDARs: what a Velodyne or an Ouster sent, through the parsers that the live node uses.

Which sensor it is follows from what is beside the capture and in it: an Ouster's packets mean nothing without its
metadata (``capture.json`` beside ``capture.pcap``), a Velodyne's say themselves what they are. Each sender of a
Velodyne's packets is a stream of its own. An Ouster's IMU becomes one, too.

The moment at which the capturing machine had a packet is its receipt, as it is live; sweeps arrive with the packet that
completes them. A sweep of which the capture holds only the beginning or the end is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, RecordingError, SensoriumError
from pipeline.importing.base import ImportOptions, Opened, Piece
from pipeline.importing.pcap import datagrams, is_capture
from pipeline.messages import IMU_DTYPE, ImuLayout, SweepLayout
from pipeline.protocols.ouster import Ouster
from pipeline.protocols.velodyne import PACKET_BYTES, Velodyne
from pipeline.timebase import Timebase

G = 9.80665
"""Of an Ouster's accelerometer, which counts in g."""

Kind = tuple[str, int, int]
"""Sender, port and size of a datagram: packets of one kind share them."""


class Captures:
    """Importer of network captures (pcap, pcapng)."""

    name = "network capture of a Velodyne or an Ouster"

    def accepts(self, path: Path) -> bool:
        return path.is_file() and (path.suffix in (".pcap", ".pcapng") or is_capture(path))

    def open(self, path: Path, options: ImportOptions) -> Opened:
        other: Counter[str] = Counter()
        kinds: Counter[Kind] = Counter()
        first_ns, velodynes = None, set()
        for datagram in datagrams(path, other):
            first_ns = datagram.t_ns if first_ns is None else first_ns
            kind = (datagram.source, datagram.port, len(datagram.payload))
            kinds[kind] += 1
            if len(datagram.payload) == PACKET_BYTES and datagram.payload[:2] in (b"\xff\xee", b"\xff\xdd"):
                velodynes.add(kind)
        if first_ns is None:
            raise RecordingError(f"{path} holds no UDP datagram{_said(other)}: no packet of a LiDAR is in it")
        opened = Opened(arrives=True, unix_ns=first_ns)
        metadata = options.metadata or _metadata_of(path)
        if metadata is not None and (options.metadata is not None or not velodynes):
            used = _ouster_tracks(opened, path, first_ns, metadata, kinds)
        elif velodynes:
            used = velodynes
            _velodyne_tracks(opened, path, first_ns, velodynes)
        else:
            raise ConfigError(
                f"{path} holds {_listed(kinds)}: none of a Velodyne's ({PACKET_BYTES} bytes). An Ouster's cannot be "
                f"read without its metadata; put them beside it as {path.with_suffix('.json').name}, or name them with "
                "--metadata. They come from the sensor: curl http://SENSOR/api/v1/sensor/metadata"
            )
        rest = Counter({kind: count for kind, count in kinds.items() if kind not in used})
        opened.left_out += [f"{count} {what}" for what, count in sorted(other.items())]
        opened.left_out += [_listed(rest)] if rest else []
        return opened


def _metadata_of(path: Path) -> Path | None:
    """The JSON file of the same name, or of that name and the number of the sensor, as Ouster's own tools write it."""
    beside = [path.with_suffix(".json"), path.with_name(f"{path.stem}_0.json")]
    return next((file for file in beside if file.is_file()), None)


def _packets(path: Path, first_ns: int, kinds: set[Kind]) -> Iterator[tuple[int, bytes]]:
    """Receipt, counted from the first packet of the capture, and payload of the datagrams of ``kinds``."""
    for d in datagrams(path, Counter()):
        if (d.source, d.port, len(d.payload)) in kinds:
            yield d.t_ns - first_ns, d.payload


def _velodyne_tracks(opened: Opened, path: Path, first_ns: int, kinds: set[Kind]) -> None:
    for kind in sorted(kinds):
        name = "lidar" if len(kinds) == 1 else f"lidar_{kind[0].replace('.', '_').replace(':', '_')}_{kind[1]}"
        opened.left_out.append(f"the sweep of {name} that was under way when the capture began")
        opened.facts[f"sensor.{name}"] = f"Velodyne at {kind[0]}, port {kind[1]}"
        opened.tracks[name] = sweeps(Velodyne(), _packets(path, first_ns, {kind}), name, opened.dropped, path)


def _ouster_tracks(opened: Opened, path: Path, first_ns: int, metadata: Path, kinds: Counter[Kind]) -> set[Kind]:
    """The tracks of one Ouster, and the kinds of packets that they are made of."""
    parser = Ouster(metadata)
    lidar = {kind for kind in kinds if kind[2] == parser.packet_bytes}
    motion = {kind for kind in kinds if kind[2] == parser.imu_bytes and any(kind[0] == other[0] for other in lidar)}
    if not lidar:
        raise ConfigError(
            f"{metadata} is of an Ouster whose packets have {parser.packet_bytes} bytes, but {path.name} holds "
            f"{_listed(kinds)}. Name the metadata of the sensor that was captured with --metadata"
        )
    senders = sorted({kind[0] for kind in lidar})
    if len(senders) > 1 or len(lidar) > 1:
        several = _listed(Counter({kind: kinds[kind] for kind in lidar}))
        raise ConfigError(
            f"{path} holds packets of several Ousters ({several}), and {metadata} is the metadata of one. Split "
            "the capture: tshark -r FILE -Y 'ip.src == ADDRESS' -w ONE.pcap"
        )
    opened.facts["sensor.lidar"] = f"Ouster {parser.product} at {senders[0]}"
    opened.tracks["lidar"] = sweeps(parser, _packets(path, first_ns, lidar), "lidar", opened.dropped, path)
    if motion:
        opened.tracks["imu"] = inertial(parser, _packets(path, first_ns, motion))
    return lidar | motion


def sweeps(parser: Ouster | Velodyne, packets: Iterator[tuple[int, bytes]], stream: str, dropped: Counter[str],
           path: Path) -> Iterator[Piece]:  # fmt: skip
    """The sweeps that the packets make. RecordingError if they cannot be decoded."""
    for receipt_ns, packet in packets:
        try:
            sweep = parser.feed(packet, receipt_ns)
        except SensoriumError as error:
            raise RecordingError(f"{path}: {error}") from None
        if sweep is not None:
            yield Piece(
                layout=SweepLayout(len(sweep.points)),
                data=sweep.points,
                t_ns=sweep.t_capture_ns,
                end_ns=sweep.t_capture_ns,
                t_device_ns=sweep.t_device_ns,
                uncertainty_ns=sweep.uncertainty_ns,
                arrival_ns=receipt_ns,
                new_epoch=sweep.new_epoch,
            )
    if parser.malformed:
        dropped[f"packets of {stream} that are malformed"] += parser.malformed


def inertial(parser: Ouster, packets: Iterator[tuple[int, bytes]]) -> Iterator[Piece]:
    """The IMU of an Ouster, a sample a packet, in m/s^2 and rad/s on the axes of the IMU."""
    times = Timebase()
    for receipt_ns, packet in packets:
        device_ns, accel_g, gyro_deg = parser.imu(packet)
        mapped = times.update(device_ns, receipt_ns)
        sample: np.ndarray[Any, Any] = np.zeros(1, IMU_DTYPE)
        sample["accel"], sample["gyro"] = accel_g * G, np.radians(gyro_deg)
        yield Piece(
            layout=ImuLayout(1),
            data=sample,
            t_ns=mapped.t_capture_ns,
            end_ns=mapped.t_capture_ns,
            t_device_ns=device_ns,
            uncertainty_ns=mapped.uncertainty_ns,
            arrival_ns=receipt_ns,
            new_epoch=mapped.new_epoch,
        )


def _listed(kinds: Counter[Kind]) -> str:
    shown = [f"{count} datagrams of {size} bytes from {source} to port {port}"
             for (source, port, size), count in kinds.most_common(5)]  # fmt: skip
    rest = sum(kinds.values()) - sum(count for _, count in kinds.most_common(5))
    return ", ".join(shown + ([f"{rest} others"] if rest else []))


def _said(other: Counter[str]) -> str:
    return f" ({', '.join(f'{count} {what}' for what, count in sorted(other.items()))})" if other else ""
