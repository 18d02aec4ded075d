"""Latents: one pass of every clip through the model, kept wherever it is cut."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from robustav.classifier import Classifier, Inputs, LabelKind, Trace
from robustav.data.samples import Progress
from robustav.geometry.cuts import Cut, Parts
from robustav.losses import multi_hot
from robustav.reader import Reader

try:
    MEMORY = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    )  # bytes that the latents of a survey may take
except (AttributeError, ValueError, OSError):  # not every system tells how much it has
    MEMORY = 4 * 2**30


@dataclass(frozen=True)
class Latents:
    """What a model makes of a set of clips, on the CPU, clip by clip in the order of the data."""

    ids: tuple[str, ...]
    labels: Bool[Tensor, "sample class"]
    labelled: Bool[Tensor, " sample"]  # False: nobody labelled the clip, the model's own prediction stands in
    logits: Float[Tensor, "sample class"]
    parts: Mapping[str, Parts]  # cut -> its parts
    classes: tuple[str, ...]
    label_kind: LabelKind
    skipped: Mapping[str, str]  # clip -> why it could not be used

    def __len__(self) -> int:
        return len(self.ids)


def collect(
    model: Classifier,
    reader: Reader,
    indices: Sequence[int],
    cuts: Sequence[Cut],
    progress: Progress = lambda what, done, total: None,
) -> Latents:
    """Read the clips at `indices` and keep what each cut takes, in the network's own precision.

    Raises `ValueError` if no clip can be used, if a latent is not finite (naming the clip), or if all of it would take
    more than `MEMORY` bytes (naming the layer that takes most).
    """
    ids: list[str] = []
    labelled: list[bool] = []
    labels: list[Tensor] = []
    logits: list[Tensor] = []
    kept: dict[str, dict[str, list[Tensor]]] = {cut.name: {} for cut in cuts}
    skipped: dict[str, str] = {}
    for start in range(0, len(indices), reader.batch_size):
        progress("reading latents", start, len(indices))
        batches, reasons = reader.read(indices[start : start + reader.batch_size])
        skipped |= {row["sample"]: row["skipped"] for row in reasons}
        for batch in batches:
            with torch.no_grad():
                trace = _trace(model, batch.inputs)
                taken = {cut.name: cut.take(batch.inputs, trace) for cut in cuts}
            for name, parts in taken.items():
                for part, x in parts.items():
                    if not (finite := x.isfinite().flatten(1).all(1)).all():
                        clip = batch.ids[int((~finite).nonzero()[0])]
                        raise ValueError(f"the {name} of clip {clip!r} ({part}) is not finite (NaN or infinite)")
                    # A copy: what a stage returns may be a view of its input, or of a buffer that it uses again.
                    kept[name].setdefault(part, []).append(x.detach().to("cpu", copy=True))
            if not ids:
                _check_memory(kept, len(batch.ids), len(indices))
            ids += batch.ids
            labelled += batch.labelled
            labels.append(multi_hot(batch.labels, batch.clean.logits).bool().cpu())
            logits.append(batch.clean.logits.to("cpu", torch.float32, copy=True))
    progress("reading latents", len(indices), len(indices))
    if not ids:
        reason = next(iter(skipped.values()), "there is none")
        raise ValueError(f"no clip could be used ({len(skipped)} skipped; the first: {reason})")
    return Latents(
        tuple(ids),
        torch.cat(labels),
        torch.tensor(labelled),
        torch.cat(logits),
        {name: {part: torch.cat(chunks) for part, chunks in parts.items()} for name, parts in kept.items()},
        tuple(model.classes),
        model.label_kind,
        skipped,
    )


def _trace(model: Classifier, inputs: Inputs) -> Trace:
    """What each stage returned, whatever later ones write into it."""
    features = model.features(inputs)
    latent = model.fuse({m: x.clone() for m, x in features.items()})
    return Trace(features, latent, model.classify(latent.clone()))


def _check_memory(kept: Mapping[str, Mapping[str, list[Tensor]]], seen: int, clips: int) -> None:
    """Judge by the first batch what all of them will take."""
    needed = {n: sum(chunks[0].nbytes for chunks in parts.values()) * clips // seen for n, parts in kept.items()}
    if sum(needed.values()) > MEMORY:
        worst = max(needed, key=needed.__getitem__)
        raise ValueError(
            f"the latents of {clips} clips would take {sum(needed.values()) / 2**30:.1f} GiB (limit "
            f"{MEMORY / 2**30:.1f}, half of this machine's), most of it the layer {worst!r}: leave it out with --layers, or take fewer clips with --limit"
        )
