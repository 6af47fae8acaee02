"""The guard in front of Gradio, which offers more than the page needs.

Files, uploads, proxies and everything else that is not listed here do not exist. What a visitor
sends are numbers, switches and texts: Gradio would fetch the addresses that its own form of a file
names. It comes from a page of this server, not from one of another site that the visitor looks at.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

LARGEST = 96 << 20  # bytes of a request: two pictures and a mask

_EXACT = {
    "/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt", "/login",
    "/logout",
}  # fmt: skip
_API = {
    "/gradio_api/startup-events", "/gradio_api/theme.css", "/gradio_api/login_check",
    "/gradio_api/info", "/gradio_api/user", "/gradio_api/app_id", "/gradio_api/token",
}  # fmt: skip
_RUN = "/gradio_api/run/"
STREAMS = "/jobs/"  # where `stream` answers
_ASSETS = "/assets/"  # the names tell the versions
_UNDER = (_ASSETS, "/static/", "/svelte/", "/gradio_api/heartbeat/", _RUN, STREAMS)
_EVENTS = (_RUN, STREAMS)  # what they send is read here first
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
_TITLE = b"<head><title>Cascade</title>"
_KEPT = {"cache-control": "public, max-age=31536000, immutable"}

Plain = str | int | float | bool | None
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
        if scope["method"] == "POST" and not own_page(headers):
            return await answer(send, 403, "pages of other sites are not answered")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST or "transfer-encoding" in headers:
            return await answer(send, 413, f"at most {LARGEST >> 20} MB at a time")
        if scope["method"] == "POST" and scope["path"].startswith(_EVENTS):
            body = await whole(receive)
            if values(body) is None:
                return await answer(send, 400, "only numbers, switches and texts are read")
            receive = after(body, receive)

        send = titled(send) if scope["path"] == "/" else send

        async def sent(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                kept = _KEPT if scope["path"].startswith(_ASSETS) else {}
                own = [(k.encode(), v.encode()) for k, v in {**_HEADERS, **kept}.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        await self.app(scope, receive, sent)


def allowed(path: str) -> bool:
    """Whether the page needs this address."""
    return ".." not in path and (path in _EXACT or path in _API or path.startswith(_UNDER))


def own_page(headers: Mapping[str, str]) -> bool:
    """Whether a page of this server sent the request, or no page at all."""
    if site := headers.get("sec-fetch-site"):
        return site in ("same-origin", "none")
    origin = headers.get("origin")  # browsers tell no site where there is neither TLS nor loopback
    return origin is None or origin.partition("://")[2] == headers.get("host")


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


def values(body: bytes) -> list[Plain] | None:
    """The values that an event sends, or None if they are not numbers, switches and texts alone."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    data = content.get("data") if isinstance(content, dict) else None
    fine = isinstance(data, list) and all(isinstance(value, Plain) for value in data)
    return data if fine else None


def titled(send: Send) -> Send:
    """Sends a page with its title in it, which Gradio's page for the password lacks."""
    held: list[dict[str, Any]] = []

    async def sent(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            held.append(message)
            return
        if held and not message.get("more_body"):
            body = message.get("body", b"").replace(b"<head>", _TITLE, 1)
            length = (b"content-length", str(len(body)).encode())
            others = [one for one in held[0]["headers"] if one[0].lower() != length[0]]
            held[0], message = {**held[0], "headers": [*others, length]}, {**message, "body": body}
        while held:
            await send(held.pop())
        await send(message)

    return sent


async def answer(send: Send, status: int, text: str) -> None:
    """One line of text."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})
