"""The autoencoder's mathematics, and its training, which a kill does not change."""

import csv
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cascade import cli
from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.draws import Draws
from cascade.errors import UserError
from cascade.latents.adversarial import Adversarial, Discriminator, balance, hinge
from cascade.latents.autoencoder import Architecture, Codebook, Posterior, commitment, psnr
from cascade.latents.frozen import FrozenAutoencoder
from cascade.latents.training import AutoencoderTraining
from cascade.training import fit
from tests.test_perceptual import Squares
from tests.test_resume import Killed, assert_equal, seen_by, state, weights

TINY = ["stage=autoencoder", "size=16", "batch=4", "warmup=8", "grids=0", "ema=0.9"]
TINY += [f"autoencoder.model.{value}" for value in ("channels=8", "multipliers=[1,2]")]
JUDGE = ["adversarial=patch", "+adversarial.channels=8", "+adversarial.layers=1"]


def sizes(**more):
    return Architecture(**{"channels": 8, "multipliers": [1, 2], "latent": 3, "factor": 4, **more})


def pictures(count, side=16, seed=0):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder, "plain", "train", 20, 16, seed=0, shard_size=10)
    write_scenes(folder, "plain", "val", 4, 16, seed=1, shard_size=10)
    return folder


def test_the_divergence_is_that_of_torch():
    torch.manual_seed(0)
    posterior = Posterior(torch.randn(5, 3, 4, 4), torch.rand(5, 3, 4, 4) + 0.1)
    normal = Normal(torch.zeros(()), torch.ones(()))
    expected = kl_divergence(Normal(*posterior), normal).sum((1, 2, 3))
    torch.testing.assert_close(posterior.kl, expected)


def test_codes_are_the_nearest_and_gradients_pass_straight_through():
    torch.manual_seed(0)
    book, z = Codebook(7, 3), torch.randn(2, 3, 4, 5, requires_grad=True)
    entries = book.entries.detach()
    for b, i, j in [(b, i, j) for b in range(2) for i in range(4) for j in range(5)]:
        apart = [(z[b, :, i, j] - entry).square().sum().item() for entry in entries]
        assert book.nearest(z)[b, i, j] == min(range(7), key=apart.__getitem__)
    net = sizes(codes=7).build()
    net.codebook = book
    q = net.quantised(z)
    assert torch.equal(q.detach(), z.detach() + (book(z) - z).detach())
    torch.testing.assert_close(q, entries[book.nearest(z)].movedim(3, 1))
    weight = torch.randn_like(q)
    (q * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    assert book.entries.grad is None


def test_commitment_pulls_codes_and_latents_towards_each_other():
    torch.manual_seed(0)
    net, z = sizes(codes=5).build(), torch.randn(4, 3, 2, 2, requires_grad=True)
    commitment(net, z, 0.25).sum().backward()
    q = net.codebook(z).detach()
    n = z[0].numel()
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z - q).detach() / n)
    expected = torch.zeros(5, 3)
    pulls = (2 * (q - z) / n).detach().movedim(1, 3).reshape(-1, 3)
    expected.index_add_(0, net.codebook.nearest(z).flatten(), pulls)
    torch.testing.assert_close(net.codebook.entries.grad, expected)


@pytest.mark.parametrize(("factor", "multipliers"), [(4, [1, 2]), (4, [2]), (8, [1, 1, 2])])
@pytest.mark.parametrize("codes", [0, 6])
def test_shapes_of_every_factor(factor, multipliers, codes):
    net = sizes(factor=factor, multipliers=multipliers, codes=codes).build()
    posterior = net.posterior(pictures(2, 16))
    assert posterior.mean.shape == (2, 3, 16 // factor, 16 // factor)
    assert (posterior.std is None) == bool(codes)
    assert net.decode(posterior.mean).shape == (2, 3, 16, 16)


def test_psnr_of_a_known_error():
    x = torch.zeros(1, 3, 4, 4)
    assert psnr(x, x + 0.2).item() == pytest.approx(
        20.0, abs=1e-4
    )  # an error of 1 / 10 of the range


def test_a_patch_of_the_discriminator_has_the_size_that_it_says():
    for layers, side in ((1, 16), (2, 34), (3, 70)):
        judge = Discriminator(8, layers)
        for layer in judge:  # a norm over the picture would see all of it
            if isinstance(layer, torch.nn.GroupNorm):
                layer.forward = lambda x: x
        x = pictures(1, 96).requires_grad_()
        scores = judge(x)
        scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
        seen = x.grad.abs().sum((0, 1, 2)).nonzero().flatten()
        assert seen.max() - seen.min() + 1 == side


def test_the_signs_of_the_adversarial_loss():
    scores = torch.ones(1, 1, 1, 1)
    assert hinge(2 * scores, -2 * scores) == 0  # it is sure and right
    assert hinge(-scores, scores) == 2
    torch.manual_seed(0)
    judge, x = Adversarial(weight=1.0, start=0.0, channels=8, layers=1), pictures(4)
    last = torch.nn.Parameter(torch.tensor(0.5))
    y = x.flip(0) * last
    deceived, own = judge(x, y, (x - y).abs().mean(), last)
    (for_last,) = torch.autograd.grad(deceived, last, retain_graph=True)
    more = -(judge.discriminator(x.flip(0) * (last - 1e-3 * for_last)).mean())
    assert more < -judge.discriminator(y).mean()  # a step against the gradient deceives more
    # Each part of the loss moves its own side alone.
    theirs = list(judge.parameters())
    assert torch.autograd.grad(deceived, theirs, retain_graph=True, allow_unused=True) == (
        (None,) * len(theirs)
    )
    assert torch.autograd.grad(own, last, retain_graph=True, allow_unused=True) == (None,)
    found = torch.autograd.grad(own, theirs)
    own_alone = hinge(judge.discriminator(x), judge.discriminator(y.detach()))
    assert_equal(list(found), list(torch.autograd.grad(own_alone, theirs)))


def test_the_adversarial_loss_pulls_as_hard_as_the_others():
    last = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    ratio = balance(last.square().sum() / 2, 7 * last.sum(), last)
    assert ratio.item() == pytest.approx(5 / (7 * math.sqrt(2) + 1e-4))
    assert not ratio.requires_grad


class Half(Squares):
    def to(self, device):
        return self


def test_the_loss_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    training = AutoencoderTraining(sizes(), 16, torch.optim.SGD, kl=0.5)
    training.further["perceptual"] = Attached(Half())
    x = pictures(3)
    total = training.loss({"image_16": x, "sample": [4, 5, 6]})
    posterior = training.autoencoder.posterior(x)
    noise = Draws(0, "posterior", [4, 5, 6])(tuple(posterior.mean.shape))
    y = training.autoencoder.decode(posterior.mean + posterior.std * noise)
    kl = kl_divergence(Normal(*posterior), Normal(0.0, 1.0)).sum() / 3 / x[0].numel()
    expected = (x - y).abs().mean() + 0.5 * kl + 0.25 * Half()(y, x).mean()
    torch.testing.assert_close(total, expected)
    assert list(training.terms) == ["reconstruction", "latents", "perceptual"]


class Attached(torch.nn.Module):
    """An attached perceptual loss of weight 1 / 4."""

    def __init__(self, distance):
        super().__init__()
        self.distance = distance

    def active(self, done):
        return True

    def between(self, one, other):
        return 0.25 * self.distance(one, other)


def test_a_training_of_20_steps(shards, tmp_path):
    """Both bottlenecks, with the adversarial loss from the middle on."""
    for name, more in (("kl", JUDGE), ("vq", ["autoencoder=tiny_vq", *TINY[-2:]])):
        asked = [*TINY, *more, "images=80", "grids=1", f"run={tmp_path / name}"]
        assert cli.main(["train", *asked, f"data.path={shards}", "optim.lr=3e-3"]) == 0
    rows = list(csv.DictReader((tmp_path / "kl" / "metrics.csv").open()))
    assert rows[-1]["images"] == "80"
    assert float(rows[-1]["adversarial"]) != 0
    assert float(rows[-1]["discriminator"]) > 0
    assert (tmp_path / "kl" / "samples" / "0000000080.png").exists()
    assert (tmp_path / "kl" / "samples" / "truth.png").exists()
    assert not [key for key in weights(tmp_path / "kl") if "discriminator" in key]
    x = pictures(2)
    for name, std in (("kl", True), ("vq", False)):
        frozen = FrozenAutoencoder(str(tmp_path / name))
        posterior = frozen.posterior(x)
        assert (posterior.std is not None) == std
        assert frozen.decode(posterior.mean).shape == x.shape
    assert FrozenAutoencoder(str(tmp_path / "kl")).hash != frozen.hash


def test_a_killed_training_equals_one_never_killed(shards, tmp_path, monkeypatch):
    """With the discriminator, which joins in after half of the steps."""

    def config(name):
        more = ["images=16", "save_seconds=0.0", f"data.path={shards}", f"run={tmp_path / name}"]
        return composed("train", [*TINY, *JUDGE, *more])

    whole = fit.train(config("whole"))
    groups = state(whole)["optimizer_states"][0]["param_groups"]
    assert len(groups) == 2
    with monkeypatch.context() as patch:
        seen_by(patch, AutoencoderTraining, kill_at=3)
        with pytest.raises(Killed):
            fit.train(config("killed"))
    killed = fit.train(config("killed"))
    assert_equal(state(whole), state(killed))
    assert_equal(weights(whole), weights(killed))


def test_the_discriminator_learns_from_its_start_on():
    config = composed("train", [*TINY, *JUDGE, "data.path=none"])
    module = built(config.stage)
    fit.attach(config, module)
    for module.done, learns in ((0.49, False), (0.5, True)):
        module.zero_grad()
        module.loss({"image_16": pictures(2), "sample": [0, 1]}).backward()
        assert (module.terms["adversarial"] is not None) == learns
        # It has gradients in either case, as DDP expects.
        assert any(p.grad.any() for p in module.further.parameters()) == learns


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["size=18"], "size=18 is no multiple of autoencoder.factor=4"),
        (["autoencoder.factor=3"], "autoencoder.factor=3 is no multiple of 2"),
        (["alignment=repa", "+alignment.block=down.0"], "alignment"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, said, shards, tmp_path, capsys):
    asked = ["train", *TINY, *overrides, f"data.path={shards}", f"run={tmp_path / 'run'}"]
    assert cli.main(asked) == 2
    found = capsys.readouterr().err
    assert said in found
    assert found.count("\n") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_only_an_autoencoder_has_an_adversarial_loss():
    with pytest.raises(UserError, match="only stage=autoencoder"):
        Adversarial().attached(torch.nn.Identity())
