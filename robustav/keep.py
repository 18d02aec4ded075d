"""Adversarial examples on disk: to hear, to see, and to score again."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib.image
import numpy as np
import scipy.io.wavfile
from safetensors.torch import load_file, save
from torch import Tensor

from robustav.classifier import InputSpec
from robustav.ledger import write_atomically

TENSORS = "inputs.safetensors"


def folder_of(run: Path, condition: str, sample: str) -> Path:
    """Where a clip's example lies. Ids may hold anything, so the name is made safe and kept apart by a digest."""
    safe = re.sub(r"[^\w.-]+", "_", sample).strip("._")[-60:] or "clip"
    return run / "kept" / condition / f"{safe}-{hashlib.sha256(sample.encode()).hexdigest()[:8]}"


def has(run: Path, condition: str, sample: str) -> bool:
    return (folder_of(run, condition, sample) / TENSORS).exists()


def store(run: Path, condition: str, sample: str, inputs: Mapping[str, Tensor], specs: Mapping[str, InputSpec]) -> Path:
    """Write one clip's inputs: exact tensors; a waveform also as 32-bit float WAV, frames also as PNG.

    PNG holds 8 bits a channel, so the pictures are rounded; the tensors are what was scored.
    """
    folder = folder_of(run, condition, sample)
    folder.mkdir(parents=True, exist_ok=True)
    for modality, x in inputs.items():
        spec, values = specs[modality], x.detach().float().cpu().numpy()
        if spec.sample_rate and values.ndim == 1:
            scipy.io.wavfile.write(folder / f"{modality}.wav", spec.sample_rate, values)
        elif values.ndim == 4 and values.shape[1] == 3:
            for number, frame in enumerate(values):
                pixels = np.round(frame.transpose(1, 2, 0) * 255).clip(0, 255).astype(np.uint8)
                matplotlib.image.imsave(folder / f"{modality}-{number:02d}.png", np.ascontiguousarray(pixels))
    # Last: a folder that has the tensors is whole.
    write_atomically(folder / TENSORS, save({m: x.detach().cpu().contiguous() for m, x in inputs.items()}))
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """The exact inputs that `store` wrote."""
    return load_file(folder / TENSORS)
