"""The client of the stores, obstore, and what its failures mean. Only the helper imports this.

obstore's own retries are off: `helper` repeats all that may succeed later, short bodies among it.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import obstore
from obstore import exceptions
from obstore.store import from_url

_KINDS = {
    exceptions.NotFoundError: "missing",
    FileNotFoundError: "missing",
    exceptions.PreconditionError: "changed",
    exceptions.PermissionDeniedError: "refused",
    exceptions.UnauthenticatedError: "refused",
    exceptions.InvalidPathError: "refused",
    exceptions.NotSupportedError: "refused",
    exceptions.UnknownConfigurationKeyError: "refused",
}
_PASSING = {408, 425, 429, 500, 502, 503, 504, 509, 529}
_STATUS = re.compile(r"status(?: code)?:? (\d{3})")
# Values of the environment that no message may contain.
_SECRET = re.compile("KEY|SECRET|TOKEN|PASSWORD|SAS|CREDENTIAL", re.IGNORECASE)


class Version(NamedTuple):
    """What identifies one version of a file; see `places.Stat`."""

    bytes: int
    mtime_ns: int
    version: str = ""


class Failure(Exception):
    """A request failed: "missing", "changed", "refused", "unreachable", or "passing" for now."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class Stores:
    """Objects by their URLs, in one attempt each. Raises Failure."""

    def __init__(self, timeout: float):
        self.timeout = timedelta(seconds=timeout)
        self._stores: dict[str, Any] = {}

    async def stat(self, url: str) -> Version:
        with _explained(url):
            store, path = self._of(url)
            return _version(await obstore.head_async(store, path))

    async def list(self, url: str) -> list[tuple[str, Version]]:
        """Return the names of the files in a folder, and their versions."""
        with _explained(url):
            store, path = self._of(url)
            found = await obstore.list_with_delimiter_async(store, path and f"{path}/")
            rows = ((meta["path"].rpartition("/")[2], _version(meta)) for meta in found["objects"])
            return sorted(rows)

    async def get(
        self, url: str, version: Version | None, start: int, end: int | None
    ) -> memoryview:
        """Return bytes of a file.

        Args:
            version: of which it must be; None: any.
            end: None: the end of the file, and `start` is 0.
        """
        options: dict[str, Any] = {}
        if end is not None:
            options["range"] = (start, end)
        if version and version.version and not version.version.startswith("W/"):
            options["if_match"] = version.version
        with _explained(url):
            store, path = self._of(url)
            found = await obstore.get_async(store, path, options=options)
            now = _version(found.meta)
            if version is not None and not _same(now, version):
                raise Failure("changed", _changed(url))
            data = memoryview(await found.bytes_async())
        if len(data) != (now.bytes if end is None else end - start):
            raise Failure("passing", "the answer was cut short")
        return data

    async def put(self, url: str, file: str) -> None:
        """Upload a file; it appears whole."""
        with _explained(url):
            store, path = self._of(url)
            with open(file, "rb") as content:
                await obstore.put_async(store, path, content)

    def _of(self, url: str) -> tuple[Any, str]:
        found = urlsplit(url)
        root = f"{found.scheme}://{found.netloc}"
        if root not in self._stores:
            plain = found.scheme == "http" or any(
                value.startswith("http://")
                for name, value in os.environ.items()
                if name.startswith(("AWS_ENDPOINT", "GOOGLE_", "AZURE_"))
            )
            client = {"timeout": self.timeout, "connect_timeout": timedelta(seconds=10)}
            self._stores[root] = from_url(
                root,
                client_options={**client, **({"allow_http": True} if plain else {})},
                retry_config={"max_retries": 0, "retry_timeout": self.timeout},
            )
        return self._stores[root], unquote(found.path).lstrip("/")


def _version(meta: Any) -> Version:
    mtime = int(meta["last_modified"].timestamp())
    return Version(meta["size"], mtime * 10**9, meta.get("e_tag") or "")


def _same(now: Version, then: Version) -> bool:
    if now.version and then.version:
        return (now.bytes, now.version) == (then.bytes, then.version)
    return (now.bytes, now.mtime_ns) == (then.bytes, then.mtime_ns)


def _changed(url: str) -> str:
    return (
        f"{url} has changed since this process began to read it: restore it, or index the shards "
        "again and choose another run=..."
    )


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn errors of the client into a Failure, whose text holds no credentials."""
    try:
        yield
    except (exceptions.BaseError, OSError, ValueError) as error:
        text = plain(str(error))
        kind = next((k for of, k in _KINDS.items() if isinstance(error, of)), "passing")
        status = _STATUS.search(text)
        if kind == "passing" and status:
            kind = "passing" if int(status[1]) in _PASSING else "refused"
        if kind == "changed":
            text = _changed(url)
        elif kind == "refused":
            text = f"{url}: the store refuses ({text}): check the name, the region and credentials"
        raise Failure(kind, text) from None


def plain(text: str) -> str:
    """Return the first line of an error without queries of URLs and secrets of the environment."""
    line = text.strip().partition("\n")[0]
    line = re.sub(r"\?[^\s\"')]*", "", line)
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) > 7:
            line = line.replace(value, "...")
    return line[:300]
