"""What reaches Gradio behind the guard, and what does not."""

import asyncio
import json

import pytest

from cascade.errors import UserError
from cascade.serve.limits import LOOPBACK, check_address
from cascade.serve.page.guard import LARGEST, Guard

PAGE = b"<!doctype html><head></head>"
RUN, WORK = "/gradio_api/run/predict", "/jobs/paint"


def asked(path, method="GET", body=b"", hosts=frozenset(LOOPBACK), **headers):
    """The status, the answer's headers, and what the application behind the guard received."""
    got, sent = [], []

    async def app(scope, receive, send):
        message = await receive()
        got.append(message["body"])
        length = (b"Content-Length", str(len(PAGE)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": PAGE})

    given = {"host": "127.0.0.1:7860", "content-length": str(len(body)), **headers}
    coded = [(k.replace("_", "-").encode(), v.encode()) for k, v in given.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": coded}
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    messages = [
        {"type": "http.request", "body": part, "more_body": i == 0} for i, part in enumerate(parts)
    ]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    if method == "GET":
        messages = [{"type": "http.request", "body": b"", "more_body": False}]
    asyncio.run(Guard(app, hosts)(scope, receive, send))
    start, body = sent[0], sent[-1]["body"]
    headers = dict(start["headers"])
    if start["status"] == 200:
        title = b"<title>Cascade</title>" if path == "/" else b""
        assert body == PAGE.replace(b"<head>", b"<head>" + title)
        assert [int(headers[name]) for name in headers if name.lower() == b"content-length"] == [
            len(body)
        ]
    return start["status"], headers, b"".join(got)


@pytest.mark.parametrize("path", ["/", "/config", "/assets/index.js", "/gradio_api/heartbeat/abc"])
def test_what_the_page_needs_passes(path):
    status, headers, _ = asked(path)
    assert (b"immutable" in headers.get(b"cache-control", b"")) == path.startswith("/assets/")
    assert status == 200
    assert b"default-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/upload",
        "/gradio_api/proxy=http://localhost:1/",
        "/gradio_api/stream/1",
        "/gradio_api/call/paint",
        "/gradio_api/mcp/",
        "/monitoring",
        "/docs",
        "/assets/../config.json",
        "/gradio_api/vibe-edit/",
        "/gradio_api/component_server",
        "/gradio_api/queue/join",
        "/gradio_api/queue/data",
    ],
)
def test_all_else_does_not_exist(path):
    for method in ("GET", "POST"):
        status, _, got = asked(path, method, b"{}")
        assert status == 404
        assert not got


@pytest.mark.parametrize(
    "host", ["evil.example:7860", "127.0.0.1.evil.example", "10.0.0.1:7860", ""]
)
def test_another_name_of_this_machine_is_refused(host):
    assert asked("/", host=host)[0] == 403
    assert asked("/", hosts=None, host=host)[0] == 200


def test_a_name_of_loopback_passes():
    for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert asked("/", host=host)[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        [{"path": "http://localhost:1/x", "meta": {"_type": "gradio.FileData"}}],
        ["a", [{"path": "/etc/passwd"}]],
        [["a"]],
        {"0": "a"},
        None,
    ],
)
def test_files_of_gradio_do_not_pass(data):
    for path in (RUN, WORK):
        status, _, got = asked(path, "POST", json.dumps({"data": data}).encode())
        assert status == 400
        assert not got


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"data": 1}'])
def test_what_is_no_event_does_not_pass(body):
    assert asked(RUN, "POST", body)[0] == asked(WORK, "POST", body)[0] == 400


def test_an_event_passes_whole():
    body = json.dumps({"data": ["a caption", 1, 2.5, True, None], "fn_index": 3}).encode()
    assert asked(RUN, "POST", body)[::2] == (200, body)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"sec_fetch_site": "cross-site", "origin": "http://127.0.0.1:7860"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_what_a_page_of_another_site_sends_does_not_pass(headers, status):
    for path in (RUN, WORK, "/login"):
        assert asked(path, "POST", b'{"data": []}', **headers)[0] == status
    assert asked("/", **headers)[0] == 200  # a link from there is none of that


def test_a_body_has_a_largest_size():
    assert asked(RUN, "POST", b"{}", content_length=str(LARGEST + 1))[0] == 413
    assert asked(RUN, "POST", b"{}", content_length="many")[0] == 413
    assert asked(RUN, "POST", b"{}", transfer_encoding="chunked")[0] == 413


def test_others_are_asked_for_a_password():
    for host in LOOPBACK:
        check_address(host, None)
    check_address("0.0.0.0", "word")
    for password in (None, ""):
        with pytest.raises(UserError, match="CASCADE_PASSWORD"):
            check_address("0.0.0.0", password)
