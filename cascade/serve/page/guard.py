"""The guard in front of Gradio, which offers more than the page needs.

Files, uploads, proxies and everything else that is not listed here do not exist. What a visitor
sends are numbers, switches and texts: Gradio would fetch the addresses that its own form of a file
names.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

LARGEST = 96 << 20  # bytes of a request: two pictures and a mask

_EXACT = {
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/login",
    "/logout",
}  # fmt: skip
_API = {
    "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/cancel", "/gradio_api/reset",
    "/gradio_api/startup-events", "/gradio_api/theme.css", "/gradio_api/login_check",
    "/gradio_api/info", "/gradio_api/user", "/gradio_api/app_id", "/gradio_api/token",
}  # fmt: skip
_UNDER = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/", "/gradio_api/run/")
_EVENTS = ("/gradio_api/queue/join", "/gradio_api/run/")  # what they send is read here first
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Guard:
    """An ASGI application around Gradio's, which lets through what the page needs alone.

    Args:
        app: Gradio's.
        hosts: names under which the server may be asked; None: any. A page from elsewhere, whose
            name was made to lead to this machine, is refused so.
    """

    def __init__(self, app: Any, hosts: frozenset[str] | None = None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        host = headers.get("host", "").rsplit(":", 1)[0].strip("[]")
        if self.hosts is not None and host not in self.hosts:
            return await answer(send, 403, "this server answers on this machine alone")
        if not allowed(scope["path"]):
            return await answer(send, 404, "there is nothing here")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST or "transfer-encoding" in headers:
            return await answer(send, 413, f"at most {LARGEST >> 20} MB at a time")
        if scope["method"] == "POST" and scope["path"].startswith(_EVENTS):
            body = await whole(receive)
            if not plain(body):
                return await answer(send, 400, "only numbers, switches and texts are read")
            receive = after(body, receive)

        async def sent(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self.app(scope, receive, sent)


def allowed(path: str) -> bool:
    """Whether the page needs this address."""
    return ".." not in path and (path in _EXACT or path in _API or path.startswith(_UNDER))


async def whole(receive: Receive) -> bytes:
    """The body of a request."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def after(body: bytes, receive: Receive) -> Receive:
    """Receives a body that was read already, and what follows it."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> dict[str, Any]:
        return left.pop() if left else await receive()

    return again


def plain(body: bytes) -> bool:
    """Whether an event's values are numbers, switches and texts alone."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return False
    data = content.get("data") if isinstance(content, dict) else None
    kinds = str | int | float | bool | None
    return isinstance(data, list) and all(isinstance(value, kinds) for value in data)


async def answer(send: Send, status: int, text: str) -> None:
    """One line of text."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
