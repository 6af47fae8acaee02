"""Great circles, against reference values."""

import pytest
import torch

from cascade.edit import slerp, text_difference
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
