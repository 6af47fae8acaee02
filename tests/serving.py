"""Servers on loopback for tests of stores: one of ranges by HTTP, and a proxy that makes faults."""

import ctypes
import hashlib
import random
import struct
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Faults:
    """What befalls requests, drawn for each from a seed; `count` counts what did.

    Args:
        latency: seconds before each answer.
        refused: share of requests that a `status` answers.
        cut: share of bodies that end half-way.
        reset: share of connections that are reset.
        slow: share of bodies that stop for `pause` seconds half-way.
    """

    latency: float = 0.0
    refused: float = 0.0
    cut: float = 0.0
    reset: float = 0.0
    slow: float = 0.0
    pause: float = 0.0
    status: int = 503
    seed: int = 0
    away: bool = False
    count: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self._rng, self._lock = random.Random(self.seed), threading.Lock()

    def draw(self, body):
        """What befalls a request: "away", "refused", "reset", "cut", "slow" or "none"."""
        with self._lock:
            what, at = "none", self._rng.random()
            for name in ("refused", "reset", "cut", "slow"):
                share = getattr(self, name)
                if at < share and (body or name in ("refused", "reset")):
                    what = name
                    break
                at -= share
            what = "away" if self.away else what
            self.count[what] += 1
            return what


def reset(connection):
    """Reset a connection, even if a forked process has a copy of it, as a close would not."""
    unspecified = struct.pack("16x")  # an address of the family AF_UNSPEC
    ctypes.CDLL(None).connect(connection.fileno(), unspecified, len(unspecified))


class _Handler(BaseHTTPRequestHandler):
    """Answers by `found`; then faults befall the answer."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, headers, body):
        faults = self.server.faults
        time.sleep(faults.latency)
        what = faults.draw(body)
        if what in ("away", "reset"):
            reset(self.connection)
            self.close_connection = True
            return
        if what == "refused":
            status, headers, body = faults.status, {}, b"<Error><Code>SlowDown</Code></Error>"
        self.send_response_only(status)
        given = {k.lower() for k in headers}
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in given:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        if what == "cut":
            self.wfile.write(body[:half])
            self.close_connection = True
        elif what == "slow":
            self.wfile.write(body[:half])
            time.sleep(faults.pause)
            self.wfile.write(body[half:])
        else:
            self.wfile.write(body)

    def handle(self):
        with suppress(OSError, ValueError):  # the client left, or its connection was reset
            super().handle()

    def log_message(self, *_):
        pass


class _Files(_Handler):
    """The files of a folder, with ETags, ranges, and conditions on the ETag."""

    def do_GET(self):
        path = self.server.folder / self.path.partition("?")[0].lstrip("/")
        self.server.asked[self.command, path.name] += 1
        if not path.is_file():
            self.answer(404, {}, b"not found")
            return
        data, stat = path.read_bytes(), path.stat()
        about = f"{stat.st_mtime_ns} {hashlib.sha256(data).hexdigest()}"
        tag = f'"{hashlib.md5(about.encode()).hexdigest()}"'
        headers = {"ETag": tag, "Last-Modified": formatdate(stat.st_mtime, usegmt=True)}
        if self.server.versions == "none":
            del headers["ETag"]
        elif self.headers.get("If-Match", tag) != tag:
            self.answer(412, headers, b"")
            return
        if span := self.headers.get("Range"):
            start, _, last = span.removeprefix("bytes=").partition("-")
            whole, data = len(data), data[int(start) : int(last) + 1]
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(data) - 1}/{whole}"
            self.answer(206, headers, data)
        elif self.command == "HEAD":
            self.answer(200, {**headers, "Content-Length": str(len(data))}, b"")
        else:
            self.answer(200, headers, data)

    do_HEAD = do_GET


class _Proxy(_Handler):
    """Passes requests on to `target`."""

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.faults.away:
            self.answer(503, {}, b"")
            return
        other = HTTPConnection(*self.server.target, timeout=30)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        other.request(self.command, self.path, body, headers)
        got = other.getresponse()
        data = got.read()
        dropped = ("connection", "transfer-encoding", "content-length", "date", "server")
        kept = {k: v for k, v in got.getheaders() if k.lower() not in dropped}
        if self.command == "HEAD":
            kept["Content-Length"] = got.headers.get("Content-Length", "0")
        other.close()
        self.answer(got.status, kept, data)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET


@contextmanager
def _running(handler, **attributes):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    for name, value in attributes.items():
        setattr(server, name, value)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(folder: Path, faults: Faults | None = None, versions: str = "etag"):
    """Serve a folder; yields the server, whose `url` names it and whose `asked` counts requests."""
    about = {"folder": folder, "faults": faults or Faults(), "asked": Counter()}
    with _running(_Files, **about, versions=versions) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server


@contextmanager
def proxied(target: tuple[str, int], faults: Faults):
    """Run a proxy before a server; yields its URL."""
    with _running(_Proxy, target=target, faults=faults) as server:
        yield f"http://127.0.0.1:{server.server_port}"
