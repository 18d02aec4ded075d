"""Defects V1 to V16 that other tools had or have: each a check that raises `AssertionError` if robustav has it too."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch

from robustav import audit
from robustav.attacks import ATTACKS, FGSM, PGD, MomentumFGSM, Restarts
from robustav.attacks.ascent import climb, look
from robustav.attacks.universal import Universal
from robustav.goals import Untargeted
from robustav.harness import Settings
from robustav.ledger import failures
from robustav.norms import NORMS
from robustav.report.table import worst_case
from robustav.selftest.bench import (
    FEW,
    GOAL,
    KilledError,
    Mortal,
    P,
    Recording,
    Straying,
    around_audio,
    around_both,
    attacks_under,
    check_inside,
    contents,
    evaluated,
    linear_and_weight,
    run,
)
from robustav.selftest.planted import dense
from robustav.selftest.source import dropped, modules, undeclared
from robustav.selftest.tiny import SPECS, draw_clips, network
from robustav.suites import with_settings
from robustav.threat import Budget, ThreatModel
from robustav.universal import learn


class NotApplicableError(Exception):
    """robustav has nothing that could have this defect; the message says what is missing."""


def resume() -> None:
    """V1: a run killed at any stage goes on and ends with the same bytes."""
    calls: list[str] = []
    keeping = Settings(device="cpu", keep=2, progress=lambda what, done, total: calls.append(what))
    attack = PGD(2)
    with TemporaryDirectory() as folder:
        whole = evaluated(Path(folder), Mortal(attack, [0]), keeping, clips=40)
        expected, identity = contents(whole.folder), whole.record()["identity"]

    def dying(at: int) -> Settings:
        left = [at]

        def count(what: str, done: int, total: int) -> None:
            left[0] -= 1
            if not left[0]:
                raise KilledError

        return replace(keeping, progress=count)

    stages = [(Mortal(attack, [0]), dying(at + 1)) for at in range(len(calls))]
    batches = -(-40 // 8)
    stages += [(Mortal(attack, [lives]), keeping) for lives in range(2, batches + 1, 2)]
    for number, (mortal, settings) in enumerate(stages):
        with TemporaryDirectory() as folder:
            try:
                evaluated(Path(folder), mortal, settings, clips=40)
            except KilledError:
                pass
            else:
                raise AssertionError(f"the run was to be killed at stage {number} and was not")
            again = evaluated(Path(folder), Mortal(attack, [0]), keeping, clips=40)
            assert contents(again.folder) == expected, f"killed at stage {number} the run ends with other bytes"
            assert again.record()["identity"] == identity, f"killed at stage {number} the run has another record"


def any_rank() -> None:
    """V2: the batch axis is never guessed: inputs of every rank reach the model as they are."""
    for shape in [(7,), (3, 5), (2, 3, 4), (1, 2, 3, 4)]:
        for norm in NORMS:
            for attack in attacks_under(norm):
                model = Recording(shape)
                x = run(attack, model, {"audio": torch.zeros(2, *shape)}, torch.eye(2, 5), around_audio(norm, 0.1))
                assert x["audio"].shape == (2, *shape), f"{attack!r} returns {list(x['audio'].shape)} for {[2, *shape]}"
                assert model.shown <= {shape}, f"{attack!r} shows the model {model.shown} in place of {shape}"
    taken = {attack for norm in NORMS for attack in attacks_under(norm)}
    idle = [name for name, make in ATTACKS.items() if with_settings(make(), **FEW) not in taken]
    assert not idle, f"no norm suits {idle}"


def declared_box() -> None:
    """V3: no box is assumed: in [-1, 1], with a tiny budget, every point stays in it; one that strays fails the run."""
    inputs, labels = draw_clips("multilabel", 6, seed=4)
    x, model = {"audio": -inputs["audio"][:, :9].abs()}, Recording((9,))
    for norm in NORMS:
        for attack in attacks_under(norm):
            threat = around_audio(norm, 1e-4)
            check_inside(repr(attack), x, run(attack, model, x, labels, threat), threat)
    with TemporaryDirectory() as folder:
        found = failures(evaluated(Path(folder), Straying(2)))
    strayed = list(found) == [f"attack-{'+'.join(SPECS)}-0"]
    assert strayed, f"an attack that leaves its budget is not found out: {list(found)}"


def declared_labels() -> None:
    """V4: inputs of three axes run (see V2 for every rank), and labels of another kind are an error."""
    inputs, indices = draw_clips("multiclass", 6, seed=4)
    _, hot = draw_clips("multilabel", 6, seed=4)
    model = Recording((3, 4))
    x = {"audio": inputs["audio"][:, :12].reshape(6, 3, 4)}
    for norm in NORMS:
        for attack in attacks_under(norm):
            threat = around_audio(norm, 1e-3)
            check_inside(repr(attack), x, run(attack, model, x, hot, threat), threat)
    for goal, labels in ((Untargeted("multilabel"), indices), (Untargeted("multiclass"), hot)):
        try:
            goal.check(labels, 5)
        except ValueError:
            continue
        raise AssertionError(f"{goal.label_kind} labels may be {labels.dtype} {list(labels.shape)}")


def multi_label_gradient() -> None:
    """V5: the gradient on multi-hot labels is that of the summed binary cross-entropy, written out by hand."""
    model, weight = linear_and_weight()
    inputs, labels = draw_clips("multilabel", 6, seed=4)
    labels[4] = 0
    _, gradients = climb(model, inputs, labels, around_both("linf", 0.1))
    slope = model(inputs).detach().sigmoid() - labels
    for m in SPECS:
        by_hand = slope @ weight[m]
        gap = (gradients[m].flatten(1) - by_hand).abs().max() / by_hand.abs().max()
        assert gap < 1e-4, f"the gradient by {m} is off by {gap:.2g} of its largest value"


def everything_imports() -> None:
    """V6: every module imports, and no package is imported that is not declared."""
    for module in modules():
        importlib.import_module(module)
    missing = undeclared()
    assert not missing, f"imported, but not declared: {missing}"


def steps_are_steps() -> None:
    """V7: n steps are n updates, the last one scored; an ensemble takes the worst row clip by clip."""
    model = network(dense())
    inputs, labels = draw_clips("multilabel", 6, seed=4)
    for norm in NORMS:
        threat = around_both(norm, 0.1)
        single = run(PGD(1, 1.0, random_start=False), model, inputs, labels, threat)
        for m, x in run(FGSM(), model, inputs, labels, threat).items():
            assert torch.equal(single[m], x), f"under {norm} one full step of PGD is not FGSM in {m}"
            assert not torch.equal(x, inputs[m]), f"under {norm} one step leaves {m} where it was"
    straight, silence = Recording((9,)), {"audio": torch.zeros(2, 9)}
    threat = around_audio("linf", 0.1).steered(lambda logits, labels: logits[:, 0])
    for steps in (1, 2, 5):
        moved = run(PGD(steps, 0.1, random_start=False), straight, silence, torch.eye(2, 5), threat)["audio"]
        length = moved.abs().max().item()
        assert abs(length - steps * 0.01) < 1e-6, f"{steps} steps of 0.01 come to {length:g}"
    shared = {"forwards": 1, "backwards": 1, "violation": ""}
    one = pd.DataFrame({"sample": ["a", "b", "c"], "reached": [True, False, False], "loss": [0.0, 2.0, 1.0], **shared})
    other = pd.DataFrame(
        {"sample": ["a", "b", "c"], "reached": [False, True, False], "loss": [9.0, 1.0, 3.0], **shared}
    )
    for rows in ([one, other], [other, one]):
        worst = worst_case(rows)
        assert list(worst["reached"]) == [True, True, False], "the worst case is not taken clip by clip"
        assert list(worst["loss"]) == [0.0, 1.0, 3.0], "the worst case holds a point that is not the worst"


def restarts_only_help() -> None:
    """V8: more restarts, or more steps, never lose a success on any clip."""
    model = network(dense())
    inputs, labels = draw_clips("multilabel", 12, seed=4)
    threat = around_both("linf", 0.06)
    for many in ([Restarts(PGD(2), times) for times in (1, 2, 4, 8)], [PGD(steps, 0.4) for steps in (1, 2, 4, 8)]):
        before = torch.zeros(12, dtype=torch.bool)
        for attack in many:
            reached = look(model, run(attack, model, inputs, labels, threat), labels, threat).reached
            assert not (before & ~reached).any(), f"{attack!r} loses a clip that a smaller one had broken"
            before = reached


def iterates_stay() -> None:
    """V9: the budget lies around the clean input, not around the iterate, in input units; the audit would see it."""
    model = network(dense())
    inputs, labels = draw_clips("multilabel", 6, seed=4)
    for norm in NORMS:
        for epsilon in (0.01, 0.3):
            threat = around_both(norm, epsilon)
            for attack in (MomentumFGSM(10), PGD(10, 1.0)):
                check_inside(repr(attack), inputs, run(attack, model, inputs, labels, threat), threat)
    threat = around_both("linf", 0.01)
    strayed = audit.violations(inputs, run(Straying(10), model, inputs, labels, threat), threat, SPECS)
    assert all(strayed), "the audit does not see ten budgets in a row"


def universal_stays() -> None:
    """V10: a universal perturbation is itself within the budget, however many passes it was learnt in."""
    model, _ = linear_and_weight()  # its gradients keep their signs, so that a running sum would grow without end
    inputs, labels = draw_clips("multilabel", 6, seed=4)
    for norm in NORMS:
        threat = around_both(norm, 0.1)
        for passes in (1, 5, 20):
            learnt = learn(model, lambda: [(inputs, labels)], threat, passes=passes, relative_step=1.0, shift=False)
            for m, delta in learnt.perturbation.items():
                length = delta.double().flatten().norm(p=P[norm]).item()
                assert length <= 0.1 * (1 + 1e-6), f"after {passes} passes {m} is {length:.6g} long, {norm} radius 0.1"
                assert length > 0.05, f"after {passes} passes {m} has learnt nothing"
            x = run(Universal(learnt.perturbation), model, inputs, labels, threat)
            check_inside("the universal attack", inputs, x, threat)


def corruption_zero() -> None:
    """V11: severity 0 of a natural corruption is the identity."""
    raise NotApplicableError("robustav has no natural corruptions yet")


def corruption_order() -> None:
    """V12: a natural corruption's severities are ordered, and all of them run."""
    raise NotApplicableError("robustav has no natural corruptions yet")


def gradients_by_class() -> None:
    """V13: gradients of one class after another are that class's weights in each modality: none cleared, none added up."""
    model, weight = linear_and_weight()
    inputs, labels = draw_clips("multilabel", 3, seed=4)
    for c in range(labels.shape[1]):
        threat = around_both("linf", 0.1).steered(lambda logits, labels, c=c: logits[:, c])
        _, gradients = climb(model, inputs, labels, threat)
        for m in SPECS:
            for norm, rules in NORMS.items():
                found, known = rules.length(gradients[m])[0].item(), weight[m][c].norm(p=P[norm]).item()
                assert abs(found - known) < 1e-4 * known, (
                    f"{norm} length of class {c} by {m}: {found:g}, known {known:g}"
                )
    assert all(parameter.grad is None for parameter in model.parameters()), "an attack leaves gradients on the model"


def budgets_apart() -> None:
    """V14: each modality has its own radius, norm and range; one that is not attacked stays bit for bit."""
    model = network(dense())
    inputs, labels = draw_clips("multilabel", 6, seed=4)
    edges = {m: torch.where(x > x.median(), SPECS[m].high, SPECS[m].low) for m, x in inputs.items()}
    apart = ThreatModel({"audio": Budget("linf", 0.05), "visual": Budget("linf", 0.01, low=0.0, high=1.0)}, GOAL)
    for attack in attacks_under("linf"):
        x = run(attack, model, edges, labels, apart)
        check_inside(repr(attack), edges, x, apart)
        for chosen in SPECS:
            x = run(attack, model, inputs, labels, ThreatModel({chosen: apart.budgets[chosen]}, GOAL))
            moved = [m for m in SPECS if m != chosen and not torch.equal(x[m], inputs[m])]
            assert not moved, f"{attack!r} on {chosen} changes {moved}"
    mixed = ThreatModel({"audio": Budget("l2", 0.3), "visual": Budget("l1", 2.0, low=0.0, high=1.0)}, GOAL)
    for gradient in (PGD(5), FGSM(), MomentumFGSM(5)):
        check_inside(repr(gradient), edges, run(gradient, model, edges, labels, mixed), mixed)


def generators_alone() -> None:
    """V15: no attack, and no evaluation, moves a global random generator, of torch or of NumPy."""
    model = network(dense())
    inputs, labels = draw_clips("multilabel", 3, seed=4)

    def states() -> tuple[bytes, bytes]:
        return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()  # type: ignore[index]  # noqa: NPY002

    before = states()
    for norm in NORMS:
        for attack in attacks_under(norm):
            run(attack, model, inputs, labels, around_both(norm, 0.1))
            assert states() == before, f"{attack!r} moves a global generator"
    with TemporaryDirectory() as folder:
        evaluated(Path(folder), Restarts(PGD(2), 2))
    assert states() == before, "an evaluation moves a global generator"


def nothing_gone() -> None:
    """V16: nothing is imported that a supported Python no longer has."""
    gone = dropped()
    assert not gone, f"imported, but dropped from newer Pythons: {gone}"
    for module in modules():
        importlib.import_module(module)


CATALOGUE: dict[str, Callable[[], None]] = {
    "V1": resume,
    "V2": any_rank,
    "V3": declared_box,
    "V4": declared_labels,
    "V5": multi_label_gradient,
    "V6": everything_imports,
    "V7": steps_are_steps,
    "V8": restarts_only_help,
    "V9": iterates_stay,
    "V10": universal_stays,
    "V11": corruption_zero,
    "V12": corruption_order,
    "V13": gradients_by_class,
    "V14": budgets_apart,
    "V15": generators_alone,
    "V16": nothing_gone,
}
