"""A microphone, or any other sound input that PortAudio knows.

    sources:
      microphone: {kind: microphone}                                         # the system's default input
      room:       {kind: microphone, device: USB, channels: 2, rate_hz: 48000}

``device`` is a part of the name that `sensorium devices` shows, or its number. PortAudio's thread hands over blocks of
10 to 20 ms; each is placed by the fit of the sample count against ADC time (``pipeline.soundblocks``), never by when it
arrived. The clock that ADC times are meant on is found out at the first block, and a step of the wall clock is
followed. Where the device lacks the rate or the number of channels it is opened with its own and the sound is converted
here: band-limited, or mixed to mono.

A device that is unplugged ends its stream without an error, and a sound server that hangs says nothing at all, so the
age of the last block decides. PortAudio lists devices once; it is started anew at each opening, so that a device that
returned is seen. Calls that a hung server could block for ever run in a thread of their own, with a limit; where one
takes longer to open a device than that, the device is there at a later try.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from itertools import pairwise
from math import ceil
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np

from pipeline.calls import LongCall
from pipeline.clock import Clock, wall_ahead_ns
from pipeline.errors import SensorError
from pipeline.hosttime import Domain, domain_of, host_zero
from pipeline.messages import AudioLayout, Payload
from pipeline.soundblocks import Block, BlockClock, Converter, Regroup, mix
from pipeline.source import Found, Pace, Reading, Search, Source, SourceContext

_MS, _NS = 1_000_000, 1_000_000_000
_WAIT_S = 0.05
_SILENT_NS = 1_000 * _MS
"""A stream that delivers nothing for this long hangs; sound comes every 20 ms at least."""
_DRIVER_S = 3.0
_QUEUE_S = 2.0
"""What of sound may wait at least; a node that was stopped for longer loses the rest, which is counted."""
_MOST_KEPT_MS = 50
"""Of a longer message parts of this length are handed over already, or what comes at one moment, if that is more."""
_MOST_PIECES = 5
"""Of blocks handed over together, in doubt: the clock is sure of a loss after six, and no moment decides alone."""
_MOST_GATHERED_MS, _MORE_GATHERED_MS = 50, (100, 200)
"""What may gather. Through PulseAudio a period is 20, 40, 50, 100 or 150 ms, whatever is asked for; where our blocks do
not fill it PortAudio's ADC times jump to and fro by 10 ms and more (found with 60, 80, 120 and 160 at 8 to 48 kHz)."""
_STEP_NS = 2 * _MS
_MOST_CHANNELS = 8
_PCM = np.dtype("<i2")


class _Raw(msgspec.Struct, frozen=True, gc=False):
    """What a callback got: the number of the block's first sample, PortAudio's ADC time, the receipt."""

    data: bytes
    number: int
    adc_s: float
    t_receipt_ns: int


class _Waiting:
    """Blocks on their way from PortAudio's thread to the node. Each of the two numbers is written by one thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lists: queue.SimpleQueue[list[_Raw]] = queue.SimpleQueue()
        self._put = self._got = 0

    def put(self, raws: list[_Raw]) -> None:
        """Adds blocks; where ``most`` wait already these are lost: the clock sees the gap."""
        if self._put - self._got < self._most:
            self._put += len(raws)
            self._lists.put(raws)

    def get(self, timeout: float | None = None) -> list[_Raw]:
        """Raises queue.Empty."""
        raws = self._lists.get(timeout=timeout)
        self._got += len(raws)
        return raws

    def empty(self) -> bool:
        return self._lists.empty()


def _driver() -> Any:
    """The module that drives sound. Raises SensorError."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise SensorError(
            f"the sound driver cannot be loaded: {error}. It needs the package `sounddevice` and the library "
            "PortAudio (Debian, Ubuntu: apt-get install libportaudio2)."
        ) from error
    return sounddevice


def _found(index: int, device: Any, names: list[str]) -> Found:
    """A sound input as `sensorium devices` shows it: by its name, where no other has that too."""
    name, channels = device["name"], device["max_input_channels"]
    detail = f"{channels} channel{'s' * (channels > 1)}, {device['default_samplerate']:g} Hz by default"
    return Found(name=f"{index}  {name}", detail=detail, settings={"device": name if names.count(name) == 1 else index})


def _driver_ms(block_ms: int) -> int:
    """The length of the driver's blocks for messages of ``block_ms``: 20 ms where that comes out even. Shorter ones
    only come in pairs at the same moment: PortAudio looks at a device every 20 ms or so."""
    return block_ms if block_ms <= 20 else 20 if block_ms % 20 == 0 else 10


def _joined(raws: list[_Raw]) -> _Raw:
    if len(raws) == 1:
        return raws[0]
    return _Raw(b"".join([raw.data for raw in raws]), raws[0].number, raws[0].adc_s, raws[-1].t_receipt_ns)


def _wall_ns(clock: Clock) -> int:
    """How far the wall clock is ahead of the monotonic one."""
    zero = host_zero(clock)
    return zero.unix_ns - zero.monotonic_ns


def _give_up(stream: Any) -> None:
    """Ends a stream. A device that is gone refuses both calls; the stream is given up either way."""
    stream.abort(ignore_errors=True)
    stream.close(ignore_errors=True)


def _find(driver: Any, wanted: int | str | None) -> int:
    """The index of the device that is asked for. Raises SensorError."""
    inputs = {i: d["name"] for i, d in enumerate(driver.query_devices()) if d["max_input_channels"] > 0}
    here = ", ".join(f"{i}: {name}" for i, name in inputs.items())
    if not inputs:
        raise SensorError("there is no sound input here at all. Is it plugged in, and its sound server running?")
    if wanted is None:
        default = driver.default.device[0]
        if default in inputs:
            return int(default)
        raise SensorError(f"there is no default sound input; here are {here}.")
    if isinstance(wanted, int):
        if wanted in inputs:
            return wanted
        raise SensorError(f"sound device {wanted} is no input or is not here; here are {here}.")
    exact = [i for i, name in inputs.items() if name == wanted]
    found = exact or [i for i, name in inputs.items() if wanted.lower() in name.lower()]
    if len(found) == 1 or exact:
        return found[0]
    if not found:
        raise SensorError(f"no sound input has `{wanted}` in its name; here are {here}.")
    many = ", ".join(inputs[i] for i in found)
    raise SensorError(f"`{wanted}` is in the names of several sound inputs: {many}. Give more of the name.")


class Microphone(Source):
    """One sound input, 16-bit PCM."""

    payload: ClassVar[Payload] = "audio"

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """``block_ms`` is the length of a message. ``gather_ms``: so much sound may gather in the device until it is
        taken, all at once (on ALSA; elsewhere the system decides), 10 to 50, 100 or 200; 20 brings every second message
        20 ms sooner and costs more CPU. Lost samples are known within 120 ms, or two such times if that is more.
        ``delay_ms``: a constant delay between the air and the ADC time that you have measured (nobody else can know
        it); it is taken off all times."""

        device: int | str | None = None
        rate_hz: Annotated[int, msgspec.Meta(ge=4000, le=192_000)] = 16_000
        channels: Annotated[int, msgspec.Meta(ge=1, le=8)] = 1
        block_ms: Annotated[int, msgspec.Meta(ge=10, le=1000)] = 20
        gather_ms: Annotated[int, msgspec.Meta(ge=10, le=200)] = 40
        delay_ms: Annotated[float, msgspec.Meta(ge=-1000, le=1000)] = 0.0

        def __post_init__(self) -> None:
            if self.gather_ms > _MOST_GATHERED_MS and self.gather_ms not in _MORE_GATHERED_MS:
                raise ValueError(
                    f"`gather_ms: {self.gather_ms}` is not to be had: PortAudio states ADC times then that are 10 to "
                    f"30 ms off. Allowed are 10 to {_MOST_GATHERED_MS}, {' and '.join(map(str, _MORE_GATHERED_MS))}"
                )

    def __init__(self, settings: Any, context: SourceContext) -> None:
        super().__init__(settings, context)
        self._block_ms = _driver_ms(settings.block_ms)
        self._gathered = max(settings.gather_ms // self._block_ms, 1)
        self._blocks = self._queue()
        self._delay_ns = round(settings.delay_ms * _MS)
        self._layout = AudioLayout(settings.rate_hz, settings.channels, 0)
        self._finished = threading.Event()
        self._stream: Any = None
        self._opening: LongCall | None = None  # these two: a call that has not come back
        self._closing: LongCall | None = None

    @classmethod
    def pace(cls, settings: Any) -> Pace:
        pace = Pace.of(settings.rate_hz, settings.block_ms, "block_ms")
        if settings.gather_ms <= settings.block_ms:
            return pace
        return msgspec.structs.replace(pace, gather_ns=settings.gather_ms * 1e6, sooner="lower `gather_ms`")

    @classmethod
    def discover(cls) -> list[Search]:
        where = "sound inputs (PortAudio)"
        try:
            devices = list(_driver().query_devices())
        except SensorError as error:
            return [Search(looked_for=where, trouble=str(error))]
        inputs = {i: device for i, device in enumerate(devices) if device["max_input_channels"] > 0}
        names = [device["name"] for device in inputs.values()]
        return [Search(looked_for=where, found=[_found(i, device, names) for i, device in inputs.items()])]

    @classmethod
    def absence(cls, settings: Any) -> str:
        try:
            _find(_driver(), settings.device)
        except SensorError as error:
            return str(error)
        return ""

    def open(self) -> None:
        driver = _driver()
        if self._closing is not None and not self._closing.over(_WAIT_S):
            raise SensorError("the sound system hangs: a call has not come back; it is tried again when it has.")
        limit_s = _WAIT_S
        if self._opening is None:
            self.close()
            # Each stream has a queue of its own, so that a late callback of the last one is not heard in this one.
            self._blocks, self._finished = self._queue(), threading.Event()
            self._count = self._counted = self._begins = 0
            self._zero = host_zero(self.context.clock)
            self._domain: Domain | None = None
            self._clock: BlockClock | None = None
            self._end_ns = 0
            limit_s = _DRIVER_S
            self._opening = LongCall(lambda: self._start(driver), _give_up)
        if not self._opening.over(limit_s):
            raise SensorError("the sound input does not answer: it is being opened, and that takes long.")
        self._stream = self._opened(self._opening)
        while not self._blocks.empty():  # of a device that was open before anybody wanted it
            self._blocks.get()
        self._last_ns = self.context.clock.now_ns()

    def read(self) -> list[Reading] | None:
        try:
            raw = self._blocks.get(timeout=_WAIT_S)
        except queue.Empty:
            self._check_alive()
            return None
        self._last_ns = raw[-1].t_receipt_ns
        readings: list[Reading] = []
        items = self._even(raw)
        for item in items:
            self._take(item, item is not items[-1], readings)
        self._count_losses()
        return readings

    def close(self) -> None:
        """A device that is just being opened is left to that: it is claimed by the next ``open``, or given up."""
        stream, self._stream = self._stream, None
        if stream is not None:
            self._closing = LongCall(lambda: _give_up(stream))
            self._closing.over(_DRIVER_S)

    def _queue(self) -> _Waiting:
        return _Waiting(ceil(_QUEUE_S * 1000 / self._block_ms))

    # -- PortAudio ---------------------------------------------------------------------------------------------------

    def _start(self, driver: Any) -> Any:
        """Opens and starts the stream. Runs in a thread of its own."""
        blocks, finished = self._blocks, self._finished
        driver._terminate()
        driver._initialize()
        index = _find(driver, self.settings.device)
        info = driver.query_devices(index)
        rate, channels = self._format(driver, index, info)
        self._rate, self._channels, self._block = rate, channels, round(rate * self._block_ms / 1000)
        self._message = round(rate * self.settings.block_ms / 1000)
        stream = driver.RawInputStream(
            samplerate=rate, channels=channels, dtype="int16", device=index, blocksize=self._block,
            latency=self._latency(driver, info), callback=self._callback(blocks), finished_callback=finished.set,
        )  # fmt: skip
        stream.start()
        return stream

    def _latency(self, driver: Any, info: Any) -> float | str:
        """What PortAudio is to be asked for, so that it looks at the device once for so many blocks: on ALSA it makes
        its buffer of that and one block more, in four parts of whole blocks. Elsewhere its own choice."""
        if self._gathered == 1 or driver.query_hostapis(info["hostapi"])["name"] != "ALSA":
            return "high"
        wanted_s: float = (4 * self._gathered - 3) * self._block_ms / 1000
        own_s: float = info["default_high_input_latency"]
        return max(wanted_s, own_s)

    def _opened(self, call: LongCall) -> Any:
        """The stream that a call has opened. Raises SensorError."""
        self._opening, error = None, call.error
        if isinstance(error, SensorError):
            raise error
        if error is not None:
            raise SensorError(f"the sound input fails at opening it: {error}. Is it plugged in, and its sound server "
                              "running?") from error  # fmt: skip
        stream = call.claim()
        if stream is None:
            raise SensorError("the sound input was opened too late, and is opened again.")
        return stream

    def _format(self, driver: Any, index: int, info: Any) -> tuple[int, int]:
        """The rate and the channels to open it with: those asked for, or else as few changes as it takes."""
        settings = self.settings
        most = min(info["max_input_channels"], _MOST_CHANNELS)
        if settings.channels > most:
            raise SensorError(
                f"the sound input {info['name']} has {most} channels where the rig asks for {settings.channels}; "
                f"set `channels: {most}` or fewer."
            )
        own = round(info["default_samplerate"])
        trouble: Exception | None = None
        for rate, channels in dict.fromkeys(
            [(settings.rate_hz, settings.channels), (settings.rate_hz, most), (own, settings.channels), (own, most)]
        ):
            try:
                driver.check_input_settings(device=index, channels=channels, dtype="int16", samplerate=rate)
            except driver.PortAudioError as error:
                trouble = trouble or error
            else:
                return rate, channels
        raise SensorError(
            f"the sound input {info['name']} can be opened neither at {settings.rate_hz} Hz nor at its own {own} Hz: "
            f"{trouble}. Another program may use it, or its sound server is down."
        )

    def _callback(self, blocks: _Waiting) -> Callable[[Any, int, Any, Any], None]:
        """Keeps blocks until a message is full and no more will come at the same moment, and only then wakes the node:
        each wake-up costs more than the work it is for. As many are expected at a moment as came at one of the two
        before it, but no more than have been recorded since."""
        clock, gathered, message, block_ns = self.context.clock, self._gathered, self._message, self._block_ms * _MS
        most = _MOST_KEPT_MS // self._block_ms
        expected, came, before, last_ns = 1, 0, 0, clock.now_ns()
        kept: list[_Raw] = []
        full = False

        def take(data: Any, frames: int, times: Any, status: Any) -> None:
            nonlocal kept, full, expected, came, before, last_ns
            now = clock.now_ns()
            if blocks is not self._blocks:
                return
            apart = now - last_ns
            if apart > block_ns // 2:
                expected = min(max(came, before), gathered, (apart + block_ns // 2) // block_ns)
                came, before = 0, came
            last_ns, came = now, came + 1
            number, self._count = self._count, self._count + frames
            kept.append(_Raw(bytes(data), number, times.inputBufferAdcTime, now))
            full = full or (number - self._begins) % message + frames >= message
            if came >= expected and (full or len(kept) >= most):
                blocks.put(kept)
                kept, full = [], False

        return take

    def _check_alive(self) -> None:
        if self._finished.is_set():
            raise SensorError("the sound input ended: unplugged, or its sound server was stopped.")
        silent = self.context.clock.now_ns() - self._last_ns
        if silent > _SILENT_NS:
            raise SensorError(f"the sound input hangs: it is open, but nothing came for {silent / _NS:.1f} s.")

    # -- from blocks to readings ---------------------------------------------------------------------------------------

    def _even(self, raws: list[_Raw]) -> list[_Raw]:
        """Blocks as one, where the clock expects the first of them and their stamps show that nothing is missing
        between them. In doubt they stay apart, since the clock needs several to be sure; only of more than
        ``_MOST_PIECES`` some are joined."""
        first = raws[0]
        if len(raws) == 1 or self._clock is None or not self._clock.settled:
            return raws
        length_s, most = self._block_ms / 1000, len(raws)
        gaps = [b.number != a.number + self._block or abs(b.adc_s - a.adc_s - length_s) > _STEP_NS / _NS
                for a, b in pairwise(raws)]  # fmt: skip
        if any(gaps) or not self._clock.expects(self._adc_ns(round(first.adc_s * _NS)), first.number):
            most = -(-len(raws) // _MOST_PIECES)
        pieces = [[first]]
        for gap, raw in zip(gaps, raws[1:], strict=True):
            if gap or len(pieces[-1]) == most:
                pieces.append([])
            pieces[-1].append(raw)
        return [_joined(piece) for piece in pieces]

    def _take(self, raw: _Raw, more: bool, readings: list[Reading]) -> None:
        """Adds the readings that are complete with this block. ``more``: others were handed over with
        it and follow."""
        frame = 2 * self._channels
        data: np.ndarray[Any, Any] = np.ndarray((len(raw.data) // frame, self._channels), _PCM, raw.data)
        if self._clock is None:
            self._begin(raw)
        assert self._clock is not None
        stamp = round(raw.adc_s * _NS)
        device = None if self._domain is None else stamp
        settled = self._clock.settled
        blocks = self._clock.update(data, self._adc_ns(stamp), device, raw.t_receipt_ns, raw.number, more)
        for block in blocks:
            for group in self._regroup.update(block):
                converted = self._convert(group)
                if converted is not None:
                    readings.append(self._reading(converted))
        if blocks or not settled:  # what comes back ends with this block
            self._begins = raw.number + len(data) - self._regroup.waiting

    def _begin(self, raw: _Raw) -> None:
        """What the first block shows: the clock of ADC times."""
        self._domain = domain_of(round(raw.adc_s * _NS), raw.t_receipt_ns, self._zero)
        self._wall_ns = _wall_ns(self.context.clock)
        self._clock = BlockClock(self._rate, self._domain is not None)
        self._regroup = Regroup(self._message)
        same = self._rate == self.settings.rate_hz
        self._converter = None if same else Converter(self._rate, self.settings.rate_hz, self.settings.channels)

    def _adc_ns(self, stamp_ns: int) -> int | None:
        """A block's ADC time on the session clock."""
        if self._domain is None:
            return None
        if self._domain == "monotonic":
            return stamp_ns - self._zero.monotonic_ns
        if abs(wall_ahead_ns() - self._wall_ns) > _STEP_NS:  # a step, or this process was stopped between two readings
            self._wall_ns = _wall_ns(self.context.clock)
        return stamp_ns - self._wall_ns - self._zero.monotonic_ns

    def _convert(self, block: Block) -> Block | None:
        if block.data.shape[1] != self.settings.channels:
            block = msgspec.structs.replace(block, data=mix(block.data, self.settings.channels))
        return block if self._converter is None else self._converter.update(block)

    def _reading(self, block: Block) -> Reading:
        delay = self._delay_ns
        begin = block.t_capture_ns - delay
        if not block.new_epoch:  # a correction of the clock may move a gap's end by less than a sample
            begin = max(begin, self._end_ns)
        self._end_ns = max(block.t_end_ns - delay, begin + 1)
        samples = len(block.data)
        if samples != self._layout.samples:
            self._layout = AudioLayout(self.settings.rate_hz, self.settings.channels, samples)
        return Reading(
            layout=self._layout, data=np.ascontiguousarray(block.data), t_capture_ns=begin, t_end_ns=self._end_ns,
            t_receipt_ns=block.t_receipt_ns, t_device_ns=block.t_device_ns, uncertainty_ns=block.uncertainty_ns,
            new_epoch=block.new_epoch,
        )  # fmt: skip

    def _count_losses(self) -> None:
        if self._clock is not None and (lost := self._clock.lost) > self._counted:
            self.context.count("lost_samples", lost - self._counted)
            self._counted = lost
