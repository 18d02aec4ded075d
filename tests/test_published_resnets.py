"""Residual networks over log-mels and over pictures, against the official numbers, names and sizes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from published import drawn, loaded, numbers, published_shapes, task_of
from safetensors.torch import load_file, save_file
from torch import nn

from robustav.classifier import AtFeatures
from robustav.models.checkpoints import load_into
from robustav.models.published import audio_resnet, video_resnet
from robustav.models.published.audio_resnet import AudioResNet
from robustav.models.published.resnet import ResNetTrunk
from robustav.models.published.video_resnet import FrameBlock, VideoResNet
from robustav.prepare import fold_batch_norms

MODELS = {**audio_resnet.MODELS, **video_resnet.MODELS}
OFFICIAL = {
    "audio_resnet34": "audio-resnet34",
    "audio_resnet50": "audio-resnet50",
    "audio_wide_resnet50_2": "audio-wide-resnet50-2",
}
# Parameters of the ImageNet networks as torchvision's documentation has them, with 3 channels and 1000 classes.
IMAGENET = {
    "resnet18": (11_689_512, "basic", (2, 2, 2, 2), {}),
    "resnet34": (21_797_672, "basic", (3, 4, 6, 3), {}),
    "resnet50": (25_557_032, "bottleneck", (3, 4, 6, 3), {}),
    "resnet101": (44_549_160, "bottleneck", (3, 4, 23, 3), {}),
    "resnet152": (60_192_808, "bottleneck", (3, 8, 36, 3), {}),
    "resnext50-32x4d": (25_028_904, "bottleneck", (3, 4, 6, 3), {"groups": 32, "width_per_group": 4}),
    "resnext101-32x8d": (88_791_336, "bottleneck", (3, 4, 23, 3), {"groups": 32, "width_per_group": 8}),
    "wide-resnet50-2": (68_883_240, "bottleneck", (3, 4, 6, 3), {"width_per_group": 128}),
    "wide-resnet101-2": (126_886_696, "bottleneck", (3, 4, 23, 3), {"width_per_group": 128}),
}
PLANES = (8, 16, 32, 64)


def with_statistics(model):
    """In eval mode, with batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
            ):
                tensor.uniform_(low, high)
    return model.eval()


def tiny_audio():
    return with_statistics(AudioResNet(task_of(5, seconds=1.0), "bottleneck", (1, 2, 1, 1), planes=PLANES))


def tiny_video():
    task = task_of(5, frames=2, size=32)
    return with_statistics(VideoResNet(task, "basic", (1, 1, 1, 1), planes=PLANES, hidden=16, heads=2))


TINY = {"audio": tiny_audio, "visual": tiny_video}


@pytest.fixture(scope="module", params=TINY)
def tiny(request):
    torch.manual_seed(0)
    return TINY[request.param]()


def raw(model, clips=2):
    generator = torch.Generator().manual_seed(5)
    return {
        m: (spec.low + (spec.high - spec.low) * torch.rand(clips, *spec.shape, generator=generator))
        for m, spec in model.specs.items()
    }


def from_recipe(build):
    """The model with the recipe's weights, and no time spent on others. Its front end has no numbers."""
    with torch.device("meta"):
        model = build()
    state = {key: drawn(key, tuple(x.shape)) for key, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def parameters(model):
    return sum(x.numel() for x in model.parameters())


# The official numbers, each at its stated tolerance.


def check_audio(fixture, model):
    x = fixture["in.x"].requires_grad_()
    logits = model.finish({"audio": model.encode("audio", x)}).logits
    loss = F.binary_cross_entropy_with_logits(logits, fixture["in.y"])
    fixture.close(logits.sigmoid(), "out.global_prob")
    fixture.close(loss, "out.bce")
    fixture.close(torch.autograd.grad(loss, x)[0], "grad.x")


def test_a_small_audio_resnet_is_the_official_one(shared):
    fixture = numbers(shared, "audio_resnet_tiny")
    layers, planes = (tuple(fixture.config[key]) for key in ("layers", "planes"))
    check_audio(fixture, loaded(AudioResNet(task_of(20), "bottleneck", layers, planes=planes), fixture.state))


@pytest.mark.parametrize("name", ["audio_resnet50", "audio_wide_resnet50_2"])
def test_audio_resnets_are_the_official_ones(name, shared):
    fixture, maps = numbers(shared, name), {}
    model = from_recipe(MODELS[OFFICIAL[name]].build).requires_grad_(False)
    for layer in ("layer1", "layer4"):
        model.get_submodule(layer).register_forward_hook(
            lambda _, given, made, layer=layer: maps.update({layer: made.mean(1)})
        )
    check_audio(fixture, model)
    fixture.close(maps["layer1"], "out.layer1_mean")
    fixture.close(maps["layer4"], "out.layer4_mean")


def test_the_video_resnet_is_the_official_one(shared):
    fixture = numbers(shared, "video_raw_resnet34")
    task = task_of(fixture.config["n_output"], frames=5, size=64)
    model = from_recipe(lambda: VideoResNet(task, hidden=fixture.config["n_hidden"]))
    frames = fixture["in.frames"]
    with torch.no_grad():
        fixture.close(model.video_bb(frames.flatten(0, 1)).mean((2, 3)), "out.frame_features")
        fixture.close(model.finish({"visual": model.encode("visual", frames)}).logits, "out.logits")


def test_the_frame_block_is_the_official_one_and_a_masked_frame_is_an_absent_one(shared):
    fixture = numbers(shared, "video_raw_transformer_block")
    block = FrameBlock(*(fixture.config[key] for key in ("hidden_dim", "heads", "ffn")))
    load_into(block, fixture.state, "fixture")
    ours = torch.zeros_like(fixture["out.y"])
    for clip, present in enumerate(fixture["in.mask"].sum(1).tolist()):
        with torch.no_grad():
            ours[clip, :present] = block(fixture["in.x"][clip : clip + 1, :present])[0]
    fixture.close(ours, "out.y")


# Names and sizes.


@pytest.mark.parametrize("official", OFFICIAL)
def test_state_dicts_have_the_official_names_and_shapes(official, shared):
    with torch.device("meta"):
        model = MODELS[OFFICIAL[official]].build()
    shapes = {key: list(x.shape) for key, x in model.state_dict().items()}
    assert shapes == published_shapes(shared, official)
    assert list(shapes) == list(published_shapes(shared, official))


@pytest.mark.parametrize("name", IMAGENET)
def test_trunks_have_the_published_number_of_parameters(name):
    count, block, layers, sizes = IMAGENET[name]
    with torch.device("meta"):
        trunk, entry = ResNetTrunk(block, layers, **sizes), MODELS[f"audio-{name}"]
        model = entry.build()
    assert parameters(trunk) + 1000 * (trunk.width + 1) == count
    of_colour, heads = 2 * 64 * 7 * 7, 2 * 527 * (trunk.width + 1)
    assert parameters(model) == parameters(trunk) - of_colour + heads
    assert len(model.state_dict()[entry.head]) == 527


@pytest.mark.parametrize(("name", "trunk"), [("video-resnet34", "resnet34"), ("video-resnet152", "resnet152")])
def test_the_video_trunk_is_numbered(name, trunk):
    count = IMAGENET[trunk][0]
    with torch.device("meta"):
        model = MODELS[name].build()
    assert {key.split(".")[1] for key in model.state_dict() if key.startswith("video_bb.")} == set("014567")
    assert parameters(model.video_bb) == count - 1000 * (model.hidden1.in_features + 1)
    assert len(model.state_dict()[MODELS[name].head]) == 527
    assert model.specs["visual"].shape == (5, 3, 224, 224)


def test_ten_seconds_are_twenty_five_steps():
    model = AudioResNet(task_of(5), "basic", (1, 1, 1, 1), planes=PLANES).eval()
    with torch.no_grad():
        heard = model.front_end("audio", torch.rand(1, *model.specs["audio"].shape))
        assert heard.shape == (1, 400, 64)
        assert model.encode("audio", heard).shape == (1, 25, 64)


def test_a_trunk_with_the_usual_stem_reduces_32_times():
    with torch.device("meta"):
        trunk = ResNetTrunk("bottleneck", (1, 1, 1, 1), channels=1)
        assert trunk(torch.zeros(2, 1, 128, 1024)).shape == (2, trunk.width, 4, 32)


def test_weights_survive_a_file(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    other = loaded(TINY[next(iter(tiny.specs))](), state)
    assert list(other.state_dict()) == list(tiny.state_dict())
    assert all(torch.equal(x, state[key]) for key, x in other.state_dict().items())


def test_counters_that_old_files_lack_are_put_in(tiny):
    own = tiny.state_dict()
    old = {key: x for key, x in own.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(own)
    load_into(tiny, tiny.adapted(old), "old file")
    again = tiny.adapted(own)
    assert again.keys() == own.keys()
    assert all(torch.equal(x, own[key]) for key, x in again.items())


def test_another_size_is_refused_by_name(tiny):
    larger = {key: torch.zeros(*x.shape, 2) if x.ndim == 4 else x for key, x in tiny.state_dict().items()}
    larger["extra"] = torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"not in the model \(1\): extra; other shape .*conv1\.weight|video_bb\.0\.weight"
    ):
        load_into(tiny, tiny.adapted(larger), "file")


def test_convolutions_start_as_in_the_paper_and_norms_as_nothing():
    trunk = ResNetTrunk("bottleneck", (1, 1, 1, 1), channels=1)
    for convolution in (trunk.conv1, trunk.layer2[0].conv2, trunk.layer3[0].conv3):
        fan_out = convolution.out_channels * convolution.weight[0, 0].numel()
        assert convolution.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert (trunk.layer4[0].bn3.weight == 1).all()
    assert (trunk.layer4[0].bn3.bias == 0).all()


# What every classifier must do.


def test_stages_add_up_and_raw_inputs_have_gradients(tiny):
    inputs = {m: x.requires_grad_() for m, x in raw(tiny).items()}
    trace = tiny.trace(inputs)
    assert trace.logits.shape == (2, 5)
    assert trace.logits.isfinite().all()
    assert torch.equal(tiny.finish(tiny.features(inputs)).logits, tiny(inputs))
    assert torch.equal(tiny.classify(trace.latent), trace.logits)
    for gradient in torch.autograd.grad(trace.logits.square().sum(), list(inputs.values())):
        assert gradient.isfinite().all()
        assert all((gradient != 0).flatten(1).any(1))


def test_batch_mates_do_not_matter_and_features_can_be_attacked(tiny):
    inputs = raw(tiny, clips=3)
    with torch.no_grad():
        together = tiny(inputs)
        alone = torch.cat([tiny({m: x[i : i + 1] for m, x in inputs.items()}) for i in range(3)])
        view = AtFeatures(tiny)
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)
        assert torch.equal(view(view.front_ends(inputs)), together)


def test_half_precision_is_about_the_same(tiny):
    inputs = raw(tiny)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = tiny(inputs).float()
    with torch.no_grad():
        full = tiny(inputs)
    assert half.isfinite().all()
    assert (half - full).abs().max() <= 0.05 * full.abs().max()


def test_batch_norms_fold_and_scores_stay(tiny):
    folded = copy.deepcopy(tiny)
    fold_batch_norms(folded)
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left == (["bn1"] if "audio" in tiny.specs else [])
    with torch.no_grad():
        torch.testing.assert_close(folded(raw(tiny)), tiny(raw(tiny)), rtol=1e-4, atol=1e-4)


def test_frames_hear_of_one_another_in_any_order():
    model = tiny_video()
    with torch.no_grad():
        pixels = model.front_end("visual", raw(model)["visual"])
        together = model.encode("visual", pixels)
        torch.testing.assert_close(model.encode("visual", pixels.flip(1)), together)
        alone = torch.stack([model.encode("visual", pixels[:, i : i + 1]) for i in range(2)])
        assert (alone.mean(0) - together).abs().max() > 1e-4 * together.abs().max()


def test_pixels_have_the_statistics_of_imagenet():
    model = tiny_video()
    grey = model.front_end("visual", torch.full((1, *model.specs["visual"].shape), 0.5))
    assert grey[0, 0, :, 0, 0].tolist() == pytest.approx([0.015 / 0.229, 0.044 / 0.224, 0.094 / 0.225])


def test_what_does_not_fit_is_refused():
    for sizes in ({"groups": 32}, {"width_per_group": 128}):
        with pytest.raises(ValueError, match="`groups` and `width_per_group` must be 1 and 64 for basic blocks"):
            ResNetTrunk("basic", (1, 1, 1, 1), **sizes)
