"""The page of `cascade serve` in headless Chromium: a server, a browser, and what tests do there.

Test modules that name this one in `pytest_plugins` have its fixtures, and carry the marks `NEEDS`.
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from PIL import Image, ImageDraw

from tests import made_sweeps, models

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--no-first-run"]
NARROW, WIDE = 390, 1280
PATIENCE = 120_000  # milliseconds, of a slow machine
TABS = ("Paint", "Edit", "Compare", "Watch")

LACKS = [name for name in ("gradio", "playwright", "axe_playwright_python") if not find_spec(name)]
NEEDS = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not here"),
    pytest.mark.skipif(bool(LACKS), reason=f"not installed: {', '.join(LACKS)}"),
]

# What sticks out of the page or of its part of it, and short words that are broken over lines.
OVERFLOWS = """() => {
  const clipped = e => e.closest(".scroll *, pre *, .views, .hidden, [aria-hidden=true]");
  const parts = "#easel, #edited, #viewer, #facts, #run, #runs";
  const end = e => (e.closest(parts) ?? document.documentElement).getBoundingClientRect().right;
  const over = [...document.body.querySelectorAll("*")].filter(e => {
    const box = e.getBoundingClientRect();
    return e.checkVisibility() && box.width > 1 && box.height > 1 && !clipped(e)
      && (box.right > end(e) + 1 || box.left < -1);
  });
  const broken = [...document.querySelectorAll("th, td, .note, label, button")].flatMap(e => {
    const walker = document.createTreeWalker(e, NodeFilter.SHOW_TEXT), words = [];
    for (let node; (node = walker.nextNode()); )
      for (const word of node.data.matchAll(/[^\\s\\/,-]{2,20}/g)) {
        const range = document.createRange();
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map(box => box.top)).size > 1) words.push(word[0]);
      }
    return e.checkVisibility() ? words : [];
  });
  return [...over.map(e => e.outerHTML.slice(0, 160)), ...broken];
}"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, the same in other choices, a sweep, and a run that trains."""
    return written(tmp_path_factory.mktemp("page") / "runs")


def written(root):
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


@contextmanager
def serving(root, log, *words, **variables):
    """The address of a server in a process of its own, which has to survive."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cascade", "serve", str(root), "--port", str(port), *words]
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **variables}
        )
    try:
        end, found = time.monotonic() + 600, None
        while not found:
            assert time.monotonic() < end, log.read_text()
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
            found = re.search(r"http://[\d.]+:\d+", log.read_text())
        yield found[0]
        assert server.poll() is None, log.read_text()
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    """The address of a server."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serving(root, log, "--most-steps", "1000") as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playing:
        found = playing.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(params=[(NARROW, "light"), (WIDE, "dark")], ids=["phone", "desktop"])
def page(request, base, browser):
    with opened(base, browser, *request.param) as found:
        yield found


@contextmanager
def opened(base, browser, width=WIDE, scheme="light", begin="Paint"):
    """A page in a context of its own, which asks no other host for anything.

    Args:
        begin: the button to wait for.
    """
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    try:
        page = context.new_page()
        page.asked, page.faults = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto(base)
        page.get_by_role("button", name=begin, exact=True).wait_for()
        yield page
        own = (base, "data:", "blob:")
        assert [url for url in page.asked if not url.startswith(own)] == []
        assert page.faults == []
    finally:
        context.close()


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def paint(page):
    page.get_by_role("button", name="Paint", exact=True).click()


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
    """Nothing is wider than the page, no word is broken, and axe-core finds nothing serious."""
    from axe_playwright_python.sync_playwright import Axe

    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wrong = page.evaluate(OVERFLOWS)
    assert not wrong, wrong
    found = Axe().run(page).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert not serious, json.dumps(serious, indent=1)[:4000]


def picture(color, shape="ellipse"):
    """A file as a visitor chooses it."""
    image = Image.new("RGB", (48, 48), "lightgrey")
    getattr(ImageDraw.Draw(image), shape)((12, 12, 34, 34), fill=color)
    out = io.BytesIO()
    image.save(out, "PNG")
    return {"name": f"{color}.png", "mimeType": "image/png", "buffer": out.getvalue()}
