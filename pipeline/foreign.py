"""The Python code of a bundle: which may run, and how it is found.

An encoder ``python: module:Class`` runs with the user's rights, so a bundle that has one loads only with
``allow_code``, or from the shipped set: the ``models`` folder of the checkout that this very file belongs to, after
symbolic links are resolved. Whoever can write there can change the pipeline as well, so that a list of trusted digests
would protect nothing more. ``module`` is a file ``module.py`` of the bundle (then under its digests), or an installed
module.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import BundleError, install, listed
from pipeline.modelfile import MODEL_FILE, PYTHON, BundleStream

SHIPPED = Path(__file__).resolve().parent.parent / "models"


def load_experts(
    folder: Path, streams: dict[str, BundleStream], files: dict[str, bytes], allow_code: bool
) -> dict[str, type[Any]]:
    """The classes of the streams that are encoded by Python code. Raises BundleError."""
    python = {name: stream.encoder[len(PYTHON) :].strip() for name, stream in streams.items() if stream.is_python}
    if python and not allow_code and not folder.is_relative_to(SHIPPED):
        copied = "" if SHIPPED.is_dir() else f" (This Sensorium is a copy, which has none. {install()})"
        raise BundleError(
            f"{folder}: the encoder of {listed(python)} is Python code, which would run with your rights; such a "
            f"bundle loads by itself only from {SHIPPED}{copied}. If you trust it, allow its code (`--allow-code`, or "
            "`allow_code: true` in the rig)."
        )
    return {name: _expert(folder, name, target, files) for name, target in python.items()}


def _expert(folder: Path, stream: str, target: str, files: dict[str, bytes]) -> type[Any]:
    where = f"{folder / MODEL_FILE}, streams.{stream}.encoder"
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", target):
        raise BundleError(f"{where}: found `{PYTHON} {target}`, expected `{PYTHON} module:Class`.")
    module_name, class_name = target.split(":")
    own = module_name.replace(".", "/") + ".py"
    if (folder / own).exists() and own not in files:
        raise BundleError(f"{where}: it names the bundle's file {own}, whose SHA-256 is not listed in lineage.files.")
    try:
        module = _own_module(folder / own, files[own]) if own in files else importlib.import_module(module_name)
    except Exception as error:  # whatever the foreign module does when imported is the bundle's fault
        raise BundleError(f"{where}: {module_name} cannot be imported: {type(error).__name__}: {error}.") from error
    found = getattr(module, class_name, None)
    missing = [name for name in ("reset", "encode", "skip") if not callable(getattr(found, name, None))]
    if not isinstance(found, type) or missing:
        raise BundleError(
            f"{where}: {target} is no expert; it needs to be a class with the methods reset, encode and skip"
            f"{f' and lacks {listed(missing)}' if isinstance(found, type) else ''}."
        )
    return found


def _own_module(file: Path, data: bytes) -> Any:
    """The bundle's own module, run from the bytes whose digest was checked."""
    name = f"sensorium_bundle_{hashlib.sha256(data).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(name, loader=None, origin=str(file))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses and structs look their module up by its name
    exec(compile(data, str(file), "exec"), module.__dict__)
    return module
