"""A residual network over a clip's pictures: trunk, mean over frames, two hidden layers."""

from collections.abc import Mapping

import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import Classifier, frames
from robustav.image import ImageFrontEnd
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.resnet import Block, ResNetTrunk, with_counts


class WideHeads(nn.Module):
    """Self-attention in which every head has the full width, so that queries, keys and values are `heads` times as wide."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_lin, self.k_lin, self.v_lin = (nn.Linear(dim, heads * dim) for _ in range(3))
        self.out_lin = nn.Linear(heads * dim, dim)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        query, key, value = (
            layer(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_lin, self.k_lin, self.v_lin)
        )
        return self.out_lin(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Hidden(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        return self.lin2(F.gelu(self.lin1(tokens)))


class FrameBlock(nn.Module):
    """A transformer block over frames. Its residuals are not normalised: the norms are in the files, and unused.

    The official mask of absent frames is not here: they take no part, so leave them out.
    """

    def __init__(self, dim: int, heads: int, hidden: int = 2048) -> None:
        super().__init__()
        self.mha, self.ffn = WideHeads(dim, heads), Hidden(dim, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, tokens: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        tokens = tokens + self.mha(tokens)
        return tokens + self.ffn(tokens)


class VideoResNet(Published, Classifier):
    """An ImageNet trunk over raw pixels [Li et al., 2022, arXiv:2203.12122], the mean of its frames, a head with a skip.

    With `heads`, frames attend to one another before the mean. The description says neither where that block stands nor
    what its entries are called: here they begin with `transformer.`.
    """

    def __init__(
        self,
        task: Task,
        block: Block = "basic",
        layers: tuple[int, int, int, int] = (3, 4, 6, 3),
        *,
        planes: tuple[int, int, int, int] = (64, 128, 256, 512),
        hidden: int = 1024,
        heads: int = 0,
    ) -> None:
        super().__init__()
        self.specs, self.classes = {"visual": frames(task.frames, task.size)}, task.classes
        self.label_kind = task.label_kind
        self.pixels = ImageFrontEnd(size=task.size)
        trunk = ResNetTrunk(block, layers, planes=planes)
        self.video_bb = nn.Sequential(*trunk.children())
        self.transformer = FrameBlock(trunk.width, heads) if heads else nn.Identity()
        self.hidden1, self.hidden2 = nn.Linear(trunk.width, hidden), nn.Linear(hidden, hidden)
        self.predict = nn.Linear(hidden, len(task.classes))

    def front_end(
        self, modality: str, raw: Float[Tensor, "batch frame 3 height width"]
    ) -> Float[Tensor, "batch frame 3 height width"]:
        return self.pixels(raw)

    def encode(self, modality: str, x: Float[Tensor, "batch frame 3 height width"]) -> Float[Tensor, "batch dim"]:
        """The mean over places, then over frames."""
        of_frames = self.video_bb(x.flatten(0, 1)).mean((2, 3)).unflatten(0, x.shape[:2])
        return self.transformer(of_frames).mean(1)

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch hidden"]:
        hidden = F.relu(self.hidden1(features["visual"]))
        return hidden + F.relu(self.hidden2(hidden))

    def classify(self, latent: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch class"]:
        return self.predict(latent)

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return with_counts(state, self.state_dict())


def row(trunk: str, block: Block, layers: tuple[int, int, int, int]) -> Entry:
    """Of the table."""
    return Entry(
        make=lambda task: VideoResNet(task, block, layers),
        summary=f"{trunk} over the pixels of 5 frames, their mean",
        source="Li et al.",
        paper="Li et al., 2022, arXiv:2203.12122",
        licence="none stated",
        published="https://github.com/lijuncheng16/AudioSetDoneRight",
        task=Task(frames=5),
        takes=("classes", "label_kind", "frames", "size"),
        head="predict.weight",
    )


MODELS: dict[str, Entry] = {
    "video-resnet34": row("ResNet-34", "basic", (3, 4, 6, 3)),
    "video-resnet152": row("ResNet-152", "bottleneck", (3, 8, 36, 3)),
}
