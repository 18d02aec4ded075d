"""Norms: closed forms, and what must hold for every row of the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustav.norms import NORMS
from robustav.randomness import draws_for

SHAPES = st.sampled_from([(3,), (4, 5), (2, 3, 2, 2)])
ROWS = pytest.mark.parametrize("norm", list(NORMS.values()), ids=list(NORMS))
DUAL = {"linf": 1, "l2": 2, "l1": float("inf")}
ORDER = {"linf": float("inf"), "l2": 2, "l1": 1}


def tensors(seed, shape, scale=1.0, batch=4):
    return scale * torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", NORMS)
def test_length_is_the_vector_norm(name):
    delta = tensors(0, (3, 4))
    torch.testing.assert_close(NORMS[name].length(delta), delta.flatten(1).norm(p=ORDER[name], dim=1))


@ROWS
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), shape=SHAPES, radius=st.floats(1e-6, 100), scale=st.floats(1e-6, 1e4))
def test_shortening_ends_inside_and_leaves_the_inside_alone(norm, seed, shape, radius, scale):
    delta = tensors(seed, shape, scale)
    short = norm.shorten(delta, radius)
    assert (norm.length(short) <= radius * (1 + 1e-9)).all()
    inside = norm.length(delta) <= radius
    assert torch.equal(short[inside], delta[inside])
    torch.testing.assert_close(norm.shorten(short, radius), short, rtol=1e-9, atol=1e-12)


@ROWS
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), shape=SHAPES, radius=st.floats(1e-3, 10))
def test_shortening_is_the_nearest_point(norm, seed, shape, radius):
    """No other point of the ball is nearer: the angle to every one of them is obtuse (for l2 scaling, too)."""
    delta = tensors(seed, shape, 3.0)
    short = norm.shorten(delta, radius)
    other = norm.shorten(tensors(seed + 1, shape, 3.0), radius)
    inner = ((delta - short) * (other - short)).flatten(1).sum(1)
    assert (inner <= 1e-8 * (1 + delta.abs().amax())).all()


@ROWS
def test_a_radius_may_differ_by_sample(norm):
    delta, radius = tensors(1, (5,), 10.0), torch.tensor([0.0, 0.1, 1.0, 1e6], dtype=torch.float64)
    together = norm.shorten(delta, radius)
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], norm.shorten(delta[row : row + 1], radius[row].item()))
    assert not together[0].any()


@pytest.mark.parametrize("name", NORMS)
def test_steepest_step_has_length_one_and_the_dual_norms_gain(name):
    gradient = tensors(2, (50,))
    step = NORMS[name].steepest(gradient)
    torch.testing.assert_close(NORMS[name].length(step), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close((gradient * step).sum(1), gradient.norm(p=DUAL[name], dim=1))


@ROWS
def test_no_gradient_means_no_step(norm):
    assert not norm.steepest(torch.zeros(2, 7)).any()


def test_tiny_gradients_keep_their_direction():
    gradient = torch.tensor([[3e-25, 4e-25]])
    torch.testing.assert_close(NORMS["l2"].steepest(gradient), torch.tensor([[0.6, 0.8]]))


def test_l1_spreads_over_the_largest_coordinates():
    gradient = torch.arange(1.0, 501.0)[None]
    step = NORMS["l1"].steepest(gradient)
    assert step.nonzero()[:, 1].tolist() == [495, 496, 497, 498, 499]  # 1 % of 500
    assert step.max() == pytest.approx(0.2)


@pytest.mark.parametrize(("name", "mean_of_length_to_the_d"), [("linf", 0.5), ("l2", 0.5), ("l1", 0.5)])
def test_random_points_are_uniform_in_the_ball(name, mean_of_length_to_the_d):
    """length^d of a uniform point of the unit ball is uniform in [0, 1], whatever the norm."""
    norm = NORMS[name]
    points = norm.random(torch.zeros(4000, 3), draws_for(0, map(str, range(4000))))
    share = norm.length(points) ** 3
    assert share.max() <= 1
    assert share.mean().item() == pytest.approx(mean_of_length_to_the_d, abs=4 * (1 / 12 / 4000) ** 0.5)
    assert points.mean(0).abs().max() < 0.05


@ROWS
def test_a_draw_depends_on_its_sample_only(norm):
    like = torch.zeros(3, 8)
    whole = norm.random(like, draws_for(7, "abc"))
    alone = norm.random(like[:1], draws_for(7, "b"))
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=0)
    assert not torch.equal(whole[0], whole[1])


def test_too_few_generators_are_an_error():
    with pytest.raises(ValueError, match="one generator a sample, got 1 for a batch of 3"):
        NORMS["linf"].random(torch.zeros(3, 2), draws_for(0, "a"))
