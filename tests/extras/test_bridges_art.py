"""ART through the bridge: it finds what our attacks find, for any goal that it only has to climb or to be told of."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Linear, TinySamples, batch_of, tiny_fusion, tiny_specs

from robustav import audit
from robustav.attacks import FGSM, PGD, MomentumFGSM
from robustav.attacks.ascent import Pursuit, climb, look
from robustav.bridges import Art, as_art_estimator, parse_bridge
from robustav.bridges.art import KINDS, REFUSED, _goal_estimator
from robustav.bridges.single import Clips
from robustav.classifier import InputSpec
from robustav.goals import Hide, Inject, PushLatent, Targeted, Untargeted
from robustav.harness import evaluate
from robustav.ledger import failures
from robustav.plan import conditions
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

pytestmark = pytest.mark.extra("art")

EPSILON = {"linf": 0.02, "l2": 0.3, "l1": 2.0}
QUICK = {  # where the peer's defaults take more than a second
    "max_iter": 2,
    "nb_random_init": 1,
    "max_eval": 20,
    "init_eval": 5,
    "init_size": 30,
    "binary_search_steps": 1,
    "initial_const": 1.0,
    "max_halving": 1,
    "max_doubling": 1,
    "largest_const": 2.0,
    "num_trial": 3,
    "sample_size": 3,
    "query_limit": 50,
    "k": 3,
}
MULTI_HOT = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
KIND = pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
MODALITY = pytest.mark.parametrize("modality", ["audio", "visual"])


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Importing ART writes a folder `.art` into the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))


def quick(name):
    return Art(name, {k: v for k, v in QUICK.items() if k in Art(name).parameters()})


class Case:
    """A tiny fusion of [-1, 1] audio and [0, 1] frames, attacked in one of them."""

    def __init__(self, kind="multiclass", modality="audio", norm="linf", goal=None, epsilon=None, model=None):
        self.model = model or tiny_fusion(kind)
        self.inputs = batch_of(self.model.specs)
        self.labels = self.model(self.inputs).argmax(1) if kind == "multiclass" else MULTI_HOT
        spec = self.model.specs[modality]
        budget = Budget(norm, EPSILON[norm] if epsilon is None else epsilon, low=spec.low, high=spec.high)
        self.modality = modality
        self.threat = ThreatModel({modality: budget}, goal or Untargeted(kind)).given(
            clean=self.model.trace(self.inputs)
        )

    def run(self, attack, names="abcdef", rows=None, seed=0):
        rows = torch.arange(6) if rows is None else rows
        clean, threat = {m: x[rows] for m, x in self.inputs.items()}, self.threat.at(rows)
        found = attack(self.model, clean, self.labels[rows], threat, draws=draws_for(seed, names))
        assert audit.violations(clean, found, threat, self.model.specs) == [""] * len(names)
        assert all(found[m] is clean[m] for m in clean if m != self.modality)
        return found

    def look(self, inputs):
        return look(self.model, inputs, self.labels, self.threat)


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, kind in KINDS.items() for norm in kind.norms])
@MODALITY
def test_every_attack_stays_in_budget_and_leaves_generators_and_model_alone(name, norm, modality):
    """Twice the same from the same draws, also where ART draws from the machine's clock."""
    specs = {
        "audio": InputSpec((100,), -1.0, 1.0, "amplitude"),
        "visual": InputSpec((1, 3, 10, 10), 0.0, 1.0, "pixel value"),
    }
    model = Linear(specs, 3).eval()
    model.label_kind = "multiclass"
    case = Case(modality=modality, norm=norm, model=model)
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002
    drawn = np.random.RandomState
    found = case.run(quick(name))
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    assert np.random.RandomState is drawn
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(case.run(quick(name))[modality], found[modality])
    if not quick(name).survivors:
        assert (case.look(found).loss > case.look(case.inputs).loss).all()


def test_the_tables_name_attacks_that_are_there():
    import art.attacks.evasion

    assert all(hasattr(art.attacks.evasion, name) for name in [*KINDS, *REFUSED])


@KIND
@MODALITY
@pytest.mark.parametrize(
    ("theirs", "ours", "norm"),
    [
        ("FastGradientMethod", FGSM(), "linf"),
        ("FastGradientMethod", FGSM(), "l2"),
        ("ProjectedGradientDescent(max_iter=6, eps_step=0.2)", PGD(6, 0.2, random_start=False), "linf"),
        ("ProjectedGradientDescent(max_iter=6, eps_step=0.2)", PGD(6, 0.2, random_start=False), "l2"),
        ("BasicIterativeMethod(max_iter=4, eps_step=0.25)", PGD(4, 0.25, random_start=False), "linf"),
        ("MomentumIterativeMethod(max_iter=5, eps_step=0.2)", MomentumFGSM(5), "linf"),
    ],
    ids=lambda value: str(value),
)
def test_climbs_as_high_as_ours(theirs, ours, norm, kind, modality):
    """Also for multi-hot labels, which ART by itself arg-maxes (V5)."""
    case = Case(kind, modality, norm)
    found = case.run(parse_bridge(f"art:{theirs}"))
    assert (case.look(found).loss > case.look(case.inputs).loss).all()
    torch.testing.assert_close(case.look(found).loss, case.look(case.run(ours)).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reaches_the_best_there_is_on_a_linear_model(norm):
    specs = {"audio": InputSpec((16,), -3.0, 4.0, "amplitude")}
    case = Case("multilabel", norm=norm, goal=Hide(chosen=(0,)), epsilon=0.25, model=Linear(specs, 3).eval())
    found = case.run(Art("ProjectedGradientDescent", {"max_iter": 20}))
    dual = case.model.weights["audio"][0].norm(p={"linf": 1, "l2": 2}[norm])
    moved = (case.model(case.inputs) - case.model(found))[:, 0]
    torch.testing.assert_close(moved, (0.25 * dual).expand(6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "goal"),
    [
        ("multiclass", Targeted("multiclass", target=1)),
        ("multilabel", Hide(chosen=(0, 2))),
        ("multilabel", Inject(chosen=(1,))),
        ("multilabel", PushLatent()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_climbs_any_goal(kind, goal):
    case = Case(kind, goal=goal, epsilon=0.1)
    found = case.run(Art("ProjectedGradientDescent", {"max_iter": 5}))
    assert (case.look(found).loss > case.look(case.inputs).loss).all()


@pytest.mark.parametrize("goal", [Hide(chosen=(1,)), Inject(chosen=(1,)), Untargeted()], ids=repr)
@pytest.mark.parametrize(("name", "norm"), [("HopSkipJump", "linf"), ("BoundaryAttack", "l2"), ("SignOPTAttack", "l2")])
def test_verdicts_of_any_goal_are_enough(goal, name, norm):
    """Within a budget as wide as the range they find what they look for, and a clip that is there already stays."""
    case = Case("multilabel", norm=norm, goal=goal, epsilon=2.0 if norm == "linf" else 16.0)
    reached = case.look(case.inputs).reached
    found = case.run(quick(name))
    assert torch.equal(found["audio"][reached], case.inputs["audio"][reached])
    moved = (found["audio"] != case.inputs["audio"]).any(1)
    assert moved[~reached].any()
    assert case.look(found).reached.sum() > reached.sum()
    if name != "SignOPTAttack":  # whose last step may fall short
        assert case.look(found).reached[moved].all()


@pytest.mark.parametrize(
    "text",
    [
        "AutoProjectedGradientDescent(max_iter=2)",
        "CarliniL2Method(binary_search_steps=1, initial_const=10, max_iter=5)",
    ],
)
def test_scores_can_be_aimed_at_a_class(text):
    case = Case(norm="l2", goal=Targeted("multiclass", target=1), epsilon=4.0)
    reached = case.look(case.inputs).reached.sum()
    assert case.look(case.run(parse_bridge(f"art:{text}"))).reached.sum() > reached


@KIND
def test_the_gradient_that_art_sees_is_the_goals(kind):
    case = Case(kind)
    pursuit = Pursuit(case.model, case.inputs, case.labels, case.threat, draws_for(0, "abcdef"))
    estimator = _goal_estimator()(Clips(pursuit, "audio", None), case.model.specs["audio"])
    x = case.inputs["audio"].reshape(6, 1, 8, 8).numpy()
    _, gradients = climb(case.model, case.inputs, case.labels, case.threat)
    seen = torch.from_numpy(estimator.loss_gradient(x, np.zeros((6, 3), np.float32)))
    assert torch.equal(seen.reshape(6, 64), gradients["audio"])
    assert (estimator.predict(x).argmax(1) == case.look(case.inputs).reached.numpy()).all()
    assert estimator.input_shape == (1, 8, 8)
    with pytest.raises(NotImplementedError, match="no business training"):
        estimator.fit(x, np.zeros((6, 3)))


@pytest.mark.parametrize(
    ("name", "kind", "goal", "norm", "message"),
    [
        ("CarliniL2Method", "multilabel", Untargeted(), "l2", "art's CarliniL2Method knows one class a clip only"),
        ("DeepFool", "multiclass", Targeted("multiclass"), "l2", "art's DeepFool cannot pursue the goal: targeted"),
        ("HopSkipJump", "multilabel", Untargeted(), "l1", "art's HopSkipJump works in linf and l2, not in l1"),
        ("SquareAttack", "multiclass", None, "linf", "must fit into its 8 x 8, 10 at least"),
    ],
)
def test_what_it_cannot_do_is_said_up_front(name, kind, goal, norm, message):
    case, tally = Case(kind, goal=goal, norm=norm), Tally(6, ("audio",))
    view = AttackView(case.model, ("audio",), case.model.features({"visual": case.inputs["visual"]}), tally)
    with pytest.raises(ValueError, match=message):
        Art(name)(view, {"audio": case.inputs["audio"]}, case.labels, case.threat, draws=draws_for(0, "abcdef"))
    assert tally.forwards.tolist() == [0] * 6


def test_names_and_settings():
    assert parse_bridge("art:HopSkipJump(max_iter=10)") == Art("HopSkipJump", {"max_iter": 10})
    with pytest.raises(ValueError, match="art has no attack 'PGD' that robustav knows, only FastGradientMethod, "):
        parse_bridge("art:PGD")
    with pytest.raises(ValueError, match="UniversalPerturbation cannot be judged by a budget: it makes one"):
        parse_bridge("art:UniversalPerturbation")
    with pytest.raises(ValueError, match=r"no setting 'eps' that is free, only \['eps_step', 'max_iter'\]"):
        parse_bridge("art:BasicIterativeMethod(eps=0.1)")
    assert (Art("HopSkipJump").knowledge, Art("SquareAttack").knowledge) == ("labels", "scores")
    assert (Art("HopSkipJump").roams, Art("ProjectedGradientDescent").roams) == (True, False)


@pytest.mark.parametrize("name", ["ProjectedGradientDescent", "MomentumIterativeMethod", "HopSkipJump", "DeepFool"])
def test_does_not_depend_on_batch_mates(name):
    attack = quick(name)
    case = Case(norm=attack.kind.norms[0])
    whole = case.run(attack)["audio"]
    for i in (0, 4):
        torch.testing.assert_close(
            case.run(attack, "abcdef"[i], torch.tensor([i]))["audio"][0], whole[i], rtol=0, atol=1e-6
        )


def test_passes_are_counted_clip_by_clip():
    case, tally = Case("multilabel"), Tally(6, ("audio",))
    view = AttackView(case.model, ("audio",), case.model.features({"visual": case.inputs["visual"]}), tally)
    attack = Art("ProjectedGradientDescent", {"max_iter": 4})
    attack(view, {"audio": case.inputs["audio"]}, case.labels, case.threat, draws=draws_for(0, "abcdef"))
    assert tally.backwards.tolist() == [4] * 6
    assert tally.zero_gradients().tolist() == [0.0] * 6


def test_nothing_moves_without_a_budget_and_padding_never():
    case = Case(epsilon=0.0)
    assert torch.equal(case.run(Art("ProjectedGradientDescent"))["audio"], case.inputs["audio"])
    case = Case()
    case.threat = case.threat.given(writable={"audio": torch.arange(64).expand(6, 64) < 40})
    found = case.run(Art("ProjectedGradientDescent", {"max_iter": 3, "num_random_init": 1}))["audio"]
    assert torch.equal(found[:, 40:], case.inputs["audio"][:, 40:])
    assert (found[:, :40] != case.inputs["audio"][:, :40]).any()


def test_the_harness_finds_nothing_wrong(tmp_path):
    goal = Untargeted(success="misclassified")
    budgets = {m: Budget("linf", 0.02, low=s.low, high=s.high) for m, s in tiny_specs().items()}
    attacks = {"climbs": Art("ProjectedGradientDescent", {"max_iter": 3}), "asks": quick("HopSkipJump")}
    rows = conditions(attacks, [budgets], goal, [("audio",), ("visual",)])
    assert failures(evaluate(tiny_fusion(), TinySamples(4), rows, goal, tmp_path)) == {}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_our_classifier_is_their_estimator(norm):
    """Run by ART itself, in raw units: the same decisions, counted passes, and what our own attack finds."""
    from art.attacks.evasion import HopSkipJump, ProjectedGradientDescent

    case = Case(norm=norm, epsilon=0.1)
    case.inputs["visual"] = case.inputs["visual"][:1].expand(6, -1, -1, -1, -1)
    case.labels = case.model(case.inputs).argmax(1)
    estimator = as_art_estimator(case.model.requires_grad_(False), "audio", {"visual": case.inputs["visual"][:1]})
    x, y = case.inputs["audio"].numpy(), case.labels.numpy()
    assert (estimator.predict(x).argmax(1) == y).all()
    p = {"linf": np.inf, "l2": 2}[norm]
    tally = estimator.model.tally
    before = tally.backwards.item()
    pgd = ProjectedGradientDescent(estimator, norm=p, eps=0.1, eps_step=0.02, max_iter=6, verbose=False)
    found = {**case.inputs, "audio": torch.from_numpy(pgd.generate(x, y))}
    assert tally.backwards.item() - before == 6 * 6
    assert (case.threat.gauge(case.inputs, found) <= 1 + 1e-5).all()
    ours = case.run(PGD(6, 0.2, random_start=False))
    torch.testing.assert_close(case.look(found).loss, case.look(ours).loss, rtol=1e-4, atol=1e-5)

    jump = HopSkipJump(estimator, norm=p, max_iter=1, max_eval=20, init_eval=5, init_size=50, verbose=False)
    found = torch.from_numpy(jump.generate(x[:2]))
    fooled = estimator.predict(found.numpy()).argmax(1) != y[:2]
    same = {"audio": found, "visual": case.inputs["visual"][:2]}
    assert (fooled == look(case.model, same, case.labels[:2], case.threat.at(torch.arange(2))).reached.numpy()).all()
    assert found.min() >= -1
    assert found.max() <= 1


def test_the_loss_of_a_multilabel_estimator_is_binary():
    """V5: multi-hot labels reach the loss as they are."""
    model = tiny_fusion().requires_grad_(False)
    inputs = batch_of(model.specs)
    estimator = as_art_estimator(model, "audio", {"visual": inputs["visual"]})
    seen = torch.from_numpy(estimator.loss_gradient(inputs["audio"].numpy(), MULTI_HOT.numpy()))
    _, ours = climb(model, inputs, MULTI_HOT, ThreatModel({"audio": Budget("linf", 0.1)}))
    torch.testing.assert_close(seen * MULTI_HOT.numel(), ours["audio"], rtol=1e-4, atol=1e-7)
