"""Weights from files, never trusting a pickle that nobody vouched for."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read_checkpoint(path: Path | str, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """A state dict from safetensors or a torch file; a wrapping `model`, `state_dict` or `module.` is taken off.

    Torch files are read with `weights_only=True`. One that holds more than tensors is refused with `ValueError`, unless
    `trust_pickle` says that its origin is trusted: unpickling runs whatever code the file contains.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} is not a file")
    try:
        state: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=not trust_pickle)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {str(path)!r} holds more than tensors or is no torch file, and loading it could run code: convert it to "
            "safetensors, or pass --trust-pickle if you trust where it comes from"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {error}") from error
    while isinstance(state, Mapping):
        inner = next((state[key] for key in ("state_dict", "model") if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    if not isinstance(state, Mapping) or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"checkpoint {str(path)!r} holds no state dict: expected a mapping from names to tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor, or raise `ValueError` with the first differences in keys and shapes."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{name}: {list(state[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if missing or extra or shapes:
        lines = [
            f"{what} ({len(names)}): {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("not in the model", extra), ("other shape", sorted(shapes)))
            if names
        ]
        raise ValueError(f"{source} does not fit the model: " + "; ".join(lines))
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})


def digest_of_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_card(path: Path) -> dict[str, Any]:
    """The card beside a weight file; raises `ValueError` if it belongs to other weights."""
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    digest = digest_of_file(path)
    if card["sha256"] != digest:
        raise ValueError(
            f"{path.name} is not the file that its card describes (sha256 {digest[:12]}, card {card['sha256'][:12]}): "
            "install robustav again"
        )
    return card
