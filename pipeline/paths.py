"""Files and folders that a user names: the rig meant, a recording that is there, a place for a new one, the bundle that
ran."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, absent, closest, taken, typed
from pipeline.outside import naming
from pipeline.strict import listed, nearest

if TYPE_CHECKING:
    from pipeline.recording import SessionInfo

HOUSE = Path(__file__).resolve().parent.parent
"""The checkout: the shipped rigs are in its ``configs``, the shipped bundles in its ``models``."""


MOST_NAMED = 12
"""Of the rigs in a folder."""


def find_rig(name: str | None) -> Path:
    """The rig file that ``name`` means: a path, or the name of a file in ``configs`` here or in the checkout. Raises
    ConfigError, which says which rigs there are."""
    rigs = _rigs()
    if name is None:
        raise ConfigError(f"name a rig, which is one YAML file. {_known(rigs)}")
    path = Path(name)
    stem = path.name.removesuffix(".yaml")
    if not name:
        raise ConfigError(f"the rig's name is empty; name one YAML file. {_known(rigs)}")
    if path.suffix == ".mcap":
        raise ConfigError(f"{name} is a recording, not a rig; to predict it again type: sensorium replay {typed(name)}")
    if path.is_dir():
        raise ConfigError(f"{name} is a folder; a rig is one YAML file. {_known(rigs, path)}")
    if path.exists():  # a pipe, too
        return path
    if name in (stem, f"configs/{stem}.yaml") and stem in rigs:
        return rigs[stem]
    own = {file.stem: file for file in _rigs_in(path.parent)}
    close = closest(stem, own)
    meant = f" Did you mean `{own[close]}`?" if close else nearest(stem, rigs)
    raise ConfigError(f"{name}: there is no such file.{meant} {_known(rigs, path.parent)}")


def _rigs() -> dict[str, Path]:
    folders = (HOUSE / "configs", Path("configs"))  # those here come last, and so hide shipped ones of the same name
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def _rigs_in(folder: Path) -> list[Path]:
    """The files in a folder that look like rigs; none where it cannot be read."""
    found = []
    with suppress(OSError):
        for file in sorted(folder.iterdir()):
            if file.suffix in (".yaml", ".yml") and file.is_file():
                with suppress(OSError, UnicodeDecodeError):
                    if re.search(r"^sources\s*:", file.read_text(encoding="utf-8"), re.MULTILINE):
                        found.append(file)
    return found


def _known(rigs: dict[str, Path], folder: Path | None = None) -> str:
    """The rigs that could be meant, those in ``folder`` first."""
    own = _rigs_in(folder) if folder is not None else []
    seen = {file.resolve() for file in own}
    named = [*own[:MOST_NAMED], *(file for file in rigs.values() if file.resolve() not in seen)]
    more = f" And {len(own) - MOST_NAMED} more are in {folder}." if len(own) > MOST_NAMED else ""
    return f"There are {listed(map(str, named))}.{more}" if named else "There is none in a folder `configs` here."


def new_file(path: Path, what: str = "file") -> Path:
    """``path``, absolute, if a ``what`` can be written there that destroys nothing. Raises ConfigError."""
    if what == "file" and path.is_dir():  # which nobody should be told to remove
        raise ConfigError(f"{path} is a folder; name a new file in it.")
    if path.exists() and not (path.is_file() or path.is_dir()):  # nor this
        raise ConfigError(f"{path} is a pipe or a device; name a new {what}.")
    if path.exists():
        raise taken(path, what)
    if not path.resolve().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent} to write into.")
    return path.resolve()


def new_name(text: str) -> Path:
    """``text`` as the path of a recording to be made. Raises ConfigError for one that ends as folders do, which a path
    forgets, or as other files than recordings."""
    from pipeline.config import wrong_suffix

    if text.endswith("/"):
        raise ConfigError(f"{text} names a folder, and a recording is a file; name one in it, like {text}session.mcap")
    if wrong := wrong_suffix(text):
        raise ConfigError(f"{text}: {wrong}.")
    return Path(text)


def write_whole(path: Path, text: str) -> None:
    """Writes ``text`` to ``path``, where it is whole or not at all. An OSError names ``path``."""
    part = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class NewFile:
    """A file that is written bit by bit, and has its name only once it is whole: of what fails nothing stays. OSErrors
    of its own name it. Use it in a ``with`` block."""

    def __init__(self, path: Path) -> None:
        self.path, self._part = path, path.with_name(path.name + ".tmp")
        with naming(path):
            self.file = self._part.open("wb")

    def end(self, interrupted: bool = False) -> Path:
        """The file is whole; or it was ``interrupted``, and is called ``.part`` for that. Where it is."""
        place = self.path.with_name(self.path.name + ".part") if interrupted else self.path
        with naming(self.path):
            self.file.close()
            self._part.replace(place)
        return place

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with suppress(OSError):  # what finds no room now was told of when it was written
            self.file.close()
        with suppress(OSError):
            self._part.unlink()


def existing(path: Path) -> Path:
    """``path`` of a recording, if there is such a file. Raises ConfigError, which says what else it is."""
    if path.is_dir():
        raise ConfigError(f"{path} is {_folder(path)}")
    if path.suffix in (".yaml", ".yml") and path.is_file():
        raise ConfigError(f"{path} is a rig and no recording; to run it type: sensorium run {typed(path)}")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is a pipe or a device, and a recording is a file; write it to one first.")
    if path.is_symlink() and not path.is_file():
        there = os.readlink(path)
        raise ConfigError(f"{path} is a link to what is not there, {there}; mend it, or name the recording.")
    if not path.is_file():
        raise absent(path)
    return path


def _folder(path: Path) -> str:
    """What a folder is that was named in place of a recording, and what to do with it."""
    if (path / "model.yaml").is_file():
        return f"a bundle and no recording; to predict with it type: sensorium replay RECORDING --bundle {typed(path)}"
    inside = sorted(path.glob("*.mcap"))
    if not inside:
        return "a folder without recordings; a recording is one MCAP file, such as `sensorium record` makes."
    return f"a folder with {len(inside)} recording{'s' * (len(inside) > 1)}; name one, like {inside[-1]}"


def own_bundle(recording: Path, info: SessionInfo) -> Path:
    """The bundle that ran when the session was recorded, if it is a shipped one. Raises ConfigError."""
    shipped = sorted(file.parent for file in (HOUSE / "models").glob("*/model.yaml"))
    for folder in shipped:
        if hashlib.sha256((folder / "model.yaml").read_bytes()).hexdigest() == info.bundle:
            return folder
    ran = f"ran a bundle that is not among the shipped ones (SHA-256 {info.bundle})" if info.bundle else "ran no bundle"
    raise ConfigError(
        f"{recording}: its session {ran}, so name one: --bundle PATH. Shipped are {listed(map(str, shipped))}."
    )
