"""The published systems' recipes, shrunk to the scenes: each of them trains and samples."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cascade.conf
from cascade.config.compose import built, composed
from cascade.data.embeddings import EMBEDDINGS
from cascade.data.loading import loader
from cascade.data.scenes.generate import write_scenes
from cascade.encoders.clip import save_clip
from cascade.latents.frozen import save_autoencoder
from cascade.runs.run import Run
from cascade.training import fit
from cascade.verbs.data import embed

CONF = Path(next(iter(cascade.conf.__path__)))
RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*_tiny.yaml"))

# A third above what was reached with seed 0. A constant answer has a loss of about 1 (the unCLIP
# prior's: 0.29); knowing only how each token is distributed, the autoregressive prior has 4.89.
LOSSES = {
    "glide_base64_tiny": 0.09,
    "imagen_base64_tiny": 0.15,
    "imagen_sr1024_tiny": 0.55,
    "imagen_sr256_tiny": 0.5,
    "karlo_decoder_tiny": 0.09,
    "karlo_prior_tiny": 0.26,
    "karlo_sr256_tiny": 0.085,
    "unclip_decoder_tiny": 0.09,
    "unclip_prior_ar_tiny": 4.75,
    "unclip_prior_tiny": 0.075,
    "unclip_sr1024_tiny": 0.06,
    "unclip_sr256_tiny": 0.085,
}


def data_and_clip(folder, count, images):
    """Scenes of 64 px, a CLIP (untrained for 0 images) and its embeddings of them."""
    for split, n in (("train", count), ("val", 16)):
        write_scenes(folder / "shards", "plain", split, n, 64, seed=0)
    overrides = [f"data.path={folder / 'shards'}", f"run={folder / 'clip'}", "warmup=1_000"]
    config = composed("train", ["stage=clip", *overrides, f"images={max(1, images)}", "batch=128"])
    if images:
        fit.train(config)
    else:
        architecture = built(config.clip.model)
        save_clip(architecture, architecture.build(), folder / "clip")
    embed(folder / "shards", str(folder / "clip"), folder / "shards" / EMBEDDINGS)
    return [f"data.path={folder / 'shards'}", f"clip.path={folder / 'clip'}"]


def untrained_autoencoder(folder):
    sizes = built(composed("train", ["stage=autoencoder", "data.path=none"]).autoencoder.model)
    folder.mkdir()
    save_autoencoder(sizes, sizes.build(), folder)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    torch.manual_seed(0)
    return data_and_clip(tmp_path_factory.mktemp("few"), 64, 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_all_of_its_parameters_and_samples(recipe, few, tmp_path):
    overrides = [f"experiment={recipe}", *few, f"run={tmp_path / 'run'}", "grids=0"]
    if recipe == "latent_tiny":
        overrides.append(f"autoencoder.path={untrained_autoencoder(tmp_path / 'autoencoder')}")
    if recipe == "unclip_prior_tiny":
        overrides.append("+process.levels=4")  # of its variance, each measured on two batches
    config = composed("train", [*overrides, "batch=8", "images=24", "warmup=16"])
    stage = Run(fit.train(config)).load()
    losses = [float(row["loss"]) for row in csv.DictReader((tmp_path / "run/metrics.csv").open())]
    assert losses
    assert all(0 < loss < 20 for loss in losses)
    batch = next(iter(loader(built(config.data), 2, batches=1)))
    stage.sampler = replace(stage.sampler, steps=3)
    stage.loss(stage.encoded(batch)).mean().backward()
    assert all(p.grad is not None for p in stage.parameters())  # DDP would wait for it
    made = stage.sample({k: v for k, v in batch.items() if k != stage.writes}, seed=0)
    assert made.shape == batch[stage.writes].shape
    assert made.isfinite().all()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return data_and_clip(tmp_path_factory.mktemp("many"), 3000, 12_000)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", LOSSES)  # but what needs a trained autoencoder first
def test_a_recipe_learns(recipe, many, tmp_path):
    overrides = [f"experiment={recipe}", *many, f"run={tmp_path / 'run'}", "grids=1"]
    folder = fit.train(composed("train", [*overrides, "+data.cache=true"]))
    losses = [float(row["loss"]) for row in csv.DictReader((folder / "metrics.csv").open())]
    assert sum(losses[-3:]) / 3 < LOSSES[recipe]
