"""A server on loopback that speaks as much of S3 as reading needs, after a fixed latency.

    python -m cascade.eval.benchmarks.bucket FOLDER LATENCY RATE

Each connection gets RATE megabytes per second, as those of large stores are limited; 0: all that
the machine sends. It serves the files of FOLDER as s3://bucket/files/, lists 10,000 made-up tars
under s3://bucket/many/, and prints its port. It ends with its standard input.
"""

import os
import re
import sys
import threading
import time
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

MANY, SIZE = 10_000, 500_000_000  # tars that are listed, and the size of each
WHEN = 1e9  # their time, in seconds
_PAGE = 1000  # keys of one answer
_CHUNK = 2**17  # bytes that are sent at once where the rate is limited


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    latency: float
    rate: float  # bytes per second

    def do_GET(self) -> None:
        time.sleep(self.latency)
        asked = urlsplit(self.path)
        name = asked.path.removeprefix("/bucket").lstrip("/")
        if not name:
            self._list(**{key: values[0] for key, values in parse_qs(asked.query).items()})
        elif name.startswith("many/"):
            self._head(200, SIZE, WHEN)
        else:
            self._send(self.folder / name.removeprefix("files/"))

    do_HEAD = do_GET

    def _head(self, status: int, size: int, when: float, span: str = "") -> None:
        self.send_response_only(status)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", formatdate(when, usegmt=True))
        self.send_header("Content-Length", str(size))
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()

    def _send(self, path: Path) -> None:
        stat = path.stat()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end = (int(found[1]), int(found[2]) + 1) if found else (0, stat.st_size)
        end = min(end, stat.st_size)
        span = f"bytes {start}-{end - 1}/{stat.st_size}" if found else ""
        self._head(206 if found else 200, end - start, stat.st_mtime, span)
        self.wfile.flush()
        if self.command == "GET":
            into, begun, first = self.connection.fileno(), time.monotonic(), start
            most = _CHUNK if self.rate else end
            with path.open("rb") as file:
                while start < end:
                    start += os.sendfile(into, file.fileno(), start, min(end - start, most))
                    if self.rate:
                        due = begun + (start - first) / self.rate
                        time.sleep(max(0.0, due - time.monotonic()))

    def _list(self, prefix: str, **given: str) -> None:
        if prefix == "many/":
            found = [(f"{prefix}train-{n:05d}.tar", SIZE, WHEN) for n in range(MANY)]
        else:
            paths = sorted(self.folder.iterdir())
            found = [(prefix + p.name, p.stat().st_size, p.stat().st_mtime) for p in paths]
        start = int(given.get("continuation-token", 0))
        text = "<?xml version='1.0'?><ListBucketResult><Name>bucket</Name>"
        for key, size, when in found[start : start + _PAGE]:
            time_ = datetime.fromtimestamp(int(when), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            text += f"<Contents><Key>{key}</Key><LastModified>{time_}</LastModified>"
            text += f"<ETag>&quot;1&quot;</ETag><Size>{size}</Size></Contents>"
        left = start + _PAGE < len(found)
        text += f"<IsTruncated>{str(left).lower()}</IsTruncated>"
        if left:
            text += f"<NextContinuationToken>{start + _PAGE}</NextContinuationToken>"
        body = f"{text}</ListBucketResult>".encode()
        self._head(200, len(body), WHEN)
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def main() -> None:
    _Handler.folder = Path(sys.argv[1])
    _Handler.latency, _Handler.rate = float(sys.argv[2]), 1e6 * float(sys.argv[3])
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
