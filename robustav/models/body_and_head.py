"""What models of other libraries become here: a network up to its last layer, that layer, and a front end."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import Classifier, InputSpec, LabelKind, check_label_kind
from robustav.models.published.mixtures import averaged


def optional(name: str) -> Any:
    """An optional package, imported when it is needed; raises `ValueError` saying how to get it."""
    if find_spec(name) is None:
        raise ValueError(f"{name} is not installed: pip install 'robustav[{name}]'")
    return import_module(name)


class BodyAndHead(Classifier):
    """A network of one modality whose last layer turns one vector into logits; `embed(network, x)` gives that vector.

    Where `by_frame`, the network sees pictures: it is asked about each frame, the latent is the frames' vectors side by
    side, and a clip's score is the mean of the frames' probabilities. `head` names the last layer within the network,
    whose tensors are `network.` of the state dict; without one, `embed` gives logits, which stand in for the latent.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        embed: Callable[[nn.Module, Tensor], Tensor],
        head: str | None,
        front: nn.Module,
        modality: str,
        spec: InputSpec,
        classes: Sequence[str],
        label_kind: LabelKind,
        by_frame: bool = False,
    ) -> None:
        super().__init__()
        check_label_kind(label_kind)
        self.network, self.embed, self.head_name, self.front, self.by_frame = network, embed, head, front, by_frame
        self.specs, self.classes, self.label_kind = {modality: spec}, tuple(classes), label_kind

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.front(raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        if self.by_frame:
            return self.embed(self.network, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.embed(self.network, x)[:, None]

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        (vectors,) = features.values()
        return vectors.flatten(1)

    def classify(self, latent: Tensor) -> Tensor:
        (spec,) = self.specs.values()
        vectors = latent.unflatten(1, (spec.shape[0] if self.by_frame else 1, -1))
        head = self.network.get_submodule(self.head_name) if self.head_name else nn.Identity()
        return averaged(head(vectors), self.label_kind)


class Pixels(nn.Module):
    """Frames in [0, 1] cut to `size` (height, width), `margin` pixels from the top and the left; then normalised.

    [batch, frame, 3, height, width] -> [batch, frame, 3, *size]; `(scale x pixel - mean) / std` of each channel.
    """

    def __init__(
        self,
        size: tuple[int, int],
        margin: tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.size, self.margin, self.scale = size, margin, scale
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(
        self, frames: Float[Tensor, "batch frame 3 height width"]
    ) -> Float[Tensor, "batch frame 3 cut_height cut_width"]:
        """Normalised pixels."""
        (top, left), (height, width) = self.margin, self.size
        return (self.scale * frames[..., top : top + height, left : left + width] - self.mean) / self.std
