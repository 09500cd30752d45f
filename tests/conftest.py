"""What every test may ask for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.conservation import conserved

__all__ = ["ROOT", "conserved", "shared_data"]

# Here, and not in pyproject.toml, which pytest refuses where a user's own tests run without pytest-timeout.
os.environ.setdefault("PYTEST_TIMEOUT", "120")

# A shell that starts something in the background has it ignore Ctrl-C, and so all that it starts: tests that press
# Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent

# Two slow cores under load must not turn a property test into a test of the machine's speed.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


# Of the slow ones these take minutes each, and begin first: the last to end would else be one of them, alone.
LONGEST = ("test_readme.py", "test_tutorial.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, in whatever order: what is wrong is told sooner."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, item.path.name not in LONGEST))


@pytest.fixture(autouse=True)
def signals_as_a_shell_leaves_them() -> None:
    """PulseAudio's plugin for ALSA blocks SIGPIPE in whatever thread asks for the sound devices, and for good, and what
    is started later inherits that: `| head` would end it by an error instead of a signal."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For whoever trains: several tests run at a time, and torch's threads would wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real recordings by other people's sensors, which are never committed."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real recordings are not here: no folder {folder.name!r} in a folder 'shared' beside the checkout")
    return folder
