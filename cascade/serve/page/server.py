"""The server around the page: where it answers, and to whom."""

import hmac
import os
from collections.abc import Callable

# Before Gradio is imported, which reads them then.
os.environ.update(
    GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_RUN_HISTORY="False",
    GRADIO_SHARE="False", GRADIO_MCP_SERVER="False", GRADIO_SSR_MODE="False",
)  # fmt: skip

from starlette.middleware import Middleware

from cascade.errors import UserError
from cascade.serve.limits import LOOPBACK, Limits
from cascade.serve.line import Line
from cascade.serve.page.app import CSS, HEAD, THEME, page
from cascade.serve.page.following import Desk
from cascade.serve.page.guard import Guard
from cascade.serve.page.stream import Streams
from cascade.serve.places import Places


def same(given: str, password: str) -> bool:
    """Whether they are equal, in a time that does not tell how far they agree."""
    return hmac.compare_digest(given.encode(), password.encode())


def run(
    line: Line,
    places: Places,
    limits: Limits,
    host: str,
    port: int | None,
    password: str | None,
    told: Callable[[str], None],
) -> None:
    """Serve the page until it is interrupted.

    Args:
        port: None: the first free one from 7860.
        password: of anybody's name; None: none is asked for.
        told: is called with the address, once the page is there.

    Raises:
        UserError: the port is taken.
    """
    desk = Desk(line)
    blocks = page(desk, places, limits)
    blocks.queue(api_open=False)
    hosts = frozenset(LOOPBACK) if host in LOOPBACK else None
    around = [Middleware(Guard, hosts=hosts), Middleware(Streams, desk=desk)]
    auth = (lambda name, given: same(given, password)) if password else None
    try:
        _, url, _ = blocks.launch(
            server_name=host, server_port=port, auth=auth, quiet=True, share=False, inbrowser=False,
            prevent_thread_lock=True, footer_links=[], run_history=False, ssr_mode=False, pwa=False,
            mcp_server=False, enable_monitoring=False, theme=THEME, css=CSS, head=HEAD,
            app_kwargs={"middleware": around}, auth_message="Any name, and this server's password.",
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {port}: {error}; choose another --port") from None
    told(url)
    blocks.block_thread()
