"""Models as the command line asks for them: names, settings in brackets, class names from files."""

import argparse
import collections
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_fusion
from safetensors.torch import load_file
from torch import nn

from robustav.data.audioset import CLASSES, MACHINE_IDS
from robustav.models.asked import absolute, parse_model, read_classes, task_of
from robustav.models.checkpoints import convert, digest_of_file, read_checkpoint
from robustav.models.entry import Entry, Task


def test_a_name_alone_and_with_settings(tmp_path):
    assert parse_model("av-fusion") == ("av-fusion", {}, False)
    (tmp_path / "two.txt").write_text("hiss\n\n buzz \n")
    asked = parse_model(
        f" cav-mae( frames=1, seconds = 2.5, at=features,classes={tmp_path}/two.txt, label_kind=multiclass) "
    )
    assert asked.name == "cav-mae"
    assert asked.task == {"frames": 1, "seconds": 2.5, "classes": ("hiss", "buzz"), "label_kind": "multiclass"}
    assert asked.at_features
    changed = task_of(Task(), asked.task)
    assert (changed.classes, changed.label_kind, changed.seconds, changed.frames) == (
        ("hiss", "buzz"),
        "multiclass",
        2.5,
        1,
    )
    assert parse_model("own (1).py:make(at=raw)") == ("own (1).py:make", {}, False)
    assert parse_model("hf:folder(2)x") == ("hf:folder(2)x", {}, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a model is written as NAME or 'NAME"),
        ("ast(second=5)", r"a model's settings are classes=, label_kind=, .* at=, got 'second=5' in 'ast\(second=5\)'"),
        ("ast(5)", "got '5' in"),
        ("ast(seconds=5, seconds=6)", "a setting is given once, got 'seconds' twice"),
        ("ast(seconds=five)", "`seconds` must be a number, got 'five'"),
        ("ast(frames=1.5)", "`frames` must be a whole number, got '1.5'"),
        ("ast(at=front)", r"`at` must be raw .* or features .*, got 'front'"),
        ("ast(classes=nowhere.txt)", "`classes` must be a file of class names, .* there is no file 'nowhere.txt'"),
    ],
)
def test_settings_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_model(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0}, "`seconds` must be positive and finite, got 0"),
        ({"seconds": float("nan")}, "`seconds` must be positive and finite, got nan"),
        ({"seconds": float("inf")}, "`seconds` must be positive and finite, got inf"),
        ({"seconds": 1e-5}, r"`seconds` must be at least 0.1, got 1e-05"),
        ({"frames": -1}, "`frames` must be positive and finite, got -1"),
        ({"label_kind": "single"}, "`label_kind` must be"),
        ({"classes": ()}, "`classes` must be different names, at least one"),
        ({"classes": ("a", "a")}, "`classes` must be different names"),
    ],
)
def test_tasks_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        task_of(Task(), changes)


def test_a_model_is_asked_for_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute("av-fusion") == "av-fusion"
    assert absolute("ast(seconds=5, classes=c.txt)") == f"ast(seconds=5, classes={tmp_path}/c.txt)"
    assert absolute("hf:folder(frames=1)") == f"hf:{tmp_path}/folder(frames=1)"
    assert absolute("own.py:make") == f"{tmp_path}/own.py:make"
    assert absolute("package.module:make") == "package.module:make"


def test_what_a_model_does_not_take_is_refused():
    entry = Entry(lambda task: nn.Linear(1, len(task.classes)), "a line", "nobody", takes=("classes",))
    assert entry.build(replace(entry.task, classes=("a",))).out_features == 1
    with pytest.raises(
        ValueError, match=r"`seconds` of this model is 10.0 and cannot be 5.0; what can be set: classes"
    ):
        entry.build(replace(entry.task, seconds=5.0))
    other = entry.tuned(seconds=5.0)
    assert other.task.seconds == 5
    assert other.build().out_features == len(CLASSES)


def test_class_names_from_files(tmp_path, clips_folder):
    assert read_classes(clips_folder / "class_labels_indices.csv") == CLASSES
    assert (CLASSES[402], MACHINE_IDS["/m/03l9g"], len(CLASSES)) == ("Whistle", "Hammer", 527)
    for text, message in (
        ("index,display_name\n0,a\n2,b\n", "line 3: must be index 1, got '2'"),
        ("id,title\n0,a\n", "must have a column display_name, name, class or label"),
        ("name\na\na\n", "class names must differ, got 'a' more than once"),
        ("", "must have a column"),
    ):
        (tmp_path / "classes.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_classes(tmp_path / "classes.csv")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt: must be UTF-8 text, got byte 0xE9 at 3"):
        read_classes(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no class names"):
        read_classes(tmp_path / "empty.txt")


def wrapped_state() -> dict[str, object]:
    """A checkpoint as training scripts leave it: arguments, optimizer and counters beside the weights."""
    return {
        "model": tiny_fusion().state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "epoch": 3,
        "scaler": None,
        "args": argparse.Namespace(lr=1e-3, device="cuda", masks=[0.2, 0.2]),
        "history": collections.OrderedDict(loss=[1.0]),
    }


def test_a_checkpoint_with_a_namespace_of_settings_needs_no_trust(tmp_path):
    torch.save(wrapped_state(), tmp_path / "c.pth")
    assert read_checkpoint(tmp_path / "c.pth").keys() == tiny_fusion().state_dict().keys()


def test_conversion_keeps_every_tensor_and_nothing_else(tmp_path):
    whole = wrapped_state()
    state = {f"module.{name}": tensor.half() for name, tensor in whole["model"].items()}
    state["module.tied"] = state["module.head.weight"]
    torch.save({**whole, "model": state}, tmp_path / "c.pth")
    digests = convert(tmp_path / "c.pth", tmp_path / "c.safetensors")
    assert digests == {str(file): digest_of_file(file) for file in (tmp_path / "c.pth", tmp_path / "c.safetensors")}
    converted = load_file(tmp_path / "c.safetensors")
    assert converted.keys() == {name.removeprefix("module.") for name in state}
    assert all(torch.equal(converted[name.removeprefix("module.")], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match=r"c.safetensors exists: name another file"):
        convert(tmp_path / "c.pth", tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"there is no folder '.*nowhere': make it first"):
        convert(tmp_path / "c.pth", tmp_path / "nowhere" / "c.safetensors")
    with pytest.raises(ValueError, match=r"must end in .safetensors, got 'c.bin'"):
        convert(tmp_path / "c.pth", tmp_path / "c.bin")
    assert not list(Path(tmp_path).glob("c.bin"))
