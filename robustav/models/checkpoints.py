"""Weights from files, never trusting a pickle that nobody vouched for."""

import argparse
import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state")  # entries that hold what is looked for
PREFIXES = ("module.", "_orig_mod.")


def read_checkpoint(path: Path | str, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """A state dict from safetensors or a torch file; a wrapping `model`, `state_dict` or `module.` is taken off.

    Torch files are read with `weights_only=True`, which runs no code. Beside tensors they may hold what training scripts
    put there: numbers, texts, and an `argparse.Namespace` of settings (Audio-MAE's do). One that holds more is refused
    with `ValueError`, unless `trust_pickle` says that its origin is trusted: unpickling runs whatever code it contains.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} is not a file")
    with path.open("rb") as file:
        begins = file.read(8)
    if not begins:
        raise ValueError(f"checkpoint {str(path)!r} is empty")
    if path.suffix != ".safetensors" and not begins.startswith((b"PK", b"\x80")):
        raise ValueError(f"checkpoint {str(path)!r} is no torch file: it begins with {begins!r}")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else _unpickled(path, trust_pickle)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {str(path)!r} holds more than tensors, and loading it could run code: save its state_dict() alone, or pass "
            "--trust-pickle if you trust where it comes from"
        ) from error
    except Exception as error:  # a broken file makes a reader stumble anywhere
        kind = "safetensors" if path.suffix == ".safetensors" else "a torch file"
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read as {kind}: {type(error).__name__}: {error}"
        ) from error
    state = unwrapped(state)
    if not _is_state(state):
        entries = ", ".join(map(str, list(state)[:8])) if isinstance(state, Mapping) else ""
        raise ValueError(
            f"checkpoint {str(path)!r} holds no state dict: expected a mapping from names to tensors, got a "
            f"{type(state).__name__}" + (f" with the entries {entries}" if entries else "")
        )
    bare = {bare_name(name): tensor for name, tensor in state.items()}
    if len(bare) < len(state):
        raise ValueError(
            f"checkpoint {str(path)!r} has names twice, with a wrapper such as 'module.' before them and without"
        )
    return bare


def unwrapped(state: Any) -> Any:
    """What training scripts put around a state dict taken off: a module, or a mapping with one entry that is a state dict."""
    while not _is_state(state):
        if isinstance(state, nn.Module):
            state = state.state_dict()
        elif isinstance(state, Mapping):
            usual = [state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping | nn.Module)]
            inner = usual or [value for value in state.values() if _is_state(value)]
            if len(inner) == 0 or (len(inner) > 1 and not usual):
                return state
            state = inner[0]
        else:
            return state
    return state


def _is_state(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and len(found) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items())
    )


def bare_name(name: str) -> str:
    """Without what data-parallel and compiled wrappers put before it."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


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
    for name, tensor in state.items():
        if tensor.is_complex():
            raise ValueError(f"{source} does not fit the model: {name} holds complex numbers")
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{source} has values in {name} that are not finite: it was saved from a training that failed"
            )
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()})


def convert(source: Path | str, target: Path | str, *, trust_pickle: bool = False) -> dict[str, str]:
    """Write a checkpoint's tensors, and nothing else of it, as safetensors; returns the sha256 of both files.

    Names come without wrappings, dtypes as they are; tensors that shared memory no longer do.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"the converted file must end in .safetensors, got {target.name!r}")
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {str(target.parent)!r}: make it first")
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
