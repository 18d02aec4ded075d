"""Numbers computed with the official code of published models, and the recipe of their weights."""

import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from robustav.models.checkpoints import load_into
from robustav.models.entry import Published, Task


@dataclass(frozen=True)
class Numbers:
    """A fixture: official state dict (where stored), inputs, outputs and gradients, by name without prefix."""

    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        return self.about["config"]

    @property
    def tolerance(self) -> float:
        return self.about["tolerance"]

    @property
    def state(self) -> dict[str, Tensor]:
        return self.under("state.")

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def close(self, ours: Tensor, key: str) -> None:
        """`ours` is the official number to its stated tolerance."""
        theirs = self.tensors[key]
        assert ours.shape == theirs.shape, f"{key}: {list(ours.shape)}, not {list(theirs.shape)}"
        difference = (ours - theirs).abs().max().item()
        assert difference <= self.tolerance, f"{key}: off by {difference:.3g}, {self.tolerance:g} allowed"


def numbers(shared: Path, name: str) -> Numbers:
    folder = shared / "reference" / "fixtures"
    about = json.loads((folder / "index.json").read_text())["fixtures"][name]
    return Numbers(about, load_file(folder / about["file"]))


def published_shapes(shared: Path, name: str) -> dict[str, list[int]]:
    """Key -> shape of an official state dict at its published size, aliases left out."""
    row = json.loads((shared / "reference" / "fixtures" / "published_state_shapes.json").read_text())[name]
    twins = re.compile(r"(^|\.)conv\d+\.(conv|bn)\.") if "aliases" in row else None
    return {key: shape for key, shape in row["keys"].items() if twins is None or not twins.search(key)}


def drawn(key: str, shape: tuple[int, ...], seed: int = 0, conv_gain: float = 1.0) -> Tensor:
    """One tensor of an official state dict, as the fixtures' recipe makes it."""
    last = key.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    n = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(shape)
    if last in ("running_var", "tau"):
        n = np.exp(0.2 * n)
    elif last == "running_mean":
        n = 0.1 * n
    elif last == "head_weight":
        n = 1 / shape[0] + 0.05 * n
    elif len(shape) <= 1:
        n = 1 + 0.1 * n if last.startswith("weight") else 0.1 * n
    elif len(shape) == 3 and shape[0] == 1:
        n = 0.2 * n
    else:
        n = n / np.sqrt(np.prod(shape[1:])) * (conv_gain if len(shape) == 4 else 1)
    return torch.from_numpy(np.asarray(n, dtype=np.float32))


def fill(model: nn.Module, *, seed: int = 0, conv_gain: float = 1.0, keep: tuple[str, ...] = ()) -> nn.Module:
    """The model with the recipe's weights, but for the tensors in `keep`."""
    own = model.state_dict()
    load_into(
        model,
        {k: v if k in keep else drawn(k, tuple(v.shape), seed, conv_gain) for k, v in own.items()},
        "recipe",
    )
    return model.eval()


def drawn_input(name: str, shape: tuple[int, ...], *, uniform: bool = False) -> Tensor:
    random = np.random.RandomState(zlib.crc32(f"0:input:{name}".encode()))
    return torch.from_numpy(
        np.asarray(random.uniform(0, 1, shape) if uniform else random.standard_normal(shape), dtype=np.float32)
    )


def loaded(model: Published, state: dict[str, Tensor]) -> Published:
    """The model with an official state dict, every tensor of it used."""
    load_into(model, model.adapted(state), "fixture")
    return model.eval()


def task_of(classes: int = 20, **more: Any) -> Task:
    return Task(classes=tuple(f"class {i}" for i in range(classes)), **more)
