"""Any outlet of the Lab Streaming Layer as a signal: EEG, heart rate, eye trackers, hundreds of devices.

    sources:
      eeg:   {kind: lsl, type: EEG}
      heart: {kind: lsl, name: Polar H10, channels: [ECG]}
      gaze:  {kind: lsl, source_id: tobii-123}

Needs the extra ``lsl`` (pylsl). A sample's time is the outlet's own stamp, brought to this host by the layer's clock
correction (round trips, measured anew in the background), whose stated uncertainty goes into every message. Changes of
the correction are slewed; an outlet that comes back, or whose clock jumps, opens an epoch.
"""

from __future__ import annotations

import contextlib
import ctypes
from math import ceil
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np

from pipeline.errors import SensorError, install
from pipeline.messages import Payload, SignalLayout, signal_dtype
from pipeline.source import Found, Pace, Reading, Search, Source, SourceContext
from pipeline.timebase import SLEW_PPM

_NS, _MS = 1_000_000_000, 1_000_000
_PATIENCE_S = 0.05
_RESOLVE_S = 1.0
_CORRECTION_S = 3.0
_REFRESH_NS = _NS
_JUMP_NS = 4 * _MS
_FOREIGN_NS = 3600 * _NS
_BUFFER_S = 10
_AT_ONCE = 4096
_LATEST_S = 9e9
"""No stamp is later: in ns it would not fit 64 bits."""


def _layer() -> tuple[Any, Any]:
    """The Lab Streaming Layer: the package and its library. Raises SensorError."""
    try:
        import pylsl
        from pylsl.lib import lib
    except (ImportError, RuntimeError, OSError) as error:
        raise SensorError(
            f"the Lab Streaming Layer is not usable: {error}. {install('lsl')}"
        ) from error
    return pylsl, lib


def _found(info: Any, text: bool) -> Found:
    """An outlet as `sensorium devices` shows it."""
    shown = f"{info.name()}  type {info.type()}  on {info.hostname()}"
    if text:
        return Found(name=shown, detail="carries text (markers), no numbers")
    rate = info.nominal_srate()
    known = {"source_id": info.source_id()} if info.source_id() else {"name": info.name(), "type": info.type()}
    detail = f"{info.channel_count()} channels, {f'{rate:g} Hz' if rate else 'irregular'}"
    return Found(name=shown, detail=detail, settings={key: value for key, value in known.items() if value})


class Lsl(Source):
    """A stream of the Lab Streaming Layer."""

    payload: ClassVar[Payload] = "signal"

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """The outlet, by any of ``name``, ``type`` and ``source_id``; ``channels`` are those to take (all if left out).
        A regular stream that says nothing for ``silence_ms`` is lost; an irregular one may be silent."""

        name: str | None = None
        type: str | None = None
        source_id: str | None = None
        channels: tuple[str, ...] | None = None
        batch_ms: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 10.0
        silence_ms: Annotated[int, msgspec.Meta(ge=100)] = 3000

        def __post_init__(self) -> None:
            given = [v for v in (self.name, self.type, self.source_id) if v is not None]
            if not given:
                raise ValueError("say which stream: `name`, `type` or `source_id`, for example `type: EEG`")
            if any("'" in value and '"' in value for value in given):
                raise ValueError("`name`, `type` and `source_id` may hold ' or \", but not both in one")
            if self.channels is not None and (not self.channels or len(set(self.channels)) < len(self.channels)):
                raise ValueError("`channels` names at least one channel, and each once")

    def __init__(self, settings: Any, context: SourceContext) -> None:
        super().__init__(settings, context)
        self._inlet: Any = None

    # -- opening -------------------------------------------------------------------------------------------------------

    @classmethod
    def pace(cls, settings: Any) -> Pace:
        return Pace.of(None, settings.batch_ms, "batch_ms")

    @classmethod
    def discover(cls) -> list[Search]:
        where = f"streams of the Lab Streaming Layer in this network, for {_RESOLVE_S:g} s"
        try:
            pylsl, lib = _layer()
        except SensorError as error:
            return [Search(looked_for=where, trouble=str(error))]
        if hasattr(lib, "lsl_set_config_content"):
            lib.lsl_set_config_content(b"[log]\nlevel = -2\n")  # else it says on standard error that it has started
        infos = pylsl.resolve_streams(_RESOLVE_S)
        return [Search(looked_for=where, found=[_found(info, info.channel_format() == pylsl.cf_string)
                                                for info in infos])]  # fmt: skip

    def open(self) -> None:
        self.close()
        pylsl, lib = _layer()
        self._pylsl, self._lib = pylsl, lib
        found = self._resolve()
        # The layer would reconnect by itself and hide it; a stream that was away has begun anew.
        self._inlet = pylsl.StreamInlet(found, max_buflen=_BUFFER_S, recover=False, as_numpy=True)
        try:
            self._choose(self._inlet.info(timeout=_CORRECTION_S))
            self._session_ns = self._session_offset()
            self._target_ns, self._doubt_ns = self._correction(_CORRECTION_S)
        except (self._pylsl.util.LostError, TimeoutError, RuntimeError) as error:
            self.close()
            raise SensorError(f"{self._wanted()} was found, but does not answer: {error}") from error
        except SensorError:
            self.close()
            raise
        self._shown_ns = self._target_ns
        self._fresh_ns = self._heard_ns = self.context.clock.now_ns()
        self._last_ns: int | None = None
        self._new_epoch = False

    def _resolve(self) -> Any:
        asked = {"name": self.settings.name, "type": self.settings.type, "source_id": self.settings.source_id}
        terms = [f"{key}={_quoted(value)}" for key, value in asked.items() if value is not None]
        found = self._pylsl.resolve_bypred(" and ".join(terms), 1, _RESOLVE_S)
        if not found:
            raise SensorError(
                f"{self._wanted()} is not there. Is its program running, in this network, and does the firewall let "
                "the layer through (UDP 16571, TCP and UDP 16572-16604)?"
            )
        if len({info.uid() for info in found}) > 1:
            listed = "; ".join(f"name {i.name()}, type {i.type()}, source_id {i.source_id()}" for i in found)
            raise SensorError(f"{self._wanted()} is there {len(found)} times: {listed}. Add what tells them apart.")
        if found[0].channel_format() == self._pylsl.cf_string:
            raise SensorError(f"{self._wanted()} carries text (markers), no numbers; name a stream of numbers.")
        return found[0]

    def _wanted(self) -> str:
        asked = {"name": self.settings.name, "type": self.settings.type, "source_id": self.settings.source_id}
        return "the LSL stream with " + " and ".join(f"{k} `{v}`" for k, v in asked.items() if v is not None)

    def _choose(self, info: Any) -> None:
        """Names of channels, which of them to take, and how many samples to wait for."""
        labels = info.get_channel_labels() or []
        names: list[str] = []
        for i in range(info.channel_count()):
            label = (labels[i] if i < len(labels) else None) or f"ch{i + 1}"
            names.append(label if label not in names else f"{label}_{i + 1}")
        self._names = self.settings.channels or tuple(names)
        absent = [name for name in self._names if name not in names]
        if absent:
            raise SensorError(f"{self._wanted()} has no channel {', '.join(absent)}; it has {', '.join(names)}.")
        self._columns = [names.index(name) for name in self._names]
        self._rate_hz = info.nominal_srate()
        self._least = min(max(1, round(self._rate_hz * self.settings.batch_ms / 1000)), _AT_ONCE)

    # -- clocks --------------------------------------------------------------------------------------------------------

    def _session_offset(self) -> int:
        """Session time less the layer's local clock, in ns: the two count alike, so once is enough."""
        best: tuple[int, int] | None = None
        for _ in range(20):
            before = self.context.clock.now_ns()
            local = round(self._pylsl.local_clock() * 1e9)
            after = self.context.clock.now_ns()
            if best is None or after - before < best[0]:
                best = (after - before, (before + after) // 2 - local)
        assert best is not None
        return best[1]

    def _correction(self, timeout_s: float) -> tuple[int, int]:
        """What to add to the outlet's stamps to have the local clock, and how sure that is, in ns."""
        remote, doubt, code = ctypes.c_double(), ctypes.c_double(), ctypes.c_int()
        self._lib.lsl_time_correction_ex.restype = ctypes.c_double
        offset = self._lib.lsl_time_correction_ex(
            self._inlet.obj, ctypes.byref(remote), ctypes.byref(doubt), ctypes.c_double(timeout_s), ctypes.byref(code)
        )
        self._pylsl.util.handle_error(code)
        return round(offset * 1e9), ceil(doubt.value * 1e9)

    def _steer(self, now: int) -> None:
        """Follows the correction, slewing; a jump of the outlet's clock opens an epoch."""
        passed, self._fresh_ns = now - self._fresh_ns, now
        self._target_ns, self._doubt_ns = self._correction(0.0)
        off, limit = self._target_ns - self._shown_ns, passed * SLEW_PPM // 1_000_000
        if abs(off) > _JUMP_NS or self._inlet.was_clock_reset():
            self._shown_ns, self._new_epoch = self._target_ns, True
        else:
            self._shown_ns += min(max(off, -limit), limit)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self) -> Reading | None:
        if self._inlet is None:
            raise SensorError("the LSL stream was read before it was opened; open it first.")
        try:
            values, stamps = self._inlet.pull_chunk(timeout=_PATIENCE_S, min_samples=self._least, max_samples=_AT_ONCE)
            now = self.context.clock.now_ns()
            if now - self._fresh_ns > _REFRESH_NS:
                self._steer(now)
        except (self._pylsl.util.LostError, TimeoutError, RuntimeError) as error:
            raise SensorError(f"{self._wanted()} went away: {error} It is waited for.") from error
        if not len(stamps):
            if self._rate_hz > 0 and now - self._heard_ns > self.settings.silence_ms * _MS:
                raise SensorError(
                    f"{self._wanted()} sent nothing for {self.settings.silence_ms} ms, though it is regular."
                )
            return None
        self._heard_ns = now
        return self._stamped(np.asarray(values), np.asarray(stamps, np.float64), now)

    def _stamped(self, values: np.ndarray[Any, Any], stamps: np.ndarray[Any, Any], now: int) -> Reading | None:
        """The samples whose stamp is a time; an outlet may send any number."""
        timed = np.abs(stamps) < _LATEST_S  # not true of NaN
        if not timed.all():
            self.context.count("malformed", int((~timed).sum()))
            values, stamps = values[timed], stamps[timed]
        return self._reading(values, stamps, now) if len(stamps) else None

    def _reading(self, values: np.ndarray[Any, Any], stamps: np.ndarray[Any, Any], now: int) -> Reading:
        first = round(float(stamps[0]) * 1e9)
        times = first + np.round((stamps - stamps[0]) * 1e9).astype(np.int64) + self._shown_ns + self._session_ns
        if abs(int(times[0]) - now) > _FOREIGN_NS:
            raise SensorError(
                f"{self._wanted()} stamps its samples on a clock that is not the layer's: they lie "
                f"{(int(times[0]) - now) / 1e9:.0f} s from now. Let its program push samples without stamps, or with "
                "stamps of lsl_local_clock()."
            )
        new_epoch, self._new_epoch = self._new_epoch, False
        honest = times
        if self._last_ns is not None and int(times[0]) < self._last_ns - _NS:
            new_epoch = True  # the stamps went back: no jitter does that
        elif self._last_ns is not None and not new_epoch:
            times = np.maximum(times, self._last_ns + 1)
        times = np.maximum.accumulate(times)
        # Stamps that chunks of samples share or cross are put in order, and what that moved them is said.
        moved = int((times - honest).max()) + abs(self._target_ns - self._shown_ns)
        self._last_ns = int(times[-1])
        data = np.empty(len(times), signal_dtype(len(self._names)))
        data["offset_ns"] = times - times[0]
        data["value"] = values[:, self._columns]
        return Reading(layout=SignalLayout(len(times), self._names), data=data, t_capture_ns=int(times[0]),
                       t_end_ns=self._last_ns, t_receipt_ns=now, t_device_ns=first,
                       uncertainty_ns=self._doubt_ns + moved, new_epoch=new_epoch)  # fmt: skip

    def close(self) -> None:
        inlet, self._inlet = self._inlet, None
        if inlet is not None:
            with contextlib.suppress(Exception):  # a library that fails here has nothing left to give back
                inlet.close_stream()


def _quoted(value: str) -> str:
    return f"'{value}'" if "'" not in value else f'"{value}"'
