"""A serial port that wakes its reader once for many bytes.

pyserial opens it and sets it up. Reading is done here: the kernel itself can wait until so many bytes are there
(termios' VMIN, which ``select`` heeds), so that a sensor's sample costs no wake-up of its own and is still received at
the moment at which the last byte that was waited for came.
"""

from __future__ import annotations

import os
import select
import termios
from typing import Any

_MOST = 255  # VMIN is one byte
_CHUNK = 4096
_HANDED = 64
"""Of a terminal that is not to block, Linux hands out so many bytes at a time, whatever is asked for."""


class SerialPort:
    """See above. Raises OSError (pyserial's own errors are of that kind too) where the port fails."""

    def __init__(self, path: str, baud: int) -> None:
        import serial

        self._port = serial.Serial(path, baud, timeout=0)
        self._least = 0
        self._port.reset_input_buffer()  # what waited there is of unknown age

    def read(self, least: int, seconds: float) -> bytes:
        """What has come, once that is ``least`` bytes or ``seconds`` are over."""
        fd = self._port.fd
        if fd is None:
            raise OSError("it was closed")
        least = min(max(least, 1), _MOST)
        if least != self._least:
            self._wake_at(fd, least)
        ready = select.select([fd], [], [], seconds)[0]
        data = b""
        try:
            while part := os.read(fd, _CHUNK):
                data += part
                if len(part) < _HANDED or len(data) >= _CHUNK:
                    break
        except BlockingIOError:
            return data
        if ready and not data:
            raise OSError("it hung up")
        return data

    def close(self) -> None:
        """Idempotent; never raises."""
        self._port.close()

    def _wake_at(self, fd: int, least: int) -> None:
        try:
            settings: list[Any] = termios.tcgetattr(fd)
            settings[6][termios.VMIN], settings[6][termios.VTIME] = least, 0
            termios.tcsetattr(fd, termios.TCSANOW, settings)
        except termios.error as error:
            raise OSError(*error.args) from error
        self._least = least
