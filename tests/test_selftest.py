"""The self-test: passes here, and fails as soon as the package has a defect, a flag is missing or a model is slandered."""

import json
import os
import re
from dataclasses import dataclass

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from robustav.attacks import PGD
from robustav.attacks.ascent import Point, climb, look
from robustav.cli import selftest as cli
from robustav.flags import FLAGS
from robustav.goals import Untargeted
from robustav.randomness import draws_for
from robustav.selftest import bench, catalogue, run, source
from robustav.selftest.catalogue import CATALOGUE, NotApplicableError
from robustav.selftest.planted import EPSILON, HONEST, PLANTED, Case, convolutions, dense
from robustav.selftest.run import Outcome, findings, judge_defect, judge_honest, judge_planted, selftest
from robustav.selftest.tiny import SPECS, Clips, draw_clips, network
from robustav.threat import ThreatModel
from robustav.universal import learn

FAST = ("V5", "V7", "V8", "V9", "V10", "V11", "V13")
SOME = ("noise at test time", "detached branch"), ("linear, multi-class", "tanh")


def test_a_part_of_the_self_test_passes():
    """Every kind of outcome; defences by chance and by a flat gradient."""
    before, heard = torch.get_rng_state(), []
    outcomes = selftest(
        lambda what, done, total: heard.append((what, done, total)),
        catalogue={name: CATALOGUE[name] for name in FAST},
        planted={name: PLANTED[name] for name in SOME[0]},
        honest={name: HONEST[name] for name in SOME[1]},
    )
    assert [o for o in outcomes if o.passed is False] == []
    assert [o.name.split()[0] for o in outcomes if o.kind == "defect"] == list(FAST)
    assert [o.name for o in outcomes if o.passed is None] == ["V11 severity 0 of a natural corruption is the identity"]
    assert [o.name for o in outcomes if o.kind == "planted"] == list(SOME[0])
    assert [o.name for o in outcomes if o.kind == "honest"] == list(SOME[1])
    assert all(o.seconds > 0 for o in outcomes)
    assert (heard[0], heard[-1]) == (("testing: V5", 0, 11), ("done", 11, 11))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(
    "ROBUSTAV_WHOLE_SELFTEST" not in os.environ, reason="takes half a minute: set ROBUSTAV_WHOLE_SELFTEST"
)
def test_the_whole_self_test_passes():
    """What a user runs, from end to end."""
    outcomes = selftest()
    assert [o for o in outcomes if o.passed is False] == []
    assert [o.name.split()[0] for o in outcomes if o.passed is None] == ["V11", "V12"]
    assert len(outcomes) == 36


def test_nothing_is_missing_from_the_tables():
    assert list(CATALOGUE) == [f"V{i}" for i in range(1, 17)]
    assert len(PLANTED) == len(HONEST) == 10
    assert all((check.__doc__ or "").startswith(f"{name}: ") for name, check in CATALOGUE.items())


@dataclass(frozen=True)
class Bad:
    """An attack with one of the defects."""

    how: str

    def __call__(self, model, inputs, labels, threat, *, draws):
        match self.how:
            case "leading axis":
                look(model, {m: x.unsqueeze(1) for m, x in inputs.items()}, labels, threat)
                return inputs
            case "box [0, 1]":
                return {m: (x + 1e-4).clamp(0, 1) for m, x in inputs.items()}
            case "one radius":
                largest = max(float(b.epsilon) for b in threat.budgets.values())
                return {m: (inputs[m] + largest).clamp(b.low, b.high) for m, b in threat.budgets.items()}
            case "seeds":
                torch.manual_seed(1)
                return inputs
            case "other modality":
                visual = {"visual": inputs["visual"] * 0} if "visual" in inputs and len(threat.budgets) == 1 else {}
                return {**inputs, **visual}
            case "running count":
                COUNT.append(1)
                return threat.project(inputs, {m: x + 1e-4 * len(COUNT) for m, x in inputs.items()})
            case "refuses":
                raise ValueError("not today")


COUNT: list[int] = []


def doubled(*arguments, **settings):
    learnt = learn(*arguments, **settings)
    return learnt._replace(perturbation={m: 2 * delta for m, delta in learnt.perturbation.items()})


def averaged(model, inputs, labels, threat):
    point, gradients = climb(model, inputs, labels, threat)
    return point, {m: g / labels.shape[1] for m, g in gradients.items()}


def deaf(model, inputs, labels, threat):
    point, gradients = climb(model, inputs, labels, threat)
    return point, {**gradients, "audio": torch.zeros_like(gradients["audio"])}


def attacks(how):
    return [(module, "ATTACKS", {"bad": lambda: Bad(how)}) for module in (bench, catalogue)]


DEFECTS = [
    ("V1", [(catalogue, "PGD", lambda steps: Bad("running count"))], "ends with other bytes"),
    ("V2", attacks("leading axis"), r"shows the model \{\(1, 7\)\} in place of \(7,\)"),
    ("V2", attacks("refuses"), r"Bad\(how='refuses'\) fails under linf: not today"),
    ("V3", attacks("box [0, 1]"), r"audio moved by .* with linf radius 0.0001"),
    ("V3", [(catalogue, "failures", lambda ledger: {}), *attacks("seeds")], "that leaves its budget is not found out"),
    ("V4", attacks("box [0, 1]"), "audio moved by"),
    ("V4", [(Untargeted, "check", lambda *_: None), *attacks("seeds")], "multilabel labels may be torch.int64"),
    ("V5", [(catalogue, "climb", averaged)], "the gradient by audio is off by 0.8"),
    (
        "V6",
        [(catalogue, "undeclared", lambda: {"packaging": "art.py"}), (catalogue, "modules", list)],
        "imported, but not declared: {'packaging'",
    ),
    ("V6", [(catalogue, "modules", lambda: ["robustav.nowhere"])], "ModuleNotFoundError: No module named 'robustav.no"),
    ("V7", [(catalogue, "FGSM", lambda: PGD(1, 0.5, random_start=False))], "one full step of PGD is not FGSM"),
    ("V7", [(catalogue, "worst_case", lambda rows: rows[0])], "the worst case is not taken clip by clip"),
    ("V8", [(Point, "or_better", lambda self, other: other)], "loses a clip that a smaller one had broken"),
    ("V9", [(catalogue, "MomentumFGSM", bench.Straying)], r"Straying\(steps=10\): audio moved by 0.09999"),
    ("V9", [(catalogue.audit, "violations", lambda clean, *_: [""] * 6)], "does not see ten budgets in a row"),
    ("V10", [(catalogue, "learn", doubled)], "after 1 passes audio is 0.2 long, linf radius 0.1"),
    ("V13", [(catalogue, "climb", deaf)], "linf length of class 0 by audio: 0, known"),
    ("V14", attacks("one radius"), "visual moved by 0.05 with linf radius 0.01"),
    ("V14", attacks("other modality"), r"on audio changes \['visual'\]"),
    ("V15", attacks("seeds"), "moves a global generator"),
    ("V16", [(catalogue, "dropped", lambda: {"distutils": "a.py"})], "dropped from newer Pythons: {'distutils'"),
]


@pytest.mark.parametrize(("name", "patches", "words"), DEFECTS, ids=[f"{n}-{w[:20]}" for n, _, w in DEFECTS])
def test_every_defect_is_found_where_it_is(name, patches, words, monkeypatch):
    """Mutations: the package is given the defect, and the check that guards against it must fail, in words."""
    bench.attacks_under.cache_clear()
    with monkeypatch.context() as patch:
        for where, what, value in patches:
            patch.setattr(where, what, value)
        outcome = judge_defect(name, CATALOGUE[name])
    bench.attacks_under.cache_clear()
    assert outcome.passed is False
    assert re.search(words, outcome.found), outcome.found


def test_a_check_that_breaks_down_has_not_passed():
    def broken():
        """V0: nothing works."""
        return 1 / 0

    def absent():
        """V0: of natural corruptions. More words."""
        raise NotApplicableError("there are none")

    def sound():
        pass

    assert judge_defect("V0", broken) == Outcome(
        "V0 nothing works", "defect", False, "ZeroDivisionError: division by zero", 0.0
    )
    assert judge_defect("V0", absent)[2:4] == (None, "there are none")
    assert judge_defect("V0", sound)[2:4] == (True, "")


def test_a_checker_that_finds_nothing_fails_on_every_planted_defence_and_one_that_always_finds_on_every_honest_model():
    """The logic of the outcomes themselves: who says nothing looks honest, and must not pass."""
    blind = selftest(catalogue={}, checker=lambda model, epsilon: {})
    assert [o.passed for o in blind if o.kind == "planted"] == [False] * 10
    assert [o.passed for o in blind if o.kind == "honest"] == [True] * 10
    assert blind[0].found == "nothing; not found: BLACK-BOX-WINS, UNBOUNDED-FAILS, ZERO-GRAD"
    harsh = selftest(catalogue={}, planted={}, checker=lambda model, epsilon: {"UNSTABLE": "It jumps."})
    assert [(o.passed, o.found) for o in harsh] == [(False, "UNSTABLE: It jumps.")] * 10

    def broken(model, epsilon):
        raise RuntimeError("out of order")

    for outcome in selftest(catalogue={}, checker=broken):
        assert (outcome.passed, outcome.found) == (False, "RuntimeError: out of order")


def test_without_assertions_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(run, "_asserts", lambda: False)
    with pytest.raises(ValueError, match=r"Python runs without assertions \(-O, or PYTHONOPTIMIZE\)"):
        selftest()


def test_every_flag_that_a_defence_must_raise_is_asked_for():
    case = Case(lambda: nn.Identity(), frozenset({"ZERO-GRAD", "UNSTABLE"}))
    assert all(case.flags and case.flags <= FLAGS.keys() for case in PLANTED.values())
    assert not any(case.flags for case in HONEST.values())
    half = judge_planted("x", case, lambda model, epsilon: {"UNSTABLE": "", "audit": ""})
    assert (half.passed, half.found) == (False, "UNSTABLE, audit; not found: ZERO-GRAD")
    assert judge_planted("x", case, lambda model, epsilon: dict.fromkeys(["UNSTABLE", "ZERO-GRAD", "MODE"], "")).passed
    assert judge_honest("x", case, lambda model, epsilon: {}).passed


def success(model, epsilon, attack):
    inputs, labels = draw_clips(model.label_kind, 15, seed=9)
    threat = bench.around_both("linf", epsilon)
    threat = ThreatModel(threat.budgets, Untargeted(model.label_kind))
    clean = look(model, inputs, labels, threat).reached
    x = attack(model, inputs, labels, threat, draws=draws_for(0, map(str, range(15))))
    return clean.float().mean().item(), look(model, x, labels, threat).reached.float().mean().item()


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@pytest.mark.parametrize("encoders", [dense, convolutions])
def test_what_the_defences_defend_is_broken_without_them(encoders, label_kind):
    """Else a flag would be a false one, and the number right."""
    clean, broken = success(network(encoders(), label_kind=label_kind), EPSILON, PGD(20))
    assert clean == 0
    assert broken > 0.8


@pytest.mark.parametrize(
    "name",
    ["input quantiser", "saturated logits", "shattered gradients", "thermometer code", "front end outside autograd"],
)
def test_defences_look_robust_to_those_who_only_climb(name):
    """On clips of their own; that is what makes them dangerous."""
    clean, broken = success(PLANTED[name].make(), EPSILON, PGD(20))
    assert clean == 0
    assert broken < 0.2


def test_the_model_with_a_margin_is_robust_and_falls_to_a_large_budget():
    model = HONEST["a margin"].make()
    assert success(model, 0.01, PGD(20)) == (0, 0)
    assert success(model, 0.3, PGD(20)) == (0, 1)


@pytest.mark.parametrize("name", [*PLANTED, *HONEST])
def test_models_are_the_same_every_time_and_leave_the_generators_alone(name):
    make = {**PLANTED, **HONEST}[name].make
    first, second = make(), make()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not any(module.training for module in first.modules())


def test_clips_are_in_range_and_in_memory():
    for label_kind in ("multilabel", "multiclass"):
        clips = Clips(label_kind, 7)
        sample = clips.load(6)
        for m, spec in SPECS.items():
            spec.check(m, sample.inputs[m][None])
        assert clips.labels.shape == ((7, 5) if label_kind == "multilabel" else (7,))
    assert Clips("multilabel", 7).labels.sum(1).tolist() == [2, 1, 1, 2, 1, 1, 2]


def test_a_refusal_of_the_harness_counts_as_found(monkeypatch):
    monkeypatch.setattr(run, "CLIPS", 2)

    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            self.scale.data.mul_(1.001)
            return self.scale * x

    model = network(dense())
    model.head.append(Drifting())
    found = findings(model.eval(), EPSILON)
    assert "changed while it was evaluated: no score can be trusted" in found[run.REFUSED]


def test_what_is_not_declared_is_named(monkeypatch):
    monkeypatch.setattr(
        source, "imports", lambda: {"os": ["a.py"], "numpy": ["b.py"], "nowhere": ["c.py"], "imp": ["d.py"]}
    )
    found = source.undeclared()
    assert found.pop("nowhere") == "c.py"
    assert not {"os", "numpy"} & found.keys()
    assert source.dropped() == {"imp": "d.py"}


def invoke(*arguments):
    app = typer.Typer()
    app.command()(cli.selftest)
    return CliRunner().invoke(app, list(arguments))


OUTCOMES = [
    Outcome("V1 a run resumes", "defect", True, "", 0.5),
    Outcome("V11 of corruptions", "defect", None, "there are [none]", 0.0),
    Outcome("input quantiser", "planted", True, "ZERO-GRAD", 0.25),
    Outcome("linear", "honest", True, "", 0.25),
]


def test_the_command_prints_a_line_each_and_succeeds(monkeypatch):
    monkeypatch.setattr(run, "selftest", lambda progress: OUTCOMES)
    done = invoke()
    assert done.exit_code == 0
    for words in (
        "V1 a run resumes",
        "not applicable",
        "there are [none]",
        "ZERO-GRAD",
        "3 passed, 0 failed, 1 not applicable, in 1 s",
    ):
        assert words in done.output
    assert json.loads(invoke("--json").output)[2] == OUTCOMES[2]._asdict()


def test_the_command_fails_if_anything_failed(monkeypatch):
    failed = OUTCOMES[3]._replace(passed=False, found="UNSTABLE: It jumps.")
    monkeypatch.setattr(run, "selftest", lambda progress: [*OUTCOMES[:3], failed])
    done = invoke()
    assert done.exit_code == 1
    assert "UNSTABLE: It jumps." in done.output
    assert "2 passed, 1 failed, 1 not applicable" in done.output
    assert (invoke("--json").exit_code, json.loads(invoke("--json").output)[3]["passed"]) == (1, False)
