"""Graph convexity: chains, rings and blobs known by hand, and another way to the same shortest paths."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from scipy.sparse.csgraph import floyd_warshall
from sklearn.neighbors import kneighbors_graph

from robustav.metrics import graph
from robustav.metrics.convexity import class_scores
from robustav.metrics.graph import graph_convexity


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def one_hot(y):
    return torch.nn.functional.one_hot(torch.as_tensor(y)).bool()


def scores(latents, labels, **options):
    found = graph_convexity(torch.as_tensor(latents), labels, generator=seeded(), **options)
    return class_scores(found.terms, found.pairs, labels.shape[1])


def share_of(found, first, second):
    """What the paths between two samples score; one number, as all runs of a pair are alike."""
    return found.terms.numerator[(found.pairs.first == first) & (found.pairs.second == second)].unique().tolist()


def test_separate_blobs_are_convex():
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    latents = generator.normal(size=(120, 4)) + 50 * np.eye(4)[y]
    assert (scores(latents, one_hot(y), count=200, k=10) == 1).all()


def test_interleaved_ring_by_hand():
    # Samples of two classes take turns on a ring, everyone next to one of either side. From a sample to the one 2m
    # steps on, 2m - 1 lie between, of which m - 1 are of the class.
    n = 20
    angle = 2 * np.pi * np.arange(n) / n
    ring = torch.tensor(np.stack([np.cos(angle), np.sin(angle)], axis=1))
    found = graph_convexity(ring, one_hot(np.arange(n) % 2), k=2, count=400, generator=seeded())
    steps = (found.pairs.first - found.pairs.second).abs()
    m = torch.minimum(steps, n - steps) / 2
    torch.testing.assert_close(found.terms.numerator, ((m - 1) / (2 * m - 1)).double())
    assert (class_scores(found.terms, found.pairs, 2) < 0.5).all()


def test_a_ring_around_another_is_not_convex():
    generator = np.random.default_rng(0)
    y, angle = np.arange(200) % 2, generator.random(200) * 2 * np.pi
    radius = (1 + 0.1 * y)[:, None]
    rings = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    inner, outer = scores(rings, one_hot(y), count=300, k=10).tolist()
    assert outer < 0.5 and inner < 1  # the shorter way round is the inner ring's


def test_chain_by_hand():
    # 0 - 1 - 2 - 3 - 4 in a row, and two samples far away; the class holds all but 1 and 3.
    latents = torch.tensor([0.0, 1, 2.1, 3.3, 4.6, 100, 101])[:, None]
    labels = torch.tensor([1, 0, 1, 0, 1, 1, 0], dtype=torch.bool)[:, None]
    found = graph_convexity(latents, labels, k=1, count=300, generator=seeded())
    assert share_of(found, 0, 2) == share_of(found, 2, 0) == [0]  # by way of 1
    assert share_of(found, 0, 4) == share_of(found, 4, 0) == [pytest.approx(1 / 3)]  # by way of 1, 2 and 3
    assert share_of(found, 0, 5) == [0]  # no way
    found = graph_convexity(latents, labels, k=2, count=300, generator=seeded())
    assert share_of(found, 0, 2) == [1]  # neighbours now, though the way by 1 is as short
    assert (found.terms.denominator == 1).all()


def test_the_same_as_another_way_to_shortest_paths():
    generator = np.random.default_rng(1)
    latents, labels = generator.normal(size=(60, 3)), torch.tensor(generator.random((60, 4)) < 0.4)
    found = graph_convexity(torch.tensor(latents), labels, k=4, count=150, generator=seeded())
    one_way = kneighbors_graph(latents, 4, mode="distance").toarray()
    lengths, before = floyd_warshall(np.maximum(one_way, one_way.T), return_predecessors=True)
    between = set()
    for i, j, c, score in zip(*(field.tolist() for field in (*found.pairs, found.terms.numerator)), strict=True):
        path = [j]
        while np.isfinite(lengths[i, j]) and path[-1] != i:
            path.append(before[i, path[-1]])
        expected = labels[path[1:-1], c].double().mean().item() if len(path) > 2 else float(len(path) == 2)
        assert score == pytest.approx(expected)
        between.add(len(path))
    assert {2, 3, 4, 5} <= between


@pytest.mark.parametrize("change", [lambda z: 7 * z, lambda z: z + 3, lambda z: z.flip(1), lambda z: z.float()])
def test_unmoved_by_scale_shift_and_rotation(change):
    z, labels = torch.randn(50, 3, generator=seeded(), dtype=torch.float64), one_hot(np.arange(50) % 3)
    torch.testing.assert_close(scores(change(z), labels, k=5, count=100), scores(z, labels, k=5, count=100))


def test_chunks_and_global_state_do_not_matter(monkeypatch):
    z, labels = torch.randn(50, 3, generator=seeded()), one_hot(np.arange(50) % 3)
    expected, state = scores(z, labels, k=5, count=100), torch.get_rng_state()
    monkeypatch.setattr(graph, "CHUNK_BYTES", 1)
    assert torch.equal(scores(z, labels, k=5, count=100), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_sizes_take_away_what_being_common_gives():
    # Labels at random: nothing is convex, but a common class is everywhere.
    z = torch.randn(400, 3, generator=seeded())
    labels = torch.rand(400, 3, generator=seeded(1)) < torch.tensor([0.15, 0.85, 0.05])
    common = scores(z, labels, k=5, count=300)
    assert common[0] < 0.45 and common[1] > 0.8
    found = graph_convexity(z, labels, k=5, count=300, generator=seeded(), members=40)
    equal = class_scores(found.terms, found.pairs, 3)
    assert equal[2].isnan()  # too few members
    assert abs(equal[0] - equal[1]) < 0.15
    for side in found.pairs[:2]:
        assert labels[side, found.pairs.cls].all()
        assert all(len(side[found.pairs.cls == c].unique()) <= 40 for c in (0, 1))
    assert found.pairs.cls.tolist() == [0] * 300 + [1] * 300


def test_copies_of_a_sample_are_neighbours_at_no_distance():
    latents = torch.tensor([0.0, 0, 0, 1, 1, 1])[:, None]
    labels = one_hot([0, 0, 0, 1, 1, 1])
    assert (scores(latents, labels, k=2, count=50) == 1).all()


def test_too_little_to_measure():
    z, labels = torch.randn(20, 3, generator=seeded()), torch.zeros(20, 2, dtype=torch.bool)
    labels[3, 1] = True
    for members in (None, 5):
        found = graph_convexity(z, labels, k=5, generator=seeded(), members=members)
        assert len(found.pairs.cls) == len(found.terms.numerator) == 0


def test_errors_say_what_is_wrong():
    z, labels = torch.randn(20, 3, generator=seeded()), one_hot(np.arange(20) % 2)
    with pytest.raises(ValueError, match="`latents` must differ between samples, got the same for all"):
        graph_convexity(torch.ones(20, 3), labels, generator=seeded())
    with pytest.raises(ValueError, match="`latents` must be finite, got nan"):
        graph_convexity(z.index_fill(0, torch.tensor(3), torch.nan), labels, generator=seeded())
    for k in (0, 20):
        with pytest.raises(ValueError, match=f"`k` must lie between 1 and 19, one less than the samples .*, got {k}"):
            graph_convexity(z, labels, k=k, generator=seeded())
    with pytest.raises(ValueError, match=r"`k` must lie between 1 and 7, one less than the samples .*, got 8"):
        graph_convexity(z, labels, k=8, generator=seeded(), members=4)
    with pytest.raises(ValueError, match="`count` must be at least 1 pair a class, got 0"):
        graph_convexity(z, labels, k=3, count=0, generator=seeded())
    with pytest.raises((ValueError, TypeCheckError), match="labels"):
        graph_convexity(z, labels[1:], generator=seeded())
