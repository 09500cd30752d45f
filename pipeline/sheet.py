"""Tables of which no screen cuts a number or a name.

A sheet that is wider than the screen puts its columns into several tables, one below the other, each with the first
column again. Before that its headings break between words, its sentences go on in the next line and its bars become
shorter. Where there is no screen it is as wide as what it says. No line ends in blanks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

BAR = 20
"""How many characters a whole bar has where there is room for them."""
GAP = 2
"""Blanks between two columns."""
SENTENCE = 25
"""So wide a column of sentences stays before another table is begun."""


class Meter(msgspec.Struct, frozen=True):
    """A cell: a share of 0 to 1 as a bar after ``text``, on the scale that the room allows."""

    text: str
    share: float
    style: str = ""

    def across(self, width: int) -> Text:
        """The cell in so many characters."""
        return Text(self.text).append(bar(self.share, max(width - cell_len(self.text), 0)).rstrip(), style=self.style)


Cell = str | Text | Meter


class _Column(msgspec.Struct):
    heading: str
    right: bool
    usual: int
    sentences: bool
    cells: list[Cell] = []

    def natural(self) -> int:
        """The width at which nothing breaks."""
        return max(self.usual, self._content())

    def least(self) -> int:
        """The width at which nothing breaks that had better not."""
        words = max(map(cell_len, self.heading.split()), default=1)
        if self.sentences:
            return min(self._content(), max(words, SENTENCE))
        return max(words, *(_width(cell.text.rstrip() if isinstance(cell, Meter) else cell) for cell in self.cells), 1)

    def _content(self) -> int:
        return max(1, *map(cell_len, self.heading.split("\n")), *map(_width, self.cells))


class Sheet:
    """A table. What ``add_row`` takes are the cells of a row, from the left; a row may end early."""

    def __init__(self, heading_style: str = "", apart: bool = True) -> None:
        """``apart``: a blank line stands between the tables that it falls into on a narrow screen."""
        self._style, self._apart = heading_style, apart
        self._columns: list[_Column] = []
        self._rows = 0

    def add_column(self, heading: str = "", *, right: bool = False, usual: int = 0, sentences: bool = False) -> None:
        """``usual``: as wide the column is where there is room, that it may not jump when its words change;
        ``sentences``: its cells may break between words."""
        self._columns.append(_Column(heading, right, usual, sentences, [""] * self._rows))

    def add_row(self, *cells: Cell) -> None:
        """One row."""
        self._rows += 1
        for column, cell in zip(self._columns, (*cells, *[""] * (len(self._columns) - len(cells))), strict=True):
            column.cells.append(cell)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, columns in enumerate(self._tables(options.max_width)):
            if number and self._apart:
                yield Text()
            widths = _widths(columns, options.max_width)
            if any(column.heading for column in columns):
                yield from _row(console, columns, widths, [Text(c.heading, style=self._style) for c in columns])
            for row in range(self._rows):
                yield from _row(console, columns, widths, [column.cells[row] for column in columns])

    def _tables(self, width: int) -> Iterator[Sequence[_Column]]:
        """Which columns stand beside each other."""
        first, *rest = self._columns
        table = [first]
        for column in rest:
            if len(table) > 1 and _total([c.least() for c in (*table, column)]) > width:
                yield table
                table = [first]
            table.append(column)
        yield table


def numbers(first: str, rest: Iterable[str]) -> Sheet:
    """An empty sheet of numbers under headings."""
    sheet = Sheet()
    sheet.add_column(first)
    for heading in rest:
        sheet.add_column(heading, right=True)
    return sheet


def number(value: float | None, digits: int) -> str:
    """A number, or that there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def counted(count: int, what: str) -> str:
    """So many of something whose plural ends in s: ``1 window``, ``2 windows``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def size(nbytes: float) -> str:
    """Bytes in kB, or in MB where there are so many."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"


def bar(share: float, width: int = BAR) -> str:
    """``share`` of 0 to 1 as a bar of fixed width."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    whole, part = divmod(eighths, 8)
    return ("█" * whole + (" ▏▎▍▌▋▊▉"[part] if part else "")).ljust(width)


def _width(cell: Cell) -> int:
    if isinstance(cell, Meter):
        return cell_len(cell.text) + BAR
    return cell_len(cell) if isinstance(cell, str) else cell.cell_len


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _widths(columns: Sequence[_Column], most: int) -> list[int]:
    """What each column gets: sentences first, then from the left."""
    wanted, widths = [column.natural() for column in columns], [column.least() for column in columns]
    while (excess := _total(widths) - most) > 0 and max(widths) > 1:  # a name that is wider than the screen
        widest = max(range(len(widths)), key=widths.__getitem__)
        widths[widest] = max(widths[widest] - excess, 1)
    for position in sorted(range(len(columns)), key=lambda i: not columns[i].sentences):
        widths[position] += max(min(wanted[position] - widths[position], most - _total(widths)), 0)
    return widths


def _row(console: Console, columns: Sequence[_Column], widths: Sequence[int], cells: Sequence[Cell]) -> Iterator[Text]:
    """A row's lines: one, unless something has to break."""
    broken = []
    for cell, width in zip(cells, widths, strict=True):
        text = cell.across(width) if isinstance(cell, Meter) else Text(cell) if isinstance(cell, str) else cell
        broken.append(text.wrap(console, width, overflow="fold"))
    for height in range(max(len(lines) for lines in broken)):
        line = Text(no_wrap=True)
        for column, width, lines in zip(columns, widths, broken, strict=True):
            part = lines[height] if height < len(lines) else Text()
            part.rstrip()
            part.align("right" if column.right else "left", width)
            line.append(part).append(" " * GAP)
        line.rstrip()
        yield line
