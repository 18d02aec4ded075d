"""The multimodal transformers on log-mels and video features: early, mid and late fusion, and averaged scores.

MMT [Li et al., 2020, arXiv:2011.07430; Li et al., 2022, arXiv:2203.12122]. The network that made the video features is
not published: the visual input is a feature of 2048 numbers a second, not negative, and no picture.
"""

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from robustav.classifier import FEATURE, Classifier, InputSpec
from robustav.models.entry import Entry, Published, Task
from robustav.models.published.mixtures import mixture
from robustav.models.published.tal import (
    EncoderLayer,
    Hearing,
    Pooled,
    TalTrans,
    canonical,
    conv_stack,
    hearing,
    initialise,
    steps_of,
)

SECONDS = 10  # of every clip, and vectors of video features
ROWS = 80  # of the picture that early fusion makes of both modalities
WIDTH = 2048  # of a vector of video features
SHARES = {"audio": 0.6, "visual": 0.4}  # of the averaged scores


def video_features(width: int) -> InputSpec:
    """One vector a second, as after a ReLU: from 0 to 23.28 in the published data."""
    return InputSpec((SECONDS, width), 0.0, math.inf, FEATURE)


def beside_video(task: Task) -> Hearing:
    """What is heard where each second is laid beside, or cut like, a second of video."""
    heard = hearing("tal", task)
    if heard.frames % 40:
        raise ValueError(f"`task.seconds` must be a whole number beside video features, got {task.seconds:g}")
    return heard


class VideoFeatures(Pooled):
    """The transformer on video features [Li et al., 2022, arXiv:2203.12122]: one layer, applied `times` times."""

    def __init__(
        self,
        task: Task,
        *,
        width: int = WIDTH,
        dim: int = 1024,
        times: int = 2,
        dropout: float = 0.75,
        pooling: str = "att",
    ) -> None:
        super().__init__(task, {"visual": video_features(width)}, dim=dim, pooling=pooling)
        self.enc_layer = EncoderLayer(width, dim, dropout, times=times)
        self.hidden1 = nn.Linear(width, dim)
        initialise(self)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.hidden1(self.enc_layer(x)).relu()

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        return features["visual"].flatten(1)


class MmtEarly(Pooled):
    """MMT, early fusion [Li et al., 2022, arXiv:2203.12122]: both modalities as one picture, then as TAL-trans.

    Spectrogram and features are cut into 80 rows in their order in memory: five frames each, and the features of an
    eighth of a second. The rows lie side by side and become 20 steps.
    """

    def __init__(
        self,
        task: Task,
        *,
        dim: int = 1024,
        times: int = 2,
        dropout: float = 0.75,
        pooling: str = "att",
    ) -> None:
        heard = beside_video(task)
        super().__init__(task, {"audio": heard.spec, "visual": video_features(WIDTH)}, dim=dim, pooling=pooling)
        self.log_mel = heard.module
        self.conv = conv_stack(heard.mels, dim)
        row = (heard.frames * heard.mels + SECONDS * WIDTH) // ROWS
        self.proj0 = nn.Linear(dim // (heard.mels // 32) * (row // 32), dim)
        self.enc_layer = EncoderLayer(dim, dim, dropout, times=times)
        initialise(self)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw) if modality == "audio" else raw

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return x.reshape(len(x), ROWS, -1)

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        picture = torch.cat([features["audio"], features["visual"]], dim=2)
        return self.enc_layer(self.proj0(steps_of(self.conv(picture[:, None]))).relu()).flatten(1)


class MmtMid(Pooled):
    """MMT, mid fusion [Li et al., 2022, arXiv:2203.12122]: a second's convolved spectrogram beside its features."""

    def __init__(
        self,
        task: Task,
        *,
        width: int = WIDTH,
        dim: int = 1024,
        times: int = 2,
        dropout: float = 0.75,
        pooling: str = "att",
    ) -> None:
        heard = beside_video(task)
        super().__init__(task, {"audio": heard.spec, "visual": video_features(width)}, dim=dim, pooling=pooling)
        self.log_mel = heard.module
        self.conv = conv_stack(heard.mels, dim)
        self.proj1 = nn.Linear(heard.frames // 4 // SECONDS * dim + width, dim)
        self.enc_layer = EncoderLayer(dim, dim, dropout, times=times)
        initialise(self)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.log_mel(raw) if modality == "audio" else raw

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return steps_of(self.conv(x[:, None])).reshape(len(x), SECONDS, -1) if modality == "audio" else x

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        both = torch.cat([features["audio"], features["visual"]], dim=2)
        return self.enc_layer(self.proj1(both).relu()).flatten(1)


class MmtLate(Pooled):
    """MMTLF, late fusion [Li et al., 2022, arXiv:2203.12122]: TAL-trans and the video transformer, mapped and added.

    Audio is averaged to one vector a second first. The latent is the sum, 10 x `dim`. Both branches keep heads of their
    own, which are not used. Weights are shared between the `times` that each branch's layer is applied, so a checkpoint
    fits any number; the published model was trained with 2 and its scores were printed with 1.
    """

    def __init__(
        self,
        task: Task,
        *,
        width: int = WIDTH,
        dim: int = 1024,
        times: int = 2,
        dropout: float = 0.75,
        pooling: str = "att",
    ) -> None:
        specs = {"audio": beside_video(task).spec, "visual": video_features(width)}
        super().__init__(task, specs, dim=dim, pooling=pooling)
        self.alpha, self.beta = nn.Linear(dim, dim), nn.Linear(dim, dim)
        initialise(self)
        self.branch1 = TalTrans(task, dim=dim, times=times, dropout=dropout, pooling=pooling)
        self.branch2 = VideoFeatures(task, width=width, dim=dim, times=times, dropout=dropout, pooling=pooling)

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.branch1.front_end(modality, raw) if modality == "audio" else raw

    def encode(self, modality: str, x: Tensor) -> Tensor:
        if modality == "visual":
            return self.beta(self.branch2.encode(modality, x))
        hidden = self.branch1.encode(modality, x)
        return self.alpha(hidden.unflatten(1, (SECONDS, -1)).mean(2))

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        return (features["audio"] + features["visual"]).flatten(1)


class MmtScores(Published, Classifier):
    """Two models whose probabilities are averaged, 0.6 of TAL-trans's and 0.4 of the video transformer's.

    [Li et al., 2022, arXiv:2203.12122]. The parts are trained and published apart; a checkpoint of both has their names
    under `audio.` and `video.`. The latent is both sequences.
    """

    def __init__(self, task: Task, *, audio: Pooled, video: Pooled) -> None:
        super().__init__()
        self.specs, self.classes, self.label_kind = {**audio.specs, **video.specs}, task.classes, task.label_kind
        self.audio, self.video = audio, video

    def part(self, modality: str) -> Pooled:
        """The model of a modality."""
        return self.audio if modality == "audio" else self.video

    def front_end(self, modality: str, raw: Tensor) -> Tensor:
        return self.part(modality).front_end(modality, raw)

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return self.part(modality).encode(modality, x)

    def fuse(self, features: dict[str, Tensor]) -> Float[Tensor, "batch dim"]:
        return torch.cat([features[modality].flatten(1) for modality in SHARES], dim=1)

    def classify(self, latent: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch class"]:
        seen = SECONDS * self.video.dim
        logits = torch.stack([self.audio.classify(latent[:, :-seen]), self.video.classify(latent[:, -seen:])], dim=1)
        weights = logits.new_tensor(list(SHARES.values())).log()[:, None]
        return mixture(logits, weights.expand_as(logits))

    def adapted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return canonical(state, self.state_dict())


def row(make: Callable[[Task], nn.Module], summary: str, paper: str, head: str = "fc_prob.weight") -> Entry:
    """A model of AudioSetDoneRight."""
    return Entry(
        make=make,
        summary=summary,
        source="AudioSetDoneRight",
        paper=paper,
        licence="none stated",
        published="https://github.com/lijuncheng16/AudioSetDoneRight",
        takes=("classes", "label_kind"),
        head=head,
    )


MMT, MMTLF = "Li et al., 2020, arXiv:2011.07430", "Li et al., 2022, arXiv:2203.12122"
MODELS: dict[str, Entry] = {
    "video-features": row(VideoFeatures, "transformer on 2048 video features a second", MMTLF),
    "mmt-early": row(MmtEarly, "log-mel and video features as one picture", MMT),
    "mmt-mid": row(MmtMid, "convolved log-mel beside video features", MMT),
    "mmt-late": row(MmtLate, "sum of TAL-trans and video transformer", MMTLF),
    "mmt-late-once": row(lambda task: MmtLate(task, times=1), "mmt-late, layers applied once, as scored", MMTLF),
    "mmt-scores": row(
        lambda task: MmtScores(task, audio=TalTrans(task), video=VideoFeatures(task)),
        "0.6 TAL-trans + 0.4 video transformer, probabilities",
        MMTLF,
        "audio.fc_prob.weight",
    ),
}
