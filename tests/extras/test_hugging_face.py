"""Folders as transformers writes them, tiny and random: what its own processors lead to is what comes out here."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from robustav import audit
from robustav.attacks import PGD
from robustav.attacks.ascent import look
from robustav.clap_log_mel import ClapLogMel
from robustav.classifier import AtFeatures, waveform
from robustav.data.audioset import CLASSES as AUDIOSET
from robustav.fbank import Fbank
from robustav.goals import Untargeted
from robustav.models import body_and_head
from robustav.models.hugging_face import (
    ARCHITECTURES,
    PROMPT,
    Standardised,
    architecture_of,
    from_directory,
    weight_file,
)
from robustav.prepare import prepare
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel

pytestmark = pytest.mark.extra("transformers")

BATCH, SECONDS = 4, 0.1
NAMES = ("bell", "hand clap", "kick")
LABELS = {"num_labels": 3, "id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
SPREAD = {"initializer_range": 0.3}  # at the usual 0.02, so small a network hardly looks at its inputs
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, **SPREAD}
MAPS = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, **SPREAD}
SOUND = {
    "conv_dim": (8, 8, 8),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
}
PICTURE = {"image_size": 16, "patch_size": 4}
SQUARE = {"size": {"height": 16, "width": 16}}
CROPPED = {"size": {"height": 20, "width": 20}, "crop_size": {"height": 16, "width": 16}}
SHORT = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
ODD = {"size": {"shortest_edge": 21}, "crop_size": {"height": 16, "width": 16}}
CLAP = {
    "text_config": {**SMALL, "vocab_size": 40, "max_position_embeddings": 40, "projection_dim": 12},
    "audio_config": {
        "spec_size": 64,
        "num_mel_bins": 16,
        "window_size": 4,
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "projection_dim": 12,
    },
    "projection_dim": 12,
}
SPECTRUM = {"max_length": 16, "num_mel_bins": 16}
# Architecture -> its config, its settings, its processor, that one's settings
FOLDERS = {
    "ASTForAudioClassification": (
        "ASTConfig",
        {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, **SPECTRUM, **SMALL},
        "ASTFeatureExtractor",
        {**SPECTRUM, "mean": -5.0, "std": 3.0},
    ),
    "Wav2Vec2ForSequenceClassification": ("Wav2Vec2Config", {**SOUND, **SMALL}, "Wav2Vec2FeatureExtractor", {}),
    "HubertForSequenceClassification": ("HubertConfig", {**SOUND, **SMALL}, "Wav2Vec2FeatureExtractor", {}),
    "WavLMForSequenceClassification": (
        "WavLMConfig",
        {**SOUND, **SMALL, "use_weighted_layer_sum": True},
        "Wav2Vec2FeatureExtractor",
        {"do_normalize": False, "sampling_rate": 8000},
    ),
    "ClapModel": (
        "ClapConfig",
        CLAP,
        "ClapFeatureExtractor",
        {"max_length_s": 1, "feature_size": 16, "frequency_min": 50, "truncation": "rand_trunc"},
    ),
    "ViTForImageClassification": ("ViTConfig", {**PICTURE, **SMALL}, "ViTImageProcessor", SQUARE),
    "DeiTForImageClassification": ("DeiTConfig", {**PICTURE, **SMALL}, "DeiTImageProcessor", CROPPED),
    "BeitForImageClassification": (
        "BeitConfig",
        {**PICTURE, **SMALL},
        "BeitImageProcessor",
        {**CROPPED, "do_center_crop": True},
    ),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, **MAPS},
        "ViTImageProcessor",
        SQUARE,
    ),
    "Swinv2ForImageClassification": (
        "Swinv2Config",
        {"image_size": 16, "patch_size": 2, **MAPS},
        "ViTImageProcessor",
        SQUARE,
    ),
    "Dinov2ForImageClassification": ("Dinov2Config", {**PICTURE, **SMALL}, "BitImageProcessor", ODD),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, **SPREAD},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_pct": 0.75},
    ),
    "ConvNextV2ForImageClassification": (
        "ConvNextV2Config",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, **SPREAD},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 32}},
    ),
    "ResNetForImageClassification": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "BitImageProcessor",
        SHORT,
    ),
    "VideoMAEForVideoClassification": (
        "VideoMAEConfig",
        {**PICTURE, **SMALL, "num_frames": 4, "tubelet_size": 2},
        "VideoMAEImageProcessor",
        SHORT,
    ),
}
SETTINGS = {
    "ClapModel": {"seconds": 0.3, "classes": NAMES},
    **{f"{name}ForSequenceClassification": {"seconds": SECONDS} for name in ("Wav2Vec2", "Hubert", "WavLM")},
}
SIZES = {  # of raw pictures, where they are not what the network sees
    "DeiT": 20,
    "Beit": 20,
    "Dinov2": 21,
    "ConvNext": 42,
    "ConvNextV2": 36,
    "ResNet": 20,
    "VideoMAE": 20,
}
EVERY = pytest.mark.parametrize("name", FOLDERS)


def words():
    """A tokenizer of whole words for the prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", "<pad>", *dict.fromkeys([*PROMPT.replace("{}", " ".join(NAMES)).replace(".", " .").split()])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


class Saved:
    """One folder, and what transformers itself makes of input."""

    def __init__(self, name, root, **changes):
        import transformers

        torch.manual_seed(0)
        kind, settings, processor, its = FOLDERS[name]
        own = {} if name == "ClapModel" else LABELS
        self.name, self.folder = name, root / name
        self.network = getattr(transformers, name)(getattr(transformers, kind)(**{**settings, **own, **changes})).eval()
        with torch.no_grad():
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.3, 0.3)
                    module.running_var.uniform_(0.3, 2.0)
        self.processor = getattr(transformers, processor)(**its)
        self.network.save_pretrained(self.folder)
        self.processor.save_pretrained(self.folder)
        if name == "ClapModel":
            self.tokenizer = words()
            self.tokenizer.save_pretrained(self.folder)

    def model(self, **settings):
        return from_directory(self.folder, **{**SETTINGS.get(self.name, {}), **settings})

    def scores(self, inputs):
        """By the library's own processor, from what it is made for: NumPy waveforms, pictures of bytes."""
        with torch.no_grad():
            if "visual" in inputs:
                frames = (255 * inputs["visual"]).round().byte()
                listed = frames[:, 0] if frames.shape[1] == 1 else frames
                given = [clip.numpy() if clip.ndim == 3 else [frame.numpy() for frame in clip] for clip in listed]
                read = self.processor(given, input_data_format="channels_first", return_tensors="pt")
                return self.network(read["pixel_values"]).logits
            clips = [clip.numpy() for clip in inputs["audio"]]
            read = self.processor(clips, sampling_rate=self.processor.sampling_rate, return_tensors="pt")
            if self.name != "ClapModel":
                return self.network(read["input_values"]).logits
            texts = self.tokenizer([PROMPT.format(name) for name in NAMES], padding=True, return_tensors="pt")
            texts = {key: texts[key] for key in ("input_ids", "attention_mask")}
            return self.network(**texts, input_features=read["input_features"].float()).logits_per_audio


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each folder is written once."""
    root, made = tmp_path_factory.mktemp("folders"), {}

    def get(name):
        if name not in made:
            made[name] = Saved(name, root)
        return made[name]

    return get


@pytest.fixture
def copy(saved, tmp_path):
    """A folder of one's own to break."""

    def get(name="ViTForImageClassification"):
        return shutil.copytree(saved(name).folder, tmp_path / name)

    return get


def change(file, **settings):
    """Set entries of a JSON file, or take out those that are None."""
    content = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def batch_of(model, size=BATCH):
    """Inputs of the kind that files hold, inside their ranges: tones in noise, pictures of multiples of 1 / 255."""
    ((modality, spec),) = model.specs.items()
    if modality == "visual":
        return {modality: torch.randint(20, 236, (size, *spec.shape)) / 255}
    time = torch.arange(spec.shape[0]) / spec.sample_rate
    tones = (2 * torch.pi * time * 400 * (1 + torch.arange(size))[:, None]).sin()
    return {modality: 0.4 * tones + 0.1 * torch.randn(size, spec.shape[0])}


def test_every_architecture_is_tried():
    assert FOLDERS.keys() == ARCHITECTURES.keys()


@EVERY
def test_scores_are_those_of_transformers(name, saved):
    model = saved(name).model()
    assert model.classes == NAMES
    assert model.label_kind == "multiclass"
    assert not model.training
    inputs = batch_of(model)
    got, expected = model(inputs), saved(name).scores(inputs)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (got - got.mean(0)).abs().max() > 1e-3, "the network does not look at its inputs"


@EVERY
def test_stages_and_latent(name, saved):
    model = saved(name).model()
    inputs = batch_of(model)
    (modality,) = inputs
    trace = model.trace(inputs)
    head = model.network.get_submodule("head")
    assert trace.latent.shape == (BATCH, head.in_features)
    torch.testing.assert_close(head(trace.latent), trace.logits)
    assert torch.equal(model.finish(model.features(inputs)).logits, trace.logits)
    view = AtFeatures(model)
    torch.testing.assert_close(view({modality: model.front_end(modality, inputs[modality])}), trace.logits)
    alone = torch.cat([model({modality: x[None]}) for x in inputs[modality]])
    torch.testing.assert_close(alone, trace.logits, rtol=1e-4, atol=1e-5)


@EVERY
def test_pgd_climbs_within_its_budget(name, saved):
    model = saved(name).model()
    ((modality, spec),) = model.specs.items()
    clean = batch_of(model)
    labels = model(clean).argmax(1)
    threat = ThreatModel({modality: Budget("linf", 0.01, low=spec.low)}, Untargeted("multiclass"))
    x = clean[modality].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model({modality: x}), labels), x)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    adversarial = PGD(8)(prepare(model, clean), clean, labels, threat, draws=draws_for(0, "abcd"))
    assert audit.violations(clean, adversarial, threat, model.specs) == [""] * BATCH
    before, after = (look(model, inputs, labels, threat).loss for inputs in (clean, adversarial))
    assert (after > before).all()


@pytest.mark.parametrize("name", [name for name in FOLDERS if "Image" in name or "Video" in name])
def test_pictures_come_as_the_processor_resizes_them(name, saved):
    spec = saved(name).model().specs["visual"]
    size = SIZES.get(name.partition("For")[0], 16)
    assert spec.shape == (4 if "Video" in name else 1, 3, size, size)
    x = torch.rand(1, *spec.shape).requires_grad_()
    (gradient,) = torch.autograd.grad(saved(name).model()({"visual": x}).square().sum(), x)
    seen = gradient[0, 0].abs().sum(0) > 0
    wanted = 32 if "ConvNext" in name else 16
    assert seen.any(1).sum() == seen.any(0).sum() == wanted
    assert seen[(size - wanted) // 2].any()


@pytest.mark.parametrize("label_kind", ["multiclass", "multilabel"])
def test_frames_are_averaged_as_probabilities(label_kind, saved):
    each = saved("ViTForImageClassification").model(label_kind=label_kind)
    clip = saved("ViTForImageClassification").model(label_kind=label_kind, frames=3)
    assert clip.specs["visual"].shape == (3, 3, 16, 16)
    inputs = batch_of(clip)
    rule = torch.sigmoid if label_kind == "multilabel" else (lambda logits: logits.softmax(1))
    frames = [rule(each({"visual": inputs["visual"][:, i : i + 1]})) for i in range(3)]
    torch.testing.assert_close(rule(clip(inputs)), torch.stack(frames).mean(0))
    trace = clip.trace(inputs)
    assert trace.latent.shape == (BATCH, 3 * 16)
    torch.testing.assert_close(trace.latent[:, 16:32], each.trace({"visual": inputs["visual"][:, 1:2]}).latent)


@pytest.mark.parametrize(
    ("bytes_", "scale"), [({"do_rescale": False}, 255), ({"rescale_factor": 1 / 127.5}, 2), ({"size": 16}, 1)]
)
def test_older_and_rarer_processor_settings(bytes_, scale, copy):
    folder = copy()
    plain = from_directory(folder).front
    change(folder / "preprocessor_config.json", **bytes_)
    model = from_directory(folder)
    x = torch.rand(1, 1, 3, 16, 16)
    torch.testing.assert_close(model.front(x), (scale * x - plain.mean) / plain.std)
    change(folder / "preprocessor_config.json", do_normalize=False, image_mean=None, image_std=None)
    torch.testing.assert_close(from_directory(folder).front(x), scale * x)


@pytest.mark.parametrize(
    ("settings", "raw", "seen"),
    [
        ({"size": 224, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor"}, 256, 224),
        ({"size": 384, "crop_pct": 0.875, "feature_extractor_type": "ConvNextFeatureExtractor"}, 384, 384),
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, 256, 224),
        ({"size": 256, "crop_size": 224, "do_center_crop": False}, 256, 256),
        ({"size": 224, "do_center_crop": True}, 224, 224),
        ({"size": 256, "crop_size": 224, "do_resize": False}, 224, 224),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 256, 224),
    ],
)
def test_sizes_of_published_processors(settings, raw, seen, copy):
    """A ResNet sees pictures of any size."""
    folder = copy("ResNetForImageClassification")
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **statistics}))
    model = from_directory(folder)
    assert model.specs["visual"].shape == (1, 3, raw, raw)
    assert model.front(torch.rand(1, 1, 3, raw, raw)).shape == (1, 1, 3, seen, seen)


def test_audio_lengths(saved):
    ast, clap, wave = (
        saved(name) for name in ("ASTForAudioClassification", "ClapModel", "WavLMForSequenceClassification")
    )
    assert ast.model().specs["audio"].shape == (2560,)
    assert ast.model(seconds=0.1).specs["audio"].shape == (1600,)
    assert clap.model(seconds=None).specs["audio"].shape == (48_000,)
    assert wave.model(seconds=None).specs["audio"] == wave.model(seconds=10.0).specs["audio"]
    assert wave.model().specs["audio"].sample_rate == 8000
    with pytest.raises(ValueError, match=r"`seconds` must be positive and at most 0.16, what the network reads, got 2"):
        ast.model(seconds=2)
    with pytest.raises(ValueError, match="`seconds` must be positive, got 0"):
        wave.model(seconds=0)
    with pytest.raises(ValueError, match="`seconds` must be positive and at most 1"):
        clap.model(seconds=1.5)


@pytest.mark.parametrize(("frames", "seconds"), [(16, 0.16), (128, 1.0), (250, 2.0)])
def test_a_filter_banks_usual_length_is_in_whole_seconds(frames, seconds, copy):
    """Published networks were trained on them, and have some frames more."""
    folder = copy("ASTForAudioClassification")
    for file in ("config.json", "preprocessor_config.json"):
        change(folder / file, max_length=frames)
    config, preprocessor = (
        json.loads((folder / file).read_text()) for file in ("config.json", "preprocessor_config.json")
    )
    front = ARCHITECTURES["ASTForAudioClassification"].front(SimpleNamespace(**config), preprocessor, None, None)
    assert front.spec == waveform(seconds)


def test_a_filter_bank_that_is_not_normalised(copy):
    folder = copy("ASTForAudioClassification")
    change(folder / "preprocessor_config.json", do_normalize=False)
    model = from_directory(folder)
    inputs = batch_of(model)
    torch.testing.assert_close(
        model.front_end("audio", inputs["audio"]), Fbank(bins=16, frames=16)(inputs["audio"]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("seconds", [0.3, 0.4, 0.5, 1.0])
def test_claps_repetitions(seconds, saved):
    """Three and two whole ones and a rest, two exactly, and the whole length."""
    clap = saved("ClapModel")
    model = clap.model(seconds=seconds)
    inputs = batch_of(model, 2)
    expected = clap.scores(inputs)
    assert (model(inputs) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("low", [0, 50])
def test_claps_log_mel_at_its_published_size(low):
    """In decibels; the extractor computes in float64."""
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(frequency_min=low, truncation="rand_trunc")
    sound = torch.randn(1, 5 * 48_000).cumsum(1)  # steep: little is left in the highest bands
    sound = 0.9 * sound / sound.abs().max()
    expected = extractor([sound[0].numpy()], sampling_rate=48_000, return_tensors="pt")["input_features"]
    got = ClapLogMel(low=low)(sound)
    assert got.shape == expected.shape == (1, 1, 1001, 64)
    assert (got - expected).abs().max() < 0.01
    assert expected.max() - expected.min() > 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high": 30_000}, "`low` and `high` must satisfy 0 <= low < high <= 24000 Hz, got 50.0 and 30000"),
        ({"window": 1023}, "`window` must be even"),
        ({"hop": 2000}, "`hop` lie in 1..window"),
        ({"length": 100}, "`length` be above window / 2"),
    ],
)
def test_a_log_mel_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ClapLogMel(**settings)


def test_claps_log_mel_refuses_what_it_would_have_to_cut_at_random():
    with pytest.raises(ValueError, match="a waveform must have at most 480000 samples, got 480001: cut it"):
        ClapLogMel()(torch.zeros(1, 480_001))


def test_claps_padding_without_repetition(copy, saved):
    folder = copy("ClapModel")
    change(folder / "preprocessor_config.json", padding="pad")
    model = from_directory(folder, seconds=0.3, classes=NAMES)
    inputs = batch_of(model, 2)
    long = torch.nn.functional.pad(inputs["audio"], (0, 33_600))
    whole = saved("ClapModel").model(seconds=1.0)
    torch.testing.assert_close(model(inputs), whole({"audio": long}))


def test_clap_is_quiet_in_silence_and_can_leave_it(saved):
    model = saved("ClapModel").model()
    x = torch.zeros(1, *model.specs["audio"].shape).requires_grad_()
    features = model.front_end("audio", x)
    assert features.shape == (1, 1, 101, 16)
    torch.testing.assert_close(features, torch.full_like(features, -100.0))
    noise = (1e-7 * torch.randn_like(x)).requires_grad_()
    (gradient,) = torch.autograd.grad(model({"audio": noise})[0, 0], noise)
    assert gradient.abs().max() > 0, "the floor has no gradient"


def test_a_standardised_waveform():
    x = 3 * torch.randn(2, 500, dtype=torch.float64) + 7
    got = Standardised()(x)
    torch.testing.assert_close(got.mean(1), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(got.square().mean(1), torch.ones(2, dtype=torch.float64))
    assert Standardised()(torch.zeros(1, 9)).eq(0).all()


@pytest.mark.parametrize(
    ("problem", "given", "expected"),
    [
        ("multi_label_classification", None, "multilabel"),
        ("single_label_classification", None, "multiclass"),
        (None, None, "multiclass"),
        (None, "multilabel", "multilabel"),
        ("multi_label_classification", "multiclass", "multiclass"),
    ],
)
def test_the_label_kind_is_the_problem_type(problem, given, expected, copy):
    folder = copy()
    change(folder / "config.json", problem_type=problem)
    assert from_directory(folder, label_kind=given).label_kind == expected


def test_audioset_is_multilabel_without_saying_so(tmp_path):
    names = dict(enumerate(AUDIOSET))
    saved = Saved("ASTForAudioClassification", tmp_path, num_labels=len(names), id2label=names, label2id={})
    model = saved.model()
    assert model.classes == AUDIOSET
    assert model.label_kind == "multilabel"
    assert saved.model(classes=[str(i) for i in range(527)]).label_kind == "multilabel", "other names, the same task"


def test_classes_may_be_renamed(saved):
    vit = saved("ViTForImageClassification")
    assert vit.model(classes=["a", "b", "c"]).classes == ("a", "b", "c")
    with pytest.raises(ValueError, match="`classes` must be 3 names, as the network has outputs, got 2"):
        vit.model(classes=["a", "b"])


def test_nothing_is_downloaded_and_no_code_is_run(copy, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("ClapModel", "ViTForImageClassification"):
        folder = copy(name)
        (folder / "mine.py").write_text("raise AssertionError('foreign code')")
        change(
            folder / "config.json",
            auto_map={"AutoModel": "mine.Mine", "AutoConfig": "mine.Config"},
            attn_implementation="someone/kernels",
        )
        from_directory(folder, **SETTINGS.get(name, {}))


def test_safetensors_before_pickles_and_pickles_of_tensors_only(copy, monkeypatch):
    folder = copy()
    inputs = {"visual": torch.rand(2, 1, 3, 16, 16)}
    expected = from_directory(folder)(inputs)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert weight_file(folder).name == "model.safetensors"
    torch.testing.assert_close(from_directory(folder)(inputs), expected)

    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert weight_file(folder).name == "pytorch_model.bin"
    torch.testing.assert_close(from_directory(folder)(inputs), expected)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.5.1+cpu")
        with pytest.raises(
            ValueError,
            match=r"is a pickle, and loading one is safe from torch 2.6 on, this is 2.5.1.*model.safetensors",
        ):
            from_directory(folder)

    class Evil:
        def __reduce__(self):
            return (folder.joinpath("ran").write_text, ("x",))

    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError,
        match=r"pytorch_model.bin' holds more than tensors, and loading it could run code: save its state_dict",
    ):
        from_directory(folder)
    assert not (folder / "ran").exists()


def test_half_precision_weights_become_single(saved, tmp_path):
    import transformers

    vit = saved("ViTForImageClassification")
    transformers.ViTForImageClassification.from_pretrained(vit.folder).half().save_pretrained(tmp_path)
    vit.processor.save_pretrained(tmp_path)
    model = from_directory(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    inputs = batch_of(model)
    torch.testing.assert_close(model(inputs), vit.scores(inputs), rtol=0, atol=0.02)


@pytest.mark.parametrize("within", ["feature_extractor", "image_processor"])
def test_settings_within_a_processors_config(within, copy):
    folder = copy()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    inputs = {"visual": torch.rand(2, 1, 3, 16, 16)}
    expected = from_directory(folder)(inputs)
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "X", within: settings}))
    assert torch.equal(from_directory(folder)(inputs), expected)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    with pytest.raises(ValueError, match=r"has no preprocessor_config.json"):
        from_directory(folder)


def test_the_architecture_is_found_by_its_type(copy):
    folder = copy()
    change(folder / "config.json", architectures=None)
    assert architecture_of(folder) == "ViTForImageClassification"
    from_directory(folder)
    change(folder / "config.json", architectures=["ViTModel"])
    with pytest.raises(
        ValueError,
        match=r"the architecture must be one of ASTForAudio.*VideoMAEForVideoClassification, got ViTModel: wrap",
    ):
        from_directory(folder)
    change(folder / "config.json", architectures=None, model_type="bert")
    with pytest.raises(ValueError, match=r"must be one of .*, got 'bert'"):
        from_directory(folder)


def test_what_is_missing_is_named(copy, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"nowhere has no config.json: save model and processor"):
        from_directory(tmp_path / "nowhere")
    folder = copy()
    with monkeypatch.context() as patch:
        patch.setattr(body_and_head, "find_spec", lambda _: None)
        with pytest.raises(ValueError, match=r"transformers is not installed: pip install 'robustav\[transformers\]'"):
            from_directory(folder)
    (folder / "preprocessor_config.json").rename(folder / "kept")
    with pytest.raises(ValueError, match=r"has no preprocessor_config.json, .*: save the feature extractor"):
        from_directory(folder)
    (folder / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"preprocessor_config.json must hold one object, got list"):
        from_directory(folder)
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config.json is no JSON"):
        from_directory(folder)
    (folder / "kept").rename(folder / "preprocessor_config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors or pytorch_model.bin: put the weights there"):
        from_directory(folder)


def test_weights_must_be_all_there_and_fit(copy):
    from safetensors.torch import load_file, save_file

    folder = copy()
    state = load_file(folder / "model.safetensors")
    lacking = {key: value for key, value in state.items() if "classifier" not in key}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"does not fit config.json: missing \(2\): classifier.bias, classifier.weight$"
    ):
        from_directory(folder)
    further = {key.replace("layer.0", "layer.7"): value.clone() for key, value in state.items() if "layer.0." in key}
    pooler = {"vit.pooler.dense.weight": torch.zeros(16, 16)}  # of no use here, and in many published files
    save_file(state | pooler, folder / "model.safetensors", metadata={"format": "pt"})
    from_directory(folder)
    save_file(state | further, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"which asks for less: unexpected \(16\): vit\..*7\."):
        from_directory(folder)
    state["classifier.weight"] = torch.zeros(5, 16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be loaded as ViTForImageClassification"):
        from_directory(folder)


@pytest.mark.parametrize(
    ("name", "file", "settings", "message"),
    [
        ("ViT", "config.json", {"quantization_config": {"bits": 4}}, "holds quantised weights"),
        ("ViT", "config.json", {"problem_type": "regression"}, "`problem_type` .* got 'regression'"),
        ("ViT", "preprocessor_config.json", {"size": None}, "must have `size`"),
        ("ViT", "preprocessor_config.json", {"image_mean": None}, "must have `image_mean` and `image_std`"),
        ("ViT", "preprocessor_config.json", {"size": {"longest_edge": 9}}, "`size` .* must have height and width, or"),
        ("DeiT", "preprocessor_config.json", {"size": 12}, "`crop_size` must lie within .* 12 x 12, got 16 x 16"),
        ("AST", "preprocessor_config.json", {"max_length": 32}, "must be the same in both configs, got 32 and 16"),
        ("AST", "preprocessor_config.json", {"sampling_rate": 8000}, "must be 16000 Hz, got 8000"),
        ("Clap", "preprocessor_config.json", {"truncation": "fusion"}, "one without fusion .* truncation='fusion'"),
        ("Clap", "preprocessor_config.json", {"padding": "repeat"}, "`padding` .* got 'repeat'"),
    ],
)
def test_settings_that_cannot_be_met(name, file, settings, message, copy):
    whole = next(key for key in FOLDERS if key.startswith(name))
    folder = copy(whole)
    change(folder / file, **settings)
    with pytest.raises(ValueError, match=message):
        from_directory(folder, **SETTINGS.get(whole, {}))


def test_an_adapter_beside_the_weights_is_not_passed_over(copy):
    folder = copy()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter: merge it"):
        from_directory(folder)


def test_settings_without_meaning_are_refused(saved):
    with pytest.raises(ValueError, match=r"`seconds` has no meaning for vit: leave it out"):
        saved("ViTForImageClassification").model(seconds=1.0)
    with pytest.raises(ValueError, match=r"`frames` has no meaning for audio-spectrogram-transformer"):
        saved("ASTForAudioClassification").model(frames=2)
    with pytest.raises(ValueError, match=r"`frames` must be 4, as many as the network reads, got 8"):
        saved("VideoMAEForVideoClassification").model(frames=8)
    with pytest.raises(ValueError, match=r"`classes` must be given for CLAP"):
        saved("ClapModel").model(classes=None)
    with pytest.raises(ValueError, match=r"`label_kind` must be 'multilabel' or 'multiclass', got 'both'"):
        saved("ViTForImageClassification").model(label_kind="both")


def test_clap_without_a_tokenizer(copy):
    folder = copy("ClapModel")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be loaded"):
        from_directory(folder, classes=NAMES)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer.json, and CLAP needs its tokenizer"):
        from_directory(folder, classes=NAMES)
