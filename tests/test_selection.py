"""Held-out selection: a real variant survives, the luckiest of many noise variants does not."""

import numpy as np
import pytest
from jaxtyping import TypeCheckError

from robustav.metrics.correlation import mean_of_models, spearman
from robustav.metrics.intervals import percentile_interval
from robustav.metrics.selection import held_out


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("models", [None, 2, 6])
def test_fifty_noise_variants_do_not_fool_it(models):
    axes = () if models is None else (models,)
    results = [
        held_out(noise(*axes, 50, 24, seed=run), noise(*axes, 24, seed=1000 + run), 20, seed=run) for run in range(8)
    ]
    assert min(result.in_sample for result in results) > {None: 0.4, 2: 0.25, 6: 0.12}[models]
    assert abs(np.mean([result.mean for result in results])) < 0.07


@pytest.mark.parametrize("models", [None, 2, 6])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_real_variant_is_chosen_and_keeps_its_strength(models, sign):
    axes = () if models is None else (models,)
    target = noise(*axes, 40, seed=1)
    variants = noise(*axes, 10, 40, seed=2)
    variants[..., 4, :] = sign * np.exp(target) + 0.1 * variants[..., 4, :]
    result = held_out(variants, target, 50, seed=0)
    np.testing.assert_array_equal(result.chosen, 50 * (np.arange(10) == 4))
    assert result.in_sample - 0.1 < result.mean <= result.in_sample + 0.1
    assert result.in_sample == pytest.approx(abs(np.mean(spearman(variants[..., 4, :], target))))
    assert result.interval == percentile_interval(result.values) and len(result.values) == 50
    assert result.classes == 40


def test_the_sign_is_that_of_the_choosing_half():
    """Rising over half of the classes, falling over the rest: whichever half chooses, the other mostly disagrees."""
    metric = np.arange(40.0)
    target = abs(metric - 19.5)
    result = held_out(metric[None], target, 60, seed=0)
    assert result.mean < -0.1
    np.testing.assert_allclose(held_out(-metric[None], target, 60, seed=0).values, result.values, atol=1e-12)


def test_four_models_are_halved_three_share_halves_of_the_classes():
    """Each model ranks the classes the same way by its own variant; no choice of models holds for the other models."""
    target = np.tile(np.arange(12.0), (4, 1))
    variants = noise(4, 4, 12) * 0.01
    variants[range(4), range(4)] += target
    assert held_out(variants, target, 30, seed=0).mean < 0.6
    result = held_out(variants[:3, :1], target[:3], 30, seed=0)
    # One variant, so all that differs between splits is the classes measured.
    everything = mean_of_models(spearman(variants[:3, 0], target[:3]))
    assert result.in_sample == pytest.approx(abs(everything))
    assert len(np.unique(result.values)) > 10
    assert len(np.unique(held_out(variants[:, :1], target, 30, seed=0).values.round(9))) <= 6


def test_variants_are_compared_on_the_classes_that_all_have():
    target = noise(30, seed=1)
    variants = noise(3, 30, seed=2)
    variants[0, :5], variants[1, 3:9], target[20] = np.nan, np.nan, np.nan
    shared = np.delete(np.arange(30), [*range(9), 20])
    result = held_out(variants, target, 20, seed=0)
    assert result.classes == len(shared) == 20
    expected = held_out(variants[:, shared], target[shared], 20, seed=0)
    np.testing.assert_allclose(result.in_sample, expected.in_sample)
    assert np.isfinite(result.values).all()


def test_a_variant_without_values_is_passed_over():
    target = noise(20, seed=1)
    variants = np.stack([np.full(20, np.nan), target, np.ones(20)])
    result = held_out(variants, target, 10, seed=0)
    np.testing.assert_array_equal(result.chosen, [0, 10, 0])
    assert result.mean == pytest.approx(1) and result.classes == 20
    nothing = held_out(variants[::2], target, 10, seed=0)
    assert np.isnan([nothing.mean, *nothing.interval, nothing.in_sample, *nothing.values]).all()
    assert nothing.chosen.sum() == 0


def test_depends_on_its_seed_alone_and_halves_need_three_classes():
    variants, target = noise(5, 20), noise(20, seed=1)
    first = held_out(variants, target, 10, seed=3)
    np.testing.assert_array_equal(held_out(variants, target, 10, seed=3).values, first.values)
    assert (held_out(variants, target, 10, seed=4).values != first.values).any()
    assert np.isnan(held_out(variants[:, :5], target[:5], 10, seed=0).mean)
    assert np.isfinite(held_out(variants[:, :6], target[:6], 10, seed=0).mean)


def test_errors_name_what_is_wrong():
    variants, target = noise(3, 4, 20), noise(3, 20)
    with pytest.raises((ValueError, TypeCheckError), match="variants"):
        held_out(variants[0, 0], target[0], seed=0)
    with pytest.raises(
        ValueError, match=r"`variants` must be \[\*model, variant, class\] and not empty, got \[0, 20\]"
    ):
        held_out(variants[0, :0], target[0], seed=0)
    with pytest.raises((ValueError, TypeCheckError), match="target"):
        held_out(variants, target[:, 1:], seed=0)
    with pytest.raises(ValueError, match="`splits` must be at least 1, got 0"):
        held_out(variants, target, 0, seed=0)
