"""Kept examples: those of the strongest condition, bit for bit as they were scored, with the labels of their clips."""

import shutil

import numpy as np
import pytest
import torch
from conftest import TinySamples, tiny_fusion, tiny_specs

import robustav.geometry.survey as survey_module
from robustav import keep
from robustav.attacks import FGSM, PGD, Noise
from robustav.data.samples import Samples
from robustav.geometry.drift import adversarial_measures
from robustav.geometry.kept import KeptSamples
from robustav.geometry.survey import Survey
from robustav.goals import Untargeted
from robustav.harness import Settings, evaluate
from robustav.ledger import Ledger
from robustav.plan import conditions
from robustav.threat import parse_epsilons

ATTACKS = {"fgsm": FGSM(), "pgd": PGD(steps=2), "noise": Noise()}


def run(out, kept=4, samples=None, attacks=ATTACKS, eps=("0.01", "0.05"), attacked=None, kind="multilabel"):
    goal = Untargeted(label_kind=kind)
    rows = conditions(attacks, parse_epsilons(list(eps), tiny_specs()), goal, attacked)
    samples = samples or TinySamples(10, kind)
    return evaluate(tiny_fusion(kind), samples, rows, goal, out, settings=Settings(device="cpu", keep=kept, probed=0))


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    return run(tmp_path_factory.mktemp("run") / "attacked")


def test_the_most_modalities_then_the_largest_budget_then_the_last_attack_but_never_noise(ledger):
    found = KeptSamples(ledger, TinySamples(10))
    assert found.condition == "pgd-audio+visual-1"
    assert found.name == "pgd-audio+visual-1 of attacked"
    assert tuple(found.ids) == tuple(f"clip {i}" for i in range(4))
    assert (found.classes, found.label_kind) == (TinySamples().classes, "multilabel")
    assert isinstance(found, Samples)


def test_examples_are_those_on_disk_with_the_labels_of_their_clips(ledger):
    clean, found = TinySamples(10), KeptSamples(ledger, TinySamples(10))
    for index in (3, 0):
        sample, untouched = found.load(index), clean.load(index)
        stored = keep.load(keep.folder_of(ledger.folder, "pgd-audio+visual-1", f"clip {index}"))
        assert sample.id == f"clip {index}"
        assert sample.inputs.keys() == stored.keys() == {"audio", "visual"}
        for m, x in stored.items():
            assert torch.equal(sample.inputs[m], x)
            change = (x - untouched.inputs[m]).abs().max()
            assert 0.04 < change < 0.0501
        assert torch.equal(sample.labels, untouched.labels)


def test_a_class_index_stays_a_class_index(tmp_path):
    found = KeptSamples(
        run(tmp_path, attacks={"fgsm": FGSM()}, eps=["0.05"], kind="multiclass"), TinySamples(10, "multiclass")
    )
    assert found.label_kind == "multiclass"
    assert [int(found.load(i).labels) for i in range(4)] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("eps", "level"),
    [(("0.05", "0.01"), 0), (("snr=20dB", "snr=40dB"), 0), (("snr=40dB", "snr=20dB"), 1)],
)
def test_the_largest_budget_is_not_the_last_one(tmp_path, eps, level):
    found = KeptSamples(run(tmp_path, 1, attacks={"fgsm": FGSM()}, eps=eps), TinySamples(10))
    assert found.condition == f"fgsm-audio+visual-{level}"


def test_what_was_not_kept_or_not_usable_is_not_there(tmp_path):
    samples = TinySamples(10, broken={"clip 1": "empty"})
    ledger = run(tmp_path, 4, samples, attacks={"fgsm": FGSM()}, eps=["0.05"])
    assert tuple(KeptSamples(ledger, samples).ids) == ("clip 0", "clip 2", "clip 3")
    assert tuple(KeptSamples(ledger, TinySamples(10)).ids) == ("clip 0", "clip 2", "clip 3")
    shutil.rmtree(keep.folder_of(tmp_path, "fgsm-audio+visual-0", "clip 2"))
    found = KeptSamples(ledger, samples)
    assert tuple(found.ids) == ("clip 0", "clip 3")
    assert found.load(1).id == "clip 3"
    assert torch.equal(found.load(1).labels, samples.load(3).labels)


def test_the_strongest_that_kept_any_is_taken(ledger, tmp_path):
    ledger = Ledger(shutil.copytree(ledger.folder, tmp_path / "copy"))
    digests = [KeptSamples(ledger, TinySamples(10)).digest]
    for gone, expected in (
        ("pgd-audio+visual-1", "fgsm-audio+visual-1"),
        ("fgsm-audio+visual-1", "pgd-audio+visual-0"),
        ("pgd-audio+visual-0", "fgsm-audio+visual-0"),
        ("fgsm-audio+visual-0", "pgd-visual-1"),
    ):
        shutil.rmtree(ledger.folder / "kept" / gone)
        found = KeptSamples(ledger, TinySamples(10))
        assert found.condition == expected
        digests.append(found.digest)
    assert len(set(digests)) == 5


def test_a_run_that_kept_nothing_is_an_error(tmp_path):
    ledger = run(tmp_path / "none", 0, attacks={"fgsm": FGSM()}, eps=["0.05"])
    with pytest.raises(
        ValueError, match=r"none kept no adversarial examples: run the same attack again with --keep 10"
    ):
        KeptSamples(ledger, TinySamples(10))
    ledger = run(tmp_path / "noise", 3, attacks={"noise": Noise()}, eps=["0.05"])
    with pytest.raises(ValueError, match="kept no adversarial examples"):
        KeptSamples(ledger, TinySamples(10))


def test_other_data_than_the_runs_are_an_error(ledger):
    with pytest.raises(ValueError, match="attacked attacked other data than tiny: survey the run's own with --data"):
        KeptSamples(ledger, TinySamples(11))


def test_surveyed_again_they_score_as_they_did_and_lie_away_from_the_clean_ones(tmp_path, monkeypatch):
    samples = TinySamples(24)
    ledger = run(tmp_path, 24, samples, {"pgd": PGD(steps=5)}, eps=("0.5",))
    monkeypatch.setattr(survey_module, "load_samples", lambda *_: (samples, None))
    with Survey(model=tiny_fusion(), resamples=20, device="cpu", layers=["latent"]).opened() as view:
        kept = view.collect_others(KeptSamples(ledger, samples))
        found = adversarial_measures(view.latents, kept, view.cuts, view.weights, ("raw",), 0)
    rows = ledger.read("pgd-audio+visual-0")
    assert list(kept.ids) == list(rows["sample"])
    torch.testing.assert_close(kept.logits, torch.from_numpy(np.stack(rows["logits"])), rtol=1e-4, atol=1e-4)
    assert torch.equal(kept.labels, view.latents.labels)
    coverage = [m for m in found if m.metric == "coverage of"]
    assert len(coverage) == 2
    assert coverage[0].macro < 0.5
