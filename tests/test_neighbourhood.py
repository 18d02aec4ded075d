"""Neighbourhoods: blobs and shuffled labels, rings and hubs, and sets from one distribution."""

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.spatial.distance import cdist

from robustav.metrics.neighbourhood import class_purity, density_and_coverage, hubness, jaccard_purity
from robustav.metrics.neighbours import nearest_within


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blobs(samples=90, classes=3):
    label = torch.arange(samples) % classes
    return normal(samples, 4) + 100 * label[:, None], label[:, None] == torch.arange(classes)


def test_separate_blobs_are_pure():
    x, labels = blobs()
    indices = nearest_within(x, 10).indices
    assert (jaccard_purity(labels, indices) == 1).all()
    purity = class_purity(labels, indices)
    assert (purity.shares[labels] == 1).all() and purity.shares[~labels].isnan().all()
    torch.testing.assert_close(purity.base_rates, torch.full((3,), 29 / 89, dtype=torch.float64))


def test_shuffled_labels_give_the_base_rate():
    x = normal(2000, 3)
    labels = torch.rand(2000, 3, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.05, 0.3, 0.8])
    indices = nearest_within(x, 10).indices
    purity = class_purity(labels, indices)
    np.testing.assert_allclose(purity.shares.nanmean(dim=0), purity.base_rates, atol=0.02)
    one_hot = torch.randint(4, (2000, 1), generator=torch.Generator().manual_seed(2)) == torch.arange(4)
    assert jaccard_purity(one_hot, indices).mean().item() == pytest.approx(1 / 4, abs=0.02)


def test_base_rate_is_the_exact_chance_of_another_sample():
    """With all others as neighbours, every member of a class sees its base rate."""
    _, labels = blobs(10)
    indices = torch.stack([torch.cat([torch.arange(i), torch.arange(i + 1, 10)]) for i in range(10)])
    purity = class_purity(labels, indices)
    torch.testing.assert_close(purity.shares.nanmean(dim=0), purity.base_rates)


def test_overlap_of_label_sets_by_hand():
    labels = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
    indices = torch.tensor([[1, 3], [2, 3], [0, 3], [0, 1]])
    expected = [(1 / 3 + 2 / 3) / 2, (0 + 2 / 3) / 2, np.nan, 2 / 3]
    np.testing.assert_allclose(jaccard_purity(labels, indices), expected)
    shares = class_purity(labels, indices).shares
    np.testing.assert_allclose(shares, [[0.5, 1, np.nan], [np.nan, 0.5, 0.5], [np.nan] * 3, [0.5, 1, 0.5]])


def test_classes_without_samples_and_with_one():
    labels = torch.zeros(5, 2, dtype=torch.bool)
    labels[2, 1] = True
    purity = class_purity(labels, nearest_within(normal(5, 2), 3).indices)
    np.testing.assert_array_equal(purity.base_rates, [np.nan, 0])
    assert purity.shares[2, 1] == 0 and purity.shares.isnan().sum() == 9


def test_purities_follow_the_order_of_the_rows():
    x = normal(50, 3)
    labels = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) < 0.4
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    whole, mixed = (nearest_within(z, 5).indices for z in (x, x[order]))
    torch.testing.assert_close(
        jaccard_purity(labels[order], mixed), jaccard_purity(labels, whole)[order], equal_nan=True
    )
    assert hubness(mixed, 50).item() == pytest.approx(hubness(whole, 50).item())


def test_a_ring_has_no_hub():
    angle = torch.arange(100, dtype=torch.float64) * 2 * torch.pi / 100
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert hubness(nearest_within(ring, 4).indices, 100) == 0


def test_a_planted_hub_is_found():
    rays = torch.linalg.qr(normal(60, 60)).Q  # all at one distance from the origin, and farther from one another
    hub = torch.cat([rays, torch.zeros(1, 60, dtype=torch.float64)])
    assert hubness(nearest_within(hub, 1).indices, 61) > 7
    flat, deep = (hubness(nearest_within(normal(1000, dim), 10).indices, 1000) for dim in (2, 100))
    assert flat.abs() < 0.5 and deep > 2  # as dimension grows hubs appear by themselves


def test_hubness_is_the_skewness_of_the_counts():
    indices = torch.randint(30, (40, 5), generator=torch.Generator().manual_seed(0))
    counts = np.bincount(indices.numpy().ravel(), minlength=35)
    assert hubness(indices, 35).item() == pytest.approx(scipy.stats.skew(counts))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_one_distribution_has_density_1_and_known_coverage(k):
    terms = density_and_coverage(normal(3000, 4), normal(3000, 4, seed=1), k)
    assert terms.density.mean().item() == pytest.approx(1, abs=0.05)
    assert terms.covered.double().mean().item() == pytest.approx(1 - 2**-k, abs=0.05)


def test_a_set_in_itself_has_density_1_and_full_coverage():
    """A ball ends at a row of the set: rounding must not decide on which side that row is."""
    x = normal(200, 30)
    for same in (x.clone(), x + 1e-15 * normal(200, 30, seed=1)):
        terms = density_and_coverage(x, same)
        assert terms.covered.all()
        assert terms.density.mean().item() == pytest.approx(1, abs=1e-12)
    tied = torch.eye(20)  # every other row is at the edge of the ball, and outside it
    assert (density_and_coverage(tied, tied + 1e-15 * normal(20, 20)).density == 1 / 5).all()


def test_density_and_coverage_by_a_loop():
    real, other = normal(30, 3), normal(20, 3, seed=1)
    radii = np.sort(cdist(real, real))[:, 4]
    inside = cdist(other, real) < radii
    terms = density_and_coverage(real, other, k=4)
    np.testing.assert_allclose(terms.density, inside.sum(axis=1) / 4)
    np.testing.assert_array_equal(terms.covered, inside.any(axis=0))


def test_density_and_coverage_ignore_shift_rotation_and_scale():
    real, other = normal(100, 6), normal(80, 6, seed=1)
    turn = torch.linalg.qr(normal(6, 6, seed=2)).Q
    expected, moved = density_and_coverage(real, other), density_and_coverage(3 * real @ turn + 1, 3 * other @ turn + 1)
    assert torch.equal(moved.density, expected.density) and torch.equal(moved.covered, expected.covered)


def test_sets_apart_and_within_a_part():
    real = normal(500, 3)
    far = density_and_coverage(real, normal(100, 3) + 50)
    assert not far.density.any() and not far.covered.any()
    centre = density_and_coverage(real, 0.1 * normal(500, 3, seed=1))
    assert centre.density.mean() > 1.2 and centre.covered.double().mean() < 0.4


def test_copies_have_an_empty_ball():
    real = torch.cat([torch.ones(6, 2), normal(20, 2).float() + 9])
    terms = density_and_coverage(real, torch.ones(4, 2), k=5)
    assert not terms.covered[:6].any() and not terms.density.any()


def test_errors():
    with pytest.raises(ValueError, match="`k` must be at most 2, the number of other rows of `real`, got 5"):
        density_and_coverage(normal(3, 2), normal(9, 2))
    with pytest.raises(ValueError, match="`other` must be finite"):
        density_and_coverage(normal(9, 2), normal(9, 2) / 0)
    _, labels = blobs(6)
    for call in (lambda i: jaccard_purity(labels, i), lambda i: class_purity(labels, i), lambda i: hubness(i, 6)):
        for wrong in (6, -1):
            with pytest.raises(ValueError, match=r"`indices` must lie in \[0, 6\), the rows of 6 samples, got"):
                call(torch.full((6, 2), wrong))
        with pytest.raises(
            ValueError, match=r"`indices` must be \[sample, k\] with at least one of each, got \[6, 0\]"
        ):
            call(torch.zeros(6, 0, dtype=torch.long))
