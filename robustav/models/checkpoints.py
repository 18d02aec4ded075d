"""Weights from files, never trusting a pickle that nobody vouched for."""

import argparse
import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def read_checkpoint(path: Path | str, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """A state dict from safetensors or a torch file; a wrapping `model`, `state_dict` or `module.` is taken off.

    Torch files are read with `weights_only=True`, which runs no code. Beside tensors they may hold what training scripts
    put there: numbers, texts, and an `argparse.Namespace` of settings (Audio-MAE's do). One that holds more is refused
    with `ValueError`, unless `trust_pickle` says that its origin is trusted: unpickling runs whatever code it contains.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} is not a file")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(path, trust_pickle)
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


def _unpickled(path: Path, trusted: bool) -> Any:
    torch.serialization.add_safe_globals([argparse.Namespace])  # holds attributes and runs nothing
    return torch.load(path, map_location="cpu", weights_only=not trusted)


class Differences(NamedTuple):
    """Of a model's names and shapes from a checkpoint's."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    shapes: tuple[str, ...]  # in words

    @property
    def total(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.shapes)

    def __str__(self) -> str:
        """The first of each kind."""
        return "; ".join(
            f"{what} ({len(names)}): {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in zip(("missing", "not in the model", "other shape"), self, strict=True)
            if names
        )


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Differences:
    """What stands between a model's tensors and a checkpoint's."""
    shapes = (
        f"{name}: {list(state[name].shape)} in the file, {list(own[name].shape)} in the model"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    )
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    return Differences(tuple(sorted(missing)), tuple(sorted(extra)), tuple(sorted(shapes)))


def load_into(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor, or raise `ValueError` with the first differences in keys and shapes."""
    own = model.state_dict()
    differs = differences(own, state)
    if differs.total:
        raise ValueError(f"{source} does not fit the model: {differs}")
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})


def convert(source: Path | str, target: Path | str, *, trust_pickle: bool = False) -> dict[str, str]:
    """Write a checkpoint's tensors, and nothing else of it, as safetensors; returns the sha256 of both files.

    Names come without wrappings, dtypes as they are; tensors that shared memory no longer do.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"the converted file must end in .safetensors, got {target.name!r}")
    if target.exists():
        raise ValueError(f"{target} exists: name another file, or remove it")
    state = read_checkpoint(source, trust_pickle=trust_pickle)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, target)
    return {str(source): digest_of_file(source), str(target): digest_of_file(target)}


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
