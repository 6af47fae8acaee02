"""Claims about what is kept of features: moments, cached rows, and intervals."""

import numpy as np
import pytest
import torch

from cascade.encoders.weights import fault
from cascade.errors import UserError
from cascade.eval.metrics import interval
from cascade.eval.metrics.distances import frechet, inception_score
from cascade.eval.metrics.kernels import cubic, kid
from cascade.eval.metrics.statistics import Moments, Origin, cached_rows, warnings_for

ORIGIN = Origin("a network, 01234567", "0123456789abcdef", "bilinear to 8 px", "fedcba98")


class Space:
    name, hash, dim, resize = ORIGIN.extractor, ORIGIN.hash, 4, ORIGIN.resize

    def __call__(self, pictures):
        return pictures.flatten(1)[:, :4]


def rows(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


def assert_equal(a, b):
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.cov, b.cov, rtol=1e-12, atol=1e-12)
    assert (a.n, a.origin) == (b.n, b.origin)


@pytest.mark.parametrize("sizes", [(50,), (1, 1, 48), (20, 30), (7, 40, 3)])
def test_moments_of_parts_add_up_to_those_of_the_whole(sizes):
    x = rows(50, 4, 0, shift=100.0)
    whole = Moments.of(x, ORIGIN)
    torch.testing.assert_close(whole.cov, x.T.cov(), rtol=1e-12, atol=1e-12)
    first, *others = (Moments.of(part, ORIGIN) for part in x[torch.randperm(50)].split(sizes))
    assert_equal(sum(others, first), whole)


def test_moments_are_of_finite_rows_of_one_origin():
    x = Moments.of(rows(9, 4, 0), ORIGIN)
    other = Moments.of(rows(9, 4, 0), Origin(*["other"] * 4))
    with pytest.raises(UserError, match="different origins"):
        x + other
    for bad in (torch.full((3, 4), torch.nan), torch.empty(0, 4)):
        with pytest.raises(UserError, match="no features, or not all are finite"):
            Moments.of(bad, ORIGIN)


def test_statistics_of_another_extractor_are_refused():
    x = Moments.of(rows(9, 4, 0), ORIGIN)
    assert x.check(Space()) == []
    for name, value in (("hash", "another"), ("resize", "nearest"), ("dim", 5)):
        space = Space()
        setattr(space, name, value)
        with pytest.raises(UserError, match="make them again with the same extractor"):
            x.check(space)
    for other in (Origin("b", "another", ORIGIN.resize), Origin("b", ORIGIN.hash, "nearest")):
        with pytest.raises(UserError, match="do not compare"):
            x.frechet(Moments.of(rows(9, 4, 1), other))
    with pytest.raises(UserError, match="do not compare"):
        x.frechet(Moments.of(rows(9, 5, 1), Origin()))
    set_apart = Moments.of(rows(9, 4, 1), Origin("renamed", ORIGIN.hash, ORIGIN.resize, "other"))
    assert x.frechet(set_apart) == frechet(x.mean, x.cov, set_apart.mean, set_apart.cov)


def test_moments_are_read_as_they_were_written(tmp_path):
    moments = Moments.of(rows(9, 4, 0), ORIGIN)
    moments.save(tmp_path / "stats.npz")
    assert_equal(Moments.load(tmp_path / "stats.npz"), moments)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.npz"]
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as file:  # as others read it
        np.testing.assert_array_equal(file["mu"], moments.mean)
        np.testing.assert_array_equal(file["sigma"], moments.cov)


def test_statistics_of_others_are_read_and_said_to_be_unknown(tmp_path):
    x = rows(9, 4, 0).numpy()
    np.savez(tmp_path / "a.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    np.savez_compressed(
        tmp_path / "b.npz", mu=x.mean(0, dtype=np.float32), sigma=np.cov(x.T, dtype=np.float32)
    )
    ours = Moments.of(torch.from_numpy(x), ORIGIN)
    for name, tolerance in (("a", 1e-12), ("b", 1e-6)):
        found = Moments.load(tmp_path / f"{name}.npz")
        assert found.n is None
        assert "unknown extractor" in found.check(Space())[0]
        torch.testing.assert_close(found.cov, ours.cov, rtol=tolerance, atol=tolerance)
        assert found.frechet(ours) == pytest.approx(0, abs=1e-6)
        with pytest.raises(UserError, match="unknown counts"):
            found + found


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"feats": np.eye(3)}, "no mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "are no moments"),
        ({"mu": np.zeros((3, 3)), "sigma": np.eye(3)}, "are no moments"),
        ({"mu": np.zeros(3), "sigma": np.eye(3, dtype=int)}, "are no moments"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0.0, 1.0]])}, "no covariance"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "no covariance"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "no covariance"),
        ({"mu": np.array([0, np.inf]), "sigma": np.eye(2)}, "no covariance"),
        ({"mu": np.array([print], dtype=object), "sigma": np.eye(1)}, "not a sound"),
    ],
)
def test_what_are_no_moments_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        Moments.load(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "an empty file"),
        (b"PK\x03\x04 half", "cut short"),
        (b"mu, sigma\n", "no file of arrays"),
        (b"\x93NUMPY", "a single NumPy array"),
    ],
)
def test_what_is_no_npz_is_refused_as_what_it_is(tmp_path, data, says):
    with pytest.raises(UserError, match="no statistics at"):
        Moments.load(tmp_path / "absent.npz")
    (tmp_path / "bad.npz").write_bytes(data)
    with pytest.raises(UserError, match=says):
        Moments.load(tmp_path / "bad.npz")


def test_only_the_statistics_of_adms_files_are_unpacked(tmp_path, monkeypatch):
    """A reference batch of guided-diffusion: 10,000 pictures, and mu, sigma, mu_s, sigma_s."""
    x, unpacked = rows(9, 4, 0).numpy(), []
    pictures = np.zeros((20, 8, 8, 3), np.uint8)
    own = {"mu": x.mean(0), "sigma": np.cov(x.T)}
    np.savez(tmp_path / "VIRTUAL.NPZ.npz", arr_0=pictures, **own, mu_s=x[0], sigma_s=np.eye(4))
    (tmp_path / "VIRTUAL.NPZ.npz").rename(tmp_path / "VIRTUAL.NPZ")
    get = np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(
        np.lib.npyio.NpzFile, "__getitem__", lambda file, k: unpacked.append(k) or get(file, k)
    )
    assert Moments.load(tmp_path / "VIRTUAL.NPZ").mean.tolist() == x.mean(0).tolist()
    assert sorted(unpacked) == ["mu", "sigma"]
    np.savez(tmp_path / "samples.npz", pictures, np.zeros(20, int))
    with pytest.raises(UserError, match="but arr_0, arr_1: if these are pictures"):
        Moments.load(tmp_path / "samples.npz")


def test_a_damaged_npz_is_refused(tmp_path):
    Moments.of(rows(9, 4, 0), ORIGIN).save(tmp_path / "stats.npz")
    data = bytearray((tmp_path / "stats.npz").read_bytes())
    data[150] ^= 1  # in mu: the checksum of the archive notices
    (tmp_path / "stats.npz").write_bytes(data)
    with pytest.raises(UserError, match="not a sound"):
        Moments.load(tmp_path / "stats.npz")


def test_an_archive_that_zipfile_cannot_read_is_refused(tmp_path):
    Moments.of(rows(9, 4, 0), ORIGIN).save(tmp_path / "stats.npz")
    torch.save({"w": torch.zeros(2)}, tmp_path / "w.pt")
    for name in ("stats.npz", "w.pt"):
        data = bytearray((tmp_path / name).read_bytes())
        data[data.index(b"PK\1\2") + 6] = 99  # the version that is needed to unpack it
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="cut short or damaged"):
        Moments.load(tmp_path / "stats.npz")
    assert "cut short or damaged" in fault(tmp_path / "w.pt")
    np.savez_compressed(tmp_path / "deflated.npz", mu=np.zeros(9), sigma=np.eye(9))
    data = bytearray((tmp_path / "deflated.npz").read_bytes())
    data[60:64] = b"\xff" * 4  # in the compressed bytes of mu
    (tmp_path / "deflated.npz").write_bytes(data)
    with pytest.raises(UserError, match="not a sound"):
        Moments.load(tmp_path / "deflated.npz")


@pytest.mark.parametrize("n", [[9], 9.0, np.int32(9)])
def test_a_number_of_pictures_is_read_in_any_form(tmp_path, n):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2), n=n)
    assert Moments.load(tmp_path / "a.npz").n == 9


@pytest.mark.parametrize("n", [[1, 2], "nine", np.nan, np.inf, 0, -9, 2.5, []])
def test_what_is_no_number_of_pictures_is_refused(tmp_path, n):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2), n=n)
    with pytest.raises(UserError, match="is no number of pictures"):
        Moments.load(tmp_path / "a.npz")


def test_few_pictures_are_warned_of():
    few, dimension = "fewer than 10,000 pictures", "fewer pictures than the feature dimension"
    assert warnings_for(10_000, 2048) == []
    assert warnings_for(9_999, 64) == [few]
    assert warnings_for(30, 64) == [few, dimension]
    assert warnings_for(20_000, 30_000) == [dimension]


def cached(folder, origin=ORIGIN, ids=range(5), dim=4, batches=None):
    x = rows(5, 4, 0).float()
    parts = x.split(2) if batches is None else batches
    return cached_rows(folder, origin, list(ids), dim, lambda: iter(parts))


def test_features_are_computed_once_for_a_protocol(tmp_path):
    x = cached(tmp_path)
    torch.testing.assert_close(x, rows(5, 4, 0).float(), rtol=0, atol=0)
    again = cached(tmp_path, batches=())  # which would be too few, were they asked for
    torch.testing.assert_close(again, x, rtol=0, atol=0)
    again += 1  # reaches no file
    torch.testing.assert_close(cached(tmp_path, batches=()), x, rtol=0, atol=0)
    for other in (Origin("b", *["c"] * 3), Origin(*["a"] * 3, "d")):
        with pytest.raises(UserError, match="0 of 5"):
            cached(tmp_path, origin=other, batches=())
    for ids in (range(1, 6), reversed(range(5))):
        with pytest.raises(UserError, match="0 of 5"):
            cached(tmp_path, ids=ids, batches=())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.zeros(4, 4)], "4 of 5"),
        ([torch.zeros(4, 4), torch.zeros(2, 4)], "or too many"),
        ([torch.full((5, 4), torch.inf)], "not finite"),
    ],
)
def test_other_than_one_finite_row_a_picture_is_refused_and_not_kept(tmp_path, batches, message):
    with pytest.raises(UserError, match=message):
        cached(tmp_path, batches=batches)
    assert not list(tmp_path.iterdir())


def test_damaged_features_are_refused(tmp_path):
    cached(tmp_path)
    (place,) = tmp_path.iterdir()
    for name in ("protocol.json", "features.npy"):
        whole = (place / name).read_bytes()
        (place / name).write_bytes(whole[:-9])
        with pytest.raises(UserError, match="remove it"):
            cached(tmp_path, batches=())
        (place / name).write_bytes(whole)
    assert len(cached(tmp_path, batches=())) == 5


def test_the_interval_of_a_share_is_wilsons():
    assert interval.of_share(0, 20) == pytest.approx((0, 0.16113), abs=1e-5)
    assert interval.of_share(0.9, 50) == pytest.approx((0.78640, 0.95652), abs=1e-5)


def coverage(trials, estimate, interval_of):
    """Share of independent sets whose interval holds the mean of the estimates of all."""
    sets = [rows(60, 3, 100 + i, shift=0.2) for i in range(trials)]
    middle = np.mean([estimate(x) for x in sets])
    ends = [interval_of(x) for x in sets]
    for (low, high), x in zip(ends, sets):
        assert low < estimate(x) < high
    return np.mean([low < middle < high for low, high in ends])


def test_intervals_hold_the_mean_of_estimates_nineteen_times_of_twenty():
    real = rows(500, 3, 0)
    mean, cov = real.mean(0), real.T.cov()
    assert coverage(200, lambda x: x[:, 0].mean().item(), lambda x: interval.of_mean(x[:, 0])) > 0.9
    found = coverage(
        60,
        lambda x: frechet(x.mean(0), x.T.cov(), mean, cov),
        lambda x: interval.of_frechet(x, mean, cov, draws=100),
    )
    assert found > 0.85
    found = coverage(
        60,
        lambda x: kid(x, real),
        lambda x: interval.of_kernel(cubic, x, real, unbiased=True, draws=100),
    )
    assert found > 0.85


def test_in_many_dimensions_an_interval_is_of_the_first_order_and_what_draws_come_to(monkeypatch):
    real, fake = rows(4000, 24, 0), 1.1 * rows(900, 24, 1, shift=0.1)
    mean, cov = real.mean(0), real.T.cov()
    drawn = interval.of_frechet(fake, mean, cov, draws=400)
    monkeypatch.setattr(interval, "LARGE", 23)
    first = interval.of_frechet(fake, mean, cov)
    assert first == interval.of_frechet(fake, mean, cov, seed=1)  # nothing is drawn
    assert np.subtract(*first) == pytest.approx(np.subtract(*drawn), rel=0.1)
    assert np.mean(first) == pytest.approx(frechet(fake.mean(0), fake.T.cov(), mean, cov))
    few = fake[:95]
    assert interval.of_frechet(few, mean, cov) != interval.of_frechet(few, mean, cov, seed=1)
    # Its derivative, by weights that move a little to one row.
    _, moved = interval._first_order(fake, mean, cov)

    def distance(row, share):
        weights = torch.full((900,), (1 - share) / 900, dtype=torch.float64)
        weights[row] += share
        middle = weights @ fake
        centred = fake - middle
        return frechet(middle, 900 / 899 * centred.T @ (weights[:, None] * centred), mean, cov)

    slopes = [(distance(i, 1e-6) - distance(i, -1e-6)) / 2e-6 for i in (0, 1, 2)]
    found = (moved[:3] - moved.mean()).tolist()
    assert np.diff(found).tolist() == pytest.approx(np.diff(slopes).tolist(), rel=2e-2)


def score_of(logits, splits=2):
    return inception_score([logits], logits.shape[1], splits)[0]


def test_the_interval_of_an_inception_score_is_of_scores_of_drawn_pictures(monkeypatch):
    found = coverage(
        100,
        lambda x: score_of(4 * x),
        lambda x: interval.of_inception_score(iter((4 * x).split(25)), len(x), splits=2, draws=100),
    )
    assert found > 0.85
    seen, logits = [], 4 * rows(12, 3, 0)
    monkeypatch.setattr(interval, "_percentiles", lambda *drawn: seen.append(drawn) or (0.0, 1.0))
    interval.of_inception_score([logits[:7], logits[7:]], 12, splits=3, draws=4)
    (estimate, drawn), repeated = seen[0], []
    for i in range(4):
        order = torch.arange(12)
        for split in range(3):
            drawn_rows = interval._counts(4, 4, split)[i]
            order[split::3] = torch.arange(split, 12, 3).repeat_interleave(drawn_rows)
        repeated.append(score_of(logits[order], splits=3))
    assert estimate == pytest.approx(score_of(logits, splits=3), rel=1e-12)
    assert drawn.tolist() == pytest.approx(repeated, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(40, 6), (6, 40), (30, 30)])
def test_draws_of_a_frechet_distance_are_distances_of_drawn_rows(monkeypatch, n, d):
    """Whether there are more rows than dimensions or fewer."""
    fake, real = rows(n, d, 1, shift=0.3), rows(50, d, 2)
    mean, cov = real.mean(0), real.T.cov()
    drawn = []

    def percentiles(estimate, found):
        drawn.extend([estimate, *found])
        return 0.0, 0.0

    monkeypatch.setattr(interval, "_percentiles", percentiles)
    interval.of_frechet(fake, mean, cov, draws=5, seed=3)
    counts = [torch.ones(n, dtype=torch.int64), *interval._counts(n, 5, 3)]
    for found, count in zip(drawn, counts, strict=True):
        x = fake.repeat_interleave(count, 0)
        assert float(found) == pytest.approx(frechet(x.mean(0), x.T.cov(), mean, cov), rel=1e-6)


def test_intervals_are_drawn_by_a_seed_and_shrink_with_the_number_of_pictures():
    real = rows(500, 3, 0)
    reference = real.mean(0), real.T.cov()
    few, many = (rows(n, 3, 1, shift=0.2) for n in (40, 640))
    low, high = interval.of_frechet(few, *reference)
    assert (low, high) == interval.of_frechet(few, *reference)
    assert (low, high) != interval.of_frechet(few, *reference, seed=1)
    narrow = interval.of_frechet(many, *reference)
    assert 2 < (high - low) / (narrow[1] - narrow[0]) < 8
