"""Kaldi's filter bank: ours on a batch, and torchaudio's clip by clip.

`python benchmarks/fbank.py --write` measures (under a minute on two idle cores; torchaudio must be installed) and writes
its section of docs/benchmarks.md; `--quick` is a smoke run. Ends with status 1 if the numbers are not torchaudio's.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

# Threads that wait must sleep, or whatever else runs on the machine decides the ratios; read when torch is imported.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["GOMP_SPINCOUNT"] = "0"

import torch
import torchaudio
from timing import interleave, machine, ratio, write_section
from torch import Tensor
from torchaudio.compliance.kaldi import fbank

from robustav.fbank import Fbank
from robustav.prepare import medium_is_exact, quick_products

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
CPU = torch.device("cpu")
CLIPS, SECONDS, BINS = 16, 10, 128
SAME = 1e-3  # largest difference, in units of the natural logarithm
BAR, QUICK_BAR = 0.65, 0.55
PEER, OURS, QUICK = "torchaudio, clip by clip", "ours", "ours, quick products"

ABOUT = """
## Kaldi's filter bank: ours and torchaudio's

`python benchmarks/fbank.py --write`. {machine}, torchaudio {torchaudio}. CPU time over torchaudio's.

{bins} bins of {clips} clips of {seconds} s at 16 kHz, noise of 0.1 with tones of 0.3; {rounds} rounds.

- **torchaudio, clip by clip** is `compliance.kaldi.fbank` as AST, Audio-MAE and CAV-MAE call it: it takes one clip.
- **ours** is `Fbank` on the batch, which it walks through in pieces that stay in the cache: at this length, one clip.
- With **quick products**, as attacks run it, the mel product takes the CPU's faster kernels where those are as exact:
  here they are{exact}.
- **With its gradient** each is followed by the backward pass to the waveform.
"""


def clips(count: int) -> Tensor:
    """Noise with a tone in each clip."""
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(SECONDS * 16_000) / 16_000
    tones = torch.linspace(200, 4000, count)[:, None]
    return 0.1 * torch.randn(count, len(time), generator=generator) + 0.3 * torch.sin(2 * torch.pi * tones * time)


def theirs(waveform: Tensor) -> Tensor:
    return torch.stack(
        [
            fbank(
                (clip - clip.mean())[None],
                htk_compat=True,
                sample_frequency=16_000,
                use_energy=False,
                window_type="hanning",
                num_mel_bins=BINS,
                dither=0.0,
                frame_shift=10,
            )
            for clip in waveform
        ]
    )


def quick(analyse: Callable[[Tensor], Tensor], waveform: Tensor) -> Tensor:
    with quick_products():
        return analyse(waveform)


def forward(analyse: Callable[[Tensor], Tensor], waveform: Tensor) -> Tensor:
    with torch.no_grad():
        return analyse(waveform)


def with_gradient(analyse: Callable[[Tensor], Tensor], waveform: Tensor) -> Tensor:
    leaf = waveform.clone().requires_grad_()
    with quick_products() if analyse is not theirs else torch.enable_grad():
        return torch.autograd.grad(analyse(leaf).sum(), leaf)[0]


def lines(header: list[str], rows: dict[str, list[str]]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *([name, *row] for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run: few clips, one round, nothing written")
    parser.add_argument("--write", action="store_true", help=f"write the section of docs/{PAGE.name}")
    options = parser.parse_args()
    rounds, waveform = (1, clips(2)) if options.quick else (options.rounds, clips(CLIPS))
    front_end = Fbank(bins=BINS)
    ways = {PEER: theirs, OURS: front_end, QUICK: partial(quick, front_end)}
    expected = forward(theirs, waveform)
    apart = {name: (forward(way, waveform) - expected).abs() for name, way in ways.items()}
    seconds = interleave({name: partial(forward, way, waveform) for name, way in ways.items()}, rounds, CPU)
    climbing = {PEER: theirs, QUICK: front_end}
    for way in climbing.values():
        with_gradient(way, waveform)
    slopes = interleave({name: partial(with_gradient, way, waveform) for name, way in climbing.items()}, rounds, CPU)
    over = {name: ratio(seconds[name], seconds[PEER]) for name in ways}
    uphill = {name: str(ratio(slopes[name], slopes[PEER])) for name in climbing}
    rows = {
        name: [
            str(over[name]),
            f"{len(waveform) / sorted(seconds[name])[rounds // 2]:.0f}",
            uphill.get(name, ""),
            f"{apart[name].max():.1e}",
            f"{apart[name].mean():.1e}",
        ]
        for name in ways
    }
    bars = {OURS: BAR} | ({QUICK: QUICK_BAR} if medium_is_exact() else {})
    figures = {f"{name} over torchaudio": (over[name].median, bar, ".2f") for name, bar in bars.items()}
    figures |= {f"{name}, largest difference": (apart[name].max().item(), SAME, ".0e") for name in (OURS, QUICK)}
    goals = {
        what: [f"{x:{shape}}", f"{bar:{shape}}", "met" if x <= bar else f"missed by {x - bar:{shape}}"]
        for what, (x, bar, shape) in figures.items()
    }
    about = ABOUT.format(
        machine=machine(CPU),
        torchaudio=torchaudio.__version__,
        bins=BINS,
        clips=len(waveform),
        seconds=SECONDS,
        rounds=rounds,
        exact="" if medium_is_exact() else " not",
    )
    header = ["", "CPU time", "clips a CPU second", "with its gradient", "largest difference", "mean difference"]
    parts = [about, lines(header, rows), "### Goals", lines(["", "figure", "at most", "goal"], goals)]
    text = "\n\n".join(part.strip() for part in parts)
    print(("(a smoke run: its figures mean nothing)\n\n" if options.quick else "") + text)
    if options.write and not options.quick:
        write_section(PAGE, "fbank", text)
    wrong = [name for name in (OURS, QUICK) if not apart[name].max() <= SAME]
    for name in wrong:
        print(f"not torchaudio's numbers: {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
