"""Processes that share work: fresh interpreters, since a forked one would inherit threads of inference engines and
renderers that do not run in it. They end at once on Ctrl-C, whatever it reached, and with the process that began them,
however that ends.
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
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event

from pipeline.errors import SensoriumError


@contextmanager
def workers(number: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes; when the block is left, work that has not begun is dropped and what has is waited for, but not
    if the block is interrupted. They begin by importing the main module: a script must keep its work under ``if
    __name__ == "__main__"``. SensoriumError if it does not, or if one of them is ended from outside."""
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    told, teller = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(number, context, initializer=_begin, initargs=(begun, told))
    try:
        yield pool
    except (KeyboardInterrupt, GeneratorExit):
        teller.close()  # whoever sends a signal to this process alone does not want to wait for the others either
        raise
    except BrokenProcessPool:
        if not begun.is_set():
            raise SensoriumError(
                "no other process could begin to share the work: it imports the script that was started, which must "
                'be a file and keep its own work under `if __name__ == "__main__":`. Write that line, or say `jobs=1`'
            ) from None
        raise SensoriumError(
            f"one of the {number} processes that shared the work was ended from outside; if nobody did that, memory "
            "ran out. Try again with fewer at a time (`--jobs`)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        teller.close()
        told.close()


def _begin(begun: Event, told: Connection) -> None:
    """Of a worker. It would otherwise take its next task after a Ctrl-C, and wait for ever if nobody is left to give it
    one."""
    begun.set()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(told,), daemon=True).start()


def _end_with_parent(told: Connection) -> None:
    """Ends this process when its parent closes its end of the pipe, or ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel, told])
        os._exit(1)
