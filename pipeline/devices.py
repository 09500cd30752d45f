"""What is on this machine: every kind of source looks for its devices, and each is shown as a rig would name it.

Looking changes nothing: nothing is written to a bus, no setting is made, no port is opened that a device could notice.
A driver that hangs or fails is one sentence, and the others are shown all the same.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import SensoriumError
from pipeline.source import KINDS, Found, Search, load_kind

LIMIT_S = 8.0
_PORTS = ("ttyUSB*", "ttyACM*", "ttyAMA*", "ttyTHS*")
_PLAIN = re.compile(r"/?[A-Za-z][\w./-]*", re.ASCII)
_NO_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
"""What YAML reads as no string."""


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A device that was found. ``config`` is its line under ``sources`` of a rig; null if it cannot be a source."""

    name: str
    detail: str
    settings: dict[str, Any] | None
    stream: str | None
    config: str | None


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One place where one kind of source looked. ``trouble`` says why it could not look there, "" if it could."""

    kind: str
    looked_for: str
    trouble: str = ""
    devices: tuple[Device, ...] = ()


def look(kinds: Mapping[str, str] = KINDS, limit_s: float = LIMIT_S) -> list[Place]:
    """All places where ``kinds`` look. Streams' names are unique over all of them, so that all lines fit one rig."""
    runs = [(kind, *_started(kind, target)) for kind, target in kinds.items()]
    taken: set[str] = set()
    places = []
    for kind, thread, searches in runs:
        thread.join(limit_s)
        if thread.is_alive():
            searches = [Search(looked_for="devices", trouble=f"its driver does not answer within {limit_s:g} s.")]
        places += [_place(kind, search, taken) for search in searches]
    return places


def _started(kind: str, target: str) -> tuple[threading.Thread, list[Search]]:
    """The thread in which a kind looks, and the list that it fills at its end."""
    result: list[Search] = []

    def run() -> None:
        try:
            discover = getattr(load_kind(target), "discover", None)
            result.extend(discover() if discover is not None else ())
        except SensoriumError as error:
            result.append(Search(looked_for="devices", trouble=str(error)))
        except Exception as error:  # a driver may fail in any way; the other kinds are shown all the same
            said = " ".join(f"{type(error).__name__}: {error}".split())
            result.append(Search(looked_for="devices", trouble=f"its driver fails: {said}"))

    thread = threading.Thread(target=run, name=f"look-{kind}", daemon=True)
    thread.start()
    return thread, result


def absences(sources: Mapping[str, tuple[type[Any], Any]], limit_s: float = LIMIT_S) -> list[str]:
    """What is not here of the devices that a rig's sources name, in sentences. ``sources``: by name their class and its
    settings. A driver that hangs is one of them."""
    runs = {name: _asked(*source) for name, source in sources.items() if hasattr(source[0], "absence")}
    said = []
    for name, (thread, answers) in runs.items():
        thread.join(limit_s)
        answer = f"its driver does not answer within {limit_s:g} s." if thread.is_alive() else "".join(answers)
        said += [f"{name} will be waited for: {answer}"] if answer else []
    return said


def _asked(source_class: type[Any], settings: Any) -> tuple[threading.Thread, list[str]]:
    answers: list[str] = []

    def run() -> None:
        try:
            answers.append(source_class.absence(settings))
        except Exception as error:  # a driver may fail in any way; the others are looked for all the same
            answers.append(" ".join(f"its driver fails: {type(error).__name__}: {error}".split()))

    thread = threading.Thread(target=run, name=f"ask-{source_class.__name__}", daemon=True)
    thread.start()
    return thread, answers


def _place(kind: str, search: Search, taken: set[str]) -> Place:
    devices = tuple(_device(kind, found, taken) for found in search.found)
    return Place(kind=kind, looked_for=search.looked_for, trouble=search.trouble, devices=devices)


def _device(kind: str, found: Found, taken: set[str]) -> Device:
    stream = config = None
    if found.settings is not None:
        stream = next(n for n in (kind, *(f"{kind}{i}" for i in range(2, 10_000))) if n not in taken)
        taken.add(stream)
        config = f"{stream}: {flow({'kind': kind} | found.settings)}"
    return Device(name=found.name, detail=found.detail, settings=found.settings, stream=stream, config=config)


def flow(settings: Mapping[str, Any]) -> str:
    """``settings`` as YAML on one line."""
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in settings.items()) + "}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NO_WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


# -- for sources -------------------------------------------------------------------------------------------------------


def refusal(path: Path, group: str) -> str:
    """Why the user may not open the device at ``path``, as a line of ``detail``; "" if they may."""
    if os.access(path, os.R_OK | os.W_OK):
        return ""
    if not os.path.exists(path):  # which a closed folder makes no error
        return f"{path} is not there; in a container it must be passed in"
    return f"you may not open it; join its group: sudo usermod -aG {group} $USER, and log in again"


def port_trouble(path: str, error: Exception) -> str:
    """Why the serial port at ``path`` could not be opened, and what to do, in words that follow "cannot be opened: ".
    ``error`` is what its driver said, where nothing plainer can be."""
    if not os.path.exists(path):
        here = ", ".join(str(port) for port, _, _ in serial_ports()) or "none"
        return f"it is not here; serial ports here: {here}. Is it plugged in?"
    if refused := refusal(Path(path), "dialout"):
        return f"{refused}."
    return f"{error}. Another program may use it, or it is no serial port."


def read_line(path: Path) -> str:
    """The text of one of sysfs' small files, "" if it is not there."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def serial_ports(sys: Path = Path("/sys"), dev: Path = Path("/dev")) -> list[tuple[Path, str, str]]:
    """The serial ports on USB and on the board: path (the one that stays the same if there is one), what the adapter
    calls itself, and why it may not be opened ("" if it may)."""
    stable = {link.resolve(): link for link in sorted((dev / "serial/by-id").glob("*"))}
    found = []
    for folder in sorted(folder for pattern in _PORTS for folder in (sys / "class/tty").glob(pattern)):
        path = dev / folder.name
        usb = _usb(folder)
        about = "" if usb is None else f"{read_line(usb / 'manufacturer')} {read_line(usb / 'product')}".strip()
        found.append((stable.get(path.resolve(), path), about, refusal(path, "dialout")))
    return found


def polling_ns(port: Path | str, sys: Path = Path("/sys")) -> int:
    """For how long bytes may wait in the USB adapter of a serial port until they are fetched: as its driver says (an
    FTDI's, usually 16 ms), or one frame of USB; 0 for a port that is on none. A sensor whose period has a simple ratio
    to that waits equally long each time, so that no fit can tell it from the way that bytes take."""
    folder = sys / "class/tty" / Path(port).resolve().name
    if _usb(folder) is None:
        return 0
    told = read_line(folder / "device/latency_timer")
    return max(int(told) if told.isdecimal() else 1, 1) * 1_000_000


def _usb(folder: Path) -> Path | None:
    """The USB device that a terminal in sysfs belongs to; None if it is on no USB."""
    near = (folder / "device").resolve()
    return next((p for p in (near, *list(near.parents)[:3]) if (p / "idVendor").exists()), None)
