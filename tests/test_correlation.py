"""Rank correlations: equal to SciPy and to other routes, blind to monotone transformations, honest about controls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, rankdata, spearmanr

from robustav.metrics.correlation import (
    check_pairs,
    kendall,
    mean_of_models,
    partial_spearman,
    ranks,
    spearman,
)


def related(pairs=30, controls=2, decimals=None, seed=0):
    generator = np.random.default_rng(seed)
    known = generator.normal(size=(pairs, controls))
    x, y = (known.sum(axis=1) + generator.normal(size=pairs) for _ in range(2))
    return tuple(values if decimals is None else values.round(decimals) for values in (x, y, known))


def by_inverse(x, y, controls):
    """Partial correlation by another route: the inverse of the correlation matrix of the ranks."""
    precision = np.linalg.inv(np.corrcoef(rankdata(np.column_stack([x, y, controls]), axis=0), rowvar=False))
    return -precision[0, 1] / np.sqrt(precision[0, 0] * precision[1, 1])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), decimals=st.sampled_from([None, 1, 0]), pairs=st.integers(5, 40))
def test_equals_scipy_and_the_inverse_correlation_matrix(seed, decimals, pairs):
    x, y, controls = related(pairs, decimals=decimals, seed=seed)
    if len(np.unique(x)) > 1 and len(np.unique(y)) > 1:
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
        assert kendall(x, y) == pytest.approx(kendalltau(x, y).statistic, abs=1e-12)
    matrix = np.column_stack([x, y, controls])
    if np.linalg.matrix_rank(rankdata(matrix, axis=0) - (pairs + 1) / 2) == 4:
        assert partial_spearman(x, y, controls) == pytest.approx(by_inverse(x, y, controls), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), decimals=st.sampled_from([None, 0]))
def test_kendall_counts_concordant_pairs(seed, decimals):
    x, y, _ = related(12, decimals=decimals, seed=seed)
    upper = np.triu_indices(12, 1)
    first, second = (np.sign(values[:, None] - values)[upper] for values in (x, y))
    if first.any() and second.any():
        expected = (first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum())
        assert kendall(x, y) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.sampled_from([-9.0, -1.0, 0.0, 0.5, 2.0]), max_size=12))
def test_ranks_equal_scipy(values):
    np.testing.assert_array_equal(ranks(np.array(values)), rankdata(values))


def test_ranks_leave_nan_and_work_along_the_last_axis():
    values = np.array([[3.0, np.nan, 1.0, 3.0], [np.nan, np.nan, np.nan, 2.0]])
    expected = [[2.5, np.nan, 1.0, 2.5], [np.nan, np.nan, np.nan, 1.0]]
    np.testing.assert_array_equal(ranks(values), expected)
    np.testing.assert_array_equal(ranks(np.stack([values, values])), [expected, expected])


def test_leading_axes_are_so_many_separate_problems():
    cases = [[related(seed=3 * row + column, decimals=1) for column in range(3)] for row in range(2)]
    x, y, controls = (np.array([[case[part] for case in row] for row in cases]) for part in range(3))
    for place in np.ndindex(2, 3):
        one = x[place], y[place], controls[place]
        assert spearman(x, y)[place] == pytest.approx(spearman(*one[:2]), abs=1e-14)
        assert kendall(x, y)[place] == kendall(*one[:2])
        assert partial_spearman(x, y, controls)[place] == pytest.approx(partial_spearman(*one), abs=1e-12)


def test_unmoved_by_increasing_and_turned_by_decreasing_functions():
    x, y, controls = related()
    for coefficient in (spearman, kendall, lambda x, y: partial_spearman(x, y, controls)):
        expected = coefficient(x, y)
        np.testing.assert_allclose(coefficient(np.exp(x), y**3), expected, atol=1e-12)
        np.testing.assert_allclose(coefficient(y, x), expected, atol=1e-12)
        np.testing.assert_allclose(coefficient(-np.exp(x), y), -expected, atol=1e-12)
    expected = partial_spearman(x, y, controls)
    other_scales = np.column_stack([np.exp(controls[:, 0]), -np.arctan(controls[:, 1])])
    np.testing.assert_allclose(partial_spearman(x, y, other_scales), expected, atol=1e-12)
    np.testing.assert_allclose(partial_spearman(x, y, controls[:, ::-1]), expected, atol=1e-12)


def test_a_pair_with_a_nan_is_left_out_before_ranking():
    x, y, controls = related(30)
    x[3], y[7], controls[11, 1] = np.nan, np.nan, np.nan
    kept = np.delete(np.arange(30), [3, 7])
    assert spearman(x, y) == pytest.approx(spearmanr(x[kept], y[kept]).statistic)
    assert kendall(x, y) == pytest.approx(kendalltau(x[kept], y[kept]).statistic)
    kept = np.delete(np.arange(30), [3, 7, 11])
    assert partial_spearman(x, y, controls) == pytest.approx(by_inverse(x[kept], y[kept], controls[kept]))


def test_infinite_values_are_the_largest():
    np.testing.assert_array_equal(ranks(np.array([np.inf, 1.0, -np.inf, np.inf])), [3.5, 2, 1, 3.5])
    x = np.array([1.0, 2.0, 3.0, np.inf, -np.inf])
    y = np.array([2.0, 1.0, 3.0, np.inf, -np.inf])
    assert spearman(x, y) == pytest.approx(0.9)
    assert kendall(x, y) == pytest.approx(0.8)


@pytest.mark.parametrize("coefficient", [spearman, kendall])
def test_no_coefficient_of_a_constant_or_of_two_pairs(coefficient):
    assert np.isnan(coefficient(np.array([1, 1, 1, 1]), np.arange(4)))
    assert np.isnan(coefficient(np.arange(4), np.array([0.1, 0.1, 0.1, np.nan])))
    assert np.isnan(coefficient(np.arange(2), np.arange(2)))
    assert np.isnan(coefficient(np.array([1, 2, np.nan]), np.arange(3)))
    assert np.isnan(coefficient(np.empty(0), np.empty(0)))
    assert coefficient(np.empty((0, 5)), np.empty((0, 5))).shape == (0,)
    assert coefficient(np.arange(3), np.arange(3)) == pytest.approx(1)


def test_rounding_takes_no_coefficient_beyond_one():
    for pairs in range(3, 60):
        x = np.random.default_rng(pairs).normal(size=pairs).round(1)
        assert spearman(x, x) == pytest.approx(1) and spearman(x, x) <= 1
        assert kendall(x, -x) == pytest.approx(-1) and kendall(x, -x) >= -1


def test_a_partial_coefficient_needs_three_pairs_more_than_controls():
    x, y, controls = related(6, 3)
    assert np.isfinite(partial_spearman(x, y, controls))
    assert np.isnan(partial_spearman(x[:5], y[:5], controls[:5]))
    x[0] = np.nan
    assert np.isnan(partial_spearman(x, y, controls))


def test_repeated_and_constant_controls_change_nothing():
    x, y, controls = related()
    expected = partial_spearman(x, y, controls)
    more = np.column_stack([controls, np.exp(controls[:, 0]), -controls[:, 1], np.full(len(x), 5.0)])
    np.testing.assert_allclose(partial_spearman(x, y, more), expected, atol=1e-10)
    np.testing.assert_allclose(partial_spearman(x, y, more[:, 5:]), spearman(x, y), atol=1e-12)


def test_nan_where_the_controls_explain_everything():
    x, y, controls = related()
    assert np.isnan(partial_spearman(controls[:, 0] ** 3, y, controls))
    assert np.isnan(partial_spearman(x, -controls[:, 1], controls))


def test_a_relation_through_a_control_vanishes_and_one_beside_it_stays():
    generator = np.random.default_rng(0)
    frequency = generator.normal(size=5000)
    metric, target = (frequency + generator.normal(size=5000) for _ in range(2))
    assert spearman(metric, target) > 0.45
    assert abs(partial_spearman(metric, target, frequency[:, None])) < 3 / np.sqrt(5000)
    assert partial_spearman(metric, target + metric, frequency[:, None]) > 0.5


def test_strong_controls_are_taken_out_in_part_only():
    """The numbers that the docstring gives, which a claim about many classes has to bear in mind."""
    generator = np.random.default_rng(0)
    controls = generator.normal(size=(100_000, 3))
    for share, left in [(1 / 2, 0.04), (3 / 4, 0.12)]:
        weight = np.sqrt(share / (1 - share) / 3)
        x, y = (weight * controls.sum(axis=1) + generator.normal(size=len(controls)) for _ in range(2))
        assert partial_spearman(x, y, controls) == pytest.approx(left, abs=0.01)


def test_mean_of_models_is_over_those_that_have_a_coefficient():
    coefficients = np.array([[0.5, np.nan, 0.25], [1.0, np.nan, np.nan]])
    np.testing.assert_array_equal(mean_of_models(coefficients), [0.75, np.nan, 0.25])
    assert mean_of_models(coefficients[:, 2]) == 0.25


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="`x` must have an axis of pairs, got a single number"):
        check_pairs(np.array(1.0), np.array(1.0))
    with pytest.raises(ValueError, match=r"`target` must have the shape of `metric`, \[2, 3\], got \[3\]"):
        check_pairs(np.ones((2, 3)), np.ones(3), names=("metric", "target"))
    with pytest.raises(ValueError, match=r"`controls` must have the shape of `x`, \[3\].*got \[3\]: a single control"):
        check_pairs(np.ones(3), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=r"`controls` must have the shape of `x`, \[3\].*got \[4, 1\]"):
        check_pairs(np.ones(3), np.ones(3), np.ones((4, 1)))
