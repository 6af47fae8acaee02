"""Claims about the report: one self-contained, escaped file, and sample grids laid out as said."""

import base64
import html
import io
import re

import numpy as np
import pytest
from PIL import Image

from cascade.errors import UserError
from cascade.eval.cascades.summary import _guidance
from cascade.eval.pages.plots import plot
from cascade.eval.pages.report import Report
from cascade.grids import grid


def pictures(n, h=4, w=4):
    return np.random.default_rng(0).integers(0, 255, (n, h, w, 3), dtype=np.uint8)


@pytest.fixture
def losses(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,lr,images,train/loss,val/loss\n0,,0,1.5,\n0,,0,,1.4\n0,0.1,9,0.5,\n")
    return path


@pytest.fixture
def page(tmp_path, losses):
    report = Report("a <b>run</b>")
    report.heading("Targets & numbers")
    report.paragraph("5 < 6 <script>alert(1)</script>")
    report.table(["scale", "distance"], [["1 & 2", 3.14159265], ["<i>", None]])
    report.targets([("accuracy", "≥ 0.8", 0.91, True), ("<distance>", "≤ 2", 3.5, False)])
    report.picture(grid(pictures(3), columns=2), 'a "red" <circle>')
    report.curve([(0.2, 9.0, "g = 1"), (0.3, 7.0, "g = 3")], "CLIP score", "distance", "a curve")
    report.losses(losses, "losses")
    path = tmp_path / "new" / "report.html"
    report.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_page_loads_and_runs_nothing(page):
    assert not re.search(r"https?://|<script|<link|<iframe|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', page))
    policy = html.unescape(re.search('Content-Security-Policy" content="(.*?)"', page)[1])
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert "script-src" not in policy


def test_page_holds_the_very_pixels(page):
    data = re.search(r'src="data:image/png;base64,([^"]*)"', page).group(1)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(shown, np.asarray(grid(pictures(3), columns=2)))


def test_all_text_is_escaped(page):
    assert "<title>a &lt;b&gt;run&lt;/b&gt;</title>" in page
    assert "5 &lt; 6 &lt;script&gt;" in page
    assert "<td>1 &amp; 2</td>" in page
    assert 'alt="a &quot;red&quot; &lt;circle&gt;"' in page
    assert "&lt;distance&gt;" in page
    assert page.count("Targets &amp; numbers") == 2  # the section, and the link to it


def test_numbers_are_rounded_set_right_and_judged(page):
    assert '<td class="number">3.142</td>' in page
    assert '<td class="number">–</td>' in page
    assert '<td class="reached">reached</td>' in page
    assert '<td class="missed">missed</td>' in page


def test_rows_that_do_not_fit_the_columns_are_refused():
    with pytest.raises(ValueError, match="2 cells"):
        Report("run").table(["a", "b"], [[1, 2], [3]])


def test_losses_need_a_file_with_losses(tmp_path, losses):
    with pytest.raises(UserError, match=r"absent\.csv does not exist"):
        Report("run").losses(tmp_path / "absent.csv", "")
    losses.write_text("images,lr\n0,0.1\n")
    with pytest.raises(UserError, match="no column with a loss"):
        Report("run").losses(losses, "")


def test_pictures_stand_side_by_side_and_the_best_stands_out(tmp_path):
    report = Report("sweep")
    report.row([(grid(pictures(2), columns=1), name) for name in ("<a>", "b")], "guidance & 2")
    figures = [plot("x", "y")[0] for _ in range(3)]
    report.panels(figures, "three")
    report.table(["n", "accuracy"], [[1, (0.5, 0.01)], ["not run", None]], best={(0, 1)})
    before = report.size
    report.links([("a b/report.html", "<a>", "5 < 6")])
    assert report.size > before
    report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    parts = (re.search(f'<div class="{c}".*?>(.*?)</div>', page)[1] for c in ("row", "panels"))
    row, panels = parts
    assert re.findall("<figcaption>(.*?)</figcaption>", row) == ["&lt;a&gt;", "b"]
    assert (row.count("<img"), panels.count("<img")) == (2, 3)
    assert '<td class="number"><strong>0.500 ± 0.010</strong></td>' in page
    assert '<a href="a%20b/report.html">&lt;a&gt;</a> 5 &lt; 6' in page


def test_grid_places_enlarged_pictures_in_rows():
    shown = np.asarray(grid(pictures(5, h=4, w=6), columns=3, scale=10))
    assert shown.shape == (2 * (40 + 8) + 8, 3 * (60 + 8) + 8, 3)
    fifth = shown[56:96, 76:136]  # second row, second column
    np.testing.assert_array_equal(fifth[5::10, 5::10], pictures(5, h=4, w=6)[4])
    assert (fifth[:10, :10] == fifth[0, 0]).all()
    assert (shown[56:, 144:] == 255).all()  # no sixth


def test_captions_stand_under_their_picture_and_inside_their_cell():
    captions = [
        "a small red circle above a large blue square",
        "Donaudampfschifffahrtsgesellschaft",
    ]
    shown = np.asarray(grid(pictures(2) // 2, columns=2, captions=captions, scale=20))
    below = (shown[8 + 80 :] < 128).any(axis=(0, 2))
    assert below[8:88].any()
    assert below[96:176].any()
    assert not below[88:96].any()
    assert not below[176:].any()
    lines = (shown[8 + 80 :, 8:88] < 128).any(axis=(1, 2))
    assert (np.diff(lines.astype(int)) == 1).sum() >= 3  # wrapped: 44 letters in 80 pixels
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        grid(pictures(2), columns=2, captions=["one"])


def test_guidance_of_too_few_pictures_for_a_distance_has_a_table_and_no_curve(tmp_path):
    for distance in (0.25, None):
        cell = {"count": 16, "frechet": distance, "clip_score": 0.5}
        page = Report("guidance")
        _guidance(page, [{"scale": 2.0, "count": 16, "image_16": cell}])
        page.save(tmp_path / "page.html")
        shown = (tmp_path / "page.html").read_text()
        assert ("labels are guidance scales" in shown) == (distance is not None)
        assert "0.5" in shown
