"""The page of `cascade serve`: how soon it is there, and how soon it paints, through Chromium.

    python -m cascade.eval.benchmarks.serve --model runs/demo-smoke [--rounds 9]

Painting on the page and in this process take turns, with the same model and caption; medians
count. A click's time ends when the browser has decoded the picture. Chromium runs before the server
starts, with nothing of the page stored. Needs Debian's package `chromium`, and the extra `dev`.
"""

import argparse
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from cascade.batch import image_size
from cascade.errors import UserError
from cascade.eval.benchmarks.demo import OWN
from cascade.runs.model import load_cascade, paint

CAPTION = "a red circle above a blue square"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--no-first-run"]
LONGEST = 180.0  # seconds, for the page to be there, and for one picture

# Clicks, and says after how many milliseconds the first picture so far, and the last, were shown.
CLICK = """async button => {
  const easel = document.querySelector("#easel"), begin = performance.now(), told = {};
  return new Promise(resolve => {
    const seen = async () => {
      const finished = easel.querySelector(".copied") !== null;
      const image = easel.querySelector("img");
      if (!image || (told.preview && !finished) || told.busy) return;
      told.busy = finished;
      await image.decode().catch(() => {});
      told[finished ? "finished" : "preview"] ??= performance.now() - begin;
      if (finished) { watch.disconnect(); resolve([told.preview ?? told.finished, told.finished]); }
    };
    const watch = new MutationObserver(seen);
    easel.querySelectorAll("img, .copied").forEach(one => one.remove());
    watch.observe(easel, { childList: true, subtree: true });
    button.click();
  });
}"""
# Changes a slider or a menu, and says after how many milliseconds the next frame was drawn.
CHANGE = """(field, value) => new Promise(resolve => {
  const begin = performance.now();
  field.value = value;
  for (const kind of ["input", "change"]) field.dispatchEvent(new Event(kind, { bubbles: true }));
  requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - begin)));
})"""


class Found(NamedTuple):
    """Seconds, each list with one number for a round.

    Attributes:
        address: from the command to the line that names the page.
        usable: from the command to a page whose button can be pressed.
        alone, step: of painting in this process, to the end and to the first step of a picture.
        preview, finished: from a click to the first picture so far, and to the last.
        swipe, menu: until these were answered.
    """

    address: float
    usable: float
    alone: Sequence[float]
    step: Sequence[float]
    preview: Sequence[float]
    finished: Sequence[float]
    swipe: Sequence[float]
    menu: Sequence[float]


@contextmanager
def served(model: Path) -> Iterator[tuple[str, float]]:
    """A server of a model: its address, and how long it took until that was told.

    Raises:
        UserError: it ended, or did not begin in time.
    """
    begin = time.monotonic()
    server = subprocess.Popen([OWN, "serve", model], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        if found is None:
            raise UserError(f"cascade serve {model} ended: try it by hand")
        yield found[0], time.monotonic() - begin
    finally:
        server.kill()
        server.wait()


def measure(model: Path, rounds: int) -> Found:
    """Run the server and the browser, and end both."""
    from playwright.sync_api import sync_playwright

    if (chromium := shutil.which("chromium")) is None:
        raise UserError("this benchmark needs Debian's package chromium")
    with sync_playwright() as playing:
        browser = playing.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(1000 * LONGEST)
        begin = time.monotonic()
        with served(model) as (url, address):
            page.goto(url)
            button = page.get_by_role("button", name="Paint", exact=True)
            button.click(trial=True)
            usable = time.monotonic() - begin
            return Found(address, usable, *zip(*_painted(button, model, rounds)), *_moved(page))


def _painted(button: Any, model: Path, rounds: int) -> list[tuple[float, ...]]:
    cascade, found = load_cascade(model), []
    for _ in range(2 + rounds):
        steps: list[float] = []

        def step(key: str, *_: Any, steps: list[float] = steps) -> None:
            if image_size(key):
                steps.append(time.perf_counter())

        begin = time.perf_counter()
        paint(cascade, [CAPTION], seed=0, progress=step)
        alone = time.perf_counter() - begin
        preview, finished = button.evaluate(CLICK)
        found.append((alone, steps[0] - begin, preview / 1e3, finished / 1e3))
    return found[2:]  # the first ones load and warm


def _moved(page: Any) -> tuple[list[float], list[float]]:
    page.get_by_role("tab", name="Compare").click()
    fields = page.locator("#viewer .swipe"), page.locator("#viewer .mode")
    fields[0].wait_for()
    values = [str(i) for i in range(0, 100, 10)], ["flip", "both", "swipe"] * 3
    swipe, menu = ([f.evaluate(CHANGE, v) / 1e3 for v in of] for f, of in zip(fields, values))
    return swipe, menu


def table(found: Found) -> Table:
    """Medians, and what they are of the time of painting in this process."""
    out = Table("cascade serve", "seconds", "ratio", title="the page, on this machine")
    alone = statistics.median(found.alone)
    for name, of in {
        "painted in this process": found.alone,
        "click to finished": found.finished,
        "first step in this process": found.step,
        "click to first picture so far": found.preview,
    }.items():
        middle = statistics.median(of)
        out.add_row(name, f"{middle:.3f}", f"{middle / alone:.2f}")
    out.add_row("command to address", f"{found.address:.1f}", "")
    out.add_row("command to usable page", f"{found.usable:.1f}", "")
    for name, of in (("swipe", found.swipe), ("menu", found.menu)):
        out.add_row(f"{name}, longest", f"{max(of):.3f}", "")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    Console().print(table(measure(args.model, args.rounds)))


if __name__ == "__main__":
    main()
