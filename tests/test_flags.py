"""Flags: every planted fault is named, and nothing is said against honest models or honest rows."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CLASSES, Linear, batch_of, tiny_fusion, tiny_specs
from torch import nn

from robustav.classifier import Classifier
from robustav.flags import FLAGS, Flag, inspect, probe
from robustav.flags.flag import clips, raised
from robustav.flags.slopes import whole_range
from robustav.goals import Hide, PushLatent, Targeted, Untargeted
from robustav.threat import Budget, ThreatModel

CLIPS = 12


class Behind(Classifier):
    """The tiny fusion with a function in front of every modality, and one behind its logits."""

    def __init__(self, front=lambda m, x: x, behind=lambda z: z, label_kind="multilabel"):
        super().__init__()
        self.model, self.front, self.behind = tiny_fusion(label_kind), front, behind
        self.specs, self.classes, self.label_kind = self.model.specs, self.model.classes, label_kind
        with torch.no_grad():  # scores that depend on the input about as much as a trained model's do
            self.model.head.weight.mul_(5)

    def front_end(self, modality, raw):
        return self.front(modality, raw)

    def encode(self, modality, x):
        return self.model.encode(modality, x)

    def fuse(self, features):
        return self.model.fuse(features)

    def classify(self, latent):
        return self.behind(self.model.classify(latent))


def threat_of(norm="linf", epsilon=0.05, attacked=("audio", "visual")):
    specs = tiny_specs()
    return ThreatModel({m: Budget(norm, epsilon, low=specs[m].low, high=specs[m].high) for m in attacked})


def own_words(model, inputs):
    """The model's own prediction as labels, so that every clip is to be had."""
    with torch.no_grad():
        top = model.eval()(inputs).argmax(1)
    return top if model.label_kind == "multiclass" else torch.eye(len(model.classes))[top]


def spread_clips(count=CLIPS):
    """Clips of different brightness and loudness, which the tiny models tell apart."""
    generator = torch.Generator().manual_seed(2)
    mid = {m: (spec.low + spec.high) / 2 for m, spec in tiny_specs().items()}
    sizes = torch.rand(count, generator=generator) * 1.8
    rough = batch_of(tiny_specs(), count)
    return {m: mid[m] + (x - mid[m]) * sizes.reshape(-1, *[1] * (x.ndim - 1)) for m, x in rough.items()}


def flagged(model, goal=None, threat=None, inputs=None, labels=None, **more):
    inputs = inputs or spread_clips()
    labels = own_words(model, inputs) if labels is None else labels
    goal = goal or Untargeted(model.label_kind)
    return probe(model, inputs, labels, goal, threat or threat_of(), seed=0, **more)


def names(flags):
    return {flag.name for flag in flags}


def words_of(flags, name):
    (words,) = {flag.sentence for flag in flags if flag.name == name}
    return words


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("linf", 1e-4), ("linf", 0.5), ("l2", 0.3), ("l1", 1.0)])
def test_says_nothing_against_an_honest_model(label_kind, norm, epsilon):
    assert flagged(Behind(label_kind=label_kind), threat=threat_of(norm, epsilon)) == []


@pytest.mark.parametrize(
    "goal",
    [Untargeted(success="label-set"), Untargeted(loss_name="top1"), Targeted(target=1), Hide(chosen=(0,))],
    ids=repr,
)
def test_says_nothing_under_other_goals(goal):
    assert flagged(Behind(), goal) == []


def test_says_nothing_of_a_goal_that_needs_the_clean_latent():
    assert flagged(Behind(), PushLatent()) == []


@pytest.mark.parametrize("attacked", [("audio",), ("visual",)])
def test_says_nothing_of_an_attack_on_one_modality(attacked):
    assert flagged(Behind(), threat=threat_of(attacked=attacked)) == []


def test_says_nothing_of_a_linear_model_or_of_an_snr():
    model = Linear(tiny_specs(), 4).eval()
    budgets = {m: Budget("l2", snr_db=20.0, low=s.low, high=s.high) for m, s in tiny_specs().items()}
    assert flagged(model) == []
    assert flagged(model, threat=ThreatModel(budgets)) == []


def test_says_nothing_where_logits_happen_to_lie_between_0_and_1():
    """Clean logits about 0.5 are not yet probabilities: elsewhere the model leaves [0, 1]."""
    calm = {m: x * 1e-3 + (0.0 if m == "audio" else 0.5) for m, x in spread_clips().items()}
    with torch.no_grad():
        usual = Behind().eval()(calm).mean(0)
    model = Behind(behind=lambda z: 0.5 + z - usual)
    with torch.no_grad():
        assert ((model.eval()(calm) > 0) & (model(calm) < 1)).all()
    assert "PROBABILITIES" not in names(flagged(model, inputs=calm))


def test_finds_probabilities_only_where_an_ascent_does_not_leave_them_either():
    """Random ends of the range average out, and all scores stay in [0, 1]; a climb does not."""
    model = Linear(tiny_specs(), 2).eval()
    with torch.no_grad():
        model.weights["audio"].copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 64) / 64)
        model.weights["visual"].fill_(1 / 96)
    inputs = batch_of(tiny_specs(), CLIPS)
    with torch.no_grad():
        assert ((model(inputs) > 0) & (model(inputs) < 1)).all()
    assert "PROBABILITIES" not in names(flagged(model, inputs=inputs))


def test_a_pixel_that_does_not_matter_is_no_zero_gradient():
    assert flagged(Behind(lambda m, x: torch.cat([x[:, :1] * 0, x[:, 1:]], dim=1))) == []


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 3e-5])
def test_rounding_is_not_instability(epsilon):
    assert flagged(Behind(), threat=threat_of(epsilon=epsilon)) == []


def test_counts_clips_that_were_to_be_had():
    model, inputs = Behind(lambda m, x: (8 * x).round() / 8), spread_clips()
    labels = own_words(model, inputs)
    labels[:4] = labels[:4].roll(1, 1)
    words = words_of(flagged(model, inputs=inputs, labels=labels), "UNBOUNDED-FAILS")
    assert "miss the goal on 7 of 7 clips" in words, "one of the eight has no neighbour with another answer"


def test_finds_a_quantiser():
    flags = flagged(Behind(lambda m, x: (8 * x).round() / 8))
    assert {"ZERO-GRAD", "UNBOUNDED-FAILS"} <= names(flags)
    zero = [flag.sentence for flag in flags if flag.name == "ZERO-GRAD"]
    assert zero == [
        f"The gradient by {m} is exactly zero on 12 of 12 clips (100 %), before any step." for m in tiny_specs()
    ]


def test_finds_a_detached_branch_and_names_the_modality():
    flags = flagged(Behind(lambda m, x: x.detach() if m == "audio" else x))
    assert "by audio is exactly zero on 12 of 12 clips" in words_of(flags, "ZERO-GRAD")


def test_a_stand_in_answers_for_the_gradient():
    class StraightThrough(Behind):
        def surrogate(self):
            return Behind()

    assert flagged(StraightThrough(lambda m, x: (64 * x).round() / 64)) == []


@pytest.mark.parametrize("label_kind", ["multilabel", "multiclass"])
def test_finds_saturated_logits(label_kind):
    inputs, model = spread_clips(), Behind(behind=lambda z: 1e4 * z, label_kind=label_kind).eval()
    with torch.no_grad():
        sure = (model(inputs) > 0).float() if label_kind == "multilabel" else model(inputs).argmax(1)
    flags = flagged(model, threat=threat_of(epsilon=0.3), inputs=inputs, labels=sure)
    assert {"ZERO-GRAD", "LOGIT-SCALE"} <= names(flags)
    assert "are brought to 5" in words_of(flags, "LOGIT-SCALE")


def test_large_logits_are_no_fault_where_the_loss_ignores_their_scale():
    goal = Untargeted(loss_name="top1")
    assert flagged(Behind(behind=lambda z: 1e4 * z), goal, threat_of(epsilon=0.3)) == []


def test_finds_shattered_gradients():
    jagged = Behind(lambda m, x: x + 1e-3 * (1e5 * x).sin())
    assert "on 8 of 8 clips (100 %) the gradient does not foretell how" in words_of(flagged(jagged), "UNSTABLE")


def test_finds_chance_and_says_if_it_was_declared():
    model = Behind(lambda m, x: x + 0.01 * torch.randn_like(x))
    (flag,) = [f for f in flagged(model) if f.name == "RANDOMISED"]
    assert flag.sentence.startswith("The model is not deterministic: over 5 passes on the same 12 clips")
    model.stochastic = True
    (flag,) = [f for f in flagged(model) if f.name == "RANDOMISED"]
    assert flag.sentence.startswith("The model is declared stochastic") and "EOT" in flag.advice
    assert {"UNSTABLE", "LOGIT-SCALE"}.isdisjoint(names(flagged(model))), "chance was reported three times"


def test_finds_chance_that_changes_no_verdict():
    flags = flagged(Behind(behind=lambda z: z * (1 + 1e-3 * torch.randn_like(z))))
    assert words_of(flags, "RANDOMISED").endswith("and 12 clips are right.")


def test_rounding_is_not_chance():
    assert flagged(Behind(behind=lambda z: z * (1 + 1e-6 * torch.randn_like(z)))) == []


@pytest.mark.parametrize(
    ("label_kind", "last"), [("multilabel", torch.sigmoid), ("multiclass", lambda z: z.softmax(1))]
)
def test_finds_probabilities(label_kind, last):
    words = words_of(flagged(Behind(behind=last, label_kind=label_kind)), "PROBABILITIES")
    assert ("sum to 1" in words) == (label_kind == "multiclass")


def test_sigmoids_of_a_multiclass_model_do_not_sum_to_1_and_are_left_alone():
    assert "PROBABILITIES" not in names(flagged(Behind(behind=torch.sigmoid, label_kind="multiclass")))


def test_finds_a_gradient_that_is_no_number():
    flags = flagged(Behind(lambda m, x: (x - x.detach()).abs().sqrt() + x if m == "audio" else x))
    assert words_of(flags, "BAD-GRAD") == "The gradient by audio holds NaN on 12 of 12 clips (100 %)."


def test_finds_a_gradient_that_turns_bad_on_the_way():
    def front(m, x):
        return x + 0.01 * (1 - x).sqrt() if m == "visual" else x  # the slope is infinite at the end of the range

    flags = flagged(Behind(front))
    assert "could not be computed: the gradient by 'visual' is not finite" in words_of(flags, "BAD-GRAD")


def test_finds_a_front_end_that_autograd_cannot_pass():
    flags = flagged(Behind(lambda m, x: torch.from_numpy(x.numpy())))
    assert "Can't call numpy" in words_of(flags, "BAD-GRAD")


def with_inner_gradient(m, x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(leaf.square().sum(), leaf)
    return x - 0.01 * slope


def with_inner_backward(m, x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        leaf.square().sum().backward()
    return x - 0.01 * leaf.grad


def with_function_transform(m, x):
    return x - 0.01 * torch.func.grad(lambda y: y.square().sum())(x.detach())


inner_grad = torch.autograd.grad  # as a module that imported it by name has it


def with_imported_grad(m, x):
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return x - 0.01 * inner_grad(leaf.square().sum(), leaf)[0]


@pytest.mark.parametrize(
    "front", [with_inner_gradient, with_inner_backward, with_function_transform, with_imported_grad]
)
def test_finds_gradients_taken_inside(front):
    before = torch.autograd.grad, torch.autograd.backward
    assert names(flagged(Behind(front))) == {"DYNAMIC"}
    assert (torch.autograd.grad, torch.autograd.backward) == before


def test_finds_train_mode_and_leaves_it_as_it_was():
    model = Behind()
    labels = own_words(model, spread_clips())
    model.model.encoders["audio"][2].train()
    (flag,) = flagged(model, labels=labels)
    assert flag.name == "MODE" and flag.sentence.endswith("are in train mode: 'model.encoders.audio.2'.")
    assert model.model.encoders["audio"][2].training and not model.training


class Stubborn(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(True)


def test_finds_a_batch_norm_that_stays_in_train_mode_and_what_it_writes():
    model = Behind()
    model.model.encoders["audio"][2] = Stubborn(4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [flag for flag in flagged(model) if flag.name == "MODE"]
    assert any("train mode" in flag.sentence for flag in flags)
    assert any("changed while clean clips were scored" in flag.sentence for flag in flags)
    after = model.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert all(name.startswith("model.encoders.audio.2") for name in changed), "own_words wrote these, before"


def test_undoes_what_the_model_does_to_itself():
    class Learning(Behind):
        def __init__(self):
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def encode(self, modality, x):
            self.passes = self.passes + 1
            with torch.enable_grad():
                self.model.head.weight.square().sum().backward()
            return super().encode(modality, x)

    model = Learning()
    labels = own_words(model, spread_clips())
    model.passes.zero_()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    flags = flagged(model, labels=labels)
    assert {"MODE", "DYNAMIC"} <= names(flags) and "'passes'" in words_of(flags, "MODE")
    assert model.passes == 0
    assert all((parameter.grad == 1).all() for parameter in model.parameters())


def test_leaves_the_model_the_inputs_and_the_generators_alone():
    model, inputs = Behind(lambda m, x: x + 0.01 * torch.randn_like(x)), spread_clips()
    labels = own_words(model, inputs)
    before = {m: x.clone() for m, x in inputs.items()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    flags = flagged(model, inputs=inputs, labels=labels)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(inputs[m], x) for m, x in before.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    torch.manual_seed(99)
    assert flagged(model, inputs=inputs, labels=labels) == flags, "figures depend on the global generator"


def test_finds_gradients_that_lead_nowhere_though_they_are_not_zero():
    """The right slope times nearly nothing, plus a wrong one: the attack climbs a hill that is not there."""

    class Misled(Behind):
        def front_end(self, modality, raw):
            return (8 * raw).round() / 8 + 0 * raw + (raw - raw.detach()) * -1.0

    model = Misled()
    assert "UNBOUNDED-FAILS" in names(flagged(model))


def test_few_classes_concern_losses_that_compare_several():
    goal = Untargeted("multiclass", loss_name="dlr")
    assert names(flagged(Behind(label_kind="multiclass"), goal)) == {"FEW-CLASSES"}
    four = Linear(tiny_specs(), 4).eval()
    four.label_kind = "multiclass"
    assert flagged(four, goal) == []


def test_costs_what_it_says():
    counted = []

    def count(m, x):
        counted.append(len(x) * (3 if x.requires_grad else 1) * (m == "audio"))
        return x

    flagged(Behind(count), inputs=spread_clips(24))
    assert 30 < sum(counted) / 24 - 100 * 8 / 24 < 50
    counted.clear()
    flagged(Behind(count, lambda z: 1e4 * z), inputs=spread_clips(24))
    assert sum(counted) / 24 < 150


def test_the_whole_range_has_an_end():
    clean = torch.tensor([[0.5, -3.0]])
    assert whole_range(Budget("l2", 0.1), clean).epsilon == 2
    assert whole_range(Budget("l2", snr_db=3.0, low=float("-inf"), high=1.0), clean).epsilon == 3000


def test_batches_do_not_change_what_is_found():
    model = Behind(lambda m, x: (8 * x).round() / 8)
    assert flagged(model, batch_size=5) == flagged(model, batch_size=12)


# Rows of the ledger.

NEVER = [False] * 20


def clean_rows(count=20, wrong=0, classes=6):
    return pd.DataFrame(
        {
            "sample": [f"clip {i}" for i in range(count)],
            "skipped": None,
            "logits": [np.zeros(classes, dtype=np.float32)] * count,
            "reached": [i < wrong for i in range(count)],
            "violation": "",
        }
    )


def attack_rows(reached=NEVER, **columns):
    """Rows of an attack that reached the goal where it says, and left nothing to remark upon."""
    count = len(reached)
    given = {
        "sample": [f"clip {i}" for i in range(count)],
        "skipped": None,
        "reached": reached,
        "violation": "",
        "settled": "",
        "late_gain": 0.0,
        "forwards": 100,
        "ever_reached": reached,
        "zero_gradients_audio": 0.0,
        "zero_gradients_visual": 0.0,
        "reached_source": None,
    }
    return pd.DataFrame(given | columns)


def said(name="apgd", knowledge="gradients", level=0, attacked=("audio", "visual"), attack="APGD(steps=25)", **more):
    return {
        "name": name,
        "attacked": list(attacked),
        "level": level,
        "radii": dict.fromkeys(attacked, 0.01 * (level + 1)),
        "attack": attack,
        "knowledge": knowledge,
        "roams": False,
        "after": [],
    } | more


def first(count, total=20):
    return [i < count for i in range(total)]


def last(count, total=20):
    return [i >= total - count for i in range(total)]


def look(frames, described, clean=None):
    return inspect(frames, described, clean_rows() if clean is None else clean)


def test_says_nothing_of_honest_rows():
    frames = {
        "clean": clean_rows(wrong=2),
        "noise": attack_rows(first(3)),
        "fgsm": attack_rows(first(8), late_gain=np.nan),
        "apgd": attack_rows(first(14)),
        "square": attack_rows(first(12), zero_gradients_audio=np.nan),
        "far": attack_rows(first(18)),
        "transfer": attack_rows(first(9), reached_source=first(11)),
    }
    described = {
        "clean": {"name": "clean", "attacked": [], "level": 0, "attack": ""},
        "noise": said("noise", "nothing"),
        "fgsm": said("fgsm"),
        "apgd": said(),
        "square": said("square", "scores"),
        "far": said(level=1),
        "transfer": said("transfer", "transfer"),
    }
    assert look(frames, described, clean_rows(wrong=2)) == []


def test_zero_gradients_count_where_the_attack_failed():
    shares = [0.5] * 10 + [0.0] * 10
    (flag,) = look({"a": attack_rows(last(10), zero_gradients_visual=shares)}, {"a": said()})
    assert flag == raised(
        "ZERO-GRAD",
        "Where apgd on audio+visual at 0.01, 0.01 failed, 50 % of its gradients by visual were exactly zero, on 10 of 10 clips (100 %).",
        "a",
    )
    assert look({"a": attack_rows(first(10), zero_gradients_visual=shares)}, {"a": said()}) == []
    assert look({"a": attack_rows(zero_gradients_audio=shares)}, {"a": said(attacked=("visual",))}) == []
    settled = attack_rows(zero_gradients_audio=shares, settled=["b"] * 10 + [""] * 10)
    assert look({"a": settled}, {"a": said()}) == []


def test_a_zero_gradient_in_a_thousand_is_no_matter():
    assert look({"a": attack_rows(zero_gradients_audio=[0.02] + [0.0] * 19)}, {"a": said()}) == []


def test_finds_attacks_that_were_still_climbing():
    gains = [0.2] * 8 + [0.0] * 12
    (flag,) = look({"a": attack_rows(last(4), late_gain=gains)}, {"a": said()})
    assert (
        flag.name == "NOT-CONVERGED"
        and flag.sentence.startswith("8 of the 16 clips that stand")
        and flag.condition == "a"
    )


def test_still_climbing_does_not_matter_where():
    described = {"a": said(), "b": said("pgd")}
    gains = [0.2] * 8 + [0.0] * 12
    assert look({"a": attack_rows(last(4), late_gain=gains[:2] + [0.0] * 18)}, {"a": said()}) == [], (
        "too few to change much"
    )
    assert look({"a": attack_rows(first(8), late_gain=gains)}, {"a": said()}) == [], "these fell"
    other = {"a": attack_rows(late_gain=gains), "b": attack_rows(first(8))}
    assert look(other, described) == [], "another attack broke them"
    other = {"a": attack_rows(late_gain=gains), "b": attack_rows(late_gain=0.01)}
    assert look(other, described) == [], "another attack had come to rest"
    assert look({"a": attack_rows(late_gain=np.nan)}, {"a": said()}) == [], "too short to tell"
    assert look({"a": attack_rows(late_gain=gains)}, {"a": said(knowledge="scores")}) == [], (
        "a search does not converge"
    )


@pytest.mark.parametrize(
    ("looks", "gain", "climbs"), [(100, 0.06, True), (100, 0.04, False), (25, 0.15, False), (25, 0.3, True)]
)
def test_a_short_attack_must_climb_faster_to_be_called_climbing(looks, gain, climbs):
    """A steady climb gains 10 / 25 in the last ten of 25 looks; half of that pace is the bar, and never below 5 %."""
    flags = look({"a": attack_rows(late_gain=gain, forwards=looks)}, {"a": said()})
    assert names(flags) == ({"NOT-CONVERGED"} if climbs else set())


def test_an_attack_too_short_to_tell_does_not_hide_one_that_climbs():
    frames = {"a": attack_rows(late_gain=[0.2] * 20), "b": attack_rows(late_gain=np.nan)}
    assert names(look(frames, {"a": said(), "b": said("fgsm")})) == {"NOT-CONVERGED"}


def test_finds_silent_success():
    (flag,) = look({"a": attack_rows(ever_reached=first(2))}, {"a": said()})
    assert flag.name == "SILENT-SUCCESS" and "2 of 20 clips (10 %)" in flag.sentence
    assert look({"a": attack_rows(ever_reached=first(1))}, {"a": said()}) == []
    assert look({"a": attack_rows(ever_reached=first(2))}, {"a": said(roams=True)}) == []
    many = attack_rows([False] * 400, ever_reached=first(4, 400))
    assert look({"a": many}, {"a": said()}, clean_rows(400)) == [], "one clip in a hundred may be rounding"


@pytest.mark.parametrize("knowledge", ["scores", "labels", "transfer"])
def test_finds_a_black_box_that_wins(knowledge):
    described = {"a": said(), "b": said("other", knowledge, attack="Other()")}
    frames = {"a": attack_rows(first(5)), "b": attack_rows(last(3), reached_source=last(3))}
    (flag,) = look(frames, described)
    assert flag.name == "BLACK-BOX-WINS" and flag.condition == "b" and "fools 3 of 20 clips (15 %)" in flag.sentence
    assert look({**frames, "b": attack_rows(last(1), reached_source=last(1))}, described) == [], "one clip is chance"
    assert look({**frames, "b": attack_rows(first(5), reached_source=first(5))}, described) == [], "no new clip"


def test_a_black_box_wins_against_attacks_of_its_own_threat_only():
    frames = {"a": attack_rows(first(5)), "b": attack_rows(last(3))}
    square = said("square", "scores", attacked=("audio",))
    assert look(frames, {"a": said(), "b": square}) == [], "the gradient attack was given more"
    assert names(look(frames, {"a": said(attacked=("audio",)), "b": said("square", "scores")})) == {"BLACK-BOX-WINS"}
    assert look(frames, {"a": said(level=1), "b": said("square", "scores")}) == []
    assert look({"b": frames["b"]}, {"b": square}) == [], "nothing to compare with"


def test_a_point_that_another_attack_left_is_no_win_of_this_one():
    described = {"a": said(), "b": said("square", "scores", after=["a"])}
    settled = ["a"] * 5 + [""] * 15
    assert look({"a": attack_rows(first(5)), "b": attack_rows(first(5), settled=settled)}, described) == []
    frames = {"a": attack_rows(first(5), settled=["b"] * 5 + [""] * 15), "b": attack_rows(first(5))}
    assert look(frames, described) == [], "the gradient attack never tried"


def test_a_win_is_told_once():
    described = {"a": said(), "b": said("square", "scores"), "c": said("rays", "labels", after=["b"])}
    settled = attack_rows(last(3), settled=[""] * 17 + ["b"] * 3)
    flags = look({"a": attack_rows(), "b": attack_rows(last(3)), "c": settled}, described)
    assert [(flag.name, flag.condition) for flag in flags] == [("BLACK-BOX-WINS", "b")]


def test_wins_are_told_in_points_of_all_clips():
    described = {"a": said(), "b": said("square", "scores")}
    for won, expected in ((4, set()), (5, {"BLACK-BOX-WINS"})):
        frames = {"a": attack_rows([False] * 2000), "b": attack_rows(first(won, 2000))}
        assert names(look(frames, described, clean_rows(2000))) == expected


def test_finds_a_gap_in_transfer():
    described = {"t": said("transfer", "transfer")}
    (flag,) = look({"t": attack_rows(first(2), reached_source=first(18))}, described)
    assert flag.name == "TRANSFER-GAP" and flag.sentence.endswith(
        "made on with 18 of 20 clips (90 %), and this one with 2."
    )
    assert look({"t": attack_rows(first(9), reached_source=first(18))}, described) == []
    both = {"t": attack_rows(first(2), reached_source=first(18)), "a": attack_rows(first(20))}
    assert look(both, described | {"a": said()}) == [], "the gradient attack has settled the matter"


def test_finds_noise_that_wins():
    described = {"n": said("noise", "nothing"), "a": said()}
    (flag,) = look({"n": attack_rows(last(6)), "a": attack_rows(first(4))}, described)
    assert flag.name == "NOISE-WINS" and flag.condition == "a"
    assert flag.sentence.endswith("succeeds on 4 of 20 clips (20 %), random noise of the same size on 6.")
    assert look({"n": attack_rows(last(5)), "a": attack_rows(first(4))}, described) == [], "one clip is chance"
    described["n"]["level"] = 1
    assert look({"n": attack_rows(last(6)), "a": attack_rows(first(4))}, described) == []


def test_noise_and_attack_are_compared_on_clips_that_both_tried():
    described = {"n": said("noise", "nothing"), "f": said("fgsm"), "a": said(after=["f"])}
    spared = attack_rows(first(4), settled=["f"] * 4 + [""] * 16)
    flags = look({"n": attack_rows(last(3)), "f": attack_rows(first(4)), "a": spared}, described)
    assert [(flag.name, flag.condition) for flag in flags] == [("NOISE-WINS", "a")]


def test_noise_is_held_against_gradient_attacks_only():
    described = {"n": said("noise", "nothing"), "a": said("rays", "labels")}
    assert look({"n": attack_rows(last(6)), "a": attack_rows(first(4))}, described) == []


def test_finds_a_larger_budget_that_does_worse():
    described = {"a": said(), "b": said(level=1)}
    (flag,) = look({"a": attack_rows(first(15)), "b": attack_rows(first(5))}, described)
    assert flag.name == "NOT-MONOTONE" and flag.condition == "b"
    assert (
        "leaves 10 of 20 clips (50 %) standing that it fools within the smaller budget 1, and wins 0" in flag.sentence
    )
    assert look({"a": attack_rows(first(5)), "b": attack_rows(first(15))}, described) == []
    assert look({"a": attack_rows(first(8)), "b": attack_rows(last(6))}, described) == [], "eight against six is chance"
    assert (
        look({"a": attack_rows(first(15)), "b": attack_rows(first(5))}, described | {"b": said("pgd", level=1)}) == []
    )


@pytest.mark.parametrize(
    ("one", "other", "larger"),
    [
        ({"audio": 0.1, "visual": 0.1}, {"audio": 0.2, "visual": 0.1}, "b"),
        ({"audio": 0.2, "visual": 0.1}, {"audio": 0.1, "visual": 0.1}, None),
        ({"audio": 0.2, "visual": 0.1}, {"audio": 0.1, "visual": 0.2}, None),
        ({"audio": "30dB", "visual": 0.1}, {"audio": "20dB", "visual": 0.1}, "b"),
        ({"audio": "-3dB", "visual": 0.1}, {"audio": "20dB", "visual": 0.1}, None),
    ],
)
def test_budgets_are_compared_by_their_radii(one, other, larger):
    described = {"a": said(radii=one, level=0), "b": said(radii=other, level=1)}
    flags = look({"a": attack_rows(first(15)), "b": attack_rows(first(5))}, described)
    assert [flag.condition for flag in flags] == ([larger] if larger else [])


def test_an_attack_that_looks_for_the_smallest_budget_is_compared_with_nothing():
    described = {"n": said("noise", "nothing"), "a": said(smallest=True)}
    assert look({"n": attack_rows(last(6)), "a": attack_rows(first(4))}, described) == []


def test_finds_what_the_audit_found():
    words = ["audio leaves [-1, 1]; scored again, a logit changed by 0.2: the model is random"] + [""] * 19
    budget, rescore = look({"a": attack_rows(violation=words)}, {"a": said()})
    assert (budget.name, rescore.name) == ("BUDGET", "RESCORE")
    assert budget.sentence == (
        "Apgd on audio+visual at 0.01, 0.01 is not valid: 1 of 20 clips (5 %), such as clip 0: audio leaves [-1, 1]."
    )
    assert "a logit changed by 0.2" in rescore.sentence
    clean = clean_rows()
    clean.loc[3, "violation"] = "as stored: scored again, a logit changed by 1"
    (flag,) = look({}, {}, clean)
    assert (flag.name, flag.condition) == ("RESCORE", "clean") and "such as clip 3" in flag.sentence


@pytest.mark.parametrize(
    ("attack", "classes", "expected"),
    [
        ("Aimed(attack=APGD(steps=50, loss=''), aims=9)", 10, set()),
        ("Aimed(attack=APGD(steps=50, loss=''), aims=9)", 9, {"TOO-MANY-TARGETS"}),
        ("Outside(targets=3)", 3, {"TOO-MANY-TARGETS"}),
        ("FAB(steps=5, aims=None)", 2, set()),
        ("APGD(steps=50, loss='top1-dlr')", 4, set()),
        ("APGD(steps=50, loss='top1-dlr')", 3, {"FEW-CLASSES"}),
        ("APGD(steps=50, loss='ce')", 2, set()),
    ],
)
def test_counts_classes(attack, classes, expected):
    flags = look({"a": attack_rows()}, {"a": said(attack=attack)}, clean_rows(classes=classes))
    assert names(flags) == expected


def test_classes_are_remarked_upon_once_a_run():
    described = {key: said(level=i, attack="APGD(loss='dlr')") for i, key in enumerate("abc")}
    assert len(look(dict.fromkeys("abc", attack_rows()), described, clean_rows(classes=3))) == 1


def test_clips_that_could_not_be_used_are_left_out():
    clean, rows = clean_rows(), attack_rows(ever_reached=first(2))
    skipped = {"sample": "broken", "skipped": "no sound"}
    clean, rows = (pd.concat([pd.DataFrame([skipped]), frame]) for frame in (clean, rows))
    assert "2 of 20 clips" in look({"a": rows}, {"a": said()}, clean)[0].sentence
    assert look({}, {}, clean.head(1)) == []


def test_an_older_ledger_lacks_columns_and_is_read_all_the_same():
    rows = attack_rows(first(4)).drop(
        columns=[
            "settled",
            "late_gain",
            "ever_reached",
            "zero_gradients_audio",
            "zero_gradients_visual",
            "reached_source",
        ]
    )
    old = {key: value for key, value in said().items() if key not in ("knowledge", "roams", "after")}
    noise = old | {"name": "noise"}
    flags = look({"n": attack_rows(last(9)), "a": rows}, {"n": noise, "a": old})
    assert names(flags) == {"NOISE-WINS"}


# The table.


def test_every_flag_says_what_it_means_and_what_to_do():
    for name, (means, source, advice) in FLAGS.items():
        assert name == name.upper() and means.endswith(".") and advice.endswith(".") and "arXiv" in source
    assert raised("MODE", "Seen.") == Flag("MODE", "Seen.", FLAGS["MODE"].advice)
    assert clips(1, 3) == "1 of 3 clips (33.3 %)"
    assert len(CLASSES) == 3, "a test above counts on it"


def test_the_page_on_attacks_lists_every_flag():
    page = (Path(__file__).parents[1] / "docs" / "attacks.md").read_text(encoding="utf-8")
    for name, meaning in FLAGS.items():
        assert f"| {name} | {meaning.means} |" in page
