"""Latents: one pass of every clip, in order, as each stage returned it, whatever the batch size; and what is refused."""

import pytest
import torch
from conftest import CLASSES, Linear, TinySamples, batch_of, tiny_fusion, tiny_specs
from torch import nn

import robustav.geometry.survey as survey_module
from robustav.classifier import Classifier, Wrapped
from robustav.data.samples import Sample
from robustav.geometry import latents as latents_module
from robustav.geometry.cuts import CUTS, FUSED, cuts_of
from robustav.geometry.latents import collect
from robustav.geometry.survey import Survey
from robustav.goals import Untargeted
from robustav.reader import Reader

ALL = range(10)


def collected(model=None, samples=None, indices=ALL, layers=CUTS, batch_size=4, progress=None):
    model, samples = model or tiny_fusion(), samples or TinySamples(10)
    goal = Untargeted(label_kind=model.label_kind)
    reader = Reader(model, samples, goal, batch_size, torch.device("cpu"))
    cuts = cuts_of(model, layers, batch_of(model.specs, 1))
    return collect(model, reader, indices, cuts, *([progress] if progress else []))


class Unlabelled(TinySamples):
    def load(self, index: int) -> Sample:
        sample = super().load(index)
        return sample._replace(labels=None) if index % 2 else sample


def test_clips_come_in_the_order_asked_for_with_all_that_belongs_to_them():
    order = [7, 2, 5, 0, 9]
    found, model, samples = collected(indices=order), tiny_fusion(), TinySamples(10)
    assert found.ids == tuple(f"clip {i}" for i in order)
    assert len(found) == 5
    assert found.classes == CLASSES
    assert found.label_kind == "multilabel"
    for row, index in enumerate(order):
        inputs = {m: x[None] for m, x in samples.load(index).inputs.items()}
        with torch.no_grad():
            trace = model.trace(inputs)
        for m, x in inputs.items():
            assert torch.equal(found.parts["input"][m][row], x[0])
            torch.testing.assert_close(found.parts["features"][m][row], trace.features[m][0])
        torch.testing.assert_close(found.parts["latent"][FUSED][row], trace.latent[0])
        torch.testing.assert_close(found.logits[row], trace.logits[0])


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_labels_of_either_kind_are_a_table_of_classes(kind):
    found = collected(tiny_fusion(kind), TinySamples(10, kind))
    assert torch.equal(found.labels, torch.eye(3, dtype=torch.bool)[torch.arange(10) % 3])
    assert found.labelled.all()
    assert found.label_kind == kind


@pytest.mark.parametrize("broken", [[4], [0, 1, 2, 3], [0, 9]])  # the second: a whole batch
def test_a_clip_that_cannot_be_used_is_listed_and_nowhere_else(broken):
    found = collected(samples=TinySamples(10, broken={f"clip {i}": f"reason {i}" for i in broken}))
    assert found.skipped == {f"clip {i}": f"reason {i}" for i in broken}
    whole = collected()
    usable = [i for i in ALL if i not in broken]
    assert found.ids == tuple(f"clip {i}" for i in usable)
    assert torch.equal(found.labels, whole.labels[usable])
    torch.testing.assert_close(found.logits, whole.logits[usable])
    torch.testing.assert_close(found.parts["latent"][FUSED], whole.parts["latent"][FUSED][usable])


@pytest.mark.parametrize("kind", ["multilabel", "multiclass"])
def test_an_unlabelled_clip_has_the_models_own_prediction_and_says_so(kind):
    found = collected(tiny_fusion(kind), Unlabelled(10, kind))
    assert found.labelled.tolist() == [i % 2 == 0 for i in ALL]
    top = torch.nn.functional.one_hot(found.logits.argmax(1), 3).bool()
    own = top if kind == "multiclass" else top | (found.logits.sigmoid() >= 0.5)
    assert torch.equal(found.labels[1::2], own[1::2])
    assert torch.equal(found.labels[::2], torch.eye(3, dtype=torch.bool)[torch.arange(0, 10, 2) % 3])


def test_the_batch_size_does_not_matter():
    layers = [*CUTS, "encoders.audio.1"]
    whole = collected(layers=layers, batch_size=10)
    for size in (1, 3, 64):
        other = collected(layers=layers, batch_size=size)
        assert other.ids == whole.ids
        torch.testing.assert_close(other.logits, whole.logits)
        for cut, parts in whole.parts.items():
            torch.testing.assert_close(other.parts[cut], parts)


def test_more_than_fits_in_memory_is_refused_before_it_is_read(monkeypatch):
    values = 64 + 96 + 60 + 20 + 80  # of a clip: inputs, features, latent
    layers, read = ["input", "features", "latent"], []
    monkeypatch.setattr(latents_module, "MEMORY", 10 * values * 4)
    collected(layers=layers)
    monkeypatch.setattr(latents_module, "MEMORY", 10 * values * 4 - 1)
    expected = (
        r"latents of 10 clips would take 0\.0 GiB \(limit .*\), most of it the layer 'input': leave it out with --l"
    )
    with pytest.raises(ValueError, match=expected):
        collected(layers=layers, progress=lambda what, done, total: read.append(done))
    assert read == [0]


class Marked(Linear):
    """Loud on one clip: its audio features are infinite, which no score shows."""

    def __init__(self, mark):
        super().__init__(tiny_specs(), 3)
        self.mark, self.classes = mark, CLASSES

    def encode(self, modality, x):
        found = super().encode(modality, x)
        return torch.where(x[:, :1] == self.mark, torch.inf, found) if modality == "audio" else found

    def classify(self, latent):
        return latent.nan_to_num(posinf=9)


@pytest.mark.parametrize(("layer", "part"), [("features", "audio"), ("latent", "fused")])
def test_a_latent_that_is_not_finite_names_its_clip(layer, part):
    model = Marked(TinySamples(10).load(6).inputs["audio"][0])
    assert len(collected(model, layers=["input"])) == 10
    with pytest.raises(ValueError, match=rf"the {layer} of clip 'clip 6' \({part}\) is not finite"):
        collected(model, layers=["input", layer])


def test_nothing_usable_is_an_error_with_the_first_reason():
    broken = {f"clip {i}": f"reason {i}" for i in ALL}
    with pytest.raises(ValueError, match=r"no clip could be used \(10 skipped; the first: reason 0\)"):
        collected(samples=TinySamples(10, broken=broken))
    with pytest.raises(ValueError, match=r"no clip could be used \(0 skipped; the first: there is none\)"):
        collected(indices=[])


class Reusing(Classifier):
    """Returns the same memory every time, as a compiled graph may, and views of it."""

    def __init__(self):
        super().__init__()
        self.specs, self.classes, self.label_kind = tiny_specs(), CLASSES, "multilabel"
        self.memory = {name: torch.zeros(64, 3) for name in ("audio", "visual", "latent", "logits")}

    def kept(self, name, x):
        self.memory[name][: len(x)] = x
        return self.memory[name][: len(x)]

    def encode(self, modality, x):
        return self.kept(modality, x.flatten(1)[:, :3])

    def fuse(self, features):
        return self.kept("latent", features["audio"] + features["visual"])

    def classify(self, latent):
        return self.kept("logits", 2 * latent)


def test_what_a_model_uses_again_is_copied():
    found, samples = collected(Reusing(), batch_size=2), TinySamples(10)
    raw = {m: torch.stack([samples.load(i).inputs[m] for i in ALL]).flatten(1)[:, :3] for m in tiny_specs()}
    torch.testing.assert_close(found.parts["features"], raw)
    torch.testing.assert_close(found.parts["latent"][FUSED], raw["audio"] + raw["visual"])
    torch.testing.assert_close(found.logits, 2 * (raw["audio"] + raw["visual"]))


class Writing(Reusing):
    """Writes into what it is given to fuse and to classify."""

    def encode(self, modality, x):
        return x.flatten(1)[:, :3].clone()

    def fuse(self, features):
        return features["audio"].add_(features["visual"]).clone()

    def classify(self, latent):
        return latent.mul_(2)


def test_latents_are_what_a_stage_returned_whatever_a_later_one_writes_into_it():
    model = Writing()
    found = collected(model)
    for cut in cuts_of(model, CUTS, batch_of(model.specs, 1)):
        parts = {name: x.clone() for name, x in found.parts[cut.name].items()}
        torch.testing.assert_close(cut.finish(parts), found.logits, msg=cut.name)


def test_latents_keep_the_precision_that_the_rest_of_the_network_takes():
    model = tiny_fusion().double()
    model.front_end = lambda modality, raw: raw.double()
    found = collected(model)
    assert {x.dtype for x in found.parts["features"].values()} == {torch.float64}
    for cut in cuts_of(model, ["features", "latent"], batch_of(model.specs, 1)):
        cut.finish(found.parts[cut.name])
    assert found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits, collected().logits)


def test_no_gradient_is_asked_for():
    model, asked = tiny_fusion(), []
    fuse = model.fuse
    model.fuse = lambda features: (asked.append(torch.is_grad_enabled()), fuse(features))[1]
    collected(model, layers=["latent", "head"])
    assert asked and not any(asked)


def test_progress_is_told():
    told = []
    collected(progress=lambda *what: told.append(what))
    assert told == [("reading latents", done, 10) for done in (0, 4, 8, 10)]


@pytest.fixture
def opened(monkeypatch):
    """A survey of tiny clips, with what is asked of it."""

    def open_(samples=None, model=None, **settings):
        monkeypatch.setattr(survey_module, "load_samples", lambda *_: (samples or TinySamples(10), 300))
        return Survey(model=model or tiny_fusion(), resamples=20, device="cpu", **settings).opened()

    return open_


def test_a_survey_looks_at_all_clips_or_as_many_as_asked_less_those_left_out(opened):
    with opened() as view:
        assert view.latents.ids == view.samples.ids
        assert view.chosen == tuple(ALL)
        assert view.weights.shape == (20, 10)
        assert [cut.name for cut in view.cuts] == ["input", "features", "latent"]
    with opened(limit=0) as view:
        assert len(view.latents) == 10
    with opened(limit=4) as few, opened(limit=4, seed=1) as others:
        assert len(few.latents) == len(others.latents) == 4
        assert few.latents.ids != others.latents.ids
    with opened(leave_out=frozenset({"clip 0", "clip 7"})) as view:
        assert view.latents.ids == tuple(f"clip {i}" for i in ALL if i not in (0, 7))


def test_resamples_are_of_the_usable_clips_and_follow_from_the_seed(opened):
    with opened() as one, opened() as again, opened(seed=1) as other:
        assert (one.weights == again.weights).all()
        assert (one.weights != other.weights).any()
    with opened(TinySamples(10, broken={"clip 0": "empty"})) as view:
        assert view.weights.shape == (20, 9)
        assert (view.weights.sum(1) == 9).all()
        assert view.chosen[0] == 0  # chosen, then skipped
        assert view.latents.skipped == {"clip 0": "empty"}
        assert "9 of 10 clips (1 skipped)" in view.header()["data"]


def test_other_clips_are_read_by_the_same_model_and_cuts(opened):
    with opened() as view:
        others = view.collect_others(TinySamples(4))
        assert others.ids == ("clip 0", "clip 1", "clip 2", "clip 3")
        torch.testing.assert_close(others.logits, view.latents.logits[:4])
        assert others.parts.keys() == view.latents.parts.keys()


def test_a_wrapped_networks_latent_can_be_named_and_its_mode_comes_back(opened):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.drop, self.head = nn.Linear(64, 5), nn.Dropout(0.9), nn.Linear(5, 3)

        def forward(self, inputs):
            return self.head(self.drop(self.body(inputs["audio"])))

    specs = {"audio": tiny_specs()["audio"]}
    model = Wrapped(Network(), specs=specs, classes=CLASSES, label_kind="multilabel")
    model.train()
    model.network.body.eval()
    with opened(model=model, latent="head", layers=["latent"]) as view:
        assert view.latents.parts["latent"][FUSED].shape == (10, 5)
        assert not model.network.training
    assert model.network.training and model.network.drop.training and not model.network.body.training
    with pytest.raises(ValueError, match="LateFusion has stages, so its latent is known"), opened(latent="head"):
        pass


def test_a_survey_that_cannot_be_is_refused(opened):
    for settings, expected in (
        ({"layers": ()}, "`layers` must name at least one layer"),
        ({"limit": -1}, "`limit` must not be negative, got -1"),
        ({"seed": -1}, "`seed` must not be negative, got -1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"resamples": 0}, "`resamples` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=expected):
            Survey(**settings)
    with pytest.raises(ValueError, match="`threshold` must be a probability"), opened(threshold=1.5):
        pass
    everyone = frozenset(TinySamples(10).ids)
    with pytest.raises(ValueError, match="tiny has no clips that are to be looked at"), opened(leave_out=everyone):
        pass
    broken = TinySamples(10, broken=dict.fromkeys(everyone, "empty"))
    with pytest.raises(ValueError, match=r"none of the 10 clips of tiny can be used: see robustav data check"):
        opened(broken).__enter__()
    with pytest.raises(ValueError, match="clip 'clip 0' cannot be used: empty"):
        opened(broken, strict=True).__enter__()


def test_a_survey_ends_with_the_model_as_it_was_also_when_it_fails(opened):
    model = tiny_fusion()
    model.train()
    model.encoders["audio"].eval()
    model.head.weight.requires_grad_(False)
    before = [(m, m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with opened(model=model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert before == ([(m, m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()])
    with pytest.raises(KeyError, match="stop"), opened(model=model):
        raise KeyError("stop")
    assert before == ([(m, m.training) for m in model.modules()], [p.requires_grad for p in model.parameters()])
