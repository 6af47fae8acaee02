"""Each part of the page of `cascade serve` in a real browser, by day and by night.

As wide as a phone and as a desktop; see `browsing` for what is checked wherever a test looks.
"""

import base64
import io
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browsing import (
    NARROW,
    NEEDS,
    TABS,
    WIDE,
    check,
    choose,
    done,
    opened,
    paint,
    picture,
    settings,
    tab,
)

pytest_plugins = "tests.browsing"
pytestmark = NEEDS


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
    paint(page)
    page.locator("#easel [role=progressbar]").wait_for()
    page.locator("#easel .sheet img").wait_for()
    page.get_by_role("button", name="Cancel", exact=True).click()
    done(page, "#easel", "Cancelled.")
    page.get_by_label("decoder: steps", exact=True).fill("2")
    page.get_by_label("Number of pictures", exact=True).fill("3")
    paint(page)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_screens(base, browser, width, scheme, tmp_path):
    """All parts at once, and as pictures, for a person to look at."""
    with opened(base, browser, width, scheme) as page:
        settings(page)
        paint(page)
        done(page, "#easel")
        for name in TABS:
            tab(page, name)
            time.sleep(1)
            check(page)
            shot = Path(tmp_path, f"{name}.png")
            page.screenshot(path=shot, full_page=True)
            shades = np.asarray(Image.open(shot, formats=["PNG"]).convert("L"))
            assert len(np.unique(shades)) > 20
            assert (np.median(shades) < 128) == (scheme == "dark")
