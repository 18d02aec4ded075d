"""What a training costs beside a plain loop: every method that the study compares, and PGD training by torchattacks.

`python benchmarks/training.py --write` measures (about a quarter of an hour on two idle cores; torchattacks must be installed for
its row) and writes its section of docs/benchmarks.md; `--quick` is a smoke run.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

# Threads that wait must sleep, or whatever else runs on the machine decides the ratios; read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"

import torch
from timing import Spread, machine, ratio, write_section
from torch import Tensor

from robustav.losses import bce
from robustav.models.zoo import build_model
from robustav.training.data import batches_of, training_set
from robustav.training.loop import train
from robustav.training.recipe import Recipe

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CPU = torch.device("cpu")
MODELS = ("audio-cnn", "visual-cnn", "av-fusion")
METHODS = ("erm", "mixup", "guided-mixup", "remembered", "guided-remembered", "n-fgsm", "pgd-at(steps=3)")
PEER = "PGD-AT(3) by torchattacks"
EPSILONS = {"audio": 0.0025, "visual": 0.004}

ABOUT = """
## Training: ours, torchattacks, and the floor

`python benchmarks/training.py --write`. {machine}. CPU time over the floor's.

{epochs} epochs over {clips} scenes of av-events in batches of 32, without validation, saving and reading the data;
{rounds} rounds.

- The **floor** is a loop by hand: batches of tensors, forward, backward to the weights, AdamW. No augmentation, no running
  mean of the weights, no checks; convolutions lie as torch makes them (ours are channels-last).
- **Ours** are whole steps of `robustav train`: augmentation (`light`), checks for losses and gradients that are not finite,
  the running mean; of guided mix-up the looks too, one in {epochs} epochs, on all scenes.
- **{peer}** is the floor's loop with `torchattacks.PGD` before each step, for a model of one modality whose range is
  made [0, 1], as it wants; cross-entropy is wired in, so a class stands as two columns (0, z).
"""


def floor(model_name: str, clips: int, epochs: int, craft: Callable[..., Tensor] | None = None) -> float:
    """CPU seconds of a plain loop."""
    model = build_model(model_name)
    data = training_set("av-events/train", model, limit=clips)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.05)
    batches = [(data.inputs(rows), data.targets[rows]) for rows in batches_of(torch.arange(clips), 32)]
    model.train()
    began = time.process_time()
    for _ in range(epochs):
        for inputs, targets in batches:
            if craft is not None:
                inputs = craft(model, inputs, targets)
            optimizer.zero_grad()
            bce(model(inputs), targets).mean().backward()
            optimizer.step()
    return time.process_time() - began


def by_torchattacks(model: torch.nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Points of its PGD, three steps."""
    import torchattacks

    ((modality, x),) = inputs.items()
    low, span = (-1.0, 2.0) if modality == "audio" else (0.0, 1.0)
    classes = targets.shape[1]

    class Columns(torch.nn.Module):
        def forward(self, scaled: Tensor) -> Tensor:
            clip = scaled.reshape(len(scaled), *x.shape[1:]) * span + low
            logits = model({modality: clip})
            return torch.stack([torch.zeros_like(logits), logits], dim=1)

    wrapped = Columns()
    wrapped.train(model.training)
    wrapped.add_module("model", model)
    epsilon = EPSILONS[modality] / span
    attack = torchattacks.PGD(wrapped, eps=epsilon, alpha=2.5 * epsilon / 3, steps=3, random_start=True)
    found = attack((x - low) / span, targets.long().reshape(len(x), classes))
    return {modality: found * span + low}


def ours(model: str, method: str, clips: int, epochs: int) -> float:
    """CPU seconds of a training's steps."""
    specs = build_model(model).specs
    eps = ",".join(f"{m}={EPSILONS[m]}" for m in specs)
    with tempfile.TemporaryDirectory() as folder:
        trained = train(
            Recipe(model=model, method=method, limit=clips, epochs=epochs, eps=eps, learning_rate=5e-3),
            Path(folder) / "out",
            device="cpu",
        )
        return float(trained.cost["cpu_seconds"])


def lines(header: list[str], rows: dict[str, list[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *([name, *row] for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few clips, one round, nothing written")
    parser.add_argument("--write", action="store_true", help=f"write the section of docs/{PAGE.name}")
    options = parser.parse_args()
    rounds, clips, epochs = (1, 64, 2) if options.quick else (options.rounds, 320, 4)
    table: dict[str, list[str]] = {name: [] for name in (*METHODS, PEER)}
    for model in MODELS:
        one = len(build_model(model).specs) == 1
        contestants: dict[str, Callable[[], float]] = {"floor": partial(floor, model, clips, epochs)}
        contestants |= {name: partial(ours, model, name, clips, epochs) for name in METHODS}
        if one and find_spec("torchattacks"):
            contestants[PEER] = partial(floor, model, clips, epochs, by_torchattacks)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        order, shuffler = list(contestants), random.Random(0)
        for _ in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                seconds[name].append(contestants[name]())
        for name, row in table.items():
            found: Spread | str = ratio(seconds[name], seconds["floor"]) if name in seconds else ""
            row.append(str(found))
        print(model, {name: f"{sorted(s)[rounds // 2]:.1f} s" for name, s in seconds.items()}, flush=True)
    about = ABOUT.format(machine=machine(CPU), epochs=epochs, clips=clips, rounds=rounds, peer=PEER)
    text = f"{about.strip()}\n\n{lines(['', *MODELS], table)}\n"
    print(text)
    if options.write and not options.quick:
        write_section(PAGE, "training", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
