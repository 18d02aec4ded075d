"""Densities: known distributions, SciPy's own routes, and what must not move them."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import mahalanobis, pdist
from sklearn.covariance import LedoitWolf

from robustav.metrics import density, latents
from robustav.metrics.density import (
    SharedGaussian,
    harmonic_mean,
    kde_log_density,
    knn_entropy,
    knn_entropy_terms,
    knn_log_density,
    local_dimension,
    negative_log_radius,
)
from robustav.metrics.neighbourhood import density_and_coverage
from robustav.metrics.relative_density import relative_density, relative_density_strict
from robustav.metrics.spaces import matched, principal, procrustes, raw, unit, whitened

PER_ROW = [knn_log_density, negative_log_radius, knn_entropy_terms, local_dimension, kde_log_density]
LABELS = torch.arange(40)[:, None] % 3 == torch.arange(3)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(dim, seed=1):
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


def fitted(x):
    """The Gaussian's densities as a function of latents alone."""
    return SharedGaussian.fit(x, LABELS[: len(x)]).apply(x)


def strict(x):
    return relative_density_strict(x, LABELS[: len(x)], 0, generator=torch.Generator().manual_seed(0))


EVERY = [  # every metric as a function of one set of latents, at least 31 rows
    *PER_ROW,
    knn_entropy,
    fitted,
    strict,
    lambda x: relative_density(x[:15], x[15:]),
    lambda x: relative_density(x[15:], x[:15]),
    lambda x: density_and_coverage(x[:20], x[20:]).density,
    lambda x: density_and_coverage(x[20:], x[:20]).density,
    raw,
    unit,
    whitened,
    lambda x: principal(x, 2),
    lambda x: matched(x, 2),
    lambda x: procrustes(x, x.flip(1)).source,
    lambda x: procrustes(x.flip(1), x).source,
]


@pytest.mark.parametrize("k", [3, 10])
@pytest.mark.parametrize("dim", [2, 5, 10])
def test_entropy_of_a_normal_distribution_is_known(dim, k):
    exact = dim / 2 * math.log(2 * math.pi * math.e)
    assert knn_entropy(normal(5000, dim), k).item() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("dim", [2, 5, 10])
def test_local_dimension_of_a_plane_is_its_own(dim):
    plane = normal(5000, dim) @ rotation(50)[:dim]
    values = local_dimension(plane, k=10)
    assert harmonic_mean(values).item() == pytest.approx(dim, rel=0.08)
    # The pilot's values, on another draw: dividing by k - 1 is what gives both of its means.
    pilot = {2: (2.02, 2.26), 5: (4.96, 5.62), 10: (9.46, 10.64)}[dim]
    np.testing.assert_allclose([harmonic_mean(values), values.mean()], pilot, rtol=0.025)


def test_density_of_a_uniform_cube_is_known():
    cube = 2 * torch.rand(6000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = knn_log_density(cube, k=50)
    inside = ((cube > 0.5) & (cube < 1.5)).all(dim=1)
    assert values[inside].exp().mean().item() == pytest.approx(1 / 8, rel=0.03)
    assert values[~inside].mean() < values[inside].mean()  # half of a ball at a wall is empty


def test_log_density_follows_the_density_of_a_normal_distribution():
    x = normal(3000, 2)
    true = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)).log_prob(x)
    assert scipy.stats.spearmanr(knn_log_density(x, k=30), true).statistic > 0.94
    assert scipy.stats.spearmanr(kde_log_density(x), true).statistic > 0.97


def test_entropy_is_minus_the_mean_log_density_up_to_the_bias_of_the_logarithm():
    x, k = normal(100, 4), 7
    bias = float(scipy.special.digamma(100) - scipy.special.digamma(k)) - math.log(100 / k)
    assert knn_entropy(x, k).item() == pytest.approx(bias - knn_log_density(x, k).mean().item())


@pytest.mark.parametrize("metric", PER_ROW)
def test_scale_shift_rotation_and_order(metric):
    x = normal(60, 4)
    moved = 3 * x @ rotation(4) + 5
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    added = {
        knn_log_density: -4,
        negative_log_radius: -1,
        knn_entropy_terms: 4,
        local_dimension: 0,
        kde_log_density: -4,
    }
    torch.testing.assert_close(metric(moved), metric(x) + added[metric] * math.log(3), rtol=0, atol=1e-9)
    torch.testing.assert_close(metric(x[order]), metric(x)[order], rtol=0, atol=1e-12)


def test_a_dimension_of_ones_own_replaces_that_of_the_latents():
    x = normal(50, 3)
    flat = torch.cat([x, torch.zeros(50, 200)], dim=1)
    torch.testing.assert_close(knn_log_density(flat, dim=3), knn_log_density(x))
    torch.testing.assert_close(knn_log_density(x, dim=2.5).diff(), 2.5 * negative_log_radius(x).diff())
    assert knn_log_density(x, dim=math.nan).isnan().all() and knn_log_density(x, dim=math.inf).isnan().all()
    for dim in (0, -1.0):
        with pytest.raises(ValueError, match="`dim` must be a positive number of dimensions, got"):
            knn_log_density(x, dim=dim)


def with_copies():
    """40 rows, of which the first four are one point, once exactly and once but for the last bits of a number."""
    x = normal(40, 3)
    x[1:4] = x[0]
    rounded = x.clone()
    rounded[1:4] += 1e-15 * normal(3, 3, seed=1)
    return x, rounded


@pytest.mark.parametrize("metric", [knn_log_density, negative_log_radius, knn_entropy_terms])
def test_rows_with_k_copies_have_no_density(metric):
    for x in with_copies():
        assert metric(x, k=3).isnan().tolist() == [True] * 4 + [False] * 36
        assert metric(x, k=4).isfinite().all()


def test_entropy_is_that_of_the_rows_without_k_copies():
    x, _ = with_copies()
    assert knn_entropy(x, k=3) == knn_entropy_terms(x, k=3)[4:].mean()
    assert knn_entropy(torch.ones(10, 2), k=3).isnan()


def test_duplicating_every_row_halves_no_radius():
    x = normal(30, 3)
    twice = x.repeat(2, 1)
    torch.testing.assert_close(negative_log_radius(twice, k=3)[:30], negative_log_radius(x, k=1))
    assert negative_log_radius(twice, k=1).isnan().all()


def test_local_dimension_drops_copies():
    for x in with_copies():
        torch.testing.assert_close(local_dimension(x, k=8)[3], local_dimension(x[3:], k=5)[0])
        # Copies among the neighbours of other rows are at no zero distance, and stay.
        assert local_dimension(x, k=8).isfinite().all()
        assert local_dimension(x, k=4)[:4].isnan().all()  # one radius is left: no ratio
    assert local_dimension(torch.ones(5, 2), k=3).isnan().all()


def test_local_dimension_by_hand():
    line = torch.tensor([[0.0], [1.0], [-2.0], [4.0]])
    assert local_dimension(line, k=3)[0].item() == pytest.approx(2 / (math.log(4) + math.log(2)))
    corners = torch.eye(4)
    assert (local_dimension(corners, k=3) == torch.inf).all()
    assert harmonic_mean(local_dimension(corners, k=3)) == torch.inf


def test_harmonic_mean():
    assert harmonic_mean(torch.tensor([2.0, torch.inf])).item() == 4
    assert harmonic_mean(torch.tensor([torch.nan])).isnan()
    values = normal(20).abs()
    assert harmonic_mean(values).item() == pytest.approx(scipy.stats.hmean(values.numpy()))
    with pytest.raises(ValueError, match="`values` must be positive, got 0"):
        harmonic_mean(torch.tensor([1.0, 0.0]))


def labelled(samples=60, dim=4, classes=3, seed=0):
    labels = torch.rand(samples, classes, generator=torch.Generator().manual_seed(seed)) < 0.4
    return normal(samples, dim, seed=seed) @ normal(dim, dim, seed=7) + labels.double() @ normal(
        classes, dim, seed=8
    ), labels


def test_gaussian_equals_mahalanobis_with_the_shrunk_covariance():
    x, labels = labelled()
    gaussian = SharedGaussian.fit(x, labels)
    means = [x[labels[:, c]].mean(dim=0).numpy() for c in range(3)]
    residuals = np.concatenate([x[labels[:, c]].numpy() - means[c] for c in range(3)])  # several labels: several rows
    shrunk = LedoitWolf(assume_centered=True).fit(residuals)
    assert gaussian.shrinkage == pytest.approx(shrunk.shrinkage_)
    inverse = np.linalg.inv(shrunk.covariance_)
    fresh = normal(5, 4, seed=9)
    expected = [[-(mahalanobis(row, mean, inverse) ** 2) / 2 for mean in means] for row in fresh.numpy()]
    np.testing.assert_allclose(gaussian.apply(fresh), expected, rtol=1e-9)


def test_gaussian_ignores_shift_rotation_and_scale_and_keeps_order():
    x, labels = labelled()
    expected = SharedGaussian.fit(x, labels).apply(x)
    moved = 3 * x @ rotation(4) + 5
    torch.testing.assert_close(SharedGaussian.fit(moved, labels).apply(moved), expected, rtol=1e-9, atol=1e-9)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(SharedGaussian.fit(x[order], labels[order]).apply(x), expected)


def test_gaussian_of_empty_and_single_classes():
    x, labels = labelled()
    single = torch.arange(60) == 3
    labels = torch.stack([labels[:, 0], torch.zeros(60, dtype=torch.bool), single], dim=1)
    values = SharedGaussian.fit(x, labels).apply(x)
    assert values[:, 1].isnan().all() and values[:, [0, 2]].isfinite().all()
    assert -1e-20 < values[3, 2] <= 0 and (values[single.logical_not(), 2] < -1e-3).all()
    wide = normal(12, 200)  # fewer samples than dims
    assert SharedGaussian.fit(wide, torch.ones(12, 1, dtype=torch.bool)).apply(wide).isfinite().all()


def test_gaussian_refuses_latents_that_do_not_vary():
    labels = torch.eye(5, dtype=torch.bool)
    for x, marks in [
        (normal(5, 3), labels),
        (0.1 + 1e-17 * normal(5, 3), labels[:, :1] | True),
        (1 + 1e-15 * normal(5, 3), labels[:, :1] | True),
        (normal(5, 3), labels & False),
    ]:
        with pytest.raises(ValueError, match="must vary within at least one class of `labels`"):
            SharedGaussian.fit(x, marks)
    with pytest.raises(ValueError, match="too few or too flat to give 2 dims a covariance"):
        SharedGaussian.fit(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.ones(2, 1, dtype=torch.bool))


def median_distance(x):
    """The lower one where two are in the middle."""
    return np.quantile(pdist(x.numpy()), 0.5, method="lower")


def test_kernel_density_equals_scipy_leaving_one_out():
    x = normal(25, 1)
    width, values = median_distance(x), []
    for i in range(25):
        rest = np.delete(x.numpy(), i, axis=0)
        values.append(scipy.stats.gaussian_kde(rest.T, bw_method=width / rest.std(ddof=1))(x[i].numpy()).item())
    np.testing.assert_allclose(kde_log_density(x).exp(), values, rtol=1e-9)


def test_kernel_density_in_several_dimensions():
    x = normal(21, 3)
    width = median_distance(x)
    others = [np.delete(x.numpy(), i, axis=0) for i in range(21)]
    expected = [
        scipy.stats.multivariate_normal(row, width**2 * np.eye(3)).pdf(rest).mean()
        for row, rest in zip(x.numpy(), others, strict=True)
    ]
    np.testing.assert_allclose(kde_log_density(x).exp(), expected, rtol=1e-9)


def test_kernel_density_sees_the_first_principal_axes_alone():
    x = normal(50, 3) * torch.tensor([3.0, 2.0, 1.0])
    embedded = x @ rotation(30)[:3] + 4
    torch.testing.assert_close(kde_log_density(embedded, dims=3), kde_log_density(x))
    torch.testing.assert_close(kde_log_density(embedded, dims=2), kde_log_density(principal(x, 2)))
    assert kde_log_density(normal(5, 100)).isfinite().all()  # fewer rows than `dims`


def test_kernel_density_of_copies():
    copies = torch.full((30, 40), 0.1)
    copies[0] = 5.0
    assert kde_log_density(copies).isnan().all()
    assert kde_log_density(copies[:, :3]).isnan().all()
    assert kde_log_density(copies + 1e-15 * normal(30, 40)).isnan().all()
    assert kde_log_density(with_copies()[0]).isfinite().all()
    far = torch.cat([normal(30, 2), torch.tensor([[1e6, 0.0]])])
    assert kde_log_density(far).isfinite().all()  # its kernels underflow, their logarithm does not


def test_kernel_density_of_many_rows_uses_the_bandwidth_of_some(monkeypatch):
    x = normal(1500, 2)
    expected = kde_log_density(x)
    monkeypatch.setattr(density, "MEDIAN_ROWS", 300)
    torch.testing.assert_close(kde_log_density(x), expected, rtol=0, atol=0.05)


def test_kernel_density_errors():
    with pytest.raises(ValueError, match="`members` must have at least 2 rows, got 1"):
        kde_log_density(torch.ones(1, 3))
    with pytest.raises(ValueError, match="`dims` must be at least 1, got 0"):
        kde_log_density(normal(5, 3), dims=0)


@pytest.mark.parametrize("metric", EVERY)
def test_every_metric_refuses_what_is_not_finite(metric):
    for broken in (math.nan, math.inf):
        for row in (7, 33):
            x = normal(40, 3)
            x[row, 1] = broken
            with pytest.raises(ValueError, match=rf"` must be finite, got {broken} first at sample \d+, dim [01]"):
                metric(x)


@pytest.mark.parametrize("metric", EVERY)
def test_every_metric_is_pure_and_takes_any_float(metric):
    x = normal(40, 3).half()
    state, before = torch.get_rng_state(), x.clone()
    value = metric(x.requires_grad_())
    assert value.dtype == torch.float64 and not value.requires_grad
    torch.testing.assert_close(metric(x.double()), value, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x.detach(), before, rtol=0, atol=0)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


@pytest.mark.parametrize("metric", EVERY)
def test_many_rows_are_taken_in_single_precision(metric, monkeypatch):
    x = normal(40, 3)
    expected = metric(x)
    monkeypatch.setattr(latents, "FLOAT64_ROWS", 18)  # of two sets, one is below and one above
    assert latents.checked(x).dtype == torch.float32 and latents.checked(x[:18]).dtype == torch.float64
    torch.testing.assert_close(metric(x).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("metric", EVERY)
def test_memory_limit_does_not_change_results(metric, monkeypatch):
    x = normal(40, 3)
    expected = metric(x)
    monkeypatch.setattr(latents, "CHUNK_BYTES", 4000)
    torch.testing.assert_close(metric(x), expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(latents, "CHUNK_BYTES", 1)
    torch.testing.assert_close(metric(x), expected, rtol=1e-12, atol=1e-12)


def test_blocks_cover_the_rows_in_the_memory_given():
    rows = [list(range(100))[block] for block in latents.blocks(100, latents.CHUNK_BYTES // 7)]
    assert [len(block) for block in rows] == [7] * 14 + [2] and np.concatenate(rows).tolist() == list(range(100))
    assert [len(range(100)[block]) for block in latents.blocks(2, 10 * latents.CHUNK_BYTES)] == [1, 1]


def test_first_broken_row_is_named():
    x = normal(10, 3)
    x[4, 2] = x[4, 0] = x[8, 1] = math.nan
    with pytest.raises(ValueError, match=r"got nan first at sample 4, dim 0 \(2 of 10 samples concerned\)"):
        knn_entropy(x, k=3)


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 0), (2, 2, 2)])
def test_latents_must_be_a_matrix(shape):
    with pytest.raises(ValueError, match=r"`members` must be \[sample, dim\] with at least one of each, got \["):
        latents.checked(torch.zeros(shape), "members")


@pytest.mark.parametrize(
    "metric", [knn_log_density, negative_log_radius, knn_entropy_terms, knn_entropy, local_dimension]
)
def test_neighbours_must_be_there(metric):
    with pytest.raises(ValueError, match="`k` must be at most 4, the number of other rows, got 5: lower it"):
        metric(normal(5, 2), k=5)
    with pytest.raises(ValueError, match="`k` must be at most 0, the number of other rows, got 2"):
        metric(normal(1, 2), k=2)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        metric(normal(5, 2), k=0)
    metric(normal(5, 2), k=4)


def test_one_radius_gives_no_dimension():
    with pytest.raises(ValueError, match="`k` must be at least 2, got 1: one radius has no ratio"):
        local_dimension(normal(5, 2), k=1)
