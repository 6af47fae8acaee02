"""The loss and the denoiser, on Gaussian data whose best denoiser is known."""

import math

import pytest
import torch

from cascade.diffusion import noise as schedules
from cascade.diffusion import prediction
from cascade.diffusion.gaussian import Diffusion
from cascade.diffusion.noise import alpha_sigma
from cascade.diffusion.weighting import min_snr

PREDICTIONS = [prediction.eps, prediction.x0, prediction.v, prediction.flow]
SCHEDULES = [
    schedules.cosine,
    schedules.cosine_table,
    schedules.linear_table,
    schedules.cosine_logsnr,
    schedules.lognormal,
]
STD = 0.5  # of the data


def normal(seed: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator, dtype=dtype)


def as_net(predict, x0_hat):
    """The network that, under this prediction, says x0_hat(x_t, alpha, sigma)."""

    def net(x, logsnr, cond):
        logsnr = logsnr[:, None]
        c_in, c_skip, c_out = predict(logsnr)
        x_t = x / c_in
        return (x0_hat(x_t, *alpha_sigma(logsnr)) - c_skip * x_t) / c_out

    return net


def best(x_t, alpha, sigma):
    """E[x0 | x_t]."""
    return alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x_t


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("weight", [None, min_snr])
def test_exact_denoiser_reaches_the_analytic_floor(predict, weight):
    process = Diffusion(schedules.cosine, predict, weight)
    b, d = 400, 4000
    x0 = STD * normal(0)((b, d))
    loss = process.loss(as_net(predict, best), x0, None, normal(1))
    logsnr = schedules.cosine(torch.special.ndtr(normal(1)((b,))))
    alpha, sigma = alpha_sigma(logsnr)
    floor = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # var[x0 | x_t]
    floor = floor * (weight(logsnr) if weight else predict(logsnr).c_out ** -2)
    # Each is a mean of d squares: its relative error has standard deviation sqrt(2 / d) = 0.022.
    assert (loss / floor - 1).abs().max() < 6 * math.sqrt(2 / d)
    assert (loss / floor).mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / d / b))


def test_a_weighted_loss_is_the_same_under_every_prediction():
    x0 = normal(0)((64, 5))
    losses = [
        Diffusion(schedules.cosine, predict, min_snr).loss(
            as_net(predict, lambda x_t, alpha, sigma: 0.3 * x_t + sigma), x0, None, normal(1)
        )
        for predict in PREDICTIONS
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=1e-12)


def test_an_unweighted_loss_is_mse_on_the_papers_targets():
    x0, eps, zero = normal(0)((8, 3)), normal(1), lambda x, logsnr, cond: torch.zeros_like(x)
    logsnr = schedules.cosine(torch.special.ndtr(eps((8,))))[:, None]
    eps = eps((8, 3))
    alpha, sigma = alpha_sigma(logsnr)
    for predict, target in zip(PREDICTIONS, [eps, x0, alpha * eps - sigma * x0, eps - x0]):
        loss = Diffusion(schedules.cosine, predict).loss(zero, x0, None, normal(1))
        torch.testing.assert_close(loss, target.square().mean(1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("weight", [None, min_snr])
def test_loss_and_gradient_are_finite_at_both_ends(schedule, predict, weight):
    """In float32, from u = 6e-16 to 1 - 6e-16: what no draw in float32 goes beyond."""
    first = [torch.tensor([-8.0, -6, -4, 4, 6, 8])]
    draw = normal(0, torch.float32)

    def noise(shape):
        return first.pop() if first else draw(shape)

    factor = torch.ones((), requires_grad=True)
    x0 = normal(1, torch.float32)((6, 3, 4, 4))

    def net(x, logsnr, cond):
        assert logsnr.abs().max() <= 20
        return factor * x

    loss = Diffusion(schedule, predict, weight).loss(net, x0, None, noise)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert factor.grad.isfinite()


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("logsnr", [-19.0, -3.0, 0.0, 8.0])
def test_denoise_gives_what_the_network_means(predict, logsnr):
    logsnr = torch.tensor(logsnr, dtype=torch.float64)
    x_t = normal(0)((4, 3))
    x0_hat = Diffusion(prediction=predict).denoise(as_net(predict, best), x_t, logsnr, None).x0
    torch.testing.assert_close(x0_hat, best(x_t, *alpha_sigma(logsnr)), rtol=1e-9, atol=1e-9)


def test_the_network_is_told_one_clamped_level_for_each_sample():
    told = []

    def net(x, logsnr, cond):
        told.append((logsnr, cond))
        return torch.zeros_like(x)

    x_t = torch.randn(3, 2)
    for level in (-math.inf, math.inf):
        out = Diffusion().denoise(net, x_t, torch.tensor(level, dtype=torch.float64), "cond").x0
        torch.testing.assert_close(out, x_t if level > 0 else torch.zeros_like(x_t))
    assert [(list(logsnr), cond) for logsnr, cond in told] == [
        ([-20] * 3, "cond"),
        ([20] * 3, "cond"),
    ]
    assert told[0][0].dtype == torch.float32


def test_eps_prediction_is_refused_at_zero_snr():
    process = Diffusion(prediction=prediction.eps)
    with pytest.raises(ValueError, match="finite"):
        process.denoise(lambda x, *_: x, torch.randn(1, 2), torch.tensor(-math.inf), None)
