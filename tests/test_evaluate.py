"""`cascade evaluate` on a cascade that was never trained: all numbers, and how sure they are."""

import json
import shutil
import weakref

import pytest
import torch
from omegaconf import OmegaConf

from cascade.cli import main
from cascade.config.compose import built, composed, loaded, saved
from cascade.data.embeddings import EMBEDDINGS
from cascade.data.scenes.generate import sample_scene, write_scenes
from cascade.diffusion.likelihood import bound
from cascade.draws import generator
from cascade.encoders.clip import save_clip
from cascade.errors import UserError
from cascade.eval.cascades import evaluation, held_out
from cascade.eval.cascades.evaluation import check, evaluate
from cascade.eval.cascades.held_out import held_out_split
from cascade.eval.cascades.protocol import HeldOut
from cascade.eval.cascades.summary import write_report
from cascade.eval.scenes.geneval import TASKS
from cascade.pipeline import Cascade
from cascade.training.checkpoint import CheckpointFolders
from cascade.verbs.data import embed

STAGES = {
    "prior": ["stage=prior"],
    "decoder": ["stage=decoder_sketch", "process=shifted_x0", "size=16"],
    "sr64": ["stage=sr256", "size=64", "low=16", "crop=null"],
}
COUNT = 42  # of each kind


def run(folder, name, *overrides):
    """A run of a stage, with random weights."""
    own = [f"data.path={folder / 'shards'}", f"run={folder / name}", "clip.model.dim=12"]
    config = composed("train", [*overrides, *own, f"clip.path={folder / 'clip'}"])
    saved(config, folder / name / "config.yaml")
    return config


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    data = folder / "shards"
    torch.manual_seed(0)
    write_scenes(data, "plain", "val", 100, 64, seed=0)
    for name in ("clip", "judge"):
        architecture = built(run(folder, name, "stage=clip").clip.model)
        save_clip(architecture, architecture.build(), folder / name)
    embed(data, str(folder / "clip"), data / EMBEDDINGS)
    stages = {name: built(run(folder, name, *of).stage) for name, of in STAGES.items()}
    for name, stage in stages.items():
        stage.export(folder / name)
    state = {"state_dict": dict(stages["prior"].state_dict())}
    state["position"] = {"step": 3, "images": 12, "consumed": 12, "offset": 0, "ranks": 1}
    path = folder / "prior" / "checkpoints" / "step-00000003"
    CheckpointFolders().save_checkpoint(state, path)
    choices = {name: {"steps": 2 if name == "decoder" else 1} for name in STAGES}
    OmegaConf.save({"stages": choices}, folder / "cascade.yaml")
    demo = composed("demo", []).evaluate.targets
    targets = {k.replace("256", "64"): v for k, v in OmegaConf.to_container(demo).items()}
    more = {"geneval": 2, "bound": 2, "typographic": True}
    evaluate(folder, data, folder / "judge", {"val": COUNT}, [1.0], 0, targets, **more)
    return folder


@pytest.fixture(scope="module")
def metrics(measured):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((measured / "metrics.json").read_text(), parse_constant=refuse)


def dictionaries(node):
    """All that are in a nest of dictionaries and lists."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    for child in node if isinstance(node, list) else ():
        yield from dictionaries(child)


def test_the_demos_targets_are_measured(metrics):
    assert len(metrics["targets"]) == len(composed("demo", []).evaluate.targets)
    assert all(row["measured"] is not None for row in metrics["targets"])


def test_rates_and_distances_have_counts_and_intervals(metrics):
    named = dictionaries(metrics)
    numbers = [n for n in named if any(isinstance(n.get(k), float) for k in ("whole", "frechet"))]
    assert len(numbers) > 20
    for node in numbers:
        assert node["count"] > 0
        for name, (low, high) in node["intervals"].items():
            assert low - 1e-9 <= node[name] <= high + 1e-9, name
        rates = {"objects", "binding", "relations", "counts", "whole"} & node.keys()
        assert rates <= node["intervals"].keys()


def test_all_stages_are_in_the_table(metrics):
    table = metrics["attribution"]
    assert [row.get("stage") for row in table["rows"]] == [None, "prior", "decoder", "sr64"]
    assert table["count"] == 60  # five times the judge's dimensions
    assert set(table["rows"][1]["cost"]["image_64"]) == {"frechet", "clip_score"}


def test_both_weights_of_the_prior_are_measured(metrics):
    prior = metrics["prior"]
    assert prior["online"]["step"] == 3
    same = [key for key in prior if key not in ("online", "intervals")]
    assert set(same) < set(prior["online"])
    # The checkpoint has the very weights that were exported.
    assert all(prior["online"][key] == prior[key] for key in same)
    assert prior["zero_shot"]["classes"] == 32
    assert prior["zero_shot"]["count"] == COUNT
    assert len(prior["loss_by_level"]["levels"]) == 9


def test_geneval_is_scored_and_written_down(measured, metrics):
    scores = metrics["geneval"]
    assert scores["level"] == "plain"
    assert list(scores["tasks"]) == list(TASKS)
    assert (scores["overall"]["prompts"], scores["overall"]["count"]) == (12, 48)
    results = (measured / "geneval_results.jsonl").read_text().splitlines()
    prompts = (measured / "geneval_prompts.jsonl").read_text().splitlines()
    assert (len(prompts), len(results)) == (12, 48)
    assert sum(json.loads(line)["correct"] for line in results) == round(
        sum(row["score"] * row["count"] for row in scores["tasks"].values())
    )


def test_the_bound_of_an_untrained_network_is_that_of_x0_hat_0(measured, metrics):
    """Its output is zero, whatever the noise."""
    found = metrics["bound"]["bits_per_dimension"]
    assert set(found) == {"image_16", "image_64"}
    process = built(loaded(measured / "decoder" / "config.yaml").stage.process)
    both = Cascade([Last(), Last()])  # so that 16 px are shrunk from 64, as for the cascade
    both.stages[1].writes = "image_64"
    data = held_out_split(measured / "shards", "val", COUNT, both)
    whole = bound(
        process, lambda x, *_: torch.zeros_like(x), data.truth["image_16"], None, torch.randn, 2
    )
    assert found["image_16"] == pytest.approx(whole.total.mean().item(), rel=1e-5)


def test_the_clip_is_attacked_with_words(metrics):
    found = metrics["typographic"]
    assert found["count"] == COUNT
    assert set(found["zero_shot"]) == {"no word", "right word", "wrong word"}
    assert all(shot["count"] == COUNT for shot in found["zero_shot"].values())
    for rates in (found, *found["variations"].values()):
        assert all(0 <= rates[name] <= 1 for name in rates["intervals"])


def test_the_report_shows_it(measured):
    page = (measured / "report.html").read_text()
    for said in (
        "In few steps",
        "Cost of each stage",
        "caption, clip_image, image_16, image_64",
        "bits per dimension",
        "zero-shot color of 32 classes",
        "colour attribution",
        "With the text embedding as x0_hat",
    ):
        assert said in page, said


class Last:
    reads, writes = frozenset({"caption"}), "image_16"

    def encoded(self, batch):
        return batch

    def sample(self, batch, seed, **choices):
        return torch.zeros(1)


class Prior(Last):
    writes = "clip_image"


def test_what_data_cannot_say_is_refused(tmp_path):
    data = HeldOut(["a"], {"image_16": torch.zeros(1, 3, 16, 16)})
    check(Cascade([Last()]), data, 0, tmp_path)
    with pytest.raises(UserError, match="no embeddings"):
        check(Cascade([Prior(), Last()]), data, 0, tmp_path)
    with pytest.raises(UserError, match="no scenes"):
        check(Cascade([Last()]), data, 5, tmp_path)
    scenes = HeldOut(data.captions, data.truth, [sample_scene("plain", "val", generator(0, "", 0))])
    with pytest.raises(UserError, match="64 px"):
        check(Cascade([Last()]), scenes, 5, tmp_path)


def test_a_negative_number_of_prompts_is_refused(measured, capsys):
    command = f"evaluate --model {measured} --data {measured}/shards --judge {measured}/judge"
    assert main([*command.split(), "--geneval", "-1"]) == 2
    assert "--geneval" in capsys.readouterr().err


def test_nothing_is_measured_as_held_out_that_is_not(measured, tmp_path, capsys):
    shutil.copytree(measured / "shards", tmp_path / "shards")
    (tmp_path / "shards/val-00000.tar").rename(tmp_path / "shards/00000.tar")
    command = f"evaluate --model {measured} --data {tmp_path}/shards --judge {measured}/judge"
    assert main(command.split()) == 2
    assert "`cascade data index DIR --val 1%` holds some pictures out" in capsys.readouterr().err


def as_measured(node):
    """Intervals are tuples before they are JSON."""
    pairs = {k: v for k, v in node.items() if isinstance(v, list) and len(v) == 2}
    ends = {k: tuple(v) for k, v in pairs.items() if all(isinstance(x, int | float) for x in v)}
    return {**node, **ends}


def test_the_report_says_whose_captions_they_are(measured, tmp_path):
    metrics = json.loads((measured / "metrics.json").read_text(), object_hook=as_measured)
    for split, words in (("all", "captions of all samples"), ("train", "of the training samples")):
        told = {**metrics, "captions": {split: 1}, split: metrics["val"]}
        write_report(tmp_path / "report.html", measured, told, {})
        page = (tmp_path / "report.html").read_text()
        assert page.count(words) == 2
        assert "held-out" not in page


def test_the_largest_true_pictures_are_let_go_before_any_is_painted(measured, monkeypatch):
    split, largest = held_out.held_out_split, []

    def kept(*given):
        samples = split(*given)
        largest.append(weakref.ref(samples.truth["image_64"]))
        return samples

    def paint(*given):
        assert largest[0]() is None
        raise InterruptedError

    monkeypatch.setattr(held_out, "held_out_split", kept)
    monkeypatch.setattr(evaluation.Judged, "paint", paint)
    with pytest.raises(InterruptedError):
        evaluate(measured, measured / "shards", measured / "judge", {"val": 2}, [1.0], 0)
