"""Spaces: what each transformation makes true of latents, and that alignment finds a planted rotation."""

import pytest
import scipy.linalg
import torch

from robustav.metrics.neighbours import nearest_within
from robustav.metrics.relative_density import relative_density
from robustav.metrics.spaces import SPACES, matched, principal, procrustes, unit, whitened


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(dim, seed=1):
    return torch.linalg.qr(normal(dim, dim, seed=seed)).Q


def with_variances(*variances, samples=200):
    """Latents whose axes hold exactly these variances."""
    axes = torch.linalg.qr(normal(samples, len(variances)) - normal(samples, len(variances)).mean(dim=0)).Q
    return axes * (torch.tensor(variances, dtype=torch.float64) * samples).sqrt()


@pytest.mark.parametrize("name", SPACES)
def test_distances_in_every_space_ignore_rotation(name):
    x = normal(50, 6) * torch.arange(1, 7)
    transform = SPACES[name].transform
    torch.testing.assert_close(torch.pdist(transform(x @ rotation(6))), torch.pdist(transform(x)))
    assert SPACES[name].words


@pytest.mark.parametrize("name", SPACES)
def test_a_reference_fixes_the_space(name):
    """Other rows in the batch move nothing, once the space is that of a reference."""
    transform, clean, attacked = SPACES[name].transform, normal(50, 6), normal(20, 6, seed=1) + 3
    torch.testing.assert_close(transform(clean, clean), transform(clean))
    torch.testing.assert_close(transform(attacked, clean)[:5], transform(attacked[:5], clean))


def test_unit_rows():
    x = normal(20, 5)
    rows = unit(x)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(20, dtype=torch.float64))
    cosine = torch.nn.functional.cosine_similarity(x[0], x[1], dim=0)
    assert (rows[0] - rows[1]).square().sum().item() == pytest.approx(2 - 2 * cosine.item())
    torch.testing.assert_close(unit(1e-200 * x), rows)
    x[[7, 9]] = 0
    with pytest.raises(ValueError, match=r"have a direction, but sample 7 is all zeros \(2 of 20 samples concerned\)"):
        unit(x)


def test_whitened_axes_have_no_covariance_and_variance_1():
    x = normal(300, 5) @ normal(5, 5, seed=2) + 4
    z = whitened(x)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(z.shape[1], dtype=torch.float64), atol=1e-9, rtol=0)
    covariance = z.T @ z / 300
    torch.testing.assert_close(covariance, torch.eye(z.shape[1], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("variances", "kept"),
    [((10.0, 9.1, 0.9), 2), ((10.0, 8.9, 1.1), 3), ((1.0, 0.0, 0.0), 1), ((1.0,) * 10, 10), ((0.94, 0.06), 2)],
)
def test_whitening_keeps_the_fewest_axes_with_95_percent(variances, kept):
    x = with_variances(*variances) @ rotation(len(variances))
    assert whitened(x).shape == (200, kept)


def test_whitening_undoes_any_linear_map_that_loses_no_axis():
    x = with_variances(1.0, 1.0, 1.0)
    stretched = x @ torch.diag(torch.tensor([1.0, 1.3, 0.8], dtype=torch.float64)) @ rotation(3)
    torch.testing.assert_close(torch.pdist(whitened(stretched)), torch.pdist(x))


def test_constant_latents_have_no_axes():
    for latents, reference, name in [
        (torch.full((9, 3), 0.1), None, "latents"),
        (5 + 1e-15 * normal(9, 3), None, "latents"),
        (normal(9, 3), torch.ones(4, 3), "reference"),
    ]:
        with pytest.raises(ValueError, match=f"`{name}` must vary, but all . samples are equal"):
            whitened(latents, reference)


def test_principal_axes_hold_the_most_variance():
    x = with_variances(1.0, 9.0, 4.0) @ rotation(3)
    z = principal(x, 2)
    torch.testing.assert_close(z.var(dim=0, correction=0), torch.tensor([9.0, 4.0], dtype=torch.float64))
    torch.testing.assert_close(torch.pdist(principal(x, 3)), torch.pdist(x))
    assert not principal(torch.ones(5, 4), 2).any()
    torch.testing.assert_close(principal(x[:5], 2, reference=x), z[:5])


@pytest.mark.parametrize("dim", [0, 4])
def test_principal_axes_must_be_there(dim):
    for x in (normal(4, 10), normal(10, 3)):
        with pytest.raises(ValueError, match=rf"`dim` must be at least 1 and at most 3, .* span, got {dim}"):
            principal(x, dim)


def test_matched_latents_have_one_dim_and_one_scale():
    small, large = normal(100, 8), 50 * normal(100, 30, seed=1) + 7
    for x in (small, large):
        z = matched(x, 5)
        assert z.shape == (100, 5)
        assert nearest_within(z, 1).distances.mean().item() == pytest.approx(1)
    torch.testing.assert_close(torch.pdist(matched(3 * small @ rotation(8) - 2, 5)), torch.pdist(matched(small, 5)))
    z = principal(small, 5)
    scaled = matched(small, 5)
    torch.testing.assert_close(relative_density(scaled[:40], scaled[40:]), relative_density(z[:40], z[40:]))


def test_copies_alone_have_no_scale():
    for rounding in (0, 1e-15):
        with pytest.raises(ValueError, match="must hold samples that are not copies of one another"):
            matched(normal(6, 4).repeat(2, 1) + rounding * normal(12, 4, seed=1), 2)


def test_procrustes_finds_a_rotation_reflection_scale_and_shift():
    x = normal(40, 5)
    mirror = rotation(5) @ torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    for turn in (rotation(5), mirror):
        source, target = procrustes(x, 3 * x @ turn + 2)
        torch.testing.assert_close(source, target)
        torch.testing.assert_close(source.mean(dim=0), torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)
        assert source.square().mean().item() == pytest.approx(1)


def test_procrustes_equals_scipy_and_keeps_shape():
    x, y = normal(40, 5), normal(40, 5, seed=1)
    source, target = procrustes(x, y)
    turn, _ = scipy.linalg.orthogonal_procrustes((x - x.mean(0)).numpy(), (y - y.mean(0)).numpy())
    centred = x - x.mean(dim=0)
    expected = centred @ torch.from_numpy(turn) / centred.square().mean().sqrt()
    torch.testing.assert_close(source, expected)
    # Distances within each set change by one factor: nothing was stretched along an axis.
    for before, after in ((x, source), (y, target)):
        ratio = torch.pdist(after) / torch.pdist(before)
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_procrustes_errors():
    with pytest.raises(ValueError, match=r"must have one shape, .* got \[4, 2\] and \[4, 3\]"):
        procrustes(normal(4, 2), normal(4, 3))
    with pytest.raises(ValueError, match="`target` must vary, but all 4 samples are equal"):
        procrustes(normal(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="`source` must be finite"):
        procrustes(normal(4, 2) / 0, normal(4, 2))
