"""The page of `cascade serve` in a real browser, as wide as a phone and as a desktop."""

import asyncio
import base64
import io
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests import made_sweeps, models

api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core reads the page")

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--no-first-run"]
WIDTHS = (390, 1280)
PATIENCE = 120_000  # milliseconds, of a slow machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not here"),
    pytest.mark.skipif(find_spec("gradio") is None, reason="the extra `web` is not installed"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, the same in other choices, a sweep, and a run that trains."""
    root = tmp_path_factory.mktemp("page") / "runs"
    models.write_model(root / "one")
    shutil.copytree(root / "one", root / "two")
    text = (root / "two/cascade.yaml").read_text()
    (root / "two/cascade.yaml").write_text(text.replace("scale: 2.0", "scale: 3.0"))
    told = made_sweeps.about({"text": ["small", "large"]}, {"scale": [1.0, 3.0]})
    made_sweeps.write(root / "sweep", told, lambda text, scale: 0.5, pictures=True)
    run = root / "training"
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text("images: 4000\n")
    (run / "status.json").write_text('{"images": 2000, "total": 4000}')
    lines = "".join(f"{n},{1 / n},50\n" for n in range(100, 2001, 100))
    (run / "metrics.csv").write_text("images,loss,images_per_second\n" + lines)
    Image.new("RGB", (64, 32), "green").save(run / "samples" / "0000002000.png")
    (run / "heartbeats").mkdir()
    return root


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    """The address of a server in a process of its own."""
    out = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(root), "--port", str(port), "--most-steps", "1000"]
    log = out / "log.txt"
    with log.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "cascade", *words], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        end, found = time.monotonic() + 600, None
        while not found:
            assert time.monotonic() < end, log.read_text()
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
        yield found[0]
        assert server.poll() is None, log.read_text()
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playing:
        found = playing.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(params=WIDTHS)
def page(request, base, browser):
    with opened(base, browser, request.param) as found:
        yield found


class opened:
    """A page in a context of its own, which asks no other host for anything."""

    def __init__(self, base, browser, width):
        self.base, self.context = (
            base,
            browser.new_context(viewport={"width": width, "height": 900}),
        )
        self.context.set_default_timeout(PATIENCE)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])

    def __enter__(self):
        page = self.context.new_page()
        page.asked, page.faults = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(self.base)
        page.get_by_role("button", name="Paint", exact=True).wait_for()
        return page

    def __exit__(self, kind, *_):
        (page,) = self.context.pages
        if kind is None:
            own = (self.base, "data:", "blob:")
            assert [url for url in page.asked if not url.startswith(own)] == []
            assert page.faults == []
        self.context.close()


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def done(page, place, words="Done."):
    page.locator(f"{place} .note", has_text=words).first.wait_for()


def choose(page, label, text):
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=text, exact=True).click()


def settings(page, **values):
    """Opens the fields of the stages, and fills some in."""
    page.get_by_role("button", name="Guidance and steps of each stage").click()
    for name, value in values.items():
        page.get_by_label(name.replace("_", ": "), exact=True).fill(str(value))


def check(page):
    """Nothing is wider than the page, and axe-core finds nothing serious."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found = axe.Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(serious, indent=1)[:4000]


def picture(color, shape="ellipse"):
    image = Image.new("RGB", (48, 48), "lightgrey")
    getattr(ImageDraw.Draw(image), shape)((12, 12, 34, 34), fill=color)
    out = io.BytesIO()
    image.save(out, "PNG")
    return {"name": f"{color}.png", "mimeType": "image/png", "buffer": out.getvalue()}


def test_keyboard_alone_paints(page, root):
    def press_until(label):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.labels?.[0]?.innerText ?? ''").startswith(
                label
            ):
                return
        raise AssertionError(f"no Tab leads to {label}")

    press_until("Caption")
    page.keyboard.press("Control+a")
    page.keyboard.type("a 'red' <b>circle</b>")
    page.keyboard.press("Enter")
    done(page, "#easel")
    assert page.locator("#easel .open img").count() == 1
    assert page.locator("#easel b").count() == 0
    page.locator("#easel .copy").first.focus()
    page.keyboard.press("Enter")
    page.locator("#easel .copy", has_text="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.locator("#easel pre").first.inner_text()
    assert command.startswith(f"cascade sample --model {root}/one")
    page.locator("#easel .open").first.focus()
    page.keyboard.press("Enter")
    page.locator("dialog img").wait_for()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    with page.expect_download() as kept:
        page.locator("#easel .save").first.click()
    image = Image.open(kept.value.path(), formats=["PNG"])
    image.load()
    assert image.text["cascade.command"] == command
    assert image.text["cascade.caption"] == "a 'red' <b>circle</b>"
    check(page)


def test_pictures_appear_as_they_are_denoised_and_can_be_cancelled(page):
    settings(page, decoder_steps=1000)
    check(page)
    page.get_by_role("button", name="Paint", exact=True).click()
    page.locator("#easel [role=progressbar]").wait_for()
    page.locator("#easel .sheet img").wait_for()
    page.get_by_role("button", name="Cancel", exact=True).click()
    done(page, "#easel", "Cancelled.")
    page.get_by_label("decoder: steps", exact=True).fill("2")
    page.get_by_label("Number of pictures", exact=True).fill("3")
    page.get_by_role("button", name="Paint", exact=True).click()
    done(page, "#easel")
    assert page.locator("#easel figure").count() == 3


def test_every_edit(page):
    tab(page, "Edit")
    page.locator("input.pick").first.set_input_files(picture("red"))
    page.locator(".told", has_text="red.png is chosen.").wait_for()

    def edit():
        old = "e => e.querySelectorAll('.copied, [role=alert]').forEach(one => one.remove())"
        page.locator("#edited").evaluate(old)
        page.get_by_role("button", name="Edit", exact=True).click()
        page.locator("#edited .copied, #edited [role=alert]").first.wait_for()
        assert page.locator("#edited [role=alert]").count() == 0

    edit()
    page.get_by_label("Start from the picture's own noise").check()
    edit()
    page.get_by_role("radio", name="Change a picture").check()
    page.get_by_label("From this caption").fill("a red circle")
    page.get_by_label("To this caption").fill("a blue circle")
    edit()
    frames = page.locator("#edited .frame")
    assert frames.count() == 7
    page.locator("#edited .along").focus()
    page.keyboard.press("End")
    assert frames.last.is_visible()
    assert not frames.first.is_visible()
    check(page)
    page.get_by_role("radio", name="Paint between").check()
    page.locator("input.pick").nth(1).set_input_files(picture("blue", "rectangle"))
    page.locator(".told", has_text="blue.png is chosen.").wait_for()
    edit()
    page.get_by_role("radio", name="Paint a part anew").check()
    page.get_by_label("Caption of the result").fill("a yellow square")
    canvas = page.locator("canvas.board").first
    canvas.focus()
    page.keyboard.press(" ")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    edit()
    data = page.locator("#edited .open img").get_attribute("src")
    shown = base64.b64decode(data.partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(shown), formats=["PNG"]))
    given = np.asarray(Image.open(io.BytesIO(picture("red")["buffer"]), formats=["PNG"]))
    assert pixels.shape == given.shape
    changed = (pixels != given).any(-1)
    assert changed[24, 24]  # where the brush began
    assert 0.02 < changed.mean() < 0.5
    check(page)
    page.get_by_role("radio", name="Paint beyond").check()
    page.get_by_label("Pixels below").fill("24")
    edit()
    assert page.evaluate("document.querySelector('#edited .open img').naturalHeight") == 72


def test_cells_models_and_runs_are_compared(page, root):
    tab(page, "Compare")
    choose(page, "A", f"{root}/sweep")
    page.get_by_label("A: scale", exact=True).wait_for()
    choose(page, "B", f"{root}/sweep")
    page.get_by_label("B: scale", exact=True).wait_for()
    choose(page, "B: scale", "3.0")
    page.locator("#viewer .names", has_text="scale 3.0, seed 0 on the right").wait_for()
    page.locator("#facts", has_text="axis scale").wait_for()
    numbers = page.locator("#facts table", has_text="clip_score")
    assert re.search(r"0\.\d+ \[0\.\d+, 0\.\d+\]", numbers.inner_text())
    first, second = (
        page.locator(f"#viewer .{one} img").get_attribute("src") for one in ("first", "second")
    )
    assert first != second
    swipe = page.locator("#viewer .swipe")
    swipe.focus()
    page.keyboard.press("Home")
    assert (
        page.evaluate("document.querySelector('.viewer').style.getPropertyValue('--swipe')") == "0%"
    )
    page.locator("#viewer .views").focus()
    for _ in range(4):
        page.keyboard.press("+")
    sizes = page.evaluate(
        "[...document.querySelectorAll('.pane img')].map(e => e.getBoundingClientRect().width /"
        " e.parentElement.getBoundingClientRect().width)"
    )
    assert sizes == pytest.approx([2, 2], abs=1e-4)  # both, in step
    check(page)
    choose(page, "A", f"{root}/one")
    choose(page, "B", f"{root}/two")
    page.locator("#facts", has_text="decoder.scale").wait_for()
    page.get_by_label("Captions, one in each line").fill("a red circle\na blue square")
    page.get_by_role("button", name="Paint with each").click()
    done(page, "#viewer")
    assert page.locator("#viewer .store img").count() == 4
    page.locator("#viewer .row").select_option("1")
    alt = page.locator("#viewer .second img").get_attribute("alt")
    assert alt == f"a blue square, {root}/two"
    check(page)


def test_a_training_is_watched(page, root):
    (root / "training/heartbeats/rank0.json").write_text("{}")
    (root / "training/status.json").write_text('{"images": 2000, "total": 4000}')
    tab(page, "Watch")
    page.locator("#runs", has_text="2,000 of 4,000").wait_for()
    done(page, "#run", f"{root}/training is running")
    assert page.locator("#run .note", has_text="time left 40 s").count() == 1
    assert page.locator("#run svg polyline").count() == 1
    assert page.locator("#run img").count() == 1
    (root / "training/status.json").write_text('{"images": 3000, "total": 4000}')
    page.locator("#runs", has_text="3,000 of 4,000").wait_for()
    check(page)


def test_a_tab_that_closes_leaves_the_device_to_others(base, browser):
    with opened(base, browser, 1280) as page:
        settings(page, decoder_steps=1000)
        page.get_by_label("Number of pictures", exact=True).fill("16")
        page.get_by_role("button", name="Paint", exact=True).click()
        page.locator("#easel .sheet img").first.wait_for()
    begin = time.monotonic()
    with opened(base, browser, 1280) as page:
        page.get_by_role("button", name="Paint", exact=True).click()
        done(page, "#easel")
    assert time.monotonic() - begin < 60


def test_nothing_of_one_visitor_is_shown_to_another(base, browser):
    with opened(base, browser, 1280) as one, opened(base, browser, 1280) as two:
        one.get_by_label("Caption", exact=True).fill("a secret circle")
        one.get_by_role("button", name="Paint", exact=True).click()
        done(one, "#easel")
        assert "Nothing is painted yet." in two.locator("#easel").inner_text()
        two.reload()
        two.get_by_role("button", name="Paint", exact=True).wait_for()
        assert "secret" not in two.content()
        addresses = [url for url in one.asked if "file=" in url or "upload" in url]
        assert addresses == []


def test_a_hundred_requests_at_once(base, browser):
    """Each is done, or told that too many wait; and then the server still paints."""
    with httpx.Client(base_url=base, trust_env=False) as client:
        config = client.get("/config").json()
    named = {one["id"]: one["props"].get("label") for one in config["components"]}
    paint = next(
        one for one in config["dependencies"]
        if [named.get(i) for i in one["inputs"]][:3] == ["Model", "Caption", "Negative caption"]
    )  # fmt: skip
    values = {one["id"]: one["props"].get("value") for one in config["components"]}
    data = [values.get(i) for i in paint["inputs"]]

    async def ask(client, i):
        session = f"visitor{i:05}"
        event = {"data": data, "fn_index": paint["id"], "session_hash": session}
        answer = await client.post("/gradio_api/queue/join", json=event)
        if answer.status_code != 200:
            return answer.status_code
        url = f"/gradio_api/queue/data?session_hash={session}"
        async with client.stream("GET", url) as stream:
            async for line in stream.aiter_lines():
                told = json.loads(line[5:]) if line.startswith("data:") else {}
                if told.get("msg") == "process_completed":
                    return str(told["output"])
        return None

    async def everyone():
        limits = httpx.Limits(max_connections=None)
        options = {"base_url": base, "timeout": 300, "limits": limits, "trust_env": False}
        async with httpx.AsyncClient(**options) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(100)))

    with ThreadPoolExecutor(1) as pool:  # this thread's loop is playwright's
        answers = pool.submit(asyncio.run, everyone()).result()
    fine = [one for one in answers if isinstance(one, str)]
    assert len(fine) + answers.count(503) == 100
    assert len(fine) > 50
    with opened(base, browser, 1280) as page:
        page.get_by_role("button", name="Paint", exact=True).click()
        done(page, "#easel")


def test_a_model_that_is_removed_while_it_is_shown(base, browser, root):
    shutil.copytree(root / "one", root / "gone")
    with opened(base, browser, 1280) as page:
        choose(page, "Model", f"{root}/gone")
        page.get_by_role("button", name="Paint", exact=True).click()
        done(page, "#easel")
        shutil.rmtree(root / "gone")
        page.get_by_role("button", name="Paint", exact=True).click()
        page.locator("#easel [role=alert]", has_text="not there any more").wait_for()
        choose(page, "Model", f"{root}/one")
        page.get_by_role("button", name="Paint", exact=True).click()
        done(page, "#easel")


def test_fifty_hostile_files_are_refused_on_the_page(base, browser):
    from tests.test_serve_editing import hostile

    with opened(base, browser, 1280) as page:
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


def test_screens(page, tmp_path):
    """The pages as pictures, for a person to look at."""
    page.get_by_role("button", name="Paint", exact=True).click()
    done(page, "#easel")
    for name in ("Paint", "Edit", "Compare", "Watch"):
        tab(page, name)
        time.sleep(1)
        shot = Path(tmp_path, f"{name}.png")
        page.screenshot(path=shot, full_page=True)
        assert len(np.unique(np.asarray(Image.open(shot, formats=["PNG"])))) > 20
