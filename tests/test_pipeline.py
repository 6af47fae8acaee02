"""The fold of a cascade, and the choice among several samples."""

from dataclasses import dataclass, field

import pytest
import torch

from cascade.codecs import Embedding, Pixels
from cascade.data.degradations import Corruption, blur
from cascade.diffusion.noise import alpha_sigma
from cascade.draws import Draws
from cascade.pipeline import BestOf, Cascade


@dataclass
class Writer:
    """Stands for a trained stage: writes what a function of the batch and purpose gives."""

    reads: frozenset
    writes: str
    value: object
    seen: list = field(default_factory=list)

    def encoded(self, batch):
        return batch

    def sample(self, batch, seed, purpose="", progress=None):
        self.seen.append(purpose)
        return self.value(batch, purpose)


def test_the_fold_writes_in_order_and_passes_over_what_is_given():
    a = Writer(frozenset({"caption"}), "clip_image", lambda b, _: torch.ones(2))
    b = Writer(frozenset({"clip_image"}), "image_4", lambda b, _: b["clip_image"] + 1)
    cascade = Cascade([a, b])
    batch = {"caption": ["x", "y"], "sample": torch.arange(2)}
    assert torch.equal(cascade(batch, 0)["image_4"], torch.full((2,), 2.0))
    given = cascade({**batch, "clip_image": torch.zeros(2)}, 0)
    assert torch.equal(given["image_4"], torch.ones(2))
    assert len(a.seen) == 1
    assert "image_4" not in batch
    with pytest.raises(KeyError, match="clip_image"):
        Cascade([b])(batch, 0)


def test_best_of_keeps_the_sample_nearest_to_the_text(vectors):
    """The published example: dot products 0.7 and 0.82 choose the second."""
    block = vectors["best_of_2"]
    candidates = torch.tensor(block["candidates"])
    stage = Writer(frozenset(), "clip_image", lambda b, k: candidates[int(k)][None])
    drawn = BestOf(stage, 2).sample({"clip_text": torch.tensor([block["z_t"]])}, 0)
    assert torch.equal(drawn[0], candidates[block["pick"]])
    assert stage.seen == ["0", "1"]  # independent draws


def test_embeddings_have_unit_variance_inside_and_unit_norm_outside():
    torch.manual_seed(0)
    z = torch.nn.functional.normalize(
        torch.randn(500, 6) * torch.tensor([1, 2, 3, 4, 5, 6.0]), dim=1
    )
    codec = Embedding(6)
    codec.fit([{"clip_image": z[:250]}, {"clip_image": z[250:]}])
    x0 = codec.encode({"clip_image": z})
    torch.testing.assert_close(x0.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(x0.std(0), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.decode(x0), z)
    assert {"mean", "std"} <= codec.state_dict().keys()


def test_pixels_follow_the_shape_of_the_small_picture():
    assert Pixels(64).shape({}) == (3, 64, 64)
    assert Pixels(64, low=16).shape({"image_16": torch.zeros(1, 3, 20, 16)}) == (3, 80, 64)


def test_blur_equals_the_published_taps(vectors):
    block = vectors["blur"]
    x = torch.tensor(block["image"], dtype=torch.float64)
    expected = torch.tensor(block["blurred_reflect_pad"], dtype=torch.float64)
    torch.testing.assert_close(blur(x[None, None], 0.6)[0, 0], expected, atol=1e-10, rtol=0)


def test_corruption_keeps_the_variance_and_tells_its_level():
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"image_16": x, "sample": torch.arange(64)}
    corrupt = Corruption(low=16, most=1.0, level=0.5)
    out = corrupt(batch, Draws(0, "c", batch["sample"]), training=True)
    assert abs(out["image_16"].var() - 1) < 0.03
    error = (out["image_16"] - x).square().mean((1, 2, 3))
    alpha, sigma = alpha_sigma(10 - out["image_16_level"])
    torch.testing.assert_close(error, (1 - alpha) ** 2 + sigma**2, rtol=0.2, atol=1e-3)
    fixed = corrupt(batch, Draws(0, "c", batch["sample"]), training=False)
    assert fixed["image_16_level"].unique().tolist() == [5.0]
    assert torch.equal(batch["image_16"], x)
