"""Convexity of a survey: known exactly for linear models and for one that is bent; modalities, noise, flips, graphs."""

import math

import numpy as np
import pytest
import torch
from conftest import Linear, TinySamples, tiny_fusion
from torch import nn

import robustav.geometry.survey as survey_module
from robustav.classifier import InputSpec, LateFusion
from robustav.data.samples import Sample
from robustav.geometry.convexity import ARG_MAX, F1, TAU, Segments, convexity_measures
from robustav.geometry.cuts import FUSED
from robustav.geometry.measure import score
from robustav.geometry.survey import Survey
from robustav.metrics.convexity import f1_thresholds, typical_distance
from robustav.metrics.graph import graph_convexity
from robustav.metrics.pairs import draw_flip_pairs, draw_pairs
from robustav.randomness import draw_for

SPECS = {"audio": InputSpec((4,), -1.0, 1.0, "volt"), "visual": InputSpec((5,), -1.0, 1.0, "pixel")}
LAYERS = ("input", "features", "latent")
FEW = Segments(pairs=40, k=2)
LINES = torch.arange(1, 11) / 11  # weights of the first clip at the ten points between two


class Clips:
    """Given inputs and labels; or random ones, labelled as the model would have it, some of them wrongly."""

    def __init__(self, inputs, labels, classes, label_kind="multilabel"):
        self.name, self.digest, self.label_kind, self.classes = "clips", "0" * 64, label_kind, classes
        self.inputs, self.labels = inputs, labels
        self.ids = tuple(f"clip {i}" for i in range(len(labels)))

    def load(self, index):
        labels = self.labels[index]
        labels = labels.long().argmax() if self.label_kind == "multiclass" else labels.float()
        return Sample(self.ids[index], {m: x[index] for m, x in self.inputs.items()}, labels)


def random_clips(model, count=36):
    generator = torch.Generator().manual_seed(11)
    inputs = {m: torch.rand(count, *s.shape, generator=generator) * 1.8 - 0.9 for m, s in model.specs.items()}
    with torch.no_grad():
        logits = model(inputs)
    if model.label_kind == "multiclass":
        return Clips(inputs, nn.functional.one_hot(logits.argmax(1).roll(1), 3), model.classes, "multiclass")
    flipped = torch.rand(logits.shape, generator=generator) < 0.2
    return Clips(inputs, (logits >= 0) ^ flipped, model.classes)


def linear(label_kind="multilabel"):
    model = Linear(SPECS, 3).eval()
    model.label_kind = label_kind
    return model


class Bent(nn.Module):
    """|x| of the sum of the first two values: what is accepted lies on both sides of a strip."""

    def forward(self, x):
        return torch.stack([(x[:, 0] + x[:, 1]).abs(), 0.3 - (x[:, 0] + x[:, 1]).abs()], dim=1)


class First(nn.Module):
    """Scores are the first encoder's features, less 0.7 for the first class."""

    def forward(self, latent):
        return latent[:, :2] - latent.new_tensor([0.7, 0.0])


def bent():
    """Two classes by the audio's |x0 + x1|; the picture is ignored."""
    encoders = {"audio": Bent(), "visual": nn.Flatten()}
    return LateFusion(encoders, First(), specs=SPECS, classes=("far", "near")).eval()


def bent_clips():
    """Two clips of the first class, on either side; the rest of the second, in between."""
    generator = torch.Generator().manual_seed(2)
    audio, visual = (0.1 * torch.rand(14, n, generator=generator) for n in (4, 5))
    audio[0], audio[1] = 0.5, -0.5
    labels = torch.zeros(14, 2, dtype=torch.bool)
    labels[:2, 0], labels[2:, 1] = True, True
    return Clips({"audio": audio, "visual": visual}, labels, ("far", "near"))


@pytest.fixture
def surveyed(monkeypatch):
    """A view of a model's clips and every measure of it."""

    def survey(model, samples=None, how=FEW, layers=LAYERS, resamples=20, batch_size=64, **settings):
        clips = samples or random_clips(model)
        monkeypatch.setattr(survey_module, "load_samples", lambda *_: (clips, None))
        with Survey(
            model=model, layers=layers, resamples=resamples, batch_size=batch_size, device="cpu", **settings
        ).opened() as view:
            measures = convexity_measures(view, how)
        assert len({m.key for m in measures}) == len(measures)
        return view, {(m.metric, m.layer, m.part, m.setting): m for m in measures}

    return survey


def only(measures, metric, **where):
    return [m for m in measures.values() if m.metric == metric and all(getattr(m, k) == v for k, v in where.items())]


def same(one, other):
    assert one.keys() == other.keys()
    for key, measure in one.items():
        np.testing.assert_allclose(measure.values, other[key].values, rtol=1e-4, atol=1e-4, err_msg=str(key))
        np.testing.assert_allclose(measure.resampled, other[key].resampled, rtol=1e-4, atol=1e-4, err_msg=str(key))


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_a_linear_model_is_convex_everywhere(surveyed, kind):
    """Proposition 1: whatever lies between two accepted points is accepted, at every cut and whatever is mixed."""
    _, measures = surveyed(linear(kind))
    convex = only(measures, "conditional convexity")
    assert len(convex) == (2 if kind == "multilabel" else 1) * (3 + 3 + 1)
    for measure in convex:
        present = ~np.isnan(measure.values)
        assert present.any()
        np.testing.assert_array_equal(measure.values[present], 1)
    for measure in only(measures, "convexity defect"):
        np.testing.assert_allclose(measure.values[~np.isnan(measure.values)], 0, atol=1e-5)
    for measure in only(measures, "soft convexity"):
        assert (measure.values[~np.isnan(measure.values)] < 1).all()


def test_published_convexity_of_a_linear_model_lies_between_what_its_ends_allow(surveyed):
    _, measures = surveyed(linear())
    seen = 0
    for published in only(measures, "published convexity"):
        accepted, rejected = (
            measures[f"both ends {word}", published.layer, published.part, f"tau={TAU:g}"]
            for word in ("accepted", "rejected")
        )
        for low, value, high in (
            (accepted.values, published.values, 1 - rejected.values),
            (accepted.resampled, published.resampled, 1 - rejected.resampled),
        ):
            present = ~np.isnan(value)
            assert (low[present] <= value[present] + 1e-12).all() and (value[present] <= high[present] + 1e-12).all()
        seen += int((accepted.values < published.values).any() and (published.values < 1 - rejected.values).any())
    assert seen >= 3  # no bound is met by being an end


def test_what_is_between_the_two_sides_of_a_bent_region_is_rejected(surveyed):
    """All pairs join (0.5, 0.5) and (-0.5, -0.5); |sum| is |2 w - 1|, at least 0.7 for the two outermost points alone."""
    _, measures = surveyed(bent(), bent_clips())
    along = (2 * LINES - 1).abs() - 0.7
    for part in ("audio", "audio+visual"):
        where = ("input", part, "t=0.5")
        assert measures[("conditional convexity", *where)].values[0] == pytest.approx(0.2)
        assert measures[("soft convexity", *where)].values[0] == pytest.approx(float(along.min()) / 0.3, rel=1e-4)
        assert measures[("convexity defect", *where)].values[0] == pytest.approx(
            float(0.3 - along.min()) / 0.3, rel=1e-4
        )
        drawn = measures[("conditional convexity", *where)].resampled[:, 0]
        np.testing.assert_allclose(drawn[~np.isnan(drawn)], 0.2)
    for part in (("features", "audio"), ("features", "audio+visual"), ("latent", FUSED)):
        assert measures[("conditional convexity", *part, "t=0.5")].values[0] == 1  # above the bend
    published = measures["published convexity", "input", "audio", "tau=0.1"]
    assert published.values[0] == 1  # at 0.1 the strip itself is accepted: log odds of -2.2


def test_a_modality_that_the_model_ignores_is_convex_on_its_own(surveyed):
    _, measures = surveyed(bent(), bent_clips())
    for metric in ("conditional convexity", "soft convexity", "convexity defect", "published convexity"):
        for one in only(measures, metric, layer="input", part="audio"):
            both = measures[metric, "input", "audio+visual", one.setting]
            np.testing.assert_allclose(one.values, both.values, rtol=1e-5, atol=1e-6)
            if metric == "conditional convexity":
                ignored = measures[metric, "input", "visual", one.setting]
                np.testing.assert_array_equal(ignored.values, 1)
                assert one.values[0] < 0.5


def test_every_set_of_modalities_is_mixed_where_there_are_parts(surveyed):
    _, measures = surveyed(linear(), layers=(*LAYERS, "front end"))
    for metric, parts in (
        ("conditional convexity", ["audio", "visual", "audio+visual"]),
        ("published convexity", ["audio", "visual", "audio+visual"]),
        ("both ends rejected", ["audio", "visual", "audio+visual"]),
        ("mismatch consistency", ["audio+visual"]),
        ("hardened convexity, area", ["audio+visual"]),
        ("flip distance", ["audio+visual"]),
        ("flipped segments", ["audio+visual"]),
    ):
        for layer in ("input", "features"):
            assert list(dict.fromkeys(m.part for m in only(measures, metric, layer=layer))) == parts
    assert {m.part for m in measures.values() if m.layer == "latent"} == {FUSED}
    assert not only(measures, "mismatch consistency", layer="latent")


def test_three_modalities_have_seven_sets(surveyed):
    specs = {m: InputSpec((3,), -1.0, 1.0, "volt") for m in ("audio", "touch", "visual")}
    _, measures = surveyed(Linear(specs, 3).eval(), layers=("input",))
    assert [m.part for m in only(measures, "conditional convexity", setting="t=0.5")] == [
        "audio", "touch", "visual", "audio+touch", "audio+visual", "touch+visual", "audio+touch+visual",
    ]  # fmt: skip
    (mismatch,) = only(measures, "mismatch consistency", setting="t=0.5")
    assert mismatch.part == "audio+touch+visual"


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_every_measure_between_clips_follows_from_its_definition(surveyed, kind):
    """A second route: each pair's points through the whole model, one class and one term at a time."""
    model, t = linear(kind), 0.3
    view, measures = surveyed(model, layers=("input",), threshold=t)
    clips, labels, logits = view.samples, view.latents.labels, view.latents.logits
    pairs = draw_pairs(labels, 40, draw_for(0, "pairs"))
    first, second, cls = pairs
    random = torch.rand(len(cls), generator=draw_for(0, "points"))

    def mixed(weight, audio=True, visual=True):
        weights = {"audio": weight if audio else 1.0, "visual": weight if visual else 1.0}
        inputs = {
            m: torch.as_tensor(weights[m]).reshape(-1, 1) * x[first]
            + (1 - torch.as_tensor(weights[m]).reshape(-1, 1)) * x[second]
            for m, x in clips.inputs.items()
        }
        with torch.no_grad():
            return model(inputs)

    def margin(logits, threshold):
        rows = torch.arange(len(logits))
        if kind == "multilabel":
            threshold = torch.as_tensor(threshold, dtype=torch.float64)
            return logits[rows, cls] - torch.logit(threshold[cls] if threshold.ndim else threshold)
        others = logits.clone()
        others[rows, cls] = -torch.inf
        return logits[rows, cls] - others.amax(1)

    def probability(logits):
        found = logits.sigmoid() if kind == "multilabel" else logits.softmax(1)
        return found[torch.arange(len(logits)), cls]

    def check(metric, part, setting, numerator, denominator):
        measure = measures[metric, "input", part, setting]
        for c in range(3):
            rows = (cls == c).numpy()
            owners = torch.stack([first, second], 1).numpy()[rows]
            below = denominator.double().numpy()[rows] if torch.is_tensor(denominator) else np.ones(rows.sum())
            expected = score(numerator.double().numpy()[rows], below, owners, view.weights)
            assert measure.values[c] == pytest.approx(expected.value, abs=1e-5, nan_ok=True), measure.key
            np.testing.assert_allclose(measure.resampled[:, c], expected.resampled, atol=1e-5, err_msg=measure.key)

    thresholds = {f"t={t:g}" if kind == "multilabel" else ARG_MAX: t}
    if kind == "multilabel":
        thresholds[f"t={F1}"] = f1_thresholds(logits, labels)
    for part in ("audio", "visual", "audio+visual"):
        which = {"audio": "audio" in part, "visual": "visual" in part}
        published = probability(mixed(random, **which)) >= TAU
        ends_of_part = logits[first], mixed(0.0, **which)
        accepted = [probability(end) >= TAU for end in ends_of_part]
        check("published convexity", part, "tau=0.1", published, None)
        check("both ends accepted", part, "tau=0.1", accepted[0] & accepted[1], None)
        if kind == "multilabel":
            check("both ends rejected", part, "tau=0.1", ~accepted[0] & ~accepted[1], None)
        for setting, threshold in thresholds.items():
            ends = torch.stack([margin(end, threshold) for end in ends_of_part], 1)
            inside = torch.stack([margin(mixed(weight, **which), threshold) for weight in LINES], 1)
            both = (ends >= 0).all(1)
            check("conditional convexity", part, setting, (inside >= 0).double().mean(1) * both, both)
            lowest = torch.minimum(inside.amin(1), ends.amin(1))
            check("soft convexity", part, setting, torch.where(both, lowest / ends.amax(1), 0), both)
            fall = (ends.amin(1) - inside.amin(1)).clamp(min=0)
            check("convexity defect", part, setting, fall * both, ends.mean(1) * both)
            if part == "audio":
                swapped = margin(mixed(0.0, audio=False), threshold)  # the first one's audio, the second one's picture
                clips_accepted = (margin(logits[first], threshold) >= 0) & (margin(logits[second], threshold) >= 0)
                check("mismatch consistency", "audio+visual", setting, (swapped >= 0) & clips_accepted, clips_accepted)


def test_noise_is_as_large_as_it_says(surveyed):
    """In the latent of a linear model a class's logit is one coordinate, moved by normal noise of a known size."""
    sigmas = (0.0, 1.0, 3.0)
    view, measures = surveyed(linear(), layers=("latent",), how=Segments(pairs=4000, sigmas=sigmas))
    latent, labels = view.latents.parts["latent"][FUSED].double(), view.latents.labels
    pairs = draw_pairs(labels, 4000, draw_for(0, "pairs"))
    rows = torch.arange(len(pairs.cls))
    middle = ((latent[pairs.first] + latent[pairs.second]) / 2)[rows, pairs.cls]
    accepted = (latent[pairs.first, pairs.cls] >= 0) & (latent[pairs.second, pairs.cls] >= 0)
    unit = typical_distance(latent) / math.sqrt(3)
    heights = {True: [], False: []}
    for sigma in sigmas:
        share = (middle >= 0).double() if sigma == 0 else torch.special.ndtr(middle / (sigma * unit))
        expected = torch.stack([share[pairs.cls == c].mean() for c in range(3)])
        measure = measures["hardened convexity", "latent", FUSED, f"t=0.5, sigma={sigma:g}"]
        np.testing.assert_allclose(measure.values, expected, atol=1e-6 if sigma == 0 else 0.03)
        heights[False].append(measure.values)
        heights[True].append(torch.stack([share[(pairs.cls == c) & accepted].mean() for c in range(3)]).numpy())
    for given, metric in (
        (False, "hardened convexity, area"),
        (True, "hardened convexity given accepted, area"),
    ):
        low, middle_, high = heights[given]
        area = ((low + middle_) / 2 * 1 + (middle_ + high) / 2 * 2) / 3
        np.testing.assert_allclose(
            measures[metric, "latent", FUSED, "t=0.5"].values, area, atol=1e-6 if not given else 0.03
        )
    assert (heights[False][2] < heights[False][1]).any()


def test_noise_reaches_every_modality_in_its_own_unit(surveyed):
    """A model that hears and sees alike much, clips whose pictures differ ten times as much as their sounds."""
    model = linear()
    clips = random_clips(model)
    clips.inputs["audio"] = clips.inputs["audio"] / 10
    view, measures = surveyed(model, clips, layers=("input",), how=Segments(pairs=2500, sigmas=(0.5, 2.0)))
    pairs = draw_pairs(view.latents.labels, 2500, draw_for(0, "pairs"))
    middle = (view.latents.logits[pairs.first] + view.latents.logits[pairs.second])[
        torch.arange(len(pairs.cls)), pairs.cls
    ] / 2
    for sigma in (0.5, 2.0):
        variance = sum(
            (sigma * typical_distance(view.latents.parts["input"][m]) / math.sqrt(w.shape[1])) ** 2 * w.square().sum(1)
            for m, w in model.weights.items()
        )
        share = torch.special.ndtr(middle / variance.detach().sqrt()[pairs.cls])
        expected = [float(share[pairs.cls == c].mean()) for c in range(3)]
        measure = measures["hardened convexity", "input", "audio+visual", f"t=0.5, sigma={sigma:g}"]
        np.testing.assert_allclose(measure.values, expected, atol=0.03)


def test_flip_distances_of_a_linear_model_are_where_the_logit_is_zero(surveyed):
    view, measures = surveyed(linear(), layers=("input",))
    labels, logits = view.latents.labels, view.latents.logits.double()
    parts = {m: x.double() for m, x in view.latents.parts["input"].items()}
    pairs = draw_flip_pairs(labels, 40, draw_for(0, "flips"))
    inner, outer = logits[pairs.first, pairs.cls], logits[pairs.second, pairs.cls]
    length = sum(
        ((x[pairs.first] - x[pairs.second]) / typical_distance(x)).square().sum(1) for x in parts.values()
    ).sqrt()
    distance = torch.where(outer < 0, inner / (inner - outer) * length, torch.inf)
    distance[inner < 0] = torch.nan
    where = ("input", "audio+visual", "t=0.5")
    found, flipped = measures[("flip distance", *where)], measures[("flipped segments", *where)]
    for c in range(3):
        rows = pairs.cls == c
        owners = torch.stack([pairs.first, pairs.second], 1)[rows].numpy()
        gone = torch.where(distance.isinf(), length, distance).nan_to_num()[rows].numpy()
        expected = score(gone, distance[rows].isfinite().double().numpy(), owners, view.weights)
        assert found.values[c] > 0
        assert found.values[c] == pytest.approx(expected.value, rel=1e-3)
        np.testing.assert_allclose(found.resampled[:, c], expected.resampled, rtol=1e-3)
        shares = score(
            distance[rows].isfinite().double().numpy(), (inner[rows] >= 0).double().numpy(), owners, view.weights
        )
        assert flipped.values[c] == pytest.approx(shares.value)
        np.testing.assert_allclose(flipped.resampled[:, c], shares.resampled)
    assert {m.setting for m in measures.values() if m.metric.startswith("flip")} == {"t=0.5"}


def test_a_class_that_is_accepted_everywhere_never_flips(surveyed):
    model = linear()
    model.classify = lambda latent: latent + latent.new_tensor([0.0, 50.0, -50.0])
    _, measures = surveyed(model, random_clips(linear()), layers=("input",))
    found = measures["flip distance", "input", "audio+visual", "t=0.5"]
    assert 0 < found.values[0] < np.inf
    assert np.isnan(found.values[1:]).all()
    assert found.skipped == dict.fromkeys(["class-1", "class-2"], "nothing to measure: no pair or clip counts")
    assert measures["flipped segments", "input", "audio+visual", "t=0.5"].values[1] == 0


def test_the_batch_size_does_not_matter(surveyed):
    model = tiny_fusion()
    layers, samples = ("input", "features", "latent", "encoders.audio.1"), TinySamples(24)
    how = Segments(pairs=6, k=1, sigmas=(0.5, 2.0))
    whole = surveyed(model, samples, how, layers, batch_size=24)[1]
    for size in (1, 7):
        same(whole, surveyed(model, samples, how, layers, batch_size=size)[1])


def test_the_seed_decides_and_nothing_else(surveyed):
    one, again, other = (
        surveyed(linear(), None, Segments(pairs=12, k=2, seed=seed), ("features",))[1] for seed in (0, 0, 1)
    )
    same(one, again)
    # Pairs, flips, noise and graphs each have a draw of their own.
    for metric in ("both ends accepted", "flipped segments", "hardened convexity, area", "graph convexity"):
        keys = [key for key in one if key[0] == metric]
        assert any((one[key].values != other[key].values).any() for key in keys), metric


def test_multiclass_has_one_threshold_and_odds_of_its_own(surveyed):
    _, measures = surveyed(linear("multiclass"), layers=("features", "latent"))
    assert not any(F1 in m.setting for m in measures.values())
    _, multilabel = surveyed(linear(), layers=("features", "latent"))
    assert any(F1 in m.setting for m in multilabel.values())
    alike = [
        {
            (metric, layer, part, setting.replace(ARG_MAX, "t=0.5"))
            for metric, layer, part, setting in found
            if F1 not in setting
        }
        for found in (measures, multilabel)
    ]
    # A softmax can accept a class between clips that it rejects, so there is no such bound.
    assert alike[0] == {key for key in alike[1] if key[0] != "both ends rejected"}


def test_a_class_of_one_clip_has_no_pairs_and_says_so(surveyed):
    model = linear()
    clips = random_clips(model)
    clips.labels = clips.labels.clone()
    clips.labels[:, 1] = False
    clips.labels[4, 1] = True
    clips.labels[:, 2] = True
    _, measures = surveyed(model, clips, layers=("features",))
    for measure in measures.values():
        if measure.metric.startswith("flip"):
            assert set(measure.skipped) <= {"class-1", "class-2"}
            assert "class-2" in measure.skipped
        elif measure.metric != "graph convexity":
            assert (
                measure.skipped["class-1"]
                == "no pair of clips: the class has fewer than 2, or what is needed beside it is not there"
            ), measure.key
            assert np.isnan(measure.values[1]) and measure.units[1] == 0
            assert np.isfinite(measure.values[0])
    distance = measures["flip distance", "features", "audio+visual", "t=0.5"]
    assert (
        distance.skipped["class-2"]
        == "no pair of clips: the class has fewer than 2, or what is needed beside it is not there"
    )


def test_without_any_pair_there_is_nothing_to_measure(surveyed):
    model = linear()
    clips = random_clips(model, 3)
    clips.labels = torch.eye(3, dtype=torch.bool)
    _, measures = surveyed(model, clips)
    assert {m.metric for m in measures.values()} == {"flip distance", "flipped segments"}


def test_clips_that_are_mostly_copies_have_no_unit_for_noise_and_flips(surveyed):
    model = linear()
    clips = random_clips(model)
    for x in clips.inputs.values():
        x[12:] = x[:12].repeat(2, 1)
    _, measures = surveyed(model, clips, layers=("input",), how=Segments(pairs=40, k=30))
    metrics = {m.metric for m in measures.values()}
    assert "conditional convexity" in metrics and "mismatch consistency" in metrics
    without = [m for m in measures.values() if m.metric.startswith(("hardened", "flip"))]
    assert {m.metric for m in without} == {"hardened convexity, area", "flip distance"}
    for measure in without:
        assert (
            all("drop duplicates" in reason for reason in measure.skipped.values()) and np.isnan(measure.values).all()
        )


def test_graphs_are_of_equal_sides_and_leave_small_classes_out(surveyed):
    model = linear()
    clips = random_clips(model, 60)
    labels = torch.zeros(60, 3, dtype=torch.bool)
    labels[:31, 0], labels[:14, 1], labels[::2, 2] = True, True, True  # the second is one short of 5 k
    clips.labels = labels
    view, measures = surveyed(model, clips, layers=("features", "latent"), how=Segments(pairs=50, k=3))
    graphs = only(measures, "graph convexity")
    assert [m.where for m in graphs] == ["audio features", "visual features", "latent"]
    parts = {**view.latents.parts["features"], FUSED: view.latents.parts["latent"][FUSED]}
    for measure in graphs:
        assert measure.setting == "k=3"
        assert measure.skipped == {"class-1": "fewer than 15 clips with it or without it"}
        found = graph_convexity(parts[measure.part].double(), labels, 3, 50, generator=draw_for(0, "graph"), members=29)
        owners = torch.stack([found.pairs.first, found.pairs.second], 1).numpy()
        for c in (0, 2):
            rows = (found.pairs.cls == c).numpy()
            terms = (x.numpy()[rows] for x in found.terms)
            expected = score(*terms, owners[rows], view.weights)
            assert measure.values[c] == pytest.approx(expected.value)
            np.testing.assert_allclose(measure.resampled[:, c], expected.resampled)


def test_no_graph_where_every_class_is_small_or_every_clip_the_same(surveyed):
    model = linear()
    _, measures = surveyed(model, random_clips(model), how=Segments(pairs=10, k=9))
    assert not only(measures, "graph convexity")
    model.encode = lambda modality, x: torch.ones(len(x), 3)
    _, measures = surveyed(model, random_clips(linear()), how=Segments(pairs=10, k=1))
    assert {m.layer for m in only(measures, "graph convexity")} == {"input"}


def test_modules_inside_a_network_are_cuts_like_any_other(surveyed):
    model = bent()
    _, measures = surveyed(model, bent_clips(), layers=("encoders.audio", "encoders.visual", "head"))
    for layer in ("encoders.audio", "encoders.visual", "head"):
        found = measures["conditional convexity", layer, layer, "t=0.5"]
        assert found.where == layer
        np.testing.assert_array_equal(found.values, 1)
    assert measures["published convexity", "head", "head", "tau=0.1"].values[0] == 1


def test_no_global_randomness_is_read_or_moved(surveyed):
    model = tiny_fusion()
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  (it must stay)
    one = surveyed(model, TinySamples(24), Segments(pairs=5, k=1), ("features",))[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    torch.manual_seed(99)
    same(one, surveyed(model, TinySamples(24), Segments(pairs=5, k=1), ("features",))[1])


def test_the_model_comes_back_as_it_was(surveyed):
    model = tiny_fusion().train()
    model.encoders["audio"].eval()
    model.head.bias.requires_grad_(False)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    surveyed(model, TinySamples(12), Segments(pairs=5, k=1), (*LAYERS, "encoders.audio.1"))
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in model.modules())


def test_progress_is_told_cut_by_cut(surveyed, monkeypatch):
    told = []
    view, _ = surveyed(linear(), layers=("input", "latent"))
    convexity_measures(view, Segments(pairs=3, k=2), lambda *what: told.append(what))
    words = [f"convexity: {name}" for name in ("input", "input", "input", "latent")]
    assert told == [*((word, done, 4) for done, word in enumerate(words)), ("convexity: graphs", 4, 4)]


def test_pairs_are_as_many_as_asked_or_what_suits_the_cut(surveyed):
    view, measures = surveyed(linear(), layers=LAYERS)
    assert {m.units[0] for m in only(measures, "both ends accepted")} == {40}
    assert [Segments().count(cut) for cut in view.cuts] == [50, 200, 5000]
    assert [Segments(pairs=7).count(cut) for cut in view.cuts] == [7, 7, 7]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pairs": 0}, "`pairs` must be at least 1, got 0"),
        ({"sigmas": (1.0,)}, r"`sigmas` must be at least two rising numbers, got \[1.0\]"),
        ({"sigmas": (1.0, 1.0)}, "`sigmas` must be at least two rising numbers"),
        ({"sigmas": (-1.0, 1.0)}, "`sigmas` must not be negative, got -1"),
        ({"k": 0}, "`k` must be at least 1, got 0"),
    ],
)
def test_segments_that_cannot_be_are_refused(settings, expected):
    with pytest.raises(ValueError, match=expected):
        Segments(**settings)
