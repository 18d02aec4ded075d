"""The evaluation as a Python user writes it."""

import pytest
from conftest import tiny_fusion

from robustav.evaluation import Evaluation
from robustav.models.zoo import load_model
from robustav.report import build


def test_one_is_as_good_as_a_list_of_one_and_a_number_as_its_text():
    assert Evaluation(eps=0.01, attacks="pgd", attacked="both") == Evaluation(
        eps=["0.01"], attacks=["pgd"], attacked=("both",)
    )


def test_a_model_in_hand_is_evaluated_as_it_is(tmp_path):
    model, _ = load_model("visual-cnn")
    table = build([Evaluation(model=model, attacks="fgsm", limit=24).run(tmp_path)]).table
    assert list(table["condition"]) == ["clean", "fgsm", "worst case"]
    assert set(table["run"]) == {"LateFusion"}


def test_steps_and_restarts_reach_the_attacks_that_have_them():
    made = Evaluation(steps=7, restarts=3).made_attacks()
    assert (made["pgd"].times, made["pgd"].attack.steps, made["momentum"].steps) == (3, 7, 7)
    assert repr(made["fgsm"]) == "FGSM()"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": []}, "at least one epsilon"),
        ({"attacks": ["magic"]}, "no attack 'magic'"),
        ({"limit": -1}, "`limit` must not be negative"),
        ({"model": tiny_fusion(), "checkpoint": "w.pt"}, "`checkpoint` goes with a model by name"),
    ],
)
def test_what_makes_no_sense_is_refused_when_made(settings, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**settings)
