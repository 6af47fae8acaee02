"""Claims about a prior's own metrics: equal to loops and closed forms, for both weights."""

from dataclasses import dataclass
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

from cascade.autoregressive import Autoregressive
from cascade.codecs import Embedding
from cascade.conditioning import Conditioner, Vector
from cascade.data.scenes.captions import Object, Scene
from cascade.diffusion.gaussian import Diffusion
from cascade.diffusion.noise import alpha_sigma, cosine
from cascade.eval.cascades.prior import (
    LEVELS,
    apart,
    groups,
    loss_by_level,
    measure_prior,
    online,
    prior_metrics,
    retrieval,
    scene_classes,
    unrelated,
    zero_shot,
)
from cascade.eval.cascades.protocol import HeldOut
from cascade.eval.metrics.distances import frechet
from cascade.pipeline import BestOf, Cascade
from cascade.stage import Stage
from cascade.training.checkpoint import CheckpointFolders, newest_checkpoint

D = 6
CAPTIONS = [f"caption {i // 2 if i < 20 else i}" for i in range(60)]  # the first ten are twice


def unit(n, seed, d=D):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=generator), dim=1)


class Encoder:
    """Text embeddings that are a function of the caption."""

    name, hash = "e", "0"
    reads, writes = frozenset({"caption"}), frozenset({"clip_text"})

    def to(self, device):
        return self

    def __call__(self, batch):
        rows = [unit(1, sum(map(ord, caption))) for caption in batch["caption"]]
        return {**batch, "clip_text": torch.cat(rows)}


class Linear(nn.Module):
    """F = weight * x, whatever else it is told."""

    def __init__(self, weight=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x, logsnr, cond):
        return self.weight * x


@dataclass(frozen=True)
class Sampler:
    """Gives the noise, times one and the network's weight."""

    scale: float = 1.0

    def __call__(self, process, net, shape, cond, weaker, noise, progress=None):
        return noise(shape) + net.weight * cond.vector


def stage(process=None, **codec):
    """Knows the text embedding as it is."""
    told = Vector("clip_text", D, dim=D, learned_null=False)
    told.to_vector.weight.data = torch.eye(D) * D**-0.5
    nn.init.zeros_(told.to_vector.bias)
    parts = Embedding(D, **codec), Conditioner({"clip_text": told}), Linear()
    return Stage(*parts, process or Diffusion(), Sampler(), torch.optim.SGD, encoders=[Encoder()])


def held_out(true=None):
    return HeldOut(CAPTIONS, {"clip_image": unit(60, 1) if true is None else true})


def paint(cascade, captions, given, what):
    return cascade({"caption": captions, "sample": torch.arange(len(captions)), **given}, 0)


def test_the_cosine_to_other_captions_is_a_mean_over_all_pairs():
    rows, true, same = unit(60, 2), unit(60, 1), groups(CAPTIONS)
    pairs = [(i, j) for i in range(60) for j in range(60) if CAPTIONS[i] != CAPTIONS[j]]
    expected = sum((rows[i] @ true[j]).item() for i, j in pairs) / len(pairs)
    assert unrelated(rows, true, same) == pytest.approx(expected, abs=1e-6)
    assert unrelated(rows, true, torch.zeros(60, dtype=torch.int64)) is None


@pytest.mark.parametrize("k", [1, 5, 10])
def test_retrieval_is_what_a_loop_finds_and_equal_captions_are_right(k):
    queries, gallery = normalize(unit(60, 1) + unit(60, 3), dim=1), unit(60, 1)
    right = 0
    for i in range(60):
        order = sorted(range(60), key=lambda j: -(queries[i] @ gallery[j]).item())
        right += any(CAPTIONS[j] == CAPTIONS[i] for j in order[:k])
    found = retrieval(queries, gallery, groups(CAPTIONS), k)
    assert found == right / 60
    assert retrieval(queries, gallery, torch.arange(60), k) <= found
    # The one of an equal caption is found in its place, and counts if captions do.
    pairs = gallery[[i ^ 1 for i in range(20)]]
    assert retrieval(pairs, gallery[:20], groups(CAPTIONS[:20]), 1) == 1
    assert retrieval(pairs, gallery[:20], torch.arange(20), 1) == 0


def scene(color, shape, count=1):
    return Scene((Object(color, shape, "large", 0.5, 0.5, 0.3),) * count, "white")


def test_zero_shot_classifies_colour_and_shape_of_single_objects():
    scenes = [scene("red", "circle"), scene("blue", "star", 2), scene("pink", "heart")]
    classes = scene_classes(HeldOut(["a", "b", "c"], {}, scenes))
    assert classes.rows == [0, 2]
    assert [classes.captions[i] for i in classes.labels] == ["a red circle", "a pink heart"]
    assert len(classes.captions) == 8 * 3  # the shapes of this split
    assert scene_classes(HeldOut(["b"], {}, scenes[1:2])) is None
    assert scene_classes(HeldOut(["b"], {})) is None

    of_classes = torch.eye(len(classes.captions))
    wrong = classes.captions.index("a red star")  # for the first: the colour is right
    found = zero_shot(of_classes[[wrong, 0, classes.labels[1]]], of_classes, classes)
    assert (found["class"], found["color"], found["shape"]) == (0.5, 1.0, 0.5)
    assert (found["count"], found["classes"]) == (2, 24)
    low, high = found["intervals"]["class"]
    assert low < 0.5 < high


def test_the_loss_at_a_level_is_the_variance_that_is_left():
    """Unit Gaussian data: v-prediction of zero is the best there is, and its loss sigma^2."""
    true = unit(4000, 5)
    prior = stage()
    prior.codec.fit([{"clip_image": true}])
    data = HeldOut([f"{i}" for i in range(4000)], {"clip_image": true})
    text = unit(4000, 6)
    found = loss_by_level(prior, data, text)
    assert [level["u"] for level in found["levels"]] == LEVELS
    for level in found["levels"]:
        logsnr = cosine(torch.tensor([level["u"]], dtype=torch.float64))
        assert level["logsnr"] == pytest.approx(logsnr.item())
        expected = alpha_sigma(logsnr)[1].square().item()
        assert level["loss"] == pytest.approx(expected, rel=0.03)
    assert found["text"] == pytest.approx(2, rel=0.03)  # of two independent of unit variance
    assert found["count"] == 4000


def test_a_process_without_levels_has_no_loss_by_level():
    assert loss_by_level(stage(Autoregressive()), held_out(), unit(60, 3)) is None


def test_numbers_are_beside_those_of_the_text_embedding():
    data, prior = held_out(), stage(deviation=1.0)
    true = data.truth["clip_image"]
    found = prior_metrics(prior, data, true, paint)
    text = torch.cat([unit(1, sum(map(ord, caption))) for caption in CAPTIONS])
    assert found["cosine"] == pytest.approx(1, abs=1e-6)
    assert found["cosine_text"] == pytest.approx((text * true).sum(1).mean().item(), abs=1e-6)
    assert found["frechet"] == pytest.approx(0, abs=1e-9)
    moments = [m for x in (text, true) for m in (x.double().mean(0), x.double().T.cov())]
    assert found["frechet_text"] == pytest.approx(frechet(*moments), rel=1e-6)
    assert found["frechet_ratio"] == found["frechet"] / found["frechet_text"]
    assert [found[name] for name in ("retrieval", "retrieval_5", "retrieval_10")] == [1, 1, 1]
    assert found["retrieval_text"] <= found["retrieval_5_text"] <= found["retrieval_10_text"] < 1
    assert found["retrieval_ratio"] == 1 / max(found["retrieval_text"], 1 / 60)
    assert (found["count"], found["gallery"]) == (60, 60)
    assert "zero_shot" not in found  # no scenes
    assert prior_metrics(prior, data.first(20), true[:20], paint)["frechet"] is None  # too few


def test_spread_is_the_mean_distance_of_samples_of_one_caption():
    data = held_out()
    found = prior_metrics(stage(deviation=1.0), data, unit(60, 2), paint)["spread"]
    captions = [f"caption {i}" for i in range(10)]  # those that are there twice
    drawn = paint(Cascade([stage(deviation=1.0)]), captions * 4, {}, "")["clip_image"]
    sets = [drawn[i::10] for i in range(10)]
    expected = [(a - b).norm().item() for s in sets for a, b in combinations(s, 2)]
    assert found["drawn"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    true = data.truth["clip_image"]
    expected = [(true[2 * i] - true[2 * i + 1]).norm().item() for i in range(10)]
    assert found["true"] == pytest.approx(sum(expected) / 10, rel=1e-5)
    assert (found["samples"], found["count"]) == (4, 10)
    alone = HeldOut(CAPTIONS[20:], {"clip_image": true[20:]})
    assert prior_metrics(stage(), alone, true[20:], paint)["spread"]["true"] is None
    assert apart(torch.tensor([[0.0, 0], [3, 4], [0, 0]])) == pytest.approx(10 / 3)


@pytest.fixture
def checkpoint(tmp_path):
    """One with the weight 9, and nothing else changed."""
    trained = stage(deviation=1.0)
    nn.init.constant_(trained.net.weight, 9.0)
    state = {"state_dict": dict(trained.state_dict())}
    state["position"] = {"step": 7, "images": 28, "consumed": 28, "offset": 0, "ranks": 1}
    CheckpointFolders().save_checkpoint(state, tmp_path / "checkpoints" / "step-00000007")
    return newest_checkpoint(tmp_path)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: BestOf(s, 2)])
def test_online_weights_are_there_within_the_context_only(checkpoint, wrap):
    averaged = stage(deviation=1.0)
    with online(wrap(averaged), checkpoint):
        assert averaged.net.weight == 9
    assert averaged.net.weight == 0
    with pytest.raises(ZeroDivisionError), online(wrap(averaged), checkpoint):
        raise ZeroDivisionError
    assert averaged.net.weight == 0


def test_both_sets_of_weights_are_measured(checkpoint):
    data, prior = held_out(), stage(deviation=1.0)
    cascade = Cascade([prior])
    drawn = paint(cascade, CAPTIONS, {}, "")["clip_image"]
    found = measure_prior(cascade, data, drawn, paint, checkpoint)
    assert found["online"]["step"] == 7
    assert found["online"]["cosine_text"] == found["cosine_text"]
    # The trained one leads towards the text.
    with online(prior, checkpoint):
        drawn = paint(cascade, CAPTIONS, {}, "")["clip_image"]
    alone = prior_metrics(prior, data, drawn, paint)
    assert found["online"]["cosine"] == alone["cosine"] != found["cosine"]
    assert found["online"]["spread"]["drawn"] < found["spread"]["drawn"]
    levels = [of["loss_by_level"]["levels"][0]["loss"] for of in (found, found["online"])]
    assert levels[1] > 10 * levels[0]
    assert "online" not in measure_prior(cascade, data, drawn, paint, None)
