"""torchattacks through the bridge: it finds what our attacks find, in raw units, and the other way round."""

import numpy as np
import pytest
import torch
from conftest import Linear, TinySamples, batch_of, tiny_fusion, tiny_specs

from robustav import audit
from robustav.attacks import FGSM, PGD, MomentumFGSM
from robustav.attacks.ascent import look
from robustav.bridges import TorchAttacks, as_torchattacks_model, parse_bridge
from robustav.bridges.torchattacks import KINDS, REFUSED, UNTARGETED_ONLY
from robustav.classifier import InputSpec
from robustav.goals import Hide, Inject, PushLatent, Targeted, Untargeted
from robustav.harness import evaluate
from robustav.ledger import failures
from robustav.plan import conditions
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

pytestmark = pytest.mark.extra("torchattacks")

EPSILON = {"linf": 0.02, "l2": 0.3, "l1": 2.0}
QUICK = {  # where the peer's defaults take more than a second
    "steps": 3,
    "n_queries": 30,
    "nb_sample": 8,
    "max_batch_size": 4,
    "max_iterations": 10,
    "binary_search_steps": 2,
}
MULTI_HOT = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
KIND = pytest.mark.parametrize("kind", ["multiclass", "multilabel"])


def quick(name):
    return TorchAttacks(name, {k: v for k, v in QUICK.items() if k in TorchAttacks(name).parameters()})


class Case:
    """A tiny fusion of [-1, 1] audio and [0, 1] frames, attacked in one of them."""

    def __init__(self, kind="multiclass", modality="audio", norm="linf", goal=None, epsilon=None, model=None):
        self.model = model or tiny_fusion(kind)
        self.inputs = batch_of(self.model.specs)
        self.labels = self.model(self.inputs).argmax(1) if kind == "multiclass" else MULTI_HOT
        spec = self.model.specs[modality]
        budget = Budget(norm, EPSILON[norm] if epsilon is None else epsilon, low=spec.low, high=spec.high)
        self.modality = modality
        self.threat = ThreatModel({modality: budget}, goal or Untargeted(kind))

    def run(self, attack, names="abcdef", rows=slice(None), seed=0):
        clean = {m: x[rows] for m, x in self.inputs.items()}
        found = attack(self.model, clean, self.labels[rows], self.threat, draws=draws_for(seed, names))
        assert audit.violations(clean, found, self.threat, self.model.specs) == [""] * len(names)
        assert all(found[m] is clean[m] for m in clean if m != self.modality)
        return found

    def look(self, inputs):
        return look(self.model, inputs, self.labels, self.threat)


@pytest.mark.parametrize(("name", "norm"), [(name, norm) for name, kind in KINDS.items() for norm in kind.norms])
@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_every_attack_stays_in_budget_and_leaves_generators_and_model_alone(name, norm, modality):
    """V3, V4, V15; twice the same from the same draws."""
    side = 10
    specs = {
        "audio": InputSpec((side**2,), -1.0, 1.0, "amplitude"),
        "visual": InputSpec((1, 3, side, side), 0.0, 1.0, "pixel value"),
    }
    model = Linear(specs, 5).eval()
    model.label_kind = "multiclass"
    case = Case(modality=modality, norm=norm, model=model, epsilon=4 * EPSILON[norm])
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()  # noqa: NPY002
    found = case.run(quick(name))
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(case.run(quick(name))[modality], found[modality])
    if not quick(name).survivors and name != "TPGD":  # which climbs away from the clean scores, not from the labels
        assert (case.look(found).loss > case.look(case.inputs).loss).float().mean() > 0.8


def test_the_table_names_every_attack_of_the_peer_once():
    import torchattacks

    assert sorted([*KINDS, *REFUSED]) == sorted(torchattacks.__all__)


@pytest.mark.parametrize("name", KINDS)
def test_the_table_knows_what_each_can_aim_at(name):
    attack = TorchAttacks(name)
    made = attack.made(name)(torch.nn.Linear(2, 2))
    assert ("targeted" in made.supported_mode) == (name not in UNTARGETED_ONLY) or name in ("FAB", "SPSA")


@KIND
@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_fgsm_is_ours(kind, modality):
    """Also for multi-hot labels, where the gradient must be that of the binary cross-entropy (V4)."""
    case = Case(kind, modality)
    ours, theirs = case.run(FGSM()), case.run(TorchAttacks("FGSM"))
    torch.testing.assert_close(theirs[modality], ours[modality], rtol=0, atol=3e-7)


@KIND
@pytest.mark.parametrize("modality", ["audio", "visual"])
@pytest.mark.parametrize(
    ("theirs", "ours", "norm"),
    [
        (
            "PGD(steps=6, alpha=0.2, random_start=false)",
            PGD(6, 0.2, random_start=False),
            "linf",
        ),
        (
            "PGDL2(steps=6, alpha=0.2, random_start=false)",
            PGD(6, 0.2, random_start=False),
            "l2",
        ),
        ("MIFGSM(steps=5, alpha=0.2)", MomentumFGSM(5), "linf"),
    ],
    ids=lambda value: str(value),
)
def test_climbs_as_high_as_ours(theirs, ours, norm, kind, modality):
    case = Case(kind, modality, norm)
    found = case.run(parse_bridge(f"torchattacks:{theirs}"))
    assert (case.look(found).loss > case.look(case.inputs).loss).all()
    torch.testing.assert_close(case.look(found).loss, case.look(case.run(ours)).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_reaches_the_best_there_is_on_a_linear_model(norm):
    """Hoelder, in raw units of a range that is neither [0, 1] nor [-1, 1]."""
    specs = {"audio": InputSpec((16,), -3.0, 4.0, "amplitude")}
    case = Case("multilabel", norm=norm, goal=Hide(chosen=(0,)), epsilon=0.25, model=Linear(specs, 3).eval())
    name = {"linf": "PGD", "l2": "PGDL2"}[norm]
    found = case.run(TorchAttacks(name, {"steps": 20, "random_start": False}))
    dual = case.model.weights["audio"][0].norm(p={"linf": 1, "l2": 2}[norm])
    moved = (case.model(case.inputs) - case.model(found))[:, 0]
    torch.testing.assert_close(moved, (0.25 * dual).expand(6), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "goal"),
    [
        ("multiclass", Targeted("multiclass", target=1)),
        ("multilabel", Hide(chosen=(0, 2))),
        ("multilabel", Inject(chosen=(1,))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_pursues_other_goals(kind, goal):
    case = Case(kind, goal=goal, epsilon=0.1)
    found = case.run(TorchAttacks("PGD", {"random_start": False}))
    assert (case.look(found).loss > case.look(case.inputs).loss + 0.01).float().mean() > 0.8


@pytest.mark.parametrize(
    ("name", "kind", "goal", "message"),
    [
        ("APGD", "multilabel", Untargeted(), "torchattacks's APGD knows one class a clip only"),
        ("APGD", "multiclass", Targeted("multiclass"), "torchattacks's APGD cannot pursue the goal: targeted"),
        ("PGD", "multilabel", PushLatent(), "torchattacks's PGD cannot pursue the goal: push the latent"),
        ("PGD", "multilabel", Targeted(), "torchattacks's PGD cannot pursue the goal: targeted"),
        ("AutoAttack", "multiclass", Untargeted("multiclass"), "needs at least 4 classes, the model has 3"),
    ],
)
def test_what_it_cannot_do_is_said_up_front(name, kind, goal, message):
    case = Case(kind, goal=goal)
    tally = Tally(6, ("audio",))
    view = AttackView(case.model, ("audio",), case.model.features({"visual": case.inputs["visual"]}), tally)
    with pytest.raises(ValueError, match=message):
        TorchAttacks(name)(
            view, {"audio": case.inputs["audio"]}, case.labels, case.threat, draws=draws_for(0, "abcdef")
        )
    assert tally.forwards.tolist() == [0] * 6


def test_tiles_that_would_not_fit_are_said_up_front():
    model = Linear({"audio": InputSpec((144,), -1.0, 1.0, "amplitude")}, 5).eval()
    model.label_kind = "multiclass"
    with pytest.raises(ValueError, match="Square in l2 lays tiles that leave a picture of 12 x 12"):
        Case(norm="l2", model=model).run(TorchAttacks("Square"))


def test_names_and_settings():
    assert parse_bridge("torchattacks:PGD(steps=20)") == TorchAttacks("PGD", {"steps": 20})
    with pytest.raises(ValueError, match="no attack 'pgd' that robustav knows, only FGSM, BIM, "):
        parse_bridge("torchattacks:pgd")
    with pytest.raises(ValueError, match="OnePixel cannot be judged by a budget: it counts changed values"):
        parse_bridge("torchattacks:OnePixel")
    with pytest.raises(ValueError, match=r"no setting 'eps' that is free, only \['alpha', 'random_start', 'steps'\]"):
        parse_bridge("torchattacks:PGD(eps=0.1)")
    assert TorchAttacks("Square").knowledge == "scores"
    assert TorchAttacks("PGD").knowledge == "gradients"


@pytest.mark.parametrize("name", ["PGD", "MIFGSM", "APGD", "CW"])
def test_does_not_depend_on_batch_mates(name):
    attack = quick(name)
    case = Case(norm=attack.kind.norms[-1])
    whole = case.run(attack)["audio"]
    for i in (0, 4):
        torch.testing.assert_close(case.run(attack, "abcdef"[i], [i])["audio"][0], whole[i], rtol=0, atol=1e-6)


def test_together_is_faster_and_then_draws_belong_to_the_batch():
    case, attack = Case(), TorchAttacks("PGD", {"steps": 2}, together=True)
    whole = case.run(attack)["audio"]
    assert torch.equal(case.run(attack)["audio"], whole)
    assert not torch.equal(case.run(attack, seed=1)["audio"], whole)
    assert not torch.allclose(case.run(attack, "e", [4])["audio"][0], whole[4], rtol=0, atol=1e-4)


def test_passes_are_counted_clip_by_clip():
    case, tally = Case(), Tally(6, ("audio",))
    view = AttackView(case.model, ("audio",), case.model.features({"visual": case.inputs["visual"]}), tally)
    for name in ("PGD", "BIM"):
        TorchAttacks(name, {"steps": 4})(
            view, {"audio": case.inputs["audio"]}, case.labels, case.threat, draws=draws_for(0, "abcdef")
        )
    assert (tally.forwards.tolist(), tally.backwards.tolist()) == ([8] * 6, [8] * 6)
    assert tally.zero_gradients().tolist() == [0.0] * 6
    assert tally.looks.tolist() == [8] * 6


def test_nothing_moves_without_a_budget_and_padding_never():
    case = Case(epsilon=0.0)
    assert torch.equal(case.run(TorchAttacks("PGD"))["audio"], case.inputs["audio"])
    case = Case()
    writable = {"audio": torch.arange(64).expand(6, 64) < 40}
    case.threat = case.threat.given(writable=writable)
    found = case.run(TorchAttacks("PGD"))["audio"]
    assert torch.equal(found[:, 40:], case.inputs["audio"][:, 40:])
    assert (found[:, :40] != case.inputs["audio"][:, :40]).any()


def test_the_harness_finds_nothing_wrong(tmp_path):
    model, goal = tiny_fusion("multiclass"), Untargeted("multiclass")
    budgets = {m: Budget("linf", 0.02, low=s.low, high=s.high) for m, s in tiny_specs().items()}
    attacks = {"theirs": TorchAttacks("PGD", {"steps": 3}), "ours": PGD(3)}
    rows = conditions(attacks, [budgets], goal, [("audio",), ("visual",)])
    ledger = evaluate(model, TinySamples(6, "multiclass"), rows, goal, tmp_path)
    assert failures(ledger) == {}


@pytest.mark.parametrize("name", ["PGD", "Square"])
def test_our_classifier_is_their_model(name):
    """Run by torchattacks itself: same decisions, counted passes, and a budget that is one in raw units."""
    import torchattacks

    epsilon = 0.25
    specs = {"audio": InputSpec((100,), -1.0, 1.0, "amplitude"), "visual": tiny_specs()["visual"]}
    model = Linear(specs, 3).eval()
    model.label_kind = "multiclass"
    inputs = batch_of(specs)
    inputs["visual"] = inputs["visual"][:1].expand(6, -1, -1, -1, -1)
    view = as_torchattacks_model(model, "audio", {"visual": inputs["visual"][:1]})
    settings = {"steps": 5, "alpha": view.box.length(epsilon)} if name == "PGD" else {"n_queries": 200}
    attack = getattr(torchattacks, name)(view, eps=view.box.length(epsilon), **settings)
    labels = model(inputs).argmax(1)
    pictures = attack(view.box.pack(inputs["audio"]), labels)
    found = {"audio": view.box.unpack(pictures).clamp(-1, 1)}
    passes = view.tally.forwards.item()
    assert passes == 6 * 5 if name == "PGD" else 6 < passes < 6 * 203
    threat = ThreatModel({"audio": Budget("linf", epsilon * (1 + 1e-5))}, Untargeted("multiclass"))
    specs = {"audio": specs["audio"]}
    assert audit.violations({"audio": inputs["audio"]}, found, threat, specs) == [""] * 6
    logits = model({"audio": found["audio"], "visual": inputs["visual"]})
    torch.testing.assert_close(view(pictures), logits, rtol=1e-4, atol=1e-4)
    assert (logits.argmax(1) != labels).any()
