"""Convexity: what theory says of linear heads, regions known by hand, and the published protocol number by number."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from safetensors.torch import load_file
from scipy.integrate import trapezoid
from scipy.stats import pearsonr, spearmanr
from sklearn.datasets import make_moons
from sklearn.metrics import f1_score
from torch import nn

from robustav.metrics.convexity import (
    SIGMAS,
    Terms,
    area,
    both_accepted,
    both_rejected,
    class_scores,
    conditional,
    defect,
    f1_thresholds,
    flip_distances,
    flipped,
    hardened,
    interior,
    li2022,
    log_odds,
    mean_flip,
    segment_lengths,
    soft,
    typical_distance,
)
from robustav.metrics.pairs import Pairs, draw_flip_pairs, draw_pairs, ordered_pairs
from robustav.metrics.segments import Noise, class_margins, end_margins, margins_along, sample_logits, swapped_margins


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def total(terms):
    return (terms.numerator.sum() / terms.denominator.sum()).item()


def measured(finish, z, labels, *, count=200, points=10, label_kind="multilabel", thresholds=0.5, seed=0):
    """Pairs, the margins of their ends, and those of points between them."""
    pairs, options = draw_pairs(labels, count, seeded(seed)), {"label_kind": label_kind, "thresholds": thresholds}
    weights = interior(points).to(z).expand(len(pairs.cls), -1)
    inside = margins_along(finish, {"z": z}, pairs, weights, **options)
    return pairs, end_margins(sample_logits(finish, {"z": z}), pairs, **options), inside


def simulated(seed, classes=4, samples=40, dim=5):
    """Latents, labels and an affine head."""
    generator = seeded(seed)
    z = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    labels = torch.rand(samples, classes, generator=generator) < 0.4
    weight, bias = (torch.randn(classes, size, generator=generator, dtype=torch.float64) for size in (dim, 1))
    return z, labels, lambda parts: parts["z"] @ weight.T + bias.T


# What theory says


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    label_kind=st.sampled_from(["multilabel", "multiclass"]),
    threshold=st.sampled_from([0.1, 0.5, 0.8]),
)
def test_conditional_convexity_of_an_affine_head_is_exactly_one(seed, label_kind, threshold):
    z, labels, head = simulated(seed)
    _, ends, inside = measured(head, z, labels, label_kind=label_kind, thresholds=threshold)
    terms = conditional(ends, inside)
    assert torch.equal(terms.numerator, terms.denominator)
    assert defect(ends, inside).numerator.abs().max() < 1e-12
    quasi = soft(ends, inside)  # the smallest margin is an end's
    expected = torch.where(quasi.denominator > 0, ends.amin(1) / ends.amax(1), 0)
    torch.testing.assert_close(quasi.numerator, expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tau=st.sampled_from([0.1, 0.5, 0.9]))
def test_published_convexity_of_a_linear_head_lies_between_its_recalls(seed, tau):
    z, labels, head = simulated(seed)
    pairs, options = draw_pairs(labels, 100, seeded(seed)), {"label_kind": "multilabel", "thresholds": tau}
    weights = torch.rand(len(pairs.cls), 1, generator=seeded(seed), dtype=torch.float64)
    shares = li2022(margins_along(head, {"z": z}, pairs, weights, **options)).numerator
    ends = end_margins(head({"z": z}), pairs, **options)
    assert (both_accepted(ends).numerator <= shares).all()
    assert (shares <= 1 - both_rejected(ends).numerator).all()


def test_published_convexity_at_the_ends_alone_is_recall():
    z, labels, head = simulated(1)
    pairs = ordered_pairs(labels, 40 * 39)  # every ordered pair, so each clip is first equally often
    options = {"label_kind": "multilabel", "thresholds": 0.3}
    probabilities = head({"z": z}).sigmoid()
    recall = torch.stack([(probabilities[labels[:, c], c] >= 0.3).double().mean() for c in range(4)])
    for end in (0.0, 1.0):
        margins = margins_along(head, {"z": z}, pairs, torch.full((len(pairs.cls), 1), end), **options)
        torch.testing.assert_close(class_scores(li2022(margins), pairs, 4), recall)
    coin = (torch.rand(len(pairs.cls), 1, generator=seeded()) < 0.5).double()
    margins = margins_along(head, {"z": z}, pairs, coin, **options)
    torch.testing.assert_close(class_scores(li2022(margins), pairs, 4), recall, rtol=0, atol=0.1)


def moons_and_blobs(shape):
    """Two classes, and a network that accepts what is nearest to them."""
    if shape == "moons":
        points, y = make_moons(200, noise=0.02, random_state=0)
    else:
        y = np.arange(200) % 2
        points = np.random.default_rng(0).normal(size=(200, 2)) * 0.2 + 3 * y[:, None]
    z, y = torch.tensor(points), torch.tensor(y)

    def finish(parts):
        near = -(torch.cdist(parts["z"], z) ** 2) / 0.02
        return torch.stack([near[:, y == c].logsumexp(1) for c in (0, 1)], dim=1)

    return z, nn.functional.one_hot(y, 2).bool(), finish


def test_moons_are_not_convex_and_blobs_are():
    scores = {}
    for shape in ("moons", "blobs"):
        z, labels, finish = moons_and_blobs(shape)
        pairs, ends, inside = measured(finish, z, labels, label_kind="multiclass")
        assert total(both_accepted(ends)) == 1
        scores[shape] = [class_scores(f(ends, inside), pairs, 2) for f in (conditional, soft, defect)]
    assert (scores["blobs"][0] == 1).all() and (scores["moons"][0] < 0.95).all()
    assert (scores["moons"][1] < scores["blobs"][1]).all()
    assert (scores["moons"][2] > 10 * scores["blobs"][2]).all()


def test_exclusive_or_by_hand():
    # Accepted where both coordinates have one sign. From (-2, -1) to (1, 2) that fails between 1/3 and 2/3 of the way:
    # at 4, 5, 6 and 7 elevenths; the smallest of the ten margins is (-4/11) * (7/11), and both ends' are 2.
    z, labels = torch.tensor([[1.0, 2.0], [-2.0, -1.0]]).double(), torch.ones(2, 1, dtype=torch.bool)
    _, ends, inside = measured(lambda parts: parts["z"].prod(1, keepdim=True), z, labels)
    assert (ends == 2).all()
    assert total(conditional(ends, inside)) == pytest.approx(0.6)
    assert total(soft(ends, inside)) == pytest.approx(-28 / 121 / 2)
    assert total(defect(ends, inside)) == pytest.approx((2 + 28 / 121) / 2)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_ranges_and_symmetry(seed):
    ends = torch.randn(50, 2, generator=seeded(seed)) + 0.5
    inside = torch.randn(50, 6, generator=seeded(seed + 1)) + 0.5
    for of in (conditional, soft, defect):
        terms, turned = of(ends, inside), of(ends.flip(1), inside.flip(1))
        torch.testing.assert_close(terms, turned)
        counted = terms.denominator > 0
        assert torch.equal(counted, (ends >= 0).all(1))
        assert (terms.numerator[~counted] == 0).all()
        if of is not defect:
            assert (terms.numerator <= terms.denominator).all()
        if of is not soft:
            assert (terms.numerator >= 0).all()


def test_a_margin_of_nothing_is_accepted():
    nothing = torch.zeros(1, 2)
    for terms in (conditional(nothing, nothing), li2022(nothing), both_accepted(nothing), hardened(nothing)):
        assert total(terms) == 1
    assert total(both_rejected(nothing)) == 0


def test_soft_leaves_out_pairs_without_a_margin():
    terms = soft(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.tensor([[-1.0], [0.5]]))
    assert terms.denominator.tolist() == [0, 1] and terms.numerator.tolist() == [0, 0]


# Noise


def test_hardened_convexity_falls_with_noise():
    z, labels, head = simulated(2, samples=80)
    pairs = draw_pairs(labels, 500, seeded())
    unit = typical_distance(z)
    ends = end_margins(head({"z": z}), pairs, label_kind="multilabel")
    half = torch.full((len(pairs.cls), 1), 0.5)
    plain, given_ends = [], []
    for sigma in (*SIGMAS, 50.0):
        noise = Noise({"z": sigma * unit}, seeded(1))
        noisy = margins_along(head, {"z": z}, pairs, half, label_kind="multilabel", noise=noise)
        plain.append(hardened(noisy))
        given_ends.append(hardened(noisy, ends))
    shares = [total(terms) for terms in given_ends]
    assert shares == sorted(shares, reverse=True) and shares[0] < 1 and shares[-1] == pytest.approx(0.5, abs=0.1)
    assert all(total(terms) < share for terms, share in zip(plain[:2], shares[:2], strict=True))
    assert shares[3] < total(area(given_ends[:4])) < shares[0]
    assert torch.equal(plain[0].numerator, (noisy_at(head, z, pairs, SIGMAS[0] * unit) >= 0).double())


def noisy_at(head, z, pairs, scale):
    """Another route to the noisy midpoints."""
    noise = torch.randn(len(pairs.cls), z.shape[1], generator=seeded(1), dtype=z.dtype)
    points = (z[pairs.first] + z[pairs.second]) / 2 + scale * noise / z.shape[1] ** 0.5
    return head({"z": points}).gather(1, pairs.cls[:, None]).squeeze(1)


def test_hardened_convexity_of_a_half_space_is_that_of_a_normal_distribution():
    # All clips at distance 1 from the plane, the noise across it normal with deviation sigma / sqrt(dim).
    z = torch.cat([torch.ones(2000, 1), torch.randn(2000, 3, generator=seeded())], dim=1)
    pairs = draw_pairs(torch.ones(2000, 1, dtype=torch.bool), 20_000, seeded())
    half = torch.full((20_000, 1), 0.5)
    for sigma in (1.0, 2.0, 4.0):
        noise = Noise({"z": sigma}, seeded(1))
        noisy = margins_along(
            lambda parts: parts["z"][:, :1], {"z": z}, pairs, half, label_kind="multilabel", noise=noise
        )
        expected = torch.distributions.Normal(0, 1).cdf(torch.tensor(2 / sigma)).item()
        assert total(hardened(noisy)) == pytest.approx(expected, abs=0.01)


def test_area_is_the_mean_height_of_a_broken_line():
    flat = [Terms(torch.full((3,), 0.25), torch.ones(3))] * 4
    torch.testing.assert_close(area(flat).numerator, torch.full((3,), 0.25))
    heights = np.random.default_rng(0).random(4)
    terms = [Terms(torch.tensor([height]), torch.ones(1, dtype=torch.float64)) for height in heights]
    assert area(terms).numerator.item() == pytest.approx(trapezoid(heights, SIGMAS) / 3.5)
    line = [Terms(torch.tensor([1 - sigma / 4]), torch.ones(1)) for sigma in SIGMAS]
    assert area(line).numerator.item() == pytest.approx(1 - 2.25 / 4)


def test_area_needs_rising_sigmas_and_the_same_pairs():
    terms = [Terms(torch.ones(2), torch.ones(2))] * 2
    for sigmas in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0, 3.0)):
        with pytest.raises(ValueError, match="`sigmas` must rise, one for each of the 2 terms and two at least, got"):
            area(terms, sigmas)
    with pytest.raises(ValueError, match="`sigmas` must rise, one for each of the 1 terms and two at least"):
        area(terms[:1], (1.0,))
    with pytest.raises(ValueError, match="`terms` must come from the same pairs at every sigma"):
        area([terms[0], Terms(torch.ones(2), torch.zeros(2))], (1.0, 2.0))


def test_typical_distance():
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(5.0)) * 3
    assert typical_distance(grid) == 3
    assert typical_distance(grid.reshape(20, 2, 1)) == 3
    assert typical_distance(torch.tensor([[0.0], [1.0], [5.0], [9.0]])) == 2.5
    for copies in (torch.ones(6, 2), torch.cat([torch.ones(4, 2), torch.eye(2)])):
        with pytest.raises(
            ValueError, match="`part` must differ between samples, got half of them or more with a copy"
        ):
            typical_distance(copies)
    with pytest.raises(ValueError, match="`part` must be finite, got nan"):
        typical_distance(torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="`part` must have at least two samples, got 1"):
        typical_distance(torch.ones(1, 2))


# Flips


def test_flip_distance_to_a_plane():
    # Along a straight way to the other side, margins fall evenly: the plane is at margin_i / (margin_i - margin_j).
    z, labels, _ = simulated(4, classes=2)
    normal = torch.tensor([3.0, 0, 4, 0, 0], dtype=torch.float64) / 5
    labels = torch.stack([z @ normal > 0.2, z @ normal > -5], dim=1)  # the second class holds everyone
    pairs = draw_flip_pairs(labels, 300, seeded())
    assert (pairs.cls == 0).all()
    steps = torch.linspace(0, 1, 7).double()
    margins = margins_along(
        lambda parts: parts["z"] @ normal[:, None] - 0.2,
        {"z": z},
        pairs,
        (1 - steps).expand(300, -1),
        label_kind="multilabel",
    )
    unit = typical_distance(z)
    distances = flip_distances(margins, steps, segment_lengths({"z": z}, pairs, {"z": unit}))
    inner, outer = z[pairs.first] @ normal - 0.2, z[pairs.second] @ normal - 0.2
    length = (z[pairs.first] - z[pairs.second]).norm(dim=1)
    torch.testing.assert_close(distances, length * inner / (inner - outer) / unit)
    cosine = (inner - outer) / length
    torch.testing.assert_close(distances * cosine * unit, inner)  # the distance to the plane itself
    assert total(flipped(distances)) == 1
    assert total(mean_flip(distances, length)) == pytest.approx(distances.mean().item())


def test_first_flip_counts_and_censored_segments_are_said():
    steps = torch.tensor([0.0, 0.25, 0.5, 1.0])
    margins = torch.tensor(
        [
            [1.0, -1.0, 1.0, -3.0],  # at 1/8, though accepted again later
            [1.0, 2.0, 0.0, -2.0],  # leaves at 1/2, where 0 is still accepted
            [1.0, 1.0, 1.0, 0.0],  # never
            [-1.0, 1.0, 1.0, -1.0],  # not even the clip itself
        ]
    )
    lengths = torch.tensor([8.0, 2.0, 5.0, 1.0])
    distances = flip_distances(margins, steps, lengths)
    torch.testing.assert_close(distances, torch.tensor([1.0, 1.0, torch.inf, torch.nan]), equal_nan=True)
    assert total(flipped(distances)) == pytest.approx(2 / 3)
    assert total(mean_flip(distances, lengths)) == pytest.approx((1 + 1 + 5) / 2)
    assert flip_distances(margins[2:3], steps, torch.zeros(1)).item() == np.inf
    for wrong in ([0.0, 0.5, 0.5, 1.0], [0.1, 0.2, 0.3, 0.4]):
        with pytest.raises(ValueError, match="`steps` must rise from 0, one for each of 4 points, got"):
            flip_distances(margins, torch.tensor(wrong), lengths)
    with pytest.raises((ValueError, TypeCheckError), match="steps"):
        flip_distances(margins, torch.tensor([0.0, 1.0]), lengths)


def test_lengths_add_up_over_parts_in_their_own_units():
    z = torch.randn(9, 2, 3, generator=seeded())
    pairs = draw_pairs(torch.ones(9, 1, dtype=torch.bool), 20, seeded())
    whole = segment_lengths({"z": z}, pairs, {"z": 2.0})
    torch.testing.assert_close(whole, (z[pairs.first] - z[pairs.second]).flatten(1).norm(dim=1) / 2)
    halves = {"a": z[:, 0], "b": z[:, 1], "c": z[:, 1]}
    torch.testing.assert_close(segment_lengths(halves, pairs, {"a": 2.0, "b": 2.0}), whole)
    for units in ({}, {"d": 1.0}):
        with pytest.raises(ValueError, match=r"`units` must name parts among \['a', 'b', 'c'\], at least one, got"):
            segment_lengths(halves, pairs, units)


# Modalities


def test_modality_by_modality_finds_the_one_that_bends():
    # Accepted where the sound is far from 0 on either side, and the picture on one: only sounds make a hole.
    generator = seeded()
    sound = torch.randn(200, 1, generator=generator).sign() * (2 + torch.rand(200, 1, generator=generator))
    parts = {"audio": sound, "visual": 1 + torch.rand(200, 1, generator=generator)}
    finish = lambda given: torch.minimum(given["audio"].abs() - 1, given["visual"])  # noqa: E731
    pairs = draw_pairs(torch.ones(200, 1, dtype=torch.bool), 500, generator)
    ends = end_margins(sample_logits(finish, parts), pairs, label_kind="multilabel")
    weights = interior().expand(500, -1)
    scores = {
        mixed: total(
            conditional(ends, margins_along(finish, parts, pairs, weights, label_kind="multilabel", mixed=mixed))
        )
        for mixed in (("audio",), ("visual",), ("audio", "visual"))
    }
    assert scores["visual",] == 1 and scores["audio",] == scores["audio", "visual"] < 0.9
    swapped = swapped_margins(finish, parts, pairs, ["visual"], label_kind="multilabel")
    assert total(conditional(ends, swapped[:, None])) == 1


# Sums over pairs


def test_clip_weights_count_pairs_as_copies_of_the_clips_would():
    z, labels, head = simulated(5)
    pairs, ends, inside = measured(lambda parts: head(parts) + parts["z"].square().sum(1, keepdim=True), z, labels)
    weights = torch.randint(0, 3, (len(z),), generator=seeded())
    copies = weights[pairs.first] * weights[pairs.second]
    again = Pairs(*(field.repeat_interleave(copies) for field in pairs))
    for of in (conditional, soft, defect):
        terms = of(ends, inside)
        repeated = Terms(*(term.repeat_interleave(copies) for term in terms))
        torch.testing.assert_close(class_scores(terms, pairs, 4, weights), class_scores(repeated, again, 4))
        halved = class_scores(terms, pairs, 4, torch.full((len(z),), 0.5))
        torch.testing.assert_close(halved, class_scores(terms, pairs, 4))


def test_classes_without_accepted_pairs_have_no_score():
    z, labels, head = simulated(6)
    pairs, ends, inside = measured(head, z, labels, thresholds=torch.tensor([0.5, 1.0, 0.5, 0.5]))
    scores = class_scores(conditional(ends, inside), pairs, 5)
    assert scores.isnan().tolist() == [False, True, False, False, True]


# Thresholds


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), decimals=st.sampled_from([0, 1, 6]), share=st.sampled_from([0.05, 0.5, 0.95]))
def test_f1_thresholds_are_the_best_there_are(seed, decimals, share):
    generator = np.random.default_rng(seed)
    labels = generator.random((30, 4)) < share
    logits = (2 * generator.normal(size=(30, 4)) + labels).round(decimals)
    labels[0, :3], labels[:, 3] = True, False
    thresholds = f1_thresholds(torch.tensor(logits), torch.tensor(labels))
    assert thresholds[3].isnan()
    for c in range(3):
        cls = torch.full((30,), c)
        accepted = class_margins(torch.tensor(logits), cls, thresholds, "multilabel") >= 0
        cuts = logits[:, c] >= np.unique(logits[:, c])[:, None]
        every = 2 * (cuts & labels[:, c]).sum(1) / (cuts.sum(1) + labels[:, c].sum())
        assert f1_score(labels[:, c], accepted.numpy()) == pytest.approx(max(every), abs=1e-12)


def test_f1_thresholds_by_hand():
    logits = torch.tensor([[3.0], [1.0], [1.0], [-2.0], [-60.0]])
    found = [
        f1_thresholds(logits, torch.tensor(labels)[:, None] > 0).logit().item()
        for labels in ([1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1])
    ]
    assert found == pytest.approx([2.0, -0.5, -0.5, -61.0])
    assert f1_thresholds(torch.tensor([[90.0], [80.0]]), torch.tensor([[True], [False]])) < 1


def test_f1_thresholds_need_matching_numbers():
    with pytest.raises((ValueError, TypeCheckError), match="labels"):
        f1_thresholds(torch.zeros(3, 2), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`labels` must be \[0, 2\] like `logits`, not empty, got \[0, 2\]"):
        f1_thresholds(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="`logits` must be numbers, got nan in 6 places"):
        f1_thresholds(torch.full((3, 2), torch.nan), torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="`count` must be at least 1 point, got 0"):
        interior(0)


def test_log_odds_are_logits_of_the_softmax():
    logits = 4 * torch.randn(50, 6, generator=seeded(), dtype=torch.float64)
    torch.testing.assert_close(log_odds(logits), logits.softmax(1).logit())


# As published


def attention_pooling(state):
    """Frames [clip, frame, dim] to logits: frame probabilities weighed by a softmax over time, per class."""

    def finish(parts):
        frames = parts["fused"]
        probabilities = (frames @ state["state.fc_prob.weight"].T + state["state.fc_prob.bias"]).sigmoid()
        attention = (frames @ state["state.fc_att.weight"].T + state["state.fc_att.bias"]).softmax(1)
        return (probabilities.clamp(1e-7, 1 - 1e-7) * attention).sum(1).logit()

    return finish


def test_published_protocol(shared):
    fixtures = shared / "reference" / "fixtures"
    published, state = (load_file(fixtures / f"{name}.safetensors") for name in ("protocol_convexity", "mmtlf"))
    fused, finish = published["in.bottleneck"], attention_pooling(state)
    draws = torch.tensor(np.random.RandomState(11).uniform(0, 1, 40), dtype=torch.float32)

    # The points: a class for each of their values gives them back.
    pairs = ordered_pairs(torch.ones(len(fused), fused[0].numel(), dtype=torch.bool), 40)
    values = margins_along(
        lambda parts: parts["fused"].flatten(1),
        {"fused": fused},
        pairs,
        draws.repeat(fused[0].numel())[:, None],
        label_kind="multilabel",
    )
    points = values.view(-1, 40).T.reshape(40, *fused.shape[1:])
    torch.testing.assert_close(points, published["out.interpolated"], rtol=0, atol=1e-4)

    # All classes at these points.
    logits = sample_logits(finish, {"fused": points})
    torch.testing.assert_close(logits.sigmoid(), published["out.prob"], rtol=0, atol=1e-4)
    cls = torch.arange(logits.shape[1])
    accepted = torch.stack(
        [li2022(class_margins(row.expand(len(cls), -1), cls, 0.1, "multilabel")[:, None])[0] for row in logits]
    )
    torch.testing.assert_close(accepted.mean(0), published["out.share"], rtol=0, atol=1e-4)

    # Every fifth class from its pairs to its share.
    labels = torch.zeros(len(fused), len(cls), dtype=torch.bool)
    labels[:, ::5] = True
    pairs = ordered_pairs(labels, 40)
    weights = draws.repeat(len(cls[::5]))[:, None]
    margins = margins_along(finish, {"fused": fused}, pairs, weights, label_kind="multilabel", thresholds=0.1)
    shares = class_scores(li2022(margins), pairs, len(cls))[::5]
    torch.testing.assert_close(shares, published["out.share"][::5].double(), rtol=0, atol=1e-4)


def test_published_rows(shared):
    published = json.loads((shared / "reference" / "fixtures" / "protocol_convexity_published.json").read_text())
    _, accepted, points, clips = np.array(published["rows"]).T
    shares = accepted / points
    assert (points == 2000).all() and len(shares) == 527
    assert pearsonr(np.log(clips), shares).statistic == pytest.approx(published["pearson_log_count_vs_share"], abs=1e-9)
    assert pearsonr(np.log(clips), shares).statistic == pytest.approx(0.3497, abs=5e-5)
    assert spearmanr(clips, shares).statistic == pytest.approx(0.288, abs=5e-4)
    assert shares.mean() == pytest.approx(0.286, abs=5e-4) and np.median(shares) == pytest.approx(0.217, abs=1e-3)
    assert (shares == 0).sum() == 34 and (shares > 0.9).sum() == 7
