"""How CAV-MAE is pre-trained [Gong et al., 2022, arXiv:2210.07839]: hidden patches drawn, told apart and reconstructed."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float, Int
from torch import Tensor, nn

from robustav.models.entry import Entry, Task
from robustav.models.published.cav_mae import CHANNELS, ENDINGS, PATCH, Streams, blocks, token
from robustav.models.published.mae import Masking, masking, pixels_of, put_back, reconstruction_loss, taken
from robustav.models.published.transformer import grid, position_table

TEMPERATURE = 0.05
STRUCK = 1.1  # noise of a patch in a row or column that is hidden whole: above every draw from [0, 1)
SHARES: dict[str, tuple[float, float]] = {  # of the ratio, struck out of rows (frequency) and columns (time)
    "unstructured": (0, 0),
    "time": (0, 1),
    "frequency": (1, 0),
    "both": (0.7, 0.7),
}


class Encoded(NamedTuple):
    """What is visible, encoded: `joint` has audio's tokens before the picture's; `alone` each under its own norms."""

    joint: Float[Tensor, "batch token dim"]
    alone: dict[str, Tensor]


class Losses(NamedTuple):
    """`total` is the two reconstructions and the contrastive loss by their weights; `accuracy` is of the latter."""

    total: Float[Tensor, ""]
    contrastive: Float[Tensor, ""]
    audio: Float[Tensor, ""]
    visual: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


def similarities(audio: Float[Tensor, "batch dim"], visual: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch batch"]:
    """Cosines over the temperature, a row for each audio clip and a column for each picture."""
    return F.normalize(audio) @ F.normalize(visual).T / TEMPERATURE


def contrastive_loss(
    audio: Float[Tensor, "batch dim"], visual: Float[Tensor, "batch dim"], *, symmetric: bool = False
) -> Float[Tensor, ""]:
    """Surprise at which audio clip of the batch belongs to each picture; where `symmetric`, also the other way round."""
    table = similarities(audio, visual)
    loss = -table.log_softmax(0).diagonal().mean()
    return (loss - table.log_softmax(1).diagonal().mean()) / 2 if symmetric else loss


def contrastive_accuracy(
    audio: Float[Tensor, "batch dim"], visual: Float[Tensor, "batch dim"], *, symmetric: bool = False
) -> Float[Tensor, ""]:
    """Share of pictures whose own audio clip is the nearest of the batch; where `symmetric`, also the other way round."""
    table = similarities(audio, visual)
    own = torch.arange(len(table), device=table.device)
    found = (table.argmax(0) == own).float().mean()
    return (found + (table.argmax(1) == own).float().mean()) / 2 if symmetric else found


def struck(
    noise: Float[Tensor, "batch token"],
    rows: Int[Tensor, "batch row"],
    columns: Int[Tensor, "batch column"],
    height: int,
) -> Float[Tensor, "batch token"]:
    """Noise that hides whole rows and columns of a grid `height` patches high before anything else.

    As many patches stay visible as without. Where fewer are left than that, struck ones are among them.
    """
    laid_out = noise.unflatten(1, (height, -1)).clone()
    laid_out.scatter_(1, rows[:, :, None].expand(-1, -1, laid_out.shape[2]), STRUCK)
    laid_out.scatter_(2, columns[:, None].expand(-1, height, -1), STRUCK)
    return laid_out.flatten(1)


def structured_noise(
    batch: int, shape: tuple[int, int], ratio: float, structure: str, generator: torch.Generator | None = None
) -> Float[Tensor, "batch token"]:
    """Noise for a grid of `shape`; what a structure strikes out is drawn anew for each clip."""
    height, width = shape
    noise = torch.rand(batch, height * width, generator=generator)
    down, across = (int(size * ratio * share) for size, share in zip(shape, SHARES[structure], strict=True))
    if not down and not across:
        return noise
    rows = torch.rand(batch, height, generator=generator).argsort(1)[:, :down]
    columns = torch.rand(batch, width, generator=generator).argsort(1)[:, :across]
    return struck(noise, rows, columns, height)


class CavMaePretraining(Streams):
    """CAV-MAE before fine-tuning [Gong et al., 2022, arXiv:2210.07839]: one picture of a clip, and its audio.

    Features are front ends' outputs, by modality. Position tables are fixed. Of several shared blocks only the last
    takes part in pre-training, as in the official code, though `alone` goes through all; the published model has one.
    `normalised` targets are patches less their mean, over their deviation.
    """

    def __init__(
        self,
        task: Task,
        *,
        dim: int = 768,
        depth: int = 12,
        specific: int = 11,
        heads: int = 12,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        ratio: float = 4,
        audio_frames: int | None = None,
        normalised: bool = True,
        symmetric: bool = False,
        contrastive_weight: float = 0.01,
        reconstruction_weight: float = 1.0,
    ) -> None:
        super().__init__(
            task,
            dim=dim,
            depth=depth,
            specific=specific,
            heads=heads,
            ratio=ratio,
            audio_frames=audio_frames,
            streams=("audio", "visual"),
            trained_positions=False,
        )
        self.normalised, self.symmetric = normalised, symmetric
        self.contrastive_weight, self.reconstruction_weight = contrastive_weight, reconstruction_weight
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = token(decoder_dim)
        for modality, end in ENDINGS.items():
            table = position_table(*grid(*self.grids[modality]), decoder_dim)
            self.register_parameter(f"decoder_pos_embed{end}", nn.Parameter(table, requires_grad=False))
            self.register_parameter(f"decoder_modality{end}", token(decoder_dim))
            self.add_module(f"decoder_pred{end}", nn.Linear(decoder_dim, CHANNELS[modality] * PATCH**2))
        self.decoder_blocks = blocks(decoder_depth, decoder_dim, decoder_heads, ratio)
        self.decoder_norm = nn.LayerNorm(decoder_dim)

    def masks(
        self,
        batch: int,
        *,
        audio_ratio: float = 0.75,
        visual_ratio: float = 0.75,
        structure: str = "unstructured",
        generator: torch.Generator | None = None,
    ) -> dict[str, Masking]:
        """Which patches are hidden, audio's drawn first. `structure` is of the audio: pictures have none."""
        drawn = {}
        for modality, ratio, kind in (("audio", audio_ratio, structure), ("visual", visual_ratio, "unstructured")):
            if not 0 <= ratio < 1:
                raise ValueError(f"`{modality}_ratio` must lie in [0, 1), got {ratio:g}")
            if kind not in SHARES:
                raise ValueError(f"`structure` must be one of {list(SHARES)}, got {kind!r}")
            noise = structured_noise(batch, self.grids[modality], ratio, kind, generator)
            drawn[modality] = masking(noise.to(self.mask_token.device), int(noise.shape[1] * (1 - ratio)))
        return drawn

    def encoded(self, features: Mapping[str, Tensor], masks: Mapping[str, Masking]) -> Encoded:
        """Visible tokens, through the shared block together and each modality by itself."""
        visible = {m: self.own(m, taken(self.embedded(m, features[m]), masks[m].visible)) for m in ENDINGS}
        skipped = len(self.blocks_u) - 1
        joint = self.shared(torch.cat(list(visible.values()), dim=1), "", skipped=skipped)
        return Encoded(joint, {m: self.shared(visible[m], end, skipped=skipped) for m, end in ENDINGS.items()})

    def decoded(self, joint: Float[Tensor, "batch token dim"], masks: Mapping[str, Masking]) -> dict[str, Tensor]:
        """The pixels of every patch, [batch, token, pixel], by modality."""
        counts = [masks[m].visible.shape[1] for m in ENDINGS]
        placed = [
            put_back(visible, self.mask_token.to(visible.dtype), masks[m].restore)
            + getattr(self, f"decoder_pos_embed{end}")
            + getattr(self, f"decoder_modality{end}")
            for (m, end), visible in zip(ENDINGS.items(), self.decoder_embed(joint).split(counts, dim=1), strict=True)
        ]
        tokens = torch.cat(placed, dim=1)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        parts = self.decoder_norm(tokens).split([each.shape[1] for each in placed], dim=1)
        return {m: getattr(self, f"decoder_pred{ENDINGS[m]}")(part) for m, part in zip(ENDINGS, parts, strict=True)}

    def reconstruction(
        self, modality: str, features: Mapping[str, Tensor], predicted: Tensor, masks: Mapping[str, Masking]
    ) -> Float[Tensor, ""]:
        """What the hidden patches of a modality cost."""
        pixels = pixels_of(self.picture(modality, features[modality]), (PATCH, PATCH))
        return reconstruction_loss(predicted, pixels, masks[modality].hidden, normalised=self.normalised)

    def forward(self, features: dict[str, Tensor], masks: dict[str, Masking]) -> Losses:
        encoded = self.encoded(features, masks)
        predicted = self.decoded(encoded.joint, masks)
        audio, visual = (self.reconstruction(m, features, predicted[m], masks) for m in ENDINGS)
        means = [encoded.alone[m].mean(1) for m in ENDINGS]
        contrastive = contrastive_loss(*means, symmetric=self.symmetric)
        total = self.reconstruction_weight * (audio + visual) + self.contrastive_weight * contrastive
        return Losses(total, contrastive, audio, visual, contrastive_accuracy(*means, symmetric=self.symmetric))


def name_in_mae(name: str, specific: int) -> str | None:
    """Which tensor of an ImageNet MAE one of CAV-MAE's starts from, if any."""
    if "modality" in name or "pos_embed_a" in name:
        return None
    if found := re.fullmatch(r"blocks_u\.(\d+)\.(.+)", name):
        return f"blocks.{specific + int(found[1])}.{re.sub(r'_[av]', '', found[2])}"
    if re.search(r"blocks.*norm\d_[av]", name):
        return None
    return re.sub(r"_[av](?=\.|$)", "", name)


def from_mae(model: CavMaePretraining, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state dict, begun from an MAE of ImageNet [He et al., 2021, arXiv:2111.06377] with as many blocks.

    Its first blocks go to both streams and the rest to the shared ones, where all norms are equal. Audio's patches sum
    the filters over colours, and its pixels are the first of the picture's. Tables lose the class token's row. A state
    without a decoder, as encoders are published, leaves the model's own decoder.
    """
    specific = len(model.get_submodule("blocks_a"))  # type: ignore[arg-type]
    started = {}
    for name, own in model.state_dict().items():
        origin = name_in_mae(name, specific)
        lacks = origin is not None and origin not in state
        if lacks and not name.startswith(("decoder", "mask_token")):
            raise ValueError(
                f"`state` must be of an ImageNet MAE with its official names, {origin!r} is missing from it"
            )
        tensor = own if origin is None or lacks else state[origin]
        if name == "patch_embed_a.proj.weight":
            tensor = tensor.sum(1, keepdim=True)
        elif "pos_embed_v" in name and origin in state:
            tensor = tensor[:, 1:]
        elif name.startswith("decoder_pred_a"):
            tensor = tensor[: len(own)]
        started[name] = tensor
    return started


# base, scale+ and scale++ are one model, pre-trained in batches of 48, 108 and 256.
MODELS: dict[str, Entry] = {
    "cav-mae-pretrain": Entry(
        make=CavMaePretraining,
        summary="CAV-MAE before fine-tuning: no classes",
        source="Gong et al.",
        paper="Gong et al., 2022, arXiv:2210.07839",
        licence="BSD-2-Clause",
        published="https://github.com/YuanGongND/cav-mae",
        task=Task(frames=1),
        takes=("seconds", "size"),
    ),
}
