"""Density of latents, modalities and drift: the pure functions on the right clips, and cases whose answer is known."""

import math

import numpy as np
import pytest
import torch
from conftest import CLASSES

from robustav.geometry.cuts import FUSED, Cut, pool
from robustav.geometry.density import SET, density_measures, vectors_of
from robustav.geometry.drift import adversarial_measures, against_measures
from robustav.geometry.latents import Latents
from robustav.geometry.measure import score
from robustav.geometry.modalities import modality_measures, overlap_measures
from robustav.metrics import density as pure
from robustav.metrics.intervals import bootstrap_weights
from robustav.metrics.neighbourhood import class_purity, density_and_coverage, hubness, jaccard_purity
from robustav.metrics.neighbours import nearest_within
from robustav.metrics.relative_density import balanced, relative_density, relative_density_strict
from robustav.metrics.spaces import SPACES, matched, principal
from robustav.randomness import draw_for

K = 3
COUNT = 60
LABELS = torch.eye(3, dtype=torch.bool)[torch.arange(COUNT) % 3]
WEIGHTS = bootstrap_weights(COUNT, 20, seed=0)
LATENT = Cut("latent", lambda inputs, trace: {}, lambda parts: parts[FUSED], (FUSED,))
FEATURES = Cut("features", lambda inputs, trace: {}, lambda parts: parts["audio"], ("audio", "visual"), pool)


def made(parts, labels=LABELS, logits=None, ids=None):
    count = len(labels)
    return Latents(
        ids or tuple(f"clip {i}" for i in range(count)),
        labels,
        torch.ones(count, dtype=torch.bool),
        labels.float() if logits is None else logits,
        parts,
        CLASSES,
        "multilabel",
        {},
    )


def clouds(dim=6, apart=3.0, labels=LABELS, seed=0):
    """A round cloud for each class, in the order of the labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = apart * torch.eye(3, dim)
    return labels.float() @ centres + torch.randn(len(labels), dim, generator=generator)


def measured(parts=None, cuts=(LATENT,), labels=LABELS, spaces=("raw",), ks=(K,), seed=0, weights=WEIGHTS, **other):
    latents = made({"latent": {FUSED: clouds()}} if parts is None else parts, labels)
    return density_measures(latents, cuts, weights[:, : len(labels)], spaces=spaces, ks=ks, seed=seed, **other)


def named(measures):
    assert len({m.key for m in measures}) == len(measures)
    return {m.metric: m for m in measures}


def mean_of(terms, owners, below=None):
    below = np.ones(len(owners)) if below is None else np.asarray(below)
    return score(np.asarray(terms, dtype=float), below, np.asarray(owners)[:, None], WEIGHTS)


def test_each_metric_is_the_mean_of_the_pure_function_over_the_classs_clips():
    z = clouds(25).double()  # more axes than kernels get
    labels = LABELS.clone()
    labels[::7, 1] = True  # some clips have two classes
    found = named(measured({"latent": {FUSED: z}}, labels=labels))
    neighbours = nearest_within(z, K).indices
    purity, overlap = class_purity(labels, neighbours), jaccard_purity(labels, neighbours)
    gaussian = pure.SharedGaussian.fit(z, labels).apply(z)
    for c in range(3):
        members = labels[:, c].nonzero().flatten()
        rows = balanced(labels[:, c], draw_for(0, "balanced", str(c)))
        strict = relative_density_strict(z, labels, c, K, generator=draw_for(0, "strict", str(c)))
        dimension = pure.local_dimension(z[members], K)
        spread = float(pure.harmonic_mean(dimension))
        terms = {
            "relative density": (relative_density(z[rows.members], z[rows.others], K), rows.members),
            "relative density, strict": (strict, members),
            "log density": (pure.knn_log_density(z[members], K, dim=spread), members),
            "-log radius": (pure.negative_log_radius(z[members], K), members),
            "entropy": (pure.knn_entropy_terms(z[members], K), members),
            "gaussian density": (gaussian[members, c], members),
            "kernel density": (pure.kde_log_density(principal(z, 20)[members]), members),
            "local dimension": (torch.ones(len(members)), members, 1 / dimension),
            "purity gain": (purity.shares[members, c] - purity.base_rates[c], members),
            "label overlap": (overlap[members], members),
        }
        assert found.keys() == {*terms, "hubness"}
        for metric, given in terms.items():
            expected = mean_of(*given)
            assert found[metric].values[c] == pytest.approx(expected.value, rel=1e-9), metric
            np.testing.assert_allclose(found[metric].resampled[:, c], expected.resampled, rtol=1e-9, err_msg=metric)
            assert found[metric].clips[c] == expected.clips
            assert (found[metric].layer, found[metric].part) == ("latent", FUSED)
            assert (found[metric].space, found[metric].setting) == ("raw", "k=3")
    assert found["hubness"].values == pytest.approx([float(hubness(neighbours, COUNT))])
    assert found["hubness"].names == (SET,)
    assert found["hubness"].clips == [COUNT]
    assert np.isnan(found["hubness"].resampled).all()


def test_classes_that_lie_apart_are_denser_than_the_rest_and_a_mixture_is_not():
    apart, mixed = (named(measured({"latent": {FUSED: clouds(apart=far)}})) for far in (8.0, 0.0))
    assert (apart["relative density"].values > 1).all()
    assert (np.abs(mixed["relative density"].values) < 0.3).all()
    assert (apart["purity gain"].values > 0.6).all()
    assert (apart["label overlap"].values == 1).all()
    assert (np.abs(mixed["purity gain"].values) < 0.3).all()


def test_every_space_and_k_is_measured_in_the_space_that_it_names():
    z = clouds(8)
    told = []
    measures = measured(
        {"latent": {FUSED: z}}, spaces=tuple(SPACES), ks=(2, K), progress=lambda *what: told.append(what)
    )
    densities = [m for m in measures if m.metric == "relative density"]
    assert [(m.space, m.setting) for m in densities] == [(s, f"k={k}") for s in SPACES for k in (2, 3)]
    rows = balanced(LABELS[:, 0], draw_for(0, "balanced", "0"))
    for m in densities:
        x = SPACES[m.space].transform(z)
        expected = relative_density(x[rows.members], x[rows.others], int(m.setting[2:])).mean()
        assert m.values[0] == pytest.approx(float(expected))
    assert {m.space for m in measures if m.metric == "gaussian density"} == {"raw"}
    assert told == [("density", done, 3) for done in range(4)]


@pytest.mark.parametrize(("members", "skipped"), [(14, "14 clips, fewer than 15"), (15, None)])
def test_a_class_of_fewer_than_five_k_clips_is_skipped(members, skipped):
    labels = torch.zeros(COUNT, 3, dtype=torch.bool)
    labels[:, 0], labels[:members, 1], labels[members:, 2] = True, True, True
    found = named(measured({"latent": {FUSED: clouds(labels=labels)}}, labels=labels))
    # Everybody shares a label, so that nobody is a strict rest.
    for metric in found.keys() - {"hubness", "relative density, strict"}:
        measure = found[metric]
        assert measure.skipped["bell"] == "every clip has it: there is no rest to compare with"
        assert measure.skipped.get("clap") == skipped
        assert np.isnan(measure.values[1]) == (skipped is not None)
        assert np.isfinite(measure.values[2])
        assert measure.macro == pytest.approx(np.nanmean(measure.values))


def test_a_rest_too_small_for_neighbours_leaves_relative_density_out():
    labels = torch.zeros(COUNT, 3, dtype=torch.bool)
    labels[2:, 0], labels[:20, 1] = True, True  # two clips without the first class
    found = named(measured({"latent": {FUSED: clouds(labels=labels)}}, labels=labels))
    assert found["relative density"].skipped["bell"] == "nothing to measure: no pair or clip counts"
    assert np.isfinite(found["relative density"].values[1])
    assert np.isfinite(found["entropy"].values[0])


def test_fewer_clips_than_neighbours_is_a_reason():
    labels = LABELS[:3]
    (found,) = measured({"latent": {FUSED: clouds(labels=labels)}}, labels=labels)
    assert found.metric == "relative density"
    assert set(found.skipped.values()) == {"3 clips, fewer than k + 1 = 4"}
    assert found.rows()["value"].isna().all()


def test_silence_has_no_direction_and_is_measured_in_the_other_spaces():
    z = clouds()
    z[7] = 0
    found = measured({"latent": {FUSED: z}}, spaces=("raw", "unit", "whitened"), ks=(2, 3))
    lacking = [m for m in found if m.space == "unit"]
    assert [(m.metric, m.setting) for m in lacking] == [("relative density", "k=2"), ("relative density", "k=3")]
    assert all("sample 7 is all zeros" in reason for m in lacking for reason in m.skipped.values())
    assert all(np.isfinite(m.values).all() for m in found if m.space != "unit")


def test_latents_that_are_all_the_same_have_reasons_for_everything():
    found = measured({"latent": {FUSED: torch.ones(COUNT, 4)}}, spaces=tuple(SPACES))
    assert any("must vary" in reason for m in found if m.space == "whitened" for reason in m.skipped.values())
    for m in found:
        if m.metric not in ("hubness", "purity gain", "label overlap"):
            assert np.isnan(m.values).all(), m.metric
            assert set(m.skipped) == set(CLASSES)


def test_wide_vectors_lose_nothing_in_becoming_as_many_coordinates_as_clips():
    wide, others = clouds(400), clouds(400, seed=1)[:25]
    latents = made({"latent": {FUSED: wide}})
    ((where, beside),) = vectors_of(latents, [LATENT])
    assert beside is None
    assert (where.layer, where.part, where.vectors.shape) == ("latent", FUSED, (COUNT, COUNT))
    ((where, beside),) = vectors_of(latents, [LATENT], made({"latent": {FUSED: others}}, LABELS[:25]))
    assert where.vectors.shape == (COUNT, 85) and beside.shape == (25, 85)
    for one, other, first, second in (
        (where.vectors, where.vectors, wide, wide),
        (where.vectors, beside, wide, others),
        (beside, beside, others, others),
    ):
        torch.testing.assert_close(one @ other.T, first.double() @ second.double().T, rtol=1e-9, atol=1e-9)


def test_metrics_of_wide_vectors_are_those_of_the_vectors_themselves():
    wide = clouds(400, apart=9.0)
    found = measured({"latent": {FUSED: wide}}, spaces=tuple(SPACES))
    for space in SPACES:
        z = SPACES[space].transform(wide)
        here = named([m for m in found if m.space == space])
        for c in range(3):
            members = LABELS[:, c].nonzero().flatten()
            rows = balanced(LABELS[:, c], draw_for(0, "balanced", str(c)))
            expected = relative_density(z[rows.members], z[rows.others], K).mean()
            assert here["relative density"].values[c] == pytest.approx(float(expected), rel=1e-6)
            radius = pure.negative_log_radius(z[members], K).mean()
            assert here["-log radius"].values[c] == pytest.approx(float(radius), rel=1e-6)
            axes = z[:, :20] if space == "whitened" else principal(z, 20)
            kernels = pure.kde_log_density(axes[members]).mean()
            assert here["kernel density"].values[c] == pytest.approx(float(kernels), rel=1e-6)


def test_vectors_no_wider_than_clips_are_left_as_they_are():
    z = clouds(COUNT)
    ((where, _),) = vectors_of(made({"latent": {FUSED: z}}), [LATENT])
    assert torch.equal(where.vectors, z)


def test_parts_are_pooled_where_the_cut_says_so_and_flattened_elsewhere():
    maps = torch.arange(COUNT * 12.0).view(COUNT, 2, 3, 2)
    latents = made({"features": {"audio": maps, "visual": maps}, "latent": {FUSED: maps}})
    found = [where for where, _ in vectors_of(latents, [FEATURES, LATENT])]
    assert [(where.layer, where.part) for where in found] == [
        ("features", "audio"),
        ("features", "visual"),
        ("latent", FUSED),
    ]
    torch.testing.assert_close(found[0].vectors, maps.mean((2, 3)))
    assert torch.equal(found[2].vectors, maps.flatten(1))


def test_layers_are_compared_on_the_same_clips_whatever_the_layer():
    z = clouds(apart=1.0)
    labels = LABELS & (torch.arange(COUNT) < 50)[:, None]  # so that members and rest are both drawn from
    two = {"latent": {FUSED: z}, "features": {"audio": z, "visual": 2 * z}}
    found = measured(two, (LATENT, FEATURES), labels)
    for metric in ("relative density", "relative density, strict", "purity gain", "local dimension"):
        one, other, scaled = [m for m in found if m.metric == metric]
        np.testing.assert_allclose(one.values, other.values)
        np.testing.assert_allclose(one.resampled, scaled.resampled)
        assert (one.where, other.where, scaled.where) == ("latent", "audio features", "visual features")
    again, another = (named(measured({"latent": {FUSED: z}}, labels=labels, seed=seed)) for seed in (0, 1))
    np.testing.assert_array_equal(again["relative density"].values, found[0].values)
    assert (another["relative density"].values != again["relative density"].values).all()
    assert (another["relative density, strict"].values != again["relative density, strict"].values).all()
    np.testing.assert_array_equal(another["entropy"].values, again["entropy"].values)


def modal(audio, visual, fused=None, labels=LABELS, k=K):
    parts = {"features": {"audio": audio, "visual": visual}}
    cuts = [FEATURES]
    if fused is not None:
        parts["latent"], cuts = {FUSED: fused}, [FEATURES, LATENT]
    latents, weights = made(parts, labels), WEIGHTS[:, : len(labels)]
    return modality_measures(latents, cuts, weights, k, seed=0) + overlap_measures(latents, cuts, weights)


def test_modalities_that_are_the_same_have_no_gap_and_fusing_them_adds_nothing():
    z = clouds(5).double()
    found = named(modal(z, 3 * z + 1, -z))  # scale, shift and mirror image do not matter
    np.testing.assert_allclose(found["modality gap"].values, 0, atol=1e-9)
    np.testing.assert_allclose(found["modality gap"].resampled, 0, atol=1e-9)
    np.testing.assert_allclose(found["fusion gain"].values, 0, atol=1e-9)
    np.testing.assert_allclose(found["fusion gain"].resampled, 0, atol=1e-9)


def test_the_modality_whose_classes_lie_apart_has_the_gap_on_its_side():
    apart, mixed = clouds(5, apart=9.0), clouds(9, apart=0.0, seed=1)
    (first, second) = (named(modal(*pair))["modality gap"] for pair in ((apart, mixed), (mixed, apart)))
    assert (first.values > 0.5).all()
    np.testing.assert_allclose(first.values, -second.values)
    assert first.part == "audio - visual"
    assert (first.space, first.setting) == ("matched", "k=3")
    assert first.where == "audio - visual features"


def test_the_gap_is_of_the_same_clips_at_one_scale_and_number_of_axes():
    audio, visual = clouds(5, apart=2.0), clouds(9, apart=1.0, seed=1)
    gap = named(modal(audio, visual))["modality gap"]
    for c in range(3):
        rows = balanced(LABELS[:, c], draw_for(0, "balanced", str(c)))
        one, other = (
            relative_density(z[rows.members], z[rows.others], K) for z in (matched(audio, 5), matched(visual, 5))
        )
        expected = mean_of(one - other, rows.members)
        assert gap.values[c] == pytest.approx(expected.value)
        np.testing.assert_allclose(gap.resampled[:, c], expected.resampled)


def test_fusion_gains_over_the_better_modality_of_each_class():
    def one_apart(c, seed):
        centre = torch.zeros(3, 6)
        centre[c, 0] = 9.0
        return LABELS.float() @ centre + clouds(apart=0.0, seed=seed)

    audio, visual = one_apart(0, 1), one_apart(1, 2)
    better = named(modal(audio, visual, clouds(apart=30.0)))["fusion gain"]
    assert (better.values > 0.5).all()
    worse = named(modal(audio, visual, clouds(apart=0.0)))["fusion gain"]
    assert (worse.values[:2] < -0.5).all()
    # The fused latent is the audio features: nothing gained where they are the better ones, something lost elsewhere.
    same = named(modal(audio, visual, audio))
    gain, gap = same["fusion gain"], same["modality gap"]
    np.testing.assert_allclose(gain.values, np.minimum(gap.values, 0), atol=1e-9)
    assert gain.values[1] < -0.5
    # The better one is chosen once, not on every resample.
    chosen = np.where(gap.values >= 0, 0, gap.resampled)
    np.testing.assert_allclose(gain.resampled, chosen, atol=1e-9)
    assert (gain.layer, gain.part, gain.space) == ("latent", "fused - better modality", "matched")


def test_a_gain_without_a_modality_to_compare_with_says_so():
    copies = clouds().clone()
    copies[LABELS[:, 0]] = 1.0  # every clip of the class is the same in both modalities
    gain = named(modal(copies, copies, clouds()))["fusion gain"]
    assert np.isnan(gain.values[0]) and np.isfinite(gain.values[1:]).all()
    assert gain.skipped == {"bell": "a modality has no relative density"}


def test_a_modality_that_is_the_other_turned_lies_where_it_does():
    z = clouds(6, apart=1.0)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3)))[0]
    found = named(modal(z, z @ rotation))
    assert found["coverage of"].values == pytest.approx([1.0])
    assert found["density in"].values == pytest.approx([1.0])  # k rows in each ball of k, its own among them
    assert found["coverage of"].part == "audio in visual"
    assert found["coverage of"].setting == "k=5, turned onto one another"
    assert found["coverage of"].names == (SET,)
    bent = z.clone()
    bent[:, 0] = bent[:, 0].exp() * 4
    other = named(modal(z, bent @ rotation))
    assert other["coverage of"].values[0] < 0.97
    assert np.isfinite(other["coverage of"].resampled).all()


def test_modalities_are_compared_where_there_are_two_and_enough_clips():
    assert modality_measures(made({"latent": {FUSED: clouds()}}), [LATENT], WEIGHTS, K, 0) == []
    assert overlap_measures(made({"latent": {FUSED: clouds()}}), [LATENT], WEIGHTS) == []
    assert modal(clouds(labels=LABELS[:2]), clouds(labels=LABELS[:2]), labels=LABELS[:2]) == []
    few = modal(clouds(labels=LABELS[:5]), clouds(labels=LABELS[:5], seed=1), labels=LABELS[:5])
    assert [m.metric for m in few] == ["modality gap"]  # no balls of five neighbours
    (copies,) = modal(torch.ones(COUNT, 4), clouds())
    assert all("exact copy" in reason for reason in copies.skipped.values())


def drifting(clean, other, labels=None, logits=None, ids=None, adversarial=True, spaces=("raw",)):
    labels = LABELS[: len(other)] if labels is None else labels
    others = made({"latent": {FUSED: other}}, labels, logits, ids)
    measures = adversarial_measures if adversarial else against_measures
    found = measures(made({"latent": {FUSED: clean}}), others, [LATENT], WEIGHTS, spaces, 0)
    assert len({m.key for m in found}) == len(found)
    return {(m.metric, m.setting.partition(", ")[2], m.space): m for m in found}


OWN, TAKEN = "adversarial in clean of its class", "adversarial in clean of the class it is taken for"


def test_examples_that_did_not_move_cover_their_class():
    z = clouds()
    found = drifting(z, z, spaces=tuple(SPACES))
    for words in (OWN, TAKEN):
        for space in SPACES:
            np.testing.assert_allclose(found["coverage of", words, space].values, 1)
            np.testing.assert_allclose(found["density in", words, space].values, 1)
            assert np.isfinite(found["coverage of", words, space].resampled).all()
    assert found["density in", OWN, "raw"].setting == f"k=5, {OWN}"


def test_examples_far_away_cover_nothing():
    z = clouds()
    found = drifting(z, z + 100)
    for measure in found.values():
        np.testing.assert_array_equal(measure.values, 0)


def test_examples_among_another_class_are_found_where_they_are_taken_for():
    z = clouds(apart=20.0)
    moved = z.roll(-1, 0)  # every clip lies among those of the next class
    found = drifting(z, moved, logits=LABELS.roll(-1, 0).float())
    for metric in ("coverage of", "density in"):
        np.testing.assert_array_equal(found[metric, OWN, "raw"].values, 0)
        np.testing.assert_allclose(found[metric, TAKEN, "raw"].values, 1)


def test_drift_weighs_every_clip_as_often_as_its_own_clean_clip_is_drawn():
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(COUNT, generator=generator)[:40]
    z = clouds(apart=1.0)
    moved = z[order] + 0.7 * torch.randn(40, 6, generator=generator)
    found = drifting(z, moved, LABELS[order], ids=tuple(f"clip {i}" for i in order))
    for c in range(3):
        here = LABELS[order, c]
        terms = density_and_coverage(z[order][here], moved[here], 5)  # of the same clips, clean and attacked
        for metric, expected in (
            ("density in", mean_of(terms.density, order[here])),
            ("coverage of", mean_of(terms.covered, order[here])),
        ):
            measure = found[metric, OWN, "raw"]
            assert 0 < measure.values[c] == pytest.approx(expected.value)
            np.testing.assert_allclose(measure.resampled[:, c], expected.resampled)
            assert (measure.clips[c], measure.units[c]) == (expected.clips, expected.units)


def test_the_class_of_an_example_is_that_of_its_clean_clip():
    """A clip that nobody labelled has, once attacked, only what it is taken for now."""
    z = clouds(apart=20.0)
    found = drifting(z, z.roll(-1, 0), LABELS.roll(-1, 0), logits=LABELS.roll(-1, 0).float())
    np.testing.assert_array_equal(found["coverage of", OWN, "raw"].values, 0)
    np.testing.assert_allclose(found["coverage of", TAKEN, "raw"].values, 1)


def test_examples_are_whitened_like_the_clean_clips():
    z = clouds()
    found = drifting(z, 100 * z, spaces=("whitened", "unit"))
    assert (found["coverage of", OWN, "whitened"].values < 0.3).all()
    np.testing.assert_allclose(found["coverage of", OWN, "unit"].values, 1)


def test_an_example_of_a_clip_that_was_not_surveyed_is_an_error():
    z = clouds()
    with pytest.raises(ValueError, match="clip 'another' is not among the surveyed clips: survey the clips of the run"):
        drifting(z, z[:1], ids=("another",))


def test_a_class_with_too_few_clips_for_balls_is_a_reason():
    labels = torch.zeros(COUNT, 3, dtype=torch.bool)
    labels[:5, 0], labels[5:, 1] = True, True
    z = clouds(labels=labels)
    others = made({"latent": {FUSED: z}}, labels)
    found = adversarial_measures(others, others, [LATENT], WEIGHTS, ("raw",), 0)
    for measure in found:
        assert measure.skipped == {"bell": "5 and 5 clips: too few", "kick": "0 and 0 clips: too few"}
        assert measure.values[1] == pytest.approx(1)


def test_silence_among_examples_leaves_the_space_without_a_measure():
    z = clouds()
    silent = z.clone()
    silent[4] = 0
    found = drifting(z, silent, spaces=("unit", "raw"))
    lacking = found["density in", "", "unit"]
    assert set(lacking.skipped) == set(CLASSES)
    assert all("sample 4 is all zeros" in reason for reason in lacking.skipped.values())
    assert (found["coverage of", OWN, "raw"].values > 0.9).all()


def test_surveyed_clips_are_looked_for_among_those_of_another_split():
    z, generator = clouds(apart=1.0), torch.Generator().manual_seed(5)
    labels = LABELS.roll(1, 0)  # as many of each class
    other = clouds(apart=1.0, labels=labels, seed=8) + 0.1 * torch.randn(COUNT, 6, generator=generator)
    ids = tuple(f"train {i}" for i in range(COUNT))
    found = drifting(z, other, labels, ids=ids, adversarial=False)
    words = "surveyed in the other clips"
    assert found.keys() == {("density in", words, "raw"), ("coverage of", words, "raw")}
    for c in range(3):
        members = LABELS[:, c].nonzero().flatten()
        terms = density_and_coverage(other[labels[:, c]], z[members], 5)
        density, coverage = (found[metric, words, "raw"] for metric in ("density in", "coverage of"))
        expected = mean_of(terms.density, members)
        assert density.values[c] == pytest.approx(expected.value)
        np.testing.assert_allclose(density.resampled[:, c], expected.resampled)
        assert coverage.values[c] == pytest.approx(float(terms.covered.double().mean()))
        assert np.isnan(coverage.resampled).all()  # the other split is not drawn again
        assert (coverage.clips[c], coverage.units[c]) == (int(labels[:, c].sum()),) * 2
    rows = coverage.rows()
    assert rows["low"].isna().all() and rows["value"].notna().all()


def test_a_split_like_the_surveyed_clips_is_covered_as_theory_says():
    labels = torch.eye(3, dtype=torch.bool)[torch.arange(600) % 3]
    z, other = (clouds(3, labels=labels, seed=seed) for seed in (0, 1))
    others = made({"latent": {FUSED: other}}, labels, ids=tuple(f"train {i}" for i in range(600)))
    weights = bootstrap_weights(600, 2, seed=0)
    found = against_measures(made({"latent": {FUSED: z}}, labels), others, [LATENT], weights, ("raw",), 0)
    density, coverage = found
    assert density.macro == pytest.approx(1, abs=0.1)
    assert coverage.macro == pytest.approx(1 - 2**-5, abs=0.03)
    assert math.isnan(coverage.macro_resampled[0])


def test_sets_of_different_sizes_are_compared_as_if_of_one():
    everyone = torch.ones(400, 1, dtype=torch.bool)
    many = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    weights = np.ones((3, 50), dtype=int)

    def latents(z):
        ids = tuple(f"{len(z)}/{i}" for i in range(len(z)))
        return Latents(
            ids, everyone[: len(z)], everyone[: len(z), 0], z[:, :1], {"latent": {FUSED: z}}, ("a",), "multilabel", {}
        )

    few = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    _, coverage = against_measures(latents(few), latents(many), [LATENT], weights, ("raw",), 0)
    assert coverage.values[0] > 0.85  # a tenth of the balls could be reached at all, were all of them counted
