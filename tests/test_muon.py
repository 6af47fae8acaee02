"""Muon, against its definition by singular values, and AdamW."""

import pytest
import torch

from cascade.training.muon import Muon, orthogonal

F64 = torch.float64


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 12), (2, 4, 30), (2, 30, 4)])
def test_singular_values_move_to_about_one_and_their_vectors_stay(shape):
    matrices = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert (s[:, 0] / s[:, -1]).max() < 300
    inner = u.mT @ orthogonal(matrices) @ vh.mT
    diagonal = inner.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inner, torch.diag_embed(diagonal), atol=1e-12, rtol=0)
    assert diagonal.min() > 0.3
    assert diagonal.max() < 1.3


def test_vectors_and_tables_take_adamws_step_and_matrices_another():
    def weights():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(*shape)) for shape in ((6,), (640, 8), (6, 4, 3, 3))]

    ours, theirs = weights(), weights()
    one = Muon(ours, lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for k in range(3):
        before = ours[2].detach().clone()
        for some, optimizer in ((ours, one), (theirs, other)):
            torch.manual_seed(k)
            for p in some:
                p.grad = torch.randn_like(p)
            optimizer.step()
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    change = (ours[2] - before * (1 - 0.01 * 0.1)).flatten(1)
    s = torch.linalg.svdvals(change / (0.01 * 0.2 * 36**0.5))
    assert s.min() > 0.5
    assert s.max() < 1.3
    assert all(p.grad is not None for p in ours)


def test_its_state_can_be_saved_and_loaded():
    def steps(optimizer, weight, numbers):
        for k in numbers:
            weight.grad = torch.full_like(weight, float(k)).triu()
            optimizer.step()

    whole, half = (torch.nn.Parameter(torch.eye(4)) for _ in range(2))
    steps(Muon([whole], lr=0.1), whole, range(4))
    first = Muon([half], lr=0.1)
    steps(first, half, range(2))
    then = Muon([half], lr=0.1)
    then.load_state_dict(first.state_dict())
    steps(then, half, range(2, 4))
    assert torch.equal(whole, half)


def test_matrices_step_as_by_torchs_own_muon():
    """Which computes in bfloat16, and takes matrices alone."""
    start = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    given = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}
    one = Muon([ours], **given)
    other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **given)
    for k in range(4):
        for p in (ours, theirs):
            p.grad = torch.randn(24, 10, generator=torch.Generator().manual_seed(10 + k))
        before = ours.detach().clone(), theirs.detach().clone()
        one.step()
        other.step()
        moved, expected = ours - before[0], theirs - before[1]
        assert (moved - expected).norm() < 0.02 * expected.norm()


def test_convolutions_can_be_left_to_adamw():
    start = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    parameters = [torch.nn.Parameter(start.clone()) for _ in range(3)]
    left, adamw, reshaped = parameters
    optimizers = [
        Muon([left], lr=0.01, convolutions=False),
        torch.optim.AdamW([adamw], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0),
        Muon([reshaped], lr=0.01),
    ]
    for p, optimizer in zip(parameters, optimizers):
        p.grad = torch.ones_like(p).triu()
        optimizer.step()
    assert torch.equal(left, adamw)
    assert not torch.allclose(reshaped, adamw, atol=1e-3)
