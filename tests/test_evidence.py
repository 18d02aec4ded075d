"""Stored examples looked at again: an untouched run passes, and whatever is changed on disk is found."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from robustav import keep
from robustav.cli.main import app
from robustav.evaluation import Evaluation
from robustav.evidence import reexamine
from robustav.goal_names import recorded_goal
from robustav.goals import GOALS, CorpusAP, Hide, Stealth, TopK, Untargeted
from robustav.harness import Settings

KEY = "fgsm-visual-0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence") / "run"
    settings = Settings(probed=0, keep=3)
    Evaluation("visual-cnn", attacks=["fgsm", "square"], eps="8/255", limit=8).run(folder, settings)
    return folder


def changed(run, tmp_path, change):
    """A copy of the run whose first FGSM example is another."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (file, *_) = sorted((copy / "kept" / KEY).glob(f"*/{keep.TENSORS}"))
    tensors = load_file(file)
    save_file(change(tensors), file)
    return copy


def test_what_was_kept_is_what_was_scored(run):
    found = reexamine(run).set_index("condition")
    assert list(found.index) == ["clean", "fgsm", "square"]
    assert found.loc["clean", "examples"] == found.loc["fgsm", "examples"] == 3
    assert (found["problems"] == 0).all()
    assert (found["moved"] < 1e-6).all()
    assert (found["logit_change"] < 1e-3).all()
    assert 0.99 < found.loc["fgsm", "gauge"] <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {"visual": (t["visual"] + 0.04).clamp(0, 1)}, "length over budget is"),
        (lambda t: {"visual": t["visual"] * 2 + 1}, r"visual leaves [0, 1]"),
        (lambda t: {"visual": t["visual"].flip(-1)}, "length over budget is"),
        (lambda t: {"visual": t["visual"][:2]}, "the attack returned visual as"),
        (lambda t: {"sound": t["visual"]}, "must have the modalities"),
        (lambda t: {"visual": torch.full_like(t["visual"], torch.nan)}, "is not finite"),
    ],
    ids=["shifted", "outside", "flipped", "short", "renamed", "nan"],
)
def test_a_changed_example_is_found(run, tmp_path, change, words):
    line = reexamine(changed(run, tmp_path, change)).set_index("condition").loc["fgsm"]
    assert line["problems"] == 1
    assert words in line["example"]


def test_an_example_inside_its_budget_that_is_not_the_one_scored_is_found(run, tmp_path):
    copy = changed(run, tmp_path, lambda tensors: tensors)
    clean = sorted((copy / "kept" / "clean").glob(f"*/{keep.TENSORS}"))[0]
    shutil.copy(clean, sorted((copy / "kept" / KEY).glob(f"*/{keep.TENSORS}"))[0])
    line = reexamine(copy).set_index("condition").loc["fgsm"]
    assert line["problems"] == 1
    assert "it is not what was scored, or the model is random" in line["example"]


def test_an_example_that_is_missing_or_damaged_is_found(run, tmp_path):
    copy = changed(run, tmp_path, lambda tensors: tensors)
    first, second, _ = sorted((copy / "kept" / KEY).glob("*"))
    shutil.rmtree(first)
    (second / keep.TENSORS).write_bytes(b"junk")
    line = reexamine(copy).set_index("condition").loc["fgsm"]
    assert (line["examples"], line["problems"]) == (3, 2)
    shutil.rmtree(copy / "kept" / KEY)
    assert "its example is missing" in reexamine(copy).set_index("condition").loc["fgsm", "example"]


def test_the_command_says_so_and_exits_with_one(run, tmp_path):
    runner = CliRunner()
    whole = runner.invoke(app, ["audit", str(run), "--json"])
    assert whole.exit_code == 0
    assert [row["problems"] for row in json.loads(whole.stdout)] == [0, 0, 0]
    broken = runner.invoke(app, ["audit", str(changed(run, tmp_path, lambda t: {"visual": 1 - t["visual"]}))])
    assert broken.exit_code == 1
    assert "length over budget" in broken.stdout


def test_a_run_that_kept_nothing_or_is_of_another_model_says_so(run, tmp_path):
    with pytest.raises(ValueError, match="was made with other weights"):
        reexamine(run, model="audio-cnn")
    with pytest.raises(ValueError, match="attacked other data than av-events/validation"):
        reexamine(run, data="av-events/validation")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "kept")
    with pytest.raises(ValueError, match="kept no examples: run the same attack again with --keep N"):
        reexamine(copy)


@pytest.mark.parametrize(
    "goal",
    [
        Untargeted(success="label-set"),
        Hide(chosen=(0, 2)),
        Hide(chosen="labels"),
        TopK(k=2),
        Stealth(chosen=(1,)),
        CorpusAP(),
    ],
    ids=lambda goal: type(goal).__name__,
)
def test_a_goal_is_read_back_from_its_record(goal):
    settings = json.loads(json.dumps({**goal.settings(), "words": "..."}))
    assert recorded_goal(settings) == goal
    assert type(goal) in GOALS.values()


def test_classes_that_changed_since_are_noticed(tmp_path, monkeypatch):
    """A file of class names is found from any folder, and one that was reordered after the run is refused."""
    from robustav.models.entry import Entry, Task
    from robustav.models.zoo import EMBEDDED, MODELS, load_model

    plain = EMBEDDED["visual-cnn"]
    names = plain.task.classes
    entry = Entry(
        lambda task: plain.make(task), "named", "nobody", task=Task(names), takes=("classes",), head="head.1.weight"
    )
    monkeypatch.setitem(MODELS, "named", entry)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(names))
    save_file(load_model("visual-cnn")[0].state_dict(), tmp_path / "w.safetensors")
    asked = {"checkpoint": tmp_path / "w.safetensors", "attacks": ["fgsm"], "eps": "8/255", "limit": 4}
    Evaluation("named(classes=names.txt)", **asked).run("run", Settings(probed=0, keep=1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert (reexamine(tmp_path / "run", data="av-events")["problems"] == 0).all()
    (tmp_path / "names.txt").write_text("\n".join(reversed(names)))
    with pytest.raises(
        ValueError, match=r"made with other classes, or another label kind, .*named\(classes=names.txt\)"
    ):
        reexamine(tmp_path / "run", data="av-events")
