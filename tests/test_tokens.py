"""The codec of the autoregressive prior: its PCA, its buckets, what it refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cascade.codecs import Tokens, principal
from cascade.config.compose import built, composed
from cascade.errors import UserError


def embeddings(n=2000, d=8, seed=0):
    """Unit vectors of unequal variances about a mean, and text embeddings near them."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, d)) * np.array([1.0, 0.8, 0.6, 0.4, 0.1, 0.05, 0.02, 0.01])[:d] + 0.3
    z = torch.from_numpy(z @ np.linalg.qr(rng.normal(size=(d, d)))[0])
    text = F.normalize(z + 0.5 * torch.from_numpy(rng.normal(size=(n, d))), dim=1)
    return {"clip_image": F.normalize(z, dim=1), "clip_text": text}


def fitted(data, components=8, buckets=1024, **more):
    codec = Tokens(data["clip_image"].shape[1], components, buckets, **more).double()
    codec.fit({k: v[i : i + 300] for k, v in data.items()} for i in range(0, 2000, 300))
    return codec


def test_one_streaming_pass_equals_the_pca_of_all_embeddings_at_once():
    data = embeddings()
    codec = fitted(data)
    z = data["clip_image"].numpy()
    _, singular, axes = np.linalg.svd(z - z.mean(0), full_matrices=False)
    torch.testing.assert_close(codec.mean.numpy(), z.mean(0), atol=1e-12, rtol=0)
    signs = np.sign((codec.axes.numpy() * axes).sum(1, keepdims=True))
    np.testing.assert_allclose(codec.axes.numpy(), signs * axes, atol=1e-8)
    std = singular / np.sqrt(len(z))
    assert (np.diff(std) < 0).all()
    np.testing.assert_allclose((codec.width[1:] * 1024 / 8).numpy(), std, rtol=1e-10)
    dots = (data["clip_image"] * data["clip_text"]).sum(1)
    middle = codec.low[0] + 512 * codec.width[0]
    torch.testing.assert_close(middle, dots.mean())
    torch.testing.assert_close(codec.width[0] * 128, dots.std(correction=0))


def test_the_sign_of_an_axis_is_that_of_its_largest_entry():
    covariance = torch.cov(embeddings()["clip_image"].T)
    variance, axes = principal(covariance)
    assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(axes.T @ torch.diag(variance) @ axes, covariance)


def test_too_small_a_share_is_refused_with_the_number_that_would_do():
    data = embeddings()
    variance = np.linalg.eigvalsh(np.cov(data["clip_image"].numpy().T))[::-1]
    kept = np.cumsum(variance) / variance.sum()
    needed = int(np.argmax(kept >= 0.99)) + 1
    with pytest.raises(UserError, match=rf"2 of 8 .*{kept[1]:.2%}.*net\.components={needed}"):
        fitted(data, 2)
    fitted(data, needed)
    with pytest.raises(UserError):
        fitted(data, needed - 1)
    fitted(data, 2, share=kept[1] - 1e-6)


def test_a_component_comes_back_to_half_a_bucket():
    data = embeddings()
    for buckets in (16, 1024):
        codec = fitted(data, buckets=buckets)
        y = (data["clip_image"] - codec.mean) @ codec.axes.T
        tokens = codec.encode(data)
        assert tokens.shape == (2000, *codec.shape({}))
        assert tokens.min() >= 0
        assert tokens.max() <= buckets - 1
        back = codec.low + (tokens + 0.5) * codec.width
        inside = y.abs() < codec.REACH * codec.width[1:] * buckets / 8
        assert inside.double().mean() > 0.999
        off = (back[:, 1:] - y).abs() / codec.width[1:]
        assert off[inside].max() <= 0.5 + 1e-9
        assert off[~inside].numel() == 0 or off[~inside].min() > 0.5  # the last bucket
        dots = (data["clip_image"] * data["clip_text"]).sum(1)
        assert ((back[:, 0] - dots).abs() / codec.width[0]).quantile(0.99) <= 0.5
        decoded = codec.decode(tokens)
        torch.testing.assert_close(decoded.norm(dim=1), torch.ones(2000).double())
        error = (decoded - data["clip_image"]).square().sum(1).mean()
        variance = (codec.width * buckets / 8).square()[1:].sum()
        # Even rounding costs width^2 / 12; tails beyond reach and the norm are the rest.
        assert error / variance < 1.5 * (8 / buckets) ** 2 / 12 + 1e-4


def test_dropped_components_cost_their_share_of_the_variance():
    data = embeddings()
    codec = fitted(data, 3, share=0.5)
    z = data["clip_image"]
    back = codec.mean + (z - codec.mean) @ codec.axes.T @ codec.axes
    lost = 1 - (codec.width * 128).square()[1:].sum() / z.var(0, correction=0).sum()
    error = (back - z).square().sum(1).mean() / z.var(0, correction=0).sum()
    torch.testing.assert_close(error, lost)


def test_the_checkpoint_holds_the_pca():
    data = embeddings()
    codec, other = fitted(data, 5, 64), Tokens(8, 5, 64).double()
    other.load_state_dict(codec.state_dict())
    tokens = codec.encode(data)
    assert torch.equal(other.encode(data), tokens)
    assert torch.equal(other.decode(tokens), codec.decode(tokens))


def test_a_pca_of_another_dimension_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"components=12, .* 8 numbers: set net\.components=8"):
        Tokens(8, 12, 64)
    with pytest.raises(UserError, match=r"dim=16, .* 8 numbers: set clip\.model\.dim=8"):
        Tokens(16, 4, 64).fit([embeddings(10)])
    with pytest.raises(UserError, match=r"components=319, .* net\.components=64"):
        built(composed("train", ["stage=prior_ar", "data.path=x", "net=prior_ar_unclip"]).stage)
