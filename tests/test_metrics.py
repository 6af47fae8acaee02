"""Claims about the metrics: closed-form values, sums that reduce across ranks, honest names."""

import hashlib

import pytest
import torch
from torch.nn import functional as F

from cascade.errors import UserError
from cascade.eval import features as feature_spaces
from cascade.eval.features import CLIPFeatures, InceptionFeatures, distance_name, inception
from cascade.eval.metrics import CLIPScore, FrechetDistance, frechet, retrieval_at_1


def tensors(*values):
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def normal(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) + shift


@pytest.mark.parametrize(
    ("mu1", "cov1", "mu2", "cov2", "expected"),
    [
        ([1.0], [[4.0]], [3.0], [[9.0]], 5.0),
        (
            [0.0, 0.0],
            [[2.0, 0.5], [0.5, 1.0]],
            [1.0, -1.0],
            [[1.0, -0.3], [-0.3, 1.5]],
            2.4634711896064756,
        ),
        (
            [0.5, -1.0, 2.0],
            [[2.0, 0.3, -0.2], [0.3, 1.5, 0.4], [-0.2, 0.4, 1.0]],
            [0.0, -0.5, 1.0],
            [[1.0, 0.1, 0.0], [0.1, 0.8, -0.3], [0.0, -0.3, 2.2]],
            2.240579501026284,
        ),
    ],
)
def test_frechet_equals_the_closed_form(mu1, cov1, mu2, cov2, expected):
    assert frechet(*tensors(mu1, cov1, mu2, cov2)) == pytest.approx(expected, abs=1e-9)


def test_frechet_of_scaled_covariance_and_of_singular_ones():
    mu, eye = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    assert frechet(mu, eye, mu, 4 * eye) == pytest.approx(5, abs=1e-9)
    flat = normal(20, 256, 0).double()  # rank 19 of 256
    mu, cov = flat.mean(0), flat.T.cov()
    assert frechet(mu, cov, mu, cov) < 1e-9
    assert frechet(mu, cov, mu, 4 * cov) == pytest.approx(cov.trace().item(), rel=1e-9)


def test_distance_of_samples_has_unbiased_covariances():
    real = torch.tensor([[0, 1], [2, 3], [4, 1], [1, 0], [3, 5], [2, 2]]).float()
    fake = torch.tensor([[1, 1], [2, 4], [5, 3], [0, 2], [3, 3]]).float()
    metric = FrechetDistance(2, minimum=2)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    assert metric.compute().item() == pytest.approx(1.0967030828202695, abs=1e-9)


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


def test_clip_score_is_the_mean_raw_cosine():
    image = torch.tensor([[0.2, 0.4, 0.4, 0.8]]).double()
    text = torch.tensor([[0.1, 0.9, 0.3, 0.3]]).double()
    metric = CLIPScore()
    metric.update(image, 7 * text)
    assert metric.compute().item() == pytest.approx(0.74, abs=1e-7)
    metric.update(image, -text)  # not clamped
    assert metric.compute().item() == pytest.approx(0, abs=1e-12)


def test_retrieval_accepts_equivalents_and_only_them():
    gallery = torch.eye(4)
    queries = gallery[[0, 2, 1, 3]]  # 1 and 2 find each other
    same = torch.zeros(4, 4, dtype=torch.bool)
    assert retrieval_at_1(queries, gallery) == 0.5
    same[1, 2] = True
    assert retrieval_at_1(queries, gallery, same) == 0.75


class TinyCLIP:
    name, hash, dim = "tiny-b", "0123456789abcdef", 12

    def image(self, pictures):
        return pictures.flatten(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A seeded network in the file format of the real one, and the hash of that file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(inception().state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_inception_of_the_fid_is_called_fid(weights, monkeypatch):
    clip = CLIPFeatures(TinyCLIP())
    assert clip(torch.rand(3, 3, 2, 2)).norm(dim=1) == pytest.approx(torch.ones(3), abs=1e-6)
    assert distance_name(clip) == "Fréchet distance (CLIP features of tiny-b, 01234567)"
    path, sha256 = weights
    space = InceptionFeatures(path, sha256)
    assert distance_name(space).startswith("Fréchet distance (Inception-v3")
    monkeypatch.setattr(feature_spaces, "FID_SHA256", sha256)
    assert distance_name(space) == "FID"


def test_inception_refuses_missing_and_other_weights(weights, tmp_path):
    with pytest.raises(UserError, match="no Inception weights"):
        InceptionFeatures(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="SHA-256"):
        InceptionFeatures(weights[0])


def test_inception_reads_the_state_dict_of_the_reference(weights):
    state = torch.load(weights[0], weights_only=True)
    assert len(state) == 566  # as many tensors as the published file
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch_pool.conv.weight"].shape == (192, 2048, 1, 1)


def test_inception_features_depend_on_the_8_bit_picture_alone(weights):
    space = InceptionFeatures(*weights)
    pictures = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(1)) * 2 - 1
    stored = ((pictures + 1) * 127.5).round() / 127.5 - 1
    rows = space(pictures)
    assert rows.shape == (2, space.dim)
    assert rows.std() > 0
    torch.testing.assert_close(rows, space(stored), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "size"), [("5c", 9), ("6d", 7), ("7b", 5), ("7c", 5)])
def test_pooled_branches_pool_as_the_tensorflow_graph_does(name, size):
    torch.manual_seed(0)
    block = inception().eval().get_submodule(f"Mixed_{name}")
    x = torch.rand(1, block.branch_pool.conv.in_channels, size, size)
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=torch.nan), 3).unflatten(1, (-1, 9))
    kept = windows.nan_to_num(-1).amax(2) if name == "7c" else windows.nanmean(2)
    with torch.no_grad():
        output, branch = block(x), block.branch_pool(kept.unflatten(2, (size, size)))
    torch.testing.assert_close(output[:, -branch.shape[1] :], branch)
