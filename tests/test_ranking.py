"""Rank losses: exact verdicts, values by hand, terms that drop out, and gradients that point the right way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustav.losses import top1_margin
from robustav.metrics.tagging import mean_average_precision
from robustav.ranking import (
    DEPTH,
    class_quantiles,
    class_weights,
    corpus_ap,
    stealth,
    top_k_average,
    top_k_lost,
    top_k_margin,
)


def drawn(seed, classes, decimals=None, batch=8):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator)
    labels = (torch.rand(batch, classes, generator=generator) < 0.4).float()
    return (logits if decimals is None else logits.round(decimals=decimals)), labels


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 8), decimals=st.sampled_from([None, 0]), k=st.integers(1, 8))
def test_the_top_k_margin_is_positive_exactly_when_no_label_is_in_the_top_k(seed, classes, decimals, k):
    k = min(k, classes)
    logits, labels = drawn(seed, classes, decimals)
    margin, lost = top_k_margin(logits, labels, k), top_k_lost(logits, labels, k)
    for value, verdict, row, hot in zip(margin.tolist(), lost.tolist(), logits, labels > 0.5, strict=True):
        outscored = [int((row > score).sum()) for score in row[hot]]  # a tie leaves the label among the highest
        clear = [int((row[~hot] > score).sum()) >= k for score in row[hot]]
        assert verdict == all(clear)
        if verdict:
            assert all(count >= k for count in outscored)
        if hot.any() and (~hot).sum() >= k:
            assert (value > 0) == verdict


def test_top_one_is_the_top1_margin():
    logits, labels = drawn(0, 6, batch=100)
    assert torch.equal(top_k_margin(logits, labels, 1), top1_margin(logits, labels))


def test_top_k_by_hand():
    logits = torch.tensor([[5.0, 4, 3, 2, 1]]).expand(5, 5)
    labels = torch.tensor([[0.0, 0, 1, 0, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert top_k_margin(logits, labels, 2).tolist() == [1, 1, 4, -5, -5]
    assert top_k_lost(logits, labels, 2).tolist() == [True, True, True, False, False]
    assert top_k_margin(logits, labels, 3)[0] == -1
    tied = torch.tensor([[5.0, 4, 4, 2, 1]])
    assert top_k_margin(tied, labels[:1], 2).item() == 0
    assert not top_k_lost(tied, labels[:1], 2).item()


def test_the_averaged_form_lifts_every_rival_and_sinks_the_best_label():
    logits = torch.tensor([[5.0, 4, 3, 2, 1]]).requires_grad_()
    labels = torch.tensor([[0.0, 1, 0, 0, 1]])
    loss = top_k_average(logits, labels, 3)
    by_hand = -sum(math.log1p(math.exp(4 - rival)) for rival in (5, 3, 2)) / 3
    assert loss.item() == pytest.approx(by_hand)
    loss.sum().backward()
    gradient = logits.grad[0]
    assert gradient[1] < 0 < gradient[0] < gradient[2] < gradient[3], "the further a rival lags, the more it is lifted"
    assert gradient[4] == 0
    everything = torch.tensor([[0.0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    found = top_k_average(logits.detach().expand(2, 5), everything, 2)
    assert found.isfinite().all() and (found <= 0).all()


@pytest.mark.parametrize("k", [0, 6])
def test_k_lies_among_the_classes(k):
    with pytest.raises(ValueError, match=rf"`k` must lie in 1..5, the number of classes, got {k}"):
        top_k_margin(torch.zeros(1, 5), torch.zeros(1, 5), k)


def test_quantiles_equal_numpy_class_by_class():
    logits, labels = drawn(1, 6, batch=300)
    found = class_quantiles(logits, labels)
    for c in range(6):
        hot = labels[:, c].numpy() > 0.5
        expected = [np.quantile(logits[~hot, c].numpy(), 0.99), np.median(logits[hot, c].numpy())]
        np.testing.assert_allclose(found[:, c].numpy(), expected, rtol=1e-5)


def test_a_class_of_one_kind_drops_out_without_a_gradient():
    logits, labels = drawn(2, 4, batch=50)
    labels[:, 0], labels[:, 1] = 0, 1
    quantiles, weights = class_quantiles(logits, labels), class_weights(labels)
    assert quantiles[0, 1] == -math.inf and quantiles[1, 0] == math.inf
    assert weights[0] == 0
    x = logits.clone().requires_grad_()
    loss = corpus_ap(x, labels, quantiles, 1.0, weights)
    loss.sum().backward()
    assert loss.isfinite().all() and x.grad.isfinite().all()
    assert not x.grad[:, :2].any() and x.grad[:, 2:].any()


def test_corpus_ap_by_hand():
    quantiles = torch.tensor([[1.0, -1.0], [3.0, 2.0]])
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    expected = [sigmoid((1 - 2) / 0.5), sigmoid((0 - 2) / 0.5)]
    assert corpus_ap(logits, labels, quantiles, 0.5).item() == pytest.approx(sum(expected))
    weighted = corpus_ap(logits, labels, quantiles, 0.5, torch.tensor([2.0, 0.5]))
    assert weighted.item() == pytest.approx(2 * expected[0] + 0.5 * expected[1])


def test_corpus_ap_sinks_labels_and_lifts_the_rest_and_that_lowers_map():
    logits, labels = drawn(3, 5, batch=200)
    logits = logits + 3 * labels
    quantiles, weights = class_quantiles(logits, labels), class_weights(labels)
    x = logits.clone().requires_grad_()
    corpus_ap(x, labels, quantiles, 1.0, weights).sum().backward()
    assert ((x.grad < 0) == (labels > 0.5)).all()
    before = mean_average_precision(logits.double().numpy(), labels.numpy())
    after = mean_average_precision((logits + x.grad.sign()).double().numpy(), labels.numpy())
    assert after < before - 0.1


def test_rare_classes_weigh_by_what_a_clip_is_worth_to_them():
    labels = torch.zeros(100, 3)
    labels[:2, 0], labels[:20, 1] = 1, 1
    weights = class_weights(labels)
    assert (weights[0] / weights[1]).item() == pytest.approx(10)
    assert weights[:2].mean().item() == pytest.approx(1)
    assert weights[2] == 0
    assert not class_weights(torch.zeros(4, 2)).any()


def test_stealth_by_hand():
    clean = torch.tensor([[3.0, -1, 2]])
    chosen = torch.tensor([[True, False, False]])
    logits = torch.tensor([[2.0, 0, 2]])
    assert stealth(logits, clean, chosen, 0.5, 2.0).item() == pytest.approx(-(2 - 0.5 + DEPTH) - 2 * 1 / 2)
    deep = torch.tensor([[0.5 - DEPTH - 9, -1, 2]])
    assert stealth(deep, clean, chosen, 0.5, 2.0).item() == 0
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert stealth(clean, clean, everything, 0.0, 1.0).item() == pytest.approx(-(4 + 0 + 3))


def test_a_class_deep_enough_leaves_the_step_to_the_others():
    clean = torch.tensor([[3.0, -1, 2]])
    x = torch.tensor([[-5.0, -0.5, 1]]).requires_grad_()
    stealth(x, clean, torch.tensor([[True, False, False]]), 0.0, 1.0).sum().backward()
    assert x.grad[0, 0] == 0
    assert x.grad[0, 1] < 0 < x.grad[0, 2]
