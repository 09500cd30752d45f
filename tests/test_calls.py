"""Calls that may take long: nobody waits for them, and nothing of what they give is lost or left open."""

from __future__ import annotations

import subprocess
import sys
import threading

from pipeline.calls import LongCall, setting

SOON_S = 20.0


def test_what_comes_late_is_there_for_who_claims_it() -> None:
    go = threading.Event()
    call = LongCall(lambda: go.wait(SOON_S) and "stream")
    assert not call.over(0.0)
    go.set()
    assert call.over(SOON_S)
    assert (call.claim(), call.claim(), call.error) == ("stream", None, None)


def test_what_nobody_claims_is_given_back_once() -> None:
    given: list[str] = []
    done = threading.Event()

    def give_back(result: str) -> None:
        given.append(result)
        done.set()

    call = LongCall(lambda: "stream", give_back, unclaimed_s=0.0)
    assert done.wait(SOON_S)
    assert (given, call.claim()) == (["stream"], None)


def test_an_error_is_kept_for_who_asks() -> None:
    def fail() -> None:
        raise OSError("gone")

    call = LongCall(fail)
    assert call.over(SOON_S)
    assert isinstance(call.error, OSError)
    assert call.claim() is None


def test_a_process_leaves_under_a_call_that_does_not_come_back() -> None:
    code = (
        "import threading; from pipeline.calls import LongCall, leave;"
        "call = LongCall(threading.Event().wait); assert not call.over(0.0); print('left'); leave(4)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (4, "left\n")


def test_a_signal_that_comes_while_the_lock_is_held_waits_for_nobody() -> None:
    """As where a second one interrupts the handler of the first."""
    stop = threading.Event()
    with stop._cond:  # type: ignore[attr-defined]
        setting(stop)(15, None)
    assert stop.wait(SOON_S)
