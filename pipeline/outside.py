"""What the machine refuses, in words: files that nobody may write, disks that are full, standard output that is closed
or has no sign for what is to be shown."""

from __future__ import annotations

import codecs
import errno
import fcntl
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, SensoriumError

_ASKED = {
    errno.EACCES: "permission denied. Name another place, or change the permissions of this one.",
    errno.EPERM: "permission denied. Name another place, or change the permissions of this one.",
    errno.EROFS: "nothing can be written there, for the file system is read-only. Name another place.",
    errno.ENAMETOOLONG: "the name is too long for the file system. Choose a shorter one.",
    errno.ELOOP: "its symbolic links lead round in a circle. Mend them, or name another place.",
    errno.ENOTDIR: "a part of this path is a file and no folder. Name another place.",
    errno.EISDIR: "this is a folder where a file is needed. Name a file.",
    errno.ENOENT: "there is no such file or folder, or no longer. Look at the path, and repeat the command.",
    errno.EEXIST: "this exists already. Name another place, or remove it.",
}
"""What is to be said of an error that another path would have spared the user."""
_FULL = {
    errno.ENOSPC: "no space is left on its disk. Make room, or name a place on another disk.",
    errno.EDQUOT: "the quota of disk space is used up. Make room, or name a place on another disk.",
    errno.EFBIG: "the file would be larger than is allowed here (`ulimit -f`, or its file system).",
    errno.EIO: "its disk or device failed. What the kernel says of it (`dmesg`) tells more; name a place on another.",
}
"""What is to be said of a disk, of which an error in the midst of a file does not name the file."""


def explained(error: OSError) -> SensoriumError | None:
    """What the machine refused; None for an error that names no file, and may be anybody's."""
    code = error.errno or 0
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return SensoriumError(f"a file could not be read or written: {_FULL[code]}") if code in _FULL else None
    path = os.fsdecode(error.filename)
    if code in _ASKED:
        return ConfigError(f"{path}: {_ASKED[code]}")
    return SensoriumError(f"{path}: {_FULL.get(code) or _reason(error)}")


@contextmanager
def naming(path: os.PathLike[str] | str) -> Iterator[None]:
    """Within it an OSError that names no file (a full disk, met by a file that is open already) gets the name
    ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def uncreatable(path: Path, folder: bool = False) -> str:
    """Why no file, or no ``folder`` with files in it, can be made at ``path``, in words; nothing if one can, or is
    there already. Tried, with a file that is removed at once, because permissions alone do not tell."""
    if os.path.lexists(path) and not os.path.exists(path):
        return "it is a link to what is not there"
    there = next((place for place in (path, *path.parents) if os.path.exists(place)), path)
    if there == path and not (folder and os.path.isdir(path)):
        return f"{path} is no folder" if folder else ""
    if not os.path.isdir(there):
        return f"{there} is no folder"
    probe = path if there == path.parent and not folder else there / f".sensorium-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.unlink(probe)
    except OSError as error:
        return str(error.strerror)
    return ""


def _reason(error: OSError) -> str:
    return f"{error.strerror or error}. Mend that, or name another place."


# -- standard streams --------------------------------------------------------------------------------------------------

_PLAIN = str.maketrans(dict.fromkeys("–—−‐", "-") | dict.fromkeys("█▉▊▋▌", "#") | dict.fromkeys("▍▎▏", " ")
                       | {"…": ".", "·": ".", "±": "~", "×": "x", "→": ">", "≥": ">", "≤": "<", "“": '"', "”": '"',
                          "’": "'", "━": "-", "╸": "-", "╺": "-", "─": "-", "│": "|"}
                       | {chr(spinner): "." for spinner in range(0x2800, 0x2900)})  # fmt: skip
"""What stands for a sign that an encoding does not have: one for one, so that tables stay in line."""


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(sign if sign.isascii() else "?" for sign in text), error.end


class _Output(FileIO):
    """Standard output, which remembers that it could not be written: an error in the midst of a file names none, and
    Python throws away what it could not write."""

    lost: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.lost = error
            raise


def ready_streams() -> None:
    """Makes standard output and error take whatever is shown: where one is closed nobody sees it, and a sign that its
    encoding does not have is replaced."""
    codecs.register_error("sensorium.plain", _in_plain)
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = FileIO(_nowhere(number), mode, closefd=False)
            setattr(sys, name, TextIOWrapper(null, encoding="utf-8", write_through=True))
    out = sys.stdout
    if type(out) is TextIOWrapper and type(_raw(out)) is FileIO:
        out.flush()
        raw = _Output(out.fileno(), "wb", closefd=False)
        sys.stdout = TextIOWrapper(
            raw if isinstance(out.buffer, FileIO) else BufferedWriter(raw),
            encoding=out.encoding, line_buffering=out.line_buffering, write_through=out.write_through,
        )  # fmt: skip
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="sensorium.plain")


def _raw(stream: Any) -> Any:
    """The file below a stream, which has no buffer before it if Python runs unbuffered."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _nowhere(number: int) -> int:
    """A descriptor of the null device: ``number``, if that is free, lest something else becomes standard output."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(null, number)
        os.close(null)
        return number
    if null == number:
        os.set_inheritable(null, True)
    return null


def lost_output() -> OSError | None:
    """Why standard output could not take what was written to it; None if it could. What it has not taken is thrown
    away."""
    raw = _raw(sys.stdout)
    lost = raw.lost if isinstance(raw, _Output) else None
    try:
        sys.stdout.flush()
    except OSError as error:
        lost = lost or error
    if lost is not None:
        discard_output()
        if isinstance(raw, _Output):
            raw.lost = None
    return lost


def discard_output() -> None:
    """Throws away what Python still holds back for standard output, and all that comes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def untaken() -> list[int]:
    """Those of the descriptors of standard output and error that take nothing now: a terminal that is stopped, a pipe
    that nobody reads."""
    return [number for number in (1, 2) if not _takes(number)]


def unread() -> list[int]:
    """How many bytes lie before whoever reads standard output and error, of each; -1 where that cannot be told. One
    who reads a long line slowly makes it less long before the next can be written."""
    return [_unread(number) for number in (1, 2)]


def discard_untaken(numbers: Iterable[int], threads: Iterable[threading.Thread]) -> None:
    """Throws away all that is and will be written to these descriptors, and frees ``threads``, which wait until
    somebody takes it. For the main thread."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number in numbers:
        os.dup2(null, number)
    os.close(null)
    # A write that a signal interrupts is tried again, by then on the null device.
    before = signal.signal(signal.SIGURG, lambda *_: None)
    try:
        for thread in threads:
            if thread.ident is not None and thread.is_alive():
                signal.pthread_kill(thread.ident, signal.SIGURG)
    finally:
        signal.signal(signal.SIGURG, before)


def started_again(numbers: Iterable[int]) -> bool:
    """Starts those of these descriptors that are a terminal that Ctrl-S has stopped: the shell does so, too, before its
    next prompt. Whether there may be one among them."""
    found = False
    for number in numbers:
        with suppress(OSError, termios.error):
            settings = termios.tcgetattr(number)
            if not settings[0] & termios.IXON or os.tcgetpgrp(number) != os.getpgrp():
                continue  # from the background it would stop this process
            termios.tcsetattr(number, termios.TCSANOW, [settings[0] & ~termios.IXON, *settings[1:]])
            termios.tcsetattr(number, termios.TCSANOW, settings)
            found = True
    return found


def _takes(number: int) -> bool:
    try:
        return bool(select.select([], [number], [], 0)[1])
    except OSError:
        return True


def _unread(number: int) -> int:
    for asked in (termios.TIOCOUTQ, termios.FIONREAD):  # of a terminal or a socket; of a pipe
        with suppress(OSError):
            return int.from_bytes(fcntl.ioctl(number, asked, bytes(4)), sys.byteorder)
    return -1


def unwritable(error: OSError) -> str:
    """That standard output cannot be written, and why."""
    why = {errno.ENOSPC: "no space is left on its disk", errno.EDQUOT: "the quota of disk space is used up"}
    said = why.get(error.errno or 0, error.strerror or str(error))
    return f"standard output cannot be written: {said}. Make room, or send it to another place."
