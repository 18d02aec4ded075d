"""Universal perturbations: what they must be on linear models, that they carry over, and the published protocol."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Linear, TinySamples, batch_of, tiny_fusion, tiny_specs
from published import loaded, numbers, task_of
from safetensors.torch import save_file
from test_attacks import LABELS, run, threat_of
from test_harness import GOAL, rows_for

from robustav import audit
from robustav.attacks import Attack, Noise
from robustav.attacks.ascent import look
from robustav.attacks.universal import FixedNoise, Shuffled, Universal, rolled, rolled_back
from robustav.classifier import AtFeatures, InputSpec
from robustav.goals import PushLatent, Untargeted
from robustav.harness import Settings, evaluate
from robustav.ledger import failures
from robustav.models.published.mmt import MmtLate
from robustav.models.published.tal import TalTrans
from robustav.published_universal import PublishedUniversal
from robustav.randomness import draw_for, draws_for
from robustav.threat import Budget, ThreatModel
from robustav.universal import learn, load, save

WIDE = {"audio": InputSpec((16,), -9.0, 9.0, "amplitude"), "visual": InputSpec((2, 3, 2, 2), -9.0, 9.0, "pixel value")}


def random_perturbation(size=0.02, seed=4, specs=None):
    draw = torch.Generator().manual_seed(seed)
    return {m: size * torch.randn(spec.shape, generator=draw) for m, spec in (specs or tiny_specs()).items()}


def wrong(budgets):
    """A goal that makes sense for a single class."""
    return ThreatModel(budgets, Untargeted(success="misclassified"))


def in_batches(inputs, labels, size):
    def batches():
        for i in range(0, len(labels), size):
            yield {m: x[i : i + size] for m, x in inputs.items()}, labels[i : i + size]

    return batches


def wide_threat(norm, epsilons=(0.02, 0.05)):
    return wrong({m: Budget(norm, e, low=-9.0, high=9.0) for m, e in zip(WIDE, epsilons, strict=True)})


def ones_in_batches(count=4, size=2, specs=WIDE):
    return in_batches(batch_of(specs, count), torch.ones(count, 1), size)


MADE = [
    Universal(random_perturbation(), name="random"),
    Universal(random_perturbation(), shift=False),
    Shuffled(Universal(random_perturbation())),
    FixedNoise(),
    FixedNoise(3, shift=False),
]
EVERY = pytest.mark.parametrize("attack", MADE, ids=repr)
NORMS = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


# The attack


@EVERY
@NORMS
@pytest.mark.parametrize("attacked", [("audio",), ("visual",), ("audio", "visual")], ids="+".join)
def test_stays_in_budget_and_leaves_the_rest_alone(attack, norm, attacked, fusion, inputs):
    threat, before = threat_of(norm, attacked), {m: x.clone() for m, x in inputs.items()}
    adversarial = run(attack, fusion, inputs, LABELS, threat)
    assert audit.violations(inputs, adversarial, threat, fusion.specs) == [""] * 6
    for m in inputs:
        assert torch.equal(inputs[m], before[m])
        assert torch.equal(adversarial[m], inputs[m]) == (m not in attacked)


@EVERY
@NORMS
def test_honours_the_range_padding_and_epsilon_zero(attack, norm, fusion, inputs):
    edges = {
        m: torch.where(x > x.median(), s.high, s.low)
        for (m, x), s in zip(inputs.items(), tiny_specs().values(), strict=True)
    }
    writable = {"audio": torch.arange(64).expand(6, 64) < 40}
    threat = threat_of(norm).given(writable=writable)
    adversarial = run(attack, fusion, edges, LABELS, threat)
    assert audit.violations(edges, adversarial, threat, fusion.specs, writable) == [""] * 6
    assert (threat.gauge(edges, adversarial) > 0.05).all()
    assert torch.equal(adversarial["audio"][:, 40:], edges["audio"][:, 40:])
    still = run(attack, fusion, inputs, LABELS, threat_of(norm, epsilon=0.0))
    assert all(torch.equal(still[m], inputs[m]) for m in inputs)


@EVERY
def test_depends_on_nothing_but_the_clip_and_its_draws(attack, fusion, inputs):
    before = torch.get_rng_state()
    whole = run(attack, fusion, inputs, LABELS, threat_of("linf"))
    one = run(attack, fusion, {m: x[3:4] for m, x in inputs.items()}, LABELS[3:4], threat_of("linf"), "d")
    assert all(torch.equal(one[m][0], whole[m][3]) for m in inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_clip_gets_the_same_perturbation(fusion, inputs):
    made = Universal(random_perturbation(0.01), shift=False)
    adversarial = run(made, fusion, inputs, LABELS, threat_of("linf", epsilon=1.0))
    for m, delta in made.perturbation.items():
        torch.testing.assert_close(adversarial[m] - inputs[m], delta.expand_as(inputs[m]), rtol=0, atol=1e-6)


def test_a_shift_moves_all_modalities_of_a_clip_by_the_same_time():
    specs = {"audio": InputSpec((40,), -9.0, 9.0, "amplitude"), "visual": InputSpec((4, 1, 1, 1), 0.0, 9.0, "pixels")}
    made = Universal({"audio": torch.arange(40.0) / 100, "visual": torch.arange(4.0).reshape(4, 1, 1, 1) / 100})
    x = {"audio": torch.zeros(20, 40), "visual": torch.full((20, 4, 1, 1, 1), 4.0)}
    budgets = {m: Budget("linf", 1.0, low=-9.0, high=9.0) for m in specs}
    draws = draws_for(0, [str(i) for i in range(20)])
    moved = made(Linear(specs), x, torch.ones(20, 1), ThreatModel(budgets), draws=draws)
    starts = {m: (moved[m] - x[m]).reshape(20, -1).argmin(1) for m in x}
    assert len(set(starts["audio"].tolist())) > 5
    assert torch.equal(starts["audio"] // 10, starts["visual"])
    assert all(
        torch.allclose(moved["audio"][i].roll(-int(s)), made.perturbation["audio"])
        for i, s in enumerate(starts["audio"])
    )


def test_a_shuffled_perturbation_holds_the_same_values_in_another_order():
    specs = {"audio": (200,), "visual": (2, 3, 8, 8), "bands": (20, 10)}
    draw = torch.Generator().manual_seed(0)
    made = Universal({m: torch.randn(shape, generator=draw) for m, shape in specs.items()})
    one, again, other = (Shuffled(made, seed).shuffled.perturbation for seed in (0, 0, 1))
    for m, delta in made.perturbation.items():
        pictures = -2 if m == "visual" else 0
        left, right = (x.flatten(pictures).sort(-1).values for x in (delta, one[m]))
        assert torch.equal(left, right)
        assert (delta == one[m]).float().mean() < 0.05
        assert torch.equal(one[m], again[m])
        assert not torch.equal(one[m], other[m])


@NORMS
def test_fixed_noise_is_one_direction_at_full_length(norm, fusion, inputs):
    threat = threat_of(norm)
    middle = {m: torch.full_like(x, 0.5) for m, x in inputs.items()}
    moved = run(FixedNoise(shift=False), fusion, middle, LABELS, threat)
    assert (threat.gauge(middle, moved) > 0.99).all()
    assert all(torch.equal(moved[m][0], moved[m][i]) for m in moved for i in range(6))
    other = run(FixedNoise(1, shift=False), fusion, middle, LABELS, threat)
    assert not torch.equal(moved["audio"], other["audio"])
    if norm == "linf":
        assert ((moved["audio"] - middle["audio"]).abs() > 0.0199).all()


def test_the_repr_is_short_and_names_the_tensors():
    delta = random_perturbation()
    made, same = Universal(delta), Universal({m: delta[m].clone() for m in reversed(delta)})
    assert repr(made) == repr(same)
    assert len(repr(made)) < 120
    nudged = {**delta, "audio": delta["audio"].index_fill(0, torch.tensor([5]), 0.0)}
    renamed = {"sound": delta["audio"], "visual": delta["visual"]}
    others = [Universal(nudged), Universal(renamed), Universal({"audio": delta["audio"]})]
    assert len({one.digest for one in (made, *others)}) == 4
    assert made.digest[:16] in repr(made) and made.digest[:16] in repr(Shuffled(made))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.shift = False
    delta["audio"].zero_()
    assert made.perturbation["audio"].abs().max() > 0, "the perturbation must not change after its digest was taken"


def test_only_the_controls_know_nothing():
    assert (Universal.knowledge, Shuffled.knowledge, FixedNoise.knowledge) == ("universal", "nothing", "nothing")


def test_a_run_records_which_perturbation_it_was(tmp_path):
    made = Universal(random_perturbation(), name="learnt elsewhere")
    attacks = {"universal": made, "shuffled": Shuffled(made), "fixed": FixedNoise()}
    ledger = evaluate(
        tiny_fusion(),
        TinySamples(6),
        rows_for(attacks),
        GOAL,
        tmp_path / "run",
        settings=Settings(device="cpu", probed=0),
    )
    assert failures(ledger) == {}
    recorded = [row["attack"] for row in ledger.record()["identity"]["conditions"].values()]
    assert repr(made) in recorded and repr(Shuffled(made)) in recorded


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Universal({}), "`perturbation` must hold at least one modality"),
        (lambda: Universal({"audio": torch.tensor([0.0, math.nan])}), r"`perturbation\['audio'\]` must be finite"),
        (lambda: Universal({"audio": torch.tensor([1, 2])}), "must be finite floating point values.*int64"),
        (lambda: Universal({"audio": torch.tensor(1.0)}), r"of one clip's shape, got torch.float32 \[\]"),
    ],
)
def test_what_is_no_perturbation_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("delta", [{"visual": torch.zeros(2, 3, 4, 4)}, {"audio": torch.zeros(63)}], ids=str)
def test_a_perturbation_of_other_inputs_is_refused(delta, fusion, inputs):
    with pytest.raises(ValueError, match=r"`perturbation` must have 'audio' of shape \[64\]"):
        run(Universal(delta), fusion, inputs, LABELS, threat_of("linf", ("audio",)))


# Learning one


def test_rolling_back_is_the_adjoint_of_rolling():
    delta, gradient, shares = torch.randn(10, 3), torch.randn(4, 10, 3), [0.0, 0.31, 0.99, 0.5]
    forth, back = (rolled(delta, shares) * gradient).sum(), (delta * rolled_back(gradient, shares)).sum()
    torch.testing.assert_close(forth, back)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_is_best_fooled_along_its_weights(norm):
    """E.3: epsilon sign(-w) in linf, -epsilon w / |w| in l2; each modality with its own budget."""
    model, threat = Linear(WIDE), wide_threat(norm)
    learnt = learn(model, ones_in_batches(), threat, passes=6, shift=False)
    for m, budget in threat.budgets.items():
        w = model.weights[m].detach().reshape(WIDE[m].shape)
        best = -budget.epsilon * (w.sign() if norm == "linf" else w / w.norm())
        torch.testing.assert_close(learnt.perturbation[m], best, rtol=3e-6, atol=0)
    assert learnt.losses[0] < learnt.losses[-1]
    assert learnt.zero_gradients == (0.0,) * 6


@NORMS
@pytest.mark.parametrize("passes", [1, 5, 50])
def test_no_update_leaves_the_budget(norm, passes, monkeypatch):
    """E.4 and V10, seen twice: in the history, and in every perturbation as it is laid on the next batch."""
    laid = []
    monkeypatch.setattr("robustav.universal.rolled", lambda delta, shares: laid.append(delta) or rolled(delta, shares))
    threat, order = wide_threat(norm), {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    learnt = learn(Linear(WIDE), ones_in_batches(), threat, passes=passes, relative_step=1.7)
    assert len(laid) == 2 * 2 * passes
    for m, budget in threat.budgets.items():
        seen = [x.double().norm(p=order) for x in [*laid, learnt.perturbation[m]] if x.shape == WIDE[m].shape]
        assert max(seen) == pytest.approx(learnt.largest[m])
        assert budget.epsilon * 0.999 < max(seen) <= budget.epsilon
        assert learnt.largest[m] <= budget.epsilon


@pytest.mark.parametrize(("shift", "clear"), [(False, 4), (True, 3)], ids=["in step", "shifted"])
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 0.3)])
def test_what_is_learnt_on_some_clips_works_on_others_and_beats_its_controls(norm, epsilon, shift, clear, fusion):
    threat = threat_of(norm, epsilon=epsilon)
    here, there = batch_of(tiny_specs(), 64, seed=1), batch_of(tiny_specs(), 128, seed=2)
    labels = [(fusion(x) > 0).float().detach() for x in (here, there)]
    learnt = learn(fusion, in_batches(here, labels[0], 8), threat, passes=3, shift=shift)

    def loss(attack):
        draws = draws_for(0, [str(i) for i in range(128)])
        return look(fusion, attack(fusion, there, labels[1], threat, draws=draws), labels[1], threat).loss.mean().item()

    clean = look(fusion, there, labels[1], threat).loss.mean().item()
    made = Universal(learnt.perturbation, shift)
    controls = [Noise(), *(Shuffled(made, seed) for seed in range(3)), *(FixedNoise(seed, shift) for seed in range(3))]
    assert loss(made) - clean > clear * max(abs(loss(control) - clean) for control in controls)


def test_a_modality_without_a_budget_is_not_learnt_and_not_touched(fusion):
    clips, labels = batch_of(tiny_specs(), 24), torch.ones(24, 3)
    before = {m: x.clone() for m, x in clips.items()}
    state = {name: x.clone() for name, x in fusion.state_dict().items()}
    rng = torch.get_rng_state()
    learnt = learn(fusion.train(), in_batches(clips, labels, 2), threat_of("linf", ("audio",)), passes=1)
    assert list(learnt.perturbation) == ["audio"]
    assert all(torch.equal(clips[m], before[m]) for m in clips)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(x, state[name]) for name, x in fusion.state_dict().items())
    assert fusion.training and all(p.grad is None and p.requires_grad for p in fusion.parameters())


def test_a_joint_perturbation_learns_each_modality_as_alone_where_the_model_is_linear():
    model, alone = Linear(WIDE), wide_threat("l2")
    joint = learn(model, ones_in_batches(), alone, passes=6, shift=False).perturbation
    for m, budget in alone.budgets.items():
        single = learn(model, ones_in_batches(), wrong({m: budget}), passes=6, shift=False).perturbation
        torch.testing.assert_close(single[m], joint[m], rtol=1e-4, atol=1e-7)


def test_the_same_seed_learns_the_same_and_another_shifts_otherwise(fusion):
    batches = in_batches(batch_of(tiny_specs(), 24), torch.ones(24, 3), 2)
    one, again, other = (
        learn(fusion, batches, threat_of("l2"), passes=1, seed=seed).perturbation["audio"] for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_learning_rolls_forth_and_back():
    """One clip, two full steps: what each step and each loss must be follows from the shares that were drawn."""
    model, x = Linear({"audio": WIDE["audio"]}), 0.1 * torch.ones(1, 16)
    w, draw = model.weights["audio"].detach()[0], draw_for(5, "universal")
    first, second = (int(torch.rand((), generator=draw).item() * 16) for _ in range(2))
    assert 0 < first != second > 0
    learnt = learn(
        model,
        lambda: [({"audio": x}, torch.ones(1, 1))],
        wrong({"audio": Budget("l2", 0.5, low=-9.0, high=9.0)}),
        passes=2,
        relative_step=1.0,
        seed=5,
    )
    after_first = -0.5 * w.roll(-first) / w.norm()
    aimed = after_first - 0.5 * w.roll(-second) / w.norm()
    torch.testing.assert_close(learnt.perturbation["audio"], 0.5 * aimed / aimed.norm(), rtol=1e-4, atol=1e-6)
    losses = [F.softplus(-w @ (x[0] + delta)).item() for delta in (torch.zeros(16), after_first.roll(second))]
    assert learnt.losses == pytest.approx(losses, rel=1e-4)


def test_the_largest_length_is_kept_though_the_last_is_none():
    """Labels that turn over from batch to batch push there and back again."""
    x = {m: 0.001 * x for m, x in batch_of(WIDE, 4).items()}
    labels = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    threat = wide_threat("linf")
    learnt = learn(Linear(WIDE), in_batches(x, labels, 2), threat, passes=1, relative_step=1.0, shift=False)
    for m, budget in threat.budgets.items():
        assert learnt.largest[m] == pytest.approx(budget.epsilon, rel=1e-5)
        assert learnt.perturbation[m].abs().max() < 1e-5 * budget.epsilon


def test_a_gradient_that_the_range_blocks_does_not_count():
    """Half of the clips stand at the upper edge: their wish to go up, however strong, moves nothing."""
    specs = {"audio": InputSpec((16,), -1.0, 1.0, "amplitude")}
    model, threat = Linear(specs), wrong({"audio": Budget("linf", 0.1)})
    edge = {"audio": torch.ones(20, 16)}
    learnt = learn(model, in_batches(edge, torch.ones(20, 1), 2), threat, passes=1, shift=False).perturbation["audio"]
    rises = (model.weights["audio"] < 0).flatten()
    assert (learnt[rises] == 0).all()
    torch.testing.assert_close(learnt[~rises], torch.full_like(learnt[~rises], -0.1), rtol=2e-6, atol=0)


def test_a_clip_that_was_cut_has_no_say():
    """After one full step the second clip is cut at 1: what it would win inward, no small step could give it."""

    class Turning(Linear):
        def encode(self, modality, x):
            return torch.where(x > 0.99, 0.99 - 30 * (x - 0.99), x)

    x = {"audio": torch.tensor([[0.0], [0.95]]).repeat(2, 1)}
    threat = wrong({"audio": Budget("linf", 0.1)})
    model = Turning({"audio": InputSpec((1,), -1.0, 1.0, "amplitude")})
    learnt = learn(model, in_batches(x, torch.zeros(4, 1), 2), threat, passes=1, relative_step=1.0, shift=False)
    assert learnt.perturbation["audio"].item() == pytest.approx(0.1, rel=1e-5)


def test_clips_beyond_the_cap_do_not_vote():
    """Two clips of opposite labels pull in opposite directions; the one whose loss is at the cap falls silent."""
    specs = {"audio": InputSpec((16,), -9.0, 9.0, "amplitude")}
    model, threat = Linear(specs), wrong({"audio": Budget("linf", 0.01, low=-9.0, high=9.0)})
    w = model.weights["audio"].detach()[0]
    x = {"audio": torch.stack([w, 0.1 * w]).repeat(10, 1)}
    labels = torch.tensor([[0.0], [1.0]]).repeat(10, 1)  # the first is wrong by far, the second right by little
    batches = in_batches(x, labels, 2)
    free, capped = (learn(model, batches, threat, passes=1, shift=False, cap=cap) for cap in (math.inf, 5.0))
    torch.testing.assert_close(free.perturbation["audio"], 0.01 * w.sign(), rtol=3e-6, atol=0)
    torch.testing.assert_close(capped.perturbation["audio"], -0.01 * w.sign(), rtol=3e-6, atol=0)
    assert (free.capped, capped.capped) == ((0.0,), (0.5,))


def test_padding_teaches_nothing():
    specs = {"audio": InputSpec((16,), -9.0, 9.0, "amplitude")}
    writable = {"audio": torch.arange(16).expand(2, 16) < 10}

    def batches():
        for inputs, labels in ones_in_batches(20, 2, specs)():
            yield inputs, labels, writable

    threat = wrong({"audio": Budget("l2", 0.1, low=-9.0, high=9.0)})
    delta = learn(Linear(specs), batches, threat, passes=1, shift=False).perturbation["audio"]
    assert (delta[10:] == 0).all()
    assert delta[:10].norm().item() == pytest.approx(0.1, rel=1e-5)


def test_a_goal_that_compares_with_the_clean_input_is_told_of_it(fusion):
    x = batch_of(tiny_specs(), 20)
    for goal in (PushLatent(success="label-set"), Untargeted(success="label-set")):
        threat = threat_of("linf", goal=goal)
        learnt = learn(fusion, in_batches(x, torch.ones(20, 3), 2), threat, passes=2, shift=False)
        assert learnt.losses[1] > learnt.losses[0]


def test_a_model_that_draws_at_random_learns_the_same_twice():
    class Noisy(Linear):
        stochastic = True

        def encode(self, modality, x):
            return super().encode(modality, x + 3 * torch.randn_like(x))

    class Bent(Noisy):
        def classify(self, latent):
            return latent.tanh()

    torch.manual_seed(1)
    one = learn(Bent(WIDE), ones_in_batches(20), wide_threat("l2"), passes=1)
    torch.manual_seed(2)
    again = learn(Bent(WIDE), ones_in_batches(20), wide_threat("l2"), passes=1)
    assert one.losses == again.losses
    assert all(torch.equal(one.perturbation[m], again.perturbation[m]) for m in WIDE)


def test_a_model_without_a_gradient_is_told_from_a_robust_one():
    class Detached(Linear):
        def encode(self, modality, x):
            return super().encode(modality, x).detach()

    learnt = learn(Detached(WIDE), ones_in_batches(20), wide_threat("linf"), passes=1)
    assert learnt.zero_gradients == (1.0,)
    assert all((delta == 0).all() for delta in learnt.perturbation.values())


def test_progress_is_told_pass_by_pass():
    told = []
    learn(Linear(WIDE), ones_in_batches(20), wide_threat("linf"), passes=2, progress=lambda *words: told.append(words))
    assert told == [("learning a universal perturbation", n, 2) for n in (1, 2)]


PLAIN = wide_threat("linf")
AUDIO = {"audio": Budget("linf", torch.tensor([0.1, 0.2]))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": 0}, "`passes` must be at least 1, got 0"),
        ({"relative_step": 0.0}, "`relative_step` must be above 0 and at most 2 radii, got 0.0"),
        (
            {"threat": wrong({"audio": Budget("l2", snr_db=30.0)})},
            "'audio' must be a plain `epsilon`, got l2, SNR",
        ),
        ({"threat": wrong(AUDIO)}, "must be a plain `epsilon`, got linf, a radius of its own"),
        ({"threat": wrong({"text": Budget("linf", 0.1)})}, r"`threat` has budgets for \['text'\]"),
        ({"threat": ThreatModel(PLAIN.budgets, Untargeted("multiclass"))}, "the goal is made for multiclass labels"),
        ({"passes": 2}, r"2 batches x 2 passes x `relative_step` 0.1 cannot reach the edge"),
        ({"batches": lambda: []}, "`batches` gave no batch"),
        ({"batches": lambda: [({"audio": torch.zeros(2, 16)}, torch.ones(2, 1))]}, "`inputs` must have the modalities"),
        ({"batches": in_batches(batch_of(tiny_specs(), 2), torch.ones(2, 1), 2)}, r"must have shape \[batch, 16\]"),
        ({"batches": in_batches(batch_of(WIDE, 2), torch.ones(2), 2)}, "`labels` of a multilabel model must be"),
    ],
)
def test_what_cannot_be_learnt_is_refused(changes, message):
    settings = {"batches": ones_in_batches(), "threat": PLAIN, **changes}
    with pytest.raises(ValueError, match=message):
        learn(Linear(WIDE), **settings)


def test_batches_that_cannot_start_anew_are_refused():
    once = iter(list(ones_in_batches(20)()))
    with pytest.raises(ValueError, match="got 10 in the first pass and 0 in a later one"):
        learn(Linear(WIDE), lambda: once, PLAIN, passes=2)
    with pytest.raises(TypeError, match="`batches` must be a function that starts the batches anew, got list"):
        learn(Linear(WIDE), list(ones_in_batches()()), PLAIN)


def test_saving_and_loading_is_a_round_trip(tmp_path):
    model, path = Linear(WIDE), tmp_path / "deep" / "universal.safetensors"
    learnt = learn(model, ones_in_batches(20), PLAIN, passes=1, seed=7)
    save(path, learnt, model=model, threat=PLAIN, seed=7, data="ab12")
    saved = load(path)
    assert Universal(saved.perturbation).digest == Universal(learnt.perturbation).digest == saved.about["digest"]
    assert all(torch.equal(saved.perturbation[m], learnt.perturbation[m]) for m in WIDE)
    assert (saved.about["seed"], saved.about["data"]) == (7, "ab12")
    assert saved.about["budgets"]["visual"] == "linf, 0.05 pixel value"
    assert saved.about["goal"].startswith("untargeted, climbing bce")
    assert saved.about["largest"] == learnt.largest
    before = path.read_bytes()
    save(path, learnt, model=model, threat=PLAIN, seed=7, data="ab12")
    assert path.read_bytes() == before


def test_a_file_that_is_no_perturbation_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is no universal perturbation that robustav saved"):
        load(path)
    save_file({"audio": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is no universal perturbation that robustav saved"):
        load(path)
    model = Linear(WIDE)
    save(path, learn(model, ones_in_batches(20), PLAIN, passes=1), model=model, threat=PLAIN, seed=0, data="")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        load(path)


# The published protocol, on the tiny late-fusion model and the tiny audio model of the fixtures, at their features.


@pytest.fixture(scope="module")
def fixtures(shared):
    def read(protocol, name):
        kind, sizes = {"mmtlf": (MmtLate, {"dim": 64, "width": 48}), "taltrans": (TalTrans, {"dim": 64})}[name]
        model = AtFeatures(loaded(kind(task_of(527), **sizes), numbers(shared, name).state))
        return numbers(shared, protocol).tensors, lambda inputs: model(inputs).sigmoid()

    return read


@pytest.mark.parametrize(
    ("name", "attacked", "norm", "epochs", "keys"),
    [
        ("audio", ("audio",), "linf", 5, ("audio_delta",)),
        ("video", ("visual",), "linf", 5, ("video_delta",)),
        ("joint", ("audio", "visual"), "linf", 5, ("joint_delta_a", "joint_delta_v")),
        ("audio_l2", ("audio",), "l2", 3, ("audio_l2_delta",)),
    ],
)
def test_version_1_is_reproduced(fixtures, name, attacked, norm, epochs, keys):
    """All but a hundredth of it where steps are signs: a gradient of nearly 0 has the one that rounding gives it."""
    published, model = fixtures("protocol_universal_pgd", "mmtlf")
    x, labels = {"audio": published["in.audio"], "visual": published["in.video"]}, published["in.target"]
    protocol = PublishedUniversal(step_norm=norm, norm=norm, epochs=epochs)
    followed = protocol.follow(model, in_batches(x, labels, 4), attacked)
    for m, key in zip(attacked, keys, strict=True):
        off = (followed.deltas[-1][m] - published[f"out.{key}"]).abs() > 1e-4
        assert off.float().mean() <= {"linf": 0.01, "l2": 0}[norm]
        assert followed.reached[-1][m].max_abs == published[f"out.{key}"].abs().max().item()
    assert followed.losses == pytest.approx(published[f"out.{name}_losses"].tolist(), abs=1e-4)
    if (after := published.get(f"out.prob_{name}_attacked")) is not None:
        torch.testing.assert_close(model(followed.on(x)), after, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(x), published["out.prob_clean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("norm", "likeness"), [("linf", 0.99), ("l2", 0.999)])
def test_version_2_is_reproduced_as_far_as_rounding_lets_it(fixtures, norm, likeness):
    """The reference's tolerance: rounding decides whether clips are rescaled, so deltas are compared by direction."""
    published, model = fixtures("protocol_universal_pgd_v2", "taltrans")
    x, key = {"audio": published["in.x"]}, {"linf": "inf", "l2": "l2"}[norm]
    protocol = PublishedUniversal(2, step=0.01, step_norm=norm, norm=norm, epochs=4)
    followed = protocol.follow(model, in_batches(x, published["in.target"], 4), ("audio",))
    delta = followed.deltas[-1]["audio"]
    assert F.cosine_similarity(delta.flatten(), published[f"out.{key}_delta"].flatten(), 0) >= likeness
    torch.testing.assert_close(delta, published[f"out.{key}_delta"], rtol=0, atol=0.1)
    assert followed.losses == pytest.approx(published[f"out.{key}_losses"].tolist(), abs=1e-5)
    assert ((published["out.delta_min"] <= delta) & (delta <= published["out.delta_max"])).all()


@pytest.mark.parametrize(("step", "reached"), [(0.1, 2.0), (0.01, 1.86)])
def test_the_published_perturbation_leaves_its_budget_and_ours_does_not(step, reached):
    """V10: with a steady gradient 20 passes lead to 20 epsilon (step 0.1), or nearly so (0.01)."""
    specs = {"audio": InputSpec((4, 3), -9.0, 9.0, "feature")}
    model = Linear(specs)
    x, labels = {"audio": torch.zeros(40, 4, 3)}, torch.ones(40, 1)
    protocol = PublishedUniversal(step=step, ranges={"audio": (-9.0, 9.0)})
    followed = protocol.follow(lambda inputs: model(inputs).sigmoid(), in_batches(x, labels, 2), ("audio",))
    assert followed.reached[-1]["audio"].max_abs == pytest.approx(reached, abs=0.01)
    assert followed.reached[-1]["audio"].frame_l2 == pytest.approx(reached * 3**0.5, abs=0.02)
    assert len(followed.deltas) == len(followed.losses) == len(followed.reached) == 20
    assert [r["audio"].max_abs for r in followed.reached] == sorted(r["audio"].max_abs for r in followed.reached)

    threat = wrong({"audio": Budget("linf", 0.1, low=-9.0, high=9.0)})
    ours = learn(model, in_batches(x, labels, 20), threat, passes=20, relative_step=step / 0.1, shift=False)
    assert 0.0999 < ours.largest["audio"] <= 0.1
    assert ours.perturbation["audio"].double().abs().max() <= 0.1
    with_label = Universal(followed.deltas[-1], shift=False)(
        model, x, labels, threat, draws=draws_for(0, [str(i) for i in range(40)])
    )
    assert audit.violations(x, with_label, threat, specs) == [""] * 40, "even that one is cut to the budget of a run"


def test_the_published_protocol_is_no_attack_and_says_what_it_reaches():
    specs = {"audio": InputSpec((4, 3), -9.0, 9.0, "feature")}
    model, x = Linear(specs), {"audio": torch.zeros(4, 4, 3)}
    protocol = PublishedUniversal(epochs=5)
    followed = protocol.follow(lambda inputs: model(inputs).sigmoid(), in_batches(x, torch.ones(4, 1), 2), ("audio",))
    assert not isinstance(protocol, Attack) and not isinstance(followed, Attack)
    assert followed.label == (
        "published protocol, version 1 (nominal linf epsilon 0.1, never projected): "
        "audio reaches max |delta| 0.5, largest frame l2 0.866"
    )
    assert torch.equal(followed.on(x)["audio"], x["audio"] + followed.deltas[-1]["audio"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PublishedUniversal(3), r"`version` must be one of \[1, 2\], got 3"),
        (lambda: PublishedUniversal(norm="l1"), "`norm` must be 'linf' or 'l2', got 'l1'"),
        (lambda: PublishedUniversal(step_norm="inf"), "`step_norm` must be 'linf' or 'l2', got 'inf'"),
        (lambda: PublishedUniversal(step=0.0), "`step` and `epsilon` must be above 0, got 0.0 and 0.1"),
        (lambda: PublishedUniversal(epochs=0), "`epochs` must be at least 1, got 0"),
        (lambda: PublishedUniversal(2, ranges={"audio": (0.0, 1.0)}), "`ranges` belong to version 1"),
        (lambda: PublishedUniversal().follow(len, lambda: [], ("audio",)), "must not be empty, got 0 clips"),
        (
            lambda: PublishedUniversal(ranges={"visual": (0.0, 1.0)}).follow(len, ones_in_batches(), ("audio",)),
            "`ranges` must say what 'audio' is cut to, got",
        ),
    ],
)
def test_wrong_settings_of_the_published_protocol_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
