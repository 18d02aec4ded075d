"""One survey of a model's latents from start to end, in the words of the command line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from robustav.classifier import Classifier, Wrapped
from robustav.data.samples import Progress, Samples
from robustav.data.sources import load_samples
from robustav.geometry.cuts import Cut, cuts_of
from robustav.geometry.latents import Latents, collect
from robustav.goal_names import parse_goal
from robustav.harness import BATCH, as_evaluated, choose, pick_device
from robustav.ledger import digest_of_model
from robustav.metrics.intervals import RESAMPLES, bootstrap_weights
from robustav.models.zoo import load_model
from robustav.reader import Reader

LAYERS = ("input", "features", "latent")


def silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Survey:
    """A model, clips, and the places where its latents are looked at.

    `layers` are cuts ("input", "front end", "features", "latent") or modules by name; `latent` names the last module of
    a wrapped network whose latent is not declared. `limit` None or 0 is all clips; those whose ids are in `leave_out`
    are not looked at.
    """

    model: str | Classifier = "av-fusion"
    data: str | None = None
    checkpoint: Path | None = None
    trust_pickle: bool = False
    latent: str | None = None
    layers: Sequence[str] = LAYERS
    seed: int = 0
    limit: int | None = None
    leave_out: frozenset[str] = frozenset()
    threshold: float = 0.5  # probability at which a class counts as accepted (multilabel)
    device: str = "auto"
    batch_size: int | None = None
    strict: bool = False
    resamples: int = RESAMPLES

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("`layers` must name at least one layer, got none")
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"`limit` must not be negative, got {self.limit}")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
        if self.resamples < 1:
            raise ValueError(f"`resamples` must be at least 1, got {self.resamples}")

    @contextmanager
    def opened(self, progress: Progress = silent) -> Iterator["View"]:
        """The model loaded, its clips read once, its latents in memory, for as long as the context lasts."""
        if isinstance(self.model, Classifier):
            model, about = self.model, {"model": type(self.model).__name__}
        else:
            model, about = load_model(self.model, self.checkpoint, trust_pickle=self.trust_pickle)
        if self.latent is not None:
            model = _with_latent(model, self.latent)
        samples, _ = load_samples(self.data, model, progress)
        device = pick_device(self.device)
        with as_evaluated(model, device):
            goal = parse_goal("untargeted", tuple(model.classes), model.label_kind, threshold=self.threshold)
            reader = Reader(model, samples, goal, self.batch_size or BATCH[device.type], device, self.strict)
            chosen = [i for i in choose(samples, self.limit or None, self.seed) if samples.ids[i] not in self.leave_out]
            if not chosen:
                raise ValueError(f"{samples.name} has no clips that are to be looked at")
            cuts = cuts_of(model, self.layers, _first(reader, chosen))
            latents = collect(model, reader, chosen, cuts, progress)
            yield View(self, model, samples, reader, cuts, latents, about, tuple(chosen))


@dataclass(frozen=True)
class View:
    """An opened survey: the model, its cuts, and what it makes of the clips."""

    survey: Survey
    model: Classifier
    samples: Samples
    reader: Reader
    cuts: Sequence[Cut]
    latents: Latents
    about: dict[str, Any]
    chosen: tuple[int, ...]
    weights: Int[np.ndarray, "resample sample"] = field(init=False)

    def __post_init__(self) -> None:
        drawn = bootstrap_weights(len(self.latents), self.survey.resamples, seed=self.survey.seed)
        object.__setattr__(self, "weights", drawn)

    def collect_others(self, samples: Samples, progress: Progress = silent) -> Latents:
        """The latents of other clips by the same model and cuts: adversarial ones, or another split."""
        reader = Reader(
            self.model, samples, self.reader.goal, self.reader.batch_size, self.reader.device, self.reader.strict
        )
        return collect(self.model, reader, range(len(samples.ids)), self.cuts, progress)

    def header(self) -> dict[str, str]:
        """What a report says at its top."""
        about, latents = self.about, self.latents
        used = f"{len(latents)} of {len(self.samples.ids)} clips"
        used += f" ({len(latents.skipped)} skipped)" if latents.skipped else ""
        weights = digest_of_model(self.model)[:12]
        if "checkpoint" in about:
            weights += f", from {about['checkpoint']} (sha256 {about['checkpoint_sha256'][:12]})"
        return {
            "model": str(about["model"]) + (f", {about['summary']}" if "summary" in about else ""),
            "weights": f"{weights}, {sum(p.numel() for p in self.model.parameters()):,} parameters",
            "data": f"{self.samples.name}, data {self.samples.digest[:12]}, {used}",
            "layers": ", ".join(cut.name for cut in self.cuts),
            "run": f"seed {self.survey.seed}, {len(self.weights)} resamples, torch {torch.__version__}",
        }


def _with_latent(model: Classifier, module: str) -> Classifier:
    """The same wrapped network with its last module named."""
    if not isinstance(model, Wrapped):
        raise ValueError(
            f"--latent names the last module of a wrapped network; {type(model).__name__} has stages, so its latent is known"
        )
    return Wrapped(
        model.network,
        specs=model.specs,
        classes=model.classes,
        label_kind=model.label_kind,
        call=model.call,
        latent=module.removeprefix("network."),
    )


def _first(reader: Reader, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """One usable clip, to see what the stages do."""
    for index in chosen:
        batches, _ = reader.read([index])
        if batches:
            return batches[0].inputs
    raise ValueError(f"none of the {len(chosen)} clips of {reader.samples.name} can be used: see robustav data check")
