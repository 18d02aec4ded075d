"""Clips in memory, and networks of two modalities that know them after a least-squares fit: nothing is trained."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from robustav.classifier import Inputs, InputSpec, LabelKind, LateFusion
from robustav.data.samples import Sample

CLASSES = ("bell", "clap", "kick", "snap", "tone")
SPECS = {
    "audio": InputSpec((48,), -1.0, 1.0, "amplitude", 16_000),
    "visual": InputSpec((2, 3, 4, 4), 0.0, 1.0, "pixel value"),
}
MIDDLE = {"audio": 0.0, "visual": 0.5}
SIGNAL, HISS = 0.15, 0.1  # of a class's pattern, and of the noise on top
FITTED_ON = 96  # clips


def patterns() -> dict[str, Tensor]:
    """Modality -> one pattern of signs a class, [class, *shape]."""
    draw = torch.Generator().manual_seed(7)
    return {m: torch.randn(len(CLASSES), *spec.shape, generator=draw).sign() for m, spec in SPECS.items()}


def draw_clips(label_kind: LabelKind, count: int, seed: int) -> tuple[Inputs, Tensor]:
    """Clips of one class, in a multi-label set every third of two, under noise; and their labels."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.arange(count) % len(CLASSES)
    chosen = nn.functional.one_hot(first, len(CLASSES)).float()
    if label_kind == "multilabel":
        chosen[torch.arange(0, count, 3), (first[::3] + 1) % len(CLASSES)] = 1.0
    inputs = {}
    for m, pattern in patterns().items():
        noise = HISS * torch.randn(count, *SPECS[m].shape, generator=draw)
        x = MIDDLE[m] + SIGNAL * torch.einsum("bc,c...->b...", chosen, pattern) + noise
        inputs[m] = x.clamp(SPECS[m].low, SPECS[m].high)
    return inputs, chosen if label_kind == "multilabel" else first


class Clips:
    """Such clips as a data set in memory."""

    name = "self-test"
    classes = CLASSES

    def __init__(self, label_kind: LabelKind = "multilabel", count: int = 10) -> None:
        self.label_kind = label_kind
        self.inputs, self.labels = draw_clips(label_kind, count, seed=1)
        self.ids = tuple(f"clip {i}" for i in range(count))
        self.digest = f"{count}".rjust(64, "0")

    def load(self, index: int) -> Sample:
        """The clip at `index`."""
        return Sample(self.ids[index], {m: x[index] for m, x in self.inputs.items()}, self.labels[index])


def network(
    encoders: Mapping[str, nn.Module],
    *head: nn.Module,
    label_kind: LabelKind = "multilabel",
    front_ends: Mapping[str, nn.Module] | None = None,
    scale: float = 4.0,
) -> LateFusion:
    """A late fusion whose weights are drawn, and whose last layer is solved for: no training, the same everywhere.

    `scale` is the logit that the last layer aims at for the classes of a clip, and minus that for the others.
    """
    model = LateFusion(
        encoders,
        nn.Sequential(*head, nn.LazyLinear(len(CLASSES))),
        specs=SPECS,
        classes=CLASSES,
        label_kind=label_kind,
        front_ends=front_ends,
    )
    inputs, labels = draw_clips(label_kind, FITTED_ON, seed=2)
    with torch.no_grad():
        with torch.random.fork_rng(devices=[]):
            model.eval()(inputs)  # the lazy layers learn their sizes, and draw weights that are drawn again
        draw = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            deviation = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(deviation * torch.randn(parameter.shape, generator=draw))
        _settle_batch_norms(model, inputs)
        chosen = labels if labels.ndim == 2 else nn.functional.one_hot(labels, len(CLASSES))
        _solve(model, inputs, scale * (2.0 * chosen - 1))
    return model


def last_layer(model: LateFusion) -> nn.Linear:
    """What turns the last hidden values into logits."""
    assert isinstance(model.head, nn.Sequential)
    last = model.head[-1]
    assert isinstance(last, nn.Linear)
    return last


def _settle_batch_norms(model: LateFusion, inputs: Inputs) -> None:
    """Give batch norms the statistics of the clips that the last layer is solved on."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
            module.momentum, module.weight.data[:] = None, 1.0
            module.train()
    model(inputs)
    model.eval()


def _solve(model: LateFusion, inputs: Inputs, wanted: Tensor) -> None:
    """Ridge regression of the wanted logits on what the last layer reads, in float64 and closed form."""
    last = last_layer(model)
    assert isinstance(model.head, nn.Sequential)
    read = model.head[:-1](model.trace(inputs).latent).double()
    centre, offset = read.mean(0), wanted.double().mean(0)
    spread = (read - centre).T @ (read - centre)
    ridge = 0.01 * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
    weight = torch.linalg.solve(spread + ridge, (read - centre).T @ (wanted - offset)).T
    last.weight.copy_(weight)
    last.bias.copy_(offset - weight @ centre)
