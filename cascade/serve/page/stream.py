"""Where the page asks for work: an address of its own beside Gradio's.

Gradio's queue and events took longer than a small cascade paints. Here a request is answered with a
line of JSON for each state of the work, an HTML text, for as long as the browser stays.
"""

import asyncio
import contextlib
import json
from typing import Any

from cascade.serve.page.following import Desk
from cascade.serve.page.guard import STREAMS, Receive, Scope, Send, answer, values, whole

_CHECK = "/gradio_api/login_check"  # Gradio says there whether a visitor gave the password
_HEADERS = [
    (b"content-type", b"application/x-ndjson"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy is to pass each line on at once
]


class Streams:
    """An ASGI application around Gradio's, within `Guard`, which answers for all under `STREAMS`.

    Args:
        app: Gradio's, which knows who gave the password.
    """

    def __init__(self, app: Any, desk: Desk):
        self.app, self.desk = app, desk

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(STREAMS):
            return await self.app(scope, receive, send)
        part = scope["path"].removeprefix(STREAMS)
        if part not in self.desk.parts or scope["method"] != "POST":
            return await answer(send, 404, "there is nothing here")
        if not await self._admitted(scope):
            return await answer(send, 401, "load the page again, and give the password")
        if (data := values(await whole(receive))) is None:
            return await answer(send, 400, "only numbers, switches and texts are read")
        work = asyncio.ensure_future(self._sent(part, data, send))
        gone = asyncio.ensure_future(_left(receive))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, gone):
            task.cancel()
        failed, _ = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(failed, Exception):
            raise failed

    async def _sent(self, part: str, data: Any, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        async with contextlib.aclosing(self.desk.pages(part, data)) as pages:
            async for page in pages:
                line = json.dumps(page).encode() + b"\n"
                await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _admitted(self, scope: Scope) -> bool:
        """Whether Gradio lets this visitor in."""
        found: list[int] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                found.append(message["status"])

        check = {"method": "GET", "path": _CHECK, "raw_path": _CHECK.encode(), "query_string": b""}
        await self.app({**scope, **check}, receive, send)
        return found == [200]


async def _left(receive: Receive) -> None:
    """Returns once the browser has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
