"""The perceptual loss, against torchmetrics' LPIPS on the same weights, and in a training."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision import models

from cascade import cli
from cascade.data.scenes.generate import write_scenes
from cascade.diffusion.gaussian import Diffusion
from cascade.diffusion.learned_variance import LearnedVariance
from cascade.diffusion.noise import alpha_sigma
from cascade.diffusion.prediction import eps, v, x0
from cascade.encoders.lpips import LPIPS
from cascade.losses.perceptual import Perceptual
from cascade.losses.watched import Call
from tests.small import SR


def weights(network, file):
    """A file of torchvision's format, with random weights; returns those of the features."""
    with torch.device("meta"):
        shapes = getattr(models, network)().features.state_dict()
    random = torch.Generator().manual_seed(0)
    features = {
        key: torch.randn(x.shape, generator=random) * (2 / max(1, x[0].numel())) ** 0.5
        for key, x in shapes.items()
    }
    state = {f"features.{key}": x for key, x in features.items()}
    state["classifier.1.weight"] = torch.zeros(3)  # which nobody reads
    torch.save(state, file, _use_new_zipfile_serialization=False)  # as those of 2017 are
    return features


@pytest.mark.parametrize(
    ("network", "name"), [("alexnet", "alex"), pytest.param("vgg16", "vgg", marks=pytest.mark.slow)]
)
def test_the_distance_is_that_of_torchmetrics(network, name, tmp_path):
    features = weights(network, tmp_path / "net.pth")
    theirs = _LPIPS(net=name, pnet_rand=True)
    for key, value in theirs.net.state_dict().items():
        value.copy_(features[key.partition(".")[2]])  # slice1.0.weight
    pictures = torch.rand(2, 3, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    one, other = pictures
    one.requires_grad_()
    found = LPIPS(str(tmp_path / "net.pth"), network)(one, other)
    expected = theirs(one, other).flatten()
    assert expected.min() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.autograd.grad(found.sum(), one)[0].abs().max() > 0


class Squares:
    """The mean square of the difference, as a distance."""

    hash = "0"

    def to(self, device):
        return self

    def __call__(self, one, other):
        return (one - other).square().flatten(1).mean(1)


@pytest.mark.parametrize("prediction", [eps, x0, v])
def test_it_compares_the_denoised_picture_at_the_levels_asked_for(prediction):
    process = Diffusion(prediction=prediction)
    random = torch.Generator().manual_seed(0)
    clean, noise, guess = torch.randn(3, 4, 3, 8, 8, generator=random)
    logsnr = torch.tensor([-3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    x, wanted = process.task(clean, noise, logsnr)
    made = SimpleNamespace(process=process, done=0.2)
    loss = Perceptual(Squares(), weight=0.3, least=-1.0, until=0.5)
    found = loss(made, {}, clean, Call(x, logsnr.float(), wanted + guess, {}))
    alpha, sigma = alpha_sigma(logsnr)
    # The prediction is off by `guess`, and so x0_hat by this much.
    factor = {eps: sigma / alpha, x0: torch.ones(4), v: sigma}[prediction]
    expected = 0.3 * factor**2 * guess.square().flatten(1).mean(1)
    expected[0] = 0
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-5)
    made.done = 0.5
    assert not loss(made, {}, clean, Call(x, logsnr.float(), wanted + guess, {})).any()
    assert Perceptual(Squares()).least == -math.inf


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder, "plain", "train", 20, 64, seed=0, shard_size=10)
    return folder


def trained(shards, out, *more):
    sizes = ["size=32", "low=16", "batch=2", "images=40"]
    return cli.main(["train", *SR, *sizes, f"data.path={shards}", f"run={out}", *more])


@pytest.mark.slow
def test_a_training_with_it_logs_it_apart(shards, tmp_path, capfd):
    asked = ["perceptual=alexnet"]
    file = tmp_path / "alexnet.pth"
    assert trained(shards, tmp_path / "run", *asked, f"perceptual.teacher.file={file}") == 2
    assert "give a file of alexnet's weights" in capfd.readouterr().err
    assert trained(shards, tmp_path / "run", *asked) == 2
    assert "perceptual.teacher.file is not given" in capfd.readouterr().err
    weights("alexnet", file)
    asked += [f"perceptual.teacher.file={file}"]
    assert trained(shards, tmp_path / "run", *asked) == 0
    (row,) = csv.DictReader((tmp_path / "run" / "metrics.csv").open())
    assert 0 < float(row["perceptual"]) < float(row["loss"])
    kept = load_file(tmp_path / "run" / "weights.safetensors")
    assert {key.partition(".")[0] for key in kept} == {"conditioner", "net"}


def test_weights_of_another_network_and_other_stages_are_refused(shards, tmp_path, capfd):
    weights("alexnet", tmp_path / "net.pth")
    asked = ["perceptual=vgg", f"perceptual.teacher.file={tmp_path / 'net.pth'}"]
    assert trained(shards, tmp_path / "run", *asked) == 2
    assert "does not hold the weights of vgg16" in capfd.readouterr().err
    made = SimpleNamespace(writes="image_64", process=LearnedVariance(Diffusion(prediction=eps)))
    with pytest.raises(Exception, match="LearnedVariance gives no x0"):
        Perceptual(Squares()).attached(made)
