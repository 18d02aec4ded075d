"""Models by name, the weights that ship, checkpoints, and a user's own factory."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_fusion
from safetensors.torch import save_file

from robustav.data.av_events import AvEvents
from robustav.metrics.tagging import mean_average_precision, top1_hit
from robustav.models.checkpoints import load_into, read_card, read_checkpoint
from robustav.models.entry import WEIGHTS
from robustav.models.zoo import EMBEDDED, load_model
from robustav.training import embedded

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def test_split():
    return AvEvents("test")


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_shipped_weights_score_what_their_card_says(name, test_split):
    """On the first 300 test scenes, inside an interval around the score of all thousand: the weights are the card's."""
    model, about = load_model(name)
    card = about["card"]
    assert card["data"]["test"]["sha256"] == test_split.digest
    audio, pictures, labels = (x[:300] for x in test_split.tensors())
    raw = {"audio": audio.float() / 32768, "visual": pictures.float() / 255}
    with torch.no_grad():
        logits = torch.cat([model({m: raw[m][i : i + 50] for m in model.specs}) for i in range(0, 300, 50)]).numpy()
    assert mean_average_precision(logits, labels.numpy()) == pytest.approx(card["clean"]["mAP"], abs=0.04)
    assert top1_hit(logits, labels.numpy()).mean() == pytest.approx(card["clean"]["top1_hit"], abs=0.05)


def test_fusion_clearly_beats_either_modality_alone():
    clean = {name: read_card(EMBEDDED[name].path)["clean"]["mAP_95"] for name in EMBEDDED}
    for single in ("audio-cnn", "visual-cnn"):
        assert clean["av-fusion"][0] > clean[single][1], "the intervals overlap"


def test_the_weights_are_small_and_their_cards_name_the_precision():
    files = list(WEIGHTS.glob("*.safetensors"))
    assert {file.stem for file in files} == set(EMBEDDED)
    assert sum(file.stat().st_size for file in files) < 10e6
    for file in files:
        halved = any(x.dtype == torch.float16 for x in read_checkpoint(file).values())
        assert read_card(file)["precision"].startswith("float16, which changes none" if halved else "float32")


def test_the_readme_quotes_the_cards():
    table = README.read_text(encoding="utf-8")
    for name in EMBEDDED:
        clean = read_card(EMBEDDED[name].path)["clean"]
        low, high = clean["mAP_95"]
        row = f"`{name}` | {EMBEDDED[name].summary} | {clean['mAP']:.3f} ({low:.3f}\u2013{high:.3f})"
        assert row in table, f"README.md lacks: {row}"


def test_training_is_decided_by_its_seed(monkeypatch):
    monkeypatch.setattr(embedded, "AvEvents", Few)
    recipe = embedded.Recipe(epochs=1)
    trained = []
    for _ in range(2):
        torch.manual_seed(0)
        trained.append(embedded.train(EMBEDDED["av-mid"].build(), recipe).state_dict())
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])


def test_a_recipe_writes_weights_and_a_card_that_belong_together(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "AvEvents", Few)
    embedded.make("audio-cnn", embedded.Recipe(epochs=1), tmp_path)
    card = read_card(tmp_path / "audio-cnn.safetensors")
    assert card["recipe"]["epochs"] == 1
    model = EMBEDDED["audio-cnn"].build()
    load_into(model, read_checkpoint(tmp_path / "audio-cnn.safetensors"), "the file")


class Few(AvEvents):
    """Sixty-four scenes of a split."""

    def tensors(self):
        return tuple(x[:64] for x in super().tensors())


def test_a_tampered_weight_file_is_refused(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"other weights")
    (tmp_path / "m.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"m.safetensors is not the file that its card describes"):
        read_card(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"model_state_dict": s, "optimizer": {"step": torch.zeros(1)}, "epoch": 1},
        lambda s: {"ema": s, "step": 4},
    ],
)
def test_checkpoints_of_every_wrapping_load(wrap, tmp_path):
    state = tiny_fusion().state_dict()
    torch.save(wrap(state), tmp_path / "c.pt")
    load_into(tiny_fusion(), read_checkpoint(tmp_path / "c.pt"), "c.pt")
    save_file(state, tmp_path / "c.safetensors")
    assert read_checkpoint(tmp_path / "c.safetensors").keys() == state.keys()


class Evil:
    def __reduce__(self):
        return (print, ("code in a pickle ran",))


def test_a_pickle_is_refused_unless_it_is_trusted(tmp_path, capsys):
    torch.save({"state_dict": tiny_fusion().state_dict(), "extra": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"holds more than tensors, and loading it could run code: .* --trust-pickle"):
        read_checkpoint(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""
    assert "head.weight" in read_checkpoint(tmp_path / "evil.pt", trust_pickle=True)
    assert "ran" in capsys.readouterr().out


def test_checkpoints_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"none.pt' is not a file"):
        read_checkpoint(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ValueError, match=r"text.pt' is no torch file: it begins with b'not weig'"):
        read_checkpoint(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match=r"text.safetensors' cannot be read as safetensors"):
        read_checkpoint(tmp_path / "text.safetensors")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match=r"plain.pt'"):
        read_checkpoint(tmp_path / "plain.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.pt' is empty"):
        read_checkpoint(tmp_path / "empty.pt")
    torch.save(tiny_fusion().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half.pt' cannot be read as a torch file: "):
        read_checkpoint(tmp_path / "half.pt")
    for content, entries in (({"a": {"x": 1}, 3: [1]}, "a dict with the entries a, 3"), ({}, "got a dict$")):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=rf"other.pt' holds no state dict: .*{entries}"):
            read_checkpoint(tmp_path / "other.pt")
    torch.save({"a": torch.zeros(1), "module.a": torch.ones(1)}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"twice.pt' has names twice"):
        read_checkpoint(tmp_path / "twice.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt' holds no state dict"):
        read_checkpoint(tmp_path / "list.pt")


def test_a_whole_module_is_taken_apart_where_it_is_trusted(tmp_path):
    torch.save(torch.nn.Linear(2, 1), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"save its state_dict\(\) alone, or pass --trust-pickle"):
        read_checkpoint(tmp_path / "module.pt")
    assert set(read_checkpoint(tmp_path / "module.pt", trust_pickle=True)) == {"weight", "bias"}


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (1j, "head.bias holds complex numbers")])
def test_weights_that_are_no_real_numbers_are_refused(value, message):
    state = tiny_fusion().state_dict()
    state["head.bias"] = torch.full_like(state["head.bias"], value, dtype=torch.complex64 if value == 1j else None)
    with pytest.raises(ValueError, match=message):
        load_into(tiny_fusion(), state, "c.pt")


def test_a_checkpoint_that_does_not_fit_lists_the_first_differences():
    state = tiny_fusion().state_dict()
    state["head.weight"] = torch.zeros(1, 2)
    state["stranger"] = state.pop("head.bias")
    message = re.escape(
        "c.pt does not fit the model: missing (1): head.bias; not in the model (1): stranger; other shape (1): head.weight: [1, 2] in the file, [3, 80] in the model"
    )
    with pytest.raises(ValueError, match=message):
        load_into(tiny_fusion(), state, "c.pt")


OWN = """
import torch
from robustav.classifier import Wrapped, waveform

def make():
    network = torch.nn.Linear(160, 2)
    return Wrapped(network, specs={"audio": waveform(0.01)}, classes=("a", "b"), label_kind="multiclass",
                   call=lambda network, inputs: network(inputs["audio"]))

def bare():
    return torch.nn.Linear(1, 1)

def neighbour():
    import beside
    return beside.make()

def broken():
    raise RuntimeError("no such weights")
"""


def test_a_users_own_factory(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    model, about = load_model("own_model.py:make")
    assert (model.classes, about["model"]) == (("a", "b"), "own_model.py:make")
    (tmp_path / "beside.py").write_text(OWN)
    assert load_model("own_model.py:neighbour")[0].classes == ("a", "b")
    torch.save(torch.nn.Linear(160, 2).state_dict(), tmp_path / "own.pt")
    load_model("own_model.py:make", tmp_path / "own.pt")
    (tmp_path / "wrong.py").write_text("def make(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_model("own_model:make")[0].label_kind == "multiclass"
    for name, message in (
        ("own_model.py:bare", "must return a robustav Classifier, got an nn.Module. Wrap a network as"),
        ("own_model.py:broken", "its factory failed with RuntimeError: no such weights"),
        ("own_model.py:nothing", "has no callable 'nothing'; it has .*make"),
        ("wrong.py:make", "wrong.py failed with SyntaxError"),
        ("nowhere.py:make", r"there is no file 'nowhere.py'"),
        ("no_such_package.models:make", "cannot import 'no_such_package'"),
        ("av-fussion", "no model 'av-fussion': did you mean av-fusion. There are audio-cnn, visual-cnn"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(name)
