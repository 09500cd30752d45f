"""Progress bars that stay whole when somebody types."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress

TYPED = 4
"""So many cells stay free at the right: a terminal writes ^C behind the last line, and where that line is full it goes
on in another. What is drawn next then begins a line too low, and the topmost bar stands twice."""


class Bar(Progress):
    """rich's ``Progress``, never as wide as the terminal."""

    def get_renderable(self) -> RenderableType:
        return _Narrower(super().get_renderable())

    def stop(self) -> None:
        """As rich's, without its empty line where no bar could be shown."""
        self.live.stop()


class _Narrower(NamedTuple):
    inner: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.inner, options.update_width(max(1, options.max_width - TYPED)))
