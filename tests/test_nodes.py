"""The align, fusion, record and replay nodes one by one, on a bus within this process and a clock moved by hand."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from nodes.align import Align
from nodes.fusion import Fusion, PayloadCache
from nodes.record import ITEM_BYTES, Record
from nodes.replay import Replay, _in_order, moved_header
from pipeline.align import AlignSpec, Latest, Manifest, Resample, Step, StreamManifest, StreamSpec
from pipeline.clock import ManualClock, Origin
from pipeline.errors import RecordingError
from pipeline.life import FROM_ELSEWHERE, Life, Mark, NodeSpec, Order, Report, last_sent
from pipeline.messages import IMU_DTYPE, FrameLayout, Header, ImuLayout, Message, SweepLayout, TextLayout
from pipeline.prediction import Prediction
from pipeline.receiving import drain
from pipeline.recording import (
    GAP_TOPIC,
    MANIFEST_TOPIC,
    Label,
    RecordingReader,
    RecordingWriter,
    SessionInfo,
    free_path,
    summarise,
)
from pipeline.steps import GAP, STEP, Gap, decode_step, encode_step
from pipeline.summary import lacking, not_whole
from pipeline.transport import Lossless, MemoryBus, Publisher, RingSpec
from tests.full_disk import Disk
from tests.rigs import short_folder
from tests.tiny_bundle import GRID, SWEEP, grid, sweep, write_bundle

pytestmark = pytest.mark.usefixtures("conserved")
MS = 1_000_000
HOP = 100 * MS


def life(folder: Path, node: str, settings: dict[str, Any], now_ns: int = 0, **more: Any) -> Life:
    spec = NodeSpec(session="s", origin=Origin(0, 0), session_dir=str(folder), node=node, kind=node, settings=settings,
                    supervised=False, **more)  # fmt: skip
    return Life(spec, ManualClock(now_ns))


def header(stream: str, seq: int, t_ns: int, layout: Any, epoch: int = 0) -> Header:
    return Header(stream=stream, seq=seq, epoch=epoch, t_capture_ns=t_ns, t_end_ns=t_ns, bound_ns=t_ns + 1,
                  t_receipt_ns=t_ns, layout=layout)  # fmt: skip


def text(seq: int, t_ns: int, data: bytes = b"line") -> Message:
    return Message(header("text", seq, t_ns, TextLayout(len(data))), data)


def imu(seq: int, t_ns: int, epoch: int = 0) -> Message:
    batch = np.zeros(10, IMU_DTYPE)
    batch["offset_ns"] = np.arange(10) * 10 * MS
    first = header("imu", seq, t_ns, ImuLayout(10), epoch)
    return Message(msgspec.structs.replace(first, t_end_ns=t_ns + 90 * MS, bound_ns=t_ns + 90 * MS + 1), batch)


# -- align -------------------------------------------------------------------------------------------------------------


class Aligning:
    """An align node for an IMU and a LiDAR, with somebody who listens to it."""

    def __init__(self, folder: Path, now_ns: int = 0, restarts: int = 0) -> None:
        streams = (
            StreamSpec(name="imu", payload="imu", rule=Resample(100, 50 * MS), channels=6),
            StreamSpec(name="lidar", payload="sweep", rule=Latest(250 * MS)),
        )
        spec = AlignSpec(hop_ns=HOP, streams=streams, max_delay_ns=250 * MS)
        settings = {"spec": msgspec.to_builtins(spec), "wiring": {"imu": ["imu"], "lidar": ["lidar"]}}
        self.life = life(folder, "align", settings, now_ns, life=restarts)
        self.bus = MemoryBus()
        self.sources = {name: self.bus.publisher(name, [name]) for name in ("imu", "lidar")}
        self.node = Align(self.life)
        self.node.join(self.bus, self.bus.publisher("align"))
        topics = {"align": {STEP: Lossless(), GAP: Lossless()}}
        self.listener = self.bus.subscriber("test", {}, topics=topics)
        self.node.begin()
        self.heard: list[Any] = []

    def turn(self, now_ms: int) -> list[Any]:
        """One turn at this time; the manifests and gaps that came of it."""
        clock = self.life.clock
        assert isinstance(clock, ManualClock)
        clock.advance(max(0, now_ms * MS - clock.now_ns()))
        self.node.turn()
        self.listener.receive(0)
        for parts in self.listener.parts():
            if parts.topic == STEP:
                self.heard.append(decode_step([STEP, *parts.parts]).manifest)
            else:
                self.heard.append(msgspec.json.decode(parts.parts[0], type=Gap))
        return self.heard

    def cloud(self, seq: int, t_ms: int) -> Message:
        return Message(header("lidar", seq, t_ms * MS, SweepLayout(4)), sweep(1.0)[0].data)


def test_steps_come_when_they_are_proven_and_at_their_deadline(tmp_path: Path) -> None:
    aligning = Aligning(tmp_path)
    aligning.sources["imu"].publish(imu(0, 0))
    aligning.sources["imu"].publish(imu(1, 100 * MS))
    aligning.sources["lidar"].publish(aligning.cloud(0, 95))
    aligning.sources["lidar"].publish(aligning.cloud(1, 105))
    heard = aligning.turn(110)
    assert [m.step for m in heard] == [1]
    assert {s.verdict for s in heard[0].streams.values()} == {"ok"}
    heard = aligning.turn(460)
    assert [(m.step, m.cause) for m in heard] == [(1, "proven"), (2, "deadline")]
    assert heard[1].streams["lidar"].verdict == "partial"  # a sweep is there, but a later one might still have come


def test_the_last_word_of_a_node_that_stops_counts_what_came_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligning, said = Aligning(tmp_path), []
    report = aligning.life.report
    monkeypatch.setattr(aligning.life, "report", lambda one: (report(one), said.append(one)))
    aligning.sources["imu"].publish(imu(0, 0))
    aligning.turn(100)
    aligning.sources["imu"].publish(imu(1, 100 * MS))
    aligning.life.stop.set()
    aligning.node.finish()
    assert [one.aligned["imu"].received for one in said] == [1, 2]


def test_a_stream_of_which_nothing_can_be_taken_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aligning, said = Aligning(tmp_path), []
    monkeypatch.setattr(aligning.life, "report", said.append)
    aligning.life.stop.set()  # a node that stops reports at each turn
    aligning.turn(10)
    other = msgspec.structs.replace(aligning.cloud(0, 95).header, layout=TextLayout(2))
    aligning.sources["lidar"].publish(Message(other, b"ab"))
    aligning.turn(100)
    expected = "lidar carries text, where sweep is taken: these messages are in no window; what the model takes says "
    assert [one.warnings for one in said] == [[], [f"{expected}its model.yaml"]]


def test_a_dead_stream_is_closed_again_when_its_last_words_come(tmp_path: Path) -> None:
    aligning = Aligning(tmp_path)
    aligning.sources["imu"].publish(imu(0, 0))
    aligning.sources["lidar"].publish(aligning.cloud(0, 95))
    aligning.turn(100)
    aligning.life.orders.put(Order(do="close", stream="lidar", reason="dead"))
    aligning.sources["imu"].publish(imu(1, 100 * MS))
    aligning.turn(110)
    aligning.sources["imu"].publish(imu(2, 200 * MS))
    aligning.sources["lidar"].publish(aligning.cloud(1, 150))  # it was on its way when its node died
    heard = aligning.turn(210)
    assert [(m.step, m.cause) for m in heard] == [(1, "proven"), (2, "proven"), (3, "proven")]
    assert heard[1].streams["lidar"].closed == "dead"
    back = msgspec.structs.replace(aligning.cloud(0, 400).header, epoch=250 * MS)
    aligning.sources["lidar"].publish(Message(back, sweep(1.0)[0].data))
    aligning.sources["imu"].publish(imu(3, 300 * MS))
    heard = aligning.turn(410)
    assert [m.step for m in heard] == [1, 2, 3, 4]
    assert heard[3].streams["lidar"].closed is None


def test_the_news_of_a_death_that_comes_late_is_of_the_life_that_died(tmp_path: Path) -> None:
    aligning = Aligning(tmp_path)
    for epoch in (0, 150 * MS):  # the second life has spoken before the order comes
        spoken = msgspec.structs.replace(aligning.cloud(0, 50 + epoch // MS).header, epoch=epoch)
        aligning.sources["lidar"].publish(Message(spoken, sweep(1.0)[0].data))
    aligning.sources["imu"].publish(imu(0, 0))
    aligning.turn(200)
    aligning.life.orders.put(Order(do="close", stream="lidar", reason="dead", epoch=0))
    for seq in (1, 2):
        aligning.sources["imu"].publish(imu(seq, seq * 100 * MS))
    heard = aligning.turn(210)
    assert heard[-1].streams["lidar"].closed is None
    heard = aligning.turn(310)
    assert "lidar" not in aligning.node.dead


def test_the_last_words_of_a_stream_that_died_unheard_do_not_bring_it_back(tmp_path: Path) -> None:
    aligning = Aligning(tmp_path)
    aligning.life.orders.put(Order(do="close", stream="lidar", reason="dead", epoch=20 * MS))
    aligning.turn(100)
    late = msgspec.structs.replace(aligning.cloud(0, 95).header, epoch=20 * MS)
    aligning.sources["lidar"].publish(Message(late, sweep(1.0)[0].data))
    for seq in (0, 1, 2):
        aligning.sources["imu"].publish(imu(seq, seq * 100 * MS))
    heard = aligning.turn(210)
    assert [(m.step, m.cause) for m in heard] == [(1, "proven"), (2, "proven"), (3, "proven")]
    assert heard[2].streams["lidar"].closed == "dead"


def test_what_the_bus_dropped_is_in_the_report(tmp_path: Path) -> None:
    aligning = Aligning(tmp_path)
    aligning.sources["lidar"].publish(aligning.cloud(2, 95))
    aligning.turn(100)
    counters = aligning.node._report().counters
    assert {name: n for name, n in counters.items() if "." in name} == {"lidar.before_join": 2.0}


def test_streams_that_ended_are_closed_when_all_they_sent_is_here(tmp_path: Path) -> None:
    aligning = Aligning(tmp_path)
    for stream, seq in (("imu", 2), ("lidar", 1)):
        aligning.life.orders.put(Order(do="close", stream=stream, reason="ended", epoch=0, seq=seq))
    aligning.sources["imu"].publish(imu(0, 0))
    aligning.sources["lidar"].publish(aligning.cloud(0, 95))
    assert aligning.turn(100) == []
    aligning.sources["imu"].publish(imu(1, 100 * MS))
    for stream, seq, t_ms in (("imu", 2, 190), ("lidar", 1, 95)):
        beat = msgspec.structs.replace(header(stream, seq, t_ms * MS, None), bound_ns=t_ms * MS + 1)
        aligning.sources[stream].beat(beat)
    heard = aligning.turn(210)
    assert [m.step for m in heard] == [1]  # the end lies within hop 2
    assert aligning.node.finished
    assert [m.step for m in aligning.turn(5000)] == [1]  # no deadline says anything after the end


def test_an_aligner_that_was_restarted_begins_at_the_next_hop_and_names_the_gap(tmp_path: Path) -> None:
    first = Aligning(tmp_path)
    first.turn(400)
    last = first.heard[-1].step
    assert [m.step for m in first.heard] == [1]
    again = Aligning(tmp_path, now_ns=730 * MS, restarts=1)
    heard = again.turn(730)
    assert heard == [Gap(last + 1, 8, "the align node was restarted")]
    heard = again.turn(1200)
    assert heard[1].step == 9
    assert heard[1].start_ns == 800 * MS


def test_of_a_session_that_ends_before_it_began_no_windows_are_made(tmp_path: Path) -> None:
    with short_folder() as folder:
        waiting = life(folder, "align", Aligning(tmp_path).life.spec.settings, 2000 * MS, begun=False)
        waiting.stop.set()
        node = Align(waiting)
        node.run()
        assert node.mark.value == last_sent(str(folder), "align") == -1


# -- fusion ------------------------------------------------------------------------------------------------------------


class Fusing:
    """A fusion node for an IMU (in the steps) and a LiDAR (payloads of its own), with somebody who listens to it."""

    def __init__(self, folder: Path, restarts: int = 0, **more: Any) -> None:
        bundle = write_bundle(folder / "model", {"imu": GRID, "lidar": SWEEP}, steps=2)
        settings = {"bundle": str(bundle), "streams": {"imu": "imu", "lidar": "lidar"},
                    "wiring": {"lidar": ["lidar"]}, "labels": ["session"], **more}  # fmt: skip
        self.life = life(folder, "fusion", settings, 10 * HOP, life=restarts)
        self.bus = MemoryBus()
        self.align = self.bus.publisher("align")
        self.labels = self.bus.publisher("session")
        self.lidar = self.bus.publisher("lidar", ["lidar"])
        self.node = Fusion(self.life)
        self.node.join(self.bus, self.bus.publisher("fusion"))
        topics = {"fusion": {"prediction": Lossless(), GAP: Lossless()}}
        self.listener = self.bus.subscriber("test", {}, topics=topics)
        self.predictions: list[Prediction] = []
        self.gaps: list[Gap] = []

    def turn(self) -> list[Prediction]:
        """One turn; all predictions so far."""
        self.node.turn()
        self.listener.receive(0)
        for parts in self.listener.parts():
            if parts.topic == GAP:
                self.gaps.append(msgspec.json.decode(parts.parts[0], type=Gap))
            else:
                self.predictions.append(msgspec.json.decode(parts.parts[0], type=Prediction))
        return self.predictions

    def step(self, k: int, seq: int) -> None:
        """Publishes a step that uses sweep ``seq``."""
        imu_says = StreamManifest(verdict="ok", proven=True, used=((0, k, k),), epoch=0)
        lidar_says = StreamManifest(verdict="ok", proven=True, used=((0, seq, seq),), epoch=0)
        manifest = Manifest(step=k, start_ns=(k - 1) * HOP, end_ns=k * HOP, cause="proven", emitted_ns=k * HOP + MS,
                            digest="", streams={"imu": imu_says, "lidar": lidar_says})  # fmt: skip
        _, *parts = encode_step(Step(manifest, {}, {"imu": grid(0.5)}), k * HOP + 2 * MS)
        self.align.publish_parts(STEP, parts)

    def sweep(self, seq: int) -> None:
        message = sweep(1.0, seq)[0]
        t = seq * HOP
        self.lidar.publish(
            Message(msgspec.structs.replace(message.header, t_capture_ns=t, t_end_ns=t, bound_ns=t + 1), message.data)
        )


def test_a_payload_that_comes_after_its_step_is_waited_for(tmp_path: Path) -> None:
    fusing = Fusing(tmp_path)
    fusing.sweep(0)
    fusing.step(1, seq=0)
    assert [p.window.index for p in fusing.turn()] == [1]
    fusing.step(2, seq=1)
    assert len(fusing.turn()) == 1
    fusing.sweep(1)
    second = fusing.turn()[1]
    assert second.streams["lidar"].masked is None
    assert set(second.timing.latency_ms) == {"wait", "align", "transport", "encode", "fuse", "total"}
    assert second.timing.latency_ms["total"] == pytest.approx(10 * 100 - 200)


def test_a_payload_that_is_lost_is_masked_at_once_and_said_to_be(tmp_path: Path) -> None:
    fusing = Fusing(tmp_path)
    fusing.sweep(1)  # number 0 is lost: a later one has come
    fusing.step(1, seq=0)
    assert fusing.turn()[0].streams["lidar"].masked == "overrun"
    assert fusing.predictions[0].streams["lidar"].contribution == 0.0
    fusing.step(2, seq=1)
    assert fusing.turn()[1].streams["lidar"].masked is None


def test_a_payload_that_does_not_come_is_masked_when_its_time_is_over(tmp_path: Path) -> None:
    fusing = Fusing(tmp_path, payload_wait_ms=50)
    fusing.step(1, seq=0)
    assert fusing.turn() == []
    assert isinstance(fusing.life.clock, ManualClock)
    fusing.life.clock.advance(50 * MS)
    assert fusing.turn()[0].streams["lidar"].masked == "overrun"
    assert fusing.node.counters["masked.overrun"] == 1


def test_a_fusion_node_that_cannot_keep_up_sheds_and_leaves_no_window_out(tmp_path: Path) -> None:
    fusing = Fusing(tmp_path)
    for k in range(1, 21):
        fusing.step(k, seq=k)
        fusing.sweep(k)
    predictions = fusing.turn()
    assert [p.window.index for p in predictions] == list(range(1, 21))
    shed = [p.window.index for p in predictions if p.streams["lidar"].masked == "shed"]
    assert shed == list(range(1, 13))
    assert {p.streams["lidar"].masked for p in predictions[12:]} == {None}


def test_the_label_that_covers_a_windows_end_is_its_truth(tmp_path: Path) -> None:
    fusing = Fusing(tmp_path)
    for label in (Label(0, HOP, "yes"), Label(HOP, 3 * HOP, "no"), Label(2 * HOP, 3 * HOP, "later")):
        fusing.labels.publish_json("label", msgspec.json.encode(label))
    fusing.turn()
    for k in range(1, 5):
        fusing.sweep(k)
        fusing.step(k, seq=k)
    assert [p.truth for p in fusing.turn()] == ["yes", "no", "later", None]


def test_a_fusion_node_that_is_to_stop_finishes_what_waits_and_what_is_on_its_way(tmp_path: Path) -> None:
    fusing = Fusing(tmp_path)
    fusing.step(1, seq=0)
    assert fusing.turn() == []
    fusing.step(2, seq=1)
    source = threading.Thread(target=lambda: [fusing.sweep(seq) for seq in (0, 1)])
    source.start()
    drain(fusing.node.turn)
    source.join()
    assert [p.window.index for p in fusing.turn()] == [1, 2]
    assert {p.streams["lidar"].masked for p in fusing.predictions} == {None}


def test_what_never_came_is_named_as_a_gap(tmp_path: Path) -> None:
    fusing = Fusing(tmp_path)
    fusing.sweep(0)
    fusing.step(3, seq=0)
    fusing.step(3, seq=0)  # twice: not used again
    fusing.align.publish_json(GAP, msgspec.json.encode(Gap(2, 7, "the align node was restarted")))
    fusing.step(8, seq=0)
    fusing.align.publish_parts(STEP, [b"nonsense"])
    assert [p.window.index for p in fusing.turn()] == [3, 8]
    assert [(gap.first, gap.last) for gap in fusing.gaps] == [(1, 2), (4, 7)]
    assert fusing.gaps[1].cause == "the align node was restarted"
    assert fusing.node.counters["malformed"] == 2


def test_a_fusion_node_that_was_restarted_names_what_it_missed(tmp_path: Path) -> None:
    fusing = Fusing(tmp_path)
    fusing.sweep(0)
    fusing.step(1, seq=0)
    fusing.turn()
    again = Fusing(tmp_path, restarts=1)
    again.sweep(1)
    again.step(5, seq=1)
    again.turn()
    assert [(gap.first, gap.last, gap.cause) for gap in again.gaps] == [(2, 4, "the fusion node was restarted")]


def test_the_cache_is_bounded_and_forgets_what_no_step_can_use() -> None:
    bus = MemoryBus()
    publisher = bus.publisher("text", ["text"])
    subscriber = bus.subscriber("test", {"text": {"text": Lossless()}})
    cache = PayloadCache(1000)
    for seq in range(10):
        publisher.publish(text(seq, seq, bytes(300)))
    for received in subscriber.receive(1000):
        cache.put(received)
    assert cache.evicted == 7
    assert cache.get("text", (0, 6)) is None
    assert cache.lost("text", (0, 6))
    assert not cache.lost("text", (0, 10))
    cache.forget("text", (0, 9))
    assert cache.get("text", (0, 8)) is None
    assert cache.get("text", (0, 9)) is not None
    publisher.beat(header("text", 12, 99, None))
    for received in subscriber.receive(1000):
        cache.put(received)
    assert cache.lost("text", (0, 11))
    assert not cache.lost("text", (0, 12))


# -- record ------------------------------------------------------------------------------------------------------------


def recorder(folder: Path, bus: MemoryBus, **more: Any) -> Record:
    settings = {"path": str(folder / "out.mcap"), "wiring": {"text": ["text"]}, "queue_bytes": 1 << 20,
                "topics": {"align": [GAP, STEP], "session": ["label"]}}  # fmt: skip
    node = Record(life(folder, "record", settings | more))
    node.join(bus)
    return node


def reported(node: Record) -> Report:
    """What a node says of itself."""
    said: list[Report] = []
    node.life.report = said.append  # type: ignore[method-assign]
    node._report()
    return said[0]


def test_what_is_lost_is_named_and_the_recording_says_that_it_is_incomplete(tmp_path: Path) -> None:
    bus = MemoryBus()
    publisher = bus.publisher("text", ["text"])
    node = recorder(tmp_path, bus)
    for seq in (0, 1, 4, 5):
        publisher.publish(text(seq, seq * MS))
    publisher.beat(header("text", 8, 9 * MS, None))
    node.turn(1000)
    node.finish()
    with RecordingReader(tmp_path / "out.mcap") as reader:
        assert [m.header.seq for m, _ in reader.messages()] == [0, 1, 4, 5]
        gaps = [msgspec.json.decode(data) for data, _, _ in reader.json(GAP_TOPIC)]
        assert [(g["stream"], g["from"], g["to"]) for g in gaps] == [("text", 2, 3), ("text", 6, 7)]
        assert not reader.info.complete
        assert "4 messages" in reader.info.note


def test_what_is_lost_between_two_hosts_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    bus = MemoryBus()
    here, there = bus.publisher("text", ["text"]), bus.publisher("pi", ["far"])
    node = recorder(tmp_path, bus, wiring={"text": ["text"], "pi": ["far"]}, elsewhere=["pi"])
    for seq in (0, 2):
        there.publish(Message(header("far", seq, seq * MS, TextLayout(4)), b"line"))
    node.turn(1000)
    node._close_gap("far", 3 * MS)
    causes = node._recording().lost
    assert causes == {"far": {FROM_ELSEWHERE: 1}}
    said = not_whole([node._recording()])
    assert "The link between the hosts was cut or too slow" in said
    assert "disk" not in said
    for seq in (0, 2):
        here.publish(text(seq, seq * MS))
    node.turn(1000)
    said = not_whole([node._recording()])
    assert "onto a faster disk. The link between the hosts was cut" in said
    node.finish()


def test_a_recorder_whose_disk_is_too_slow_names_what_did_not_fit(tmp_path: Path) -> None:
    bus = MemoryBus()
    publisher = bus.publisher("text", ["text"])
    node = recorder(tmp_path, bus, queue_bytes=1000 + 4 * ITEM_BYTES)
    disk = threading.Event()
    node.queue.put(1, disk.wait)  # the disk is busy until we say so
    for seq in range(10):
        publisher.publish(text(seq, seq * MS, bytes(300)))
    node.turn(1000)
    publisher.beat(header("text", 10, 10 * MS, None))
    node.turn(1000)
    assert node.queue.held == 1 + 3 * 300 + 4 * ITEM_BYTES
    disk.set()
    node.finish()
    with RecordingReader(tmp_path / "out.mcap") as reader:
        assert [m.header.seq for m, _ in reader.messages()] == [0, 1, 2]
        gaps = [msgspec.json.decode(data) for data, _, _ in reader.json(GAP_TOPIC)]
        assert [(g["from"], g["to"]) for g in gaps] == [(3, 9)]  # one record, however many were lost
        assert gaps[0]["cause"] == "the disk was too slow, and the recorder's queue full"
        assert reader.info.note == "7 messages could not be recorded; 1 beats could not be recorded"
    said = node._recording()
    assert (said.path, said.asked) == (str(tmp_path / "out.mcap"), "")
    assert (said.messages, said.lost) == ({"text": 3}, {"text": {gaps[0]["cause"]: 7}})
    assert said.lost_beats == 1


def test_a_ring_whose_disk_is_full_for_a_while_goes_on_and_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, disk = MemoryBus(), Disk(monkeypatch)
    publisher, align = bus.publisher("text", ["text"]), bus.publisher("align")
    ring = {"path": str(tmp_path / "ring"), "limit_bytes": 4_000_000, "segment_ns": 60_000 * MS}
    node = recorder(tmp_path, bus, topics={"align": [GAP, STEP]}, **ring)
    assert isinstance(node.clock, ManualClock)

    def come(numbers: range) -> None:
        for k in numbers:
            publisher.publish(text(k, k * 100 * MS))
            manifest = Manifest(step=k + 1, start_ns=0, end_ns=k, cause="proven", emitted_ns=0, digest="", streams={})
            align.publish_parts(STEP, encode_step(Step(manifest, {}, {}), 0)[1:])
            node.turn(1000)
            node.clock.advance(100 * MS)

    come(range(30))
    written = threading.Event()
    node.queue.put(1, written.set)
    written.wait()
    disk.free = 0
    come(range(30, 50))
    written.clear()
    node.queue.put(1, written.set)
    written.wait()
    [warning] = reported(node).warnings
    assert "and nothing is recorded from 2." in warning
    disk.free = 1 << 30
    come(range(50, 70))
    node.finish()
    said, warnings = node._recording(), reported(node).warnings
    assert warnings[0] == warning
    assert "no room was left on the disk; since then it is, in " in warnings[1]
    lost = said.lost["text"]["no room was left on the disk"]
    assert said.messages == {"text": 70 - lost}
    assert said.no_room is not None
    assert 20 < said.no_room.windows < 45
    segments = sorted((tmp_path / "ring").glob("*.mcap"))
    with RecordingReader(segments[1]) as reader:
        seqs = [m.header.seq for m, _ in reader.messages()]
        steps = [msgspec.json.decode(data, type=Manifest).step for data, _, _ in reader.json(MANIFEST_TOPIC)]
        gaps = [msgspec.json.decode(data) for data, _, _ in reader.json(GAP_TOPIC)]
        assert reader.info.note.startswith("nothing was recorded from 2.")
        assert f"; {lost} messages could not be recorded; {said.no_room.windows} windows could not" in reader.info.note
    assert (seqs[-1], steps[-1]) == (69, 70)
    windows = [(gap["from"], gap["to"]) for gap in gaps if "stream" not in gap]
    assert windows == [(steps[0] - said.no_room.windows, steps[0] - 1)]
    whole = not_whole([said])
    assert whole.startswith("the recording is not whole: no room was left on the disk, and nothing is recorded from 2.")
    assert f"; it lacks {lost} of 70 messages of text, {said.no_room.windows} windows; `sensorium info`" in whole
    assert whole.endswith("Make room on the disk, or lower the ring's `limit_mb`")
    assert "too slow" not in whole
    assert f"it lacks {said.no_room.windows} windows: no room was left on the disk" in lacking([said])


def test_a_session_that_ends_while_its_disk_is_full_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bus, disk = MemoryBus(), Disk(monkeypatch)
    publisher = bus.publisher("text", ["text"])
    node = recorder(tmp_path, bus, path=str(tmp_path / "ring"), limit_bytes=4_000_000, segment_ns=60_000 * MS)
    publisher.publish(text(0, 0))
    node.turn(1000)
    disk.free = 0
    node.finish()
    said = node._recording()
    assert said.lost == {"text": {"no room was left on the disk": 1}}
    assert "nothing is recorded from 0.0 s to the end of the session; it lacks 1 of 1 messages" in not_whole([said])
    assert "until there is room" not in reported(node).note  # it is over


def test_manifests_labels_and_gaps_between_steps_are_recorded(tmp_path: Path) -> None:
    bus = MemoryBus()
    align, session = bus.publisher("align"), bus.publisher("session")
    node = recorder(tmp_path, bus)
    manifests = []
    for k in (1, 2, 5):
        manifests.append(Manifest(step=k, start_ns=0, end_ns=k, cause="proven", emitted_ns=0, digest="d", streams={}))
        _, *parts = encode_step(Step(manifests[-1], {}, {}), 0)
        align.publish_parts(STEP, parts)
    session.publish_json("label", msgspec.json.encode(Label(0, 5, "calm")))
    node.turn(1000)
    node.finish()
    with RecordingReader(tmp_path / "out.mcap") as reader:
        assert [msgspec.json.decode(d, type=Manifest) for d, _, _ in reader.json(MANIFEST_TOPIC)] == manifests
        assert reader.labels() == [Label(0, 5, "calm")]
        gap = msgspec.json.decode(next(iter(reader.json(GAP_TOPIC)))[0])
        assert (gap["from"], gap["to"]) == (3, 4)
        assert not reader.info.complete
        assert reader.info.note == "2 windows could not be recorded"


def test_windows_and_predictions_that_the_recorder_lost_make_the_recording_incomplete(tmp_path: Path) -> None:
    bus = MemoryBus()
    align, fusion = bus.publisher("align"), bus.publisher("fusion")
    node = recorder(tmp_path, bus, topics={"align": [GAP, STEP], "fusion": [GAP, "prediction"]})

    def window(k: int) -> None:
        manifest = Manifest(step=k, start_ns=0, end_ns=k, cause="proven", emitted_ns=0, digest="d", streams={})
        align.publish_parts(STEP, encode_step(Step(manifest, {}, {}), 0)[1:])

    def predict(k: int) -> None:
        fusion.publish_json("prediction", b'{"window":{"index":%d}}' % k)

    for k in (1, 2, 5, 6, 10, 11, 12):
        window(k)
    align.publish_json(GAP, msgspec.json.encode(Gap(7, 9, "the align node was restarted")))
    fusion.publish_json(GAP, msgspec.json.encode(Gap(11, 11, "the fusion node was restarted", "prediction")))
    for k in (1, 5, 6, 10, 12):
        predict(k)
    node.turn(1000)
    Mark(life(tmp_path, "align", {})).value = 13
    Mark(life(tmp_path, "fusion", {})).value = 12
    node.finish()
    with RecordingReader(tmp_path / "out.mcap") as reader:
        assert reader.info.note == "3 windows could not be recorded; 1 predictions could not be recorded"
        gaps = [msgspec.json.decode(data, type=Gap) for data, _, _ in reader.json(GAP_TOPIC)]
        assert not reader.info.complete
        assert summarise(reader)["note"] == reader.info.note
    assert {(g.first, g.last, g.of) for g in gaps} == {
        (3, 4, "window"), (7, 9, "window"), (13, 13, "window"), (2, 2, "prediction"), (11, 11, "prediction"),
    }  # fmt: skip
    said = node._recording()
    assert (said.lost_windows, said.lost_predictions) == (3, 1)
    assert "it lacks 3 windows and 1 predictions: lost on the way to the recorder" in lacking([said])
    assert not_whole([said]).startswith("the recording is not whole: it lacks 3 windows and 1 predictions; ")


def test_what_died_with_its_node_is_no_loss_of_the_recorder(tmp_path: Path) -> None:
    bus = MemoryBus()
    align = bus.publisher("align")
    bus.publisher("fusion")
    node = recorder(tmp_path, bus, topics={"align": [GAP, STEP], "fusion": [GAP, "prediction"]})
    manifest = Manifest(step=1, start_ns=0, end_ns=1, cause="proven", emitted_ns=0, digest="d", streams={})
    align.publish_parts(STEP, encode_step(Step(manifest, {}, {}), 0)[1:])
    node.turn(1000)
    node.finish()
    with RecordingReader(tmp_path / "out.mcap") as reader:
        gap = msgspec.json.decode(next(iter(reader.json(GAP_TOPIC)))[0], type=Gap)
        assert (gap.first, gap.last, gap.of) == (1, 1, "prediction")
        assert reader.info.complete


def test_a_write_that_fails_ends_the_recorder(tmp_path: Path) -> None:
    node = recorder(tmp_path, MemoryBus())
    node.writer.close()  # what a full disk does to the writer
    node.queue.put(1, lambda: node.writer.write(text(0, 0), 0))
    with pytest.raises(RecordingError, match="closed"):
        node.finish()
    with pytest.raises(RecordingError, match="closed"):
        node.turn(0)


def test_a_message_that_no_schema_can_state_becomes_a_gap_and_ends_nothing(tmp_path: Path) -> None:
    bus = MemoryBus()
    publisher = bus.publisher("text", ["text"])
    node = recorder(tmp_path, bus)
    wrong = Message(header("text", 1, MS, FrameLayout("bgr8", -1, -1)), b"abc")
    node.queue.put(3, lambda: node._write(wrong, MS))
    publisher.publish(text(0, 0))
    node.turn(1000)
    node.finish()
    with RecordingReader(tmp_path / "out.mcap") as reader:
        assert [m.header.seq for m, _ in reader.messages()] == [0]
        gap = msgspec.json.decode(next(iter(reader.json(GAP_TOPIC)))[0])
        assert (gap["stream"], gap["from"], gap["to"]) == ("text", 1, 1)
        assert "contradicts itself" in gap["cause"]
        assert not reader.info.complete


def test_whatever_a_write_fails_with_is_raised(tmp_path: Path) -> None:
    node = recorder(tmp_path, MemoryBus())
    node.queue.put(1, lambda: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        node.finish()
    with pytest.raises(ValueError, match="no number"):
        node.turn(0)
    node.writer.close(complete=False)


def test_a_recorder_that_is_to_stop_takes_all_that_was_sent(tmp_path: Path) -> None:
    bus = MemoryBus()
    publisher = bus.publisher("text", ["text"], lossless=True)
    node = recorder(tmp_path, bus, queue_bytes=64 << 20)
    messages = [text(seq, seq * MS) for seq in range(5000)]  # more than one turn takes
    source = threading.Thread(target=lambda: [publisher.publish(message) for message in messages])
    source.start()
    drain(node.turn)
    source.join()
    node.finish()
    with RecordingReader(tmp_path / "out.mcap") as reader:
        assert reader.info.complete
        assert sum(1 for _ in reader.messages()) == 5000


def test_a_recording_never_takes_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    assert free_path(path) == path
    path.touch()
    assert free_path(path).name == "a-2.mcap"
    (tmp_path / "a-2.mcap").touch()
    assert free_path(path).name == "a-3.mcap"


# -- replay ------------------------------------------------------------------------------------------------------------


def test_a_recording_is_published_again_moved_by_one_constant(tmp_path: Path) -> None:
    path = tmp_path / "in.mcap"
    with RecordingWriter(path, SessionInfo(session="s")) as writer:
        for label in (Label(5000 * MS, 5100 * MS, "calm"), Label(5100 * MS, 5300 * MS, "shake")):
            writer.write_label(label, label.start_ns)
        for seq, t_ms in ((0, 5000), (1, 5100), (3, 5200)):
            writer.write(text(seq, t_ms * MS), (t_ms + 20) * MS)
        writer.write(Message(header("text", 4, 5250 * MS, None)), 5300 * MS)
    node_life = life(tmp_path, "session", {"path": str(path)}, 2000 * MS, streams={"text": "text"})
    settings = Replay.Settings(path=path)
    assert Replay.streams_of(settings) == {"text": "text"}
    assert Replay.slots_of(settings) == {}
    bus = MemoryBus()
    node, publisher = Replay(node_life), bus.publisher("session", ["text"], lossless=True)
    subscriber = bus.subscriber("test", {"session": {"text": Lossless()}}, topics={"session": {"label": Lossless()}})
    player = threading.Thread(target=node.play, args=(publisher,))
    player.start()
    headers: list[Header] = []
    labels: list[Label] = []
    while len(headers) < 5:
        for received in subscriber.receive(1000):
            with received:
                headers.append(received.message.header)
        labels += [msgspec.json.decode(parts.parts[0], type=Label) for parts in subscriber.parts()]
    node_life.stop.set()
    player.join()
    shift = headers[0].t_capture_ns - 5000 * MS
    expected = [moved_header(text(seq, t * MS).header, shift) for seq, t in ((0, 5000), (1, 5100), (3, 5200))]
    assert [h for h in headers if not h.is_beat] == expected
    assert [h.seq for h in headers if h.is_beat][:2] == [4, 4]
    assert [(label.start_ns - shift, label.label) for label in labels] == [(5000 * MS, "calm"), (5100 * MS, "shake")]
    assert shift == -5000 * MS + 2000 * MS + 100 * MS


def test_labels_beside_a_recording_are_the_truth_of_a_session_that_plays_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    with RecordingWriter(path, SessionInfo(session="s")) as writer:
        writer.write(text(0, 5000 * MS), 5010 * MS)
        writer.write_label(Label(0, 6000 * MS, "calm"), 0)
    sidecar = tmp_path / "a.labels.csv"
    sidecar.write_text("start_s,end_s,label\n1.0,5.0,shake\n")
    with RecordingReader(path) as reader:
        told = [what for _, what in _in_order(reader, {"text"}) if isinstance(what, Label)]
    assert told == [Label(1000 * MS, 5000 * MS, "shake")]
    sidecar.write_text("start_s,end_s,label\n1000,5000,shake\n")
    with pytest.raises(RecordingError, match="begins after the session's end"):  # before anything starts
        Replay.streams_of(Replay.Settings(path=path))


def test_raw_frames_get_slots_and_unknown_streams_are_refused(tmp_path: Path, demo_frames: Path) -> None:
    assert Replay.slots_of(Replay.Settings(path=demo_frames)) == {"camera": 640 * 480 * 3}
    with pytest.raises(ValueError, match="no stream `front`"):
        Replay.streams_of(Replay.Settings(path=demo_frames, streams=("front",)))


@pytest.fixture
def demo_frames(tmp_path: Path) -> Path:
    """A recording of one raw frame."""
    path = tmp_path / "frames.mcap"
    layout = FrameLayout("bgr8", 480, 640)
    with RecordingWriter(path, SessionInfo(session="s")) as writer:
        writer.write(Message(header("camera", 0, 0, layout), np.zeros((480, 640, 3), np.uint8)), 0)
    return path


def test_payloads_in_shared_memory_reach_the_recorder(tmp_path: Path) -> None:
    bus = MemoryBus()
    publisher: Publisher = bus.publisher("text", ["text"], RingSpec(2, 100_000))
    node = recorder(tmp_path, bus)
    for seq in range(6):
        publisher.publish(text(seq, seq * MS, bytes([seq]) * 90_000))
        node.turn(1000)
    node.finish()
    with RecordingReader(tmp_path / "out.mcap") as reader:
        assert [bytes(m.data) for m, _ in reader.messages()] == [bytes([seq]) * 90_000 for seq in range(6)]
        assert reader.info.complete
