"""Classifiers from a local folder of Hugging Face's transformers, as functions of raw input.

A folder's own settings say how a waveform or frames become what its network reads; here that is done differentiably,
without the library's feature extractors. Nothing is downloaded, and no code that a folder may hold is run.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  (the name that every PyTorch reader knows)
from jaxtyping import Float
from torch import Tensor, nn

from robustav.clap_log_mel import ClapLogMel
from robustav.classifier import InputSpec, LabelKind, frames, waveform
from robustav.data.audioset import CLASSES
from robustav.fbank import Fbank
from robustav.models.body_and_head import BodyAndHead, Pixels, optional
from robustav.models.checkpoints import read_checkpoint

USUAL_SECONDS = 10.0  # of a network that reads a waveform of any length
PROMPT = "This is a sound of {}."  # what CLAP's text encoder is asked, as in the library's own zero-shot pipeline
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SAFE_TORCH = (2, 6)  # before it, `weights_only` could be got round [CVE-2025-32434]
PREPROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")
PROCESSOR, WITHIN = "processor_config.json", ("feature_extractor", "image_processor", "video_processor")
TOKENIZERS = ("tokenizer.json", "vocab.json")
KEPT_OUT = ("auto_map", "attn_implementation", "_attn_implementation", "transformers_weights")  # may name foreign code
TRAINING_ONLY = ("masked_spec_embed", "mask_token", "num_batches_tracked")  # no score depends on these
UNREAD = ("position_ids", "pooler.dense.weight", "pooler.dense.bias", "num_batches_tracked")  # often in files, in vain
PROBLEMS: dict[str | None, LabelKind] = {
    "multi_label_classification": "multilabel",
    "single_label_classification": "multiclass",
}

Settings = Mapping[str, Any]


class Front(NamedTuple):
    """What stands before a network: the raw input it is given, and how that becomes what the network reads."""

    modality: str
    spec: InputSpec
    module: nn.Module
    by_frame: bool = False


class Architecture(NamedTuple):
    """A row of `ARCHITECTURES`."""

    model_type: str
    front: Callable[[Any, Settings, float | None, int | None], Front]  # config, preprocessor, seconds, frames
    head: str = "classifier"


def from_directory(
    folder: str | Path,
    *,
    seconds: float | None = None,
    frames: int | None = None,
    classes: Sequence[str] | None = None,
    label_kind: LabelKind | None = None,
) -> BodyAndHead:
    """The classifier in a folder that `save_pretrained` wrote, or that was downloaded, in eval mode and float32.

    `seconds` of audio and `frames` of picture are the network's own unless told. `classes` replaces the names in the
    config, which must be as many; CLAP has none and needs them. The label kind is the config's `problem_type`; where
    that is missing, multi-label if the classes are AudioSet's and multi-class otherwise. Audio comes at the sample rate
    that the folder names, pictures at the size that its processor gives them before cropping. Of a folder that cannot
    be used `ValueError` names the file and what to do.
    """
    path = Path(folder)
    settings = _config(path)
    name = architecture_of(path)
    row = ARCHITECTURES[name]
    preprocessor = _preprocessor(path)
    network = _load(path, name, settings)
    usual: LabelKind = "multiclass"
    config = network.config
    front = row.front(config, preprocessor, seconds, frames)
    if row.model_type == "clap":
        network, names = _zero_shot(network, path, classes)
        embed = _sound
    else:
        own = tuple(str(config.id2label[index]) for index in range(config.num_labels))
        if classes is not None and len(classes) != len(own):
            raise ValueError(f"`classes` must be {len(own)} names, as the network has outputs, got {len(classes)}")
        names = own if classes is None else tuple(classes)
        usual = _label_kind(config.problem_type, own)
        network, embed = _beheaded(network, row.head), _logits
    return BodyAndHead(
        network,
        embed=embed,
        head="head",
        front=front.module,
        modality=front.modality,
        spec=front.spec,
        classes=names,
        label_kind=label_kind or usual,
        by_frame=front.by_frame,
    ).eval()


def architecture_of(folder: str | Path) -> str:
    """The key of `ARCHITECTURES` that a folder's config.json names, by `architectures` or else by `model_type`."""
    settings = _config(Path(folder))
    named, model_type = settings.get("architectures") or [], settings.get("model_type")
    known = [name for name in named if name in ARCHITECTURES]
    if not named:
        known = [name for name, row in ARCHITECTURES.items() if row.model_type == model_type]
    if not known:
        raise ValueError(
            f"{folder}: the architecture must be one of {', '.join(ARCHITECTURES)}, got "
            f"{', '.join(named) or repr(model_type)}: wrap the network yourself (robustav.classifier.Wrapped)"
        )
    return known[0]


def weight_file(folder: str | Path) -> Path:
    """The folder's weights: model.safetensors, or else pytorch_model.bin."""
    found = [file for name in WEIGHTS if (file := Path(folder) / name).is_file()]
    if not found:
        raise ValueError(
            f"{folder} has no {' or '.join(WEIGHTS)}: put the weights there as one file "
            "(save_pretrained(folder, max_shard_size='100GB') where they are in several)"
        )
    return found[0]


def _config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: save model and processor there with save_pretrained")
    return _read(path, "config.json")


def _read(path: Path, file: str) -> dict[str, Any]:
    try:
        settings = json.loads((path / file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / file} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path / file} must hold one object, got {type(settings).__name__}")
    return settings


def _preprocessor(path: Path) -> Settings:
    """How the folder's processor prepares input; newer releases keep it within processor_config.json."""
    for file in PREPROCESSORS:
        if (path / file).is_file():
            return _read(path, file)
    if (path / PROCESSOR).is_file():
        parts = _read(path, PROCESSOR)
        if found := [parts[key] for key in WITHIN if isinstance(parts.get(key), dict)]:
            return found[0]
    raise ValueError(
        f"{path} has no {PREPROCESSORS[0]}, which says how input is scaled: save the feature extractor or image "
        "processor that the network was trained with there, with save_pretrained"
    )


def _load(path: Path, architecture: str, settings: Settings) -> Any:
    """The network with its weights, from these files alone; raises `ValueError` where any tensor stays random."""
    transformers = optional("transformers")
    weights = weight_file(path)
    if weights.suffix == ".bin" and tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise ValueError(
            f"{weights} is a pickle, and loading one is safe from torch {'.'.join(map(str, SAFE_TORCH))} on, this is "
            f"{torch.__version__}: convert it to {WEIGHTS[0]}, or upgrade torch"
        )
    if "quantization_config" in settings:
        raise ValueError(f"{path} holds quantised weights, which have no useful gradient: use the original ones")
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} holds an adapter: merge it into the network (merge_and_unload) and save that")
    state, kind = read_checkpoint(weights), getattr(transformers, architecture)
    try:
        with _quiet(transformers.utils.logging):
            network, info = kind.from_pretrained(
                None,
                config=kind.config_class.from_dict(_own(settings)),
                state_dict=state,
                output_loading_info=True,
            )
    except Exception as error:  # whatever another library raises, it is this folder that cannot be loaded
        raise ValueError(f"{path} cannot be loaded as {architecture}: {type(error).__name__}: {error}") from error
    if missing := sorted(key for key in info["missing_keys"] if not key.endswith(TRAINING_ONLY)):
        more = " ..." if len(missing) > 3 else ""
        raise ValueError(
            f"{weights} does not fit config.json: missing ({len(missing)}): {', '.join(missing[:3])}{more}"
        )
    if unread := sorted(key for key in info["unexpected_keys"] if not key.endswith(UNREAD)):
        more = " ..." if len(unread) > 3 else ""
        raise ValueError(
            f"{weights} does not fit config.json, which asks for less: unexpected ({len(unread)}): "
            f"{', '.join(unread[:3])}{more}"
        )
    return network.float().eval()


def _own(settings: Settings) -> dict[str, Any]:
    """A config without what would have the library look for code elsewhere, in its parts too."""
    return {
        key: _own(value) if isinstance(value, dict) else value for key, value in settings.items() if key not in KEPT_OUT
    }


@contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """Without the library's progress bars and load reports: what matters of them is an error here."""
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _label_kind(problem: str | None, names: Sequence[str]) -> LabelKind:
    if problem is not None and problem not in PROBLEMS:
        raise ValueError(
            f"`problem_type` in config.json must be one of {', '.join(map(str, PROBLEMS))}, got {problem!r}"
        )
    audioset = len(set(names) & set(CLASSES)) > len(CLASSES) / 2
    return PROBLEMS.get(problem, "multilabel" if audioset else "multiclass")


def _beheaded(network: nn.Module, head: str) -> nn.Module:
    """The network with an identity in place of its last linear layer, and that layer beside it."""
    parent, _, leaf = head.rpartition(".")
    last = network.get_submodule(head)
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return nn.ModuleDict({"body": network, "head": last})


def _logits(network: nn.Module, x: Tensor) -> Float[Tensor, "batch dim"]:
    """What reaches the last layer."""
    return network.get_submodule("body")(x, return_dict=True).logits


def _zero_shot(network: Any, path: Path, classes: Sequence[str] | None) -> tuple[nn.Module, tuple[str, ...]]:
    """CLAP's audio encoder, and the classes' text embeddings, scaled, as its last layer."""
    if not classes:
        raise ValueError("`classes` must be given for CLAP, which tells apart whatever sounds it is asked for by name")
    if not any((path / file).is_file() for file in TOKENIZERS):  # the library would make an empty one
        raise ValueError(
            f"{path} has no {TOKENIZERS[0]}, and CLAP needs its tokenizer: save it there with save_pretrained"
        )
    transformers = optional("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # broken in as many ways as the library knows tokenizers
        raise ValueError(f"the tokenizer in {path} cannot be loaded: {type(error).__name__}: {error}") from error
    tokens = tokenizer([PROMPT.format(name) for name in classes], padding=True, return_tensors="pt")
    with torch.no_grad():
        pooled = network.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], return_dict=True
        ).pooler_output
        texts = F.normalize(network.text_projection(pooled), dim=-1)
        head = nn.Linear(texts.shape[1], len(classes), bias=False)
        head.weight.copy_(network.logit_scale_a.exp() * texts)
    parts = {"body": network.audio_model, "projection": network.audio_projection, "head": head}
    return nn.ModuleDict(parts), tuple(classes)


def _sound(network: nn.Module, x: Tensor) -> Float[Tensor, "batch dim"]:
    """CLAP's audio embedding, of length 1."""
    pooled = network.get_submodule("body")(input_features=x, return_dict=True).pooler_output
    return F.normalize(network.get_submodule("projection")(pooled), dim=-1)


class Standardised(nn.Module):
    """Each waveform less its mean, over its deviation; silence that fills up a clip counts like any other sound."""

    def forward(self, raw: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
        """Of variance 1."""
        variance, mean = torch.var_mean(raw, dim=1, correction=0, keepdim=True)
        return (raw - mean) * (variance + 1e-7).rsqrt()


def _kaldi(config: Any, preprocessor: Settings, seconds: float | None, frames: int | None) -> Front:
    """AST's filter bank; what a preprocessor leaves out is as AudioSet's, which are the library's defaults."""
    _refuse("frames", frames, config)
    rate, length = preprocessor.get("sampling_rate", 16_000), preprocessor.get("max_length", 1024)
    bins = preprocessor.get("num_mel_bins", 128)
    if rate != 16_000:
        raise ValueError(f"`sampling_rate` of a filter bank must be 16000 Hz, got {rate}")
    if (length, bins) != (config.max_length, config.num_mel_bins):
        raise ValueError(
            f"`max_length` and `num_mel_bins` must be the same in both configs, got {length} and {bins} of the "
            f"preprocessor, {config.max_length} and {config.num_mel_bins} of the network"
        )
    mean, std = preprocessor.get("mean", -4.2677393), preprocessor.get("std", 4.5689974)
    if not preprocessor.get("do_normalize", True):
        mean, std = 0.0, 0.5
    usual = length // 100 or length / 100  # ten milliseconds a frame; whole seconds were clips, the rest is padding
    chosen = _seconds(seconds, usual, longest=length / 100)
    return Front("audio", waveform(chosen), Fbank(bins=bins, frames=length, mean=mean, divisor=2 * std))


def _signal(config: Any, preprocessor: Settings, seconds: float | None, frames: int | None) -> Front:
    """The waveform itself, standardised where the preprocessor says so."""
    _refuse("frames", frames, config)
    module = Standardised() if preprocessor.get("do_normalize", True) else nn.Identity()
    spec = waveform(_seconds(seconds, USUAL_SECONDS), preprocessor.get("sampling_rate", 16_000))
    return Front("audio", spec, module)


def _clap(config: Any, preprocessor: Settings, seconds: float | None, frames: int | None) -> Front:
    """CLAP's log-mel; a model that fuses several views of a long clip draws them at random, and is refused."""
    _refuse("frames", frames, config)
    mode, padding = preprocessor.get("truncation", "fusion"), preprocessor.get("padding", "repeatpad")
    if config.audio_config.enable_fusion or mode != "rand_trunc":
        raise ValueError(
            "CLAP must be one without fusion (`enable_fusion` false, `truncation` 'rand_trunc'), got "
            f"enable_fusion={config.audio_config.enable_fusion} and truncation={mode!r}: take an unfused checkpoint"
        )
    if padding not in ("repeatpad", "pad"):
        raise ValueError(f"`padding` of CLAP's preprocessor must be 'repeatpad' or 'pad', got {padding!r}")
    rate, longest = preprocessor.get("sampling_rate", 48_000), preprocessor.get("max_length_s", 10)
    log_mel = ClapLogMel(
        length=round(longest * rate),
        rate=rate,
        bins=preprocessor.get("feature_size", 64),
        window=preprocessor.get("fft_window_size", 1024),
        hop=preprocessor.get("hop_length", 480),
        low=preprocessor.get("frequency_min", 0),
        high=preprocessor.get("frequency_max", 14_000),
        repeated=padding == "repeatpad",
    )
    return Front("audio", waveform(_seconds(seconds, longest, longest), rate), log_mel)


def _pictures(config: Any, preprocessor: Settings, seconds: float | None, count: int | None) -> Front:
    """Single frames, each classified; one unless told."""
    _refuse("seconds", seconds, config)
    spec, pixels = _pixels(preprocessor, 1 if count is None else count)
    return Front("visual", spec, pixels, by_frame=True)


def _video(config: Any, preprocessor: Settings, seconds: float | None, count: int | None) -> Front:
    """As many frames as the network was trained with."""
    _refuse("seconds", seconds, config)
    if count not in (None, config.num_frames):
        raise ValueError(f"`frames` must be {config.num_frames}, as many as the network reads, got {count}")
    return Front("visual", *_pixels(preprocessor, config.num_frames))


def _pixels(preprocessor: Settings, count: int) -> tuple[InputSpec, Pixels]:
    """Frames of the size that the processor gives a square picture before it crops; cropped and scaled as it does."""
    if "size" not in preprocessor:
        raise ValueError(
            "the preprocessor's config must have `size`: save it with the image processor's save_pretrained"
        )
    height, width = _lengths("size", preprocessor["size"])
    cut = (height, width)
    kind = str(preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type"))
    if "crop_pct" in preprocessor or kind.startswith("ConvNext"):
        if height < 384:  # larger pictures are not cropped
            height = width = int(height / (preprocessor.get("crop_pct") or 224 / 256))
    elif preprocessor.get("do_center_crop", "crop_size" in preprocessor) and preprocessor.get("crop_size"):
        cut = _lengths("crop_size", preprocessor["crop_size"])
        if not preprocessor.get("do_resize", True):
            height, width = cut
    if cut[0] > height or cut[1] > width:
        raise ValueError(
            f"`crop_size` must lie within the resized picture, {height} x {width}, got {cut[0]} x {cut[1]}"
        )
    mean, std = [0.0] * 3, [1.0] * 3
    if preprocessor.get("do_normalize", True):
        if not preprocessor.get("image_mean") or not preprocessor.get("image_std"):
            raise ValueError(
                "the preprocessor's config must have `image_mean` and `image_std`, or `do_normalize` false"
            )
        mean, std = preprocessor["image_mean"], preprocessor["image_std"]
    levels = preprocessor.get("rescale_factor") or 1 / 255
    scale = 255 * levels if preprocessor.get("do_rescale", True) else 255.0  # the processors read bytes
    margin = ((height - cut[0]) // 2, (width - cut[1]) // 2)
    return frames(count, height, width), Pixels(cut, margin, mean=mean, std=std, scale=scale)


def _lengths(name: str, value: Any) -> tuple[int, int]:
    """Height and width of a square picture under any of the library's spellings."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, dict) and value.get("height") and value.get("width"):
        return value["height"], value["width"]
    if isinstance(value, dict) and value.get("shortest_edge"):
        return value["shortest_edge"], value["shortest_edge"]
    raise ValueError(f"`{name}` of the preprocessor must have height and width, or shortest_edge, got {value}")


def _seconds(given: float | None, usual: float, longest: float = float("inf")) -> float:
    if given is not None and not 0 < given <= longest:
        bound = f" and at most {longest:g}, what the network reads" if longest < float("inf") else ""
        raise ValueError(f"`seconds` must be positive{bound}, got {given:g}")
    return usual if given is None else given


def _refuse(name: str, value: object, config: Any) -> None:
    if value is not None:
        raise ValueError(f"`{name}` has no meaning for {config.model_type}: leave it out")


ARCHITECTURES: dict[str, Architecture] = {
    "ASTForAudioClassification": Architecture("audio-spectrogram-transformer", _kaldi, "classifier.dense"),
    "Wav2Vec2ForSequenceClassification": Architecture("wav2vec2", _signal),
    "HubertForSequenceClassification": Architecture("hubert", _signal),
    "WavLMForSequenceClassification": Architecture("wavlm", _signal),
    "ClapModel": Architecture("clap", _clap),
    "ViTForImageClassification": Architecture("vit", _pictures),
    "DeiTForImageClassification": Architecture("deit", _pictures),
    "BeitForImageClassification": Architecture("beit", _pictures),
    "SwinForImageClassification": Architecture("swin", _pictures),
    "Swinv2ForImageClassification": Architecture("swinv2", _pictures),
    "Dinov2ForImageClassification": Architecture("dinov2", _pictures),
    "ConvNextForImageClassification": Architecture("convnext", _pictures),
    "ConvNextV2ForImageClassification": Architecture("convnextv2", _pictures),
    "ResNetForImageClassification": Architecture("resnet", _pictures, "classifier.1"),
    "VideoMAEForVideoClassification": Architecture("videomae", _video),
}
