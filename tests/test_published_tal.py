"""The TAL family: the official numbers, the official keys, live gradients, and clips of other lengths."""

import pytest
import torch
import torch.nn.functional as F
from published import drawn_input, fill, loaded, numbers, published_shapes, task_of
from safetensors.torch import load_file, save_file
from torch import nn

from robustav.classifier import AtFeatures
from robustav.fbank import frames_for
from robustav.models.checkpoints import load_into
from robustav.models.published.tal import (
    CHOICES,
    MODELS,
    POOLINGS,
    Gru,
    TalNet,
    TalTrans,
    TalTransformer,
    conv_stack,
)
from robustav.prepare import prepare
from robustav.published_log_mel import TAL_MEAN, TAL_STD, TalLogMel

AUDIOSET = task_of(527)
OFFICIAL = {
    "talnet": lambda: TalNet(AUDIOSET, dim=64),
    "taltrans": lambda: TalTrans(AUDIOSET, dim=64),
    "taltrans_addpos": lambda: TalTrans(AUDIOSET, dim=64, positions=True),
    "talnew": lambda: TalNet(AUDIOSET, dim=64, pooling="all"),
    "tal_plain_transformer": lambda: TalTransformer(AUDIOSET, dim=64),
}
SHAPES = {
    "talnet": "talnet_64mel",
    "talnet-tagging-64": "talnet_64mel",
    "talnet-tagging-128": "talnet_128mel_e2048",
    "tal-trans": "taltrans_64mel",
    "tal-trans-positions": "taltrans_64mel_addpos",
    "tal-trans-tagging-64": "taltrans_64mel_addpos",
    "tal-trans-tagging-128": "taltrans_128mel_addpos",
}
STATISTICS = {
    "talnet-tagging-64": (-29.072655, 40.71728),
    "talnet-tagging-128": (-3.6788461, 4.3739743),
    "tal-trans-tagging-64": (-29.686901, 40.898224),
    "tal-trans-tagging-128": (-3.6788461, 4.3739743),
}
SHORT = task_of(5, seconds=1.0)
TINY = {
    "talnet": lambda task=SHORT: TalNet(task, dim=32),
    "tal-new": lambda task=SHORT: TalNet(task, dim=32, pooling="all"),
    "tal-trans": lambda task=SHORT: TalTrans(task, dim=32),
    "tal-trans-positions": lambda task=SHORT: TalTrans(task, dim=32, positions=True),
    "tal-transformer": lambda task=SHORT: TalTransformer(task, dim=32),
    "talnet-tagging-64": lambda task=SHORT: TalNet(task, dim=32, front_end="tagging-64"),
    "talnet-tagging-128": lambda task=SHORT: TalNet(task, dim=64, front_end="tagging-128"),
    "tal-trans-tagging-64": lambda task=SHORT: TalTrans(task, dim=32, front_end="tagging-64-trans", positions=True),
    "tal-trans-tagging-128": lambda task=SHORT: TalTrans(task, dim=64, front_end="tagging-128", positions=True),
}


@pytest.fixture(scope="module")
def official(shared):
    """A fixture, and our model with its weights."""

    def read(name, make=None):
        fixture = numbers(shared, name)
        return fixture, loaded((make or OFFICIAL[name])(), fixture.state)

    return read


def probabilities(model, features):
    return AtFeatures(model)(features).sigmoid()


def check_gradients(fixture, model, inputs):
    """Of the loss with respect to features, to the tolerance and to a thousandth of the largest."""
    leaves = {m: x.clone().requires_grad_() for m, x in inputs.items()}
    loss = F.binary_cross_entropy(probabilities(model, leaves), fixture["in.y"])
    fixture.close(loss.detach(), "out.bce")
    keys = ["grad.x"] if len(inputs) == 1 else ["grad.xa", "grad.xv"]
    for ours, key in zip(torch.autograd.grad(loss, list(leaves.values())), keys, strict=True):
        fixture.close(ours, key)
        assert (ours - fixture[key]).abs().max() <= 1e-3 * fixture[key].abs().max()


# The official numbers.


@pytest.mark.parametrize("name", ["talnet", "taltrans", "taltrans_addpos"])
def test_scores_and_gradients_are_the_official_ones(name, official):
    fixture, model = official(name)
    features = {"audio": fixture["in.x"]}
    check_gradients(fixture, model, features)
    for pooling in POOLINGS:
        model.pooling = pooling
        fixture.close(probabilities(model, features), "out.global_prob" + f"_{pooling}" * (pooling != "att"))


@pytest.mark.parametrize("name", ["talnet", "taltrans", "taltrans_addpos", "tal_plain_transformer"])
def test_frames_are_the_official_ones(name, official):
    fixture, model = official(name)
    hidden = model.encode("audio", fixture["in.x"])
    fixture.close(model.fc_prob(hidden).sigmoid(), "out.frame_prob")
    fixture.close(model.fc_att(hidden).softmax(1), "out.frame_att")
    if "out.hidden" in fixture.tensors:
        fixture.close(hidden, "out.hidden")
    else:
        fixture.close(probabilities(model, {"audio": fixture["in.x"]}), "out.global_prob")


@pytest.mark.parametrize("name", ["taltrans", "taltrans_addpos"])
def test_a_layer_applied_once_is_the_official_one(name, official):
    fixture, model = official(name, lambda: TalTrans(AUDIOSET, dim=64, positions=name.endswith("addpos"), times=1))
    fixture.close(probabilities(model, {"audio": fixture["in.x"]}), "out.global_prob_one_layer")


def test_positions_are_the_official_ones(shared):
    table = numbers(shared, "taltrans_addpos").state["positional_encoding.pe"]
    ours = TalTrans(AUDIOSET, dim=64, positions=True).positional_encoding.pe
    torch.testing.assert_close(ours, table, rtol=0, atol=3e-5)  # of angles up to 400 in float32


def test_tal_new_s_poolings_are_the_official_ones(official):
    fixture, model = official("talnew")
    features = {"audio": fixture["in.x"]}
    fixture.close(probabilities(model, features), "out.global_prob_all")
    model.ens = None
    for pooling in ("att", "lin", "h-att"):
        model.pooling = pooling
        fixture.close(probabilities(model, features), f"out.global_prob_{pooling.replace('-', '_')}")


def test_talnet_at_full_size_is_the_official_one(shared):
    fixture, model = numbers(shared, "full_talnet"), fill(MODELS["talnet"].build())
    x = drawn_input("full_tal_a", (1, 400, 64))
    assert torch.equal(x.flatten()[:8], fixture["in.full_tal_a_first8"])
    with torch.no_grad():
        fixture.close(probabilities(model, {"audio": x}), "out.prob")


# Keys.


@pytest.mark.parametrize("name", SHAPES)
def test_keys_and_shapes_are_the_official_ones(name, shared):
    with torch.device("meta"):
        model = MODELS[name].build()
    assert {key: list(x.shape) for key, x in model.state_dict().items()} == published_shapes(shared, SHAPES[name])
    millions = {"talnet_64mel": 10_520_702, "talnet_128mel_e2048": 25_761_918, "taltrans_128mel_addpos": 8_562_510}
    assert sum(p.numel() for p in model.parameters()) == millions.get(SHAPES[name], 12_097_662)
    assert model.state_dict()[MODELS[name].head].shape[0] == 527


@pytest.mark.parametrize("name", MODELS)
def test_every_row_can_be_built_for_other_classes(name):
    entry = MODELS[name]
    with torch.device("meta"):
        model = entry.build(task_of(7, seconds=2.5, label_kind="multiclass"))
    assert model.classes == task_of(7).classes and model.label_kind == "multiclass"
    assert model.state_dict()[entry.head].shape[0] == 7
    assert model.specs["audio"].shape == (40_000,)
    assert len(entry.summary) <= 60


@pytest.mark.parametrize("name", MODELS)
def test_every_row_hears_with_its_own_statistics(name):
    with torch.device("meta"):
        log_mel = MODELS[name].build().log_mel
    assert log_mel.frames == (1024 if name.endswith("128") else 400)
    if name in STATISTICS:
        assert (log_mel.mean, log_mel.divisor / 2) == STATISTICS[name]
    else:
        assert isinstance(log_mel, TalLogMel)


def test_silence_is_the_lowest_of_published_features():
    features = TINY["talnet"]().front_end("audio", torch.zeros(1, 16_000))
    assert features.shape == (1, 40, 64)
    torch.testing.assert_close(features[0, 0], (-100 - torch.tensor(TAL_MEAN)) / torch.tensor(TAL_STD))


@pytest.mark.parametrize("make", OFFICIAL.values(), ids=OFFICIAL)
def test_saved_and_loaded_again_it_is_the_same(make, tmp_path):
    model = fill(make())
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    again = loaded(make(), load_file(tmp_path / "a.safetensors"))
    save_file(again.state_dict(), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def old_spelling(state, prefix=""):
    """As in files of the single-GPU code."""
    start = f"{prefix}conv."
    return {
        f"{prefix}conv{int(key[len(start)]) + 1}{key[len(start) + 1 :]}" if key.startswith(start) else key: x
        for key, x in state.items()
    }


@pytest.mark.parametrize("make", OFFICIAL.values(), ids=OFFICIAL)
def test_every_official_spelling_is_understood(make):
    model = fill(make())
    own = model.state_dict()
    assert same(model.adapted(own), own)
    old = old_spelling(own)
    assert not any(key.startswith("conv.") for key in old)
    assert same(model.adapted(old), own)
    assert same(model.adapted({key: x for key, x in old.items() if "num_batches" not in key}), own)
    both = {**own, **{key: x + 1 for key, x in old.items() if key not in own}}
    assert same(model.adapted(both), own), "the first spelling counts"
    assert set(model.adapted({**own, "strange": torch.zeros(1)})) == {*own, "strange"}, "for loading to refuse"


def test_tables_of_positions_are_cut_or_continued():
    short, long = (TalTrans(task_of(3, seconds=s), dim=32, positions=True) for s in (2.0, 12.0))
    assert [len(m.positional_encoding.pe[0]) for m in (short, long)] == [400, 480]
    theirs = short.state_dict()["positional_encoding.pe"] + 0.5
    ours = long.adapted({**short.state_dict(), "positional_encoding.pe": theirs})["positional_encoding.pe"]
    assert torch.equal(ours[:, :400], theirs)
    assert torch.equal(ours[:, 400:], long.positional_encoding.pe[:, 400:])
    assert torch.equal(short.adapted({"positional_encoding.pe": ours})["positional_encoding.pe"], theirs)
    other = {"positional_encoding.pe": torch.zeros(1, 400, 128)}
    assert short.adapted(other) == other


def test_a_state_of_another_size_is_refused():
    model = TalNet(SHORT, dim=32)
    with pytest.raises(ValueError, match=r"other shape \(70\): conv.0.bn.bias: \[2\] in the file, \[1\] in the model"):
        load_into(model, model.adapted(TalNet(SHORT, dim=64).state_dict()), "checkpoint")
    with pytest.raises(ValueError, match=r"not in the model \(1\): positional_encoding.pe"):
        load_into(TINY["tal-trans"](), TalTrans(SHORT, dim=32, positions=True).state_dict(), "checkpoint")


# What holds for every one of them.


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_a_waveform_has_scores_and_gradients(make):
    model = fill(make())
    raw = {"audio": (0.1 * torch.randn(3, 16_000)).requires_grad_()}
    trace = model.trace(raw)
    assert trace.latent.ndim == 2 and trace.logits.shape == (3, 5) and trace.logits.isfinite().all()
    assert torch.equal(model.finish(model.features(raw)).logits, model(raw))
    (gradient,) = torch.autograd.grad(trace.logits.sum(), raw["audio"])
    assert gradient.isfinite().all() and gradient.abs().amax(1).gt(0).all()
    torch.testing.assert_close(model({"audio": raw["audio"][1:2]}), trace.logits[1:2], rtol=1e-3, atol=1e-4)
    at = AtFeatures(model)
    torch.testing.assert_close(at(at.front_ends(raw)), trace.logits)


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_half_precision_is_close(make):
    model, raw = fill(make()), {"audio": 0.1 * torch.randn(2, 16_000)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = model(raw)
    torch.testing.assert_close(half.float(), model(raw), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["talnet", "tal-trans"])
def test_batch_norms_are_folded_for_attacks(name):
    model, raw = fill(TINY[name]()), {"audio": 0.1 * torch.randn(2, 16_000)}
    quick = prepare(model, raw)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quick.modules())
    torch.testing.assert_close(quick(raw), model(raw), rtol=1e-3, atol=1e-4)


def test_dropout_is_for_training():
    model, x = TINY["tal-trans"](), torch.randn(2, 40, 64)
    model.eval()
    assert torch.equal(model.encode("audio", x), model.encode("audio", x))
    model.enc_layer.train()
    assert not torch.equal(model.encode("audio", x), model.encode("audio", x))


def test_the_recurrent_layer_is_torchs_and_stays_in_evaluation():
    model = TINY["talnet"]().eval()
    assert not any(module.training for module in model.modules())
    steps, plain = torch.randn(2, 5, 16), nn.GRU(16, 8, batch_first=True, bidirectional=True)
    own = Gru(16, 8, batch_first=True, bidirectional=True)
    own.load_state_dict(plain.state_dict())
    for ours, theirs in zip(own(steps), plain(steps), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_gradients_are_those_of_the_cpu():
    model, raw = fill(TINY["talnet"]()), 0.1 * torch.randn(2, 16_000)
    found = []
    for device in ("cpu", "cuda"):
        placed = prepare(model.to(device), {"audio": raw.to(device)})
        leaf = raw.to(device).requires_grad_()
        found.append(torch.autograd.grad(placed({"audio": leaf}).sum(), leaf)[0].cpu())
    assert F.cosine_similarity(found[0].flatten(), found[1].flatten(), 0) > 0.99


def test_weights_start_as_described():
    model = TINY["talnet"]()
    assert not any(x.any() for key, x in model.state_dict().items() if "bias" in key and key[:3] in ("gru", "fc_"))
    torch.testing.assert_close(model.gru.weight_hh_l0.T @ model.gru.weight_hh_l0, torch.eye(16))
    bound = (6 / (32 + 5)) ** 0.5
    assert 0.9 * bound < model.fc_prob.weight.abs().max() <= bound


@pytest.mark.parametrize(("seconds", "frames"), [(1.0, 128), (1.28, 128), (2.0, 256), (5.0, 512), (10.0, 1024)])
def test_filter_banks_are_filled_up(seconds, frames):
    assert frames_for(seconds) == frames
    model = TINY["talnet-tagging-128"](task_of(2, seconds=seconds))
    assert model.front_end("audio", torch.zeros(1, round(16_000 * seconds))).shape == (1, frames, 128)


@pytest.mark.parametrize("seconds", [0.1, 0.73, 2.0])
def test_shorter_clips_are_fewer_steps(seconds):
    model = fill(TINY["talnet"](task_of(2, seconds=seconds)))
    trace = model.trace({"audio": 0.1 * torch.randn(1, *model.specs["audio"].shape)})
    assert trace.latent.shape == (1, round(40 * seconds) // 4 * 32)


# Poolings.


@pytest.mark.parametrize("pooling", [*CHOICES, "all"])
def test_a_steady_score_is_the_clip_s(pooling):
    model = fill(TalNet(SHORT, dim=32, pooling=pooling))
    step = torch.randn(2, 1, 32)
    torch.testing.assert_close(model.classify(step.expand(-1, 10, -1).flatten(1)), model.fc_prob(step)[:, 0])


def test_poolings_are_those_of_the_paper():
    logits, attention = torch.randn(2, 2, 6, 3, dtype=torch.float64)
    y = logits.sigmoid()
    expected = {
        "max": y.amax(1),
        "ave": y.mean(1),
        "lin": y.square().sum(1) / y.sum(1),
        "exp": (y * y.exp()).sum(1) / y.exp().sum(1),
        "att": (y * attention.softmax(1)).sum(1),
    }
    for name, pool in POOLINGS.items():
        torch.testing.assert_close(pool(logits, attention).sigmoid(), expected[name])


def test_linear_softmax_in_windows_weighted_by_their_mean_is_linear_softmax():
    y = torch.rand(20, dtype=torch.float64).view(4, 5)
    windows = y.square().sum(1) / y.sum(1)
    in_windows = (windows * y.mean(1)).sum() / y.mean(1).sum()
    ours = CHOICES["h-att"](y.logit().reshape(1, 20, 1), None)
    torch.testing.assert_close(ours.sigmoid().squeeze(), in_windows)


@pytest.mark.parametrize("pooling", CHOICES)
@pytest.mark.parametrize("level", [-40.0, 40.0])
def test_saturated_scores_keep_a_gradient(pooling, level):
    logits = (level + torch.randn(1, 6, 2)).requires_grad_()
    pooled = CHOICES[pooling](logits, torch.zeros(1, 6, 2))
    (gradient,) = torch.autograd.grad(pooled.sum(), logits)
    assert pooled.isfinite().all() and gradient.isfinite().all()
    assert gradient.sum(1) == pytest.approx(1, abs=0.1), "all up by as much is the clip's score up by as much"


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TalNet(SHORT, pooling="sum"), r"`pooling` must be one of \['max', .*'h-att', 'all'\], got 'sum'"),
        (lambda: TalNet(SHORT, front_end="mel"), r"`front_end` must be one of \['tagging-128', .*got 'mel'"),
        (lambda: TalTrans(SHORT, dim=36), "the width of self-attention must be a multiple of its 8 heads, got 36"),
        (lambda: TalTrans(SHORT, times=0), "`times` must be at least 1, got 0"),
        (
            lambda: conv_stack(64, 33),
            "`dim` must be at least half of `mels` and a multiple of the bins left of them, 2, and .*dim=33",
        ),
        (lambda: conv_stack(64, 30), "`dim` must be at least half of `mels`"),
        (lambda: conv_stack(16, 64), "and `mels` at least 32, got dim=64 and mels=16"),
        (
            lambda: MODELS["talnet"].build(task_of(2, frames=5)),
            "`frames` of this model is 10 and cannot be 5; what can be set: classes, label_kind, seconds",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
