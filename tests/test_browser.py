"""A sweep's page in a real browser, as wide as a phone and as a desktop, by day and by night."""

import html
import json
import re
import shutil
import subprocess

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
