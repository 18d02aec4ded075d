"""Vision transformers over frames: a second route to their scores, averages by hand, tables of other sizes."""

import pytest
import torch
import torch.nn.functional as F
from published import loaded, task_of
from safetensors.torch import load_file, save_file
from torch import nn

from robustav.classifier import AtFeatures
from robustav.image import IMAGENET_MEAN, IMAGENET_STD
from robustav.models.checkpoints import load_into
from robustav.models.published.vit import MODELS, Vit, resampled

TINY = {"patch": 8, "dim": 24, "depth": 2, "heads": 3}
WB = ("weight", "bias")
# What the papers state [arXiv:2012.12877, table 1; 2106.10270; 2010.11929, table 1], in millions.
MILLIONS = {
    "vit-tiny": 5.7,
    "deit-tiny": 5.7,
    "deit-small": 22.1,
    "deit-base": 86.6,
    "vit-large": 304,
    "vit-huge-14": 632,
}


def tiny(label_kind="multiclass", *, count=3, size=24, **settings):
    """Every tensor of its own, so that none can be left out unnoticed."""
    model = Vit(task_of(5, frames=count, size=size, label_kind=label_kind), **{**TINY, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def clips(batch=2, count=3, size=24):
    return torch.rand(batch, count, 3, size, size)


def by_another_route(state, pixels, heads, patch):
    """Class scores of normalised pictures, from the state dict alone: cut patches, `nn.MultiheadAttention`."""
    dim = state["cls_token"].shape[2]
    cut = F.unfold(pixels, patch, stride=patch).transpose(1, 2)
    tokens = cut @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    tokens = torch.cat([state["cls_token"].repeat(len(pixels), 1, 1), tokens], dim=1) + state["pos_embed"]

    def normed(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    for i in range(sum(key.endswith("norm1.weight") for key in state)):
        of = {key.removeprefix(f"blocks.{i}."): value for key, value in state.items()}
        attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        attention.load_state_dict(
            {
                "in_proj_weight": of["attn.qkv.weight"],
                "in_proj_bias": of["attn.qkv.bias"],
                "out_proj.weight": of["attn.proj.weight"],
                "out_proj.bias": of["attn.proj.bias"],
            }
        )
        x = normed(tokens, f"blocks.{i}.norm1")
        tokens = tokens + attention(x, x, x)[0]
        x = normed(tokens, f"blocks.{i}.norm2") @ of["mlp.fc1.weight"].T + of["mlp.fc1.bias"]
        x = x * (1 + torch.erf(x / 2**0.5)) / 2
        tokens = tokens + x @ of["mlp.fc2.weight"].T + of["mlp.fc2.bias"]
    reads = {
        "norm.weight": lambda: normed(tokens, "norm")[:, 0],
        "fc_norm.weight": lambda: normed(tokens[:, 1:].mean(1), "fc_norm"),
    }
    (read,) = [reads[key]() for key in reads if key in state]
    return read @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("readout", ["token", "mean"])
@pytest.mark.parametrize("label_kind", ["multiclass", "multilabel"])
def test_another_route_gives_the_same_scores_and_gradients(readout, label_kind):
    model = tiny(label_kind, readout=readout)
    x = clips().requires_grad_()
    frames = by_another_route(model.state_dict(), 2 * x.flatten(0, 1) - 1, 3, 8).unflatten(0, (2, 3))
    ours = model({"visual": x})
    if label_kind == "multiclass":
        probabilities, theirs = ours.exp(), frames.softmax(2).mean(1)
    else:
        probabilities, theirs = ours.sigmoid(), frames.sigmoid().mean(1)
    torch.testing.assert_close(probabilities, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(p[:, 0].sum(), x, retain_graph=True)[0] for p in (probabilities, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0].flatten(2).any(2).all()


@pytest.mark.parametrize("label_kind", ["multiclass", "multilabel"])
def test_one_frame_has_the_network_s_own_logits(label_kind):
    model = tiny(label_kind, count=1)
    x = clips(count=1)
    frames = by_another_route(model.state_dict(), 2 * x[:, 0] - 1, 3, 8)
    torch.testing.assert_close(model({"visual": x}), frames, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label_kind", ["multiclass", "multilabel"])
def test_a_class_that_no_frame_shows_keeps_a_gradient(label_kind):
    model = tiny(label_kind)
    latent = model.trace({"visual": clips()}).latent.detach().requires_grad_()
    with torch.no_grad():
        model.head.bias[0] -= 1000.0  # in float32, its probability is 0
    logits = model.classify(latent)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), latent)
    assert logits.isfinite().all() and (logits[:, 0] < -900).all()
    assert gradient.isfinite().all() and (gradient.norm(dim=1) > 0.1).all()


def test_weights_are_first_what_the_paper_says():
    model = Vit(task_of(5, size=24), **TINY)
    for table in (model.cls_token, model.pos_embed, model.blocks[1].attn.qkv.weight, model.blocks[0].mlp.fc2.weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.5)
    assert not model.blocks[0].attn.qkv.bias.any() and not model.blocks[1].mlp.fc1.bias.any()


@pytest.mark.parametrize("mean", [(0.5, 0.5, 0.5), IMAGENET_MEAN])
def test_pixels_are_normalised_as_asked(mean):
    x = clips()
    model = tiny(mean=mean, std=IMAGENET_STD)
    channels = [(x[:, :, c] - mean[c]) / IMAGENET_STD[c] for c in range(3)]
    torch.testing.assert_close(model.front_end("visual", x), torch.stack(channels, dim=2))


# Files.


@pytest.mark.parametrize("name", MODELS)
def test_every_row_can_be_built(name):
    entry = MODELS[name]
    with torch.device("meta"):
        model = entry.build()
    state = model.state_dict()
    assert len(entry.summary) <= 60
    assert state[entry.head].shape[0] == 1000
    assert ("fc_norm.weight" in state) is name.startswith("mae-")
    assert model.classes[7] == "ImageNet 007"
    if name in MILLIONS:
        without_head = name in ("vit-large", "vit-huge-14")
        count = sum(v.numel() for k, v in state.items() if not (without_head and k.startswith("head.")))
        assert count / 1e6 == pytest.approx(MILLIONS[name], rel=5e-3)


def test_keys_are_those_of_public_checkpoints():
    block = [
        f"{part}.{end}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for end in WB
    ]
    outer = ["cls_token", "pos_embed", *(f"{part}.{end}" for part in ("patch_embed.proj", "head") for end in WB)]
    for readout, norm in (("token", "norm"), ("mean", "fc_norm")):
        expected = {*outer, *(f"{norm}.{end}" for end in WB), *(f"blocks.{i}.{key}" for i in range(2) for key in block)}
        assert tiny(readout=readout).state_dict().keys() == expected


def test_a_saved_model_is_the_same_when_it_is_loaded(tmp_path):
    model = tiny()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    other = loaded(tiny(), state)
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


def test_frames_of_another_size_stretch_the_position_table():
    small, large = tiny(size=24), tiny(size=48)
    state = small.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in small.adapted(state).items())
    adapted = large.adapted(state)
    assert adapted["pos_embed"].shape == (1, 37, 24)
    assert torch.equal(adapted["pos_embed"][:, 0], state["pos_embed"][:, 0])
    again = large.adapted(adapted)
    assert all(torch.equal(v, adapted[k]) for k, v in again.items())
    assert loaded(large, state)({"visual": clips(size=48)}).isfinite().all()


def test_a_table_is_stretched_by_cubic_convolution_along_each_side():
    """[Keys, 1981] with the slope of -3/4 that PyTorch shares with image libraries; edges are repeated."""
    table = torch.randn(1, 1 + 8**2, 4)
    centres = (torch.arange(12.0) + 0.5) * 8 / 12 - 0.5
    away = (centres[:, None] - torch.arange(-3.0, 11.0)).abs()
    near, far = 1.25 * away**3 - 2.25 * away**2 + 1, -0.75 * (away**3 - 5 * away**2 + 8 * away - 4)
    weights = torch.where(away <= 1, near, torch.where(away < 2, far, 0))
    along = torch.zeros(12, 8).index_add(1, torch.arange(-3, 11).clamp(0, 7), weights)
    expected = torch.einsum("ai,bj,ijd->abd", along, along, table[0, 1:].unflatten(0, (8, 8)))
    stretched = resampled(table, 12)
    assert torch.equal(stretched[:, 0], table[:, 0])
    torch.testing.assert_close(stretched[0, 1:].unflatten(0, (12, 12)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 48}, r"other shape \(\d+\): .*\[24\] in the file, \[48\] in the model"),
        ({"readout": "mean"}, r"missing \(2\): fc_norm.bias, fc_norm.weight; not in the model \(2\): norm.bias"),
        ({"depth": 3}, r"missing \(12\): blocks.2"),
    ],
)
def test_a_file_of_another_kind_is_refused(change, message):
    model = tiny(**change)
    with pytest.raises(ValueError, match=message):
        load_into(model, model.adapted(tiny().state_dict()), "file")


def test_a_table_of_no_square_grid_is_left_for_loading_to_name():
    model, state = tiny(), tiny().state_dict()
    state["pos_embed"] = torch.zeros(1, 18, 24)  # 16 patches and two leading tokens, as with distillation
    with pytest.raises(ValueError, match=r"other shape \(1\): pos_embed: \[1, 18, 24\] in the file, \[1, 10, 24\]"):
        load_into(model, model.adapted(state), "file")


# What holds for every classifier.


def test_stages_make_the_whole():
    model, inputs = tiny("multilabel"), {"visual": clips()}
    trace = model.trace(inputs)
    assert trace.features["visual"].shape == (2, 3, 24)
    assert trace.latent.shape == (2, 72)
    assert torch.equal(model.finish(model.features(inputs)).logits, trace.logits)
    view = AtFeatures(model)
    torch.testing.assert_close(view(view.front_ends(inputs)), trace.logits)


def test_clips_and_frames_do_not_mix():
    model, x = tiny(), clips(3)
    torch.testing.assert_close(model({"visual": x})[1:2], model({"visual": x[1:2]}), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model({"visual": x}), model({"visual": x.flip(1)}), rtol=1e-4, atol=1e-5)
    other = x.clone()
    other[:, 1] = 1 - other[:, 1]
    before, after = (model.features({"visual": y})["visual"] for y in (x, other))
    torch.testing.assert_close(before[:, [0, 2]], after[:, [0, 2]])
    assert ((before - after)[:, 1].abs().amax(1) > 1e-3).all()


def test_half_precision_is_close():
    model, inputs = tiny(), {"visual": clips()}
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(inputs)
    torch.testing.assert_close(rough.float(), model(inputs), rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(readout="last"), r"`readout` must be one of \['token', 'mean'\], got 'last'"),
        (lambda: tiny(size=28), "`size` of frames must be a multiple of the patches' 8, got 28"),
        (lambda: tiny(mean=(0.5,)), "`mean` and `std` must be three numbers each"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
