"""The average against its closed form, and what may not happen while it is swapped in."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cascade.training.callbacks.ema import EMA


def step(ema, module, gradients=True):
    for p in module.parameters():
        p.grad = torch.ones_like(p) if gradients and p.requires_grad else None
    ema.on_before_optimizer_step(None, module, None)
    ema.on_train_batch_end(None, module, None, None, 0)


def after(decay, values):
    module = nn.Linear(1, 1, bias=False)
    module.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    nn.init.constant_(module.weight, values[0])
    ema = EMA(decay)
    ema.on_fit_start(SimpleNamespace(), module)
    for value in values[1:]:
        nn.init.constant_(module.weight, value)
        step(ema, module)
    return ema, module


def test_average_is_the_weighted_sum_with_warmed_up_decay():
    values = [1.0, -2.0, 4.0, 0.5, 3.0]
    ema, _ = after(0.3, values)
    expected = values[0]
    for t, value in enumerate(values[1:], start=1):
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
    assert list(ema.average) == ["weight"]  # trained parameters only
    assert ema.average["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_initial_weights_are_forgotten_early():
    """A constant 0.9999 would keep 92 % of them after 785 steps."""
    ema, _ = after(0.9999, [1.0] + [0.0] * 785)
    assert ema.average["weight"].item() < 1e-3


def test_half_precision_weights_are_averaged_in_float32():
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(module.weight, 1.0)
    ema = EMA(0.9999)
    ema.on_fit_start(SimpleNamespace(), module)
    ema.step = 10**6
    nn.init.constant_(module.weight, 1.0078125)
    for _ in range(2000):
        step(ema, module)
    expected = 1.0078125 - 0.0078125 * 0.9999**2000
    assert ema.average["weight"].item() == pytest.approx(expected, abs=1e-5)


def test_micro_batches_that_only_accumulate_do_not_count():
    ema, module = after(0.5, [0.0, 1.0])
    before = ema.average["weight"].clone()
    ema.on_train_batch_end(None, module, None, None, 0)
    assert torch.equal(before, ema.average["weight"])
    assert ema.step == 1


def test_steps_without_gradients_do_not_count():
    values = [1.0, -2.0, 4.0]
    ema, module = after(0.9, values[:2])
    nn.init.constant_(module.weight, 100.0)
    step(ema, module, gradients=False)
    nn.init.constant_(module.weight, values[2])
    step(ema, module)
    assert ema.step == 2
    assert torch.equal(ema.average["weight"], after(0.9, values)[0].average["weight"])


def test_applied_swaps_and_restores_even_after_an_error():
    ema, module = after(0.5, [0.0, 1.0])
    module.train()

    def fails_within():
        with ema.applied(module):
            assert module.weight.item() == ema.average["weight"].item() != 1.0
            assert not module.training
            with pytest.raises(RuntimeError, match="swapped"):
                ema.on_save_checkpoint(None, module, {})
            raise KeyError

    with pytest.raises(KeyError):
        fails_within()
    assert module.weight.item() == 1.0
    assert module.training
