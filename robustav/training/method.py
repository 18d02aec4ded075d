"""What a training method is, and what it works with: batches, a model, budgets, and a count of every pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float, Int
from torch import Tensor

from robustav.classifier import Classifier, Inputs, InputSpec, LabelKind, Trace
from robustav.losses import bce
from robustav.threat import Budget


class Batch(NamedTuple):
    """Some clips of a training set, in raw units."""

    inputs: Inputs
    targets: Float[Tensor, "batch class"]  # zeros and ones; what is mixed lies between
    rows: Int[Tensor, " batch"]  # which clips of the training set they are


@runtime_checkable  # so that shape checking in the tests can look at one
class TrainingSet(Protocol):
    """Labelled clips that a training can ask for by row, again and again."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def label_kind(self) -> LabelKind: ...

    @property
    def specs(self) -> Mapping[str, InputSpec]: ...

    @property
    def targets(self) -> Float[Tensor, "sample class"]:
        """Zeros and ones, for either kind of label."""
        ...

    def inputs(self, rows: Int[Tensor, " batch"]) -> Inputs:
        """Raw inputs of some clips, on the CPU."""
        ...


@dataclass
class Cost:
    """What a training spent, in passes of one clip: a forward pass, and a backward pass to weights or to inputs."""

    clips: int = 0  # drawn from the training set
    forwards: int = 0
    backwards: int = 0

    @property
    def forwards_a_clip(self) -> float:
        """Forward passes for each clip seen; plain training has 1."""
        return self.forwards / max(1, self.clips)

    @property
    def backwards_a_clip(self) -> float:
        """Backward passes for each clip seen; plain training has 1."""
        return self.backwards / max(1, self.clips)


def supervised(
    logits: Float[Tensor, "batch class"], targets: Float[Tensor, "batch class"], label_kind: LabelKind
) -> Float[Tensor, " batch"]:
    """BCE summed over classes of multi-label clips, cross-entropy of the others; targets may lie between 0 and 1."""
    if label_kind == "multilabel":
        return bce(logits, targets)
    return F.cross_entropy(logits, targets.to(logits), reduction="none")


Update = Callable[[Float[Tensor, ""], Callable[[], None] | None], None]


@dataclass
class Work:
    """A training in progress, as a method sees it.

    Every pass goes through `trace`, `features`, `gradients` and `update`, which count it. `averaged` has the running mean
    of the weights. `batch` loads clips, and what `moved` and then `augment` make of them; `loaded` notes which, for the
    errors of a step. `memory` holds the tensors that a method keeps from step to step; they are saved with the training.
    `generator` (on the CPU) is the only source of randomness. `budgets` are what an adversary may do while training.
    `weights` says how likely each clip is to be drawn, where they are not drawn alike.
    """

    model: Classifier
    averaged: Classifier
    data: TrainingSet
    budgets: Mapping[str, Budget]
    generator: torch.Generator
    epochs: int
    steps: int  # in all
    apply: Update  # backward, gradient clipping, optimizer step
    epoch: int = 0
    step: int = 0
    whole: bool = True  # whether `budgets` have grown to their whole size
    weights: Float[Tensor, " sample"] | None = None
    cost: Cost = field(default_factory=Cost)
    memory: dict[str, Tensor] = field(default_factory=dict)
    augment: Callable[[Inputs], Inputs] = lambda inputs: inputs  # what is done to the clips of a batch
    moved: Callable[[Inputs, Tensor], Inputs] = lambda inputs, rows: inputs  # and before that, by a method
    loaded: list[Int[Tensor, " batch"]] = field(default_factory=list)  # rows of the clips of this step

    def batch(self, rows: Int[Tensor, " batch"]) -> Batch:
        """Clips of the training set as a step sees them: on the model's device, augmented."""
        device = next(self.model.parameters()).device
        self.loaded.append(rows)
        inputs = {m: x.to(device) for m, x in self.data.inputs(rows).items()}
        return Batch(self.augment(self.moved(inputs, rows)), self.data.targets[rows].to(device), rows)

    def trace(self, inputs: Inputs) -> Trace:
        """Features, latent and logits; one forward pass a clip."""
        return self.model.finish(self.features(inputs))

    def features(self, inputs: Inputs) -> dict[str, Tensor]:
        """Each modality on its own; counted as a whole forward pass, which `model.finish` completes."""
        self.cost.forwards += len(next(iter(inputs.values())))
        return self.model.features(inputs)

    def loss(self, logits: Tensor, targets: Tensor) -> Float[Tensor, " batch"]:
        """The loss of plain training, clip by clip."""
        return supervised(logits, targets, self.model.label_kind)

    def gradients(self, loss: Float[Tensor, ""], inputs: Inputs) -> Inputs:
        """Of a loss with respect to inputs that require them; one backward pass a clip. Zeros where nothing depends."""
        self.cost.backwards += len(next(iter(inputs.values())))
        found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        return {m: torch.zeros_like(x) if g is None else g for (m, x), g in zip(inputs.items(), found, strict=True)}

    def update(self, loss: Float[Tensor, ""], clips: int, before_step: Callable[[], None] | None = None) -> None:
        """Backward through `clips` clips and a step of the optimizer; `before_step` is called between the two."""
        self.cost.backwards += clips
        self.apply(loss, before_step)

    @contextmanager
    def crafting(self) -> Iterator[None]:
        """For making adversarial inputs: eval mode and no gradients to weights, as it was afterwards."""
        training = self.model.training
        wanted = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
            self.model.train(training)


@dataclass(frozen=True)
class Method:
    """How a batch becomes a step: frozen settings. As it stands, plain training (empirical risk minimisation).

    Most methods write `losses` and nothing else. What they keep from step to step is in `Work.memory`.
    """

    loads: ClassVar[bool] = True  # False: a batch has rows and targets alone, since the method loads clips by itself
    budgeted: ClassVar[bool] = False  # whether it asks what an adversary may do

    def check(self, model: Classifier) -> None:
        """Raise `ValueError` saying what is missing, unless the method can train this model."""

    def check_plan(self, epochs: int, balanced: bool) -> None:
        """Raise `ValueError` unless the method does what it says in so many epochs of clips that are drawn so."""

    def check_budgets(self, model: Classifier, budgets: Mapping[str, Budget]) -> None:
        """Raise `ValueError` unless the method can train the model against these."""
        if not self.budgeted:
            return
        if not budgets:
            raise ValueError("`budgets` must name at least one modality, got none: give eps, such as 0.01")
        if unknown := sorted(budgets.keys() - model.specs.keys()):
            raise ValueError(f"`budgets` must name modalities among {sorted(model.specs)}, got also {unknown}")
        if nothing := sorted(m for m, budget in budgets.items() if budget.epsilon is not None and budget.epsilon == 0):
            raise ValueError(
                f"`eps` must be above 0 for adversarial training, got 0 for {nothing[0]}: leave that out, or train by erm"
            )

    def wrapped(self, model: Classifier) -> Classifier:
        """What is trained and loaded again in the model's place; unless told, the model itself.

        Called before anything is trained, and by `load_trained` before weights are loaded.
        """
        return model

    def begin(self, work: Work) -> None:
        """Called before the first step and never again, not even where a killed training goes on."""

    def begin_epoch(self, work: Work) -> None:
        """Called before each epoch."""

    def finished(self, work: Work) -> bool:
        """Asked after each epoch: whether to train no further."""
        return False

    def settled(self, work: Work) -> bool:
        """Asked after each epoch: whether it trains in earnest by now, so that the best weights may be among its own."""
        return work.whole or not self.budgeted

    def losses(self, work: Work, batch: Batch) -> Float[Tensor, " clip"]:
        """What a step minimises the mean of."""
        return work.loss(work.trace(batch.inputs).logits, batch.targets)

    def train_step(self, work: Work, batch: Batch) -> Float[Tensor, ""]:
        """One batch: usually a single update. Returns the loss that logs show."""
        loss = self.losses(work, batch).mean()
        work.update(loss, len(batch.rows))
        return loss.detach()
