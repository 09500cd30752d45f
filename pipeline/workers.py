"""Processes that share work: fresh interpreters, since a forked one would inherit threads of inference engines and
renderers that do not run in it. They end at once on Ctrl-C, and with the process that began them, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from pipeline.errors import SensoriumError


@contextmanager
def workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes; when the block is left, work that has not begun is dropped and what has is waited for. They
    begin by importing the main module: a script must keep its work under ``if __name__ == "__main__"``. SensoriumError
    if one of them is ended from outside."""
    pool = ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BrokenProcessPool:
        raise SensoriumError(
            f"one of the {number} processes that shared the work was ended from outside; if nobody did that, memory "
            "ran out. Try again with fewer at a time (`--jobs`)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Of a worker. It would otherwise take its next task after a Ctrl-C, and wait for ever if nobody is left to give it
    one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
