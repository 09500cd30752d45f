"""A path between two hosts, for tests: a TCP proxy that delays each direction by its own, and can be cut."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random


class SlowPath:
    """Forwards ``port`` to ``target_port``; ``there`` and ``back`` give the delay of each chunk in seconds. Chunks of
    one direction keep their order."""

    def __init__(self, target_port: int, there: Callable[[], float], back: Callable[[], float]) -> None:
        self._target, self._there, self._back = target_port, there, back
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._cut = False
        self.port = 0
        self._thread = threading.Thread(target=self._run, name="path", daemon=True)

    def cut(self) -> None:
        """Breaks every connection, and refuses new ones until ``mend``."""
        self._cut = True
        self._loop.call_soon_threadsafe(self._break)

    def mend(self) -> None:
        self._cut = False

    def _break(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._break()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._cut:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        pumps = [self._pump(reader, far_writer, self._there), self._pump(far_reader, writer, self._back)]
        await asyncio.wait([asyncio.ensure_future(pump) for pump in pumps], return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, far_writer):
            end.transport.abort()
            self._open.discard(end)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: Callable[[], float]
    ) -> None:
        last = 0.0
        try:
            while chunk := await reader.read(65_536):
                last = max(last, self._loop.time() + delay())
                self._loop.call_at(last, self._write, writer, chunk)
        except OSError:
            pass

    @staticmethod
    def _write(writer: asyncio.StreamWriter, chunk: bytes) -> None:
        if not writer.transport.is_closing():
            writer.write(chunk)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


@contextmanager
def slow_path(target_port: int, there_s: tuple[float, float], back_s: tuple[float, float]) -> Iterator[SlowPath]:
    """A path whose delays are drawn evenly from these ranges."""
    random = Random(1)
    path = SlowPath(target_port, lambda: random.uniform(*there_s), lambda: random.uniform(*back_s))
    path.start()
    try:
        yield path
    finally:
        path.stop()
