"""Lines of text from a file that grows, from HTTP on loopback, and from a pipe."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from nodes.text import Text, _Server
from pipeline.checks import CheckContext, check_source
from pipeline.clock import SystemClock
from pipeline.errors import ConfigError, SensorError
from pipeline.source import Reading
from pipeline.strict import Document

ROOT = Path(__file__).resolve().parent.parent


def settings(**given: Any) -> Any:
    return Document("{}", "settings").decode(Text.Settings, value=given)


def opened(**given: Any) -> tuple[Text, CheckContext]:
    context = CheckContext(clock=SystemClock())
    source = Text(settings(**given), context)
    source.open()
    return source, context


def read(source: Text, wanted: int, turns: int = 200) -> list[Reading]:
    found: list[Reading] = []
    for _ in range(turns):
        found += source.read()
        if len(found) >= wanted:
            return found
    raise AssertionError(f"{len(found)} lines of {wanted} after {turns} turns")


def lines(found: list[Reading]) -> list[str]:
    return [bytes(reading.data).decode() for reading in found]


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def post(port: int, body: bytes, headers: dict[str, str] | None = None, method: str = "POST") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, "/", body, headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


# -- a file ----------------------------------------------------------------------------------------------------------


def test_a_file_keeps_the_contract_of_a_source(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo\n\nthree\nfour\n")
    got = check_source(Text, {"file": str(path), "from_start": True}, readings=4, lives=1)
    assert lines(got) == ["one", "two", "three", "four"]
    captures = [reading.t_capture_ns for reading in got]
    assert captures == sorted(set(captures))


def test_only_what_is_added_is_read_and_a_line_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"old\nhalf")
    source, context = opened(file=str(path))
    assert source.read() == []
    before = context.clock.now_ns()
    append(path, b" a line\r\n\xc3\xa4nd n")
    (first,) = read(source, 1)
    assert lines([first]) == [" a line"]
    assert first.t_capture_ns - first.uncertainty_ns <= context.clock.now_ns()
    assert first.t_capture_ns >= before
    append(path, b"o more\n")
    assert lines(read(source, 1)) == ["\u00e4nd no more"]
    source.close()


def test_a_line_lies_above_every_promise_that_was_made_before_it(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("")
    source, _ = opened(file=str(path))
    for i in range(5):
        assert source.read() == []
        promise = source.bound_ns()
        append(path, f"line {i}\n".encode())
        (reading,) = read(source, 1)
        assert promise is not None
        assert promise <= reading.t_capture_ns
        assert promise <= reading.t_capture_ns - reading.uncertainty_ns + 1  # it states when it can have been written
    source.close()


def test_promises_grow_while_nothing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("")
    source, context = opened(file=str(path))
    promises = []
    for _ in range(3):
        assert source.read() == []
        promises.append(source.bound_ns())
    source.close()
    assert promises == sorted(set(promises))
    assert promises[-1] <= context.clock.now_ns()


def test_utf16_is_refused_and_the_mark_of_utf8_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbfstop\r\n" + "go\r\non\r\n".encode("utf-16"))
    append(path, b"\0\nend\n")
    source, context = opened(file=str(path), from_start=True)
    assert lines(read(source, 2)) == ["stop", "end"]
    source.close()
    assert context.counted == {"utf8": 3}


def test_the_mark_of_utf8_does_not_count_as_length(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"x" * 10 + b"\r\n\xef\xbb\xbf" + b"y" * 11 + b"\n")
    source, context = opened(file=str(path), from_start=True, max_bytes=10)
    assert lines(read(source, 1)) == ["x" * 10]
    source.close()
    assert context.counted == {"overlong": 1}


def test_what_is_no_utf8_or_too_long_is_refused_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"good\n\xff\xfe\n" + b"x" * 200_000 + b"\nshort\n" + b"y" * 11 + b"\n" + b"z" * 10 + b"\n")
    source, context = opened(file=str(path), from_start=True, max_bytes=10)
    assert lines(read(source, 3)) == ["good", "short", "z" * 10]
    assert context.counted == {"utf8": 1, "overlong": 2}
    source.close()


def test_a_file_that_is_cut_or_replaced_is_read_from_its_new_beginning(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a long line that was there before\n")
    source, _ = opened(file=str(path))
    path.write_text("cut\n")
    assert lines(read(source, 1)) == ["cut"]
    other = tmp_path / "other.txt"
    other.write_text("replaced\n")
    os.replace(other, path)
    assert lines(read(source, 1)) == ["replaced"]
    source.close()


def test_the_last_line_of_a_file_that_is_replaced_needs_no_end(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("")
    source, context = opened(file=str(path))
    append(path, b"one\nno end")
    assert lines(read(source, 1)) == ["one"]
    path.rename(tmp_path / "notes.1")
    append(path, b"two\n")
    assert lines(read(source, 2)) == ["no end", "two"]
    assert context.counted == {}
    source.close()


def test_what_was_added_just_before_a_file_is_replaced_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("")
    source, _ = opened(file=str(path))
    stat = os.stat

    def rotate(asked: Any) -> os.stat_result:  # between two looks of the source
        monkeypatch.setattr(os, "stat", stat)
        append(path, b"last\n")
        path.rename(tmp_path / "notes.1")
        append(path, b"first\n")
        return stat(asked)

    monkeypatch.setattr(os, "stat", rotate)
    assert lines(read(source, 2)) == ["last", "first"]
    source.close()


@pytest.mark.parametrize("anew", [b"other\n", b"and a longer one\n", b"ended\nand more\n"])
def test_a_file_that_is_written_anew_is_read_from_its_beginning_however_long_it_is(tmp_path: Path, anew: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("")
    source, context = opened(file=str(path))
    append(path, b"one\nno")
    assert lines(read(source, 1)) == ["one"]
    path.write_bytes(anew)  # as long as what was read, or longer: its size does not tell
    found = read(source, anew.count(b"\n"))
    assert lines(found) == anew.decode().splitlines()
    assert context.counted == {"cut": 1}
    source.close()


def test_a_file_that_goes_away_is_an_error_and_nothing_is_missed_when_it_returns(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    with pytest.raises(SensorError, match="cannot be opened"):
        opened(file=str(path))
    path.write_text("")
    source, _ = opened(file=str(path))
    append(path, b"one\n")
    assert lines(read(source, 1)) == ["one"]
    path.unlink()
    with pytest.raises(SensorError, match="any more"):
        read(source, 1)
    source.close()
    path.write_text("two\n")
    source.open()
    assert lines(read(source, 1)) == ["two"]
    source.close()
    append(path, b"three\n")  # while it was closed
    source.open()
    assert lines(read(source, 1)) == ["three"]
    source.close()


def test_the_last_line_of_a_file_that_is_removed_needs_no_end(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("")
    source, context = opened(file=str(path))
    append(path, b"one\nno end")
    assert lines(read(source, 1)) == ["one"]
    path.unlink()
    assert lines(read(source, 1)) == ["no end"]
    with pytest.raises(SensorError, match="any more"):
        read(source, 1)
    source.close()
    path.write_text("two\n")
    source.open()
    assert lines(read(source, 1)) == ["two"]
    assert context.counted == {}
    source.close()


def test_what_was_added_just_before_a_file_is_removed_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("")
    source, _ = opened(file=str(path))
    stat = os.stat

    def remove(asked: Any) -> os.stat_result:  # between two looks of the source
        monkeypatch.setattr(os, "stat", stat)
        append(path, b"last\nno end")
        path.unlink()
        return stat(asked)

    monkeypatch.setattr(os, "stat", remove)
    assert lines(read(source, 2)) == ["last", "no end"]
    source.close()


@pytest.mark.parametrize("call", ["pread", "stat"])
def test_a_file_that_cannot_be_read_for_a_while_is_gone_on_with_at_the_beginning_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("")
    source, context = opened(file=str(path))
    append(path, b"one\nhalf ")
    assert lines(read(source, 1)) == ["one"]

    def refuse(*_: Any) -> None:
        raise PermissionError("no")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(SensorError, match="any more"):
            read(source, 1)
    source.close()
    append(path, b"a line\n")
    source.open()
    assert lines(read(source, 1)) == ["half a line"]
    assert context.counted == {}
    source.close()


# -- HTTP ------------------------------------------------------------------------------------------------------------


def test_http_keeps_the_contract_of_a_source() -> None:
    port, stop = free_port(), threading.Event()

    def send() -> None:
        while not stop.wait(0.01):
            try:
                post(port, b"one\ntwo")
            except OSError:  # not yet open, or between two lives
                continue

    sender = threading.Thread(target=send)
    sender.start()
    try:
        got = check_source(Text, {"http": port}, readings=6)
    finally:
        stop.set()
        sender.join()
    assert set(lines(got)) == {"one", "two"}


def test_posts_are_lines_and_the_answer_says_what_became_of_them() -> None:
    port = free_port()
    source, context = opened(http=port, max_bytes=10)
    promise = source.bound_ns()
    assert post(port, "stop\r\n\u00e4\n".encode()) == 204
    assert source.bound_ns() is None  # lines wait to be read
    found = read(source, 2)
    assert lines(found) == ["stop", "\u00e4"]
    assert promise is not None
    assert promise <= found[0].t_capture_ns < found[1].t_capture_ns
    assert source.bound_ns() is not None
    assert post(port, b"\xff") == 400
    assert post(port, b"x" * 11) == 413
    assert post(port, b"here", {"Origin": "http://example.com"}) == 403
    assert post(port, b"", method="GET") == 501
    assert post(port, b"last") == 204
    assert lines(read(source, 1)) == ["last"]
    assert context.counted == {"utf8": 1, "overlong": 1}
    source.close()


@pytest.mark.parametrize(("method", "body", "said"), [
    ("POST", b"fine\nmuch too long\n", "line 2 was left out: it has 13 bytes where `max_bytes` of the rig allows 10"),
    ("POST", b"fine\nmuch too long\nmuch too long\n", "line 2 (and 1 more) was left out: it has 13 bytes"),
    ("POST", b"a\xffb", "line 1 was left out: it is no UTF-8 (byte 0xff at 1)"),
    ("POST", "go".encode("utf-16-le"), "line 1 was left out: it is no UTF-8 (byte 0x00 at 1)"),
    ("POST", b"", "the body has no text; each line"), ("POST", b"\r\n\n", "the body has no text; each line"),
    ("PUT", b"x", "takes a POST and no PUT; each line of a POST's body is a line: curl"), ("HEAD", b"", ""),
])  # fmt: skip
def test_what_is_refused_is_told_why_and_how_it_is_done(method: str, body: bytes, said: str) -> None:
    port = free_port()
    source, _ = opened(http=port, max_bytes=10)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, "/", body)
        answer = connection.getresponse()
        told = answer.read().decode()
    finally:
        connection.close()
        source.close()
    assert answer.status >= 400
    assert told.count("\n") == bool(said)
    assert said in told


def test_a_post_without_a_length_or_of_unreasonable_size_is_refused() -> None:
    port = free_port()
    source, _ = opened(http=port)
    for head, answer in ((b"", b" 411 "), (b"Content-Length: 99999999\r\n", b" 413 ")):
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
            assert answer in client.recv(1000)
    source.close()


@pytest.mark.parametrize(("error", "told"), [(BrokenPipeError("gone"), False), (ValueError("a mistake"), True)])
def test_of_a_client_that_goes_away_no_trace_is_printed(
    error: Exception, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    server: Any = _Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    try:
        raise error
    except (BrokenPipeError, ValueError):
        server.handle_error(None, ("127.0.0.1", 1))
    finally:
        server.server_close()
    assert ("a mistake" in capsys.readouterr().err) == told


def test_a_port_that_is_taken_is_a_sensor_error_and_a_client_that_hangs_does_not_hold_up_the_end() -> None:
    port = free_port()
    source, _ = opened(http=port)
    with pytest.raises(SensorError, match="another port"):
        opened(http=port)
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n")
        source.close()


# -- a pipe ----------------------------------------------------------------------------------------------------------

CHILD = """
import sys
from nodes.text import Text
from pipeline.checks import CheckContext
source = Text(Text.Settings(stdin=True), CheckContext())
source.open()
while True:
    try:
        for reading in source.read():
            print(bytes(reading.data).decode(), flush=True)
    except EOFError:
        break
"""
PARENT = (
    "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], stdin=subprocess.DEVNULL, check=True)"
)


def test_what_is_piped_into_the_program_that_started_the_node_is_read_to_its_end() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"one\n"
        process.stdin.write(b"two\nthree")
        process.stdin.close()
        assert process.stdout.read() == b"two\nthree\n"
        assert process.wait(30) == 0


@pytest.mark.parametrize("given_settings", [{}, {"http": 8765, "stdin": True}, {"file": "x", "http": 8765}])
def test_settings_name_exactly_one_input(given_settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        settings(**given_settings)


def test_only_a_file_has_a_start() -> None:
    with pytest.raises(ConfigError, match="from_start"):
        settings(http=8765, from_start=True)
