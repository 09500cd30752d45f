"""The folder of a session: names and addresses of its sockets, its locks, and how leftovers are removed.

A lock belongs to a process, and the system releases it however that process ends. Every process of a session keeps a
shared lock on ``lock``; every publisher an exclusive one on ``<endpoint>.lock``, into which it writes the name of its
shared memory before it makes it. So whatever is unlocked has no owner, and its shared memory can be named.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import shutil
import tempfile
from pathlib import Path

from pipeline.config import wrong_port
from pipeline.errors import ConfigError
from pipeline.shm import remove_segment

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PATH_MAX = 100  # sun_path holds 108 bytes on Linux and 104 on macOS


def check_name(what: str, name: str) -> None:
    """Raises ConfigError unless ``name`` can be a file's and a topic's name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} is called {name!r}; a name has 1 to 64 letters, digits, '_', '-' and '.', and begins with a "
            "letter or a digit"
        )


def endpoint_path(session_dir: Path, name: str) -> str:
    """The ipc endpoint of this name in a session's folder. ConfigError if its path is too long for a socket."""
    check_name("an endpoint", name)
    path = str(Path(session_dir).absolute() / f"{name}.sock")
    if len(path.encode()) > _PATH_MAX:
        raise ConfigError(
            f"the socket {path} has a path of {len(path.encode())} bytes, and a Unix socket allows {_PATH_MAX}: put "
            "the session folder somewhere shorter, such as /tmp or $XDG_RUNTIME_DIR"
        )
    return f"ipc://{path}"


def check_remote(endpoint: str, *, keys: bool) -> None:
    """Raises ConfigError for what is no endpoint, and for one beyond this host without keys."""
    if endpoint.startswith("ipc://"):
        return
    match = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):(\d+|\*)", endpoint)
    if not match:
        meant = f" Did you mean `tcp://{endpoint}`?" if re.fullmatch(r"[\w.-]+:\d+", endpoint, re.ASCII) else ""
        raise ConfigError(
            f"{endpoint!r} is no endpoint; allowed are ipc:///path and tcp://HOST:PORT, like tcp://127.0.0.1:5599."
            f"{meant}"
        )
    if wrong := wrong_port(endpoint):
        raise ConfigError(f"{endpoint}: {wrong}")
    if not keys and not _is_loopback(match[1].strip("[]")):
        raise ConfigError(
            f"{endpoint} can be reached from beyond this host, so it needs CURVE keys and a list of those who may "
            "listen; give it keys (sensorium keys), or use tcp://127.0.0.1:PORT"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def sessions_root() -> Path:
    """The folder of this user's sessions."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK):
        return Path(base) / "sensorium"
    return Path(tempfile.gettempdir()) / f"sensorium-{os.getuid()}"


class FileLock:
    """A lock file that the system releases however its holder ends; ``text`` outlives the holder."""

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        """BlockingIOError if someone else holds it."""
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BaseException:
                os.close(self._fd)
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(self._fd).st_ino:
                    return
            os.close(self._fd)  # a clean-up removed the file between our two calls: make it anew
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def held(self) -> bool:
        return self._fd >= 0

    def read(self) -> str:
        """The text that was written last, by whomever."""
        return os.pread(self._fd, 4096, 0).decode("utf-8", "replace")

    def write(self, text: str) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class SessionFolder:
    """The folder of a session's sockets and locks, mode 0700. Every process of the session keeps it locked, so that
    only what all of them have left is ever removed."""

    def __init__(self, path: Path) -> None:
        """Makes the folder if need be. ConfigError if others could look into it."""
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.stat()
        if info.st_mode & 0o077 or info.st_uid != os.geteuid():
            raise ConfigError(
                f"the session folder {path} has mode {info.st_mode & 0o777:o} and owner {info.st_uid}; it must belong "
                f"to user {os.geteuid()} alone, because whoever can enter it can read the sensors: chmod 700 it"
            )
        try:
            self._lock = FileLock(path / "lock", shared=True)
        except BlockingIOError:
            raise ConfigError(f"the session folder {path} is just being removed: start again") from None

    def close(self, *, remove: bool = False) -> None:
        """Leaves the session; ``remove`` also deletes the folder if no other process is left in it."""
        self._lock.close()
        if remove:
            _remove_session(self.path)


def remove_leftovers(root: Path) -> list[str]:
    """Removes the folders and shared memory of all sessions under ``root`` that have no living process; their names."""
    if not root.is_dir():
        return []
    return [folder.name for folder in sorted(root.iterdir()) if (folder / "lock").is_file() and _remove_session(folder)]


def _remove_session(folder: Path) -> bool:
    try:
        lock = FileLock(folder / "lock")
    except (BlockingIOError, FileNotFoundError):
        return False
    try:
        for file in folder.glob("*.lock"):
            remove_segment(file.read_text("utf-8", "replace"))
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.close()
    return True
