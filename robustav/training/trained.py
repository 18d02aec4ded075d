"""What a training leaves in its folder: weights, and the card that says how they were made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robustav.classifier import Classifier
from robustav.models.checkpoints import digest_of_file, load_into, read_checkpoint
from robustav.models.zoo import build_model, load_model
from robustav.randomness import seeded
from robustav.training.method import Method
from robustav.training.methods import code_of, parse_method
from robustav.training.recipe import Recipe
from robustav.training.states import forget_all

WEIGHTS, CARD = "model.safetensors", "card.json"


@dataclass(frozen=True)
class Trained:
    """A finished training: its folder, and the card that says how it was made, what it scores and what it cost."""

    folder: Path
    card: Mapping[str, Any]

    @property
    def scores(self) -> dict[str, float]:
        """Of the weights kept, on the validation clips; empty without any."""
        return self.card["scores"]

    @property
    def cost(self) -> dict[str, Any]:
        """Passes, seconds and memory that the training took."""
        return self.card["cost"]

    def model(self) -> Classifier:
        """The trained model, in eval mode."""
        return load_trained(self.folder)


def load_trained(folder: Path | str) -> Classifier:
    """The model that `train` left in a folder, in eval mode, wrapped as its method wraps it."""
    card = read_trained(folder)
    recipe = replace(Recipe(**card["recipe"]), checkpoint=None)  # that file is not needed any more
    model = initial(recipe, parse_method(recipe.method))
    path = Path(folder) / WEIGHTS
    load_into(model, read_checkpoint(path), str(path))
    return model.eval()


def read_trained(folder: Path | str) -> dict[str, Any]:
    """The card of a finished training; raises `ValueError` if there is none, or if it belongs to other weights."""
    path = Path(folder) / CARD
    if not path.is_file():
        raise ValueError(f"{folder} holds no trained model: give the folder that `robustav train` wrote")
    card = _card_at(path)
    if "sha256" not in card:
        raise ValueError(f"the training in {folder} is not finished: the command that began it goes on where it was")
    if not path.with_name(WEIGHTS).is_file():
        raise ValueError(f"{path.with_name(WEIGHTS)} is missing: train again, in a new folder")
    if digest_of_file(path.with_name(WEIGHTS)) != card["sha256"]:
        raise ValueError(f"{path.with_name(WEIGHTS)} is not the file that its card describes: train again")
    return card


def _card_at(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): train again, in a new folder") from error
    if not isinstance(card, dict) or not isinstance(card.get("recipe"), dict):
        raise ValueError(f"{path} is not the card of a training: give the folder that `robustav train` wrote")
    return card


def finished(recipe: Recipe, folder: Path) -> Trained | None:
    """What a finished folder holds, None if there is something to do; raises `ValueError` for a folder of another recipe."""
    path = folder / CARD
    if not path.is_file():
        if folder.exists() and not (folder.is_dir() and all(file.name.startswith(".") for file in folder.iterdir())):
            what = "holds other files" if folder.is_dir() else "is a file"
            raise ValueError(f"{folder} {what}: choose another --out, a new or an empty folder")
        return None
    before = _card_at(path)
    if different := recipe.differences(before["recipe"]):
        raise ValueError(
            f"{folder} holds another training; they differ in {', '.join(different)}: choose another --out"
        )
    if any(before.get(key) != digest for key, digest in code_of(recipe.method).items()):
        raise ValueError(
            f"{folder} holds a training by {recipe.method} as its file was before it changed: choose another --out"
        )
    if "sha256" not in before:
        return None
    forget_all(folder)
    return Trained(folder, read_trained(folder))


def initial(recipe: Recipe, method: Method) -> Classifier:
    """The model before its first step; the seed decides its weights, and no global generator moves."""
    with seeded(recipe.seed, "weights"):
        model = load_model(recipe.model, recipe.checkpoint)[0] if recipe.checkpoint else build_model(recipe.model)
        return method.wrapped(model)
