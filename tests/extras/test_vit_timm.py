"""Vision transformers as timm has them: the same state dict, the same scores and gradients."""

import pytest
import torch

from robustav.models.checkpoints import load_into
from robustav.models.entry import Task
from robustav.models.published.vit import MODELS, resampled

pytestmark = pytest.mark.extra("timm")


def pair(ours, theirs, size=224, **settings):
    """A row of ours with the weights of timm's network, every one of them random, and that network."""
    import timm

    network = timm.create_model(theirs, pretrained=False, num_classes=20, img_size=size, **settings).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    task = Task(classes=tuple(map(str, range(20))), label_kind="multiclass", frames=1, size=size)
    model = MODELS[ours].build(task).eval()
    load_into(model, model.adapted(network.state_dict()), theirs)
    return model, network


def agree(model, network, size=224):
    x = torch.rand(2, 1, 3, size, size, requires_grad=True)
    pixels = model.front_end("visual", x)
    ours, theirs = model({"visual": x}), network(pixels[:, 0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    direction = torch.randn_like(ours)
    gradients = [torch.autograd.grad(y, x, direction, retain_graph=True)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("vit-tiny", "vit_tiny_patch16_224"),
        ("vit-small", "vit_small_patch16_224"),
        ("vit-small-32", "vit_small_patch32_224"),
        ("deit-tiny", "deit_tiny_patch16_224"),
    ],
)
def test_scores_are_timm_s(ours, theirs):
    agree(*pair(ours, theirs))


def test_the_mean_readout_is_timm_s():
    agree(*pair("mae-vit-base", "vit_base_patch16_224", 64, global_pool="avg"), 64)


@pytest.mark.parametrize("side", [14, 20])
def test_larger_position_tables_are_timm_s(side):
    """Without the low-pass filter that timm adds since the papers, and that matters where a table shrinks."""
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, 1 + 14**2, 32)
    theirs = resample_abs_pos_embed(table, new_size=[side, side], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(resampled(table, side), theirs, rtol=0, atol=1e-6)
