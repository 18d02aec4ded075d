import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import tiny_fusion
from safetensors.torch import load_file
from training_tools import TinyClips
from typer.testing import CliRunner

from robustav.cli.main import app
from robustav.cli.train import train as command
from robustav.training import loop
from robustav.training.methods import METHODS
from robustav.training.recipe import Recipe

SHORT = ["--epochs", "2", "--batch-size", "6", "--augment", "none"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        loop, "training_set", lambda source, model, **_: TinyClips(24 if source.endswith("train") else 11)
    )
    monkeypatch.setattr("robustav.training.trained.build_model", lambda name: tiny_fusion())


def run(*arguments: str):
    return CliRunner().invoke(app, ["train", *arguments])


def test_options_are_the_recipe_and_have_its_defaults() -> None:
    options = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    for field in fields(Recipe):
        assert options[field.name] == field.default, field.name
    others = {"out", "list_", "device", "devices", "tensorboard", "json"}
    assert options.keys() - {field.name for field in fields(Recipe)} == others


def test_a_training_prints_scores_cost_and_how_to_attack_it(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(*SHORT, "--method", "pgd-at(steps=2)", "--out", str(out))
    assert first.exit_code == 0, first.output
    card = json.loads((out / "card.json").read_text())
    assert card["recipe"]["method"] == "pgd-at(steps=2)" and card["recipe"]["epochs"] == 2
    words = " ".join(first.output.split())
    assert f"validation mAP {card['scores']['mAP']:.3f}, top1 {card['scores']['top1']:.3f}" in words
    passes = f"{card['cost']['forwards_a_clip']:.2f} forward and {card['cost']['backwards_a_clip']:.2f} backward passes"
    assert passes in words and card["cost"]["forwards_a_clip"] > 2 and "48 clips" in words
    assert f"robustav attack --model trained:{out}" in first.output
    again = run(*SHORT, "--method", "pgd-at(steps=2)", "--out", str(out), "--json")
    assert json.loads(again.output) == card


def test_a_training_says_which_clips_and_labels_it_left_out(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = TinyClips(24)
    clips.skipped, clips.unknown_labels = {"clip 30": "its file is empty", "clip 31": "torn"}, {"tap": 2, "hum": 1}
    monkeypatch.setattr(loop, "training_set", lambda source, model, **_: clips)
    words = " ".join(run(*SHORT, "--out", str(tmp_path / "out")).output.split())
    assert "2 clips of tiny cannot be used and are left out, such as clip 30 (its file is empty)." in words
    assert "Label 'tap' (2 clips) is no class of the model and was ignored." in words
    assert "Label 'hum' (1 clip) is no class of the model and was ignored." in words


def test_every_option_reaches_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(recipe: Recipe, *_: object, **settings: object) -> None:
        seen.append((recipe, settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", stop)
    changed = {
        "model": "audio-cnn",
        "method": "mixup",
        "data": "my.csv",
        "validation": "other.csv",
        "checkpoint": "w.safetensors",
        "eps": "4/255",
        "norm": "l2",
        "ramp": 0.375,
        "attacked": "audio",
        "epochs": 3,
        "batch_size": 5,
        "optimizer": "sgd",
        "learning_rate": 0.5,
        "weight_decay": 0.25,
        "momentum": 0.75,
        "warmup": 0.125,
        "cosine": False,
        "ema": 0.5,
        "clip_norm": 2.0,
        "augment": "full",
        "balanced": True,
        "limit": 7,
        "seed": 9,
        "precision": "bf16",
        "score": "top1",
        "patience": 4,
        "keep": "best",
    }
    arguments = ["--no-cosine", "--balanced"]
    for name, value in changed.items():
        if not isinstance(value, bool):
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    stopped = run(*arguments, "--out", str(tmp_path / "out"), "--device", "cpu", "--devices", "2", "--tensorboard")
    assert stopped.exit_code == 130
    (recipe, settings) = seen[0]
    assert recipe == Recipe(**changed) and set(changed) == {field.name for field in fields(Recipe)}
    assert settings["device"] == "cpu" and settings["devices"] == 2 and settings["tensorboard"] is True


def test_methods_are_listed_with_their_settings() -> None:
    listed = run("--list").output
    assert all(name in listed for name in METHODS)
    rows = json.loads(run("--list", "--json").output)
    assert [row["method"] for row in rows] == list(METHODS)
    assert next(row for row in rows if row["method"] == "mixup")["settings"].startswith("alpha=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "magic"], "no method 'magic': there are erm, "),
        (["--method", "mixup(alhpa=1)"], "mixup has no setting 'alhpa'; it has alpha="),
        (["--patience", "2", "--data", "mine.csv"], "`patience` needs a score on clips not trained on"),
        (["--model", "av-fussion"], "no model 'av-fussion'"),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        CliRunner().invoke(app, ["train", *arguments, "--out", str(tmp_path / "out")], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_named_after_everything_that_decides_the_weights(tiny: None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for method in ("pgd-at(steps=2)", "erm"):
        made = run(*SHORT, "--method", method)
        assert made.exit_code == 0, made.output
    first, second = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert first.startswith("av-fusion-erm-") and second.startswith("av-fusion-pgd-at_steps_2-")
    run(*SHORT, "--method", "erm", "--seed", "1")
    assert len(list((tmp_path / "runs").iterdir())) == 3


PROCESSES = """
import os
import sys
from pathlib import Path

from conftest import Linear, tiny_fusion, tiny_specs
from safetensors.torch import load_file
from training_tools import TinyClips

from robustav.training import loop, trained
from robustav.training.method import Method
from robustav.training.methods import METHODS
from robustav.training.recipe import Recipe


class Stopping(Method):
    at = -1

    def begin_epoch(self, work):
        if work.epoch == self.at:
            raise KeyboardInterrupt


def train(model, folder, method, augment):
    trained.build_model = lambda name: model()
    recipe = Recipe(method=method, epochs=2, batch_size=6, augment=augment, learning_rate=0.02, ema=0.5)
    loop.train(recipe, Path(sys.argv[1]) / folder)


def clips(source, model, **_):
    return TinyClips(24 if source.endswith("train") else 11, specs=model.specs, classes=model.classes)


loop.training_set, METHODS["stopping"] = clips, Stopping
train(lambda: Linear(tiny_specs(), 3), "linear-" + os.environ.get("WORLD_SIZE", "1"), "erm", "none")
if "WORLD_SIZE" in os.environ:
    train(tiny_fusion, "whole", "stopping", "full")
    Stopping.at = 1
    try:
        train(tiny_fusion, "killed", "stopping", "full")
    except KeyboardInterrupt:
        Stopping.at = -1
        train(tiny_fusion, "killed", "stopping", "full")
"""


def test_processes_train_what_one_process_trains(tmp_path: Path) -> None:
    """Two processes of torchrun: gradients are averaged, and what was killed ends with the same bytes."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    for start in ([sys.executable], torchrun):
        done = subprocess.run([*start, str(script), str(tmp_path)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    alone, shared = (load_file(tmp_path / f"linear-{n}/model.safetensors") for n in (1, 2))
    for name, weights in alone.items():
        torch.testing.assert_close(shared[name], weights)
    cards = [json.loads((tmp_path / f"linear-{n}/card.json").read_text()) for n in (1, 2)]
    assert cards[0]["cost"]["clips"] == cards[1]["cost"]["clips"] == 48 and cards[1]["processes"] == 2
    assert cards[0]["scores"] == pytest.approx(cards[1]["scores"])
    whole, killed = ((tmp_path / f"{name}/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed and not list(tmp_path.glob("killed/state*"))
