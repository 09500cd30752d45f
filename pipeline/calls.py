"""Calls into drivers that may take long or for ever, made so that nobody has to wait for them.

A thread cannot be ended, so a call that does not come back in time goes on; what it gives in the end belongs to whoever
still wants it. A device that takes longer to open than a node may wait is thus open at a later try, and not never.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

UNCLAIMED_S = 10.0
"""What nobody has claimed this long after it came is given back."""


_begun: list[threading.Thread] = []


def leave(status: int) -> None:
    """Ends this process, at once where a call has not come back: a library that is taken down under it crashes."""
    if any(thread.is_alive() for thread in _begun):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def ending_signals() -> list[signal.Signals]:
    """Those that ask a process to end: by Ctrl-C, by another process and, unless it is ignored (`nohup`), by a terminal
    that is closed."""
    hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hung_up]


def setting(event: threading.Event) -> Callable[..., None]:
    """A handler of signals that sets ``event``. To set it takes its lock, and a signal may come while the very thread
    that it interrupts holds that: in the handler of the signal before, say, for a process whose launcher is killed is
    told so once for each of the launcher's threads. So another thread sets it, begun without a lock."""

    def handle(*_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the interpreter ends: nobody is left to be told
            _thread.start_new_thread(event.set, ())

    return handle


class LongCall:
    """``action`` in a thread of its own, begun at once. What it returns is for ``claim``; where nobody does, it is
    handed to ``give_back``."""

    def __init__(
        self,
        action: Callable[[], Any],
        give_back: Callable[[Any], None] = lambda result: None,
        unclaimed_s: float = UNCLAIMED_S,
    ) -> None:
        self.error: Exception | None = None
        """What it raised, once it is over."""
        self._action, self._give_back, self._unclaimed_s = action, give_back, unclaimed_s
        self._result: Any = None
        _begun[:] = [thread for thread in _begun if thread.is_alive()]
        self._over, self._claimed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="driver", daemon=True)
        _begun.append(self._thread)
        self._thread.start()

    def over(self, timeout_s: float) -> bool:
        """Whether it is over, now or within ``timeout_s``."""
        return self._over.wait(timeout_s)

    def claim(self) -> Any:
        """What a call that is over has returned; None if it raised, or if it was claimed or given back before."""
        with self._lock:
            self._claimed.set()
            result, self._result = self._result, None
        return result

    def _run(self) -> None:
        try:
            self._result = self._action()
        except Exception as error:  # drivers raise their own kinds, ValueError and OSError alike
            self.error = error
        self._over.set()
        if self._result is not None and not self._claimed.wait(self._unclaimed_s):
            unwanted = self.claim()
            if unwanted is not None:
                self._give_back(unwanted)
