"""PSLA's networks: the official numbers, live gradients where the official have none, both paddings of EfficientNet."""

import copy

import pytest
import torch
from published import drawn, fill, numbers, published_shapes, task_of
from safetensors.torch import load_file, save_file
from torch import nn

from robustav.classifier import AtFeatures
from robustav.fbank import RECIPES
from robustav.models.checkpoints import load_into
from robustav.models.published.efficientnet import SCALES, Block, EfficientNet, Scale, scaled
from robustav.models.published.mixtures import floored, weighted
from robustav.models.published.psla import (
    MODELS,
    PSLA,
    Attention,
    EfficientNetAttention,
    MeanPooling,
    MobileNet,
    MultiHeadAttention,
    ResNetAttention,
    clip_fbank,
)
from robustav.prepare import fold_batch_norms

OFFICIAL = {
    "psla_efficientnet_b2_head4": "psla-b2-tagging",
    "psla_mobilenet_v2": "psla-mobilenet-v2",
    "psla_resnet50_128x1024": "psla-resnet50-128",
    "psla_resnet50_64x400": "psla-resnet50-64",
}
HEADS = {
    "attention_sigmoid": (Attention, "sigmoid"),
    "attention_softmax": (Attention, "softmax"),
    "mean": (MeanPooling, "sigmoid"),
    "mhead_sigmoid": (MultiHeadAttention, "sigmoid"),
    "mhead_softmax": (MultiHeadAttention, "softmax"),
}
SMALL = Scale(0.25, 0.5, 224)
TINY = {
    "4 heads": lambda task: EfficientNetAttention(task, SMALL),
    "1 head": lambda task: EfficientNetAttention(task, SMALL, heads=1, activation="softmax", symmetric=False),
    "mean": lambda task: EfficientNetAttention(task, SMALL, heads=0, recipe=RECIPES["tagging-mix-0.3"]),
    "mobilenet": lambda task: MobileNet(task, width=0.25),
    "resnet 128": lambda task: ResNetAttention(task, layers=(1, 1, 1, 1), planes=(8, 8, 8, 8)),
    "resnet 64": lambda task: ResNetAttention(task, 64, layers=(1, 1, 1, 1), planes=(8, 8, 8, 8)),
}


@pytest.fixture(params=TINY, scope="module")
def tiny(request):
    return fill(TINY[request.param](task_of(5, seconds=1.0)), conv_gain=1.4)


def waveforms(clips=2, seconds=1.0):
    return {"audio": 0.1 * torch.randn(clips, round(16_000 * seconds), generator=torch.Generator().manual_seed(5))}


def from_recipe(build, conv_gain=1.0):
    """The model with the recipe's weights, and no time spent on others. Its front end has no numbers."""
    with torch.device("meta"):
        model = build()
    state = {key: drawn(key, tuple(x.shape), conv_gain=conv_gain) for key, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def official_sum(scores, weights):
    """In float64, as probabilities: where one is a probability, so is this."""
    return (weights[:, None].double() * scores.double().sigmoid()).sum(1)


# The official numbers, each at its stated tolerance.


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_the_official_ones(name, shared):
    fixture, (build, activation) = numbers(shared, "psla_heads"), HEADS[name]
    head = build(fixture.config["n_in"], fixture.config["n_out"], activation)
    load_into(head, fixture.under(f"state.{name}."), name)
    fixture.close(head(fixture["in.feat"][..., 0].transpose(1, 2)).sigmoid(), f"out.{name}")


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_weights_over_time_are_the_official_ones(activation, shared):
    fixture = numbers(shared, "psla_heads")
    head = Attention(fixture.config["n_in"], fixture.config["n_out"], activation)
    load_into(head, fixture.under(f"state.attention_{activation}."), activation)
    weights = head.log_weights(fixture["in.feat"][..., 0].transpose(1, 2)).exp()
    fixture.close(weights.transpose(1, 2), f"out.attention_{activation}_norm_att")


@pytest.mark.parametrize("name", OFFICIAL)
def test_networks_are_the_official_ones(name, shared):
    fixture, maps = numbers(shared, name), []
    model = from_recipe(MODELS[OFFICIAL[name]].build, fixture.about.get("weights_conv_gain", 1.0))
    trunk = model.effnet if "efficientnet" in name else model.model
    trunk.register_forward_hook(lambda _, given, made: maps.append(made))
    with torch.no_grad():
        logits = model.finish({"audio": model.encode("audio", fixture["in.x"])}).logits
    fixture.close(logits.sigmoid(), "out.prob")
    if "out.features_mean" in fixture.tensors:
        assert list(maps[0].shape) == fixture["out.features_shape"].tolist()
        fixture.close(maps[0].mean(1), "out.features_mean")
    if "out.trunk_flat_first512" in fixture.tensors:
        assert maps[0].numel() == fixture["out.trunk_flat_size"].item()
        fixture.close(maps[0].flatten(1)[:, :512], "out.trunk_flat_first512")


@pytest.mark.parametrize("name", ["psla_efficientnet_b2_head4", "psla_mobilenet_v2", "psla_resnet50_64x400"])
def test_names_and_shapes_are_the_official_ones(name, shared):
    with torch.device("meta"):
        model = MODELS[OFFICIAL[name]].build()
    assert {key: list(x.shape) for key, x in model.state_dict().items()} == published_shapes(shared, name)


@pytest.mark.parametrize(
    ("name", "count"),
    [("psla-b2", 13_640_766), ("psla-mobilenet-v2", 2_898_383), ("psla-resnet50-64", 24_379_742)],
)
def test_sizes_are_the_published_ones(name, count):
    with torch.device("meta"):
        assert sum(x.numel() for x in MODELS[name].build().parameters()) == count


def test_the_wider_attention_of_128_bands():
    with torch.device("meta"):
        assert MODELS["psla-resnet50-128"].build().state_dict()["attention.att.weight"].shape == (527, 2048, 1, 1)


# The trunk.


def test_every_scale_has_its_width_and_depth():
    """Widths as PSLA has them for its heads; blocks as the paper's coefficients give them."""
    with torch.device("meta"):
        trunks = [EfficientNet(scale) for scale in SCALES.values()]
    assert [trunk.dim for trunk in trunks] == [1280, 1280, 1408, 1536, 1792, 2048, 2304, 2560]
    assert [len(trunk._blocks) for trunk in trunks] == [16, 23, 23, 26, 32, 39, 45, 55]


def test_channels_are_rounded_but_never_down_by_more_than_a_tenth():
    assert [scaled(channels, 1.0) for channels in (1, 11, 12, 19, 20, 83, 85)] == [8, 16, 16, 24, 24, 80, 88]


def without_order(trunk):
    """The same network with every kernel mirrored."""
    mirrored = copy.deepcopy(trunk)
    for module in mirrored.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.flip(2, 3)
    return mirrored


@pytest.mark.parametrize("symmetric", [True, False])
def test_only_symmetric_padding_sees_a_mirrored_picture_as_a_mirrored_picture(symmetric):
    """Of an odd side, that is: a stride of 2 then begins and ends on the picture's ends, if both are padded alike."""
    trunk = fill(EfficientNet(SMALL, channels=1, symmetric=symmetric), conv_gain=1.4).double()
    x = torch.randn(1, 1, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        seen, mirrored = trunk(x), without_order(trunk)(x.flip(2, 3)).flip(2, 3)
    assert torch.allclose(seen, mirrored) == symmetric


def test_padding_is_that_of_the_pictures_a_scale_was_made_for():
    """260 pixels are halved to 130, 65, 33, 17: B2 pads unevenly before strides of 2 at the even ones, then no more."""
    with torch.device("meta"):
        trunk, rounded = EfficientNet(SCALES["b2"]), EfficientNet(SCALES["b2"], symmetric=True)
    convolutions = [trunk._conv_stem, *(block._depthwise_conv for block in trunk._blocks)]
    more = [trunk.more, *(block.more for block in trunk._blocks)]
    strided = [i for i, convolution in enumerate(convolutions) if convolution.stride == (2, 2)]
    assert [more[i] for i in strided] == [1, 1, 0, 0, 0]
    assert sum(more) == 2
    for convolution in rounded.modules():
        if isinstance(convolution, nn.Conv2d):
            assert convolution.padding == tuple(side // 2 for side in convolution.kernel_size)


def test_later_residuals_are_left_out_more_often():
    """As in efficientnet_pytorch: from 0 to just below a fifth."""
    with torch.device("meta"):
        blocks = EfficientNet(SCALES["b0"])._blocks
    assert [block.drop for block in blocks] == pytest.approx([0.2 * i / 16 for i in range(16)])


def test_batch_norms_follow_data_as_slowly_as_tensorflows():
    """By a hundredth of each batch, where torch's default is a tenth."""
    trunk = EfficientNet(SMALL, channels=1).train()
    trunk(torch.ones(2, 1, 64, 64))
    assert trunk._bn0.running_var.max().item() == pytest.approx(0.99, abs=0.01)


def test_training_leaves_residuals_out_for_whole_clips_and_keeps_their_mean():
    block = Block(8, 8, ratio=1, kernel=3, stride=1, ends=(1, 0), drop=0.25).train()
    x = torch.ones(4000, 8, 2, 2)
    kept = block.kept(x)
    torch.testing.assert_close(kept.unique(), torch.tensor([0, 4 / 3]))
    assert torch.equal(kept, kept[:, :1, :1, :1].expand_as(kept))
    assert kept.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(block.eval().kept(x), x)


# Scores beyond probabilities.


def test_learnt_weights_give_the_logit_of_their_sum_where_it_is_a_probability():
    weights, scores = torch.tensor([0.2, 0.3, 0.1, 0.3]), 8 * torch.randn(50, 4, 7)
    torch.testing.assert_close(
        weighted(scores, weights).double(), official_sum(scores, weights).logit(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("weights", [[0.3, 0.4, 0.4, 0.2], [0.6, 0.5, 0.2, -0.3], [-0.1, 0.4, 0.9, 0.3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_beyond_probabilities_rank_as_the_official_ones_and_have_gradients(weights, dtype):
    weights, line = torch.tensor(weights, dtype=dtype), torch.linspace(-12, 12, 401, dtype=dtype)
    scores = (line[:, None, None] * weights.sign()[:, None]).requires_grad_()
    ours, official = weighted(scores, weights)[:, 0], official_sum(scores, weights)[:, 0]
    assert official.max() > 1 and (official.min() < 0) == (weights.min() < 0), "else this tests nothing"
    assert (official.diff() > 0).all()
    assert ((ours.diff() >= 0) if dtype == torch.float32 else (ours.diff() > 0)).all(), "float32 rounds to ties"
    gradient = torch.autograd.grad(ours.sum(), scores)[0]
    assert gradient.isfinite().all()
    assert (gradient * weights[:, None] > 0).all()
    inside = (official > 1e-5) & (official < 1 - 1e-5)
    torch.testing.assert_close(ours[inside].double(), official[inside].logit(), rtol=2e-3, atol=2e-3)


def test_weights_that_sum_to_one_saturate_nowhere():
    scores = torch.tensor([-40.0, 40.0])[:, None, None].expand(2, 4, 1)
    torch.testing.assert_close(weighted(scores, torch.full((4,), 0.25)), scores[:, 0])


@pytest.mark.parametrize(
    ("weights", "scores"),
    [
        ([0.6, 0.5], [torch.tensor(1 / 1.1).logit(), torch.tensor(1 / 1.1).logit()]),  # 1.1 * 1 / 1.1 is 1
        ([0.5, -0.6], [torch.tensor(0.6).logit(), 0.0]),  # 0.5 * 0.6 - 0.6 * 0.5 is 0
    ],
)
def test_the_slope_is_continuous_where_probabilities_end(weights, scores):
    weights = torch.tensor(weights, dtype=torch.float64)
    line = torch.linspace(-2e-6, 2e-6, 4001, dtype=torch.float64)[:, None] * weights.sign()
    scores = (torch.tensor(scores, dtype=torch.float64) + line)[:, :, None].requires_grad_()
    slope = (torch.autograd.grad(weighted(scores, weights).sum(), scores)[0][..., 0] * weights.sign()).sum(1)
    assert (slope > 0).all()
    assert slope.max() / slope.min() > 5, "else this tests nothing"
    assert (slope.diff().abs() / slope[1:]).max() < 0.05


def test_a_floor_holds_values_but_not_gradients():
    x = torch.tensor([-60.0, -20.0, -16.2, -10.0, -1.0])[None, :, None].requires_grad_()
    low = torch.log(torch.tensor(1e-7))
    torch.testing.assert_close(floored(x), x.clamp(min=low.item()))
    (gradient,) = torch.autograd.grad(floored(x).sum(), x)
    torch.testing.assert_close(gradient, torch.sigmoid(x.detach() - low))
    assert (gradient > 0).all()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_a_class_without_attention_anywhere_has_equal_weights(activation):
    """As officially, where every value is at the floor."""
    head = Attention(3, 2, activation)
    with torch.no_grad():
        head.att.weight.zero_()
        head.att.weight[0, 0] = 1.0
        head.att.bias.copy_(torch.tensor([-100.0, 0.0]))
    weights = head.log_weights(5 * torch.randn(1, 6, 3)).exp()
    torch.testing.assert_close(weights[..., 0], torch.full((1, 6), 1 / 6))


def test_the_odds_of_a_softmax_hold_where_it_is_sure():
    head = MeanPooling(3, 3, "softmax")
    with torch.no_grad():
        head.cla.weight.copy_(torch.eye(3)[:, :, None, None])
        head.cla.bias.zero_()
    steps = torch.tensor([[[50.0, 0.0, -3.0]]], requires_grad=True)
    logits = head(steps)
    expected = [50 - torch.tensor([0.0, -3.0]).logsumexp(0), -50, -53]
    torch.testing.assert_close(logits, torch.tensor([expected]))
    assert torch.autograd.grad(logits[0, 0], steps)[0][0, 0, 0].item() == pytest.approx(1)


# From raw input to logits and back.


def test_every_network_goes_from_a_waveform_to_scores_and_back(tiny):
    inputs = {"audio": waveforms()["audio"].requires_grad_()}
    trace = tiny.trace(inputs)
    assert trace.logits.shape == (2, 5)
    assert trace.latent.ndim == 2
    assert trace.logits.isfinite().all()
    (gradient,) = torch.autograd.grad(trace.logits.sum(), inputs["audio"])
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    assert torch.equal(tiny.finish(tiny.features(inputs)).logits, tiny(inputs))


def test_scores_do_not_depend_on_batch_mates(tiny):
    both = waveforms()["audio"]
    alone = torch.cat([tiny({"audio": clip[None]}) for clip in both])
    torch.testing.assert_close(tiny({"audio": both}), alone, rtol=1e-4, atol=1e-4)


def test_features_can_be_attacked(tiny):
    inputs = waveforms()
    view = AtFeatures(tiny)
    assert torch.equal(view(view.front_ends(inputs)), tiny(inputs))


def test_autocast_comes_close(tiny):
    inputs = waveforms()
    with torch.no_grad():
        full = tiny(inputs)
        with torch.autocast("cpu", torch.bfloat16):
            half = tiny(inputs)
    assert half.isfinite().all()
    assert half.dtype == torch.float32 or isinstance(tiny, MobileNet), "pooled probabilities need its digits"
    assert (half.sigmoid() - full.sigmoid()).abs().max() < 0.1


def test_batch_norms_fold_wherever_an_attack_passes(tiny):
    folded, inputs = copy.deepcopy(tiny), waveforms()
    fold_batch_norms(folded)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), tiny(inputs), rtol=1e-3, atol=1e-3)


def test_weights_survive_a_file(tiny, tmp_path):
    state = tiny.state_dict()
    save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / "weights.safetensors")
    fresh = copy.deepcopy(tiny)
    for parameter in fresh.parameters():
        parameter.data.zero_()
    load_into(fresh, fresh.adapted(load_file(tmp_path / "weights.safetensors")), "file")
    again = fresh.state_dict()
    assert list(again) == list(state)
    assert all(torch.equal(again[key], x) for key, x in state.items())


# Checkpoints, rows and refusals.


def test_old_files_lack_counters_and_may_have_the_classifier_of_imagenet(tiny):
    state = tiny.state_dict()
    old = {key: x for key, x in state.items() if not key.endswith("num_batches_tracked")}
    unused = {"effnet": "effnet._fc.weight", "model": "model.fc.weight"}[next(iter(state)).partition(".")[0]]
    if not isinstance(tiny, MobileNet):
        old[unused] = torch.zeros(1000, 8)
    for given in (old, state, tiny.adapted(old)):
        adapted = tiny.adapted(given)
        assert adapted.keys() == state.keys()
        assert all(torch.equal(adapted[key], x) for key, x in state.items())


def test_a_checkpoint_of_another_network_is_refused_with_its_differences():
    wide, narrow = (EfficientNetAttention(task_of(5), SMALL, heads=heads) for heads in (4, 1))
    with pytest.raises(ValueError, match=r"missing \(17\).*not in the model \(4\): attention\.att\.bias"):
        load_into(wide, wide.adapted(narrow.state_dict()), "file")
    other = ResNetAttention(task_of(5), 64, layers=(1, 1, 1, 1), planes=(8, 8, 8, 8))
    ours = TINY["resnet 128"](task_of(5))
    with pytest.raises(ValueError, match=r"attention\.att\.weight: \[5, 13, 1, 1\] in the file, \[5, 32, 1, 1\]"):
        load_into(ours, ours.adapted(other.state_dict()), "file")


@pytest.mark.parametrize("name", MODELS)
def test_every_row_can_be_built_and_names_its_head(name):
    entry = MODELS[name]
    with torch.device("meta"):
        model = entry.build()
    assert len(model.state_dict()[entry.head]) == len(model.classes) == 527
    assert len(entry.summary) <= 60
    assert model.specs["audio"].shape == (160_000,)


def test_clips_have_the_recipes_frames():
    assert [clip_fbank(PSLA, seconds).frames for seconds in (10, 5, 1)] == [1056, 544, 160]
    assert [clip_fbank(RECIPES["tagging-mix-0.3"], seconds).frames for seconds in (10, 5, 1)] == [1024, 512, 128]


@pytest.mark.parametrize(
    ("name", "frames", "mean", "deviation"),
    [
        ("psla-b2", 1056, -4.6476, 4.5699 / 2),  # PSLA divides by one deviation, the tagging study by two
        ("psla-mobilenet-v2", 1056, -4.6476, 4.5699 / 2),
        ("psla-b2-tagging", 1024, -3.3458831, 4.1563106),
        ("psla-resnet50-128", 1024, -3.3458831, 4.1563106),
        ("psla-resnet50-64", 400, -29.072655, 40.71728),
    ],
)
def test_every_row_has_the_statistics_that_it_was_trained_with(name, frames, mean, deviation):
    with torch.device("meta"):
        model = MODELS[name].build()
    front_end = model.log_mel if "resnet" in name else model.fbank
    assert (front_end.frames, front_end.mean) == (frames, mean)
    assert front_end.divisor == pytest.approx(2 * deviation)


def test_psla_checkpoints_have_the_older_padding():
    """They were published before efficientnet_pytorch 0.7.1; the tagging study came after it."""
    with torch.device("meta"):
        more = {name: MODELS[name].build().effnet.more for name in ("psla-b2", "psla-b2-mean", "psla-b2-tagging")}
        usual = EfficientNetAttention(task_of()).effnet.more
    assert usual == 0 and more == {"psla-b2": 0, "psla-b2-mean": 0, "psla-b2-tagging": 1}


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="`heads` must be 4, 1, or 0 for a mean over time, got 2"):
        EfficientNetAttention(task_of(5), SMALL, heads=2)
    with torch.device("meta"), pytest.raises(ValueError, match="`seconds` of this model is 10"):
        MODELS["psla-resnet50-64"].build(task_of(5, seconds=5.0))
