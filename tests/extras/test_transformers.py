"""Networks of Hugging Face's transformers as users have them, wrapped: tiny, random, built from configurations."""

import pytest
import torch
from torch import Tensor, nn

from robustav import audit
from robustav.attacks import PGD
from robustav.attacks.ascent import look
from robustav.audio import LogMel
from robustav.classifier import Wrapped, frames, waveform
from robustav.goals import Untargeted
from robustav.prepare import prepare
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel

pytestmark = pytest.mark.extra("transformers")

BATCH = 4
CLASSES = ("bell", "clap", "kick")
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
SPREAD = {"initializer_range": 0.3}  # at the usual 0.02, so small a network hardly looks at its inputs


def spectrogram_transformer(latent: str | None = None) -> Wrapped:
    """AST reads [batch, frame, mel]: the front end goes before it, so that the attack is on the waveform."""
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=16, **TINY, **SPREAD
    )
    log_mel = LogMel(window=160, hop=96, mels=16)
    return Wrapped(
        ASTForAudioClassification(config).eval(),
        specs={"audio": waveform(0.1)},
        classes=CLASSES,
        label_kind="multilabel",
        call=lambda network, inputs: network(log_mel(inputs["audio"])[:, 0]).logits,
        latent=latent,
    )


def waveform_transformer(latent: str | None = None) -> Wrapped:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        conv_dim=(8, 8, 8),
        conv_stride=(5, 4, 4),
        conv_kernel=(10, 8, 4),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=12,
        **TINY,
        **SPREAD,
    )
    return Wrapped(
        Wav2Vec2ForSequenceClassification(config).eval(),
        specs={"audio": waveform(0.1)},
        classes=CLASSES,
        label_kind="multiclass",
        call=lambda network, inputs: network(inputs["audio"]).logits,
        latent=latent,
    )


def picture_transformer(latent: str | None = None) -> Wrapped:
    from transformers import ViTConfig, ViTForImageClassification

    return Wrapped(
        ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **TINY, **SPREAD)).eval(),
        specs={"visual": frames(1, 16)},
        classes=CLASSES,
        label_kind="multiclass",
        call=lambda network, inputs: network(inputs["visual"][:, 0]).logits,
        latent=latent,
    )


WRAPPED = [spectrogram_transformer, waveform_transformer, picture_transformer]
LATENT = {spectrogram_transformer: 16, waveform_transformer: 12, picture_transformer: 16}
EVERY = pytest.mark.parametrize("wrapped", WRAPPED, ids=lambda make: make.__name__)


def batch_of(model: Wrapped) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs well inside their ranges, and the model's own classes as labels."""
    inputs = {
        m: spec.low + (spec.high - spec.low) * (0.25 + 0.5 * torch.rand(BATCH, *spec.shape))
        for m, spec in model.specs.items()
    }
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    return inputs, labels if model.label_kind == "multiclass" else nn.functional.one_hot(labels, 3).float()


@EVERY
def test_wrapping_changes_no_score(wrapped):
    model = wrapped()
    inputs, _ = batch_of(model)
    direct = model.call(model.network, inputs)
    assert direct.shape == (BATCH, len(CLASSES))
    assert torch.equal(model(inputs), direct)
    assert (direct - direct.mean(0)).abs().max() > 1e-3, "the network does not look at its inputs"


@EVERY
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_raises_the_loss_within_the_budget(wrapped, norm):
    model = wrapped()
    inputs, labels = batch_of(model)
    budgets = {
        m: Budget(norm, {"linf": 0.01, "l2": 0.2}[norm], low=spec.low, high=spec.high)
        for m, spec in model.specs.items()
    }
    threat = ThreatModel(budgets, Untargeted(model.label_kind))
    adversarial = PGD(10)(model, inputs, labels, threat, draws=draws_for(0, "abcd"))
    assert audit.violations(inputs, adversarial, threat, model.specs) == [""] * BATCH
    clean, attacked = look(model, inputs, labels, threat), look(model, adversarial, labels, threat)
    assert (attacked.loss > clean.loss + 1e-3).all()


@EVERY
def test_the_prepared_copy_scores_and_climbs_alike(wrapped):
    model = wrapped("classifier")
    inputs, labels = batch_of(model)
    quick = prepare(model, inputs)
    assert quick is not model
    assert not any(parameter.requires_grad for parameter in quick.parameters())
    torch.testing.assert_close(quick(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    (modality, spec), *_ = model.specs.items()
    threat = ThreatModel({modality: Budget("linf", 0.01, low=spec.low)}, Untargeted(model.label_kind))
    adversarial = PGD(5)(quick, inputs, labels, threat, draws=draws_for(0, "abcd"))
    assert (look(model, adversarial, labels, threat).loss > look(model, inputs, labels, threat).loss).all()


@EVERY
def test_the_latent_is_what_the_head_turns_into_the_logits(wrapped):
    model = wrapped("classifier")
    inputs, _ = batch_of(model)
    trace = model.trace(inputs)
    direct = model.call(model.network, inputs)
    assert trace.latent.shape == (BATCH, LATENT[wrapped])
    assert torch.equal(trace.logits, model.network.classifier(trace.latent))
    torch.testing.assert_close(trace.logits, direct, rtol=1e-5, atol=1e-6)
    assert not model.network.classifier._forward_pre_hooks, "looking at the latent left a hook behind"


@EVERY
def test_a_latent_that_is_no_module_is_an_error_that_lists_the_modules(wrapped):
    with pytest.raises(
        ValueError, match=r"`latent` must name a module of the network, got 'head'; its last are .*'classifier"
    ):
        wrapped("head")


@pytest.mark.parametrize(
    ("wrapped", "latent", "shape"),  # of the tokens: 2 extra ones and 16 patches; 1 and 16; or 19 steps of time
    [
        (spectrogram_transformer, "audio_spectrogram_transformer.layernorm", r"\[4, 18, 16\]"),
        (picture_transformer, "vit.layernorm", r"\[4, 17, 16\]"),
        (waveform_transformer, "projector", r"\[4, 19, 16\]"),
    ],
)
def test_tokens_are_no_latent(wrapped, latent, shape):
    model = wrapped(latent)
    inputs = {m: torch.zeros(BATCH, *spec.shape) for m, spec in model.specs.items()}
    with pytest.raises(ValueError, match=rf"must name the last module, .* got '{latent}', called 1 times with {shape}"):
        model(inputs)
