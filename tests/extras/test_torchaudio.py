"""torchaudio as oracle for the differentiable front ends."""

import pytest
import torch

from robustav.audio import LogMel, hertz_to_mel, mel_filters, mel_to_hertz

pytestmark = pytest.mark.extra("torchaudio")

FILTERS = [  # bins, mels, sample rate, low, high
    (257, 64, 16_000, 50.0, 8000.0),
    (513, 64, 16_000, 0.0, 8000.0),
    (1025, 128, 32_000, 50.0, 14_000.0),
    (201, 40, 16_000, 125.0, 7500.0),
    (129, 23, 8000, 20.0, 4000.0),
]
FRONT_ENDS = [  # window, hop, mels, sample rate, low, high
    (512, 256, 64, 16_000, 50.0, 8000.0),
    (400, 160, 40, 16_000, 125.0, 7500.0),
    (1024, 320, 64, 32_000, 50.0, 14_000.0),
    (512, 512, 32, 16_000, 0.0, 8000.0),
    (250, 100, 20, 8000, 0.0, 4000.0),
]


@pytest.mark.parametrize(("bins", "mels", "sample_rate", "low", "high"), FILTERS)
def test_the_triangles_are_theirs(bins, mels, sample_rate, low, high):
    """To what they lose by computing in float32: half an ulp of 14 kHz, 5e-4 Hz, over 20 Hz, the steepest flank."""
    from torchaudio.functional import melscale_fbanks

    theirs = melscale_fbanks(bins, low, high, mels, sample_rate, norm=None, mel_scale="htk")
    torch.testing.assert_close(mel_filters(bins, mels, sample_rate, low, high), theirs, rtol=0, atol=5e-5)


@pytest.mark.parametrize("frequency", [0.0, 20.0, 440.0, 1000.0, 7999.0])
def test_the_mel_scale_is_theirs_but_for_its_unit(frequency):
    """HTK's two constants are rounded, 2595 = 1127.01 ln 10; only ratios of mels matter to the triangles."""
    from torchaudio.functional.functional import _hz_to_mel

    assert float(hertz_to_mel(frequency)) == pytest.approx(_hz_to_mel(frequency, "htk"), rel=2e-5)
    assert float(mel_to_hertz(hertz_to_mel(frequency))) == pytest.approx(frequency, abs=1e-9)


class Pair:
    """The same log-mel spectrogram, ours and one put together from theirs."""

    def __init__(self, window: int, hop: int, mels: int, sample_rate: int, low: float, high: float) -> None:
        from torchaudio.transforms import MelSpectrogram

        self.ours = LogMel(window=window, hop=hop, mels=mels, sample_rate=sample_rate, low=low, high=high, shift=-2.0)
        self.mel = MelSpectrogram(
            sample_rate, window, hop_length=hop, f_min=low, f_max=high, n_mels=mels, power=2.0, center=False
        )

    def theirs(self, waveform: torch.Tensor) -> torch.Tensor:
        power = self.mel(waveform).transpose(1, 2)[:, None]
        return ((power + self.ours.floor).log() - self.ours.shift) / self.ours.scale


def sounds(seconds: float = 0.25, sample_rate: int = 16_000) -> torch.Tensor:
    """Noise, a loud tone, a faint tone, a click, and silence."""
    time = torch.arange(int(seconds * sample_rate)) / sample_rate
    click = torch.zeros_like(time).index_fill(0, torch.tensor([1000]), 1.0)
    tone = torch.sin(2 * torch.pi * 440 * time)
    return torch.stack([0.3 * torch.randn_like(time).clamp(-3, 3), tone, 1e-3 * tone, click, torch.zeros_like(time)])


@pytest.mark.parametrize("settings", FRONT_ENDS, ids=str)
def test_the_log_mel_spectrogram_is_theirs(settings):
    pair, waveforms = Pair(*settings), sounds()
    ours = pair.ours(waveforms)
    frame_count = 1 + (waveforms.shape[1] - settings[0]) // settings[1]
    assert ours.shape == (len(waveforms), 1, frame_count, settings[2])
    torch.testing.assert_close(ours, pair.theirs(waveforms), rtol=0, atol=5e-5)


@pytest.mark.parametrize("settings", FRONT_ENDS, ids=str)
def test_gradients_through_it_are_theirs(settings):
    """To 1e-4 of each waveform's largest gradient, pulled back from one random direction."""
    pair, waveforms = Pair(*settings), sounds().requires_grad_()
    direction = torch.randn_like(pair.ours(waveforms))
    (ours,) = torch.autograd.grad(pair.ours(waveforms), waveforms, direction)
    (theirs,) = torch.autograd.grad(pair.theirs(waveforms), waveforms, direction)
    assert (ours[:-1].abs().amax(1) > 0).all()
    assert not ours[-1].any()  # power is flat at silence
    assert not theirs[-1].any()
    assert ((ours - theirs).abs().amax(1) <= 1e-4 * theirs.abs().amax(1)).all()
