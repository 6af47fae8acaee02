"""SOAP, by a property that Adam lacks, and as part of a training."""

import io
import sys

import pytest
import torch

from cascade import cli
from cascade.data.scenes.generate import write_scenes
from cascade.errors import UserError
from cascade.runs.run import Run
from cascade.training.soap import soap
from tests.small import SR

F64 = torch.float64


def stepped(optimizer, weight, gradients):
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    return weight.detach()


def test_rotated_gradients_lead_to_rotated_weights():
    """Its steps do not depend on the axes in which a matrix is written; Adam's do."""
    random = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=random))[0] for _ in range(2))
    start, *gradients = torch.randn(7, 4, 4, dtype=F64, generator=random)

    def moved(make, turn):
        weight = torch.nn.Parameter(turn(start).clone())
        return stepped(make([weight]), weight, map(turn, gradients)) - turn(start)

    for make, alike in ((soap, True), (torch.optim.Adam, False)):
        plain, turned = (
            moved(lambda p, make=make: make(p, lr=0.1), turn)
            for turn in (lambda x: x, lambda x: u @ x @ v.T)
        )
        assert torch.allclose(turned, u @ plain @ v.T, atol=1e-6) == alike


def test_its_state_can_be_saved_and_loaded():
    random = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(9, 4, 3, 2, generator=random)
    whole, half = (torch.nn.Parameter(start.clone()) for _ in range(2))
    stepped(soap([whole], lr=0.1, every=2), whole, gradients)
    first = soap([half], lr=0.1, every=2)
    stepped(first, half, gradients[:5])
    torch.save(first.state_dict(), file := io.BytesIO())
    then = soap([half], lr=0.1, every=2)
    then.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(stepped(then, half, gradients[5:]), whole.detach())


@pytest.mark.slow
def test_a_training_goes_on_where_it_stopped(tmp_path):
    write_scenes(tmp_path / "shards", "plain", "train", 20, 32, seed=0, shard_size=10)
    given = [*SR, "optim=soap", "learning_rate=constant", f"data.path={tmp_path / 'shards'}"]
    assert cli.main(["train", *given, "images=80", f"run={tmp_path / 'whole'}"]) == 0
    for images in (48, 80):
        assert cli.main(["train", *given, f"images={images}", f"run={tmp_path / 'half'}"]) == 0
    one, other = (Run(tmp_path / name).load().state_dict() for name in ("whole", "half"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"cascade-diffusion\[soap\]"):
        soap([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
