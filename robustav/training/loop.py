"""The training loop: a recipe and a folder in, weights, a card and a log in that folder out; a kill costs an epoch."""

import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors.torch import save
from torch import Tensor, nn

import robustav
from robustav.classifier import Classifier
from robustav.data.samples import Progress
from robustav.ledger import digest_of_model, write_atomically
from robustav.models.asked import parse_model
from robustav.models.checkpoints import digest_of_file
from robustav.models.zoo import MODELS
from robustav.prepare import channels_last
from robustav.randomness import draw_for, seeded
from robustav.training.augment import parse_augmentation
from robustav.training.data import balanced_weights, batches_of, order_of, training_set
from robustav.training.logs import Scalars, log_lines, no_scalars, tensorboard_scalars
from robustav.training.method import Batch, Cost, Method, TrainingSet, Work
from robustav.training.methods import code_of, parse_method
from robustav.training.processes import average_buffers, average_gradients, launched, summed
from robustav.training.recipe import DECLARED, Recipe, scores_of
from robustav.training.states import States
from robustav.training.trained import CARD, WEIGHTS, Trained, finished, initial, read_trained

LOG = "log.csv"
SHOWN = 5  # clips that an error names, reasons that a card gives
VALIDATED = 32  # clips at a time


def train(
    recipe: Recipe,
    folder: Path | str,
    *,
    device: str = "auto",
    devices: int = 1,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train what `recipe` says; `folder` gets `model.safetensors`, `card.json` and `log.csv`.

    A training that was killed goes on after the last epoch that it finished, and ends with the same weights, byte for
    byte on a CPU. A finished one returns at once. Under torchrun, or with `devices` above 1, each process works on its
    share of every batch. Raises `ValueError` for a folder that holds anything else, and, with the step and the clips,
    for a loss or a gradient that is not finite.
    """
    folder = Path(folder)
    if (done := finished(recipe, folder)) is not None:
        return done
    fabric = launched(device, devices)
    method = parse_method(recipe.method)
    training = _Training(recipe, method, folder, fabric, progress)
    scalars = tensorboard_scalars(folder, training.work.step) if tensorboard and fabric.is_global_zero else no_scalars
    work = training.work
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        while work.epoch < work.epochs and not training.stopped:
            with training.epoch(scalars):
                method.begin_epoch(work)
                for batch in training.batches():
                    training.done(method.train_step(work, batch))
        return training.finish()


class _Training:
    """A training in progress, and what of it is on disk."""

    def __init__(self, recipe: Recipe, method: Method, folder: Path, fabric: Fabric, progress: Progress | None) -> None:
        self.recipe, self.method, self.folder, self.fabric, self.progress = recipe, method, folder, fabric, progress
        model = initial(recipe, method)
        method.check(model)
        self.score = recipe.declared_score(model.label_kind)
        self.budgets = recipe.budgets(model)
        method.check_budgets(model, self.budgets)
        given: dict[str, Any] = {"seed": recipe.seed, "progress": progress}
        self.data = training_set(recipe.data, model, limit=recipe.limit, **given)
        self.validation = training_set(recipe.validates, model, **given) if recipe.validates else None
        if self.validation is not None and not self.validation.targets.any():
            raise ValueError(f"`validation` must have clips with labels, got none in {self.validation.name}")
        batches = len(self.data.targets) // recipe.batch_size
        if batches == 0 or recipe.batch_size % fabric.world_size:
            raise ValueError(
                f"`batch_size` must be at most the {len(self.data.targets)} clips that there are to train on, and shared "
                f"equally by {fabric.world_size} processes, got {recipe.batch_size}"
            )
        self.identity = self._identity(model)
        model.to(fabric.device).train()
        if parse_model(recipe.model).name in MODELS:  # a user's own may view its tensors as they lie
            channels_last(model)
        averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("`model` must have parameters to train, got none that requires a gradient")
        self.optimizer = _optimizer(recipe, self.parameters)
        steps = recipe.epochs * batches
        generator = torch.Generator()
        self.work = Work(model, averaged, self.data, self.budgets, generator, recipe.epochs, steps, self._apply)
        augmentation, specs = parse_augmentation(recipe.augment), self.data.specs
        self.work.weights = balanced_weights(self.data.targets) if recipe.balanced else None
        self.work.augment = lambda inputs: augmentation(inputs, specs, generator)
        self.states = States(folder, fabric.global_rank, fabric.world_size)
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"score": -1.0, "epoch": -1, "weights": {}}
        self.seconds, self.cpu_seconds, self.peak, self.stopped, self.begun = 0.0, 0.0, 0.0, False, False
        self.losses: list[float] = []  # of this epoch, a step each
        self.norms: list[float] = []  # of gradients, an update each
        self._begin()

    def _identity(self, model: Classifier) -> dict[str, Any]:
        """What must be the same for a killed training to go on."""
        sets = {"train": self.data, "validation": self.validation}
        return {
            "recipe": asdict(self.recipe),
            "method": repr(self.method),
            **code_of(self.recipe.method),
            "initial_weights": digest_of_model(model),
            "data": {name: _described(found) for name, found in sets.items() if found is not None},
            "processes": self.fabric.world_size,
            "device": self.fabric.device.type,
            "versions": {
                "robustav": robustav.__version__,
                "torch": torch.__version__,
                "lightning-fabric": version("lightning-fabric"),
                "python": platform.python_version(),
            },
        }

    def _begin(self) -> None:
        """Write the card, or go on where a killed training stopped."""
        path = self.folder / CARD
        if path.exists():
            before = json.loads(path.read_bytes())
            if different := [
                key for key in self.identity if before.get(key) != json.loads(json.dumps(self.identity[key]))
            ]:
                raise ValueError(
                    f"{self.folder} holds a training that began otherwise; they differ in {', '.join(different)}: choose "
                    "another --out"
                )
        self.fabric.barrier()
        if self.fabric.is_global_zero:
            write_atomically(path, _json(self.identity))
        if (state := self.states.last(self.recipe.epochs)) is not None:
            self._resume(state)

    def batches(self) -> Iterator[Batch]:
        """The clips of this epoch, this process's share of them, augmented, on the device."""
        draws = draw_for(self.recipe.seed, "order", str(self.work.epoch))
        order = order_of(self.data.targets, self.recipe.balanced, draws)
        fabric, work = self.fabric, self.work
        for rows in batches_of(order, self.recipe.batch_size, fabric.global_rank, fabric.world_size):
            work.loaded.clear()
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.rate(work.step, work.steps)
            share = self.recipe.share(work.step, work.steps)
            work.budgets = {m: budget.scaled(share) for m, budget in self.budgets.items()}
            work.whole = share == 1
            work.cost.clips += len(rows)
            yield work.batch(rows) if self.method.loads else Batch({}, self.data.targets[rows].to(fabric.device), rows)

    def _apply(self, loss: Tensor, before_step: Callable[[], None] | None) -> None:
        """One update: gradients averaged over processes, clipped, a step, and the running mean follows."""
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on the model's parameters: is its forward pass under torch.no_grad?"
            )
        self._refuse_unless_finite(loss, "loss")
        with torch.autocast(self.fabric.device.type, enabled=False):
            self.optimizer.zero_grad()
            self.fabric.backward(loss)
            average_gradients(self.fabric, self.parameters)
            if before_step is not None:
                before_step()
            norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm or float("inf"))
            self._refuse_unless_finite(norm, "gradient")
            self.norms.append(norm.item())
            self.optimizer.step()
            follow(
                self.work.averaged, self.work.model, min(self.recipe.ema, (1 + self.work.step) / (10 + self.work.step))
            )

    def _refuse_unless_finite(self, value: Tensor, what: str) -> None:
        if not value.isfinite():
            seen = (row for rows in self.work.loaded for row in rows.tolist())
            clips = [self.data.ids[row] for row in dict.fromkeys(seen)]
            more = f" and {len(clips) - SHOWN} more" if len(clips) > SHOWN else ""
            raise ValueError(
                f"the {what} of step {self.work.step + 1} (epoch {self.work.epoch + 1}) is {value.item()}, with the clips "
                f"{', '.join(clips[:SHOWN])}{more}: lower `learning_rate`, set `clip_norm`, or look at those clips"
            )

    def done(self, loss: Tensor) -> None:
        """Count a step."""
        self.losses.append(loss.item())
        self.work.step += 1
        if self.progress and self.fabric.is_global_zero:
            self.progress("training", self.work.step, self.work.steps)

    @contextmanager
    def epoch(self, scalars: Scalars) -> Iterator[None]:
        """Around the steps of one epoch: its own random draws, so that a killed training can repeat it; then its scores."""
        work, fabric = self.work, self.fabric
        purpose = ("epoch", str(work.epoch), str(fabric.global_rank))
        work.generator.manual_seed(draw_for(self.recipe.seed, *purpose).initial_seed())
        self.losses, self.norms = [], []
        work.model.train()
        began, cpu_began = time.perf_counter(), time.process_time()
        if fabric.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(fabric.device)
        # A model's own random numbers are others than the method's. Without the cache, which would keep the weights as
        # they were at the epoch's first step.
        own, half = seeded(self.recipe.seed, "model", *purpose), self.recipe.precision == "bf16"
        with own, torch.autocast(fabric.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            if not self.begun:
                self.method.begin(work)
                self.begun = True
            yield
        average_buffers(fabric, work.model, work.averaged)
        seconds = time.perf_counter() - began
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_began
        self.peak = max(self.peak, peak_memory(fabric.device))
        loss, norm, clips, forwards, backwards = summed(
            self.fabric,
            mean(self.losses),
            mean(self.norms or [0.0]),
            work.cost.clips,
            work.cost.forwards,
            work.cost.backwards,
        )
        line = {"epoch": work.epoch + 1, "step": work.step, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        line |= {"loss": loss / fabric.world_size, "gradient_norm": norm / fabric.world_size}
        line |= {"clips": int(clips), "forwards": int(forwards), "backwards": int(backwards), "seconds": seconds}
        line |= self._validated()
        line |= {
            key: value.item() for key, value in work.memory.items() if value.ndim == 0 and value.is_floating_point()
        }
        self.history.append(line)
        work.epoch += 1
        self._judge(line)
        self._save()
        if fabric.is_global_zero:
            write_atomically(self.folder / LOG, log_lines(self.history))
            scalars(line)

    def _judge(self, line: Mapping[str, float]) -> None:
        """Remember the best weights; stop where nothing gets better, or where the method has enough."""
        recipe = self.recipe
        last = self.work.epoch == recipe.epochs
        counts = self.validation is not None and (self.method.settled(self.work) or last)
        if counts and line[self.score] > self.best["score"]:
            weights = _copied(self.work.averaged) if recipe.keep == "best" else {}
            self.best = {"score": line[self.score], "epoch": self.work.epoch, "weights": weights}
        since = self.work.epoch - self.best["epoch"] if self.best["epoch"] >= 0 else 0
        out_of_patience = 0 < recipe.patience <= since
        (enough,) = summed(self.fabric, self.method.finished(self.work))
        self.stopped = out_of_patience or enough > 0

    def _validated(self) -> dict[str, float]:
        """Scores of the averaged weights, each process on its share of the clips."""
        if self.validation is None:
            return {}
        fabric, targets = self.fabric, self.validation.targets
        logits = torch.zeros(len(targets), targets.shape[1], device=fabric.device)
        mine = torch.arange(len(targets))[fabric.global_rank :: fabric.world_size]
        with torch.no_grad(), seeded(self.recipe.seed, "validation"):
            for rows in mine.split(VALIDATED):
                inputs = {m: x.to(fabric.device) for m, x in self.validation.inputs(rows).items()}
                logits[rows.to(fabric.device)] = self.work.averaged(inputs).float()
        fabric.all_reduce(logits, reduce_op="sum")
        return scores_of(logits.cpu(), targets, self.work.model.label_kind)

    def _save(self) -> None:
        """Everything that the next epoch depends on; then the state before is of no use."""
        work = self.work
        state = {
            "model": work.model.state_dict(),
            "averaged": work.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": work.memory,
            "cost": asdict(work.cost),
            "epoch": work.epoch,
            "step": work.step,
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak": self.peak,
            "stopped": self.stopped,
        }
        self.states.save(work.epoch, state)
        self.fabric.barrier()
        self.states.forget(work.epoch)

    def _resume(self, state: dict[str, Any]) -> None:
        work = self.work
        work.model.load_state_dict(state["model"])
        work.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        work.memory, work.cost = state["memory"], Cost(**state["cost"])
        work.epoch, work.step, self.history, self.best = state["epoch"], state["step"], state["history"], state["best"]
        self.seconds, self.cpu_seconds, self.peak = state["seconds"], state["cpu_seconds"], state["peak"]
        self.stopped, self.begun = state["stopped"], True

    def finish(self) -> Trained:
        """Write weights and card, and remove what only a killed training needs."""
        peak, cpu_seconds = summed(self.fabric, self.peak, self.cpu_seconds)
        if self.fabric.is_global_zero:
            best = self.recipe.keep == "best"
            write_atomically(self.folder / WEIGHTS, save(self.best["weights"] if best else _copied(self.work.averaged)))
            write_atomically(self.folder / CARD, _json({**self.identity, **self._card(peak, cpu_seconds)}))
        self.fabric.barrier()
        self.states.forget(self.work.epochs + 1)
        return Trained(self.folder, read_trained(self.folder))

    def _card(self, peak: float, cpu_seconds: float) -> dict[str, Any]:
        """What there is to say of a finished training beside its identity."""
        work, recipe, last = self.work, self.recipe, self.history[-1]
        epoch = self.best["epoch"] if recipe.keep == "best" else work.epoch
        kept = f"best by {self.score}" if recipe.keep == "best" else "last"
        cost = Cost(*(int(last[name]) for name in ("clips", "forwards", "backwards")))
        names = DECLARED[work.model.label_kind] if self.validation else ()
        return {
            "sha256": digest_of_file(self.folder / WEIGHTS),
            "weights": f"{kept}, epoch {epoch} of {recipe.epochs}"
            + (f", running mean of decay {recipe.ema:g}" if recipe.ema else ""),
            "parameters": sum(p.numel() for p in work.model.parameters()),
            "label_kind": work.model.label_kind,
            "budgets": {m: budget.words(work.model.specs[m].unit) for m, budget in self.budgets.items()}
            if self.method.budgeted
            else {},
            "scores": {name: self.history[epoch - 1][name] for name in names},
            "cost": {
                **asdict(cost),
                "forwards_a_clip": cost.forwards_a_clip,
                "backwards_a_clip": cost.backwards_a_clip,
                "seconds": round(self.seconds, 2),  # without validation and saving
                "cpu_seconds": round(cpu_seconds, 2),  # of all threads of all processes
                "peak_memory_mib": round(peak),
                "peak_memory_of": "tensors on the GPU"
                if self.fabric.device.type == "cuda"
                else "the process, with its data",
            },
        }


def follow(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running mean of weights and of batch norms' statistics towards the model; decay 0 copies it."""
    pairs = zip([*averaged.parameters(), *averaged.buffers()], [*model.parameters(), *model.buffers()], strict=True)
    with torch.no_grad():
        for mean_of, now in pairs:
            if now.is_floating_point():
                mean_of.lerp_(now, 1 - decay)
            else:
                mean_of.copy_(now)


def peak_memory(device: torch.device) -> float:
    """MiB of tensors on a GPU since its statistics were reset; elsewhere the largest that this process has been."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not there on Windows

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (2**20 if sys.platform == "darwin" else 2**10)


def _optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Biases, gains and other vectors are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.learning_rate, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, recipe.learning_rate)


def _described(data: TrainingSet) -> dict[str, Any]:
    """What a card says of clips."""
    skipped = getattr(data, "skipped", {})
    shown: dict[str, Any] = {"skipped": len(skipped), "reasons": dict(list(skipped.items())[:SHOWN])} if skipped else {}
    if unknown := getattr(data, "unknown_labels", {}):
        shown["unknown_labels"] = unknown
    return {"name": data.name, "sha256": data.digest, "clips": len(data.targets), **shown}


def _copied(model: nn.Module) -> dict[str, Tensor]:
    """Its weights as safetensors takes them: on the CPU, no two in one memory."""
    return {name: x.detach().cpu().clone().contiguous() for name, x in model.state_dict().items()}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
