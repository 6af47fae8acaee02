"""The process that speaks to stores, for all processes of a job on a node (`client` starts it).

    python -m cascade.files.stores.server ADDRESS LIMITS

It listens on a socket, fetches pieces into the cache, some ahead, and retries what may succeed
later. It ends once its standard input does, which all processes that may ask it hold open.
Credentials come from its environment alone.
"""

import asyncio
import errno
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from cascade.files.locks import Claims
from cascade.files.stores.cache import PIECE, Cache, key_of
from cascade.files.stores.objects import Failure, Stores, Version

DEMANDED, AHEAD = 16, 16  # requests at a time: for who waits, and ahead
FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0  # seconds between retries, doubled each time
OFF = 60.0  # seconds without writing to a cache whose disk refused
SHARE = 0.9  # of the cache that may be fetched ahead


Answer = tuple[dict[str, Any], bytes | memoryview]


class Piece(NamedTuple):
    """A piece of one version of a file."""

    url: str
    version: Version
    number: int

    @property
    def key(self) -> str:
        return key_of(self.url, *self.version)

    @property
    def span(self) -> tuple[int, int]:
        return self.number * PIECE, min((self.number + 1) * PIECE, self.version.bytes)


class Server:
    """Answers `client.ask`: each method `do_...` is a request, and returns the answer and data."""

    def __init__(self, patience: float, first_patience: float, timeout: float):
        self.patience, self.first_patience = patience, first_patience
        self.stores = Stores(timeout)
        self.answered: set[str] = set()  # stores that have answered
        self.rooms: dict[tuple[str, int], Room] = {}
        self.demanded, self.ahead = asyncio.Semaphore(DEMANDED), asyncio.Semaphore(AHEAD)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one process until it leaves."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                what = json.loads(
                    await reader.readexactly(*struct.unpack("<Q", await reader.readexactly(8)))
                )
                try:
                    answer, data = await getattr(self, f"do_{what.pop('do')}")(**what)
                except Failure as failure:
                    answer, data = {"error": failure.kind, "text": str(failure)}, b""
                text = json.dumps({**answer, "bytes": len(data)}).encode()
                writer.write(struct.pack("<Q", len(text)) + text)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def do_stat(self, url: str) -> Answer:
        return {"stat": await self.patiently(url, self.stores.stat)}, b""

    async def do_list(self, url: str) -> Answer:
        return {"files": await self.patiently(url, self.stores.list)}, b""

    async def do_put(self, url: str, file: str) -> Answer:
        await self.patiently(url, lambda url: self.stores.put(url, file))
        return {}, b""

    async def do_read(
        self, url: str, stat: list | None = None, start: int = 0, end: int | None = None, **_
    ) -> Answer:
        version = Version(*stat) if stat else None
        return {}, await self.fetched(url, version, start, end, self.demanded)

    async def do_piece(
        self, url: str, stat: list, start: int, end: int, cache: str, limit: int
    ) -> Answer:
        """Fetch a piece into the cache; if it cannot be kept there, return the bytes instead."""
        room = self.room(cache, limit)
        piece = Piece(url, Version(*stat), start // PIECE)
        if room.works and await room.kept(piece, self.demanded, wait=True):
            return {"kept": True}, b""
        return await self.do_read(url, stat, start, end)

    async def do_ahead(self, files: list, cache: str, limit: int) -> Answer:
        self.room(cache, limit).fetch_ahead([(url, stat and Version(*stat)) for url, stat in files])
        return {}, b""

    def room(self, cache: str, limit: int) -> "Room":
        if (cache, limit) not in self.rooms:
            self.rooms[cache, limit] = Room(self, Cache(Path(cache), limit))
        return self.rooms[cache, limit]

    async def fetched(
        self,
        url: str,
        version: Version | None,
        start: int,
        end: int | None,
        slots: asyncio.Semaphore,
    ) -> memoryview:
        """Return bytes of a file, all of it or of one version of it. Raises Failure."""
        async with slots:
            return await self.patiently(url, lambda url: self.stores.get(url, version, start, end))

    async def patiently(self, url: str, attempt: Callable[[str], Awaitable[Any]]) -> Any:
        """Return what an attempt returns; repeat it while its failure may be passing."""
        begun, wait, store = time.monotonic(), FIRST_WAIT, "/".join(url.split("/")[:3])
        while True:
            try:
                found = await attempt(url)
            except Failure as failure:
                if failure.kind != "passing":
                    raise
                known = store in self.answered
                left = begun + (self.patience if known else self.first_patience) - time.monotonic()
                if left <= 0:
                    raise Failure("unreachable", f"{url}: {failure}") from None
                if wait >= 4:
                    print(f"cascade: {url}: {failure}; again in {wait:.0f} s", file=sys.stderr)
                # Spread, so that the ranks of a large job do not all come back at once.
                await asyncio.sleep(min(wait * (0.5 + os.urandom(1)[0] / 255), left))
                wait = min(2 * wait, LONGEST_WAIT)
            else:
                self.answered.add(store)
                return found


class Room:
    """A cache, and what is being fetched into it."""

    def __init__(self, server: Server, cache: Cache):
        self.server, self.cache = server, cache
        self.written, self.taken, self.off_until = 0, 0, 0.0
        self.coming: dict[tuple[str, int], asyncio.Future] = {}
        self.queue: dict[tuple[str, int], Piece] = {}  # to fetch ahead, in this order
        self.fetchers: set[asyncio.Task] = set()
        self.claims: Claims | None = None
        try:
            cache.prepare()
            self.claims = Claims(cache.folder)
        except OSError as error:
            self._refused(error)
        else:
            self.taken = cache.evict(0)

    @property
    def works(self) -> bool:
        return self.claims is not None and time.monotonic() >= self.off_until

    async def kept(self, piece: Piece, slots: asyncio.Semaphore, wait: bool) -> bool:
        """Fetch a piece into the cache, once for all who ask; return whether it is there.

        Args:
            wait: for another process that is fetching it.
        """
        name = piece.key, piece.number
        self.queue.pop(name, None)
        if (coming := self.coming.get(name)) is not None:
            return await asyncio.shield(coming)
        task = asyncio.ensure_future(self._kept(piece, slots, wait))
        self.coming[name] = task
        task.add_done_callback(lambda _: self.coming.pop(name, None))
        return await asyncio.shield(task)

    async def _kept(self, piece: Piece, slots: asyncio.Semaphore, wait: bool) -> bool:
        path = self.cache.path(piece.key, piece.number)
        while not path.exists():
            with self._claimed(f"{piece.key}/{piece.number}") as mine:
                if mine and not path.exists():
                    data = await self.server.fetched(piece.url, piece.version, *piece.span, slots)
                    return await asyncio.to_thread(self._write, piece, data)
            if not wait:
                return False
            await asyncio.sleep(0.02)
        return True

    @contextmanager
    def _claimed(self, name: str) -> Iterator[bool]:
        """Claim a piece among the helpers of a node; without working locks, everyone may fetch."""
        with ExitStack() as stack:
            try:
                mine = stack.enter_context(self.claims.held(name, wait=False))
            except OSError:
                mine = True
            yield mine

    def _write(self, piece: Piece, data: memoryview) -> bool:
        """Write a piece into the cache, whose oldest make room; return whether it is there.

        The others of a node write too, so what is taken is counted again now and then.
        """
        self.written += len(data)
        try:
            if self.taken + self.written > self.cache.limit or self.written > self.cache.limit / 32:
                self.taken, self.written = self.cache.evict(2 * len(data)), len(data)
            self.cache.write(piece.key, piece.number, data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                self._refused(error)
                return False
            try:  # others fill the disk too: use less of it
                smaller = Cache(self.cache.folder, self.taken * 3 // 4)
                self.taken, self.written = smaller.evict(0), len(data)
                self.cache.write(piece.key, piece.number, data)
            except OSError as again:
                self._refused(again)
                return False
        return True

    def _refused(self, error: OSError) -> None:
        if time.monotonic() >= self.off_until + OFF:
            print(
                f"cascade: the cache {self.cache.folder} cannot be written to ({error.strerror}): "
                "reading goes on without it, more slowly",
                file=sys.stderr,
            )
        self.off_until = time.monotonic() + OFF

    def fetch_ahead(self, files: list[tuple[str, Version | None]]) -> None:
        """Fetch these files, as far as the cache holds them, while no one waits for others."""
        task = asyncio.ensure_future(self._queue(files))
        self.fetchers.add(task)
        task.add_done_callback(self.fetchers.discard)

    async def _queue(self, files: list[tuple[str, Version | None]]) -> None:
        room = SHARE * self.cache.limit
        for url, version in files:
            if version is None:
                with suppress(Failure):
                    version = Version(*await self.server.patiently(url, self.server.stores.stat))
            if version is None or (room := room - version.bytes) < 0:
                break
            for number in range(-(-version.bytes // PIECE)):
                piece = Piece(url, version, number)
                self.queue.setdefault((piece.key, number), piece)
        while len(self.fetchers) <= AHEAD and self.queue and self.works:
            task = asyncio.ensure_future(self._fetch_queued())
            self.fetchers.add(task)
            task.add_done_callback(self.fetchers.discard)
            await asyncio.sleep(0)

    async def _fetch_queued(self) -> None:
        while self.queue and self.works:
            piece = self.queue.pop(next(iter(self.queue)))
            with suppress(Failure):  # whoever needs it asks again, and is told
                await self.kept(piece, self.server.ahead, wait=False)


async def main(address: str, limits: dict[str, float]) -> None:
    # Whoever asks may still need it while it saves; it ends with them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    server = Server(**limits)
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    listening = await asyncio.start_unix_server(server.serve, address)
    pipe = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(pipe), sys.stdin)
    print("ready", flush=True)
    await pipe.read()
    listening.close()
    ended.cancel()
    Path(address).unlink(missing_ok=True)
    Path(address).parent.rmdir()
    os._exit(0)  # what it fetches ahead is of no use any more


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
