"""Sharpness-aware minimisation: its step, its place in Lightning's loop, and on several ranks."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from cascade.config.compose import built, composed
from cascade.encoders.clip import Architecture, CLIPTraining
from cascade.encoders.contrastive import contrastive
from cascade.encoders.sam import SAM
from cascade.training.module import Training

VIT = Architecture(32, 8, 2, 32, text_width=32, text_layers=2, text_heads=2, length=16, patch=8)
LR, RHO = 0.1, 0.1


def test_on_a_quadratic_the_step_is_the_closed_form():
    """L = w'Aw / 2: the gradient at w + rho Aw / |Aw| is Aw + rho A Aw / |Aw|."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=g, dtype=torch.float64)
    a = a @ a.T
    start = torch.randn(5, generator=g, dtype=torch.float64)
    parts = [torch.nn.Parameter(start[:2].clone()), torch.nn.Parameter(start[2:].clone())]
    sam, optimizer = SAM(RHO), torch.optim.SGD(parts, LR)

    def loss():
        w = torch.cat(parts)
        return w @ a @ w / 2

    for _ in range(3):
        gradient = a @ start
        start = start - LR * (gradient + RHO * a @ gradient / gradient.norm())
        sam.climb(loss(), parts)
        optimizer.zero_grad()
        loss().backward()
        sam.descend()
        optimizer.step()
        torch.testing.assert_close(torch.cat(parts).detach(), start, atol=1e-12, rtol=0)


def test_the_weights_come_back_exactly_and_no_gradient_is_left():
    layer = torch.nn.Linear(7, 3)
    before = copy.deepcopy(layer.state_dict())
    sam = SAM(RHO)
    sam.climb(layer(torch.ones(2, 7)).square().mean(), layer.parameters())
    moved = torch.cat([(p - before[n]).flatten() for n, p in layer.named_parameters()])
    assert moved.norm().item() == pytest.approx(RHO, rel=1e-5)
    assert all(p.grad is None for p in layer.parameters())
    sam.descend()
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_autocast_does_not_go_on_with_the_old_weights():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)

    def loss():
        return layer(x).float().square().mean()

    with torch.autocast("cpu", torch.bfloat16):
        first = loss()
        SAM(1.0).climb(first, layer.parameters())
        second = loss()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss() == second > first * 1.5


def training(sam=True):
    torch.manual_seed(0)
    return CLIPTraining(VIT, partial(torch.optim.SGD, lr=LR), sam=SAM(RHO) if sam else None)


def some_batches(count, n=4):
    g = torch.Generator().manual_seed(1)
    pictures = torch.rand(count, n, 3, 32, 32, generator=g) * 2 - 1
    captions = [[f"caption number {n * b + i}" for i in range(n)] for b in range(count)]
    return [{"image_32": p, "caption": c} for p, c in zip(pictures, captions)]


def trained(module, batches, **choices):
    L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **choices,
    ).fit(Training(module), DataLoader(batches, batch_size=None))
    return module.state_dict()


def climbed(module, gradients):
    """A copy of a module, RHO further along its own gradient."""
    up, norm = copy.deepcopy(module), sum(g.square().sum() for g in gradients).sqrt()
    with torch.no_grad():
        for p, g in zip(up.parameters(), gradients):
            p += RHO * g / norm
    return up


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)


def assert_descended(state, start, found):
    """The weights are those of one step of SGD along the mean of several gradients."""
    for (name, w), *several in zip(start.named_parameters(), *found):
        expected = w - LR * torch.stack(several).mean(0)
        torch.testing.assert_close(state[name], expected.detach(), atol=2e-6, rtol=1e-4, msg=name)


def test_each_micro_batch_climbs_by_itself():
    """Two that are accumulated give the mean of two gradients, each at a place of its own."""
    batches, start, found = some_batches(2), training(), []
    for batch in batches:
        up = climbed(start, gradients(start.loss(batch), start))
        found.append(gradients(up.loss(batch), up))
    state = trained(training(), batches, devices=1, accumulate_grad_batches=2)
    assert_descended(state, start, found)
    plain = trained(training(sam=False), batches, devices=1, accumulate_grad_batches=2)
    name = "clip.text_projection"
    assert (plain[name] - state[name]).abs().max() > 1e-4  # or the test would prove nothing


def loss_of_all(modules, batches):
    """The sum of the losses of ranks that see one another's embeddings."""
    images, texts, _ = zip(*(m.embed(b) for m, b in zip(modules, batches)))
    total, captions = 0, torch.arange(8)
    for rank, module in enumerate(modules):
        own, scale = 4 * rank + torch.arange(4), module.clip.logit_scale.exp()
        by_image = contrastive(images[rank], torch.cat(texts), own, captions, scale)
        by_text = contrastive(texts[rank], torch.cat(images), own, captions, scale)
        total = total + (by_image + by_text).mean() / 2
    return total


def test_each_replica_climbs_by_its_own_gradient():
    """unCLIP, appendix C: perturbations are applied independently by the replicas."""
    batches, start = some_batches(2), training()
    ranks = [copy.deepcopy(start) for _ in batches]
    loss = loss_of_all(ranks, batches)
    ups = [climbed(rank, gradients(loss, rank)) for rank in ranks]
    loss = loss_of_all(ups, batches)
    found = [gradients(loss, up) for up in ups]
    state = trained(training(), batches, devices=2, strategy="ddp_fork")
    assert_descended(state, start, found)


def test_a_clip_trains_with_it_by_a_choice_of_optimizer():
    small = {"dim": 8, "length": 16, "text_width": 32, "text_layers": 2, "text_heads": 2}
    small |= {"vision_layers": 2, "vision_width": 32, "patch": 8}
    overrides = ["stage=clip", "optim=clip_sam", "data.path=none", "optim.lr=1e-3", "warmup=1"]
    config = composed("train", [*overrides, *(f"++clip.model.{k}={v}" for k, v in small.items())])
    assert config.stage.sam.rho == 0.1
    assert list(config.optim.betas) == [0.9, 0.98]
    config.stage.sam.rho = 0.01  # a network of two blocks learns nothing with that of forty
    torch.manual_seed(0)
    module, (batch,) = built(config.stage), some_batches(1, 8)
    (optimizer,), _ = module.configure_optimizers()
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        losses.append(module.training_step(batch, 0))
        losses[-1].backward()
        module.after_backward()
        optimizer.step()
    image, text, _ = module.embed(batch)
    assert (image @ text.T).argmax(1).tolist() == list(range(8))
    assert losses[-1] < 0.3 < 1.5 < losses[0]
