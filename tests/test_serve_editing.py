"""What the page edits, compares and watches, without the page."""

import base64
import io
import json
import shlex

import numpy as np
import pytest
from PIL import Image

from cascade.cli import main
from cascade.errors import UserError
from cascade.runs.run import Run
from cascade.serve import editing
from cascade.serve.asked import Editing
from cascade.serve.comparing import Side, check_two, differences, measured
from cascade.serve.engine import Engine
from cascade.serve.limits import Limits
from cascade.serve.line import Job
from cascade.serve.page.sent import decoded
from cascade.serve.places import Places
from cascade.serve.watching import Trainings, losses, newest
from tests import made_sweeps, models


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("editing") / "model"
    models.write_model(root)
    return Places([root]).named(str(root))


@pytest.fixture(scope="module")
def engine():
    return Engine(Limits())


def file(width=40, height=32, kind="PNG", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def job():
    return Job(lambda *_: None, patience=60.0)


def test_a_model_offers_what_it_can_do(place, tmp_path):
    kinds = ["vary", "interpolate", "change", "inpaint", "outpaint"]
    assert place.edits == kinds
    models.write_run(tmp_path / "decoder", models.DECODER)
    (tmp_path / "cascade.yaml").write_text("stages: {decoder: {}}\n")
    assert Places([tmp_path]).named(str(tmp_path)).edits == kinds[3:]


@pytest.mark.parametrize(
    ("kind", "count", "options"),
    [
        ("vary", 1, {}),
        pytest.param("vary", 1, {"eta": 0.5, "steps": 4}, marks=pytest.mark.slow),
        pytest.param("interpolate", 2, {"frames": 3, "steps": 4}, marks=pytest.mark.slow),
        (
            "change",
            1,
            {"to": "a circle", "from": "a square", "share": 0.5, "frames": 3, "steps": 4},
        ),
        ("inpaint", 1, {"jumps": 2}),
        pytest.param(
            "outpaint", 1, {"left": 0, "right": 0, "top": 0, "bottom": 8, "jumps": 1},
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_an_edit_is_that_of_the_command_line(
    place, engine, kind, count, options, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    mask = np.zeros((32, 32, 3), dtype=np.uint8)
    mask[8:20, 8:20] = 255
    Image.fromarray(mask).save("mask.png")
    pictures = [file(32, 32, seed=i) for i in range(count)]
    for i, data in enumerate(pictures, 1):
        (tmp_path / f"picture{i}.png").write_bytes(data)
    whole = kind in ("inpaint", "outpaint")
    asked = Editing(
        place, kind, tuple(pictures), "a circle" if whole else "",
        (tmp_path / "mask.png").read_bytes() if kind == "inpaint" else b"", seed=3, options=options,
    )  # fmt: skip
    done = editing.edit(engine, asked, job())
    words = shlex.split(asked.command())
    assert main(words[1:]) == 0
    theirs = np.asarray(Image.open("out.png", formats=["PNG"]))
    row = done.rows[0]
    assert len(row) == len(done.shares) == options.get("frames", 1)
    if len(row) > 1:  # a grid, with 8 pixels around each cell
        theirs = theirs[8:-8, 8:-8]
        own = np.concatenate([np.pad(p, ((0, 0), (0, 8), (0, 0))) for p in row], 1)[:, :-8]
        keep = np.concatenate([np.arange(16) + 24 * i for i in range(len(row))])
        assert (theirs[:, keep] == own[:, keep]).all()
    else:
        assert (theirs == row[0]).all()


def hostile():
    """Fifty uploads that no picture should be."""
    whole = {kind: file(kind=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    yield from (data[: len(data) // 2] for data in whole.values())
    yield from (data[:16] for data in whole.values())
    yield from (data[:8] + b"\xff" * 200 for data in whole.values())
    huge = bytearray(whole["PNG"])
    huge[16:24] = (60_000).to_bytes(4) * 2
    yield bytes(huge)
    yield from (b"", b"\0", b"\x80\x04.", b"PK\x03\x04" + bytes(64), b"<svg/>", b"<!doctype html>")
    yield from (b"%PDF-1.7", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"II*\0")
    yield from (b"cos\nsystem\n(S'true'\ntR.", b"http://localhost/", b"/etc/passwd", b"{}")
    rng = np.random.default_rng(0)
    yield from (rng.bytes(1000) for _ in range(16))


def test_fifty_hostile_files_are_refused_in_one_line(place, engine):
    files = list(hostile())
    assert len(files) == 50
    for data in files:
        with pytest.raises(UserError, match=r"cannot be used|choose a picture") as caught:
            editing.edit(engine, Editing(place, "vary", (data,)), job())
        assert "\n" not in str(caught.value)
    assert editing.edit(engine, Editing(place, "vary", (file(),)), job()).rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "reconstruct"}, "cannot do this"),
        ({"kind": "interpolate"}, "two pictures"),
        ({"kind": "inpaint"}, "say in the caption"),
        ({"kind": "inpaint", "caption": "a"}, "brush over"),
        ({"kind": "inpaint", "caption": "a", "mask": file(8, 8)}, "another size"),
        ({"kind": "outpaint", "caption": "a"}, "how many pixels"),
        ({"kind": "outpaint", "caption": "a", "options": {"left": -1}}, "how many pixels"),
        ({"kind": "outpaint", "caption": "a", "options": {"left": 400}}, "times as long"),
        ({"kind": "outpaint", "caption": "a", "options": {"left": 4_000_000}}, "pixels"),
        ({"caption": "x" * 3000}, "a caption has"),
        ({"n": 17}, "17 pictures"),
    ],
)
def test_an_edit_within_the_limits_alone(place, engine, change, words):
    told = {"place": place, "kind": "vary", "pictures": (file(),), **change}
    with pytest.raises(UserError, match=words):
        editing.edit(engine, Editing(**told), job())


def test_only_files_within_a_text_are_read():
    data = file()
    assert decoded("data:;base64," + base64.b64encode(data).decode()) == data
    assert decoded("") == decoded(None) == b""
    for url in (
        "http://localhost/a.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "data:,x",
        "x;base64,",
    ):
        with pytest.raises(UserError, match="nothing else is read"):
            decoded(url)
    with pytest.raises(UserError, match="did not arrive whole"):
        decoded("data:;base64,AAA")


@pytest.fixture
def sweep(tmp_path):
    told = made_sweeps.about({"text": ["a", "b"]}, {"scale": [1.0, 3.0]})
    made_sweeps.write(tmp_path / "sweep", told, lambda text, scale: 0.5, pictures=True)
    return Places([tmp_path]).named(str(tmp_path / "sweep"))


def test_cells_of_a_sweep_differ_in_their_axes_and_numbers(sweep):
    one, two = (Side.of(sweep, {"text": text, "scale": "3.0", "seed": "1"}) for text in ("a", "b"))
    rows = {row[0]: row[1:] for row in differences([one, two])}
    assert rows["axis text"] == ["a", "b"]
    assert "axis scale" not in rows
    cells = [
        json.loads(line) for line in (sweep.path / "b-s1" / "cells.jsonl").read_text().splitlines()
    ]
    cell = next(c for c in cells if c["choices"] == {"scale": 3.0})
    low, high = cell["intervals"]["clip_score"]
    number = two.numbers()["clip_score"]
    assert number == (cell["clip_score"], low, high)
    assert measured([one, two])[0][2] == f"{cell['clip_score']:.4g} [{low:.4g}, {high:.4g}]"
    assert two.stored == sweep.path / "b-s1" / "grids" / "scale=3.0.png"
    with pytest.raises(UserError, match="two or more"):
        check_two([one])


def test_models_differ_in_choices_and_configurations(place, tmp_path):
    models.write_model(tmp_path / "other", decoder={"scale": 3.0, "weaker": "early"})
    models.write_run(
        tmp_path / "other/decoder",
        [*models.DECODER, f"clip.path={tmp_path / 'other/clip'}", "net.blocks=2"],
    )
    (tmp_path / "other/metrics.json").write_text(
        json.dumps({"val": {"image_16": {"frechet": 1.5, "intervals": {"frechet": [1, 2]}}}})
    )
    other = Places([tmp_path]).named(str(tmp_path / "other"))
    sides = [Side.of(place, {}), Side.of(other, {})]
    rows = {row[0]: row[1:] for row in differences(sides)}
    assert rows["decoder.scale"] == ["2.0", "3.0"]
    assert rows["decoder: net.blocks"] == ["1", "2"]
    assert "prior: net.width" not in rows
    assert measured(sides) == [["val.image_16.frechet", "", "1.5 [1, 2]"]]


def test_trainings_are_read_from_their_directories(tmp_path):
    run = Run(tmp_path / "runs" / "one")
    run.samples.mkdir(parents=True)
    run.config_file.write_text("images: 4000\n")
    run.write_status(2000, 4000)
    lines = "".join(f"{n},{1 / n},50\n" for n in range(1, 1001)) + "1001,nan,50\n1002,inf,50\n"
    run.metrics_file.write_text("images,loss,images_per_second\n" + lines + "1003,0.5")
    for name in ("0000000900.png", "0000001000.png", "truth.png", "0000000100.png"):
        (run.samples / name).write_bytes(name.encode())
    (run.path / "heartbeats").mkdir()
    (run.path / "heartbeats/rank0.json").write_text("{}")
    trainings = Trainings([tmp_path / "runs"])
    (one,) = trainings.found().values()
    assert one.state.word == "running"
    # 2,000 images at 50 in a second.
    assert one.row()[1:6] == ["running", "2,000 of 4,000", "50.0", "inf", "40 s"]
    points = losses(run.path)
    assert points[-1] == (1000, 0.001)
    assert len(points) <= 240
    assert all(loss == 1 / n for n, loss in points)
    assert newest(run.path) == [
        ("after 1,000 images", b"0000001000.png"),
        ("after 900 images", b"0000000900.png"),
    ]
    (run.samples / "0000001000.png").unlink()
    assert newest(run.path)[0][0] == "after 900 images"
