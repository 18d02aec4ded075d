"""Every published model by name: it builds, its stages fit together, and its checkpoints are told from all others."""

import json
from dataclasses import fields, replace

import pytest
import torch
from conftest import tiny_fusion
from published import fill
from torch import nn

from robustav.classifier import AtFeatures, Classifier
from robustav.cli.models import stages
from robustav.data.audioset import CLASSES
from robustav.data.samples import Sample
from robustav.harness import Settings
from robustav.models import published
from robustav.models.checkpoints import digest_of_file
from robustav.models.entry import Entry, Published, Task
from robustav.models.fit import fits, weightless
from robustav.models.zoo import EMBEDDED, MODELS, inputs_of, load_model

NAMES = list(published.MODELS)
OTHER = {"classes": ("a", "b", "c"), "label_kind": "multiclass", "seconds": 5.0, "frames": 2, "size": 448}


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Module]:
    """Every model, without memory for its weights."""
    return {name: weightless(entry) for name, entry in published.MODELS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_row_says_where_it_comes_from(name):
    entry = published.MODELS[name]
    assert len(entry.summary) <= 60
    assert entry.source
    assert "arXiv:" in entry.paper
    assert entry.licence
    assert not entry.published or entry.published.startswith("https://"), "empty where no checkpoint is published"
    assert set(entry.takes) <= {field.name for field in fields(Task)}


@pytest.mark.parametrize("name", NAMES)
def test_stages_lead_from_raw_inputs_to_a_logit_for_each_class(name, built):
    entry, model = published.MODELS[name], built[name]
    assert isinstance(model, Published)
    if not isinstance(model, Classifier):
        assert "pretrain" in name
        assert not entry.head
        return
    assert model.classes == entry.task.classes
    assert model.label_kind == entry.task.label_kind
    assert set(model.specs) <= {"audio", "visual"}
    told = stages(model)
    assert told["classify"] == f"[{len(model.classes)}]"
    assert model.state_dict()[entry.head].shape[0] == len(model.classes)
    assert not any(".front_end" in key or "fbank" in key for key in model.state_dict()), "front ends stay out of files"


@pytest.mark.parametrize("name", [name for name in NAMES if published.MODELS[name].takes])
def test_what_a_row_takes_can_be_set(name):
    entry = published.MODELS[name]
    for key in entry.takes:
        model = weightless(entry, replace(entry.task, **{key: OTHER[key]}))
        if isinstance(model, Classifier):
            assert stages(model)["classify"] == f"[{len(model.classes)}]"
    for field in fields(Task):
        if field.name not in entry.takes and OTHER[field.name] != getattr(entry.task, field.name):
            with pytest.raises(ValueError, match=f"`{field.name}` of this model is .* and cannot be"):
                entry.build(replace(entry.task, **{field.name: OTHER[field.name]}))
            break


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("tal-trans", set()),
        ("audio-mae-pretrain", set()),
        ("psla-b2", {"psla-b2-tagging"}),
        ("vit-base", {"deit-base"}),
        (
            "cav-mae-vggsound",
            {name for name in NAMES if name.startswith("cav-mae")} - {"cav-mae-pretrain", "cav-mae-audio"},
        ),
    ],
)
def test_a_checkpoint_is_recognised_by_its_names_and_shapes(name, others, built):
    """Where several rows share those, all of them are told."""
    found = fits(built[name].state_dict(), MODELS)
    assert found[0].name == name
    assert {fit.name for fit in found if fit.exact} == others | {name}


def test_what_is_nobodys_names_the_nearest(built):
    state = dict(built["ast"].state_dict())
    state["stranger"] = state.pop("v.norm.bias")
    best = fits(state, MODELS)[0]
    assert not best.exact
    assert best.shared > 0.98
    assert (best.differs.missing, best.differs.extra) == (("v.norm.bias",), ("stranger",))
    assert fits({"nobody.knows": torch.zeros(1)}, MODELS)[0].shared == 0


def test_another_number_of_classes_is_told(built):
    state = dict(built["ast"].state_dict())
    state["mlp_head.1.weight"], state["mlp_head.1.bias"] = torch.zeros(10, 768), torch.zeros(10)
    found = {fit.name: fit for fit in fits(state, MODELS) if fit.exact}
    assert found["ast"].classes == 10


def test_inputs_are_known_without_weights():
    assert inputs_of("cav-mae(frames=1)").specs["visual"].shape == (1, 3, 224, 224)
    assert inputs_of("mmt-late(at=features)").specs["audio"].shape == (400, 64)
    assert inputs_of("mmt-late(at=features)").specs["visual"].low == 0, "what is a feature already keeps its range"


@pytest.mark.parametrize("asked", ["AST", "cavmae", "ast-s11"])
def test_a_name_that_is_nearly_right_is_suggested(asked):
    with pytest.raises(ValueError, match=r"no model '.*': did you mean (ast|cav-mae)"):
        load_model(asked)


def test_published_models_come_without_weights():
    with pytest.raises(
        ValueError, match=r"ast comes without weights: give a checkpoint with --checkpoint FILE; official ones"
    ):
        load_model("ast")
    with pytest.raises(
        ValueError, match=r"cav-mae-pretrain is a pre-training model, without classes to attack; fine-tuned: cav-mae,"
    ):
        load_model("cav-mae-pretrain")


@pytest.fixture
def little(monkeypatch) -> Entry:
    """A row for a tiny AST, so that loading by name is quick."""
    from robustav.models.published.ast import AST

    entry = Entry(
        lambda task: AST(task, dim=16, depth=1, heads=2),
        "tiny AST",
        "nobody",
        paper="arXiv:0",
        published="https://example.org",
        task=Task(classes=("a", "b", "c"), seconds=1.0),
        takes=("classes", "label_kind", "seconds"),
        head="mlp_head.1.weight",
    )
    monkeypatch.setitem(MODELS, "little", entry)
    return entry


def test_a_checkpoint_is_loaded_by_name_with_settings(little, tmp_path):
    model = fill(little.build())
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "audio_model.1.pth")
    loaded, about = load_model("little", tmp_path / "audio_model.1.pth")
    assert (about["summary"], about["paper"], about["checkpoint"]) == ("tiny AST", "arXiv:0", "audio_model.1.pth")
    assert len(about["checkpoint_sha256"]) == 64
    assert "resampled" not in about
    x = {"audio": 0.1 * torch.randn(2, 16_000)}
    torch.testing.assert_close(loaded(x), model(x))
    longer, about = load_model("little(seconds=2)", tmp_path / "audio_model.1.pth")
    assert about["resampled"] == ["v.pos_embed"]
    assert longer.specs["audio"].shape == (32_000,)
    at_features, _ = load_model("little(at=features)", tmp_path / "audio_model.1.pth")
    assert isinstance(at_features, AtFeatures)
    assert at_features.specs["audio"].shape == (128, 128)


@pytest.mark.parametrize("name", ["talnet", "audio-resnet18", "psla-mobilenet-v2", "mmt-late", "vit-tiny"])
def test_one_of_every_kind_goes_through_the_harness(name, monkeypatch, tmp_path):
    """Narrow ones, on noise: nothing in them is refused as unsound, and no row fails its audit."""
    from robustav.evaluation import Evaluation
    from robustav.ledger import failures
    from robustav.models.published.audio_resnet import AudioResNet
    from robustav.models.published.mmt import MmtLate
    from robustav.models.published.psla import MobileNet
    from robustav.models.published.tal import TalNet
    from robustav.models.published.vit import Vit

    task = Task(classes=("a", "b", "c"), seconds=1.0, frames=2, size=32)
    narrow = {
        "talnet": lambda: TalNet(task, dim=64),
        "audio-resnet18": lambda: AudioResNet(task, "basic", (1, 1, 1, 1), planes=(4, 8, 8, 8)),
        "psla-mobilenet-v2": lambda: MobileNet(task, width=0.1),
        "mmt-late": lambda: MmtLate(replace(task, seconds=10.0), width=48, dim=64),
        "vit-tiny": lambda: Vit(task, patch=16, dim=16, depth=1, heads=2),
    }
    model = fill(narrow[name]())
    monkeypatch.setattr("robustav.evaluation.load_samples", lambda *_: (Noise(model), None))
    ledger = Evaluation(model, attacks=["noise", "fgsm"], eps="0.01").run(tmp_path / "run", Settings(probed=2))
    assert failures(ledger) == {}


class Noise:
    """Two random clips."""

    def __init__(self, model):
        self.name, self.digest, self.ids = "noise", "0" * 64, ("one", "two")
        self.model, self.classes, self.label_kind = model, model.classes, model.label_kind

    def load(self, index):
        drawn = torch.Generator().manual_seed(index)
        inputs = {}
        for m, spec in self.model.specs.items():
            high = min(spec.high, 1.0)
            inputs[m] = spec.low + (high - spec.low) * (0.25 + 0.5 * torch.rand(spec.shape, generator=drawn))
        return Sample(self.ids[index], inputs, torch.tensor([1.0, 0.0, 0.0]))


def test_real_clips_are_attacked_from_an_official_file(monkeypatch, tmp_path, capsys, clips_folder):
    """The command of the documentation, on a CAV-MAE of two narrow blocks: waveform and pixels, AudioSet's labels."""
    from robustav.cli import main as cli
    from robustav.models.published.cav_mae import CavMae

    row = published.MODELS["cav-mae"].tuned(frames=2, size=32, seconds=2.0)
    monkeypatch.setitem(
        MODELS, "cav-mae", replace(row, make=lambda task: CavMae(task, dim=16, heads=2, depth=2, specific=1))
    )
    state = fill(MODELS["cav-mae"].build()).state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "audio_model_wa.pth")
    lines = ["id,path,labels", f"whistle,{clips_folder}/00W1lcxW-WU_40.000.mp4,/m/0l156k"]
    lines += [f"razor,{clips_folder}/KlsG1EnBEjc_000361.mp4,Hammer", f"deaf,{clips_folder}/BfvyPmVMo_20.000.wav,Hammer"]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    ask = "robustav attack --model cav-mae --checkpoint audio_model_wa.pth --data clips.csv --eps audio=0.002,visual=4/255"
    monkeypatch.setattr("sys.argv", [*ask.split(), "--attacks", "noise,fgsm", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)
    rows = {(row["condition"], row["attacked"]): row for row in told["rows"]}
    assert {("fgsm", "audio"), ("fgsm", "visual"), ("noise", "audio")} < set(rows)
    assert told["audit"] == "passed"
    assert "2210.07839" in json.dumps(told)
    assert digest_of_file(tmp_path / "audio_model_wa.pth")[:12] in json.dumps(told)
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    assert record["identity"]["classes"] == list(CLASSES)
    assert record["unknown_labels"] == {}
    assert record["identity"]["specs"]["audio"]["unit"] == "amplitude"
    assert record["identity"]["specs"]["visual"]["unit"] == "pixel value"


def test_a_checkpoint_that_does_not_fit_is_refused(little, tmp_path):
    torch.save(little.build().state_dict(), tmp_path / "c.pth")
    (tmp_path / "two.txt").write_text("x\ny\n")
    with pytest.raises(
        ValueError, match=r"tells 3 classes apart, and little is asked for 2: name them with .*classes=FILE"
    ):
        load_model(f"little(classes={tmp_path}/two.txt)", tmp_path / "c.pth")
    torch.save(tiny_fusion().state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"does not fit the model: missing \(.*\. Which model it fits: robustav models check"
    ):
        load_model("little", tmp_path / "other.pth")


def test_what_models_of_other_libraries_take():
    for name, message in (
        ("hf:folder(size=8)", r"hf:folder takes the settings seconds, frames, classes, label_kind, at, got 'size'"),
        ("timm:resnet18(seconds=8)", r"takes the settings frames, size, classes, label_kind, at, got 'seconds'"),
        ("own.py:make(frames=8)", r"own.py:make takes the settings at, got 'frames'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(name, "weights.pth" if name.startswith("timm") else None)
    with pytest.raises(ValueError, match=r"hf:folder has its own weights: leave --checkpoint out"):
        load_model("hf:folder", "weights.pth")
    with pytest.raises(ValueError, match=r"timm:resnet18 comes without weights: give your own with --checkpoint FILE"):
        load_model("timm:resnet18")


def test_embedded_models_keep_their_own_names():
    assert list(MODELS)[: len(EMBEDDED)] == list(EMBEDDED)
    assert len(MODELS) == len(EMBEDDED) + len(published.MODELS)
