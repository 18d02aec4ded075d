"""torchaudio as oracle for the front ends of published models, on more sounds and settings than the fixtures hold."""

import pytest
import torch

from robustav.fbank import Fbank
from robustav.published_log_mel import MsmMaeLogMel, TaggingLogMel
from robustav.resample import Resample

pytestmark = pytest.mark.extra("torchaudio")

RATES = [(44_100, 16_000), (48_000, 16_000), (8000, 16_000), (22_050, 16_000), (3, 7), (16_000, 44_100)]


def sounds(seconds: float = 0.5) -> torch.Tensor:
    """Noise, a loud tone, a faint tone with an offset, a click, and silence."""
    time = torch.arange(int(seconds * 16_000)) / 16_000
    click = torch.zeros_like(time).index_fill(0, torch.tensor([1000]), 1.0)
    tone = torch.sin(2 * torch.pi * 440 * time)
    noise = 0.1 * torch.randn_like(time)
    return torch.stack([noise, tone, 1e-3 * tone + 0.1, click, torch.zeros_like(time)])


def kaldi(waveform: torch.Tensor, bins: int = 128) -> torch.Tensor:
    """Clip by clip, as the authors of AST, Audio-MAE and CAV-MAE call it."""
    from torchaudio.compliance.kaldi import fbank

    return torch.stack(
        [
            fbank(
                (clip - clip.mean())[None],
                htk_compat=True,
                sample_frequency=16_000,
                use_energy=False,
                window_type="hanning",
                num_mel_bins=bins,
                dither=0.0,
                frame_shift=10,
            )
            for clip in waveform
        ]
    )


@pytest.mark.parametrize("bins", [23, 64, 128])
def test_the_filter_bank_is_theirs(bins):
    """To the rounding of nulls: one ulp of the clip's mean, and a null 60 dB deep moves by 1e-3."""
    x = sounds()
    assert (Fbank(bins=bins)(x) - kaldi(x, bins)).abs().max() <= 1e-3


def test_the_filter_bank_s_official_gradient_is_theirs():
    """In float64, where nulls are no rounding."""
    x = sounds()[:4].double().requires_grad_()
    front_end = Fbank(alive=False).double()
    ours, theirs = front_end(x), kaldi(x)
    direction = torch.randn_like(ours) * (theirs > -10)  # where neither is near the floor, which rounding decides
    ours, theirs = (torch.autograd.grad(y, x, direction)[0] for y in (ours, theirs))
    assert (theirs.abs().amax(1) > 0).all()
    assert ((ours - theirs).abs().amax(1) <= 1e-3 * theirs.abs().amax(1)).all()


@pytest.mark.parametrize(("low", "high"), RATES)
def test_resampling_is_theirs(low, high):
    from torchaudio.functional import resample

    x = torch.randn(2, 5000)
    torch.testing.assert_close(Resample(low, high)(x), resample(x, low, high), rtol=0, atol=5e-5)


@pytest.mark.parametrize("beta", [2.0, 14.77])
def test_resampling_under_a_kaiser_window_is_theirs(beta):
    from torchaudio.functional import resample

    x = torch.randn(2, 5000, dtype=torch.float64)
    options = {"lowpass_filter_width": 16, "rolloff": 0.9, "resampling_method": "sinc_interp_kaiser", "beta": beta}
    ours = Resample(441, 160, zeros=16, rolloff=0.9, beta=beta).double()(x)
    torch.testing.assert_close(ours, resample(x, 441, 160, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (MsmMaeLogMel(), {"n_fft": 400, "hop_length": 160, "f_min": 50.0, "n_mels": 80}),
        (
            TaggingLogMel(frames=None),
            {"n_fft": 4096, "win_length": 1024, "hop_length": 400, "n_mels": 64, "pad_mode": "constant"},
        ),
    ],
    ids=["msm-mae", "tagging"],
)
def test_centred_bands_are_theirs(ours, options):
    from torchaudio.transforms import MelSpectrogram

    x = sounds()
    mel = MelSpectrogram(16_000, f_max=8000.0, norm="slaney", mel_scale="slaney", power=2.0, **options)
    torch.testing.assert_close(ours.mel(x), mel(x).transpose(1, 2), rtol=1e-3, atol=1e-6)
