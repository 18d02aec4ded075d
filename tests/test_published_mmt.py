"""The multimodal transformers: the official numbers, the official keys, and where the modalities meet."""

import pytest
import torch
from published import drawn_input, fill, loaded, numbers, published_shapes, task_of
from safetensors.torch import load_file, save_file
from test_published_tal import check_gradients, old_spelling, probabilities, same

from robustav.classifier import AtFeatures
from robustav.models.checkpoints import load_into
from robustav.models.published.mmt import MODELS, MmtEarly, MmtLate, MmtMid, MmtScores, VideoFeatures
from robustav.models.published.tal import TalTrans

AUDIOSET = task_of(527)
OFFICIAL = {
    "video_features_transformer": lambda: VideoFeatures(AUDIOSET, width=48, dim=64),
    "mmtlf": lambda: MmtLate(AUDIOSET, width=48, dim=64),
    "mmt_early": lambda: MmtEarly(AUDIOSET, dim=64),
    "mmt_mid": lambda: MmtMid(AUDIOSET, width=48, dim=64),
}
SHAPES = {
    "video-features": ("video_features_transformer", 24_169_502),
    "mmt-early": ("mmt_early", 21_535_870),
    "mmt-mid": ("mmt_mid", 24_681_598),
    "mmt-late": ("mmtlf", 39_446_714),
    "mmt-late-once": ("mmtlf", 39_446_714),
}
SHORT = task_of(5, seconds=1.0)


def tiny_scores():
    audio, video = TalTrans(SHORT, dim=32), VideoFeatures(SHORT, width=48, dim=64)
    return MmtScores(SHORT, audio=audio, video=video)


TINY = {
    "video-features": lambda: VideoFeatures(SHORT, width=48, dim=64),
    "mmt-early": lambda: MmtEarly(SHORT, dim=64),
    "mmt-mid": lambda: MmtMid(SHORT, width=48, dim=64),
    "mmt-late": lambda: MmtLate(SHORT, width=48, dim=64),
    "mmt-scores": tiny_scores,
}


def inputs_of(fixture):
    if "in.x" in fixture.tensors:
        return {"visual": fixture["in.x"]}
    return {"audio": fixture["in.xa"], "visual": fixture["in.xv"]}


def raw_of(model, count=3):
    raw = {
        "audio": 0.1 * torch.randn(count, 16_000),
        "visual": torch.randn(count, *model.specs["visual"].shape).abs(),
    }
    return {m: raw[m].requires_grad_() for m in model.specs}


# The official numbers.


@pytest.mark.parametrize("name", OFFICIAL)
def test_scores_and_gradients_are_the_official_ones(name, shared):
    fixture = numbers(shared, name)
    model, inputs = loaded(OFFICIAL[name](), fixture.state), inputs_of(fixture)
    check_gradients(fixture, model, inputs)
    fixture.close(probabilities(model, inputs), "out.global_prob")
    trace = AtFeatures(model).trace(inputs)
    sequence = trace.latent.unflatten(1, (-1, 64))
    fixture.close(model.fc_prob(sequence).sigmoid(), "out.frame_prob")
    fixture.close(model.fc_att(sequence).softmax(1), "out.frame_att")
    for key in ("out.hidden", "out.bottleneck"):
        if key in fixture.tensors:
            fixture.close(sequence, key)


def test_from_the_fused_sequence_on_it_is_the_official_one(shared):
    """The convexity measurement scores points between such sequences."""
    fixture, state = numbers(shared, "protocol_convexity"), numbers(shared, "mmtlf").state
    points, model = fixture["out.interpolated"], loaded(OFFICIAL["mmtlf"](), state)
    fixture.close(model.classify(points.flatten(1)).sigmoid(), "out.prob")


@pytest.mark.parametrize(("name", "row"), [("full_mmtlf", "mmt-late"), ("full_mmt_early", "mmt-early")])
def test_at_full_size_they_are_the_official_ones(name, row, shared):
    fixture, model = numbers(shared, name), fill(MODELS[row].build())
    x = {"audio": drawn_input("full_tal_a", (1, 400, 64)), "visual": drawn_input("full_tal_v", (1, 10, 2048))}
    x["visual"] = 0.5 * x["visual"].abs()
    assert torch.equal(x["visual"].flatten()[:8], fixture["in.full_tal_v_first8"])
    with torch.no_grad():
        fixture.close(probabilities(model, x), "out.prob")


# Keys.


@pytest.mark.parametrize("name", SHAPES)
def test_keys_and_shapes_are_the_official_ones(name, shared):
    published, count = SHAPES[name]
    with torch.device("meta"):
        model = MODELS[name].build()
    assert {key: list(x.shape) for key, x in model.state_dict().items()} == published_shapes(shared, published)
    assert sum(p.numel() for p in model.parameters()) == count


def test_averaged_scores_have_their_parts_keys(shared):
    parts = {"audio": "taltrans_64mel", "video": "video_features_transformer"}
    expected = {
        f"{part}.{k}": shape for part, name in parts.items() for k, shape in published_shapes(shared, name).items()
    }
    with torch.device("meta"):
        model = MODELS["mmt-scores"].build()
    assert {key: list(x.shape) for key, x in model.state_dict().items()} == expected


@pytest.mark.parametrize("name", MODELS)
def test_every_row_can_be_built_for_other_classes(name):
    entry = MODELS[name]
    with torch.device("meta"):
        model = entry.build(task_of(7, label_kind="multiclass"))
    assert model.classes == task_of(7).classes and model.label_kind == "multiclass"
    assert model.state_dict()[entry.head].shape[0] == 7
    assert model.specs["visual"].shape == (10, 2048) and model.specs["visual"].unit == "feature"
    assert model.specs.get("audio", model.specs["visual"]).shape in ((160_000,), (10, 2048))
    assert len(entry.summary) <= 60


@pytest.mark.parametrize(("name", "prefix"), [("mmt-early", ""), ("mmt-late", "branch1."), ("mmt-scores", "audio.")])
def test_every_official_spelling_is_understood(name, prefix, tmp_path):
    model = fill(TINY[name]())
    own = model.state_dict()
    old = old_spelling(own, prefix)
    assert not any(key.startswith(f"{prefix}conv.") for key in old) and old.keys() != own.keys()
    for state in (own, old, {**own, **old}, {key: x for key, x in old.items() if "num_batches" not in key}):
        assert same(model.adapted(state), own)
    save_file(own, tmp_path / "a.safetensors")
    again = loaded(TINY[name](), load_file(tmp_path / "a.safetensors"))
    save_file(again.state_dict(), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_state_of_another_size_is_refused():
    wider = MmtLate(SHORT, width=56, dim=64)
    with pytest.raises(
        ValueError, match=r"branch2.enc_layer.pos_ffn.layer_norm.bias: \[56\] in the file, \[48\] in the"
    ):
        load_into(TINY["mmt-late"](), wider.adapted(wider.state_dict()), "checkpoint")


# What holds for every one of them.


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_raw_inputs_have_scores_and_gradients(make):
    model = fill(make())
    raw = raw_of(model)
    trace = model.trace(raw)
    assert trace.latent.ndim == 2 and trace.logits.shape == (3, 5) and trace.logits.isfinite().all()
    assert torch.equal(model.finish(model.features(raw)).logits, model(raw))
    for gradient in torch.autograd.grad(trace.logits.sum(), list(raw.values())):
        assert gradient.isfinite().all() and gradient.flatten(1).abs().amax(1).gt(0).all()
    one = model({m: x[1:2] for m, x in raw.items()})
    torch.testing.assert_close(one, trace.logits[1:2], rtol=1e-3, atol=1e-4)
    at = AtFeatures(model)
    torch.testing.assert_close(at(at.front_ends(raw)), trace.logits)


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_half_precision_is_close(make):
    model = fill(make())
    raw = {m: x.detach() for m, x in raw_of(model).items()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(raw)
    torch.testing.assert_close(half.float(), model(raw), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["mmt-early", "mmt-mid", "mmt-late", "mmt-scores"])
def test_a_modality_s_features_are_its_own(name):
    model = fill(TINY[name]())
    raw = raw_of(model)
    other = {**raw, "visual": raw["visual"] + 1}
    before, after = model.features(raw), model.features(other)
    assert torch.equal(before["audio"], after["audio"]) and not torch.equal(before["visual"], after["visual"])
    assert not torch.equal(model(raw), model(other))


def test_late_fusion_depends_on_how_often_layers_are_applied():
    twice, once = (MmtLate(SHORT, width=48, dim=64, times=times) for times in (2, 1))
    raw = raw_of(fill(twice))
    assert not torch.allclose(twice(raw), loaded(once, twice.state_dict())(raw))
    made = MODELS["mmt-late"].task
    with torch.device("meta"):
        layers = [MODELS[name].make(made) for name in ("mmt-late", "mmt-late-once")]
    assert [(m.branch1.enc_layer.times, m.branch2.enc_layer.times) for m in layers] == [(2, 2), (1, 1)]


def test_averaged_scores_are_the_average():
    model = fill(tiny_scores())
    raw = raw_of(model)
    heard, seen = model.audio({"audio": raw["audio"]}), model.video({"visual": raw["visual"]})
    torch.testing.assert_close(model(raw).sigmoid(), 0.6 * heard.sigmoid() + 0.4 * seen.sigmoid())


def test_early_fusion_cuts_both_modalities_into_rows():
    model = TINY["mmt-early"]()
    x = torch.arange(40.0 * 64).view(1, 40, 64)
    assert torch.equal(model.encode("audio", x)[0, 3], torch.arange(96.0, 128.0))
    assert model.encode("visual", torch.zeros(2, 10, 2048)).shape == (2, 80, 256)


@pytest.mark.parametrize("kind", [MmtEarly, MmtMid, MmtLate])
def test_half_seconds_are_refused(kind):
    with pytest.raises(ValueError, match=r"`task.seconds` must be a whole number beside video features, got 1\.5"):
        kind(task_of(2, seconds=1.5), dim=32)


@pytest.mark.parametrize("name", MODELS)
def test_lengths_are_fixed(name):
    with pytest.raises(ValueError, match=r"`seconds` of this model is 10\.0 and cannot be 5\.0"):
        MODELS[name].build(task_of(2, seconds=5.0))
