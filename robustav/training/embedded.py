"""How the weights that ship with the package were made: `python -m robustav.training.embedded [NAME ...]`.

Plain training on av-events, two to five minutes a model on two cores. Writes the weights and a card beside each.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from robustav.classifier import Classifier, Inputs
from robustav.data.av_events import AvEvents
from robustav.losses import bce
from robustav.metrics.intervals import bootstrap, bootstrap_weights, centred_interval, wilson
from robustav.metrics.tagging import mean_average_precision, top1_hit
from robustav.models.checkpoints import digest_of_file
from robustav.models.entry import WEIGHTS
from robustav.models.zoo import EMBEDDED
from robustav.training.data import Scenes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, beside data and code."""

    seed: int = 0
    epochs: int = 14
    batch_size: int = 32
    peak_learning_rate: float = 3e-3  # AdamW, one-cycle
    weight_decay: float = 0.05
    gain_db: float = 6.0  # audio louder or softer by up to this
    shift: int = 2  # pixels by which pictures are shifted at most


def moved(inputs: Inputs, recipe: Recipe, generator: torch.Generator) -> Inputs:
    """Each clip shifted in time, made louder or softer, and its picture shifted, all at random: labels stay true."""
    out = {}
    for modality, x in inputs.items():
        if modality == "audio":
            gain = 10 ** ((2 * torch.rand(len(x), 1, generator=generator) - 1) * recipe.gain_db / 20)
            shift = torch.randint(x.shape[1], (len(x),), generator=generator)
            rolled = torch.stack([clip.roll(int(s)) for clip, s in zip(x, shift, strict=True)])
            out[modality] = (gain * rolled).clamp(-1, 1)
        else:
            shift = torch.randint(-recipe.shift, recipe.shift + 1, (len(x), 2), generator=generator)
            out[modality] = torch.stack([clip.roll(s.tolist(), (-2, -1)) for clip, s in zip(x, shift, strict=True)])
    return out


def train(model: Classifier, recipe: Recipe) -> Classifier:
    """Minimise BCE; the model's initial weights and the order of batches follow from the recipe's seed."""
    scenes = Scenes(AvEvents("train"), model.specs)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay)
    steps = recipe.epochs * -(-len(scenes.ids) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak_learning_rate, total_steps=steps)
    for epoch in range(recipe.epochs):
        model.train()
        total = 0.0
        for rows in torch.randperm(len(scenes.ids), generator=generator).split(recipe.batch_size):
            inputs = moved(scenes.inputs(rows), recipe, generator)
            loss = bce(model(inputs), scenes.targets[rows]).mean()
            if not loss.isfinite():
                raise FloatingPointError(f"the loss is not finite in epoch {epoch}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        log.info("epoch %d of %d: loss %.4f", epoch + 1, recipe.epochs, total / len(scenes.ids))
    return model.eval()


def scores(model: Classifier, scenes: Scenes) -> np.ndarray:
    """Logits over a split, [sample, class]."""
    with torch.no_grad():
        return torch.cat([model(scenes.inputs(rows)) for rows in torch.arange(len(scenes.ids)).split(32)]).numpy()


def untrained(name: str) -> Classifier:
    """An embedded network with random weights."""
    model = EMBEDDED[name].build()
    assert isinstance(model, Classifier)
    return model


def make(name: str, recipe: Recipe, folder: Path) -> None:
    """Train one embedded model; write its weights and its card."""
    torch.manual_seed(recipe.seed)  # initial weights and dropout: a training script may own the global generator
    model = train(untrained(name), recipe)
    test = Scenes(AvEvents("test"), model.specs)
    exact = scores(model, test)
    state = {key: x.clone() for key, x in model.state_dict().items()}
    half = {key: x.half() if x.is_floating_point() else x for key, x in state.items()}
    model.load_state_dict(half)
    logits, labels = scores(model, test), test.targets.numpy()
    # Half precision only where it changes no decision on the whole test split.
    halved = bool(((logits >= 0) == (exact >= 0)).all() and (logits.argmax(1) == exact.argmax(1)).all())
    if halved:
        state = half
    else:
        logits = exact
    path = folder / f"{name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    path.chmod(0o644)
    precision = mean_average_precision(logits, labels)
    resampled = bootstrap(logits, labels, bootstrap_weights(len(labels), 1000, seed=0))
    hits = int(top1_hit(logits, labels).sum())
    card = {
        "model": name,
        "summary": EMBEDDED[name].summary,
        "sha256": digest_of_file(path),
        "parameters": sum(p.numel() for p in model.parameters()),
        "recipe": asdict(recipe)
        | {"loss": "BCE", "optimizer": "AdamW, one-cycle", "made_by": "python -m robustav.training.embedded"},
        "data": {
            "train": {"name": "av-events/train", "sha256": AvEvents("train").digest},
            "test": {"name": "av-events/test", "sha256": test.digest, "clips": len(labels)},
        },
        "clean": {
            "mAP": round(precision, 4),
            "mAP_95": [round(float(end), 4) for end in centred_interval(precision, resampled.map)],
            "top1_hit": round(hits / len(labels), 4),
            "top1_hit_95": [round(float(end), 4) for end in wilson(hits, len(labels))],
        },
        "precision": "float16, which changes none of its decisions on the test split" if halved else "float32",
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "limits": "Undefended and synthetic: for running and testing the pipeline, not for any real recording.",
    }
    path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    log.info("%s: %s", name, card["clean"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for model_name in sys.argv[1:] or EMBEDDED:
        make(model_name, Recipe(), WEIGHTS)
