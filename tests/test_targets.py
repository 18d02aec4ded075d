"""What a run says of each class, and the simple scores that a latent metric must beat."""

import math

import numpy as np
import pytest
import torch
from conftest import Linear, TinySamples, batch_of, tiny_fusion, tiny_specs

from robustav.attacks import FGSM, PGD, Noise
from robustav.classifier import waveform
from robustav.geometry.targets import (
    TARGETS,
    Scored,
    accepted,
    budgets_of,
    first_order_margins,
    label_margins,
    measured,
    noisy,
)
from robustav.goals import Untargeted
from robustav.harness import evaluate
from robustav.ledger import Ledger
from robustav.metrics.intervals import bootstrap_weights
from robustav.metrics.tagging import average_precision
from robustav.plan import conditions
from robustav.randomness import draws_for
from robustav.threat import Budget, parse_epsilons

LOGITS = np.array([[2.0, -1.0], [-1.0, 1.0], [0.5, 3.0], [-2.0, -3.0]])
LABELS = np.array([[True, False], [True, True], [False, True], [True, False]])


def scored(logits=LOGITS, clean=LOGITS, multilabel=True, threshold=0.5):
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 1]])
    return Scored(logits, clean, LABELS, weights, threshold, multilabel)


def test_hit_is_the_share_of_a_classs_clips_whose_top_class_is_a_label():
    found = TARGETS["hit"].score(scored())
    np.testing.assert_allclose(found.values, [1, 1])
    worse = LOGITS.copy()
    worse[0] = [0, 1]
    found = TARGETS["hit"].score(scored(worse))
    np.testing.assert_allclose(found.values, [2 / 3, 1])
    np.testing.assert_allclose(found.resampled, [[2 / 3, 1], [1 / 3, 1]])


def test_kept_counts_only_clips_that_were_accepted_clean():
    attacked = np.array([[-1.0, -1.0], [5.0, 1.0], [0.5, -3.0], [1.0, -3.0]])
    found = TARGETS["kept"].score(scored(attacked))
    # Class 0 was accepted on clip 0 alone, and lost; class 1 on clips 1 and 2, of which clip 2 is lost.
    np.testing.assert_allclose(found.values, [0, 0.5])
    np.testing.assert_allclose(found.resampled[1], [0, 0])  # clip 1 is not drawn


def test_kept_uses_the_threshold():
    assert accepted(np.array([[0.0]]), scored(threshold=0.5)).all()
    assert not accepted(np.array([[0.0]]), scored(threshold=0.6)).any()


def test_a_multiclass_model_accepts_its_top_class_alone():
    np.testing.assert_array_equal(accepted(LOGITS, scored(multilabel=False)), [[1, 0], [0, 1], [0, 1], [1, 0]])


def test_ap_is_average_precision():
    found = TARGETS["ap"].score(scored())
    np.testing.assert_allclose(found.values, average_precision(LOGITS, LABELS.astype(int)))
    np.testing.assert_allclose(found.resampled[0], found.values)


@pytest.fixture
def run(tmp_path):
    """Two budgets, every set of modalities."""
    model, samples = tiny_fusion(), TinySamples(12)
    epsilons = parse_epsilons(["0.05,0.2"], model.specs)
    rows = conditions({"noise": Noise(), "fgsm": FGSM(), "pgd": PGD(steps=5)}, epsilons, Untargeted())
    return evaluate(model, samples, rows, Untargeted(), tmp_path / "run"), model


def test_the_target_is_the_mean_over_budgets_of_the_worst_attack(run):
    ledger, _ = run
    weights = bootstrap_weights(12, 50, seed=0)
    found = measured(ledger, "audio+visual", "hit", weights, 0.5)
    assert found.levels == 2
    assert found.clips == 12
    labels = np.arange(12) % 3
    clean = ledger.read("clean")
    by_hand = np.zeros(3)
    for level in (0, 1):
        lost = clean["reached"].to_numpy().copy()
        for attack in ("fgsm", "pgd"):
            for attacked in ("audio", "visual", "audio+visual"):
                lost |= ledger.read(f"{attack}-{attacked}-{level}")["reached"].to_numpy()
        by_hand += [1 - lost[labels == c].mean() for c in range(3)]
    np.testing.assert_allclose(found.robust.values, by_hand / 2)
    np.testing.assert_allclose(found.frequency.values, np.log([4, 4, 4]))
    logits = np.stack(clean["logits"].to_list())
    np.testing.assert_allclose(found.margin.values, [logits[labels == c, c].mean() for c in range(3)], rtol=1e-5)


def test_more_modalities_are_never_better_for_the_model(run):
    ledger, _ = run
    weights = bootstrap_weights(12, 5, seed=0)
    both, audio = (measured(ledger, m, "hit", weights, 0.5).robust.values for m in ("audio+visual", "audio"))
    assert (both <= audio).all()


def test_a_run_without_an_attack_on_the_set_is_no_target(tmp_path):
    model = tiny_fusion()
    rows = conditions({"noise": Noise()}, parse_epsilons(["0.1"], model.specs), Untargeted())
    ledger = evaluate(model, TinySamples(4), rows, Untargeted(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"has no attack \(noise is none\) on 'audio'; it has none at all"):
        measured(ledger, "audio", "hit", bootstrap_weights(4, 5, seed=0), 0.5)


def test_the_clean_score_beside_what_is_kept_is_the_share_accepted():
    """What is kept of the clips accepted clean is 1 without an attack, and would control for nothing."""
    found = TARGETS["kept"].clean(scored())
    np.testing.assert_allclose(found.values, [1 / 3, 1])
    assert TARGETS["kept"].score(scored()).values == pytest.approx([1, 1])


def test_noise_and_first_order_margins_keep_out_of_padding():
    writable = torch.tensor([[True] * 32 + [False] * 32])
    budget = Budget("linf", 0.1, writable=writable)
    moved = noisy({"audio": torch.zeros(1, 64)}, {"audio": budget}, 1, draws_for(0, ["a"]))["audio"]
    assert (moved[:, :32] != 0).all() and (moved[:, 32:] == 0).all()
    model = Linear({"audio": waveform(0.004)})
    inputs = batch_of(model.specs, 1)
    found = first_order_margins(model, inputs, torch.ones(1, 1, dtype=torch.bool), {"audio": budget}, 0.5)
    fall = 0.1 * model.weights["audio"][0, :32].double().abs().sum()
    assert found.item() == pytest.approx((model(inputs).double() / fall).item(), rel=1e-4)


def test_the_largest_budget_is_not_the_last(tmp_path):
    model = tiny_fusion()
    rows = conditions({"fgsm": FGSM()}, parse_epsilons(["0.2,0.05"], model.specs), Untargeted())
    ledger = evaluate(model, TinySamples(4), rows, Untargeted(), tmp_path / "run")
    assert budgets_of(ledger, "audio", model)["audio"].epsilon == 0.2


def test_a_failed_audit_is_no_target(run, monkeypatch):
    ledger, _ = run
    read = Ledger.read

    def spoilt(self, key):
        rows = read(self, key)
        return rows.assign(violation="left its budget") if key == "pgd-audio-0" else rows

    monkeypatch.setattr(Ledger, "read", spoilt)
    with pytest.raises(ValueError, match="failed its audit"):
        measured(ledger, "audio", "hit", bootstrap_weights(12, 5, seed=0), 0.5)


def test_budgets_come_back_from_the_record(run):
    ledger, model = run
    budgets = budgets_of(ledger, "audio", model)
    assert budgets == {"audio": Budget("linf", 0.2, low=-1, high=1)}


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", math.inf)])
def test_the_first_order_margin_of_a_linear_model_is_its_distance_to_rejection_in_budgets(norm, dual):
    model = Linear(tiny_specs(), classes=2)
    inputs = batch_of(model.specs, 4)
    labels = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
    budgets = {"audio": Budget(norm, 0.01), "visual": Budget(norm, 0.03, low=0)}
    found = first_order_margins(model, inputs, labels, budgets, 0.5)
    falls = 0.01 * model.weights["audio"].double().norm(p=dual, dim=1)
    falls = falls + 0.03 * model.weights["visual"].double().norm(p=dual, dim=1)
    expected = (model(inputs).double() / falls).where(labels, torch.nan)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_modality_that_is_not_attacked_has_no_part_in_the_first_order_margin():
    model = Linear(tiny_specs())
    inputs, labels = batch_of(model.specs, 2), torch.ones(2, 1, dtype=torch.bool)
    audio = first_order_margins(model, inputs, labels, {"audio": Budget("linf", 0.01)}, 0.5)
    expected = model(inputs).double() / (0.01 * model.weights["audio"].double().abs().sum())
    torch.testing.assert_close(audio, expected, rtol=1e-4, atol=1e-4)


def test_margins_of_labels_only():
    labels = torch.tensor([[True, False], [True, True]])
    found = label_margins(torch.tensor([[1.0, 4.0], [2.0, 3.0]]), labels, 0.5, "multilabel")
    torch.testing.assert_close(found, torch.tensor([[1, torch.nan], [2, 3]]).double(), equal_nan=True)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_gaussian_noise_has_about_the_length_of_the_budget(norm):
    inputs = {"audio": torch.zeros(3, 4000), "visual": torch.zeros(3, 5)}
    budget = Budget(norm, 0.01)
    moved = noisy(inputs, {"audio": budget}, 2, draws_for(0, ["a", "b", "c"]))
    assert torch.equal(moved["visual"], inputs["visual"])
    if norm == "linf":
        assert moved["audio"].std().item() == pytest.approx(0.02, rel=0.03)
    else:
        torch.testing.assert_close(budget.rules.length(moved["audio"]), torch.full((3,), 0.02), rtol=0.06, atol=0)


def test_gaussian_noise_stays_in_the_valid_range():
    moved = noisy({"audio": torch.ones(1, 100)}, {"audio": Budget("linf", 0.5)}, 4, draws_for(0, ["a"]))
    assert moved["audio"].max() == 1
