"""Generation as a job: nothing but prompts, seed and model changes a picture; none is missing."""

import json
import shlex
from copy import copy
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.cli import main
from cascade.config.compose import built, composed, saved
from cascade.encoders.identity import Former
from cascade.errors import Failed, UserError
from cascade.eval.pictures import generation
from cascade.eval.pictures.coco import prompts_of
from cascade.eval.pictures.generation import check, generate, sample_number
from cascade.eval.pictures.identity import described, identity
from cascade.eval.pictures.prompts import LAYOUTS, Prompt
from cascade.eval.pictures.share import share
from cascade.pipeline import BestOf, Cascade
from tests.hostile import refused
from tests.processes import Job

TEXTS = ["a red circle", "two blue squares", "a star", "a green ring above a red star", "a moon"]
PROMPTS = [Prompt(text, {"prompt": text, "tag": "x", "include": []}) for text in TEXTS]
CONFIG = [
    *("data.path=none", "stage=decoder_text", "size=16", "net.channels=8", "net.blocks=1"),
    *("net.head_channels=8", "net.embed=16", "text.size=16", "text.encoder.layers=1"),
    *("text.encoder.embed=4", "sampler.steps=2", "+sampler.scale=2.0"),
]


def stage_of(config, seed=0):
    torch.manual_seed(seed)
    stage = built(config.stage).eval()
    for parameter in stage.parameters():  # networks start as zeros
        torch.nn.init.normal_(parameter, std=0.3)
    return stage


@pytest.fixture(scope="module")
def config():
    return composed("train", CONFIG)


@pytest.fixture(scope="module")
def cascade(config):
    return Cascade([stage_of(config)])


@pytest.fixture(scope="module")
def model(cascade):
    return {"weights": "EMA", **described(cascade)}


def job(out, prompts=PROMPTS, layout="plain", per_prompt=2, **more):
    return generation.Job(out, prompts, LAYOUTS[layout], per_prompt, **{"batch": 3, **more})


def files(folder):
    found = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: data for name, data in found.items() if name.name != ".claims"}


@pytest.fixture(scope="module")
def whole(cascade, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert generate(cascade, job(folder), model) == 0
    return files(folder)


def test_each_prompt_and_picture_has_a_picture_of_its_own(whole):
    pictures = [data for name, data in whole.items() if name.suffix == ".png"]
    assert len(pictures) == len(set(pictures)) == 10


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [1, 2, 5, 8])
def test_a_killed_job_goes_on_to_the_same_files(cascade, model, whole, tmp_path, monkeypatch, at):
    """It is killed while picture `at` is half written."""
    count, save = 0, Image.Image.save

    def die(image, path, *args, **options):
        nonlocal count
        count += 1
        if count == at:
            path.write_bytes(b"\x89PNG\r\n\x1a\n half")
            raise Killed
        save(image, path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", die)
        patch.setattr(
            "cascade.files.atomic.remove", lambda path: None
        )  # nobody cleans up after a kill
        patch.setattr(generation, "remove", lambda path: None)
        with pytest.raises(Killed):
            generate(cascade, job(tmp_path), model)
    refused(lambda: check(tmp_path), f"lacks {11 - at} of 10")
    assert generate(cascade, job(tmp_path), model) == 0
    assert files(tmp_path) == whole


@pytest.fixture
def batches(monkeypatch):
    """The sample numbers of each batch that a cascade paints."""
    sample, numbers = Cascade.__call__, []

    def counting(self, batch, seed, progress=None):
        numbers.append(batch["sample"].tolist())
        return sample(self, batch, seed, progress)

    monkeypatch.setattr(Cascade, "__call__", counting)
    return numbers


EVERY = [sample_number(i, k) for i in range(5) for k in range(2)]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_shards_together_equal_one(cascade, model, whole, tmp_path, count, batches):
    """With 7 shards, some have nothing to do."""
    left = [generate(cascade, job(tmp_path), model, (i, count)) for i in reversed(range(count))]
    assert left[-1] == 0
    assert all(a >= b for a, b in pairwise(left))
    assert files(tmp_path) == whole
    # Rounding depends on who is in a batch, even where it does not show.
    assert sorted(batches) == [EVERY[i : i + 3] for i in range(0, 10, 3)]


def test_more_pictures_and_prompts_change_no_other(cascade, model, whole, tmp_path):
    generate(cascade, job(tmp_path, PROMPTS[:4], per_prompt=3, batch=4), model)
    for name in ("00003_0001.png", "00000_0000.png"):
        with Image.open(tmp_path / name, formats=("PNG",)) as picture:
            mine = np.asarray(picture).astype(int)
        (tmp_path / "other.png").write_bytes(next(v for k, v in whole.items() if k.name == name))
        with Image.open(tmp_path / "other.png", formats=("PNG",)) as picture:
            # Another batch: noise is equal to the bit, and what networks make of it nearly.
            assert np.abs(np.asarray(picture).astype(int) - mine).max() <= 1


def test_what_is_whole_is_not_made_again(cascade, model, whole, tmp_path, batches):
    generate(cascade, job(tmp_path), model)
    (tmp_path / "00001_0001.png").write_bytes(b"\x89PNG\r\n\x1a\n cut short")
    batches.clear()
    assert generate(cascade, job(tmp_path), model) == 0
    assert batches == [EVERY[3:6]]  # the block of the picture that was not whole
    assert files(tmp_path) == whole


CHANGES = {
    "seed": {"seed": 1},
    "per_prompt": {"per_prompt": 3},
    "batch": {"batch": 4},
    "prompts.hash": {"prompts": PROMPTS[::-1]},
    "layout": {"layout": "geneval"},
}


@pytest.mark.parametrize("setting", CHANGES)
def test_other_settings_are_refused(cascade, model, tmp_path, setting):
    generate(cascade, job(tmp_path), model, (6, 7))
    before = files(tmp_path)
    said = refused(lambda: generate(cascade, job(tmp_path, **CHANGES[setting]), model))
    assert setting in said
    assert files(tmp_path) == before


def test_another_model_is_another_hash(config, cascade, model):
    stage = cascade.stages[0]
    sampler = stage.sampler
    other = stage_of(config)
    other.sampler = replace(sampler, scale=3.0)
    weights = stage_of(config)
    with torch.no_grad():
        next(weights.net.parameters()).view(-1)[0] += 1e-3
    best = Cascade([BestOf(stage, 3)])
    found = [described(c)["hash"] for c in (Cascade([other]), Cascade([weights]), best)]
    assert len({*found, model["hash"]}) == 4
    assert described(Cascade([stage_of(config)]))["hash"] == model["hash"]
    assert json.loads(json.dumps(model)) == model
    assert model["stages"]["image_16"]["sampler"]["scale"] == 2.0


def test_other_models_are_refused_by_what_differs(config, cascade, model, tmp_path):
    generate(cascade, job(tmp_path), model, (6, 7))
    other = stage_of(config)
    other.sampler = replace(other.sampler, scale=3.0)
    changed = Cascade([other])
    said = refused(
        lambda: generate(changed, job(tmp_path), {"weights": "EMA", **described(changed)})
    )
    assert "sampler.scale: 2.0 -> 3.0" in said


def test_the_set_is_checked_exactly(cascade, model, whole, tmp_path):
    generate(cascade, job(tmp_path), model)
    made = check(tmp_path)
    assert made.ids == {f"{i:05d}_{k:04d}" for i in range(5) for k in range(2)}
    assert made.protocol["guidance"] == {"image_16": 2.0}
    assert (made.protocol["steps"], made.protocol["weights"]) == ({"image_16": 2}, "EMA")
    moved = tmp_path / "00002_0001.png"
    moved.rename(tmp_path / "00002_0009.png")
    assert "00002_0001" in refused(lambda: check(tmp_path), "lacks 1 of 10")
    moved.write_bytes((tmp_path / "00002_0009.png").read_bytes())
    assert "00002_0009" in refused(lambda: check(tmp_path), "were not generated")
    (tmp_path / "00002_0009.png").unlink()
    check(tmp_path)
    text = (tmp_path / "captions.jsonl").read_text()
    (tmp_path / "captions.jsonl").write_text(text.replace("a star", "a stone"))
    refused(lambda: check(tmp_path), "changed")
    (tmp_path / "manifest.json").write_text('{"per_prompt": 1}')
    refused(lambda: check(tmp_path), "damaged")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_generated_and_checked(cascade, model, tmp_path, layout):
    work = job(tmp_path, layout=layout)
    assert generate(cascade, work, model) == 0
    assert generate(cascade, work, model) == 0
    assert len(check(tmp_path).ids) == 10
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").open()]
    assert [(row["caption"], row["tag"]) for row in rows[::2]] == [(text, "x") for text in TEXTS]


def test_folders_of_something_else_are_refused(cascade, model, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    refused(lambda: generate(cascade, job(tmp_path), model), "other pictures")
    refused(lambda: job(tmp_path / "mine.png"), "is a file")


def test_a_picture_that_is_not_finite_ends_the_job(config, model, tmp_path):
    stage = stage_of(config)
    torch.nn.init.constant_(next(stage.net.parameters()), torch.nan)
    with pytest.raises(Failed, match="00000_0000 is not finite"):
        generate(Cascade([stage]), job(tmp_path), model)
    assert not list(tmp_path.glob("*.png"))


def test_shares_are_those_of_the_command_line_or_the_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert share(None) == (0, 1)
    assert share("1/4") == (1, 4)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert share(None) == (0, 1)  # a batch script without srun: nobody else is there
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert share(None) == (0, 1)  # one that was sent from within a step of another job
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    assert share(None) == (2, 3)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert share(None) == (5, 8)
    assert share("0/1") == (0, 1)
    for wrong in ("4/4", "1", "-1/2", "a/b", "0/0", "1/"):
        refused(lambda wrong=wrong: share(wrong), "i/n")


@pytest.fixture(scope="module")
def saved_model(config, cascade, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    cascade.stages[0].export(folder / "decoder")
    saved(config, folder / "decoder" / "config.yaml")
    (folder / "cascade.yaml").write_text("stages:\n  decoder: {scale: 2.0}\n")
    return folder


def test_the_command_makes_the_same_pictures(saved_model, whole, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    argv = ["generate", "--model", str(saved_model), "--prompts", str(tmp_path / "prompts.txt")]
    argv += ["--out", str(tmp_path / "out"), "--per-prompt", "2", "--batch", "3"]
    assert main([*argv, "--shard", "0/2"]) == 0
    said = capsys.readouterr().out
    assert "4 are of other shards than 0/2" in said
    rest = shlex.split(said.strip().rpartition(": ")[2])
    assert rest == ["cascade", *argv, "--shard", "0/2", "--shard", "0/1"]
    assert main(rest[1:]) == 0
    assert "all 10 pictures" in capsys.readouterr().out
    pictures = {name: data for name, data in whole.items() if name.suffix == ".png"}
    made = files(tmp_path / "out")
    assert {name: data for name, data in made.items() if name.suffix == ".png"} == pictures
    assert main([*argv, "--set", "decoder.scale=3"]) == 2
    assert "sampler.scale: 2.0 -> 3.0" in capsys.readouterr().err


def test_a_folder_that_an_earlier_version_began_goes_on(cascade, tmp_path):
    """It hashed the weights of encoders alone."""

    def identified(encoder):
        stage = copy(cascade.stages[0])
        stage.encoders = (encoder,)
        return identity(Cascade([stage]), tmp_path)

    encoder = SimpleNamespace(hash="new", former=Former("old"))
    doubtful = SimpleNamespace(hash="new", former=Former("old", again=False))
    now, then = identified(encoder), identified(SimpleNamespace(hash="old", former=Former("old")))
    assert now != then
    (tmp_path / "manifest.json").write_text(json.dumps({"model": then}))
    assert identified(encoder) == then
    assert identified(doubtful) == now


def test_ranks_generate_together(saved_model, whole, tmp_path):
    """Three processes at once, which find each other's share as torchrun gives it."""
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    argv = ["generate", "--model", str(saved_model), "--prompts", str(tmp_path / "prompts.txt")]
    argv += ["--out", str(tmp_path / "out"), "--per-prompt", "2", "--batch", "3"]
    ranks = Job(main, (argv,), out=tmp_path / "log", ranks=3)
    assert ranks.wait(120) == [0, 0, 0], ranks.output()
    assert "all 10 pictures" in ranks.output()
    assert {k: v for k, v in files(tmp_path / "out").items() if k.suffix == ".png"} == {
        k: v for k, v in whole.items() if k.suffix == ".png"
    }


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--per-prompt", "0"], "at least 1"),
        (["--batch", "0"], "at least 1"),
        (["--seed", "-1"], "at least 0"),
        (["--shard", "3/2"], "i/n"),
        (["--layout", "geneval"], "tag and include"),
        (["--prompts", "coco:nowhere"], "not there"),
        (["--prompts", "missing.txt"], "missing.txt"),
    ],
)
def test_the_command_refuses(options, says, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a star\n")
    argv = ["generate", "--model", "nowhere", "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*argv, "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_prompts_with_ids_are_painted_without_them_and_keep_them(cascade, model, tmp_path):
    text = "".join(f"p{i}\t{prompt}\n" for i, prompt in enumerate(TEXTS))
    (tmp_path / "prompts.txt").write_text(text)
    work = job(tmp_path / "out", prompts_of(str(tmp_path / "prompts.txt")), per_prompt=1)
    assert generate(cascade, work, model) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").open()]
    assert [(row["prompt_id"], row["caption"]) for row in rows] == [
        (f"p{i}", prompt) for i, prompt in enumerate(TEXTS)
    ]


def test_prompts_out_of_range_are_refused(tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        job(tmp_path, per_prompt=generation.MANY)
