"""The errors of Sensorium, named by whose fault they are.

Every message is one paragraph that says what was found, what was expected and what to do. The command line prints the
message alone and exits with ``exit_code``; code that catches one of these either handles it or lets it pass, and never
logs and raises both.
"""

from collections.abc import Iterable
from typing import Any


class SensoriumError(Exception):
    """Base of all errors that a user can meet. ``exit_code`` is what the command line exits with."""

    exit_code = 1


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


def install(extra: str = "") -> str:
    """What to type for one of our own extras, or for none. ``-e``, as ``make demo`` installs: without it pip makes a
    copy, in which no change of the checkout arrives and no shipped model lies."""
    what = f"'.[{extra}]'" if extra else "."
    return f"Type in the checkout: pip install -e {what}"


def listed(names: Iterable[Any]) -> str:
    """Names as a list in words."""
    return ", ".join(f"`{name}`" for name in names)


def nearest(name: Any, known: Iterable[str]) -> str:
    """`` Did you mean …?`` for the nearest of ``known``, or nothing."""
    import difflib  # rarely needed, and every process imports this module

    close = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.55)
    return f" Did you mean `{close[0]}`?" if close else ""
