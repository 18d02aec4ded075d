"""Picture classifiers of timm, by name and with weights of one's own, as functions of raw frames."""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from robustav.classifier import InputSpec, LabelKind, frames
from robustav.models.body_and_head import BodyAndHead, Pixels, optional


def from_timm(
    name: str,
    *,
    classes: Sequence[str] | None = None,
    label_kind: LabelKind = "multiclass",
    frames: int = 1,
    size: int | None = None,
) -> BodyAndHead:
    """A network of timm with random weights, in eval mode; a checkpoint of timm's fits its `network`.

    Frames are as timm's evaluation has them before it crops: `input size / crop_pct` pixels, of which the network sees
    the centre. With `size` it sees the whole of frames of that size. Without `classes` they are numbers, as many as the
    published weights tell apart. The latent is what timm calls `pre_logits`; of the few networks whose logits are not
    one layer away from it (two heads, a convolution), it is the logits.
    """
    timm = optional("timm")
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() gives their names"
        raise ValueError(f"timm has no model {name!r}: {hint}")
    if size is not None and size < 1:
        raise ValueError(f"`size` must be at least 1 pixel, got {size}")
    try:
        usual = timm.get_pretrained_cfg(name)
        names = _numbers(name, usual.num_classes if usual else 1000) if classes is None else tuple(classes)
        fixed = usual is not None and usual.fixed_input_size
        network = timm.create_model(name, pretrained=False, num_classes=len(names), img_size=size if fixed else None)
    except (RuntimeError, TypeError, AssertionError) as error:  # unknown tags, sizes that no patches fill
        raise ValueError(f"timm cannot make {name!r}: {error}") from error
    spec, pixels = _front(timm.data.resolve_model_data_config(network), frames, size)
    head = _head(network.eval(), name, len(names), pixels.size)
    return BodyAndHead(
        network,
        embed=_pre_logits if head else nn.Module.__call__,
        head=head,
        front=pixels,
        modality="visual",
        spec=spec,
        classes=names,
        label_kind=label_kind,
        by_frame=True,
    ).eval()


def _numbers(name: str, count: int) -> tuple[str, ...]:
    if not count:
        raise ValueError(f"`classes` must be given for {name!r}: its published weights tell none apart")
    return tuple(map(str, range(count)))


def _front(config: Mapping[str, Any], count: int, size: int | None) -> tuple[InputSpec, Pixels]:
    height, width = config["input_size"][1:] if size is None else (size, size)
    share = config["crop_pct"] if size is None else 1.0
    tall, wide = math.floor(height / share), math.floor(width / share)
    margin = (round((tall - height) / 2), round((wide - width) / 2))
    return frames(count, tall, wide), Pixels((height, width), margin, mean=config["mean"], std=config["std"])


def _pre_logits(network: nn.Module, x: Tensor) -> Tensor:
    features = network.forward_features(x)  # type: ignore[operator]
    return network.forward_head(features, pre_logits=True)  # type: ignore[operator]


def _head(network: nn.Module, name: str, classes: int, size: tuple[int, int]) -> str | None:
    """The name of the module that turns timm's `pre_logits` into its logits, if there is one: tried on one picture."""
    last = network.get_classifier()  # type: ignore[operator]
    known = next((key for key, module in network.named_modules() if key and module is last), None)
    picture = torch.linspace(-1, 1, 3 * size[0] * size[1]).reshape(1, 3, *size)
    caught: list[tuple[Tensor, Tensor]] = []
    handle = last.register_forward_hook(lambda _, given, made: caught.append((given[0], made))) if known else None
    try:
        with torch.no_grad():
            logits = network(picture)
            vector = _pre_logits(network, picture) if known else logits
    except Exception as error:  # of a size that it cannot see, or no classifier of pictures at all
        raise ValueError(f"{name!r} cannot classify a picture of {size[0]} x {size[1]}: {error}") from error
    finally:
        if handle:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.shape != (1, classes):
        raise ValueError(f"{name!r} does not give one score a class: wrap what it gives (robustav.classifier.Wrapped)")
    if not caught or caught[0][0].shape != vector.shape:
        return None
    read, made = caught[0]
    return known if torch.allclose(read, vector, rtol=1e-4, atol=1e-5) and torch.equal(made, logits) else None
