"""Clips as a model's front ends have them, for attacks on features."""

import torch

from robustav.classifier import AtFeatures
from robustav.data.samples import Sample, Samples


class Featured:
    """`Samples` whose inputs went through the front ends of the viewed model.

    Which part of a feature came from padding is not known: all of it may be written to.
    """

    def __init__(self, raw: Samples, view: AtFeatures) -> None:
        self.raw, self.view = raw, view
        self.name, self.classes, self.label_kind, self.ids = (
            f"{raw.name}, features",
            raw.classes,
            raw.label_kind,
            raw.ids,
        )
        self.digest = f"{raw.digest}-features"
        self.unknown_labels: dict[str, list[str]] = getattr(raw, "unknown_labels", {})

    def load(self, index: int) -> Sample:
        """The clip at `index` of `ids`; raises `SkippedError` with the reason if it cannot be used."""
        sample = self.raw.load(index)
        place = next(self.view.parameters(), torch.zeros(())).device
        with torch.no_grad():
            features = self.view.front_ends({m: x[None].to(place) for m, x in sample.inputs.items()})
        return Sample(sample.id, {m: x[0].cpu() for m, x in features.items()}, sample.labels)
