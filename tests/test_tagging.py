"""Tagging scores: equal to scikit-learn and to the official code, by hand, and unmoved by what must not matter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from safetensors.numpy import load_file
from scipy.stats import norm
from sklearn.metrics import average_precision_score, f1_score, label_ranking_average_precision_score, roc_auc_score

from robustav.metrics.tagging import (
    MacroMean,
    average_precision,
    d_prime,
    f1_thresholds,
    hide_rate,
    label_ranking_average_precision,
    macro_mean,
    mean_average_precision,
    mean_roc_auc,
    random_average_precision,
    roc_auc,
    top1_hit,
)

FIXTURE_TOLERANCE = 1e-9  # stated in the fixtures' index
METRICS = [average_precision, roc_auc]


def simulated(samples=200, classes=5, decimals=None, seed=0):
    """Scores that know something of the labels, rounded into ties if `decimals` is given; class 0 is always mixed."""
    generator = np.random.default_rng(seed)
    labels = generator.random((samples, classes)) < 0.3
    labels[:2, 0] = True, False
    scores = generator.normal(size=labels.shape) + labels
    return (scores if decimals is None else scores.round(decimals)), labels


@pytest.fixture(scope="module")
def official(shared):
    return load_file(shared / "reference" / "fixtures" / "metrics_multilabel.safetensors")


@pytest.mark.parametrize("ties", ["", "_ties"])
def test_equals_the_official_code(official, ties):
    scores, labels = official[f"in.scores{ties}"], official["in.target"]
    precision, area = average_precision(scores, labels), roc_auc(scores, labels)
    for published in ("", "gas_"):
        np.testing.assert_allclose(precision, official[f"out.{published}AP{ties}"], rtol=0, atol=FIXTURE_TOLERANCE)
        np.testing.assert_allclose(area, official[f"out.{published}AUC{ties}"], rtol=0, atol=FIXTURE_TOLERANCE)
    macro = [
        mean_average_precision(scores, labels),
        mean_roc_auc(scores, labels),
        d_prime(mean_roc_auc(scores, labels)),
    ]
    np.testing.assert_allclose(macro, official[f"out.mAP_mAUC_dprime{ties}"], rtol=0, atol=FIXTURE_TOLERANCE)
    np.testing.assert_allclose(d_prime(area), official[f"out.dprime_per_class{ties}"], rtol=0, atol=FIXTURE_TOLERANCE)
    hits = top1_hit(scores, np.eye(labels.shape[1])[labels.argmax(axis=1)])
    assert hits.mean() == pytest.approx(float(official[f"out.acc_argmax{ties}"]))


def test_drops_the_class_that_the_official_code_skips(official):
    labels = official["in.target"].copy()
    labels[:, 3] = 0
    area = mean_roc_auc(official["in.scores"], labels)
    macro = [mean_average_precision(official["in.scores"], labels), area, d_prime(area)]
    expected = official["out.gas_mAP_mAUC_dprime_class3_empty"]
    np.testing.assert_allclose(macro, expected, rtol=0, atol=FIXTURE_TOLERANCE)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([None, 1, 0]),
    st.sampled_from([np.bool_, np.int64, np.float32]),
    st.booleans(),
)
def test_equals_scikit_learn_with_ties_and_weights(seed, decimals, kind, weighted):
    scores, labels = simulated(30, 3, decimals, seed)
    weights = np.random.default_rng(seed).integers(1, 4, size=30) / 3 if weighted else None
    for ours, theirs in [(average_precision, average_precision_score), (roc_auc, roc_auc_score)]:
        for column, value in enumerate(ours(scores, labels.astype(kind), weights)):
            mixed = 0 < labels[:, column].sum() < 30
            if mixed:
                expected = theirs(labels[:, column], scores[:, column], sample_weight=weights)
                assert value == pytest.approx(expected, abs=1e-12, rel=0)


def test_values_worked_out_by_hand():
    scores = np.array([[4.0, 1.0], [3.0, 1.0], [2.0, 1.0], [1.0, 0.0]])
    labels = np.array([[0, 1], [1, 0], [0, 0], [1, 1]])
    # Class 0: precision 1/2 and 2/4 at its positives. Class 1: three tie at precision 1/3, then 2/4.
    np.testing.assert_allclose(average_precision(scores, labels), [1 / 2, (1 / 3 + 1 / 2) / 2])
    # Of the four pairs, class 0 wins one; class 1 ties two and loses two.
    np.testing.assert_allclose(roc_auc(scores, labels), [1 / 4, 1 / 4])
    assert mean_average_precision(scores, labels) == pytest.approx((1 / 2 + 5 / 12) / 2)
    assert mean_roc_auc(scores, labels) == 0.25


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
@pytest.mark.parametrize("decimals", [None, 0])
def test_unmoved_by_order_duplicates_and_monotone_transformations(metric, decimals):
    scores, labels = simulated(decimals=decimals)
    expected = metric(scores, labels)
    order = np.random.default_rng(1).permutation(len(scores))
    np.testing.assert_allclose(metric(scores[order], labels[order]), expected, atol=1e-12)
    np.testing.assert_allclose(metric(np.tile(scores, (2, 1)), np.tile(labels, (2, 1))), expected, atol=1e-12)
    np.testing.assert_allclose(metric(np.exp(scores / 3) - 7, labels), expected, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_a_weight_is_a_number_of_copies(metric):
    scores, labels = simulated(decimals=1)
    weights = np.random.default_rng(1).integers(0, 3, size=len(scores))
    copies = metric(scores.repeat(weights, axis=0), labels.repeat(weights, axis=0))
    np.testing.assert_allclose(metric(scores, labels, weights), copies, atol=1e-12)


def test_constant_scores_give_the_base_rate_and_chance():
    _, labels = simulated()
    scores = np.full(labels.shape, 0.3)
    np.testing.assert_allclose(average_precision(scores, labels), labels.mean(axis=0))
    np.testing.assert_allclose(roc_auc(scores, labels), 0.5)


def test_flipping_scores_mirrors_the_area():
    scores, labels = simulated(decimals=1)
    np.testing.assert_allclose(roc_auc(-scores, labels), 1 - roc_auc(scores, labels))


def test_classes_of_one_kind():
    scores = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    labels = np.array([[0, 1, 1], [0, 1, 0]])
    np.testing.assert_array_equal(average_precision(scores, labels), [np.nan, 1, 1])
    np.testing.assert_array_equal(roc_auc(scores, labels), [np.nan, np.nan, 1])
    assert macro_mean(average_precision(scores, labels)) == MacroMean(1.0, classes=2, dropped=1)
    assert macro_mean(roc_auc(scores, labels)) == MacroMean(1.0, classes=1, dropped=2)
    nothing = macro_mean(np.array([np.nan, np.nan]))
    assert np.isnan(nothing.value) and nothing[1:] == (0, 2)


def test_positives_of_no_weight_are_no_positives():
    scores, labels = np.array([[0.9], [0.5], [0.1]]), np.array([[1], [0], [0]])
    assert np.isnan(average_precision(scores, labels, np.array([0, 1, 1]))).all()
    assert np.isnan(roc_auc(scores, labels, np.array([1, 0, 0]))).all()


def test_d_prime_separates_unit_normals_by_that_distance():
    distance = 1.3
    assert d_prime(norm.cdf(distance / np.sqrt(2))) == pytest.approx(distance)
    assert d_prime(0.5) == 0
    np.testing.assert_array_equal(d_prime(np.array([0.0, 1.0, np.nan])), [-np.inf, np.inf, np.nan])


def test_top1_hit_takes_the_first_of_ties_and_never_hits_an_empty_label_set():
    scores = np.array([[0.2, 0.7, 0.1], [0.2, 0.7, 0.1], [0.5, 0.5, 0.1], [0.5, 0.5, 0.1], [0.9, 0.1, 0.1]])
    labels = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    assert top1_hit(scores, labels).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("function", [average_precision, roc_auc, mean_average_precision, mean_roc_auc, top1_hit])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_names_the_first_sample_whose_score_is_not_finite(function, broken):
    scores, labels = simulated()
    scores[[7, 9], [2, 1]] = broken
    with pytest.raises(ValueError, match=r"first at sample 7, class 2 \(2 of 200 samples"):
        function(scores, labels)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_errors_name_what_is_wrong(metric):
    scores, labels = simulated()
    three = labels.astype(int)
    three[3, 1] = 3
    with pytest.raises(ValueError, match="`labels` must be 0 or 1, got 3 at sample 3, class 1"):
        metric(scores, three)
    with pytest.raises((ValueError, TypeCheckError), match="labels"):
        metric(scores, labels[:, :2])
    with pytest.raises((ValueError, TypeCheckError), match="scores"):
        metric(scores[:, 0], labels[:, 0])
    with pytest.raises(ValueError, match=r"`scores` must be .* at least one of each, got \[0, 5\]"):
        metric(scores[:0], labels[:0])
    with pytest.raises((ValueError, TypeCheckError), match="weights"):
        metric(scores, labels, np.ones(3))
    for wrong in (-1.0, np.nan, np.inf):
        weights = np.ones(len(scores))
        weights[5] = wrong
        with pytest.raises(ValueError, match="`weights` must be finite and at least 0"):
            metric(scores, labels, weights)


def test_an_area_in_percent_is_an_error():
    with pytest.raises(ValueError, match=r"`auc` must lie in \[0, 1\], got values from 0.5 to 97.5"):
        d_prime(np.array([0.5, 97.5]))


def test_inputs_are_not_written_to():
    scores, labels = simulated()
    before = scores.copy(), labels.copy()
    mean_average_precision(scores, labels), mean_roc_auc(scores, labels), top1_hit(scores, labels)
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(labels, before[1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 1, 0]), st.sampled_from([np.bool_, np.int64, np.float32]))
def test_label_ranks_equal_scikit_learn_where_there_are_labels(seed, decimals, kind):
    scores, labels = simulated(30, 4, decimals, seed)
    values = label_ranking_average_precision(scores, labels.astype(kind))
    labelled = labels.any(axis=1)
    assert np.isnan(values[~labelled]).all()
    theirs = label_ranking_average_precision_score(labels[labelled].astype(int), scores[labelled])
    assert values[labelled].mean() == pytest.approx(theirs, abs=1e-12)


def test_label_ranks_by_hand():
    scores = np.array([[3.0, 2, 1], [3, 2, 1], [1, 1, 1], [3, 2, 1]])
    labels = np.array([[0, 0, 1], [1, 0, 1], [0, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(label_ranking_average_precision(scores, labels), [1 / 3, (1 + 2 / 3) / 2, 1 / 3, 1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([None, 1, 0]))
def test_no_threshold_beats_the_f1_thresholds(seed, decimals):
    scores, labels = simulated(30, 3, decimals, seed)
    for column, threshold in enumerate(f1_thresholds(scores, labels)):
        truth, level = labels[:, column], scores[:, column]
        if not truth.any():
            assert threshold == np.inf
            continue
        tried = [f1_score(truth, level >= cut) for cut in np.unique(level)]
        assert f1_score(truth, level >= threshold) == pytest.approx(max(tried), abs=1e-12)
        highest = np.unique(level)[np.flatnonzero(np.isclose(tried, max(tried)))[-1]]
        assert threshold <= highest and not ((level < highest) & (level >= threshold)).any()


def test_f1_thresholds_between_neighbours_that_have_no_number_between_them():
    low = np.float64(1.0)
    high = np.nextafter(low, 2)
    assert f1_thresholds(np.array([[high], [low]]), np.array([[1], [0]]))[0] == high


def test_what_was_hidden_is_counted_among_what_was_detected():
    scores, labels = simulated(300, 6)
    thresholds = f1_thresholds(scores, labels)
    detected = int((labels & (scores >= thresholds)).sum())
    assert hide_rate(scores, scores, labels, thresholds) == (0, 0, detected)
    assert hide_rate(scores, scores - 100, labels, thresholds) == (1, detected, detected)
    raised = hide_rate(scores, scores + 100, labels, thresholds)
    assert raised == (0, 0, detected), "labels that were missed before count neither way"
    value, hidden, count = hide_rate(scores, np.full_like(scores, -9), labels, np.full(6, np.inf))
    assert np.isnan(value) and (hidden, count) == (0, 0)


def test_average_precision_is_blind_to_what_hiding_finds():
    """Every clip of a class sinks by as much: no ranking changes, and no detector fires any more."""
    scores, labels = simulated(300, 6)
    sunk = scores - 50.0
    np.testing.assert_allclose(average_precision(sunk, labels), average_precision(scores, labels))
    assert hide_rate(scores, sunk, labels, f1_thresholds(scores, labels)).value == 1


def test_hiding_needs_a_threshold_for_every_class():
    scores, labels = simulated()
    with pytest.raises((ValueError, TypeCheckError), match="thresholds"):
        hide_rate(scores, scores, labels, np.zeros(3))
    with pytest.raises(ValueError, match=r"a number to each of 5 classes, got \[5\] with 1 nan"):
        hide_rate(scores, scores, labels, np.array([0.0, np.nan, 0, 0, 0]))
    with pytest.raises(ValueError, match="`scores` must be finite"):
        hide_rate(scores, np.full_like(scores, np.nan), labels, np.zeros(5))


@pytest.mark.parametrize(("positives", "samples"), [(1, 1), (1, 7), (3, 10), (9, 100), (10, 10)])
def test_random_scores_have_the_average_precision_to_expect(positives, samples):
    rng = np.random.default_rng(0)
    labels = (np.arange(samples) < positives).astype(int)[:, None]
    found = [average_precision(rng.random((samples, 1)), labels)[0] for _ in range(4000)]
    assert random_average_precision(positives, samples) == pytest.approx(np.mean(found), abs=0.01)


def test_random_scores_need_a_positive():
    with pytest.raises(ValueError, match="`positives` must be between 1 and the 5 samples, got 0"):
        random_average_precision(0, 5)
