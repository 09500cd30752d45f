"""Processes that share work end with whoever began them, and say so when one of them is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from pipeline.errors import SensoriumError
from pipeline.workers import workers

PARENT = """
import sys
from tests.test_workers import hold
from pipeline.workers import workers
if __name__ == "__main__":
    with workers(1) as pool:
        pool.submit(hold, sys.argv[1]).result()
"""


def square(value: int) -> int:
    return value * value


def end_yourself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold(fifo: str) -> None:
    """Opens the pipe, says so, and keeps it open for as long as this process lives."""
    with open(fifo, "w") as file:
        file.write("here\n")
        file.flush()
        signal.pause()


def test_work_is_shared_and_what_has_not_begun_is_dropped() -> None:
    with workers(2) as pool:
        assert list(pool.map(square, range(20))) == [i * i for i in range(20)]
        many = [pool.submit(square, i) for i in range(1000)]
    assert any(one.cancelled() for one in many)
    assert all(one.cancelled() or one.result() == i * i for i, one in enumerate(many))


def test_a_worker_that_is_ended_is_one_clear_error() -> None:
    with (
        pytest.raises(SensoriumError, match="ended from outside; if nobody did that, memory ran out"),
        workers(1) as pool,
    ):
        pool.submit(end_yourself).result()


def test_a_script_that_works_when_it_is_imported_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PARENT.replace('if __name__ == "__main__":', "if True:"))
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, str(script), "-"], env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert 'keep its own work under `if __name__ == "__main__":`' in ran.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a named pipe")
def test_workers_do_not_outlive_who_began_them(tmp_path: Path) -> None:
    """The pipe is closed when the last that holds it is gone, so that reading comes to its end."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    root = Path(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, str(script), str(fifo)], env=os.environ | {"PYTHONPATH": str(root)})
    try:
        with fifo.open() as file:
            assert file.readline() == "here\n"
            parent.kill()
            assert file.read() == ""
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a named pipe")
def test_an_interrupt_of_this_process_alone_does_not_wait_for_what_has_begun(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def interrupted() -> Generator[Future[None], None, None]:
        with workers(1) as pool:
            yield pool.submit(hold, str(fifo))

    work = interrupted()
    held = next(work)
    with fifo.open() as file:
        assert file.readline() == "here\n"
        with pytest.raises(KeyboardInterrupt):
            work.throw(KeyboardInterrupt)
        assert file.read() == ""
    assert isinstance(held.exception(), BrokenProcessPool)
