"""Cuts: what is taken goes on to the model's own logits, what is put in its place goes on instead, and no hook stays."""

import pytest
import torch
from conftest import CLASSES, Linear, batch_of, tiny_fusion, tiny_specs
from torch import nn

from robustav.classifier import LateFusion, Wrapped, waveform
from robustav.geometry.cuts import CUTS, FUSED, cuts_of, pool
from robustav.models.zoo import load_model


class Scaled(nn.Module):
    def forward(self, x):
        return 2 * x - 0.1


class Network(nn.Module):
    """A user's own: `shared` is called twice, `never` not at all, `memory` and `mean` return what is no layer's output."""

    def __init__(self):
        super().__init__()
        self.audio, self.visual, self.shared = nn.Linear(64, 8), nn.Linear(96, 8), nn.Linear(8, 8)
        self.memory, self.mean, self.norm, self.whole = nn.GRU(8, 8, batch_first=True), Mean(), Norm(), nn.Flatten(0)
        self.body, self.head, self.never = nn.Sequential(nn.Linear(16, 6), nn.Tanh()), nn.Linear(6, 3), nn.Linear(1, 1)

    def forward(self, inputs):
        audio = self.shared(self.audio(inputs["audio"]).tanh())
        visual = self.shared(self.visual(inputs["visual"].flatten(1)).tanh())
        remembered, _ = self.memory(audio[:, None])
        self.whole(audio)
        audio = audio + remembered[:, 0] + self.mean(audio) + self.norm(audio)[:, None]
        return self.head(self.body(torch.cat([audio, visual], 1)))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


class Norm(nn.Module):
    def forward(self, x):
        return x.norm(dim=1)


class Residual(nn.Module):
    """Writes in place into what its layers return."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.bend, self.head = (
            nn.Linear(64, 8),
            nn.Linear(8, 8),
            nn.ReLU(True),
            nn.Linear(8, 3),
        )

    def forward(self, inputs):
        before = self.first(inputs["audio"])
        after = self.second(before)
        after += before
        return self.head(self.bend(after))


def wrapped(network=Network, latent="head", modalities=("audio", "visual")):
    torch.manual_seed(0)
    specs = {m: tiny_specs()[m] for m in modalities}
    return Wrapped(network(), specs=specs, classes=CLASSES, label_kind="multilabel", latent=latent).eval()


def fronted():
    plain = tiny_fusion()
    return LateFusion(
        dict(plain.encoders.items()), plain.head, specs=plain.specs, classes=CLASSES, front_ends={"audio": Scaled()}
    ).eval()


MODELS = {
    "fusion": (tiny_fusion, ["encoders.audio.1", "encoders.visual.2", "encoders.visual", "head"]),
    "fusion with a front end": (fronted, ["front_ends.audio", "encoders.audio"]),
    "linear": (lambda: Linear(tiny_specs(), 3), []),
    "wrapped": (wrapped, ["audio", "body", "body.0", "network.body"]),
    "wrapped, in place": (lambda: wrapped(Residual, modalities=["audio"]), ["first", "second", "bend"]),
    "av-mid": (lambda: load_model("av-mid")[0], ["stems.audio.3", "blocks.0", "blocks.1.mix", "norm"]),
    "av-early": (lambda: load_model("av-early")[0], ["audio_stem", "visual_stem.0", "layers.1", "head.1"]),
}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def cut_of(model, name):
    """The cut, a batch, and what it takes of it."""
    inputs = batch_of(model.specs, 3)
    with torch.no_grad():
        (cut,) = cuts_of(model, [name], inputs)
        return cut, inputs, cut.take(inputs, model.trace(inputs))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_finishing_what_was_taken_gives_the_models_logits(name):
    build, modules = MODELS[name]
    model = build()
    inputs = batch_of(model.specs, 3)
    cuts = cuts_of(model, [*CUTS, *modules], inputs)
    assert {"input", "latent", *modules} <= {cut.name for cut in cuts}
    logits = model(inputs)
    for cut in cuts:
        parts = cut.take(inputs, model.trace(inputs))
        assert set(cut.mixable) <= parts.keys()
        given = {part: x.clone() for part, x in parts.items()}
        torch.testing.assert_close(cut.finish(given), logits, rtol=1e-5, atol=1e-5, msg=cut.name)
        assert hooks(model) == 0


@pytest.mark.parametrize("name", ["fusion", "fusion with a front end", "linear", "av-mid", "av-early"])
@torch.no_grad()
def test_another_clips_part_is_what_the_model_makes_of_that_clip(name):
    """At a stage: audio of the next clip beside one's own picture. At the latent: the next clip altogether."""
    model = MODELS[name][0]()
    inputs = batch_of(model.specs, 3)
    trace = model.trace(inputs)
    swapped = model({"audio": inputs["audio"].roll(1, 0), "visual": inputs["visual"]})
    assert (swapped - trace.logits).abs().max() > 1e-3
    for cut in cuts_of(model, CUTS, inputs):
        parts = cut.take(inputs, trace)
        if cut.name == "latent":
            assert cut.mixable == (FUSED,)
            given, expected = {FUSED: parts[FUSED].roll(1, 0)}, trace.logits.roll(1, 0)
        else:
            assert cut.mixable == ("audio", "visual")
            given, expected = {**parts, "audio": parts["audio"].roll(1, 0)}, swapped
        torch.testing.assert_close(cut.finish(given), expected, rtol=1e-4, atol=1e-4, msg=cut.name)


@pytest.mark.parametrize("name", ["fusion", "wrapped, in place", "av-mid"])
@torch.no_grad()
def test_another_clips_output_of_a_module_goes_on_instead_of_ones_own(name):
    build, modules = MODELS[name]
    module = {"fusion": "encoders.audio.1", "av-mid": "blocks.0"}.get(name, modules[1])
    model = build()
    cut, inputs, parts = cut_of(model, module)
    given = {**parts, module: parts[module].roll(1, 0)}
    expected = model(inputs).roll(1, 0)
    if name == "fusion":
        expected = model({"audio": inputs["audio"].roll(1, 0), "visual": inputs["visual"]})
    if name == "wrapped, in place":  # the residual path goes round it
        network = model.network
        before = network.first(inputs["audio"])
        expected = network.head((network.second(before).roll(1, 0) + before).relu())
    torch.testing.assert_close(cut.finish(given), expected, rtol=1e-4, atol=1e-4)
    assert (expected - model(inputs)).abs().max() > 1e-3


def test_the_last_module_finishes_as_it_is_given():
    cut, _, parts = cut_of(tiny_fusion(), "head")
    nothing = torch.zeros(3, 3)
    assert torch.equal(cut.finish({**parts, "head": nothing}), nothing)


def test_a_modules_output_is_taken_before_anything_is_written_into_it():
    model = wrapped(Residual, modalities=["audio"])
    with torch.no_grad():
        network = model.network
        for module in ("first", "second"):
            _, inputs, parts = cut_of(model, module)
            expected = network.first(inputs["audio"])
            expected = expected if module == "first" else network.second(expected)
            assert torch.equal(parts[module], expected)


def test_a_module_is_mixed_alone_and_carries_the_inputs_along():
    cut, inputs, parts = cut_of(tiny_fusion(), "encoders.audio.1")
    assert cut.mixable == ("encoders.audio.1",)
    assert parts.keys() == {"encoders.audio.1", "raw audio", "raw visual"}
    assert parts["raw audio"] is inputs["audio"]
    assert parts["encoders.audio.1"].shape == (3, 4, 15)


def test_features_and_modules_are_pooled_for_density_inputs_and_latents_are_not():
    model = fronted()
    cuts = cuts_of(model, [*CUTS, "head"], batch_of(model.specs, 1))
    maps = torch.randn(2, 3, 4, 5)
    pooled = [cut.pool(maps).shape[1] for cut in cuts]
    assert pooled == [60, 60, 3, 60, 5]  # the head is linear: its channels are last


def test_channels_are_where_the_layer_has_them():
    model = tiny_fusion()
    names = ["encoders.audio.1", "encoders.audio.2", "encoders.visual.1"]
    inputs = batch_of(model.specs, 2)
    with torch.no_grad():
        trace = model.trace(inputs)
        convolved, normed, maps = ((cut, cut.take(inputs, trace)[cut.name]) for cut in cuts_of(model, names, inputs))
    for cut, x in (convolved, normed, maps):  # [batch, channel, time] and [batch, channel, height, width]
        torch.testing.assert_close(cut.pool(x), x.flatten(2).mean(2))


@pytest.mark.parametrize(
    ("build", "named", "left"),
    [
        (tiny_fusion, CUTS, ["input", "features", "latent"]),
        (fronted, CUTS, [*CUTS]),  # one modality has a front end
        (wrapped, CUTS, ["input", "latent"]),
        (wrapped, ["latent", "features", "input"], ["latent", "input"]),
        (wrapped, ["front end", "features"], ["front end"]),
        (tiny_fusion, ["head", "input", "head", "input"], ["head", "input"]),
        (lambda: Linear(tiny_specs()), CUTS, ["input", "features", "latent"]),
    ],
)
def test_a_stage_that_does_nothing_is_left_out_beside_its_twin(build, named, left):
    model = build()
    assert [cut.name for cut in cuts_of(model, named, batch_of(model.specs, 1))] == left


def test_features_that_are_the_input_are_an_error_unless_the_input_is_named():
    model = wrapped()
    with pytest.raises(ValueError, match="layer 'features' is the input itself here"):
        cuts_of(model, ["features", "latent"], batch_of(model.specs, 1))


def test_features_of_one_modality_that_are_the_latent_give_way_to_it():
    model = LateFusion({"audio": nn.Linear(64, 8)}, nn.Linear(8, 1), specs={"audio": waveform(0.004)}, classes=("a",))
    inputs = batch_of(model.specs, 1)
    assert [cut.name for cut in cuts_of(model, ["features", "latent"], inputs)] == ["latent"]


def test_an_unknown_layer_is_an_error_that_lists_what_there_is():
    model = tiny_fusion()
    inputs = batch_of(model.specs, 1)
    with pytest.raises(
        ValueError, match=r"no layer 'body': there are input, front end, features, latent and the modul"
    ):
        cuts_of(model, ["input", "body"], inputs)
    with pytest.raises(
        ValueError, match=r"modules front_ends, encoders, encoders\.audio, .*, encoders\.visual\.4, head$"
    ):
        cuts_of(model, ["body"], inputs)


def test_a_long_list_of_modules_is_cut_in_the_middle():
    model = load_model("av-early")[0]
    with pytest.raises(ValueError, match=r"modules log_mel, pairs, audio_stem, \.\.\., .*, head\.1$") as error:
        cuts_of(model, ["body"], batch_of(model.specs, 1))
    assert str(error.value).count(",") == 3 + 19


def test_a_wrapped_networks_latent_must_be_named():
    model = wrapped(latent=None)
    inputs = batch_of(model.specs, 1)
    with pytest.raises(
        ValueError, match=r"latent is not known: name its last module with --latent MODULE .*network\.h"
    ):
        cuts_of(model, ["input", "latent"], inputs)
    assert [cut.name for cut in cuts_of(model, ["input", "body"], inputs)] == ["input", "body"]


@pytest.mark.parametrize(
    ("layer", "was"),
    [
        ("shared", "was called 2 times"),
        ("never", "was called 0 times"),
        ("head", "was called 2 times"),  # once more as the latent's classifier: it gives the logits
        ("memory", "was called once, returning tuple for 3 clips"),
        ("mean", r"was called once, returning \[\] for 3 clips"),
        ("norm", r"was called once, returning \[3\] for 3 clips"),
        ("whole", r"was called once, returning \[24\] for 3 clips"),
        ("stems.visual", r"was called once, returning \[12, 96, 3, 3\] for 3 clips"),  # of av-mid, frame by frame
    ],
)
def test_a_module_that_is_no_cut_is_an_error(layer, was):
    model = load_model("av-mid")[0] if layer == "stems.visual" else wrapped()
    with pytest.raises(ValueError, match=rf"layer '{layer}' must be called once a pass and return one tensor .*{was}"):
        cut_of(model, layer)
    assert hooks(model) == 0


def test_no_hook_stays_when_the_network_fails(monkeypatch):
    model = wrapped()
    cut, inputs, parts = cut_of(model, "body.0")
    trace = model.trace(inputs)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cut.finish({**parts, "body.0": parts["body.0"][:, :2]})
    assert hooks(model) == 0

    def broken(_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(model.network.body[1], "forward", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        cut.take(inputs, trace)
    with pytest.raises(RuntimeError, match="out of luck"):
        cut.finish(parts)
    assert hooks(model) == 0


def test_pooling_leaves_a_vector_a_clip():
    vectors = torch.arange(6.0).view(2, 3)
    assert torch.equal(pool(vectors), vectors)
    tokens = torch.arange(12.0).view(2, 3, 2)  # [sample, token, dim]
    assert torch.equal(pool(tokens), torch.tensor([[2.0, 3.0], [8.0, 9.0]]))
    maps = torch.arange(16.0).view(2, 2, 2, 2)  # [sample, channel, height, width]
    assert torch.equal(pool(maps), torch.tensor([[1.5, 5.5], [9.5, 13.5]]))
    assert torch.equal(pool(maps[..., None]), pool(maps))
