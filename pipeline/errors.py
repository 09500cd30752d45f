"""The errors of Sensorium, named by whose fault they are.

Every message is one paragraph that says what was found, what was expected and what to do; several that a user should
see at once are one error, a paragraph each. The command line prints the message alone and exits with ``exit_code``;
code that catches one of these either handles it or lets it pass, and never logs and raises both.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class SensoriumError(Exception):
    """Base of all errors that a user can meet. ``exit_code`` is what the command line exits with; ``line`` is that of
    the file that the error is about, 0 if it is about none; ``together`` are the errors that this one stands for."""

    exit_code = 1
    line = 0
    together: tuple[SensoriumError, ...] = ()

    @property
    def parts(self) -> tuple[SensoriumError, ...]:
        """The errors of one paragraph each: those that this one stands for, or itself."""
        return self.together or (self,)


class ConfigError(SensoriumError):
    """The user's fault: a rig, an option or an argument that cannot be carried out."""

    exit_code = 2


class Interrupted(SensoriumError):
    """The user's wish: Ctrl-C in the midst of work that is not done."""

    exit_code = 130  # what a shell says of SIGINT


class SensorError(SensoriumError):
    """A device's fault: absent, unplugged, refused, or answering nonsense."""


class WireError(SensoriumError):
    """A peer's fault: bytes on a socket that are not what the protocol says."""


class RecordingError(SensoriumError):
    """A file's fault: truncated, empty, foreign or contradicting itself."""


class BundleError(SensoriumError):
    """A model's fault: a bundle that is incomplete, damaged, or made for other streams."""


class Together:
    """Checks that do not depend on each other, and what is wrong by them: each within ``with together:``, which notes
    its error and goes on; then ``settled``, which raises all of them as one."""

    def __init__(self) -> None:
        self.found: list[SensoriumError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        if isinstance(error, SensoriumError):
            self.add(error)
        return isinstance(error, SensoriumError)

    def add(self, error: SensoriumError) -> None:
        """Notes what is wrong; what was noted already stands once."""
        known = {str(one) for one in self.found}
        self.found += [part for part in error.parts if not isinstance(part, Noted) and str(part) not in known]

    def settled(self, value: T | None) -> T:
        """``value``, which is there where nothing is wrong. Raises what is wrong."""
        if self.found:
            raise joined(self.found)
        assert value is not None
        return value


class Noted(ConfigError):
    """Something cannot be read because of what has been noted already."""


def joined(errors: Sequence[SensoriumError]) -> SensoriumError:
    """One error that says all of ``errors``, in the order of their lines. It is the user's fault if one of them is."""
    ordered = sorted(errors, key=lambda error: error.line)
    if len(ordered) == 1:
        return ordered[0]
    kind = next((type(error) for error in ordered if isinstance(error, ConfigError)), type(ordered[0]))
    whole = kind("\n".join(map(str, ordered)))
    whole.line, whole.together = ordered[0].line, tuple(ordered)
    return whole


def taken(path: object, what: str = "file") -> ConfigError:
    """That a new ``what`` cannot be at ``path``, where something is."""
    return ConfigError(f"{path} exists already, and is not overwritten; name another {what}, or remove it.")


def typed(path: object) -> str:
    """A path in a command that is to be typed: a shell takes it for one word."""
    return shlex.quote(str(path))


def absent(path: Path, suffix: str | None = None, what: str = "file") -> ConfigError:
    """That there is nothing at ``path``, and which name beside it was meant: of its suffix, or of ``suffix``."""
    wanted = suffix or path.suffix
    beside: list[Path] = []
    with contextlib.suppress(OSError):
        beside = sorted(one for one in path.parent.iterdir() if wanted in ("", one.suffix))
    names = [one.name for one in beside if what != "file" or one.is_file()]
    return ConfigError(f"{path}: there is no such {what}.{nearest(path.name, names)}")


def install(extra: str = "") -> str:
    """What to type for one of our own extras, or for none. ``-e``, as ``make demo`` installs: without it pip makes a
    copy, in which no change of the checkout arrives and no shipped model lies."""
    what = f"'.[{extra}]'" if extra else "."
    return f"Type in the checkout: pip install -e {what}"


def listed(names: Iterable[Any]) -> str:
    """Names as a list in words."""
    return ", ".join(f"`{name}`" for name in names)


def plain(value: float) -> str:
    """A number as people write it, without a power of ten."""
    text = f"{value:.10f}" if abs(value) < 1e-4 else f"{value:.0f}" if abs(value) >= 1e5 else f"{value:.6g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def closest(name: Any, known: Iterable[str]) -> str | None:
    """The name of ``known`` that ``name`` is most like, if one is like it."""
    import difflib  # rarely needed, and every process imports this module

    return next(iter(difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.55)), None)


def nearest(name: Any, known: Iterable[str]) -> str:
    """`` Did you mean …?`` for the nearest of ``known``, or nothing."""
    close = closest(name, known)
    return f" Did you mean `{close}`?" if close else ""
