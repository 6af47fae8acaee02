"""Asks this job's helper (`cascade.files.stores.server`) to read and write in stores.

The helper is a process of its own, because its client of the stores (obstore) has threads that do
not survive a fork, and data workers are forked. The first process that needs it starts it, and
those forked from that process share it; if it has died, the next who asks starts another. It ends
when all of them have.
"""

import atexit
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cascade
from cascade.errors import TryAgain, UserError

PATIENCE = 600.0  # seconds of retries after which a store that had answered is given up
FIRST_PATIENCE = 60.0  # the same before its first answer, as a name may be misspelt
TIMEOUT = 60.0  # seconds for one request of at most some megabytes
_SLACK = 120.0  # seconds that the helper itself may take
_TRIES = 3  # with a helper that died

_address: str | None = None
_connections: dict[int, "_Connection"] = {}  # by process: a fork must not share its parent's
_helpers: list[subprocess.Popen] = []


class Unreachable(TryAgain):
    """A store did not answer for long: exit code 75, as the same command may succeed later."""


class Changed(UserError):
    """A file in a store is not the version that this process began to read."""


def ask(do: str, **what: Any) -> tuple[dict[str, Any], bytes]:
    """Ask the helper to do something (`server.Server`); return its answer and the bytes read.

    Raises:
        FileNotFoundError: there is no such object.
        Changed, UserError: it changed; the store refuses, or the extra `store` is not installed.
        Unreachable: the store did not answer for `PATIENCE` seconds.
    """
    for _ in range(_TRIES):
        connection = _connection()
        try:
            answer, data = connection.ask({"do": do, **what})
            break
        except (OSError, EOFError):  # the helper died
            _connections.pop(os.getpid()).close()
            _forget()
    else:
        raise Unreachable(f"{what.get('url', 'stores')}: the helper ends: run the command again")
    kind, text = answer.get("error"), answer.get("text", "")
    if kind == "missing":
        raise FileNotFoundError(2, "there is no such object", what["url"])
    if kind:
        raise {"changed": Changed, "unreachable": Unreachable}.get(kind, UserError)(text)
    return answer, data


class _Connection:
    def __init__(self, address: str):
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE + _SLACK)
        self._socket.connect(address)

    def ask(self, what: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            text = json.dumps(what).encode()
            self._socket.sendall(struct.pack("<Q", len(text)) + text)
            answer = json.loads(self._read(*struct.unpack("<Q", self._read(8))))
            return answer, self._read(answer.get("bytes", 0))

    def _read(self, count: int) -> bytes:
        data, seen = bytearray(count), 0
        while seen < count:
            got = self._socket.recv_into(memoryview(data)[seen:])
            if not got:
                raise EOFError
            seen += got
        return bytes(data)

    def close(self) -> None:
        self._socket.close()


def _connection() -> _Connection:
    global _address
    if (own := _connections.get(os.getpid())) is not None:
        return own
    if _address is not None:
        with suppress(OSError):
            return _connections.setdefault(os.getpid(), _Connection(_address))
    _address = _started()
    return _connections.setdefault(os.getpid(), _Connection(_address))


def _started() -> str:
    """Start a helper; return its address."""
    if find_spec("obstore") is None:
        raise UserError(
            "shards in a store need the extra `store`: pip install 'cascade-diffusion[store]'"
        )
    address = str(Path(tempfile.mkdtemp(prefix="cascade-")) / "helper")
    limits = {"patience": PATIENCE, "first_patience": FIRST_PATIENCE, "timeout": TIMEOUT}
    package = str(Path(cascade.__file__).parents[1])
    helper = subprocess.Popen(
        [sys.executable, "-m", "cascade.files.stores.server", address, json.dumps(limits)],
        stdin=subprocess.PIPE,  # it ends when nobody holds the other end
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([package, *_python_path()])},
    )
    if not helper.stdout.readline():
        raise Unreachable(f"the helper for stores ended at once, with code {helper.wait()}")
    _helpers.append(helper)
    return address


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _forget() -> None:
    global _address
    _address = None


@atexit.register
def _end() -> None:
    for helper in _helpers:
        with suppress(OSError):
            helper.stdin.close()
        with suppress(subprocess.TimeoutExpired, OSError):
            helper.wait(2)
