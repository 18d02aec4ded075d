"""Networks of timm as users have them, wrapped: a few layers, narrow, random."""

import pytest
import torch
from torch import Tensor, nn

from robustav import audit
from robustav.attacks import FGSM, PGD
from robustav.attacks.ascent import look
from robustav.classifier import Wrapped, frames
from robustav.data.samples import Sample
from robustav.goals import Untargeted
from robustav.harness import evaluate
from robustav.ledger import failures
from robustav.plan import conditions
from robustav.prepare import prepare
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel

pytestmark = pytest.mark.extra("timm")

BATCH, SIZE = 4, 32
CLASSES = ("bell", "clap", "kick", "hiss", "buzz")
NARROW = {"channels": (8, 16, 16, 16)}
# Name -> settings, the head, and how many of its batch norms directly follow a convolution in an `nn.Sequential`
# (those of the stem and of the shortcuts).
NETWORKS = {
    "resnet18": (NARROW, "fc", 4),
    "resnet10t": (NARROW | {"stem_width": 8}, "fc", 6),
    "test_efficientnet": ({}, "classifier", 0),  # they are attributes of its blocks, activation included
    "vit_tiny_patch16_224": (
        {"img_size": SIZE, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
        "head",
        0,
    ),
}
EVERY = pytest.mark.parametrize("name", NETWORKS)


def wrapped(name: str, latent: str | None = None) -> Wrapped:
    """One frame a clip; batch norms with statistics of their own, so that folding them is a test."""
    import timm

    network = timm.create_model(name, pretrained=False, num_classes=len(CLASSES), **NETWORKS[name][0])
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.3, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
    return Wrapped(
        network.eval(),
        specs={"visual": frames(1, SIZE)},
        classes=CLASSES,
        label_kind="multiclass",
        call=lambda network, inputs: network(inputs["visual"][:, 0]),
        latent=latent,
    )


def batch_of(model: Wrapped) -> tuple[dict[str, Tensor], Tensor]:
    """Pictures, some of their pixels black or white, and the model's own classes as labels."""
    inputs = {"visual": (1.4 * torch.rand(BATCH, 1, 3, SIZE, SIZE) - 0.2).clamp(0, 1)}
    with torch.no_grad():
        return inputs, model(inputs).argmax(1)


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def threat_of(epsilon: float | str) -> ThreatModel:
    return ThreatModel({"visual": Budget("linf", epsilon, low=0.0)}, Untargeted("multiclass"))


@EVERY
def test_wrapping_changes_no_score(name):
    model = wrapped(name)
    inputs, _ = batch_of(model)
    direct = model.network(inputs["visual"][:, 0])
    assert direct.shape == (BATCH, len(CLASSES))
    assert torch.equal(model(inputs), direct)


@EVERY
def test_folded_batch_norms_change_scores_and_gradients_by_rounding_only(name):
    model = wrapped(name)
    inputs, _ = batch_of(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quick = prepare(model, inputs)
    assert batch_norms(model) - batch_norms(quick) == NETWORKS[name][2]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    x = inputs["visual"].requires_grad_()
    direction = torch.randn(BATCH, len(CLASSES))
    scores, gradients = [], []
    for each in (model, quick):
        scores.append(each(inputs))
        gradients += torch.autograd.grad(scores[-1], x, direction)
    assert (scores[1] - scores[0]).abs().max() <= 1e-4 * scores[0].abs().max()
    assert (gradients[1] - gradients[0]).norm() <= 1e-3 * gradients[0].norm()


def test_a_batch_norm_that_holds_its_activation_is_not_folded_away_with_it():
    """timm's BatchNormAct2d is a BatchNorm2d by inheritance; the plain one behind it is folded all the same."""
    from timm.layers import BatchNormAct2d

    body = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = Wrapped(
        nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, len(CLASSES))).eval(),
        specs={"visual": frames(1, SIZE)},
        classes=CLASSES,
        label_kind="multiclass",
        call=lambda network, inputs: network(inputs["visual"][:, 0]),
    )
    inputs, _ = batch_of(model)
    quick = prepare(model, inputs)
    assert isinstance(quick.network[0][1], BatchNormAct2d)
    assert isinstance(quick.network[0][3], nn.Identity)
    torch.testing.assert_close(quick(inputs), model(inputs), rtol=1e-4, atol=1e-6)


@EVERY
def test_pgd_raises_the_loss_within_the_budget(name):
    model = wrapped(name)
    inputs, labels = batch_of(model)
    threat = threat_of("2/255")
    adversarial = PGD(8)(prepare(model, inputs), inputs, labels, threat, draws=draws_for(0, "abcd"))
    assert audit.violations(inputs, adversarial, threat, model.specs) == [""] * BATCH
    clean, attacked = look(model, inputs, labels, threat), look(model, adversarial, labels, threat)
    assert (attacked.loss > clean.loss).all()


@EVERY
def test_the_latent_is_what_the_head_turns_into_the_logits(name):
    head = NETWORKS[name][1]
    model = wrapped(name, head)
    inputs, _ = batch_of(model)
    trace = model.trace(inputs)
    assert trace.latent.shape == (BATCH, model.network.num_features)
    assert torch.equal(trace.logits, getattr(model.network, head)(trace.latent))
    torch.testing.assert_close(trace.logits, model.network(inputs["visual"][:, 0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        trace.latent,
        model.network.forward_head(model.network.forward_features(inputs["visual"][:, 0]), pre_logits=True),
    )


def test_a_latent_that_is_no_module_is_an_error_that_lists_the_modules():
    with pytest.raises(ValueError, match=r"got 'pre_logits'; its last are \['layer4.0.aa', .* 'fc'\]"):
        wrapped("resnet18", "pre_logits")


class Pictures:
    """Random pictures, each labelled with what the model sees in it."""

    name, classes, label_kind, digest = "pictures", CLASSES, "multiclass", "0" * 64
    ids = tuple(f"picture {i}" for i in range(6))

    def __init__(self, model: Wrapped) -> None:
        self.model = model

    def load(self, index: int) -> Sample:
        picture = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            return Sample(self.ids[index], {"visual": picture}, self.model({"visual": picture[None]})[0].argmax())


def test_the_harness_evaluates_a_wrapped_network(tmp_path):
    model = wrapped("resnet18", "fc")
    attacks = {"fgsm": FGSM(), "pgd": PGD(10)}
    goal = Untargeted("multiclass")
    rows = conditions(attacks, [dict(threat_of(0.1).budgets)], goal)
    ledger = evaluate(model, Pictures(model), rows, goal, tmp_path / "run")
    assert failures(ledger) == {}
    clean, fgsm, pgd = (ledger.read(row.key).set_index("sample") for row in rows)
    assert not clean["reached"].any()
    assert pgd["reached"].all()
    assert (pgd["loss"] >= fgsm["loss"]).all()
    assert (pgd["zero_gradients"] == 0).all()
    assert set(pgd["forwards"]) == {11}
