"""Labels from a table: what was true from when to when, in seconds of the file as a player shows it.

CSV with a header line, columns ``start_s``, ``end_s`` and ``label``::

    start_s,end_s,label
    0.5,1.25,clap

or JSON, a list of objects with the same three keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, listed
from pipeline.recording import Label
from pipeline.tables import table_rows, table_text

_COLUMNS = ("start_s", "end_s", "label")
_COMMA = re.compile(r"\s*-?\d+,\d+\s*")


def read_labels(path: Path) -> list[Label]:
    """The intervals of a CSV or JSON file in the order of the file. ConfigError names the line that is wrong."""
    text = table_text(path)
    if path.suffix.lower() == ".json":
        return [_label(f"{path}, entry {number}", row) for number, row in _json_rows(path, text)]
    return [_label(f"{path}, line {number}", row) for number, row in table_rows(path, text, _COLUMNS)]


def _json_rows(path: Path, text: str) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise ConfigError(f"{path} holds no list: labels are a list of objects with {listed(_COLUMNS)}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or any(row.get(column) is None for column in _COLUMNS):
            raise ConfigError(f"{path}, entry {number} is {json.dumps(row)}; every entry needs {listed(_COLUMNS)}")
        yield number, row


def _label(where: str, row: Mapping[str, Any]) -> Label:
    start_s, end_s = (_seconds(where, column, row[column]) for column in ("start_s", "end_s"))
    if start_s >= end_s:
        raise ConfigError(f"{where}: it begins at {start_s:g} s and ends at {end_s:g} s; it must end later")
    return Label(round(start_s * 1e9), round(end_s * 1e9), str(row["label"]).strip())


def _seconds(where: str, column: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if math.isfinite(found):
        return found
    pointed = str(value).replace(",", ".")
    hint = f"write its decimals with a point: {pointed}" if _COMMA.fullmatch(str(value)) else "write it like 12.5"
    raise ConfigError(f"{where}: `{column}` is `{value}`, and no number of seconds; {hint}")
