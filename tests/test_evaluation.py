"""The evaluation as a Python user writes it."""

import pytest
from conftest import tiny_fusion

from robustav.attacks import APGD, EOT, PGD, Noise
from robustav.classifier import LateFusion
from robustav.evaluation import Evaluation
from robustav.goals import Hide, Untargeted
from robustav.harness import Settings
from robustav.models.zoo import load_model
from robustav.report import build
from robustav.suites import SUITES


def test_one_is_as_good_as_a_list_of_one_and_a_number_as_its_text():
    assert Evaluation(eps=0.01, attacks="pgd", attacked="both") == Evaluation(
        eps=["0.01"], attacks=["pgd"], attacked=("both",)
    )


def test_a_model_in_hand_is_evaluated_as_it_is(tmp_path):
    model, _ = load_model("visual-cnn")
    table = build([Evaluation(model=model, attacks="fgsm", limit=24).run(tmp_path)]).table
    assert list(table["condition"]) == ["clean", "fgsm", "worst case"]
    assert set(table["run"]) == {"LateFusion"}


SCORE = {"multilabel": "mAP", "multiclass": "hits"}


def attacks_of(label_kind="multilabel", goal=None, **settings):
    evaluation, model = Evaluation(**settings), tiny_fusion(label_kind)
    goal = goal or Untargeted(label_kind)
    score = evaluation.score or SCORE[label_kind]
    return {member.name: member for member in evaluation.members(model, goal, score)}


def test_steps_and_restarts_reach_the_attacks_that_have_them():
    made = attacks_of(steps=7, restarts=3, attacks=["fgsm", "pgd", "momentum", "aimed"])
    pgd, momentum, aimed = (made[name].attack for name in ("pgd", "momentum", "aimed"))
    assert (pgd.times, pgd.attack.steps, momentum.steps, aimed.attack.steps) == (3, 7, 7, 7)
    assert repr(made["fgsm"].attack) == "FGSM()"
    with pytest.raises(ValueError, match="`steps` has no meaning for fgsm, square: leave it out"):
        attacks_of(steps=7, attacks=["fgsm", "square"])


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    ("label_kind", "classes", "loss"),
    [("multilabel", 3, "top1"), ("multilabel", 10, "top1-dlr"), ("multiclass", 3, "margin"), ("multiclass", 10, "dlr")],
)
def test_every_suite_has_a_control_and_two_losses_and_searches_stop_at_success(suite, label_kind, classes, loss):
    model = tiny_fusion(label_kind)
    model.classes = tuple(map(str, range(classes)))
    made = {m.name: m.attack for m in Evaluation(suite=suite).members(model, Untargeted(label_kind), SCORE[label_kind])}
    assert next(iter(made)) == "noise"
    plain, other = made["apgd"], made["apgd-dlr" if classes > 3 else "apgd-margin"]
    if suite == "thorough":
        assert plain.times == other.times == 5
        plain, other = plain.attack, other.attack
    assert (plain.loss, other.loss) == ("", loss)
    assert plain.stop == other.stop == (label_kind == "multiclass")
    for name in ("aimed", "mla-lp", "fmn", "square"):
        if name in made:
            assert getattr(made[name], "attack", made[name]).stop
    assert "aimed" not in made or made["aimed"].aims < classes
    assert ("mla-lp" in made) == (suite == "thorough" and label_kind == "multilabel")
    assert {"fab", "rays", "pgd"} <= made.keys() or suite != "thorough"


def test_a_goal_that_is_not_any_mistake_is_climbed_on_its_own_loss():
    made = attacks_of(goal=Hide(chosen=(0,)))
    assert "apgd-dlr" not in made
    assert "aimed" not in made
    assert {"noise", "fgsm", "apgd", "fmn", "square"} == made.keys()


def test_a_defence_that_declares_its_own_attack_and_chance_gets_both():
    class Defended(LateFusion):
        stochastic = True

        def adaptive_attacks(self):
            return {"knows": PGD(3)}

    model = tiny_fusion()
    model.__class__ = Defended
    made = {m.name: m.attack for m in Evaluation(suite="quick").members(model, Untargeted(), "mAP")}
    assert made["knows"] == EOT(PGD(3), 20)
    assert made["apgd"] == EOT(APGD(25), 20)
    assert made["noise"] == Noise()
    made = {m.name: m.attack for m in Evaluation(suite="quick", eot=3).members(tiny_fusion(), Untargeted(), "mAP")}
    assert made["apgd"].times == 3


def test_a_defence_faces_its_own_attack_whatever_is_named():
    class Hardened(LateFusion):
        needs_adaptive = True

        def adaptive_attacks(self):
            return {"knows": PGD(3)} if self.declares else {}

    model = tiny_fusion()
    model.__class__, model.declares = Hardened, True
    assert {m.name for m in Evaluation(attacks=["fgsm"]).members(model, Untargeted(), "mAP")} == {"fgsm", "knows"}
    model.declares = False
    with pytest.raises(ValueError, match=r"Hardened is a defence and declares no attack that knows it: return one"):
        Evaluation(attacks=["fgsm"]).members(model, Untargeted(), "mAP")


def test_source_and_smallest_add_a_row_each():
    made = attacks_of(attacks=["fgsm"], source=tiny_fusion(), smallest=True)
    assert list(made) == ["fgsm", "transfer", "smallest"]
    assert made["transfer"].source.name == "LateFusion"
    assert made["smallest"].smallest


def test_a_universal_perturbation_is_learnt_once_on_other_clips(tmp_path, monkeypatch):
    from robustav import lessons

    monkeypatch.setattr(lessons, "CLIPS", 40)
    evaluation = Evaluation("visual-cnn", eps="8/255", attacks="universal", limit=24, seed=3)
    rows = evaluation.run(tmp_path / "a", Settings(probed=0)).record()["identity"]["conditions"]
    assert [d["name"] for d in rows.values()] == ["clean", "universal", "universal-shuffled", "universal-noise"]
    assert "learnt on 40 of av-events" in rows["universal-visual-0"]["attack"]
    monkeypatch.setattr(lessons, "learn", None)  # a second run finds what the first learnt
    again = evaluation.run(tmp_path / "b", Settings(probed=0)).record()["identity"]["conditions"]
    assert again == rows
    with pytest.raises(ValueError, match="learnt on other clips than it is tried on, got av-events/test for both"):
        Evaluation("visual-cnn", data="av-events/test", learn_on="av-events/test", attacks="universal").run(
            tmp_path / "c"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": []}, "at least one epsilon"),
        ({"attacks": ["magic"]}, "no attack 'magic'"),
        ({"limit": -1}, "`limit` must not be negative"),
        ({"suite": "huge"}, "no suite 'huge': there are quick, standard, thorough"),
        ({"attacks": ["art"]}, "no attack 'art'"),
        ({"score": "auc"}, "`score` must be 'mAP' or 'hits', got 'auc'"),
        ({"eot": 0}, "`eot` must be at least 1, got 0"),
        ({"learn_on": "x.csv"}, "`learn_on` goes with the attack 'universal'"),
        ({"source_checkpoint": "w.pt"}, "`source_checkpoint` goes with a `source` by name"),
        ({"model": tiny_fusion(), "checkpoint": "w.pt"}, "`checkpoint` goes with a model by name"),
    ],
)
def test_what_makes_no_sense_is_refused_when_made(settings, message):
    with pytest.raises(ValueError, match=message):
        Evaluation(**settings)
