"""Visitors who come in numbers, leave early or mean harm: what the page makes of them."""

import asyncio
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.browsing import (
    NEEDS,
    check,
    choose,
    done,
    opened,
    paint,
    picture,
    serving,
    settings,
    tab,
)

pytest_plugins = "tests.browsing"
pytestmark = NEEDS


def test_a_tab_that_closes_leaves_the_device_to_others(base, browser):
    with opened(base, browser) as page:
        settings(page, decoder_steps=1000)
        page.get_by_label("Number of pictures", exact=True).fill("16")
        paint(page)
        page.locator("#easel .sheet img").first.wait_for()
    begin = time.monotonic()
    with opened(base, browser) as page:
        paint(page)
        done(page, "#easel")
    assert time.monotonic() - begin < 60


def test_nothing_of_one_visitor_is_shown_to_another(base, browser):
    with opened(base, browser) as one, opened(base, browser) as two:
        one.get_by_label("Caption", exact=True).fill("a secret circle")
        paint(one)
        done(one, "#easel")
        assert "Nothing is painted yet." in two.locator("#easel").inner_text()
        two.reload()
        two.get_by_role("button", name="Paint", exact=True).wait_for()
        assert "secret" not in two.content()
        addresses = [url for url in one.asked if "file=" in url or "upload" in url]
        assert addresses == []


def values(base):
    """What a page sends when nothing of it was changed, for the part that paints."""
    with httpx.Client(base_url=base, trust_env=False) as client:
        config = client.get("/config").json()
    named = {one["id"]: one["props"].get("label") for one in config["components"]}
    inputs = next(
        one["inputs"] for one in config["dependencies"]
        if [named.get(i) for i in one["inputs"]][:3] == ["Model", "Caption", "Negative caption"]
    )  # fmt: skip
    of = {one["id"]: one["props"].get("value") for one in config["components"]}
    return [of.get(i) for i in inputs]


def test_a_hundred_requests_at_once(base, browser):
    """Each is done, or told that too many wait; and then the server still paints."""
    data = values(base)

    async def ask(client):
        answer = await client.post("/jobs/paint", json={"data": data})
        assert answer.status_code == 200
        return json.loads(answer.text.splitlines()[-1])

    async def everyone():
        limits = httpx.Limits(max_connections=None)
        options = {"base_url": base, "timeout": 300, "limits": limits, "trust_env": False}
        async with httpx.AsyncClient(**options) as client:
            return await asyncio.gather(*(ask(client) for _ in range(110)))

    with ThreadPoolExecutor(1) as pool:  # this thread's loop is playwright's
        answers = pool.submit(asyncio.run, everyone()).result()
    fine = ["Command line" in one for one in answers]
    refused = ["requests wait already" in one for one in answers]
    assert sum(fine) + sum(refused) == 110
    assert sum(fine) >= 100
    with opened(base, browser) as page:
        paint(page)
        done(page, "#easel")


def test_a_model_that_is_removed_while_it_is_shown(base, browser, root):
    shutil.copytree(root / "one", root / "gone")
    with opened(base, browser) as page:
        choose(page, "Model", f"{root}/gone")
        paint(page)
        done(page, "#easel")
        shutil.rmtree(root / "gone")
        paint(page)
        page.locator("#easel [role=alert]", has_text="not there any more").wait_for()
        choose(page, "Model", f"{root}/one")
        paint(page)
        done(page, "#easel")


def test_fifty_hostile_files_are_refused_on_the_page(base, browser):
    from tests.test_serve_editing import hostile

    with opened(base, browser) as page:
        tab(page, "Edit")
        for i, data in enumerate(hostile()):
            file = {"name": f"file{i}.png", "mimeType": "image/png", "buffer": data}
            page.locator("input.pick").first.set_input_files(file)
            page.locator(".told", has_text=f"file{i}.png").wait_for()
            page.locator("#edited").evaluate("e => e.querySelector('[role=alert]')?.remove()")
            page.get_by_role("button", name="Edit", exact=True).click()
            page.locator("#edited [role=alert]").wait_for()  # the same words, drawn anew
        page.locator("input.pick").first.set_input_files(picture("red"))
        page.locator(".told", has_text="red.png").wait_for()
        page.get_by_role("button", name="Edit", exact=True).click()
        page.locator("#edited .copied").first.wait_for()


def test_others_give_the_password(root, browser, tmp_path):
    """Through another address of this machine, which counts as others."""
    words = ("--host", "127.0.0.2")
    log = tmp_path / "log.txt"
    with serving(root, log, *words, CASCADE_PASSWORD="a long word") as base:
        with httpx.Client(base_url=base, trust_env=False) as client:
            for path in ("/jobs/paint", "/jobs/edit", "/jobs/compare"):
                assert client.post(path, json={"data": []}).status_code == 401
            assert client.post("/gradio_api/run/predict", json={"data": []}).status_code == 401
            assert client.get("/config").status_code == 401
            elsewhere = {"origin": "http://elsewhere.example"}
            given = {"username": "a", "password": "a long word"}
            assert client.post("/login", data=given, headers=elsewhere).status_code == 403
        with opened(base, browser, begin="Login") as page:
            check(page)
            page.get_by_text("Any name").wait_for()

            def login(word):
                page.get_by_label("username").fill("anybody")
                page.get_by_label("password").fill(word)
                page.keyboard.press("Enter")

            login("a short word")
            page.get_by_text("Incorrect Credentials").wait_for()
            login("a long word")
            page.get_by_role("button", name="Paint", exact=True).wait_for()
            paint(page)
            done(page, "#easel")
            page.context.clear_cookies()
            paint(page)
            page.locator("#easel [role=alert]", has_text="give the password").wait_for()
