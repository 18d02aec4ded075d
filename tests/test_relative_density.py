"""Relative density: its symmetries, what class frequency and shared labels may not do, and a second route."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from robustav.metrics.relative_density import balanced, relative_density, relative_density_strict


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def moved(x):
    turn = torch.linalg.qr(normal(x.shape[1], x.shape[1], seed=9)).Q
    return 3.7 * x @ turn + normal(x.shape[1], seed=8)


def test_unmoved_by_rotation_scale_and_shift():
    members, others = normal(80, 6), normal(90, 6, seed=1) + 0.5
    both = moved(torch.cat([members, others]))
    difference = relative_density(both[:80], both[80:]) - relative_density(members, others)
    assert difference.abs().max() < 1e-9


def test_is_the_log_ratio_of_kth_distances():
    members, others = normal(15, 3), normal(20, 3, seed=1)
    own = np.sort(cdist(members, members))[:, 4]  # the first is the row itself
    rest = np.sort(cdist(members, others))[:, 3]
    np.testing.assert_allclose(relative_density(members, others, k=4), np.log(rest / own), rtol=1e-9)


def test_sign_and_size():
    tight, loose = 0.01 * normal(50, 4), 100 * normal(50, 4)
    assert (relative_density(tight, normal(50, 4, seed=1) + 10) > math.log(100)).all()
    assert relative_density(tight, 0.01 * normal(49, 4, seed=1)).mean().abs() < 0.1
    # Members that each sit in a crowd of others: far from one another, near to those.
    crowds = (loose[:, None] + 0.01 * normal(50, 12, 4, seed=2)).flatten(0, 1)
    assert (relative_density(loose, crowds) < 0).all()


@pytest.mark.parametrize(("rare", "common"), [(50, 1000), (1000, 50)])
def test_class_frequency_does_not_leak_in(rare, common):
    """Class and rest from one distribution: 0 on average, however rare the class is."""
    of_class = torch.arange(rare + common) < rare
    means = []
    for seed in range(20):
        x, rows = normal(rare + common, 5, seed=seed), balanced(of_class, generator(seed))
        means.append(relative_density(x[rows.members], x[rows.others]).mean().item())
    assert abs(np.mean(means)) < 0.03
    # Without balancing the larger side looks closer, by log(1000 / 50) / 5.
    assert relative_density(x[of_class], x[~of_class]).mean().item() == pytest.approx(
        math.log(rare / common) / 5, abs=0.1
    )


@pytest.mark.parametrize(
    ("members", "others", "drawn"), [(5, 20, (5, 4)), (20, 5, (6, 5)), (5, 4, (5, 4)), (1, 3, (1, 0))]
)
def test_balanced_draws_equally_many_candidates(members, others, drawn):
    of_class = torch.arange(members + others) % (members + others) < members
    of_class = of_class[torch.randperm(len(of_class), generator=generator(3))]
    rows = balanced(of_class, generator())
    assert (len(rows.members), len(rows.others)) == drawn
    assert of_class[rows.members].all() and not of_class[rows.others].any()
    for side in rows:
        assert (side.diff() > 0).all()  # ascending, none twice


def test_balanced_draws_every_row_equally_often():
    of_class = torch.arange(12) < 4
    drawn = torch.cat([balanced(of_class, generator(seed)).others for seed in range(2000)])
    shares = torch.bincount(drawn, minlength=12)[4:] / 2000
    np.testing.assert_allclose(shares, 3 / 8, atol=0.05)


def test_balanced_depends_on_its_generator_alone():
    of_class = torch.arange(100) < 20
    state = torch.get_rng_state()
    first, same, other = (balanced(of_class, generator(seed)).others for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fill", [True, False])
def test_balanced_needs_both_kinds(fill):
    with pytest.raises(ValueError, match="`of_class` must have samples of the class and others, got"):
        balanced(torch.full((5,), fill), generator())


def test_copies_give_no_ratio():
    members, others = normal(20, 3), normal(20, 3, seed=1)
    members[1:4] = members[0]  # three copies each
    others[:3] = members[9]
    for rounding in (0, 1e-15):
        x, y = members + rounding * normal(20, 3, seed=2), others + rounding * normal(20, 3, seed=3)
        values = relative_density(x, y, k=3)
        assert values.isnan().nonzero().flatten().tolist() == [0, 1, 2, 3, 9]
        assert relative_density(x, y, k=4).isfinite().all()
    assert relative_density(torch.ones(5, 2), torch.ones(5, 2), k=3).isnan().all()


def test_neighbours_must_be_there():
    with pytest.raises(ValueError, match="`k` must be at most 4, the number of other `members`, got 5"):
        relative_density(normal(5, 2), normal(9, 2), k=5)
    with pytest.raises(ValueError, match="`k` must be at most 0, the number of other `members`, got 1"):
        relative_density(normal(1, 2), normal(9, 2), k=1)
    with pytest.raises(ValueError, match="`k` must be at most 3, the number of `others`, got 5"):
        relative_density(normal(9, 2), normal(3, 2), k=5)
    labels = torch.tensor([[True, False]] * 5 + [[False, True]] * 3)
    with pytest.raises(ValueError, match="`k` must be at most 2, the number of other members of class 1, got 3"):
        relative_density_strict(normal(8, 2), labels, 1, k=3, generator=generator())


def test_strict_equals_plain_when_no_label_is_shared_and_nothing_is_drawn():
    x = normal(31, 4)
    labels = torch.stack([torch.arange(31) < 16, torch.arange(31) >= 16], dim=1)  # 16 members, 15 others
    expected = relative_density(x[:16], x[16:], k=4)
    for seed in range(2):
        torch.testing.assert_close(relative_density_strict(x, labels, 0, k=4, generator=generator(seed)), expected)


def test_strict_by_a_loop_over_anchors():
    """Anchors meet from 15 to 38 others, and have 21 own candidates: each side is drawn for some of them."""
    x, seed, k = normal(60, 3), 5, 3
    labels = torch.rand(60, 4, generator=generator(1)) < 0.35
    order = torch.randperm(60, generator=generator(seed)).tolist()
    expected = []
    for anchor in labels[:, 2].nonzero().flatten().tolist():
        own = [j for j in order if labels[j, 2] and j != anchor]
        apart = [j for j in order if not (labels[j] & labels[anchor]).any()]
        count = min(len(own), len(apart))
        near = [sorted(math.dist(x[anchor], x[j]) for j in side[:count]) for side in (apart, own)]
        expected.append(math.log(near[0][k - 1] / near[1][k - 1]) if count >= k else math.nan)
    values = relative_density_strict(x, labels, 2, k=k, generator=generator(seed))
    np.testing.assert_allclose(values, expected, rtol=1e-9)


def test_strict_leaves_out_samples_that_share_another_label():
    """Class 0 always comes with a cloud of samples that share class 1 with half of it."""
    x = torch.cat([normal(40, 3), normal(40, 3, seed=1), normal(400, 3, seed=2) + 8])
    labels = torch.zeros(480, 2, dtype=torch.bool)
    labels[:40, 0] = labels[:80, 1] = True
    plain = relative_density(x[:40], x[40:79])
    strict = relative_density_strict(x, labels, 0, generator=generator())
    assert plain.mean().abs() < 0.15 and (strict > 1).all()


def test_strict_of_one_distribution_is_0_even_where_few_are_permitted():
    x = normal(900, 5)
    labels = torch.zeros(900, 2, dtype=torch.bool)
    labels[:300, 0] = True  # the class
    labels[:150, 1] = labels[340:, 1] = True  # half of it may be compared with 40 samples only, the rest with 600
    values = torch.stack([relative_density_strict(x, labels, 0, generator=generator(s)) for s in range(8)])
    np.testing.assert_allclose([values[:, :150].mean(), values[:, 150:].mean()], 0, atol=0.05)


def test_strict_is_nan_for_a_member_without_others():
    x = normal(30, 2)
    labels = torch.zeros(30, 2, dtype=torch.bool)
    labels[:10, 0] = True
    labels[3:, 1] = True  # shared with all but the first three members, which may meet the 20 others
    values = relative_density_strict(x, labels, 0, k=2, generator=generator())
    assert values.isnan().tolist() == [False] * 3 + [True] * 7
    assert relative_density_strict(x, labels | True, 0, k=2, generator=generator()).isnan().all()


def test_strict_is_unmoved_by_rotation_scale_and_shift_and_knows_copies():
    x = normal(60, 3)
    labels = torch.rand(60, 3, generator=generator(1)) < 0.3
    expected = relative_density_strict(x, labels, 0, k=3, generator=generator())
    values = relative_density_strict(moved(x), labels, 0, k=3, generator=generator())
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-9, equal_nan=True)
    same = x.clone()
    same[labels[:, 0]] = 0.1
    assert relative_density_strict(moved(same), labels, 0, k=3, generator=generator()).isnan().all()
