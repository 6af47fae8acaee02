"""What super-resolution undoes: blur, noise and BSR are the published ones, and move nothing."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

import cascade.conf
from cascade.config.compose import built, composed
from cascade.data import bsr
from cascade.data.bsr import BSR, Goal, area, filtered, gaussian_kernel, jpeg
from cascade.data.degradations import Blur, Corruption, blur, indexed_cosine
from cascade.data.transforms import Pictures, shrink
from cascade.diffusion.noise import alpha_sigma, cosine
from cascade.draws import Draws, generator
from cascade.errors import UserError

CONF = Path(next(iter(cascade.conf.__path__)))


def configured(choice, stage="sr1024"):
    return composed("train", ["data.path=none", f"stage={stage}", f"corruption={choice}"])


@pytest.fixture(scope="module", params=["bsr_light", "bsr"])
def chain(request):
    """Both published parameter sets, as configured."""
    return built(configured(request.param).data.pictures.degrade)


def picture(h, w, seed=0):
    x = np.random.default_rng(seed).standard_normal((3, h, w))
    x = ndimage.gaussian_filter(x, (0, 1.5, 1.5))
    return torch.from_numpy((x / np.abs(x).max()).astype(np.float32))


def centroid(x):
    """(y, x) of the middle of the mass, as shares of the sides."""
    mass = x.double().sum(0)
    places = [(torch.arange(n) + 0.5) / n for n in mass.shape]
    return [((mass.sum(1 - axis) * places[axis]).sum() / mass.sum()).item() for axis in (0, 1)]


# Blur


def test_each_sample_has_its_own_blur():
    x, sigma = torch.randn(3, 2, 7, 9, dtype=torch.float64), torch.tensor([0.4, 0.6, 1.5])
    blurred = blur(x, sigma, 5)
    for row, own, s in zip(x, blurred, sigma.tolist()):
        offset = np.arange(5) - 2
        taps = np.exp(-(offset**2) / (2 * s**2))
        kernel = np.outer(taps, taps) / taps.sum() ** 2
        expected = [ndimage.correlate(c, kernel, mode="mirror") for c in row.numpy()]
        torch.testing.assert_close(own, torch.tensor(np.array(expected)), atol=1e-7, rtol=0)


def test_the_blur_of_unclip_is_the_published_kernel(vectors):
    x = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    x[..., 2, 2] = 1
    blurred = Blur()(x, torch.zeros(1, dtype=torch.float64))[0, 0, 1:-1, 1:-1]
    expected = torch.tensor(vectors["blur"]["gauss_2d_k3_s0.6"], dtype=torch.float64)
    torch.testing.assert_close(blurred, expected, atol=1e-10, rtol=0)


def test_half_of_the_samples_are_blurred_by_a_sigma_of_the_range():
    x = torch.zeros(1000, 1, 5, 5, dtype=torch.float64)
    x[..., 2, 2] = 1
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    blurred = Blur(least=0.4, most=0.6, share=0.5)(x, u)
    assert torch.equal(blurred[500:], x[500:])
    ratio = blurred[:500, 0, 2, 1] / blurred[:500, 0, 2, 2]  # exp(-1 / (2 sigma^2))
    sigma = (-1 / (2 * ratio.log())).sqrt()
    expected = 0.4 + 0.2 * 2 * u[:500]
    torch.testing.assert_close(sigma, expected, atol=1e-10, rtol=0)


# Noise


def corrupted(vectors, schedule, level):
    """The z of the vectors, corrupted with their noise."""
    block = vectors["conditioning_augmentation"]
    z, n = (torch.tensor(block[k], dtype=torch.float64)[None, None] for k in ("z", "noise"))
    corrupt = Corruption(low=2, most=1.0, level=level, schedule=schedule)
    return corrupt({"image_2": z}, lambda shape: n, training=False)["image_2"][0, 0]


@pytest.mark.parametrize("level", [0.0, 0.1, 0.2, 0.3, 0.5, 1.0])
def test_noise_is_the_published_one(vectors, level):
    block = vectors["conditioning_augmentation"][f"aug_{level}"]
    schedules = {
        "continuous_cos(pi*level/2)": partial(cosine, s=0.0),
        "cosine_T1000_q_sample(IF)": indexed_cosine,
    }
    for name, schedule in schedules.items():
        if name in block:
            expected = torch.tensor(block[name], dtype=torch.float64)
            ours = corrupted(vectors, schedule, level)
            torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)


def test_every_index_of_deepfloyd_is_met_and_the_last_is_999(vectors):
    level = torch.arange(1000) / 1000
    logsnr = indexed_cosine(level)
    exact = indexed_cosine((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    torch.testing.assert_close(logsnr, exact.float())
    assert len(exact.unique()) == 1000
    assert indexed_cosine(torch.tensor(1.0)) == logsnr[-1]
    expected = dict(zip(vectors["schedules"]["index"], vectors["schedules"]["cosine"]["alpha_bar"]))
    for index in (0, 499, 999):
        assert (alpha_sigma(exact[index])[0] ** 2).item() == pytest.approx(
            expected[index], rel=1e-10
        )


def test_the_default_draws_as_the_trained_demo_did():
    x, numbers = picture(8, 12)[None].repeat(5, 1, 1, 1), torch.arange(5)
    noise = Draws(0, "c", numbers)
    level = 0.5 * torch.special.ndtr(noise((5, 2)))[:, 0]
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(10 - 10 * level))
    expected = alpha * x + sigma * noise(tuple(x.shape))
    out = Corruption(low=8)({"image_8": x}, Draws(0, "c", numbers), training=True)
    assert torch.equal(out["image_8"], expected)
    assert torch.equal(out["image_8_level"], 10 * level)


def test_levels_fill_their_range_in_training_and_are_chosen_in_sampling():
    batch = {"image_2": torch.zeros(400, 3, 2, 2)}
    corrupt = Corruption(low=2, most=1.0, schedule=partial(cosine, s=0.0))
    noise = Draws(0, "c", range(400))
    levels = corrupt(batch, noise, training=True)["image_2_level"].sort().values
    torch.testing.assert_close(levels, torch.linspace(0, 10, 400), atol=0.7, rtol=0)
    for level in (0.0, 0.3, 1.0):
        out = replace(corrupt, level=level)(batch, Draws(0, "c", range(400)), training=False)
        assert out["image_2"].std().item() == pytest.approx(math.sin(math.pi / 2 * level), abs=0.03)


def test_levels_that_training_never_met_are_refused():
    with pytest.raises(UserError, match=r"level=0.6 .* 0 to 0.5"):
        replace(Corruption(low=16), level=0.6)
    with pytest.raises(UserError, match=r"level=0.1 .* 0 to 0$"):
        replace(Corruption(low=16, schedule=None), level=0.1)


# BSR: its parts


def test_the_elliptic_kernel_is_the_published_one(vectors):
    expected = vectors["blur"]["bsr_anisotropic_k5_theta_pi/6_l1_4_l2_1"]["kernel"]
    kernel = gaussian_kernel(5, 4.0, 1.0, math.pi / 6)
    np.testing.assert_allclose(kernel, np.array(expected), atol=1e-10, rtol=0)


def test_a_kernel_of_no_width_changes_nothing():
    x = picture(20, 30)
    kernel = gaussian_kernel(9, 1e-30, 1e-30, 1.0)
    torch.testing.assert_close(filtered(x, kernel), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("h", "w"), [(64, 64), (37, 22), (5, 9), (1, 3)])
def test_filtering_mirrors_the_borders(h, w):
    x = picture(h, w).double()
    kernel = np.random.default_rng(1).random((25, 25))
    expected = [ndimage.correlate(c, kernel, mode="mirror") for c in x.numpy()]
    torch.testing.assert_close(filtered(x, kernel), torch.tensor(np.array(expected)))


@pytest.mark.parametrize(("h", "w"), [(4, 9), (10, 20), (7, 5)])
def test_area_is_the_mean_over_each_new_pixel(h, w):
    x = picture(8, 10)[None].double()
    finer = x.repeat_interleave(h, 2).repeat_interleave(w, 3)  # whole parts of old and new pixels
    expected = finer.unflatten(2, (h, 8)).mean(3).unflatten(3, (w, 10)).mean(4)
    torch.testing.assert_close(area(x, (h, w)), expected)


def test_jpeg_keeps_colours_and_loses_more_at_less_quality():
    x = torch.tensor([0.9, 0.5, 0.1])[:, None, None].expand(3, 24, 40)
    assert (jpeg(x, 90) - x).abs().max() < 0.02
    noisy = (picture(24, 40) + 1) / 2
    errors = [(jpeg(noisy, q) - noisy).square().mean() for q in (30, 60, 95)]
    assert errors[0] > errors[1] > errors[2]


def test_decimation_puts_the_new_pixel_amid_the_old_ones():
    ramp = torch.linspace(0, 1, 64).expand(3, 40, 64).contiguous()
    small = replace(BSR(), resized_share=0.0).shrink(ramp, Goal(4, (10, 16)), generator(0, "", 0))
    assert small.shape == (3, 10, 16)
    expected = (4 * torch.arange(16) + 1.5) / 63
    torch.testing.assert_close(small[0, 5, 4:-4], expected[4:-4], atol=2e-4, rtol=0)


# BSR: its draws


@pytest.mark.parametrize("factor", [2, 4])
def test_blurs_are_drawn_from_the_published_ranges(chain, factor, monkeypatch):
    drawn, kernel = [], bsr.gaussian_kernel

    def spy(size, l1, l2, theta=None):
        drawn.append((size, l1, l2, theta))
        return kernel(size, l1, l2, theta or 0.0)

    monkeypatch.setattr(bsr, "gaussian_kernel", spy)
    for n in range(600):
        chain.blur(torch.zeros(3, 4, 4), Goal(factor, (1, 1)), generator(0, "degradation", n))
    elliptic, round_ = ([d for d in drawn if (d[3] is None) == b] for b in (False, True))
    assert abs(len(elliptic) / 600 - 0.5) < 0.06
    light = chain == BSR()
    sizes = ({5, 7, 9, 11, 13, 15}, {5, 7}) if light else (set(range(7, 26, 2)),) * 2
    assert ({d[0] for d in elliptic}, {d[0] for d in round_}) == sizes
    # At factor 4: eigenvalues to 8 and 2, deviations to 2.8 and 0.7.
    eigenvalue, deviation = (
        (4 + factor, 2 + 0.2 * factor)
        if not light
        else (
            (4 + factor) / 4,
            (2 + 0.2 * factor) / 4,
        )
    )
    for axis in (1, 2):
        shares = np.array([d[axis] for d in elliptic]) / eigenvalue
        assert 0 < shares.min() < 0.05 < 0.95 < shares.max() <= 1
    shares = np.array([d[1] for d in round_]) ** 0.5 / deviation
    assert 0 < shares.min() < 0.05 < 0.95 < shares.max() <= 1
    angles = [d[3] for d in elliptic]
    assert 0 <= min(angles) < 0.1 < math.pi - 0.1 < max(angles) < math.pi


def test_noise_is_drawn_from_the_published_levels(chain):
    grey, coloured, correlated = [], [], []
    for n in range(500):
        noise = chain.add_noise(
            torch.full((3, 48, 48), 0.5), Goal(4, (12, 12)), generator(0, "", n)
        )
        levels = 255 * (noise - 0.5).flatten(1)
        correlation = np.corrcoef(levels)[~np.eye(3, dtype=bool)]
        if correlation.min() > 0.9999:
            grey.append(levels.std().item())
        else:
            (coloured if np.abs(correlation).max() < 0.1 else correlated).append(levels.std(1))
    least, most = (1, 2) if chain == BSR() else (2, 25)
    assert abs(len(grey) / 500 - 0.4) < 0.06
    assert abs(len(coloured) / 500 - 0.4) < 0.06
    assert len(correlated) > 50
    for stds in (grey, [s.mean().item() for s in coloured]):
        assert {round(s) for s in stds} >= set(range(least, most + 1))
        assert 0.95 * least < min(stds) <= max(stds) < 1.05 * most
    assert all(s.max() < 1.1 * most for s in correlated)
    assert np.mean([s.mean() for s in correlated]) > 0.5 * most  # not of a level drawn


def test_resizing_and_jpeg_are_drawn_from_the_published_ranges(chain, monkeypatch):
    qualities, halvings = [], []
    monkeypatch.setattr(bsr, "jpeg", lambda x, q: (qualities.append(q), x)[1])
    halved = bsr.halved
    monkeypatch.setattr(bsr, "halved", lambda x, rng: (halvings.append(1), halved(x, rng))[1])
    for n in range(500):
        chain(torch.zeros(3, 8, 8), generator(0, "degradation", n))
    light = chain == BSR()
    assert set(qualities) == set(range(80 if light else 30, 96))
    assert abs(len(qualities) / 500 - 1.9) < 0.04
    assert abs(len(halvings) / 500 - 0.25) < 0.05

    black, goal = torch.zeros(3, 200, 160), Goal(4, (50, 40))
    shrunk = [chain.shrink(black, goal, generator(0, "", n)).shape[1] for n in range(250)]
    assert min(shrunk) in (25, 26)  # an eighth at the least
    assert 160 < max(shrunk) <= 200
    assert abs(np.mean(np.array(shrunk) == 50) - (0.2 if light else 0.25)) < 0.08


def test_every_order_of_the_steps_occurs_and_the_second_resizing_is_the_later(chain):
    orders = set()
    for n in range(4000):
        names = [step.__name__ for step in chain.steps(generator(0, "degradation", n))]
        assert names.index("shrink") < names.index("finish")
        orders.add(tuple(names))
    steps = 4 + chain.blurs
    assert len(orders) == math.factorial(steps) // 2 // math.factorial(chain.blurs)


# BSR: the whole


@pytest.mark.parametrize(("h", "w"), [(64, 64), (40, 72), (70, 45)])
def test_the_result_is_a_quarter_of_the_size_in_range(chain, h, w):
    x = picture(h, w)
    for n in range(25):
        y = chain(x, generator(0, "degradation", n))
        assert y.shape == (3, h // 4, w // 4)
        assert -1 <= y.min() <= y.max() <= 1
        whole = x[:, : h - h % 4, : w - w % 4]  # each side loses its own rest
        assert torch.equal(y, chain(whole, generator(0, "degradation", n)))


def test_the_result_resembles_the_picture(chain):
    """A smooth grey one: JPEG halves the resolution of colours."""
    x = ndimage.gaussian_filter(picture(128, 96).numpy()[:1], (0, 12, 12))
    x = torch.from_numpy(x / np.abs(x).max()).expand(3, 128, 96)
    small = area(x[None], (32, 24))[0]
    errors = [
        (chain(x, generator(0, "degradation", n)) - small).square().mean().sqrt() for n in range(30)
    ]
    assert np.mean(errors) < (0.02 if chain == BSR() else 0.12)


def test_a_plain_picture_stays_plain(chain):
    silent = replace(chain, noise_levels=(0, 0), qualities=(100, 100))
    colour = torch.tensor([0.8, -0.2, 0.1])[:, None, None].expand(3, 60, 44)
    for n in range(40):
        y = silent(colour, generator(0, "degradation", n))
        assert (y - colour[:, :1, :1]).abs().max() < 0.02


def test_a_centred_dot_stays_centred(chain):
    """Under kernels of drawn even sizes too: half a pixel would be 1/128 of the side."""
    silent = replace(chain, noise_levels=(0, 0), qualities=(100, 100))
    for size in (5, 6, 13, 14):
        only = replace(silent, elliptic_sizes=(size,), round_sizes=(size,))
        dot = torch.zeros(3, 33, 33)
        dot[:, 16, 16] = 1
        for n in range(10):
            y = only.blur(dot, Goal(4, (8, 8)), generator(0, "degradation", n))
            assert centroid(y) == pytest.approx([0.5, 0.5], abs=1e-4)
    y, x = np.mgrid[:64, :64] - 31.5
    blob = torch.from_numpy(np.exp(-(y**2 + x**2) / 80)).float().expand(3, 64, 64)
    for n in range(40):
        small = silent(2 * blob - 1, generator(0, "degradation", n))
        assert centroid(small + 1) == pytest.approx([0.5, 0.5], abs=2e-3)


# BSR: in the data


def test_the_degraded_picture_is_a_function_of_the_sample_number():
    decoded = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    plain = Pictures((16, 64), crop=32)
    degraded = replace(plain, degrade=BSR())
    views = {}
    for order in (range(6), reversed(range(6))):
        for n in order:
            view = degraded.views(decoded, generator(0, "crop", n))
            assert view["image_16"].shape == (3, 8, 8)
            assert torch.equal(view["image_16"], views.setdefault(n, view)["image_16"])
            same_crop = plain.views(decoded, generator(0, "crop", n))
            assert torch.equal(view["image_64"], same_crop["image_64"])
    assert len({view["image_16"].numpy().tobytes() for view in views.values()}) == 6


def test_other_sizes_are_shrunk_as_before():
    decoded = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    view = Pictures((16, 32, 64), degrade=BSR()).views(decoded, generator(0, "crop", 0))
    assert torch.equal(view["image_32"], shrink(view["image_64"], 32))
    assert not torch.equal(view["image_16"], shrink(view["image_64"], 16))


def test_sizes_without_a_quarter_are_refused():
    with pytest.raises(UserError, match="4 times smaller"):
        Pictures((32, 64), degrade=BSR())


# The choices


@pytest.mark.parametrize("stage", ["sr256", "sr1024"])
@pytest.mark.parametrize("choice", [p.stem for p in (CONF / "corruption").glob("*.yaml")])
def test_every_choice_makes_training_data(stage, choice):
    config = configured(choice, stage)
    corrupt, pictures = built(config.stage.corruption), built(config.data.pictures)
    assert (corrupt.low, pictures.crop) == (config.low, config.crop)
    assert (pictures.degrade is not None) == choice.startswith("bsr")
    x = torch.rand(4, 3, 16, 16)
    batch = {f"image_{config.low}": x}
    seen, kept = (corrupt(batch, Draws(0, "c", range(4)), training) for training in (True, False))
    assert torch.equal(seen[f"image_{config.low}"], x) == choice.startswith(("bsr", "clean"))
    noisy = choice in ("noise", "imagen", "deepfloyd")
    assert (seen[f"image_{config.low}_level"] > 0).all() == noisy
    assert kept[f"image_{config.low}_level"].tolist() == [0] * 4
    difference = (kept[f"image_{config.low}"] - x).abs().max()
    assert difference < 0.05 if noisy else difference == 0


def test_noise_is_the_choice_unless_another_is_named():
    config = composed("train", ["data.path=none", "stage=sr256"])
    assert config.stage.corruption == configured("noise", "sr256").stage.corruption
    assert built(config.stage.corruption) == Corruption(low=64)
