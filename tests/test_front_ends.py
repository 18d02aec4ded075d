"""Front ends of published models: the official numbers, true gradients, and live ones where the official are zero."""

import math

import pytest
import torch
from safetensors.torch import load_file

from robustav.data.decode import read_audio
from robustav.fbank import RECIPES, Fbank
from robustav.image import ImageFrontEnd
from robustav.mel import floored_log, hertz_to_slaney, kaldi_filters, slaney_filters, slaney_to_hertz
from robustav.published_log_mel import (
    TAGGING_RECIPES,
    TAL_MEAN,
    TAL_STD,
    MsmMaeLogMel,
    TaggingLogMel,
    TalLogMel,
    long_mel,
)
from robustav.resample import Resample

FLOORED = {"fbank": Fbank, "tal": TalLogMel, "tagging": TaggingLogMel}
LOG_MELS = {**FLOORED, "msm-mae": MsmMaeLogMel}
LINEAR = {"up": (3, 5), "down": (44_100, 16_000), "double": (8000, 16_000)}


def differ(ours, theirs):
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@pytest.fixture(scope="module")
def fixture(shared):
    """Numbers computed with the official code, by the name of the front end."""
    return lambda name: load_file(shared / "reference" / "fixtures" / f"frontend_{name}.safetensors")


@pytest.fixture(scope="module")
def hammer(clips_folder):
    """10 s at 16 kHz."""
    return read_audio(clips_folder / "BfvyPmVMo_20.000.wav")[None]


def differ_above_rounding(ours, theirs):
    """How far two logarithms of power [frame, bin] are apart, less what a transform's rounding is in a bin.

    That is a quarter of a float32's last bit of the frame's loudest bin, in amplitude, and more than a hundredth of what is left in
    the deep nulls of a chirp. It depends on the processor: the official code differs by as much between two of them.
    """
    assert ours.shape == theirs.shape
    rounding = 2**-25 * ((theirs.amax(1, keepdim=True) - theirs) / 2).exp()
    return ((ours - theirs).abs() - 2 * rounding).max().item()


def waveforms(name, fixture):
    numbers = fixture(name)
    return torch.stack([numbers["in.real"], numbers["in.chirp"]])


# The official numbers, each at its stated tolerance.


def test_fbank_is_the_official_one(fixture, hammer):
    official, x = fixture("kaldi_fbank"), waveforms("kaldi_fbank", fixture)
    bit = 2**-22 * 1127 / 21.8  # the last of a logarithm above 2, over the 21.8 mel that a flank is wide
    assert differ(kaldi_filters(512, 128, 20.0, 8000.0).T, official["out.mel_filters"]) <= bit
    for ours, name in zip(Fbank()(x), ("real", "chirp"), strict=True):
        assert differ_above_rounding(ours, official[f"out.fbank_{name}"]) <= 2e-4
    whole = Fbank()(hammer)[0]
    assert differ_above_rounding(whole[::8], official["out.fbank_full_every8th"]) <= 2e-4
    assert [len(whole), whole.mean().item()] == pytest.approx(official["out.fbank_full_stats"][:2].tolist(), abs=1e-5)


@pytest.mark.parametrize(("name", "key"), [("ast", "ast"), ("audio-mae", "ast"), ("cav-mae", "cavmae")])
def test_published_fbanks_are_normalised_after_padding(name, key, fixture):
    ours = Fbank.published(name)(waveforms("kaldi_fbank", fixture))[0]
    assert differ(ours[:198], fixture("kaldi_fbank")[f"out.{key}_norm_real"]) <= 2e-4
    recipe = RECIPES[name]
    assert len(ours) == 1024
    assert ours[198:] == pytest.approx(-recipe.mean / recipe.divisor)


def test_msm_mae_s_log_mel_is_the_official_one(fixture):
    official, x = fixture("msmmae_logmel"), waveforms("msmmae_logmel", fixture)
    assert differ(slaney_filters(400, 80, 50.0, 8000.0).T, official["out.mel_filters_librosa"]) <= 1e-7
    ours = MsmMaeLogMel()(x)
    for each, name in zip(ours, ("real", "chirp"), strict=True):
        assert differ(each.T, official[f"out.lms_{name}_nnaudio"]) <= 1e-3
        assert differ(each.T, official[f"out.lms_{name}_torchaudio"]) <= 1e-3
    normalised = MsmMaeLogMel(mean=ours.mean().item(), std=ours.std().item())(x)
    assert differ(normalised.transpose(1, 2)[:, None], official["out.batch_normalised"]) <= 1e-3


def test_the_tagging_log_mel_is_the_official_one(fixture, hammer):
    official, x = fixture("tagging_logmel64"), waveforms("tagging_logmel64", fixture)
    power = long_mel(magnitude=False)(x - x.mean(1, keepdim=True))[0]
    torch.testing.assert_close(power, official["out.power_mel_real2s"], rtol=1e-4, atol=1e-8)
    for ours, name in zip(TaggingLogMel(frames=None)(x), ("real2s", "chirp"), strict=True):
        assert differ(ours, official[f"out.db_{name}"]) <= 2e-3
    assert differ(TaggingLogMel()(hammer)[0], official["out.db_full400"]) <= 2e-3
    normalised = TaggingLogMel.published("tal-trans")(hammer)[0]
    assert differ(normalised, official["out.normalised_full400"]) <= 2e-3


def test_talnet_s_log_mel_is_the_official_one(fixture, hammer):
    official, x = fixture("talnet_logmel"), waveforms("talnet_logmel", fixture)
    assert differ(slaney_filters(4096, 64, 0.0, 8000.0).T, official["out.mel_filters"]) <= 1e-7
    for ours, name in zip(TalLogMel()(x), ("real2s", "chirp"), strict=True):
        assert differ(ours, official[f"out.logmel_{name}"]) <= 1e-3
    assert differ(TalLogMel()(hammer)[0], official["out.logmel_full"]) <= 1e-3
    normalised = TalLogMel(mean=official["in.mu"], std=official["in.sigma"])(hammer)[0]
    assert differ(normalised, official["out.normalised_full"]) <= 1e-3
    assert differ(TalLogMel.published()(hammer)[0], official["out.normalised_full"]) <= 1e-3
    for ours, key in ((TAL_MEAN, "in.mu"), (TAL_STD, "in.sigma")):
        assert ours == pytest.approx(official[key].tolist(), rel=5.1e-6)  # six digits


def test_resampling_is_the_official_one(fixture):
    official = fixture("resample")
    x = official["in.w44k"]
    best = Resample(44_100, 16_000, zeros=64, rolloff=0.9475937167399596, beta=14.769656459379492)
    assert differ(Resample(44_100, 16_000)(x), official["out.default"]) <= 1e-5
    assert differ(best(x), official["out.kaiser_best"]) <= 1e-5
    assert differ(Resample(48_000, 16_000)(x), official["out.from48k"]) <= 1e-5
    assert differ(Resample(8000, 16_000)(x[:8000]), official["out.up8k16k"]) <= 1e-5


def test_pictures_are_the_official_ones(fixture):
    """But for one pixel in a thousand, halfway between two levels, which the processor rounds up or down."""
    official = fixture("image")
    picture = official["in.rgb_uint8"].permute(2, 0, 1).float() / 255
    stored = ImageFrontEnd(size=48, filter="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    loaded = ImageFrontEnd(size=48)(picture)
    assert differ(loaded, official["out.loader"]) <= 1.001 / 255 / 0.224
    assert ((loaded - official["out.loader"]).abs() > 1e-2).float().mean() <= 1e-3
    assert differ(stored(picture), official["out.extraction"]) <= 1e-2
    unrounded = ImageFrontEnd(size=48, rounded=False)(picture)
    assert 0 < differ(unrounded, official["out.loader"]) <= 2 / 255 / 0.224


# Gradients.


def slopes(front_end, x, step=1e-6):
    """Along a random direction, of a random mixture of the outputs: the gradient's, and finite differences'."""
    direction, x = torch.randn_like(x), x.requires_grad_()
    mixture = torch.randn_like(front_end(x))
    (gradient,) = torch.autograd.grad(front_end(x), x, mixture)
    with torch.no_grad():
        change = front_end(x + step * direction) - front_end(x - step * direction)
    return (gradient * direction).sum().item(), (change * mixture).sum().item() / (2 * step)


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("make", FLOORED.values(), ids=FLOORED)
def test_log_mels_have_the_gradient_of_finite_differences(make, alive):
    loud = 30.0 if alive else 0.1  # so loud that the floor is nothing even in the nulls of a spectrum
    by_gradient, by_difference = slopes(make(alive=alive).double(), loud * torch.randn(2, 2000, dtype=torch.float64))
    assert by_gradient == pytest.approx(by_difference, rel=1e-4)


def test_msm_mae_s_log_mel_has_the_gradient_of_finite_differences():
    by_gradient, by_difference = slopes(MsmMaeLogMel().double(), 0.1 * torch.randn(2, 2000, dtype=torch.float64))
    assert by_gradient == pytest.approx(by_difference, rel=1e-5)


@pytest.mark.parametrize("rates", LINEAR.values(), ids=LINEAR)
def test_resampling_has_the_gradient_of_finite_differences(rates):
    by_gradient, by_difference = slopes(Resample(*rates).double(), torch.randn(2, 900, dtype=torch.float64))
    assert by_gradient == pytest.approx(by_difference, rel=1e-6)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("rounded", [True, False])
def test_resizing_has_the_gradient_of_finite_differences(filter, rounded):
    """Of what it would be without rounding: a step of 1e-6 is too short to see 8 bits."""
    x = (0.3 + 0.4 * torch.rand(2, 3, 17, 23)).double()
    smooth, asked = (ImageFrontEnd(size=8, filter=filter, rounded=r).double() for r in (False, rounded))
    by_gradient, by_difference = slopes(smooth, x)
    assert by_gradient == pytest.approx(by_difference, rel=1e-6)
    mixture = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gradients = [torch.autograd.grad(front_end(x), x, mixture)[0] for front_end in (smooth, asked)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (3, 1)], ids=["one floor", "a floor each"])
def test_the_live_logarithm_floors_forwards_and_adds_backwards(shape):
    power = torch.tensor([0.0, 1e-9, 1e-7, 2.0], dtype=torch.float64).repeat(3, 1).requires_grad_()
    floor = torch.full(shape, 1e-7, dtype=torch.float64).requires_grad_()
    mixture = torch.randn(3, 4, dtype=torch.float64)
    alive, official = (floored_log(power, floor, alive=alive) for alive in (True, False))
    assert torch.equal(alive, official)
    expected = torch.autograd.grad((power + floor).log(), (power, floor), mixture)
    for ours, theirs in zip(torch.autograd.grad(alive, (power, floor), mixture), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    dead = torch.autograd.grad(official, power, mixture)[0]
    assert not dead[:, :2].any() and dead[:, 3].all()


@pytest.mark.parametrize("make", FLOORED.values(), ids=FLOORED)
def test_a_clip_under_the_floor_has_the_official_values_and_a_live_gradient(make):
    quiet = (1e-12 if make is TalLogMel else 1e-7) * torch.randn(3, 4000)
    values, gradients = {}, {}
    for alive in (True, False):
        x = quiet.clone().requires_grad_()
        values[alive] = make(alive=alive)(x)
        (gradients[alive],) = torch.autograd.grad(values[alive].sum(), x)
    assert torch.equal(values[True], values[False])
    assert gradients[True].isfinite().all()
    assert (gradients[True].abs().amax(1) > 0).all()
    assert not gradients[False].any()


def test_far_below_the_loudest_band_the_range_limit_keeps_a_gradient():
    x = torch.cat([0.5 * torch.randn(1, 8000), 1e-10 * torch.randn(1, 8000)], dim=1)
    grids = {}
    for alive in (True, False):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(TalLogMel(alive=alive)(leaf)[:, -5:].sum(), leaf)
        grids[alive] = gradient[0]
    assert not grids[False][-4000:].any() and grids[False][:8000].any()  # the floor follows the peak
    assert grids[True][-4000:].any() and grids[True][:8000].any()
    assert torch.allclose(grids[True][:8000], grids[False][:8000], rtol=1e-2)


@pytest.mark.parametrize("make", LOG_MELS.values(), ids=LOG_MELS)
def test_digital_silence_has_a_finite_gradient(make):
    x = torch.zeros(2, 3000, requires_grad=True)
    y = make()(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all() and gradient.isfinite().all()


def test_pictures_clipped_by_overshoot_keep_a_gradient():
    x = torch.zeros(1, 3, 12, 12)
    x[..., 6:] = 1.0
    x.requires_grad_()
    for rounded in (True, False):
        y = ImageFrontEnd(size=24, rounded=rounded, mean=(0, 0, 0), std=(1, 1, 1))(x)
        assert y.min() == 0 and y.max() == 1
        (gradient,) = torch.autograd.grad(y[..., 13, 14].sum(), x)  # beside the edge: more than 1 before clipping
        assert gradient.abs().sum() > 0.5


# What holds for every front end.


@pytest.mark.parametrize("make", LOG_MELS.values(), ids=LOG_MELS)
def test_log_mels_do_not_mix_clips_nor_touch_states(make):
    front_end, x = make(), 0.1 * torch.randn(3, 16_000)
    before = x.clone()
    together = front_end(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(together[1:2], front_end(x[1:2]), rtol=0, atol=2e-3)
    assert front_end.state_dict() == {} and not list(front_end.parameters())


@pytest.mark.parametrize("make", [Fbank, TaggingLogMel])
def test_chunks_do_not_show(make, monkeypatch):
    x = 0.1 * torch.randn(5, 4000)
    whole = make()(x)
    monkeypatch.setattr("robustav.mel.CHUNK", 1)
    torch.testing.assert_close(make()(x), whole, rtol=0, atol=2e-3)


@pytest.mark.parametrize("make", [Fbank, TaggingLogMel])
def test_a_constant_offset_does_not_show(make):
    x = 0.1 * torch.randn(1, 4000, dtype=torch.float64)
    front_end = make().double()
    torch.testing.assert_close(front_end(x + 0.3), front_end(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", LOG_MELS.values(), ids=LOG_MELS)
def test_twice_the_amplitude_is_the_same_shift_everywhere(make):
    x = 0.1 * torch.randn(1, 4000, dtype=torch.float64)
    front_end = make(frames=8).double()
    shift = {"TalLogMel": 10 * math.log10(2), "TaggingLogMel": 20 * math.log10(4)}.get(make.__name__, math.log(4))
    once, twice = front_end(x)[..., 8:], front_end(2 * x)[..., 8:]
    assert ((twice - once) / shift)[once > once.min() + 1e-6] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("bin_", [10, 40, 100])
def test_a_tone_lights_its_own_band(bin_):
    peak = kaldi_filters(512, 128, 20.0, 8000.0)[:, bin_].argmax() * 16_000 / 512
    tone = 0.5 * torch.sin(2 * torch.pi * peak * torch.arange(8000) / 16_000)[None]
    assert (Fbank()(tone)[0].argmax(1) == bin_).all()


def test_slaney_s_scale_bends_at_a_thousand_hertz():
    assert hertz_to_slaney(1000.0) == pytest.approx(15)
    assert hertz_to_slaney(6400.0) == pytest.approx(42)
    hertz = [0.0, 500.0, 1000.0, 3000.0, 8000.0]
    mels = torch.tensor([hertz_to_slaney(f) for f in hertz], dtype=torch.float64)
    assert slaney_to_hertz(mels).tolist() == pytest.approx(hertz)
    areas = slaney_filters(4096, 64, 0.0, 8000.0).sum(0) * 16_000 / 4096
    assert areas == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("frames", [3, 30])
def test_frames_are_cut_or_padded(frames):
    x = 0.1 * torch.randn(1, 2000)
    for make in (Fbank, TaggingLogMel, MsmMaeLogMel):
        whole, asked = make(frames=None)(x)[0], make(frames=frames)(x)[0]
        assert len(asked) == frames
        kept = min(frames, len(whole))
        assert torch.equal(asked[:kept], whole[:kept]) and not asked[kept:].any()
    assert len(TalLogMel(frames=frames)(x)[0]) == min(frames, 6)


def test_talnet_s_log_mel_can_be_made_without_memory():
    with torch.device("meta"):
        front_end = TalLogMel.published(frames=7)
    assert front_end.means.is_meta and front_end.frames == 7


@pytest.mark.parametrize("name", TAGGING_RECIPES)
def test_tagging_recipes_have_silence_where_their_scale_has_it(name):
    recipe = TAGGING_RECIPES[name]
    assert TaggingLogMel.published(name)(torch.zeros(1, 1000))[0, 0] == pytest.approx(
        (-200 - recipe.mean) / recipe.divisor
    )


@pytest.mark.parametrize("rates", LINEAR.values(), ids=LINEAR)
def test_a_tone_stays_a_tone_at_another_rate(rates):
    low, high = min(rates), max(rates)
    time = torch.arange(4 * low, dtype=torch.float64) if low > 100 else torch.arange(600, dtype=torch.float64)
    frequency = 0.06 * low  # well inside either band
    ours = Resample(*rates).double()(torch.sin(2 * torch.pi * frequency * time / rates[0])[None, :6000])[0]
    there = torch.sin(2 * torch.pi * frequency * torch.arange(len(ours)) / rates[1])
    assert len(ours) == math.ceil(min(6000, len(time)) * rates[1] / rates[0])
    inner = slice(len(ours) // 5, -len(ours) // 5)
    torch.testing.assert_close(ours[inner], there.double()[inner], rtol=0, atol=1e-2)
    assert high > low


def test_a_tone_that_the_lower_rate_cannot_hold_vanishes():
    tone = torch.sin(2 * torch.pi * 11_000 * torch.arange(44_100) / 44_100)
    assert Resample(44_100, 16_000)(tone)[500:-500].abs().max() < 0.01


def test_the_same_rate_changes_nothing_and_axes_before_time_stay():
    x = torch.randn(2, 3, 100)
    assert Resample(16_000, 16_000)(x) is x
    ours = Resample(2, 1)(x)
    assert ours.shape == (2, 3, 50)
    torch.testing.assert_close(ours[1, 2], Resample(4, 2)(x[1, 2]))


def test_frames_of_the_right_size_are_only_normalised():
    x = torch.rand(2, 4, 3, 20, 20)
    ours = ImageFrontEnd(size=20)(x)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(ours, (x - mean) / std)


def test_the_crop_is_central_whichever_side_is_long():
    x = torch.zeros(3, 10, 30)
    x[:, :, 10:20] = 1.0
    plain = ImageFrontEnd(size=10, mean=(0, 0, 0), std=(1, 1, 1))
    assert plain(x).eq(1).all()
    assert plain(x.transpose(1, 2)).eq(1).all()


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fbank(bins=0), "`bins` must be at least 1, got 0"),
        (lambda: Fbank(frames=0), "`frames` must be at least 1, or None .*, got 0"),
        (lambda: Fbank(divisor=0.0), "`mean` must be finite and `divisor` positive and finite, got 0.0 and 0.0"),
        (lambda: Fbank.published("vit"), r"`name` must be one of \['ast', .*got 'vit'"),
        (lambda: TaggingLogMel.published("vit"), r"`name` must be one of \['ast', .*got 'vit'"),
        (lambda: TalLogMel(std=torch.zeros(64)), "`divisor` positive and finite, got 0.0 and 0.0"),
        (
            lambda: TalLogMel(mean=torch.zeros(3)),
            r"`mean` must be a number or 64 of them, one for each band, got \[3\]",
        ),
        (lambda: MsmMaeLogMel(std=-1.0), "`divisor` positive and finite, got 0.0 and -1.0"),
        (lambda: Fbank()(torch.zeros(1, 399)), "a waveform needs at least 400 samples, got 399"),
        (lambda: MsmMaeLogMel()(torch.zeros(1, 200)), "a waveform needs at least 201 samples, got 200"),
        (lambda: Resample(0, 5), "`from_rate` and `to_rate` must be at least 1 Hz, got 0 and 5"),
        (lambda: Resample(1, 2, zeros=0), r"`zeros` must be at least 1 and `rolloff` lie in \(0, 1\], got 0 and 0.99"),
        (lambda: ImageFrontEnd(size=0), "`size` must be at least 1 pixel, got 0"),
        (lambda: ImageFrontEnd(filter="box"), r"`filter` must be one of \['bicubic', 'bilinear'\], got 'box'"),
        (lambda: ImageFrontEnd(std=(1, 1, 0)), "`std` positive, got"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Clips that end before the model's window does: padded with zeros, which the front end takes for padding.


def official_fbank(clip):
    """Kaldi's filter bank of a clip as it is, filled up to 1024 frames, then normalised, as AST's authors do."""
    filled = (0, 0, 0, 1024 - (1 + (len(clip) - 400) // 160))
    return (torch.nn.functional.pad(Fbank().double()(clip[None])[0], filled) + 4.2677393) / (2 * 4.5689974)


@pytest.mark.parametrize("length", [400, 48_000, 100_001, 159_999, 160_000])
def test_a_short_clip_has_the_features_of_what_it_is(length):
    """In float64: the deep nulls of a spectrum are rounding, which depends on the processor."""
    clip = 0.1 * torch.randn(length, dtype=torch.float64) + 0.05
    padded = torch.nn.functional.pad(clip, (0, 160_000 - length))[None]
    assert differ(Fbank.published("ast").double()(padded)[0], official_fbank(clip)) <= 1e-9
    tagging = TaggingLogMel.published("tal").double()
    frames = 1 + length // 400
    whole = TaggingLogMel(frames=None).double()(clip[None])[0][:400]
    filled = torch.nn.functional.pad(whole, (0, 0, 0, max(0, 400 - frames)))
    assert differ(tagging(padded)[0], (filled - tagging.mean) / tagging.divisor) <= 1e-9


@pytest.mark.parametrize(
    "front_end", [Fbank.published("cav-mae"), TaggingLogMel.published("ast")], ids=["fbank", "tagging"]
)
def test_padding_is_found_clip_by_clip(front_end):
    mates = 0.1 * torch.randn(3, 160_000)
    mates[0, 70_000:] = 0
    mates[1] = 0  # digital silence is no padding: floored, and finite
    together = front_end(mates)
    for clip, alone in zip(mates, together, strict=True):
        assert differ(front_end(clip[None])[0], alone) <= 1e-6
    assert together.isfinite().all()
    empty = -front_end.mean / front_end.divisor
    assert differ(together[0, -50:], torch.full_like(together[0, -50:], empty)) <= 1e-6
    assert (together[1, 100] < empty).all()


def test_a_silent_tail_has_no_gradient_and_the_signal_has():
    waveform = torch.cat([0.1 * torch.randn(1, 80_000), torch.zeros(1, 80_000)], dim=1).requires_grad_()
    Fbank.published("ast")(waveform).square().sum().backward()
    assert waveform.grad[0, 80_000:].abs().max() == 0
    assert waveform.grad[0, :80_000].abs().mean() > 0
