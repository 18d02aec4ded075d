"""Networks of timm by name: what timm's own evaluation computes is what comes out here, gradients included."""

import math
import socket
from functools import cache

import pytest
import torch
from torch import nn

from robustav import audit
from robustav.attacks import PGD
from robustav.attacks.ascent import look
from robustav.classifier import AtFeatures, LateFusion, waveform
from robustav.goals import Untargeted
from robustav.models import body_and_head
from robustav.models.body_and_head import BodyAndHead, Pixels
from robustav.models.checkpoints import load_into
from robustav.models.published.mixtures import averaged
from robustav.models.timm_models import _head, from_timm
from robustav.prepare import prepare
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel

extra = pytest.mark.extra("timm")

BATCH = 3
CLASSES = ("bell", "clap", "kick", "hiss")
# Name -> the last layer, and sides of the raw and of the seen picture
NETWORKS = {
    "test_resnet": ("fc", 168, 160),
    "test_vit": ("head", 168, 160),
    "test_efficientnet": ("classifier", 168, 160),
    "test_convnext": ("head.fc", 168, 160),
    "resnet10t": ("fc", 201, 176),
    "levit_128s": (None, 248, 224),  # two heads, whose logits are averaged
}
EVERY = pytest.mark.parametrize("name", NETWORKS)


@cache
def made(name, **settings):
    """Batch norms have statistics of their own."""
    torch.manual_seed(0)
    model = from_timm(name, classes=CLASSES, **settings)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.3, 2.0)
    return model


def batch_of(model, size=BATCH):
    """Smooth pictures of multiples of 1 / 255."""
    count, _, height, width = model.specs["visual"].shape
    coarse = torch.rand(size * count, 3, 5, 5)
    smooth = nn.functional.interpolate(coarse, (height, width), mode="bilinear").unflatten(0, (size, count))
    return {"visual": (255 * (0.1 + 0.8 * smooth)).round() / 255}


@extra
@EVERY
def test_scores_are_those_of_timms_evaluation(name):
    import timm
    from PIL import Image

    model = made(name)
    _, raw, seen = NETWORKS[name]
    assert model.specs["visual"].shape == (1, 3, raw, raw)
    assert (model.classes, model.label_kind, model.training) == (CLASSES, "multiclass", False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model.network), is_training=False)
    inputs = batch_of(model)
    pictures = (255 * inputs["visual"][:, 0]).round().byte().permute(0, 2, 3, 1).numpy()
    x = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    assert x.shape == (BATCH, 3, seen, seen)
    torch.testing.assert_close(model.front_end("visual", inputs["visual"])[:, 0], x, rtol=0, atol=1e-5)
    got, expected = model(inputs), model.network(x)
    tolerance = 1e-4 * expected.abs().max()
    assert (got - expected).abs().max() <= tolerance
    assert (expected - expected.flip(0)).abs().max() > 3 * tolerance, "the network does not look at its inputs"


@extra
@EVERY
def test_the_latent_is_what_the_last_layer_reads(name):
    model = made(name, frames=2)
    head = NETWORKS[name][0]
    assert model.head_name == head
    inputs = batch_of(model)
    trace = model.trace(inputs)
    width = model.network.get_submodule(head).in_features if head else len(CLASSES)
    assert trace.features["visual"].shape == (BATCH, 2, width)
    assert torch.equal(trace.latent, trace.features["visual"].flatten(1))
    if head:
        x = model.front_end("visual", inputs["visual"])[:, 1]
        expected = model.network.forward_head(model.network.forward_features(x), pre_logits=True)
        torch.testing.assert_close(trace.features["visual"][:, 1], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.finish(model.features(inputs)).logits, trace.logits)
    view = AtFeatures(model)
    torch.testing.assert_close(
        view({"visual": model.front_end("visual", inputs["visual"])}), trace.logits, rtol=1e-4, atol=1e-5
    )
    alone = torch.cat([model({"visual": x[None]}) for x in inputs["visual"]])
    torch.testing.assert_close(alone, trace.logits, rtol=1e-4, atol=1e-4)


@extra
@EVERY
@pytest.mark.parametrize("label_kind", ["multiclass", "multilabel"])
def test_frames_are_averaged_as_probabilities(name, label_kind):
    model = made(name, frames=2, label_kind=label_kind)
    assert model.label_kind == label_kind
    inputs = batch_of(model)
    x = model.front_end("visual", inputs["visual"])
    rule = torch.sigmoid if label_kind == "multilabel" else (lambda logits: logits.softmax(1))
    expected = (rule(model.network(x[:, 0])) + rule(model.network(x[:, 1]))) / 2
    torch.testing.assert_close(rule(model(inputs)), expected, rtol=1e-3, atol=1e-5)


@extra
@EVERY
def test_pgd_climbs_within_its_budget(name):
    model = made(name)
    clean = batch_of(model)
    labels = model(clean).argmax(1)
    x = clean["visual"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model({"visual": x}), labels), x)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    threat = ThreatModel({"visual": Budget("linf", 0.02, low=0.0)}, Untargeted("multiclass"))
    adversarial = PGD(4)(prepare(model, clean), clean, labels, threat, draws=draws_for(0, "abc"))
    assert audit.violations(clean, adversarial, threat, model.specs) == [""] * BATCH
    before, after = (look(model, inputs, labels, threat).loss for inputs in (clean, adversarial))
    assert (after > before).all()


@extra
@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_frames_of_ones_own_size_are_seen_whole(name):
    """A transformer's position table is made for them."""
    model = made(name, size=48)
    if "vit" in name:
        assert model.network.pos_embed.shape[1] == 1 + 3 * 3
    assert model.specs["visual"].shape == (1, 3, 48, 48)
    x = torch.rand(1, 1, 3, 48, 48)
    seen = model.front_end("visual", x)
    config = model.network.pretrained_cfg
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(seen, (x - mean) / std)
    torch.testing.assert_close(model({"visual": x}), model.network(seen[:, 0]), rtol=1e-4, atol=1e-5)


@extra
def test_a_checkpoint_of_timms_fits_the_network():
    import timm

    torch.manual_seed(1)
    theirs = timm.create_model("test_resnet", num_classes=len(CLASSES)).eval()
    model = from_timm("test_resnet", classes=CLASSES)
    load_into(model.network, theirs.state_dict(), "theirs")
    inputs = batch_of(model)
    x = model.front_end("visual", inputs["visual"])[:, 0]
    torch.testing.assert_close(model(inputs), theirs(x), rtol=1e-4, atol=1e-5)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"network"}
    with pytest.raises(ValueError, match=r"other shape \(2\): fc.bias: \[4\] in the file, \[3\] in the model"):
        load_into(from_timm("test_resnet", classes=CLASSES[:3]).network, theirs.state_dict(), "theirs")


@extra
def test_nothing_is_downloaded(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    from_timm("test_vit.r160_in1k", classes=CLASSES)
    for name in ("hf_hub:timm/test_vit", "hf-hub:timm/test_vit", "local-dir:somewhere"):
        with pytest.raises(ValueError, match="timm has no model"):
            from_timm(name)


@extra
def test_classes_are_numbers_unless_told():
    model = from_timm("test_resnet")
    assert model.classes == tuple(map(str, range(1000)))
    with pytest.raises(ValueError, match="`classes` must be given for 'vit_small_patch14_dinov2'"):
        from_timm("vit_small_patch14_dinov2")


@extra
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet", {}, r"timm has no model 'resnet': did you mean .*resnet"),
        ("-", {}, r"timm has no model '-': timm.list_models\(\) gives their names"),
        ("test_vit.mine", {}, r"timm cannot make 'test_vit.mine': Invalid pretrained tag"),
        ("test_vit", {"size": 50}, r"timm cannot make 'test_vit'|'test_vit' cannot classify a picture of 50 x 50"),
        ("test_resnet", {"label_kind": "both"}, r"`label_kind` must be 'multilabel' or 'multiclass', got 'both'"),
        ("test_resnet", {"frames": 0}, r"`shape` must have positive sizes"),
        ("test_resnet", {"size": 0}, r"`size` must be at least 1 pixel, got 0"),
    ],
)
def test_what_cannot_be_had_is_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        from_timm(name, classes=CLASSES, **settings)


class Odd(nn.Module):
    """A network whose `pre_logits` are not quite what its last layer reads, or whose logits are not what it returns."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.head = kind, nn.Conv2d(3, 4, 1) if kind == "convolution" else nn.Linear(3, 4)

    def get_classifier(self):
        return self.head

    def forward_features(self, x):
        return x.mean((2, 3), keepdim=self.kind == "convolution")

    def forward_head(self, x, pre_logits=False):
        if pre_logits:
            return {"convolution": x.flatten(1), "scaled": 2 * x, "sequence": x[:, None]}.get(self.kind, x)
        return {"convolution": self.head(x).flatten(1), "doubled": 2 * self.head(x)}.get(self.kind, self.head(x))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize(
    ("kind", "head"),
    [("plain", "head"), ("convolution", None), ("scaled", None), ("sequence", None), ("doubled", None)],
)
def test_a_last_layer_is_taken_only_where_it_gives_the_logits(kind, head):
    network = Odd(kind)
    assert _head(network, kind, 4, (8, 6)) == head
    assert not network.head._forward_hooks
    with pytest.raises(ValueError, match=f"'{kind}' does not give one score a class"):
        _head(network, kind, 5, (8, 6))


def test_timm_is_not_installed(monkeypatch):
    monkeypatch.setattr(body_and_head, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"timm is not installed: pip install 'robustav\[timm\]'"):
        from_timm("resnet18")


def test_pooled_scores_by_hand_and_where_probabilities_saturate():
    logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]], dtype=torch.float64)
    multiclass = averaged(logits, "multiclass").softmax(1)
    by_hand = (math.exp(2) / (math.exp(2) + math.exp(-1)) + 1 / (1 + math.exp(3))) / 2
    assert multiclass[0, 0].item() == pytest.approx(by_hand)
    multilabel = averaged(logits, "multilabel").sigmoid()
    assert multilabel[0, 0].item() == pytest.approx((1 / (1 + math.exp(-2)) + 0.5) / 2)
    for kind in ("multiclass", "multilabel"):
        assert torch.equal(averaged(logits[:, :1], kind), logits[:, 0])
        far = torch.tensor([[[200.0, 0.0], [190.0, 0.0]]], requires_grad=True)
        (gradient,) = torch.autograd.grad(averaged(far, kind).diff().sum(), far)
        assert gradient.isfinite().all()
        assert (gradient.abs().sum((0, 1)) > 0).all()


def test_pixels_are_cut_and_normalised_by_hand():
    x = torch.arange(2 * 3 * 5 * 4).reshape(1, 2, 3, 5, 4).float()
    front = Pixels((2, 3), (1, 1), mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0), scale=0.5)
    got = front(x)
    assert got.shape == (1, 2, 3, 2, 3)
    assert got[0, 1, 2, 0, 0] == (0.5 * x[0, 1, 2, 1, 1] - 3) / 4
    assert got[0, 0, 1, 1, 2] == (0.5 * x[0, 0, 1, 2, 3] - 2) / 2
    assert not front.state_dict()


def test_of_one_modality_it_is_a_late_fusion():
    network = nn.ModuleDict({"body": nn.Linear(8, 5), "head": nn.Linear(5, 2)})
    model = BodyAndHead(
        network,
        embed=lambda network, x: network["body"](x),
        head="head",
        front=nn.Tanh(),
        modality="audio",
        spec=waveform(0.0005),
        classes=("a", "b"),
        label_kind="multilabel",
    )
    late = LateFusion(
        {"audio": network["body"]},
        network["head"],
        specs={"audio": waveform(0.0005)},
        classes=("a", "b"),
        front_ends={"audio": nn.Tanh()},
    )
    inputs = {"audio": torch.rand(3, 8)}
    torch.testing.assert_close(model(inputs), late(inputs))
    torch.testing.assert_close(model.trace(inputs).latent, late.trace(inputs).latent)
