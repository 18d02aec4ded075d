import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Linear, batch_of, tiny_fusion, tiny_specs
from torch import Tensor, nn
from training_tools import TinyClips, batch, budgets, tiny_work

from robustav.classifier import Classifier, InputSpec
from robustav.norms import NORMS
from robustav.threat import Budget
from robustav.training.adversarial import (
    AWP,
    FGSMRS,
    MART,
    METHODS,
    NFGSM,
    TRADES,
    AdversarialTraining,
    Free,
    InterpolatedTraining,
    PGDTraining,
)
from robustav.training.ascent import STARTS, ascend, uniform
from robustav.training.divergence import divergence, mart_losses
from robustav.training.method import Batch, Method, Work
from robustav.training.overfitting_watch import HISTORY
from robustav.training.processes import averaged
from robustav.training.weight_perturbation import buffers_kept, matrices, perturb

CRAFTING = [FGSMRS(), NFGSM(), PGDTraining(3), TRADES(steps=3), MART(steps=3), InterpolatedTraining(steps=3), AWP()]
ALL = [FGSMRS(watch="off"), *CRAFTING[1:], AWP(base="trades", steps=2), Free()]
KINDS = ["multilabel", "multiclass"]


def wide(norm: str = "linf", epsilon: float = 0.1, *modalities: str) -> dict[str, Budget]:
    return {m: Budget(norm, epsilon, low=-9, high=9) for m in modalities or ("audio", "visual")}


def linear_work(**changes) -> Work:
    model = Linear(tiny_specs())
    return tiny_work(model, **{"budgets": wide(), **changes})


def ones(count: int = 6) -> Tensor:
    return torch.ones(count, 1)


def state(work: Work) -> dict[str, Tensor]:
    return {key: x.clone() for key, x in work.model.state_dict().items()}


def trained(method: Method, steps: int = 1, **changes) -> Work:
    work = tiny_work(**changes)
    method.begin(work)
    for _ in range(steps):
        method.train_step(work, batch(work))
        work.step += 1
    return work


# The ascent


@pytest.mark.parametrize("norm", NORMS)
def test_uniform_draws_fill_the_ball(norm):
    count, size = 4000, 3
    drawn = uniform(torch.zeros(count, size), norm, torch.Generator().manual_seed(0))
    length = NORMS[norm].length(drawn)
    assert length.max() <= 1 + 1e-6
    # In a ball of 3 dimensions, length cubed is uniform: each tenth holds a tenth of the draws.
    counts = (length**size).histc(10, 0, 1)
    assert (counts - count / 10).abs().max() < 5 * math.sqrt(count / 10)
    assert drawn.mean(0).abs().max() < 0.05


@pytest.mark.parametrize("norm", NORMS)
def test_gaussian_noise_is_about_as_long_in_every_size(norm):
    lengths = [
        NORMS[norm].length(STARTS["gaussian"](torch.zeros(50, size), norm, torch.Generator())).mean().item()
        for size in (100, 10_000)
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.5)
    assert 0.7 < lengths[0] < 4


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_ascent_finds_the_best_point_of_a_linear_model(norm, dual, steps):
    work = linear_work(budgets=wide(norm))
    clean = batch_of(tiny_specs())
    found = ascend(work, clean, ones(), steps=steps, step_size=2.5 / steps, start="none")
    drop = (work.model(clean) - work.model(found)).flatten()
    best = sum(0.1 * w.norm(p=dual) for w in work.model.weights.values())
    torch.testing.assert_close(drop, best.expand(6), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_the_ascent_climbs_from_every_start_in_l1(start):
    work = linear_work(budgets=wide("l1"))
    clean = batch_of(tiny_specs())
    found = ascend(work, clean, ones(), steps=10, step_size=0.25, start=start)
    drop = (work.model(clean) - work.model(found)).flatten()
    best = sum(0.1 * w.abs().max() for w in work.model.weights.values())
    assert (drop > 0.7 * best).all() and (drop <= best * 1.0001).all()


def test_targets_decide_which_way_is_up():
    work = linear_work()
    clean = batch_of(tiny_specs())
    up = ascend(work, clean, 0 * ones(), steps=1, step_size=1, start="none")
    assert (work.model(up) > work.model(clean)).all()


def test_another_loss_can_be_climbed():
    work = linear_work()
    clean = batch_of(tiny_specs())
    up = ascend(work, clean, ones(), steps=1, step_size=1, start="none", loss=lambda logits, _: logits.sum(1))
    assert (work.model(up) > work.model(clean)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", CRAFTING, ids=repr)
def test_points_keep_to_budget_range_and_modality(method, norm):
    epsilon = {"linf": 0.3, "l2": 1.0, "l1": 2.0}[norm]
    work = tiny_work(budgets={"visual": Budget(norm, epsilon, low=0, high=1)})
    some = batch(work)
    before = {m: x.clone() for m, x in some.inputs.items()}
    points = method.craft(work, some)
    assert points["audio"] is some.inputs["audio"]
    assert all(torch.equal(x, before[m]) for m, x in some.inputs.items())
    moved = NORMS[norm].length(points["visual"] - some.inputs["visual"])
    assert (moved > 0.01 * epsilon).all()
    assert points["visual"].min() >= 0 and points["visual"].max() <= 1
    allowed = 3 if isinstance(method, NFGSM) else 1
    assert (moved <= allowed * epsilon * (1 + 1e-5)).all()
    assert not points["visual"].requires_grad


def test_n_fgsm_leaves_the_budget_by_design():
    work = linear_work()
    some = Batch(batch_of(tiny_specs()), ones(), torch.arange(6))
    moved = NFGSM(noise=2.0).craft(work, some)["audio"] - some.inputs["audio"]
    assert 0.25 < moved.abs().max() <= 0.3 + 1e-6
    still = NFGSM(noise=1e-6).craft(work, some)["audio"] - some.inputs["audio"]
    torch.testing.assert_close(still.abs(), torch.full_like(still, 0.1), atol=1e-5, rtol=0)


def test_a_ratio_of_powers_is_a_radius_for_each_clip():
    work = linear_work(budgets={"audio": Budget("l2", snr_db=20.0)})
    clean = batch_of(tiny_specs())
    clean["audio"] = clean["audio"] * torch.linspace(0.2, 1, 6)[:, None]
    found = ascend(work, clean, ones(), steps=2, step_size=1.0)
    torch.testing.assert_close((found["audio"] - clean["audio"]).norm(dim=1), clean["audio"].norm(dim=1) / 10)


def test_padding_is_not_written_to():
    writable = torch.zeros(1, 64, dtype=torch.bool)
    writable[:, :40] = True
    work = linear_work(budgets={"audio": Budget("linf", 0.1, writable=writable)})
    clean = batch_of(tiny_specs())
    found = ascend(work, clean, ones(), steps=2, step_size=1.0)
    assert torch.equal(found["audio"][:, 40:], clean["audio"][:, 40:])
    assert (found["audio"][:, :40] != clean["audio"][:, :40]).any()


def test_points_do_not_depend_on_the_order_in_which_budgets_are_named():
    found = []
    for names in (("audio", "visual"), ("visual", "audio")):
        work = linear_work(budgets=wide("linf", 0.1, *names))
        found.append(ascend(work, batch_of(tiny_specs()), ones(), steps=1, step_size=0.5))
    assert all(torch.equal(found[0][m], found[1][m]) for m in ("audio", "visual"))


def test_crafting_leaves_the_model_as_it_was():
    work = tiny_work()
    before = state(work)
    PGDTraining(2).craft(work, batch(work))
    assert work.model.training
    assert all(p.requires_grad and p.grad is None for p in work.model.parameters())
    assert all(torch.equal(x, before[key]) for key, x in work.model.state_dict().items())


# Losses


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_agrees_with_the_distributions(kind):
    clean, moved = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    if kind == "multiclass":
        p, q = (torch.distributions.Categorical(logits=x) for x in (clean, moved))
        expected = torch.distributions.kl_divergence(p, q)
    else:
        p, q = (torch.distributions.Bernoulli(logits=x) for x in (clean, moved))
        expected = torch.distributions.kl_divergence(p, q).sum(1)
    torch.testing.assert_close(divergence(clean, moved, kind), expected)
    torch.testing.assert_close(divergence(clean, clean, kind), torch.zeros(5, dtype=torch.float64))


def test_divergence_of_sure_predictions_is_finite():
    clean, moved = torch.full((1, 3), 200.0), torch.full((1, 3), -200.0)
    assert divergence(clean, moved, "multilabel").item() == pytest.approx(600)
    assert divergence(clean.bfloat16(), moved.bfloat16(), "multilabel").dtype == torch.float32


@pytest.mark.parametrize("target", [0.0, 1.0, 0.3])
def test_a_label_by_itself_is_a_problem_of_two_classes(target):
    clean, moved = torch.randn(2, 6, 1, dtype=torch.float64).unbind()
    targets = torch.full((6, 1), target, dtype=torch.float64)
    two = [torch.cat([torch.zeros_like(x), x], 1) for x in (clean, moved)]
    torch.testing.assert_close(divergence(clean, moved, "multilabel"), divergence(*two, "multiclass"))
    if target in (0, 1):
        both = torch.cat([1 - targets, targets], 1)
        torch.testing.assert_close(
            mart_losses(clean, moved, targets, 5.0, "multilabel"), mart_losses(*two, both, 5.0, "multiclass")
        )


def test_mart_by_hand():
    clean, moved = torch.randn(2, 5, 4).unbind()
    label = torch.tensor([0, 3, 1, 1, 2])
    p, q = clean.softmax(1), moved.softmax(1)
    rows = torch.arange(5)
    rivals = q.clone()
    rivals[rows, label] = 0
    expected = -q[rows, label].log() - (1 - rivals.amax(1)).log()
    expected = expected + 5 * (p * (p / q).log()).sum(1) * (1 - p[rows, label])
    found = mart_losses(clean, moved, F.one_hot(label, 4).float(), 5.0, "multiclass")
    torch.testing.assert_close(found, expected)


def test_mart_spares_what_is_surely_right():
    sure, moved, targets = torch.tensor([[30.0, -30.0]]), torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    for kind in KINDS:
        spared, wrong = (mart_losses(clean, moved, targets, 5.0, kind) for clean in (sure, -sure))
        plain = mart_losses(sure, moved, targets, 1e-9, kind)
        torch.testing.assert_close(spared, plain)
        assert wrong > plain + 3


# Methods


PASSES = [
    (FGSMRS(watch="off"), 2, 2),
    (NFGSM(), 2, 2),
    (Free(3), 3, 3),
    (PGDTraining(5), 6, 6),
    (TRADES(steps=5), 8, 7),
    (MART(steps=5), 7, 7),
    (AWP(), 9, 9),
    (AWP(base="trades", steps=5), 10, 9),
    (InterpolatedTraining(steps=5), 7, 7),
]


@pytest.mark.parametrize(("method", "forwards", "backwards"), PASSES, ids=[repr(method) for method, *_ in PASSES])
def test_cost_is_every_pass(method, forwards, backwards):
    work = tiny_work()
    made = {"forward": 0, "backward": 0}
    hooked = work.model.encoders["audio"]
    hooked.register_forward_hook(lambda module, arguments, _: made.update(forward=made["forward"] + len(arguments[0])))
    hooked[0].register_full_backward_hook(lambda *_: None)  # runs need an input that requires gradients
    work.model.head.register_full_backward_hook(
        lambda module, grad_input, grad_output: made.update(backward=made["backward"] + len(grad_output[0]))
    )
    method.train_step(work, batch(work, 0, 1, 2, 3, 4))
    assert (work.cost.forwards, work.cost.backwards) == (5 * forwards, 5 * backwards)
    assert made == {"forward": 5 * forwards, "backward": 5 * backwards}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ALL, ids=repr)
def test_a_seed_decides_the_training(method, kind):
    first, again = (state(trained(method, 2, label_kind=kind)) for _ in range(2))
    other = state(trained(method, 2, label_kind=kind, generator=torch.Generator().manual_seed(8)))
    assert all(torch.equal(x, again[key]) and x.isfinite().all() for key, x in first.items())
    if not isinstance(method, Free):  # draws nothing
        assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_soft_targets_are_learnt_from(method):
    work = tiny_work(label_kind="multiclass")
    some = batch(work)
    loss = method.train_step(work, some._replace(targets=some.targets.lerp(some.targets.flip(0), 0.3)))
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PGDTraining(3), PGDTraining(4)),
        (PGDTraining(3), PGDTraining(3, reach=1.0)),
        (FGSMRS(watch="off"), FGSMRS(watch="off", step_size=0.5)),
        (NFGSM(), NFGSM(noise=1.0)),
        (NFGSM(), NFGSM(step_size=0.5)),
        (Free(2), Free(3)),
        (Free(2), Free(2, step_size=0.5)),
        (TRADES(steps=2), TRADES(steps=2, beta=1.0)),
        (MART(steps=2), MART(steps=2, weight=1.0)),
        (AWP(steps=2), AWP(steps=2, gamma=0.1)),
        (AWP(steps=2), AWP("trades", steps=2)),
        (AWP(), AWP(steps=2)),
        (InterpolatedTraining(steps=2), InterpolatedTraining(steps=2, alpha=0.2)),
    ],
    ids=repr,
)
def test_every_setting_matters(one, other):
    assert not torch.equal(state(trained(one))["head.weight"], state(trained(other))["head.weight"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [PGDTraining(2), FGSMRS(watch="off"), TRADES(steps=2), Free(1)], ids=repr)
def test_without_room_to_move_it_is_plain_training(method, kind):
    nothing = budgets(tiny_fusion(), 0.0)
    plain, robust = (state(trained(m, 3, label_kind=kind, budgets=nothing)) for m in (Method(), method))
    for key, x in plain.items():
        if "running" not in key and "tracked" not in key:
            torch.testing.assert_close(robust[key], x, rtol=1e-4, atol=1e-6)


def test_batch_norm_learns_from_the_update_alone():
    counted = {}
    for method in (Method(), PGDTraining(3), TRADES(steps=3), AWP(steps=2), Free(3)):
        counted[type(method)] = state(trained(method))["encoders.audio.2.num_batches_tracked"].item()
    assert counted == {Method: 1, PGDTraining: 1, TRADES: 2, AWP: 1, Free: 3}


class Toy(Classifier):
    """One logit over one feature that a budget cannot turn and many that it can."""

    specs = {"x": InputSpec((30,), -1.0, 1.0, "feature")}
    classes = ("yes",)
    label_kind = "multilabel"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(30, 1)
        with torch.no_grad():
            self.linear.weight.fill_(0.3)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return x

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return features["x"]

    def classify(self, latent: Tensor) -> Tensor:
        return self.linear(latent)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_training_protects_where_plain_training_does_not(method):
    targets = torch.tensor([1.0, 0.0]).repeat(12)[:, None]
    x = (2 * targets - 1) * torch.tensor([0.5] + [0.05] * 29)
    losses = []
    for trainer in (Method(), method):
        work = tiny_work(Toy(), budgets={"x": Budget("linf", 0.1)})
        for _ in range(100):
            trainer.train_step(work, Batch({"x": x}, targets, torch.arange(24)))
        worst = x - (2 * targets - 1) * 0.1 * work.model.linear.weight.sign()
        losses.append(work.loss(work.model({"x": worst}), targets).mean().item())
    assert losses[1] < 0.95 * losses[0]


def test_free_updates_at_every_replay_and_keeps_its_perturbation():
    work = linear_work()
    applied = []
    inner = work.apply
    work.apply = lambda loss, before: (applied.append(loss.item()), inner(loss, before))
    some = Batch(batch_of(tiny_specs()), ones(), torch.arange(6))
    method = Free(3, step_size=0.4)
    method.train_step(work, some)
    assert len(applied) == 3
    delta = work.memory["free/audio"].clone()
    # Three steps of 0.4 epsilon down a slope that does not turn, stopped at one epsilon.
    torch.testing.assert_close(delta, (-0.1 * work.model.weights["audio"].sign()).expand(6, -1), rtol=1e-3, atol=1e-6)
    method.train_step(work, Batch({m: x[:2] for m, x in some.inputs.items()}, 0 * ones(2), torch.arange(2)))
    assert torch.equal(work.memory["free/audio"][2:], delta[2:])
    assert (work.memory["free/audio"][:2] != delta[:2]).any()
    assert work.memory["free/audio"].abs().max() <= 0.1 + 1e-6


def test_frees_first_pass_is_at_what_the_last_batch_left():
    work = linear_work()
    some = Batch(batch_of(tiny_specs()), ones(), torch.arange(6))
    left = {m: 0.05 * torch.ones_like(x) for m, x in some.inputs.items()}
    work.memory.update({f"free/{m}": x for m, x in left.items()})
    expected = work.loss(work.model({m: x + left[m] for m, x in some.inputs.items()}), ones()).mean()
    torch.testing.assert_close(Free(1).train_step(work, some), expected.detach())


def test_interpolation_between_equal_clips_is_half_clean_half_attacked():
    work = linear_work()
    inputs = {m: x[:1].expand(6, *x.shape[1:]).clone() for m, x in batch_of(tiny_specs()).items()}
    some = Batch(inputs, ones(), torch.arange(6))
    worst = PGDTraining(7).craft(work, some)
    expected = (work.loss(work.model(inputs), ones()) + work.loss(work.model(worst), ones())) / 2
    torch.testing.assert_close(InterpolatedTraining().losses(work, some), expected)


def test_interpolation_mixes_inputs_and_targets():
    work = tiny_work()
    seen = []
    loss = work.loss
    work.loss = lambda logits, targets: (seen.append(targets), loss(logits, targets))[1]
    InterpolatedTraining(steps=1).losses(work, batch(work))
    soft = torch.stack(seen[1:])  # after the ascent's own
    assert len(soft) == 2 and ((soft > 0.01) & (soft < 0.99)).any()
    assert not torch.equal(soft[0], soft[1])


# Weights


def test_weights_move_by_gamma_and_come_back():
    work = tiny_work()
    weights = matrices(work.model)
    assert len(weights) == 3 and all(w.ndim > 1 for w in weights)
    before = [w.detach().clone() for w in weights]
    gradients = [torch.randn_like(w) for w in weights[:-1]] + [None]
    restore = perturb(weights, gradients, 0.02)
    for weight, old, gradient in zip(weights[:-1], before, gradients, strict=False):
        moved = weight - old
        assert moved.norm().item() == pytest.approx(0.02 * old.norm().item(), rel=1e-3)
        assert F.cosine_similarity(moved.flatten(), gradient.flatten(), dim=0) > 0.999
    assert torch.equal(weights[-1], before[-1])
    restore()
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))


def test_awp_steps_from_the_weights_as_they_were_along_gradients_at_the_worst():
    work, seen = tiny_work(), {}
    before = state(work)

    def apply(loss, before_step):
        assert not torch.equal(work.model.head.weight, before["head.weight"])
        seen["worst"] = copy.deepcopy(work.model)
        loss.backward()
        before_step()

    work.apply = apply
    some = batch(work)
    AWP(gamma=0.1, steps=1).train_step(work, some)
    for key, x in work.model.named_parameters():
        assert torch.equal(x, before[key])
    loss_before, loss_worst = (
        work.loss(m.eval()(some.inputs), some.targets).mean() for m in (work.model, seen["worst"])
    )
    assert loss_worst > loss_before
    moved = seen["worst"].head.weight - before["head.weight"]
    assert (moved.norm() / before["head.weight"].norm()).item() == pytest.approx(0.1, rel=1e-4)


def test_buffers_are_kept():
    model = tiny_fusion().train()
    before = {key: x.clone() for key, x in model.named_buffers()}
    with buffers_kept(model):
        model(batch_of(tiny_specs()))
    assert all(torch.equal(x, before[key]) for key, x in model.named_buffers())


# The watch


class Bumpy(Classifier):
    """Right at the ends of a budget of 1; wrong half way to them, where small steps arrive, once `bump` is not 0."""

    specs = {"x": InputSpec((1,), -9.0, 9.0, "feature")}
    classes = ("no", "yes")
    label_kind = "multiclass"

    def __init__(self) -> None:
        super().__init__()
        self.bump, self.slope = nn.Parameter(torch.zeros(())), nn.Parameter(torch.ones(()))

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return x

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return features["x"]

    def classify(self, latent: Tensor) -> Tensor:
        score = self.slope + self.bump * torch.cos(2 * torch.pi * latent)
        return torch.cat([torch.zeros_like(score), score], 1)


class OneClass(TinyClips):
    """Clips at 0, all of them of the second class."""

    def __init__(self) -> None:
        super().__init__(24, "multiclass", Bumpy.specs, Bumpy.classes)
        self._inputs = {"x": torch.zeros(24, 1)}
        self.targets = torch.tensor([[0.0, 1.0]]).repeat(24, 1)


def bumpy_work() -> Work:
    return tiny_work(
        Bumpy(),
        data=OneClass(),
        budgets={"x": Budget("linf", 1.0, low=-9, high=9)},
        apply=lambda loss, before_step: None,
    )


def overfitted(watch: str) -> tuple[Work, FGSMRS]:
    """One sound epoch of four steps, then one in which the bump has grown."""
    work, method = bumpy_work(), FGSMRS(watch=watch, **({} if watch == "off" else {"watch_clips": 20}))
    method.begin(work)
    for work.step in range(8):
        if work.step == 5:
            with torch.no_grad():
                work.model.bump.fill_(3.0)
                work.averaged.bump.fill_(1.0)
        method.train_step(work, batch(work))
    return work, method


@pytest.mark.parametrize("watch", ["warn", "stop", "restore"])
def test_the_watch_sees_a_planted_overfitting(watch, caplog):
    with caplog.at_level(logging.WARNING):
        work, method = overfitted(watch)
    history = work.memory[HISTORY]
    assert history[:, 0].tolist() == [4, 8]
    assert history[0, 3:].tolist() == [1, 1]
    assert history[1, 4] < 0.2 < history[1, 3] - 0.2
    assert history[1, 2] > history[1, 1]
    assert "step 8: catastrophic overfitting" in caplog.text
    assert work.model.bump.item() == (3 if watch == "warn" else 0)
    assert work.averaged.bump.item() == (1 if watch == "warn" else 0)
    assert method.finished(work) == (watch == "stop")
    assert work.memory["overfitting/pgd_hit"] == history[1, 4]


def test_without_a_watch_nothing_is_kept_or_paid():
    work, method = overfitted("off")
    assert not work.memory and not method.finished(work)
    assert work.cost.forwards == work.cost.backwards == 8 * 6 * 2
    assert work.model.bump.item() == 3


def test_looks_are_paid_for():
    work, _ = overfitted("warn")
    looks = 2 * 20
    assert work.cost.forwards == 8 * 6 * 2 + looks * (1 + 10 + 2)
    assert work.cost.backwards == 8 * 6 * 2 + looks * (1 + 10)


def test_a_model_that_never_held_has_nothing_to_lose(caplog):
    work, method = bumpy_work(), FGSMRS()
    method.begin(work)
    with torch.no_grad():
        work.model.bump.fill_(3.0)
    for work.step in range(8):
        method.train_step(work, batch(work))
    assert not caplog.text and not method.finished(work)


def test_what_both_attacks_break_is_no_overfitting_to_one(caplog):
    work, method = bumpy_work(), FGSMRS()
    method.begin(work)
    for work.step in range(8):
        if work.step == 5:
            with torch.no_grad():
                work.model.slope.fill_(-1.0)
        method.train_step(work, batch(work))
    assert work.memory[HISTORY][:, 4].tolist() == [1, 0]
    assert not caplog.text and work.model.slope.item() == -1


def test_all_processes_come_to_one_verdict(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(torch.tensor([1.0, 0, 3, 0.5])))
    torch.testing.assert_close(averaged(torch.tensor([0.0, 1, 1, 1])), torch.tensor([0.5, 0.5, 2, 0.75]))


def test_the_watch_leaves_mode_and_gradients_alone():
    work = tiny_work(steps=1, epochs=1)
    FGSMRS(watch="restore").begin(work)
    FGSMRS(watch="restore").train_step(work, batch(work))
    assert work.model.training and all(p.requires_grad for p in work.model.parameters())
    assert len(work.memory[HISTORY]) == 1


# Errors


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_an_adversary_without_a_budget_is_refused(make):
    model = tiny_fusion()
    make().check_budgets(model, wide("linf", 0.1, "audio"))
    make().check_budgets(model, {"audio": Budget("l2", snr_db=30.0)})
    with pytest.raises(ValueError, match=r"`budgets` must name at least one modality.*give eps"):
        make().check_budgets(model, {})
    with pytest.raises(ValueError, match="`eps` must be above 0 for adversarial training, got 0 for visual"):
        make().check_budgets(model, wide("linf", 0.1, "audio") | wide("linf", 0.0, "visual"))


def test_a_budget_for_a_modality_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"among \['audio', 'visual'\], got also \['touch'\]"):
        PGDTraining().check_budgets(tiny_fusion(), wide("linf", 0.1, "audio", "touch"))


def test_the_watch_has_no_settings_where_it_is_off():
    for settings in ({"watch_clips": 20}, {"watch_fall": 0.3}):
        with pytest.raises(ValueError, match="`watch_clips` and `watch_fall` go with a `watch`, which is off"):
            FGSMRS(watch="off", **settings)


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (PGDTraining, {"steps": 0}, "`steps` must be above 0, got 0"),
        (PGDTraining, {"reach": 0.0}, "`reach` must be above 0"),
        (FGSMRS, {"step_size": -1.0}, "`step_size` must be above 0"),
        (FGSMRS, {"watch": "sleep"}, r"`watch` must be one of \['off', 'warn', 'stop', 'restore'\], got 'sleep'"),
        (FGSMRS, {"watch_clips": 0}, "`watch_clips` must be above 0"),
        (FGSMRS, {"watch_fall": 1.0}, "`watch_fall` must be between 0 and 1"),
        (NFGSM, {"noise": 0.0}, "`noise` must be above 0"),
        (Free, {"replays": 0}, "`replays` must be above 0"),
        (TRADES, {"beta": float("nan")}, "`beta` must be above 0, got nan"),
        (MART, {"weight": 0.0}, "`weight` must be above 0"),
        (AWP, {"base": "mart"}, r"`base` must be one of \['pgd-at', 'trades'\], got 'mart'"),
        (AWP, {"gamma": 0.0}, "`gamma` must be above 0"),
        (AWP, {"steps": -1}, "`steps` must be at least 1, or 0"),
        (InterpolatedTraining, {"alpha": 0.0}, "`alpha` must be above 0"),
    ],
)
def test_settings_are_checked(make, settings, words):
    with pytest.raises(ValueError, match=words):
        make(**settings)


def test_every_method_has_a_name():
    assert {type(method) for method in ALL} == set(METHODS.values())
    assert all(issubclass(make, AdversarialTraining | Free) for make in METHODS.values())
