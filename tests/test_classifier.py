"""Classifiers: stages that compose, modalities that are checked, and views that compute the same."""

import pytest
import torch
from conftest import CLASSES, batch_of, tiny_fusion, tiny_specs
from torch import nn

from robustav.attacks import PGD
from robustav.audio import LogMel, hertz_to_mel, mel_filters, mel_to_hertz
from robustav.classifier import AtFeatures, InputSpec, LateFusion, Wrapped, frames, missing_adaptive, waveform
from robustav.goals import Untargeted
from robustav.models import small
from robustav.prepare import fold_batch_norms, medium_is_exact, prepare, quick_products
from robustav.randomness import draws_for
from robustav.threat import Budget, ThreatModel
from robustav.view import AttackView, Tally

SPECS = tiny_specs()


def test_trace_is_the_stages_one_after_the_other(fusion, inputs):
    trace = fusion.trace(inputs)
    features = {m: fusion.encode(m, fusion.front_end(m, x)) for m, x in inputs.items()}
    torch.testing.assert_close(trace.latent, fusion.fuse(features))
    torch.testing.assert_close(trace.logits, fusion.classify(trace.latent))
    torch.testing.assert_close(fusion(inputs), trace.logits)


def test_the_order_of_modalities_does_not_matter(fusion, inputs):
    backwards = dict(reversed(inputs.items()))
    assert list(backwards) != list(inputs)
    torch.testing.assert_close(fusion(backwards), fusion(inputs), rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"audio": None}, {"smell": torch.zeros(6, 1)}])
def test_a_missing_or_extra_modality_is_named_with_what_was_expected(fusion, inputs, change):
    given = {m: x for m, x in {**inputs, **change}.items() if x is not None}
    with pytest.raises(ValueError, match=r"must have the modalities \['audio', 'visual'\], got \["):
        fusion(given)


def test_late_fusion_checks_its_parts():
    with pytest.raises(ValueError, match="must have the modalities"):
        LateFusion({"audio": nn.Flatten()}, nn.Linear(1, 1), specs=SPECS, classes=("a",))
    with pytest.raises(ValueError, match=r"`front_ends` must name modalities among \['audio'\], got also \['visual'\]"):
        LateFusion(
            {"audio": nn.Flatten()},
            nn.Linear(1, 1),
            specs={"audio": SPECS["audio"]},
            classes=("a",),
            front_ends={"visual": nn.Flatten()},
        )


def with_front_ends():
    specs = {"audio": waveform(0.1), "visual": frames(2, 16)}
    torch.manual_seed(0)
    return small.late(specs, CLASSES).eval()


def test_at_features_takes_front_end_outputs():
    model = with_front_ends()
    view = AtFeatures(model)
    raw = batch_of(model.specs, 3)
    features = view.front_ends(raw)
    assert {m: spec.shape for m, spec in view.specs.items()} == {m: tuple(x.shape[1:]) for m, x in features.items()}
    assert all(spec.unit == "feature" for spec in view.specs.values())
    torch.testing.assert_close(view(features), model(raw))


def test_features_can_be_attacked_and_the_unit_says_so():
    model = with_front_ends()
    view = AtFeatures(model)
    features = view.front_ends(batch_of(model.specs, 2))
    budget = Budget("linf", 0.5, low=float("-inf"), high=float("inf"))
    threat = ThreatModel({"audio": budget}, Untargeted())
    labels = torch.zeros(2, 3)
    adversarial = PGD(5)(view, features, labels, threat, draws=draws_for(0, "ab"))
    assert (threat.gauge(features, adversarial) <= 1).all()
    assert (threat.gauge(features, adversarial) > 0.99).all()
    assert budget.words("feature") == "linf, 0.5 feature"


def test_what_a_model_declares_of_itself_holds_at_its_features():
    model = with_front_ends()
    view = AtFeatures(model, low=-9.0, high=9.0)
    assert (view.needs_adaptive, view.stochastic, view.adaptive_attacks()) == (False, False, {})
    assert view.surrogate() is view and view.at(torch.arange(2)) is view

    class Guarded(LateFusion):
        needs_adaptive = stochastic = True

        def adaptive_attacks(self):
            return {"knowing": PGD(3)}

        def surrogate(self):
            return model

        def at(self, rows):
            return model

    guarded = Guarded(
        dict(model.encoders), model.head, specs=model.specs, classes=CLASSES, front_ends=dict(model.front_ends)
    )
    view = AtFeatures(guarded, low=-9.0, high=9.0).eval()
    assert view.needs_adaptive and view.stochastic and "knowing" in missing_adaptive(view, ["pgd"])
    for seen in (view.surrogate(), view.at(torch.arange(2))):
        assert isinstance(seen, AtFeatures) and seen.model is model and not seen.training
        assert seen.specs == view.specs


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x))


def wrapped(network, **changes):
    settings = {"specs": {"audio": SPECS["audio"]}, "classes": CLASSES, "label_kind": "multilabel"}
    return Wrapped(network, call=lambda net, given: net(given["audio"]), **{**settings, **changes})


def test_a_wrapped_network_scores_as_it_did_and_gives_its_latent():
    network, x = Network(), torch.rand(4, 64)
    for model in (wrapped(network), wrapped(network, latent="head")):
        torch.testing.assert_close(model({"audio": x}), network(x))
    trace = wrapped(network, latent="head").trace({"audio": x})
    torch.testing.assert_close(trace.latent, network.body(x))
    assert not network.head._forward_hooks


def test_a_latent_must_be_the_last_modules_input():
    with pytest.raises(
        ValueError, match=r"`latent` must name a module of the network, got 'tail'; its last are \['body', "
    ):
        wrapped(Network(), latent="tail")
    with pytest.raises(ValueError, match=r"must name the last module, called once with .* got 'body', called 1 times"):
        wrapped(Network(), latent="body")({"audio": torch.rand(2, 64)})

    class Scaled(Network):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="returning the logits"):
        wrapped(Scaled(), latent="head")({"audio": torch.rand(2, 64)})


@pytest.mark.parametrize("make", [tiny_fusion, with_front_ends], ids=["tiny", "small"])
def test_the_prepared_copy_scores_alike_and_the_model_is_untouched(make):
    model = make()
    x = batch_of(model.specs, 4)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quick = prepare(model, x)
    assert not any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in quick.modules())
    assert not any(p.requires_grad for p in quick.parameters())
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_folding_that_would_change_the_scores_is_not_used(inputs, caplog):
    """A sequence whose order is not the order of data: only the check of its scores can tell."""

    class Backwards(nn.Sequential):
        def forward(self, x):
            return self[0](self[1](x))

    model = tiny_fusion()
    encoder = model.encoders["audio"]
    model.encoders["audio"] = nn.Sequential(
        encoder[0], nn.Conv1d(1, 4, 8, 4), Backwards(nn.Conv1d(4, 4, 1), encoder[2]), *encoder[3:]
    ).eval()
    kept = prepare(model, inputs)
    torch.testing.assert_close(kept(inputs), model(inputs))
    assert "unfolded" in caplog.text


def test_a_batch_norm_behind_something_else_stays():
    layers = nn.Sequential(nn.Conv1d(1, 2, 1), nn.ReLU(), nn.BatchNorm1d(2)).eval()
    fold_batch_norms(layers)
    assert isinstance(layers[2], nn.BatchNorm1d)


def test_a_model_that_cannot_be_copied_is_attacked_as_it_is(fusion, inputs, caplog):
    fusion.lock = (generator for generator in ())
    assert prepare(fusion, inputs) is fusion
    assert "cannot be copied" in caplog.text


def test_quick_products_are_undone():
    before = torch.get_float32_matmul_precision()
    with quick_products():
        assert torch.get_float32_matmul_precision() == ("medium" if medium_is_exact() else before)
    assert torch.get_float32_matmul_precision() == before


def test_the_attack_view_of_one_modality_scores_as_the_model_of_both(fusion, inputs):
    held = {"visual": fusion.encode("visual", inputs["visual"]).detach()}
    view = AttackView(fusion, ("audio",), held, Tally(len(inputs["audio"]), ("audio",)))
    torch.testing.assert_close(view({"audio": inputs["audio"]}), fusion(inputs))
    with pytest.raises(ValueError, match=r"must have the modalities \['audio'\]"):
        view(inputs)


def test_input_specs_check_shape_type_and_range():
    spec = waveform(0.5, 100)
    assert (spec.shape, spec.sample_rate) == ((50,), 100)
    assert frames(10, 224).shape == (10, 3, 224, 224)
    assert frames(1, 4, 6).shape == (1, 3, 4, 6)
    spec.check("audio", torch.zeros(2, 50))
    for x, message in (
        (torch.zeros(2, 51), r"must have shape \[batch, 50\], got \[2, 51\]"),
        (torch.full((1, 50), 1.5), r"must lie in \[-1, 1\] \(amplitude\), got values from 1.5 to 1.5"),
        (torch.full((1, 50), float("nan")), "got values from nan to nan"),
    ):
        with pytest.raises(ValueError, match=message):
            spec.check("audio", x)
    with pytest.raises(TypeError, match=r"must be floating point, got torch.int16"):
        spec.check("audio", torch.zeros(2, 50, dtype=torch.int16))
    with pytest.raises(ValueError, match="`low` must be below `high`"):
        InputSpec((1,), 1.0, 1.0, "amplitude")
    with pytest.raises(ValueError, match="`shape` must have positive sizes"):
        InputSpec((0,), 0.0, 1.0, "amplitude")


def test_the_mel_scale_and_its_inverse():
    frequency = torch.tensor([0.0, 440.0, 1000.0, 8000.0], dtype=torch.float64)
    torch.testing.assert_close(mel_to_hertz(hertz_to_mel(frequency)), frequency)
    assert hertz_to_mel(1000.0).item() == pytest.approx(1000, abs=0.2)  # how the scale is made


def test_mel_triangles_sum_to_one_between_their_centres():
    filters = mel_filters(257, 40, 16_000, 50.0, 8000.0)
    inner = filters.sum(1)[20:220]
    torch.testing.assert_close(inner, torch.ones(200), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"0 <= low < high <= 8000 Hz, got 0.0 and 9000.0"):
        mel_filters(257, 40, 16_000, 0.0, 9000.0)


def test_a_tone_lights_its_own_bin():
    log_mel = LogMel(mels=40)
    time = torch.arange(16_000) / 16_000
    centres = mel_to_hertz(
        torch.linspace(float(hertz_to_mel(50.0)), float(hertz_to_mel(8000.0)), 42, dtype=torch.float64)
    )[1:-1]
    for bin_ in (10, 25, 35):
        tone = 0.5 * torch.sin(2 * torch.pi * centres[bin_] * time).float()[None]
        assert (log_mel(tone)[0, 0].argmax(1) == bin_).all()


def test_the_front_end_has_the_gradient_of_finite_differences():
    log_mel = LogMel(window=64, hop=16, mels=8).double()
    log_mel.filters = log_mel.filters.double()
    x = (0.1 * torch.randn(1, 128, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(log_mel, (x,))


def test_silence_has_a_finite_gradient_and_near_silence_a_live_one():
    for level in (0.0, 1e-6):
        x = (level * torch.randn(2, 2048)).requires_grad_()
        LogMel()(x).sum().backward()
        assert x.grad.isfinite().all()
        assert (x.grad.abs().sum(1) > 0).all() == (level > 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hop": 600}, "`window` must be even and `hop` lie in 1..window, got window=512 and hop=600"),
        ({"window": 255, "hop": 10}, "`window` must be even"),
        ({"floor": 0.0}, "`floor` must be positive"),
    ],
)
def test_front_end_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LogMel(**settings)


def test_a_waveform_shorter_than_a_window_says_so():
    with pytest.raises(ValueError, match="at least 512 samples for one frame, got 100"):
        LogMel()(torch.zeros(1, 100))
