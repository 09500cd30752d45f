"""Tables that people write: CSV in UTF-8 with a heading. Nothing is guessed; what is wrong is named with its line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import ConfigError, absent, typed


def table_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises ConfigError."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(error.object[: error.start + 1].splitlines())
        raise ConfigError(
            f"{path}, line {line}: the byte 0x{error.object[error.start]:02x} is not UTF-8, which a table must be in. "
            "Save it anew in UTF-8 (a spreadsheet calls that CSV UTF-8)"
        ) from None
    except FileNotFoundError:
        raise absent(path) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a table, which is one file.") from None
    except PermissionError:
        raise ConfigError(
            f"{path} cannot be read: you may not read it. Whoever it belongs to can let you: chmod a+r {typed(path)}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def table_rows(path: Path, text: str, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row of a table that has the columns ``needed`` and maybe others: its line, and column -> value. A file
    without a line has no rows. Raises ConfigError."""
    rows = _lines(path, text)
    line, found = next(rows, (1, []))
    heading = [name.strip() for name in found]
    if heading:
        _check_heading(f"{path}, line {line}", heading, needed)
    for line, row in rows:
        if len(row) != len(heading):
            raise ConfigError(f"{path}, line {line}: {_uneven(row, heading)}")
        yield line, dict(zip(heading, map(str.strip, row), strict=True))


def _lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The values of each line that is not empty, and its number."""
    rows, line = csv.reader(map(str.rstrip, text.splitlines()), skipinitialspace=True, strict=True), 0
    try:
        for row in rows:
            line = rows.line_num
            if row:
                yield line, row
    except csv.Error as error:
        raise ConfigError(
            f"{path}, line {line + 1}: a quote here has no other, or is not the last sign of its value ({error}). Put "
            'one (") before the value and one behind it, and write a quote within it twice ("")'
        ) from None


def _check_heading(where: str, heading: Sequence[str], needed: Sequence[str]) -> None:
    found, wanted = ",".join(heading), ",".join(needed)
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if sign in found and set(needed) - set(heading):
            raise ConfigError(
                f"{where}: the columns are separated by {name}, and must be by commas: `{wanted}`. Write a comma for "
                "each of them, in all lines, and decimals with a point (0.5)"
            )
    if set(needed) - set(heading):
        raise ConfigError(
            f"{where} is `{found}`; it must be the heading, with the column{'s' * (len(needed) > 1)} `{wanted}`, and "
            "each line below it one row"
        )
    twice = next((name for name in heading if heading.count(name) > 1), None)
    if twice == "":
        raise ConfigError(f"{where}: {heading.count('')} columns of the heading `{found}` have no name; name or remove "
                          "them, in all lines")  # fmt: skip
    if twice is not None:
        raise ConfigError(f"{where}: the heading has the column `{twice}` twice; keep one of them")


def _uneven(row: Sequence[str], heading: Sequence[str]) -> str:
    """What is wrong with a row that has not one value a column."""
    said = f"`{','.join(row)}` has {len(row)} value{'s' * (len(row) != 1)}, and the heading {len(heading)} columns"
    if len(row) > len(heading):
        return f'{said}; write decimals with a point (0.5), and a value with a comma in quotes ("a, b")'
    separated = any(sign in "".join(row) for sign in ";\t")
    return f"{said}; separate values by commas" if separated else f"{said}; write a value for each, with commas between"
