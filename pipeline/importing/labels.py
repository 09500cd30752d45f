"""Labels from a table: what was true from when to when, in seconds of the file as a player shows it.

CSV with a header line, columns ``start_s``, ``end_s`` and ``label``::

    start_s,end_s,label
    0.5,1.25,clap

or JSON, a list of objects with the same three keys.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.recording import Label

_COLUMNS = ("start_s", "end_s", "label")


def read_labels(path: Path) -> list[Label]:
    """The intervals of a CSV or JSON file in the order of the file. ConfigError names the row that is wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"labels cannot be read from {path}: {error}") from None
    rows = _json_rows(path, text) if path.suffix.lower() == ".json" else _csv_rows(path, text)
    return [_label(path, number, row) for number, row in enumerate(rows, start=1)]


def _csv_rows(path: Path, text: str) -> Iterable[Any]:
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    if rows.fieldnames is not None and not set(_COLUMNS) <= set(rows.fieldnames):
        raise ConfigError(
            f"the first line of {path} is `{','.join(rows.fieldnames)}`; it must be the heading, "
            f"`{','.join(_COLUMNS)}`, and each line below it an interval"
        )
    return rows


def _json_rows(path: Path, text: str) -> Iterable[Any]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise ConfigError(f"{path} holds no list: labels are a list of objects with {', '.join(_COLUMNS)}")
    return rows


def _label(path: Path, number: int, row: Any) -> Label:
    if not isinstance(row, dict) or any(row.get(column) is None for column in _COLUMNS):
        raise ConfigError(f"row {number} of {path} is {row!r}; every row needs {', '.join(_COLUMNS)}")
    if None in row:  # csv's key for what the heading has no column for
        raise ConfigError(
            f"row {number} of {path} has more values than the heading has columns; write decimals with a point (0.5), "
            'and a label with a comma in quotes ("a, b")'
        )
    try:
        start_s, end_s = float(row["start_s"]), float(row["end_s"])
    except (TypeError, ValueError):
        raise ConfigError(f"row {number} of {path} has times that are no numbers of seconds: {row!r}") from None
    if not (math.isfinite(start_s) and math.isfinite(end_s) and start_s < end_s):
        raise ConfigError(f"row {number} of {path} begins at {start_s} s and ends at {end_s} s; it must end later")
    return Label(round(start_s * 1e9), round(end_s * 1e9), str(row["label"]).strip())
