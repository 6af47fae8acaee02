"""What `cascade serve` does without its page: places, limits, the line, the store and painting."""

import io
import shlex
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.cli import main
from cascade.errors import UserError
from cascade.formats.rgb import picture
from cascade.grids import grid
from cascade.pipeline import innermost
from cascade.runs.model import load_cascade
from cascade.runs.run import Run
from cascade.serve.asked import Painting, about_picture, png
from cascade.serve.engine import Engine
from cascade.serve.limits import Limits, bytes_of
from cascade.serve.line import Cancelled, Job, Line
from cascade.serve.places import Places
from cascade.serve.store import Store, weight
from tests import made_sweeps, models


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    models.write_model(root / "runs" / "model")
    return root / "runs"


@pytest.fixture(scope="module")
def place(root):
    return Places([root]).named(str(root / "model"))


class Watched(Job):
    """A job that keeps what is reported to it."""

    def __init__(self, stop_after=None):
        super().__init__(lambda *_: None, patience=60.0)
        self.all, self.stop_after = [], stop_after

    def report(self, steps):
        super().report(steps)
        self.all.append(steps)
        if len(self.all) == self.stop_after:
            self.cancel()


def test_what_lies_under_a_folder_is_found_by_kind(root, tmp_path):
    shutil.copytree(root, tmp_path / "runs")
    here = tmp_path / "runs"
    (here / "model" / "other.yaml").write_text("stages:\n  prior: {}\n  decoder: {}\n")
    (here / "notes.yaml").write_text("stages: [1]\nmore: 2\n")
    (here / "broken.yaml").write_text("{")
    told = made_sweeps.about({"text": ["a", "b"]}, {"scale": [1.0, 3.0]})
    made_sweeps.write(here / "sweep", told, lambda text, scale: 0.5)
    found = Places([here]).found()
    named = {name.removeprefix(str(here)): place.kind for name, place in found.items()}
    assert named == {
        "/model": "model",
        "/model/other.yaml": "model",
        "/model/decoder": "run",
        "/model/early": "run",
        "/model/prior": "run",
        "/sweep": "sweep",
    }
    sweep = found[str(here / "sweep")]
    assert sweep.axes == {"text": ["a", "b"], "scale": ["1.0", "3.0"], "seed": ["0", "1"]}
    point, choices = sweep.cell({"text": "b", "scale": "3.0", "seed": "1"})
    assert point == here / "sweep" / "b-s1"
    assert choices == {"scale": "3.0"}
    with pytest.raises(UserError, match="has no text"):
        sweep.cell({"text": "../../etc", "scale": "3.0", "seed": "1"})


@pytest.mark.parametrize("name", ["/etc", "../model", "", "http://localhost/x", "model\0", None])
def test_only_what_was_found_can_be_named(root, name):
    with pytest.raises(UserError, match="from the list"):
        Places([root]).named(name)


def test_the_knobs_of_a_model_are_those_of_its_file_and_runs(place):
    of = {knob.stage: (knob.scale, knob.steps) for knob in place.knobs}
    cascade = load_cascade(place.file)
    samplers = [innermost(link).sampler for link in cascade.stages]
    assert of == dict(zip(("prior", "decoder"), [(s.scale, s.steps) for s in samplers]))
    assert of["decoder"] == (2.0, 2)


def test_painted_as_the_command_line_says_and_in_every_step(place, root, tmp_path, monkeypatch):
    sets = ("decoder.steps=3", "prior.best_of=1")
    asked = Painting(place, ("a circle", "a 'square'"), "red", seed=5, n=2, sets=sets)
    job = Watched()
    done = Engine(Limits()).paint(asked, job)
    shown = done.last
    assert shown.shape == (4, 16, 16, 3)
    # The last preview is the picture, and the others lead to it.
    steps = [one for one in job.all if one.what == "image_16"]
    assert [(one.at, one.of) for one in steps] == [(1, 3), (2, 3), (3, 3)]
    assert (steps[-1].pictures == shown).all()
    assert not (steps[0].pictures == shown).all()
    shares = [one.share for one in job.all]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    # The command line paints the same pixels.
    monkeypatch.chdir(tmp_path)
    words = shlex.split(asked.command())
    assert words[0] == "cascade"
    assert main(words[1:]) == 0
    sheet = grid(shown, 2, [c for c in asked.captions for _ in range(2)])
    assert (np.asarray(Image.open("out.png", formats=["PNG"])) == np.asarray(sheet)).all()
    assert done.choices["decoder"] == {"weaker": "early", "scale": 2.0, "steps": 3}


def test_a_file_tells_how_its_picture_was_made(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    about = about_picture("cascade sample 'ä'", "stages:\n", "a <b>", 7, 3)
    data = png(pixels, about)
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    image.load()
    assert image.text == {f"cascade.{key}": value for key, value in about.items()}
    assert (picture(data) == pixels).all()


@pytest.mark.parametrize(
    ("limits", "change", "words"),
    [
        (Limits(most_pictures=3), {"n": 4}, "4 pictures"),
        (Limits(longest=5), {}, "a caption has 8"),
        (Limits(most_steps=2), {"sets": ("decoder.steps=3",)}, "takes 3 steps"),
        (Limits(most_steps=1), {}, "takes 2 steps"),
        (Limits(memory=10), {}, "--memory allows"),
        (Limits(), {"negative": "x" * 2001}, "2,001"),
        (Limits(), {"captions": (" ",)}, "is empty"),
        (Limits(), {"sets": ("decoder.run=/etc",)}, ""),
    ],
)
def test_nothing_exceeds_the_limits(place, limits, change, words):
    asked = replace(Painting(place, ("a circle",)), **change)
    with pytest.raises(UserError, match=words):
        Engine(limits).paint(asked, Watched())


def test_a_cancelled_request_ends_within_a_step(place):
    job = Watched(stop_after=2)
    with pytest.raises(Cancelled):
        Engine(Limits()).paint(Painting(place, ("a circle",), sets=("decoder.steps=50",)), job)
    assert len(job.all) == 2


def test_stages_are_loaded_once_and_dropped_when_memory_is_short(root, tmp_path):
    shutil.copytree(root / "model", tmp_path / "a")
    shutil.copytree(root / "model", tmp_path / "b")
    places, loaded = Places([tmp_path]), []

    def load(run):
        loaded.append(run.path.relative_to(tmp_path).as_posix())
        return run.load()

    one, two = (places.named(str(tmp_path / name)) for name in "ab")
    need = sum(file.stat().st_size for name in ("prior", "decoder", "early") for file in
               Run(tmp_path / "a" / name).weights)  # fmt: skip
    store = Store(int(1.2 * need), load)
    first = store.loaded(one).cascade
    assert store.loaded(one).cascade is first
    other = store.loaded(one, ("decoder.steps=7",)).cascade
    assert innermost(other.stages[1]).net is innermost(first.stages[1]).net
    assert loaded == ["a/prior", "a/decoder"]
    assert store.size == weight(innermost(link) for link in other.stages) <= store.memory
    store.loaded(two)
    assert store.size == weight(innermost(link) for link in store.loaded(two).cascade.stages)
    store.loaded(one)
    assert loaded == ["a/prior", "a/decoder", "b/prior", "b/decoder", "a/prior", "a/decoder"]


def test_a_model_that_changed_is_read_again_and_one_that_is_gone_is_refused(root, tmp_path):
    shutil.copytree(root / "model", tmp_path / "a")
    places = Places([tmp_path])
    place, store = places.named(str(tmp_path / "a")), Store(1 << 30)
    before = innermost(store.loaded(place).cascade.stages[1]).net
    models.write_run(
        tmp_path / "a/decoder", [*models.DECODER, f"clip.path={tmp_path / 'a/clip'}"], seed=9
    )
    after = innermost(store.loaded(place).cascade.stages[1]).net
    assert not torch.equal(next(before.parameters()), next(after.parameters()))
    (tmp_path / "a/decoder/weights.safetensors").unlink()
    with pytest.raises(UserError, match="train it first"):
        store.loaded(place)
    shutil.rmtree(tmp_path / "a")
    for call in (lambda: store.loaded(place), lambda: places.named(place.name)):
        with pytest.raises(UserError, match=r"not there any more|from the list"):
            call()


def test_jobs_wait_for_each_other_and_a_failure_ends_one_alone():
    running, most, order = [], [0], []
    line = Line(lambda number: "device", most=50)
    line.start()

    def work(i):
        def do(device, job):
            running.append(i)
            most[0] = max(most[0], len(running))
            order.append(i)
            job.report(i)
            time.sleep(0.002)
            running.remove(i)
            if i == 3:
                raise RuntimeError("secret path /x")
            if i == 4:
                raise UserError("too long")
            return 10 * i

        return do

    jobs = [line.submit(work(i)) for i in range(20)]
    end = time.monotonic() + 10
    while not all(job.over for job in jobs) and time.monotonic() < end:
        time.sleep(0.005)
    assert most == [1]
    assert order == sorted(order)
    assert [job.result for job in jobs[5:]] == [10 * i for i in range(5, 20)]
    assert jobs[3].state == jobs[4].state == "failed"
    assert jobs[4].error == "too long"
    assert "secret" not in jobs[3].error


def test_the_line_is_bounded_and_forgets_who_left():
    line = Line(lambda number: None, most=3, patience=0.05)
    jobs = [line.submit(lambda *_: None) for _ in range(3)]
    with pytest.raises(UserError, match="3 requests wait"):
        line.submit(lambda *_: None)
    jobs[0].cancel()
    assert line.before(jobs[2]) == 1
    line.submit(lambda *_: None)
    time.sleep(0.1)
    assert [line.before(job) for job in jobs] == [0, 0, 0]
    assert all(job.state == "cancelled" for job in jobs)


def test_a_request_that_nobody_looks_at_ends():
    line, began = Line(lambda number: "device", patience=0.1), threading.Event()
    line.start()

    def forever(device, job):
        while True:
            began.set()
            job.report(None)
            time.sleep(0.01)

    job = line.submit(forever)
    assert began.wait(5)
    for _ in range(30):
        job.look()
        time.sleep(0.01)
    assert job.state == "running"
    end = time.monotonic() + 5
    while not job.over and time.monotonic() < end:
        time.sleep(0.01)
    assert job.state == "cancelled"


def test_a_device_that_cannot_be_opened_is_told_to_everyone():
    def fail(number):
        raise OSError("no driver")

    line = Line(fail)
    line.start()
    job = line.submit(lambda *_: 1)
    end = time.monotonic() + 5
    while not job.over and time.monotonic() < end:
        time.sleep(0.01)
    assert job.error == "the server cannot paint: no driver"


@pytest.mark.parametrize(
    ("text", "count"), [("8G", 8 << 30), ("512M", 512 << 20), ("1.5g", 3 << 29), ("7", 7)]
)
def test_memory_is_given_in_units(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "G", "8 potatoes", "-3G"])
def test_other_words_are_no_memory(text):
    with pytest.raises(UserError, match="--memory"):
        bytes_of(text)


def test_the_command_refuses_others_without_a_password(root, monkeypatch, capsys):
    monkeypatch.delenv("CASCADE_PASSWORD", raising=False)
    assert main(["serve", str(root), "--host", "0.0.0.0"]) == 2
    assert "password" in capsys.readouterr().err
    assert main(["serve", str(root / "nothing")]) == 2
    assert main(["serve", str(root), "--most-pictures", "0"]) == 2
    assert main(["serve", str(root), "--memory", "much"]) == 2
