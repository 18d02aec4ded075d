"""TALNet and what followed it: ten convolutions, a recurrent or attentive layer, frame scores pooled over the clip.

TALNet [Wang et al., 2019, arXiv:1810.09050], TAL-trans [Li et al., 2022, arXiv:2203.12122], and both again in the audio
tagging study [Li et al., 2022, arXiv:2203.13448]. Official outputs are probabilities; here they are their logits.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import Classifier, InputSpec, waveform
from robustav.fbank import RECIPES, Fbank, frames_for
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.mixtures import mean_logit, mixture, shares
from robustav.models.published.transformer import waves
from robustav.published_log_mel import TAGGING_RECIPES, TaggingLogMel, TalLogMel

HEADS = 8
GAIN = 8  # of a spectrogram before the position table is added


class FrontEnd(NamedTuple):
    """What a checkpoint hears: so many bands, so many frames of a clip of some seconds."""

    mels: int
    frames: Callable[[float], int]
    make: Callable[[int], nn.Module]  # from a number of frames


def long_frames(seconds: float) -> int:
    """One every 25 ms."""
    return round(40 * seconds)


def tagging(name: str) -> Callable[[int], nn.Module]:
    """The 64 bands of the tagging study with the statistics of one of its recipes."""
    return lambda frames: TaggingLogMel(frames=frames, **TAGGING_RECIPES[name]._asdict())


def fbank(frames: int) -> nn.Module:
    """The 128 bands of the tagging study."""
    return Fbank(**RECIPES["tagging-mix-0.3"]._replace(frames=frames)._asdict())


FRONT_ENDS = {
    "tal": FrontEnd(64, long_frames, lambda frames: TalLogMel.published(frames=frames)),
    "tagging-64": FrontEnd(64, long_frames, tagging("tal")),
    "tagging-64-trans": FrontEnd(64, long_frames, tagging("tal-trans")),
    "tagging-128": FrontEnd(128, frames_for, fbank),
}


def conv_stack(mels: int, dim: int) -> nn.Sequential:
    """Ten 3 x 3 convolutions, [batch, 1, frame, bin] -> [batch, channel, frame / 4, bin / 32].

    Every second one halves the bins, the first two of these the frames too. The channels and bins left make `dim`.
    """
    if mels < 32 or dim < mels // 2 or dim % (mels // 32):
        raise ValueError(
            f"`dim` must be at least half of `mels` and a multiple of the bins left of them, {mels // 32}, and "
            f"`mels` at least 32, got dim={dim} and mels={mels}"
        )
    layers, channels, bins = [], 1, mels
    for halving in range(5):
        for pool in (None, nn.MaxPool2d((2, 2) if halving < 2 else (1, 2))):
            wider = dim // (bins // 2) if pool else 2 * dim // bins
            parts = {"conv": nn.Conv2d(channels, wider, 3, padding=1), "bn": nn.BatchNorm2d(wider), "relu": nn.ReLU()}
            layers.append(nn.Sequential(OrderedDict({**parts, "pool": pool} if pool else parts)))
            channels = wider
        bins //= 2
    return nn.Sequential(*layers)


def steps_of(maps: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch height dim"]:
    """Rows of maps, channel by channel."""
    return maps.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention with eight heads, its residual, and a layer norm."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        if dim % HEADS:
            raise ValueError(f"the width of self-attention must be a multiple of its {HEADS} heads, got {dim}")
        self.dropout = dropout
        self.w_qs, self.w_ks, self.w_vs, self.fc = (nn.Linear(dim, dim) for _ in range(4))
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "batch step dim"]) -> Float[Tensor, "batch step dim"]:
        query, key, value = (w(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for w in (self.w_qs, self.w_ks, self.w_vs))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        mixed = self.fc(attended.transpose(1, 2).flatten(2))
        return self.layer_norm(x + F.dropout(mixed, self.dropout, self.training))


class FeedForward(nn.Module):
    """Two linear layers around a ReLU, their residual, and a layer norm."""

    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.w_1, self.w_2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "batch step dim"]) -> Float[Tensor, "batch step dim"]:
        changed = self.w_2(self.w_1(x).relu())
        return self.layer_norm(x + F.dropout(changed, self.dropout, self.training))


class EncoderLayer(nn.Module):
    """A post-norm layer [Vaswani et al., 2017, arXiv:1706.03762], applied `times` times with the same weights."""

    def __init__(self, dim: int, inner: int, dropout: float, *, times: int = 1) -> None:
        super().__init__()
        if times < 1:
            raise ValueError(f"`times` must be at least 1, got {times}")
        self.times = times
        self.slf_attn, self.pos_ffn = SelfAttention(dim, dropout), FeedForward(dim, inner, dropout)

    def forward(self, x: Float[Tensor, "batch step dim"]) -> Float[Tensor, "batch step dim"]:
        for _ in range(self.times):
            x = self.pos_ffn(self.slf_attn(x))
        return x


class PositionalEncoding(nn.Module):
    """Adds fixed waves to a spectrogram: sines over the frames in even bins, cosines in odd ones."""

    def __init__(self, frames: int, bins: int) -> None:
        super().__init__()
        self.pe: Tensor
        table = waves(torch.arange(frames).double(), bins).unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        self.register_buffer("pe", table.float()[None])

    def forward(self, x: Float[Tensor, "batch frame bin"]) -> Float[Tensor, "batch frame bin"]:
        return GAIN * x + self.pe[:, : x.shape[1]]


class Gru(nn.GRU):
    """One bidirectional layer that cuDNN always runs as in training: it has no backward pass otherwise.

    Without dropout that changes nothing. A copy keeps its weights in one piece, of which cuDNN warns otherwise.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        steps = x.transpose(
            0, 1
        ).contiguous()  # in memory step by step: oneDNN copies frozen weights for each otherwise
        start = x.new_zeros(2, len(x), self.hidden_size)
        weights = [weight for weight in self._flat_weights if weight is not None]
        states, last = torch.gru(steps, start, weights, True, 1, 0.0, True, True, False)
        return states.transpose(0, 1), last

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.flatten_parameters()


def most(logits: Tensor, attention: Tensor | None) -> Tensor:
    """The highest score."""
    return logits.amax(1)


def average(logits: Tensor, attention: Tensor | None) -> Tensor:
    """The mean of the scores."""
    return mean_logit(logits)


def linear_softmax(logits: Tensor, attention: Tensor | None) -> Tensor:
    """Scores weighted by themselves."""
    return mixture(logits, shares(F.logsigmoid(logits)))


def exponential_softmax(logits: Tensor, attention: Tensor | None) -> Tensor:
    """Scores weighted by their exponential."""
    return mixture(logits, shares(logits.sigmoid()))


def attention_pooling(logits: Tensor, attention: Tensor | None) -> Tensor:
    """Scores weighted by a softmax over time, each class its own."""
    assert attention is not None
    return mixture(logits, shares(attention))


POOLINGS = {
    "max": most,
    "ave": average,
    "lin": linear_softmax,
    "exp": exponential_softmax,
    "att": attention_pooling,
}
# Linear softmax in windows, these weighted by their mean: the means cancel, and what is left is linear softmax.
CHOICES = {**POOLINGS, "h-att": linear_softmax}


class Pooled(Published, Classifier):
    """Scores each step of a sequence and pools them over the clip by the rule `pooling`; the latent is the sequence.

    Rules are max, ave, lin, exp and att [Wang et al., 2019, arXiv:1810.09050], the last of which is published; and of
    TAL-new, h-att, which comes out as lin, and all, a mixture of the first five that the model weighs for each class.
    """

    def __init__(self, task: Task, specs: Mapping[str, InputSpec], *, dim: int, pooling: str) -> None:
        super().__init__()
        if pooling not in (*CHOICES, "all"):
            raise ValueError(f"`pooling` must be one of {[*CHOICES, 'all']}, got {pooling!r}")
        self.specs, self.classes, self.label_kind = dict(specs), task.classes, task.label_kind
        self.dim, self.pooling = dim, pooling
        self.fc_prob = nn.Linear(dim, len(task.classes))
        self.fc_att = nn.Linear(dim, len(task.classes)) if pooling in ("att", "all") else None
        self.ens = nn.Linear(len(POOLINGS), len(POOLINGS)) if pooling == "all" else None

    def classify(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch class"]:
        sequence = latent.unflatten(1, (-1, self.dim))
        logits = self.fc_prob(sequence)
        attention = None if self.fc_att is None else self.fc_att(sequence)
        if self.ens is None:
            return CHOICES[self.pooling](logits, attention)
        pooled = torch.stack([pool(logits, attention) for pool in POOLINGS.values()], dim=1)
        weights = self.ens(pooled.sigmoid().transpose(1, 2)).log_softmax(2)
        return mixture(pooled, weights.transpose(1, 2))

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return canonical(state, self.state_dict())


def canonical(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict in the spelling that the later files have first, tables of positions as long as our own.

    Older files call the convolutions `conv1` to `conv10`, later ones have both `conv.0` and `conv1`.
    """
    adapted = {}
    for old, name in sorted((name != renamed(name), name) for name in state):
        if not (old and renamed(name) in adapted):
            adapted[renamed(name)] = state[name]
    for name in [name for name in adapted if name.endswith("bn.running_var")]:
        adapted.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    for name in adapted.keys() & own.keys():
        if name.endswith("positional_encoding.pe") and adapted[name].shape[2:] == own[name].shape[2:]:
            adapted[name] = continued(adapted[name], own[name])
    return adapted


def renamed(name: str) -> str:
    """`conv.0.conv.weight` where it was `conv1.conv.weight`, also within a part of a model."""
    old = re.match(r"(|.*\.)conv(\d+)\.((?:conv|bn)\..*)", name)
    return f"{old[1]}conv.{int(old[2]) - 1}.{old[3]}" if old else name


def continued(table: Float[Tensor, "1 rows bin"], own: Float[Tensor, "1 all bin"]) -> Float[Tensor, "1 all bin"]:
    """A table of positions cut to the length of our own, or continued with it."""
    further = PositionalEncoding(*own.shape[1:]).pe[:, table.shape[1] :]
    return torch.cat([table, further.to(table)], dim=1) if further.shape[1] else table[:, : own.shape[1]]


def initialise(module: nn.Module) -> None:
    """Every matrix and kernel Xavier uniform, as the official codes do."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


class Hearing(NamedTuple):
    """A front end for one task."""

    spec: InputSpec
    mels: int
    frames: int
    positions: int  # rows of a table of positions
    module: nn.Module


def hearing(front_end: str, task: Task) -> Hearing:
    """How a model with the front end of that name hears the clips of a task."""
    if front_end not in FRONT_ENDS:
        raise ValueError(f"`front_end` must be one of {sorted(FRONT_ENDS)}, got {front_end!r}")
    mels, count, make = FRONT_ENDS[front_end]
    frames = count(task.seconds)
    return Hearing(waveform(task.seconds), mels, frames, max(frames, count(10.0)), make(frames))


class TalNet(Pooled):
    """TALNet, convolutions and a recurrent layer [Wang et al., 2019, arXiv:1810.09050]; TAL-new has other poolings.

    `front_end` names what it hears (`FRONT_ENDS`). A shorter clip is fewer steps to pool; where there are 128 bands, it
    is filled up to the next 1.28 s.
    """

    def __init__(self, task: Task, *, dim: int = 1024, front_end: str = "tal", pooling: str = "att") -> None:
        heard = hearing(front_end, task)
        super().__init__(task, {"audio": heard.spec}, dim=dim, pooling=pooling)
        self.log_mel = heard.module
        self.conv = conv_stack(heard.mels, dim)
        self.gru = Gru(dim, dim // 2, batch_first=True, bidirectional=True)
        initialise(self)
        for name, parameter in self.named_parameters():
            if name.startswith("gru.weight"):
                nn.init.orthogonal_(parameter)
            elif name.startswith("gru.bias") or (name.startswith("fc_") and name.endswith("bias")):
                nn.init.zeros_(parameter)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.gru(steps_of(self.conv(x[:, None])))[0]

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        return features["audio"].flatten(1)


class TalTrans(Pooled):
    """TAL-trans, convolutions and self-attention [Li et al., 2022, arXiv:2203.12122].

    One layer of attention is applied `times` times with the same weights, so that a checkpoint does not show how often:
    twice in the published runs. `positions` adds fixed waves to the spectrogram, as in the tagging study.
    """

    def __init__(
        self,
        task: Task,
        *,
        dim: int = 1024,
        front_end: str = "tal",
        positions: bool = False,
        times: int = 2,
        dropout: float = 0.75,
        pooling: str = "att",
    ) -> None:
        heard = hearing(front_end, task)
        super().__init__(task, {"audio": heard.spec}, dim=dim, pooling=pooling)
        self.log_mel = heard.module
        self.conv = conv_stack(heard.mels, dim)
        self.positional_encoding = PositionalEncoding(heard.positions, heard.mels) if positions else nn.Identity()
        self.enc_layer = EncoderLayer(dim, dim, dropout, times=times)
        initialise(self)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.enc_layer(steps_of(self.conv(self.positional_encoding(x)[:, None])))

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        return features["audio"].flatten(1)


class TalTransformer(Pooled):
    """The plain transformer beside TAL-trans: no convolutions, no positions [Li et al., 2022, arXiv:2203.12122].

    `depth` layers, each with its own weights, then the maximum over every four frames.
    """

    def __init__(
        self, task: Task, *, dim: int = 1024, depth: int = 2, dropout: float = 0.75, pooling: str = "att"
    ) -> None:
        heard = hearing("tal", task)
        super().__init__(task, {"audio": heard.spec}, dim=dim, pooling=pooling)
        self.log_mel = heard.module
        self.linear_in, self.layer_norm_in = nn.Linear(heard.mels, dim), nn.LayerNorm(dim)
        self.layer_stack = nn.Sequential(*(EncoderLayer(dim, 2 * dim, dropout) for _ in range(depth)))
        initialise(self)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        hidden = self.layer_stack(self.layer_norm_in(self.linear_in(x)))
        return F.max_pool1d(hidden.transpose(1, 2), 4).transpose(1, 2)

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        return features["audio"].flatten(1)


def row(make: Callable[[Task], nn.Module], summary: str, paper: str, study: str, licence: str) -> Entry:
    """An audio model of one of the two studies."""
    return Entry(
        make=make,
        summary=summary,
        source=study,
        paper=paper,
        licence=licence,
        published=f"https://github.com/lijuncheng16/{study}",
        takes=("classes", "label_kind", "seconds"),
        head="fc_prob.weight",
    )


WANG, LI = "Wang et al., 2019, arXiv:1810.09050", "Li et al., 2022, arXiv:2203.12122"
ADVERSARY = ("AudioSetDoneRight", "none stated")
TAGGING = ("Li et al., 2022, arXiv:2203.13448", "AudioTaggingDoneRight", "BSD-3-Clause")
MODELS: dict[str, Entry] = {
    "talnet": row(TalNet, "10 convolutions, GRU, attention pooling", WANG, *ADVERSARY),
    "tal-trans": row(TalTrans, "10 convolutions, attention, attention pooling", LI, *ADVERSARY),
    "tal-trans-positions": row(
        lambda task: TalTrans(task, positions=True), "TAL-trans with positions added", LI, *ADVERSARY
    ),
    "tal-new": row(lambda task: TalNet(task, pooling="all"), "TALNet, mixture of five poolings", LI, *ADVERSARY),
    "tal-transformer": row(TalTransformer, "plain transformer over frames", LI, *ADVERSARY),
    "talnet-tagging-64": row(
        lambda task: TalNet(task, front_end="tagging-64"), "TALNet of the tagging study, 64 bands", *TAGGING
    ),
    "talnet-tagging-128": row(
        lambda task: TalNet(task, dim=2048, front_end="tagging-128"), "TALNet of the tagging study, 128 bands", *TAGGING
    ),
    "tal-trans-tagging-64": row(
        lambda task: TalTrans(task, front_end="tagging-64-trans", positions=True),
        "TAL-trans of the tagging study, 64 bands",
        *TAGGING,
    ),
    "tal-trans-tagging-128": row(
        lambda task: TalTrans(task, front_end="tagging-128", positions=True, dropout=0.25),
        "TAL-trans of the tagging study, 128 bands",
        *TAGGING,
    ),
}
