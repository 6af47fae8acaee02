"""`cascade personalize`: trainings like any other, of a model that stays as it was."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cascade.adapters.lora import WEIGHTS as LORA
from cascade.adapters.words import WORD
from cascade.cli import main
from cascade.data.few import Few
from cascade.data.loading import loader
from cascade.data.scenes.generate import render, sample_scene, write_scenes
from cascade.data.shards import Shards
from cascade.data.transforms import Pictures
from cascade.diffusion import noise as schedules
from cascade.diffusion import prediction
from cascade.diffusion.gaussian import Diffusion
from cascade.diffusion.learned_variance import LearnedVariance
from cascade.draws import Draws, generator
from cascade.runs.model import load_cascade
from cascade.runs.run import Run
from cascade.stage import WEIGHTS, Stage
from cascade.training.preservation import preserve
from tests.models import write_model, write_run
from tests.small import SR

TOKEN = "<blicket>"
SMALL = ["batch=4", "images=80", "kept=4", "ema=0.5", "logger=csv"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with random weights, and three pictures, one of which has a caption."""
    root = tmp_path_factory.mktemp("personal")
    write_model(root / "base")
    (root / "pictures").mkdir()
    for i in range(3):
        scene = sample_scene("plain", "train", generator(0, "personal", i))
        Image.fromarray(render(scene, 32)).save(root / "pictures" / f"{i}.png")
    (root / "pictures" / "1.txt").write_text(f"a red {TOKEN}\n")
    (root / "silent").mkdir()
    write_run(root / "silent" / "sr", [*SR, f"clip.path={root / 'base' / 'clip'}"])
    (root / "silent" / "cascade.yaml").write_text("stages: {sr: {}}\n")
    return root


def words(base, out, method, *more):
    options = ["--model", str(base / "base"), "--pictures", str(base / "pictures")]
    return [
        *("personalize", "--method", method, *options, "--token", TOKEN),
        *("--class", "circle", "--out", str(out), *more),
    ]


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def painted(model, text):
    batch = {"caption": [text], "sample": torch.tensor([0])}
    return load_cascade(model)(batch, 0)["image_16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "file"),
    [("textual_inversion", WORD), ("lora", LORA), ("dreambooth", WEIGHTS)],
)
def test_twenty_steps_make_a_model_and_leave_the_base_as_it_was(
    base, tmp_path, method, file, capfd
):
    before, out = content(base / "base"), tmp_path / method
    assert main(words(base, out, method, *SMALL)) == 0
    for name in ("prior", "decoder"):
        assert [path.name for path in Run(out / name).weights] == [file]
        assert Run(out / name).status() == {"images": 80, "total": 80}
        assert Run(out / name).config.start == str(base / "base" / name)
    assert not torch.equal(painted(out, f"a {TOKEN}"), painted(base / "base", f"a {TOKEN}"))
    same = torch.equal(painted(out, "a red circle"), painted(base / "base", "a red circle"))
    assert same == (method == "textual_inversion")
    assert content(base / "base") == before
    picture = tmp_path / "out.png"
    assert main(["sample", "--model", str(out), f"a {TOKEN}", "--out", str(picture)]) == 0
    assert main(["doctor", str(out)]) == 0
    exported = tmp_path / "exported"
    assert main(["export", "--model", str(out), "--out", str(exported)]) == 0
    assert torch.equal(painted(exported, f"a {TOKEN}"), painted(out, f"a {TOKEN}"))
    capfd.readouterr()
    assert main(words(base, out, method, *SMALL)) == 0
    assert capfd.readouterr().out.count("finished before") == 2
    assert main(words(base, out, method, *SMALL, "seed=1")) == 2
    assert "seed: 0 -> 1" in capfd.readouterr().err


@pytest.mark.slow
def test_a_killed_personalization_equals_one_never_killed(base, tmp_path, monkeypatch):
    class Killed(BaseException):
        """No `except Exception` stops it."""

    step = Stage.training_step

    def training_step(self, batch, number):
        if number == 2:
            raise Killed
        return step(self, batch, number)

    more = ["--stages", "decoder", *SMALL, "images=16", "kept=3"]
    asked = [words(base, tmp_path / name, "lora", *more) for name in ("whole", "killed")]
    assert main(asked[0]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "training_step", training_step)
        with pytest.raises(Killed):
            main(asked[1])
    assert not (tmp_path / "killed" / "cascade.yaml").exists()
    assert main(asked[1]) == 0
    whole, killed = (load_file(tmp_path / n / "decoder" / LORA) for n in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert any(whole[key].any() for key in whole if "lora_B" in key)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("few")
    write_scenes(root / "own", "plain", "train", 3, 16, 0)
    write_scenes(root / "kept", "plain", "train", 5, 16, 1)
    return [Shards(root / name, Pictures((16,)), json_fields=["seed"]) for name in ("own", "kept")]


def test_half_of_each_batch_is_of_the_class(shards):
    samples = Few(*shards, 0.3)
    samples.check(8)  # more than there are pictures
    for batch in loader(samples, 8, start=16, batches=3):
        assert batch["seed"] == [0, 1] * 4
        assert batch["loss_weight"].tolist() == pytest.approx([2.0, 0.6] * 4)
        assert len(set(batch["sample"].tolist())) == 8
    ranks = [list(loader(samples, 4, rank, 2, 0, 2)) for rank in (0, 1)]
    assert all(batch["seed"] == [0, 1] * 2 for part in ranks for batch in part)
    seen = [item["key"] for item in samples.items(range(0, 6, 2))]
    assert len(set(seen)) == 3  # an epoch of the thing
    alone = Few(shards[0])
    batch = next(iter(loader(alone, 8, batches=1)))
    assert "loss_weight" not in batch
    assert samples.provenance() != alone.provenance()


def test_the_loss_is_the_sum_of_both_halves_means(base, shards):
    stage = Run(base / "base" / "decoder").load()
    batch = next(iter(loader(Few(*shards, 0.3), 8, batches=1)))
    batch = stage.encoded({**batch, "clip_image": torch.randn(8, 12)})
    each = stage.loss(batch)
    expected = each[0::2].mean() + 0.3 * each[1::2].mean()
    torch.testing.assert_close(stage.training_step(batch, 0), expected)
    del batch["loss_weight"]
    torch.testing.assert_close(stage.training_step(batch, 0), each.mean())


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_what_is_preserved_has_no_gradient_until_the_stage_changes(base, shards, name):
    run = Run(base / "base" / name)
    stage = run.load()
    batch = next(iter(loader(Few(*shards, 3.0), 8, batches=1)))
    batch = stage.encoded({**batch, "clip_image": torch.randn(8, 12)})
    plain = stage.loss(batch)
    preserve(stage, run)
    each = stage.loss(batch)
    assert torch.equal(each[0::2], plain[0::2])
    assert (each[1::2] == 0).all()
    assert (plain[1::2] > 0).all()
    with torch.no_grad():
        for parameter in stage.net.parameters():
            parameter.mul_(1.01)
    moved = stage.loss(batch)[1::2]
    assert (moved > 0).all()
    moved.mean().backward()
    torch.optim.SGD(stage.net.parameters(), 1e-4).step()  # the gradient leads back
    assert stage.loss(batch)[1::2].mean() < moved.mean()


def test_a_learned_variance_is_taught_its_mean_alone():
    process = LearnedVariance(Diffusion(schedules.cosine, prediction.v), 1000)
    x0, given = torch.randn(4, 3, 4, 4), torch.randn(4, 6, 4, 4)

    def net(x, logsnr, cond):
        return given

    def loss(teacher=None):
        return process.loss(net, x0, None, Draws(0, "noise", range(4)), teacher)

    def itself(x, logsnr, F_star):
        return given[:, :3]

    def shifted(x, logsnr, F_star):
        return given[:, :3] + 2.0

    assert torch.allclose(loss(shifted) - loss(itself), torch.full((4,), 4.0))
    assert torch.equal(loss(lambda x, logsnr, F_star: F_star), loss())


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        (
            "lora",
            {"--token": "circle"},
            "circle: that is a word already: give one such as '<circle>'",
        ),
        ("lora", {"--pictures": "FOLDER/empty"}, "holds no picture that can be used"),
        ("lora", {"--pictures": "FOLDER/none"}, "none is not a folder"),
        ("lora", {"--pictures": "FOLDER/unnamed"}, "a caption that does not say <blicket>"),
        ("lora", {"--class": None}, "give --class, or --preserve 0"),
        ("lora", {"--class": " "}, "--class is empty"),
        ("lora", {"--prompts": "FOLDER/none.txt"}, "none.txt"),
        ("lora", {"--stages": "sr64"}, "the stages of"),
        ("lora", {"--model": "FOLDER/none"}, "none is not a run"),
        ("lora", {"--model": "FOLDER/silent"}, "no stage reads captions"),
        ("lora", {"--out": "FOLDER/base"}, "holds something else"),
        ("dreambooth", {"batch": "3"}, "give an even number"),
        ("dreambooth", {"--preserve": "-1"}, "at least 0"),
        ("textual_inversion", {"--class": None}, "give --word or --class"),
        ("textual_inversion", {"--word": "blicket"}, "several tokens"),
        ("lora", {"adapter.rank": "0"}, "adapter.rank=0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    base, tmp_path, capsys, method, change, says
):
    (base / "empty").mkdir(exist_ok=True)
    (base / "unnamed").mkdir(exist_ok=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(base / "unnamed" / "a.png")
    (base / "unnamed" / "a.txt").write_text("a circle")
    out = tmp_path / "out"
    options = {"--model": "FOLDER/base", "--pictures": "FOLDER/pictures", "--token": TOKEN}
    options |= {"--class": "circle", "--out": str(out), **change}
    asked = ["personalize", "--method", method]
    for name, value in options.items():
        value = value and value.replace("FOLDER", str(base))
        asked += [] if value is None else [name, value] if name[0] == "-" else [f"{name}={value}"]
    before = content(base)
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()
    assert content(base) == before
