"""The mathematics of edits, against reference values and on Gaussian data."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cascade.codecs import moments, principal
from cascade.conditioning import Cond
from cascade.diffusion.gaussian import Denoised
from cascade.diffusion.noise import alpha_sigma, cosine
from cascade.diffusion.solvers import ancestral, ddim, ddim_inversion
from cascade.diffusion.spacing import karras
from cascade.draws import Draws
from cascade.edit import slerp, text_difference
from cascade.edit.canvas import Canvas
from cascade.edit.embeddings import along
from cascade.edit.inversion import levels
from cascade.edit.known import from_picture, renoised, repaint
from cascade.edit.windows import Windows, starts
from tests.exact import VECTORS, f64


def close(actual, expected):
    torch.testing.assert_close(actual, f64(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_slerp(share):
    expected = VECTORS["slerp"]
    out = slerp(f64([expected["a"]]), f64([expected["b"]]), share)
    close(out[0], expected[f"theta_{share}"])
    close(out.norm(), 1.0)


def test_slerp_of_noise_mixes_the_rows_themselves():
    """The angle is one for each sample, over all its dimensions."""
    expected = VECTORS["slerp"]["unnormalised"]
    p, q = f64(expected["p"]).view(1, 3, 1, 1), f64(expected["q"]).view(1, 3, 1, 1)
    both = slerp(torch.cat([p, q]), torch.cat([q, q]), 0.3)
    close(both[0].flatten(), expected["theta_0.3"])
    close(both[1], q[0].tolist())


def test_slerp_has_constant_speed():
    a, b = (F.normalize(torch.randn(3, 16).double(), dim=1) for _ in range(2))
    points = [slerp(a, b, i / 8) for i in range(9)]
    angles = [(p * q).sum(1).arccos() for p, q in pairwise(points)]
    for angle in angles:
        close(angle, ((a * b).sum(1).arccos() / 8).tolist())


@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_slerp_is_straight_where_there_is_no_one_circle(factor):
    a = f64([[0.6, 0.8]])
    close(slerp(a, factor * a, 0.25), (0.75 * a + 0.25 * factor * a).tolist())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.375, 0.5])
def test_text_difference(share):
    expected = VECTORS["text_diff"]
    image, text, before = (f64([expected[key]]) for key in ("z_i", "z_t", "z_t0"))
    close(text_difference(image, text, before, share)[0], expected[f"theta_{share}"])
    close(text_difference(image, text, before, 1.0)[0], expected["z_d"])
    raw = text_difference(9 * image, 5 * text, 5 * before, share)
    torch.testing.assert_close(raw, 9 * text_difference(image, text, before, share))


def test_along_all_axes_changes_nothing_and_along_none_gives_the_mean():
    z = F.normalize(torch.randn(50, 8, dtype=torch.float64), dim=1)
    mean, covariance = moments(iter(z.split(7)))
    close(covariance, z.T.cov(correction=0).tolist())
    _, axes = principal(covariance)
    close(along(z, mean, axes), z.tolist())
    close(along(z, mean, axes[:0]), F.normalize(mean, dim=0).expand(50, 8).tolist())
    centred = z - z.mean(0)
    rows, singular, columns = torch.linalg.svd(centred, full_matrices=False)
    best = z.mean(0) + rows[:, :3] * singular[:3] @ columns[:3]  # Eckart and Young
    close(along(z, mean, axes[:3]), F.normalize(best, dim=1).tolist())


# Gaussian data, whose denoiser and conditional distributions are known.

MEAN = f64([0.3, -0.2, 0.1])
COV = f64([[0.40, 0.20, -0.10], [0.20, 0.30, 0.08], [-0.10, 0.08, 0.25]])


def gaussian(x, logsnr):
    alpha, sigma = alpha_sigma(logsnr)
    gain = alpha * COV @ torch.linalg.inv(alpha**2 * COV + sigma**2 * torch.eye(3).double())
    var = (COV - alpha * gain @ COV).diagonal()
    return Denoised(MEAN + (x - alpha * MEAN) @ gain.T, var)


def inversion_error(steps, refine):
    x0 = f64([[0.9, 0.1, -0.5], [-0.4, 0.6, 0.2]])
    x_T = ddim_inversion(gaussian, x0, levels(steps), refine)
    return (ddim(gaussian, x_T, levels(steps)) - x0).abs().max().item()


def test_inversion_is_exact_once_its_iterations_converge():
    """Without them it is exact to first order; x_T is then data of the noisiest level."""
    assert inversion_error(50, refine=30) < 1e-10
    errors = [inversion_error(n, refine=0) for n in (50, 100, 200)]
    assert errors[-1] > 1e-5
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([1, 1], abs=0.1)
    x_T = ddim_inversion(gaussian, MEAN[None], levels(50), 9)
    assert x_T.abs().max() < 0.1  # the mean of data leads to the mean of noise


def test_inversion_asks_at_the_level_where_the_sample_is():
    def at(asked):
        def denoise(x, logsnr):
            asked.append(round(logsnr.item(), 9))
            return Denoised(0 * x)

        return denoise

    logsnrs, asked = f64([-2.0, 0.0, 3.0]), []
    ddim_inversion(at(asked), torch.ones(1, 1).double(), logsnrs)
    assert asked == [3.0, 0.0]
    asked.clear()
    ddim_inversion(at(asked), torch.ones(1, 1).double(), logsnrs, refine=1)
    assert asked == [3.0, 0.0, 0.0, -2.0]


UNKNOWN = torch.tensor([False, False, True])
KNOWN = f64([0.9, -0.6])


def conditional():
    """Mean and variance of the last number, given the first two."""
    gain = torch.linalg.solve(COV[:2, :2], COV[:2, 2])
    return MEAN[2] + gain @ (KNOWN - MEAN[:2]), COV[2, 2] - gain @ COV[:2, 2]


def repainted(jumps, noise, n=1, steps=30):
    x0 = torch.cat([KNOWN, f64([float("nan")])]).expand(n, 3)  # the unknown part has no effect
    logsnrs = karras(cosine, steps, sigma_min=0.02)
    solve = repaint(ancestral, x0, UNKNOWN, jumps)
    x = solve(gaussian, noise((n, 3)).double(), logsnrs, noise)
    assert torch.equal(x[:, :2], x0[:, :2])
    return x[:, 2]


def test_repainting_gives_the_exact_conditional_distribution():
    """Its mean as jumps increase, by 1 / jumps (without noise the mean is what is left)."""
    mean, variance = conditional()
    assert abs(mean - MEAN[2]) > 0.5  # what is known matters
    errors = [abs(repainted(j, torch.zeros).item() - mean).item() for j in (1, 10, 20, 40)]
    assert errors[0] > 0.1
    assert errors[2] / errors[3] == pytest.approx(2, abs=0.3)
    assert errors[3] < 0.05
    g = torch.Generator().manual_seed(0)
    drawn = repainted(20, lambda shape: torch.randn(shape, generator=g).double(), n=4000)
    assert drawn.mean().item() == pytest.approx(mean.item(), abs=0.1)
    assert drawn.var().item() == pytest.approx(variance.item(), rel=0.1)


def test_repainting_all_is_sampling_and_nothing_returns_the_picture():
    draws = Draws(0, "x", range(4))
    logsnrs, x = karras(cosine, 5), torch.zeros(4, 3)
    everything = repaint(ddim, x, torch.ones(3, dtype=torch.bool))
    x_T = draws((4, 3))
    assert torch.equal(everything(gaussian32, x_T, logsnrs, draws), ddim(gaussian32, x_T, logsnrs))
    nothing = repaint(ddim, x + 0.25, torch.zeros(3, dtype=torch.bool), jumps=3)
    assert torch.equal(nothing(gaussian32, x_T, logsnrs, draws), x + 0.25)


def gaussian32(x, logsnr):
    return Denoised(gaussian(x.double(), logsnr).x0.float())


def test_renoised_is_the_forward_process():
    s, t = f64(1.0), f64(-2.0)
    ones = torch.ones(1, 1).double()
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(s), alpha_sigma(t)
    kept = renoised(ones, s, t, torch.zeros)
    close(kept * alpha_s, (alpha_t * ones).tolist())
    added = renoised(0 * ones, s, t, torch.ones)
    close((kept * sigma_s) ** 2 + added**2, (sigma_t**2 * ones).tolist())
    close(renoised(ones, f64(math.inf), t, torch.zeros), (alpha_t * ones).tolist())


def test_a_picture_is_noised_to_the_level_and_no_further():
    asked = []

    def inner(denoise, x, logsnrs, noise):
        asked.append((x, logsnrs))
        return x

    logsnrs, level = f64([-10.0, -3.0, 0.0, 4.0, math.inf]), f64(-1.0)
    x0, eps = f64([[0.5]]), f64([[2.0]])
    start = from_picture(inner, x0, level)
    start(gaussian, alpha_sigma(logsnrs[0])[1] * eps, logsnrs, torch.zeros)
    (x, left), (alpha, sigma) = asked[0], alpha_sigma(level)
    assert left.tolist() == [-1.0, 0.0, 4.0, math.inf]
    close(x, (alpha * x0 + sigma * eps).tolist())


# Windows


class Local(torch.nn.Module):
    """A network that sees one pixel at a time, of x and of the condition's picture."""

    divisor = 4

    def forward(self, x, logsnr, cond):
        assert x.shape[2:] == (16, 16)
        return torch.cat([x * x, cond.image + logsnr.view(-1, 1, 1, 1)], 1)


@pytest.mark.parametrize("sides", [(16, 16), (16, 40), (52, 16), (28, 36)])
def test_windows_of_a_local_network_are_the_network_on_the_whole(sides):
    x, image = torch.randn(2, 3, *sides).double(), torch.randn(2, 3, *sides).double()
    logsnr = f64([0.5, 0.5])
    out = Windows(Local(), 16)(x, logsnr, Cond(image=image))
    close(out, torch.cat([x * x, image + 0.5], 1).tolist())
    for side in sides:
        first = starts(side, 16, 4)
        assert first[0] == 0
        assert first[-1] == side - 16
        assert all(0 < b - a <= 12 and a % 4 == 0 for a, b in pairwise(first))


# Between a user's picture and those of the stages


def scene(h=40, w=60):
    return np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)


@pytest.mark.parametrize("pad", [False, True])
def test_what_was_known_returns_bit_for_bit(pad):
    canvas = Canvas(scene(), np.zeros((40, 60), bool))
    canvas.unknown[5:12, 20:31] = True
    frame = canvas.square(pad)
    assert canvas.within(frame)
    out = canvas.pasted(torch.ones(3, 64, 64), frame)
    assert np.array_equal(out[~canvas.unknown], canvas.picture[~canvas.unknown])
    assert (out[canvas.unknown] == 255).all()


def test_what_is_painted_returns_to_its_place():
    canvas = Canvas(scene(64, 80), np.zeros((64, 80), bool))
    canvas.unknown[10:20, 30:50] = True
    frame = canvas.square()
    shown = torch.from_numpy(scene(64, 64)).permute(2, 0, 1) / 127.5 - 1
    out = canvas.pasted(shown, frame)
    assert np.array_equal(out[10:20, 30:50], scene(64, 64)[10:20, 22:42])


def test_nothing_of_what_is_hidden_is_seen():
    picture, unknown = scene(), np.zeros((40, 60), bool)
    unknown[8:17, 21:30] = True
    other = picture.copy()
    other[unknown] = 255 - other[unknown]
    views = [
        Canvas(p, unknown).views(Canvas(p, unknown).square(), {8: (8, 8), 16: (16, 16)})
        for p in (picture, other)
    ]
    for key, seen in views[0].items():
        assert torch.equal(seen, views[1][key])
    # What is hidden as a whole: rows 8 to 16 of 40 px hold rows 4 and 5 of 16 (7.5 to 15 px).
    hidden = views[0]["unknown/image_16"][0, 0]
    assert hidden.any(1).nonzero().flatten().tolist() == [4, 5]


def test_an_enlarged_canvas_is_known_in_its_middle():
    canvas = Canvas.known(scene(32, 32)).enlarged(left=0, right=48, top=0, bottom=0)
    assert canvas.picture.shape == (32, 80, 3)
    assert not canvas.unknown[:, :32].any()
    assert canvas.unknown[:, 32:].all()
    frame, sides = canvas.whole(16, 4)
    assert (frame, sides) == ((0, 0, 80, 32), (16, 40))
    assert canvas.whole(16, 16) == ((-8, 0, 96, 32), (16, 48))  # extended on both sides
    tall = Canvas.known(scene(90, 32))
    assert tall.whole(16, 2) == ((0, -1, 32, 92), (46, 16))
    views = canvas.views(*[canvas.whole(16, 16)[0]], {16: (16, 48)})
    assert (
        views["unknown/image_16"][0, 0].all(0).tolist() == [True] * 4 + [False] * 16 + [True] * 28
    )
