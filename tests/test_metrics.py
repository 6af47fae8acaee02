"""Claims about the metrics: closed forms, and definitions written out."""

import json
from datetime import timedelta

import pytest
import torch

from cascade.eval.metrics.distances import (
    FrechetDistance,
    InceptionScore,
    cosines,
    factor,
    frechet,
    frechet_rows,
    inception_score,
)
from cascade.eval.metrics.features import CLIPFeatures
from cascade.eval.metrics.measures import CLIP_SCORE, Sample
from tests.processes import Job


def tensors(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def normal(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) + shift


@pytest.mark.parametrize("case", ["g2", "g3"])
def test_frechet_equals_the_closed_form(vectors, case):
    values = vectors["fid"][case]
    gaussians = tensors(*(values[key] for key in ("mu1", "S1", "mu2", "S2")))
    assert frechet(*gaussians) == pytest.approx(values["fid"], abs=1e-9)
    assert frechet(*gaussians[2:], *gaussians[:2]) == pytest.approx(values["fid"], abs=1e-9)


def test_frechet_in_one_dimension():
    assert frechet(*tensors([1.0], [[4.0]], [3.0], [[9.0]])) == pytest.approx(5, abs=1e-9)


def test_frechet_of_scaled_covariance_and_of_singular_ones():
    mu, eye = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    assert frechet(mu, eye, mu, 4 * eye) == pytest.approx(5, abs=1e-9)
    flat = normal(20, 256, 0).double()  # rank 19 of 256
    mu, cov = flat.mean(0), flat.T.cov()
    assert frechet(mu, cov, mu, cov) < 1e-9
    assert frechet(mu, cov, mu, 4 * cov) == pytest.approx(cov.trace().item(), rel=1e-9)


def test_frechet_of_moments_equals_that_of_rows_where_rank_is_deficient():
    """With X and Y the centred rows, tr (S1 S2)^(1/2) is the nuclear norm of X Y'."""
    for n, m, d in ((30, 40, 200), (300, 20, 64)):
        scale = torch.logspace(0, -4, d, dtype=torch.float64)
        x, y = (normal(k, d, seed).double() * scale for k, seed in ((n, 10), (m, 11)))
        a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
        expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
        expected -= 2 * torch.linalg.svdvals(a @ b.T).sum()
        found = frechet(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
        assert found == pytest.approx(expected.item(), rel=1e-9)


def test_the_factor_has_the_rank_of_the_covariance():
    cov = normal(20, 256, 0).double().T.cov()
    root = factor(cov)
    assert root.shape == (256, 19)
    torch.testing.assert_close(root @ root.T, cov, rtol=0, atol=1e-13)
    assert factor(torch.zeros(3, 3)).shape == (3, 0)


def test_features_that_are_not_finite_are_refused():
    broken = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="not finite"):
        frechet_rows(broken, normal(4, 2, 0), minimum=2)


def test_distance_of_samples_has_unbiased_covariances(vectors):
    values = vectors["fid"]["samples_ddof1"]
    found = frechet_rows(*tensors(values["B"], values["A"]), minimum=2)
    assert found == pytest.approx(values["fid"], abs=1e-9)


def test_two_rows_are_at_no_distance_from_themselves(vectors):
    (rows,) = tensors(vectors["fid"]["samples_ddof1"]["A"][:2])
    assert frechet_rows(rows, rows, minimum=2) < 1e-12


def test_identical_sets_are_at_no_distance_whatever_their_mean():
    rows = normal(200, 16, 3, shift=100.0)
    assert frechet_rows(rows, rows) < 1e-7


def test_too_few_pictures_on_either_side_have_no_distance():
    enough, few = normal(32, 8, 4), normal(31, 8, 5)
    assert frechet_rows(few, enough) is None
    assert frechet_rows(enough, few) is None
    assert frechet_rows(enough, enough + 1) > 0
    assert frechet_rows(enough[:1], enough, minimum=1) is None


class Toy:
    """The interface of a CLIP, of which nothing is encoded here."""

    name, hash, dim = "toy", "", 2

    def image(self, pictures): ...


def test_clip_score_is_the_mean_raw_cosine(vectors):
    values = vectors["clip_score"]
    image, text = tensors([values["image"]], [values["text"]])
    assert cosines(image, 7 * text).item() == pytest.approx(values["cosine"], abs=1e-9)
    rows = torch.cat([image, image])
    both = cosines(rows, torch.cat([7 * text, -text]))  # not clamped
    space = CLIPFeatures(Toy())
    score = CLIP_SCORE.compute(Sample(space=space, rows=rows, cosines=both))
    assert score == pytest.approx(0, abs=1e-12)


def test_inception_score_of_certain_classes_is_their_number():
    certain = 1000 * torch.eye(6).repeat_interleave(2, 0)  # all six in either split
    assert inception_score([certain], 6, splits=2) == pytest.approx((6, 0))
    assert inception_score([torch.zeros(12, 6)], 6, splits=2)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="no picture"):
        inception_score([torch.zeros(1, 6)], 6, splits=2)


def test_inception_score_is_the_mean_over_splits_whatever_the_parts():
    logits, scores = 3 * normal(40, 6, 7).double(), []
    for split in range(4):
        p = logits[split::4].softmax(1)
        kl = (p * (p.log() - p.mean(0).log())).sum(1)
        scores.append(kl.mean().exp())
    scores = torch.stack(scores)
    expected = scores.mean().item(), scores.std(correction=0).item()
    for size in (7, 40):
        found = inception_score(logits.split(size), 6, splits=4)
        assert found == pytest.approx(expected, rel=1e-9)


SETS = ((True, 90), (False, 70))  # real or not, and how many


def updated(metrics, ids, real):
    distance, score = metrics
    x = normal(90, 6, 8 + real, shift=0.2 * (not real))[ids]
    distance.update(x, real=real)
    if not real:
        score.update(x, ids)


def measures():
    return FrechetDistance(6), InceptionScore(classes=6, splits=3)


def numbers(metrics):
    distance, score = metrics
    return [distance.compute().item(), *score.compute()]


def test_neither_batches_nor_order_change_a_number():
    whole, parts = measures(), measures()
    for real, count in SETS:
        updated(whole, torch.arange(count), real)
        for batch in torch.randperm(count).split(17):
            updated(parts, batch, real)
    assert numbers(parts) == pytest.approx(numbers(whole), rel=1e-9)
    real, fake = (normal(90, 6, 8 + x, shift=0.2 * (not x))[:count] for x, count in SETS)
    assert numbers(whole)[0] == pytest.approx(frechet_rows(fake, real), rel=1e-9)


def rank(folder):
    """One of two ranks: rank 0 sees every generated picture, rank 1 some of the real ones."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    number, metrics = torch.distributed.get_rank(), measures()
    for real, count in SETS:
        ids = torch.arange(count).flip(0)
        own = ids[number::2] if real else ids[: count * (number == 0)]
        if len(own):
            updated(metrics, own, real)
    (folder / f"{number}.json").write_text(json.dumps(numbers(metrics)))
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_numbers_of_one_though_one_has_no_generated_pictures(tmp_path):
    one = measures()
    for real, count in SETS:
        updated(one, torch.arange(count), real)
    job = Job(rank, [tmp_path], out=tmp_path / "out", ranks=2)
    assert job.wait(180) == [0, 0], job.output()  # of which most is imports
    for number in range(2):
        found = json.loads((tmp_path / f"{number}.json").read_text())
        assert found == pytest.approx(numbers(one), rel=1e-9)
