"""Which levels are visited, against the published lists of indices."""

import math
from functools import partial

import pytest
import torch

from cascade.config.compose import built, composed
from cascade.diffusion import spacing
from cascade.diffusion.noise import cosine, cosine_table, linear_table, lognormal
from cascade.diffusion.sampling import DiffusionSampler
from cascade.diffusion.solvers import ancestral
from cascade.errors import UserError
from tests.exact import VECTORS

RESPACING = VECTORS["respacing_T1000"]

# DeepFloyd IF's lists as released, from the noisiest on.
SMART27 = [999, 976, 952, 928, 905, 882, 858, 857, 810, 762, 715, 714, 572, 429, 428, 286, 285]
SMART27 += [238, 190, 143, 142, 118, 95, 71, 47, 24, 0]
SUPER27 = [999, 991, 982, 974, 966, 958, 950, 941, 933, 925, 916, 908, 900, 899, 874, 850, 825]
SUPER27 += [800, 799, 700, 600, 500, 400, 300, 200, 100, 0]
SUPER40 = [999, 992, 985, 978, 971, 964, 957, 949, 942, 935, 928, 921, 914, 907, 900, 899, 879]
SUPER40 += [859, 840, 820, 800, 799, 766, 733, 700, 699, 650, 600, 599, 500, 499, 400, 399, 300]
SUPER40 += [299, 200, 199, 100, 99, 0]


def indices(space, steps):
    """What is visited of 1000 steps, cleanest first; the levels lead down to clean."""
    logsnrs = space(lambda u: 1000 * u - 1, steps)
    assert len(logsnrs) == steps + 1
    assert logsnrs[-1] == math.inf
    return [round(index, 6) for index in logsnrs[:-1].flip(0).tolist()]


def named(name):
    if name.startswith("ddim"):
        return spacing.strided
    if name == "fast27":
        return spacing.fast27
    counts = [int(count) for count in name.split(",")]
    return partial(spacing.sections, counts=counts if len(counts) > 1 else None)


@pytest.mark.parametrize("name", RESPACING)
def test_published_lists(name):
    expected = RESPACING[name]
    visited = indices(named(name), expected["len"])
    assert visited[:5] == expected["first5"]
    assert visited[-5:] == expected["last5"]
    assert sum(visited) == expected["sum"]
    assert visited == expected.get("all", visited)


def deepfloyd(name):
    """A sampler of conf/sampler/, and the indices that it visits, cleanest first."""
    sampler = built(composed("sampler", [f"sampler=if_{name}"]).sampler)
    return indices(sampler.spacing, sampler.steps)


@pytest.mark.parametrize(
    ("name", "listed"), [("smart27", SMART27), ("super27", SUPER27), ("super40", SUPER40)]
)
def test_deepfloyds_lists(name, listed):
    assert deepfloyd(name) == listed[::-1]


@pytest.mark.parametrize(
    ("name", "steps", "total", "third"),  # sum of the released list, and its third noisiest index
    [
        ("smart50", 50, 24976, 977),
        ("smart100", 100, 70152, 992),
        ("smart185", 185, 130152, 995),
        ("super100", 100, 66750, 992),
    ],
)
def test_deepfloyds_long_lists(name, steps, total, third):
    visited = deepfloyd(name)
    assert len(visited) == steps
    assert sum(visited) == total
    assert [visited[0], visited[-3], visited[-1]] == [0, third, 999]
    assert sorted(set(visited)) == visited


def test_an_index_is_a_level_of_any_schedule():
    logsnrs = spacing.strided(linear_table, 27)
    torch.testing.assert_close(logsnrs[0], linear_table(torch.tensor(0.989).double()))
    logsnrs = spacing.sections(cosine, 4, table=8)
    u = torch.tensor([8, 6, 3, 1]).double() / 8  # 7 / 3 a step, rounded to 0, 2, 5, 7
    torch.testing.assert_close(logsnrs[:-1], cosine(u))


@pytest.mark.parametrize("schedule", [cosine, cosine_table, lognormal])
def test_even_goes_from_one_to_clean(schedule):
    logsnrs = spacing.even(schedule, 4)
    u = torch.tensor([1, 0.75, 0.5, 0.25]).double()
    torch.testing.assert_close(logsnrs[:-1], schedule(u), rtol=0, atol=0)
    assert logsnrs[-1] == math.inf


def test_karras_is_edms_whatever_the_schedule():
    sigma = (-spacing.karras(cosine, 8) / 2).exp()
    expected = torch.tensor(VECTORS["edm"]["karras_N8"], dtype=torch.float64)
    torch.testing.assert_close(sigma, expected, rtol=1e-10, atol=1e-10)
    sigma = (-spacing.karras(linear_table, 18) / 2).exp()
    expected = VECTORS["edm"]["karras_N18_first3_last3"]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(sigma[[0, 1, 2, -4, -3, -2]], expected, rtol=1e-10, atol=1e-10)
    assert sigma[-1] == 0


@pytest.mark.parametrize(
    ("space", "steps", "says"),
    [
        (spacing.fast27, 28, "steps=27"),
        (partial(spacing.sections, counts=[3, 2]), 6, "sections 3,2 have 5 steps: set steps=5"),
        (partial(spacing.sections, table=10), 11, "11 steps in a section of 10"),
        (partial(spacing.sections, counts=[0, 4]), 4, "0 steps in a section"),
        (spacing.strided, 400, "400 steps"),
    ],
)
def test_a_contradiction_is_refused_when_the_sampler_is_made(space, steps, says):
    with pytest.raises(UserError, match=says) as error:
        DiffusionSampler(steps=steps, solver=ancestral, spacing=space)
    assert "\n" not in str(error.value)
