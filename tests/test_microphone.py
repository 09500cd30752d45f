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
from types import SimpleNamespace
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
from pipeline.soundblocks import SETTLING_MS, Block, BlockClock, Converter, Regroup, mix
from pipeline.source import Reading
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


def settling(size: int) -> int:
    """How many blocks of ``size`` samples at 16 kHz are distrusted."""
    return -(-16 * SETTLING_MS // size)


def placed(
    count: int, jump_at: int | None, lost: int, *, ahead_ns: int = 0, told: bool = False, size: int = 160
) -> tuple[list[Block], int]:
    """``count`` blocks of ``size`` samples at 16 kHz, whose ADC times say that ``lost`` samples are missing at one; and
    how many samples were held back at most."""
    clock, rng, found, device = BlockClock(16_000, adc=True), np.random.default_rng(1), [], 0
    most_held = 0
    for i in range(count):
        missing = lost if jump_at is not None and i >= jump_at else 0
        device = i * size + missing
        adc = device * NS // 16_000 + round(rng.normal(0, 0.15 * MS)) + ahead_ns
        number, receipt = device if told else i * size, adc + size * NS // 16_000 - ahead_ns
        found += clock.update(np.full((size, 1), i % 1000, "<i2"), adc, adc, receipt, number)
        most_held = max(most_held, (i + 1 - settling(size) - len(found)) * size)
    assert clock.lost == (lost if jump_at is not None else 0)
    return found, most_held


@pytest.mark.parametrize("size", [160, 320, 640])
@pytest.mark.parametrize("told", [False, True])
def test_lost_samples_make_times_jump_at_the_block_after_them(told: bool, size: int) -> None:
    got, most_held = placed(400, 300, 800, told=told, size=size)
    assert most_held == (0 if told else 5 * size)
    first = next(i for i, b in enumerate(got) if int(b.data[0, 0]) == 300)
    assert [i for i, b in enumerate(got) if b.gap] == [0, first]
    for i, b in enumerate(got):
        number = int(b.data[0, 0])
        true = (number * size + (800 if number >= 300 else 0)) * NS // 16_000
        assert abs(b.t_capture_ns - true) < MS, number
        if i and i != first:
            assert b.t_capture_ns == got[i - 1].t_end_ns
    assert [int(b.data[0, 0]) for b in got] == list(range(settling(size), 400))


@pytest.mark.parametrize("wrong_ms", [40, -10])
def test_one_bad_stamp_moves_nothing(wrong_ms: int) -> None:
    clock = BlockClock(16_000, adc=True)
    got: list[Block] = []
    for i in range(300):
        adc = i * 10 * MS + (wrong_ms * MS if i == 200 else 0)
        got += clock.update(np.zeros((160, 1), "<i2"), adc, adc, adc + 10 * MS, i * 160)
    assert len(got) == 300 - settling(160)
    assert clock.lost == 0
    assert max(abs(b.t_capture_ns - (i + settling(160)) * 10 * MS) for i, b in enumerate(got)) < MS


@pytest.mark.parametrize("wrong_ms", [40, -10])
def test_nor_does_one_among_the_first(wrong_ms: int) -> None:
    clock = BlockClock(16_000, adc=True)
    got: list[Block] = []
    for i in range(300):
        adc = i * 10 * MS + (wrong_ms * MS if i == 15 else 0)
        got += clock.update(np.zeros((160, 1), "<i2"), adc, adc, i * 10 * MS + 13 * MS, i * 160)
    assert max(abs(b.t_capture_ns - (i + settling(160)) * 10 * MS) for i, b in enumerate(got)) < MS


def test_a_run_of_early_stamps_moves_nothing() -> None:
    clock = BlockClock(16_000, adc=True)
    got: list[Block] = []
    for i in range(400):
        adc = i * 10 * MS - (20 * MS if 200 <= i < 212 or i in (27, 28, 30) else 0)
        got += clock.update(np.zeros((160, 1), "<i2"), adc, adc, i * 10 * MS + 10 * MS, i * 160)
    assert [b.gap for b in got] == [True] + [False] * (len(got) - 1)
    assert max(abs(b.t_capture_ns - (i + settling(160)) * 10 * MS) for i, b in enumerate(got)) < MS


def test_no_block_ends_after_it_arrived() -> None:
    got, _ = placed(200, None, 0, ahead_ns=10 * MS)
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
    ({"gather_ms": 60}, "Allowed are 10 to 50, 100 and 200"), ({"gather_ms": 150}, "ADC times"),
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


# -- the node on a device that is driven by hand -----------------------------------------------------------------------


class Device:
    """A driver with one sound input, and that input: sound is recorded, and taken from it, when ``take`` is called."""

    PortAudioError = OSError
    default = SimpleNamespace(device=(0, 0))

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rate: int = 16_000, **settings: Any) -> None:
        self.rate, self.clock, self.rng = rate, ManualClock(), np.random.default_rng(1)
        given = Document("{}", "settings").decode(Microphone.Settings, value={"rate_hz": rate, **settings})
        self.context = CheckContext(clock=self.clock)
        self.microphone = Microphone(given, self.context)
        self.samples = self.lost = 0
        monkeypatch.setattr("nodes.microphone._driver", lambda: self)
        self.microphone.open()
        self.block_ms, self.zero_ns = self.microphone._block_ms, self.microphone._zero.monotonic_ns

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """All that a driver does beside this says nothing."""
        return lambda *arguments, **more: None

    def query_devices(self, index: int | None = None) -> Any:
        one = {"name": "x", "max_input_channels": 1, "default_samplerate": 16_000.0, "hostapi": 0,
               "default_high_input_latency": 0.035}  # fmt: skip
        return [one] if index is None else one

    def query_hostapis(self, index: int) -> dict[str, Any]:
        return {"name": "ALSA"}

    def RawInputStream(self, *, callback: Any, blocksize: int, **_: Any) -> Device:
        self.callback, self.size = callback, blocksize
        return self

    def take(self, count: int, at_ms: float | None = None, late_ms: float = 0.0) -> None:
        """``count`` blocks are taken from it, all at one moment: 2 ms after the last of them ended, or at ``at_ms``.
        Their ADC times are all wrong by ``late_ms``, and by noise."""
        end_ns = (self.samples + self.lost + count * self.size) * NS // self.rate + 2 * MS
        self.clock.advance((end_ns if at_ms is None else round(at_ms * MS)) - self.clock.now_ns())
        late_s = (late_ms + self.rng.normal(0, 0.15)) / 1000
        for _ in range(count):
            begin_s = (self.samples + self.lost) / self.rate
            times = SimpleNamespace(inputBufferAdcTime=self.zero_ns / NS + begin_s + late_s)
            self.callback(bytes(2 * self.size), self.size, times, None)
            self.samples += self.size

    def handed(self) -> list[int]:
        """How many blocks there are in each list that was handed over and that nobody reads any more."""
        found = []
        while not self.microphone._blocks.empty():
            found.append(len(self.microphone._blocks.get()))
        return found

    def read(self) -> list[Reading]:
        """What the node makes of what was handed over."""
        found: list[Reading] = []
        while not self.microphone._blocks.empty():
            found += self.microphone.read() or []
        return found

    def settle(self, per_moment: int = 1) -> None:
        """Goes on until the next block will be placed."""
        while self.samples < self.rate:
            self.take(per_moment)
            assert self.read() == []
            if self.microphone._clock is not None and self.microphone._clock.settled:
                return
        raise AssertionError("a second of sound is distrusted")


@pytest.mark.parametrize(("per_moment", "settings"), [
    (1, {}), (2, {}), (1, {"gather_ms": 200}), (10, {"gather_ms": 200}), (1, {"block_ms": 10}), (4, {"block_ms": 10}),
    (1, {"block_ms": 100}), (2, {"block_ms": 100}), (4, {"block_ms": 50}), (20, {"block_ms": 10, "gather_ms": 200}),
])  # fmt: skip
def test_two_seconds_of_sound_may_wait_however_it_comes(
    monkeypatch: pytest.MonkeyPatch, per_moment: int, settings: dict[str, Any]
) -> None:
    device = Device(monkeypatch, **settings)
    for _ in range(2):  # what was read makes room
        for _ in range(4000 // (device.block_ms * per_moment)):
            device.take(per_moment)
        kept_ms = sum(device.handed()) * device.block_ms
        assert 2000 <= kept_ms <= 2000 + max(50, per_moment * device.block_ms)


@pytest.mark.parametrize("lost", [800, 3200])
@pytest.mark.parametrize(("per_moment", "settings", "usual_ms", "known_ms", "held_ms"), [
    (2, {}, 40, 120, 120), (1, {"gather_ms": 20}, 20, 120, 120), (1, {}, 20, 120, 120),
    (2, {"gather_ms": 50}, 40, 120, 120), (5, {"gather_ms": 100}, 100, 200, 200),
    (10, {"gather_ms": 200}, 200, 400, 400),
    (4, {"block_ms": 10}, 40, 80, 80), (4, {"block_ms": 50}, 80, 80, 110), (2, {"block_ms": 100}, 120, 120, 140),
])  # fmt: skip
def test_a_loss_is_known_as_soon_where_sound_is_taken_seldom(
    monkeypatch: pytest.MonkeyPatch, per_moment: int, settings: dict[str, Any], usual_ms: int, known_ms: int,
    held_ms: int, lost: int,
) -> None:  # fmt: skip
    """``known_ms``: after so much more sound. The others: so much sound is not yet published at most, usually and after
    a loss."""
    device = Device(monkeypatch, **settings)
    device.settle(per_moment)
    clock = device.microphone._clock
    assert clock is not None
    distrusted, published, held = device.samples, [], {0: 0, lost: 0}
    samples_known, samples_lost = 0, 16 * 8000
    while device.samples < 16 * 16_000:
        if not device.lost and device.samples >= samples_lost:
            device.lost, samples_lost = lost, device.samples
        device.take(per_moment)
        out = sum(len(reading.data) for reading in published)
        held[device.lost] = max(held[device.lost], device.samples - distrusted - out)
        published += device.read()
        samples_known = samples_known or (device.samples if clock.lost else 0)
    assert {samples: most // 16 for samples, most in held.items()} == {0: usual_ms, lost: held_ms}
    assert (samples_known - samples_lost) // 16 == known_ms
    assert abs(clock.lost - lost) <= 8
    gaps = [b.t_capture_ns - a.t_end_ns for a, b in itertools.pairwise(published)]
    assert [round(gap / MS) for gap in gaps if gap > MS] == [lost // 16]


@pytest.mark.parametrize(("per_moment", "gather_ms"), [(2, 40), (10, 200), (5, 100)])
def test_one_moment_alone_proves_no_loss(monkeypatch: pytest.MonkeyPatch, per_moment: int, gather_ms: int) -> None:
    """All stamps of a moment are wrong together, since they rest on one look at the device."""
    device = Device(monkeypatch, gather_ms=gather_ms)
    device.settle(per_moment)
    published: list[Reading] = []
    while device.samples < 16 * 20_000:
        device.take(per_moment, late_ms=30 if 16 * 10_000 <= device.samples < 16 * (10_000 + gather_ms) else 0)
        published += device.read()
    assert device.microphone._clock is not None
    assert device.microphone._clock.lost == 0
    assert max(abs(b.t_capture_ns - a.t_end_ns) for a, b in itertools.pairwise(published)) < MS


def test_blocks_of_one_moment_are_placed_together_unless_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each placing costs a look at the clock's fit; in doubt more of them tell sooner."""
    device = Device(monkeypatch)
    device.settle(2)
    clock = device.microphone._clock
    assert clock is not None
    placings: list[int] = []
    update = clock.update
    monkeypatch.setattr(clock, "update", lambda data, *more: placings.append(len(data)) or update(data, *more))
    for _ in range(200):
        device.take(2)
        device.read()
    assert placings == [640] * 200
    placings.clear()
    device.lost = 800
    for _ in range(20):
        device.take(2)
        device.read()
    assert placings == [320] * 6 + [640] * 17


@pytest.mark.parametrize("rate", [11_025, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("per_moment", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("block_ms", [10, 15, 20, 23, 25, 30, 40, 50, 60, 100, 1000])
def test_a_message_is_handed_over_at_the_end_of_the_moment_in_which_it_is_full(
    monkeypatch: pytest.MonkeyPatch, block_ms: int, per_moment: int, rate: int
) -> None:
    device = Device(monkeypatch, rate, block_ms=block_ms, gather_ms=200)
    device.settle(per_moment)
    message, samples = round(rate * block_ms / 1000), device.samples
    begun = samples
    assert device.microphone._begins == begun  # the first block that is placed begins a moment and a message
    for _ in range(2):
        while device.samples < samples + 3 * message:
            before = (device.samples - begun) // message
            device.take(per_moment)
            assert device.microphone._blocks._lists.qsize() <= 1  # a wake-up a moment at most
            assert len(device.read()) == (device.samples - begun) // message - before
        device.lost += 7  # the driver tells of it: messages begin anew behind it
        device.microphone._count += 7
        while device.samples < samples + 5 * message:
            device.take(per_moment)
            device.read()
        device.samples, device.lost = device.microphone._count, 0
        samples, begun = device.samples, device.microphone._begins


@pytest.mark.parametrize(("per_moment", "block_ms", "handed"), [
    (1, 20, [1, 1, 1, 1, 1, 1]), (2, 20, [2, 2, 2]), (4, 50, [8, 4, 4, 4, 8]), (1, 50, [5, 5, 5]),
    (1, 100, [2, 2, 1, 2, 2, 1]), (2, 100, [2, 2, 2, 2, 2]), (1, 25, [3, 2, 3, 2]), (1, 1000, [2, 2, 2, 2]),
])  # fmt: skip
def test_it_is_woken_for_full_messages_and_for_parts_of_long_ones(
    monkeypatch: pytest.MonkeyPatch, per_moment: int, block_ms: int, handed: list[int]
) -> None:
    device = Device(monkeypatch, block_ms=block_ms)
    device.settle(per_moment)
    device.handed()
    while (device.samples - device.microphone._begins) % device.microphone._message:
        device.take(per_moment)  # up to where a message begins with a moment
        device.read()
    for _ in range(sum(handed) // per_moment):
        device.take(per_moment)
    assert device.handed() == handed


@pytest.mark.parametrize(("api", "gather_ms", "own_s", "asked"), [
    ("ALSA", 40, 0.035, 0.1), ("ALSA", 40, 0.2, 0.2), ("ALSA", 100, 0.035, 0.34), ("ALSA", 20, 0.035, "high"),
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


def test_blocks_of_one_moment_are_handed_over_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block waits for a later moment only where its own brought fewer than one of the two before it, and fewer than
    were recorded since."""
    device = Device(monkeypatch)
    handed = []
    for count, at_ms in [(1, 40), (2, 80), (2, 120), (2, 160), (50, 200), (2, 240), (2, 280), (1, 320), (2, 360),
                         (2, 400), (2, 452), (2, 480), (2, 520), (1, 540), (2, 560)]:  # fmt: skip
        device.take(count, at_ms)
        handed.append(device.handed())
    assert handed == [[1], [1, 1], [2], [2], [2] + 48 * [1], [2], [2], [], [3], [2], [2], [1, 1], [2], [1],
                      [1, 1]]  # fmt: skip


def test_a_late_callback_makes_no_later_block_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks come one by one, two come close together after a delay."""
    device = Device(monkeypatch)
    for at_ms in (20, 40, 60, 80, 112, 120, 140, 160, 192, 193, 200, 220, 240):
        device.take(1, at_ms)
        assert device.handed() == [1]
