"""Claims about the metrics: closed forms, and one number whatever ranks, batches and order."""

import json
from datetime import timedelta
from functools import partial

import pytest
import torch

from cascade.eval.kernels import cmmd, kid
from cascade.eval.manifold import density_coverage, precision_recall
from cascade.eval.metrics import (
    CLIPScore,
    FrechetDistance,
    InceptionScore,
    TwoSamples,
    factor,
    frechet,
)
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
    metric = FrechetDistance(2, minimum=2)
    metric.update(normal(4, 2, 0), real=True)
    metric.update(torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [1.0, 1.0]]), real=False)
    with pytest.raises(ValueError, match="not finite"):
        metric.compute()


def test_distance_of_samples_has_unbiased_covariances(vectors):
    values = vectors["fid"]["samples_ddof1"]
    metric = FrechetDistance(2, minimum=2)
    metric.update(*tensors(values["A"]), real=True)
    metric.update(*tensors(values["B"]), real=False)
    assert metric.compute().item() == pytest.approx(values["fid"], abs=1e-9)


def test_two_rows_are_at_no_distance_from_themselves(vectors):
    metric = FrechetDistance(2, minimum=2)
    for real in (True, False):
        metric.update(*tensors(vectors["fid"]["samples_ddof1"]["A"][:2]), real=real)
    assert metric.compute() < 1e-12


def test_a_reference_takes_the_place_of_real_pictures():
    real, fake = normal(60, 8, 1).double(), normal(50, 8, 2)
    both, metric = FrechetDistance(8), FrechetDistance(8, reference=(real.mean(0), real.T.cov()))
    both.update(real, real=True)
    for either in (both, metric):
        either.update(fake, real=False)
    assert metric.compute().item() == pytest.approx(both.compute().item(), rel=1e-9)
    with pytest.raises(ValueError, match="reference is given"):
        metric.update(real, real=True)


def test_summed_states_of_two_ranks_give_the_distance_of_one():
    real, fake = normal(60, 8, 1), normal(50, 8, 2, shift=0.3)
    whole, *ranks = (FrechetDistance(8) for _ in range(3))
    whole.update(real, real=True)
    whole.update(fake, real=False)
    for rank, (a, b) in zip(ranks, [(real[:11], fake[:35]), (real[11:], fake[35:])]):
        rank.update(a, real=True)
        rank.update(b, real=False)
    first, second = ranks
    for state, reduce in first._reductions.items():  # what torchmetrics does after its all-gather
        setattr(first, state, reduce(torch.stack([getattr(first, state), getattr(second, state)])))
    assert first.compute().item() == pytest.approx(whole.compute().item(), abs=1e-12)


def test_identical_sets_are_at_no_distance_whatever_their_mean():
    metric = FrechetDistance(16)
    for real in (True, False):
        metric.update(normal(200, 16, 3, shift=100.0), real=real)
    assert metric.compute() < 1e-7


def test_too_few_pictures_on_either_side_are_refused():
    metric = FrechetDistance(8)
    metric.update(normal(32, 8, 4), real=True)
    metric.update(normal(31, 8, 5), real=False)
    with pytest.raises(ValueError, match="31 pictures are too few"):
        metric.compute()
    metric.update(normal(1, 8, 6), real=False)
    assert metric.compute() > 0


def test_clip_score_is_the_mean_raw_cosine(vectors):
    values = vectors["clip_score"]
    image, text = tensors([values["image"]], [values["text"]])
    metric = CLIPScore()
    metric.update(image, 7 * text)
    assert metric.compute().item() == pytest.approx(values["cosine"], abs=1e-9)
    metric.update(image, -text)  # not clamped
    assert metric.compute().item() == pytest.approx(0, abs=1e-12)


def test_inception_score_of_certain_classes_is_their_number():
    metric = InceptionScore(classes=6, splits=2)
    ids = torch.arange(12)
    metric.update(1000 * torch.eye(6).repeat_interleave(2, 0), ids)  # all six in either split
    assert metric.compute() == pytest.approx({"inception_score": 6, "inception_score_std": 0})
    metric.reset()
    metric.update(torch.zeros(12, 6), ids)
    assert metric.compute()["inception_score"] == pytest.approx(1)
    metric.reset()
    metric.update(torch.zeros(1, 6), ids[:1])
    with pytest.raises(ValueError, match="no picture"):
        metric.compute()


def test_inception_score_is_the_mean_over_splits_by_id():
    logits, ids = 3 * normal(40, 6, 7).double(), torch.randperm(40)
    metric, scores = InceptionScore(classes=6, splits=4), []
    metric.update(logits, ids)
    for split in range(4):
        p = logits[ids % 4 == split].softmax(1)
        kl = (p * (p.log() - p.mean(0).log())).sum(1)
        scores.append(kl.mean().exp())
    found = metric.compute()
    assert found["inception_score"] == pytest.approx(torch.stack(scores).mean().item(), rel=1e-9)
    std = torch.stack(scores).std(correction=0).item()
    assert found["inception_score_std"] == pytest.approx(std, rel=1e-9)


SETS = ((True, 90), (False, 70))  # real or not, and how many


def measures():
    """Every metric, and the updates that a picture i in `real` or not asks of it."""
    both = [FrechetDistance(6, minimum=2)]
    rows = [
        TwoSamples(6, partial(kid, subsets=5, size=20)),
        TwoSamples(6, cmmd),
        TwoSamples(6, precision_recall),
        TwoSamples(6, density_coverage),
    ]
    return both, rows, [InceptionScore(classes=6, splits=3)], [CLIPScore()]


def updated(metrics, ids, real):
    both, rows, scores, pairs = metrics
    x = normal(90, 6, 8 + real, shift=0.2 * (not real))[ids]
    for metric in both:
        metric.update(x, real=real)
    for metric in rows:
        metric.update(x, ids, real=real)
    if not real:
        for metric in scores:
            metric.update(x, ids)
        for metric in pairs:
            metric.update(x, x.roll(1, 1))


def numbers(metrics):
    found = []
    for metric in (metric for group in metrics for metric in group):
        value = metric.compute()
        found += value.values() if isinstance(value, dict) else [float(value)]
    return found


def test_neither_batches_nor_order_change_a_number():
    whole, parts = measures(), measures()
    for real, count in SETS:
        updated(whole, torch.arange(count), real)
        for batch in torch.randperm(count).split(17):
            updated(parts, batch, real)
    assert len(numbers(whole)) == 12
    assert numbers(parts) == pytest.approx(numbers(whole), rel=1e-9)


def rank(folder, shared):
    """One of two ranks: rank 1 sees every other real picture if they are shared, or nothing."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    number, metrics = torch.distributed.get_rank(), measures()
    for real, count in SETS:
        ids = torch.arange(count).flip(0)
        own = ids[number::2] if real and shared else ids[: count * (number == 0)]
        if len(own):
            updated(metrics, own, real)
    (folder / f"{number}.json").write_text(json.dumps([numbers(metrics), numbers(metrics)]))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("shared", [True, False])
def test_two_ranks_give_the_numbers_of_one_though_one_has_no_pictures(tmp_path, shared):
    one = measures()
    for real, count in SETS:
        updated(one, torch.arange(count), real)
    job = Job(rank, [tmp_path, shared], out=tmp_path / "out", ranks=2)
    assert job.wait(180) == [0, 0], job.output()  # of which most is imports
    for number in range(2):
        for found in json.loads((tmp_path / f"{number}.json").read_text()):
            assert found == pytest.approx(numbers(one), rel=1e-9)


def test_no_picture_is_counted_twice_and_none_is_too_few():
    metric = TwoSamples(3, cmmd)
    metric.update(normal(4, 3, 0), torch.arange(4), real=True)
    with pytest.raises(ValueError, match="0 generated pictures"):
        metric.compute()
    metric.update(normal(3, 3, 1), torch.tensor([7, 5, 6]), real=False)
    metric.compute()
    metric.update(normal(1, 3, 2), torch.tensor([5]), real=False)
    with pytest.raises(ValueError, match="generated picture 5 was counted twice"):
        metric.compute()
    metric.reset()
    metric.update(normal(4, 3, 0), torch.arange(4), real=True)
    metric.update(normal(4, 3, 0), torch.arange(4), real=False)
    assert metric.compute() == pytest.approx(0, abs=1e-12)
