"""A sweep's page in a real browser, as wide as a phone and as a desktop, by day and by night.

With scripts, menus and sliders change the pictures; without, nothing of the page is missing;
nothing is loaded from outside; axe finds nothing serious.
"""

import html
import json
import re
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from cascade.cli import main
from tests import made_sweeps

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
NIGHT = "--blink-settings=preferredColorScheme=0"
WIDTHS = {"phone": 390, "desktop": 1280}
# Loads the page in a frame of a given width, and writes down how wide it and its parts are.
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe src="{page}" style="width:{width}px;height:800px;border:0"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const wide = e => e.getBoundingClientRect().right + frame.contentWindow.scrollX;
  const scrolled = e => e.closest(".scroll, .row");
  document.querySelector("pre").textContent = JSON.stringify({{
    width: root.clientWidth, needed: root.scrollWidth,
    over: [...page.body.querySelectorAll("*")].filter(e => !scrolled(e) && wide(e) > {width} + 1)
      .map(e => e.outerHTML.slice(0, 80)),
    images: [...page.images].map(i => [i.naturalWidth, i.getBoundingClientRect().width]),
    across: [...page.querySelectorAll(".panels")].map(e =>
      new Set([...e.children].map(c => c.getBoundingClientRect().left)).size),
    scrollable: [...page.querySelectorAll(".scroll, .row")].map(e =>
      getComputedStyle(e).overflowX),
  }});
}};
</script>"""

# Loads pages in frames of their own, and then writes down what a script finds in them.
FRAMES = """<!doctype html><meta charset="utf-8"><body style="margin:0">{frames}<pre></pre><script>
const frames = Object.fromEntries([...document.querySelectorAll("iframe")].map(f => [f.id, f]));
const set = (input, value) => {{
  input.value = value;
  for (const kind of ["input", "change"]) input.dispatchEvent(new Event(kind, {{bubbles: true}}));
}};
const later = n => new Promise(done => setTimeout(done, n));
onload = async () => {{
  const found = await (async () => {{ {script} }})().catch(error => String(error.stack));
  document.querySelector("pre").textContent = JSON.stringify(found);
}};
</script>"""
COMPARE = """
const page = frames.scripted.contentDocument, one = s => page.querySelector(s);
const [first, second] = page.querySelectorAll(".view"), image = v => v.querySelector("img");
const [left, right] = page.querySelectorAll(".compare fieldset");
const place = v => [...page.querySelectorAll("figure[data-cell] img")]
  .filter(i => i.src === image(v).src).map(i => JSON.parse(i.parentNode.dataset.cell));
const told = {begin: [place(first), place(second)]};
told.numbers = left.querySelector("p").textContent;
const menus = fieldset => [...fieldset.querySelectorAll("select")];
told.menus = menus(left).map(m => [m.labels[0].textContent.split(" ")[0], m.value]);
set(menus(left)[0], "text_32");
set(menus(right)[1], "s");
told.chosen = [place(first), place(second)];
told.alt = image(first).alt;
set(one("[name=share]"), 25);
told.swiped = getComputedStyle(second).clipPath;
one("[value=flip]").click();
const seen = () => [first, second].map(v => getComputedStyle(v).visibility === "visible");
told.flipped = [seen()];
one("button").click();
told.flipped.push(seen());
told.said = one("[role=status]").textContent;
one("[value=beside]").click();
await later(100);
const wide = v => Math.round(10 * image(v).getBoundingClientRect().width / v.clientWidth) / 10;
told.zoomed = [wide(first), wide(second)];
set(one("[name=zoom]"), 4);
first.scrollLeft = 50;
first.dispatchEvent(new Event("scroll"));  // without a screen Chromium may send none
told.zoomed.push(wide(first), wide(second), second.scrollLeft);
const bare = frames.bare.contentDocument;
told.bare = [...bare.querySelectorAll("figure[data-cell] img")]
  .filter(i => i.naturalWidth && i.getClientRects().length).length;
told.bareSection = bare.querySelector(".compare").getClientRects().length;
told.titles = [frames.guarded, frames.open].map(f => f.contentDocument.title);
const axe = f => f.contentWindow.axe.run({resultTypes: ["violations"]}).then(r => r.violations
  .map(v => [v.id, v.impact, v.nodes[0].html.slice(0, 90)]));
if (frames.axe) told.axe = await axe(frames.axe), told.poor = await axe(frames.poor);
return told;
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not here")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "runs"
    told = made_sweeps.about(
        {"text": ["untrained", "text_32", "a_long_name_of_an_encoder"], "unet": ["s", "l"]},
        {"scale": [1, 3]},
        name="text_x_unet",
        along="scale",
        control="untrained",
        question="A " + "long question " * 20,
    )
    made_sweeps.write(
        folder,
        told,
        lambda text, unet, scale: 0.4 + 0.2 * (text == "text_32") + 0.1 * (unet == "l"),
        pictures=True,
    )
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


def browse(tmp_path, *arguments):
    """Runs Chromium with an empty profile, and returns what it prints."""
    profile = tmp_path / "profile"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout


@pytest.mark.parametrize("kind", WIDTHS)
def test_nothing_is_wider_than_the_page(page, tmp_path, kind):
    width = WIDTHS[kind]
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width))
    told = browse(
        tmp_path,
        "--allow-file-access-from-files",
        "--window-size=1400,900",
        "--virtual-time-budget=10000",
        "--dump-dom",
        frame.as_uri(),
    )
    found = json.loads(html.unescape(re.search("<pre>(.*?)</pre>", told, re.S)[1]))
    assert found["needed"] <= found["width"] <= width
    assert found["over"] == []
    assert found["scrollable"]
    assert set(found["scrollable"]) == {"auto"}
    assert all(natural > 0 and 100 < shown <= width for natural, shown in found["images"])
    assert set(found["across"][:2]) == {1 if kind == "phone" else 2}  # the two panels


@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("night", [False, True])
def test_the_page_is_painted_by_day_and_by_night(page, tmp_path, kind, night):
    shot = tmp_path / "shot.png"
    browse(
        tmp_path,
        *([NIGHT] if night else []),
        "--hide-scrollbars",
        f"--window-size={WIDTHS[kind]},2400",
        f"--screenshot={shot}",
        page.as_uri(),
    )
    pixels = np.asarray(Image.open(shot, formats=["PNG"]).convert("RGB")).astype(int)
    assert pixels.shape[1] == WIDTHS[kind]
    ground = (20, 23, 28) if night else (255, 255, 255)
    assert (pixels[0, 0] == ground).all()
    away = np.abs(pixels - ground).max(-1) > 60
    assert 0.005 < away.mean() < 0.5  # letters and lines are there, and are not all there is
    assert away[1000:].any()


@pytest.fixture(scope="module")
def requests():
    """The address of a server on this machine, and the paths that it was asked for."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


def attacked(text, address, name):
    """The page after somebody wrote into it what loads from outside, and a script."""
    extra = f'<img src="{address}/{name}"><link rel="stylesheet" href="{address}/{name}.css">'
    return text.replace("</main>", f"{extra}<script>document.title = 'changed'</script></main>")


@pytest.fixture(scope="module", params=[("phone", False), ("desktop", True)])
def driven(request, page, requests, tmp_path_factory):
    """What the script found in the page, and in variants of it, which are loaded side by side."""
    kind, night = request.param
    folder, text = tmp_path_factory.mktemp("driven"), page.read_text()
    open_text = re.sub("<meta http-equiv=.*?>", "", text, flags=re.S)
    assert open_text != text
    pages = {"scripted": text, "bare": text}
    pages["guarded"] = attacked(text, requests[0], "guarded")
    pages["open"] = attacked(open_text, requests[0], "open")
    if spec := find_spec("axe_playwright_python"):
        source = (Path(spec.origin).parent / "axe.min.js").read_text().replace("</", "<\\/")
        pages["axe"] = open_text.replace("</body>", f"<script>{source}</script></body>")
        pages["poor"] = pages["axe"].replace("<select", "<br").replace("<label>", "<p>")
        pages["poor"] = re.sub('<img width="\\d+" alt=".*?"', "<img", pages["poor"])
    frames = []
    for name, content in pages.items():
        (folder / f"{name}.html").write_text(content)
        more = ' sandbox="allow-same-origin"' if name == "bare" else ""
        size = f"width:{WIDTHS[kind]}px;height:900px;border:0"
        frames.append(f'<iframe id="{name}" src="{name}.html" style="{size}"{more}></iframe>')
    outer = folder / "frames.html"
    outer.write_text(FRAMES.format(frames="".join(frames), script=COMPARE))
    told = browse(
        folder,
        *([NIGHT] if night else []),
        "--allow-file-access-from-files",
        "--window-size=1400,900",
        "--virtual-time-budget=20000",
        "--dump-dom",
        outer.as_uri(),
    )
    found = json.loads(html.unescape(re.search("<pre>(.*?)</pre>", told, re.S)[1]))
    assert isinstance(found, dict), found
    return found


def cell(text, unet, scale):
    return [{"text": text, "unet": unet, "scale": scale}]


def test_a_menu_for_each_axis_chooses_both_pictures(driven):
    last = "a_long_name_of_an_encoder"
    assert driven["begin"] == [cell("untrained", "s", "1"), cell(last, "l", "3")]
    assert driven["menus"] == [["text", "untrained"], ["unet", "s"], ["scale", "1"]]
    assert driven["chosen"] == [cell("text_32", "s", "1"), cell(last, "s", "3")]
    assert driven["alt"] == "First: text text_32, unet s, scale 1"
    assert re.search(r"scene accuracy 0\.\d+ ± ", driven["numbers"])


def test_pictures_are_swiped_and_flipped_over_each_other(driven):
    assert driven["swiped"] == "inset(0px 0px 0px 25%)"
    assert driven["flipped"] == [[True, False], [False, True]]
    assert driven["said"] == "Second: text a_long_name_of_an_encoder, unet s, scale 3"


def test_pictures_are_zoomed_and_scrolled_in_step(driven):
    assert driven["zoomed"] == [1, 1, 4, 4, 50]


def test_without_scripts_every_picture_is_there(driven):
    assert driven["bare"] == 12
    assert driven["bareSection"] == 0


def test_the_policy_stops_what_somebody_wrote_into_the_page(driven, requests):
    assert {path for path in requests[1] if "favicon" not in path} == {"/open", "/open.css"}
    assert driven["titles"] == ["text_x_unet", "changed"]


def test_axe_finds_nothing_serious(driven):
    if "axe" not in driven:
        pytest.skip("axe-playwright-python is not here")
    assert [found for found in driven["axe"] if found[1] in ("serious", "critical")] == []
    assert "image-alt" in [name for name, *_ in driven["poor"]]
