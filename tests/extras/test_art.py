"""The Adversarial Robustness Toolbox as oracle, through its `PyTorchClassifier`."""

from pathlib import Path

import pytest
import torch
from torch import nn

from robustav import audit
from robustav.attacks import FGSM, PGD, MomentumFGSM
from robustav.attacks.ascent import climb, look
from robustav.classifier import InputSpec, Wrapped
from robustav.goals import Untargeted
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel

pytestmark = pytest.mark.extra("art")

BATCH = 8  # a power of two: their loss is the mean over the batch, ours the sum, and so both round alike
CLASSES = ("bell", "clap", "kick", "hiss")
SHAPE = {"visual": (3, 8, 8), "audio": (64,)}
LOW = {"visual": 0.0, "audio": -1.0}
NETWORK = {
    "visual": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, len(CLASSES))),
    "audio": lambda: nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, len(CLASSES))),
}
MODALITIES = pytest.mark.parametrize("modality", ["visual", "audio"])


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Importing ART writes a folder `.art` into the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))


class Duel:
    """One model and one batch of one modality, attacked by both sides from the clean point."""

    def __init__(
        self, modality: str, norm: str = "linf", epsilon: float = 0.05, label_kind: str = "multiclass"
    ) -> None:
        self.modality, self.epsilon = modality, epsilon
        self.plain = NETWORK[modality]().eval()
        low, shape = LOW[modality], SHAPE[modality]
        self.model = Wrapped(
            self.plain,
            specs={modality: InputSpec(shape, low, 1.0, "raw")},
            classes=CLASSES,
            label_kind=label_kind,
            call=lambda network, inputs: network(inputs[modality]),
        )
        self.clean = {modality: low + (1 - low) * (0.25 + 0.5 * torch.rand(BATCH, *shape))}
        with torch.no_grad():
            self.labels = self.model(self.clean).argmax(1)
        if label_kind == "multilabel":  # one to three labels a clip
            rank = torch.rand(BATCH, len(CLASSES)).argsort(1)
            self.labels = (rank <= torch.arange(BATCH)[:, None] % 3).float()
        self.threat = ThreatModel({modality: Budget(norm, epsilon, low=low)}, Untargeted(label_kind))

    def estimator(self):
        from art.estimators.classification import PyTorchClassifier

        multiclass = self.model.label_kind == "multiclass"
        return PyTorchClassifier(
            self.plain,
            loss=nn.CrossEntropyLoss() if multiclass else nn.BCEWithLogitsLoss(),
            input_shape=SHAPE[self.modality],
            nb_classes=len(CLASSES),
            clip_values=(LOW[self.modality], 1.0),
            device_type="cpu",
        )

    def ours(self, attack):
        adversarial = attack(self.model, self.clean, self.labels, self.threat, draws=draws_for(0, "abcdefgh"))
        assert audit.violations(self.clean, adversarial, self.threat, self.model.specs) == [""] * BATCH
        return adversarial

    def theirs(self, attack):
        adversarial = attack.generate(self.clean[self.modality].numpy(), self.labels.numpy())
        return {self.modality: torch.from_numpy(adversarial)}

    def loss(self, inputs):
        return look(self.model, inputs, self.labels, self.threat).loss


@MODALITIES
@pytest.mark.parametrize("epsilon", [1 / 255, 0.05, 0.6])
def test_fgsm_is_theirs(modality, epsilon):
    from art.attacks.evasion import FastGradientMethod

    duel = Duel(modality, epsilon=epsilon)
    theirs = duel.theirs(FastGradientMethod(duel.estimator(), eps=epsilon))
    torch.testing.assert_close(duel.ours(FGSM()), theirs, rtol=0, atol=1e-6)


@MODALITIES
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 0.5)])
@pytest.mark.parametrize(("relative_step", "steps"), [(0.25, 10), (1.0, 1)])
def test_pgd_climbs_as_high_as_theirs(modality, norm, epsilon, relative_step, steps):
    """ART cuts to the valid range before the ball and we after it, which is the same inside the range."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    duel = Duel(modality, norm, epsilon)
    them = ProjectedGradientDescentPyTorch(
        duel.estimator(),
        norm={"linf": "inf", "l2": 2}[norm],
        eps=epsilon,
        eps_step=relative_step * epsilon,
        max_iter=steps,
        verbose=False,
    )
    ours, theirs = duel.loss(duel.ours(PGD(steps, relative_step, random_start=False))), duel.loss(duel.theirs(them))
    assert (ours > duel.loss(duel.clean)).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@MODALITIES
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_momentum_climbs_as_high_as_theirs(modality, decay):
    from art.attacks.evasion import MomentumIterativeMethod

    steps, duel = 8, Duel(modality)
    step = duel.epsilon / steps
    them = MomentumIterativeMethod(
        duel.estimator(), eps=duel.epsilon, eps_step=step, decay=decay, max_iter=steps, verbose=False
    )
    ours, theirs = duel.loss(duel.ours(MomentumFGSM(steps, decay))), duel.loss(duel.theirs(them))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@MODALITIES
def test_the_multiclass_gradient_is_theirs(modality):
    duel = Duel(modality)
    _, gradients = climb(duel.model, duel.clean, duel.labels, duel.threat)
    one_hot = nn.functional.one_hot(duel.labels, len(CLASSES)).float().numpy()
    theirs = torch.from_numpy(duel.estimator().loss_gradient(duel.clean[modality].numpy(), one_hot))
    torch.testing.assert_close(gradients[modality], BATCH * theirs, rtol=1e-5, atol=1e-8)


@MODALITIES
def test_the_multilabel_gradient_is_the_sum_over_labels_where_theirs_is_arg_maxed(modality):
    """V5: with a binary cross-entropy ART reduces multi-hot labels to one class a clip, and then no shape fits."""
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch

    duel = Duel(modality, label_kind="multilabel")
    estimator = duel.estimator()
    assert torch.equal(estimator.reduce_labels(duel.labels), duel.labels.argmax(1).float())
    with pytest.raises(ValueError, match="Target size"):
        duel.theirs(FastGradientMethod(estimator, eps=0.05))
    with pytest.raises(ValueError, match="Target size"):
        duel.theirs(ProjectedGradientDescentPyTorch(estimator, eps=0.05, eps_step=0.01, verbose=False))

    _, gradients = climb(duel.model, duel.clean, duel.labels, duel.threat)
    by_class = torch.func.jacrev(lambda x: duel.plain(x).sum(0))(duel.clean[modality])  # a clip's logits are its own
    excess = (duel.plain(duel.clean[modality]).sigmoid() - duel.labels).detach()  # of the score over the label
    by_hand = torch.einsum("bc,cb...->b...", excess, by_class)
    torch.testing.assert_close(gradients[modality], by_hand, rtol=1e-4, atol=1e-7)
    assert (duel.loss(duel.ours(PGD())) > duel.loss(duel.clean)).all()
