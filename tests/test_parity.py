"""Claims of parity: torch-fidelity and clean-fid find the same numbers in the same pictures.

The weights are those of a seeded network in a file of the real format, since the real one cannot be
had here. clean-fid's network (TorchScript) cannot be had either: its resizers feed the network of
torch-fidelity. To the same end its `frechet_distance` is not run under SciPy 1.18, which took out
what it calls.
"""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import torch
import torch_fidelity
from cleanfid import fid as clean_fid
from cleanfid.resize import build_resizer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torch_fidelity import feature_extractor_inceptionv3 as theirs
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from cascade.eval.metrics.distances import frechet, frechet_rows, inception_score
from cascade.eval.metrics.features import (
    CLEAN,
    PYTORCH_FID,
    TENSORFLOW,
    InceptionFeatures,
    inception,
)
from cascade.eval.metrics.kernels import kid
from cascade.eval.metrics.manifold import precision

SPLITS = 4
SIZES = ((64, 64), (96, 80), (320, 352))  # enlarged, and made smaller


def pictures(count, seed, colour):
    """uint8 [3, h, w] of several sizes: waves, checkerboards, discs and noise, in pale colours."""
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        h, w = SIZES[i % len(SIZES)]
        y, x = np.mgrid[0:1:1j, 0:1:1j][:, :1, :1] + np.mgrid[0:h, 0:w] / [[[h]], [[w]]]
        a, b, c = rng.uniform(1, 12, 3)
        kinds = (
            np.sin(a * x + b * y + c),
            np.sign(np.sin(3 * a * x) * np.sin(3 * b * y)),
            np.where((x - a / 12) ** 2 + (y - b / 12) ** 2 < c / 60, 1, -1),
            rng.standard_normal((h, w)) / 2,
        )
        tint = np.array(colour)[:, None, None] + rng.uniform(-60, 60, (3, 1, 1))
        levels = tint + 70 * kinds[i // 3 % 4] + 10 * rng.standard_normal((3, h, w))
        found.append(torch.from_numpy(levels.clip(0, 255).astype(np.uint8)))
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A seeded network whose features vary: batch norms are those of some pictures."""
    torch.manual_seed(0)
    net = inception()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = None
    nn.init.normal_(net.fc.weight, std=0.3)
    some = [x[None] for x in pictures(12, 0, (120, 120, 120))]
    with torch.no_grad():
        net.train()(torch.cat([CLEAN.feed(x) for x in some]))
    for name, module in net.Mixed_7c.named_modules():
        if name.endswith(".bn"):  # features about as large as the real ones
            module.weight.data *= 0.3
            module.bias.data *= 0.3
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(net.state_dict(), path)
    return path


def ours(weights, resize):
    return InceptionFeatures(weights, hashlib.sha256(weights.read_bytes()).hexdigest(), resize)


@pytest.fixture(scope="module")
def network(weights):
    """torch-fidelity's extractor: pictures [b, 3, h, w] to features and logits."""
    names = ["2048", "logits_unbiased"]
    return theirs.FeatureExtractorInceptionV3(
        "inception-v3-compat", names, feature_extractor_weights_path=str(weights)
    )


COUNTS = [pytest.param(12, id="few"), pytest.param(160, marks=pytest.mark.slow, id="many")]


@pytest.fixture(scope="module", params=COUNTS)
def sets(request, tmp_path_factory):
    """Generated and real pictures, in memory and as files that clean-fid reads."""
    folder, found = tmp_path_factory.mktemp("sets"), {}
    for name, seed, colour in (("fake", 1, (170, 110, 80)), ("real", 2, (90, 110, 160))):
        images = pictures(request.param, seed, colour)
        files = [folder / f"{name}{i:04d}.npy" for i in range(len(images))]
        for file, image in zip(files, images):
            np.save(file, image.permute(1, 2, 0).numpy())
        found[name] = SimpleNamespace(images=images, files=[str(file) for file in files])
    return found


def embedded(space, images):
    """Rows of pictures of several sizes, in their order."""
    rows = torch.empty(len(images), space.dim)
    for i in range(len(SIZES)):
        mine = torch.arange(i, len(images), len(SIZES))
        for part in mine.split(16):
            rows[part] = space(torch.stack([images[n] for n in part]))
    return rows


def by_metrics(space, fake, real):
    """Our numbers, by our metrics."""
    ids = torch.arange(len(fake))
    # Their splits are runs of pictures, ours are residues of ids.
    position, split = ids % (len(ids) // SPLITS), ids // (len(ids) // SPLITS)
    order = (position * SPLITS + split).argsort()
    score, deviation = inception_score([space.logits(fake)[order]], splits=SPLITS)
    found = {"fid": frechet_rows(fake, real, minimum=2), "kid": kid(fake, real)}
    found |= {"precision": precision(fake, real), "recall": precision(real, fake)}
    return {**found, "inception_score": score, "inception_score_std": deviation}


def assert_same(mine, others):
    """To 1e-4 relative; and the numbers say something."""
    for name, value in others.items():
        assert mine[name] == pytest.approx(value, rel=1e-4), name
    assert mine["fid"] > 1
    assert 0.01 < mine["kid"] < 10
    assert 0 < mine["precision"] < 1
    assert 0 < mine["recall"] < 1
    assert mine["inception_score"] > 1.05


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def test_torch_fidelity_finds_the_same_numbers(weights, sets):
    """Its own path from pictures to numbers, which is TensorFlow's resizing."""
    fake, real = sets["fake"].images, sets["real"].images
    found = torch_fidelity.calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        batch_size=1,
        cuda=False,
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subsets=1,
        kid_subset_size=len(fake),
        isc_splits=SPLITS,
        samples_shuffle=False,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        cache=False,
        verbose=False,
        dataloader_workers=0,
    )
    space = ours(weights, TENSORFLOW)
    mine = by_metrics(space, *(embedded(space, images) for images in (fake, real)))
    others = {
        "fid": found["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "inception_score": found["inception_score_mean"],
        "inception_score_std": found["inception_score_std"],
        "precision": found["precision"],
        "recall": found["recall"],
    }
    assert_same(mine, others)


@pytest.mark.slow
@pytest.mark.parametrize("resize", [CLEAN, PYTORCH_FID], ids=lambda resize: resize.name)
def test_clean_fid_finds_the_same_numbers(weights, network, sets, resize, monkeypatch):
    """Its path from files to features but for the network, and its and torch-fidelity's numbers."""
    monkeypatch.setattr(theirs, "vassert", lambda *_: None)  # which want integers of 8 bits
    mode = {"clean": "clean", "pytorch-fid": "legacy_pytorch"}[resize.name]

    def model(x):
        assert x.shape[2:] == (299, 299)
        if resize is PYTORCH_FID:  # its own network maps 0 to -1 and 255 to 1
            x = (2 * x / 255 - 1) * 128 + 128
        return network(x)[0]

    fake, real = (
        clean_fid.get_files_features(
            sets[name].files,
            model,
            num_workers=0,
            batch_size=16,
            device="cpu",
            mode=mode,
            verbose=False,
        )
        for name in ("fake", "real")
    )
    space = ours(weights, resize)
    mine = by_metrics(space, *(embedded(space, sets[name].images) for name in ("fake", "real")))
    n, rows = len(fake), [torch.from_numpy(x) for x in (fake, real)]
    statistics = [fid_features_to_statistics(x) for x in rows]
    distance = fid_statistics_to_metric(*statistics, verbose=False)
    manifold = prc_features_to_metric(*rows, verbose=False)
    others = {
        "fid": distance["frechet_inception_distance"],
        "kid": clean_fid.kernel_distance(real, fake, num_subsets=1, max_subset_size=n),
        "precision": manifold["precision"],
        "recall": manifold["recall"],
    }
    assert_same(mine, others)
    kernel = kid_features_to_metric(*rows, kid_subsets=1, kid_subset_size=n, verbose=False)
    assert mine["kid"] == pytest.approx(kernel["kernel_inception_distance_mean"], rel=1e-4)
    if scipy.__version__ < "1.18":  # in a part of the dimensions: its root takes a minute in all
        part = [(s["mu"][:256], s["sigma"][:256, :256]) for s in statistics]
        moments = [torch.from_numpy(x.astype(np.float64)) for pair in part for x in pair]
        expected = clean_fid.frechet_distance(*part[0], *part[1])
        assert frechet(*moments) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("resize", "mode"), [(CLEAN, "clean"), (PYTORCH_FID, "legacy_pytorch")], ids=["clean", "torch"]
)
def test_pictures_are_resized_as_clean_fid_does(resize, mode):
    """To a hundredth of a level, from odd sizes too."""
    odd = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((299, 299), (17, 1030))]
    resizer = build_resizer(mode)
    for image in (*pictures(90, 3, (120, 120, 120)), *odd):
        their = torch.from_numpy(resizer(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
        scaled = (their - 128) / 128 if resize is CLEAN else 2 * their / 255 - 1
        torch.testing.assert_close(resize.feed(image[None])[0], scaled, rtol=0, atol=8e-5)


def test_pictures_are_resized_as_torch_fidelity_does():
    for image in pictures(12, 3, (120, 120, 120)):
        levels = theirs.interpolate_bilinear_2d_like_tensorflow1x(
            image[None].float(), (299, 299), align_corners=False
        )
        found = TENSORFLOW.feed(image[None])
        torch.testing.assert_close(found, (levels - 128) / 128, rtol=0, atol=1e-6)


def test_the_network_is_torch_fidelitys(weights, network):
    space = ours(weights, TENSORFLOW)
    images = torch.stack(pictures(12, 4, (120, 120, 120))[::3])
    rows, logits = network(images)
    assert rows.std(0).mean() > 0.1 * rows.mean()  # the features vary
    torch.testing.assert_close(space(images), rows, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(space.logits(rows), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "size"), [("5c", 9), ("6d", 7), ("7b", 5), ("7c", 5)])
def test_pooled_branches_pool_as_the_tensorflow_graph_does(name, size):
    torch.manual_seed(0)
    block = inception().eval().get_submodule(f"Mixed_{name}")
    x = torch.rand(1, block.branch_pool.conv.in_channels, size, size)
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=torch.nan), 3).unflatten(1, (-1, 9))
    kept = windows.nan_to_num(-1).amax(2) if name == "7c" else windows.nanmean(2)
    kept = kept.unflatten(2, (size, size))
    with torch.no_grad():
        output = block(x)
        branch = block.branch_pool.bn(block.branch_pool.conv(kept)).relu()
    torch.testing.assert_close(output[:, -branch.shape[1] :], branch, atol=1e-6, rtol=1e-5)


def test_the_file_is_of_the_published_format(weights):
    state = torch.load(Path(weights), weights_only=True)
    assert len(state) == 566  # as many tensors as the published file
    assert state["fc.weight"].shape == (1008, 2048)
    assert state["Mixed_7c.branch_pool.conv.weight"].shape == (192, 2048, 1, 1)
