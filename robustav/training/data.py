"""What a training reads: labelled clips in memory or decoded when asked for, and the order in which they come."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float, Int
from torch import Tensor

from robustav.classifier import Classifier, Inputs, InputSpec
from robustav.data.av_events import AvEvents
from robustav.data.samples import Progress, Samples, SkippedError
from robustav.data.sources import load_samples
from robustav.harness import choose
from robustav.mel import END
from robustav.training.method import TrainingSet

WORKERS = 8  # threads that decode
SHOWN = 12  # classes that an error names
UNLABELLED = "it has no label that the model knows"
MEMORY = 4 * 2**30  # bytes of decoded clips that are kept
PACKED = {"amplitude": (torch.int16, 32768), "pixel value": (torch.uint8, 255)}  # unit -> type and what 1 is in it


class Scenes:
    """Scenes of av-events in memory; it satisfies `TrainingSet`."""

    def __init__(self, samples: AvEvents, modalities: Iterable[str], rows: Sequence[int] | None = None) -> None:
        audio, frames, labels = samples.tensors()
        chosen = torch.arange(len(labels)) if rows is None else torch.tensor(rows)
        stored = {"audio": audio, "visual": frames}
        self.name, self.digest, self.classes = samples.name, samples.digest, samples.classes
        self.label_kind = samples.label_kind
        self.ids = tuple(samples.ids[row] for row in chosen.tolist())
        self.specs = {m: samples.specs[m] for m in modalities}
        self.targets = labels[chosen].float()
        self._stored = {m: stored[m] if rows is None else stored[m][chosen] for m in self.specs}

    def inputs(self, rows: Int[Tensor, " batch"]) -> Inputs:
        return {m: unpacked(x[rows], self.specs[m]) for m, x in self._stored.items()}


class Loaded:
    """Any labelled clips as a `TrainingSet`: decoded by threads, kept as far as `memory` bytes go, then read again.

    Waveforms are rounded to 16 bits and pixels to 8, kept or not. Clips that cannot be used or that nobody labelled are
    left out; `skipped` has the reasons, `unknown_labels` how many clips have which label that the model lacks. Raises `ValueError` where no clip is left.
    """

    def __init__(
        self,
        samples: Samples,
        specs: Mapping[str, InputSpec],
        rows: Sequence[int] | None = None,
        *,
        memory: int = MEMORY,
        progress: Progress | None = None,
    ) -> None:
        self.name, self.digest, self.classes = samples.name, samples.digest, samples.classes
        self.label_kind, self.specs, self.samples = samples.label_kind, dict(specs), samples
        self.skipped: dict[str, str] = {}
        self.unknown_labels = {label: len(ids) for label, ids in getattr(samples, "unknown_labels", {}).items()}
        self._pool = ThreadPoolExecutor(WORKERS)
        self._indices: list[int] = []
        self._kept: list[Inputs | None] = []
        targets: list[Tensor] = []
        indices = range(len(samples.ids)) if rows is None else rows
        for done, (index, read) in enumerate(zip(indices, self._pool.map(self._read, indices), strict=True)):
            if progress:
                progress(f"reading {self.name}", done + 1, len(indices))
            if isinstance(read, str):
                self.skipped[samples.ids[index]] = read
                continue
            inputs, labels = read
            memory -= sum(x.nbytes for x in inputs.values())
            self._indices.append(index)
            self._kept.append(inputs if memory >= 0 else None)
            targets.append(labels if labels.ndim else F.one_hot(labels.long(), len(self.classes)))
        if not targets:
            reasons = "; ".join(f"{clip}: {reason}" for clip, reason in list(self.skipped.items())[:3])
            raise ValueError(f"no clip of {self.name} can be trained on ({reasons or 'it has none'}){self._wanted()}")
        self.targets = torch.stack(targets).float()
        self.ids = tuple(samples.ids[index] for index in self._indices)

    def inputs(self, rows: Int[Tensor, " batch"]) -> Inputs:
        clips = list(self._pool.map(self._clip, rows.tolist()))
        return {m: unpacked(torch.stack([clip[m] for clip in clips]), spec) for m, spec in self.specs.items()}

    def _clip(self, row: int) -> Inputs:
        if (kept := self._kept[row]) is not None:
            return kept
        read = self._read(self._indices[row])
        if isinstance(read, str):
            raise ValueError(f"{self.ids[row]} could be read before and cannot any more: {read}")
        return read[0]

    def _wanted(self) -> str:
        """Which labels the model knows, where clips had none of them."""
        if UNLABELLED not in self.skipped.values():
            return ""
        return f": the model's classes are {', '.join(self.classes[:SHOWN])}{', ...' * (len(self.classes) > SHOWN)}"

    def _read(self, index: int) -> tuple[Inputs, Tensor] | str:
        """Packed inputs and labels of a clip, or why it is left out."""
        try:
            sample = self.samples.load(index)
        except SkippedError as reason:
            return str(reason)
        if sample.labels is None:
            return UNLABELLED
        return {m: packed(sample.inputs[m], spec) for m, spec in self.specs.items()}, sample.labels


def packed(x: Tensor, spec: InputSpec) -> Tensor:
    """Raw inputs in as few bits as they are recorded with; others as they are."""
    if spec.unit not in PACKED:
        return x
    kind, one = PACKED[spec.unit]
    limits = torch.iinfo(kind)
    whole = (x * one).round().clamp(limits.min, limits.max)
    return torch.where(x == END, 1, whole).to(kind)  # a recording's silent end is still one (`robustav.mel.with_end`)


def unpacked(x: Tensor, spec: InputSpec) -> Tensor:
    """From stored numbers to the unit of the model."""
    return x.float() / PACKED[spec.unit][1] if spec.unit in PACKED else x


def training_set(
    source: str, model: Classifier, *, limit: int | None = None, seed: int = 0, progress: Progress | None = None
) -> TrainingSet:
    """What `robustav.data.sources` finds under that name for a model, `limit` clips of it drawn by seed."""
    samples, _ = load_samples(source, model, progress)
    if samples.label_kind != model.label_kind:
        raise ValueError(f"the model is {model.label_kind}, but {samples.name} is labelled {samples.label_kind}")
    rows = None if limit is None else choose(samples, limit, seed)
    if isinstance(samples, AvEvents):
        return Scenes(samples, model.specs, rows)
    return Loaded(samples, model.specs, rows, progress=progress)


def balanced_weights(targets: Float[Tensor, "sample class"]) -> Float[Tensor, " sample"]:
    """How likely a clip should be drawn for rare classes to be seen as often as common ones: the sum over its labels of 1
    over how many clips have that label. Clips without labels count as one class more.
    """
    without = (targets.sum(1, keepdim=True) == 0).to(targets)
    members = torch.cat([targets, without], dim=1)
    return (members / members.sum(0).clamp(min=1)).sum(1)


def order_of(
    targets: Float[Tensor, "sample class"], balanced: bool, generator: torch.Generator
) -> Int[Tensor, " draw"]:
    """The rows of one epoch, as many as there are clips: shuffled, or drawn with replacement by `balanced_weights`."""
    if balanced:
        return torch.multinomial(balanced_weights(targets), len(targets), replacement=True, generator=generator)
    return torch.randperm(len(targets), generator=generator)


def batches_of(
    order: Int[Tensor, " draw"], size: int, rank: int = 0, world: int = 1
) -> Iterator[Int[Tensor, " batch"]]:
    """Rows batch by batch, of each batch this process's share. What does not fill a batch at the end is left out."""
    for batch in order.split(size)[: math.floor(len(order) / size)]:
        yield batch[rank::world]
