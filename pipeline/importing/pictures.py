"""A folder of pictures with a CSV that says when each was taken.

The CSV has a header line. One column holds the time, with its unit in the name (``time_s``, ``timestamp_ns``,
``#timestamp [ns]``: s, ms, us or ns), one the file (``file``, ``filename``, ``image``, ``picture`` or ``path``)::

    time_s,file
    0.000,left/0001.png
    0.033,left/0002.png

Commas, semicolons, tabs and blanks may part the columns. A time must increase from row to row. Whether a unit is right
no file can prove, but pictures that would lie an hour apart, or 2000 to the millisecond, or in the next century, are
refused. Times later than 2001 are taken for Unix time.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

from pipeline.errors import ConfigError, RecordingError
from pipeline.importing.base import ImportOptions, Opened, Piece
from pipeline.importing.images import Unusable, compressed_frame
from pipeline.tables import table_text

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
UNITS_NS = {"ns": 1, "us": 1000, "µs": 1000, "ms": 10**6, "s": 10**9, "sec": 10**9, "seconds": 10**9}

_FILES = ("file", "filename", "image", "picture", "path", "name")
_TIME = re.compile(r"#?\s*(?:time|timestamp|stamp|t)\s*[_ \[(]*(?P<unit>[a-zµ]*)[\])]*", re.IGNORECASE)
_CLOSEST_NS, _FARTHEST_NS = 500_000, 3600 * 10**9
_UNIX_FROM_NS, _UNIX_TO_NS = 10**18, 4 * 10**18  # 2001 and 2096


class Row(NamedTuple):
    """One picture: its line in the CSV, its time, its file as the CSV names it."""

    line: int
    t_ns: int
    file: str


class Pictures:
    """Importer of folders of pictures."""

    name = "folder of pictures with a CSV of their times"

    def accepts(self, path: Path) -> bool:
        return path.is_dir() and any(_is_picture(file) for file in path.rglob("*"))

    def open(self, path: Path, options: ImportOptions) -> Opened:
        table = options.times or _table_of(path)
        rows, unused = read_times(table)
        missing = [row for row in rows if not (path / row.file).is_file()]
        if missing:
            first = ", ".join(f"{row.file} (line {row.line})" for row in missing[:3])
            raise ConfigError(
                f"{len(missing)} of the {len(rows)} pictures that {table} names are not in {path}: {first}"
                f"{' and others' if len(missing) > 3 else ''}. Names are relative to the folder"
            )
        opened = Opened(unix_ns=0 if rows[0].t_ns >= _UNIX_FROM_NS else None, zero_ns=rows[0].t_ns)
        named = {(path / row.file).resolve() for row in rows}
        rest = [file for file in sorted(path.rglob("*")) if _is_picture(file) and file.resolve() not in named]
        if rest:
            opened.left_out.append(f"{len(rest)} pictures that {table.name} does not name, the first {rest[0].name}")
        if unused:
            opened.left_out.append(f"columns of {table.name}: {', '.join(unused)}")
        opened.tracks[options.camera] = frames(path, rows, options, opened.dropped)
        return opened


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in PICTURES


def _table_of(folder: Path) -> Path:
    tables = sorted(folder.glob("*.csv"))
    if len(tables) == 1:
        return tables[0]
    found = f"{len(tables)} CSV files ({', '.join(table.name for table in tables)})" if tables else "no CSV file"
    raise ConfigError(
        f"{folder} holds pictures and {found}; one must say when each was taken. Name it with --times; it has a header "
        "line, a column `time_s` (or _ms, _us, _ns) and a column `file`"
    )


def frames(folder: Path, rows: list[Row], options: ImportOptions, dropped: Counter[str]) -> Iterator[Piece]:
    """The pictures as frames, compressed where they are not already."""
    for row in rows:
        try:
            layout, data = compressed_frame((folder / row.file).read_bytes(), options)
        except OSError as error:
            raise RecordingError(f"{folder / row.file} cannot be read: {error.strerror}") from None
        except Unusable as error:
            dropped[f"pictures of {options.camera}: {error}"] += 1
            continue
        yield Piece(layout=layout, data=data, t_ns=row.t_ns, end_ns=row.t_ns, t_device_ns=row.t_ns)


def read_times(table: Path) -> tuple[list[Row], list[str]]:
    """The rows of the CSV, and the columns that are not used. ConfigError names the line that is wrong."""
    lines = [(number, line) for number, line in enumerate(table_text(table).splitlines(), start=1) if line.strip()]
    if len(lines) < 2:
        raise ConfigError(f"{table} holds no times: it needs a header line and a line a picture")
    delimiter = next((mark for mark in ",;\t" if mark in lines[0][1]), " ")
    reader = csv.reader((line.strip() for _, line in lines), delimiter=delimiter, skipinitialspace=True)
    cells = [(number, [cell.strip() for cell in row]) for (number, _), row in zip(lines, reader, strict=False)]
    header = cells[0][1]
    time, unit_ns, file = _columns(table, header)
    rows = [_row(table, number, row, time, unit_ns, file) for number, row in cells[1:]]
    _check(table, rows, header[time])
    return rows, [name for column, name in enumerate(header) if column not in (time, file)]


def _columns(table: Path, header: list[str]) -> tuple[int, int, int]:
    """Which column is the time, in which unit, and which the file."""
    times = {column: match for column, name in enumerate(header) if (match := _TIME.fullmatch(name))}
    files = [column for column, name in enumerate(header) if name.lower() in _FILES]
    if len(times) != 1 or len(files) != 1:
        raise ConfigError(
            f"{table} has the columns {', '.join(header)}; it needs one column of times (`time_s`, or _ms, _us, _ns) "
            "and one called `file`, in a header line"
        )
    ((column, match),) = times.items()
    unit = match["unit"].lower()
    if unit not in UNITS_NS:
        raise ConfigError(
            f"{table} does not say what unit its column `{header[column]}` has; call it time_s, time_ms, time_us or "
            "time_ns"
        )
    return column, UNITS_NS[unit], files[0]


def _row(table: Path, number: int, row: list[str], time: int, unit_ns: int, file: int) -> Row:
    if len(row) <= max(time, file) or not row[time] or not row[file]:
        raise ConfigError(f"line {number} of {table} lacks its time or its file: {', '.join(row)}")
    try:
        value = Decimal(row[time])
        t_ns = int((value * unit_ns).to_integral_value())
    except (InvalidOperation, ValueError, OverflowError):
        raise ConfigError(f"line {number} of {table} has the time {row[time]!r}, which is no number") from None
    return Row(number, t_ns, row[file])


def _check(table: Path, rows: list[Row], column: str) -> None:
    for before, row in pairwise(rows):
        if row.t_ns <= before.t_ns:
            raise ConfigError(
                f"the times of {table} do not increase: line {before.line} says {before.t_ns} ns and line {row.line} "
                f"{row.t_ns} ns. Sort the lines by time, and let no two pictures have the same"
            )
    step_ns = median(b.t_ns - a.t_ns for a, b in pairwise(rows)) if len(rows) > 1 else 10**9
    if not _CLOSEST_NS <= step_ns <= _FARTHEST_NS or not -_UNIX_TO_NS < rows[0].t_ns <= rows[-1].t_ns < _UNIX_TO_NS:
        raise ConfigError(
            f"by the column `{column}` of {table} a picture was taken every {step_ns / 1e9:g} s, the first at "
            f"{rows[0].t_ns / 1e9:g} s; that cannot be its unit. Rename the column: time_s, time_ms, time_us or time_ns"
        )
