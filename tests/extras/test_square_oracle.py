"""torchattacks as oracle for Square: at equal queries on pictures in [0, 1], ours leaves no more clips standing."""

import pytest
import torch
from torch import nn

from robustav import audit
from robustav.attacks.ascent import look
from robustav.attacks.square import Square
from robustav.classifier import InputSpec, Wrapped
from robustav.goals import Untargeted
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel

pytestmark = pytest.mark.extra("torchattacks")

CLIPS, CLASSES, SEEDS = 24, ("bell", "clap", "kick", "hiss"), 3


def network() -> nn.Sequential:
    """A small network with curvature, whose margins differ widely from picture to picture."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, len(CLASSES)))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    return plain.eval().requires_grad_(False)


@pytest.mark.parametrize(("norm", "epsilon", "queries"), [("linf", 0.03, 150), ("l2", 0.5, 150)])
def test_breaks_as_much_as_theirs(norm, epsilon, queries):
    """Share of survivors over all seeds, to within 5 points (their first look is not among their `n_queries`)."""
    import torchattacks

    plain = network()
    images = torch.rand(CLIPS, 3, 10, 10)
    labels = plain(images).argmax(1)
    model = Wrapped(
        plain,
        specs={"visual": InputSpec((3, 10, 10), 0.0, 1.0, "pixel value")},
        classes=CLASSES,
        label_kind="multiclass",
        call=lambda network, inputs: network(inputs["visual"]),
    )
    threat, clean = (
        ThreatModel({"visual": Budget(norm, epsilon, low=0.0)}, Untargeted("multiclass")),
        {"visual": images},
    )
    standing = {"ours": 0.0, "theirs": 0.0}
    for seed in range(SEEDS):
        draws = draws_for(seed, [f"clip {i}" for i in range(CLIPS)])
        ours = Square(queries)(model, clean, labels, threat, draws=draws)
        assert audit.violations(clean, ours, threat, model.specs) == [""] * CLIPS
        torch.manual_seed(seed)
        attack = torchattacks.Square(plain, norm.title(), epsilon, queries - 1, seed=seed)
        theirs = {"visual": attack(images, labels)}
        for name, x in (("ours", ours), ("theirs", theirs)):
            standing[name] += (~look(model, x, labels, threat).reached).float().mean().item() / SEEDS
    assert 0.1 < standing["theirs"] < 0.9, "a test of nothing"
    assert standing["ours"] <= standing["theirs"] + 0.05
