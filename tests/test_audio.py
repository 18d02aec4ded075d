"""Power spectra."""

import pytest
import torch

from robustav.audio import framed, power_spectrum


@pytest.mark.parametrize(("time", "size"), [(16, 16), (10, 16), (9, 9), (7, 9), (512, None)])
def test_a_power_spectrum_has_the_value_and_the_derivatives_of_its_definition(time: int, size: int | None) -> None:
    frames = torch.randn(2, 3, time, dtype=torch.float64, generator=torch.Generator().manual_seed(time))
    frames.requires_grad_()
    found, defined = power_spectrum(frames, size), torch.fft.rfft(frames, n=size).abs().square()
    torch.testing.assert_close(found, defined)
    weights = torch.linspace(-1, 1, found.shape[-1], dtype=torch.float64)
    slopes = [torch.autograd.grad((y * weights).sum(), frames, create_graph=True)[0] for y in (found, defined)]
    torch.testing.assert_close(*slopes)
    bends = [torch.autograd.grad(slope.square().sum(), frames)[0] for slope in slopes]
    torch.testing.assert_close(*bends)


def test_frames_of_bfloat16_have_a_gradient_too() -> None:
    frames = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    power_spectrum(frames).sum().backward()
    assert frames.grad is not None and frames.grad.dtype is torch.bfloat16 and frames.grad.any()


def test_a_power_spectrum_is_flat_in_silence_and_refuses_frames_that_are_too_long() -> None:
    silence = torch.zeros(1, 8, requires_grad=True)
    power_spectrum(silence).sum().backward()
    assert silence.grad is not None and not silence.grad.any()
    with pytest.raises(ValueError, match="`size` must be at least a frame's 8 samples, got 4"):
        power_spectrum(silence, 4)


@pytest.mark.parametrize(("time", "window", "hop"), [(32, 8, 4), (35, 8, 2), (8, 8, 8), (40, 8, 3), (41, 9, 9)])
def test_frames_are_those_of_unfold_and_so_is_their_gradient(time: int, window: int, hop: int) -> None:
    waveform = torch.randn(3, time, dtype=torch.float64, generator=torch.Generator().manual_seed(time))
    waveform.requires_grad_()
    found, expected = framed(waveform, window, hop), waveform.unfold(1, window, hop)
    assert torch.equal(found, expected)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slopes = [torch.autograd.grad((y * weights).sum(), waveform)[0] for y in (found, expected)]
    torch.testing.assert_close(*slopes)
