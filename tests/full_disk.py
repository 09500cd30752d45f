"""A disk that has little room, for whatever this process writes."""

from __future__ import annotations

import errno
import os
import stat
from types import SimpleNamespace
from typing import Any

import pytest


class Disk:
    """Takes ``free`` more bytes of regular files, and says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.error = 1 << 40, errno.ENOSPC
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "fstatvfs", self.room)

    def write(self, fd: int, data: Any) -> int:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            data = memoryview(data)[: self.free] if len(data) else data
            if not len(data) and not self.free:
                raise OSError(self.error, os.strerror(self.error))
            self.free -= len(data)
        return self._write(fd, data)

    def room(self, fd: int) -> Any:
        return SimpleNamespace(f_bavail=self.free, f_frsize=1, f_files=0, f_favail=0)
