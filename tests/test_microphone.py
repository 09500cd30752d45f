"""The microphone: the arithmetic of blocks, and the source itself on a real sound server that comes and goes."""

from __future__ import annotations

import ctypes.util
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nodes.microphone import Microphone
from pipeline.checks import CheckContext, check_source
from pipeline.clock import ManualClock, Origin, SystemClock
from pipeline.errors import ConfigError, SensorError
from pipeline.hosttime import domain_of, host_zero
from pipeline.life import Life, NodeSpec
from pipeline.messages import Header, Message, view
from pipeline.node import SourceShell
from pipeline.soundblocks import SETTLING_BLOCKS, Block, BlockClock, Converter, Regroup, mix
from pipeline.strict import Document

MS, NS = 1_000_000, 1_000_000_000
PERIOD_S = 0.1


# -- arithmetic --------------------------------------------------------------------------------------------------------


def block(samples: int, begin_ns: int, rate: int = 16_000, **more: Any) -> Block:
    end = begin_ns + samples * NS // rate
    data = np.zeros((samples, 1), "<i2")
    fields: dict[str, Any] = {"data": data, "t_capture_ns": begin_ns, "t_end_ns": end, "t_receipt_ns": end,
                              "t_device_ns": None, "uncertainty_ns": 0}  # fmt: skip
    return Block(**(fields | more))


def test_the_clock_of_a_stamp_shows_in_its_numbers() -> None:
    zero = Origin(monotonic_ns=1000 * NS, unix_ns=1_790_000_000 * NS)
    assert domain_of(1002 * NS, 2 * NS, zero) == "monotonic"
    assert domain_of(1_790_000_003 * NS, 2 * NS, zero) == "realtime"
    assert domain_of(0, 2 * NS, zero) is None


def test_the_hosts_clocks_are_found_again_from_the_session_clock() -> None:
    origin = Origin.now()
    found = host_zero(SystemClock(Origin(origin.monotonic_ns - 5 * NS, origin.unix_ns - 5 * NS)))
    assert abs(found.monotonic_ns - (origin.monotonic_ns - 5 * NS)) < MS


def placed(
    count: int, jump_at: int | None, lost: int, *, ahead_ns: int = 0, told: bool = False, size: int = 160
) -> list[Block]:
    """``count`` blocks of ``size`` samples at 16 kHz, whose ADC times say that ``lost`` samples are missing at one."""
    clock, rng, found, device = BlockClock(16_000, adc=True), np.random.default_rng(1), [], 0
    for i in range(count):
        missing = lost if jump_at is not None and i >= jump_at else 0
        device = i * size + missing
        adc = device * NS // 16_000 + round(rng.normal(0, 0.15 * MS)) + ahead_ns
        number, receipt = device if told else i * size, adc + size * NS // 16_000 - ahead_ns
        found += clock.update(np.full((size, 1), i % 1000, "<i2"), adc, adc, receipt, number)
    assert clock.lost == (lost if jump_at is not None else 0)
    return found


@pytest.mark.parametrize("size", [160, 320])
@pytest.mark.parametrize("told", [False, True])
def test_lost_samples_make_times_jump_at_the_block_after_them(told: bool, size: int) -> None:
    got = placed(400, 300, 800, told=told, size=size)
    first = next(i for i, b in enumerate(got) if int(b.data[0, 0]) == 300)
    assert [i for i, b in enumerate(got) if b.gap] == [0, first]
    for i, b in enumerate(got):
        number = int(b.data[0, 0])
        true = (number * size + (800 if number >= 300 else 0)) * NS // 16_000
        assert abs(b.t_capture_ns - true) < MS, number
        if i and i != first:
            assert b.t_capture_ns == got[i - 1].t_end_ns
    assert [int(b.data[0, 0]) for b in got] == list(range(SETTLING_BLOCKS, 400))


@pytest.mark.parametrize("wrong_ms", [40, -10])
def test_one_bad_stamp_moves_nothing(wrong_ms: int) -> None:
    clock = BlockClock(16_000, adc=True)
    got: list[Block] = []
    for i in range(300):
        adc = i * 10 * MS + (wrong_ms * MS if i == 200 else 0)
        got += clock.update(np.zeros((160, 1), "<i2"), adc, adc, adc + 10 * MS, i * 160)
    assert len(got) == 300 - SETTLING_BLOCKS
    assert clock.lost == 0
    assert max(abs(b.t_capture_ns - (i + SETTLING_BLOCKS) * 10 * MS) for i, b in enumerate(got)) < MS


def test_a_run_of_early_stamps_moves_nothing() -> None:
    clock = BlockClock(16_000, adc=True)
    got: list[Block] = []
    for i in range(400):
        adc = i * 10 * MS - (20 * MS if 200 <= i < 212 or i in (27, 28, 30) else 0)
        got += clock.update(np.zeros((160, 1), "<i2"), adc, adc, i * 10 * MS + 10 * MS, i * 160)
    assert [b.gap for b in got] == [True] + [False] * (len(got) - 1)
    assert max(abs(b.t_capture_ns - (i + SETTLING_BLOCKS) * 10 * MS) for i, b in enumerate(got)) < MS


def test_no_block_ends_after_it_arrived() -> None:
    got = placed(200, None, 0, ahead_ns=10 * MS)
    assert max(b.t_end_ns - b.t_receipt_ns for b in got) < MS


def test_groups_are_whole_and_never_reach_across_a_gap() -> None:
    regroup, out = Regroup(400), []
    times = [0, 10 * MS, 20 * MS, 90 * MS, 100 * MS, 110 * MS, 120 * MS]
    for t in times:
        out += regroup.update(block(160, t, gap=t == 90 * MS))
    assert [(b.t_capture_ns, b.t_end_ns, len(b.data)) for b in out] == [
        (0, 25 * MS, 400), (25 * MS, 30 * MS, 80), (90 * MS, 115 * MS, 400)]  # fmt: skip
    assert [b.gap for b in out] == [False, False, True]


@pytest.mark.parametrize(("source", "target"), [(48_000, 16_000), (44_100, 16_000), (8_000, 16_000)])
def test_another_rate_sounds_the_same_at_the_same_time(source: int, target: int) -> None:
    converter, size = Converter(source, target, 1), source // 100
    got = []
    for i in range(60):
        t = (i * size + np.arange(size)) / source
        data = np.rint(10_000 * np.sin(2 * np.pi * 440 * t)).astype("<i2")[:, None]
        begin = i * size * NS // source
        more = converter.update(block(size, begin, source, data=data, t_end_ns=(i + 1) * size * NS // source))
        assert more is not None
        got.append(more)
    for before, after in itertools.pairwise(got):
        assert abs(after.t_capture_ns - before.t_end_ns) <= 1000
    late = got[20:]
    values = np.concatenate([b.data[:, 0] for b in late])
    t = late[0].t_capture_ns / NS + np.arange(len(values)) / target
    assert np.abs(values - 10_000 * np.sin(2 * np.pi * 440 * t)).max() < 30
    assert abs(sum(len(b.data) for b in got) - 0.6 * target) < target / 100


def test_channels_are_mixed_or_left_out() -> None:
    data = np.array([[100, 300, 7], [-32768, -32768, 7]], "<i2")
    assert mix(data[:, :2], 1).tolist() == [[200], [-32768]]
    assert mix(data, 2).tolist() == [[100, 300], [-32768, -32768]]


@pytest.mark.parametrize(("settings", "said"), [
    ({"rate": 16000}, "rate_hz"), ({"rate_hz": "16 khz"}, "whole number"), ({"channels": 0}, "at least 1"),
    ({"device": 1.5}, "text"), ({"block_ms": 5}, "at least 10"), ({"gather_ms": 5}, "at least 10"),
])  # fmt: skip
def test_wrong_settings_are_named_without_a_device(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Document("{}", "rig.yaml").decode(Microphone.Settings, value=settings)


# -- a real sound server -----------------------------------------------------------------------------------------------

DEBIAN = "apt-get install --no-install-recommends pulseaudio pulseaudio-utils libasound2-plugins libportaudio2"


class Server:
    """A PulseAudio server of our own with one sink that plays into nothing; its monitor is the microphone."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.socket = folder, folder / "pulse.sock"
        self.process: subprocess.Popen[bytes] | None = None
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "HOME": str(folder),
                    "PULSE_SERVER": f"unix:{self.socket}"}  # fmt: skip

    def start(self) -> None:
        command = ["pulseaudio", "-n", "--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no",
                   "--disable-shm=yes", "--realtime=no", "--high-priority=no",
                   "-L", f"module-native-protocol-unix auth-anonymous=1 socket={self.socket}",
                   "-L", "module-null-sink sink_name=mic rate=48000 channels=1 norewinds=1"]  # fmt: skip
        self.process = subprocess.Popen(command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: self._pactl("set-default-sink", "mic") and self._pactl("set-default-source", "mic.monitor"),
                 "the sound server's start")  # fmt: skip

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self.socket.unlink(missing_ok=True)

    def play(self, sound: np.ndarray[Any, Any]) -> subprocess.Popen[bytes]:
        path = self.folder / "sound.raw"
        path.write_bytes(sound.astype("<i2").tobytes())
        return subprocess.Popen(["pacat", "--raw", "--rate=48000", "--channels=1", "--format=s16le", str(path)],
                                env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    def _pactl(self, *arguments: str) -> bool:
        done = subprocess.run(["pactl", *arguments], env=self.env, capture_output=True, timeout=10, check=False)
        return done.returncode == 0


def wait_for(condition: Callable[[], bool], what: str, turns: int = 200) -> None:
    pause = threading.Event()
    for _ in range(turns):
        if condition():
            return
        pause.wait(0.05)
    raise AssertionError(f"{what}: not within {turns} turns")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    missing = [name for name in ("pulseaudio", "pactl", "pacat") if shutil.which(name) is None]
    if not any(Path("/usr/lib").glob("*/alsa-lib/libasound_module_pcm_pulse.so")):
        missing.append("ALSA's plugin for PulseAudio")
    if ctypes.util.find_library("portaudio") is None:
        missing.append("PortAudio")
    if missing:
        pytest.skip(f"{', '.join(missing)} not here: {DEBIAN}")
    with tempfile.TemporaryDirectory() as folder:
        made = Server(Path(folder))
        monkeypatch.setenv("PULSE_SERVER", made.env["PULSE_SERVER"])
        try:
            made.start()
            yield made
        finally:
            made.kill()


class Collector:
    """A publisher that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[tuple[Header, np.ndarray[Any, Any]]] = []
        self.health: list[str] = []

    def publish(self, message: Message) -> bool:
        assert message.header.layout is not None
        self.messages.append((message.header, view(message.header.layout, message.data).copy()))
        return True

    def beat(self, header: Header) -> bool:
        self.health.append(header.health)
        return True

    def loan(self, nbytes: int) -> np.ndarray[Any, Any] | None:
        return np.empty(nbytes, np.uint8)


def shell(**settings: Any) -> tuple[SourceShell, Collector]:
    sender, clock = Collector(), SystemClock()
    decoded = Document("{}", "settings").decode(Microphone.Settings, value={"device": "pulse", **settings})
    spec = NodeSpec(session="s", origin=clock.origin, session_dir="/nowhere", node="microphone", kind="microphone")
    made = SourceShell(Microphone, decoded, Life(spec, clock), sender, "microphone")
    made.stamper.open(clock.now_ns())
    return made, sender


def turn_until(made: SourceShell, condition: Callable[[], Any], seconds: float = 40) -> None:
    end = made.life.clock.now_ns() + round(seconds * NS)
    while not condition():
        made.turn()
        assert made.life.clock.now_ns() < end, f"not within {seconds} s; {made.context.dropped}, {made._trouble}"


def onsets(messages: list[tuple[Header, np.ndarray[Any, Any]]]) -> list[float]:
    """When clicks began, ns: where the sound first exceeds half of its greatest value after silence, placed by the
    peak's centre of energy."""
    values = np.concatenate([data[:, 0] for _, data in messages]).astype(float)
    times = np.concatenate([h.t_capture_ns + (h.t_end_ns - h.t_capture_ns) * np.arange(len(d)) / len(d)
                            for h, d in messages])  # fmt: skip
    loud = np.flatnonzero(np.abs(values) > 4000)
    groups = np.split(loud, np.flatnonzero(np.diff(loud) > 800) + 1) if len(loud) else []
    return [float(np.average(times[g], weights=np.abs(values[g]))) for g in groups]


@pytest.mark.slow
def test_clicks_are_found_where_they_were_played(server: Server) -> None:
    made, sender = shell()
    clicks = 60
    sound = np.zeros(round(48_000 * PERIOD_S) * clicks)
    for i in range(clicks):
        start = round(48_000 * PERIOD_S) * i
        sound[start : start + 48] = 20_000
    try:
        turn_until(made, lambda: len(sender.messages) > 10)
        player = server.play(sound)
        try:
            turn_until(made, lambda: player.poll() is not None)
            end = made.life.clock.now_ns() + 500 * MS
            turn_until(made, lambda: made.life.clock.now_ns() > end)
        finally:
            player.kill()
            player.wait()
    finally:
        made.source.close()
    found = np.array(onsets(sender.messages))
    assert len(found) == clicks, f"{len(found)} clicks of {clicks}"
    errors = found - np.arange(clicks) * PERIOD_S * NS
    errors -= np.median(errors)
    assert np.abs(errors).max() < 2 * MS, errors / MS
    assert len({header.epoch for header, _ in sender.messages}) == 1
    assert "lost_samples" not in made.context.dropped


@pytest.mark.slow
def test_a_killed_server_that_returns_opens_a_new_epoch(server: Server) -> None:
    made, sender = shell()
    try:
        turn_until(made, lambda: len(sender.messages) > 10)
        server.kill()
        turn_until(made, lambda: made._trouble)
        assert "sound" in made._trouble
        count = len(sender.messages)
        server.start()
        turn_until(made, lambda: len(sender.messages) > count + 10)
    finally:
        made.source.close()
    epochs = sorted({header.epoch for header, _ in sender.messages})
    assert len(epochs) == 2
    captures = [header.t_capture_ns for header, _ in sender.messages]
    assert captures == sorted(captures)
    assert sender.health[-1] == ""


@pytest.mark.slow
def test_a_server_that_hangs_blocks_nobody_and_is_used_again(server: Server) -> None:
    made, sender = shell()
    assert server.process is not None
    try:
        turn_until(made, lambda: len(sender.messages) > 10)
        server.process.send_signal(signal.SIGSTOP)
        try:
            turn_until(made, lambda: "hangs" in made._trouble)
        finally:
            server.process.send_signal(signal.SIGCONT)
        count = len(sender.messages)
        turn_until(made, lambda: len(sender.messages) > count + 10)
    finally:
        made.source.close()
    assert len({header.epoch for header, _ in sender.messages}) == 2


@pytest.mark.slow
def test_a_device_that_takes_long_to_open_is_open_at_a_later_try(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodes.microphone._DRIVER_S", 0.0)
    made, sender = shell()
    troubles = []
    try:
        turn_until(made, lambda: troubles.append(made._trouble) or len(sender.messages) > 5)
        monkeypatch.undo()
    finally:
        made.source.close()
    assert any("takes long" in trouble for trouble in troubles)
    assert made.failures > 0


@pytest.mark.slow
def test_it_keeps_the_contract_of_a_source(server: Server) -> None:
    got = check_source(Microphone, {"device": "pulse", "channels": 2, "block_ms": 50}, readings=8)
    assert {reading.layout.channels for reading in got} == {2}  # type: ignore[union-attr]


def test_an_absent_device_is_named_with_those_that_are_here(server: Server) -> None:
    source = Microphone(Microphone.Settings(device="Blue Yeti"), CheckContext())
    with pytest.raises(SensorError, match=r"no sound input has `Blue Yeti` in its name; here are .*pulse"):
        source.open()
    source.close()
    source = Microphone(Microphone.Settings(device="pulse", channels=8), CheckContext())
    source.open()
    source.close()


def test_without_a_server_the_device_is_waited_for(server: Server) -> None:
    server.kill()
    source = Microphone(Microphone.Settings(device="pulse"), CheckContext())
    with pytest.raises(SensorError):
        source.open()
    source.close()


class Times:
    inputBufferAdcTime = 0.0


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
@pytest.mark.parametrize("block_ms", [10, 15, 20, 30, 40, 50, 60, 100])
def test_the_first_block_that_is_placed_begins_a_hand_over(block_ms: int, rate: int) -> None:
    """Else every message of the device's life would be cut from two."""
    given = Document("{}", "settings").decode(Microphone.Settings, value={"block_ms": block_ms})
    microphone = Microphone(given, CheckContext(clock=SystemClock()))
    microphone._count, settling = 0, microphone._settling
    samples = round(rate * microphone._block_ms / 1000)
    callback = microphone._callback(microphone._blocks)
    for _ in range(settling + 50):
        callback(bytes(2 * samples), samples, Times, None)
    taken = []
    while not microphone._blocks.empty():
        taken.append(microphone._blocks.get())
    assert settling in itertools.accumulate(map(len, taken))
    assert [raw.number for raws in taken for raw in raws] == list(range(0, samples * sum(map(len, taken)), samples))
    assert {len(raws) for raws in taken[1:]} == {microphone._at_once}
    assert microphone._at_once * microphone._block_ms <= max(50, block_ms)
    whole = round(rate * block_ms / 1000) / samples
    assert whole == round(block_ms / microphone._block_ms)  # messages are made of whole blocks


@pytest.mark.parametrize(("api", "gather_ms", "own_s", "asked"), [
    ("ALSA", 40, 0.035, 0.1), ("ALSA", 40, 0.2, 0.2), ("ALSA", 60, 0.035, 0.18), ("ALSA", 20, 0.035, "high"),
    ("ALSA", 10, 0.035, "high"), ("Core Audio", 40, 0.035, "high"),
])  # fmt: skip
def test_only_alsa_is_asked_to_gather(api: str, gather_ms: int, own_s: float, asked: float | str) -> None:
    given = Document("{}", "settings").decode(Microphone.Settings, value={"gather_ms": gather_ms})

    class Driver:
        @staticmethod
        def query_hostapis(index: int) -> dict[str, Any]:
            return {"name": api}

    info = {"hostapi": 0, "default_high_input_latency": own_s}
    assert Microphone(given, CheckContext())._latency(Driver, info) == asked


def test_blocks_of_one_moment_are_handed_over_together() -> None:
    """Nothing waits for a later moment than its own but the first blocks of a moment that has more than the last."""
    given = Document("{}", "settings").decode(Microphone.Settings, value={})
    clock = ManualClock()
    microphone = Microphone(given, CheckContext(clock=clock))
    microphone._count = 0
    callback = microphone._callback(microphone._blocks)
    handed = []
    for count in (1, 2, 2, 2, 50, 2, 2, 1, 2):
        clock.advance(40 * MS)
        for _ in range(count):
            callback(bytes(640), 320, Times, None)
        handed.append([])
        while not microphone._blocks.empty():
            handed[-1].append(len(microphone._blocks.get()))
    assert handed == [[1], [1, 1], [2], [2], [2] + 48 * [1], [2], [2], [], [2, 1]]
