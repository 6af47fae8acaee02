"""Drops, nulls and the joining of parts."""

import pytest
import torch

from cascade.conditioning import Cond, Conditioner, LowRes, Sequence, Vector
from cascade.draws import Draws
from cascade.nets.sketch import Sketch


def batch(n=512):
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.randint(1, 8, (n, 1), generator=g)
    return {
        "sample": torch.arange(n),
        "clip_image": torch.nn.functional.normalize(torch.randn(n, 8, generator=g), dim=1),
        "clip_text": torch.nn.functional.normalize(torch.randn(n, 8, generator=g), dim=1),
        "text": torch.randn(n, 7, 6, generator=g),
        "text_mask": mask,
        "image_4": torch.randn(n, 3, 4, 4, generator=g),
        "image_4_level": torch.rand(n, generator=g),
    }


@pytest.fixture
def conditioner():
    torch.manual_seed(0)
    embedders = {
        "clip": Vector("clip_image", 8, dim=16, width=12, tokens=4),
        "clip_text": Vector("clip_text", 8, width=12, tokens=1),
        "caption": Sequence(6, 12, dim=16),
        "low": LowRes(4, 16, 16),
    }
    return Conditioner(embedders, {"caption": 0.5, "clip_image": 0.1})


def dropped(conditioner, data, noise):
    """Which samples' CLIP tokens, CLIP text token and caption tokens are those of the null."""
    cond, null = conditioner(data, noise), conditioner.null(data)
    same = (cond.tokens == null.tokens).all(2)
    return same[:, :4].all(1), same[:, 4], (cond.mask == null.mask)[:, 5:].all(1) & same[:, 5]


def test_drop_rates_are_independent_and_joint_within_a_source(conditioner):
    data = batch(4000)
    clip, clip_text, text = dropped(conditioner, data, Draws(0, "drop", data["sample"]))
    assert torch.equal(clip_text, text)  # both stem from the caption: they fall together
    assert abs(clip.float().mean() - 0.1) < 0.02
    assert abs(text.float().mean() - 0.5) < 0.03
    assert abs((clip & text).float().mean() - 0.05) < 0.015


def test_drops_depend_on_the_sample_number_alone(conditioner):
    data = batch(64)
    whole = dropped(conditioner, data, Draws(3, "drop", data["sample"]))
    rows = torch.tensor([5, 60, 17])
    part = {k: v[rows] for k, v in data.items()}
    for a, b in zip(whole, dropped(conditioner, part, Draws(3, "drop", part["sample"]))):
        assert torch.equal(a[rows], b)


def test_null_keeps_the_picture_and_forgets_the_rest(conditioner):
    one, two = batch(4), batch(4)
    two["text"] = two["text"] + 1
    two["clip_image"] = two["clip_image"].roll(1, 0)
    a, b = conditioner.null(one), conditioner.null(two)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.vector, b.vector)
    two["image_4"] = two["image_4"] + 1
    assert not torch.equal(a.image, conditioner.null(two).image)


def test_without_drops_one_source_everywhere(conditioner):
    data = batch(8)
    cond, null = conditioner(data, without=["caption"]), conditioner.null(data)
    assert torch.equal(cond.tokens[:, 4:], null.tokens[:, 4:])
    assert not torch.equal(cond.tokens[:, :4], null.tokens[:, :4])


def test_a_sketch_is_one_more_picture_that_falls_with_the_tokens(conditioner):
    conditioner.sketch = Sketch(width=12, size=16, patch=2, head_channels=4)
    for p in conditioner.sketch.parameters():
        torch.nn.init.normal_(p, std=0.2)
    data = batch(2)
    cond, null = conditioner(data), conditioner.null(data)
    assert cond.image.shape == (2, 6, 16, 16)
    assert torch.equal(cond.image[:, :3], conditioner.sketch(cond.tokens, cond.mask))
    assert torch.equal(cond.image[:, 3:], null.image[:, 3:])
    assert (cond.sketch[0] - cond.sketch[1]).abs().max() > 1e-3
    assert torch.equal(null.sketch[0], null.sketch[1])


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_every_parameter_gets_a_gradient_whatever_is_dropped(conditioner, drop):
    conditioner.drop = {"caption": drop, "clip_image": drop}
    data = batch(4)
    cond = conditioner(data, Draws(0, "drop", data["sample"]))
    (cond.tokens.sum() + cond.vector.square().sum()).backward()
    assert all(p.grad is not None for p in conditioner.parameters())


def test_a_drop_of_what_is_not_read_is_refused():
    with pytest.raises(ValueError, match="clip_image"):
        Conditioner({"caption": Sequence(6, 12)}, {"clip_image": 0.1})


def test_cat_joins_along_the_batch(conditioner):
    data = batch(3)
    a, b = conditioner(data), conditioner.null(data)
    both = a.cat(b)
    for name in ("vector", "tokens", "mask", "image"):
        assert torch.equal(getattr(both, name)[3:], getattr(b, name))
    assert Cond().cat(Cond()) == Cond()


def test_the_batch_is_not_changed_in_place(conditioner):
    """DALLE2-pytorch scaled the caller's embedding in place, so a batch could be used once."""
    data = batch(4)
    before = {k: v.clone() for k, v in data.items()}
    conditioner(data, Draws(0, "drop", data["sample"]))
    assert all(torch.equal(before[k], v) for k, v in data.items())
